//! The simulation: GPUs, contexts and their launches, without clock or I/O.
//!
//! Time is what the caller says it is. Between two events every launch goes on at
//! a constant rate, so [`World::advance`] goes from event to event, and
//! [`World::next_event`] says when it should be called again. Coming late changes
//! no figure: the events in between are passed at their own times.

mod channel;
mod context;
mod control;
mod count;
mod memory;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use gcgroup_kernels::engine::{EngineError, Form, Placement, Plan};

use context::{Context, Workload};
pub(crate) use context::{ContextId, Ended};
pub(crate) use control::{Gone, Missing};
pub(crate) use count::{CounterId, Counters};

use crate::rate::{self, Demand, Usage};
use crate::shape;
use crate::wire::Launch;

/// Time that one change from one context to another takes, microseconds: a 460 us
/// kernel beside a process with 20 us slices took 617 us, which is two changes.
const SWITCH_US: f64 = 70.0;

/// Time over which utilisation is averaged, microseconds.
const AVERAGE_US: f64 = 100_000.0;

/// A progress that is nearer to its end than this is there, microseconds. Events
/// are at whole nanoseconds.
const NEAR_US: f64 = 0.001;

/// Identifies an MPS server; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct MpsId(u64);

/// Something that a client has to be told without having asked.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Notice {
    /// A launch ended.
    Ended(ContextId, Ended),
    /// The context is broken.
    Broken(ContextId, EngineError),
}

/// Figures of a GPU.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct GpuState {
    pub(crate) memory_used: u64,
    pub(crate) xids: u64,
    pub(crate) usage: Usage,
}

#[derive(Debug, Default)]
struct Gpu {
    lost: bool,
    xids: u64,
    /// At this moment.
    usage: Usage,
    /// Exponential average of the usage.
    average: Usage,
}

#[derive(Debug)]
struct MpsServer {
    gpu: u32,
    token: String,
}

/// Who takes turns: a context of its own, or an MPS server with all its clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Turn {
    Own(ContextId),
    Mps(MpsId),
}

/// All that is simulated.
#[derive(Debug)]
pub(crate) struct World {
    now_ns: u64,
    seed: u64,
    stop_latency_us: f64,
    mps_slots: u32,
    gpus: Vec<Gpu>,
    contexts: BTreeMap<ContextId, Context>,
    servers: BTreeMap<MpsId, MpsServer>,
    next_id: u64,
    /// Counter of driver clients of the whole host.
    next_client: u32,
    pub(crate) counters: Counters,
    notices: Vec<Notice>,
    /// Whether what runs where has changed since the rates were computed.
    stale: bool,
}

impl World {
    /// A world that begins at a time, in nanoseconds of the caller's clock.
    pub(crate) fn new(gpus: u32, seed: u64, stop_latency_us: f64, now_ns: u64) -> Self {
        Self {
            now_ns,
            seed,
            stop_latency_us,
            mps_slots: shape::MPS_SLOTS,
            gpus: (0..gpus).map(|_| Gpu::default()).collect(),
            contexts: BTreeMap::new(),
            servers: BTreeMap::new(),
            next_id: 1,
            next_client: shape::FIRST_CLIENT,
            counters: Counters::default(),
            notices: Vec::new(),
            stale: false,
        }
    }

    /// Takes another number of clients for each MPS server; 0 is a GPU that
    /// knows no MPS.
    pub(crate) fn set_mps_slots(&mut self, slots: u32) {
        self.mps_slots = slots;
    }

    /// Clients that an MPS server takes.
    pub(crate) fn mps_slots(&self) -> u32 {
        self.mps_slots
    }

    /// Goes on to `now_ns`. Every other call acts at the time that this one was
    /// given last.
    pub(crate) fn advance(&mut self, now_ns: u64) {
        while self.now_ns < now_ns {
            let next = self.next_event().unwrap_or(now_ns).min(now_ns);
            self.pass((next - self.now_ns) as f64 / 1000.0);
            self.now_ns = next;
            self.end_finished();
        }
    }

    /// When a launch ends if nothing else happens until then.
    pub(crate) fn next_event(&mut self) -> Option<u64> {
        self.refresh();
        let soonest = self
            .contexts
            .values()
            .filter_map(Context::remaining_us)
            .min_by(f64::total_cmp)?;
        // A second at a time is enough, and keeps the figure far from overflow.
        let ns = (soonest * 1000.0).clamp(0.0, 1e9).ceil();
        Some(self.now_ns + (ns as u64).max(1))
    }

