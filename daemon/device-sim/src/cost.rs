//! What one unit of each kernel costs.
//!
//! A block's unit takes some SM time, and one block alone may be too small to
//! keep an SM busy: its chain of dependent instructions has a latency. So a row
//! gives both the work and the time that it takes at least. Copies take bytes
//! from a pool of the whole device besides.

use gcgroup_kernels::catalogue::SLICE_STRIDE;
use gcgroup_kernels::engine::Plan;
use gcgroup_kernels::reference::Grid;

use crate::shape::PAGE_BYTES;

/// SM clock, cycles in a microsecond: the data sheet's 67 TFLOPS of FP32 are 132
/// SMs with 128 lanes, two operations each, at 1.98 GHz.
pub(crate) const CLOCK: f64 = 1980.0;
/// Threads that an SM holds, from the Hopper tuning guide.
pub(crate) const THREADS_PER_SM: f64 = 2048.0;
/// Threads that a block counts as at least, for an SM holds at most 32 blocks.
const LEAST_THREADS: u32 = 2048 / 32;
/// Device memory, read and written together, bytes in a microsecond: measured
/// with copies on an H200.
pub(crate) const DRAM: f64 = 4.2e6;
/// L2 cache, read and written together, bytes in a microsecond. Assumed: twice
/// the device memory.
pub(crate) const L2: f64 = 8.4e6;
/// Both buffers of a copy that stays in the L2 cache, bytes: what the data sheet
/// gives the H200.
const L2_CAPACITY: u64 = 50_000_000;
/// Loads that each thread of a copy has in flight.
const IN_FLIGHT: f64 = 8.0;
/// Bytes that an SM copies within its L1 in a cycle. Assumed: stores go through
/// to L2, which takes 64 bytes a cycle from an SM.
const L1_PER_CYCLE: f64 = 64.0;
/// Latency of a hit in L1 in cycles. Assumed from published micro-benchmarks.
const L1_LATENCY: f64 = 33.0;

/// Where a copy's bytes come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pool {
    Dram,
    L2,
}

/// What one unit of one block costs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Cost {
    /// Microseconds of a whole SM.
    pub(crate) sm_us: f64,
    /// The largest share of an SM that one block can use, above 0, at most 1.
    pub(crate) share: f64,
    /// Places of threads that a block takes on its SM.
    pub(crate) threads: f64,
    /// Bytes of the pool.
    pub(crate) bytes: f64,
    /// Which pool they are of.
    pub(crate) pool: Pool,
}

/// What bounds a kernel.
enum Bound {
    /// Chains of dependent operations: lanes an SM has for them, and the cycles
    /// from one operation to the next of its chain.
    Arithmetic { lanes: f64, latency: f64 },
    /// Bandwidth of L2 or device memory.
    Memory,
    /// Each SM's own L1.
    L1,
    /// The time that a thread asked to sleep, in microseconds.
    Sleep(f64),
}

/// The kernels' bounds. 128 FP32 and 64 FP64 lanes an SM are Hopper's. A lone
/// warp on each scheduler was seen to issue every 3.7 cycles in FP32 and every 8
/// in FP64 ("Measuring GPU utilization one level
/// deeper", 2025, tables 3 and 4, H100).
static BOUNDS: &[(&str, Bound)] = &[
    (
        "fma_fp32",
        Bound::Arithmetic {
            lanes: 128.0,
            latency: 4.0,
        },
    ),
    (
        "mul_fp32",
        Bound::Arithmetic {
            lanes: 128.0,
            latency: 4.0,
        },
    ),
    (
        "mul_fp64",
        Bound::Arithmetic {
            lanes: 64.0,
            latency: 8.0,
        },
    ),
    ("copy", Bound::Memory),
    ("copy_per_block", Bound::L1),
    ("sleep", Bound::Sleep(1.0)),
];

impl Cost {
    /// The cost of a plan's units, `None` for a kernel that is not in the table.
    pub(crate) fn of(plan: &Plan) -> Option<Self> {
        let (_, bound) = BOUNDS.iter().find(|(name, _)| *name == plan.kernel)?;
        let threads = plan.threads.next_multiple_of(32).max(LEAST_THREADS);
        let cost = Self {
            sm_us: 0.0,
            share: 1.0,
            threads: f64::from(threads),
            bytes: 0.0,
            pool: Pool::Dram,
        };
        Some(match *bound {
            Bound::Arithmetic { lanes, latency } => {
                let warps = f64::from(plan.threads.next_multiple_of(32));
                let cycles = f64::from(plan.ilp) * warps / lanes;
                Self {
                    sm_us: cycles / CLOCK,
                    share: cycles / cycles.max(latency),
                    ..cost
                }
            }
            Bound::Memory => cost.of_memory(plan),
            Bound::L1 => {
                let copied = plan.bytes as f64 / 2.0;
                let flow = f64::from(plan.threads) * IN_FLIGHT * 4.0 / L1_LATENCY;
                Self {
                    sm_us: copied / L1_PER_CYCLE / CLOCK,
                    share: (flow / L1_PER_CYCLE).min(1.0),
                    ..cost
                }
            }
            Bound::Sleep(us) => Self {
                sm_us: us * SLEEPER,
                share: SLEEPER,
                ..cost
            },
        })
    }

