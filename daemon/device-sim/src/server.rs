//! The main loop of the simulated host: socket, timer and connections.
//!
//! One thread. Each turn brings the world up to now, does what clients asked,
//! tells them what ended, and sleeps until the next event of the world. Progress
//! is computed, so an idle host uses no time.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, listen, socket_with,
    sockopt::socket_peercred,
};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use thiserror::Error;

use crate::connection::now_ns;
use crate::dispatch::{Heed, Outcome, Peer, Role, Simulation};
use crate::fault::{FaultId, Faults, RandomFaults};
use crate::server::client::{Client, Held, Hold, Received};
use crate::shape;
use crate::wire::{Answer, LONGEST, Message, Request};
use crate::world::{ContextId, Notice, World};

mod client;
mod latency;

pub use latency::ChannelLatency;

/// Name of the socket in the state directory.
pub const SOCKET_NAME: &str = "sim.sock";

/// Name of the file whose lock says that a directory is served.
const LOCK_NAME: &str = "sim.lock";

/// How often the loop looks whether its directory is still there.
const LOOK_NS: u64 = 500_000_000;

/// Requests taken from one client before the others have their turn.
const BATCH: usize = 32;

const LISTENER: u64 = 0;
const TIMER: u64 = 1;

/// How a simulated host is set up.
#[derive(Clone, Debug)]
pub struct SimOptions {
    /// Directory of the socket; must exist. Workers of other users need to be
    /// allowed to search it.
    pub state: PathBuf,
    /// GPUs.
    pub gpus: u32,
    /// Seed of the UUIDs.
    pub seed: u64,
    /// Clients of an MPS server; 0 for GPUs without MPS.
    pub mps_slots: u32,
    /// Time from a raised stop flag to the end of a sliced launch, microseconds.
    pub stop_latency_us: f64,
    /// How long calls take that stop and resume channels.
    pub channel_latency: ChannelLatency,
    /// How long the host stays without a client.
    pub linger: Duration,
    /// Faults from the start.
    pub random_faults: Option<RandomFaults>,
}

impl SimOptions {
    /// One H200 that stays for 10 s without a client. A stop takes 60 us: on an
    /// H200 it was 68 to 72 us from the call, of which the call is a part.
    #[must_use]
    pub fn new(state: PathBuf) -> Self {
        Self {
            state,
            gpus: 1,
            seed: 0,
            mps_slots: shape::MPS_SLOTS,
            stop_latency_us: 60.0,
            channel_latency: ChannelLatency::default(),
            linger: Duration::from_secs(10),
            random_faults: None,
        }
    }

    /// The socket that it will serve.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.state.join(SOCKET_NAME)
    }
}

/// Why a simulated host came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Nobody was connected for as long as it stays.
    Idle,
    /// Its directory or its socket is gone.
    Removed,
}

