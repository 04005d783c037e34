//! Letting processes run again that a service may have left stopped.
//!
//! Everything that may block has a thread of its own, and nobody waits for one
//! beyond the deadline: a call that hangs in the driver holds up no other process.
//!
//! 1. For each GPU one call resumes what the journal has of all its processes.
//! 2. Each process is listed anew. What the journal lacks is resumed, and
//!    everything of a process whose GPU's joint call failed; again and again until
//!    it works, the process has ended, or the time is over. A process that cannot
//!    be listed may have channels that nobody knows, so it counts as stopped.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use gcgroup_device::{ChannelSet, Channels, DeviceError, GpuInfo, Search, Telemetry};

use crate::journal::{Armed, ArmedGpu};
use crate::procfs;

/// How long the answers to the quick questions are waited for that only make the
/// rest better: where the GPUs are now, and the joint calls. 400 times what the
/// resume of two processes takes on an H200.
const QUICK: Duration = Duration::from_millis(200);
/// Between two tries.
const AGAIN: Duration = Duration::from_millis(50);

/// What this asks of a host.
pub(super) trait Resumes: Telemetry + Channels {}

impl<T: Telemetry + Channels + ?Sized> Resumes for T {}

/// A host that was asked for.
pub(super) enum Opened {
    /// It answers.
    Host(Arc<dyn Resumes>),
    /// There is none any more, so nothing on it is stopped.
    Gone,
}

/// A process that may be stopped still.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Left {
    /// As the journal has it.
    pub(super) armed: Armed,
    /// What the last try failed with.
    pub(super) why: String,
}

/// Resumes these processes within `patience`; returns those that live and could
/// not be resumed. `open` is tried for as long.
pub(super) fn all(
    open: impl Fn() -> Result<Opened, DeviceError> + Send + 'static,
    mut armed: Vec<Armed>,
    patience: Duration,
) -> Vec<Left> {
    let give_up = Instant::now() + patience;
    armed.retain(is_running);
    if armed.is_empty() {
        return Vec::new();
    }
    let host = match opened(open, give_up) {
        Ok(Opened::Host(host)) => host,
        Ok(Opened::Gone) => {
            tracing::info!("the host is gone, and with it whatever was stopped");
            return Vec::new();
        }
        Err(why) => return left(armed, &why),
    };
    let gpus = gpus(&host);
    let located = |armed: Armed| {
        let gpu = locate(gpus.as_deref(), &armed.gpu);
        (armed, gpu)
    };
    let armed: Vec<(Armed, Located)> = armed.into_iter().map(located).collect();
    let resumed = resume_jointly(&host, &armed);
    let mut answers = Vec::new();
    for (armed, gpu) in armed {
        let task = Task {
            host: host.clone(),
            known_runs: resumed.contains(&armed.gpu.uuid),
            armed: armed.clone(),
            gpu,
            give_up,
        };
        answers.push((armed, aside(move || task.run())));
    }
    let judged = answers.into_iter().filter_map(|(armed, answer)| {
        let why = match wait(&answer, give_up + QUICK) {
            Some(Ok(())) => return None,
            Some(Err(why)) => why,
            None => "the driver has not answered yet".to_owned(),
        };
        is_running(&armed).then_some(Left { armed, why })
    });
    judged.collect()
}

fn is_running(armed: &Armed) -> bool {
    procfs::is_running(armed.process.pid, armed.process.start)
}

fn left(armed: Vec<Armed>, why: &str) -> Vec<Left> {
    let left = |armed| Left {
        armed,
        why: why.to_owned(),
    };
    armed.into_iter().filter(is_running).map(left).collect()
}

/// Runs a call that may never return in a thread of its own. Where there is no
/// thread, or the call panics, there is no answer.
fn aside<T: Send + 'static>(call: impl FnOnce() -> T + Send + 'static) -> Receiver<T> {
    let (sender, receiver) = channel();
    let started = thread::Builder::new().spawn(move || {
        // Nobody may be waiting any more.
        let _ = sender.send(call());
    });
    if let Err(error) = started {
        tracing::warn!(%error, "no thread for a call to the driver");
    }
    receiver
}

fn wait<T>(answer: &Receiver<T>, until: Instant) -> Option<T> {
    let left = until.saturating_duration_since(Instant::now());
    answer.recv_timeout(left).ok()
}

fn opened(
    open: impl Fn() -> Result<Opened, DeviceError> + Send + 'static,
    give_up: Instant,
) -> Result<Opened, String> {
    let answer = aside(move || {
        loop {
            match open() {
                Ok(opened) => return Ok(opened),
                Err(error) if Instant::now() + AGAIN >= give_up => {
                    return Err(format!("the host could not be opened: {error}"));
                }
                Err(_) => thread::sleep(AGAIN),
            }
        }
    });
    let silent = || Err("the host did not answer when it was opened".to_owned());
    // Its last error comes close to the deadline, and says more than silence.
    wait(&answer, give_up + QUICK).unwrap_or_else(silent)
}

/// The GPUs that there are now; `None` where the host does not say.
fn gpus(host: &Arc<dyn Resumes>) -> Option<Vec<GpuInfo>> {
    let asked = host.clone();
    match wait(&aside(move || asked.gpus()), Instant::now() + QUICK) {
        Some(Ok(gpus)) => Some(gpus),
        Some(Err(error)) => {
            tracing::warn!(%error, "the GPUs are taken to be where they were");
            None
        }
        None => None,
    }
}

