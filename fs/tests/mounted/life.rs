//! How mounts come, go and are lost.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use gcgroup_fs::{Cleaned, MountError, clean_stale_mount};
use gcgroup_model::File;
use gcgroup_model::row::GroupWrites;
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};

use crate::fixture::{Fixture, LAUNCHED, Mood, errno, eventually, mount_at, write};

/// Where a child process is to mount, and the mood of its service.
const CHILD_ROOT: &str = "GCGROUP_TEST_CHILD_ROOT";
const CHILD_PANICS: &str = "GCGROUP_TEST_CHILD_PANICS";

/// Not a test of its own: other tests run it in a process that they then kill.
#[test]
fn a_child_serves_until_it_is_killed() {
    let Some(root) = std::env::var_os(CHILD_ROOT) else {
        return;
    };
    let root = PathBuf::from(root);
    let mood = match std::env::var_os(CHILD_PANICS) {
        Some(_) => Mood::Panics,
        None => Mood::Obeys,
    };
    let _mounted = mount_at(&root, GroupWrites::No, mood).expect("its parent mounts too");
    loop {
        std::thread::park();
    }
}

/// A process that serves the control files at `root`; it ends with the test.
struct Serving(Child, PathBuf);

impl Serving {
    fn start(root: &Path, mood: &Mood) -> Self {
        let program = std::env::current_exe().expect("it runs");
        let mut command = Command::new(program);
        command
            .args(["--exact", "life::a_child_serves_until_it_is_killed"])
            .env(CHILD_ROOT, root)
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        if *mood == Mood::Panics {
            command.env(CHILD_PANICS, "1");
        }
        let child = Self(command.spawn().expect("it starts"), root.to_owned());
        let serves = || version(root).exists();
        assert!(eventually(Duration::from_secs(10), serves));
        child
    }

    fn kill(&mut self) {
        self.0.kill().expect("it runs");
        self.0.wait().expect("it is ours");
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        // It has ended and is unmounted already, unless the test failed.
        let _ = self.0.kill();
        let _ = self.0.wait();
        let _ = clean_stale_mount(&self.1);
    }
}

fn version(root: &Path) -> PathBuf {
    root.join(File::Version.name())
}

fn mount_tmpfs(path: &Path) {
    rustix::mount::mount("tmpfs", path, "tmpfs", MountFlags::empty(), None)
        .expect("root may mount");
    fs::write(path.join("somebodys"), "data").expect("it is writable");
}

#[test]
fn unmounting_leaves_the_plain_directory() {
    let Some(fixture) = Fixture::mount() else {
        return;
    };
    let root = fixture.root();
    assert!(version(&root).exists());
    assert_eq!(
        fixture.mounted.path(),
        root.canonicalize().expect("it is there")
    );
    let Fixture {
        mounted,
        keeper,
        directory: _directory,
    } = fixture;
    mounted.unmount().expect("it is ours");
    assert!(!version(&root).exists());
    assert!(!keeper.was_lost(), "it was no accident");
}

#[test]
fn a_file_that_is_open_outlives_the_unmount() {
    let Some(fixture) = Fixture::mount() else {
        return;
    };
    let file = fs::File::open(fixture.launched(File::Priority)).expect("readable");
    let Fixture {
        mounted,
        directory: _directory,
        ..
    } = fixture;
    mounted.unmount().expect("it is ours");
    let mut buffer = [0; 8];
    let read = std::os::unix::fs::FileExt::read_at(&file, &mut buffer, 0);
    assert_eq!(read.expect("it is served"), 2);
}

#[test]
fn a_dead_mount_is_cleaned_and_can_be_mounted_again() {
    let Some(fixture) = Fixture::mount() else {
        return;
    };
    let directory = tempfile::tempdir().expect("there is room");
    let root = directory.path().join("x y");
    fs::create_dir(&root).expect("it is new");
    assert_eq!(
        clean_stale_mount(&root).expect("nothing is there"),
        Cleaned::Nothing
    );
    for _ in 0..2 {
        let mut child = Serving::start(&root, &Mood::Obeys);
        let living = clean_stale_mount(&root);
        assert!(
            matches!(living, Err(MountError::InUse { .. })),
            "{living:?}"
        );
        child.kill();
        assert_eq!(errno(fs::read_dir(&root)), Some(Errno::NOTCONN));
        assert_eq!(
            clean_stale_mount(&root).expect("it is dead"),
            Cleaned::Detached(1)
        );
        assert!(fs::read_dir(&root).expect("it is plain").next().is_none());
    }
    drop(fixture);
}

#[test]
fn a_mount_whose_service_is_silent_is_cleaned_and_its_callers_are_let_go() {
    let Some(_fixture) = Fixture::mount() else {
        return;
    };
    let directory = tempfile::tempdir().expect("there is room");
    let root = directory.path().to_owned();
    let mut child = Serving::start(&root, &Mood::Obeys);
    let pid = rustix::process::Pid::from_child(&child.0);
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).expect("it is ours");
    let stopped = rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::UNTRACED);
    stopped.expect("it is ours");
    let caller = {
        let file = root.join(File::ServiceStat.name());
        std::thread::spawn(move || fs::read(file))
    };
    assert_eq!(
        clean_stale_mount(&root).expect("it is silent"),
        Cleaned::Detached(1)
    );
    assert!(caller.join().expect("the caller ends").is_err());
    child.kill();
}

