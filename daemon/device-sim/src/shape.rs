//! What the simulated GPU is: an H200, as one was seen to be.

use gcgroup_kernels::engine::Facts;

/// SMs of an H200.
pub(crate) const SM_COUNT: u32 = 132;

/// SMs of each group: what splitting an H200 into groups of 8 gave when SMs that
/// are not co-scheduled were allowed, 16 groups and a remainder of 4.
pub(crate) const GROUPS: [u32; 17] = [8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 4];

/// Device memory: 141 GiB, which is 151,397,597,184 bytes.
pub(crate) const MEMORY_BYTES: u64 = 141 << 30;

/// Page in which device memory is counted, the granularity of `cuMemCreate`.
pub(crate) const PAGE_BYTES: u64 = 2 << 20;

/// Device memory of a context of its own, beyond what its program allocates.
/// Assumed: nvidia-smi shows about half a gigabyte for an idle CUDA program on
/// a large GPU.
pub(crate) const CONTEXT_BYTES: u64 = 500 << 20;

/// Device memory of an MPS client beyond its allocations. Assumed: its context
/// is the server's, and a client adds little more than its own tables.
pub(crate) const MPS_CLIENT_BYTES: u64 = 40 << 20;

/// Device memory of an MPS server: one context.
pub(crate) const MPS_SERVER_BYTES: u64 = CONTEXT_BYTES;

/// Timeslices of the channel groups of a new context in microseconds, the
/// compute group first, as driver 580 has them on Hopper. A compute group that
/// comes later begins with the first.
pub(crate) const TIMESLICES_USEC: [u64; 4] = [2048, 1024, 1024, 1024];

/// Handles of the channel groups of a new context. The driver counts up from
/// 0x5c000000 in each client anew, other objects in between.
pub(crate) const GROUP_HANDLES: [u32; 4] = [0x5c00_0012, 0x5c00_0024, 0x5c00_0031, 0x5c00_003e];

/// Channels of each of these groups: 20 in all, as driver 580 has them on Hopper.
/// How they are spread is assumed.
pub(crate) const GROUP_CHANNELS: [u32; 4] = [8, 4, 4, 4];

/// Handle of the first group that is added to a context later.
pub(crate) const FIRST_ADDED: u32 = 0x5c00_0060;

/// From the handle of a group to that of its first channel, and from there to the
/// next: each channel has an object of its own beside it. Assumed.
pub(crate) const HANDLE_STEP: u32 = 2;

/// Handles that a program makes and frees before it makes what lies far off: more
/// than searches for what is recent look through, and within the window of a full
/// search, which is 0x10000 handles or so.
pub(crate) const FAR: u32 = 0x4000;

/// Unused handles that end a search for what is recent, shared out between the
/// clients of a process, and the least of them for one client; and those that end
/// a search right behind what is known. As the host with real GPUs has them.
pub(crate) const RECENT_GAP: [u32; 2] = [96, 32];
pub(crate) const NEXT_GAP: u32 = 24;

/// Microseconds of a driver call that stops the channels of one process and of
/// one that stops those of two: the middle of 0.61 to 0.92 ms on an H200, and
/// 0.95 ms.
pub(crate) const STOP_US: [u64; 2] = [700, 950];

/// The same of a resume: the middle of 0.37 to 0.61 ms, and 0.47 ms.
pub(crate) const RESUME_US: [u64; 2] = [450, 470];

/// The first handle of a driver client; the counter is the host's.
pub(crate) const FIRST_CLIENT: u32 = 0xc1d0_0000;

/// Clients that an MPS server takes up to CUDA 13.0, from its documentation.
pub(crate) const MPS_SLOTS: u32 = 48;

/// Product name.
pub(crate) const NAME: &str = "NVIDIA H200 (simulated)";

/// The device as a worker sees it.
pub(crate) fn facts() -> Facts {
    Facts {
        sm_count: SM_COUNT,
        groups: GROUPS.to_vec(),
        memory_bytes: MEMORY_BYTES,
        green_contexts: true,
        stream_priority_least: 0,
        stream_priority_greatest: -5,
        driver_version: 13_000,
    }
}

/// UUID of a GPU: the same for the same seed and index, so that a simulated host
/// that was started anew has the same GPUs.
pub(crate) fn uuid(seed: u64, index: u32) -> String {
    let mut state = seed ^ (u64::from(index) << 32);
    let (high, low) = (splitmix(&mut state), splitmix(&mut state));
    format!(
        "GPU-5113{:04x}-{:04x}-{:04x}-{:04x}-{:012x}",
        high & 0xffff,
        (high >> 16) & 0xffff,
        (high >> 32) & 0xffff,
        high >> 48,
        low & 0xffff_ffff_ffff
    )
}

/// The next number of Steele, Lea and Flood's SplitMix64: small, seeded, and good
/// enough for faults and names.
pub(crate) fn splitmix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_all_the_sms() {
        assert_eq!(GROUPS.iter().sum::<u32>(), SM_COUNT);
    }

    #[test]
    fn uuids_have_the_form_of_a_uuid_and_differ_by_seed_and_index() {
        let uuid_00 = uuid(0, 0);
        assert_eq!(uuid_00, uuid(0, 0));
        assert_ne!(uuid_00, uuid(0, 1));
        assert_ne!(uuid_00, uuid(1, 0));
        let lengths: Vec<_> = uuid_00.split('-').map(str::len).collect();
        assert_eq!(lengths, [3, 8, 4, 4, 4, 12]);
    }
}
