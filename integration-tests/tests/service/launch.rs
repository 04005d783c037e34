//! gcgroup.launch, and what stands in the tree for a workload.

use std::fs;
use std::time::{Duration, Instant};

use gcgroup_integration_tests::instance::answer;
use gcgroup_integration_tests::{Errno, Instance, Setup, file, process, wait};
use rustix::fs::OFlags;
use rustix::io::pread;
use serde_json::{Value, json};

const SECOND: Duration = Duration::from_secs(1);

fn spec_of(instance: &Instance, workload: &gcgroup_integration_tests::Launched) -> Value {
    let text = instance.text(workload.file("workload.spec"));
    serde_json::from_str(&text).expect("workload.spec is JSON")
}

#[test]
fn every_field_is_taken_and_shown() {
    let instance = Instance::new();
    instance.partition("be", 64);
    let workload = instance.launch(&json!({
        "name": "Noisy-1.x_", "gpu": 0, "kernel": "copy", "ilp": 1, "blocks": 132, "threads": 512,
        "iterations": 3, "sliced": false, "duration": "5m", "bytes": "64M", "partition": "be",
        "priority": 8, "memory_limit": null, "compute_max": "20000 50000", "barrier": null
    }));
    assert_eq!((workload.gpu, workload.name.as_str()), (0, "Noisy-1.x_"));
    let spec = spec_of(&instance, &workload);
    for (field, value) in [
        ("name", json!("Noisy-1.x_")),
        ("gpu", json!(0)),
        ("kernel", json!("copy")),
        ("ilp", json!(1)),
        ("blocks", json!(132)),
        ("threads", json!(512)),
        ("iterations", json!(3)),
        ("sliced", json!(false)),
        ("duration", json!("300000ms")),
        ("bytes", json!(64 << 20)),
        ("partition", json!("be")),
        ("priority", json!(8)),
        ("compute_max", json!("20000 50000")),
        ("barrier", Value::Null),
    ] {
        assert_eq!(spec[field], value, "{field} of {spec}");
    }
    assert_eq!(instance.text(workload.file("compute.partition")), "be");
    assert_eq!(instance.text(workload.file("compute.max")), "20000 50000");
    assert_eq!(
        instance.figure(workload.file("gcgroup.stat"), "sm_count"),
        64
    );
}

#[test]
fn what_is_left_out_is_decided_and_shown() {
    let instance = Instance::new();
    for kernel in [
        "fma_fp32",
        "mul_fp32",
        "mul_fp64",
        "copy",
        "copy_per_block",
        "sleep",
    ] {
        let workload = instance.launch(&json!({ "kernel": kernel }));
        let number = workload
            .name
            .strip_prefix(kernel)
            .expect("named after its kernel");
        let digits = number.trim_start_matches(|c: char| !c.is_ascii_digit());
        assert!(digits.parse::<u32>().is_ok(), "{}", workload.name);
        let spec = spec_of(&instance, &workload);
        assert_eq!(spec["name"], json!(workload.name));
        assert_eq!(spec["blocks"], json!(132), "one a SM: {spec}");
        assert_eq!(spec["sliced"], json!(true));
        for field in ["ilp", "threads", "iterations"] {
            assert!(
                spec[field].as_u64().is_some_and(|n| n > 0),
                "{field} of {spec}"
            );
        }
        instance.set(workload.file("gcgroup.kill"), "1");
    }
}

#[test]
fn names_that_are_left_out_differ() {
    let instance = Instance::new();
    let names: std::collections::BTreeSet<_> = (0..3).map(|_| instance.launch_fma().name).collect();
    assert_eq!(names.len(), 3, "{names:?}");
}

#[test]
fn blocks_can_be_counted_by_sm() {
    let instance = Instance::new();
    let workload = instance.launch(&json!({"kernel": "sleep", "blocks": "per-sm:2"}));
    assert_eq!(spec_of(&instance, &workload)["blocks"], json!(264));
}

