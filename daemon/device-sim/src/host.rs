//! The simulated host as the service uses it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use gcgroup_device::{
    ChannelSet, Channels, ClientMark, Counters, DeviceError, GpuInfo, GpuProcess, GpuSample, Host,
    LaunchCounter, Launches, Mps, MpsServer, Search, Telemetry, Timeslices,
};
use gcgroup_kernels::protocol::GpuAddress;
use rustix::io::Errno;
use rustix::process::{Pid, test_kill_process};

use crate::connection::{CallError, Connection};
use crate::cost::CLOCK;
use crate::engine::MPS_VARIABLE;
use crate::fault::Failure;
use crate::shape;
use crate::wire::{Answer, ChannelsOf, Listed, Onward, ProcessLine, Reached, Request};

/// How long [`SimHost::open`] waits for a host that is being started.
const PATIENCE: Duration = Duration::from_secs(5);

/// Connections that are kept for later calls.
const KEPT: usize = 8;

/// Power of an idle and of a fully busy H200 in milliwatts: what nvidia-smi shows
/// of an idle one, about, and the data sheet's 700 W.
const IDLE_MILLIWATT: f64 = 75_000.0;
const BUSY_MILLIWATT: f64 = 700_000.0;

/// What was found of a process on a GPU.
#[derive(Clone, Debug)]
struct Known {
    set: ChannelSet,
    reached: Vec<Reached>,
}

/// A connection to a simulated host.
///
/// Each call has a connection of its own, so one that a fault makes hang holds up
/// no other. All end within 5 s except those that a fault keeps back. A host that
/// was started anew is found again by the next call.
#[derive(Debug)]
pub struct SimHost {
    socket: PathBuf,
    description: String,
    idle: Mutex<Vec<Connection>>,
    /// What was found of processes, by pid and GPU.
    known: Mutex<BTreeMap<(u32, u32), Known>>,
    /// Xid errors that were counted before this host was opened.
    xids_before: BTreeMap<String, u64>,
}

impl SimHost {
    /// Connects to the socket of a simulated host, and waits up to 5 s for it.
    ///
    /// # Errors
    /// [`DeviceError::NoDriver`] when nobody serves it by then.
    pub fn open(socket: &Path) -> Result<Self, DeviceError> {
        let started = Instant::now();
        let connection = loop {
            match Connection::open(socket) {
                Ok(connection) => break connection,
                Err(_) if started.elapsed() < PATIENCE => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(error) => return Err(unreachable(socket, &error)),
            }
        };
        let mut host = Self {
            socket: socket.to_owned(),
            description: String::new(),
            idle: Mutex::new(vec![connection]),
            known: Mutex::default(),
            xids_before: BTreeMap::new(),
        };
        match host.call(&Request::Describe)? {
            Answer::Described(line) => {
                host.description = format!("{line}, at {}", socket.display());
            }
            other => return Err(unexpected(&other)),
        }
        // A GPU list that fails here, by a fault, fails again where it is asked for.
        if let Ok(Answer::Gpus(lines)) = host.call(&Request::Gpus) {
            let xids = lines.into_iter().map(|line| (line.uuid, line.xids));
            host.xids_before = xids.collect();
        }
        Ok(host)
    }

    /// A connection that nobody uses, or a new one.
    fn connection(&self) -> Result<Connection, DeviceError> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some(connection) = idle.pop() {
            if connection.is_open() {
                return Ok(connection);
            }
        }
        drop(idle);
        Connection::open(&self.socket).map_err(|error| unreachable(&self.socket, &error))
    }

    fn known(&self) -> MutexGuard<'_, BTreeMap<(u32, u32), Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn remember(&self, key: (u32, u32), set: &ChannelSet, reached: Vec<Reached>) {
        let set = set.clone();
        let mut known = self.known();
        if known.insert(key, Known { set, reached }).is_none() {
            // New processes are rare, so the dead are swept out with each.
            known.retain(|(pid, _), _| lives(*pid));
        }
    }

    fn call(&self, request: &Request) -> Result<Answer, DeviceError> {
        let mut connection = self.connection()?;
        let result = connection.call(request, drop);
        // A late answer would be taken for that of the next call.
        if !matches!(result, Err(CallError::Lost(_))) {
            let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
            if idle.len() < KEPT {
                idle.push(connection);
            }
        }
        result.map_err(explain)
    }
}

/// Where a search goes on behind what was found before.
fn onward(search: Search, reached: &[Reached]) -> Option<Onward> {
    let [most, least] = shape::RECENT_GAP;
    let gap = match search {
        Search::Anew | Search::Since(_) => return None,
        Search::Recent => (most / (reached.len() as u32).max(1)).max(least),
        Search::Next => shape::NEXT_GAP,
    };
    Some(Onward {
        reached: reached.to_vec(),
        gap,
    })
}

fn lives(pid: u32) -> bool {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    pid.is_some_and(|pid| test_kill_process(pid) != Err(Errno::SRCH))
}

