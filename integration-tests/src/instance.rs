//! One running service on a simulated GPU, with directories of its own.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::watchdog::Watchdog;
use crate::{Setup, binary, file, keyed, process, wait};

/// Until a started service must show its GPUs.
const READY: Duration = Duration::from_secs(20);
/// Until a service that was asked to end must have ended.
const ENDED: Duration = Duration::from_secs(15);
/// What devices/<gpu>/gcgroup.enforcers says once a trial has shown that channel
/// control acts.
const CHANNELS_PROVED: &str = "compute.priority channel\n";

/// A workload that was launched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launched {
    /// Its process.
    pub pid: u32,
    /// Index of its GPU.
    pub gpu: u32,
    /// Its name.
    pub name: String,
}

impl Launched {
    /// Path of one of its files below the mount point.
    #[must_use]
    pub fn file(&self, name: &str) -> String {
        format!("processes/{}/{}/{name}", self.pid, self.gpu)
    }
}

/// A launch that was refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// What write(2) failed with.
    pub errno: Errno,
    /// The sentence of the answer.
    pub error: String,
    /// The field of the answer.
    pub field: String,
}

/// A running service. Dropping it ends it and removes what it left; where the
/// test failed, its log is printed.
#[derive(Debug)]
pub struct Instance {
    setup: Setup,
    base: TempDir,
    child: Option<Child>,
    watchdog: Option<Watchdog>,
}

impl Instance {
    /// A service with one GPU and every default.
    #[must_use]
    pub fn new() -> Self {
        Setup::new().start()
    }

    /// An instance that is not started yet.
    pub(crate) fn in_directory(setup: Setup, base: TempDir) -> Self {
        let instance = Self {
            setup,
            base,
            child: None,
            watchdog: None,
        };
        fs::create_dir(instance.root()).expect("the directory is ours");
        fs::write(instance.configuration(), instance.setup.configuration())
            .expect("the directory is ours");
        instance
    }

    /// Directory that holds everything of this instance.
    #[must_use]
    pub fn base(&self) -> &Path {
        self.base.path()
    }

    /// The mount point.
    #[must_use]
    pub fn root(&self) -> PathBuf {
        self.base().join("m")
    }

    /// The state directory.
    #[must_use]
    pub fn state(&self) -> PathBuf {
        self.base().join("s")
    }

    /// The configuration file.
    #[must_use]
    pub fn configuration(&self) -> PathBuf {
        self.base().join("gcgroupd.toml")
    }

    /// Absolute path of what lies below the mount point.
    #[must_use]
    pub fn path(&self, below: impl AsRef<Path>) -> PathBuf {
        self.root().join(below)
    }

    /// A command that runs `gcgroupd` with this instance's directories.
    #[must_use]
    pub fn gcgroupd(&self, subcommand: &str) -> Command {
        let mut command = Command::new(binary::gcgroupd());
        command
            .arg(subcommand)
            .arg("--state")
            .arg(self.state())
            .arg(format!("--sim={}", self.setup.gpus))
            // Every process of the instance can be found by it.
            .env("GCGROUP_INSTANCE", self.base())
            .stdin(Stdio::null());
        command
    }

    /// The command that starts the service.
    #[must_use]
    pub fn serve_command(&self) -> Command {
        let mut command = self.gcgroupd("serve");
        command
            .arg("--mountpoint")
            .arg(self.root())
            .arg("--config")
            .arg(self.configuration());
        command
    }

    /// A command that runs `gcgroup` on this instance.
    #[must_use]
    pub fn gcgroup(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(binary::gcgroup());
        command
            .arg("--root")
            .arg(self.root())
            .args(arguments)
            .stdin(Stdio::null());
        command
    }

