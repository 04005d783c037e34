//! The main loop of a worker's process: lines of JSON on its control socket,
//! the engine's descriptor and the next deadline, all in one poll(2).
//!
//! The loop never waits in a write: what the socket does not take is kept, so a
//! service that is slow to read can still freeze its workload.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use rustix::time::{ClockId, clock_gettime};
use thiserror::Error;

use crate::engine::{Engine, EngineError};
use crate::protocol::{Answer, Command, GpuAddress, Message, Request};

use super::{Worker, unsupported};

/// Longest line that is taken, bytes; a setup is below 1 KiB.
const LINE_MAX: usize = 64 * 1024;
/// Unsent bytes beyond which reports are dropped: two of the largest.
const CLOGGED: usize = 256 * 1024;
/// Unsent bytes beyond which commands are left in the socket: nobody reads the
/// answers.
const STUCK: usize = 1024 * 1024;
/// How long the last messages may take to be sent, and launches to come back
/// when the service is gone, nanoseconds. It kills what takes longer.
const LINGER_NS: u64 = 1_000_000_000;

/// Why a worker ended otherwise than it was told to.
#[derive(Debug, Error)]
pub enum WorkerError {
    /// The control socket failed.
    #[error("the control socket failed: {0}")]
    Control(Errno),
    /// What came over the control socket is not the protocol.
    #[error("not a request: {0}")]
    Protocol(String),
    /// The GPU failed, or could not be opened. The service was told.
    #[error(transparent)]
    Engine(EngineError),
}

/// Runs one worker until it is told to end, its time is over, its GPU fails or
/// the service closes `control`, a stream socket.
///
/// The engine is opened by the first command and dropped before this returns.
///
/// # Errors
/// Whatever ended it, but for an end that was wanted and a service that went.
pub fn run<E: Engine>(
    control: OwnedFd,
    open: impl FnOnce(&GpuAddress) -> Result<E, EngineError>,
) -> Result<(), WorkerError> {
    let mut line = Line::new(control);
    match open_first(&mut line, open)? {
        Some(engine) => serve(&mut line, Worker::new(engine)),
        None => Ok(()),
    }
}

/// Waits for the command that opens the GPU. `None` when the worker is told to
/// end first.
fn open_first<E: Engine>(
    line: &mut Line,
    open: impl FnOnce(&GpuAddress) -> Result<E, EngineError>,
) -> Result<Option<E>, WorkerError> {
    loop {
        let Some(request) = line.next_request()? else {
            if line.closed {
                return Ok(None);
            }
            line.wait(None, None)?;
            continue;
        };
        let id = request.id;
        let address = match request.command {
            Command::Open(address) => address,
            Command::End => {
                line.reply(id, Ok(Answer::Done))?;
                line.linger()?;
                return Ok(None);
            }
            _ => {
                line.reply(id, Err(unsupported("the GPU is not open yet")))?;
                continue;
            }
        };
        return match open(&address) {
            Ok(engine) => {
                line.reply(id, Ok(Answer::Opened(engine.facts().clone())))?;
                Ok(Some(engine))
            }
            Err(error) => {
                line.reply(id, Err(error.clone()))?;
                line.send(&Message::Ending {
                    error: Some(error.clone()),
                })?;
                line.linger()?;
                Err(WorkerError::Engine(error))
            }
        };
    }
}

fn serve<E: Engine>(line: &mut Line, mut worker: Worker<E>) -> Result<(), WorkerError> {
    let outcome = converse(line, &mut worker);
    if !worker.is_over() {
        wind_up(&mut worker)?;
    }
    match (outcome, worker.failure()) {
        (Ok(()), Some(error)) => Err(WorkerError::Engine(error.clone())),
        (outcome, _) => outcome,
    }
}

/// The main loop, until the worker is over or the service gone.
fn converse<E: Engine>(line: &mut Line, worker: &mut Worker<E>) -> Result<(), WorkerError> {
    let mut engine_ready = false;
    loop {
        // Commands come first, and each one's answer leaves before the next one
        // is looked at.
        while let Some(request) = line.next_request()? {
            worker.on_command(request);
            send_messages(line, worker)?;
        }
        if engine_ready {
            worker.on_engine();
        }
        let now = worker.engine().now_ns();
        if worker.next_deadline().is_some_and(|due| due <= now) {
            worker.on_deadline();
        }
        send_messages(line, worker)?;
        if worker.is_over() {
            return line.linger();
        }
        if line.closed {
            return Ok(());
        }
        let timeout = worker
            .next_deadline()
            .map(|due| due.saturating_sub(worker.engine().now_ns()));
        engine_ready = line.wait(Some(worker.engine().wait_fd()), timeout)?;
    }
}

fn send_messages<E: Engine>(line: &mut Line, worker: &mut Worker<E>) -> Result<(), WorkerError> {
    while let Some(message) = worker.take_message() {
        let report = matches!(message, Message::Report { .. });
        if !(report && line.unsent.len() > CLOGGED) {
            line.send(&message)?;
        }
    }
    Ok(())
}

/// Stops what is in flight, so that the engine is dropped at rest.
fn wind_up<E: Engine>(worker: &mut Worker<E>) -> Result<(), WorkerError> {
    worker.close();
    let until = monotonic_ns() + LINGER_NS;
    while !worker.is_over() {
        let now = monotonic_ns();
        if now >= until {
            break;
        }
        let mut fds = [PollFd::from_borrowed_fd(
            worker.engine().wait_fd(),
            PollFlags::IN,
        )];
        poll_for(&mut fds, Some(until - now))?;
        worker.on_engine();
    }
    Ok(())
}

/// The control socket, with what was received and not taken and what was said
/// and not sent.
struct Line {
    fd: OwnedFd,
    received: Vec<u8>,
    /// Bytes of `received` that were taken.
    taken: usize,
    unsent: VecDeque<u8>,
    /// Whether the service is gone.
    closed: bool,
}

