//! Processes of others: their entries, and what is set for them.
//!
//! Discovery says who computes on a GPU. Each such process on each of its GPUs
//! gets a keeper, a thread that makes every call to the driver about it, once
//! channel control has proved itself on that GPU.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use gcgroup_device::{Launches, ProcessKind};
use gcgroup_model::change::Setting;
use gcgroup_model::snapshot::{NodeId, Settings, Stat};
use gcgroup_policy::enforcer::Origin;
use gcgroup_policy::lane::Lane;

use super::process::{Body, Proc};
use super::{Controller, StopState};
use crate::clock::now_ns;
use crate::counting;
use crate::discover::{self, Found};
use crate::keeper::{Keeper, Order, State};

/// What there is of a process that the service did not launch.
pub(super) struct Attached {
    /// Start time in clock ticks since boot.
    pub(super) start: u64,
    kind: ProcessKind,
    /// Whether it has a context on the GPU now.
    populated: bool,
    /// Device memory it uses, bytes.
    memory: u64,
    /// Highest of these.
    peak: u64,
    /// Makes the calls to the driver, once they may be made.
    pub(super) keeper: Option<Keeper>,
    pub(super) state: State,
    launches: Option<Launches>,
    /// What is to be set as soon as there is a keeper, or tried again.
    pub(super) wanted: Vec<Setting>,
    /// What was last said about a setting that was tried in vain.
    pub(super) told: Option<String>,
}

impl Attached {
    pub(super) fn origin(&self) -> Origin {
        match self.kind {
            ProcessKind::Program | ProcessKind::MpsServer => Origin::Attached,
            ProcessKind::MpsClient => Origin::MpsClient,
        }
    }

    pub(super) fn is_populated(&self) -> bool {
        self.populated
    }

    /// Device memory now and at most, bytes.
    pub(super) fn memory(&self) -> (u64, u64) {
        (self.memory, self.peak)
    }

    /// Only what is really counted has a line.
    pub(super) fn stat(&self, frozen_now_usec: u64) -> Stat {
        let kept = self.keeper.as_ref().map(|_| &self.state);
        Stat {
            submitted: self.launches.map(|launches| launches.total),
            graph_launches: self.launches.map(|launches| launches.graphs),
            throttled_usec: kept.map(|state| state.throttled_usec),
            frozen_usec: kept.map(|state| state.frozen_usec + frozen_now_usec),
            nr_freezes: kept.map(|state| state.nr_freezes),
            nr_throttled: kept.map(|state| state.nr_throttled),
            timeslice_usec: self.state.timeslice_usec,
            channel_groups: self.state.channel_groups,
            ..Stat::default()
        }
    }

    pub(super) fn want(&mut self, setting: Setting) {
        self.wanted.retain(|other| other.file() != setting.file());
        self.wanted.push(setting);
    }

    fn set_memory(&mut self, bytes: u64) {
        self.memory = bytes;
        self.peak = self.peak.max(bytes);
    }
}

impl Controller {
    /// Looks for processes of others on a GPU from now on.
    pub(super) fn discover(&self, index: u32) {
        if let Some(gpu) = self.gpus.get(&index) {
            let (host, events) = (self.context.host.clone(), self.events.clone());
            tokio::spawn(discover::watch(host, gpu.info.clone(), events));
        }
    }

    /// A process has a context on a GPU.
    pub(super) fn appeared(&mut self, gpu: u32, found: Found) {
        if self.stop != StopState::Running {
            return;
        }
        let same = |proc: &&Proc| proc.attached().is_some_and(|a| a.start == found.start);
        let known: Vec<_> = self.by_pid(found.pid).filter(same).collect();
        let there = known.iter().find(|proc| proc.gpu == gpu);
        if let Some(entry) = there.map(|proc| proc.entry) {
            self.populate(entry, Some(found.memory_bytes.unwrap_or(0)));
            // Its objects have other handles now, and the driver's defaults.
            self.tell_keeper(entry, Order::Look);
            return;
        }
        let relative = known.first().map(|proc| {
            let launches = proc.attached().and_then(|attached| attached.launches);
            (proc.node, proc.pidfd.clone(), launches)
        });
        let (node, pidfd, launches) = match relative {
            Some(relative) => relative,
            None => {
                let pidfd = Arc::new(found.pidfd);
                self.watch(pidfd.clone(), found.pid, found.start);
                self.count(found.pid, found.start);
                (self.fresh_node(), pidfd, None)
            }
        };
        let memory = found.memory_bytes.unwrap_or(0);
        let entry = self.fresh_node();
        let stuck_after = u64::try_from(self.config.stuck_after.as_nanos()).unwrap_or(u64::MAX);
        let attached = Attached {
            start: found.start,
            kind: found.kind,
            populated: true,
            memory,
            peak: memory,
            keeper: None,
            state: State::default(),
            launches,
            wanted: self.wanted(gpu, &found.lineage),
            told: None,
        };
        let proc = Proc {
            node,
            entry,
            pid: found.pid,
            gpu,
            facts: found.facts,
            settings: Settings::default(),
            pidfd,
            lane: Lane::new(stuck_after),
            next_deadline: None,
            jobs: HashMap::new(),
            frozen_since: None,
            refreshed_ns: now_ns(),
            kill: None,
            body: Body::Attached(Box::new(attached)),
        };
        tracing::info!(
            pid = proc.pid,
            gpu,
            comm = proc.facts.comm,
            "attached to a process"
        );
        self.counters.attached += 1;
        self.procs.insert(entry, proc);
        self.publish(entry);
        self.begin_keeping(entry);
    }

