//! What the controller does because time has passed.

use std::time::Duration;

use gcgroup_kernels::protocol::Command;
use gcgroup_policy::lane;

use super::{Controller, StopState};
use crate::clock::now_ns;
use crate::keeper::Order;
use crate::{launch, spawn};

/// How often counters that grow by themselves are brought up to date while
/// somebody reads.
pub(super) const TICK: Duration = Duration::from_millis(50);
/// A reader is thought to be there for so long after its last read.
const READER_STAYS: Duration = Duration::from_secs(2);
/// Milliseconds between a worker's reports while somebody reads: sampled values
/// are at most 100 ms old.
const READ_REPORT_MS: u64 = 50;
/// The same while nobody does: the first value after a pause is at most 1 s old.
pub(super) const UNREAD_REPORT_MS: u64 = 900;

/// How long the controller stays awake for a worker's answer, and for the next
/// change after one, nanoseconds. In a virtual machine waking a processor was
/// seen to take longer than a stop (docs/measurements/service.md); a stop takes
/// some 60 us.
const AWAKE_NS: u64 = 400_000;

/// The same for a keeper's answer: a stop of channels takes 0.6 to 0.9 ms.
const KEEPER_AWAKE_NS: u64 = 1_500_000;

/// How long workers that were killed may take to be gone, nanoseconds. What
/// hangs in the driver for longer is left to recovery.
const KILLED_NS: u64 = 1_000_000_000;

/// Sleeps until a point of the monotonic clock, for good where there is none.
pub(super) async fn until(deadline_ns: Option<u64>) {
    match deadline_ns {
        Some(deadline) => {
            tokio::time::sleep(Duration::from_nanos(deadline.saturating_sub(now_ns()))).await;
        }
        None => std::future::pending().await,
    }
}

impl Controller {
    /// When [`Controller::on_deadline`] has something to do at the earliest.
    pub(super) fn next_deadline(&self) -> Option<u64> {
        let lanes = self.procs.values().filter_map(|proc| proc.next_deadline);
        let kills = self.procs.values().filter_map(|proc| proc.kill_deadline());
        let dying = self.dying.values().filter_map(|kill| kill.deadline);
        let stop = match self.stop {
            StopState::Running => None,
            // After the kill there is only the end to wait for.
            StopState::Stopping { give_up_ns } if give_up_ns <= now_ns() => {
                Some(give_up_ns + KILLED_NS)
            }
            StopState::Stopping { give_up_ns } => Some(give_up_ns),
        };
        lanes.chain(kills).chain(dying).chain(stop).min()
    }

    /// Whether something is about to come.
    pub(super) fn stays_awake(&mut self) -> bool {
        let awake = self.awake_until.is_some_and(|until| now_ns() < until);
        if !awake {
            self.awake_until = None;
        }
        awake
    }

    /// An answer or a further change may come within [`AWAKE_NS`].
    pub(super) fn stay_awake(&mut self) {
        self.awake_until = Some(now_ns() + AWAKE_NS);
    }

    /// The answer of a keeper may come within [`KEEPER_AWAKE_NS`].
    pub(super) fn stay_awake_for_keeper(&mut self) {
        self.awake_until = Some(now_ns() + KEEPER_AWAKE_NS);
    }

    pub(super) fn on_deadline(&mut self) {
        let now = now_ns();
        let due: Vec<_> = self
            .procs
            .values()
            .filter(|proc| proc.next_deadline.is_some_and(|deadline| deadline <= now))
            .map(|proc| proc.entry)
            .collect();
        for node in due {
            self.step_lane(node, lane::Event::Tick);
        }
        self.give_up_kills(now);
        if let StopState::Stopping { give_up_ns } = self.stop
            && give_up_ns <= now
        {
            // Only what the service launched ends with it.
            for proc in self.procs.values().filter(|proc| proc.worker().is_some()) {
                spawn::kill(&*proc.pidfd);
            }
        }
    }

    /// Keeps reports as frequent as readers need them.
    pub(super) fn on_tick(&mut self) {
        let wanted = if self.shared.unread_for() < READER_STAYS {
            READ_REPORT_MS
        } else {
            UNREAD_REPORT_MS
        };
        if wanted != self.report_every_ms {
            self.report_every_ms = wanted;
            let ids: Vec<_> = self.procs.keys().copied().collect();
            for node in ids {
                self.tell(node, Command::ReportEvery { ms: wanted });
                self.tell_keeper(node, Order::ReportEvery(Duration::from_millis(wanted)));
            }
        }
        self.refresh_frozen(Duration::from_millis(wanted));
        self.put_back_stuck(now_ns());
        self.retry_wanted();
        self.remembered.flush();
    }

    /// Tells a worker something whose reply nobody waits for.
    pub(super) fn tell(&mut self, node: gcgroup_model::snapshot::NodeId, command: Command) {
        let id = self.fresh_id();
        if let Some(proc) = self.procs.get(&node)
            && let Some(worker) = proc.worker()
            && let Err(error) = worker.sender.send(id, command)
        {
            tracing::debug!(pid = proc.pid, %error, "a worker was not reached");
        }
    }

    /// Asks every worker to end, and what was stopped to run, and gives them their
    /// time.
    pub(super) fn begin_stop(&mut self) {
        if self.stop != StopState::Running {
            return;
        }
        let grace = u64::try_from(launch::GRACE.as_nanos()).unwrap_or(0);
        self.stop = StopState::Stopping {
            give_up_ns: now_ns() + grace,
        };
        let nodes: Vec<_> = self.procs.keys().copied().collect();
        for node in nodes {
            self.tell(node, Command::End);
            self.let_go(node);
        }
    }

    /// Whether nothing is left to wait for. Workers that were killed are gone
    /// once their socket has closed; the rest of their end is the kernel's.
    pub(super) fn may_end(&self) -> bool {
        match self.stop {
            StopState::Running => false,
            StopState::Stopping { give_up_ns } => {
                (self.procs.is_empty() && self.launches.is_empty())
                    || now_ns() > give_up_ns + KILLED_NS
            }
        }
    }
}
