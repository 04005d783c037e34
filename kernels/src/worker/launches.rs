//! The launches of a workload: which are in flight, which have ended, and what
//! they did.
//!
//! The n-th launch goes to `base + (n + 1) * units`, `base` being what
//! calibration did. The queue holds those that have not ended, in order; the
//! engine has the first of them. After a stop the blocks' cursors say which of
//! them ended; the others stay in the queue and are submitted again.

use std::collections::VecDeque;

use gcgroup_model::snapshot::Sample;

use crate::engine::{Completion, Engine, EngineError, Form, Progress};

use super::quota::Usage;
use super::{SAMPLES_MAX, unasked_for};

/// What all launches of a workload have in common.
#[derive(Clone, Debug)]
pub(super) struct Shape {
    /// Iterations of each block in one launch.
    pub(super) iterations: u64,
    /// Units of one iteration.
    pub(super) units_per_iteration: u64,
    /// Blocks.
    pub(super) blocks: u32,
    /// Whether they can be stopped.
    pub(super) form: Form,
    /// Launches kept in flight, as the setup has it.
    pub(super) depth: usize,
    /// Units between two looks at the stop flag.
    pub(super) poll_units: u32,
}

impl Shape {
    /// Units of each block in one launch. No overflow: calibration bounds them.
    fn units(&self) -> u64 {
        self.iterations * self.units_per_iteration
    }

    /// Launches kept in flight. An uncut one cannot be recalled, so there is
    /// only one: a stop then waits for one kernel's end, and the GPU idles for
    /// a submission (some 10 us) between two.
    fn depth(&self) -> usize {
        match self.form {
            Form::Sliced => self.depth,
            Form::Uncut => 1,
        }
    }
}

/// A launch that has not ended.
#[derive(Debug)]
struct Launch {
    seq: u64,
    target: u64,
    /// First submission, as its first completion says.
    submitted_ns: Option<u64>,
    /// Start of its first piece.
    start_ns: Option<u64>,
    /// Device time of all its pieces.
    device_us: f64,
    seen_ns: u64,
}

impl Launch {
    fn new(seq: u64, target: u64) -> Self {
        Self {
            seq,
            target,
            submitted_ns: None,
            start_ns: None,
            device_us: 0.0,
            seen_ns: 0,
        }
    }

    fn add(&mut self, completion: &Completion, device_ns: u64) {
        self.submitted_ns.get_or_insert(completion.submitted_ns);
        self.start_ns
            .get_or_insert(completion.seen_ns.saturating_sub(device_ns));
        self.device_us += device_ns as f64 / 1000.0;
        self.seen_ns = completion.seen_ns;
    }

    /// Forgets pieces in which it did nothing.
    fn forget(&mut self) {
        self.start_ns = None;
        self.device_us = 0.0;
    }

    fn sample(&self, sm_count: u32) -> Sample {
        let submitted = self.submitted_ns.unwrap_or(self.seen_ns);
        Sample {
            seq: self.seq,
            start_ns: self.start_ns.unwrap_or(self.seen_ns),
            device_us: self.device_us,
            wall_us: self.seen_ns.saturating_sub(submitted) as f64 / 1000.0,
            sm_count,
        }
    }
}

/// The launches of one workload.
#[derive(Debug)]
pub(super) struct Launches {
    shape: Shape,
    base: u64,
    queue: VecDeque<Launch>,
    /// Of the queue, those that came back since the stop flag was raised; the
    /// first ones.
    undecided: usize,
    /// Of the queue, those that the engine has; the ones behind these.
    in_flight: usize,
    /// Target of the newest launch.
    newest: u64,
    submitted: u64,
    ended: u64,
    usage_ns: u64,
    resident_since: u64,
    /// Units of all blocks together when last read.
    total: u128,
    samples: VecDeque<Sample>,
}

impl Launches {
    /// None yet; calibration went to `base` and left the blocks at `progress`.
    ///
    /// # Errors
    /// [`EngineError::Failed`] if that is not where they are.
    pub(super) fn new(shape: Shape, base: u64, progress: Progress) -> Result<Self, EngineError> {
        let mut launches = Self {
            base,
            queue: VecDeque::with_capacity(shape.depth()),
            undecided: 0,
            in_flight: 0,
            newest: base,
            submitted: 0,
            ended: 0,
            usage_ns: 0,
            resident_since: 0,
            total: 0,
            samples: VecDeque::new(),
            shape,
        };
        launches.decide(progress, 0)?;
        Ok(launches)
    }

    /// Keeps the engine busy: first with the launches that a stop cut short,
    /// then with new ones.
    pub(super) fn submit<E: Engine>(&mut self, engine: &mut E) -> Result<(), EngineError> {
        while self.in_flight < self.shape.depth() {
            if self.in_flight == self.queue.len() {
                self.newest = self
                    .newest
                    .checked_add(self.shape.units())
                    .ok_or_else(|| EngineError::Failed("more than 2^64 units".to_owned()))?;
                self.queue
                    .push_back(Launch::new(self.submitted, self.newest));
                self.submitted += 1;
            }
            if self.in_flight == 0 {
                self.resident_since = engine.now_ns();
            }
            engine.submit(self.queue[self.in_flight].target, self.shape.poll_units)?;
            self.in_flight += 1;
        }
        Ok(())
    }

