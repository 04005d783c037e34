//! Changes under way.
//!
//! A ticket is one change that somebody asked for; it has one job for each
//! process it touches, and each job goes through that process's lane. When every
//! job has ended, the ticket commits, or, where one of several failed, puts the
//! others back first.

use gcgroup_fs::Reply;
use gcgroup_kernels::protocol::{Answer, Command, QuotaSetting};
use gcgroup_model::change::{Begun, Caller, Done, Refusal, Setting};
use gcgroup_model::snapshot::NodeId;
use gcgroup_model::spec::WorkloadSpec;
use gcgroup_model::value::{PartitionName, PartitionRef, Priority, Quota, Switch};
use gcgroup_policy::enforcer::Sharing;
use gcgroup_policy::lane::{self, Action};

use super::process::Proc;
use super::undo::{Undo, before};
use super::{Controller, Event};
use crate::clock::now_ns;
use crate::launch;

pub(super) type TicketId = u64;
pub(super) type JobId = lane::JobId;

/// What a job does to its process.
#[derive(Clone, Debug)]
pub(super) enum Op {
    /// Begins to launch.
    Start,
    Freeze(Switch),
    Quota(Quota),
    Priority(Priority),
    /// Goes to the SMs that this partition has when the job begins.
    Move(PartitionRef),
    /// Goes to these groups.
    Regroup(Vec<u32>),
}

/// One process's part of a ticket.
#[derive(Clone, Debug)]
pub(super) struct Job {
    pub(super) ticket: TicketId,
    pub(super) node: NodeId,
    pub(super) op: Op,
    /// What puts it back.
    undo: Undo,
    /// The groups it was placed on, once begun.
    groups: Option<Option<Vec<u32>>>,
    /// Whether its outcome is known. The job stays with its process until the whole
    /// ticket has ended, so that nothing comes between it and being put back.
    pub(super) ended: bool,
}

/// What a ticket does when all of its jobs have succeeded.
#[derive(Clone, Debug)]
pub(super) enum Commit {
    Set(NodeId, Setting),
    FreezeMany(Vec<NodeId>, Switch),
    Resize {
        gpu: u32,
        name: PartitionName,
        before: Vec<u32>,
        after: Vec<u32>,
    },
    Started(NodeId),
    /// The priority of a workload that is to start next.
    Prioritised(NodeId, Priority, Box<WorkloadSpec>),
    /// Others were put back; this is the answer all the same, and these are the
    /// groups of the partition whose resize failed.
    RolledBack(Refusal, Option<(u32, PartitionName, Vec<u32>)>),
    /// Something of the service's own.
    Nothing,
}

/// A change under way.
pub(super) struct Ticket {
    pub(super) commit: Commit,
    pub(super) reply: Option<Reply>,
    pub(super) caller: Option<Caller>,
    pub(super) waiting: usize,
    pub(super) members: Vec<(NodeId, JobId)>,
    pub(super) succeeded: Vec<(NodeId, Undo)>,
    pub(super) failure: Option<Refusal>,
    pub(super) deadline: u64,
}

/// A job before it is handed in.
pub(super) struct Order {
    pub(super) node: NodeId,
    pub(super) op: Op,
    pub(super) undo: Undo,
}

impl Controller {
    /// Opens a ticket and hands in its jobs. One without jobs commits at once.
    pub(super) fn open_ticket(
        &mut self,
        caller: Option<Caller>,
        reply: Option<Reply>,
        commit: Commit,
        orders: Vec<Order>,
    ) {
        // What puts others back comes before everything that waits for them.
        let first = matches!(commit, Commit::RolledBack(..));
        let id = self.fresh_id();
        let deadline =
            now_ns() + u64::try_from(self.config.settings_deadline.as_nanos()).unwrap_or(u64::MAX);
        let ticket = Ticket {
            commit,
            reply,
            caller,
            // One more than there are jobs, so that none of them can be the
            // last before all are handed in.
            waiting: orders.len() + 1,
            members: Vec::new(),
            succeeded: Vec::new(),
            failure: None,
            deadline,
        };
        self.tickets.insert(id, ticket);
        for Order { node, op, undo } in orders {
            let job = self.fresh_id();
            let record = Job {
                ticket: id,
                node,
                op,
                undo,
                groups: None,
                ended: false,
            };
            match self.procs.get_mut(&node) {
                Some(proc) => {
                    proc.jobs.insert(job, record);
                    if let Some(ticket) = self.tickets.get_mut(&id) {
                        ticket.members.push((node, job));
                    }
                    self.step_lane(
                        node,
                        if first {
                            lane::Event::SubmitNext { job, deadline }
                        } else {
                            lane::Event::Submit { job, deadline }
                        },
                    );
                }
                None => self.member_done(record, Err(Refusal::Gone("the process".to_owned()))),
            }
        }
        self.one_less(id);
    }

