//! The real host: NVIDIA GPUs under the stock driver.
//!
//! Four mechanisms, a module each: `telemetry` reads figures through NVML,
//! `mps` runs a private MPS control daemon as a child, `channels` reaches
//! another process's channels through the resource manager's own control calls,
//! and `counters` counts what another process launches. None of them needs a
//! changed driver or a preloaded library.
//!
//! `unsafe` stands in `channels/rm.rs` (ioctls), `counters/perf.rs` (a system
//! call without a wrapper) and `telemetry/gpm.rs` (a sample that outlives the
//! borrow NVML's wrapper gives it), nowhere else.

mod channels;
mod counters;
mod error;
mod mps;
mod process;
mod telemetry;

use std::path::Path;
use std::sync::Arc;

use gcgroup_device::{
    ChannelSet, Channels, ClientMark, Counters, DeviceError, GpuInfo, GpuProcess, GpuSample, Host,
    LaunchCounter, Mps, MpsServer, Search, Telemetry, Timeslices,
};
use nvml_wrapper::Nvml;

use crate::channels::DriverChannels;
pub use crate::channels::find::Object;
use crate::channels::layout::Unknown;
pub use crate::channels::search::LookupCost;
pub use crate::counters::{can_count, remove_probes};
use crate::mps::Program;
pub use crate::mps::orphan::{Orphan, end_orphan};
use crate::telemetry::NvmlTelemetry;

/// What the configuration decides about the real host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Whether channel control takes a driver newer than the newest known branch
    /// for that branch. The control interface is not a stable one: a changed call
    /// may do something else.
    pub any_driver_branch: bool,
}

/// A host whose driver answered. Dropping it closes NVML, so that the driver
/// can be unloaded.
#[derive(Debug)]
pub struct NvidiaHost {
    telemetry: NvmlTelemetry,
    channels: DriverChannels,
    driver_version: String,
    cuda_version: CudaVersion,
}

impl NvidiaHost {
    /// Opens NVML by its usual name.
    ///
    /// # Errors
    /// [`DeviceError::NoDriver`] where there is no library or no driver behind
    /// it; [`DeviceError::Denied`] where this service may not talk to it.
    pub fn open() -> Result<Self, DeviceError> {
        Self::open_with(Options::default())
    }

    /// The same with what the configuration decides.
    ///
    /// # Errors
    /// As [`NvidiaHost::open`].
    pub fn open_with(options: Options) -> Result<Self, DeviceError> {
        Self::with_nvml(Nvml::init().map_err(error::of_open)?, options)
    }

    /// Opens the NVML library at `library`, for hosts that keep it where the
    /// loader does not look.
    ///
    /// # Errors
    /// As [`NvidiaHost::open`].
    pub fn open_library(library: &Path, options: Options) -> Result<Self, DeviceError> {
        let nvml = Nvml::builder().lib_path(library.as_os_str()).init();
        Self::with_nvml(nvml.map_err(error::of_open)?, options)
    }

    fn with_nvml(nvml: Nvml, options: Options) -> Result<Self, DeviceError> {
        let unknown = if options.any_driver_branch {
            Unknown::TakeNewer
        } else {
            Unknown::Refuse
        };
        let driver_version = nvml.sys_driver_version().map_err(error::of_open)?;
        let cuda_version =
            CudaVersion::from_nvml(nvml.sys_cuda_driver_version().map_err(error::of_open)?);
        Ok(Self {
            telemetry: NvmlTelemetry::new(Arc::new(nvml)),
            channels: DriverChannels::new(&driver_version, unknown),
            driver_version,
            cuda_version,
        })
    }

    /// Every object of the driver clients of a process, each with the handle of
    /// its client, for people who look at an unknown driver.
    ///
    /// # Errors
    /// As [`Channels::list`].
    pub fn inventory(
        &self,
        pid: u32,
        gpu: &GpuInfo,
        search: Search,
    ) -> Result<Vec<(u32, Object)>, DeviceError> {
        self.channels.inventory(pid, gpu, search)
    }

    /// What looking processes up has cost so far.
    #[must_use]
    pub fn lookup_cost(&self) -> LookupCost {
        self.channels.cost()
    }
}

impl Telemetry for NvidiaHost {
    fn gpus(&self) -> Result<Vec<GpuInfo>, DeviceError> {
        self.telemetry.gpus()
    }

