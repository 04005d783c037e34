//! Counting in real programs, with a library of empty launch functions.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard};
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, setrlimit};
use tempfile::TempDir;

use super::*;

/// Calls and graphs of one round of the program.
const ROUND: Launches = Launches {
    total: 8,
    graphs: 2,
};

/// Functions of the library: seven of eight names have an address of their own.
const FUNCTIONS: usize = 7;

/// `remove_probes` is about the whole host: one test at a time.
static HOST: Mutex<()> = Mutex::new(());

/// The host to oneself, where it can count and has a compiler. The only reasons
/// not to run are those that the product itself gives, or no compiler.
fn host() -> Option<(MutexGuard<'static, ()>, Workshop)> {
    match can_count() {
        Ok(()) => {}
        Err(error @ (DeviceError::Unsupported(_) | DeviceError::Denied(_))) => {
            eprintln!("not run: {error}");
            return None;
        }
        Err(error) => panic!("{error}"),
    }
    let guard = HOST.lock();
    // As a service has it that counts programs with many threads.
    let maximum = getrlimit(Resource::Nofile).maximum;
    let limit = Rlimit {
        current: maximum,
        maximum,
    };
    setrlimit(Resource::Nofile, limit).expect("the soft limit is one's own");
    Some((guard, Workshop::build()?))
}

/// The compiled library and program.
struct Workshop {
    directory: TempDir,
}

impl Workshop {
    fn build() -> Option<Self> {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let library = ["-shared", "-fPIC", "-O1", "-o", "libcuda.so.1"];
        let program = ["-O1", "-pthread", "-Wl,-rpath,$ORIGIN", "-o", "launcher"];
        compile(directory.path(), &library, "libcuda.c", &[])?;
        compile(directory.path(), &program, "launcher.c", &["libcuda.so.1"])?;
        Some(Self { directory })
    }

    fn start(&self) -> Program {
        let mut command = Command::new(self.directory.path().join("launcher"));
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("it was just compiled");
        let output = child.stdout.take().expect("it is piped");
        let mut program = Program {
            child,
            output: BufReader::new(output),
        };
        assert_eq!(program.answer(), "ready");
        program
    }

    fn library(&self) -> PathBuf {
        self.directory.path().join("libcuda.so.1")
    }
}

fn compile(directory: &Path, options: &[&str], source: &str, more: &[&str]) -> Option<()> {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/counters/tests");
    let mut command = Command::new("cc");
    command.current_dir(directory).args(options);
    command.arg(sources.join(source)).args(more);
    match command.status() {
        Ok(status) => assert!(status.success(), "cc {source}: {status}"),
        Err(error) => {
            eprintln!("not run: cc: {error}");
            return None;
        }
    }
    Some(())
}

/// A running launcher.c.
struct Program {
    child: Child,
    output: BufReader<ChildStdout>,
}

impl Program {
    fn pid(&self) -> u32 {
        self.child.id()
    }

