//! What is remembered of each process between two operations.

use std::collections::HashMap;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use gcgroup_device::{DeviceError, Search};
use parking_lot::Mutex;

use super::find::{Object, Tree, Walk};
use super::reach::Descriptors;
use super::uuid::Uuid;
use crate::process::{self, Process};

/// How long a process in which nothing was found is left alone by searches for
/// what is recent, at first; it doubles each time.
const BACK_OFF: Duration = Duration::from_millis(100);

/// How often it doubles, up to 6.4 s.
const BACK_OFF_DOUBLINGS: u32 = 6;

/// Searches from scratch that find nothing before the next one waits too. A
/// process whose context is made or restored just then is found in one of these.
const ANEW_FAILURES: u32 = 4;

/// How long a search from scratch waits at most. Each tries every client of the
/// host, so one each 100 ms would be felt by others.
const ANEW_BACK_OFF_MAX: Duration = Duration::from_secs(1);

/// How long a client counts as living after the driver said so. Asking takes RM's
/// lock exclusively, each time, where the looks at its objects share it. In
/// exchange a client that is freed within that time costs one line in the kernel's
/// log at the next look, if its descriptor stays open or comes back as the driver's
/// under its number; one that was closed cannot be taken and costs none. libcuda
/// frees its client shortly before the process ends and looks are 100 ms apart, so
/// that should be one line in dozens of programs that end (weighed, not measured),
/// and at most one for each checkpoint.
const LIVES_FOR: Duration = Duration::from_secs(1);

/// Where a client lives in its process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// Number of the descriptor in that process.
    pub(super) fd: RawFd,
    /// Handle of the client.
    pub(super) client: u32,
}

/// A client that has objects, with those of them that matter.
#[derive(Clone, Debug)]
pub(super) struct KnownClient {
    pub(super) place: Place,
    /// By handle.
    pub(super) objects: Vec<Object>,
    /// The handle after the highest one that was ever in use.
    pub(super) next: u32,
    /// How far beyond `next` a slow sweep has come.
    pub(super) swept: u32,
    /// Which GPU a device is, by its handle.
    pub(super) gpus: HashMap<u32, Uuid>,
    /// When the driver last said that it lives.
    pub(super) lived: Instant,
}

impl KnownClient {
    pub(super) fn tree(&self) -> Tree<'_> {
        Tree(&self.objects)
    }

    /// Whether the driver need not be asked whether it lives.
    pub(super) fn lives_still(&self) -> bool {
        self.lived.elapsed() < LIVES_FOR
    }

    /// Takes in what was found further on.
    pub(super) fn extend(&mut self, walk: Walk) {
        if let Some(next) = walk.next {
            self.next = self.next.max(next);
            self.swept = 0;
        }
        let new = walk.objects;
        let is_new = |o: &Object| new.binary_search_by_key(&o.handle, |object| object.handle);
        self.objects.retain(|object| is_new(object).is_err());
        self.objects.extend(new);
        self.objects.sort_unstable_by_key(|object| object.handle);
    }

    /// Whether a group or a channel is on this GPU.
    pub(super) fn is_on(&self, handle: u32, gpu: Uuid) -> bool {
        let device = self.tree().device_of(handle);
        device.is_some_and(|device| self.gpus.get(&device) == Some(&gpu))
    }

    pub(super) fn computes_on(&self, gpu: Uuid) -> bool {
        let groups = self.tree().compute_groups();
        groups.into_iter().any(|group| self.is_on(group, gpu))
    }
}

/// What was found of one process.
#[derive(Debug, Default)]
pub(super) struct KnownProcess {
    pub(super) clients: Vec<KnownClient>,
    pub(super) descriptors: Descriptors,
    /// Lines that it has cost in the kernel's log.
    pub(super) guesses: usize,
    /// Full searches for what it has on a GPU that found nothing.
    rests: Vec<(Uuid, Rest)>,
}

/// Full searches in a row that found nothing.
#[derive(Clone, Debug)]
struct Rest {
    failures: u32,
    /// When the last one ended.
    since: Instant,
    /// What it ended with; `None` when there was nothing to find.
    error: Option<DeviceError>,
}

