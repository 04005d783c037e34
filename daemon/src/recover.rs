//! Undoing what a service left behind when it went without saying so.

mod resume;

use std::fmt;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use gcgroup_device::{ChannelSet, DeviceError, ProcessKind};
use gcgroup_device_nvidia::{NvidiaHost, Options, end_orphan, remove_probes};
use gcgroup_device_sim::{SOCKET_NAME, SimHost};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::journal::{self, Armed, ArmedGpu, Helper, HostKind, Journal, LockError, Records, Role};
use crate::{procfs, spawn};

use resume::{Left, Opened};

/// How long a worker may take to see the end of its socket before it is killed.
const GRACE: Duration = Duration::from_millis(500);
/// How long a process that does not resume is tried.
const RESUME: Duration = Duration::from_secs(5);
/// How long `recover` waits for a service that is about to end.
const PATIENCE: Duration = Duration::from_secs(2);
/// What there is while the driver's module is loaded.
const DRIVER: [&str; 2] = ["/proc/driver/nvidia/version", "/dev/nvidiactl"];

/// Processes that may be stopped still. The journal lists them, and nothing else
/// is left to undo.
#[derive(Debug)]
pub(crate) struct StillStopped {
    /// Each with its pid, the GPU's UUID and what the last try failed with.
    processes: Vec<(u32, String, String)>,
}

impl fmt::Display for StillStopped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("these processes may still be stopped:")?;
        for (number, (pid, gpu, why)) in self.processes.iter().enumerate() {
            let separator = if number == 0 { "" } else { ";" };
            write!(f, "{separator} {pid} on GPU {gpu} ({why})")?;
        }
        Ok(())
    }
}

impl std::error::Error for StillStopped {}

/// Undoes what the journal in `state` lists. The caller holds the lock.
///
/// # Errors
/// What could not be undone, which the journal still lists: [`StillStopped`], or
/// a mount.
pub(crate) fn undo(state: &Path) -> Result<()> {
    undo_within(state, RESUME)
}

/// Undoes everything at the end of the service that has this journal, and closes
/// it. A process that is armed still has a keeper that hangs in the driver, whose
/// stop may come true as late as the end of this process. So the journal goes on
/// listing it, even when it was resumed, for the guardian; and the lock is kept
/// until this process is really gone, so that no service begins before that.
///
/// # Errors
/// As [`undo`]; none of a process that was resumed.
pub(crate) fn undo_at_end(journal: &Journal, lock: File) -> Result<()> {
    let Some(records) = journal.close() else {
        return Ok(());
    };
    let armed = records.armed.iter();
    let held = armed
        .filter(|armed| is_alive(armed.process))
        .map(|armed| armed.process.pid)
        .collect::<Vec<_>>();
    if !held.is_empty() {
        tracing::warn!(
            ?held,
            "calls about these processes have not ended; the guardian resumes them again"
        );
        // The kernel closes it with the last thread.
        std::mem::forget(lock);
    }
    undo_records(journal.state(), records, RESUME, Keep::Armed)
}

/// Which armed processes the journal lists afterwards, as far as they live.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Keep {
    /// Those that could not be resumed.
    Left,
    /// All.
    Armed,
}

fn undo_within(state: &Path, patience: Duration) -> Result<()> {
    match journal::load(state) {
        Ok(Some(records)) => undo_records(state, records, patience, Keep::Left),
        Ok(None) => Ok(()),
        Err(error) => {
            // What it listed is lost; barring every later start helps nobody.
            let aside = journal::set_aside(state).context("cannot set a damaged journal aside")?;
            let records = everybody(state);
            tracing::error!(error = %format!("{error:#}"), aside = %aside.display(), processes = records.armed.len(), "the journal is damaged and was set aside: every process on a GPU is resumed");
            undo_records(state, records, patience, Keep::Left)
        }
    }
}

