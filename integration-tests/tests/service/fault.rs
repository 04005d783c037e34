//! What happens when the GPU, its driver or a worker misbehaves.

use std::time::{Duration, Instant};

use gcgroup_device_sim::{Effect, Operation, Scope};
use gcgroup_integration_tests::fault::{breakage, of, refusal};
use gcgroup_integration_tests::{Errno, Instance, Launched, Setup, process, wait};
use serde_json::json;

const SECOND: Duration = Duration::from_secs(1);
const SETTINGS_MS: u64 = 400;

fn hasty() -> Setup {
    Setup::new().deadline("settings_ms", SETTINGS_MS)
}

fn pending(instance: &Instance, workload: &Launched) -> u64 {
    instance.figure(workload.file("gcgroup.events"), "pending")
}

fn gone(instance: &Instance, workload: &Launched) {
    wait::until(3 * SECOND, "the entry goes", || {
        !instance.has_entry(workload.pid)
    });
    assert!(!process::is_running(workload.pid));
}

#[test]
fn a_freeze_that_hangs_is_pending_until_its_outcome_is_published() {
    let instance = hasty().start();
    let workload = instance.launch_fma();
    let freeze = workload.file("compute.freeze");
    instance.fault(Operation::RaiseStop, of(&workload), Effect::Hang);
    let since = Instant::now();
    assert_eq!(instance.write(&freeze, "1"), Err(Errno::TIMEDOUT));
    let waited = since.elapsed();
    let limit = Duration::from_millis(SETTINGS_MS);
    assert!(waited >= limit && waited < 4 * limit, "{waited:?}");
    assert_eq!(pending(&instance, &workload), 1);
    assert_eq!(
        instance.text(&freeze),
        "0",
        "what is not enforced is not shown"
    );
    for (name, value) in [
        ("compute.freeze", "0"),
        ("compute.max", "20000"),
        ("compute.partition", "none"),
    ] {
        let refused = instance.write(workload.file(name), value);
        assert_eq!(refused, Err(Errno::BUSY), "{name}");
    }
    let many = instance.write("gcgroup.freeze", format!("0 {}", workload.pid));
    assert_eq!(many, Err(Errno::BUSY));
    instance.clear_faults();
    wait::until(3 * SECOND, "its outcome is published", || {
        pending(&instance, &workload) == 0
    });
    assert_eq!(instance.text(&freeze), "1", "it ran to its end");
    instance.set(&freeze, "0");
    instance.set(workload.file("compute.max"), "20000 100000");
}

#[test]
fn a_change_that_has_not_begun_by_its_deadline_is_withdrawn() {
    let instance = hasty().start();
    let workload = instance.launch_fma();
    instance.fault(Operation::RaiseStop, of(&workload), Effect::Hang);
    std::thread::scope(|scope| {
        let first = scope.spawn(|| instance.write(workload.file("compute.freeze"), "1"));
        std::thread::sleep(Duration::from_millis(100));
        let second = instance.write(workload.file("compute.max"), "20000 100000");
        assert_eq!(second, Err(Errno::TIMEDOUT));
        assert_eq!(first.join().expect("no panic"), Err(Errno::TIMEDOUT));
    });
    instance.clear_faults();
    wait::until(3 * SECOND, "its outcome is published", || {
        pending(&instance, &workload) == 0
    });
    assert_eq!(instance.text(workload.file("compute.freeze")), "1");
    assert_eq!(
        instance.text(workload.file("compute.max")),
        "max 100000",
        "it was withdrawn"
    );
}

#[test]
fn what_is_stuck_fails_and_can_still_be_killed() {
    // Longer than the half second after which a kill becomes one.
    let instance = Setup::new()
        .deadline("settings_ms", 1500)
        .deadline("stuck_ms", 700)
        .start();
    let workload = instance.launch_fma();
    instance.fault(Operation::RaiseStop, of(&workload), Effect::Hang);
    let freeze = workload.file("compute.freeze");
    assert_eq!(instance.write(&freeze, "1"), Err(Errno::TIMEDOUT));
    assert_eq!(instance.write(&freeze, "1"), Err(Errno::BUSY));
    wait::until(3 * SECOND, "it counts as stuck", || {
        instance.write(&freeze, "1") == Err(Errno::IO)
    });
    assert_eq!(pending(&instance, &workload), 1);
    instance.set(workload.file("gcgroup.kill"), "1");
    gone(&instance, &workload);
}

