//! `gcgroupd doctor`, which looks at a host with no service to ask.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use gcgroup_integration_tests::file::names;
use gcgroup_integration_tests::{Setup, binary, process, wait};
use rustix::process::Signal;
use tempfile::TempDir;

/// For a trial on a busy machine: its own limits add up to about a minute.
const TRIED: Duration = Duration::from_secs(100);
/// For helpers of a process that has ended to notice and end too.
const ENDED: Duration = Duration::from_secs(20);

/// A place of its own for everything that the doctor could leave behind.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        let base = tempfile::Builder::new()
            .prefix("gcg")
            // Workers are somebody else and reach their GPU in here.
            .permissions(fs::Permissions::from_mode(0o755))
            .tempdir()
            .expect("the temporary directory is writable");
        let place = Self(base);
        fs::create_dir(place.temporary()).expect("the directory is ours");
        fs::write(place.configuration(), "").expect("the directory is ours");
        place
    }

    fn temporary(&self) -> PathBuf {
        self.0.path().join("t")
    }

    fn configuration(&self) -> PathBuf {
        self.0.path().join("gcgroupd.toml")
    }

    fn doctor(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(binary::gcgroupd());
        command
            .arg("doctor")
            .arg("--config")
            .arg(self.configuration())
            .arg("--state")
            .arg(self.0.path().join("s"))
            .arg("--mountpoint")
            .arg(self.0.path().join("m"))
            .args(arguments)
            .env("TMPDIR", self.temporary())
            .stdin(Stdio::null());
        command
    }

    /// Nothing is here but what the test put here, mounted or not.
    #[track_caller]
    fn is_as_it_was(&self) {
        assert_eq!(names(&self.temporary()), Vec::<String>::new());
        assert_eq!(names(self.0.path()), ["gcgroupd.toml", "t"]);
        let table = fs::read_to_string("/proc/self/mountinfo").expect("/proc is mounted");
        let own = self.0.path().to_str().expect("ASCII");
        assert!(!table.contains(own), "{table}");
    }
}

/// Runs to its end; also the helpers that it was seen to have.
#[track_caller]
fn watched(mut command: Command) -> (Output, BTreeSet<u32>) {
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the doctor starts");
    let helpers = follow(&mut child, |_| false);
    let output = child.wait_with_output().expect("it is our child");
    (output, helpers)
}

/// Watches until it has ended or what it has for helpers is `enough`. It writes
/// less than a pipe holds.
#[track_caller]
fn follow(child: &mut Child, enough: impl Fn(&BTreeSet<u32>) -> bool) -> BTreeSet<u32> {
    let mut helpers = BTreeSet::new();
    wait::until(TRIED, "the doctor's end", || {
        helpers.extend(process::children(child.id()));
        enough(&helpers) || child.try_wait().expect("it is our child").is_some()
    });
    helpers
}

#[track_caller]
fn have_ended(helpers: &BTreeSet<u32>) {
    wait::until(ENDED, "the doctor's helpers end", || {
        helpers.iter().all(|pid| !process::is_running(*pid))
    });
}

/// Mark, thing and finding of each line, without advice.
fn findings(output: &Output) -> Vec<(String, String, String)> {
    let text = String::from_utf8(output.stdout.clone()).expect("text");
    let lines = text.lines().filter(|line| !line.starts_with(' '));
    let findings = lines.map(|line| {
        // The marks have 6 columns and the things 16.
        let (mark, rest) = line.split_at(6);
        let (thing, found) = rest.split_at(16);
        let [mark, thing, found] = [mark, thing, found].map(|part| part.trim().to_owned());
        (mark, thing, found)
    });
    findings.collect()
}

#[track_caller]
fn mark_of(output: &Output, thing: &str) -> String {
    let findings = findings(output);
    let found = findings.iter().find(|(_, name, _)| name == thing);
    let (mark, _, _) = found.unwrap_or_else(|| panic!("no {thing:?} in {findings:?}"));
    mark.clone()
}

/// The exit status says whether something is missing, and advice stands below
/// what is.
#[track_caller]
fn is_consistent(output: &Output) {
    let lacks = findings(output).iter().any(|(mark, ..)| mark == "LACKS");
    assert_eq!(output.status.code(), Some(i32::from(lacks)), "{output:?}");
    let text = String::from_utf8_lossy(&output.stdout);
    let lines: Vec<_> = text.lines().collect();
    for (at, line) in lines.iter().enumerate() {
        let followed = lines
            .get(at + 1)
            .is_some_and(|next| next.starts_with("      "));
        assert_eq!(
            line.starts_with("LACKS"),
            followed && !line.starts_with(' '),
            "{text}"
        );
    }
}

#[test]
fn everything_is_looked_at_and_nothing_is_left_behind() {
    let place = Place::new();
    let (output, helpers) = watched(place.doctor(&["--sim=2"]));
    is_consistent(&output);
    let findings = findings(&output);
    let things: Vec<_> = findings
        .iter()
        .map(|(_, thing, _)| thing.as_str())
        .collect();
    assert_eq!(
        things,
        [
            "root",
            "fuse",
            "yama",
            "lockdown",
            "pidfd_getfd",
            "launch counts",
            "driver",
            "mps",
            "checkpoint",
            "gpu 0",
            "gpu 0 channels",
            "gpu 1",
            "gpu 1 channels"
        ]
    );
    for thing in [
        "root",
        "fuse",
        "pidfd_getfd",
        "driver",
        "mps",
        "gpu 0",
        "gpu 1",
    ] {
        assert_eq!(mark_of(&output, thing), "ok", "{output:?}");
    }
    // The trial has looked, and says what it saw.
    for gpu in ["gpu 0 channels", "gpu 1 channels"] {
        let found = findings.iter().find(|(_, thing, _)| thing == gpu);
        let (mark, _, saw) = found.expect("it is in the list");
        assert!(mark == "ok" && saw.contains("stopped"), "{findings:?}");
    }
    assert_eq!(mark_of(&output, "launch counts"), "-");
    // The simulated GPU, and for each trial a guardian and two workers.
    assert!(helpers.len() >= 7, "{helpers:?}");
    have_ended(&helpers);
    place.is_as_it_was();
}

