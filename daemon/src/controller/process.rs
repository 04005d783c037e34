//! One process with an entry: a workload that the service launched, or a program
//! of somebody else.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use gcgroup_device::ChannelSet;
use gcgroup_fs::Reply;
use gcgroup_kernels::protocol::{Counters, Message, Readiness};
use gcgroup_model::change::{Begun, Done, Refusal};
use gcgroup_model::snapshot::{
    Enforcers, Entry, EntryEvents, NodeId, Process, Sample, Settings, Stat, Workload,
};
use gcgroup_policy::enforcer::{Origin, Sharing};
use gcgroup_policy::lane::Lane;

use super::Controller;
use super::attach::Attached;
use super::ticket::{Job, JobId};
use crate::clock::now_ns;
use crate::link::Sender;
use crate::{launch, procfs, spawn};

/// Launches that workload.samples shows.
const SAMPLES: usize = 1024;

/// A process on one GPU.
pub(super) struct Proc {
    /// Its directory `processes/<pid>`.
    pub(super) node: NodeId,
    /// Its directory `processes/<pid>/<gpu>`.
    pub(super) entry: NodeId,
    pub(super) pid: u32,
    pub(super) gpu: u32,
    pub(super) facts: procfs::Facts,
    pub(super) settings: Settings,
    pub(super) pidfd: Arc<OwnedFd>,
    pub(super) lane: Lane,
    /// When the lane wants to be asked again.
    pub(super) next_deadline: Option<u64>,
    pub(super) jobs: HashMap<JobId, Job>,
    /// Since when it is frozen, monotonic nanoseconds.
    pub(super) frozen_since: Option<u64>,
    /// When its entry was last brought up to date while frozen.
    pub(super) refreshed_ns: u64,
    pub(super) kill: Option<Kill>,
    pub(super) body: Body,
}

/// What makes its settings true.
pub(super) enum Body {
    /// A worker of ours runs in it.
    Worker(Box<Worker>),
    /// The driver does, from outside.
    Attached(Box<Attached>),
}

/// What there is of a workload.
pub(super) struct Worker {
    pub(super) workload: Arc<Workload>,
    pub(super) counters: Counters,
    pub(super) readiness: Readiness,
    pub(super) samples: Arc<Vec<Sample>>,
    pub(super) sender: Sender,
    /// Its channels and their timeslice in microseconds, where known.
    pub(super) channels: Option<(ChannelSet, u64)>,
    /// Which start of the private MPS server it is a client of.
    pub(super) mps: Option<u64>,
    /// The SM groups it was last placed on, `None` for the whole device.
    pub(super) placed: Option<Vec<u32>>,
}

/// A kill under way.
pub(super) struct Kill {
    replies: Vec<Reply>,
    /// When the callers must have an answer.
    pub(super) deadline: Option<u64>,
}

impl Proc {
    /// When the callers of a kill must have an answer.
    pub(super) fn kill_deadline(&self) -> Option<u64> {
        self.kill.as_ref().and_then(|kill| kill.deadline)
    }

    /// Takes counters that the worker sent.
    pub(super) fn count(&mut self, counters: Counters) {
        if let Some(worker) = self.worker_mut() {
            worker.counters = counters;
        }
        self.frozen_since = counters.frozen.then(now_ns);
    }

    pub(super) fn worker(&self) -> Option<&Worker> {
        match &self.body {
            Body::Worker(worker) => Some(worker),
            Body::Attached(_) => None,
        }
    }

    pub(super) fn worker_mut(&mut self) -> Option<&mut Worker> {
        match &mut self.body {
            Body::Worker(worker) => Some(worker),
            Body::Attached(_) => None,
        }
    }

    pub(super) fn attached(&self) -> Option<&Attached> {
        match &self.body {
            Body::Worker(_) => None,
            Body::Attached(attached) => Some(attached),
        }
    }

    pub(super) fn attached_mut(&mut self) -> Option<&mut Attached> {
        match &mut self.body {
            Body::Worker(_) => None,
            Body::Attached(attached) => Some(attached),
        }
    }

    pub(super) fn origin(&self) -> Origin {
        match &self.body {
            Body::Worker(_) => Origin::Launched,
            Body::Attached(attached) => attached.origin(),
        }
    }

    /// Microseconds of the freeze that lasts now.
    pub(super) fn frozen_now_usec(&self) -> u64 {
        self.frozen_since
            .map_or(0, |since| now_ns().saturating_sub(since) / 1_000)
    }

