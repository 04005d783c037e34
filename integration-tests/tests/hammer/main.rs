//! 64 clients read and write at random for ten seconds. Nothing fails that may
//! not fail, no text is torn, and afterwards the service is as it was.

mod grammar;

use std::fs;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use gcgroup_integration_tests::{Errno, Instance, Launched, file, process, wait};
use gcgroup_model::row::rows_of;
use gcgroup_model::{File, Place};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;
use serde_json::json;

const CLIENTS: u64 = 64;
const LASTING: Duration = Duration::from_secs(10);
/// Partitions that are always there.
const STEADY: [&str; 3] = ["a", "b", "c"];

/// Marsaglia's xorshift64: small and seeded.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 33).expect("31 bits") % sides
    }

    fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.roll(from.len())]
    }
}

struct Field<'a> {
    instance: &'a Instance,
    /// Workloads that nobody kills.
    steady: &'a [Launched],
    reads: AtomicU64,
    writes: AtomicU64,
    launches: AtomicU64,
}

impl Field<'_> {
    /// One client's life.
    fn client(&self, number: u64) {
        let mut dice = Dice(0x9e37_79b9_7f4a_7c15 ^ (number + 1));
        let until = Instant::now() + LASTING;
        while Instant::now() < until {
            match dice.roll(100) {
                0..60 => self.read(&mut dice),
                60..80 => self.write(&mut dice),
                80..84 => self.resize(&mut dice),
                84..88 => self.partition(&mut dice, number),
                88..92 => self.list(&mut dice),
                92..95 => self.freeze_several(&mut dice),
                95..98 => self.poll(&mut dice),
                98 => self.nonsense(&mut dice),
                // Launches are few: each is a process.
                _ if number < 2 => self.launch(&mut dice),
                _ => self.read(&mut dice),
            }
        }
    }

    fn read(&self, dice: &mut Dice) {
        let (place, directory) = match dice.roll(6) {
            0 => (Place::Root, String::new()),
            1 => (Place::Gpu, "devices/0/".to_owned()),
            2 => (
                Place::Partition,
                format!("partitions/0/{}/", dice.pick(&STEADY)),
            ),
            3 => (Place::Processes, "processes/".to_owned()),
            4 => (
                Place::Process,
                format!("processes/{}/", dice.pick(self.steady).pid),
            ),
            _ => (Place::Workload, dice.pick(self.steady).file("")),
        };
        let rows: Vec<_> = rows_of(place).filter(|row| row.mode.readable()).collect();
        let row = dice.pick(&rows);
        let path = format!("{directory}{}", row.name);
        match self.instance.read(&path) {
            Ok(text) => {
                if let Err(why) = grammar::check(row.file, &text) {
                    panic!("{path}: {why}: {text:?}");
                }
            }
            Err(errno) => panic!("{path} cannot be read: {errno}"),
        }
        self.reads.fetch_add(1, Ordering::Relaxed);
    }

    fn write(&self, dice: &mut Dice) {
        const VALUES: [(File, &[&str]); 3] = [
            (File::Freeze, &["0", "1", "0\n", "+1"]),
            (File::Max, &["max", "20000", "5000 10000", "90000 100000"]),
            (File::Partition, &["none", "a", "b", "c"]),
        ];
        let (file, values) = dice.pick(&VALUES);
        let path = dice.pick(self.steady).file(file.name());
        let value = dice.pick(values);
        match self.instance.write(&path, value) {
            Ok(()) => {}
            // The partition was resized to nothing, or is about to be.
            Err(Errno::INVAL | Errno::BUSY) if *file == File::Partition => {}
            Err(errno) => panic!("{value:?} to {path}: {errno}"),
        }
        self.writes.fetch_add(1, Ordering::Relaxed);
    }

    fn resize(&self, dice: &mut Dice) {
        let path = format!("partitions/0/{}/sm.count", dice.pick(&STEADY));
        let value = dice.pick(&["8", "16", "24", "32", "40"]);
        match self.instance.write(&path, value) {
            // One resize of a partition at a time.
            Ok(()) | Err(Errno::BUSY | Errno::NOSPC) => {}
            Err(errno) => panic!("{value:?} to {path}: {errno}"),
        }
        self.writes.fetch_add(1, Ordering::Relaxed);
    }

    /// Each client has a name of its own, so that all of this must succeed.
    fn partition(&self, dice: &mut Dice, number: u64) {
        let path = format!("partitions/0/client{number}");
        fs::create_dir(self.instance.path(&path)).expect("the name is free");
        assert_eq!(
            self.instance.read(format!("{path}/sm.count")),
            Ok("0\n".to_owned())
        );
        if dice.roll(2) == 0 {
            let granted = self.instance.write(format!("{path}/sm.count"), "8");
            assert!(matches!(granted, Ok(()) | Err(Errno::NOSPC)), "{granted:?}");
        }
        fs::remove_dir(self.instance.path(&path)).expect("it has no members");
        assert_eq!(
            self.instance.read(format!("{path}/sm.count")),
            Err(Errno::NOENT)
        );
    }

    fn list(&self, dice: &mut Dice) {
        let directory = dice.pick(&["", "devices/0", "partitions/0", "processes", "workloads"]);
        let names = self.instance.names(directory);
        assert!(
            names.is_sorted_by(|a, b| a < b),
            "a name stands twice: {names:?}"
        );
        for steady in self.steady {
            match *directory {
                "processes" => assert!(names.contains(&steady.pid.to_string())),
                "workloads" => assert!(names.contains(&steady.name)),
                _ => {}
            }
        }
    }

    fn freeze_several(&self, dice: &mut Dice) {
        let (one, two) = (dice.roll(self.steady.len()), dice.roll(self.steady.len()));
        if one != two {
            let pids = format!("{} {}", self.steady[one].pid, self.steady[two].pid);
            let state = dice.roll(2);
            let outcome = self
                .instance
                .write("gcgroup.freeze", format!("{state} {pids}"));
            assert_eq!(outcome, Ok(()), "{state} {pids}");
        }
    }

    fn poll(&self, dice: &mut Dice) {
        let path = self
            .instance
            .path(dice.pick(self.steady).file(File::Events.name()));
        let descriptor = file::open_with(&path, OFlags::RDONLY).expect("it is readable");
        let text = file::read_from(&descriptor).expect("it is readable");
        grammar::check(File::Events, &text).expect("a whole text");
        let limit = Timespec {
            tv_sec: 0,
            tv_nsec: 2_000_000,
        };
        poll(
            &mut [PollFd::new(&descriptor, PollFlags::PRI)],
            Some(&limit),
        )
        .expect("it polls");
    }

    fn nonsense(&self, dice: &mut Dice) {
        let workload = dice.pick(self.steady);
        let refused = self
            .instance
            .write(workload.file("compute.freeze"), "maybe");
        assert_eq!(refused, Err(Errno::INVAL));
        let refused = self.instance.write(workload.file("gcgroup.stat"), "1");
        assert_eq!(refused, Err(Errno::ACCESS));
        let refused = self.instance.try_launch(&json!({"kernel": "nosuch"}));
        assert_eq!(refused.expect_err("no such kernel").errno, Errno::INVAL);
        assert_eq!(
            self.instance.read("processes/1/0/gcgroup.stat"),
            Err(Errno::NOENT)
        );
    }

    fn launch(&self, dice: &mut Dice) {
        let workload = self.instance.launch(&slow(None));
        let read = self
            .instance
            .read(workload.file("gcgroup.stat"))
            .expect("it runs");
        grammar::check(File::Stat, &read).expect("a whole text");
        if dice.roll(2) == 0 {
            self.instance.set(workload.file("gcgroup.kill"), "1");
        } else {
            process::signal(workload.pid, rustix::process::Signal::KILL);
        }
        wait::until(Duration::from_secs(5), "it is gone", || {
            !self.instance.has_entry(workload.pid)
        });
        self.launches.fetch_add(1, Ordering::Relaxed);
    }
}

