//! Which objects of a driver client are its compute channel groups.
//!
//! A group does not say what its channels are for, but an engine's class hangs
//! below the channel that uses it: a compute object (classes 0x..c0) has a
//! channel (0x..6f) for its parent, which has a group (0xa06c) for its own
//! (src/nvidia/src/kernel/rmapi/resource_list.h). So the groups above compute
//! objects are the ones that hold compute channels; those for copies have none.

use gcgroup_device::DeviceError;

use super::layout::Layout;
use super::rm::{Ask, Control, RmError, Status};

/// KEPLER_CHANNEL_GROUP_A (class/cla06c.h), the class of every group since.
const GROUP: u32 = 0xa06c;

/// Last byte of each architecture's channel class (class/cl*6f.h).
const CHANNEL: u32 = 0x6f;

/// Last byte of each architecture's compute class (class/cl*c0.h).
const COMPUTE: u32 = 0xc0;

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

/// Lists the objects of a client within the window of handles. A look at a
/// handle that does not exist leaves no trace.
pub(super) fn objects(
    control: &Control,
    layout: &Layout,
    client: u32,
) -> Result<Vec<Object>, RmError> {
    let mut found = Vec::new();
    for offset in 0..layout.object_window {
        let handle = layout.object_base + offset;
        let ask = |what| control.handle_info(layout, client, handle, what);
        let object = ask(Ask::Class).and_then(|class| Ok((class, ask(Ask::Parent)?)));
        match object {
            Ok((class, parent)) => found.push(Object {
                handle,
                class,
                parent,
            }),
            // Freed, or never there.
            Err(RmError::Rm(Status::NoObject)) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

/// Groups with compute channels, in the order of their handles.
pub(super) fn compute_groups(objects: &[Object]) -> Vec<u32> {
    let by_handle = |handle| {
        let position = objects.binary_search_by_key(&handle, |object: &Object| object.handle);
        position.ok().map(|position| objects[position])
    };
    let group_of = |compute: &Object| {
        let channel = by_handle(compute.parent).filter(|object| object.class & 0xff == CHANNEL)?;
        let group = by_handle(channel.parent).filter(|object| object.class == GROUP)?;
        Some(group.handle)
    };
    let mut groups: Vec<u32> = objects
        .iter()
        .filter(|object| object.class & 0xff == COMPUTE)
        .filter_map(group_of)
        .collect();
    groups.sort_unstable();
    groups.dedup();
    groups
}

/// Why a client without compute groups has none, for the message.
pub(super) fn none_found(pid: u32, objects: &[Object]) -> DeviceError {
    let count = |of: &dyn Fn(u32) -> bool| objects.iter().filter(|o| of(o.class)).count();
    DeviceError::Failed(format!(
        "process {pid} has no compute channel group yet: {} objects, {} channel groups, {} channels",
        objects.len(),
        count(&|class| class == GROUP),
        count(&|class| class & 0xff == CHANNEL),
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

    #[test]
    fn groups_are_chosen_by_the_compute_objects_below_them() {
        let objects = [
            object(0x01, 0x0080, 0xc1d0_0001),
            object(0x02, 0x2080, 0x01),
            object(0x10, 0xa06c, 0x01),
            object(0x11, 0xc86f, 0x10),
            object(0x12, 0xcbc0, 0x11),
            object(0x13, 0xc86f, 0x10),
            object(0x14, 0xcbc0, 0x13),
            object(0x20, 0xa06c, 0x01),
            object(0x21, 0xc86f, 0x20),
            object(0x22, 0xc8b5, 0x21),
            object(0x30, 0xa06c, 0x01),
            object(0x31, 0xc86f, 0x30),
            object(0x32, 0xcbc0, 0x31),
        ];
        assert_eq!(compute_groups(&objects), [0x10, 0x30]);
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
        assert_eq!(compute_groups(&objects), [] as [u32; 0]);
        assert_eq!(
            none_found(7, &objects).to_string(),
            "process 7 has no compute channel group yet: 5 objects, 1 channel groups, 1 channels"
        );
    }
}
