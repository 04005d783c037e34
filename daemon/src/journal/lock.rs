//! The lock of a state directory: one process at a time serves or recovers there.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};

const LOCK: &str = "lock";
/// Longest that a recovery takes: processes that do not resume are tried for 5 s,
/// and an MPS server may take as long again to end.
const RECOVERY: Duration = Duration::from_secs(10);
/// Between two tries to take the lock.
const TRY_AGAIN: Duration = Duration::from_millis(20);

/// What the holder of a state directory's lock does with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// It serves.
    Service,
    /// It undoes what a service left behind.
    Recovery,
}

impl Role {
    /// What the lock file holds meanwhile.
    fn text(self) -> &'static str {
        match self {
            Self::Service => "service",
            Self::Recovery => "recovery",
        }
    }
}

/// Why the state directory could not be taken.
#[derive(Debug)]
pub(crate) enum LockError {
    /// Another process holds it.
    Held {
        /// The state directory.
        state: PathBuf,
        /// What that process does.
        by: Role,
    },
    /// The lock file failed.
    Failed {
        /// The lock file.
        path: PathBuf,
        /// How.
        error: io::Error,
    },
}

impl fmt::Display for LockError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Held {
                state,
                by: Role::Service,
            } => write!(
                f,
                "state = {} is in use by a running gcgroupd",
                state.display()
            ),
            Self::Held {
                state,
                by: Role::Recovery,
            } => write!(
                f,
                "state = {} is in use: what an earlier gcgroupd left behind is still being undone; \
                 try again in a few seconds",
                state.display()
            ),
            Self::Failed { path, error: _ } => write!(f, "cannot lock {}", path.display()),
        }
    }
}

impl std::error::Error for LockError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Held { state: _, by: _ } => None,
            Self::Failed { path: _, error } => Some(error),
        }
    }
}

/// Takes the state directory for a service until the file is closed. Another
/// service that ends is waited for with `patience`, a recovery for as long as one
/// takes.
///
/// # Errors
/// [`LockError::Held`] when somebody holds it still, [`LockError::Failed`].
pub(crate) fn lock(state: &Path, patience: Duration) -> Result<File, LockError> {
    lock_within(state, patience, patience.max(RECOVERY), Role::Service)
}

/// As [`lock`], for a recovery.
///
/// # Errors
/// As [`lock`].
pub(crate) fn lock_to_recover(state: &Path, patience: Duration) -> Result<File, LockError> {
    lock_within(state, patience, patience.max(RECOVERY), Role::Recovery)
}

fn lock_within(
    state: &Path,
    service: Duration,
    recovery: Duration,
    role: Role,
) -> Result<File, LockError> {
    let path = state.join(LOCK);
    let failed = |error: io::Error| LockError::Failed {
        path: path.clone(),
        error,
    };
    let mut file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(failed)?;
    let begun = Instant::now();
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => break,
            Err(rustix::io::Errno::WOULDBLOCK) => {}
            Err(error) => return Err(failed(error.into())),
        }
        // What the holder wrote; for a moment it may still be what the one before
        // it did.
        let (by, patience) = match fs::read_to_string(&path) {
            Ok(text) if text == Role::Recovery.text() => (Role::Recovery, recovery),
            Ok(_) | Err(_) => (Role::Service, service),
        };
        if begun.elapsed() >= patience {
            return Err(LockError::Held {
                state: state.to_owned(),
                by,
            });
        }
        std::thread::sleep(TRY_AGAIN);
    }
    file.set_len(0)
        .and_then(|()| file.write_all(role.text().as_bytes()))
        .map_err(failed)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_directory_has_one_owner_who_is_told() {
        let state = tempfile::tempdir().expect("a temporary directory");
        let second = || lock_within(state.path(), Duration::ZERO, Duration::ZERO, Role::Service);
        for (role, told) in [
            (Role::Recovery, "still being undone"),
            (Role::Service, "by a running gcgroupd"),
        ] {
            let first = lock_within(state.path(), Duration::ZERO, Duration::ZERO, role);
            let first = first.expect("nobody has it");
            let error = second().expect_err("the first has it");
            assert!(matches!(error, LockError::Held { by, .. } if by == role));
            assert!(error.to_string().contains("in use"), "{error}");
            assert!(error.to_string().contains(told), "{error}");
            drop(first);
        }
        second().expect("free again");
    }

    #[test]
    fn a_recovery_is_waited_for_longer_than_a_service() {
        let state = tempfile::tempdir().expect("a temporary directory");
        let first = lock_to_recover(state.path(), Duration::ZERO).expect("nobody has it");
        let ends = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            drop(first);
        });
        lock(state.path(), Duration::ZERO).expect("it ended in time");
        ends.join().expect("it slept");
    }

    #[test]
    fn a_lock_that_cannot_be_made_names_its_file() {
        let error = lock(Path::new("/proc"), Duration::ZERO);
        let error = error.expect_err("nobody makes files there");
        assert!(matches!(error, LockError::Failed { .. }), "{error:?}");
        assert!(error.to_string().contains("/proc/lock"), "{error}");
    }
}
