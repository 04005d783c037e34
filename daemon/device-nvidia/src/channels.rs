//! Control of another process's channel groups, without its help.
//!
//! RM accepts a call on a client only on the open file that made the client.
//! pidfd_getfd(2) gives a duplicate of just that file to who may trace the
//! process. A duplicate pins the process's GPU memory past its death, so each
//! operation here takes one, uses it and drops it before it returns.
//!
//! The handle of the client has to be guessed, and each wrong guess is a line
//! in the kernel's log. The host-wide counter behind the handles is read before
//! the process opens the GPU and again for the search, so the guesses are few;
//! what was found is remembered. A wrong guess changes nothing.

pub(crate) mod find;
mod layout;
mod rm;

use std::collections::HashMap;
use std::fs;
use std::ops::RangeInclusive;
use std::os::fd::RawFd;

use gcgroup_device::{ChannelGroups, ClientMark, DeviceError, Timeslices};
use parking_lot::Mutex;
use rustix::io::Errno;
use rustix::process::{PidfdGetfdFlags, pidfd_getfd};

use self::find::Object;
use self::layout::Layout;
use self::rm::{Ask, Control, RmError, Status, is_control_device};
use crate::process::{self, Process};

/// Lines that one search may cause in the kernel's log.
const GUESSES_MAX: usize = 64;

/// Timeslices that are set, in microseconds: those of compute.priority, 15
/// to 0. From 16 on they were measured on an H200; 0 is the driver's to define.
const TIMESLICE_USEC: RangeInclusive<u64> = 16..=524_288;

#[derive(Debug)]
pub(crate) struct DriverChannels {
    layout: Result<Layout, DeviceError>,
    /// Where the client of a process was found last, by pid and start time.
    /// Locked for a lookup only, never during a call to the driver.
    known: Mutex<HashMap<(u32, u64), Place>>,
}

/// Where a client lives in its process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    /// Number of the descriptor in that process.
    fd: RawFd,
    /// Handle of the client.
    client: u32,
}

/// A found client and its objects.
struct Found {
    place: Place,
    objects: Vec<Object>,
}

impl DriverChannels {
    pub(crate) fn new(driver_version: &str) -> Self {
        Self {
            layout: Layout::of_driver(driver_version),
            known: Mutex::default(),
        }
    }

    fn layout(&self) -> Result<&Layout, DeviceError> {
        self.layout.as_ref().map_err(Clone::clone)
    }

    pub(crate) fn mark(&self) -> Result<ClientMark, DeviceError> {
        self.layout()?;
        let control = Control::open().map_err(|error| match error {
            RmError::Os(Errno::NOENT | Errno::NODEV | Errno::NXIO | Errno::IO) => {
                DeviceError::NoDriver("/dev/nvidiactl does not open".to_owned())
            }
            other => other.of("opening /dev/nvidiactl"),
        })?;
        let handle = control
            .next_client_handle()
            .map_err(|error| error.of("allocating a driver client"))?;
        Ok(ClientMark(handle))
    }

    pub(crate) fn find(&self, pid: u32, mark: ClientMark) -> Result<ChannelGroups, DeviceError> {
        let found = self.search(pid, mark)?;
        let groups = find::compute_groups(&found.objects);
        if groups.is_empty() {
            return Err(find::none_found(pid, &found.objects));
        }
        Ok(ChannelGroups {
            pid,
            client: found.place.client,
            groups,
        })
    }

    pub(crate) fn inventory(&self, pid: u32, mark: ClientMark) -> Result<Vec<Object>, DeviceError> {
        Ok(self.search(pid, mark)?.objects)
    }

    pub(crate) fn timeslices(&self, groups: &ChannelGroups) -> Result<Timeslices, DeviceError> {
        let layout = self.layout()?;
        let control = self.control_of(layout, groups)?;
        read_timeslices(layout, &control, groups)
    }

