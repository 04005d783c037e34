//! What a write, a mkdir or anything else that would change something does.

use std::fs::{self, File as OsFile, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::time::SystemTime;

use gcgroup_model::change::{Begun, Setting};
use gcgroup_model::snapshot::NodeId;
use gcgroup_model::spec::SpecError;
use gcgroup_model::value::{Priority, SmRequest};
use gcgroup_model::{Change, File, Refusal, Target};
use rustix::io::Errno;

use crate::fixture::{ATTACHED, Fixture, LAUNCHED, Mood, errno, shell, write};

#[test]
fn what_is_written_is_read_back() {
    let Some(fixture) = Fixture::mount() else {
        return;
    };
    for (file, written, read) in [
        (File::Priority, "4", "4\n"),
        (File::Priority, "+15\n", "15\n"),
        (File::Freeze, "1\n", "1\n"),
        (File::Freeze, "1\n", "1\n"),
        (File::Freeze, "0", "0\n"),
        (File::Max, "20000", "20000 100000\n"),
        (File::Max, "20000 50000\n", "20000 50000\n"),
        (File::Max, "max", "max 100000\n"),
        (File::Partition, "a\n", "a\n"),
        (File::Partition, "none", "none\n"),
    ] {
        let path = fixture.launched(file);
        write(&path, written).expect("it is in the grammar");
        let now = fs::read_to_string(&path).expect("readable");
        assert_eq!(now, read, "{} {written:?}", file.name());
    }
    let count = fixture
        .root()
        .join("partitions/0/a")
        .join(File::SmCount.name());
    write(&count, "61").expect("it is in the grammar");
    assert_eq!(fs::read(&count).expect("readable"), b"64\n");
    assert_eq!(
        fixture.last_change(),
        Change::Resize(Target(NodeId(3)), SmRequest::Count(61))
    );
}

#[test]
fn a_shell_writes_reads_and_sees_the_error() {
    let Some(fixture) = Fixture::mount() else {
        return;
    };
    let path = fixture.launched(File::Priority);
    let path = path.display();
    assert!(shell(&format!(
        "echo 3 > {path} && [ \"$(cat {path})\" = 3 ]"
    )));
    assert!(shell(&format!(
        "echo 5 >> {path} && [ \"$(cat {path})\" = 5 ]"
    )));
    assert!(shell(&format!(
        "(echo 6; echo 7) > {path} && [ \"$(cat {path})\" = 7 ]"
    )));
    assert!(shell(&format!("! echo 16 2>/dev/null > {path}")));
    assert!(shell(&format!(
        "! (echo x > {path}) 2>/dev/null && [ \"$(cat {path})\" = 7 ]"
    )));
}

#[test]
fn bytes_outside_the_grammar_are_refused_and_nothing_reaches_the_service() {
    let Some(fixture) = Fixture::mount() else {
        return;
    };
    for (file, written, expected) in [
        (File::Priority, "16", Errno::INVAL),
        (File::Priority, "4 ", Errno::INVAL),
        (File::Priority, "4\n\n", Errno::INVAL),
        (File::Priority, "-1", Errno::INVAL),
        (File::Priority, "0x4", Errno::INVAL),
        (File::Priority, "18446744073709551616", Errno::RANGE),
        (
            File::Priority,
            "00000000000000000000000000000004",
            Errno::INVAL,
        ),
        (File::Freeze, "2", Errno::INVAL),
        (File::Freeze, "\n", Errno::INVAL),
        (File::Max, "999", Errno::INVAL),
        (File::Max, "20000 9999", Errno::INVAL),
        (File::Max, "99999999999999999999", Errno::RANGE),
        (File::Partition, "Big", Errno::INVAL),
        (File::Kill, "0", Errno::INVAL),
    ] {
        let result = write(&fixture.launched(file), written);
        assert_eq!(errno(result), Some(expected), "{} {written:?}", file.name());
    }
    let raw = OpenOptions::new()
        .write(true)
        .open(fixture.launched(File::Partition));
    let raw = raw.expect("writable");
    assert_eq!(errno(raw.write_at(b"\xff", 0)), Some(Errno::INVAL));
    assert!(fixture.keeper.changes.lock().is_empty());
    let longest = "0000000000000000000000000000004";
    assert_eq!(longest.len(), 31);
    write(&fixture.launched(File::Priority), longest).expect("31 bytes are taken");
}

#[test]
fn one_write_is_one_command_wherever_it_is() {
    let Some(fixture) = Fixture::mount() else {
        return;
    };
    let mut file = OpenOptions::new()
        .write(true)
        .open(fixture.launched(File::Priority))
        .expect("writable");
    for number in [3_u8, 12, 1] {
        write!(file, "{number}").expect("in the grammar");
        let priority = Priority::new(number).expect("in range");
        let change = Change::Set(Target(NodeId(11)), Setting::Priority(priority));
        assert_eq!(fixture.last_change(), change);
    }
    file.write_at(b"9", 1 << 40).expect("offsets are ignored");
    assert_eq!(
        fs::read(fixture.launched(File::Priority)).expect("readable"),
        b"9\n"
    );
}

#[test]
fn a_refusal_reaches_the_writer_as_its_errno() {
    let Some(fixture) = Fixture::mount() else {
        return;
    };
    let text = || "for the test".to_owned();
    for (refusal, expected) in [
        (Refusal::Invalid(text()), Errno::INVAL),
        (Refusal::Range(text()), Errno::RANGE),
        (Refusal::Spec(SpecError::new("gpu", "no")), Errno::INVAL),
        (Refusal::NotFound(text()), Errno::NOENT),
        (Refusal::Exists(text()), Errno::EXIST),
        (Refusal::Gone(text()), Errno::NODEV),
        (Refusal::NoProcess(3), Errno::SRCH),
        (Refusal::Busy(text()), Errno::BUSY),
        (Refusal::Unsupported(text()), Errno::OPNOTSUPP),
        (Refusal::Denied(text()), Errno::PERM),
        (Refusal::NoSpace(text()), Errno::NOSPC),
        (Refusal::NoMemory(text()), Errno::NOMEM),
        (Refusal::Failed(text()), Errno::IO),
        (
            Refusal::TimedOut {
                what: text(),
                limit_ms: 1,
                begun: Begun::Yes,
            },
            Errno::TIMEDOUT,
        ),
    ] {
        fixture.mood(Mood::Refuses(refusal.clone()));
        let result = write(&fixture.launched(File::Freeze), "1");
        assert_eq!(errno(result), Some(expected), "{refusal:?}");
    }
}

#[test]
fn the_service_learns_who_asked() {
    let Some(fixture) = Fixture::mount() else {
        return;
    };
    write(&fixture.launched(File::Freeze), "1").expect("in the grammar");
    let caller = fixture.keeper.changes.lock()[0].0;
    let tid = rustix::thread::gettid().as_raw_nonzero().get();
    assert_eq!(i64::from(caller.tid), i64::from(tid));
    assert_eq!(caller.uid, rustix::process::geteuid().as_raw());
}

#[test]
fn several_processes_freeze_in_one_write_and_read_as_frozen() {
    let Some(fixture) = Fixture::mount() else {
        return;
    };
    let path = fixture.root().join(File::FreezeMany.name());
    write(&path, &format!("1 {LAUNCHED} {ATTACHED}\n")).expect("both are there");
    let frozen = fs::read_to_string(&path).expect("readable");
    assert_eq!(frozen, format!("{LAUNCHED}\n{ATTACHED}\n"));
    write(&path, &format!("0 {LAUNCHED}")).expect("it is there");
    assert_eq!(
        fs::read_to_string(&path).expect("readable"),
        format!("{ATTACHED}\n")
    );
    assert_eq!(errno(write(&path, "1 7")), Some(Errno::SRCH));
    let many: String = (0..100).map(|pid| format!(" {pid}")).collect();
    assert_eq!(errno(write(&path, &format!("1{many}"))), Some(Errno::SRCH));
    assert_eq!(errno(write(&path, "1 7 7")), Some(Errno::INVAL));
}

#[test]
fn what_waits_for_a_process_is_read_back_a_line_each() {
    let Some(fixture) = Fixture::mount() else {
        return;
    };
    let path = fixture.root().join(File::Pending.name());
    write(&path, "70 compute.priority 3\n").expect("it is in the grammar");
    write(&path, "71 compute.max 20000 100000").expect("it is in the grammar");
    assert_eq!(
        fs::read_to_string(&path).expect("readable"),
        "70 compute.priority 3\n71 compute.max 20000 100000\n"
    );
    for wrong in ["70 compute.priority 16", "70 gcgroup.kill 1", "70", "\n"] {
        assert_eq!(errno(write(&path, wrong)), Some(Errno::INVAL), "{wrong:?}");
    }
    let large = "70 compute.max 99999999999999999999";
    assert_eq!(errno(write(&path, large)), Some(Errno::RANGE));
}

#[test]
fn truncating_and_touching_do_no_harm() {
    let Some(fixture) = Fixture::mount() else {
        return;
    };
    let path = fixture.launched(File::Priority);
    let file = OpenOptions::new()
        .write(true)
        .open(&path)
        .expect("writable");
    file.set_len(0).expect("harmless");
    file.set_len(99).expect("harmless");
    file.set_modified(SystemTime::now()).expect("harmless");
    file.sync_all().expect("harmless");
    drop(
        OsFile::options()
            .write(true)
            .truncate(true)
            .open(&path)
            .expect("harmless"),
    );
    assert_eq!(fs::metadata(&path).expect("it is there").len(), 0);
    assert_eq!(fs::read(&path).expect("readable"), b"8\n");
    assert!(fixture.keeper.changes.lock().is_empty());
}

#[test]
fn nothing_else_can_be_made_changed_or_removed() {
    let Some(fixture) = Fixture::mount() else {
        return;
    };
    let root = fixture.root();
    let path = fixture.launched(File::Priority);
    let entry = path.parent().expect("it has one").to_owned();
    let new = entry.join("new");
    let elsewhere = root.join("new");
    let mode = fs::Permissions::from_mode(0o666);
    for (what, result) in [
        ("chmod", fs::set_permissions(&path, mode.clone())),
        ("chmod", fs::set_permissions(&entry, mode)),
        ("chown", std::os::unix::fs::chown(&path, Some(1), None)),
        ("create", OsFile::create(&new).map(drop)),
        ("unlink", fs::remove_file(&path)),
        ("mkdir", fs::create_dir(&new)),
        ("mkdir", fs::create_dir(&elsewhere)),
        ("mkdir", fs::create_dir(root.join("partitions/7"))),
        ("rmdir", fs::remove_dir(&entry)),
        ("rmdir", fs::remove_dir(root.join("partitions/0"))),
        ("rename", fs::rename(&path, &new)),
        (
            "rename",
            fs::rename(root.join("partitions/0/a"), root.join("partitions/0/b")),
        ),
        ("link", fs::hard_link(&path, &new)),
        ("symlink", std::os::unix::fs::symlink("x", &new)),
        (
            "mknod",
            rustix::fs::mknodat(
                rustix::fs::CWD,
                &new,
                rustix::fs::FileType::Fifo,
                rustix::fs::Mode::RUSR,
                0,
            )
            .map_err(Into::into),
        ),
    ] {
        assert_eq!(errno(result), Some(Errno::PERM), "{what}");
    }
    assert!(fixture.keeper.changes.lock().is_empty());
}

#[test]
fn partitions_are_made_and_removed_as_directories() {
    let Some(fixture) = Fixture::mount() else {
        return;
    };
    let partitions = fixture.root().join("partitions/0");
    fs::create_dir(partitions.join("be")).expect("the name is free");
    let count = partitions.join("be").join(File::SmCount.name());
    assert_eq!(fs::read(&count).expect("it is there at once"), b"0\n");
    assert_eq!(
        errno(fs::create_dir(partitions.join("be"))),
        Some(Errno::EXIST)
    );
    for name in ["none", "Be", ".be", "a b", &"x".repeat(32)] {
        let made = fs::create_dir(partitions.join(name));
        assert_eq!(errno(made), Some(Errno::INVAL), "{name:?}");
    }
    fixture.mood(Mood::Refuses(Refusal::Busy("it has members".to_owned())));
    assert_eq!(
        errno(fs::remove_dir(partitions.join("be"))),
        Some(Errno::BUSY)
    );
    fixture.mood(Mood::Obeys);
    fs::remove_dir(partitions.join("be")).expect("it is empty");
    assert_eq!(
        errno(fs::metadata(partitions.join("be"))),
        Some(Errno::NOENT)
    );
    assert_eq!(
        errno(fs::remove_dir(partitions.join("be"))),
        Some(Errno::NOENT)
    );
    assert_eq!(errno(fs::read(&count)), Some(Errno::NOENT));
}

#[test]
fn a_kill_removes_the_entry() {
    let Some(fixture) = Fixture::mount() else {
        return;
    };
    write(&fixture.launched(File::Kill), "1\n").expect("in the grammar");
    assert_eq!(
        fixture.last_change(),
        Change::Set(Target(NodeId(11)), Setting::Kill)
    );
    let gone = || !fixture.launched(File::Kill).exists();
    assert!(crate::fixture::eventually(
        std::time::Duration::from_millis(200),
        gone
    ));
}
