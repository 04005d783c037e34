//! Callers whose change has not been answered yet.
//!
//! The kernel lets a caller that waits for an answer die only when it gets one,
//! and the library refuses the message by which the kernel would say that a
//! signal came (it answers FUSE_INTERRUPT with ENOSYS, after which no more are
//! sent). So callers that have waited for a while are looked at here: one that is
//! being killed gets EINTR and can end. The change goes on; its answer has no
//! taker then. Signals that do not kill are not looked for: the answer comes
//! within the service's deadline, and what a write has begun is not undone.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::thread::Thread;
use std::time::Duration;

use gcgroup_model::Refusal;
use gcgroup_model::change::Done;
use parking_lot::Mutex;

use crate::caller;
use crate::service::Reply;

/// How often waiting callers are looked at; nobody notices a shorter wait.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// How a caller's wait ended.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// The service answered.
    Answered(Result<Done, Refusal>),
    /// The caller is being killed.
    Killed,
}

/// Ends a caller's wait.
pub(crate) type Finish = Box<dyn FnOnce(Outcome) + Send>;

struct Slot {
    tid: u32,
    finish: Mutex<Option<Finish>>,
}

impl Slot {
    /// Whoever comes first ends the wait.
    fn end(&self, outcome: Outcome) {
        let finish = self.finish.lock().take();
        if let Some(finish) = finish {
            finish(outcome);
        }
    }
}

/// The waiting callers and the thread that looks at them, which sleeps without
/// a timer while there are none.
pub(crate) struct Waiting {
    slots: Mutex<Vec<Weak<Slot>>>,
    idle: AtomicBool,
    thread: Mutex<Option<Thread>>,
}

impl Waiting {
    /// Starts the thread.
    ///
    /// # Errors
    /// No thread can be started.
    pub(crate) fn start() -> std::io::Result<Arc<Self>> {
        let waiting = Arc::new(Self {
            slots: Mutex::new(Vec::new()),
            idle: AtomicBool::new(false),
            thread: Mutex::new(None),
        });
        let weak = Arc::downgrade(&waiting);
        let thread = std::thread::Builder::new()
            .name("fs-waiting".to_owned())
            .spawn(move || look(&weak))?;
        *waiting.thread.lock() = Some(thread.thread().clone());
        Ok(waiting)
    }

    /// Makes the reply for a caller. A reply that is dropped drops `finish`.
    pub(crate) fn reply(&self, tid: u32, finish: Finish) -> Reply {
        let slot = Arc::new(Slot {
            tid,
            finish: Mutex::new(Some(finish)),
        });
        self.slots.lock().push(Arc::downgrade(&slot));
        if self.idle.swap(false, Ordering::SeqCst)
            && let Some(thread) = &*self.thread.lock()
        {
            thread.unpark();
        }
        Box::new(move |result| slot.end(Outcome::Answered(result)))
    }

    /// Looks at each waiting caller once and says whether there is any.
    fn look_at_all(&self) -> bool {
        let mut living = Vec::new();
        self.slots.lock().retain(|slot| {
            let slot = slot.upgrade();
            let waits = slot
                .as_ref()
                .is_some_and(|slot| slot.finish.lock().is_some());
            living.extend(slot.filter(|_| waits));
            waits
        });
        // Without the lock: /proc may be slow, and writers must not wait for it.
        for slot in &living {
            if caller::is_being_killed(slot.tid) {
                slot.end(Outcome::Killed);
            }
        }
        !living.is_empty()
    }
}

fn look(waiting: &Weak<Waiting>) {
    loop {
        match waiting.upgrade() {
            None => return,
            Some(waiting) if waiting.look_at_all() => {}
            Some(waiting) => {
                waiting.idle.store(true, Ordering::SeqCst);
                // A caller that came before the flag was set did not unpark.
                if !waiting.slots.lock().is_empty() {
                    waiting.idle.store(false, Ordering::SeqCst);
                } else {
                    drop(waiting);
                    std::thread::park();
                }
            }
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if let Some(thread) = &*self.thread.lock() {
            thread.unpark();
        }
    }
}

impl std::fmt::Debug for Waiting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Waiting")
            .field("slots", &self.slots.lock().len())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn an_answer_reaches_its_caller_once() {
        let waiting = Waiting::start().expect("a thread starts");
        let (sender, receiver) = mpsc::channel();
        let finish = Box::new(move |outcome| sender.send(outcome).expect("the test listens"));
        let reply = waiting.reply(std::process::id(), finish);
        reply(Ok(Done::Quiet));
        assert!(matches!(
            receiver.recv(),
            Ok(Outcome::Answered(Ok(Done::Quiet)))
        ));
        assert!(receiver.recv().is_err(), "a second answer came");
    }

    #[test]
    fn a_living_caller_is_left_to_wait() {
        let waiting = Waiting::start().expect("a thread starts");
        let (sender, receiver) = mpsc::channel();
        let finish = Box::new(move |outcome| sender.send(outcome).expect("the test listens"));
        let reply = waiting.reply(std::process::id(), finish);
        assert!(waiting.look_at_all());
        assert!(receiver.try_recv().is_err());
        drop(reply);
        assert!(!waiting.look_at_all());
        assert!(receiver.recv().is_err());
    }
}
