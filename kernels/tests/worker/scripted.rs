//! A GPU that computes when each block is where, for any clock.
//!
//! Every block of a launch does units one after the other, some nanoseconds
//! each; a block starts a little later than the one before it. The stop flag
//! takes effect some time after it is raised and is seen between two chunks of
//! `poll_units`, and at a launch's start. It panics where the worker breaks the
//! engine's contract.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use gcgroup_kernels::engine::{
    Completion, Engine, EngineError, Facts, Form, Placement, Plan, Prepared, Progress, Verified,
};
use rustix::time::{
    ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, clock_gettime,
    timerfd_create, timerfd_settime,
};

/// SMs of the whole device.
pub(crate) const SMS: u32 = 132;
/// What a look for ended launches costs, nanoseconds.
const POLL_NS: u64 = 300;
/// From a submission to its start where the device is idle, nanoseconds.
const SUBMIT_NS: u64 = 2_000;
/// What a launch takes at least, nanoseconds, though its blocks leave at once.
const EMPTY_NS: u64 = 1_000;

/// How fast it is and what it does wrong.
#[derive(Clone, Debug)]
pub(crate) struct Script {
    /// Nanoseconds of one unit on all SMs.
    pub(crate) unit_ns: u64,
    /// Units of one iteration.
    pub(crate) units_per_iteration: u64,
    /// How much later each block starts than the one before it.
    pub(crate) skew_ns: u64,
    /// From raising the flag to its being seen.
    pub(crate) stop_ns: u64,
    /// Launches do not end.
    pub(crate) hangs: bool,
    /// The next call of that name fails.
    pub(crate) fails: Option<(&'static str, EngineError)>,
    /// Added to the cursors that progress tells.
    pub(crate) lies: u64,
}

impl Default for Script {
    fn default() -> Self {
        Self {
            unit_ns: 100,
            units_per_iteration: 1,
            skew_ns: 40,
            stop_ns: 20_000,
            hangs: false,
            fails: None,
            lies: 0,
        }
    }
}

struct Flight {
    target: u64,
    poll_units: u32,
    submitted: u64,
}

struct Ended {
    target: u64,
    submitted: u64,
    device_ns: u64,
}

/// What the test sees and changes.
pub(crate) struct Gpu {
    pub(crate) script: Script,
    /// The virtual clock; `None` is the real one.
    virtual_now: Option<Cell<u64>>,
    form: Form,
    sm_count: u32,
    /// Units done by each block.
    pub(crate) cursors: Vec<u64>,
    flights: VecDeque<Flight>,
    ended: VecDeque<Ended>,
    free_at: u64,
    stop_at: Option<u64>,
    /// Most launches that were ever in flight.
    pub(crate) most_in_flight: usize,
    /// Device time of every launch that ended, nanoseconds.
    pub(crate) busy_ns: u64,
    /// Times that the flag was raised.
    pub(crate) stops: u64,
    /// Placements that were made.
    pub(crate) placements: Vec<Placement>,
    /// `poll_units` of the last launch.
    pub(crate) poll_units: u32,
}

/// The engine around a [`Gpu`].
pub(crate) struct Scripted {
    gpu: Rc<RefCell<Gpu>>,
    facts: Facts,
    timer: OwnedFd,
}

impl Gpu {
    /// An idle GPU on a virtual clock.
    pub(crate) fn on_virtual_clock(script: Script) -> Self {
        Self::new(script, Some(Cell::new(1_000_000_000)))
    }

    /// An idle GPU on the real clock.
    pub(crate) fn on_real_clock(script: Script) -> Self {
        Self::new(script, None)
    }

    fn new(script: Script, virtual_now: Option<Cell<u64>>) -> Self {
        Self {
            script,
            virtual_now,
            form: Form::Sliced,
            sm_count: SMS,
            cursors: Vec::new(),
            flights: VecDeque::new(),
            ended: VecDeque::new(),
            free_at: 0,
            stop_at: None,
            most_in_flight: 0,
            busy_ns: 0,
            stops: 0,
            placements: Vec::new(),
            poll_units: 0,
        }
    }

