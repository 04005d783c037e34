//! Sets faults on a simulated host and looks at its clients; for tests that drive
//! a whole service.

use std::path::Path;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::connection::{CallError, Connection};
use crate::fault::{Failure, FaultId, FaultSpec, RandomFaults};
use crate::wire::{Answer, Request};

/// Why a simulated host did not do what a test asked.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum FaultClientError {
    /// It is not there, or not any more.
    #[error("{0}")]
    Lost(String),
    /// What was asked makes no sense.
    #[error("refused: {0}")]
    Refused(String),
}

/// One context on the simulated host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClientState {
    /// Process that connected.
    pub pid: u32,
    /// Index of the GPU.
    pub gpu: u32,
    /// Whether it is the client of an MPS server.
    pub mps: bool,
    /// Device memory, its context's included, bytes.
    pub memory_bytes: u64,
    /// Launches that were submitted.
    pub launched: u64,
    /// Launches that were submitted and have not ended.
    pub in_flight: u64,
    /// Launches that ended complete.
    pub complete: u64,
    /// Units of all blocks, up to the last end of a launch.
    pub units: u128,
    /// Whether its stop flag is raised.
    pub stopped: bool,
    /// Timeslice of the channel group that it launches into, microseconds.
    pub timeslice_usec: u64,
    /// Its channel groups; none under MPS, and none once it has failed.
    pub groups: u32,
    /// Channels of all its groups.
    pub channels: u32,
    /// How many of them are disabled.
    pub disabled_channels: u32,
    /// Whether its work stands because the channels that it launches into are
    /// disabled. Others may be, or may not be.
    pub channels_stopped: bool,
    /// Whether it has failed.
    pub broken: bool,
}

/// A connection that sets faults.
#[derive(Debug)]
pub struct FaultClient {
    connection: Connection,
}

impl FaultClient {
    /// Connects to the socket of a simulated host.
    ///
    /// # Errors
    /// [`FaultClientError::Lost`] when nobody serves it.
    pub fn open(socket: &Path) -> Result<Self, FaultClientError> {
        let connection = Connection::open(socket).map_err(|error| {
            FaultClientError::Lost(format!("cannot connect to {}: {error}", socket.display()))
        })?;
        Ok(Self { connection })
    }

    /// Sets a fault. It holds until it is cleared or has hit often enough, also
    /// when this client ends.
    ///
    /// # Errors
    /// [`FaultClientError::Refused`] when the error is not one of that operation.
    pub fn set(&mut self, fault: FaultSpec) -> Result<FaultId, FaultClientError> {
        match self.call(&Request::SetFault(fault))? {
            Answer::Fault(id) => Ok(id),
            other => Err(unexpected(&other)),
        }
    }

    /// Clears a fault. Calls that it made hang go on.
    ///
    /// # Errors
    /// [`FaultClientError::Lost`].
    pub fn clear(&mut self, fault: FaultId) -> Result<(), FaultClientError> {
        self.call(&Request::ClearFault(fault)).map(drop)
    }

    /// Clears all faults, those at random included.
    ///
    /// # Errors
    /// [`FaultClientError::Lost`].
    pub fn clear_all(&mut self) -> Result<(), FaultClientError> {
        self.call(&Request::ClearFaults).map(drop)
    }

    /// How many calls a fault has hit; 0 once it was cleared.
    ///
    /// # Errors
    /// [`FaultClientError::Lost`].
    pub fn hits(&mut self, fault: FaultId) -> Result<u64, FaultClientError> {
        match self.call(&Request::FaultHits(fault))? {
            Answer::Hits(hits) => Ok(hits),
            other => Err(unexpected(&other)),
        }
    }

    /// Makes calls fail or come late at random, or stops that. The simulated host
    /// logs the seed.
    ///
    /// # Errors
    /// [`FaultClientError::Refused`] when the probability is none.
    pub fn random(&mut self, faults: Option<RandomFaults>) -> Result<(), FaultClientError> {
        self.call(&Request::RandomFaults(faults)).map(drop)
    }

    /// Ends the MPS servers of a GPU as a crash would.
    ///
    /// # Errors
    /// [`FaultClientError::Lost`].
    pub fn lose_mps(&mut self, gpu: u32) -> Result<(), FaultClientError> {
        self.call(&Request::LoseMps { gpu }).map(drop)
    }

    /// Makes a GPU fall off the bus: its contexts fail, and it is listed no more.
    ///
    /// # Errors
    /// [`FaultClientError::Lost`].
    pub fn lose_gpu(&mut self, gpu: u32) -> Result<(), FaultClientError> {
        self.call(&Request::LoseGpu { gpu }).map(drop)
    }

    /// Brings a lost GPU back.
    ///
    /// # Errors
    /// [`FaultClientError::Lost`].
    pub fn restore_gpu(&mut self, gpu: u32) -> Result<(), FaultClientError> {
        self.call(&Request::RestoreGpu { gpu }).map(drop)
    }

    /// Raises the count of Xid errors of a GPU.
    ///
    /// # Errors
    /// [`FaultClientError::Lost`].
    pub fn raise_xids(&mut self, gpu: u32, count: u64) -> Result<(), FaultClientError> {
        self.call(&Request::RaiseXids { gpu, count }).map(drop)
    }

    /// Cuts the connections of a process's contexts.
    ///
    /// # Errors
    /// [`FaultClientError::Lost`].
    pub fn cut_process(&mut self, pid: u32) -> Result<(), FaultClientError> {
        self.call(&Request::CutProcess { pid }).map(drop)
    }

    /// The contexts that there are, the oldest first.
    ///
    /// # Errors
    /// [`FaultClientError::Lost`].
    pub fn clients(&mut self) -> Result<Vec<ClientState>, FaultClientError> {
        match self.call(&Request::Clients)? {
            Answer::Clients(clients) => Ok(clients),
            other => Err(unexpected(&other)),
        }
    }

    fn call(&mut self, request: &Request) -> Result<Answer, FaultClientError> {
        self.connection
            .call(request, drop)
            .map_err(|error| match error {
                CallError::Lost(text) => FaultClientError::Lost(text),
                CallError::Refused(Failure::Service(refused)) => FaultClientError::Refused(
                    gcgroup_device::DeviceError::from(refused).to_string(),
                ),
                CallError::Refused(Failure::Worker(error)) => {
                    FaultClientError::Refused(error.to_string())
                }
            })
    }
}

fn unexpected(answer: &Answer) -> FaultClientError {
    FaultClientError::Lost(format!("an answer that was not asked for: {answer:?}"))
}
