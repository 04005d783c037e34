//! compute.freeze, gcgroup.freeze and gcgroup.kill.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use gcgroup_integration_tests::{Errno, Instance, Launched, Setup, process, wait};
use rustix::process::Signal;
use serde_json::{Value, json};

/// Longer than any pause between two reports of a worker.
const PAUSE: Duration = Duration::from_millis(400);

fn counters(instance: &Instance, workload: &Launched) -> BTreeMap<String, u64> {
    instance.keyed(workload.file("gcgroup.stat"))
}

fn started(instance: &Instance, workload: &Launched) {
    wait::until(Duration::from_secs(3), "kernels end", || {
        counters(instance, workload)["nr_ended_kernels"] > 0
    });
}

/// Freezes and checks that no counter of progress moves until it is read again.
fn freeze(instance: &Instance, workload: &Launched) -> BTreeMap<String, u64> {
    const PROGRESS: [&str; 4] = [
        "nr_submitted_kernels",
        "nr_ended_kernels",
        "nr_iterations",
        "usage_usec",
    ];
    instance.set(workload.file("compute.freeze"), "1");
    let before = counters(instance, workload);
    std::thread::sleep(PAUSE);
    let after = counters(instance, workload);
    for key in PROGRESS {
        assert_eq!(before[key], after[key], "{key} moved while frozen");
    }
    assert_eq!(
        after["nr_pending_kernels"],
        after["nr_submitted_kernels"] - after["nr_ended_kernels"]
    );
    after
}

fn thaw(instance: &Instance, workload: &Launched) {
    instance.set(workload.file("compute.freeze"), "0");
}

#[test]
fn a_frozen_workload_ends_no_kernel_and_goes_on_when_thawed() {
    for setup in [Setup::new(), Setup::new().temporal()] {
        let instance = setup.start();
        let workload = instance.launch_fma();
        started(&instance, &workload);
        let mut frozen = freeze(&instance, &workload);
        for _ in 0..3 {
            thaw(&instance, &workload);
            wait::until(Duration::from_secs(2), "it goes on", || {
                counters(&instance, &workload)["nr_ended_kernels"] > frozen["nr_ended_kernels"]
            });
            let again = freeze(&instance, &workload);
            assert!(again["nr_iterations"] > frozen["nr_iterations"]);
            frozen = again;
        }
        assert_eq!(frozen["nr_freezes"], 4);
    }
}

#[test]
fn no_iteration_is_lost_or_repeated() {
    let instance = Instance::new();
    let workload = instance.launch(&json!({"kernel": "fma_fp32", "blocks": 132}));
    started(&instance, &workload);
    let spec: Value = serde_json::from_str(&instance.text(workload.file("workload.spec")))
        .expect("workload.spec is JSON");
    let launch = spec["iterations"].as_u64().expect("calibrated") * 132;
    for _ in 0..20 {
        instance.set(workload.file("compute.freeze"), "1");
        let now = counters(&instance, &workload);
        let iterations = now["nr_iterations"];
        assert!(
            iterations >= now["nr_ended_kernels"] * launch,
            "lost: {now:?}"
        );
        assert!(
            iterations <= now["nr_submitted_kernels"] * launch,
            "repeated: {now:?}"
        );
        thaw(&instance, &workload);
    }
}

#[test]
fn a_frozen_workload_shows_it_at_once() {
    let instance = Instance::new();
    let workload = instance.launch_fma();
    for (value, frozen) in [("1", 1), ("0", 0), ("1", 1), ("0", 0)] {
        instance.set(workload.file("compute.freeze"), value);
        assert_eq!(instance.text(workload.file("compute.freeze")), value);
        assert_eq!(
            instance.figure(workload.file("gcgroup.events"), "frozen"),
            frozen
        );
        let listed = instance.text("gcgroup.freeze");
        let expected = if frozen == 1 {
            workload.pid.to_string()
        } else {
            String::new()
        };
        assert_eq!(listed, expected);
    }
}

#[test]
fn freezing_what_is_frozen_changes_nothing() {
    let instance = Instance::new();
    let workload = instance.launch_fma();
    let once = freeze(&instance, &workload);
    let twice = freeze(&instance, &workload);
    for key in ["nr_freezes", "nr_ended_kernels", "nr_iterations"] {
        assert_eq!(once[key], twice[key], "{key}");
    }
    thaw(&instance, &workload);
    thaw(&instance, &workload);
    assert_eq!(counters(&instance, &workload)["nr_freezes"], 1);
}

#[test]
fn the_time_that_a_freeze_lasts_is_counted() {
    let instance = Instance::new();
    let workload = instance.launch_fma();
    let before = counters(&instance, &workload)["frozen_usec"];
    let since = Instant::now();
    instance.set(workload.file("compute.freeze"), "1");
    std::thread::sleep(Duration::from_millis(500));
    thaw(&instance, &workload);
    let most = since.elapsed().as_micros();
    let counted = || u128::from(counters(&instance, &workload)["frozen_usec"] - before);
    wait::until(Duration::from_secs(1), "it is counted", || {
        counted() >= 490_000
    });
    assert!(counted() <= most, "{} of {most} us", counted());
}

