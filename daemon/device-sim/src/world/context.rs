//! One context: its stream of launches and how far they are.
//!
//! All blocks go on alike, so one cursor tells where they are: the units of all
//! of them together. Block b has done `cursor / blocks` units, and one more where
//! b is below the remainder.

use std::collections::VecDeque;

use gcgroup_kernels::engine::{EngineError, Form, Plan};

use super::channel::Client;
use super::{MpsId, looks};
use crate::cost::Cost;
use crate::rate::Demand;
use crate::shape;

/// Identifies a context; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ContextId(pub(super) u64);

/// A launch that ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Ended {
    /// Target that it was submitted with.
    pub(crate) target: u64,
    /// When its client submitted it.
    pub(crate) submitted_ns: u64,
    /// Microseconds that it was on the device.
    pub(crate) device_us: f64,
    /// Units of all blocks that it did.
    pub(crate) units: u128,
}

/// The kernel of a context.
#[derive(Clone, Debug)]
pub(super) struct Workload {
    cost: Cost,
    pub(super) blocks: u32,
    form: Form,
}

impl Workload {
    pub(super) fn of(plan: &Plan) -> Option<Self> {
        Some(Self {
            cost: Cost::of(plan)?,
            blocks: plan.blocks,
            form: plan.form,
        })
    }
}

#[derive(Clone, Copy, Debug)]
struct Launch {
    target: u64,
    submitted_ns: u64,
}

/// The launch that is on the device.
#[derive(Debug)]
struct Head {
    launch: Launch,
    started_ns: u64,
    /// The cursor when it is complete.
    goal: u128,
    /// Units that are left until then.
    left: f64,
    /// Time on the device until it leaves because of the stop flag.
    stop_left_us: Option<f64>,
}

#[derive(Debug)]
pub(super) struct Context {
    pub(super) gpu: u32,
    pub(super) pid: u32,
    pub(super) client: Client,
    pub(super) mps: Option<MpsId>,
    /// Whether it is listed as an MPS server.
    pub(super) is_server: bool,
    /// Device memory of the context itself, bytes.
    pub(super) overhead: u64,
    /// Device memory that its program took, bytes.
    pub(super) allocated: u64,
    pub(super) workload: Option<Workload>,
    /// Bit g is set where it may use group g.
    pub(super) groups: u32,
    /// Units that all blocks have done until the last end of a launch.
    pub(super) cursor: u128,
    pub(super) broken: Option<EngineError>,
    /// Launches that were submitted.
    pub(super) launched: u64,
    /// Launches that ended complete.
    pub(super) complete: u64,
    stop: bool,
    waiting: VecDeque<Launch>,
    head: Option<Head>,
    /// Whether it had a launch that goes on when that was last asked.
    counted: bool,
    /// Units of all blocks in a microsecond, as was computed last.
    pub(super) rate: f64,
    /// Share of the time that the device gives this context.
    share: f64,
}

impl Context {
    pub(super) fn new(gpu: u32, pid: u32, client: u32, mps: Option<MpsId>, overhead: u64) -> Self {
        let client = match mps {
            Some(_) => Client::under_mps(client),
            None => Client::new(client),
        };
        Self {
            gpu,
            pid,
            client,
            mps,
            is_server: false,
            overhead,
            allocated: 0,
            workload: None,
            groups: (1 << shape::GROUPS.len()) - 1,
            cursor: 0,
            broken: None,
            launched: 0,
            complete: 0,
            stop: false,
            waiting: VecDeque::new(),
            head: None,
            counted: false,
            rate: 0.0,
            share: 0.0,
        }
    }

    /// Whether a launch of it is on the device and goes on.
    pub(super) fn runs(&self) -> bool {
        self.head.is_some() && !self.client.stands()
    }

    pub(super) fn is_idle(&self) -> bool {
        self.head.is_none() && self.waiting.is_empty()
    }

    pub(super) fn in_flight(&self) -> usize {
        self.waiting.len() + usize::from(self.head.is_some())
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.stop
    }

    /// Whether it has begun or ceased to want the device since the last call. A
    /// launch that follows another at once changes nothing.
    pub(super) fn presence_changed(&mut self) -> bool {
        let wants = self.runs();
        std::mem::replace(&mut self.counted, wants) != wants
    }