#[test]
fn a_quick_look_leaves_the_trial_out() {
    let place = Place::new();
    let (output, helpers) = watched(place.doctor(&["--sim", "--quick"]));
    is_consistent(&output);
    let findings = findings(&output);
    let trial = findings.last().expect("it has lines");
    assert_eq!(
        (trial.0.as_str(), trial.1.as_str()),
        ("-", "gpu 0 channels")
    );
    assert!(trial.2.contains("--quick"), "{trial:?}");
    assert_eq!(mark_of(&output, "gpu 0"), "ok");
    have_ended(&helpers);
    place.is_as_it_was();
}

#[test]
fn without_a_driver_it_says_what_to_do() {
    for path in ["/proc/driver/nvidia/version", "/dev/nvidiactl"] {
        if Path::new(path).exists() {
            return println!("skipped: {path} says that there is a driver");
        }
    }
    let place = Place::new();
    let (output, helpers) = watched(place.doctor(&[]));
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    is_consistent(&output);
    assert_eq!(mark_of(&output, "driver"), "LACKS");
    assert_eq!(mark_of(&output, "mps"), "-");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("install NVIDIA's driver"), "{text}");
    assert!(!text.contains("gpu 0"), "{text}");
    assert_eq!(helpers, BTreeSet::new());
    place.is_as_it_was();
}

#[test]
fn beside_a_running_service_it_touches_nothing_of_it() {
    let instance = Setup::new().attach().start();
    let mut app = instance.app();
    let frozen = instance.app();
    instance.set(frozen.file("compute.freeze"), "1");
    // What was set is remembered a moment later.
    wait::until(ENDED, "the settings are written", || {
        instance.state().join("settings.json").exists()
    });
    let before = (instance.text("processes/list"), names(&instance.state()));
    let place = Place::new();
    let mut others = place.doctor(&["--sim"]);
    // The service's own directories are what a user's configuration names.
    let mut same = instance.gcgroupd("doctor");
    same.env("TMPDIR", place.temporary());
    same.arg("--config").arg(instance.configuration());
    same.arg("--mountpoint").arg(instance.root());
    others.env("GCGROUP_INSTANCE", instance.base());
    for command in [others, same] {
        let (output, helpers) = watched(command);
        is_consistent(&output);
        assert_eq!(mark_of(&output, "gpu 0 channels"), "ok", "{output:?}");
        have_ended(&helpers);
        assert!(instance.is_stopped(frozen.pid()));
        assert!(!instance.is_stopped(app.pid()));
        assert!(app.progresses());
        wait::until(ENDED, "the service's lists are as they were", || {
            (instance.text("processes/list"), names(&instance.state())) == before
        });
        instance.set(app.file("compute.freeze"), "1");
        instance.set(app.file("compute.freeze"), "0");
        place.is_as_it_was();
    }
}

/// A doctor whose trial has begun, with its helpers: the simulated GPU, a
/// guardian and both workers.
#[track_caller]
fn at_its_trial(place: &Place) -> (Child, BTreeSet<u32>) {
    let mut child = place
        .doctor(&["--sim"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the doctor starts");
    let helpers = follow(&mut child, |helpers| helpers.len() >= 4);
    assert!(helpers.len() >= 4, "it is over already: {helpers:?}");
    (child, helpers)
}

#[test]
fn a_doctor_that_is_killed_leaves_no_process_behind() {
    let place = Place::new();
    let (mut child, helpers) = at_its_trial(&place);
    child.kill().expect("it is our child");
    child.wait().expect("it is our child");
    have_ended(&helpers);
}

#[test]
fn a_doctor_that_is_interrupted_cleans_up() {
    for signal in [Signal::INT, Signal::TERM] {
        let place = Place::new();
        let (child, helpers) = at_its_trial(&place);
        process::signal(child.id(), signal);
        let output = child.wait_with_output().expect("it is our child");
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(text.contains("interrupted"), "{text}");
        have_ended(&helpers);
        place.is_as_it_was();
    }
}

#[test]
fn a_reader_that_goes_away_ends_it_quietly() {
    let place = Place::new();
    let mut child = place
        .doctor(&["--sim", "--quick"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the doctor starts");
    drop(child.stdout.take());
    let output = child.wait_with_output().expect("it is our child");
    // Something may be missing here, and something may have been read.
    assert!(matches!(output.status.code(), Some(0 | 1)), "{output:?}");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(
        !text.contains("panicked") && !text.contains("Broken pipe"),
        "{text}"
    );
    place.is_as_it_was();
}

#[test]
fn a_wrong_configuration_is_told_before_anything_is_looked_at() {
    let place = Place::new();
    let output = place.doctor(&["--sim=99"]).output().expect("it starts");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(output.stdout.is_empty(), "{output:?}");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("99") && text.contains("1 to 16"), "{text}");
    place.is_as_it_was();
}
