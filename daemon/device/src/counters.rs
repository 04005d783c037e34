//! Counting what processes of others launch.

use crate::DeviceError;

/// Launches of one process since its counting began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Launches {
    /// Calls that handed work to the GPU; a graph counts as one.
    pub total: u64,
    /// How many of them were graphs.
    pub graphs: u64,
}

/// Counts launches of processes that were not started for it.
pub trait Counters: Send + Sync {
    /// Begins to count what the threads of a process launch, those that it has
    /// and those that it will have, but not what other processes do that it
    /// starts.
    ///
    /// # Errors
    /// [`DeviceError::Unsupported`] with the reason where the kernel or this host
    /// cannot, [`DeviceError::Denied`], [`DeviceError::NoProcess`].
    fn count_launches(&self, pid: u32) -> Result<Box<dyn LaunchCounter>, DeviceError>;
}

/// Counts the launches of one process until it is dropped.
pub trait LaunchCounter: Send {
    /// Launches since the counting began.
    ///
    /// # Errors
    /// [`DeviceError::NoProcess`] when it ended.
    fn read(&mut self) -> Result<Launches, DeviceError>;
}
