//! Figures that take time to measure: speeds, quotas, priorities, and reads
//! beside writes that hang.
//!
//! Progress of the simulated GPU is computed from its clock, so these figures
//! hold on a busy machine as long as workers keep their queues filled. One test
//! runs at a time, that they do not take each other's processors.

use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use gcgroup_device_sim::{Effect, Operation};
use gcgroup_integration_tests::fault::of;
use gcgroup_integration_tests::{Errno, Instance, Launched, Setup, process, wait};
use serde_json::json;

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    // A test that failed has left nothing behind that matters here.
    ONE_AT_A_TIME
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// A workload whose launches last 5 ms on all SMs, so that its queue bridges a
/// worker that does not get a processor for a while.
fn long_fma(partition: &str) -> serde_json::Value {
    json!({"kernel": "fma_fp32", "blocks": 132, "iterations": 300_000, "partition": partition})
}

fn switch(instance: &Instance, state: u8, workloads: &[&Launched]) {
    let pids: Vec<_> = workloads.iter().map(|w| w.pid.to_string()).collect();
    instance.set("gcgroup.freeze", &format!("{state} {}", pids.join(" ")));
}

/// Iterations a second of workloads that run side by side for `lasting`. They
/// are counted exactly, between two freezes.
fn speeds(instance: &Instance, workloads: &[&Launched], lasting: Duration) -> Vec<f64> {
    let count = || -> Vec<u64> {
        let stats = workloads.iter().map(|w| w.file("gcgroup.stat"));
        stats
            .map(|stat| instance.figure(stat, "nr_iterations"))
            .collect()
    };
    switch(instance, 1, workloads);
    let before = count();
    let since = Instant::now();
    switch(instance, 0, workloads);
    std::thread::sleep(lasting);
    switch(instance, 1, workloads);
    let seconds = since.elapsed().as_secs_f64();
    let after = count();
    let done = after
        .iter()
        .zip(before)
        .map(|(after, before)| after - before);
    done.map(|iterations| iterations as f64 / seconds).collect()
}

fn about(found: f64, expected: f64, tolerance: f64) -> Result<(), String> {
    if (found / expected - 1.0).abs() <= tolerance {
        return Ok(());
    }
    Err(format!("{found} is not within {tolerance} of {expected}"))
}

#[test]
fn half_the_sms_are_half_the_speed() {
    let _alone = alone();
    let instance = Instance::new();
    instance.partition("a", 128);
    let workload = instance.launch(&long_fma("a"));
    let second = Duration::from_secs(1);
    let speed = || speeds(&instance, &[&workload], second)[0];
    for (sms, share) in [("64", 0.5), ("32", 0.25), ("128", 1.0)] {
        wait::measured(sms, || {
            instance.set("partitions/0/a/sm.count", "128");
            let whole = speed();
            instance.set("partitions/0/a/sm.count", sms);
            about(speed() / whole, share, 0.1)
        });
    }
    wait::measured("all SMs", || {
        instance.set(workload.file("compute.partition"), "a");
        let whole = speed();
        instance.set(workload.file("compute.partition"), "none");
        about(speed() / whole, 132.0 / 128.0, 0.1)
    });
}

#[test]
fn partitions_do_not_disturb_each_other_but_two_in_one_share_it() {
    let _alone = alone();
    let instance = Instance::new();
    instance.partition("a", 64);
    instance.partition("b", 64);
    let lasting = Duration::from_millis(1500);
    let one = instance.launch(&long_fma("a"));
    let two = instance.launch(&long_fma("b"));
    // What is frozen takes nothing from the other.
    let solo = || speeds(&instance, &[&one], lasting)[0];
    let both = || speeds(&instance, &[&one, &two], lasting);
    for round in ["apart", "apart again"] {
        wait::measured(round, || {
            switch(&instance, 1, &[&two]);
            let solo = solo();
            about(both()[0], solo, 0.1)
        });
        wait::measured("in one partition", || {
            switch(&instance, 1, &[&two]);
            let solo = solo();
            instance.set(two.file("compute.partition"), "a");
            let together = both();
            instance.set(two.file("compute.partition"), "b");
            together
                .iter()
                .try_for_each(|speed| about(*speed, solo / 2.0, 0.15))
        });
    }
}

