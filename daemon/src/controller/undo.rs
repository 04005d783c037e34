//! Putting back what a change did, where it did not come true for all.

use gcgroup_model::change::Refusal;
use gcgroup_model::snapshot::{NodeId, Settings};

use super::Controller;
use super::ticket::{Commit, Op, Order, Ticket, TicketId};

/// What puts a job back where another of its ticket fails.
#[derive(Clone, Debug)]
pub(super) enum Undo {
    /// Nothing does.
    Never,
    /// What is set when the job begins: what came before it counts.
    Before,
    /// This.
    To(Op),
}

impl Controller {
    /// Freezes of several of which a member is stuck: the others are put back now,
    /// so that none of them stands for as long as it hangs, and it itself is when
    /// it comes true after all.
    pub(super) fn put_back_stuck(&mut self, now: u64) {
        let stuck_after = u64::try_from(self.config.stuck_after.as_nanos()).unwrap_or(u64::MAX);
        let is_stuck = |ticket: &Ticket| {
            ticket.failure.is_none() && now.saturating_sub(ticket.deadline) >= stuck_after
        };
        let stuck: Vec<_> = self
            .tickets
            .iter()
            .filter(|(_, ticket)| is_stuck(ticket))
            .map(|(id, _)| *id)
            .collect();
        for id in stuck {
            self.put_back_early(id);
        }
    }

    fn put_back_early(&mut self, id: TicketId) {
        let refusal = Refusal::Failed("a member of the change is stuck".to_owned());
        let Some(ticket) = self.tickets.get_mut(&id) else {
            return;
        };
        if !matches!(ticket.commit, Commit::FreezeMany(..)) || ticket.members.len() < 2 {
            return;
        }
        ticket.failure.get_or_insert(refusal.clone());
        let succeeded = std::mem::take(&mut ticket.succeeded);
        let has = |node: NodeId| succeeded.iter().any(|(of, _)| *of == node);
        let (done, waiting) = std::mem::take(&mut ticket.members)
            .into_iter()
            .partition(|(node, _)| has(*node));
        ticket.members = waiting;
        let orders = put_back(succeeded);
        if !orders.is_empty() {
            self.open_ticket(None, None, Commit::RolledBack(refusal, None), orders);
        }
        self.release(done);
    }

    pub(super) fn roll_back(&mut self, ticket: Ticket, refusal: Refusal) {
        if ticket.reply.is_some() {
            self.note_failure(&ticket, &refusal);
        }
        let Ticket {
            commit,
            reply,
            caller,
            succeeded,
            ..
        } = ticket;
        match commit {
            // The groups stay reserved until every member is off them.
            Commit::Resize {
                gpu, name, before, ..
            } => {
                let resize = Some((gpu, name, before));
                let commit = Commit::RolledBack(member_failed(refusal), resize);
                self.open_ticket(caller, reply, commit, put_back(succeeded));
            }
            Commit::FreezeMany(..) => {
                self.open_ticket(
                    caller,
                    reply,
                    Commit::RolledBack(refusal, None),
                    put_back(succeeded),
                );
            }
            Commit::RolledBack(first, resize) => {
                tracing::error!(%refusal, "a change that failed could not be put back everywhere");
                // Somebody may be on either set of groups, so both stay taken.
                if let Some((gpu, name, before)) = resize {
                    let table = self.gpus.get(&gpu).map(|gpu| &gpu.table);
                    let taken = table
                        .and_then(|table| table.groups(&name))
                        .map(<[u32]>::to_vec);
                    self.settle_resize(gpu, &name, taken.unwrap_or(before));
                }
                if let Some(reply) = reply {
                    self.answer(reply, Err(first));
                }
            }
            Commit::Started(node) | Commit::Prioritised(node, ..) => {
                // What did not start is no workload; its entry goes with it.
                self.end_soon(node);
                if let Some(reply) = reply {
                    self.answer(reply, Err(refusal));
                }
            }
            Commit::Set(node, setting) if reply.is_none() && caller.is_none() => {
                self.want_again(node, setting, &refusal);
            }
            Commit::Set(..) | Commit::Nothing => {
                if let Some(reply) = reply {
                    self.answer(reply, Err(refusal));
                }
            }
        }
    }
}

/// What sets a file to what it holds now.
pub(super) fn before(op: &Op, now: &Settings) -> Undo {
    match op {
        Op::Freeze(_) => Undo::To(Op::Freeze(now.freeze)),
        Op::Quota(_) => Undo::To(Op::Quota(now.max)),
        Op::Priority(_) => Undo::To(Op::Priority(now.priority)),
        Op::Move(_) => Undo::To(Op::Move(now.partition.clone())),
        Op::Start | Op::Regroup(_) => Undo::Never,
    }
}

fn put_back(succeeded: Vec<(NodeId, Undo)>) -> Vec<Order> {
    let order = |(node, undo)| match undo {
        Undo::To(op) => Some(Order {
            node,
            op,
            undo: Undo::Never,
        }),
        Undo::Never | Undo::Before => None,
    };
    succeeded.into_iter().filter_map(order).collect()
}

/// A failure of one member as the writer of sm.count sees it.
fn member_failed(refusal: Refusal) -> Refusal {
    match refusal {
        Refusal::TimedOut { .. } | Refusal::Busy(_) => refusal,
        other => Refusal::Failed(format!("a member could not be moved, so none was: {other}")),
    }
}
