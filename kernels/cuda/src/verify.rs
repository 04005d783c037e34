//! Comparing what is on the device with the CPU reference.
//!
//! A few values stand for all: those of the first and the last block, thread and float, and some
//! spread evenly between them.

use gcgroup_kernels::catalogue::Check;
use gcgroup_kernels::engine::{EngineError, Verified};
use gcgroup_kernels::reference::{Accumulator, FmaFp32, Grid, Lane, MulFp32, MulFp64, copy_input};

use crate::workload::Workload;

/// Blocks that are looked at.
const BLOCKS: u64 = 16;
/// Threads that are looked at in each of them.
const THREADS: u64 = 16;
/// Stretches of a copy's output that are looked at.
const WINDOWS: u64 = 64;
/// Floats of such a stretch.
const WINDOW: u64 = 1024;
/// Units before a block's cursor that are looked at in full, and units after it.
const UNITS_BEHIND: u64 = 6;
const UNITS_AHEAD: u64 = 2;

/// Compares the workload's results with the reference, each block at its own cursor.
///
/// `highest` is the highest target that was submitted: no cursor may have passed it.
pub(crate) fn verify(workload: &Workload, highest: u64) -> Result<Verified, EngineError> {
    let cursors = workload.read_cursors()?;
    let mut tally = Verified {
        compared: cursors.len() as u64,
        wrong: cursors.iter().filter(|&&units| units > highest).count() as u64,
    };
    match (workload.kernel.check, workload.kernel.name) {
        (Check::Cursor, _) => {}
        (Check::Destination, "copy_per_block") => slices(workload, &cursors, &mut tally)?,
        (Check::Destination, _) => whole_buffer(workload, &cursors, &mut tally)?,
        (Check::Accumulators, "fma_fp32") => chains::<FmaFp32>(workload, &cursors, &mut tally)?,
        (Check::Accumulators, "mul_fp32") => chains::<MulFp32>(workload, &cursors, &mut tally)?,
        (Check::Accumulators, "mul_fp64") => chains::<MulFp64>(workload, &cursors, &mut tally)?,
        (Check::Accumulators, name) => {
            return Err(EngineError::Unsupported(format!(
                "there is no reference of kernel {name:?}"
            )));
        }
    }
    Ok(tally)
}

/// Adds comparisons to a tally.
fn count(tally: &mut Verified, right: impl Iterator<Item = bool>) {
    for right in right {
        tally.compared += 1;
        tally.wrong += u64::from(!right);
    }
}

/// At most `most` of the numbers below `count`, evenly spread, with the first and the last.
fn spread(count: u64, most: u64) -> Vec<u64> {
    if count <= most {
        return (0..count).collect();
    }
    let gaps = u128::from(most - 1);
    (0..most)
        .map(|i| (u128::from(i) * u128::from(count - 1) / gaps) as u64)
        .collect()
}

fn chains<A: Accumulator>(
    workload: &Workload,
    cursors: &[u64],
    tally: &mut Verified,
) -> Result<(), EngineError> {
    let grid = workload.grid;
    let size = size_of::<A::Bytes>();
    let threads = spread(u64::from(grid.threads), THREADS);
    for block in spread(cursors.len() as u64, BLOCKS) {
        let units = cursors[block as usize];
        // The kernel stores nothing before the first unit.
        if units == 0 {
            continue;
        }
        for chain in 0..workload.plan.ilp {
            let lane = |thread: u64| Lane {
                chain,
                block: block as u32,
                thread: thread as u32,
            };
            let row = workload.read_state(
                grid.state_index(lane(0)),
                u64::from(grid.threads),
                size as u64,
            )?;
            let right = threads.iter().map(|&thread| {
                let at = thread as usize * size;
                row[at..at + size] == *A::after(grid, lane(thread), units).bytes().as_ref()
            });
            count(tally, right);
        }
    }
    Ok(())
}

