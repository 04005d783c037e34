//! The rows of the control files: one row a file, and nowhere else its name.
//!
//! Lookup, readdir, modes, the manual, completions, the command line and the
//! table tests walk [`ROWS`]. `gcgroup-fs` adds a show and a store to each.

use std::fmt;

/// Identifies a row in code. The name a user sees stands in [`ROWS`] only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum File {
    /// Version of the service.
    Version,
    /// Launches a workload.
    Launch,
    /// Freezes several processes in one step.
    FreezeMany,
    /// Settings that wait for a process's first GPU context.
    Pending,
    /// The service's own counters.
    ServiceStat,
    /// Product name of a GPU.
    GpuName,
    /// UUID of a GPU.
    GpuUuid,
    /// Streaming multiprocessors of a GPU.
    SmCapacity,
    /// Smallest step in which SMs are handed out.
    SmGranularity,
    /// Device memory of a GPU.
    GpuMemoryCapacity,
    /// Device memory of a GPU in use.
    GpuMemoryCurrent,
    /// Utilisation of a GPU.
    GpuUtilization,
    /// Counted events of a GPU.
    GpuEvents,
    /// What a GPU allows.
    GpuEnforcers,
    /// SMs of a partition.
    SmCount,
    /// SM groups of a partition.
    SmGroups,
    /// Processes in a partition.
    PartitionMembers,
    /// Every process with an entry.
    ProcessList,
    /// Control group of a process.
    Cgroup,
    /// User of a process.
    Uid,
    /// Name of a process.
    Comm,
    /// Bytes resident on the device.
    MemoryCurrent,
    /// Highest figure of bytes resident.
    MemoryPeak,
    /// Priority.
    Priority,
    /// Freeze switch.
    Freeze,
    /// Quota of GPU time.
    Max,
    /// Partition of a process.
    Partition,
    /// Counters of a process.
    Stat,
    /// State changes of a process.
    Events,
    /// Mechanism behind each file.
    Enforcers,
    /// Ends a process.
    Kill,
    /// The spec a workload was launched with.
    WorkloadSpec,
    /// Recent launches of a workload.
    WorkloadSamples,
}

/// The kind of directory that holds a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// The mount point.
    Root,
    /// `devices/<gpu>`.
    Gpu,
    /// `partitions/<gpu>/<name>`.
    Partition,
    /// `processes`.
    Processes,
    /// `processes/<pid>`.
    Process,
    /// `processes/<pid>/<gpu>`.
    ProcessGpu,
    /// `processes/<pid>/<gpu>` of a process that the service launched.
    Workload,
}

impl Place {
    /// Path of the directory below the mount point, with placeholders.
    #[must_use]
    pub fn pattern(self) -> &'static str {
        match self {
            Self::Root => "",
            Self::Gpu => "devices/<gpu>",
            Self::Partition => "partitions/<gpu>/<name>",
            Self::Processes => "processes",
            Self::Process => "processes/<pid>",
            Self::ProcessGpu | Self::Workload => "processes/<pid>/<gpu>",
        }
    }
}

/// Who may do what with a file; the bits follow from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Read only.
    Ro,
    /// Read and write.
    Rw,
    /// Write only.
    Wo,
}

impl Mode {
    /// Permission bits; `group_writes` is the configuration's
    /// `writable_by_group`.
    #[must_use]
    pub fn bits(self, group_writes: GroupWrites) -> u16 {
        match (self, group_writes) {
            (Self::Ro, _) => 0o444,
            (Self::Rw, GroupWrites::No) => 0o644,
            (Self::Rw, GroupWrites::Yes) => 0o664,
            (Self::Wo, GroupWrites::No) => 0o200,
            (Self::Wo, GroupWrites::Yes) => 0o220,
        }
    }

    /// Whether a write can succeed.
    #[must_use]
    pub fn writable(self) -> bool {
        !matches!(self, Self::Ro)
    }

