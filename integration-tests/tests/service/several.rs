//! Changes that take several workloads at once, and changes that meet others
//! or a workload's end.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use gcgroup_device_sim::{Effect, Operation};
use gcgroup_integration_tests::fault::of;
use gcgroup_integration_tests::{Errno, Instance, Launched, Setup, process, wait};
use rustix::process::Signal;
use serde_json::json;

const SECOND: Duration = Duration::from_secs(1);
const SETTINGS_MS: u64 = 600;
/// Longer than any pause between two reports of a worker.
const PAUSE: Duration = Duration::from_millis(400);

/// How one member of a change comes to hang.
#[derive(Clone, Copy, Debug)]
enum Hang {
    /// The GPU does not answer its worker.
    Gpu,
    /// The worker itself stands still.
    Worker,
}

impl Hang {
    const BOTH: [Self; 2] = [Self::Gpu, Self::Worker];

    fn begin(self, instance: &Instance, workload: &Launched) {
        match self {
            Self::Gpu => {
                instance.fault(Operation::RaiseStop, of(workload), Effect::Hang);
            }
            Self::Worker => process::signal(workload.pid, Signal::STOP),
        }
    }

    fn end(self, instance: &Instance, workload: &Launched) {
        match self {
            Self::Gpu => instance.clear_faults(),
            Self::Worker => process::signal(workload.pid, Signal::CONT),
        }
    }
}

fn hasty() -> Instance {
    Setup::new().deadline("settings_ms", SETTINGS_MS).start()
}

fn pending(instance: &Instance, workload: &Launched) -> u64 {
    instance.figure(workload.file("gcgroup.events"), "pending")
}

fn frozen(instance: &Instance, workload: &Launched) -> String {
    instance.text(workload.file("compute.freeze"))
}

fn nr_ended_kernels(instance: &Instance, workload: &Launched) -> u64 {
    instance.figure(workload.file("gcgroup.stat"), "nr_ended_kernels")
}

#[track_caller]
fn runs(instance: &Instance, workload: &Launched) {
    let before = nr_ended_kernels(instance, workload);
    wait::until(3 * SECOND, "its kernels end", || {
        nr_ended_kernels(instance, workload) > before
    });
}

#[track_caller]
fn stand_still(instance: &Instance, workloads: [&Launched; 2]) {
    let progress = || {
        workloads.map(|workload| {
            let stat: BTreeMap<_, _> = instance.keyed(workload.file("gcgroup.stat"));
            ["nr_submitted_kernels", "nr_ended_kernels", "usage_usec"].map(|key| stat[key])
        })
    };
    let before = progress();
    std::thread::sleep(PAUSE);
    assert_eq!(progress(), before, "a counter moved while frozen");
}

/// Freezes two of which one hangs, up to the deadline of the write.
#[track_caller]
fn freeze_past_the_deadline(instance: &Instance, workloads: [&Launched; 2]) {
    let [quick, late] = workloads;
    let since = Instant::now();
    let both = format!("1 {} {}", quick.pid, late.pid);
    let written = instance.write("gcgroup.freeze", both);
    assert_eq!(written, Err(Errno::TIMEDOUT));
    assert!(since.elapsed() >= Duration::from_millis(SETTINGS_MS));
    for workload in workloads {
        assert_eq!(pending(instance, workload), 1, "{workload:?}");
        assert_eq!(frozen(instance, workload), "0", "all or none");
        for value in ["0", "1"] {
            let written = instance.write(workload.file("compute.freeze"), value);
            assert_eq!(written, Err(Errno::BUSY), "{value} to {workload:?}");
        }
    }
}

#[test]
fn every_member_is_pending_until_the_last_is_frozen() {
    for hang in Hang::BOTH {
        let instance = hasty();
        let (quick, late) = (instance.launch_fma(), instance.launch_fma());
        hang.begin(&instance, &late);
        freeze_past_the_deadline(&instance, [&quick, &late]);
        hang.end(&instance, &late);
        for workload in [&quick, &late] {
            wait::until(3 * SECOND, "the outcome is published", || {
                pending(&instance, workload) == 0
            });
            assert_eq!(frozen(&instance, workload), "1", "{hang:?}: {workload:?}");
        }
        stand_still(&instance, [&quick, &late]);
        for workload in [&quick, &late] {
            instance.set(workload.file("compute.freeze"), "0");
            runs(&instance, workload);
        }
    }
}

#[test]
fn none_stays_frozen_where_a_late_member_is_killed() {
    for hang in Hang::BOTH {
        let instance = hasty();
        let (quick, late) = (instance.launch_fma(), instance.launch_fma());
        hang.begin(&instance, &late);
        freeze_past_the_deadline(&instance, [&quick, &late]);
        instance.set(late.file("gcgroup.kill"), "1");
        wait::until(3 * SECOND, "the killed one goes", || {
            !instance.has_entry(late.pid)
        });
        wait::until(3 * SECOND, "the outcome is published", || {
            pending(&instance, &quick) == 0
        });
        assert_eq!(frozen(&instance, &quick), "0", "{hang:?}");
        runs(&instance, &quick);
        instance.set(quick.file("compute.freeze"), "1");
    }
}

