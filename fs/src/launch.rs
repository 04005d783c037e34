//! The stream behind gcgroup.launch: bytes gather until they are one complete
//! JSON object, and the answer is read back on the same open file.
//!
//! ```text
//!              bytes                complete object
//! Gathering ----------> Gathering -----------------> Launching
//!     ^                     | too long, not an object    | answered
//!     +---------------------+----------------------------+
//! ```
//!
//! An answer stays readable until the next object begins.

use gcgroup_model::Refusal;
use gcgroup_model::change::Done;
use gcgroup_model::row::Grammar;
use parking_lot::Mutex;
use serde_json::Value;

/// What a write did to the stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// The object is not complete.
    Gathered,
    /// The text of one object. The stream takes no bytes until it is answered.
    Complete(String),
    /// The bytes cannot become an object; the reason is readable already.
    Refused(Refusal),
}

/// One open file of gcgroup.launch.
#[derive(Debug, Default)]
pub(crate) struct Stream {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    gathered: Vec<u8>,
    scanner: Scanner,
    launching: bool,
    answer: Vec<u8>,
    /// Bytes of the answer that were read.
    taken: usize,
}

impl Stream {
    /// Takes the bytes of one write.
    pub(crate) fn write(&self, bytes: &[u8]) -> Step {
        let state = &mut *self.state.lock();
        if state.launching {
            return Step::Refused(Refusal::Busy(
                "the launch before this one is under way".to_owned(),
            ));
        }
        match state.gather(bytes) {
            Ok(None) => Step::Gathered,
            Ok(Some(text)) => {
                state.launching = true;
                Step::Complete(text)
            }
            Err(reason) => {
                let refusal = Refusal::Invalid(reason.to_owned());
                state.settle(failure(&refusal));
                Step::Refused(refusal)
            }
        }
    }

    /// Makes the outcome readable and takes the next object.
    pub(crate) fn answer(&self, outcome: &Result<Done, Refusal>) {
        let text = match outcome {
            Ok(Done::Launched { pid, gpu, name }) => {
                let name = Value::from(name.as_str());
                format!("{{\"pid\":{pid},\"gpu\":{gpu},\"name\":{name}}}\n")
            }
            Ok(Done::Quiet) => "{}\n".to_owned(),
            Err(refusal) => failure(refusal),
        };
        self.state.lock().settle(text);
    }

    /// The next bytes of the answer, at most `size`; none before there is one.
    pub(crate) fn read(&self, size: usize) -> Vec<u8> {
        let state = &mut *self.state.lock();
        let rest = &state.answer[state.taken..];
        let bytes = rest[..rest.len().min(size)].to_vec();
        state.taken += bytes.len();
        bytes
    }
}

const TOO_LONG: &str = "a workload is one JSON object of at most 65536 bytes";

impl State {
    fn gather(&mut self, bytes: &[u8]) -> Result<Option<String>, &'static str> {
        for (index, byte) in bytes.iter().enumerate() {
            match self.scanner.next(*byte)? {
                Scanned::Before => {}
                Scanned::Within => {
                    if self.gathered.is_empty() {
                        self.answer.clear();
                        self.taken = 0;
                    }
                    if self.gathered.len() == Grammar::Spec.longest() {
                        return Err(TOO_LONG);
                    }
                    self.gathered.push(*byte);
                }
                Scanned::Last => {
                    if self.gathered.len() == Grammar::Spec.longest() {
                        return Err(TOO_LONG);
                    }
                    self.gathered.push(*byte);
                    if !bytes[index + 1..].iter().all(u8::is_ascii_whitespace) {
                        return Err("nothing may follow the JSON object in one write");
                    }
                    return match String::from_utf8(std::mem::take(&mut self.gathered)) {
                        Ok(text) => Ok(Some(text)),
                        Err(_) => Err("a workload is one JSON object in UTF-8"),
                    };
                }
            }
        }
        Ok(None)
    }

    fn settle(&mut self, text: String) {
        *self = Self {
            answer: text.into_bytes(),
            ..Self::default()
        };
    }
}

/// The field is empty where the workload as a whole was refused.
fn failure(refusal: &Refusal) -> String {
    let (message, field) = match refusal {
        Refusal::Spec(error) => (error.message.clone(), error.field.as_str()),
        Refusal::InField { field, refusal } => (refusal.to_string(), *field),
        other => (other.to_string(), ""),
    };
    let (message, field) = (Value::from(message), Value::from(field));
    format!("{{\"error\":{message},\"field\":{field}}}\n")
}

