//! Waiting for a condition, never for a fixed time.

use std::time::{Duration, Instant};

/// How often a condition is looked at.
const STEP: Duration = Duration::from_millis(2);

/// Whether `condition` became true within `limit`.
pub fn becomes(limit: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + limit;
    loop {
        if condition() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(STEP);
    }
}

/// Waits until `condition` is true.
///
/// # Panics
/// When it is not so within `limit`; `what` says what was waited for.
#[track_caller]
pub fn until(limit: Duration, what: &str, condition: impl FnMut() -> bool) {
    assert!(becomes(limit, condition), "not within {limit:?}: {what}");
}
