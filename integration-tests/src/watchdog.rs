//! The end of a test that hangs.

use std::path::PathBuf;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::mount::{UnmountFlags, unmount};

use crate::process;

/// After so long a test hangs: the service is killed, which ends every system
/// call that waits for it.
const HUNG: Duration = Duration::from_secs(150);

/// Kills a service whose test hangs. A thread that waits in a system call for
/// an answer of the service cannot be stopped otherwise.
#[derive(Debug)]
pub(crate) struct Watchdog {
    test_over: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Watchdog {
    pub(crate) fn new(pid: u32, root: PathBuf) -> Self {
        let (test_over, over) = mpsc::channel();
        let started = Instant::now();
        let thread = std::thread::spawn(move || {
            if over.recv_timeout(HUNG) == Err(RecvTimeoutError::Timeout) {
                eprintln!(
                    "a test hangs since {:?}: killing the service {pid}",
                    started.elapsed()
                );
                process::kill_if_there(pid);
                // What hangs is answered when the connection is gone.
                let _ = unmount(&root, UnmountFlags::DETACH | UnmountFlags::FORCE);
            }
        });
        Self {
            test_over: Some(test_over),
            thread: Some(thread),
        }
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        drop(self.test_over.take());
        if let Some(thread) = self.thread.take() {
            // It panics nowhere, and a test that ends has no use for it.
            let _ = thread.join();
        }
    }
}
