//! The model, driven by a clock in the test's hand.

use gcgroup_kernels::catalogue;
use gcgroup_kernels::engine::{EngineError, Form, Placement, Plan};
use gcgroup_model::spec::WorkloadSpec;

use super::{ContextId, Ended, Notice, World};
use crate::shape::{CONTEXT_BYTES, MEMORY_BYTES, PAGE_BYTES, splitmix};
use crate::wire::Launch::Kernel;

mod channels;

const GIB: u64 = 1 << 30;
const SECOND: u64 = 1_000_000_000;
/// Units that no test waits for the end of.
const ENDLESS: u64 = 1 << 40;

fn world() -> World {
    World::new(1, 7, 60.0, 0)
}

fn plan(kernel: &str) -> Plan {
    catalogue::plan(&mut WorkloadSpec::of_kernel(kernel), 132).expect("defaults are allowed")
}

/// A context with a prepared kernel on some groups.
fn worker(
    world: &mut World,
    token: Option<&str>,
    plan: &Plan,
    groups: std::ops::Range<u32>,
) -> ContextId {
    let id = world.open(0, 1, token).expect("there is room");
    world.prepare(id, plan).expect("its buffers fit");
    let placement = Placement {
        groups: Some(groups.collect()),
        stream_priority: 0,
    };
    world.place(id, &placement).expect("nothing is in flight");
    id
}

fn mps(world: &mut World) -> String {
    world.start_mps(0).expect("the GPU is there").1
}

fn ended(world: &mut World) -> Vec<(ContextId, Ended)> {
    let notices = world.take_notices().into_iter();
    notices
        .filter_map(|notice| match notice {
            Notice::Ended(id, ended) => Some((id, ended)),
            Notice::Broken(..) => None,
        })
        .collect()
}

/// Units that each context does in a second of endless work.
fn units_in_a_second(world: &mut World, ids: &[ContextId]) -> Vec<f64> {
    let before: Vec<_> = ids
        .iter()
        .map(|&id| world.cursor(id).expect("it lives").0)
        .collect();
    for &id in ids {
        world
            .submit(id, ENDLESS, 0, Kernel)
            .expect("it is prepared");
    }
    world.advance(world.now_ns + SECOND);
    for &id in ids {
        world.raise_stop(id).expect("it lives");
    }
    world.advance(world.now_ns + SECOND);
    for &id in ids {
        world.lower_stop(id).expect("it lives");
    }
    ids.iter()
        .zip(before)
        .map(|(&id, before)| (world.cursor(id).expect("it lives").0 - before) as f64)
        .collect()
}

fn assert_near(value: f64, expected: f64, tolerance: f64) {
    assert!(
        (value / expected - 1.0).abs() <= tolerance,
        "{value} is not {expected} within {tolerance}"
    );
}

#[test]
fn half_the_sms_are_half_the_speed() {
    let mut world = world();
    let token = mps(&mut world);
    let id = worker(&mut world, Some(&token), &plan("fma_fp32"), 0..8);
    let half = units_in_a_second(&mut world, &[id])[0];
    let all = Placement {
        groups: Some((0..16).collect()),
        stream_priority: 0,
    };
    assert_eq!(world.place(id, &all), Ok(128));
    let whole = units_in_a_second(&mut world, &[id])[0];
    assert_near(whole / half, 2.0, 1e-6);
}

#[test]
fn an_h200_does_67_tera_operations_a_second() {
    let mut world = world();
    let id = worker(&mut world, None, &plan("fma_fp32"), 0..17);
    let units = units_in_a_second(&mut world, &[id])[0];
    // Of each block's unit: 1024 threads, 4 chains, 2 operations.
    assert_near(units * 1024.0 * 4.0 * 2.0, 67e12, 0.01);
}

#[test]
fn two_on_one_partition_share_it() {
    let mut world = world();
    let token = mps(&mut world);
    let a = worker(&mut world, Some(&token), &plan("fma_fp32"), 0..8);
    let b = worker(&mut world, Some(&token), &plan("fma_fp32"), 0..8);
    let alone = units_in_a_second(&mut world, &[a])[0];
    for units in units_in_a_second(&mut world, &[a, b]) {
        assert_near(alone / units, 2.0, 1e-3);
    }
}