/// Why a simulated host cannot serve.
#[derive(Debug, Error)]
pub enum ServeError {
    /// Another one serves this directory.
    #[error("another simulated host serves {0}")]
    Served(PathBuf),
    /// An option is out of its range.
    #[error("{0}")]
    Option(String),
    /// The directory or the socket cannot be used.
    #[error("cannot serve {path}: {error}")]
    Io {
        /// What was being used.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
}

/// Serves a directory until nobody needs it any more. Call it in a process of its
/// own: it outlives the service, and a process that ends takes nothing along.
///
/// # Errors
/// [`ServeError`] when it cannot begin, or when waiting for events fails.
pub fn serve(options: &SimOptions) -> Result<Ended, ServeError> {
    let mut server = Server::start(options)?;
    let ended = server.run().map_err(|error| ServeError::Io {
        path: server.socket_path.clone(),
        error: error.into(),
    });
    if server.is_in_place() {
        // The lock is still ours, so this is our own socket. Where it cannot be
        // removed the next start does it.
        let _ = std::fs::remove_file(&server.socket_path);
    }
    ended
}

struct Server {
    simulation: Simulation,
    socket_path: PathBuf,
    /// Device and inode of the socket, which tell whether it was replaced.
    socket_id: (u64, u64),
    linger_ns: u64,
    listener: OwnedFd,
    epoll: OwnedFd,
    timer: OwnedFd,
    /// What the timer is set to, CLOCK_MONOTONIC nanoseconds.
    timer_ns: u64,
    clients: BTreeMap<u64, Client>,
    of_context: BTreeMap<ContextId, u64>,
    next_client: u64,
    /// Since when there is no client.
    idle_since_ns: Option<u64>,
    next_look_ns: u64,
    /// Scratch for one packet.
    buffer: Vec<u8>,
    _lock: File,
}

impl Server {
    fn start(options: &SimOptions) -> Result<Self, ServeError> {
        if !(1..=64).contains(&options.gpus) {
            return Err(ServeError::Option(format!(
                "{} GPUs are out of range: 1 to 64",
                options.gpus
            )));
        }
        if !options.stop_latency_us.is_finite() || options.stop_latency_us < 0.0 {
            return Err(ServeError::Option(format!(
                "a stop latency of {} us is out of range: 0 and more",
                options.stop_latency_us
            )));
        }
        let mut faults = Faults::default();
        faults
            .set_random(options.random_faults)
            .map_err(|error| ServeError::Option(error.to_string()))?;
        if let Some(random) = &options.random_faults {
            tracing::warn!(seed = random.seed, "faults at random");
        }
        let socket_path = options.socket();
        let io_error = |error: io::Error| ServeError::Io {
            path: socket_path.clone(),
            error,
        };
        let lock = take_lock(&options.state)?;
        let listener = make_listener(&socket_path).map_err(io_error)?;
        let metadata = std::fs::symlink_metadata(&socket_path).map_err(io_error)?;
        let (epoll, timer) = make_epoll(&listener).map_err(|error| io_error(error.into()))?;
        let now = now_ns();
        let mut world = World::new(options.gpus, options.seed, options.stop_latency_us, now);
        world.set_mps_slots(options.mps_slots);
        let simulation = Simulation {
            world,
            faults,
            seed: options.seed,
            latency: options.channel_latency,
        };
        Ok(Self {
            simulation,
            socket_id: (metadata.dev(), metadata.ino()),
            socket_path,
            linger_ns: u64::try_from(options.linger.as_nanos()).unwrap_or(u64::MAX),
            listener,
            epoll,
            timer,
            timer_ns: 0,
            clients: BTreeMap::new(),
            of_context: BTreeMap::new(),
            next_client: TIMER + 1,
            idle_since_ns: Some(now),
            next_look_ns: now,
            buffer: vec![0; LONGEST],
            _lock: lock,
        })
    }

    fn run(&mut self) -> Result<Ended, Errno> {
        let mut events = Vec::with_capacity(256);
        loop {
            let now = now_ns();
            self.simulation.world.advance(now);
            if let Some(ended) = self.look(now) {
                return Ok(ended);
            }
            self.release(now);
            self.tell();
            self.set_timer()?;
            events.clear();
            match epoll::wait(&self.epoll, spare_capacity(&mut events), None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            }
            self.simulation.world.advance(now_ns());
            for event in &events {
                match event.data.u64() {
                    LISTENER => self.accept(),
                    TIMER => self.timer_ns = 0,
                    id => self.attend(id, event.flags),
                }
            }
        }
    }

    /// Whether there is a reason to end.
    fn look(&mut self, now: u64) -> Option<Ended> {
        if let Some(since) = self.idle_since_ns
            && now.saturating_sub(since) >= self.linger_ns
        {
            // Somebody may have come at the last moment.
            self.accept();
            if self.idle_since_ns.is_some() {
                return Some(Ended::Idle);
            }
        }
        if now >= self.next_look_ns {
            self.next_look_ns = now + LOOK_NS;
            if !self.is_in_place() {
                return Some(Ended::Removed);
            }
        }
        None
    }

