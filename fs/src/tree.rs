//! The tree: which directories and files there are, what they are called and
//! which inode number each has.
//!
//! Nothing here is stored: every question is answered from the snapshot that is
//! passed in, so the tree is never older than what reads show. Only the way back
//! from an inode number to a directory is remembered, in [`Inodes`].

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};

use gcgroup_model::row::{GroupWrites, SELF_LINK, rows_of};
use gcgroup_model::snapshot::{Entry, Gpu, NodeId, Partition, Process};
use gcgroup_model::value::PartitionName;
use gcgroup_model::{File, Place, ROWS, Snapshot};
use parking_lot::RwLock;

use crate::table::Subject;

/// Directory of the symlinks from names to processes, which has no rows.
const WORKLOADS: &str = "workloads";

/// Directories of the mount point in the order in which they are listed: the
/// first parts of the places' paths, and the one without rows.
fn top(directory: &Directory) -> Option<&'static str> {
    let place = match directory {
        Directory::Devices => Place::Gpu,
        Directory::Partitions => Place::Partition,
        Directory::Processes => Place::Processes,
        Directory::Workloads => return Some(WORKLOADS),
        _ => return None,
    };
    place.pattern().split('/').next()
}

const TOP: [Directory; 4] = [
    Directory::Devices,
    Directory::Partitions,
    Directory::Processes,
    Directory::Workloads,
];

/// A directory, to be found again in any later snapshot. The node tells it from
/// another one that later has its name.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Directory {
    /// The mount point.
    Root,
    /// `devices`.
    Devices,
    /// `partitions`.
    Partitions,
    /// `processes`.
    Processes,
    /// `workloads`.
    Workloads,
    /// `devices/<gpu>`.
    Gpu(NodeId, u32),
    /// `partitions/<gpu>`.
    GpuPartitions(NodeId, u32),
    /// `partitions/<gpu>/<name>`.
    Partition(NodeId, u32, PartitionName),
    /// `processes/<pid>`.
    Process(NodeId, u32),
    /// `processes/<pid>/<gpu>`.
    Entry(NodeId, u32, u32),
}

/// Anything that has a name in a directory.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Object {
    /// A directory.
    Directory(Directory),
    /// A control file and the directory that holds it.
    File(Directory, File),
    /// `processes/self`.
    SelfLink,
    /// `workloads/<name>` of the process on a GPU with this node, pid and GPU.
    WorkloadLink(NodeId, u32, u32),
}

/// What an object is to stat(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A directory.
    Directory,
    /// A regular file.
    File,
    /// A symlink.
    Link,
}

/// For how long the kernel may believe a name without asking again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lasting {
    /// As long as the directory that holds it.
    Always,
    /// It comes and goes with processes, partitions and GPUs.
    Shortly,
    /// Not even for the next caller.
    Never,
}

