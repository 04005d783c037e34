//! A mounted tree, the service behind it and ways to look at it.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use gcgroup_fs::{MountError, Mounted, Options, Reply, Service};
use gcgroup_model::change::{Caller, Done, Setting};
use gcgroup_model::row::GroupWrites;
use gcgroup_model::snapshot::{
    DeviceEvents, Enforcer, Entry, EntryEvents, Gpu, NodeId, Partition, Process, Sample, Settings,
    Stat, Workload,
};
use gcgroup_model::value::{PartitionName, SmRequest};
use gcgroup_model::{Change, File, Refusal, Snapshot};
use parking_lot::Mutex;
use rustix::io::Errno;
use tempfile::TempDir;

/// A workload, on GPU 0.
pub(crate) const LAUNCHED: u32 = 4_100_001;
/// A process that was not launched, on GPU 0.
pub(crate) const ATTACHED: u32 = 4_100_002;
/// Group of the mounted files.
pub(crate) const GROUP: u32 = 4321;

/// What the service does with the next changes.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Mood {
    /// Does them.
    Obeys,
    /// Refuses them.
    Refuses(Refusal),
    /// Keeps them unanswered.
    Hangs,
    /// Panics in the FUSE thread.
    Panics,
}

/// A service that keeps its whole state in the snapshot.
pub(crate) struct Keeper {
    snapshot: ArcSwap<Snapshot>,
    mood: Mutex<Mood>,
    pub(crate) changes: Mutex<Vec<(Caller, Change)>>,
    pub(crate) held: Mutex<Vec<Reply>>,
    pub(crate) touched: Mutex<Vec<NodeId>>,
    lost: AtomicBool,
}

impl Service for Keeper {
    fn snapshot(&self) -> Arc<Snapshot> {
        self.snapshot.load_full()
    }

    fn submit(&self, caller: Caller, change: Change, reply: Reply) {
        self.changes.lock().push((caller, change.clone()));
        let mood = self.mood.lock().clone();
        match mood {
            Mood::Obeys => reply(self.obey(change)),
            Mood::Refuses(refusal) => reply(Err(refusal)),
            Mood::Hangs => self.held.lock().push(reply),
            Mood::Panics => panic!("the service was told to panic"),
        }
    }

    fn touched(&self, node: NodeId) {
        self.touched.lock().push(node);
    }

    fn mount_lost(&self) {
        self.lost.store(true, Ordering::SeqCst);
    }
}

impl Keeper {
    pub(crate) fn set_mood(&self, mood: Mood) {
        *self.mood.lock() = mood;
    }

    pub(crate) fn was_lost(&self) -> bool {
        self.lost.load(Ordering::SeqCst)
    }

    fn obey(&self, change: Change) -> Result<Done, Refusal> {
        let mut next = Snapshot::clone(&self.snapshot.load());
        let mut done = Done::Quiet;
        match change {
            Change::Set(target, setting) => {
                let entry = next.entry(target.0).map(|entry| (entry.pid, entry.gpu));
                let (pid, gpu) = entry.ok_or_else(|| Refusal::Gone("the process".into()))?;
                match setting {
                    Setting::Kill => {
                        next.processes.remove(&pid);
                    }
                    setting => edit_entry(&mut next, pid, gpu, |entry| set(entry, setting)),
                }
            }
            Change::FreezeMany(set) => {
                for pid in set.pids {
                    if !next.processes.contains_key(&pid) {
                        return Err(Refusal::NoProcess(pid));
                    }
                    edit_entry(&mut next, pid, 0, |entry| entry.settings.freeze = set.state);
                }
            }
            Change::Pend(pending) => next.pending.push(pending.to_string()),
            Change::Resize(target, request) => {
                for partition in next.partitions.values_mut() {
                    if partition.node == target.0 {
                        Arc::make_mut(partition).sm_count = match request {
                            SmRequest::Count(count) => count.next_multiple_of(8),
                            SmRequest::Max => 132,
                        };
                    }
                }
            }
            Change::MakePartition { gpu, name } => {
                let node = NodeId(1_000_000 + next.partitions.len() as u64);
                next.partitions
                    .insert((gpu, name.clone()), partition(node, gpu, name));
            }
            Change::RemovePartition { gpu, name } => {
                next.partitions.remove(&(gpu, name));
            }
            Change::Launch(spec) => {
                done = Done::Launched {
                    pid: 77,
                    gpu: spec.gpu,
                    name: spec.name.unwrap_or_else(|| format!("{}-1", spec.kernel)),
                };
            }
        }
        self.snapshot.store(Arc::new(next));
        Ok(done)
    }
}

