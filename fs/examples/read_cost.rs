//! What one read of a control file costs beside the least that FUSE can cost.
//!
//! `cargo run --release -p gcgroup-fs --example read_cost` (as root) mounts two
//! trees: a bare one that answers every read with a constant, and ours with 32
//! processes whose snapshot is published ten times a second. Both have the same
//! mount options, threads, times to live and depth. A client process reads one
//! file of each in turn (A B A B), so that both see the same machine. Client and
//! servers share one CPU: a wake-up across CPUs costs several times as much or
//! not, depending on where the scheduler put a thread, and would hide what the
//! trees themselves cost.
//!
//! This example imports the FUSE library, which the crate itself does in its
//! session module alone: the bare tree is not part of the product.

use std::collections::BTreeMap;
use std::error::Error;
use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwap;
use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    InitFlags, KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEntry, ReplyOpen,
    Request, Session, SessionACL,
};
use gcgroup_fs::{Mounted, Options, Reply, Service, mount};
use gcgroup_model::change::{Caller, Done};
use gcgroup_model::row::GroupWrites;
use gcgroup_model::snapshot::{Entry, EntryEvents, NodeId, Process, Settings, Stat};
use gcgroup_model::{Change, File as Row, Snapshot};
use rustix::thread::{CpuSet, sched_setaffinity};

/// Reads of each kind on each tree.
const ROUNDS: usize = 20_000;

/// Time between two reads.
const PAUSE: Duration = Duration::from_micros(20);

/// First of the 32 pids.
const FIRST_PID: u32 = 4_000_001;

/// CPU of the client and of the threads of both trees.
const CPU: usize = 0;

type Outcome = Result<(), Box<dyn Error>>;

/// Keeps this process, and what it will start, on one CPU.
fn stay_on_one_cpu() {
    let mut set = CpuSet::new();
    set.set(CPU);
    if let Err(errno) = sched_setaffinity(None, &set) {
        eprintln!("not kept on CPU {CPU}: {errno}");
    }
}

fn main() -> Outcome {
    let arguments: Vec<String> = std::env::args().collect();
    match arguments.get(1).map(String::as_str) {
        Some("client") => client(&arguments[2..]),
        _ => serve(),
    }
}

fn serve() -> Outcome {
    stay_on_one_cpu();
    let directory = tempfile::tempdir()?;
    let (bare, ours) = (directory.path().join("bare"), directory.path().join("ours"));
    std::fs::create_dir(&bare)?;
    std::fs::create_dir(&ours)?;
    let service = Arc::new(Published {
        snapshot: ArcSwap::from_pointee(snapshot(0)),
        touched: AtomicU64::new(0),
    });
    let options = Options {
        mountpoint: ours.clone(),
        group_writes: GroupWrites::No,
        gid: 0,
        version: "read_cost".to_owned(),
    };
    let mounted = Mounted::new(options, Arc::clone(&service) as Arc<dyn Service>)?;
    let bare_mount = mount_bare(&bare)?;
    let program = std::env::current_exe()?;
    let mut client = Command::new(program)
        .arg("client")
        .args([&bare, &ours])
        .spawn()?;
    let mut round = 0;
    let status = loop {
        if let Some(status) = client.try_wait()? {
            break status;
        }
        std::thread::sleep(Duration::from_millis(100));
        round += 1;
        service.snapshot.store(Arc::new(snapshot(round)));
        mounted.published();
    };
    bare_mount.detach()?;
    mounted.unmount()?;
    if status.success() {
        Ok(())
    } else {
        Err(format!("the client ended with {status}").into())
    }
}

/// Reads both trees in turn and prints what it took.
fn client(roots: &[String]) -> Outcome {
    println!("{ROUNDS} reads of each kind, microseconds, bare and ours in turn");
    println!(
        "{:<18} {:<16} {:>9} {:>9} {:>9} {:>9} {:>6}",
        "file", "read", "bare p50", "ours p50", "bare p99", "ours p99", "ratio"
    );
    for row in [Row::Stat, Row::MemoryCurrent, Row::Freeze] {
        let path = |root: &String| -> PathBuf {
            let process = format!("processes/{}/0", FIRST_PID + 16);
            Path::new(root).join(process).join(row.name())
        };
        let paths = [path(&roots[0]), path(&roots[1])];
        let whole = measure(|tree| {
            let mut buffer = [0; 4096];
            File::open(&paths[tree])?.read_at(&mut buffer, 0)
        })?;
        report(row.name(), "open-read-close", whole);
        let files = [File::open(&paths[0])?, File::open(&paths[1])?];
        let alone = measure(|tree| files[tree].read_at(&mut [0; 4096], 0))?;
        report(row.name(), "read alone", alone);
    }
    Ok(())
}

