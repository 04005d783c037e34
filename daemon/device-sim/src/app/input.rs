//! Standard input as lines, for a program that does other things meanwhile.

use std::io::IsTerminal;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::io::Errno;
use rustix::process::getpgrp;

/// The longest line that is understood, bytes.
const LONGEST: usize = 4096;

/// What was read and is no whole line yet.
pub(super) struct Input {
    open: bool,
    bytes: Vec<u8>,
}

impl Input {
    pub(super) fn new() -> Self {
        Self {
            // The shell stops a program in the background that reads its terminal.
            open: !std::io::stdin().is_terminal() || in_foreground(),
            bytes: Vec::new(),
        }
    }

    pub(super) fn is_open(&self) -> bool {
        self.open
    }

    /// What to wait on, while there is more to come.
    pub(super) fn descriptor(&self) -> Option<BorrowedFd<'static>> {
        self.open.then(rustix::stdio::stdin)
    }

    /// Takes what is there; waits where nothing is.
    pub(super) fn read(&mut self) {
        let mut buffer = [0; LONGEST];
        match rustix::io::read(rustix::stdio::stdin().as_fd(), &mut buffer) {
            Ok(0) => self.open = false,
            Ok(length) => self.bytes.extend_from_slice(&buffer[..length]),
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(_) => self.open = false,
        }
    }

    /// The whole lines that were read, or why they are none.
    pub(super) fn lines(&mut self) -> Vec<Result<String, String>> {
        let mut lines = Vec::new();
        while let Some(end) = self.bytes.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.bytes.drain(..=end).collect();
            let line = String::from_utf8(line[..end].to_vec());
            lines.push(line.map_err(|_| "a line is UTF-8".to_owned()));
        }
        if self.bytes.len() > LONGEST {
            self.bytes.clear();
            lines.push(Err(format!("a line has at most {LONGEST} bytes")));
        }
        lines
    }
}

/// Whether this process is in the group that its terminal talks to.
fn in_foreground() -> bool {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // The name in brackets is field 2 and may have spaces; tpgid is field 8.
    let after_name = stat.rfind(')').map_or("", |end| &stat[end..]);
    let group = after_name.split(' ').nth(6);
    group == Some(&getpgrp().as_raw_nonzero().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_cut_where_they_end_and_not_before() {
        let mut input = Input {
            open: true,
            bytes: b"go\npause\nco".to_vec(),
        };
        assert_eq!(input.lines(), [Ok("go".to_owned()), Ok("pause".to_owned())]);
        assert!(input.lines().is_empty());
        input.bytes.extend_from_slice(b"unt\n\xff\n");
        let lines = input.lines();
        assert_eq!(lines[0], Ok("count".to_owned()));
        assert!(lines[1].is_err());
        input.bytes = vec![b'x'; LONGEST + 1];
        assert_eq!(input.lines().len(), 1);
        assert!(input.lines().is_empty());
    }
}
