//! [`CudaEngine`]: the trait's calls over the parts of this crate.

use std::marker::PhantomData;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use cudarc::driver::sys::CUdevice_attribute;
use gcgroup_kernels::engine::{
    Completion, Engine, EngineError, Facts, Placement, Plan, Prepared, Progress, Verified,
};
use rustix::time::{ClockId, clock_gettime};

use crate::context::{Context, Home};
use crate::driver::Driver;
use crate::flag::{FlagPath, StopFlag};
use crate::green::Groups;
use crate::launch::Queue;
use crate::verify::verify;
use crate::waiter::Waiter;
use crate::workload::Workload;

/// One workload on a real GPU.
///
/// It belongs to the thread that opened it, whose current CUDA context it sets.
pub struct CudaEngine {
    facts: Facts,
    context: Arc<Context>,
    /// `None` where SMs cannot be partitioned, with the reason.
    groups: Result<Groups, EngineError>,
    path: FlagPath,
    waiter: Waiter,
    /// The present placement, `None` until the first one.
    placed: Option<Placed>,
    /// What was prepared, `None` until then.
    ready: Option<Ready>,
    /// A context is current on one thread.
    stays_on_its_thread: PhantomData<*const ()>,
}

/// A placement in force.
struct Placed {
    queue: Queue,
    groups: Option<Vec<u32>>,
}

/// A prepared workload with its flag. The flag's word lies in the workload's memory, so the flag,
/// whose destructor waits for its writes, goes first.
struct Ready {
    flag: StopFlag,
    workload: Workload,
    /// Highest target that was submitted, in units.
    highest: u64,
    /// Whether the next launch has to wait for the flag's last lowering.
    must_await_flag: bool,
}

impl CudaEngine {
    /// Opens the GPU with the UUID that NVML prints.
    ///
    /// # Errors
    /// [`EngineError::NoDevice`] without a driver or without that GPU, [`EngineError::NoSlot`]
    /// where the MPS server is full.
    pub fn open(uuid: &str) -> Result<Self, EngineError> {
        Self::open_with(uuid, FlagPath::Copy)
    }

    /// Opens the GPU and says how the stop flag is to be written.
    ///
    /// # Errors
    /// As [`CudaEngine::open`].
    pub fn open_with(uuid: &str, path: FlagPath) -> Result<Self, EngineError> {
        let driver = Driver::get()?;
        let device = driver.find(uuid)?;
        let context = Context::retain(driver, device)?;
        let groups = Groups::split(&context);
        let (least, greatest) = context.stream_priorities()?;
        let facts = Facts {
            sm_count: driver.attribute(
                device,
                CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
            )?,
            groups: groups.as_ref().map(Groups::sizes).unwrap_or_default(),
            memory_bytes: driver.memory(device)?,
            green_contexts: groups.is_ok(),
            stream_priority_least: least,
            stream_priority_greatest: greatest,
            driver_version: driver.version()?,
        };
        Ok(Self {
            facts,
            groups,
            path,
            waiter: Waiter::start(&context)?,
            context,
            placed: None,
            ready: None,
            stays_on_its_thread: PhantomData,
        })
    }

    /// Where a placement runs. Groups that are in force already keep their context.
    fn home_of(&self, placement: &Placement) -> Result<Home, EngineError> {
        let Some(numbers) = &placement.groups else {
            return Ok(Home::Primary(self.context.clone()));
        };
        if let Some(placed) = &self.placed
            && placed.groups.as_ref() == Some(numbers)
        {
            return Ok(placed.queue.home().clone());
        }
        let groups = self.groups.as_ref().map_err(Clone::clone)?;
        Ok(Home::Green(groups.context_on(numbers)?))
    }

    fn ready(&self) -> Result<&Ready, EngineError> {
        self.ready.as_ref().ok_or_else(not_prepared)
    }
}

fn not_prepared() -> EngineError {
    EngineError::Failed("no workload is prepared".to_owned())
}

fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
}

