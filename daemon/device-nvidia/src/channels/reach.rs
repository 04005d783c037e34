//! The driver's descriptors of another process.
//!
//! The process chooses what it has open, so nothing here waits for a file system
//! of its: a descriptor is looked at through its link in /proc with a statx(2)
//! that takes what the kernel knows (AT_STATX_DONT_SYNC), as a server of FUSE or
//! NFS may never answer. Only the table of the main thread is seen, which all
//! threads share unless one gave its own up on purpose.

use std::collections::HashMap;
use std::fmt;
use std::os::fd::{AsFd, OwnedFd, RawFd};

use gcgroup_device::DeviceError;
use rustix::fs::{AtFlags, Dir, Mode, OFlags, StatxFlags, open, statx};
use rustix::io::Errno;
use rustix::process::{PidfdGetfdFlags, pidfd_getfd};

use super::rm::{Control, is_control};
use crate::process::{self, Process};

/// Descriptors of a process that are looked through. Listing that many takes
/// some 30 ms, by the figures below.
const DESCRIPTORS_MAX: usize = 0x1_0000;

/// Descriptors of /dev/nvidiactl among them. A program has a few.
const CONTROLS_MAX: usize = 1024;

/// Descriptors whose numbers were seen before that are looked at again in a
/// search for what is recent, in turn: one that was closed may have come back
/// as the driver's under the same number. Looking at one takes 3 us and listing
/// 1,000 takes 0.5 ms (measured with a child that has 1,000 open files, on
/// a busy virtual machine), so all of them each time would be 3 ms. These take
/// 0.2 ms, and a number of those 1,000 is looked at each 16 searches.
pub(super) const AGAIN: usize = 64;

pub(super) fn open_process(pid: u32) -> Result<Process, DeviceError> {
    Process::open(pid).map_err(|errno| match errno {
        Errno::SRCH => DeviceError::NoProcess(pid),
        // A thread's id, which names no process.
        Errno::INVAL | Errno::NOENT => DeviceError::NoProcess(pid),
        other => DeviceError::Failed(format!("opening process {pid}: {other}")),
    })
}

/// The descriptors of a process as they were last seen.
#[derive(Debug, Default)]
pub(super) struct Descriptors {
    /// By number, whether each is one of /dev/nvidiactl.
    seen: HashMap<RawFd, bool>,
    /// From which number on they are looked at again next.
    next: RawFd,
}

impl Descriptors {
    /// Looks at all of them.
    pub(super) fn of(pid: u32) -> Result<Self, DeviceError> {
        let mut descriptors = Self::default();
        descriptors.refresh(pid, 0)?;
        Ok(descriptors)
    }

    /// Whether none was seen.
    pub(super) fn is_empty(&self) -> bool {
        self.seen.is_empty()
    }

    /// Looks at those that are new, and at so many of the others. Returns whether
    /// the driver was opened on one of them.
    pub(super) fn refresh(&mut self, pid: u32, again: usize) -> Result<bool, DeviceError> {
        let directory = open_directory(pid)?;
        let numbers = numbers(pid, &directory)?;
        let first = numbers.partition_point(|fd| *fd < self.next);
        let turn = first..first.saturating_add(again);
        let mut now = HashMap::with_capacity(numbers.len());
        let mut opened = false;
        for (place, fd) in numbers.iter().enumerate() {
            let before = self.seen.get(fd).copied();
            // The turn goes on with the lowest numbers.
            let due = turn.contains(&place) || turn.contains(&(place + numbers.len()));
            let is_control = match before {
                Some(is_control) if !due => is_control,
                Some(_) | None => points_to_control(&directory, *fd),
            };
            opened |= is_control && before != Some(true);
            now.insert(*fd, is_control);
        }
        let last = numbers.get(turn.end.wrapping_sub(1)).copied();
        let wrapped = || {
            numbers
                .get(turn.end.wrapping_sub(numbers.len() + 1))
                .copied()
        };
        self.next = last.or_else(wrapped).map_or(0, |fd| fd + 1);
        self.seen = now;
        Ok(opened)
    }