fn undo_records(state: &Path, records: Records, patience: Duration, keep: Keep) -> Result<()> {
    // Before everything else: they wait.
    let left = resume_armed(state, &records, patience);
    end_workers(&records);
    end_mps(&records);
    if records.host == HostKind::Nvidia {
        end_counting();
    }
    let unmounted = match &records.mountpoint {
        Some(mountpoint) => gcgroup_fs::clean_stale_mount(mountpoint)
            .map(drop)
            .with_context(|| format!("cannot unmount {}", mountpoint.display())),
        None => Ok(()),
    };
    let processes = left.iter().map(|left| {
        let armed = &left.armed;
        (armed.process.pid, armed.gpu.uuid.clone(), left.why.clone())
    });
    let stopped = StillStopped {
        processes: processes.collect(),
    };
    let mut armed = match keep {
        Keep::Left => left.into_iter().map(|left| left.armed).collect(),
        Keep::Armed => records.armed,
    };
    armed.retain(|armed| is_alive(armed.process));
    if armed.is_empty() && unmounted.is_ok() {
        journal::remove(state).context("cannot remove the journal")?;
    } else {
        let kept = Records {
            mountpoint: records.mountpoint.filter(|_| unmounted.is_err()),
            armed,
            host: records.host,
            ..Records::default()
        };
        journal::write(state, &kept).context("cannot write down what is left to undo")?;
    }
    match unmounted {
        Ok(()) if stopped.processes.is_empty() => Ok(()),
        Ok(()) => Err(stopped.into()),
        Err(error) if stopped.processes.is_empty() => Err(error),
        Err(error) => Err(error.context(stopped)),
    }
}

/// Lets every armed process run again; returns those where that failed.
fn resume_armed(state: &Path, records: &Records, patience: Duration) -> Vec<Left> {
    let begun = Instant::now();
    let (host, state) = (records.host, state.to_owned());
    let left = resume::all(move || open(&state, host), records.armed.clone(), patience);
    for Left { armed, why } in &left {
        let (pid, gpu) = (armed.process.pid, &armed.gpu.uuid);
        tracing::error!(pid, gpu, why, "a process may still be stopped");
    }
    if !records.armed.is_empty() {
        let (armed, took) = (records.armed.len(), begun.elapsed());
        tracing::info!(
            armed,
            left = left.len(),
            ?took,
            "armed processes were resumed"
        );
    }
    left
}

fn open(state: &Path, host: HostKind) -> Result<Opened, DeviceError> {
    match host {
        HostKind::Nvidia => open_nvidia(),
        HostKind::Sim => open_sim(&state.join(SOCKET_NAME)),
    }
}

/// Every process on every GPU, for when nobody knows which of them are stopped:
/// to resume one that runs is harmless.
fn everybody(state: &Path) -> Records {
    let host = if state.join(SOCKET_NAME).exists() {
        HostKind::Sim
    } else {
        HostKind::Nvidia
    };
    let armed = match open(state, host) {
        Ok(Opened::Host(driver)) => computing(&*driver),
        Ok(Opened::Gone) => Ok(Vec::new()),
        Err(error) => Err(error),
    };
    let armed = armed.unwrap_or_else(|error| {
        tracing::error!(%error, "processes that are stopped cannot be found");
        Vec::new()
    });
    Records {
        armed,
        host,
        ..Records::default()
    }
}

fn computing(driver: &dyn resume::Resumes) -> Result<Vec<Armed>, DeviceError> {
    let mut armed = Vec::new();
    for gpu in driver.gpus()? {
        for process in driver.processes(&gpu)? {
            // A client's channels are in its server's groups.
            let client = process.kind == ProcessKind::MpsClient;
            let Some(start) = procfs::start_time(process.pid).filter(|_| !client) else {
                continue;
            };
            armed.push(Armed {
                process: Helper {
                    pid: process.pid,
                    start,
                },
                gpu: ArmedGpu {
                    index: gpu.index,
                    uuid: gpu.uuid.clone(),
                },
                set: ChannelSet {
                    pid: process.pid,
                    ..ChannelSet::default()
                },
            });
        }
    }
    Ok(armed)
}

