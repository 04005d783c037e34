//! What a write asks for, and how it can be refused.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

use crate::row::File;
use crate::snapshot::NodeId;
use crate::spec::{SpecError, WorkloadSpec};
use crate::value::{
    FreezeSet, One, PartitionName, PartitionRef, Priority, Quota, SmRequest, Switch, ValueError,
    number,
};

/// A setting of one process on one GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Setting {
    /// compute.priority.
    Priority(Priority),
    /// compute.freeze.
    Freeze(Switch),
    /// compute.max.
    Max(Quota),
    /// compute.partition.
    Partition(PartitionRef),
    /// gcgroup.kill, which passes by whatever is pending.
    Kill,
}

impl Setting {
    /// The file that it is written to.
    #[must_use]
    pub fn file(&self) -> File {
        match self {
            Self::Priority(_) => File::Priority,
            Self::Freeze(_) => File::Freeze,
            Self::Max(_) => File::Max,
            Self::Partition(_) => File::Partition,
            Self::Kill => File::Kill,
        }
    }
}

/// The directory whose file was written.
///
/// It names a node, not a pid or a path: a pid that was given to another
/// process meanwhile is another node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target(pub NodeId);

/// One parsed write, mkdir or rmdir.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// A file of `processes/<pid>/<gpu>`.
    Set(Target, Setting),
    /// gcgroup.freeze.
    FreezeMany(FreezeSet),
    /// gcgroup.pending.
    Pend(Pending),
    /// sm.count of a partition.
    Resize(Target, SmRequest),
    /// mkdir in `partitions/<gpu>`.
    MakePartition {
        /// NVML index of the GPU.
        gpu: u32,
        /// Name of the new partition.
        name: PartitionName,
    },
    /// rmdir in `partitions/<gpu>`.
    RemovePartition {
        /// NVML index of the GPU.
        gpu: u32,
        /// Name of the partition.
        name: PartitionName,
    },
    /// gcgroup.launch.
    Launch(Box<WorkloadSpec>),
}

/// A setting that waits for the first GPU context of a process, or of one that
/// descends from it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pending {
    /// Thread-group id.
    pub pid: u32,
    /// What shall be set.
    pub setting: Setting,
}

impl Pending {
    /// The values that are allowed, in words.
    pub const ALLOWED: &str = "'PID FILE VALUE' with a FILE of compute.priority, compute.freeze and compute.max, and a VALUE that it takes";
}

impl FromStr for Pending {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let invalid = || ValueError::Invalid {
            found: text.to_owned(),
            allowed: Self::ALLOWED,
        };
        let mut words = text.splitn(3, ' ');
        let (Some(pid), Some(file), Some(value)) = (words.next(), words.next(), words.next())
        else {
            return Err(invalid());
        };
        let pid = u32::try_from(number(pid, Self::ALLOWED)?).map_err(|_| invalid())?;
        let named = |known: File| file == known.name();
        let setting = if named(File::Priority) {
            Setting::Priority(value.parse()?)
        } else if named(File::Freeze) {
            Setting::Freeze(value.parse()?)
        } else if named(File::Max) {
            Setting::Max(value.parse()?)
        } else {
            return Err(invalid());
        };
        Ok(Self { pid, setting })
    }
}

impl fmt::Display for Pending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} ", self.pid, self.setting.file().name())?;
        match &self.setting {
            Setting::Priority(value) => value.fmt(f),
            Setting::Freeze(value) => value.fmt(f),
            Setting::Max(value) => value.fmt(f),
            Setting::Partition(value) => value.fmt(f),
            Setting::Kill => One.fmt(f),
        }
    }
}

/// Who asked, for the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    /// Thread id in the service's pid namespace, as FUSE reports it.
    pub tid: u32,
    /// Effective user id.
    pub uid: u32,
}

/// What a change that came true has to say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Done {
    /// Nothing beyond its success.
    Quiet,
    /// A launched workload.
    Launched {
        /// Its process.
        pid: u32,
        /// NVML index of its GPU.
        gpu: u32,
        /// Its name.
        name: String,
    },
}