#[test]
fn a_quota_is_a_share_of_gpu_time() {
    let _alone = alone();
    let instance = Instance::new();
    let quotas = [
        ("20000 100000", 0.2),
        ("5000 10000", 0.5),
        ("250000 1000000", 0.25),
    ];
    let workloads: Vec<_> = quotas
        .iter()
        .map(|(quota, _)| {
            let mut spec = long_fma("none");
            spec["compute_max"] = json!(quota);
            instance.launch(&spec)
        })
        .collect();
    let usage = |workload: &Launched| {
        let stat = instance.keyed(workload.file("gcgroup.stat"));
        (
            Instant::now(),
            stat["usage_usec"],
            stat["throttled_usec"],
            stat["nr_throttled"],
        )
    };
    // Somebody has to read for figures to be fresh, and the first period may
    // have begun before the workload did.
    for _ in 0..12 {
        let _ = workloads.iter().map(usage).count();
        std::thread::sleep(Duration::from_millis(100));
    }
    wait::measured("three quotas", || {
        let before: Vec<_> = workloads.iter().map(usage).collect();
        for _ in 0..80 {
            let _ = workloads.iter().map(usage).count();
            std::thread::sleep(Duration::from_millis(100));
        }
        for ((workload, before), (quota, share)) in workloads.iter().zip(before).zip(quotas) {
            let after = usage(workload);
            let elapsed = after.0.duration_since(before.0).as_micros() as f64;
            let used = (after.1 - before.1) as f64 / elapsed;
            // A period of a second may be cut at both ends of the measurement.
            let tolerance = if quota.ends_with(" 1000000") {
                0.04
            } else {
                0.01
            };
            let throttled = (after.2 - before.2) as f64 / elapsed;
            if (used - share).abs() > tolerance || (throttled - (1.0 - share)).abs() >= 0.2 {
                return Err(format!("{quota}: used {used}, throttled {throttled}"));
            }
            assert!(after.3 > before.3, "{quota}: no period was throttled");
        }
        Ok(())
    });
    instance.set(workloads[0].file("compute.max"), "max");
    wait::measured("no quota", || {
        std::thread::sleep(Duration::from_millis(300));
        let before = usage(&workloads[0]);
        std::thread::sleep(Duration::from_secs(1));
        let after = usage(&workloads[0]);
        let elapsed = after.0.duration_since(before.0).as_micros() as f64;
        let used = (after.1 - before.1) as f64 / elapsed;
        if used > 0.8 {
            return Ok(());
        }
        Err(format!("it uses {used}"))
    });
}

#[test]
fn under_temporal_sharing_priority_is_a_share_of_time() {
    let _alone = alone();
    let instance = Setup::new().temporal().start();
    let enforcers = |workload: &Launched| instance.text(workload.file("gcgroup.enforcers"));
    let one = instance.launch(&long_fma("none"));
    let two = instance.launch(&long_fma("none"));
    assert!(
        enforcers(&one).contains("compute.priority channel"),
        "{}",
        enforcers(&one)
    );
    let lasting = Duration::from_secs(3);
    let ratio_is = |what: &str, expected: f64| {
        wait::measured(what, || {
            let found = speeds(&instance, &[&one, &two], lasting);
            about(found[0] / found[1], expected, 0.15)
        });
    };
    ratio_is("equal priorities", 1.0);
    instance.set(one.file("compute.priority"), "4");
    let timeslice =
        |workload: &Launched| instance.figure(workload.file("gcgroup.stat"), "timeslice_usec");
    assert_eq!((timeslice(&one), timeslice(&two)), (32_768, 2048));
    ratio_is("4 and 8", 16.0);
    instance.set(two.file("compute.priority"), "6");
    ratio_is("4 and 6", 4.0);
}

#[test]
fn under_spatial_sharing_priority_does_what_its_enforcer_says() {
    let _alone = alone();
    let instance = Instance::new();
    let workload = instance.launch_fma();
    let priority = workload.file("compute.priority");
    let text = instance.text(workload.file("gcgroup.enforcers"));
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("compute.priority "));
    let mechanism = line.expect("every writable file has a line");
    match mechanism.strip_prefix("none ") {
        Some(reason) => {
            assert!(!reason.is_empty());
            assert_eq!(instance.write(&priority, "4"), Err(Errno::OPNOTSUPP));
            assert_eq!(
                instance.write(&priority, "16"),
                Err(Errno::INVAL),
                "the form comes first"
            );
            assert_eq!(instance.text(&priority), "8");
        }
        None => {
            instance.set(&priority, "4");
            assert_eq!(instance.text(&priority), "4");
        }
    }
}

/// Workloads that take next to no time of the machine: one launch lasts 100 ms.
fn idlers(instance: &Instance, count: usize) -> Vec<Launched> {
    let spec = json!({"kernel": "sleep", "blocks": 1, "iterations": 100_000});
    (0..count).map(|_| instance.launch(&spec)).collect()
}

