//! Libraries that a process has loaded.
//!
//! They are opened through /proc/PID/map_files, which leads to the very file that
//! is mapped: from outside its container, after its name was changed or removed,
//! and whatever bytes are in that name.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd};

use gcgroup_device::DeviceError;
use rustix::fs::{FileType, Mode, OFlags, fstat, fstatfs, open};
use rustix::io::Errno;

use super::tracefs::LibraryId;

/// FUSE_SUPER_MAGIC (include/uapi/linux/magic.h).
const FUSE_MAGIC: i64 = 0x6573_5546;

/// How often the mappings are looked at anew because they had changed before the
/// library was open.
const LOOKS: u32 = 4;

/// A library that a process runs code of.
#[derive(Debug)]
pub(super) struct Library {
    pub(super) file: File,
    pub(super) id: LibraryId,
}

/// The libraries of a process whose file name begins with `prefix`, each file
/// once.
///
/// # Errors
/// [`DeviceError::NoProcess`], [`DeviceError::Denied`];
/// [`DeviceError::Unsupported`] for one that must not be read.
pub(super) fn libraries(pid: u32, prefix: &str) -> Result<Vec<Library>, DeviceError> {
    let of_io = |error: io::Error| match Errno::from_io_error(&error) {
        Some(Errno::NOENT | Errno::SRCH) => DeviceError::NoProcess(pid),
        Some(Errno::ACCESS | Errno::PERM) => {
            DeviceError::Denied(format!("looking at the mappings of process {pid}: {error}"))
        }
        _ => DeviceError::Failed(format!("looking at the mappings of process {pid}: {error}")),
    };
    let mut last = Errno::NOENT;
    for _ in 0..LOOKS {
        let maps = fs::read(format!("/proc/{pid}/maps")).map_err(of_io)?;
        let opened: Result<Vec<Library>, OpenError> = code_of(&maps, prefix)
            .into_iter()
            .map(|range| open_mapped(pid, &range))
            .collect();
        match opened {
            Ok(mut libraries) => {
                libraries.sort_by_key(|library| library.id);
                libraries.dedup_by_key(|library| library.id);
                return Ok(libraries);
            }
            Err(OpenError::Refused(reason)) => return Err(DeviceError::Unsupported(reason)),
            // Unmapped or mapped anew since it was read.
            Err(OpenError::System(errno @ (Errno::NOENT | Errno::SRCH))) => last = errno,
            Err(OpenError::System(errno)) => return Err(of_io(errno.into())),
        }
    }
    // A process that ended has no mappings to read.
    fs::metadata(format!("/proc/{pid}/maps")).map_err(of_io)?;
    Err(DeviceError::Failed(format!(
        "the mappings of process {pid} change while they are looked at: {last}"
    )))
}

#[derive(Debug)]
enum OpenError {
    Refused(String),
    System(Errno),
}

impl From<Errno> for OpenError {
    fn from(errno: Errno) -> Self {
        Self::System(errno)
    }
}

