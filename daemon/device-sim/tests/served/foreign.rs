//! Programs of others and their control, from outside: real processes, and the
//! host as the service uses it.

use std::time::{Duration, Instant};

use gcgroup_device::{
    ChannelSet, Channels, Counters, DeviceError, GpuInfo, Launches, ProcessKind, Search, Telemetry,
};
use gcgroup_device_sim::{
    ClientState, Effect, Failure, FaultClient, FaultSpec, Operation, Refused, Scope, SimHost,
};

use crate::harness::{App, Served, first_gpu, until};

fn states(faults: &mut FaultClient, pid: u32) -> Vec<ClientState> {
    let mut clients = faults.clients().expect("it is served");
    clients.retain(|client| client.pid == pid);
    clients
}

fn state(faults: &mut FaultClient, pid: u32) -> ClientState {
    states(faults, pid).pop().expect("it has a context")
}

fn list(host: &SimHost, app: &App) -> ChannelSet {
    host.list(app.pid(), &first_gpu(host), Search::Anew)
        .expect("it has a context")
}

/// Launches that end within a time, of each program.
fn ended_within(faults: &mut FaultClient, apps: &[&App], time: Duration) -> Vec<u64> {
    let complete = |faults: &mut FaultClient| -> Vec<_> {
        let apps = apps.iter();
        apps.map(|app| state(faults, app.pid()).complete).collect()
    };
    let before = complete(faults);
    std::thread::sleep(time);
    let after = complete(faults).into_iter();
    after.zip(before).map(|(now, then)| now - then).collect()
}

fn fault(operation: Operation, pid: u32, effect: Effect) -> FaultSpec {
    FaultSpec {
        operation,
        scope: Scope::Process(pid),
        effect,
        hits: None,
    }
}

fn elapsed(call: impl FnOnce()) -> Duration {
    let started = Instant::now();
    call();
    started.elapsed()
}

#[test]
fn two_programs_stop_in_one_call_while_a_third_runs_and_go_on_when_resumed() {
    let served = Served::start();
    let (host, mut faults) = (served.host(), served.faults());
    let gpu = first_gpu(&host);
    let apps = [0, 1, 2].map(|_| App::begun(&served, ""));
    let sets = [list(&host, &apps[0]), list(&host, &apps[1])];
    assert_eq!(sets[0].channels.len(), 20);
    assert!(
        !sets[0]
            .channels
            .iter()
            .any(|h| sets[1].channels.contains(h))
    );

    let took = elapsed(|| host.stop(&gpu, &sets).expect("they live"));
    assert!(took >= Duration::from_micros(950), "{took:?}");
    for (app, stands) in apps.iter().zip([true, true, false]) {
        let state = state(&mut faults, app.pid());
        assert_eq!(state.channels_stopped, stands);
        assert_eq!(state.disabled_channels, if stands { 20 } else { 0 });
    }
    let all = [&apps[0], &apps[1], &apps[2]];
    let ended = ended_within(&mut faults, &all, Duration::from_millis(200));
    assert_eq!(ended[..2], [0, 0]);
    // A kernel lasts half a millisecond; a machine may be busy.
    assert!(ended[2] > 100, "{ended:?}");

    let took = elapsed(|| host.resume(&gpu, &sets).expect("they live"));
    assert!(took >= Duration::from_micros(470), "{took:?}");
    let ended = ended_within(&mut faults, &all, Duration::from_millis(200));
    assert!(ended.iter().all(|ended| *ended > 10), "{ended:?}");
}

