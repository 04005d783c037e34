//! How the service and its workloads come and go, asked or not.

use std::os::unix::process::ExitStatusExt;
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

use gcgroup_integration_tests::{Errno, Instance, Launched, Setup, process, wait};
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::Signal;
use serde_json::json;

const SECOND: Duration = Duration::from_secs(1);

/// Waits until none of these processes runs.
fn ended(pids: &[u32]) {
    wait::until(5 * SECOND, "they end", || {
        !pids.iter().any(|&pid| process::is_running(pid))
    });
}

/// Waits until nothing of the instance is left but its simulated GPU.
fn nothing_left(instance: &Instance) {
    wait::until(5 * SECOND, "the mount is gone", || {
        !process::is_mounted(&instance.root())
    });
    wait::until(5 * SECOND, "only the simulated GPU is left", || {
        instance.processes().values().all(|role| role == "sim-gpu")
    });
    let clients = instance
        .faults()
        .clients()
        .expect("the simulated GPU outlives the service");
    assert!(clients.is_empty(), "{clients:?}");
}

fn workloads(instance: &Instance) -> [Launched; 3] {
    instance.partition("a", 64);
    let frozen = instance.launch_fma();
    instance.set(frozen.file("compute.freeze"), "1");
    let throttled = instance.launch_fma();
    instance.set(throttled.file("compute.max"), "20000 100000");
    let member = instance.launch(&json!({"kernel": "copy", "bytes": "64M", "partition": "a"}));
    [frozen, throttled, member]
}

#[test]
fn the_directory_of_a_killed_worker_is_gone_within_200_ms() {
    for setup in [Setup::new(), Setup::new().temporal()] {
        let instance = setup.start();
        instance.partition("a", 64);
        let spec = json!({"kernel": "fma_fp32", "partition": "a"});
        for frozen in ["0", "1", "0"] {
            let workload = instance.launch(&spec);
            instance.set(workload.file("compute.freeze"), frozen);
            let killed = Instant::now();
            process::signal(workload.pid, Signal::KILL);
            wait::until(SECOND, "the directory goes", || {
                !instance.has_entry(workload.pid)
            });
            let took = killed.elapsed();
            assert!(took < Duration::from_millis(200), "{took:?}");
            assert_eq!(instance.text("partitions/0/a/members"), "");
            assert_eq!(instance.names("workloads"), Vec::<String>::new());
            assert_eq!(instance.text("processes/list"), "PID");
        }
    }
}

#[test]
fn a_waiting_write_is_answered_when_its_worker_dies() {
    use gcgroup_device_sim::{Effect, Operation};
    let instance = Instance::new();
    let workload = instance.launch_fma();
    let scope = gcgroup_integration_tests::fault::of(&workload);
    instance.fault(Operation::RaiseStop, scope, Effect::Hang);
    std::thread::scope(|scope| {
        let write = scope.spawn(|| instance.write(workload.file("compute.freeze"), "1"));
        std::thread::sleep(Duration::from_millis(200));
        let killed = Instant::now();
        process::signal(workload.pid, Signal::KILL);
        assert_eq!(write.join().expect("no panic"), Err(Errno::NODEV));
        assert!(killed.elapsed() < SECOND, "{:?}", killed.elapsed());
    });
}

#[test]
fn an_asked_end_leaves_nothing_and_is_a_success() {
    for signal in [Signal::TERM, Signal::INT] {
        let mut instance = Instance::new();
        let pids = workloads(&instance).map(|workload| workload.pid);
        process::signal(instance.pid(), signal);
        let status = instance.wait_end();
        assert_eq!(status.code(), Some(0), "{signal:?}: {}", instance.log());
        assert!(!process::is_mounted(&instance.root()), "{signal:?}");
        ended(&pids);
        nothing_left(&instance);
    }
}

#[test]
fn an_end_does_not_wait_for_callers_or_workers_that_hang() {
    use gcgroup_device_sim::{Effect, Operation, Scope};
    let mut instance = Instance::new();
    let pids = workloads(&instance).map(|workload| workload.pid);
    // The one that runs: a stop has to be raised for it.
    let running = format!("processes/{}/0/compute.freeze", pids[2]);
    instance.fault(Operation::RaiseStop, Scope::All, Effect::Hang);
    let path = instance.path(&running);
    let write = std::thread::spawn(move || gcgroup_integration_tests::file::write(&path, "1"));
    std::thread::sleep(Duration::from_millis(200));
    let since = Instant::now();
    assert_eq!(instance.stop().code(), Some(0));
    assert!(since.elapsed() < 8 * SECOND, "{:?}", since.elapsed());
    assert!(write.join().expect("no panic").is_err());
    ended(&pids);
    nothing_left(&instance);
}

#[test]
fn nothing_is_left_of_a_service_that_was_killed() {
    let mut instance = Instance::new();
    let pids = workloads(&instance).map(|workload| workload.pid);
    instance.kill();
    ended(&pids);
    nothing_left(&instance);
    instance.start();
    assert_eq!(instance.names("processes"), ["list"]);
    assert_eq!(instance.names("partitions/0"), Vec::<String>::new());
    let _works = instance.launch_fma();
}

