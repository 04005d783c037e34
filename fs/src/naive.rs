//! The tree against a naive model: what walking it finds is what a few loops list
//! from the same snapshot, with every name spelled out.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fmt::Write as _;
use std::sync::Arc;

use gcgroup_model::change::Caller;
use gcgroup_model::row::GroupWrites;
use gcgroup_model::snapshot::{
    DeviceEvents, Enforcer, Entry, EntryEvents, Gpu, NodeId, Partition, Process, Sample, Settings,
    Stat, Workload,
};
use gcgroup_model::value::{PartitionRef, Priority, Quota, Switch};
use gcgroup_model::{Change, File, Refusal, Snapshot};
use parking_lot::Mutex;
use proptest::prelude::*;
use rustix::io::Errno;

use crate::operation::{Access, Operations};
use crate::service::{Reply, Service};
use crate::tree::Kind;

/// A service that publishes what it is told and refuses every change.
struct Still(Mutex<Arc<Snapshot>>);

impl Service for Still {
    fn snapshot(&self) -> Arc<Snapshot> {
        Arc::clone(&self.0.lock())
    }

    fn submit(&self, _: Caller, _: Change, reply: Reply) {
        reply(Err(Refusal::Denied("nothing changes here".to_owned())));
    }

    fn touched(&self, _: NodeId) {}
}

/// What there is at one path: kind, permission bits, and text or target.
type Found = (Kind, u16, String);

fn directory(mode: u16) -> Found {
    (Kind::Directory, mode, String::new())
}

fn plain(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '?' } else { c })
        .collect()
}

fn lines(list: impl IntoIterator<Item = String>) -> String {
    list.into_iter().fold(String::new(), |mut out, line| {
        out.push_str(&line);
        out.push('\n');
        out
    })
}

/// Everything that a snapshot should look like, by path.
fn naive(snapshot: &Snapshot, writes: GroupWrites) -> BTreeMap<String, Found> {
    let rw = match writes {
        GroupWrites::No => 0o644,
        GroupWrites::Yes => 0o664,
    };
    let mut all = BTreeMap::new();
    let mut put = |path: String, found: Found| assert!(all.insert(path, found).is_none());
    let file = |mode, text: String| (Kind::File, mode, text);
    for top in ["devices", "partitions", "processes", "workloads"] {
        put(top.to_owned(), directory(0o755));
    }
    put("gcgroup.version".into(), file(0o444, "9.9\n".into()));
    put("gcgroup.launch".into(), file(rw, String::new()));
    let frozen = snapshot.processes.values().filter(|p| {
        p.gpus
            .values()
            .any(|entry| entry.settings.freeze == Switch::On)
    });
    put(
        "gcgroup.freeze".into(),
        file(rw, lines(frozen.map(|p| p.pid.to_string()))),
    );
    let waiting = snapshot.pending.iter().cloned();
    put("gcgroup.pending".into(), file(rw, lines(waiting)));
    let stat = snapshot.service.iter().map(|(k, v)| format!("{k}: {v}"));
    put("gcgroup.stat".into(), file(0o444, lines(stat)));
    for (index, gpu) in &snapshot.gpus {
        put(format!("devices/{index}"), directory(0o755));
        for (name, text) in naive_gpu(gpu) {
            put(format!("devices/{index}/{name}"), file(0o444, text));
        }
        let mode = match writes {
            GroupWrites::No => 0o755,
            GroupWrites::Yes => 0o775,
        };
        put(format!("partitions/{index}"), directory(mode));
    }
    for ((index, name), partition) in &snapshot.partitions {
        if !snapshot.gpus.contains_key(index) {
            continue;
        }
        let path = format!("partitions/{index}/{name}");
        put(path.clone(), directory(0o755));
        let count = format!("{}\n", partition.sm_count);
        put(format!("{path}/sm.count"), file(rw, count));
        let groups: Vec<_> = partition.groups.iter().map(u32::to_string).collect();
        let groups = groups.join(" ") + "\n";
        put(format!("{path}/sm.groups"), file(0o444, groups));
        let members = lines(partition.members.iter().map(u32::to_string));
        put(format!("{path}/members"), file(0o444, members));
    }
    let list = snapshot.processes.keys().map(u32::to_string);
    let list = lines(std::iter::once("PID".to_owned()).chain(list));
    put("processes/list".into(), file(0o444, list));
    for (pid, process) in &snapshot.processes {
        let path = format!("processes/{pid}");
        put(path.clone(), directory(0o755));
        let cgroup = plain(&process.cgroup) + "\n";
        put(format!("{path}/cgroup"), file(0o444, cgroup));
        put(
            format!("{path}/uid"),
            file(0o444, format!("{}\n", process.uid)),
        );
        let comm = plain(&process.comm) + "\n";
        put(format!("{path}/comm"), file(0o444, comm));
        for (gpu, entry) in &process.gpus {
            put(format!("{path}/{gpu}"), directory(0o755));
            for (name, mode, text) in naive_entry(entry, writes) {
                put(format!("{path}/{gpu}/{name}"), file(mode, text));
            }
            if let Some(workload) = &entry.workload {
                let target = format!("../processes/{pid}/{gpu}");
                put(
                    format!("workloads/{}", workload.name),
                    (Kind::Link, 0o777, target),
                );
            }
        }
    }
    all
}

