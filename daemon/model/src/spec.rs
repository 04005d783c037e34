//! What gcgroup.launch accepts: a workload as one JSON object.
//!
//! The fields stand in [`FIELDS`], from which the command line makes its flags.
//! The interference suite's configuration is read too and means the same.

use serde_json::{Map, Value, json};
use thiserror::Error;

use crate::value::{self, PartitionRef, Priority, Quota};

/// A field of the spec that was wrong.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{field}: {message}")]
pub struct SpecError {
    /// Name of the field, empty where the object as a whole is wrong.
    pub field: String,
    /// What was wrong with it and what is allowed.
    pub message: String,
}

impl SpecError {
    /// An error of this field.
    pub fn new(field: &str, message: impl Into<String>) -> Self {
        Self {
            field: field.to_owned(),
            message: message.into(),
        }
    }
}

/// One field of the spec.
#[derive(Debug)]
pub struct Field {
    /// Key in the JSON object and, with dashes, flag of the command line.
    pub name: &'static str,
    /// What a value looks like.
    pub kind: FieldKind,
    /// One sentence for the manual.
    pub manual: &'static str,
}

/// What a field's value looks like in JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FieldKind {
    /// A string.
    Text,
    /// A whole number.
    Number,
    /// `true` or `false`.
    Flag,
    /// A number, or a string with a suffix or a form of its own.
    NumberOrText,
}

const fn field(name: &'static str, kind: FieldKind, manual: &'static str) -> Field {
    Field { name, kind, manual }
}

/// Every field of a workload's spec.
#[rustfmt::skip]
pub static FIELDS: &[Field] = &[
    field("name", FieldKind::Text, "Name under workloads/; the kernel's name and a number if left out."),
    field("gpu", FieldKind::Number, "NVML index of the GPU, 0 if left out."),
    field("kernel", FieldKind::Text, "Kernel of the catalogue; the only field that must be given."),
    field("ilp", FieldKind::Number, "Independent chains of operations in each thread, 1 to 4."),
    field("blocks", FieldKind::NumberOrText, "Thread blocks, or 'per-sm:N' for N on each SM of the GPU."),
    field("threads", FieldKind::Number, "Threads in a block."),
    field("iterations", FieldKind::Number, "Iterations in one launch; calibrated to about 0.5 ms if left out."),
    field("sliced", FieldKind::Flag, "Whether a launch can be stopped in its middle; true if left out."),
    field("duration", FieldKind::Text, "How long it runs, as '500ms', '30s', '5m' or '1h'; until it is killed if left out."),
    field("bytes", FieldKind::NumberOrText, "Bytes of a copy, both buffers together, with an optional K, M, G or T."),
    field("partition", FieldKind::Text, "Partition that it starts in, 'none' if left out."),
    field("priority", FieldKind::Number, "compute.priority that it starts with, 8 if left out."),
    field("memory_limit", FieldKind::NumberOrText, "memory.limit that it starts with."),
    field("compute_max", FieldKind::Text, "compute.max that it starts with."),
    field("barrier", FieldKind::Text, "'NAME:N': starts together with the others of that name when all N are ready."),
];

/// Thread blocks of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blocks {
    /// So many.
    Count(u32),
    /// So many for each SM of the GPU.
    PerSm(u32),
}

/// A barrier: workloads of one name start together when all are ready.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Barrier {
    /// Name that the workloads share.
    pub name: String,
    /// How many there are.
    pub count: u32,
}

/// A workload to launch. `None` stands for a field that was left out.
#[derive(Clone, Debug, PartialEq)]
pub struct WorkloadSpec {
    /// Name under `workloads/`.
    pub name: Option<String>,
    /// NVML index of the GPU.
    pub gpu: u32,
    /// Kernel of the catalogue.
    pub kernel: String,
    /// Independent chains in each thread.
    pub ilp: Option<u32>,
    /// Thread blocks.
    pub blocks: Option<Blocks>,
    /// Threads in a block.
    pub threads: Option<u32>,
    /// Iterations in one launch; calibrated where left out.
    pub iterations: Option<u64>,
    /// Whether a launch can be stopped in its middle.
    pub sliced: bool,
    /// How long it runs, milliseconds; until it is killed where left out.
    pub duration_ms: Option<u64>,
    /// Bytes of a copy, both buffers together.
    pub bytes: Option<u64>,
    /// Partition that it starts in.
    pub partition: PartitionRef,
    /// Priority that it starts with.
    pub priority: Priority,
    /// Limit of resident bytes that it starts with.
    pub memory_limit: Option<u64>,
    /// Quota that it starts with.
    pub compute_max: Quota,
    /// Barrier that it starts behind.
    pub barrier: Option<Barrier>,
}

