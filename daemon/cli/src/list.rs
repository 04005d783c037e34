//! `ls`: who is on the GPUs, how each is controlled, and what that costs.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::Path;

use gcgroup_model::snapshot::Enforcer;
use gcgroup_model::{File, Place};
use serde_json::{Value, json};

use crate::explain;
use crate::failure::Failure;
use crate::output::{self, Align, Style, Table};
use crate::tree::{EntryId, Tree, below};

/// Keys of the counters that `ls` shows; a test holds them against the model.
const LAUNCHES: &str = "nr_submitted_kernels";
const GRAPHS: &str = "nr_graph_launches";
const KERNELS: &str = "nr_ended_kernels";
const SMS: &str = "sm_count";
const USAGE: &str = "usage_usec";
/// The same of events.
const POPULATED: &str = "populated";
const FROZEN: &str = "frozen";
const HELD: &str = "held";
const PENDING: &str = "pending";

/// Characters of a line that every terminal has room for.
const LINE: usize = 80;
/// Which column gives way where a line would be longer, and how far.
const NAME_COLUMN: usize = 2;
const NAME_LEAST: usize = 8;
/// Characters of a user's name, as ps has them.
const USER_MOST: usize = 8;

/// How much `ls` shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Width {
    /// What fits into 80 characters.
    Short,
    /// Names in full, and what else there is to know.
    Long,
}

/// Lists every process on each of its GPUs. One that ends meanwhile is left out.
///
/// # Errors
/// When the tree cannot be read or the output cannot be written.
pub(crate) fn run(
    tree: &Tree,
    width: Width,
    style: Style,
    out: &mut dyn Write,
) -> Result<(), Failure> {
    let names = tree.workloads()?;
    let mut users = BTreeMap::new();
    let mut documents = Vec::new();
    for id in tree.entries()? {
        if let Some(document) = describe(tree, id, names.get(&id), &mut users)? {
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
        ("USER", Align::Left),
        ("PRIO", Align::Right),
        ("STATE", Align::Left),
        ("MEMORY", Align::Right),
        ("ENFORCER", Align::Left),
        ("LAUNCHES", Align::Right),
    ];
    if width == Width::Long {
        columns.extend([
            ("MAX", Align::Left),
            ("PARTITION", Align::Left),
            ("SMS", Align::Right),
            ("ENDED", Align::Right),
            ("USAGE_USEC", Align::Right),
            ("CGROUP", Align::Left),
        ]);
    }
    let mut table = Table::new(&columns);
    for document in &documents {
        table.push(cells(document, width));
    }
    if width == Width::Short {
        table.fit(NAME_COLUMN, LINE, NAME_LEAST);
    }
    table.print(out)?;
    let notes = notes(&documents);
    if !notes.is_empty() {
        output::line("", out)?;
    }
    notes
        .iter()
        .try_for_each(|note| output::wrapped(note, LINE, out))
}

/// Everything about an entry under stable keys; null where its file has no such
/// figure.
fn describe(
    tree: &Tree,
    id: EntryId,
    name: Option<&String>,
    users: &mut BTreeMap<u64, String>,
) -> Result<Option<Value>, Failure> {
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
    let max = content(&entry, File::Max)?;
    let uid = content(&process, File::Uid)?;
    let user = uid.as_u64().map(|uid| {
        let user = users.entry(uid).or_insert_with(|| explain::user(uid));
        user.clone()
    });
    Ok(Some(json!({
        "pid": id.pid,
        "gpu": id.gpu,
        "name": name,
        "comm": content(&process, File::Comm)?,
        "uid": uid,
        "user": user,
        "cgroup": content(&process, File::Cgroup)?,
        "partition": content(&entry, File::Partition)?,
        "sm_count": stat[SMS],
        "priority": content(&entry, File::Priority)?,
        "frozen": content(&entry, File::Freeze)?,
        "max": max,
        "memory_current": content(&entry, File::MemoryCurrent)?,
        "memory_peak": content(&entry, File::MemoryPeak)?,
        "nr_submitted_kernels": stat[LAUNCHES],
        "nr_graph_launches": stat[GRAPHS],
        "nr_ended_kernels": stat[KERNELS],
        "usage_usec": stat[USAGE],
        "state": state(&events, &max),
        "enforcers": content(&entry, File::Enforcers)?,
        "events": events,
    })))
}

/// What the process does on the GPU, or why it does not.
fn state(events: &Value, max: &Value) -> &'static str {
    let is = |key: &str| events[key] == 1;
    if is(PENDING) {
        // A change is under way, so the settings do not tell.
        "pending"
    } else if is(FROZEN) {
        "frozen"
    } else if is(HELD) {
        "held"
    } else if events[POPULATED] == 0 {
        "idle"
    } else if is_limited(max) {
        "throttled"
    } else {
        "running"
    }
}

