//! What open files and directories remember.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use gcgroup_model::File;
use parking_lot::{Mutex, RwLock};

use crate::launch::Stream;
use crate::tree::{Directory, Kind};

/// An open file whose text is rendered for it.
#[derive(Debug)]
pub(crate) struct Rendered {
    /// Directory that holds the file.
    pub(crate) directory: Directory,
    /// Which file.
    pub(crate) file: File,
    /// Text as this open file knows it.
    pub(crate) text: Mutex<Text>,
}

/// Text of one open file.
#[derive(Debug, Default)]
pub(crate) struct Text {
    /// As rendered for the last read at offset 0. Later offsets are served from
    /// it, so that a read in pieces is never torn.
    pub(crate) read: Option<String>,
    /// As compared for the last poll(2): waiters are woken for another text only,
    /// not for each snapshot while nobody reads. `None` in it is a gone directory.
    pub(crate) polled: Option<Option<String>>,
}

/// One name of a listed directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Listed {
    /// Inode number.
    pub(crate) ino: u64,
    /// Directory, file or link.
    pub(crate) kind: Kind,
    /// Its name.
    pub(crate) name: String,
}

/// Anything open.
#[derive(Clone, Debug)]
pub(crate) enum Open {
    /// A file whose text is rendered.
    Rendered(Arc<Rendered>),
    /// gcgroup.launch.
    Stream(Arc<Stream>),
    /// A directory, listed when it is read from its beginning.
    Directory(Directory, Arc<Mutex<Arc<[Listed]>>>),
}

/// Everything that is open, by handle.
#[derive(Debug, Default)]
pub(crate) struct Handles {
    next: AtomicU64,
    open: RwLock<HashMap<u64, Open>>,
}

impl Handles {
    /// Gives `open` a handle, which is never used twice.
    pub(crate) fn add(&self, open: Open) -> u64 {
        let handle = self.next.fetch_add(1, Ordering::Relaxed);
        self.open.write().insert(handle, open);
        handle
    }

    /// What the handle stands for.
    pub(crate) fn get(&self, handle: u64) -> Option<Open> {
        self.open.read().get(&handle).cloned()
    }

    /// It was closed for good.
    pub(crate) fn remove(&self, handle: u64) {
        self.open.write().remove(&handle);
    }
}

/// The part of `text` that a read of `size` bytes at `offset` sees.
pub(crate) fn part(text: &[u8], offset: u64, size: usize) -> &[u8] {
    let from = usize::try_from(offset)
        .unwrap_or(usize::MAX)
        .min(text.len());
    let to = from.saturating_add(size).min(text.len());
    &text[from..to]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_end_with_the_text() {
        assert_eq!(part(b"abcdef", 0, 4), b"abcd");
        assert_eq!(part(b"abcdef", 4, 4), b"ef");
        assert_eq!(part(b"abcdef", 6, 4), b"");
        assert_eq!(part(b"abcdef", u64::MAX, usize::MAX), b"");
        assert_eq!(part(b"abcdef", 1, usize::MAX), b"bcdef");
    }
}
