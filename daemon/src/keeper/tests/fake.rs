//! A driver whose processes are numbers, with failures on demand.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::thread;
use std::time::Duration;

use gcgroup_device::{
    ChannelSet, Channels, ClientMark, DeviceError, GpuInfo, Handle, Search, Timeslices,
};
use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::clock::now_ns;

/// What the driver sets by itself, microseconds.
pub(super) const DEFAULT_USEC: u64 = 2048;

/// A call that was made, or the note before the first stop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Did {
    Armed,
    Listed(Search),
    Read,
    Set(Vec<u32>, u64),
    Stopped(Vec<u32>),
    Resumed(Vec<u32>),
}

/// Kinds of calls, for those that are to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    List,
    Set,
    Stop,
    Resume,
}

/// Which calls hang.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hang {
    All,
    Listings,
}

#[derive(Default)]
struct Process {
    client: u32,
    groups: BTreeSet<u32>,
    channels: BTreeSet<u32>,
    /// What a recent listing takes for granted; `None` after a restore.
    remembered: Option<BTreeSet<u32>>,
    stopped: BTreeSet<u32>,
    slices: BTreeMap<u32, u64>,
    did: Vec<(u64, Did)>,
    fail: BTreeMap<Kind, VecDeque<DeviceError>>,
    hangs: Option<Hang>,
    /// Channels that it makes with each stop, and how often.
    grows: u32,
    ran_ns: u64,
    runs_since: u64,
}

impl Process {
    fn set(&self, channels: &BTreeSet<u32>) -> ChannelSet {
        let handles = |objects: &BTreeSet<u32>| {
            let handle = |object: &u32| Handle {
                client: self.client,
                object: *object,
            };
            objects.iter().map(handle).collect()
        };
        ChannelSet {
            pid: 0,
            groups: handles(&self.groups),
            channels: handles(channels),
        }
    }

    /// Whether some of its channels run; all of them do or none.
    fn runs(&self) -> bool {
        !self.channels.is_subset(&self.stopped)
    }

    fn failure(&mut self, kind: Kind) -> Option<DeviceError> {
        self.fail.get_mut(&kind)?.pop_front()
    }

    fn change(&mut self, change: impl FnOnce(&mut Self)) {
        let now = now_ns();
        if self.runs() {
            self.ran_ns += now - self.runs_since;
        }
        self.runs_since = now;
        change(self);
    }
}

#[derive(Default)]
pub(super) struct Fake {
    processes: Mutex<BTreeMap<u32, Process>>,
    changed: Condvar,
    /// How long a stop or a resume takes.
    cost: Duration,
}

fn failed(text: &str) -> DeviceError {
    DeviceError::Failed(text.to_owned())
}

fn objects(handles: &[Handle]) -> Vec<u32> {
    handles.iter().map(|handle| handle.object).collect()
}

impl Fake {
    pub(super) fn with_cost(cost: Duration) -> Self {
        Self {
            cost,
            ..Self::default()
        }
    }

    /// A process with one group and these channels.
    pub(super) fn spawn(&self, pid: u32, channels: &[u32]) {
        let process = Process {
            client: pid,
            groups: BTreeSet::from([1]),
            channels: channels.iter().copied().collect(),
            runs_since: now_ns(),
            ..Process::default()
        };
        self.processes.lock().insert(pid, process);
    }

    pub(super) fn end(&self, pid: u32) {
        self.processes.lock().remove(&pid);
    }

    fn with<T>(&self, pid: u32, use_it: impl FnOnce(&mut Process) -> T) -> T {
        let mut processes = self.processes.lock();
        use_it(processes.get_mut(&pid).expect("the test spawned it"))
    }

    pub(super) fn add_channel(&self, pid: u32, channel: u32) {
        self.with(pid, |process| {
            process.change(|process| process.channels.extend([channel]));
        });
    }

    /// One made within a stopped group, which stands.
    pub(super) fn add_stopped(&self, pid: u32, channel: u32) {
        self.with(pid, |process| {
            process.change(|process| {
                process.channels.insert(channel);
                process.stopped.insert(channel);
            });
        });
    }