    pub(super) fn demand(&self) -> Option<Demand> {
        let workload = self.workload.as_ref()?;
        Some(Demand {
            blocks: f64::from(workload.blocks),
            cost: workload.cost,
            groups: self.groups,
        })
    }

    pub(super) fn set_rate(&mut self, rate: f64, share: f64) {
        (self.rate, self.share) = (rate, share);
    }

    pub(super) fn queue(&mut self, target: u64, submitted_ns: u64) {
        self.launched += 1;
        self.waiting.push_back(Launch {
            target,
            submitted_ns,
        });
    }

    /// Puts the next launch on the device, where none is. Those that have nothing
    /// to do, or see the stop flag when they begin, end at once. From disabled
    /// channels nothing comes, and what is on the device stands where it is.
    pub(super) fn start_next(&mut self, now_ns: u64) -> Vec<Ended> {
        let mut ended = Vec::new();
        if self.client.stands() {
            self.set_rate(0.0, 0.0);
            return ended;
        }
        let Some(workload) = &self.workload else {
            return ended;
        };
        while self.head.is_none()
            && let Some(launch) = self.waiting.pop_front()
        {
            let goal = u128::from(launch.target) * u128::from(workload.blocks);
            let left = goal.saturating_sub(self.cursor);
            if left == 0 || (self.stop && looks(workload.form)) {
                self.complete += u64::from(left == 0);
                ended.push(Ended {
                    target: launch.target,
                    submitted_ns: launch.submitted_ns,
                    device_us: 0.0,
                    units: 0,
                });
            } else {
                self.head = Some(Head {
                    launch,
                    started_ns: now_ns,
                    goal,
                    left: left as f64,
                    stop_left_us: None,
                });
            }
        }
        if self.head.is_none() {
            (self.rate, self.share) = (0.0, 0.0);
        }
        ended
    }

    /// Lets time pass, in microseconds.
    pub(super) fn pass(&mut self, us: f64) {
        if let Some(head) = &mut self.head {
            head.left -= self.rate * us;
            if let Some(left) = &mut head.stop_left_us {
                *left -= self.share * us;
            }
        }
    }

    /// Time until the launch on the device ends, microseconds.
    pub(super) fn remaining_us(&self) -> Option<f64> {
        let head = self.head.as_ref()?;
        let complete = head.left / self.rate;
        let stopped = head
            .stop_left_us
            .map_or(f64::INFINITY, |left| left / self.share);
        Some(complete.min(stopped)).filter(|us| us.is_finite())
    }

    /// Ends the launch on the device: complete where it has nothing left to do,
    /// otherwise with the units that it has done in whole.
    pub(super) fn finish(&mut self, now_ns: u64) -> Option<Ended> {
        let head = self.head.take()?;
        let missing = if head.left <= self.rate * super::NEAR_US {
            0
        } else {
            head.left.ceil() as u128
        };
        let cursor = head.goal.saturating_sub(missing).max(self.cursor);
        let units = cursor - self.cursor;
        self.cursor = cursor;
        self.complete += u64::from(missing == 0);
        Some(Ended {
            target: head.launch.target,
            submitted_ns: head.launch.submitted_ns,
            device_us: (now_ns - head.started_ns) as f64 / 1000.0,
            units,
        })
    }

    pub(super) fn raise_stop(&mut self, latency_us: f64) {
        let looks = self.workload.as_ref().is_some_and(|w| looks(w.form));
        self.stop = true;
        if looks && let Some(head) = &mut self.head {
            head.stop_left_us.get_or_insert(latency_us);
        }
    }

    pub(super) fn lower_stop(&mut self) {
        self.stop = false;
        if let Some(head) = &mut self.head {
            head.stop_left_us = None;
        }
    }

    /// Drops everything; says whether it was whole before.
    pub(super) fn fail(&mut self, error: &EngineError) -> bool {
        self.head = None;
        self.waiting.clear();
        self.client.lose_groups();
        self.allocated = 0;
        self.overhead = 0;
        self.broken.replace(error.clone()).is_none()
    }
}
