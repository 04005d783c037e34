//! Reading and writing a control file as programs do: one write(2) is one
//! command, and errors are errnos.

use std::path::Path;

use rustix::fd::OwnedFd;
use rustix::fs::{Mode, OFlags, open};
use rustix::io::{Errno, read as read_once, write as write_once};

/// Opens a file.
///
/// # Errors
/// That of open(2).
pub fn open_with(path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
    open(path, flags | OFlags::CLOEXEC, Mode::empty())
}

/// The content of a file up to its end, as one descriptor gives it.
///
/// # Errors
/// That of open(2) or read(2).
///
/// # Panics
/// When the content is not UTF-8.
pub fn read(path: &Path) -> Result<String, Errno> {
    read_from(&open_with(path, OFlags::RDONLY)?)
}

/// What a descriptor still gives, up to its end.
///
/// # Errors
/// That of read(2).
///
/// # Panics
/// When the content is not UTF-8.
pub fn read_from(file: &OwnedFd) -> Result<String, Errno> {
    let mut content = Vec::new();
    let mut buffer = vec![0_u8; 64 * 1024];
    loop {
        match read_once(file, &mut buffer)? {
            0 => return Ok(String::from_utf8(content).expect("control files hold UTF-8")),
            count => content.extend_from_slice(&buffer[..count]),
        }
    }
}

/// Writes with exactly one write(2), without O_TRUNC.
///
/// # Errors
/// That of open(2) or write(2).
pub fn write(path: &Path, bytes: impl AsRef<[u8]>) -> Result<(), Errno> {
    write_with(path, OFlags::WRONLY, bytes)
}

/// Writes with exactly one write(2) after an open with these flags.
///
/// # Errors
/// That of open(2) or write(2).
pub fn write_with(path: &Path, flags: OFlags, bytes: impl AsRef<[u8]>) -> Result<(), Errno> {
    write_to(&open_with(path, flags)?, bytes)
}

/// Writes to a descriptor with exactly one write(2).
///
/// # Errors
/// That of write(2).
///
/// # Panics
/// When fewer bytes were taken than were given: one write is one command.
pub fn write_to(file: &OwnedFd, bytes: impl AsRef<[u8]>) -> Result<(), Errno> {
    let bytes = bytes.as_ref();
    let count = write_once(file, bytes)?;
    assert_eq!(count, bytes.len(), "a write was taken in part");
    Ok(())
}

/// Names in a directory, sorted.
///
/// # Panics
/// When it cannot be read.
#[track_caller]
#[must_use]
pub fn names(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).expect("the directory is there");
    let mut names: Vec<_> = entries
        .map(|entry| {
            let name = entry.expect("the directory can be read").file_name();
            name.into_string().expect("names are ASCII")
        })
        .collect();
    names.sort();
    names
}