fn call(connection: &mut Connection, request: &Request) -> Result<Answer, DeviceError> {
    connection.call(request, drop).map_err(explain)
}

fn explain(error: CallError) -> DeviceError {
    match error {
        CallError::Lost(text) => DeviceError::NoDriver(text),
        CallError::Refused(Failure::Service(refused)) => refused.into(),
        CallError::Refused(Failure::Worker(error)) => DeviceError::Failed(error.to_string()),
    }
}

fn unreachable(socket: &Path, error: &std::io::Error) -> DeviceError {
    DeviceError::NoDriver(format!(
        "no simulated host at {}: {error}",
        socket.display()
    ))
}

fn unexpected(answer: &Answer) -> DeviceError {
    DeviceError::Failed(format!("an answer that was not asked for: {answer:?}"))
}

fn percent(share: f64) -> u64 {
    (share * 100.0).round().clamp(0.0, 100.0) as u64
}

impl Telemetry for SimHost {
    fn gpus(&self) -> Result<Vec<GpuInfo>, DeviceError> {
        match self.call(&Request::Gpus)? {
            Answer::Gpus(lines) => Ok(lines
                .into_iter()
                .map(|line| GpuInfo {
                    index: line.index,
                    uuid: line.uuid,
                    name: line.name,
                    memory_bytes: line.memory_bytes,
                    refused: None,
                })
                .collect()),
            other => Err(unexpected(&other)),
        }
    }

    /// Utilisation is an average over the last 100 ms or so. Power follows from
    /// the SMs in use; temperature and PCIe traffic are not simulated, and the
    /// lines are absent.
    fn sample(&self, gpu: &GpuInfo) -> Result<GpuSample, DeviceError> {
        let line = match self.call(&Request::Sample { gpu: gpu.index })? {
            Answer::Sample(line) => line,
            other => return Err(unexpected(&other)),
        };
        let power = IDLE_MILLIWATT + (BUSY_MILLIWATT - IDLE_MILLIWATT) * line.sm_active;
        let before = self.xids_before.get(&gpu.uuid).copied().unwrap_or(0);
        Ok(GpuSample {
            memory_used: line.memory_used,
            utilization: vec![
                ("gpu_percent", percent(line.busy)),
                ("memory_percent", percent(line.dram)),
                ("sm_active_percent", percent(line.sm_active)),
                ("sm_occupancy_percent", percent(line.occupancy)),
                ("dram_percent", percent(line.dram)),
                ("power_milliwatt", power.round() as u64),
                ("sm_clock_hertz", (CLOCK * 1e6) as u64),
            ],
            // A host that was started anew counts from 0.
            xids: line.xids.checked_sub(before).unwrap_or(line.xids),
        })
    }

    /// The service's own MPS server is no process here, so it is not among them.
    fn processes(&self, gpu: &GpuInfo) -> Result<Vec<GpuProcess>, DeviceError> {
        let lines = match self.call(&Request::Processes { gpu: gpu.index })? {
            Answer::Processes(lines) => lines,
            other => return Err(unexpected(&other)),
        };
        let process = |line: ProcessLine| GpuProcess {
            pid: line.pid,
            kind: line.kind.into(),
            memory_bytes: Some(line.memory_bytes),
        };
        Ok(lines.into_iter().map(process).collect())
    }
}

impl Mps for SimHost {
    fn slots(&self) -> Result<u32, DeviceError> {
        match self.call(&Request::MpsSlots)? {
            Answer::Slots(0) => Err(DeviceError::Unsupported(
                "this simulated host has no MPS".to_owned(),
            )),
            Answer::Slots(slots) => Ok(slots),
            other => Err(unexpected(&other)),
        }
    }

    fn orders_streams(&self) -> Result<(), DeviceError> {
        Err(DeviceError::Unsupported(
            "the simulated GPU knows no waiting blocks, so stream priorities order nothing"
                .to_owned(),
        ))
    }

    /// The directory stays empty: clients are known by a token.
    fn start(&self, gpu: &GpuInfo, _directory: &Path) -> Result<Box<dyn MpsServer>, DeviceError> {
        let mut connection =
            Connection::open(&self.socket).map_err(|error| unreachable(&self.socket, &error))?;
        match call(&mut connection, &Request::MpsStart { gpu: gpu.index })? {
            Answer::MpsToken(token) => Ok(Box::new(SimMpsServer { connection, token })),
            other => Err(unexpected(&other)),
        }
    }
}

/// A simulated MPS server. It ends with this value, or with the process.
#[derive(Debug)]
struct SimMpsServer {
    connection: Connection,
    token: String,
}

impl MpsServer for SimMpsServer {
    fn environment(&self) -> Vec<(String, String)> {
        vec![(MPS_VARIABLE.to_owned(), self.token.clone())]
    }

    fn process(&self) -> Option<(u32, u64)> {
        None
    }

    fn is_alive(&mut self) -> bool {
        matches!(
            call(&mut self.connection, &Request::MpsAlive),
            Ok(Answer::Alive(true))
        )
    }

