//! mount(2) and umount2(2), and what is mounted where.
//!
//! The library's own mounting is not used: it needs a helper program where it
//! cannot mount itself, and it unmounts by path whatever stands there. Here a
//! path is unmounted only while the topmost mount on it is known to be ours.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};
use thiserror::Error;

/// File system type of the control files, as /proc/mounts shows it.
pub const FS_TYPE: &str = "fuse.gcgroup";

/// How long a mount may take to answer before it counts as dead. Where nobody has
/// the device open any more the kernel answers at once; but a service that was
/// killed while a thread of it hung in a driver has it open and serves nothing.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);

/// Why the control files cannot be mounted or unmounted.
#[derive(Debug, Error)]
pub enum MountError {
    /// This host has no usable FUSE.
    #[error("cannot open /dev/fuse")]
    NoFuse(#[source] io::Error),
    /// The path cannot hold the mount.
    #[error("cannot mount at {path}")]
    Mountpoint {
        /// Where it should be mounted.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A living service has its control files there.
    #[error("another service answers at {path}")]
    InUse {
        /// Where it answers.
        path: PathBuf,
    },
    /// What is mounted cannot be read or taken away.
    #[error("cannot unmount {path}")]
    Unmount {
        /// Where it is mounted.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel and this program found no common language, or a thread is
    /// missing.
    #[error("cannot serve the mount")]
    Session(#[source] io::Error),
}

/// What [`clean_stale_mount`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cleaned {
    /// Nothing of ours.
    Nothing,
    /// So many dead mounts, which are gone now.
    Detached(u32),
}

/// One line of /proc/self/mountinfo, as far as it is needed here.
#[derive(Clone, Debug, PartialEq, Eq)]
struct MountLine {
    id: u64,
    parent: u64,
    /// Major and minor number of the file system instance.
    device: String,
    point: PathBuf,
    fs_type: String,
}

/// A mount of ours that stands.
#[derive(Debug)]
pub struct OwnMount {
    /// As mountinfo had it when it was new. Of these the kernel uses ids and
    /// device numbers again, at once, so neither tells it from another alone.
    line: MountLine,
}

/// Mounts at `path` and returns the descriptor that serves it.
///
/// # Errors
/// [`MountError::NoFuse`], [`MountError::Mountpoint`].
pub fn mount(path: &Path) -> Result<(OwnMount, OwnedFd), MountError> {
    let wrong = |source: io::Error| MountError::Mountpoint {
        path: path.to_owned(),
        source,
    };
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let fd = rustix::fs::open("/dev/fuse", flags, Mode::empty())
        .map_err(|errno| MountError::NoFuse(errno.into()))?;
    let path = absolute(path).map_err(wrong)?;
    // The kernel checks modes, for every user; 40000 says that it is a directory.
    let options = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions",
        fd.as_raw_fd()
    );
    let options = CString::new(options).map_err(|error| wrong(error.into()))?;
    let mount_flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    rustix::mount::mount("gcgroup", &path, FS_TYPE, mount_flags, options.as_c_str())
        .map_err(|errno| wrong(errno.into()))?;
    match topmost(&path) {
        Ok(Some(line)) if line.fs_type == FS_TYPE => Ok((OwnMount { line }, fd)),
        Ok(_) => Err(wrong(Errno::STALE.into())),
        Err(source) => Err(wrong(source)),
    }
}

impl OwnMount {
    /// Where it is mounted, without symlinks.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.line.point
    }

    fn is(&self, line: &MountLine) -> bool {
        let ours = &self.line;
        line.id == ours.id && line.device == ours.device && line.fs_type == ours.fs_type
    }

    /// Whether it still is part of this process's mounts.
    ///
    /// # Errors
    /// /proc cannot be read.
    pub fn stands(&self) -> io::Result<bool> {
        Ok(read_mounts()?.iter().any(|line| self.is(line)))
    }

    /// Takes it away. What somebody else mounted over it, or in its place, stays.
    ///
    /// # Errors
    /// [`MountError::Unmount`].
    pub fn detach(&self) -> Result<(), MountError> {
        let failed = |source: io::Error| MountError::Unmount {
            path: self.path().to_owned(),
            source,
        };
        match topmost(self.path()).map_err(failed)? {
            Some(line) if self.is(&line) => {
                detach(self.path(), UnmountFlags::empty()).map_err(failed)
            }
            None => Ok(()),
            Some(_) => {
                tracing::warn!(path = %self.path().display(), "not unmounted: something else is mounted there");
                Ok(())
            }
        }
    }
}

/// Takes dead mounts of ours away from `path`, as a service that was killed
/// leaves them. A file system of any other type is never touched. It may take two
/// seconds where the dead service is not quite gone.
///
/// # Errors
/// [`MountError::InUse`] when somebody still serves it, [`MountError::Unmount`].
pub fn clean_stale_mount(path: &Path) -> Result<Cleaned, MountError> {
    let failed = |source: io::Error| MountError::Unmount {
        path: path.to_owned(),
        source,
    };
    let path = match absolute(path) {
        Ok(path) => path,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Cleaned::Nothing),
        Err(error) => return Err(failed(error)),
    };
    let mut detached = 0;
    while let Some(line) = topmost(&path).map_err(failed)? {
        if line.fs_type != FS_TYPE {
            break;
        }
        if answers(&path) {
            return Err(MountError::InUse { path });
        }
        // By force, so that whoever still waits for its answers is let go.
        detach(&path, UnmountFlags::FORCE).map_err(failed)?;
        detached += 1;
    }
    Ok(match detached {
        0 => Cleaned::Nothing,
        count => Cleaned::Detached(count),
    })
}

