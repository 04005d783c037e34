//! The primary context and the modules in it.
//!
//! Streams, events, modules and memory each hold on to the context they were made in, so that
//! whatever is dropped last, on whichever thread, is dropped while its context still lives. A
//! destructor ignores the driver's answer: there is nobody to act on it, and a context that has
//! failed answers with its failure.

use std::ffi::{CString, c_int, c_uint};
use std::ptr::null_mut;
use std::rc::Rc;
use std::sync::Arc;

use cudarc::driver::sys::{CUcontext, CUdevice, CUfunction, CUmodule};
use gcgroup_kernels::engine::EngineError;

use crate::api::Api;
use crate::driver::{Driver, DriverError};
use crate::green::GreenContext;

/// The primary context of a device, which all green contexts of the process share with it.
pub(crate) struct Context {
    pub(crate) driver: &'static Driver,
    pub(crate) device: CUdevice,
    raw: CUcontext,
}

// SAFETY: a context handle may be used from any thread; the driver locks.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// Retains the device's primary context and makes it the calling thread's current one.
    pub(crate) fn retain(
        driver: &'static Driver,
        device: CUdevice,
    ) -> Result<Arc<Self>, DriverError> {
        let mut raw = null_mut();
        // SAFETY: the driver writes one handle; the device is one that it listed.
        let status = unsafe { (driver.api().cuDevicePrimaryCtxRetain)(&mut raw, device) };
        driver.check("cuDevicePrimaryCtxRetain", status)?;
        let context = Arc::new(Self {
            driver,
            device,
            raw,
        });
        context.make_current()?;
        Ok(context)
    }

    /// Makes it the calling thread's current context.
    pub(crate) fn make_current(&self) -> Result<(), DriverError> {
        // SAFETY: the context is retained for as long as `self` lives.
        let status = unsafe { (self.api().cuCtxSetCurrent)(self.raw) };
        self.driver.check("cuCtxSetCurrent", status)
    }

    /// Least and greatest stream priority.
    pub(crate) fn stream_priorities(&self) -> Result<(i32, i32), DriverError> {
        let (mut least, mut greatest): (c_int, c_int) = (0, 0);
        // SAFETY: the driver writes two ints; a context is current.
        let status = unsafe { (self.api().cuCtxGetStreamPriorityRange)(&mut least, &mut greatest) };
        self.driver.check("cuCtxGetStreamPriorityRange", status)?;
        Ok((least, greatest))
    }

    pub(crate) fn api(&self) -> &'static Api {
        self.driver.api()
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: it was retained once, and whatever lives in it is gone.
        let _ = unsafe { (self.api().cuDevicePrimaryCtxRelease_v2)(self.device) };
    }
}

/// Where a stream and its events live.
#[derive(Clone)]
pub(crate) enum Home {
    /// The whole device.
    Primary(Arc<Context>),
    /// An SM partition.
    Green(Arc<GreenContext>),
}

impl Home {
    /// The primary context behind it.
    pub(crate) fn primary(&self) -> &Arc<Context> {
        match self {
            Home::Primary(context) => context,
            Home::Green(green) => green.primary(),
        }
    }

    fn raw(&self) -> CUcontext {
        match self {
            Home::Primary(context) => context.raw,
            Home::Green(green) => green.as_context(),
        }
    }

    pub(crate) fn driver(&self) -> &'static Driver {
        self.primary().driver
    }

    pub(crate) fn api(&self) -> &'static Api {
        self.driver().api()
    }

    /// Runs a call with this context as the thread's current one.
    pub(crate) fn with_current<T>(
        &self,
        call: impl FnOnce() -> Result<T, DriverError>,
    ) -> Result<T, DriverError> {
        // SAFETY: the context lives as long as `self`.
        let status = unsafe { (self.api().cuCtxPushCurrent_v2)(self.raw()) };
        self.driver().check("cuCtxPushCurrent_v2", status)?;
        let result = call();
        let mut popped = null_mut();
        // SAFETY: takes away what was pushed above.
        let status = unsafe { (self.api().cuCtxPopCurrent_v2)(&mut popped) };
        self.driver().check("cuCtxPopCurrent_v2", status)?;
        result
    }
}

/// A loaded module.
pub(crate) struct Module {
    raw: CUmodule,
    context: Arc<Context>,
}

/// A kernel of a module that the holder keeps loaded.
pub(crate) struct Function {
    raw: CUfunction,
    module: Rc<Module>,
}

impl Module {
    /// Compiles PTX, which ends with a zero byte, for the device and loads it.
    pub(crate) fn load(context: &Arc<Context>, ptx: &'static str) -> Result<Rc<Self>, DriverError> {
        assert!(ptx.ends_with('\0'), "PTX without its final zero byte");
        let mut raw = null_mut();
        // SAFETY: the driver reads up to the zero byte and writes one handle.
        let status = unsafe { (context.api().cuModuleLoadData)(&mut raw, ptx.as_ptr().cast()) };
        context.driver.check("cuModuleLoadData", status)?;
        Ok(Rc::new(Self {
            raw,
            context: context.clone(),
        }))
    }

    /// The kernel of that name.
    pub(crate) fn function(self: &Rc<Self>, name: &str) -> Result<Function, EngineError> {
        let name = CString::new(name).map_err(|_| {
            EngineError::Unsupported(format!("{name:?} cannot name an entry point"))
        })?;
        let mut raw = null_mut();
        // SAFETY: the driver reads the name and writes one handle.
        let status =
            unsafe { (self.context.api().cuModuleGetFunction)(&mut raw, self.raw, name.as_ptr()) };
        self.context.driver.check("cuModuleGetFunction", status)?;
        Ok(Function {
            raw,
            module: self.clone(),
        })
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        // SAFETY: no function of it is left, since each holds on to it.
        let _ = unsafe { (self.context.api().cuModuleUnload)(self.raw) };
    }
}

impl Function {
    /// The handle, valid for as long as `self` lives.
    pub(crate) fn raw(&self) -> CUfunction {
        self.raw
    }

    /// Asks for as much of the unified cache as L1 as there is.
    pub(crate) fn prefer_l1(&self) -> Result<(), DriverError> {
        // CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, CU_SHAREDMEM_CARVEOUT_MAX_L1.
        const CARVEOUT: c_uint = 9;
        const MAX_L1: c_int = 0;
        let context = &self.module.context;
        // SAFETY: the function is loaded for as long as `self` lives.
        let status = unsafe { (context.api().cuFuncSetAttribute)(self.raw, CARVEOUT, MAX_L1) };
        context.driver.check("cuFuncSetAttribute", status)
    }
}