impl Line {
    fn new(fd: OwnedFd) -> Self {
        Self {
            fd,
            received: Vec::new(),
            taken: 0,
            unsent: VecDeque::new(),
            closed: false,
        }
    }

    /// The next request that was received in full. A line that is not one is
    /// refused where it has an id.
    fn next_request(&mut self) -> Result<Option<Request>, WorkerError> {
        loop {
            let rest = &self.received[self.taken..];
            let Some(length) = rest.iter().position(|&byte| byte == b'\n') else {
                if rest.len() > LINE_MAX {
                    return Err(WorkerError::Protocol(format!(
                        "a line of more than {LINE_MAX} bytes"
                    )));
                }
                self.received.drain(..self.taken);
                self.taken = 0;
                return Ok(None);
            };
            let line = &rest[..length];
            let request = serde_json::from_slice::<Request>(line);
            let id = match &request {
                Ok(_) => None,
                Err(_) => id_of(line),
            };
            self.taken += length + 1;
            match (request, id) {
                (Ok(request), _) => return Ok(Some(request)),
                (Err(error), Some(id)) => {
                    self.reply(id, Err(unsupported(&format!("not a command: {error}"))))?;
                }
                (Err(error), None) => return Err(WorkerError::Protocol(error.to_string())),
            }
        }
    }

    /// Waits until there is something to receive, the engine's descriptor is
    /// readable (then returns true) or the time is over, and sends and receives
    /// what can be.
    fn wait(
        &mut self,
        engine: Option<BorrowedFd<'_>>,
        timeout_ns: Option<u64>,
    ) -> Result<bool, WorkerError> {
        let mut wanted = PollFlags::empty();
        if self.unsent.len() < STUCK {
            wanted |= PollFlags::IN;
        }
        if !self.unsent.is_empty() {
            wanted |= PollFlags::OUT;
        }
        let (control, engine) = {
            let control = PollFd::from_borrowed_fd(self.fd.as_fd(), wanted);
            match engine {
                Some(fd) => {
                    let mut fds = [control, PollFd::from_borrowed_fd(fd, PollFlags::IN)];
                    poll_for(&mut fds, timeout_ns)?;
                    (fds[0].revents(), fds[1].revents())
                }
                None => {
                    let mut fds = [control];
                    poll_for(&mut fds, timeout_ns)?;
                    (fds[0].revents(), PollFlags::empty())
                }
            }
        };
        if control.intersects(PollFlags::OUT) {
            self.flush()?;
        }
        if control.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR) {
            self.receive()?;
        }
        Ok(!engine.is_empty())
    }

    fn receive(&mut self) -> Result<(), WorkerError> {
        let mut buffer = [0; 4096];
        match recv(&self.fd, &mut buffer, RecvFlags::DONTWAIT) {
            Ok((_, 0)) => self.closed = true,
            Ok((_, length)) => self.received.extend_from_slice(&buffer[..length]),
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(Errno::CONNRESET) => self.closed = true,
            Err(error) => return Err(WorkerError::Control(error)),
        }
        Ok(())
    }

    fn reply(&mut self, id: u64, result: Result<Answer, EngineError>) -> Result<(), WorkerError> {
        self.send(&Message::Reply {
            id,
            result,
            counters: None,
        })
    }

    fn send(&mut self, message: &Message) -> Result<(), WorkerError> {
        let mut text = serde_json::to_vec(message)
            .map_err(|error| WorkerError::Protocol(format!("{message:?}: {error}")))?;
        text.push(b'\n');
        self.unsent.extend(text);
        self.flush()
    }

    /// Sends what the socket takes. A peer that is gone is no error: its end of
    /// the stream says the same.
    fn flush(&mut self) -> Result<(), WorkerError> {
        while !self.unsent.is_empty() && !self.closed {
            let (bytes, _) = self.unsent.as_slices();
            match send(&self.fd, bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(length) => drop(self.unsent.drain(..length)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::PIPE | Errno::CONNRESET) => self.closed = true,
                Err(error) => return Err(WorkerError::Control(error)),
            }
        }
        Ok(())
    }

    /// Sends the last messages, for a bounded time.
    fn linger(&mut self) -> Result<(), WorkerError> {
        let until = monotonic_ns() + LINGER_NS;
        while !self.unsent.is_empty() && !self.closed {
            let now = monotonic_ns();
            if now >= until {
                break;
            }
            self.wait_to_send(until - now)?;
            self.flush()?;
        }
        Ok(())
    }

    fn wait_to_send(&self, timeout_ns: u64) -> Result<(), WorkerError> {
        let mut fds = [PollFd::from_borrowed_fd(self.fd.as_fd(), PollFlags::OUT)];
        poll_for(&mut fds, Some(timeout_ns))
    }
}

/// The id of a line that is not a request but looks like one.
fn id_of(line: &[u8]) -> Option<u64> {
    let value: serde_json::Value = serde_json::from_slice(line).ok()?;
    value.get("id")?.as_u64()
}

/// poll(2) with a timeout in nanoseconds. A signal counts as a timeout: every
/// caller looks again.
fn poll_for(fds: &mut [PollFd<'_>], timeout_ns: Option<u64>) -> Result<(), WorkerError> {
    let timeout = timeout_ns.map(|ns| Timespec {
        // Both fit: at most 584 years, and below 10^9.
        tv_sec: (ns / 1_000_000_000).cast_signed(),
        tv_nsec: (ns % 1_000_000_000).cast_signed(),
    });
    match poll(fds, timeout.as_ref()) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(WorkerError::Control(error)),
    }
}

fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    // Since boot, so neither is negative.
    now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned()
}
