//! The published state of the service: what every read is rendered from.
//!
//! The controller builds a new [`Snapshot`] for each change and publishes it
//! whole; a reader holds one for as long as it renders, so it never sees half
//! of a change.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::value::{PartitionName, PartitionRef, Priority, Quota, Switch};

/// Identifies a directory for as long as the service runs; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(pub u64);

/// Everything that reads can show.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// GPUs by NVML index.
    pub gpus: BTreeMap<u32, Arc<Gpu>>,
    /// Partitions by GPU and name.
    pub partitions: BTreeMap<(u32, PartitionName), Arc<Partition>>,
    /// Processes by thread-group id.
    pub processes: BTreeMap<u32, Arc<Process>>,
    /// Lines of gcgroup.pending.
    pub pending: Vec<String>,
    /// The service's own counters, in the order in which they are shown.
    pub service: Vec<(&'static str, u64)>,
}

/// One GPU.
#[derive(Clone, Debug)]
pub struct Gpu {
    /// Its directory under `devices`.
    pub node: NodeId,
    /// Its directory under `partitions`.
    pub partitions_node: NodeId,
    /// NVML index.
    pub index: u32,
    /// UUID as NVML prints it.
    pub uuid: String,
    /// Product name.
    pub name: String,
    /// Streaming multiprocessors.
    pub sm_capacity: u32,
    /// SMs in one group, the step in which they are handed out.
    pub sm_granularity: u32,
    /// Device memory in bytes.
    pub memory_capacity: u64,
    /// Device memory in use in bytes.
    pub memory_current: u64,
    /// Lines of utilization.stat: only figures the hardware has.
    pub utilization: Vec<(&'static str, u64)>,
    /// Lines of device.events.
    pub events: DeviceEvents,
    /// Lines of gcgroup.enforcers for workloads of the service.
    pub enforcers: Enforcers,
    /// The same for processes of others.
    pub attached: Enforcers,
}

/// Counters of device.events.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceEvents {
    /// Xid errors that NVML reported.
    pub xid: u64,
    /// Times the GPU was lost.
    pub gpu_lost: u64,
    /// Times the private MPS server was lost.
    pub mps_lost: u64,
}

/// One SM partition.
#[derive(Clone, Debug)]
pub struct Partition {
    /// Its directory.
    pub node: NodeId,
    /// NVML index of its GPU.
    pub gpu: u32,
    /// Its name.
    pub name: PartitionName,
    /// SMs granted.
    pub sm_count: u32,
    /// Numbers of the groups it owns, ascending.
    pub groups: Vec<u32>,
    /// Members by pid, ascending.
    pub members: Vec<u32>,
}

/// One process with work on a GPU.
#[derive(Clone, Debug)]
pub struct Process {
    /// Its directory.
    pub node: NodeId,
    /// Thread-group id in the service's pid namespace.
    pub pid: u32,
    /// Control group path, as /proc/PID/cgroup has it.
    pub cgroup: String,
    /// Real user id.
    pub uid: u32,
    /// Name, as /proc/PID/comm has it.
    pub comm: String,
    /// Its entries by NVML index.
    pub gpus: BTreeMap<u32, Arc<Entry>>,
}

/// One process on one GPU.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Its directory.
    pub node: NodeId,
    /// Thread-group id.
    pub pid: u32,
    /// NVML index of the GPU.
    pub gpu: u32,
    /// What the service launched; attached processes have none.
    pub workload: Option<Arc<Workload>>,
    /// What was written and is in force.
    pub settings: Settings,
    /// Lines of gcgroup.events.
    pub events: EntryEvents,
    /// Counters of gcgroup.stat.
    pub stat: Stat,
    /// Bytes resident on the device.
    pub memory_current: u64,
    /// Highest of these.
    pub memory_peak: u64,
    /// Lines of gcgroup.enforcers.
    pub enforcers: Arc<Enforcers>,
    /// Lines of workload.samples, oldest first.
    pub samples: Arc<Vec<Sample>>,
}

/// What the service knows of a workload because it launched it.
#[derive(Clone, Debug)]
pub struct Workload {
    /// Its name, unique among living workloads.
    pub name: String,
    /// The spec with every field filled in, as JSON.
    pub spec: String,
}

/// Settings of one entry.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// compute.priority.
    pub priority: Priority,
    /// compute.freeze.
    pub freeze: Switch,
    /// compute.max.
    pub max: Quota,
    /// compute.partition.
    pub partition: PartitionRef,
}

