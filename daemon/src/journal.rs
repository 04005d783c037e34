//! What must be undone when the service is gone, however it went.
//!
//! One JSON file in the state directory, rewritten whole and renamed into place
//! whenever a helper process begins or ends, and before the first stop of each
//! process; never on the way of a later setting. Writing it takes 54 us with 20
//! armed processes of 20 channels each, 0.2 ms with 100 and 2.4 ms with 1000
//! (tmpfs, two busy cores), which is little for one file that is whole at any
//! time. The directory lies on tmpfs, so nothing is synced: after a power cut
//! nothing of ours runs. The state directory's lock keeps recovery away from a
//! living service.

mod lock;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use gcgroup_device::ChannelSet;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::procfs;

pub(crate) use lock::{LockError, Role, lock, lock_to_recover};

const FILE: &str = "journal.json";
/// A helper process, named for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Helper {
    /// Its pid.
    pub(crate) pid: u32,
    /// Its start time in clock ticks since boot.
    pub(crate) start: u64,
}

/// A private MPS server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MpsRecord {
    /// Its control process.
    pub(crate) process: Helper,
    /// Its pipes.
    pub(crate) directory: PathBuf,
}

/// Which host a service worked on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum HostKind {
    /// The real one.
    #[default]
    Nvidia,
    /// A simulated one, whose socket lies in the state directory.
    Sim,
}

/// A GPU with armed processes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ArmedGpu {
    /// NVML index when it was noted.
    pub(crate) index: u32,
    /// UUID, which names it for good.
    pub(crate) uuid: String,
}

/// A process that may be stopped on a GPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Armed {
    /// The process.
    pub(crate) process: Helper,
    /// Where it may be stopped.
    pub(crate) gpu: ArmedGpu,
    /// Its channels when it was noted. Hints: it may have others by now.
    pub(crate) set: ChannelSet,
}

/// The journal's contents. What a journal of an earlier version lacks was not
/// there to be undone.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Records {
    /// Where the control files are mounted.
    pub(crate) mountpoint: Option<PathBuf>,
    /// Workers that may live.
    pub(crate) workers: Vec<Helper>,
    /// MPS servers that may live.
    pub(crate) mps: Vec<MpsRecord>,
    /// Processes that may be stopped.
    #[serde(default)]
    pub(crate) armed: Vec<Armed>,
    /// Whose channels they are.
    #[serde(default)]
    pub(crate) host: HostKind,
}

/// The journal of a running service.
#[derive(Debug)]
pub(crate) struct Journal {
    state: PathBuf,
    /// `None` once it was closed. The lock is held while the file is written.
    records: Mutex<Option<Records>>,
}

impl Journal {
    /// Begins a journal for this mount; what an earlier one said is forgotten,
    /// so recover first. Only the living processes that it could not resume stay
    /// listed, where it is the same host.
    ///
    /// # Errors
    /// Those of writing it.
    pub(crate) fn begin(state: &Path, mountpoint: &Path, host: HostKind) -> io::Result<Self> {
        let mut armed = match load(state) {
            Ok(Some(earlier)) if earlier.host == host => earlier.armed,
            Ok(_) | Err(_) => Vec::new(),
        };
        armed.retain(|armed| procfs::is_running(armed.process.pid, armed.process.start));
        let records = Records {
            mountpoint: Some(mountpoint.to_owned()),
            armed,
            host,
            ..Records::default()
        };
        write(state, &records)?;
        Ok(Self {
            state: state.to_owned(),
            records: Mutex::new(Some(records)),
        })
    }

    /// Ends it: from now on every change is an error, so nobody is stopped that
    /// what this returns does not name. `None` when it was closed before.
    pub(crate) fn close(&self) -> Option<Records> {
        self.records.lock().take()
    }

    /// The state directory that it lies in.
    pub(crate) fn state(&self) -> &Path {
        &self.state
    }

    fn update(&self, change: impl FnOnce(&mut Records)) -> io::Result<()> {
        let mut records = self.records.lock();
        let records = records.as_mut().ok_or_else(closed)?;
        change(records);
        write(&self.state, records)
    }

    /// Notes a worker.
    ///
    /// # Errors
    /// Those of writing it.
    pub(crate) fn add_worker(&self, pid: u32, start: u64) -> io::Result<()> {
        self.update(|records| records.workers.push(Helper { pid, start }))
    }

    /// Forgets a worker that was reaped.
    ///
    /// # Errors
    /// Those of writing it.
    pub(crate) fn drop_worker(&self, pid: u32) -> io::Result<()> {
        self.update(|records| records.workers.retain(|worker| worker.pid != pid))
    }

    /// Notes an MPS server.
    ///
    /// # Errors
    /// Those of writing it.
    pub(crate) fn add_mps(&self, record: MpsRecord) -> io::Result<()> {
        self.update(|records| records.mps.push(record))
    }

    /// Forgets an MPS server that was ended.
    ///
    /// # Errors
    /// Those of writing it.
    pub(crate) fn drop_mps(&self, directory: &Path) -> io::Result<()> {
        self.update(|records| records.mps.retain(|record| record.directory != directory))
    }

