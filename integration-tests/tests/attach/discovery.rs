//! Who gets an entry, when it comes and goes, and what it shows.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use gcgroup_integration_tests::{Errno, Instance, Setup, process, wait};

const SECOND: Duration = Duration::from_secs(1);

fn instance() -> Instance {
    Setup::new().attach().start()
}

fn entry(pid: u32) -> String {
    format!("processes/{pid}/0")
}

#[test]
fn a_program_has_an_entry_within_200_ms_of_its_context_and_until_its_end() {
    let instance = instance();
    wait::measured("an entry comes and goes within 200 ms", || {
        let mut app = instance.app_on(0, &[]);
        let begun = Instant::now();
        let path = entry(app.pid());
        wait::until(10 * SECOND, "its entry", || instance.path(&path).exists());
        let came = begun.elapsed();
        app.kill();
        let ended = Instant::now();
        let events = format!("{path}/gcgroup.events");
        wait::until(10 * SECOND, "its entry goes", || {
            instance.read(&events).is_err()
        });
        let went = ended.elapsed();
        let limit = Duration::from_millis(200);
        if came <= limit && went <= limit {
            return Ok(());
        }
        Err(format!("it came after {came:?} and went after {went:?}"))
    });
}

#[test]
fn an_entry_shows_whose_it_is_and_what_it_uses() {
    let instance = instance();
    let mut app = instance.app_on(0, &["--memory", "3G"]);
    instance.wait_for(&app);
    let list = instance.text("processes/list");
    assert_eq!(list, format!("PID\n{}", app.pid()));
    let comm = instance.text(format!("processes/{}/comm", app.pid()));
    assert!(comm.starts_with("gcgroupd"), "{comm}");
    assert_eq!(instance.text(format!("processes/{}/uid", app.pid())), "0");
    let memory = instance.number(app.file("memory.current"));
    assert!(memory >= 3 << 30, "{memory}");
    app.tell("memory 1G");
    wait::until(5 * SECOND, "memory.current grows by 1 GiB", || {
        instance.number(app.file("memory.current")) == memory + (1 << 30)
    });
    assert_eq!(instance.number(app.file("memory.peak")), memory + (1 << 30));
    let events = instance.text(app.file("gcgroup.events"));
    assert_eq!(events, "populated 1\nfrozen 0\nheld 0\npending 0");
    let names = instance.names(entry(app.pid()));
    assert!(
        !names.iter().any(|name| name.starts_with("workload.")),
        "{names:?}"
    );
    let enforcers = instance.text(app.file("gcgroup.enforcers"));
    for line in [
        "compute.freeze channel",
        "compute.priority channel",
        "compute.max channel-window",
        "gcgroup.kill signal",
    ] {
        assert!(enforcers.lines().any(|found| found == line), "{enforcers}");
    }
    assert!(enforcers.contains("compute.partition none "), "{enforcers}");
    assert_eq!(
        instance.write(app.file("compute.partition"), "none"),
        Err(Errno::OPNOTSUPP)
    );
}

#[test]
fn a_process_without_a_context_keeps_its_entry_and_its_settings() {
    let instance = instance();
    let mut app = instance.app();
    instance.set(app.file("compute.priority"), "3");
    app.tell("close");
    wait::until(5 * SECOND, "populated 0", || {
        instance
            .text(app.file("gcgroup.events"))
            .contains("populated 0")
    });
    assert_eq!(instance.text(app.file("compute.priority")), "3");
    app.tell("open 0");
    wait::until(5 * SECOND, "populated 1", || {
        instance
            .text(app.file("gcgroup.events"))
            .contains("populated 1")
    });
    let slice = || {
        instance
            .contexts(app.pid())
            .first()
            .map(|context| context.timeslice_usec)
    };
    wait::until(5 * SECOND, "the new context has the timeslice", || {
        slice() == Some(524_288 >> 3)
    });
    app.tell("memory 2G");
    let pid = app.pid();
    let used = |bytes: u64| bytes == instance.contexts(pid)[0].memory_bytes;
    wait::until(
        5 * SECOND,
        "memory.current is that of the new context",
        || used(instance.number(app.file("memory.current"))),
    );
    let peak = instance.number(app.file("memory.peak"));
    app.tell("close");
    wait::until(5 * SECOND, "memory.current is that of no context", || {
        instance.number(app.file("memory.current")) == 0
    });
    app.tell("open 0");
    wait::until(5 * SECOND, "memory.current is right once more", || {
        used(instance.number(app.file("memory.current")))
    });
    assert_eq!(instance.number(app.file("memory.peak")), peak);
}

