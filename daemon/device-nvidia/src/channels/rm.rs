//! Calls to the kernel's resource manager (RM) on /dev/nvidiactl.
//!
//! The only place with ioctls, and it holds only those that are known to be
//! harmless on a shared GPU: allocate and free a root client of our own, ask
//! for a handle's class or parent, read and set a group's timeslice. Layouts
//! are those of NVIDIA/open-gpu-kernel-modules, named at each struct, the same
//! in 550.54.14, 570.86.15, 580.65.06, 590.48.01 and 595.45.04.
//!
//! RM answers an ioctl with success and puts its own status into the struct.

#![expect(unsafe_code, reason = "ioctls of the driver take raw structs")]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use gcgroup_device::DeviceError;
use rustix::fs::{FileType, Mode, OFlags, fstat, major, minor, open};
use rustix::io::{Errno, retry_on_intr};
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};

use super::layout::Layout;

/// NV_IOCTL_MAGIC (kernel-open/common/inc/nv-ioctl-numbers.h).
const MAGIC: u8 = b'F';

/// NV_ESC_RM_FREE, NV_ESC_RM_CONTROL and NV_ESC_RM_ALLOC
/// (src/nvidia/arch/nvalloc/unix/include/nv_escape.h).
const FREE: Opcode = opcode::read_write::<FreeParameters>(MAGIC, 0x29);
const CONTROL: Opcode = opcode::read_write::<ControlParameters>(MAGIC, 0x2a);
const ALLOC: Opcode = opcode::read_write::<AllocParameters>(MAGIC, 0x2b);

/// NV01_ROOT_CLIENT (src/common/sdk/nvidia/inc/nvos.h).
const ROOT_CLIENT: u32 = 0x41;

/// Device numbers of /dev/nvidiactl: NV_MAJOR_DEVICE_NUMBER and
/// NV_MINOR_DEVICE_NUMBER_CONTROL_DEVICE (kernel-open/common/inc/nv.h).
const CONTROL_DEVICE: (u32, u32) = (195, 255);

/// NVOS00_PARAMETERS (src/common/sdk/nvidia/inc/nvos.h).
#[repr(C)]
#[derive(Debug, Default)]
struct FreeParameters {
    root: u32,
    parent: u32,
    object: u32,
    status: u32,
}

/// NVOS54_PARAMETERS (src/common/sdk/nvidia/inc/nvos.h).
#[repr(C)]
#[derive(Debug, Default)]
struct ControlParameters {
    client: u32,
    object: u32,
    command: u32,
    flags: u32,
    params: u64,
    params_size: u32,
    status: u32,
}

/// NVOS64_PARAMETERS (src/common/sdk/nvidia/inc/nvos.h).
#[repr(C)]
#[derive(Debug, Default)]
struct AllocParameters {
    root: u32,
    parent: u32,
    object: u32,
    class: u32,
    params: u64,
    rights: u64,
    params_size: u32,
    flags: u32,
    status: u32,
    padding: u32,
}

/// NV0000_CTRL_CLIENT_GET_HANDLE_INFO_PARAMS
/// (src/common/sdk/nvidia/inc/ctrl/ctrl0000/ctrl0000client.h).
#[repr(C)]
#[derive(Debug, Default)]
struct HandleInfo {
    object: u32,
    index: u32,
    result: u64,
}

/// NVA06C_CTRL_TIMESLICE_PARAMS
/// (src/common/sdk/nvidia/inc/ctrl/ctrla06c.h).
#[repr(C)]
#[derive(Debug, Default)]
struct TimesliceParameters {
    usec: u64,
}

const _: () = {
    assert!(size_of::<FreeParameters>() == 16);
    assert!(size_of::<ControlParameters>() == 32);
    assert!(size_of::<AllocParameters>() == 48);
    assert!(size_of::<HandleInfo>() == 16);
    assert!(size_of::<TimesliceParameters>() == 8);
};

/// What a handle is asked for: the index of GET_HANDLE_INFO
/// (ctrl0000client.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ask {
    Parent = 1,
    Class = 2,
}

