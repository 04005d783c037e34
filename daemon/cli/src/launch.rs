//! `launch`: a flag for each field of the spec, and the answer.

use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::path::Path;

use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches, value_parser};
use gcgroup_model::spec::{FIELDS, Field, FieldKind};
use gcgroup_model::{File, Grammar};
use rustix::io::Errno;
use serde_json::{Map, Value};

use crate::explain;
use crate::failure::Failure;
use crate::output;
use crate::tree::Tree;

/// Flag that takes a whole spec.
const WHOLE: &str = "json";

/// The spec to launch.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum LaunchArguments {
    /// Fields that were given as flags.
    Fields(Map<String, Value>),
    /// A file with the whole spec, `-` for standard input.
    File(String),
}

impl Args for LaunchArguments {
    fn augment_args(command: Command) -> Command {
        let command = FIELDS
            .iter()
            .fold(command, |command, field| command.arg(flag(field)));
        command.arg(
            Arg::new(WHOLE)
                .long(WHOLE)
                .value_name("FILE")
                .conflicts_with_all(FIELDS.iter().map(|field| field.name))
                .help("File with the spec as one JSON object, '-' for standard input."),
        )
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

fn flag(field: &'static Field) -> Arg {
    let flag = Arg::new(field.name)
        .long(field.name.replace('_', "-"))
        .help(field.manual)
        .action(ArgAction::Set);
    match field.kind {
        FieldKind::Text => flag.value_name("TEXT"),
        FieldKind::Number => flag.value_name("N").value_parser(value_parser!(u64)),
        FieldKind::Flag => flag
            .value_name("true|false")
            .num_args(0..=1)
            .default_missing_value("true")
            .hide_possible_values(true)
            .value_parser(value_parser!(bool)),
        FieldKind::NumberOrText => flag.value_name("N|TEXT"),
    }
}

impl FromArgMatches for LaunchArguments {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        if let Some(file) = matches.get_one::<String>(WHOLE) {
            return Ok(Self::File(file.clone()));
        }
        let fields = FIELDS
            .iter()
            .filter_map(|field| Some((field.name.to_owned(), given(matches, field)?)));
        Ok(Self::Fields(fields.collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// The value of a flag as the spec has it.
fn given(matches: &ArgMatches, field: &Field) -> Option<Value> {
    let text = || matches.get_one::<String>(field.name);
    match field.kind {
        FieldKind::Text => text().map(|text| text.as_str().into()),
        FieldKind::Number => matches.get_one::<u64>(field.name).map(|n| (*n).into()),
        FieldKind::Flag => matches.get_one::<bool>(field.name).map(|on| (*on).into()),
        FieldKind::NumberOrText => text().map(|text| match text.parse::<u64>() {
            Ok(number) => number.into(),
            Err(_) => text.as_str().into(),
        }),
    }
}

/// Launches the workload and prints the service's answer.
///
/// # Errors
/// When the spec cannot be read, or with the field that the service refused.
pub(crate) fn run(
    tree: &Tree,
    arguments: &LaunchArguments,
    out: &mut dyn Write,
) -> Result<(), Failure> {
    let spec = match arguments {
        LaunchArguments::Fields(fields) => Value::Object(fields.clone()).to_string(),
        LaunchArguments::File(file) => read_spec(file)?,
    };
    let row = File::Launch.row();
    let path = tree.root().join(row.name);
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .map_err(|error| explain::write(&path, row, &spec, &error))?;
    let written = rustix::io::write(&file, spec.as_bytes());
    // The answer says more than the errno, and is there in both cases.
    let mut answer = String::new();
    let read = file.read_to_string(&mut answer);
    match (serde_json::from_str::<Value>(answer.trim()), written) {
        (Ok(answer), Ok(_)) if answer.get("error").is_none() => output::json(&answer, out),
        (Ok(answer), written) => Err(refused(&answer, written.err())),
        (Err(_), Err(errno)) => Err(explain::write(&path, row, &spec, &errno.into())),
        (Err(_), Ok(count)) => Err(unanswered(&path, &spec, count, read.err())),
    }
}

/// A whole spec, checked to be one complete object: the service waits for the
/// rest of an incomplete one.
fn read_spec(file: &str) -> Result<String, Failure> {
    let failed = |error: &dyn std::fmt::Display| Failure::File {
        path: file.into(),
        errno: None,
        sentence: error.to_string(),
    };
    let longest = Grammar::Spec.longest();
    let limit = u64::try_from(longest).unwrap_or(u64::MAX).saturating_add(1);
    let mut text = String::new();
    let read = if file == "-" {
        std::io::stdin()
            .lock()
            .take(limit)
            .read_to_string(&mut text)
    } else {
        std::fs::File::open(file).and_then(|file| file.take(limit).read_to_string(&mut text))
    };
    read.map_err(|error| failed(&error))?;
    let text = text.trim();
    if text.len() > longest {
        return Err(failed(&format!("longer than {longest} bytes")));
    }
    match serde_json::from_str::<Value>(text) {
        Ok(Value::Object(_)) => Ok(text.to_owned()),
        Ok(_) => Err(failed(&"not a JSON object")),
        Err(error) => Err(failed(&format!("not a JSON object: {error}"))),
    }
}

fn refused(answer: &Value, errno: Option<Errno>) -> Failure {
    let text = |key: &str| answer[key].as_str().unwrap_or_default().to_owned();
    Failure::Launch {
        field: text("field"),
        error: match text("error") {
            error if error.is_empty() => answer.to_string(),
            error => error,
        },
        errno,
    }
}

fn unanswered(path: &Path, spec: &str, written: usize, error: Option<std::io::Error>) -> Failure {
    let sentence = match error {
        Some(error) => format!("the answer cannot be read: {error}"),
        None if written < spec.len() => {
            format!("took only {written} of {} bytes", spec.len())
        }
        None => "gave no answer".to_owned(),
    };
    Failure::File {
        path: path.to_owned(),
        errno: None,
        sentence,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gcgroup_model::WorkloadSpec;
    use serde_json::json;

    fn parse(words: &[&str]) -> Result<LaunchArguments, clap::Error> {
        let command = LaunchArguments::augment_args(Command::new("launch").no_binary_name(true));
        let matches = command.try_get_matches_from(words)?;
        LaunchArguments::from_arg_matches(&matches)
    }

    #[test]
    fn help_lists_every_field_with_its_manual_line() {
        let mut command = LaunchArguments::augment_args(Command::new("launch")).term_width(10_000);
        let help = command.render_long_help().to_string();
        for field in FIELDS {
            let flag = format!("--{}", field.name.replace('_', "-"));
            assert!(help.contains(&flag), "{flag}");
            assert!(help.contains(field.manual), "{}", field.manual);
        }
    }

    #[test]
    fn flags_make_a_spec_that_the_model_accepts() {
        let words = [
            "--name",
            "noisy",
            "--kernel",
            "copy",
            "--bytes",
            "8G",
            "--blocks",
            "per-sm:2",
            "--threads",
            "1024",
            "--sliced",
            "false",
            "--compute-max",
            "20000 100000",
            "--priority",
            "10",
            "--partition",
            "be",
            "--duration",
            "30s",
        ];
        let LaunchArguments::Fields(fields) = parse(&words).expect("all are fields") else {
            panic!("no --json was given");
        };
        assert_eq!(
            Value::Object(fields.clone()),
            json!({
                "name": "noisy", "kernel": "copy", "bytes": "8G", "blocks": "per-sm:2",
                "threads": 1024, "sliced": false, "compute_max": "20000 100000",
                "priority": 10, "partition": "be", "duration": "30s",
            })
        );
        WorkloadSpec::parse(&Value::Object(fields).to_string()).expect("a spec");
    }

    #[test]
    fn a_number_where_text_is_possible_is_a_number() {
        let LaunchArguments::Fields(fields) =
            parse(&["--bytes", "4096", "--sliced"]).expect("both are fields")
        else {
            panic!("no --json was given");
        };
        assert_eq!(
            Value::Object(fields),
            json!({"bytes": 4096, "sliced": true})
        );
    }

    #[test]
    fn a_flag_of_another_type_or_beside_a_whole_spec_is_a_usage_error() {
        assert!(parse(&["--threads", "many"]).is_err());
        assert!(parse(&["--sliced", "perhaps"]).is_err());
        assert!(parse(&["--json", "x", "--kernel", "copy"]).is_err());
        assert!(parse(&["--no-such-field", "1"]).is_err());
    }

    #[test]
    fn an_incomplete_spec_is_not_sent() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("spec");
        for (text, complete) in [
            ("{\"kernel\":", false),
            ("[]", false),
            ("{} {}", false),
            ("{}\n", true),
        ] {
            std::fs::write(&path, text).expect("a file");
            let read = read_spec(path.to_str().expect("a plain path"));
            assert_eq!(read.is_ok(), complete, "{text}");
        }
    }
}
