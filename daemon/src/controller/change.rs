//! What a write asks for, checked and handed on.

use gcgroup_fs::Reply;
use gcgroup_kernels::engine::Placement;
use gcgroup_model::change::{Caller, Change, Done, Refusal, Setting, Target};
use gcgroup_model::row::File;
use gcgroup_model::snapshot::{Enforcer, NodeId};
use gcgroup_model::value::{
    FreezeSet, PartitionName, PartitionRef, Priority, Quota, SmRequest, Switch,
};
use gcgroup_policy::enforcer::{Sharing, enforcer};
use gcgroup_policy::partition::SmError;

use super::log::LogLine;
use super::ticket::{Commit, Op, Order};
use super::undo::Undo;
use super::{Controller, StopState, stopping};

/// Shortest period of a run window, microseconds.
const WINDOW_PERIOD_USEC: u64 = 50_000;

impl Controller {
    pub(super) fn asked(&mut self, caller: Caller, change: Change, reply: Reply) {
        if self.stop != StopState::Running {
            self.answer(reply, Err(stopping()));
            return;
        }
        match change {
            Change::Set(Target(node), setting) => self.ask_setting(caller, node, setting, reply),
            Change::FreezeMany(set) => self.ask_freeze_many(caller, &set, reply),
            Change::Pend(pending) => self.ask_pending(caller, pending, reply),
            Change::Resize(Target(node), request) => self.ask_resize(caller, node, request, reply),
            Change::MakePartition { gpu, name } => {
                let made = self.make_partition(gpu, &name);
                self.answer(reply, made);
            }
            Change::RemovePartition { gpu, name } => {
                let removed = self.remove_partition(gpu, &name);
                self.answer(reply, removed);
            }
            Change::Launch(spec) => self.ask_launch(caller, *spec, reply),
        }
    }

    fn ask_setting(&mut self, caller: Caller, node: NodeId, setting: Setting, reply: Reply) {
        match self.order(node, &setting) {
            Err(refusal) => self.answer(reply, Err(refusal)),
            Ok(Ask::Kill) => {
                tracing::info!(
                    node = node.0,
                    uid = caller.uid,
                    "a process is ended on request"
                );
                self.kill(node, reply);
            }
            Ok(Ask::Job(_)) if self.is_so(node, &setting) => self.answer(reply, Ok(Done::Quiet)),
            Ok(Ask::Job(order)) => {
                self.forget_wanted(node, setting.file());
                self.open_ticket(
                    Some(caller),
                    Some(reply),
                    Commit::Set(node, setting),
                    vec![order],
                );
            }
        }
    }

    /// Whether a freeze or thaw asks for what is in force, with nothing under
    /// way that could change it.
    fn is_so(&self, node: NodeId, setting: &Setting) -> bool {
        self.procs.get(&node).is_some_and(|proc| {
            // Of an attached process the keeper knows better.
            proc.worker().is_some()
                && proc.jobs.is_empty()
                && matches!(setting, Setting::Freeze(state) if *state == proc.settings.freeze)
        })
    }

    /// What a setting takes, or why it cannot be.
    pub(super) fn order(&self, node: NodeId, setting: &Setting) -> Result<Ask, Refusal> {
        let proc = self
            .procs
            .get(&node)
            .ok_or_else(|| Refusal::Gone("the process".to_owned()))?;
        let gpu = self
            .gpus
            .get(&proc.gpu)
            .filter(|gpu| !gpu.lost)
            .ok_or_else(|| Refusal::Gone(format!("GPU {}", proc.gpu)))?;
        if let Enforcer::None(reason) = enforcer(proc.origin(), setting.file(), &gpu.can) {
            if proc.attached().is_some() && gpu.first_trial {
                return Err(Refusal::Busy(format!("{reason}; that takes a second")));
            }
            return Err(Refusal::Unsupported(reason));
        }
        let op = match setting {
            Setting::Kill => return Ok(Ask::Kill),
            Setting::Freeze(state) => Op::Freeze(*state),
            Setting::Priority(priority) => Op::Priority(*priority),
            Setting::Max(quota) => {
                if proc.attached().is_some() {
                    window_allows(*quota)?;
                }
                Op::Quota(*quota)
            }
            Setting::Partition(partition) => {
                self.groups_of(proc.gpu, partition)?;
                Op::Move(partition.clone())
            }
        };
        Ok(Ask::Job(Order {
            node,
            op,
            undo: Undo::Before,
        }))
    }

