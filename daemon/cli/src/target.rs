//! What a command acts on, and which files are there.

use std::path::PathBuf;

use gcgroup_model::{File, Place, Row, row};

use crate::failure::Failure;
use crate::proc;
use crate::tree::{EntryId, Tree, WORKLOADS, below};

/// A directory of the tree that exists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// The mount point.
    Root,
    /// `devices/<gpu>`.
    Gpu(u32),
    /// `partitions/<gpu>/<name>`.
    Partition(u32, String),
    /// `processes`.
    Processes,
    /// A process without a word on which GPU is meant.
    Process {
        /// Thread-group id.
        pid: u32,
        /// The GPUs it uses.
        gpus: Vec<u32>,
    },
    /// A process on one GPU.
    Entry(EntryId),
}

impl Target {
    /// The target that a user named.
    ///
    /// # Errors
    /// [`Failure::Wrong`] when it does not exist.
    pub(crate) fn find(tree: &Tree, text: &str) -> Result<Self, Failure> {
        if text == "/" {
            return Ok(Self::Root);
        }
        let root = tree.root().to_string_lossy();
        let inside = text
            .strip_prefix(root.trim_end_matches('/'))
            .filter(|rest| rest.is_empty() || rest.starts_with('/'))
            .unwrap_or(text);
        let parts: Vec<&str> = inside.split('/').filter(|part| !part.is_empty()).collect();
        let found = match parts.as_slice() {
            [] if !text.is_empty() => Some(Self::Root),
            [pid] if number(pid).is_some() => Self::process(tree, pid)?,
            [pid, gpu] if number(pid).is_some() => Self::entry(tree, pid, gpu),
            [first, rest @ ..] if Some(*first) == head(Place::Process) => match rest {
                [] => Some(Self::Processes),
                [pid] => Self::process(tree, pid)?,
                [pid, gpu] => Self::entry(tree, pid, gpu),
                _ => None,
            },
            [first, gpu] if Some(*first) == head(Place::Gpu) => {
                number(gpu).map(Self::Gpu).filter(|gpu| gpu.exists_in(tree))
            }
            [first, gpu, name] if Some(*first) == head(Place::Partition) => number(gpu)
                .map(|gpu| Self::Partition(gpu, (*name).to_owned()))
                .filter(|partition| partition.exists_in(tree)),
            [WORKLOADS, name] | [name] => tree.workload(name).map(Self::Entry),
            _ => None,
        };
        found.ok_or_else(|| {
            let pid = match parts.as_slice() {
                [first, pid, ..] if Some(*first) == head(Place::Process) => number(pid),
                [pid, ..] => number(pid),
                [] => None,
            };
            Failure::Wrong(pid.map_or_else(|| unknown(tree, text), |pid| absent(tree, pid, text)))
        })
    }

    fn process(tree: &Tree, pid: &str) -> Result<Option<Self>, Failure> {
        let Some(pid) = number(pid) else {
            return Ok(None);
        };
        let gpus = tree.gpus_of(pid)?;
        Ok((!gpus.is_empty()).then_some(Self::Process { pid, gpus }))
    }

    fn entry(tree: &Tree, pid: &str, gpu: &str) -> Option<Self> {
        let (pid, gpu) = (number(pid)?, number(gpu)?);
        Some(Self::Entry(EntryId { pid, gpu })).filter(|entry| entry.exists_in(tree))
    }

    fn exists_in(&self, tree: &Tree) -> bool {
        tree.root().join(self.directory()).is_dir()
    }

    /// Its directory below the mount point.
    pub(crate) fn directory(&self) -> PathBuf {
        match self {
            Self::Root => PathBuf::new(),
            Self::Gpu(gpu) => below(Place::Gpu, &[&gpu.to_string()]),
            Self::Partition(gpu, name) => below(Place::Partition, &[&gpu.to_string(), name]),
            Self::Processes => below(Place::Processes, &[]),
            Self::Process { pid, .. } => below(Place::Process, &[&pid.to_string()]),
            Self::Entry(entry) => entry.directory(),
        }
    }

