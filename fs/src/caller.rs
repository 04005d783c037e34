//! What /proc tells about the thread behind a request.
//!
//! FUSE names the caller by its thread id in the pid namespace of whoever
//! mounted, which is the service's own; 0 stands for a caller that has no id
//! there.

use std::fs;

/// Bit of SIGKILL in a signal mask of /proc/TID/status.
const SIGKILL_BIT: u64 = 1 << (9 - 1);

/// Thread-group id of a thread, `None` when it is gone or not visible here.
pub(crate) fn thread_group(tid: u32) -> Option<u32> {
    field(&status(tid)?, "Tgid:")?.parse().ok()
}

/// Whether a thread is about to die of a signal. The kernel turns every signal
/// that ends a process without a core dump into a pending SIGKILL of each of its
/// threads, so an interrupt that nobody handles counts too.
pub(crate) fn is_being_killed(tid: u32) -> bool {
    status(tid)
        .and_then(|status| u64::from_str_radix(field(&status, "SigPnd:")?, 16).ok())
        .is_some_and(|pending| pending & SIGKILL_BIT != 0)
}

fn status(tid: u32) -> Option<String> {
    if tid == 0 {
        return None;
    }
    // A thread's name, one of the lines, may be any bytes.
    let bytes = fs::read(format!("/proc/{tid}/status")).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

fn field<'a>(status: &'a str, key: &str) -> Option<&'a str> {
    let line = status.lines().find(|line| line.starts_with(key))?;
    Some(line[key.len()..].trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_belongs_to_its_process() {
        let tid = std::thread::spawn(|| {
            let tid = rustix::thread::gettid().as_raw_nonzero().get();
            thread_group(u32::try_from(tid).expect("ids are positive"))
        });
        assert_eq!(
            tid.join().expect("the thread ends"),
            Some(std::process::id())
        );
    }

    #[test]
    fn a_caller_without_an_id_here_is_nobody() {
        assert_eq!(thread_group(0), None);
        assert!(!is_being_killed(0));
    }

    #[test]
    fn a_living_thread_is_not_being_killed() {
        assert!(!is_being_killed(std::process::id()));
    }
}
