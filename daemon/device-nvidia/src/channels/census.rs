//! Which driver clients there are on the host, found out without a trace.
//!
//! A call on a client that does not exist is a line in the kernel's log, since
//! RM looks the client up with a check that prints
//! (`RmDeprecatedGetControlHandler`); a call on a living client from a file that
//! it does not belong to is refused silently (`rmclientValidate`). So all that a
//! search needs to be silent is to know which handles live. That can be asked:
//! CLIENT_GET_ACCESS_RIGHTS takes the handle of any client, and answers
//! NV_ERR_INVALID_CLIENT without a line where there is none. It is asked about
//! object 0 of the client, which is never there, so that it ends right after the
//! lookup and changes nothing. It is open to all (NON_PRIVILEGED) and the same
//! code in the five branches that `layout` lists.
//!
//! It is not free for others: RM answers it with its API lock held exclusively
//! (flags 0x9 without API_LOCK_READONLY, g_client_resource_nvoc.c), so that no
//! other call on the host is served in those 1.9 us, and it waits for those that
//! are. Therefore long rows of questions are asked at a pace that `pace` sets, by
//! one search at a time, and `search` does not ask again within a second.
//!
//! Read in the sources, and so far run on no GPU. So each time the service opens
//! the driver, it asks about a client that it has, and about one that it has just
//! freed; if the answers are not those, nothing is asked any more, and a search
//! guesses within bounds, as is said there.
//!
//! Handles come from a host-wide counter that wraps after 2^20 of them. What was
//! looked at is one stretch that ends at the counter: it grows at its top with
//! each search and at its bottom, in steps, while a search finds too little. Once
//! it covers all handles, only new ones remain to be asked about. After a long
//! time without a search nobody knows how often the counter went round, and the
//! stretch begins anew.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use gcgroup_device::{DeviceError, Handle};
use parking_lot::Mutex;

use super::layout::Layout;
use super::pace::Pace;
use super::rm::{CONTROL_PATH, Control, Presence, RmError};

/// Handles of one step downwards: 30 ms at 1.9 us a question, 45 ms with pauses.
/// All 2^20 take 3 s.
const STEP: u64 = 0x4000;

/// Handles below the former top that are asked about again: clients that were
/// just being made when it was looked at.
const OVERLAP: u64 = 16;

/// Two readings of the counter that are heard in the other order are not this far
/// apart in time, so that what seems a long way back after it is a long way ahead.
const REORDERED_MAX: Duration = Duration::from_secs(10);

/// After so long without a search the counter may have gone all the way round:
/// at 1,700 new clients a second. A host on which nvidia-smi is run each second
/// makes some ten.
const FORGOTTEN: Duration = Duration::from_secs(600);

/// A place in the counter before any that it is at, so that stepping down from
/// it stays above zero.
const ORIGIN: u64 = 1 << 32;

/// Clients of the whole host, as far as they were looked for.
#[derive(Debug, Default)]
pub(super) struct Census {
    /// Locked to take the pointer only.
    own: Mutex<Option<Arc<Own>>>,
    /// Locked for lookups, never during a call to the driver.
    looked: Mutex<Option<Looked>>,
    /// Held while a step further down is asked about, so that no two searches ask
    /// the same. Locked before `looked`.
    descent: Mutex<()>,
    asked: AtomicU64,
}

/// Clients that live, the latest first, and how far down they were looked for.
#[derive(Debug)]
pub(super) struct Living {
    pub(super) clients: Vec<u32>,
    bottom: u64,
}

/// A client of the service's own, to ask through.
#[derive(Debug)]
struct Own {
    control: Control,
    client: u32,
    /// Whether the driver tells which clients live.
    tells: bool,
}

/// The stretch of the counter that was looked at, without its bottom and with
/// its top. The counter goes on where handles wrap, so a handle is the rest of a
/// place.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Looked {
    bottom: u64,
    top: u64,
    /// Places of living clients.
    living: BTreeSet<u64>,
    /// When its top was last moved to the counter.
    when: Instant,
}

/// What there is further down than a search has come.
#[derive(Debug, PartialEq, Eq)]
enum Below {
    /// Another search has been there: the living down to a bottom.
    Looked(Vec<u64>, u64),
    /// A stretch to ask about.
    Ask((u64, u64)),
}