#[test]
fn a_freeze_waits_for_the_end_of_an_uncut_kernel() {
    let instance = Instance::new();
    let calibrated = instance.launch_fma();
    let spec: Value = serde_json::from_str(&instance.text(calibrated.file("workload.spec")))
        .expect("workload.spec is JSON");
    instance.set(calibrated.file("gcgroup.kill"), "1");
    // A calibrated launch lasts half a millisecond, so this one 100.
    let iterations = spec["iterations"].as_u64().expect("calibrated") * 200;
    let workload = instance.launch(&json!({
        "kernel": "fma_fp32", "sliced": false, "iterations": iterations
    }));
    started(&instance, &workload);
    for _ in 0..3 {
        let frozen = freeze(&instance, &workload);
        let launch = iterations * 132;
        assert_eq!(frozen["nr_iterations"], frozen["nr_ended_kernels"] * launch);
        thaw(&instance, &workload);
        std::thread::sleep(Duration::from_millis(30));
    }
}

#[test]
fn several_freeze_in_one_step() {
    let instance = Instance::new();
    let workloads: Vec<_> = (0..3).map(|_| instance.launch_fma()).collect();
    for workload in &workloads {
        started(&instance, workload);
    }
    let pids: Vec<_> = workloads.iter().map(|w| w.pid.to_string()).collect();
    let switch = |state: u8, pids: &[String]| format!("{state} {}", pids.join(" "));
    instance.set("gcgroup.freeze", &switch(1, &pids[..2]));
    let states = || -> Vec<_> {
        let frozen = workloads
            .iter()
            .map(|w| instance.text(w.file("compute.freeze")));
        frozen.collect()
    };
    assert_eq!(states(), ["1", "1", "0"]);
    let mut sorted: Vec<u32> = workloads[..2].iter().map(|w| w.pid).collect();
    sorted.sort_unstable();
    assert_eq!(
        instance.text("gcgroup.freeze"),
        format!("{}\n{}", sorted[0], sorted[1])
    );
    // One of these is frozen already, which is a success.
    instance.set("gcgroup.freeze", &switch(1, &pids[1..]));
    assert_eq!(states(), ["1", "1", "1"]);
    instance.set("gcgroup.freeze", &switch(0, &pids));
    assert_eq!(states(), ["0", "0", "0"]);
    assert_eq!(instance.text("gcgroup.freeze"), "");
}

#[test]
fn none_freezes_where_one_is_unknown() {
    let instance = Instance::new();
    let workload = instance.launch_fma();
    // The service itself is a process, but none with an entry.
    for stranger in [instance.pid(), std::process::id(), 4_194_303, 0] {
        for pids in [
            format!("{} {stranger}", workload.pid),
            format!("{stranger} {}", workload.pid),
        ] {
            let refused = instance.write("gcgroup.freeze", format!("1 {pids}"));
            assert_eq!(refused, Err(Errno::SRCH), "{pids}");
            assert_eq!(instance.text(workload.file("compute.freeze")), "0");
        }
    }
    assert_eq!(counters(&instance, &workload)["nr_freezes"], 0);
}

#[test]
fn a_killed_workload_is_asked_to_end_and_its_directory_goes() {
    for setup in [Setup::new(), Setup::new().temporal()] {
        let instance = setup.start();
        instance.partition("a", 8);
        let running = instance.launch(&json!({"kernel": "fma_fp32", "partition": "a"}));
        let frozen = instance.launch_fma();
        instance.set(frozen.file("compute.freeze"), "1");
        for workload in [&running, &frozen] {
            instance.set(workload.file("gcgroup.kill"), "1");
            wait::until(Duration::from_secs(2), "its directory goes", || {
                !instance.has_entry(workload.pid)
            });
            assert!(!process::is_running(workload.pid));
        }
        assert_eq!(instance.text("partitions/0/a/members"), "");
        assert_eq!(instance.text("gcgroup.freeze"), "");
        assert_eq!(instance.keyed("devices/0/device.events")["mps_lost"], 0);
    }
}

#[test]
fn a_workload_that_does_not_answer_is_killed_all_the_same() {
    let instance = Instance::new();
    let workload = instance.launch_fma();
    // Stopped by the scheduler, so it cannot end when it is asked to.
    process::signal(workload.pid, Signal::STOP);
    let since = Instant::now();
    instance.set(workload.file("gcgroup.kill"), "1");
    wait::until(Duration::from_secs(3), "its directory goes", || {
        !instance.has_entry(workload.pid)
    });
    assert!(
        since.elapsed() >= Duration::from_millis(450),
        "it was not asked first"
    );
}
