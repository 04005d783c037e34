//! The guardian: a process that holds the service's pidfd and undoes what the
//! service left behind when it dies.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{PidfdFlags, getpid, pidfd_open};
use tokio::process::Child;

use crate::recover;

/// Between the death of a guardian and the start of the next one.
const AGAIN: Duration = Duration::from_secs(1);

/// Starts the guardian of this process.
///
/// # Errors
/// Those of pidfd_open(2) and of starting it.
///
/// # Panics
/// Outside of the runtime, which reaps it.
pub(crate) fn start(state: &Path) -> Result<Child> {
    let pidfd =
        pidfd_open(getpid(), PidfdFlags::empty()).context("cannot open a pidfd of the service")?;
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0("gcgroupd-guardian")
        .arg("guardian")
        .arg("--state")
        .arg(state)
        .current_dir("/")
        .stdin(pidfd)
        .stdout(Stdio::null())
        // Out of reach of a terminal's signals and of its hang-up.
        .process_group(0);
    tokio::process::Command::from(command)
        .spawn()
        .context("cannot start the guardian")
}

/// Keeps a guardian alive for as long as the service runs.
pub(crate) async fn keep(mut guardian: Child, state: PathBuf) {
    loop {
        match guardian.wait().await {
            Ok(status) => {
                tracing::error!(%status, "the guardian has ended; another one is started")
            }
            Err(error) => tracing::error!(%error, "the guardian cannot be watched"),
        }
        loop {
            tokio::time::sleep(AGAIN).await;
            match start(&state) {
                Ok(next) => {
                    guardian = next;
                    break;
                }
                Err(error) => tracing::error!(error = %format!("{error:#}"), "no guardian"),
            }
        }
    }
}

/// The guardian's life: waits for the end of the service's last thread, then
/// recovers. After an orderly end there is nothing left to undo but the stops of
/// keepers that hung.
///
/// # Errors
/// What could not be undone.
pub(crate) fn run(state: &Path) -> Result<()> {
    let stdin = std::io::stdin();
    loop {
        let mut service = [PollFd::new(&stdin, PollFlags::IN)];
        match poll(&mut service, None) {
            Ok(_) => break,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("cannot wait for the service's end"),
        }
    }
    match recover::run(state) {
        // The next service was faster: its start has recovered already.
        Err(error) if recover::is_served(&error) => Ok(()),
        other => other,
    }
}
