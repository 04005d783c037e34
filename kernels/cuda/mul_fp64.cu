// mul_fp64: the FP64 pipe. 1 to 4 chains of dependent multiplications.
//
// As in mul_fp32, the multiplier is the largest double below 1, and each product is exactly the
// next smaller double. A binade lasts 2^52 units, and there are a thousand of them below the start,
// so that nothing has to be given back.

#include "chains.cuh"

struct Mul64 {
    typedef double Value;
    struct Operand {};

    static __device__ __forceinline__ Operand operand(u32) { return Operand(); }

    // In [2, 4).
    static __device__ __forceinline__ double initial(u32 hash)
    {
        return __longlong_as_double(0x4000000000000000ll | ((long long)hash << 20));
    }

    static __device__ __forceinline__ double step(double x, Operand)
    {
        return __dmul_rn(x, 0x1.fffffffffffffp-1);
    }

    template <int ILP>
    static __device__ __forceinline__ void run(Chains<Mul64, ILP> &chains, u64, u32 units)
    {
        chains.steps(units);
    }
};

ENTRY_POINTS(mul_fp64_ilp1, Chains<Mul64, 1>)
ENTRY_POINTS(mul_fp64_ilp2, Chains<Mul64, 2>)
ENTRY_POINTS(mul_fp64_ilp3, Chains<Mul64, 3>)
ENTRY_POINTS(mul_fp64_ilp4, Chains<Mul64, 4>)