#[test]
fn kill_passes_by_what_is_pending() {
    let instance = Instance::new();
    let workload = instance.launch_fma();
    instance.fault(Operation::RaiseStop, of(&workload), Effect::Hang);
    std::thread::scope(|scope| {
        let freeze = scope.spawn(|| instance.write(workload.file("compute.freeze"), "1"));
        std::thread::sleep(Duration::from_millis(100));
        instance.set(workload.file("gcgroup.kill"), "1");
        gone(&instance, &workload);
        assert_eq!(freeze.join().expect("no panic"), Err(Errno::NODEV));
    });
}

#[test]
fn other_processes_do_not_wait_for_one_that_hangs() {
    let instance = Instance::new();
    instance.partition("a", 64);
    let (hung, other) = (instance.launch_fma(), instance.launch_fma());
    instance.fault(Operation::RaiseStop, of(&hung), Effect::Hang);
    std::thread::scope(|scope| {
        let write = scope.spawn(|| instance.write(hung.file("compute.freeze"), "1"));
        std::thread::sleep(Duration::from_millis(100));
        let since = Instant::now();
        for value in ["1", "0"] {
            instance.set(other.file("compute.freeze"), value);
        }
        instance.set(other.file("compute.partition"), "a");
        instance.set(other.file("compute.max"), "20000");
        let _third = instance.launch_fma();
        assert_eq!(instance.text(hung.file("compute.freeze")), "0");
        assert!(since.elapsed() < 2 * SECOND, "{:?}", since.elapsed());
        instance.clear_faults();
        assert_eq!(
            write.join().expect("no panic"),
            Ok(()),
            "it hung for less than 5 s"
        );
    });
    assert_eq!(instance.text(hung.file("compute.freeze")), "1");
}

#[test]
fn a_caller_that_waits_can_be_killed() {
    let instance = Instance::new();
    let workload = instance.launch_fma();
    instance.fault(Operation::RaiseStop, of(&workload), Effect::Hang);
    let mut shell = std::process::Command::new("sh")
        .args(["-c", "echo 1 > \"$0\""])
        .arg(instance.path(workload.file("compute.freeze")))
        .spawn()
        .expect("sh is there");
    std::thread::sleep(Duration::from_millis(200));
    assert!(matches!(shell.try_wait(), Ok(None)), "the write hangs");
    shell.kill().expect("it runs");
    let ended = wait::becomes(2 * SECOND, || !matches!(shell.try_wait(), Ok(None)));
    assert!(ended, "a killed caller is left waiting");
    instance.clear_faults();
}

#[test]
fn a_caller_behind_one_that_waits_can_be_killed() {
    let instance = Instance::new();
    let workload = instance.launch_fma();
    instance.fault(Operation::RaiseStop, of(&workload), Effect::Hang);
    let path = instance.path(workload.file("compute.freeze"));
    let write = || {
        std::process::Command::new("sh")
            .args(["-c", "echo 1 > \"$0\""])
            .arg(&path)
            .spawn()
            .expect("sh is there")
    };
    let mut first = write();
    std::thread::sleep(Duration::from_millis(200));
    let mut second = write();
    std::thread::sleep(Duration::from_millis(200));
    second.kill().expect("it runs");
    let ended = wait::becomes(2 * SECOND, || !matches!(second.try_wait(), Ok(None)));
    instance.clear_faults();
    assert!(first.wait().expect("it is our child").success());
    assert!(ended, "a killed caller is left waiting");
}

#[test]
fn a_freeze_of_several_that_hangs_delays_no_other() {
    let instance = Instance::new();
    let (hung, other) = (instance.launch_fma(), instance.launch_fma());
    instance.fault(Operation::RaiseStop, of(&hung), Effect::Hang);
    std::thread::scope(|scope| {
        let write = scope.spawn(|| instance.write("gcgroup.freeze", format!("1 {}", hung.pid)));
        std::thread::sleep(Duration::from_millis(200));
        let since = Instant::now();
        instance.set("gcgroup.freeze", &format!("1 {}", other.pid));
        let waited = since.elapsed();
        instance.clear_faults();
        assert_eq!(write.join().expect("no panic"), Ok(()));
        assert!(waited < 2 * SECOND, "{waited:?}");
    });
}

