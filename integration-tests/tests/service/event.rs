//! gcgroup.events and device.events, and poll(2) on them.

use std::time::{Duration, Instant};

use gcgroup_integration_tests::{Instance, file, keyed};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::fs::OFlags;
use rustix::io::pread;

/// Waits for POLLPRI; whether it came within `limit`.
fn changes(descriptor: &OwnedFd, limit: Duration) -> bool {
    let mut descriptors = [PollFd::new(descriptor, PollFlags::PRI)];
    let limit = Timespec {
        tv_sec: 0,
        tv_nsec: i64::from(limit.subsec_nanos()),
    };
    let ready = poll(&mut descriptors, Some(&limit)).expect("the descriptor can be polled");
    ready == 1 && descriptors[0].revents().contains(PollFlags::PRI)
}

fn open(instance: &Instance, path: &str) -> OwnedFd {
    file::open_with(&instance.path(path), OFlags::RDONLY).expect("it is readable")
}

/// The text now, by the descriptor that polls.
fn now(descriptor: &OwnedFd) -> String {
    let mut buffer = [0_u8; 512];
    let count = pread(descriptor, &mut buffer, 0).expect("it is readable");
    String::from_utf8_lossy(&buffer[..count]).into_owned()
}

const QUIET: Duration = Duration::from_millis(300);
const SOON: Duration = Duration::from_millis(900);

#[test]
fn the_states_of_a_process_stand_in_their_order() {
    let instance = Instance::new();
    let workload = instance.launch_fma();
    let text = instance.text(workload.file("gcgroup.events"));
    assert_eq!(text, "populated 1\nfrozen 0\nheld 0\npending 0");
    instance.set(workload.file("compute.freeze"), "1");
    let text = instance.text(workload.file("gcgroup.events"));
    assert_eq!(text, "populated 1\nfrozen 1\nheld 0\npending 0");
}

#[test]
fn poll_reports_a_freeze_and_a_thaw_once_each() {
    let instance = Instance::new();
    let workload = instance.launch_fma();
    let events = open(&instance, &workload.file("gcgroup.events"));
    assert!(now(&events).contains("frozen 0"));
    assert!(!changes(&events, QUIET), "nothing has changed");
    for (value, line) in [("1", "frozen 1"), ("0", "frozen 0")] {
        instance.set(workload.file("compute.freeze"), value);
        assert!(changes(&events, SOON), "{line}");
        assert!(now(&events).contains(line));
        assert!(!changes(&events, QUIET), "it was read");
    }
}

#[test]
fn poll_wakes_a_waiter() {
    let instance = Instance::new();
    let workload = instance.launch_fma();
    let events = open(&instance, &workload.file("gcgroup.events"));
    assert!(now(&events).contains("frozen 0"));
    let woken = std::thread::scope(|scope| {
        let waiter = scope.spawn(|| {
            let changed = changes(&events, Duration::from_millis(999));
            (changed, Instant::now())
        });
        std::thread::sleep(Duration::from_millis(200));
        let written = Instant::now();
        instance.set(workload.file("compute.freeze"), "1");
        let (changed, at) = waiter.join().expect("the waiter does not panic");
        assert!(changed, "the change was not reported");
        at.saturating_duration_since(written)
    });
    assert!(woken < Duration::from_millis(300), "{woken:?}");
    assert!(now(&events).contains("frozen 1"));
}

#[test]
fn every_descriptor_is_woken() {
    let instance = Instance::new();
    let workload = instance.launch_fma();
    let path = workload.file("gcgroup.events");
    let descriptors: Vec<_> = (0..5).map(|_| open(&instance, &path)).collect();
    for descriptor in &descriptors {
        assert!(now(descriptor).contains("frozen 0"));
    }
    std::thread::scope(|scope| {
        let waiters: Vec<_> = descriptors
            .iter()
            .map(|descriptor| scope.spawn(move || changes(descriptor, SOON)))
            .collect();
        std::thread::sleep(Duration::from_millis(100));
        instance.set(workload.file("compute.freeze"), "1");
        for waiter in waiters {
            assert!(waiter.join().expect("the waiter does not panic"));
        }
    });
}

#[test]
fn poll_reports_only_the_process_that_changed() {
    let instance = Instance::new();
    let (one, two) = (instance.launch_fma(), instance.launch_fma());
    let other = open(&instance, &two.file("gcgroup.events"));
    assert!(now(&other).contains("frozen 0"));
    instance.set(one.file("compute.freeze"), "1");
    instance.set(one.file("compute.max"), "20000 100000");
    assert!(!changes(&other, QUIET));
}

#[test]
fn poll_reports_the_end_of_the_process() {
    let instance = Instance::new();
    let workload = instance.launch_fma();
    let events = open(&instance, &workload.file("gcgroup.events"));
    assert!(now(&events).contains("populated 1"));
    instance.set(workload.file("gcgroup.kill"), "1");
    assert!(changes(&events, Duration::from_millis(999)));
}

#[test]
fn a_device_without_trouble_reports_none() {
    let instance = Instance::new();
    let events = open(&instance, "devices/0/device.events");
    keyed::numbers(&now(&events)).expect("a keyed file");
    let workload = instance.launch_fma();
    instance.set(workload.file("gcgroup.kill"), "1");
    assert!(!changes(&events, QUIET));
}
