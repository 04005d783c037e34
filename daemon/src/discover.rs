//! Who computes on a GPU: one task a GPU that asks the driver for its list.
//!
//! The list is short and the question cheap (31 us on an H200), and no driver
//! tells of a new context by itself. The end of a process is not asked for: its
//! pidfd tells.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use gcgroup_device::{GpuInfo, GpuProcess, Host, ProcessKind};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::sync::mpsc::UnboundedSender;

use crate::controller::Event;
use crate::{launch, procfs};

/// Between two looks. An entry shall be there within 200 ms of the context.
const LOOK: Duration = Duration::from_millis(80);
/// The same while the GPU does not answer.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// Each so manyth look asks for control groups too: once in 1.2 s.
const LOOKS_A_MOVE: u64 = 15;
/// Ancestors that are followed; init is among them on any sane host.
const ANCESTORS: usize = 128;

/// A process that was found on a GPU.
#[derive(Debug)]
pub(crate) struct Found {
    /// Thread-group id.
    pub(crate) pid: u32,
    /// Start time in clock ticks since boot.
    pub(crate) start: u64,
    /// What it is to the driver.
    pub(crate) kind: ProcessKind,
    /// Device memory it uses, bytes.
    pub(crate) memory_bytes: Option<u64>,
    /// What its directory shows.
    pub(crate) facts: procfs::Facts,
    /// Names it for good.
    pub(crate) pidfd: OwnedFd,
    /// Pid and start time of itself, its parent, and so on.
    pub(crate) lineage: Vec<(u32, u64)>,
}

/// A process of an earlier look.
struct Known {
    start: u64,
    /// Readable once it has ended: its pid may be another's then.
    pidfd: OwnedFd,
    memory_bytes: Option<u64>,
    /// Control group at the last look that asked for it.
    cgroup: String,
    /// Whether the controller was told.
    told: bool,
}

/// Tells the controller who comes, goes and grows, until it has ended.
pub(crate) async fn watch(host: Arc<dyn Host>, gpu: GpuInfo, events: UnboundedSender<Event>) {
    let mut known = HashMap::new();
    let mut last_error = None;
    for look in 0_u64.. {
        let moves = look % LOOKS_A_MOVE == 0;
        let (asked, of) = (host.clone(), gpu.clone());
        // In a thread of its own: /proc is read, which may take a while.
        let look = launch::blocking(move || {
            let mut known = known;
            let mut changes = asked
                .processes(&of)
                .map(|listed| changes(of.index, listed, &mut known));
            if let (Ok(changes), true) = (&mut changes, moves) {
                changes.extend(self::moves(&mut known));
            }
            (known, changes)
        });
        let changes = match look.await {
            Ok((back, changes)) => {
                known = back;
                changes.map_err(|error| error.to_string())
            }
            Err(refusal) => {
                known = HashMap::new();
                Err(refusal.to_string())
            }
        };
        let pause = match changes {
            Ok(changes) => {
                last_error = None;
                for event in changes {
                    if events.send(event).is_err() {
                        return;
                    }
                }
                LOOK
            }
            Err(error) => {
                if last_error.as_ref() != Some(&error) {
                    tracing::warn!(gpu = gpu.index, error, "processes could not be listed");
                    last_error = Some(error);
                }
                LOOK_AGAIN
            }
        };
        if events.is_closed() {
            return;
        }
        tokio::time::sleep(pause).await;
    }
}

/// What has changed since the last look.
fn changes(gpu: u32, listed: Vec<GpuProcess>, known: &mut HashMap<u32, Known>) -> Vec<Event> {
    let mut changes = Vec::new();
    let ended = ended(known);
    let is_there =
        |pid: &u32| !ended.contains(pid) && listed.iter().any(|process| process.pid == *pid);
    let gone: Vec<u32> = known.keys().filter(|pid| !is_there(pid)).copied().collect();
    for pid in gone {
        if let Some(Known {
            start, told: true, ..
        }) = known.remove(&pid)
        {
            changes.push(Event::Vanished { gpu, pid, start });
        }
    }
    let mut figures = Vec::new();
    for process in listed {
        if let Some(known) = known.get_mut(&process.pid) {
            if known.told && known.memory_bytes != process.memory_bytes {
                known.memory_bytes = process.memory_bytes;
                figures.extend(process.memory_bytes.map(|bytes| (process.pid, bytes)));
            }
            continue;
        }
        // One that ended before it could be looked at is left out.
        let Some(found) = identify(&process) else {
            continue;
        };
        // Workers, private MPS servers and trials descend from this process.
        let ours = found
            .lineage
            .iter()
            .any(|(pid, _)| *pid == std::process::id());
        let Ok(pidfd) = found.pidfd.try_clone() else {
            tracing::warn!(pid = found.pid, "no descriptor is left for a process");
            continue;
        };
        let entry = Known {
            start: found.start,
            pidfd,
            memory_bytes: process.memory_bytes,
            cgroup: found.facts.cgroup.clone(),
            told: !ours,
        };
        known.insert(process.pid, entry);
        if !ours {
            let found = Box::new(found);
            changes.push(Event::Appeared { gpu, found });
        }
    }
    if !figures.is_empty() {
        changes.push(Event::Memory { gpu, figures });
    }
    changes
}

