//! What a user sees: tables, file contents and JSON.

use std::io::{self, Write};

use gcgroup_model::{File, Row};
use serde_json::{Map, Number, Value, json};

use crate::failure::Failure;

/// For people or for programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Style {
    /// Tables and lines.
    Text,
    /// One JSON document.
    Json,
}

/// Prints a document on one line.
///
/// # Errors
/// [`Failure::Output`].
pub(crate) fn json(document: &Value, out: &mut dyn Write) -> Result<(), Failure> {
    writeln!(out, "{document}").map_err(Failure::Output)
}

/// Prints a line.
///
/// # Errors
/// [`Failure::Output`].
pub(crate) fn line(text: &str, out: &mut dyn Write) -> Result<(), Failure> {
    writeln!(out, "{text}").map_err(Failure::Output)
}

/// Prints why a command failed.
///
/// # Errors
/// When `out` cannot be written.
pub(crate) fn failure(failure: &Failure, style: Style, out: &mut dyn Write) -> io::Result<()> {
    match style {
        Style::Text => {
            let failure = with_causes(failure);
            writeln!(out, "gcgroup: {failure}")
        }
        Style::Json => {
            let (file, error) = match failure {
                Failure::File { path, sentence, .. } => (Some(path), sentence.clone()),
                other => (None, with_causes(other)),
            };
            let field = match failure {
                Failure::Launch { field, .. } if !field.is_empty() => Some(field),
                _ => None,
            };
            let document = json!({
                "error": error,
                "file": file,
                "field": field,
                "errno": failure.errno().map(|errno| errno.raw_os_error()),
            });
            writeln!(out, "{document}")
        }
    }
}

