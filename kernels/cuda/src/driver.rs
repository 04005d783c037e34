//! The loaded driver, its errors, and its devices.

use std::ffi::{CStr, c_char, c_int, c_uint};
use std::sync::OnceLock;

use cudarc::driver::sys::{CUdevice, CUdevice_attribute, CUuuid};
use gcgroup_kernels::engine::EngineError;
use thiserror::Error;

use crate::api::{Api, GreenApi, Status, Tables};

/// CUDA_ERROR_OUT_OF_MEMORY.
pub(crate) const OUT_OF_MEMORY: Status = 2;
/// CUDA_ERROR_NOT_READY: asked without waiting, and it is still running.
pub(crate) const NOT_READY: Status = 600;

/// A call of the driver that failed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{call} returned {name} ({status})")]
pub(crate) struct DriverError {
    /// The function that was called.
    pub(crate) call: &'static str,
    /// The driver's name for the status.
    pub(crate) name: String,
    /// The CUresult; numbers as in cuda.h.
    pub(crate) status: Status,
}

impl From<DriverError> for EngineError {
    /// By what the caller would do: make room, look elsewhere, give up, wait, or end. How much
    /// memory was missing is known only where the workload's own was asked for; else it reads 0.
    fn from(error: DriverError) -> Self {
        let text = error.to_string();
        match error.status {
            OUT_OF_MEMORY => EngineError::NoMemory {
                requested: 0,
                free: 0,
            },
            // Stub library; device unavailable, absent or invalid; driver not ready or mismatched.
            34 | 46 | 100 | 101 | 802 | 803 | 804 => EngineError::NoDevice(text),
            // No binary, no JIT compiler, PTX too new, JIT disabled; symbol not found; not
            // supported; resource of a wrong type or configuration.
            209 | 221 | 222 | 223 | 500 | 801 | 914 | 915 => EngineError::Unsupported(text),
            // MPS server not ready for new clients; too many clients; too many connections.
            807..=809 => EngineError::NoSlot(text),
            _ => EngineError::Failed(text),
        }
    }
}

/// The driver of this process.
pub(crate) struct Driver {
    tables: Tables,
}

impl Driver {
    /// The driver, loaded and initialised.
    ///
    /// # Errors
    /// [`EngineError::NoDevice`] without one.
    pub(crate) fn get() -> Result<&'static Self, EngineError> {
        static DRIVER: OnceLock<Result<Driver, String>> = OnceLock::new();
        let driver = DRIVER
            .get_or_init(|| Tables::load().map(|tables| Driver { tables }))
            .as_ref()
            .map_err(|missing| EngineError::NoDevice(missing.clone()))?;
        // SAFETY: the only flag that is allowed is 0. A second call does nothing.
        driver.check("cuInit", unsafe { (driver.api().cuInit)(0) })?;
        Ok(driver)
    }

    /// The functions that are always there.
    pub(crate) fn api(&self) -> &Api {
        &self.tables.api
    }

    /// The functions for SM partitions.
    ///
    /// # Errors
    /// [`EngineError::Unsupported`] where the driver lacks one.
    pub(crate) fn green(&self) -> Result<&GreenApi, EngineError> {
        self.tables
            .green
            .as_ref()
            .map_err(|name| EngineError::Unsupported(format!("the driver lacks {name}")))
    }

    /// Turns a status into a result.
    pub(crate) fn check(&self, call: &'static str, status: Status) -> Result<(), DriverError> {
        if status == 0 {
            return Ok(());
        }
        Err(DriverError {
            call,
            name: self.name_of(status),
            status,
        })
    }

    fn name_of(&self, status: Status) -> String {
        let mut name: *const c_char = std::ptr::null();
        // SAFETY: the driver writes a pointer to a static string, or null.
        let found = unsafe { (self.api().cuGetErrorName)(status, &mut name) };
        if found != 0 || name.is_null() {
            return "an unknown status".to_owned();
        }
        // SAFETY: a static string that ends with a zero byte, as just obtained.
        let name = unsafe { CStr::from_ptr(name) };
        name.to_string_lossy().into_owned()
    }

    /// Version of the driver's interface, as 13000 for 13.0.
    pub(crate) fn version(&self) -> Result<u32, DriverError> {
        let mut version = 0;
        // SAFETY: the driver writes one int.
        let status = unsafe { (self.api().cuDriverGetVersion)(&mut version) };
        self.check("cuDriverGetVersion", status)?;
        Ok(version.unsigned_abs())
    }

    fn devices(&self) -> Result<Vec<CUdevice>, DriverError> {
        let mut count = 0;
        // SAFETY: the driver writes one int.
        let status = unsafe { (self.api().cuDeviceGetCount)(&mut count) };
        self.check("cuDeviceGetCount", status)?;
        (0..count)
            .map(|ordinal| {
                let mut device = 0;
                // SAFETY: the driver writes one handle; the ordinal is below the count.
                let status = unsafe { (self.api().cuDeviceGet)(&mut device, ordinal) };
                self.check("cuDeviceGet", status).map(|()| device)
            })
            .collect()
    }

    fn uuid(&self, device: CUdevice) -> Result<String, DriverError> {
        let mut uuid = CUuuid { bytes: [0; 16] };
        // SAFETY: the driver writes 16 bytes; the device is one that it listed.
        let status = unsafe { (self.api().cuDeviceGetUuid_v2)(&mut uuid, device) };
        self.check("cuDeviceGetUuid_v2", status)?;
        Ok(hexadecimal(uuid.bytes.map(|byte| byte as u8)))
    }

    /// The device with the UUID that NVML prints, as in `GPU-01234567-...`.
    ///
    /// # Errors
    /// [`EngineError::NoDevice`] where there is none.
    pub(crate) fn find(&self, uuid: &str) -> Result<CUdevice, EngineError> {
        let digits = digits_of(uuid);
        for device in self.devices()? {
            if self.uuid(device)?.eq_ignore_ascii_case(digits) {
                return Ok(device);
            }
        }
        Err(EngineError::NoDevice(format!(
            "the driver has no device {uuid}"
        )))
    }

    /// One attribute of a device.
    pub(crate) fn attribute(
        &self,
        device: CUdevice,
        attribute: CUdevice_attribute,
    ) -> Result<u32, DriverError> {
        let mut value: c_int = 0;
        // SAFETY: the driver writes one int; the attribute is one of cuda.h.
        let status =
            unsafe { (self.api().cuDeviceGetAttribute)(&mut value, attribute as c_uint, device) };
        self.check("cuDeviceGetAttribute", status)?;
        Ok(value.unsigned_abs())
    }

    /// Bytes of a device's memory.
    pub(crate) fn memory(&self, device: CUdevice) -> Result<u64, DriverError> {
        let mut bytes = 0;
        // SAFETY: the driver writes one size.
        let status = unsafe { (self.api().cuDeviceTotalMem_v2)(&mut bytes, device) };
        self.check("cuDeviceTotalMem_v2", status)?;
        Ok(bytes as u64)
    }
}

