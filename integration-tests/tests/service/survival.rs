//! What is left of a service, a guardian or a demo that was ended the hard
//! way, and starts on what is damaged.

use std::fs;
use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use gcgroup_integration_tests::{Instance, binary, process, wait};
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::Signal;
use tempfile::TempDir;

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn a_damaged_journal_is_set_aside_and_stops_nobody() {
    for recovered_first in [true, false] {
        let mut instance = Instance::new();
        for damaged in ["", "{", "[]"] {
            assert_eq!(instance.stop().code(), Some(0), "{}", instance.log());
            let state = instance.state();
            fs::write(state.join("journal.json"), damaged).expect("the directory is ours");
            if recovered_first {
                let output = instance.gcgroupd("recover").output().expect("it starts");
                assert_eq!(output.status.code(), Some(0), "{damaged:?}: {output:?}");
                let aside = fs::read_to_string(state.join("journal.damaged"));
                assert_eq!(aside.expect("it is kept"), damaged);
                assert!(!state.join("journal.json").exists());
            }
            instance.start();
            let aside = fs::read_to_string(state.join("journal.damaged"));
            assert_eq!(aside.expect("it is kept"), damaged);
            let _works = instance.launch_fma();
        }
    }
}

#[test]
fn a_guardian_that_was_killed_has_a_successor_that_guards() {
    let mut instance = Instance::new();
    let workload = instance.launch_fma();
    for _ in 0..2 {
        let guardians = instance.in_role("guardian");
        assert_eq!(guardians.len(), 1, "{guardians:?}");
        process::signal(guardians[0], Signal::KILL);
        wait::until(
            3 * SECOND,
            "there is another guardian",
            || matches!(instance.in_role("guardian")[..], [next] if next != guardians[0]),
        );
    }
    let frozen = instance.launch_fma();
    instance.set(frozen.file("compute.freeze"), "1");
    instance.kill();
    wait::until(3 * SECOND, "workers and mount are gone", || {
        !process::is_running(workload.pid)
            && !process::is_running(frozen.pid)
            && !process::is_mounted(&instance.root())
    });
    wait::until(3 * SECOND, "only the simulated GPU is left", || {
        instance.processes().values().all(|role| role == "sim-gpu")
    });
}

/// A demo with a directory for temporary files of its own. What a failed test
/// leaves of it is removed with it.
struct Demo {
    temporary: TempDir,
    child: Child,
    /// Every process that was seen of it, the demo itself left out.
    seen: Vec<u32>,
}

