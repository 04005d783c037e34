//! The program's children, and what a child has of its parent.

use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};

use gcgroup_kernels::engine::EngineError;
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, getppid, pidfd_open};

use super::AppOptions;

/// Variable that makes a process a child: the process id of its parent.
const PARENT_VARIABLE: &str = "GCGROUP_SIM_PARENT";

/// A descriptor of the parent, readable when it has ended: `Some(None)` for a
/// process that is no child, `None` for one whose parent is gone already.
pub(super) fn parent() -> Result<Option<Option<OwnedFd>>, EngineError> {
    let Ok(text) = std::env::var(PARENT_VARIABLE) else {
        return Ok(Some(None));
    };
    let expected = text.parse().ok().and_then(Pid::from_raw);
    let expected = expected.ok_or_else(|| {
        EngineError::Unsupported(format!("{PARENT_VARIABLE}={text:?} is no process"))
    })?;
    match pidfd_open(expected, PidfdFlags::empty()) {
        // The number may be another process's by now.
        Ok(parent) if getppid() == Some(expected) => Ok(Some(Some(parent))),
        Ok(_) | Err(Errno::SRCH) => Ok(None),
        Err(error) => Err(EngineError::Failed(format!(
            "cannot watch the parent: {error}"
        ))),
    }
}

/// The children of this process. They end by themselves when it does, and when
/// this value goes.
pub(super) struct Children(Vec<Child>);

impl Children {
    pub(super) fn start(options: &AppOptions) -> Result<Self, EngineError> {
        let failed =
            |error: std::io::Error| EngineError::Failed(format!("cannot start a child: {error}"));
        let mut children = Self(Vec::new());
        // A child that has the variable has no children, whatever its arguments say.
        if std::env::var_os(PARENT_VARIABLE).is_some() {
            return Ok(children);
        }
        let executable = std::env::current_exe().map_err(failed)?;
        for _ in 0..options.children {
            let child = Command::new(&executable)
                .args(&options.child_arguments)
                .env(PARENT_VARIABLE, std::process::id().to_string())
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .spawn()
                .map_err(failed)?;
            children.0.push(child);
        }
        Ok(children)
    }

    pub(super) fn pids(&self) -> impl Iterator<Item = u32> {
        self.0.iter().map(Child::id)
    }
}

impl Drop for Children {
    fn drop(&mut self) {
        for child in &mut self.0 {
            // One that has ended is waited for all the same.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
