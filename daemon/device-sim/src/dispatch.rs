//! One request against the world and the faults that are set.

use gcgroup_kernels::engine::EngineError;
use rustix::io::Errno;
use rustix::process::{Pid, test_kill_process};

use crate::fault::{Effect, Failure, FaultId, Faults, Hit, Refused};
use crate::shape;
use crate::wire::{Answer, GpuLine, Request, SampleLine};
use crate::world::{ClientMissing, ContextId, MpsId, World};

/// What a connection stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// Calls of the service or of a test.
    Caller,
    /// A context of a worker or of another program.
    Context(ContextId),
    /// A running MPS server.
    Mps(MpsId),
}

/// Who sent a request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Peer {
    pub(crate) pid: u32,
    pub(crate) role: Role,
}

/// What becomes of a request.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// It is answered.
    Reply(Result<Answer, Failure>),
    /// It is done, and has no answer.
    Silent,
    /// It waits until the fault is cleared.
    HoldFor(FaultId),
    /// It waits so many microseconds.
    Delay(u64),
    /// The sender's connection ends.
    Cut,
    /// The connections of this process's contexts end; it is answered.
    CutProcess(u32),
}

/// Whether faults still have to be looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Heed {
    Faults,
    /// One has struck already and let it through.
    Nothing,
}

/// The simulated host's state.
#[derive(Debug)]
pub(crate) struct Simulation {
    pub(crate) world: World,
    pub(crate) faults: Faults,
    pub(crate) seed: u64,
}

type Answered = Result<Answer, Failure>;

impl Simulation {
    /// Does what a request asks.
    pub(crate) fn handle(&mut self, peer: &mut Peer, request: &Request, heed: Heed) -> Outcome {
        if heed == Heed::Faults
            && let Some(hit) = self.strike(peer, request)
        {
            match hit.effect {
                Effect::Fail(failure) => return self.fail(peer, request, failure),
                Effect::Delay { usec } => return Outcome::Delay(usec),
                Effect::Cut => return Outcome::Cut,
                Effect::Hang => {
                    if let Some(fault) = hit.fault {
                        return Outcome::HoldFor(fault);
                    }
                }
            }
        }
        match request {
            Request::Submit {
                target,
                submitted_ns,
            } => self.submit(peer, *target, *submitted_ns),
            Request::CutProcess { pid } => Outcome::CutProcess(*pid),
            Request::Open { .. }
            | Request::Prepare(_)
            | Request::Allocate { .. }
            | Request::Place(_)
            | Request::RaiseStop
            | Request::LowerStop
            | Request::Progress
            | Request::Verify => {
                Outcome::Reply(self.worker(peer, request).map_err(Failure::Worker))
            }
            _ => Outcome::Reply(match request.operation() {
                Some(_) => self.service(peer, request).map_err(Failure::Service),
                None => self.control(request),
            }),
        }
    }

    fn strike(&mut self, peer: &Peer, request: &Request) -> Option<Hit> {
        let operation = request.operation()?;
        let (gpu, pid) = match (request, peer.role) {
            (Request::Open { gpu, .. }, _) => (Some(*gpu), peer.pid),
            (Request::Sample { gpu } | Request::MpsStart { gpu }, _) => (Some(*gpu), peer.pid),
            (Request::Find { gpu, pid, .. }, _) => (Some(*gpu), *pid),
            (Request::Timeslices { pid, .. } | Request::SetTimeslice { pid, .. }, _) => {
                (None, *pid)
            }
            (_, Role::Context(id)) => (self.world.owner(id).map(|(_, gpu)| gpu), peer.pid),
            (_, Role::Mps(id)) => (self.world.mps_gpu(id), peer.pid),
            (_, Role::Caller) => (None, peer.pid),
        };
        self.faults.strike(operation, gpu, Some(pid))
    }

