// The frame of the compute kernels: ILP independent chains of one operation, kept in registers.

#pragma once

#include "launch.cuh"

// Units in one turn of the inner loop. Large, so that the loop's own instructions (a counter, a
// comparison, a branch) are few beside the operations. A poll interval that is a multiple of it
// never enters the loop for the remainder.
enum : u32 { UNROLL = 32 };

// `Op` has the accumulator's type Value and an Operand a chain. operand(hash) and initial(hash)
// make them from a lane's hash, and step(x, operand) is the operation. One unit is one step on each
// chain. A thread whose block has done nothing starts from initial(hash), so the state buffer needs
// no contents beforehand.
template <typename Op, int ILP>
struct Chains {
    const LaunchArgs &args;
    typename Op::Value x[ILP];
    typename Op::Operand operand[ILP];

    __device__ __forceinline__ Chains(const LaunchArgs &launch) : args(launch) {}

    __device__ __forceinline__ void load(u64 done)
    {
        const typename Op::Value *state = (const typename Op::Value *)args.state;
#pragma unroll
        for (int chain = 0; chain < ILP; chain++) {
            u32 hash = lane_hash(chain);
            x[chain] = done == 0 ? Op::initial(hash) : state[state_index(chain)];
            operand[chain] = Op::operand(hash);
        }
    }

    __device__ __forceinline__ void store() const
    {
        typename Op::Value *state = (typename Op::Value *)args.state;
#pragma unroll
        for (int chain = 0; chain < ILP; chain++) {
            state[state_index(chain)] = x[chain];
        }
    }

    __device__ __forceinline__ void step()
    {
#pragma unroll
        for (int chain = 0; chain < ILP; chain++) {
            x[chain] = Op::step(x[chain], operand[chain]);
        }
    }

    __device__ __forceinline__ void steps(u32 units)
    {
#pragma unroll 1
        for (u32 turns = units / UNROLL; turns != 0; turns--) {
#pragma unroll
            for (u32 unit = 0; unit < UNROLL; unit++) {
                step();
            }
        }
#pragma unroll 1
        for (u32 rest = units % UNROLL; rest != 0; rest--) {
            step();
        }
    }

    __device__ __forceinline__ void run(u64 done, u32 units) { Op::run(*this, done, units); }
};
