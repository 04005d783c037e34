//! Keepers, as the controller talks to them.

use std::time::Duration;

use gcgroup_device::DeviceError;
use gcgroup_kernels::protocol::Answer;
use gcgroup_model::change::Refusal;
use gcgroup_model::snapshot::NodeId;
use gcgroup_model::value::Switch;
use gcgroup_policy::enforcer::Origin;

use super::process::Proc;
use super::ticket::{JobId, Op};
use super::{Controller, Event};
use crate::clock::now_ns;
use crate::journal::{Armed, ArmedGpu, Helper};
use crate::keeper::{Hooks, Keeper, Order, Said, Start, State, Subject};
use crate::launch;

impl Controller {
    /// Gives an attached process its keeper, where channel control may be used.
    pub(super) fn begin_keeping(&mut self, node: NodeId) {
        let Some(proc) = self.procs.get(&node) else {
            return;
        };
        let Some(attached) = proc.attached() else {
            return;
        };
        let allowed = |gpu: &&super::device::GpuState| gpu.can.attach.is_ok();
        let Some(gpu) = self.gpus.get(&proc.gpu).filter(allowed) else {
            return;
        };
        if attached.keeper.is_some() || attached.origin() == Origin::MpsClient {
            return;
        }
        let (pid, start) = (proc.pid, attached.start);
        let uuid = &gpu.info.uuid;
        // What an earlier service stopped and recovery could not resume.
        let begin = if self.context.journal.is_armed(pid, start, uuid) {
            Start::MaybeStopped
        } else {
            Start::Fresh
        };
        let armed = ArmedGpu {
            index: gpu.info.index,
            uuid: uuid.clone(),
        };
        let subject = Subject {
            pid,
            gpu: gpu.info.clone(),
        };
        let hooks = self.hooks(node, Helper { pid, start }, armed);
        let keeper = Keeper::start(subject, self.context.host.clone(), begin, hooks);
        let Some(attached) = self.procs.get_mut(&node).and_then(Proc::attached_mut) else {
            return;
        };
        match keeper {
            Ok(keeper) => attached.keeper = Some(keeper),
            Err(error) => {
                tracing::error!(pid, %error, "a process has no keeper: no thread could be started");
                return;
            }
        }
        let every = Duration::from_millis(self.report_every_ms);
        self.tell_keeper(node, Order::ReportEvery(every));
        self.want_all(node);
        self.publish(node);
    }

    fn hooks(&self, node: NodeId, process: Helper, gpu: ArmedGpu) -> Hooks {
        let (journal, events) = (self.context.journal.clone(), self.events.clone());
        Hooks {
            arm: Box::new(move |set| {
                journal.arm(Armed {
                    process,
                    gpu: gpu.clone(),
                    set: set.clone(),
                })
            }),
            tell: Box::new(move |said| {
                // The controller may have ended meanwhile.
                let _ = events.send(Event::Keeper {
                    node,
                    said: Box::new(said),
                });
            }),
        }
    }

    /// Hands a job to the keeper of its process.
    pub(super) fn order_keeper(&mut self, node: NodeId, id: JobId, op: &Op) -> Result<(), Refusal> {
        self.stay_awake_for_keeper();
        let order = match op {
            Op::Freeze(state) => Order::Freeze(state.is_on()),
            Op::Quota(quota) => Order::Quota(*quota),
            Op::Priority(priority) => Order::Priority(*priority),
            Op::Start | Op::Move(_) | Op::Regroup(_) => {
                return Err(Refusal::Unsupported(
                    "the process was not launched by this service".to_owned(),
                ));
            }
        };
        let attached = self.procs.get(&node).and_then(Proc::attached);
        let keeper = attached
            .and_then(|attached| attached.keeper.as_ref())
            .ok_or_else(|| {
                Refusal::Failed("no thread could be started to control it".to_owned())
            })?;
        keeper
            .send(id, order)
            .map_err(|_| Refusal::Gone("the process".to_owned()))
    }