/// A GPU of the journal.
#[derive(Clone, Debug)]
struct Located {
    info: GpuInfo,
    /// Whether the host has it no more.
    lost: bool,
}

/// A GPU of the journal as it is called now. One that is not there is asked by its
/// old index all the same: a resume needs no more than the handles.
fn locate(gpus: Option<&[GpuInfo]>, gpu: &ArmedGpu) -> Located {
    let found = gpus.and_then(|gpus| gpus.iter().find(|info| info.uuid == gpu.uuid));
    let recorded = || GpuInfo {
        index: gpu.index,
        uuid: gpu.uuid.clone(),
        name: String::new(),
        memory_bytes: 0,
        refused: None,
    };
    Located {
        info: found.cloned().unwrap_or_else(recorded),
        lost: gpus.is_some() && found.is_none(),
    }
}

/// One call for each GPU; returns the UUIDs of those where it was done in time.
fn resume_jointly(host: &Arc<dyn Resumes>, armed: &[(Armed, Located)]) -> Vec<String> {
    let mut sets: BTreeMap<&str, (GpuInfo, Vec<ChannelSet>)> = BTreeMap::new();
    for (armed, gpu) in armed {
        let (_, sets) = sets
            .entry(&armed.gpu.uuid)
            .or_insert_with(|| (gpu.info.clone(), Vec::new()));
        sets.push(armed.set.clone());
    }
    let until = Instant::now() + QUICK;
    let mut answers = Vec::new();
    for (uuid, (gpu, sets)) in sets {
        let host = host.clone();
        answers.push((uuid, aside(move || host.resume(&gpu, &sets))));
    }
    let mut resumed = Vec::new();
    for (gpu, answer) in answers {
        match wait(&answer, until) {
            Some(Ok(())) => resumed.push(gpu.to_owned()),
            Some(Err(error)) => {
                tracing::warn!(gpu, %error, "a joint resume failed; its processes are resumed one by one");
            }
            None => tracing::warn!(
                gpu,
                "a joint resume takes long; its processes are resumed one by one"
            ),
        }
    }
    resumed
}

/// The resume of one process on one GPU.
struct Task {
    host: Arc<dyn Resumes>,
    armed: Armed,
    gpu: Located,
    /// Whether what the journal has of it runs already.
    known_runs: bool,
    give_up: Instant,
}

impl Task {
    fn run(mut self) -> Result<(), String> {
        loop {
            let Err(why) = self.attempt() else {
                return Ok(());
            };
            if !is_running(&self.armed) {
                return Ok(());
            }
            if self.gpu.lost {
                // A process of a lost GPU has nothing to go on with.
                let (pid, gpu) = (self.armed.process.pid, &self.armed.gpu.uuid);
                tracing::warn!(pid, gpu, %why, "a process was armed on a GPU that is lost");
                return Ok(());
            }
            if Instant::now() + AGAIN >= self.give_up {
                return Err(why);
            }
            thread::sleep(AGAIN);
        }
    }

    /// One try. The journal's channels and those listed now are resumed together;
    /// if that fails, a channel of the journal may be gone, and those listed now
    /// are all that there are.
    fn attempt(&mut self) -> Result<(), String> {
        let (pid, gpu, known) = (self.armed.process.pid, &self.gpu.info, &self.armed.set);
        let error = match self.host.list(pid, gpu, Search::Anew) {
            Ok(listed) if self.known_runs && listed.beyond(known).channels.is_empty() => {
                return Ok(());
            }
            Ok(listed) => {
                let both = joined(known, &listed);
                let resumed = self.host.resume(gpu, &[both]);
                let resumed = resumed.or_else(|_| self.host.resume(gpu, &[listed]));
                return resumed.map_err(|error| error.to_string());
            }
            Err(error) => error,
        };
        if self.is_elsewhere() {
            return Ok(());
        }
        if !self.known_runs {
            let resumed = self.host.resume(gpu, std::slice::from_ref(known));
            resumed.map_err(|error| error.to_string())?;
            self.known_runs = true;
        }
        match error {
            DeviceError::NoContext(_) => Ok(()),
            // One that has ended is seen by its start time: the driver also says
            // this of one whose main thread alone has ended.
            DeviceError::NoProcess(_)
            | DeviceError::NoDriver(_)
            | DeviceError::NoGpu(_)
            | DeviceError::Unsupported(_)
            | DeviceError::Denied(_)
            | DeviceError::Failed(_) => Err(format!("its channels could not be listed: {error}")),
        }
    }

    /// Whether the process has nothing on this GPU any more, for certain.
    fn is_elsewhere(&self) -> bool {
        let pid = self.armed.process.pid;
        let processes = self.host.processes(&self.gpu.info);
        processes.is_ok_and(|processes| processes.iter().all(|process| process.pid != pid))
    }
}

/// What is in either of two sets, in order.
fn joined(first: &ChannelSet, second: &ChannelSet) -> ChannelSet {
    let mut all = first.clone();
    let more = second.beyond(first);
    all.groups.extend(more.groups);
    all.channels.extend(more.channels);
    all.groups.sort_unstable();
    all.channels.sort_unstable();
    all
}

#[cfg(test)]
mod tests;
