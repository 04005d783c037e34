//! How each row is shown and what a write to it asks for.
//!
//! [`behaviour`] has one arm a file and no wildcard, so a row without an entry
//! does not compile. Names, modes and grammars stand in `gcgroup_model::ROWS`.

use std::fmt::{Display, Write as _};

use gcgroup_model::change::Setting;
use gcgroup_model::snapshot::{Enforcers, Entry, Gpu, NodeId, Partition, Process};
use gcgroup_model::value::ValueError;
use gcgroup_model::{Change, File, Snapshot, Target};

/// What the rows outside any one process, partition or GPU are shown from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Whole<'a> {
    /// The published state.
    pub(crate) snapshot: &'a Snapshot,
    /// Version of the service.
    pub(crate) version: &'a str,
}

/// Renders a row into text. Each variant is what a kind of directory holds.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Show {
    /// The row is write-only.
    Never,
    /// Reads drain the answer that the open file holds.
    Answer,
    /// In the mount point, or in `processes`.
    Whole(fn(&Whole<'_>, &mut String)),
    /// In `devices/<gpu>`.
    Gpu(fn(&Gpu, &mut String)),
    /// In `partitions/<gpu>/<name>`.
    Partition(fn(&Partition, &mut String)),
    /// In `processes/<pid>`.
    Process(fn(&Process, &mut String)),
    /// In `processes/<pid>/<gpu>`.
    Entry(fn(&Entry, &mut String)),
}

/// Makes a change of the text of a write, its newline taken off.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Store {
    /// The row is read-only.
    Never,
    /// Bytes gather on the open file until they are one JSON object.
    Gather,
    /// A change that names what it is for.
    Whole(fn(&str) -> Result<Change, ValueError>),
    /// A change of the directory that holds the file.
    Node(fn(Target, &str) -> Result<Change, ValueError>),
}

/// Where the value of a row comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// The service knows it at any time.
    Known,
    /// It is sampled, and only while somebody reads it.
    Sampled,
}

/// The two sides of a row.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Behaviour {
    /// What a read shows.
    pub(crate) show: Show,
    /// What a write asks for.
    pub(crate) store: Store,
    /// Where the value comes from.
    pub(crate) source: Source,
}

const fn shown(show: Show) -> Behaviour {
    Behaviour {
        show,
        store: Store::Never,
        source: Source::Known,
    }
}

const fn sampled(show: Show) -> Behaviour {
    Behaviour {
        source: Source::Sampled,
        ..shown(show)
    }
}

const fn stored(show: Show, store: Store) -> Behaviour {
    Behaviour {
        store,
        ..shown(show)
    }
}

/// A setting of an entry: shown from its field, stored through its variant.
macro_rules! setting {
    ($field:ident, $variant:ident) => {
        stored(
            Show::Entry(|entry, out| line(out, &entry.settings.$field)),
            Store::Node(|node, text| Ok(Change::Set(node, Setting::$variant(text.parse()?)))),
        )
    };
}

