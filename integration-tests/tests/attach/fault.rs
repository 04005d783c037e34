//! Clients that refuse, calls that hang, and a driver that channel control does
//! not work with.

use std::time::{Duration, Instant};

use gcgroup_device_sim::{Effect, Failure, Operation, Refused, Scope};
use gcgroup_integration_tests::{Errno, Instance, Setup, wait};

const SECOND: Duration = Duration::from_secs(1);
/// Deadline of settings. Far above what a freeze takes on a busy machine.
const SETTINGS: Duration = Duration::from_secs(3);

fn denied() -> Effect {
    Effect::Fail(Failure::Service(Refused::Denied(
        "a fault of the test".into(),
    )))
}

fn failed() -> Effect {
    Effect::Fail(Failure::Service(Refused::Failed(
        "a fault of the test".into(),
    )))
}

fn instance() -> Instance {
    Setup::new()
        .attach()
        .deadline("settings_ms", SETTINGS.as_millis() as u64)
        .deadline("stuck_ms", 2 * SETTINGS.as_millis() as u64)
        .start()
}

#[test]
fn a_client_that_refuses_leaves_everything_as_it_was() {
    let instance = instance();
    let mut app = instance.app();
    let of = Scope::Process(app.pid());
    for (operation, effect) in [(Operation::Stop, denied()), (Operation::Stop, failed())] {
        instance.fault(operation, of, effect);
        assert!(instance.write(app.file("compute.freeze"), "1").is_err());
        instance.clear_faults();
        assert_eq!(instance.text(app.file("compute.freeze")), "0");
        assert!(app.progresses());
        assert!(instance.runs(app.pid()));
    }
    instance.fault(Operation::SetTimeslice, of, failed());
    assert_eq!(
        instance.write(app.file("compute.priority"), "3"),
        Err(Errno::IO)
    );
    assert_eq!(instance.text(app.file("compute.priority")), "8");
    assert_eq!(instance.contexts(app.pid())[0].timeslice_usec, 2048);
}

#[test]
fn a_call_that_hangs_is_pending_then_stuck_and_keeps_nobody_else_waiting() {
    let instance = instance();
    let (hung, mut other) = (instance.app(), instance.app());
    instance.fault(Operation::Stop, Scope::Process(hung.pid()), Effect::Hang);
    let since = Instant::now();
    let freeze = hung.file("compute.freeze");
    assert_eq!(instance.write(&freeze, "1"), Err(Errno::TIMEDOUT));
    assert!(since.elapsed() < 2 * SETTINGS, "{:?}", since.elapsed());
    assert!(
        instance
            .text(hung.file("gcgroup.events"))
            .contains("pending 1")
    );
    assert_eq!(instance.write(&freeze, "0"), Err(Errno::BUSY));
    let since = Instant::now();
    instance.set(other.file("compute.freeze"), "1");
    assert!(
        since.elapsed() < SETTINGS / 2,
        "another process waited {:?}",
        since.elapsed()
    );
    assert!(other.stands());
    instance.set(other.file("compute.freeze"), "0");
    wait::until(5 * SETTINGS, "it counts as stuck", || {
        instance.write(&freeze, "0") == Err(Errno::IO)
    });
    instance.clear_faults();
    wait::until(5 * SECOND, "the outcome is published", || {
        instance.text(&freeze) == "1"
    });
    assert!(instance.is_stopped(hung.pid()));
    instance.set(&freeze, "0");
    assert!(instance.runs(hung.pid()));
}

#[test]
fn a_kill_passes_by_a_call_that_hangs() {
    let instance = instance();
    let app = instance.app();
    instance.fault(Operation::Stop, Scope::Process(app.pid()), Effect::Hang);
    assert_eq!(
        instance.write(app.file("compute.freeze"), "1"),
        Err(Errno::TIMEDOUT)
    );
    instance.set(app.file("gcgroup.kill"), "1");
    wait::until(5 * SECOND, "its entry goes", || {
        !instance.has_entry(app.pid())
    });
}

#[test]
fn a_stop_that_hangs_does_not_keep_the_service_from_ending() {
    let mut instance = instance();
    let mut app = instance.app();
    instance.fault(Operation::Stop, Scope::Process(app.pid()), Effect::Hang);
    assert_eq!(
        instance.write(app.file("compute.freeze"), "1"),
        Err(Errno::TIMEDOUT)
    );
    instance.clear_faults();
    wait::until(5 * SECOND, "it is frozen", || {
        instance.is_stopped(app.pid())
    });
    instance.fault(
        Operation::Resume,
        Scope::Process(app.pid()),
        Effect::Delay { usec: 300_000 },
    );
    instance.stop();
    assert!(instance.runs(app.pid()), "what was stopped runs");
    assert!(app.progresses());
}

#[test]
fn where_stops_do_not_act_nobody_is_touched_and_the_reason_is_told() {
    // The trial at the start fails, so the service is not waited for as usual.
    let mut instance = Setup::new().attach().start();
    let app = instance.app();
    instance.fault(Operation::Stop, Scope::All, failed());
    instance.stop();
    // The simulated GPU stays for its clients, and its fault with it.
    let mut service = instance.serve_command().spawn().expect("it starts");
    wait::until(10 * SECOND, "the reason is told", || {
        instance
            .read("devices/0/gcgroup.enforcers")
            .is_ok_and(|text| {
                text.contains("attached/compute.freeze none ") && text.contains("fault")
            })
    });
    wait::until(5 * SECOND, "it has an entry all the same", || {
        instance.has_entry(app.pid())
    });
    assert_eq!(
        instance.write(app.file("compute.freeze"), "1"),
        Err(Errno::OPNOTSUPP)
    );
    instance.clear_faults();
    wait::until(90 * SECOND, "it is tried again", || {
        instance.write(app.file("compute.freeze"), "1").is_ok()
    });
    assert!(instance.is_stopped(app.pid()));
    service.kill().expect("it is our child");
    service.wait().expect("it is our child");
    wait::until(2 * SECOND, "the guardian resumes it", || {
        instance.runs(app.pid())
    });
}
