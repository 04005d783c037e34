//! The kernels' results, computed on the CPU.
//!
//! A kernel that can be stopped and go on must neither lose nor repeat an iteration. So what each
//! thread computes is a function of where it stands in the grid and of the number of units done, and
//! this module computes the same to the last bit. The formulas stand twice, here and in the `.cu`
//! file of the kernel's name; a change to one is a change to both.
//!
//! Every function is fast for any number of units: the FMA's map runs into a cycle after some
//! thousand iterations, and the products have a closed form.

/// The largest `f32` below 1, the multiplier of `mul_fp32`.
const BELOW_ONE_F32: f32 = 1.0 - f32::EPSILON / 2.0;
/// The largest `f64` below 1, the multiplier of `mul_fp64`.
const BELOW_ONE_F64: f64 = 1.0 - f64::EPSILON / 2.0;
/// Units after which `mul_fp32` multiplies by 2: the floats in one binade.
const EPOCH: u64 = 1 << 23;

/// One chain of one thread of a grid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lane {
    /// The chain's number, below the kernel's `ilp`.
    pub chain: u32,
    /// The block's number in the grid.
    pub block: u32,
    /// The thread's number in its block.
    pub thread: u32,
}

/// The shape of a launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grid {
    /// Blocks in the grid.
    pub blocks: u32,
    /// Threads in each block.
    pub threads: u32,
}

impl Grid {
    /// The index of a lane's accumulator in the state buffer, in elements.
    pub fn state_index(self, lane: Lane) -> u64 {
        (u64::from(lane.chain) * u64::from(self.blocks) + u64::from(lane.block))
            * u64::from(self.threads)
            + u64::from(lane.thread)
    }

    /// The lane whose accumulator has this index in the state buffer; the inverse of
    /// [`Grid::state_index`] for the indices of up to 4 chains.
    pub fn lane_at(self, index: u64) -> Lane {
        let (rows, thread) = split(index, self.threads);
        let (chain, block) = split(rows, self.blocks);
        Lane {
            chain: chain as u32,
            block,
            thread,
        }
    }

    /// Units that one sweep of `copy` over buffers of `floats` floats takes. A unit is one float a
    /// thread of the grid, and the last one of a sweep may be part of one.
    pub fn copy_units_per_sweep(self, floats: u64) -> u64 {
        floats.div_ceil(self.lanes())
    }

    /// The unit of a sweep in which `copy` copies the float at `index`, and the block that does.
    pub fn copy_unit_and_block(self, index: u64) -> (u64, u32) {
        let unit = index / self.lanes();
        let within = index % self.lanes();
        (unit, (within / u64::from(self.threads)) as u32)
    }

    /// The index of the first float that `copy` copies with a block in a unit of the first sweep.
    pub fn copy_start(self, unit: u64, block: u32) -> u64 {
        unit.saturating_mul(self.lanes())
            .saturating_add(u64::from(block) * u64::from(self.threads))
    }

    /// Threads in the whole grid.
    fn lanes(self) -> u64 {
        (u64::from(self.blocks) * u64::from(self.threads)).max(1)
    }

    /// The kernels' `lane_hash`.
    fn hash(self, lane: Lane) -> u32 {
        lane.block
            .wrapping_mul(self.threads)
            .wrapping_add(lane.thread)
            .wrapping_mul(4)
            .wrapping_add(lane.chain)
            .wrapping_mul(2_654_435_761)
    }
}

/// Quotient and remainder; a divisor of 0 counts as 1.
fn split(value: u64, divisor: u32) -> (u64, u32) {
    let divisor = u64::from(divisor.max(1));
    (value / divisor, (value % divisor) as u32)
}

/// What a compute kernel keeps in an accumulator, and how it goes on.
pub trait Accumulator: Copy {
    /// The accumulator's bytes in device memory, which are little-endian.
    type Bytes: AsRef<[u8]> + Copy;

    /// The value before the first unit. The kernel makes it itself.
    fn initial(grid: Grid, lane: Lane) -> Self;

    /// The value after `units` units.
    fn after(grid: Grid, lane: Lane, units: u64) -> Self;

    /// The bytes as they stand in device memory.
    fn bytes(self) -> Self::Bytes;
}

/// An accumulator of `fma_fp32`: `x <- c - x * x`, in one rounding.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FmaFp32(pub f32);

/// An accumulator of `mul_fp32`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MulFp32(pub f32);

/// An accumulator of `mul_fp64`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MulFp64(pub f64);

