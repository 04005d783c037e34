//! The binaries under test, of the profile that the tests were built with.
//!
//! Cargo hands a package's binaries to its own integration tests only, so they
//! are built here once for each test program. Cargo's lock on the target
//! directory keeps programs that do so at the same time apart.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::LazyLock;

static DIRECTORY: LazyLock<Result<PathBuf, &str>> = LazyLock::new(build);

/// Path of the service.
///
/// # Panics
/// When it does not build.
#[must_use]
pub fn gcgroupd() -> PathBuf {
    path("gcgroupd")
}

/// Path of the command line.
///
/// # Panics
/// When it does not build.
#[must_use]
pub fn gcgroup() -> PathBuf {
    path("gcgroup")
}

fn path(name: &str) -> PathBuf {
    match &*DIRECTORY {
        Ok(directory) => directory.join(name),
        Err(reason) => panic!("{reason}"),
    }
}

/// Root of the workspace that is tested.
#[must_use]
pub fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the package lies in the workspace")
}

/// Builds the binaries and returns the directory that has them.
///
/// A test program is `TARGET/PROFILE/deps/NAME-HASH`.
fn build() -> Result<PathBuf, &'static str> {
    let program = std::env::current_exe().expect("a running program has a path");
    let directory = program
        .ancestors()
        .nth(2)
        .expect("cargo puts test programs into PROFILE/deps");
    let target = directory.parent().expect("PROFILE lies in TARGET");
    let profile = match directory.file_name().and_then(|name| name.to_str()) {
        Some("debug") => "dev",
        Some(name) => name,
        None => panic!("{} names no profile", directory.display()),
    };
    // The whole workspace is selected so that features are unified as they
    // were for the tests, and dependencies are not built a second time.
    let built = Command::new(env!("CARGO"))
        .current_dir(workspace())
        .args(["build", "--quiet", "--workspace", "--bin", "gcgroupd"])
        .args(["--bin", "gcgroup", "--profile", profile, "--target-dir"])
        .arg(target)
        .stdin(Stdio::null())
        .status()
        .expect("cargo starts");
    if built.success() {
        Ok(directory.to_owned())
    } else {
        Err("gcgroupd and gcgroup do not build; cargo has said why")
    }
}