fn naive_gpu(gpu: &Gpu) -> Vec<(&'static str, String)> {
    vec![
        ("name", plain(&gpu.name) + "\n"),
        ("uuid", plain(&gpu.uuid) + "\n"),
        ("sm.capacity", format!("{}\n", gpu.sm_capacity)),
        ("sm.granularity", format!("{}\n", gpu.sm_granularity)),
        ("memory.capacity", format!("{}\n", gpu.memory_capacity)),
        ("memory.current", format!("{}\n", gpu.memory_current)),
        (
            "utilization.stat",
            lines(gpu.utilization.iter().map(|(k, v)| format!("{k} {v}"))),
        ),
        (
            "device.events",
            format!(
                "xid {}\ngpu_lost {}\nmps_lost {}\n",
                gpu.events.xid, gpu.events.gpu_lost, gpu.events.mps_lost
            ),
        ),
        (
            "gcgroup.enforcers",
            lines(
                by_whom(&gpu.enforcers)
                    .chain(by_whom(&gpu.attached).map(|line| format!("attached/{line}"))),
            ),
        ),
    ]
}

fn by_whom(enforcers: &[(File, Enforcer)]) -> impl Iterator<Item = String> {
    let line =
        |(file, by): &(File, Enforcer)| format!("{} {}", file.name(), plain(&by.to_string()));
    enforcers.iter().map(line)
}

fn naive_entry(entry: &Entry, writes: GroupWrites) -> Vec<(&'static str, u16, String)> {
    let (rw, wo) = match writes {
        GroupWrites::No => (0o644, 0o200),
        GroupWrites::Yes => (0o664, 0o220),
    };
    let flag = |name: &str, value: bool| format!("{name} {}\n", u8::from(value));
    let mut stat = String::new();
    for (key, value) in [
        ("nr_submitted_kernels", entry.stat.submitted),
        ("nr_ended_kernels", entry.stat.ended),
        (
            "nr_pending_kernels",
            match (entry.stat.submitted, entry.stat.ended) {
                (Some(submitted), Some(ended)) => Some(submitted.saturating_sub(ended)),
                _ => None,
            },
        ),
        ("usage_usec", entry.stat.usage_usec),
    ] {
        if let Some(value) = value {
            let _ = writeln!(stat, "{key}: {value}");
        }
    }
    let max = match entry.settings.max.quota_usec {
        Some(quota) => quota.to_string(),
        None => "max".to_owned(),
    };
    let partition = match &entry.settings.partition {
        PartitionRef::None => "none",
        PartitionRef::Named(name) => name.as_str(),
    };
    let mut files = vec![
        (
            "memory.current",
            0o444,
            format!("{}\n", entry.memory_current),
        ),
        ("memory.peak", 0o444, format!("{}\n", entry.memory_peak)),
        (
            "compute.priority",
            rw,
            format!("{}\n", entry.settings.priority.get()),
        ),
        (
            "compute.freeze",
            rw,
            format!("{}\n", u8::from(entry.settings.freeze.is_on())),
        ),
        (
            "compute.max",
            rw,
            format!("{max} {}\n", entry.settings.max.period_usec),
        ),
        ("compute.partition", rw, format!("{partition}\n")),
        ("gcgroup.stat", 0o444, stat),
        (
            "gcgroup.events",
            0o444,
            flag("populated", entry.events.populated)
                + &flag("frozen", entry.events.frozen)
                + &flag("held", entry.events.held)
                + &flag("pending", entry.events.pending),
        ),
        ("gcgroup.enforcers", 0o444, lines(by_whom(&entry.enforcers))),
        ("gcgroup.kill", wo, String::new()),
    ];
    if let Some(workload) = &entry.workload {
        files.push(("workload.spec", 0o444, plain(&workload.spec) + "\n"));
        let mut csv = "seq,start_ns,device_us,wall_us,sm_count\n".to_owned();
        for s in entry.samples.iter() {
            let (device, wall) = (s.device_us, s.wall_us);
            let _ = writeln!(
                csv,
                "{},{},{device:.3},{wall:.3},{}",
                s.seq, s.start_ns, s.sm_count
            );
        }
        files.push(("workload.samples", 0o444, csv));
    }
    files
}

