//! Keepers: who makes the driver's calls about processes of others.
//!
//! Each attached process has, for each of its GPUs, a thread that makes every
//! call about it. A call may block behind the driver's locks, or hang; then this
//! thread hangs and no other. The controller sends orders and never waits; what
//! came of them it is told through a callback, on the keeper's thread.
//!
//! ```text
//!   controller -- send --> [orders] --> keeper thread --> driver
//!        ^                                   |
//!        +------------- tell ----------------+
//! ```
//!
//! The thread sleeps until an order comes, or a time: a window's end, the next
//! look for channels that appeared since, the next report. A keeper without
//! settings and without readers has no such time. Nothing is shared with other
//! keepers, and nothing but two flags with the controller.

mod body;
mod grip;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread;
use std::time::Duration;

use gcgroup_device::{ChannelSet, Channels, DeviceError, GpuInfo};
use gcgroup_model::value::{Priority, Quota};

use self::body::Body;

/// Stack of a keeper's thread, bytes. There may be a thousand of them, and none
/// goes deep.
const STACK_BYTES: usize = 256 << 10;

/// One process on one GPU.
#[derive(Clone, Debug)]
pub(crate) struct Subject {
    /// Thread-group id.
    pub(crate) pid: u32,
    /// The GPU.
    pub(crate) gpu: GpuInfo,
}

/// In what state a keeper finds its process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Start {
    /// It runs.
    Fresh,
    /// An earlier service stopped it and could not resume it, and it is noted
    /// still: it is resumed, again and again until that comes true; meanwhile
    /// [`State::trouble`] says why not.
    MaybeStopped,
}

/// What a keeper is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// Stop the process until it is thawed, or thaw it.
    Freeze(bool),
    /// Let it run for a part of each period.
    Quota(Quota),
    /// Set the timeslices of its compute channel groups.
    Priority(Priority),
    /// Tell the state so often, where it has changed; zero, for when nobody
    /// reads, ends the reports. With reports a keeper without settings looks for
    /// new channel groups too, once a second at most.
    ReportEvery(Duration),
    /// Look everything up and apply all settings again: the process has a new
    /// context, or was restored from a checkpoint. It has no answer.
    Look,
    /// Let everything run that was stopped, and end. It has no answer but
    /// [`Said::Ended`].
    LetGo,
}

/// What a keeper tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Said {
    /// The order with this number came true, or why not; with the state after it.
    Answer {
        /// The order's number.
        job: u64,
        /// Whether it came true.
        result: Result<(), DeviceError>,
        /// The state after it.
        state: State,
    },
    /// Something else than a counter changed by itself, or it was time for a
    /// report. Counters alone are told in answers and reports.
    State(State),
    /// It let go, and has ended: everything that it had stopped runs, or could
    /// not be made to.
    Ended(Result<(), DeviceError>),
}

/// What a keeper knows of its process. Figures are those of the moment in which
/// it was told; while a call hangs nothing is told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct State {
    /// Compute channel groups; `None` before the first look.
    pub(crate) channel_groups: Option<u64>,
    /// Timeslice as it was read back, microseconds; the longest where its groups
    /// differ.
    pub(crate) timeslice_usec: Option<u64>,
    /// Whether it is stopped because of a freeze, as far as is known: until a
    /// thaw came true, and not before a freeze did. While a call about that has
    /// failed there is trouble.
    pub(crate) frozen: bool,
    /// Time stopped by the run window, microseconds, the present stop included.
    pub(crate) throttled_usec: u64,
    /// Time stopped by freezes, microseconds, the present one included.
    pub(crate) frozen_usec: u64,
    /// Freezes that came true.
    pub(crate) nr_freezes: u64,
    /// Periods in which the run window stopped it.
    pub(crate) nr_throttled: u64,
    /// What is not as it should be at present, and is being tried again.
    pub(crate) trouble: Option<String>,
}

/// Notes that a process may be stopped, with its handles as hints.
pub(crate) type Arm = Box<dyn Fn(&ChannelSet) -> io::Result<()> + Send>;

/// Takes what a keeper tells.
pub(crate) type Tell = Box<dyn Fn(Said) + Send>;

/// What a keeper calls, on its own thread.
pub(crate) struct Hooks {
    /// Called once, before the first stop. An error keeps the process from being
    /// stopped, and is followed by another call before the next attempt.
    pub(crate) arm: Arm,
    /// Called for everything that it tells, in order.
    pub(crate) tell: Tell,
}

/// A keeper that was told to let go takes no more orders.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ended;

/// The controller's end of a keeper. Dropping it ends the thread without a call
/// to the driver, once it is done with what it is at: for a process that has
/// ended. Orders that wait are forgotten and what was stopped stays so, unless
/// [`Order::LetGo`] was sent before.
#[derive(Debug)]
pub(crate) struct Keeper {
    orders: Sender<(u64, Order)>,
    fate: Arc<Fate>,
}

/// How a keeper is to end, told past the orders that wait.
#[derive(Debug, Default)]
struct Fate {
    letting_go: AtomicBool,
    dropped: AtomicBool,
}

impl Fate {
    /// Whether nothing shall be stopped any more: nobody might resume it.
    fn is_ending(&self) -> bool {
        self.letting_go.load(Ordering::Acquire) || self.dropped.load(Ordering::Acquire)
    }

    /// Whether the driver shall not be touched any more.
    fn is_abandoned(&self) -> bool {
        self.dropped.load(Ordering::Acquire) && !self.letting_go.load(Ordering::Acquire)
    }
}

impl Keeper {
    /// Starts the thread of one process.
    ///
    /// # Errors
    /// Those of starting a thread.
    pub(crate) fn start(
        subject: Subject,
        host: Arc<dyn Channels>,
        start: Start,
        hooks: Hooks,
    ) -> io::Result<Self> {
        let (orders, waiting) = channel();
        let fate = Arc::new(Fate::default());
        let name = format!("keep-{}", subject.pid);
        let body = Body::new(subject, host, start, hooks, Arc::clone(&fate));
        thread::Builder::new()
            .name(name)
            .stack_size(STACK_BYTES)
            .spawn(move || body.run(&waiting))?;
        Ok(Self { orders, fate })
    }

    /// Sends an order, which is answered under this number. Never blocks.
    ///
    /// # Errors
    /// [`Ended`] after [`Order::LetGo`].
    pub(crate) fn send(&self, job: u64, order: Order) -> Result<(), Ended> {
        if self.fate.letting_go.load(Ordering::Acquire) {
            return Err(Ended);
        }
        if order == Order::LetGo {
            self.fate.letting_go.store(true, Ordering::Release);
        }
        self.orders.send((job, order)).map_err(|_| Ended)
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.fate.dropped.store(true, Ordering::Release);
    }
}

#[cfg(test)]
mod tests;
