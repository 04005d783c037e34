//! Streams and events.

use std::ffi::{c_uint, c_void};
use std::ptr::null_mut;

use cudarc::driver::sys::{CUevent, CUstream};
use gcgroup_kernels::engine::EngineError;

use crate::context::{Function, Home};
use crate::driver::{DriverError, NOT_READY};
use crate::memory::{Pinned, Span};

/// CU_STREAM_NON_BLOCKING: not ordered with the default stream. Green contexts require it.
pub(crate) const NON_BLOCKING: c_uint = 1;
/// CU_EVENT_BLOCKING_SYNC: a thread that waits sleeps.
const BLOCKING_SYNC: c_uint = 1;
/// CU_EVENT_DISABLE_TIMING: cheaper, for events that only order.
const DISABLE_TIMING: c_uint = 2;

/// A stream.
pub(crate) struct Stream {
    raw: CUstream,
    home: Home,
}

impl Stream {
    /// A stream with a priority, lower being more important; out of range it is clamped.
    pub(crate) fn new(home: &Home, priority: i32) -> Result<Self, EngineError> {
        let raw = match home {
            Home::Green(green) => green.new_stream(priority)?,
            Home::Primary(context) => {
                let mut raw = null_mut();
                // SAFETY: the driver writes one handle. The primary context is current.
                let status = unsafe {
                    (context.api().cuStreamCreateWithPriority)(&mut raw, NON_BLOCKING, priority)
                };
                context.driver.check("cuStreamCreateWithPriority", status)?;
                raw
            }
        };
        Ok(Self {
            raw,
            home: home.clone(),
        })
    }

    /// Waits until all that was submitted has ended.
    pub(crate) fn synchronize(&self) -> Result<(), DriverError> {
        // SAFETY: the stream lives as long as `self`.
        let status = unsafe { (self.home.api().cuStreamSynchronize)(self.raw) };
        self.home.driver().check("cuStreamSynchronize", status)
    }

    /// Records an event of the same home.
    pub(crate) fn record(&self, event: &Event) -> Result<(), DriverError> {
        // SAFETY: both handles live as long as the references.
        let status = unsafe { (self.home.api().cuEventRecord)(event.raw, self.raw) };
        self.home.driver().check("cuEventRecord", status)
    }

    /// Has what is submitted from now on wait for an event, of whichever context.
    pub(crate) fn wait_for(&self, event: &Event) -> Result<(), DriverError> {
        // SAFETY: both handles live as long as the references; 0 is the only flag.
        let status = unsafe { (self.home.api().cuStreamWaitEvent)(self.raw, event.raw, 0) };
        self.home.driver().check("cuStreamWaitEvent", status)
    }

    /// Launches a grid of one dimension whose only parameter is `parameter`.
    pub(crate) fn launch<T: Copy>(
        &self,
        function: &Function,
        blocks: u32,
        threads: u32,
        parameter: &T,
    ) -> Result<(), DriverError> {
        let mut parameters = [std::ptr::from_ref(parameter).cast_mut().cast::<c_void>()];
        // SAFETY: the driver reads the parameter, whose layout is that of the kernel's, before it
        // returns, and does not write it. Function and stream live as long as the references.
        let status = unsafe {
            (self.home.api().cuLaunchKernel)(
                function.raw(),
                blocks,
                1,
                1,
                threads,
                1,
                1,
                0,
                self.raw,
                parameters.as_mut_ptr(),
                null_mut(),
            )
        };
        self.home.driver().check("cuLaunchKernel", status)
    }

    /// Sets bytes of device memory.
    pub(crate) fn fill_bytes(&self, memory: Span, value: u8) -> Result<(), DriverError> {
        // SAFETY: a span lies within memory that its owner keeps while it is in use.
        let status = unsafe {
            (self.home.api().cuMemsetD8Async)(memory.address, value, memory.bytes, self.raw)
        };
        self.home.driver().check("cuMemsetD8Async", status)
    }

