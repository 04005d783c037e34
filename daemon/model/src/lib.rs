//! What gcgroup's control files are: their rows, values, settings and the
//! state that reads are rendered from.
//!
//! Everything here is pure. Nothing reads a clock, a file or the GPU, so the
//! service, its filesystem, the command line and the tests agree by sharing
//! these types instead of each other's habits.

pub mod change;
pub mod row;
pub mod snapshot;
pub mod spec;
pub mod value;

pub use change::{Change, Refusal, Target};
pub use row::{File, Grammar, Mode, Place, ROWS, Row};
pub use snapshot::Snapshot;
pub use spec::WorkloadSpec;
