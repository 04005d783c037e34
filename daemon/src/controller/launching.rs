//! Launching workloads: checks before, adoption after.

use std::collections::HashMap;
use std::sync::Arc;

use gcgroup_fs::Reply;
use gcgroup_kernels::catalogue;
use gcgroup_kernels::protocol::{Command, Setup};
use gcgroup_model::change::{Caller, Done, Refusal};
use gcgroup_model::row::File;
use gcgroup_model::snapshot::{Enforcer, NodeId, Settings, Workload};
use gcgroup_model::spec::{Barrier, WorkloadSpec};
use gcgroup_model::value::{PartitionName, PartitionRef, Priority, Switch};
use gcgroup_policy::enforcer::{Origin, Sharing, enforcer};
use gcgroup_policy::lane::Lane;

use super::process::{Body, Proc, Worker};
use super::ticket::{Commit, Op, Order, quota_setting};
use super::undo::Undo;
use super::{Controller, Event, StopState, stopping};
use crate::clock::now_ns;
use crate::launch::Ready;
use crate::procfs;

/// Launches in flight of a spatial worker. A stop must wait until each of them
/// has seen the flag, so there are few.
const SPATIAL_DEPTH: u32 = 3;
/// The same of a temporal one: the queue must not run empty while the worker's
/// thread waits for a processor, or the driver gives the slice away.
const TEMPORAL_DEPTH: u32 = 8;

/// A launch under way.
pub(super) struct Launch {
    spec: WorkloadSpec,
    name: String,
    placed: Option<Vec<u32>>,
    caller: Caller,
    reply: Reply,
}

impl Controller {
    pub(super) fn ask_launch(&mut self, caller: Caller, mut spec: WorkloadSpec, reply: Reply) {
        let prepared = self.check(&mut spec);
        let (setup, name) = match prepared {
            Ok(prepared) => prepared,
            Err(refusal) => {
                self.answer(reply, Err(refusal));
                return;
            }
        };
        let Some(gpu) = self.gpus.get(&spec.gpu) else {
            self.answer(reply, Err(Refusal::Gone(format!("GPU {}", spec.gpu))));
            return;
        };
        let (info, sharing) = (gpu.info.clone(), gpu.can.sharing);
        let id = self.fresh_id();
        let placed = setup.placement.groups.clone();
        self.launches.insert(
            id,
            Launch {
                spec,
                name,
                placed,
                caller,
                reply,
            },
        );
        let (context, events) = (self.context.clone(), self.events.clone());
        let deadline = self.config.launch_deadline;
        tokio::spawn(async move {
            let result = context
                .launch(info, sharing, setup, deadline)
                .await
                .map(Box::new);
            // A worker that nobody takes over ends with its socket.
            let _ = events.send(Event::Launched { launch: id, result });
        });
    }

    /// Everything that can be refused before a process is started.
    fn check(&self, spec: &mut WorkloadSpec) -> Result<(Setup, String), Refusal> {
        let Some(gpu) = self.gpus.get(&spec.gpu) else {
            let known: Vec<_> = self.gpus.keys().map(u32::to_string).collect();
            let known = if known.is_empty() {
                "none".to_owned()
            } else {
                known.join(", ")
            };
            let missing = format!("GPU {}; there are: {known}", spec.gpu);
            return Err(Refusal::NotFound(missing).of_field("gpu"));
        };
        if gpu.lost {
            return Err(Refusal::Gone(format!("GPU {}", spec.gpu)));
        }
        if spec.memory_limit.is_some() {
            let reason = "this version enforces no memory limits";
            return Err(Refusal::Unsupported(reason.to_owned()).of_field("memory_limit"));
        }
        let plan = catalogue::plan(spec, gpu.sm_count)?;
        let needs = |file: File, field| match enforcer(Origin::Launched, file, &gpu.can) {
            Enforcer::None(reason) => Err(Refusal::Unsupported(reason).of_field(field)),
            _ => Ok(()),
        };
        if spec.priority != Priority::default() {
            needs(File::Priority, "priority")?;
        }
        if spec.partition != PartitionRef::None {
            needs(File::Partition, "partition")?;
        }
        let groups = self
            .groups_of(spec.gpu, &spec.partition)
            .map_err(|refusal| refusal.of_field("partition"))?;
        let name = self.name(spec)?;
        self.slot(spec.gpu)?;
        let depth = match gpu.can.sharing {
            Sharing::Spatial => SPATIAL_DEPTH,
            Sharing::Temporal => TEMPORAL_DEPTH,
        };
        let setup = Setup {
            plan,
            iterations: spec.iterations,
            duration_ms: spec.duration_ms,
            placement: self.placement(spec.gpu, groups, spec.priority),
            quota: quota_setting(spec.compute_max),
            depth,
        };
        Ok((setup, name))
    }

