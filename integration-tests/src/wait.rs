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

/// Measures until a figure is right, at most five times.
///
/// For figures that hold only while the processes of the test get the
/// processors in time: a measurement on a machine busy with something else is
/// no evidence, five in a row are.
///
/// # Panics
/// When no measurement came out right, with what each of them found.
#[track_caller]
pub fn measured(what: &str, mut measure: impl FnMut() -> Result<(), String>) {
    let mut found = Vec::new();
    for _ in 0..5 {
        match measure() {
            Ok(()) => return,
            Err(off) => found.push(off),
        }
    }
    panic!("{what}: {}", found.join("; "));
}
