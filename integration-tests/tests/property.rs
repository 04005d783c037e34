//! Random walks over partitions and workloads, each step compared with a naive
//! model of the tree.
//!
//! The seed is printed when a walk fails; `GCGROUP_SEED=<seed>` repeats it.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use gcgroup_integration_tests::{Errno, Instance, Launched, wait};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestRng, TestRunner};
use serde_json::json;

/// Whole SM groups of the simulated GPU, and SMs of one.
const GROUPS: u32 = 16;
const WHOLE: u32 = 8;
/// SMs of the one smaller group.
const REMAINDER: u32 = 4;
const NAMES: [&str; 3] = ["a", "b", "c"];
/// A launch is a process, so a walk has no more than this many at once.
const MOST_WORKLOADS: usize = 4;

#[derive(Clone, Debug)]
enum Step {
    Make(usize),
    Remove(usize),
    Resize(usize, Option<u32>),
    Launch(Option<usize>),
    Move(usize, Option<usize>),
    Freeze(usize, bool),
    Kill(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let name = 0..NAMES.len();
    let count = prop_oneof![
        1 => Just(None),
        6 => (0_u32..=140).prop_map(Some),
    ];
    prop_oneof![
        3 => name.clone().prop_map(Step::Make),
        1 => name.clone().prop_map(Step::Remove),
        4 => (name.clone(), count).prop_map(|(name, count)| Step::Resize(name, count)),
        3 => prop::option::of(name.clone()).prop_map(Step::Launch),
        4 => (any::<usize>(), prop::option::weighted(0.8, name)).prop_map(|(w, n)| Step::Move(w, n)),
        2 => (any::<usize>(), any::<bool>()).prop_map(|(w, on)| Step::Freeze(w, on)),
        1 => any::<usize>().prop_map(Step::Kill),
    ]
}

/// What a partition owns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Own {
    whole: u32,
    remainder: bool,
}

impl Own {
    fn sms(self) -> u32 {
        self.whole * WHOLE + u32::from(self.remainder) * REMAINDER
    }
}

#[derive(Debug)]
struct Workload {
    launched: Launched,
    partition: Option<usize>,
    frozen: bool,
}

/// The tree as it should be.
#[derive(Debug, Default)]
struct Model {
    partitions: BTreeMap<usize, Own>,
    workloads: Vec<Workload>,
}

impl Model {
    fn members(&self, name: usize) -> Vec<u32> {
        let members = self.workloads.iter().filter(|w| w.partition == Some(name));
        let mut pids: Vec<_> = members.map(|w| w.launched.pid).collect();
        pids.sort_unstable();
        pids
    }

    /// What a resize grants, or its errno.
    fn grant(&self, name: usize, count: Option<u32>) -> Result<Own, Errno> {
        let own = *self.partitions.get(&name).ok_or(Errno::NOENT)?;
        let taken = self.partitions.values().map(|own| own.whole).sum::<u32>() - own.whole;
        let others = self.partitions.iter().filter(|(other, _)| **other != name);
        let free = Own {
            whole: GROUPS - taken,
            remainder: !others.into_iter().any(|(_, own)| own.remainder),
        };
        let granted = match count {
            None => free,
            Some(count) if count <= free.whole * WHOLE => Own {
                whole: count.div_ceil(WHOLE),
                remainder: false,
            },
            Some(count) if count <= free.sms() => free,
            Some(_) => return Err(Errno::NOSPC),
        };
        match count {
            None if granted.sms() == 0 => Err(Errno::NOSPC),
            Some(0) if !self.members(name).is_empty() => Err(Errno::INVAL),
            _ => Ok(granted),
        }
    }

    /// Whether a workload may join, or the errno.
    fn join(&self, name: Option<usize>) -> Result<(), Errno> {
        match name.map(|name| self.partitions.get(&name)) {
            None => Ok(()),
            Some(None) => Err(Errno::NOENT),
            Some(Some(own)) if own.sms() == 0 => Err(Errno::INVAL),
            Some(Some(_)) => Ok(()),
        }
    }
}

fn named(name: Option<usize>) -> &'static str {
    name.map_or("none", |name| NAMES[name])
}

fn errno(result: std::io::Result<()>) -> Result<(), Errno> {
    result.map_err(|error| Errno::from_io_error(&error).expect("an error of the kernel"))
}

/// Takes a step in both, and compares what came of it.
fn take(instance: &Instance, model: &mut Model, step: &Step) -> Result<(), TestCaseError> {
    let directory = |name: usize| instance.path(format!("partitions/0/{}", NAMES[name]));
    match *step {
        Step::Make(name) => {
            let expected = match model.partitions.entry(name) {
                Entry::Occupied(_) => Err(Errno::EXIST),
                Entry::Vacant(free) => {
                    free.insert(Own::default());
                    Ok(())
                }
            };
            prop_assert_eq!(errno(std::fs::create_dir(directory(name))), expected);
        }
        Step::Remove(name) => {
            let expected = if !model.partitions.contains_key(&name) {
                Err(Errno::NOENT)
            } else if model.members(name).is_empty() {
                model.partitions.remove(&name);
                Ok(())
            } else {
                Err(Errno::BUSY)
            };
            prop_assert_eq!(errno(std::fs::remove_dir(directory(name))), expected);
        }
        Step::Resize(name, count) => {
            let text = count.map_or("max".to_owned(), |count| count.to_string());
            let path = format!("partitions/0/{}/sm.count", NAMES[name]);
            let granted = model.grant(name, count);
            prop_assert_eq!(instance.write(path, text), granted.map(drop));
            if let Ok(own) = granted {
                model.partitions.insert(name, own);
            }
        }
        Step::Launch(partition) => return launch(instance, model, partition),
        Step::Move(index, to) => {
            let expected = model.join(to);
            if let Some(workload) = nth(model, index) {
                let path = workload.launched.file("compute.partition");
                prop_assert_eq!(instance.write(path, named(to)), expected);
                if expected.is_ok() {
                    workload.partition = to;
                }
            }
        }
        Step::Freeze(index, frozen) => {
            if let Some(workload) = nth(model, index) {
                let path = workload.launched.file("compute.freeze");
                prop_assert_eq!(instance.write(path, u8::from(frozen).to_string()), Ok(()));
                workload.frozen = frozen;
            }
        }
        Step::Kill(index) => {
            if !model.workloads.is_empty() {
                let index = index % model.workloads.len();
                let pid = model.workloads.remove(index).launched.pid;
                prop_assert_eq!(
                    instance.write(format!("processes/{pid}/0/gcgroup.kill"), "1"),
                    Ok(())
                );
                let gone = wait::becomes(Duration::from_secs(5), || !instance.has_entry(pid));
                prop_assert!(gone, "{pid} is still there");
            }
        }
    }
    Ok(())
}

