//! Callers that wait for an answer, and everybody else meanwhile.

use std::fs;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use gcgroup_model::change::Done;
use gcgroup_model::{File, Refusal};
use rustix::io::Errno;

use crate::fixture::{Fixture, LAUNCHED, Mood, errno, eventually, process, write};

fn pid(index: u32) -> u32 {
    LAUNCHED + 100 + index
}

#[test]
fn readers_stay_fast_beside_32_writes_that_hang() {
    let Some(fixture) = Fixture::mount() else {
        return;
    };
    fixture.publish(|snapshot| {
        for index in 0..32 {
            let (node, pid) = (1000 + 2 * u64::from(index), pid(index));
            snapshot.processes.insert(pid, process(node, pid, None));
        }
    });
    fixture.mood(Mood::Hangs);
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..32)
            .map(|index| {
                let path = fixture.of(pid(index), File::Freeze);
                scope.spawn(move || write(&path, "1"))
            })
            .collect();
        let all = || fixture.keeper.held.lock().len() == 32;
        let arrived = eventually(Duration::from_secs(10), all);
        let mut slowest = Duration::ZERO;
        for _ in 0..20 {
            for index in 0..32 {
                // The file that is being written, one beside it, and a directory.
                let start = Instant::now();
                fs::read(fixture.of(pid(index), File::Freeze)).expect("readable");
                fs::read(fixture.of(pid(index), File::Stat)).expect("readable");
                fs::read_dir(fixture.root().join("processes")).expect("readable");
                slowest = slowest.max(start.elapsed());
            }
        }
        // A writer that was not among them is not to hang either.
        fixture.mood(Mood::Obeys);
        let held = std::mem::take(&mut *fixture.keeper.held.lock());
        for reply in held {
            reply(Err(Refusal::Busy("for the test".to_owned())));
        }
        for writer in writers {
            let result = writer.join().expect("the writer ends");
            assert_eq!(errno(result), Some(Errno::BUSY));
        }
        assert!(arrived, "a write waited for another");
        assert!(slowest < Duration::from_secs(1), "a read took {slowest:?}");
    });
}

/// A child that writes `1` to the launched workload's compute.freeze.
fn writer(fixture: &Fixture) -> Child {
    let script = "echo 1 > \"$1\"";
    Command::new("sh")
        .args(["-c", script, "sh"])
        .arg(fixture.launched(File::Freeze))
        .stderr(Stdio::null())
        .spawn()
        .expect("there is a shell")
}

#[test]
fn a_caller_that_waits_can_be_killed() {
    let Some(fixture) = Fixture::mount() else {
        return;
    };
    fixture.mood(Mood::Hangs);
    for _ in 0..2 {
        let mut child = writer(&fixture);
        let arrived = || fixture.keeper.held.lock().len() == 1;
        assert!(eventually(Duration::from_secs(5), arrived));
        child.kill().expect("it runs");
        let ended = || child.try_wait().expect("it is ours").is_some();
        assert!(eventually(Duration::from_secs(2), ended), "it is stuck");
        // The answer comes too late for anybody, and harms nobody.
        let reply = fixture.keeper.held.lock().pop();
        reply.expect("it was held")(Ok(Done::Quiet));
    }
    fixture.mood(Mood::Obeys);
    write(&fixture.launched(File::Freeze), "1").expect("the file is usable");
}

#[test]
fn a_reply_that_the_service_loses_is_an_error_and_no_hang() {
    let Some(fixture) = Fixture::mount() else {
        return;
    };
    fixture.mood(Mood::Hangs);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| write(&fixture.launched(File::Freeze), "1"));
        let arrived = || fixture.keeper.held.lock().len() == 1;
        assert!(eventually(Duration::from_secs(5), arrived));
        fixture.keeper.held.lock().clear();
        let result = writer.join().expect("the writer ends");
        assert_eq!(errno(result), Some(Errno::IO));
    });
}
