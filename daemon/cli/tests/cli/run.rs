//! `run`.

use std::fs::{self, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::{Command, Stdio};

use gcgroup_model::File;
use rustix::fs::{CWD, FileType, Mode, mknodat};

use crate::fixture::{Tree, gcgroup};

#[test]
fn each_setting_is_one_write_for_the_pid_that_the_program_gets() {
    let tree = Tree::new();
    let path = tree.path("", File::Pending);
    fs::remove_file(&path).expect("it was there");
    mknodat(CWD, &path, FileType::Fifo, Mode::RWXU, 0).expect("a FIFO");
    // Open for both, so that neither side waits for the other.
    let mut pending = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .expect("a FIFO");
    let child = Command::new(env!("CARGO_BIN_EXE_gcgroup"))
        .env("GCGROUP_ROOT", tree.root.path())
        .args([
            "run",
            "--max",
            "30000",
            "--freeze",
            "--priority",
            "12",
            "--",
        ])
        .args(["sh", "-c", "echo $$ $1; exit 3", "sh", "--json"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("the program starts");
    let pid = child.id();
    let output = child.wait_with_output().expect("the shell ends");
    assert_eq!(output.status.code(), Some(3));
    let told = String::from_utf8(output.stdout).expect("text");
    assert_eq!(told, format!("{pid} --json\n"));
    let expected: String = [
        (File::Priority, "12"),
        (File::Freeze, "1"),
        (File::Max, "30000 100000"),
    ]
    .map(|(file, value)| format!("{pid} {} {value}", file.name()))
    .concat();
    let mut written = vec![0; 4096];
    let length = pending.read(&mut written).expect("all is written");
    assert_eq!(String::from_utf8_lossy(&written[..length]), expected);
}

#[test]
fn a_program_without_settings_is_just_started() {
    let tree = Tree::new();
    assert_eq!(tree.told(&["run", "echo", "-n", "x"]), "x");
    assert_eq!(tree.content("", File::Pending), "");
}

#[test]
fn a_program_that_cannot_be_started_ends_as_in_a_shell() {
    let tree = Tree::new();
    let told = tree.refusal(127, &["run", "--freeze", "no-such-program"]);
    assert!(told.contains("\"no-such-program\" was not found"), "{told}");
    let path = tree.root.path().join("plain");
    fs::write(&path, "text").expect("a file");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("it is ours");
    let told = tree.refusal(126, &["run", path.to_str().expect("a plain path")]);
    assert!(told.contains("cannot be executed"), "{told}");
}

#[test]
fn nothing_is_started_before_every_setting_is_taken() {
    let tree = Tree::new();
    let mark = tree.root.path().join("mark");
    let touch = ["touch", mark.to_str().expect("a plain path")];
    // The arguments are wrong.
    let words = ["run", "--priority", "16", "--"];
    let told = tree.refusal(2, &[&words[..], &touch].concat());
    assert!(
        told.contains("\"16\"") && told.contains("0 to 15"),
        "{told}"
    );
    assert_eq!(tree.content("", File::Pending), "");
    let told = tree.refusal(2, &[&["run", "--max", "5", "--"][..], &touch].concat());
    assert!(told.contains("QUOTA"), "{told}");
    // The service refuses: the one plain file whose writes fail stands for it.
    let path = tree.path("", File::Pending);
    fs::remove_file(&path).expect("it was there");
    let words = [&["run", "--priority", "3", "--"][..], &touch].concat();
    let told = tree.refusal(1, &words);
    assert!(told.contains("older than this gcgroup"), "{told}");
    symlink("/dev/full", &path).expect("a link");
    let told = tree.refusal(1, &words);
    assert!(told.contains(File::Pending.name()), "{told}");
    // There is no service.
    let empty = tempfile::tempdir().expect("a temporary directory");
    let output = gcgroup(empty.path(), &words);
    assert_eq!(output.status.code(), Some(1));
    let told = String::from_utf8(output.stderr).expect("text");
    assert!(told.contains("systemctl start gcgroupd"), "{told}");
    assert!(!mark.exists());
    // And it would have been started.
    fs::remove_file(&path).expect("it was there");
    fs::write(&path, "").expect("a file");
    tree.told(&words);
    assert!(mark.exists());
}