    /// Steps a process's lane and does what it says.
    pub(super) fn step_lane(&mut self, node: NodeId, event: lane::Event) {
        let Some(proc) = self.procs.get_mut(&node) else {
            return;
        };
        let was_pending = proc.lane.is_pending();
        let (actions, next) = proc.lane.step(event, now_ns());
        proc.next_deadline = next;
        if was_pending != proc.lane.is_pending() {
            self.publish(node);
        }
        for action in actions {
            match action {
                Action::Begin(job) => self.begin(node, job),
                Action::Withdraw(job) => {
                    let refusal = self.timed_out(Begun::No);
                    self.end_job(node, job, Err(refusal));
                }
                Action::Overdue(job) => self.overdue(node, job),
                Action::RefuseBusy(job) => {
                    let why = "an earlier change of this process is still under way (pending 1)";
                    self.end_job(node, job, Err(Refusal::Busy(why.to_owned())));
                }
                Action::RefuseStuck(job) => {
                    let why =
                        "an earlier change of this process is stuck; only gcgroup.kill is left";
                    self.end_job(node, job, Err(Refusal::Failed(why.to_owned())));
                }
            }
        }
    }

    pub(super) fn timed_out(&self, begun: Begun) -> Refusal {
        let limit_ms = u64::try_from(self.config.settings_deadline.as_millis()).unwrap_or(u64::MAX);
        Refusal::TimedOut {
            what: "the change".to_owned(),
            limit_ms,
            begun,
        }
    }

    /// Tells the caller; the job runs on.
    fn overdue(&mut self, node: NodeId, job: JobId) {
        let Some(ticket) = self
            .procs
            .get(&node)
            .and_then(|p| p.jobs.get(&job))
            .map(|j| j.ticket)
        else {
            return;
        };
        if let Some(mut late) = self.tickets.remove(&ticket) {
            if let Some(reply) = late.reply.take() {
                let refusal = self.timed_out(Begun::Yes);
                self.note_failure(&late, &refusal);
                self.answer(reply, Err(refusal));
            }
            self.tickets.insert(ticket, late);
        }
        self.publish(node);
    }

    fn begin(&mut self, node: NodeId, id: JobId) {
        let Some(proc) = self.procs.get_mut(&node) else {
            return;
        };
        let Some(job) = proc.jobs.get_mut(&id) else {
            return;
        };
        if matches!(job.undo, Undo::Before) {
            job.undo = before(&job.op, &proc.settings);
        }
        let op = job.op.clone();
        let attached = self.procs.get(&node).and_then(Proc::attached).is_some();
        let outcome = if attached {
            self.order_keeper(node, id, &op)
        } else {
            match self.command(node, &op) {
                Ok(Some((command, groups))) => self.send(node, id, command, groups),
                Ok(None) => self.set_timeslice(node, id),
                Err(refusal) => Err(refusal),
            }
        };
        if let Err(refusal) = outcome {
            self.job_answered(node, id, Err(refusal));
        }
    }

