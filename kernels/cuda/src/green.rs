//! SM partitions: the one split of the device's SMs, and green contexts made of its groups.
//!
//! The split is the same in every process on a device, and under MPS a group's number means the
//! same SMs in every client. So whoever hands out group numbers decides which workloads share SMs.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::c_uint;
use std::ptr::null_mut;
use std::sync::Arc;

use cudarc::driver::sys::{CUcontext, CUdevResource, CUdevResourceDesc, CUgreenCtx, CUstream};
use gcgroup_kernels::engine::EngineError;

use crate::api::GreenApi;
use crate::context::Context;
use crate::driver::DriverError;
use crate::stream::NON_BLOCKING;

/// CU_DEV_RESOURCE_TYPE_SM.
const SM: c_uint = 1;
/// CU_DEV_SM_RESOURCE_SPLIT_IGNORE_SM_COSCHEDULING: groups of exactly the size asked for and a
/// small remainder, for kernels without large clusters.
const IGNORE_COSCHEDULING: c_uint = 1;
/// CU_GREEN_CTX_DEFAULT_STREAM, which drivers before CUDA 13.3 require.
const DEFAULT_STREAM: c_uint = 1;
/// SMs of a group, the first that the device can do. 8 is the granularity of Hopper and later.
const GROUP_SIZES: [c_uint; 3] = [8, 4, 2];

/// A resource with all bits zero, as the driver wants it before it writes one.
fn empty_resource() -> CUdevResource {
    // SAFETY: integers, a union of integers, and a type whose value 0 is one of its variants,
    // CU_DEV_RESOURCE_TYPE_INVALID.
    unsafe { std::mem::zeroed() }
}

fn sm_count(resource: &CUdevResource) -> u32 {
    // SAFETY: all members of the union are integers, so any bits are valid ones.
    unsafe { resource.__bindgen_anon_1.sm.smCount }
}

/// The split of a device.
pub(crate) struct Groups {
    context: Arc<Context>,
    api: &'static GreenApi,
    resources: Vec<CUdevResource>,
    /// Descriptors live as long as the process, so each is made once.
    descriptors: RefCell<HashMap<Vec<u32>, CUdevResourceDesc>>,
}

impl Groups {
    /// Splits the device's SMs: equal groups, and what remains as a last, smaller one.
    pub(crate) fn split(context: &Arc<Context>) -> Result<Self, EngineError> {
        let api = context.driver.green()?;
        let mut whole = empty_resource();
        // SAFETY: the driver writes one resource; the device is one that it listed.
        let status = unsafe { (api.cuDeviceGetDevResource)(context.device, &mut whole, SM) };
        context.driver.check("cuDeviceGetDevResource", status)?;
        let mut refused = EngineError::Unsupported("the SMs cannot be split".to_owned());
        for size in GROUP_SIZES {
            match Self::split_by(context, api, &whole, size) {
                Ok(resources) if !resources.is_empty() => {
                    return Ok(Self {
                        context: context.clone(),
                        api,
                        resources,
                        descriptors: RefCell::new(HashMap::new()),
                    });
                }
                Ok(_) => {}
                Err(error) => refused = EngineError::Unsupported(error.to_string()),
            }
        }
        Err(refused)
    }

    fn split_by(
        context: &Context,
        api: &GreenApi,
        whole: &CUdevResource,
        size: c_uint,
    ) -> Result<Vec<CUdevResource>, DriverError> {
        let mut count = sm_count(whole) / size;
        let mut groups = vec![empty_resource(); count as usize];
        if groups.is_empty() {
            return Ok(groups);
        }
        let mut rest = empty_resource();
        // SAFETY: the driver writes at most `count` groups, as many as there is room for, the
        // number that it wrote, and one remainder.
        let status = unsafe {
            (api.cuDevSmResourceSplitByCount)(
                groups.as_mut_ptr(),
                &mut count,
                whole,
                &mut rest,
                IGNORE_COSCHEDULING,
                size,
            )
        };
        context
            .driver
            .check("cuDevSmResourceSplitByCount", status)?;
        groups.truncate(count as usize);
        if !groups.is_empty() && sm_count(&rest) > 0 {
            groups.push(rest);
        }
        Ok(groups)
    }

    /// SMs of each group, by number.
    pub(crate) fn sizes(&self) -> Vec<u32> {
        self.resources.iter().map(sm_count).collect()
    }

