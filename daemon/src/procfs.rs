//! What /proc says of a process.

use std::fs;

/// Start time of a process in clock ticks since boot, which together with the
/// pid names it for good; `None` when there is no such process.
pub(crate) fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold spaces; field 22 counts from after it.
    stat.rsplit_once(')')?
        .1
        .split_ascii_whitespace()
        .nth(19)?
        .parse()
        .ok()
}

/// Whether the process that was recorded with this start time still runs. One
/// that has ended and was not reaped does not.
pub(crate) fn is_running(pid: u32, start: u64) -> bool {
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else {
        return false;
    };
    let ended = stat
        .rsplit_once(')')
        .is_none_or(|(_, rest)| matches!(rest.trim_start().as_bytes().first(), Some(b'Z' | b'X')));
    !ended && start_time(pid) == Some(start)
}

/// Facts of a process that its directory shows.
#[derive(Clone, Debug, Default)]
pub(crate) struct Facts {
    /// Name.
    pub(crate) comm: String,
    /// Control group in the unified hierarchy, or the first one listed.
    pub(crate) cgroup: String,
    /// Real user id.
    pub(crate) uid: u32,
}

/// Reads the facts; what cannot be read is left empty.
pub(crate) fn facts(pid: u32) -> Facts {
    let read = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
    let status = read("status");
    let uid = status
        .lines()
        .find_map(|line| line.strip_prefix("Uid:"))
        .and_then(|rest| rest.split_ascii_whitespace().next()?.parse().ok());
    let cgroups = read("cgroup");
    let unified = cgroups.lines().find_map(|line| line.strip_prefix("0::"));
    let first = || {
        cgroups
            .lines()
            .next()
            .and_then(|line| line.splitn(3, ':').nth(2))
    };
    Facts {
        comm: read("comm").trim_end().to_owned(),
        cgroup: unified.or_else(first).unwrap_or_default().to_owned(),
        uid: uid.unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_facts_and_a_pid_that_is_not_one_has_none() {
        let own = facts(std::process::id());
        assert!(!own.comm.is_empty());
        assert!(start_time(std::process::id()).is_some_and(|ticks| ticks > 0));
        // Above the kernel's greatest pid (4 Mi).
        assert_eq!(start_time(u32::MAX), None);
    }

    #[test]
    fn a_process_that_was_not_reaped_has_ended_all_the_same() {
        let own = std::process::id();
        let start = start_time(own).expect("this process runs");
        assert!(is_running(own, start));
        assert!(!is_running(own, start + 1), "another process");
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .expect("sleep(1) exists");
        let start = start_time(child.id()).expect("it runs");
        assert!(is_running(child.id(), start));
        child.kill().expect("it can be killed");
        let give_up = std::time::Instant::now() + std::time::Duration::from_secs(5);
        while is_running(child.id(), start) && std::time::Instant::now() < give_up {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        assert!(!is_running(child.id(), start), "a zombie counts as running");
        assert_eq!(start_time(child.id()), Some(start), "it is a zombie still");
        child.wait().expect("it can be reaped");
    }
}
