//! Counting events of perf_event_open(2).
//!
//! The only `unsafe` of the counters: neither std nor rustix has the call, and
//! libc has it by its number alone. One call with eight fields of a frozen
//! layout did not seem worth a crate of generated bindings.

#![expect(unsafe_code, reason = "perf_event_open(2) has no safe wrapper")]

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

use rustix::io::{Errno, retry_on_intr};

/// PERF_TYPE_SOFTWARE, PERF_TYPE_TRACEPOINT and PERF_COUNT_SW_DUMMY
/// (include/uapi/linux/perf_event.h, as all of the below).
const SOFTWARE: u32 = 1;
const TRACEPOINT: u32 = 2;
const DUMMY: u64 = 9;

/// PERF_FLAG_FD_CLOEXEC.
const CLOEXEC: libc::c_ulong = 1 << 3;

/// Bits of perf_event_attr. Without the kernel's own side, fewer rights are
/// asked for; a uprobe fires with the registers of user space and is counted.
const DISABLED: u64 = 1 << 0;
const INHERIT: u64 = 1 << 1;
const EXCLUDE_KERNEL: u64 = 1 << 5;
const EXCLUDE_HV: u64 = 1 << 6;
/// By threads only, not by forked processes; since Linux 5.13, EINVAL before.
const INHERIT_THREAD: u64 = 1 << 35;

/// The first 64 bytes of perf_event_attr, PERF_ATTR_SIZE_VER0, which hold all
/// that is needed here. The kernel takes what follows for zero.
#[repr(C)]
#[derive(Debug, Default)]
struct Attributes {
    kind: u32,
    size: u32,
    config: u64,
    sample_period: u64,
    sample_type: u64,
    read_format: u64,
    flags: u64,
    wakeup_events: u32,
    breakpoint_type: u32,
    config1: u64,
}

const ATTRIBUTES_SIZE: u32 = 64;

const _: () = assert!(size_of::<Attributes>() == ATTRIBUTES_SIZE as usize);

/// An event that counts until it is dropped.
#[derive(Debug)]
pub(super) struct Event(OwnedFd);

impl Event {
    /// Counts the trace event `id` in the thread `tid` and in the threads that it
    /// and they will start. `ESRCH` when the thread has ended.
    pub(super) fn in_thread(id: u64, tid: u32) -> Result<Self, Errno> {
        let tid = libc::pid_t::try_from(tid).map_err(|_| Errno::SRCH)?;
        Self::open(TRACEPOINT, id, INHERIT | INHERIT_THREAD, tid)
    }

    /// Counts nothing, and keeps the trace event `id` from being removed.
    pub(super) fn hold(id: u64) -> Result<Self, Errno> {
        Self::open(TRACEPOINT, id, DISABLED, 0)
    }

    /// An event of no effect that asks for all that [`Event::in_thread`] asks for.
    pub(super) fn trial(tid: u32) -> Result<Self, Errno> {
        let tid = libc::pid_t::try_from(tid).map_err(|_| Errno::SRCH)?;
        Self::open(SOFTWARE, DUMMY, INHERIT | INHERIT_THREAD | DISABLED, tid)
    }

    fn open(kind: u32, config: u64, flags: u64, tid: libc::pid_t) -> Result<Self, Errno> {
        let attributes = Attributes {
            kind,
            size: ATTRIBUTES_SIZE,
            config,
            flags: flags | EXCLUDE_KERNEL | EXCLUDE_HV,
            ..Attributes::default()
        };
        let any_cpu: libc::c_int = -1;
        let no_group: libc::c_int = -1;
        // SAFETY: the pointer is to a live struct of the layout of
        // perf_event_attr, as long as its `size` says; the kernel only reads it,
        // and keeps it no longer than the call.
        let result = unsafe {
            libc::syscall(
                libc::SYS_perf_event_open,
                &raw const attributes,
                tid,
                any_cpu,
                no_group,
                CLOEXEC,
            )
        };
        if result < 0 {
            let error = io::Error::last_os_error();
            return Err(Errno::from_io_error(&error).unwrap_or(Errno::IO));
        }
        let fd = i32::try_from(result).map_err(|_| Errno::BADF)?;
        // SAFETY: the call succeeded, so this is a new descriptor that nobody
        // else owns.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// How often it happened in its thread and in those that inherited it, ended
    /// ones included.
    pub(super) fn count(&self) -> Result<u64, Errno> {
        let mut bytes = [0; 8];
        match retry_on_intr(|| rustix::io::read(&self.0, &mut bytes))? {
            8 => Ok(u64::from_ne_bytes(bytes)),
            // The kernel's way to say that the event is in an error state.
            _ => Err(Errno::IO),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_cannot_be_is_no_thread() {
        assert_eq!(Event::trial(u32::MAX).err(), Some(Errno::SRCH));
    }

    #[test]
    fn a_trial_counts_nothing() {
        match Event::trial(std::process::id()) {
            Ok(event) => assert_eq!(event.count(), Ok(0)),
            Err(errno) => eprintln!("not run: perf_event_open(2): {errno}"),
        }
    }
}