    /// What clients have to be told since the last call.
    pub(crate) fn take_notices(&mut self) -> Vec<Notice> {
        std::mem::take(&mut self.notices)
    }

    fn pass(&mut self, us: f64) {
        for context in self.contexts.values_mut() {
            context.pass(us);
        }
        let share = 1.0 - (-us / AVERAGE_US).exp();
        for gpu in &mut self.gpus {
            gpu.average.approach(&gpu.usage, share);
        }
    }

    fn end_finished(&mut self) {
        let ids: Vec<_> = self
            .contexts
            .iter()
            .filter(|(_, context)| context.remaining_us().is_some_and(|left| left <= NEAR_US))
            .map(|(&id, _)| id)
            .collect();
        for id in ids {
            if let Some(context) = self.contexts.get_mut(&id) {
                let ended = context.finish(self.now_ns);
                self.notices
                    .extend(ended.map(|ended| Notice::Ended(id, ended)));
            }
            self.settle(id);
        }
    }

    /// Puts the next launch of a context on the device, where its channels let it.
    fn settle(&mut self, id: ContextId) {
        if let Some(context) = self.contexts.get_mut(&id) {
            let ended = context.start_next(self.now_ns);
            self.notices
                .extend(ended.into_iter().map(|ended| Notice::Ended(id, ended)));
            self.stale |= context.presence_changed();
        }
    }

    fn refresh(&mut self) {
        if !std::mem::take(&mut self.stale) {
            return;
        }
        for (index, gpu) in self.gpus.iter_mut().enumerate() {
            gpu.usage = share_out(&mut self.contexts, index as u32);
        }
    }

    /// Makes a context for a process; with a token it is a client of the MPS
    /// server that the token names.
    pub(crate) fn open(
        &mut self,
        gpu: u32,
        pid: u32,
        token: Option<&str>,
    ) -> Result<ContextId, EngineError> {
        self.gpu(gpu)?;
        let mps = token.map(|token| self.slot(gpu, token)).transpose()?;
        let overhead = match mps {
            Some(_) => shape::MPS_CLIENT_BYTES,
            None => shape::CONTEXT_BYTES,
        };
        self.require(gpu, overhead)?;
        self.next_client += 1;
        let id = ContextId(self.take_id());
        let context = Context::new(gpu, pid, self.next_client, mps, overhead);
        self.contexts.insert(id, context);
        Ok(id)
    }

    /// The server that a token names, if it takes another client.
    fn slot(&self, gpu: u32, token: &str) -> Result<MpsId, EngineError> {
        let server = self
            .servers
            .iter()
            .find(|(_, server)| server.token == token && server.gpu == gpu);
        let Some((&id, _)) = server else {
            return Err(EngineError::Failed(format!(
                "no MPS server {token:?} runs on GPU {gpu}"
            )));
        };
        let clients = self.contexts.values().filter(|c| c.mps == Some(id)).count();
        if clients < self.mps_slots as usize {
            Ok(id)
        } else {
            Err(EngineError::NoSlot(format!(
                "all {} slots are taken",
                self.mps_slots
            )))
        }
    }

    fn take_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    fn gpu(&self, gpu: u32) -> Result<&Gpu, EngineError> {
        match self.gpus.get(gpu as usize) {
            Some(found) if !found.lost => Ok(found),
            Some(_) => Err(EngineError::Failed(format!("GPU {gpu} is lost"))),
            None => Err(EngineError::NoDevice(format!(
                "there is no GPU {gpu} among {}",
                self.gpus.len()
            ))),
        }
    }

    /// Ends a context, and everything that it had.
    pub(crate) fn close(&mut self, id: ContextId) {
        self.contexts.remove(&id);
        self.stale = true;
    }

    /// The process and the GPU of a context.
    pub(crate) fn owner(&self, id: ContextId) -> Option<(u32, u32)> {
        self.contexts.get(&id).map(|c| (c.pid, c.gpu))
    }

    fn context(&mut self, id: ContextId) -> Result<&mut Context, EngineError> {
        let context = self
            .contexts
            .get_mut(&id)
            .ok_or_else(|| EngineError::Failed("the context is gone".to_owned()))?;
        match &context.broken {
            Some(error) => Err(error.clone()),
            None => Ok(context),
        }
    }