fn open_nvidia() -> Result<Opened, DeviceError> {
    // Processes keep the module loaded for as long as they have channels.
    if DRIVER.iter().all(|path| !Path::new(path).exists()) {
        return Ok(Opened::Gone);
    }
    // What a service could stop can be resumed, whatever it was allowed.
    let options = Options {
        any_driver_branch: true,
    };
    NvidiaHost::open_with(options).map(|host| Opened::Host(Arc::new(host)))
}

fn open_sim(socket: &Path) -> Result<Opened, DeviceError> {
    // Opening it waits for a host that is being started, which none is now.
    match try_connect(socket) {
        Err(Errno::NOENT | Errno::CONNREFUSED) => Ok(Opened::Gone),
        Err(error) => Err(DeviceError::NoDriver(format!(
            "{}: {error}",
            socket.display()
        ))),
        Ok(()) => SimHost::open(socket).map(|host| Opened::Host(Arc::new(host))),
    }
}

fn try_connect(path: &Path) -> rustix::io::Result<()> {
    let address = SocketAddrUnix::new(path)?;
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?;
    connect(&socket, &address)
}

/// Workers end by themselves when the service's end of their socket closes; one
/// that hangs in the driver is killed.
fn end_workers(records: &Records) {
    let give_up = Instant::now() + GRACE;
    for worker in &records.workers {
        while is_alive(*worker) && Instant::now() < give_up {
            std::thread::sleep(Duration::from_millis(10));
        }
        if is_alive(*worker) {
            tracing::warn!(
                pid = worker.pid,
                "a worker outlived its service and is killed"
            );
            kill(*worker);
        }
    }
}

fn end_mps(records: &Records) {
    for record in &records.mps {
        let Helper { pid, start } = record.process;
        if let Err(error) = end_orphan(pid, start, &record.directory) {
            tracing::warn!(pid, %error, "an MPS server could not be ended");
        }
    }
}

/// Removes the probes that nobody reads any more. Left in place they cost each
/// launch below a microsecond and change nothing.
fn end_counting() {
    match remove_probes() {
        Ok(0) => {}
        Ok(probes) => tracing::info!(probes, "probes of launches were removed"),
        Err(error) => tracing::warn!(%error, "probes of launches may be left"),
    }
}

/// Whether a recorded process still is the one that was recorded.
fn is_alive(helper: Helper) -> bool {
    procfs::is_running(helper.pid, helper.start)
}

fn kill(helper: Helper) {
    let Some(pid) = i32::try_from(helper.pid).ok().and_then(Pid::from_raw) else {
        return;
    };
    // The descriptor names one process; look again that it is the right one.
    if let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty())
        && is_alive(helper)
    {
        spawn::kill(&pidfd);
    }
}

/// Takes the lock and undoes.
///
/// # Errors
/// [`LockError`] for a living service, or what could not be undone.
pub(crate) fn run(state: &Path) -> Result<()> {
    // After an orderly end there is nothing to undo, and the directory may be on
    // its way out.
    if !journal::exists(state) {
        return Ok(());
    }
    let _lock = journal::lock_to_recover(state, PATIENCE)?;
    undo(state)
}

/// Whether recovery was kept away by a living service, which recovered when it
/// started.
pub(crate) fn is_served(error: &anyhow::Error) -> bool {
    matches!(
        error.downcast_ref(),
        Some(LockError::Held {
            by: Role::Service,
            ..
        })
    )
}