    fn is_in_place(&self) -> bool {
        std::fs::symlink_metadata(&self.socket_path)
            .is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == self.socket_id)
    }

    fn set_timer(&mut self) -> Result<(), Errno> {
        let delayed = self.clients.values().filter_map(Client::due_ns).min();
        let idle = self.idle_since_ns.map(|since| since + self.linger_ns);
        let event = self.simulation.world.next_event();
        let next = [delayed, idle, event]
            .into_iter()
            .flatten()
            .fold(self.next_look_ns, u64::min);
        if next == self.timer_ns {
            return Ok(());
        }
        self.timer_ns = next;
        let zero = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let setting = Itimerspec {
            it_interval: zero,
            it_value: Timespec {
                tv_sec: (next / 1_000_000_000) as i64,
                tv_nsec: (next % 1_000_000_000) as i64,
            },
        };
        timerfd_settime(&self.timer, TimerfdTimerFlags::ABSTIME, &setting).map(drop)
    }

    fn accept(&mut self) {
        // What fails here concerns a client that is gone already.
        while let Ok(socket) =
            accept_with(&self.listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)
        {
            let Ok(credentials) = socket_peercred(&socket) else {
                continue;
            };
            let id = self.next_client;
            self.next_client += 1;
            let data = EventData::new_u64(id);
            if epoll::add(&self.epoll, &socket, data, EventFlags::IN).is_err() {
                continue;
            }
            let pid = credentials.pid.as_raw_nonzero().get().unsigned_abs();
            let peer = Peer {
                pid,
                role: Role::Caller,
            };
            self.clients.insert(id, Client::new(socket, peer));
            self.idle_since_ns = None;
        }
    }

    fn attend(&mut self, id: u64, flags: EventFlags) {
        if flags.intersects(EventFlags::HUP | EventFlags::ERR) {
            return self.part(id);
        }
        for _ in 0..BATCH {
            let Some(client) = self.clients.get_mut(&id) else {
                return;
            };
            if client.is_held() {
                break;
            }
            match client.receive(&mut self.buffer) {
                Received::Request(request) => {
                    let outcome = self
                        .simulation
                        .handle(&mut client.peer, &request, Heed::Faults);
                    self.conclude(id, *request, outcome);
                }
                Received::Nothing => break,
                Received::End => return self.part(id),
            }
        }
    }

    fn conclude(&mut self, id: u64, request: Request, outcome: Outcome) {
        let Some(client) = self.clients.get_mut(&id) else {
            return;
        };
        match (&request, client.peer.role) {
            (Request::Open { .. }, Role::Context(context)) => {
                self.of_context.insert(context, id);
            }
            (Request::Close, Role::Caller) => self.of_context.retain(|_, owner| *owner != id),
            _ => {}
        }
        let hold = match outcome {
            Outcome::Reply(result) => return client.say(&Message::Reply(result)),
            Outcome::Late(usec, result) => {
                return client.say_at(due_ns(usec), Message::Reply(result));
            }
            Outcome::Silent => return,
            Outcome::Cut => return self.part(id),
            Outcome::CutProcess(pid) => {
                client.say(&Message::Reply(Ok(Answer::Done)));
                return self.cut(pid);
            }
            Outcome::HoldFor(fault) => Hold::Fault(fault),
            Outcome::Delay(usec) => Hold::Until(due_ns(usec)),
        };
        if !matches!(request, Request::Submit { .. }) {
            client.say(&Message::Held);
        }
        client.hold(request, hold);
    }

    fn cut(&mut self, pid: u32) {
        let ids: Vec<_> = self
            .clients
            .iter()
            .filter(|(_, client)| {
                client.peer.pid == pid && matches!(client.peer.role, Role::Context(_))
            })
            .map(|(&id, _)| id)
            .collect();
        for id in ids {
            self.part(id);
        }
    }

