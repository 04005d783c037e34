//! Control of another process's channels, without its help.
//!
//! RM accepts a call on a client only on the open file that made the client.
//! pidfd_getfd(2) gives a duplicate of just that file to who may trace the
//! process. A duplicate pins the process's GPU memory past its death, so each
//! operation here takes one, uses it and drops it before it returns. It is needed
//! to look a process's objects up and for its timeslices; stops and resumes go
//! through clients of the service's own.
//!
//! The handle of a client is not known beforehand, and a call on one that does not
//! exist is a line in the kernel's log. `census` finds out silently which exist,
//! for processes that were there before the service too, and `search` tries those
//! on the descriptors of the process. Reading candidates from the memory of the
//! process, and marks at each change of the list of processes, were considered and
//! are not needed: they would make wrong guesses few, where this makes none.
//!
//! What is read in the driver's sources and was not run on a GPU: the silent
//! question (it checks itself before it is used), which GPU a device is, and what
//! the firmware does with a list of channels of which some are gone.

mod census;
pub(crate) mod find;
mod known;
pub(crate) mod layout;
mod pace;
mod reach;
mod rm;
pub(crate) mod search;
mod stop;
mod uuid;

use std::ops::RangeInclusive;

use gcgroup_device::{ChannelSet, ClientMark, DeviceError, GpuInfo, Handle, Search, Timeslices};

use self::find::Object;
use self::known::KnownClient;
use self::layout::{Layout, Unknown};
use self::reach::open_process;
use self::rm::{Control, RmError};
use self::search::{Lookup, LookupCost};
use self::stop::{Minor, Stations, parse_uuid};
use self::uuid::Uuid;

/// Timeslices that are set, in microseconds: those of compute.priority, 15
/// to 0. From 16 on they were measured on an H200; 0 is the driver's to define.
const TIMESLICE_USEC: RangeInclusive<u64> = 16..=524_288;

#[derive(Debug)]
pub(crate) struct DriverChannels {
    layout: Result<Layout, DeviceError>,
    lookup: Lookup,
    stations: Stations,
}

impl DriverChannels {
    pub(crate) fn new(driver_version: &str, unknown: Unknown) -> Self {
        Self {
            layout: Layout::of_driver(driver_version, unknown),
            lookup: Lookup::default(),
            stations: Stations::default(),
        }
    }

    fn layout(&self) -> Result<&Layout, DeviceError> {
        self.layout.as_ref().map_err(Clone::clone)
    }

    pub(crate) fn cost(&self) -> LookupCost {
        self.lookup.cost()
    }

    pub(crate) fn mark(&self) -> Result<ClientMark, DeviceError> {
        let counter = self.lookup.census.counter(self.layout()?)?;
        Ok(ClientMark(counter))
    }

    pub(crate) fn list(
        &self,
        pid: u32,
        gpu: &GpuInfo,
        search: Search,
    ) -> Result<ChannelSet, DeviceError> {
        let layout = self.layout()?;
        let process = open_process(pid)?;
        let clients = self.lookup.clients(layout, &process, gpu, search)?;
        let set = set_on(pid, &clients, parse_uuid(gpu)?);
        if set.is_empty() {
            // The dead have none either.
            if process.has_ended() {
                return Err(DeviceError::NoProcess(pid));
            }
            return Err(DeviceError::NoContext(format!(
                "process {pid} has no channels on GPU {}",
                gpu.index
            )));
        }
        if set.groups.is_empty() {
            let objects = clients.iter().flat_map(|client| &client.objects);
            return Err(find::none_found(pid, gpu.index, objects));
        }
        Ok(set)
    }

    pub(crate) fn inventory(
        &self,
        pid: u32,
        gpu: &GpuInfo,
        search: Search,
    ) -> Result<Vec<(u32, Object)>, DeviceError> {
        let layout = self.layout()?;
        let process = open_process(pid)?;
        let clients = self.lookup.clients(layout, &process, gpu, search)?;
        self.lookup.inventory(layout, &process, &clients)
    }

    pub(crate) fn timeslices(&self, set: &ChannelSet) -> Result<Timeslices, DeviceError> {
        let layout = self.layout()?;
        let reached = self.reach(layout, set)?;
        read_timeslices(layout, &reached, &set.groups)
    }

