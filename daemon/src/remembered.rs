//! What a service remembers of living processes for the one after it: the
//! settings of those that it did not launch, and the lines of gcgroup.pending.
//!
//! One JSON file in the state directory, which lies on tmpfs: nothing of it
//! outlives a reboot. A thread of its own writes it whole and renames it into
//! place; the newest state replaces one that was not written yet. A freeze is
//! never kept: what was stopped runs when the service is gone.
//!
//! A line of gcgroup.pending goes on waiting for descendants when it has come true
//! for a process. So a file of a process that was set once, by a line or past it,
//! is settled: no line sets it again.

mod writer;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;
use std::str::FromStr;

use anyhow::{Context, Result, bail};
use gcgroup_model::change::{Pending, Setting};
use gcgroup_model::row::File;
use gcgroup_model::value::{Priority, Quota};
use serde::{Deserialize, Serialize};

use self::writer::Writer;
use crate::procfs;

const FILE: &str = "settings.json";
const FRESH: &str = "settings.new";
const DAMAGED: &str = "settings.damaged";

/// Settings of one process on one GPU that outlive the service.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Kept {
    /// compute.priority.
    pub(crate) priority: Priority,
    /// compute.max.
    pub(crate) max: Quota,
}

/// The files that may wait.
const WAITING: [File; 3] = [File::Priority, File::Freeze, File::Max];

/// What is remembered of one process on one GPU; where nothing is, there is none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Here {
    kept: Kept,
    /// Files for which nothing waits any more, each once.
    settled: Vec<File>,
}

/// A pid and a start time in clock ticks since boot, which name a process for
/// good.
type Process = (u32, u64);

/// What is remembered of living processes.
#[derive(Debug)]
pub(crate) struct Remembered {
    /// By process and UUID of the GPU.
    settings: BTreeMap<Process, BTreeMap<String, Here>>,
    /// In the order in which they were written, each with the start time of its
    /// process.
    pending: Vec<(Pending, u64)>,
    /// Whether something is not on its way to the file yet.
    dirty: bool,
    /// `None` where no thread could be started: nothing survives then.
    writer: Option<Writer>,
}

impl Drop for Remembered {
    /// The writer, dropped after this, waits until everything is written.
    fn drop(&mut self) {
        self.flush();
    }
}

impl Remembered {
    /// What an earlier service remembered of processes that still live. A file
    /// that is damaged is set aside.
    pub(crate) fn load(state: &Path) -> Self {
        let loaded = load(state).unwrap_or_else(|error| {
            let aside = state.join(DAMAGED);
            let error = format!("{error:#}");
            match fs::rename(state.join(FILE), &aside) {
                Ok(()) => tracing::error!(error, aside = %aside.display(), "the remembered settings are damaged and were set aside"),
                Err(rename) => tracing::error!(error, %rename, "the remembered settings are damaged and are overwritten"),
            }
            Loaded::default()
        });
        let mut remembered = Self {
            settings: loaded.settings,
            pending: loaded.pending,
            dirty: false,
            writer: None,
        };
        let is_running = |&(pid, start): &Process| procfs::is_running(pid, start);
        remembered.settings.retain(|process, _| is_running(process));
        let living = |(pending, start): &(Pending, u64)| is_running(&(pending.pid, *start));
        remembered.pending.retain(living);
        remembered.writer = match Writer::start(state) {
            Ok(writer) => Some(writer),
            Err(error) => {
                tracing::error!(%error, "no thread to write settings: they end with this service");
                None
            }
        };
        remembered
    }

    /// Settings of a process on a GPU, where they are not the defaults.
    pub(crate) fn settings(&self, pid: u32, start: u64, gpu_uuid: &str) -> Option<Kept> {
        let here = self.settings.get(&(pid, start))?.get(gpu_uuid)?;
        (here.kept != Kept::default()).then_some(here.kept)
    }

    /// Remembers settings; defaults are forgotten.
    pub(crate) fn keep(&mut self, pid: u32, start: u64, gpu_uuid: &str, kept: Kept) {
        self.change(pid, start, gpu_uuid, |here| here.kept = kept);
    }

