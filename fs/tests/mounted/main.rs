//! The mounted control files, driven from outside through system calls. The
//! service behind them is a small one of the tests' own.
//!
//! These tests mount, so they need root and /dev/fuse; without, each says that it
//! was skipped.

mod changes;
mod files;
mod fixture;
mod launch;
mod life;
mod poll;
mod waiting;
