//! What a freeze does to launches, sliced and uncut.

use gcgroup_kernels::engine::{EngineError, Form};
use gcgroup_kernels::protocol::Command;

use crate::rig::{MS, Rig, S, US, placement, setup};
use crate::scripted::Script;

#[test]
fn a_freeze_is_answered_as_soon_as_the_blocks_have_left() {
    let (mut rig, _) = Rig::started(Script::default(), setup(Form::Sliced));
    for _ in 0..100 {
        rig.pass(1_234_567);
        let began = rig.now();
        let counters = rig.done(Command::Freeze(true));
        let took = rig.now() - began;
        assert!(
            took <= 45 * US,
            "{took} ns; the flag takes 20 us, a look 10"
        );
        assert!(counters.frozen);
        rig.done(Command::Freeze(false));
    }
}

#[test]
fn launches_that_were_cut_short_stay_pending_and_go_on() {
    let (mut rig, readiness) = Rig::started(Script::default(), setup(Form::Sliced));
    let base = rig.gpu.borrow().cursors[0];
    rig.pass(10 * MS + 217 * US);
    let frozen = rig.done(Command::Freeze(true));
    assert_eq!(frozen.submitted - frozen.ended, 4);
    assert!(frozen.iterations > frozen.ended * readiness.iterations * 4);
    let total = rig.gpu.borrow().total() - u128::from(base) * 4;
    assert_eq!(u128::from(frozen.iterations), total);

    rig.pass(S);
    let thaw = rig.now();
    let thawed = rig.done(Command::Freeze(false));
    assert_eq!(
        (thawed.submitted, thawed.ended, thawed.iterations),
        (frozen.submitted, frozen.ended, frozen.iterations)
    );
    assert!(thawed.frozen_usec.abs_diff(1_000_000) < 100);
    rig.pass(5 * MS);
    let later = rig.done(Command::Freeze(true));
    assert!(later.ended > frozen.ended + 8);
    assert_eq!(later.submitted - later.ended, 4);
    let seqs: Vec<_> = rig.samples.iter().map(|sample| sample.seq).collect();
    let expected: Vec<_> = (0..later.ended).collect();
    assert_eq!(seqs, expected, "each launch has one sample");
    for sample in &rig.samples {
        let begun_before = sample.seq <= frozen.ended;
        assert_eq!(sample.start_ns < thaw, begun_before, "{sample:?}");
    }
    for sample in &rig.samples {
        assert!(
            (sample.device_us - readiness.launch_us).abs() < 15.0,
            "{sample:?}"
        );
    }
}

#[test]
fn a_launch_that_a_stop_found_complete_has_ended() {
    // Blocks of one launch end 200 us apart, so that many stops find some of
    // them beyond a launch's end.
    let script = Script {
        skew_ns: 200 * US,
        ..Script::default()
    };
    let (mut rig, readiness) = Rig::started(script, setup(Form::Sliced));
    let base = rig.gpu.borrow().cursors[0];
    let mut complete = 0;
    for round in 0..200 {
        rig.pass(700 * US + round * 13 * US);
        let counters = rig.done(Command::Freeze(true));
        let least = rig.gpu.borrow().cursors.iter().copied().min().unwrap_or(0);
        assert_eq!(counters.ended, (least - base) / readiness.iterations);
        complete += u64::from((least - base) % readiness.iterations == 0);
        rig.done(Command::Freeze(false));
    }
    assert!(complete > 0, "none of the stops met the case");
}

#[test]
fn nothing_is_submitted_or_ends_while_frozen() {
    let (mut rig, _) = Rig::started(Script::default(), setup(Form::Sliced));
    rig.pass(20 * MS);
    let frozen = rig.done(Command::Freeze(true));
    let cursors = rig.gpu.borrow().cursors.clone();
    rig.done(Command::Place(placement(0..4)));
    rig.pass(3 * S);
    let same = rig.done(Command::Freeze(true));
    assert_eq!(rig.gpu.borrow().cursors, cursors);
    assert_eq!(rig.gpu.borrow().in_flight(), 0);
    assert_eq!(
        (same.ended, same.iterations),
        (frozen.ended, frozen.iterations)
    );
    assert_eq!((same.nr_freezes, same.sm_count), (1, 32));
    assert_eq!(
        rig.reports.len(),
        1,
        "one report tells of the last launches"
    );
    assert!(rig.worker.next_deadline().is_none(), "it sleeps");
}