    /// Starts the service, again where it was ended before.
    ///
    /// # Panics
    /// When it does not come up; the message holds its log.
    pub fn start(&mut self) {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.base().join("log"))
            .expect("the directory is ours");
        let child = self
            .serve_command()
            .stdout(log.try_clone().expect("descriptors are left"))
            .stderr(log)
            .spawn()
            .expect("the service starts");
        self.watchdog = Some(Watchdog::new(child.id(), self.root()));
        self.child = Some(child);
        let gpus = 0..self.setup.gpus;
        let ready = wait::becomes(READY, || {
            self.has_ended() || gpus.clone().all(|gpu| self.is_served(gpu))
        });
        assert!(
            ready && !self.has_ended(),
            "the service did not come up:\n{}",
            self.log()
        );
    }

    /// Whether a GPU is there with every mechanism that it shall have. It is
    /// read, because the kernel remembers for a while what a mount had whose
    /// service is gone. Where channel control is used, a trial of it goes on for a
    /// while after the GPU is there.
    fn is_served(&self, gpu: u32) -> bool {
        let mechanisms = self.read(format!("devices/{gpu}/gcgroup.enforcers"));
        let proof = self.setup.temporal || self.setup.attach;
        mechanisms.is_ok_and(|text| !proof || text.contains(CHANNELS_PROVED))
    }

    fn has_ended(&mut self) -> bool {
        let child = self.child.as_mut().expect("the service was started");
        child.try_wait().expect("it is our child").is_some()
    }

    /// Process id of the service.
    ///
    /// # Panics
    /// When it was ended.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("the service runs").id()
    }

    /// What the service wrote to its log so far.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.base().join("log")).unwrap_or_default()
    }

    /// Asks the service to end, and waits for it.
    ///
    /// # Panics
    /// When it does not end.
    #[track_caller]
    pub fn stop(&mut self) -> ExitStatus {
        process::signal(self.pid(), Signal::TERM);
        self.wait_end()
    }

    /// Kills the service with SIGKILL.
    ///
    /// # Panics
    /// When it was ended before.
    #[track_caller]
    pub fn kill(&mut self) {
        process::signal(self.pid(), Signal::KILL);
        let status = self.wait_end();
        assert_eq!(status.signal(), Some(9), "the service ended by itself");
    }

    /// Waits for the end of the service.
    ///
    /// # Panics
    /// When it does not end.
    #[track_caller]
    pub fn wait_end(&mut self) -> ExitStatus {
        let ended = wait::becomes(ENDED, || self.has_ended());
        assert!(ended, "the service did not end:\n{}", self.log());
        self.watchdog = None;
        let mut child = self.child.take().expect("the service was started");
        child.wait().expect("it is our child")
    }

    /// Running processes of this instance, by the role they were started in
    /// (`serve`, `worker`, `guardian`, `sim-gpu`, ...). Workers have an empty
    /// environment, so they are found as children of the service only.
    #[must_use]
    pub fn processes(&self) -> BTreeMap<u32, String> {
        let children = self
            .child
            .as_ref()
            .map(|child| process::children(child.id()));
        process::naming(self.base())
            .into_iter()
            .chain(children.into_iter().flatten())
            .filter_map(|pid| {
                let role = process::arguments(pid).into_iter().nth(1)?;
                Some((pid, role))
            })
            .collect()
    }

    /// Running processes of this instance in one role.
    #[must_use]
    pub fn in_role(&self, role: &str) -> Vec<u32> {
        let all = self.processes();
        let of_role = all.iter().filter(|(_, found)| *found == role);
        of_role.map(|(&pid, _)| pid).collect()
    }

    /// Reads a file below the mount point.
    ///
    /// # Errors
    /// That of the kernel or the service.
    pub fn read(&self, below: impl AsRef<Path>) -> Result<String, Errno> {
        file::read(&self.path(below))
    }

    /// Content of a file below the mount point, without its last newline.
    ///
    /// # Panics
    /// When it cannot be read.
    #[track_caller]
    #[must_use]
    pub fn text(&self, below: impl AsRef<Path>) -> String {
        let below = below.as_ref();
        match self.read(below) {
            Ok(text) => text.strip_suffix('\n').unwrap_or(&text).to_owned(),
            Err(errno) => panic!("{} cannot be read: {errno}", below.display()),
        }
    }

    /// A file that holds one number.
    ///
    /// # Panics
    /// When it cannot be read or holds something else.
    #[track_caller]
    #[must_use]
    pub fn number(&self, below: impl AsRef<Path>) -> u64 {
        let text = self.text(below);
        text.parse()
            .unwrap_or_else(|_| panic!("{text:?} is not a number"))
    }

    /// Numbers of a keyed file.
    ///
    /// # Panics
    /// When it cannot be read or is not keyed.
    #[track_caller]
    #[must_use]
    pub fn keyed(&self, below: impl AsRef<Path>) -> BTreeMap<String, u64> {
        keyed::numbers(&self.text(below)).expect("a keyed file")
    }

    /// One number of a keyed file.
    ///
    /// # Panics
    /// When it is not there.
    #[track_caller]
    #[must_use]
    pub fn figure(&self, below: impl AsRef<Path>, key: &str) -> u64 {
        let found = self.keyed(below);
        match found.get(key) {
            Some(&number) => number,
            None => panic!("no {key:?} among {found:?}"),
        }
    }

    /// Writes to a file below the mount point with one write(2).
    ///
    /// # Errors
    /// That of the kernel or the service.
    pub fn write(&self, below: impl AsRef<Path>, bytes: impl AsRef<[u8]>) -> Result<(), Errno> {
        file::write(&self.path(below), bytes)
    }

    /// Writes a value that must be taken.
    ///
    /// # Panics
    /// When it is refused.
    #[track_caller]
    pub fn set(&self, below: impl AsRef<Path>, value: &str) {
        let below = below.as_ref();
        if let Err(errno) = self.write(below, value) {
            panic!("{value:?} to {}: {errno}", below.display());
        }
    }

    /// Names in a directory below the mount point, sorted.
    ///
    /// # Panics
    /// When it cannot be read.
    #[track_caller]
    #[must_use]
    pub fn names(&self, below: impl AsRef<Path>) -> Vec<String> {
        file::names(&self.path(below))
    }

    /// Makes a partition on GPU 0 with so many SMs.
    ///
    /// # Panics
    /// When that is refused.
    #[track_caller]
    pub fn partition(&self, name: &str, sms: u32) {
        let directory = self.path(format!("partitions/0/{name}"));
        fs::create_dir(&directory).expect("the name is free");
        self.set(format!("partitions/0/{name}/sm.count"), &sms.to_string());
    }

    /// Launches a workload through gcgroup.launch.
    ///
    /// # Errors
    /// The errno of the write with what the answer says.
    ///
    /// # Panics
    /// When the answer is not what the interface promises.
    pub fn try_launch(&self, spec: &Value) -> Result<Launched, Refused> {
        self.try_launch_text(&spec.to_string())
    }

    /// As [`Instance::try_launch`], with the text of the spec as given.
    ///
    /// # Errors
    /// The errno of the write with what the answer says.
    ///
    /// # Panics
    /// When the answer is not what the interface promises.
    pub fn try_launch_text(&self, spec: &str) -> Result<Launched, Refused> {
        let descriptor = file::open_with(&self.path("gcgroup.launch"), OFlags::RDWR)
            .expect("gcgroup.launch can be opened");
        let written = file::write_to(&descriptor, spec);
        let text = file::read_from(&descriptor).expect("an answer can be read");
        answer(written, &text)
    }

    /// Launches a workload that must come up.
    ///
    /// # Panics
    /// When it is refused.
    #[track_caller]
    #[must_use]
    pub fn launch(&self, spec: &Value) -> Launched {
        match self.try_launch(spec) {
            Ok(launched) => launched,
            Err(refused) => panic!("{spec}: {refused:?}"),
        }
    }

    /// Launches `fma_fp32` with every default.
    ///
    /// # Panics
    /// When it is refused.
    #[track_caller]
    #[must_use]
    pub fn launch_fma(&self) -> Launched {
        self.launch(&serde_json::json!({"kernel": "fma_fp32"}))
    }

    /// Whether a process has a directory.
    #[must_use]
    pub fn has_entry(&self, pid: u32) -> bool {
        self.path(format!("processes/{pid}"))
            .symlink_metadata()
            .is_ok()
    }
}

