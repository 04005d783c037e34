//! What the service asks of the simulated host.

use gcgroup_device::Handle;
use gcgroup_kernels::engine::EngineError;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use rustix::time::Timespec;

use super::{Peer, Role, Simulation};
use crate::fault::Refused;
use crate::shape;
use crate::wire::{Answer, ChannelsOf, GpuLine, Listed, Onward, Request, SampleLine};
use crate::world::{Gone, Missing};

impl Simulation {
    pub(super) fn service(
        &mut self,
        peer: &mut Peer,
        request: &Request,
    ) -> Result<Answer, Refused> {
        match request {
            Request::Gpus => Ok(Answer::Gpus(self.gpu_lines())),
            Request::Sample { gpu } => self.sample(*gpu),
            Request::Processes { gpu } => {
                self.present(*gpu)?;
                Ok(Answer::Processes(self.world.processes(*gpu)))
            }
            Request::MpsStart { gpu } => self.start_mps(peer, *gpu),
            Request::MpsAlive => Ok(Answer::Alive(match peer.role {
                Role::Mps(id) => self.world.mps_runs(id),
                Role::Caller | Role::Context(_) | Role::Counter(_) => false,
            })),
            Request::MpsStop => {
                if let Role::Mps(id) = peer.role {
                    self.world.stop_mps(id);
                }
                Ok(Answer::Done)
            }
            Request::Mark => Ok(Answer::Mark(self.world.mark())),
            Request::List {
                pid,
                gpu,
                above,
                onward,
            } => self.list(*pid, *gpu, *above, onward.as_ref()),
            Request::Timeslices { pid, groups } => self.timeslices(*pid, groups),
            Request::SetTimeslice { pid, groups, usec } => {
                if *usec == 0 {
                    return Err(Refused::Failed("a timeslice of 0 us".to_owned()));
                }
                self.world
                    .set_timeslices(groups, *usec)
                    .map_err(|gone| explain(gone, *pid))?;
                self.timeslices(*pid, groups)
            }
            Request::CountLaunches { pid } => self.count_launches(peer, *pid),
            Request::ReadLaunches => self.read_launches(peer),
            other => Err(Refused::Failed(format!("{other:?} is not the service's"))),
        }
    }

    fn start_mps(&mut self, peer: &mut Peer, gpu: u32) -> Result<Answer, Refused> {
        free(peer)?;
        self.present(gpu)?;
        let (id, token) = self.world.start_mps(gpu).map_err(|error| match error {
            EngineError::Unsupported(text) => Refused::Unsupported(text),
            other => Refused::Failed(other.to_string()),
        })?;
        peer.role = Role::Mps(id);
        Ok(Answer::MpsToken(token))
    }

    fn list(
        &self,
        pid: u32,
        gpu: u32,
        above: u32,
        onward: Option<&Onward>,
    ) -> Result<Answer, Refused> {
        self.present(gpu)?;
        let found = onward.and_then(|onward| self.world.list_onward(pid, gpu, onward));
        if let Some(found) = found {
            return Ok(Answer::Listed(found));
        }
        match self.world.list(pid, gpu, above) {
            Ok(set) => Ok(Answer::Listed(Listed {
                reached: self.world.reached(&set),
                set,
                whole: true,
            })),
            Err(Missing::Mps) => Err(Refused::Failed(format!(
                "process {pid} is an MPS client: its channels are in the server's group"
            ))),
            Err(Missing::NoContext) if lives(pid) => Err(Refused::NoContext(format!(
                "process {pid} has opened no channel group on GPU {gpu}"
            ))),
            Err(Missing::NoContext) => Err(Refused::NoProcess(pid)),
        }
    }

    fn timeslices(&mut self, pid: u32, groups: &[Handle]) -> Result<Answer, Refused> {
        let slices = self.world.timeslices(groups);
        slices
            .map(Answer::Timeslices)
            .map_err(|gone| explain(gone, pid))
    }

    /// Stops the channels of some processes; those before one that is gone stay
    /// stopped.
    pub(super) fn stop(&mut self, channels: &ChannelsOf) -> Result<Answer, Refused> {
        self.present(channels.gpu)?;
        for set in &channels.sets {
            self.world
                .stop(channels.gpu, set.channels.iter().copied())
                .map_err(|gone| without(gone, "channel"))?;
        }
        Ok(Answer::Done)
    }

    pub(super) fn resume(&mut self, channels: &ChannelsOf) -> Result<Answer, Refused> {
        self.present(channels.gpu)?;
        for set in &channels.sets {
            self.world
                .resume(channels.gpu, set.channels.iter().copied());
        }
        Ok(Answer::Done)
    }

    fn count_launches(&mut self, peer: &mut Peer, pid: u32) -> Result<Answer, Refused> {
        free(peer)?;
        if !lives(pid) {
            return Err(Refused::NoProcess(pid));
        }
        peer.role = Role::Counter(self.world.counters.begin(pid));
        Ok(Answer::Done)
    }

    fn read_launches(&self, peer: &Peer) -> Result<Answer, Refused> {
        let Role::Counter(id) = peer.role else {
            return Err(Refused::Failed("nothing is counted here".to_owned()));
        };
        if !lives(id.pid) {
            return Err(Refused::NoProcess(id.pid));
        }
        let launches = self.world.counters.read(id);
        Ok(Answer::Launches {
            total: launches.total,
            graphs: launches.graphs,
        })
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
}

/// A connection stands for one thing at most.
fn free(peer: &Peer) -> Result<(), Refused> {
    match peer.role {
        Role::Caller => Ok(()),
        Role::Context(_) | Role::Mps(_) | Role::Counter(_) => Err(Refused::Failed(
            "this connection stands for something else already".to_owned(),
        )),
    }
}

fn explain(gone: Gone, pid: u32) -> Refused {
    if lives(pid) {
        without(gone, "channel group")
    } else {
        Refused::NoProcess(pid)
    }
}

fn without(Gone(handle): Gone, what: &str) -> Refused {
    Refused::Failed(format!(
        "{what} {:#x} of client {:#x} is gone",
        handle.object, handle.client
    ))
}

/// Whether a process has not ended. One that its parent has not waited for has.
fn lives(pid: u32) -> bool {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let Some(Ok(process)) = pid.map(|pid| pidfd_open(pid, PidfdFlags::empty())) else {
        return false;
    };
    let mut fds = [PollFd::new(&process, PollFlags::IN)];
    let at_once = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // Readable once it has ended.
    poll(&mut fds, Some(&at_once)) == Ok(0)
}
