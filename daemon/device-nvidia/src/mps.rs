//! A private MPS server, run as a child.
//!
//! `nvidia-cuda-mps-control -f` stays in the foreground and keeps its sockets
//! in a directory of its own, so other users' CUDA programs never meet it. It
//! starts `nvidia-cuda-mps-server` when the first client comes, under that
//! client's user: that user must be able to reach the directory, to connect to
//! `control` there and to write to the pipe `log`.
//!
//! What the service keeps in its directory:
//!
//! ```text
//! <directory>/            0755
//!   output.log            what the control daemon prints
//!   pipe/                 0755, CUDA_MPS_PIPE_DIRECTORY, made anew at each start
//!   log/                  0755, CUDA_MPS_LOG_DIRECTORY
//! ```

mod control;
pub(crate) mod orphan;

use std::fs::{self, File, Permissions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use gcgroup_device::{DeviceError, MpsServer};

pub(crate) use self::control::Program;
use crate::process::{self, Process};

/// File name of the program that serves the clients.
const SERVER_PROGRAM: &str = "nvidia-cuda-mps-server";

/// Variables of the control daemon, its server and its clients.
const PIPE_VARIABLE: &str = "CUDA_MPS_PIPE_DIRECTORY";
const LOG_VARIABLE: &str = "CUDA_MPS_LOG_DIRECTORY";

/// Length of a unix socket's path with its terminating zero (unix(7)).
const SOCKET_PATH_MAX: usize = 108;

/// The longest name that the control daemon is known to bind in its directory.
const LONGEST_SOCKET: &str = "control_privileged";

/// What the clients' user opens there. The other files are the daemon's own.
const CLIENT_FILES: [&str; 3] = ["control", "control_lock", "log"];

/// How long the control daemon may take to answer its first command.
const READY_DEADLINE: Duration = Duration::from_secs(10);
const READY_POLL: Duration = Duration::from_millis(20);

/// How long one command to it may take.
const COMMAND_DEADLINE: Duration = Duration::from_secs(3);

/// How long each step of ending it may take, from asking to killing.
const STEP_DEADLINE: Duration = Duration::from_secs(2);

/// Where the files of one server lie.
#[derive(Clone, Debug)]
struct Places {
    root: PathBuf,
    pipe: PathBuf,
    log: PathBuf,
}

impl Places {
    fn below(directory: &Path) -> Self {
        Self {
            root: directory.to_owned(),
            pipe: directory.join("pipe"),
            log: directory.join("log"),
        }
    }

    /// The kernel refuses longer paths, and MPS then fails without naming the
    /// reason.
    fn check_length(&self) -> Result<(), DeviceError> {
        let longest = self.pipe.join(LONGEST_SOCKET).as_os_str().len() + 1;
        if longest > SOCKET_PATH_MAX {
            let most = self.root.as_os_str().len() - (longest - SOCKET_PATH_MAX);
            return Err(DeviceError::Failed(format!(
                "the MPS directory {} is too long: a unix socket's path has at most {SOCKET_PATH_MAX} bytes, which leaves {most} for this directory",
                self.root.display()
            )));
        }
        Ok(())
    }

    /// Makes the directories anew. A pipe left over from an earlier server
    /// would look like a ready one.
    fn prepare(&self) -> std::io::Result<()> {
        match fs::remove_dir_all(&self.pipe) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        for directory in [&self.root, &self.pipe, &self.log] {
            fs::create_dir_all(directory)?;
            // Explicitly, since the service's umask may be narrower.
            fs::set_permissions(directory, Permissions::from_mode(0o755))?;
        }
        Ok(())
    }

    /// Directories above that only their owner may pass. A client of another
    /// user would find no server there.
    fn closed_ancestors(&self) -> Vec<PathBuf> {
        let ancestors = self.root.ancestors().skip(1);
        let closed = ancestors.filter(|directory| {
            fs::metadata(directory).is_ok_and(|meta| meta.permissions().mode() & 0o001 == 0)
        });
        closed.map(Path::to_owned).collect()
    }

    /// Lets clients of another user connect, whatever the umask was.
    fn open_to_clients(&self) -> std::io::Result<()> {
        for name in CLIENT_FILES {
            let path = self.pipe.join(name);
            let meta = match fs::symlink_metadata(&path) {
                Ok(meta) => meta,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            let kind = meta.file_type();
            let mode = meta.permissions().mode();
            if (kind.is_socket() || kind.is_fifo() || kind.is_file()) && mode & 0o666 != 0o666 {
                fs::set_permissions(&path, Permissions::from_mode(mode | 0o666))?;
            }
        }
        Ok(())
    }
}

/// A running control daemon and its servers. Dropping it ends them.
#[derive(Debug)]
pub(crate) struct Server {
    program: Program,
    places: Places,
    child: Child,
    /// The same child, for waiting with a deadline.
    process: Process,
    /// The program that serves the clients, once it has been seen.
    serving: Option<Process>,
    /// Set when that program ended under its clients.
    lost: bool,
}

impl Server {
    /// Starts a control daemon for one GPU and waits until it answers.
    pub(crate) fn start(
        program: Program,
        uuid: &str,
        directory: &Path,
    ) -> Result<Self, DeviceError> {
        let failed = |what: &str, error: &dyn std::fmt::Display| {
            DeviceError::Failed(format!("{what} {}: {error}", directory.display()))
        };
        // A relative path would mean another directory to its clients.
        let directory =
            &std::path::absolute(directory).map_err(|error| failed("MPS directory", &error))?;
        let places = Places::below(directory);
        places.check_length()?;
        places
            .prepare()
            .map_err(|error| failed("preparing the MPS directory", &error))?;
        for closed in places.closed_ancestors() {
            tracing::warn!(
                directory = %closed.display(),
                "clients of another user cannot reach the MPS server below this directory"
            );
        }
        let output = File::create(places.root.join("output.log"))
            .map_err(|error| failed("making the log in", &error))?;
        let errors = output
            .try_clone()
            .map_err(|error| failed("making the log in", &error))?;
        let mut child = program
            .command(&places)
            .arg("-f")
            .env("CUDA_VISIBLE_DEVICES", uuid)
            // ^C at a terminal is for the service, which ends its clients first.
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors)
            .spawn()
            .map_err(|error| {
                DeviceError::Failed(format!("starting {}: {error}", program.path().display()))
            })?;
        let process = match Process::of_child(&child) {
            Ok(process) => process,
            Err(errno) => {
                // It is our child: without a pidfd its pid is still its own.
                let _ = child.kill();
                let _ = child.wait();
                return Err(failed("watching the MPS control daemon of", &errno));
            }
        };
        let mut server = Self {
            program,
            places,
            child,
            process,
            serving: None,
            lost: false,
        };
        server.wait_until_ready()?;
        server
            .places
            .open_to_clients()
            .map_err(|error| failed("opening the pipes to clients in", &error))?;
        Ok(server)
    }

    fn wait_until_ready(&mut self) -> Result<(), DeviceError> {
        let deadline = Instant::now() + READY_DEADLINE;
        let mut last = "it made no control socket".to_owned();
        loop {
            if let Ok(Some(status)) = self.child.try_wait() {
                return Err(DeviceError::Failed(format!(
                    "the MPS control daemon ended with {status}: {}",
                    self.last_words()
                )));
            }
            if self.places.pipe.join("control").exists() {
                match self.command("get_server_list") {
                    Ok(_) => return Ok(()),
                    Err(error) => last = error.to_string(),
                }
            }
            if Instant::now() >= deadline {
                return Err(DeviceError::Failed(format!(
                    "the MPS control daemon was not ready after {} s: {last}; {}",
                    READY_DEADLINE.as_secs(),
                    self.last_words()
                )));
            }
            std::thread::sleep(READY_POLL);
        }
    }

    fn command(&self, text: &str) -> Result<String, DeviceError> {
        self.program.talk(&self.places, text, COMMAND_DEADLINE)
    }

    /// The end of what the control daemon printed and logged.
    fn last_words(&self) -> String {
        let logs = ["output.log", "log/control.log"].map(|name| {
            let text = fs::read(self.places.root.join(name)).unwrap_or_default();
            let text = String::from_utf8_lossy(&text).into_owned();
            let lines: Vec<&str> = text.lines().rev().take(3).collect();
            lines.into_iter().rev().collect::<Vec<_>>().join(" | ")
        });
        let said = logs.join(" | ");
        let said = said.trim_matches([' ', '|']);
        if said.is_empty() {
            "it said nothing".to_owned()
        } else {
            format!("it said: {said}")
        }
    }

    /// Asks, then ends what did not listen. Whatever happens, at the end
    /// neither the control daemon nor a server of it is left.
    fn end(&mut self) {
        let servers = orphan::servers_of(self.process.pid(), &self.places);
        if !self.process.has_ended() {
            let patience = match self.command("quit -t 1") {
                Ok(_) => STEP_DEADLINE,
                Err(error) => {
                    tracing::warn!(%error, "the MPS control daemon did not listen");
                    Duration::ZERO
                }
            };
            orphan::end_process(&self.process, patience);
        }
        if let Err(error) = self.child.wait() {
            tracing::warn!(%error, "the MPS control daemon was not waited for");
        }
        for server in servers.iter().chain(&self.serving) {
            orphan::end_process(server, Duration::ZERO);
        }
        // A client that still holds these variables must find nobody here.
        if let Err(error) = fs::remove_dir_all(&self.places.pipe) {
            tracing::debug!(%error, "the MPS pipes were not removed");
        }
    }
}

impl MpsServer for Server {
    /// CUDA_DEVICE_MAX_CONNECTIONS must not be among a client's variables:
    /// raising it lowers the number of clients that [`gcgroup_device::Mps::slots`]
    /// reports. Nor must CUDA_VISIBLE_DEVICES: the daemon has narrowed it already.
    fn environment(&self) -> Vec<(String, String)> {
        let text = |path: &Path| String::from_utf8_lossy(path.as_os_str().as_bytes()).into_owned();
        vec![
            (PIPE_VARIABLE.to_owned(), text(&self.places.pipe)),
            (LOG_VARIABLE.to_owned(), text(&self.places.log)),
        ]
    }

    fn process(&self) -> Option<(u32, u64)> {
        Some((self.process.pid(), self.process.start_time()))
    }

    fn is_alive(&mut self) -> bool {
        if self.lost || self.process.has_ended() {
            return false;
        }
        match &self.serving {
            // The control daemon would start another one for the next client,
            // but those that it had are lost with it.
            Some(serving) => self.lost = serving.has_ended(),
            None => {
                let children = process::children(self.process.pid());
                self.serving = children
                    .into_iter()
                    .filter(|pid| is_server(*pid))
                    .find_map(|pid| Process::open(pid).ok());
            }
        }
        !self.lost
    }

    fn stop(self: Box<Self>) {
        drop(self);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
    }
}

fn is_server(pid: u32) -> bool {
    process::program_name(pid).is_some_and(|name| name == SERVER_PROGRAM)
}

#[cfg(test)]
mod tests;
