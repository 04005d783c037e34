//! A worker's main loop over a real socket, on the real clock.

use std::cell::RefCell;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use gcgroup_kernels::engine::{EngineError, Form};
use gcgroup_kernels::protocol::{
    Answer, Command, Counters, GpuAddress, Message, QuotaSetting, Request, Setup,
};
use gcgroup_kernels::worker::{WorkerError, run};

use crate::rig::{quota, setup};
use crate::scripted::{Gpu, Script, Scripted};

/// How a worker's thread ended.
struct Ended {
    result: Result<(), WorkerError>,
    /// Launches that the GPU still had when the engine was gone.
    in_flight: usize,
}

struct Service {
    control: UnixStream,
    lines: BufReader<UnixStream>,
    worker: JoinHandle<Ended>,
    next_id: u64,
    reports: Vec<Counters>,
}

impl Service {
    fn start(script: Script) -> Self {
        let (control, theirs) = UnixStream::pair().expect("a socket pair");
        control
            .set_read_timeout(Some(Duration::from_secs(30)))
            .expect("a time limit");
        let worker = std::thread::spawn(move || {
            let gpu = Rc::new(RefCell::new(Gpu::on_real_clock(script)));
            let result = run(theirs.into(), |address| match address {
                GpuAddress::Cuda(_) => Ok(Scripted::new(Rc::clone(&gpu))),
                GpuAddress::Sim { .. } => Err(EngineError::NoDevice("no such GPU".to_owned())),
            });
            let in_flight = gpu.borrow().in_flight();
            Ended { result, in_flight }
        });
        let lines = BufReader::new(control.try_clone().expect("a second handle"));
        Self {
            control,
            lines,
            worker,
            next_id: 0,
            reports: Vec::new(),
        }
    }

    fn running(setup: Setup) -> Self {
        let mut service = Self::start(Script::default());
        service.call(Command::Open(GpuAddress::Cuda("GPU-0".to_owned())));
        service.call(Command::Prepare(Box::new(setup)));
        service.call(Command::Start);
        service
    }

    fn send(&mut self, command: Command) -> u64 {
        self.next_id += 1;
        let id = self.next_id;
        let mut text = serde_json::to_vec(&Request { id, command }).expect("JSON");
        text.push(b'\n');
        self.control.write_all(&text).expect("it listens");
        id
    }

    fn message(&mut self) -> Message {
        let mut line = String::new();
        self.lines.read_line(&mut line).expect("a message in time");
        serde_json::from_str(&line).expect("a message")
    }

    fn reply(&mut self, wanted: u64) -> (Result<Answer, EngineError>, Option<Counters>) {
        loop {
            match self.message() {
                Message::Report { counters, .. } => self.reports.push(counters),
                Message::Reply {
                    id,
                    result,
                    counters,
                } if id == wanted => return (result, counters),
                other => panic!("{other:?} instead of the reply to {wanted}"),
            }
        }
    }

    fn try_call(&mut self, command: Command) -> Result<Answer, EngineError> {
        let id = self.send(command);
        self.reply(id).0
    }

    fn call(&mut self, command: Command) -> Option<Counters> {
        let id = self.send(command);
        let (result, counters) = self.reply(id);
        assert!(result.is_ok(), "{result:?}");
        counters
    }

    /// Closes the socket; returns how the worker ended and how long it took.
    fn close(self) -> (Ended, Duration) {
        let began = Instant::now();
        drop((self.control, self.lines));
        let ended = self.worker.join().expect("no panic");
        (ended, began.elapsed())
    }
}

#[test]
fn a_workload_runs_freezes_and_ends_over_its_socket() {
    let mut service = Service::running(setup(Form::Sliced));
    service.call(Command::ReportEvery { ms: 20 });
    std::thread::sleep(Duration::from_millis(300));
    let frozen = service.call(Command::Freeze(true)).expect("prepared");
    assert!(frozen.frozen && frozen.ended > 100, "{frozen:?}");
    assert!(service.reports.len() >= 5);
    std::thread::sleep(Duration::from_millis(50));
    assert!(service.try_call(Command::Verify).is_ok());
    let thawed = service.call(Command::Freeze(false)).expect("prepared");
    assert_eq!(
        (thawed.ended, thawed.iterations),
        (frozen.ended, frozen.iterations)
    );
    assert!(thawed.frozen_usec >= 50_000);
    let ended = service.call(Command::End).expect("prepared");
    assert!(ended.iterations >= thawed.iterations);
    let result = service.close().0.result;
    assert!(result.is_ok(), "{result:?}");
}

#[test]
fn a_quota_is_kept_on_the_real_clock() {
    let mut service = Service::running(setup(Form::Sliced));
    let setting: QuotaSetting = quota(10_000, 50_000);
    let before = service.call(Command::Quota(setting)).expect("prepared");
    let began = Instant::now();
    std::thread::sleep(Duration::from_secs(2));
    let after = service.call(Command::Freeze(true)).expect("prepared");
    let elapsed = began.elapsed().as_micros() as f64;
    let share = (after.usage_usec - before.usage_usec) as f64 / elapsed;
    // One quota more or less, as the two ends may fall into a period.
    assert!((share - 0.2).abs() < 0.02, "{share}");
    assert!(after.nr_throttled >= 35, "{after:?}");
}

