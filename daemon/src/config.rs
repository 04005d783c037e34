//! The configuration: a TOML file, and flags of the same names that win.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use gcgroup_model::row::GroupWrites;
use serde::Deserialize;

use crate::serve::Lives;

/// Where the control files are mounted unless configured.
pub(crate) const DEFAULT_MOUNTPOINT: &str = "/run/gcgroup";
/// Where the journal, sockets and pipes are unless configured.
pub(crate) const DEFAULT_STATE: &str = "/run/gcgroupd";
/// File that is read when it exists and no other is named.
const DEFAULT_FILE: &str = "/etc/gcgroup/gcgroupd.toml";
/// Bytes of the state directory's path: the path of a Unix socket has 107 at
/// most, and the longest below it is that of an MPS server's pipes.
const STATE_LONGEST: usize = 75;
/// GPUs that a simulated host can have.
const SIM_GPUS: std::ops::RangeInclusive<u32> = 1..=16;

/// How workers shall share a GPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum SharingChoice {
    /// Spatial where MPS is available, else temporal.
    #[default]
    Auto,
    /// Spatial; launches fail where MPS is not available.
    Spatial,
    /// Temporal.
    Temporal,
}

/// The file as written. Every key may be left out.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileConfig {
    mountpoint: Option<PathBuf>,
    state: Option<PathBuf>,
    sim: Option<u32>,
    metrics: Option<String>,
    writable_by_group: Option<bool>,
    group: Option<String>,
    worker_user: Option<String>,
    sharing: Option<SharingChoice>,
    attach: Option<bool>,
    count_launches: Option<bool>,
    any_driver_branch: Option<bool>,
    #[serde(default)]
    deadlines: FileDeadlines,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileDeadlines {
    settings_ms: Option<u64>,
    launch_ms: Option<u64>,
    stuck_ms: Option<u64>,
}

/// Flags that override the file.
#[derive(Debug, Default, clap::Args)]
pub(crate) struct Flags {
    /// Configuration file [default: /etc/gcgroup/gcgroupd.toml where it exists]
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Where to mount the control files [default: /run/gcgroup]
    #[arg(long, value_name = "DIR")]
    pub(crate) mountpoint: Option<PathBuf>,
    /// Where to keep the journal, sockets and pipes [default: /run/gcgroupd]
    #[arg(long, value_name = "DIR")]
    pub(crate) state: Option<PathBuf>,
    /// Run on a simulated host with so many GPUs instead of the real one
    #[arg(long, value_name = "GPUS", num_args = 0..=1, require_equals = true, default_missing_value = "1")]
    pub(crate) sim: Option<u32>,
    /// Where to serve metrics; this version knows only 'off'
    #[arg(long, value_name = "ADDR|off")]
    pub(crate) metrics: Option<String>,
    /// End when standard input ends
    #[arg(long, hide = true)]
    until_input_ends: bool,
}

impl Flags {
    /// How long the service shall live.
    pub(crate) fn lives(&self) -> Lives {
        if self.until_input_ends {
            Lives::WithItsInput
        } else {
            Lives::ByItself
        }
    }
}

/// The configuration in force, checked.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    /// Where the control files are mounted.
    pub(crate) mountpoint: PathBuf,
    /// Journal, sockets and pipes.
    pub(crate) state: PathBuf,
    /// GPUs of the simulated host, `None` on the real one.
    pub(crate) sim: Option<u32>,
    /// Whether the group of the files may write.
    pub(crate) group_writes: GroupWrites,
    /// Group of the files; `None` means `gcgroup` where it exists, else root.
    pub(crate) group: Option<String>,
    /// User that workers run as.
    pub(crate) worker_user: String,
    /// How workers share a GPU.
    pub(crate) sharing: SharingChoice,
    /// Whether processes that the service did not launch get entries.
    pub(crate) attach: bool,
    /// Whether the launches of those are counted.
    pub(crate) count_launches: bool,
    /// Whether channel control is tried with a driver branch whose layouts were
    /// not compared.
    pub(crate) any_driver_branch: bool,
    /// Until a setting must be in force.
    pub(crate) settings_deadline: Duration,
    /// Until a launch must be ready.
    pub(crate) launch_deadline: Duration,
    /// From when on an overdue change counts as stuck.
    pub(crate) stuck_after: Duration,
}

impl Config {
    /// Reads the file and puts the flags over it.
    ///
    /// # Errors
    /// The key or flag, its value and what is allowed.
    pub(crate) fn load(flags: &Flags) -> Result<Self> {
        let file = match &flags.config {
            Some(path) => read(path)?,
            None if Path::new(DEFAULT_FILE).exists() => read(Path::new(DEFAULT_FILE))?,
            None => FileConfig::default(),
        };
        Self::merge(file, flags)
    }

