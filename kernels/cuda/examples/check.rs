//! Tries the engine on a GPU: `check [--stops] [UUID]`, the first GPU where none is named; with
//! `--stops` only how long a stop takes.
//!
//! It runs every kernel in both forms with stops at random moments and compares the results with
//! the CPU reference, moves a running workload between SM partitions, and measures what the looks
//! at the stop flag cost and how long a stop takes. It exits 1 where a result is wrong.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use gcgroup_cuda::{CudaEngine, FlagPath, devices};
use gcgroup_kernels::catalogue::{KERNELS, find};
use gcgroup_kernels::engine::{Completion, Engine, Form, Placement, Plan};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Launches kept in flight.
const DEPTH: usize = 4;
/// What a launch is calibrated to, microseconds.
const LAUNCH_US: f64 = 500.0;
/// Poll intervals that are tried, microseconds.
const POLLS_US: [f64; 4] = [5.0, 10.0, 20.0, 40.0];
/// Ways to set the flag that are compared.
const PATHS: [FlagPath; 2] = [FlagPath::Copy, FlagPath::WriteValue];
/// Threads of a block that are no multiple of a warp.
const CROOKED: u32 = 100;
/// Bytes of a copy that takes longer for one sweep than it is run for.
const HUGE_COPY: u64 = 64 << 30;
/// No single wait may take longer.
const PATIENCE: Duration = Duration::from_secs(10);

const WHOLE: Placement = Placement {
    groups: None,
    stream_priority: 0,
};

/// Numbers that look random and are the same in each run (xorshift64).
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

fn plan(kernel: &str, ilp: u32, blocks: u32, form: Form) -> Result<Plan> {
    let row = find(kernel).context("no such kernel")?;
    Ok(Plan {
        kernel: kernel.to_owned(),
        ilp,
        blocks,
        threads: row.default_threads,
        bytes: row.bytes.as_ref().map_or(0, |bytes| bytes.default),
        form,
    })
}

fn open(uuid: &str, path: FlagPath, plan: &Plan) -> Result<CudaEngine> {
    let mut engine = CudaEngine::open_with(uuid, path)?;
    engine.prepare(plan)?;
    engine.place(&WHOLE)?;
    Ok(engine)
}

/// Waits for one completion on the descriptor, as a worker does.
fn next(engine: &mut CudaEngine) -> Result<Completion> {
    let start = Instant::now();
    loop {
        if let Some(completion) = engine.poll()? {
            return Ok(completion);
        }
        ensure!(start.elapsed() < PATIENCE, "a launch does not end");
        let second = Timespec {
            tv_sec: 1,
            tv_nsec: 0,
        };
        poll(
            &mut [PollFd::new(&engine.wait_fd(), PollFlags::IN)],
            Some(&second),
        )?;
    }
}

/// Waits for one completion without sleeping, as a worker does while it stops.
fn spin(engine: &mut CudaEngine) -> Result<Completion> {
    let start = Instant::now();
    loop {
        if let Some(completion) = engine.poll()? {
            return Ok(completion);
        }
        ensure!(start.elapsed() < PATIENCE, "a launch does not end");
    }
}

/// Runs launches of `units` units one behind the other, from where the workload is, and returns the
/// device time of each in microseconds.
fn run(engine: &mut CudaEngine, units: u64, poll_units: u32, launches: usize) -> Result<Vec<f64>> {
    let from = engine.progress()?.least;
    let mut times = Vec::with_capacity(launches);
    for number in 0..launches {
        engine.submit(from + units * (number as u64 + 1), poll_units)?;
        if number + 1 >= DEPTH {
            times.push(next(engine)?.device_us);
        }
    }
    while times.len() < launches {
        times.push(next(engine)?.device_us);
    }
    Ok(times)
}

fn quantile(values: &[f64], part: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = ((sorted.len() as f64 - 1.0) * part).round() as usize;
    sorted.get(at).copied().unwrap_or(f64::NAN)
}