/// Finds the end of a JSON object. It counts braces outside of strings; whether
/// what is between them is JSON, the parser says.
#[derive(Debug, Default)]
struct Scanner {
    depth: u32,
    string: InString,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum InString {
    #[default]
    No,
    Yes,
    AfterBackslash,
}

enum Scanned {
    /// White space before the object.
    Before,
    /// Part of the object.
    Within,
    /// The brace that closes it.
    Last,
}

impl Scanner {
    fn next(&mut self, byte: u8) -> Result<Scanned, &'static str> {
        if self.depth == 0 {
            return match byte {
                b'{' => {
                    self.depth = 1;
                    Ok(Scanned::Within)
                }
                _ if byte.is_ascii_whitespace() => Ok(Scanned::Before),
                _ => Err("a workload is one JSON object, which begins with '{'"),
            };
        }
        match (self.string, byte) {
            (InString::AfterBackslash, _) => self.string = InString::Yes,
            (InString::Yes, b'\\') => self.string = InString::AfterBackslash,
            (InString::Yes, b'"') => self.string = InString::No,
            (InString::Yes, _) => {}
            (InString::No, b'"') => self.string = InString::Yes,
            (InString::No, b'{') => self.depth += 1,
            (InString::No, b'}') => self.depth -= 1,
            (InString::No, _) => {}
        }
        if self.depth == 0 {
            self.string = InString::No;
            return Ok(Scanned::Last);
        }
        Ok(Scanned::Within)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gcgroup_model::spec::SpecError;

    fn text(bytes: Vec<u8>) -> String {
        String::from_utf8(bytes).expect("answers are text")
    }

    #[test]
    fn an_object_may_come_line_by_line_and_ends_with_its_last_brace() {
        let stream = Stream::default();
        for part in ["\n", "{\n", "\"a\": {\"b\": \"}\\\"}\"},\n"] {
            assert_eq!(stream.write(part.as_bytes()), Step::Gathered, "{part:?}");
            assert!(stream.read(100).is_empty());
        }
        let whole = "{\n\"a\": {\"b\": \"}\\\"}\"},\n}";
        assert_eq!(stream.write(b"}\n"), Step::Complete(whole.to_owned()));
    }

    #[test]
    fn every_split_of_an_object_gives_the_same_text() {
        let whole = r#"{"name": "a{\\", "gpu": 0}"#;
        for at in 1..whole.len() {
            let stream = Stream::default();
            assert_eq!(stream.write(&whole.as_bytes()[..at]), Step::Gathered);
            let rest = &whole.as_bytes()[at..];
            assert_eq!(stream.write(rest), Step::Complete(whole.to_owned()));
        }
    }

    #[test]
    fn bytes_that_cannot_become_an_object_are_refused_with_a_reason() {
        for bytes in ["[1]", "x", "{} {}", "{}x"] {
            let stream = Stream::default();
            assert!(
                matches!(
                    stream.write(bytes.as_bytes()),
                    Step::Refused(Refusal::Invalid(_))
                ),
                "{bytes}"
            );
            assert!(text(stream.read(1000)).starts_with("{\"error\":"));
            assert_eq!(stream.write(b"{}"), Step::Complete("{}".to_owned()));
        }
        let stream = Stream::default();
        assert!(matches!(
            stream.write(b"{\"\xff\":1}"),
            Step::Refused(Refusal::Invalid(_))
        ));
    }

    #[test]
    fn an_object_beyond_the_limit_is_refused() {
        let stream = Stream::default();
        let longest = Grammar::Spec.longest();
        let mut fits = vec![b' '; longest];
        fits[0] = b'{';
        fits[longest - 1] = b'}';
        assert!(matches!(stream.write(&fits), Step::Complete(_)));
        stream.answer(&Ok(Done::Quiet));
        fits[longest - 1] = b' ';
        assert_eq!(stream.write(&fits), Step::Gathered);
        assert!(matches!(
            stream.write(b" "),
            Step::Refused(Refusal::Invalid(_))
        ));
    }

    #[test]
    fn an_answer_is_read_in_pieces_and_stays_until_the_next_object() {
        let stream = Stream::default();
        assert_eq!(stream.write(b"{}"), Step::Complete("{}".to_owned()));
        assert!(stream.read(10).is_empty());
        assert!(matches!(
            stream.write(b"{}"),
            Step::Refused(Refusal::Busy(_))
        ));
        stream.answer(&Ok(Done::Launched {
            pid: 7,
            gpu: 0,
            name: "a\"b".to_owned(),
        }));
        assert_eq!(text(stream.read(6)), "{\"pid\"");
        assert_eq!(stream.write(b"\n"), Step::Gathered);
        assert_eq!(
            text(stream.read(100)),
            ":7,\"gpu\":0,\"name\":\"a\\\"b\"}\n"
        );
        assert!(stream.read(100).is_empty());
    }

    #[test]
    fn the_next_object_discards_an_answer_that_nobody_read() {
        let stream = Stream::default();
        stream.answer(&Ok(Done::Quiet));
        assert_eq!(stream.write(b"{"), Step::Gathered);
        assert!(stream.read(100).is_empty());
    }

    #[test]
    fn a_failure_names_the_field() {
        let stream = Stream::default();
        stream.answer(&Err(Refusal::Spec(SpecError::new(
            "gpu",
            "must be \"a\" number",
        ))));
        assert_eq!(
            text(stream.read(1000)),
            "{\"error\":\"must be \\\"a\\\" number\",\"field\":\"gpu\"}\n"
        );
        stream.answer(&Err(Refusal::Busy("no slot".to_owned())));
        assert_eq!(
            text(stream.read(1000)),
            "{\"error\":\"no slot\",\"field\":\"\"}\n"
        );
    }
}
