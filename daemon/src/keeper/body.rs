//! A keeper's thread: orders, windows, looks and reports, each in its time.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvError, RecvTimeoutError};
use std::time::Duration;

use gcgroup_device::{Channels, DeviceError};
use gcgroup_model::value::{Priority, Quota};
use gcgroup_policy::gate::{Action, Event, Gate, Reason};
use gcgroup_policy::lane::Nanos;

use super::grip::{Grip, Wish};
use super::{Fate, Hooks, Order, Said, Start, State, Subject, Tell};
use crate::clock::now_ns;

/// How often it looks for channels that appeared, while there are settings to
/// give them: half of the 200 ms in which they shall have them.
const LOOK_EVERY: Nanos = 100_000_000;

/// Longest pause between looks that fail; the first is [`LOOK_EVERY`], each
/// twice as long as the one before.
const LONGEST_PAUSE: Nanos = 5_000_000_000;

/// Shortest time between looks that are made only for reports.
const REPORTED_LOOK: Nanos = 1_000_000_000;

/// Reports that come more rarely than this are for nobody yet, and are not worth
/// a look.
const READ_REPORT: Nanos = 500_000_000;

/// What the thread owns.
pub(super) struct Body {
    grip: Grip,
    gate: Gate,
    tell: Tell,
    fate: Arc<Fate>,
    /// A priority that new groups do not have by themselves.
    priority: Option<Priority>,
    gate_due: Option<Nanos>,
    look_due: Option<Nanos>,
    /// Pause after the next look that fails.
    pause: Nanos,
    /// When the last look ended, and whether it failed.
    looked: Nanos,
    look_failed: bool,
    report_every: Option<Nanos>,
    report_due: Option<Nanos>,
    /// Why a window's stop or a resume failed, and why a look did.
    gate_trouble: Option<String>,
    look_trouble: Option<String>,
    /// The state that was told last.
    told: Option<State>,
}

impl Body {
    pub(super) fn new(
        subject: Subject,
        host: Arc<dyn Channels>,
        start: Start,
        hooks: Hooks,
        fate: Arc<Fate>,
    ) -> Self {
        Self {
            grip: Grip::new(subject, host, hooks.arm, start, Arc::clone(&fate)),
            gate: match start {
                Start::Fresh => Gate::new(),
                Start::MaybeStopped => Gate::maybe_stopped(),
            },
            tell: hooks.tell,
            fate,
            priority: None,
            gate_due: None,
            look_due: None,
            pause: LOOK_EVERY,
            looked: 0,
            look_failed: false,
            report_every: None,
            report_due: None,
            gate_trouble: None,
            look_trouble: None,
            told: None,
        }
    }

