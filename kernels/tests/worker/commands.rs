//! Each command in each state, and how a worker ends.

use gcgroup_kernels::engine::{EngineError, Form};
use gcgroup_kernels::protocol::{Answer, Command, GpuAddress, QuotaSetting, Setup};

use crate::rig::{MS, Rig, S, UNBOUNDED, US, placement, quota, setup};
use crate::scripted::Script;

/// A state of a worker, and how it is reached.
const STATES: [&str; 6] = [
    "opened",
    "ready",
    "running",
    "frozen",
    "throttled",
    "spoiled",
];

fn rig_in(state: &str) -> Rig {
    let mut setup = setup(Form::Sliced);
    match state {
        "opened" => Rig::opened(Script::default()),
        "ready" => Rig::ready(Script::default(), setup).0,
        "running" => Rig::started(Script::default(), setup).0,
        "frozen" => {
            let (mut rig, _) = Rig::started(Script::default(), setup);
            rig.pass(3 * MS);
            rig.done(Command::Freeze(true));
            rig
        }
        "throttled" => {
            setup.quota = quota(1_000, 100_000);
            let (mut rig, _) = Rig::started(Script::default(), setup);
            rig.pass(50 * MS);
            rig
        }
        "spoiled" => {
            let mut rig = Rig::opened(Script {
                fails: Some((
                    "prepare",
                    EngineError::NoMemory {
                        requested: 2,
                        free: 1,
                    },
                )),
                ..Script::default()
            });
            let (result, _) = rig.call(Command::Prepare(Box::new(setup)));
            assert!(matches!(result, Err(EngineError::NoMemory { .. })));
            rig
        }
        other => panic!("no such state: {other}"),
    }
}

#[test]
fn each_command_in_each_state_is_answered_as_it_should() {
    type Makes = fn() -> Command;
    // Whether the command succeeds in each of STATES.
    let table: [(Makes, [bool; 6]); 9] = [
        (
            || Command::Open(GpuAddress::Cuda("GPU-0".to_owned())),
            [false; 6],
        ),
        (
            || Command::Prepare(Box::new(setup(Form::Sliced))),
            [true, false, false, false, false, false],
        ),
        (|| Command::Start, [false, true, false, false, false, false]),
        (
            || Command::Freeze(true),
            [false, true, true, true, true, false],
        ),
        (
            || Command::Freeze(false),
            [false, true, true, true, true, false],
        ),
        (
            || Command::Quota(quota(5_000, 50_000)),
            [false, true, true, true, true, false],
        ),
        (
            || Command::Place(placement(0..2)),
            [false, true, true, true, true, false],
        ),
        (|| Command::ReportEvery { ms: 10 }, [true; 6]),
        (|| Command::Verify, [false, true, false, true, false, false]),
    ];
    for (makes, expected) in table {
        for (state, succeeds) in STATES.into_iter().zip(expected) {
            let mut rig = rig_in(state);
            let (result, counters) = rig.call(makes());
            assert_eq!(
                result.is_ok(),
                succeeds,
                "{:?} {state}: {result:?}",
                makes()
            );
            if let Err(error) = result {
                assert!(matches!(error, EngineError::Unsupported(_)), "{error:?}");
            }
            let prepared = !["opened", "spoiled"].contains(&state) || succeeds;
            assert!(
                counters.is_some() == prepared || matches!(makes(), Command::ReportEvery { .. })
            );
            rig.pass(20 * MS);
            assert!(!rig.worker.is_over());
            let (result, _) = rig.call(Command::End);
            assert_eq!(result, Ok(Answer::Done));
            assert!(rig.worker.is_over());
            assert_eq!(rig.gpu.borrow().in_flight(), 0);
        }
    }
}

#[test]
fn a_worker_whose_service_is_gone_ends_from_each_state() {
    for state in STATES {
        let mut rig = rig_in(state);
        rig.worker.close();
        rig.pass(MS);
        assert!(rig.worker.is_over(), "{state}");
        assert_eq!(rig.gpu.borrow().in_flight(), 0, "{state}");
    }
    let mut rig = Rig::opened(Script::default());
    rig.send(Command::Prepare(Box::new(setup(Form::Sliced))));
    rig.worker.close();
    rig.pass(MS);
    assert!(rig.worker.is_over(), "while it calibrates");
    assert_eq!(rig.gpu.borrow().in_flight(), 0);
}

