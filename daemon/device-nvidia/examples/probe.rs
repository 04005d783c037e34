//! Shows what this host's driver answers, with timings. Of a GPU it changes only
//! what --timeslice and --stop say, for the one process that is named or started.
//!
//! ```text
//! probe                                  the host, its GPUs, figures, MPS
//! probe [OPTION...] -- CMD [ARG...]      besides runs CMD, which should open the
//!     GPU and stay: once by itself, and once as a client of a private MPS server
//! probe [OPTION...] --pid PID            attaches to a process that runs, without
//!     a mark from before it opened the GPU
//!
//!     --gpu N            the GPU, by its NVML index; 0 if not given
//!     --uid N            runs CMD as that user
//!     --timeslice USEC   sets the timeslice of the process's groups; that of PID
//!                        is put back
//!     --stop MS          stops its channels for that long and resumes them
//!     --any-branch       takes an unknown newer driver for the newest known one
//!     --objects          prints every object of its driver clients
//!     --no-mps           leaves the MPS server out
//! ```

use std::error::Error;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use gcgroup_device::{ChannelSet, Channels, DeviceError, GpuInfo, Host, Mps, Search, Telemetry};
use gcgroup_device_nvidia::{NvidiaHost, Options};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// How long a command may take to open its channels.
const PATIENCE: Duration = Duration::from_secs(20);

/// How often the operations that are done again and again are timed.
const ROUNDS: usize = 20;

#[derive(Default)]
struct Arguments {
    gpu: u32,
    uid: Option<u32>,
    pid: Option<u32>,
    timeslice: Option<u64>,
    stop: Option<Duration>,
    options: Options,
    objects: bool,
    no_mps: bool,
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
            "--pid" => parsed.pid = Some(value()?.parse()?),
            "--timeslice" => parsed.timeslice = Some(value()?.parse()?),
            "--stop" => parsed.stop = Some(Duration::from_millis(value()?.parse()?)),
            "--any-branch" => parsed.options.any_driver_branch = true,
            "--objects" => parsed.objects = true,
            "--no-mps" => parsed.no_mps = true,
            "--" => parsed.command = rest.by_ref().collect(),
            other => return Err(format!("unknown argument {other:?}").into()),
        }
    }
    Ok(parsed)
}

fn main() -> Result<()> {
    let arguments = arguments()?;
    let host = timed("open", || NvidiaHost::open_with(arguments.options))?;
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
        report("processes", timed("processes", || host.processes(gpu)));
    }
    if let Some(pid) = arguments.pid {
        let set = timed("list anew", || host.list(pid, gpu, Search::Anew));
        println!("  cost: {:?}", host.lookup_cost());
        act(&host, gpu, &arguments, &set?)?;
    }
    if !arguments.command.is_empty() {
        started(&host, gpu, &arguments)?;
    }
    if arguments.no_mps {
        return Ok(());
    }
    mps(&host, gpu, &arguments)
}