#[test]
fn a_freeze_that_fails_is_an_error_and_ends_what_cannot_be_stopped() {
    let instance = Instance::new();
    for (effect, errno) in [(breakage(), Errno::IO), (refusal(), Errno::OPNOTSUPP)] {
        let workload = instance.launch_fma();
        instance.fault_once(Operation::RaiseStop, of(&workload), effect);
        let outcome = instance.write(workload.file("compute.freeze"), "1");
        assert_eq!(outcome, Err(errno));
        gone(&instance, &workload);
    }
}

#[test]
fn none_freezes_where_one_fails() {
    let instance = Instance::new();
    let workloads: Vec<_> = (0..3).map(|_| instance.launch_fma()).collect();
    let [one, failing, two] = workloads.as_slice() else {
        unreachable!("three were launched");
    };
    instance.fault_once(Operation::RaiseStop, of(failing), breakage());
    let all = format!("1 {} {} {}", one.pid, failing.pid, two.pid);
    assert_eq!(instance.write("gcgroup.freeze", &all), Err(Errno::IO));
    assert_eq!(instance.text("gcgroup.freeze"), "");
    gone(&instance, failing);
    for workload in [one, two] {
        assert_eq!(instance.text(workload.file("compute.freeze")), "0");
        let ended = || instance.figure(workload.file("gcgroup.stat"), "nr_ended_kernels");
        let before = ended();
        wait::until(2 * SECOND, "it runs again", || ended() > before);
    }
    instance.set("gcgroup.freeze", &format!("1 {} {}", one.pid, two.pid));
}

#[test]
fn several_freeze_though_one_is_late() {
    let instance = hasty().start();
    let (quick, late) = (instance.launch_fma(), instance.launch_fma());
    instance.fault(Operation::RaiseStop, of(&late), Effect::Hang);
    let both = format!("1 {} {}", quick.pid, late.pid);
    assert_eq!(
        instance.write("gcgroup.freeze", &both),
        Err(Errno::TIMEDOUT)
    );
    let frozen = || [&quick, &late].map(|w| instance.text(w.file("compute.freeze")));
    assert_eq!(frozen(), ["0", "0"], "all or none");
    assert_eq!(pending(&instance, &late), 1);
    instance.clear_faults();
    wait::until(3 * SECOND, "its outcome is published", || {
        frozen() == ["1", "1"]
    });
    assert_eq!(pending(&instance, &late), 0);
    instance.set("gcgroup.freeze", &both.replacen('1', "0", 1));
}

#[test]
fn a_resize_that_one_member_fails_puts_all_back() {
    let instance = Instance::new();
    instance.partition("a", 64);
    let spec = json!({"kernel": "fma_fp32", "partition": "a"});
    let workloads: Vec<_> = (0..3).map(|_| instance.launch(&spec)).collect();
    let groups = instance.text("partitions/0/a/sm.groups");
    instance.fault_once(Operation::Place, of(&workloads[2]), refusal());
    assert_eq!(
        instance.write("partitions/0/a/sm.count", "32"),
        Err(Errno::IO)
    );
    assert_eq!(instance.number("partitions/0/a/sm.count"), 64);
    assert_eq!(instance.text("partitions/0/a/sm.groups"), groups);
    for workload in &workloads {
        assert_eq!(
            instance.figure(workload.file("gcgroup.stat"), "sm_count"),
            64
        );
    }
    instance.set("partitions/0/a/sm.count", "32");
    for workload in &workloads {
        assert_eq!(
            instance.figure(workload.file("gcgroup.stat"), "sm_count"),
            32
        );
    }
}

