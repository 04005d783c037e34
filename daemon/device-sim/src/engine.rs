//! The simulated GPU as a worker uses it.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use gcgroup_kernels::engine::{
    Completion, Engine, EngineError, Facts, Placement, Plan, Prepared, Progress, Verified,
};
use rustix::event::{EventfdFlags, epoll, eventfd};

use crate::connection::{CallError, Connection, now_ns};
use crate::cost::units_per_iteration;
use crate::fault::Failure;
use crate::wire::{Answer, Launch, Message, OpenAs, Request};

/// Variable whose value makes a process the client of an MPS server.
pub const MPS_VARIABLE: &str = "GCGROUP_SIM_MPS";

/// A context on a simulated GPU. It ends with this value, or with the process.
///
/// The simulated device keeps one cursor and no accumulators: what a thread would
/// have computed is by definition what the CPU reference says of its cursor. So
/// [`Engine::verify`] compares no values. It compares each block's cursor with the
/// sum of what every launch said, when it ended, that it had done: a launch that
/// was lost, or counted twice, shows.
#[derive(Debug)]
pub struct SimEngine {
    connection: Connection,
    facts: Facts,
    /// Messages that came while a call waited for its reply.
    aside: VecDeque<Message>,
    /// Readable while there are messages aside.
    aside_flag: OwnedFd,
    /// Readable when the socket or the flag is.
    wait: OwnedFd,
    broken: Option<EngineError>,
    /// Units of all blocks that the launches which ended said they had done.
    units: u128,
}

impl SimEngine {
    /// Makes a context on a GPU, under MPS where [`MPS_VARIABLE`] says so.
    ///
    /// # Errors
    /// [`EngineError::NoDevice`] when nobody serves the socket or there is no such
    /// GPU, [`EngineError::NoSlot`] and [`EngineError::NoMemory`].
    pub fn open(socket: &Path, gpu: u32) -> Result<Self, EngineError> {
        let token = std::env::var(MPS_VARIABLE).ok();
        Self::open_with(socket, gpu, token.as_deref())
    }

    /// As [`SimEngine::open`], with the value of the variable.
    ///
    /// # Errors
    /// As [`SimEngine::open`].
    pub fn open_with(socket: &Path, gpu: u32, mps: Option<&str>) -> Result<Self, EngineError> {
        let open_as = match mps {
            Some(token) => OpenAs::MpsClient(token.to_owned()),
            None => OpenAs::Program,
        };
        Self::open_as(socket, gpu, open_as)
    }

    pub(crate) fn open_as(socket: &Path, gpu: u32, open_as: OpenAs) -> Result<Self, EngineError> {
        let connection = Connection::open(socket).map_err(|error| {
            EngineError::NoDevice(format!("cannot connect to {}: {error}", socket.display()))
        })?;
        let (wait, aside_flag) = waiting(&connection)
            .map_err(|error| EngineError::Failed(format!("no descriptor to wait on: {error}")))?;
        let mut engine = Self {
            connection,
            facts: crate::shape::facts(),
            aside: VecDeque::new(),
            aside_flag,
            wait,
            broken: None,
            units: 0,
        };
        match engine.call(&Request::Open { gpu, open_as })? {
            Answer::Opened(facts) => engine.facts = facts,
            other => return Err(unexpected(&other)),
        }
        Ok(engine)
    }

    /// Takes device memory beyond the workload's, in whole pages, until the
    /// context ends.
    ///
    /// # Errors
    /// [`EngineError::NoMemory`].
    pub fn allocate(&mut self, bytes: u64) -> Result<(), EngineError> {
        self.call(&Request::Allocate { bytes }).map(drop)
    }

    /// Adds a channel group, into which launches go from now on.
    ///
    /// # Errors
    /// [`EngineError::Unsupported`] under MPS.
    pub fn add_group(&mut self) -> Result<(), EngineError> {
        self.call(&Request::AddGroup).map(drop)
    }

