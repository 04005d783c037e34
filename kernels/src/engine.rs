//! What a worker needs of a GPU.
//!
//! A launch is cumulative: it names the number of units that each block shall
//! have done when it is complete, counted from the start of the workload. A
//! block that was stopped goes on from its own cursor when the launch is
//! submitted again, and a block that is already there returns at once. So a
//! stop loses nothing and repeats nothing, and launches queued behind a stopped
//! one may simply be submitted again in their order.

use std::os::fd::BorrowedFd;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// A kernel with its parameters, every one of them decided.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Name in the catalogue.
    pub kernel: String,
    /// Independent chains of operations in each thread, 1 to 4; 1 where the
    /// kernel has no such parameter.
    pub ilp: u32,
    /// Thread blocks.
    pub blocks: u32,
    /// Threads in a block.
    pub threads: u32,
    /// Bytes of the copies, both buffers together: of the whole buffers for
    /// `copy`, of one block's slices for `copy_per_block`, 0 for others.
    pub bytes: u64,
    /// Whether a launch can be stopped in its middle.
    pub form: Form,
}

/// Which of a kernel's two forms runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Form {
    /// Looks at the stop flag between chunks of units.
    Sliced,
    /// Runs to its end.
    Uncut,
}

/// The device as a worker sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// Streaming multiprocessors.
    pub sm_count: u32,
    /// SMs of each group that a partition can own, by group number. All are
    /// equal but the last, which may be a smaller remainder.
    pub groups: Vec<u32>,
    /// Device memory in bytes.
    pub memory_bytes: u64,
    /// Whether SM groups can be given to a context.
    pub green_contexts: bool,
    /// Least important stream priority, 0 on the GPUs that were looked at.
    pub stream_priority_least: i32,
    /// Most important stream priority, -5 on Hopper.
    pub stream_priority_greatest: i32,
    /// Version of the CUDA driver interface, as 13000 for 13.0.
    pub driver_version: u32,
}

/// Where and how important the workload's stream is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placement {
    /// Numbers of the SM groups, or `None` for the whole device.
    pub groups: Option<Vec<u32>>,
    /// CUDA stream priority; lower is more important.
    pub stream_priority: i32,
}

/// What [`Engine::prepare`] took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prepared {
    /// Device memory of the workload's buffers in bytes, in whole pages of the
    /// device (2 MiB on a real one).
    pub buffer_bytes: u64,
    /// Device memory of the context beyond them in bytes, where it is known.
    pub context_bytes: Option<u64>,
    /// Units that make one iteration: 1, or the steps of one sweep of a copy.
    pub units_per_iteration: u64,
}

/// A launch that ended, completely or because of a stop.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Completion {
    /// Target it was submitted with, in units.
    pub target: u64,
    /// When it was submitted, CLOCK_MONOTONIC nanoseconds.
    pub submitted_ns: u64,
    /// When the host saw that it had ended, CLOCK_MONOTONIC nanoseconds.
    pub seen_ns: u64,
    /// Time it was resident on the device, microseconds. For back-to-back
    /// launches counted from the end of the one before.
    pub device_us: f64,
}

/// Where the blocks of the workload are, read while nothing is in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Units of the block that did the least.
    pub least: u64,
    /// Units of the block that did the most.
    pub most: u64,
    /// Units of all blocks together.
    pub total: u128,
}

/// Result of comparing the device's results with the CPU reference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verified {
    /// Values that were compared.
    pub compared: u64,
    /// Values that differed.
    pub wrong: u64,
}

/// Why the GPU did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, Error, Serialize, Deserialize)]
pub enum EngineError {
    /// There is no driver, or not this GPU.
    #[error("no GPU to work on: {0}")]
    NoDevice(String),
    /// This driver or GPU cannot do it; asking again is useless.
    #[error("not supported here: {0}")]
    Unsupported(String),
    /// Not enough device memory.
    #[error("not enough device memory: {requested} bytes wanted, {free} free")]
    NoMemory {
        /// Bytes asked for.
        requested: u64,
        /// Bytes free when asked.
        free: u64,
    },
    /// No further client fits into the MPS server.
    #[error("the MPS server takes no further client: {0}")]
    NoSlot(String),
    /// The workload is over; nothing more can be asked of it.
    #[error("the workload has ended")]
    Ended,
    /// The context is broken; the worker must end.
    #[error("the GPU failed: {0}")]
    Failed(String),
}

