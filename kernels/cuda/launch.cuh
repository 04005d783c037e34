// What every kernel of the catalogue shares: the launch parameters, the look at the stop flag, and
// the loop that carries a block from where it is to where it shall be.
//
// A launch is a target, not an amount of work: block b goes on from progress[b] until `target`
// units are done, and a launch that finds them done returns at once. So launches may be queued
// behind one another, be cut short by the stop flag, and be submitted again unchanged, with no unit
// lost or done twice. Nothing here depends on how many blocks are resident at a time.
//
// Rules for a kernel file:
//  - A workload's entry points are extern "C", named <kernel>[_ilp<N>]_sliced and
//    <kernel>[_ilp<N>]_uncut, and take one LaunchArgs by value. Both come from one template, so
//    that they differ in the looks at the flag alone.
//  - Arithmetic is written with the intrinsics that name their rounding (__fmaf_rn, __fmul_rn,
//    __dmul_rn): the compiler neither contracts nor reassociates these, so the CPU reference in
//    kernels/src/reference.rs follows them bit by bit.

#pragma once

typedef unsigned int u32;
typedef unsigned long long u64;

// The parameters of every entry point. The engine writes the same fields in the same order; all
// offsets are natural (64-bit fields at multiples of 8, then two 32-bit ones), 72 bytes in all.
struct LaunchArgs {
    u64 target;      //  0: units that each block has done, in all, when this launch is complete
    u64 progress;    //  8: address of u64[gridDim.x]: units done by each block
    u64 stop;        // 16: address of a u32 in device memory; not 0: leave at the next look
    u64 state;       // 24: address of the accumulators, see state_index
    u64 in;          // 32: copies: address of the floats that are read
    u64 out;         // 40: copies: address of the floats that are written
    u64 floats;      // 48: floats in a buffer (copy), or in one block's slice (copy_per_block)
    u64 stride;      // 56: copy_per_block: floats from one block's slice to the next one's
    u32 poll_units;  // 64: sliced: units between two looks at the flag; 0 counts as 1
    u32 reserved;    // 68
};
static_assert(sizeof(LaunchArgs) == 72, "the engine's copy of this struct has 72 bytes");

// The most threads a block may have; keeps every kernel launchable with blocks of 1024.
enum { MAX_THREADS = 1024 };

// Blocks of 1024 that must fit on an SM at a time: what 2048 threads an SM allow. It holds the
// compiler to 32 registers a thread.
enum { MIN_BLOCKS = 2 };

// Units that an uncut kernel does between two turns of its outer loop: any figure that fits 32 bits
// and is so large that the turn does not show.
enum : u32 { UNCUT_UNITS = 1u << 30 };

// Where the accumulator of one chain of this thread stands: neighbouring threads side by side, so
// that loading and storing is coalesced.
__device__ __forceinline__ u64 state_index(int chain)
{
    return ((u64)chain * gridDim.x + blockIdx.x) * blockDim.x + threadIdx.x;
}

// A number that differs between the chains and threads of a grid of up to 2^30 threads, scrambled
// by an odd multiplier (2^32 / golden ratio). The reference has the same formula.
__device__ __forceinline__ u32 lane_hash(int chain)
{
    u32 thread = blockIdx.x * blockDim.x + threadIdx.x;
    return (thread * 4u + (u32)chain) * 2654435761u;
}

// One look at the stop flag, by one thread of the block: read by every thread it makes a kernel
// many times slower. Volatile, so that each look goes to the L2 cache, where the copy that sets the
// flag leaves it.
__device__ __forceinline__ u32 look(const LaunchArgs &args)
{
    u32 seen = 0;
    if (threadIdx.x == 0) {
        seen = *(const volatile u32 *)args.stop;
    }
    return seen;
}

// Carries this block from its progress to the target, and leaves early when the flag says so.
//
// `Work` has three members: load(done) fetches what the thread left behind after `done` units,
// run(done, units) does the next `units` ones, and store() leaves it behind again.
//
// The flag is loaded before a chunk of work and consumed after it, so that the load's latency lies
// behind the work. A stop therefore takes between one and two chunks. What was seen goes to the
// block through shared memory, by a store that the compiler leaves behind the work; a barrier that
// reduces a predicate would have it compare, and so wait for the load, before the work. There are
// two slots, so that one barrier a look is enough: a slot is written again only after the barrier
// that follows its reading.
template <bool SLICED, typename Work>
__device__ __forceinline__ void run_to_target(const LaunchArgs &args, Work &work)
{
    __shared__ volatile u32 leave[2];
    u64 *progress = (u64 *)args.progress + blockIdx.x;
    // The look at the very start lets launches that are queued behind a stop leave at once.
    u32 seen = SLICED ? look(args) : 0;
    u64 done = *progress;
    if (done >= args.target) {
        return;
    }
    if (SLICED && __syncthreads_or(seen)) {
        return;
    }
    work.load(done);
    u32 most = SLICED ? (args.poll_units ? args.poll_units : 1) : UNCUT_UNITS;
    for (u32 slot = 0;; slot ^= 1) {
        u64 left = args.target - done;
        u32 units = left < most ? (u32)left : most;
        seen = SLICED ? look(args) : 0;
        work.run(done, units);
        done += units;
        if (done >= args.target) {
            break;
        }
        if (SLICED) {
            if (threadIdx.x == 0) {
                leave[slot] = seen;
            }
            __syncthreads();
            if (leave[slot]) {
                break;
            }
        }
    }
    work.store();
    // Every thread has read the progress before any thread may change it.
    __syncthreads();
    if (threadIdx.x == 0) {
        *progress = done;
    }
}

// Both entry points of a kernel whose work is the type given.
#define ENTRY_POINTS(name, ...)                                                                    \
    extern "C" __global__ void __launch_bounds__(MAX_THREADS, MIN_BLOCKS)                          \
        name##_sliced(const LaunchArgs args)                                                       \
    {                                                                                              \
        __VA_ARGS__ work(args);                                                                    \
        run_to_target<true>(args, work);                                                           \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(MAX_THREADS, MIN_BLOCKS)                          \
        name##_uncut(const LaunchArgs args)                                                        \
    {                                                                                              \
        __VA_ARGS__ work(args);                                                                    \
        run_to_target<false>(args, work);                                                          \
    }
