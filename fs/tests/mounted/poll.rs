//! poll(2) on events files.

use std::fs::File as OsFile;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use gcgroup_model::{File, ROWS};
use rustix::event::{PollFd, PollFlags, Timespec, epoll, poll};

use crate::fixture::{Fixture, LAUNCHED};

fn read(file: &OsFile) -> String {
    let mut buffer = [0; 256];
    let size = file.read_at(&mut buffer, 0).expect("readable");
    String::from_utf8_lossy(&buffer[..size]).into_owned()
}

fn span(milliseconds: i64) -> Timespec {
    Timespec {
        tv_sec: milliseconds / 1000,
        tv_nsec: milliseconds % 1000 * 1_000_000,
    }
}

/// What poll(2) reports within some milliseconds, nothing when it times out.
fn polled(file: &OsFile, milliseconds: i64) -> PollFlags {
    let mut fds = [PollFd::new(file, PollFlags::PRI | PollFlags::IN)];
    poll(&mut fds, Some(&span(milliseconds))).expect("it can be polled");
    fds[0].revents()
}

const CHANGED: PollFlags = PollFlags::PRI.union(PollFlags::ERR).union(PollFlags::IN);

#[test]
fn an_events_file_is_ready_when_its_text_differs_from_what_was_read() {
    let Some(fixture) = Fixture::mount() else {
        return;
    };
    let file = OsFile::open(fixture.launched(File::Events)).expect("readable");
    assert_eq!(polled(&file, 0), CHANGED, "it was never read");
    read(&file);
    assert_eq!(polled(&file, 0), PollFlags::empty());
    fixture.publish_launched(|entry| entry.events.frozen = true);
    assert_eq!(polled(&file, 0), CHANGED);
    assert_eq!(polled(&file, 0), CHANGED, "until it is read");
    assert_eq!(read(&file), "populated 1\nfrozen 1\nheld 0\npending 0\n");
    assert_eq!(polled(&file, 0), PollFlags::empty());
}

#[test]
fn a_waiter_wakes_when_a_change_is_published_and_for_nothing_else() {
    let Some(fixture) = Fixture::mount() else {
        return;
    };
    let file = OsFile::open(fixture.launched(File::Events)).expect("readable");
    read(&file);
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| {
            let flags = polled(&file, 10_000);
            (flags, Instant::now())
        });
        std::thread::sleep(Duration::from_millis(50));
        fixture.publish_launched(|entry| entry.memory_current += 1);
        std::thread::sleep(Duration::from_millis(50));
        assert!(!waiter.is_finished(), "memory is not an event");
        let published = Instant::now();
        fixture.publish_launched(|entry| entry.events.held = true);
        let (flags, woken) = waiter.join().expect("the waiter ends");
        assert_eq!(flags, CHANGED);
        assert!(woken - published < Duration::from_secs(1));
    });
}

#[test]
fn each_of_many_waiters_wakes_and_waits_again() {
    let Some(fixture) = Fixture::mount() else {
        return;
    };
    let path = fixture.launched(File::Events);
    std::thread::scope(|scope| {
        let waiters: Vec<_> = (0..8)
            .map(|_| {
                scope.spawn(|| {
                    let file = OsFile::open(&path).expect("readable");
                    let mut seen = 0;
                    while !read(&file).contains("pending 1") {
                        assert_ne!(polled(&file, 10_000), PollFlags::empty(), "a wake was lost");
                        seen += 1;
                    }
                    seen
                })
            })
            .collect();
        for round in 0..20 {
            std::thread::sleep(Duration::from_millis(5));
            fixture.publish_launched(|entry| entry.events.held = round % 2 == 0);
        }
        fixture.publish_launched(|entry| entry.events.pending = true);
        for waiter in waiters {
            assert!(waiter.join().expect("the waiter ends") > 0);
        }
    });
}

#[test]
fn an_edge_triggered_waiter_wakes_once_for_each_change() {
    let Some(fixture) = Fixture::mount() else {
        return;
    };
    let file = OsFile::open(fixture.launched(File::Events)).expect("readable");
    read(&file);
    let queue = epoll::create(epoll::CreateFlags::CLOEXEC).expect("epoll is there");
    let flags = epoll::EventFlags::PRI | epoll::EventFlags::ET;
    let data = epoll::EventData::new_u64(1);
    epoll::add(&queue, &file, data, flags).expect("it can be polled");
    let woken = |milliseconds| {
        let mut events = Vec::with_capacity(4);
        epoll::wait(
            &queue,
            rustix::buffer::spare_capacity(&mut events),
            Some(&span(milliseconds)),
        )
        .expect("it can be polled")
    };
    assert_eq!(woken(0), 0);
    for round in 0..5 {
        fixture.publish_launched(|entry| entry.events.frozen = round % 2 == 0);
        assert_eq!(woken(5_000), 1, "in round {round}");
        fixture.publish_launched(|entry| entry.memory_current += 1);
        assert_eq!(woken(20), 0, "the same text again, in round {round}");
        read(&file);
    }
}

#[test]
fn the_end_of_a_process_wakes_its_waiters() {
    let Some(fixture) = Fixture::mount() else {
        return;
    };
    let file = OsFile::open(fixture.launched(File::Events)).expect("readable");
    read(&file);
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| polled(&file, 10_000));
        std::thread::sleep(Duration::from_millis(20));
        fixture.publish(|snapshot| {
            snapshot.processes.remove(&LAUNCHED);
        });
        assert_eq!(waiter.join().expect("the waiter ends"), CHANGED);
    });
}

#[test]
fn files_without_events_are_always_ready_and_never_urgent() {
    let Some(fixture) = Fixture::mount() else {
        return;
    };
    for row in ROWS.iter().filter(|row| row.mode.readable()) {
        let directory = match row.place {
            gcgroup_model::Place::Root => fixture.root(),
            gcgroup_model::Place::Gpu => fixture.root().join("devices/0"),
            gcgroup_model::Place::ProcessGpu => fixture.launched(row.file),
            _ => continue,
        };
        let path = match directory.is_dir() {
            true => directory.join(row.name),
            false => directory,
        };
        let file = OsFile::open(path).expect("readable");
        let expected = if row.polls { CHANGED } else { PollFlags::IN };
        assert_eq!(polled(&file, 0), expected, "{}", row.name);
    }
}
