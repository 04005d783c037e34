//! Acting as another user on a thread of its own.
//!
//! Linux keeps user ids per thread, so a thread can become an unprivileged
//! user, see exact errnos and end, while the test stays root.

use rustix::process::{Gid, Uid};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};

/// User and group id of `nobody`.
pub const NOBODY: u32 = 65_534;

/// Runs `act` as `uid` with `gid` as its only group.
///
/// # Panics
/// When the caller is not root, or `act` panics.
pub fn acting_as<T: Send>(uid: u32, gid: u32, act: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
            set_thread_groups(&[]).expect("only root can act as another user");
            set_thread_res_gid(gid, gid, gid).expect("root may take any group");
            set_thread_res_uid(uid, uid, uid).expect("root may take any user");
            act()
        });
        match thread.join() {
            Ok(value) => value,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}
