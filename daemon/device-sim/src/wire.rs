//! What is said on the socket: one JSON object a packet.
//!
//! The socket is SOCK_SEQPACKET, so a packet is received whole or not at all and
//! nothing has to be cut apart. A client sends one [`Request`] and waits for its
//! [`Message::Reply`]; other messages may come before. [`Request::Submit`] alone
//! has no reply: it is sent thousands of times a second, and what goes wrong with
//! it comes as [`Message::Broken`].

use gcgroup_device::{ChannelSet, Handle, ProcessKind};
use gcgroup_kernels::engine::{EngineError, Facts, Placement, Plan};
use serde::{Deserialize, Serialize};

use crate::fault::{Failure, FaultId, FaultSpec, Operation, RandomFaults};
use crate::fault_client::ClientState;

/// The longest packet in bytes. The largest are the list of all clients and a
/// stop of many processes: each of these takes less than a kilobyte. A socket
/// takes 208 KiB at once unless the system was told otherwise.
pub(crate) const LONGEST: usize = 192 * 1024;

/// What a program launches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Launch {
    Kernel,
    /// A graph of one kernel.
    Graph,
}

/// As what a process opens a GPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum OpenAs {
    Program,
    /// The client of the MPS server with this token.
    MpsClient(String),
    /// An MPS server that the service did not start. It is a program, but for its
    /// name in the list of processes.
    MpsServer,
}

/// What a client asks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Request {
    /// Makes the context that this connection then stands for.
    Open {
        gpu: u32,
        open_as: OpenAs,
    },
    /// Ends the context; the connection then stands for nothing.
    Close,
    /// Adds a channel group to the context, and launches there from then on.
    AddGroup,
    /// Removes the group that was added last.
    RemoveGroup,
    /// Adds a channel to the group that the context launches into.
    AddChannel,
    /// Makes many objects and frees them: the next one lies far off.
    SkipHandles,
    Prepare(Plan),
    Allocate {
        bytes: u64,
    },
    Place(Placement),
    Submit {
        target: u64,
        submitted_ns: u64,
        launch: Launch,
    },
    RaiseStop,
    LowerStop,
    Progress,
    Verify,
    /// One line that says which host this is.
    Describe,
    Gpus,
    Sample {
        gpu: u32,
    },
    MpsSlots,
    /// Starts the MPS server that this connection then stands for.
    MpsStart {
        gpu: u32,
    },
    MpsAlive,
    MpsStop,
    Processes {
        gpu: u32,
    },
    Mark,
    /// What a process has on a GPU, where its clients are above the mark.
    List {
        pid: u32,
        gpu: u32,
        above: u32,
        /// Goes on behind what was found before, where that stands.
        onward: Option<Onward>,
    },
    Timeslices {
        pid: u32,
        groups: Vec<Handle>,
    },
    SetTimeslice {
        pid: u32,
        groups: Vec<Handle>,
        usec: u64,
    },
    Stop(ChannelsOf),
    Resume(ChannelsOf),
    /// Makes the counter that this connection then stands for.
    CountLaunches {
        pid: u32,
    },
    ReadLaunches,
    SetFault(FaultSpec),
    ClearFault(FaultId),
    ClearFaults,
    FaultHits(FaultId),
    RandomFaults(Option<RandomFaults>),
    LoseMps {
        gpu: u32,
    },
    LoseGpu {
        gpu: u32,
    },
    RestoreGpu {
        gpu: u32,
    },
    RaiseXids {
        gpu: u32,
        count: u64,
    },
    CutProcess {
        pid: u32,
    },
    Clients,
}