fn nth(model: &mut Model, index: usize) -> Option<&mut Workload> {
    let count = model.workloads.len();
    (count > 0).then(|| &mut model.workloads[index % count])
}

fn launch(
    instance: &Instance,
    model: &mut Model,
    partition: Option<usize>,
) -> Result<(), TestCaseError> {
    if model.workloads.len() == MOST_WORKLOADS {
        return Ok(());
    }
    let outcome = instance.try_launch(&json!({
        "kernel": "sleep", "blocks": 1, "iterations": 50_000, "partition": named(partition)
    }));
    match (model.join(partition), outcome) {
        (Ok(()), Ok(launched)) => model.workloads.push(Workload {
            launched,
            partition,
            frozen: false,
        }),
        (Err(expected), Err(refused)) => {
            prop_assert_eq!(refused.errno, expected);
        }
        (expected, outcome) => prop_assert!(false, "expected {expected:?}, found {outcome:?}"),
    }
    Ok(())
}

/// Compares the whole tree with the model.
fn compare(instance: &Instance, model: &Model) -> Result<(), TestCaseError> {
    let names: Vec<_> = model.partitions.keys().map(|&name| NAMES[name]).collect();
    prop_assert_eq!(instance.names("partitions/0"), names);
    let mut groups = Vec::new();
    for (&name, own) in &model.partitions {
        let path = format!("partitions/0/{}", NAMES[name]);
        prop_assert_eq!(
            instance.number(format!("{path}/sm.count")),
            u64::from(own.sms())
        );
        let text = instance.text(format!("{path}/sm.groups"));
        let numbers = text
            .split_whitespace()
            .map(|word| word.parse().expect("a number"));
        let numbers: Vec<u32> = numbers.collect();
        prop_assert_eq!(numbers.contains(&GROUPS), own.remainder);
        prop_assert_eq!(
            numbers.len(),
            (own.whole + u32::from(own.remainder)) as usize
        );
        groups.extend(numbers);
        let members = instance.text(format!("{path}/members"));
        let members: Vec<u32> = members
            .lines()
            .map(|pid| pid.parse().expect("a pid"))
            .collect();
        prop_assert_eq!(members, model.members(name));
    }
    groups.sort_unstable();
    prop_assert!(
        groups.is_sorted_by(|a, b| a < b),
        "a group has two owners: {groups:?}"
    );

    let mut pids: Vec<_> = model.workloads.iter().map(|w| w.launched.pid).collect();
    pids.sort_unstable();
    let listed: String = pids.iter().map(|pid| format!("{pid}\n")).collect();
    prop_assert_eq!(
        instance.read("processes/list"),
        Ok(format!("PID\n{listed}"))
    );
    let mut links: Vec<_> = model
        .workloads
        .iter()
        .map(|w| w.launched.name.clone())
        .collect();
    links.sort();
    prop_assert_eq!(instance.names("workloads"), links);
    for workload in &model.workloads {
        let text = |name: &str| instance.text(workload.launched.file(name));
        prop_assert_eq!(text("compute.partition"), named(workload.partition));
        prop_assert_eq!(
            text("compute.freeze"),
            u8::from(workload.frozen).to_string()
        );
        let sms = match workload.partition {
            Some(name) => model.partitions[&name].sms(),
            None => GROUPS * WHOLE + REMAINDER,
        };
        let stat = workload.launched.file("gcgroup.stat");
        prop_assert_eq!(instance.figure(stat, "sm_count"), u64::from(sms));
    }
    Ok(())
}

fn seed() -> u64 {
    match std::env::var("GCGROUP_SEED") {
        Ok(text) => text.parse().expect("GCGROUP_SEED is a number"),
        Err(_) => SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| u64::from(since.subsec_nanos())),
    }
}

#[test]
fn the_tree_is_what_a_naive_model_says() {
    let seed = seed();
    // Shown where the test fails.
    println!("GCGROUP_SEED={seed}");
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let config = Config {
        cases: 8,
        // Every try starts a service, so a failure is made smaller a little only.
        max_shrink_iters: 24,
        failure_persistence: None,
        ..Config::default()
    };
    let mut runner =
        TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes));
    let walk = prop::collection::vec(step(), 80..140);
    let outcome = runner.run(&walk, |steps| {
        let instance = Instance::new();
        let mut model = Model::default();
        for step in &steps {
            take(&instance, &mut model, step)?;
            compare(&instance, &model)?;
        }
        Ok(())
    });
    if let Err(error) = outcome {
        panic!("{error}");
    }
}