    /// Writes 4 bytes of device memory from the stream's front end, without a copy engine.
    pub(crate) fn write_value(&self, word: Span, value: u32) -> Result<(), DriverError> {
        // SAFETY: as for fill_bytes; a word span has 4 bytes, aligned.
        let status =
            unsafe { (self.home.api().cuStreamWriteValue32_v2)(self.raw, word.address, value, 0) };
        self.home.driver().check("cuStreamWriteValue32_v2", status)
    }

    /// Copies pinned memory, which nobody writes meanwhile, to the device.
    pub(crate) fn copy_from_pinned(
        &self,
        to: Span,
        pinned: &Pinned,
        offset: usize,
    ) -> Result<(), DriverError> {
        let from = pinned.part(offset, to.bytes);
        // SAFETY: both ranges are within their memory, as asserted and as for fill_bytes. The
        // pinned memory outlives the copy: its owner waits for the stream before it frees it.
        let status = unsafe {
            (self.home.api().cuMemcpyHtoDAsync_v2)(to.address, from.cast(), to.bytes, self.raw)
        };
        self.home.driver().check("cuMemcpyHtoDAsync_v2", status)
    }

    /// Copies device memory to the host and waits for it.
    pub(crate) fn read(&self, from: Span, to: &mut [u8]) -> Result<(), DriverError> {
        assert_eq!(from.bytes, to.len(), "a copy between unequal sizes");
        // SAFETY: both ranges are valid and of equal size; the wait below ends the borrow.
        let status = unsafe {
            (self.home.api().cuMemcpyDtoHAsync_v2)(
                to.as_mut_ptr().cast(),
                from.address,
                from.bytes,
                self.raw,
            )
        };
        let queued = self.home.driver().check("cuMemcpyDtoHAsync_v2", status);
        self.synchronize()?;
        queued
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: the handle is used by nobody else, and its context still lives.
        let _ = unsafe { (self.home.api().cuStreamDestroy_v2)(self.raw) };
    }
}

/// An event.
pub(crate) struct Event {
    raw: CUevent,
    home: Home,
}

// SAFETY: an event handle may be used from any thread; the driver locks.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    /// An event with a time stamp, on which a waiting thread sleeps.
    pub(crate) fn timed(home: &Home) -> Result<Self, DriverError> {
        Self::with_flags(home, BLOCKING_SYNC)
    }

    /// An event that only orders.
    pub(crate) fn ordering(home: &Home) -> Result<Self, DriverError> {
        Self::with_flags(home, DISABLE_TIMING)
    }

    fn with_flags(home: &Home, flags: c_uint) -> Result<Self, DriverError> {
        let mut raw = null_mut();
        home.with_current(|| {
            // SAFETY: the driver writes one handle; a context is current.
            let status = unsafe { (home.api().cuEventCreate)(&mut raw, flags) };
            home.driver().check("cuEventCreate", status)
        })?;
        Ok(Self {
            raw,
            home: home.clone(),
        })
    }

    /// Whether what was before it has ended. Does not wait.
    pub(crate) fn is_over(&self) -> Result<bool, DriverError> {
        // SAFETY: the event lives as long as `self`.
        match unsafe { (self.home.api().cuEventQuery)(self.raw) } {
            NOT_READY => Ok(false),
            status => self
                .home
                .driver()
                .check("cuEventQuery", status)
                .map(|()| true),
        }
    }

    /// Sleeps until what was before it has ended.
    pub(crate) fn wait(&self) -> Result<(), DriverError> {
        // SAFETY: the event lives as long as `self`.
        let status = unsafe { (self.home.api().cuEventSynchronize)(self.raw) };
        self.home.driver().check("cuEventSynchronize", status)
    }

    /// Microseconds from another event to this one, to about half a microsecond. Both are over.
    pub(crate) fn us_since(&self, start: &Event) -> Result<f64, DriverError> {
        let mut ms = 0f32;
        // SAFETY: the driver writes one float; both events live as long as the references.
        let status = unsafe { (self.home.api().cuEventElapsedTime)(&mut ms, start.raw, self.raw) };
        self.home.driver().check("cuEventElapsedTime", status)?;
        Ok(f64::from(ms) * 1e3)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: the handle is used by nobody else, and its context still lives.
        let _ = unsafe { (self.home.api().cuEventDestroy_v2)(self.raw) };
    }
}
