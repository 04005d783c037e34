//! Whether a prepared workload's launches run, and what it costs in time when
//! they do not.
//!
//! Reasons to stop come and go (a freeze, the quota, a command that needs the
//! GPU idle); [`Workload::settle`] makes the GPU follow them.

use gcgroup_model::snapshot::Sample;

use crate::engine::{Engine, EngineError, Placement, Progress};
use crate::protocol::{Counters, QuotaSetting, Setup};

use super::launches::{Launches, Shape};
use super::quota::Quota;

/// What the GPU does with the launches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flow {
    /// Nothing is in flight, and what was done is known exactly.
    Stopped,
    /// As many are in flight as should be.
    Running,
    /// Nothing is submitted any more; some are still in flight.
    Draining,
}

/// A prepared workload.
#[derive(Debug)]
pub(super) struct Workload {
    launches: Launches,
    quota: Quota,
    flow: Flow,
    /// Whether the stop flag is up.
    flag_up: bool,
    started_ns: Option<u64>,
    duration_ns: Option<u64>,
    placement: Placement,
    sm_count: u32,
    /// Whether a freeze is wanted.
    held: bool,
    /// Whether it is in force.
    frozen: bool,
    /// Until when frozen and throttled time are counted.
    counted_until: u64,
    frozen_ns: u64,
    throttled_ns: u64,
    nr_freezes: u64,
    nr_throttled: u64,
    /// Whether this period is in `nr_throttled`.
    period_counted: bool,
}

impl Workload {
    /// A workload that waits for its start, at `progress` after calibration.
    ///
    /// # Errors
    /// [`EngineError::Failed`] if the blocks are not where calibration led.
    pub(super) fn new(
        shape: Shape,
        base: u64,
        setup: &Setup,
        sm_count: u32,
        progress: Progress,
        now: u64,
    ) -> Result<Self, EngineError> {
        Ok(Self {
            launches: Launches::new(shape, base, progress)?,
            quota: Quota::new(setup.quota, now),
            flow: Flow::Stopped,
            flag_up: false,
            started_ns: None,
            duration_ns: setup.duration_ms.map(|ms| ms.saturating_mul(1_000_000)),
            placement: setup.placement.clone(),
            sm_count,
            held: false,
            frozen: false,
            counted_until: now,
            frozen_ns: 0,
            throttled_ns: 0,
            nr_freezes: 0,
            nr_throttled: 0,
            period_counted: false,
        })
    }

    /// Begins: launches are wanted from now on, and time is counted.
    pub(super) fn start(&mut self, now: u64) {
        self.started_ns = Some(now);
        self.counted_until = now;
        self.quota.restart(now, 0);
    }

    /// Makes the GPU do what is wanted now. With `idle_wanted` nothing is.
    pub(super) fn settle<E: Engine>(
        &mut self,
        engine: &mut E,
        idle_wanted: bool,
    ) -> Result<(), EngineError> {
        // A freeze does not wait for any of it, and the quota can wait for the
        // freeze's end.
        if !self.held {
            self.follow_quota(engine.now_ns());
        }
        let wanted =
            self.started_ns.is_some() && !self.held && !idle_wanted && !self.quota.throttled();
        loop {
            match self.flow {
                Flow::Running if !wanted => {
                    if self.launches.are_sliced() {
                        engine.raise_stop()?;
                        self.flag_up = true;
                    }
                    self.flow = Flow::Draining;
                }
                Flow::Running => return self.launches.submit(engine),
                Flow::Draining if self.launches.are_back() => {
                    let progress = engine.progress()?;
                    self.launches.decide(progress, self.sm_count)?;
                    self.count_time(engine.now_ns());
                    self.flow = Flow::Stopped;
                }
                Flow::Draining if wanted && !self.flag_up => self.flow = Flow::Running,
                Flow::Stopped if wanted => {
                    self.count_time(engine.now_ns());
                    if self.flag_up {
                        engine.lower_stop()?;
                        self.flag_up = false;
                    }
                    self.flow = Flow::Running;
                }
                Flow::Draining | Flow::Stopped => return Ok(()),
            }
        }
    }

