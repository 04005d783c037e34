//! What the service and a worker say to each other.
//!
//! One JSON object a line on a stream socket that is the worker's standard
//! input. The service sends [`Request`]s; a worker answers each with a
//! [`Message::Reply`] of the same id, in any order, and sends
//! [`Message::Report`]s on its own. A worker ends when the stream does.

use gcgroup_model::snapshot::Sample;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::engine::{EngineError, Facts, Placement, Plan};

/// A command with the id that its reply carries.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Request {
    /// Chosen by the service, never used twice with one worker.
    pub id: u64,
    /// What to do.
    pub command: Command,
}

/// Which GPU to work on, and how it is reached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GpuAddress {
    /// A real GPU, by the UUID that NVML prints.
    Cuda(String),
    /// A simulated one.
    Sim {
        /// Socket of the simulated host.
        socket: PathBuf,
        /// Index of the GPU there.
        gpu: u32,
    },
}

impl FromStr for GpuAddress {
    type Err = String;

    /// Reads `cuda:UUID` or `sim:INDEX:SOCKET`.
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not 'cuda:UUID' or 'sim:INDEX:SOCKET'");
        match text.split_once(':') {
            Some(("cuda", uuid)) if !uuid.is_empty() => Ok(Self::Cuda(uuid.to_owned())),
            Some(("sim", rest)) => {
                let (gpu, socket) = rest.split_once(':').ok_or_else(wrong)?;
                let gpu = gpu.parse().map_err(|_| wrong())?;
                Ok(Self::Sim {
                    socket: PathBuf::from(socket),
                    gpu,
                })
            }
            _ => Err(wrong()),
        }
    }
}

impl fmt::Display for GpuAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cuda(uuid) => write!(f, "cuda:{uuid}"),
            Self::Sim { socket, gpu } => write!(f, "sim:{gpu}:{}", socket.display()),
        }
    }
}

/// What a worker can be told to do.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Command {
    /// Opens the GPU and answers with its facts. Always the first command.
    Open(GpuAddress),
    /// Prepares the workload, places it and calibrates; then it waits for
    /// [`Command::Start`].
    Prepare(Box<Setup>),
    /// Begins to launch.
    Start,
    /// Stops (`true`) or goes on. Answered when that is so.
    Freeze(bool),
    /// GPU time allowed in each period, from now on.
    Quota(QuotaSetting),
    /// Moves to other SMs or another stream priority. Answered when in force.
    Place(Placement),
    /// Sends a report every so many milliseconds while it runs. A stopped
    /// worker sends none: nothing changes.
    ReportEvery {
        /// Milliseconds.
        ms: u64,
    },
    /// Compares results with the CPU reference, while frozen.
    Verify,
    /// Ends in good order: what is in flight ends, buffers are freed.
    End,
}

/// Everything a workload needs to begin.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setup {
    /// The kernel and its parameters.
    pub plan: Plan,
    /// Iterations in one launch; calibrated where `None`.
    pub iterations: Option<u64>,
    /// Milliseconds that it runs, frozen and throttled time included.
    pub duration_ms: Option<u64>,
    /// Where it runs.
    pub placement: Placement,
    /// Quota that it starts with.
    pub quota: QuotaSetting,
    /// Launches kept in flight, 2 to 64. More bridge a longer absence of the
    /// worker's thread, fewer make a stop shorter.
    pub depth: u32,
}

/// compute.max as a worker takes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QuotaSetting {
    /// Microseconds in each period, or no bound.
    pub quota_usec: Option<u64>,
    /// Microseconds of a period.
    pub period_usec: u64,
}

/// What a worker says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Message {
    /// The answer to a request.
    Reply {
        /// The request's id.
        id: u64,
        /// What came of it.
        result: Result<Answer, EngineError>,
        /// Counters at that moment.
        counters: Option<Counters>,
    },
    /// Counters on the worker's own account.
    Report {
        /// Counters now.
        counters: Counters,
        /// Launches that ended since the last report, oldest first; the newest
        /// ones only where there were very many.
        samples: Vec<Sample>,
    },
    /// The worker is about to end on its own: its duration is over, or its GPU
    /// failed.
    Ending {
        /// `None` when its time was over.
        error: Option<EngineError>,
    },
}

/// What came of a request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// It is so.
    Done,
    /// The GPU is open.
    Opened(Facts),
    /// The workload is ready to start.
    Ready(Readiness),
    /// It is placed.
    Placed {
        /// SMs that were granted.
        sm_count: u32,
    },
    /// Results were compared.
    Verified {
        /// Values compared.
        compared: u64,
        /// Values that differed.
        wrong: u64,
    },
}

/// What a prepared workload turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Readiness {
    /// Iterations in one launch.
    pub iterations: u64,
    /// Device time of one launch alone, microseconds, as calibrated.
    pub launch_us: f64,
    /// Device memory of its buffers, bytes.
    pub buffer_bytes: u64,
    /// Device memory of its context beyond them, bytes, where it is known.
    pub context_bytes: Option<u64>,
    /// SMs that were granted.
    pub sm_count: u32,
}

/// A workload's counters, all from its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Counters {
    /// Launches handed to the driver; one that was cut short and submitted
    /// again counts once.
    pub submitted: u64,
    /// Launches that ran to their end.
    pub ended: u64,
    /// Iterations of all blocks together, calibration aside; exact while
    /// stopped, by whole launches while running.
    pub iterations: u64,
    /// Time with a kernel of its own resident, microseconds.
    pub usage_usec: u64,
    /// Time stopped by its quota, microseconds.
    pub throttled_usec: u64,
    /// Time stopped by a freeze, microseconds.
    pub frozen_usec: u64,
    /// Freezes.
    pub nr_freezes: u64,
    /// Periods in which the quota stopped it.
    pub nr_throttled: u64,
    /// Whether a freeze holds it now.
    pub frozen: bool,
    /// SMs it runs on.
    pub sm_count: u32,
}