    fn snapshot(&self, sharing: Sharing, enforcers: Arc<Enforcers>) -> Entry {
        let frozen_now = self.frozen_now_usec();
        let (stat, memory) = match &self.body {
            Body::Worker(worker) => (
                worker.stat(sharing, frozen_now),
                (worker.readiness.buffer_bytes, worker.readiness.buffer_bytes),
            ),
            Body::Attached(attached) => (attached.stat(frozen_now), attached.memory()),
        };
        Entry {
            node: self.entry,
            pid: self.pid,
            gpu: self.gpu,
            workload: self.worker().map(|worker| worker.workload.clone()),
            settings: self.settings.clone(),
            events: EntryEvents {
                populated: self.attached().is_none_or(Attached::is_populated),
                frozen: self.settings.freeze.is_on(),
                held: false,
                pending: self.lane.is_pending(),
            },
            stat,
            memory_current: memory.0,
            memory_peak: memory.1,
            enforcers,
            samples: self
                .worker()
                .map(|worker| worker.samples.clone())
                .unwrap_or_default(),
        }
    }
}

impl Worker {
    fn stat(&self, sharing: Sharing, frozen_now_usec: u64) -> Stat {
        let counters = &self.counters;
        Stat {
            submitted: Some(counters.submitted),
            graph_launches: None,
            ended: Some(counters.ended),
            iterations: Some(counters.iterations),
            usage_usec: Some(counters.usage_usec),
            throttled_usec: Some(counters.throttled_usec),
            frozen_usec: Some(counters.frozen_usec + frozen_now_usec),
            nr_freezes: Some(counters.nr_freezes),
            nr_throttled: Some(counters.nr_throttled),
            timeslice_usec: self.channels.as_ref().map(|(_, usec)| *usec),
            channel_groups: match sharing {
                Sharing::Spatial => None,
                Sharing::Temporal => self
                    .channels
                    .as_ref()
                    .and_then(|(found, _)| u64::try_from(found.groups.len()).ok()),
            },
            sm_count: Some(u64::from(counters.sm_count)),
            context_bytes: self.readiness.context_bytes,
        }
    }
}

impl Controller {
    /// The published entry of a process shall be brought up to date.
    pub(super) fn publish(&mut self, node: NodeId) {
        self.stale_entries.insert(node);
    }

    /// Brings the published entry of a process up to date.
    pub(super) fn render_entry(&mut self, node: NodeId) {
        let Some(proc) = self.procs.get(&node) else {
            return;
        };
        let Some(gpu) = self.gpus.get(&proc.gpu) else {
            return;
        };
        let enforcers = gpu.enforcers(proc.origin()).clone();
        let entry = Arc::new(proc.snapshot(gpu.can.sharing, enforcers));
        // A process has an entry for each of its GPUs.
        let published = self.snapshot.processes.get(&proc.pid);
        let mut gpus = published
            .filter(|published| published.node == proc.node)
            .map(|published| published.gpus.clone())
            .unwrap_or_default();
        gpus.insert(proc.gpu, entry);
        let process = Process {
            node: proc.node,
            pid: proc.pid,
            cgroup: proc.facts.cgroup.clone(),
            uid: proc.facts.uid,
            comm: proc.facts.comm.clone(),
            gpus,
        };
        self.snapshot.processes.insert(proc.pid, Arc::new(process));
        self.dirty = true;
    }

    /// The entries of the process that has this pid, one for each of its GPUs.
    pub(super) fn by_pid(&self, pid: u32) -> impl Iterator<Item = &Proc> {
        self.procs.values().filter(move |proc| proc.pid == pid)
    }

    /// Takes an entry out of what is published.
    pub(super) fn unpublish(&mut self, proc: &Proc) {
        self.stale_entries.remove(&proc.entry);
        self.dirty = true;
        let Some(published) = self.snapshot.processes.get_mut(&proc.pid) else {
            return;
        };
        if published.node != proc.node {
            return;
        }
        let process = Arc::make_mut(published);
        process.gpus.remove(&proc.gpu);
        if process.gpus.is_empty() {
            self.snapshot.processes.remove(&proc.pid);
        }
    }

    /// Frozen time passes without any report; the figure must not stand still
    /// for longer than `interval`.
    pub(super) fn refresh_frozen(&mut self, interval: Duration) {
        let now = now_ns();
        let interval = u64::try_from(interval.as_nanos()).unwrap_or(u64::MAX);
        let stale: Vec<_> = self
            .procs
            .values_mut()
            .filter(|proc| {
                proc.frozen_since.is_some() && now.saturating_sub(proc.refreshed_ns) >= interval
            })
            .map(|proc| {
                proc.refreshed_ns = now;
                proc.entry
            })
            .collect();
        for node in stale {
            self.publish(node);
        }
    }

    pub(super) fn worker_said(&mut self, node: NodeId, message: Message) {
        let Some(proc) = self.procs.get_mut(&node) else {
            return;
        };
        let (pid, gpu) = (proc.pid, proc.gpu);
        match message {
            Message::Reply {
                id,
                result,
                counters,
            } => {
                if let Some(counters) = counters {
                    proc.count(counters);
                }
                self.job_answered(node, id, result.map_err(crate::link::refusal));
                self.publish(node);
            }
            Message::Report { counters, samples } => {
                proc.count(counters);
                if let Some(worker) = proc.worker_mut()
                    && !samples.is_empty()
                {
                    let surplus = (worker.samples.len() + samples.len()).saturating_sub(SAMPLES);
                    let kept = worker.samples.iter().copied().chain(samples).skip(surplus);
                    worker.samples = Arc::new(kept.collect());
                }
                self.publish(node);
            }
            Message::Ending { error } => match error {
                Some(error) => {
                    tracing::warn!(pid, gpu, %error, "a workload failed");
                    self.look_after_mps();
                }
                None => tracing::info!(pid, "a workload's time is over"),
            },
        }
    }

