//! A served simulated host, from outside: over its socket, with real processes.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use gcgroup_device::{Channels, DeviceError, GpuInfo, Host, Mps, Search, Telemetry};
use gcgroup_device_sim::{
    Effect, Ended, Failure, FaultSpec, MPS_VARIABLE, Operation, Refused, Scope, ServeError,
    SimEngine, SimHost, SimOptions, serve,
};
use gcgroup_kernels::engine::{Completion, Engine, EngineError, Form, Placement, Plan};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::time::Timespec;

use harness::{Directory, PATIENCE, Served, child, first_gpu, until};

mod foreign;
mod harness;

fn plan(form: Form) -> Plan {
    Plan {
        kernel: "fma_fp32".to_owned(),
        ilp: 4,
        blocks: 132,
        threads: 1024,
        bytes: 0,
        form,
    }
}

/// Units of that plan in about half a millisecond on all SMs: 16.2 ns each.
const HALF_MS: u64 = 31_000;

fn readable(engine: &SimEngine, timeout: Duration) -> bool {
    let timeout = Timespec {
        tv_sec: timeout.as_secs() as i64,
        tv_nsec: i64::from(timeout.subsec_nanos()),
    };
    let mut fds = [PollFd::from_borrowed_fd(engine.wait_fd(), PollFlags::IN)];
    poll(&mut fds, Some(&timeout)).expect("the descriptor is open") > 0
}

fn next(engine: &mut SimEngine) -> Completion {
    loop {
        if let Some(completion) = engine.poll().expect("nothing failed") {
            return completion;
        }
        assert!(readable(engine, PATIENCE), "no launch ended");
    }
}

#[test]
fn launches_stop_and_go_on_and_add_up() {
    let served = Served::start();
    let mut engine = served.engine();
    let prepared = engine.prepare(&plan(Form::Sliced)).expect("it fits");
    assert_eq!(prepared.units_per_iteration, 1);
    engine.submit(HALF_MS, 1000).expect("it is prepared");
    let solo = next(&mut engine);
    assert_eq!(solo.target, HALF_MS);
    assert!((480.0..520.0).contains(&solo.device_us), "{solo:?}");
    assert!(solo.seen_ns > solo.submitted_ns);

    let target = 200 * HALF_MS;
    engine.submit(target, 1000).expect("it is prepared");
    let mut last = u128::from(HALF_MS) * 132;
    for _ in 0..3 {
        std::thread::sleep(Duration::from_millis(5));
        engine.raise_stop().expect("the host lives");
        next(&mut engine);
        let progress = engine.progress().expect("nothing is in flight");
        assert!(progress.total > last && progress.most - progress.least <= 1);
        assert!(u128::from(progress.least) <= progress.total / 132);
        last = progress.total;
        engine.lower_stop().expect("the host lives");
        engine.submit(target, 1000).expect("it is prepared");
    }
    assert_eq!(next(&mut engine).target, target);
    let progress = engine.progress().expect("nothing is in flight");
    assert_eq!((progress.least, progress.most), (target, target));
    assert_eq!(progress.total, u128::from(target) * 132);
    let verified = engine.verify().expect("nothing is in flight");
    assert_eq!((verified.compared, verified.wrong), (132, 0));
}

#[test]
fn completions_that_come_during_a_call_are_kept_and_wake() {
    let served = Served::start();
    let mut engine = served.engine();
    engine.prepare(&plan(Form::Sliced)).expect("it fits");
    for launch in 1..=20 {
        engine.submit(launch, 1).expect("it is prepared");
    }
    // All have ended before the flag is answered, so all came before.
    let delay = Effect::Delay { usec: 100_000 };
    served.set(Operation::RaiseStop, delay, Some(1));
    engine.raise_stop().expect("late, but done");
    for launch in 1..=20 {
        assert!(readable(&engine, Duration::ZERO), "before launch {launch}");
        let completion = engine.poll().expect("nothing failed").expect("it is here");
        assert_eq!(completion.target, launch);
    }
    assert_eq!(engine.poll(), Ok(None));
    assert!(!readable(&engine, Duration::ZERO));
}

