//! The simulated host: a GPU, its driver and its clock in one process, on which
//! real processes run.
//!
//! [`serve`] is that process. It computes how far every launch is and when it
//! ends, and burns no time to get there. Workers reach it through [`SimEngine`],
//! the service through [`SimHost`], tests through [`FaultClient`], and
//! [`run_app`] is a program of somebody else that happens to be on the GPU. They
//! all speak over one Unix socket in the state directory; a client's death is
//! the end of its connection, and frees everything that it had.
//!
//! ```text
//!  world     contexts, launches, memory, MPS, channels: pure, no clock, no I/O
//!    cost    what a unit of each kernel takes of an SM and of the memory
//!    rate    how launches share SMs and bandwidth
//!    shape   what the simulated GPU is
//!  fault     which calls go wrong: pure
//!  dispatch  one request against world and faults
//!  server    socket, timer, connections
//!  wire      what is said, one JSON object a packet
//! ```
//!
//! # What it is honest about
//! Half the SMs are half the speed; launches on one partition share it; disjoint
//! partitions disturb each other through memory bandwidth only; contexts without
//! MPS take turns by their timeslices; a stop takes as long as was measured and
//! leaves exact cursors; memory runs out.
//!
//! # What it does not model
//! Rates are those of a fluid: a grid that does not divide evenly among its SMs
//! has no last, half-empty wave, and turns of the timeslices are averaged instead
//! of alternating. Caches do not miss more because of a neighbour. Stream
//! priorities are accepted and change nothing. Creating contexts, moving them to
//! other SMs and launching cost no time.

mod app;
mod connection;
mod cost;
mod dispatch;
mod engine;
mod fault;
mod fault_client;
mod host;
mod rate;
mod server;
mod shape;
mod wire;
mod world;

pub use app::{AppOptions, run_app};
pub use engine::{MPS_VARIABLE, SimEngine};
pub use fault::{Effect, Failure, FaultId, FaultSpec, Operation, RandomFaults, Refused, Scope};
pub use fault_client::{ClientState, FaultClient, FaultClientError};
pub use host::SimHost;
pub use server::{Ended, SOCKET_NAME, ServeError, SimOptions, serve};
