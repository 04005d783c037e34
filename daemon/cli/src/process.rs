//! `ls`, `freeze`, `thaw` and `kill`.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use gcgroup_model::value::{FreezeSet, Switch};
use gcgroup_model::{File, Place};
use serde_json::{Map, Value, json};

use crate::failure::Failure;
use crate::output::{self, Align, Style, Table};
use crate::target::Target;
use crate::tree::{EntryId, Tree, below};

/// Keys of the counters that `ls` shows; a test holds them against the model.
const KERNELS: &str = "nr_ended_kernels";
const SMS: &str = "sm_count";
const USAGE: &str = "usage_usec";

/// How much `ls` shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Width {
    /// What fits beside the settings.
    Short,
    /// The user, the control group and the GPU time too.
    Long,
}

/// Lists every process on each of its GPUs. One that ends meanwhile is left out.
///
/// # Errors
/// When the tree cannot be read or the output cannot be written.
pub(crate) fn list(
    tree: &Tree,
    width: Width,
    style: Style,
    out: &mut dyn Write,
) -> Result<(), Failure> {
    let names = tree.workloads()?;
    let mut documents = Vec::new();
    for id in tree.entries()? {
        if let Some(document) = describe(tree, id, names.get(&id))? {
            documents.push(document);
        }
    }
    if style == Style::Json {
        return output::json(&Value::from(documents), out);
    }
    let mut columns = vec![
        ("PID", Align::Right),
        ("GPU", Align::Right),
        ("NAME", Align::Left),
        ("PARTITION", Align::Left),
        ("SMS", Align::Right),
        ("PRIORITY", Align::Right),
        ("FROZEN", Align::Right),
        ("MAX", Align::Left),
        ("MEMORY", Align::Right),
        ("KERNELS", Align::Right),
    ];
    if width == Width::Long {
        columns.extend([
            ("UID", Align::Right),
            ("USAGE_USEC", Align::Right),
            ("CGROUP", Align::Left),
        ]);
    }
    let mut table = Table::new(&columns);
    for document in &documents {
        table.push(cells(document, width));
    }
    table.print(out)
}

/// Everything about an entry under stable keys; null where its file has no such
/// figure.
fn describe(tree: &Tree, id: EntryId, name: Option<&String>) -> Result<Option<Value>, Failure> {
    let process = below(Place::Process, &[&id.pid.to_string()]);
    let entry = id.directory();
    let content = |directory: &Path, file: File| -> Result<Value, Failure> {
        let text = tree.read_if_there(directory, file.row())?;
        Ok(text.map_or(Value::Null, |text| output::value(file.row(), &text)))
    };
    let events = content(&entry, File::Events)?;
    if events.is_null() {
        return Ok(None);
    }
    let stat = content(&entry, File::Stat)?;
    Ok(Some(json!({
        "pid": id.pid,
        "gpu": id.gpu,
        "name": name,
        "comm": content(&process, File::Comm)?,
        "uid": content(&process, File::Uid)?,
        "cgroup": content(&process, File::Cgroup)?,
        "partition": content(&entry, File::Partition)?,
        "sm_count": stat[SMS],
        "priority": content(&entry, File::Priority)?,
        "frozen": content(&entry, File::Freeze)?,
        "max": content(&entry, File::Max)?,
        "memory_current": content(&entry, File::MemoryCurrent)?,
        "memory_peak": content(&entry, File::MemoryPeak)?,
        "nr_ended_kernels": stat[KERNELS],
        "usage_usec": stat[USAGE],
        "events": events,
    })))
}

