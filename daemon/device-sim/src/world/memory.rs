//! Device memory: who has how much of it.

use gcgroup_kernels::engine::EngineError;

use super::{ContextId, World};
use crate::cost::pages;
use crate::shape;

impl World {
    /// Device memory in use on a GPU, bytes: contexts, allocations, MPS servers.
    pub(super) fn memory_used(&self, gpu: u32) -> u64 {
        let contexts = self.contexts.values().filter(|c| c.gpu == gpu);
        let servers = self.servers.values().filter(|s| s.gpu == gpu).count() as u64;
        contexts.map(|c| c.overhead + c.allocated).sum::<u64>() + servers * shape::MPS_SERVER_BYTES
    }

    pub(super) fn require(&self, gpu: u32, bytes: u64) -> Result<(), EngineError> {
        let free = shape::MEMORY_BYTES.saturating_sub(self.memory_used(gpu));
        if bytes <= free {
            Ok(())
        } else {
            Err(EngineError::NoMemory {
                requested: bytes,
                free,
            })
        }
    }

    /// Takes device memory for a context, in whole pages, until the context ends.
    pub(crate) fn allocate(&mut self, id: ContextId, bytes: u64) -> Result<(), EngineError> {
        let gpu = self.context(id)?.gpu;
        let bytes = pages(bytes);
        self.require(gpu, bytes)?;
        self.context(id)?.allocated += bytes;
        Ok(())
    }
}
