//! What must be undone when the service is gone, however it went.
//!
//! One JSON file in the state directory, rewritten whole and renamed into place
//! whenever a helper process begins or ends; never on the way of a setting. The
//! directory lies on tmpfs, so nothing is synced: after a power cut nothing of
//! ours runs. The state directory's lock keeps recovery away from a living
//! service.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use parking_lot::Mutex;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

const FILE: &str = "journal.json";
const LOCK: &str = "lock";

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

/// The journal's contents.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Records {
    /// Where the control files are mounted.
    pub(crate) mountpoint: Option<PathBuf>,
    /// Workers that may live.
    pub(crate) workers: Vec<Helper>,
    /// MPS servers that may live.
    pub(crate) mps: Vec<MpsRecord>,
}

/// The journal of a running service.
#[derive(Debug)]
pub(crate) struct Journal {
    state: PathBuf,
    records: Mutex<Records>,
}

impl Journal {
    /// Begins a journal for this mount; what an earlier one said is forgotten,
    /// so recover first.
    ///
    /// # Errors
    /// Those of writing it.
    pub(crate) fn begin(state: &Path, mountpoint: &Path) -> io::Result<Self> {
        let records = Records {
            mountpoint: Some(mountpoint.to_owned()),
            ..Records::default()
        };
        write(state, &records)?;
        Ok(Self {
            state: state.to_owned(),
            records: Mutex::new(records),
        })
    }

    fn update(&self, change: impl FnOnce(&mut Records)) -> io::Result<()> {
        let mut records = self.records.lock();
        change(&mut records);
        write(&self.state, &records)
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
}

fn write(state: &Path, records: &Records) -> io::Result<()> {
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

/// Takes the state directory for this process until the file is closed.
///
/// # Errors
/// A living service holds it.
pub(crate) fn lock(state: &Path, patience: std::time::Duration) -> Result<File> {
    let path = state.join(LOCK);
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .with_context(|| format!("cannot open {}", path.display()))?;
    let give_up = std::time::Instant::now() + patience;
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(rustix::io::Errno::WOULDBLOCK) if std::time::Instant::now() < give_up => {
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
            Err(rustix::io::Errno::WOULDBLOCK) => {
                bail!(
                    "state = {} is in use by a running gcgroupd",
                    state.display()
                )
            }
            Err(error) => {
                return Err(error).with_context(|| format!("cannot lock {}", path.display()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn what_was_noted_is_read_back_and_what_ended_is_not() {
        let state = tempfile::tempdir().expect("a temporary directory");
        assert_eq!(load(state.path()).expect("readable"), None);
        let journal = Journal::begin(state.path(), Path::new("/mnt")).expect("writable");
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
    fn a_state_directory_has_one_owner() {
        let state = tempfile::tempdir().expect("a temporary directory");
        let first = lock(state.path(), Duration::ZERO).expect("nobody has it");
        let error = lock(state.path(), Duration::ZERO).expect_err("the first has it");
        assert!(error.to_string().contains("in use"));
        drop(first);
        lock(state.path(), Duration::ZERO).expect("free again");
    }
}
