//! compute.freeze, compute.priority, gcgroup.kill and counting.

use std::time::{Duration, Instant};

use gcgroup_device_sim::{Effect, Failure, Operation, Refused, Scope};
use gcgroup_integration_tests::{App, Errno, Instance, Setup, wait};

const SECOND: Duration = Duration::from_secs(1);

fn instance() -> Instance {
    Setup::new().attach().start()
}

/// A program with kernels of 5 ms for most of a minute in flight, so that a busy
/// machine does not keep it from launching in time.
fn never_late(instance: &Instance) -> App {
    let mut app = instance.app_on(0, &["--kernel-us", "5000", "--idle"]);
    instance.wait_for(&app);
    app.tell("graph 10000");
    app
}

fn freeze(instance: &Instance, app: &App, state: &str) {
    instance.set(app.file("compute.freeze"), state);
}

#[test]
fn a_freeze_stops_a_program_in_the_middle_of_its_kernel_and_a_thaw_lets_it_go_on() {
    let instance = instance();
    let mut app = instance.app_on(0, &["--kernel-us", "8000000"]);
    instance.wait_for(&app);
    for round in 1..=3 {
        freeze(&instance, &app, "1");
        let at = instance.contexts(app.pid())[0].units;
        assert!(instance.is_stopped(app.pid()));
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(
            instance.contexts(app.pid())[0].units,
            at,
            "it moved while frozen"
        );
        let stat = instance.keyed(app.file("gcgroup.stat"));
        assert_eq!(stat["nr_freezes"], round);
        wait::until(5 * SECOND, "the time that it was frozen", || {
            instance.figure(app.file("gcgroup.stat"), "frozen_usec") >= 90_000
        });
        freeze(&instance, &app, "1");
        assert_eq!(
            instance.figure(app.file("gcgroup.stat"), "nr_freezes"),
            round
        );
        freeze(&instance, &app, "0");
        freeze(&instance, &app, "0");
        assert!(instance.runs(app.pid()));
    }
    // What a kernel has done shows when it ends.
    let mut short = instance.app();
    assert!(short.progresses());
    freeze(&instance, &short, "1");
    assert!(short.stands());
    freeze(&instance, &short, "0");
    assert!(short.progresses());
    app.kill();
}

#[test]
fn a_frozen_program_leaves_the_gpu_to_others() {
    let instance = instance();
    let hog = never_late(&instance);
    let other = never_late(&instance);
    wait::measured("twice as fast beside a frozen program", || {
        let ended = || instance.contexts(other.pid())[0].complete;
        let speed = || {
            let (before, since) = (ended(), Instant::now());
            std::thread::sleep(SECOND);
            (ended() - before) as f64 / since.elapsed().as_secs_f64()
        };
        let beside = speed();
        freeze(&instance, &hog, "1");
        let alone = speed();
        freeze(&instance, &hog, "0");
        if (alone / beside / 2.0 - 1.0).abs() < 0.2 {
            return Ok(());
        }
        Err(format!("{beside} beside it, {alone} without"))
    });
}

#[test]
fn channel_groups_that_appear_later_get_the_settings_too() {
    let instance = instance();
    let mut app = instance.app();
    instance.set(app.file("compute.priority"), "12");
    freeze(&instance, &app, "1");
    wait::measured("within 200 ms, also while frozen", || {
        app.tell("group");
        let since = Instant::now();
        wait::until(10 * SECOND, "the new group is stopped", || {
            let context = &instance.contexts(app.pid())[0];
            context.timeslice_usec == 524_288 >> 12 && instance.is_stopped(app.pid())
        });
        let took = since.elapsed();
        assert!(app.stands());
        match took {
            took if took <= Duration::from_millis(200) => Ok(()),
            took => Err(format!("{took:?}")),
        }
    });
    freeze(&instance, &app, "0");
    assert!(app.progresses(), "every group runs again");
    app.tell("ungroup");
    freeze(&instance, &app, "1");
    assert!(app.stands(), "a group that is gone is no obstacle");
    freeze(&instance, &app, "0");
    app.tell("open 0");
    wait::until(5 * SECOND, "a new context gets the timeslice", || {
        let contexts = instance.contexts(app.pid());
        contexts
            .iter()
            .all(|context| context.timeslice_usec == 524_288 >> 12)
    });
}