    /// Notes that this file of a process was set, so that nothing waits for it any
    /// more: a setting that waited has come true, or another one took its place,
    /// the default too.
    pub(crate) fn settle(&mut self, pid: u32, start: u64, gpu_uuid: &str, file: File) {
        self.change(pid, start, gpu_uuid, |here| {
            if WAITING.contains(&file) && !here.settled.contains(&file) {
                here.settled.push(file);
            }
        });
    }

    fn change(&mut self, pid: u32, start: u64, gpu: &str, change: impl FnOnce(&mut Here)) {
        let known = self.settings.get(&(pid, start));
        let before = known.and_then(|gpus| gpus.get(gpu)).cloned();
        let before = before.unwrap_or_default();
        let mut after = before.clone();
        change(&mut after);
        if after == before {
            return;
        }
        let gpus = self.settings.entry((pid, start)).or_default();
        if after == Here::default() {
            gpus.remove(gpu);
        } else {
            gpus.insert(gpu.to_owned(), after);
        }
        if gpus.is_empty() {
            self.settings.remove(&(pid, start));
        }
        self.write();
    }

    /// Forgets the settings of a process and what is settled: it has ended.
    pub(crate) fn forget(&mut self, pid: u32, start: u64) {
        if self.settings.remove(&(pid, start)).is_some() {
            self.write();
        }
    }

    /// Remembers a setting that waits; one for the same process and file is
    /// replaced. That file of the process itself is not settled any more, that of
    /// its descendants stays so.
    pub(crate) fn pend(&mut self, pid: u32, start: u64, pending: Pending) {
        debug_assert_eq!(pid, pending.pid);
        let file = pending.setting.file();
        self.pending.retain(|(other, its_start)| {
            (other.pid, *its_start, other.setting.file()) != (pid, start, file)
        });
        self.pending.push((pending, start));
        if let Some(gpus) = self.settings.get_mut(&(pid, start)) {
            for here in gpus.values_mut() {
                here.settled.retain(|settled| *settled != file);
            }
            gpus.retain(|_, here| *here != Here::default());
            if gpus.is_empty() {
                self.settings.remove(&(pid, start));
            }
        }
        self.write();
    }

    /// Forgets what waits for a process.
    pub(crate) fn unpend(&mut self, pid: u32, start: u64) {
        let before = self.pending.len();
        self.pending
            .retain(|(pending, its_start)| (pending.pid, *its_start) != (pid, start));
        if self.pending.len() != before {
            self.write();
        }
    }

    /// What waits, the oldest first, each with the start time of its process.
    pub(crate) fn pending(&self) -> impl Iterator<Item = (&Pending, u64)> {
        self.pending
            .iter()
            .map(|(pending, start)| (pending, *start))
    }

    /// The settings that wait for a process on a GPU, one a file, without what is
    /// settled there. `lineage` is the process itself, its parent, and so on, each
    /// with its start time; of two settings of one file the one of the nearer
    /// process counts.
    pub(crate) fn waiting_for(&self, lineage: &[(u32, u64)], gpu_uuid: &str) -> Vec<Setting> {
        let own = lineage.first().and_then(|own| self.settings.get(own));
        let settled = own
            .and_then(|gpus| gpus.get(gpu_uuid))
            .map_or(&[][..], |here| &here.settled);
        let mut found: Vec<Setting> = Vec::new();
        for process in lineage {
            for (pending, start) in &self.pending {
                let file = pending.setting.file();
                let nearer = found.iter().any(|setting| setting.file() == file);
                if (pending.pid, *start) == *process && !nearer && !settled.contains(&file) {
                    found.push(pending.setting.clone());
                }
            }
        }
        found
    }

    /// Something has changed; it is written with the next [`Remembered::flush`].
    fn write(&mut self) {
        self.dirty = true;
    }

    /// Hands what has changed to the thread that writes. Many changes at a time,
    /// as when a tree of processes ends, are written once.
    pub(crate) fn flush(&mut self) {
        if !std::mem::take(&mut self.dirty) {
            return;
        }
        let Some(writer) = &self.writer else {
            return;
        };
        let settings = self.settings.iter().flat_map(|(&(pid, start), gpus)| {
            gpus.iter().map(move |(gpu, here)| Line {
                pid,
                start,
                gpu: gpu.clone(),
                priority: here.kept.priority.to_string(),
                max: here.kept.max.to_string(),
                settled: here.settled.iter().map(|file| file.name().into()).collect(),
            })
        });
        let pending = self.pending.iter().map(|(pending, start)| PendingLine {
            start: *start,
            pending: pending.to_string(),
        });
        writer.write(Contents {
            settings: settings.collect(),
            pending: pending.collect(),
        });
    }
}