    /// Goes on with what was kept back long enough.
    fn release(&mut self, now: u64) {
        let faults = &self.simulation.faults;
        let over = |fault: FaultId| !faults.is_set(fault);
        let ids: Vec<_> = self
            .clients
            .iter()
            .filter(|(_, client)| client.may_go_on(now, over))
            .map(|(&id, _)| id)
            .collect();
        for id in ids {
            let Some(client) = self.clients.get_mut(&id) else {
                continue;
            };
            match client.take_held() {
                Some(Held::Request(request, _)) => {
                    let outcome = self
                        .simulation
                        .handle(&mut client.peer, &request, Heed::Nothing);
                    self.conclude(id, request, outcome);
                }
                Some(Held::Answer(message, _)) => client.say(&message),
                None => {}
            }
        }
    }

    /// Hands out what clients have to be told.
    fn tell(&mut self) {
        for notice in self.simulation.world.take_notices() {
            let (context, message) = match notice {
                Notice::Ended(context, ended) => (
                    context,
                    Message::Ended {
                        target: ended.target,
                        submitted_ns: ended.submitted_ns,
                        device_us: ended.device_us,
                        units: ended.units,
                    },
                ),
                Notice::Broken(context, error) => (context, Message::Broken(error)),
            };
            let client = self.of_context.get(&context);
            if let Some(client) = client.and_then(|id| self.clients.get_mut(id)) {
                client.say(&message);
            }
        }
        let mut lost = Vec::new();
        for (&id, client) in &mut self.clients {
            if client.flush(&self.epoll, id).is_err() {
                lost.push(id);
            }
        }
        for id in lost {
            self.part(id);
        }
    }

    fn part(&mut self, id: u64) {
        let Some(client) = self.clients.remove(&id) else {
            return;
        };
        if let Role::Context(context) = client.peer.role {
            self.of_context.remove(&context);
        }
        self.simulation.part(client.peer);
        if self.clients.is_empty() {
            self.idle_since_ns = Some(now_ns());
        }
    }
}

/// CLOCK_MONOTONIC nanoseconds so many microseconds from now.
fn due_ns(usec: u64) -> u64 {
    now_ns().saturating_add(usec.saturating_mul(1000))
}

fn take_lock(state: &Path) -> Result<File, ServeError> {
    let path = state.join(LOCK_NAME);
    let io_error = |error: io::Error| ServeError::Io {
        path: path.clone(),
        error,
    };
    let lock = OpenOptions::new()
        .create(true)
        .append(true)
        .open(&path)
        .map_err(io_error)?;
    match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(lock),
        Err(Errno::WOULDBLOCK) => Err(ServeError::Served(state.to_owned())),
        Err(error) => Err(io_error(error.into())),
    }
}

fn make_listener(path: &Path) -> io::Result<OwnedFd> {
    // Whoever served this directory before is gone: the lock is ours.
    match std::fs::remove_file(path) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let listener = socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )?;
    bind(&listener, &SocketAddrUnix::new(path)?)?;
    // Workers run as another user. Nobody listens yet, so nobody is turned away.
    std::fs::set_permissions(path, Permissions::from_mode(0o666))?;
    listen(&listener, 128)?;
    Ok(listener)
}

fn make_epoll(listener: &OwnedFd) -> Result<(OwnedFd, OwnedFd), Errno> {
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let timer = timerfd_create(
        TimerfdClockId::Monotonic,
        TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK,
    )?;
    epoll::add(
        &epoll,
        listener,
        EventData::new_u64(LISTENER),
        EventFlags::IN,
    )?;
    // Edge triggered, so that an expiry need not be read: setting it anew does.
    let flags = EventFlags::IN | EventFlags::ET;
    epoll::add(&epoll, &timer, EventData::new_u64(TIMER), flags)?;
    Ok((epoll, timer))
}
