//! A worker on a virtual clock: time passes as the test says, and the worker
//! wakes up for the engine and its deadlines as a process would.

use std::cell::RefCell;
use std::rc::Rc;

use gcgroup_kernels::engine::{EngineError, Form, Placement, Plan};
use gcgroup_kernels::protocol::{
    Answer, Command, Counters, Message, QuotaSetting, Readiness, Request, Setup,
};
use gcgroup_kernels::worker::Worker;
use gcgroup_model::snapshot::Sample;

use crate::scripted::{Gpu, Script, Scripted};

pub(crate) const US: u64 = 1_000;
pub(crate) const MS: u64 = 1_000_000;
pub(crate) const S: u64 = 1_000_000_000;

pub(crate) const UNBOUNDED: QuotaSetting = QuotaSetting {
    quota_usec: None,
    period_usec: 100_000,
};

pub(crate) type Reply = (Result<Answer, EngineError>, Option<Counters>);

pub(crate) fn quota(quota_usec: u64, period_usec: u64) -> QuotaSetting {
    QuotaSetting {
        quota_usec: Some(quota_usec),
        period_usec,
    }
}

pub(crate) fn placement(groups: impl IntoIterator<Item = u32>) -> Placement {
    Placement {
        groups: Some(groups.into_iter().collect()),
        stream_priority: 0,
    }
}

/// A setup of 4 blocks on the whole device.
pub(crate) fn setup(form: Form) -> Setup {
    Setup {
        plan: Plan {
            kernel: "fma_fp32".to_owned(),
            ilp: 4,
            blocks: 4,
            threads: 1024,
            bytes: 0,
            form,
        },
        iterations: None,
        duration_ms: None,
        placement: Placement {
            groups: None,
            stream_priority: 0,
        },
        quota: UNBOUNDED,
        depth: 4,
    }
}

pub(crate) struct Rig {
    pub(crate) worker: Worker<Scripted>,
    pub(crate) gpu: Rc<RefCell<Gpu>>,
    /// How late the worker wakes up, nanoseconds.
    pub(crate) late_ns: u64,
    next_id: u64,
    replies: Vec<(u64, Reply)>,
    /// Counters of all reports so far.
    pub(crate) reports: Vec<Counters>,
    /// Samples of all reports so far.
    pub(crate) samples: Vec<Sample>,
    /// What the worker's ending said, once it did.
    pub(crate) ending: Option<Option<EngineError>>,
}

impl Rig {
    /// A worker on an open GPU.
    pub(crate) fn opened(script: Script) -> Self {
        let gpu = Rc::new(RefCell::new(Gpu::on_virtual_clock(script)));
        Self {
            worker: Worker::new(Scripted::new(Rc::clone(&gpu))),
            gpu,
            late_ns: 0,
            next_id: 0,
            replies: Vec::new(),
            reports: Vec::new(),
            samples: Vec::new(),
            ending: None,
        }
    }

    /// A worker that is ready to start.
    pub(crate) fn ready(script: Script, setup: Setup) -> (Self, Readiness) {
        let mut rig = Self::opened(script);
        let (answer, _) = rig.call(Command::Prepare(Box::new(setup)));
        match answer {
            Ok(Answer::Ready(readiness)) => (rig, readiness),
            other => panic!("not ready: {other:?}"),
        }
    }

    /// A worker that has just been started.
    pub(crate) fn started(script: Script, setup: Setup) -> (Self, Readiness) {
        let (mut rig, readiness) = Self::ready(script, setup);
        rig.done(Command::Start);
        (rig, readiness)
    }

    pub(crate) fn now(&self) -> u64 {
        self.gpu.borrow().now()
    }

    /// Sends a command without waiting for its reply.
    pub(crate) fn send(&mut self, command: Command) -> u64 {
        self.next_id += 1;
        let id = self.next_id;
        self.worker.on_command(Request { id, command });
        self.gather();
        id
    }

    /// The reply to a command, if it has come.
    pub(crate) fn reply(&mut self, id: u64) -> Option<Reply> {
        let at = self.replies.iter().position(|(other, _)| *other == id)?;
        Some(self.replies.swap_remove(at).1)
    }

    /// Sends a command and lets time pass until its reply, 60 s at most.
    pub(crate) fn call(&mut self, command: Command) -> Reply {
        let text = format!("{command:?}");
        let id = self.send(command);
        let until = self.now() + 60 * S;
        loop {
            if let Some(reply) = self.reply(id) {
                return reply;
            }
            assert!(
                !self.worker.is_over() && self.step(until),
                "{text} was not answered"
            );
        }
    }

    /// Calls a command that must succeed; returns the counters.
    pub(crate) fn done(&mut self, command: Command) -> Counters {
        let text = format!("{command:?}");
        match self.call(command) {
            (Ok(_), Some(counters)) => counters,
            other => panic!("{text}: {other:?}"),
        }
    }

    /// Lets so many nanoseconds pass.
    pub(crate) fn pass(&mut self, ns: u64) {
        let until = self.now() + ns;
        while self.step(until) {}
    }

    /// Wakes the worker up for the next thing before `until`. Returns false,
    /// the clock at `until`, when there is none
    /// or the worker has ended.
    fn step(&mut self, until: u64) -> bool {
        let deadline = self.worker.next_deadline();
        let event = self.gpu.borrow().next_event();
        let next = match (deadline, event) {
            (Some(deadline), Some(event)) => deadline.min(event),
            (Some(next), None) | (None, Some(next)) => next,
            (None, None) => u64::MAX,
        };
        let before = self.now();
        if next > until || self.worker.is_over() {
            self.gpu.borrow().advance_clock(until);
            return false;
        }
        self.gpu.borrow().advance_clock(next + self.late_ns);
        if event.is_some_and(|event| event <= self.now()) {
            self.worker.on_engine();
        }
        if deadline.is_some_and(|deadline| deadline <= self.now()) {
            self.worker.on_deadline();
            let again = self.worker.next_deadline();
            assert!(
                again.is_none_or(|again| again > before),
                "the deadline {again:?} stays in the past"
            );
        }
        self.gather();
        true
    }

    fn gather(&mut self) {
        while let Some(message) = self.worker.take_message() {
            let reply = matches!(message, Message::Reply { .. });
            assert!(
                reply || self.ending.is_none(),
                "{message:?} after the ending"
            );
            match message {
                Message::Reply {
                    id,
                    result,
                    counters,
                } => self.replies.push((id, (result, counters))),
                Message::Report { counters, samples } => {
                    self.reports.push(counters);
                    self.samples.extend(samples);
                }
                Message::Ending { error } => self.ending = Some(error),
            }
        }
    }
}
