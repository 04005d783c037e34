//! Programs of somebody else on the simulated GPU.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use gcgroup_device_sim::ClientState;

use crate::{Instance, binary, wait};

/// A program on the GPU that knows nothing of the service. Dropping it kills it.
#[derive(Debug)]
pub struct App {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    /// Index of the GPU of its first context.
    pub gpu: u32,
}

/// What `count` of a program answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counted {
    /// Launches, graphs included.
    pub launched: u64,
    /// Graphs among them.
    pub graphs: u64,
    /// Launches that came to their end.
    pub ended: u64,
}

impl App {
    /// Process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Path of one of its files below the mount point.
    #[must_use]
    pub fn file(&self, name: &str) -> String {
        self.file_on(self.gpu, name)
    }

    /// Path of one of its files for a GPU.
    #[must_use]
    pub fn file_on(&self, gpu: u32, name: &str) -> String {
        format!("processes/{}/{gpu}/{name}", self.pid())
    }

    /// Sends a command and returns the line that answers it.
    ///
    /// # Panics
    /// When the program has ended.
    #[track_caller]
    pub fn ask(&mut self, command: &str) -> String {
        writeln!(self.input, "{command}").expect("the program listens");
        self.line()
    }

    /// Sends a command that must succeed.
    ///
    /// # Panics
    /// When it does not.
    #[track_caller]
    pub fn tell(&mut self, command: &str) {
        let answer = self.ask(command);
        assert_eq!(answer, "ok", "{command}");
    }

    /// What it has launched and what of it has ended.
    ///
    /// # Panics
    /// When the program has ended.
    #[track_caller]
    pub fn count(&mut self) -> Counted {
        let answer = self.ask("count");
        let words: Vec<_> = answer.split(' ').collect();
        let figure = |key: &str| {
            let at = words.iter().position(|word| *word == key);
            let value = at.and_then(|at| words.get(at + 1));
            value
                .and_then(|value| value.parse().ok())
                .unwrap_or_else(|| panic!("no {key} in {answer:?}"))
        };
        Counted {
            launched: figure("launched"),
            graphs: figure("graphs"),
            ended: figure("ended"),
        }
    }

    /// Whether launches come to their end within a while.
    #[track_caller]
    pub fn progresses(&mut self) -> bool {
        let before = self.count().ended;
        wait::becomes(Duration::from_secs(2), || self.count().ended > before)
    }

    /// Whether nothing comes to its end for a tenth of a second.
    #[track_caller]
    pub fn stands(&mut self) -> bool {
        let before = self.count().ended;
        std::thread::sleep(Duration::from_millis(100));
        self.count().ended == before
    }

    /// Kills it and waits for its end.
    pub fn kill(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        self.child.wait().expect("it is our child");
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("it is our child").is_some()
    }

    #[track_caller]
    fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).expect("it is text");
        assert!(line.ends_with('\n'), "the program has ended: {line:?}");
        line.trim_end().to_owned()
    }
}

impl Drop for App {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Instance {
    /// The command of a program on this instance's simulated GPU.
    #[must_use]
    pub fn app_command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(binary::gcgroupd());
        command
            .arg("sim-app")
            .arg("--state")
            .arg(self.state())
            .args(arguments)
            .env("GCGROUP_INSTANCE", self.base());
        command
    }

    /// Starts a program on a GPU and waits until it has begun there.
    ///
    /// # Panics
    /// When it does not.
    #[track_caller]
    #[must_use]
    pub fn app_on(&self, gpu: u32, arguments: &[&str]) -> App {
        let mut child = self
            .app_command(arguments)
            .arg("--gpu")
            .arg(gpu.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the program starts");
        let input = child.stdin.take().expect("it is piped");
        let output = BufReader::new(child.stdout.take().expect("it is piped"));
        let mut app = App {
            child,
            input,
            output,
            gpu,
        };
        let first = app.line();
        assert!(first.starts_with("process "), "{first:?}");
        app
    }

    /// Starts a program with kernels of half a millisecond on GPU 0 and waits
    /// for its entry.
    ///
    /// # Panics
    /// When either does not come.
    #[track_caller]
    #[must_use]
    pub fn app(&self) -> App {
        let app = self.app_on(0, &[]);
        self.wait_for(&app);
        app
    }

    /// Waits until the service may control a program.
    ///
    /// # Panics
    /// When that takes too long.
    #[track_caller]
    pub fn wait_for(&self, app: &App) {
        let controlled = || {
            let groups = self.read(app.file("gcgroup.stat"));
            groups.is_ok_and(|stat| stat.contains("channel_groups: "))
        };
        let limit = Duration::from_secs(10);
        wait::until(limit, "the program is under control", controlled);
    }

    /// The contexts of a program as the simulated GPU has them.
    ///
    /// # Panics
    /// When the simulated GPU does not run.
    #[track_caller]
    #[must_use]
    pub fn contexts(&self, pid: u32) -> Vec<ClientState> {
        let all = self.faults().clients().expect("the simulated GPU runs");
        all.into_iter().filter(|client| client.pid == pid).collect()
    }

    /// Whether a program has contexts, and every channel of each is stopped.
    ///
    /// # Panics
    /// When the simulated GPU does not run.
    #[track_caller]
    #[must_use]
    pub fn is_stopped(&self, pid: u32) -> bool {
        self.each_context(pid, |it| it.disabled_channels == it.channels)
    }

    /// Whether a program has contexts, and no channel of any is stopped.
    ///
    /// # Panics
    /// When the simulated GPU does not run.
    #[track_caller]
    #[must_use]
    pub fn runs(&self, pid: u32) -> bool {
        self.each_context(pid, |it| it.disabled_channels == 0)
    }

    #[track_caller]
    fn each_context(&self, pid: u32, is_so: impl Fn(&ClientState) -> bool) -> bool {
        let contexts = self.contexts(pid);
        !contexts.is_empty() && contexts.iter().all(|it| it.channels > 0 && is_so(it))
    }
}