    pub(crate) fn set_timeslice(
        &self,
        groups: &ChannelGroups,
        usec: u64,
    ) -> Result<Timeslices, DeviceError> {
        let layout = self.layout()?;
        if !TIMESLICE_USEC.contains(&usec) {
            return Err(DeviceError::Failed(format!(
                "a timeslice of {usec} us is not within {} to {} us",
                TIMESLICE_USEC.start(),
                TIMESLICE_USEC.end()
            )));
        }
        let control = self.control_of(layout, groups)?;
        let before = read_timeslices(layout, &control, groups)?;
        let outcome = set_timeslices(layout, &control, groups, usec);
        if outcome.is_err() {
            // A change that failed has changed nothing, as far as that can be had.
            for (group, usec) in groups.groups.iter().zip(before.usec) {
                let back = control.set_timeslice(layout, groups.client, *group, usec);
                if let Err(error) = back.map_err(|error| error.of("putting a timeslice back")) {
                    tracing::warn!(pid = groups.pid, %error, "a timeslice is not what it was");
                }
            }
        }
        outcome
    }

    /// The client of a process that has compute groups, else one without any.
    fn search(&self, pid: u32, mark: ClientMark) -> Result<Found, DeviceError> {
        let layout = self.layout()?;
        let process = open_process(pid)?;
        let descriptors = control_descriptors(pid)?;
        if let Some(found) = self.search_known(layout, &process) {
            return Ok(found);
        }
        let opened = layout
            .clients_between(mark.0, self.mark()?.0)
            .saturating_sub(1);
        let guesses = descriptors.len().saturating_mul(opened as usize);
        if guesses > GUESSES_MAX {
            return Err(DeviceError::Failed(format!(
                "{opened} driver clients were opened since the mark; with {} descriptors that is more than the {GUESSES_MAX} guesses that a search may cost",
                descriptors.len()
            )));
        }
        let mut without_groups = None;
        for fd in descriptors {
            let Some(control) = duplicate(&process, fd)? else {
                continue;
            };
            for step in 1..=opened {
                let client = layout.client_after(mark.0, step);
                if !owns(&control, layout, client)? {
                    continue;
                }
                let objects = find::objects(&control, layout, client)
                    .map_err(|error| error.of("listing the driver objects"))?;
                let place = Place { fd, client };
                let found = Found { place, objects };
                if !find::compute_groups(&found.objects).is_empty() {
                    self.remember(&process, place);
                    return Ok(found);
                }
                without_groups.get_or_insert(found);
            }
        }
        without_groups.ok_or_else(|| {
            DeviceError::Failed(format!(
                "process {pid} owns none of the {opened} driver clients opened since the mark"
            ))
        })
    }

    /// Looks again where the client was found before: a context made since, or
    /// a setting to be applied again, costs no guess. After a checkpoint and
    /// restore the client is a new one, and the place is forgotten.
    fn search_known(&self, layout: &Layout, process: &Process) -> Option<Found> {
        let place = self.place_of(process)?;
        let control = duplicate(process, place.fd).ok().flatten();
        let objects = control.and_then(|control| {
            find::objects(&control, layout, place.client)
                .ok()
                .filter(|objects| !find::compute_groups(objects).is_empty())
        });
        if objects.is_none() {
            self.known.lock().remove(&key_of(process));
        }
        Some(Found {
            place,
            objects: objects?,
        })
    }

    /// The descriptor on which the client of these groups was opened.
    fn control_of(&self, layout: &Layout, groups: &ChannelGroups) -> Result<Control, DeviceError> {
        let process = open_process(groups.pid)?;
        let known = self.place_of(&process).map(|place| place.fd);
        // The known one first: the wrong one costs a line in the kernel's log.
        let others = control_descriptors(groups.pid)?;
        let others = others.into_iter().filter(|fd| Some(*fd) != known);
        for fd in known.into_iter().chain(others).take(GUESSES_MAX) {
            let Some(control) = duplicate(&process, fd)? else {
                continue;
            };
            let client = groups.client;
            if owns(&control, layout, client)? {
                self.remember(&process, Place { fd, client });
                return Ok(control);
            }
        }
        Err(DeviceError::Failed(format!(
            "process {} has no driver client {:#x} any more",
            groups.pid, groups.client
        )))
    }

    fn place_of(&self, process: &Process) -> Option<Place> {
        self.known.lock().get(&key_of(process)).copied()
    }

