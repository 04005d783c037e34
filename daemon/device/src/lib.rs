//! What the service asks of a host with GPUs.
//!
//! Small traits, one a mechanism, and one error enum. The real host is
//! `gcgroup-device-nvidia`, the simulated one `gcgroup-device-sim`; nothing
//! above this crate knows which of them it talks to. All calls may block and
//! are made from lanes or from threads of their own, never from the controller.

mod channels;
mod counters;

use std::path::Path;

use thiserror::Error;

pub use channels::{ChannelSet, Channels, ClientMark, Handle, Search, Timeslices};
pub use counters::{Counters, LaunchCounter, Launches};

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
    /// The process lives, but has nothing on this GPU that could be controlled
    /// now; it may have again, as after a restore from a checkpoint.
    #[error("{0}")]
    NoContext(String),
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

    /// The processes that compute on one GPU, each once, in no order. Those that
    /// only draw are left out.
    ///
    /// # Errors
    /// [`DeviceError::NoGpu`] when it was lost.
    fn processes(&self, gpu: &GpuInfo) -> Result<Vec<GpuProcess>, DeviceError>;
}

/// A process that computes on a GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpuProcess {
    /// Thread-group id in the service's pid namespace.
    pub pid: u32,
    /// What it is to the driver.
    pub kind: ProcessKind,
    /// Device memory it uses, its context included, bytes; `None` where the
    /// driver does not say.
    pub memory_bytes: Option<u64>,
}

/// What a process on a GPU is to the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProcessKind {
    /// A program with channels of its own.
    Program,
    /// An MPS server; its channel groups hold the work of all its clients.
    MpsServer,
    /// A client of an MPS server, without channel groups of its own.
    MpsClient,
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

/// A host with GPUs.
pub trait Host: Telemetry + Mps + Channels + Counters {
    /// One line for people: which host this is, with its driver's version.
    fn describe(&self) -> String;

    /// What a worker's engine opens to reach this GPU. Opaque up here.
    fn worker_address(&self, gpu: &GpuInfo) -> String;
}