    /// Counts what a process launches from now on, where that is configured.
    fn count(&self, pid: u32, start: u64) {
        if self.config.count_launches {
            let (host, shared) = (self.context.host.clone(), self.shared.clone());
            let counting = counting::count(host, pid, start, shared, self.events.clone());
            tokio::spawn(counting);
        }
    }

    /// Watches for the end of a process.
    pub(super) fn watch(&self, pidfd: Arc<OwnedFd>, pid: u32, start: u64) {
        if let Err(error) = self.endings.watch(pidfd, pid, start) {
            tracing::error!(pid, %error, "the end of a process cannot be watched");
        }
    }

    /// The entry of a process that discovery named.
    fn entry_of(&self, gpu: u32, pid: u32, start: u64) -> Option<NodeId> {
        self.by_pid(pid)
            .find(|proc| proc.gpu == gpu && proc.attached().is_some_and(|a| a.start == start))
            .map(|proc| proc.entry)
    }

    /// A process has no context on a GPU any more.
    pub(super) fn vanished(&mut self, gpu: u32, pid: u32, start: u64) {
        if let Some(entry) = self.entry_of(gpu, pid, start) {
            self.populate(entry, None);
        }
    }

    /// It has a context that takes so many bytes, or none.
    fn populate(&mut self, entry: NodeId, memory: Option<u64>) {
        if let Some(attached) = self.procs.get_mut(&entry).and_then(Proc::attached_mut) {
            attached.populated = memory.is_some();
            attached.set_memory(memory.unwrap_or(0));
        }
        self.publish(entry);
    }

    /// Device memory of processes, bytes.
    pub(super) fn measured(&mut self, gpu: u32, figures: Vec<(u32, u64)>) {
        let figures: HashMap<u32, u64> = figures.into_iter().collect();
        let mut changed = Vec::new();
        for proc in self.procs.values_mut().filter(|proc| proc.gpu == gpu) {
            if let Some(bytes) = figures.get(&proc.pid)
                && let Some(attached) = proc.attached_mut()
                && attached.memory != *bytes
            {
                attached.set_memory(*bytes);
                changed.push(proc.entry);
            }
        }
        for entry in changed {
            self.publish(entry);
        }
    }

    /// A process is in another control group.
    pub(super) fn moved(&mut self, pid: u32, start: u64, cgroup: &str) {
        let mut changed = Vec::new();
        for proc in self.procs.values_mut().filter(|proc| proc.pid == pid) {
            if proc.attached().is_some_and(|a| a.start == start) {
                cgroup.clone_into(&mut proc.facts.cgroup);
                changed.push(proc.entry);
            }
        }
        for entry in changed {
            self.publish(entry);
        }
    }

    /// Launches of a process since it was attached.
    pub(super) fn counted(&mut self, pid: u32, start: u64, launches: Launches) {
        let mut changed = Vec::new();
        for proc in self.procs.values_mut().filter(|proc| proc.pid == pid) {
            let entry = proc.entry;
            if let Some(attached) = proc.attached_mut()
                && attached.start == start
            {
                attached.launches = Some(launches);
                changed.push(entry);
            }
        }
        for entry in changed {
            self.publish(entry);
        }
    }

    /// A process has ended: its entries go, and what was kept for it.
    pub(super) fn process_ended(&mut self, pid: u32, start: u64) {
        let entries: Vec<_> = self
            .by_pid(pid)
            .filter(|proc| proc.attached().is_some_and(|a| a.start == start))
            .map(|proc| proc.entry)
            .collect();
        if !entries.is_empty() {
            tracing::info!(pid, "an attached process has ended");
        }
        for entry in entries {
            // Its keeper ends with it, and touches nothing any more.
            drop(self.take_out(entry));
            self.killed(entry);
        }
        self.remembered.forget(pid, start);
        self.remembered.unpend(pid, start);
        self.stale_pending = true;
        let journal = self.context.journal.clone();
        self.strike(pid, move || journal.disarm_process(pid, start));
    }
}