/// Units that last about LAUNCH_US, and the microseconds of one unit.
fn calibrate(engine: &mut CudaEngine) -> Result<(u64, f64)> {
    let mut units = 8;
    loop {
        let us = quantile(&run(engine, units, u32::MAX, 5)?, 0.5);
        if us > LAUNCH_US / 2.0 {
            let each = us / units as f64;
            return Ok(((LAUNCH_US / each).max(1.0) as u64, each));
        }
        let factor = (LAUNCH_US / us.max(1.0)).clamp(2.0, 16.0);
        units = (units as f64 * factor) as u64;
    }
}

/// Units between two looks that are `us` apart; of the compute kernels a multiple of the inner
/// loop's 32.
fn poll_units(each: f64, us: f64) -> u32 {
    let units = (us / each).max(1.0) as u32;
    if units > 64 { units / 32 * 32 } else { units }
}

/// When results are compared.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Comparing {
    /// At some stops and at the end.
    NowAndThen,
    /// At each stop: what a copy loses shows at its cursor only.
    AtEachStop,
}

/// What a check of one workload found.
struct Outcome {
    stops: u32,
    cut: u32,
    compared: u64,
    wrong: u64,
}

/// Runs a workload to its end through random stops, and compares on the way.
fn through_stops(
    engine: &mut CudaEngine,
    dice: &mut Dice,
    poll: u32,
    units: u64,
    comparing: Comparing,
) -> Result<Outcome> {
    let mut outcome = Outcome {
        stops: 0,
        cut: 0,
        compared: 0,
        wrong: 0,
    };
    let from = engine.progress()?.least;
    let targets: Vec<u64> = (1..=16).map(|launch| from + launch * units).collect();
    let last = targets[targets.len() - 1];
    let mut before = engine.progress()?;
    while before.least < last {
        let open = targets.iter().filter(|&&target| target > before.least);
        let flying = open.clone().count().min(DEPTH);
        for &target in open.take(DEPTH) {
            engine.submit(target, poll)?;
        }
        // After enough stops the rest runs through.
        let stopping = outcome.stops < 24;
        if stopping {
            std::thread::sleep(Duration::from_micros(dice.below(1200)));
            engine.raise_stop()?;
            outcome.stops += 1;
        }
        for _ in 0..flying {
            next(engine)?;
        }
        let after = engine.progress()?;
        ensure!(
            after.least >= before.least && after.most <= last && after.total >= before.total,
            "progress went from {before:?} to {after:?}, target {last}"
        );
        outcome.cut += u32::from(!targets.contains(&after.least) || after.least != after.most);
        if outcome.stops.is_multiple_of(6) || comparing == Comparing::AtEachStop {
            let verified = engine.verify()?;
            outcome.compared += verified.compared;
            outcome.wrong += verified.wrong;
        }
        if stopping {
            engine.lower_stop()?;
        }
        before = after;
    }
    ensure!(
        before.most == last,
        "a block went to {} instead of {last}",
        before.most
    );
    let verified = engine.verify()?;
    outcome.compared += verified.compared;
    outcome.wrong += verified.wrong;
    Ok(outcome)
}