    /// Sets the kernel of a context and takes the memory of its buffers. Answers
    /// with that memory and the context's own, in bytes.
    pub(crate) fn prepare(
        &mut self,
        id: ContextId,
        plan: &Plan,
    ) -> Result<(u64, u64), EngineError> {
        let workload = Workload::of(plan)
            .ok_or_else(|| EngineError::Unsupported(format!("no kernel {:?}", plan.kernel)))?;
        if self.context(id)?.workload.is_some() {
            return Err(EngineError::Unsupported(
                "a context is prepared once".to_owned(),
            ));
        }
        let bytes = crate::cost::buffer_bytes(plan);
        self.allocate(id, bytes)?;
        let context = self.context(id)?;
        context.workload = Some(workload);
        Ok((bytes, context.overhead))
    }

    /// Moves a context to the SMs of some groups. Answers with how many it has.
    pub(crate) fn place(
        &mut self,
        id: ContextId,
        placement: &Placement,
    ) -> Result<u32, EngineError> {
        let unsupported = |what: &str| Err(EngineError::Unsupported(what.to_owned()));
        let mut mask = 0_u32;
        for &group in placement.groups.iter().flatten() {
            if group as usize >= shape::GROUPS.len() || mask & (1 << group) != 0 {
                return unsupported("groups are numbers from 0 to 16, each once");
            }
            mask |= 1 << group;
        }
        if placement.groups.is_none() {
            mask = (1 << shape::GROUPS.len()) - 1;
        }
        if mask == 0 {
            return unsupported("a placement needs a group at least");
        }
        let context = self.context(id)?;
        if !context.is_idle() {
            return unsupported("a context is placed only while nothing is in flight");
        }
        context.groups = mask;
        let sms = shape::GROUPS.iter().enumerate();
        Ok(sms
            .filter(|(group, _)| mask & (1 << group) != 0)
            .map(|(_, sms)| sms)
            .sum())
    }

    /// Queues a launch behind the others of its context.
    pub(crate) fn submit(
        &mut self,
        id: ContextId,
        target: u64,
        submitted_ns: u64,
        launch: Launch,
    ) -> Result<(), EngineError> {
        let context = self.context(id)?;
        if context.workload.is_none() {
            return Err(EngineError::Unsupported(
                "a launch needs a prepared kernel".to_owned(),
            ));
        }
        context.queue(target, submitted_ns);
        let pid = context.pid;
        self.counters.add(pid, launch);
        self.settle(id);
        Ok(())
    }

    /// Raises the stop flag. What runs and looks at it ends a little later.
    pub(crate) fn raise_stop(&mut self, id: ContextId) -> Result<(), EngineError> {
        let latency = self.stop_latency_us;
        self.context(id)?.raise_stop(latency);
        Ok(())
    }

    /// Lowers the stop flag.
    pub(crate) fn lower_stop(&mut self, id: ContextId) -> Result<(), EngineError> {
        self.context(id)?.lower_stop();
        Ok(())
    }

    /// Units that all blocks of a context have done, up to the last end of a
    /// launch, and its blocks.
    pub(crate) fn cursor(&mut self, id: ContextId) -> Result<(u128, u32), EngineError> {
        let context = self.context(id)?;
        let blocks = context.workload.as_ref().map_or(0, |w| w.blocks);
        Ok((context.cursor, blocks))
    }

    /// Breaks a context: what is in flight is gone, and so is its memory.
    pub(crate) fn break_context(&mut self, id: ContextId, error: &EngineError) {
        if let Some(context) = self.contexts.get_mut(&id)
            && context.fail(error)
        {
            self.notices.push(Notice::Broken(id, error.clone()));
            self.stale = true;
        }
    }

    fn break_all(&mut self, error: &EngineError, which: impl Fn(&Context) -> bool) {
        let ids: Vec<_> = self
            .contexts
            .iter()
            .filter(|(_, context)| which(context))
            .map(|(&id, _)| id)
            .collect();
        for id in ids {
            self.break_context(id, error);
        }
    }

    /// Starts an MPS server. Answers with the token that makes its clients.
    pub(crate) fn start_mps(&mut self, gpu: u32) -> Result<(MpsId, String), EngineError> {
        self.gpu(gpu)?;
        if self.mps_slots == 0 {
            return Err(EngineError::Unsupported(
                "this simulated GPU has no MPS".to_owned(),
            ));
        }
        self.require(gpu, shape::MPS_SERVER_BYTES)?;
        let id = MpsId(self.take_id());
        let mut state = self.seed ^ id.0;
        let token = format!("{gpu}-{:016x}", shape::splitmix(&mut state));
        let server = MpsServer {
            gpu,
            token: token.clone(),
        };
        self.servers.insert(id, server);
        Ok((id, token))
    }

