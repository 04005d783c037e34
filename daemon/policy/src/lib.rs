//! The service's decisions, as functions of what is known and what happened.
//!
//! Nothing here does I/O, reads a clock or waits. A state machine takes an event
//! and the present time and says what to do and when to ask again, so that each
//! can be tested over any history in no time.

pub mod barrier;
pub mod enforcer;
pub mod gate;
pub mod lane;
pub mod partition;
