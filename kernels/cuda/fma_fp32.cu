// fma_fp32: issue slots and the FMA pipe. 1 to 4 chains of dependent fused multiply-adds.
//
// Each chain follows the quadratic map x <- c - x * x, in one rounding. For c below 2 it stays
// within [c - c * c, c] and, near 1.9, it is chaotic: an iteration lost or repeated changes the
// result for good.

#include "chains.cuh"

struct Fma {
    typedef float Value;
    typedef float Operand;

    // c: 1.875 and 19 bits of the lane's hash below it, so between 1.875 and 1.9375.
    static __device__ __forceinline__ float operand(u32 hash)
    {
        return __uint_as_float(0x3ff00000u | (hash >> 13));
    }

    // A multiple of 2^-24 in [0, 1).
    static __device__ __forceinline__ float initial(u32 hash)
    {
        return __fmul_rn((float)((hash * 0x85ebca6bu) >> 8), 0x1p-24f);
    }

    static __device__ __forceinline__ float step(float x, float c) { return __fmaf_rn(-x, x, c); }

    template <int ILP>
    static __device__ __forceinline__ void run(Chains<Fma, ILP> &chains, u64, u32 units)
    {
        chains.steps(units);
    }
};

ENTRY_POINTS(fma_fp32_ilp1, Chains<Fma, 1>)
ENTRY_POINTS(fma_fp32_ilp2, Chains<Fma, 2>)
ENTRY_POINTS(fma_fp32_ilp3, Chains<Fma, 3>)
ENTRY_POINTS(fma_fp32_ilp4, Chains<Fma, 4>)