/// Whether compute.max leaves the process less than all of the time.
fn is_limited(max: &Value) -> bool {
    max.as_str().is_some_and(|max| !max.starts_with("max"))
}

/// The mechanism behind a file of an entry, and what stands behind it.
fn mechanism(document: &Value, file: File) -> Option<(&str, &str)> {
    let line = document["enforcers"][file.name()].as_str()?;
    Some(line.split_once(' ').unwrap_or((line, "")))
}

/// The cells of a line, a dash for what is not known.
fn cells(document: &Value, width: Width) -> Vec<String> {
    let cell = |key: &str| match &document[key] {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    // A blank would make two columns of it for awk and sort, and a process may
    // call itself something that a terminal obeys.
    let whole = |text: String| text.replace(|c: char| c.is_whitespace() || c.is_control(), "_");
    let name = if document["name"].is_null() {
        cell("comm")
    } else {
        cell("name")
    };
    let user = match width {
        Width::Short => output::clipped(&cell("user"), USER_MOST),
        Width::Long => cell("user"),
    };
    let memory = match document["memory_current"].as_u64() {
        Some(count) => output::bytes(count),
        None => "-".to_owned(),
    };
    let enforcer = mechanism(document, File::Freeze).map_or("-", |(word, _)| word);
    let mut cells = vec![
        cell("pid"),
        cell("gpu"),
        whole(name),
        whole(user),
        cell("priority"),
        cell("state"),
        memory,
        enforcer.to_owned(),
        cell("nr_submitted_kernels"),
    ];
    if width == Width::Long {
        let max = match cell("max") {
            max if max.starts_with("max") => "max".to_owned(),
            quota => quota.replace(' ', "/"),
        };
        cells.extend([
            max,
            cell("partition"),
            cell("sm_count"),
            cell("nr_ended_kernels"),
            cell("usage_usec"),
            whole(cell("cgroup")),
        ]);
    }
    cells
}

/// What the mechanisms in the table do and cost. The figures are those that
/// were measured on an H200.
fn notes(documents: &[Value]) -> Vec<String> {
    let freezes = |enforcer: &Enforcer| {
        let name = enforcer.to_string();
        documents
            .iter()
            .any(|document| mechanism(document, File::Freeze).is_some_and(|(word, _)| word == name))
    };
    let mut notes = Vec::new();
    if freezes(&Enforcer::Worker) {
        notes.push(format!(
            "{}: the workload stops itself, in about 0.1 ms.",
            Enforcer::Worker
        ));
    }
    if freezes(&Enforcer::Channel) {
        notes.push(format!(
            "{}: the driver stops it, in about 1 ms; free while it runs.",
            Enforcer::Channel
        ));
    }
    let window = Enforcer::ChannelWindow.to_string();
    if documents.iter().any(|document| {
        is_limited(&document["max"])
            && mechanism(document, File::Max).is_some_and(|(word, _)| word == window)
    }) {
        notes.push(format!(
            "{window}: {} stops and resumes it once a period, 1 to 1.5 ms of driver calls.",
            File::Max.name()
        ));
    }
    let signal = Enforcer::Signal.to_string();
    if documents.iter().any(|document| {
        !document["nr_submitted_kernels"].is_null()
            && mechanism(document, File::Kill).is_some_and(|(word, _)| word == signal)
    }) {
        notes.push(
            "LAUNCHES: counting takes 0.6 us a launch in a program that gcgroupd did not launch."
                .to_owned(),
        );
    }
    let mut reasons: BTreeMap<&str, BTreeSet<u64>> = BTreeMap::new();
    for document in documents {
        if let Some(("none", reason)) = mechanism(document, File::Freeze)
            && let Some(pid) = document["pid"].as_u64()
        {
            reasons.entry(reason).or_default().insert(pid);
        }
    }
    for (reason, pids) in reasons {
        let pids: Vec<_> = pids.iter().map(u64::to_string).collect();
        notes.push(format!("none ({}): {reason}", pids.join(", ")));
    }
    notes
}

#[cfg(test)]
mod tests {
    use super::*;
    use gcgroup_model::snapshot::Stat;

    /// An entry that says everything, with these lines of gcgroup.enforcers.
    fn document(freeze: &str, max: &str, kill: &str) -> Value {
        json!({
            "pid": 12, "gpu": 0, "name": null, "comm": "my\u{1b}app x", "partition": "a",
            "sm_count": 64, "priority": 8, "frozen": 1, "max": "20000 100000",
            "memory_current": 1 << 30, "nr_submitted_kernels": 7, "nr_ended_kernels": null,
            "uid": 1000, "user": "somebody_else", "usage_usec": 5, "cgroup": "/user.slice",
            "state": "frozen",
            "enforcers": {
                File::Freeze.name(): freeze, File::Max.name(): max, File::Kill.name(): kill,
            },
        })
    }

    #[test]
    fn the_counters_shown_are_counters_of_the_model() {
        let stat = Stat {
            submitted: Some(1),
            graph_launches: Some(1),
            ended: Some(1),
            usage_usec: Some(1),
            sm_count: Some(1),
            ..Stat::default()
        };
        let keys: Vec<_> = stat.lines().map(|(key, _)| key).collect();
        for key in [LAUNCHES, GRAPHS, KERNELS, SMS, USAGE] {
            assert!(keys.contains(&key), "{key} is not in {keys:?}");
        }
        // The manual lists the words of events.
        for word in [POPULATED, FROZEN, HELD, PENDING] {
            let manual = File::Events.row().manual;
            assert!(manual.contains(&format!("'{word}'")), "{word}: {manual}");
        }
    }

    #[test]
    fn a_line_has_a_cell_for_each_column_and_no_blanks() {
        let document = document("channel", "channel-window", "signal");
        let short = [
            "12", "0", "my_app_x", "somebod+", "8", "frozen", "1.0G", "channel", "7",
        ];
        assert_eq!(cells(&document, Width::Short), short);
        assert_eq!(
            cells(&document, Width::Long)[3..],
            [
                "somebody_else",
                "8",
                "frozen",
                "1.0G",
                "channel",
                "7",
                "20000/100000",
                "a",
                "64",
                "-",
                "5",
                "/user.slice"
            ]
        );
        assert_eq!(cells(&json!({}), Width::Long), ["-"; 15]);
    }

    #[test]
    fn the_state_is_the_first_reason_not_to_run() {
        let free = json!("max 100000");
        let quota = json!("20000 100000");
        let events = |populated, frozen, held, pending| {
            json!({
                POPULATED: populated, FROZEN: frozen, HELD: held, PENDING: pending,
            })
        };
        for (events, max, expected) in [
            (events(1, 0, 0, 0), &free, "running"),
            (events(1, 0, 0, 0), &quota, "throttled"),
            (events(0, 0, 0, 0), &quota, "idle"),
            (events(1, 0, 1, 0), &quota, "held"),
            (events(0, 1, 1, 0), &free, "frozen"),
            (events(1, 1, 0, 1), &free, "pending"),
        ] {
            assert_eq!(state(&events, max), expected, "{events} {max}");
        }
    }

    #[test]
    fn the_notes_are_those_of_the_mechanisms_in_the_table() {
        assert!(notes(&[]).is_empty());
        let heads = |documents: &[Value]| -> Vec<String> {
            let notes = notes(documents).into_iter();
            notes
                .map(|note| note.split(':').next().unwrap_or_default().to_owned())
                .collect()
        };
        let worker = document("worker", "worker", "worker");
        let attached = document("channel", "channel-window", "signal");
        let unlimited = {
            let mut document = attached.clone();
            document["max"] = json!("max 100000");
            document["nr_submitted_kernels"] = Value::Null;
            document
        };
        let client = document("none ask its server", "none ask its server", "worker");
        assert_eq!(heads(std::slice::from_ref(&worker)), ["worker"]);
        assert_eq!(heads(&[unlimited]), ["channel"]);
        assert_eq!(
            heads(&[worker, attached, client.clone(), client.clone()]),
            [
                "worker",
                "channel",
                "channel-window",
                "LAUNCHES",
                "none (12)"
            ]
        );
        assert_eq!(notes(&[client]), ["none (12): ask its server"]);
    }
}
