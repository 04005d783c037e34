//! Ending MPS processes: those of a running service, and those that a dead one
//! left behind.
//!
//! A process is ended only by a pidfd, and one that we did not start only after
//! its start time and its program were compared. A pid alone, or a name alone,
//! could be anybody's.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

use gcgroup_device::DeviceError;
use rustix::io::Errno;
use rustix::process::Signal;

use super::control::{CONTROL_PROGRAM, Program};
use super::{COMMAND_DEADLINE, PIPE_VARIABLE, Places, STEP_DEADLINE, is_server};
use crate::process::{self, Process};

/// What became of a control daemon that a dead service had noted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Orphan {
    /// It ran and was ended.
    Ended,
    /// It had ended before. A server that it left was ended nevertheless.
    Gone,
    /// The pid belongs to another process now, which was left alone.
    NotOurs,
}

/// Ends the MPS control daemon that a dead service left behind, and its server.
///
/// `pid` and `start_time` (clock ticks since boot) are what
/// [`gcgroup_device::MpsServer::process`] returned, `directory` is what it was
/// started with. Its clients must have ended before.
///
/// # Errors
/// [`DeviceError::Failed`] when one of its processes outlived SIGKILL, or when
/// no pidfd can be had.
pub fn end_orphan(pid: u32, start_time: u64, directory: &Path) -> Result<Orphan, DeviceError> {
    let directory = &std::path::absolute(directory)
        .map_err(|error| DeviceError::Failed(format!("{}: {error}", directory.display())))?;
    let places = Places::below(directory);
    let control = match Process::open(pid) {
        Ok(process) => Some(process),
        Err(Errno::SRCH | Errno::INVAL | Errno::NOENT) => None,
        Err(errno) => {
            return Err(DeviceError::Failed(format!(
                "opening process {pid}: {errno}"
            )));
        }
    };
    let control_gone = control.is_none();
    let ours = control.filter(|process| {
        process.start_time() == start_time
            && process::program_name(pid).is_some_and(|name| name == CONTROL_PROGRAM)
    });
    // Before anything ends: a server whose parent is gone is nobody's child.
    let servers = match &ours {
        Some(_) => servers_of(pid, &places),
        None => servers_by_environment(&places),
    };
    let mut ended = true;
    if let Some(control) = &ours {
        let asked = Program::find()
            .and_then(|program| program.talk(&places, "quit -t 1", COMMAND_DEADLINE));
        let patience = match asked {
            Ok(_) => STEP_DEADLINE,
            Err(error) => {
                tracing::debug!(pid, %error, "the orphaned MPS control daemon did not listen");
                Duration::ZERO
            }
        };
        ended &= end_process(control, patience);
    }
    for server in &servers {
        ended &= end_process(server, Duration::ZERO);
    }
    if !ended {
        return Err(DeviceError::Failed(format!(
            "a process of the MPS server in {} does not end",
            directory.display()
        )));
    }
    Ok(match ours {
        Some(_) => Orphan::Ended,
        None if control_gone => Orphan::Gone,
        None => Orphan::NotOurs,
    })
}

/// Waits for an end that was asked for as long as `patience` says, then sends
/// TERM, then KILL. Says whether it has ended.
pub(super) fn end_process(process: &Process, mut patience: Duration) -> bool {
    for signal in [Signal::TERM, Signal::KILL] {
        if process.wait(patience) {
            return true;
        }
        process.signal(signal);
        patience = STEP_DEADLINE;
    }
    let ended = process.wait(patience);
    if !ended {
        tracing::warn!(pid = process.pid(), "a process outlived SIGKILL");
    }
    ended
}

/// Servers of a control daemon: its children, and those that name its pipes.
pub(super) fn servers_of(control: u32, places: &Places) -> Vec<Process> {
    let children = process::children(control);
    let children = children.into_iter().filter(|pid| is_server(*pid));
    let mut servers: Vec<Process> = children.filter_map(|pid| Process::open(pid).ok()).collect();
    for other in servers_by_environment(places) {
        if !servers.iter().any(|server| server.pid() == other.pid()) {
            servers.push(other);
        }
    }
    servers
}