    /// Removes the channel group that was added last; launches go into the one
    /// before it from now on.
    ///
    /// # Errors
    /// [`EngineError::Unsupported`] when none was added.
    pub fn remove_group(&mut self) -> Result<(), EngineError> {
        self.call(&Request::RemoveGroup).map(drop)
    }

    /// Adds a channel to the group that launches go into.
    ///
    /// # Errors
    /// [`EngineError::Unsupported`] under MPS.
    pub fn add_channel(&mut self) -> Result<(), EngineError> {
        self.call(&Request::AddChannel).map(drop)
    }

    /// Makes many objects and frees them: what is added next lies far off.
    ///
    /// # Errors
    /// Those of a broken context.
    pub fn skip_handles(&mut self) -> Result<(), EngineError> {
        self.call(&Request::SkipHandles).map(drop)
    }

    /// As [`Engine::submit`], but the kernel is in a graph.
    ///
    /// # Errors
    /// As [`Engine::submit`].
    pub fn submit_graph(&mut self, target: u64) -> Result<(), EngineError> {
        self.launch(target, Launch::Graph)
    }

    /// Ends the context, and returns when everything of it is gone.
    ///
    /// # Errors
    /// Those of a broken context, which is gone as well.
    pub fn close(mut self) -> Result<(), EngineError> {
        self.call(&Request::Close).map(drop)
    }

    fn launch(&mut self, target: u64, launch: Launch) -> Result<(), EngineError> {
        if let Some(error) = &self.broken {
            return Err(error.clone());
        }
        let submitted_ns = now_ns();
        let request = Request::Submit {
            target,
            submitted_ns,
            launch,
        };
        self.connection
            .send(&request)
            .map_err(|error| self.failed(error))
    }

    fn call(&mut self, request: &Request) -> Result<Answer, EngineError> {
        if let Some(error) = &self.broken {
            return Err(error.clone());
        }
        let aside = &mut self.aside;
        let result = self
            .connection
            .call(request, |message| aside.push_back(message));
        self.flag();
        result.map_err(|error| self.failed(error))
    }

    fn failed(&mut self, error: CallError) -> EngineError {
        match error {
            CallError::Lost(text) => {
                let error = EngineError::Failed(text);
                self.broken = Some(error.clone());
                error
            }
            CallError::Refused(Failure::Worker(error)) => error,
            CallError::Refused(Failure::Service(refused)) => {
                EngineError::Failed(gcgroup_device::DeviceError::from(refused).to_string())
            }
        }
    }

    /// Makes the flag say whether there are messages aside. It does not block, so
    /// what goes wrong is that it says so already.
    fn flag(&self) {
        if self.aside.is_empty() {
            let _ = rustix::io::read(&self.aside_flag, &mut [0_u8; 8]);
        } else {
            let _ = rustix::io::write(&self.aside_flag, &1_u64.to_ne_bytes());
        }
    }

    fn next_message(&mut self) -> Result<Option<Message>, EngineError> {
        if let Some(message) = self.aside.pop_front() {
            if self.aside.is_empty() {
                self.flag();
            }
            return Ok(Some(message));
        }
        self.connection
            .try_receive()
            .map_err(|error| self.failed(error))
    }

    fn cursor(&mut self, request: &Request) -> Result<(u128, u32), EngineError> {
        match self.call(request)? {
            Answer::Cursor { units, blocks } => Ok((units, blocks)),
            other => Err(unexpected(&other)),
        }
    }
}

impl Engine for SimEngine {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn prepare(&mut self, plan: &Plan) -> Result<Prepared, EngineError> {
        match self.call(&Request::Prepare(plan.clone()))? {
            Answer::Prepared {
                buffer_bytes,
                context_bytes,
            } => Ok(Prepared {
                buffer_bytes,
                context_bytes: Some(context_bytes),
                units_per_iteration: units_per_iteration(plan),
            }),
            other => Err(unexpected(&other)),
        }
    }

    fn place(&mut self, placement: &Placement) -> Result<u32, EngineError> {
        match self.call(&Request::Place(placement.clone()))? {
            Answer::Placed { sm_count } => Ok(sm_count),
            other => Err(unexpected(&other)),
        }
    }

