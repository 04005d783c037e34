//! The mounted tree: paths, reads and writes.
//!
//! Paths come from [`Place::pattern`] and names from the rows, so nothing here
//! names a control file.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use gcgroup_model::{File, Place, Row};
use rustix::io::Errno;

use crate::explain;
use crate::failure::Failure;

/// Directory of the symlinks from names to processes.
pub(crate) const WORKLOADS: &str = "workloads";

/// A mounted tree that answers.
#[derive(Debug)]
pub(crate) struct Tree {
    root: PathBuf,
}

/// A process on one GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct EntryId {
    /// Thread-group id.
    pub(crate) pid: u32,
    /// NVML index.
    pub(crate) gpu: u32,
}

/// Path of a place below the mount point, its placeholders filled in from the
/// front. It ends where `values` do: without any it is the directory that holds
/// all of that kind.
pub(crate) fn below(place: Place, values: &[&str]) -> PathBuf {
    let mut values = values.iter();
    let mut path = PathBuf::new();
    for component in place.pattern().split('/') {
        if component.starts_with('<') {
            match values.next() {
                Some(value) => path.push(value),
                None => break,
            }
        } else {
            path.push(component);
        }
    }
    path
}

impl Tree {
    /// The tree at `root`.
    ///
    /// # Errors
    /// [`Failure::NotServing`] when no service answers there.
    pub(crate) fn open(root: &Path) -> Result<Self, Failure> {
        match fs::read(root.join(File::Version.name())) {
            Ok(_) => Ok(Self {
                root: root.to_owned(),
            }),
            Err(error) => Err(Failure::NotServing(explain::not_serving(root, &error))),
        }
    }

    /// The mount point.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// What a control file reads as, without its last newline.
    ///
    /// # Errors
    /// [`Failure::File`] with the reason.
    pub(crate) fn read(&self, directory: &Path, row: &Row) -> Result<String, Failure> {
        let path = self.root.join(directory).join(row.name);
        let mut text =
            fs::read_to_string(&path).map_err(|error| explain::read(&path, row, &error))?;
        if text.ends_with('\n') {
            text.pop();
        }
        Ok(text)
    }

    /// As [`Tree::read`], with `None` for a file that is not there (any more).
    ///
    /// # Errors
    /// As [`Tree::read`].
    pub(crate) fn read_if_there(
        &self,
        directory: &Path,
        row: &Row,
    ) -> Result<Option<String>, Failure> {
        match self.read(directory, row) {
            Ok(text) => Ok(Some(text)),
            Err(failure) if failure.is_gone() => Ok(None),
            Err(failure) => Err(failure),
        }
    }

    /// Writes a control file: one write(2) of the whole value, because one
    /// write is one command. It has no newline, so that the longest value that
    /// a file takes fits.
    ///
    /// # Errors
    /// [`Failure::File`] with what was wrong and what is allowed.
    pub(crate) fn write(&self, directory: &Path, row: &Row, value: &str) -> Result<(), Failure> {
        let path = self.root.join(directory).join(row.name);
        let refused = |error: &io::Error| explain::write(&path, row, value, error);
        let file = OpenOptions::new()
            .write(true)
            .open(&path)
            .map_err(|error| refused(&error))?;
        let written =
            rustix::io::write(&file, value.as_bytes()).map_err(|errno| refused(&errno.into()))?;
        if written == value.len() {
            Ok(())
        } else {
            Err(Failure::File {
                path: path.clone(),
                errno: None,
                sentence: format!("took only {written} of {} bytes", value.len()),
            })
        }
    }

    /// Names in a directory, sorted; none where it does not exist.
    ///
    /// # Errors
    /// [`Failure::File`] when it cannot be listed.
    pub(crate) fn names(&self, directory: &Path) -> Result<Vec<String>, Failure> {
        let path = self.root.join(directory);
        let failed = |error: io::Error| match Errno::from_io_error(&error) {
            Some(Errno::NOENT | Errno::NODEV) => None,
            _ => Some(explain::list(&path, &error)),
        };
        let entries = match fs::read_dir(&path) {
            Ok(entries) => entries,
            Err(error) => return failed(error).map_or(Ok(Vec::new()), Err),
        };
        let mut names = Vec::new();
        for entry in entries {
            match entry {
                Ok(entry) => names.extend(entry.file_name().into_string().ok()),
                Err(error) => return failed(error).map_or(Ok(names), Err),
            }
        }
        names.sort();
        Ok(names)
    }

