//! Whether an attached process shall be stopped now, and why.
//!
//! ```text
//!                      Stop         Stopped
//!            running --------> ... --------> stopped
//!               ^                               |
//!               +----------- ... <--------------+
//!                 Resumed           Resume
//! ```
//!
//! The driver knows one state, stopped or running; reasons to be stopped are
//! kept apart from it, so a reason that comes while another holds needs no call,
//! nor does one that goes. [`Event::Failed`] makes the state unknown: the next
//! decision acts, whatever it is. A stop that failed is put back by a resume,
//! and not tried again before the next period, or later where it keeps failing.
//!
//! # The window
//! compute.max lets the process run for a part of each period. What counts is
//! the time that it really ran, from the middle of the call that resumed it to
//! the middle of the call that stopped it. What it ran too long or too short is
//! carried into the next periods, one period of it at most. While the process is
//! frozen the window's clock stands still.

use gcgroup_model::value::Quota;

use crate::lane::Nanos;

/// A call that failed where no period says when to try again is tried again
/// after this, and after twice as long each time that it fails again.
const RETRY: Nanos = 100_000_000;

/// Longest pause before a call that failed is tried again.
const LONGEST_RETRY: Nanos = 5_000_000_000;

/// What happened to a gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// compute.freeze was written.
    Freeze(bool),
    /// compute.max was written. The same quota again changes nothing, another
    /// begins a period.
    Quota(Quota),
    /// The process was stopped by a call that took so long.
    Stopped {
        /// When the call began.
        begun: Nanos,
        /// When it returned.
        ended: Nanos,
    },
    /// The process was resumed by a call that took so long.
    Resumed {
        /// When the call began.
        begun: Nanos,
        /// When it returned.
        ended: Nanos,
    },
    /// A call failed; what became of the process is not known.
    Failed(Action),
    /// What made calls fail may have gone: they are tried again at once.
    Retry,
    /// Time has passed.
    Tick,
}

/// What the gate's owner has to do, and to report with [`Event::Stopped`],
/// [`Event::Resumed`] or [`Event::Failed`]. Until then it is asked for again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Stop the process.
    Stop,
    /// Let it run.
    Resume,
}

/// Why a process is stopped. Where several reasons hold, the first counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// compute.freeze.
    Freeze,
    /// The window of compute.max is closed.
    Window,
}

/// What a gate has counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Time stopped by the window, microseconds.
    pub throttled_usec: u64,
    /// Periods in which the window stopped it.
    pub nr_throttled: u64,
    /// Time stopped by compute.freeze, microseconds.
    pub frozen_usec: u64,
    /// Times compute.freeze stopped it, or found it stopped.
    pub nr_freezes: u64,
}

/// The gate of one process on one GPU.
#[derive(Debug, Default)]
pub struct Gate {
    frozen: bool,
    window: Option<Window>,
    /// The state that the driver is in, as far as is known.
    stopped: bool,
    /// A call failed and none has succeeded since.
    unknown: bool,
    /// Up to when everything below and the window are accounted.
    accounted: Nanos,
    /// Why it is stopped, or was when the reason went.
    cause: Option<Reason>,
    frozen_ns: Nanos,
    throttled_ns: Nanos,
    nr_freezes: u64,
    nr_throttled: u64,
    /// After a failure: not before this.
    no_stop_before: Nanos,
    no_resume_before: Nanos,
    /// Pauses after the last failures, 0 after none.
    stop_pause: Nanos,
    resume_pause: Nanos,
}

impl Gate {
    /// The gate of a process that runs and has no reason not to.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The gate of a process that may be stopped although it has no reason to
    /// be: the first step asks for a resume. Nothing is counted for that stop.
    #[must_use]
    pub fn maybe_stopped() -> Self {
        Self {
            unknown: true,
            ..Self::default()
        }
    }

