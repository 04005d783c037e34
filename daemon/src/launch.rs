//! Bringing a worker from nothing to ready, and seeing it off.

use std::sync::Arc;
use std::time::Duration;

use gcgroup_device::{ChannelSet, ClientMark, DeviceError, GpuInfo, Host, Search};
use gcgroup_kernels::engine::Facts;
use gcgroup_kernels::protocol::{Answer, Command, GpuAddress, Readiness, Setup};
use gcgroup_model::change::{Begun, Refusal};
use gcgroup_policy::enforcer::Sharing;
use parking_lot::Mutex;

use crate::identity::Identity;
use crate::journal::Journal;
use crate::link::Link;
use crate::mps::MpsKeeper;
use crate::spawn::{self, Spawned};

/// How long a worker may take to end when it was asked to.
pub(crate) const GRACE: Duration = Duration::from_millis(500);

/// A worker that is prepared, without its process.
struct Prepared {
    link: Link,
    readiness: Readiness,
    channels: Option<(ChannelSet, u64)>,
    mps: Option<u64>,
}

/// What launches need of the service.
pub(crate) struct Context {
    /// The host.
    pub(crate) host: Arc<dyn Host>,
    /// The private MPS servers.
    pub(crate) mps: Arc<MpsKeeper>,
    /// Where helpers are noted.
    pub(crate) journal: Arc<Journal>,
    /// Who workers run as; `None` leaves them this process's user.
    pub(crate) identity: Option<Identity>,
}

/// A worker that waits for [`Command::Start`].
#[derive(Debug)]
pub(crate) struct Ready {
    /// The process.
    pub(crate) spawned: Spawned,
    /// Its control socket.
    pub(crate) link: Link,
    /// What it turned out to be.
    pub(crate) readiness: Readiness,
    /// Its channel groups and their timeslice in microseconds, under temporal
    /// sharing and where the driver lets us see them.
    pub(crate) channels: Option<(ChannelSet, u64)>,
    /// Which start of the private MPS server it is a client of.
    pub(crate) mps: Option<u64>,
}

/// Refusal of a user's change for a device's error.
pub(crate) fn refusal(error: DeviceError) -> Refusal {
    match error {
        DeviceError::NoDriver(_) | DeviceError::NoGpu(_) => Refusal::Gone("the GPU".to_owned()),
        DeviceError::NoProcess(pid) => Refusal::Gone(format!("process {pid}")),
        // Nothing could enforce the change now.
        DeviceError::NoContext(why) | DeviceError::Unsupported(why) => Refusal::Unsupported(why),
        DeviceError::Denied(why) => Refusal::Denied(why),
        DeviceError::Failed(why) => Refusal::Failed(why),
    }
}

/// Runs a blocking call beside the controller.
pub(crate) async fn blocking<T: Send + 'static>(
    call: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Refusal> {
    tokio::task::spawn_blocking(call)
        .await
        .map_err(|error| Refusal::Failed(format!("a helper thread failed: {error}")))
}

