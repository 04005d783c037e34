//! `gcgroup`, which speaks through the files only.

use std::time::Duration;

use gcgroup_integration_tests::command::{ok, run};
use gcgroup_integration_tests::{Errno, Instance, wait};
use serde_json::{Value, json};

/// The document that a command that must succeed prints.
#[track_caller]
fn document(instance: &Instance, arguments: &[&str]) -> Value {
    serde_json::from_str(&ok(instance, arguments)).expect("one JSON document")
}

/// What a command that must fail says.
#[track_caller]
fn fails(instance: &Instance, arguments: &[&str]) -> String {
    let output = run(instance, arguments);
    assert_eq!(output.status.code(), Some(1), "{arguments:?}: {output:?}");
    String::from_utf8(output.stderr).expect("text")
}

#[test]
fn launch_has_a_flag_for_each_field() {
    let instance = Instance::new();
    instance.partition("be", 64);
    let answer = document(
        &instance,
        &[
            "launch",
            "--name",
            "noisy",
            "--gpu",
            "0",
            "--kernel",
            "copy",
            "--blocks",
            "per-sm:1",
            "--threads",
            "512",
            "--iterations",
            "3",
            "--sliced",
            "true",
            "--duration",
            "5m",
            "--bytes",
            "64M",
            "--partition",
            "be",
            "--priority",
            "8",
            "--compute-max",
            "20000 100000",
        ],
    );
    assert_eq!(
        (&answer["name"], &answer["gpu"]),
        (&json!("noisy"), &json!(0))
    );
    let spec: Value = serde_json::from_str(&instance.text("workloads/noisy/workload.spec"))
        .expect("workload.spec is JSON");
    for (field, value) in [
        ("blocks", json!(132)),
        ("threads", json!(512)),
        ("iterations", json!(3)),
        ("duration", json!("300000ms")),
        ("bytes", json!(64 << 20)),
        ("partition", json!("be")),
        ("compute_max", json!("20000 100000")),
    ] {
        assert_eq!(spec[field], value, "{field} of {spec}");
    }
}

#[test]
fn launch_takes_a_file() {
    let instance = Instance::new();
    let path = instance.base().join("spec.json");
    std::fs::write(
        &path,
        "{\n \"kernel\": \"sleep\",\n \"name\": \"filed\"\n}\n",
    )
    .expect("the directory is ours");
    let path = path.to_str().expect("ASCII");
    let answer = document(&instance, &["launch", "--json", path]);
    assert_eq!(answer["name"], json!("filed"));
}

#[test]
fn launch_says_which_field_was_wrong() {
    let instance = Instance::new();
    let text = fails(&instance, &["launch", "--kernel", "fma_fp32", "--ilp", "9"]);
    assert!(text.contains("ilp") && text.contains("1 to 4"), "{text}");
    let text = fails(&instance, &["launch", "--kernel", "nosuch"]);
    assert!(
        text.contains("nosuch") && text.contains("fma_fp32"),
        "{text}"
    );
    assert_eq!(instance.names("workloads"), Vec::<String>::new());
}

#[test]
fn ls_shows_each_process_on_its_gpu() {
    let instance = Instance::new();
    instance.partition("a", 64);
    let one = instance.launch(&json!({"kernel": "fma_fp32", "name": "one", "partition": "a"}));
    let two = instance.launch(&json!({"kernel": "sleep", "name": "two"}));
    instance.set(two.file("compute.freeze"), "1");
    let text = ok(&instance, &["ls"]);
    for word in ["one", "two", &one.pid.to_string(), &two.pid.to_string()] {
        assert!(text.contains(word), "{word} is missing in\n{text}");
    }
    let list = document(&instance, &["ls", "--json"]);
    let entries = list.as_array().expect("a list").clone();
    let mut pids: Vec<_> = entries.iter().filter_map(|e| e["pid"].as_u64()).collect();
    pids.sort_unstable();
    let mut expected = [u64::from(one.pid), u64::from(two.pid)];
    expected.sort_unstable();
    assert_eq!(pids, expected, "{list}");
}

#[test]
fn get_reads_what_the_files_hold() {
    let instance = Instance::new();
    let workload = instance.launch(&json!({"kernel": "fma_fp32", "name": "one"}));
    let pid = workload.pid.to_string();
    assert_eq!(
        ok(&instance, &["get", &pid, "compute.priority"]).trim(),
        "8"
    );
    assert_eq!(
        ok(&instance, &["get", "one", "compute.max"]).trim(),
        "max 100000"
    );
    assert_eq!(
        ok(&instance, &["get", "devices/0", "sm.capacity"]).trim(),
        "132"
    );
    let all = document(&instance, &["get", "one", "--json"]);
    assert_eq!(all["compute.freeze"], json!(0));
    assert_eq!(all["gcgroup.events"]["populated"], json!(1));
    assert!(
        all["gcgroup.stat"]["nr_submitted_kernels"].is_u64(),
        "{all}"
    );
    assert!(all.get("gcgroup.kill").is_none(), "it cannot be read");
    let text = fails(&instance, &["get", "one", "gcgroup.kill"]);
    assert!(text.contains("gcgroup.kill"), "{text}");
}

