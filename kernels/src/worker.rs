//! The worker: one workload on one GPU, told what to do over a socket.
//!
//! [`Worker`] is the state machine over [`Engine`], [`run`] the process's main
//! loop around it. The machine reads no clock but the engine's and does no I/O
//! but through the engine, so it is the same on a real GPU, on a simulated one
//! and in tests.
//!
//! ```text
//!          Prepare            calibrated           Start
//! Opened ----------> (busy) ------------> Ready -----------> Started
//!    |                  | error                                 |
//!    |                  v                                       | End, duration over,
//!    |               Spoiled                                    v engine failed
//!    +---- End --------+----------- End -------------------->  Over
//!
//! While Ready or Started, the flow of launches (worker/flow.rs):
//!            wanted                     not wanted
//! Stopped -----------> Running --------------------------> Draining
//!    ^                    ^                                    |  |
//!    |                    +---- uncut, and wanted again -------+  |
//!    +----- all came back, and their progress was read -----------+
//! ```
//!
//! Launches are wanted when the workload was started and neither a freeze, nor
//! the quota, nor a command that needs the GPU idle says otherwise. One command
//! is under way at a time; those behind it wait in their order.

mod calibration;
mod flow;
mod launches;
mod prepare;
mod quota;
mod serve;

use std::collections::VecDeque;

use crate::engine::{Engine, EngineError, Placement, Prepared};
use crate::protocol::{Answer, Command, Message, QuotaSetting, Request, Setup};

use calibration::Calibration;
use flow::Workload;

pub use serve::{WorkerError, run};

/// Device time of one launch that calibration aims at, microseconds: long
/// enough that a launch's own cost (some 5 us) does not show, short enough that
/// counters move visibly.
pub const LAUNCH_US: f64 = 500.0;
/// Distance of a sliced kernel's looks at the stop flag, microseconds. On an
/// H200 looks every 20 us make a compute kernel 0.5 to 2.8% slower and a stop
/// take 52 us (p50); every 10 us 1.7 to 5.9% and 37 us
/// (docs/measurements/engine.md).
pub const POLL_US: f64 = 20.0;
/// Units between two looks are a multiple of this where there are more: the
/// kernels' loops are unrolled so far at most, and a remainder runs one by one.
const POLL_UNITS_STEP: u32 = 32;
/// Launches that are not reported yet, at most; older ones are forgotten.
pub const SAMPLES_MAX: usize = 1024;
/// Milliseconds between two reports until the service says otherwise.
pub const REPORT_MS: u64 = 1000;
/// How long a command that waits for the GPU to stop looks for its end without
/// going to sleep, nanoseconds. Going to sleep and being woken up costs about as
/// much as the stop itself, and a stop that takes longer than this is not one
/// whose microseconds matter.
const SPIN_NS: u64 = 3_000_000;
/// Commands that may wait behind one that does not end. The service has one or
/// two under way, so more is a fault of its own.
const WAITING_MAX: usize = 256;

/// A command that is under way. It ends when the GPU has come to rest, or, for
/// a calibration, when its last launch has.
#[derive(Debug)]
enum Operation {
    /// Prepare, with what is known so far.
    Calibrate {
        setup: Box<Setup>,
        prepared: Prepared,
        sm_count: u32,
        calibration: Calibration,
    },
    /// Freeze.
    Freeze,
    /// Place.
    Place(Placement),
    /// End, on request or because its duration is over.
    End,
}

/// One workload on one GPU.
///
/// The owner calls [`Worker::on_command`] with each request,
/// [`Worker::on_engine`] when the engine's descriptor is readable and
/// [`Worker::on_deadline`] when [`Worker::next_deadline`] has come, and sends
/// what [`Worker::take_message`] gives after each.
#[derive(Debug)]
pub struct Worker<E> {
    engine: E,
    /// Whether [`Engine::prepare`] was called; it may be called once only.
    prepare_tried: bool,
    workload: Option<Workload>,
    operation: Option<Operation>,
    /// Id of the command under way, until it is answered.
    asked: Option<u64>,
    waiting: VecDeque<Request>,
    messages: VecDeque<Message>,
    report_every_ns: u64,
    next_report: u64,
    /// Whether the service is gone: nothing more begins.
    closing: bool,
    over: bool,
    failure: Option<EngineError>,
}