/// A GPU as one worker uses it. All calls come from one thread.
///
/// Nothing here waits for a kernel except where it says so: ends of launches
/// make [`Engine::wait_fd`] readable and [`Engine::poll`] reports them.
pub trait Engine {
    /// The device as it is.
    fn facts(&self) -> &Facts;

    /// Loads the kernel and makes its buffers and cursors; called once, first.
    ///
    /// # Errors
    /// [`EngineError::NoMemory`] where the buffers do not fit.
    fn prepare(&mut self, plan: &Plan) -> Result<Prepared, EngineError>;

    /// Makes the stream that launches go to from now on. Called only while
    /// nothing is in flight. On an error the former placement stays in force.
    ///
    /// # Errors
    /// [`EngineError::Unsupported`] without green contexts.
    fn place(&mut self, placement: &Placement) -> Result<u32, EngineError>;

    /// Submits a launch that is complete when each block has done `target`
    /// units since the workload began. `poll_units` is how many units a sliced
    /// kernel does between two looks at the stop flag; ignored by an uncut one.
    ///
    /// # Errors
    /// Those of the driver.
    fn submit(&mut self, target: u64, poll_units: u32) -> Result<(), EngineError>;

    /// The next launch that ended, in the order of submission. Cheap enough to
    /// be called in a loop.
    ///
    /// # Errors
    /// [`EngineError::Failed`] when a kernel faulted.
    fn poll(&mut self) -> Result<Option<Completion>, EngineError>;

    /// A descriptor that is readable when [`Engine::poll`] may have something.
    /// `poll` clears it.
    fn wait_fd(&self) -> BorrowedFd<'_>;

    /// Raises the stop flag: what is in flight ends soon, a sliced kernel at its
    /// next look, an uncut one at its end. Sliced launches submitted later end at
    /// once; uncut ones never look and must not be submitted.
    ///
    /// # Errors
    /// Those of the driver.
    fn raise_stop(&mut self) -> Result<(), EngineError>;

    /// Lowers the stop flag. Launches submitted after this run.
    ///
    /// # Errors
    /// Those of the driver.
    fn lower_stop(&mut self) -> Result<(), EngineError>;

    /// Where the blocks are. Called only while nothing is in flight.
    ///
    /// # Errors
    /// Those of the driver.
    fn progress(&mut self) -> Result<Progress, EngineError>;

    /// Compares results on the device with the CPU reference on some lanes of
    /// some blocks. Called only while nothing is in flight; the time it takes
    /// grows with the units done.
    ///
    /// # Errors
    /// Those of the driver.
    fn verify(&mut self) -> Result<Verified, EngineError>;

    /// Nanoseconds of the clock that [`Completion`] is stamped with.
    fn now_ns(&self) -> u64;
}

impl<T: Engine + ?Sized> Engine for Box<T> {
    fn facts(&self) -> &Facts {
        (**self).facts()
    }

    fn prepare(&mut self, plan: &Plan) -> Result<Prepared, EngineError> {
        (**self).prepare(plan)
    }

    fn place(&mut self, placement: &Placement) -> Result<u32, EngineError> {
        (**self).place(placement)
    }

    fn submit(&mut self, target: u64, poll_units: u32) -> Result<(), EngineError> {
        (**self).submit(target, poll_units)
    }

    fn poll(&mut self) -> Result<Option<Completion>, EngineError> {
        (**self).poll()
    }

    fn wait_fd(&self) -> BorrowedFd<'_> {
        (**self).wait_fd()
    }

    fn raise_stop(&mut self) -> Result<(), EngineError> {
        (**self).raise_stop()
    }

    fn lower_stop(&mut self) -> Result<(), EngineError> {
        (**self).lower_stop()
    }

    fn progress(&mut self) -> Result<Progress, EngineError> {
        (**self).progress()
    }

    fn verify(&mut self) -> Result<Verified, EngineError> {
        (**self).verify()
    }

    fn now_ns(&self) -> u64 {
        (**self).now_ns()
    }
}