#[test]
fn a_move_that_fails_leaves_the_process_where_it_was() {
    let instance = Instance::new();
    instance.partition("a", 64);
    instance.partition("b", 32);
    let workload = instance.launch(&json!({"kernel": "fma_fp32", "partition": "a"}));
    instance.fault_once(Operation::Place, of(&workload), refusal());
    let partition = workload.file("compute.partition");
    assert_eq!(instance.write(&partition, "b"), Err(Errno::OPNOTSUPP));
    assert_eq!(instance.text(&partition), "a");
    assert_eq!(
        instance.figure(workload.file("gcgroup.stat"), "sm_count"),
        64
    );
    assert_eq!(instance.text("partitions/0/b/members"), "");
    instance.set(&partition, "b");
}

#[test]
fn a_launch_that_hangs_times_out_and_leaves_nothing() {
    for operation in [Operation::Open, Operation::Prepare, Operation::Place] {
        let instance = Setup::new().deadline("launch_ms", 900).start();
        // The first launch starts the MPS server, so that this one is about
        // the worker alone.
        let first = instance.launch_fma();
        instance.fault_once(operation, Scope::All, Effect::Hang);
        let since = Instant::now();
        let refused = instance.try_launch(&json!({"kernel": "fma_fp32", "name": "late"}));
        let refused = refused.expect_err("it hangs");
        assert_eq!(refused.errno, Errno::TIMEDOUT, "{operation:?}: {refused:?}");
        assert!(
            since.elapsed() < 3 * SECOND,
            "{operation:?}: {:?}",
            since.elapsed()
        );
        wait::until(3 * SECOND, "the worker is ended", || {
            instance.in_role("worker") == [first.pid]
        });
        assert_eq!(
            instance.text("processes/list"),
            format!("PID\n{}", first.pid)
        );
        instance.clear_faults();
        let late = instance.launch(&json!({"kernel": "fma_fp32", "name": "late"}));
        assert_eq!(late.name, "late");
    }
}

#[test]
fn a_launch_that_hangs_delays_no_other() {
    let instance = Instance::new();
    let _first = instance.launch_fma();
    instance.fault_once(Operation::Prepare, Scope::All, Effect::Hang);
    std::thread::scope(|scope| {
        let hung = scope.spawn(|| instance.try_launch(&json!({"kernel": "fma_fp32"})));
        std::thread::sleep(Duration::from_millis(300));
        let since = Instant::now();
        let _other = instance.launch_fma();
        assert!(since.elapsed() < 3 * SECOND, "{:?}", since.elapsed());
        instance.clear_faults();
        hung.join()
            .expect("no panic")
            .expect("it goes on when the hang is over");
    });
}

#[test]
fn a_launch_that_the_gpu_refuses_fails_and_leaves_nothing() {
    let instance = Instance::new();
    for operation in [Operation::Open, Operation::Prepare, Operation::Place] {
        for effect in [refusal(), breakage(), Effect::Cut] {
            instance.fault_once(operation, Scope::All, effect.clone());
            let refused = instance.try_launch(&json!({"kernel": "fma_fp32"}));
            let refused = refused.expect_err("the call fails");
            let errno = refused.errno;
            let expected = match operation {
                // What cannot be done here is told apart from what went wrong.
                _ if effect == refusal() => matches!(errno, Errno::OPNOTSUPP | Errno::IO),
                _ => errno == Errno::IO,
            };
            assert!(expected, "{operation:?} {effect:?}: {refused:?}");
            assert_eq!(instance.names("processes"), ["list"]);
            wait::until(3 * SECOND, "the worker is ended", || {
                instance.in_role("worker").is_empty()
            });
            instance.clear_faults();
        }
    }
    let _works = instance.launch_fma();
}

#[test]
fn a_launch_fails_while_no_mps_server_starts() {
    use gcgroup_device_sim::{Failure, Refused};
    let instance = Instance::new();
    let failure = Effect::Fail(Failure::Service(Refused::Failed("no server".to_owned())));
    instance.fault(Operation::MpsStart, Scope::All, failure);
    let refused = instance.try_launch(&json!({"kernel": "fma_fp32"}));
    assert_eq!(refused.expect_err("no server").errno, Errno::IO);
    assert_eq!(instance.names("processes"), ["list"]);
    instance.clear_faults();
    let _works = instance.launch_fma();
}

