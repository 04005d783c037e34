//! The values that control files hold, one type a grammar.
//!
//! Each type parses what a write may contain and displays what a read shows;
//! what it displays it also parses, so a value read can be written back.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// Why some bytes are not a value.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ValueError {
    /// Outside the grammar, or outside the range that the grammar names.
    #[error("{found:?} is not allowed here: {allowed}")]
    Invalid {
        /// What was written.
        found: String,
        /// What may be written.
        allowed: &'static str,
    },
    /// A number that its type cannot hold.
    #[error("{found:?} does not fit into 64 bits: {allowed}")]
    Range {
        /// What was written.
        found: String,
        /// What may be written.
        allowed: &'static str,
    },
}

fn invalid(found: &str, allowed: &'static str) -> ValueError {
    ValueError::Invalid {
        found: found.to_owned(),
        allowed,
    }
}

/// The text of one write: UTF-8, at most `longest` bytes, one trailing newline
/// taken off. Anything after that newline is outside every grammar.
///
/// # Errors
/// [`ValueError::Invalid`] when the bytes are too many or not UTF-8.
pub fn text<'a>(
    bytes: &'a [u8],
    longest: usize,
    allowed: &'static str,
) -> Result<&'a str, ValueError> {
    let lossy = || String::from_utf8_lossy(&bytes[..bytes.len().min(64)]).into_owned();
    if bytes.len() > longest {
        return Err(ValueError::Invalid {
            found: lossy(),
            allowed,
        });
    }
    let text = std::str::from_utf8(bytes).map_err(|_| ValueError::Invalid {
        found: lossy(),
        allowed,
    })?;
    Ok(text.strip_suffix('\n').unwrap_or(text))
}

/// A decimal number as kstrtoul reads one: digits, with one leading `+` at most.
///
/// # Errors
/// [`ValueError::Invalid`] for anything but digits, [`ValueError::Range`] for
/// more than 64 bits.
pub fn number(text: &str, allowed: &'static str) -> Result<u64, ValueError> {
    let digits = text.strip_prefix('+').unwrap_or(text);
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(invalid(text, allowed));
    }
    digits.parse().map_err(|_| ValueError::Range {
        found: text.to_owned(),
        allowed,
    })
}

/// Bytes with an optional K, M, G or T, each 1024 times the one before.
///
/// # Errors
/// As [`number`]; a suffix that overflows 64 bits is [`ValueError::Range`].
pub fn bytes(text: &str, allowed: &'static str) -> Result<u64, ValueError> {
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'K' | b'k') => (&text[..text.len() - 1], 10),
        Some(b'M' | b'm') => (&text[..text.len() - 1], 20),
        Some(b'G' | b'g') => (&text[..text.len() - 1], 30),
        Some(b'T' | b't') => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    let count = number(digits, allowed)?;
    count
        .checked_mul(1_u64 << shift)
        .ok_or_else(|| ValueError::Range {
            found: text.to_owned(),
            allowed,
        })
}

/// compute.priority: 0 is the most important, 15 the least.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Priority(u8);

impl Priority {
    /// Highest number, lowest importance.
    pub const LEAST: u8 = 15;

    /// A priority from its number, if it is one.
    #[must_use]
    pub fn new(number: u8) -> Option<Self> {
        (number <= Self::LEAST).then_some(Self(number))
    }

    /// The number, 0 to 15.
    #[must_use]
    pub fn get(self) -> u8 {
        self.0
    }

    /// Timeslice of the compute channel groups in microseconds. GVM's formula;
    /// 8 gives 2048 us, the driver's own default on Hopper.
    #[must_use]
    pub fn timeslice_usec(self) -> u64 {
        524_288 >> self.0
    }

    /// CUDA stream priority under spatial sharing, -5 to 0.
    #[must_use]
    pub fn stream_priority(self) -> i32 {
        -5 + i32::from(self.0) * 6 / 16
    }
}

impl Default for Priority {
    fn default() -> Self {
        Self(8)
    }
}

impl FromStr for Priority {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        const ALLOWED: &str = "a number from 0 to 15";
        let number = number(text, ALLOWED)?;
        u8::try_from(number)
            .ok()
            .and_then(Self::new)
            .ok_or_else(|| invalid(text, ALLOWED))
    }
}

impl fmt::Display for Priority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A file that holds 0 or 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Switch {
    /// 0.
    #[default]
    Off,
    /// 1.
    On,
}

impl Switch {
    /// Whether it is 1.
    #[must_use]
    pub fn is_on(self) -> bool {
        self == Self::On
    }
}

impl From<bool> for Switch {
    fn from(on: bool) -> Self {
        if on { Self::On } else { Self::Off }
    }
}

impl FromStr for Switch {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        const ALLOWED: &str = "0 or 1";
        match number(text, ALLOWED)? {
            0 => Ok(Self::Off),
            1 => Ok(Self::On),
            _ => Err(invalid(text, ALLOWED)),
        }
    }
}

impl fmt::Display for Switch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.is_on() { "1" } else { "0" })
    }
}

/// compute.max: GPU time in each period, both in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Quota {
    /// Microseconds of GPU time in each period; `None` is `max`.
    pub quota_usec: Option<u64>,
    /// Length of a period in microseconds.
    pub period_usec: u64,
}

