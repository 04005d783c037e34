//! Barriers: workloads of one name that start together.

use std::collections::BTreeMap;

/// Workloads that are ready and wait for others of their barrier.
#[derive(Debug, Default)]
pub struct Barriers {
    waiting: BTreeMap<(String, u32), Vec<u32>>,
}

impl Barriers {
    /// A workload is ready. Returns everybody who may start now: all of the
    /// barrier when it was the last, nobody before. Barriers of one name and
    /// different counts are different barriers.
    pub fn arrive(&mut self, name: &str, count: u32, pid: u32) -> Vec<u32> {
        let key = (name.to_owned(), count);
        let waiting = self.waiting.entry(key.clone()).or_default();
        waiting.push(pid);
        if waiting.len() < count as usize {
            return Vec::new();
        }
        self.waiting.remove(&key).unwrap_or_default()
    }

    /// A workload ended before its barrier opened.
    pub fn leave(&mut self, pid: u32) {
        for waiting in self.waiting.values_mut() {
            waiting.retain(|other| *other != pid);
        }
        self.waiting.retain(|_, waiting| !waiting.is_empty());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_to_arrive_starts_them_all() {
        let mut barriers = Barriers::default();
        assert!(barriers.arrive("x", 3, 1).is_empty());
        assert!(barriers.arrive("y", 2, 7).is_empty());
        assert!(barriers.arrive("x", 3, 2).is_empty());
        assert_eq!(barriers.arrive("x", 3, 3), [1, 2, 3]);
    }

    #[test]
    fn one_that_ends_while_it_waits_is_not_counted() {
        let mut barriers = Barriers::default();
        barriers.arrive("x", 2, 1);
        barriers.leave(1);
        assert!(barriers.arrive("x", 2, 2).is_empty());
        assert_eq!(barriers.arrive("x", 2, 3), [2, 3]);
    }
}
