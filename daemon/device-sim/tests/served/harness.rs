//! What the tests share: a served host, and processes of their own.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use gcgroup_device::{GpuInfo, Telemetry};
use gcgroup_device_sim::{
    AppOptions, Effect, Ended, FaultClient, FaultSpec, Operation, Scope, ServeError, SimEngine,
    SimHost, SimOptions, run_app, serve,
};

/// Tells a process of this test binary what to be.
const ROLE: &str = "GCGROUP_TEST_ROLE";
const DIRECTORY: &str = "GCGROUP_TEST_DIRECTORY";
const OPTIONS: &str = "GCGROUP_TEST_OPTIONS";
/// Long enough for a busy machine, short enough to fail.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// A directory that goes with the value.
pub(crate) struct Directory(pub(crate) PathBuf);

impl Directory {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("gcgroup-sim-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).expect("a new name in the temporary directory");
        Self(path)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A simulated host in a thread; it ends when its directory goes.
pub(crate) struct Served {
    pub(crate) options: SimOptions,
    pub(crate) thread: Option<JoinHandle<Result<Ended, ServeError>>>,
    pub(crate) directory: Option<Directory>,
}

impl Served {
    pub(crate) fn start() -> Self {
        Self::with(|_| {})
    }

    pub(crate) fn with(change: impl FnOnce(&mut SimOptions)) -> Self {
        let directory = Directory::new();
        let mut options = SimOptions::new(directory.0.clone());
        change(&mut options);
        let own = options.clone();
        let thread = std::thread::spawn(move || serve(&own));
        until("the socket is there", || {
            FaultClient::open(&options.socket()).is_ok()
        });
        Self {
            options,
            thread: Some(thread),
            directory: Some(directory),
        }
    }

    pub(crate) fn engine(&self) -> SimEngine {
        SimEngine::open_with(&self.options.socket(), 0, None).expect("there is room")
    }

    pub(crate) fn host(&self) -> SimHost {
        SimHost::open(&self.options.socket()).expect("it is served")
    }

    pub(crate) fn faults(&self) -> FaultClient {
        FaultClient::open(&self.options.socket()).expect("it is served")
    }

    pub(crate) fn set(&self, operation: Operation, effect: Effect, hits: Option<u64>) {
        let spec = FaultSpec {
            operation,
            scope: Scope::All,
            effect,
            hits,
        };
        self.faults().set(spec).expect("it fits the operation");
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        drop(self.directory.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

pub(crate) fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let started = Instant::now();
    while !condition() {
        assert!(started.elapsed() < PATIENCE, "not so in time: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A process of this binary that is what it is told to be.
pub(crate) fn child(role: &str, directory: &Path) -> Child {
    process(role, directory)
        .stdout(Stdio::null())
        .spawn()
        .expect("this binary runs")
}

fn process(role: &str, directory: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("Linux knows it"));
    command
        .args(["--exact", "harness::a_process_of_its_own", "--ignored"])
        .env(ROLE, role)
        .env(DIRECTORY, directory);
    command
}

/// A program of somebody else; it is killed with the value.
pub(crate) struct App {
    pub(crate) process: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl App {
    /// Starts it with options as `gcgroupd sim-app` has them, without dashes.
    pub(crate) fn start(served: &Served, options: &str) -> Self {
        let mut process = process("app", &served.options.state)
            .env(OPTIONS, options)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("this binary runs");
        Self {
            input: process.stdin.take(),
            output: BufReader::new(process.stdout.take().expect("it was asked for")),
            process,
        }
    }

    /// Starts it, and waits until it has its context.
    pub(crate) fn begun(served: &Served, options: &str) -> Self {
        let mut app = Self::start(served, options);
        let line = app.line();
        assert!(line.contains("runs kernels"), "{line}");
        app
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.id()
    }

    /// The next line that it says. What the test runner says is left out.
    pub(crate) fn line(&mut self) -> String {
        loop {
            let mut line = String::new();
            let length = self.output.read_line(&mut line).expect("a pipe");
            assert!(length > 0, "it has ended");
            let line = line.trim_end();
            let line = line.rsplit("... ").next().unwrap_or(line);
            if !line.is_empty() && !line.starts_with("running ") {
                return line.to_owned();
            }
        }
    }

    /// What it answers to a command.
    pub(crate) fn tell(&mut self, command: &str) -> String {
        let input = self.input.as_mut().expect("it was not closed");
        writeln!(input, "{command}").expect("it listens");
        self.line()
    }

    pub(crate) fn obey(&mut self, command: &str) {
        assert_eq!(self.tell(command), "ok", "{command}");
    }

    /// Ends its input.
    pub(crate) fn hang_up(&mut self) {
        self.input = None;
    }

    pub(crate) fn kill(&mut self) {
        self.process.kill().expect("it is ours");
        self.process.wait().expect("it is ours");
    }
}

impl Drop for App {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The options of a program, as they are in its environment.
fn app_options(directory: PathBuf) -> AppOptions {
    let mut options = AppOptions {
        child_arguments: std::env::args_os().skip(1).collect(),
        memory_bytes: 3 << 30,
        ..AppOptions::new(directory)
    };
    let text = std::env::var(OPTIONS).unwrap_or_default();
    let mut words = text.split_whitespace();
    while let Some(word) = words.next() {
        let mut number = || words.next().and_then(|word| word.parse::<u32>().ok());
        match word {
            "idle" => options.idle = true,
            "mps-server" => options.mps_server = true,
            "later" => {
                let ms = number().expect("milliseconds");
                options.later = Duration::from_millis(ms.into());
            }
            "children" => options.children = number().expect("a number"),
            other => panic!("{other:?} is no option"),
        }
    }
    options
}

#[test]
#[ignore = "other tests run it as a process"]
fn a_process_of_its_own() {
    let Some(directory) = std::env::var_os(DIRECTORY).map(PathBuf::from) else {
        return; // Somebody runs the ignored tests by hand.
    };
    match std::env::var(ROLE).as_deref() {
        Ok("serve") => {
            serve(&SimOptions::new(directory)).expect("nobody else serves it");
        }
        Ok("app") => {
            run_app(&app_options(directory)).expect("nothing fails until it is told to quit");
        }
        other => panic!("{other:?} is no role"),
    }
}

pub(crate) fn first_gpu(host: &SimHost) -> GpuInfo {
    host.gpus().expect("it is served").remove(0)
}
