// copy_per_block: L1. Each block copies a slice of its own, again and again. The slices lie
// `stride` floats apart, which the engine makes the size of the unified L1 cache, so that every
// block's slice has the same place in it.
//
// One unit is one copy of the block's whole slice.

#include "copies.cuh"

struct CopyPerBlock {
    const float *in;
    float *out;
    u32 count;  // floats of the slice that this thread copies

    __device__ __forceinline__ CopyPerBlock(const LaunchArgs &args)
        : in((const float *)args.in + blockIdx.x * args.stride + threadIdx.x),
          out((float *)args.out + blockIdx.x * args.stride + threadIdx.x),
          count(((u32)args.floats + blockDim.x - 1 - threadIdx.x) / blockDim.x)
    {
    }
    __device__ __forceinline__ void load(u64) {}
    __device__ __forceinline__ void store() const {}

    __device__ __forceinline__ void run(u64, u32 units)
    {
#pragma unroll 1
        for (; units != 0; units--) {
            copy_strided<FromL1>(in, out, blockDim.x, count);
        }
    }
};

ENTRY_POINTS(copy_per_block, CopyPerBlock)