impl Looked {
    /// Nothing but the place of this handle, which is the counter's own.
    fn at(layout: &Layout, handle: u32) -> Self {
        let top = ORIGIN + u64::from(handle & layout.client_mask);
        Self {
            bottom: top,
            top,
            living: BTreeSet::new(),
            when: Instant::now(),
        }
    }

    /// Where the counter is now that it gives out `handle`, so long after the
    /// last time. Two that are read at the same time may arrive in the other
    /// order; what seems most of the way round is behind then.
    fn place_of(&self, layout: &Layout, handle: u32, after: Duration) -> u64 {
        let top = (self.top & u64::from(layout.client_mask)) as u32;
        let ahead = layout.clients_between(top, handle);
        if ahead > layout.client_count() / 2 && after < REORDERED_MAX {
            return self.top;
        }
        self.top + u64::from(ahead)
    }

    /// What there is further down than `from`; `None` when that is all.
    fn below(&self, layout: &Layout, from: u64) -> Option<Below> {
        let end = self.top - u64::from(layout.client_count());
        if from <= end {
            return None;
        }
        let bottom = self.bottom.max(end);
        if bottom < from {
            let living = self.living.range(bottom + 1..=from).copied().collect();
            return Some(Below::Looked(living, bottom));
        }
        Some(Below::Ask((from.saturating_sub(STEP).max(end), from)))
    }

    /// Takes in what was found in a stretch that meets this one.
    fn merge(&mut self, layout: &Layout, (bottom, top): (u64, u64), living: &[u64]) {
        // It began anew meanwhile.
        if top < self.bottom || bottom > self.top {
            return;
        }
        self.top = self.top.max(top);
        self.bottom = self.bottom.min(bottom);
        self.living.extend(living);
        // A handle that was given out again has a later place.
        let end = self.top - u64::from(layout.client_count());
        self.bottom = self.bottom.max(end);
        self.living = self.living.split_off(&(end + 1));
    }
}

/// How the driver's counter and its clients are asked.
impl Census {
    /// The counter's present value: the handle of a client made and freed.
    pub(super) fn counter(&self, layout: &Layout) -> Result<u32, DeviceError> {
        let own = self.own_for(layout)?;
        made_and_freed(&own.control).map_err(|error| error.of("allocating a driver client"))
    }

    /// Whether the driver tells which clients live.
    pub(super) fn tells(&self, layout: &Layout) -> Result<bool, DeviceError> {
        Ok(self.own_for(layout)?.tells)
    }

    /// How many questions were asked so far.
    pub(super) fn asked(&self) -> u64 {
        self.asked.load(Ordering::Relaxed)
    }

    /// Whether a client lives now. A caller that goes on to call on it is then
    /// silent, but for the moment in between.
    pub(super) fn lives(&self, layout: &Layout, client: u32) -> Result<bool, DeviceError> {
        let own = self.own_for(layout)?;
        self.ask(&own, layout, client)
            .map_err(|error| error.of("asking for a driver client"))
    }

    /// The living clients among the `count` handles after `mark`.
    pub(super) fn since(
        &self,
        layout: &Layout,
        (mark, count): (u32, u32),
        pace: &mut Pace,
    ) -> Result<Vec<u32>, DeviceError> {
        let own = self.own_for(layout)?;
        let mut living = Vec::new();
        for step in 1..=count {
            let client = layout.client_after(mark, step);
            pace.breathe();
            if self
                .ask(&own, layout, client)
                .map_err(|error| error.of("asking for driver clients"))?
            {
                living.push(client);
            }
        }
        Ok(living)
    }

    /// Asks about what was made since the last time, and returns all living
    /// clients that are known.
    pub(super) fn up_to_now(
        &self,
        layout: &Layout,
        pace: &mut Pace,
    ) -> Result<Living, DeviceError> {
        let own = self.own_for(layout)?;
        let counter = self.counter(layout)?;
        let stretch = {
            let mut looked = self.looked.lock();
            if looked
                .as_ref()
                .is_some_and(|it| it.when.elapsed() > FORGOTTEN)
            {
                *looked = None;
            }
            let looked = looked.get_or_insert_with(|| Looked::at(layout, counter));
            let top = looked.place_of(layout, counter, looked.when.elapsed());
            looked.when = Instant::now();
            let bottom = looked.top.saturating_sub(OVERLAP).max(looked.bottom);
            (bottom, top)
        };
        self.look(&own, layout, stretch, pace)?;
        let looked = self.looked.lock();
        let living = looked.iter().flat_map(|looked| looked.living.iter().rev());
        Ok(Living {
            clients: living.map(|place| handle_at(layout, *place)).collect(),
            bottom: looked.as_ref().map_or(stretch.0, |looked| looked.bottom),
        })
    }

