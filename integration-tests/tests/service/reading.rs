//! Reads are whole, fresh and keep to what their descriptor began.

use std::time::Duration;

use gcgroup_integration_tests::{Errno, Instance, file, keyed, wait};
use gcgroup_model::Place;
use gcgroup_model::row::rows_of;
use rustix::fs::OFlags;
use rustix::io::{pread, read as read_once};

#[test]
fn a_later_offset_goes_on_with_the_text_of_offset_0() {
    let instance = Instance::new();
    let workload = instance.launch_fma();
    let relative = workload.file("compute.max");
    let descriptor = file::open_with(&instance.path(&relative), OFlags::RDONLY).expect("readable");
    let mut buffer = [0_u8; 2];
    assert_eq!(pread(&descriptor, &mut buffer, 0), Ok(2));
    assert_eq!(&buffer, b"ma");
    instance.set(&relative, "20000 50000");
    let mut rest = [0_u8; 64];
    let count = pread(&descriptor, &mut rest, 2).expect("the rest is kept");
    assert_eq!(rest[..count].trim_ascii_end(), b"x 100000");
    let count = pread(&descriptor, &mut rest, 0).expect("offset 0 renders anew");
    assert_eq!(rest[..count].trim_ascii_end(), b"20000 50000");
}

#[test]
fn a_read_in_small_steps_is_never_torn() {
    let instance = Instance::new();
    let workload = instance.launch_fma();
    let path = instance.path(workload.file("gcgroup.stat"));
    for _ in 0..20 {
        let descriptor = file::open_with(&path, OFlags::RDONLY).expect("readable");
        let mut content = Vec::new();
        let mut buffer = [0_u8; 7];
        loop {
            match read_once(&descriptor, &mut buffer).expect("readable") {
                0 => break,
                count => content.extend_from_slice(&buffer[..count]),
            }
        }
        let text = String::from_utf8(content).expect("ASCII");
        let found = keyed::numbers(&text).expect("a keyed file");
        let pending = found["nr_submitted_kernels"] - found["nr_ended_kernels"];
        assert_eq!(found["nr_pending_kernels"], pending, "{text}");
    }
}

#[test]
fn reading_beyond_the_end_gives_nothing() {
    let instance = Instance::new();
    let descriptor =
        file::open_with(&instance.path("gcgroup.version"), OFlags::RDONLY).expect("readable");
    let mut buffer = [0_u8; 64];
    let length = pread(&descriptor, &mut buffer, 0).expect("readable") as u64;
    for offset in [length, length + 1, 1 << 40] {
        assert_eq!(
            pread(&descriptor, &mut buffer, offset),
            Ok(0),
            "at {offset}"
        );
    }
}

#[test]
fn every_text_ends_with_one_newline_or_is_empty() {
    let instance = Instance::new();
    instance.partition("a", 8);
    let workload = instance.launch_fma();
    for (place, directory) in [
        (Place::Root, String::new()),
        (Place::Gpu, "devices/0/".to_owned()),
        (Place::Partition, "partitions/0/a/".to_owned()),
        (Place::Processes, "processes/".to_owned()),
        (Place::Process, format!("processes/{}/", workload.pid)),
        (Place::Workload, workload.file("")),
    ] {
        for row in rows_of(place).filter(|row| row.mode.readable()) {
            let text = instance
                .read(format!("{directory}{}", row.name))
                .expect(row.name);
            let newlines = text.len() - text.trim_end_matches('\n').len();
            assert!(text.is_empty() || newlines == 1, "{}: {text:?}", row.name);
            assert!(text.is_ascii(), "{}: {text:?}", row.name);
        }
    }
}

#[test]
fn the_counters_stand_in_the_order_of_the_interface() {
    const ORDER: [&str; 12] = [
        "nr_submitted_kernels",
        "nr_ended_kernels",
        "nr_pending_kernels",
        "usage_usec",
        "throttled_usec",
        "frozen_usec",
        "nr_freezes",
        "nr_throttled",
        "timeslice_usec",
        "channel_groups",
        "sm_count",
        "context_bytes",
    ];
    let instance = Instance::new();
    let workload = instance.launch_fma();
    let text = instance
        .read(workload.file("gcgroup.stat"))
        .expect("readable");
    for line in text.lines() {
        assert!(line.contains(": "), "GVM's tools split at ': ': {line:?}");
    }
    let found: Vec<_> = keyed::lines(&text)
        .expect("a keyed file")
        .into_iter()
        .map(|(key, _)| key)
        .filter(|key| ORDER.contains(key))
        .collect();
    let expected: Vec<_> = ORDER
        .into_iter()
        .filter(|key| found.contains(key))
        .collect();
    assert_eq!(found, expected);
    assert_eq!(&found[..4], &ORDER[..4]);
    let counters = instance.keyed(workload.file("gcgroup.stat"));
    assert_eq!(counters["sm_count"], 132);
}