/// Servers that were started with the pipes of this directory.
fn servers_by_environment(places: &Places) -> Vec<Process> {
    let pipe = places.pipe.as_os_str().as_bytes();
    let pids = process::all().into_iter().filter(|pid| is_server(*pid));
    // The descriptor first, so that what is compared is what it holds.
    pids.filter_map(|pid| Process::open(pid).ok())
        .filter(|process| {
            is_server(process.pid())
                && process::has_variable(process.pid(), PIPE_VARIABLE, pipe)
                && !process.has_ended()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;
    use std::process::{Child, Command};
    use std::time::Instant;

    use super::super::SERVER_PROGRAM;
    use super::*;

    /// A process that runs until it is ended, under the name of `program`.
    struct Pretender {
        child: Child,
        start_time: u64,
    }

    impl Pretender {
        fn start(directory: &Path, program: &str, pipe: Option<&Path>) -> Self {
            let path = which("sleep");
            let copy = directory.join(program);
            fs::create_dir_all(directory).expect("the directory is ours");
            // Not by ourselves: a fork of another test meanwhile would hold the
            // copy open for writing, and it could not be run.
            let copied = Command::new("cp").arg(path).arg(&copy).status();
            assert!(copied.expect("cp is everywhere").success());
            let mut command = Command::new(&copy);
            command.arg("60");
            if let Some(pipe) = pipe {
                command.env(PIPE_VARIABLE, pipe);
            }
            let child = command.spawn().expect("a copy of sleep runs");
            let deadline = Instant::now() + Duration::from_secs(5);
            // The program's name is there a moment before its environment.
            let environment = || fs::read(format!("/proc/{}/environ", child.id()));
            while process::program_name(child.id()).as_deref() != Some(program)
                || environment().is_ok_and(|variables| variables.is_empty())
            {
                assert!(Instant::now() < deadline, "it never became {program}");
                std::thread::sleep(Duration::from_millis(2));
            }
            let start_time = process::start_time(child.id()).expect("it runs");
            Self { child, start_time }
        }

        fn runs(&mut self) -> bool {
            matches!(self.child.try_wait(), Ok(None))
        }
    }

    impl Drop for Pretender {
        fn drop(&mut self) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }

    fn which(program: &str) -> PathBuf {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path)
            .map(|directory| directory.join(program))
            .find(|path| path.is_file())
            .expect("a program that every system has")
    }

    #[test]
    fn a_process_with_another_name_is_left_alone() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let mut other = Pretender::start(directory.path(), "sleep", None);
        let ended = end_orphan(other.child.id(), other.start_time, directory.path());
        assert_eq!(ended, Ok(Orphan::NotOurs));
        assert!(other.runs());
    }

    #[test]
    fn a_process_with_another_start_time_is_left_alone() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let mut other = Pretender::start(directory.path(), CONTROL_PROGRAM, None);
        let ended = end_orphan(other.child.id(), other.start_time + 1, directory.path());
        assert_eq!(ended, Ok(Orphan::NotOurs));
        assert!(other.runs());
    }

    #[test]
    fn the_noted_control_daemon_is_ended() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let mut control = Pretender::start(directory.path(), CONTROL_PROGRAM, None);
        let ended = end_orphan(control.child.id(), control.start_time, directory.path());
        assert_eq!(ended, Ok(Orphan::Ended));
        assert!(!control.runs());
    }

    #[test]
    fn a_server_without_its_control_daemon_is_known_by_its_pipes() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let pipe = Places::below(directory.path()).pipe;
        let elsewhere = directory.path().join("elsewhere");
        let mut ours = Pretender::start(directory.path(), SERVER_PROGRAM, Some(&pipe));
        let mut other = Pretender::start(&elsewhere, SERVER_PROGRAM, Some(&elsewhere));
        let mut gone = Command::new("true").spawn().expect("true is everywhere");
        gone.wait().expect("it is our child");
        let ended = end_orphan(gone.id(), 1, directory.path());
        assert_eq!(ended, Ok(Orphan::Gone));
        assert!(!ours.runs());
        assert!(other.runs());
    }
}
