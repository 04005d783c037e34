//! What is said on the socket: one JSON object a packet.
//!
//! The socket is SOCK_SEQPACKET, so a packet is received whole or not at all and
//! nothing has to be cut apart. A client sends one [`Request`] and waits for its
//! [`Message::Reply`]; other messages may come before. [`Request::Submit`] alone
//! has no reply: it is sent thousands of times a second, and what goes wrong with
//! it comes as [`Message::Broken`].

use gcgroup_kernels::engine::{EngineError, Facts, Placement, Plan};
use serde::{Deserialize, Serialize};

use crate::fault::{Failure, FaultId, FaultSpec, Operation, RandomFaults};
use crate::fault_client::ClientState;

/// The longest packet in bytes, with much room: the largest is the list of all
/// clients.
pub(crate) const LONGEST: usize = 128 * 1024;

/// What a client asks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Request {
    /// Makes the context that this connection then stands for.
    Open {
        gpu: u32,
        mps: Option<String>,
    },
    Prepare(Plan),
    Allocate {
        bytes: u64,
    },
    Place(Placement),
    Submit {
        target: u64,
        submitted_ns: u64,
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
    Mark,
    Find {
        pid: u32,
        gpu: u32,
        mark: u32,
    },
    Timeslices {
        pid: u32,
        client: u32,
        groups: Vec<u32>,
    },
    SetTimeslice {
        pid: u32,
        client: u32,
        groups: Vec<u32>,
        usec: u64,
    },
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
    /// The operation that faults know it by; control requests have none.
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
            Self::Mark => Operation::Mark,
            Self::Find { .. } => Operation::Find,
            Self::Timeslices { .. } => Operation::Timeslices,
            Self::SetTimeslice { .. } => Operation::SetTimeslice,
            Self::Describe
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
    Mark(u32),
    Found {
        client: u32,
        groups: Vec<u32>,
    },
    Timeslices(Vec<u64>),
    Fault(FaultId),
    Hits(u64),
    Clients(Vec<ClientState>),
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