/// Everything that a client finds, by path.
fn walked(operations: &Operations, piece: usize) -> BTreeMap<String, Found> {
    let mut all = BTreeMap::new();
    let mut open = vec![(String::new(), 1)];
    while let Some((path, parent)) = open.pop() {
        let handle = operations
            .open_directory(parent)
            .expect("it was listed, so it is there");
        let list = operations.list(handle, 0).expect("it is open");
        operations.release(handle);
        assert_eq!((list[0].name.as_str(), list[1].name.as_str()), (".", ".."));
        for listed in &list[2..] {
            let found = operations
                .lookup(0, parent, OsStr::new(&listed.name))
                .expect("what is listed is found");
            let attributes = found.attributes;
            assert_eq!(attributes.kind, listed.kind, "{path}/{}", listed.name);
            let again = operations.attributes(attributes.ino);
            assert_eq!(again, Ok(attributes), "{path}/{}", listed.name);
            let path = match path.as_str() {
                "" => listed.name.clone(),
                parent => format!("{parent}/{}", listed.name),
            };
            let text = match attributes.kind {
                Kind::Directory => {
                    open.push((path.clone(), attributes.ino));
                    String::new()
                }
                Kind::Link => operations
                    .read_link(0, attributes.ino)
                    .expect("it is a link"),
                Kind::File if attributes.mode & 0o444 == 0 => {
                    let denied = operations.open(attributes.ino, Access::Read);
                    assert_eq!(denied, Err(Errno::ACCESS), "{path}");
                    String::new()
                }
                Kind::File => read_in_pieces(operations, attributes.ino, piece),
            };
            let before = all.insert(path, (attributes.kind, attributes.mode, text));
            assert!(before.is_none(), "a name is listed twice");
        }
    }
    all
}

fn read_in_pieces(operations: &Operations, ino: u64, piece: usize) -> String {
    let (handle, _) = operations
        .open(ino, Access::Read)
        .expect("its mode lets it be read");
    let mut text = Vec::new();
    loop {
        let offset = text.len() as u64;
        let read = operations.read(handle, offset, piece, |bytes| {
            bytes.map(<[u8]>::to_vec).expect("the directory is there")
        });
        if read.is_empty() {
            operations.release(handle);
            return String::from_utf8(text).expect("files are text");
        }
        text.extend(read);
    }
}

fn text() -> impl Strategy<Value = String> {
    "[a-zA-Z0-9 /:.\n\u{e9}]{0,12}"
}

fn enforcers() -> impl Strategy<Value = Vec<(File, Enforcer)>> {
    let enforcer = prop_oneof![
        Just(Enforcer::Worker),
        Just(Enforcer::ChannelWindow),
        text().prop_map(Enforcer::None)
    ];
    prop::collection::vec(
        (prop_oneof![Just(File::Freeze), Just(File::Max)], enforcer),
        0..3,
    )
}

fn settings() -> impl Strategy<Value = Settings> {
    let partition = prop_oneof![
        Just(PartitionRef::None),
        "[a-z0-9][a-z0-9._-]{0,8}".prop_filter_map("a partition's name", |name| {
            name.parse().ok().map(PartitionRef::Named)
        }),
    ];
    (
        0_u8..16,
        any::<bool>(),
        any::<Option<u64>>(),
        any::<u64>(),
        partition,
    )
        .prop_map(
            |(priority, frozen, quota_usec, period_usec, partition)| Settings {
                priority: Priority::new(priority).expect("it is in range"),
                freeze: Switch::from(frozen),
                max: Quota {
                    quota_usec,
                    period_usec,
                },
                partition,
            },
        )
}