    /// A worker ended or is about to: its entry goes at once.
    pub(super) fn worker_gone(&mut self, node: NodeId) {
        let Some(proc) = self.take_out(node) else {
            return;
        };
        let name = proc.worker().map(|worker| worker.workload.name.as_str());
        tracing::info!(pid = proc.pid, gpu = proc.gpu, name, "a workload has ended");
        self.counters.ended += 1;
        self.barriers.leave(proc.pid);
        self.publish_gpu(proc.gpu);
        if proc.worker().is_some_and(|worker| worker.mps.is_some()) {
            self.look_after_mps();
        }
        // Its socket may have closed while it hangs in the driver.
        tokio::spawn(async move {
            tokio::time::sleep(launch::GRACE).await;
            spawn::kill(&*proc.pidfd);
        });
    }

    /// Takes an entry out: who waits for something about it gets ENODEV, and who
    /// asked for its end is told when it is really over.
    pub(super) fn take_out(&mut self, node: NodeId) -> Option<Proc> {
        let mut proc = self.procs.remove(&node)?;
        self.unpublish(&proc);
        if let Some(kill) = proc.kill.take() {
            self.dying.insert(node, kill);
        }
        let gone = Refusal::Gone(format!("process {}", proc.pid));
        for (_, job) in std::mem::take(&mut proc.jobs) {
            if !job.ended {
                self.member_done(job, Err(gone.clone()));
            }
        }
        Some(proc)
    }

    /// A worker's process is no more.
    pub(super) fn worker_reaped(&mut self, node: NodeId) {
        self.worker_gone(node);
        self.killed(node);
    }

    /// Tells who asked for its end that it has ended.
    pub(super) fn killed(&mut self, node: NodeId) {
        if let Some(kill) = self.dying.remove(&node) {
            for reply in kill.replies {
                self.answer(reply, Ok(Done::Quiet));
            }
        }
    }

    /// gcgroup.kill, passing by the lane: asks a worker to end, kills others.
    pub(super) fn kill(&mut self, node: NodeId, reply: Reply) {
        self.tell(node, gcgroup_kernels::protocol::Command::End);
        // The worker's own time to end comes before the deadline begins.
        let limit = launch::GRACE + self.config.settings_deadline;
        let deadline = now_ns() + u64::try_from(limit.as_nanos()).unwrap_or(0);
        let Some(proc) = self.procs.get_mut(&node) else {
            self.answer(reply, Err(Refusal::Gone("the process".to_owned())));
            return;
        };
        if proc.attached().is_some() {
            spawn::kill(&*proc.pidfd);
        }
        if let Some(kill) = &mut proc.kill {
            kill.replies.push(reply);
            kill.deadline.get_or_insert(deadline);
            return;
        }
        proc.kill = Some(Kill {
            replies: vec![reply],
            deadline: Some(deadline),
        });
        if proc.worker().is_some() {
            self.kill_later(node);
        }
    }

    /// Asks a worker to end, and kills it if it does not.
    pub(super) fn end_soon(&mut self, node: NodeId) {
        self.tell(node, gcgroup_kernels::protocol::Command::End);
        self.kill_later(node);
    }

    fn kill_later(&self, node: NodeId) {
        let events = self.events.clone();
        tokio::spawn(async move {
            tokio::time::sleep(launch::GRACE).await;
            // The controller may have ended meanwhile.
            let _ = events.send(super::Event::KillNow { node });
        });
    }

    pub(super) fn kill_now(&mut self, node: NodeId) {
        if let Some(proc) = self.procs.get(&node).filter(|proc| proc.worker().is_some()) {
            tracing::warn!(
                pid = proc.pid,
                "a worker did not end when asked and is killed"
            );
            spawn::kill(&*proc.pidfd);
        }
    }

    /// Answers the callers of kills that even SIGKILL did not bring about.
    pub(super) fn give_up_kills(&mut self, now: u64) {
        let limit = launch::GRACE + self.config.settings_deadline;
        let limit_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        let mut late = Vec::new();
        let living = self
            .procs
            .values_mut()
            .filter_map(|proc| proc.kill.as_mut());
        for kill in living.chain(self.dying.values_mut()) {
            if kill.deadline.is_some_and(|deadline| deadline <= now) {
                kill.deadline = None;
                late.append(&mut kill.replies);
            }
        }
        for reply in late {
            let refusal = Refusal::TimedOut {
                what: "the kill".to_owned(),
                limit_ms,
                begun: Begun::Yes,
            };
            self.answer(reply, Err(refusal));
        }
    }
}
