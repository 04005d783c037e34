//! Trials, on workers of our own, of what a driver only claims to do.
//!
//! Two workers fill a GPU. Their timeslices must show in their work; then one of
//! them is stopped in the middle of a launch, must stand, and must go on when it
//! is resumed. A worker whose channels are stopped answers every command that
//! does not need the GPU, so its counters come with the answers.

use std::sync::Arc;
use std::time::{Duration, Instant};

use gcgroup_device::{ChannelSet, GpuInfo, Search};
use gcgroup_kernels::catalogue;
use gcgroup_kernels::engine::Placement;
use gcgroup_kernels::protocol::{Command, Counters, QuotaSetting, Setup};
use gcgroup_kernels::worker::REPORT_MS;
use gcgroup_model::change::Refusal;
use gcgroup_model::spec::{Blocks, WorkloadSpec};
use gcgroup_model::value::Quota;
use gcgroup_policy::enforcer::Sharing;

use crate::journal::{Armed, ArmedGpu, Helper};
use crate::launch::{Context, Ready, blocking, see_off};
use crate::procfs;

/// Timeslices of the two workers on trial, microseconds: 16 to 1, both well
/// above the 150 us that a context switch takes on an H200.
const LONG_USEC: u64 = 32_768;
const SHORT_USEC: u64 = 2_048;
/// How long both run side by side: a dozen rounds of their slices. Beside others
/// with long slices that is too short, so a failure is looked at again.
const SIDE_BY_SIDE: [Duration; 2] = [Duration::from_millis(500), Duration::from_millis(2_000)];
/// The share that the longer slice must at least give. Some chips are reported
/// to ignore timeslices (1 : 1).
const LEAST_RATIO: u64 = 4;
/// Iterations of a launch: 4 ms of an H200. A number that was measured beside
/// others, who take their share, would be too small to fill a slice.
const ITERATIONS: u64 = 131_072;
/// Launches in flight, as many as there may be. On an H200 they bridge 256 ms in
/// which a busy machine does not let a worker submit.
const DEPTH: u32 = 64;
/// For one worker to become ready.
const READY: Duration = Duration::from_secs(20);
/// For the whole trial once both are ready; it takes about 1 s on an idle machine.
const LIMIT: Duration = Duration::from_secs(30);
/// For the calls that let a worker run again when the trial is over.
const RELEASE: Duration = Duration::from_secs(5);

/// Between two looks at a worker's counters.
const LOOK: Duration = Duration::from_millis(5);
/// The pace of a running worker is looked at for so long at least, and over so
/// many looks that saw progress.
const PACE: Duration = Duration::from_millis(100);
const PACE_LOOKS: u32 = 8;
/// For a running worker to show its pace, and for a resumed one to go on.
const PROGRESS: Duration = Duration::from_secs(5);
/// Launches that must end after a resume: the one that was stopped and another.
const RUNS_ON: u64 = 2;
/// Ends of launches that came before a stop are seen within this time.
const SETTLE: Duration = Duration::from_millis(20);
/// A stopped worker must stand for four times the longest pause that it made
/// while it ran, within these bounds.
const STAND: [Duration; 2] = [Duration::from_millis(50), Duration::from_secs(2)];
/// Looks at a stopped worker of which one must see it stand: on a busy machine the
/// end of a launch may be seen late.
const STAND_LOOKS: u32 = 3;
/// Times that a stopped worker is listed again until nothing new is found.
const LISTINGS: u32 = 4;

