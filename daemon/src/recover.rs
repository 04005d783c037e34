//! Undoing what a service left behind when it went without saying so.

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use gcgroup_device_nvidia::end_orphan;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::journal::{self, Helper, Records};
use crate::{procfs, spawn};

/// How long a worker may take to see the end of its socket before it is killed.
const GRACE: Duration = Duration::from_millis(500);

/// Undoes what the journal in `state` lists. The caller holds the lock.
///
/// # Errors
/// What could not be undone.
pub(crate) fn undo(state: &Path) -> Result<()> {
    let records = match journal::load(state) {
        Ok(Some(records)) => records,
        Ok(None) => return Ok(()),
        Err(error) => {
            // What it listed is lost; barring every later start helps nobody.
            let aside = journal::set_aside(state).context("cannot set a damaged journal aside")?;
            tracing::error!(error = %format!("{error:#}"), aside = %aside.display(), "the journal is damaged and was set aside");
            return Ok(());
        }
    };
    end_workers(&records);
    end_mps(&records);
    if let Some(mountpoint) = &records.mountpoint {
        gcgroup_fs::clean_stale_mount(mountpoint)
            .with_context(|| format!("cannot unmount {}", mountpoint.display()))?;
    }
    journal::remove(state).context("cannot remove the journal")?;
    Ok(())
}

/// Workers end by themselves when the service's end of their socket closes; one
/// that hangs in the driver is killed.
fn end_workers(records: &Records) {
    let give_up = Instant::now() + GRACE;
    for worker in &records.workers {
        while is_alive(*worker) && Instant::now() < give_up {
            std::thread::sleep(Duration::from_millis(10));
        }
        if is_alive(*worker) {
            tracing::warn!(
                pid = worker.pid,
                "a worker outlived its service and is killed"
            );
            kill(*worker);
        }
    }
}

fn end_mps(records: &Records) {
    for record in &records.mps {
        let Helper { pid, start } = record.process;
        if let Err(error) = end_orphan(pid, start, &record.directory) {
            tracing::warn!(pid, %error, "an MPS server could not be ended");
        }
    }
}

/// Whether a recorded process still is the one that was recorded.
fn is_alive(helper: Helper) -> bool {
    procfs::is_running(helper.pid, helper.start)
}

fn kill(helper: Helper) {
    let Some(pid) = i32::try_from(helper.pid).ok().and_then(Pid::from_raw) else {
        return;
    };
    // The descriptor names one process; look again that it is the right one.
    if let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty())
        && is_alive(helper)
    {
        spawn::kill(&pidfd);
    }
}

/// `gcgroupd recover`: takes the lock, undoes, and says what it found.
///
/// # Errors
/// A living service, or what could not be undone.
pub(crate) fn run(state: &Path) -> Result<()> {
    if !state.exists() {
        return Ok(());
    }
    let _lock = journal::lock(state, Duration::from_secs(2))?;
    undo(state)
}

/// Makes the state directory: everybody may look up sockets in it, nobody but
/// root may make any.
///
/// # Errors
/// Those of mkdir(2).
pub(crate) fn make_state(state: &Path) -> io::Result<()> {
    std::fs::create_dir_all(state)?;
    rustix::fs::chmod(state, rustix::fs::Mode::from_raw_mode(0o755))?;
    Ok(())
}