    /// Notes a process before its first stop on a GPU; what was noted of it there
    /// is replaced.
    ///
    /// # Errors
    /// Those of writing it; the process must not be stopped then.
    pub(crate) fn arm(&self, armed: Armed) -> io::Result<()> {
        self.update(|records| {
            records
                .armed
                .retain(|other| other.process != armed.process || other.gpu.uuid != armed.gpu.uuid);
            records.armed.push(armed);
        })
    }

    /// Whether a process may be stopped on this GPU.
    pub(crate) fn is_armed(&self, pid: u32, start: u64, gpu_uuid: &str) -> bool {
        let process = Helper { pid, start };
        let records = self.records.lock();
        let mut armed = records.iter().flat_map(|records| &records.armed);
        armed.any(|armed| armed.process == process && armed.gpu.uuid == gpu_uuid)
    }

    /// Forgets a process on one GPU: nothing stops it there any more. Costs
    /// nothing where it was never noted.
    ///
    /// # Errors
    /// Those of writing it.
    pub(crate) fn disarm(&self, pid: u32, start: u64, gpu_uuid: &str) -> io::Result<()> {
        let process = Helper { pid, start };
        self.disarm_those(|armed| armed.process == process && armed.gpu.uuid == gpu_uuid)
    }

    /// Forgets a process that has ended, on all GPUs. Costs nothing where it was
    /// never noted.
    ///
    /// # Errors
    /// Those of writing it.
    pub(crate) fn disarm_process(&self, pid: u32, start: u64) -> io::Result<()> {
        let process = Helper { pid, start };
        self.disarm_those(|armed| armed.process == process)
    }

    fn disarm_those(&self, those: impl Fn(&Armed) -> bool) -> io::Result<()> {
        let mut records = self.records.lock();
        let records = records.as_mut().ok_or_else(closed)?;
        let before = records.armed.len();
        records.armed.retain(|armed| !those(armed));
        if records.armed.len() == before {
            return Ok(());
        }
        write(&self.state, records)
    }
}

fn closed() -> io::Error {
    io::Error::other("the service is ending, and its journal is closed")
}

/// Writes the journal whole.
///
/// # Errors
/// Those of writing and renaming it.
pub(crate) fn write(state: &Path, records: &Records) -> io::Result<()> {
    let fresh = state.join("journal.new");
    fs::write(&fresh, serde_json::to_vec(records)?)?;
    fs::rename(fresh, state.join(FILE))
}

/// What the journal in a state directory says; `None` where there is none.
///
/// # Errors
/// A journal that cannot be read or understood.
pub(crate) fn load(state: &Path) -> Result<Option<Records>> {
    let path = state.join(FILE);
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    };
    serde_json::from_slice(&text)
        .map(Some)
        .with_context(|| format!("{} is not a journal", path.display()))
}

/// Whether there is a journal in a state directory.
pub(crate) fn exists(state: &Path) -> bool {
    state.join(FILE).exists()
}