impl<E: Engine> Worker<E> {
    /// A worker on an open GPU, with nothing prepared.
    pub fn new(engine: E) -> Self {
        Self {
            engine,
            prepare_tried: false,
            workload: None,
            operation: None,
            asked: None,
            waiting: VecDeque::new(),
            messages: VecDeque::new(),
            report_every_ns: REPORT_MS * 1_000_000,
            next_report: 0,
            closing: false,
            over: false,
            failure: None,
        }
    }

    /// The engine.
    pub fn engine(&self) -> &E {
        &self.engine
    }

    /// Whether it has ended: what [`Worker::take_message`] still has is sent,
    /// and the worker dropped.
    pub fn is_over(&self) -> bool {
        self.over
    }

    /// Why it ended, where its GPU failed.
    pub fn failure(&self) -> Option<&EngineError> {
        self.failure.as_ref()
    }

    /// The next message to the service.
    pub fn take_message(&mut self) -> Option<Message> {
        self.messages.pop_front()
    }

    /// Takes a command: carries it out now, or after those before it.
    pub fn on_command(&mut self, request: Request) {
        if self.over || self.closing {
            return self.reply(request.id, Err(EngineError::Ended));
        }
        if self.waiting.len() >= WAITING_MAX {
            let reason = "too many commands wait behind one that does not end";
            return self.reply(request.id, Err(unsupported(reason)));
        }
        // A freeze comes before everything else that may be due.
        if self.operation.is_none() && self.waiting.is_empty() && !self.expired() {
            if let Err(error) = self.begin(request) {
                return self.fail(error);
            }
        } else {
            self.waiting.push_back(request);
        }
        self.go_on();
    }

    /// Takes what the engine has to report.
    pub fn on_engine(&mut self) {
        if self.over {
            return;
        }
        let result = match (&mut self.operation, &mut self.workload) {
            (Some(Operation::Calibrate { .. }), _) => self.calibrate(),
            (_, Some(workload)) => workload.collect(&mut self.engine),
            // Nothing was ever submitted, but the call clears the descriptor.
            _ => self.engine.poll().map(drop),
        };
        match result {
            Ok(()) => self.go_on(),
            Err(error) => self.fail(error),
        }
    }

    /// Does what is due.
    pub fn on_deadline(&mut self) {
        self.go_on();
        let now = self.engine.now_ns();
        if self.reports() && now >= self.next_report {
            self.report();
            self.next_report = now.saturating_add(self.report_every_ns);
        }
    }

    /// When [`Worker::on_deadline`] is to be called, on the engine's clock in
    /// nanoseconds.
    pub fn next_deadline(&self) -> Option<u64> {
        if self.over {
            return None;
        }
        let workload = self.workload.as_ref()?;
        let report = self.reports().then_some(self.next_report);
        // An operation that waits for the GPU looks at the duration when it is
        // done; until then nothing can be done about it.
        let expiry = workload.expires().filter(|_| self.operation.is_none());
        [report, expiry, workload.quota_deadline()]
            .into_iter()
            .flatten()
            .min()
    }

    /// Ends because the service is gone: what is in flight is stopped, nobody
    /// is answered. It has ended when [`Worker::is_over`] says so.
    pub fn close(&mut self) {
        self.closing = true;
        self.waiting.clear();
        self.asked = None;
        if !matches!(self.operation, Some(Operation::Calibrate { .. })) {
            self.operation = Some(Operation::End);
        }
        self.go_on();
    }

    /// Carries a command out, or begins to. An error is one that ends the
    /// worker; others are answered.
    fn begin(&mut self, request: Request) -> Result<(), EngineError> {
        self.asked = Some(request.id);
        match request.command {
            Command::Open(_) => self.refuse("the GPU is open already"),
            Command::Prepare(setup) => return self.prepare(setup),
            Command::Start => return self.start(),
            Command::Freeze(true) => return self.freeze(),
            Command::Freeze(false) => return self.thaw(),
            Command::Quota(setting) => return self.set_quota(setting),
            Command::Place(placement) => return self.place(placement),
            Command::ReportEvery { ms: 0 } => self.refuse("a report every 0 ms; at least 1"),
            Command::ReportEvery { ms } => {
                self.report_every_ns = ms.saturating_mul(1_000_000);
                self.next_report = self.engine.now_ns().saturating_add(self.report_every_ns);
                self.answer(Ok(Answer::Done));
            }
            Command::Verify => return self.verify(),
            Command::End => {
                self.operation = Some(Operation::End);
                return self.stop();
            }
        }
        Ok(())
    }