/// The cells of a line, a dash for what is not known.
fn cells(document: &Value, width: Width) -> Vec<String> {
    let cell = |key: &str| match &document[key] {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let name = if document["name"].is_null() {
        "comm"
    } else {
        "name"
    };
    // A blank would make two columns of it for awk and sort.
    let max = match cell("max") {
        max if max.starts_with("max") => "max".to_owned(),
        quota => quota.replace(' ', "/"),
    };
    let memory = match document["memory_current"].as_u64() {
        Some(count) => output::bytes(count),
        None => "-".to_owned(),
    };
    let mut cells = vec![
        cell("pid"),
        cell("gpu"),
        cell(name).replace(char::is_whitespace, "_"),
        cell("partition"),
        cell("sm_count"),
        cell("priority"),
        cell("frozen"),
        max,
        memory,
        cell("nr_ended_kernels"),
    ];
    if width == Width::Long {
        cells.extend([cell("uid"), cell("usage_usec"), cell("cgroup")]);
    }
    cells
}

/// Freezes or thaws. One entry is written to its own file; several processes,
/// or one on several GPUs, to the file that takes them in one step.
///
/// # Errors
/// When a target does not exist or the service refuses; then none has changed.
pub(crate) fn freeze(
    tree: &Tree,
    targets: &[String],
    state: Switch,
    style: Style,
    out: &mut dyn Write,
) -> Result<(), Failure> {
    let found = targets
        .iter()
        .map(|text| process(tree, text))
        .collect::<Result<Vec<_>, _>>()?;
    let mut pids: Vec<u32> = Vec::new();
    for (pid, _) in &found {
        if !pids.contains(pid) {
            pids.push(*pid);
        }
    }
    match found.as_slice() {
        [(_, Gpus::Some(entry))] => {
            tree.write(&entry.directory(), File::Freeze.row(), &state.to_string())?;
        }
        _ => {
            for (pid, gpus) in &found {
                whole(tree, *pid, *gpus)?;
            }
            let set = FreezeSet {
                state,
                pids: pids.clone(),
            };
            tree.write(Path::new(""), File::FreezeMany.row(), &set.to_string())?;
        }
    }
    match style {
        Style::Text => Ok(()),
        Style::Json => output::json(
            &json!({"frozen": u8::from(state.is_on()), "pids": pids}),
            out,
        ),
    }
}

/// Ends each target. A failure does not keep the others from being ended.
///
/// # Errors
/// When one of them could not be ended.
pub(crate) fn kill(
    tree: &Tree,
    targets: &[String],
    style: Style,
    out: &mut dyn Write,
) -> Result<(), Failure> {
    let mut failures = Vec::new();
    let mut killed = Vec::new();
    for text in targets {
        match end(tree, text) {
            Ok(pid) => killed.push(pid),
            Err(failure) => failures.push(failure),
        }
    }
    if style == Style::Json {
        let mut document = Map::new();
        document.insert("killed".into(), killed.into());
        output::json(&Value::Object(document), out)?;
    }
    let failed = failures.len();
    match (failures.pop(), failed) {
        (None, _) => Ok(()),
        (Some(failure), 1) => Err(failure),
        (Some(last), _) => {
            failures.push(last);
            for failure in &failures {
                // There is nowhere left to say that standard error is closed.
                let _ = output::failure(failure, style, &mut io::stderr().lock());
            }
            Err(Failure::Several {
                failed,
                all: targets.len(),
            })
        }
    }
}

fn end(tree: &Tree, text: &str) -> Result<u32, Failure> {
    let (pid, gpus) = process(tree, text)?;
    // A process ends as a whole, so any of its directories will do.
    let directory: PathBuf = match gpus {
        Gpus::Some(entry) => entry.directory(),
        Gpus::All { first } => EntryId { pid, gpu: first }.directory(),
    };
    tree.write(&directory, File::Kill.row(), "1")?;
    Ok(pid)
}

/// Which of its GPUs a process was named with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Gpus {
    /// One, because it was named or because there is only that one.
    Some(EntryId),
    /// All of several.
    All {
        /// One of them.
        first: u32,
    },
}

fn process(tree: &Tree, text: &str) -> Result<(u32, Gpus), Failure> {
    match Target::find(tree, text)? {
        Target::Entry(entry) => Ok((entry.pid, Gpus::Some(entry))),
        Target::Process { pid, gpus } => match gpus.as_slice() {
            [gpu] => Ok((pid, Gpus::Some(EntryId { pid, gpu: *gpu }))),
            [first, ..] => Ok((pid, Gpus::All { first: *first })),
            [] => Err(Failure::Wrong(format!("process {pid} is on no GPU"))),
        },
        _ => Err(Failure::Wrong(format!(
            "{text:?} is not a process; name a pid, PID/GPU or a workload"
        ))),
    }
}

/// The step for several processes takes them whole, which a user who named one
/// of several GPUs did not ask for.
fn whole(tree: &Tree, pid: u32, gpus: Gpus) -> Result<(), Failure> {
    if let Gpus::Some(entry) = gpus
        && tree.gpus_of(pid)?.len() > 1
    {
        return Err(Failure::Wrong(format!(
            "several targets change whole processes, and {pid} is not on GPU {} alone; name it \
             as {pid}, or alone",
            entry.gpu
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use gcgroup_model::snapshot::Stat;

    #[test]
    fn the_counters_shown_are_counters_of_the_model() {
        let stat = Stat {
            submitted: Some(1),
            ended: Some(1),
            usage_usec: Some(1),
            sm_count: Some(1),
            ..Stat::default()
        };
        let keys: Vec<_> = stat.lines().map(|(key, _)| key).collect();
        for key in [KERNELS, SMS, USAGE] {
            assert!(keys.contains(&key), "{key} is not in {keys:?}");
        }
    }

    #[test]
    fn a_line_has_a_cell_for_each_column_and_no_blanks() {
        let document = json!({
            "pid": 12, "gpu": 0, "name": null, "comm": "my app", "partition": "a",
            "sm_count": 64, "priority": 8, "frozen": 1, "max": "20000 100000",
            "memory_current": 1 << 30, "nr_ended_kernels": null,
            "uid": 1000, "usage_usec": 5, "cgroup": "/user.slice",
        });
        assert_eq!(
            cells(&document, Width::Long),
            [
                "12",
                "0",
                "my_app",
                "a",
                "64",
                "8",
                "1",
                "20000/100000",
                "1.0G",
                "-",
                "1000",
                "5",
                "/user.slice"
            ]
        );
    }
}
