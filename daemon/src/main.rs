//! gcgroupd: control files for every process on an NVIDIA GPU.
//!
//! One program in several processes: the service, its guardian, the workers it
//! launches, and the simulated GPU. It starts itself again for each of them.

mod clock;
mod config;
mod controller;
mod counting;
mod demo;
mod discover;
mod doctor;
mod endings;
mod guardian;
mod host;
mod identity;
mod journal;
mod keeper;
mod launch;
mod link;
mod mps;
mod procfs;
mod prove;
mod recover;
mod remembered;
mod sandbox;
mod serve;
mod spawn;
mod worker_main;

use std::ffi::CStr;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::{Args, Parser, Subcommand};
use gcgroup_device_sim::{AppOptions, SimOptions};
use tracing_subscriber::EnvFilter;

use config::{Config, DEFAULT_STATE, Flags};

/// Control files for every process on an NVIDIA GPU.
#[derive(Debug, Parser)]
#[command(
    name = "gcgroupd",
    version,
    about,
    args_conflicts_with_subcommands = true
)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    flags: Flags,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve the control files (also what gcgroupd does without a command)
    Serve(Flags),
    /// Show two workloads in two partitions, freeze one, and clean up
    Demo(demo::DemoArgs),
    /// Undo what a service left behind that ended without cleaning up
    Recover(RecoverArgs),
    /// Say what this host offers, and what to do about what it lacks
    Doctor(doctor::DoctorArgs),
    /// The process of one workload; started by the service
    #[command(hide = true)]
    Worker,
    /// The process that recovers when the service dies; started by the service
    #[command(hide = true)]
    Guardian(StateArg),
    /// The simulated GPU; started by the service
    #[command(hide = true)]
    SimGpu(SimGpuArgs),
    /// A program of somebody else on the simulated GPU
    #[command(hide = true)]
    SimApp(SimAppArgs),
}

impl Command {
    /// Name of the process in ps(1), for those that the service starts.
    fn process_name(&self) -> Option<&'static CStr> {
        match self {
            Self::Worker => Some(c"gcgroupd-worker"),
            Self::Guardian(_) => Some(c"gcgroupd-guard"),
            Self::SimGpu(_) => Some(c"gcgroupd-sim"),
            Self::Serve(_)
            | Self::Demo(_)
            | Self::Recover(_)
            | Self::Doctor(_)
            | Self::SimApp(_) => None,
        }
    }
}

#[derive(Debug, Args)]
struct RecoverArgs {
    /// State directory of the service
    #[arg(long, value_name = "DIR", default_value = DEFAULT_STATE)]
    state: PathBuf,
    /// The service ran on a simulated host (which recovers by itself)
    #[arg(long, value_name = "GPUS", num_args = 0..=1, require_equals = true, default_missing_value = "1")]
    sim: Option<u32>,
}

#[derive(Debug, Args)]
struct StateArg {
    #[arg(long, value_name = "DIR")]
    state: PathBuf,
}

#[derive(Debug, Args)]
struct SimGpuArgs {
    #[arg(long, value_name = "DIR")]
    state: PathBuf,
    #[arg(long, value_name = "N", default_value_t = 1)]
    gpus: u32,
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    seed: u64,
}

#[derive(Debug, Args)]
#[command(after_help = format!(
    "Commands on standard input, a line each, answered by a line:\n{}",
    gcgroup_device_sim::COMMANDS
))]
struct SimAppArgs {
    /// State directory of the simulated GPU
    #[arg(long, value_name = "DIR")]
    state: PathBuf,
    /// GPU of its first context
    #[arg(long, value_name = "INDEX", default_value_t = 0)]
    gpu: u32,
    /// Bytes that it allocates, with an optional K, M, G or T
    #[arg(long, value_name = "BYTES", default_value = "1G")]
    memory: String,
    /// Length of its kernels in microseconds
    #[arg(long, value_name = "USEC", default_value_t = 500)]
    kernel_us: u64,
    /// Launch nothing before `go` is read from standard input
    #[arg(long)]
    idle: bool,
    /// Be an MPS server in the list of processes
    #[arg(long)]
    mps_server: bool,
    /// Wait before the first context is opened, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = 0)]
    later: u64,
    /// Start children that do the same, and end when this process does
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=64))]
    children: u32,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Some(name) = cli.command.as_ref().and_then(Command::process_name) {
        // Started through a link in /proc, it would be called after the link. A
        // name that is not taken is no reason not to work.
        let _ = rustix::thread::set_name(name);
    }
    log_to_stderr();
    match run(cli) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("gcgroupd: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn log_to_stderr() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
}

fn run(cli: Cli) -> Result<ExitCode> {
    match cli.command {
        Some(Command::Doctor(args)) => {
            let healthy = doctor::run(&args)?;
            return Ok(if healthy {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            });
        }
        None => serve::run(Config::load(&cli.flags)?, cli.flags.lives()),
        Some(Command::Serve(flags)) => serve::run(Config::load(&flags)?, flags.lives()),
        Some(Command::Demo(args)) => demo::run(&args),
        Some(Command::Recover(args)) => serve::recover(&args.state),
        Some(Command::Worker) => worker_main::run(),
        Some(Command::Guardian(args)) => guardian::run(&args.state),
        Some(Command::SimGpu(args)) => sim_gpu(args),
        Some(Command::SimApp(args)) => sim_app(&args),
    }?;
    Ok(ExitCode::SUCCESS)
}

fn sim_gpu(args: SimGpuArgs) -> Result<()> {
    gcgroup_device_sim::serve(&SimOptions {
        gpus: args.gpus,
        seed: args.seed,
        ..SimOptions::new(args.state)
    })?;
    Ok(())
}

fn sim_app(args: &SimAppArgs) -> Result<()> {
    let memory_bytes =
        gcgroup_model::value::bytes(&args.memory, "bytes, with an optional K, M, G or T")?;
    gcgroup_device_sim::run_app(&AppOptions {
        state: args.state.clone(),
        gpu: args.gpu,
        memory_bytes,
        kernel_us: args.kernel_us,
        idle: args.idle,
        mps_server: args.mps_server,
        later: Duration::from_millis(args.later),
        children: args.children,
        // A child knows that it is one, and has none.
        child_arguments: std::env::args_os().skip(1).collect(),
    })?;
    Ok(())
}