    fn stop(mut self: Box<Self>) {
        if let Err(error) = call(&mut self.connection, &Request::MpsStop) {
            // The end of the connection stops it all the same.
            tracing::warn!(%error, "the simulated MPS server did not answer");
        }
    }
}

impl Channels for SimHost {
    fn mark(&self) -> Result<ClientMark, DeviceError> {
        match self.call(&Request::Mark)? {
            Answer::Mark(mark) => Ok(ClientMark(mark)),
            other => Err(unexpected(&other)),
        }
    }

    /// A search takes no time. One for what is recent finds and misses what it does
    /// on a real host: what was found stands, gone or not, and a new object is found
    /// within so many unused handles behind it. After a new client everything is
    /// looked up. There is no slow sweep beyond.
    fn list(&self, pid: u32, gpu: &GpuInfo, search: Search) -> Result<ChannelSet, DeviceError> {
        let key = (pid, gpu.index);
        let above = match search {
            Search::Since(mark) => mark.0,
            Search::Anew | Search::Recent | Search::Next => 0,
        };
        let before = self.known().get(&key).cloned();
        let request = Request::List {
            pid,
            gpu: gpu.index,
            above,
            onward: before
                .as_ref()
                .and_then(|known| onward(search, &known.reached)),
        };
        let found = match self.call(&request) {
            Ok(Answer::Listed(found)) => found,
            Ok(other) => return Err(unexpected(&other)),
            Err(error) => {
                if matches!(error, DeviceError::NoProcess(_)) {
                    self.known().remove(&key);
                }
                return Err(error);
            }
        };
        let Listed {
            mut set, reached, ..
        } = found;
        if let (false, Some(before)) = (found.whole, before) {
            let new = set.beyond(&before.set);
            set = before.set;
            set.groups.extend(new.groups);
            set.channels.extend(new.channels);
            set.groups.sort_unstable();
            set.channels.sort_unstable();
        }
        self.remember(key, &set, reached);
        Ok(set)
    }

    fn timeslices(&self, set: &ChannelSet) -> Result<Timeslices, DeviceError> {
        let request = Request::Timeslices {
            pid: set.pid,
            groups: set.groups.clone(),
        };
        match self.call(&request)? {
            Answer::Timeslices(usec) => Ok(Timeslices { usec }),
            other => Err(unexpected(&other)),
        }
    }

    fn set_timeslice(&self, set: &ChannelSet, usec: u64) -> Result<Timeslices, DeviceError> {
        let request = Request::SetTimeslice {
            pid: set.pid,
            groups: set.groups.clone(),
            usec,
        };
        match self.call(&request)? {
            Answer::Timeslices(read) if read.iter().all(|read| *read == usec) => {
                Ok(Timeslices { usec: read })
            }
            Answer::Timeslices(read) => Err(DeviceError::Failed(format!(
                "timeslices of {usec} us were set and {read:?} read back"
            ))),
            other => Err(unexpected(&other)),
        }
    }

    /// Everything stands at the beginning of the call, which takes as long as was
    /// measured all the same.
    fn stop(&self, gpu: &GpuInfo, sets: &[ChannelSet]) -> Result<(), DeviceError> {
        self.call(&Request::Stop(channels_of(gpu, sets))).map(drop)
    }

    fn resume(&self, gpu: &GpuInfo, sets: &[ChannelSet]) -> Result<(), DeviceError> {
        self.call(&Request::Resume(channels_of(gpu, sets)))
            .map(drop)
    }
}

/// The channels alone: a stop does not look at groups.
fn channels_of(gpu: &GpuInfo, sets: &[ChannelSet]) -> ChannelsOf {
    let channels = |set: &ChannelSet| ChannelSet {
        pid: set.pid,
        groups: Vec::new(),
        channels: set.channels.clone(),
    };
    ChannelsOf {
        gpu: gpu.index,
        sets: sets.iter().map(channels).collect(),
    }
}

impl Counters for SimHost {
    fn count_launches(&self, pid: u32) -> Result<Box<dyn LaunchCounter>, DeviceError> {
        let mut connection =
            Connection::open(&self.socket).map_err(|error| unreachable(&self.socket, &error))?;
        call(&mut connection, &Request::CountLaunches { pid })?;
        Ok(Box::new(SimCounter { connection }))
    }
}

/// A counter of the simulated host. It ends with this value, or with the process.
#[derive(Debug)]
struct SimCounter {
    connection: Connection,
}

impl LaunchCounter for SimCounter {
    fn read(&mut self) -> Result<Launches, DeviceError> {
        match call(&mut self.connection, &Request::ReadLaunches)? {
            Answer::Launches { total, graphs } => Ok(Launches { total, graphs }),
            other => Err(unexpected(&other)),
        }
    }
}

impl Host for SimHost {
    fn describe(&self) -> String {
        self.description.clone()
    }

    fn worker_address(&self, gpu: &GpuInfo) -> String {
        GpuAddress::Sim {
            socket: self.socket.clone(),
            gpu: gpu.index,
        }
        .to_string()
    }
}