impl WorkloadSpec {
    /// A spec with only the kernel given.
    #[must_use]
    pub fn of_kernel(kernel: &str) -> Self {
        Self {
            name: None,
            gpu: 0,
            kernel: kernel.to_owned(),
            ilp: None,
            blocks: None,
            threads: None,
            iterations: None,
            sliced: true,
            duration_ms: None,
            bytes: None,
            partition: PartitionRef::None,
            priority: Priority::default(),
            memory_limit: None,
            compute_max: Quota::default(),
            barrier: None,
        }
    }

    /// Reads a spec from a complete JSON text.
    ///
    /// # Errors
    /// The field that is unknown, missing, of the wrong type or out of range.
    /// Whether the kernel exists and its parameters suit it, the catalogue says.
    pub fn parse(text: &str) -> Result<Self, SpecError> {
        let value: Value = serde_json::from_str(text)
            .map_err(|error| SpecError::new("", format!("not a JSON object: {error}")))?;
        let Value::Object(object) = value else {
            return Err(SpecError::new("", "not a JSON object"));
        };
        if object.contains_key("kernel_name") {
            return Self::from_fields(&suite_fields(&object)?);
        }
        Self::from_fields(&object)
    }

    fn from_fields(object: &Map<String, Value>) -> Result<Self, SpecError> {
        let mut spec = None;
        match object.get("kernel") {
            Some(Value::String(kernel)) => spec = Some(Self::of_kernel(kernel)),
            Some(_) => return Err(SpecError::new("kernel", "must be the name of a kernel")),
            None => {}
        }
        for key in object.keys() {
            if !FIELDS.iter().any(|field| field.name == key) {
                let known: Vec<_> = FIELDS.iter().map(|field| field.name).collect();
                return Err(SpecError::new(
                    key,
                    format!("no such field; there are {}", known.join(", ")),
                ));
            }
        }
        let mut spec = spec.ok_or_else(|| SpecError::new("kernel", "must be given"))?;
        for (key, value) in object {
            if !value.is_null() {
                spec.set(key, value)?;
            }
        }
        Ok(spec)
    }

    fn set(&mut self, key: &str, value: &Value) -> Result<(), SpecError> {
        match key {
            "name" => self.name = Some(workload_name(value)?),
            "gpu" => self.gpu = small(key, value)?,
            "ilp" => self.ilp = Some(small(key, value)?),
            "blocks" => self.blocks = Some(blocks(value)?),
            "threads" => self.threads = Some(small(key, value)?),
            "iterations" => self.iterations = Some(positive(key, value)?),
            "sliced" => {
                self.sliced = value
                    .as_bool()
                    .ok_or_else(|| SpecError::new(key, "must be true or false"))?;
            }
            "duration" => self.duration_ms = Some(duration_ms(key, text(key, value)?)?),
            "bytes" => self.bytes = Some(byte_count(key, value)?),
            "partition" => self.partition = parsed(key, text(key, value)?)?,
            "priority" => self.priority = parsed(key, &number(key, value)?.to_string())?,
            "memory_limit" => self.memory_limit = Some(byte_count(key, value)?),
            "compute_max" => self.compute_max = parsed(key, text(key, value)?)?,
            "barrier" => self.barrier = Some(barrier(text(key, value)?)?),
            // The kernel is set already; from_fields refuses every other key.
            _ => {}
        }
        Ok(())
    }