    /// Those of /dev/nvidiactl, lowest first.
    pub(super) fn controls(&self, process: &Process) -> Result<Vec<RawFd>, DeviceError> {
        let pid = process.pid();
        let controls = self.seen.iter().filter(|(_, is_control)| **is_control);
        let mut controls: Vec<RawFd> = controls.map(|(fd, _)| *fd).collect();
        controls.sort_unstable();
        if controls.len() > CONTROLS_MAX {
            return Err(DeviceError::Failed(format!(
                "process {pid} has opened the driver {} times; at most {CONTROLS_MAX} are searched",
                controls.len()
            )));
        }
        if !controls.is_empty() {
            return Ok(controls);
        }
        // A process that ends loses them first.
        if process.has_ended() {
            return Err(DeviceError::NoProcess(pid));
        }
        if process::main_thread_has_ended(pid) {
            return Err(DeviceError::Failed(format!(
                "the main thread of process {pid} has ended, so that its descriptors cannot be reached"
            )));
        }
        Err(DeviceError::NoContext(format!(
            "process {pid} has not opened the driver"
        )))
    }
}

fn open_directory(pid: u32) -> Result<OwnedFd, DeviceError> {
    let path = format!("/proc/{pid}/fd");
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    open(path, flags, Mode::empty()).map_err(|errno| unread(pid, errno))
}

/// The numbers of its descriptors, ascending.
fn numbers(pid: u32, directory: &OwnedFd) -> Result<Vec<RawFd>, DeviceError> {
    let entries = Dir::read_from(directory).map_err(|errno| unread(pid, errno))?;
    let mut numbers = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|errno| unread(pid, errno))?;
        let name = entry.file_name().to_str().ok();
        // The others are `.` and `..`.
        numbers.extend(name.and_then(|name| name.parse::<RawFd>().ok()));
        if numbers.len() > DESCRIPTORS_MAX {
            return Err(DeviceError::Failed(format!(
                "process {pid} has more than the {DESCRIPTORS_MAX} descriptors that are looked through"
            )));
        }
    }
    numbers.sort_unstable();
    Ok(numbers)
}

fn unread(pid: u32, errno: Errno) -> DeviceError {
    match errno {
        Errno::NOENT | Errno::SRCH => DeviceError::NoProcess(pid),
        Errno::ACCESS | Errno::PERM => {
            DeviceError::Denied(format!("reading the descriptors of process {pid}"))
        }
        other => DeviceError::Failed(format!("reading the descriptors of process {pid}: {other}")),
    }
}

/// Follows the link of a descriptor: the path that it shows belongs to the mount
/// namespace of that process, the device behind it to all.
fn points_to_control(directory: &OwnedFd, fd: RawFd) -> bool {
    let flags = AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
    let found = statx(directory.as_fd(), fd.to_string(), flags, StatxFlags::TYPE);
    found.is_ok_and(|stat| {
        let number = (stat.stx_rdev_major, stat.stx_rdev_minor);
        is_control(u32::from(stat.stx_mode), number)
    })
}