/// MNT_DETACH, because a mount that somebody has open would be EBUSY; not
/// through a symlink at the end of the path.
fn detach(path: &Path, how: UnmountFlags) -> io::Result<()> {
    let flags = how | UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
    Ok(rustix::mount::unmount(path, flags)?)
}

/// Whether anybody serves the mount at `path`. It is asked on another thread,
/// because a question that nobody answers holds up who asks.
fn answers(path: &Path) -> bool {
    let (sender, receiver) = mpsc::channel();
    let path = path.to_owned();
    std::thread::spawn(move || {
        let answer = rustix::fs::statfs(&path);
        // Nobody listens any more when the answer came too late.
        let _ = sender.send(!matches!(answer, Err(Errno::NOTCONN | Errno::CONNABORTED)));
    });
    receiver.recv_timeout(ANSWER_WITHIN).unwrap_or(false)
}

/// The path as mountinfo has it. Where the whole path cannot be followed its
/// parent must do: the last part may be missing, or a dead mount.
fn absolute(path: &Path) -> io::Result<PathBuf> {
    if let Ok(path) = path.canonicalize() {
        return Ok(path);
    }
    let name = path.file_name().ok_or(Errno::INVAL)?;
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    Ok(parent.canonicalize()?.join(name))
}

/// The mount that a lookup of `path` ends on, if it is a mount point.
fn topmost(path: &Path) -> io::Result<Option<MountLine>> {
    Ok(topmost_of(read_mounts()?, path))
}

fn topmost_of(mounts: Vec<MountLine>, path: &Path) -> Option<MountLine> {
    let here: Vec<_> = mounts
        .into_iter()
        .filter(|line| line.point == path)
        .collect();
    // Of mounts stacked on one path each is the parent of the next.
    here.iter()
        .rfind(|line| !here.iter().any(|other| other.parent == line.id))
        .cloned()
}

/// Opens the file whose poll(2) reports that something was mounted or unmounted.
pub(crate) fn open_mounts() -> io::Result<File> {
    File::open("/proc/self/mountinfo")
}

fn read_mounts() -> io::Result<Vec<MountLine>> {
    let bytes = std::fs::read("/proc/self/mountinfo")?;
    Ok(String::from_utf8_lossy(&bytes)
        .lines()
        .filter_map(parse)
        .collect())
}

/// `ID PARENT MAJOR:MINOR ROOT POINT OPTIONS [TAG...] - TYPE SOURCE SUPEROPTIONS`,
/// proc_pid_mountinfo(5).
fn parse(line: &str) -> Option<MountLine> {
    let (mount, system) = line.split_once(" - ")?;
    let mut fields = mount.split(' ');
    Some(MountLine {
        id: fields.next()?.parse().ok()?,
        parent: fields.next()?.parse().ok()?,
        device: fields.next()?.to_owned(),
        point: PathBuf::from(unescape(fields.nth(1)?)),
        fs_type: system.split(' ').next()?.to_owned(),
    })
}

/// Undoes the kernel's escapes: space, tab, newline and backslash are a
/// backslash and three octal digits.
fn unescape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        let code = rest
            .get(at + 1..at + 4)
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match code {
            Some(code) => {
                out.push(char::from(code));
                rest = &rest[at + 4..];
            }
            None => {
                out.push('\\');
                rest = &rest[at + 1..];
            }
        }
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(id: u64, parent: u64, point: &str, fs_type: &str) -> MountLine {
        MountLine {
            id,
            parent,
            device: format!("0:{id}"),
            point: PathBuf::from(point),
            fs_type: fs_type.to_owned(),
        }
    }

    #[test]
    fn a_line_of_mountinfo_is_read_with_and_without_tags() {
        assert_eq!(
            parse(
                "36 35 0:36 / /run/a\\040b rw,noatime master:1 shared:2 - fuse.gcgroup gcgroup rw,user_id=0"
            ),
            Some(line(36, 35, "/run/a b", "fuse.gcgroup"))
        );
        assert_eq!(
            parse("22 1 0:22 / /proc rw - proc proc rw"),
            Some(line(22, 1, "/proc", "proc"))
        );
        assert_eq!(parse("22 1 0:21"), None);
    }

    #[test]
    fn escapes_are_undone_and_other_backslashes_stay() {
        assert_eq!(unescape("a\\011b\\134c\\"), "a\tb\\c\\");
        assert_eq!(unescape("\\9zz"), "\\9zz");
    }

    #[test]
    fn the_topmost_of_stacked_mounts_is_nobodys_parent() {
        let stacked = vec![
            line(40, 36, "/run/g", "tmpfs"),
            line(36, 20, "/run/g", "fuse.gcgroup"),
            line(41, 40, "/run/g/below", "tmpfs"),
        ];
        assert_eq!(
            topmost_of(stacked.clone(), Path::new("/run/g")),
            Some(line(40, 36, "/run/g", "tmpfs"))
        );
        assert_eq!(topmost_of(stacked, Path::new("/run/h")), None);
    }

    #[test]
    fn a_relative_path_becomes_absolute_and_the_last_part_may_be_missing() {
        let here = std::env::current_dir().expect("there is a directory");
        assert_eq!(
            absolute(Path::new("missing")).expect("the parent exists"),
            here.canonicalize().expect("it exists").join("missing")
        );
        assert!(absolute(Path::new("/no/such/parent")).is_err());
    }
}