/// Opens what is mapped at `range` of a process.
fn open_mapped(pid: u32, range: &str) -> Result<Library, OpenError> {
    let link = format!("/proc/{pid}/map_files/{range}");
    // Without opening what it is: to open a device can have effects.
    let place = open(link, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let status = fstat(&place)?;
    if FileType::from_raw_mode(status.st_mode) != FileType::RegularFile {
        let reason = format!("what process {pid} has loaded as a library is no regular file");
        return Err(OpenError::Refused(reason));
    }
    // The kernel reads the code when it places a probe, under a lock of all
    // tracing. A file system in user space could make it wait for ever.
    if fstatfs(&place)?.f_type == FUSE_MAGIC {
        let reason = format!("the library of process {pid} is on a file system in user space");
        return Err(OpenError::Refused(reason));
    }
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOCTTY;
    let file = open(own_path(&place), flags, Mode::empty())?;
    Ok(Library {
        file: file.into(),
        id: LibraryId {
            device: status.st_dev,
            inode: status.st_ino,
        },
    })
}

/// A path to the file of a descriptor of ours.
pub(super) fn own_path(file: &impl AsFd) -> String {
    format!("/proc/self/fd/{}", file.as_fd().as_raw_fd())
}

/// Address ranges of code from files whose name begins with `prefix`, one a
/// file, from the text of proc_pid_maps(5).
fn code_of(maps: &[u8], prefix: &str) -> Vec<String> {
    let mut seen = BTreeSet::new();
    let mut found = Vec::new();
    for line in maps.split(|byte| *byte == b'\n') {
        // The name is the rest of the line. Only its beginning matters, and that
        // is plain; elsewhere it may be anything.
        let line = String::from_utf8_lossy(line);
        let mut fields = line.splitn(6, ' ');
        let (Some(range), Some(rights), Some(_), Some(device), Some(inode), Some(path)) = (
            fields.next(),
            fields.next(),
            fields.next(),
            fields.next(),
            fields.next(),
            fields.next(),
        ) else {
            continue;
        };
        let path = path.trim_start_matches(' ');
        let Some((_, name)) = path.rsplit_once('/') else {
            continue;
        };
        // Who only reads the file has not loaded it.
        let is_code = rights.as_bytes().get(2) == Some(&b'x');
        if is_code && name.starts_with(prefix) && seen.insert((device.to_owned(), inode.to_owned()))
        {
            found.push(range.to_owned());
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: &[u8] = b"\
55d0a0000000-55d0a0001000 r-xp 00000000 fd:00 77                         /srv/libcuda.so.d/app\n\
7f0000000000-7f0000001000 r--p 00000000 fd:00 1234                       /usr/lib/libcuda.so.580.65.06\n\
7f0000001000-7f0000002000 r-xp 00001000 fd:00 1234                       /usr/lib/libcuda.so.580.65.06\n\
7f0000002000-7f0000003000 r-xp 00003000 fd:00 1234                       /usr/lib/libcuda.so.580.65.06\n\
7f0000004000-7f0000005000 r-xp 00001000 fd:00 9                          /a b/\xff/libcuda.so.1 (deleted)\n\
7f0000006000-7f0000007000 r--p 00000000 fd:00 10                         /data/libcuda.so.1\n\
7f0000008000-7f0000009000 r-xp 00000000 fd:00 11                         /usr/lib/libcudart.so.12\n\
7f000000a000-7f000000b000 rw-p 00000000 00:00 0 \n\
7ffc00000000-7ffc00001000 r-xp 00000000 00:00 0                          [vdso]\n\
nonsense\n";

    #[test]
    fn code_of_a_library_is_found_once_a_file() {
        let found = code_of(MAPS, "libcuda.so");
        assert_eq!(
            found,
            ["7f0000001000-7f0000002000", "7f0000004000-7f0000005000"]
        );
        assert!(code_of(MAPS, "libnone").is_empty());
        assert!(code_of(b"", "").is_empty());
    }

    #[test]
    fn a_process_that_is_gone_is_said_to_be() {
        let error = libraries(u32::MAX, "lib").expect_err("no such process");
        assert_eq!(error, DeviceError::NoProcess(u32::MAX));
    }

    #[test]
    fn our_own_c_library_is_opened() {
        match libraries(std::process::id(), "libc.so") {
            Ok(libraries) => {
                let file = &libraries.first().expect("std is linked to it").file;
                let found = super::super::elf::functions(file, &["malloc", "no_such_function"]);
                let found = found.expect("it is a library");
                assert_eq!(found.len(), 1);
                assert_eq!(found[0].name, 0);
            }
            Err(error) => {
                assert!(matches!(error, DeviceError::Denied(_)), "{error}");
                eprintln!("not run: {error}");
            }
        }
    }
}
