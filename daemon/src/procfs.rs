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
}
