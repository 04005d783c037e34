//! The kernels that workloads run, one row each.
//!
//! A row says what a kernel stresses and which parameters it takes; the PTX
//! entry points are named after it (`<name>[_ilp<N>]_sliced` and `_uncut`), and
//! [`crate::reference`] computes on the CPU what it must have computed.

use std::ops::RangeInclusive;

use gcgroup_model::spec::{Blocks, SpecError, WorkloadSpec};

use crate::engine::{Form, Plan};

/// One kernel.
#[derive(Debug)]
pub struct Kernel {
    /// Name in a spec, and stem of its entry points.
    pub name: &'static str,
    /// The resource that it wears on.
    pub stresses: &'static str,
    /// Independent chains that it can have; `1..=1` where it has no such
    /// parameter and its entry points carry no `_ilp`.
    pub ilp: RangeInclusive<u32>,
    /// Chains where the spec names none.
    pub default_ilp: u32,
    /// Threads in a block where the spec names none.
    pub default_threads: u32,
    /// Bytes of its buffers, `None` for a kernel that has none.
    pub bytes: Option<Bytes>,
    /// What it computes, and how that is checked.
    pub check: Check,
}

/// The `bytes` parameter of a copy.
#[derive(Debug)]
pub struct Bytes {
    /// What is allowed.
    pub range: RangeInclusive<u64>,
    /// What it is where the spec names none.
    pub default: u64,
}

/// How a kernel's results are checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Check {
    /// Each thread's accumulators equal the CPU's, bit for bit.
    Accumulators,
    /// The destination equals the source wherever the cursor has passed.
    Destination,
    /// It computes nothing; its cursor is all there is.
    Cursor,
}

/// Threads that a block can have on every GPU since Fermi.
pub const THREADS: RangeInclusive<u32> = 1..=1024;
/// Blocks of a launch: far above any residency, and small enough that the
/// cursors (8 bytes a block) stay below a page.
pub const BLOCKS: RangeInclusive<u32> = 1..=262_144;
/// Distance of two blocks' slices in `copy_per_block`, bytes: the unified L1 of
/// an SM on Hopper, so that no two slices share a set by accident.
pub const SLICE_STRIDE: u64 = 256 * 1024;

const KIB: u64 = 1024;
const GIB: u64 = 1024 * 1024 * KIB;

/// Every kernel.
#[rustfmt::skip]
pub static KERNELS: &[Kernel] = &[
    Kernel { name: "fma_fp32", stresses: "issue slots and the FP32 FMA pipe", ilp: 1..=4, default_ilp: 4,
             default_threads: 1024, bytes: None, check: Check::Accumulators },
    Kernel { name: "mul_fp32", stresses: "issue slots and the FP32 pipe", ilp: 1..=4, default_ilp: 4,
             default_threads: 1024, bytes: None, check: Check::Accumulators },
    Kernel { name: "mul_fp64", stresses: "the FP64 pipe", ilp: 1..=4, default_ilp: 4,
             default_threads: 1024, bytes: None, check: Check::Accumulators },
    Kernel { name: "copy", stresses: "L2 or device memory bandwidth, as bytes decide", ilp: 1..=1, default_ilp: 1,
             default_threads: 1024, bytes: Some(Bytes { range: 8 * KIB..=1024 * GIB, default: GIB }), check: Check::Destination },
    Kernel { name: "copy_per_block", stresses: "the L1 cache of each SM", ilp: 1..=1, default_ilp: 1,
             default_threads: 64, bytes: Some(Bytes { range: KIB..=2 * SLICE_STRIDE, default: 64 * KIB }), check: Check::Destination },
    Kernel { name: "sleep", stresses: "the block scheduler and residency only", ilp: 1..=1, default_ilp: 1,
             default_threads: 1024, bytes: None, check: Check::Cursor },
];

/// The kernel of that name.
#[must_use]
pub fn find(name: &str) -> Option<&'static Kernel> {
    KERNELS.iter().find(|kernel| kernel.name == name)
}

impl Kernel {
    /// Name of the entry point in the PTX.
    #[must_use]
    pub fn entry_point(&self, ilp: u32, form: Form) -> String {
        let form = match form {
            Form::Sliced => "sliced",
            Form::Uncut => "uncut",
        };
        if self.ilp == (1..=1) {
            format!("{}_{form}", self.name)
        } else {
            format!("{}_ilp{ilp}_{form}", self.name)
        }
    }
}