    /// Whether an MPS server runs.
    pub(crate) fn mps_runs(&self, id: MpsId) -> bool {
        self.servers.contains_key(&id)
    }

    /// The GPU of a running MPS server.
    pub(crate) fn mps_gpu(&self, id: MpsId) -> Option<u32> {
        self.servers.get(&id).map(|server| server.gpu)
    }

    /// Ends an MPS server. Clients that it still has are broken.
    pub(crate) fn stop_mps(&mut self, id: MpsId) {
        if self.servers.remove(&id).is_some() {
            let error = EngineError::Failed("the MPS server is gone".to_owned());
            self.break_all(&error, |context| context.mps == Some(id));
        }
    }

    /// Ends all MPS servers of a GPU, as a crash would.
    pub(crate) fn lose_mps(&mut self, gpu: u32) {
        let ids: Vec<_> = self
            .servers
            .iter()
            .filter(|(_, server)| server.gpu == gpu)
            .map(|(&id, _)| id)
            .collect();
        for id in ids {
            self.stop_mps(id);
        }
    }

    /// Makes a GPU fall off the bus, which the driver counts as one Xid.
    pub(crate) fn lose_gpu(&mut self, gpu: u32) {
        self.lose_mps(gpu);
        let error = EngineError::Failed(format!("GPU {gpu} is lost"));
        self.break_all(&error, |context| context.gpu == gpu);
        if let Some(gpu) = self.gpus.get_mut(gpu as usize) {
            gpu.lost = true;
            gpu.xids += 1;
        }
    }

    /// Brings a lost GPU back, empty.
    pub(crate) fn restore_gpu(&mut self, gpu: u32) {
        if let Some(gpu) = self.gpus.get_mut(gpu as usize) {
            gpu.lost = false;
        }
    }

    /// Counts Xid errors.
    pub(crate) fn raise_xids(&mut self, gpu: u32, count: u64) {
        if let Some(gpu) = self.gpus.get_mut(gpu as usize) {
            gpu.xids = gpu.xids.saturating_add(count);
        }
    }

    /// The GPUs that are not lost, by index.
    pub(crate) fn gpus(&self) -> impl Iterator<Item = u32> {
        let present = self.gpus.iter().enumerate().filter(|(_, gpu)| !gpu.lost);
        present.map(|(index, _)| index as u32)
    }

    /// UUID of a GPU.
    pub(crate) fn uuid(&self, gpu: u32) -> String {
        shape::uuid(self.seed, gpu)
    }

    /// Figures of a GPU, `None` when it is lost or never was.
    pub(crate) fn state(&self, gpu: u32) -> Option<GpuState> {
        let found = self.gpus.get(gpu as usize).filter(|found| !found.lost)?;
        Some(GpuState {
            memory_used: self.memory_used(gpu),
            xids: found.xids,
            usage: found.average,
        })
    }
}

/// Computes the rate of every launch on a GPU and how busy it is.
fn share_out(contexts: &mut BTreeMap<ContextId, Context>, gpu: u32) -> Usage {
    let mut turns: BTreeMap<Turn, (u64, Vec<ContextId>)> = BTreeMap::new();
    for (&id, context) in contexts.iter() {
        if context.gpu == gpu && context.runs() {
            let turn = match context.mps {
                Some(server) => Turn::Mps(server),
                None => Turn::Own(id),
            };
            let usec = context.client.timeslice_usec();
            turns.entry(turn).or_insert((usec, Vec::new())).1.push(id);
        }
    }
    let switches = if turns.len() > 1 {
        SWITCH_US * turns.len() as f64
    } else {
        0.0
    };
    let round = turns.values().map(|(usec, _)| *usec as f64).sum::<f64>() + switches;
    let mut usage = Usage::default();
    for (usec, ids) in turns.values() {
        let share = *usec as f64 / round;
        let demands: Vec<Demand> = ids.iter().filter_map(|id| contexts[id].demand()).collect();
        let (rates, used) = rate::rates(&shape::GROUPS, &demands);
        usage.add(&used, share);
        for (id, rate) in ids.iter().zip(rates) {
            if let Some(context) = contexts.get_mut(id) {
                context.set_rate(rate * share, share);
            }
        }
    }
    usage
}

/// Whether launches of this form look at the stop flag.
fn looks(form: Form) -> bool {
    form == Form::Sliced
}