/// Whether `copy` has copied a float, by the cursor of the block that does.
fn is_copied(grid: Grid, cursors: &[u64], index: u64) -> bool {
    let (unit, block) = grid.copy_unit_and_block(index);
    cursors
        .get(block as usize)
        .is_some_and(|&units| units > unit)
}

/// What a copy's output holds: the input where it was copied, else the zero that it began with.
fn expected(index: u64, copied: bool) -> f32 {
    if copied { copy_input(index) } else { 0.0 }
}

/// Compares `count` floats of `copy`'s output from `from` on, or as many as there are.
fn window(
    workload: &Workload,
    cursors: &[u64],
    from: u64,
    count_at_most: u64,
    tally: &mut Verified,
) -> Result<(), EngineError> {
    let left = workload.layout.floats.saturating_sub(from);
    let found = workload.read_output(from, count_at_most.min(left))?;
    let right = (from..)
        .zip(found)
        .map(|(index, found)| found == expected(index, is_copied(workload.grid, cursors, index)));
    count(tally, right);
    Ok(())
}

/// Looks at stretches of the whole output and, more closely, at what some blocks copied last and
/// are to copy next: in the first sweep a unit that a stop lost or repeated shows there. In later
/// sweeps every float is in its place already.
fn whole_buffer(
    workload: &Workload,
    cursors: &[u64],
    tally: &mut Verified,
) -> Result<(), EngineError> {
    let (grid, floats) = (workload.grid, workload.layout.floats);
    for from in spread(floats - WINDOW.min(floats) + 1, WINDOWS) {
        window(workload, cursors, from, WINDOW, tally)?;
    }
    let sweep = grid.copy_units_per_sweep(floats);
    for block in spread(cursors.len() as u64, BLOCKS) {
        let cursor = cursors[block as usize];
        for unit in cursor.saturating_sub(UNITS_BEHIND)..(cursor + UNITS_AHEAD).min(sweep) {
            let from = grid.copy_start(unit, block as u32);
            if from < floats {
                window(workload, cursors, from, u64::from(grid.threads), tally)?;
            }
        }
    }
    Ok(())
}

fn slices(workload: &Workload, cursors: &[u64], tally: &mut Verified) -> Result<(), EngineError> {
    let layout = &workload.layout;
    for block in spread(cursors.len() as u64, WINDOWS) {
        let copied = cursors[block as usize] > 0;
        let window = WINDOW.min(layout.floats);
        // Both ends of the slice, and, where the slice does not fill its region, the first float
        // behind it, which no block may touch.
        for from in [0, layout.floats - window] {
            let from = block * layout.stride + from;
            let found = workload.read_output(from, window)?;
            let right = (from..)
                .zip(found)
                .map(|(index, found)| found == expected(index, copied));
            count(tally, right);
        }
        if layout.floats < layout.stride {
            let behind = workload.read_output(block * layout.stride + layout.floats, 1)?;
            count(tally, behind.iter().map(|&found| found == 0.0));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_has_both_ends_and_no_number_twice() {
        assert_eq!(spread(0, 4), Vec::<u64>::new());
        assert_eq!(spread(3, 4), [0, 1, 2]);
        assert_eq!(spread(10, 4), [0, 3, 6, 9]);
        let many = spread(u64::MAX, 64);
        assert_eq!((many[0], many[63]), (0, u64::MAX - 1));
        assert!(many.windows(2).all(|pair| pair[0] < pair[1]));
    }

    #[test]
    fn a_float_is_copied_when_its_block_has_passed_it() {
        let grid = Grid {
            blocks: 2,
            threads: 4,
        };
        // Block 0 has done two units, block 1 none.
        let cursors = [2, 0];
        assert!(is_copied(grid, &cursors, 3));
        assert!(!is_copied(grid, &cursors, 4));
        assert!(is_copied(grid, &cursors, 8));
        assert!(!is_copied(grid, &cursors, 16));
    }
}
