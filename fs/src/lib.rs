//! The control files as a mounted filesystem.
//!
//! [`Mounted`] serves the rows of `gcgroup_model` at a mount point: reads are
//! rendered from the published snapshot, writes become a `Change` that is handed
//! to the [`Service`] together with its reply. No thread of this crate ever waits
//! for the service.
//!
//! | module | what it knows |
//! |---|---|
//! | `table` | how each row is shown and stored |
//! | `tree` | directories, names, modes and inode numbers |
//! | `errno` | the errno of each refusal |
//! | `handle`, `launch`, `poll` | what an open descriptor remembers |
//! | `waiting` | callers whose write has not been answered |
//! | `operation` | the filesystem's operations, without FUSE |
//! | `mount` | mount(2), umount2(2) and what is mounted where |
//! | `session` | FUSE, and nothing else imports it |

mod caller;
mod errno;
mod handle;
mod launch;
pub mod mount;
#[cfg(test)]
mod naive;
mod operation;
mod poll;
mod service;
mod session;
mod table;
mod tree;
mod waiting;

pub use mount::{Cleaned, MountError, clean_stale_mount};
pub use service::{Options, Reply, Service};
pub use session::Mounted;
