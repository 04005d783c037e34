//! What the filesystem and the service ask of each other.

use std::path::PathBuf;
use std::sync::Arc;

use gcgroup_model::change::{Caller, Done};
use gcgroup_model::row::GroupWrites;
use gcgroup_model::snapshot::NodeId;
use gcgroup_model::{Change, Refusal, Snapshot};

/// Answers one change. Called exactly once, from any thread; dropped uncalled it
/// answers EIO, so that no caller waits for ever.
pub type Reply = Box<dyn FnOnce(Result<Done, Refusal>) + Send>;

/// What the filesystem asks of the service.
///
/// Every method is called on a FUSE thread, which serves every other reader too:
/// none may wait for a lock that is held across I/O, for the GPU, or for another
/// process.
pub trait Service: Send + Sync + 'static {
    /// The state that is published now.
    fn snapshot(&self) -> Arc<Snapshot>;

    /// Takes a change over, to be answered through `reply` before its deadline.
    /// What the change brought about is in [`Service::snapshot`] by then.
    fn submit(&self, caller: Caller, change: Change, reply: Reply);

    /// Somebody read a sampled value of this directory, so it is worth sampling.
    fn touched(&self, node: NodeId);

    /// The mount was taken away: nobody can reach the control files any more.
    /// Called at most once, and not for [`crate::Mounted::unmount`].
    fn mount_lost(&self) {}
}

/// How and where the control files are mounted.
#[derive(Clone, Debug)]
pub struct Options {
    /// An existing directory.
    pub mountpoint: PathBuf,
    /// Whether members of `gid` may write.
    pub group_writes: GroupWrites,
    /// Group of every file and directory; their user is root.
    pub gid: u32,
    /// What gcgroup.version says.
    pub version: String,
}