    pub(super) fn add_group(&self, pid: u32, group: u32) {
        self.with(pid, |process| process.groups.insert(group));
    }

    pub(super) fn remove_channel(&self, pid: u32, channel: u32) {
        self.with(pid, |process| {
            process.channels.remove(&channel);
            process.stopped.remove(&channel);
        });
    }

    /// Makes everything new, as a checkpoint and restore does; the handles are
    /// so much higher.
    pub(super) fn restore(&self, pid: u32, higher: u32) {
        self.with(pid, |process| {
            process.change(|process| {
                let new = |old: &BTreeSet<u32>| old.iter().map(|object| object + higher).collect();
                process.client += higher;
                process.groups = new(&process.groups);
                process.channels = new(&process.channels);
                process.remembered = None;
                process.stopped.clear();
                process.slices.clear();
            });
        });
    }

    /// The next calls of this kind fail, in turn.
    pub(super) fn fail(&self, pid: u32, kind: Kind, times: usize) {
        let why = || failed("it was told to fail");
        self.fail_with(pid, kind, (0..times).map(|_| why()));
    }

    pub(super) fn fail_with(
        &self,
        pid: u32,
        kind: Kind,
        errors: impl IntoIterator<Item = DeviceError>,
    ) {
        self.with(pid, |process| {
            process.fail.entry(kind).or_default().extend(errors);
        });
    }

    /// Each of the next stops is followed by a new channel.
    pub(super) fn grow(&self, pid: u32, times: u32) {
        self.with(pid, |process| process.grows = times);
    }

    pub(super) fn hang(&self, pid: u32, hangs: Option<Hang>) {
        self.with(pid, |process| process.hangs = hangs);
        self.changed.notify_all();
    }

    pub(super) fn note_armed(&self, pid: u32) {
        self.with(pid, |process| process.did.push((now_ns(), Did::Armed)));
    }

    pub(super) fn did(&self, pid: u32) -> Vec<Did> {
        self.timed(pid).into_iter().map(|(_, did)| did).collect()
    }

    /// What was done, with the times.
    pub(super) fn timed(&self, pid: u32) -> Vec<(u64, Did)> {
        self.with(pid, |process| process.did.clone())
    }

    pub(super) fn forget(&self, pid: u32) {
        self.with(pid, |process| process.did.clear());
    }

    pub(super) fn is_stopped(&self, pid: u32) -> bool {
        self.with(pid, |process| !process.runs())
    }

    pub(super) fn nothing_is_stopped(&self, pid: u32) -> bool {
        self.with(pid, |process| process.stopped.is_empty())
    }

    pub(super) fn slice(&self, pid: u32, group: u32) -> u64 {
        self.with(pid, |process| {
            *process.slices.get(&group).unwrap_or(&DEFAULT_USEC)
        })
    }

    /// Time that it ran, nanoseconds.
    pub(super) fn ran_ns(&self, pid: u32) -> u64 {
        self.with(pid, |process| {
            process.change(|_| {});
            process.ran_ns
        })
    }