/// Every kernel in both forms, and some shapes at the edges.
fn correctness(uuid: &str, sms: u32, memory_bytes: u64, dice: &mut Dice) -> Result<u64> {
    let mut plans = Vec::new();
    for kernel in KERNELS {
        for ilp in kernel.ilp.clone() {
            for form in [Form::Sliced, Form::Uncut] {
                plans.push(plan(kernel.name, ilp, sms, form)?);
            }
        }
        // More blocks than fit at a time; few and crooked ones.
        let many = plan(kernel.name, kernel.default_ilp, 5 * sms, Form::Sliced)?;
        let mut crooked = plan(kernel.name, kernel.default_ilp, 7, Form::Sliced)?;
        crooked.threads = CROOKED;
        // With one chain it is fast enough to pass the 2^23 units of mul_fp32's epoch.
        crooked.ilp = 1;
        if kernel.name == "copy" {
            crooked.bytes = 8 * 100_003;
        }
        plans.push(many);
        plans.push(crooked);
    }
    // So large that all the launches are within the first sweep, in which every unit shows.
    let mut huge = plan("copy", 1, sms, Form::Sliced)?;
    huge.bytes = HUGE_COPY;
    if memory_bytes > HUGE_COPY + (8 << 30) {
        plans.push(huge);
    }
    println!("\nresults against the CPU reference");
    println!(
        "{:<16}{:>4}{:>8}{:>9}  {:<8}{:>7}{:>6}{:>10}{:>7}",
        "kernel", "ilp", "blocks", "threads", "form", "stops", "cut", "compared", "wrong"
    );
    let mut wrong = 0;
    for plan in plans {
        let mut engine = open(uuid, FlagPath::Copy, &plan)?;
        let (units, each) = calibrate(&mut engine)?;
        let comparing = match plan.bytes {
            0 => Comparing::NowAndThen,
            _ => Comparing::AtEachStop,
        };
        let (units, poll) = match plan.threads {
            CROOKED => (8 * units, 7),
            _ => (units, poll_units(each, 10.0)),
        };
        let outcome = through_stops(&mut engine, dice, poll, units, comparing)
            .with_context(|| format!("{plan:?}"))?;
        println!(
            "{:<16}{:>4}{:>8}{:>9}  {:<8}{:>7}{:>6}{:>10}{:>7}",
            plan.kernel,
            plan.ilp,
            plan.blocks,
            plan.threads,
            format!("{:?}", plan.form).to_lowercase(),
            outcome.stops,
            outcome.cut,
            outcome.compared,
            outcome.wrong
        );
        wrong += outcome.wrong;
        if plan.form == Form::Sliced && outcome.cut == 0 && plan.kernel != "copy" {
            bail!("no stop of {plan:?} cut a launch short");
        }
    }
    Ok(wrong)
}

/// What the looks at the flag cost.
fn polling_cost(uuid: &str, sms: u32) -> Result<()> {
    println!("\ntime of a launch, median of 80, and what looking at the flag adds");
    print!(
        "{:<16}{:>8}{:>11}{:>13}",
        "kernel", "blocks", "uncut us", "rate"
    );
    for us in POLLS_US {
        print!("{:>12}", format!("{us} us"));
    }
    println!();
    for kernel in KERNELS {
        for per_sm in [1, 2] {
            let blocks = sms * per_sm;
            let form = |form| plan(kernel.name, kernel.default_ilp, blocks, form);
            let mut uncut = open(uuid, FlagPath::Copy, &form(Form::Uncut)?)?;
            let mut sliced = open(uuid, FlagPath::Copy, &form(Form::Sliced)?)?;
            let (units, each) = calibrate(&mut uncut)?;
            let before = quantile(&run(&mut uncut, units, 0, 80)?, 0.5);
            let mut times = Vec::new();
            for us in POLLS_US {
                let times_of = run(&mut sliced, units, poll_units(each, us), 80)?;
                times.push(quantile(&times_of, 0.5));
            }
            // Once more afterwards, since clocks change.
            let after = quantile(&run(&mut uncut, units, 0, 80)?, 0.5);
            let solo = f64::midpoint(before, after);
            let rate = rate(&form(Form::Uncut)?, units, solo);
            print!("{:<16}{blocks:>8}{solo:>11.2}{rate:>13}", kernel.name);
            for time in times {
                print!("{:>12}", format!("{:+.2}%", (time / solo - 1.0) * 100.0));
            }
            println!();
        }
    }
    Ok(())
}

/// Operations or bytes a second of a launch.
fn rate(plan: &Plan, units: u64, us: f64) -> String {
    let lanes = f64::from(plan.blocks) * f64::from(plan.threads);
    let units = units as f64;
    let (amount, name) = match plan.kernel.as_str() {
        "copy" => (lanes * 8.0 * units / 1e3, "GB/s"),
        "copy_per_block" => (
            f64::from(plan.blocks) * plan.bytes as f64 * units / 1e3,
            "GB/s",
        ),
        "sleep" => return format!("{:.3} us", us / units),
        _ => (lanes * f64::from(plan.ilp) * units / 1e6, "Top/s"),
    };
    format!("{:.1} {name}", amount / us)
}

