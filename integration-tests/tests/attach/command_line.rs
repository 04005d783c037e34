//! `gcgroup` and the programs of somebody else: trees, control groups, settings
//! that wait, and what it shows of them.

mod run;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use gcgroup_device_sim::{Effect, Failure, Operation, Refused, Scope};
use gcgroup_integration_tests::command::{ok, run};
use gcgroup_integration_tests::{App, Instance, Setup, process, wait};
use serde_json::{Value, json};

const SECOND: Duration = Duration::from_secs(1);
/// For anything that programs of a busy machine must have done.
const DONE: Duration = Duration::from_secs(20);
/// Above the kernel's greatest pid (4 Mi).
const NOBODY: &str = "4194305";

fn instance() -> Instance {
    Setup::new().attach().start()
}

/// What a command that must end with this status says.
#[track_caller]
fn fails(instance: &Instance, status: i32, arguments: &[&str]) -> String {
    let output = run(instance, arguments);
    assert_eq!(
        output.status.code(),
        Some(status),
        "{arguments:?}: {output:?}"
    );
    assert!(output.stdout.is_empty(), "{arguments:?}: {output:?}");
    String::from_utf8(output.stderr).expect("text")
}

#[track_caller]
fn says(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "{word:?} is missing in {text:?}");
    }
}

/// Programs that were started as one command, killed when this goes.
struct Family {
    first: Child,
    /// The first one and its children.
    pids: Vec<u32>,
}

impl Family {
    /// Waits until the command has so many children, and every one of them is
    /// under control.
    #[track_caller]
    fn new(instance: &Instance, mut command: Command, children: usize) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let first = command.spawn().expect("the program starts");
        let mut family = Self {
            pids: vec![first.id()],
            first,
        };
        wait::until(DONE, "the children of a program", || {
            let found = process::children(family.first.id());
            family.pids.truncate(1);
            family.pids.extend(found);
            family.pids.len() == 1 + children
        });
        for pid in &family.pids {
            wait::until(DONE, "a program is under control", || {
                let stat = instance.read(format!("processes/{pid}/0/gcgroup.stat"));
                stat.is_ok_and(|stat| stat.contains("channel_groups: "))
            });
        }
        family
    }

    #[track_caller]
    fn of_three(instance: &Instance) -> Self {
        Self::new(instance, instance.app_command(&["--children", "2"]), 2)
    }

    /// Which of them are stopped.
    fn stopped(&self, instance: &Instance) -> Vec<bool> {
        let stopped = |pid: &u32| instance.is_stopped(*pid);
        self.pids.iter().map(stopped).collect()
    }

    fn text(&self, index: usize) -> String {
        self.pids[index].to_string()
    }
}

impl Drop for Family {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.first.kill();
        let _ = self.first.wait();
        // Its children end when it does, but not at once.
        let ended = wait::becomes(DONE, || {
            self.pids.iter().all(|pid| !process::is_running(*pid))
        });
        if !ended && !std::thread::panicking() {
            panic!("the children of a program outlived it");
        }
    }
}

/// Whether launches of a program come to their end.
#[track_caller]
fn runs(instance: &Instance, pid: u32) -> bool {
    let complete = || {
        let contexts = instance.contexts(pid);
        contexts.iter().map(|context| context.complete).sum::<u64>()
    };
    let before = complete();
    wait::becomes(DONE, || complete() > before)
}

fn frozen(instance: &Instance) -> Vec<u32> {
    let text = instance.text("gcgroup.freeze");
    let pids = text.lines().map(|line| line.parse().expect("a pid"));
    pids.collect()
}

fn sorted(mut pids: Vec<u32>) -> Vec<u32> {
    pids.sort_unstable();
    pids
}

