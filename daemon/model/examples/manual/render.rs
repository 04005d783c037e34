//! The manual of the control files, from their rows and the fields of a spec.

use gcgroup_model::spec::{FIELDS, FieldKind};
use gcgroup_model::{File, Grammar, Place, ROWS, Row};

/// The kinds of directory and what stands above the table of each.
const PLACES: &[(Place, &str, &str)] = &[
    (
        Place::Root,
        "The mount point",
        "One of each for the service.",
    ),
    (
        Place::Gpu,
        "A GPU",
        "`<gpu>` is the NVML index, the number that nvidia-smi prints.",
    ),
    (
        Place::Partition,
        "An SM partition",
        "`mkdir` makes a partition and `rmdir` removes it, which fails with EBUSY while it has \
         members. A name is 1 to 31 of a-z, 0-9, `.`, `_` and `-`, begins with a letter or a \
         digit, and is not `none`. A new partition has no SMs and takes no members until its \
         size is written.",
    ),
    (
        Place::Processes,
        "The processes",
        "Beside this file stand one directory for each process and `self`, a symlink to the \
         directory of the process that reads it.",
    ),
    (
        Place::Process,
        "A process",
        "`<pid>` is the thread-group id in the pid namespace of the service. Beside these files \
         stands one directory for each GPU that the process uses.",
    ),
    (
        Place::ProcessGpu,
        "A process on a GPU",
        "The directory stays until the process ends.",
    ),
    (
        Place::Workload,
        "A workload",
        "A process that the service launched has these files too, in the same directory. \
         `workloads/<name>` is a symlink to it.",
    ),
];

/// The errnos of reads and writes and when each is returned.
const ERRORS: &[(&str, &str)] = &[
    (
        "EINVAL",
        "the value is outside the grammar or the range of the file",
    ),
    ("ERANGE", "a number does not fit into 64 bits"),
    (
        "EOPNOTSUPP",
        "nothing can enforce the setting for this process; its `{enforcers}` has the reason",
    ),
    (
        "ENOENT",
        "the partition, the GPU or the file does not exist",
    ),
    ("EEXIST", "the name is taken"),
    ("ESRCH", "a pid in the value is not a process with an entry"),
    (
        "EBUSY",
        "an earlier change is still under way, a partition still has members, or no MPS client \
         slot is free",
    ),
    ("ENOSPC", "not enough SMs or device memory are free"),
    ("ENOMEM", "not enough host memory"),
    (
        "ENODEV",
        "the process or the GPU went away while its file was open",
    ),
    (
        "ETIMEDOUT",
        "not done within the deadline, by default 5 s and for a launch 30 s; a change that had not begun is withdrawn, one that had \
         runs to its end and shows as `pending 1` in `{events}` until then",
    ),
    (
        "EIO",
        "the mechanism failed; the log of the service has the reason",
    ),
    (
        "EACCES",
        "the permission bits of the file do not allow it to the caller",
    ),
    (
        "EPERM",
        "creating, renaming or removing files, and changing their modes or owners",
    ),
];

/// The whole manual as Markdown.
pub(crate) fn manual() -> String {
    let mut text = String::from(INTRODUCTION);
    for (place, title, about) in PLACES {
        let rows: Vec<&Row> = ROWS.iter().filter(|row| row.place == *place).collect();
        text.push_str(&format!("\n## {title}\n\n"));
        if !place.pattern().is_empty() {
            text.push_str(&format!("`{}/`\n\n", place.pattern()));
        }
        text.push_str(&format!("{about}\n\n"));
        files(&rows, &mut text);
    }
    spec(&mut text);
    text.push_str(
        "\n## Errors\n\nA write that fails has changed nothing, save with ETIMEDOUT.\n\n",
    );
    text.push_str("| error | when |\n|---|---|\n");
    for (name, when) in ERRORS {
        let when = when
            .replace("{enforcers}", File::Enforcers.name())
            .replace("{events}", File::Events.name());
        text.push_str(&format!("| {name} | {when} |\n"));
    }
    text
}

const INTRODUCTION: &str = "\
# The control files

<!-- Generated from the rows in daemon/model/src/row.rs and the fields in daemon/model/src/spec.rs:
     cargo run -q -p gcgroup-model --example manual > docs/control-files.md -->

gcgroupd mounts these files at `/run/gcgroup` unless it is configured otherwise.

- One write is one command: the whole value in one write(2), with at most one newline behind it.
  Offsets and O_TRUNC have no effect, so `echo` works.
- A write returns when the effect is real, or fails and says why with its error.
- A read at offset 0 is rendered then; further reads of the same descriptor go on with that text.
- `ro` files are 0444, `rw` files 0644 and `wo` files 0200, of root and the group
  gcgroup (root's where there is no such group, or the configuration's `group`). With
  `writable_by_group` in the configuration, the group may write too: 0664 and 0220.
- A value is at most 31 bytes long where nothing else is said.
- poll(2) with POLLPRI reports a change of a file that is marked as polling; read it again from
  offset 0.
- stat(2) shows a size of 0.
";

const SPEC: &str = "
## A workload's spec

What `{launch}` takes: one JSON object with these keys. The same names, with dashes, are the
flags of `gcgroup launch`. Unknown keys are errors; null is the same as leaving the key out.

The answer is read from the same descriptor: `{\"pid\": ..., \"gpu\": ..., \"name\": ...}`, or
`{\"error\": ..., \"field\": ...}` where the write failed.

| key | JSON | meaning |
|---|---|---|
";

fn files(rows: &[&Row], text: &mut String) {
    text.push_str("| file | mode | unit | default | a write is | polls |\n");
    text.push_str("|---|---|---|---|---|---|\n");
    for row in rows {
        let write = if row.mode.writable() {
            written(row.grammar)
        } else {
            String::new()
        };
        let polls = if row.polls { "yes" } else { "" };
        let default = if row.default.is_empty() {
            String::new()
        } else {
            format!("`{}`", row.default)
        };
        let cells = [
            format!("`{}`", row.name),
            row.mode.to_string(),
            row.unit.to_owned(),
            default,
            write,
            polls.to_owned(),
        ];
        text.push_str(&format!("| {} |\n", cells.join(" | ")));
    }
    text.push('\n');
    for row in rows {
        text.push_str(&format!("- `{}`: {}\n", row.name, row.manual));
    }
}

/// What a write may contain, with its length where that is not the usual one.
fn written(grammar: Grammar) -> String {
    let longest = grammar.longest();
    if longest == Grammar::Switch.longest() {
        grammar.allowed().to_owned()
    } else {
        format!("{}, {longest} bytes at most", grammar.allowed())
    }
}

fn spec(text: &mut String) {
    text.push_str(&SPEC.replace("{launch}", File::Launch.name()));
    for field in FIELDS {
        let kind = match field.kind {
            FieldKind::Text => "string",
            FieldKind::Number => "number",
            FieldKind::Flag => "true or false",
            FieldKind::NumberOrText => "number or string",
        };
        text.push_str(&format!(
            "| `{}` | {kind} | {} |\n",
            field.name, field.manual
        ));
    }
    text.push_str(
        "\nA configuration of eth-easl/gpu-util-interference (`kernel_name`, `init_args`, `run_args`) \
         is accepted instead and means one uninterrupted kernel a launch.\n",
    );
}