/// Whether channel control acts on this GPU. No worker is left stopped, whatever
/// comes of it.
///
/// # Errors
/// Why it does not, for users to read: what was tried, and what was seen.
pub(crate) async fn control(context: Arc<Context>, gpu: GpuInfo) -> Result<(), String> {
    let no_worker = |error: Refusal| format!("no worker to try channel control on: {error}");
    let worker = ready(&context, &gpu).await.map_err(no_worker)?;
    let other = match ready(&context, &gpu).await {
        Ok(other) => other,
        Err(error) => {
            end(worker, context);
            return Err(no_worker(error));
        }
    };
    let mut trial = Trial {
        context,
        gpu,
        worker,
        other,
        step: "nothing yet",
        armed: None,
    };
    let outcome = match tokio::time::timeout(LIMIT, trial.run()).await {
        Ok(outcome) => outcome,
        Err(_) => Err(format!(
            "{}: that did not end within {} s",
            trial.step,
            LIMIT.as_secs()
        )),
    };
    trial.finish().await;
    outcome
}

async fn ready(context: &Arc<Context>, gpu: &GpuInfo) -> Result<Ready, Refusal> {
    let mut spec = WorkloadSpec::of_kernel("fma_fp32");
    // One block of the largest size on each SM of any GPU there is.
    spec.blocks = Some(Blocks::Count(256));
    let quota = Quota::default();
    let setup = Setup {
        plan: catalogue::plan(&mut spec, 1)?,
        iterations: Some(ITERATIONS),
        duration_ms: None,
        placement: Placement {
            groups: None,
            stream_priority: 0,
        },
        quota: QuotaSetting {
            quota_usec: quota.quota_usec,
            period_usec: quota.period_usec,
        },
        depth: DEPTH,
    };
    context
        .clone()
        .launch(gpu.clone(), Sharing::Temporal, setup, READY)
        .await
}

/// Sees a worker off, and strikes it from the journal when it has ended.
fn end(worker: Ready, context: Arc<Context>) {
    let Ready { spawned, link, .. } = worker;
    drop(link);
    let pid = spawned.pid;
    let start = procfs::start_time(pid);
    tokio::spawn(async move {
        see_off(spawned, context.journal.clone()).await;
        let Some(start) = start else { return };
        if let Ok(Err(error)) = blocking(move || context.journal.disarm_process(pid, start)).await {
            tracing::warn!(pid, %error, "the journal still lists a worker that has ended");
        }
    });
}

/// Two workers that are started and seen off by [`control`].
struct Trial {
    context: Arc<Context>,
    gpu: GpuInfo,
    /// The one with the long slice, which is stopped.
    worker: Ready,
    /// The one with the short slice.
    other: Ready,
    /// What is being tried.
    step: &'static str,
    /// Channels that may be stopped.
    armed: Option<ChannelSet>,
}

impl Trial {
    async fn run(&mut self) -> Result<(), String> {
        self.slices_act().await?;
        // The other one rests from here on, so the GPU is free but for strangers.
        self.step = "letting a worker run alone";
        let thawed = self.worker.link.call(Command::Freeze(false)).await;
        thawed.map_err(|error| self.failed(error))?;
        let pause = self.longest_pause().await?;
        self.resume_while_it_runs().await?;
        self.stop().await?;
        self.stands(pause).await?;
        self.step = "resuming a stopped worker";
        self.resume().await?;
        self.runs_on().await?;
        // Exact counters show that no block was left behind.
        self.step = "freezing a worker that was stopped and resumed";
        let frozen = self.worker.link.call(Command::Freeze(true)).await;
        frozen.map_err(|error| self.failed(error))?;
        Ok(())
    }

