//! What /proc says of a process.

use std::fs;

/// What /proc/PID/stat says, as far as it is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct ProcessStat {
    /// Letter of the main thread's state.
    state: u8,
    parent: u32,
    /// Threads that were not reaped, the main one included.
    threads: u32,
    /// Clock ticks since boot.
    start: u64,
}

impl ProcessStat {
    fn of(pid: u32) -> Option<Self> {
        Self::parse(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
    }

    fn parse(stat: &str) -> Option<Self> {
        // The name in parentheses may hold anything; what follows it begins with
        // field 3 (proc_pid_stat(5)).
        let (_, rest) = stat.rsplit_once(')')?;
        let mut fields = rest.split_ascii_whitespace();
        Some(Self {
            state: *fields.next()?.as_bytes().first()?,
            parent: fields.next()?.parse().ok()?,
            // Field 20, after 3 and 4.
            threads: fields.nth(15)?.parse().ok()?,
            // Field 22.
            start: fields.nth(1)?.parse().ok()?,
        })
    }

    /// A main thread that has ended is a zombie until the last of the others has,
    /// and those hold everything of the process meanwhile.
    fn is_running(self) -> bool {
        match self.state {
            b'Z' => self.threads > 1,
            state => state != b'X',
        }
    }
}

/// Start time of a process in clock ticks since boot, which together with the
/// pid names it for good; `None` when there is no such process.
pub(crate) fn start_time(pid: u32) -> Option<u64> {
    Some(ProcessStat::of(pid)?.start)
}

/// Parent of a process; `None` for init and for what is gone.
pub(crate) fn parent(pid: u32) -> Option<u32> {
    let parent = ProcessStat::of(pid)?.parent;
    (parent != 0).then_some(parent)
}

/// Start time of a process that runs; `None` for the id of a mere thread, which
/// /proc answers for too, and for a process that has ended.
pub(crate) fn process_start(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let leader = status.lines().find_map(|line| line.strip_prefix("Tgid:"))?;
    if leader.trim().parse() != Ok(pid) {
        return None;
    }
    let stat = ProcessStat::of(pid)?;
    stat.is_running().then_some(stat.start)
}

/// Whether the process that was recorded with this start time still runs. One
/// that has ended and was not reaped does not; one whose main thread alone has
/// ended does.
pub(crate) fn is_running(pid: u32, start: u64) -> bool {
    ProcessStat::of(pid).is_some_and(|stat| stat.start == start && stat.is_running())
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

/// Control group of a process in the unified hierarchy, or the first one that is
/// listed; empty for a process that has ended.
pub(crate) fn cgroup(pid: u32) -> String {
    let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    let unified = cgroups.lines().find_map(|line| line.strip_prefix("0::"));
    let first = || {
        cgroups
            .lines()
            .next()
            .and_then(|line| line.splitn(3, ':').nth(2))
    };
    unified.or_else(first).unwrap_or_default().to_owned()
}

/// Reads the facts; what cannot be read is left empty.
pub(crate) fn facts(pid: u32) -> Facts {
    let read = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
    let status = read("status");
    let uid = status
        .lines()
        .find_map(|line| line.strip_prefix("Uid:"))
        .and_then(|rest| rest.split_ascii_whitespace().next()?.parse().ok());
    Facts {
        comm: read("comm").trim_end().to_owned(),
        cgroup: cgroup(pid),
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
    fn a_thread_is_no_process_and_a_child_has_this_one_for_its_parent() {
        let (sender, receiver) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let id = rustix::thread::gettid()
                .as_raw_nonzero()
                .get()
                .unsigned_abs();
            let alone = process_start(id);
            sender.send(id).expect("the test waits");
            alone
        });
        let id = receiver.recv().expect("the thread runs");
        assert_ne!(id, std::process::id());
        assert_eq!(thread.join().expect("no panic"), None);
        assert!(process_start(std::process::id()).is_some());
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .expect("sleep(1) exists");
        assert_eq!(parent(child.id()), Some(std::process::id()));
        child.kill().expect("it can be killed");
        child.wait().expect("it can be reaped");
    }

    #[test]
    fn a_name_may_look_like_the_fields_after_it() {
        let rest = "Z 7 1 1 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 3 0 123 0 0";
        let stat = ProcessStat {
            state: b'Z',
            parent: 7,
            threads: 3,
            start: 123,
        };
        for name in ["sleep", "a b", ") R 1 (", "(())"] {
            let text = format!("5 ({name}) {rest}");
            assert_eq!(ProcessStat::parse(&text), Some(stat), "{text}");
        }
        for text in ["", "5 (sleep", "5 (sleep) Z 7 1", "5 (sleep) Z -1 1 1"] {
            assert_eq!(ProcessStat::parse(text), None, "{text}");
        }
    }

    /// Ends its main thread and leaves another one behind.
    const WITHOUT_ITS_MAIN_THREAD: &str = r#"
        #include <pthread.h>
        #include <unistd.h>
        static void *stay(void *none) { sleep(60); return none; }
        int main(void) {
            pthread_t thread;
            if (pthread_create(&thread, 0, stay, 0) != 0) return 1;
            pthread_exit(0);
        }
    "#;

    #[test]
    fn a_process_runs_for_as_long_as_any_of_its_threads() {
        let place = tempfile::tempdir().expect("a temporary directory");
        let (source, program) = (place.path().join("main.c"), place.path().join("main"));
        fs::write(&source, WITHOUT_ITS_MAIN_THREAD).expect("writable");
        let mut compiler = std::process::Command::new("cc");
        compiler
            .arg("-pthread")
            .arg("-o")
            .arg(&program)
            .arg(&source);
        match compiler.status() {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                println!("skipped: there is no cc to make the program with");
                return;
            }
            status => assert!(status.expect("cc starts").success(), "cc failed"),
        }
        let mut child = std::process::Command::new(&program)
            .spawn()
            .expect("it was made");
        let pid = child.id();
        let start = start_time(pid).expect("it runs");
        let state = || ProcessStat::of(pid).map(|stat| stat.state);
        let give_up = std::time::Instant::now() + std::time::Duration::from_secs(5);
        while state() != Some(b'Z') && std::time::Instant::now() < give_up {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        assert_eq!(state(), Some(b'Z'), "its main thread has ended");
        assert!(is_running(pid, start), "its other thread runs");
        assert_eq!(process_start(pid), Some(start));
        child.kill().expect("it can be killed");
        while is_running(pid, start) && std::time::Instant::now() < give_up {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        assert_eq!(state(), Some(b'Z'), "nobody has reaped it");
        assert!(!is_running(pid, start), "no thread of it is left");
        child.wait().expect("it can be reaped");
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