#[test]
fn twenty_clients_run_at_once_and_lose_nothing() {
    let served = Served::start();
    let host = served.host();
    let gpu = host.gpus().expect("it is served").remove(0);
    let server = host
        .start(&gpu, Path::new("/nonexistent"))
        .expect("there is MPS");
    let (variable, token) = server.environment().remove(0);
    assert_eq!(variable, MPS_VARIABLE);
    std::thread::scope(|scope| {
        for client in 0..20_u32 {
            let (served, token) = (&served, &token);
            scope.spawn(move || {
                let mut engine = SimEngine::open_with(&served.options.socket(), 0, Some(token))
                    .expect("there are slots");
                engine.prepare(&plan(Form::Sliced)).expect("it fits");
                let placement = Placement {
                    groups: Some(vec![client % 16]),
                    stream_priority: 0,
                };
                assert_eq!(engine.place(&placement), Ok(8));
                for launch in 1..=100 {
                    engine.submit(launch * 500, 100).expect("it is prepared");
                    if launch >= 4 {
                        next(&mut engine);
                    }
                }
                for _ in 0..3 {
                    next(&mut engine);
                }
                let progress = engine.progress().expect("nothing is in flight");
                assert_eq!(progress.total, 50_000 * 132);
                assert_eq!(engine.verify().expect("it is idle").wrong, 0);
            });
        }
    });
}

#[test]
fn a_killed_process_leaves_nothing_behind() {
    let served = Served::start();
    let host = served.host();
    let gpu = host.gpus().expect("it is served").remove(0);
    let mark = host.mark().expect("it is served");
    let mut app = child("app", &served.options.state);
    let mut faults = served.faults();
    until("the program computes", || {
        let clients = faults.clients().expect("it is served");
        clients.first().is_some_and(|client| client.complete > 10)
    });
    let state = faults.clients().expect("it is served").remove(0);
    assert_eq!((state.pid, state.gpu, state.mps), (app.id(), 0, false));

    let set = host
        .list(app.id(), &gpu, Search::Since(mark))
        .expect("it has opened the GPU");
    assert_eq!((set.groups.len(), set.channels.len()), (1, 20));
    let slices = host.timeslices(&set).expect("it lives");
    assert_eq!(slices.usec, [2048]);
    host.set_timeslice(&set, 128).expect("it lives");
    let state = faults.clients().expect("it is served").remove(0);
    assert_eq!(state.timeslice_usec, 128);
    let sample = host.sample(&gpu).expect("the GPU is there");
    assert!(sample.memory_used > 3 << 30);

    app.kill().expect("it is ours");
    app.wait().expect("it is ours");
    until("its context is gone", || {
        faults.clients().expect("it is served").is_empty()
    });
    assert_eq!(host.sample(&gpu).expect("the GPU is there").memory_used, 0);
    assert_eq!(host.timeslices(&set), Err(DeviceError::NoProcess(set.pid)));
}

#[test]
fn it_ends_when_its_directory_goes_and_serves_no_directory_twice() {
    let mut served = Served::start();
    assert!(matches!(serve(&served.options), Err(ServeError::Served(_))));
    let _client = served.engine();
    drop(served.directory.take());
    let thread = served.thread.take().expect("nobody has joined it");
    let ended = thread.join().expect("it does not panic");
    assert_eq!(ended.expect("it served"), Ended::Removed);
}

#[test]
fn it_ends_after_its_last_client_and_its_directory_can_be_served_again() {
    let directory = Directory::new();
    let options = SimOptions {
        linger: Duration::from_millis(300),
        ..SimOptions::new(directory.0.clone())
    };
    for _ in 0..2 {
        let own = options.clone();
        let thread = std::thread::spawn(move || serve(&own));
        let host = SimHost::open(&options.socket()).expect("it is being started");
        std::thread::sleep(Duration::from_millis(600));
        assert_eq!(host.gpus().expect("a client keeps it").len(), 1);
        let gone = Instant::now();
        drop(host);
        let ended = thread.join().expect("it does not panic");
        assert_eq!(ended.expect("it served"), Ended::Idle);
        assert!(gone.elapsed() >= Duration::from_millis(300));
        assert!(!options.socket().exists());
    }
}