#[test]
fn who_was_stopped_stays_so_when_the_service_dies_and_another_resumes_it() {
    let served = Served::start();
    let (host, mut faults) = (served.host(), served.faults());
    let app = App::begun(&served, "");
    let gpu = first_gpu(&host);
    let set = list(&host, &app);
    host.stop(&gpu, std::slice::from_ref(&set))
        .expect("it lives");
    let noted = serde_json::to_string(&set).expect("plain data");
    drop(host);
    let stands = ended_within(&mut faults, &[&app], Duration::from_millis(100));
    assert_eq!(stands, [0]);
    assert!(state(&mut faults, app.pid()).channels_stopped);

    let noted: ChannelSet = serde_json::from_str(&noted).expect("what was written");
    assert_eq!(noted, set);
    let host = served.host();
    host.resume(&gpu, &[noted]).expect("handles are enough");
    let state = state(&mut faults, app.pid());
    assert_eq!(
        (state.channels_stopped, state.disabled_channels),
        (false, 0)
    );
    until("it goes on", || {
        ended_within(&mut faults, &[&app], Duration::from_millis(20))[0] > 0
    });
}

#[test]
fn a_stop_is_done_while_its_caller_still_waits() {
    let served = Served::with(|options| options.channel_latency.stop_us = 400_000);
    let (host, mut faults) = (served.host(), served.faults());
    let app = App::begun(&served, "");
    let (gpu, set) = (first_gpu(&host), list(&host, &app));
    std::thread::scope(|scope| {
        let stop = scope.spawn(|| elapsed(|| host.stop(&gpu, &[set]).expect("it lives")));
        until("it stands", || {
            state(&mut faults, app.pid()).channels_stopped
        });
        assert!(!stop.is_finished());
        assert_eq!(host.gpus().expect("not held up").len(), 1);
        let took = stop.join().expect("it does not panic");
        assert!(took >= Duration::from_millis(400), "{took:?}");
    });
}

#[test]
fn a_stopped_program_that_is_killed_leaves_nothing_and_a_stop_of_it_names_the_handle() {
    let served = Served::start();
    let (host, mut faults) = (served.host(), served.faults());
    let mut app = App::begun(&served, "");
    let (gpu, set) = (first_gpu(&host), list(&host, &app));
    let sets = [set];
    host.stop(&gpu, &sets).expect("it lives");
    app.kill();
    until("its memory is free", || {
        host.sample(&gpu).expect("the GPU is there").memory_used == 0
    });
    assert_eq!(states(&mut faults, app.pid()), []);
    let channel = sets[0].channels[0];
    let Err(DeviceError::Failed(text)) = host.stop(&gpu, &sets) else {
        panic!("its channels are gone");
    };
    assert!(text.contains(&format!("{:#x}", channel.object)), "{text}");
    assert!(text.contains(&format!("{:#x}", channel.client)), "{text}");
    host.resume(&gpu, &sets).expect("harmless");
    let listed = host.list(app.pid(), &gpu, Search::Anew);
    assert_eq!(listed, Err(DeviceError::NoProcess(app.pid())));
}

#[test]
fn a_client_that_refuses_and_a_call_that_hangs_concern_themselves_only() {
    let served = Served::start();
    let (host, mut faults) = (served.host(), served.faults());
    let apps = [0, 1].map(|_| App::begun(&served, "idle"));
    let gpu = first_gpu(&host);
    let sets = [list(&host, &apps[0]), list(&host, &apps[1])];
    let refused = Refused::Denied("for a test".to_owned());
    let denies = Effect::Fail(Failure::Service(refused.clone()));
    let denied = Err(DeviceError::from(refused));
    for operation in [Operation::List, Operation::Stop, Operation::CountLaunches] {
        let spec = fault(operation, apps[0].pid(), denies.clone());
        faults.set(spec).expect("it fits the operation");
    }
    assert_eq!(host.stop(&gpu, &sets), denied, "one of them refuses");
    assert_eq!(state(&mut faults, apps[1].pid()).disabled_channels, 0);
    assert_eq!(
        host.list(apps[0].pid(), &gpu, Search::Recent).map(drop),
        denied
    );
    assert_eq!(host.count_launches(apps[0].pid()).map(drop), denied);
    host.stop(&gpu, &sets[1..]).expect("it refuses nothing");
    host.resume(&gpu, &sets[1..]).expect("it refuses nothing");
    faults.clear_all().expect("it is served");

    let hang = fault(Operation::Stop, apps[0].pid(), Effect::Hang);
    let hang = faults.set(hang).expect("it fits the operation");
    std::thread::scope(|scope| {
        let hanging = scope.spawn(|| host.stop(&gpu, &sets[..1]));
        until("it hangs", || faults.hits(hang) == Ok(1));
        host.stop(&gpu, &sets[1..]).expect("not held up");
        assert_eq!(state(&mut faults, apps[0].pid()).disabled_channels, 0);
        assert!(!hanging.is_finished());
        faults.clear(hang).expect("it is served");
        hanging.join().expect("no panic").expect("it is done now");
        assert_eq!(state(&mut faults, apps[0].pid()).disabled_channels, 20);
    });
}

