//! What is there: names, modes, texts, and how reads behave.

use std::collections::BTreeSet;
use std::fs::{self, File as OsFile};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use gcgroup_model::row::{GroupWrites, Mode, rows_of};
use gcgroup_model::snapshot::NodeId;
use gcgroup_model::{File, Place, ROWS, Row};
use rustix::io::Errno;

use crate::fixture::{ATTACHED, Fixture, GROUP, LAUNCHED, errno, eventually, process};

fn names(directory: PathBuf) -> BTreeSet<String> {
    let entries = fs::read_dir(&directory).expect("it is a directory");
    entries
        .map(|entry| entry.expect("it is listed").file_name())
        .map(|name| name.into_string().expect("names are text"))
        .collect()
}

fn set<'a>(names: impl IntoIterator<Item = &'a str>) -> BTreeSet<String> {
    names.into_iter().map(str::to_owned).collect()
}

/// Where the fixture has a file of each row.
fn path(fixture: &Fixture, row: &Row) -> PathBuf {
    let directory = match row.place {
        Place::Root => "".to_owned(),
        Place::Gpu => "devices/0".to_owned(),
        Place::Partition => "partitions/0/a".to_owned(),
        Place::Processes => "processes".to_owned(),
        Place::Process => format!("processes/{LAUNCHED}"),
        Place::ProcessGpu | Place::Workload => format!("processes/{LAUNCHED}/0"),
    };
    fixture.root().join(directory).join(row.name)
}

#[test]
fn directories_hold_their_rows_and_nothing_else() {
    let Some(fixture) = Fixture::mount() else {
        return;
    };
    let root = fixture.root();
    let rows = |place| rows_of(place).map(|row| row.name);
    let top = ["devices", "partitions", "processes", "workloads"];
    assert_eq!(
        names(root.clone()),
        set(top.into_iter().chain(rows(Place::Root)))
    );
    assert_eq!(names(root.join("devices/0")), set(rows(Place::Gpu)));
    assert_eq!(names(root.join("partitions/0")), set(["a"]));
    assert_eq!(
        names(root.join("partitions/0/a")),
        set(rows(Place::Partition))
    );
    let (launched, attached) = (LAUNCHED.to_string(), ATTACHED.to_string());
    let pids = [launched.as_str(), attached.as_str()];
    let processes = pids.into_iter().chain(rows(Place::Processes));
    assert_eq!(names(root.join("processes")), set(processes));
    let entry = root.join("processes").join(&launched);
    let facts = ["0"].into_iter().chain(rows(Place::Process));
    assert_eq!(names(entry.clone()), set(facts));
    assert_eq!(names(entry.join("0")), set(rows(Place::Workload)));
    let entry = root.join("processes").join(&attached).join("0");
    assert_eq!(names(entry), set(rows(Place::ProcessGpu)));
    assert_eq!(names(root.join("workloads")), set(["noisy"]));
    let link = fs::read_link(root.join("workloads/noisy")).expect("it is a link");
    assert_eq!(link, PathBuf::from(format!("../processes/{LAUNCHED}/0")));
    assert!(
        root.join("workloads/noisy")
            .join(File::Stat.name())
            .is_file()
    );
}

#[test]
fn each_file_has_the_mode_of_its_row_and_belongs_to_root_and_the_group() {
    for group_writes in [GroupWrites::No, GroupWrites::Yes] {
        let Some(fixture) = Fixture::mount_with(group_writes) else {
            return;
        };
        for row in ROWS {
            let stat = fs::metadata(path(&fixture, row)).expect("each row has a file");
            let bits = u32::from(row.mode.bits(group_writes));
            assert_eq!(stat.permissions().mode(), 0o100_000 | bits, "{}", row.name);
            assert_eq!((stat.uid(), stat.gid(), stat.size()), (0, GROUP, 0));
        }
        let directory = |path: &str| {
            let stat = fs::metadata(fixture.root().join(path)).expect("it is there");
            assert_eq!((stat.uid(), stat.gid()), (0, GROUP));
            stat.permissions().mode() & 0o7777
        };
        for path in ["", "devices/0", "partitions", "partitions/0/a", "workloads"] {
            assert_eq!(directory(path), 0o755, "{path}");
        }
        let mode = match group_writes {
            GroupWrites::No => 0o755,
            GroupWrites::Yes => 0o775,
        };
        assert_eq!(directory("partitions/0"), mode);
    }
}