    /// The process, once it does not hang, with this call noted.
    fn call(&self, pid: u32, did: Did) -> Result<MutexGuard<'_, Processes>, DeviceError> {
        let mut processes = self.processes.lock();
        let process = processes.get_mut(&pid).ok_or(DeviceError::NoProcess(pid))?;
        let lists = matches!(did, Did::Listed(_));
        let hangs = |process: &Process| match process.hangs {
            Some(Hang::All) => true,
            Some(Hang::Listings) => lists,
            None => false,
        };
        process.did.push((now_ns(), did));
        while processes.get(&pid).is_some_and(hangs) {
            self.changed.wait(&mut processes);
        }
        Ok(processes)
    }

    /// What a stop or a resume does, in the middle of its time.
    fn take_effect(&self, set: &ChannelSet, kind: Kind) -> Result<(), DeviceError> {
        let mut processes = self.processes.lock();
        let process = processes
            .get_mut(&set.pid)
            .ok_or(DeviceError::NoProcess(set.pid))?;
        let mut done = Ok(());
        process.change(|process| {
            if let Some(error) = process.failure(kind) {
                // Half of it was done.
                done = Err(error);
                if kind == Kind::Stop {
                    let first = set.channels.first().map(|handle| handle.object);
                    process.stopped.extend(first);
                }
                return;
            }
            for handle in &set.channels {
                let known = process.channels.contains(&handle.object);
                if !known || handle.client != process.client {
                    // Nothing is left there to be resumed.
                    if kind == Kind::Stop {
                        done = Err(failed("a channel is gone"));
                    }
                } else if kind == Kind::Stop {
                    process.stopped.insert(handle.object);
                } else {
                    process.stopped.remove(&handle.object);
                }
            }
            if kind == Kind::Stop && process.grows > 0 {
                process.grows -= 1;
                process.channels.insert(100 + process.grows);
            }
        });
        done
    }

    fn control(&self, sets: &[ChannelSet], kind: Kind) -> Result<(), DeviceError> {
        let [set] = sets else {
            return Err(failed("a keeper has one process"));
        };
        let channels = objects(&set.channels);
        let did = match kind {
            Kind::Stop => Did::Stopped(channels),
            Kind::Resume => Did::Resumed(channels),
            Kind::List | Kind::Set => return Err(failed("this is neither")),
        };
        drop(self.call(set.pid, did)?);
        thread::sleep(self.cost / 2);
        let done = self.take_effect(set, kind);
        thread::sleep(self.cost / 2);
        done
    }
}

type Processes = BTreeMap<u32, Process>;

impl Channels for Fake {
    fn mark(&self) -> Result<ClientMark, DeviceError> {
        Ok(ClientMark(0))
    }

    fn list(&self, pid: u32, _: &GpuInfo, search: Search) -> Result<ChannelSet, DeviceError> {
        let mut processes = self.call(pid, Did::Listed(search))?;
        let process = processes.get_mut(&pid).ok_or(DeviceError::NoProcess(pid))?;
        if let Some(error) = process.failure(Kind::List) {
            return Err(error);
        }
        let mut channels = process.channels.clone();
        if channels.is_empty() {
            return Err(DeviceError::NoContext("it has no channels".to_owned()));
        }
        if matches!(search, Search::Recent | Search::Next) {
            let remembered = process.remembered.clone();
            let remembered = remembered.ok_or_else(|| failed("its client is gone"))?;
            channels.extend(remembered);
        }
        process.remembered = Some(channels.clone());
        Ok(ChannelSet {
            pid,
            ..process.set(&channels)
        })
    }

    fn timeslices(&self, set: &ChannelSet) -> Result<Timeslices, DeviceError> {
        let processes = self.call(set.pid, Did::Read)?;
        let process = processes
            .get(&set.pid)
            .ok_or(DeviceError::NoProcess(set.pid))?;
        let slice = |group: u32| *process.slices.get(&group).unwrap_or(&DEFAULT_USEC);
        let usec = objects(&set.groups).into_iter().map(slice).collect();
        Ok(Timeslices { usec })
    }

    fn set_timeslice(&self, set: &ChannelSet, usec: u64) -> Result<Timeslices, DeviceError> {
        let groups = objects(&set.groups);
        let mut processes = self.call(set.pid, Did::Set(groups.clone(), usec))?;
        let process = processes
            .get_mut(&set.pid)
            .ok_or(DeviceError::NoProcess(set.pid))?;
        if let Some(error) = process.failure(Kind::Set) {
            return Err(error);
        }
        let gone = |group: &u32| !process.groups.contains(group);
        if groups.iter().any(gone) {
            return Err(failed("a group is gone"));
        }
        let usec_of_each = vec![usec; groups.len()];
        process
            .slices
            .extend(groups.into_iter().zip(usec_of_each.iter().copied()));
        Ok(Timeslices { usec: usec_of_each })
    }

    fn stop(&self, _: &GpuInfo, sets: &[ChannelSet]) -> Result<(), DeviceError> {
        self.control(sets, Kind::Stop)
    }

    fn resume(&self, _: &GpuInfo, sets: &[ChannelSet]) -> Result<(), DeviceError> {
        self.control(sets, Kind::Resume)
    }
}