fn set(entry: &mut Entry, setting: Setting) {
    match setting {
        Setting::Priority(priority) => entry.settings.priority = priority,
        Setting::Freeze(freeze) => {
            entry.settings.freeze = freeze;
            entry.events.frozen = freeze.is_on();
        }
        Setting::Max(max) => entry.settings.max = max,
        Setting::Partition(partition) => entry.settings.partition = partition,
        Setting::Kill => {}
    }
}

fn edit_entry(snapshot: &mut Snapshot, pid: u32, gpu: u32, edit: impl FnOnce(&mut Entry)) {
    if let Some(process) = snapshot.processes.get_mut(&pid)
        && let Some(entry) = Arc::make_mut(process).gpus.get_mut(&gpu)
    {
        edit(Arc::make_mut(entry));
    }
}

fn partition(node: NodeId, gpu: u32, name: PartitionName) -> Arc<Partition> {
    Arc::new(Partition {
        node,
        gpu,
        name,
        sm_count: 0,
        groups: Vec::new(),
        members: Vec::new(),
    })
}

/// An entry of process `pid` on GPU 0.
pub(crate) fn process(node: u64, pid: u32, workload: Option<&str>) -> Arc<Process> {
    let entry = Entry {
        node: NodeId(node + 1),
        pid,
        gpu: 0,
        workload: workload.map(|name| {
            Arc::new(Workload {
                name: name.to_owned(),
                spec: "{\"kernel\":\"sleep\"}".to_owned(),
            })
        }),
        settings: Settings::default(),
        events: EntryEvents {
            populated: true,
            ..EntryEvents::default()
        },
        stat: Stat {
            submitted: Some(5),
            ended: Some(3),
            ..Stat::default()
        },
        memory_current: 4096,
        memory_peak: 8192,
        enforcers: Arc::new(vec![(File::Freeze, Enforcer::Worker)]),
        samples: Arc::new(vec![Sample {
            seq: 0,
            start_ns: 17,
            device_us: 500.25,
            wall_us: 510.0,
            sm_count: 132,
        }]),
    };
    Arc::new(Process {
        node: NodeId(node),
        pid,
        cgroup: "/user.slice".to_owned(),
        uid: 1000,
        comm: "a worker".to_owned(),
        gpus: BTreeMap::from([(0, Arc::new(entry))]),
    })
}

fn snapshot() -> Snapshot {
    let gpu = Gpu {
        node: NodeId(1),
        partitions_node: NodeId(2),
        index: 0,
        uuid: "GPU-0123".to_owned(),
        name: "A GPU".to_owned(),
        sm_capacity: 132,
        sm_granularity: 8,
        memory_capacity: 1 << 37,
        memory_current: 1 << 30,
        utilization: vec![("gpu_percent", 42)],
        events: DeviceEvents::default(),
        enforcers: vec![(File::Freeze, Enforcer::None("no driver".to_owned()))],
        attached: vec![(File::Freeze, Enforcer::Channel)],
    };
    let name: PartitionName = "a".parse().expect("it is a name");
    Snapshot {
        gpus: BTreeMap::from([(0, Arc::new(gpu))]),
        partitions: BTreeMap::from([((0, name.clone()), partition(NodeId(3), 0, name))]),
        processes: BTreeMap::from([
            (LAUNCHED, process(10, LAUNCHED, Some("noisy"))),
            (ATTACHED, process(20, ATTACHED, None)),
        ]),
        pending: Vec::new(),
        service: vec![("nr_changes", 3)],
    }
}

/// A mounted tree in a directory of its own.
pub(crate) struct Fixture {
    pub(crate) keeper: Arc<Keeper>,
    pub(crate) mounted: Mounted,
    pub(crate) directory: TempDir,
}

impl Fixture {
    /// Mounts a tree that only root may write to.
    pub(crate) fn mount() -> Option<Self> {
        Self::mount_with(GroupWrites::No)
    }