#[test]
fn texts_are_as_the_interface_has_them() {
    let Some(fixture) = Fixture::mount() else {
        return;
    };
    let list = format!("PID\n{LAUNCHED}\n{ATTACHED}\n");
    for (file, text) in [
        (File::Version, "1.2.3\n"),
        (File::Launch, ""),
        (File::FreezeMany, ""),
        (File::Pending, ""),
        (File::ServiceStat, "nr_changes: 3\n"),
        (File::GpuName, "A GPU\n"),
        (File::GpuUuid, "GPU-0123\n"),
        (File::SmCapacity, "132\n"),
        (File::SmGranularity, "8\n"),
        (File::GpuMemoryCapacity, "137438953472\n"),
        (File::GpuMemoryCurrent, "1073741824\n"),
        (File::GpuUtilization, "gpu_percent 42\n"),
        (File::GpuEvents, "xid 0\ngpu_lost 0\nmps_lost 0\n"),
        (
            File::GpuEnforcers,
            "compute.freeze none no driver\nattached/compute.freeze channel\n",
        ),
        (File::SmCount, "0\n"),
        (File::SmGroups, "\n"),
        (File::PartitionMembers, ""),
        (File::ProcessList, list.as_str()),
        (File::Cgroup, "/user.slice\n"),
        (File::Uid, "1000\n"),
        (File::Comm, "a worker\n"),
        (File::MemoryCurrent, "4096\n"),
        (File::MemoryPeak, "8192\n"),
        (File::Priority, "8\n"),
        (File::Freeze, "0\n"),
        (File::Max, "max 100000\n"),
        (File::Partition, "none\n"),
        (
            File::Stat,
            "nr_submitted_kernels: 5\nnr_ended_kernels: 3\nnr_pending_kernels: 2\n",
        ),
        (File::Events, "populated 1\nfrozen 0\nheld 0\npending 0\n"),
        (File::Enforcers, "compute.freeze worker\n"),
        (File::WorkloadSpec, "{\"kernel\":\"sleep\"}\n"),
        (
            File::WorkloadSamples,
            "seq,start_ns,device_us,wall_us,sm_count\n0,17,500.250,510.000,132\n",
        ),
    ] {
        let read = fs::read_to_string(path(&fixture, file.row()));
        assert_eq!(read.expect("it is readable"), text, "{}", file.name());
    }
}

#[test]
fn even_root_reads_no_write_only_file_and_writes_no_read_only_file() {
    let Some(fixture) = Fixture::mount() else {
        return;
    };
    for row in ROWS {
        let path = path(&fixture, row);
        let read = errno(OsFile::open(&path));
        let write = errno(OsFile::options().write(true).open(&path));
        let (reads, writes) = match row.mode {
            Mode::Ro => (None, Some(Errno::ACCESS)),
            Mode::Rw => (None, None),
            Mode::Wo => (Some(Errno::ACCESS), None),
        };
        assert_eq!((read, write), (reads, writes), "{}", row.name);
    }
}

#[test]
fn others_may_read_and_the_group_may_write_where_it_is_let() {
    for (group_writes, succeeds) in [(GroupWrites::No, false), (GroupWrites::Yes, true)] {
        let Some(fixture) = Fixture::mount_with(group_writes) else {
            return;
        };
        // The directory of the mount point is private to the test's user.
        let parent = fixture.root().join("..");
        fs::set_permissions(parent, fs::Permissions::from_mode(0o755)).expect("it is ours");
        let path = fixture.launched(File::Priority);
        let as_user = |group: u32, script: &str| {
            let mut command = Command::new("setpriv");
            command.args(["--reuid=65534", "--clear-groups"]);
            command.arg(format!("--regid={group}"));
            let script = format!("{{ {script}; }} 2>/dev/null");
            command.args(["sh", "-c", &script, "sh"]).arg(&path);
            command.status().expect("setpriv is there").success()
        };
        assert!(as_user(65_534, "cat \"$1\" >/dev/null"));
        assert!(!as_user(65_534, "echo 3 > \"$1\""));
        assert_eq!(as_user(GROUP, "echo 4 > \"$1\""), succeeds);
    }
}

#[test]
fn a_read_in_small_pieces_is_never_torn() {
    let Some(fixture) = Fixture::mount() else {
        return;
    };
    let file = OsFile::open(fixture.launched(File::MemoryCurrent)).expect("readable");
    fixture.publish_launched(|entry| entry.memory_current = 1111);
    let mut buffer = [0; 2];
    file.read_exact_at(&mut buffer, 0).expect("readable");
    assert_eq!(&buffer, b"11");
    fixture.publish_launched(|entry| entry.memory_current = 2222);
    file.read_exact_at(&mut buffer, 2).expect("readable");
    assert_eq!(&buffer, b"11", "the rest is of the text that was begun");
    let mut whole = [0; 16];
    let size = file.read_at(&mut whole, 0).expect("readable");
    assert_eq!(&whole[..size], b"2222\n", "from the start it is new");
}

