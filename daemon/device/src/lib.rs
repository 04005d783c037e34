//! What the service asks of a host with GPUs.
//!
//! Small traits, one a mechanism, and one error enum. The real host is
//! `gcgroup-device-nvidia`, the simulated one `gcgroup-device-sim`; nothing
//! above this crate knows which of them it talks to. All calls may block and
//! are made from lanes or from threads of their own, never from the controller.

use std::path::Path;

use thiserror::Error;

/// Why a host did not do what it was asked, by what the caller can do about it.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum DeviceError {
    /// No driver answers. Worth asking again: drivers come and go.
    #[error("no usable driver: {0}")]
    NoDriver(String),
    /// This GPU is gone or never was.
    #[error("GPU {0} is gone")]
    NoGpu(u32),
    /// The process has ended.
    #[error("process {0} is gone")]
    NoProcess(u32),
    /// This host cannot do it; asking again is useless.
    #[error("{0}")]
    Unsupported(String),
    /// Not allowed for this service.
    #[error("not permitted: {0}")]
    Denied(String),
    /// It should have worked.
    #[error("{0}")]
    Failed(String),
}

/// One GPU as the host names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpuInfo {
    /// NVML index, what nvidia-smi prints.
    pub index: u32,
    /// UUID, the identity that survives a change of the index.
    pub uuid: String,
    /// Product name.
    pub name: String,
    /// Device memory in bytes.
    pub memory_bytes: u64,
    /// Why this GPU is not managed, if it is not (MIG, vGPU).
    pub refused: Option<String>,
}

/// Figures of one GPU at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GpuSample {
    /// Device memory in use, bytes.
    pub memory_used: u64,
    /// Lines of utilization.stat, in the order of the interface; only figures
    /// that this GPU has. Units are in the names.
    pub utilization: Vec<(&'static str, u64)>,
    /// Xid errors since the host was opened.
    pub xids: u64,
}

/// Reads what GPUs there are and how they fare.
pub trait Telemetry: Send + Sync {
    /// The GPUs, by index.
    ///
    /// # Errors
    /// [`DeviceError::NoDriver`] while there is none.
    fn gpus(&self) -> Result<Vec<GpuInfo>, DeviceError>;

    /// Figures of one GPU.
    ///
    /// # Errors
    /// [`DeviceError::NoGpu`] when it was lost.
    fn sample(&self, gpu: &GpuInfo) -> Result<GpuSample, DeviceError>;
}

/// The private MPS server under which workers share a GPU spatially.
pub trait Mps: Send + Sync {
    /// Clients that one server takes on one GPU.
    ///
    /// # Errors
    /// [`DeviceError::Unsupported`] with the reason where there is no MPS.
    fn slots(&self) -> Result<u32, DeviceError>;

    /// Whether the priorities of streams order the work of different clients of
    /// one server.
    ///
    /// # Errors
    /// [`DeviceError::Unsupported`] with the reason where they do not.
    fn orders_streams(&self) -> Result<(), DeviceError>;

    /// Starts a server for one GPU with its pipes in `directory`, which exists
    /// and belongs to it alone.
    ///
    /// # Errors
    /// [`DeviceError::Failed`] when it did not become ready.
    fn start(&self, gpu: &GpuInfo, directory: &Path) -> Result<Box<dyn MpsServer>, DeviceError>;
}

/// A running private MPS server.
pub trait MpsServer: Send {
    /// Variables that make a process its client.
    fn environment(&self) -> Vec<(String, String)>;

    /// Process to name in the journal, with its start time in clock ticks since
    /// boot; `None` where the server is no process of ours.
    fn process(&self) -> Option<(u32, u64)>;

    /// Whether it still serves.
    fn is_alive(&mut self) -> bool;

    /// Ends it. Its clients must have ended before.
    fn stop(self: Box<Self>);
}

/// A mark in the host's counter of driver clients: what a process opens after
/// it has been taken has a handle above it. Keeps the search for a process's
/// client short, since each wrong guess is a line in the kernel's log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientMark(pub u32);

/// The compute channel groups of a process on one GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChannelGroups {
    /// Thread-group id.
    pub pid: u32,
    /// Handle of the driver client that owns them.
    pub client: u32,
    /// Handles of the groups, in the order in which they were found.
    pub groups: Vec<u32>,
}

/// Timeslices as the driver reports them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Timeslices {
    /// Microseconds of each group of [`ChannelGroups::groups`], in its order.
    pub usec: Vec<u64>,
}

/// Control of another process's channel groups through the driver.
pub trait Channels: Send + Sync {
    /// A mark to take before a process opens the GPU.
    ///
    /// # Errors
    /// [`DeviceError::Unsupported`] for a driver whose layouts are not known.
    fn mark(&self) -> Result<ClientMark, DeviceError>;

    /// Finds the channel groups of a process that opened the GPU after `mark`.
    ///
    /// # Errors
    /// [`DeviceError::NoProcess`], [`DeviceError::Denied`], or
    /// [`DeviceError::Failed`] when it has none.
    fn find(&self, pid: u32, gpu: &GpuInfo, mark: ClientMark)
    -> Result<ChannelGroups, DeviceError>;

    /// Reads the timeslices back from the driver.
    ///
    /// # Errors
    /// As [`Channels::find`].
    fn timeslices(&self, groups: &ChannelGroups) -> Result<Timeslices, DeviceError>;

    /// Sets the timeslice of each group, in microseconds, and reads it back.
    ///
    /// # Errors
    /// As [`Channels::find`]; [`DeviceError::Failed`] when another value was
    /// read back.
    fn set_timeslice(&self, groups: &ChannelGroups, usec: u64) -> Result<Timeslices, DeviceError>;
}

/// A host with GPUs.
pub trait Host: Telemetry + Mps + Channels {
    /// One line for people: which host this is, with its driver's version.
    fn describe(&self) -> String;

    /// What a worker's engine opens to reach this GPU. Opaque up here.
    fn worker_address(&self, gpu: &GpuInfo) -> String;
}
