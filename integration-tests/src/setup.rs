//! How a service is started for a test.

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::PermissionsExt;

use crate::Instance;

/// How a service shall be started.
#[derive(Clone, Debug)]
pub struct Setup {
    pub(crate) gpus: u32,
    pub(crate) temporal: bool,
    pub(crate) attach: bool,
    settings: String,
    deadlines: String,
}

impl Default for Setup {
    fn default() -> Self {
        Self::new()
    }
}

impl Setup {
    /// One GPU and every default.
    #[must_use]
    pub fn new() -> Self {
        Self {
            gpus: 1,
            temporal: false,
            attach: false,
            settings: String::new(),
            deadlines: String::new(),
        }
    }

    /// So many GPUs.
    #[must_use]
    pub fn gpus(mut self, count: u32) -> Self {
        self.gpus = count;
        self
    }

    /// A line of the configuration; `value` is TOML.
    #[must_use]
    pub fn setting(mut self, key: &str, value: &str) -> Self {
        let _ = writeln!(self.settings, "{key} = {value}");
        self
    }

    /// A deadline of the configuration in milliseconds.
    #[must_use]
    pub fn deadline(mut self, key: &str, ms: u64) -> Self {
        let _ = writeln!(self.deadlines, "{key} = {ms}");
        self
    }

    /// Workers one after the other instead of side by side.
    #[must_use]
    pub fn temporal(mut self) -> Self {
        self.temporal = true;
        self.setting("sharing", "\"temporal\"")
    }

    /// Processes that the service did not launch get entries too. Without this
    /// they do not, so that tests of workloads have the GPU for themselves.
    #[must_use]
    pub fn attach(mut self) -> Self {
        self.attach = true;
        self
    }

    /// Starts the service and waits until its GPUs are there.
    ///
    /// # Panics
    /// When it does not come up; the message holds its log.
    #[must_use]
    pub fn start(self) -> Instance {
        assert!(
            rustix::process::geteuid().is_root(),
            "these tests need root: they mount filesystems and act as other users"
        );
        let base = tempfile::Builder::new()
            .prefix("gcg")
            // Others than root shall reach the files, as in /run.
            .permissions(fs::Permissions::from_mode(0o755))
            .tempdir()
            .expect("the temporary directory is writable");
        let mut instance = Instance::in_directory(self, base);
        instance.start();
        instance
    }

    /// The configuration file as TOML.
    pub(crate) fn configuration(&self) -> String {
        let Self {
            settings,
            deadlines,
            attach,
            ..
        } = self;
        format!("attach = {attach}\n{settings}[deadlines]\n{deadlines}")
    }
}