    fn ask_freeze_many(&mut self, caller: Caller, set: &FreezeSet, reply: Reply) {
        let mut nodes = Vec::new();
        let mut orders = Vec::new();
        for pid in &set.pids {
            let entries: Vec<_> = self.by_pid(*pid).map(|proc| proc.entry).collect();
            if entries.is_empty() {
                self.answer(reply, Err(Refusal::NoProcess(*pid)));
                return;
            }
            for node in entries {
                match self.order(node, &Setting::Freeze(set.state)) {
                    Err(refusal) => {
                        self.answer(reply, Err(refusal));
                        return;
                    }
                    Ok(Ask::Job(order)) => orders.push(order),
                    Ok(Ask::Kill) => {}
                }
                nodes.push(node);
            }
        }
        for node in &nodes {
            self.forget_wanted(*node, File::Freeze);
        }
        self.open_ticket(
            Some(caller),
            Some(reply),
            Commit::FreezeMany(nodes, set.state),
            orders,
        );
    }

    fn ask_resize(&mut self, caller: Caller, node: NodeId, request: SmRequest, reply: Reply) {
        match self.begin_resize(node, request) {
            Err(refusal) => self.answer(reply, Err(refusal)),
            Ok((commit, orders)) => self.open_ticket(Some(caller), Some(reply), commit, orders),
        }
    }

    fn begin_resize(
        &mut self,
        node: NodeId,
        request: SmRequest,
    ) -> Result<(Commit, Vec<Order>), Refusal> {
        let gone = || Refusal::Gone("the partition".to_owned());
        let (gpu_index, name) = self
            .gpus
            .iter()
            .find_map(|(index, gpu)| {
                let found = gpu
                    .partitions
                    .iter()
                    .find(|(_, partition)| partition.node == node)?;
                Some((*index, found.0.clone()))
            })
            .ok_or_else(gone)?;
        let members = self.members(gpu_index, &name);
        let expected = self.launches_into(gpu_index, &name);
        let gpu = self.gpus.get_mut(&gpu_index).ok_or_else(gone)?;
        let partition = gpu.partitions.get_mut(&name).ok_or_else(gone)?;
        if partition.resizing {
            return Err(Refusal::Busy(format!("partition {name} is being resized")));
        }
        let after = gpu
            .table
            .choose(&name, request)
            .map_err(|error| sm_refusal(&error, &name))?;
        if after.is_empty() && (!members.is_empty() || expected) {
            return Err(Refusal::Invalid(format!(
                "partition {name} has members: it needs at least one SM"
            )));
        }
        let before = gpu.table.groups(&name).unwrap_or_default().to_vec();
        // Both sets are reserved until it is clear which one it will be.
        let mut both = before.clone();
        both.extend(after.iter().filter(|group| !before.contains(group)));
        both.sort_unstable();
        gpu.table
            .assign(&name, both)
            .map_err(|error| sm_refusal(&error, &name))?;
        partition.resizing = true;
        let orders = members
            .into_iter()
            .map(|node| Order {
                node,
                op: Op::Regroup(after.clone()),
                undo: Undo::To(Op::Regroup(before.clone())),
            })
            .collect();
        Ok((
            Commit::Resize {
                gpu: gpu_index,
                name,
                before,
                after,
            },
            orders,
        ))
    }

