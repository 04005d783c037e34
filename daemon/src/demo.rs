//! `gcgroupd demo`: two workloads in two partitions, one of them frozen, for
//! somebody who sees this for the first time.
//!
//! It starts a service of its own in a temporary directory and then does what a
//! user does: it reads and writes the control files.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use gcgroup_device::{GpuInfo, Telemetry};
use gcgroup_device_nvidia::NvidiaHost;
use gcgroup_model::row::File;
use rustix::process::{Pid, Signal, kill_process};
use tokio::signal::unix::{SignalKind, signal};

/// For a service to know its GPUs.
const START: Duration = Duration::from_secs(15);
/// Between two looks at the counters.
const LOOK: Duration = Duration::from_millis(1_000);
/// For a service to end.
const STOP: Duration = Duration::from_secs(5);

#[derive(Debug, clap::Args)]
pub(crate) struct DemoArgs {
    /// Use the simulated GPU even where there is a real one
    #[arg(long)]
    sim: bool,
}

/// Runs the demo.
///
/// # Errors
/// Whatever a user would have run into.
pub(crate) fn run(args: &DemoArgs) -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("the demo needs root: it mounts a filesystem and starts workers as another user");
    }
    heed_signals()?;
    let choice = choose(args.sim);
    match &choice {
        Ok(gpu) => println!("GPU: {} (the real one)\n", gpu.name),
        Err(reason) => println!("GPU: simulated ({reason})\n"),
    }
    let place = tempfile::Builder::new()
        .prefix("gcg")
        .tempdir()
        .context("cannot make a temporary directory")?;
    // Workers of another user look up sockets below.
    rustix::fs::chmod(place.path(), rustix::fs::Mode::from_raw_mode(0o755))?;
    let service = Service::start(place.path(), choice.as_ref().ok().map(|gpu| gpu.index))?;
    let shown = service.show();
    let stopped = service.stop();
    shown?;
    stopped
}

/// Whether somebody wants the demo to end.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// From now on SIGINT and SIGTERM end the demo at its next rest, so that it
/// cleans up.
fn heed_signals() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    std::thread::spawn(move || {
        runtime.block_on(async {
            let Ok(mut terminate) = signal(SignalKind::terminate()) else {
                return;
            };
            tokio::select! {
                _ = tokio::signal::ctrl_c() => {}
                _ = terminate.recv() => {}
            }
            INTERRUPTED.store(true, Ordering::Relaxed);
        });
    });
    Ok(())
}

