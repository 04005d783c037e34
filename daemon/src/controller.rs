//! The controller: the one owner of the service's state.
//!
//! It takes events one by one, from FUSE threads, workers and helper tasks,
//! decides with `gcgroup-policy`, and publishes a new snapshot before it answers
//! anybody. It never waits for anything but the next event: commands go to
//! workers' sockets without blocking, and calls that may block run in tasks that
//! send their outcome back as an event.

mod attach;
mod change;
mod device;
mod keep;
mod launching;
mod log;
mod pending;
mod process;
mod ticket;
mod timer;
mod undo;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use gcgroup_device::{DeviceError, GpuInfo, GpuSample, Launches, Timeslices};
use gcgroup_fs::Reply;
use gcgroup_kernels::protocol::Message;
use gcgroup_model::change::{Caller, Change, Done, Refusal};
use gcgroup_model::snapshot::{NodeId, Snapshot};
use gcgroup_policy::barrier::Barriers;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender};

use crate::clock::now_ns;
use crate::config::Config;
use crate::discover::Found;
use crate::endings::Endings;
use crate::keeper::Said;
use crate::launch::{Context, Ready};
use crate::link::FIRST_JOB;
use crate::mps::Lost;
use crate::remembered::Remembered;

use device::GpuState;
use process::Proc;
use ticket::{JobId, Ticket, TicketId};

/// Something that happened.
pub(crate) enum Event {
    /// Somebody wrote a file or made or removed a partition.
    Asked {
        /// Who.
        caller: Caller,
        /// What.
        change: Change,
        /// How to answer.
        reply: Reply,
    },
    /// The host has GPUs; their numbers and names.
    Found(Vec<GpuInfo>),
    /// A GPU answered a probe, or did not.
    Probed {
        /// The GPU.
        gpu: GpuInfo,
        /// What it is.
        result: Result<device::Probed, Refusal>,
    },
    /// Channel control was tried on processes of our own.
    Proved {
        /// NVML index.
        gpu: u32,
        /// Whether it acts, or why not.
        result: Result<(), String>,
    },
    /// Figures of a GPU.
    Sampled {
        /// NVML index.
        gpu: u32,
        /// The figures.
        result: Result<GpuSample, DeviceError>,
    },
    /// A launch came to its end.
    Launched {
        /// Which.
        launch: u64,
        /// The worker that is ready to start.
        result: Result<Box<Ready>, Refusal>,
    },
    /// A worker said something.
    Worker {
        /// Its entry.
        node: NodeId,
        /// What.
        message: Box<Message>,
    },
    /// A worker's socket closed: it ends or has ended.
    WorkerGone {
        /// Its entry.
        node: NodeId,
    },
    /// A worker's process is no more, and what it held is free.
    WorkerReaped {
        /// Its entry.
        node: NodeId,
    },
    /// The driver answered about a timeslice.
    Timeslice {
        /// Entry of the process.
        node: NodeId,
        /// The job.
        job: JobId,
        /// The timeslices read back.
        result: Result<Timeslices, DeviceError>,
    },
    /// A process of somebody else has a context on a GPU.
    Appeared {
        /// NVML index.
        gpu: u32,
        /// Who.
        found: Box<Found>,
    },
    /// A process has no context on a GPU any more.
    Vanished {
        /// NVML index.
        gpu: u32,
        /// Thread-group id.
        pid: u32,
        /// Start time in clock ticks since boot.
        start: u64,
    },
    /// Device memory of processes has changed.
    Memory {
        /// NVML index.
        gpu: u32,
        /// Pids and bytes.
        figures: Vec<(u32, u64)>,
    },
    /// A process is in another control group.
    Moved {
        /// Thread-group id.
        pid: u32,
        /// Start time in clock ticks since boot.
        start: u64,
        /// The group's path.
        cgroup: String,
    },
    /// A process has launched so much since it was attached.
    Counted {
        /// Thread-group id.
        pid: u32,
        /// Start time in clock ticks since boot.
        start: u64,
        /// The figures.
        launches: Launches,
    },
    /// A process that was watched has ended.
    ProcessEnded {
        /// Thread-group id.
        pid: u32,
        /// Start time in clock ticks since boot.
        start: u64,
    },
    /// The keeper of an attached process said something.
    Keeper {
        /// Entry of the process.
        node: NodeId,
        /// What.
        said: Box<Said>,
    },
    /// A worker that was asked to end has had its time.
    KillNow {
        /// Its entry.
        node: NodeId,
    },
    /// These private MPS servers were found lost.
    MpsLost(Vec<Lost>),
    /// The service shall end.
    Stop,
    /// The control files were unmounted by somebody else: everything resumes,
    /// and the service ends.
    MountLost,
}