impl Accumulator for FmaFp32 {
    type Bytes = [u8; 4];

    /// In [0, 1), a multiple of 2^-24.
    fn initial(grid: Grid, lane: Lane) -> Self {
        let scrambled = grid.hash(lane).wrapping_mul(0x85eb_ca6b) >> 8;
        FmaFp32(scrambled as f32 / (1 << 24) as f32)
    }

    fn after(grid: Grid, lane: Lane, units: u64) -> Self {
        let c = f32::from_bits(0x3ff0_0000 | (grid.hash(lane) >> 13));
        let FmaFp32(start) = Self::initial(grid, lane);
        FmaFp32(iterate(start, units, |x| (-x).mul_add(x, c)))
    }

    fn bytes(self) -> Self::Bytes {
        self.0.to_le_bytes()
    }
}

impl Accumulator for MulFp32 {
    type Bytes = [u8; 4];

    /// In [2, 4), so that a whole epoch of units stays above 1.
    fn initial(grid: Grid, lane: Lane) -> Self {
        MulFp32(f32::from_bits(0x4000_0000 | (grid.hash(lane) >> 9)))
    }

    /// Each product is the next smaller float, and each epoch gives a binade back.
    fn after(grid: Grid, lane: Lane, units: u64) -> Self {
        let MulFp32(start) = Self::initial(grid, lane);
        MulFp32(f32::from_bits(start.to_bits() - (units % EPOCH) as u32))
    }

    fn bytes(self) -> Self::Bytes {
        self.0.to_le_bytes()
    }
}

impl Accumulator for MulFp64 {
    type Bytes = [u8; 8];

    /// In [2, 4).
    fn initial(grid: Grid, lane: Lane) -> Self {
        let hash = u64::from(grid.hash(lane));
        MulFp64(f64::from_bits(0x4000_0000_0000_0000 | (hash << 20)))
    }

    /// Each product is the next smaller double. It holds for 2^61 units, which take decades.
    fn after(grid: Grid, lane: Lane, units: u64) -> Self {
        let MulFp64(start) = Self::initial(grid, lane);
        MulFp64(f64::from_bits(start.to_bits().wrapping_sub(units)))
    }

    fn bytes(self) -> Self::Bytes {
        self.0.to_le_bytes()
    }
}

/// One step of `mul_fp32` as the GPU does it, without the epochs.
pub fn mul_fp32_step(x: f32) -> f32 {
    x * BELOW_ONE_F32
}

/// One step of `mul_fp64` as the GPU does it.
pub fn mul_fp64_step(x: f64) -> f64 {
    x * BELOW_ONE_F64
}

/// The float that stands at `index` of a copy's input buffer: a pattern whose neighbours, and whose
/// equal places in two slices, differ. It is never 0, which is what the output starts with.
pub fn copy_input(index: u64) -> f32 {
    let low = (index as u32).wrapping_mul(2_654_435_761);
    let high = ((index >> 32) as u32).wrapping_mul(0x85eb_ca6b);
    f32::from_bits(0x3f80_0000 | ((low ^ high) >> 9))
}

