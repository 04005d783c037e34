//! `ls`, `freeze`, `thaw` and `kill`.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use gcgroup_model::File;
use serde_json::{Value, json};

use crate::fixture::Tree;

#[test]
fn ls_shows_a_line_for_each_process_and_what_its_mechanism_costs() {
    let tree = Tree::new();
    tree.file(
        "processes/1234/0",
        File::Events,
        "populated 1\nfrozen 1\nheld 0\npending 0\n",
    );
    assert_eq!(
        tree.told(&["ls"]),
        " PID  GPU  NAME    USER  PRIO  STATE    MEMORY  ENFORCER  LAUNCHES
  77    0  python  root     8  running    8.0G  channel          -
1234    0  noisy   root     8  frozen     8.0G  worker          10

worker: the workload stops itself, in about 0.1 ms.
channel: the driver stops it, in about 1 ms; free while it runs.
"
    );
    let told = tree.told(&["ls", "--long"]);
    let lines: Vec<Vec<&str>> = told
        .lines()
        .take(3)
        .map(|line| line.split_whitespace().skip(9).collect())
        .collect();
    assert_eq!(
        lines,
        [
            ["MAX", "PARTITION", "SMS", "ENDED", "USAGE_USEC", "CGROUP"],
            ["max", "none", "-", "-", "-", "/user.slice"],
            ["max", "a", "64", "9", "4500", "/user.slice"],
        ]
    );
}

#[test]
fn ls_stays_within_eighty_columns() {
    let tree = Tree::new();
    tree.process(4_194_303, 0, "VLLM::EngineCor", "none");
    let entry = "processes/4194303/0";
    tree.file(entry, File::Stat, "nr_submitted_kernels: 123456789012\n");
    tree.file(entry, File::Max, "30000 100000\n");
    tree.process(4_194_302, 0, "client", "none");
    let reason = "none its channels are in its MPS server's group: the server's entry acts on all";
    tree.enforcers(4_194_302, 0, [reason, reason, "signal"]);
    let told = tree.told(&["ls"]);
    for line in told.lines() {
        assert!(line.chars().count() <= 80, "{line:?}");
    }
    for part in ["4194303", "VLLM::", "throttled", "123456789012"] {
        assert!(told.contains(part), "{part} is missing in\n{told}");
    }
    for note in ["\nchannel-window: ", "\nLAUNCHES: ", "\nnone (4194302): "] {
        assert!(told.contains(note), "{note:?} is missing in\n{told}");
    }
    let told = tree.told(&["ls", "--long"]);
    assert!(told.contains("VLLM::EngineCor "), "{told}");
    assert!(told.contains("30000/100000"), "{told}");
}

#[test]
fn ls_of_nobody_is_a_heading() {
    let tree = Tree::new();
    for pid in ["77", "1234"] {
        fs::remove_dir_all(tree.root.path().join("processes").join(pid)).expect("it was there");
    }
    let told = tree.told(&["ls"]);
    assert!(told.starts_with("PID  GPU"), "{told}");
    assert_eq!(told.lines().count(), 1, "{told}");
    assert_eq!(tree.json(&["ls", "--json"]), json!([]));
}

#[test]
fn ls_for_programs_has_stable_keys() {
    let told = Tree::new().json(&["ls", "--json"]);
    assert_eq!(
        told[1],
        json!({
            "pid": 1234, "gpu": 0, "name": "noisy", "comm": "gcgroupd", "uid": 0, "user": "root",
            "cgroup": "/user.slice", "partition": "a", "sm_count": 64, "priority": 8,
            "frozen": 0, "max": "max 100000", "memory_current": 8_589_934_592_u64,
            "memory_peak": 8_589_934_592_u64, "nr_submitted_kernels": 10,
            "nr_graph_launches": null, "nr_ended_kernels": 9, "usage_usec": 4500,
            "state": "running",
            "enforcers": {
                File::Freeze.name(): "worker", File::Max.name(): "worker",
                File::Kill.name(): "worker",
            },
            "events": {"populated": 1, "frozen": 0, "held": 0, "pending": 0},
        })
    );
    assert_eq!(told[0]["name"], Value::Null);
}

#[test]
fn ls_leaves_out_a_process_that_ended_meanwhile() {
    let tree = Tree::new();
    fs::remove_file(tree.path("processes/77/0", File::Events)).expect("it was there");
    let told = tree.json(&["ls", "--json"]);
    assert_eq!(told.as_array().map(Vec::len), Some(1));
}

#[test]
fn one_target_is_frozen_through_its_own_file_and_several_in_one_step() {
    let tree = Tree::new();
    tree.told(&["freeze", "noisy"]);
    assert_eq!(tree.content("processes/1234/0", File::Freeze), "1\n");
    assert_eq!(tree.content("", File::FreezeMany), "");
    tree.told(&["freeze", "noisy", "77", "1234"]);
    assert_eq!(tree.content("", File::FreezeMany), "1 1234 77");
    tree.told(&["thaw", "77/0", "noisy"]);
    assert_eq!(tree.content("", File::FreezeMany), "0 77 1234");
}

#[test]
fn a_process_on_two_gpus_is_frozen_whole_or_on_the_one_named() {
    let tree = Tree::new();
    tree.process(77, 1, "python", "none");
    tree.told(&["freeze", "77"]);
    assert_eq!(tree.content("", File::FreezeMany), "1 77");
    tree.told(&["freeze", "77/1"]);
    assert_eq!(tree.content("processes/77/1", File::Freeze), "1\n");
    let told = tree.refusal(1, &["freeze", "77/1", "noisy"]);
    assert!(told.contains("77"), "{told}");
}

