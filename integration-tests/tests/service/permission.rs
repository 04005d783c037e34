//! Who may do what, and what nobody may do.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use gcgroup_integration_tests::identity::{NOBODY, acting_as};
use gcgroup_integration_tests::{Errno, Instance, Launched, Setup, file};
use gcgroup_model::row::rows_of;
use gcgroup_model::{Place, Row};
use rustix::fs::{CWD, FileType, Mode, OFlags, linkat, mknodat, open, symlink};

fn furnished(setup: Setup) -> (Instance, Launched) {
    let instance = setup.start();
    instance.partition("a", 64);
    let workload = instance.launch_fma();
    (instance, workload)
}

fn rows(workload: &Launched) -> Vec<(&'static Row, String)> {
    let mut rows = Vec::new();
    for (place, directory) in [
        (Place::Root, String::new()),
        (Place::Gpu, "devices/0/".to_owned()),
        (Place::Partition, "partitions/0/a/".to_owned()),
        (Place::Processes, "processes/".to_owned()),
        (Place::Process, format!("processes/{}/", workload.pid)),
        (Place::Workload, workload.file("")),
    ] {
        rows.extend(rows_of(place).map(|row| (row, format!("{directory}{}", row.name))));
    }
    rows
}

#[test]
fn nobody_reads_what_is_readable_and_writes_nothing() {
    let (instance, workload) = furnished(Setup::new());
    acting_as(NOBODY, NOBODY, || {
        for (row, path) in rows(&workload) {
            let read = instance.read(&path);
            if row.mode.readable() {
                assert!(read.is_ok(), "{path}: {read:?}");
            } else {
                assert_eq!(read, Err(Errno::ACCESS), "{path}");
            }
            assert_eq!(instance.write(&path, "1"), Err(Errno::ACCESS), "{path}");
        }
        let made = fs::create_dir(instance.path("partitions/0/b")).expect_err("not root");
        assert_eq!(made.raw_os_error(), Some(Errno::ACCESS.raw_os_error()));
        let removed = fs::remove_dir(instance.path("partitions/0/a")).expect_err("not root");
        assert_eq!(removed.raw_os_error(), Some(Errno::ACCESS.raw_os_error()));
    });
    assert_eq!(instance.names("partitions/0"), ["a"]);
}

#[test]
fn a_member_of_the_group_writes_where_that_is_configured() {
    let setup = Setup::new()
        .setting("group", "\"daemon\"")
        .setting("writable_by_group", "true");
    let (instance, workload) = furnished(setup);
    acting_as(NOBODY, 1, || {
        instance.set(workload.file("compute.freeze"), "1");
        fs::create_dir(instance.path("partitions/0/b")).expect("the group may make one");
        instance.set("partitions/0/b/sm.count", "8");
        fs::remove_dir(instance.path("partitions/0/b")).expect("the group may remove it");
        instance.set(workload.file("gcgroup.kill"), "1");
    });
    acting_as(NOBODY, NOBODY, || {
        let refused = instance.write("gcgroup.freeze", "1 1");
        assert_eq!(refused, Err(Errno::ACCESS));
    });
}

#[test]
fn a_member_of_the_group_writes_nothing_otherwise() {
    let setup = Setup::new().setting("group", "\"daemon\"");
    let (instance, workload) = furnished(setup);
    acting_as(NOBODY, 1, || {
        let refused = instance.write(workload.file("compute.freeze"), "1");
        assert_eq!(refused, Err(Errno::ACCESS));
        assert!(fs::create_dir(instance.path("partitions/0/b")).is_err());
    });
}

/// Errno of an operation that has to fail.
#[track_caller]
fn errno<T>(result: std::io::Result<T>) -> Option<Errno> {
    let error = result.err().expect("nobody may do this");
    Errno::from_io_error(&error)
}