impl Rest {
    /// How long the next search waits after the last.
    fn lasts(&self, search: Search) -> Duration {
        let doublings = (self.failures - 1).min(BACK_OFF_DOUBLINGS);
        let pause = BACK_OFF * 2_u32.pow(doublings);
        match search {
            Search::Recent | Search::Next => pause,
            Search::Anew if self.failures >= ANEW_FAILURES => pause.min(ANEW_BACK_OFF_MAX),
            // A process that was just started for this is waited for.
            Search::Anew | Search::Since(_) => Duration::ZERO,
        }
    }
}

impl KnownProcess {
    /// After a full search: where it found nothing, the next one waits.
    pub(super) fn searched(&mut self, gpu: Uuid, error: Option<&DeviceError>) {
        let failures = self.rest_on(gpu).map_or(0, |rest| rest.failures);
        self.rests.retain(|(resting, _)| *resting != gpu);
        if error.is_some() || !self.computes_on(gpu) {
            let rest = Rest {
                failures: failures.saturating_add(1),
                since: Instant::now(),
                error: error.cloned(),
            };
            self.rests.push((gpu, rest));
        }
    }

    /// After another search, which found what there is.
    pub(super) fn extended(&mut self, gpu: Uuid) {
        if self.computes_on(gpu) {
            self.rests.retain(|(resting, _)| *resting != gpu);
        }
    }

    /// The process has changed: what was not found may be there now.
    pub(super) fn changed(&mut self) {
        self.rests.clear();
    }

    /// Whether a full search does not look now, as the last ones found nothing;
    /// and what it answers instead.
    pub(super) fn rests(&self, gpu: Uuid, search: Search) -> Option<Result<(), DeviceError>> {
        let rest = self.rest_on(gpu)?;
        let waits = rest.since.elapsed() < rest.lasts(search);
        waits.then(|| rest.error.clone().map_or(Ok(()), Err))
    }

    /// Before a search that starts from nothing. Returns what was known.
    pub(super) fn forget(&mut self) -> Vec<KnownClient> {
        self.descriptors = Descriptors::default();
        std::mem::take(&mut self.clients)
    }

    fn rest_on(&self, gpu: Uuid) -> Option<&Rest> {
        let mut rests = self.rests.iter();
        let found = rests.find(|(resting, _)| *resting == gpu);
        found.map(|(_, rest)| rest)
    }

    fn computes_on(&self, gpu: Uuid) -> bool {
        self.clients.iter().any(|client| client.computes_on(gpu))
    }
}

type Key = (u32, u64);

/// All processes, by pid and start time. The table is locked for a lookup only;
/// what is known of one process, during operations on that process.
#[derive(Debug, Default)]
pub(super) struct Known(Mutex<HashMap<Key, Arc<Mutex<KnownProcess>>>>);

