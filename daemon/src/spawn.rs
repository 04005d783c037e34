//! Starting workers: our own program again, as an unprivileged user.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use tokio::process::Child;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::identity::Identity;
use crate::journal::Journal;
use crate::procfs;

/// A worker that was just started.
#[derive(Debug)]
pub(crate) struct Spawned {
    /// The child, to be reaped.
    pub(crate) child: Child,
    /// Its pid.
    pub(crate) pid: u32,
    /// Names it for good.
    pub(crate) pidfd: OwnedFd,
    /// Our end of its standard input, nonblocking.
    pub(crate) socket: UnixStream,
}

/// Starts a worker with nothing but `environment` and what finds the driver's
/// library, and notes it in the journal.
///
/// # Errors
/// Those of socketpair(2), fork(2), execve(2), pidfd_open(2) and of the journal.
///
/// # Panics
/// Outside of the runtime, which reaps the child.
pub(crate) fn worker(
    identity: Option<Identity>,
    environment: &[(String, String)],
    journal: &Journal,
) -> io::Result<Spawned> {
    let (ours, theirs) = UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    // The path of the running program may be unreadable for the worker's user;
    // the link in /proc reaches the very file.
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0("gcgroupd-worker")
        .arg("worker")
        .current_dir("/");
    command.stdin(OwnedFd::from(theirs)).stdout(Stdio::null());
    command
        .env_clear()
        .envs(environment.iter().map(|(key, value)| (key, value)));
    for key in ["LD_LIBRARY_PATH", "RUST_LOG", "RUST_BACKTRACE"] {
        if let Some(value) = std::env::var_os(key) {
            command.env(key, value);
        }
    }
    // No home to keep compiled kernels in, and none that other users may fill.
    command.env("CUDA_CACHE_DISABLE", "1");
    // A signal from a terminal is for the service, which ends its workers.
    command.process_group(0);
    if let Some(identity) = identity {
        command.uid(identity.uid).gid(identity.gid);
    }
    // If what follows fails, it ends on its own: our end of the socket closes.
    let child = tokio::process::Command::from(command).spawn()?;
    let pid = child
        .id()
        .ok_or_else(|| io::Error::other("the child has no pid"))?;
    let raw = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let raw = raw.ok_or_else(|| io::Error::other("the child's pid is out of range"))?;
    let pidfd = pidfd_open(raw, PidfdFlags::empty())?;
    journal.add_worker(pid, procfs::start_time(pid).unwrap_or(0))?;
    Ok(Spawned {
        child,
        pid,
        pidfd,
        socket: ours,
    })
}

/// Kills the process of a pidfd. One that has ended already is no error.
pub(crate) fn kill(pidfd: impl AsFd) {
    if let Err(error) = pidfd_send_signal(pidfd, Signal::KILL)
        && error != rustix::io::Errno::SRCH
    {
        tracing::warn!(%error, "a worker could not be killed");
    }
}
