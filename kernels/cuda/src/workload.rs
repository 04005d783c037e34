//! One workload: its kernel, its device memory, and where in it everything stands.

use std::sync::Arc;

use gcgroup_kernels::catalogue::{BLOCKS, Check, Kernel, SLICE_STRIDE, THREADS, find};
use gcgroup_kernels::engine::{EngineError, Plan, Progress};
use gcgroup_kernels::reference::Grid;

use crate::context::{Context, Function, Home, Module};
use crate::driver::DriverError;
use crate::launch::LaunchArgs;
use crate::memory::{Memory, Span};
use crate::ptx;
use crate::stream::Stream;

/// Bytes of a float.
pub(crate) const FLOAT: u64 = 4;
/// The driver's page for device memory.
const PAGE: u64 = 2 << 20;
/// Distance of the parts of a workload's memory: a multiple of a cache line and of all the
/// alignments that the driver asks for.
const PART: u64 = 512;
/// Threads of a block of the kernel that fills the input buffer.
const FILL_THREADS: u32 = 256;
/// Its blocks: a few for each SM of any GPU.
const FILL_BLOCKS: u32 = 1024;

/// Sizes and places of a workload's buffers, all in one allocation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Layout {
    /// Floats that a sweep (`copy`) or a unit of one block (`copy_per_block`) copies.
    pub(crate) floats: u64,
    /// Floats from one block's slice to the next one's; 0 where there are no slices.
    pub(crate) stride: u64,
    /// Floats of the input buffer, and of the output buffer.
    pub(crate) buffer_floats: u64,
    state_bytes: u64,
    progress_at: u64,
    progress_bytes: u64,
    state_at: u64,
    input_at: u64,
    output_at: u64,
    /// Bytes of everything, in whole pages.
    pub(crate) bytes: u64,
}

impl Layout {
    /// Lays out the buffers of a plan. The stop flag stands first.
    pub(crate) fn of(kernel: &Kernel, plan: &Plan) -> Self {
        let blocks = u64::from(plan.blocks);
        let floats = plan.bytes / (2 * FLOAT);
        let (stride, buffer_floats) = match kernel.name {
            "copy_per_block" => {
                let stride = SLICE_STRIDE / FLOAT;
                (stride, stride * blocks)
            }
            _ => (0, floats),
        };
        let lanes = blocks * u64::from(plan.threads) * u64::from(plan.ilp);
        let state_bytes = match (kernel.check, kernel.name) {
            (Check::Accumulators, "mul_fp64") => lanes * 8,
            (Check::Accumulators, _) => lanes * 4,
            _ => 0,
        };
        let progress_bytes = blocks * 8;
        let progress_at = PART;
        let state_at = (progress_at + progress_bytes).next_multiple_of(PART);
        // The copies' buffers start where a slice of L1 size may.
        let input_at = match buffer_floats {
            0 => state_at + state_bytes,
            _ => (state_at + state_bytes).next_multiple_of(SLICE_STRIDE),
        };
        let output_at = match buffer_floats {
            0 => input_at,
            _ => (input_at + buffer_floats * FLOAT).next_multiple_of(SLICE_STRIDE),
        };
        Self {
            floats,
            stride,
            buffer_floats,
            state_bytes,
            progress_at,
            progress_bytes,
            state_at,
            input_at,
            output_at,
            bytes: (output_at + buffer_floats * FLOAT).next_multiple_of(PAGE),
        }
    }
}

/// A prepared workload.
pub(crate) struct Workload {
    pub(crate) kernel: &'static Kernel,
    pub(crate) plan: Plan,
    pub(crate) grid: Grid,
    pub(crate) layout: Layout,
    pub(crate) function: Function,
    memory: Memory,
    /// For what is done while nothing is in flight: preparation, progress, verification.
    control: Stream,
}