/// State of an entry, as gcgroup.events shows it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EntryEvents {
    /// Whether it has a GPU context.
    pub populated: bool,
    /// Whether a user froze it.
    pub frozen: bool,
    /// Whether it is held in favour of a protected process.
    pub held: bool,
    /// Whether a change is under way beyond its deadline.
    pub pending: bool,
}

/// Counters of an entry. `None` stands for a figure that is not really counted
/// for this process; its line is absent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stat {
    /// Kernels handed to the driver; a graph counts as one.
    pub submitted: Option<u64>,
    /// Graphs among them.
    pub graph_launches: Option<u64>,
    /// Kernels that ran to their end.
    pub ended: Option<u64>,
    /// Iterations done by all blocks together, exact while frozen.
    pub iterations: Option<u64>,
    /// Time with a kernel of its own resident, microseconds.
    pub usage_usec: Option<u64>,
    /// Time stopped by compute.max, microseconds.
    pub throttled_usec: Option<u64>,
    /// Time stopped by compute.freeze, microseconds.
    pub frozen_usec: Option<u64>,
    /// Freezes.
    pub nr_freezes: Option<u64>,
    /// Periods in which compute.max stopped it.
    pub nr_throttled: Option<u64>,
    /// Timeslice read back from the driver, microseconds.
    pub timeslice_usec: Option<u64>,
    /// Channel groups it has.
    pub channel_groups: Option<u64>,
    /// SMs it may run on.
    pub sm_count: Option<u64>,
    /// Device memory of its context beyond its allocations, bytes.
    pub context_bytes: Option<u64>,
}

impl Stat {
    /// Kernels handed over that have not ended.
    #[must_use]
    pub fn pending(&self) -> Option<u64> {
        Some(self.submitted?.saturating_sub(self.ended?))
    }

    /// The lines of gcgroup.stat, in the order of the interface.
    pub fn lines(&self) -> impl Iterator<Item = (&'static str, u64)> {
        [
            ("nr_submitted_kernels", self.submitted),
            ("nr_ended_kernels", self.ended),
            ("nr_pending_kernels", self.pending()),
            ("nr_graph_launches", self.graph_launches),
            ("usage_usec", self.usage_usec),
            ("throttled_usec", self.throttled_usec),
            ("frozen_usec", self.frozen_usec),
            ("nr_freezes", self.nr_freezes),
            ("nr_throttled", self.nr_throttled),
            ("timeslice_usec", self.timeslice_usec),
            ("channel_groups", self.channel_groups),
            ("sm_count", self.sm_count),
            ("context_bytes", self.context_bytes),
            ("nr_iterations", self.iterations),
        ]
        .into_iter()
        .filter_map(|(key, value)| Some((key, value?)))
    }
}

/// One launch of a workload, a line of workload.samples.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Sample {
    /// Number of the launch, from 0.
    pub seq: u64,
    /// Start on CLOCK_MONOTONIC, nanoseconds.
    pub start_ns: u64,
    /// Time on the device, microseconds.
    pub device_us: f64,
    /// Time from submission to completion as the host saw it, microseconds.
    pub wall_us: f64,
    /// SMs it could run on.
    pub sm_count: u32,
}

/// The mechanism that makes a file true.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Enforcer {
    /// The worker process does it.
    Worker,
    /// The driver's channel control does it.
    Channel,
    /// Channel control, a window at a time.
    ChannelWindow,
    /// The driver's checkpoint calls do it.
    Checkpoint,
    /// A cap only: under temporal sharing a partition isolates nothing.
    Cap,
    /// A signal through the process's pidfd.
    Signal,
    /// Nothing can, for this reason.
    None(String),
}

impl std::fmt::Display for Enforcer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Worker => f.write_str("worker"),
            Self::Channel => f.write_str("channel"),
            Self::ChannelWindow => f.write_str("channel-window"),
            Self::Checkpoint => f.write_str("checkpoint"),
            Self::Cap => f.write_str("cap"),
            Self::Signal => f.write_str("signal"),
            Self::None(reason) => write!(f, "none {reason}"),
        }
    }
}

/// Lines of gcgroup.enforcers: a writable file and its mechanism.
pub type Enforcers = Vec<(crate::row::File, Enforcer)>;

impl Snapshot {
    /// The entry whose directory this is.
    #[must_use]
    pub fn entry(&self, node: NodeId) -> Option<&Arc<Entry>> {
        self.processes
            .values()
            .flat_map(|process| process.gpus.values())
            .find(|entry| entry.node == node)
    }
}