/// Who is in another control group than before.
fn moves(known: &mut HashMap<u32, Known>) -> Vec<Event> {
    let mut moved = Vec::new();
    for (pid, known) in known.iter_mut().filter(|(_, known)| known.told) {
        let cgroup = procfs::cgroup(*pid);
        // Nothing is read of one that has just ended.
        if !cgroup.is_empty() && cgroup != known.cgroup {
            known.cgroup.clone_from(&cgroup);
            moved.push(Event::Moved {
                pid: *pid,
                start: known.start,
                cgroup,
            });
        }
    }
    moved
}

/// Which of these processes have ended, asked with one call for all.
fn ended(known: &HashMap<u32, Known>) -> Vec<u32> {
    let mut pids = Vec::with_capacity(known.len());
    let mut fds = Vec::with_capacity(known.len());
    for (pid, known) in known {
        pids.push(*pid);
        fds.push(PollFd::new(&known.pidfd, PollFlags::IN));
    }
    if let Err(error) = poll(&mut fds, Some(&Timespec::default())) {
        tracing::debug!(%error, "ends of processes were not looked for");
    }
    let ended = |fd: &PollFd<'_>| fd.revents().contains(PollFlags::IN);
    pids.into_iter()
        .zip(&fds)
        .filter(|(_, fd)| ended(fd))
        .map(|(pid, _)| pid)
        .collect()
}

fn identify(process: &GpuProcess) -> Option<Found> {
    let start = procfs::process_start(process.pid)?;
    Some(Found {
        pid: process.pid,
        start,
        kind: process.kind,
        memory_bytes: process.memory_bytes,
        facts: procfs::facts(process.pid),
        pidfd: open(process.pid, start)?,
        lineage: lineage(process.pid, start),
    })
}

/// A pidfd of the process that has this start time; `None` when it has ended.
pub(crate) fn open(pid: u32, start: u64) -> Option<OwnedFd> {
    let raw = i32::try_from(pid).ok().and_then(Pid::from_raw)?;
    let pidfd = pidfd_open(raw, PidfdFlags::empty()).ok()?;
    // The descriptor names one process; look again that it is the right one.
    procfs::is_running(pid, start).then_some(pidfd)
}

fn lineage(pid: u32, start: u64) -> Vec<(u32, u64)> {
    let mut lineage = vec![(pid, start)];
    let mut of = pid;
    while lineage.len() < ANCESTORS
        && let Some(parent) = procfs::parent(of)
        && let Some(start) = procfs::start_time(parent)
    {
        lineage.push((parent, start));
        of = parent;
    }
    lineage
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lineage_of_a_child_leads_here() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .expect("sleep(1) exists");
        let start = procfs::start_time(child.id()).expect("it runs");
        let line = lineage(child.id(), start);
        assert_eq!(line[0], (child.id(), start));
        assert_eq!(line[1].0, std::process::id());
        assert!(open(child.id(), start).is_some());
        assert!(open(child.id(), start + 1).is_none(), "another process");
        child.kill().expect("it is our child");
        child.wait().expect("it is our child");
        assert!(open(child.id(), start).is_none());
    }

    #[test]
    fn who_comes_goes_and_grows_is_told_once() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .expect("sleep(1) exists");
        let pid = child.id();
        let mut known = HashMap::new();
        let listed = |bytes| {
            vec![GpuProcess {
                pid,
                kind: ProcessKind::Program,
                memory_bytes: Some(bytes),
            }]
        };
        // A child of this process counts as one of our own.
        assert!(changes(0, listed(1), &mut known).is_empty());
        known.get_mut(&pid).expect("it is known").told = true;
        let grown = changes(0, listed(2), &mut known);
        assert!(
            matches!(&grown[..], [Event::Memory { gpu: 0, figures }] if *figures == [(pid, 2)])
        );
        assert!(changes(0, listed(2), &mut known).is_empty());
        let gone = changes(0, Vec::new(), &mut known);
        assert!(matches!(&gone[..], [Event::Vanished { gpu: 0, pid: left, .. }] if *left == pid));
        changes(0, listed(2), &mut known);
        known.get_mut(&pid).expect("it is known again").told = true;
        child.kill().expect("it is our child");
        child.wait().expect("it is our child");
        // Whoever has its pid now, it is not the one that was known.
        let over = changes(0, listed(2), &mut known);
        assert!(matches!(&over[..], [Event::Vanished { gpu: 0, .. }]));
    }
}