impl Directory {
    /// What the directory is in `snapshot`, `None` when it is gone.
    pub(crate) fn subject<'a>(&self, snapshot: &'a Snapshot) -> Option<Subject<'a>> {
        match self {
            Self::Root | Self::Devices | Self::Partitions | Self::Processes | Self::Workloads => {
                Some(Subject::Whole)
            }
            Self::Gpu(node, gpu) => {
                let gpu = snapshot.gpus.get(gpu)?;
                (gpu.node == *node).then_some(Subject::Gpu(gpu))
            }
            Self::GpuPartitions(node, gpu) => {
                let gpu = snapshot.gpus.get(gpu)?;
                (gpu.partitions_node == *node).then_some(Subject::Whole)
            }
            Self::Partition(node, gpu, name) => {
                let partition = snapshot.partitions.get(&(*gpu, name.clone()))?;
                let stands = partition.node == *node && snapshot.gpus.contains_key(gpu);
                stands.then_some(Subject::Partition(partition))
            }
            Self::Process(node, pid) => {
                let process = snapshot.processes.get(pid)?;
                (process.node == *node).then_some(Subject::Process(process))
            }
            Self::Entry(node, pid, gpu) => {
                let entry = snapshot.processes.get(pid)?.gpus.get(gpu)?;
                (entry.node == *node).then_some(Subject::Entry(entry))
            }
        }
    }

    /// Rows that the directory holds, `None` for a directory without any.
    fn place(&self, subject: &Subject<'_>) -> Option<Place> {
        match (self, subject) {
            (Self::Root, _) => Some(Place::Root),
            (Self::Processes, _) => Some(Place::Processes),
            (_, Subject::Gpu(_)) => Some(Place::Gpu),
            (_, Subject::Partition(_)) => Some(Place::Partition),
            (_, Subject::Process(_)) => Some(Place::Process),
            (_, Subject::Entry(entry)) if entry.workload.is_some() => Some(Place::Workload),
            (_, Subject::Entry(_)) => Some(Place::ProcessGpu),
            (_, Subject::Whole) => None,
        }
    }

    /// What `name` is in this directory; `processes/self` depends on the caller
    /// and is not found here.
    pub(crate) fn child(&self, snapshot: &Snapshot, name: &str) -> Option<Object> {
        let subject = self.subject(snapshot)?;
        if let Some(place) = self.place(&subject)
            && let Some(row) = rows_of(place).find(|row| row.name == name)
        {
            return Some(Object::File(self.clone(), row.file));
        }
        let directory = match (self, subject) {
            (Self::Root, _) => TOP
                .into_iter()
                .find(|directory| top(directory) == Some(name))?,
            (Self::Devices, _) => of_gpu(snapshot.gpus.get(&number(name)?)?),
            (Self::Partitions, _) => partitions_of(snapshot.gpus.get(&number(name)?)?),
            (Self::GpuPartitions(_, gpu), _) => {
                of_partition(snapshot.partitions.get(&(*gpu, name.parse().ok()?))?)
            }
            (Self::Processes, _) => of_process(snapshot.processes.get(&number(name)?)?),
            (Self::Workloads, _) => {
                let (_, link) = links(snapshot).find(|(link, _)| *link == name)?;
                return Some(link);
            }
            (_, Subject::Process(process)) => of_entry(process.gpus.get(&number(name)?)?),
            (_, _) => return None,
        };
        Some(Object::Directory(directory))
    }

    /// Everything that readdir lists, `None` when the directory is gone.
    pub(crate) fn children(&self, snapshot: &Snapshot) -> Option<Vec<(String, Object)>> {
        let subject = self.subject(snapshot)?;
        let mut list = Vec::new();
        if let Some(place) = self.place(&subject) {
            list.extend(rows_of(place).map(|row| {
                let object = Object::File(self.clone(), row.file);
                (row.name.to_owned(), object)
            }));
        }
        let mut add = |name: String, directory| list.push((name, Object::Directory(directory)));
        match (self, subject) {
            (Self::Root, _) => {
                for directory in TOP {
                    add(top(&directory).unwrap_or_default().to_owned(), directory);
                }
            }
            (Self::Devices, _) => {
                for (index, gpu) in &snapshot.gpus {
                    add(index.to_string(), of_gpu(gpu));
                }
            }
            (Self::Partitions, _) => {
                for (index, gpu) in &snapshot.gpus {
                    add(index.to_string(), partitions_of(gpu));
                }
            }
            (Self::GpuPartitions(_, gpu), _) => {
                for ((of, name), partition) in &snapshot.partitions {
                    if of == gpu {
                        add(name.to_string(), of_partition(partition));
                    }
                }
            }
            (Self::Processes, _) => {
                for (pid, process) in &snapshot.processes {
                    add(pid.to_string(), of_process(process));
                }
            }
            (Self::Workloads, _) => {
                list.extend(links(snapshot).map(|(name, link)| (name.to_owned(), link)));
            }
            (_, Subject::Process(process)) => {
                for (gpu, entry) in &process.gpus {
                    add(gpu.to_string(), of_entry(entry));
                }
            }
            (_, _) => {}
        }
        Some(list)
    }

    /// Number that stands for the directory in inode numbers.
    fn part(&self) -> u64 {
        let dynamic = |node: &NodeId| STATIC_PARTS + node.0;
        match self {
            Self::Root => 0,
            Self::Devices => 1,
            Self::Partitions => 2,
            Self::Processes => 3,
            Self::Workloads => 4,
            Self::Gpu(node, _)
            | Self::GpuPartitions(node, _)
            | Self::Partition(node, _, _)
            | Self::Process(node, _)
            | Self::Entry(node, _, _) => dynamic(node),
        }
    }
}