    /// The spec as JSON, each field that has a value in it.
    #[must_use]
    pub fn to_json(&self) -> String {
        json!({
            "name": self.name,
            "gpu": self.gpu,
            "kernel": self.kernel,
            "ilp": self.ilp,
            "blocks": self.blocks.map(|blocks| match blocks {
                Blocks::Count(count) => json!(count),
                Blocks::PerSm(count) => json!(format!("per-sm:{count}")),
            }),
            "threads": self.threads,
            "iterations": self.iterations,
            "sliced": self.sliced,
            "duration": self.duration_ms.map(|ms| format!("{ms}ms")),
            "bytes": self.bytes,
            "partition": self.partition.to_string(),
            "priority": self.priority.get(),
            "memory_limit": self.memory_limit,
            "compute_max": self.compute_max.to_string(),
            "barrier": self.barrier.as_ref().map(|b| format!("{}:{}", b.name, b.count)),
        })
        .to_string()
    }
}

fn text<'a>(key: &str, value: &'a Value) -> Result<&'a str, SpecError> {
    value
        .as_str()
        .ok_or_else(|| SpecError::new(key, "must be a string"))
}

fn number(key: &str, value: &Value) -> Result<u64, SpecError> {
    value
        .as_u64()
        .ok_or_else(|| SpecError::new(key, "must be a whole number, not negative"))
}

fn small(key: &str, value: &Value) -> Result<u32, SpecError> {
    u32::try_from(number(key, value)?).map_err(|_| SpecError::new(key, "must be below 4294967296"))
}

fn positive(key: &str, value: &Value) -> Result<u64, SpecError> {
    match number(key, value)? {
        0 => Err(SpecError::new(key, "must be at least 1")),
        number => Ok(number),
    }
}

fn parsed<T: std::str::FromStr<Err = value::ValueError>>(
    key: &str,
    text: &str,
) -> Result<T, SpecError> {
    text.parse()
        .map_err(|error: value::ValueError| SpecError::new(key, error.to_string()))
}

fn byte_count(key: &str, value: &Value) -> Result<u64, SpecError> {
    const ALLOWED: &str = "a number of bytes, with an optional K, M, G or T";
    match value {
        Value::String(text) => {
            value::bytes(text, ALLOWED).map_err(|error| SpecError::new(key, error.to_string()))
        }
        _ => number(key, value).map_err(|_| SpecError::new(key, format!("must be {ALLOWED}"))),
    }
}

/// A name becomes a symlink's name: the same letters as a partition's, and
/// capitals.
fn workload_name(value: &Value) -> Result<String, SpecError> {
    const ALLOWED: &str =
        "must be 1 to 63 of letters, digits, '.', '_' and '-', the first a letter or a digit";
    let name = value
        .as_str()
        .ok_or_else(|| SpecError::new("name", ALLOWED))?;
    let fits = (1..=63).contains(&name.len())
        && name.as_bytes()[0].is_ascii_alphanumeric()
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'));
    if fits {
        Ok(name.to_owned())
    } else {
        Err(SpecError::new("name", ALLOWED))
    }
}

fn blocks(value: &Value) -> Result<Blocks, SpecError> {
    const ALLOWED: &str = "must be a number from 1 or 'per-sm:N'";
    let wrong = || SpecError::new("blocks", ALLOWED);
    let (count, per_sm) = match value {
        Value::String(text) => {
            let count = text.strip_prefix("per-sm:").ok_or_else(wrong)?;
            (value::number(count, ALLOWED).map_err(|_| wrong())?, true)
        }
        _ => (value.as_u64().ok_or_else(wrong)?, false),
    };
    match u32::try_from(count) {
        Ok(0) | Err(_) => Err(wrong()),
        Ok(count) if per_sm => Ok(Blocks::PerSm(count)),
        Ok(count) => Ok(Blocks::Count(count)),
    }
}

fn barrier(text: &str) -> Result<Barrier, SpecError> {
    const ALLOWED: &str = "must be 'NAME:N' with N from 2 to 64";
    let wrong = || SpecError::new("barrier", ALLOWED);
    let (name, count) = text.rsplit_once(':').ok_or_else(wrong)?;
    let count = value::number(count, ALLOWED).map_err(|_| wrong())?;
    if name.is_empty() || name.len() > 63 || !(2..=64).contains(&count) {
        return Err(wrong());
    }
    let count = u32::try_from(count).map_err(|_| wrong())?;
    Ok(Barrier {
        name: name.to_owned(),
        count,
    })
}

