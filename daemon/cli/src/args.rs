//! The arguments: which commands there are and what each takes.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::launch::LaunchArguments;
use crate::output::Style;

/// Shown below the list of commands.
const TARGETS: &str = "\
A TARGET is a process (PID, or PID/GPU where it uses several GPUs), the name of a workload, or the
path of a directory below the mount point: devices/0, partitions/0/a, processes/1234/0,
workloads/noisy, or / for the mount point itself.

Exit status: 0, 1 where a command failed, 2 where its arguments were wrong.";

/// Reads and writes the control files of processes on NVIDIA GPUs.
#[derive(Debug, Parser)]
#[command(name = "gcgroup", version, after_help = TARGETS, max_term_width = 100)]
pub(crate) struct Arguments {
    /// Directory that gcgroupd is mounted at [default: $GCGROUP_ROOT, else /run/gcgroup].
    #[arg(long, global = true, value_name = "DIR", display_order = 1000)]
    pub(crate) root: Option<PathBuf>,
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Lists processes, one line for each GPU that they use.
    Ls {
        /// Adds the user, the control group and the GPU time.
        #[arg(short, long)]
        long: bool,
        #[command(flatten)]
        output: OutputArguments,
    },
    /// Reads control files; all that can be read where none is named.
    Get {
        /// What to read from.
        target: String,
        /// Names of control files.
        file: Vec<String>,
        #[command(flatten)]
        output: OutputArguments,
    },
    /// Writes a control file, in one write.
    Set {
        /// What to write to.
        target: String,
        /// Name of the control file.
        file: String,
        /// The value; several words are joined by one space.
        #[arg(required = true, allow_negative_numbers = true)]
        value: Vec<String>,
        #[command(flatten)]
        output: OutputArguments,
    },
    /// Stops processes on the GPU; several of them in one step, all or none.
    Freeze(Targets),
    /// Lets frozen processes run; several of them in one step, all or none.
    Thaw(Targets),
    /// Launches a workload and prints the service's answer, a JSON object.
    Launch(LaunchArguments),
    /// Ends processes: asks first, kills after 500 ms.
    Kill(Targets),
    /// Makes, resizes, removes and lists SM partitions.
    #[command(subcommand)]
    Partition(PartitionCommand),
}

/// One or more processes.
#[derive(Debug, Args)]
pub(crate) struct Targets {
    /// Processes or workloads.
    #[arg(required = true)]
    pub(crate) target: Vec<String>,
    #[command(flatten)]
    pub(crate) output: OutputArguments,
}

/// What can be done with partitions.
#[derive(Debug, Subcommand)]
pub(crate) enum PartitionCommand {
    /// Makes a partition.
    Create {
        /// [GPU/]NAME; the GPU is 0 if left out.
        partition: String,
        /// SMs, or 'max' for all that are free; a partition without SMs takes no members.
        sms: Option<String>,
        #[command(flatten)]
        output: OutputArguments,
    },
    /// Changes the number of SMs, with its members running.
    Resize {
        /// [GPU/]NAME; the GPU is 0 if left out.
        partition: String,
        /// SMs, or 'max' for all that are free.
        sms: String,
        #[command(flatten)]
        output: OutputArguments,
    },
    /// Removes partitions that have no members.
    Remove {
        /// [GPU/]NAME; the GPU is 0 if left out.
        #[arg(required = true)]
        partition: Vec<String>,
        #[command(flatten)]
        output: OutputArguments,
    },
    /// Lists partitions.
    Ls {
        #[command(flatten)]
        output: OutputArguments,
    },
}

/// How output looks.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct OutputArguments {
    /// Prints one JSON document, also for errors.
    #[arg(long)]
    json: bool,
}

impl OutputArguments {
    /// The style that was asked for.
    pub(crate) fn style(self) -> Style {
        if self.json { Style::Json } else { Style::Text }
    }
}

impl Command {
    /// The style that was asked for.
    pub(crate) fn style(&self) -> Style {
        match self {
            Self::Ls { output, .. } | Self::Get { output, .. } | Self::Set { output, .. } => {
                output.style()
            }
            Self::Freeze(targets) | Self::Thaw(targets) | Self::Kill(targets) => {
                targets.output.style()
            }
            // Its answer is JSON, its errors are for people.
            Self::Launch(_) => Style::Text,
            Self::Partition(
                PartitionCommand::Create { output, .. }
                | PartitionCommand::Resize { output, .. }
                | PartitionCommand::Remove { output, .. }
                | PartitionCommand::Ls { output },
            ) => output.style(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_arguments_are_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn words_of_a_value_and_negative_numbers_are_values() {
        let parsed = Arguments::try_parse_from(["gcgroup", "set", "1", "x", "-1", "2"])
            .expect("a value may be negative; the file refuses it");
        match parsed.command {
            Command::Set { value, .. } => assert_eq!(value, ["-1", "2"]),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_root_may_follow_the_command() {
        let parsed =
            Arguments::try_parse_from(["gcgroup", "ls", "--root", "/x"]).expect("--root is global");
        assert_eq!(parsed.root, Some(PathBuf::from("/x")));
    }
}