    /// Takes a launch that came back. While the stop flag is up, only the
    /// blocks' cursors can tell whether it ended.
    ///
    /// # Errors
    /// [`EngineError::Failed`] if it is not the one that was to come back.
    pub(super) fn take_back(
        &mut self,
        completion: &Completion,
        flag_up: bool,
        sm_count: u32,
    ) -> Result<(), EngineError> {
        let launch = match self.queue.get_mut(self.undecided) {
            Some(launch) if self.in_flight > 0 && launch.target == completion.target => launch,
            _ => return Err(unasked_for(completion.target)),
        };
        // The cast saturates, and makes 0 of what is no number.
        let device_ns = (completion.device_us * 1000.0).round() as u64;
        launch.add(completion, device_ns);
        self.usage_ns = self.usage_ns.saturating_add(device_ns);
        self.resident_since = completion.seen_ns;
        self.in_flight -= 1;
        if flag_up {
            self.undecided += 1;
        } else {
            self.end_first(sm_count);
        }
        Ok(())
    }

    /// Decides which launches ended before the stop, everything having come
    /// back.
    ///
    /// # Errors
    /// [`EngineError::Failed`] if the cursors are where no block can be.
    pub(super) fn decide(&mut self, at: Progress, sm_count: u32) -> Result<(), EngineError> {
        let blocks = u128::from(self.shape.blocks);
        let possible = at.least >= self.floor()
            && at.least <= at.most
            && at.most <= self.newest
            && (u128::from(at.least) * blocks..=u128::from(at.most) * blocks).contains(&at.total)
            && at.total >= self.total;
        if !possible {
            return Err(EngineError::Failed(format!(
                "{} blocks did {} to {} units, {} together, where {} to {} were submitted and {} \
                 together done before",
                self.shape.blocks,
                at.least,
                at.most,
                at.total,
                self.floor(),
                self.newest,
                self.total
            )));
        }
        self.total = at.total;
        self.undecided = 0;
        while self
            .queue
            .front()
            .is_some_and(|launch| launch.target <= at.least)
        {
            self.end_first(sm_count);
        }
        let units = self.shape.units();
        for launch in &mut self.queue {
            if launch.target - units >= at.most {
                launch.forget();
            }
        }
        Ok(())
    }

    /// Whether the engine has nothing.
    pub(super) fn are_back(&self) -> bool {
        self.in_flight == 0
    }

    /// Whether they can be stopped.
    pub(super) fn are_sliced(&self) -> bool {
        self.shape.form == Form::Sliced
    }

    /// Launches handed to the engine, each once.
    pub(super) fn submitted(&self) -> u64 {
        self.submitted
    }

    /// Launches that ended.
    pub(super) fn ended(&self) -> u64 {
        self.ended
    }

    /// GPU time as known now.
    pub(super) fn usage(&self) -> Usage {
        Usage {
            ended_ns: self.usage_ns,
            resident_since: (self.in_flight > 0).then_some(self.resident_since),
        }
    }

    /// Iterations of all blocks together: exact when last stopped, since then
    /// by whole launches.
    pub(super) fn iterations(&self) -> u64 {
        let blocks = u128::from(self.shape.blocks);
        let read = self.total.saturating_sub(u128::from(self.base) * blocks)
            / u128::from(self.shape.units_per_iteration.max(1));
        let whole = u128::from(self.ended) * u128::from(self.shape.iterations) * blocks;
        u64::try_from(read.max(whole)).unwrap_or(u64::MAX)
    }

    /// Launches that ended since the last call, oldest first.
    pub(super) fn take_samples(&mut self) -> Vec<Sample> {
        self.samples.drain(..).collect()
    }

    /// Units that every block has certainly done.
    fn floor(&self) -> u64 {
        match self.queue.front() {
            Some(first) => first.target - self.shape.units(),
            None => self.newest,
        }
    }

    fn end_first(&mut self, sm_count: u32) {
        let Some(launch) = self.queue.pop_front() else {
            return;
        };
        self.ended += 1;
        if self.samples.len() == SAMPLES_MAX {
            self.samples.pop_front();
        }
        let sample = launch.sample(sm_count);
        // Launches do not overlap. Where they seem to, an end was seen late (the
        // worker's thread was away), and the start reckoned from it is too.
        let mut start = sample.start_ns;
        for earlier in self.samples.iter_mut().rev() {
            let latest = start.saturating_sub((earlier.device_us * 1000.0) as u64);
            if earlier.start_ns <= latest {
                break;
            }
            earlier.start_ns = latest;
            start = latest;
        }
        self.samples.push_back(sample);
    }
}
