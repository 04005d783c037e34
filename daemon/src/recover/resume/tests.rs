//! Resuming on a host that refuses, hangs and forgets.

use super::*;

use std::collections::BTreeSet;
use std::process::{Child, Command};

use gcgroup_device::{ClientMark, GpuProcess, GpuSample, Handle, ProcessKind, Timeslices};
use parking_lot::Mutex;

use crate::journal::Helper;

/// Short enough for a test, long enough for a busy machine.
const PATIENCE: Duration = Duration::from_secs(2);
/// As good as forever.
const HANG: Duration = Duration::from_secs(60);

/// What a process has on the host.
#[derive(Clone, Debug, Default)]
struct State {
    channels: BTreeSet<Handle>,
    stopped: BTreeSet<Handle>,
    /// Resumes that name it and are refused from now on.
    refusals: usize,
    /// Whether a resume that names it never returns.
    hangs: bool,
    /// What listing it fails with.
    unlisted: Option<DeviceError>,
}

#[derive(Debug, Default)]
struct Fake {
    processes: Mutex<BTreeMap<u32, State>>,
    gpus: Vec<GpuInfo>,
    /// Pids of each resume, and the index of the GPU as it was called.
    calls: Mutex<Vec<(u32, Vec<u32>)>>,
}

impl Fake {
    fn new() -> Self {
        Self {
            gpus: vec![gpu(3)],
            ..Self::default()
        }
    }

    fn is_stopped(&self, pid: u32) -> bool {
        !self.processes.lock()[&pid].stopped.is_empty()
    }

    /// Adds a process of which `known` is in the journal and `now` is there, all
    /// of it stopped.
    fn add(&self, process: &Process, known: &[u32], now: &[u32]) -> Armed {
        let handles: BTreeSet<Handle> = now.iter().map(|&object| handle(object)).collect();
        let state = State {
            stopped: handles.clone(),
            channels: handles,
            ..State::default()
        };
        let pid = process.helper.pid;
        self.processes.lock().insert(pid, state);
        Armed {
            process: process.helper,
            // The index has changed since.
            gpu: ArmedGpu {
                index: 0,
                uuid: gpu(3).uuid,
            },
            set: ChannelSet {
                pid,
                groups: Vec::new(),
                channels: known.iter().map(|&object| handle(object)).collect(),
            },
        }
    }

    fn change(&self, armed: &Armed, change: impl FnOnce(&mut State)) {
        let mut processes = self.processes.lock();
        change(processes.entry(armed.process.pid).or_default());
    }
}

impl Telemetry for Fake {
    fn gpus(&self) -> Result<Vec<GpuInfo>, DeviceError> {
        Ok(self.gpus.clone())
    }

    fn sample(&self, gpu: &GpuInfo) -> Result<GpuSample, DeviceError> {
        Err(DeviceError::NoGpu(gpu.index))
    }

    fn processes(&self, _gpu: &GpuInfo) -> Result<Vec<GpuProcess>, DeviceError> {
        let process = |(&pid, state): (&u32, &State)| {
            (!state.channels.is_empty()).then_some(GpuProcess {
                pid,
                kind: ProcessKind::Program,
                memory_bytes: None,
            })
        };
        Ok(self.processes.lock().iter().filter_map(process).collect())
    }
}

impl Channels for Fake {
    fn mark(&self) -> Result<ClientMark, DeviceError> {
        Ok(ClientMark(0))
    }

    fn list(&self, pid: u32, _gpu: &GpuInfo, search: Search) -> Result<ChannelSet, DeviceError> {
        assert_eq!(search, Search::Anew);
        let state = self.processes.lock()[&pid].clone();
        if let Some(error) = state.unlisted {
            return Err(error);
        }
        if state.channels.is_empty() {
            return Err(DeviceError::Failed("no channels were found".to_owned()));
        }
        Ok(ChannelSet {
            pid,
            groups: Vec::new(),
            channels: state.channels.into_iter().collect(),
        })
    }