    pub(crate) fn set_timeslice(
        &self,
        set: &ChannelSet,
        usec: u64,
    ) -> Result<Timeslices, DeviceError> {
        let layout = self.layout()?;
        if !TIMESLICE_USEC.contains(&usec) {
            return Err(DeviceError::Failed(format!(
                "a timeslice of {usec} us is not within {} to {} us",
                TIMESLICE_USEC.start(),
                TIMESLICE_USEC.end()
            )));
        }
        let reached = self.reach(layout, set)?;
        let before = read_timeslices(layout, &reached, &set.groups)?;
        let outcome = set_timeslices(layout, &reached, &set.groups, usec);
        if outcome.is_err() {
            // A change that failed has changed nothing, as far as that can be had.
            for (group, usec) in set.groups.iter().zip(before.usec) {
                let back = reached.of(*group);
                let back = back.and_then(|control| control.set_timeslice(layout, *group, usec));
                if let Err(error) = back.map_err(|error| error.of("putting a timeslice back")) {
                    tracing::warn!(pid = set.pid, %error, "a timeslice is not what it was");
                }
            }
        }
        outcome
    }

    pub(crate) fn stop(
        &self,
        gpu: &GpuInfo,
        minor: Minor<'_>,
        sets: &[ChannelSet],
    ) -> Result<(), DeviceError> {
        self.stations.stop(self.layout()?, gpu, minor, sets)
    }

    pub(crate) fn resume(
        &self,
        gpu: &GpuInfo,
        minor: Minor<'_>,
        sets: &[ChannelSet],
    ) -> Result<(), DeviceError> {
        self.stations.resume(self.layout()?, gpu, minor, sets)
    }

    /// The descriptors for the clients of these groups.
    fn reach(&self, layout: &Layout, set: &ChannelSet) -> Result<Reached, DeviceError> {
        let process = open_process(set.pid)?;
        let mut clients: Vec<u32> = set.groups.iter().map(|group| group.client).collect();
        clients.sort_unstable();
        clients.dedup();
        let controls = self.lookup.controls_of(layout, &process, &clients)?;
        Ok(Reached(clients.into_iter().zip(controls).collect()))
    }
}

/// Duplicated descriptors, each with a client that was opened on it. Dropped with
/// the operation.
struct Reached(Vec<(u32, Control)>);

impl Reached {
    fn of(&self, handle: Handle) -> Result<&Control, RmError> {
        let found = self.0.iter().find(|(client, _)| *client == handle.client);
        let gone = RmError::Rm(rm::Status::InvalidClient);
        found.map(|(_, control)| control).ok_or(gone)
    }
}

/// What the clients of a process have on one GPU.
fn set_on(pid: u32, clients: &[KnownClient], gpu: Uuid) -> ChannelSet {
    let mut set = ChannelSet {
        pid,
        ..ChannelSet::default()
    };
    for known in clients {
        let client = known.place.client;
        let here = |handles: Vec<u32>| {
            let here = handles
                .into_iter()
                .filter(|handle| known.is_on(*handle, gpu));
            here.map(|object| Handle { client, object })
                .collect::<Vec<_>>()
        };
        set.groups.extend(here(known.tree().compute_groups()));
        set.channels.extend(here(known.tree().channels()));
    }
    set.groups.sort_unstable();
    set.channels.sort_unstable();
    set
}

/// Sets the timeslice of each group and reads it back.
fn set_timeslices(
    layout: &Layout,
    reached: &Reached,
    groups: &[Handle],
    usec: u64,
) -> Result<Timeslices, DeviceError> {
    for group in groups {
        reached
            .of(*group)
            .and_then(|control| control.set_timeslice(layout, *group, usec))
            .map_err(|error| error.of("setting a timeslice"))?;
    }
    let timeslices = read_timeslices(layout, reached, groups)?;
    if timeslices.usec.iter().any(|read| *read != usec) {
        return Err(DeviceError::Failed(format!(
            "a timeslice of {usec} us was read back as {:?} us",
            timeslices.usec
        )));
    }
    Ok(timeslices)
}

fn read_timeslices(
    layout: &Layout,
    reached: &Reached,
    groups: &[Handle],
) -> Result<Timeslices, DeviceError> {
    let read = |group: &Handle| reached.of(*group)?.timeslice(layout, *group);
    let usec: Result<Vec<u64>, RmError> = groups.iter().map(read).collect();
    let usec = usec.map_err(|error| error.of("reading a timeslice"))?;
    Ok(Timeslices { usec })
}

#[cfg(test)]
mod tests;