    /// The worker's command for an operation and the groups it places on; `None`
    /// for one that the driver does.
    #[expect(clippy::type_complexity, reason = "the pair is used in one place")]
    fn command(
        &self,
        node: NodeId,
        op: &Op,
    ) -> Result<Option<(Command, Option<Option<Vec<u32>>>)>, Refusal> {
        let gone = || Refusal::Gone("the process".to_owned());
        let proc = self.procs.get(&node).ok_or_else(gone)?;
        let placed = proc.worker().and_then(|worker| worker.placed.clone());
        let place = |groups: Option<Vec<u32>>, priority: Priority| {
            let placement = self.placement(proc.gpu, groups.clone(), priority);
            Some((Command::Place(placement), Some(groups)))
        };
        Ok(match op {
            Op::Start => Some((Command::Start, None)),
            Op::Freeze(state) => Some((Command::Freeze(state.is_on()), None)),
            Op::Quota(quota) => Some((Command::Quota(quota_setting(*quota)), None)),
            Op::Priority(priority) => match self.sharing(proc.gpu) {
                Sharing::Spatial => place(placed, *priority),
                Sharing::Temporal => None,
            },
            Op::Move(partition) => {
                let groups = self.groups_of(proc.gpu, partition)?;
                place(groups, proc.settings.priority)
            }
            Op::Regroup(groups) => place(Some(groups.clone()), proc.settings.priority),
        })
    }

    fn send(
        &mut self,
        node: NodeId,
        id: JobId,
        command: Command,
        groups: Option<Option<Vec<u32>>>,
    ) -> Result<(), Refusal> {
        self.stay_awake();
        let Some(proc) = self.procs.get_mut(&node) else {
            return Err(Refusal::Gone("the process".to_owned()));
        };
        if let Some(job) = proc.jobs.get_mut(&id) {
            job.groups = groups;
        }
        let gone = || Refusal::Gone(format!("process {}", proc.pid));
        let worker = proc.worker().ok_or_else(gone)?;
        worker
            .sender
            .send(id, command)
            .map_err(|error| match error.kind() {
                std::io::ErrorKind::WouldBlock => {
                    Refusal::Failed(format!("the worker was not reached: {error}"))
                }
                _ => gone(),
            })
    }

    /// Sets a timeslice in a task: the driver's call may wait for a lock.
    fn set_timeslice(&mut self, node: NodeId, job: JobId) -> Result<(), Refusal> {
        let proc = self
            .procs
            .get(&node)
            .ok_or_else(|| Refusal::Gone("the process".to_owned()))?;
        let Some(Job {
            op: Op::Priority(priority),
            ..
        }) = proc.jobs.get(&job)
        else {
            return Err(Refusal::Failed(
                "no timeslice belongs to this change".to_owned(),
            ));
        };
        let Some((groups, _)) = proc.worker().and_then(|worker| worker.channels.clone()) else {
            return Err(Refusal::Unsupported(
                "the channel groups of this process were not found".to_owned(),
            ));
        };
        let usec = priority.timeslice_usec();
        let (host, events) = (self.context.host.clone(), self.events.clone());
        tokio::spawn(async move {
            let result = launch::blocking(move || host.set_timeslice(&groups, usec)).await;
            let result = result.unwrap_or_else(|refusal| {
                Err(gcgroup_device::DeviceError::Failed(refusal.to_string()))
            });
            // The controller may have ended meanwhile.
            let _ = events.send(Event::Timeslice { node, job, result });
        });
        Ok(())
    }

    pub(super) fn timeslice_set(
        &mut self,
        node: NodeId,
        job: JobId,
        result: Result<gcgroup_device::Timeslices, gcgroup_device::DeviceError>,
    ) {
        let outcome = match result {
            Ok(timeslices) => {
                if let Some(proc) = self.procs.get_mut(&node)
                    && let Some((_, usec)) = proc
                        .worker_mut()
                        .and_then(|worker| worker.channels.as_mut())
                    && let Some(read_back) = timeslices.usec.first()
                {
                    *usec = *read_back;
                }
                Ok(Answer::Done)
            }
            Err(error) => Err(launch::refusal(error)),
        };
        self.job_answered(node, job, outcome);
        self.publish(node);
    }