    fn timeslices(&self, _set: &ChannelSet) -> Result<Timeslices, DeviceError> {
        Ok(Timeslices { usec: Vec::new() })
    }

    fn set_timeslice(&self, set: &ChannelSet, _usec: u64) -> Result<Timeslices, DeviceError> {
        self.timeslices(set)
    }

    fn stop(&self, _gpu: &GpuInfo, _sets: &[ChannelSet]) -> Result<(), DeviceError> {
        Ok(())
    }

    fn resume(&self, gpu: &GpuInfo, sets: &[ChannelSet]) -> Result<(), DeviceError> {
        let pids: Vec<u32> = sets.iter().map(|set| set.pid).collect();
        self.calls.lock().push((gpu.index, pids));
        let hangs = |set: &ChannelSet| self.processes.lock()[&set.pid].hangs;
        if sets.iter().any(hangs) {
            thread::sleep(HANG);
        }
        let mut processes = self.processes.lock();
        for set in sets {
            let state = processes.entry(set.pid).or_default();
            if state.refusals > 0 {
                state.refusals -= 1;
                return Err(DeviceError::Failed("refused".to_owned()));
            }
            for channel in &set.channels {
                if !state.channels.contains(channel) {
                    return Err(DeviceError::Failed("a channel is gone".to_owned()));
                }
                state.stopped.remove(channel);
            }
        }
        Ok(())
    }
}

/// A process that lives until it is dropped.
struct Process {
    child: Child,
    helper: Helper,
}