/// A duplicate of a descriptor of that process, to be dropped before the
/// operation returns; `None` when it was closed meanwhile.
pub(super) fn duplicate(process: &Process, fd: RawFd) -> Result<Option<Control>, DeviceError> {
    let refused =
        |why: &dyn fmt::Display| format!("taking a descriptor of process {}{why}", process.pid());
    match pidfd_getfd(process, fd, PidfdGetfdFlags::empty()) {
        Ok(file) => Ok(Control::from_duplicate(file)),
        Err(Errno::BADF) => Ok(None),
        Err(Errno::SRCH) => Err(DeviceError::NoProcess(process.pid())),
        Err(Errno::PERM | Errno::ACCESS) => {
            let why = refused(&", which needs CAP_SYS_PTRACE");
            Err(DeviceError::Denied(why))
        }
        Err(Errno::NOSYS) => Err(DeviceError::Unsupported(
            "pidfd_getfd needs Linux 5.6".to_owned(),
        )),
        Err(errno) => Err(DeviceError::Failed(refused(&format_args!(": {errno}")))),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::{BufRead, BufReader};
    use std::os::fd::AsRawFd;
    use std::process::{Command, Stdio};
    use std::time::Instant;

    use rustix::fs::{CWD, FileType, makedev, mknodat};

    use super::*;

    #[test]
    fn a_descriptor_that_is_not_the_drivers_is_not_kept() {
        let null = fs::File::open("/dev/null").expect("there is a null device");
        let process = Process::open(std::process::id()).expect("we run");
        let count = || {
            let entries = fs::read_dir("/proc/self/fd").expect("proc is mounted");
            let links = entries.flatten().map(|entry| fs::read_link(entry.path()));
            links
                .flatten()
                .filter(|link| link.as_os_str() == "/dev/null")
                .count()
        };
        let before = count();
        let duplicated = duplicate(&process, null.as_raw_fd()).expect("we may trace ourselves");
        assert!(duplicated.is_none());
        assert_eq!(count(), before);
    }

    #[test]
    fn a_process_without_the_drivers_descriptors_has_no_context() {
        let null = fs::File::open("/dev/null").expect("there is a null device");
        let process = Process::open(std::process::id()).expect("we run");
        let found = Descriptors::of(process.pid()).expect("we may read our own");
        assert_eq!(found.seen.get(&null.as_raw_fd()), Some(&false));
        let mut empty = Descriptors::default();
        let expected = format!("process {} has not opened the driver", process.pid());
        assert_eq!(
            empty.controls(&process),
            Err(DeviceError::NoContext(expected))
        );
        empty.seen = (0..=CONTROLS_MAX as RawFd).map(|fd| (fd, true)).collect();
        let error = empty.controls(&process).expect_err("they are too many");
        assert!(
            error
                .to_string()
                .ends_with("opened the driver 1025 times; at most 1024 are searched")
        );
    }

    #[test]
    fn a_number_that_comes_back_as_the_drivers_is_seen() {
        let path = std::env::temp_dir().join(format!("nvidiactl-{}", std::process::id()));
        let mode = Mode::RUSR | Mode::WUSR;
        if mknodat(
            CWD,
            &path,
            FileType::CharacterDevice,
            mode,
            makedev(195, 255),
        )
        .is_err()
        {
            println!("skipped: no device can be made here");
            return;
        }
        let node = open(&path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
        fs::remove_file(&path).expect("it was just made");
        let node = node.expect("it is there");
        let null = fs::File::open("/dev/null").expect("there is a null device");
        let mut reused = OwnedFd::from(null);
        let pid = std::process::id();
        let mut descriptors = Descriptors::of(pid).expect("we may read our own");
        assert_eq!(descriptors.seen.get(&reused.as_raw_fd()), Some(&false));
        assert_eq!(descriptors.seen.get(&node.as_raw_fd()), Some(&true));
        rustix::io::dup2(&node, &mut reused).expect("both are open");
        let rounds = descriptors.seen.len() / AGAIN + 2;
        let opened = (0..rounds).any(|_| {
            let opened = descriptors.refresh(pid, AGAIN);
            opened.expect("we may read our own")
        });
        assert!(opened);
        assert_eq!(descriptors.seen.get(&reused.as_raw_fd()), Some(&true));
    }

    #[test]
    fn a_thousand_descriptors_are_looked_at_again_in_turn() {
        let script = "ulimit -n 2048; for i in {1..1000}; do exec {fd}</dev/null; done; echo; read";
        let mut child = Command::new("bash")
            .args(["-c", script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("bash is everywhere");
        let output = child.stdout.take().expect("it is piped");
        let mut line = String::new();
        BufReader::new(output)
            .read_line(&mut line)
            .expect("it writes");
        let mut descriptors = Descriptors::of(child.id()).expect("the child runs");
        let all = descriptors.seen.len();
        assert!(all >= 1000, "{all}");
        // As if each had been the driver's: those that were looked at are not.
        descriptors.seen.values_mut().for_each(|it| *it = true);
        let mut left = Vec::new();
        for _ in 0..all / AGAIN + 1 {
            let begun = Instant::now();
            let opened = descriptors.refresh(child.id(), AGAIN);
            println!("{all} descriptors, {AGAIN} again: {:?}", begun.elapsed());
            assert_eq!(opened, Ok(false));
            left.push(descriptors.seen.values().filter(|it| **it).count());
        }
        let begun = Instant::now();
        let known = descriptors.refresh(child.id(), 0);
        println!("{all} descriptors, 0 again: {:?}", begun.elapsed());
        child.kill().expect("it is our child");
        child.wait().expect("it is our child");
        assert_eq!(known, Ok(false));
        assert_eq!(left[..2], [all - AGAIN, all - 2 * AGAIN]);
        assert_eq!(left.last(), Some(&0));
        let gone = descriptors.refresh(child.id(), AGAIN);
        assert_eq!(gone, Err(DeviceError::NoProcess(child.id())));
    }
}