    /// Lets the worker run again where it may be stopped, and sees both off.
    async fn finish(mut self) {
        if self.armed.is_some() {
            self.step = "resuming a worker after the trial";
            match tokio::time::timeout(RELEASE, self.resume()).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!(error, "a worker on trial is killed"),
                Err(_) => tracing::warn!("a resume hangs; a worker on trial is killed"),
            }
        }
        end(self.worker, self.context.clone());
        end(self.other, self.context);
    }

    fn failed(&self, error: impl std::fmt::Display) -> String {
        format!("{}: {error}", self.step)
    }

    /// Both run side by side, and their work must show their timeslices.
    async fn slices_act(&mut self) -> Result<(), String> {
        self.step = "setting the timeslices of two workers";
        for (worker, usec) in [(&self.worker, LONG_USEC), (&self.other, SHORT_USEC)] {
            let Some((set, _)) = worker.channels.clone() else {
                return Err(self.failed("the channel groups of a worker were not found"));
            };
            let host = self.context.host.clone();
            let set = blocking(move || host.set_timeslice(&set, usec)).await;
            set.map_err(|error| self.failed(error))?
                .map_err(|error| self.failed(error))?;
        }
        self.step = "comparing two workers by their timeslices";
        let mut seen = [0, 0];
        let mut begin = Command::Start;
        for time in SIDE_BY_SIDE {
            let before = seen;
            seen = self.side_by_side(begin, time).await?;
            begin = Command::Freeze(false);
            let [long, short] = [seen[0] - before[0], seen[1] - before[1]];
            if short > 0 && long >= short.saturating_mul(LEAST_RATIO) {
                return Ok(());
            }
            tracing::debug!(long, short, ?time, "timeslices do not show");
        }
        Err(format!(
            "timeslices of {LONG_USEC} and {SHORT_USEC} us were read back but do not act: \
             {} and {} iterations in {} ms",
            seen[0],
            seen[1],
            SIDE_BY_SIDE.iter().map(Duration::as_millis).sum::<u128>()
        ))
    }

    /// Lets both run for a while; iterations of each since its start, exact.
    async fn side_by_side(&mut self, begin: Command, time: Duration) -> Result<[u64; 2], String> {
        let outcome = async {
            let mut workers = [&mut self.worker, &mut self.other];
            for worker in &mut workers {
                worker.link.call(begin.clone()).await?;
            }
            tokio::time::sleep(time).await;
            let mut iterations = [0; 2];
            for (worker, count) in workers.into_iter().zip(&mut iterations) {
                let (_, counters) = worker.link.call_counted(Command::Freeze(true)).await?;
                *count = counters.map_or(0, |counters| counters.iterations);
            }
            Ok(iterations)
        };
        let outcome: Result<_, Refusal> = outcome.await;
        outcome.map_err(|error| self.failed(error))
    }

    /// Launches of the worker that have ended. Asked for with a command that
    /// changes nothing and that a worker obeys without its GPU.
    async fn ended(&mut self) -> Result<u64, String> {
        let command = Command::ReportEvery { ms: REPORT_MS };
        match self.worker.link.call_counted(command).await {
            Ok((_, Some(Counters { ended, .. }))) => Ok(ended),
            Ok((_, None)) => Err(self.failed("the worker answered without its counters")),
            Err(error) => Err(self.failed(error)),
        }
    }

    /// The longest pause between two ends of launches of the worker while it runs.
    async fn longest_pause(&mut self) -> Result<Duration, String> {
        let begun = Instant::now();
        let (mut last, mut since) = (self.ended().await?, Instant::now());
        let (mut looks, mut longest) = (0, Duration::ZERO);
        while looks < PACE_LOOKS || begun.elapsed() < PACE {
            if begun.elapsed() > PROGRESS {
                return Err(self.failed(format!(
                    "only {looks} looks saw a launch end within {} s, before anything was stopped",
                    PROGRESS.as_secs()
                )));
            }
            tokio::time::sleep(LOOK).await;
            let ended = self.ended().await?;
            if ended > last {
                longest = longest.max(since.elapsed());
                (last, since) = (ended, Instant::now());
                looks += 1;
            }
        }
        Ok(longest)
    }

    /// Lists the worker's channels; none of its GPU work goes without one.
    async fn list(&self) -> Result<ChannelSet, String> {
        let (host, gpu) = (self.context.host.clone(), self.gpu.clone());
        let pid = self.worker.spawned.pid;
        let listed = blocking(move || host.list(pid, &gpu, Search::Recent)).await;
        let set = listed
            .map_err(|error| self.failed(error))?
            .map_err(|error| self.failed(error))?;
        if set.channels.is_empty() {
            return Err(self.failed(format!("process {pid} runs and has no channel")));
        }
        Ok(set)
    }

    /// Notes what is about to be stopped, here and in the journal.
    async fn arm(&mut self, set: ChannelSet) -> Result<(), String> {
        let pid = self.worker.spawned.pid;
        let Some(start) = procfs::start_time(pid) else {
            return Err(self.failed(format!("process {pid} has ended")));
        };
        let armed = Armed {
            process: Helper { pid, start },
            gpu: ArmedGpu {
                index: self.gpu.index,
                uuid: self.gpu.uuid.clone(),
            },
            set: set.clone(),
        };
        let journal = self.context.journal.clone();
        let noted = blocking(move || journal.arm(armed)).await;
        noted
            .map_err(|error| self.failed(error))?
            .map_err(|error| self.failed(format!("the journal cannot be written: {error}")))?;
        self.armed = Some(set);
        Ok(())
    }

    async fn resume(&self) -> Result<(), String> {
        let (host, gpu) = (self.context.host.clone(), self.gpu.clone());
        let sets: Vec<ChannelSet> = self.armed.iter().cloned().collect();
        let resumed = blocking(move || host.resume(&gpu, &sets)).await;
        resumed
            .map_err(|error| self.failed(error))?
            .map_err(|error| self.failed(error))
    }

    /// A resume of who runs must change nothing: after a crash nobody knows who
    /// was stopped.
    async fn resume_while_it_runs(&mut self) -> Result<(), String> {
        self.step = "resuming a worker that runs";
        let set = self.list().await?;
        self.arm(set).await?;
        self.resume().await?;
        self.runs_on().await
    }

    /// Stops the worker, which has launches on the GPU, until a listing finds
    /// nothing that was not stopped.
    async fn stop(&mut self) -> Result<(), String> {
        self.step = "stopping a worker in the middle of a launch";
        let mut stopped = ChannelSet::default();
        for _ in 0..LISTINGS {
            let set = self.list().await?;
            if set.beyond(&stopped).channels.is_empty() {
                return Ok(());
            }
            self.arm(set.clone()).await?;
            let (host, gpu, sets) = (
                self.context.host.clone(),
                self.gpu.clone(),
                vec![set.clone()],
            );
            let outcome = blocking(move || host.stop(&gpu, &sets)).await;
            outcome
                .map_err(|error| self.failed(error))?
                .map_err(|error| self.failed(error))?;
            stopped = set;
        }
        Err(self.failed(format!(
            "each of {LISTINGS} listings found channels that the one before had not"
        )))
    }

    /// The worker must do nothing for longer than it ever paused while it ran.
    async fn stands(&mut self, pause: Duration) -> Result<(), String> {
        let [least, most] = STAND;
        let time = (pause * 4).clamp(least, most);
        let mut seen = Vec::new();
        for _ in 0..STAND_LOOKS {
            tokio::time::sleep(SETTLE).await;
            let before = self.ended().await?;
            tokio::time::sleep(time).await;
            match self.ended().await? - before {
                0 => return Ok(()),
                went_on => seen.push(went_on.to_string()),
            }
        }
        let channels = self.armed.as_ref().map_or(0, |set| set.channels.len());
        Err(self.failed(format!(
            "{channels} channels were stopped without an error, and it went on: {} launches \
             ended in {} ms each",
            seen.join(", "),
            time.as_millis()
        )))
    }

    /// The worker must end launches.
    async fn runs_on(&mut self) -> Result<(), String> {
        let begun = Instant::now();
        let before = self.ended().await?;
        loop {
            let went_on = self.ended().await?.saturating_sub(before);
            if went_on >= RUNS_ON {
                return Ok(());
            }
            if begun.elapsed() > PROGRESS {
                return Err(self.failed(format!(
                    "the resume returned without an error, and {went_on} launches ended in \
                     {} s after it",
                    PROGRESS.as_secs()
                )));
            }
            tokio::time::sleep(LOOK).await;
        }
    }
}
