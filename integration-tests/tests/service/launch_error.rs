//! Launches that are refused: the errno, the field, and nothing left behind.

use std::time::Duration;

use gcgroup_integration_tests::{Errno, Instance, Refused, Setup, file, wait};
use rustix::fs::OFlags;
use serde_json::{Value, json};

/// Checks that nothing was launched.
fn assert_empty(instance: &Instance) {
    assert_eq!(instance.names("processes"), ["list"]);
    assert_eq!(instance.names("workloads"), Vec::<String>::new());
    wait::until(Duration::from_secs(3), "no worker is left", || {
        instance.in_role("worker").is_empty()
    });
}

fn refusal(instance: &Instance, spec: &Value) -> Refused {
    match instance.try_launch(spec) {
        Ok(launched) => panic!("{spec} was launched: {launched:?}"),
        Err(refused) => {
            assert!(!refused.error.is_empty(), "{spec}");
            refused
        }
    }
}

/// A kernel, one of its fields, and JSON values that the field does not take.
#[rustfmt::skip]
const WRONG: [(&str, &str, &str); 15] = [
    ("fma_fp32", "kernel", r#"[5, "nosuch", "", "fma_fp32\n", ["fma_fp32"]]"#),
    ("fma_fp32", "ilp", r#"[0, 5, "4", -1, 1.5, 4294967296]"#),
    ("fma_fp32", "blocks", r#"[0, -1, 262145, "per-sm:0", "per-sm:x", "132", "per-sm:99999", true]"#),
    ("fma_fp32", "threads", r#"[0, 1025, "all", -1]"#),
    ("fma_fp32", "iterations", r#"[0, -1, "many", 0.5]"#),
    ("fma_fp32", "sliced", r#"[0, "true", "no"]"#),
    ("fma_fp32", "duration", r#"[30, "30", "0s", "-1s", "1d", "721h", "s", " 1s", "99999999999999999999s"]"#),
    ("fma_fp32", "bytes", r#"["8G", 4096]"#),
    ("fma_fp32", "partition", r#"[5, "A", "", "../a"]"#),
    ("fma_fp32", "priority", r#"[16, -1, "8", 1.5]"#),
    ("fma_fp32", "compute_max", r#"[20000, "999", "20000 5", "", "half"]"#),
    ("fma_fp32", "barrier", r#"["x", "x:1", "x:65", ":2", 2, "x:y"]"#),
    ("fma_fp32", "name", r#"["", "a/b", "..", "-a", "a b", 5]"#),
    ("copy", "bytes", r#"[0, 4, 8191, 8193, "8X", -8, true]"#),
    ("copy", "ilp", r#"[2]"#),
];

#[test]
fn a_wrong_value_is_refused_with_its_field() {
    let instance = Instance::new();
    let refuses = |mut spec: Value, field: &str, value: &Value| {
        spec[field] = value.clone();
        let refused = refusal(&instance, &spec);
        let found = (refused.errno, refused.field.as_str());
        assert_eq!(found, (Errno::INVAL, field), "{spec}: {}", refused.error);
    };
    for (kernel, field, values) in WRONG {
        let values: Vec<Value> = serde_json::from_str(values).expect("a list");
        for value in &values {
            refuses(json!({ "kernel": kernel }), field, value);
        }
    }
    refuses(
        json!({"kernel": "fma_fp32"}),
        "name",
        &json!("x".repeat(64)),
    );
    assert_empty(&instance);
}

#[test]
fn a_missing_and_an_unknown_field_are_named() {
    let instance = Instance::new();
    for (spec, field) in [
        (json!({}), "kernel"),
        (json!({"name": "a"}), "kernel"),
        (json!({"kernel": null}), "kernel"),
        (json!({"kernel": "fma_fp32", "colour": 1}), "colour"),
        (json!({"kernel": "fma_fp32", "Name": "a"}), "Name"),
        (json!({"kernel": "fma_fp32", "rule": null}), "rule"),
    ] {
        let refused = refusal(&instance, &spec);
        assert_eq!(
            (refused.errno, refused.field.as_str()),
            (Errno::INVAL, field),
            "{spec}"
        );
    }
    assert_empty(&instance);
}

#[test]
fn what_is_no_object_is_refused() {
    let instance = Instance::new();
    for text in [
        "x",
        "[]",
        "5",
        "\"fma_fp32\"",
        "null",
        "}",
        "{]}",
        "{'kernel': 1}",
        "{,}",
        "{\0}",
    ] {
        let refused = instance.try_launch_text(text).expect_err(text);
        assert_eq!(
            (refused.errno, refused.field.as_str()),
            (Errno::INVAL, ""),
            "{text}"
        );
    }
    for bytes in [&b"{\"kernel\": \"\xff\"}"[..], b"\xff\xfe"] {
        assert_eq!(
            instance.write("gcgroup.launch", bytes),
            Err(Errno::INVAL),
            "{bytes:?}"
        );
    }
    let deep = format!("{{\"kernel\": {}", "[".repeat(60_000));
    let refused = instance.write("gcgroup.launch", deep);
    assert!(matches!(refused, Ok(()) | Err(Errno::INVAL)), "{refused:?}");
    assert_empty(&instance);
}

#[test]
fn what_follows_the_object_is_refused() {
    let instance = Instance::new();
    for text in [
        r#"{"kernel": "fma_fp32"} x"#,
        r#"{"kernel": "fma_fp32"}{"kernel": "fma_fp32"}"#,
    ] {
        let refused = instance.try_launch_text(text).expect_err(text);
        assert_eq!(refused.errno, Errno::INVAL, "{text}");
    }
    assert_empty(&instance);
}

#[test]
fn a_spec_has_at_most_64_kib() {
    const LONGEST: usize = 64 * 1024;
    let instance = Instance::new();
    let padded = |length: usize| {
        let spaces = " ".repeat(length - r#"{"kernel": "fma_fp32"}"#.len());
        format!(r#"{{"kernel": {spaces}"fma_fp32"}}"#)
    };
    let workload = instance
        .try_launch_text(&padded(LONGEST))
        .expect("as long as allowed");
    instance.set(workload.file("gcgroup.kill"), "1");
    wait::until(Duration::from_secs(3), "it ends", || {
        !instance.has_entry(workload.pid)
    });
    let refused = instance
        .try_launch_text(&padded(LONGEST + 1))
        .expect_err("too long");
    assert_eq!(refused.errno, Errno::INVAL);
    // In small writes too, and before any object is complete.
    let path = instance.path("gcgroup.launch");
    let descriptor = file::open_with(&path, OFlags::WRONLY).expect("it is rw");
    file::write_to(&descriptor, "{").expect("not yet too long");
    let chunk = [b' '; 4096];
    for _ in 1..LONGEST / chunk.len() {
        file::write_to(&descriptor, chunk).expect("not yet too long");
    }
    assert_eq!(
        file::write_to(&descriptor, chunk),
        Err(Errno::INVAL),
        "it is one byte too long"
    );
    assert_empty(&instance);
}

#[test]
fn what_does_not_exist_is_not_found() {
    let instance = Instance::new();
    let refused = refusal(&instance, &json!({"kernel": "fma_fp32", "gpu": 7}));
    assert_eq!(
        (refused.errno, refused.field.as_str()),
        (Errno::NOENT, "gpu")
    );
    let refused = refusal(
        &instance,
        &json!({"kernel": "fma_fp32", "partition": "nosuch"}),
    );
    assert_eq!(
        (refused.errno, refused.field.as_str()),
        (Errno::NOENT, "partition")
    );
    std::fs::create_dir(instance.path("partitions/0/empty")).expect("the name is free");
    let refused = refusal(
        &instance,
        &json!({"kernel": "fma_fp32", "partition": "empty"}),
    );
    assert_eq!(
        (refused.errno, refused.field.as_str()),
        (Errno::INVAL, "partition")
    );
    assert_empty(&instance);
}

#[test]
fn a_taken_name_is_refused() {
    let instance = Instance::new();
    let spec = json!({"kernel": "fma_fp32", "name": "mine"});
    let first = instance.launch(&spec);
    let refused = refusal(&instance, &spec);
    assert_eq!(
        (refused.errno, refused.field.as_str()),
        (Errno::EXIST, "name")
    );
    assert_eq!(instance.names("workloads"), ["mine"]);
    assert_eq!(
        instance.text("processes/list"),
        format!("PID\n{}", first.pid)
    );
}

#[test]
fn a_limit_of_memory_is_not_supported_yet() {
    let instance = Instance::new();
    for limit in [json!("6G"), json!(1 << 30)] {
        let refused = refusal(&instance, &json!({"kernel": "copy", "memory_limit": limit}));
        assert_eq!(
            (refused.errno, refused.field.as_str()),
            (Errno::OPNOTSUPP, "memory_limit")
        );
    }
    assert_empty(&instance);
}

#[test]
fn more_memory_than_there_is_finds_no_room() {
    let instance = Instance::new();
    let before = instance.number("devices/0/memory.current");
    let refused = refusal(&instance, &json!({"kernel": "copy", "bytes": "200G"}));
    assert_eq!(refused.errno, Errno::NOSPC, "{refused:?}");
    assert_empty(&instance);
    let workload = instance.launch(&json!({"kernel": "copy", "bytes": "100G"}));
    let refused = refusal(&instance, &json!({"kernel": "copy", "bytes": "100G"}));
    assert_eq!(refused.errno, Errno::NOSPC, "{refused:?}");
    instance.set(workload.file("gcgroup.kill"), "1");
    wait::until(Duration::from_secs(3), "the memory is given back", || {
        instance.number("devices/0/memory.current") <= before + (1 << 30)
    });
    let _again = instance.launch(&json!({"kernel": "copy", "bytes": "100G"}));
}

#[test]
fn a_priority_that_nothing_enforces_is_not_supported() {
    let instance = Instance::new();
    let workload = instance.launch(&json!({"kernel": "fma_fp32", "priority": 8}));
    let enforcers = instance.text(workload.file("gcgroup.enforcers"));
    let enforced = !enforcers.contains("compute.priority none");
    match (
        enforced,
        instance.try_launch(&json!({"kernel": "fma_fp32", "priority": 4})),
    ) {
        (true, launched) => drop(launched.expect("gcgroup.enforcers names a mechanism")),
        (false, refused) => {
            let refused = refused.expect_err("gcgroup.enforcers says none");
            assert_eq!(
                (refused.errno, refused.field.as_str()),
                (Errno::OPNOTSUPP, "priority")
            );
        }
    }
}

#[test]
fn the_mps_server_takes_48_clients() {
    const SLOTS: usize = 48;
    let instance = Setup::new().start();
    let spec = json!({"kernel": "sleep", "compute_max": "1000 100000"});
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..SLOTS / 4 {
                    let _ = instance.launch(&spec);
                }
            });
        }
    });
    let refused = refusal(&instance, &spec);
    assert_eq!(refused.errno, Errno::BUSY, "{refused:?}");
    assert_eq!(instance.names("workloads").len(), SLOTS);
    let first = &instance.names("workloads")[0];
    instance.set(format!("workloads/{first}/gcgroup.kill"), "1");
    wait::until(Duration::from_secs(3), "a slot is free again", || {
        instance.names("workloads").len() < SLOTS
    });
    let _taken = instance.launch(&spec);
}
