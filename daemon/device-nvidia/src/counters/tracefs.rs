//! Probe events in tracefs.
//!
//! An event is defined by a line in `uprobe_events`, and stays until it is
//! removed by another, also when who defined it is gone. So its name tells whose
//! it is and of which place in which file; an event pins its file, so as long as
//! there is one of this name, no other file can have its device and inode.
//!
//! No event of ours ever gets a second place, though it would save descriptors:
//! the kernel refuses to remove an event in use, but of one with several places it
//! frees all but the last unasked, and the next call of such a place is a fault in
//! the kernel (unregister_trace_uprobe of kernel/trace/trace_uprobe.c, seen in
//! Linux 6.18). With the place in its name, the same name is the same place.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use gcgroup_device::DeviceError;
use rustix::fs::statfs;
use rustix::io::Errno;

use super::maps::own_path;
use super::perf::Event;

/// Where tracefs is mounted, the usual place first.
const MOUNTS: [&str; 2] = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"];

/// TRACEFS_MAGIC (include/uapi/linux/magic.h).
const MAGIC: i64 = 0x7472_6163;

const PREFIX: &str = "gcgroup";

/// A file, among all that the host has open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct LibraryId {
    pub(super) device: u64,
    pub(super) inode: u64,
}

/// Name of an event of ours: a function at one place of a library.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct EventName {
    pub(super) library: LibraryId,
    /// Letters, digits and underscores; ours, not the library's.
    pub(super) function: String,
    /// In the file, bytes.
    pub(super) offset: u64,
}

/// As `group/event`, the way tracefs writes it.
impl fmt::Display for EventName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let LibraryId { device, inode } = self.library;
        let Self {
            function, offset, ..
        } = self;
        write!(f, "{PREFIX}_{device:x}_{inode:x}/{function}_{offset:x}")
    }
}

impl EventName {
    fn parse(text: &str) -> Option<Self> {
        let number = |digits| u64::from_str_radix(digits, 16).ok();
        let (group, event) = text.split_once('/')?;
        let numbers = group.strip_prefix(PREFIX)?.strip_prefix('_')?;
        let (device, inode) = numbers.split_once('_')?;
        let (function, offset) = event.rsplit_once('_')?;
        let name = Self {
            library: LibraryId {
                device: number(device)?,
                inode: number(inode)?,
            },
            function: function.to_owned(),
            offset: number(offset)?,
        };
        // Not another way to write these numbers: that is not ours.
        (name.to_string() == text).then_some(name)
    }
}

/// What became of an event that was to be removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Removal {
    Removed,
    /// There was none.
    Absent,
    /// Somebody counts by it.
    InUse,
}

/// The mounted tracefs of this host.
#[derive(Clone, Debug)]
pub(super) struct Tracefs {
    root: PathBuf,
}

impl Tracefs {
    /// # Errors
    /// [`DeviceError::Unsupported`] where none is mounted or it has no probes.
    pub(super) fn find() -> Result<Self, DeviceError> {
        let is_tracefs = |path: &&str| statfs(*path).is_ok_and(|found| found.f_type == MAGIC);
        let Some(root) = MOUNTS.into_iter().find(is_tracefs) else {
            return Err(DeviceError::Unsupported(format!(
                "tracefs is not mounted at {}",
                MOUNTS.join(" or ")
            )));
        };
        let root = PathBuf::from(root);
        if !root.join("uprobe_events").exists() && root.join("events").exists() {
            return Err(DeviceError::Unsupported(format!(
                "{} has no uprobe_events: the kernel was built without CONFIG_UPROBE_EVENTS",
                root.display()
            )));
        }
        Ok(Self { root })
    }

    fn definitions(&self) -> PathBuf {
        self.root.join("uprobe_events")
    }

    /// Opens `uprobe_events` to add lines. It must never be truncated: that
    /// removes the events of everybody.
    fn open(&self) -> io::Result<File> {
        OpenOptions::new().append(true).open(self.definitions())
    }

