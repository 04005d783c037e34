//! The lines that a program on the simulated GPU obeys.

/// The commands, for people.
pub const COMMANDS: &str = "\
open GPU      opens another context on that GPU, which launches kernels too
close         closes the newest context
group         adds a channel group to the newest context, and launches there
group far     the same, after many objects were made and freed
channel       adds a channel to the group that the newest context launches into
channel far   the same, after many objects were made and freed
ungroup       removes the newest group that was added
memory BYTES  takes more memory in the newest context; K, M, G or T may follow
graph N       launches N graphs of one kernel each there, also while paused
pause         launches no more kernels
go            launches kernels again, or for the first time
count         says what it has done: launched TOTAL graphs N ended N
quit          ends the program";

/// The most graphs that one command launches: what waits for a GPU is kept.
const MOST_GRAPHS: u64 = 10_000;

/// Where an object gets its handle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Right behind the last one.
    Next,
    /// So far behind that only a search for everything finds it.
    Far,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    Open(u32),
    Close,
    Group(Place),
    Channel(Place),
    Ungroup,
    /// Bytes.
    Memory(u64),
    Graph(u64),
    Pause,
    Go,
    Count,
    Quit,
}

impl Command {
    /// Understands a line, or says what would have been understood.
    pub(super) fn parse(line: &str) -> Result<Self, String> {
        let mut words = line.split_whitespace();
        let (verb, operand) = (words.next().unwrap_or(""), words.next());
        let command = match (verb, operand) {
            ("open", Some(gpu)) => Self::Open(number(gpu, "a GPU is a number")?),
            ("close", None) => Self::Close,
            ("group", None) => Self::Group(Place::Next),
            ("group", Some("far")) => Self::Group(Place::Far),
            ("channel", None) => Self::Channel(Place::Next),
            ("channel", Some("far")) => Self::Channel(Place::Far),
            ("ungroup", None) => Self::Ungroup,
            ("memory", Some(bytes)) => Self::Memory(
                gcgroup_model::value::bytes(bytes, "bytes, with an optional K, M, G or T")
                    .map_err(|error| error.to_string())?,
            ),
            ("graph", Some(count)) => {
                let count = number(count, "graphs are counted")?;
                if !(1..=MOST_GRAPHS).contains(&count) {
                    return Err(format!("{count} graphs: 1 to {MOST_GRAPHS} at once"));
                }
                Self::Graph(count)
            }
            ("pause", None) => Self::Pause,
            ("go", None) => Self::Go,
            ("count", None) => Self::Count,
            ("quit", None) => Self::Quit,
            _ => return Err(unknown(line)),
        };
        match words.next() {
            None => Ok(command),
            Some(_) => Err(unknown(line)),
        }
    }
}

fn number<T: std::str::FromStr>(text: &str, rule: &str) -> Result<T, String> {
    text.parse().map_err(|_| format!("{text:?}: {rule}"))
}

fn unknown(line: &str) -> String {
    let commands: Vec<_> = COMMANDS
        .lines()
        .filter_map(|line| line.split("  ").next())
        .collect();
    format!("{line:?} is none of: {}", commands.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_that_is_shown_is_understood() {
        for line in COMMANDS.lines() {
            let shown = line.split("  ").next().expect("a line has a beginning");
            let line = shown.replace("GPU", "1").replace("BYTES", "2M");
            let line = line.replace(" N", " 3");
            Command::parse(&line).expect("it is shown");
        }
        assert_eq!(Command::parse("memory 2M"), Ok(Command::Memory(2 << 20)));
        assert_eq!(Command::parse(" open  1 "), Ok(Command::Open(1)));
    }

    #[test]
    fn what_is_not_understood_is_told_what_would_be() {
        for line in ["", "open", "close 1", "launch", "graph 1 2"] {
            let reason = Command::parse(line).expect_err("no command");
            assert!(reason.contains("memory BYTES, graph N"), "{reason}");
        }
        for line in ["graph 0", "graph 10001", "graph x", "open -1", "memory 1X"] {
            Command::parse(line).expect_err("out of range");
        }
    }
}
