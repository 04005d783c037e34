//! SM partitions: made with mkdir, sized with sm.count, joined with
//! compute.partition.

use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

use gcgroup_integration_tests::{Errno, Instance, Launched, Setup, wait};
use serde_json::json;

fn mkdir(instance: &Instance, name: &str) -> Result<(), Errno> {
    fs::create_dir(instance.path("partitions/0").join(name)).map_err(|error| errno(&error))
}

fn rmdir(instance: &Instance, name: &str) -> Result<(), Errno> {
    fs::remove_dir(instance.path("partitions/0").join(name)).map_err(|error| errno(&error))
}

fn errno(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).expect("an error of the kernel")
}

fn resize(instance: &Instance, name: &str, sms: &str) -> Result<(), Errno> {
    instance.write(format!("partitions/0/{name}/sm.count"), sms)
}

fn count(instance: &Instance, name: &str) -> u64 {
    instance.number(format!("partitions/0/{name}/sm.count"))
}

fn groups(instance: &Instance, name: &str) -> BTreeSet<u32> {
    let text = instance.text(format!("partitions/0/{name}/sm.groups"));
    let numbers = text
        .split_whitespace()
        .map(|word| word.parse().expect("a group number"));
    numbers.collect()
}

fn sm_count(instance: &Instance, workload: &Launched) -> u64 {
    instance.figure(workload.file("gcgroup.stat"), "sm_count")
}

fn members(instance: &Instance, name: &str) -> Vec<u32> {
    let text = instance.text(format!("partitions/0/{name}/members"));
    text.lines()
        .map(|line| line.parse().expect("a pid"))
        .collect()
}

#[test]
fn a_name_has_a_form() {
    let instance = Instance::new();
    let longest = "a".repeat(31);
    for name in ["a", "0", "a.b_c-d", "9..--__", "nonesuch", longest.as_str()] {
        assert_eq!(mkdir(&instance, name), Ok(()), "{name}");
        assert_eq!(count(&instance, name), 0, "{name}");
        assert!(groups(&instance, name).is_empty(), "{name}");
    }
    let too_long = "a".repeat(32);
    for name in [
        "none",
        "A",
        "aB",
        "-a",
        "_a",
        ".a",
        "a b",
        "a:b",
        "a+b",
        "a\n",
        "\u{e9}",
        too_long.as_str(),
    ] {
        assert_eq!(mkdir(&instance, name), Err(Errno::INVAL), "{name:?}");
    }
    let longer_than_any = mkdir(&instance, &"a".repeat(2000));
    assert!(
        // From the service or, depending on its version, from the kernel.
        matches!(longer_than_any, Err(Errno::INVAL | Errno::NAMETOOLONG)),
        "{longer_than_any:?}"
    );
    assert_eq!(instance.names("partitions/0").len(), 6);
}

#[test]
fn making_and_removing_have_their_errors() {
    let instance = Instance::new();
    assert_eq!(mkdir(&instance, "a"), Ok(()));
    assert_eq!(mkdir(&instance, "a"), Err(Errno::EXIST));
    assert_eq!(rmdir(&instance, "b"), Err(Errno::NOENT));
    assert_eq!(resize(&instance, "b", "8"), Err(Errno::NOENT));
    let elsewhere = fs::create_dir(instance.path("partitions/7/a")).expect_err("no such GPU");
    assert_eq!(errno(&elsewhere), Errno::NOENT);
    assert_eq!(rmdir(&instance, "a"), Ok(()));
    assert_eq!(rmdir(&instance, "a"), Err(Errno::NOENT));
    assert_eq!(mkdir(&instance, "a"), Ok(()));
}

#[test]
fn a_partition_with_members_stays() {
    let instance = Instance::new();
    instance.partition("a", 16);
    let workload = instance.launch(&json!({"kernel": "sleep", "partition": "a"}));
    assert_eq!(rmdir(&instance, "a"), Err(Errno::BUSY));
    assert_eq!(resize(&instance, "a", "0"), Err(Errno::INVAL));
    assert_eq!(count(&instance, "a"), 16);
    instance.set(workload.file("compute.partition"), "none");
    assert_eq!(resize(&instance, "a", "0"), Ok(()));
    assert_eq!(rmdir(&instance, "a"), Ok(()));
}

#[test]
fn a_partition_without_sms_takes_no_member() {
    let instance = Instance::new();
    mkdir(&instance, "a").expect("the name is free");
    let workload = instance.launch(&json!({"kernel": "sleep"}));
    let refused = instance.write(workload.file("compute.partition"), "a");
    assert_eq!(refused, Err(Errno::INVAL));
    assert_eq!(instance.text(workload.file("compute.partition")), "none");
    assert!(members(&instance, "a").is_empty());
}

#[test]
fn partitions_own_disjoint_groups_that_are_all_their_sms() {
    let instance = Instance::new();
    let names = ["a", "b", "c"];
    for (name, sms) in names.into_iter().zip([40, 40, 48]) {
        instance.partition(name, sms);
    }
    let check = |instance: &Instance| {
        let mut all = BTreeSet::new();
        for name in names {
            let own = groups(instance, name);
            let sms: u64 = own
                .iter()
                .map(|&group| if group == 16 { 4 } else { 8 })
                .sum();
            assert_eq!(sms, count(instance, name), "{name}: {own:?}");
            for group in own {
                assert!(all.insert(group), "group {group} has two owners");
            }
        }
    };
    check(&instance);
    assert_eq!(names.map(|name| count(&instance, name)), [40, 40, 48]);
    resize(&instance, "a", "8").expect("less is always there");
    resize(&instance, "c", "max").expect("something is free");
    check(&instance);
    assert_eq!(names.map(|name| count(&instance, name)), [8, 40, 84]);
}

