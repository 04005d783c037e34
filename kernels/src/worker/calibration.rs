//! How many iterations make a launch of about [`LAUNCH_US`], and how many units
//! a kernel may do between two looks at the stop flag.
//!
//! Launches of 1, 2, 4 ... iterations run one at a time until one lasts long
//! enough to be measured; then the number is scaled and measured again until it
//! no longer changes much, because a GPU that was idle raises its clock
//! meanwhile. What calibration does is not counted.

use crate::engine::Plan;

use super::{LAUNCH_US, POLL_UNITS_STEP, POLL_US};

/// Shortest launch that is measured, microseconds: 40 times a launch's own
/// cost.
const MEASURABLE_US: f64 = 200.0;
/// Launches of one size that are measured; their median counts.
const MEASURED: usize = 3;
/// How often the number of iterations is corrected, at most.
const ROUNDS: u32 = 5;
/// When no further launch is submitted whatever was found, nanoseconds. Only
/// beside others that leave this workload little of the GPU.
const TIME_NS: u64 = 700_000_000;
/// Most units of a launch that calibration chooses by itself; a unit of less
/// than a nanosecond does not exist.
const UNITS_MAX: u64 = 1 << 40;
/// Threads that are resident on an SM at a time (compute capability 8.0 and
/// 9.0; others have fewer).
const SM_THREADS: u32 = 2048;
/// Blocks that are resident on an SM at a time (the same).
const SM_BLOCKS: u32 = 32;

/// What comes after a launch of the calibration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// A launch to [`Calibration::target`].
    Again,
    /// So many iterations.
    Done { iterations: u64 },
}

/// A calibration under way.
#[derive(Debug)]
pub(super) struct Calibration {
    given: Option<u64>,
    units_per_iteration: u64,
    most: u64,
    /// How often each SM is filled with blocks in one launch: a block's own
    /// unit is that much shorter than the launch's time for one.
    waves: f64,
    began: u64,
    growing: bool,
    iterations: u64,
    target: u64,
    measured: Vec<f64>,
    iteration_us: Option<f64>,
    rounds: u32,
}

impl Calibration {
    /// Begins with one iteration; `given` are those that a launch shall have.
    ///
    /// # Errors
    /// What is wrong with the number given.
    pub(super) fn new(
        given: Option<u64>,
        units_per_iteration: u64,
        plan: &Plan,
        sm_count: u32,
        now: u64,
    ) -> Result<Self, String> {
        let units_per_iteration = units_per_iteration.max(1);
        // Half of the units that a cursor can count: calibration adds to them.
        let possible = (u64::MAX / 2) / units_per_iteration;
        if let Some(given) = given
            && given > possible
        {
            return Err(format!(
                "{given} iterations in a launch; at most {possible}"
            ));
        }
        let most = (UNITS_MAX / units_per_iteration).max(1);
        let resident = (SM_THREADS / plan.threads.max(1)).clamp(1, SM_BLOCKS) * sm_count.max(1);
        Ok(Self {
            given,
            units_per_iteration,
            most: given.unwrap_or(most).min(most),
            waves: f64::from(plan.blocks.div_ceil(resident)).max(1.0),
            began: now,
            growing: true,
            iterations: 1,
            target: units_per_iteration,
            measured: Vec::with_capacity(MEASURED),
            iteration_us: None,
            rounds: 0,
        })
    }

    /// Units that the launch under way goes to.
    pub(super) fn target(&self) -> u64 {
        self.target
    }

    /// Units between two looks at the stop flag; all that there are while
    /// nothing is known yet, so that looking does not spoil the measurement.
    pub(super) fn poll_units(&self) -> u32 {
        let Some(iteration_us) = self.iteration_us else {
            return u32::MAX;
        };
        let unit_us = iteration_us / self.units_per_iteration as f64 / self.waves;
        // The cast saturates.
        let units = ((POLL_US / unit_us) as u32).max(1);
        if units > POLL_UNITS_STEP {
            units / POLL_UNITS_STEP * POLL_UNITS_STEP
        } else {
            units
        }
    }

    /// Device time of a launch of so many iterations, microseconds.
    pub(super) fn launch_us(&self, iterations: u64) -> f64 {
        self.iteration_us.unwrap_or_default() * iterations as f64
    }

    /// Takes the device time of the launch that was under way.
    pub(super) fn record(&mut self, device_us: f64, now: u64) -> Step {
        // A clock that did not move is a very short time, not a division by 0.
        self.measured.push(device_us.max(1e-3));
        let late = now.saturating_sub(self.began) >= TIME_NS;
        let least = self.measured.iter().copied().fold(f64::INFINITY, f64::min);
        if self.growing && least < MEASURABLE_US && self.iterations < self.most && !late {
            // One that others delayed is long too, so the shortest decides.
            let doubled = self.iterations.saturating_mul(2).min(self.most);
            return self.again(doubled);
        }
        if self.measured.len() < MEASURED && !late {
            return self.same();
        }
        self.growing = false;
        self.rounds += 1;
        let iteration_us = median(&mut self.measured) / self.iterations as f64;
        self.iteration_us = Some(iteration_us);
        if let Some(iterations) = self.given {
            return Step::Done { iterations };
        }
        let wanted = ((LAUNCH_US / iteration_us).round() as u64).clamp(1, self.most);
        let close = wanted.abs_diff(self.iterations) <= self.iterations / 10;
        if close || late || self.rounds >= ROUNDS {
            return Step::Done { iterations: wanted };
        }
        self.again(wanted)
    }

