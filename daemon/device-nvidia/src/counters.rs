//! Counting the launches of processes that know nothing of it.
//!
//! A probe event of tracefs fires at the entry of each launch function of libcuda
//! (`cuGetProcAddress` hands out these same addresses), and perf counts it in one
//! process. Nothing is loaded into the process, and a thread that launches waits
//! for nobody: it takes a trap, 0.6 us on the machine where it was measured.
//!
//! What is deliberately not used:
//! - perf's own uprobe events with `inherit`: every later thread and fork of the
//!   process would fail with EFAULT.
//! - `inherit` without `inherit_thread`: a child that the process starts would be
//!   counted with it.
//! - Probes at the return of functions: those can end a process under a seccomp
//!   filter.
//!
//! perf attaches to a thread, not to a process. A thread inherits from the one
//! that starts it, so whether one that appears during the attach inherited or has
//! to be opened cannot be told; then all are closed and opened anew, until no
//! thread appears meanwhile. Else its launches would be lost or count twice.

mod elf;
mod lease;
mod maps;
mod perf;
mod tracefs;

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::time::Duration;

use gcgroup_device::{DeviceError, LaunchCounter, Launches};
use rustix::io::Errno;

pub use self::lease::remove_probes;
use self::lease::{Lease, Place};
use self::perf::Event;
pub use self::tracefs::can_count;
use self::tracefs::{Tracefs, perf_denied};
use crate::process::Process;

/// What a launch function hands to the GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Kernel,
    Graph,
}

/// What launches, and where it is found.
struct Launchers {
    /// How the library's file name begins.
    library: &'static str,
    functions: &'static [(&'static str, Kind)],
}

/// The launch functions of the CUDA driver. Those with `_ptsz` are what programs
/// call that were compiled for a default stream per thread. What is not in a
/// driver is left out.
const CUDA: Launchers = Launchers {
    library: "libcuda.so",
    functions: &[
        ("cuLaunchKernel", Kind::Kernel),
        ("cuLaunchKernel_ptsz", Kind::Kernel),
        ("cuLaunchKernelEx", Kind::Kernel),
        ("cuLaunchKernelEx_ptsz", Kind::Kernel),
        ("cuLaunchCooperativeKernel", Kind::Kernel),
        ("cuLaunchCooperativeKernel_ptsz", Kind::Kernel),
        ("cuGraphLaunch", Kind::Graph),
        ("cuGraphLaunch_ptsz", Kind::Graph),
    ],
};

/// How often the threads are opened anew, and the pauses between, the first and
/// the longest; 16 tries take 0.2 s and the time of the calls. A program starts
/// its threads in bursts.
const ATTEMPTS: u32 = 16;
const PAUSE_FIRST: Duration = Duration::from_micros(500);
const PAUSE_LONGEST: Duration = Duration::from_millis(20);

/// How often the threads are listed until a list is whole.
const LISTINGS: u32 = 8;

/// Begins to count the launches of a process. See
/// [`gcgroup_device::Counters::count_launches`].
///
/// # Errors
/// As there; [`DeviceError::Failed`] also while the process has not loaded libcuda
/// and while it starts threads without a pause: both are worth another try.
pub(crate) fn count_launches(pid: u32) -> Result<Box<dyn LaunchCounter>, DeviceError> {
    Ok(Box::new(Counter::attach(pid, &CUDA)?))
}

/// Counts in the threads of one process. Its descriptors are one a thread that
/// was there at the attach and event; those of ended threads stay, with their
/// counts.
struct Counter {
    process: Process,
    /// Dropped before the leases: an event in use cannot be removed.
    counts: Vec<(Kind, Event)>,
    _leases: Vec<Lease>,
}

impl Counter {
    fn attach(pid: u32, launchers: &Launchers) -> Result<Self, DeviceError> {
        can_count()?;
        let process = Process::open(pid).map_err(|errno| match errno {
            // INVAL and NOENT are what pidfd_open(2) says of a thread.
            Errno::SRCH | Errno::INVAL | Errno::NOENT => DeviceError::NoProcess(pid),
            errno => DeviceError::Failed(format!("opening process {pid}: {errno}")),
        })?;
        let leases = lease(pid, launchers)?;
        let counts = open_threads(pid, &leases)?;
        // If it lives now, all of the above was about it.
        if process.has_ended() {
            return Err(DeviceError::NoProcess(pid));
        }
        Ok(Self {
            process,
            counts,
            _leases: leases,
        })
    }
}

impl LaunchCounter for Counter {
    fn read(&mut self) -> Result<Launches, DeviceError> {
        let pid = self.process.pid();
        if self.process.has_ended() {
            return Err(DeviceError::NoProcess(pid));
        }
        let mut launches = Launches::default();
        for (kind, event) in &self.counts {
            let count = event.count().map_err(|errno| {
                DeviceError::Failed(format!("reading a count of process {pid}: {errno}"))
            })?;
            launches.total += count;
            match kind {
                Kind::Kernel => {}
                Kind::Graph => launches.graphs += count,
            }
        }
        Ok(launches)
    }
}