fn of_gpu(gpu: &Gpu) -> Directory {
    Directory::Gpu(gpu.node, gpu.index)
}

fn partitions_of(gpu: &Gpu) -> Directory {
    Directory::GpuPartitions(gpu.partitions_node, gpu.index)
}

fn of_partition(partition: &Partition) -> Directory {
    Directory::Partition(partition.node, partition.gpu, partition.name.clone())
}

fn of_process(process: &Process) -> Directory {
    Directory::Process(process.node, process.pid)
}

fn of_entry(entry: &Entry) -> Directory {
    Directory::Entry(entry.node, entry.pid, entry.gpu)
}

/// Names of the launched workloads and their symlinks.
fn links(snapshot: &Snapshot) -> impl Iterator<Item = (&str, Object)> {
    snapshot
        .processes
        .values()
        .flat_map(|process| process.gpus.values())
        .filter_map(|entry| {
            let link = Object::WorkloadLink(entry.node, entry.pid, entry.gpu);
            Some((entry.workload.as_ref()?.name.as_str(), link))
        })
}

/// A number as the tree spells it: `07` or `+7` is another name, of nothing.
fn number(name: &str) -> Option<u32> {
    let number: u32 = name.parse().ok()?;
    (number.to_string() == name).then_some(number)
}

impl Object {
    /// What it is to stat(2).
    pub(crate) fn kind(&self) -> Kind {
        match self {
            Self::Directory(_) => Kind::Directory,
            Self::File(_, _) => Kind::File,
            Self::SelfLink | Self::WorkloadLink(_, _, _) => Kind::Link,
        }
    }

    /// Permission bits.
    pub(crate) fn mode(&self, group_writes: GroupWrites) -> u16 {
        match (self, group_writes) {
            (Self::Directory(Directory::GpuPartitions(_, _)), GroupWrites::Yes) => 0o775,
            (Self::Directory(_), _) => 0o755,
            (Self::File(_, file), _) => file.row().mode.bits(group_writes),
            (Self::SelfLink | Self::WorkloadLink(_, _, _), _) => 0o777,
        }
    }

    /// For how long its name lasts.
    pub(crate) fn lasting(&self) -> Lasting {
        match self {
            Self::Directory(
                Directory::Root
                | Directory::Devices
                | Directory::Partitions
                | Directory::Processes
                | Directory::Workloads,
            ) => Lasting::Always,
            Self::Directory(_) | Self::WorkloadLink(_, _, _) => Lasting::Shortly,
            Self::File(directory, file) if is_shared(directory, *file) => Lasting::Never,
            Self::File(_, _) => Lasting::Always,
            Self::SelfLink => Lasting::Never,
        }
    }

    /// Its inode number, the same for as long as it exists.
    pub(crate) fn ino(&self) -> u64 {
        let (part, slot) = match self {
            Self::Directory(directory) => (directory.part(), SLOT_DIRECTORY),
            Self::File(directory, file) => (directory.part(), SLOT_FILES + *file as u64),
            Self::SelfLink => (Directory::Processes.part(), SLOT_LINK),
            Self::WorkloadLink(node, _, _) => (STATIC_PARTS + node.0, SLOT_LINK),
        };
        part << SLOT_BITS | slot
    }

    /// Text of a symlink, `None` for anything else. `pid` is the caller's
    /// process, if it has an entry.
    pub(crate) fn link(&self, pid: Option<u32>) -> Option<String> {
        match self {
            Self::SelfLink => pid.map(|pid| pid.to_string()),
            Self::WorkloadLink(_, pid, gpu) => {
                let processes = top(&Directory::Processes)?;
                Some(format!("../{processes}/{pid}/{gpu}"))
            }
            Self::Directory(_) | Self::File(_, _) => None,
        }
    }