    /// Takes an event and says what to do, and when to call with
    /// [`Event::Tick`] at the latest. With something to do there is no such
    /// time: the outcome's event brings it.
    pub fn step(&mut self, event: Event, now: Nanos) -> (Option<Action>, Option<Nanos>) {
        match event {
            Event::Freeze(frozen) => {
                self.account(now);
                self.frozen = frozen;
                if frozen {
                    self.stop_at_once();
                } else {
                    self.resume_at_once();
                }
            }
            Event::Quota(quota) => {
                self.account(now);
                self.set_quota(quota, now);
            }
            Event::Stopped { begun, ended } => self.turn(true, middle(begun, ended)),
            Event::Resumed { begun, ended } => self.turn(false, middle(begun, ended)),
            Event::Failed(action) => {
                self.account(now);
                self.fail(action, now);
            }
            Event::Retry => {
                self.stop_at_once();
                self.resume_at_once();
            }
            Event::Tick => {}
        }
        self.account(now);
        self.attribute();
        let action = self.decide(now);
        let deadline = match action {
            Some(_) => None,
            None => self.deadline(now),
        };
        (action, deadline)
    }

    /// Why the process is stopped; `None` while it runs. A reason that went
    /// counts until the process has been resumed.
    #[must_use]
    pub fn stopped_by(&self) -> Option<Reason> {
        self.cause
    }

    /// Whether compute.max has a window that closes.
    #[must_use]
    pub fn has_window(&self) -> bool {
        self.window.is_some()
    }

    /// Whether the last call failed, so that the state is not known.
    #[must_use]
    pub fn is_unknown(&self) -> bool {
        self.unknown
    }

    /// What was counted until now, the present stop included.
    #[must_use]
    pub fn counters(&self, now: Nanos) -> Counters {
        let present = |reason| match self.cause {
            Some(cause) if cause == reason => now.saturating_sub(self.accounted),
            Some(_) | None => 0,
        };
        Counters {
            throttled_usec: (self.throttled_ns + present(Reason::Window)) / 1000,
            nr_throttled: self.nr_throttled,
            frozen_usec: (self.frozen_ns + present(Reason::Freeze)) / 1000,
            nr_freezes: self.nr_freezes,
        }
    }

    fn set_quota(&mut self, quota: Quota, now: Nanos) {
        let window = Window::of(quota, now);
        let same = match (&window, &self.window) {
            (Some(new), Some(old)) => (new.quota, new.period) == (old.quota, old.period),
            (None, None) => true,
            (Some(_), None) | (None, Some(_)) => false,
        };
        if !same {
            self.window = window;
            self.stop_at_once();
            self.resume_at_once();
        }
    }

    fn stop_at_once(&mut self) {
        self.no_stop_before = 0;
        self.stop_pause = 0;
    }

    fn resume_at_once(&mut self) {
        self.no_resume_before = 0;
        self.resume_pause = 0;
    }

    /// The driver's state became this one at that time.
    fn turn(&mut self, stopped: bool, at: Nanos) {
        self.account(at);
        self.stopped = stopped;
        self.unknown = false;
        self.resume_at_once();
        if stopped {
            // A resume may just have put a failed stop back.
            self.stop_at_once();
        }
        self.attribute();
    }

    fn fail(&mut self, action: Action, now: Nanos) {
        self.unknown = true;
        match action {
            Action::Stop => {
                let next_period = self.window.as_ref().map(Window::ends);
                let at_least = next_period
                    .filter(|_| !self.frozen)
                    .unwrap_or_else(|| now.saturating_add(RETRY));
                let paused = now.saturating_add(self.stop_pause);
                self.no_stop_before = at_least.max(paused);
                self.stop_pause = longer(self.stop_pause);
            }
            Action::Resume => {
                self.resume_pause = longer(self.resume_pause);
                self.no_resume_before = now.saturating_add(self.resume_pause);
            }
        }
    }

    /// Books the time up to `until` on what it was spent on.
    fn account(&mut self, until: Nanos) {
        let from = self.accounted;
        let until = until.max(from);
        self.accounted = until;
        match self.cause {
            // The window's clock stands still.
            Some(Reason::Freeze) => {
                self.frozen_ns += until - from;
                if let Some(window) = &mut self.window {
                    window.begins += until - from;
                }
                return;
            }
            Some(Reason::Window) => self.throttled_ns += until - from,
            None => {}
        }
        if let Some(window) = &mut self.window {
            window.pass(from, until, !self.stopped);
        }
    }

    /// Finds out why it is stopped, and counts that.
    fn attribute(&mut self) {
        let before = self.cause;
        self.cause = if self.stopped {
            self.reason().or(before)
        } else {
            None
        };
        match (self.cause, &mut self.window) {
            (Some(Reason::Freeze), _) if before != self.cause => self.nr_freezes += 1,
            (Some(Reason::Window), Some(window)) if window.is_closed() && !window.counted => {
                window.counted = true;
                self.nr_throttled += 1;
            }
            (Some(Reason::Freeze | Reason::Window) | None, _) => {}
        }
    }