    /// Where the simulated device polls is a matter of time, not of units: see the
    /// stop latency of `SimOptions`.
    fn submit(&mut self, target: u64, _poll_units: u32) -> Result<(), EngineError> {
        self.launch(target, Launch::Kernel)
    }

    fn poll(&mut self) -> Result<Option<Completion>, EngineError> {
        loop {
            if let Some(error) = &self.broken {
                return Err(error.clone());
            }
            match self.next_message()? {
                Some(Message::Ended {
                    target,
                    submitted_ns,
                    device_us,
                    units,
                }) => {
                    self.units += units;
                    return Ok(Some(Completion {
                        target,
                        submitted_ns,
                        seen_ns: now_ns(),
                        device_us,
                    }));
                }
                Some(Message::Broken(error)) => self.broken = Some(error),
                Some(Message::Held) => {}
                Some(Message::Reply(_)) => {
                    let text = "a reply that nobody waits for".to_owned();
                    self.broken = Some(EngineError::Failed(text));
                }
                None => return Ok(None),
            }
        }
    }

    fn wait_fd(&self) -> BorrowedFd<'_> {
        self.wait.as_fd()
    }

    fn raise_stop(&mut self) -> Result<(), EngineError> {
        self.call(&Request::RaiseStop).map(drop)
    }

    fn lower_stop(&mut self) -> Result<(), EngineError> {
        self.call(&Request::LowerStop).map(drop)
    }

    fn progress(&mut self) -> Result<Progress, EngineError> {
        let (total, blocks) = self.cursor(&Request::Progress)?;
        let (least, most) = spread(total, blocks);
        Ok(Progress { least, most, total })
    }

    fn verify(&mut self) -> Result<Verified, EngineError> {
        let (total, blocks) = self.cursor(&Request::Verify)?;
        Ok(compare(total, self.units, blocks))
    }

    fn now_ns(&self) -> u64 {
        now_ns()
    }
}

/// Units of the block that did the least and of the one that did the most.
fn spread(total: u128, blocks: u32) -> (u64, u64) {
    let blocks = u128::from(blocks.max(1));
    let whole = |units: u128| u64::try_from(units).unwrap_or(u64::MAX);
    (whole(total / blocks), whole(total.div_ceil(blocks)))
}

/// Compares the cursors that two totals make: block b has done `total / blocks`
/// units, and one more where b is below the remainder.
fn compare(total: u128, expected: u128, blocks: u32) -> Verified {
    let all = u128::from(blocks.max(1));
    let cursor =
        |total: u128, block: u32| total / all + u128::from(u128::from(block) < total % all);
    let wrong = (0..blocks).filter(|&block| cursor(total, block) != cursor(expected, block));
    Verified {
        compared: u64::from(blocks),
        wrong: wrong.count() as u64,
    }
}

/// A descriptor that is readable when the socket is or when the flag is set, and
/// the flag.
fn waiting(connection: &Connection) -> rustix::io::Result<(OwnedFd, OwnedFd)> {
    let flag = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    let wait = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let data = epoll::EventData::new_u64(0);
    epoll::add(&wait, connection.socket(), data, epoll::EventFlags::IN)?;
    epoll::add(&wait, &flag, data, epoll::EventFlags::IN)?;
    Ok((wait, flag))
}

fn unexpected(answer: &Answer) -> EngineError {
    EngineError::Failed(format!("an answer that was not asked for: {answer:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_unit_too_many_shows_in_the_block_that_did_it() {
        assert_eq!(compare(1000, 1000, 7).wrong, 0);
        assert_eq!(compare(1001, 1000, 7).wrong, 1);
        assert_eq!(compare(2000, 1000, 7).wrong, 7);
    }

    #[test]
    fn cursors_of_all_blocks_are_the_total() {
        assert_eq!(spread(1000, 7), (142, 143));
        assert_eq!(spread(994, 7), (142, 142));
    }
}