    /// The living clients one step further down than these; `None` when there is
    /// nothing further down. Each search has its own way down, since what one
    /// asked about the others have yet to try.
    pub(super) fn further_down(
        &self,
        layout: &Layout,
        from: &Living,
        pace: &mut Pace,
    ) -> Result<Option<Living>, DeviceError> {
        let own = self.own_for(layout)?;
        let _descent = self.descent.lock();
        let looked = self.looked.lock();
        let below = looked.as_ref().and_then(|it| it.below(layout, from.bottom));
        drop(looked);
        let (living, bottom) = match below {
            None => return Ok(None),
            Some(Below::Looked(living, bottom)) => (living, bottom),
            Some(Below::Ask(stretch)) => (self.look(&own, layout, stretch, pace)?, stretch.0),
        };
        let latest_first = living.iter().rev();
        Ok(Some(Living {
            clients: latest_first
                .map(|place| handle_at(layout, *place))
                .collect(),
            bottom,
        }))
    }

    /// A client that turned out to have ended.
    pub(super) fn forget(&self, layout: &Layout, client: u32) {
        if let Some(looked) = self.looked.lock().as_mut() {
            looked
                .living
                .retain(|place| handle_at(layout, *place) != client);
        }
    }

    /// Asks about a stretch and takes in the answers.
    fn look(
        &self,
        own: &Own,
        layout: &Layout,
        (bottom, top): (u64, u64),
        pace: &mut Pace,
    ) -> Result<Vec<u64>, DeviceError> {
        let mut living = Vec::new();
        for place in bottom + 1..=top {
            pace.breathe();
            if self
                .ask(own, layout, handle_at(layout, place))
                .map_err(|error| error.of("asking for driver clients"))?
            {
                living.push(place);
            }
        }
        if let Some(looked) = self.looked.lock().as_mut() {
            looked.merge(layout, (bottom, top), &living);
        }
        Ok(living)
    }

    fn ask(&self, own: &Own, layout: &Layout, client: u32) -> Result<bool, RmError> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let presence = own.control.presence(layout, own.client, root_of(client))?;
        Ok(presence != Presence::NoClient && client != own.client)
    }

    fn own_for(&self, layout: &Layout) -> Result<Arc<Own>, DeviceError> {
        let present = self.own.lock().clone();
        if let Some(own) = present {
            return Ok(own);
        }
        let own = Arc::new(Own::open(layout)?);
        Ok(Arc::clone(self.own.lock().get_or_insert(own)))
    }
}

impl Own {
    fn open(layout: &Layout) -> Result<Self, DeviceError> {
        let control = Control::open().map_err(|error| error.of_open(CONTROL_PATH))?;
        let what = "allocating a driver client";
        let client = control.new_client().map_err(|error| error.of(what))?;
        let freed = made_and_freed(&control).map_err(|error| error.of(what))?;
        let ask = |handle| control.presence(layout, client, handle);
        let answers = (ask(root_of(client)), ask(root_of(freed)));
        let expected = (Ok(Presence::NoObject), Ok(Presence::NoClient));
        let tells = answers == expected;
        if !tells {
            tracing::warn!(
                ?answers,
                "this driver does not tell which clients live; they are guessed, a line in the kernel's log each"
            );
        }
        Ok(Self {
            control,
            client,
            tells,
        })
    }
}

fn made_and_freed(control: &Control) -> Result<u32, RmError> {
    let client = control.new_client()?;
    control.free_client(client)?;
    Ok(client)
}

/// What is asked about a client: its object 0, which is never there.
fn root_of(client: u32) -> Handle {
    Handle { client, object: 0 }
}

fn handle_at(layout: &Layout, place: u64) -> u32 {
    layout.client_base | ((place & u64::from(layout.client_mask)) as u32)
}

#[cfg(test)]
mod tests {
    use super::super::layout::Unknown;
    use super::*;

    fn layout() -> Layout {
        Layout::of_driver("580.159.04", Unknown::Refuse).expect("a known branch")
    }