/// What FUSE threads share with the controller.
pub(crate) struct Shared {
    snapshot: ArcSwap<Snapshot>,
    events: UnboundedSender<Event>,
    /// When somebody last read a sampled value, monotonic nanoseconds.
    last_read_ns: AtomicU64,
}

impl Shared {
    /// Shares an empty snapshot.
    pub(crate) fn new(events: UnboundedSender<Event>) -> Arc<Self> {
        Arc::new(Self {
            snapshot: ArcSwap::from_pointee(Snapshot::default()),
            events,
            last_read_ns: AtomicU64::new(0),
        })
    }

    /// How long nobody has read a sampled value.
    pub(crate) fn unread_for(&self) -> Duration {
        Duration::from_nanos(now_ns().saturating_sub(self.last_read_ns.load(Ordering::Relaxed)))
    }
}

impl gcgroup_fs::Service for Shared {
    fn snapshot(&self) -> Arc<Snapshot> {
        self.snapshot.load_full()
    }

    fn submit(&self, caller: Caller, change: Change, reply: Reply) {
        let asked = Event::Asked {
            caller,
            change,
            reply,
        };
        if let Err(tokio::sync::mpsc::error::SendError(Event::Asked { reply, .. })) =
            self.events.send(asked)
        {
            reply(Err(stopping()));
        }
    }

    fn mount_lost(&self) {
        // The controller may have ended already.
        let _ = self.events.send(Event::MountLost);
    }

    fn touched(&self, _node: NodeId) {
        self.last_read_ns.store(now_ns(), Ordering::Relaxed);
    }
}

fn stopping() -> Refusal {
    Refusal::Busy("the service is stopping".to_owned())
}

/// The owner of the state.
pub(crate) struct Controller {
    config: Config,
    context: Arc<Context>,
    shared: Arc<Shared>,
    events: UnboundedSender<Event>,
    /// Told after each published snapshot.
    published: Box<dyn Fn()>,
    snapshot: Snapshot,
    /// Whether the snapshot is newer than the published one.
    dirty: bool,
    /// Entries whose snapshot is older than they are.
    stale_entries: BTreeSet<NodeId>,
    /// GPUs whose snapshot is older than they are.
    stale_gpus: BTreeSet<u32>,
    /// What is told once everybody has an answer.
    log: Vec<log::LogLine>,
    /// Until when something is likely enough to come to wait for it awake.
    awake_until: Option<u64>,
    gpus: BTreeMap<u32, GpuState>,
    procs: BTreeMap<NodeId, Proc>,
    /// Kills of processes that have no entry any more and are not reaped yet.
    dying: BTreeMap<NodeId, process::Kill>,
    /// GPUs that are being probed.
    probing: BTreeSet<u32>,
    launches: BTreeMap<u64, launching::Launch>,
    tickets: HashMap<TicketId, Ticket>,
    answers: Vec<(Reply, Result<Done, Refusal>)>,
    barriers: Barriers,
    /// Settings of processes that outlive this service, and what waits.
    remembered: Remembered,
    endings: Endings,
    /// Whether gcgroup.pending is older than what waits.
    stale_pending: bool,
    /// When settings that nobody waits for were last tried.
    wanted_tried_ns: u64,
    next_node: u64,
    next_id: u64,
    report_every_ms: u64,
    counters: Counters,
    stop: StopState,
    end: End,
}

/// Why the controller ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// It was told to.
    Asked,
    /// Nobody can reach the control files any more.
    MountLost,
}

/// The service's own counters, for gcgroup.stat.
#[derive(Debug, Default)]
struct Counters {
    changes: u64,
    refused: u64,
    timed_out: u64,
    launched: u64,
    ended: u64,
    attached: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum StopState {
    Running,
    Stopping { give_up_ns: u64 },
}

impl Controller {
    /// A controller without GPUs; `published` is called after each snapshot, and
    /// `remembered` is what an earlier service left, and `endings` tells the ends
    /// of processes of others.
    pub(crate) fn new(
        config: Config,
        context: Arc<Context>,
        shared: Arc<Shared>,
        published: Box<dyn Fn()>,
        remembered: Remembered,
        endings: Endings,
    ) -> Self {
        let events = shared.events.clone();
        Self {
            config,
            context,
            shared,
            events,
            published,
            snapshot: Snapshot::default(),
            dirty: true,
            stale_entries: BTreeSet::new(),
            stale_gpus: BTreeSet::new(),
            log: Vec::new(),
            awake_until: None,
            gpus: BTreeMap::new(),
            procs: BTreeMap::new(),
            dying: BTreeMap::new(),
            probing: BTreeSet::new(),
            launches: BTreeMap::new(),
            tickets: HashMap::new(),
            answers: Vec::new(),
            barriers: Barriers::default(),
            remembered,
            endings,
            stale_pending: true,
            wanted_tried_ns: 0,
            next_node: 0,
            next_id: FIRST_JOB,
            report_every_ms: timer::UNREAD_REPORT_MS,
            counters: Counters::default(),
            stop: StopState::Running,
            end: End::Asked,
        }
    }

