//! What RM answers, and what that means to a caller.

use gcgroup_device::DeviceError;
use rustix::io::Errno;

use crate::channels::pace::CALLS_MAX;

/// RM's own answer to a call that arrived
/// (src/common/sdk/nvidia/inc/nvstatuscodes.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::channels) enum Status {
    /// NV_ERR_GPU_IS_LOST, 0x0f, or NV_ERR_RESET_REQUIRED, 0x62.
    GpuLost,
    /// NV_ERR_INSUFFICIENT_PERMISSIONS, 0x1b.
    Denied,
    /// NV_ERR_INVALID_CLIENT, 0x23: no such client, or not on this descriptor.
    InvalidClient,
    /// NV_ERR_INVALID_CHANNEL, 0x21, NV_ERR_INVALID_OBJECT, 0x31,
    /// NV_ERR_INVALID_OBJECT_HANDLE, 0x33, NV_ERR_OBJECT_NOT_FOUND, 0x57, or
    /// NV_ERR_RESOURCE_LOST, 0x6e.
    NoObject,
    /// NV_ERR_NOT_SUPPORTED, 0x56.
    Unsupported,
    /// NV_ERR_TIMEOUT, 0x65, or NV_ERR_TIMEOUT_RETRY, 0x66.
    Timeout,
    /// Any other.
    Other(u32),
}

impl Status {
    pub(super) fn check(status: u32) -> Result<(), Self> {
        match status {
            0 => Ok(()),
            0x0f | 0x62 => Err(Self::GpuLost),
            0x1b => Err(Self::Denied),
            0x21 | 0x31 | 0x33 | 0x57 | 0x6e => Err(Self::NoObject),
            0x23 => Err(Self::InvalidClient),
            0x56 => Err(Self::Unsupported),
            0x65 | 0x66 => Err(Self::Timeout),
            other => Err(Self::Other(other)),
        }
    }
}

/// Why a call did not succeed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::channels) enum RmError {
    /// The kernel refused the ioctl, or the open.
    Os(Errno),
    /// RM refused what was asked.
    Rm(Status),
    /// It was not asked: a search has made all the calls that it may.
    TooMuch,
}

impl RmError {
    /// Whether RM says that a client or an object is not there.
    pub(in crate::channels) fn is_gone(self) -> bool {
        matches!(
            self,
            Self::Rm(Status::InvalidClient) | Self::Rm(Status::NoObject)
        )
    }

    /// The error for a caller that has nothing better to do with it.
    pub(in crate::channels) fn of(self, what: &str) -> DeviceError {
        match self {
            Self::Os(Errno::ACCESS | Errno::PERM) | Self::Rm(Status::Denied) => {
                DeviceError::Denied(what.to_owned())
            }
            Self::Os(errno) => DeviceError::Failed(format!("{what}: {errno}")),
            Self::TooMuch => DeviceError::Failed(format!(
                "{what}: the process has too many for the {CALLS_MAX} calls of one search"
            )),
            Self::Rm(Status::GpuLost) => DeviceError::Failed(format!("{what}: the GPU is lost")),
            Self::Rm(Status::InvalidClient) => {
                DeviceError::Failed(format!("{what}: the driver client is gone"))
            }
            Self::Rm(Status::NoObject) => {
                DeviceError::Failed(format!("{what}: the driver object is gone"))
            }
            Self::Rm(Status::Unsupported) => {
                DeviceError::Unsupported(format!("{what}: this driver does not do it on this GPU"))
            }
            Self::Rm(Status::Timeout) => {
                DeviceError::Failed(format!("{what}: the GPU did not answer in time"))
            }
            Self::Rm(Status::Other(status)) => {
                DeviceError::Failed(format!("{what}: driver status {status:#x}"))
            }
        }
    }

    /// The same for a call on the GPU with this index.
    pub(in crate::channels) fn of_gpu(self, index: u32, what: &str) -> DeviceError {
        match self {
            Self::Rm(Status::GpuLost) => DeviceError::NoGpu(index),
            other => other.of(what),
        }
    }

    /// The same for opening one of the driver's devices, which may be away.
    pub(in crate::channels) fn of_open(self, path: &str) -> DeviceError {
        match self {
            Self::Os(Errno::NOENT | Errno::NODEV | Errno::NXIO | Errno::IO) => {
                DeviceError::NoDriver(format!("{path} does not open"))
            }
            other => other.of(&format!("opening {path}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(status: u32) -> DeviceError {
        let status = Status::check(status).expect_err("it is none of success");
        RmError::Rm(status).of_gpu(3, "stopping channels")
    }

    #[test]
    fn answers_are_told_apart_by_what_the_caller_can_do() {
        assert_eq!(Status::check(0), Ok(()));
        assert_eq!(of(0x1b), DeviceError::Denied("stopping channels".into()));
        assert_eq!(of(0x0f), DeviceError::NoGpu(3));
        assert_eq!(of(0x62), DeviceError::NoGpu(3));
        assert!(matches!(of(0x56), DeviceError::Unsupported(_)));
        for gone in [0x21, 0x31, 0x33, 0x57, 0x6e] {
            assert_eq!(
                of(gone).to_string(),
                "stopping channels: the driver object is gone"
            );
        }
        assert_eq!(
            of(0x23).to_string(),
            "stopping channels: the driver client is gone"
        );
        assert_eq!(
            of(0x65).to_string(),
            "stopping channels: the GPU did not answer in time"
        );
        assert_eq!(
            of(0x40).to_string(),
            "stopping channels: driver status 0x40"
        );
    }

    #[test]
    fn a_device_that_does_not_open_is_a_driver_that_is_away() {
        let away = RmError::Os(Errno::NXIO).of_open("/dev/nvidiactl");
        assert_eq!(
            away,
            DeviceError::NoDriver("/dev/nvidiactl does not open".into())
        );
        let denied = RmError::Os(Errno::ACCESS).of_open("/dev/nvidia1");
        assert_eq!(denied, DeviceError::Denied("opening /dev/nvidia1".into()));
    }
}