#[test]
fn the_service_finds_a_host_that_was_started_anew() {
    let directory = Directory::new();
    let options = SimOptions::new(directory.0.clone());
    let mut first = child("serve", &directory.0);
    let host = SimHost::open(&options.socket()).expect("it is being started");
    let gpus = host.gpus().expect("it is served");
    first.kill().expect("it is ours");
    first.wait().expect("it is ours");
    assert!(matches!(host.gpus(), Err(DeviceError::NoDriver(_))));
    let mut second = child("serve", &directory.0);
    until("it is found again", || host.gpus() == Ok(gpus.clone()));
    second.kill().expect("it is ours");
    second.wait().expect("it is ours");
}

#[test]
fn an_idle_host_uses_no_time() {
    let directory = Directory::new();
    let mut process = child("serve", &directory.0);
    let host = SimHost::open(&SimOptions::new(directory.0.clone()).socket());
    let ticks = || {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", process.id()));
        let stat = stat.expect("it lives");
        // utime and stime are fields 14 and 15; the name in brackets is the second.
        let fields: Vec<_> = stat[stat.rfind(')').expect("ends the name")..]
            .split(' ')
            .collect();
        fields[12].parse::<u64>().expect("a number") + fields[13].parse::<u64>().expect("a number")
    };
    let before = ticks();
    std::thread::sleep(Duration::from_secs(2));
    let used = ticks() - before;
    assert!(host.is_ok());
    // A tick is 10 ms.
    assert!(used <= 1, "{used} ticks in 2 s");
    process.kill().expect("it is ours");
    process.wait().expect("it is ours");
}

#[test]
fn the_host_says_what_it_is() {
    let served = Served::start();
    let host = served.host();
    let gpu = first_gpu(&host);
    assert_eq!(gpu.name, "NVIDIA H200 (simulated)");
    assert_eq!(gpu.memory_bytes, 151_397_597_184);
    assert!(gpu.uuid.starts_with("GPU-5113"));
    assert!(host.describe().contains("simulated"));
    assert_eq!(host.slots(), Ok(48));
    let address = host.worker_address(&gpu);
    let socket = served.options.socket();
    assert_eq!(address, format!("sim:0:{}", socket.display()));
    let mode = std::fs::metadata(&socket).expect("it is served").mode();
    assert_eq!(mode & 0o777, 0o666, "workers are other users");
    let other = GpuInfo { index: 1, ..gpu };
    assert_eq!(host.sample(&other), Err(DeviceError::NoGpu(1)));
}

#[test]
fn a_lost_mps_server_takes_its_clients_along() {
    let served = Served::start();
    let host = served.host();
    let mut server = host
        .start(&first_gpu(&host), Path::new("/nonexistent"))
        .expect("there is MPS");
    let token = server.environment().remove(0).1;
    let mut engine =
        SimEngine::open_with(&served.options.socket(), 0, Some(&token)).expect("there is a slot");
    engine.prepare(&plan(Form::Sliced)).expect("it fits");
    engine.submit(u64::MAX, 1).expect("it is prepared");
    assert!(server.is_alive());
    served.faults().lose_mps(0).expect("it is served");
    assert!(!server.is_alive());
    assert!(readable(&engine, PATIENCE));
    assert!(matches!(engine.poll(), Err(EngineError::Failed(_))));
    assert!(matches!(engine.raise_stop(), Err(EngineError::Failed(_))));
    let again = SimEngine::open_with(&served.options.socket(), 0, Some(&token));
    assert!(matches!(again.err(), Some(EngineError::Failed(_))));
}