    pub(crate) fn now(&self) -> u64 {
        match &self.virtual_now {
            Some(now) => now.get(),
            None => {
                let now = clock_gettime(ClockId::Monotonic);
                now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned()
            }
        }
    }

    /// Moves the virtual clock forward to `time`, never back.
    pub(crate) fn advance_clock(&self, time: u64) {
        if let Some(now) = &self.virtual_now {
            now.set(now.get().max(time));
        }
    }

    /// Launches that the device has or that nobody took yet.
    pub(crate) fn in_flight(&self) -> usize {
        self.flights.len() + self.ended.len()
    }

    /// Units of all blocks together.
    pub(crate) fn total(&self) -> u128 {
        self.cursors.iter().map(|&cursor| u128::from(cursor)).sum()
    }

    /// When there is next something to take.
    pub(crate) fn next_event(&self) -> Option<u64> {
        if self.ended.is_empty() {
            self.front().map(|(_, end, _)| end)
        } else {
            Some(self.now())
        }
    }

    /// Begin, end and cursors at the end of the launch at the front.
    fn front(&self) -> Option<(u64, u64, Vec<u64>)> {
        let flight = self.flights.front()?;
        if self.script.hangs {
            return None;
        }
        let begin = self.free_at.max(flight.submitted + SUBMIT_NS);
        let unit_ns = self.script.unit_ns * u64::from(SMS) / u64::from(self.sm_count);
        let mut end = begin + EMPTY_NS;
        let cursors = (0u64..).zip(&self.cursors).map(|(block, &cursor)| {
            let start = begin + block * self.script.skew_ns;
            let left = flight.target.saturating_sub(cursor);
            let stop = self.stop_at.filter(|_| self.form == Form::Sliced);
            let done = match stop {
                Some(stop) if stop <= start => 0,
                Some(stop) => {
                    let chunk = u64::from(flight.poll_units);
                    let chunks = (stop - start).div_ceil((chunk * unit_ns).max(1));
                    left.min(chunks.saturating_mul(chunk))
                }
                None => left,
            };
            end = end.max(start + done * unit_ns);
            cursor + done
        });
        let cursors = cursors.collect();
        Some((begin, end, cursors))
    }

    /// Computes what has ended by now.
    fn catch_up(&mut self) {
        while let Some((begin, end, cursors)) = self.front() {
            if end > self.now() {
                return;
            }
            let Some(flight) = self.flights.pop_front() else {
                return;
            };
            self.cursors = cursors;
            self.free_at = end;
            self.busy_ns += end - begin;
            self.ended.push_back(Ended {
                target: flight.target,
                submitted: flight.submitted,
                device_ns: end - begin,
            });
        }
    }

    fn fault(&mut self, call: &str) -> Result<(), EngineError> {
        match self.script.fails.take_if(|(name, _)| *name == call) {
            Some((_, error)) => Err(error),
            None => Ok(()),
        }
    }

    fn must_be_idle(&self, call: &str) {
        assert_eq!(self.in_flight(), 0, "{call} while launches are in flight");
    }
}

impl Scripted {
    pub(crate) fn new(gpu: Rc<RefCell<Gpu>>) -> Self {
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC)
            .expect("a timer can be made");
        Self {
            gpu,
            facts: Facts {
                sm_count: SMS,
                groups: vec![8; 16],
                memory_bytes: 1 << 37,
                green_contexts: true,
                stream_priority_least: 0,
                stream_priority_greatest: -5,
                driver_version: 13_000,
            },
            timer,
        }
    }

    /// Makes the descriptor readable when something has ended.
    fn arm(&self) {
        let gpu = self.gpu.borrow();
        if gpu.virtual_now.is_some() {
            return;
        }
        // A time of 0 would disarm it.
        let at = gpu.next_event().map_or(0, |at| at.max(1));
        let timer = Itimerspec {
            it_interval: Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            },
            it_value: Timespec {
                tv_sec: (at / 1_000_000_000).cast_signed(),
                tv_nsec: (at % 1_000_000_000).cast_signed(),
            },
        };
        timerfd_settime(&self.timer, TimerfdTimerFlags::ABSTIME, &timer)
            .expect("the timer can be set");
    }
}