    /// Whether a read can succeed.
    #[must_use]
    pub fn readable(self) -> bool {
        !matches!(self, Self::Wo)
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ro => "ro",
            Self::Rw => "rw",
            Self::Wo => "wo",
        })
    }
}

/// Whether members of the file group may write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GroupWrites {
    /// Only root writes.
    No,
    /// The group writes too.
    Yes,
}

/// What a write may contain; each grammar is one type in [`crate::value`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Grammar {
    /// No write is allowed.
    None,
    /// [`crate::value::Priority`].
    Priority,
    /// [`crate::value::Switch`].
    Switch,
    /// [`crate::value::Quota`].
    Quota,
    /// [`crate::value::PartitionRef`].
    PartitionRef,
    /// [`crate::value::SmRequest`].
    SmRequest,
    /// [`crate::value::One`].
    One,
    /// [`crate::value::FreezeSet`].
    FreezeSet,
    /// [`crate::change::Pending`].
    Pending,
    /// [`crate::spec::WorkloadSpec`].
    Spec,
}

impl Grammar {
    /// The values that are allowed, in words, for manuals and messages.
    #[must_use]
    pub fn allowed(self) -> &'static str {
        match self {
            Self::None => "nothing",
            Self::Priority => "a number from 0 to 15",
            Self::Switch => "0 or 1",
            Self::Quota => "'QUOTA [PERIOD]' in microseconds, or 'max'",
            Self::PartitionRef => "the name of a partition, or 'none'",
            Self::SmRequest => "a number of SMs, or 'max'",
            Self::One => "1",
            Self::FreezeSet => "'0 PID...' or '1 PID...'",
            Self::Pending => crate::change::Pending::ALLOWED,
            Self::Spec => "a workload as one JSON object",
        }
    }

    /// Longest write in bytes. 31 is GVM's bound, which its users rely on.
    #[must_use]
    pub fn longest(self) -> usize {
        match self {
            Self::Spec => 64 * 1024,
            Self::FreezeSet => 64 * 1024,
            // A pid, the longest name of a setting and its value.
            Self::Pending => 127,
            Self::None
            | Self::Priority
            | Self::Switch
            | Self::Quota
            | Self::PartitionRef
            | Self::SmRequest
            | Self::One => 31,
        }
    }
}

/// One control file.
#[derive(Debug)]
pub struct Row {
    /// Identity in code.
    pub file: File,
    /// Name in the directory.
    pub name: &'static str,
    /// Directory that holds it.
    pub place: Place,
    /// Who may do what.
    pub mode: Mode,
    /// What a write may contain.
    pub grammar: Grammar,
    /// Unit of the value, empty where there is none.
    pub unit: &'static str,
    /// Value before anybody wrote, empty where there is none.
    pub default: &'static str,
    /// Whether poll(2) reports a change as POLLPRI.
    pub polls: bool,
    /// One or two sentences for the manual.
    pub manual: &'static str,
}

const fn ro(
    file: File,
    place: Place,
    name: &'static str,
    unit: &'static str,
    manual: &'static str,
) -> Row {
    Row {
        file,
        name,
        place,
        mode: Mode::Ro,
        grammar: Grammar::None,
        unit,
        default: "",
        polls: false,
        manual,
    }
}

const fn events(file: File, place: Place, name: &'static str, manual: &'static str) -> Row {
    Row {
        polls: true,
        ..ro(file, place, name, "", manual)
    }
}

const fn rw(
    file: File,
    place: Place,
    name: &'static str,
    grammar: Grammar,
    (unit, default): (&'static str, &'static str),
    manual: &'static str,
) -> Row {
    Row {
        file,
        name,
        place,
        mode: Mode::Rw,
        grammar,
        unit,
        default,
        polls: false,
        manual,
    }
}

const fn wo(
    file: File,
    place: Place,
    name: &'static str,
    grammar: Grammar,
    manual: &'static str,
) -> Row {
    Row {
        file,
        name,
        place,
        mode: Mode::Wo,
        grammar,
        unit: "",
        default: "",
        polls: false,
        manual,
    }
}

