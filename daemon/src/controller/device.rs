//! GPUs and their partitions, as the controller keeps them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use gcgroup_device::{DeviceError, GpuInfo, GpuSample};
use gcgroup_kernels::engine::Facts;
use gcgroup_model::change::Refusal;
use gcgroup_model::snapshot::{DeviceEvents, Enforcers, Gpu, NodeId, Partition};
use gcgroup_model::value::PartitionName;
use gcgroup_policy::enforcer::{Capabilities, Origin, Sharing, enforcers};
use gcgroup_policy::partition::SmTable;

use super::{Controller, Event};
use crate::config::SharingChoice;
use crate::launch::{self, Context};
use crate::mps::Lost;
use crate::prove;

/// How long a GPU may take to answer a probe.
const PROBE: Duration = Duration::from_secs(20);
/// Between two probes of a GPU that does not answer, and two trials of channel
/// control.
const AGAIN: Duration = Duration::from_secs(10);

/// One GPU.
pub(super) struct GpuState {
    node: NodeId,
    partitions_node: NodeId,
    pub(super) info: GpuInfo,
    pub(super) can: Capabilities,
    /// What follows from them.
    by_origin: ByOrigin,
    /// Clients that its private MPS server takes.
    pub(super) slots: Option<u32>,
    /// SMs of the GPU, those that no partition can have included.
    pub(super) sm_count: u32,
    pub(super) table: SmTable,
    pub(super) partitions: BTreeMap<PartitionName, PartitionState>,
    sample: GpuSample,
    events: DeviceEvents,
    pub(super) lost: bool,
    /// Trials of channel control that have failed.
    failed_proofs: u32,
    /// Whether the first of them is still under way.
    pub(super) first_trial: bool,
    /// What the last failed reading said, so that it is told once.
    last_error: Option<String>,
}

/// What a GPU's capabilities mean for each kind of process.
struct ByOrigin {
    launched: Arc<Enforcers>,
    attached: Arc<Enforcers>,
    mps_client: Arc<Enforcers>,
}

impl ByOrigin {
    fn of(can: &Capabilities) -> Self {
        let of = |origin| Arc::new(enforcers(origin, can));
        Self {
            launched: of(Origin::Launched),
            attached: of(Origin::Attached),
            mps_client: of(Origin::MpsClient),
        }
    }
}

impl GpuState {
    /// The mechanisms of processes of this origin.
    pub(super) fn enforcers(&self, origin: Origin) -> &Arc<Enforcers> {
        match origin {
            Origin::Launched => &self.by_origin.launched,
            Origin::Attached => &self.by_origin.attached,
            Origin::MpsClient => &self.by_origin.mps_client,
        }
    }
}

/// What a probe found out.
pub(crate) struct Probed {
    /// The device as a worker sees it.
    facts: Facts,
    /// Clients that a private MPS server takes, or why there can be none.
    slots: Result<u32, DeviceError>,
    /// Whether stream priorities order their work.
    streams: Result<(), DeviceError>,
}

/// What a trial of channel control means for workloads of the service.
fn of_workers(sharing: Sharing, proved: Result<(), String>) -> Result<(), String> {
    match sharing {
        Sharing::Spatial => Err("clients of one MPS server share its channel groups".to_owned()),
        Sharing::Temporal => proved,
    }
}

async fn probe(context: Arc<Context>, gpu: GpuInfo) -> Result<Probed, Refusal> {
    let host = context.host.clone();
    let (slots, streams) = launch::blocking(move || (host.slots(), host.orders_streams())).await?;
    let facts = context.probe(gpu, PROBE).await?;
    Ok(Probed {
        facts,
        slots,
        streams,
    })
}

/// One partition.
#[derive(Debug)]
pub(super) struct PartitionState {
    pub(super) node: NodeId,
    /// Whether a resize of it is under way.
    pub(super) resizing: bool,
}

impl Controller {
    /// GPUs that the host has; those not known yet are probed.
    pub(super) fn found(&mut self, gpus: Vec<GpuInfo>) {
        for gpu in gpus {
            if let Some(reason) = &gpu.refused {
                if self.probing.insert(gpu.index) {
                    tracing::warn!(gpu = gpu.index, %reason, "this GPU is not managed");
                }
            } else if !self.gpus.contains_key(&gpu.index) && self.probing.insert(gpu.index) {
                self.probe(gpu, Duration::ZERO);
            }
        }
    }

