//! Looking up what a process has: its clients, their objects, and their GPUs.
//!
//! A client is tried on the descriptors of the process, and belongs to the one on
//! which RM takes a call on it. Which clients there are to try is known from
//! `census`, without a line in the kernel's log. Where the driver does not tell,
//! clients that were opened since a mark are guessed, within [`GUESSES_MAX`] lines
//! for one process in its life, and others are refused.

use std::collections::HashSet;
use std::collections::hash_map::Entry;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use gcgroup_device::{ClientMark, DeviceError, GpuInfo, Search};

use super::census::Census;
use super::find::{self, Keep, Object, Tree};
use super::known::{Known, KnownClient, KnownProcess, Place};
use super::layout::Layout;
use super::pace::Pace;
use super::reach::{AGAIN, Descriptors, duplicate};
use super::rm::{Ask, Control, RmError, Status};
use super::stop::parse_uuid;
use super::uuid::Uuid;
use crate::process::Process;

/// Lines that the searches for one process may cause in the kernel's log.
const GUESSES_MAX: usize = 64;

/// Clients with objects of one process. A program has one or two for each GPU.
const CLIENTS_MAX: usize = 256;

/// Descriptors of a process that the service holds duplicates of at a time.
const DUPLICATES_MAX: usize = 64;

/// Clients opened since a mark that are asked about one by one, 8 ms. After that
/// many the mark is of no use any more.
const SINCE_MAX: u32 = 0x1000;

/// Unused handles that end a search for what was made recently, shared out
/// between the clients of a process. libcuda numbers its objects one after the
/// other, so that a new one lies right behind the last unless others were made
/// and freed in between. At 1.9 us a look (measured) they take 180 us; with the
/// sweep below and the calls around it that is well below half a millisecond.
const RECENT_GAP: u32 = 96;

/// The least of them for one client.
const RECENT_GAP_MIN: u32 = 32;

/// Unused handles that end a search right behind what is known, for each client:
/// 45 us. An object made since lies there, unless many were freed meanwhile.
const NEXT_GAP: u32 = 24;

/// Handles of the slow sweep beyond that gap, for objects that were made after
/// many others had been made and freed: 60 us each time, and through the window
/// of a full search after about two thousand searches.
const SWEEP: u32 = 32;

/// What the searches of this service have cost so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LookupCost {
    /// Questions whether a client lives, each without a trace.
    pub asked: u64,
    /// Living clients that were tried on a descriptor they do not belong to,
    /// each without a trace too.
    pub tried: u64,
    /// Guesses that were wrong, each a line in the kernel's log.
    pub guessed: u64,
}

/// The search and what it remembers.
#[derive(Debug, Default)]
pub(super) struct Lookup {
    pub(super) census: Census,
    known: Known,
    tried: AtomicU64,
    guessed: AtomicU64,
}

/// Descriptors of a process, duplicated for one operation.
type Controls = Vec<(RawFd, Control)>;

impl Lookup {
    pub(super) fn cost(&self) -> LookupCost {
        LookupCost {
            asked: self.census.asked(),
            tried: self.tried.load(Ordering::Relaxed),
            guessed: self.guessed.load(Ordering::Relaxed),
        }
    }

    /// The clients of a process that have objects.
    pub(super) fn clients(
        &self,
        layout: &Layout,
        process: &Process,
        gpu: &GpuInfo,
        search: Search,
    ) -> Result<Vec<KnownClient>, DeviceError> {
        let uuid = parse_uuid(gpu)?;
        let entry = self.known.of(process);
        let mut known = entry.lock();
        let mut pace = Pace::new();
        // Where not even its descriptors could be listed, that is held back.
        if known.descriptors.is_empty()
            && let Some(rest) = known.rests(uuid, search)
        {
            return rest.map(|()| known.clients.clone());
        }
        let recent = match Reach::of(search) {
            Some(reach) => self.look_recent(layout, process, reach, &mut known, &mut pace)?,
            None => look_again(process, uuid, search, &mut known)?,
        };
        match recent {
            Recent::Stands => {
                known.extended(uuid);
                return Ok(known.clients.clone());
            }
            Recent::Changed => known.changed(),
            Recent::Nothing => {}
        }
        if let Some(rest) = known.rests(uuid, search) {
            return rest.map(|()| known.clients.clone());
        }
        let looked = self.look_anew(layout, process, uuid, search, &mut known, &mut pace);
        if looked.is_err() {
            known.clients.clear();
        }
        known.searched(uuid, looked.as_ref().err());
        looked?;
        Ok(known.clients.clone())
    }

