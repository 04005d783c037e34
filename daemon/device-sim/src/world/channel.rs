//! Channel groups as the driver shows them to who controls them from outside, and
//! what the simulated host tells tests about its clients.

use super::{Context, World};
use crate::fault_client::ClientState;
use crate::shape;

/// Why a driver client was not found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ClientMissing {
    /// The process has no context on this GPU that is younger than the mark.
    NoContext,
    /// It has, but as a client of an MPS server, whose groups are the server's.
    Mps,
    /// No context has this handle any more.
    Gone,
}

impl World {
    /// The counter of driver clients. Who opens the GPU later has a handle above.
    pub(crate) fn mark(&self) -> u32 {
        self.next_client
    }

    /// The driver client of a process that opened the GPU after a mark: its
    /// handle, and those of its channel groups with the compute one first.
    pub(crate) fn find_client(
        &self,
        pid: u32,
        gpu: u32,
        mark: u32,
    ) -> Result<(u32, [u32; 4]), ClientMissing> {
        let mut under_mps = false;
        for context in self.contexts.values() {
            if context.pid != pid || context.gpu != gpu || context.client <= mark {
                continue;
            }
            if context.mps.is_none() && context.broken.is_none() {
                return Ok((context.client, shape::GROUP_HANDLES));
            }
            under_mps |= context.mps.is_some();
        }
        Err(if under_mps {
            ClientMissing::Mps
        } else {
            ClientMissing::NoContext
        })
    }

    /// Timeslices of some groups of a driver client, microseconds.
    pub(crate) fn timeslices(
        &self,
        client: u32,
        groups: &[u32],
    ) -> Result<Vec<u64>, ClientMissing> {
        let context = self
            .contexts
            .values()
            .find(|context| context.client == client && context.broken.is_none())
            .ok_or(ClientMissing::Gone)?;
        groups
            .iter()
            .map(|group| Ok(context.timeslices_usec[group_index(*group)?]))
            .collect()
    }

    /// Sets the timeslices of some groups of a driver client.
    pub(crate) fn set_timeslices(
        &mut self,
        client: u32,
        groups: &[u32],
        usec: u64,
    ) -> Result<(), ClientMissing> {
        let context = self
            .contexts
            .values_mut()
            .find(|context| context.client == client && context.broken.is_none())
            .ok_or(ClientMissing::Gone)?;
        for group in groups {
            context.timeslices_usec[group_index(*group)?] = usec;
        }
        self.stale = true;
        Ok(())
    }

    /// All contexts, the oldest first, as tests see them.
    pub(crate) fn clients(&self) -> Vec<ClientState> {
        let state = |context: &Context| ClientState {
            pid: context.pid,
            gpu: context.gpu,
            mps: context.mps.is_some(),
            memory_bytes: context.overhead + context.allocated,
            in_flight: context.in_flight() as u64,
            complete: context.complete,
            units: context.cursor,
            stopped: context.is_stopped(),
            timeslice_usec: context.timeslices_usec[0],
            broken: context.broken.is_some(),
        };
        self.contexts.values().map(state).collect()
    }
}

fn group_index(handle: u32) -> Result<usize, ClientMissing> {
    shape::GROUP_HANDLES
        .iter()
        .position(|group| *group == handle)
        .ok_or(ClientMissing::Gone)
}