    fn remember(&self, process: &Process, place: Place) {
        let ended: Vec<(u32, u64)> = {
            let mut known = self.known.lock();
            if known.insert(key_of(process), place).is_some() {
                return;
            }
            known.keys().copied().collect()
        };
        // New processes are rare, so the dead can be swept out with each.
        let ended = ended
            .into_iter()
            .filter(|(pid, start_time)| process::start_time(*pid) != Some(*start_time));
        let ended: Vec<_> = ended.collect();
        self.known.lock().retain(|key, _| !ended.contains(key));
    }
}

fn key_of(process: &Process) -> (u32, u64) {
    (process.pid(), process.start_time())
}

fn open_process(pid: u32) -> Result<Process, DeviceError> {
    Process::open(pid).map_err(|errno| match errno {
        Errno::SRCH => DeviceError::NoProcess(pid),
        // A thread's id, which names no process.
        Errno::INVAL | Errno::NOENT => DeviceError::NoProcess(pid),
        other => DeviceError::Failed(format!("opening process {pid}: {other}")),
    })
}

/// Numbers of the descriptors of /dev/nvidiactl in a process, lowest first.
fn control_descriptors(pid: u32) -> Result<Vec<RawFd>, DeviceError> {
    let directory = format!("/proc/{pid}/fd");
    let entries = fs::read_dir(&directory).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => DeviceError::NoProcess(pid),
        std::io::ErrorKind::PermissionDenied => {
            DeviceError::Denied(format!("reading the descriptors of process {pid}"))
        }
        _ => DeviceError::Failed(format!("reading {directory}: {error}")),
    })?;
    let mut descriptors: Vec<RawFd> = entries
        .flatten()
        .filter(|entry| {
            // Through the link: the path that it shows belongs to the mount
            // namespace of that process, the device behind it to all.
            rustix::fs::stat(entry.path()).is_ok_and(|stat| is_control_device(&stat))
        })
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    descriptors.sort_unstable();
    if descriptors.is_empty() {
        return Err(DeviceError::Failed(format!(
            "process {pid} has not opened the driver"
        )));
    }
    Ok(descriptors)
}

/// A duplicate of a descriptor of that process, to be dropped before the
/// operation returns; `None` when it was closed meanwhile.
fn duplicate(process: &Process, fd: RawFd) -> Result<Option<Control>, DeviceError> {
    match pidfd_getfd(process, fd, PidfdGetfdFlags::empty()) {
        Ok(file) => Ok(Control::from_duplicate(file)),
        Err(Errno::BADF) => Ok(None),
        Err(Errno::SRCH) => Err(DeviceError::NoProcess(process.pid())),
        Err(Errno::PERM | Errno::ACCESS) => Err(DeviceError::Denied(format!(
            "taking a descriptor of process {}, which needs CAP_SYS_PTRACE",
            process.pid()
        ))),
        Err(Errno::NOSYS) => Err(DeviceError::Unsupported(
            "pidfd_getfd needs Linux 5.6".to_owned(),
        )),
        Err(errno) => Err(DeviceError::Failed(format!(
            "taking a descriptor of process {}: {errno}",
            process.pid()
        ))),
    }
}

/// Whether a client was opened on this descriptor.
fn owns(control: &Control, layout: &Layout, client: u32) -> Result<bool, DeviceError> {
    match control.handle_info(layout, client, client, Ask::Class) {
        Ok(_) => Ok(true),
        // Mostly NV_ERR_INVALID_CLIENT. A stranger's client that is just being
        // made or freed answers otherwise, and must not end the search.
        Err(RmError::Rm(status)) if status != Status::Denied => Ok(false),
        Err(error) => Err(error.of("looking for the driver client")),
    }
}

/// Sets the timeslice of each group and reads it back.
fn set_timeslices(
    layout: &Layout,
    control: &Control,
    groups: &ChannelGroups,
    usec: u64,
) -> Result<Timeslices, DeviceError> {
    for group in &groups.groups {
        control
            .set_timeslice(layout, groups.client, *group, usec)
            .map_err(|error| error.of("setting a timeslice"))?;
    }
    let timeslices = read_timeslices(layout, control, groups)?;
    if timeslices.usec.iter().any(|read| *read != usec) {
        return Err(DeviceError::Failed(format!(
            "a timeslice of {usec} us was read back as {:?} us",
            timeslices.usec
        )));
    }
    Ok(timeslices)
}

