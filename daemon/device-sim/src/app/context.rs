//! One context of the program, and the launches that it keeps in flight there.

use std::os::fd::BorrowedFd;
use std::path::Path;

use gcgroup_kernels::engine::{Engine, EngineError, Form, Plan};

use super::command::Place;
use crate::cost::Cost;
use crate::engine::SimEngine;
use crate::wire::OpenAs;

/// Launches that are kept in flight, so that the GPU is never without one.
const DEPTH: u64 = 2;

/// Ends of launches that are taken before others have their turn.
const BATCH: u32 = 64;

/// What a context has done.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts {
    /// Launches, graphs included.
    pub(super) launched: u64,
    /// Launches of graphs.
    pub(super) graphs: u64,
    /// Launches that ended.
    pub(super) ended: u64,
}

impl Counts {
    pub(super) fn add(&mut self, other: &Self) {
        self.launched += other.launched;
        self.graphs += other.graphs;
        self.ended += other.ended;
    }
}

pub(super) struct Context {
    engine: SimEngine,
    /// Units of one kernel.
    units: u64,
    pub(super) counts: Counts,
}

impl Context {
    /// Opens a GPU, as what the environment says where nothing else is said, and
    /// prepares kernels that last so many microseconds on SMs of their own.
    pub(super) fn open(
        socket: &Path,
        gpu: u32,
        open_as: Option<OpenAs>,
        kernel_us: u64,
    ) -> Result<Self, EngineError> {
        let mut engine = match open_as {
            Some(open_as) => SimEngine::open_as(socket, gpu, open_as)?,
            None => SimEngine::open(socket, gpu)?,
        };
        // A foreign program knows nothing of stop flags.
        let plan = Plan {
            kernel: "fma_fp32".to_owned(),
            ilp: 4,
            blocks: engine.facts().sm_count,
            threads: 1024,
            bytes: 0,
            form: Form::Uncut,
        };
        engine.prepare(&plan)?;
        Ok(Self {
            engine,
            units: units_of(&plan, kernel_us)?,
            counts: Counts::default(),
        })
    }

    /// Takes the ends of launches and keeps others in flight.
    pub(super) fn turn(&mut self, launches: bool) -> Result<(), EngineError> {
        for _ in 0..BATCH {
            while launches && self.counts.launched - self.counts.ended < DEPTH {
                let target = self.next_target();
                self.engine.submit(target, 0)?;
                self.counts.launched += 1;
            }
            if self.engine.poll()?.is_none() {
                break;
            }
            self.counts.ended += 1;
        }
        Ok(())
    }

    pub(super) fn launch_graphs(&mut self, count: u64) -> Result<(), EngineError> {
        for _ in 0..count {
            let target = self.next_target();
            self.engine.submit_graph(target)?;
            self.counts.launched += 1;
            self.counts.graphs += 1;
        }
        self.arrive()
    }

    /// Returns when the driver has seen every launch: it answers in turn.
    pub(super) fn arrive(&mut self) -> Result<(), EngineError> {
        self.engine.progress().map(drop)
    }

    pub(super) fn allocate(&mut self, bytes: u64) -> Result<(), EngineError> {
        self.engine.allocate(bytes)
    }

    pub(super) fn add_group(&mut self, place: Place) -> Result<(), EngineError> {
        self.go_to(place)?;
        self.engine.add_group()
    }

    pub(super) fn add_channel(&mut self, place: Place) -> Result<(), EngineError> {
        self.go_to(place)?;
        self.engine.add_channel()
    }

    fn go_to(&mut self, place: Place) -> Result<(), EngineError> {
        match place {
            Place::Next => Ok(()),
            Place::Far => self.engine.skip_handles(),
        }
    }

    pub(super) fn remove_group(&mut self) -> Result<(), EngineError> {
        self.engine.remove_group()
    }

    pub(super) fn close(self) -> Result<(), EngineError> {
        self.engine.close()
    }

    /// Readable when a launch has ended.
    pub(super) fn wait_fd(&self) -> BorrowedFd<'_> {
        self.engine.wait_fd()
    }

    fn next_target(&self) -> u64 {
        (self.counts.launched + 1).saturating_mul(self.units)
    }
}

/// Units of a kernel that lasts so long on SMs that nobody else uses.
fn units_of(plan: &Plan, kernel_us: u64) -> Result<u64, EngineError> {
    let cost = Cost::of(plan)
        .ok_or_else(|| EngineError::Unsupported(format!("no kernel {:?}", plan.kernel)))?;
    Ok(((kernel_us.max(1) as f64 * cost.share / cost.sm_us) as u64).max(1))
}