/// The kernel of a plan whose parameters are all within the catalogue's ranges.
fn checked(plan: &Plan) -> Result<&'static Kernel, EngineError> {
    let kernel = find(&plan.kernel)
        .ok_or_else(|| EngineError::Unsupported(format!("no kernel {:?}", plan.kernel)))?;
    let bytes_fit = match &kernel.bytes {
        None => plan.bytes == 0,
        Some(bytes) => bytes.range.contains(&plan.bytes) && plan.bytes.is_multiple_of(2 * FLOAT),
    };
    if !kernel.ilp.contains(&plan.ilp)
        || !THREADS.contains(&plan.threads)
        || !BLOCKS.contains(&plan.blocks)
        || !bytes_fit
    {
        return Err(EngineError::Unsupported(format!(
            "a parameter is out of the ranges of {}",
            kernel.name
        )));
    }
    Ok(kernel)
}

impl Workload {
    /// Loads the kernel and makes its buffers, with every cursor at 0.
    pub(crate) fn prepare(
        context: &Arc<Context>,
        priority: i32,
        plan: &Plan,
    ) -> Result<Self, EngineError> {
        let kernel = checked(plan)?;
        let module = Module::load(context, ptx::module(kernel.name)?)?;
        let function = module.function(&kernel.entry_point(plan.ilp, plan.form))?;
        let layout = Layout::of(kernel, plan);
        let workload = Self {
            kernel,
            plan: plan.clone(),
            grid: Grid {
                blocks: plan.blocks,
                threads: plan.threads,
            },
            layout,
            function,
            memory: Memory::new(context, layout.bytes)?,
            control: Stream::new(&Home::Primary(context.clone()), priority)?,
        };
        if layout.stride != 0 {
            workload.function.prefer_l1()?;
        }
        workload.initialise(context)?;
        Ok(workload)
    }

    /// Clears flag, cursors and output, and fills the input. Accumulators need no initial value:
    /// the kernels make it where a cursor is at 0.
    fn initialise(&self, context: &Arc<Context>) -> Result<(), EngineError> {
        let layout = &self.layout;
        let head = layout.progress_at + layout.progress_bytes;
        self.control.fill_bytes(self.memory.part(0, head), 0)?;
        if layout.buffer_floats != 0 {
            self.control.fill_bytes(self.output(), 0)?;
            let fill = Module::load(context, ptx::module("fill")?)?.function("fill")?;
            let args = LaunchArgs {
                floats: layout.buffer_floats,
                ..self.launch_args(0, 0)
            };
            self.control
                .launch(&fill, FILL_BLOCKS, FILL_THREADS, &args)?;
            self.control.synchronize()?;
        }
        self.control.synchronize()?;
        Ok(())
    }

    /// The parameters of a launch.
    pub(crate) fn launch_args(&self, target: u64, poll_units: u32) -> LaunchArgs {
        let layout = &self.layout;
        LaunchArgs {
            target,
            progress: self.cursors().address,
            stop: self.flag_word().address,
            state: self
                .memory
                .part(layout.state_at, layout.state_bytes)
                .address,
            input: self.input().address,
            output: self.output().address,
            floats: layout.floats,
            stride: layout.stride,
            poll_units,
            reserved: 0,
        }
    }

    /// Units of one iteration.
    pub(crate) fn units_per_iteration(&self) -> u64 {
        match self.kernel.name {
            "copy" => self.grid.copy_units_per_sweep(self.layout.floats),
            _ => 1,
        }
    }

    /// The stop flag.
    pub(crate) fn flag_word(&self) -> Span {
        self.memory.part(0, 4)
    }

    fn cursors(&self) -> Span {
        let layout = &self.layout;
        self.memory.part(layout.progress_at, layout.progress_bytes)
    }

    fn input(&self) -> Span {
        let layout = &self.layout;
        self.memory
            .part(layout.input_at, layout.buffer_floats * FLOAT)
    }

    fn output(&self) -> Span {
        let layout = &self.layout;
        self.memory
            .part(layout.output_at, layout.buffer_floats * FLOAT)
    }

    fn read(&self, span: Span) -> Result<Vec<u8>, DriverError> {
        let mut bytes = vec![0; span.bytes];
        self.control.read(span, &mut bytes)?;
        Ok(bytes)
    }

    /// Units that each block has done.
    pub(crate) fn read_cursors(&self) -> Result<Vec<u64>, DriverError> {
        let bytes = self.read(self.cursors())?;
        let (words, _) = bytes.as_chunks();
        Ok(words.iter().map(|word| u64::from_le_bytes(*word)).collect())
    }