#[test]
fn sampled_figures_are_fresh_while_somebody_reads() {
    let instance = Instance::new();
    let workload = instance.launch_fma();
    let stat = workload.file("gcgroup.stat");
    let ended = || instance.figure(&stat, "nr_ended_kernels");
    // The first read after a pause may be a second old; from then on a launch
    // of half a millisecond shows within 100 ms, twice that on a busy machine.
    wait::until(Duration::from_secs(2), "the first kernels end", || {
        ended() > 0
    });
    for _ in 0..5 {
        let before = ended();
        wait::until(Duration::from_millis(400), "the counter moves", || {
            ended() > before
        });
    }
    std::thread::sleep(Duration::from_millis(1500));
    let stale = ended();
    wait::until(Duration::from_millis(1200), "the counter moves", || {
        ended() > stale
    });
}

#[test]
fn a_gone_process_is_not_found_and_its_descriptors_say_so() {
    let instance = Instance::new();
    let workload = instance.launch_fma();
    let open = |name: &str, flags| {
        file::open_with(&instance.path(workload.file(name)), flags).expect("it is there")
    };
    let stat = open("gcgroup.stat", OFlags::RDONLY);
    let priority = open("compute.freeze", OFlags::RDWR);
    let kill = open("gcgroup.kill", OFlags::WRONLY);
    file::write_to(&kill, "1").expect("it runs");
    wait::until(Duration::from_secs(3), "the workload is gone", || {
        !instance.has_entry(workload.pid)
    });
    for name in ["gcgroup.stat", "compute.freeze", "workload.spec"] {
        assert_eq!(
            instance.read(workload.file(name)),
            Err(Errno::NOENT),
            "{name}"
        );
    }
    let mut buffer = [0_u8; 64];
    assert_eq!(pread(&stat, &mut buffer, 0), Err(Errno::NODEV));
    assert_eq!(pread(&priority, &mut buffer, 0), Err(Errno::NODEV));
    assert_eq!(file::write_to(&priority, "1"), Err(Errno::NODEV));
    assert_eq!(file::write_to(&kill, "1"), Err(Errno::NODEV));
    let link = instance.path("workloads").join(&workload.name);
    assert!(link.symlink_metadata().is_err());
    assert!(
        !instance
            .text("processes/list")
            .contains(&workload.pid.to_string())
    );
}

#[test]
fn a_gone_partition_is_not_found_and_its_descriptors_say_so() {
    let instance = Instance::new();
    instance.partition("a", 8);
    let path = instance.path("partitions/0/a/sm.count");
    let descriptor = file::open_with(&path, OFlags::RDWR).expect("it is there");
    std::fs::remove_dir(instance.path("partitions/0/a")).expect("it has no members");
    assert_eq!(instance.read("partitions/0/a/sm.count"), Err(Errno::NOENT));
    let mut buffer = [0_u8; 64];
    assert_eq!(pread(&descriptor, &mut buffer, 0), Err(Errno::NODEV));
    assert_eq!(file::write_to(&descriptor, "8"), Err(Errno::NODEV));
    // One of the same name is another partition.
    instance.partition("a", 16);
    assert_eq!(file::write_to(&descriptor, "8"), Err(Errno::NODEV));
    assert_eq!(instance.number("partitions/0/a/sm.count"), 16);
}

#[test]
fn the_service_counts_about_itself() {
    let instance = Instance::new();
    let before = instance.keyed("gcgroup.stat");
    let _workload = instance.launch_fma();
    let after = instance.keyed("gcgroup.stat");
    assert!(!before.is_empty());
    assert!(before.keys().eq(after.keys()), "keys come and go");
    assert_ne!(
        before, after,
        "a launch shows in the service's own counters"
    );
}