    /// The rows that can be there, in table order. A process has those of its
    /// own directory and those of its directory on a GPU.
    pub(crate) fn rows(&self) -> Vec<&'static Row> {
        let place = match self {
            Self::Root => Place::Root,
            Self::Gpu(_) => Place::Gpu,
            Self::Partition(..) => Place::Partition,
            Self::Processes => Place::Processes,
            Self::Process { .. } | Self::Entry(_) => {
                return row::rows_of(Place::Process)
                    .chain(row::rows_of(Place::Workload))
                    .collect();
            }
        };
        row::rows_of(place).collect()
    }

    /// The row of that name.
    ///
    /// # Errors
    /// [`Failure::Wrong`] with the names that there are.
    pub(crate) fn row(&self, name: &str) -> Result<&'static Row, Failure> {
        let rows = self.rows();
        if let Some(row) = rows.iter().find(|row| row.name == name) {
            return Ok(row);
        }
        let names: Vec<_> = rows.iter().map(|row| row.name).collect();
        Err(Failure::Wrong(format!(
            "{} has no control file {name:?}; it has {}",
            self.directory().display(),
            names.join(", ")
        )))
    }

    /// The directory that holds the file of a row from [`Target::rows`].
    ///
    /// # Errors
    /// [`Failure::Wrong`] when the process uses several GPUs and the row is
    /// one of a GPU.
    pub(crate) fn directory_of(&self, row: &Row) -> Result<PathBuf, Failure> {
        match (self, row.place) {
            (Self::Entry(entry), Place::Process) => {
                Ok(below(Place::Process, &[&entry.pid.to_string()]))
            }
            (Self::Process { pid, gpus }, Place::ProcessGpu | Place::Workload) => {
                match gpus.as_slice() {
                    [gpu] => Ok(EntryId {
                        pid: *pid,
                        gpu: *gpu,
                    }
                    .directory()),
                    _ => Err(several_gpus(*pid, gpus)),
                }
            }
            _ => Ok(self.directory()),
        }
    }
}

/// A process uses several GPUs and none was named.
fn several_gpus(pid: u32, gpus: &[u32]) -> Failure {
    let choices: Vec<_> = gpus.iter().map(|gpu| format!("{pid}/{gpu}")).collect();
    Failure::Wrong(format!(
        "process {pid} uses several GPUs; name one of {}",
        choices.join(", ")
    ))
}

/// Digits and nothing else, so that no sign or blank passes for a pid.
fn number(text: &str) -> Option<u32> {
    text.bytes()
        .all(|byte| byte.is_ascii_digit())
        .then(|| text.parse().ok())
        .flatten()
}

/// First component of a place's path.
fn head(place: Place) -> Option<&'static str> {
    place.pattern().split('/').next()
}

/// Why a process has not the directory that was named.
fn absent(tree: &Tree, pid: u32, text: &str) -> String {
    let gpus = tree.gpus_of(pid).unwrap_or_default();
    if !gpus.is_empty() {
        let choices: Vec<_> = gpus.iter().map(|gpu| format!("{pid}/{gpu}")).collect();
        return format!(
            "there is no {text:?}; process {pid} has {}",
            choices.join(", ")
        );
    }
    match proc::thread_group(pid) {
        None => format!("there is no process {pid}"),
        Some(process) if process != pid => {
            format!("{pid} is a thread of process {process}; name that")
        }
        Some(_) => format!(
            "process {pid} has no GPU context that gcgroupd knows of, so it has no control files; \
             a setting waits for its first one after: gcgroup set / {} {pid} {} 12",
            File::Pending.name(),
            File::Priority.name()
        ),
    }
}

fn unknown(tree: &Tree, text: &str) -> String {
    let names = tree.names(WORKLOADS.as_ref()).unwrap_or_default();
    let known = if names.is_empty() {
        "there are no workloads".to_owned()
    } else {
        format!("the workloads are {}", names.join(", "))
    };
    format!("there is no process, workload or directory {text:?}; {known}")
}
