//! From a setup to a workload that can start: its buffers, its place, and the
//! launches that calibrate it, one at a time, so that the main loop goes on
//! between them.

use crate::engine::{Engine, EngineError};
use crate::protocol::{Answer, Readiness, Setup};

use super::calibration::{Calibration, Step};
use super::flow::Workload;
use super::launches::Shape;
use super::{Operation, Worker, quota, unasked_for};

/// Launches in flight that a setup may ask for.
const DEPTH: std::ops::RangeInclusive<u32> = 2..=64;

impl<E: Engine> Worker<E> {
    /// Takes a setup and submits the first launch of its calibration.
    pub(super) fn prepare(&mut self, setup: Box<Setup>) -> Result<(), EngineError> {
        if self.prepare_tried {
            self.refuse("a worker prepares one workload, once");
            return Ok(());
        }
        if let Err(reason) = check_setup(&setup) {
            self.refuse(&reason);
            return Ok(());
        }
        self.prepare_tried = true;
        let taken = self.engine.prepare(&setup.plan).and_then(|prepared| {
            let sm_count = self.engine.place(&setup.placement)?;
            Ok((prepared, sm_count))
        });
        let (prepared, sm_count) = match taken {
            Ok(taken) => taken,
            Err(error) => return self.answer_error(error),
        };
        let calibration = Calibration::new(
            setup.iterations,
            prepared.units_per_iteration,
            &setup.plan,
            sm_count,
            self.engine.now_ns(),
        );
        match calibration {
            Err(reason) => self.refuse(&reason),
            Ok(calibration) => {
                let (target, poll_units) = (calibration.target(), calibration.poll_units());
                self.operation = Some(Operation::Calibrate {
                    setup,
                    prepared,
                    sm_count,
                    calibration,
                });
                self.engine.submit(target, poll_units)?;
            }
        }
        Ok(())
    }

    /// Takes the ends of calibration's launches and submits the next ones.
    pub(super) fn calibrate(&mut self) -> Result<(), EngineError> {
        while let Some(completion) = self.engine.poll()? {
            let Some(Operation::Calibrate { calibration, .. }) = &mut self.operation else {
                return Err(unasked_for(completion.target));
            };
            if completion.target != calibration.target() {
                return Err(unasked_for(completion.target));
            }
            if self.closing {
                self.over = true;
                return Ok(());
            }
            match calibration.record(completion.device_us, self.engine.now_ns()) {
                Step::Again => {
                    let (target, poll_units) = (calibration.target(), calibration.poll_units());
                    self.engine.submit(target, poll_units)?;
                }
                Step::Done { iterations } => return self.ready(iterations),
            }
        }
        Ok(())
    }

    fn ready(&mut self, iterations: u64) -> Result<(), EngineError> {
        let Some(Operation::Calibrate {
            setup,
            prepared,
            sm_count,
            calibration,
        }) = self.operation.take()
        else {
            return Ok(());
        };
        let shape = Shape {
            iterations,
            units_per_iteration: prepared.units_per_iteration.max(1),
            blocks: setup.plan.blocks,
            form: setup.plan.form,
            depth: setup.depth as usize,
            poll_units: calibration.poll_units(),
        };
        let progress = self.engine.progress()?;
        let now = self.engine.now_ns();
        let workload = Workload::new(shape, calibration.target(), &setup, sm_count, progress, now)?;
        self.workload = Some(workload);
        self.answer(Ok(Answer::Ready(Readiness {
            iterations,
            launch_us: calibration.launch_us(iterations),
            buffer_bytes: prepared.buffer_bytes,
            context_bytes: prepared.context_bytes,
            sm_count,
        })));
        Ok(())
    }
}

/// What the types of a setup do not rule out.
fn check_setup(setup: &Setup) -> Result<(), String> {
    if setup.iterations == Some(0) {
        return Err("0 iterations in a launch; at least 1".to_owned());
    }
    if !DEPTH.contains(&setup.depth) {
        return Err(format!(
            "{} launches in flight; {} to {}",
            setup.depth,
            DEPTH.start(),
            DEPTH.end()
        ));
    }
    quota::check(&setup.quota)
}