    /// A resize has ended: these are the partition's groups.
    pub(super) fn settle_resize(&mut self, gpu: u32, name: &PartitionName, groups: Vec<u32>) {
        if let Some(gpu) = self.gpus.get_mut(&gpu) {
            if let Some(partition) = gpu.partitions.get_mut(name) {
                partition.resizing = false;
            }
            if let Err(error) = gpu.table.assign(name, groups) {
                tracing::error!(%name, ?error, "a partition's groups could not be settled");
            }
        }
        self.publish_gpu(gpu);
        for node in self.members(gpu, name) {
            self.reconcile(node);
        }
    }

    /// Moves a process to where its partition is now, where that differs: the
    /// partition was resized while the process was on its way into it.
    pub(super) fn reconcile(&mut self, node: NodeId) {
        let Some(proc) = self.procs.get(&node) else {
            return;
        };
        let Ok(groups) = self.groups_of(proc.gpu, &proc.settings.partition) else {
            return;
        };
        let resizing = proc.settings.partition.name().is_some_and(|name| {
            let gpu = self.gpus.get(&proc.gpu);
            gpu.and_then(|gpu| gpu.partitions.get(name))
                .is_some_and(|partition| partition.resizing)
        });
        let astray = proc.worker().is_some_and(|worker| worker.placed != groups);
        if !resizing && astray && proc.jobs.is_empty() {
            let op = Op::Move(proc.settings.partition.clone());
            self.open_ticket(
                None,
                None,
                Commit::Nothing,
                vec![Order {
                    node,
                    op,
                    undo: Undo::Never,
                }],
            );
        }
    }

    fn make_partition(&mut self, gpu_index: u32, name: &PartitionName) -> Result<Done, Refusal> {
        let node = self.fresh_node();
        let gpu = self
            .gpus
            .get_mut(&gpu_index)
            .filter(|gpu| !gpu.lost)
            .ok_or_else(|| Refusal::Gone(format!("GPU {gpu_index}")))?;
        gpu.table
            .add(name.clone())
            .map_err(|error| sm_refusal(&error, name))?;
        gpu.partitions.insert(
            name.clone(),
            super::device::PartitionState {
                node,
                resizing: false,
            },
        );
        self.publish_gpu(gpu_index);
        Ok(Done::Quiet)
    }

    fn remove_partition(&mut self, gpu_index: u32, name: &PartitionName) -> Result<Done, Refusal> {
        let members = self.members(gpu_index, name);
        let expected = self.launches_into(gpu_index, name);
        let missing = || Refusal::NotFound(format!("partition {name}"));
        let gpu = self.gpus.get_mut(&gpu_index).ok_or_else(missing)?;
        let partition = gpu.partitions.get(name).ok_or_else(missing)?;
        if !members.is_empty() || expected {
            return Err(Refusal::Busy(format!("partition {name} has members")));
        }
        if partition.resizing {
            return Err(Refusal::Busy(format!("partition {name} is being resized")));
        }
        gpu.table
            .remove(name)
            .map_err(|error| sm_refusal(&error, name))?;
        gpu.partitions.remove(name);
        self.snapshot.partitions.remove(&(gpu_index, name.clone()));
        self.publish_gpu(gpu_index);
        Ok(Done::Quiet)
    }

    /// Entries that are in a partition or on their way into it.
    pub(super) fn members(&self, gpu: u32, name: &PartitionName) -> Vec<NodeId> {
        self.procs
            .values()
            .filter(|proc| proc.gpu == gpu)
            .filter(|proc| {
                let moving = proc.jobs.values().any(|job| {
                    matches!(&job.op, Op::Move(PartitionRef::Named(target)) if target == name)
                });
                moving || proc.settings.partition.name() == Some(name)
            })
            .map(|proc| proc.entry)
            .collect()
    }

