//! `gcgroupd serve`: everything put together, and taken apart again.

use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use gcgroup_device::{DeviceError, GpuInfo, Telemetry};
use gcgroup_fs::{Mounted, Options};
use rustix::process::{Resource, getrlimit, setrlimit};
use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};

use crate::config::Config;
use crate::controller::{Controller, End, Event, Shared};
use crate::endings::Endings;
use crate::host::Awaited;
use crate::journal::{self, HostKind, Journal};
use crate::launch::{Context, blocking};
use crate::mps::MpsKeeper;
use crate::recover::StillStopped;
use crate::remembered::Remembered;
use crate::{guardian, identity, recover};

/// How long a start waits for the guardian of a service that just died.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);
/// Between two looks for a driver, and for GPUs that were added.
const LOOK_AGAIN: Duration = Duration::from_secs(3);
/// Sampled values are at most 100 ms old while somebody reads.
const READ_SAMPLE: Duration = Duration::from_millis(90);
/// The first value after a pause is at most 1 s old.
const UNREAD_SAMPLE: Duration = Duration::from_millis(900);
/// A reader is thought to be there for so long after its last read.
const READER_STAYS: Duration = Duration::from_secs(2);

/// Serves until SIGTERM or SIGINT, or until the mount is taken away.
///
/// # Errors
/// What keeps it from serving, or a mount that was lost.
pub(crate) fn run(config: Config, lives: Lives) -> Result<()> {
    abort_on_panic();
    let worker = identity::worker(&config)?;
    let gid = identity::file_group(&config)?;
    if !rustix::process::geteuid().is_root() {
        bail!(
            "gcgroupd serve needs root: it mounts a filesystem and starts workers as another user"
        );
    }
    recover::make_state(&config.state)
        .with_context(|| format!("cannot make state = {}", config.state.display()))?;
    let lock = journal::lock(&config.state, LOCK_PATIENCE)?;
    match recover::undo(&config.state) {
        // The journal keeps them; barring the start would help nobody.
        Err(error) if error.is::<StillStopped>() => {
            tracing::error!(%error, "recovery is not complete")
        }
        outcome => outcome?,
    }
    raise_descriptors();
    // A dead mount neither is a directory nor lets one be made.
    gcgroup_fs::clean_stale_mount(&config.mountpoint)
        .with_context(|| format!("cannot clean mountpoint = {}", config.mountpoint.display()))?;
    std::fs::create_dir_all(&config.mountpoint)
        .with_context(|| format!("cannot make mountpoint = {}", config.mountpoint.display()))?;
    let kind = match config.sim {
        Some(_) => HostKind::Sim,
        None => HostKind::Nvidia,
    };
    let journal = Arc::new(
        Journal::begin(&config.state, &config.mountpoint, kind)
            .context("cannot begin a journal")?,
    );

    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        // While the controller waits awake, every turn looks for answers.
        .event_interval(1)
        .build()
        .context("cannot start the runtime")?;
    let owners = Owners { worker, gid };
    let end = runtime.block_on(serve(config, owners, journal.clone(), lives))?;
    // Threads that hang in the driver do not keep the service from ending.
    runtime.shutdown_timeout(Duration::from_millis(500));
    // What a hanging driver has kept is ended now, as after a crash.
    recover::undo_at_end(&journal, lock)?;
    match end {
        End::Asked => Ok(()),
        End::MountLost => bail!("the mount was taken away"),
    }
}

/// Counting takes up to eight descriptors a thread of each process.
fn raise_descriptors() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!(%error, "the limit of descriptors could not be raised");
    }
}

/// How long the service lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lives {
    /// Until it is told to end.
    ByItself,
    /// No longer than whoever holds the other end of its standard input.
    WithItsInput,
}

/// Waits until standard input has ended, for good where nobody holds it.
async fn end_of_input(lives: Lives) {
    match lives {
        Lives::ByItself => std::future::pending().await,
        Lives::WithItsInput => {
            let ended =
                blocking(|| std::io::copy(&mut std::io::stdin(), &mut std::io::sink())).await;
            if !matches!(ended, Ok(Ok(_))) {
                tracing::warn!("standard input failed, which counts as its end");
            }
        }
    }
}

/// A broken invariant ends the process, whichever thread found it: systemd
/// restarts it into recovery, and the guardian resumes what was stopped.
fn abort_on_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        report(info);
        std::process::abort();
    }));
}

/// Users and groups that were looked up.
struct Owners {
    worker: identity::Identity,
    gid: u32,
}

