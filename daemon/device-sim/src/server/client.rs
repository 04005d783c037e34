//! One connection of the simulated host.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};

use crate::dispatch::Peer;
use crate::fault::FaultId;
use crate::wire::{Message, Request};

/// Messages kept for a client that does not read. Far above what it can have in
/// flight when it behaves; who is beyond is cut.
const MOST_WAITING: usize = 65_536;

/// What came from a client.
pub(super) enum Received {
    Request(Box<Request>),
    Nothing,
    /// Its end, or nonsense.
    End,
}

/// How long a request is kept back.
pub(super) enum Hold {
    Fault(FaultId),
    /// CLOCK_MONOTONIC nanoseconds.
    Until(u64),
}

/// What is kept back.
pub(super) enum Held {
    /// A request, by a fault.
    Request(Request, Hold),
    /// The answer to what is done, until it has taken its time: CLOCK_MONOTONIC
    /// nanoseconds.
    Answer(Message, u64),
}

/// A client, its messages that wait, and what is kept back of its request.
pub(super) struct Client {
    pub(super) peer: Peer,
    socket: OwnedFd,
    waiting: VecDeque<Vec<u8>>,
    held: Option<Held>,
    interest: EventFlags,
}

impl Client {
    pub(super) fn new(socket: OwnedFd, peer: Peer) -> Self {
        Self {
            peer,
            socket,
            waiting: VecDeque::new(),
            held: None,
            interest: EventFlags::IN,
        }
    }

    /// The next request; `buffer` is scratch for the longest packet.
    pub(super) fn receive(&self, buffer: &mut [u8]) -> Received {
        let flags = RecvFlags::DONTWAIT | RecvFlags::TRUNC;
        match recv(&self.socket, &mut *buffer, flags) {
            Ok((0, _)) => Received::End,
            Ok((length, whole)) if length < whole => Received::End,
            Ok((length, _)) => match serde_json::from_slice(&buffer[..length]) {
                Ok(request) => Received::Request(Box::new(request)),
                Err(error) => {
                    tracing::warn!(pid = self.peer.pid, %error, "not a request");
                    Received::End
                }
            },
            Err(Errno::AGAIN | Errno::INTR) => Received::Nothing,
            Err(_) => Received::End,
        }
    }

    pub(super) fn say(&mut self, message: &Message) {
        match serde_json::to_vec(message) {
            Ok(packet) => self.waiting.push_back(packet),
            Err(error) => tracing::error!(%error, "a message that cannot be written"),
        }
    }

    /// Sends what waits, as far as the client takes it, and asks to be woken for
    /// what can happen next.
    pub(super) fn flush(&mut self, epoll: &OwnedFd, id: u64) -> Result<(), Errno> {
        while let Some(packet) = self.waiting.front() {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match send(&self.socket, packet, flags) {
                Ok(_) => drop(self.waiting.pop_front()),
                Err(Errno::AGAIN) if self.waiting.len() <= MOST_WAITING => break,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            }
        }
        let mut interest = EventFlags::empty();
        if self.held.is_none() {
            interest |= EventFlags::IN;
        }
        if !self.waiting.is_empty() {
            interest |= EventFlags::OUT;
        }
        if interest != self.interest {
            self.interest = interest;
            epoll::modify(epoll, &self.socket, EventData::new_u64(id), interest)?;
        }
        Ok(())
    }

    pub(super) fn hold(&mut self, request: Request, hold: Hold) {
        self.held = Some(Held::Request(request, hold));
    }

    pub(super) fn say_at(&mut self, due_ns: u64, message: Message) {
        self.held = Some(Held::Answer(message, due_ns));
    }

    pub(super) fn is_held(&self) -> bool {
        self.held.is_some()
    }

    /// When what is kept back for a time goes on.
    pub(super) fn due_ns(&self) -> Option<u64> {
        match self.held {
            Some(Held::Request(_, Hold::Until(ns)) | Held::Answer(_, ns)) => Some(ns),
            Some(Held::Request(_, Hold::Fault(_))) | None => None,
        }
    }

    pub(super) fn may_go_on(&self, now: u64, over: impl Fn(FaultId) -> bool) -> bool {
        match &self.held {
            Some(Held::Request(_, Hold::Until(ns)) | Held::Answer(_, ns)) => *ns <= now,
            Some(Held::Request(_, Hold::Fault(fault))) => over(*fault),
            None => false,
        }
    }

    pub(super) fn take_held(&mut self) -> Option<Held> {
        self.held.take()
    }
}