    /// Takes the launches that came back.
    pub(super) fn collect<E: Engine>(&mut self, engine: &mut E) -> Result<(), EngineError> {
        while let Some(completion) = engine.poll()? {
            self.launches
                .take_back(&completion, self.flag_up, self.sm_count)?;
        }
        Ok(())
    }

    /// Wants it frozen; [`Workload::settle`] stops it.
    pub(super) fn hold(&mut self) {
        self.held = true;
    }

    /// It has stopped for a freeze.
    pub(super) fn freeze(&mut self, now: u64) {
        self.count_time(now);
        self.frozen = true;
        self.nr_freezes += 1;
    }

    /// Ends the freeze; [`Workload::settle`] lets it run.
    pub(super) fn release(&mut self, now: u64) {
        self.count_time(now);
        self.held = false;
        self.frozen = false;
    }

    /// Puts another quota in force.
    pub(super) fn set_quota(&mut self, setting: QuotaSetting, now: u64) {
        self.count_time(now);
        self.quota.set(setting, now, &self.launches.usage());
    }

    /// It was placed elsewhere.
    pub(super) fn set_placement(&mut self, placement: Placement, sm_count: u32) {
        self.placement = placement;
        self.sm_count = sm_count;
    }

    /// Where it is.
    pub(super) fn placement(&self) -> &Placement {
        &self.placement
    }

    /// SMs that it has there.
    pub(super) fn sm_count(&self) -> u32 {
        self.sm_count
    }

    /// Whether it was started.
    pub(super) fn is_started(&self) -> bool {
        self.started_ns.is_some()
    }

    /// Whether nothing is in flight and what was done is known.
    pub(super) fn is_stopped(&self) -> bool {
        self.flow == Flow::Stopped
    }

    /// Whether a freeze is wanted or in force.
    pub(super) fn is_held(&self) -> bool {
        self.held
    }

    /// Whether a freeze is in force.
    pub(super) fn is_frozen(&self) -> bool {
        self.frozen
    }

    /// When its duration is over.
    pub(super) fn expires(&self) -> Option<u64> {
        Some(self.started_ns?.saturating_add(self.duration_ns?))
    }

    /// When the quota is to be looked at next.
    pub(super) fn quota_deadline(&self) -> Option<u64> {
        if self.started_ns.is_none() || self.held {
            return None;
        }
        self.quota.deadline(&self.launches.usage())
    }

    /// The counters now.
    pub(super) fn counters(&mut self, now: u64) -> Counters {
        self.count_time(now);
        Counters {
            submitted: self.launches.submitted(),
            ended: self.launches.ended(),
            iterations: self.launches.iterations(),
            usage_usec: self.launches.usage().ended_ns / 1000,
            throttled_usec: self.throttled_ns / 1000,
            frozen_usec: self.frozen_ns / 1000,
            nr_freezes: self.nr_freezes,
            nr_throttled: self.nr_throttled,
            frozen: self.frozen,
            sm_count: self.sm_count,
        }
    }

    /// Launches that ended since the last call, oldest first.
    pub(super) fn take_samples(&mut self) -> Vec<Sample> {
        self.launches.take_samples()
    }

    fn follow_quota(&mut self, now: u64) {
        self.count_time(now);
        if self.started_ns.is_some() && self.quota.advance(now, &self.launches.usage()) {
            self.period_counted = false;
        }
    }

    /// Adds the time since the last call to what the workload stood still for.
    /// A freeze stops it whatever the quota says, so the time is the freeze's.
    fn count_time(&mut self, now: u64) {
        let passed = now.saturating_sub(self.counted_until);
        self.counted_until = now;
        if self.started_ns.is_none() || passed == 0 {
            return;
        }
        if self.frozen {
            self.frozen_ns += passed;
        } else if self.flow == Flow::Stopped && self.quota.throttled() {
            self.throttled_ns += passed;
            if !self.period_counted {
                self.period_counted = true;
                self.nr_throttled += 1;
            }
        }
    }
}
