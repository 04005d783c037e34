//! Users and groups by name, through the C library, so that every name service
//! of the host counts.

use anyhow::{Context, Result, bail};
use nix::unistd::{Group, User};

use crate::config::Config;

/// Who a worker runs as.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Identity {
    /// User id.
    pub(crate) uid: u32,
    /// Group id.
    pub(crate) gid: u32,
}

/// The configured user of the workers.
///
/// # Errors
/// No such user, or root: a worker must be unprivileged.
pub(crate) fn worker(config: &Config) -> Result<Identity> {
    let name = &config.worker_user;
    let user = User::from_name(name)
        .with_context(|| format!("worker_user = {name:?} cannot be looked up"))?
        .with_context(|| format!("worker_user = {name:?} is not a user of this host"))?;
    if user.uid.is_root() {
        bail!("worker_user = {name:?} is not allowed: workers run unprivileged");
    }
    Ok(Identity {
        uid: user.uid.as_raw(),
        gid: user.gid.as_raw(),
    })
}

/// Group id of the control files.
///
/// # Errors
/// A configured group that does not exist.
pub(crate) fn file_group(config: &Config) -> Result<u32> {
    let look_up = |name: &str| {
        Group::from_name(name).with_context(|| format!("group = {name:?} cannot be looked up"))
    };
    match &config.group {
        Some(name) => {
            let group = look_up(name)?;
            Ok(group
                .with_context(|| format!("group = {name:?} is not a group of this host"))?
                .gid
                .as_raw())
        }
        None => Ok(look_up("gcgroup")?.map_or(0, |group| group.gid.as_raw())),
    }
}