/// Latency of each of 2000 reads of files of every workload and of others.
fn read_latencies(instance: &Instance, workloads: &[Launched]) -> Vec<Duration> {
    let files = [
        "gcgroup.stat",
        "gcgroup.events",
        "compute.freeze",
        "compute.max",
    ];
    let others = [
        "processes/list",
        "gcgroup.stat",
        "devices/0/utilization.stat",
    ];
    let paths: Vec<_> = workloads
        .iter()
        .flat_map(|workload| files.map(|name| workload.file(name)))
        .chain(others.map(str::to_owned))
        .collect();
    let timed = |path: &String| {
        let started = Instant::now();
        instance.read(path).expect("reads do not wait for writes");
        started.elapsed()
    };
    paths.iter().cycle().take(2000).map(timed).collect()
}

#[test]
fn reads_stay_fast_beside_32_writes_that_hang() {
    let _alone = alone();
    let instance = Setup::new().deadline("settings_ms", 4000).start();
    let workloads = idlers(&instance, 33);
    let (healthy, hung) = workloads.split_first().expect("there are 33");
    for workload in hung {
        instance.fault(Operation::RaiseStop, of(workload), Effect::Hang);
    }
    let freeze = |workload: &Launched| {
        let since = Instant::now();
        let outcome = instance.write(workload.file("compute.freeze"), "1");
        (outcome, since.elapsed())
    };
    std::thread::scope(|scope| {
        let writes: Vec<_> = hung
            .iter()
            .map(|workload| scope.spawn(move || freeze(workload)))
            .collect();
        std::thread::sleep(Duration::from_millis(300));
        let since = Instant::now();
        let mut latencies = read_latencies(&instance, &workloads);
        let (outcome, waited) = freeze(healthy);
        assert_eq!(outcome, Ok(()));
        assert!(
            waited < Duration::from_secs(1),
            "another lane waited {waited:?}"
        );
        assert!(
            since.elapsed() < Duration::from_secs(3),
            "the writes may have ended"
        );
        latencies.sort_unstable();
        let p99 = latencies[latencies.len() * 99 / 100];
        assert!(p99 < Duration::from_millis(50), "p99 of a read is {p99:?}");
        for write in writes {
            let (outcome, waited) = write.join().expect("no panic");
            assert_eq!(outcome, Err(Errno::TIMEDOUT));
            assert!((3900..6000).contains(&waited.as_millis()), "{waited:?}");
        }
    });
    instance.clear_faults();
    for workload in hung {
        wait::until(Duration::from_secs(5), "each outcome is published", || {
            instance.text(workload.file("compute.freeze")) == "1"
        });
    }
}

#[test]
fn a_service_with_32_frozen_workloads_is_idle() {
    let _alone = alone();
    let instance = Instance::new();
    let workloads = idlers(&instance, 32);
    switch(&instance, 1, &workloads.iter().collect::<Vec<_>>());
    // What reads have asked for is sampled for a while after the last one.
    std::thread::sleep(Duration::from_secs(3));
    wait::measured("at most 1% of a processor", || {
        let before = process::ticks(instance.pid());
        std::thread::sleep(Duration::from_secs(4));
        match process::ticks(instance.pid()) - before {
            0..=4 => Ok(()),
            used => Err(format!("{used} ticks in 4 s")),
        }
    });
    let resident = process::resident_kib(instance.pid());
    assert!(resident < 60 * 1024, "{resident} KiB are resident");
}

#[test]
fn a_write_and_a_read_take_little_time() {
    let _alone = alone();
    let instance = Instance::new();
    let workload = idlers(&instance, 1).remove(0);
    let freeze = workload.file("compute.freeze");
    let stat = workload.file("gcgroup.stat");
    let median = |act: &mut dyn FnMut()| {
        let mut times: Vec<Duration> = (0..100)
            .map(|_| {
                let since = Instant::now();
                act();
                since.elapsed()
            })
            .collect();
        times.sort_unstable();
        times[50]
    };
    let mut state = 0;
    // Generous bounds: the point is that neither waits for a timer.
    wait::measured("a write and a read", || {
        let write = median(&mut || {
            state ^= 1;
            instance.set(&freeze, &state.to_string());
        });
        let read = median(&mut || drop(instance.read(&stat).expect("it is readable")));
        if write < Duration::from_millis(20) && read < Duration::from_millis(5) {
            return Ok(());
        }
        Err(format!("a write {write:?}, a read {read:?}"))
    });
}