#[test]
fn a_tree_is_frozen_and_thawed_in_one_step() {
    let instance = instance();
    let family = Family::of_three(&instance);
    let stranger = instance.app();
    let top = family.text(0);
    assert_eq!(
        ok(&instance, &["freeze", "--tree", &top]),
        "froze 3 processes\n"
    );
    assert_eq!(family.stopped(&instance), [true; 3]);
    assert_eq!(frozen(&instance), sorted(family.pids.clone()));
    assert!(!instance.is_stopped(stranger.pid()), "it is in no tree");
    // A child is the top of a tree of its own.
    assert_eq!(
        ok(&instance, &["thaw", "--tree", &family.text(1)]),
        "thawed 1 process\n"
    );
    assert_eq!(family.stopped(&instance), [true, false, true]);
    let document = ok(&instance, &["thaw", "--tree", &top, "--json"]);
    let document: Value = serde_json::from_str(&document).expect("one JSON document");
    assert_eq!(document["frozen"], json!(0));
    let pids = document["pids"].as_array().expect("a list").iter();
    let pids: Vec<_> = pids
        .filter_map(Value::as_u64)
        .map(|pid| pid as u32)
        .collect();
    assert_eq!(sorted(pids), sorted(family.pids.clone()));
    assert_eq!(family.stopped(&instance), [false; 3]);
    assert!(frozen(&instance).is_empty());
    assert!(family.pids.iter().all(|pid| runs(&instance, *pid)));
}

#[test]
fn where_one_of_a_tree_refuses_none_of_it_is_frozen() {
    let instance = instance();
    let family = Family::of_three(&instance);
    let denied = Effect::Fail(Failure::Service(Refused::Denied(
        "a fault of the test".into(),
    )));
    instance.fault(Operation::Stop, Scope::Process(family.pids[2]), denied);
    let text = fails(&instance, 1, &["freeze", "--tree", &family.text(0)]);
    says(&text, &["gcgroup.freeze"]);
    wait::until(DONE, "the others run again", || {
        family.stopped(&instance) == [false; 3]
    });
    assert!(frozen(&instance).is_empty());
    instance.clear_faults();
    ok(&instance, &["freeze", "--tree", &family.text(0)]);
    assert_eq!(family.stopped(&instance), [true; 3]);
}

#[test]
fn a_tree_without_anything_on_a_gpu_is_told_why() {
    let instance = instance();
    let app = instance.app();
    let pid = app.pid().to_string();
    let mut sleeper = Command::new("sleep").arg("600").spawn().expect("sleep(1)");
    let asleep = sleeper.id().to_string();
    let text = fails(&instance, 1, &["freeze", "--tree", &asleep]);
    says(&text, &[&asleep, "is on a GPU", "--cgroup"]);
    let text = fails(&instance, 1, &["freeze", "--tree", NOBODY]);
    says(&text, &["there is no process", NOBODY]);
    let (thread, over) = std::sync::mpsc::channel::<()>();
    let (tell, told) = std::sync::mpsc::channel();
    let waits = std::thread::spawn(move || {
        tell.send(rustix::thread::gettid().as_raw_nonzero())
            .expect("the test listens");
        // Its end is that of the sender.
        let _ = over.recv();
    });
    let tid = told.recv().expect("the thread tells").to_string();
    let text = fails(&instance, 1, &["freeze", "--tree", &tid]);
    says(
        &text,
        &[&tid, "is a thread of", &std::process::id().to_string()],
    );
    drop(thread);
    waits.join().expect("it does not panic");
    // One that finds something does not make up for one that does not.
    fails(
        &instance,
        1,
        &["freeze", &pid, "--tree", &pid, "--tree", &asleep],
    );
    assert!(!instance.is_stopped(app.pid()));
    assert!(frozen(&instance).is_empty());
    fails(&instance, 2, &["freeze"]);
    sleeper.kill().expect("it is our child");
    sleeper.wait().expect("it is our child");
}

/// A control group of a test, removed when this goes.
struct Group(PathBuf);

