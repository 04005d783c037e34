// mul_fp32: issue slots and the FP32 pipe. 1 to 4 chains of dependent multiplications.
//
// The multiplier is the largest float below 1. A product with it is, rounded to nearest, exactly
// the next smaller float: for a significand M in (2^23, 2^24) the exact product is M - M / 2^24,
// which is nearest to M - 1, and for M = 2^23 it is representable one binade lower. So an
// accumulator's bits count the multiplications. After 2^23 of them it has lost one binade, and a
// multiplication by 2 gives that back. It counts by the unit's number, not by the accumulator's
// value, so that a unit lost or repeated stays visible for good.

#include "chains.cuh"

enum : u32 { EPOCH = 1u << 23 };

struct Mul32 {
    typedef float Value;
    struct Operand {};

    static __device__ __forceinline__ Operand operand(u32) { return Operand(); }

    // In [2, 4), so that a whole epoch stays above 1.
    static __device__ __forceinline__ float initial(u32 hash)
    {
        return __uint_as_float(0x40000000u | (hash >> 9));
    }

    static __device__ __forceinline__ float step(float x, Operand)
    {
        return __fmul_rn(x, 0x1.fffffep-1f);
    }

    template <int ILP>
    static __device__ __forceinline__ void run(Chains<Mul32, ILP> &chains, u64 done, u32 units)
    {
        u32 at = (u32)done % EPOCH;
        while (units != 0) {
            u32 now = units < EPOCH - at ? units : EPOCH - at;
            chains.steps(now);
            units -= now;
            at += now;
            if (at == EPOCH) {
                at = 0;
#pragma unroll
                for (int chain = 0; chain < ILP; chain++) {
                    chains.x[chain] = __fmul_rn(chains.x[chain], 2.0f);
                }
            }
        }
    }
};

ENTRY_POINTS(mul_fp32_ilp1, Chains<Mul32, 1>)
ENTRY_POINTS(mul_fp32_ilp2, Chains<Mul32, 2>)
ENTRY_POINTS(mul_fp32_ilp3, Chains<Mul32, 3>)
ENTRY_POINTS(mul_fp32_ilp4, Chains<Mul32, 4>)