#[test]
fn disjoint_partitions_do_not_disturb_each_other() {
    let mut world = world();
    let token = mps(&mut world);
    let a = worker(&mut world, Some(&token), &plan("fma_fp32"), 0..8);
    let b = worker(&mut world, Some(&token), &plan("mul_fp32"), 8..16);
    let c = worker(&mut world, Some(&token), &plan("copy"), 16..17);
    let alone = units_in_a_second(&mut world, &[a])[0];
    let beside = units_in_a_second(&mut world, &[a, b, c])[0];
    assert_near(beside, alone, 1e-9);
}

#[test]
fn copies_share_the_bandwidth_of_the_device() {
    let mut world = world();
    let token = mps(&mut world);
    let copy = Plan {
        bytes: 8 * GIB,
        ..plan("copy")
    };
    let a = worker(&mut world, Some(&token), &copy, 0..8);
    let b = worker(&mut world, Some(&token), &copy, 8..17);
    let sweep = crate::cost::units_per_iteration(&copy) as f64 * f64::from(copy.blocks);
    let bytes = |units: f64| units / sweep * copy.bytes as f64;
    let alone = bytes(units_in_a_second(&mut world, &[a])[0]);
    let both = units_in_a_second(&mut world, &[a, b]);
    let (first, second) = (bytes(both[0]), bytes(both[1]));
    assert_near(first + second, 4.2e12, 1e-3);
    assert_near(first, second, 1e-3);
    assert!(alone > 1.5 * first, "{alone} alone, {first} beside another");
}

#[test]
fn contexts_without_mps_take_turns_by_their_timeslices() {
    let mut world = world();
    let a = worker(&mut world, None, &plan("fma_fp32"), 0..17);
    let b = worker(&mut world, None, &plan("fma_fp32"), 0..17);
    let alone = units_in_a_second(&mut world, &[a])[0];
    let set = world.list(1, 0, 0).expect("both are listed");
    // Priorities 4 and 8: 524288 >> p microseconds.
    world
        .set_timeslices(&set.groups[..1], 32_768)
        .expect("it lives");
    let both = units_in_a_second(&mut world, &[a, b]);
    assert_near(both[0] / both[1], 16.0, 1e-3);
    assert!(both[0] + both[1] < alone, "changing contexts costs time");
    assert_near(both[0] + both[1], alone, 0.01);
}

#[test]
fn a_partition_isolates_nothing_without_mps() {
    let mut world = world();
    let a = worker(&mut world, None, &plan("fma_fp32"), 0..8);
    let b = worker(&mut world, None, &plan("fma_fp32"), 8..16);
    let alone = units_in_a_second(&mut world, &[a])[0];
    let beside = units_in_a_second(&mut world, &[a, b])[0];
    assert_near(alone / beside, 2.0 + 2.0 * 70.0 / 2048.0, 1e-3);
}

#[test]
fn clients_of_mps_take_one_turn_together() {
    let mut world = world();
    let token = mps(&mut world);
    let a = worker(&mut world, Some(&token), &plan("fma_fp32"), 0..8);
    let b = worker(&mut world, Some(&token), &plan("fma_fp32"), 8..16);
    let other = worker(&mut world, None, &plan("fma_fp32"), 0..16);
    let units = units_in_a_second(&mut world, &[a, b, other]);
    assert_near(units[0] + units[1], units[2], 1e-3);
}

#[test]
fn a_stop_ends_a_sliced_launch_after_its_latency_and_queued_ones_at_once() {
    let mut world = world();
    let id = worker(&mut world, None, &plan("fma_fp32"), 0..17);
    for target in [ENDLESS, ENDLESS + 1, ENDLESS + 2] {
        world.submit(id, target, 0, Kernel).expect("it is prepared");
    }
    world.advance(1_000_000);
    world.raise_stop(id).expect("it lives");
    world.advance(1_059_000);
    assert_eq!(ended(&mut world), []);
    world.advance(1_061_000);
    let times: Vec<_> = ended(&mut world)
        .iter()
        .map(|(_, ended)| ended.device_us)
        .collect();
    assert_eq!(times, [1060.0, 0.0, 0.0]);
}