    /// One line, which the kernel takes in one write.
    fn command(&self, line: &str) -> io::Result<()> {
        self.open()?.write_all(format!("{line}\n").as_bytes())
    }

    /// Defines an event; `library` is the file that its name tells. One that is
    /// there already is the same.
    ///
    /// # Errors
    /// [`DeviceError::Denied`], [`DeviceError::Failed`].
    pub(super) fn define(&self, name: &EventName, library: &File) -> Result<(), DeviceError> {
        // Not the file's own path: no byte of another's goes into a command.
        let line = format!("p:{name} {}:0x{:x}", own_path(library), name.offset);
        let Err(error) = self.command(&line) else {
            return Ok(());
        };
        match Errno::from_io_error(&error) {
            // By a service that died or runs beside this one.
            Some(Errno::EXIST) => Ok(()),
            Some(Errno::ACCESS | Errno::PERM | Errno::ROFS) => Err(self.denied(&error)),
            _ => Err(DeviceError::Failed(format!(
                "the kernel does not take the probe {name}: {error}"
            ))),
        }
    }

    /// The number by which perf knows an event.
    ///
    /// # Errors
    /// [`DeviceError::Failed`] when it is gone.
    pub(super) fn id(&self, name: &EventName) -> Result<u64, DeviceError> {
        let path = self.root.join("events").join(name.to_string()).join("id");
        let failed =
            |why: &dyn fmt::Display| DeviceError::Failed(format!("{}: {why}", path.display()));
        let text = fs::read_to_string(&path).map_err(|error| failed(&error))?;
        text.trim().parse().map_err(|error| failed(&error))
    }

    /// Removes an event that nobody uses.
    ///
    /// # Errors
    /// When the kernel refuses for another reason.
    pub(super) fn remove(&self, name: &EventName) -> io::Result<Removal> {
        let Err(error) = self.command(&format!("-:{name}")) else {
            return Ok(Removal::Removed);
        };
        match Errno::from_io_error(&error) {
            Some(Errno::NOENT) if self.definitions().exists() => Ok(Removal::Absent),
            Some(Errno::BUSY) => Ok(Removal::InUse),
            _ => Err(error),
        }
    }

    /// Every event of ours.
    ///
    /// # Errors
    /// When they cannot be listed.
    pub(super) fn ours(&self) -> io::Result<Vec<EventName>> {
        let listing = fs::read(self.definitions())?;
        Ok(names(&String::from_utf8_lossy(&listing)))
    }

    fn denied(&self, error: &io::Error) -> DeviceError {
        let lockdown = fs::read_to_string("/sys/kernel/security/lockdown").unwrap_or_default();
        let hint = if lockdown.contains("[confidentiality]") {
            "; the kernel is locked down for confidentiality"
        } else if Errno::from_io_error(error) == Some(Errno::ROFS) {
            "; a sandbox of the service mounts it so"
        } else {
            "; root may"
        };
        let path = self.definitions();
        DeviceError::Denied(format!("writing to {}: {error}{hint}", path.display()))
    }
}

/// Names of ours in the text of `uprobe_events`. One with several lines was made
/// by nobody here and must be left alone: to remove it could harm.
fn names(listing: &str) -> Vec<EventName> {
    let mut places: BTreeMap<&str, u32> = BTreeMap::new();
    for line in listing.lines() {
        let definition = line.split_once(':').map(|(_, rest)| rest);
        if let Some(name) = definition.and_then(|rest| rest.split(' ').next()) {
            *places.entry(name).or_default() += 1;
        }
    }
    let once = places.into_iter().filter(|(_, number)| *number == 1);
    once.filter_map(|(name, _)| EventName::parse(name))
        .collect()
}