impl Known {
    pub(super) fn of(&self, process: &Process) -> Arc<Mutex<KnownProcess>> {
        let key = (process.pid(), process.start_time());
        let (entry, others) = {
            let mut table = self.0.lock();
            if let Some(entry) = table.get(&key) {
                return Arc::clone(entry);
            }
            let entry = Arc::clone(table.entry(key).or_default());
            (entry, table.keys().copied().collect::<Vec<Key>>())
        };
        // New processes are rare, so the dead can be swept out with each.
        let has_ended = |(pid, start_time): &Key| process::start_time(*pid) != Some(*start_time);
        let ended: Vec<Key> = others.into_iter().filter(has_ended).collect();
        self.0.lock().retain(|key, _| !ended.contains(key));
        entry
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.0.lock().len()
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn object(handle: u32, class: u32, parent: u32) -> Object {
        Object {
            handle,
            class,
            parent,
        }
    }

    #[test]
    fn what_is_found_later_joins_what_was_known() {
        let (here, elsewhere) = (Uuid([1; 16]), Uuid([2; 16]));
        let mut client = KnownClient {
            place: Place {
                fd: 3,
                client: 0xc1d0_0001,
            },
            objects: vec![object(1, 0x80, 0xc1d0_0001), object(8, 0xa06c, 1)],
            next: 9,
            swept: 40,
            gpus: HashMap::from([(1, here)]),
            lived: Instant::now(),
        };
        assert!(client.lives_still());
        client.lived = Instant::now() - LIVES_FOR;
        assert!(!client.lives_still());
        assert!(!client.computes_on(here));
        client.extend(Walk {
            objects: vec![
                object(8, 0xa06c, 1),
                object(12, 0xc86f, 8),
                object(13, 0xcbc0, 12),
            ],
            next: Some(14),
        });
        assert_eq!((client.next, client.swept), (14, 0));
        assert_eq!(client.objects.len(), 4);
        assert!(client.is_on(12, here));
        assert!(!client.is_on(12, elsewhere));
        assert!(client.computes_on(here));
        assert!(!client.computes_on(elsewhere));
        client.extend(Walk::default());
        assert_eq!(client.next, 14);
    }

    const HERE: Uuid = Uuid([1; 16]);

    /// A process after so many full searches that found nothing, the last of
    /// which ended `ago`.
    fn after(failures: u32, ago: Duration) -> KnownProcess {
        let mut process = KnownProcess::default();
        for _ in 0..failures {
            process.searched(HERE, Some(&DeviceError::NoGpu(1)));
        }
        for (_, rest) in &mut process.rests {
            rest.since = Instant::now() - ago;
        }
        process
    }

    #[test]
    fn a_process_without_anything_is_left_alone_for_longer_and_longer() {
        let waits = |failures, search, ms| {
            let process = after(failures, Duration::from_millis(ms));
            process.rests(HERE, search).is_some()
        };
        assert!(!waits(0, Search::Recent, 0));
        // Each row: failures, and how long searches for what is recent wait.
        for (failures, pause) in [(1, 100), (2, 200), (4, 800), (7, 6400), (60, 6400)] {
            assert!(waits(failures, Search::Recent, pause - 50), "{failures}");
            assert!(!waits(failures, Search::Recent, pause), "{failures}");
        }
        // From scratch: at once for the first times, then within a second.
        for failures in 0..4 {
            assert!(!waits(failures, Search::Anew, 0), "{failures}");
        }
        assert!(waits(4, Search::Anew, 750) && !waits(4, Search::Anew, 800));
        for failures in [5, 60] {
            assert!(waits(failures, Search::Anew, 950), "{failures}");
            assert!(!waits(failures, Search::Anew, 1000), "{failures}");
        }
    }

    #[test]
    fn a_rest_says_what_the_search_said_and_ends_with_a_change() {
        let mut process = after(9, Duration::ZERO);
        let told = Some(Err(DeviceError::NoGpu(1)));
        assert_eq!(process.rests(HERE, Search::Anew), told);
        assert_eq!(process.rests(Uuid([2; 16]), Search::Anew), None);
        process.searched(HERE, None);
        assert_eq!(process.rests(HERE, Search::Anew), Some(Ok(())));
        process.changed();
        assert_eq!(process.rests(HERE, Search::Anew), None);
    }

    #[test]
    fn what_was_found_ends_the_rest_on_its_gpu() {
        let mut process = after(9, Duration::ZERO);
        process.clients.push(KnownClient {
            place: Place {
                fd: 3,
                client: 0xc1d0_0001,
            },
            objects: vec![
                object(1, 0x80, 0xc1d0_0001),
                object(2, 0xa06c, 1),
                object(3, 0xc86f, 2),
                object(4, 0xcbc0, 3),
            ],
            next: 5,
            swept: 0,
            gpus: HashMap::from([(1, HERE)]),
            lived: Instant::now(),
        });
        let elsewhere = Uuid([2; 16]);
        process.searched(elsewhere, None);
        process.extended(elsewhere);
        assert!(process.rests(HERE, Search::Recent).is_some());
        process.extended(HERE);
        assert!(process.rests(HERE, Search::Recent).is_none());
        // On another GPU there is nothing still.
        assert_eq!(process.rests(elsewhere, Search::Recent), Some(Ok(())));
    }

    #[test]
    fn ended_processes_are_swept_out() {
        let known = Known::default();
        let mut child = Command::new("sleep")
            .arg("60")
            .spawn()
            .expect("sleep is everywhere");
        let process = Process::open(child.id()).expect("the child runs");
        known.of(&process).lock().guesses = 7;
        assert_eq!(known.of(&process).lock().guesses, 7);
        child.kill().expect("it is our child");
        child.wait().expect("it is our child");
        let ourselves = Process::open(std::process::id()).expect("we run");
        known.of(&ourselves);
        assert_eq!(known.len(), 1);
        assert_eq!(known.of(&ourselves).lock().guesses, 0);
    }
}