#[test]
fn an_uncut_launch_runs_to_its_end_whatever_the_flag_says() {
    let mut world = world();
    let uncut = Plan {
        form: Form::Uncut,
        ..plan("fma_fp32")
    };
    let id = worker(&mut world, None, &uncut, 0..17);
    world
        .submit(id, 1_000_000, 0, Kernel)
        .expect("it is prepared");
    world.raise_stop(id).expect("it lives");
    world.advance(10 * SECOND);
    let ended = ended(&mut world);
    assert_eq!(ended[0].1.units, 1_000_000 * 132);
    assert!(ended[0].1.device_us > 10_000.0);
}

#[test]
fn stops_at_any_time_lose_and_repeat_no_unit() {
    for seed in 0..20 {
        let mut state = seed;
        let mut world = world();
        let token = mps(&mut world);
        let ids = [
            worker(&mut world, Some(&token), &plan("fma_fp32"), 0..8),
            worker(&mut world, Some(&token), &plan("mul_fp64"), 4..17),
            worker(&mut world, None, &plan("copy"), 0..17),
        ];
        let blocks = u128::from(plan("fma_fp32").blocks);
        let (mut sums, mut targets) = ([0_u128; 3], [0_u64; 3]);
        for _ in 0..300 {
            let which = (splitmix(&mut state) % 3) as usize;
            match splitmix(&mut state) % 4 {
                0 => world.raise_stop(ids[which]).expect("it lives"),
                1 => world.lower_stop(ids[which]).expect("it lives"),
                _ => {
                    targets[which] += splitmix(&mut state) % 100_000;
                    world
                        .submit(ids[which], targets[which], 0, Kernel)
                        .expect("it is prepared");
                }
            }
            world.advance(world.now_ns + splitmix(&mut state) % 700_000);
            for (id, ended) in ended(&mut world) {
                let which = ids.iter().position(|&other| other == id);
                sums[which.expect("one of the three")] += ended.units;
            }
            for (&id, sum) in ids.iter().zip(sums) {
                let (cursor, _) = world.cursor(id).expect("it lives");
                assert_eq!(cursor, sum, "seed {seed}");
            }
        }
        for (&id, target) in ids.iter().zip(targets) {
            world.lower_stop(id).expect("it lives");
            world.submit(id, target, 0, Kernel).expect("it is prepared");
            world.advance(world.now_ns + 1000 * SECOND);
            let (cursor, _) = world.cursor(id).expect("it lives");
            assert_eq!(cursor, u128::from(target) * blocks, "seed {seed}");
        }
    }
}

#[test]
fn a_clock_that_is_looked_at_rarely_changes_no_figure() {
    let run = |step: u64| {
        let mut world = world();
        let token = mps(&mut world);
        let a = worker(&mut world, Some(&token), &plan("fma_fp32"), 0..8);
        let b = worker(&mut world, Some(&token), &plan("copy"), 4..12);
        for launch in 1..=50 {
            world
                .submit(a, launch * 30_000, 0, Kernel)
                .expect("it is prepared");
            world
                .submit(b, launch * 2_000, 0, Kernel)
                .expect("it is prepared");
        }
        while world.now_ns < SECOND {
            world.advance(world.now_ns + step);
        }
        ended(&mut world)
    };
    let (often, rarely) = (run(10_000), run(SECOND));
    assert_eq!(often.len(), 100);
    for ((_, one), (_, other)) in often.iter().zip(&rarely) {
        assert_eq!((one.target, one.units), (other.target, other.units));
        assert!((one.device_us - other.device_us).abs() < 0.1);
    }
}