    fn descriptor(&self, numbers: &[u32]) -> Result<CUdevResourceDesc, EngineError> {
        let mut sorted = numbers.to_vec();
        sorted.sort_unstable();
        sorted.dedup();
        if sorted.is_empty() || sorted.len() != numbers.len() {
            return Err(EngineError::Unsupported(format!(
                "SM groups {numbers:?}: at least one, and each once"
            )));
        }
        if let Some(&descriptor) = self.descriptors.borrow().get(&sorted) {
            return Ok(descriptor);
        }
        let mut resources = Vec::with_capacity(sorted.len());
        for &number in &sorted {
            let resource = self.resources.get(number as usize).ok_or_else(|| {
                EngineError::Unsupported(format!(
                    "no SM group {number}: there are {}",
                    self.resources.len()
                ))
            })?;
            resources.push(*resource);
        }
        let mut descriptor: CUdevResourceDesc = null_mut();
        // SAFETY: the driver reads the resources and writes one handle.
        let status = unsafe {
            (self.api.cuDevResourceGenerateDesc)(
                &mut descriptor,
                resources.as_mut_ptr(),
                resources.len() as c_uint,
            )
        };
        self.context
            .driver
            .check("cuDevResourceGenerateDesc", status)?;
        self.descriptors.borrow_mut().insert(sorted, descriptor);
        Ok(descriptor)
    }

    /// A context on exactly these groups. Blocks until every kernel of the process has ended.
    pub(crate) fn context_on(&self, numbers: &[u32]) -> Result<Arc<GreenContext>, EngineError> {
        let descriptor = self.descriptor(numbers)?;
        let driver = self.context.driver;
        let mut raw: CUgreenCtx = null_mut();
        // SAFETY: the driver writes one handle; the descriptor is of this device.
        let status = unsafe {
            (self.api.cuGreenCtxCreate)(&mut raw, descriptor, self.context.device, DEFAULT_STREAM)
        };
        driver.check("cuGreenCtxCreate", status)?;
        let mut green = GreenContext {
            raw,
            as_context: null_mut(),
            sms: 0,
            primary: self.context.clone(),
            api: self.api,
        };
        // SAFETY: the driver writes one handle; the green context was just made.
        let status = unsafe { (self.api.cuCtxFromGreenCtx)(&mut green.as_context, raw) };
        driver.check("cuCtxFromGreenCtx", status)?;
        let mut granted = empty_resource();
        // SAFETY: the driver writes one resource.
        let status = unsafe { (self.api.cuGreenCtxGetDevResource)(raw, &mut granted, SM) };
        driver.check("cuGreenCtxGetDevResource", status)?;
        green.sms = sm_count(&granted);
        Ok(Arc::new(green))
    }
}

/// A green context.
pub(crate) struct GreenContext {
    raw: CUgreenCtx,
    as_context: CUcontext,
    sms: u32,
    primary: Arc<Context>,
    api: &'static GreenApi,
}

// SAFETY: a context handle may be used from any thread; the driver locks.
unsafe impl Send for GreenContext {}
// SAFETY: as above.
unsafe impl Sync for GreenContext {}

impl GreenContext {
    /// The primary context that it is a part of.
    pub(crate) fn primary(&self) -> &Arc<Context> {
        &self.primary
    }

    /// The handle to use where the driver wants an ordinary context.
    pub(crate) fn as_context(&self) -> CUcontext {
        self.as_context
    }

    /// SMs that the driver says it has.
    pub(crate) fn sms(&self) -> u32 {
        self.sms
    }

    /// A stream on its SMs.
    pub(crate) fn new_stream(&self, priority: i32) -> Result<CUstream, DriverError> {
        let mut stream = null_mut();
        // SAFETY: the driver writes one handle; the green context lives as long as `self`.
        let status = unsafe {
            (self.api.cuGreenCtxStreamCreate)(&mut stream, self.raw, NON_BLOCKING, priority)
        };
        self.primary
            .driver
            .check("cuGreenCtxStreamCreate", status)?;
        Ok(stream)
    }
}

impl Drop for GreenContext {
    fn drop(&mut self) {
        // SAFETY: made once, and its streams and events, which hold on to it, are gone.
        let _ = unsafe { (self.api.cuGreenCtxDestroy)(self.raw) };
    }
}
