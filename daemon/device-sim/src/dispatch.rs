//! One request against the world and the faults that are set.

mod service;

use gcgroup_kernels::engine::EngineError;

use crate::fault::{Effect, Failure, FaultId, Faults, Hit, Operation, Refused};
use crate::server::ChannelLatency;
use crate::shape;
use crate::wire::{Answer, ChannelsOf, Launch, OpenAs, Request};
use crate::world::{ContextId, CounterId, MpsId, World};

/// What a connection stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// Calls of the service or of a test.
    Caller,
    /// A context of a worker or of another program.
    Context(ContextId),
    /// A running MPS server.
    Mps(MpsId),
    /// A counter of launches.
    Counter(CounterId),
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
    /// It is done, and answered so many microseconds later.
    Late(u64, Result<Answer, Failure>),
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
    pub(crate) latency: ChannelLatency,
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
                launch,
            } => self.submit(peer, *target, *submitted_ns, *launch),
            Request::CutProcess { pid } => Outcome::CutProcess(*pid),
            Request::Open { .. }
            | Request::Close
            | Request::AddGroup
            | Request::RemoveGroup
            | Request::AddChannel
            | Request::SkipHandles
            | Request::Prepare(_)
            | Request::Allocate { .. }
            | Request::Place(_)
            | Request::RaiseStop
            | Request::LowerStop
            | Request::Progress
            | Request::Verify => {
                Outcome::Reply(self.worker(peer, request).map_err(Failure::Worker))
            }
            Request::Stop(channels) => {
                let usec = self.latency.stop_us(channels.sets.len());
                let stopped = self.stop(channels).map_err(Failure::Service);
                Outcome::Late(usec, stopped)
            }
            Request::Resume(channels) => {
                let usec = self.latency.resume_us(channels.sets.len());
                let resumed = self.resume(channels).map_err(Failure::Service);
                Outcome::Late(usec, resumed)
            }
            _ => Outcome::Reply(match request.operation() {
                Some(_) => self.service(peer, request).map_err(Failure::Service),
                None => self.control(request),
            }),
        }
    }

    fn strike(&mut self, peer: &Peer, request: &Request) -> Option<Hit> {
        let operation = request.operation()?;
        let hit = self.strike_as(operation, peer, request);
        if hit.is_some() {
            return hit;
        }
        let Request::Resume(ChannelsOf { gpu, sets }) = request else {
            return None;
        };
        if sets.iter().all(|set| self.world.has(*gpu, &set.channels)) {
            return None;
        }
        let hit = self.strike_as(Operation::ResumeGone, peer, request)?;
        if let Effect::Fail(_) = hit.effect {
            // Each of the others has been resumed by then.
            for set in sets {
                self.world.resume(*gpu, set.channels.iter().copied());
            }
        }
        Some(hit)
    }

    fn strike_as(&mut self, operation: Operation, peer: &Peer, request: &Request) -> Option<Hit> {
        let own = match peer.role {
            Role::Context(id) => self.world.owner(id).map(|(_, gpu)| gpu),
            Role::Mps(id) => self.world.mps_gpu(id),
            Role::Caller | Role::Counter(_) => None,
        };
        let (gpu, pids) = match request {
            Request::Open { gpu, .. }
            | Request::Sample { gpu }
            | Request::MpsStart { gpu }
            | Request::Processes { gpu } => (Some(*gpu), vec![peer.pid]),
            Request::List { gpu, pid, .. } => (Some(*gpu), vec![*pid]),
            Request::Timeslices { pid, groups } | Request::SetTimeslice { pid, groups, .. } => {
                let group = groups.first();
                let gpu = group.and_then(|group| self.world.gpu_of_client(group.client));
                (gpu, vec![*pid])
            }
            Request::Stop(ChannelsOf { gpu, sets }) | Request::Resume(ChannelsOf { gpu, sets }) => {
                (Some(*gpu), sets.iter().map(|set| set.pid).collect())
            }
            Request::CountLaunches { pid } => (None, vec![*pid]),
            _ => match peer.role {
                Role::Counter(id) => (None, vec![id.pid]),
                Role::Caller | Role::Context(_) | Role::Mps(_) => (own, vec![peer.pid]),
            },
        };
        self.faults.strike(operation, gpu, &pids)
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

    fn submit(&mut self, peer: &Peer, target: u64, submitted_ns: u64, launch: Launch) -> Outcome {
        if let Role::Context(id) = peer.role
            && let Err(error) = self.world.submit(id, target, submitted_ns, launch)
        {
            self.world.break_context(id, &error);
        }
        Outcome::Silent
    }

    fn worker(&mut self, peer: &mut Peer, request: &Request) -> Result<Answer, EngineError> {
        let no_context = || EngineError::Failed("this connection has no context".to_owned());
        if let Request::Open { gpu, open_as } = request {
            if peer.role != Role::Caller {
                return Err(EngineError::Unsupported(
                    "a connection has one context".to_owned(),
                ));
            }
            let token = match open_as {
                OpenAs::MpsClient(token) => Some(token.as_str()),
                OpenAs::Program | OpenAs::MpsServer => None,
            };
            let id = self.world.open(*gpu, peer.pid, token)?;
            if *open_as == OpenAs::MpsServer {
                self.world.call_server(id);
            }
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
            Request::Close => {
                self.world.close(id);
                peer.role = Role::Caller;
            }
            Request::AddGroup => self.world.add_group(id)?,
            Request::RemoveGroup => self.world.remove_group(id)?,
            Request::AddChannel => self.world.add_channel(id)?,
            Request::SkipHandles => self.world.skip_handles(id)?,
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
            Role::Counter(id) => self.world.counters.end(id),
        }
    }
}
