//! `gcgroup`, the command line of gcgroupd.
//!
//! It speaks through the mounted control files only and has no privilege of
//! its own: what the files allow the caller, it allows. Which process descends
//! from which it reads in /proc. The names of the files, their grammars and the
//! flags of `launch` come from `gcgroup-model`.

mod args;
mod command;
mod explain;
mod failure;
mod launch;
mod list;
mod output;
mod proc;
mod process;
mod run;
mod select;
mod target;
mod tree;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

use args::Arguments;
use failure::Failure;

/// Where the service mounts unless it is told otherwise.
const DEFAULT_ROOT: &str = "/run/gcgroup";
/// Names the mount point where `--root` does not.
const ROOT_VARIABLE: &str = "GCGROUP_ROOT";

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let style = arguments.command.style();
    let root = arguments
        .root
        .or_else(|| std::env::var_os(ROOT_VARIABLE).map(PathBuf::from))
        .unwrap_or_else(|| PathBuf::from(DEFAULT_ROOT));
    let mut out = io::BufWriter::new(io::stdout().lock());
    let outcome = command::run(&arguments.command, &root, &mut out)
        .and_then(|()| out.flush().map_err(Failure::Output));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read the output has enough of it, as `head` does.
        Err(Failure::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => {
            ExitCode::SUCCESS
        }
        Err(failure) => {
            // What was printed before the failure is true and comes first.
            let _ = out.flush();
            // There is nowhere left to say that standard error is closed.
            let _ = output::failure(&failure, style, &mut io::stderr().lock());
            ExitCode::from(failure.exit_status())
        }
    }
}