    fn start(&mut self) -> Result<(), EngineError> {
        let now = self.engine.now_ns();
        match &mut self.workload {
            None => self.refuse(NOTHING_PREPARED),
            Some(workload) if workload.is_started() => {
                self.refuse("the workload is started already");
            }
            Some(workload) => {
                workload.start(now);
                workload.settle(&mut self.engine, false)?;
                self.next_report = now.saturating_add(self.report_every_ns);
                self.answer(Ok(Answer::Done));
            }
        }
        Ok(())
    }

    fn freeze(&mut self) -> Result<(), EngineError> {
        match &mut self.workload {
            None => self.refuse(NOTHING_PREPARED),
            Some(workload) if workload.is_held() => self.answer(Ok(Answer::Done)),
            Some(workload) => {
                workload.hold();
                self.operation = Some(Operation::Freeze);
                return self.stop();
            }
        }
        Ok(())
    }

    fn thaw(&mut self) -> Result<(), EngineError> {
        let now = self.engine.now_ns();
        match &mut self.workload {
            None => self.refuse(NOTHING_PREPARED),
            Some(workload) => {
                if workload.is_held() {
                    workload.release(now);
                    workload.settle(&mut self.engine, false)?;
                    self.next_report = now.saturating_add(self.report_every_ns);
                }
                self.answer(Ok(Answer::Done));
            }
        }
        Ok(())
    }

    fn set_quota(&mut self, setting: QuotaSetting) -> Result<(), EngineError> {
        let now = self.engine.now_ns();
        match (&mut self.workload, quota::check(&setting)) {
            (None, _) => self.refuse(NOTHING_PREPARED),
            (_, Err(reason)) => self.refuse(&reason),
            (Some(workload), Ok(())) => {
                workload.set_quota(setting, now);
                workload.settle(&mut self.engine, false)?;
                self.answer(Ok(Answer::Done));
            }
        }
        Ok(())
    }

    fn place(&mut self, placement: Placement) -> Result<(), EngineError> {
        match &self.workload {
            None => self.refuse(NOTHING_PREPARED),
            Some(workload) if *workload.placement() == placement => {
                let sm_count = workload.sm_count();
                self.answer(Ok(Answer::Placed { sm_count }));
            }
            Some(_) => {
                self.operation = Some(Operation::Place(placement));
                return self.stop();
            }
        }
        Ok(())
    }

    fn verify(&mut self) -> Result<(), EngineError> {
        match &self.workload {
            None => self.refuse(NOTHING_PREPARED),
            Some(workload) if workload.is_started() && !workload.is_frozen() => {
                self.refuse("results can be compared only while frozen");
            }
            Some(_) => match self.engine.verify() {
                Err(error) => return self.answer_error(error),
                Ok(verified) => self.answer(Ok(Answer::Verified {
                    compared: verified.compared,
                    wrong: verified.wrong,
                })),
            },
        }
        Ok(())
    }

    /// Stops the GPU for the operation under way and looks for its end for a
    /// while; if that does not come, the engine's descriptor tells.
    fn stop(&mut self) -> Result<(), EngineError> {
        let Some(workload) = &mut self.workload else {
            return Ok(());
        };
        workload.settle(&mut self.engine, true)?;
        let mut began = None;
        while !workload.is_stopped() {
            workload.collect(&mut self.engine)?;
            workload.settle(&mut self.engine, true)?;
            let now = self.engine.now_ns();
            if now.saturating_sub(*began.get_or_insert(now)) > SPIN_NS {
                break;
            }
            std::hint::spin_loop();
        }
        Ok(())
    }

    /// Brings the flow of launches, the operation under way and the commands
    /// behind it as far as they go now.
    fn go_on(&mut self) {
        if let Err(error) = self.try_go_on() {
            self.fail(error);
        }
    }