    /// Fails a call. A worker's context that the driver calls failed stays so.
    fn fail(&mut self, peer: &Peer, request: &Request, failure: Failure) -> Outcome {
        if let (Failure::Worker(error), Role::Context(id)) = (&failure, peer.role) {
            let unanswered = matches!(request, Request::Submit { .. });
            if unanswered || matches!(error, EngineError::Failed(_)) {
                self.world.break_context(id, error);
            }
            if unanswered {
                return Outcome::Silent;
            }
        }
        Outcome::Reply(Err(failure))
    }

    fn submit(&mut self, peer: &Peer, target: u64, submitted_ns: u64) -> Outcome {
        if let Role::Context(id) = peer.role
            && let Err(error) = self.world.submit(id, target, submitted_ns)
        {
            self.world.break_context(id, &error);
        }
        Outcome::Silent
    }

    fn worker(&mut self, peer: &mut Peer, request: &Request) -> Result<Answer, EngineError> {
        let no_context = || EngineError::Failed("this connection has no context".to_owned());
        if let Request::Open { gpu, mps } = request {
            if peer.role != Role::Caller {
                return Err(EngineError::Unsupported(
                    "a connection has one context".to_owned(),
                ));
            }
            let id = self.world.open(*gpu, peer.pid, mps.as_deref())?;
            peer.role = Role::Context(id);
            return Ok(Answer::Opened(shape::facts()));
        }
        let Role::Context(id) = peer.role else {
            return Err(no_context());
        };
        match request {
            Request::Prepare(plan) => {
                let (buffer_bytes, context_bytes) = self.world.prepare(id, plan)?;
                return Ok(Answer::Prepared {
                    buffer_bytes,
                    context_bytes,
                });
            }
            Request::Allocate { bytes } => self.world.allocate(id, *bytes)?,
            Request::Place(placement) => {
                let sm_count = self.world.place(id, placement)?;
                return Ok(Answer::Placed { sm_count });
            }
            Request::RaiseStop => self.world.raise_stop(id)?,
            Request::LowerStop => self.world.lower_stop(id)?,
            _ => {
                let (units, blocks) = self.world.cursor(id)?;
                return Ok(Answer::Cursor { units, blocks });
            }
        }
        Ok(Answer::Done)
    }

    fn service(&mut self, peer: &mut Peer, request: &Request) -> Result<Answer, Refused> {
        match request {
            Request::Gpus => Ok(Answer::Gpus(self.gpu_lines())),
            Request::Sample { gpu } => self.sample(*gpu),
            Request::MpsStart { gpu } => {
                if peer.role != Role::Caller {
                    return Err(Refused::Failed(
                        "a connection has one MPS server".to_owned(),
                    ));
                }
                self.present(*gpu)?;
                let (id, token) = self.world.start_mps(*gpu).map_err(|error| match error {
                    EngineError::Unsupported(text) => Refused::Unsupported(text),
                    other => Refused::Failed(other.to_string()),
                })?;
                peer.role = Role::Mps(id);
                Ok(Answer::MpsToken(token))
            }
            Request::MpsAlive => Ok(Answer::Alive(match peer.role {
                Role::Mps(id) => self.world.mps_runs(id),
                _ => false,
            })),
            Request::MpsStop => {
                if let Role::Mps(id) = peer.role {
                    self.world.stop_mps(id);
                }
                Ok(Answer::Done)
            }
            Request::Mark => Ok(Answer::Mark(self.world.mark())),
            Request::Find { pid, gpu, mark } => {
                self.present(*gpu)?;
                let found = self.world.find_client(*pid, *gpu, *mark);
                let (client, groups) = found.map_err(|missing| explain(missing, *pid, *gpu))?;
                let groups = groups.to_vec();
                Ok(Answer::Found { client, groups })
            }
            Request::Timeslices {
                pid,
                client,
                groups,
            } => self.timeslices(*pid, *client, groups),
            Request::SetTimeslice {
                pid,
                client,
                groups,
                usec,
            } => {
                if *usec == 0 {
                    return Err(Refused::Failed("a timeslice of 0 us".to_owned()));
                }
                self.world
                    .set_timeslices(*client, groups, *usec)
                    .map_err(|_| Refused::NoProcess(*pid))?;
                self.timeslices(*pid, *client, groups)
            }
            other => Err(Refused::Failed(format!("{other:?} is not the service's"))),
        }
    }