    /// Names in a directory that are numbers, ascending.
    ///
    /// # Errors
    /// As [`Tree::names`].
    pub(crate) fn numbers(&self, directory: &Path) -> Result<Vec<u32>, Failure> {
        let mut numbers: Vec<u32> = self
            .names(directory)?
            .iter()
            .filter_map(|name| name.parse().ok())
            .collect();
        numbers.sort_unstable();
        Ok(numbers)
    }

    /// Every process on each of its GPUs, by pid and GPU.
    ///
    /// # Errors
    /// As [`Tree::names`].
    pub(crate) fn entries(&self) -> Result<Vec<EntryId>, Failure> {
        let mut entries = Vec::new();
        for pid in self.numbers(&below(Place::Process, &[]))? {
            for gpu in self.gpus_of(pid)? {
                entries.push(EntryId { pid, gpu });
            }
        }
        Ok(entries)
    }

    /// GPUs of a process by index.
    ///
    /// # Errors
    /// As [`Tree::names`].
    pub(crate) fn gpus_of(&self, pid: u32) -> Result<Vec<u32>, Failure> {
        self.numbers(&below(Place::Process, &[&pid.to_string()]))
    }

    /// The process that a workload's name stands for, if there is one.
    pub(crate) fn workload(&self, name: &str) -> Option<EntryId> {
        let link = fs::read_link(self.root.join(WORKLOADS).join(name)).ok()?;
        let mut components = link.components().rev();
        let mut number = || components.next()?.as_os_str().to_str()?.parse().ok();
        let gpu = number()?;
        let pid = number()?;
        Some(EntryId { pid, gpu })
    }

    /// Names of the workloads by process.
    ///
    /// # Errors
    /// As [`Tree::names`].
    pub(crate) fn workloads(&self) -> Result<BTreeMap<EntryId, String>, Failure> {
        let names = self.names(Path::new(WORKLOADS))?;
        Ok(names
            .into_iter()
            .filter_map(|name| Some((self.workload(&name)?, name)))
            .collect())
    }

    /// Every partition as GPU and name.
    ///
    /// # Errors
    /// As [`Tree::names`].
    pub(crate) fn partitions(&self) -> Result<Vec<(u32, String)>, Failure> {
        let mut partitions = Vec::new();
        for gpu in self.numbers(&below(Place::Partition, &[]))? {
            for name in self.names(&below(Place::Partition, &[&gpu.to_string()]))? {
                partitions.push((gpu, name));
            }
        }
        Ok(partitions)
    }
}

impl EntryId {
    /// Its directory below the mount point.
    pub(crate) fn directory(self) -> PathBuf {
        below(
            Place::ProcessGpu,
            &[&self.pid.to_string(), &self.gpu.to_string()],
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn placeholders_are_filled_from_the_front() {
        for (place, values, expected) in [
            (Place::Root, &[][..], ""),
            (Place::Gpu, &[][..], "devices"),
            (Place::Gpu, &["0"][..], "devices/0"),
            (Place::Partition, &["0"][..], "partitions/0"),
            (Place::Partition, &["0", "a"][..], "partitions/0/a"),
            (Place::Process, &["12"][..], "processes/12"),
            (Place::ProcessGpu, &["12", "1"][..], "processes/12/1"),
        ] {
            assert_eq!(below(place, values), Path::new(expected));
        }
    }

    #[test]
    fn what_was_written_can_be_read() {
        let root = tempfile::tempdir().expect("a temporary directory");
        let tree = Tree {
            root: root.path().to_owned(),
        };
        let row = File::Freeze.row();
        fs::write(root.path().join(row.name), "").expect("a file");
        tree.write(Path::new(""), row, "1").expect("a plain file");
        assert_eq!(tree.read(Path::new(""), row).expect("as written"), "1");
    }
}