#[test]
fn processes_are_listed_with_their_kind_and_memory() {
    let served = Served::with(|options| options.gpus = 2);
    let host = served.host();
    let gpus = host.gpus().expect("it is served");
    let mut app = App::begun(&served, "idle");
    let server = App::begun(&served, "idle mps-server");
    app.obey("open 1");
    app.obey("memory 1G");
    let on = |gpu: &GpuInfo| {
        let mut processes = host.processes(gpu).expect("the GPU is there");
        processes.sort_by_key(|process| process.kind == ProcessKind::MpsServer);
        processes
    };
    let first = on(&gpus[0]);
    let kinds: Vec<_> = first.iter().map(|line| (line.pid, line.kind)).collect();
    assert_eq!(
        kinds,
        [
            (app.pid(), ProcessKind::Program),
            (server.pid(), ProcessKind::MpsServer)
        ]
    );
    assert!(first[0].memory_bytes > Some(3 << 30));
    let second = on(&gpus[1]);
    assert_eq!((second.len(), second[0].pid), (1, app.pid()));
    let memory = second[0].memory_bytes.expect("it is known");
    assert!((1 << 30..2 << 30).contains(&memory), "{memory}");
    // What it has on one GPU is not on the other.
    let sets = [0, 1].map(|gpu| {
        host.list(app.pid(), &gpus[gpu], Search::Anew)
            .expect("it has")
    });
    assert_ne!(sets[0].channels[0].client, sets[1].channels[0].client);
    host.stop(&gpus[0], &sets[..1]).expect("it lives");
    let stands = states(&mut served.faults(), app.pid());
    let stands: Vec<_> = stands.iter().map(|s| (s.gpu, s.channels_stopped)).collect();
    assert_eq!(stands, [(0, true), (1, false)]);
    let lost = GpuInfo {
        index: 2,
        ..gpus[0].clone()
    };
    assert_eq!(host.processes(&lost), Err(DeviceError::NoGpu(2)));
}

#[test]
fn launches_are_counted_exactly_from_when_it_was_asked() {
    let served = Served::start();
    let host = served.host();
    let mut app = App::begun(&served, "idle");
    app.obey("graph 7");
    let mut counter = host.count_launches(app.pid()).expect("it lives");
    app.obey("graph 1000");
    app.obey("open 0");
    app.obey("go");
    until("both contexts launch", || {
        counter.read().expect("it lives").total > 1100
    });
    app.obey("pause");
    app.obey("close");
    let counted = counter.read().expect("it lives");
    assert_eq!(counted.graphs, 1000);
    let line = app.tell("count");
    let words: Vec<_> = line.split(' ').collect();
    let (launched, graphs) = (words[1].parse::<u64>(), words[3].parse::<u64>());
    assert_eq!((launched, graphs), (Ok(counted.total + 7), Ok(1007)));
    let mut second = host.count_launches(app.pid()).expect("it lives");
    assert_eq!(second.read(), Ok(Launches::default()));
    app.kill();
    assert_eq!(counter.read(), Err(DeviceError::NoProcess(app.pid())));
    let gone = host.count_launches(app.pid()).map(drop);
    assert_eq!(gone, Err(DeviceError::NoProcess(app.pid())));
}