#[test]
fn set_writes_and_says_what_is_allowed() {
    let instance = Instance::new();
    let workload = instance.launch(&json!({"kernel": "fma_fp32", "name": "one"}));
    ok(&instance, &["set", "one", "compute.max", "20000", "50000"]);
    assert_eq!(instance.text(workload.file("compute.max")), "20000 50000");
    ok(&instance, &["set", "one", "compute.max", "max"]);
    let text = fails(&instance, &["set", "one", "compute.max", "-1"]);
    assert!(
        text.contains("compute.max") && text.contains("QUOTA"),
        "{text}"
    );
    let text = fails(&instance, &["set", "one", "gcgroup.stat", "1"]);
    assert!(text.contains("gcgroup.stat"), "{text}");
    let text = fails(&instance, &["set", "nosuch", "compute.max", "max"]);
    assert!(text.contains("nosuch"), "{text}");
    let output = run(&instance, &["set", "one", "compute.freeze", "2", "--json"]);
    let error: Value = serde_json::from_slice(&output.stderr).expect("JSON for programs");
    assert_eq!(
        error["errno"],
        json!(Errno::INVAL.raw_os_error()),
        "{error}"
    );
}

#[test]
fn freeze_and_thaw_take_several_in_one_step() {
    let instance = Instance::new();
    let one = instance.launch(&json!({"kernel": "fma_fp32", "name": "one"}));
    let two = instance.launch(&json!({"kernel": "fma_fp32", "name": "two"}));
    let frozen = || [&one, &two].map(|w| instance.text(w.file("compute.freeze")));
    ok(&instance, &["freeze", "one"]);
    assert_eq!(frozen(), ["1", "0"]);
    ok(&instance, &["freeze", "one", "two"]);
    assert_eq!(frozen(), ["1", "1"]);
    ok(&instance, &["thaw", &one.pid.to_string(), "two"]);
    assert_eq!(frozen(), ["0", "0"]);
    fails(&instance, &["freeze", "one", "nosuch"]);
    assert_eq!(frozen(), ["0", "0"], "all or none");
}

#[test]
fn kill_ends_workloads() {
    let instance = Instance::new();
    let one = instance.launch(&json!({"kernel": "fma_fp32", "name": "one"}));
    let two = instance.launch(&json!({"kernel": "fma_fp32", "name": "two"}));
    ok(&instance, &["kill", "one", &two.pid.to_string()]);
    wait::until(Duration::from_secs(3), "both end", || {
        !instance.has_entry(one.pid) && !instance.has_entry(two.pid)
    });
    let text = fails(&instance, &["kill", "one"]);
    assert!(text.contains("one"), "{text}");
}

#[test]
fn partitions_are_made_resized_listed_and_removed() {
    let instance = Instance::new();
    ok(&instance, &["partition", "create", "a", "60"]);
    assert_eq!(instance.number("partitions/0/a/sm.count"), 64);
    ok(&instance, &["partition", "create", "0/b"]);
    assert_eq!(instance.number("partitions/0/b/sm.count"), 0);
    ok(&instance, &["partition", "resize", "b", "max"]);
    assert_eq!(instance.number("partitions/0/b/sm.count"), 68);
    let text = ok(&instance, &["partition", "ls"]);
    assert!(text.contains("64") && text.contains("68"), "{text}");
    let list = document(&instance, &["partition", "ls", "--json"]);
    assert_eq!(list.as_array().map(Vec::len), Some(2), "{list}");
    let text = fails(&instance, &["partition", "resize", "a", "72"]);
    assert!(text.contains("partitions/0/a"), "{text}");
    let text = fails(&instance, &["partition", "create", "a"]);
    assert!(text.contains("partitions/0/a"), "{text}");
    let text = fails(&instance, &["partition", "create", "UPPER"]);
    assert!(text.contains("UPPER"), "{text}");
    let member = instance.launch(&json!({"kernel": "sleep", "partition": "a"}));
    let text = fails(&instance, &["partition", "remove", "a"]);
    assert!(text.contains("partitions/0/a"), "{text}");
    instance.set(member.file("compute.partition"), "none");
    ok(&instance, &["partition", "remove", "a", "b"]);
    assert_eq!(instance.names("partitions/0"), Vec::<String>::new());
}

#[test]
fn a_partition_that_cannot_be_sized_is_not_left_behind() {
    let instance = Instance::new();
    instance.partition("a", 128);
    fails(&instance, &["partition", "create", "b", "64"]);
    assert_eq!(instance.names("partitions/0"), ["a"]);
}

#[test]
fn the_root_can_be_given_and_must_be_served() {
    let instance = Instance::new();
    let nowhere = instance.base().join("nowhere");
    let output = std::process::Command::new(gcgroup_integration_tests::binary::gcgroup())
        .arg("--root")
        .arg(&nowhere)
        .arg("ls")
        .output()
        .expect("it starts");
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("nowhere"), "{text}");
    let output = std::process::Command::new(gcgroup_integration_tests::binary::gcgroup())
        .env("GCGROUP_ROOT", instance.root())
        .args(["ls", "--json"])
        .output()
        .expect("it starts");
    assert!(output.status.success(), "{output:?}");
    let usage = run(&instance, &["frobnicate"]);
    assert_eq!(usage.status.code(), Some(2));
}