#[test]
fn a_start_cleans_what_a_killed_service_and_guardian_left() {
    let mut instance = Instance::new();
    let pids = workloads(&instance).map(|workload| workload.pid);
    for guardian in instance.in_role("guardian") {
        process::signal(guardian, Signal::KILL);
    }
    instance.kill();
    assert!(
        process::is_mounted(&instance.root()),
        "nobody was left to unmount"
    );
    assert!(
        instance.read("gcgroup.version").is_err(),
        "nobody serves it"
    );
    // No guardian is needed for this: their sockets were closed.
    ended(&pids);
    instance.start();
    assert!(instance.path("gcgroup.version").exists());
    assert_eq!(instance.names("processes"), ["list"]);
    let _works = instance.launch_fma();
    let mounts = std::fs::read_to_string("/proc/self/mounts").expect("/proc is mounted");
    let root = instance.root();
    let ours = mounts
        .lines()
        .filter(|line| line.contains(&*root.to_string_lossy()));
    assert_eq!(ours.count(), 1, "the stale mount is still there below");
}

fn recover(instance: &Instance) -> Output {
    instance.gcgroupd("recover").output().expect("it starts")
}

#[test]
fn recover_cleans_what_a_killed_service_and_guardian_left() {
    let mut instance = Instance::new();
    let pids = workloads(&instance).map(|workload| workload.pid);
    for guardian in instance.in_role("guardian") {
        process::signal(guardian, Signal::KILL);
    }
    instance.kill();
    let output = recover(&instance);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    ended(&pids);
    nothing_left(&instance);
    let again = recover(&instance);
    assert_eq!(
        again.status.code(),
        Some(0),
        "with nothing to do: {again:?}"
    );
}

#[test]
fn recover_does_nothing_beside_a_living_service() {
    let instance = Instance::new();
    let workload = instance.launch_fma();
    let output = recover(&instance);
    assert!(!output.status.success());
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(
        text.contains(&*instance.state().to_string_lossy()),
        "{text}"
    );
    assert!(text.contains("in use"), "{text}");
    assert!(process::is_running(workload.pid));
    instance.set(workload.file("compute.freeze"), "1");
}

#[test]
fn recover_of_a_state_directory_that_never_was_is_a_success() {
    let instance = Instance::new();
    let output = std::process::Command::new(gcgroup_integration_tests::binary::gcgroupd())
        .args(["recover", "--state"])
        .arg(instance.base().join("nosuch"))
        .output()
        .expect("it starts");
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(!instance.base().join("nosuch").exists());
}

#[test]
fn a_second_service_on_one_state_directory_is_refused() {
    let instance = Instance::new();
    let workload = instance.launch_fma();
    let other = instance.base().join("other");
    let started = Instant::now();
    let output = instance
        .gcgroupd("serve")
        .arg("--mountpoint")
        .arg(&other)
        .arg("--config")
        .arg(instance.configuration())
        .stdout(Stdio::null())
        .output()
        .expect("it starts");
    assert!(started.elapsed() < 12 * SECOND, "{:?}", started.elapsed());
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(
        text.contains(&*instance.state().to_string_lossy()),
        "{text}"
    );
    assert!(text.contains("in use"), "{text}");
    assert!(!process::is_mounted(&other));
    instance.set(workload.file("compute.freeze"), "1");
    instance.set(workload.file("compute.freeze"), "0");
}

#[test]
fn a_service_whose_mount_is_taken_away_ends_with_its_workloads() {
    let mut instance = Instance::new();
    let pids = workloads(&instance).map(|workload| workload.pid);
    unmount(instance.root(), UnmountFlags::DETACH).expect("it is mounted");
    let status = instance.wait_end();
    assert!(!status.success() && status.signal().is_none(), "{status:?}");
    assert!(instance.log().contains("mount"), "{}", instance.log());
    ended(&pids);
    nothing_left(&instance);
}

#[test]
fn workloads_end_though_the_service_was_stopped_and_killed() {
    let mut instance = Instance::new();
    let workload = instance.launch_fma();
    process::signal(instance.pid(), Signal::STOP);
    std::thread::sleep(Duration::from_millis(100));
    assert!(process::is_running(workload.pid));
    instance.kill();
    ended(&[workload.pid]);
}

#[test]
fn the_guardian_that_is_killed_does_not_take_the_service_along() {
    let instance = Instance::new();
    let workload = instance.launch_fma();
    let guardians = instance.in_role("guardian");
    assert_eq!(guardians.len(), 1, "{guardians:?}");
    process::signal(guardians[0], Signal::KILL);
    std::thread::sleep(Duration::from_millis(300));
    instance.set(workload.file("compute.freeze"), "1");
}

#[test]
fn restarts_in_a_row_serve_each_time() {
    let mut instance = Instance::new();
    for _ in 0..3 {
        let workload = instance.launch_fma();
        assert_eq!(instance.stop().code(), Some(0), "{}", instance.log());
        assert!(!process::is_running(workload.pid));
        instance.start();
    }
}

#[test]
fn the_simulated_gpu_survives_its_service_and_serves_the_next() {
    let mut instance = Instance::new();
    let uuid = instance.text("devices/0/uuid");
    let before = instance.in_role("sim-gpu");
    instance.kill();
    instance.start();
    assert_eq!(instance.in_role("sim-gpu"), before);
    assert_eq!(instance.text("devices/0/uuid"), uuid);
}