#[test]
fn a_program_obeys_a_line_at_a_time_and_goes_on_without_anybody() {
    let served = Served::start();
    let (host, mut faults) = (served.host(), served.faults());
    let mut app = App::begun(&served, "");
    let pid = app.pid();
    app.obey("group");
    assert_eq!(
        (
            list(&host, &app).groups.len(),
            state(&mut faults, pid).groups
        ),
        (2, 5)
    );
    app.obey("ungroup");
    let answer = app.tell("ungroup");
    assert!(answer.starts_with("error: "), "{answer}");
    assert!(answer.ends_with("no channel group was added"), "{answer}");
    app.obey("open 0");
    assert_eq!(states(&mut faults, pid).len(), 2);
    assert_eq!(list(&host, &app).channels.len(), 40);
    let answer = app.tell("open 1");
    assert!(answer.starts_with("error: "), "{answer}");
    let answer = app.tell("launch");
    assert!(
        answer.starts_with("error: \"launch\" is none of: open GPU, "),
        "{answer}"
    );
    let answer = app.tell("memory 1T");
    assert!(answer.starts_with("error: "), "{answer}");
    app.obey("pause");
    until("all have ended", || {
        states(&mut faults, pid)
            .iter()
            .all(|client| client.in_flight == 0)
    });
    assert!(
        states(&mut faults, pid)
            .iter()
            .all(|client| client.complete > 0)
    );
    app.obey("close");
    app.obey("close");
    assert_eq!(states(&mut faults, pid), []);
    let (gpu, search) = (first_gpu(&host), Search::Recent);
    let none = host.list(pid, &gpu, search);
    let expected = format!("process {pid} has opened no channel group on GPU 0");
    assert_eq!(none, Err(DeviceError::NoContext(expected)));
    assert_eq!(app.tell("close"), "error: no context is open");
    app.obey("open 0");
    app.hang_up();
    app.process.try_wait().expect("it is ours");
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(app.process.try_wait().expect("it is ours"), None);
    assert_eq!(states(&mut faults, pid).len(), 1);

    let mut other = App::begun(&served, "");
    other.obey("quit");
    assert!(other.process.wait().expect("it is ours").success());
}

#[test]
fn a_program_opens_the_gpu_later_or_launches_nothing_until_it_is_told() {
    let served = Served::start();
    let mut faults = served.faults();
    let started = Instant::now();
    let mut later = App::start(&served, "later 400");
    assert_eq!(later.tell("count"), "launched 0 graphs 0 ended 0");
    let line = later.line();
    assert!(line.contains("runs kernels"), "{line}");
    assert!(started.elapsed() >= Duration::from_millis(400));

    let mut idle = App::begun(&served, "idle");
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(state(&mut faults, idle.pid()).launched, 0);
    idle.obey("go");
    until("it launches", || {
        state(&mut faults, idle.pid()).complete > 0
    });
}

#[test]
fn children_do_the_same_and_end_with_their_parent() {
    let served = Served::start();
    let mut faults = served.faults();
    let mut app = App::start(&served, "children 2");
    let children = [0, 1].map(|_| {
        let line = app.line();
        let pid = line.strip_prefix("child ").expect("it says who they are");
        pid.parse::<u32>().expect("a process id")
    });
    assert!(app.line().contains("runs kernels"));
    until("all three run", || {
        [app.pid(), children[0], children[1]]
            .iter()
            .all(|&pid| states(&mut faults, pid).iter().any(|c| c.complete > 0))
    });
    assert_eq!(faults.clients().expect("it is served").len(), 3);
    app.kill();
    until("they ended as well", || {
        faults.clients().expect("it is served").is_empty()
    });
}