#[test]
fn a_group_far_off_is_found_when_something_shows_that_there_is_more() {
    let instance = instance();
    let mut app = instance.app();
    instance.set(app.file("compute.priority"), "12");
    let groups = || instance.figure(app.file("gcgroup.stat"), "channel_groups");
    assert_eq!(groups(), 1);
    app.tell("group far");
    // A stop that fails shows that what is known does not stand.
    let of = Scope::Process(app.pid());
    let failed = Effect::Fail(Failure::Service(Refused::Failed(
        "a fault of the test".into(),
    )));
    instance.fault_once(Operation::Stop, of, failed);
    freeze(&instance, &app, "1");
    assert!(instance.is_stopped(app.pid()));
    assert_eq!(
        instance.figure(app.file("gcgroup.stat"), "channel_groups"),
        2
    );
    assert!(app.stands());
    freeze(&instance, &app, "0");
    assert!(instance.runs(app.pid()));
    // So does a new context; and everything has the settings then.
    app.tell("group far");
    app.tell("open 0");
    wait::until(5 * SECOND, "all four groups are prioritised", || {
        let contexts = instance.contexts(app.pid());
        let are_timed = contexts
            .iter()
            .all(|context| context.timeslice_usec == 524_288 >> 12);
        let stat = instance.keyed(app.file("gcgroup.stat"));
        are_timed && stat.get("channel_groups") == Some(&4)
    });
    freeze(&instance, &app, "1");
    assert!(instance.is_stopped(app.pid()));
    freeze(&instance, &app, "0");
    assert!(instance.runs(app.pid()));
    assert!(app.progresses());
}

#[test]
fn a_channel_that_appears_inside_a_stopped_group_runs_after_the_thaw() {
    let mut instance = instance();
    let mut app = instance.app();
    for round in 0..20 {
        freeze(&instance, &app, "1");
        app.tell("channel");
        assert!(
            instance.is_stopped(app.pid()),
            "it is stopped with its group"
        );
        freeze(&instance, &app, "0");
        assert!(instance.runs(app.pid()), "round {round}");
    }
    freeze(&instance, &app, "1");
    app.tell("channel");
    instance.kill();
    wait::until(2 * SECOND, "the guardian resumes it too", || {
        instance.runs(app.pid())
    });
    assert!(app.progresses());
}

#[test]
fn groups_that_are_gone_keep_nothing_else_stopped() {
    let instance = instance();
    let mut app = instance.app();
    let of = Scope::Process(app.pid());
    let gone = || {
        Effect::Fail(Failure::Service(Refused::Failed(
            "a channel is gone".into(),
        )))
    };
    for fails in [false, true] {
        app.tell("group");
        freeze(&instance, &app, "1");
        // In the second round so many handles were freed that it takes a look of
        // the keeper to find the group.
        wait::until(5 * SECOND, "the group is stopped", || {
            instance.is_stopped(app.pid())
        });
        app.tell("ungroup");
        if fails {
            instance.fault(Operation::ResumeGone, of, gone());
        }
        freeze(&instance, &app, "0");
        assert!(instance.runs(app.pid()));
        assert!(app.progresses());
        // And those that are known and gone keep nothing from being stopped.
        app.tell("group");
        freeze(&instance, &app, "1");
        freeze(&instance, &app, "0");
        app.tell("ungroup");
        freeze(&instance, &app, "1");
        assert!(instance.is_stopped(app.pid()));
        assert!(app.stands());
        freeze(&instance, &app, "0");
        assert!(instance.runs(app.pid()));
        instance.clear_faults();
    }
}