/// Applies a map `units` times, by way of its cycle once it has run into one.
///
/// A map on finitely many floats must run into a cycle. The value seen at the last power of two of
/// steps is compared with each later one (Brent's way of finding cycles); when it comes back, whole
/// turns of the cycle are left out.
fn iterate(start: f32, units: u64, map: impl Fn(f32) -> f32) -> f32 {
    let (mut seen, mut seen_at, mut until) = (start.to_bits(), 0, 1);
    let mut x = start;
    for done in 0..units {
        if done > seen_at && x.to_bits() == seen {
            let cycle = done - seen_at;
            let rest = (units - done) % cycle;
            return (0..rest).fold(x, |x, _| map(x));
        }
        if done == until {
            (seen, seen_at, until) = (x.to_bits(), done, until * 2);
        }
        x = map(x);
    }
    x
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRID: Grid = Grid {
        blocks: 132,
        threads: 1024,
    };

    fn lanes() -> impl Iterator<Item = Lane> {
        (0..64).map(|i| Lane {
            chain: i % 4,
            block: i * 37 % GRID.blocks,
            thread: i * 211 % GRID.threads,
        })
    }

    fn fma_by_steps(lane: Lane, units: u64) -> f32 {
        let c = f32::from_bits(0x3ff0_0000 | (GRID.hash(lane) >> 13));
        let FmaFp32(start) = FmaFp32::initial(GRID, lane);
        (0..units).fold(start, |x, _| (-x).mul_add(x, c))
    }

    #[test]
    fn fma_short_cut_agrees_with_iterating() {
        for lane in lanes().take(8) {
            for units in [0, 1, 2, 3, 1000, 4096, 50_000, 200_001] {
                let expected = fma_by_steps(lane, units);
                assert_eq!(FmaFp32::after(GRID, lane, units).0, expected, "{units}");
            }
        }
    }

    #[test]
    fn fma_stays_bounded_and_is_quick_for_huge_counts() {
        for lane in lanes() {
            let FmaFp32(x) = FmaFp32::after(GRID, lane, u64::MAX / 3);
            assert!((-2.0..2.0).contains(&x), "{x}");
        }
    }

    #[test]
    fn a_lost_or_repeated_iteration_shows_in_sampled_fma_lanes() {
        let units: u64 = 1_000_000_000;
        for error in [
            -100_000i64,
            -1000,
            -32,
            -2,
            -1,
            1,
            2,
            32,
            1000,
            1024,
            100_000,
        ] {
            let wrong = units.saturating_add_signed(error);
            let showing = lanes()
                .filter(|&lane| {
                    FmaFp32::after(GRID, lane, units) != FmaFp32::after(GRID, lane, wrong)
                })
                .count();
            assert!(showing > 32, "{error} shows in {showing} of 64 lanes");
        }
    }

    #[test]
    fn fma_lanes_differ() {
        let mut values: Vec<u32> = lanes()
            .map(|lane| FmaFp32::after(GRID, lane, 100).0.to_bits())
            .collect();
        values.sort_unstable();
        values.dedup();
        assert_eq!(values.len(), 64);
    }

    #[test]
    fn each_product_is_the_next_smaller_float() {
        for start in [1.0f32, 2.0, 1.5, 3.999_999_8, 2.000_000_2] {
            assert_eq!(mul_fp32_step(start), start.next_down());
            assert_eq!(mul_fp64_step(start.into()), f64::from(start).next_down());
        }
    }

    #[test]
    fn mul_fp32_closed_form_agrees_with_multiplying_over_two_epochs() {
        let lane = Lane {
            chain: 2,
            block: 17,
            thread: 99,
        };
        let MulFp32(mut x) = MulFp32::initial(GRID, lane);
        for done in 1..=2 * EPOCH + 5 {
            x = mul_fp32_step(x);
            if done % EPOCH == 0 {
                x *= 2.0;
            }
            if done % 65_536 < 2 || done % EPOCH < 3 {
                assert_eq!(MulFp32::after(GRID, lane, done).0, x, "{done}");
            }
        }
    }

    #[test]
    fn mul_fp64_closed_form_agrees_with_multiplying() {
        for lane in lanes().take(4) {
            let MulFp64(start) = MulFp64::initial(GRID, lane);
            let x = (0..100_000).fold(start, |x, _| mul_fp64_step(x));
            assert_eq!(MulFp64::after(GRID, lane, 100_000).0, x);
        }
    }

    #[test]
    fn state_indices_are_dense_and_invertible() {
        let grid = Grid {
            blocks: 3,
            threads: 5,
        };
        for index in 0..60 {
            assert_eq!(grid.state_index(grid.lane_at(index)), index);
        }
        let last = Lane {
            chain: 3,
            block: 2,
            thread: 4,
        };
        assert_eq!(grid.lane_at(59), last);
    }

    #[test]
    fn a_sweep_ends_with_a_part_of_a_unit() {
        let grid = Grid {
            blocks: 2,
            threads: 32,
        };
        assert_eq!(grid.copy_units_per_sweep(64), 1);
        assert_eq!(grid.copy_units_per_sweep(65), 2);
        assert_eq!(grid.copy_units_per_sweep(128), 2);
        assert_eq!(grid.copy_unit_and_block(0), (0, 0));
        assert_eq!(grid.copy_unit_and_block(33), (0, 1));
        assert_eq!(grid.copy_unit_and_block(64 + 31), (1, 0));
        for (unit, block) in [(0, 0), (0, 1), (5, 1)] {
            let start = grid.copy_start(unit, block);
            assert_eq!(grid.copy_unit_and_block(start), (unit, block));
        }
    }

    #[test]
    fn copy_input_is_never_zero_and_varies() {
        for index in (0..100_000).chain([1 << 33, (1 << 33) + 1]) {
            assert!((1.0..2.0).contains(&copy_input(index)));
            assert_ne!(copy_input(index), copy_input(index + 1));
        }
    }
}