/// RM's own answer to a call that arrived (nvstatuscodes.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    /// NV_ERR_INSUFFICIENT_PERMISSIONS, 0x1b.
    Denied,
    /// NV_ERR_INVALID_CLIENT, 0x23: no such client, or not on this descriptor.
    InvalidClient,
    /// NV_ERR_INVALID_OBJECT_HANDLE, 0x33, or NV_ERR_OBJECT_NOT_FOUND, 0x57.
    NoObject,
    /// Any other.
    Other(u32),
}

impl Status {
    fn check(status: u32) -> Result<(), Self> {
        match status {
            0 => Ok(()),
            0x1b => Err(Self::Denied),
            0x23 => Err(Self::InvalidClient),
            0x33 | 0x57 => Err(Self::NoObject),
            other => Err(Self::Other(other)),
        }
    }
}

/// Why a call did not succeed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RmError {
    /// The kernel refused the ioctl.
    Os(Errno),
    /// RM refused what was asked.
    Rm(Status),
}

impl RmError {
    /// The error for a caller that has nothing better to do with it.
    pub(super) fn of(self, what: &str) -> DeviceError {
        match self {
            Self::Os(Errno::ACCESS | Errno::PERM) | Self::Rm(Status::Denied) => {
                DeviceError::Denied(what.to_owned())
            }
            Self::Os(errno) => DeviceError::Failed(format!("{what}: {errno}")),
            Self::Rm(Status::InvalidClient) => {
                DeviceError::Failed(format!("{what}: the driver client is gone"))
            }
            Self::Rm(Status::NoObject) => {
                DeviceError::Failed(format!("{what}: the driver object is gone"))
            }
            Self::Rm(Status::Other(status)) => {
                DeviceError::Failed(format!("{what}: driver status {status:#x}"))
            }
        }
    }
}

/// An open /dev/nvidiactl: our own, or a duplicate of another process's. The
/// latter pins that process's GPU memory and must be dropped with the operation
/// that needed it.
#[derive(Debug)]
pub(super) struct Control(OwnedFd);

impl Control {
    /// Opens the device for ourselves.
    pub(super) fn open() -> Result<Self, RmError> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let file = open("/dev/nvidiactl", flags, Mode::empty()).map_err(RmError::Os)?;
        Self::from_duplicate(file).ok_or(RmError::Os(Errno::NODEV))
    }

    /// Takes a duplicated descriptor; `None` when it is no /dev/nvidiactl,
    /// which happens when its number was used anew meanwhile.
    pub(super) fn from_duplicate(file: OwnedFd) -> Option<Self> {
        let stat = fstat(&file).ok()?;
        is_control_device(&stat).then_some(Self(file))
    }

    /// Allocates a root client of our own and frees it again; its handle tells
    /// where the host-wide counter of client handles stands.
    pub(super) fn next_client_handle(&self) -> Result<u32, RmError> {
        let mut alloc = AllocParameters {
            class: ROOT_CLIENT,
            ..AllocParameters::default()
        };
        // SAFETY: NV_ESC_RM_ALLOC takes NVOS64_PARAMETERS, which the opcode's
        // size says; both of its pointers are null, which the class allows.
        unsafe { update::<ALLOC, _>(self.0.as_fd(), &mut alloc)? };
        Status::check(alloc.status).map_err(RmError::Rm)?;
        let mut free = FreeParameters {
            root: alloc.object,
            object: alloc.object,
            ..FreeParameters::default()
        };
        // SAFETY: NV_ESC_RM_FREE takes NVOS00_PARAMETERS, which holds no
        // pointer; the object is the client allocated above, so nobody uses it.
        unsafe { update::<FREE, _>(self.0.as_fd(), &mut free)? };
        Status::check(free.status).map_err(RmError::Rm)?;
        Ok(alloc.object)
    }

    /// Class or parent of a handle of a client that was opened on this
    /// descriptor.
    pub(super) fn handle_info(
        &self,
        layout: &Layout,
        client: u32,
        object: u32,
        ask: Ask,
    ) -> Result<u32, RmError> {
        let mut info = HandleInfo {
            object,
            index: ask as u32,
            result: 0,
        };
        self.control(client, client, layout.get_handle_info, &mut info)?;
        // Classes and handles have 32 bits; a parent is written as such.
        Ok((info.result & u64::from(u32::MAX)) as u32)
    }

    /// Timeslice of a channel group in microseconds.
    pub(super) fn timeslice(
        &self,
        layout: &Layout,
        client: u32,
        group: u32,
    ) -> Result<u64, RmError> {
        let mut params = TimesliceParameters::default();
        self.control(client, group, layout.get_timeslice, &mut params)?;
        Ok(params.usec)
    }

    pub(super) fn set_timeslice(
        &self,
        layout: &Layout,
        client: u32,
        group: u32,
        usec: u64,
    ) -> Result<(), RmError> {
        let mut params = TimesliceParameters { usec };
        self.control(client, group, layout.set_timeslice, &mut params)
    }

    /// NV_ESC_RM_CONTROL with parameters of one of the types above.
    fn control<P: Parameters>(
        &self,
        client: u32,
        object: u32,
        command: u32,
        params: &mut P,
    ) -> Result<(), RmError> {
        let mut call = ControlParameters {
            client,
            object,
            command,
            flags: 0,
            params: std::ptr::from_mut(params).expose_provenance() as u64,
            params_size: P::SIZE,
            status: 0,
        };
        // SAFETY: NV_ESC_RM_CONTROL takes NVOS54_PARAMETERS. It points to a
        // struct of the command's type that nobody else has while `params` is
        // borrowed, and RM copies `params_size` bytes from and to it, its size.
        unsafe { update::<CONTROL, _>(self.0.as_fd(), &mut call)? };
        Status::check(call.status).map_err(RmError::Rm)
    }
}