/// Every control file, in the order in which manuals list them.
#[rustfmt::skip]
pub static ROWS: &[Row] = &[
    ro(File::Version, Place::Root, "gcgroup.version", "", "Version of the service, one line."),
    rw(File::Launch, Place::Root, "gcgroup.launch", Grammar::Spec, ("", ""),
       "Launches a workload: write one JSON object, read the answer on the same descriptor. The write that completes the object returns when the workload is ready, or fails with the reason."),
    rw(File::FreezeMany, Place::Root, "gcgroup.freeze", Grammar::FreezeSet, ("", ""),
       "Freezes (1) or thaws (0) several processes in one step, all or none. Reads as the frozen pids, one a line."),
    rw(File::Pending, Place::Root, "gcgroup.pending", Grammar::Pending, ("", ""),
       "A setting for a process that has no GPU context yet: write 'PID FILE VALUE'. It comes into force with the first context of that process or of one that it started, on each GPU; a later write for the same process and file replaces it. Reads as what waits, one a line."),
    ro(File::ServiceStat, Place::Root, "gcgroup.stat", "", "The service's own counters, 'key: value' a line."),

    ro(File::GpuName, Place::Gpu, "name", "", "Product name."),
    ro(File::GpuUuid, Place::Gpu, "uuid", "", "UUID, the identity that survives a change of the index."),
    ro(File::SmCapacity, Place::Gpu, "sm.capacity", "SMs", "Streaming multiprocessors of the GPU."),
    ro(File::SmGranularity, Place::Gpu, "sm.granularity", "SMs", "Step in which partitions are handed out."),
    ro(File::GpuMemoryCapacity, Place::Gpu, "memory.capacity", "bytes", "Device memory of the GPU."),
    ro(File::GpuMemoryCurrent, Place::Gpu, "memory.current", "bytes", "Device memory in use by everybody."),
    ro(File::GpuUtilization, Place::Gpu, "utilization.stat", "",
       "Utilisation, traffic, power, temperature and clocks, 'key value' a line; a line is absent where the hardware has no such figure."),
    events(File::GpuEvents, Place::Gpu, "device.events",
       "Counts of Xid errors, of losses of the GPU and of losses of the MPS server, 'key N' a line. poll(2) reports a change."),
    ro(File::GpuEnforcers, Place::Gpu, "gcgroup.enforcers", "", "What this GPU allows: each setting and its mechanism, or 'none' and the reason."),

    rw(File::SmCount, Place::Partition, "sm.count", Grammar::SmRequest, ("SMs", "0"),
       "SMs of the partition. A write rounds up to the granularity, 'max' takes all that are free; reads as granted. In force for every member when the write returns."),
    ro(File::SmGroups, Place::Partition, "sm.groups", "", "Numbers of the SM groups that the partition owns."),
    ro(File::PartitionMembers, Place::Partition, "members", "", "Processes in the partition, a pid a line."),

    ro(File::ProcessList, Place::Processes, "list", "", "A line 'PID', then the pid of each process with an entry."),

    ro(File::Cgroup, Place::Process, "cgroup", "", "Control group of the process."),
    ro(File::Uid, Place::Process, "uid", "", "User of the process."),
    ro(File::Comm, Place::Process, "comm", "", "Name of the process."),

    ro(File::MemoryCurrent, Place::ProcessGpu, "memory.current", "bytes", "Bytes resident on the device: what the workload allocated, in pages; of a process that the service did not launch the driver's figure, its context included."),
    ro(File::MemoryPeak, Place::ProcessGpu, "memory.peak", "bytes", "Highest memory.current."),
    rw(File::Priority, Place::ProcessGpu, "compute.priority", Grammar::Priority, ("", "8"),
       "0 is the most important, 15 the least. Of a process that the service did not launch, and under temporal sharing, the timeslice of the compute channel groups, 524288 >> p microseconds; under spatial sharing the priority of the CUDA stream, -5 + p*6/16, which orders blocks that wait for room on an SM and changes nothing where all blocks fit."),
    rw(File::Freeze, Place::ProcessGpu, "compute.freeze", Grammar::Switch, ("", "0"),
       "1 stops the process on the GPU, 0 lets it run. The write returns when that is so."),
    rw(File::Max, Place::ProcessGpu, "compute.max", Grammar::Quota, ("microseconds", "max 100000"),
       "GPU time allowed in each period: 'QUOTA PERIOD' or 'max'. Of a process that the service did not launch a window in which it may run, whatever it uses of it; the period is 50000 at least then."),
    rw(File::Partition, Place::ProcessGpu, "compute.partition", Grammar::PartitionRef, ("", "none"),
       "Partition whose SMs the process uses, 'none' for all of them."),
    ro(File::Stat, Place::ProcessGpu, "gcgroup.stat", "", "Counters of the process, 'key: value' a line."),
    events(File::Events, Place::ProcessGpu, "gcgroup.events",
       "State of the process: 'populated', 'frozen', 'held' and 'pending', each 0 or 1. poll(2) reports a change."),
    ro(File::Enforcers, Place::ProcessGpu, "gcgroup.enforcers", "", "Each writable file and the mechanism that makes it true now, or 'none' and the reason."),
    wo(File::Kill, Place::ProcessGpu, "gcgroup.kill", Grammar::One, "1 ends the process: a workload is asked to and killed after 500 ms, others are killed at once."),

    ro(File::WorkloadSpec, Place::Workload, "workload.spec", "", "The spec the workload runs with, as JSON, every field filled in."),
    ro(File::WorkloadSamples, Place::Workload, "workload.samples", "", "Recent launches as CSV, newest last."),
];