    /// Every object of the clients that are known of a process.
    pub(super) fn inventory(
        &self,
        layout: &Layout,
        process: &Process,
        clients: &[KnownClient],
    ) -> Result<Vec<(u32, Object)>, DeviceError> {
        let mut inventory = Vec::new();
        let mut pace = Pace::new();
        for known in clients {
            let Place { fd, client } = known.place;
            let Some(control) = duplicate(process, fd)? else {
                continue;
            };
            if self.owns(layout, &control, client)? {
                let walk = find::objects(&control, layout, client, Keep::All, &mut pace)
                    .map_err(|error| error.of("listing the driver objects"))?;
                inventory.extend(walk.objects.into_iter().map(|object| (client, object)));
            }
        }
        Ok(inventory)
    }

    /// The descriptors on which these clients were opened, in their order.
    pub(super) fn controls_of(
        &self,
        layout: &Layout,
        process: &Process,
        clients: &[u32],
    ) -> Result<Vec<Control>, DeviceError> {
        let known: Vec<(Place, bool)> = {
            let entry = self.known.of(process);
            let known = entry.lock();
            let clients = known.clients.iter();
            clients.map(|it| (it.place, it.lives_still())).collect()
        };
        let mut found = Vec::with_capacity(clients.len());
        for client in clients {
            let here = known.iter().find(|(place, _)| place.client == *client);
            let here = here.map(|(place, lives)| (place.fd, *lives));
            found.push(self.control_of(layout, process, *client, here)?);
        }
        Ok(found)
    }

    fn control_of(
        &self,
        layout: &Layout,
        process: &Process,
        client: u32,
        known: Option<(RawFd, bool)>,
    ) -> Result<Control, DeviceError> {
        if let Some((fd, lives)) = known
            && let Some(control) = duplicate(process, fd)?
            && (lives || self.lives(layout, client)?)
            && self.answers(layout, &control, client)?
        {
            return Ok(control);
        }
        let pid = process.pid();
        let listed = Descriptors::of(pid)?;
        for fd in listed.controls(process)?.into_iter().take(GUESSES_MAX) {
            if let Some(control) = duplicate(process, fd)?
                && self.owns(layout, &control, client)?
            {
                return Ok(control);
            }
        }
        Err(DeviceError::Failed(format!(
            "process {pid} has no driver client {client:#x} any more"
        )))
    }

    /// Looks for what was made since the last search.
    fn look_recent(
        &self,
        layout: &Layout,
        process: &Process,
        reach: Reach,
        known: &mut KnownProcess,
        pace: &mut Pace,
    ) -> Result<Recent, DeviceError> {
        let pid = process.pid();
        if known.descriptors.refresh(pid, reach.again())? {
            return Ok(Recent::Changed);
        }
        if known.clients.is_empty() {
            return Ok(Recent::Nothing);
        }
        let clients = known.clients.len();
        for client in &mut known.clients {
            let Some(control) = duplicate(process, client.place.fd)? else {
                return Ok(Recent::Changed);
            };
            if !client.lives_still() {
                if !self.lives(layout, client.place.client)? {
                    return Ok(Recent::Changed);
                }
                client.lived = Instant::now();
            }
            if !self.answers(layout, &control, client.place.client)? {
                return Ok(Recent::Changed);
            }
            extend(layout, &control, client, reach.gaps(clients), pace)
                .map_err(|error| error.of("listing the driver objects"))?;
            name_gpus(layout, &control, pid, client)?;
        }
        Ok(Recent::Stands)
    }