impl Group {
    /// Makes one in the unified hierarchy, or says why not.
    fn new() -> Result<Self, String> {
        let table = fs::read_to_string("/proc/self/mountinfo").expect("/proc is mounted");
        let mount = table.lines().find_map(|line| {
            let (left, right) = line.split_once(" - ")?;
            right
                .starts_with("cgroup2 ")
                .then(|| left.split(' ').nth(4))?
        });
        let mount = mount.ok_or("no unified hierarchy is mounted")?;
        let own = format!("gcgroup-test-{}", std::process::id());
        let path = Path::new(mount).join(own);
        let made = Self::make(path)?;
        // What is mounted read-only can be searched and nothing else.
        let movable = fs::File::options()
            .write(true)
            .open(made.0.join("cgroup.procs"));
        movable.map_err(|error| format!("{}: {error}", made.0.display()))?;
        Ok(made)
    }

    fn make(path: PathBuf) -> Result<Self, String> {
        fs::create_dir(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(Self(path))
    }

    /// A command that runs another one in here.
    fn hosting(&self, command: &Command) -> Command {
        let mut hosted = Command::new("sh");
        hosted
            .args(["-c", r#"echo $$ >"$0" && exec "$@""#])
            .arg(self.0.join("cgroup.procs"))
            .arg(command.get_program())
            .args(command.get_args())
            .envs(
                command
                    .get_envs()
                    .filter_map(|(key, value)| Some((key, value?))),
            );
        hosted
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // It is busy until the last of its processes is gone.
        let gone = wait::becomes(DONE, || fs::remove_dir(&self.0).is_ok());
        if !gone {
            eprintln!("{} is left behind", self.0.display());
        }
    }
}

/// Path of the control group of a process in the unified hierarchy.
fn group_of(pid: u32) -> Option<String> {
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let unified = groups.lines().find_map(|line| line.strip_prefix("0::"));
    unified.map(str::to_owned)
}

#[test]
fn a_control_group_is_frozen_with_those_below_it() {
    let group = match Group::new() {
        Ok(group) => group,
        Err(reason) => return println!("skipped: no control group can be made: {reason}"),
    };
    let below = Group::make(group.0.join("below")).expect("as the one above it");
    let instance = instance();
    let outside = instance.app();
    let inside = Family::new(&instance, group.hosting(&instance.app_command(&[])), 0);
    let deeper = Family::new(&instance, below.hosting(&instance.app_command(&[])), 0);
    let path = group_of(inside.pids[0]).expect("it is in the unified hierarchy");
    let stopped = || {
        let pids = [inside.pids[0], deeper.pids[0], outside.pid()];
        pids.map(|pid| instance.is_stopped(pid))
    };
    assert_eq!(
        ok(&instance, &["freeze", "--cgroup", &path]),
        "froze 2 processes\n"
    );
    assert_eq!(stopped(), [true, true, false]);
    let lower = format!("{path}/below");
    assert_eq!(
        ok(&instance, &["thaw", "--cgroup", &lower]),
        "thawed 1 process\n"
    );
    assert_eq!(stopped(), [true, false, false]);
    // Users copy it from where it is mounted, with the slash of completion.
    let copied = format!("{}/", group.0.display());
    ok(&instance, &["thaw", "--cgroup", &copied]);
    assert_eq!(stopped(), [false; 3]);
    // What begins alike is another group.
    let alike = format!("{path}x");
    let text = fails(&instance, 1, &["freeze", "--cgroup", &alike]);
    says(&text, &[&alike, &path, "is on a GPU"]);
    let pid = outside.pid().to_string();
    let mixed = ["freeze", &pid, "--cgroup", &lower];
    assert_eq!(ok(&instance, &mixed), "froze 2 processes\n");
    assert_eq!(stopped(), [false, true, true]);
    drop((inside, deeper));
}

#[test]
fn the_control_group_of_a_program_finds_it() {
    // Whoever else is in the group of this test is not on this GPU.
    let Some(path) = group_of(std::process::id()) else {
        return println!("skipped: there is no unified hierarchy");
    };
    let instance = instance();
    let apps = [instance.app(), instance.app()];
    let shown = instance.text(format!("processes/{}/cgroup", apps[0].pid()));
    assert_eq!(shown, path);
    assert_eq!(
        ok(&instance, &["freeze", "--cgroup", &path]),
        "froze 2 processes\n"
    );
    assert!(apps.iter().all(|app| instance.is_stopped(app.pid())));
    ok(&instance, &["thaw", "--cgroup", "/"]);
    assert!(!apps.iter().any(|app| instance.is_stopped(app.pid())));
}

#[test]
fn pids_names_and_trees_change_together_or_not_at_all() {
    let instance = instance();
    let noisy = instance.launch(&json!({"kernel": "fma_fp32", "name": "noisy"}));
    let apps = [instance.app(), instance.app()];
    let family = Family::of_three(&instance);
    let [one, two] = [&apps[0], &apps[1]].map(|app| app.pid().to_string());
    let on_its_gpu = format!("{two}/0");
    let mut all = family.pids.clone();
    all.extend([noisy.pid, apps[0].pid(), apps[1].pid()]);
    let all = sorted(all);
    let tree = family.text(0);
    let targets = ["noisy", &one, &on_its_gpu, &one, "--tree", &tree];
    let with = |verb| [&[verb][..], &targets].concat();
    ok(&instance, &with("freeze"));
    assert_eq!(frozen(&instance), all);
    assert!(apps.iter().all(|app| instance.is_stopped(app.pid())));
    ok(&instance, &["thaw", "noisy", &one]);
    assert_eq!(frozen(&instance).len(), all.len() - 2);
    ok(&instance, &with("thaw"));
    assert!(frozen(&instance).is_empty());
    let wrong = [&with("freeze")[..], &["nosuch"]].concat();
    says(&fails(&instance, 1, &wrong), &["nosuch", "noisy"]);
    assert!(frozen(&instance).is_empty());
    assert!(!instance.is_stopped(apps[0].pid()));
}

/// `gcgroup run` with these options and a program on the GPU that opens its first
/// context after so many milliseconds.
fn run_app(instance: &Instance, options: &[&str], later: &str) -> Child {
    let app = instance.app_command(&["--later", later]);
    instance
        .gcgroup(&["run"])
        .args(options)
        .arg("--")
        .arg(app.get_program())
        .args(app.get_args())
        .stdout(Stdio::null())
        .spawn()
        .expect("gcgroup starts")
}

/// Cells of the line of a process in a table.
fn cells(table: &str, pid: u32) -> Vec<String> {
    let pid = pid.to_string();
    let lines = table.lines().map(|line| {
        let cells = line.split_whitespace().map(str::to_owned);
        cells.collect::<Vec<_>>()
    });
    let mut lines = lines.filter(|cells| cells.first() == Some(&pid));
    lines.next().unwrap_or_default()
}

#[test]
fn ls_shows_state_mechanism_and_launches() {
    let instance = instance();
    let apps: [App; 4] = std::array::from_fn(|_| instance.app());
    let [plain, stopped, limited, preferred] = &apps;
    instance.set(stopped.file("compute.freeze"), "1");
    instance.set(limited.file("compute.max"), "60000 100000");
    instance.set(preferred.file("compute.priority"), "3");
    let expected = [
        (plain, "8", "running"),
        (stopped, "8", "frozen"),
        (limited, "8", "throttled"),
        (preferred, "3", "running"),
    ];
    // Launches are counted since the attach, but of whom runs.
    wait::until(DONE, "launches of all but the frozen one", || {
        expected.iter().all(|(app, _, state)| {
            let stat = instance.keyed(app.file("gcgroup.stat"));
            *state == "frozen" || stat.get("nr_submitted_kernels") > Some(&0)
        })
    });
    let mut table = String::new();
    // A change that is under way, as at the edge of a window, may be seen.
    wait::until(DONE, "each program has its state", || {
        table = ok(&instance, &["ls"]);
        expected.iter().all(|(app, priority, state)| {
            let cells = cells(&table, app.pid());
            let at = |column: usize| cells.get(column).map_or("", String::as_str);
            at(1) == "0"
                && at(2).starts_with("gcgrou")
                && (at(3), at(4), at(5)) == ("root", priority, state)
                && at(7) == "channel"
                && (*state == "frozen" || at(8).parse::<u64>().is_ok_and(|count| count > 0))
        })
    });
    let widest = table.lines().map(str::len).max();
    assert!(widest <= Some(80), "{table}");
    says(&table, &["ENFORCER", "LAUNCHES"]);
    says(&table, &["channel:", "channel-window:", "LAUNCHES:"]);
    let long = ok(&instance, &["ls", "--long"]);
    let line = cells(&long, limited.pid());
    assert!(line.contains(&"60000/100000".to_owned()), "{long}");
    let list = ok(&instance, &["ls", "--json"]);
    let list: Value = serde_json::from_str(&list).expect("one JSON document");
    let list = list.as_array().expect("a list");
    assert_eq!(list.len(), apps.len());
    for (app, priority, state) in expected {
        let entry = list.iter().find(|entry| entry["pid"] == app.pid());
        let entry = entry.unwrap_or_else(|| panic!("{} is missing in {list:?}", app.pid()));
        assert_eq!(entry["priority"].to_string(), priority);
        assert_eq!(entry["frozen"], u8::from(state == "frozen"));
        let found = entry["state"].as_str();
        assert!(found == Some(state) || found == Some("pending"), "{entry}");
        assert_eq!(entry["enforcers"]["compute.freeze"], "channel");
        assert_eq!(entry["enforcers"]["compute.max"], "channel-window");
        assert!(entry["nr_submitted_kernels"].is_u64(), "{entry}");
        assert!(entry["usage_usec"].is_null(), "it is not counted: {entry}");
        assert!(entry["memory_current"].as_u64() >= Some(1 << 30), "{entry}");
    }
}

#[test]
fn a_process_without_a_context_has_a_hint_that_works() {
    let instance = instance();
    let mut child = run_app(&instance, &[], "600000");
    let pid = child.id().to_string();
    let hint = fails(&instance, 1, &["get", &pid]);
    says(&hint, &[&pid, "no GPU context", "gcgroup set"]);
    let (_, command) = hint.split_once("gcgroup set").expect("it was found");
    let words: Vec<_> = std::iter::once("set")
        .chain(command.split_whitespace())
        .collect();
    ok(&instance, &words);
    assert_eq!(
        instance.text("gcgroup.pending"),
        format!("{pid} compute.priority 12")
    );
    child.kill().expect("it is our child");
    child.wait().expect("it is our child");
    says(
        &fails(&instance, 1, &["get", NOBODY]),
        &["there is no process", NOBODY],
    );
}

#[test]
fn a_period_that_is_too_short_is_answered_with_the_shortest() {
    let instance = instance();
    let app = instance.app();
    let pid = app.pid().to_string();
    for value in [&["5000 10000"][..], &["5000", "49999"]] {
        let arguments = [&["set", &pid, "compute.max"], value].concat();
        let text = fails(&instance, 1, &arguments);
        says(&text, &["compute.max", &value.join(" "), "50000"]);
    }
    let waiting = format!("{pid} compute.max 5000 10000");
    let text = fails(&instance, 1, &["set", "/", "gcgroup.pending", &waiting]);
    says(&text, &["50000"]);
    assert_eq!(instance.text(app.file("compute.max")), "max 100000");
    ok(&instance, &["set", &pid, "compute.max", "5000 50000"]);
    assert_eq!(instance.text(app.file("compute.max")), "5000 50000");
    wait::until(SECOND, "a window has closed", || {
        instance.is_stopped(app.pid())
    });
}