fn entry() -> impl Strategy<Value = Entry> {
    let stat = any::<[Option<u64>; 3]>();
    let workload = prop::option::of(text());
    let samples = prop::collection::vec((any::<u64>(), 0.0..1e9_f64, any::<u32>()), 0..4);
    (
        (settings(), stat, workload, samples),
        (any::<[bool; 4]>(), any::<[u64; 2]>(), enforcers()),
    )
        .prop_map(
            |((settings, stat, spec, samples), (flags, memory, enforcers))| Entry {
                node: NodeId(0),
                pid: 0,
                gpu: 0,
                workload: spec.map(|spec| {
                    let name = String::new();
                    Arc::new(Workload { name, spec })
                }),
                settings,
                events: EntryEvents {
                    populated: flags[0],
                    frozen: flags[1],
                    held: flags[2],
                    pending: flags[3],
                },
                stat: Stat {
                    submitted: stat[0],
                    ended: stat[1],
                    usage_usec: stat[2],
                    ..Stat::default()
                },
                memory_current: memory[0],
                memory_peak: memory[1],
                enforcers: Arc::new(enforcers),
                samples: Arc::new(
                    samples
                        .into_iter()
                        .map(|(seq, device_us, sm_count)| Sample {
                            seq,
                            start_ns: seq,
                            device_us,
                            wall_us: device_us,
                            sm_count,
                        })
                        .collect(),
                ),
            },
        )
}

fn gpu() -> impl Strategy<Value = Gpu> {
    let utilization = prop::sample::subsequence(
        vec![
            ("gpu_percent", 7),
            ("power_milliwatt", 700_000),
            ("throttle_reasons", 4),
        ],
        0..=3,
    );
    let both = (enforcers(), enforcers());
    (text(), any::<[u64; 5]>(), utilization, both).prop_map(
        |(name, numbers, utilization, (enforcers, attached))| Gpu {
            node: NodeId(0),
            partitions_node: NodeId(0),
            index: 0,
            uuid: name.clone(),
            name,
            sm_capacity: 132,
            sm_granularity: 8,
            memory_capacity: numbers[0],
            memory_current: numbers[1],
            utilization,
            events: DeviceEvents {
                xid: numbers[2],
                gpu_lost: numbers[3],
                mps_lost: numbers[4],
            },
            enforcers,
            attached,
        },
    )
}

prop_compose! {
    fn process()(
        cgroup in text(),
        uid in any::<u32>(),
        comm in text(),
        gpus in prop::collection::btree_map(0_u32..4, entry(), 0..3),
    ) -> Process {
        let gpus = gpus.into_iter().map(|(gpu, entry)| (gpu, Arc::new(entry))).collect();
        Process { node: NodeId(0), pid: 0, cgroup, uid, comm, gpus }
    }
}

prop_compose! {
    fn partition()(
        sm_count in any::<u32>(),
        groups in prop::collection::vec(any::<u32>(), 0..4),
        members in prop::collection::vec(any::<u32>(), 0..4),
    ) -> (u32, Vec<u32>, Vec<u32>) {
        (sm_count, groups, members)
    }
}

prop_compose! {
    /// A snapshot; directories get nodes from `first` on, each its own.
    fn snapshot(first: u64)(
        gpus in prop::collection::btree_map(0_u32..12, gpu(), 0..4),
        partitions in prop::collection::btree_map(
            (0_u32..12, "[a-z0-9][a-z0-9._-]{0,8}"), partition(), 0..6),
        processes in prop::collection::btree_map(1_u32..70_000, process(), 0..6),
        service in prop::sample::subsequence(vec![("nr_reads", 1), ("nr_writes", u64::MAX)], 0..=2),
    ) -> Snapshot {
        let mut node = first;
        let mut fresh = || { node += 1; NodeId(node) };
        let pending = vec!["7 compute.freeze 1".to_owned(); service.len()];
        let mut snapshot = Snapshot { service, pending, ..Snapshot::default() };
        for (index, gpu) in gpus {
            let gpu = Gpu { node: fresh(), partitions_node: fresh(), index, ..gpu };
            snapshot.gpus.insert(index, Arc::new(gpu));
        }
        for ((gpu, name), (sm_count, groups, members)) in partitions {
            let Ok(name) = name.parse::<gcgroup_model::value::PartitionName>() else { continue };
            let partition = Partition { node: fresh(), gpu, name: name.clone(), sm_count, groups, members };
            snapshot.partitions.insert((gpu, name), Arc::new(partition));
        }
        for (pid, process) in processes {
            let gpus = process.gpus.into_iter().map(|(gpu, entry)| {
                let workload = entry.workload.as_ref().map(|workload| Arc::new(Workload {
                    name: format!("w-{pid}-{gpu}"),
                    spec: workload.spec.clone(),
                }));
                let entry = Entry { node: fresh(), pid, gpu, workload, ..(*entry).clone() };
                (gpu, Arc::new(entry))
            }).collect();
            let process = Process { node: fresh(), pid, gpus, ..process };
            snapshot.processes.insert(pid, Arc::new(process));
        }
        snapshot
    }
}

