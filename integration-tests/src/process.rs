//! Processes as /proc shows them.

use std::fs;
use std::path::Path;

use rustix::process::{Pid, Signal, kill_process};

/// Whether a process runs. One that has ended and was not waited for does not.
#[must_use]
pub fn is_running(pid: u32) -> bool {
    match state(pid) {
        Some(state) => !matches!(state, 'Z' | 'X'),
        None => false,
    }
}

/// State letter of a process.
fn state(pid: u32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name stands in parentheses and may itself contain some.
    stat.rsplit_once(") ")?.1.chars().next()
}

/// Sends a signal.
///
/// # Panics
/// When there is no such process: a test signals only what it saw running.
#[track_caller]
pub fn signal(pid: u32, signal: Signal) {
    kill_process(to_pid(pid), signal).expect("the process runs");
}

/// Sends SIGKILL to a process that may have ended already.
pub fn kill_if_there(pid: u32) {
    // ESRCH is what was wanted.
    let _ = kill_process(to_pid(pid), Signal::KILL);
}

fn to_pid(pid: u32) -> Pid {
    let raw = i32::try_from(pid).expect("pids are below 2^22");
    Pid::from_raw(raw).expect("pid 0 is nobody's")
}

/// Value of a line of /proc/PID/status.
#[must_use]
pub fn status(pid: u32, key: &str) -> Option<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    Some(line.trim().to_owned())
}

/// Arguments of a process, empty for one that has ended.
#[must_use]
pub fn arguments(pid: u32) -> Vec<String> {
    let bytes = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    bytes
        .split(|&byte| byte == 0)
        .filter(|argument| !argument.is_empty())
        .map(|argument| String::from_utf8_lossy(argument).into_owned())
        .collect()
}

/// Every running process.
///
/// # Panics
/// Where /proc is not mounted.
#[must_use]
pub fn all() -> Vec<u32> {
    fs::read_dir("/proc")
        .expect("/proc is mounted")
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|&pid| is_running(pid))
        .collect()
}

/// Running processes that name this path in an argument or in a variable of
/// their environment.
#[must_use]
pub fn naming(path: &Path) -> Vec<u32> {
    let own = std::process::id();
    let path = path.as_os_str().as_encoded_bytes();
    let mentions = |file: String| {
        let bytes = fs::read(file).unwrap_or_default();
        bytes.windows(path.len()).any(|window| window == path)
    };
    all()
        .into_iter()
        .filter(|&pid| pid != own)
        .filter(|pid| {
            mentions(format!("/proc/{pid}/cmdline")) || mentions(format!("/proc/{pid}/environ"))
        })
        .collect()
}

/// Children of a process.
#[must_use]
pub fn children(parent: u32) -> Vec<u32> {
    all()
        .into_iter()
        .filter(|&pid| status(pid, "PPid").and_then(|text| text.parse().ok()) == Some(parent))
        .collect()
}

/// Open descriptors of a process.
///
/// # Panics
/// When it has ended.
#[must_use]
pub fn descriptors(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd"))
        .expect("the process runs")
        .count()
}

/// Resident memory of a process in KiB.
///
/// # Panics
/// When it has ended.
#[must_use]
pub fn resident_kib(pid: u32) -> u64 {
    let text = status(pid, "VmRSS").expect("the process runs");
    let digits = text.trim_end_matches(" kB");
    digits.parse().expect("VmRSS is a number of kB")
}

/// Processor time that a process has used, in clock ticks: 100 a second on every
/// Linux system.
///
/// # Panics
/// When it has ended.
#[must_use]
pub fn ticks(pid: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("the process runs");
    let (_, fields) = stat
        .rsplit_once(") ")
        .expect("the name stands in parentheses");
    // Fields 14 and 15, user and system time; the first one here is field 3.
    let times = fields.split(' ').skip(11).take(2);
    times.filter_map(|time| time.parse::<u64>().ok()).sum()
}

/// Whether something is mounted at this path, alive or not.
///
/// # Panics
/// Where /proc is not mounted.
#[must_use]
pub fn is_mounted(path: &Path) -> bool {
    let table = fs::read_to_string("/proc/self/mountinfo").expect("/proc is mounted");
    table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .any(|mountpoint| Path::new(mountpoint) == path)
}