/// Sleeps, unless somebody wants the demo to end.
fn rest(length: Duration) -> Result<()> {
    let until = Instant::now() + length;
    loop {
        if INTERRUPTED.load(Ordering::Relaxed) {
            bail!("interrupted");
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        std::thread::sleep(left.min(Duration::from_millis(20)));
    }
}

/// The first real GPU that can be used, or why there is none.
fn choose(simulated: bool) -> Result<GpuInfo, String> {
    if simulated {
        return Err("as asked for".to_owned());
    }
    let host = NvidiaHost::open().map_err(|error| error.to_string())?;
    let gpus = host.gpus().map_err(|error| error.to_string())?;
    let usable = gpus.into_iter().find(|gpu| gpu.refused.is_none());
    usable.ok_or_else(|| "no GPU of this host can be managed".to_owned())
}

struct Service {
    child: Child,
    root: PathBuf,
    gpu: u32,
}

impl Service {
    fn start(place: &Path, gpu: Option<u32>) -> Result<Self> {
        let root = place.join("mnt");
        let log = fs::File::create(place.join("log")).context("cannot make a log")?;
        let mut command = Command::new("/proc/self/exe");
        command.arg("serve").arg("--mountpoint").arg(&root);
        command
            .arg("--state")
            .arg(place.join("state"))
            .arg("--metrics")
            .arg("off");
        if gpu.is_none() {
            command.arg("--sim");
        }
        // The defaults, whatever this host's own service is configured to; but
        // what others run on the GPU is none of the demo's business.
        let config = place.join("config.toml");
        fs::write(&config, "attach = false\n").context("cannot write a configuration")?;
        command.arg("--config").arg(&config);
        let child = command
            .arg("--until-input-ends")
            .stdin(Stdio::piped())
            // A signal from a terminal is for the demo, which ends its service.
            .process_group(0)
            .stderr(log)
            .spawn()
            .context("cannot start the service")?;
        let mut service = Self {
            child,
            root,
            gpu: gpu.unwrap_or(0),
        };
        match service.wait_for_gpu() {
            Ok(()) => Ok(service),
            Err(error) => {
                let log = fs::read_to_string(place.join("log")).unwrap_or_default();
                eprint!("{log}");
                // It did not come up; whatever is left of it goes with it.
                let _ = service.stop();
                Err(error)
            }
        }
    }

    fn wait_for_gpu(&mut self) -> Result<()> {
        let directory = self.root.join(format!("devices/{}", self.gpu));
        let give_up = Instant::now() + START;
        while !directory.exists() {
            if let Some(status) = self.child.try_wait()? {
                bail!("the service ended early: {status}");
            }
            if Instant::now() > give_up {
                bail!("the GPU did not answer within {} s", START.as_secs());
            }
            rest(Duration::from_millis(20))?;
        }
        Ok(())
    }

    /// Does what a user does, saying each step as a shell would take it.
    fn show(&self) -> Result<()> {
        let capacity: u32 = self
            .read(&format!("devices/{}/{}", self.gpu, File::SmCapacity.name()))?
            .parse()?;
        let half = capacity / 2 / 8 * 8;
        for name in ["a", "b"] {
            let directory = self.root.join(format!("partitions/{}/{name}", self.gpu));
            self.say(&format!("mkdir partitions/{}/{name}", self.gpu));
            fs::create_dir(&directory)
                .with_context(|| format!("cannot make {}", directory.display()))?;
            self.write(
                &format!("partitions/{}/{name}/{}", self.gpu, File::SmCount.name()),
                &half.to_string(),
            )?;
        }
        let first = self.launch("first", "a")?;
        let second = self.launch("second", "b")?;
        rest(LOOK)?;
        println!("\nBoth run, each on its own {half} SMs, for one second:\n");
        self.table(&[("first", &first), ("second", &second)])?;
        println!();
        self.write(&format!("workloads/first/{}", File::Freeze.name()), "1")?;
        println!("\nThe first is frozen; one second later:\n");
        let before = self.table(&[("first", &first), ("second", &second)])?;
        rest(LOOK)?;
        println!();
        let after = self.table(&[("first", &first), ("second", &second)])?;
        if before[0] != after[0] {
            bail!(
                "the frozen workload went on: {} kernels ended, then {}",
                before[0],
                after[0]
            );
        }
        if before[1] >= after[1] {
            bail!("the other workload stood still at {} kernels", before[1]);
        }
        println!();
        self.write(&format!("workloads/first/{}", File::Freeze.name()), "0")?;
        for name in ["first", "second"] {
            self.write(&format!("workloads/{name}/{}", File::Kill.name()), "1")?;
        }
        println!("\nNot one kernel of the frozen workload ended; the other was not disturbed.");
        Ok(())
    }

    fn say(&self, command: &str) {
        println!("$ {command}");
    }

    fn read(&self, path: &str) -> Result<String> {
        let path = self.root.join(path);
        let text =
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(text.trim_end().to_owned())
    }

    fn write(&self, path: &str, value: &str) -> Result<()> {
        self.say(&format!("echo {value} > {path}"));
        let path = self.root.join(path);
        fs::write(&path, value)
            .with_context(|| format!("cannot write {value} to {}", path.display()))
    }

    /// Launches a workload and returns the path of its directory.
    fn launch(&self, name: &str, partition: &str) -> Result<String> {
        let gpu = self.gpu;
        let spec = format!(
            r#"{{"name": "{name}", "gpu": {gpu}, "kernel": "fma_fp32", "blocks": "per-sm:1", "partition": "{partition}"}}"#
        );
        self.say(&format!("echo '{spec}' > {}", File::Launch.name()));
        let path = self.root.join(File::Launch.name());
        let mut file = fs::File::options().read(true).write(true).open(&path)?;
        let written = file.write_all(spec.as_bytes());
        let mut answer = String::new();
        file.read_to_string(&mut answer)?;
        written.with_context(|| format!("the launch was refused: {answer}"))?;
        Ok(format!("workloads/{name}"))
    }

    /// Prints the counters of some workloads side by side and returns how many
    /// kernels of each have ended.
    fn table(&self, workloads: &[(&str, &str)]) -> Result<Vec<u64>> {
        let columns: Vec<Vec<(String, String)>> = workloads
            .iter()
            .map(|(_, directory)| self.stat(directory))
            .collect::<Result<_>>()?;
        print!("{:<24}", File::Stat.name());
        workloads.iter().for_each(|(name, _)| print!("{name:>16}"));
        println!();
        for (row, (key, _)) in columns[0].iter().enumerate() {
            print!("{key:<24}");
            for column in &columns {
                print!("{:>16}", column.get(row).map_or("", |(_, value)| value));
            }
            println!();
        }
        let ended = |column: &Vec<(String, String)>| {
            let line = column.iter().find(|(key, _)| key == "nr_ended_kernels");
            line.and_then(|(_, value)| value.parse().ok())
                .context("no count of ended kernels")
        };
        columns.iter().map(ended).collect()
    }

    fn stat(&self, directory: &str) -> Result<Vec<(String, String)>> {
        let text = self.read(&format!("{directory}/{}", File::Stat.name()))?;
        let pair = |line: &str| {
            line.split_once(": ")
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
        };
        Ok(text.lines().filter_map(pair).collect())
    }

    /// Ends the service and waits for it.
    fn stop(mut self) -> Result<()> {
        // It ends with its input, also when the demo dies before it gets here.
        drop(self.child.stdin.take());
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        if let Some(pid) = pid
            && self.child.try_wait()?.is_none()
        {
            kill_process(pid, Signal::TERM).context("cannot end the service")?;
        }
        let give_up = Instant::now() + STOP;
        while Instant::now() < give_up {
            if let Some(status) = self.child.try_wait()? {
                if status.success() {
                    return Ok(());
                }
                bail!("the service ended badly: {status}");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        self.child.kill().context("cannot kill the service")?;
        self.child.wait()?;
        bail!(
            "the service did not end within {} s and was killed",
            STOP.as_secs()
        )
    }
}