/// Parameters of a control call: plain bytes that RM may overwrite.
trait Parameters {
    const SIZE: u32;
}

impl Parameters for HandleInfo {
    const SIZE: u32 = size_of::<Self>() as u32;
}

impl Parameters for TimesliceParameters {
    const SIZE: u32 = size_of::<Self>() as u32;
}

/// # Safety
/// `OPCODE` must be an ioctl of the device behind `file` that takes a `T`, and
/// any pointer in `value` must be valid for what the ioctl does with it.
unsafe fn update<const OPCODE: Opcode, T>(
    file: BorrowedFd<'_>,
    value: &mut T,
) -> Result<(), RmError> {
    retry_on_intr(|| {
        // SAFETY: the caller's promise.
        unsafe { ioctl(file, Updater::<OPCODE, T>::new(value)) }
    })
    .map_err(RmError::Os)
}

/// Whether a stat is that of /dev/nvidiactl, whatever it is called where the
/// process lives.
pub(super) fn is_control_device(stat: &rustix::fs::Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice
        && (major(stat.st_rdev), minor(stat.st_rdev)) == CONTROL_DEVICE
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;

    #[test]
    fn request_numbers_are_the_drivers() {
        assert_eq!(CONTROL, 0xc020_462a);
        assert_eq!(ALLOC, 0xc030_462b);
        assert_eq!(FREE, 0xc010_4629);
    }

    #[test]
    fn fields_lie_where_the_headers_put_them() {
        assert_eq!(offset_of!(ControlParameters, params), 16);
        assert_eq!(offset_of!(ControlParameters, params_size), 24);
        assert_eq!(offset_of!(ControlParameters, status), 28);
        assert_eq!(offset_of!(AllocParameters, class), 12);
        assert_eq!(offset_of!(AllocParameters, params), 16);
        assert_eq!(offset_of!(AllocParameters, rights), 24);
        assert_eq!(offset_of!(AllocParameters, status), 40);
        assert_eq!(offset_of!(FreeParameters, status), 12);
        assert_eq!(offset_of!(HandleInfo, result), 8);
    }

    #[test]
    fn other_devices_are_not_taken_for_the_drivers() {
        let null = std::fs::File::open("/dev/null").expect("there is a null device");
        assert!(Control::from_duplicate(null.into()).is_none());
    }

    #[test]
    fn a_refusal_is_told_from_a_failure() {
        let denied = RmError::Rm(Status::Denied).of("setting a timeslice");
        assert_eq!(denied, DeviceError::Denied("setting a timeslice".into()));
        let failed = RmError::Rm(Status::Other(0x56)).of("setting a timeslice");
        assert_eq!(
            failed.to_string(),
            "setting a timeslice: driver status 0x56"
        );
    }
}
