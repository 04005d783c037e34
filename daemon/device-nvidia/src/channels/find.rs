//! The objects of a driver client: which there are, and which matter.
//!
//! A group does not say what its channels are for, but an engine's class hangs
//! below the channel that uses it: a compute object (classes 0x..c0) has a
//! channel (0x..6f) for its parent, which has a group (0xa06c) for its own
//! (src/nvidia/src/kernel/rmapi/resource_list.h). So the groups above compute
//! objects are the ones that hold compute channels; those for copies have none.
//! Above a group or a lone channel stands the device (0x80), which has a
//! subdevice (0x2080) below it that can be asked which GPU it is.
//!
//! RM has no call that lists a client's objects: CLIENT_GET_CHILD_HANDLE (0xd05)
//! returns the first child of a type and no second one, and the calls about
//! channels take handles and give none. So handles are tried one by one, which
//! leaves no trace where there is no object.

use std::collections::HashMap;

use super::layout::Layout;
use super::pace::Pace;
use super::rm::{Ask, Control, DEVICE, RmError, SUBDEVICE, Status};
use gcgroup_device::DeviceError;

/// KEPLER_CHANNEL_GROUP_A (class/cla06c.h), the class of every group since.
const GROUP: u32 = 0xa06c;

/// Last byte of each architecture's channel class (class/cl*6f.h).
const CHANNEL: u32 = 0x6f;

/// Last byte of each architecture's compute class (class/cl*c0.h).
const COMPUTE: u32 = 0xc0;

/// How far a client without any object there is searched. Those of libcuda begin
/// with the first handles; other clients of a process have theirs elsewhere.
const EMPTY_GAP: u32 = 0x1000;

/// Steps from an object up to its device. A compute object takes three.
const HEIGHT_MAX: usize = 8;

/// One object of a driver client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Object {
    /// Its handle.
    pub handle: u32,
    /// Its class (src/common/sdk/nvidia/inc/class).
    pub class: u32,
    /// Handle of the object it hangs below.
    pub parent: u32,
}

/// Which objects are kept; each costs one more question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Keep {
    /// Those that lead from a compute object to a GPU.
    Channels,
    /// All.
    All,
}

impl Keep {
    fn wants(self, class: u32) -> bool {
        let leads = matches!(class, GROUP | DEVICE | SUBDEVICE)
            || matches!(class & 0xff, CHANNEL | COMPUTE);
        self == Self::All || leads
    }
}

/// What a walk over handles found.
#[derive(Debug, Default)]
pub(super) struct Walk {
    /// By handle.
    pub(super) objects: Vec<Object>,
    /// The handle after the highest one in use, whatever its object; `None` when
    /// there was none.
    pub(super) next: Option<u32>,
}

/// Every object of a client.
pub(super) fn objects(
    control: &Control,
    layout: &Layout,
    client: u32,
    keep: Keep,
    pace: &mut Pace,
) -> Result<Walk, RmError> {
    let mut look = |handle| {
        pace.call()?;
        look(control, layout, client, handle, keep)
    };
    let base = layout.object_base;
    let first = walk(base, EMPTY_GAP, &mut look)?;
    let Some(next) = first.next else {
        return Ok(first);
    };
    let rest = walk(next, layout.object_window, look)?;
    Ok(Walk {
        objects: [first.objects, rest.objects].concat(),
        next: rest.next.or(first.next),
    })
}

/// The objects from a handle on, until `gap` handles in a row are unused.
pub(super) fn objects_from(
    control: &Control,
    layout: &Layout,
    client: u32,
    (from, gap): (u32, u32),
    pace: &mut Pace,
) -> Result<Walk, RmError> {
    walk(from, gap, |handle| {
        pace.call()?;
        look(control, layout, client, handle, Keep::Channels)
    })
}

/// What a look at one handle told.
#[derive(Clone, Copy, Debug)]
enum Look {
    Unused,
    /// In use by an object that is not kept.
    Other,
    Kept(Object),
}

fn look(
    control: &Control,
    layout: &Layout,
    client: u32,
    handle: u32,
    keep: Keep,
) -> Result<Look, RmError> {
    let ask = |what| control.handle_info(layout, client, handle, what);
    let found = ask(Ask::Class).and_then(|class| {
        if !keep.wants(class) {
            return Ok(Look::Other);
        }
        Ok(Look::Kept(Object {
            handle,
            class,
            parent: ask(Ask::Parent)?,
        }))
    });
    match found {
        // Freed, or never there.
        Err(RmError::Rm(Status::NoObject)) => Ok(Look::Unused),
        other => other,
    }
}

