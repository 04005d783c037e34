//! GPUs and their figures, through NVML.
//!
//! NVML is safe to call from several threads. What must be kept between two
//! samples is kept per GPU, so that one slow GPU holds up no other. Lock order:
//! the table of GPUs is released before a GPU's own state is locked.

mod gpm;
mod processes;
mod xid;

use std::collections::HashMap;
use std::sync::Arc;

use gcgroup_device::{DeviceError, GpuInfo, GpuProcess, GpuSample};
use nvml_wrapper::enum_wrappers::device::{Clock, GpuVirtualizationMode, TemperatureSensor};
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::{Device, Nvml};
use parking_lot::Mutex;

use self::gpm::GpmReader;
use self::processes::Kinds;
use self::xid::XidCounter;
use crate::error::{of_gpu, of_host, of_lookup};

/// Clocks come in megahertz.
const HERTZ_PER_MEGAHERTZ: u64 = 1_000_000;

#[derive(Debug)]
pub(crate) struct NvmlTelemetry {
    nvml: Arc<Nvml>,
    /// By UUID.
    gpm: Mutex<HashMap<String, Arc<Mutex<GpmReader>>>>,
    xids: XidCounter,
    kinds: Kinds,
}

impl NvmlTelemetry {
    pub(crate) fn new(nvml: Arc<Nvml>) -> Self {
        Self {
            xids: XidCounter::start(&nvml),
            gpm: Mutex::default(),
            kinds: Kinds::default(),
            nvml,
        }
    }

    pub(crate) fn gpu_count(&self) -> Result<u32, DeviceError> {
        self.nvml.device_count().map_err(of_host)
    }

    pub(crate) fn gpus(&self) -> Result<Vec<GpuInfo>, DeviceError> {
        let mut gpus = Vec::new();
        for index in 0..self.gpu_count()? {
            let info = self.nvml.device_by_index(index).and_then(|device| {
                Ok(GpuInfo {
                    index,
                    uuid: device.uuid()?,
                    name: device.name()?,
                    memory_bytes: device.memory_info()?.total,
                    refused: refusal(&device)?,
                })
            });
            match info {
                Ok(info) => gpus.push(info),
                // A GPU that fell off the bus must not hide the others.
                Err(error) => match of_gpu(index)(error) {
                    none @ DeviceError::NoDriver(_) => return Err(none),
                    other => tracing::warn!(gpu = index, error = %other, "GPU is left out"),
                },
            }
        }
        Ok(gpus)
    }

    /// The number in the name of the GPU's device, 3 for /dev/nvidia3.
    pub(crate) fn minor(&self, gpu: &GpuInfo) -> Result<u32, DeviceError> {
        self.nvml
            .device_by_uuid(gpu.uuid.as_str())
            .map_err(of_lookup(gpu.index))?
            .minor_number()
            .map_err(of_gpu(gpu.index))
    }

    /// The processes with a compute context, the clients of MPS servers among
    /// them.
    pub(crate) fn processes(&self, gpu: &GpuInfo) -> Result<Vec<GpuProcess>, DeviceError> {
        let device = self
            .nvml
            .device_by_uuid(gpu.uuid.as_str())
            .map_err(of_lookup(gpu.index))?;
        let computing = device
            .running_compute_processes()
            .map_err(of_gpu(gpu.index))?;
        // Absent from some drivers, and short of room when a client comes just
        // then: it is asked again within a moment.
        let clients = known(device.mps_running_compute_processes()).map_err(of_gpu(gpu.index))?;
        Ok(self
            .kinds
            .of(&gpu.uuid, &computing, &clients.unwrap_or_default()))
    }

    pub(crate) fn sample(&self, gpu: &GpuInfo) -> Result<GpuSample, DeviceError> {
        let device = self
            .nvml
            .device_by_uuid(gpu.uuid.as_str())
            .map_err(of_lookup(gpu.index))?;
        let memory = device.memory_info().map_err(of_gpu(gpu.index))?;
        let utilization = self.utilization(&device, gpu).map_err(of_gpu(gpu.index))?;
        Ok(GpuSample {
            memory_used: memory.used,
            utilization,
            xids: self.xids.count(&gpu.uuid),
        })
    }

    /// The lines of utilization.stat in the interface's order.
    fn utilization(
        &self,
        device: &Device<'_>,
        gpu: &GpuInfo,
    ) -> Result<Vec<(&'static str, u64)>, NvmlError> {
        let mut lines = Vec::with_capacity(13);
        if let Some(rates) = known(device.utilization_rates())? {
            lines.push(("gpu_percent", rates.gpu.into()));
            lines.push(("memory_percent", rates.memory.into()));
        }
        let reader = Arc::clone(self.gpm.lock().entry(gpu.uuid.clone()).or_default());
        lines.extend(reader.lock().read(&self.nvml, &gpu.uuid)?);
        if let Some(milliwatt) = known(device.power_usage())? {
            lines.push(("power_milliwatt", milliwatt.into()));
        }
        if let Some(celsius) = known(device.temperature(TemperatureSensor::Gpu))? {
            lines.push(("temperature_celsius", celsius.into()));
        }
        for (key, clock) in [
            ("sm_clock_hertz", Clock::SM),
            ("memory_clock_hertz", Clock::Memory),
        ] {
            if let Some(megahertz) = known(device.clock_info(clock))? {
                lines.push((key, u64::from(megahertz) * HERTZ_PER_MEGAHERTZ));
            }
        }
        if let Some(reasons) = known(device.current_throttle_reasons())? {
            lines.push(("throttle_reasons", reasons.bits()));
        }
        Ok(lines)
    }
}

/// Drops a figure that this GPU or this driver does not have. Only what says
/// that the GPU or the driver is gone remains an error, since one figure less
/// is better than none at all.
fn known<T>(figure: Result<T, NvmlError>) -> Result<Option<T>, NvmlError> {
    match figure {
        Ok(value) => Ok(Some(value)),
        Err(
            error @ (NvmlError::GpuLost
            | NvmlError::ResetRequired
            | NvmlError::Uninitialized
            | NvmlError::DriverNotLoaded
            | NvmlError::LibRmVersionMismatch),
        ) => Err(error),
        Err(_) => Ok(None),
    }
}

/// Why this GPU is not managed. A MIG instance has its own channels, figures
/// and MPS server, and a vGPU's scheduling belongs to the hypervisor.
fn refusal(device: &Device<'_>) -> Result<Option<String>, NvmlError> {
    // NVML_DEVICE_MIG_ENABLE is 1 (nvml.h).
    if known(device.mig_mode())?.is_some_and(|mode| mode.current == 1) {
        return Ok(Some("MIG mode is enabled".to_owned()));
    }
    let refused = match known(device.virtualization_mode())? {
        Some(GpuVirtualizationMode::Vgpu) => Some("a vGPU"),
        Some(GpuVirtualizationMode::HostVgpu | GpuVirtualizationMode::HostVsga) => {
            Some("shared out as vGPUs")
        }
        Some(GpuVirtualizationMode::Bare | GpuVirtualizationMode::PassThrough) | None => None,
    };
    Ok(refused.map(str::to_owned))
}
