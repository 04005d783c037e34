//! The program from outside, on a directory that is laid out as the mount is.

mod fixture;
mod process;
mod run;

use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::process::{Command, Stdio};

use gcgroup_model::File;
use serde_json::{Value, json};

use fixture::{Tree, gcgroup};

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
fn a_process_without_a_directory_is_told_from_one_that_is_not_there() {
    let tree = Tree::new();
    let own = std::process::id().to_string();
    let file = File::Priority.name();
    for target in [own.clone(), format!("{own}/0"), format!("processes/{own}")] {
        let told = tree.refusal(1, &["get", &target, file]);
        for part in ["no GPU context", File::Pending.name(), &own] {
            assert!(told.contains(part), "{told}");
        }
    }
    // Above the kernel's greatest pid.
    let told = tree.refusal(1, &["get", "4194305", file]);
    assert_eq!(told, "gcgroup: there is no process 4194305\n");
    let told = tree.refusal(1, &["set", "77/1", file, "3"]);
    assert!(told.contains("77/0"), "{told}");
    let told = tree.refusal(1, &["get", "quiet", file]);
    assert!(told.contains("\"quiet\""), "{told}");
}

#[test]
fn what_waits_is_read_and_written_as_other_files_are() {
    let tree = Tree::new();
    let file = File::Pending.name();
    let waits = format!(
        "5 {} 3\n6 {} 1\n",
        File::Priority.name(),
        File::Freeze.name()
    );
    tree.file("", File::Pending, &waits);
    assert_eq!(tree.told(&["get", "/", file]), waits);
    let lines: Vec<&str> = waits.lines().collect();
    assert_eq!(
        tree.json(&["get", "/", file, "--json"]),
        json!({file: lines})
    );
    tree.file("", File::Pending, "");
    tree.told(&["set", "/", file, "5", File::Max.name(), "30000", "100000"]);
    assert_eq!(
        tree.content("", File::Pending),
        format!("5 {} 30000 100000", File::Max.name())
    );
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
        &["thaw", "--cgroup", "/"],
        &["run", "true"],
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