#[test]
fn kill_ends_what_it_can_and_reports_the_rest() {
    let tree = Tree::new();
    let output = tree.run(&["kill", "absent", "noisy", "missing", "--json"]);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(tree.content("processes/1234/0", File::Kill), "1");
    let killed: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(killed, json!({"killed": [1234]}));
    let told = String::from_utf8(output.stderr).expect("text");
    for missing in ["absent", "missing", "2 of 3"] {
        assert!(told.contains(missing), "{told}");
    }
}

#[test]
fn a_control_group_is_frozen_with_those_below_it_in_one_step() {
    let tree = Tree::new();
    tree.file("processes/77", File::Cgroup, "/a.slice/job\n");
    tree.process(78, 0, "python", "none");
    tree.process(78, 1, "python", "none");
    tree.file("processes/78", File::Cgroup, "/a.slice\n");
    tree.process(79, 0, "other", "none");
    tree.file("processes/79", File::Cgroup, "/a.slice2\n");
    for path in ["/a.slice", "/sys/fs/cgroup/a.slice/"] {
        tree.file("", File::FreezeMany, "");
        let told = tree.told(&["freeze", "--cgroup", path]);
        assert_eq!(tree.content("", File::FreezeMany), "1 77 78");
        assert_eq!(told, "froze 2 processes\n");
    }
    tree.file("", File::FreezeMany, "");
    let told = tree.told(&["thaw", "--cgroup", "/a.slice2"]);
    assert_eq!(tree.content("", File::FreezeMany), "0 79");
    assert_eq!(told, "thawed 1 process\n");
    tree.file("", File::FreezeMany, "");
    let words = ["--cgroup", "/a.slice/job", "noisy", "--cgroup", "/a.slice2"];
    let told = tree.json(&[&["freeze", "--json"], &words[..]].concat());
    assert_eq!(told, json!({"frozen": 1, "pids": [1234, 77, 79]}));
    assert_eq!(tree.content("", File::FreezeMany), "1 1234 77 79");
}

/// A shell with a child that sleeps, and the pid of that.
struct Family {
    shell: Child,
    sleeper: u32,
}

impl Family {
    fn new() -> Self {
        let mut shell = Command::new("sh")
            // The child ends with the pipe, whose other end the test holds; a shell
            // gives one in the background nothing to read unless it is told to.
            .args(["-c", "exec 3<&0; cat <&3 >/dev/null & echo $!; wait"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a shell");
        let mut line = String::new();
        BufReader::new(shell.stdout.take().expect("a pipe"))
            .read_line(&mut line)
            .expect("the shell tells the pid");
        let sleeper = line.trim().parse().expect("a pid");
        Self { shell, sleeper }
    }
}

impl Drop for Family {
    fn drop(&mut self) {
        drop(self.shell.stdin.take());
        // It has ended by itself, or the test has failed already.
        let _ = self.shell.wait();
    }
}

#[test]
fn a_tree_is_frozen_with_those_who_descend_from_it() {
    let tree = Tree::new();
    let family = Family::new();
    let (shell, sleeper) = (family.shell.id(), family.sleeper);
    tree.process(sleeper, 0, "worker", "none");
    tree.told(&["freeze", "--tree", &shell.to_string()]);
    assert_eq!(tree.content("", File::FreezeMany), format!("1 {sleeper}"));
    tree.process(shell, 0, "parent", "none");
    tree.file("", File::FreezeMany, "");
    let own = std::process::id().to_string();
    let mut both = [shell, sleeper];
    both.sort_unstable();
    let told = tree.json(&["freeze", "--json", "--tree", &own]);
    assert_eq!(told, json!({"frozen": 1, "pids": both}));
    tree.file("", File::FreezeMany, "");
    let words = [&sleeper.to_string(), "--tree", &shell.to_string(), "77"];
    let told = tree.json(&[&["thaw", "--json"], &words[..]].concat());
    let others = both.into_iter().filter(|pid| *pid != sleeper);
    let expected: Vec<u32> = [sleeper, 77].into_iter().chain(others).collect();
    assert_eq!(told, json!({"frozen": 0, "pids": expected}));
}

#[test]
fn a_selection_that_finds_nothing_changes_nothing_and_says_why() {
    let tree = Tree::new();
    let told = tree.refusal(1, &["freeze", "77", "--cgroup", "/nobody"]);
    for part in ["/nobody", "/user.slice"] {
        assert!(told.contains(part), "{told}");
    }
    let own = std::process::id().to_string();
    let told = tree.refusal(1, &["freeze", "--cgroup", "/", "--tree", &own]);
    assert!(told.contains(&own) && told.contains("--cgroup"), "{told}");
    // Above the kernel's greatest pid.
    let told = tree.refusal(1, &["thaw", "--tree", "4194305"]);
    assert_eq!(told, "gcgroup: there is no process 4194305\n");
    let told = tree.refusal(1, &["freeze", "--cgroup", "/nobody", "--json"]);
    assert!(told.starts_with("{\"errno\":null,"), "{told}");
    assert_eq!(tree.content("", File::FreezeMany), "");
    assert_eq!(tree.content("processes/77/0", File::Freeze), "0\n");
}
