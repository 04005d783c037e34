//! A directory that is laid out as the mount is, and the program on it.
//!
//! A plain directory answers reads as the service does. Writes to it succeed
//! whatever they are, so refusals come from what the kernel refuses by itself.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use gcgroup_model::File;
use serde_json::Value;

/// A tree with one GPU, one partition, a workload and another process.
pub(crate) struct Tree {
    pub(crate) root: tempfile::TempDir,
}

impl Tree {
    /// The tree as every test finds it.
    pub(crate) fn new() -> Self {
        let tree = Self {
            root: tempfile::tempdir().expect("a temporary directory"),
        };
        tree.file("", File::Version, "0.1.0\n");
        tree.file("", File::FreezeMany, "");
        tree.file("", File::Launch, "");
        tree.file("", File::Pending, "");
        tree.file("devices/0", File::GpuName, "NVIDIA H200\n");
        tree.file("devices/0", File::SmCapacity, "132\n");
        tree.file("partitions/0/a", File::SmCount, "64\n");
        tree.file("partitions/0/a", File::SmGroups, "0 1 2 3 4 5 6 7\n");
        tree.file("partitions/0/a", File::PartitionMembers, "1234\n");
        tree.process(1234, 0, "gcgroupd", "a");
        tree.process(77, 0, "python", "none");
        tree.file("processes/1234/0", File::WorkloadSpec, "{\"gpu\":0}\n");
        tree.enforcers(1234, 0, ["worker"; 3]);
        tree.file(
            "processes/1234/0",
            File::Stat,
            "nr_submitted_kernels: 10\nnr_ended_kernels: 9\nusage_usec: 4500\nsm_count: 64\n",
        );
        fs::create_dir(tree.root.path().join("workloads")).expect("a directory");
        symlink(
            "../processes/1234/0",
            tree.root.path().join("workloads/noisy"),
        )
        .expect("a link");
        tree
    }

    /// A process that somebody else launched.
    pub(crate) fn process(&self, pid: u32, gpu: u32, comm: &str, partition: &str) {
        let process = format!("processes/{pid}");
        self.file(&process, File::Comm, &format!("{comm}\n"));
        self.file(&process, File::Uid, "0\n");
        self.file(&process, File::Cgroup, "/user.slice\n");
        let entry = format!("{process}/{gpu}");
        self.file(&entry, File::MemoryCurrent, "8589934592\n");
        self.file(&entry, File::MemoryPeak, "8589934592\n");
        self.file(&entry, File::Priority, "8\n");
        self.file(&entry, File::Freeze, "0\n");
        self.file(&entry, File::Max, "max 100000\n");
        self.file(&entry, File::Partition, &format!("{partition}\n"));
        self.file(&entry, File::Stat, "");
        self.file(
            &entry,
            File::Events,
            "populated 1\nfrozen 0\nheld 0\npending 0\n",
        );
        self.file(&entry, File::Kill, "");
        self.enforcers(pid, gpu, ["channel", "channel-window", "signal"]);
    }

    /// Says what freezes, limits and ends a process.
    pub(crate) fn enforcers(&self, pid: u32, gpu: u32, mechanisms: [&str; 3]) {
        let files = [File::Freeze, File::Max, File::Kill];
        let lines = files.iter().zip(mechanisms);
        let text: String = lines
            .map(|(file, mechanism)| format!("{} {mechanism}\n", file.name()))
            .collect();
        self.file(&format!("processes/{pid}/{gpu}"), File::Enforcers, &text);
    }

    /// Path of a control file.
    pub(crate) fn path(&self, directory: &str, file: File) -> PathBuf {
        self.root.path().join(directory).join(file.name())
    }

    /// Makes a control file.
    pub(crate) fn file(&self, directory: &str, file: File, content: &str) {
        let path = self.path(directory, file);
        fs::create_dir_all(path.parent().expect("a parent")).expect("a directory");
        fs::write(path, content).expect("a file");
    }

    /// What a control file holds.
    pub(crate) fn content(&self, directory: &str, file: File) -> String {
        fs::read_to_string(self.path(directory, file)).expect("a file")
    }

    /// Runs the program on this tree.
    pub(crate) fn run(&self, words: &[&str]) -> Output {
        gcgroup(self.root.path(), words)
    }

    /// Standard output of a run that must succeed.
    pub(crate) fn told(&self, words: &[&str]) -> String {
        let output = self.run(words);
        assert!(output.status.success(), "{words:?}: {output:?}");
        String::from_utf8(output.stdout).expect("text")
    }

    /// The document of a run that must succeed.
    pub(crate) fn json(&self, words: &[&str]) -> Value {
        serde_json::from_str(&self.told(words)).expect("one JSON document")
    }

    /// Standard error of a run that must fail with `status`.
    pub(crate) fn refusal(&self, status: i32, words: &[&str]) -> String {
        let output = self.run(words);
        assert_eq!(output.status.code(), Some(status), "{words:?}: {output:?}");
        assert!(output.stdout.is_empty(), "{output:?}");
        String::from_utf8(output.stderr).expect("text")
    }
}

/// Runs the program on the tree at `root`.
pub(crate) fn gcgroup(root: &Path, words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_gcgroup"))
        .arg("--root")
        .arg(root)
        .args(words)
        .stdin(Stdio::null())
        .output()
        .expect("the program starts")
}