#[test]
fn modes_and_owners_cannot_be_changed() {
    let (instance, workload) = furnished(Setup::new());
    let directories = ["", "partitions/0", "partitions/0/a", "processes"].map(str::to_owned);
    let files = rows(&workload).into_iter().map(|(_, path)| path);
    for path in files.chain(directories) {
        let path = instance.path(path);
        let before = fs::metadata(&path).expect("it is there").mode();
        let chmod = fs::set_permissions(&path, fs::Permissions::from_mode(0o777));
        assert_eq!(errno(chmod), Some(Errno::PERM), "{}", path.display());
        let chown = std::os::unix::fs::chown(&path, Some(1), Some(1));
        assert_eq!(errno(chown), Some(Errno::PERM), "{}", path.display());
        let after = fs::metadata(&path).expect("it is there").mode();
        assert_eq!(before, after, "{}", path.display());
    }
}

#[test]
fn nothing_can_be_created_but_partitions() {
    let (instance, workload) = furnished(Setup::new());
    let process = format!("processes/{}", workload.pid);
    let own = workload.file("");
    for directory in [
        "",
        "devices",
        "devices/0",
        "partitions",
        "partitions/0",
        "partitions/0/a",
        "processes",
        process.as_str(),
        own.as_str(),
        "workloads",
    ] {
        let new = instance.path(directory).join("new");
        let created = open(&new, OFlags::WRONLY | OFlags::CREATE, Mode::RUSR);
        assert_eq!(created.err(), Some(Errno::PERM), "open in {directory:?}");
        let fifo = mknodat(CWD, &new, FileType::Fifo, Mode::RUSR, 0);
        assert_eq!(fifo, Err(Errno::PERM), "mkfifo in {directory:?}");
        assert_eq!(
            symlink("x", &new),
            Err(Errno::PERM),
            "symlink in {directory:?}"
        );
        let version = instance.path("gcgroup.version");
        let linked = linkat(CWD, &version, CWD, &new, rustix::fs::AtFlags::empty());
        assert_eq!(linked, Err(Errno::PERM), "link in {directory:?}");
        if directory != "partitions/0" {
            let made = fs::create_dir(&new);
            assert_eq!(errno(made), Some(Errno::PERM), "mkdir in {directory:?}");
        }
    }
}

#[test]
fn nothing_can_be_removed_or_renamed_but_partitions() {
    let (instance, workload) = furnished(Setup::new());
    for (_, path) in rows(&workload) {
        let path = instance.path(path);
        assert_eq!(
            errno(fs::remove_file(&path)),
            Some(Errno::PERM),
            "{}",
            path.display()
        );
        let renamed = fs::rename(&path, path.with_file_name("new"));
        assert_eq!(errno(renamed), Some(Errno::PERM), "{}", path.display());
    }
    let link = instance.path("workloads").join(&workload.name);
    assert_eq!(errno(fs::remove_file(&link)), Some(Errno::PERM));
    for directory in [
        "devices/0",
        "devices",
        "partitions/0",
        "processes",
        "workloads",
    ] {
        let path = instance.path(directory);
        assert_eq!(
            errno(fs::remove_dir(&path)),
            Some(Errno::PERM),
            "rmdir {directory}"
        );
    }
    let process = instance.path(format!("processes/{}", workload.pid));
    assert_eq!(errno(fs::remove_dir(&process)), Some(Errno::PERM));
    let from = instance.path("partitions/0/a");
    let renamed = fs::rename(&from, instance.path("partitions/0/b"));
    assert_eq!(errno(renamed), Some(Errno::PERM), "rename of a partition");
    assert_eq!(instance.names("partitions/0"), ["a"]);
}

#[test]
fn opening_for_both_needs_a_file_that_does_both() {
    let (instance, workload) = furnished(Setup::new());
    for (row, path) in rows(&workload) {
        let opened = file::open_with(&instance.path(&path), OFlags::RDWR);
        if row.mode.readable() && row.mode.writable() {
            assert!(opened.is_ok(), "{path}");
        } else {
            assert_eq!(opened.err(), Some(Errno::ACCESS), "{path}");
        }
    }
}