/// How long a stop takes: from before the flag is raised until the last of the launches in flight
/// is seen to have ended.
fn stop_latency(uuid: &str, sms: u32, dice: &mut Dice) -> Result<()> {
    println!("\nstop with {DEPTH} launches in flight, 200 times, microseconds");
    println!(
        "{:<16}{:<12}{:>8}{:>9}{:>9}{:>9}{:>9}{:>14}",
        "kernel", "flag by", "poll", "p50", "p90", "p99", "max", "call itself"
    );
    for kernel in ["fma_fp32", "copy"] {
        for path in PATHS {
            let row = find(kernel).context("no such kernel")?;
            let mut engine = open(
                uuid,
                path,
                &plan(kernel, row.default_ilp, sms, Form::Sliced)?,
            )?;
            let (units, each) = calibrate(&mut engine)?;
            for us in &POLLS_US {
                let poll = poll_units(each, *us);
                let (times, calls) = stops(&mut engine, dice, units, poll)
                    .with_context(|| format!("{kernel}, {path:?}"))?;
                println!(
                    "{:<16}{:<12}{:>8}{:>9.1}{:>9.1}{:>9.1}{:>9.1}{:>14.1}",
                    kernel,
                    format!("{path:?}"),
                    us,
                    quantile(&times, 0.5),
                    quantile(&times, 0.9),
                    quantile(&times, 0.99),
                    quantile(&times, 1.0),
                    quantile(&calls, 0.5)
                );
            }
        }
    }
    Ok(())
}

/// How long a stop takes on one stream after another, since streams share the queues of the device:
/// under MPS a client has two.
fn stop_by_placement(uuid: &str, sms: u32, dice: &mut Dice) -> Result<()> {
    println!("\nstop on one stream after another, looks every 20 us, 200 times, microseconds");
    println!(
        "{:<12}{:<20}{:>9}{:>9}{:>9}{:>9}",
        "flag by", "placement", "p50", "p90", "p99", "max"
    );
    let group = |groups: Vec<u32>| Placement {
        groups: Some(groups),
        stream_priority: 0,
    };
    let placements = [
        ("whole", WHOLE),
        ("whole again", WHOLE),
        ("groups 0..=7", group((0..8).collect())),
        ("groups 8..=15", group((8..16).collect())),
        ("groups 0..=7 again", group((0..8).collect())),
    ];
    for path in PATHS {
        let row = find("fma_fp32").context("no such kernel")?;
        let plan = plan("fma_fp32", row.default_ilp, sms / 2, Form::Sliced)?;
        let mut engine = open(uuid, path, &plan)?;
        for (name, placement) in &placements {
            engine.place(placement)?;
            let (units, each) = calibrate(&mut engine)?;
            let (times, _) = stops(&mut engine, dice, units, poll_units(each, 20.0))?;
            println!(
                "{:<12}{name:<20}{:>9.1}{:>9.1}{:>9.1}{:>9.1}",
                format!("{path:?}"),
                quantile(&times, 0.5),
                quantile(&times, 0.9),
                quantile(&times, 0.99),
                quantile(&times, 1.0)
            );
        }
    }
    Ok(())
}

fn stops(
    engine: &mut CudaEngine,
    dice: &mut Dice,
    units: u64,
    poll: u32,
) -> Result<(Vec<f64>, Vec<f64>)> {
    let (mut times, mut calls) = (Vec::new(), Vec::new());
    for _ in 0..200 {
        let from = engine.progress()?.least;
        for number in 1..=DEPTH as u64 {
            engine.submit(from + number * units, poll)?;
        }
        // Within the first launch or early in the second.
        let wait = Duration::from_micros(200 + dice.below(500));
        let start = Instant::now();
        while start.elapsed() < wait {
            std::hint::spin_loop();
        }
        let raised = Instant::now();
        engine.raise_stop()?;
        calls.push(raised.elapsed().as_secs_f64() * 1e6);
        for _ in 0..DEPTH {
            spin(engine)?;
        }
        times.push(raised.elapsed().as_secs_f64() * 1e6);
        engine.lower_stop()?;
    }
    let verified = engine.verify()?;
    ensure!(verified.wrong == 0, "{verified:?} after 200 stops");
    Ok((times, calls))
}