fn walk(
    from: u32,
    gap: u32,
    mut look: impl FnMut(u32) -> Result<Look, RmError>,
) -> Result<Walk, RmError> {
    let mut walk = Walk::default();
    let mut handle = from;
    // There is no handle after the last one.
    while let Some(after) = handle.checked_add(1) {
        match look(handle)? {
            Look::Unused if handle - walk.next.unwrap_or(from) + 1 >= gap => break,
            Look::Unused => {}
            Look::Other => walk.next = Some(after),
            Look::Kept(object) => {
                walk.objects.push(object);
                walk.next = Some(after);
            }
        }
        handle = after;
    }
    Ok(walk)
}

/// Objects of one client, by handle, as the tree that their parents make.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tree<'a>(pub(super) &'a [Object]);

impl Tree<'_> {
    fn get(self, handle: u32) -> Option<Object> {
        let position = self.0.binary_search_by_key(&handle, |object| object.handle);
        position.ok().map(|position| self.0[position])
    }

    /// Groups with compute channels, in the order of their handles.
    pub(super) fn compute_groups(self) -> Vec<u32> {
        let group_of = |compute: &Object| {
            let channel = self.get(compute.parent).filter(is_channel)?;
            let group = self.get(channel.parent).filter(is_group)?;
            Some(group.handle)
        };
        let computes = self.0.iter().filter(|o| o.class & 0xff == COMPUTE);
        let mut groups: Vec<u32> = computes.filter_map(group_of).collect();
        groups.sort_unstable();
        groups.dedup();
        groups
    }

    /// Every channel, in the order of their handles.
    pub(super) fn channels(self) -> Vec<u32> {
        let channels = self.0.iter().filter(|object| is_channel(object));
        channels.map(|object| object.handle).collect()
    }

    /// The device that a group or a channel belongs to.
    pub(super) fn device_of(self, handle: u32) -> Option<u32> {
        let mut object = self.get(handle)?;
        for _ in 0..HEIGHT_MAX {
            if object.class == DEVICE {
                return Some(object.handle);
            }
            object = self.get(object.parent)?;
        }
        None
    }

    /// The devices that have channels, each once.
    pub(super) fn devices(self) -> Vec<u32> {
        let channels = self.channels();
        let mut devices: Vec<u32> = channels
            .into_iter()
            .filter_map(|channel| self.device_of(channel))
            .collect();
        devices.sort_unstable();
        devices.dedup();
        devices
    }

    /// A subdevice below each device that has one.
    pub(super) fn subdevices(self) -> HashMap<u32, u32> {
        let subdevices = self.0.iter().filter(|object| object.class == SUBDEVICE);
        subdevices
            .map(|object| (object.parent, object.handle))
            .collect()
    }
}

fn is_channel(object: &Object) -> bool {
    object.class & 0xff == CHANNEL
}

fn is_group(object: &Object) -> bool {
    object.class == GROUP
}

