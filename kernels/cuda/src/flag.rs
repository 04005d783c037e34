//! The stop flag: a word of device memory, set while kernels run.

use std::sync::Arc;

use gcgroup_kernels::engine::EngineError;

use crate::context::{Context, Home};
use crate::driver::DriverError;
use crate::memory::{Pinned, Span};
use crate::stream::{Event, Stream};

/// Bytes of a word.
const WORD: usize = 4;

/// How the flag gets to the device. Neither way needs an SM, so neither waits for a running kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FlagPath {
    /// The stream's front end writes it.
    WriteValue,
    /// A copy engine copies it from pinned memory.
    Copy,
}

/// The flag and the stream that writes it.
pub(crate) struct StopFlag {
    stream: Stream,
    word: Span,
    path: FlagPath,
    /// A zero and a one, for the copies.
    values: Pinned,
    /// The last lowering.
    lowered: Event,
}

impl StopFlag {
    /// A flag in `word`, lowered. Its stream is one of the primary context, so that it depends
    /// neither on a partition's SMs nor on a partition's life.
    pub(crate) fn new(
        context: &Arc<Context>,
        priority: i32,
        word: Span,
        path: FlagPath,
    ) -> Result<Self, EngineError> {
        let home = Home::Primary(context.clone());
        let flag = Self {
            stream: Stream::new(&home, priority)?,
            word,
            path,
            values: Pinned::of_words(context, &[0, 1])?,
            lowered: Event::ordering(&home)?,
        };
        flag.lower()?;
        flag.stream.synchronize()?;
        Ok(flag)
    }

    /// Raises it, soon.
    pub(crate) fn raise(&self) -> Result<(), DriverError> {
        self.write(1)
    }

    /// Lowers it after what raised it; what waits for [`StopFlag::lowered`] finds it so.
    pub(crate) fn lower(&self) -> Result<(), DriverError> {
        self.write(0)?;
        self.stream.record(&self.lowered)
    }

    /// The event of the last lowering.
    pub(crate) fn lowered(&self) -> &Event {
        &self.lowered
    }

    fn write(&self, value: u32) -> Result<(), DriverError> {
        match self.path {
            FlagPath::WriteValue => self.stream.write_value(self.word, value),
            FlagPath::Copy => {
                let offset = value as usize * WORD;
                self.stream
                    .copy_from_pinned(self.word, &self.values, offset)
            }
        }
    }
}

impl Drop for StopFlag {
    fn drop(&mut self) {
        // The copies must be over before their source is freed. A failed context copies no more.
        let _ = self.stream.synchronize();
    }
}