    /// A copy through L2. By Little's law a thread that keeps 8 loads in flight
    /// does 8 units in one latency, for which a microsecond is assumed under load
    /// from device memory and a third of it from L2. Issue slots: such a copy was
    /// seen at 0.61 of the 4 instructions a cycle in the same paper.
    fn of_memory(self, plan: &Plan) -> Self {
        let (pool, latency_us) = if plan.bytes <= L2_CAPACITY {
            (Pool::L2, 0.3)
        } else {
            (Pool::Dram, 1.0)
        };
        let share = 0.61 / 4.0 * f64::from(plan.threads) / 1024.0;
        let sweep = units_per_iteration(plan) as f64 * f64::from(plan.blocks);
        Self {
            sm_us: share * latency_us / IN_FLIGHT,
            share,
            bytes: plan.bytes as f64 / sweep,
            pool,
            ..self
        }
    }
}

/// Share of an SM that a block of sleeping threads uses. Assumed: next to none.
const SLEEPER: f64 = 0.001;

/// Units in one iteration: those of a sweep for a copy, otherwise 1.
pub(crate) fn units_per_iteration(plan: &Plan) -> u64 {
    match BOUNDS.iter().find(|(name, _)| *name == plan.kernel) {
        Some((_, Bound::Memory)) => {
            let grid = Grid {
                blocks: plan.blocks,
                threads: plan.threads,
            };
            grid.copy_units_per_sweep(plan.bytes / 8).max(1)
        }
        _ => 1,
    }
}

/// Device memory of a plan's buffers in bytes: each buffer of a copy in whole
/// pages, cursors, flag and accumulators together in whole pages.
pub(crate) fn buffer_bytes(plan: &Plan) -> u64 {
    let blocks = u64::from(plan.blocks);
    let lanes = blocks * u64::from(plan.threads) * u64::from(plan.ilp);
    let bound = BOUNDS.iter().find(|(name, _)| *name == plan.kernel);
    let (state, buffer) = match bound {
        Some((_, Bound::Arithmetic { lanes: wide, .. })) if *wide < 128.0 => (lanes * 8, 0),
        Some((_, Bound::Arithmetic { .. })) => (lanes * 4, 0),
        Some((_, Bound::Memory)) => (0, plan.bytes / 2),
        Some((_, Bound::L1)) => (0, blocks * SLICE_STRIDE.max(plan.bytes / 2)),
        Some((_, Bound::Sleep(_))) | None => (0, 0),
    };
    pages(blocks * 8 + 4 + state).saturating_add(pages(buffer).saturating_mul(2))
}

/// That many bytes in whole pages; all that there are where it overflows.
pub(crate) fn pages(bytes: u64) -> u64 {
    bytes
        .checked_next_multiple_of(PAGE_BYTES)
        .unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use gcgroup_kernels::catalogue::{KERNELS, plan};
    use gcgroup_model::spec::WorkloadSpec;

    fn plan_of(kernel: &str) -> Plan {
        plan(&mut WorkloadSpec::of_kernel(kernel), 132).expect("defaults are allowed")
    }

    #[test]
    fn every_kernel_of_the_catalogue_has_a_cost_and_a_size() {
        for kernel in KERNELS {
            let plan = plan_of(kernel.name);
            let cost = Cost::of(&plan).expect("each row has a bound");
            assert!(cost.sm_us > 0.0, "{}", kernel.name);
            assert!(cost.share > 0.0 && cost.share <= 1.0, "{}", kernel.name);
            assert_eq!(buffer_bytes(&plan) % PAGE_BYTES, 0);
        }
    }

    #[test]
    fn one_chain_of_few_warps_leaves_most_of_an_sm_idle() {
        let mut plan = plan_of("fma_fp32");
        assert_eq!(Cost::of(&plan).expect("stands in the table").share, 1.0);
        (plan.threads, plan.ilp) = (128, 1);
        assert_eq!(Cost::of(&plan).expect("stands in the table").share, 0.25);
    }

    #[test]
    fn a_copy_asks_for_exactly_its_bytes_a_sweep() {
        let plan = plan_of("copy");
        let cost = Cost::of(&plan).expect("stands in the table");
        let sweep = units_per_iteration(&plan) as f64 * f64::from(plan.blocks);
        assert!((cost.bytes * sweep - plan.bytes as f64).abs() < 1.0);
        assert_eq!(buffer_bytes(&plan), plan.bytes + PAGE_BYTES);
    }
}