/// Single groups, runs of them, and combinations with the last one, the remainder.
fn placements(count: u32) -> Vec<Option<Vec<u32>>> {
    let half = count / 2;
    vec![
        None,
        Some((0..half).collect()),
        Some((half..2 * half).collect()),
        Some(vec![0]),
        Some(vec![count - 1]),
        Some(vec![0, count - 1]),
        Some(vec![count - 1, half, 0]),
        Some((0..count).collect()),
        None,
    ]
}

/// Moves one workload between partitions, and shows what each gives.
fn partitions(uuid: &str) -> Result<u64> {
    let mut engine = CudaEngine::open(uuid)?;
    let facts = engine.facts().clone();
    println!("\nSM groups {:?}", facts.groups);
    if !facts.green_contexts {
        println!("no green contexts here: partitions are not checked");
        return Ok(0);
    }
    let sms = facts.sm_count;
    engine.prepare(&plan("fma_fp32", 4, sms, Form::Sliced)?)?;
    engine.place(&WHOLE)?;
    let (units, each) = calibrate(&mut engine)?;
    let count = facts.groups.len() as u32;
    println!(
        "{:<28}{:>8}{:>9}{:>12}{:>14}",
        "groups", "asked", "granted", "place us", "launch us"
    );
    for groups in placements(count) {
        let asked = groups.as_ref().map_or(sms, |groups| {
            groups
                .iter()
                .map(|&group| facts.groups[group as usize])
                .sum()
        });
        let text = groups
            .as_ref()
            .map_or("whole device".to_owned(), |groups| match groups[..] {
                [first, .., last] if groups.len() > 4 => format!("{first}..={last}"),
                _ => format!("{groups:?}"),
            });
        let start = Instant::now();
        let granted = engine
            .place(&Placement {
                groups,
                stream_priority: facts.stream_priority_greatest,
            })
            .with_context(|| format!("groups {text}"))?;
        let place_us = start.elapsed().as_secs_f64() * 1e6;
        let times = run(&mut engine, units, poll_units(each, 20.0), 12)?;
        let us = quantile(&times, 0.5);
        println!("{text:<28}{asked:>8}{granted:>9}{place_us:>12.0}{us:>14.1}");
        ensure!(granted == asked, "{text}: {granted} SMs instead of {asked}");
    }
    let refused = engine.place(&Placement {
        groups: Some(vec![count]),
        stream_priority: 0,
    });
    ensure!(refused.is_err(), "group {count} does not exist");
    let times = run(&mut engine, units, poll_units(each, 20.0), 4)?;
    println!(
        "after a refused placement: {:.1} us a launch",
        quantile(&times, 0.5)
    );
    let verified = engine.verify()?;
    println!("{verified:?}");
    Ok(verified.wrong)
}

fn main() -> Result<()> {
    let start = Instant::now();
    let (options, mut names): (Vec<_>, Vec<_>) = std::env::args()
        .skip(1)
        .partition(|argument| argument.starts_with("--"));
    let uuid = match names.pop() {
        Some(uuid) => uuid,
        None => devices()?.first().context("no GPU")?.uuid.clone(),
    };
    for device in devices()? {
        println!("{} {}", device.uuid, device.name);
    }
    // Kept until the end, so that the context is made once.
    let keeper = CudaEngine::open(&uuid)?;
    let facts = keeper.facts();
    println!("{facts:?}");
    let mut dice = Dice(0x9e37_79b9_7f4a_7c15);
    if options.iter().any(|option| option == "--stops") {
        stop_by_placement(&uuid, facts.sm_count, &mut dice)?;
        return stop_latency(&uuid, facts.sm_count, &mut dice);
    }
    let mut wrong = partitions(&uuid)?;
    wrong += correctness(&uuid, facts.sm_count, facts.memory_bytes, &mut dice)?;
    polling_cost(&uuid, facts.sm_count)?;
    stop_latency(&uuid, facts.sm_count, &mut dice)?;
    println!("\n{:.1} s in all", start.elapsed().as_secs_f64());
    ensure!(wrong == 0, "{wrong} values are wrong");
    println!("every value is right");
    Ok(())
}
