//! compute.max of processes that the service did not launch.

use std::time::{Duration, Instant};

use gcgroup_integration_tests::{App, Errno, Instance, Setup, wait};

fn instance() -> Instance {
    Setup::new().attach().start()
}

/// Kernels a second.
fn speed(app: &mut App, lasting: Duration) -> f64 {
    let (before, since) = (app.count().ended, Instant::now());
    std::thread::sleep(lasting);
    (app.count().ended - before) as f64 / since.elapsed().as_secs_f64()
}

#[test]
fn a_run_window_is_a_share_of_the_speed() {
    let instance = instance();
    let mut app = instance.app_on(0, &["--kernel-us", "1000"]);
    instance.wait_for(&app);
    let max = app.file("compute.max");
    for (quota, share) in [("30000 100000", 0.3), ("25000 50000", 0.5)] {
        wait::measured(quota, || {
            instance.set(&max, "max");
            let solo = speed(&mut app, Duration::from_secs(1));
            instance.set(&max, quota);
            let found = speed(&mut app, Duration::from_secs(3)) / solo;
            if (found - share).abs() <= 0.03 {
                return Ok(());
            }
            Err(format!("{found} of its speed alone"))
        });
        assert_eq!(instance.text(&max), quota);
    }
    // The first reading after a while without readers is an older one.
    let stat = || instance.keyed(app.file("gcgroup.stat"));
    wait::until(Duration::from_millis(1500), "its stops are counted", || {
        let stat = stat();
        stat["nr_throttled"] >= 60 && stat["throttled_usec"] >= 2_500_000
    });
    assert_eq!(stat()["nr_freezes"], 0, "a window is no freeze");
    instance.set(&max, "max");
    assert!(app.progresses());
    assert!(instance.runs(app.pid()), "no window is left");
}

#[test]
fn a_freeze_outlasts_the_windows_and_a_thaw_respects_them() {
    let instance = instance();
    let mut app = instance.app_on(0, &["--kernel-us", "1000"]);
    instance.wait_for(&app);
    instance.set(app.file("compute.max"), "20000 100000");
    instance.set(app.file("compute.freeze"), "1");
    assert!(app.stands(), "no window opens a frozen program");
    assert!(app.stands());
    instance.set(app.file("compute.freeze"), "0");
    assert!(app.progresses());
    let solo_is_far = speed(&mut app, Duration::from_secs(1));
    assert!(
        solo_is_far < 500.0,
        "{solo_is_far} kernels a second with a fifth of 1000"
    );
    instance.set(app.file("compute.freeze"), "1");
    instance.set(app.file("compute.max"), "max");
    assert!(app.stands(), "a quota that goes does not thaw");
}

#[test]
fn a_window_is_not_shorter_than_a_stop_is_worth() {
    let instance = instance();
    let app = instance.app();
    let max = app.file("compute.max");
    for (value, errno) in [
        ("5000 10000", Errno::INVAL),
        ("5000 49999", Errno::INVAL),
        ("999 50000", Errno::INVAL),
        ("20000 1000001", Errno::INVAL),
    ] {
        assert_eq!(instance.write(&max, value), Err(errno), "{value}");
    }
    assert_eq!(instance.text(&max), "max 100000");
    instance.set(&max, "5000 50000");
    instance.set(&max, "max 10000");
    assert_eq!(instance.text(&max), "max 10000");
}
