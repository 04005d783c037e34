//! Calls to the kernel's resource manager (RM) on its devices.
//!
//! The only place with ioctls, and it holds only those that are known to be
//! harmless on a shared GPU: allocate and free a client, a device and a
//! subdevice of our own, ask for a handle's class, parent or existence, ask for
//! a GPU's UUID, read and set a group's timeslice, stop and resume channels.
//! Layouts are those of NVIDIA/open-gpu-kernel-modules, the same in 550.54.14,
//! 570.86.15, 580.65.06, 590.48.01 and 595.45.04.
//!
//! RM answers an ioctl with success and puts its own status into the struct.

#![expect(unsafe_code, reason = "ioctls of the driver take raw structs")]

mod params;
mod status;

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use gcgroup_device::Handle;
use rustix::fs::{FileType, Mode, OFlags, fstat, major, minor, open};
use rustix::io::{Errno, retry_on_intr};
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};

use self::params::Parameters;
use super::layout::Layout;

pub(super) use self::params::CHANNELS_MAX;
pub(super) use self::status::{RmError, Status};

/// NV_IOCTL_MAGIC (kernel-open/common/inc/nv-ioctl-numbers.h).
const MAGIC: u8 = b'F';

/// NV_ESC_RM_FREE, NV_ESC_RM_CONTROL and NV_ESC_RM_ALLOC
/// (src/nvidia/arch/nvalloc/unix/include/nv_escape.h).
const FREE: Opcode = opcode::read_write::<params::Free>(MAGIC, 0x29);
const CONTROL: Opcode = opcode::read_write::<params::Control>(MAGIC, 0x2a);
const ALLOC: Opcode = opcode::read_write::<params::Alloc>(MAGIC, 0x2b);

/// NV_ESC_REGISTER_FD (kernel-open/common/inc/nv-ioctl-numbers.h).
const REGISTER_FD: Opcode = opcode::read_write::<params::RegisterFd>(MAGIC, 201);

/// NV01_ROOT_CLIENT (src/common/sdk/nvidia/inc/nvos.h).
const ROOT_CLIENT: u32 = 0x41;

/// NV01_DEVICE_0 (class/cl0080.h).
pub(super) const DEVICE: u32 = 0x80;

/// NV20_SUBDEVICE_0 (class/cl2080.h).
pub(super) const SUBDEVICE: u32 = 0x2080;

/// NV_MAJOR_DEVICE_NUMBER (kernel-open/common/inc/nv-chardev-numbers.h).
const MAJOR: u32 = 195;

/// NV_MINOR_DEVICE_NUMBER_CONTROL_DEVICE (same header), of /dev/nvidiactl.
const CONTROL_MINOR: u32 = 255;

/// Where /dev/nvidiactl is.
pub(super) const CONTROL_PATH: &str = "/dev/nvidiactl";

/// What a handle is asked for: the index of GET_HANDLE_INFO
/// (ctrl0000client.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ask {
    Parent = 1,
    Class = 2,
}

/// What there is of a handle on the whole host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Presence {
    /// Not even its client.
    NoClient,
    /// Its client, which has no such object.
    NoObject,
    /// The object.
    Object,
}

/// Which way channels are switched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Switch {
    /// Off the GPU, and kept off.
    Stop,
    /// Schedulable again.
    Resume,
}

/// An open /dev/nvidiactl: our own, or a duplicate of another process's. The
/// latter pins that process's GPU memory and must be dropped with the operation
/// that needed it.
#[derive(Debug)]
pub(super) struct Control(OwnedFd);

/// An open device of a GPU. While it is open, the driver keeps its GPU
/// attached and lets our process have objects on it.
#[derive(Debug)]
pub(super) struct Device(OwnedFd);

impl Device {
    pub(super) fn path(minor: u32) -> String {
        format!("/dev/nvidia{minor}")
    }

    pub(super) fn open(number: u32) -> Result<Self, RmError> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let file = open(Self::path(number), flags, Mode::empty()).map_err(RmError::Os)?;
        let stat = fstat(&file).map_err(RmError::Os)?;
        if !is_device(&stat, number) {
            return Err(RmError::Os(Errno::NODEV));
        }
        Ok(Self(file))
    }

    /// Ties it to the control device whose clients will use it.
    pub(super) fn register(&self, control: &Control) -> Result<(), RmError> {
        let mut call = params::RegisterFd {
            control: control.0.as_raw_fd(),
        };
        // SAFETY: NV_ESC_REGISTER_FD takes nv_ioctl_register_fd_t, which holds
        // no pointer; the descriptor it names is open.
        unsafe { update::<REGISTER_FD, _>(self.0.as_fd(), &mut call) }
    }
}

