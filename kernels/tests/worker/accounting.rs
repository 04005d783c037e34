//! Whatever is asked in whatever order, no iteration is lost or done twice and
//! no launch ends that should not.

use gcgroup_kernels::engine::Form;
use gcgroup_kernels::protocol::{Command, Counters};
use proptest::prelude::*;

use crate::rig::{MS, Rig, UNBOUNDED, US, placement, quota, setup};
use crate::scripted::Script;

#[derive(Clone, Debug)]
enum Act {
    Pass(u64),
    Ask(Command),
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        4 => any::<bool>().prop_map(|state| Act::Ask(Command::Freeze(state))),
        2 => (1_000u64..50_000, 10_000u64..100_000).prop_map(|(most, period)| {
            Act::Ask(Command::Quota(quota(most, period)))
        }),
        1 => Just(Act::Ask(Command::Quota(UNBOUNDED))),
        2 => (1u32..=16).prop_map(|groups| Act::Ask(Command::Place(placement(0..groups)))),
        6 => (0u64..20 * MS).prop_map(Act::Pass),
        2 => (0u64..200 * US).prop_map(Act::Pass),
        1 => (1u64..50).prop_map(|ms| Act::Ask(Command::ReportEvery { ms })),
        1 => Just(Act::Ask(Command::Verify)),
    ]
}

fn script() -> impl Strategy<Value = Script> {
    (1u64..3_000, 1u64..20, 0u64..100_000, 0u64..80_000).prop_map(
        |(unit_ns, units_per_iteration, skew_ns, stop_ns)| Script {
            unit_ns,
            units_per_iteration,
            skew_ns,
            stop_ns,
            ..Script::default()
        },
    )
}

/// What must hold between two looks at the counters of one workload.
fn grew(before: &Counters, after: &Counters) -> bool {
    before.submitted <= after.submitted
        && before.ended <= after.ended
        && before.iterations <= after.iterations
        && before.usage_usec <= after.usage_usec
        && before.throttled_usec <= after.throttled_usec
        && before.frozen_usec <= after.frozen_usec
        && before.nr_freezes <= after.nr_freezes
        && before.nr_throttled <= after.nr_throttled
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn iterations_are_neither_lost_nor_repeated(
        script in script(),
        acts in prop::collection::vec(act(), 1..60),
        uncut in any::<bool>(),
        depth in 2u32..=8,
        iterations in prop::option::of(1u64..5_000),
        late_ns in 0u64..100_000,
    ) {
        let mut setup = setup(if uncut { Form::Uncut } else { Form::Sliced });
        setup.depth = depth;
        setup.iterations = iterations;
        let units = script.units_per_iteration;
        let (mut rig, readiness) = Rig::ready(script, setup);
        rig.late_ns = late_ns;
        let base = rig.gpu.borrow().cursors[0];
        let calibrated = rig.gpu.borrow().total();
        let calibration_ns = rig.gpu.borrow().busy_ns;
        let began = rig.now();
        let per_launch = readiness.iterations * units;
        let mut last = rig.done(Command::Start);
        let mut frozen = false;
        for act in acts {
            let command = match act {
                Act::Pass(ns) => {
                    rig.pass(ns);
                    continue;
                }
                Act::Ask(command) => command,
            };
            if let Command::Freeze(state) = command {
                frozen = state;
            }
            let verify = command == Command::Verify;
            let (result, counters) = rig.call(command);
            prop_assert_eq!(result.is_ok(), !verify || frozen);
            let now = counters.expect("it is prepared");
            prop_assert!(grew(&last, &now), "{:?} then {:?}", last, now);
            prop_assert_eq!(now.frozen, frozen);
            prop_assert!(now.submitted - now.ended <= u64::from(depth));
            if last.frozen && now.frozen {
                prop_assert_eq!((last.ended, last.iterations), (now.ended, now.iterations));
            }
            last = now;
            if frozen {
                let gpu = rig.gpu.borrow();
                prop_assert_eq!(gpu.in_flight(), 0);
                let done = (gpu.total() - calibrated) / u128::from(units);
                prop_assert_eq!(u128::from(now.iterations), done);
                let least = gpu.cursors.iter().copied().min().unwrap_or(0);
                prop_assert_eq!(now.ended, (least - base) / per_launch);
                prop_assert_eq!(now.usage_usec, (gpu.busy_ns - calibration_ns) / 1000);
            }
            let elapsed = (rig.now() - began) / 1000;
            prop_assert!(now.usage_usec + now.throttled_usec + now.frozen_usec <= elapsed + 1);
        }
        let ended = rig.done(Command::End);
        prop_assert!(rig.worker.is_over());
        let in_flight = if uncut { 1 } else { depth as usize };
        prop_assert!(rig.gpu.borrow().most_in_flight <= in_flight);
        let total = rig.gpu.borrow().total();
        let done = (total - calibrated) / u128::from(units);
        prop_assert_eq!(u128::from(ended.iterations), done);
        // One report holds the newest 1024 only, so there may be gaps.
        prop_assert!(rig.samples.is_sorted_by(|a, b| a.seq < b.seq));
        let newest = rig.samples.last().map(|sample| sample.seq + 1);
        prop_assert!(ended.ended == 0 || newest == Some(ended.ended));
    }
}

#[test]
fn device_time_adds_up_to_the_elapsed_time_while_it_runs() {
    let (mut rig, _) = Rig::started(Script::default(), setup(Form::Sliced));
    let began = rig.now();
    rig.pass(1_000 * MS);
    let counters = rig.done(Command::Freeze(true));
    let elapsed = (rig.now() - began) / 1000;
    assert!(elapsed - counters.usage_usec < 100, "{counters:?}");
    assert_eq!(rig.samples.len(), 1024, "the newest ones only");
}

#[test]
fn a_sample_starts_where_the_one_before_it_ended() {
    let (mut rig, readiness) = Rig::started(Script::default(), setup(Form::Sliced));
    // The worker's thread is away for two launches at a time.
    rig.late_ns = 1_100 * US;
    rig.pass(50 * MS);
    rig.done(Command::Freeze(true));
    assert!(rig.samples.len() > 90);
    for pair in rig.samples.windows(2) {
        let end = pair[0].start_ns + (pair[0].device_us * 1000.0) as u64;
        assert!(end.abs_diff(pair[1].start_ns) < 2 * US, "{pair:?}");
        assert_eq!(pair[1].seq, pair[0].seq + 1);
        assert!((pair[1].device_us - readiness.launch_us).abs() < 1.0);
        assert!(pair[1].wall_us >= pair[1].device_us);
    }
}