/// Whether this host can count, and if not, what it lacks. Changes nothing.
///
/// # Errors
/// [`DeviceError::Unsupported`] where tracefs or a kernel's feature is missing,
/// [`DeviceError::Denied`] where the rights are.
pub fn can_count() -> Result<(), DeviceError> {
    let tracefs = Tracefs::find()?;
    if let Err(error) = tracefs.open() {
        return Err(tracefs.denied(&error));
    }
    let trial = |pid| match Event::trial(pid) {
        Ok(_) => Ok(()),
        Err(Errno::INVAL) => Err(DeviceError::Unsupported(
            "the kernel cannot count by process (perf's inherit_thread is in Linux from 5.13 on)"
                .to_owned(),
        )),
        Err(Errno::NOSYS) => Err(DeviceError::Unsupported(
            "the kernel was built without CONFIG_PERF_EVENTS".to_owned(),
        )),
        Err(errno @ (Errno::ACCESS | Errno::PERM)) => Err(perf_denied(pid, errno)),
        Err(errno) => Err(DeviceError::Failed(format!("perf_event_open(2): {errno}"))),
    };
    trial(std::process::id())?;
    // A process that is always there, and another's for most.
    trial(1)
}

/// What to say when perf refuses a process for want of rights.
pub(super) fn perf_denied(pid: u32, errno: Errno) -> DeviceError {
    let path = Path::new("/proc/sys/kernel/perf_event_paranoid");
    let paranoid = fs::read_to_string(path).unwrap_or_default();
    DeviceError::Denied(format!(
        "perf_event_open(2) on process {pid}: {errno}; with kernel.perf_event_paranoid {} it takes \
         CAP_PERFMON, and no seccomp filter that forbids it",
        paranoid.trim()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIBRARY: LibraryId = LibraryId {
        device: 0xfd00,
        inode: 0x1a2b,
    };

    fn event(library: LibraryId, function: &str, offset: u64) -> EventName {
        EventName {
            library,
            function: function.to_owned(),
            offset,
        }
    }

    #[test]
    fn names_tell_file_function_and_place() {
        let name = event(LIBRARY, "cuGraphLaunch_ptsz", 0x10f9);
        let text = "gcgroup_fd00_1a2b/cuGraphLaunch_ptsz_10f9";
        assert_eq!(name.to_string(), text);
        assert_eq!(EventName::parse(text), Some(name));
        let largest = LibraryId {
            device: u64::MAX,
            inode: u64::MAX,
        };
        for (function, _) in super::super::CUDA.functions {
            let name = event(largest, function, u64::MAX);
            let text = name.to_string();
            // MAX_EVENT_NAME_LEN of the kernel, 64 with the end.
            assert!(text.split('/').all(|part| part.len() < 64), "{text}");
            assert_eq!(EventName::parse(&text), Some(name));
        }
    }

    #[test]
    fn names_of_others_are_not_ours() {
        for other in [
            "gcgroup_fd00_1a2b/cuGraphLaunch",
            "gcgroup_fd00_1a2b/10f9",
            "gcgroup_fd00_1a2b",
            "gcgroup_fd00/cuGraphLaunch_10f9",
            "gcgroup_0fd00_1a2b/cuGraphLaunch_10f9",
            "gcgroup_FD00_1a2b/cuGraphLaunch_10f9",
            "gcgroup_+fd00_1a2b/cuGraphLaunch_10f9",
            "gcgroups_fd00_1a2b/cuGraphLaunch_10f9",
            "probe_libc/malloc_10f9",
            "",
        ] {
            assert_eq!(EventName::parse(other), None, "{other}");
        }
    }

    #[test]
    fn an_event_with_several_places_is_left_alone() {
        let listing = "\
p:gcgroup_fd00_1a2b/cuLaunchKernel_10f9 /proc/self/fd/9:0x00000000000010f9
p:gcgroup_fd00_1a2b/cuGraphLaunch_1100 /proc/self/fd/9:0x0000000000001100
p:gcgroup_fd00_1a2b/cuGraphLaunch_1100 /usr/lib/libcuda.so.1:0x0000000000001200
p:probe_libc/malloc /usr/lib/libc.so.6:0x0000000000001100 arg1=%di
";
        let found = names(listing);
        assert_eq!(found, [event(LIBRARY, "cuLaunchKernel", 0x10f9)]);
    }
}