/// A workload that leaves the machine to the clients: its launches last 100 ms.
fn slow(partition: Option<&str>) -> serde_json::Value {
    json!({"kernel": "sleep", "blocks": 1, "iterations": 100_000, "partition": partition})
}

#[test]
fn sixty_four_clients_see_no_error_and_no_torn_text() {
    let instance = Instance::new();
    for name in STEADY {
        instance.partition(name, 16);
    }
    let steady: Vec<_> = [None, Some("a"), Some("a"), Some("b"), Some("c"), None]
        .map(|partition| instance.launch(&slow(partition)))
        .to_vec();
    let descriptors = process::descriptors(instance.pid());
    let resident = process::resident_kib(instance.pid());
    let field = Field {
        instance: &instance,
        steady: &steady,
        reads: AtomicU64::new(0),
        writes: AtomicU64::new(0),
        launches: AtomicU64::new(0),
    };
    std::thread::scope(|scope| {
        for number in 0..CLIENTS {
            let field = &field;
            scope.spawn(move || field.client(number));
        }
    });
    let done = |count: &AtomicU64| count.load(Ordering::Relaxed);
    assert!(done(&field.reads) > 1000, "{} reads", done(&field.reads));
    assert!(done(&field.writes) > 100, "{} writes", done(&field.writes));
    assert!(done(&field.launches) > 0, "no launch");

    // Everything that was done is undone, so what is more now has leaked.
    wait::until(Duration::from_secs(5), "descriptors are closed", || {
        process::descriptors(instance.pid()) <= descriptors + 8
    });
    let grown = process::resident_kib(instance.pid()).saturating_sub(resident);
    assert!(grown < 32 * 1024, "{grown} KiB more are resident");
    assert_eq!(instance.names("partitions/0"), STEADY);
    assert_eq!(instance.names("workloads").len(), steady.len());
    for workload in &steady {
        instance.set(workload.file("compute.freeze"), "1");
        instance.set(workload.file("compute.freeze"), "0");
    }
    assert!(!instance.log().contains("panicked"), "{}", instance.log());
}
