// sleep: the block scheduler, and residency alone. It holds its threads' places on the SM and uses
// next to no issue slots.

#include "launch.cuh"

// One unit is one nanosleep of 1000, which lasts about 1 us.
struct Sleep {
    __device__ __forceinline__ Sleep(const LaunchArgs &) {}
    __device__ __forceinline__ void load(u64) {}
    __device__ __forceinline__ void store() const {}

    __device__ __forceinline__ void run(u64, u32 units)
    {
#pragma unroll 1
        for (; units != 0; units--) {
            asm volatile("nanosleep.u32 1000;");
        }
    }
};

ENTRY_POINTS(sleep, Sleep)