impl Context {
    /// Prepares a workload on a GPU within `deadline`. A worker that did not
    /// become ready is ended.
    ///
    /// # Errors
    /// Whatever went wrong, or that the deadline passed.
    pub(crate) async fn launch(
        self: Arc<Self>,
        gpu: GpuInfo,
        sharing: Sharing,
        setup: Setup,
        deadline: Duration,
    ) -> Result<Ready, Refusal> {
        // Outside of the timed part, so that an unfinished worker is seen off.
        let started: Arc<Mutex<Option<Spawned>>> = Arc::default();
        let steps = self.clone().steps(gpu, sharing, setup, started.clone());
        let outcome = match tokio::time::timeout(deadline, steps).await {
            Ok(outcome) => outcome,
            Err(_) => Err(Refusal::TimedOut {
                what: "the launch".to_owned(),
                limit_ms: u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX),
                begun: Begun::No,
            }),
        };
        let spawned = started.lock().take();
        match (outcome, spawned) {
            (Ok(prepared), Some(spawned)) => Ok(Ready {
                spawned,
                link: prepared.link,
                readiness: prepared.readiness,
                channels: prepared.channels,
                mps: prepared.mps,
            }),
            (outcome, spawned) => {
                if let Some(spawned) = spawned {
                    tokio::spawn(see_off(spawned, self.journal.clone()));
                }
                Err(outcome
                    .err()
                    .unwrap_or_else(|| Refusal::Failed("the worker was lost".to_owned())))
            }
        }
    }

    async fn steps(
        self: Arc<Self>,
        gpu: GpuInfo,
        sharing: Sharing,
        setup: Setup,
        started: Arc<Mutex<Option<Spawned>>>,
    ) -> Result<Prepared, Refusal> {
        let client = match sharing {
            Sharing::Spatial => {
                let (mps, gpu) = (self.mps.clone(), gpu.clone());
                let client = blocking(move || mps.client(&gpu)).await?;
                Some(client.map_err(refusal)?)
            }
            Sharing::Temporal => None,
        };
        let mps = client.as_ref().map(|client| client.start);
        let mark = match sharing {
            Sharing::Spatial => None,
            Sharing::Temporal => {
                let host = self.host.clone();
                blocking(move || host.mark()).await?.ok()
            }
        };
        let mut link = self
            .spawn(
                client.map(|client| client.environment).unwrap_or_default(),
                &started,
            )
            .await?;
        let pid = started
            .lock()
            .as_ref()
            .map(|spawned| spawned.pid)
            .unwrap_or_default();
        open(&self.host, &gpu, &mut link).await?;
        let Answer::Ready(readiness) = link.call(Command::Prepare(Box::new(setup))).await? else {
            return Err(Refusal::Failed(
                "the worker gave a wrong answer to Prepare".to_owned(),
            ));
        };
        let channels = match mark {
            Some(mark) => self.channels(pid, gpu, mark).await,
            None => None,
        };
        if mps.is_some() {
            // Now that it has a client there is a server whose end can be seen.
            let keeper = self.mps.clone();
            blocking(move || keeper.look()).await?;
        }
        Ok(Prepared {
            link,
            readiness,
            channels,
            mps,
        })
    }

    async fn spawn(
        self: &Arc<Self>,
        environment: Vec<(String, String)>,
        started: &Arc<Mutex<Option<Spawned>>>,
    ) -> Result<Link, Refusal> {
        let context = self.clone();
        let slot = started.clone();
        let socket = blocking(move || {
            let spawned = spawn::worker(context.identity, &environment, &context.journal)?;
            let socket = spawned.socket.try_clone()?;
            *slot.lock() = Some(spawned);
            Ok::<_, std::io::Error>(socket)
        })
        .await?;
        socket
            .and_then(Link::new)
            .map_err(|error| Refusal::Failed(format!("a worker could not be started: {error}")))
    }

    /// The channel groups of a fresh worker. Not finding them costs a setting,
    /// not the launch.
    async fn channels(
        &self,
        pid: u32,
        gpu: GpuInfo,
        mark: ClientMark,
    ) -> Option<(ChannelSet, u64)> {
        let host = self.host.clone();
        let found = blocking(move || {
            let groups = host.list(pid, &gpu, Search::Since(mark))?;
            let timeslices = host.timeslices(&groups)?;
            Ok::<_, DeviceError>((groups, timeslices.usec.first().copied().unwrap_or_default()))
        })
        .await;
        match found {
            Ok(Ok(found)) => Some(found),
            Ok(Err(error)) => {
                tracing::warn!(pid, %error, "the channel groups of a worker were not found");
                None
            }
            Err(_) => None,
        }
    }

    /// Asks a worker of its own for the facts of a GPU; it ends right after.
    ///
    /// # Errors
    /// As [`Context::launch`].
    pub(crate) async fn probe(
        self: Arc<Self>,
        gpu: GpuInfo,
        deadline: Duration,
    ) -> Result<Facts, Refusal> {
        let started: Arc<Mutex<Option<Spawned>>> = Arc::default();
        let asked = async {
            let mut link = self.spawn(Vec::new(), &started).await?;
            let facts = open(&self.host, &gpu, &mut link).await?;
            link.call(Command::End).await?;
            Ok(facts)
        };
        let outcome = tokio::time::timeout(deadline, asked).await;
        if let Some(spawned) = started.lock().take() {
            tokio::spawn(see_off(spawned, self.journal.clone()));
        }
        outcome.unwrap_or_else(|_| {
            Err(Refusal::Failed(
                "the GPU did not answer a probe in time".to_owned(),
            ))
        })
    }
}

async fn open(host: &Arc<dyn Host>, gpu: &GpuInfo, link: &mut Link) -> Result<Facts, Refusal> {
    let address: GpuAddress = host.worker_address(gpu).parse().map_err(Refusal::Failed)?;
    match link.call(Command::Open(address)).await? {
        Answer::Opened(facts) => Ok(facts),
        _ => Err(Refusal::Failed(
            "the worker gave a wrong answer to Open".to_owned(),
        )),
    }
}

/// Closes our end of a worker's socket, kills it if it does not end by itself,
/// reaps it, and strikes it from the journal.
pub(crate) async fn see_off(spawned: Spawned, journal: Arc<Journal>) {
    let Spawned {
        mut child,
        pid,
        pidfd,
        socket,
    } = spawned;
    // Whoever else holds the socket: the worker sees its end.
    if let Err(error) = socket.shutdown(std::net::Shutdown::Both) {
        tracing::debug!(pid, %error, "the worker's socket was closed already");
    }
    if tokio::time::timeout(GRACE, child.wait()).await.is_err() {
        spawn::kill(&pidfd);
    }
    reap(&mut child, pid, journal).await;
}

/// Waits for the end of a worker's process, which takes as long as the kernel
/// needs to free what it held on the GPU.
async fn reap(child: &mut tokio::process::Child, pid: u32, journal: Arc<Journal>) {
    match child.wait().await {
        Ok(status) => tracing::debug!(pid, %status, "a worker was reaped"),
        Err(error) => tracing::warn!(pid, %error, "a worker could not be reaped"),
    }
    if let Ok(Err(error)) = blocking(move || journal.drop_worker(pid)).await {
        tracing::warn!(pid, %error, "the journal still lists a worker that has ended");
    }
}

/// Watches an adopted worker: reaps it, and tells the controller that its
/// process has ended.
pub(crate) async fn watch(
    spawned: Spawned,
    node: gcgroup_model::snapshot::NodeId,
    events: tokio::sync::mpsc::UnboundedSender<crate::controller::Event>,
    journal: Arc<Journal>,
) {
    let Spawned {
        mut child,
        pid,
        socket,
        ..
    } = spawned;
    // The controller's half must be the last: its end is the worker's end.
    drop(socket);
    reap(&mut child, pid, journal).await;
    // The controller may have ended already.
    let _ = events.send(crate::controller::Event::WorkerReaped { node });
}