/// Why a change did not come true; one variant for each errno that
/// callers tell apart. Nothing has changed when one is returned, except for
/// [`Refusal::TimedOut`] with `begun`.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Refusal {
    /// EINVAL: outside the grammar or the range.
    #[error("{0}")]
    Invalid(String),
    /// ERANGE: a number that does not fit its type.
    #[error("{0}")]
    Range(String),
    /// EINVAL with the field of a spec that was wrong.
    #[error("{0}")]
    Spec(SpecError),
    /// The errno of another refusal, with the field of a spec that it concerns.
    #[error("{field}: {refusal}")]
    InField {
        /// Name of the field.
        field: &'static str,
        /// What was wrong with it.
        refusal: Box<Refusal>,
    },
    /// ENOENT: the named thing does not exist.
    #[error("there is no {0}")]
    NotFound(String),
    /// EEXIST: the name is taken.
    #[error("{0} exists already")]
    Exists(String),
    /// ENODEV: the process or the GPU is gone.
    #[error("{0} is gone")]
    Gone(String),
    /// ESRCH: no process with an entry has this pid.
    #[error("no process {0} on a GPU")]
    NoProcess(u32),
    /// EBUSY: something must end first.
    #[error("{0}")]
    Busy(String),
    /// EOPNOTSUPP: nothing can enforce it.
    #[error("{0}")]
    Unsupported(String),
    /// EPERM: not a thing that anybody may do here.
    #[error("{0}")]
    Denied(String),
    /// ENOSPC: not enough SMs or device memory.
    #[error("{0}")]
    NoSpace(String),
    /// ENOMEM: not enough host memory.
    #[error("{0}")]
    NoMemory(String),
    /// EIO: the mechanism failed.
    #[error("{0}")]
    Failed(String),
    /// ETIMEDOUT: the deadline passed.
    #[error("{what} was not done within {limit_ms} ms")]
    TimedOut {
        /// What was asked for.
        what: String,
        /// The deadline in milliseconds.
        limit_ms: u64,
        /// Whether it had begun, so that it runs to its end as `pending`.
        begun: Begun,
    },
}

/// Whether a change had begun when its deadline passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begun {
    /// It was withdrawn and will not happen.
    No,
    /// It runs to its end; `pending` in gcgroup.events tells when.
    Yes,
}

impl Refusal {
    /// This refusal, as one of a field of a spec.
    #[must_use]
    pub fn of_field(self, field: &'static str) -> Self {
        Self::InField {
            field,
            refusal: Box::new(self),
        }
    }
}

impl From<ValueError> for Refusal {
    fn from(error: ValueError) -> Self {
        match error {
            ValueError::Invalid { .. } => Self::Invalid(error.to_string()),
            ValueError::Range { .. } => Self::Range(error.to_string()),
        }
    }
}

impl From<SpecError> for Refusal {
    fn from(error: SpecError) -> Self {
        Self::Spec(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_waits_names_a_process_a_file_and_a_value() {
        for text in [
            "12 compute.priority 3",
            "12 compute.freeze 1",
            "12 compute.max 30000 100000",
            "12 compute.max max 100000",
        ] {
            let pending: Pending = text.parse().expect("it is in the grammar");
            assert_eq!(pending.to_string(), text);
        }
    }

    #[test]
    fn only_settings_that_can_wait_are_taken() {
        for text in [
            "",
            "12",
            "12 compute.priority",
            "12 compute.priority 16",
            "12 compute.partition a",
            "12 gcgroup.kill 1",
            "12 gcgroup.stat 1",
            "x compute.freeze 1",
            "4294967296 compute.freeze 1",
            "12  compute.freeze 1",
        ] {
            let error = text.parse::<Pending>().expect_err(text);
            assert!(matches!(error, ValueError::Invalid { .. }), "{text}");
        }
    }
}