    fn sample(&self, gpu: &GpuInfo) -> Result<GpuSample, DeviceError> {
        self.telemetry.sample(gpu)
    }

    fn processes(&self, gpu: &GpuInfo) -> Result<Vec<GpuProcess>, DeviceError> {
        self.telemetry.processes(gpu)
    }
}

impl Mps for NvidiaHost {
    fn slots(&self) -> Result<u32, DeviceError> {
        Program::find()?;
        Ok(self.cuda_version.mps_clients())
    }

    /// They do, since Volta's MPS: on an H200 (driver 580) the blocks of a client
    /// at -5 that wait for room came before those of one at 0, so that two clients
    /// with more blocks than fit shared 4 to 1; where all blocks are resident there
    /// is nothing to order.
    fn orders_streams(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    fn start(&self, gpu: &GpuInfo, directory: &Path) -> Result<Box<dyn MpsServer>, DeviceError> {
        let server = mps::Server::start(Program::find()?, &gpu.uuid, directory)?;
        Ok(Box::new(server))
    }
}

impl Channels for NvidiaHost {
    fn mark(&self) -> Result<ClientMark, DeviceError> {
        self.channels.mark()
    }

    fn list(&self, pid: u32, gpu: &GpuInfo, search: Search) -> Result<ChannelSet, DeviceError> {
        self.channels.list(pid, gpu, search)
    }

    fn timeslices(&self, set: &ChannelSet) -> Result<Timeslices, DeviceError> {
        self.channels.timeslices(set)
    }

    fn set_timeslice(&self, set: &ChannelSet, usec: u64) -> Result<Timeslices, DeviceError> {
        self.channels.set_timeslice(set, usec)
    }

    fn stop(&self, gpu: &GpuInfo, sets: &[ChannelSet]) -> Result<(), DeviceError> {
        let minor = || self.telemetry.minor(gpu);
        self.channels.stop(gpu, &minor, sets)
    }

    fn resume(&self, gpu: &GpuInfo, sets: &[ChannelSet]) -> Result<(), DeviceError> {
        let minor = || self.telemetry.minor(gpu);
        self.channels.resume(gpu, &minor, sets)
    }
}

impl Counters for NvidiaHost {
    fn count_launches(&self, pid: u32) -> Result<Box<dyn LaunchCounter>, DeviceError> {
        counters::count_launches(pid)
    }
}

impl Host for NvidiaHost {
    fn describe(&self) -> String {
        format!(
            "NVIDIA driver {}, CUDA {}",
            self.driver_version, self.cuda_version
        )
    }

    fn worker_address(&self, gpu: &GpuInfo) -> String {
        format!("cuda:{}", gpu.uuid)
    }
}

/// The newest CUDA that the driver serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct CudaVersion {
    major: u32,
    minor: u32,
}

impl CudaVersion {
    /// NVML writes 13.1 as 13010.
    fn from_nvml(version: i32) -> Self {
        let version = version.unsigned_abs();
        Self {
            major: version / 1000,
            minor: version % 1000 / 10,
        }
    }

    /// Client contexts of one server on one GPU, while the clients keep the
    /// default of CUDA_DEVICE_MAX_CONNECTIONS (the MPS guide's table of limits:
    /// 60 from CUDA 13.1 on, 48 before).
    fn mps_clients(self) -> u32 {
        const FIRST_WITH_60: CudaVersion = CudaVersion {
            major: 13,
            minor: 1,
        };
        if self >= FIRST_WITH_60 { 60 } else { 48 }
    }
}

impl std::fmt::Display for CudaVersion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cuda_versions_are_read_from_nvml_numbers() {
        assert_eq!(CudaVersion::from_nvml(13000).to_string(), "13.0");
        assert_eq!(CudaVersion::from_nvml(12080).to_string(), "12.8");
        assert_eq!(CudaVersion::from_nvml(13010).to_string(), "13.1");
    }

    #[test]
    fn clients_of_an_mps_server_follow_the_cuda_version() {
        let clients = |version| CudaVersion::from_nvml(version).mps_clients();
        assert_eq!(clients(12090), 48);
        assert_eq!(clients(13000), 48);
        assert_eq!(clients(13010), 60);
        assert_eq!(clients(14000), 60);
    }
}