/// What a file does.
#[rustfmt::skip]
pub(crate) fn behaviour(file: File) -> Behaviour {
    use Show::{Entry, Gpu, Partition, Process, Whole};
    match file {
        File::Version => shown(Whole(|whole, out| line(out, one_line(whole.version)))),
        File::Launch => stored(Show::Answer, Store::Gather),
        File::FreezeMany => stored(
            Whole(|whole, out| frozen(whole.snapshot).for_each(|pid| line(out, pid))),
            Store::Whole(|text| Ok(Change::FreezeMany(text.parse()?))),
        ),
        File::Pending => stored(
            Whole(|whole, out| whole.snapshot.pending.iter().for_each(|waits| line(out, waits))),
            Store::Whole(|text| Ok(Change::Pend(text.parse()?))),
        ),
        File::ServiceStat => shown(Whole(|whole, out| stat(out, whole.snapshot.service.iter().copied()))),

        File::GpuName => shown(Gpu(|gpu, out| line(out, one_line(&gpu.name)))),
        File::GpuUuid => shown(Gpu(|gpu, out| line(out, one_line(&gpu.uuid)))),
        File::SmCapacity => shown(Gpu(|gpu, out| line(out, gpu.sm_capacity))),
        File::SmGranularity => shown(Gpu(|gpu, out| line(out, gpu.sm_granularity))),
        File::GpuMemoryCapacity => shown(Gpu(|gpu, out| line(out, gpu.memory_capacity))),
        File::GpuMemoryCurrent => sampled(Gpu(|gpu, out| line(out, gpu.memory_current))),
        File::GpuUtilization => sampled(Gpu(|gpu, out| keyed(out, gpu.utilization.iter().copied()))),
        File::GpuEvents => shown(Gpu(|gpu, out| keyed(out, [
            ("xid", gpu.events.xid),
            ("gpu_lost", gpu.events.gpu_lost),
            ("mps_lost", gpu.events.mps_lost),
        ]))),
        File::GpuEnforcers => shown(Gpu(|gpu, out| {
            enforcers(out, "", &gpu.enforcers);
            enforcers(out, "attached/", &gpu.attached);
        })),

        File::SmCount => stored(
            Partition(|partition, out| line(out, partition.sm_count)),
            Store::Node(|node, text| Ok(Change::Resize(node, text.parse()?))),
        ),
        File::SmGroups => shown(Partition(|partition, out| spaced(out, &partition.groups))),
        File::PartitionMembers => shown(Partition(|partition, out| {
            partition.members.iter().for_each(|pid| line(out, pid));
        })),

        File::ProcessList => shown(Whole(|whole, out| {
            line(out, "PID");
            whole.snapshot.processes.keys().for_each(|pid| line(out, pid));
        })),

        File::Cgroup => shown(Process(|process, out| line(out, one_line(&process.cgroup)))),
        File::Uid => shown(Process(|process, out| line(out, process.uid))),
        File::Comm => shown(Process(|process, out| line(out, one_line(&process.comm)))),

        File::MemoryCurrent => sampled(Entry(|entry, out| line(out, entry.memory_current))),
        File::MemoryPeak => sampled(Entry(|entry, out| line(out, entry.memory_peak))),
        File::Priority => setting!(priority, Priority),
        File::Freeze => setting!(freeze, Freeze),
        File::Max => setting!(max, Max),
        File::Partition => setting!(partition, Partition),
        File::Stat => sampled(Entry(|entry, out| stat(out, entry.stat.lines()))),
        File::Events => shown(Entry(|entry, out| keyed(out, [
            ("populated", u64::from(entry.events.populated)),
            ("frozen", u64::from(entry.events.frozen)),
            ("held", u64::from(entry.events.held)),
            ("pending", u64::from(entry.events.pending)),
        ]))),
        File::Enforcers => shown(Entry(|entry, out| enforcers(out, "", &entry.enforcers))),
        File::Kill => stored(Show::Never, Store::Node(|node, text| {
            text.parse().map(|gcgroup_model::value::One| Change::Set(node, Setting::Kill))
        })),

        File::WorkloadSpec => shown(Entry(|entry, out| {
            if let Some(workload) = &entry.workload {
                line(out, one_line(&workload.spec));
            }
        })),
        File::WorkloadSamples => sampled(Entry(samples)),
    }
}