fn read_timeslices(
    layout: &Layout,
    control: &Control,
    groups: &ChannelGroups,
) -> Result<Timeslices, DeviceError> {
    let read = |group: &u32| control.timeslice(layout, groups.client, *group);
    let usec: Result<Vec<u64>, RmError> = groups.groups.iter().map(read).collect();
    let usec = usec.map_err(|error| error.of("reading a timeslice"))?;
    Ok(Timeslices { usec })
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn channels() -> DriverChannels {
        DriverChannels::new("580.159.04")
    }

    #[test]
    fn a_dead_process_is_no_process() {
        let mut child = Command::new("true").spawn().expect("true is everywhere");
        let pid = child.id();
        child.wait().expect("it is our child");
        let error = channels().find(pid, ClientMark(0xc1d0_0000));
        assert_eq!(error, Err(DeviceError::NoProcess(pid)));
        let groups = ChannelGroups {
            pid,
            client: 0xc1d0_0001,
            groups: vec![0x5c00_0010],
        };
        let error = channels().timeslices(&groups);
        assert_eq!(error, Err(DeviceError::NoProcess(pid)));
    }

    #[test]
    fn a_process_without_the_driver_has_no_groups() {
        let mut child = Command::new("sleep")
            .arg("60")
            .spawn()
            .expect("sleep is everywhere");
        let error = channels().find(child.id(), ClientMark(0xc1d0_0000));
        child.kill().expect("it is our child");
        child.wait().expect("it is our child");
        let expected = format!("process {} has not opened the driver", child.id());
        assert_eq!(error, Err(DeviceError::Failed(expected)));
    }

    #[test]
    fn an_unknown_driver_is_refused_before_anything_is_opened() {
        let channels = DriverChannels::new("610.43.02");
        let error = channels.mark().expect_err("its layouts are not known");
        assert!(matches!(error, DeviceError::Unsupported(_)), "{error}");
    }

    #[test]
    fn a_descriptor_that_is_not_the_drivers_is_not_kept() {
        let null = fs::File::open("/dev/null").expect("there is a null device");
        let process = Process::open(std::process::id()).expect("we run");
        let fd = std::os::fd::AsRawFd::as_raw_fd(&null);
        let count = || {
            let entries = fs::read_dir("/proc/self/fd").expect("proc is mounted");
            let links = entries.flatten().map(|entry| fs::read_link(entry.path()));
            links
                .flatten()
                .filter(|link| link.as_os_str() == "/dev/null")
                .count()
        };
        let before = count();
        let duplicated = duplicate(&process, fd).expect("we may trace ourselves");
        assert!(duplicated.is_none());
        assert_eq!(count(), before);
    }

    #[test]
    fn timeslices_out_of_range_never_reach_the_driver() {
        let groups = ChannelGroups {
            pid: std::process::id(),
            client: 0xc1d0_0001,
            groups: vec![0x5c00_0010],
        };
        for usec in [0, 15, 524_289] {
            let error = channels().set_timeslice(&groups, usec);
            let expected = format!("a timeslice of {usec} us is not within 16 to 524288 us");
            assert_eq!(error, Err(DeviceError::Failed(expected)));
        }
    }

    #[test]
    fn places_of_ended_processes_are_swept_out() {
        let channels = channels();
        let place = Place {
            fd: 3,
            client: 0xc1d0_0001,
        };
        let mut child = Command::new("sleep")
            .arg("60")
            .spawn()
            .expect("sleep is everywhere");
        let process = Process::open(child.id()).expect("the child runs");
        channels.remember(&process, place);
        assert_eq!(channels.place_of(&process), Some(place));
        child.kill().expect("it is our child");
        child.wait().expect("it is our child");
        let ourselves = Process::open(std::process::id()).expect("we run");
        channels.remember(&ourselves, place);
        assert_eq!(channels.place_of(&process), None);
        assert_eq!(channels.place_of(&ourselves), Some(place));
    }
}