/// A failure and its causes, each after a colon.
fn with_causes(failure: &Failure) -> String {
    let mut text = failure.to_string();
    let mut cause = std::error::Error::source(failure);
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

/// A table whose columns are as wide as their longest cell.
#[derive(Debug)]
pub(crate) struct Table {
    columns: Vec<(&'static str, Align)>,
    rows: Vec<Vec<String>>,
}

/// Which side of a column its cells stand at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Align {
    /// Words.
    Left,
    /// Numbers.
    Right,
}

impl Table {
    /// A table without rows.
    pub(crate) fn new(columns: &[(&'static str, Align)]) -> Self {
        Self {
            columns: columns.to_vec(),
            rows: Vec::new(),
        }
    }

    /// Adds a row; a cell beyond the columns is not shown.
    pub(crate) fn push(&mut self, row: Vec<String>) {
        self.rows.push(row);
    }

    /// Characters of each column.
    fn widths(&self) -> Vec<usize> {
        let columns = self.columns.iter().enumerate();
        columns
            .map(|(index, (heading, _))| {
                let cells = self.rows.iter().filter_map(|row| row.get(index));
                cells
                    .map(|cell| cell.chars().count())
                    .fold(heading.len(), usize::max)
            })
            .collect()
    }

    /// Clips the cells of one column so that a line has at most `width`
    /// characters, or the column `least` where that is more.
    pub(crate) fn fit(&mut self, column: usize, width: usize, least: usize) {
        let widths = self.widths();
        let line = widths.iter().sum::<usize>() + 2 * widths.len().saturating_sub(1);
        let most = widths
            .get(column)
            .map_or(0, |own| own.saturating_sub(line.saturating_sub(width)))
            .max(least);
        for cell in self.rows.iter_mut().filter_map(|row| row.get_mut(column)) {
            *cell = clipped(cell, most);
        }
    }

    /// Prints the heading and the rows.
    ///
    /// # Errors
    /// [`Failure::Output`].
    pub(crate) fn print(&self, out: &mut dyn Write) -> Result<(), Failure> {
        let widths = self.widths();
        let heading: Vec<String> = self
            .columns
            .iter()
            .map(|(name, _)| (*name).into())
            .collect();
        for row in std::iter::once(&heading).chain(&self.rows) {
            let mut text = String::new();
            for ((cell, width), (_, align)) in row.iter().zip(&widths).zip(&self.columns) {
                match align {
                    Align::Left => text.push_str(&format!("{cell:<width$}  ")),
                    Align::Right => text.push_str(&format!("{cell:>width$}  ")),
                }
            }
            line(text.trim_end(), out)?;
        }
        Ok(())
    }
}

/// At most `most` characters of a text, the last a plus sign where some are
/// missing, as ps has it.
pub(crate) fn clipped(text: &str, most: usize) -> String {
    if text.chars().count() <= most {
        return text.to_owned();
    }
    let kept = text.chars().take(most.saturating_sub(1));
    kept.chain(std::iter::once('+')).collect()
}

/// Prints a sentence in lines of at most `width` characters, those behind the
/// first indented.
///
/// # Errors
/// [`Failure::Output`].
pub(crate) fn wrapped(text: &str, width: usize, out: &mut dyn Write) -> Result<(), Failure> {
    let mut now = String::new();
    for word in text.split_whitespace() {
        if !now.is_empty() && now.chars().count() + 1 + word.chars().count() > width {
            line(&now, out)?;
            now = format!("  {word}");
        } else {
            if !now.is_empty() {
                now.push(' ');
            }
            now.push_str(word);
        }
    }
    line(&now, out)
}

/// Bytes in the largest unit that leaves at least one, each 1024 of the one
/// before, as the files take them.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [(u64, &str); 4] = [(40, "T"), (30, "G"), (20, "M"), (10, "K")];
    for (shift, unit) in UNITS {
        let whole = count >> shift;
        if whole >= 10 {
            return format!("{whole}{unit}");
        }
        if whole >= 1 {
            let tenth = ((count - (whole << shift)) * 10) >> shift;
            return format!("{whole}.{tenth}{unit}");
        }
    }
    count.to_string()
}

/// How the content of a file looks as JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shape {
    /// A string.
    Text,
    /// A number.
    Number,
    /// An array with a number for each word, save a heading.
    Numbers,
    /// An object with a number for each line.
    KeyedNumbers,
    /// An object with a string for each line.
    KeyedText,
    /// An array with a string for each line.
    Lines,
    /// An array with an object for each line below the heading.
    Csv,
    /// JSON already.
    Json,
}

/// A new row has to say here how it looks; nothing else about it is repeated.
fn shape(file: File) -> Shape {
    match file {
        File::Version
        | File::Launch
        | File::GpuName
        | File::GpuUuid
        | File::Cgroup
        | File::Comm
        | File::Max
        | File::Partition
        | File::Kill => Shape::Text,
        File::SmCapacity
        | File::SmGranularity
        | File::GpuMemoryCapacity
        | File::GpuMemoryCurrent
        | File::SmCount
        | File::Uid
        | File::MemoryCurrent
        | File::MemoryPeak
        | File::Priority
        | File::Freeze => Shape::Number,
        File::FreezeMany | File::SmGroups | File::PartitionMembers | File::ProcessList => {
            Shape::Numbers
        }
        File::ServiceStat | File::GpuUtilization | File::GpuEvents | File::Stat | File::Events => {
            Shape::KeyedNumbers
        }
        File::GpuEnforcers | File::Enforcers => Shape::KeyedText,
        File::Pending => Shape::Lines,
        File::WorkloadSamples => Shape::Csv,
        File::WorkloadSpec => Shape::Json,
    }
}

/// The content of a file as JSON. What does not look as it should stays text,
/// so that nothing a file says is lost.
pub(crate) fn value(row: &Row, text: &str) -> Value {
    let parsed = match shape(row.file) {
        Shape::Text => None,
        Shape::Number => number(text),
        Shape::Numbers => {
            // The heading that GVM's tools expect in the list of processes.
            let words = text.split_whitespace().filter(|word| *word != "PID");
            words
                .map(number)
                .collect::<Option<Vec<_>>>()
                .map(Value::from)
        }
        Shape::KeyedNumbers => keyed(text)
            .map(|(key, value)| Some((key.to_owned(), number(value)?)))
            .collect::<Option<Map<_, _>>>()
            .map(Value::Object),
        Shape::KeyedText => Some(Value::Object(
            keyed(text)
                .map(|(key, value)| (key.to_owned(), value.into()))
                .collect(),
        )),
        Shape::Lines => Some(text.lines().collect()),
        Shape::Csv => Some(csv(text)),
        Shape::Json => serde_json::from_str(text).ok(),
    };
    parsed.unwrap_or_else(|| text.into())
}

fn number(text: &str) -> Option<Value> {
    text.parse::<u64>().ok().map(Value::from)
}

/// Lines of `key: value` or `key value`.
pub(crate) fn keyed(text: &str) -> impl Iterator<Item = (&str, &str)> {
    text.lines().filter_map(|line| {
        let (key, value) = line.split_once(' ')?;
        Some((key.trim_end_matches(':'), value.trim()))
    })
}

fn csv(text: &str) -> Value {
    let mut lines = text.lines();
    let heading: Vec<&str> = lines.next().unwrap_or_default().split(',').collect();
    lines
        .map(|line| {
            let cells = line.split(',').map(|cell| {
                number(cell)
                    .or_else(|| Number::from_f64(cell.parse().ok()?).map(Value::Number))
                    .unwrap_or_else(|| cell.into())
            });
            let row = heading.iter().map(|key| (*key).to_owned()).zip(cells);
            Value::Object(row.collect())
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_longest_cell() {
        let mut table = Table::new(&[("PID", Align::Right), ("NAME", Align::Left)]);
        table.push(vec!["12345".into(), "a".into()]);
        table.push(vec!["7".into(), "noisy".into()]);
        let mut out = Vec::new();
        table.print(&mut out).expect("a vector takes everything");
        assert_eq!(
            String::from_utf8(out).expect("text"),
            "  PID  NAME\n12345  a\n    7  noisy\n"
        );
    }

    #[test]
    fn one_column_gives_way_to_the_others() {
        let printed = |name: &str, width| {
            let mut table = Table::new(&[("PID", Align::Right), ("NAME", Align::Left)]);
            table.push(vec!["12345".into(), name.into()]);
            table.fit(1, width, 4);
            let mut out = Vec::new();
            table.print(&mut out).expect("a vector takes everything");
            let text = String::from_utf8(out).expect("text");
            text.lines().last().unwrap_or_default().to_owned()
        };
        assert_eq!(printed("interference", 19), "12345  interference");
        assert_eq!(printed("interference", 18), "12345  interferen+");
        assert_eq!(printed("interference", 5), "12345  int+");
        assert_eq!(printed("abcd", 5), "12345  abcd");
    }

    #[test]
    fn long_sentences_are_broken_between_words() {
        let mut out = Vec::new();
        wrapped("channel: about 1 ms a stop", 14, &mut out).expect("a vector takes everything");
        assert_eq!(
            String::from_utf8(out).expect("text"),
            "channel: about\n  1 ms a stop\n"
        );
    }

    #[test]
    fn bytes_are_short_and_never_rounded_up() {
        for (count, expected) in [
            (0, "0"),
            (1023, "1023"),
            (1024, "1.0K"),
            (1536, "1.5K"),
            (10 << 20, "10M"),
            ((1 << 30) - 1, "1023M"),
            (8 << 30, "8.0G"),
            (u64::MAX, "16777215T"),
        ] {
            assert_eq!(bytes(count), expected);
        }
    }

    #[test]
    fn contents_become_json_of_their_shape() {
        for (file, text, expected) in [
            (File::Freeze, "1", json!(1)),
            (File::Partition, "64", json!("64")),
            (File::Max, "max 100000", json!("max 100000")),
            (File::SmGroups, "0 1 2", json!([0, 1, 2])),
            (File::ProcessList, "PID\n12\n13", json!([12, 13])),
            (File::PartitionMembers, "", json!([])),
            (
                File::Stat,
                "usage_usec: 5\nsm_count: 64",
                json!({"usage_usec": 5, "sm_count": 64}),
            ),
            (
                File::Events,
                "populated 1\nfrozen 0",
                json!({"populated": 1, "frozen": 0}),
            ),
            (
                File::Enforcers,
                "a.b worker\nc none no order",
                json!({"a.b": "worker", "c": "none no order"}),
            ),
            (
                File::WorkloadSamples,
                "seq,device_us\n0,458.5",
                json!([{"seq": 0, "device_us": 458.5}]),
            ),
            (File::WorkloadSpec, "{\"gpu\":0}", json!({"gpu": 0})),
            (File::Pending, "", json!([])),
            (
                File::Pending,
                "12 a.b 3\n13 c 1",
                json!(["12 a.b 3", "13 c 1"]),
            ),
        ] {
            assert_eq!(value(file.row(), text), expected, "{}", file.name());
        }
    }

    #[test]
    fn content_of_another_shape_stays_text() {
        assert_eq!(value(File::Freeze.row(), "maybe"), json!("maybe"));
        assert_eq!(value(File::Stat.row(), "a: b"), json!("a: b"));
        assert_eq!(value(File::WorkloadSpec.row(), "{"), json!("{"));
    }

    #[test]
    fn a_failure_is_one_json_object_for_programs() {
        let refused = Failure::File {
            path: "/x/y".into(),
            errno: Some(rustix::io::Errno::INVAL),
            sentence: "is wrong".into(),
        };
        let mut out = Vec::new();
        failure(&refused, Style::Json, &mut out).expect("a vector takes everything");
        let told: Value = serde_json::from_slice(&out).expect("JSON");
        assert_eq!(
            told,
            json!({"error": "is wrong", "file": "/x/y", "field": null, "errno": 22})
        );
    }
}