#[test]
fn a_process_has_an_entry_for_each_of_its_gpus() {
    let instance = Setup::new().gpus(2).attach().start();
    let mut app = instance.app();
    assert!(!instance.path(app.file_on(1, "")).exists());
    app.tell("open 1");
    wait::until(5 * SECOND, "its entry on GPU 1", || {
        instance.path(app.file_on(1, "gcgroup.events")).exists()
    });
    assert_eq!(instance.names(format!("processes/{}", app.pid())).len(), 5);
    wait::until(5 * SECOND, "it is controlled there", || {
        instance
            .write(app.file_on(1, "compute.freeze"), "1")
            .is_ok()
    });
    let stopped = |gpu| {
        let contexts = instance.contexts(app.pid());
        let of_gpu = contexts.iter().find(|context| context.gpu == gpu);
        let context = of_gpu.expect("it has a context");
        context.disabled_channels == context.channels
    };
    let runs = |gpu| {
        let contexts = instance.contexts(app.pid());
        let of_gpu = contexts.iter().find(|context| context.gpu == gpu);
        of_gpu.expect("it has a context").disabled_channels == 0
    };
    assert!(runs(0), "GPU 0 goes on");
    assert!(stopped(1));
    assert_eq!(instance.text(app.file_on(0, "compute.freeze")), "0");
    instance.set("gcgroup.freeze", &format!("1 {}", app.pid()));
    assert!(
        stopped(0) && stopped(1),
        "gcgroup.freeze means all of its GPUs"
    );
    instance.set("gcgroup.freeze", &format!("0 {}", app.pid()));
    assert!(runs(0) && runs(1));
}

#[test]
fn what_the_service_launched_has_one_entry_and_its_helpers_have_none() {
    for setup in [Setup::new(), Setup::new().temporal()] {
        let instance = setup.attach().start();
        let workload = instance.launch_fma();
        let app = instance.app();
        // Two looks at least have passed, and so has a trial of channel control.
        let list = instance.text("processes/list");
        let mut pids: Vec<u32> = list
            .lines()
            .skip(1)
            .map(|line| line.parse().expect("a pid"))
            .collect();
        let mut expected = vec![workload.pid, app.pid()];
        pids.sort_unstable();
        expected.sort_unstable();
        assert_eq!(pids, expected);
        let enforcers = instance.text(workload.file("gcgroup.enforcers"));
        assert!(enforcers.contains("compute.freeze worker"), "{enforcers}");
    }
}