#[test]
fn priorities_are_timeslices_that_act() {
    let instance = instance();
    let one = never_late(&instance);
    let two = never_late(&instance);
    let slice = |app: &App| instance.figure(app.file("gcgroup.stat"), "timeslice_usec");
    assert_eq!((slice(&one), slice(&two)), (2048, 2048));
    instance.set(one.file("compute.priority"), "4");
    assert_eq!(slice(&one), 32_768);
    instance.set(two.file("compute.priority"), "15");
    assert_eq!(slice(&two), 16);
    instance.set(two.file("compute.priority"), "8");
    wait::measured("16 : 1", || {
        let ended = |app: &App| instance.contexts(app.pid())[0].complete;
        let before = (ended(&one), ended(&two));
        std::thread::sleep(4 * SECOND);
        let (one, two) = (ended(&one) - before.0, ended(&two) - before.1);
        let ratio = one as f64 / two.max(1) as f64;
        if (ratio / 16.0 - 1.0).abs() <= 0.15 {
            return Ok(());
        }
        Err(format!("{one} : {two}"))
    });
    assert_eq!(
        instance.write(one.file("compute.priority"), "16"),
        Err(Errno::INVAL)
    );
    assert_eq!(instance.text(one.file("compute.priority")), "4");
}

#[test]
fn a_kill_is_answered_when_the_process_has_ended_frozen_or_not() {
    let instance = instance();
    for frozen in [false, true] {
        let mut app = instance.app();
        if frozen {
            freeze(&instance, &app, "1");
        }
        instance.set(app.file("gcgroup.kill"), "1");
        assert!(app.has_ended(), "it was answered before its end");
        wait::until(5 * SECOND, "its entry goes", || {
            !instance.has_entry(app.pid())
        });
        wait::until(5 * SECOND, "its memory is free", || {
            instance.contexts(app.pid()).is_empty()
        });
    }
}

#[test]
fn a_process_that_ends_while_frozen_takes_its_entry_along() {
    let instance = instance();
    let mut app = instance.app();
    freeze(&instance, &app, "1");
    app.kill();
    wait::until(5 * SECOND, "its entry goes", || {
        !instance.has_entry(app.pid())
    });
    assert_eq!(instance.text("gcgroup.freeze"), "");
    assert!(instance.contexts(app.pid()).is_empty());
}

#[test]
fn launches_are_counted_since_the_attach() {
    let instance = instance();
    let mut app = instance.app_on(0, &["--idle"]);
    instance.wait_for(&app);
    let stat = |key: &str| instance.keyed(app_stat(&app)).get(key).copied();
    fn app_stat(app: &App) -> String {
        app.file("gcgroup.stat")
    }
    wait::until(5 * SECOND, "it is counted", || {
        stat("nr_submitted_kernels") == Some(0)
    });
    assert_eq!(stat("nr_ended_kernels"), None, "their ends are not seen");
    assert_eq!(stat("nr_pending_kernels"), None);
    assert_eq!(stat("usage_usec"), None);
    app.tell("graph 7");
    let counted = |app: &mut App| {
        let truth = app.count();
        (Some(truth.launched), Some(truth.graphs))
    };
    let truth = counted(&mut app);
    assert_eq!(truth, (Some(7), Some(7)));
    let found = |app: &App| {
        let stat = instance.keyed(app_stat(app));
        (
            stat.get("nr_submitted_kernels").copied(),
            stat.get("nr_graph_launches").copied(),
        )
    };
    wait::until(5 * SECOND, "seven graphs", || found(&app) == truth);
    app.tell("go");
    assert!(app.progresses());
    app.tell("pause");
    let truth = counted(&mut app);
    wait::until(5 * SECOND, "every launch", || found(&app) == truth);
}

#[test]
fn counting_can_be_switched_off() {
    let instance = Setup::new()
        .attach()
        .setting("count_launches", "false")
        .start();
    let app = instance.app();
    // Another program that came later is under control, and a freeze was answered:
    // counting would have begun long before.
    let later = instance.app();
    freeze(&instance, &later, "1");
    let stat = instance.keyed(app.file("gcgroup.stat"));
    assert!(!stat.contains_key("nr_submitted_kernels"), "{stat:?}");
    assert!(stat.contains_key("channel_groups"), "{stat:?}");
}