    /// Works until it is told to let go, or its keeper is dropped.
    pub(super) fn run(mut self, orders: &Receiver<(u64, Order)>) {
        if !self.fate.is_abandoned() {
            // Resumes what may be stopped. What fails is told as trouble.
            let _ = self.step(Event::Tick);
            self.look();
            self.tell_change();
        }
        loop {
            let order = match self.due() {
                Some(due) => {
                    let wait = Duration::from_nanos(due.saturating_sub(now_ns()));
                    orders.recv_timeout(wait)
                }
                None => orders
                    .recv()
                    .map_err(|RecvError| RecvTimeoutError::Disconnected),
            };
            if self.fate.is_abandoned() {
                return;
            }
            match order {
                Ok((_, Order::LetGo)) => {
                    let done = self.let_go();
                    (self.tell)(Said::Ended(done));
                    return;
                }
                Ok((_, Order::Look)) => self.look_again(),
                Ok((job, order)) => self.answer(job, order),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            // Whoever lets go does not wait for what nobody needs any more.
            if !self.fate.is_ending() {
                self.turn();
            }
        }
    }

    /// When there is something to do that nobody asks for.
    fn due(&self) -> Option<Nanos> {
        let dues = [self.gate_due, self.look_due, self.report_due];
        dues.into_iter().flatten().min()
    }

    /// Does what is due.
    fn turn(&mut self) {
        let now = now_ns();
        let is_due = |due: Option<Nanos>| due.is_some_and(|due| due <= now);
        if is_due(self.gate_due) {
            // What fails here is told as trouble.
            let _ = self.step(Event::Tick);
        }
        if is_due(self.look_due) {
            self.look();
        }
        if is_due(self.report_due) {
            self.report();
        }
        self.tell_change();
    }

    fn answer(&mut self, job: u64, order: Order) {
        let result = self.obey(order);
        // Orders that find no context change nothing about that.
        if !matches!(result, Err(DeviceError::NoContext(_))) {
            self.pause = LOOK_EVERY;
            if self.has_settings() || self.look_due.is_some() {
                self.look_soon();
            }
        }
        let state = self.state();
        self.told = Some(state.clone());
        (self.tell)(Said::Answer { job, result, state });
    }

    fn obey(&mut self, order: Order) -> Result<(), DeviceError> {
        match order {
            Order::Freeze(true) => self.freeze()?,
            Order::Freeze(false) => self.thaw()?,
            Order::Quota(quota) => self.limit(quota)?,
            Order::Priority(priority) => self.prioritise(priority)?,
            Order::ReportEvery(every) => {
                let every = u64::try_from(every.as_nanos()).unwrap_or(u64::MAX);
                self.report_every = (every > 0).then_some(every);
                self.report_due = self
                    .report_every
                    .map(|every| now_ns().saturating_add(every));
            }
            // Neither has an answer; not done here.
            Order::Look | Order::LetGo => {}
        }
        Ok(())
    }

    /// Freezes, or leaves it as it was.
    fn freeze(&mut self) -> Result<(), DeviceError> {
        // Where it stands already the gate asks for no call.
        let stands = self.gate.stopped_by().filter(|_| !self.gate.is_unknown());
        let confirmed = match stands {
            Some(Reason::Freeze | Reason::Window) if self.has_trouble() => self.grip.stop_again(),
            // What appeared since the window closed may run.
            Some(Reason::Window) => self.grip.confirm(),
            Some(Reason::Freeze) | None => Ok(()),
        };
        confirmed.map_err(|error| self.look_failed_with(error))?;
        let done = self.step(Event::Freeze(true));
        if done.is_err() {
            let _ = self.step(Event::Freeze(false));
            if !self.gate.is_unknown() {
                // It runs as before, and the order's answer says why.
                self.gate_trouble = None;
            }
        }
        done
    }

    /// Thaws. What the gate takes to run is resumed all the same while there is
    /// trouble.
    fn thaw(&mut self) -> Result<(), DeviceError> {
        let runs = self.gate.stopped_by().is_none() && !self.gate.is_unknown();
        if runs && self.has_trouble() {
            let released = self.grip.resume_all();
            released.map_err(|error| self.look_failed_with(error))?;
        }
        self.step(Event::Freeze(false))
    }

    fn has_trouble(&self) -> bool {
        self.gate_trouble.is_some() || self.look_trouble.is_some()
    }

    /// Something failed that the next look puts right.
    fn look_failed_with(&mut self, error: DeviceError) -> DeviceError {
        self.look_trouble = Some(error.to_string());
        self.look_failed = true;
        self.look_soon();
        error
    }

    fn look_soon(&mut self) {
        let next = now_ns() + LOOK_EVERY;
        self.look_due = Some(self.look_due.map_or(next, |due| due.min(next)));
    }

    fn limit(&mut self, quota: Quota) -> Result<(), DeviceError> {
        if closes(quota) {
            self.grip.prepare()?;
        }
        self.step(Event::Quota(quota))
    }

    fn prioritise(&mut self, priority: Priority) -> Result<(), DeviceError> {
        self.grip.prioritise(priority)?;
        self.priority = Some(priority).filter(|priority| *priority != Priority::default());
        Ok(())
    }

    /// Gives the gate an event, does what it asks, and says how the first of that
    /// went. A second is done where it follows at once, as putting back does;
    /// what is wanted then waits for the next turn, so that orders are heard.
    fn step(&mut self, event: Event) -> Result<(), DeviceError> {
        let (mut action, mut due) = self.gate.step(event, now_ns());
        let (mut first, mut trouble) = (None, None);
        for _ in 0..2 {
            let Some(wanted) = action else { break };
            let done = match wanted {
                Action::Stop => self.grip.stop(),
                Action::Resume => self.grip.resume(),
            };
            let event = match (&done, wanted) {
                (Ok(call), Action::Stop) => Event::Stopped {
                    begun: call.begun,
                    ended: call.ended,
                },
                (Ok(call), Action::Resume) => Event::Resumed {
                    begun: call.begun,
                    ended: call.ended,
                },
                (Err(_), _) => Event::Failed(wanted),
            };
            trouble = trouble.or(done.as_ref().err().map(ToString::to_string));
            first.get_or_insert(done.map(drop));
            (action, due) = self.gate.step(event, now_ns());
        }
        self.gate_due = if action.is_some() {
            Some(now_ns())
        } else {
            due
        };
        if first.is_some() {
            self.gate_trouble = trouble;
            if self.grip.is_stale() && self.look_due.is_none() {
                self.look_soon();
            }
        }
        first.unwrap_or(Ok(()))
    }

    /// Whether new channels and groups need anything.
    fn has_settings(&self) -> bool {
        self.gate.stopped_by().is_some() || self.gate.has_window() || self.priority.is_some()
    }

    /// Everything may be new: what was given up for a while is tried at once.
    fn look_again(&mut self) {
        if self.fate.is_ending() {
            return;
        }
        self.grip.distrust();
        self.pause = LOOK_EVERY;
        self.look();
        let _ = self.step(Event::Retry);
    }

    /// Looks what there is and gives it its settings.
    fn look(&mut self) {
        let stopped = self.gate.stopped_by().is_some() && !self.gate.is_unknown();
        let kept = self.has_settings();
        let done = self.grip.keep_up(Wish {
            stopped,
            priority: self.priority,
            kept,
        });
        self.looked = now_ns();
        let failed_before = self.look_failed;
        self.look_failed = done.is_err();
        let pause = match &done {
            Ok(()) => {
                self.pause = LOOK_EVERY;
                kept.then_some(LOOK_EVERY)
            }
            Err(_) => {
                let pause = self.pause;
                self.pause = (pause * 2).min(LONGEST_PAUSE);
                Some(pause)
            }
        };
        self.look_due = pause.map(|pause| self.looked.saturating_add(pause));
        // A process without a context lacks nothing if nothing is set for it.
        let bare = |error: &DeviceError| matches!(error, DeviceError::NoContext(_)) && !kept;
        let trouble = done.as_ref().err().filter(|error| !bare(error));
        self.look_trouble = trouble.map(ToString::to_string);
        if done.is_ok() && failed_before {
            // What made the look fail may have made stops and resumes fail.
            let _ = self.step(Event::Retry);
        }
    }

    fn report(&mut self) {
        let since = now_ns().saturating_sub(self.looked);
        let is_read = self.report_every.is_some_and(|every| every < READ_REPORT);
        if self.look_due.is_none() && is_read && since >= REPORTED_LOOK {
            self.look();
        }
        let state = self.state();
        if self.told.as_ref() != Some(&state) {
            self.tell_state(state);
        }
        let every = self.report_every;
        self.report_due = every.map(|every| now_ns().saturating_add(every));
    }

    /// Tells the state if it changed otherwise than by counting.
    fn tell_change(&mut self) {
        let state = self.state();
        let changed = self.told.as_ref().is_none_or(|told| {
            let counted = State {
                throttled_usec: state.throttled_usec,
                frozen_usec: state.frozen_usec,
                nr_throttled: state.nr_throttled,
                ..told.clone()
            };
            counted != state
        });
        if changed {
            self.tell_state(state);
        }
    }

    fn tell_state(&mut self, state: State) {
        self.told = Some(state.clone());
        (self.tell)(Said::State(state));
    }

    fn state(&self) -> State {
        let counters = self.gate.counters(now_ns());
        let trouble = self.gate_trouble.as_ref().or(self.look_trouble.as_ref());
        State {
            channel_groups: self.grip.channel_groups(),
            timeslice_usec: self.grip.timeslice_usec(),
            frozen: self.gate.stopped_by() == Some(Reason::Freeze),
            throttled_usec: counters.throttled_usec,
            frozen_usec: counters.frozen_usec,
            nr_freezes: counters.nr_freezes,
            nr_throttled: counters.nr_throttled,
            trouble: trouble.cloned(),
        }
    }

    /// Lets everything run that was stopped, for whatever reason.
    fn let_go(&mut self) -> Result<(), DeviceError> {
        let thawed = self.step(Event::Freeze(false));
        let opened = self.step(Event::Quota(Quota::default()));
        let mut done = if self.gate.stopped_by().is_some() || self.gate.is_unknown() {
            thawed.and(opened)
        } else {
            Ok(())
        };
        if done.is_ok() && self.grip.is_unsure() {
            done = self.grip.resume_all();
            if done.is_ok() && self.grip.is_unsure() {
                done = Err(DeviceError::Failed(
                    "what was stopped runs, but its channels could not be listed since".to_owned(),
                ));
            }
        }
        match done {
            // There is nothing left that could be stopped.
            Err(DeviceError::NoProcess(_)) => Ok(()),
            done => done,
        }
    }
}

/// Whether a process with this quota is stopped at times.
fn closes(quota: Quota) -> bool {
    quota
        .quota_usec
        .is_some_and(|usec| usec < quota.period_usec)
}
