//! Carries out a command; `get`, `set` and `partition` in this file.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use gcgroup_model::value::Switch;
use gcgroup_model::{File, Grammar, Place, Row};
use serde_json::{Map, Value, json};

use crate::args::{Command, PartitionCommand};
use crate::explain;
use crate::failure::Failure;
use crate::launch;
use crate::list::{self, Width};
use crate::output::{self, Align, Style, Table};
use crate::process;
use crate::run;
use crate::target::Target;
use crate::tree::{Tree, below};

/// Runs a command on the tree at `root`.
///
/// # Errors
/// Whatever keeps it from being done.
pub(crate) fn run(command: &Command, root: &Path, out: &mut dyn Write) -> Result<(), Failure> {
    let tree = &Tree::open(root)?;
    let style = command.style();
    match command {
        Command::Ls { long, .. } => {
            let width = if *long { Width::Long } else { Width::Short };
            list::run(tree, width, style, out)
        }
        Command::Get { target, file, .. } => get(tree, target, file, style, out),
        Command::Set {
            target,
            file,
            value,
            ..
        } => set(tree, target, file, &value.join(" "), style, out),
        Command::Freeze(selection) => process::freeze(tree, selection, Switch::On, style, out),
        Command::Thaw(selection) => process::freeze(tree, selection, Switch::Off, style, out),
        Command::Run(arguments) => run::run(tree, arguments),
        Command::Kill(targets) => process::kill(tree, &targets.target, style, out),
        Command::Launch(arguments) => launch::run(tree, arguments, out),
        Command::Partition(command) => partition(tree, command, style, out),
    }
}

/// Reads the named files, or all that can be read.
fn get(
    tree: &Tree,
    target: &str,
    names: &[String],
    style: Style,
    out: &mut dyn Write,
) -> Result<(), Failure> {
    let target = Target::find(tree, target)?;
    let mut contents: Vec<(&Row, String)> = Vec::new();
    if names.is_empty() {
        for row in target.rows() {
            // A spec's file is a conversation: there is nothing to read alone.
            if row.mode.readable() && row.grammar != Grammar::Spec {
                let directory = target.directory_of(row)?;
                if let Some(text) = tree.read_if_there(&directory, row)? {
                    contents.push((row, text));
                }
            }
        }
    }
    for name in names {
        let row = target.row(name)?;
        let directory = target.directory_of(row)?;
        if !row.mode.readable() {
            return Err(refused(tree, &directory, row, "can only be written"));
        }
        contents.push((row, tree.read(&directory, row)?));
    }
    match (style, contents.as_slice()) {
        (Style::Json, _) => {
            let files: Map<String, Value> = contents
                .iter()
                .map(|(row, text)| (row.name.to_owned(), output::value(row, text)))
                .collect();
            output::json(&Value::Object(files), out)
        }
        // One file looks as cat shows it.
        (Style::Text, [(_, text)]) if names.len() == 1 => output::line(text, out),
        (Style::Text, contents) => contents
            .iter()
            .try_for_each(|(row, text)| titled(row.name, text, out)),
    }
}

/// A name and its content, below it where that has several lines.
fn titled(name: &str, text: &str, out: &mut dyn Write) -> Result<(), Failure> {
    if text.contains('\n') {
        output::line(&format!("{name}:"), out)?;
        text.lines()
            .try_for_each(|line| output::line(&format!("  {line}"), out))
    } else {
        output::line(format!("{name}: {text}").trim_end(), out)
    }
}

fn set(
    tree: &Tree,
    target: &str,
    name: &str,
    value: &str,
    style: Style,
    out: &mut dyn Write,
) -> Result<(), Failure> {
    let target = Target::find(tree, target)?;
    let row = target.row(name)?;
    let directory = target.directory_of(row)?;
    if !row.mode.writable() {
        return Err(refused(tree, &directory, row, "can only be read"));
    }
    tree.write(&directory, row, value)?;
    if style == Style::Text {
        return Ok(());
    }
    // What was granted may be more than what was asked for.
    let now = if row.mode.readable() {
        tree.read_if_there(&directory, row)?
    } else {
        None
    };
    let now = now.map(|text| output::value(row, &text));
    output::json(
        &json!({"file": directory.join(row.name), "written": value, "value": now}),
        out,
    )
}

/// The row itself says that it cannot be done.
fn refused(tree: &Tree, directory: &Path, row: &Row, sentence: &str) -> Failure {
    Failure::File {
        path: tree.root().join(directory).join(row.name),
        errno: None,
        sentence: sentence.to_owned(),
    }
}