    /// Forgets what was known and looks everything up.
    fn look_anew(
        &self,
        layout: &Layout,
        process: &Process,
        gpu: Uuid,
        search: Search,
        known: &mut KnownProcess,
        pace: &mut Pace,
    ) -> Result<(), DeviceError> {
        let pid = process.pid();
        let before = known.forget();
        known.descriptors = Descriptors::of(pid)?;
        let fds = known.descriptors.controls(process)?;
        let mut candidates: Vec<u32> = before.iter().map(|c| c.place.client).collect();
        let tells = self.census.tells(layout)?;
        let since = self.since(layout, search)?;
        let mut living = None;
        candidates.extend(match since {
            Some(stretch) if tells => self.census.since(layout, stretch, pace)?,
            Some((mark, count)) => guesses(layout, mark, count, fds.len(), known.guesses)?,
            None if tells => living
                .insert(self.census.up_to_now(layout, pace)?)
                .clients
                .clone(),
            None if candidates.is_empty() => return Err(untold(pid)),
            None => Vec::new(),
        });
        let mut seen = HashSet::new();
        let mut was_found = false;
        loop {
            candidates.retain(|client| seen.insert(*client));
            self.try_clients(layout, process, &fds, &candidates, known, pace)?;
            // One step beyond what is enough: a process has clients of several
            // ages, which are not many handles apart.
            let Some(from) = living.as_ref().filter(|_| !was_found) else {
                break;
            };
            was_found = known.clients.iter().any(|client| client.computes_on(gpu));
            match self.census.further_down(layout, from, pace)? {
                Some(further) => {
                    candidates.clone_from(&further.clients);
                    living = Some(further);
                }
                None => break,
            }
        }
        // New objects follow the highest that ever was, also when it is freed.
        for client in &mut known.clients {
            let earlier = before.iter().find(|known| known.place == client.place);
            client.next = client.next.max(earlier.map_or(0, |earlier| earlier.next));
        }
        if known.clients.is_empty() && since.is_none() && !tells {
            return Err(untold(pid));
        }
        Ok(())
    }

    /// Tries clients on all these descriptors, some of which are held at a time,
    /// and none while the census looks further down.
    fn try_clients(
        &self,
        layout: &Layout,
        process: &Process,
        fds: &[RawFd],
        candidates: &[u32],
        known: &mut KnownProcess,
        pace: &mut Pace,
    ) -> Result<(), DeviceError> {
        if candidates.is_empty() {
            return Ok(());
        }
        for fds in fds.chunks(DUPLICATES_MAX) {
            let open = duplicates(process, fds)?;
            for client in candidates {
                // A descriptor may be a duplicate of another one.
                if known.clients.iter().any(|it| it.place.client == *client) {
                    continue;
                }
                self.try_client(layout, process.pid(), &open, *client, known, pace)?;
            }
        }
        Ok(())
    }

    /// The mark of a search and how many clients were opened after it, where it
    /// bounds the search.
    fn since(&self, layout: &Layout, search: Search) -> Result<Option<(u32, u32)>, DeviceError> {
        let Search::Since(ClientMark(mark)) = search else {
            return Ok(None);
        };
        // The counter stands on a client of ours.
        let counter = self.census.counter(layout)?;
        let count = layout.clients_between(mark, counter).saturating_sub(1);
        Ok((count <= SINCE_MAX).then_some((mark, count)))
    }

