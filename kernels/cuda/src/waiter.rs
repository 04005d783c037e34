//! The waiter: a thread that sleeps on the ends of launches and rings a bell.
//!
//! The engine's caller sleeps on a descriptor, and the driver has none for an event. So this thread
//! blocks in the driver instead, on one event after the other in the order of submission.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use gcgroup_kernels::engine::EngineError;
use rustix::event::{EventfdFlags, eventfd};

use crate::context::Context;
use crate::stream::Event;

/// A descriptor that is readable after a ring.
struct Bell {
    descriptor: OwnedFd,
    /// Says without a system call whether there is something to clear. Set after the descriptor
    /// became readable, so at worst a poll leaves it readable for one more turn.
    rung: AtomicBool,
}

impl Bell {
    fn new() -> Result<Self, EngineError> {
        let descriptor = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|error| EngineError::Failed(format!("eventfd: {error}")))?;
        Ok(Self {
            descriptor,
            rung: AtomicBool::new(false),
        })
    }

    fn ring(&self) {
        // The only failure is a counter at its end, and then the descriptor is readable already.
        let _ = rustix::io::write(&self.descriptor, &1u64.to_ne_bytes());
        self.rung.store(true, Ordering::Release);
    }

    /// Makes the descriptor unreadable; says whether it may have been readable.
    fn clear(&self) -> bool {
        if !self.rung.swap(false, Ordering::AcqRel) {
            return false;
        }
        // Nothing to read is as good: an earlier clear has taken two rings at once.
        let _ = rustix::io::read(&self.descriptor, &mut [0u8; 8]);
        true
    }
}

/// The thread, and the way to give it events.
pub(crate) struct Waiter {
    bell: Arc<Bell>,
    events: Option<Sender<Arc<Event>>>,
    thread: Option<JoinHandle<()>>,
}

impl Waiter {
    /// Starts the thread.
    pub(crate) fn start(context: &Arc<Context>) -> Result<Self, EngineError> {
        let bell = Arc::new(Bell::new()?);
        let (sender, receiver) = channel();
        let (thread_bell, context) = (bell.clone(), context.clone());
        let thread = std::thread::Builder::new()
            .name("gpu-waiter".to_owned())
            .spawn(move || wait_for_each(&receiver, &thread_bell, &context))
            .map_err(|error| EngineError::Failed(format!("no waiter thread: {error}")))?;
        Ok(Self {
            bell,
            events: Some(sender),
            thread: Some(thread),
        })
    }

    /// Rings when the event is over, and all that were given before it.
    pub(crate) fn watch(&self, event: Arc<Event>) {
        // The thread ends only when the sender does, so there is always a receiver.
        if let Some(events) = &self.events {
            let _ = events.send(event);
        }
    }

    /// Makes the descriptor unreadable; says whether it may have been readable.
    pub(crate) fn clear(&self) -> bool {
        self.bell.clear()
    }

    /// The descriptor.
    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        self.bell.descriptor.as_fd()
    }
}

fn wait_for_each(events: &Receiver<Arc<Event>>, bell: &Bell, context: &Context) {
    // Where the context has failed, so does every wait, and each rings: the poll that follows
    // gets the same error and reports it.
    let _ = context.make_current();
    while let Ok(event) = events.recv() {
        let _ = event.wait();
        // Not kept while the next one is waited for: the engine takes up events that nobody has.
        drop(event);
        bell.ring();
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        self.events = None;
        if let Some(thread) = self.thread.take() {
            // A panic there has been reported on standard error.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    fn readable(bell: &Bell) -> bool {
        let mut fds = [PollFd::new(&bell.descriptor, PollFlags::IN)];
        let now = Timespec::default();
        poll(&mut fds, Some(&now)).expect("poll of an eventfd") > 0
    }

    #[test]
    fn a_ring_is_readable_until_it_is_cleared() {
        let bell = Bell::new().expect("an eventfd");
        assert!(!readable(&bell));
        assert!(!bell.clear());
        bell.ring();
        bell.ring();
        assert!(readable(&bell));
        assert!(bell.clear());
        assert!(!readable(&bell));
        assert!(!bell.clear());
    }

    #[test]
    fn no_ring_is_lost_between_two_threads() {
        let bell = Arc::new(Bell::new().expect("an eventfd"));
        let done = Arc::new(AtomicBool::new(false));
        let (other_bell, other_done) = (bell.clone(), done.clone());
        let thread = std::thread::spawn(move || {
            for _ in 0..100_000 {
                other_bell.ring();
            }
            other_done.store(true, Ordering::Release);
        });
        while !done.load(Ordering::Acquire) {
            bell.clear();
        }
        thread.join().expect("the ringing thread");
        bell.clear();
        assert!(!readable(&bell));
    }
}