async fn serve(config: Config, who: Owners, journal: Arc<Journal>, lives: Lives) -> Result<End> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot wait for SIGINT")?;
    let guardian = guardian::start(&config.state)?;
    tokio::spawn(guardian::keep(guardian, config.state.clone()));
    let host = Arc::new(match config.sim {
        Some(gpus) => Awaited::simulated(&config.state, gpus)?,
        None => Awaited::nvidia(config.any_driver_branch),
    });
    let (sender, receiver) = unbounded_channel();
    let shared = Shared::new(sender.clone());
    let endings = Endings::start(sender.clone()).context("cannot watch processes")?;
    let mps = Arc::new(MpsKeeper::new(
        host.clone(),
        journal.clone(),
        config.state.clone(),
    ));
    let context = Arc::new(Context {
        host: host.clone(),
        mps: mps.clone(),
        journal,
        identity: Some(who.worker),
    });

    let mounted: Arc<OnceLock<Mounted>> = Arc::default();
    let pollers = mounted.clone();
    let published = Box::new(move || {
        if let Some(mounted) = pollers.get() {
            mounted.published();
        }
    });
    let options = Options {
        mountpoint: config.mountpoint.clone(),
        group_writes: config.group_writes,
        gid: who.gid,
        version: env!("CARGO_PKG_VERSION").to_owned(),
    };
    let mount = Mounted::new(options, shared.clone())
        .with_context(|| format!("cannot mount {}", config.mountpoint.display()))?;
    tokio::spawn(find_gpus(host.clone(), sender.clone()));
    tokio::spawn(sample_gpus(host, sender.clone(), shared.clone()));
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            () = end_of_input(lives) => {}
        }
        // The controller may have ended already.
        let _ = sender.send(Event::Stop);
    });
    tracing::info!(mountpoint = %config.mountpoint.display(), state = %config.state.display(), "serving");
    notify(&[NotifyState::Ready]);
    if mounted.set(mount).is_err() {
        bail!("the mount was made twice");
    }
    let remembered = Remembered::load(&config.state);
    let controller = Controller::new(config, context, shared, published, remembered, endings);
    let end = controller.run(receiver).await;
    notify(&[NotifyState::Stopping]);
    if blocking(move || mps.stop_all()).await.is_err() {
        tracing::warn!("the MPS servers are left to the guardian");
    }
    if let Some(mounted) = Arc::try_unwrap(mounted).ok().and_then(OnceLock::into_inner) {
        mounted.unmount().context("cannot unmount")?;
    }
    Ok(end)
}

/// Tells systemd, where it wants to know.
fn notify(states: &[NotifyState]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!(%error, "systemd could not be told");
    }
}

/// Waits for a driver, then looks for GPUs that come later.
async fn find_gpus(host: Arc<Awaited>, events: UnboundedSender<Event>) {
    let mut told = false;
    loop {
        let asked = host.clone();
        let found = blocking(move || asked.gpus()).await;
        if let Ok(Err(error)) = &found
            && !told
        {
            told = true;
            tracing::warn!(%error, "waiting for a driver");
        }
        if let Ok(Ok(gpus)) = found
            && events.send(Event::Found(gpus)).is_err()
        {
            return;
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

/// Reads every GPU's figures as often as somebody reads them here.
async fn sample_gpus(host: Arc<Awaited>, events: UnboundedSender<Event>, shared: Arc<Shared>) {
    let mut gpus: Vec<GpuInfo> = Vec::new();
    loop {
        if gpus.is_empty() {
            let asked = host.clone();
            gpus = match blocking(move || asked.gpus()).await {
                Ok(Ok(gpus)) => gpus,
                _ => Vec::new(),
            };
        }
        for gpu in gpus.clone() {
            let (asked, index) = (host.clone(), gpu.index);
            let result = blocking(move || asked.sample(&gpu)).await;
            let result =
                result.unwrap_or_else(|refusal| Err(DeviceError::Failed(refusal.to_string())));
            // A GPU that went or came back may have another index.
            if result.is_err() {
                gpus.clear();
            }
            if events.send(Event::Sampled { gpu: index, result }).is_err() {
                return;
            }
        }
        let pause = if shared.unread_for() < READER_STAYS {
            READ_SAMPLE
        } else {
            UNREAD_SAMPLE
        };
        tokio::time::sleep(pause).await;
    }
}

/// `gcgroupd recover`.
///
/// # Errors
/// A living service, or what could not be undone.
pub(crate) fn recover(state: &Path) -> Result<()> {
    recover::run(state)
}