#[test]
fn somebody_elses_mount_is_never_taken_away() {
    let Some(fixture) = Fixture::mount() else {
        return;
    };
    let directory = tempfile::tempdir().expect("there is room");
    mount_tmpfs(directory.path());
    assert_eq!(
        clean_stale_mount(directory.path()).expect("it is not ours"),
        Cleaned::Nothing
    );
    assert!(directory.path().join("somebodys").exists());
    rustix::mount::unmount(directory.path(), UnmountFlags::DETACH).expect("it is the test's");

    // Mounted over ours: neither a clean-up nor our own unmount may touch it.
    let root = fixture.root();
    mount_tmpfs(&root);
    assert_eq!(
        clean_stale_mount(&root).expect("it is not ours"),
        Cleaned::Nothing
    );
    let Fixture {
        mounted,
        directory: _directory,
        ..
    } = fixture;
    mounted.unmount().expect("there is nothing to take away");
    assert!(root.join("somebodys").exists());
    rustix::mount::unmount(&root, UnmountFlags::DETACH).expect("it is the test's");
    rustix::mount::unmount(&root, UnmountFlags::DETACH).expect("ours was below");
}

#[test]
fn a_mount_in_our_place_is_not_taken_away() {
    let Some(fixture) = Fixture::mount() else {
        return;
    };
    let root = fixture.root();
    rustix::mount::unmount(&root, UnmountFlags::DETACH).expect("root may");
    mount_tmpfs(&root);
    let Fixture {
        mounted,
        directory: _directory,
        ..
    } = fixture;
    drop(mounted);
    assert!(root.join("somebodys").exists());
    rustix::mount::unmount(&root, UnmountFlags::DETACH).expect("it is the test's");
}

#[test]
fn the_service_learns_that_its_mount_was_taken_away() {
    let Some(fixture) = Fixture::mount() else {
        return;
    };
    assert!(!fixture.mounted.is_lost());
    rustix::mount::unmount(fixture.root(), UnmountFlags::empty()).expect("nobody uses it");
    assert!(eventually(Duration::from_secs(2), || fixture
        .mounted
        .is_lost()));
    assert!(eventually(Duration::from_secs(2), || fixture.was_lost()));
}

#[test]
fn a_lazy_unmount_beside_an_open_file_is_a_loss_too() {
    let Some(fixture) = Fixture::mount() else {
        return;
    };
    let _open = fs::File::open(fixture.launched(File::Priority)).expect("readable");
    rustix::mount::unmount(fixture.root(), UnmountFlags::DETACH).expect("root may");
    assert!(eventually(Duration::from_secs(2), || fixture.was_lost()));
}

#[test]
fn other_mounts_that_come_and_go_are_no_loss() {
    let Some(fixture) = Fixture::mount() else {
        return;
    };
    let directory = tempfile::tempdir().expect("there is room");
    for _ in 0..3 {
        mount_tmpfs(directory.path());
        rustix::mount::unmount(directory.path(), UnmountFlags::DETACH).expect("it is the test's");
    }
    std::thread::sleep(Duration::from_millis(300));
    assert!(!fixture.mounted.is_lost());
    assert!(version(&fixture.root()).exists());
}

#[test]
fn a_panic_in_a_handler_ends_the_process() {
    let Some(_fixture) = Fixture::mount() else {
        return;
    };
    let directory = tempfile::tempdir().expect("there is room");
    let root = directory.path().to_owned();
    let mut child = Serving::start(&root, &Mood::Panics);
    let file = root
        .join(format!("processes/{LAUNCHED}/0"))
        .join(File::Freeze.name());
    assert!(write(&file, "1").is_err());
    let status = child.0.wait().expect("it is ours");
    assert_eq!(status.signal(), Some(6), "it ended with {status}");
    assert_eq!(
        clean_stale_mount(&root).expect("it is dead"),
        Cleaned::Detached(1)
    );
}

#[test]
fn a_path_that_cannot_be_mounted_on_says_so() {
    let Some(_fixture) = Fixture::mount() else {
        return;
    };
    let directory = tempfile::tempdir().expect("there is room");
    let missing = directory.path().join("missing");
    let result = mount_at(&missing, GroupWrites::No, Mood::Obeys).map(drop);
    assert!(
        matches!(result, Err(MountError::Mountpoint { .. })),
        "{result:?}"
    );
    assert_eq!(
        clean_stale_mount(&missing).expect("nothing is there"),
        Cleaned::Nothing
    );
}

#[test]
fn a_symlink_to_the_mount_point_is_followed() {
    let Some(_fixture) = Fixture::mount() else {
        return;
    };
    let directory = tempfile::tempdir().expect("there is room");
    let (real, link) = (directory.path().join("real"), directory.path().join("link"));
    fs::create_dir(&real).expect("it is new");
    std::os::unix::fs::symlink(&real, &link).expect("it is new");
    let (_keeper, mounted) =
        mount_at(&link, GroupWrites::No, Mood::Obeys).expect("it is a directory");
    assert!(version(&real).exists());
    mounted.unmount().expect("it is ours");
    assert!(!version(&real).exists());
    let mut child = Serving::start(&link, &Mood::Obeys);
    child.kill();
    assert_eq!(
        clean_stale_mount(&link).expect("it is dead"),
        Cleaned::Detached(1)
    );
}