#[test]
fn none_is_frozen_where_a_member_is_killed_before_the_deadline() {
    for hang in Hang::BOTH {
        let instance = Instance::new();
        let (quick, late) = (instance.launch_fma(), instance.launch_fma());
        hang.begin(&instance, &late);
        std::thread::scope(|scope| {
            let both = format!("1 {} {}", quick.pid, late.pid);
            let write = scope.spawn(|| instance.write("gcgroup.freeze", both));
            std::thread::sleep(Duration::from_millis(200));
            instance.set(late.file("gcgroup.kill"), "1");
            assert_eq!(write.join().expect("no panic"), Err(Errno::NODEV));
        });
        wait::until(3 * SECOND, "nothing is under way", || {
            pending(&instance, &quick) == 0
        });
        assert_eq!(frozen(&instance, &quick), "0", "{hang:?}");
        runs(&instance, &quick);
    }
}

#[test]
fn a_resize_stands_though_a_member_is_killed_meanwhile() {
    let instance = Instance::new();
    instance.partition("a", 64);
    let spec = json!({"kernel": "fma_fp32", "partition": "a"});
    let survivor = instance.launch(&spec);
    for round in 0..20_u64 {
        let victim = instance.launch(&spec);
        let sms = [32, 64][usize::from(round % 2 == 1)];
        // From right before the write to some way into it.
        let delay = Duration::from_micros(round.saturating_sub(4) * 150);
        let written = std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(delay);
                process::signal(victim.pid, Signal::KILL);
            });
            instance.write("partitions/0/a/sm.count", sms.to_string())
        });
        assert_eq!(written, Ok(()), "round {round}, after {delay:?}");
        assert_eq!(instance.number("partitions/0/a/sm.count"), sms);
        let stat = survivor.file("gcgroup.stat");
        assert_eq!(instance.figure(stat, "sm_count"), sms, "round {round}");
        runs(&instance, &survivor);
        wait::until(3 * SECOND, "the killed one goes", || {
            !instance.has_entry(victim.pid)
        });
        let members = instance.text("partitions/0/a/members");
        assert_eq!(members, survivor.pid.to_string());
    }
}

#[test]
fn a_deadline_holds_though_another_workload_is_never_at_rest() {
    let instance = hasty();
    let (restless, hung) = (instance.launch_fma(), instance.launch_fma());
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let switching = scope.spawn(|| {
            let mut switched = 0_u64;
            while !over.load(Ordering::Relaxed) {
                for value in ["1", "0"] {
                    instance.set(restless.file("compute.freeze"), value);
                    switched += 1;
                }
            }
            switched
        });
        let begun = Instant::now();
        let mut outcomes = Vec::new();
        while begun.elapsed() < 3 * SECOND {
            let value = if frozen(&instance, &hung) == "0" {
                "1"
            } else {
                "0"
            };
            Hang::Worker.begin(&instance, &hung);
            let since = Instant::now();
            let written = instance.write(hung.file("compute.freeze"), value);
            outcomes.push((written, since.elapsed()));
            Hang::Worker.end(&instance, &hung);
            wait::becomes(3 * SECOND, || pending(&instance, &hung) == 0);
        }
        over.store(true, Ordering::Relaxed);
        let switched = switching.join().expect("every switch is taken");
        assert!(switched > 20, "{switched} switches are no load");
        let limit = Duration::from_millis(SETTINGS_MS);
        for (written, waited) in outcomes {
            assert_eq!(written, Err(Errno::TIMEDOUT), "after {waited:?}");
            let in_time = limit..limit + Duration::from_millis(500);
            assert!(in_time.contains(&waited), "{waited:?}");
        }
    });
}

#[test]
fn a_freeze_that_meets_the_end_of_a_workload_says_so() {
    let instance = Instance::new();
    for round in 0..30_u64 {
        let duration = format!("{}ms", 1 + round * 19 / 29);
        let workload = instance.launch(&json!({"kernel": "fma_fp32", "duration": duration}));
        let begun = Instant::now();
        for value in ["1", "0"].into_iter().cycle() {
            match instance.write(workload.file("compute.freeze"), value) {
                Ok(()) => {}
                Err(Errno::NODEV | Errno::NOENT) => break,
                Err(errno) => panic!("{value} within {duration}: {errno}"),
            }
            assert!(begun.elapsed() < 5 * SECOND, "{duration} are never over");
        }
        wait::until(3 * SECOND, "the entry goes", || {
            !instance.has_entry(workload.pid)
        });
    }
}