    /// Works until it was told to stop and every worker has ended, or was given
    /// up on.
    pub(crate) async fn run(mut self, mut events: UnboundedReceiver<Event>) -> End {
        let mut ticker = tokio::time::interval(timer::TICK);
        ticker.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        self.adopt_pending();
        self.flush();
        loop {
            tokio::select! {
                biased;
                event = events.recv() => match event {
                    Some(event) => self.handle(event),
                    None => return self.end,
                },
                // A sleeping processor takes longer to wake than a worker to stop.
                () = tokio::task::yield_now(), if self.stays_awake() => {}
                () = timer::until(self.next_deadline()) => self.on_deadline(),
                _ = ticker.tick() => self.on_tick(),
            }
            // What has gathered meanwhile shares one snapshot.
            for _ in 0..64 {
                match events.try_recv() {
                    Ok(event) => self.handle(event),
                    Err(_) => break,
                }
            }
            // However much comes in, deadlines are kept.
            if self
                .next_deadline()
                .is_some_and(|deadline| deadline <= now_ns())
            {
                self.on_deadline();
            }
            self.flush();
            if self.may_end() {
                return self.end;
            }
        }
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Asked {
                caller,
                change,
                reply,
            } => self.asked(caller, change, reply),
            Event::Found(gpus) => self.found(gpus),
            Event::Probed { gpu, result } => self.probed(gpu, result),
            Event::Proved { gpu, result } => self.proved(gpu, result),
            Event::Sampled { gpu, result } => self.sampled(gpu, result),
            Event::Launched { launch, result } => self.launched(launch, result),
            Event::Worker { node, message } => self.worker_said(node, *message),
            Event::WorkerGone { node } => self.worker_gone(node),
            Event::WorkerReaped { node } => self.worker_reaped(node),
            Event::Timeslice { node, job, result } => self.timeslice_set(node, job, result),
            Event::Appeared { gpu, found } => self.appeared(gpu, *found),
            Event::Vanished { gpu, pid, start } => self.vanished(gpu, pid, start),
            Event::Memory { gpu, figures } => self.measured(gpu, figures),
            Event::Moved { pid, start, cgroup } => self.moved(pid, start, &cgroup),
            Event::Counted {
                pid,
                start,
                launches,
            } => self.counted(pid, start, launches),
            Event::ProcessEnded { pid, start } => self.process_ended(pid, start),
            Event::Keeper { node, said } => self.keeper_said(node, *said),
            Event::KillNow { node } => self.kill_now(node),
            Event::MpsLost(gpus) => self.mps_lost(&gpus),
            Event::Stop => self.begin_stop(),
            Event::MountLost => {
                tracing::error!("the mount was taken away");
                self.end = End::MountLost;
                self.begin_stop();
            }
        }
    }

    /// Publishes what has changed, then answers: a caller whose write returned
    /// finds it in force.
    fn flush(&mut self) {
        for node in std::mem::take(&mut self.stale_entries) {
            self.dirty = true;
            self.render_entry(node);
        }
        for gpu in std::mem::take(&mut self.stale_gpus) {
            self.dirty = true;
            self.render_gpu(gpu);
        }
        if std::mem::take(&mut self.stale_pending) {
            self.render_pending();
        }
        if self.dirty {
            self.dirty = false;
            self.snapshot.service = self.service_lines();
            self.shared.snapshot.store(Arc::new(self.snapshot.clone()));
            (self.published)();
        }
        for (reply, answer) in self.answers.drain(..) {
            reply(answer);
        }
        for line in self.log.drain(..) {
            line.write();
        }
    }

    fn answer(&mut self, reply: Reply, answer: Result<Done, Refusal>) {
        self.counters.changes += 1;
        match &answer {
            Ok(_) => {}
            Err(Refusal::TimedOut { .. }) => self.counters.timed_out += 1,
            Err(_) => self.counters.refused += 1,
        }
        self.dirty = true;
        self.answers.push((reply, answer));
    }

    fn service_lines(&self) -> Vec<(&'static str, u64)> {
        let count = |n: usize| u64::try_from(n).unwrap_or(u64::MAX);
        vec![
            ("nr_processes", count(self.procs.len())),
            ("nr_partitions", count(self.snapshot.partitions.len())),
            ("nr_changes", self.counters.changes),
            ("nr_refused", self.counters.refused),
            ("nr_timed_out", self.counters.timed_out),
            ("nr_launched", self.counters.launched),
            ("nr_ended", self.counters.ended),
            ("nr_attached", self.counters.attached),
        ]
    }

    fn fresh_node(&mut self) -> NodeId {
        self.next_node += 1;
        NodeId(self.next_node)
    }

    fn fresh_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }
}