impl Process {
    fn new() -> Self {
        let child = Command::new("sleep").arg("60").spawn();
        let child = child.expect("sleep(1) exists");
        let pid = child.id();
        let start = procfs::start_time(pid).expect("it runs");
        Self {
            child,
            helper: Helper { pid, start },
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.child.kill().expect("it is ours");
        self.child.wait().expect("it is ours");
    }
}

fn handle(object: u32) -> Handle {
    Handle { client: 1, object }
}

fn gpu(index: u32) -> GpuInfo {
    GpuInfo {
        index,
        uuid: format!("GPU-{index}"),
        name: "fake".to_owned(),
        memory_bytes: 0,
        refused: None,
    }
}

fn run(fake: &Arc<Fake>, armed: &[Armed]) -> Vec<Left> {
    let host = fake.clone();
    let open = move || Ok(Opened::Host(host.clone()));
    all(open, armed.to_vec(), PATIENCE)
}

#[test]
fn all_processes_of_a_gpu_resume_in_one_call_where_the_gpu_is_now() {
    let fake = Arc::new(Fake::new());
    let processes: Vec<Process> = (0..20).map(|_| Process::new()).collect();
    let add = |process| fake.add(process, &[1, 2], &[1, 2]);
    let armed: Vec<Armed> = processes.iter().map(add).collect();
    assert_eq!(run(&fake, &armed), []);
    let pids: Vec<u32> = processes.iter().map(|process| process.helper.pid).collect();
    assert!(pids.iter().all(|&pid| !fake.is_stopped(pid)));
    assert_eq!(*fake.calls.lock(), [(3, pids)]);
}

#[test]
fn channels_that_the_journal_lacks_resume_too() {
    let fake = Arc::new(Fake::new());
    let process = Process::new();
    let armed = fake.add(&process, &[1], &[1, 2, 3]);
    assert_eq!(run(&fake, &[armed]), []);
    assert!(!fake.is_stopped(process.helper.pid));
}

#[test]
fn channels_that_are_gone_hold_nobody_up() {
    let fake = Arc::new(Fake::new());
    let (stale, other) = (Process::new(), Process::new());
    let armed = [
        fake.add(&stale, &[1, 9], &[1, 2]),
        fake.add(&other, &[1, 2], &[1, 2]),
    ];
    let begun = Instant::now();
    assert_eq!(run(&fake, &armed), []);
    assert!(begun.elapsed() < PATIENCE);
    assert!(!fake.is_stopped(stale.helper.pid));
    assert!(!fake.is_stopped(other.helper.pid));
}

#[test]
fn a_resume_that_hangs_is_left_and_the_others_run() {
    let fake = Arc::new(Fake::new());
    let processes: Vec<Process> = (0..5).map(|_| Process::new()).collect();
    let add = |process| fake.add(process, &[1], &[1]);
    let armed: Vec<Armed> = processes.iter().map(add).collect();
    fake.change(&armed[2], |state| state.hangs = true);
    let begun = Instant::now();
    let waiting = {
        let (fake, armed) = (fake.clone(), armed.clone());
        thread::spawn(move || run(&fake, &armed))
    };
    let others = || {
        let others = processes.iter().enumerate().filter(|(at, _)| *at != 2);
        others.map(|(_, process)| process.helper.pid)
    };
    while others().any(|pid| fake.is_stopped(pid)) && begun.elapsed() < PATIENCE {
        thread::sleep(Duration::from_millis(5));
    }
    assert!(begun.elapsed() < PATIENCE, "the others waited for it");
    let left = waiting.join().expect("it returned");
    assert!(begun.elapsed() < PATIENCE + Duration::from_secs(2));
    assert_eq!(left.len(), 1);
    assert_eq!(left[0].armed, armed[2]);
    assert!(left[0].why.contains("not answered"), "{}", left[0].why);
}

#[test]
fn a_resume_that_fails_is_tried_again_and_then_reported() {
    let fake = Arc::new(Fake::new());
    let (late, never) = (Process::new(), Process::new());
    let armed = [fake.add(&late, &[1], &[1]), fake.add(&never, &[1], &[1])];
    fake.change(&armed[0], |state| state.refusals = 5);
    fake.change(&armed[1], |state| state.refusals = usize::MAX);
    let left = run(&fake, &armed);
    assert!(!fake.is_stopped(late.helper.pid));
    let why = "refused".to_owned();
    let armed = armed[1].clone();
    assert_eq!(left, [Left { armed, why }]);
}

fn busy() -> DeviceError {
    DeviceError::Failed("the driver is busy".to_owned())
}

#[test]
fn the_journals_channels_run_where_a_process_cannot_be_listed_but_it_is_left() {
    for (refusals, error) in [(0, busy()), (3, DeviceError::NoProcess(7))] {
        let fake = Arc::new(Fake::new());
        let process = Process::new();
        let armed = fake.add(&process, &[1, 2], &[1, 2]);
        fake.change(&armed, |state| {
            state.unlisted = Some(error.clone());
            state.refusals = refusals;
        });
        let left = run(&fake, std::slice::from_ref(&armed));
        assert!(!fake.is_stopped(process.helper.pid));
        let why = format!("its channels could not be listed: {error}");
        assert_eq!(left, [Left { armed, why }]);
    }
}

#[test]
fn channels_that_the_journal_lacks_resume_as_soon_as_they_are_listed() {
    let fake = Arc::new(Fake::new());
    let process = Process::new();
    let armed = fake.add(&process, &[1], &[1, 2, 3]);
    fake.change(&armed, |state| state.unlisted = Some(busy()));
    let listed_again = {
        let (fake, armed) = (fake.clone(), armed.clone());
        thread::spawn(move || {
            thread::sleep(PATIENCE * 3 / 4);
            fake.change(&armed, |state| state.unlisted = None);
        })
    };
    assert_eq!(run(&fake, &[armed]), []);
    listed_again.join().expect("it slept");
    assert!(!fake.is_stopped(process.helper.pid));
}

#[test]
fn who_has_no_channels_is_not_left_once_those_of_the_journal_run() {
    let none = DeviceError::NoContext("it has no channels".to_owned());
    for refusals in [0, 3] {
        let fake = Arc::new(Fake::new());
        let process = Process::new();
        let armed = fake.add(&process, &[1], &[1]);
        fake.change(&armed, |state| {
            state.unlisted = Some(none.clone());
            state.refusals = refusals;
        });
        let begun = Instant::now();
        assert_eq!(run(&fake, &[armed]), []);
        assert!(begun.elapsed() < PATIENCE);
        assert!(!fake.is_stopped(process.helper.pid));
    }
    let fake = Arc::new(Fake::new());
    let process = Process::new();
    let armed = fake.add(&process, &[1], &[1]);
    fake.change(&armed, |state| {
        state.unlisted = Some(none);
        state.refusals = usize::MAX;
    });
    let left = run(&fake, std::slice::from_ref(&armed));
    let why = "refused".to_owned();
    assert_eq!(left, [Left { armed, why }]);
}

#[test]
fn who_has_left_the_gpu_is_not_stopped() {
    let fake = Arc::new(Fake::new());
    let process = Process::new();
    let armed = fake.add(&process, &[1, 2], &[]);
    let begun = Instant::now();
    assert_eq!(run(&fake, &[armed]), []);
    assert!(begun.elapsed() < PATIENCE);
}

#[test]
fn who_ends_meanwhile_is_not_left() {
    let fake = Arc::new(Fake::new());
    let process = Process::new();
    let armed = fake.add(&process, &[1], &[1]);
    fake.change(&armed, |state| state.refusals = usize::MAX);
    let ends = thread::spawn(move || {
        thread::sleep(PATIENCE / 4);
        drop(process);
    });
    assert_eq!(run(&fake, std::slice::from_ref(&armed)), []);
    ends.join().expect("it ended");
    fake.calls.lock().clear();
    assert_eq!(run(&fake, &[armed]), []);
    assert_eq!(*fake.calls.lock(), [], "nothing is asked for the dead");
}

#[test]
fn a_lost_gpu_keeps_nobody_and_is_asked_all_the_same() {
    let fake = Arc::new(Fake {
        gpus: vec![gpu(1)],
        ..Fake::new()
    });
    let process = Process::new();
    let armed = fake.add(&process, &[1], &[1]);
    fake.change(&armed, |state| state.refusals = usize::MAX);
    assert_eq!(run(&fake, &[armed]), []);
    assert!(fake.calls.lock().iter().all(|(index, _)| *index == 0));
    assert!(!fake.calls.lock().is_empty());
}

#[test]
fn a_host_that_is_gone_has_stopped_nobody_and_one_that_fails_has() {
    let process = Process::new();
    let armed = Fake::new().add(&process, &[1], &[1]);
    let armed = std::slice::from_ref(&armed);
    assert_eq!(all(|| Ok(Opened::Gone), armed.to_vec(), PATIENCE), []);
    let open = || Err(DeviceError::NoDriver("a version mismatch".to_owned()));
    let left = all(open, armed.to_vec(), PATIENCE / 4);
    assert_eq!(left.len(), 1);
    assert!(left[0].why.contains("version mismatch"), "{}", left[0].why);
    let hangs = || {
        thread::sleep(HANG);
        Ok(Opened::Gone)
    };
    let left = all(hangs, armed.to_vec(), PATIENCE / 4);
    assert_eq!(left.len(), 1);
    assert!(left[0].why.contains("did not answer"), "{}", left[0].why);
}

#[test]
fn a_host_that_opens_late_is_waited_for() {
    let fake = Arc::new(Fake::new());
    let process = Process::new();
    let armed = fake.add(&process, &[1], &[1]);
    let (host, begun) = (fake.clone(), Instant::now());
    let open = move || {
        if begun.elapsed() < PATIENCE / 4 {
            return Err(DeviceError::NoDriver("not yet".to_owned()));
        }
        Ok(Opened::Host(host.clone()))
    };
    assert_eq!(all(open, vec![armed], PATIENCE), []);
    assert!(!fake.is_stopped(process.helper.pid));
}
