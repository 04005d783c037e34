//! What a whole text of each file looks like. A torn read fits none of these.

use gcgroup_integration_tests::keyed;
use gcgroup_model::File;
use gcgroup_model::value::{PartitionRef, Priority, Quota, Switch};

/// Why this text is not one that the file can hold.
pub(crate) fn check(file: File, text: &str) -> Result<(), String> {
    if !text.is_empty() && !text.ends_with('\n') {
        return Err("it has no newline at its end".to_owned());
    }
    let line = text.trim_end();
    match file {
        // Reads drain an answer; without one there is nothing.
        File::Launch => expect(text.is_empty(), "it is not empty"),
        File::Kill => Err("it was read".to_owned()),
        File::Version | File::GpuName | File::GpuUuid | File::Cgroup | File::Comm => {
            expect(text.lines().count() == 1, "it is not one line")
        }
        File::SmCapacity
        | File::SmGranularity
        | File::GpuMemoryCapacity
        | File::GpuMemoryCurrent
        | File::SmCount
        | File::Uid
        | File::MemoryCurrent
        | File::MemoryPeak => line
            .parse::<u64>()
            .map(drop)
            .map_err(|error| error.to_string()),
        File::Pending => text
            .lines()
            .try_for_each(parsed::<gcgroup_model::change::Pending>),
        File::FreezeMany | File::PartitionMembers => numbers(text.lines()),
        File::SmGroups => numbers(line.split_whitespace()),
        File::ProcessList => match text.strip_prefix("PID\n") {
            Some(rest) => numbers(rest.lines()),
            None => Err("it has no heading".to_owned()),
        },
        File::Priority => parsed::<Priority>(line),
        File::Freeze => parsed::<Switch>(line),
        File::Max => parsed::<Quota>(line),
        File::Partition => parsed::<PartitionRef>(line),
        File::ServiceStat | File::GpuUtilization | File::GpuEvents => {
            keyed::numbers(text).map(drop)
        }
        File::Stat => counters(text),
        File::Events => {
            let found = keyed::numbers(text)?;
            let keys: Vec<_> = found.keys().map(String::as_str).collect();
            expect(
                keys == ["frozen", "held", "pending", "populated"],
                "its keys are others",
            )?;
            expect(found.values().all(|&value| value < 2), "a state is 0 or 1")
        }
        File::GpuEnforcers | File::Enforcers => keyed::lines(text).map(drop),
        File::WorkloadSpec => serde_json::from_str::<serde_json::Value>(text)
            .map(drop)
            .map_err(|error| error.to_string()),
        File::WorkloadSamples => samples(text),
    }
}

fn expect(holds: bool, otherwise: &str) -> Result<(), String> {
    if holds {
        Ok(())
    } else {
        Err(otherwise.to_owned())
    }
}

fn parsed<T: std::str::FromStr>(text: &str) -> Result<(), String>
where
    T::Err: std::fmt::Display,
{
    text.parse::<T>()
        .map(drop)
        .map_err(|error| error.to_string())
}

/// Ascending, each once.
fn numbers<'a>(words: impl Iterator<Item = &'a str>) -> Result<(), String> {
    let numbers: Result<Vec<u32>, _> = words.map(str::parse).collect();
    let numbers = numbers.map_err(|error| error.to_string())?;
    expect(
        numbers.is_sorted_by(|a, b| a < b),
        "its numbers do not ascend",
    )
}

fn counters(text: &str) -> Result<(), String> {
    let found = keyed::numbers(text)?;
    let count = |key: &str| found.get(key).copied().ok_or(format!("{key:?} is missing"));
    let submitted = count("nr_submitted_kernels")?;
    let ended = count("nr_ended_kernels")?;
    expect(submitted >= ended, "more have ended than were submitted")?;
    let pending = count("nr_pending_kernels")?;
    expect(
        pending == submitted - ended,
        "pending is not the difference",
    )?;
    count("usage_usec").map(drop)
}

fn samples(text: &str) -> Result<(), String> {
    let mut lines = text.lines();
    expect(
        lines.next() == Some("seq,start_ns,device_us,wall_us,sm_count"),
        "its heading is another",
    )?;
    let mut last = None;
    for line in lines {
        let cells: Result<Vec<f64>, _> = line.split(',').map(str::parse).collect();
        let cells = cells.map_err(|error| format!("{line:?}: {error}"))?;
        expect(cells.len() == 5, "a line has not 5 cells")?;
        expect(last < Some(cells[0]), "seq does not ascend")?;
        last = Some(cells[0]);
    }
    Ok(())
}