    /// The groups of a partition; `None` for all SMs.
    pub(super) fn groups_of(
        &self,
        gpu: u32,
        partition: &PartitionRef,
    ) -> Result<Option<Vec<u32>>, Refusal> {
        let PartitionRef::Named(name) = partition else {
            return Ok(None);
        };
        let missing = || Refusal::NotFound(format!("partition {name}"));
        let gpu = self.gpus.get(&gpu).ok_or_else(missing)?;
        let groups = gpu.table.groups(name).ok_or_else(missing)?;
        // What a resize has reserved is more than the partition will have.
        if gpu
            .partitions
            .get(name)
            .is_some_and(|partition| partition.resizing)
        {
            return Err(Refusal::Busy(format!("partition {name} is being resized")));
        }
        if groups.is_empty() {
            return Err(Refusal::Invalid(format!(
                "partition {name} has no SMs: write its sm.count first"
            )));
        }
        Ok(Some(groups.to_vec()))
    }

    pub(super) fn placement(
        &self,
        gpu: u32,
        groups: Option<Vec<u32>>,
        priority: Priority,
    ) -> Placement {
        // Where stream priorities order nothing, all streams are equal.
        let can = self
            .gpus
            .get(&gpu)
            .is_some_and(|gpu| gpu.can.stream_priorities.is_ok());
        let stream_priority = if can { priority.stream_priority() } else { 0 };
        Placement {
            groups,
            stream_priority,
        }
    }

    pub(super) fn sharing(&self, gpu: u32) -> Sharing {
        self.gpus
            .get(&gpu)
            .map_or(Sharing::Temporal, |gpu| gpu.can.sharing)
    }

    /// A setting is in force: it is kept, logged and published.
    pub(super) fn set(&mut self, node: NodeId, setting: Setting, caller: Option<Caller>) {
        let Some(proc) = self.procs.get_mut(&node) else {
            return;
        };
        let (pid, gpu) = (proc.pid, proc.gpu);
        let settings = &mut proc.settings;
        let (file, old, new) = match setting {
            Setting::Priority(new) => {
                let old = std::mem::replace(&mut settings.priority, new);
                (File::Priority, old.to_string(), new.to_string())
            }
            Setting::Freeze(new) => {
                // A thaw stops the count of frozen time, whatever the worker's
                // last counters said.
                if new == Switch::Off {
                    proc.frozen_since = None;
                }
                let old = std::mem::replace(&mut settings.freeze, new);
                (File::Freeze, old.to_string(), new.to_string())
            }
            Setting::Max(new) => {
                let old = std::mem::replace(&mut settings.max, new);
                (File::Max, old.to_string(), new.to_string())
            }
            Setting::Partition(new) => {
                let text = new.to_string();
                let old = std::mem::replace(&mut settings.partition, new);
                self.publish_gpu(gpu);
                (File::Partition, old.to_string(), text)
            }
            Setting::Kill => return,
        };
        let uid = caller.map(|caller| caller.uid);
        self.log.push(LogLine::Set {
            pid,
            gpu,
            file,
            old,
            new,
            uid,
        });
        self.publish(node);
        self.keep_setting(node, file);
    }
}

/// Whether a run window can be so short: a stop costs a millisecond.
pub(super) fn window_allows(quota: Quota) -> Result<(), Refusal> {
    if quota.quota_usec.is_none() || quota.period_usec >= WINDOW_PERIOD_USEC {
        return Ok(());
    }
    Err(Refusal::Invalid(format!(
        "a period of {} us is too short for a process that this service did not launch: {WINDOW_PERIOD_USEC} to {}",
        quota.period_usec,
        Quota::PERIOD_USEC.end()
    )))
}

/// What a setting takes.
pub(super) enum Ask {
    /// The process shall end.
    Kill,
    /// A job of its lane.
    Job(Order),
}

pub(super) fn sm_refusal(error: &SmError, name: &PartitionName) -> Refusal {
    match error {
        SmError::NoPartition => Refusal::NotFound(format!("partition {name}")),
        SmError::Exists => Refusal::Exists(format!("partition {name}")),
        SmError::TooMany { capacity } => Refusal::NoSpace(format!("the GPU has {capacity} SMs")),
        SmError::Taken { available } => Refusal::NoSpace(format!(
            "other partitions own the SMs: {available} are left for partition {name}"
        )),
    }
}