/// A directory's side of a row, as far as it can be shown from.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Subject<'a> {
    /// The mount point, `processes`, and directories without rows.
    Whole,
    /// A GPU.
    Gpu(&'a Gpu),
    /// A partition.
    Partition(&'a Partition),
    /// A process.
    Process(&'a Process),
    /// A process on a GPU.
    Entry(&'a Entry),
}

impl Subject<'_> {
    /// The directory to name in [`crate::Service::touched`].
    pub(crate) fn node(&self) -> Option<NodeId> {
        match self {
            Self::Whole => None,
            Self::Gpu(gpu) => Some(gpu.node),
            Self::Partition(partition) => Some(partition.node),
            Self::Process(process) => Some(process.node),
            Self::Entry(entry) => Some(entry.node),
        }
    }
}

impl Show {
    /// Appends the row's text to `out`. A row is only ever paired with the kind
    /// of directory that holds it, which a test of the whole table checks; any
    /// other pair shows nothing.
    pub(crate) fn render(self, whole: &Whole<'_>, subject: Subject<'_>, out: &mut String) {
        match (self, subject) {
            (Self::Whole(show), _) => show(whole, out),
            (Self::Gpu(show), Subject::Gpu(gpu)) => show(gpu, out),
            (Self::Partition(show), Subject::Partition(partition)) => show(partition, out),
            (Self::Process(show), Subject::Process(process)) => show(process, out),
            (Self::Entry(show), Subject::Entry(entry)) => show(entry, out),
            _ => {}
        }
    }
}

// Writing to a String cannot fail, so the results below are dropped.

fn line(out: &mut String, value: impl Display) {
    let _ = writeln!(out, "{value}");
}

fn keyed(out: &mut String, lines: impl IntoIterator<Item = (&'static str, u64)>) {
    for (key, value) in lines {
        pair(out, key, " ", value);
    }
}

/// With a colon, because GVM's tools split the lines of a stat file on ": ".
fn stat(out: &mut String, lines: impl IntoIterator<Item = (&'static str, u64)>) {
    for (key, value) in lines {
        pair(out, key, ": ", value);
    }
}

/// These lines are most of what monitors read, so they go without the formatter.
fn pair(out: &mut String, key: &str, between: &str, mut value: u64) {
    // A u64 has 20 digits at most.
    let mut digits = [b'0'; 20];
    let mut first = digits.len() - 1;
    while value >= 10 {
        digits[first] += (value % 10) as u8;
        value /= 10;
        first -= 1;
    }
    digits[first] += value as u8;
    out.push_str(key);
    out.push_str(between);
    out.extend(digits[first..].iter().copied().map(char::from));
    out.push('\n');
}

fn spaced(out: &mut String, numbers: &[u32]) {
    for (index, number) in numbers.iter().enumerate() {
        let gap = if index == 0 { "" } else { " " };
        let _ = write!(out, "{gap}{number}");
    }
    out.push('\n');
}

fn enforcers(out: &mut String, prefix: &str, enforcers: &Enforcers) {
    for (file, enforcer) in enforcers {
        line(
            out,
            format_args!(
                "{prefix}{} {}",
                file.name(),
                one_line(&enforcer.to_string())
            ),
        );
    }
}

fn samples(entry: &Entry, out: &mut String) {
    line(out, "seq,start_ns,device_us,wall_us,sm_count");
    for sample in entry.samples.iter() {
        // Three decimals of a microsecond: the clocks count nanoseconds.
        let _ = writeln!(
            out,
            "{},{},{:.3},{:.3},{}",
            sample.seq, sample.start_ns, sample.device_us, sample.wall_us, sample.sm_count
        );
    }
}

/// Processes that are frozen on any of their GPUs.
fn frozen(snapshot: &Snapshot) -> impl Iterator<Item = u32> {
    snapshot
        .processes
        .values()
        .filter(|process| {
            process
                .gpus
                .values()
                .any(|entry| entry.settings.freeze.is_on())
        })
        .map(|process| process.pid)
}

/// Text that others chose, such as a process's name, as one line: a newline in
/// it would look like a line of ours.
fn one_line(text: &str) -> std::borrow::Cow<'_, str> {
    if text.contains(char::is_control) {
        text.replace(char::is_control, "?").into()
    } else {
        text.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gcgroup_model::row::Grammar;
    use gcgroup_model::value::{Priority, Quota, Switch};
    use gcgroup_model::{Place, ROWS};

    #[test]
    fn readable_rows_have_a_show_and_writable_rows_a_store() {
        for row in ROWS {
            let behaviour = behaviour(row.file);
            assert_eq!(
                row.mode.readable(),
                !matches!(behaviour.show, Show::Never),
                "{}",
                row.name
            );
            assert_eq!(
                row.mode.writable(),
                !matches!(behaviour.store, Store::Never),
                "{}",
                row.name
            );
        }
    }

    #[test]
    fn each_show_suits_the_directory_of_its_row() {
        for row in ROWS {
            let suits = match behaviour(row.file).show {
                Show::Never => row.place == Place::ProcessGpu,
                Show::Answer => row.place == Place::Root,
                Show::Whole(_) => matches!(row.place, Place::Root | Place::Processes),
                Show::Gpu(_) => row.place == Place::Gpu,
                Show::Partition(_) => row.place == Place::Partition,
                Show::Process(_) => row.place == Place::Process,
                Show::Entry(_) => matches!(row.place, Place::ProcessGpu | Place::Workload),
            };
            assert!(suits, "{} in {:?}", row.name, row.place);
        }
    }

    #[test]
    fn a_store_names_its_directory_where_there_are_several_of_that_kind() {
        for row in ROWS {
            match behaviour(row.file).store {
                Store::Never => {}
                Store::Gather => assert_eq!(row.grammar, Grammar::Spec, "{}", row.name),
                Store::Whole(_) => assert_eq!(row.place, Place::Root, "{}", row.name),
                Store::Node(_) => assert!(
                    matches!(row.place, Place::ProcessGpu | Place::Partition),
                    "{}",
                    row.name
                ),
            }
        }
    }

    fn stored_as(file: File, text: &str) -> Result<Change, ValueError> {
        match behaviour(file).store {
            Store::Node(store) => store(Target(NodeId(7)), text),
            Store::Whole(store) => store(text),
            Store::Never | Store::Gather => panic!("{} stores no text", file.name()),
        }
    }

    #[test]
    fn each_grammar_becomes_its_own_change() {
        let node = Target(NodeId(7));
        for (file, text, change) in [
            (
                File::Priority,
                "4",
                Change::Set(node, Setting::Priority(Priority::new(4).expect("in range"))),
            ),
            (
                File::Freeze,
                "1",
                Change::Set(node, Setting::Freeze(Switch::On)),
            ),
            (
                File::Max,
                "20000",
                Change::Set(
                    node,
                    Setting::Max(Quota {
                        quota_usec: Some(20_000),
                        period_usec: 100_000,
                    }),
                ),
            ),
            (File::Kill, "1", Change::Set(node, Setting::Kill)),
        ] {
            assert_eq!(stored_as(file, text).expect("it is in the grammar"), change);
        }
    }

    #[test]
    fn defaults_of_rows_can_be_written() {
        for row in ROWS {
            if row.mode.writable() && !row.default.is_empty() {
                assert!(stored_as(row.file, row.default).is_ok(), "{}", row.name);
            }
        }
    }

    #[test]
    fn a_newline_in_a_foreign_name_does_not_make_a_line() {
        assert_eq!(one_line("a\npopulated 1"), "a?populated 1");
        assert_eq!(one_line("plain name"), "plain name");
    }
}