impl Engine for Scripted {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn prepare(&mut self, plan: &Plan) -> Result<Prepared, EngineError> {
        let mut gpu = self.gpu.borrow_mut();
        gpu.fault("prepare")?;
        assert!(gpu.cursors.is_empty(), "prepared twice");
        gpu.form = plan.form;
        gpu.cursors = vec![0; plan.blocks as usize];
        Ok(Prepared {
            buffer_bytes: plan.bytes,
            context_bytes: Some(1 << 28),
            units_per_iteration: gpu.script.units_per_iteration,
        })
    }

    fn place(&mut self, placement: &Placement) -> Result<u32, EngineError> {
        let mut gpu = self.gpu.borrow_mut();
        gpu.must_be_idle("place");
        gpu.fault("place")?;
        gpu.sm_count = match &placement.groups {
            Some(groups) => 8 * u32::try_from(groups.len()).expect("few groups"),
            None => SMS,
        };
        gpu.placements.push(placement.clone());
        Ok(gpu.sm_count)
    }

    fn submit(&mut self, target: u64, poll_units: u32) -> Result<(), EngineError> {
        {
            let mut gpu = self.gpu.borrow_mut();
            gpu.catch_up();
            gpu.fault("submit")?;
            assert!(poll_units >= 1, "a chunk of nothing");
            let newest = gpu.flights.back().map_or(0, |flight| flight.target);
            assert!(target > newest, "{target} submitted behind {newest}");
            let submitted = gpu.now();
            gpu.poll_units = poll_units;
            gpu.flights.push_back(Flight {
                target,
                poll_units,
                submitted,
            });
            gpu.most_in_flight = gpu.most_in_flight.max(gpu.in_flight());
        }
        self.arm();
        Ok(())
    }

    fn poll(&mut self) -> Result<Option<Completion>, EngineError> {
        let completion = {
            let mut gpu = self.gpu.borrow_mut();
            gpu.fault("poll")?;
            gpu.advance_clock(gpu.now() + POLL_NS);
            gpu.catch_up();
            let seen_ns = gpu.now();
            gpu.ended.pop_front().map(|ended| Completion {
                target: ended.target,
                submitted_ns: ended.submitted,
                seen_ns,
                device_us: ended.device_ns as f64 / 1000.0,
            })
        };
        self.arm();
        Ok(completion)
    }

    fn wait_fd(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }

    fn raise_stop(&mut self) -> Result<(), EngineError> {
        {
            let mut gpu = self.gpu.borrow_mut();
            gpu.catch_up();
            gpu.fault("raise_stop")?;
            assert!(gpu.stop_at.is_none(), "raised twice");
            gpu.stop_at = Some(gpu.now() + gpu.script.stop_ns);
            gpu.stops += 1;
        }
        self.arm();
        Ok(())
    }

    fn lower_stop(&mut self) -> Result<(), EngineError> {
        let mut gpu = self.gpu.borrow_mut();
        gpu.must_be_idle("lower_stop");
        gpu.fault("lower_stop")?;
        gpu.stop_at = None;
        Ok(())
    }

    fn progress(&mut self) -> Result<Progress, EngineError> {
        let mut gpu = self.gpu.borrow_mut();
        gpu.must_be_idle("progress");
        gpu.fault("progress")?;
        let lies = gpu.script.lies;
        let cursors = gpu.cursors.iter().map(|&cursor| cursor + lies);
        Ok(Progress {
            least: cursors.clone().min().unwrap_or(0),
            most: cursors.clone().max().unwrap_or(0),
            total: cursors.map(u128::from).sum(),
        })
    }

    fn verify(&mut self) -> Result<Verified, EngineError> {
        let mut gpu = self.gpu.borrow_mut();
        gpu.must_be_idle("verify");
        gpu.fault("verify")?;
        Ok(Verified {
            compared: 64,
            wrong: 0,
        })
    }

    fn now_ns(&self) -> u64 {
        self.gpu.borrow().now()
    }
}
