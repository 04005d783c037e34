//! gcgroup.pending, and settings that outlive the service.

use std::process::{Child, Stdio};
use std::time::Duration;

use gcgroup_integration_tests::{Errno, Instance, Setup, process, wait};

const SECOND: Duration = Duration::from_secs(1);

fn instance() -> Instance {
    Setup::new().attach().start()
}

/// Starts a program whose settings wait before it, or a child of it, opens a
/// context. On a busy machine it takes its time for that.
fn before_its_context(instance: &Instance, arguments: &[&str], settings: &[&str]) -> Child {
    for later in ["1000", "5000", "20000"] {
        let mut child = instance
            .app_command(arguments)
            .args(["--later", later])
            .stdout(Stdio::null())
            .spawn()
            .expect("it starts");
        for setting in settings {
            instance.set("gcgroup.pending", &format!("{} {setting}", child.id()));
        }
        let mut family = process::children(child.id());
        family.push(child.id());
        if family.iter().all(|pid| instance.contexts(*pid).is_empty()) {
            return child;
        }
        end(&mut child);
    }
    panic!("it always had a context before its settings were written");
}

fn end(child: &mut Child) {
    child.kill().expect("it is our child");
    child.wait().expect("it is our child");
}

#[test]
fn what_waits_comes_into_force_with_the_first_context() {
    let instance = instance();
    let mut child = before_its_context(
        &instance,
        &[],
        &[
            "compute.priority 11",
            "compute.freeze 1",
            "compute.max 40000 100000",
            "compute.priority 12",
        ],
    );
    let pid = child.id();
    let waits = instance.text("gcgroup.pending");
    assert_eq!(waits.lines().count(), 3, "{waits}");
    assert!(
        waits.contains(&format!("{pid} compute.priority 12")),
        "{waits}"
    );
    let file = |name: &str| format!("processes/{pid}/0/{name}");
    wait::until(40 * SECOND, "all are in force", || {
        let reads = |name: &str, value: &str| {
            instance
                .read(file(name))
                .is_ok_and(|text| text.trim() == value)
        };
        reads("compute.priority", "12")
            && reads("compute.freeze", "1")
            && reads("compute.max", "40000 100000")
    });
    assert!(instance.is_stopped(pid));
    assert_eq!(instance.contexts(pid)[0].timeslice_usec, 524_288 >> 12);
    end(&mut child);
    wait::until(5 * SECOND, "nothing waits for the dead", || {
        instance.text("gcgroup.pending").is_empty()
    });
}

#[test]
fn children_inherit_what_waits_for_their_parent() {
    let instance = instance();
    let children = ["--children", "2"];
    let mut parent = before_its_context(&instance, &children, &["compute.priority 13"]);
    let mut pids = Vec::new();
    wait::until(40 * SECOND, "all three are prioritised", || {
        pids = process::children(parent.id());
        pids.push(parent.id());
        pids.len() == 3
            && pids.iter().all(|pid| {
                let read = instance.read(format!("processes/{pid}/0/compute.priority"));
                read.is_ok_and(|text| text == "13\n")
            })
    });
    let stranger = instance.app();
    assert_eq!(instance.text(stranger.file("compute.priority")), "8");
    end(&mut parent);
}

#[test]
fn what_cannot_wait_is_refused() {
    let instance = instance();
    let own = std::process::id();
    for (text, errno) in [
        (format!("{own} compute.priority 16"), Errno::INVAL),
        (format!("{own} compute.partition a"), Errno::INVAL),
        (format!("{own} gcgroup.kill 1"), Errno::INVAL),
        (format!("{own} compute.max 5000 10000"), Errno::INVAL),
        (format!("{own}"), Errno::INVAL),
        ("4194305 compute.freeze 1".to_owned(), Errno::SRCH),
        ("0 compute.freeze 1".to_owned(), Errno::SRCH),
    ] {
        assert_eq!(
            instance.write("gcgroup.pending", &text),
            Err(errno),
            "{text}"
        );
    }
    assert_eq!(instance.text("gcgroup.pending"), "");
}

#[test]
fn settings_of_a_living_process_outlast_the_service_but_not_its_freeze() {
    let mut instance = instance();
    let mut app = instance.app();
    instance.set(app.file("compute.priority"), "2");
    instance.set(app.file("compute.max"), "60000 100000");
    instance.set(app.file("compute.freeze"), "1");
    for kill in [false, true] {
        if kill {
            instance.kill();
        } else {
            instance.stop();
        }
        wait::until(2 * SECOND, "it runs without the service", || {
            instance.runs(app.pid())
        });
        instance.start();
        instance.wait_for(&app);
        wait::until(10 * SECOND, "its settings are back", || {
            instance.text(app.file("compute.priority")) == "2"
                && instance.text(app.file("compute.max")) == "60000 100000"
        });
        assert_eq!(instance.text(app.file("compute.freeze")), "0");
        assert!(app.progresses());
    }
}

#[test]
fn gcgroup_run_sets_what_its_program_will_have() {
    let instance = instance();
    let app = instance.app_command(&[]);
    let program: Vec<_> = std::iter::once(app.get_program())
        .chain(app.get_args())
        .map(|word| word.to_str().expect("it is text").to_owned())
        .collect();
    let mut arguments = vec!["run", "--priority", "14", "--"];
    arguments.extend(program.iter().map(String::as_str));
    let mut child = instance
        .gcgroup(&arguments)
        .stdout(Stdio::null())
        .spawn()
        .expect("it starts");
    let file = format!("processes/{}/0/compute.priority", child.id());
    wait::until(10 * SECOND, "it has its priority", || {
        instance.read(&file).is_ok_and(|text| text == "14\n")
    });
    end(&mut child);
}

#[test]
fn what_waited_comes_into_force_once_and_later_writes_outlast_a_restart() {
    let mut instance = instance();
    let settings = ["compute.priority 12", "compute.freeze 1"];
    let mut child = before_its_context(&instance, &[], &settings);
    let pid = child.id();
    let file = |name: &str| format!("processes/{pid}/0/{name}");
    wait::until(40 * SECOND, "both are in force", || {
        let reads = |name: &str, value: &str| {
            let text = instance.read(file(name));
            text.is_ok_and(|text| text.trim() == value)
        };
        reads("compute.priority", "12") && reads("compute.freeze", "1")
    });
    assert!(instance.is_stopped(pid));
    instance.set(file("compute.freeze"), "0");
    instance.set(file("compute.priority"), "8");
    // Shows in the end that its own settings are in force again.
    instance.set(file("compute.max"), "60000 100000");
    for kill in [false, true] {
        if kill {
            instance.kill();
        } else {
            instance.stop();
        }
        instance.start();
        wait::until(20 * SECOND, "its window is back", || {
            let stat = instance.read(file("gcgroup.stat"));
            stat.is_ok_and(|stat| {
                let mut lines = stat.lines();
                let throttled = lines.find_map(|line| line.strip_prefix("nr_throttled: "));
                throttled.is_some_and(|count| count.parse::<u64>().is_ok_and(|count| count > 2))
            })
        });
        assert_eq!(instance.text(file("compute.freeze")), "0");
        assert_eq!(instance.figure(file("gcgroup.stat"), "nr_freezes"), 0);
        assert_eq!(instance.text(file("compute.priority")), "8");
        assert_eq!(instance.contexts(pid)[0].timeslice_usec, 2048);
    }
    instance.set(file("compute.max"), "max");
    assert!(instance.runs(pid));
    end(&mut child);
}