    /// A job came to its end in the worker or the driver.
    pub(super) fn job_answered(
        &mut self,
        node: NodeId,
        id: JobId,
        result: Result<Answer, Refusal>,
    ) {
        let Some(proc) = self.procs.get_mut(&node) else {
            return;
        };
        let Some(job) = proc.jobs.get(&id) else {
            return;
        };
        if let (Some(groups), Ok(_)) = (job.groups.clone(), &result)
            && let Some(worker) = proc.worker_mut()
        {
            worker.placed = groups;
        }
        self.stay_awake();
        self.end_job(node, id, result.map(|_| ()));
    }

    fn end_job(&mut self, node: NodeId, id: JobId, result: Result<(), Refusal>) {
        let proc = self.procs.get_mut(&node);
        let Some(job) = proc.and_then(|proc| proc.jobs.get_mut(&id)) else {
            return;
        };
        if !std::mem::replace(&mut job.ended, true) {
            let job = job.clone();
            self.member_done(job, result);
        }
    }

    /// A ticket has ended: its processes take the next job.
    pub(super) fn release(&mut self, members: Vec<(NodeId, JobId)>) {
        for (node, job) in members {
            if let Some(proc) = self.procs.get_mut(&node) {
                proc.jobs.remove(&job);
                self.agree(node);
                self.step_lane(node, lane::Event::Finished { job });
                self.reconcile(node);
            }
        }
    }

    /// One process's part of a ticket has ended.
    pub(super) fn member_done(&mut self, job: Job, result: Result<(), Refusal>) {
        let Some(ticket) = self.tickets.get_mut(&job.ticket) else {
            return;
        };
        match result {
            Ok(()) => ticket.succeeded.push((job.node, job.undo)),
            // A member that has ended needs no SMs, and nothing put back.
            Err(Refusal::Gone(_))
                if matches!(
                    ticket.commit,
                    Commit::Resize { .. } | Commit::RolledBack(..)
                ) => {}
            Err(refusal) => {
                ticket.failure.get_or_insert(refusal);
            }
        }
        self.one_less(job.ticket);
    }

    fn one_less(&mut self, id: TicketId) {
        let Some(ticket) = self.tickets.get_mut(&id) else {
            return;
        };
        ticket.waiting -= 1;
        if ticket.waiting > 0 {
            return;
        }
        let Some(mut ticket) = self.tickets.remove(&id) else {
            return;
        };
        let members = std::mem::take(&mut ticket.members);
        match ticket.failure.clone() {
            None => self.commit(ticket),
            Some(refusal) => self.roll_back(ticket, refusal),
        }
        self.release(members);
    }

    fn commit(&mut self, ticket: Ticket) {
        let done = match ticket.commit {
            Commit::Set(node, setting) => {
                self.set(node, setting, ticket.caller);
                Ok(Done::Quiet)
            }
            Commit::FreezeMany(nodes, state) => {
                for node in nodes {
                    self.set(node, Setting::Freeze(state), ticket.caller);
                }
                Ok(Done::Quiet)
            }
            Commit::Resize {
                gpu, name, after, ..
            } => {
                self.settle_resize(gpu, &name, after);
                Ok(Done::Quiet)
            }
            Commit::Started(node) => self.launch_answer(node),
            Commit::Prioritised(node, priority, spec) => {
                self.set(node, Setting::Priority(priority), ticket.caller);
                self.start(node, &spec, ticket.caller, ticket.reply);
                return;
            }
            Commit::RolledBack(refusal, resize) => {
                if let Some((gpu, name, groups)) = resize {
                    self.settle_resize(gpu, &name, groups);
                }
                Err(refusal)
            }
            Commit::Nothing => Ok(Done::Quiet),
        };
        match ticket.reply {
            Some(reply) => self.answer(reply, done),
            // Answered as overdue, or nobody asked.
            None if ticket.deadline < now_ns() => {
                tracing::info!("a change that was overdue has come true");
            }
            None => {}
        }
    }
}

/// compute.max as a worker takes it.
pub(super) fn quota_setting(quota: Quota) -> QuotaSetting {
    QuotaSetting {
        quota_usec: quota.quota_usec,
        period_usec: quota.period_usec,
    }
}
