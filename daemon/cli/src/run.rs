//! `run`: settings that wait for the first GPU context of a program, then the
//! program itself.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use clap::Args;
use gcgroup_model::File;
use gcgroup_model::change::{Pending, Setting};
use gcgroup_model::value::{Priority, Quota, Switch};

use crate::explain;
use crate::failure::Failure;
use crate::tree::Tree;

/// A program and its settings.
#[derive(Clone, Debug, Args)]
pub(crate) struct RunArguments {
    /// Priority from 0, the most important, to 15, the least; 8 where nobody says.
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    priority: Option<Priority>,
    /// Time on the GPU in each period, both in microseconds; 'max' for all of it.
    #[arg(long, value_name = "QUOTA [PERIOD]", allow_negative_numbers = true)]
    max: Option<Quota>,
    /// Stops it on the GPU from its first context on, until 'gcgroup thaw'.
    #[arg(long)]
    freeze: bool,
    /// The program and its arguments.
    #[arg(required = true, trailing_var_arg = true, value_names = ["COMMAND", "ARG"])]
    pub(crate) command: Vec<OsString>,
}

impl RunArguments {
    /// What was asked for, in the order of the table of control files.
    fn settings(&self) -> Vec<Setting> {
        let freeze = self.freeze.then_some(Setting::Freeze(Switch::On));
        [
            self.priority.map(Setting::Priority),
            freeze,
            self.max.map(Setting::Max),
        ]
        .into_iter()
        .flatten()
        .collect()
    }
}

/// Leaves the settings for this process and becomes the program. Settings that
/// were left end with the process where it cannot.
///
/// # Errors
/// When a setting is refused or the program cannot be executed; on success it
/// does not return.
pub(crate) fn run(tree: &Tree, arguments: &RunArguments) -> Result<(), Failure> {
    let Some((program, words)) = arguments.command.split_first() else {
        return Err(Failure::Wrong("there is no command to run".to_owned()));
    };
    let pid = std::process::id();
    for setting in arguments.settings() {
        let pending = Pending { pid, setting };
        tree.write(Path::new(""), File::Pending.row(), &pending.to_string())?;
    }
    let error = Command::new(program).args(words).exec();
    Err(explain::not_started(program, &error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::FromArgMatches;

    fn parse(words: &[&str]) -> RunArguments {
        let command = RunArguments::augment_args(clap::Command::new("run").no_binary_name(true));
        let matches = command.try_get_matches_from(words);
        let matches = matches.expect("the words are arguments");
        RunArguments::from_arg_matches(&matches).expect("the words are arguments")
    }

    #[test]
    fn each_option_is_one_setting() {
        assert!(parse(&["true"]).settings().is_empty());
        let settings = parse(&[
            "--max",
            "30000",
            "--priority",
            "3",
            "--freeze",
            "--",
            "true",
            "--freeze",
        ])
        .settings();
        let written: Vec<_> = settings
            .into_iter()
            .map(|setting| Pending { pid: 7, setting }.to_string())
            .collect();
        assert_eq!(
            written,
            [
                format!("7 {} 3", File::Priority.name()),
                format!("7 {} 1", File::Freeze.name()),
                format!("7 {} 30000 100000", File::Max.name()),
            ]
        );
    }
}
