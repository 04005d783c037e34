//! How hard a search may press the driver, and for how long.
//!
//! Questions take RM's lock, some of them alone, and everybody on the host who
//! calls the driver meanwhile waits. Each is over in two microseconds, but a
//! search can need a million of them; so it works in slices and pauses in between.
//! And what a process has is the process's to decide: one that opens clients
//! and objects without end must cost the service a bounded time.

use std::thread;
use std::time::{Duration, Instant};

use super::rm::RmError;

/// How long a search asks without a pause, at most.
const SLICE: Duration = Duration::from_millis(2);

/// How long it then leaves the driver to the others.
const PAUSE: Duration = Duration::from_millis(1);

/// Calls that one search makes for what its process has: handles looked at, and
/// clients tried. At 1.9 us each (measured) that is 4 s of work and 2 s of pauses.
/// A context has some hundred objects, a large model some ten thousand.
pub(super) const CALLS_MAX: u64 = 0x20_0000;

/// The work of one search so far.
#[derive(Debug)]
pub(super) struct Pace {
    slice: Instant,
    calls: u64,
    pauses: u64,
}

impl Pace {
    pub(super) fn new() -> Self {
        Self {
            slice: Instant::now(),
            calls: 0,
            pauses: 0,
        }
    }

    /// Before each call for what the process has.
    ///
    /// # Errors
    /// [`RmError::TooMuch`] when it was allowed all that a search is.
    pub(super) fn call(&mut self) -> Result<(), RmError> {
        if self.calls >= CALLS_MAX {
            return Err(RmError::TooMuch);
        }
        self.calls += 1;
        self.breathe();
        Ok(())
    }

    /// Before each question about the host, whose number is bounded otherwise.
    pub(super) fn breathe(&mut self) {
        if self.slice.elapsed() >= SLICE {
            thread::sleep(PAUSE);
            self.pauses += 1;
            self.slice = Instant::now();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_work_is_done_in_slices() {
        let begun = Instant::now();
        let mut pace = Pace::new();
        while pace.pauses < 5 {
            pace.breathe();
        }
        assert!(begun.elapsed() >= (SLICE + PAUSE) * 5);
        // What is short is not held up.
        let mut short = Pace::new();
        assert_eq!(short.call(), Ok(()));
        assert_eq!((short.calls, short.pauses), (1, 0));
    }

    #[test]
    fn what_one_process_may_cost_is_bounded() {
        let mut pace = Pace::new();
        pace.calls = CALLS_MAX - 1;
        assert_eq!(pace.call(), Ok(()));
        assert_eq!(pace.call(), Err(RmError::TooMuch));
        assert_eq!(
            RmError::TooMuch
                .of("listing the driver objects")
                .to_string(),
            "listing the driver objects: the process has too many for the 2097152 calls of one search"
        );
    }
}
