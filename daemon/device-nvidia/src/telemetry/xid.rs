//! Counts Xid errors.
//!
//! Waiting for NVML's events blocks, so it has a thread of its own. The thread
//! holds the lock on the counters for an addition only and never while it
//! waits, so a reader is never held up.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nvml_wrapper::bitmasks::event::EventTypes;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::{EventSet, Nvml};
use parking_lot::Mutex;

/// How long one wait for events lasts: the longest delay of a stop.
const WAIT_MS: u32 = 200;

/// Pause after a failed wait, so that a lost GPU does not make the thread spin.
const PAUSE_AFTER_FAILURE: Duration = Duration::from_secs(1);

/// How long a drop waits for the thread. A driver that does not answer may hold
/// it for ever, which must not hold the service.
const STOP_DEADLINE: Duration = Duration::from_secs(2);

#[derive(Debug, Default)]
struct Shared {
    /// Errors by the GPU's UUID.
    counts: Mutex<HashMap<String, u64>>,
    stop: AtomicBool,
}

/// Counts since it was started, until it is dropped.
#[derive(Debug)]
pub(super) struct XidCounter {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl XidCounter {
    /// Without events, or without the thread, the counts stay at 0: the other
    /// figures are worth having nevertheless.
    pub(super) fn start(nvml: &Arc<Nvml>) -> Self {
        let shared = Arc::new(Shared::default());
        let thread = std::thread::Builder::new()
            .name("nvml-events".to_owned())
            .spawn({
                let (nvml, shared) = (Arc::clone(nvml), Arc::clone(&shared));
                move || watch(&nvml, &shared)
            });
        let thread = thread
            .inspect_err(|error| tracing::warn!(%error, "Xid errors are not counted"))
            .ok();
        Self { shared, thread }
    }

    pub(super) fn count(&self, uuid: &str) -> u64 {
        self.shared.counts.lock().get(uuid).copied().unwrap_or(0)
    }
}

impl Drop for XidCounter {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        let Some(thread) = self.thread.take() else {
            return;
        };
        let deadline = Instant::now() + STOP_DEADLINE;
        while !thread.is_finished() {
            if Instant::now() >= deadline {
                tracing::warn!("NVML does not return from waiting for events");
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        // A panic of the thread was printed when it happened.
        let _ = thread.join();
    }
}

/// Body of the thread.
fn watch(nvml: &Nvml, shared: &Shared) {
    let events = match register(nvml) {
        Ok(events) => events,
        Err(error) => {
            tracing::warn!(%error, "Xid errors are not counted");
            return;
        }
    };
    let mut warned = false;
    while !shared.stop.load(Ordering::Relaxed) {
        let uuid = match events.wait(WAIT_MS) {
            Ok(event) if event.event_type.contains(EventTypes::CRITICAL_XID_ERROR) => {
                let uuid = event.device.uuid();
                tracing::warn!(gpu = ?uuid, xid = ?event.event_data, "the driver reported an Xid error");
                uuid
            }
            Ok(_) | Err(NvmlError::Timeout) => continue,
            Err(error) => Err(error),
        };
        match uuid {
            Ok(uuid) => *shared.counts.lock().entry(uuid).or_default() += 1,
            Err(error) => {
                if !warned {
                    tracing::warn!(%error, "waiting for Xid errors failed");
                    warned = true;
                }
                pause(shared);
            }
        }
    }
}

fn pause(shared: &Shared) {
    let deadline = Instant::now() + PAUSE_AFTER_FAILURE;
    while Instant::now() < deadline && !shared.stop.load(Ordering::Relaxed) {
        std::thread::sleep(Duration::from_millis(u64::from(WAIT_MS)));
    }
}

/// Registers every GPU that reports Xid errors. A failed registration costs the
/// whole set, so it is done again without the GPUs that failed.
fn register(nvml: &Nvml) -> Result<EventSet<'_>, NvmlError> {
    let mut indices: Vec<u32> = (0..nvml.device_count()?)
        .filter(|index| {
            nvml.device_by_index(*index)
                .and_then(|device| device.supported_event_types())
                .is_ok_and(|types| types.contains(EventTypes::CRITICAL_XID_ERROR))
        })
        .collect();
    'again: loop {
        if indices.is_empty() {
            return Err(NvmlError::NotSupported);
        }
        let mut events = nvml.create_event_set()?;
        for (position, index) in indices.iter().enumerate() {
            let device = nvml.device_by_index(*index)?;
            match device.register_events(EventTypes::CRITICAL_XID_ERROR, events) {
                Ok(registered) => events = registered,
                Err(error) => {
                    tracing::warn!(gpu = index, %error, "Xid errors of this GPU are not counted");
                    indices.remove(position);
                    continue 'again;
                }
            }
        }
        return Ok(events);
    }
}