/// A length of time as '500ms', '30s', '5m' or '1h', in milliseconds; at most
/// 30 days, so that no sum of it with a clock overflows.
///
/// # Errors
/// The field and what is allowed.
pub fn duration_ms(key: &str, text: &str) -> Result<u64, SpecError> {
    const ALLOWED: &str =
        "must be a length of time as '500ms', '30s', '5m' or '1h', from 1ms to 720h";
    let wrong = || SpecError::new(key, ALLOWED);
    let split = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
    let (digits, unit) = text.split_at(split);
    let factor = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err(wrong()),
    };
    let count = value::number(digits, ALLOWED).map_err(|_| wrong())?;
    match count.checked_mul(factor) {
        Some(ms) if (1..=2_592_000_000).contains(&ms) => Ok(ms),
        _ => Err(wrong()),
    }
}

/// The interference suite's configuration in our fields: `kernel_name`,
/// `init_args` (`num_floats`) and `run_args` (`num_tb`, `num_threads_per_block`,
/// `num_itrs`). One run there is one uninterrupted kernel, so it is not sliced.
fn suite_fields(object: &Map<String, Value>) -> Result<Map<String, Value>, SpecError> {
    let mut fields = Map::new();
    fields.insert("sliced".into(), Value::Bool(false));
    for (key, value) in object {
        match (key.as_str(), value) {
            ("kernel_name", Value::String(name)) => suite_kernel(name, &mut fields),
            ("init_args" | "run_args", Value::Object(args)) => suite_args(key, args, &mut fields)?,
            ("kernel_name", _) => return Err(SpecError::new(key, "must be a string")),
            ("init_args" | "run_args", _) => return Err(SpecError::new(key, "must be an object")),
            _ => {
                return Err(SpecError::new(
                    key,
                    "no such field beside kernel_name; there are init_args, run_args",
                ));
            }
        }
    }
    // A copy there is told the floats of one buffer; `bytes` is both.
    if !matches!(
        fields.get("kernel").and_then(Value::as_str),
        Some("copy" | "copy_per_block")
    ) {
        fields.remove("bytes");
    }
    Ok(fields)
}

fn suite_kernel(name: &str, fields: &mut Map<String, Value>) {
    let (kernel, ilp) = match name.rsplit_once("_ilp") {
        Some((kernel, digits)) => (kernel, digits.parse::<u32>().ok()),
        None => (name, None),
    };
    let kernel = match kernel {
        "copy_kernel" => "copy",
        "copy_kernel_per_tb" => "copy_per_block",
        "sleep_kernel" => "sleep",
        other => other,
    };
    fields.insert("kernel".into(), kernel.into());
    if let Some(ilp) = ilp {
        fields.insert("ilp".into(), ilp.into());
    }
}

fn suite_args(
    group: &str,
    args: &Map<String, Value>,
    fields: &mut Map<String, Value>,
) -> Result<(), SpecError> {
    for (key, value) in args {
        let ours = match (group, key.as_str()) {
            ("run_args", "num_tb") => "blocks",
            ("run_args", "num_threads_per_block") => "threads",
            ("run_args", "num_itrs") => "iterations",
            ("run_args", "kernel_name") => {
                let name = text(key, value)?;
                suite_kernel(name, fields);
                continue;
            }
            ("init_args", "num_floats") => {
                let bytes = number(key, value)?
                    .checked_mul(8)
                    .ok_or_else(|| SpecError::new(key, "does not fit into 64 bits of bytes"))?;
                fields.insert("bytes".into(), bytes.into());
                continue;
            }
            // The suite's own build product; our kernels are in the catalogue.
            ("init_args", "shared_lib") => continue,
            _ => return Err(SpecError::new(key, format!("no such field in {group}"))),
        };
        fields.insert(ours.into(), value.clone());
    }
    Ok(())
}