    fn answer(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).expect("it answers");
        line.trim().to_owned()
    }

    fn ask(&mut self, command: &str) -> String {
        let input = self.child.stdin.as_mut().expect("it is piped");
        writeln!(input, "{command}").expect("it listens");
        self.answer()
    }

    fn tell(&mut self, command: &str) {
        assert_eq!(self.ask(command), "done", "{command}");
    }

    /// It ended by itself and had nothing to complain of.
    fn finish(mut self) {
        drop(self.child.stdin.take());
        assert!(self.child.wait().expect("it is our child").success());
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn attach(pid: u32) -> Box<dyn LaunchCounter> {
    count_launches(pid).expect("this host can count")
}

fn rounds(number: u64) -> Launches {
    Launches {
        total: ROUND.total * number,
        graphs: ROUND.graphs * number,
    }
}

/// Events of ours for the library of a workshop.
fn events_of(workshop: &Workshop) -> usize {
    use std::os::unix::fs::MetadataExt;
    let file = fs::metadata(workshop.library()).expect("it was compiled");
    let tracefs = Tracefs::find().expect("this host can count");
    let ours = tracefs.ours().expect("it can be read");
    ours.iter()
        .filter(|name| name.library.device == file.dev() && name.library.inode == file.ino())
        .count()
}

#[test]
fn launches_are_counted_each_once_and_each_process_its_own() {
    let Some((_host, workshop)) = host() else {
        return;
    };
    let mut program = workshop.start();
    program.tell("main 10");
    let child: u32 = program.ask("child 10").parse().expect("a pid");
    let mut counter = attach(program.pid());
    let mut of_child = attach(child);
    assert_eq!(counter.read(), Ok(rounds(0)));

    // Each command, and how many rounds of the program itself they make.
    let mut expected = 0;
    for (command, own) in [
        ("main 1000", 1000),
        ("early 500", 4 * 500),
        ("late 70", 70),
        ("leave 30", 30),
        ("fork 200", 0),
        ("exec 200", 0),
        ("spawn 200", 0),
        ("threads 20", 0),
        ("burst 50", 20 * 50),
        ("main 1", 1),
    ] {
        program.tell(command);
        expected += own;
        assert_eq!(counter.read(), Ok(rounds(expected)), "after {command}");
    }
    assert_eq!(of_child.read(), Ok(rounds(0)));
    program.ask("child 300");
    assert_eq!(of_child.read(), Ok(rounds(300)));
    assert_eq!(counter.read(), Ok(rounds(expected)));

    drop(counter);
    program.tell("early 10");
    program.tell("main 10");
    program.tell("fork 10");
    assert_eq!(of_child.read(), Ok(rounds(300)));
    program.finish();
}

#[test]
fn threads_that_start_during_the_attach_count_once() {
    let Some((_host, workshop)) = host() else {
        return;
    };
    for delay_ms in [0, 5, 20] {
        let mut program = workshop.start();
        program.tell("threads 200");
        std::thread::sleep(Duration::from_millis(delay_ms));
        let deadline = Instant::now() + Duration::from_secs(5);
        let mut counter = loop {
            match count_launches(program.pid()) {
                Ok(counter) => break counter,
                Err(error @ DeviceError::Failed(_)) => {
                    assert!(Instant::now() < deadline, "{error}");
                }
                Err(error) => panic!("{error}"),
            }
        };
        program.tell("burst 20");
        assert_eq!(counter.read(), Ok(rounds(200 * 20)));
        program.finish();
    }
}

#[test]
fn a_process_that_ended_is_said_to_have() {
    let Some((_host, workshop)) = host() else {
        return;
    };
    let program = workshop.start();
    let pid = program.pid();
    let mut counter = attach(pid);
    program.finish();
    assert_eq!(counter.read(), Err(DeviceError::NoProcess(pid)));
    assert_eq!(count_launches(pid).err(), Some(DeviceError::NoProcess(pid)));
    drop(counter);
    assert_eq!(events_of(&workshop), 0);
}

#[test]
fn a_process_without_the_library_may_be_asked_again() {
    let Some((_host, _workshop)) = host() else {
        return;
    };
    let error = count_launches(std::process::id()).err();
    let error = error.expect("nothing here is linked to libcuda");
    assert!(matches!(error, DeviceError::Failed(_)), "{error:?}");
    assert!(error.to_string().contains("has not loaded"), "{error}");
}

#[test]
fn events_are_shared_and_go_with_the_last_counter() {
    let Some((_host, workshop)) = host() else {
        return;
    };
    let mut programs = [workshop.start(), workshop.start()];
    let first = attach(programs[0].pid());
    let mut second = attach(programs[1].pid());
    assert_eq!(events_of(&workshop), FUNCTIONS);
    remove_probes().expect("they can be listed");
    assert_eq!(events_of(&workshop), FUNCTIONS, "they are in use");
    drop(first);
    assert_eq!(events_of(&workshop), FUNCTIONS, "one counter is left");
    for program in &mut programs {
        program.tell("main 20");
    }
    assert_eq!(second.read(), Ok(rounds(20)));
    drop(second);
    assert_eq!(events_of(&workshop), 0);
    // They are defined anew for who comes later.
    let mut third = attach(programs[0].pid());
    programs[0].tell("main 5");
    assert_eq!(third.read(), Ok(rounds(5)));
}

#[test]
fn what_a_dead_service_left_is_replaced_or_removed() {
    let Some((_host, workshop)) = host() else {
        return;
    };
    let mut program = workshop.start();
    let library = maps::libraries(program.pid(), CUDA.library).expect("it is loaded");
    let library = &library[0];
    let found = elf::functions(&library.file, &["cuGraphLaunch"]).expect("it is a library");
    let name = tracefs::EventName {
        library: library.id,
        function: "cuGraphLaunch".to_owned(),
        offset: found[0].offset,
    };
    let tracefs = Tracefs::find().expect("this host can count");
    let leave = || tracefs.define(&name, &library.file);
    leave().expect("root may");
    let mut counter = attach(program.pid());
    program.tell("main 7");
    assert_eq!(counter.read(), Ok(rounds(7)));
    drop(counter);
    assert_eq!(events_of(&workshop), 0);

    leave().expect("root may");
    leave().expect("what is there already is no error");
    assert_eq!(events_of(&workshop), 1);
    assert!(remove_probes().expect("they can be listed") >= 1);
    assert_eq!(events_of(&workshop), 0);
}

#[test]
fn a_stopped_process_can_be_counted_and_read() {
    let Some((_host, workshop)) = host() else {
        return;
    };
    let mut program = workshop.start();
    let pid = i32::try_from(program.pid()).ok().and_then(Pid::from_raw);
    let pid = pid.expect("a running process");
    kill_process(pid, Signal::STOP).expect("it is our child");
    let mut counter = attach(program.pid());
    assert_eq!(counter.read(), Ok(rounds(0)));
    kill_process(pid, Signal::CONT).expect("it is our child");
    program.tell("early 3");
    assert_eq!(counter.read(), Ok(rounds(12)));
    program.finish();
}

#[test]
fn a_library_whose_name_is_gone_is_found() {
    let Some((_host, workshop)) = host() else {
        return;
    };
    let mut program = workshop.start();
    fs::remove_file(workshop.library()).expect("it is ours");
    let mut counter = attach(program.pid());
    program.tell("main 9");
    assert_eq!(counter.read(), Ok(rounds(9)));
    program.finish();
}