    /// Bytes of the accumulators, from an element on.
    pub(crate) fn read_state(
        &self,
        element: u64,
        count: u64,
        size: u64,
    ) -> Result<Vec<u8>, DriverError> {
        let at = self.layout.state_at + element * size;
        self.read(self.memory.part(at, count * size))
    }

    /// Floats of the output buffer.
    pub(crate) fn read_output(&self, from: u64, count: u64) -> Result<Vec<f32>, DriverError> {
        let at = self.layout.output_at + from * FLOAT;
        let bytes = self.read(self.memory.part(at, count * FLOAT))?;
        let (words, _) = bytes.as_chunks();
        Ok(words.iter().map(|word| f32::from_le_bytes(*word)).collect())
    }

    /// Where the blocks are.
    pub(crate) fn progress(&self) -> Result<Progress, DriverError> {
        let cursors = self.read_cursors()?;
        Ok(Progress {
            least: cursors.iter().copied().min().unwrap_or(0),
            most: cursors.iter().copied().max().unwrap_or(0),
            total: cursors.iter().map(|&units| u128::from(units)).sum(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gcgroup_kernels::catalogue::KERNELS;
    use gcgroup_kernels::engine::Form;

    fn plan(kernel: &Kernel) -> Plan {
        Plan {
            kernel: kernel.name.to_owned(),
            ilp: kernel.default_ilp,
            blocks: 132,
            threads: 1000,
            bytes: kernel.bytes.as_ref().map_or(0, |bytes| bytes.default),
            form: Form::Sliced,
        }
    }

    #[test]
    fn parts_do_not_overlap_and_fit() {
        for kernel in KERNELS {
            let plan = plan(kernel);
            let layout = Layout::of(kernel, &plan);
            assert!(layout.progress_at >= 4, "{}", kernel.name);
            assert!(layout.state_at >= layout.progress_at + 132 * 8);
            assert!(layout.input_at >= layout.state_at + layout.state_bytes);
            assert!(layout.output_at >= layout.input_at + layout.buffer_floats * FLOAT);
            assert!(layout.bytes >= layout.output_at + layout.buffer_floats * FLOAT);
            assert_eq!(layout.bytes % PAGE, 0);
        }
    }

    #[test]
    fn copies_get_the_bytes_that_were_asked_for() {
        let kernel = find("copy").expect("stands in the table");
        let layout = Layout::of(kernel, &plan(kernel));
        assert_eq!(layout.floats * 8, 1 << 30);
        let kernel = find("copy_per_block").expect("stands in the table");
        let layout = Layout::of(kernel, &plan(kernel));
        assert_eq!(layout.floats * 8, 64 * 1024);
        assert_eq!(layout.stride, 65_536);
        assert_eq!(layout.buffer_floats, 132 * 65_536);
    }

    #[test]
    fn a_double_takes_twice_the_state() {
        let [single, double] = ["mul_fp32", "mul_fp64"].map(|name| {
            let kernel = find(name).expect("stands in the table");
            Layout::of(kernel, &plan(kernel)).state_bytes
        });
        assert_eq!(single, 132 * 1000 * 4 * 4);
        assert_eq!(double, 2 * single);
    }

    #[test]
    fn a_plan_out_of_range_is_refused() {
        for kernel in KERNELS {
            let good = plan(kernel);
            assert!(checked(&good).is_ok(), "{}", kernel.name);
            for bad in [
                Plan {
                    ilp: 5,
                    ..good.clone()
                },
                Plan {
                    threads: 0,
                    ..good.clone()
                },
                Plan {
                    threads: 1025,
                    ..good.clone()
                },
                Plan {
                    blocks: 0,
                    ..good.clone()
                },
                Plan {
                    bytes: good.bytes + 4,
                    ..good.clone()
                },
                Plan {
                    kernel: "nosuch".to_owned(),
                    ..good.clone()
                },
            ] {
                let refused = matches!(checked(&bad), Err(EngineError::Unsupported(_)));
                assert!(refused, "{bad:?}");
            }
        }
    }
}
