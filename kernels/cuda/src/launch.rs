//! Launches: their parameters, and those that are in flight.

use std::collections::VecDeque;
use std::sync::Arc;

use gcgroup_kernels::engine::EngineError;

use crate::context::{Function, Home};
use crate::driver::DriverError;
use crate::stream::{Event, Stream};

/// The parameters of every entry point; field by field the struct of the same name in launch.cuh,
/// which says what they mean.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct LaunchArgs {
    pub(crate) target: u64,
    pub(crate) progress: u64,
    pub(crate) stop: u64,
    pub(crate) state: u64,
    pub(crate) input: u64,
    pub(crate) output: u64,
    pub(crate) floats: u64,
    pub(crate) stride: u64,
    pub(crate) poll_units: u32,
    pub(crate) reserved: u32,
}

/// A launch that was submitted and not yet reported.
struct Flight {
    target: u64,
    submitted_ns: u64,
    /// Its own event before it, or the end of the launch that it was queued behind.
    start: Arc<Event>,
    end: Arc<Event>,
}

/// A launch that ended.
pub(crate) struct Landed {
    pub(crate) target: u64,
    pub(crate) submitted_ns: u64,
    pub(crate) device_us: f64,
}

/// A stream and the launches on it.
pub(crate) struct Queue {
    stream: Stream,
    home: Home,
    flights: VecDeque<Flight>,
    /// End of the launch that was submitted last.
    last_end: Option<Arc<Event>>,
    /// Every event of this queue, the one that was used longest ago first. One that nobody else
    /// holds is free.
    events: VecDeque<Arc<Event>>,
}

impl Queue {
    /// An empty queue on a new stream.
    pub(crate) fn new(home: &Home, priority: i32) -> Result<Self, EngineError> {
        Ok(Self {
            stream: Stream::new(home, priority)?,
            home: home.clone(),
            flights: VecDeque::new(),
            last_end: None,
            events: VecDeque::new(),
        })
    }

    /// Where the stream lives.
    pub(crate) fn home(&self) -> &Home {
        &self.home
    }

    /// Whether every launch was reported.
    pub(crate) fn is_empty(&self) -> bool {
        self.flights.is_empty()
    }

    /// Has later launches wait for an event.
    pub(crate) fn wait_for(&self, event: &Event) -> Result<(), DriverError> {
        self.stream.wait_for(event)
    }

    /// Submits a launch and returns the event of its end.
    ///
    /// An event between two kernels costs a little device time, so a launch that is queued behind a
    /// running one has no event of its own at its start.
    pub(crate) fn submit(
        &mut self,
        function: &Function,
        blocks: u32,
        threads: u32,
        args: &LaunchArgs,
        submitted_ns: u64,
    ) -> Result<Arc<Event>, DriverError> {
        let start = match &self.last_end {
            Some(last) if !last.is_over()? => last.clone(),
            _ => self.record()?,
        };
        self.stream.launch(function, blocks, threads, args)?;
        let end = self.record()?;
        self.last_end = Some(end.clone());
        self.flights.push_back(Flight {
            target: args.target,
            submitted_ns,
            start,
            end: end.clone(),
        });
        Ok(end)
    }

    /// The oldest launch, if it has ended.
    pub(crate) fn land(&mut self) -> Result<Option<Landed>, DriverError> {
        let over = match self.flights.front() {
            Some(flight) => flight.end.is_over()?,
            None => false,
        };
        if !over {
            return Ok(None);
        }
        let Some(flight) = self.flights.pop_front() else {
            return Ok(None);
        };
        Ok(Some(Landed {
            target: flight.target,
            submitted_ns: flight.submitted_ns,
            device_us: flight.end.us_since(&flight.start)?,
        }))
    }

    /// Waits until everything has ended.
    pub(crate) fn drain(&self) -> Result<(), DriverError> {
        self.stream.synchronize()
    }

    /// Records a free event, or a new one where all are in use.
    fn record(&mut self) -> Result<Arc<Event>, DriverError> {
        let event = match self.events.pop_front() {
            Some(event) if Arc::strong_count(&event) == 1 => event,
            Some(used) => {
                self.events.push_front(used);
                Arc::new(Event::timed(&self.home)?)
            }
            None => Arc::new(Event::timed(&self.home)?),
        };
        self.stream.record(&event)?;
        self.events.push_back(event.clone());
        Ok(event)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::{offset_of, size_of};

    #[test]
    fn parameters_lie_where_the_kernels_read_them() {
        assert_eq!(size_of::<LaunchArgs>(), 72);
        assert_eq!(offset_of!(LaunchArgs, progress), 8);
        assert_eq!(offset_of!(LaunchArgs, stop), 16);
        assert_eq!(offset_of!(LaunchArgs, state), 24);
        assert_eq!(offset_of!(LaunchArgs, input), 32);
        assert_eq!(offset_of!(LaunchArgs, output), 40);
        assert_eq!(offset_of!(LaunchArgs, floats), 48);
        assert_eq!(offset_of!(LaunchArgs, stride), 56);
        assert_eq!(offset_of!(LaunchArgs, poll_units), 64);
    }
}
