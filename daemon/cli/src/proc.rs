//! What /proc says of processes: which descends from which.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

/// The process that a process or a thread belongs to; `None` when there is none
/// of this id.
pub(crate) fn thread_group(pid: u32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status
        .lines()
        .find_map(|line| line.strip_prefix("Tgid:"))?
        .trim()
        .parse()
        .ok()
}

/// The parent of a process, 0 for one that has none here.
fn parent(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold blanks; after it come state and parent.
    stat.rsplit_once(')')?
        .1
        .split_ascii_whitespace()
        .nth(1)?
        .parse()
        .ok()
}

/// Parents as they were found, each read once.
#[derive(Debug, Default)]
pub(crate) struct Parents(BTreeMap<u32, Option<u32>>);

impl Parents {
    /// Whether a process is `ancestor` or descends from it now. A process whose
    /// parent has ended has another one and is in the old tree no more.
    pub(crate) fn descends(&mut self, pid: u32, ancestor: u32) -> bool {
        // The parents were not read at one moment, so a pid that was given away
        // meanwhile could lead around in a circle.
        let mut seen = BTreeSet::new();
        let mut next = Some(pid);
        while let Some(pid) = next {
            if pid == ancestor {
                return true;
            }
            if !seen.insert(pid) {
                return false;
            }
            next = *self.0.entry(pid).or_insert_with(|| parent(pid));
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Above the kernel's greatest pid (4 Mi).
    const NOBODY: u32 = (4 << 20) + 1;

    #[test]
    fn a_process_descends_from_itself_and_its_parent() {
        let own = std::process::id();
        let parent = parent(own).expect("this process is in /proc");
        let mut parents = Parents::default();
        assert!(parents.descends(own, own));
        assert!(parents.descends(own, parent));
        assert!(!parents.descends(parent, own));
        assert!(!parents.descends(NOBODY, own));
        assert!(!parents.descends(own, NOBODY));
    }

    #[test]
    fn a_circle_of_parents_ends() {
        let mut parents = Parents(BTreeMap::from([(1, Some(2)), (2, Some(1))]));
        assert!(!parents.descends(1, 3));
    }

    #[test]
    fn threads_are_told_apart_from_processes() {
        let own = std::process::id();
        assert_eq!(thread_group(own), Some(own));
        assert_eq!(thread_group(NOBODY), None);
        let told = std::thread::spawn(|| {
            let tid = rustix::thread::gettid().as_raw_nonzero().get();
            thread_group(tid.unsigned_abs())
        });
        assert_eq!(told.join().expect("it does not panic"), Some(own));
    }
}