#[test]
fn helpers_of_a_trial_are_never_listed() {
    for setup in [Setup::new(), Setup::new().temporal()] {
        let mut instance = setup.attach().start();
        let app = instance.app();
        instance.stop();
        let mut service = instance.serve_command().spawn().expect("it starts");
        let mut driver = instance.faults();
        let mut helpers = BTreeSet::new();
        let mut looks = 0;
        wait::until(30 * SECOND, "the trial is over", || {
            let contexts = driver.clients().expect("the simulated GPU runs");
            let others = contexts.iter().filter(|it| it.pid != app.pid());
            helpers.extend(others.map(|context| context.pid));
            if let Ok(list) = instance.read("processes/list") {
                let own = app.pid().to_string();
                let strangers = list.lines().skip(1).filter(|pid| *pid != own);
                assert_eq!(
                    strangers.count(),
                    0,
                    "{helpers:?} try, and are listed: {list}"
                );
                for helper in &helpers {
                    assert!(!instance.has_entry(*helper), "{helper} has an entry");
                }
                looks += usize::from(!helpers.is_empty() && list.contains(&own));
            }
            let enforcers = instance.read("devices/0/gcgroup.enforcers");
            enforcers.is_ok_and(|text| text.contains("compute.priority channel\n"))
        });
        assert!(helpers.len() >= 2, "no trial was seen: {helpers:?}");
        assert!(looks > 0, "nobody was listed while the trial went on");
        service.kill().expect("it is our child");
        service.wait().expect("it is our child");
    }
}

#[test]
fn an_mps_server_has_an_entry_that_acts_on_what_it_serves() {
    let instance = instance();
    let server = instance.app_on(0, &["--mps-server"]);
    instance.wait_for(&server);
    instance.set(server.file("compute.freeze"), "1");
    assert!(instance.is_stopped(server.pid()));
    instance.set(server.file("compute.freeze"), "0");
    assert!(instance.runs(server.pid()));
}

#[test]
fn with_attach_off_nobody_elses_process_has_an_entry() {
    let instance = Instance::new();
    let app = instance.app_on(0, &[]);
    std::thread::sleep(Duration::from_millis(400));
    assert_eq!(instance.text("processes/list"), "PID");
    let text = instance.text("devices/0/gcgroup.enforcers");
    assert!(
        text.contains("attached/compute.freeze none attach = false"),
        "{text}"
    );
    assert_eq!(
        instance.write("gcgroup.pending", format!("{} compute.freeze 1", app.pid())),
        Err(Errno::OPNOTSUPP)
    );
}

#[test]
fn a_thousand_processes_in_a_minute_leave_nothing_behind() {
    const AT_ONCE: usize = 5;
    const ROUNDS: usize = 200;
    let instance = instance();
    let stays = instance.app_on(0, &["--idle"]);
    instance.wait_for(&stays);
    let service = instance.pid();
    let threads = || process::status(service, "Threads").expect("it runs");
    let before = (
        process::descriptors(service),
        process::resident_kib(service),
    );
    let begun = Instant::now();
    for round in 0..ROUNDS {
        let mut apps: Vec<_> = (0..AT_ONCE)
            .map(|_| instance.app_on(0, &["--idle", "--memory", "1M"]))
            .collect();
        wait::until(20 * SECOND, "every program has its entry", || {
            apps.iter().all(|app| instance.has_entry(app.pid()))
        });
        if round % 10 == 0 {
            // Some are controlled when they end.
            for app in &apps {
                instance.wait_for(app);
                instance.set(app.file("compute.freeze"), "1");
            }
        }
        apps.iter_mut()
            .for_each(gcgroup_integration_tests::App::kill);
    }
    let took = begun.elapsed();
    println!("{} processes in {took:?}", AT_ONCE * ROUNDS);
    // On an idle machine it is less than a minute.
    assert!(took < 120 * SECOND, "{took:?}");
    let only = format!("PID\n{}", stays.pid());
    wait::until(10 * SECOND, "only one entry is left", || {
        instance.text("processes/list") == only
    });
    wait::until(20 * SECOND, "descriptors are closed", || {
        process::descriptors(service) <= before.0 + 4
    });
    wait::until(20 * SECOND, "threads have ended", || {
        threads().parse::<u32>().is_ok_and(|count| count < 40)
    });
    let grown = process::resident_kib(service).saturating_sub(before.1);
    assert!(grown < 16 * 1024, "{grown} KiB more are resident");
    instance.set(stays.file("compute.freeze"), "1");
    assert!(instance.is_stopped(stays.pid()));
}
