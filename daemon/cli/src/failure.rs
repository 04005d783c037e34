//! Why a command did not do what it was asked to.

use std::io;
use std::path::PathBuf;

use rustix::io::Errno;
use thiserror::Error;

/// A failure ends the program with [`Failure::exit_status`], save that a reader
/// of the output may go away.
#[derive(Debug, Error)]
pub(crate) enum Failure {
    /// Standard output could not be written.
    #[error("the output cannot be written")]
    Output(#[source] io::Error),
    /// Nothing serves the root.
    #[error("{0}")]
    NotServing(String),
    /// What was asked for is not in the tree.
    #[error("{0}")]
    Wrong(String),
    /// A control file or directory refused.
    #[error("{}: {sentence}", path.display())]
    File {
        /// The file or directory.
        path: PathBuf,
        /// What the kernel or the service answered, if it was they.
        errno: Option<Errno>,
        /// What was wrong and what is allowed.
        sentence: String,
    },
    /// The service answered a launch with an error.
    #[error("{}", launch_message(field, error))]
    Launch {
        /// The field that was wrong, empty where it is none of them.
        field: String,
        /// What was wrong with it.
        error: String,
        /// The errno of the write.
        errno: Option<Errno>,
    },
    /// Some of several targets failed, each reported when it did.
    #[error("{failed} of {all} failed")]
    Several {
        /// Targets that failed.
        failed: usize,
        /// Targets that were named.
        all: usize,
    },
    /// What came later failed when some processes had been changed.
    #[error("{done} of the processes changed, then this failed")]
    Partly {
        /// Processes that were changed and stay so.
        done: usize,
        /// What failed.
        #[source]
        failure: Box<Failure>,
    },
    /// The command of `run` was not started.
    #[error("{sentence}")]
    NotStarted {
        /// What a shell would end with: 127 for a command that was not found,
        /// 126 for one that cannot be executed.
        status: u8,
        /// What was wrong.
        sentence: String,
    },
}

impl Failure {
    /// Whether the file went away, as an entry does when its process ends.
    pub(crate) fn is_gone(&self) -> bool {
        matches!(
            self,
            Self::File {
                errno: Some(Errno::NOENT | Errno::NODEV),
                ..
            }
        )
    }

    /// The errno behind it.
    pub(crate) fn errno(&self) -> Option<Errno> {
        match self {
            Self::File { errno, .. } | Self::Launch { errno, .. } => *errno,
            Self::Output(error) => Errno::from_io_error(error),
            Self::Partly { failure, .. } => failure.errno(),
            Self::NotServing(_)
            | Self::Wrong(_)
            | Self::Several { .. }
            | Self::NotStarted { .. } => None,
        }
    }

    /// The program's exit status.
    pub(crate) fn exit_status(&self) -> u8 {
        match self {
            Self::NotStarted { status, .. } => *status,
            Self::Output(_)
            | Self::NotServing(_)
            | Self::Wrong(_)
            | Self::File { .. }
            | Self::Launch { .. }
            | Self::Several { .. }
            | Self::Partly { .. } => 1,
        }
    }
}

fn launch_message(field: &str, error: &str) -> String {
    // The service may have put the field in front of its sentence already.
    if field.is_empty() || error.starts_with(&format!("{field}:")) {
        format!("not launched: {error}")
    } else {
        format!("not launched: {field}: {error}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_launch_names_its_field_once() {
        assert_eq!(launch_message("ilp", "1 to 4"), "not launched: ilp: 1 to 4");
        assert_eq!(
            launch_message("ilp", "ilp: 1 to 4"),
            "not launched: ilp: 1 to 4"
        );
        assert_eq!(launch_message("", "no GPU"), "not launched: no GPU");
    }
}