    /// Takes in a client if it is this process's and has objects.
    fn try_client(
        &self,
        layout: &Layout,
        pid: u32,
        open: &Controls,
        client: u32,
        known: &mut KnownProcess,
        pace: &mut Pace,
    ) -> Result<(), DeviceError> {
        let listing = |error: RmError| error.of("listing the driver objects");
        for (fd, control) in open {
            pace.call().map_err(listing)?;
            if !self.owns(layout, control, client)? {
                known.guesses += usize::from(!self.census.tells(layout)?);
                continue;
            }
            let walk = find::objects(control, layout, client, Keep::Channels, pace);
            let walk = walk.map_err(listing)?;
            let Some(next) = walk.next else {
                return Ok(());
            };
            let mut found = KnownClient {
                place: Place { fd: *fd, client },
                objects: walk.objects,
                next,
                swept: 0,
                gpus: Default::default(),
                lived: Instant::now(),
            };
            name_gpus(layout, control, pid, &mut found)?;
            if known.clients.len() == CLIENTS_MAX {
                return Err(DeviceError::Failed(format!(
                    "process {pid} has more than {CLIENTS_MAX} driver clients with objects"
                )));
            }
            known.clients.push(found);
            return Ok(());
        }
        Ok(())
    }

    /// Whether a client was opened on this descriptor.
    fn owns(&self, layout: &Layout, control: &Control, client: u32) -> Result<bool, DeviceError> {
        Ok(self.lives(layout, client)? && self.answers(layout, control, client)?)
    }

    /// Whether a client may be called on without a line in the kernel's log, as
    /// far as the driver tells.
    fn lives(&self, layout: &Layout, client: u32) -> Result<bool, DeviceError> {
        if !self.census.tells(layout)? || self.census.lives(layout, client)? {
            return Ok(true);
        }
        self.census.forget(layout, client);
        Ok(false)
    }

    /// Whether a client answers on this descriptor.
    fn answers(
        &self,
        layout: &Layout,
        control: &Control,
        client: u32,
    ) -> Result<bool, DeviceError> {
        match control.handle_info(layout, client, client, Ask::Class) {
            Ok(_) => Ok(true),
            // Mostly NV_ERR_INVALID_CLIENT. A stranger's client that is just being
            // made or freed answers otherwise, and must not end the search.
            Err(RmError::Rm(status)) if status != Status::Denied => {
                let tells = self.census.tells(layout)?;
                let counter = if tells { &self.tried } else { &self.guessed };
                counter.fetch_add(1, Ordering::Relaxed);
                Ok(false)
            }
            Err(error) => Err(error.of("looking for the driver client")),
        }
    }
}

/// What a search for what is recent came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Recent {
    /// What is known is what there is.
    Stands,
    /// The process has opened the driver, or what was known is gone.
    Changed,
    /// There was nothing known, and nothing changed.
    Nothing,
}

/// Before a search from scratch that would be held back: whether something has
/// changed, so that it is not.
fn look_again(
    process: &Process,
    gpu: Uuid,
    search: Search,
    known: &mut KnownProcess,
) -> Result<Recent, DeviceError> {
    if known.rests(gpu, search).is_none() {
        return Ok(Recent::Nothing);
    }
    let opened = known.descriptors.refresh(process.pid(), AGAIN)?;
    Ok(if opened {
        Recent::Changed
    } else {
        Recent::Nothing
    })
}

fn duplicates(process: &Process, fds: &[RawFd]) -> Result<Controls, DeviceError> {
    let mut open = Controls::new();
    for fd in fds {
        open.extend(duplicate(process, *fd)?.map(|control| (*fd, control)));
    }
    Ok(open)
}

/// Every client since a mark, where the driver does not tell which of them live.
fn guesses(
    layout: &Layout,
    mark: u32,
    count: u32,
    descriptors: usize,
    spent: usize,
) -> Result<Vec<u32>, DeviceError> {
    let wanted = descriptors.saturating_mul(count as usize);
    if spent.saturating_add(wanted) > GUESSES_MAX {
        return Err(DeviceError::Failed(format!(
            "{count} driver clients were opened since the mark; with {descriptors} descriptors that is more than the {GUESSES_MAX} guesses that a process may cost, of which {spent} are spent"
        )));
    }
    let client = |step| layout.client_after(mark, step);
    Ok((1..=count).map(client).collect())
}

