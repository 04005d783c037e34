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
//!  world     contexts, launches, memory, MPS: pure, no clock, no I/O
//!    channel   channel groups and channels of a driver client
//!    control   what is listed, stopped and resumed from outside
//!    count     counters of launches
//!    cost    what a unit of each kernel takes of an SM and of the memory
//!    rate    how launches share SMs and bandwidth
//!    shape   what the simulated GPU is
//!  fault     which calls go wrong: pure
//!  dispatch  one request against world and faults
//!  app       the program of somebody else, and the commands that it obeys
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
//! Any process can be controlled from outside, as through the driver. A context
//! has groups of channels, with handles of its own client, that come and go; its
//! program launches into the compute group that it made last, whose timeslice is
//! its turn. When all channels of that group are disabled the launch stands where
//! it is and takes no time from the others, and goes on from there when one is
//! enabled. It stays so whatever becomes of who stopped it, and everything of a
//! context goes with it. A channel that is added to a stopped group is stopped too. A
//! stop that names a channel which is gone fails half-way; a resume does not, unless
//! a fault says so, as on a real host where the driver tells which are gone.
//! Stops and resumes take as long as was measured, more for several processes;
//! what they do is done at the beginning of that time, so a caller that dies
//! meanwhile leaves it done.
//!
//! # What it does not model
//! Rates are those of a fluid: a grid that does not divide evenly among its SMs
//! has no last, half-empty wave, and turns of the timeslices are averaged instead
//! of alternating. Caches do not miss more because of a neighbour. Stream
//! priorities are accepted and change nothing. Creating contexts, moving them to
//! other SMs and launching cost no time.
//!
//! A program has one stream, which moves to a new channel group as a whole, the
//! launch on the device included. Looking processes up and setting timeslices take
//! no time, a call holds up no other as the driver's locks would, and a call takes
//! any number of channels. A search for what is recent misses what lies far off, and
//! has what is gone, until everything is looked up; there is no slow sweep in
//! between, and no pause after searches that found nothing. A disabled channel of copies changes nothing, since nothing is copied
//! there. Who may control whom is not asked.

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

pub use app::{AppOptions, COMMANDS, run_app};
pub use engine::{MPS_VARIABLE, SimEngine};
pub use fault::{Effect, Failure, FaultId, FaultSpec, Operation, RandomFaults, Refused, Scope};
pub use fault_client::{ClientState, FaultClient, FaultClientError};
pub use host::SimHost;
pub use server::{ChannelLatency, Ended, SOCKET_NAME, ServeError, SimOptions, serve};
