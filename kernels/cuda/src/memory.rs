//! Device memory and page-locked host memory.

use std::ptr::null_mut;
use std::sync::Arc;

use cudarc::driver::sys::CUdeviceptr;
use gcgroup_kernels::engine::EngineError;

use crate::context::Context;
use crate::driver::{DriverError, OUT_OF_MEMORY};

/// A range of device memory that somebody else owns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    /// Device address of its first byte.
    pub(crate) address: CUdeviceptr,
    /// Its size.
    pub(crate) bytes: usize,
}

/// Device memory from cuMemAlloc.
pub(crate) struct Memory {
    span: Span,
    context: Arc<Context>,
}

impl Memory {
    /// Allocates.
    ///
    /// # Errors
    /// [`EngineError::NoMemory`] with what was free.
    pub(crate) fn new(context: &Arc<Context>, bytes: u64) -> Result<Self, EngineError> {
        let mut address = 0;
        // SAFETY: the driver writes one address; a context is current.
        let status = unsafe { (context.api().cuMemAlloc_v2)(&mut address, bytes as usize) };
        if status == OUT_OF_MEMORY {
            let (mut free, mut total) = (0, 0);
            // SAFETY: the driver writes two sizes; a context is current.
            let asked = unsafe { (context.api().cuMemGetInfo_v2)(&mut free, &mut total) };
            context.driver.check("cuMemGetInfo_v2", asked)?;
            return Err(EngineError::NoMemory {
                requested: bytes,
                free: free as u64,
            });
        }
        context.driver.check("cuMemAlloc_v2", status)?;
        Ok(Self {
            span: Span {
                address,
                bytes: bytes as usize,
            },
            context: context.clone(),
        })
    }

    /// A part of it.
    pub(crate) fn part(&self, offset: u64, bytes: u64) -> Span {
        let end = offset.checked_add(bytes);
        assert!(
            end.is_some_and(|end| end <= self.span.bytes as u64),
            "a span out of bounds"
        );
        Span {
            address: self.span.address + offset,
            bytes: bytes as usize,
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: it was allocated once; the driver waits for kernels that use it.
        let _ = unsafe { (self.context.api().cuMemFree_v2)(self.span.address) };
    }
}

/// Page-locked host memory, which the device reads without a copy in between.
pub(crate) struct Pinned {
    start: *mut u8,
    bytes: usize,
    context: Arc<Context>,
}

impl Pinned {
    /// Allocates and fills with words.
    pub(crate) fn of_words(context: &Arc<Context>, words: &[u32]) -> Result<Self, DriverError> {
        let bytes = std::mem::size_of_val(words);
        let mut start = null_mut();
        // SAFETY: the driver writes one address; a context is current.
        let status = unsafe { (context.api().cuMemHostAlloc)(&mut start, bytes, 0) };
        context.driver.check("cuMemHostAlloc", status)?;
        let start = start.cast::<u8>();
        // SAFETY: freshly allocated, page-aligned, and of the words' size.
        unsafe { std::ptr::copy_nonoverlapping(words.as_ptr().cast(), start, bytes) };
        Ok(Self {
            start,
            bytes,
            context: context.clone(),
        })
    }

    /// The address of a part of it.
    pub(crate) fn part(&self, offset: usize, bytes: usize) -> *const u8 {
        assert!(offset + bytes <= self.bytes, "a part out of bounds");
        // SAFETY: within the allocation, as asserted.
        unsafe { self.start.add(offset).cast_const() }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: it was allocated once, and its owner has waited for the copies out of it.
        let _ = unsafe { (self.context.api().cuMemFreeHost)(self.start.cast()) };
    }
}