#[test]
fn reading_a_sampled_value_says_so() {
    let Some(fixture) = Fixture::mount() else {
        return;
    };
    fs::read(fixture.launched(File::Priority)).expect("readable");
    assert!(fixture.keeper.touched.lock().is_empty());
    fs::read(fixture.launched(File::Stat)).expect("readable");
    assert_eq!(fixture.keeper.touched.lock().last(), Some(&NodeId(11)));
    fs::read(path(&fixture, File::GpuUtilization.row())).expect("readable");
    assert_eq!(fixture.keeper.touched.lock().last(), Some(&NodeId(1)));
}

#[test]
fn a_process_that_ended_is_gone_from_its_path_and_through_descriptors() {
    let Some(fixture) = Fixture::mount() else {
        return;
    };
    let path = fixture.launched(File::Priority);
    let link = fixture.root().join("workloads/noisy");
    let file = OsFile::options().read(true).write(true).open(&path);
    let file = file.expect("it is there");
    let mut buffer = [0; 16];
    file.read_at(&mut buffer, 0).expect("readable");
    assert!(link.exists());
    fixture.publish(|snapshot| {
        snapshot.processes.remove(&LAUNCHED);
    });
    assert_eq!(errno(file.read_at(&mut buffer, 0)), Some(Errno::NODEV));
    assert_eq!(errno(file.write_at(b"3", 0)), Some(Errno::NODEV));
    assert_eq!(errno(fs::read(&path)), Some(Errno::NOENT), "at once");
    let gone = |path: &PathBuf| errno(fs::symlink_metadata(path)) == Some(Errno::NOENT);
    let entry = fixture.root().join(format!("processes/{LAUNCHED}"));
    for path in [&path, &link, &entry] {
        assert!(
            eventually(Duration::from_millis(200), || gone(path)),
            "{path:?}"
        );
    }
    // Another process that gets the pid is another one.
    fixture.publish(|snapshot| {
        let another = process(50, LAUNCHED, None);
        snapshot.processes.insert(LAUNCHED, another);
    });
    assert_eq!(fs::read(&path).expect("it is there"), b"8\n");
    assert_eq!(errno(file.read_at(&mut buffer, 0)), Some(Errno::NODEV));
}

#[test]
fn self_is_the_process_of_the_calling_thread_and_nobody_elses() {
    let Some(fixture) = Fixture::mount() else {
        return;
    };
    let link = fixture.root().join("processes/self");
    assert_eq!(errno(fs::read_link(&link)), Some(Errno::NOENT));
    let pid = std::process::id();
    fixture.publish(|snapshot| {
        snapshot.processes.insert(pid, process(60, pid, None));
    });
    let target = PathBuf::from(pid.to_string());
    let from_thread = std::thread::scope(|scope| {
        let thread = scope.spawn(|| fs::read_link(&link));
        thread.join().expect("the thread ends")
    });
    assert_eq!(from_thread.expect("it has an entry"), target);
    assert_eq!(fs::read_link(&link).expect("it has an entry"), target);
    let comm = link.join(File::Comm.name());
    assert_eq!(fs::read(comm).expect("it leads there"), b"a worker\n");
    let child = Command::new("readlink").arg(&link).output();
    let child = child.expect("readlink is there");
    assert!(
        !child.status.success(),
        "a process without an entry has none"
    );
    assert!(!names(fixture.root().join("processes")).contains("self"));
}

#[test]
fn extended_attributes_are_not_supported() {
    let Some(fixture) = Fixture::mount() else {
        return;
    };
    let path = fixture.launched(File::Stat);
    let mut buffer = [0_u8; 64];
    for _ in 0..2 {
        let get = rustix::fs::getxattr(&path, "user.x", &mut buffer);
        assert_eq!(get, Err(Errno::OPNOTSUPP));
        let set = rustix::fs::setxattr(&path, "user.x", b"1", rustix::fs::XattrFlags::empty());
        assert_eq!(set, Err(Errno::OPNOTSUPP));
    }
}

#[test]
fn a_long_directory_is_listed_whole() {
    let Some(fixture) = Fixture::mount() else {
        return;
    };
    fixture.publish(|snapshot| {
        for index in 0..3000 {
            let (node, pid) = (1000 + 2 * u64::from(index), 100_000 + index);
            snapshot.processes.insert(pid, process(node, pid, None));
        }
    });
    assert_eq!(names(fixture.root().join("processes")).len(), 3003);
}
