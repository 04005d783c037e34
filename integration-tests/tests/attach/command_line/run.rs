//! `gcgroup run`: a program whose settings wait for its first context.

use std::fs;
use std::path::Path;
use std::process::Command;

use gcgroup_integration_tests::{binary, wait};

use super::{DONE, fails, instance, ok, run_app, runs, says};

#[test]
fn run_has_its_settings_in_force_with_the_first_context() {
    let instance = instance();
    let options = ["--priority", "3", "--max", "40000 100000", "--freeze"];
    let mut child = run_app(&instance, &options, "3000");
    let pid = child.id();
    let waits = || {
        let pending = instance.text("gcgroup.pending");
        let mut lines: Vec<_> = pending.lines().map(str::to_owned).collect();
        lines.sort();
        lines
    };
    let expected = [
        "compute.freeze 1",
        "compute.max 40000 100000",
        "compute.priority 3",
    ]
    .map(|setting| format!("{pid} {setting}"));
    wait::until(DONE, "its settings wait", || waits() == expected);
    assert!(!instance.has_entry(pid), "it has no context yet");
    let reads = |name: &str, value: &str| {
        let read = instance.read(format!("processes/{pid}/0/{name}"));
        read.is_ok_and(|text| text.trim_end() == value)
    };
    wait::until(DONE, "all are in force", || {
        reads("compute.priority", "3")
            && reads("compute.max", "40000 100000")
            && reads("compute.freeze", "1")
    });
    assert!(instance.is_stopped(pid));
    let context = &instance.contexts(pid)[0];
    assert_eq!(context.timeslice_usec, 524_288 >> 3);
    let name = instance.text(format!("processes/{pid}/comm"));
    assert!(name.starts_with("gcgroupd"), "gcgroup became it: {name}");
    ok(&instance, &["thaw", &pid.to_string()]);
    assert!(runs(&instance, pid));
    child.kill().expect("it is our child");
    child.wait().expect("it is our child");
    wait::until(DONE, "nothing waits for the dead", || waits().is_empty());
}

/// A command that leaves a mark when it is started.
fn marking(mark: &Path) -> [String; 2] {
    let mark = mark.to_str().expect("ASCII");
    ["touch".to_owned(), mark.to_owned()]
}

#[test]
fn run_with_a_wrong_setting_starts_nothing() {
    let instance = instance();
    let mark = instance.base().join("mark");
    let [program, argument] = marking(&mark);
    for (options, status, words) in [
        (&["--priority", "16"][..], 2, &["16", "0 to 15"][..]),
        (&["--priority", "-1"], 2, &["-1", "0 to 15"]),
        (&["--priority", "high"], 2, &["high", "0 to 15"]),
        (&["--max", "999"], 2, &["999", "1000"]),
        (&["--max", "20000 1000001"], 2, &["1000001", "1000000"]),
        (&["--max", "some"], 2, &["some", "QUOTA"]),
        (&["--max", "5000 10000"], 1, &["5000 10000", "50000"]),
        (
            &["--priority", "3", "--freeze", "--max", "5000 49999"],
            1,
            &["5000 49999", "50000"],
        ),
    ] {
        let command = ["--", &program, &argument];
        let arguments = [&["run"], options, &command].concat();
        says(&fails(&instance, status, &arguments), words);
        assert!(!mark.exists(), "{options:?} was started");
    }
    fails(&instance, 2, &["run", "--priority", "3"]);
    wait::until(DONE, "nothing waits for what was not started", || {
        instance.text("gcgroup.pending").is_empty()
    });
    ok(
        &instance,
        &["run", "--max", "5000 50000", "--", &program, &argument],
    );
    assert!(mark.exists());
}

#[test]
fn run_ends_as_a_shell_does() {
    let instance = instance();
    let plain = instance.base().join("plain");
    fs::write(&plain, "no program").expect("the directory is ours");
    let plain = plain.to_str().expect("ASCII");
    let nowhere = instance.base().join("nowhere");
    let nowhere = nowhere.to_str().expect("ASCII");
    for (status, command) in [
        (127, nowhere),
        (127, "gcgroup-no-such-command"),
        (126, plain),
    ] {
        let text = fails(&instance, status, &["run", "--freeze", "--", command]);
        says(&text, &[command]);
    }
    fails(
        &instance,
        7,
        &["run", "--freeze", "--", "sh", "-c", "exit 7"],
    );
    wait::until(DONE, "nothing waits for what has ended", || {
        instance.text("gcgroup.pending").is_empty()
    });
}

#[test]
fn run_without_a_service_says_so_and_starts_nothing() {
    let mut instance = instance();
    instance.stop();
    let mark = instance.base().join("mark");
    let [program, argument] = marking(&mark);
    let command = ["run", "--priority", "3", "--", &program, &argument];
    let text = fails(&instance, 1, &command);
    says(&text, &["gcgroupd", "start it", "--root"]);
    says(&text, &[instance.root().to_str().expect("ASCII")]);
    let nowhere = instance.base().join("nowhere");
    let output = Command::new(binary::gcgroup())
        .arg("--root")
        .arg(&nowhere)
        .args(command)
        .output()
        .expect("gcgroup starts");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    says(&String::from_utf8_lossy(&output.stderr), &["nowhere"]);
    assert!(!mark.exists());
}
