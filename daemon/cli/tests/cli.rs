//! The program from outside, on a directory that is laid out as the mount is.
//!
//! A plain directory answers reads as the service does. Writes to it succeed
//! whatever they are, so refusals come from what the kernel refuses by itself.

use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use gcgroup_model::File;
use serde_json::{Value, json};

/// A tree with one GPU, one partition, a workload and another process.
struct Tree {
    root: tempfile::TempDir,
}

impl Tree {
    fn new() -> Self {
        let tree = Self {
            root: tempfile::tempdir().expect("a temporary directory"),
        };
        tree.file("", File::Version, "0.1.0\n");
        tree.file("", File::FreezeMany, "");
        tree.file("", File::Launch, "");
        tree.file("devices/0", File::GpuName, "NVIDIA H200\n");
        tree.file("devices/0", File::SmCapacity, "132\n");
        tree.file("partitions/0/a", File::SmCount, "64\n");
        tree.file("partitions/0/a", File::SmGroups, "0 1 2 3 4 5 6 7\n");
        tree.file("partitions/0/a", File::PartitionMembers, "1234\n");
        tree.process(1234, 0, "gcgroupd", "a");
        tree.process(77, 0, "python", "none");
        tree.file("processes/1234/0", File::WorkloadSpec, "{\"gpu\":0}\n");
        tree.file(
            "processes/1234/0",
            File::Stat,
            "nr_submitted_kernels: 10\nnr_ended_kernels: 9\nusage_usec: 4500\nsm_count: 64\n",
        );
        fs::create_dir(tree.root.path().join("workloads")).expect("a directory");
        symlink(
            "../processes/1234/0",
            tree.root.path().join("workloads/noisy"),
        )
        .expect("a link");
        tree
    }

    fn process(&self, pid: u32, gpu: u32, comm: &str, partition: &str) {
        let process = format!("processes/{pid}");
        self.file(&process, File::Comm, &format!("{comm}\n"));
        self.file(&process, File::Uid, "1000\n");
        self.file(&process, File::Cgroup, "/user.slice\n");
        let entry = format!("{process}/{gpu}");
        self.file(&entry, File::MemoryCurrent, "8589934592\n");
        self.file(&entry, File::MemoryPeak, "8589934592\n");
        self.file(&entry, File::Priority, "8\n");
        self.file(&entry, File::Freeze, "0\n");
        self.file(&entry, File::Max, "max 100000\n");
        self.file(&entry, File::Partition, &format!("{partition}\n"));
        self.file(&entry, File::Stat, "");
        self.file(
            &entry,
            File::Events,
            "populated 1\nfrozen 0\nheld 0\npending 0\n",
        );
        self.file(&entry, File::Kill, "");
    }

    fn path(&self, directory: &str, file: File) -> PathBuf {
        self.root.path().join(directory).join(file.name())
    }

    fn file(&self, directory: &str, file: File, content: &str) {
        let path = self.path(directory, file);
        fs::create_dir_all(path.parent().expect("a parent")).expect("a directory");
        fs::write(path, content).expect("a file");
    }

    fn content(&self, directory: &str, file: File) -> String {
        fs::read_to_string(self.path(directory, file)).expect("a file")
    }

    /// Runs the program on this tree.
    fn run(&self, words: &[&str]) -> Output {
        gcgroup(self.root.path(), words)
    }

    /// Standard output of a run that must succeed.
    fn told(&self, words: &[&str]) -> String {
        let output = self.run(words);
        assert!(output.status.success(), "{words:?}: {output:?}");
        String::from_utf8(output.stdout).expect("text")
    }

    fn json(&self, words: &[&str]) -> Value {
        serde_json::from_str(&self.told(words)).expect("one JSON document")
    }

    /// Standard error of a run that must fail with `status`.
    fn refusal(&self, status: i32, words: &[&str]) -> String {
        let output = self.run(words);
        assert_eq!(output.status.code(), Some(status), "{words:?}: {output:?}");
        assert!(output.stdout.is_empty(), "{output:?}");
        String::from_utf8(output.stderr).expect("text")
    }
}

