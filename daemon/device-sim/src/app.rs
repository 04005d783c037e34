//! A program of somebody else on the simulated GPU: no workload of the service,
//! and none of its control.

use std::convert::Infallible;
use std::path::PathBuf;

use gcgroup_kernels::engine::{Engine, EngineError, Form, Plan};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use crate::cost::Cost;
use crate::engine::SimEngine;
use crate::server::SOCKET_NAME;

/// Launches that are kept in flight, so that the GPU is never without one.
const DEPTH: u64 = 2;

/// What the program does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AppOptions {
    /// State directory of the simulated host.
    pub state: PathBuf,
    /// Index of its GPU.
    pub gpu: u32,
    /// Device memory that it takes, bytes.
    pub memory_bytes: u64,
    /// How long one of its kernels lasts alone on the GPU, microseconds; at
    /// least 1.
    pub kernel_us: u64,
}

/// Takes memory and launches kernels until it is killed. It says on standard
/// output when it has begun.
///
/// # Errors
/// Those of the simulated driver.
pub fn run_app(options: &AppOptions) -> Result<Infallible, EngineError> {
    let socket = options.state.join(SOCKET_NAME);
    let mut engine = SimEngine::open(&socket, options.gpu)?;
    engine.allocate(options.memory_bytes)?;
    // A foreign program knows nothing of stop flags.
    let plan = Plan {
        kernel: "fma_fp32".to_owned(),
        ilp: 4,
        blocks: engine.facts().sm_count,
        threads: 1024,
        bytes: 0,
        form: Form::Uncut,
    };
    engine.prepare(&plan)?;
    let units = units_of(&plan, options.kernel_us)?;
    let (mut submitted, mut ended) = (0_u64, 0_u64);
    println!(
        "process {} runs kernels of {} us on simulated GPU {}",
        std::process::id(),
        options.kernel_us,
        options.gpu
    );
    loop {
        while submitted - ended < DEPTH {
            submitted += 1;
            engine.submit(submitted.saturating_mul(units), 0)?;
        }
        match engine.poll()? {
            Some(_) => ended += 1,
            None => wait(&engine)?,
        }
    }
}

/// Units of a kernel that lasts so long on SMs that nobody else uses.
fn units_of(plan: &Plan, kernel_us: u64) -> Result<u64, EngineError> {
    let cost = Cost::of(plan)
        .ok_or_else(|| EngineError::Unsupported(format!("no kernel {:?}", plan.kernel)))?;
    Ok(((kernel_us.max(1) as f64 * cost.share / cost.sm_us) as u64).max(1))
}

fn wait(engine: &SimEngine) -> Result<(), EngineError> {
    let descriptor = engine.wait_fd();
    let mut fds = [PollFd::from_borrowed_fd(descriptor, PollFlags::IN)];
    match poll(&mut fds, None) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(EngineError::Failed(format!("cannot wait: {error}"))),
    }
}
