//! Counting what a process of somebody else launches: one task a process.

use std::sync::Arc;
use std::time::Duration;

use gcgroup_device::{DeviceError, Host, LaunchCounter, Launches};
use tokio::sync::mpsc::UnboundedSender;

use crate::controller::{Event, Shared};
use crate::{launch, procfs};

/// Sampled values are at most 100 ms old while somebody reads.
const READ: Duration = Duration::from_millis(80);
/// The first value after a pause is at most 1 s old.
const UNREAD: Duration = Duration::from_millis(900);
/// A reader is thought to be there for so long after its last read.
const READER_STAYS: Duration = Duration::from_secs(2);
/// Between two attempts to begin: the driver's library may come later than the
/// first look at the process. Doubled each time.
const RETRY: Duration = Duration::from_millis(200);
const RETRIES: u32 = 8;

/// Counts until the process has ended, or the controller has.
pub(crate) async fn count(
    host: Arc<dyn Host>,
    pid: u32,
    start: u64,
    shared: Arc<Shared>,
    events: UnboundedSender<Event>,
) {
    let Some(mut counter) = begin(&host, pid, start).await else {
        return;
    };
    let mut last: Option<Launches> = None;
    while !events.is_closed() {
        let read = launch::blocking(move || {
            let result = counter.read();
            (counter, result)
        });
        let Ok((back, result)) = read.await else {
            return;
        };
        counter = back;
        match result {
            Ok(launches) => {
                if last.replace(launches) != Some(launches)
                    && events
                        .send(Event::Counted {
                            pid,
                            start,
                            launches,
                        })
                        .is_err()
                {
                    break;
                }
            }
            Err(DeviceError::NoProcess(_)) => break,
            Err(error) => {
                tracing::warn!(pid, %error, "launches are not counted any more");
                break;
            }
        }
        let read_now = shared.unread_for() < READER_STAYS;
        tokio::time::sleep(if read_now { READ } else { UNREAD }).await;
    }
    // Taking probes away takes the kernel a while.
    if launch::blocking(move || drop(counter)).await.is_err() {
        tracing::warn!(pid, "a counter was left behind");
    }
}

async fn begin(host: &Arc<dyn Host>, pid: u32, start: u64) -> Option<Box<dyn LaunchCounter>> {
    for attempt in 0..RETRIES {
        let host = host.clone();
        let begun = launch::blocking(move || {
            let counter = host.count_launches(pid)?;
            // Meanwhile the pid may have become another process's.
            if procfs::is_running(pid, start) {
                return Ok(counter);
            }
            Err(DeviceError::NoProcess(pid))
        });
        match begun.await {
            Ok(Ok(counter)) => return Some(counter),
            Ok(Err(DeviceError::NoProcess(_))) | Err(_) => return None,
            Ok(Err(DeviceError::Failed(error))) if attempt + 1 < RETRIES => {
                tracing::debug!(pid, error, "launches are not counted yet");
                tokio::time::sleep(RETRY * 2_u32.saturating_pow(attempt)).await;
            }
            Ok(Err(error)) => {
                tracing::info!(pid, %error, "launches are not counted");
                return None;
            }
        }
    }
    None
}
