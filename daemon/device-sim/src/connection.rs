//! A client's end of the socket.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recv,
    send, socket_with,
};
use rustix::time::Timespec;

use crate::fault::Failure;
use crate::wire::{Answer, LONGEST, Message, Request};

/// How long a call waits for a simulated host that says nothing. It answers at
/// once, or says that a fault keeps the answer back.
const DEADLINE: Duration = Duration::from_secs(5);

/// Why a call had no answer.
#[derive(Debug)]
pub(crate) enum CallError {
    /// The connection is of no more use.
    Lost(String),
    /// The simulated host refused.
    Refused(Failure),
}

/// One connection; a context, an MPS server or calls of the service.
#[derive(Debug)]
pub(crate) struct Connection {
    socket: OwnedFd,
    buffer: Vec<u8>,
}

impl Connection {
    /// Connects to the socket of a simulated host.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let address = SocketAddrUnix::new(path)?;
        let socket = socket_with(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        connect(&socket, &address)?;
        Ok(Self {
            socket,
            buffer: vec![0; LONGEST],
        })
    }

    /// The socket, to wait on.
    pub(crate) fn socket(&self) -> &OwnedFd {
        &self.socket
    }

    /// Sends a request.
    pub(crate) fn send(&self, request: &Request) -> Result<(), CallError> {
        let packet = serde_json::to_vec(request).map_err(lost)?;
        if packet.len() > LONGEST {
            let length = packet.len();
            return Err(lost(format!(
                "a request of {length} bytes is longer than {LONGEST}"
            )));
        }
        loop {
            match send(&self.socket, &packet, SendFlags::NOSIGNAL) {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(lost(error)),
            }
        }
    }

    /// The next message, if it is here already.
    pub(crate) fn try_receive(&mut self) -> Result<Option<Message>, CallError> {
        loop {
            match recv(
                &self.socket,
                self.buffer.as_mut_slice(),
                RecvFlags::DONTWAIT,
            ) {
                Ok((0, _)) => return Err(lost("it closed the connection")),
                Ok((length, _)) => {
                    let packet = &self.buffer[..length];
                    return serde_json::from_slice(packet).map(Some).map_err(lost);
                }
                Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::INTR) => {}
                Err(error) => return Err(lost(error)),
            }
        }
    }

    /// Sends a request and waits for its reply; `aside` gets what comes before.
    pub(crate) fn call(
        &mut self,
        request: &Request,
        mut aside: impl FnMut(Message),
    ) -> Result<Answer, CallError> {
        self.send(request)?;
        let mut deadline = Some(Instant::now() + DEADLINE);
        loop {
            match self.try_receive()? {
                Some(Message::Reply(result)) => return result.map_err(CallError::Refused),
                Some(Message::Held) => deadline = None,
                Some(other) => aside(other),
                None => self.wait(deadline)?,
            }
        }
    }

    fn wait(&self, deadline: Option<Instant>) -> Result<(), CallError> {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if left == Some(Duration::ZERO) {
            return Err(lost(format!("no answer within {DEADLINE:?}")));
        }
        let timeout = left.map(|left| Timespec {
            tv_sec: left.as_secs() as i64,
            tv_nsec: i64::from(left.subsec_nanos()),
        });
        let mut fds = [PollFd::from_borrowed_fd(self.socket.as_fd(), PollFlags::IN)];
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(lost(error)),
        }
    }

    /// Whether the other end is there, as far as one can tell without asking.
    pub(crate) fn is_open(&self) -> bool {
        let mut byte = [0];
        let flags = RecvFlags::DONTWAIT | RecvFlags::PEEK;
        matches!(
            recv(&self.socket, byte.as_mut_slice(), flags),
            Err(Errno::AGAIN)
        )
    }
}

fn lost(reason: impl std::fmt::Display) -> CallError {
    CallError::Lost(format!("the simulated host is gone: {reason}"))
}

/// Nanoseconds of CLOCK_MONOTONIC.
pub(crate) fn now_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}
