//! The arguments: which commands there are and what each takes.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::launch::LaunchArguments;
use crate::output::Style;
use crate::run::RunArguments;
use crate::select::Selection;

/// Shown below the list of commands.
const TARGETS: &str = "\
A TARGET is a process (PID, or PID/GPU where it uses several GPUs), the name of a workload, or \
the path of a directory below the mount point: devices/0, partitions/0/a, processes/1234/0, \
workloads/noisy, or / for the mount point itself.

Exit status: 0, 1 where a command failed, 2 where its arguments were wrong. 'run' has that of its \
COMMAND, 126 where that cannot be executed and 127 where it is not found.";

/// Shown below the options of `freeze` and `thaw`.
const SELECTORS: &str = "\
Names, --tree and --cgroup may stand together; all that they name changes in one step, or \
nothing does. A process whose parent has ended is in no tree any more; its control group does \
not change.

Example: gcgroup freeze --cgroup /system.slice/docker-4f1c.scope";

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
    /// Lists the processes on the GPUs, how each is controlled, and what that costs.
    #[command(after_help = "Example: gcgroup ls --long")]
    Ls {
        /// Adds the partition, compute.max, ended kernels, GPU time and the control group.
        #[arg(short, long)]
        long: bool,
        #[command(flatten)]
        output: OutputArguments,
    },
    /// Reads control files; all that can be read where none is named.
    #[command(after_help = "Example: gcgroup get 1234 gcgroup.stat")]
    Get {
        /// What to read from.
        target: String,
        /// Names of control files.
        file: Vec<String>,
        #[command(flatten)]
        output: OutputArguments,
    },
    /// Writes a control file, in one write.
    #[command(after_help = "Example: gcgroup set 1234 compute.max 30000 100000")]
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
    #[command(after_help = SELECTORS)]
    Freeze(Selection),
    /// Lets frozen processes run; several of them in one step, all or none.
    #[command(after_help = SELECTORS.replace("gcgroup freeze", "gcgroup thaw"))]
    Thaw(Selection),
    /// Starts a program with settings that wait for its first GPU context.
    #[command(after_help = "\
The settings come into force with the first GPU context of the program, or of one that it starts. \
The program takes the place of gcgroup and keeps its pid.

Example: gcgroup run --priority 12 --max '30000 100000' -- python train.py")]
    Run(RunArguments),
    /// Launches a workload and prints the service's answer, a JSON object.
    #[command(after_help = "Example: gcgroup launch --kernel fma_fp32 --name noisy")]
    Launch(LaunchArguments),
    /// Ends processes: a workload is asked first and killed after 500 ms, others at once.
    #[command(after_help = "Example: gcgroup kill noisy")]
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
    #[command(after_help = "Example: gcgroup partition create a 64")]
    Create {
        /// [GPU/]NAME; the GPU is 0 if left out.
        partition: String,
        /// SMs, or 'max' for all that are free; a partition without SMs takes no members.
        sms: Option<String>,
        #[command(flatten)]
        output: OutputArguments,
    },
    /// Changes the number of SMs, with its members running.
    #[command(after_help = "Example: gcgroup partition resize a 32")]
    Resize {
        /// [GPU/]NAME; the GPU is 0 if left out.
        partition: String,
        /// SMs, or 'max' for all that are free.
        sms: String,
        #[command(flatten)]
        output: OutputArguments,
    },
    /// Removes partitions that have no members.
    #[command(after_help = "Example: gcgroup partition remove a")]
    Remove {
        /// [GPU/]NAME; the GPU is 0 if left out.
        #[arg(required = true)]
        partition: Vec<String>,
        #[command(flatten)]
        output: OutputArguments,
    },
    /// Lists partitions.
    #[command(after_help = "Example: gcgroup partition ls")]
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
            Self::Freeze(selection) | Self::Thaw(selection) => selection.output.style(),
            Self::Kill(targets) => targets.output.style(),
            // The answer of one is JSON and the output of the other is not ours;
            // their errors are for people.
            Self::Launch(_) | Self::Run(_) => Style::Text,
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
    fn every_command_shows_an_example_of_itself() {
        fn leaves(command: &clap::Command, path: &str, found: &mut Vec<(String, String)>) {
            for command in command.get_subcommands() {
                let path = format!("{path} {}", command.get_name());
                if command.has_subcommands() {
                    leaves(command, &path, found);
                } else {
                    let help = command.get_after_help().map(ToString::to_string);
                    found.push((path, help.unwrap_or_default()));
                }
            }
        }
        let mut found = Vec::new();
        leaves(&Arguments::command(), "gcgroup", &mut found);
        assert!(found.len() > 8, "{found:?}");
        for (path, help) in found {
            let example = help.split("Example: ").nth(1).unwrap_or_default();
            assert!(example.starts_with(&path), "{path}: {help:?}");
            // The words as a shell without blanks in its quotes would have them.
            let words = example.replace("'30000 100000'", "30000");
            let parsed = Arguments::try_parse_from(words.split(' '));
            assert!(parsed.is_ok(), "{example}: {parsed:?}");
        }
    }

    #[test]
    fn freeze_takes_names_trees_or_control_groups_but_not_nothing() {
        let parse = |words: &[&str]| {
            Arguments::try_parse_from(["gcgroup", "freeze"].iter().chain(words)).is_ok()
        };
        for words in [
            &["1"][..],
            &["--tree", "1"],
            &["--cgroup", "/a", "--tree", "1", "noisy", "--cgroup", "/b"],
        ] {
            assert!(parse(words), "{words:?}");
        }
        for words in [&[][..], &["--json"], &["--tree", "x"], &["--cgroup"]] {
            assert!(!parse(words), "{words:?}");
        }
    }

    #[test]
    fn the_words_of_a_program_are_its_own() {
        let parsed = Arguments::try_parse_from([
            "gcgroup", "run", "--freeze", "python", "-c", "1", "--root", "x", "--", "--json",
        ])
        .expect("what follows the command is the command's");
        assert_eq!(parsed.root, None);
        match parsed.command {
            Command::Run(run) => {
                assert_eq!(
                    run.command,
                    ["python", "-c", "1", "--root", "x", "--", "--json"]
                );
            }
            other => panic!("{other:?}"),
        }
        for words in [
            &["run"][..],
            &["run", "--"],
            &["run", "--priority", "16", "true"],
            &["run", "--priority", "-1", "true"],
            &["run", "--max", "1", "true"],
            &["run", "--max", "30000 5", "true"],
            &["run", "--frozen", "true"],
        ] {
            let parsed = Arguments::try_parse_from(["gcgroup"].iter().chain(words));
            assert!(parsed.is_err(), "{words:?}");
        }
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
