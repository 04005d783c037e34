//! The host that the service works on: the real one, waited for until there is
//! a driver, or a simulated one in a process of its own.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, OnceLock};

use anyhow::{Context, Result};
use gcgroup_device::{
    ChannelSet, Channels, ClientMark, Counters, DeviceError, GpuInfo, GpuProcess, GpuSample, Host,
    LaunchCounter, Mps, MpsServer, Search, Telemetry, Timeslices,
};
use gcgroup_device_nvidia::{NvidiaHost, Options};
use gcgroup_device_sim::SimHost;
use parking_lot::Mutex;

/// A host that may not be there yet.
pub(crate) struct Awaited {
    opening: Mutex<()>,
    found: OnceLock<Arc<dyn Host>>,
    /// Opens it, again and again until it is there.
    open: Box<dyn Fn() -> Result<Arc<dyn Host>, DeviceError> + Send + Sync>,
}

impl Awaited {
    /// The real host; `any_driver_branch` lets channel control try a driver whose
    /// layouts were not compared.
    pub(crate) fn nvidia(any_driver_branch: bool) -> Self {
        let options = Options { any_driver_branch };
        Self::new(move || Ok(Arc::new(NvidiaHost::open_with(options)?)))
    }

    fn new(open: impl Fn() -> Result<Arc<dyn Host>, DeviceError> + Send + Sync + 'static) -> Self {
        Self {
            opening: Mutex::new(()),
            found: OnceLock::new(),
            open: Box::new(open),
        }
    }

    /// The simulated host of a state directory; its process is started if none
    /// runs there.
    ///
    /// # Errors
    /// Those of starting the process.
    pub(crate) fn simulated(state: &Path, gpus: u32) -> Result<Self> {
        start_sim(state, gpus)?;
        let socket = state.join(gcgroup_device_sim::SOCKET_NAME);
        Ok(Self::new(move || Ok(Arc::new(SimHost::open(&socket)?))))
    }

    /// The host, opened now if it was not before.
    ///
    /// # Errors
    /// [`DeviceError::NoDriver`] while there is none.
    pub(crate) fn get(&self) -> Result<&Arc<dyn Host>, DeviceError> {
        if let Some(found) = self.found.get() {
            return Ok(found);
        }
        // Opened once, however many ask at the same time.
        let _one = self.opening.lock();
        if let Some(found) = self.found.get() {
            return Ok(found);
        }
        let opened = (self.open)()?;
        tracing::info!(host = opened.describe(), "host found");
        Ok(self.found.get_or_init(|| opened))
    }
}

/// Starts the simulated host as a process that outlives this one. It ends by
/// itself after its last client; where one serves the directory already, the new
/// one notices and ends at once.
fn start_sim(state: &Path, gpus: u32) -> Result<()> {
    let mut child = Command::new("/proc/self/exe")
        .arg0("gcgroupd-sim-gpu")
        .arg("sim-gpu")
        .arg("--state")
        .arg(state)
        .arg("--gpus")
        .arg(gpus.to_string())
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .process_group(0)
        .spawn()
        .context("cannot start the simulated GPU")?;
    // Reaped whenever it ends; the service does not wait for it.
    std::thread::spawn(move || child.wait());
    Ok(())
}

impl Telemetry for Awaited {
    fn gpus(&self) -> Result<Vec<GpuInfo>, DeviceError> {
        self.get()?.gpus()
    }

    fn sample(&self, gpu: &GpuInfo) -> Result<GpuSample, DeviceError> {
        self.get()?.sample(gpu)
    }

    fn processes(&self, gpu: &GpuInfo) -> Result<Vec<GpuProcess>, DeviceError> {
        self.get()?.processes(gpu)
    }
}

impl Mps for Awaited {
    fn slots(&self) -> Result<u32, DeviceError> {
        self.get()?.slots()
    }

    fn orders_streams(&self) -> Result<(), DeviceError> {
        self.get()?.orders_streams()
    }

    fn start(&self, gpu: &GpuInfo, directory: &Path) -> Result<Box<dyn MpsServer>, DeviceError> {
        self.get()?.start(gpu, directory)
    }
}

impl Channels for Awaited {
    fn mark(&self) -> Result<ClientMark, DeviceError> {
        self.get()?.mark()
    }

    fn list(&self, pid: u32, gpu: &GpuInfo, search: Search) -> Result<ChannelSet, DeviceError> {
        self.get()?.list(pid, gpu, search)
    }

    fn timeslices(&self, set: &ChannelSet) -> Result<Timeslices, DeviceError> {
        self.get()?.timeslices(set)
    }

    fn set_timeslice(&self, set: &ChannelSet, usec: u64) -> Result<Timeslices, DeviceError> {
        self.get()?.set_timeslice(set, usec)
    }

    fn stop(&self, gpu: &GpuInfo, sets: &[ChannelSet]) -> Result<(), DeviceError> {
        self.get()?.stop(gpu, sets)
    }

    fn resume(&self, gpu: &GpuInfo, sets: &[ChannelSet]) -> Result<(), DeviceError> {
        self.get()?.resume(gpu, sets)
    }
}

impl Counters for Awaited {
    fn count_launches(&self, pid: u32) -> Result<Box<dyn LaunchCounter>, DeviceError> {
        self.get()?.count_launches(pid)
    }
}

impl Host for Awaited {
    fn describe(&self) -> String {
        match self.get() {
            Ok(host) => host.describe(),
            Err(error) => error.to_string(),
        }
    }

    fn worker_address(&self, gpu: &GpuInfo) -> String {
        // A GPU is known only once the host is.
        self.get()
            .map(|host| host.worker_address(gpu))
            .unwrap_or_default()
    }
}