#[test]
fn the_end_of_the_stream_ends_the_worker_in_each_state() {
    let fresh = Service::start(Script::default());
    let mut opened = Service::start(Script::default());
    opened.call(Command::Open(GpuAddress::Cuda("GPU-0".to_owned())));
    let mut calibrates = Service::start(Script::default());
    calibrates.call(Command::Open(GpuAddress::Cuda("GPU-0".to_owned())));
    calibrates.send(Command::Prepare(Box::new(setup(Form::Sliced))));
    let mut ready = Service::start(Script::default());
    ready.call(Command::Open(GpuAddress::Cuda("GPU-0".to_owned())));
    ready.call(Command::Prepare(Box::new(setup(Form::Sliced))));
    let running = Service::running(setup(Form::Sliced));
    let mut frozen = Service::running(setup(Form::Sliced));
    frozen.call(Command::Freeze(true));
    for (state, service) in [
        ("fresh", fresh),
        ("opened", opened),
        ("calibrates", calibrates),
        ("ready", ready),
        ("running", running),
        ("frozen", frozen),
    ] {
        let (ended, took) = service.close();
        let result = ended.result;
        assert!(result.is_ok(), "{state}: {result:?}");
        assert!(took < Duration::from_millis(500), "{state}: {took:?}");
        assert_eq!(
            ended.in_flight, 0,
            "{state}: the engine was dropped at rest"
        );
    }
}

#[test]
fn a_gpu_that_hangs_does_not_keep_the_worker_from_ending() {
    let mut service = Service::start(Script {
        hangs: true,
        ..Script::default()
    });
    service.call(Command::Open(GpuAddress::Cuda("GPU-0".to_owned())));
    service.send(Command::Prepare(Box::new(setup(Form::Sliced))));
    let (ended, took) = service.close();
    let result = ended.result;
    assert!(result.is_ok(), "{result:?}");
    assert!(took < Duration::from_secs(3), "{took:?}");
}

#[test]
fn before_the_gpu_is_open_only_opening_and_ending_are_possible() {
    let mut service = Service::start(Script::default());
    let result = service.try_call(Command::Start);
    assert!(
        matches!(result, Err(EngineError::Unsupported(_))),
        "{result:?}"
    );
    assert_eq!(service.try_call(Command::End), Ok(Answer::Done));
    assert!(service.close().0.result.is_ok());
}

#[test]
fn a_gpu_that_is_not_there_ends_the_worker_with_the_reason() {
    let mut service = Service::start(Script::default());
    let nowhere = GpuAddress::Sim {
        socket: "/nonexistent".into(),
        gpu: 0,
    };
    let error = EngineError::NoDevice("no such GPU".to_owned());
    assert_eq!(service.try_call(Command::Open(nowhere)), Err(error.clone()));
    assert_eq!(
        service.message(),
        Message::Ending {
            error: Some(error.clone())
        }
    );
    let result = service.close().0.result;
    assert!(matches!(result, Err(WorkerError::Engine(e)) if e == error));
}

#[test]
fn a_line_that_is_no_command_is_refused_by_its_id_or_ends_the_worker() {
    let mut service = Service::running(setup(Form::Sliced));
    service
        .control
        .write_all(b"{\"id\":77,\"command\":\"dance\"}\n")
        .expect("it listens");
    let (result, _) = service.reply(77);
    assert!(
        matches!(result, Err(EngineError::Unsupported(_))),
        "{result:?}"
    );
    service.call(Command::Freeze(true));
    service
        .control
        .write_all(b"gibberish\n")
        .expect("it listens");
    let result = service.worker.join().expect("no panic").result;
    assert!(
        matches!(result, Err(WorkerError::Protocol(_))),
        "{result:?}"
    );
}

#[test]
fn commands_in_one_write_are_answered_in_their_order() {
    let mut service = Service::start(Script::default());
    let commands = [
        Command::Open(GpuAddress::Cuda("GPU-0".to_owned())),
        Command::Prepare(Box::new(setup(Form::Sliced))),
        Command::Start,
        Command::Freeze(true),
        Command::End,
    ];
    let mut text = Vec::new();
    for (id, command) in (0..).zip(commands) {
        serde_json::to_writer(&mut text, &Request { id, command }).expect("JSON");
        text.push(b'\n');
    }
    service.control.write_all(&text).expect("it listens");
    for id in 0..5 {
        let (result, _) = service.reply(id);
        assert!(result.is_ok(), "{id}: {result:?}");
    }
    assert!(service.close().0.result.is_ok());
}

#[test]
fn a_service_that_does_not_read_can_still_be_heard_and_left() {
    let mut service = Service::running(setup(Form::Sliced));
    service.call(Command::ReportEvery { ms: 1 });
    // Their replies and reports are more bytes than the socket holds.
    for _ in 0..500 {
        service.send(Command::Freeze(true));
        service.send(Command::Freeze(false));
    }
    let last = service.send(Command::Freeze(true));
    for id in last - 1000..=last {
        let (result, _) = service.reply(id);
        assert!(result.is_ok(), "{result:?}");
    }
    let result = service.close().0.result;
    assert!(result.is_ok(), "{result:?}");
}