/// Has the events defined for the libraries that a process launches by.
fn lease(pid: u32, launchers: &Launchers) -> Result<Vec<Lease>, DeviceError> {
    let tracefs = Tracefs::find()?;
    let prefix = launchers.library;
    let libraries = maps::libraries(pid, prefix)?;
    if libraries.is_empty() {
        return Err(DeviceError::Failed(format!(
            "process {pid} has not loaded a library {prefix}* yet"
        )));
    }
    let mut leases = Vec::new();
    for library in libraries {
        let names: Vec<&str> = launchers.functions.iter().map(|(name, _)| *name).collect();
        let found = elf::functions(&library.file, &names).map_err(|reason| {
            DeviceError::Unsupported(format!(
                "the {prefix}* of process {pid} cannot be read: {reason}"
            ))
        })?;
        // Two names of one address are one function, and a call of it one launch.
        let mut places: Vec<Place> = Vec::new();
        for found in found {
            let (function, kind) = launchers.functions[found.name];
            let offset = found.offset;
            if places.iter().all(|place| place.offset != offset) {
                places.push(Place {
                    function,
                    kind,
                    offset,
                });
            }
        }
        if !places.is_empty() {
            leases.push(Lease::take(&tracefs, library.id, &library.file, &places)?);
        }
    }
    if leases.is_empty() {
        return Err(DeviceError::Unsupported(format!(
            "the {prefix}* of process {pid} has no launch function that is known"
        )));
    }
    Ok(leases)
}

/// Opens the events in every thread of a process, so that each later thread
/// inherits them and none has them twice.
fn open_threads(pid: u32, leases: &[Lease]) -> Result<Vec<(Kind, Event)>, DeviceError> {
    let mut pause = PAUSE_FIRST;
    for _ in 0..ATTEMPTS {
        let before = threads(pid)?;
        let mut counts = Vec::new();
        for tid in &before {
            open_thread(pid, *tid, leases, &mut counts)?;
        }
        // All that are there now were opened, or have ended; and one opened thread
        // starts no thread that does not inherit.
        if threads(pid)?.is_subset(&before) && !counts.is_empty() {
            return Ok(counts);
        }
        drop(counts);
        std::thread::sleep(pause);
        pause = (pause * 2).min(PAUSE_LONGEST);
    }
    Err(DeviceError::Failed(format!(
        "process {pid} starts threads all the time, none could be counted"
    )))
}

fn open_thread(
    pid: u32,
    tid: u32,
    leases: &[Lease],
    counts: &mut Vec<(Kind, Event)>,
) -> Result<(), DeviceError> {
    for event in leases.iter().flat_map(|lease| &lease.events) {
        match Event::in_thread(event.id, tid) {
            Ok(count) => counts.push((event.kind, count)),
            // It has ended. Those that it started are in the next list.
            Err(Errno::SRCH) => return Ok(()),
            Err(errno @ (Errno::ACCESS | Errno::PERM)) => return Err(perf_denied(pid, errno)),
            Err(errno @ (Errno::MFILE | Errno::NFILE)) => {
                return Err(DeviceError::Failed(format!(
                    "too few descriptors to count process {pid}: {errno}; it takes one a thread and \
                     launch function (RLIMIT_NOFILE, fs.file-max)"
                )));
            }
            Err(errno) => {
                return Err(DeviceError::Failed(format!(
                    "perf_event_open(2) on thread {tid} of process {pid}: {errno}"
                )));
            }
        }
    }
    Ok(())
}

/// The threads of a process. A list that is read while threads end can lack some
/// that live, so it is read until it has as many as the kernel says there are.
fn threads(pid: u32) -> Result<BTreeSet<u32>, DeviceError> {
    let of_io = |error: io::Error| match Errno::from_io_error(&error) {
        Some(Errno::NOENT | Errno::SRCH) => DeviceError::NoProcess(pid),
        _ => DeviceError::Failed(format!("listing the threads of process {pid}: {error}")),
    };
    let mut tids = BTreeSet::new();
    for _ in 0..LISTINGS {
        tids.clear();
        for entry in fs::read_dir(format!("/proc/{pid}/task")).map_err(of_io)? {
            let name = entry.map_err(of_io)?.file_name();
            tids.extend(name.to_str().and_then(|name| name.parse::<u32>().ok()));
        }
        let status = fs::read_to_string(format!("/proc/{pid}/status")).map_err(of_io)?;
        let number = status
            .lines()
            .find_map(|line| line.strip_prefix("Threads:"));
        if number.and_then(|number| number.trim().parse().ok()) == Some(tids.len()) {
            break;
        }
    }
    Ok(tids)
}

#[cfg(test)]
mod tests;