#[test]
fn a_search_for_what_is_recent_misses_what_is_far_and_keeps_what_is_gone() {
    let served = Served::start();
    let host = served.host();
    let mut app = App::begun(&served, "idle");
    let gpu = first_gpu(&host);
    let pid = app.pid();
    let found = |search| {
        let set = host.list(pid, &gpu, search).expect("it has a context");
        assert!(set.groups.is_sorted() && set.channels.is_sorted());
        (set.groups.len(), set.channels.len())
    };
    assert_eq!(
        found(Search::Next),
        (1, 20),
        "the first looks everything up"
    );
    app.obey("group");
    assert_eq!(found(Search::Next), (2, 28));
    app.obey("channel");
    assert_eq!(found(Search::Next), (2, 29));
    // A few handles were used and freed: too many for one, not for the other.
    for _ in 0..2 {
        app.obey("group");
        app.obey("ungroup");
    }
    app.obey("group");
    assert_eq!(found(Search::Next), (2, 29));
    assert_eq!(found(Search::Recent), (3, 37));
    app.obey("ungroup");
    assert_eq!(found(Search::Anew), (2, 29));
    app.obey("group far");
    for search in [Search::Next, Search::Recent] {
        assert_eq!(found(search), (2, 29));
    }
    assert_eq!(found(Search::Anew), (3, 37));
    app.obey("channel");
    assert_eq!(
        found(Search::Recent),
        (3, 38),
        "right behind what was found"
    );
    app.obey("ungroup");
    assert_eq!(found(Search::Recent), (3, 38));
    assert_eq!(found(Search::Anew), (2, 29));
    // A new client has everything looked up.
    app.obey("group far");
    app.obey("open 0");
    assert_eq!(found(Search::Next), (4, 57));
    app.obey("close");
    assert_eq!(found(Search::Next), (3, 37), "and so has one that is gone");
    // Another service begins with nothing.
    let set = served.host().list(pid, &gpu, Search::Recent);
    assert_eq!(set.expect("it has a context").channels.len(), 37);
}

#[test]
fn a_channel_of_a_stopped_group_is_stopped_until_somebody_resumes_it() {
    let served = Served::start();
    let (host, mut faults) = (served.host(), served.faults());
    let mut app = App::begun(&served, "");
    let (gpu, set) = (first_gpu(&host), list(&host, &app));
    app.obey("channel");
    assert_eq!(state(&mut faults, app.pid()).disabled_channels, 0);
    let before = list(&host, &app);
    assert_eq!(before.beyond(&set).channels.len(), 1);
    host.stop(&gpu, std::slice::from_ref(&before))
        .expect("all are there");
    app.obey("channel");
    assert_eq!(state(&mut faults, app.pid()).disabled_channels, 22);
    host.resume(&gpu, &[before]).expect("all are there");
    assert_eq!(state(&mut faults, app.pid()).disabled_channels, 1);
    host.resume(&gpu, &[list(&host, &app)])
        .expect("all are there");
    assert_eq!(state(&mut faults, app.pid()).disabled_channels, 0);
}

#[test]
fn a_resume_that_names_what_is_gone_resumes_the_others_whatever_it_says() {
    let served = Served::start();
    let (host, mut faults) = (served.host(), served.faults());
    let mut app = App::begun(&served, "");
    let gpu = first_gpu(&host);
    app.obey("group");
    let sets = [list(&host, &app)];
    let refused = Refused::Failed("for a test".to_owned());
    let fails = Effect::Fail(Failure::Service(refused.clone()));
    let spec = fault(Operation::ResumeGone, app.pid(), fails);
    let id = faults.set(spec).expect("it fits the operation");
    host.stop(&gpu, &sets).expect("all are there");
    host.resume(&gpu, &sets).expect("nothing is gone");
    host.stop(&gpu, &sets).expect("all are there");
    app.obey("ungroup");
    assert_eq!(host.resume(&gpu, &sets), Err(refused.into()));
    assert_eq!(faults.hits(id), Ok(1));
    assert_eq!(state(&mut faults, app.pid()).disabled_channels, 0);
    faults.clear_all().expect("it is served");
    host.resume(&gpu, &sets).expect("harmless");
}
