//! Flags and configuration of gcgroupd.

use std::fs;
use std::process::Output;

use gcgroup_integration_tests::{Instance, Setup, binary, process, wait};

/// Runs `gcgroupd serve` with this configuration, which must be refused, and
/// returns what it said.
fn refusal(text: &str, flags: &[&str]) -> String {
    let base = tempfile::tempdir().expect("the temporary directory is writable");
    let file = base.path().join("gcgroupd.toml");
    fs::write(&file, text).expect("the directory is ours");
    let output = std::process::Command::new(binary::gcgroupd())
        .arg("serve")
        .arg("--config")
        .arg(&file)
        .arg("--mountpoint")
        .arg(base.path().join("m"))
        .arg("--state")
        .arg(base.path().join("s"))
        .args(flags)
        .output()
        .expect("it starts");
    assert!(!process::is_mounted(&base.path().join("m")));
    said(&output)
}

fn said(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "it was taken: {text}");
    assert!(
        output.status.code().is_some_and(|code| code < 100),
        "it crashed: {text}"
    );
    text
}

#[track_caller]
fn says(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "{word:?} is missing in {text:?}");
    }
}

#[test]
fn a_wrong_value_is_named_with_its_key_and_what_is_allowed() {
    for (text, words) in [
        ("sim = 0", &["sim", "0", "1 to 16"][..]),
        ("sim = 17", &["sim", "17", "1 to 16"]),
        ("sim = \"many\"", &["sim", "many"]),
        (
            "sim = 1\nsharing = \"both\"",
            &["sharing", "both", "auto", "spatial", "temporal"],
        ),
        (
            "sim = 1\nmetrics = \"127.0.0.1:9\"",
            &["metrics", "127.0.0.1:9", "off"],
        ),
        (
            "sim = 1\nwritable_by_group = 1",
            &["writable_by_group", "1"],
        ),
        (
            "sim = 1\ngroup = \"nosuchgroup\"",
            &["group", "nosuchgroup"],
        ),
        (
            "sim = 1\nworker_user = \"nosuchuser\"",
            &["worker_user", "nosuchuser"],
        ),
        (
            "sim = 1\nworker_user = \"root\"",
            &["worker_user", "root", "unprivileged"],
        ),
        (
            "sim = 1\n[deadlines]\nsettings_ms = 1",
            &["deadlines.settings_ms", "10 to 3600000"],
        ),
        ("sim = 1\n[deadlines]\nlaunch_ms = -1", &["launch_ms", "-1"]),
        (
            "sim = 1\n[deadlines]\nstuck_ms = 4000000",
            &["deadlines.stuck_ms", "4000000"],
        ),
    ] {
        says(&refusal(text, &[]), words);
    }
}

#[test]
fn an_unknown_key_is_named() {
    for (text, words) in [
        (
            "sim = 1\nmount_point = \"/x\"",
            &["mount_point", "mountpoint"][..],
        ),
        (
            "sim = 1\n[deadlines]\nsettings = 5",
            &["settings", "settings_ms"],
        ),
        (
            "sim = 1\n[deadline]\nsettings_ms = 5",
            &["deadline", "deadlines"],
        ),
    ] {
        says(&refusal(text, &[]), words);
    }
}

#[test]
fn a_file_that_is_no_toml_or_not_there_is_named() {
    says(&refusal("sim = ", &[]), &["gcgroupd.toml"]);
    let output = std::process::Command::new(binary::gcgroupd())
        .args(["serve", "--config", "/nonexistent/gcgroupd.toml", "--sim"])
        .output()
        .expect("it starts");
    says(
        &said(&output),
        &["/nonexistent/gcgroupd.toml", "No such file"],
    );
}

#[test]
fn a_wrong_flag_is_named_with_what_is_allowed() {
    for (flag, words) in [
        ("--sim=0", &["sim", "0", "1 to 16"][..]),
        ("--sim=x", &["--sim", "x"]),
        ("--metrics=on", &["metrics", "on", "off"]),
        ("--mount=/x", &["--mount"]),
        ("--frobnicate", &["--frobnicate"]),
    ] {
        says(&refusal("sim = 1", &[flag]), words);
    }
}