#[test]
fn the_next_event_is_the_end_of_the_next_launch() {
    let mut world = world();
    let id = worker(&mut world, None, &plan("fma_fp32"), 0..17);
    assert_eq!(world.next_event(), None);
    world.submit(id, 30_000, 0, Kernel).expect("it is prepared");
    let end = world.next_event().expect("a launch runs");
    world.advance(end - 1000);
    assert_eq!(ended(&mut world), []);
    world.advance(end);
    assert_eq!(ended(&mut world).len(), 1);
    assert_eq!(world.next_event(), None);
}

#[test]
fn memory_runs_out_and_comes_back_with_the_end_of_its_context() {
    let mut world = world();
    let big = world.open(0, 1, None).expect("there is room");
    world.allocate(big, 140 * GIB).expect("there is room");
    let used = 140 * GIB + CONTEXT_BYTES;
    let other = world.open(0, 2, None).expect("a context still fits");
    let free = MEMORY_BYTES - used - CONTEXT_BYTES;
    assert_eq!(
        world.allocate(other, GIB),
        Err(EngineError::NoMemory {
            requested: GIB,
            free
        })
    );
    world.close(big);
    world.allocate(other, GIB + 1).expect("there is room again");
    let state = world.state(0).expect("the GPU is there");
    assert_eq!(state.memory_used, CONTEXT_BYTES + GIB + PAGE_BYTES);
}

#[test]
fn an_mps_server_takes_48_clients_and_breaks_them_when_it_is_lost() {
    let mut world = world();
    let token = mps(&mut world);
    let open = |world: &mut World| world.open(0, 1, Some(&token));
    let ids: Vec<_> = (0..48)
        .map(|_| open(&mut world).expect("48 slots"))
        .collect();
    assert!(matches!(open(&mut world), Err(EngineError::NoSlot(_))));
    world.close(ids[0]);
    open(&mut world).expect("a slot is free again");
    world.lose_mps(0);
    let broken = world.take_notices();
    assert_eq!(broken.len(), 48);
    assert!(matches!(
        world.raise_stop(ids[1]),
        Err(EngineError::Failed(_))
    ));
    assert!(matches!(open(&mut world), Err(EngineError::Failed(_))));
    let state = world.state(0).expect("the GPU is there");
    assert_eq!(state.memory_used, 0);
}

#[test]
fn a_lost_gpu_is_not_listed_and_comes_back_empty() {
    let mut world = world();
    let id = worker(&mut world, None, &plan("fma_fp32"), 0..17);
    world
        .submit(id, ENDLESS, 0, Kernel)
        .expect("it is prepared");
    world.lose_gpu(0);
    assert_eq!((world.gpus().count(), world.state(0)), (0, None));
    assert!(matches!(
        world.open(0, 1, None),
        Err(EngineError::Failed(_))
    ));
    world.restore_gpu(0);
    let state = world.state(0).expect("it is back");
    assert_eq!((state.memory_used, state.xids), (0, 1));
    assert_eq!(world.next_event(), None);
}

#[test]
fn utilisation_follows_what_runs() {
    let mut world = world();
    let id = worker(&mut world, None, &plan("fma_fp32"), 0..8);
    world
        .submit(id, ENDLESS, 0, Kernel)
        .expect("it is prepared");
    world.advance(SECOND);
    let usage = world.state(0).expect("the GPU is there").usage;
    assert_near(usage.busy, 1.0, 0.01);
    assert_near(usage.sm_active, 64.0 / 132.0, 0.01);
    world.close(id);
    world.advance(2 * SECOND);
    let usage = world.state(0).expect("the GPU is there").usage;
    assert!(usage.busy < 0.01);
}

#[test]
fn a_placement_outside_the_device_changes_nothing() {
    let mut world = world();
    let id = worker(&mut world, None, &plan("fma_fp32"), 0..17);
    for groups in [vec![17], vec![3, 3], vec![]] {
        let placement = Placement {
            groups: Some(groups),
            stream_priority: 0,
        };
        assert!(matches!(
            world.place(id, &placement),
            Err(EngineError::Unsupported(_))
        ));
    }
    let none = Placement {
        groups: None,
        stream_priority: -5,
    };
    assert_eq!(world.place(id, &none), Ok(132));
}