    /// Why it shall be stopped.
    fn reason(&self) -> Option<Reason> {
        let closed = self.window.as_ref().is_some_and(Window::is_closed);
        if self.frozen {
            Some(Reason::Freeze)
        } else {
            closed.then_some(Reason::Window)
        }
    }

    fn shall_be_stopped(&self, now: Nanos) -> bool {
        self.reason().is_some() && now >= self.no_stop_before
    }

    fn decide(&self, now: Nanos) -> Option<Action> {
        let stop = self.shall_be_stopped(now);
        if stop == self.stopped && !self.unknown {
            None
        } else if stop {
            Some(Action::Stop)
        } else {
            (now >= self.no_resume_before).then_some(Action::Resume)
        }
    }

    /// When the next decision may differ, if no event comes before.
    fn deadline(&self, now: Nanos) -> Option<Nanos> {
        let retries = [self.no_stop_before, self.no_resume_before];
        let retries = retries.into_iter().filter(|at| *at > now);
        let window = self
            .window
            .as_ref()
            .filter(|_| self.cause != Some(Reason::Freeze));
        let closes = window
            .filter(|window| !self.stopped && !window.is_closed())
            .map(|window| now.saturating_add(window.left.unsigned_abs()));
        retries.chain(window.map(Window::ends)).chain(closes).min()
    }
}

/// The pause after one more failure.
fn longer(pause: Nanos) -> Nanos {
    (pause * 2).clamp(RETRY, LONGEST_RETRY)
}

fn middle(begun: Nanos, ended: Nanos) -> Nanos {
    begun + ended.saturating_sub(begun) / 2
}

/// The run window of compute.max.
#[derive(Debug)]
struct Window {
    /// Running time of a period and its length, nanoseconds; 0 < quota < period.
    quota: i64,
    period: i64,
    /// When the present period began; moves on while the clock stands still.
    begins: Nanos,
    /// Running time left, nanoseconds; what was overrun is below 0.
    left: i64,
    /// Whether nr_throttled has this period.
    counted: bool,
}

impl Window {
    /// A window that opens now; `None` where it would never close.
    fn of(quota: Quota, now: Nanos) -> Option<Self> {
        let nanos = |usec: u64| i64::try_from(usec).unwrap_or(i64::MAX).saturating_mul(1000);
        let period = nanos(quota.period_usec);
        let quota = nanos(quota.quota_usec?);
        (quota < period).then_some(Self {
            quota,
            period,
            begins: now,
            left: quota,
            counted: false,
        })
    }

    fn is_closed(&self) -> bool {
        self.left <= 0
    }

    fn ends(&self) -> Nanos {
        self.begins.saturating_add(self.period.unsigned_abs())
    }

    /// Time has passed, in which the process ran or not.
    fn pass(&mut self, from: Nanos, until: Nanos, ran: bool) {
        let ends = self.ends();
        if until < ends {
            self.spend(until - from, ran);
            return;
        }
        self.spend(ends.saturating_sub(from), ran);
        self.left = self.bounded(self.left.saturating_add(self.quota));
        // Whole periods go by only when a call or the machine was held up. Each
        // moves what is left by the same amount, so the bound is taken once.
        let period = self.period.unsigned_abs();
        let whole = (until - ends) / period;
        let gain = if ran {
            self.quota - self.period
        } else {
            self.quota
        };
        let gain = gain.saturating_mul(i64::try_from(whole).unwrap_or(i64::MAX));
        self.left = self.bounded(self.left.saturating_add(gain));
        self.begins = ends + whole * period;
        self.counted = false;
        self.spend(until - self.begins, ran);
    }

    fn spend(&mut self, length: Nanos, ran: bool) {
        if ran {
            let length = i64::try_from(length).unwrap_or(i64::MAX);
            self.left = self.left.saturating_sub(length);
        }
    }

    /// What is left when a period begins, with one period carried at most.
    fn bounded(&self, left: i64) -> i64 {
        let most = self.quota.saturating_add(self.period);
        left.clamp(self.quota - self.period, most)
    }
}

#[cfg(test)]
mod tests;