impl Control {
    /// Opens the device for ourselves.
    pub(super) fn open() -> Result<Self, RmError> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let file = open(CONTROL_PATH, flags, Mode::empty()).map_err(RmError::Os)?;
        Self::from_duplicate(file).ok_or(RmError::Os(Errno::NODEV))
    }

    /// Takes a duplicated descriptor; `None` when it is no /dev/nvidiactl,
    /// which happens when its number was used anew meanwhile.
    pub(super) fn from_duplicate(file: OwnedFd) -> Option<Self> {
        let stat = fstat(&file).ok()?;
        is_device(&stat, CONTROL_MINOR).then_some(Self(file))
    }

    /// Makes a client of our own, which lives until it is freed or the
    /// descriptor is closed.
    pub(super) fn new_client(&self) -> Result<u32, RmError> {
        let call = params::Alloc {
            class: ROOT_CLIENT,
            ..params::Alloc::default()
        };
        // SAFETY: the class takes no parameters, and the pointer to them is null.
        unsafe { self.alloc(call) }
    }

    /// Frees a client that [`Control::new_client`] made on this descriptor.
    pub(super) fn free_client(&self, client: u32) -> Result<(), RmError> {
        let mut free = params::Free {
            root: client,
            object: client,
            ..params::Free::default()
        };
        // SAFETY: NV_ESC_RM_FREE takes NVOS00_PARAMETERS, which holds no
        // pointer. RM frees clients of this descriptor only.
        unsafe { update::<FREE, _>(self.0.as_fd(), &mut free)? };
        Status::check(free.status).map_err(RmError::Rm)
    }

    /// Makes a device of our own client; returns its handle. It shares the
    /// GPU's global address space, as nothing is ever mapped.
    pub(super) fn new_device(&self, client: u32, instance: u32) -> Result<u32, RmError> {
        let mut device = params::DeviceAlloc {
            instance,
            ..params::DeviceAlloc::default()
        };
        self.new_object(client, client, DEVICE, &mut device)
    }

    /// Makes a subdevice below a device of our own client.
    pub(super) fn new_subdevice(
        &self,
        client: u32,
        device: u32,
        instance: u32,
    ) -> Result<u32, RmError> {
        let mut subdevice = params::SubdeviceAlloc { instance };
        self.new_object(client, device, SUBDEVICE, &mut subdevice)
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
        let mut info = params::HandleInfo {
            object,
            index: ask as u32,
            result: 0,
        };
        self.control(client, client, layout.get_handle_info, &mut info)?;
        // Classes and handles have 32 bits; a parent is written as such.
        Ok((info.result & u64::from(u32::MAX)) as u32)
    }

    /// What there is of a handle of anybody, asked through our own client
    /// `own`. The rights that the call is about are not looked at. While it is
    /// answered, no other call is: it takes RM's API lock for itself, where
    /// [`Control::handle_info`] shares it (flags 0x9 and 0x109 in
    /// src/nvidia/generated/g_client_resource_nvoc.c).
    pub(super) fn presence(
        &self,
        layout: &Layout,
        own: u32,
        handle: Handle,
    ) -> Result<Presence, RmError> {
        let mut rights = params::AccessRights {
            object: handle.object,
            client: handle.client,
            mask: 0,
        };
        match self.control(own, own, layout.get_access_rights, &mut rights) {
            Ok(()) => Ok(Presence::Object),
            Err(RmError::Rm(Status::NoObject)) => Ok(Presence::NoObject),
            Err(RmError::Rm(Status::InvalidClient)) => Ok(Presence::NoClient),
            Err(error) => Err(error),
        }
    }

    /// Device and subdevice instance of a GPU that is attached.
    pub(super) fn instances(
        &self,
        layout: &Layout,
        client: u32,
        uuid: [u8; 16],
    ) -> Result<(u32, u32), RmError> {
        let mut info = params::UuidInfo::of(uuid);
        self.control(client, client, layout.get_uuid_info, &mut info)?;
        Ok((info.device_instance, info.subdevice_instance))
    }

    /// UUID of the GPU behind a subdevice.
    pub(super) fn uuid(
        &self,
        layout: &Layout,
        client: u32,
        subdevice: u32,
    ) -> Result<[u8; 16], RmError> {
        let mut info = params::GidInfo::empty();
        self.control(client, subdevice, layout.get_gid_info, &mut info)?;
        let mut uuid = [0; 16];
        if info.length as usize != uuid.len() {
            return Err(RmError::Os(Errno::PROTO));
        }
        uuid.copy_from_slice(&info.data[..16]);
        Ok(uuid)
    }

    /// Stops or resumes up to [`CHANNELS_MAX`] channels of anybody on the GPU of
    /// our own subdevice. A stop returns when none of them runs.
    pub(super) fn switch_channels(
        &self,
        layout: &Layout,
        own: Handle,
        switch: Switch,
        handles: &[Handle],
    ) -> Result<(), RmError> {
        let mut params = params::DisableChannels {
            disable: u8::from(switch == Switch::Stop),
            padding: [0; 3],
            count: handles.len() as u32,
            only_disable_scheduling: 0,
            rewind_put: 0,
            padding_to_event: [0; 6],
            preempt_event: 0,
            clients: [0; CHANNELS_MAX],
            channels: [0; CHANNELS_MAX],
        };
        if handles.len() > CHANNELS_MAX {
            return Err(RmError::Os(Errno::TOOBIG));
        }
        for (slot, handle) in handles.iter().enumerate() {
            params.clients[slot] = handle.client;
            params.channels[slot] = handle.object;
        }
        self.control(own.client, own.object, layout.disable_channels, &mut params)
    }

    /// Timeslice of a channel group in microseconds.
    pub(super) fn timeslice(&self, layout: &Layout, group: Handle) -> Result<u64, RmError> {
        let mut params = params::Timeslice::default();
        self.control(
            group.client,
            group.object,
            layout.get_timeslice,
            &mut params,
        )?;
        Ok(params.usec)
    }

    pub(super) fn set_timeslice(
        &self,
        layout: &Layout,
        group: Handle,
        usec: u64,
    ) -> Result<(), RmError> {
        let mut params = params::Timeslice { usec };
        self.control(
            group.client,
            group.object,
            layout.set_timeslice,
            &mut params,
        )
    }

    /// NV_ESC_RM_ALLOC with parameters of one of the types above; RM chooses the
    /// handle, since none is asked for.
    fn new_object<P: Parameters>(
        &self,
        client: u32,
        parent: u32,
        class: u32,
        params: &mut P,
    ) -> Result<u32, RmError> {
        let call = params::Alloc {
            root: client,
            parent,
            class,
            params: std::ptr::from_mut(params).expose_provenance() as u64,
            params_size: P::SIZE,
            ..params::Alloc::default()
        };
        // SAFETY: both callers pass the struct of their class, which nobody else
        // has while it is borrowed here.
        unsafe { self.alloc(call) }
    }

    /// # Safety
    /// `call.params` must be null or point to a struct of the class's type that
    /// is held exclusively until this returns.
    unsafe fn alloc(&self, mut call: params::Alloc) -> Result<u32, RmError> {
        // SAFETY: NV_ESC_RM_ALLOC takes NVOS64_PARAMETERS, which the opcode's
        // size says. Its pointer to the rights is null, which RM allows; for
        // that to the parameters there is the caller's promise.
        unsafe { update::<ALLOC, _>(self.0.as_fd(), &mut call)? };
        Status::check(call.status).map_err(RmError::Rm)?;
        Ok(call.object)
    }

    /// NV_ESC_RM_CONTROL with parameters of one of the types above.
    fn control<P: Parameters>(
        &self,
        client: u32,
        object: u32,
        command: u32,
        params: &mut P,
    ) -> Result<(), RmError> {
        let mut call = params::Control {
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

/// Whether a file of this mode and with these device numbers is /dev/nvidiactl,
/// whatever it is called where the process lives.
pub(super) fn is_control(mode: u32, device: (u32, u32)) -> bool {
    FileType::from_raw_mode(mode) == FileType::CharacterDevice && device == (MAJOR, CONTROL_MINOR)
}

fn is_device(stat: &rustix::fs::Stat, number: u32) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice
        && (major(stat.st_rdev), minor(stat.st_rdev)) == (MAJOR, number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_numbers_are_the_drivers() {
        assert_eq!(CONTROL, 0xc020_462a);
        assert_eq!(ALLOC, 0xc030_462b);
        assert_eq!(FREE, 0xc010_4629);
        assert_eq!(REGISTER_FD, 0xc004_46c9);
    }

    #[test]
    fn other_devices_are_not_taken_for_the_drivers() {
        let null = std::fs::File::open("/dev/null").expect("there is a null device");
        let stat = fstat(&null).expect("it is open");
        assert!(!is_device(&stat, 3));
        assert!(is_control(0o020_666, (195, 255)));
        assert!(!is_control(0o020_666, (195, 0)));
        assert!(!is_control(0o060_666, (195, 255)));
        assert!(Control::from_duplicate(null.into()).is_none());
    }
}
