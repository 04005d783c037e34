//! FUSE: a mount, its threads and their end. Only this module and its `adapter`
//! know of it.
//!
//! Two threads take requests; neither ever waits for the service. A write keeps
//! its reply, which may be sent from any thread. A panic in a handler ends the
//! process: the library would only lose the thread, and with both lost every
//! caller would hang on a mount that looks healthy.

mod adapter;

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use fuser::{Config, Session, SessionACL};
use parking_lot::Mutex;
use rustix::event::{EventfdFlags, PollFd, PollFlags as Events, eventfd, poll};

use self::adapter::Adapter;
use crate::mount::{self, MountError, OwnMount};
use crate::operation::Operations;
use crate::service::{Options, Service};

/// Threads that take requests, each from a descriptor of its own. No handler waits
/// for anything, so the second is there for a reader that comes while the first
/// renders.
const THREADS: usize = 2;

/// How long an unmount waits for the last request to be answered. A descriptor
/// that somebody keeps open is served until the process ends.
const FAREWELL: Duration = Duration::from_millis(500);

/// The mounted control files. Dropping it unmounts them.
pub struct Mounted {
    core: Arc<Operations>,
    mount: Arc<OwnMount>,
    state: Arc<State>,
    ended: Mutex<mpsc::Receiver<()>>,
}

/// What the threads of one mount share.
#[derive(Debug)]
struct State {
    lost: AtomicBool,
    /// Set before the mount is taken away on purpose.
    unmounting: AtomicBool,
    /// Readable from then on, or when the session has ended.
    stop: OwnedFd,
}

impl State {
    fn stop(&self) {
        // The counter cannot overflow: it is written twice at most.
        let _ = rustix::io::write(&self.stop, &1_u64.to_ne_bytes());
    }

    fn lose(&self, core: &Operations) {
        let is_first = !self.lost.swap(true, Ordering::SeqCst);
        if is_first && !self.unmounting.load(Ordering::SeqCst) {
            tracing::error!("the mount of the control files was taken away");
            core.service().mount_lost();
        }
    }
}

impl Mounted {
    /// Mounts the control files and starts to serve them.
    ///
    /// # Errors
    /// As [`mount::mount`], and [`MountError::Session`].
    pub fn new(options: Options, service: Arc<dyn Service>) -> Result<Self, MountError> {
        let gid = options.gid;
        let core = Operations::new(service, options.group_writes, options.version)
            .map_err(MountError::Session)?;
        let core = Arc::new(core);
        let stop =
            eventfd(0, EventfdFlags::CLOEXEC).map_err(|errno| MountError::Session(errno.into()))?;
        let (mount, device) = mount::mount(&options.mountpoint)?;
        let state = Arc::new(State {
            lost: AtomicBool::new(false),
            unmounting: AtomicBool::new(false),
            stop,
        });
        let (sender, ended) = mpsc::channel();
        let mounted = Self {
            core,
            mount: Arc::new(mount),
            state,
            ended: Mutex::new(ended),
        };
        mounted
            .serve(gid, device, sender)
            .map_err(MountError::Session)?;
        Ok(mounted)
    }

    fn serve(&self, gid: u32, device: OwnedFd, ended: mpsc::Sender<()>) -> std::io::Result<()> {
        let adapter = Adapter::new(Arc::clone(&self.core), gid);
        let mut config = Config::default();
        config.n_threads = Some(THREADS);
        config.clone_fd = true;
        let session = Session::from_fd(adapter, device, SessionACL::All, config)?;
        let (core, state) = (Arc::clone(&self.core), Arc::clone(&self.state));
        std::thread::Builder::new()
            .name("fs-session".to_owned())
            .spawn(move || {
                if let Err(error) = session.run() {
                    tracing::error!(%error, "a thread of the filesystem ended");
                }
                state.lose(&core);
                state.stop();
                // Nobody listens when the mount was simply dropped.
                let _ = ended.send(());
            })?;
        let (core, state) = (Arc::clone(&self.core), Arc::clone(&self.state));
        let mount = Arc::clone(&self.mount);
        std::thread::Builder::new()
            .name("fs-mounts".to_owned())
            .spawn(move || watch(&mount, &core, &state))?;
        Ok(())
    }

    /// Wakes the pollers of events files whose text changed. To be called after
    /// each publication of a snapshot, from any thread; it does not block.
    pub fn published(&self) {
        self.core.published();
    }

    /// Whether the mount was taken away, or nobody serves it any more.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.state.lost.load(Ordering::SeqCst)
    }

    /// Where it is mounted, without symlinks.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.mount.path()
    }

    /// Unmounts the control files. Who has one open keeps it for as long as this
    /// process lives; changes that are under way are still answered.
    ///
    /// # Errors
    /// [`MountError::Unmount`].
    pub fn unmount(self) -> Result<(), MountError> {
        self.take_away()
    }

    fn take_away(&self) -> Result<(), MountError> {
        if self.state.unmounting.swap(true, Ordering::SeqCst) {
            return Ok(());
        }
        self.state.stop();
        self.mount.detach()?;
        // Both that it ended and that it did not are fine.
        let _ = self.ended.lock().recv_timeout(FAREWELL);
        Ok(())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Err(error) = self.take_away() {
            tracing::warn!(%error, "the control files stay mounted");
        }
    }
}

impl std::fmt::Debug for Mounted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mounted")
            .field("mount", &self.mount)
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

/// Watches the mounts of this process: a lazy unmount by somebody else leaves the
/// session alive while a file is open, but nobody finds the files any more.
fn watch(mount: &OwnMount, core: &Operations, state: &State) {
    // A mount whose loss nobody would see counts as lost.
    let mounts = match mount::open_mounts() {
        Ok(mounts) => mounts,
        Err(error) => {
            tracing::error!(%error, "cannot watch what is mounted");
            return state.lose(core);
        }
    };
    loop {
        match mount.stands() {
            Ok(true) => {}
            Ok(false) => return state.lose(core),
            Err(error) => tracing::warn!(%error, "cannot read what is mounted"),
        }
        let mut fds = [
            PollFd::new(&mounts, Events::PRI),
            PollFd::from_borrowed_fd(state.stop.as_fd(), Events::IN),
        ];
        match poll(&mut fds, None) {
            Ok(_) if !fds[1].revents().is_empty() => return,
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(errno) => {
                tracing::error!(%errno, "cannot watch what is mounted");
                return state.lose(core);
            }
        }
        // A host that mounts all the time is asked ten times a second at most.
        std::thread::sleep(Duration::from_millis(100));
    }
}