/// Why a process that has channels on a GPU cannot be controlled there: it has
/// no compute groups.
pub(super) fn none_found<'a>(
    pid: u32,
    gpu: u32,
    objects: impl Iterator<Item = &'a Object> + Clone,
) -> DeviceError {
    let count = |of: fn(&Object) -> bool| objects.clone().filter(|object| of(object)).count();
    DeviceError::Failed(format!(
        "process {pid} has no compute channel group on GPU {gpu}: {} devices, {} channel groups, {} channels on any",
        count(|object| object.class == DEVICE),
        count(is_group),
        count(is_channel),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(handle: u32, class: u32, parent: u32) -> Object {
        Object {
            handle,
            class,
            parent,
        }
    }

    /// A client with two devices, as a process that computes on two GPUs has.
    fn two_gpus() -> Vec<Object> {
        vec![
            object(0x01, 0x0080, 0xc1d0_0001),
            object(0x02, 0x2080, 0x01),
            object(0x03, 0x0080, 0xc1d0_0001),
            object(0x04, 0x2080, 0x03),
            object(0x10, 0xa06c, 0x01),
            object(0x11, 0xc86f, 0x10),
            object(0x12, 0xcbc0, 0x11),
            object(0x13, 0xc86f, 0x10),
            object(0x14, 0xcbc0, 0x13),
            object(0x20, 0xa06c, 0x01),
            object(0x21, 0xc86f, 0x20),
            object(0x22, 0xc8b5, 0x21),
            object(0x30, 0xa06c, 0x03),
            object(0x31, 0xc86f, 0x30),
            object(0x32, 0xcbc0, 0x31),
            object(0x40, 0xc86f, 0x03),
        ]
    }

    #[test]
    fn groups_are_chosen_by_the_compute_objects_below_them() {
        let objects = two_gpus();
        let tree = Tree(&objects);
        assert_eq!(tree.compute_groups(), [0x10, 0x30]);
        assert_eq!(tree.channels(), [0x11, 0x13, 0x21, 0x31, 0x40]);
    }

    #[test]
    fn groups_and_channels_belong_to_the_device_above_them() {
        let objects = two_gpus();
        let tree = Tree(&objects);
        let devices: Vec<_> = [0x10, 0x21, 0x14, 0x30, 0x31, 0x40]
            .map(|handle| tree.device_of(handle))
            .to_vec();
        let (first, second) = (Some(0x01), Some(0x03));
        assert_eq!(devices, [first, first, first, second, second, second]);
        assert_eq!(tree.devices(), [0x01, 0x03]);
        assert_eq!(
            tree.subdevices(),
            HashMap::from([(0x01, 0x02), (0x03, 0x04)])
        );
    }

    #[test]
    fn a_tree_with_holes_or_loops_has_no_device() {
        let objects = [
            object(0x10, 0xa06c, 0x99),
            object(0x11, 0xc86f, 0x10),
            object(0x20, 0xa06c, 0x21),
            object(0x21, 0xc86f, 0x20),
        ];
        let tree = Tree(&objects);
        assert_eq!(tree.device_of(0x11), None);
        assert_eq!(tree.device_of(0x21), None);
        assert_eq!(tree.device_of(0x77), None);
        assert_eq!(tree.devices(), [] as [u32; 0]);
    }

    #[test]
    fn a_compute_object_outside_a_group_counts_for_none() {
        // Under MPS a client's channels hang below no group of its own.
        let objects = [
            object(0x01, 0x0080, 0xc1d0_0001),
            object(0x11, 0xc86f, 0x01),
            object(0x12, 0xcbc0, 0x11),
            object(0x13, 0xcbc0, 0x99),
            object(0x20, 0xa06c, 0x01),
        ];
        assert_eq!(Tree(&objects).compute_groups(), [] as [u32; 0]);
        assert_eq!(
            none_found(7, 1, objects.iter()).to_string(),
            "process 7 has no compute channel group on GPU 1: 1 devices, 1 channel groups, 1 channels on any"
        );
    }

    #[test]
    fn a_walk_ends_after_a_gap_and_counts_what_it_does_not_keep() {
        let looks = |used: &'static [(u32, u32)]| {
            move |handle| {
                let found = used.iter().find(|(at, _)| *at == handle);
                Ok(match found {
                    None => Look::Unused,
                    Some((_, 0x3e)) => Look::Other,
                    Some((_, class)) => Look::Kept(object(handle, *class, 1)),
                })
            }
        };
        let found = walk(
            10,
            4,
            looks(&[(10, 0x80), (13, 0x3e), (17, 0x2080), (22, 1)]),
        );
        let found = found.expect("nothing fails");
        let handles: Vec<u32> = found.objects.iter().map(|object| object.handle).collect();
        assert_eq!((handles, found.next), (vec![10, 17], Some(18)));
        let none = walk(10, 4, looks(&[(14, 0x80)])).expect("nothing fails");
        assert!(none.objects.is_empty());
        assert_eq!(none.next, None);
        let at_the_end = walk(u32::MAX - 1, 4, looks(&[])).expect("nothing fails");
        assert_eq!(at_the_end.next, None);
    }

    #[test]
    fn only_what_leads_to_a_gpu_is_kept() {
        for class in [0x80, 0x2080, 0xa06c, 0xc86f, 0xcbc0] {
            assert!(Keep::Channels.wants(class), "{class:#x}");
        }
        for class in [0x3e, 0x40, 0x90f1, 0xc8b5] {
            assert!(!Keep::Channels.wants(class), "{class:#x}");
            assert!(Keep::All.wants(class), "{class:#x}");
        }
    }
}