#[test]
fn a_workload_frozen_before_its_start_begins_with_the_thaw() {
    let (mut rig, _) = Rig::ready(Script::default(), setup(Form::Sliced));
    assert!(rig.done(Command::Freeze(true)).frozen);
    rig.done(Command::Start);
    rig.pass(S);
    assert_eq!(rig.gpu.borrow().in_flight(), 0);
    let counters = rig.done(Command::Freeze(false));
    assert_eq!((counters.submitted, counters.iterations), (4, 0));
    assert!(counters.frozen_usec.abs_diff(1_000_000) < 100);
    rig.pass(100 * MS);
    assert!(rig.done(Command::Freeze(true)).ended > 150);
}

#[test]
fn an_uncut_launch_ends_before_its_freeze_is_answered() {
    let mut setup = setup(Form::Uncut);
    setup.iterations = Some(1_000_000);
    let (mut rig, _) = Rig::started(Script::default(), setup);
    rig.pass(30 * MS);
    let began = rig.now();
    let freeze = rig.send(Command::Freeze(true));
    let thaw = rig.send(Command::Freeze(false));
    assert!(rig.reply(freeze).is_none());
    rig.pass(60 * MS);
    assert!(rig.reply(freeze).is_none());
    let again = rig.done(Command::Freeze(true));
    let took = rig.now() - began;
    assert!(
        took > 70 * MS && took < 180 * MS,
        "{took}: the next one ran too"
    );
    let (_, first) = rig.reply(freeze).expect("answered in order");
    assert!(rig.reply(thaw).is_some());
    assert_eq!(first.map(|counters| counters.ended), Some(1));
    assert_eq!((again.ended, again.submitted), (2, 2));
    assert_eq!(rig.gpu.borrow().most_in_flight, 1);
    assert_eq!(rig.gpu.borrow().stops, 0);
}

#[test]
fn cursors_that_no_block_can_have_are_a_failure() {
    let (mut rig, _) = Rig::started(Script::default(), setup(Form::Sliced));
    rig.pass(10 * MS);
    rig.gpu.borrow_mut().script.lies = 1 << 40;
    let id = rig.send(Command::Freeze(true));
    let behind = rig.send(Command::Freeze(false));
    let (result, _) = rig.reply(id).expect("answered");
    assert!(
        matches!(&result, Err(EngineError::Failed(text)) if text.starts_with("4 blocks did 10")),
        "{result:?}"
    );
    assert!(rig.worker.is_over());
    assert_eq!(rig.ending.clone(), Some(result.err()));
    let (result, _) = rig.reply(behind).expect("answered");
    assert!(matches!(result, Err(EngineError::Ended)));
}

#[test]
fn a_hanging_gpu_loses_no_command() {
    let (mut rig, _) = Rig::started(Script::default(), setup(Form::Sliced));
    rig.pass(10 * MS);
    rig.gpu.borrow_mut().script.hangs = true;
    let ids = [
        rig.send(Command::Freeze(true)),
        rig.send(Command::Verify),
        rig.send(Command::Freeze(false)),
        rig.send(Command::End),
    ];
    rig.pass(10 * S);
    assert!(ids.iter().all(|&id| rig.reply(id).is_none()));
    rig.gpu.borrow_mut().script.hangs = false;
    rig.pass(10 * MS);
    for id in ids {
        let (result, _) = rig.reply(id).expect("answered once it goes on");
        assert!(result.is_ok(), "{result:?}");
    }
    assert!(rig.worker.is_over());
}