#[test]
fn commands_that_come_during_calibration_wait_for_its_end() {
    let mut rig = Rig::opened(Script::default());
    let prepare = rig.send(Command::Prepare(Box::new(setup(Form::Sliced))));
    let freeze = rig.send(Command::Freeze(true));
    let start = rig.send(Command::Start);
    assert!(rig.reply(freeze).is_none());
    rig.pass(S);
    for id in [prepare, freeze, start] {
        let (result, _) = rig.reply(id).expect("answered");
        assert!(result.is_ok(), "{result:?}");
    }
    assert_eq!(rig.gpu.borrow().in_flight(), 0, "it is frozen");
}

#[test]
fn calibration_makes_a_launch_half_a_millisecond_and_is_not_counted() {
    let script = Script {
        unit_ns: 37,
        units_per_iteration: 3,
        ..Script::default()
    };
    let (mut rig, readiness) = Rig::ready(script, setup(Form::Sliced));
    assert!((readiness.launch_us - 500.0).abs() < 30.0, "{readiness:?}");
    let base = rig.gpu.borrow().total();
    assert!(base > 0);
    let counters = rig.done(Command::Start);
    assert_eq!((counters.iterations, counters.usage_usec), (0, 0));
    let poll_units = rig.gpu.borrow().poll_units;
    assert!((512..=544).contains(&poll_units), "20 us: {poll_units}");
    rig.pass(100 * MS);
    let counters = rig.done(Command::Freeze(true));
    let done = (rig.gpu.borrow().total() - base) / 3;
    assert_eq!(u128::from(counters.iterations), done);
}

#[test]
fn a_setup_that_cannot_be_is_refused_and_another_one_taken() {
    type Spoils = fn(&mut Setup);
    let mut rig = Rig::opened(Script::default());
    let refused: [(&str, Spoils); 4] = [
        ("0 iterations", |setup| setup.iterations = Some(0)),
        ("1 launches in flight", |setup| setup.depth = 1),
        ("a period of 1 us", |setup| {
            setup.quota = quota(1_000, 1);
        }),
        ("a quota of 0 us", |setup| setup.quota = quota(0, 100_000)),
    ];
    for (reason, spoil) in refused {
        let mut setup = setup(Form::Sliced);
        spoil(&mut setup);
        let (result, _) = rig.call(Command::Prepare(Box::new(setup)));
        assert!(
            matches!(&result, Err(EngineError::Unsupported(text)) if text.starts_with(reason)),
            "{reason}: {result:?}"
        );
    }
    let (result, _) = rig.call(Command::Prepare(Box::new(setup(Form::Sliced))));
    assert!(matches!(result, Ok(Answer::Ready(_))), "{result:?}");
    let bad = QuotaSetting {
        quota_usec: Some(999),
        ..UNBOUNDED
    };
    assert!(rig.call(Command::Quota(bad)).0.is_err());
    assert!(rig.call(Command::ReportEvery { ms: 0 }).0.is_err());
}

#[test]
fn a_move_is_in_force_when_it_is_answered_and_the_work_goes_on_there() {
    let (mut rig, readiness) = Rig::started(Script::default(), setup(Form::Sliced));
    rig.pass(10 * MS);
    let began = rig.now();
    let (result, counters) = rig.call(Command::Place(placement(0..8)));
    assert_eq!(result, Ok(Answer::Placed { sm_count: 64 }));
    assert!(rig.now() - began < 60 * US);
    assert_eq!(counters.map(|counters| counters.sm_count), Some(64));
    rig.pass(20 * MS);
    rig.done(Command::Freeze(true));
    let last = rig.samples.last().expect("launches ended");
    assert_eq!(last.sm_count, 64);
    let slower = last.device_us / readiness.launch_us;
    assert!((slower - 132.0 / 64.0).abs() < 0.05, "{slower}");
}