/// Runs an operation and prints how long it took.
fn timed<T>(what: &str, operation: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = operation();
    println!("{what}: {:.3} ms", milliseconds(start.elapsed()));
    result
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Runs an operation some times and prints the least, the middle and the most
/// that it took; the last result is returned.
fn timed_often<T>(
    what: &str,
    mut operation: impl FnMut() -> std::result::Result<T, DeviceError>,
) -> Result<T> {
    let mut times = Vec::with_capacity(ROUNDS);
    let mut last = None;
    for _ in 0..ROUNDS {
        let start = Instant::now();
        last = Some(operation()?);
        times.push(milliseconds(start.elapsed()));
    }
    times.sort_by(f64::total_cmp);
    println!(
        "{what}, {ROUNDS} times: {:.3} {:.3} {:.3} ms",
        times[0],
        times[ROUNDS / 2],
        times[ROUNDS - 1]
    );
    last.ok_or("there was no round".into())
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

/// Runs the command and looks it up with a mark from before it.
fn started(host: &NvidiaHost, gpu: &GpuInfo, arguments: &Arguments) -> Result<()> {
    let mark = host.mark()?;
    let running = run(arguments, &[])?;
    let pid = running.0.id();
    let deadline = Instant::now() + PATIENCE;
    let set = loop {
        std::thread::sleep(Duration::from_secs(2));
        match timed("list since the mark", || {
            host.list(pid, gpu, Search::Since(mark))
        }) {
            Ok(set) => break set,
            Err(error @ DeviceError::Failed(_)) if Instant::now() < deadline => {
                println!("  not yet: {error}");
            }
            Err(error) => return Err(error.into()),
        }
    };
    println!("  cost: {:?}", host.lookup_cost());
    act(host, gpu, arguments, &set)?;
    drop(running);
    report("timeslices after its end", host.timeslices(&set));
    let sets = [set];
    report("resume after its end", host.resume(gpu, &sets));
    report("stop after its end", host.stop(gpu, &sets));
    Ok(())
}

/// What is done with a process whose channels were found.
fn act(host: &NvidiaHost, gpu: &GpuInfo, arguments: &Arguments, set: &ChannelSet) -> Result<()> {
    println!("  groups: {:x?}", set.groups);
    println!("  {} channels: {:x?}", set.channels.len(), set.channels);
    if arguments.objects {
        for (client, object) in host.inventory(set.pid, gpu, Search::Recent)? {
            println!(
                "  client {client:#x} object {:#x} class {:#06x} parent {:#x}",
                object.handle, object.class, object.parent
            );
        }
    }
    let recent = timed_often("list what is recent", || {
        host.list(set.pid, gpu, Search::Recent)
    })?;
    println!("  beyond the first list: {:x?}", recent.beyond(set));
    timed_often("list what is next", || {
        host.list(set.pid, gpu, Search::Next)
    })?;
    let anew = timed("list anew", || host.list(set.pid, gpu, Search::Anew))?;
    println!("  beyond the first list: {:x?}", anew.beyond(set));
    println!("  cost: {:?}", host.lookup_cost());
    let before = timed_often("timeslices", || host.timeslices(set))?;
    println!("  {before:?}");
    if let Some(usec) = arguments.timeslice {
        let set_to = timed("set_timeslice", || host.set_timeslice(set, usec));
        report("set_timeslice", set_to);
        if arguments.pid.is_some()
            && let Some(first) = before.usec.first()
        {
            report("put back", host.set_timeslice(set, *first));
        }
    }
    if let Some(time) = arguments.stop {
        stop(host, gpu, set, time)?;
    }
    Ok(())
}

/// Stops the channels for a while, the first time with the opening of the GPU.
fn stop(host: &NvidiaHost, gpu: &GpuInfo, set: &ChannelSet, time: Duration) -> Result<()> {
    let sets = std::slice::from_ref(set);
    timed("resume what runs, the GPU opened first", || {
        host.resume(gpu, sets)
    })?;
    for round in 0..3 {
        let stopped = timed("stop", || host.stop(gpu, sets));
        report("stop", stopped.clone());
        if stopped.is_ok() && round == 0 {
            report("stop again", timed("stop again", || host.stop(gpu, sets)));
            let utilization = host.sample(gpu)?.utilization;
            println!("  while stopped: {utilization:?}");
            let recent = timed("list what is recent, stopped", || {
                host.list(set.pid, gpu, Search::Recent)
            });
            report("beyond what is stopped", recent.map(|now| now.beyond(set)));
        }
        std::thread::sleep(time);
        // Whatever became of the stop.
        report("resume", timed("resume", || host.resume(gpu, sets)));
        std::thread::sleep(time);
    }
    Ok(())
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
        let client = running.0.id();
        println!("  the client is process {client}");
        report("processes", host.processes(gpu));
        report(
            "channels of the client, of which it should have no group",
            timed("list anew", || host.list(client, gpu, Search::Anew)),
        );
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