/// The file. Values are as in the control files.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Contents {
    settings: Vec<Line>,
    pending: Vec<PendingLine>,
}

/// Settings of one process on one GPU.
#[derive(Debug, Serialize, Deserialize)]
struct Line {
    pid: u32,
    start: u64,
    gpu: String,
    priority: String,
    max: String,
    /// Names of files. A file of an earlier version has none.
    #[serde(default)]
    settled: Vec<String>,
}

/// A line of gcgroup.pending, with the start time of its process.
#[derive(Debug, Serialize, Deserialize)]
struct PendingLine {
    start: u64,
    pending: String,
}

/// What a file held.
#[derive(Debug, Default)]
struct Loaded {
    settings: BTreeMap<Process, BTreeMap<String, Here>>,
    pending: Vec<(Pending, u64)>,
}

fn load(state: &Path) -> Result<Loaded> {
    let path = state.join(FILE);
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Loaded::default()),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    };
    let contents: Contents = serde_json::from_slice(&text)
        .with_context(|| format!("{} is not a list of settings", path.display()))?;
    let mut loaded = Loaded::default();
    for line in contents.settings {
        let kept = Kept {
            priority: value(&line.priority, &path)?,
            max: value(&line.max, &path)?,
        };
        let settled = line.settled.iter().map(|name| waiting(name, &path));
        let settled = settled.collect::<Result<_>>()?;
        let gpus = loaded.settings.entry((line.pid, line.start)).or_default();
        gpus.insert(line.gpu, Here { kept, settled });
    }
    for line in contents.pending {
        let pending = value(&line.pending, &path)?;
        loaded.pending.push((pending, line.start));
    }
    Ok(loaded)
}

fn waiting(name: &str, path: &Path) -> Result<File> {
    let Some(file) = WAITING.into_iter().find(|file| file.name() == name) else {
        bail!("{} names a file {name:?} that never waits", path.display());
    };
    Ok(file)
}

