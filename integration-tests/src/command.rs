//! The command line, run to its end.

use std::process::Output;

use crate::Instance;

/// Runs `gcgroup` on an instance.
///
/// # Panics
/// When it does not start.
#[track_caller]
#[must_use]
pub fn run(instance: &Instance, arguments: &[&str]) -> Output {
    instance
        .gcgroup(arguments)
        .output()
        .expect("gcgroup starts")
}

/// What a command that must succeed prints.
///
/// # Panics
/// When it fails, or says something on standard error.
#[track_caller]
pub fn ok(instance: &Instance, arguments: &[&str]) -> String {
    let output = run(instance, arguments);
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    assert!(output.stderr.is_empty(), "{arguments:?}: {output:?}");
    String::from_utf8(output.stdout).expect("text")
}
