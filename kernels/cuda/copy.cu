// copy: L2 or DRAM bandwidth, by the size of the buffers. A coalesced copy in steps of the grid.
//
// One unit is one step: every thread of the grid copies one float, where there is one left. A sweep
// over the buffers is ceil(floats / (gridDim.x * blockDim.x)) units, and the unit's number modulo
// that tells where to go on. Sweeps follow one another without end.

#include "copies.cuh"

struct Copy {
    const float *in;
    float *out;
    u64 floats;
    u64 step;   // floats in a unit: one a thread of the grid
    u64 whole;  // units of a sweep in which every thread has a float
    u64 sweep;  // units of a sweep
    u64 unit;   // the next unit's number within its sweep

    __device__ __forceinline__ Copy(const LaunchArgs &args)
        : in((const float *)args.in), out((float *)args.out), floats(args.floats)
    {
    }

    __device__ __forceinline__ void load(u64 done)
    {
        step = (u64)gridDim.x * blockDim.x;
        whole = floats / step;
        sweep = whole * step == floats ? whole : whole + 1;
        unit = done % sweep;
    }

    __device__ __forceinline__ void store() const {}

    __device__ __forceinline__ void run(u64, u32 units)
    {
        while (units != 0) {
            u64 at = unit * step + (u64)blockIdx.x * blockDim.x + threadIdx.x;
            u32 now = 1;
            if (unit < whole) {
                u64 rest = whole - unit;
                now = units < rest ? units : (u32)rest;
                copy_strided<FromL2>(in + at, out + at, step, now);
            } else if (at < floats) {
                store_float(out + at, FromL2::load(in + at));
            }
            units -= now;
            unit += now;
            if (unit == sweep) {
                unit = 0;
            }
        }
    }
};

ENTRY_POINTS(copy, Copy)
