//! Whatever was stopped runs when the service is gone, however it went.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use gcgroup_device_sim::{Effect, Failure, FaultClient, Operation, Refused, Scope};
use gcgroup_integration_tests::{App, Instance, Setup, process, wait};
use rustix::process::Signal;

/// What the interface promises.
const RUNS_AGAIN: Duration = Duration::from_secs(2);
const APPS: usize = 20;
const ROUNDS: u64 = 200;

/// Freezes and thaws until the service is gone; how many changes came true.
fn toggle(instance: &Instance, apps: &[App], gone: &AtomicBool) -> usize {
    let mut state = 1;
    let mut changed = 0;
    while !gone.load(Ordering::Relaxed) {
        for app in apps {
            // The service may be killed at any moment.
            let outcome = instance.write(app.file("compute.freeze"), state.to_string());
            changed += usize::from(outcome.is_ok());
        }
        state ^= 1;
    }
    changed
}

/// Contexts with a channel that is stopped.
fn stopped(driver: &mut FaultClient) -> usize {
    let contexts = driver.clients().expect("the simulated GPU runs");
    let stopped = contexts
        .iter()
        .filter(|context| context.disabled_channels > 0);
    stopped.count()
}

/// A number that looks random, the same for the same seed (splitmix64).
fn random(seed: u64) -> u64 {
    let mut z = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[test]
fn after_a_kill_at_any_moment_nothing_stays_stopped() {
    let seed = u64::from(std::process::id());
    println!("seed {seed}");
    let mut instance = Setup::new().attach().start();
    // Few launches: programs that take little of this machine's processors.
    let mut apps: Vec<_> = (0..APPS)
        .map(|_| instance.app_on(0, &["--kernel-us", "20000", "--memory", "1M"]))
        .collect();
    let mut driver = instance.faults();
    let (mut longest, mut found_stopped, mut changed) = (Duration::ZERO, 0, 0);
    for round in 0..ROUNDS {
        apps.iter().for_each(|app| instance.wait_for(app));
        let gone = AtomicBool::new(false);
        let service = instance.pid();
        let killed = std::thread::scope(|scope| {
            let halves: Vec<_> = apps
                .chunks(APPS / 2)
                .map(|half| {
                    let (instance, gone) = (&instance, &gone);
                    scope.spawn(move || toggle(instance, half, gone))
                })
                .collect();
            std::thread::sleep(Duration::from_micros(random(seed + round) % 60_000));
            process::signal(service, Signal::KILL);
            let killed = Instant::now();
            found_stopped += stopped(&mut driver);
            gone.store(true, Ordering::Relaxed);
            for half in halves {
                changed += half.join().expect("no panic");
            }
            killed
        });
        let all_run = wait::becomes(RUNS_AGAIN.saturating_sub(killed.elapsed()), || {
            stopped(&mut driver) == 0
        });
        longest = longest.max(killed.elapsed());
        let log = if all_run {
            String::new()
        } else {
            instance.log()
        };
        assert!(all_run, "seed {seed} round {round}:\n{log}");
        instance.wait_end();
        instance.start();
    }
    println!(
        "{changed} changes, {found_stopped} programs were stopped when the service died, all ran after {longest:?}"
    );
    assert!(
        found_stopped > 0,
        "nothing was stopped when the service died"
    );
    assert!(apps.iter_mut().all(App::progresses));
}

/// Keeps the guardian from acting. One that is killed has a successor in a second.
fn hold_guardian(instance: &Instance) -> u32 {
    let guardians = instance.in_role("guardian");
    let &[guardian] = guardians.as_slice() else {
        panic!("one guardian, not {guardians:?}");
    };
    process::signal(guardian, Signal::STOP);
    let stands = || {
        let state = process::status(guardian, "State");
        state.is_some_and(|state| state.starts_with('T'))
    };
    wait::until(Duration::from_secs(5), "the guardian stands", stands);
    guardian
}

#[test]
fn without_a_guardian_recover_resumes_what_is_stopped() {
    let mut instance = Setup::new().attach().start();
    let apps: Vec<_> = (0..4).map(|_| instance.app()).collect();
    for app in &apps {
        instance.set(app.file("compute.freeze"), "1");
    }
    let guardian = hold_guardian(&instance);
    instance.kill();
    assert!(
        apps.iter().all(|app| instance.is_stopped(app.pid())),
        "nobody was there to resume them"
    );
    let status = instance.gcgroupd("recover").status().expect("it starts");
    assert!(status.success(), "{status}");
    assert!(apps.iter().all(|app| instance.runs(app.pid())));
    process::signal(guardian, Signal::KILL);
}

#[test]
fn the_next_start_resumes_what_is_stopped() {
    let mut instance = Setup::new().attach().start();
    let app = instance.app();
    instance.set(app.file("compute.freeze"), "1");
    let guardian = hold_guardian(&instance);
    instance.kill();
    assert!(instance.is_stopped(app.pid()), "nobody was there");
    instance.start();
    assert!(instance.runs(app.pid()));
    instance.wait_for(&app);
    assert_eq!(instance.text(app.file("compute.freeze")), "0");
    process::signal(guardian, Signal::KILL);
}

#[test]
fn a_lost_mount_and_a_sigterm_resume_everything() {
    for unmount in [false, true] {
        let mut instance = Setup::new().attach().start();
        let app = instance.app();
        instance.set(app.file("compute.freeze"), "1");
        instance.set(app.file("compute.max"), "1000 1000000");
        if unmount {
            rustix::mount::unmount(instance.root(), rustix::mount::UnmountFlags::DETACH)
                .expect("it is mounted");
            instance.wait_end();
        } else {
            instance.stop();
        }
        assert!(instance.runs(app.pid()));
    }
}

#[test]
fn a_resume_that_hangs_on_one_gpu_keeps_nothing_stopped_on_another() {
    let mut instance = Setup::new().gpus(2).attach().start();
    let mut app = instance.app();
    app.tell("open 1");
    wait::until(Duration::from_secs(5), "it is controlled on GPU 1", || {
        let stat = instance.read(app.file_on(1, "gcgroup.stat"));
        stat.is_ok_and(|stat| stat.contains("channel_groups: "))
    });
    instance.set("gcgroup.freeze", &format!("1 {}", app.pid()));
    assert!(instance.is_stopped(app.pid()));
    instance.fault(Operation::Resume, Scope::Gpu(1), Effect::Hang);
    // What is left is told by the status, whatever it is.
    instance.stop();
    let disabled = |gpu| {
        let contexts = instance.contexts(app.pid());
        let on_gpu = contexts.iter().find(|context| context.gpu == gpu);
        on_gpu.expect("it has a context").disabled_channels
    };
    assert_eq!(disabled(0), 0, "GPU 0 waited for GPU 1");
    instance.clear_faults();
    wait::until(RUNS_AGAIN, "it runs on GPU 1 too", || {
        instance.runs(app.pid())
    });
}

#[test]
fn what_no_recovery_could_resume_is_resumed_by_the_next_service() {
    let mut instance = Setup::new().attach().start();
    let app = instance.app();
    instance.set(app.file("compute.freeze"), "1");
    let failed = Effect::Fail(Failure::Service(Refused::Failed(
        "a fault of the test".into(),
    )));
    let of = Scope::Process(app.pid());
    instance.fault(Operation::Resume, of, failed);
    instance.kill();
    instance.start();
    assert!(
        instance.is_stopped(app.pid()),
        "neither the guardian nor the start could resume it"
    );
    instance.clear_faults();
    wait::until(Duration::from_secs(6), "it runs without help", || {
        instance.runs(app.pid())
    });
    instance.wait_for(&app);
    assert_eq!(instance.text(app.file("compute.freeze")), "0");
    instance.set(app.file("compute.freeze"), "1");
    instance.set(app.file("compute.freeze"), "0");
    assert!(instance.runs(app.pid()));
}

#[test]
fn a_damaged_journal_keeps_nothing_stopped() {
    let mut instance = Setup::new().attach().start();
    let apps: Vec<_> = (0..3).map(|_| instance.app()).collect();
    for app in &apps {
        instance.set(app.file("compute.freeze"), "1");
    }
    std::fs::write(instance.state().join("journal.json"), "{ torn").expect("we are root");
    instance.kill();
    wait::until(Duration::from_secs(5), "every program runs", || {
        apps.iter().all(|app| instance.runs(app.pid()))
    });
    instance.start();
    assert!(instance.log().contains("the journal is damaged"));
}
