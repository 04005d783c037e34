//! The structs that the driver's calls take, laid out as its headers have them
//! (src/common/sdk/nvidia/inc unless a path is named).

/// NVOS00_PARAMETERS (nvos.h).
#[repr(C)]
#[derive(Debug, Default)]
pub(super) struct Free {
    pub(super) root: u32,
    pub(super) parent: u32,
    pub(super) object: u32,
    pub(super) status: u32,
}

/// NVOS54_PARAMETERS (nvos.h).
#[repr(C)]
#[derive(Debug, Default)]
pub(super) struct Control {
    pub(super) client: u32,
    pub(super) object: u32,
    pub(super) command: u32,
    pub(super) flags: u32,
    pub(super) params: u64,
    pub(super) params_size: u32,
    pub(super) status: u32,
}

/// NVOS64_PARAMETERS (nvos.h).
#[repr(C)]
#[derive(Debug, Default)]
pub(super) struct Alloc {
    pub(super) root: u32,
    pub(super) parent: u32,
    pub(super) object: u32,
    pub(super) class: u32,
    pub(super) params: u64,
    pub(super) rights: u64,
    pub(super) params_size: u32,
    pub(super) flags: u32,
    pub(super) status: u32,
    pub(super) padding: u32,
}

/// nv_ioctl_register_fd_t (kernel-open/common/inc/nv-ioctl.h).
#[repr(C)]
#[derive(Debug, Default)]
pub(super) struct RegisterFd {
    pub(super) control: i32,
}

/// NV0080_ALLOC_PARAMETERS (class/cl0080.h).
#[repr(C)]
#[derive(Debug, Default)]
pub(super) struct DeviceAlloc {
    pub(super) instance: u32,
    pub(super) client_share: u32,
    pub(super) target_client: u32,
    pub(super) target_device: u32,
    pub(super) flags: u32,
    pub(super) padding: u32,
    pub(super) va_space_size: u64,
    pub(super) va_start_internal: u64,
    pub(super) va_limit_internal: u64,
    pub(super) va_mode: u32,
    pub(super) tail: u32,
}

/// NV2080_ALLOC_PARAMETERS (class/cl2080.h).
#[repr(C)]
#[derive(Debug, Default)]
pub(super) struct SubdeviceAlloc {
    pub(super) instance: u32,
}

/// NV0000_CTRL_CLIENT_GET_HANDLE_INFO_PARAMS (ctrl/ctrl0000/ctrl0000client.h).
#[repr(C)]
#[derive(Debug, Default)]
pub(super) struct HandleInfo {
    pub(super) object: u32,
    pub(super) index: u32,
    pub(super) result: u64,
}

/// NV0000_CTRL_CLIENT_GET_ACCESS_RIGHTS_PARAMS (same header); the mask is
/// RS_ACCESS_MASK (rs_access.h), one limb.
#[repr(C)]
#[derive(Debug, Default)]
pub(super) struct AccessRights {
    pub(super) object: u32,
    pub(super) client: u32,
    pub(super) mask: u32,
}

/// NV0000_GPU_MAX_GID_LENGTH (ctrl/ctrl0000/ctrl0000gpu.h) and
/// NV2080_GPU_MAX_GID_LENGTH (ctrl/ctrl2080/ctrl2080gpu.h).
const GID_LENGTH: usize = 256;

/// NV0000_CTRL_GPU_GET_UUID_INFO_PARAMS (ctrl/ctrl0000/ctrl0000gpu.h).
#[repr(C)]
#[derive(Debug)]
pub(super) struct UuidInfo {
    pub(super) uuid: [u8; GID_LENGTH],
    pub(super) flags: u32,
    pub(super) gpu: u32,
    pub(super) device_instance: u32,
    pub(super) subdevice_instance: u32,
}

/// NV2080_CTRL_GPU_GET_GID_INFO_PARAMS (ctrl/ctrl2080/ctrl2080gpu.h).
#[repr(C)]
#[derive(Debug)]
pub(super) struct GidInfo {
    pub(super) index: u32,
    pub(super) flags: u32,
    pub(super) length: u32,
    pub(super) data: [u8; GID_LENGTH],
}

/// The UUID as sixteen bytes, by SHA-1: FLAGS_FORMAT_BINARY and FLAGS_TYPE_SHA1,
/// the same numbers for both structs above.
pub(super) const GID_BINARY_SHA1: u32 = 2;

/// NV2080_CTRL_FIFO_DISABLE_CHANNELS_MAX_ENTRIES (ctrl/ctrl2080/ctrl2080fifo.h).
pub(in crate::channels) const CHANNELS_MAX: usize = 64;