fn value<T>(text: &str, path: &Path) -> Result<T>
where
    T: FromStr,
    T::Err: std::error::Error + Send + Sync + 'static,
{
    text.parse()
        .with_context(|| format!("{} holds a wrong value", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use gcgroup_model::value::Switch;
    use tempfile::TempDir;

    /// This process, which lives.
    fn own() -> Process {
        let pid = std::process::id();
        (pid, procfs::start_time(pid).expect("it runs"))
    }

    fn state() -> TempDir {
        tempfile::tempdir().expect("a temporary directory")
    }

    fn priority(number: u8) -> Priority {
        Priority::new(number).expect("one of them")
    }

    fn kept(number: u8) -> Kept {
        Kept {
            priority: priority(number),
            max: "30000 100000".parse().expect("a quota"),
        }
    }

    fn pending(pid: u32, rest: &str) -> Pending {
        format!("{pid} {rest}")
            .parse()
            .expect("it is in the grammar")
    }

    fn lines(remembered: &Remembered) -> Vec<String> {
        let line = |(pending, _): (&Pending, u64)| pending.to_string();
        remembered.pending().map(line).collect()
    }

    #[test]
    fn settings_and_what_waits_survive_for_the_living() {
        let state = state();
        let (pid, start) = own();
        let mut before = Remembered::load(state.path());
        before.keep(pid, start, "GPU-a", kept(3));
        before.keep(pid, start, "GPU-b", kept(4));
        before.keep(pid, start + 1, "GPU-a", kept(5));
        before.pend(pid, start, pending(pid, "compute.freeze 1"));
        before.pend(pid, start + 1, pending(pid, "compute.priority 5"));
        drop(before);
        let after = Remembered::load(state.path());
        assert_eq!(after.settings(pid, start, "GPU-a"), Some(kept(3)));
        assert_eq!(after.settings(pid, start, "GPU-b"), Some(kept(4)));
        assert_eq!(after.settings(pid, start, "GPU-c"), None);
        assert_eq!(after.settings(pid, start + 1, "GPU-a"), None);
        assert_eq!(lines(&after), [format!("{pid} compute.freeze 1")]);
        assert_eq!(
            after.pending().map(|(_, start)| start).collect::<Vec<_>>(),
            [start]
        );
    }

    #[test]
    fn defaults_are_not_remembered() {
        let state = state();
        let (pid, start) = own();
        let mut remembered = Remembered::load(state.path());
        remembered.keep(pid, start, "GPU-a", Kept::default());
        assert!(remembered.settings.is_empty());
        remembered.keep(pid, start, "GPU-a", kept(3));
        remembered.keep(pid, start, "GPU-a", Kept::default());
        assert!(remembered.settings.is_empty());
        drop(remembered);
        assert!(Remembered::load(state.path()).settings.is_empty());
    }

    #[test]
    fn what_is_forgotten_does_not_come_back() {
        let state = state();
        let (pid, start) = own();
        let mut remembered = Remembered::load(state.path());
        for gpu in ["GPU-a", "GPU-b"] {
            remembered.keep(pid, start, gpu, kept(3));
        }
        remembered.pend(pid, start, pending(pid, "compute.max 5000"));
        remembered.forget(pid, start);
        remembered.unpend(pid, start);
        drop(remembered);
        let after = Remembered::load(state.path());
        assert_eq!(after.settings(pid, start, "GPU-a"), None);
        assert_eq!(after.settings(pid, start, "GPU-b"), None);
        assert_eq!(lines(&after), [""; 0]);
    }

    #[test]
    fn one_setting_a_file_waits_for_a_process() {
        let state = state();
        let mut remembered = Remembered::load(state.path());
        remembered.pend(7, 1, pending(7, "compute.priority 3"));
        remembered.pend(7, 1, pending(7, "compute.freeze 1"));
        remembered.pend(7, 2, pending(7, "compute.priority 4"));
        remembered.pend(7, 1, pending(7, "compute.priority 5"));
        assert_eq!(
            lines(&remembered),
            [
                "7 compute.freeze 1",
                "7 compute.priority 4",
                "7 compute.priority 5"
            ]
        );
        remembered.unpend(7, 1);
        assert_eq!(lines(&remembered), ["7 compute.priority 4"]);
    }

    #[test]
    fn the_nearest_ancestors_setting_counts() {
        let state = state();
        let mut remembered = Remembered::load(state.path());
        remembered.pend(1, 10, pending(1, "compute.priority 1"));
        remembered.pend(1, 10, pending(1, "compute.freeze 1"));
        remembered.pend(2, 20, pending(2, "compute.priority 2"));
        remembered.pend(3, 30, pending(3, "compute.max 5000"));
        let max = Setting::Max("5000".parse().expect("a quota"));
        assert_eq!(
            remembered.waiting_for(&[(3, 30), (2, 20), (1, 10)], "GPU-a"),
            [
                max.clone(),
                Setting::Priority(priority(2)),
                Setting::Freeze(Switch::On)
            ]
        );
        assert_eq!(remembered.waiting_for(&[(3, 30)], "GPU-a"), [max]);
        assert_eq!(remembered.waiting_for(&[(2, 21)], "GPU-a"), []);
        assert_eq!(remembered.waiting_for(&[], "GPU-a"), []);
    }

    #[test]
    fn what_was_set_once_does_not_wait_after_a_restart() {
        let state = state();
        let (pid, start) = own();
        let line = [(pid, start), (1, 10)];
        let mut remembered = Remembered::load(state.path());
        for rest in ["compute.freeze 1", "compute.priority 3"] {
            remembered.pend(pid, start, pending(pid, rest));
        }
        let freeze = Setting::Freeze(Switch::On);
        let both = [freeze.clone(), Setting::Priority(priority(3))];
        assert_eq!(remembered.waiting_for(&line, "GPU-a"), both);
        // The freeze came true, the priority too, and then it was set back.
        remembered.settle(pid, start, "GPU-a", File::Freeze);
        remembered.settle(pid, start, "GPU-a", File::Priority);
        remembered.keep(pid, start, "GPU-a", kept(3));
        remembered.keep(pid, start, "GPU-a", Kept::default());
        for _ in 0..2 {
            drop(remembered);
            remembered = Remembered::load(state.path());
            assert_eq!(remembered.settings(pid, start, "GPU-a"), None);
            assert_eq!(remembered.waiting_for(&line, "GPU-a"), []);
            // Another GPU, and a child.
            assert_eq!(remembered.waiting_for(&line, "GPU-b"), both);
            let child = [(u32::MAX, 1), line[0]];
            assert_eq!(remembered.waiting_for(&child, "GPU-a"), both);
        }
        // What is written anew counts anew.
        remembered.pend(pid, start, pending(pid, "compute.freeze 1"));
        assert_eq!(remembered.waiting_for(&line, "GPU-a"), [freeze]);
        remembered.settle(pid, start, "GPU-a", File::Freeze);
        assert_eq!(remembered.waiting_for(&line, "GPU-a"), []);
        remembered.forget(pid, start);
        assert!(remembered.settings.is_empty());
        assert_eq!(remembered.waiting_for(&line, "GPU-a").len(), 2);
    }

    #[test]
    fn an_ancestors_line_is_settled_for_the_process_that_it_came_true_for() {
        let state = state();
        let (pid, start) = own();
        let mut remembered = Remembered::load(state.path());
        remembered.pend(1, 10, pending(1, "compute.priority 3"));
        remembered.settle(pid, start, "GPU-a", File::Priority);
        let child = [(pid, start), (1, 10)];
        assert_eq!(remembered.waiting_for(&child, "GPU-a"), []);
        assert_eq!(remembered.waiting_for(&[(1, 10)], "GPU-a").len(), 1);
        // Not for its first context, which it had.
        remembered.pend(1, 10, pending(1, "compute.priority 4"));
        assert_eq!(remembered.waiting_for(&child, "GPU-a"), []);
        remembered.settle(pid, start, "GPU-b", File::Partition);
        assert_eq!(remembered.settings[&(pid, start)].len(), 1);
    }

    #[test]
    fn a_file_of_an_earlier_version_is_read() {
        let state = state();
        let (pid, start) = own();
        let text = format!(
            r#"{{"settings":[{{"pid":{pid},"start":{start},"gpu":"GPU-a","priority":"3","max":"30000 100000"}}],"pending":[]}}"#
        );
        fs::write(state.path().join(FILE), text).expect("writable");
        let remembered = Remembered::load(state.path());
        assert_eq!(remembered.settings(pid, start, "GPU-a"), Some(kept(3)));
        assert!(
            remembered.settings[&(pid, start)]["GPU-a"]
                .settled
                .is_empty()
        );
    }

    #[test]
    fn what_is_damaged_is_set_aside() {
        let (pid, start) = own();
        for damaged in [
            "",
            "{",
            "[]",
            r#"{"settings":[{"pid":1,"start":1,"gpu":"a","priority":"16","max":"max"}],"pending":[]}"#,
            r#"{"settings":[{"pid":1,"start":1,"gpu":"a","priority":"8","max":"max","settled":["memory.limit"]}],"pending":[]}"#,
            r#"{"settings":[],"pending":[{"start":1,"pending":"1 compute.partition a"}]}"#,
        ] {
            let state = state();
            fs::write(state.path().join(FILE), damaged).expect("writable");
            let mut remembered = Remembered::load(state.path());
            assert!(remembered.settings.is_empty() && remembered.pending.is_empty());
            let aside = fs::read_to_string(state.path().join(DAMAGED));
            assert_eq!(aside.expect("it is kept"), damaged);
            remembered.keep(pid, start, "GPU-a", kept(3));
            drop(remembered);
            let after = Remembered::load(state.path());
            assert_eq!(after.settings(pid, start, "GPU-a"), Some(kept(3)));
        }
    }

    #[test]
    fn the_last_of_many_changes_is_written() {
        let state = state();
        let (pid, start) = own();
        let mut remembered = Remembered::load(state.path());
        for round in 0..1000_u32 {
            let number = u8::try_from(round % 8).expect("it is small");
            remembered.keep(pid, start, "GPU-a", kept(number));
        }
        drop(remembered);
        let after = Remembered::load(state.path());
        assert_eq!(after.settings(pid, start, "GPU-a"), Some(kept(7)));
        assert!(!state.path().join(FRESH).exists());
    }

    #[test]
    fn a_state_directory_that_is_gone_costs_the_memory_only() {
        let (pid, start) = own();
        let mut remembered = Remembered::load(Path::new("/nonexistent"));
        remembered.keep(pid, start, "GPU-a", kept(3));
        assert_eq!(remembered.settings(pid, start, "GPU-a"), Some(kept(3)));
    }
}
