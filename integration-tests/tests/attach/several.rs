//! gcgroup.freeze for processes of others: several in one step, all or none.

use std::time::Duration;

use gcgroup_device_sim::{Effect, Failure, Operation, Refused, Scope};
use gcgroup_integration_tests::{App, Errno, Instance, Setup, wait};

fn apps(instance: &Instance, count: usize) -> Vec<App> {
    let apps: Vec<_> = (0..count).map(|_| instance.app_on(0, &[])).collect();
    apps.iter().for_each(|app| instance.wait_for(app));
    apps
}

fn all(state: u8, apps: &[App]) -> String {
    let pids: Vec<_> = apps.iter().map(|app| app.pid().to_string()).collect();
    format!("{state} {}", pids.join(" "))
}

#[test]
fn several_programs_and_workloads_freeze_in_one_write() {
    let instance = Setup::new().attach().start();
    let workload = instance.launch_fma();
    let apps = apps(&instance, 4);
    let order = format!("{} {}", all(1, &apps), workload.pid);
    instance.set("gcgroup.freeze", &order);
    assert!(apps.iter().all(|app| instance.is_stopped(app.pid())));
    assert_eq!(instance.text(workload.file("compute.freeze")), "1");
    let mut frozen: Vec<_> = apps.iter().map(App::pid).collect();
    frozen.push(workload.pid);
    frozen.sort_unstable();
    let lines: Vec<_> = frozen.iter().map(u32::to_string).collect();
    assert_eq!(instance.text("gcgroup.freeze"), lines.join("\n"));
    instance.set("gcgroup.freeze", &order.replacen('1', "0", 1));
    assert!(apps.iter().all(|app| instance.runs(app.pid())));
    assert_eq!(instance.text("gcgroup.freeze"), "");
}

#[test]
fn when_one_refuses_none_is_frozen() {
    let instance = Setup::new().attach().start();
    let apps = apps(&instance, 3);
    let denied = Effect::Fail(Failure::Service(Refused::Denied(
        "a fault of the test".into(),
    )));
    let scope = Scope::Process(apps[1].pid());
    instance.fault(Operation::Stop, scope, denied);
    assert!(instance.write("gcgroup.freeze", all(1, &apps)).is_err());
    assert!(
        apps.iter().all(|app| instance.runs(app.pid())),
        "it was answered before the others ran again"
    );
    assert_eq!(instance.text("gcgroup.freeze"), "");
    instance.clear_faults();
    instance.set("gcgroup.freeze", &all(1, &apps));
    assert!(apps.iter().all(|app| instance.is_stopped(app.pid())));
}

#[test]
fn a_pid_without_an_entry_is_named_before_anything_is_stopped() {
    let instance = Setup::new().attach().start();
    let apps = apps(&instance, 1);
    let order = format!("{} 1", all(1, &apps));
    assert_eq!(instance.write("gcgroup.freeze", order), Err(Errno::SRCH));
    assert!(instance.runs(apps[0].pid()));
}

#[test]
fn when_one_is_stuck_the_others_run_again_and_it_is_put_back_in_the_end() {
    let instance = Setup::new()
        .attach()
        .deadline("settings_ms", 1500)
        .deadline("stuck_ms", 1000)
        .start();
    let apps = apps(&instance, 2);
    let [a, b] = [&apps[0], &apps[1]];
    instance.fault(Operation::Stop, Scope::Process(b.pid()), Effect::Hang);
    assert_eq!(
        instance.write("gcgroup.freeze", all(1, &apps)),
        Err(Errno::TIMEDOUT)
    );
    let events = || instance.text(b.file("gcgroup.events"));
    assert!(events().contains("pending 1"), "{}", events());
    wait::until(Duration::from_secs(4), "the other runs again", || {
        instance.runs(a.pid())
    });
    let takes = |state: &str| instance.write(a.file("compute.freeze"), state).is_ok();
    wait::until(Duration::from_secs(2), "it takes writes", || takes("1"));
    assert!(instance.is_stopped(a.pid()));
    instance.set(a.file("compute.freeze"), "0");
    assert!(events().contains("pending 1"), "{}", events());
    assert_eq!(
        instance.write(b.file("compute.freeze"), "1"),
        Err(Errno::IO)
    );
    instance.clear_faults();
    wait::until(Duration::from_secs(5), "it is put back", || {
        events().contains("pending 0") && instance.runs(b.pid())
    });
    assert_eq!(instance.text("gcgroup.freeze"), "");
    assert!(apps.iter().all(|app| instance.runs(app.pid())));
}

#[test]
fn a_freeze_of_several_that_is_in_force_changes_nothing() {
    let instance = Setup::new().attach().start();
    let apps = apps(&instance, 2);
    let freezes = |app: &App| instance.figure(app.file("gcgroup.stat"), "nr_freezes");
    let count = || apps.iter().map(freezes).collect::<Vec<_>>();
    instance.set(apps[0].file("compute.freeze"), "1");
    assert_eq!(count(), [1, 0]);
    for _ in 0..3 {
        instance.set("gcgroup.freeze", &all(1, &apps));
        assert_eq!(count(), [1, 1]);
        assert!(apps.iter().all(|app| instance.is_stopped(app.pid())));
    }
    for _ in 0..2 {
        instance.set("gcgroup.freeze", &all(0, &apps));
        assert!(apps.iter().all(|app| instance.runs(app.pid())));
    }
    assert_eq!(count(), [1, 1]);
}