    /// The workload's name: the one asked for, if it is free, or the kernel's and
    /// the lowest free number.
    fn name(&self, spec: &WorkloadSpec) -> Result<String, Refusal> {
        let taken = |name: &str| {
            self.procs
                .values()
                .filter_map(Proc::worker)
                .any(|worker| worker.workload.name == name)
                || self.launches.values().any(|launch| launch.name == name)
        };
        match &spec.name {
            Some(name) if taken(name) => {
                Err(Refusal::Exists(format!("a workload named {name}")).of_field("name"))
            }
            Some(name) => Ok(name.clone()),
            None => (1_u32..)
                .map(|number| format!("{}-{number}", spec.kernel))
                .find(|name| !taken(name))
                .ok_or_else(|| Refusal::Failed("every name is taken".to_owned())),
        }
    }

    /// Whether the MPS server takes one more client.
    fn slot(&self, index: u32) -> Result<(), Refusal> {
        let Some(gpu) = self.gpus.get(&index) else {
            return Ok(());
        };
        if gpu.can.sharing == Sharing::Temporal {
            return Ok(());
        }
        let Some(slots) = gpu.slots else {
            return Err(Refusal::Unsupported(
                "spatial sharing is configured, but there is no MPS".to_owned(),
            ));
        };
        let workers = self.procs.values().filter(|proc| proc.worker().is_some());
        let used = workers.filter(|proc| proc.gpu == index).count()
            + self
                .launches
                .values()
                .filter(|launch| launch.spec.gpu == index)
                .count();
        if used >= slots as usize {
            return Err(Refusal::Busy(format!(
                "all {slots} client slots of the MPS server are taken"
            )));
        }
        Ok(())
    }

    /// Whether a launch under way will be a member of this partition.
    pub(super) fn launches_into(&self, gpu: u32, name: &PartitionName) -> bool {
        self.launches
            .values()
            .any(|launch| launch.spec.gpu == gpu && launch.spec.partition.name() == Some(name))
    }

    pub(super) fn launched(&mut self, id: u64, result: Result<Box<Ready>, Refusal>) {
        let Some(launch) = self.launches.remove(&id) else {
            return;
        };
        let ready = match result {
            Ok(ready) => *ready,
            Err(refusal) => {
                tracing::warn!(kernel = launch.spec.kernel, %refusal, "a launch failed");
                self.answer(launch.reply, Err(refusal));
                return;
            }
        };
        let Launch {
            mut spec,
            name,
            placed,
            caller,
            reply,
        } = launch;
        if self.stop != StopState::Running {
            tokio::spawn(crate::launch::see_off(
                ready.spawned,
                self.context.journal.clone(),
            ));
            self.answer(reply, Err(stopping()));
            return;
        }
        spec.iterations = Some(ready.readiness.iterations);
        spec.name = Some(name.clone());
        match self.adopt(&spec, name, placed, ready) {
            Ok(node) => self.prepare(node, spec, caller, reply),
            Err(refusal) => self.answer(reply, Err(refusal)),
        }
    }