#[test]
fn a_lost_mps_server_takes_its_workloads_along_and_is_started_anew() {
    let instance = Instance::new();
    instance.partition("a", 64);
    let workloads = [
        instance.launch_fma(),
        instance.launch(&json!({"kernel": "fma_fp32", "partition": "a"})),
    ];
    instance.set(workloads[0].file("compute.freeze"), "1");
    instance.faults().lose_mps(0).expect("there is one");
    for workload in &workloads {
        gone(&instance, workload);
    }
    wait::until(3 * SECOND, "the loss is counted", || {
        instance.figure("devices/0/device.events", "mps_lost") == 1
    });
    assert_eq!(instance.text("partitions/0/a/members"), "");
    let again = instance.launch(&json!({"kernel": "fma_fp32", "partition": "a"}));
    wait::until(3 * SECOND, "it runs", || {
        instance.figure(again.file("gcgroup.stat"), "nr_ended_kernels") > 0
    });
    assert_eq!(instance.figure("devices/0/device.events", "mps_lost"), 1);
}

#[test]
fn a_workload_whose_context_breaks_ends() {
    let instance = Instance::new();
    let (broken, other) = (instance.launch_fma(), instance.launch_fma());
    instance.fault_once(Operation::Submit, of(&broken), breakage());
    gone(&instance, &broken);
    let cut = instance.launch_fma();
    instance
        .faults()
        .cut_process(cut.pid)
        .expect("the simulated GPU runs");
    gone(&instance, &cut);
    instance.fault_once(Operation::RaiseStop, of(&other), breakage());
    let refused = instance.write(other.file("compute.freeze"), "1");
    assert!(
        matches!(refused, Err(Errno::IO | Errno::NODEV)),
        "{refused:?}"
    );
    gone(&instance, &other);
}

#[test]
fn a_timeslice_that_cannot_be_set_is_an_error() {
    use gcgroup_device_sim::{Failure, Refused};
    let instance = hasty().temporal().start();
    let workload = instance.launch_fma();
    let priority = workload.file("compute.priority");
    let failure = Effect::Fail(Failure::Service(Refused::Failed("locked".to_owned())));
    instance.fault_once(Operation::SetTimeslice, of(&workload), failure);
    assert_eq!(instance.write(&priority, "4"), Err(Errno::IO));
    assert_eq!(instance.text(&priority), "8");
    instance.fault(Operation::SetTimeslice, of(&workload), Effect::Hang);
    assert_eq!(instance.write(&priority, "4"), Err(Errno::TIMEDOUT));
    assert_eq!(pending(&instance, &workload), 1);
    instance.clear_faults();
    wait::until(3 * SECOND, "its outcome is published", || {
        pending(&instance, &workload) == 0
    });
    assert_eq!(instance.text(&priority), "4");
    assert_eq!(
        instance.figure(workload.file("gcgroup.stat"), "timeslice_usec"),
        524_288 >> 4
    );
}

#[test]
fn a_lost_gpu_goes_and_comes_back() {
    let instance = Instance::new();
    let workload = instance.launch_fma();
    instance.faults().lose_gpu(0).expect("it is there");
    wait::until(10 * SECOND, "its directory goes", || {
        !instance.path("devices/0").exists()
    });
    gone(&instance, &workload);
    let refused = instance
        .try_launch(&json!({"kernel": "fma_fp32"}))
        .expect_err("it is lost");
    assert!(
        matches!(refused.errno, Errno::NOENT | Errno::NODEV),
        "{refused:?}"
    );
    assert_eq!(instance.names("processes"), ["list"]);
    instance.faults().restore_gpu(0).expect("it is known");
    wait::until(10 * SECOND, "its directory comes back", || {
        instance.path("devices/0").exists()
    });
    let _works = instance.launch_fma();
}

#[test]
fn errors_that_the_driver_reports_are_counted() {
    let instance = Instance::new();
    let xids = || instance.figure("devices/0/device.events", "xid");
    assert_eq!(xids(), 0);
    instance.faults().raise_xids(0, 3).expect("it is there");
    wait::until(3 * SECOND, "they are counted", || xids() == 3);
}
