//! The one clock that the service reads: CLOCK_MONOTONIC.

use rustix::time::{ClockId, clock_gettime};

/// Nanoseconds since some point before the service began.
pub(crate) fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    // The kernel never reports a negative monotonic time.
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}