impl Request {
    /// The operation that faults know it by. Control requests have none, nor has
    /// what a program does on its own.
    pub(crate) fn operation(&self) -> Option<Operation> {
        Some(match self {
            Self::Open { .. } => Operation::Open,
            Self::Prepare(_) => Operation::Prepare,
            Self::Allocate { .. } => Operation::Allocate,
            Self::Place(_) => Operation::Place,
            Self::Submit { .. } => Operation::Submit,
            Self::RaiseStop => Operation::RaiseStop,
            Self::LowerStop => Operation::LowerStop,
            Self::Progress => Operation::Progress,
            Self::Verify => Operation::Verify,
            Self::Gpus => Operation::Gpus,
            Self::Sample { .. } => Operation::Sample,
            Self::MpsStart { .. } => Operation::MpsStart,
            Self::MpsAlive => Operation::MpsAlive,
            Self::MpsStop => Operation::MpsStop,
            Self::Processes { .. } => Operation::Processes,
            Self::Mark => Operation::Mark,
            Self::List { .. } => Operation::List,
            Self::Timeslices { .. } => Operation::Timeslices,
            Self::SetTimeslice { .. } => Operation::SetTimeslice,
            Self::Stop(_) => Operation::Stop,
            Self::Resume(_) => Operation::Resume,
            Self::CountLaunches { .. } => Operation::CountLaunches,
            Self::ReadLaunches => Operation::ReadLaunches,
            Self::Close
            | Self::AddGroup
            | Self::RemoveGroup
            | Self::AddChannel
            | Self::SkipHandles
            | Self::Describe
            | Self::MpsSlots
            | Self::SetFault(_)
            | Self::ClearFault(_)
            | Self::ClearFaults
            | Self::FaultHits(_)
            | Self::RandomFaults(_)
            | Self::LoseMps { .. }
            | Self::LoseGpu { .. }
            | Self::RestoreGpu { .. }
            | Self::RaiseXids { .. }
            | Self::CutProcess { .. }
            | Self::Clients => return None,
        })
    }
}

/// What the simulated host says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Message {
    /// The answer to the last request.
    Reply(Result<Answer, Failure>),
    /// A fault keeps the answer back; wait for it without a deadline.
    Held,
    /// A launch ended.
    Ended {
        target: u64,
        submitted_ns: u64,
        device_us: f64,
        units: u128,
    },
    /// The context is broken.
    Broken(EngineError),
}

/// What came of a request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Answer {
    Done,
    Opened(Facts),
    Prepared {
        buffer_bytes: u64,
        context_bytes: u64,
    },
    Placed {
        sm_count: u32,
    },
    /// Units of all blocks together, and the blocks.
    Cursor {
        units: u128,
        blocks: u32,
    },
    Described(String),
    Gpus(Vec<GpuLine>),
    Sample(SampleLine),
    Slots(u32),
    MpsToken(String),
    Alive(bool),
    Processes(Vec<ProcessLine>),
    Mark(u32),
    Listed(Listed),
    Launches {
        total: u64,
        graphs: u64,
    },
    Timeslices(Vec<u64>),
    Fault(FaultId),
    Hits(u64),
    Clients(Vec<ClientState>),
}

/// How far the objects of a driver client were looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Reached {
    pub(crate) client: u32,
    /// The handle after the highest one that was in use.
    pub(crate) next: u32,
}

/// A search behind what was found before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Onward {
    /// The clients that were found, each with how far it was looked at.
    pub(crate) reached: Vec<Reached>,
    /// Unused handles that end the search.
    pub(crate) gap: u32,
}

/// What a search found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Listed {
    pub(crate) set: ChannelSet,
    pub(crate) reached: Vec<Reached>,
    /// Whether it is everything; else it is what was found behind.
    pub(crate) whole: bool,
}

/// What a stop or a resume acts on: the channels of each process on a GPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ChannelsOf {
    pub(crate) gpu: u32,
    pub(crate) sets: Vec<ChannelSet>,
}

/// One process on a GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ProcessLine {
    pub(crate) pid: u32,
    pub(crate) kind: Kind,
    pub(crate) memory_bytes: u64,
}

/// `ProcessKind` as it travels, the weaker first: a process that is several on
/// one GPU counts as the last of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Kind {
    MpsClient,
    Program,
    MpsServer,
}

impl From<Kind> for ProcessKind {
    fn from(kind: Kind) -> Self {
        match kind {
            Kind::MpsClient => Self::MpsClient,
            Kind::Program => Self::Program,
            Kind::MpsServer => Self::MpsServer,
        }
    }
}

/// One GPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct GpuLine {
    pub(crate) index: u32,
    pub(crate) uuid: String,
    pub(crate) name: String,
    pub(crate) memory_bytes: u64,
    pub(crate) xids: u64,
}

/// Figures of one GPU; shares are from 0 to 1.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct SampleLine {
    pub(crate) memory_used: u64,
    pub(crate) xids: u64,
    pub(crate) busy: f64,
    pub(crate) sm_active: f64,
    pub(crate) occupancy: f64,
    pub(crate) dram: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_beyond_64_bits_survive_the_wire() {
        let ended = Message::Ended {
            target: u64::MAX,
            submitted_ns: 1,
            device_us: 0.25,
            units: u128::from(u64::MAX) * 262_144,
        };
        let text = serde_json::to_vec(&ended).expect("plain data");
        let read: Message = serde_json::from_slice(&text).expect("what was written");
        assert_eq!(read, ended);
    }
}
