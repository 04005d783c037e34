// fill: writes the pattern of a copy's input buffer. Not a workload, and in no catalogue; it runs
// once, before the first launch. It takes `in` and `floats` (of the whole buffer) and no more.

#include "launch.cuh"

extern "C" __global__ void __launch_bounds__(MAX_THREADS) fill(const LaunchArgs args)
{
    float *in = (float *)args.in;
    u64 step = (u64)gridDim.x * blockDim.x;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < args.floats; i += step) {
        u32 hash = ((u32)i * 2654435761u) ^ ((u32)(i >> 32) * 0x85ebca6bu);
        in[i] = __uint_as_float(0x3f800000u | (hash >> 9));
    }
}
