//! What NVML's errors mean to the caller.

use gcgroup_device::DeviceError;
use nvml_wrapper::error::NvmlError;

/// An error of opening NVML. Whatever is wrong there may be right later, except
/// for a lack of permission.
pub(crate) fn of_open(error: NvmlError) -> DeviceError {
    match error {
        NvmlError::NoPermission => DeviceError::Denied(error.to_string()),
        other => DeviceError::NoDriver(other.to_string()),
    }
}

/// An error of a call that is not about one GPU.
pub(crate) fn of_host(error: NvmlError) -> DeviceError {
    match error {
        NvmlError::Uninitialized
        | NvmlError::DriverNotLoaded
        | NvmlError::LibraryNotFound
        | NvmlError::LibRmVersionMismatch
        | NvmlError::LibloadingError(_) => DeviceError::NoDriver(error.to_string()),
        NvmlError::NoPermission => DeviceError::Denied(error.to_string()),
        NvmlError::NotSupported
        | NvmlError::FunctionNotFound
        | NvmlError::FailedToLoadSymbol(_) => DeviceError::Unsupported(error.to_string()),
        other => DeviceError::Failed(format!("NVML: {other}")),
    }
}

/// An error of a call on the GPU with this index.
pub(crate) fn of_gpu(index: u32) -> impl Fn(NvmlError) -> DeviceError {
    move |error| match error {
        NvmlError::GpuLost | NvmlError::ResetRequired => DeviceError::NoGpu(index),
        other => of_host(other),
    }
}

/// An error of looking the GPU up. NVML calls a UUID that it does not know
/// invalid or not found, by version.
pub(crate) fn of_lookup(index: u32) -> impl Fn(NvmlError) -> DeviceError {
    move |error| match error {
        NvmlError::NotFound | NvmlError::InvalidArg => DeviceError::NoGpu(index),
        other => of_gpu(index)(other),
    }
}
