//! Trials, on workers of our own, of what a driver only claims to do.

use std::sync::Arc;
use std::time::Duration;

use gcgroup_device::GpuInfo;
use gcgroup_kernels::catalogue;
use gcgroup_kernels::engine::Placement;
use gcgroup_kernels::protocol::{Command, QuotaSetting, Setup};
use gcgroup_model::change::Refusal;
use gcgroup_model::spec::{Blocks, WorkloadSpec};
use gcgroup_model::value::Quota;
use gcgroup_policy::enforcer::Sharing;

use crate::launch::{Context, Ready, blocking, refusal, see_off};

/// Timeslices of the two workers on trial, microseconds: 16 to 1, both well
/// above the 150 us that a context switch takes on an H200.
const LONG_USEC: u64 = 32_768;
const SHORT_USEC: u64 = 2_048;
/// How long both run side by side: a dozen rounds of their slices.
const TRIAL: Duration = Duration::from_millis(500);
/// The share that the longer slice must at least give. Some chips are reported
/// to ignore timeslices (1 : 1).
const LEAST_RATIO: u64 = 4;
/// For one worker to become ready.
const READY: Duration = Duration::from_secs(20);

/// Whether channel control acts on this GPU: two workers fill it, one with a
/// slice sixteen times the other's, and their work must show it.
///
/// # Errors
/// Why it does not, for users to read.
pub(crate) async fn channels(context: Arc<Context>, gpu: GpuInfo) -> Result<(), String> {
    let first = ready(&context, &gpu)
        .await
        .map_err(|error| error.to_string())?;
    let second = match ready(&context, &gpu).await {
        Ok(second) => second,
        Err(error) => {
            tokio::spawn(see_off(first.spawned, context.journal.clone()));
            return Err(error.to_string());
        }
    };
    let (mut long, mut short) = (first, second);
    let outcome = compare(&context, &mut long, &mut short).await;
    for worker in [long, short] {
        drop(worker.link);
        tokio::spawn(see_off(worker.spawned, context.journal.clone()));
    }
    match outcome {
        Ok((long, short)) if long >= short.saturating_mul(LEAST_RATIO) && long > 0 => Ok(()),
        Ok((long, short)) => Err(format!(
            "timeslices of {LONG_USEC} and {SHORT_USEC} us were read back but do not act: \
             {long} and {short} iterations in {} ms",
            TRIAL.as_millis()
        )),
        Err(refusal) => Err(refusal.to_string()),
    }
}

async fn ready(context: &Arc<Context>, gpu: &GpuInfo) -> Result<Ready, Refusal> {
    let mut spec = WorkloadSpec::of_kernel("fma_fp32");
    // One block of the largest size on each SM of any GPU there is.
    spec.blocks = Some(Blocks::Count(256));
    let quota = Quota::default();
    let setup = Setup {
        plan: catalogue::plan(&mut spec, 1)?,
        iterations: None,
        duration_ms: None,
        placement: Placement {
            groups: None,
            stream_priority: 0,
        },
        quota: QuotaSetting {
            quota_usec: quota.quota_usec,
            period_usec: quota.period_usec,
        },
        depth: 8,
    };
    context
        .clone()
        .launch(gpu.clone(), Sharing::Temporal, setup, READY)
        .await
}

/// Iterations of both in the same time.
async fn compare(
    context: &Context,
    long: &mut Ready,
    short: &mut Ready,
) -> Result<(u64, u64), Refusal> {
    for (worker, usec) in [(&*long, LONG_USEC), (&*short, SHORT_USEC)] {
        let Some((groups, _)) = worker.channels.clone() else {
            return Err(Refusal::Unsupported(
                "the channel groups of a worker were not found".to_owned(),
            ));
        };
        let host = context.host.clone();
        blocking(move || host.set_timeslice(&groups, usec))
            .await?
            .map_err(refusal)?;
    }
    long.link.call(Command::Start).await?;
    short.link.call(Command::Start).await?;
    tokio::time::sleep(TRIAL).await;
    let mut iterations = [0; 2];
    for (worker, count) in [long, short].into_iter().zip(&mut iterations) {
        let (_, counters) = worker.link.call_counted(Command::Freeze(true)).await?;
        *count = counters.map_or(0, |counters| counters.iterations);
    }
    Ok((iterations[0], iterations[1]))
}
