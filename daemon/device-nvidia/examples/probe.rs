//! Shows what this host's driver answers, with timings. It changes no setting
//! of a GPU.
//!
//! ```text
//! probe                                  the host, its GPUs, figures, MPS
//! probe [--gpu N] [--uid N] [--timeslice USEC] -- CMD [ARG...]
//!     besides runs CMD, which should open the GPU and stay: once by itself, to
//!     find its channel groups, and once as a client of a private MPS server.
//!     --uid runs it as that user; --timeslice sets the timeslice of its own
//!     groups, which end with it.
//! ```

use std::error::Error;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use gcgroup_device::{Channels, ClientMark, DeviceError, GpuInfo, Host, Mps, Telemetry};
use gcgroup_device_nvidia::NvidiaHost;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// How long a command may take to open its channels.
const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Default)]
struct Arguments {
    gpu: u32,
    uid: Option<u32>,
    timeslice: Option<u64>,
    command: Vec<String>,
}

fn arguments() -> Result<Arguments> {
    let mut parsed = Arguments::default();
    let mut rest = std::env::args().skip(1);
    while let Some(argument) = rest.next() {
        let mut value = || rest.next().ok_or(format!("{argument} needs a value"));
        match argument.as_str() {
            "--gpu" => parsed.gpu = value()?.parse()?,
            "--uid" => parsed.uid = Some(value()?.parse()?),
            "--timeslice" => parsed.timeslice = Some(value()?.parse()?),
            "--" => parsed.command = rest.by_ref().collect(),
            other => return Err(format!("unknown argument {other:?}").into()),
        }
    }
    Ok(parsed)
}

fn main() -> Result<()> {
    let arguments = arguments()?;
    let host = timed("open", NvidiaHost::open)?;
    println!("{}", host.describe());
    let gpus = timed("gpus", || host.gpus())?;
    for gpu in &gpus {
        println!("  {gpu:?}, {}", host.worker_address(gpu));
    }
    let gpu = gpus
        .iter()
        .find(|gpu| gpu.index == arguments.gpu)
        .ok_or(format!("there is no GPU {}", arguments.gpu))?;
    for _ in 0..2 {
        let sample = timed("sample", || host.sample(gpu))?;
        println!("  {sample:?}");
        std::thread::sleep(Duration::from_millis(200));
    }
    for _ in 0..2 {
        report("mark", timed("mark", || host.mark()));
    }
    if !arguments.command.is_empty() {
        channels(&host, gpu, &arguments)?;
    }
    mps(&host, gpu, &arguments)
}

/// Runs an operation and prints how long it took.
fn timed<T>(what: &str, operation: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = operation();
    println!("{what}: {:.3} ms", start.elapsed().as_secs_f64() * 1e3);
    result
}

fn report<T: std::fmt::Debug>(what: &str, result: std::result::Result<T, DeviceError>) {
    match result {
        Ok(value) => println!("  {what}: {value:x?}"),
        Err(error) => println!("  {what}: error: {error}"),
    }
}

/// A command that is ended when the probe is done with it.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn run(arguments: &Arguments, environment: &[(String, String)]) -> Result<Running> {
    let (program, rest) = arguments
        .command
        .split_first()
        .ok_or("there is no command to run")?;
    let mut command = Command::new(program);
    command.args(rest).envs(environment.iter().cloned());
    if let Some(uid) = arguments.uid {
        command.uid(uid).gid(uid);
    }
    Ok(Running(command.spawn()?))
}

fn channels(host: &NvidiaHost, gpu: &GpuInfo, arguments: &Arguments) -> Result<()> {
    let mark = host.mark()?;
    let running = run(arguments, &[])?;
    let pid = running.0.id();
    let groups = wait_for_groups(host, gpu, pid, mark)?;
    println!("  groups: {groups:x?}");
    for object in host.inventory(pid, mark)? {
        println!(
            "  object {:#x} class {:#06x} parent {:#x}",
            object.handle, object.class, object.parent
        );
    }
    let again = timed("find again", || host.find(pid, gpu, mark));
    report("find again", again);
    report(
        "timeslices",
        timed("timeslices", || host.timeslices(&groups)),
    );
    if let Some(usec) = arguments.timeslice {
        let set = timed("set_timeslice", || host.set_timeslice(&groups, usec));
        report("set_timeslice", set);
    }
    drop(running);
    report("after its end", host.timeslices(&groups));
    Ok(())
}

/// Tries until the command has opened its channels. Each try costs a line in
/// the kernel's log for each wrong guess, so there are few of them.
fn wait_for_groups(
    host: &NvidiaHost,
    gpu: &GpuInfo,
    pid: u32,
    mark: ClientMark,
) -> Result<gcgroup_device::ChannelGroups> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        std::thread::sleep(Duration::from_secs(2));
        match timed("find", || host.find(pid, gpu, mark)) {
            Ok(groups) => return Ok(groups),
            Err(error @ DeviceError::Failed(_)) if Instant::now() < deadline => {
                println!("  not yet: {error}");
            }
            Err(error) => return Err(error.into()),
        }
    }
}

fn mps(host: &NvidiaHost, gpu: &GpuInfo, arguments: &Arguments) -> Result<()> {
    let slots = host.slots();
    let available = slots.is_ok();
    report("mps slots", slots);
    if !available {
        return Ok(());
    }
    let directory = tempfile::tempdir()?;
    std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755))?;
    let mut server = timed("mps start", || host.start(gpu, directory.path()))?;
    println!(
        "  process {:?}, alive {}",
        server.process(),
        server.is_alive()
    );
    for (name, value) in server.environment() {
        println!("  {name}={value}");
    }
    list(&directory.path().join("pipe"))?;
    if !arguments.command.is_empty() {
        let mut running = run(arguments, &server.environment())?;
        std::thread::sleep(Duration::from_secs(5));
        println!("  with a client: alive {}", server.is_alive());
        println!("  client: {:?}", running.0.try_wait()?);
        println!("  sample: {:?}", host.sample(gpu)?);
        list(&directory.path().join("pipe"))?;
        drop(running);
        println!("  without: alive {}", server.is_alive());
    }
    timed("mps stop", || server.stop());
    let mut logs = vec![directory.path().join("output.log")];
    for entry in std::fs::read_dir(directory.path().join("log"))? {
        logs.push(entry?.path());
    }
    for log in logs {
        println!("--- {}", log.display());
        print!("{}", String::from_utf8_lossy(&std::fs::read(&log)?));
    }
    Ok(())
}

/// What lies in a directory, with modes.
fn list(directory: &Path) -> Result<()> {
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        let mode = entry.metadata()?.permissions().mode();
        println!("  {mode:06o} {}", entry.path().display());
    }
    Ok(())
}