    fn probe(&self, gpu: GpuInfo, after: Duration) {
        let (context, events) = (self.context.clone(), self.events.clone());
        tokio::spawn(async move {
            tokio::time::sleep(after).await;
            let result = probe(context, gpu.clone()).await;
            // The controller may have ended meanwhile.
            let _ = events.send(Event::Probed { gpu, result });
        });
    }

    pub(super) fn probed(&mut self, info: GpuInfo, result: Result<Probed, Refusal>) {
        let Probed {
            facts,
            slots,
            streams,
        } = match result {
            Ok(probed) => probed,
            Err(refusal) => {
                tracing::warn!(gpu = info.index, %refusal, "a GPU did not answer a probe");
                self.probe(info, AGAIN);
                return;
            }
        };
        self.probing.remove(&info.index);
        let can = self.capabilities(&facts, &slots, streams);
        tracing::info!(
            gpu = info.index, name = info.name, sms = facts.sm_count, sharing = %can.sharing, "GPU ready"
        );
        let index = info.index;
        let state = GpuState {
            node: self.fresh_node(),
            partitions_node: self.fresh_node(),
            by_origin: ByOrigin::of(&can),
            can,
            slots: slots.ok(),
            sm_count: facts.sm_count,
            table: SmTable::new(facts.groups),
            partitions: BTreeMap::new(),
            sample: GpuSample::default(),
            events: DeviceEvents::default(),
            lost: false,
            failed_proofs: 0,
            first_trial: self.config.attach,
            last_error: None,
            info,
        };
        self.gpus.insert(index, state);
        self.publish_gpu(index);
        if self.config.attach || self.sharing(index) == Sharing::Temporal {
            self.prove(index, Duration::ZERO);
        }
        if self.config.attach {
            self.discover(index);
        }
    }

    fn capabilities(
        &self,
        facts: &Facts,
        slots: &Result<u32, DeviceError>,
        streams: Result<(), DeviceError>,
    ) -> Capabilities {
        let sharing = match (self.config.sharing, slots) {
            (SharingChoice::Temporal, _) | (SharingChoice::Auto, Err(_)) => Sharing::Temporal,
            (SharingChoice::Spatial, _) | (SharingChoice::Auto, Ok(_)) => Sharing::Spatial,
        };
        if let (Err(error), Sharing::Temporal) = (slots, sharing) {
            tracing::info!(%error, "no MPS: workers share the GPU temporally");
        }
        let green_contexts = if facts.green_contexts {
            Ok(())
        } else {
            Err("the driver has no green contexts (CUDA 12.5 brought them)".to_owned())
        };
        let stream_priorities = match sharing {
            Sharing::Spatial => streams.map_err(|error| error.to_string()),
            Sharing::Temporal => {
                Err("stream priorities order one process's own work only".to_owned())
            }
        };
        let unproved = Err("channel control is being tried on workers of the service".to_owned());
        Capabilities {
            sharing,
            green_contexts,
            stream_priorities,
            channels: of_workers(sharing, unproved.clone()),
            attach: self.of_others(unproved),
        }
    }

    /// What a trial of channel control means for processes of others.
    pub(super) fn of_others(&self, proved: Result<(), String>) -> Result<(), String> {
        if self.config.attach {
            return proved;
        }
        Err("attach = false is configured".to_owned())
    }

    /// Tries channel control on two workers of our own.
    fn prove(&self, index: u32, after: Duration) {
        let Some(gpu) = self.gpus.get(&index) else {
            return;
        };
        let (context, events, info) = (self.context.clone(), self.events.clone(), gpu.info.clone());
        tokio::spawn(async move {
            tokio::time::sleep(after).await;
            let result = prove::control(context, info).await;
            // The controller may have ended meanwhile.
            let _ = events.send(Event::Proved { gpu: index, result });
        });
    }

    pub(super) fn proved(&mut self, index: u32, result: Result<(), String>) {
        let attach = self.of_others(result.clone());
        let Some(gpu) = self.gpus.get_mut(&index) else {
            return;
        };
        let again = match &result {
            Ok(()) => {
                tracing::info!(gpu = index, "channel control has proved itself");
                None
            }
            Err(reason) => {
                tracing::warn!(gpu = index, %reason, "channel control does not work here");
                // Each trial fills the GPU for a moment, so they become rare.
                gpu.failed_proofs += 1;
                Some(AGAIN * 2_u32.saturating_pow(gpu.failed_proofs).min(360))
            }
        };
        gpu.first_trial = false;
        gpu.can.channels = of_workers(gpu.can.sharing, result.clone());
        gpu.can.attach = attach;
        gpu.by_origin = ByOrigin::of(&gpu.can);
        if let Some(after) = again {
            self.prove(index, after);
        }
        self.publish_gpu(index);
        let nodes: Vec<_> = self
            .procs
            .values()
            .filter(|p| p.gpu == index)
            .map(|p| p.entry)
            .collect();
        for node in nodes {
            self.begin_keeping(node);
            self.publish(node);
        }
    }