#[test]
fn a_place_that_cannot_be_is_refused() {
    let base = tempfile::tempdir().expect("the temporary directory is writable");
    let below = base.path().join("m/s");
    let refused = |mountpoint: &std::path::Path, state: &std::path::Path| {
        let output = std::process::Command::new(binary::gcgroupd())
            .args(["serve", "--sim", "--mountpoint"])
            .arg(mountpoint)
            .arg("--state")
            .arg(state)
            .output()
            .expect("it starts");
        said(&output)
    };
    says(
        &refused(&base.path().join("m"), &below),
        &["state", "m/s", "mountpoint"],
    );
    says(
        &refused(std::path::Path::new("/"), &base.path().join("s")),
        &["mountpoint", "/"],
    );
    let file = base.path().join("file");
    fs::write(&file, "").expect("the directory is ours");
    says(
        &refused(&file, &base.path().join("s")),
        &["mountpoint", "file"],
    );
    says(&refused(&base.path().join("m"), &file), &["state", "file"]);
}

#[test]
fn every_key_of_the_file_is_in_force() {
    let base = tempfile::tempdir().expect("the temporary directory is writable");
    let (mount, state) = (base.path().join("m"), base.path().join("s"));
    let text = format!(
        "mountpoint = {mount:?}\nstate = {state:?}\nsim = 2\nmetrics = \"off\"\n\
         writable_by_group = true\ngroup = \"daemon\"\nworker_user = \"daemon\"\n\
         sharing = \"temporal\"\n\
         [deadlines]\nsettings_ms = 5000\nlaunch_ms = 30000\nstuck_ms = 60000\n"
    );
    let file = base.path().join("gcgroupd.toml");
    fs::write(&file, text).expect("the directory is ours");
    let mut child = std::process::Command::new(binary::gcgroupd())
        .arg("--config")
        .arg(&file)
        .stderr(std::process::Stdio::null())
        .spawn()
        .expect("it starts without a subcommand too");
    let gpus = ["devices/0", "devices/1"].map(|gpu| mount.join(gpu));
    let served = wait::becomes(std::time::Duration::from_secs(20), || {
        gpus.iter().all(|gpu| gpu.exists())
    });
    let enforcers = fs::read_to_string(mount.join("devices/0/gcgroup.enforcers"));
    process::signal(child.id(), rustix::process::Signal::TERM);
    let status = child.wait().expect("it is our child");
    assert!(served, "it did not come up");
    assert!(status.success(), "{status:?}");
    assert!(!enforcers.expect("it was served").is_empty());
    assert!(!process::is_mounted(&mount));
}

#[test]
fn workers_run_as_the_configured_user() {
    // `daemon` is user 1 on every Linux system.
    let instance = Setup::new().setting("worker_user", "\"daemon\"").start();
    let workload = instance.launch_fma();
    assert_eq!(
        instance.text(format!("processes/{}/uid", workload.pid)),
        "1"
    );
    let uid = process::status(workload.pid, "Uid").expect("it runs");
    assert!(uid.split_whitespace().all(|id| id == "1"), "{uid}");
}

#[test]
fn an_option_may_stand_in_the_file_and_a_flag_wins() {
    // The file says one GPU, the flag of the harness two.
    let instance = Setup::new().gpus(2).setting("sim", "1").start();
    assert_eq!(instance.names("devices"), ["0", "1"]);
}

#[test]
fn only_root_can_serve_and_is_told_so() {
    use gcgroup_integration_tests::identity::{NOBODY, acting_as};
    let instance = Instance::new();
    let readable = instance.base().join("gcgroupd");
    fs::copy(binary::gcgroupd(), &readable).expect("there is room");
    let output = acting_as(NOBODY, NOBODY, || {
        std::process::Command::new(&readable)
            .args([
                "serve",
                "--sim",
                "--state",
                "/tmp/nosuch/s",
                "--mountpoint",
                "/tmp/nosuch/m",
            ])
            .output()
            .expect("it starts")
    });
    says(&said(&output), &["root"]);
}

#[test]
fn versions_are_the_same() {
    let version = |path: std::path::PathBuf| {
        let output = std::process::Command::new(path)
            .arg("--version")
            .output()
            .expect("it starts");
        assert!(output.status.success());
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let (service, cli) = (version(binary::gcgroupd()), version(binary::gcgroup()));
    assert!(service.starts_with("gcgroupd ") && cli.starts_with("gcgroup "));
    assert_eq!(service.split(' ').nth(1), cli.split(' ').nth(1));
}
