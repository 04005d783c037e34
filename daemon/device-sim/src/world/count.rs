//! Counters of what processes launch.

use std::collections::BTreeMap;

use gcgroup_device::Launches;

use crate::wire::Launch;

/// Identifies a counter; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct CounterId {
    /// Whose launches it counts.
    pub(crate) pid: u32,
    number: u64,
}

/// The counters that there are. A process may have several, begun at different
/// times.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    counts: BTreeMap<CounterId, Launches>,
    next: u64,
}

impl Counters {
    /// Begins to count the launches of all contexts of a process, those to come
    /// included.
    pub(crate) fn begin(&mut self, pid: u32) -> CounterId {
        self.next += 1;
        let id = CounterId {
            pid,
            number: self.next,
        };
        self.counts.insert(id, Launches::default());
        id
    }

    /// Launches since the beginning; nothing once it was ended.
    pub(crate) fn read(&self, id: CounterId) -> Launches {
        self.counts.get(&id).copied().unwrap_or_default()
    }

    /// Ends a counter.
    pub(crate) fn end(&mut self, id: CounterId) {
        self.counts.remove(&id);
    }

    pub(super) fn add(&mut self, pid: u32, launch: Launch) {
        let of = |number| CounterId { pid, number };
        for (_, count) in self.counts.range_mut(of(0)..=of(u64::MAX)) {
            count.total += 1;
            count.graphs += u64::from(launch == Launch::Graph);
        }
    }
}