    /// Tells a keeper something whose answer nobody waits for.
    pub(super) fn tell_keeper(&mut self, node: NodeId, order: Order) {
        let id = self.fresh_id();
        let attached = self.procs.get(&node).and_then(Proc::attached);
        if let Some(keeper) = attached.and_then(|attached| attached.keeper.as_ref())
            && keeper.send(id, order).is_err()
        {
            tracing::debug!(node = node.0, "a keeper was not reached");
        }
    }

    pub(super) fn keeper_said(&mut self, node: NodeId, said: Said) {
        match said {
            Said::Answer { job, result, state } => {
                self.take_state(node, state);
                let outcome = result.map(|()| Answer::Done).map_err(launch::refusal);
                self.job_answered(node, job, outcome);
            }
            Said::State(state) => {
                self.take_state(node, state);
                self.agree(node);
            }
            Said::Ended(result) => self.keeper_ended(node, result),
        }
    }

    fn take_state(&mut self, node: NodeId, state: State) {
        let Some(proc) = self.procs.get_mut(&node) else {
            return;
        };
        // Its figures hold for this moment; time goes on while it is frozen.
        proc.frozen_since = state.frozen.then(now_ns);
        let pid = proc.pid;
        if let Some(attached) = proc.attached_mut() {
            if let Some(trouble) = &state.trouble
                && attached.state.trouble.as_ref() != Some(trouble)
            {
                tracing::warn!(pid, trouble, "a process is not controlled as it should be");
            }
            attached.state = state;
        }
        self.publish(node);
    }

    /// A thaw that failed is tried again by the keeper until it comes true; then
    /// the file says so.
    pub(super) fn agree(&mut self, node: NodeId) {
        let Some(proc) = self.procs.get_mut(&node) else {
            return;
        };
        let runs = proc.attached().is_some_and(|a| !a.state.frozen);
        if runs && proc.settings.freeze.is_on() && proc.jobs.is_empty() {
            let (pid, gpu) = (proc.pid, proc.gpu);
            tracing::warn!(pid, gpu, "a process that was frozen runs");
            proc.settings.freeze = Switch::Off;
            self.publish(node);
        }
    }

    /// Lets a process of somebody else go: what was stopped shall run.
    pub(super) fn let_go(&mut self, node: NodeId) {
        let Some(attached) = self.procs.get(&node).and_then(Proc::attached) else {
            return;
        };
        let told = attached
            .keeper
            .as_ref()
            .is_some_and(|keeper| keeper.send(0, Order::LetGo).is_ok());
        if !told {
            self.take_out(node);
        }
    }

    /// A keeper has let its process go, or could not.
    fn keeper_ended(&mut self, node: NodeId, result: Result<(), DeviceError>) {
        let Some(proc) = self.take_out(node) else {
            return;
        };
        let Some(attached) = proc.attached() else {
            return;
        };
        let uuid = self.gpus.get(&proc.gpu).map(|gpu| gpu.info.uuid.clone());
        match (result, uuid) {
            (Ok(()), Some(uuid)) => {
                let (journal, pid, start) =
                    (self.context.journal.clone(), proc.pid, attached.start);
                self.strike(pid, move || journal.disarm(pid, start, &uuid));
            }
            (Ok(()), None) => {}
            // It stays in the journal, so that recovery tries again.
            (Err(error), _) => {
                tracing::error!(pid = proc.pid, %error, "a process could not be let go");
            }
        }
    }

    /// Strikes something from the journal, in a task: it is a file.
    pub(super) fn strike(
        &self,
        pid: u32,
        change: impl FnOnce() -> std::io::Result<()> + Send + 'static,
    ) {
        tokio::spawn(async move {
            if let Ok(Err(error)) = launch::blocking(change).await {
                tracing::warn!(pid, %error, "the journal still lists a process that runs");
            }
        });
    }
}
