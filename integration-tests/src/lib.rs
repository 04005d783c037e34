//! The harness of the tests that drive the service from outside.
//!
//! A test starts an [`Instance`] of the real binaries on a simulated GPU and
//! uses nothing but what a user has: the mounted files, processes and signals.
//! The one exception is [`fault`], which makes the simulated GPU
//! misbehave as a real one may.
//!
//! The harness panics where a test cannot go on, so that tests read as the
//! behaviour they check.

pub mod app;
pub mod binary;
pub mod command;
pub mod fault;
pub mod file;
pub mod identity;
pub mod instance;
pub mod keyed;
pub mod process;
pub mod setup;
pub mod wait;
mod watchdog;

pub use app::{App, Counted};
pub use instance::{Instance, Launched, Refused};
pub use rustix::io::Errno;
pub use setup::Setup;
