//! A program of somebody else on the simulated GPU: no workload of the service,
//! and none of its control.
//!
//! It launches kernels until it is killed, and listens on standard input
//! meanwhile. Each line is a command ([`COMMANDS`]) and has one line on standard
//! output for an answer: `ok`, `error: ` with the reason, or what `count` says.
//! The end of the input is not the end of the program.

mod command;
mod context;
mod family;
mod input;

use std::ffi::OsString;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use gcgroup_kernels::engine::EngineError;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::time::Timespec;

pub use command::COMMANDS;
use command::Command;
use context::{Context, Counts};
use family::Children;
use input::Input;

use crate::server::SOCKET_NAME;
use crate::wire::OpenAs;

/// What the program does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AppOptions {
    /// State directory of the simulated host.
    pub state: PathBuf,
    /// Index of its GPU.
    pub gpu: u32,
    /// Device memory that it takes, bytes.
    pub memory_bytes: u64,
    /// How long one of its kernels lasts alone on the GPU, microseconds; at
    /// least 1.
    pub kernel_us: u64,
    /// It launches nothing until it is told to.
    pub idle: bool,
    /// It is listed as an MPS server.
    pub mps_server: bool,
    /// How long it waits before it opens its first context.
    pub later: Duration,
    /// Children that do the same, but for children of their own. They listen to
    /// nobody, say nothing, and end when this process does.
    pub children: u32,
    /// Arguments with which this executable is such a child: those that it has
    /// itself will do, for a child has no children.
    pub child_arguments: Vec<OsString>,
}

impl AppOptions {
    /// A program that takes 1 GiB of the first GPU and runs kernels of 500 us.
    #[must_use]
    pub fn new(state: PathBuf) -> Self {
        Self {
            state,
            gpu: 0,
            memory_bytes: 1 << 30,
            kernel_us: 500,
            idle: false,
            mps_server: false,
            later: Duration::ZERO,
            children: 0,
            child_arguments: Vec::new(),
        }
    }
}

/// Takes memory and launches kernels until it is killed or told to quit. It says
/// on standard output which children it has, and when it has begun.
///
/// # Errors
/// Those of the simulated driver, and of the system that starts its children.
pub fn run_app(options: &AppOptions) -> Result<(), EngineError> {
    let Some(parent) = family::parent()? else {
        return Ok(());
    };
    let children = Children::start(options)?;
    for pid in children.pids() {
        say(&format!("child {pid}"));
    }
    let mut app = App {
        options,
        contexts: Vec::new(),
        closed: Counts::default(),
        launches: !options.idle,
        due: Some(Instant::now() + options.later),
        input: Input::new(),
    };
    app.run(parent.as_ref())
}

struct App<'a> {
    options: &'a AppOptions,
    /// The newest last.
    contexts: Vec<Context>,
    /// What contexts did that were closed.
    closed: Counts,
    /// Whether it launches on its own.
    launches: bool,
    /// When it opens its first context; `None` once it has.
    due: Option<Instant>,
    input: Input,
}

impl App<'_> {
    fn run(&mut self, parent: Option<&OwnedFd>) -> Result<(), EngineError> {
        loop {
            if self.due.is_some_and(|due| due <= Instant::now()) {
                self.due = None;
                self.begin()?;
            }
            for context in &mut self.contexts {
                context.turn(self.launches)?;
            }
            if self.wait(parent)? {
                return Ok(());
            }
            for line in self.input.lines() {
                let command = line.and_then(|line| Command::parse(&line));
                if command == Ok(Command::Quit) {
                    say("ok");
                    return Ok(());
                }
                match command.and_then(|command| self.obey(command)) {
                    Ok(answer) => say(&answer),
                    Err(reason) => say(&format!("error: {reason}")),
                }
            }
        }
    }

    fn begin(&mut self) -> Result<(), EngineError> {
        let mut first = self.open(self.options.gpu)?;
        first.allocate(self.options.memory_bytes)?;
        // Those that it was told to open meanwhile are newer.
        self.contexts.insert(0, first);
        let AppOptions { kernel_us, gpu, .. } = self.options;
        say(&format!(
            "process {} runs kernels of {kernel_us} us on simulated GPU {gpu}",
            std::process::id(),
        ));
        Ok(())
    }

    fn open(&self, gpu: u32) -> Result<Context, EngineError> {
        let socket = self.options.state.join(SOCKET_NAME);
        let open_as = self.options.mps_server.then_some(OpenAs::MpsServer);
        Context::open(&socket, gpu, open_as, self.options.kernel_us)
    }

    fn obey(&mut self, command: Command) -> Result<String, String> {
        let text = |error: EngineError| error.to_string();
        match command {
            Command::Open(gpu) => {
                let context = self.open(gpu).map_err(text)?;
                self.contexts.push(context);
            }
            Command::Close => {
                let context = self.contexts.pop().ok_or(NO_CONTEXT)?;
                self.closed.add(&context.counts);
                context.close().map_err(text)?;
            }
            Command::Group(place) => self.newest()?.add_group(place).map_err(text)?,
            Command::Channel(place) => self.newest()?.add_channel(place).map_err(text)?,
            Command::Ungroup => self.newest()?.remove_group().map_err(text)?,
            Command::Memory(bytes) => self.newest()?.allocate(bytes).map_err(text)?,
            Command::Graph(count) => self.newest()?.launch_graphs(count).map_err(text)?,
            Command::Pause | Command::Go => {
                self.launches = command == Command::Go;
                for context in &mut self.contexts {
                    context.arrive().map_err(text)?;
                }
            }
            Command::Count => {
                let mut all = self.closed;
                for context in &self.contexts {
                    all.add(&context.counts);
                }
                return Ok(format!(
                    "launched {} graphs {} ended {}",
                    all.launched, all.graphs, all.ended
                ));
            }
            // The caller's, for nothing comes after it.
            Command::Quit => {}
        }
        Ok("ok".to_owned())
    }

    fn newest(&mut self) -> Result<&mut Context, String> {
        self.contexts
            .last_mut()
            .ok_or_else(|| NO_CONTEXT.to_owned())
    }

    /// Waits until there is something to do; true when that is to end.
    fn wait(&mut self, parent: Option<&OwnedFd>) -> Result<bool, EngineError> {
        let left = self.due.map(|due| {
            let left = due.saturating_duration_since(Instant::now());
            Timespec {
                tv_sec: left.as_secs() as i64,
                tv_nsec: i64::from(left.subsec_nanos()),
            }
        });
        let watched = parent.map(AsFd::as_fd).into_iter();
        let contexts = self.contexts.iter().map(Context::wait_fd);
        let mut fds: Vec<_> = watched
            .chain(self.input.descriptor())
            .chain(contexts)
            .map(|descriptor| PollFd::from_borrowed_fd(descriptor, PollFlags::IN))
            .collect();
        match poll(&mut fds, left.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(EngineError::Failed(format!("cannot wait: {error}"))),
        }
        let ready = |place: usize| fds.get(place).is_some_and(|fd| !fd.revents().is_empty());
        let orphaned = parent.is_some() && ready(0);
        let spoken = self.input.is_open() && ready(usize::from(parent.is_some()));
        drop(fds);
        if spoken {
            self.input.read();
        }
        Ok(orphaned)
    }
}

const NO_CONTEXT: &str = "no context is open";

/// Says a line to whoever reads; it is all the same to the program if nobody does.
fn say(line: &str) {
    let _ = writeln!(std::io::stdout(), "{line}");
}
