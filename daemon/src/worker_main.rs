//! `gcgroupd worker`: the process that runs one workload.

use std::os::fd::AsFd;

use anyhow::{Context, Result};
use gcgroup_cuda::CudaEngine;
use gcgroup_device_sim::SimEngine;
use gcgroup_kernels::engine::{Engine, EngineError};
use gcgroup_kernels::protocol::GpuAddress;
use gcgroup_kernels::worker;

use crate::sandbox;

/// Enters the sandbox, then works for whoever holds the other end of standard
/// input, until that end closes.
///
/// # Errors
/// No sandbox, no socket, or a GPU that failed.
pub(crate) fn run() -> Result<()> {
    sandbox::enter()?;
    let control = std::io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .context("standard input is not open")?;
    worker::run(control, open).context("the worker failed")
}

fn open(address: &GpuAddress) -> Result<Box<dyn Engine>, EngineError> {
    Ok(match address {
        GpuAddress::Cuda(uuid) => Box::new(CudaEngine::open(uuid)?),
        GpuAddress::Sim { socket, gpu } => Box::new(SimEngine::open(socket, *gpu)?),
    })
}
