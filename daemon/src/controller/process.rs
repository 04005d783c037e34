//! One process with an entry: a workload that the service launched.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use gcgroup_device::ChannelGroups;
use gcgroup_fs::Reply;
use gcgroup_kernels::protocol::{Counters, Message, Readiness};
use gcgroup_model::change::{Begun, Done, Refusal};
use gcgroup_model::snapshot::{
    Enforcers, Entry, EntryEvents, NodeId, Process, Sample, Settings, Stat, Workload,
};
use gcgroup_policy::enforcer::Sharing;
use gcgroup_policy::lane::Lane;

use super::Controller;
use super::ticket::{Job, JobId};
use crate::clock::now_ns;
use crate::link::Sender;
use crate::{launch, procfs, spawn};

/// Launches that workload.samples shows.
const SAMPLES: usize = 1024;

/// A process of the service.
pub(super) struct Proc {
    /// Its directory `processes/<pid>`.
    pub(super) node: NodeId,
    /// Its directory `processes/<pid>/<gpu>`.
    pub(super) entry: NodeId,
    pub(super) pid: u32,
    pub(super) gpu: u32,
    pub(super) facts: procfs::Facts,
    pub(super) workload: Arc<Workload>,
    pub(super) settings: Settings,
    pub(super) counters: Counters,
    pub(super) readiness: Readiness,
    pub(super) samples: Arc<Vec<Sample>>,
    pub(super) sender: Sender,
    pub(super) pidfd: OwnedFd,
    /// Its channel groups and their timeslice in microseconds, where known.
    pub(super) channels: Option<(ChannelGroups, u64)>,
    /// Which start of the private MPS server it is a client of.
    pub(super) mps: Option<u64>,
    /// The SM groups it was last placed on, `None` for the whole device.
    pub(super) placed: Option<Vec<u32>>,
    pub(super) lane: Lane,
    /// When the lane wants to be asked again.
    pub(super) next_deadline: Option<u64>,
    pub(super) jobs: HashMap<JobId, Job>,
    /// Since when it is frozen, monotonic nanoseconds.
    pub(super) frozen_since: Option<u64>,
    /// When its entry was last brought up to date while frozen.
    pub(super) refreshed_ns: u64,
    pub(super) kill: Option<Kill>,
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

    fn stat(&self, sharing: Sharing) -> Stat {
        let counters = &self.counters;
        let frozen_now = self
            .frozen_since
            .map_or(0, |since| now_ns().saturating_sub(since) / 1_000);
        Stat {
            submitted: Some(counters.submitted),
            ended: Some(counters.ended),
            iterations: Some(counters.iterations),
            usage_usec: Some(counters.usage_usec),
            throttled_usec: Some(counters.throttled_usec),
            frozen_usec: Some(counters.frozen_usec + frozen_now),
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

    fn snapshot(&self, sharing: Sharing, enforcers: Arc<Enforcers>) -> Entry {
        Entry {
            node: self.entry,
            pid: self.pid,
            gpu: self.gpu,
            workload: Some(self.workload.clone()),
            settings: self.settings.clone(),
            events: EntryEvents {
                populated: true,
                frozen: self.settings.freeze.is_on(),
                held: false,
                pending: self.lane.is_pending(),
            },
            stat: self.stat(sharing),
            memory_current: self.readiness.buffer_bytes,
            memory_peak: self.readiness.buffer_bytes,
            enforcers,
            samples: self.samples.clone(),
        }
    }

    /// Takes counters that the worker sent.
    pub(super) fn count(&mut self, counters: Counters) {
        self.counters = counters;
        self.frozen_since = counters.frozen.then(now_ns);
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
        let entry = Arc::new(proc.snapshot(gpu.can.sharing, gpu.enforcers.clone()));
        let process = Process {
            node: proc.node,
            pid: proc.pid,
            cgroup: proc.facts.cgroup.clone(),
            uid: proc.facts.uid,
            comm: proc.facts.comm.clone(),
            gpus: [(proc.gpu, entry)].into(),
        };
        self.snapshot.processes.insert(proc.pid, Arc::new(process));
        self.dirty = true;
    }

    /// The process that has this pid.
    pub(super) fn by_pid(&self, pid: u32) -> Option<&Proc> {
        self.procs.values().find(|proc| proc.pid == pid)
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
                if !samples.is_empty() {
                    let surplus = (proc.samples.len() + samples.len()).saturating_sub(SAMPLES);
                    let kept = proc.samples.iter().copied().chain(samples).skip(surplus);
                    proc.samples = Arc::new(kept.collect());
                }
                self.publish(node);
            }
            Message::Ending { error } => match error {
                Some(error) => {
                    tracing::warn!(pid = proc.pid, gpu = proc.gpu, %error, "a workload failed");
                    self.look_after_mps();
                }
                None => tracing::info!(pid = proc.pid, "a workload's time is over"),
            },
        }
    }

    /// A worker ended or is about to: its entry goes at once.
    pub(super) fn worker_gone(&mut self, node: NodeId) {
        let Some(mut proc) = self.procs.remove(&node) else {
            return;
        };
        tracing::info!(
            pid = proc.pid,
            gpu = proc.gpu,
            name = proc.workload.name,
            "a workload has ended"
        );
        self.counters.ended += 1;
        if self
            .snapshot
            .processes
            .get(&proc.pid)
            .is_some_and(|published| published.node == proc.node)
        {
            self.snapshot.processes.remove(&proc.pid);
        }
        self.dirty = true;
        self.barriers.leave(proc.pid);
        // Who asked for its end is told when it is really over.
        if let Some(kill) = proc.kill.take() {
            self.dying.insert(node, kill);
        }
        let gone = Refusal::Gone(format!("process {}", proc.pid));
        for (_, job) in std::mem::take(&mut proc.jobs) {
            if !job.ended {
                self.member_done(job, Err(gone.clone()));
            }
        }
        self.publish_gpu(proc.gpu);
        if proc.mps.is_some() {
            self.look_after_mps();
        }
        // Its socket may have closed while it hangs in the driver.
        tokio::spawn(async move {
            tokio::time::sleep(launch::GRACE).await;
            spawn::kill(&proc.pidfd);
        });
    }

    /// A worker's process is no more.
    pub(super) fn worker_reaped(&mut self, node: NodeId) {
        self.worker_gone(node);
        if let Some(kill) = self.dying.remove(&node) {
            for reply in kill.replies {
                self.answer(reply, Ok(Done::Quiet));
            }
        }
    }

    /// gcgroup.kill: asks the worker to end, passing by its lane.
    pub(super) fn kill(&mut self, node: NodeId, reply: Reply) {
        self.tell(node, gcgroup_kernels::protocol::Command::End);
        // The worker's own time to end comes before the deadline begins.
        let limit = launch::GRACE + self.config.settings_deadline;
        let deadline = now_ns() + u64::try_from(limit.as_nanos()).unwrap_or(0);
        let Some(proc) = self.procs.get_mut(&node) else {
            self.answer(reply, Err(Refusal::Gone("the process".to_owned())));
            return;
        };
        if let Some(kill) = &mut proc.kill {
            kill.replies.push(reply);
            kill.deadline.get_or_insert(deadline);
            return;
        }
        proc.kill = Some(Kill {
            replies: vec![reply],
            deadline: Some(deadline),
        });
        self.kill_later(node);
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
        if let Some(proc) = self.procs.get(&node) {
            tracing::warn!(
                pid = proc.pid,
                "a worker did not end when asked and is killed"
            );
            spawn::kill(&proc.pidfd);
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