/// Decides every parameter of a spec for a GPU of `sm_count` SMs, and writes
/// what was decided back into the spec.
///
/// # Errors
/// The field that is out of the kernel's range.
pub fn plan(spec: &mut WorkloadSpec, sm_count: u32) -> Result<Plan, SpecError> {
    let Some(kernel) = find(&spec.kernel) else {
        let names: Vec<_> = KERNELS.iter().map(|kernel| kernel.name).collect();
        return Err(SpecError::new(
            "kernel",
            format!(
                "there is no kernel {:?}; there are {}",
                spec.kernel,
                names.join(", ")
            ),
        ));
    };
    let ilp = spec.ilp.unwrap_or(kernel.default_ilp);
    in_range("ilp", u64::from(ilp), &widen(&kernel.ilp))?;
    let threads = spec.threads.unwrap_or(kernel.default_threads);
    in_range("threads", u64::from(threads), &widen(&THREADS))?;
    let blocks = match spec.blocks.unwrap_or(Blocks::PerSm(1)) {
        Blocks::Count(count) => u64::from(count),
        Blocks::PerSm(count) => u64::from(count) * u64::from(sm_count),
    };
    in_range("blocks", blocks, &widen(&BLOCKS))?;
    let bytes = match (&kernel.bytes, spec.bytes) {
        (None, None) => 0,
        (None, Some(_)) => {
            return Err(SpecError::new(
                "bytes",
                format!("{} has no buffers", kernel.name),
            ));
        }
        (Some(bytes), asked) => {
            let asked = asked.unwrap_or(bytes.default);
            in_range("bytes", asked, &bytes.range)?;
            if asked % 8 != 0 {
                return Err(SpecError::new(
                    "bytes",
                    "must be a multiple of 8: two buffers of 4-byte floats",
                ));
            }
            asked
        }
    };
    let blocks = u32::try_from(blocks).map_err(|_| SpecError::new("blocks", "too many"))?;
    spec.ilp = Some(ilp);
    spec.threads = Some(threads);
    spec.blocks = Some(Blocks::Count(blocks));
    spec.bytes = (bytes > 0).then_some(bytes);
    let form = if spec.sliced {
        Form::Sliced
    } else {
        Form::Uncut
    };
    Ok(Plan {
        kernel: kernel.name.to_owned(),
        ilp,
        blocks,
        threads,
        bytes,
        form,
    })
}

fn widen(range: &RangeInclusive<u32>) -> RangeInclusive<u64> {
    u64::from(*range.start())..=u64::from(*range.end())
}

fn in_range(field: &str, value: u64, range: &RangeInclusive<u64>) -> Result<(), SpecError> {
    if range.contains(&value) {
        return Ok(());
    }
    Err(SpecError::new(
        field,
        format!(
            "{value} is out of range: {} to {}",
            range.start(),
            range.end()
        ),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_default_is_in_its_own_range() {
        for kernel in KERNELS {
            let mut spec = WorkloadSpec::of_kernel(kernel.name);
            let plan = plan(&mut spec, 132).expect("defaults must be allowed");
            assert_eq!(plan.blocks, 132, "{}", kernel.name);
        }
    }

    #[test]
    fn a_parameter_out_of_range_names_its_field_and_the_range() {
        let mut spec = WorkloadSpec::of_kernel("fma_fp32");
        spec.ilp = Some(5);
        let error = plan(&mut spec, 132).expect_err("5 chains are too many");
        assert_eq!(
            (error.field.as_str(), error.message.as_str()),
            ("ilp", "5 is out of range: 1 to 4")
        );
        let mut spec = WorkloadSpec::of_kernel("sleep");
        spec.bytes = Some(4096);
        assert_eq!(
            plan(&mut spec, 132)
                .expect_err("sleep has no buffers")
                .field,
            "bytes"
        );
        let mut spec = WorkloadSpec::of_kernel("nosuch");
        assert!(
            plan(&mut spec, 132)
                .expect_err("unknown")
                .message
                .contains("copy_per_block")
        );
    }

    #[test]
    fn entry_points_carry_the_chains_only_where_there_is_a_choice() {
        let fma = find("fma_fp32").expect("stands in the table");
        assert_eq!(fma.entry_point(3, Form::Sliced), "fma_fp32_ilp3_sliced");
        let copy = find("copy").expect("stands in the table");
        assert_eq!(copy.entry_point(1, Form::Uncut), "copy_uncut");
    }
}