/// Name of the symlink to the caller's own directory in `processes`.
pub const SELF_LINK: &str = "self";

impl File {
    /// The row of this file.
    #[must_use]
    pub fn row(self) -> &'static Row {
        // The rows stand in the order of the enum, which a test checks.
        &ROWS[self as usize]
    }

    /// The name a user sees.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.row().name
    }
}

/// The rows of one kind of directory, in table order. A workload's directory
/// also holds the rows of every other process.
pub fn rows_of(place: Place) -> impl Iterator<Item = &'static Row> {
    ROWS.iter().filter(move |row| {
        row.place == place || (place == Place::Workload && row.place == Place::ProcessGpu)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn rows_stand_in_the_order_of_the_enum() {
        for (index, row) in ROWS.iter().enumerate() {
            assert_eq!(row.file as usize, index, "{} is out of order", row.name);
        }
    }

    #[test]
    fn names_are_unique_within_a_directory() {
        for place in [
            Place::Root,
            Place::Gpu,
            Place::Partition,
            Place::Processes,
            Place::Process,
            Place::Workload,
        ] {
            let mut seen = HashSet::new();
            for row in rows_of(place) {
                assert!(
                    seen.insert(row.name),
                    "{} stands twice in {place:?}",
                    row.name
                );
            }
        }
    }

    #[test]
    fn writable_rows_have_a_grammar_and_others_none() {
        for row in ROWS {
            assert_eq!(
                row.mode.writable(),
                row.grammar != Grammar::None,
                "{}",
                row.name
            );
        }
    }

    #[test]
    fn every_row_has_a_manual_that_ends_as_a_sentence() {
        for row in ROWS {
            assert!(row.manual.ends_with('.'), "{}", row.name);
        }
    }

    #[test]
    fn names_are_lower_case_words_joined_by_dots() {
        for row in ROWS {
            assert!(
                row.name.split('.').all(|word| {
                    !word.is_empty() && word.bytes().all(|b| b.is_ascii_lowercase() || b == b'_')
                }),
                "{}",
                row.name
            );
        }
    }
}