impl Quota {
    /// Shortest and longest period in microseconds.
    pub const PERIOD_USEC: std::ops::RangeInclusive<u64> = 10_000..=1_000_000;
    /// Smallest quota in microseconds.
    pub const LEAST_USEC: u64 = 1_000;
    /// Period where none is written, in microseconds, as cpu.max has it.
    pub const DEFAULT_PERIOD_USEC: u64 = 100_000;
}

impl Default for Quota {
    fn default() -> Self {
        Self {
            quota_usec: None,
            period_usec: Self::DEFAULT_PERIOD_USEC,
        }
    }
}

impl FromStr for Quota {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        const ALLOWED: &str =
            "'QUOTA [PERIOD]' in microseconds, or 'max': period 10000 to 1000000, quota from 1000";
        let (first, period_usec) = match text.split_once(' ') {
            Some((first, period)) => (first, number(period, ALLOWED)?),
            None => (text, Self::DEFAULT_PERIOD_USEC),
        };
        if !Self::PERIOD_USEC.contains(&period_usec) {
            return Err(invalid(text, ALLOWED));
        }
        if first == "max" {
            return Ok(Self {
                quota_usec: None,
                period_usec,
            });
        }
        let quota = number(first, ALLOWED)?;
        if quota < Self::LEAST_USEC {
            return Err(invalid(text, ALLOWED));
        }
        Ok(Self {
            quota_usec: Some(quota),
            period_usec,
        })
    }
}

impl fmt::Display for Quota {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.quota_usec {
            Some(quota) => write!(f, "{quota} {}", self.period_usec),
            None => write!(f, "max {}", self.period_usec),
        }
    }
}

/// Name of a partition: `[a-z0-9][a-z0-9._-]{0,30}`, not `none`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PartitionName(String);

impl PartitionName {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for PartitionName {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        const ALLOWED: &str =
            "1 to 31 of a-z, 0-9, '.', '_' and '-', the first a letter or a digit, and not 'none'";
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        let well_formed = (1..=31).contains(&text.len())
            && text.bytes().next().is_some_and(plain)
            && text
                .bytes()
                .all(|b| plain(b) || matches!(b, b'.' | b'_' | b'-'));
        if !well_formed || text == NONE {
            return Err(invalid(text, ALLOWED));
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for PartitionName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

const NONE: &str = "none";

/// compute.partition: a partition, or all SMs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub enum PartitionRef {
    /// All SMs of the GPU.
    #[default]
    None,
    /// The SMs of that partition.
    Named(PartitionName),
}

impl PartitionRef {
    /// The partition's name, if there is one.
    #[must_use]
    pub fn name(&self) -> Option<&PartitionName> {
        match self {
            Self::None => None,
            Self::Named(name) => Some(name),
        }
    }
}

impl FromStr for PartitionRef {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        if text == NONE {
            Ok(Self::None)
        } else {
            text.parse().map(Self::Named)
        }
    }
}

impl fmt::Display for PartitionRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str(NONE),
            Self::Named(name) => name.fmt(f),
        }
    }
}

/// sm.count as written: a number of SMs or all that are free.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SmRequest {
    /// At least so many SMs.
    Count(u32),
    /// All that are free.
    Max,
}

impl FromStr for SmRequest {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        const ALLOWED: &str = "a number of SMs, or 'max'";
        if text == "max" {
            return Ok(Self::Max);
        }
        let count = number(text, ALLOWED)?;
        u32::try_from(count)
            .map(Self::Count)
            .map_err(|_| invalid(text, ALLOWED))
    }
}

impl fmt::Display for SmRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Count(count) => count.fmt(f),
            Self::Max => f.write_str("max"),
        }
    }
}

/// A file whose only command is `1`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct One;

impl FromStr for One {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        match number(text, "1")? {
            1 => Ok(Self),
            _ => Err(invalid(text, "1")),
        }
    }
}

impl fmt::Display for One {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("1")
    }
}

/// gcgroup.freeze as written: a state and the processes that shall have it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct FreezeSet {
    /// Frozen or running.
    pub state: Switch,
    /// Thread-group ids, as written, each once.
    pub pids: Vec<u32>,
}

impl FromStr for FreezeSet {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        const ALLOWED: &str = "'0 PID...' or '1 PID...', each pid once";
        let mut words = text.split(' ');
        let state = words.next().unwrap_or_default();
        let state = Switch::from_str(state).map_err(|_| invalid(text, ALLOWED))?;
        let mut pids = Vec::new();
        for word in words {
            let pid = number(word, ALLOWED)?;
            let pid = u32::try_from(pid).map_err(|_| invalid(text, ALLOWED))?;
            if pids.contains(&pid) {
                return Err(invalid(text, ALLOWED));
            }
            pids.push(pid);
        }
        if pids.is_empty() {
            return Err(invalid(text, ALLOWED));
        }
        Ok(Self { state, pids })
    }
}

impl fmt::Display for FreezeSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.state.fmt(f)?;
        self.pids.iter().try_for_each(|pid| write!(f, " {pid}"))
    }
}