fn serving(snapshot: &Snapshot, writes: GroupWrites) -> (Arc<Still>, Operations) {
    let service = Arc::new(Still(Mutex::new(Arc::new(snapshot.clone()))));
    let operations = Operations::new(Arc::clone(&service) as _, writes, "9.9".to_owned())
        .expect("a thread starts");
    (service, operations)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_walk_finds_what_the_snapshot_holds(
        snapshot in snapshot(0),
        group_writes in any::<bool>(),
        piece in 1_usize..200,
    ) {
        let writes = if group_writes { GroupWrites::Yes } else { GroupWrites::No };
        let (_, operations) = serving(&snapshot, writes);
        prop_assert_eq!(walked(&operations, piece), naive(&snapshot, writes));
    }

    #[test]
    fn names_that_are_not_listed_are_not_there(
        snapshot in snapshot(0),
        name in "[a-z0-9.+ -]{1,5}",
    ) {
        let (_, operations) = serving(&snapshot, GroupWrites::No);
        let there = naive(&snapshot, GroupWrites::No);
        let mut all = vec![(String::new(), 1)];
        while let Some((path, ino)) = all.pop() {
            let prefix = if path.is_empty() { path } else { format!("{path}/") };
            let found = operations.lookup(0, ino, OsStr::new(&name));
            let expected = there.contains_key(&format!("{prefix}{name}"));
            prop_assert_eq!(found.is_ok(), expected, "{}{}", prefix, name);
            let handle = operations.open_directory(ino).expect("it is there");
            for child in &operations.list(handle, 0).expect("it is open")[2..] {
                if child.kind == Kind::Directory {
                    let found = operations.lookup(0, ino, OsStr::new(&child.name)).expect("listed");
                    all.push((format!("{prefix}{}", child.name), found.attributes.ino));
                }
            }
        }
    }

    #[test]
    fn what_is_gone_stays_gone_though_its_name_comes_back(
        before in snapshot(0),
        after in snapshot(1 << 20),
    ) {
        let (service, operations) = serving(&before, GroupWrites::No);
        let mut open = Vec::new();
        for (pid, process) in &before.processes {
            let processes = operations.lookup(0, 1, OsStr::new("processes")).expect("it is there");
            let name = pid.to_string();
            let directory = operations
                .lookup(0, processes.attributes.ino, OsStr::new(&name))
                .expect("it is in the snapshot")
                .attributes
                .ino;
            let file = operations.lookup(0, directory, OsStr::new("comm")).expect("a row");
            let (handle, _) = operations.open(file.attributes.ino, Access::Read).expect("readable");
            operations.read(handle, 0, 1, |bytes| bytes.map(drop)).expect("it is there");
            open.push((directory, file.attributes.ino, handle, process));
        }
        *service.0.lock() = Arc::new(after);
        for (directory, file, handle, process) in open {
            prop_assert_eq!(operations.read(handle, 0, 9, |bytes| bytes.map(drop)), Err(Errno::NODEV));
            let rest = operations.read(handle, 1, usize::MAX, |bytes| bytes.map(<[u8]>::to_vec));
            let kept = plain(&process.comm) + "\n";
            prop_assert_eq!(rest, Ok(kept.as_bytes()[1..].to_vec()), "a text that was begun");
            prop_assert_eq!(operations.open(file, Access::Read), Err(Errno::STALE));
            prop_assert_eq!(operations.attributes(directory), Err(Errno::STALE));
            prop_assert_eq!(operations.lookup(0, directory, OsStr::new("comm")), Err(Errno::NOENT));
            prop_assert_eq!(operations.open_directory(directory), Err(Errno::STALE));
        }
    }
}