    pub(super) fn sampled(&mut self, index: u32, result: Result<GpuSample, DeviceError>) {
        let Some(gpu) = self.gpus.get_mut(&index) else {
            return;
        };
        match result {
            Ok(sample) => {
                if gpu.lost {
                    tracing::info!(gpu = index, "the GPU is back");
                }
                gpu.lost = false;
                gpu.events.xid = sample.xids;
                gpu.sample = sample;
            }
            Err(DeviceError::NoGpu(_) | DeviceError::NoDriver(_)) => {
                if !gpu.lost {
                    tracing::error!(gpu = index, "the GPU is lost");
                    gpu.events.gpu_lost += 1;
                }
                gpu.lost = true;
            }
            Err(error) => {
                let error = error.to_string();
                if gpu.last_error.as_ref() != Some(&error) {
                    tracing::warn!(gpu = index, error, "a GPU could not be read");
                    gpu.last_error = Some(error);
                }
            }
        }
        self.publish_gpu(index);
    }

    /// Asks, beside the controller, which MPS servers have gone.
    pub(super) fn look_after_mps(&self) {
        let (mps, events) = (self.context.mps.clone(), self.events.clone());
        tokio::spawn(async move {
            if let Ok(lost) = launch::blocking(move || mps.take_lost()).await
                && !lost.is_empty()
            {
                // The controller may have ended meanwhile.
                let _ = events.send(Event::MpsLost(lost));
            }
        });
    }

    /// A lost server takes its clients along; one that hangs is killed.
    pub(super) fn mps_lost(&mut self, lost: &[Lost]) {
        for Lost { gpu, start } in lost {
            tracing::error!(gpu, "the private MPS server was lost with its workloads");
            if let Some(state) = self.gpus.get_mut(gpu) {
                state.events.mps_lost += 1;
            }
            let clients: Vec<_> = self
                .procs
                .values()
                .filter(|proc| {
                    let mps = proc.worker().and_then(|worker| worker.mps);
                    proc.gpu == *gpu && mps == Some(*start)
                })
                .map(|proc| proc.entry)
                .collect();
            for node in clients {
                self.end_soon(node);
            }
            self.publish_gpu(*gpu);
        }
    }

    /// The published GPU and its partitions shall be brought up to date.
    pub(super) fn publish_gpu(&mut self, index: u32) {
        self.stale_gpus.insert(index);
    }

    /// Brings the published GPU and its partitions up to date.
    pub(super) fn render_gpu(&mut self, index: u32) {
        let Some(gpu) = self.gpus.get(&index) else {
            return;
        };
        if gpu.lost {
            self.snapshot.gpus.remove(&index);
            self.snapshot.partitions.retain(|(of, _), _| *of != index);
            return;
        }
        for (name, state) in &gpu.partitions {
            let groups = gpu.table.groups(name).unwrap_or_default().to_vec();
            let mut members: Vec<u32> = self
                .procs
                .values()
                .filter(|proc| proc.gpu == index && proc.settings.partition.name() == Some(name))
                .map(|proc| proc.pid)
                .collect();
            members.sort_unstable();
            // What a resize under way has reserved is not granted yet.
            let key = (index, name.clone());
            let granted = self.snapshot.partitions.get(&key);
            let groups = match granted {
                Some(granted) if state.resizing => granted.groups.clone(),
                _ => groups,
            };
            let sm_count = gpu.table.sms(&groups);
            let partition = Partition {
                node: state.node,
                gpu: index,
                name: name.clone(),
                sm_count,
                groups,
                members,
            };
            self.snapshot
                .partitions
                .insert((index, name.clone()), Arc::new(partition));
        }
        let published = Gpu {
            node: gpu.node,
            partitions_node: gpu.partitions_node,
            index,
            uuid: gpu.info.uuid.clone(),
            name: gpu.info.name.clone(),
            sm_capacity: gpu.sm_count,
            sm_granularity: gpu.table.granularity(),
            memory_capacity: gpu.info.memory_bytes,
            memory_current: gpu.sample.memory_used,
            utilization: gpu.sample.utilization.clone(),
            events: gpu.events,
            enforcers: gpu.by_origin.launched.to_vec(),
            attached: gpu.by_origin.attached.to_vec(),
        };
        self.snapshot.gpus.insert(index, Arc::new(published));
    }
}