    /// Mounts a tree, or says why this host cannot.
    pub(crate) fn mount_with(group_writes: GroupWrites) -> Option<Self> {
        let directory = tempfile::tempdir().expect("there is room for a directory");
        let root = directory.path().join("gcgroup");
        fs::create_dir(&root).expect("it is new");
        let (keeper, mounted) = match mount_at(&root, group_writes, Mood::Obeys) {
            Ok(mounted) => mounted,
            Err(error) => return skipped(&error),
        };
        Some(Self {
            keeper,
            mounted,
            directory,
        })
    }

    pub(crate) fn root(&self) -> PathBuf {
        self.directory.path().join("gcgroup")
    }

    /// A file of the launched workload.
    pub(crate) fn launched(&self, file: File) -> PathBuf {
        self.of(LAUNCHED, file)
    }

    /// A file of a process on GPU 0.
    pub(crate) fn of(&self, pid: u32, file: File) -> PathBuf {
        let entry = self.root().join("processes").join(pid.to_string());
        entry.join("0").join(file.name())
    }

    pub(crate) fn mood(&self, mood: Mood) {
        self.keeper.set_mood(mood);
    }

    /// Changes the snapshot and publishes it.
    pub(crate) fn publish(&self, edit: impl FnOnce(&mut Snapshot)) {
        let mut next = Snapshot::clone(&self.keeper.snapshot.load());
        edit(&mut next);
        self.keeper.snapshot.store(Arc::new(next));
        self.mounted.published();
    }

    /// Changes the entry of the launched workload and publishes it.
    pub(crate) fn publish_launched(&self, edit: impl FnOnce(&mut Entry)) {
        self.publish(|snapshot| edit_entry(snapshot, LAUNCHED, 0, edit));
    }

    pub(crate) fn was_lost(&self) -> bool {
        self.keeper.was_lost()
    }

    /// The last change that reached the service.
    pub(crate) fn last_change(&self) -> Change {
        let changes = self.keeper.changes.lock();
        changes.last().expect("a change came").1.clone()
    }
}

/// Mounts a tree at an existing directory.
pub(crate) fn mount_at(
    root: &Path,
    group_writes: GroupWrites,
    mood: Mood,
) -> Result<(Arc<Keeper>, Mounted), MountError> {
    let keeper = Arc::new(Keeper {
        snapshot: ArcSwap::from_pointee(snapshot()),
        mood: Mutex::new(mood),
        changes: Mutex::default(),
        held: Mutex::default(),
        touched: Mutex::default(),
        lost: AtomicBool::new(false),
    });
    let options = Options {
        mountpoint: root.to_owned(),
        group_writes,
        gid: GROUP,
        version: "1.2.3".to_owned(),
    };
    let service = Arc::clone(&keeper) as Arc<dyn Service>;
    Ok((keeper, Mounted::new(options, service)?))
}

/// Tells why a test cannot run; any other reason is a failure.
fn skipped<T>(error: &MountError) -> Option<T> {
    match error {
        MountError::NoFuse(reason) => eprintln!("skipped: /dev/fuse cannot be opened: {reason}"),
        MountError::Mountpoint { source, .. }
            if source.kind() == io::ErrorKind::PermissionDenied =>
        {
            eprintln!("skipped: mounting needs root");
        }
        error => panic!("the tree cannot be mounted: {error:?}"),
    }
    None
}

/// The errno of a failed system call.
pub(crate) fn errno<T>(result: io::Result<T>) -> Option<Errno> {
    result
        .err()
        .map(|error| Errno::from_io_error(&error).expect("it came from the kernel"))
}

/// Writes as a shell's `echo -n` does: open with O_TRUNC, one write(2), close.
pub(crate) fn write(path: &Path, text: &str) -> io::Result<()> {
    let file = fs::OpenOptions::new()
        .write(true)
        .truncate(true)
        .open(path)?;
    let written = rustix::io::write(&file, text.as_bytes())?;
    assert_eq!(written, text.len(), "a write was taken in part");
    Ok(())
}

/// Runs a shell and says whether it succeeded.
pub(crate) fn shell(script: &str) -> bool {
    let status = Command::new("sh").arg("-c").arg(script).status();
    status.expect("there is a shell").success()
}

/// Waits until something is so, and says whether it was before time was up.
pub(crate) fn eventually(within: Duration, mut is_so: impl FnMut() -> bool) -> bool {
    let start = Instant::now();
    loop {
        if is_so() {
            return true;
        }
        if start.elapsed() > within {
            return false;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}