fn partition(
    tree: &Tree,
    command: &PartitionCommand,
    style: Style,
    out: &mut dyn Write,
) -> Result<(), Failure> {
    match command {
        PartitionCommand::Create { partition, sms, .. } => {
            let partition = PartitionName::parse(partition)?;
            create(tree, &partition, sms.as_deref())?;
            granted(tree, &partition, style, out)
        }
        PartitionCommand::Resize { partition, sms, .. } => {
            let partition = PartitionName::parse(partition)?;
            tree.write(&partition.directory(), File::SmCount.row(), sms)?;
            granted(tree, &partition, style, out)
        }
        PartitionCommand::Remove { partition, .. } => {
            for text in partition {
                let path = tree.root().join(PartitionName::parse(text)?.directory());
                fs::remove_dir(&path).map_err(|error| explain::remove_partition(&path, &error))?;
            }
            match style {
                Style::Text => Ok(()),
                Style::Json => output::json(&json!({"removed": partition}), out),
            }
        }
        PartitionCommand::Ls { .. } => list_partitions(tree, style, out),
    }
}

/// A partition on one GPU as the user named it.
#[derive(Debug, PartialEq, Eq)]
struct PartitionName {
    gpu: u32,
    name: String,
}

impl PartitionName {
    fn parse(text: &str) -> Result<Self, Failure> {
        let wrong = || Failure::Wrong(format!("{text:?} is not a partition; name it [GPU/]NAME"));
        let (gpu, name) = match text.split_once('/') {
            Some((gpu, name)) => (gpu.parse().map_err(|_| wrong())?, name),
            None => (0, text),
        };
        // Neither may lead out of the GPU's directory; what else a name may be
        // the service says.
        if name.is_empty() || name.contains('/') || name == "." || name == ".." {
            return Err(wrong());
        }
        Ok(Self {
            gpu,
            name: name.to_owned(),
        })
    }

    fn directory(&self) -> PathBuf {
        below(Place::Partition, &[&self.gpu.to_string(), &self.name])
    }
}

/// Makes a partition with its SMs, or none at all.
fn create(tree: &Tree, partition: &PartitionName, sms: Option<&str>) -> Result<(), Failure> {
    let path = tree.root().join(partition.directory());
    fs::create_dir(&path).map_err(|error| explain::make_partition(&path, &error))?;
    let Some(sms) = sms else {
        return Ok(());
    };
    let sized = tree.write(&partition.directory(), File::SmCount.row(), sms);
    if sized.is_err() {
        // The reason why there are no SMs is the one worth telling.
        let _ = fs::remove_dir(&path);
    }
    sized
}

/// Tells what a partition was granted, which may be more than was asked for.
fn granted(
    tree: &Tree,
    partition: &PartitionName,
    style: Style,
    out: &mut dyn Write,
) -> Result<(), Failure> {
    let document = describe_partition(tree, partition)?;
    match style {
        Style::Json => output::json(&document, out),
        Style::Text => output::line(
            &format!(
                "{}/{}: {} SMs",
                partition.gpu, partition.name, document["sm_count"]
            ),
            out,
        ),
    }
}

fn describe_partition(tree: &Tree, partition: &PartitionName) -> Result<Value, Failure> {
    let directory = partition.directory();
    let content = |file: File| -> Result<Value, Failure> {
        let text = tree.read(&directory, file.row())?;
        Ok(output::value(file.row(), &text))
    };
    Ok(json!({
        "gpu": partition.gpu,
        "name": partition.name,
        "sm_count": content(File::SmCount)?,
        "sm_groups": content(File::SmGroups)?,
        "members": content(File::PartitionMembers)?,
    }))
}

fn list_partitions(tree: &Tree, style: Style, out: &mut dyn Write) -> Result<(), Failure> {
    let mut documents = Vec::new();
    for (gpu, name) in tree.partitions()? {
        match describe_partition(tree, &PartitionName { gpu, name }) {
            Ok(document) => documents.push(document),
            // Removed meanwhile.
            Err(failure) if failure.is_gone() => {}
            Err(failure) => return Err(failure),
        }
    }
    if style == Style::Json {
        return output::json(&Value::from(documents), out);
    }
    let mut table = Table::new(&[
        ("GPU", Align::Right),
        ("NAME", Align::Left),
        ("SMS", Align::Right),
        ("MEMBERS", Align::Left),
    ]);
    for document in &documents {
        let members = document["members"].as_array().map_or_else(
            || document["members"].to_string(),
            |pids| {
                let pids: Vec<String> = pids.iter().map(Value::to_string).collect();
                if pids.is_empty() {
                    "-".to_owned()
                } else {
                    pids.join(",")
                }
            },
        );
        table.push(vec![
            document["gpu"].to_string(),
            document["name"].as_str().unwrap_or_default().to_owned(),
            document["sm_count"].to_string(),
            members,
        ]);
    }
    table.print(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partition_is_on_gpu_0_unless_another_is_named() {
        let parse = |text| PartitionName::parse(text).map(|name| (name.gpu, name.name));
        assert_eq!(parse("a").expect("a name"), (0, "a".to_owned()));
        assert_eq!(parse("1/a").expect("a GPU and a name"), (1, "a".to_owned()));
        for wrong in ["", "/", "1/", "x/a", "1/../a", "1/..", "..", "."] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn names_of_partitions_are_left_to_the_service() {
        assert!(PartitionName::parse("NOT allowed").is_ok());
    }
}