/// NV2080_CTRL_FIFO_DISABLE_CHANNELS_PARAMS (ctrl/ctrl2080/ctrl2080fifo.h).
#[repr(C)]
#[derive(Debug)]
pub(super) struct DisableChannels {
    pub(super) disable: u8,
    pub(super) padding: [u8; 3],
    pub(super) count: u32,
    pub(super) only_disable_scheduling: u8,
    pub(super) rewind_put: u8,
    pub(super) padding_to_event: [u8; 6],
    pub(super) preempt_event: u64,
    pub(super) clients: [u32; CHANNELS_MAX],
    pub(super) channels: [u32; CHANNELS_MAX],
}

/// NVA06C_CTRL_TIMESLICE_PARAMS (ctrl/ctrla06c.h).
#[repr(C)]
#[derive(Debug, Default)]
pub(super) struct Timeslice {
    pub(super) usec: u64,
}

const _: () = {
    assert!(size_of::<Free>() == 16);
    assert!(size_of::<Control>() == 32);
    assert!(size_of::<Alloc>() == 48);
    assert!(size_of::<RegisterFd>() == 4);
    assert!(size_of::<DeviceAlloc>() == 56);
    assert!(size_of::<SubdeviceAlloc>() == 4);
    assert!(size_of::<HandleInfo>() == 16);
    assert!(size_of::<AccessRights>() == 12);
    assert!(size_of::<UuidInfo>() == 272);
    assert!(size_of::<GidInfo>() == 268);
    assert!(size_of::<DisableChannels>() == 536);
    assert!(size_of::<Timeslice>() == 8);
};

/// Parameters of a call: plain numbers, which RM may overwrite with any bits.
pub(super) trait Parameters {
    const SIZE: u32;
}

macro_rules! parameters {
    ($($type:ty),* $(,)?) => {
        $(impl Parameters for $type {
            const SIZE: u32 = size_of::<Self>() as u32;
        })*
    };
}

parameters!(
    DeviceAlloc,
    SubdeviceAlloc,
    HandleInfo,
    AccessRights,
    UuidInfo,
    GidInfo,
    DisableChannels,
    Timeslice,
);

impl UuidInfo {
    pub(super) fn of(uuid: [u8; 16]) -> Self {
        let mut padded = [0; GID_LENGTH];
        padded[..uuid.len()].copy_from_slice(&uuid);
        Self {
            uuid: padded,
            flags: GID_BINARY_SHA1,
            gpu: 0,
            device_instance: 0,
            subdevice_instance: 0,
        }
    }
}

impl GidInfo {
    pub(super) fn empty() -> Self {
        Self {
            index: 0,
            flags: GID_BINARY_SHA1,
            length: 0,
            data: [0; GID_LENGTH],
        }
    }
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;

    #[test]
    fn fields_of_the_calls_lie_where_the_headers_put_them() {
        assert_eq!(offset_of!(Control, params), 16);
        assert_eq!(offset_of!(Control, params_size), 24);
        assert_eq!(offset_of!(Control, status), 28);
        assert_eq!(offset_of!(Alloc, class), 12);
        assert_eq!(offset_of!(Alloc, params), 16);
        assert_eq!(offset_of!(Alloc, rights), 24);
        assert_eq!(offset_of!(Alloc, params_size), 32);
        assert_eq!(offset_of!(Alloc, status), 40);
        assert_eq!(offset_of!(Free, status), 12);
    }

    #[test]
    fn fields_of_the_parameters_lie_where_the_headers_put_them() {
        assert_eq!(offset_of!(HandleInfo, result), 8);
        assert_eq!(offset_of!(AccessRights, client), 4);
        assert_eq!(offset_of!(DeviceAlloc, va_space_size), 24);
        assert_eq!(offset_of!(DeviceAlloc, va_mode), 48);
        assert_eq!(offset_of!(UuidInfo, flags), 256);
        assert_eq!(offset_of!(UuidInfo, device_instance), 264);
        assert_eq!(offset_of!(UuidInfo, subdevice_instance), 268);
        assert_eq!(offset_of!(GidInfo, flags), 4);
        assert_eq!(offset_of!(GidInfo, data), 12);
        assert_eq!(offset_of!(DisableChannels, count), 4);
        assert_eq!(offset_of!(DisableChannels, only_disable_scheduling), 8);
        assert_eq!(offset_of!(DisableChannels, rewind_put), 9);
        assert_eq!(offset_of!(DisableChannels, preempt_event), 16);
        assert_eq!(offset_of!(DisableChannels, clients), 24);
        assert_eq!(offset_of!(DisableChannels, channels), 280);
    }
}
