//! The driver client of a context: its channel groups and their channels.

use gcgroup_device::{ChannelSet, Handle};

use crate::shape;
use crate::wire::Reached;

/// One channel. Only whether the scheduler takes work from it matters here.
#[derive(Debug)]
struct Channel {
    object: u32,
    enabled: bool,
}

#[derive(Debug)]
struct Group {
    object: u32,
    timeslice_usec: u64,
    /// Whether its channels launch kernels; those of the others copy.
    compute: bool,
    channels: Vec<Channel>,
}

impl Group {
    fn new(object: u32, timeslice_usec: u64, compute: bool, channels: u32) -> Self {
        let channel = |number| Channel {
            object: object + 1 + number * shape::HANDLE_STEP,
            enabled: true,
        };
        Self {
            object,
            timeslice_usec,
            compute,
            channels: (0..channels).map(channel).collect(),
        }
    }

    fn is_disabled(&self) -> bool {
        self.channels.iter().all(|channel| !channel.enabled)
    }
}

/// What an object of a client is.
#[derive(Clone, Copy, Debug)]
enum Kind {
    /// A group whose channels launch kernels.
    Compute,
    /// One whose channels copy.
    Copies,
    Channel,
}

/// The handle after those of an object and of what it has beside it.
fn end_of(object: u32) -> u32 {
    object + shape::HANDLE_STEP
}

/// A driver client. A client of an MPS server has no groups: they are the
/// server's.
#[derive(Debug)]
pub(super) struct Client {
    /// Its handle on the whole host.
    pub(super) handle: u32,
    /// The oldest first; so the handles ascend.
    groups: Vec<Group>,
    next_object: u32,
}

impl Client {
    /// The client of a context of its own.
    pub(super) fn new(handle: u32) -> Self {
        let groups = shape::GROUP_HANDLES
            .iter()
            .zip(shape::TIMESLICES_USEC)
            .zip(shape::GROUP_CHANNELS)
            .enumerate()
            .map(|(place, ((&object, usec), channels))| {
                Group::new(object, usec, place == 0, channels)
            });
        Self {
            handle,
            groups: groups.collect(),
            next_object: shape::FIRST_ADDED,
        }
    }

    /// The client of a context under MPS.
    pub(super) fn under_mps(handle: u32) -> Self {
        Self {
            handle,
            groups: Vec::new(),
            next_object: shape::FIRST_ADDED,
        }
    }

    /// Adds a compute group as large as the first, with the driver's timeslice.
    pub(super) fn add_group(&mut self) {
        let channels = shape::GROUP_CHANNELS[0];
        let group = Group::new(self.next_object, shape::TIMESLICES_USEC[0], true, channels);
        self.groups.push(group);
        self.next_object += (channels + 1) * shape::HANDLE_STEP;
    }

    /// Adds a channel to the group that the program launches into; false where
    /// there is none. Within a stopped group it is stopped from the beginning.
    pub(super) fn add_channel(&mut self) -> bool {
        let object = self.next_object;
        let Some(group) = self.groups.iter_mut().rev().find(|group| group.compute) else {
            return false;
        };
        let enabled = !group.is_disabled();
        group.channels.push(Channel { object, enabled });
        self.next_object += shape::HANDLE_STEP;
        true
    }

    /// Uses handles up for objects that are freed again.
    pub(super) fn skip_handles(&mut self) {
        self.next_object += shape::FAR;
    }

    /// Removes the group that was added last; false where none was.
    pub(super) fn remove_group(&mut self) -> bool {
        let added = self.groups.len() > shape::GROUP_HANDLES.len();
        if added {
            self.groups.pop();
        }
        added
    }

    /// The group that the program launches into: the newest with compute channels.
    fn newest(&self) -> Option<&Group> {
        self.groups.iter().rev().find(|group| group.compute)
    }

    /// Timeslice of the group that the program launches into, microseconds.
    pub(super) fn timeslice_usec(&self) -> u64 {
        self.newest()
            .map_or(shape::TIMESLICES_USEC[0], |group| group.timeslice_usec)
    }

    /// Whether every channel is disabled that the program launches into.
    pub(super) fn stands(&self) -> bool {
        self.newest().is_some_and(Group::is_disabled)
    }

    /// Enables or disables a channel; false where there is none of that handle.
    pub(super) fn switch(&mut self, object: u32, enabled: bool) -> bool {
        let mut channels = self.groups.iter_mut().flat_map(|group| &mut group.channels);
        match channels.find(|channel| channel.object == object) {
            Some(channel) => {
                channel.enabled = enabled;
                true
            }
            None => false,
        }
    }

    /// Whether there is a channel of this handle.
    pub(super) fn has_channel(&self, object: u32) -> bool {
        let mut channels = self.groups.iter().flat_map(|group| &group.channels);
        channels.any(|channel| channel.object == object)
    }

    /// Timeslice of a group, microseconds, to read or to set.
    pub(super) fn timeslice_of(&mut self, object: u32) -> Option<&mut u64> {
        let mut groups = self.groups.iter_mut();
        let group = groups.find(|group| group.object == object)?;
        Some(&mut group.timeslice_usec)
    }

    /// Adds what there is to the set of its process.
    pub(super) fn list(&self, set: &mut ChannelSet) {
        let handle = |object| Handle {
            client: self.handle,
            object,
        };
        for group in &self.groups {
            if group.compute {
                set.groups.push(handle(group.object));
            }
            let channels = group.channels.iter();
            set.channels
                .extend(channels.map(|channel| handle(channel.object)));
        }
    }

    /// How far a look at everything reaches. What there is below the first group
    /// that is added is in use by other objects.
    pub(super) fn reached(&self) -> Reached {
        let ends = self.objects().into_iter().map(|(object, _)| end_of(object));
        Reached {
            client: self.handle,
            next: ends.fold(shape::FIRST_ADDED, u32::max),
        }
    }

    /// Adds what lies behind `next` to the set of its process, up to the first
    /// `gap` handles in a row that nothing uses. Says how far that reaches.
    pub(super) fn list_behind(&self, next: u32, gap: u32, set: &mut ChannelSet) -> Reached {
        let mut reached = Reached {
            client: self.handle,
            next,
        };
        for (object, kind) in self.objects() {
            if object < next {
                continue;
            }
            if object.saturating_sub(reached.next) >= gap {
                break;
            }
            reached.next = reached.next.max(end_of(object));
            let handle = Handle {
                client: self.handle,
                object,
            };
            match kind {
                Kind::Compute => set.groups.push(handle),
                Kind::Copies => {}
                Kind::Channel => set.channels.push(handle),
            }
        }
        reached
    }

    /// Its groups and channels by their handles.
    fn objects(&self) -> Vec<(u32, Kind)> {
        let mut objects = Vec::new();
        for group in &self.groups {
            let kind = if group.compute {
                Kind::Compute
            } else {
                Kind::Copies
            };
            objects.push((group.object, kind));
            let channels = group.channels.iter();
            objects.extend(channels.map(|channel| (channel.object, Kind::Channel)));
        }
        objects.sort_unstable_by_key(|(object, _)| *object);
        objects
    }

    /// Drops all its groups, as a context that has failed does.
    pub(super) fn lose_groups(&mut self) {
        self.groups.clear();
    }

    /// Its groups, its channels, and how many of these are disabled.
    pub(super) fn count(&self) -> (u32, u32, u32) {
        let channels = || self.groups.iter().flat_map(|group| &group.channels);
        let disabled = channels().filter(|channel| !channel.enabled).count();
        (
            self.groups.len() as u32,
            channels().count() as u32,
            disabled as u32,
        )
    }
}
