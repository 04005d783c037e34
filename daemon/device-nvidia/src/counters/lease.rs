//! Probe events that several processes share.
//!
//! Processes with the same library count by the same events. They are defined
//! for the first process and removed after the last.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs::File;
use std::io;
use std::time::Duration;

use gcgroup_device::DeviceError;
use parking_lot::Mutex;
use rustix::io::Errno;

use super::Kind;
use super::perf::Event;
use super::tracefs::{EventName, LibraryId, Removal, Tracefs, perf_denied};

/// The events that this process uses. Held while events are defined or removed,
/// for which the kernel has one lock anyway and takes some 10 ms each; never while
/// a library is read or a count.
static SHARED: Mutex<BTreeMap<LibraryId, Shared>> = Mutex::new(BTreeMap::new());

/// How long a released event may still look used: the kernel lets go of it only
/// when a thread that is just ending has gone.
const REMOVE_TRIES: u32 = 10;
const REMOVE_PAUSE: Duration = Duration::from_millis(2);

struct Shared {
    users: usize,
    probes: Vec<Probe>,
}

/// A defined event.
struct Probe {
    name: EventName,
    event: LaunchEvent,
    /// Keeps it from being removed while the counters of its only process are made
    /// anew, by another service's recovery too.
    hold: Event,
}

/// An event by which launches are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LaunchEvent {
    pub(super) kind: Kind,
    /// perf's number of it.
    pub(super) id: u64,
}

/// A launch function of a library.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) function: &'static str,
    pub(super) kind: Kind,
    /// In the file, bytes.
    pub(super) offset: u64,
}

/// The right to use the events of a library until it is dropped.
#[derive(Debug)]
pub(super) struct Lease {
    tracefs: Tracefs,
    library: LibraryId,
    pub(super) events: Vec<LaunchEvent>,
}

impl Lease {
    /// Has the events of a library defined, at these places of its file.
    ///
    /// # Errors
    /// As [`Tracefs::define`].
    pub(super) fn take(
        tracefs: &Tracefs,
        library: LibraryId,
        file: &File,
        places: &[Place],
    ) -> Result<Self, DeviceError> {
        let mut all = SHARED.lock();
        let shared = match all.entry(library) {
            Entry::Occupied(shared) => shared.into_mut(),
            Entry::Vacant(place) => place.insert(Shared {
                users: 0,
                probes: define_all(tracefs, library, file, places)?,
            }),
        };
        shared.users += 1;
        Ok(Self {
            tracefs: tracefs.clone(),
            library,
            events: shared.probes.iter().map(|probe| probe.event).collect(),
        })
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut all = SHARED.lock();
        let Some(shared) = all.get_mut(&self.library) else {
            return;
        };
        shared.users -= 1;
        if shared.users == 0
            && let Some(shared) = all.remove(&self.library)
        {
            remove(&self.tracefs, shared.probes);
        }
    }
}

fn define_all(
    tracefs: &Tracefs,
    library: LibraryId,
    file: &File,
    places: &[Place],
) -> Result<Vec<Probe>, DeviceError> {
    let mut probes = Vec::new();
    for place in places {
        match define(tracefs, library, file, place) {
            Ok(probe) => probes.push(probe),
            Err(error) => {
                remove(tracefs, probes);
                return Err(error);
            }
        }
    }
    Ok(probes)
}

fn define(
    tracefs: &Tracefs,
    library: LibraryId,
    file: &File,
    place: &Place,
) -> Result<Probe, DeviceError> {
    let name = EventName {
        library,
        function: place.function.to_owned(),
        offset: place.offset,
    };
    tracefs.define(&name, file)?;
    let held = tracefs.id(&name).and_then(|id| match Event::hold(id) {
        Ok(hold) => Ok((id, hold)),
        Err(errno @ (Errno::ACCESS | Errno::PERM)) => Err(perf_denied(std::process::id(), errno)),
        Err(errno) => Err(DeviceError::Failed(format!(
            "perf_event_open(2) on {name}: {errno}"
        ))),
    });
    match held {
        Ok((id, hold)) => Ok(Probe {
            name,
            event: LaunchEvent {
                kind: place.kind,
                id,
            },
            hold,
        }),
        Err(error) => {
            remove_one(tracefs, &name);
            Err(error)
        }
    }
}

fn remove(tracefs: &Tracefs, probes: Vec<Probe>) {
    for Probe { name, hold, .. } in probes {
        drop(hold);
        remove_one(tracefs, &name);
    }
}

/// Removes an event. One that cannot be is left to the next who defines or
/// removes it.
fn remove_one(tracefs: &Tracefs, name: &EventName) {
    for attempt in 1..=REMOVE_TRIES {
        match tracefs.remove(name) {
            Ok(Removal::Removed | Removal::Absent) => break,
            Ok(Removal::InUse) if attempt < REMOVE_TRIES => std::thread::sleep(REMOVE_PAUSE),
            Ok(Removal::InUse) => tracing::debug!(%name, "another uses the probe event"),
            Err(error) => {
                tracing::warn!(%name, %error, "a probe event was not removed");
                break;
            }
        }
    }
}

/// Removes every probe event of ours that nobody uses, on this host, and says how
/// many they were. Where there is no tracefs, there are none.
///
/// # Errors
/// When they cannot be listed, or the last reason for which one was not removed.
pub fn remove_probes() -> io::Result<usize> {
    let Ok(tracefs) = Tracefs::find() else {
        return Ok(0);
    };
    // Nobody here shall be between defining an event and using it.
    let _all = SHARED.lock();
    let mut removed = 0;
    let mut failure = None;
    for name in tracefs.ours()? {
        match tracefs.remove(&name) {
            Ok(Removal::Removed) => removed += 1,
            Ok(Removal::Absent | Removal::InUse) => {}
            Err(error) => failure = Some(error),
        }
    }
    match failure {
        None => Ok(removed),
        Some(error) => Err(error),
    }
}
