//! Control of another process's channels through the driver.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use crate::{DeviceError, GpuInfo};

/// A mark in the host's counter of driver clients: what a process opens after
/// it has been taken has a handle above it. Keeps the search for a process's
/// client short, since each wrong guess is a line in the kernel's log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientMark(pub u32);

/// An object of a driver client, as the driver names it on the whole host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Handle {
    /// Handle of the client.
    pub client: u32,
    /// Handle of the object within it.
    pub object: u32,
}

/// What one process has on one GPU that channel control acts on. Both lists
/// ascend and hold each handle once, as [`Channels::list`] returns them; one that
/// was put together otherwise is understood too, but costs a sort to compare with.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChannelSet {
    /// Thread-group id.
    pub pid: u32,
    /// Channel groups with compute channels, ascending: those whose timeslice is
    /// read and set.
    pub groups: Vec<Handle>,
    /// Every channel, whatever its engine, ascending: what a stop acts on.
    pub channels: Vec<Handle>,
}

impl ChannelSet {
    /// What of it is not in `known`, in its own order.
    #[must_use]
    pub fn beyond(&self, known: &Self) -> Self {
        Self {
            pid: self.pid,
            groups: absent(&self.groups, &known.groups),
            channels: absent(&self.channels, &known.channels),
        }
    }

    /// Whether there is nothing to act on.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.groups.is_empty() && self.channels.is_empty()
    }
}

/// Those of `all` that are not in `known`.
fn absent(all: &[Handle], known: &[Handle]) -> Vec<Handle> {
    let mut known = Cow::Borrowed(known);
    if !known.is_sorted() {
        known.to_mut().sort_unstable();
    }
    let new = all
        .iter()
        .filter(|handle| known.binary_search(handle).is_err());
    new.copied().collect()
}

/// How thoroughly a process's objects are looked up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Search {
    /// It opened the GPU after this mark.
    Since(ClientMark),
    /// Everything is looked up, whatever was known: after a checkpoint and
    /// restore, or when a stop named an object that is gone.
    Anew,
    /// What was found before stands; only what may have been made since is
    /// looked for. Takes well below a millisecond.
    Recent,
    /// As [`Search::Recent`], but only right behind what was found before: what is
    /// looked for behind a stop, where every microsecond counts. What lies further
    /// off is left to the next search of another kind.
    Next,
}

/// Timeslices as the driver reports them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Timeslices {
    /// Microseconds of each group of [`ChannelSet::groups`], in its order.
    pub usec: Vec<u64>,
}

/// Control of another process's channels through the driver. No descriptor that
/// is duplicated from a process outlives a call.
pub trait Channels: Send + Sync {
    /// A mark to take before a process opens the GPU.
    ///
    /// # Errors
    /// [`DeviceError::Unsupported`] for a driver whose layouts are not known.
    fn mark(&self) -> Result<ClientMark, DeviceError>;

    /// Lists what a process has on this GPU now.
    ///
    /// # Errors
    /// [`DeviceError::NoProcess`], [`DeviceError::Denied`],
    /// [`DeviceError::NoContext`] when it has no channels there, as far as the
    /// search looked: for certain after [`Search::Anew`]. [`DeviceError::Failed`]
    /// when it has channels but no compute group, as a client of an MPS server,
    /// or more than can be looked through.
    fn list(&self, pid: u32, gpu: &GpuInfo, search: Search) -> Result<ChannelSet, DeviceError>;

    /// Reads the timeslices back from the driver.
    ///
    /// # Errors
    /// As [`Channels::list`].
    fn timeslices(&self, set: &ChannelSet) -> Result<Timeslices, DeviceError>;

    /// Sets the timeslice of each group, in microseconds, and reads it back.
    ///
    /// # Errors
    /// As [`Channels::list`]; [`DeviceError::Failed`] when another value was
    /// read back.
    fn set_timeslice(&self, set: &ChannelSet, usec: u64) -> Result<Timeslices, DeviceError>;

    /// Stops every channel of these processes, in the middle of a kernel too,
    /// and returns when none of them runs on the GPU. What was stopped before
    /// stays so.
    ///
    /// # Errors
    /// [`DeviceError::Failed`] when a channel is gone or the driver refuses; some
    /// channels may be stopped then, and a resume of all is harmless.
    fn stop(&self, gpu: &GpuInfo, sets: &[ChannelSet]) -> Result<(), DeviceError>;

    /// Lets every channel of these processes run again; harmless for those that
    /// do, and those that are gone count as resumed. Uses nothing but the handles,
    /// so it works for sets that an earlier service noted.
    ///
    /// # Errors
    /// [`DeviceError::Failed`] when the driver refuses; others may run then.
    fn resume(&self, gpu: &GpuInfo, sets: &[ChannelSet]) -> Result<(), DeviceError>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_not_known_is_new() {
        let handle = |object| Handle { client: 1, object };
        let known = ChannelSet {
            pid: 7,
            groups: vec![handle(1)],
            channels: vec![handle(2), handle(3)],
        };
        let now = ChannelSet {
            pid: 7,
            groups: vec![handle(1), handle(9)],
            channels: vec![handle(3), handle(10)],
        };
        let new = now.beyond(&known);
        assert_eq!(new.groups, [handle(9)]);
        assert_eq!(new.channels, [handle(10)]);
        assert!(known.beyond(&now).groups.is_empty());
        assert!(now.beyond(&now).is_empty());
    }

    #[test]
    fn thousands_of_channels_are_compared_quickly() {
        let set = |objects: &mut dyn Iterator<Item = u32>| ChannelSet {
            pid: 7,
            groups: Vec::new(),
            channels: objects.map(|object| Handle { client: 1, object }).collect(),
        };
        let now = set(&mut (0..2000));
        let even = set(&mut (0..2000).step_by(2));
        let odd = set(&mut (1..2000).step_by(2));
        // As a list to which others were added at its end.
        let mixed = set(&mut (1000..1999).chain(0..1000));
        let begun = std::time::Instant::now();
        for _ in 0..50 {
            assert_eq!(now.beyond(&even), odd);
            assert_eq!(now.beyond(&mixed), set(&mut (1999..2000)));
            assert!(even.beyond(&now).is_empty());
        }
        // One by one that would be 200 million comparisons.
        let spent = begun.elapsed();
        assert!(spent.as_millis() < 2000, "{spent:?}");
    }
}