#[test]
fn a_calibrated_launch_lasts_about_half_a_millisecond() {
    let instance = Instance::new();
    for kernel in ["fma_fp32", "mul_fp64", "copy"] {
        let workload = instance.launch(&json!({ "kernel": kernel, "bytes":
            if kernel == "copy" { json!("16M") } else { Value::Null } }));
        let rows = samples(&instance, &workload, 20);
        let mut device: Vec<f64> = rows.iter().map(|row| row[2]).collect();
        device.sort_by(f64::total_cmp);
        let median = device[device.len() / 2];
        assert!((300.0..800.0).contains(&median), "{kernel}: {median} us");
        instance.set(workload.file("gcgroup.kill"), "1");
    }
}

/// Rows of workload.samples once there are that many.
fn samples(
    instance: &Instance,
    workload: &gcgroup_integration_tests::Launched,
    least: usize,
) -> Vec<Vec<f64>> {
    let mut rows = Vec::new();
    wait::until(5 * SECOND, "launches are sampled", || {
        let text = instance.text(workload.file("workload.samples"));
        let mut lines = text.lines();
        assert_eq!(
            lines.next(),
            Some("seq,start_ns,device_us,wall_us,sm_count")
        );
        rows = lines
            .map(|line| {
                line.split(',')
                    .map(|cell| cell.parse().unwrap_or_else(|_| panic!("{line:?}")))
                    .collect::<Vec<f64>>()
            })
            .collect();
        rows.len() >= least
    });
    rows
}

#[test]
fn samples_are_numbered_in_the_order_of_time() {
    let instance = Instance::new();
    instance.partition("a", 32);
    let workload = instance.launch(&json!({"kernel": "fma_fp32", "partition": "a"}));
    let rows = samples(&instance, &workload, 50);
    for row in &rows {
        assert_eq!(row.len(), 5, "{row:?}");
        assert!(row[2] > 0.0 && row[3] > 0.0, "{row:?}");
        assert_eq!(row[4], 32.0, "{row:?}");
    }
    for pair in rows.windows(2) {
        assert!(pair[1][0] > pair[0][0], "seq: {pair:?}");
        assert!(pair[1][1] > pair[0][1], "start_ns: {pair:?}");
    }
    let first = samples(&instance, &workload, 1).len();
    let bounded = || {
        instance
            .text(workload.file("workload.samples"))
            .lines()
            .count()
    };
    std::thread::sleep(SECOND);
    assert!(first <= bounded());
    assert!(bounded() < 100_000, "the ring is bounded");
}

#[test]
fn a_spec_can_come_in_lines_and_is_answered_on_the_same_descriptor() {
    let instance = Instance::new();
    let path = instance.path("gcgroup.launch");
    let descriptor = file::open_with(&path, OFlags::RDWR).expect("it is rw");
    let nothing = || file::read_from(&descriptor).expect("it can be read");
    assert_eq!(nothing(), "");
    for line in [
        "{\n",
        " \"name\": \"}{\",\n",
        "\"kernel\":\n",
        "\"fma_fp32\"\n",
    ] {
        file::write_to(&descriptor, line).expect("half an object is no error");
        assert_eq!(nothing(), "");
        assert_eq!(instance.names("workloads"), Vec::<String>::new());
    }
    // The name is wrong, which only a complete object can say.
    let written = file::write_to(&descriptor, "}\n");
    let refused = answer(written, &nothing()).expect_err("no name has braces");
    assert_eq!(
        (refused.errno, refused.field.as_str()),
        (Errno::INVAL, "name")
    );

    let descriptor = file::open_with(&path, OFlags::RDWR).expect("it is rw");
    for byte in "{\"kernel\":\"fma_fp32\",\"name\":\"slow\"".bytes() {
        file::write_to(&descriptor, [byte]).expect("half an object is no error");
    }
    let written = file::write_to(&descriptor, "}");
    let text = file::read_from(&descriptor).expect("the answer");
    let workload = answer(written, &text).expect("a good spec");
    assert_eq!(workload.name, "slow");
    assert_eq!(
        file::read_from(&descriptor),
        Ok(String::new()),
        "the answer is given once"
    );
}

