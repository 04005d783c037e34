//! The thread that writes what is remembered.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use parking_lot::{Condvar, Mutex};

use super::{Contents, FILE, FRESH};

/// The thread that writes. Dropping it waits until everything is written.
#[derive(Debug)]
pub(super) struct Writer {
    desk: Arc<Desk>,
    thread: Option<JoinHandle<()>>,
}

/// What the thread is to write next. The lock is held to put something there or
/// to take it away, never while a file is written.
#[derive(Debug, Default)]
struct Desk {
    next: Mutex<Next>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Next {
    contents: Option<Contents>,
    closing: bool,
}

impl Writer {
    pub(super) fn start(state: &Path) -> io::Result<Self> {
        let desk = Arc::new(Desk::default());
        let (shared, state) = (desk.clone(), state.to_owned());
        let thread = thread::Builder::new()
            .name("settings".to_owned())
            .spawn(move || write_all(&shared, &state))?;
        Ok(Self {
            desk,
            thread: Some(thread),
        })
    }

    pub(super) fn write(&self, contents: Contents) {
        self.desk.next.lock().contents = Some(contents);
        self.desk.changed.notify_one();
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.desk.next.lock().closing = true;
        self.desk.changed.notify_one();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that writes settings has failed");
        }
    }
}

/// The thread's life.
fn write_all(desk: &Desk, state: &Path) {
    let mut failed = false;
    loop {
        let mut next = desk.next.lock();
        while next.contents.is_none() && !next.closing {
            desk.changed.wait(&mut next);
        }
        let Some(contents) = next.contents.take() else {
            return;
        };
        drop(next);
        match write(state, &contents) {
            Ok(()) => failed = false,
            // Once, not with each change.
            Err(error) if !failed => {
                failed = true;
                let path = state.join(FILE);
                tracing::error!(%error, path = %path.display(), "settings cannot be written and end with this service");
            }
            Err(_) => {}
        }
    }
}

fn write(state: &Path, contents: &Contents) -> io::Result<()> {
    let fresh = state.join(FRESH);
    fs::write(&fresh, serde_json::to_vec(contents)?)?;
    fs::rename(fresh, state.join(FILE))
}