fn gcgroup(root: &Path, words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_gcgroup"))
        .arg("--root")
        .arg(root)
        .args(words)
        .stdin(Stdio::null())
        .output()
        .expect("the program starts")
}

#[test]
fn ls_shows_a_line_for_each_process_by_pid() {
    let told = Tree::new().told(&["ls"]);
    let lines: Vec<Vec<&str>> = told
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    assert_eq!(
        lines,
        [
            vec![
                "PID",
                "GPU",
                "NAME",
                "PARTITION",
                "SMS",
                "PRIORITY",
                "FROZEN",
                "MAX",
                "MEMORY",
                "KERNELS"
            ],
            vec![
                "77", "0", "python", "none", "-", "8", "0", "max", "8.0G", "-"
            ],
            vec![
                "1234", "0", "noisy", "a", "64", "8", "0", "max", "8.0G", "9"
            ],
        ]
    );
}

#[test]
fn ls_for_programs_has_stable_keys() {
    let told = Tree::new().json(&["ls", "--json"]);
    assert_eq!(
        told[1],
        json!({
            "pid": 1234, "gpu": 0, "name": "noisy", "comm": "gcgroupd", "uid": 1000,
            "cgroup": "/user.slice", "partition": "a", "sm_count": 64, "priority": 8,
            "frozen": 0, "max": "max 100000", "memory_current": 8_589_934_592_u64,
            "memory_peak": 8_589_934_592_u64, "nr_ended_kernels": 9, "usage_usec": 4500,
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
fn get_takes_pids_names_and_paths_for_the_same_directory() {
    let tree = Tree::new();
    let whole = tree.root.path().join("processes/1234/0");
    for target in [
        "1234",
        "1234/0",
        "noisy",
        "workloads/noisy",
        "processes/1234",
        "processes/1234/0/",
        whole.to_str().expect("a plain path"),
    ] {
        let told = tree.told(&["get", target, File::Partition.name()]);
        assert_eq!(told, "a\n", "{target}");
        let told = tree.told(&["get", target, File::Comm.name()]);
        assert_eq!(told, "gcgroupd\n", "{target}");
    }
}

#[test]
fn get_without_files_shows_all_that_can_be_read() {
    let told = Tree::new().json(&["get", "noisy", "--json"]);
    assert_eq!(told[File::Priority.name()], json!(8));
    assert_eq!(told[File::Comm.name()], json!("gcgroupd"));
    assert_eq!(told[File::Stat.name()]["usage_usec"], json!(4500));
    assert_eq!(told[File::WorkloadSpec.name()], json!({"gpu": 0}));
    assert_eq!(told.get(File::Kill.name()), None);
}

#[test]
fn get_shows_several_files_under_their_names() {
    let told = Tree::new().told(&["get", "1234", File::Freeze.name(), File::Events.name()]);
    assert_eq!(
        told,
        format!(
            "{}: 0\n{}:\n  populated 1\n  frozen 0\n  held 0\n  pending 0\n",
            File::Freeze.name(),
            File::Events.name()
        )
    );
}

#[test]
fn get_reads_gpus_partitions_and_the_root() {
    let tree = Tree::new();
    let told = |target, file: File| tree.told(&["get", target, file.name()]);
    assert_eq!(told("devices/0", File::SmCapacity), "132\n");
    assert_eq!(told("partitions/0/a", File::SmCount), "64\n");
    assert_eq!(told("/", File::Version), "0.1.0\n");
}

#[test]
fn a_process_on_two_gpus_needs_one_of_them_named() {
    let tree = Tree::new();
    tree.process(77, 1, "python", "none");
    let file = File::Priority.name();
    let told = tree.refusal(1, &["get", "77", file]);
    assert!(told.contains("77/0, 77/1"), "{told}");
    assert_eq!(tree.told(&["get", "77/1", file]), "8\n");
    assert_eq!(tree.told(&["get", "77", File::Comm.name()]), "python\n");
}

#[test]
fn set_writes_the_words_joined_by_one_space() {
    let tree = Tree::new();
    tree.told(&["set", "noisy", File::Max.name(), "20000", "1000000"]);
    assert_eq!(tree.content("processes/1234/0", File::Max), "20000 1000000");
    let told = tree.json(&["set", "noisy", File::Max.name(), "max 1000000000", "--json"]);
    assert_eq!(told["written"], "max 1000000000");
    assert_eq!(told["value"], "max 1000000000");
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
fn launch_sends_one_object_and_prints_the_answer_behind_it() {
    let tree = Tree::new();
    let spec = r#"{"bytes":"8G","kernel":"copy","name":"noisy2"}"#;
    let answer = r#"{"pid":1,"gpu":0,"name":"noisy2"}"#;
    // The program writes over the first part and goes on reading behind it, as
    // on the service's file.
    tree.file(
        "",
        File::Launch,
        &format!("{}{answer}\n", " ".repeat(spec.len())),
    );
    let words = [
        "launch", "--kernel", "copy", "--name", "noisy2", "--bytes", "8G",
    ];
    let told = tree.json(&words);
    assert_eq!(told, json!({"pid": 1, "gpu": 0, "name": "noisy2"}));
    let sent = tree.content("", File::Launch);
    let sent: Value = serde_json::from_str(&sent[..spec.len()]).expect("one object");
    assert_eq!(
        sent,
        json!({"bytes": "8G", "kernel": "copy", "name": "noisy2"})
    );
}

#[test]
fn a_launch_that_is_refused_names_the_field() {
    let tree = Tree::new();
    let spec = r#"{"ilp":9,"kernel":"copy"}"#;
    let answer = r#"{"error":"must be from 1 to 4","field":"ilp"}"#;
    tree.file(
        "",
        File::Launch,
        &format!("{}{answer}\n", " ".repeat(spec.len())),
    );
    let told = tree.refusal(1, &["launch", "--kernel", "copy", "--ilp", "9"]);
    assert_eq!(told, "gcgroup: not launched: ilp: must be from 1 to 4\n");
}

#[test]
fn a_whole_spec_comes_from_standard_input() {
    let tree = Tree::new();
    let mut child = Command::new(env!("CARGO_BIN_EXE_gcgroup"))
        .env("GCGROUP_ROOT", tree.root.path())
        .args(["launch", "--json", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    let mut stdin = child.stdin.take().expect("a pipe");
    stdin
        .write_all(b"{\"kernel\":\n\"sleep\"}\n")
        .expect("the program reads");
    drop(stdin);
    let output = child.wait_with_output().expect("the program ends");
    // A plain file takes the spec and has no answer.
    assert_eq!(output.status.code(), Some(1));
    let told = String::from_utf8(output.stderr).expect("text");
    assert!(told.contains("no answer"), "{told}");
    assert_eq!(tree.content("", File::Launch), "{\"kernel\":\n\"sleep\"}");
}

#[test]
fn partitions_are_listed_with_their_members() {
    let tree = Tree::new();
    let told = tree.told(&["partition", "ls"]);
    let lines: Vec<&str> = told.lines().map(str::trim).collect();
    assert_eq!(lines, ["GPU  NAME  SMS  MEMBERS", "0  a      64  1234"]);
    assert_eq!(
        tree.json(&["partition", "ls", "--json"]),
        json!([{"gpu": 0, "name": "a", "sm_count": 64,
                "sm_groups": [0, 1, 2, 3, 4, 5, 6, 7], "members": [1234]}])
    );
}

#[test]
fn partitions_are_resized_and_taken_names_refused() {
    let tree = Tree::new();
    let told = tree.told(&["partition", "resize", "a", "32"]);
    assert_eq!(told, "0/a: 32 SMs\n");
    let told = tree.refusal(1, &["partition", "create", "0/a", "8"]);
    assert!(told.contains("exists already"), "{told}");
    let told = tree.refusal(1, &["partition", "create", "5/a"]);
    assert!(told.contains("no such GPU"), "{told}");
    let told = tree.refusal(1, &["partition", "remove", "b"]);
    assert!(told.contains("no such partition"), "{told}");
}

#[test]
fn a_partition_that_gets_no_sms_is_not_left_behind() {
    let tree = Tree::new();
    // A plain directory has no file for the count, so that step fails.
    tree.refusal(1, &["partition", "create", "b", "8"]);
    assert!(!tree.root.path().join("partitions/0/b").exists());
    tree.run(&["partition", "create", "b"]);
    assert!(tree.root.path().join("partitions/0/b").exists());
}

#[test]
fn without_a_service_every_command_says_how_to_start_it() {
    let empty = tempfile::tempdir().expect("a temporary directory");
    for words in [
        &["ls"][..],
        &["get", "1"],
        &["freeze", "1", "2"],
        &["launch", "--kernel", "copy"],
        &["partition", "ls"],
    ] {
        let output = gcgroup(empty.path(), words);
        assert_eq!(output.status.code(), Some(1), "{words:?}");
        let told = String::from_utf8(output.stderr).expect("text");
        for part in ["is not running", "systemctl start gcgroupd", "--root"] {
            assert!(told.contains(part), "{told}");
        }
    }
}

#[test]
fn a_refusal_names_the_file_and_what_is_allowed() {
    let tree = Tree::new();
    let told = tree.refusal(1, &["get", "noisy", "no.such.file"]);
    assert!(told.contains(File::Freeze.name()), "{told}");
    let told = tree.refusal(1, &["set", "noisy", File::Stat.name(), "1"]);
    assert!(told.contains("can only be read"), "{told}");
    let told = tree.refusal(1, &["get", "noisy", File::Kill.name()]);
    assert!(told.contains("can only be written"), "{told}");
    let told = tree.refusal(1, &["get", "quiet", File::Freeze.name()]);
    assert!(told.contains("noisy"), "{told}");
    let told = tree.refusal(1, &["get", "77", File::WorkloadSpec.name()]);
    assert!(told.contains("launched"), "{told}");
}

#[test]
fn an_errno_of_the_write_becomes_a_sentence() {
    let tree = Tree::new();
    let path = tree.path("partitions/0/a", File::SmCount);
    fs::remove_file(&path).expect("it was there");
    // The one plain file whose writes the kernel refuses, with ENOSPC.
    symlink("/dev/full", &path).expect("a link");
    let words = ["set", "partitions/0/a", File::SmCount.name(), "64"];
    let told = tree.refusal(1, &words);
    assert_eq!(
        told,
        format!(
            "gcgroup: {}: not so many SMs are free; 'max' takes what is\n",
            path.display()
        )
    );
    let told = tree.refusal(1, &[&words[..], &["--json"]].concat());
    let told: Value = serde_json::from_str(&told).expect("JSON");
    assert_eq!(told["file"], json!(path));
    assert_eq!(told["errno"], json!(28));
}

#[test]
fn wrong_arguments_are_usage_errors() {
    let tree = Tree::new();
    for words in [
        &["fly"][..],
        &["set", "noisy"],
        &["freeze"],
        &["launch", "--no-such-field", "1"],
        &["launch", "--threads", "many"],
        &["launch", "--json", "-", "--kernel", "copy"],
    ] {
        tree.refusal(2, words);
    }
}

#[test]
fn a_reader_that_leaves_early_is_not_an_error() {
    let tree = Tree::new();
    for pid in 2000..2400 {
        tree.process(pid, 0, "many", "none");
    }
    let mut child = Command::new(env!("CARGO_BIN_EXE_gcgroup"))
        .env("GCGROUP_ROOT", tree.root.path())
        .args(["ls", "--long"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    drop(child.stdout.take());
    let output = child.wait_with_output().expect("the program ends");
    assert!(output.status.success(), "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
}