    /// Makes a ready worker an entry.
    fn adopt(
        &mut self,
        spec: &WorkloadSpec,
        name: String,
        placed: Option<Vec<u32>>,
        ready: Ready,
    ) -> Result<NodeId, Refusal> {
        let Ready {
            spawned,
            link,
            readiness,
            channels,
            mps,
        } = ready;
        let pid = spawned.pid;
        let pidfd = spawned.pidfd.try_clone().map_err(|error| {
            Refusal::Failed(format!("a worker's pidfd could not be kept: {error}"))
        })?;
        let (node, entry) = (self.fresh_node(), self.fresh_node());
        let sender = link.adopt(entry, self.events.clone());
        tokio::spawn(crate::launch::watch(
            spawned,
            entry,
            self.events.clone(),
            self.context.journal.clone(),
        ));
        let stuck_after = u64::try_from(self.config.stuck_after.as_nanos()).unwrap_or(u64::MAX);
        let counters = gcgroup_kernels::protocol::Counters {
            sm_count: readiness.sm_count,
            ..gcgroup_kernels::protocol::Counters::default()
        };
        let worker = Worker {
            workload: Arc::new(Workload {
                name,
                spec: spec.to_json(),
            }),
            counters,
            readiness,
            samples: Arc::default(),
            sender,
            channels,
            mps,
            placed,
        };
        let proc = Proc {
            node,
            entry,
            pid,
            gpu: spec.gpu,
            facts: procfs::facts(pid),
            settings: first_settings(spec, self.sharing(spec.gpu)),
            pidfd: Arc::new(pidfd),
            lane: Lane::new(stuck_after),
            next_deadline: None,
            jobs: HashMap::new(),
            frozen_since: None,
            refreshed_ns: now_ns(),
            kill: None,
            body: Body::Worker(Box::new(worker)),
        };
        self.enter(proc, &spec.kernel);
        Ok(entry)
    }

    /// Takes a process in and shows it.
    fn enter(&mut self, proc: Proc, kernel: &str) {
        let (entry, gpu) = (proc.entry, proc.gpu);
        let name = proc.worker().map(|worker| worker.workload.name.as_str());
        tracing::info!(pid = proc.pid, gpu, name, kernel, "workload launched");
        self.procs.insert(entry, proc);
        self.counters.launched += 1;
        self.publish(entry);
        self.publish_gpu(gpu);
        let ms = self.report_every_ms;
        self.tell(entry, Command::ReportEvery { ms });
        self.reconcile(entry);
    }

    /// Sets the priority where it is not the driver's, then starts.
    fn prepare(&mut self, node: NodeId, spec: WorkloadSpec, caller: Caller, reply: Reply) {
        let set = self.procs.get(&node).map(|proc| proc.settings.priority);
        if set == Some(spec.priority) {
            self.start(node, &spec, Some(caller), Some(reply));
            return;
        }
        let priority = spec.priority;
        let order = Order {
            node,
            op: Op::Priority(priority),
            undo: Undo::Never,
        };
        let commit = Commit::Prioritised(node, priority, Box::new(spec));
        self.open_ticket(Some(caller), Some(reply), commit, vec![order]);
    }

    /// Starts a workload, at its barrier where it has one.
    pub(super) fn start(
        &mut self,
        node: NodeId,
        spec: &WorkloadSpec,
        caller: Option<Caller>,
        reply: Option<Reply>,
    ) {
        let Some(Barrier { name, count }) = &spec.barrier else {
            self.start_now(node, caller, reply);
            return;
        };
        // It has its entry and waits; who launches the others could not read an
        // answer that came only with the last of them.
        let answer = self.launch_answer(node);
        if let Some(reply) = reply {
            self.answer(reply, answer);
        }
        let Some(pid) = self.procs.get(&node).map(|proc| proc.pid) else {
            return;
        };
        for pid in self.barriers.arrive(name, *count, pid) {
            let nodes: Vec<_> = self.by_pid(pid).map(|proc| proc.entry).collect();
            for node in nodes {
                self.start_now(node, None, None);
            }
        }
    }

    fn start_now(&mut self, node: NodeId, caller: Option<Caller>, reply: Option<Reply>) {
        let order = Order {
            node,
            op: Op::Start,
            undo: Undo::Never,
        };
        self.open_ticket(caller, reply, Commit::Started(node), vec![order]);
    }

    pub(super) fn launch_answer(&self, node: NodeId) -> Result<Done, Refusal> {
        let gone = || Refusal::Gone("the workload".to_owned());
        let proc = self.procs.get(&node).ok_or_else(gone)?;
        Ok(Done::Launched {
            pid: proc.pid,
            gpu: proc.gpu,
            name: proc
                .worker()
                .map(|worker| worker.workload.name.clone())
                .unwrap_or_default(),
        })
    }
}

/// The settings that a workload begins with. Under temporal sharing its
/// timeslice is the driver's, until a job of its own has set the one asked for.
fn first_settings(spec: &WorkloadSpec, sharing: Sharing) -> Settings {
    Settings {
        priority: match sharing {
            Sharing::Spatial => spec.priority,
            Sharing::Temporal => Priority::default(),
        },
        freeze: Switch::Off,
        max: spec.compute_max,
        partition: spec.partition.clone(),
    }
}