/// Times of `ROUNDS` reads of each of the two trees.
fn measure(
    mut read: impl FnMut(usize) -> std::io::Result<usize>,
) -> std::io::Result<[Vec<Duration>; 2]> {
    let mut times = [Vec::with_capacity(ROUNDS), Vec::with_capacity(ROUNDS)];
    for _ in 0..ROUNDS / 10 {
        read(0)?;
        read(1)?;
    }
    for _ in 0..ROUNDS {
        for (tree, times) in times.iter_mut().enumerate() {
            let start = Instant::now();
            let bytes = read(tree)?;
            times.push(start.elapsed());
            // The server hears of a close(2) after it returned; that is not to count
            // as the other tree's time.
            std::thread::sleep(PAUSE);
            assert!(bytes > 0, "a control file was empty");
        }
    }
    Ok(times)
}

fn report(file: &str, kind: &str, mut times: [Vec<Duration>; 2]) {
    times.iter_mut().for_each(|times| times.sort_unstable());
    let at = |tree: usize, percent: usize| {
        times[tree][(ROUNDS * percent / 100).min(ROUNDS - 1)].as_secs_f64() * 1e6
    };
    println!(
        "{file:<18} {kind:<16} {:>9.2} {:>9.2} {:>9.2} {:>9.2} {:>6.3}",
        at(0, 50),
        at(1, 50),
        at(0, 99),
        at(1, 99),
        at(1, 50) / at(0, 50)
    );
}

/// A service that only publishes.
struct Published {
    snapshot: ArcSwap<Snapshot>,
    touched: AtomicU64,
}

impl Service for Published {
    fn snapshot(&self) -> Arc<Snapshot> {
        self.snapshot.load_full()
    }

    fn submit(&self, _: Caller, _: Change, reply: Reply) {
        reply(Ok(Done::Quiet));
    }

    fn touched(&self, node: NodeId) {
        self.touched.store(node.0, Ordering::Relaxed);
    }
}

fn snapshot(round: u64) -> Snapshot {
    let mut processes = BTreeMap::new();
    for index in 0..32_u32 {
        let pid = FIRST_PID + index;
        let counter = Some(round * 1000 + u64::from(index));
        let entry = Entry {
            node: NodeId(2 * u64::from(index) + 2),
            pid,
            gpu: 0,
            workload: None,
            settings: Settings::default(),
            events: EntryEvents {
                populated: true,
                ..EntryEvents::default()
            },
            stat: Stat {
                submitted: counter,
                ended: counter,
                iterations: counter,
                usage_usec: counter,
                throttled_usec: counter,
                frozen_usec: counter,
                nr_freezes: counter,
                nr_throttled: counter,
                sm_count: Some(64),
                ..Stat::default()
            },
            memory_current: 1 << 30,
            memory_peak: 1 << 30,
            enforcers: Arc::default(),
            samples: Arc::default(),
        };
        let process = Process {
            node: NodeId(2 * u64::from(index) + 1),
            pid,
            cgroup: "/".to_owned(),
            uid: 0,
            comm: "worker".to_owned(),
            gpus: BTreeMap::from([(0, Arc::new(entry))]),
        };
        processes.insert(pid, Arc::new(process));
    }
    Snapshot {
        processes,
        ..Snapshot::default()
    }
}

/// `processes/<pid>/<gpu>/<file>` with any names, and one text in every file.
struct Bare {
    since: SystemTime,
}

const TEXT: &[u8] = b"0\n";
const LONG: Duration = Duration::from_secs(3600);
const SHORT: Duration = Duration::from_millis(100);
/// Inodes 1 to 4 are the directories down to `<gpu>`, and 5 is the file.
const FILE: u64 = 5;

impl Bare {
    fn attr(&self, ino: u64) -> FileAttr {
        let (kind, perm) = if ino < FILE {
            (FileType::Directory, 0o755)
        } else {
            (FileType::RegularFile, 0o644)
        };
        FileAttr {
            ino: INodeNo(ino),
            size: 0,
            blocks: 0,
            atime: self.since,
            mtime: self.since,
            ctime: self.since,
            crtime: self.since,
            kind,
            perm,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

impl Filesystem for Bare {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        let _ = config.add_capabilities(InitFlags::FUSE_PARALLEL_DIROPS);
        let _ = config.add_capabilities(InitFlags::FUSE_ATOMIC_O_TRUNC);
        let _ = config.set_max_write(128 * 1024);
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, _: &OsStr, reply: ReplyEntry) {
        if parent.0 >= FILE {
            return reply.error(Errno::ENOTDIR);
        }
        let ttl = if parent.0 == 2 || parent.0 == 3 {
            SHORT
        } else {
            LONG
        };
        reply.entry_with_ttls(&LONG, &ttl, &self.attr(parent.0 + 1), Generation(0));
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&LONG, &self.attr(ino.0));
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        let flags = FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_NOFLUSH;
        reply.opened(FileHandle(0), flags);
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        _: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        reply.data(if offset == 0 { TEXT } else { &[] });
    }
}

fn mount_bare(path: &Path) -> Result<mount::OwnMount, Box<dyn Error>> {
    let (mount, device) = mount::mount(path)?;
    let mut config = Config::default();
    config.n_threads = Some(2);
    config.clone_fd = true;
    let bare = Bare {
        since: SystemTime::now(),
    };
    let session = Session::from_fd(bare, device, SessionACL::All, config)?;
    std::thread::spawn(move || session.run());
    Ok(mount)
}
