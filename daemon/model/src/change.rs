//! What a write asks for, and how it can be refused.

use thiserror::Error;

use crate::snapshot::NodeId;
use crate::spec::{SpecError, WorkloadSpec};
use crate::value::{
    FreezeSet, PartitionName, PartitionRef, Priority, Quota, SmRequest, Switch, ValueError,
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