#[test]
fn a_hanging_call_holds_up_no_other_and_is_done_when_the_fault_is_cleared() {
    let served = Served::start();
    let host = served.host();
    let mut engine = served.engine();
    let mut faults = served.faults();
    let fault = faults
        .set(FaultSpec {
            operation: Operation::Place,
            scope: Scope::Process(std::process::id()),
            effect: Effect::Hang,
            hits: None,
        })
        .expect("it fits the operation");
    let placement = Placement {
        groups: Some(vec![0]),
        stream_priority: 0,
    };
    std::thread::scope(|scope| {
        let hanging = scope.spawn(|| engine.place(&placement));
        until("it hangs", || faults.hits(fault) == Ok(1));
        assert_eq!(host.gpus().expect("not held up").len(), 1);
        // Longer than the deadline of a call that nobody holds back.
        std::thread::sleep(Duration::from_millis(5_500));
        assert!(!hanging.is_finished());
        faults.clear(fault).expect("it is served");
        assert_eq!(hanging.join().expect("it does not panic"), Ok(8));
    });
}

#[test]
fn calls_fail_as_often_and_with_what_was_asked() {
    let served = Served::start();
    let host = served.host();
    let denied = Refused::Denied("for a test".to_owned());
    let effect = Effect::Fail(Failure::Service(denied.clone()));
    served.set(Operation::Mark, effect, Some(2));
    for _ in 0..2 {
        assert_eq!(host.mark(), Err(DeviceError::from(denied.clone())));
    }
    host.mark().expect("the fault is over");

    let mut engine = served.engine();
    let no_slot = EngineError::NoSlot("for a test".to_owned());
    let effect = Effect::Fail(Failure::Worker(no_slot.clone()));
    served.set(Operation::Prepare, effect, Some(1));
    assert_eq!(engine.prepare(&plan(Form::Sliced)), Err(no_slot));
    engine
        .prepare(&plan(Form::Sliced))
        .expect("the fault is over");

    let broken = EngineError::Failed("for a test".to_owned());
    let effect = Effect::Fail(Failure::Worker(broken.clone()));
    served.set(Operation::Submit, effect, Some(1));
    engine.submit(1, 1).expect("it shows later");
    assert!(readable(&engine, PATIENCE));
    assert_eq!(engine.poll(), Err(broken.clone()));
    assert_eq!(engine.submit(2, 1), Err(broken));
}

#[test]
fn a_cut_connection_and_a_lost_gpu_end_a_worker() {
    let served = Served::start();
    let host = served.host();
    let mut faults = served.faults();
    let mut cut = served.engine();
    faults
        .cut_process(std::process::id())
        .expect("it is served");
    assert!(readable(&cut, PATIENCE));
    assert!(matches!(cut.poll(), Err(EngineError::Failed(_))));

    let mut lost = served.engine();
    let gpu = first_gpu(&host);
    faults.lose_gpu(0).expect("it is served");
    assert!(readable(&lost, PATIENCE));
    assert!(matches!(lost.poll(), Err(EngineError::Failed(_))));
    assert_eq!(host.sample(&gpu), Err(DeviceError::NoGpu(0)));
    assert_eq!(host.gpus(), Ok(vec![]));
    faults.restore_gpu(0).expect("it is served");
    faults.raise_xids(0, 2).expect("it is served");
    assert_eq!(host.sample(&gpu).expect("it is back").xids, 3);
}

#[test]
fn nonsense_on_the_socket_ends_its_sender_only() {
    use rustix::net::{
        AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketType, connect, recv, send,
        socket,
    };
    let served = Served::start();
    let host = served.host();
    for packet in [&b"{\"open\":"[..], &[0xff; 1000][..], &[b' '; 200_000][..]] {
        let rogue = socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).expect("a socket");
        let address = SocketAddrUnix::new(served.options.socket()).expect("a short path");
        connect(&rogue, &address).expect("it is served");
        send(&rogue, packet, SendFlags::NOSIGNAL).expect("it is connected");
        let mut buffer = [0_u8; 16];
        let (received, _) = recv(&rogue, &mut buffer[..], RecvFlags::empty()).unwrap_or((0, 0));
        assert_eq!(received, 0, "it was answered");
    }
    assert_eq!(host.gpus().expect("it lives").len(), 1);
}