    fn try_go_on(&mut self) -> Result<(), EngineError> {
        while !self.over {
            let idle_wanted = matches!(self.operation, Some(Operation::Place(_) | Operation::End));
            if let Some(workload) = &mut self.workload {
                workload.settle(&mut self.engine, idle_wanted)?;
            }
            let stopped = self.workload.as_ref().is_none_or(Workload::is_stopped);
            match self.operation {
                Some(Operation::Calibrate { .. }) => return Ok(()),
                Some(_) if stopped => self.finish()?,
                Some(_) => return Ok(()),
                None if self.expired() => self.operation = Some(Operation::End),
                None => match self.waiting.pop_front() {
                    Some(request) => self.begin(request)?,
                    None => return Ok(()),
                },
            }
        }
        Ok(())
    }

    /// Ends the operation under way, the GPU being at rest.
    fn finish(&mut self) -> Result<(), EngineError> {
        match self.operation.take() {
            Some(Operation::Freeze) => {
                let now = self.engine.now_ns();
                if let Some(workload) = &mut self.workload {
                    workload.freeze(now);
                }
                self.answer(Ok(Answer::Done));
                self.report();
            }
            Some(Operation::Place(placement)) => match self.engine.place(&placement) {
                Err(error) => return self.answer_error(error),
                Ok(sm_count) => {
                    if let Some(workload) = &mut self.workload {
                        workload.set_placement(placement, sm_count);
                    }
                    self.answer(Ok(Answer::Placed { sm_count }));
                }
            },
            Some(Operation::End) => {
                self.report();
                if self.asked.is_some() {
                    self.answer(Ok(Answer::Done));
                } else {
                    self.messages.push_back(Message::Ending { error: None });
                }
                self.end();
            }
            other => self.operation = other,
        }
        Ok(())
    }

    fn expired(&self) -> bool {
        self.workload
            .as_ref()
            .and_then(Workload::expires)
            .is_some_and(|expiry| self.engine.now_ns() >= expiry)
    }

    /// Whether there is anything to report from time to time.
    fn reports(&self) -> bool {
        let running = |workload: &Workload| workload.is_started() && !workload.is_frozen();
        !self.over && self.workload.as_ref().is_some_and(running)
    }

    fn report(&mut self) {
        let now = self.engine.now_ns();
        if let Some(workload) = &mut self.workload
            && workload.is_started()
        {
            let counters = workload.counters(now);
            let samples = workload.take_samples();
            self.messages
                .push_back(Message::Report { counters, samples });
        }
    }

    /// Answers the command under way.
    fn answer(&mut self, result: Result<Answer, EngineError>) {
        if let Some(id) = self.asked.take() {
            self.reply(id, result);
        }
    }

    fn refuse(&mut self, reason: &str) {
        self.answer(Err(unsupported(reason)));
    }

    /// Answers with an error, and passes it on where the context is broken.
    fn answer_error(&mut self, error: EngineError) -> Result<(), EngineError> {
        self.answer(Err(error.clone()));
        match error {
            EngineError::Failed(_) => Err(error),
            _ => Ok(()),
        }
    }

    fn reply(&mut self, id: u64, result: Result<Answer, EngineError>) {
        let now = self.engine.now_ns();
        let counters = self
            .workload
            .as_mut()
            .map(|workload| workload.counters(now));
        self.messages.push_back(Message::Reply {
            id,
            result,
            counters,
        });
    }

    fn fail(&mut self, error: EngineError) {
        self.operation = None;
        self.answer(Err(error.clone()));
        self.messages.push_back(Message::Ending {
            error: Some(error.clone()),
        });
        self.failure = Some(error);
        self.end();
    }

    fn end(&mut self) {
        self.over = true;
        while let Some(request) = self.waiting.pop_front() {
            self.reply(request.id, Err(EngineError::Ended));
        }
    }
}

const NOTHING_PREPARED: &str = "no workload is prepared";

fn unsupported(reason: &str) -> EngineError {
    EngineError::Unsupported(reason.to_owned())
}

fn unasked_for(target: u64) -> EngineError {
    EngineError::Failed(format!(
        "a launch to {target} units ended that was not the next one in flight"
    ))
}
