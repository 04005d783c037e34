//! compute.max: GPU time in each period, and on the average.

use gcgroup_kernels::engine::Form;
use gcgroup_kernels::protocol::Command;
use proptest::prelude::*;

use crate::rig::{MS, Rig, S, UNBOUNDED, US, quota, setup};
use crate::scripted::Script;

#[test]
fn a_fifth_of_each_period_is_a_fifth_of_the_time() {
    let mut setup = setup(Form::Sliced);
    setup.quota = quota(20_000, 100_000);
    let (mut rig, _) = Rig::started(Script::default(), setup);
    rig.late_ns = 60 * US;
    rig.done(Command::ReportEvery { ms: 10 });
    let began = rig.now();
    rig.pass(10 * S);
    let counters = rig.done(Command::Freeze(true));
    let elapsed = (rig.now() - began) / 1000;
    let share = counters.usage_usec as f64 / elapsed as f64;
    assert!((share - 0.2).abs() < 0.002, "{share}");
    assert!((99..=101).contains(&counters.nr_throttled));
    let accounted = counters.usage_usec + counters.throttled_usec;
    assert!(
        elapsed - accounted < elapsed / 100,
        "{accounted} of {elapsed}"
    );
    assert!(rig.gpu.borrow().stops <= 102, "one stop a period");
    assert!(rig.reports.len() > 980, "throttled workloads report");
}

#[test]
fn an_uncut_kernel_works_off_what_it_took_too_much() {
    for iterations in [30_000, 1_000_000, 3_500_000] {
        let mut setup = setup(Form::Uncut);
        setup.iterations = Some(iterations);
        setup.quota = quota(20_000, 100_000);
        let (mut rig, _) = Rig::started(Script::default(), setup);
        let began = rig.now();
        rig.pass(60 * S);
        let counters = rig.done(Command::Freeze(true));
        let share = counters.usage_usec as f64 / ((rig.now() - began) / 1000) as f64;
        assert!((share - 0.2).abs() < 0.01, "{iterations}: {share}");
    }
}

#[test]
fn a_change_is_in_force_at_once() {
    let (mut rig, _) = Rig::started(Script::default(), setup(Form::Sliced));
    rig.pass(500 * MS);
    let free = rig.done(Command::Quota(quota(1_000, 1_000_000)));
    assert_eq!(free.throttled_usec, 0);
    rig.pass(500 * MS);
    let bound = rig.done(Command::Quota(UNBOUNDED));
    let used = bound.usage_usec - free.usage_usec;
    assert!(used < 2_000, "{used} us of 1000");
    assert!(bound.throttled_usec > 497_000);
    rig.pass(500 * MS);
    let again = rig.done(Command::Freeze(true));
    assert!(again.usage_usec - bound.usage_usec > 490_000);
    assert_eq!(again.nr_throttled, 1);
}

#[test]
fn a_quota_that_goes_while_the_gpu_still_stops_lets_it_run_again() {
    let script = Script {
        stop_ns: 5 * MS,
        ..Script::default()
    };
    let mut setup = setup(Form::Sliced);
    setup.quota = quota(20_000, 100_000);
    let (mut rig, _) = Rig::started(script, setup);
    rig.pass(20 * MS + 500 * US);
    assert_eq!(rig.gpu.borrow().stops, 1);
    assert!(rig.gpu.borrow().in_flight() > 0, "it stops");
    rig.done(Command::Quota(UNBOUNDED));
    rig.pass(100 * MS);
    let counters = rig.done(Command::Freeze(true));
    assert!(counters.usage_usec > 118_000, "{counters:?}");
    assert_eq!(counters.nr_throttled, 0);
}

#[test]
fn frozen_time_is_not_throttled_time() {
    let mut setup = setup(Form::Sliced);
    setup.quota = quota(20_000, 100_000);
    let (mut rig, _) = Rig::started(Script::default(), setup);
    rig.pass(50 * MS);
    let frozen = rig.done(Command::Freeze(true));
    assert!(frozen.throttled_usec.abs_diff(30_000) < 200);
    rig.pass(S);
    let thawed = rig.done(Command::Freeze(false));
    assert_eq!(thawed.throttled_usec, frozen.throttled_usec);
    assert_eq!(thawed.nr_throttled, 1);
    rig.pass(15 * MS);
    let later = rig.done(Command::Freeze(true));
    assert!(
        later.usage_usec - thawed.usage_usec > 14_000,
        "a new period"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever the figures, the long-run average is the quota, and there is at
    /// most one stop a period.
    #[test]
    fn the_average_is_the_quota(
        period_usec in 10_000u64..=200_000,
        share in 0.1f64..0.9,
        unit_ns in 1u64..2_000,
        stop_ns in 0u64..80_000,
        late_ns in 0u64..100_000,
        skew_ns in 0u64..2_000,
        uncut in any::<bool>(),
        depth in 2u32..=64,
    ) {
        let quota_usec = ((period_usec as f64 * share) as u64).max(1_000);
        let mut setup = setup(if uncut { Form::Uncut } else { Form::Sliced });
        setup.quota = quota(quota_usec, period_usec);
        setup.depth = depth;
        let script = Script { unit_ns, stop_ns, skew_ns, ..Script::default() };
        let (mut rig, readiness) = Rig::started(script, setup);
        rig.late_ns = late_ns;
        let began = rig.now();
        let periods = 100;
        rig.pass(periods * period_usec * US);
        let stops = rig.gpu.borrow().stops;
        let counters = rig.done(Command::Freeze(true));
        prop_assert!(stops <= periods + 1, "{} stops in {} periods", stops, periods);
        let elapsed = (rig.now() - began) as f64 / 1000.0;
        let used = counters.usage_usec as f64;
        let allowed = elapsed * quota_usec as f64 / period_usec as f64;
        // The last period may be used up at its start, and a debt be open.
        let open = quota_usec as f64 + readiness.launch_us + 500.0;
        prop_assert!(used <= allowed + open, "{} us of {} us", used, allowed);
        // An uncut kernel idles between launches, so it may not get there.
        let reachable = if uncut { 0.9 } else { 1.0 };
        if share < reachable - 0.25 {
            prop_assert!(used >= allowed * 0.99 - open, "{} us of {} us", used, allowed);
        }
    }
}