    fn again(&mut self, iterations: u64) -> Step {
        self.iterations = iterations;
        self.measured.clear();
        self.same()
    }

    fn same(&mut self) -> Step {
        self.target += self.iterations * self.units_per_iteration;
        Step::Again
    }
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Form;

    fn plan(blocks: u32) -> Plan {
        Plan {
            kernel: "fma_fp32".to_owned(),
            ilp: 4,
            blocks,
            threads: 1024,
            bytes: 0,
            form: Form::Sliced,
        }
    }

    /// Calibrates on a device that takes `overhead + iterations * us` and is
    /// delayed by `delay(n)` in the n-th launch. Returns the iterations, the
    /// calibration and the time it took in nanoseconds.
    fn calibrate(
        given: Option<u64>,
        units: u64,
        us: f64,
        delay: impl Fn(u64) -> f64,
    ) -> (u64, Calibration, u64) {
        let mut calibration =
            Calibration::new(given, units, &plan(132), 132, 0).expect("the number is possible");
        let (mut now, mut done) = (0, 0);
        for n in 0..1000 {
            let iterations = (calibration.target() - done) / units;
            done = calibration.target();
            let device_us = 3.0 + iterations as f64 * us + delay(n);
            now += (device_us * 1000.0) as u64 + 20_000;
            if let Step::Done { iterations } = calibration.record(device_us, now) {
                return (iterations, calibration, now);
            }
        }
        panic!("calibration did not end");
    }

    #[test]
    fn a_launch_lasts_about_half_a_millisecond() {
        for us in [0.0005, 0.036, 1.0, 77.0, 240.0] {
            let (iterations, calibration, took) = calibrate(None, 1, us, |_| 0.0);
            let launch = 3.0 + iterations as f64 * us;
            assert!((launch - 500.0).abs() < 125.0, "{us}: {launch} us");
            assert!((calibration.launch_us(iterations) - launch).abs() < 0.02 * launch);
            assert!(took < 20_000_000, "{us}: {took} ns");
        }
    }

    #[test]
    fn an_iteration_that_is_longer_is_a_launch() {
        let (iterations, calibration, _) = calibrate(None, 4096, 30_000.0, |_| 0.0);
        assert_eq!(iterations, 1);
        assert_eq!(calibration.poll_units(), 2, "a unit takes 7 us");
        let (_, calibration, _) = calibrate(None, 1, 30.0, |_| 0.0);
        assert_eq!(calibration.poll_units(), 1, "a unit takes longer");
    }

    #[test]
    fn the_flag_is_looked_at_every_few_microseconds_by_each_block() {
        let (_, calibration, _) = calibrate(None, 1, 0.036, |_| 0.0);
        // 20 us are 555 units, and whole unrolled loops are fewer.
        assert_eq!(calibration.poll_units(), 544);
        let mut twice = Calibration::new(None, 1, &plan(528), 132, 0).expect("possible");
        twice.iteration_us = Some(0.036);
        assert_eq!(twice.poll_units(), 1088);
    }

    #[test]
    fn a_number_that_was_given_is_kept_and_its_time_estimated() {
        let (iterations, calibration, took) = calibrate(Some(1_000_000_000), 1, 0.1, |_| 0.0);
        assert_eq!(iterations, 1_000_000_000);
        assert!((calibration.launch_us(iterations) - 1e8).abs() < 3e6);
        assert!(took < 20_000_000, "the launch itself lasts 100 s");
        let (iterations, ..) = calibrate(Some(3), 1, 0.1, |_| 0.0);
        assert_eq!(iterations, 3);
        assert!(Calibration::new(Some(u64::MAX), 2, &plan(1), 132, 0).is_err());
    }

    #[test]
    fn launches_that_others_delay_neither_mislead_it_nor_keep_it() {
        let (iterations, ..) = calibrate(None, 1, 1.0, |n| if n % 3 == 0 { 4000.0 } else { 0.0 });
        assert!((400..=600).contains(&iterations), "{iterations}");
        let (_, _, took) = calibrate(None, 1, 1.0, |_| 200_000.0);
        assert!(took < 1_000_000_000, "{took} ns");
    }

    #[test]
    fn a_clock_that_stands_still_ends_it_too() {
        let mut calibration = Calibration::new(None, 1, &plan(132), 132, 0).expect("possible");
        let ended = (0..1000).any(|_| calibration.record(0.0, 0) != Step::Again);
        assert!(ended);
        assert!(calibration.poll_units() >= 1);
    }
}
