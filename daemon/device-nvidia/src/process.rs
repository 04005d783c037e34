//! Processes by identity: a pid means nothing without its start time.

use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::Child;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// A process held by a pidfd: signals reach it or nobody.
#[derive(Debug)]
pub(crate) struct Process {
    pid: u32,
    start_time: u64,
    pidfd: OwnedFd,
}

impl Process {
    /// Takes hold of the process that has this pid now; `ESRCH` when there is
    /// none.
    pub(crate) fn open(pid: u32) -> Result<Self, Errno> {
        let process = Self::hold(pid)?;
        if process.has_ended() {
            return Err(Errno::SRCH);
        }
        Ok(process)
    }

    /// Takes hold of a child of ours, which may have ended but was not waited
    /// for, so that its pid is still its own.
    pub(crate) fn of_child(child: &Child) -> Result<Self, Errno> {
        Self::hold(child.id())
    }

    fn hold(pid: u32) -> Result<Self, Errno> {
        let raw = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let pidfd = pidfd_open(raw.ok_or(Errno::SRCH)?, PidfdFlags::empty())?;
        // Read after the descriptor was opened: if its process still lives
        // then, what /proc says is about that process and no later one.
        let start_time = start_time(pid).ok_or(Errno::SRCH)?;
        Ok(Self {
            pid,
            start_time,
            pidfd,
        })
    }

    /// Its thread-group id.
    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// Clock ticks since boot, field 22 of proc_pid_stat(5).
    pub(crate) fn start_time(&self) -> u64 {
        self.start_time
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.wait(Duration::ZERO)
    }

    /// Waits until it has ended, a zombie included; says whether it has.
    pub(crate) fn wait(&self, timeout: Duration) -> bool {
        let timeout = Timespec::try_from(timeout).ok();
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        loop {
            match poll(&mut fds, timeout.as_ref()) {
                Ok(ready) => return ready > 0,
                Err(Errno::INTR) => {}
                Err(_) => return false,
            }
        }
    }

    /// Sends a signal. A process that is gone needs none.
    pub(crate) fn signal(&self, signal: Signal) {
        if let Err(error) = pidfd_send_signal(&self.pidfd, signal)
            && error != Errno::SRCH
        {
            tracing::warn!(pid = self.pid, ?signal, %error, "signal was not sent");
        }
    }
}

impl AsFd for Process {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

/// Start time of a process in clock ticks since boot; `None` when there is no
/// such process.
pub(crate) fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat_field(&stat, 22)?.parse().ok()
}

/// Whether the thread that a process began with has ended while others go on,
/// or has just ended with them.
pub(crate) fn main_thread_has_ended(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    matches!(stat_field(&stat, 3), Some("Z" | "X") | None)
}

/// A field of proc_pid_stat(5) by its number there, 3 and up. The second field
/// is a name in brackets that may itself hold brackets and spaces.
fn stat_field(stat: &str, number: usize) -> Option<&str> {
    let (_, rest) = stat.rsplit_once(") ")?;
    rest.split_ascii_whitespace().nth(number.checked_sub(3)?)
}

/// File name of the program that a process runs. The name in `comm` would not
/// do: 15 bytes do not tell `nvidia-cuda-mps-control` from its server.
pub(crate) fn program_name(pid: u32) -> Option<String> {
    let exe = fs::read_link(format!("/proc/{pid}/exe")).ok()?;
    let name = exe.file_name()?.to_str()?;
    // The kernel's mark for a program that an upgrade has replaced.
    Some(name.strip_suffix(" (deleted)").unwrap_or(name).to_owned())
}

/// The name that the kernel keeps of a process, at most 15 bytes.
pub(crate) fn comm(pid: u32) -> Option<String> {
    let comm = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
    Some(comm.trim_end().to_owned())
}

/// Children of a process, those of all its threads.
pub(crate) fn children(pid: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"));
    let lists = tasks.into_iter().flatten().flatten().filter_map(|task| {
        // Absent from kernels without CONFIG_PROC_CHILDREN.
        fs::read_to_string(task.path().join("children")).ok()
    });
    let lists: Vec<String> = lists.collect();
    if !lists.is_empty() {
        let pids = lists.iter().flat_map(|list| list.split_ascii_whitespace());
        return pids.filter_map(|pid| pid.parse().ok()).collect();
    }
    let parent = pid.to_string();
    all()
        .into_iter()
        .filter(|child| {
            let stat = fs::read_to_string(format!("/proc/{child}/stat")).unwrap_or_default();
            stat_field(&stat, 4) == Some(parent.as_str())
        })
        .collect()
}

/// Every process there is.
pub(crate) fn all() -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect()
}

/// Whether a process was started with this variable set to this value.
pub(crate) fn has_variable(pid: u32, name: &str, value: &[u8]) -> bool {
    let environ = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    environ
        .split(|byte| *byte == 0)
        .filter_map(|variable| variable.strip_prefix(name.as_bytes()))
        .any(|rest| rest.strip_prefix(b"=") == Some(value))
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::time::Instant;

    use super::*;

    #[test]
    fn a_name_with_brackets_does_not_shift_the_fields() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194304 1 2 3 4 5 6 7 8 20 0 1 0 4711 9";
        assert_eq!(stat_field(stat, 4), Some("1"));
        assert_eq!(stat_field(stat, 22), Some("4711"));
        assert_eq!(stat_field("nonsense", 22), None);
        assert_eq!(stat_field(stat, 2), None);
    }

    #[test]
    fn a_child_is_seen_to_run_and_to_end() {
        let mut child = Command::new("sleep")
            .arg("60")
            .spawn()
            .expect("sleep is everywhere");
        let process = Process::open(child.id()).expect("the child runs");
        assert!(!process.has_ended());
        assert!(!main_thread_has_ended(child.id()));
        assert!(children(std::process::id()).contains(&child.id()));
        process.signal(Signal::KILL);
        assert!(process.wait(Duration::from_secs(5)));
        assert_eq!(Process::open(child.id()).err(), Some(Errno::SRCH));
        let zombie = Process::of_child(&child).expect("it was not waited for");
        assert!(zombie.has_ended());
        assert!(main_thread_has_ended(child.id()));
        child.wait().expect("it is our child");
        assert_eq!(Process::open(child.id()).err(), Some(Errno::SRCH));
        assert_eq!(start_time(child.id()), None);
    }

    #[test]
    fn variables_are_compared_whole() {
        let mut child = Command::new("sleep")
            .arg("60")
            .env("GCGROUP_TEST", "/a/b")
            .spawn()
            .expect("sleep is everywhere");
        let has = |name, value: &[u8]| has_variable(child.id(), name, value);
        // The environment can be read only after the exec.
        let deadline = Instant::now() + Duration::from_secs(5);
        while !has("GCGROUP_TEST", b"/a/b") && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(2));
        }
        let found = (
            has("GCGROUP_TEST", b"/a/b"),
            has("GCGROUP_TEST", b"/a"),
            has("GCGROUP", b"/a/b"),
        );
        child.kill().expect("it is our child");
        child.wait().expect("it is our child");
        assert_eq!(found, (true, false, false));
    }
}