/// Makes the state directory: everybody may look up sockets in it, nobody but
/// root may make any.
///
/// # Errors
/// Those of mkdir(2).
pub(crate) fn make_state(state: &Path) -> io::Result<()> {
    std::fs::create_dir_all(state)?;
    rustix::fs::chmod(state, rustix::fs::Mode::from_raw_mode(0o755))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    use gcgroup_device::ChannelSet;
    use tempfile::TempDir;

    use crate::journal::{Armed, ArmedGpu};

    /// A state directory whose journal arms this process and lists a worker that
    /// has ended.
    fn state() -> (TempDir, Armed) {
        let state = tempfile::tempdir().expect("a temporary directory");
        let pid = std::process::id();
        let start = procfs::start_time(pid).expect("this process runs");
        let armed = Armed {
            process: Helper { pid, start },
            gpu: ArmedGpu {
                index: 0,
                uuid: "GPU-a".to_owned(),
            },
            set: ChannelSet::default(),
        };
        let records = Records {
            mountpoint: Some(state.path().join("mnt")),
            workers: vec![Helper {
                pid,
                start: start + 1,
            }],
            armed: vec![armed.clone()],
            host: HostKind::Sim,
            ..Records::default()
        };
        journal::write(state.path(), &records).expect("writable");
        (state, armed)
    }

    #[test]
    fn nothing_is_stopped_where_the_simulated_host_is_gone() {
        let (state, _) = state();
        undo(state.path()).expect("nobody serves the socket");
        assert_eq!(journal::load(state.path()).expect("readable"), None);
        // One that died has left its socket.
        let (state, _) = self::state();
        drop(UnixListener::bind(state.path().join(SOCKET_NAME)).expect("a socket"));
        undo(state.path()).expect("nobody serves the socket");
        assert_eq!(journal::load(state.path()).expect("readable"), None);
    }

    #[test]
    fn who_could_not_be_resumed_is_named_and_stays_in_the_journal_alone() {
        let (state, armed) = state();
        // Somebody is there who is no simulated host.
        let _other = UnixListener::bind(state.path().join(SOCKET_NAME)).expect("a socket");
        for _ in 0..2 {
            let error = undo_within(state.path(), Duration::from_millis(300));
            let error = error.expect_err("the process may be stopped");
            assert!(error.is::<StillStopped>(), "{error:#}");
            let pid = armed.process.pid.to_string();
            assert!(error.to_string().contains(&pid), "{error:#}");
            let kept = Records {
                armed: vec![armed.clone()],
                host: HostKind::Sim,
                ..Records::default()
            };
            assert_eq!(journal::load(state.path()).expect("readable"), Some(kept));
        }
    }

    #[test]
    fn who_is_armed_at_the_end_is_resumed_and_stays_for_the_guardian() {
        let (state, armed) = state();
        let lock = || journal::lock(state.path(), Duration::ZERO);
        let mountpoint = state.path().join("mnt");
        let journal = Journal::begin(state.path(), &mountpoint, HostKind::Sim).expect("writable");
        journal.add_worker(u32::MAX, 1).expect("writable");
        undo_at_end(&journal, lock().expect("nobody has it")).expect("the host is gone");
        let kept = Records {
            armed: vec![armed.clone()],
            host: HostKind::Sim,
            ..Records::default()
        };
        assert_eq!(journal::load(state.path()).expect("readable"), Some(kept));
        // A keeper that wakes up late stops nobody else.
        journal.arm(armed).expect_err("it is closed");
        undo_at_end(&journal, File::open("/dev/null").expect("readable")).expect("it is done");
        // What the guardian does, once this process is gone and its lock with it.
        undo(state.path()).expect("the host is gone");
        assert_eq!(journal::load(state.path()).expect("readable"), None);
    }

    #[test]
    fn the_lock_is_kept_at_the_end_only_for_who_is_armed() {
        let (state, armed) = state();
        let lock = || journal::lock(state.path(), Duration::ZERO);
        let begin = || Journal::begin(state.path(), Path::new("/none"), HostKind::Sim);
        let journal = begin().expect("writable");
        let Helper { pid, start } = armed.process;
        journal
            .disarm(pid, start, &armed.gpu.uuid)
            .expect("writable");
        undo_at_end(&journal, lock().expect("nobody has it")).expect("nothing was armed");
        assert_eq!(journal::load(state.path()).expect("readable"), None);
        let held = lock().expect("it was given back");
        let journal = begin().expect("writable");
        journal.arm(armed).expect("writable");
        undo_at_end(&journal, held).expect("the host is gone");
        lock().expect_err("this process lives");
    }

    #[test]
    fn a_service_that_serves_is_told_apart_from_a_recovery() {
        let held = |by| {
            let state = "/run/gcgroupd".into();
            is_served(&LockError::Held { state, by }.into())
        };
        assert!(held(Role::Service));
        assert!(!held(Role::Recovery));
        assert!(!is_served(&anyhow::anyhow!("it is in use")));
    }
}
