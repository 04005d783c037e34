//! How long the driver's calls take that act on channels.

use crate::shape;

/// Microseconds from such a call to its answer. What it does is done at its
/// beginning: a caller that dies meanwhile leaves it done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChannelLatency {
    /// A stop of one process.
    pub stop_us: u64,
    /// What each further process in the call adds to it.
    pub stop_more_us: u64,
    /// A resume of one process.
    pub resume_us: u64,
    /// What each further process in the call adds to it.
    pub resume_more_us: u64,
}

impl Default for ChannelLatency {
    /// As measured on an H200.
    fn default() -> Self {
        let [stop_us, stop_both] = shape::STOP_US;
        let [resume_us, resume_both] = shape::RESUME_US;
        Self {
            stop_us,
            stop_more_us: stop_both - stop_us,
            resume_us,
            resume_more_us: resume_both - resume_us,
        }
    }
}

impl ChannelLatency {
    pub(crate) fn stop_us(&self, processes: usize) -> u64 {
        spread(self.stop_us, self.stop_more_us, processes)
    }

    pub(crate) fn resume_us(&self, processes: usize) -> u64 {
        spread(self.resume_us, self.resume_more_us, processes)
    }
}

fn spread(first: u64, more: u64, processes: usize) -> u64 {
    let further = processes.saturating_sub(1) as u64;
    first.saturating_add(more.saturating_mul(further))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_take_as_long_as_was_measured() {
        let latency = ChannelLatency::default();
        assert_eq!((latency.stop_us(1), latency.stop_us(2)), (700, 950));
        assert_eq!((latency.resume_us(1), latency.resume_us(2)), (450, 470));
    }
}
