// Loads and stores of the copy kernels.

#pragma once

#include "launch.cuh"

// Loads in flight at a time, a thread. 8 of 4 bytes with 1024 threads an SM are 32 KiB, more than
// the product of an SM's share of the read bandwidth and the latency of memory.
enum : u32 { IN_FLIGHT = 8 };

// Loads and stores are volatile assembly so that the compiler neither drops a copy of what was
// copied before nor moves a store up between the loads of a batch.

// Cached in L2 alone: the bytes that a kernel touches then decide between L2 and DRAM, and L1 does
// not serve what is read again.
struct FromL2 {
    static __device__ __forceinline__ float load(const float *from)
    {
        float value;
        asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(value) : "l"(from));
        return value;
    }
};

// Cached in L1 and L2.
struct FromL1 {
    static __device__ __forceinline__ float load(const float *from)
    {
        float value;
        asm volatile("ld.global.ca.f32 %0, [%1];" : "=f"(value) : "l"(from));
        return value;
    }
};

__device__ __forceinline__ void store_float(float *to, float value)
{
    asm volatile("st.global.f32 [%0], %1;" ::"l"(to), "f"(value));
}

// Copies `count` floats that lie `step` floats apart.
template <typename Source>
__device__ __forceinline__ void copy_strided(const float *from, float *to, u64 step, u32 count)
{
#pragma unroll 1
    for (u32 turns = count / IN_FLIGHT; turns != 0; turns--) {
        float value[IN_FLIGHT];
#pragma unroll
        for (u32 i = 0; i < IN_FLIGHT; i++) {
            value[i] = Source::load(from);
            from += step;
        }
#pragma unroll
        for (u32 i = 0; i < IN_FLIGHT; i++) {
            store_float(to, value[i]);
            to += step;
        }
    }
#pragma unroll 1
    for (u32 rest = count % IN_FLIGHT; rest != 0; rest--) {
        store_float(to, Source::load(from));
        from += step;
        to += step;
    }
}