#[test]
fn taken_sms_find_no_room_and_the_remainder_goes_out_last() {
    let instance = Instance::new();
    instance.partition("a", 128);
    assert!(
        !groups(&instance, "a").contains(&16),
        "the remainder goes out last"
    );
    mkdir(&instance, "b").expect("the name is free");
    assert_eq!(resize(&instance, "b", "5"), Err(Errno::NOSPC));
    assert_eq!(count(&instance, "b"), 0);
    assert_eq!(resize(&instance, "b", "4"), Ok(()));
    assert_eq!(count(&instance, "b"), 4);
    mkdir(&instance, "c").expect("the name is free");
    assert_eq!(resize(&instance, "c", "max"), Err(Errno::NOSPC));
    assert_eq!(resize(&instance, "b", "12"), Err(Errno::NOSPC));
    assert_eq!(count(&instance, "b"), 4);
    rmdir(&instance, "a").expect("it has no members");
    assert_eq!(resize(&instance, "c", "max"), Ok(()));
    assert_eq!(count(&instance, "c"), 128);
}

#[test]
fn a_member_moves_while_it_runs() {
    let instance = Instance::new();
    instance.partition("a", 64);
    instance.partition("b", 32);
    let workload = instance.launch(&json!({"kernel": "fma_fp32", "partition": "a"}));
    let iterations = || instance.figure(workload.file("gcgroup.stat"), "nr_iterations");
    for (name, sms, in_a, in_b) in [
        ("b", 32, false, true),
        ("none", 132, false, false),
        ("a", 64, true, false),
        ("a", 64, true, false),
    ] {
        instance.set(workload.file("compute.partition"), name);
        assert_eq!(
            sm_count(&instance, &workload),
            sms,
            "in force at the write's return"
        );
        assert_eq!(members(&instance, "a") == [workload.pid], in_a, "{name}");
        assert_eq!(members(&instance, "b") == [workload.pid], in_b, "{name}");
        let before = iterations();
        wait::until(Duration::from_secs(2), "it goes on", || {
            iterations() > before
        });
    }
}

#[test]
fn a_resize_is_in_force_for_every_member_when_it_returns() {
    let instance = Instance::new();
    instance.partition("a", 64);
    let spec = json!({"kernel": "fma_fp32", "partition": "a"});
    let workloads: Vec<_> = (0..3).map(|_| instance.launch(&spec)).collect();
    for (sms, granted) in [("32", 32), ("60", 64), ("max", 132), ("8", 8)] {
        assert_eq!(resize(&instance, "a", sms), Ok(()));
        assert_eq!(count(&instance, "a"), granted);
        for workload in &workloads {
            assert_eq!(sm_count(&instance, workload), granted);
        }
    }
    let mut pids: Vec<_> = workloads.iter().map(|workload| workload.pid).collect();
    pids.sort_unstable();
    assert_eq!(members(&instance, "a"), pids);
}

#[test]
fn a_frozen_member_is_resized_and_moved_without_running() {
    let instance = Instance::new();
    instance.partition("a", 64);
    instance.partition("b", 8);
    let workload = instance.launch(&json!({"kernel": "fma_fp32", "partition": "a"}));
    instance.set(workload.file("compute.freeze"), "1");
    let ended = || instance.figure(workload.file("gcgroup.stat"), "nr_ended_kernels");
    let before = ended();
    resize(&instance, "a", "32").expect("less is always there");
    assert_eq!(sm_count(&instance, &workload), 32);
    instance.set(workload.file("compute.partition"), "b");
    assert_eq!(sm_count(&instance, &workload), 8);
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(ended(), before, "it is still frozen");
    assert_eq!(instance.text(workload.file("compute.freeze")), "1");
    instance.set(workload.file("compute.freeze"), "0");
    wait::until(Duration::from_secs(2), "it goes on", || ended() > before);
}

#[test]
fn a_member_that_ends_leaves_its_partition() {
    let instance = Instance::new();
    instance.partition("a", 8);
    let workload = instance.launch(&json!({"kernel": "sleep", "partition": "a"}));
    assert_eq!(members(&instance, "a"), [workload.pid]);
    instance.set(workload.file("gcgroup.kill"), "1");
    wait::until(Duration::from_secs(3), "it leaves", || {
        members(&instance, "a").is_empty()
    });
    assert_eq!(rmdir(&instance, "a"), Ok(()));
}

#[test]
fn under_temporal_sharing_a_partition_is_a_cap() {
    let instance = Setup::new().temporal().start();
    instance.partition("a", 64);
    let workload = instance.launch(&json!({"kernel": "fma_fp32", "partition": "a"}));
    let enforcers = instance.text(workload.file("gcgroup.enforcers"));
    assert!(enforcers.contains("compute.partition cap"), "{enforcers}");
    assert_eq!(sm_count(&instance, &workload), 64);
    resize(&instance, "a", "16").expect("less is always there");
    assert_eq!(sm_count(&instance, &workload), 16);
    instance.set(workload.file("compute.partition"), "none");
    assert_eq!(sm_count(&instance, &workload), 132);
}