    fn timeslices(&self, pid: u32, client: u32, groups: &[u32]) -> Result<Answer, Refused> {
        let slices = self.world.timeslices(client, groups);
        slices
            .map(Answer::Timeslices)
            .map_err(|_| Refused::NoProcess(pid))
    }

    fn present(&self, gpu: u32) -> Result<(), Refused> {
        match self.world.state(gpu) {
            Some(_) => Ok(()),
            None => Err(Refused::NoGpu(gpu)),
        }
    }

    fn gpu_lines(&self) -> Vec<GpuLine> {
        let line = |index| {
            Some(GpuLine {
                index,
                uuid: self.world.uuid(index),
                name: shape::NAME.to_owned(),
                memory_bytes: shape::MEMORY_BYTES,
                xids: self.world.state(index)?.xids,
            })
        };
        self.world.gpus().filter_map(line).collect()
    }

    fn sample(&self, gpu: u32) -> Result<Answer, Refused> {
        let state = self.world.state(gpu).ok_or(Refused::NoGpu(gpu))?;
        Ok(Answer::Sample(SampleLine {
            memory_used: state.memory_used,
            xids: state.xids,
            busy: state.usage.busy,
            sm_active: state.usage.sm_active,
            occupancy: state.usage.occupancy,
            dram: state.usage.dram,
        }))
    }

    fn control(&mut self, request: &Request) -> Answered {
        let refuse = |error: crate::fault::FaultRefused| {
            Failure::Service(Refused::Unsupported(error.to_string()))
        };
        match request {
            Request::Describe => {
                return Ok(Answer::Described(format!(
                    "simulated host, CUDA 13.0, seed {}",
                    self.seed
                )));
            }
            Request::MpsSlots => return Ok(Answer::Slots(self.world.mps_slots())),
            Request::SetFault(spec) => {
                let id = self.faults.set(spec.clone()).map_err(refuse)?;
                return Ok(Answer::Fault(id));
            }
            Request::FaultHits(id) => return Ok(Answer::Hits(self.faults.hits(*id))),
            Request::Clients => return Ok(Answer::Clients(self.world.clients())),
            Request::ClearFault(id) => self.faults.clear(*id),
            Request::ClearFaults => self.faults.clear_all(),
            Request::RandomFaults(random) => {
                if let Some(random) = random {
                    tracing::warn!(
                        seed = random.seed,
                        probability = random.probability,
                        "faults at random from now on"
                    );
                }
                self.faults.set_random(*random).map_err(refuse)?;
            }
            Request::LoseMps { gpu } => self.world.lose_mps(*gpu),
            Request::LoseGpu { gpu } => self.world.lose_gpu(*gpu),
            Request::RestoreGpu { gpu } => self.world.restore_gpu(*gpu),
            Request::RaiseXids { gpu, count } => self.world.raise_xids(*gpu, *count),
            other => {
                return Err(Failure::Service(Refused::Failed(format!(
                    "{other:?} is no control request"
                ))));
            }
        }
        Ok(Answer::Done)
    }

    /// Ends what a connection stood for.
    pub(crate) fn part(&mut self, peer: Peer) {
        match peer.role {
            Role::Caller => {}
            Role::Context(id) => self.world.close(id),
            Role::Mps(id) => self.world.stop_mps(id),
        }
    }
}

fn explain(missing: ClientMissing, pid: u32, gpu: u32) -> Refused {
    match missing {
        ClientMissing::Mps => Refused::Failed(format!(
            "process {pid} is an MPS client: its channels are in the server's group"
        )),
        ClientMissing::NoContext if lives(pid) => Refused::Failed(format!(
            "process {pid} has opened no channel group on GPU {gpu}"
        )),
        ClientMissing::NoContext | ClientMissing::Gone => Refused::NoProcess(pid),
    }
}

fn lives(pid: u32) -> bool {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    pid.is_some_and(|pid| !matches!(test_kill_process(pid), Err(Errno::SRCH)))
}
