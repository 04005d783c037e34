//! `gcgroupd doctor`: what this host offers, line by line, and what to do about
//! what it lacks. It works with the service down, and changes nothing.

use std::fmt::Write as _;
use std::fs;
use std::io::{self, Write as _};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use gcgroup_device::{DeviceError, GpuInfo, Mps, Telemetry};
use rustix::io::Errno;
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};
use tokio::signal::unix::{SignalKind, signal};

use crate::config::{Config, Flags};
use crate::host::Awaited;
use crate::journal::{HostKind, Journal};
use crate::launch::{self, Context};
use crate::mps::MpsKeeper;
use crate::{guardian, identity, prove, recover};

/// What the service does that root may not in every container, by the bits of
/// capabilities(7) in linux/capability.h.
const CAPABILITIES: [(u32, &str); 5] = [
    (5, "CAP_KILL"),
    (6, "CAP_SETGID"),
    (7, "CAP_SETUID"),
    (19, "CAP_SYS_PTRACE"),
    (21, "CAP_SYS_ADMIN"),
];

/// Arguments of `gcgroupd doctor`.
#[derive(Debug, clap::Args)]
pub(crate) struct DoctorArgs {
    #[command(flatten)]
    pub(crate) flags: Flags,
    /// Leave out the trial of channel control, which fills each GPU for a second
    #[arg(long)]
    pub(crate) quick: bool,
}

/// What was found about one thing.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Finding {
    /// It is there; what exactly.
    Ok(String),
    /// It works without, but some files do not.
    Lacks {
        /// What was found.
        found: String,
        /// What to do about it.
        advice: String,
    },
    /// It was not looked at, and why.
    Skipped(String),
}

fn lacks(found: impl Into<String>, advice: impl Into<String>) -> Finding {
    Finding::Lacks {
        found: found.into(),
        advice: advice.into(),
    }
}

/// What was found so far.
struct Report {
    /// Whether nothing is missing.
    healthy: bool,
}

impl Report {
    /// Prints a finding.
    ///
    /// # Errors
    /// Those of standard output.
    fn say(&mut self, name: &str, finding: Finding) -> io::Result<()> {
        self.healthy &= !matches!(finding, Finding::Lacks { .. });
        io::stdout().write_all(line(name, &finding).as_bytes())
    }
}