    fn merge(file: FileConfig, flags: &Flags) -> Result<Self> {
        let metrics = flags.metrics.as_ref().or(file.metrics.as_ref());
        if let Some(metrics) = metrics
            && metrics != "off"
        {
            bail!("metrics = {metrics:?} is not allowed: this version knows only 'off'");
        }
        let sim = flags.sim.or(file.sim);
        if let Some(gpus) = sim
            && !SIM_GPUS.contains(&gpus)
        {
            bail!(
                "sim = {gpus} is not allowed: {} to {} GPUs",
                SIM_GPUS.start(),
                SIM_GPUS.end()
            );
        }
        let group_writes = match file.writable_by_group {
            Some(true) => GroupWrites::Yes,
            Some(false) | None => GroupWrites::No,
        };
        let config = Self {
            mountpoint: directory(
                "mountpoint",
                flags.mountpoint.clone().or(file.mountpoint),
                DEFAULT_MOUNTPOINT,
            )?,
            state: directory("state", flags.state.clone().or(file.state), DEFAULT_STATE)?,
            sim,
            group_writes,
            group: file.group,
            worker_user: file.worker_user.unwrap_or_else(|| "nobody".to_owned()),
            sharing: file.sharing.unwrap_or_default(),
            attach: file.attach.unwrap_or(true),
            count_launches: file.count_launches.unwrap_or(true),
            any_driver_branch: file.any_driver_branch.unwrap_or(false),
            settings_deadline: millis("deadlines.settings_ms", file.deadlines.settings_ms, 5_000)?,
            launch_deadline: millis("deadlines.launch_ms", file.deadlines.launch_ms, 30_000)?,
            stuck_after: millis("deadlines.stuck_ms", file.deadlines.stuck_ms, 60_000)?,
        };
        let length = config.state.as_os_str().len();
        if length > STATE_LONGEST {
            bail!(
                "state = {:?} is not allowed: {length} bytes, at most {STATE_LONGEST}, so that the sockets below it have paths that the kernel takes",
                config.state
            );
        }
        if config.state.starts_with(&config.mountpoint) || config.mountpoint == config.state {
            bail!(
                "state = {:?} is not allowed: it must lie outside of mountpoint = {:?}, which the control files cover",
                config.state,
                config.mountpoint
            );
        }
        Ok(config)
    }
}

fn read(path: &Path) -> Result<FileConfig> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    toml::from_str(&text)
        .with_context(|| format!("{} is not a valid configuration", path.display()))
}

fn directory(key: &str, value: Option<PathBuf>, default: &str) -> Result<PathBuf> {
    let path = value.unwrap_or_else(|| PathBuf::from(default));
    if path.as_os_str().is_empty() || path == Path::new("/") {
        bail!("{key} = {path:?} is not allowed: it must name a directory other than /");
    }
    std::path::absolute(&path).with_context(|| format!("{key} = {path:?} cannot be made absolute"))
}

fn millis(key: &str, value: Option<u64>, default: u64) -> Result<Duration> {
    const ALLOWED: std::ops::RangeInclusive<u64> = 10..=3_600_000;
    let ms = value.unwrap_or(default);
    if !ALLOWED.contains(&ms) {
        bail!(
            "{key} = {ms} is not allowed: {} to {} milliseconds",
            ALLOWED.start(),
            ALLOWED.end()
        );
    }
    Ok(Duration::from_millis(ms))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn merged(text: &str, flags: &Flags) -> Result<Config> {
        Config::merge(toml::from_str(text)?, flags)
    }

    #[test]
    fn flags_win_over_the_file() {
        let flags = Flags {
            state: Some("/tmp/flag".into()),
            ..Flags::default()
        };
        let config = merged("state = '/tmp/file'\nmountpoint = '/tmp/mnt'", &flags).expect("valid");
        assert_eq!(config.state, Path::new("/tmp/flag"));
        assert_eq!(config.mountpoint, Path::new("/tmp/mnt"));
        assert_eq!(config.settings_deadline, Duration::from_secs(5));
    }

    #[test]
    fn a_wrong_value_is_named_with_its_key_and_what_is_allowed() {
        for (text, words) in [
            (
                "metrics = '127.0.0.1:9100'",
                ["metrics", "127.0.0.1:9100", "off"],
            ),
            ("sim = 99", ["sim", "99", "1 to 16"]),
            (
                "[deadlines]\nsettings_ms = 1",
                ["deadlines.settings_ms", "1", "10 to 3600000"],
            ),
            (
                "mountpoint = '/a'\nstate = '/a/b'",
                ["state", "/a/b", "mountpoint"],
            ),
        ] {
            let error = merged(text, &Flags::default()).expect_err(text).to_string();
            for word in words {
                assert!(error.contains(word), "{error}");
            }
        }
    }

    #[test]
    fn an_unknown_key_is_an_error_that_names_it() {
        let error = merged("mountpint = '/x'", &Flags::default()).expect_err("a typing error");
        assert!(format!("{error:#}").contains("mountpint"));
    }
}