    /// Asks about everything below, and calls one client of each step living.
    fn descend(looked: &mut Looked, layout: &Layout, alive: fn((u64, u64)) -> u64) -> u64 {
        let (mut asked, mut from) = (0, looked.bottom);
        while let Some(below) = looked.below(layout, from) {
            let Below::Ask((bottom, top)) = below else {
                panic!("nobody else asked: {below:?}");
            };
            assert_eq!(top, looked.bottom);
            asked += top - bottom;
            looked.merge(layout, (bottom, top), &[alive((bottom, top))]);
            from = bottom;
        }
        asked
    }

    #[test]
    fn the_stretch_grows_downwards_until_it_covers_every_handle() {
        let layout = layout();
        let mut looked = Looked::at(&layout, 0xc1d0_0123);
        assert_eq!(handle_at(&layout, looked.top), 0xc1d0_0123);
        let asked = descend(&mut looked, &layout, |(bottom, _)| bottom + 1);
        assert_eq!(asked, 0x10_0000);
        assert_eq!(looked.living.len(), 64);
    }

    #[test]
    fn a_search_is_told_of_what_another_one_asked_about() {
        let layout = layout();
        let mut looked = Looked::at(&layout, 0xc1d0_0123);
        let begun = looked.bottom;
        let first = (begun - STEP, begun);
        assert_eq!(looked.below(&layout, begun), Some(Below::Ask(first)));
        looked.merge(&layout, first, &[begun - 7, begun - 5]);
        // One that was just as far before has to try those too.
        let told = Below::Looked(vec![begun - 7, begun - 5], first.0);
        assert_eq!(looked.below(&layout, begun), Some(told));
        let next = Below::Ask((first.0 - STEP, first.0));
        assert_eq!(looked.below(&layout, first.0), Some(next));
        descend(&mut looked, &layout, |(_, top)| top);
        let end = looked.bottom;
        assert_eq!(looked.below(&layout, end), None);
        assert!(
            matches!(looked.below(&layout, begun), Some(Below::Looked(_, bottom)) if bottom == end)
        );
    }

    #[test]
    fn new_handles_push_the_old_places_of_the_same_handles_out() {
        let layout = layout();
        let mut looked = Looked::at(&layout, 0xc1df_fff0);
        descend(&mut looked, &layout, |(_, top)| top);
        let before = looked.top;
        // Round the corner.
        let top = looked.place_of(&layout, 0xc1d0_0010, Duration::ZERO);
        assert_eq!(top - before, 0x20);
        assert_eq!(handle_at(&layout, top), 0xc1d0_0010);
        looked.merge(&layout, (before, top), &[top]);
        assert_eq!(looked.below(&layout, looked.bottom), None);
        let handles: BTreeSet<u32> = looked
            .living
            .iter()
            .map(|place| handle_at(&layout, *place))
            .collect();
        assert_eq!(handles.len(), looked.living.len());
    }

    #[test]
    fn a_counter_read_earlier_and_heard_later_is_behind() {
        let layout = layout();
        let looked = Looked::at(&layout, 0xc1d0_0123);
        let soon = |handle| looked.place_of(&layout, handle, Duration::from_secs(1));
        assert_eq!(soon(0xc1d0_0100), looked.top);
        assert_eq!(soon(0xc1d0_0123), looked.top);
        assert_eq!(soon(0xc1d0_0124), looked.top + 1);
        // After a minute it has gone that far.
        let later = looked.place_of(&layout, 0xc1d0_0100, Duration::from_secs(60));
        assert_eq!(later, looked.top + 0x10_0000 - 0x23);
    }

    #[test]
    fn what_does_not_meet_the_stretch_is_not_taken_in() {
        let layout = layout();
        let mut looked = Looked::at(&layout, 0xc1d0_0123);
        let before = looked.clone();
        looked.merge(
            &layout,
            (before.bottom - 9, before.bottom - 5),
            &[before.bottom - 6],
        );
        assert_eq!(looked, before);
    }

    #[test]
    fn without_a_driver_there_is_no_client_to_ask_through() {
        if std::path::Path::new(CONTROL_PATH).exists() {
            println!("skipped: this host has a driver");
            return;
        }
        let census = Census::default();
        let looked = census.up_to_now(&layout(), &mut Pace::new());
        let error = looked.expect_err("no driver");
        assert_eq!(
            error,
            DeviceError::NoDriver("/dev/nvidiactl does not open".into())
        );
        assert_eq!(census.asked(), 0);
    }
}