impl Demo {
    fn start() -> Self {
        let temporary = tempfile::Builder::new()
            .prefix("dem")
            .tempdir()
            .expect("the temporary directory is writable");
        // Workers of another user look up sockets below.
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(temporary.path(), mode).expect("it is ours");
        let child = Command::new(binary::gcgroupd())
            .args(["demo", "--sim"])
            .env("TMPDIR", temporary.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("it starts");
        Self {
            temporary,
            child,
            seen: Vec::new(),
        }
    }

    /// Looks for processes: descendants, and what names its directory.
    fn look(&mut self) {
        let mut parents = vec![self.child.id()];
        while let Some(parent) = parents.pop() {
            for child in process::children(parent) {
                parents.push(child);
                self.seen.push(child);
            }
        }
        self.seen.extend(process::naming(self.temporary.path()));
        self.seen.sort_unstable();
        self.seen.dedup();
        let own = self.child.id();
        self.seen.retain(|&pid| pid != own);
    }

    fn has_worker(&mut self) -> bool {
        self.look();
        self.running().iter().any(|(_, role)| role == "worker")
    }

    /// Processes of it that still run, by their role.
    fn running(&self) -> Vec<(u32, String)> {
        let alive = self.seen.iter().filter(|&&pid| process::is_running(pid));
        let role = |pid| process::arguments(pid).into_iter().nth(1);
        alive
            .map(|&pid| (pid, role(pid).unwrap_or_default()))
            .collect()
    }

    fn is_mounted(&self) -> bool {
        !mounts_below(self.temporary.path()).is_empty()
    }

    fn wait_end(&mut self, limit: Duration) -> ExitStatus {
        let ended = || matches!(self.child.try_wait(), Ok(Some(_)));
        wait::until(limit, "the demo ends", ended);
        self.child.wait().expect("it is our child")
    }

    fn errors(&mut self) -> String {
        let mut text = String::new();
        let mut pipe = self.child.stderr.take().expect("it is read once");
        pipe.read_to_string(&mut text).expect("it writes UTF-8");
        text
    }
}

impl Drop for Demo {
    fn drop(&mut self) {
        // Ended already is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
        for (pid, _) in self.running() {
            process::kill_if_there(pid);
        }
        for mount in mounts_below(self.temporary.path()) {
            let _ = unmount(mount, UnmountFlags::DETACH);
        }
    }
}

fn mounts_below(path: &Path) -> Vec<String> {
    let table = fs::read_to_string("/proc/self/mountinfo").expect("/proc is mounted");
    let points = table.lines().filter_map(|line| line.split(' ').nth(4));
    points
        .filter(|point| Path::new(point).starts_with(path))
        .map(str::to_owned)
        .collect()
}

#[test]
fn an_interrupted_demo_leaves_nothing() {
    for after in [100, 1_000, 2_000].map(Duration::from_millis) {
        let mut demo = Demo::start();
        std::thread::sleep(after);
        demo.look();
        process::signal(demo.child.id(), Signal::INT);
        let status = demo.wait_end(5 * SECOND);
        assert!(!demo.is_mounted(), "after {after:?}");
        let left = || fs::read_dir(demo.temporary.path()).expect("it is ours");
        let left: Vec<_> = left().filter_map(Result::ok).collect();
        assert!(left.is_empty(), "after {after:?}: {left:?}");
        demo.look();
        wait::until(2 * SECOND, "no process of it is left", || {
            demo.running().is_empty()
        });
        // By the signal, or by itself once it has cleaned up.
        assert!(!status.success(), "after {after:?}: {}", demo.errors());
    }
}

#[test]
fn a_killed_demo_takes_its_service_along() {
    let mut demo = Demo::start();
    wait::until(10 * SECOND, "its workers run", || demo.has_worker());
    assert!(demo.is_mounted());
    demo.look();
    process::signal(demo.child.id(), Signal::KILL);
    let killed = Instant::now();
    assert_eq!(demo.wait_end(SECOND).signal(), Some(9));
    demo.look();
    let limit = (3 * SECOND).saturating_sub(killed.elapsed());
    let gone = wait::becomes(limit, || {
        let running = demo.running();
        !demo.is_mounted() && running.iter().all(|(_, role)| role == "sim-gpu")
    });
    assert!(gone, "{:?}, mounted: {}", demo.running(), demo.is_mounted());
}

#[test]
fn a_state_directory_has_a_longest_path() {
    let mut instance = Instance::new();
    instance.stop();
    let serve = |state: &Path| {
        let mut command = Command::new(binary::gcgroupd());
        command.arg("serve").arg("--state").arg(state);
        command.arg("--mountpoint").arg(instance.root());
        command.arg("--config").arg(instance.configuration());
        command.arg("--sim=1").stdin(Stdio::null());
        command.env("GCGROUP_INSTANCE", instance.base());
        command
    };
    let base = instance.base();
    let fill = 75 - base.as_os_str().len() - 1;
    let output = serve(&base.join("x".repeat(fill + 1)))
        .output()
        .expect("it starts");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("state") && text.contains("75"), "{text}");
    assert!(!process::is_mounted(&instance.root()));
    let mut longest = serve(&base.join("x".repeat(fill)))
        .stderr(Stdio::null())
        .spawn()
        .expect("it starts");
    let served = wait::becomes(20 * SECOND, || instance.path("devices/0/uuid").exists());
    process::signal(longest.id(), Signal::TERM);
    let ended = wait::becomes(10 * SECOND, || !matches!(longest.try_wait(), Ok(None)));
    assert!(served && ended, "served: {served}, ended: {ended}");
}