#[test]
fn a_move_that_fails_leaves_it_where_it_was() {
    let (mut rig, _) = Rig::started(Script::default(), setup(Form::Sliced));
    rig.pass(10 * MS);
    let reason = EngineError::Unsupported("no green contexts".to_owned());
    rig.gpu.borrow_mut().script.fails = Some(("place", reason.clone()));
    let (result, before) = rig.call(Command::Place(placement(0..8)));
    assert_eq!(result, Err(reason));
    rig.pass(10 * MS);
    let after = rig.done(Command::Freeze(true));
    assert_eq!(after.sm_count, 132);
    assert!(
        after.ended > before.expect("prepared").ended + 15,
        "it goes on"
    );
    assert_eq!(rig.gpu.borrow().placements.len(), 1);
}

#[test]
fn a_workload_ends_when_its_duration_is_over_even_frozen() {
    for freeze in [false, true] {
        let mut setup = setup(Form::Sliced);
        setup.duration_ms = Some(500);
        let (mut rig, _) = Rig::started(Script::default(), setup);
        rig.pass(100 * MS);
        if freeze {
            rig.done(Command::Freeze(true));
        }
        rig.pass(399 * MS);
        assert!(!rig.worker.is_over());
        rig.pass(2 * MS);
        assert!(rig.worker.is_over());
        assert_eq!(rig.ending, Some(None));
        let last = rig.reports.last().expect("a last report");
        assert_eq!(last.frozen, freeze);
        assert!(last.ended > if freeze { 190 } else { 900 });
        assert_eq!(rig.gpu.borrow().in_flight(), 0);
    }
}

#[test]
fn an_end_stops_the_gpu_and_reports_the_last_launches_first() {
    let (mut rig, _) = Rig::started(Script::default(), setup(Form::Sliced));
    rig.pass(20 * MS);
    let counters = rig.done(Command::End);
    assert!(rig.worker.is_over());
    assert_eq!(rig.ending, None);
    assert_eq!(rig.samples.len() as u64, counters.ended);
    let (result, _) = rig.call(Command::Start);
    assert!(matches!(result, Err(EngineError::Ended)));
}

#[test]
fn a_gpu_that_fails_ends_the_worker_and_answers_who_waits() {
    let calls: [(&str, Command); 7] = [
        ("submit", Command::Prepare(Box::new(setup(Form::Sliced)))),
        ("place", Command::Prepare(Box::new(setup(Form::Sliced)))),
        ("submit", Command::Start),
        ("raise_stop", Command::Freeze(true)),
        ("progress", Command::Freeze(true)),
        ("lower_stop", Command::Freeze(false)),
        ("verify", Command::Verify),
    ];
    for (call, command) in calls {
        let mut rig = rig_in(match command {
            Command::Prepare(_) => "opened",
            Command::Start => "ready",
            Command::Freeze(true) => "running",
            _ => "frozen",
        });
        let error = EngineError::Failed(format!("{call} failed"));
        rig.gpu.borrow_mut().script.fails = Some((call, error.clone()));
        let (result, _) = rig.call(command);
        assert_eq!(result, Err(error.clone()), "{call}");
        assert!(rig.worker.is_over(), "{call}");
        assert_eq!(rig.ending, Some(Some(error.clone())));
        assert_eq!(rig.worker.failure(), Some(&error));
    }
    let mut rig = rig_in("running");
    let error = EngineError::Failed("an illegal address".to_owned());
    rig.gpu.borrow_mut().script.fails = Some(("poll", error.clone()));
    rig.pass(MS);
    assert_eq!(rig.ending, Some(Some(error)), "on its own account");
}

#[test]
fn reports_come_as_often_as_asked() {
    let (mut rig, _) = Rig::started(Script::default(), setup(Form::Sliced));
    rig.pass(2_500 * MS);
    assert_eq!(rig.reports.len(), 2, "each second by default");
    rig.done(Command::ReportEvery { ms: 10 });
    rig.pass(1_005 * MS);
    assert_eq!(rig.reports.len(), 102);
    let ended: Vec<_> = rig.reports.iter().map(|counters| counters.ended).collect();
    assert!(ended.is_sorted_by(|a, b| a < b));
}