impl Default for Instance {
    fn default() -> Self {
        Self::new()
    }
}

/// Takes the two halves of a launch together: what write(2) returned and what
/// the same descriptor then said.
///
/// # Errors
/// The refusal that they tell.
///
/// # Panics
/// When they contradict each other or the answer is malformed.
pub fn answer(written: Result<(), Errno>, text: &str) -> Result<Launched, Refused> {
    let value: Value = serde_json::from_str(text)
        .unwrap_or_else(|error| panic!("the answer {text:?} to {written:?} is no JSON: {error}"));
    let word = |key: &str| value[key].as_str().map(str::to_owned);
    let number = |key: &str| {
        let number = value[key].as_u64().and_then(|n| u32::try_from(n).ok());
        number.unwrap_or_else(|| panic!("{text:?} has no number {key:?}"))
    };
    match written {
        Ok(()) => Ok(Launched {
            pid: number("pid"),
            gpu: number("gpu"),
            name: word("name").expect("the answer has a name"),
        }),
        Err(errno) => Err(Refused {
            errno,
            error: word("error").expect("the answer has an error"),
            field: word("field").unwrap_or_default(),
        }),
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        self.watchdog = None;
        if let Some(mut child) = self.child.take() {
            end(&mut child);
        }
        if std::thread::panicking() {
            eprintln!("the log of the service:\n{}", self.log());
        }
        // A dead mount must go before the directory is removed, and so must
        // one that is alive: removing files through it would act on it.
        let root = self.root();
        while process::is_mounted(&root) && unmount(&root, UnmountFlags::DETACH).is_ok() {}
        for pid in process::naming(self.base()) {
            process::kill_if_there(pid);
        }
    }
}

/// Ends a service that may have ended already.
fn end(child: &mut Child) {
    let running = |child: &mut Child| matches!(child.try_wait(), Ok(None));
    if running(child) {
        process::signal(child.id(), Signal::TERM);
        if !wait::becomes(ENDED, || !running(child)) {
            // Ended in the meantime is as good.
            let _ = child.kill();
        }
    }
    let _ = child.wait();
}