/// How a device is called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceName {
    /// As NVML prints it, for a GPU that is not partitioned by MIG.
    pub uuid: String,
    /// The product's name.
    pub name: String,
}

/// The devices that the driver offers to this process.
///
/// # Errors
/// [`EngineError::NoDevice`] without a driver, and what the driver says.
pub fn devices() -> Result<Vec<DeviceName>, EngineError> {
    let driver = Driver::get()?;
    let mut found = Vec::new();
    for device in driver.devices()? {
        let mut name = [0u8; 256];
        // SAFETY: the driver writes at most 256 bytes, the last of them a zero.
        let status = unsafe {
            (driver.api().cuDeviceGetName)(name.as_mut_ptr().cast(), name.len() as c_int, device)
        };
        driver.check("cuDeviceGetName", status)?;
        let name = CStr::from_bytes_until_nul(&name).unwrap_or_default();
        found.push(DeviceName {
            uuid: format!("GPU-{}", driver.uuid(device)?),
            name: name.to_string_lossy().into_owned(),
        });
    }
    Ok(found)
}

/// The part of a UUID behind `GPU-` or `MIG-`.
fn digits_of(uuid: &str) -> &str {
    ["GPU-", "MIG-"]
        .iter()
        .find_map(|prefix| uuid.strip_prefix(prefix))
        .unwrap_or(uuid)
}

/// 16 bytes as 8-4-4-4-12 hexadecimal digits.
fn hexadecimal(bytes: [u8; 16]) -> String {
    let mut text = String::with_capacity(36);
    for (place, byte) in bytes.iter().enumerate() {
        if matches!(place, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(status: Status) -> EngineError {
        let name = "CUDA_ERROR_X".to_owned();
        DriverError {
            call: "cuX",
            name,
            status,
        }
        .into()
    }

    #[test]
    fn a_uuid_reads_as_nvml_prints_it() {
        let bytes = std::array::from_fn(|place| place as u8 * 17);
        let text = hexadecimal(bytes);
        assert_eq!(text, "00112233-4455-6677-8899-aabbccddeeff");
        assert_eq!(digits_of(&format!("GPU-{text}")), text);
        assert_eq!(digits_of(&text), text);
    }

    #[test]
    fn errors_differ_by_what_the_caller_would_do() {
        assert!(matches!(error(2), EngineError::NoMemory { .. }));
        assert!(matches!(error(100), EngineError::NoDevice(_)));
        assert!(matches!(error(222), EngineError::Unsupported(_)));
        assert!(matches!(error(801), EngineError::Unsupported(_)));
        assert!(matches!(error(808), EngineError::NoSlot(_)));
        assert!(matches!(error(700), EngineError::Failed(_)));
        assert!(matches!(error(810), EngineError::Failed(_)));
        assert!(matches!(error(4_000_000_000), EngineError::Failed(_)));
    }

    #[test]
    fn an_error_names_the_call_and_the_status() {
        assert_eq!(
            error(700),
            EngineError::Failed("cuX returned CUDA_ERROR_X (700)".to_owned())
        );
    }
}
