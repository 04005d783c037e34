//! Who waits for an events file to change.
//!
//! A watcher is one open file: each poll(2) of it hands over another way to wake
//! the same waiters, so only the newest is kept. The order of locks is the
//! watchers, then the text of one open file.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::handle::Rendered;

/// Wakes the waiters of one open file, once.
pub(crate) type Wake = Box<dyn FnOnce() + Send>;

/// The open files that somebody polls.
#[derive(Default)]
pub(crate) struct Watchers {
    waiting: Mutex<HashMap<u64, (Arc<Rendered>, Wake)>>,
}

impl Watchers {
    /// Keeps `wake` for the open file with this handle. Called before the text is
    /// looked at: a change between the two must not be missed.
    pub(crate) fn watch(&self, handle: u64, file: Arc<Rendered>, wake: Wake) {
        self.waiting.lock().insert(handle, (file, wake));
    }

    /// The file was closed.
    pub(crate) fn forget(&self, handle: u64) {
        self.waiting.lock().remove(&handle);
    }

    /// Wakes the waiters of every file for which `changed` is true. Woken ones
    /// poll again, so they are forgotten until then.
    pub(crate) fn wake_if(&self, changed: impl Fn(&Rendered) -> bool) {
        let mut waiting = self.waiting.lock();
        for (_, (_, wake)) in waiting.extract_if(|_, (file, _)| changed(file)) {
            wake();
        }
    }
}

impl std::fmt::Debug for Watchers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watchers")
            .field("waiting", &self.waiting.lock().len())
            .finish()
    }
}