/// Looks at everything and prints a line a thing; whether nothing is missing.
///
/// # Errors
/// A configuration that cannot be read, no directory to work in, or a signal.
pub(crate) fn run(args: &DoctorArgs) -> Result<bool> {
    let config = Config::load(&args.flags)?;
    let mut report = Report { healthy: true };
    match look(args, &config, &mut report) {
        // Whoever read the lines has enough of them, as `head` does.
        Err(error) if is_broken_pipe(&error) => Ok(report.healthy),
        looked => looked.map(|()| report.healthy),
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let error: Option<&io::Error> = error.downcast_ref();
    error.is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

fn look(args: &DoctorArgs, config: &Config, report: &mut Report) -> Result<()> {
    let is_root = rustix::process::geteuid().is_root();
    report.say("root", root(is_root, &read("/proc/self/status")))?;
    report.say("fuse", fuse(Path::new("/dev/fuse")))?;
    report.say("yama", yama(&read("/proc/sys/kernel/yama/ptrace_scope")))?;
    report.say("lockdown", lockdown(&read("/sys/kernel/security/lockdown")))?;
    report.say("pidfd_getfd", descriptors())?;
    report.say("launch counts", counts(config))?;
    let place = tempfile::Builder::new()
        .prefix("gcgdoc")
        .tempdir()
        .context("cannot make a directory to work in")?;
    // Workers run as somebody else and reach the simulated GPU in there.
    recover::make_state(place.path()).context("cannot open the directory up")?;
    let host = host(config, place.path())?;
    report.say("driver", driver(&host))?;
    report.say("mps", mps(&host))?;
    report.say("checkpoint", checkpoint(&host))?;
    let gpus = match gpus(host.gpus()) {
        Ok(gpus) => gpus,
        Err(none) => {
            report.say("gpus", none)?;
            Vec::new()
        }
    };
    for gpu in gpus {
        let name = format!("gpu {}", gpu.index);
        let refused = gpu.refused.clone();
        report.say(&name, self::gpu(&gpu))?;
        if refused.is_none() {
            let trial = trial(args, config, &host, gpu, place.path())?;
            report.say(&format!("{name} channels"), trial)?;
        }
    }
    Ok(())
}

fn line(name: &str, finding: &Finding) -> String {
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = match finding {
        Finding::Ok(found) => writeln!(text, "ok    {name:<15} {found}"),
        Finding::Skipped(why) => writeln!(text, "-     {name:<15} {why}"),
        Finding::Lacks { found, advice } => {
            writeln!(text, "LACKS {name:<15} {found}\n      {:<15} {advice}", "")
        }
    };
    text
}

fn read(path: &str) -> Option<String> {
    fs::read_to_string(path).ok()
}

/// `status` is that of this process, whose effective capabilities are a mask in
/// hexadecimal digits (proc_pid_status(5)).
fn root(is_root: bool, status: &Option<String>) -> Finding {
    if !is_root {
        return lacks(
            "not running as root",
            "run gcgroupd as root: it mounts a filesystem and controls the processes of others",
        );
    }
    let mask = status.as_deref().and_then(|status| {
        let mask = status
            .lines()
            .find_map(|line| line.strip_prefix("CapEff:"))?;
        u64::from_str_radix(mask.trim(), 16).ok()
    });
    let missing: Vec<_> = CAPABILITIES
        .iter()
        .filter(|(bit, _)| mask.is_some_and(|mask| mask & (1 << bit) == 0))
        .map(|(_, name)| *name)
        .collect();
    if missing.is_empty() {
        return Finding::Ok("running as root".to_owned());
    }
    lacks(
        format!("running as root without {}", missing.join(", ")),
        "give these capabilities to the container that this is (--cap-add)",
    )
}

fn fuse(device: &Path) -> Finding {
    match fs::File::options().read(true).write(true).open(device) {
        Ok(_) => Finding::Ok(format!("{} opens", device.display())),
        Err(error) => lacks(
            format!("{}: {error}", device.display()),
            match error.kind() {
                io::ErrorKind::PermissionDenied => {
                    "run gcgroupd as root; in a container pass the device in (--device /dev/fuse)"
                }
                _ => {
                    "load the module (modprobe fuse); in a container pass the device in (--device /dev/fuse)"
                }
            },
        ),
    }
}

/// `text` is that of ptrace_scope, which counts for taking descriptors too
/// (Documentation/admin-guide/LSM/Yama.rst).
fn yama(text: &Option<String>) -> Finding {
    match text.as_deref().map(str::trim) {
        None => Finding::Ok("not in this kernel".to_owned()),
        Some("3") => lacks(
            "ptrace_scope is 3: nobody may attach to a process until the next boot",
            "boot with kernel.yama.ptrace_scope at most 2; without it processes that are running already are not controlled",
        ),
        Some(scope) => Finding::Ok(format!("ptrace_scope is {scope}, which lets root attach")),
    }
}

/// `text` marks the mode in force: `none [integrity] confidentiality`.
fn lockdown(text: &Option<String>) -> Finding {
    let mode = text.as_deref().and_then(|text| {
        let (_, rest) = text.split_once('[')?;
        Some(rest.split_once(']')?.0)
    });
    match mode {
        None => Finding::Ok("not in this kernel".to_owned()),
        Some("confidentiality") => lacks(
            "confidentiality: the kernel refuses probes in other processes",
            "launches of processes that the service did not start are not counted; boot with lockdown=integrity or none for that",
        ),
        Some(mode) => Finding::Ok(format!("{mode}, which is no obstacle")),
    }
}

/// Whether a descriptor can be taken from a process: from this one.
fn descriptors() -> Finding {
    let taken = pidfd_open(getpid(), PidfdFlags::empty())
        .and_then(|own| pidfd_getfd(&own, 0, PidfdGetfdFlags::empty()));
    match taken {
        // Whether standard input is open is not the question.
        Ok(_) | Err(Errno::BADF) => Finding::Ok("the kernel knows it".to_owned()),
        Err(errno) => lacks(
            errno.to_string(),
            "needs Linux 5.6 and, in a container, CAP_SYS_PTRACE and a seccomp profile that allows it",
        ),
    }
}

fn counts(config: &Config) -> Finding {
    if config.sim.is_some() {
        return Finding::Skipped("the simulated GPU counts by itself".to_owned());
    }
    match gcgroup_device_nvidia::can_count() {
        Ok(()) => Finding::Ok("uprobes through tracefs".to_owned()),
        Err(error) => lacks(
            error.to_string(),
            "nr_submitted_kernels is absent for processes that the service did not launch, everything else works; tracefs comes with mount -t tracefs tracefs /sys/kernel/tracing",
        ),
    }
}

fn host(config: &Config, state: &Path) -> Result<Arc<Awaited>> {
    Ok(Arc::new(match config.sim {
        Some(gpus) => Awaited::simulated(state, gpus)?,
        None => Awaited::nvidia(config.any_driver_branch),
    }))
}

fn driver(host: &Awaited) -> Finding {
    match host.get() {
        Ok(host) => Finding::Ok(host.describe()),
        Err(error) => lacks(
            error.to_string(),
            "install NVIDIA's driver and load it (nvidia-smi must work); 'gcgroupd serve --sim' tries everything without",
        ),
    }
}

fn mps(host: &Awaited) -> Finding {
    if host.get().is_err() {
        return Finding::Skipped("needs a driver".to_owned());
    }
    match host.slots() {
        Ok(slots) => Finding::Ok(format!("{slots} workloads can share a GPU side by side")),
        Err(error) => lacks(
            error.to_string(),
            "workloads take turns instead; install nvidia-cuda-mps-control, which comes with the driver's compute utilities",
        ),
    }
}

fn checkpoint(host: &Awaited) -> Finding {
    if host.get().is_err() {
        return Finding::Skipped("needs a driver".to_owned());
    }
    Finding::Skipped("this version moves no memory of processes that it did not launch".to_owned())
}

/// The GPUs, or that there are none. Where no driver is, its own line says so.
fn gpus(
    listed: std::result::Result<Vec<GpuInfo>, DeviceError>,
) -> std::result::Result<Vec<GpuInfo>, Finding> {
    let found = match listed {
        Ok(gpus) if !gpus.is_empty() => return Ok(gpus),
        Err(DeviceError::NoDriver(_)) => return Ok(Vec::new()),
        Ok(_) => "the driver knows of none".to_owned(),
        Err(error) => error.to_string(),
    };
    let advice = "'nvidia-smi -L' must list them; where it does not, the kernel's log has the driver's reason";
    Err(lacks(found, advice))
}

fn gpu(gpu: &GpuInfo) -> Finding {
    match &gpu.refused {
        None => Finding::Ok(format!("{} {}", gpu.name, gpu.uuid)),
        Some(reason) => lacks(
            format!("{} is not managed: {reason}", gpu.name),
            "switch that off, or leave this GPU to others",
        ),
    }
}

/// The service's own trial, on workers of ours.
///
/// # Errors
/// A signal that came meanwhile.
fn trial(
    args: &DoctorArgs,
    config: &Config,
    host: &Arc<Awaited>,
    gpu: GpuInfo,
    state: &Path,
) -> Result<Finding> {
    if args.quick {
        return Ok(Finding::Skipped("not tried (--quick)".to_owned()));
    }
    if !rustix::process::geteuid().is_root() {
        return Ok(Finding::Skipped("not tried: needs root".to_owned()));
    }
    Ok(match attempt(config, host.clone(), gpu, state) {
        Ok(Attempt::Acts) => Finding::Ok("stopped, stood, ran on; timeslices act".to_owned()),
        Ok(Attempt::Fails(reason)) => lacks(
            reason,
            "processes that are running already cannot be frozen or prioritised here",
        ),
        Ok(Attempt::Interrupted) => bail!("interrupted; nothing is left stopped"),
        Err(error) => lacks(
            format!("{error:#}"),
            "the trial itself could not be made; the line says why",
        ),
    })
}

/// How a trial came out.
enum Attempt {
    /// Channel control acts.
    Acts,
    /// It does not, and why.
    Fails(String),
    /// A signal came first.
    Interrupted,
}

fn attempt(config: &Config, host: Arc<Awaited>, gpu: GpuInfo, state: &Path) -> Result<Attempt> {
    let kind = match config.sim {
        Some(_) => HostKind::Sim,
        None => HostKind::Nvidia,
    };
    let journal = Arc::new(Journal::begin(state, &state.join("none"), kind)?);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let context = Arc::new(Context {
        host: host.clone(),
        mps: Arc::new(MpsKeeper::new(host, journal.clone(), state.to_owned())),
        journal,
        identity: Some(identity::worker(config)?),
    });
    let outcome = runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot wait for SIGINT")?;
        // Should this process be killed meanwhile, nothing stays stopped.
        let _guardian = guardian::start(state)?;
        let outcome = tokio::select! {
            outcome = prove::control(context, gpu) => outcome,
            _ = terminate.recv() => return Ok(Attempt::Interrupted),
            _ = interrupt.recv() => return Ok(Attempt::Interrupted),
        };
        tokio::time::sleep(launch::GRACE).await;
        anyhow::Ok(outcome.map_or_else(Attempt::Fails, |()| Attempt::Acts))
    });
    // A call that hangs in the driver does not keep the doctor from its report.
    runtime.shutdown_timeout(launch::GRACE);
    recover::undo(state)?;
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_ok(finding: &Finding) -> bool {
        matches!(finding, Finding::Ok(_))
    }

    #[test]
    fn a_lack_is_followed_by_what_to_do() {
        let text = line("fuse", &lacks("no such file", "load the module"));
        assert_eq!(
            text,
            "LACKS fuse            no such file\n                      load the module\n"
        );
        assert_eq!(
            line("root", &Finding::Ok("running as root".to_owned())),
            "ok    root            running as root\n"
        );
    }

    #[test]
    fn root_without_its_capabilities_is_told_which() {
        let root = |mask: &str| {
            let status = format!("Name:\tx\nCapInh:\t0\nCapEff:\t{mask}\n");
            super::root(true, &Some(status))
        };
        assert!(is_ok(&root("000001ffffffffff")));
        // Those of a container of Docker.
        let Finding::Lacks { found, .. } = root("00000000a80425fb") else {
            panic!("a container may not mount");
        };
        assert_eq!(
            found,
            "running as root without CAP_SYS_PTRACE, CAP_SYS_ADMIN"
        );
        assert!(is_ok(&super::root(true, &None)), "nobody knows better");
        assert!(!is_ok(&super::root(false, &None)));
    }

    #[test]
    fn a_driver_without_gpus_is_not_healthy() {
        assert!(gpus(Ok(Vec::new())).is_err());
        let failed = DeviceError::NoDriver("none".to_owned());
        assert_eq!(gpus(Err(failed)), Ok(Vec::new()), "said already");
        let failed = DeviceError::Denied("by a test".to_owned());
        let Err(Finding::Lacks { found, .. }) = gpus(Err(failed)) else {
            panic!("it must be told");
        };
        assert!(found.contains("by a test"), "{found}");
    }

    #[test]
    fn only_yama_at_its_strictest_is_in_the_way() {
        let yama = |text: &str| yama(&Some(text.to_owned()));
        assert!(is_ok(&super::yama(&None)));
        assert!(is_ok(&yama("0\n")) && is_ok(&yama("2\n")));
        assert!(!is_ok(&yama("3\n")));
    }

    #[test]
    fn the_mode_of_lockdown_is_the_marked_one() {
        let lockdown = |text: &str| lockdown(&Some(text.to_owned()));
        assert!(is_ok(&lockdown("[none] integrity confidentiality\n")));
        assert!(is_ok(&lockdown("none [integrity] confidentiality\n")));
        assert!(!is_ok(&lockdown("none integrity [confidentiality]\n")));
        assert!(is_ok(&super::lockdown(&None)));
    }

    #[test]
    fn a_device_that_does_not_open_is_named() {
        let Finding::Lacks { found, .. } = fuse(Path::new("/nowhere/fuse")) else {
            panic!("it is not there");
        };
        assert!(found.contains("/nowhere/fuse"), "{found}");
    }

    #[test]
    fn this_kernel_hands_descriptors_over() {
        assert!(is_ok(&descriptors()), "{:?}", descriptors());
    }
}