fn untold(pid: u32) -> DeviceError {
    DeviceError::Unsupported(format!(
        "this driver does not tell which driver clients live, and process {pid} was running before the service"
    ))
}

/// How far behind the known objects is looked for others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reach {
    /// Right behind them.
    Near,
    /// Further, and a part of the rest.
    Sweep,
}

impl Reach {
    /// `None` for a search that starts from nothing.
    fn of(search: Search) -> Option<Self> {
        match search {
            Search::Next => Some(Self::Near),
            Search::Recent => Some(Self::Sweep),
            Search::Since(_) | Search::Anew => None,
        }
    }

    /// How many descriptors that were seen before are looked at again.
    fn again(self) -> usize {
        match self {
            Self::Near => 0,
            Self::Sweep => AGAIN,
        }
    }

    /// Unused handles that end the search in one of so many clients, and those of
    /// the sweep behind them.
    fn gaps(self, clients: usize) -> (u32, Option<u32>) {
        match self {
            Self::Near => (NEXT_GAP, None),
            Self::Sweep => {
                let gap = (RECENT_GAP / clients.max(1) as u32).max(RECENT_GAP_MIN);
                (gap, Some(SWEEP))
            }
        }
    }
}

/// Looks for what follows the objects that are known.
fn extend(
    layout: &Layout,
    control: &Control,
    known: &mut KnownClient,
    (gap, sweep): (u32, Option<u32>),
    pace: &mut Pace,
) -> Result<(), RmError> {
    let client = known.place.client;
    let walk = find::objects_from(control, layout, client, (known.next, gap), pace)?;
    let quiet = walk.next.is_none();
    known.extend(walk);
    if let Some(sweep) = sweep.filter(|_| quiet) {
        let from = known.next.saturating_add(gap + known.swept);
        known.swept = (known.swept + sweep) % layout.object_window;
        let walk = find::objects_from(control, layout, client, (from, sweep), pace)?;
        known.extend(walk);
    }
    Ok(())
}

/// Asks which GPUs the devices with channels are, each once.
fn name_gpus(
    layout: &Layout,
    control: &Control,
    pid: u32,
    known: &mut KnownClient,
) -> Result<(), DeviceError> {
    let client = known.place.client;
    let tree = Tree(&known.objects);
    let subdevices = tree.subdevices();
    for device in tree.devices() {
        let Entry::Vacant(unnamed) = known.gpus.entry(device) else {
            continue;
        };
        let subdevice = subdevices.get(&device).ok_or_else(|| {
            DeviceError::Failed(format!(
                "process {pid} has channels on device {device:#x}, which has no subdevice that could be asked for its GPU"
            ))
        })?;
        let uuid = control
            .uuid(layout, client, *subdevice)
            .map_err(|error| error.of("asking for the GPU of a device"))?;
        unnamed.insert(Uuid(uuid));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::layout::Unknown;
    use super::*;

    fn layout() -> Layout {
        Layout::of_driver("580.159.04", Unknown::Refuse).expect("a known branch")
    }

    #[test]
    fn guesses_are_bounded_for_the_life_of_a_process() {
        let layout = layout();
        let few = guesses(&layout, 0xc1df_fffe, 3, 2, 0).expect("within bounds");
        assert_eq!(few, [0xc1df_ffff, 0xc1d0_0000, 0xc1d0_0001]);
        assert!(guesses(&layout, 0xc1d0_0000, 32, 2, 0).is_ok());
        let error = guesses(&layout, 0xc1d0_0000, 32, 2, 1).expect_err("one too many");
        assert_eq!(
            error.to_string(),
            "32 driver clients were opened since the mark; with 2 descriptors that is more than the 64 guesses that a process may cost, of which 1 are spent"
        );
    }
}