#[test]
fn an_answer_can_be_read_in_pieces_but_not_by_offset() {
    let instance = Instance::new();
    let path = instance.path("gcgroup.launch");
    let descriptor = file::open_with(&path, OFlags::RDWR).expect("it is rw");
    let written = file::write_to(&descriptor, r#"{"kernel": "fma_fp32"}"#);
    let mut buffer = [0_u8; 3];
    assert_eq!(pread(&descriptor, &mut buffer, 0), Err(Errno::SPIPE));
    let mut text = String::new();
    loop {
        match rustix::io::read(&descriptor, &mut buffer).expect("it can be read") {
            0 => break,
            count => text.push_str(std::str::from_utf8(&buffer[..count]).expect("ASCII")),
        }
    }
    answer(written, &text).expect("a good spec");
}

#[test]
fn a_read_only_descriptor_reads_nothing() {
    let instance = Instance::new();
    assert_eq!(instance.read("gcgroup.launch"), Ok(String::new()));
    let _workload = instance.launch_fma();
    assert_eq!(instance.read("gcgroup.launch"), Ok(String::new()));
}

#[test]
fn a_shell_can_launch() {
    let instance = Instance::new();
    let echo = |spec: &str| {
        std::process::Command::new("sh")
            .args(["-c", "echo \"$1\" > \"$0\""])
            .arg(instance.path("gcgroup.launch"))
            .arg(spec)
            .output()
            .expect("sh is there")
    };
    assert!(
        echo(r#"{"kernel": "fma_fp32", "name": "shell"}"#)
            .status
            .success()
    );
    assert_eq!(instance.names("workloads"), ["shell"]);
    let refused = echo(r#"{"kernel": "nosuch"}"#);
    assert!(!refused.status.success());
    assert_eq!(instance.names("workloads"), ["shell"]);
}

#[test]
fn an_object_that_is_never_completed_does_nothing() {
    let instance = Instance::new();
    for text in ["{", r#"{"kernel": "fma_fp32""#, "  \n"] {
        instance
            .write("gcgroup.launch", text)
            .expect("half an object is no error");
    }
    assert_eq!(instance.names("workloads"), Vec::<String>::new());
    assert_eq!(instance.names("processes"), ["list"]);
}

#[test]
fn a_configuration_of_the_interference_suite_is_taken() {
    let instance = Instance::new();
    let workload = instance.launch(&json!({
        "kernel_name": "mul_fp32_ilp2",
        "init_args": {"num_floats": 1_000_000, "shared_lib": "libinterference_kernels.so"},
        "run_args": {"num_tb": 66, "num_threads_per_block": 128, "num_itrs": 50_000}
    }));
    let spec = spec_of(&instance, &workload);
    for (field, value) in [
        ("kernel", json!("mul_fp32")),
        ("ilp", json!(2)),
        ("blocks", json!(66)),
        ("threads", json!(128)),
        ("iterations", json!(50_000)),
        ("sliced", json!(false)),
    ] {
        assert_eq!(spec[field], value, "{field} of {spec}");
    }
    let copy = instance.launch(&json!({
        "kernel_name": "copy",
        "init_args": {"num_floats": 4_000_000},
        "run_args": {"num_tb": 132, "num_threads_per_block": 1024, "num_itrs": 10}
    }));
    assert_eq!(spec_of(&instance, &copy)["bytes"], json!(32_000_000));
    let refused = instance
        .try_launch(&json!({"kernel_name": "mul_fp32_ilp2", "run_args": {"num_blocks": 5}}))
        .expect_err("no such argument");
    assert_eq!(
        (refused.errno, refused.field.as_str()),
        (Errno::INVAL, "num_blocks")
    );
}

#[test]
fn a_workload_ends_when_its_duration_is_over() {
    let instance = Instance::new();
    let started = Instant::now();
    let workload = instance.launch(&json!({"kernel": "fma_fp32", "duration": "700ms"}));
    wait::until(5 * SECOND, "the workload ends", || {
        !instance.has_entry(workload.pid)
    });
    let lasted = started.elapsed();
    assert!((600..3000).contains(&lasted.as_millis()), "{lasted:?}");
    assert!(!process::is_running(workload.pid));
}

#[test]
fn a_workload_ends_in_time_though_it_is_frozen() {
    let instance = Instance::new();
    let workload = instance.launch(&json!({"kernel": "fma_fp32", "duration": "700ms"}));
    instance.set(workload.file("compute.freeze"), "1");
    wait::until(5 * SECOND, "the workload ends", || {
        !instance.has_entry(workload.pid)
    });
}

#[test]
fn a_workload_has_a_link_and_stands_in_the_list() {
    let instance = Instance::new();
    assert_eq!(instance.read("processes/list"), Ok("PID\n".to_owned()));
    let mut pids = Vec::new();
    for name in ["b", "a"] {
        let workload = instance.launch(&json!({"kernel": "fma_fp32", "name": name}));
        let link = fs::read_link(instance.path("workloads").join(name)).expect("a symlink");
        let target = format!("../processes/{}/0", workload.pid);
        assert_eq!(link.to_str(), Some(target.as_str()));
        let through = instance.text(format!("workloads/{name}/compute.priority"));
        assert_eq!(through, "8");
        pids.push(workload.pid);
    }
    pids.sort_unstable();
    assert_eq!(instance.names("workloads"), ["a", "b"]);
    let listed = format!("PID\n{}\n{}", pids[0], pids[1]);
    assert_eq!(instance.text("processes/list"), listed);
}

#[test]
fn self_is_not_there_for_a_process_without_an_entry_and_never_listed() {
    let instance = Instance::new();
    let _workload = instance.launch_fma();
    assert!(!instance.names("processes").contains(&"self".to_owned()));
    let error = fs::read_link(instance.path("processes/self")).expect_err("we use no GPU");
    assert_eq!(error.raw_os_error(), Some(Errno::NOENT.raw_os_error()));
}

#[test]
fn the_facts_of_a_process_are_those_of_the_kernel() {
    let instance = Instance::new();
    let workload = instance.launch_fma();
    let of = |name: &str| instance.text(format!("processes/{}/{name}", workload.pid));
    let uid = process::status(workload.pid, "Uid").expect("it runs");
    assert_eq!(uid.split_whitespace().next(), Some(of("uid").as_str()));
    assert_eq!(process::status(workload.pid, "Name"), Some(of("comm")));
    let table = fs::read_to_string(format!("/proc/{}/cgroup", workload.pid)).expect("it runs");
    let groups: Vec<_> = table
        .lines()
        .filter_map(|line| line.splitn(3, ':').nth(2))
        .collect();
    assert!(groups.contains(&of("cgroup").as_str()), "{groups:?}");
}

#[test]
fn a_worker_is_confined() {
    let instance = Instance::new();
    let workload = instance.launch_fma();
    let status = |key| process::status(workload.pid, key).expect("it runs");
    for ids in [status("Uid"), status("Gid")] {
        assert!(ids.split_whitespace().all(|id| id != "0"), "{ids}");
    }
    assert_eq!(status("Groups"), "");
    assert_eq!(status("Seccomp"), "2");
    assert_eq!(status("NoNewPrivs"), "1");
    for set in ["CapEff", "CapPrm", "CapInh", "CapAmb"] {
        assert_eq!(status(set).trim_start_matches('0'), "", "{set}");
    }
    let input = fs::read_link(format!("/proc/{}/fd/0", workload.pid)).expect("root may look");
    assert!(
        input.to_string_lossy().starts_with("socket:"),
        "{}",
        input.display()
    );
}

#[test]
fn memory_is_what_the_workload_allocated_and_is_given_back() {
    let instance = Instance::new();
    let device = || instance.number("devices/0/memory.current");
    let before = device();
    let workload = instance.launch(&json!({"kernel": "copy", "bytes": "1G"}));
    let current = instance.number(workload.file("memory.current"));
    assert!(
        (1 << 30..(1 << 30) + (16 << 20)).contains(&current),
        "{current}"
    );
    assert!(instance.number(workload.file("memory.peak")) >= current);
    wait::until(2 * SECOND, "the device shows it", || {
        device() >= before + (1 << 30)
    });
    instance.set(workload.file("gcgroup.kill"), "1");
    wait::until(3 * SECOND, "it is given back", || {
        device() < before + (1 << 30)
    });
}

#[test]
fn a_barrier_lets_its_workloads_start_together() {
    let instance = Instance::new();
    let spec = json!({"kernel": "fma_fp32", "barrier": "pair:2"});
    let first = instance.launch(&spec);
    let ended = |workload: &gcgroup_integration_tests::Launched| {
        instance.figure(workload.file("gcgroup.stat"), "nr_ended_kernels")
    };
    std::thread::sleep(Duration::from_millis(600));
    assert_eq!(ended(&first), 0, "it waits for the other one");
    let second = instance.launch(&spec);
    for workload in [&first, &second] {
        wait::until(3 * SECOND, "both start", || ended(workload) > 0);
    }
    let start = |workload| samples(&instance, workload, 1)[0].clone();
    let (one, two) = (start(&first), start(&second));
    assert_eq!(
        (one[0], two[0]),
        (0.0, 0.0),
        "the ring still has the first launches"
    );
    assert!(
        (one[1] - two[1]).abs() < 50e6,
        "{one:?} and {two:?} are more than 50 ms apart"
    );
}

#[test]
fn one_that_ends_at_its_barrier_is_not_waited_for() {
    let instance = Instance::new();
    let spec = json!({"kernel": "fma_fp32", "barrier": "pair:2"});
    let first = instance.launch(&spec);
    instance.set(first.file("gcgroup.kill"), "1");
    wait::until(3 * SECOND, "it ends", || !instance.has_entry(first.pid));
    let second = instance.launch(&spec);
    std::thread::sleep(Duration::from_millis(300));
    let ended = instance.figure(second.file("gcgroup.stat"), "nr_ended_kernels");
    assert_eq!(ended, 0, "it waits for another one");
    let third = instance.launch(&spec);
    for workload in [second, third] {
        wait::until(3 * SECOND, "both start", || {
            instance.figure(workload.file("gcgroup.stat"), "nr_ended_kernels") > 0
        });
    }
}

#[test]
fn a_name_is_free_again_when_its_workload_has_ended() {
    let instance = Instance::new();
    let spec = json!({"kernel": "fma_fp32", "name": "again"});
    let first = instance.launch(&spec);
    instance.set(first.file("gcgroup.kill"), "1");
    wait::until(3 * SECOND, "it ends", || !instance.has_entry(first.pid));
    let second = instance.launch(&spec);
    assert_eq!(second.name, "again");
    assert_ne!(second.pid, first.pid);
}

#[test]
fn launches_at_the_same_time_all_come_up() {
    let instance = Setup::new().gpus(2).start();
    let pids: Vec<u32> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8)
            .map(|index| {
                let instance = &instance;
                let spec = json!({"kernel": "sleep", "gpu": index % 2});
                scope.spawn(move || instance.launch(&spec).pid)
            })
            .collect();
        let launched = threads
            .into_iter()
            .map(|thread| thread.join().expect("launched"));
        launched.collect()
    });
    for pid in pids {
        assert!(instance.has_entry(pid));
    }
    assert_eq!(instance.names("workloads").len(), 8);
}