/// Removes the journal: nothing is left to undo.
///
/// # Errors
/// Those of unlink(2); none when there was no journal.
pub(crate) fn remove(state: &Path) -> io::Result<()> {
    match fs::remove_file(state.join(FILE)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Renames a journal that cannot be read, for people to look at.
///
/// # Errors
/// Those of rename(2).
pub(crate) fn set_aside(state: &Path) -> io::Result<PathBuf> {
    let aside = state.join("journal.damaged");
    fs::rename(state.join(FILE), &aside)?;
    Ok(aside)
}

#[cfg(test)]
mod tests {
    use super::*;
    use gcgroup_device::Handle;

    fn begin(state: &Path) -> Journal {
        Journal::begin(state, Path::new("/mnt"), HostKind::Sim).expect("writable")
    }

    fn read(state: &Path) -> Records {
        load(state).expect("readable").expect("there is one")
    }

    fn armed(pid: u32, start: u64, gpu: u32, objects: &[u32]) -> Armed {
        let handle = |&object| Handle { client: 1, object };
        Armed {
            process: Helper { pid, start },
            gpu: ArmedGpu {
                index: gpu,
                uuid: format!("GPU-{gpu}"),
            },
            set: ChannelSet {
                pid,
                groups: Vec::new(),
                channels: objects.iter().map(handle).collect(),
            },
        }
    }

    #[test]
    fn what_was_noted_is_read_back_and_what_ended_is_not() {
        let state = tempfile::tempdir().expect("a temporary directory");
        assert_eq!(load(state.path()).expect("readable"), None);
        let journal = begin(state.path());
        journal.add_worker(10, 100).expect("writable");
        journal.add_worker(11, 101).expect("writable");
        journal.drop_worker(10).expect("writable");
        let records = load(state.path()).expect("readable").expect("there is one");
        assert_eq!(
            records.workers,
            [Helper {
                pid: 11,
                start: 101
            }]
        );
        assert_eq!(records.mountpoint.as_deref(), Some(Path::new("/mnt")));
        remove(state.path()).expect("removable");
        assert_eq!(load(state.path()).expect("readable"), None);
        remove(state.path()).expect("removing nothing is no error");
    }

    #[test]
    fn a_damaged_journal_is_an_error_until_it_is_set_aside() {
        let state = tempfile::tempdir().expect("a temporary directory");
        fs::write(state.path().join(FILE), "{").expect("writable");
        assert!(load(state.path()).is_err());
        let aside = set_aside(state.path()).expect("renamed");
        assert_eq!(fs::read_to_string(aside).expect("kept"), "{");
        assert_eq!(load(state.path()).expect("readable"), None);
    }

    #[test]
    fn a_process_is_armed_and_disarmed_once_a_gpu_until_it_ends() {
        let state = tempfile::tempdir().expect("a temporary directory");
        let journal = begin(state.path());
        for entry in [
            armed(7, 70, 0, &[1]),
            armed(7, 70, 1, &[2]),
            armed(8, 80, 0, &[3]),
            armed(7, 70, 0, &[1, 4]),
        ] {
            journal.arm(entry).expect("writable");
        }
        let records = read(state.path());
        assert_eq!(records.host, HostKind::Sim);
        assert_eq!(
            records.armed,
            [
                armed(7, 70, 1, &[2]),
                armed(8, 80, 0, &[3]),
                armed(7, 70, 0, &[1, 4])
            ]
        );
        journal
            .disarm(7, 71, "GPU-0")
            .expect("another process of that pid");
        journal.disarm(7, 70, "GPU-2").expect("another GPU");
        journal
            .disarm_process(7, 71)
            .expect("another process of that pid");
        assert_eq!(read(state.path()), records);
        journal.disarm(7, 70, "GPU-0").expect("writable");
        assert_eq!(
            read(state.path()).armed,
            [armed(7, 70, 1, &[2]), armed(8, 80, 0, &[3])]
        );
        journal.arm(armed(7, 70, 0, &[1])).expect("writable");
        journal.disarm_process(7, 70).expect("writable");
        assert_eq!(read(state.path()).armed, [armed(8, 80, 0, &[3])]);
    }

    #[test]
    fn a_process_that_was_never_armed_is_disarmed_without_writing() {
        let state = tempfile::tempdir().expect("a temporary directory");
        let journal = begin(state.path());
        remove(state.path()).expect("removable");
        journal.disarm(7, 70, "GPU-0").expect("nothing to do");
        journal.disarm_process(7, 70).expect("nothing to do");
        assert_eq!(load(state.path()).expect("readable"), None);
    }

    #[test]
    fn a_journal_of_an_earlier_version_is_read() {
        let state = tempfile::tempdir().expect("a temporary directory");
        let text = r#"{"mountpoint":"/mnt","workers":[{"pid":1,"start":2}],"mps":[]}"#;
        fs::write(state.path().join(FILE), text).expect("writable");
        let records = read(state.path());
        assert_eq!(records.workers, [Helper { pid: 1, start: 2 }]);
        assert!(records.armed.is_empty());
        assert_eq!(records.host, HostKind::Nvidia);
    }

    #[test]
    fn a_new_journal_keeps_the_living_that_could_not_be_resumed() {
        let own = std::process::id();
        let start = procfs::start_time(own).expect("this process runs");
        for (host, kept) in [(HostKind::Sim, 1), (HostKind::Nvidia, 0)] {
            let state = tempfile::tempdir().expect("a temporary directory");
            let journal = begin(state.path());
            journal.add_worker(9, 90).expect("writable");
            journal.arm(armed(own, start, 0, &[1])).expect("writable");
            journal
                .arm(armed(own, start + 1, 0, &[2]))
                .expect("writable");
            let journal = Journal::begin(state.path(), Path::new("/mnt"), host).expect("writable");
            assert_eq!(journal.is_armed(own, start, "GPU-0"), kept == 1);
            assert!(!journal.is_armed(own, start, "GPU-1"));
            assert!(!journal.is_armed(own, start + 1, "GPU-0"));
            let records = read(state.path());
            assert!(records.workers.is_empty());
            assert_eq!(records.host, host);
            assert_eq!(records.armed.len(), kept);
            assert!(
                records
                    .armed
                    .iter()
                    .all(|armed| armed.process.start == start)
            );
        }
    }

    #[test]
    fn a_journal_that_was_closed_changes_no_more_and_tells_what_it_held() {
        let state = tempfile::tempdir().expect("a temporary directory");
        let journal = begin(state.path());
        journal.arm(armed(7, 70, 0, &[1])).expect("writable");
        assert!(journal.is_armed(7, 70, "GPU-0"));
        let records = read(state.path());
        assert_eq!(journal.close().as_ref(), Some(&records));
        journal
            .arm(armed(8, 80, 0, &[1]))
            .expect_err("it is closed");
        journal.add_worker(9, 90).expect_err("it is closed");
        journal.disarm(7, 70, "GPU-0").expect_err("it is closed");
        journal.disarm_process(7, 70).expect_err("it is closed");
        assert!(!journal.is_armed(7, 70, "GPU-0"));
        assert_eq!(read(state.path()), records);
        assert_eq!(journal.close(), None);
    }
}