    /// Whether it still exists. `processes/self` does, for whoever finds it.
    pub(crate) fn exists(&self, snapshot: &Snapshot) -> bool {
        match self {
            Self::Directory(directory) | Self::File(directory, _) => {
                directory.subject(snapshot).is_some()
            }
            Self::SelfLink => true,
            Self::WorkloadLink(node, pid, gpu) => Directory::Entry(*node, *pid, *gpu)
                .subject(snapshot)
                .is_some(),
        }
    }
}

/// Whether writes to a file are for several processes. The kernel lets one write
/// to an inode at a time, and a caller that waits for its turn cannot be killed;
/// so each lookup of such a file makes an inode of its own, and a launch that
/// takes long holds up no other.
fn is_shared(directory: &Directory, file: File) -> bool {
    *directory == Directory::Root && file.row().mode.writable()
}

// An inode number is the directory's number and a slot in it. Slot 1 is the
// directory itself, so that the mount point gets the 1 that FUSE asks for. With
// the highest bit set it is one of many for a file of the mount point, and the
// bits between are a count.
const SLOT_BITS: u32 = 8;
const SLOT_DIRECTORY: u64 = 1;
const SLOT_FILES: u64 = 2;
const SLOT_LINK: u64 = 0xff;
const STATIC_PARTS: u64 = 16;
const ONE_OF_MANY: u64 = 1 << 63;

const _: () = assert!(SLOT_FILES + (File::WorkloadSamples as u64) < SLOT_LINK);

/// Number of directories that are remembered before the gone ones are looked for.
const SWEEP_FROM: usize = 1024;

/// The way back from inode numbers. A directory is remembered from its first
/// lookup, which the kernel makes before it uses the number, until it is gone.
#[derive(Debug)]
pub(crate) struct Inodes {
    known: RwLock<Known>,
    many: AtomicU64,
}

#[derive(Debug)]
struct Known {
    directories: HashMap<NodeId, Directory>,
    sweep_at: usize,
}

impl Inodes {
    pub(crate) fn new() -> Self {
        Self {
            known: RwLock::new(Known {
                directories: HashMap::new(),
                sweep_at: SWEEP_FROM,
            }),
            many: AtomicU64::new(0),
        }
    }

    /// The number to give for a lookup that found `object`.
    pub(crate) fn found(&self, object: &Object, snapshot: &Snapshot) -> u64 {
        match object {
            Object::File(directory, file) if is_shared(directory, *file) => {
                let count = self.many.fetch_add(1, Ordering::Relaxed);
                ONE_OF_MANY | ((count << SLOT_BITS) & !ONE_OF_MANY) | (SLOT_FILES + *file as u64)
            }
            Object::Directory(directory) => {
                self.remember(directory, snapshot);
                object.ino()
            }
            Object::WorkloadLink(node, pid, gpu) => {
                self.remember(&Directory::Entry(*node, *pid, *gpu), snapshot);
                object.ino()
            }
            Object::File(_, _) | Object::SelfLink => object.ino(),
        }
    }

    fn remember(&self, directory: &Directory, snapshot: &Snapshot) {
        let node = match directory {
            Directory::Gpu(node, _)
            | Directory::GpuPartitions(node, _)
            | Directory::Partition(node, _, _)
            | Directory::Process(node, _)
            | Directory::Entry(node, _, _) => *node,
            Directory::Root
            | Directory::Devices
            | Directory::Partitions
            | Directory::Processes
            | Directory::Workloads => return,
        };
        if self.known.read().directories.contains_key(&node) {
            return;
        }
        let mut known = self.known.write();
        known.directories.insert(node, directory.clone());
        if known.directories.len() >= known.sweep_at {
            // A node that is gone never comes back, so its number needs no way.
            known
                .directories
                .retain(|_, directory| directory.subject(snapshot).is_some());
            known.sweep_at = SWEEP_FROM.max(known.directories.len() * 2);
        }
    }