impl Engine for CudaEngine {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn prepare(&mut self, plan: &Plan) -> Result<Prepared, EngineError> {
        if self.ready.is_some() {
            return Err(EngineError::Failed(
                "a workload is prepared already".to_owned(),
            ));
        }
        let priority = self.facts.stream_priority_greatest;
        let workload = Workload::prepare(&self.context, priority, plan)?;
        let flag = StopFlag::new(&self.context, priority, workload.flag_word(), self.path)?;
        let prepared = Prepared {
            buffer_bytes: workload.layout.bytes,
            context_bytes: None,
            units_per_iteration: workload.units_per_iteration(),
        };
        self.ready = Some(Ready {
            flag,
            workload,
            highest: 0,
            must_await_flag: false,
        });
        Ok(prepared)
    }

    fn place(&mut self, placement: &Placement) -> Result<u32, EngineError> {
        if let Some(placed) = &self.placed
            && !placed.queue.is_empty()
        {
            return Err(EngineError::Failed(
                "launches are in flight, so the stream cannot be replaced".to_owned(),
            ));
        }
        let home = self.home_of(placement)?;
        let sms = match &home {
            Home::Primary(_) => self.facts.sm_count,
            Home::Green(green) => green.sms(),
        };
        // The new stream is there before the old one goes, so an error changes nothing.
        self.placed = Some(Placed {
            queue: Queue::new(&home, placement.stream_priority)?,
            groups: placement.groups.clone(),
        });
        Ok(sms)
    }

    fn submit(&mut self, target: u64, poll_units: u32) -> Result<(), EngineError> {
        let ready = self.ready.as_mut().ok_or_else(not_prepared)?;
        let placed = self
            .placed
            .as_mut()
            .ok_or_else(|| EngineError::Failed("the workload is not placed".to_owned()))?;
        let submitted_ns = monotonic_ns();
        if ready.must_await_flag {
            placed.queue.wait_for(ready.flag.lowered())?;
            ready.must_await_flag = false;
        }
        let workload = &ready.workload;
        let end = placed.queue.submit(
            &workload.function,
            workload.plan.blocks,
            workload.plan.threads,
            &workload.launch_args(target, poll_units),
            submitted_ns,
        )?;
        ready.highest = ready.highest.max(target);
        self.waiter.watch(end);
        Ok(())
    }

    fn poll(&mut self) -> Result<Option<Completion>, EngineError> {
        let Some(placed) = &mut self.placed else {
            return Ok(None);
        };
        let mut landed = placed.queue.land()?;
        // Cleared only when there is nothing to report, and looked at again after it: an end
        // between the two would otherwise be cleared away unseen.
        if landed.is_none() && self.waiter.clear() {
            landed = placed.queue.land()?;
        }
        Ok(landed.map(|landed| Completion {
            target: landed.target,
            submitted_ns: landed.submitted_ns,
            seen_ns: monotonic_ns(),
            device_us: landed.device_us,
        }))
    }

    fn wait_fd(&self) -> BorrowedFd<'_> {
        self.waiter.descriptor()
    }

    fn raise_stop(&mut self) -> Result<(), EngineError> {
        Ok(self.ready()?.flag.raise()?)
    }

    fn lower_stop(&mut self) -> Result<(), EngineError> {
        let ready = self.ready.as_mut().ok_or_else(not_prepared)?;
        ready.flag.lower()?;
        ready.must_await_flag = true;
        Ok(())
    }

    fn progress(&mut self) -> Result<Progress, EngineError> {
        Ok(self.ready()?.workload.progress()?)
    }

    fn verify(&mut self) -> Result<Verified, EngineError> {
        let ready = self.ready()?;
        verify(&ready.workload, ready.highest)
    }

    fn now_ns(&self) -> u64 {
        monotonic_ns()
    }
}

impl Drop for CudaEngine {
    /// Stops what is in flight and waits for it: memory must not go from under a kernel.
    fn drop(&mut self) {
        // A failed context runs nothing more, so its errors change nothing here.
        if let Some(ready) = &self.ready {
            let _ = ready.flag.raise();
        }
        if let Some(placed) = &self.placed {
            let _ = placed.queue.drain();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_that_is_not_there_is_an_error_with_or_without_a_driver() {
        let opened = CudaEngine::open("GPU-00000000-0000-0000-0000-000000000000");
        assert!(matches!(opened.err(), Some(EngineError::NoDevice(_))));
    }
}
