//! The program `nvidia-cuda-mps-control`: as a daemon, and as the way to talk
//! to one.

use std::env;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use gcgroup_device::DeviceError;

use super::{LOG_VARIABLE, PIPE_VARIABLE, Places};
use crate::process::Process;

/// File name of the program.
pub(super) const CONTROL_PROGRAM: &str = "nvidia-cuda-mps-control";

/// Where drivers and container runtimes put it beside PATH.
const DIRECTORIES: [&str; 5] = [
    "/usr/bin",
    "/usr/local/bin",
    "/usr/local/nvidia/bin",
    "/opt/nvidia/bin",
    "/run/nvidia/driver/usr/bin",
];

/// The program, found.
#[derive(Clone, Debug)]
pub(crate) struct Program(pub(super) PathBuf);

impl Program {
    /// Looks in PATH and where drivers are installed.
    pub(crate) fn find() -> Result<Self, DeviceError> {
        let path = env::var_os("PATH").unwrap_or_default();
        let directories = env::split_paths(&path).chain(DIRECTORIES.map(PathBuf::from));
        let mut programs = directories.map(|directory| directory.join(CONTROL_PROGRAM));
        programs
            .find(|path| is_executable(path))
            .map(Self)
            .ok_or_else(|| {
                DeviceError::Unsupported(format!(
                    "there is no MPS: {CONTROL_PROGRAM} is neither in PATH nor in {}",
                    DIRECTORIES.join(", ")
                ))
            })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// The program with the variables of one private server and none of the
    /// service's own MPS variables.
    pub(super) fn command(&self, places: &Places) -> Command {
        let mut command = Command::new(&self.0);
        for (name, _) in env::vars_os() {
            let name_text = name.to_string_lossy();
            if name_text.starts_with("CUDA_MPS_") || name_text == "CUDA_DEVICE_MAX_CONNECTIONS" {
                command.env_remove(&name);
            }
        }
        // The server is looked up beside the control program first.
        let beside = self.0.parent().map(Path::to_owned);
        let path = env::var_os("PATH").unwrap_or_default();
        let path = beside.into_iter().chain(env::split_paths(&path));
        if let Ok(path) = env::join_paths(path) {
            command.env("PATH", path);
        }
        command
            .env(PIPE_VARIABLE, &places.pipe)
            .env(LOG_VARIABLE, &places.log)
            .current_dir("/");
        command
    }

    /// Gives one command to the daemon of this directory and returns what it
    /// answered. The helper that carries it is killed at the deadline, since a
    /// daemon that hangs keeps it for ever.
    pub(super) fn talk(
        &self,
        places: &Places,
        text: &str,
        deadline: Duration,
    ) -> Result<String, DeviceError> {
        let failed = |error: &dyn std::fmt::Display| {
            DeviceError::Failed(format!("{CONTROL_PROGRAM}, {text:?}: {error}"))
        };
        let mut child = self
            .command(places)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| failed(&error))?;
        let finished = feed_and_wait(&mut child, text, deadline);
        if !matches!(finished, Ok(true)) {
            // Either has happened already or is wanted now.
            let _ = child.kill();
        }
        let status = child.wait().map_err(|error| failed(&error))?;
        if !finished.map_err(|error| failed(&error))? {
            return Err(failed(&format_args!(
                "no answer within {} ms",
                deadline.as_millis()
            )));
        }
        let mut answer = String::new();
        let mut complaint = String::new();
        // An answer is far shorter than a pipe holds, so it lies there whole.
        if let Some(mut stdout) = child.stdout.take() {
            stdout
                .read_to_string(&mut answer)
                .map_err(|error| failed(&error))?;
        }
        if let Some(mut stderr) = child.stderr.take() {
            stderr
                .read_to_string(&mut complaint)
                .map_err(|error| failed(&error))?;
        }
        if !status.success() {
            let said = format!("{} {}", answer.trim(), complaint.trim());
            return Err(failed(&format_args!("{status}: {}", said.trim())));
        }
        Ok(answer)
    }
}

/// Hands the command over and waits; false when the deadline passed.
fn feed_and_wait(child: &mut Child, text: &str, deadline: Duration) -> std::io::Result<bool> {
    let process = Process::of_child(child)?;
    // Closed at the end of the statement: the program reads until then.
    match child.stdin.take() {
        Some(mut stdin) => match writeln!(stdin, "{text}") {
            // It ended before it read; its status says why.
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => {}
            other => other?,
        },
        None => return Err(std::io::ErrorKind::BrokenPipe.into()),
    }
    Ok(process.wait(deadline))
}

fn is_executable(path: &Path) -> bool {
    path.metadata()
        .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}