    /// The object with this number, `None` when it was gone long ago.
    pub(crate) fn object(&self, ino: u64) -> Option<Object> {
        let slot = ino & ((1 << SLOT_BITS) - 1);
        let part = if ino & ONE_OF_MANY != 0 {
            Directory::Root.part()
        } else {
            ino >> SLOT_BITS
        };
        let directory = match part {
            0 => Directory::Root,
            1 => Directory::Devices,
            2 => Directory::Partitions,
            3 => Directory::Processes,
            4 => Directory::Workloads,
            _ => {
                let node = NodeId(part.checked_sub(STATIC_PARTS)?);
                self.known.read().directories.get(&node)?.clone()
            }
        };
        match (slot, directory) {
            (SLOT_DIRECTORY, directory) => Some(Object::Directory(directory)),
            (SLOT_LINK, Directory::Processes) => Some(Object::SelfLink),
            (SLOT_LINK, Directory::Entry(node, pid, gpu)) => {
                Some(Object::WorkloadLink(node, pid, gpu))
            }
            (slot, directory) => {
                let index = usize::try_from(slot.checked_sub(SLOT_FILES)?).ok()?;
                Some(Object::File(directory, ROWS.get(index)?.file))
            }
        }
    }
}

/// Whether a name in a directory is the symlink to the caller's own process.
pub(crate) fn is_self(directory: &Directory, name: &str) -> bool {
    *directory == Directory::Processes && name == SELF_LINK
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mount_point_has_the_number_that_fuse_asks_for() {
        assert_eq!(Object::Directory(Directory::Root).ino(), 1);
    }

    #[test]
    fn numbers_lead_back_to_their_objects() {
        let inodes = Inodes::new();
        let snapshot = Snapshot::default();
        let entry = Directory::Entry(NodeId(5), 7, 0);
        let objects = [
            Object::Directory(Directory::Root),
            Object::Directory(Directory::Workloads),
            Object::Directory(entry.clone()),
            Object::File(entry, File::WorkloadSamples),
            Object::File(Directory::Root, File::Version),
            Object::File(Directory::Processes, File::ProcessList),
            Object::WorkloadLink(NodeId(5), 7, 0),
            Object::SelfLink,
        ];
        for object in objects {
            let ino = inodes.found(&object, &snapshot);
            assert_eq!(ino, object.ino(), "{object:?}");
            assert_eq!(inodes.object(ino), Some(object));
        }
        assert_eq!(
            inodes.object(Object::Directory(Directory::Gpu(NodeId(6), 0)).ino()),
            None
        );
    }

    #[test]
    fn a_file_that_several_processes_share_gets_a_number_at_each_lookup() {
        let inodes = Inodes::new();
        let snapshot = Snapshot::default();
        for row in ROWS.iter().filter(|row| row.place == Place::Root) {
            let object = Object::File(Directory::Root, row.file);
            let first = inodes.found(&object, &snapshot);
            let second = inodes.found(&object, &snapshot);
            assert_eq!(first != second, row.mode.writable(), "{}", row.name);
            assert_eq!(inodes.object(first), Some(object.clone()));
            assert_eq!(inodes.object(second), Some(object));
        }
    }

    #[test]
    fn directories_that_are_gone_are_forgotten() {
        let inodes = Inodes::new();
        let snapshot = Snapshot::default();
        for node in 0..10 * SWEEP_FROM as u64 {
            let gone = Object::Directory(Directory::Process(NodeId(node), 7));
            inodes.found(&gone, &snapshot);
        }
        assert!(inodes.known.read().directories.len() <= SWEEP_FROM);
    }

    #[test]
    fn a_number_has_one_spelling() {
        assert_eq!(number("7"), Some(7));
        assert_eq!(number("0"), Some(0));
        for name in ["", "07", "+7", "-1", " 7", "7 ", "4294967296", "x"] {
            assert_eq!(number(name), None, "{name:?}");
        }
    }
}
