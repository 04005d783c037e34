//! Control of contexts from outside: what is listed, and what stops and resumes
//! do to the work.

use gcgroup_device::{ChannelSet, Handle, Launches};
use gcgroup_kernels::engine::{EngineError, Form, Plan};

use super::*;
use crate::wire::{Kind, Launch};
use crate::world::{Gone, Missing};

/// Contexts of different processes that run the same kernel, which looks at no
/// flag.
fn programs<const N: usize>(world: &mut World) -> [ContextId; N] {
    std::array::from_fn(|place| program(world, place as u32 + 1))
}

fn program(world: &mut World, pid: u32) -> ContextId {
    let id = world.open(0, pid, None).expect("there is room");
    let uncut = Plan {
        form: Form::Uncut,
        ..plan("fma_fp32")
    };
    world.prepare(id, &uncut).expect("its buffers fit");
    id
}

fn list(world: &World, pid: u32) -> ChannelSet {
    world.list(pid, 0, 0).expect("it has a context")
}

fn stop(world: &mut World, pid: u32) {
    let channels = list(world, pid).channels;
    world.stop(0, channels).expect("all are there");
}

fn resume(world: &mut World, pid: u32) {
    let channels = list(world, pid).channels;
    world.resume(0, channels);
}

/// When a launch of so many units ends on a device of its own, nanoseconds.
fn alone(target: u64) -> u64 {
    let mut world = world();
    let id = program(&mut world, 1);
    world.submit(id, target, 0, Kernel).expect("it is prepared");
    world.next_event().expect("a launch runs")
}

/// The ends of launches until then: when, whose, and how many units.
fn ends_until(world: &mut World, until: u64) -> Vec<(u64, ContextId, u128)> {
    let mut ends = Vec::new();
    while world.now_ns < until {
        let next = world.next_event().unwrap_or(until).min(until);
        world.advance(next);
        let now = ended(world).into_iter();
        ends.extend(now.map(|(id, ended)| (next, id, ended.units)));
    }
    ends
}

fn handles(set: &ChannelSet) -> impl Iterator<Item = &Handle> {
    set.groups.iter().chain(&set.channels)
}

#[test]
fn a_fresh_context_has_twenty_channels_and_one_compute_group() {
    let mut world = world();
    program(&mut world, 5);
    let set = list(&world, 5);
    assert_eq!((set.pid, set.groups.len(), set.channels.len()), (5, 1, 20));
    let mut objects: Vec<_> = handles(&set).map(|handle| handle.object).collect();
    assert!(set.channels.is_sorted());
    objects.sort_unstable();
    objects.dedup();
    assert_eq!(objects.len(), 21, "a handle is of one object");
    assert_eq!(world.timeslices(&set.groups), Ok(vec![2048]));
    let state = &world.clients()[0];
    assert_eq!((state.groups, state.channels), (4, 20));
    assert_eq!(
        (state.disabled_channels, state.channels_stopped),
        (0, false)
    );
}

#[test]
fn a_process_is_listed_with_its_clients_on_that_gpu_above_the_mark() {
    let mut world = World::new(2, 7, 60.0, 0);
    for (gpu, pid) in [(0, 5), (1, 5), (0, 6), (0, 5)] {
        world.open(gpu, pid, None).expect("there is room");
    }
    let set = list(&world, 5);
    assert_eq!((set.groups.len(), set.channels.len()), (2, 40));
    let clients: Vec<_> = set.groups.iter().map(|group| group.client).collect();
    assert!(clients[0] < clients[1], "each client has its own handles");
    let other = world.list(5, 1, 0).expect("it has a context there too");
    assert!(handles(&other).all(|handle| !clients.contains(&handle.client)));

    let mark = world.mark();
    assert_eq!(world.list(5, 0, mark), Err(Missing::NoContext));
    world.open(0, 5, None).expect("there is room");
    let new = world.list(5, 0, mark).expect("it is younger");
    assert_eq!(new, list(&world, 5).beyond(&set));
    assert_eq!(world.list(9, 0, 0), Err(Missing::NoContext));
}

#[test]
fn a_client_of_mps_has_no_channels_to_control() {
    let mut world = world();
    let token = mps(&mut world);
    let id = world.open(0, 6, Some(&token)).expect("there is a slot");
    assert_eq!(world.list(6, 0, 0), Err(Missing::Mps));
    assert!(matches!(
        world.add_group(id),
        Err(EngineError::Unsupported(_))
    ));
    let client = world.mark();
    let foreign = Handle {
        client,
        object: 0x5c00_0013,
    };
    assert_eq!(world.stop(0, [foreign]), Err(Gone(foreign)));
    world.open(0, 6, None).expect("there is room");
    assert_eq!(list(&world, 6).channels.len(), 20, "of its own context");
}

#[test]
fn processes_are_listed_once_with_what_they_are_and_use() {
    let mut world = World::new(2, 7, 60.0, 0);
    let token = mps(&mut world);
    let two = [
        world.open(0, 5, None).expect("there is room"),
        world.open(0, 5, None).expect("there is room"),
    ];
    world.allocate(two[1], GIB).expect("there is room");
    world.open(0, 6, Some(&token)).expect("there is a slot");
    let server = world.open(0, 7, None).expect("there is room");
    world.call_server(server);
    world.open(1, 8, None).expect("there is room");
    let lines = world.processes(0);
    let kinds: Vec<_> = lines.iter().map(|line| (line.pid, line.kind)).collect();
    assert_eq!(
        kinds,
        [
            (5, Kind::Program),
            (6, Kind::MpsClient),
            (7, Kind::MpsServer)
        ]
    );
    assert_eq!(lines[0].memory_bytes, 2 * CONTEXT_BYTES + GIB);
    world.close(two[0]);
    world.close(two[1]);
    assert_eq!(world.processes(0).len(), 2);
    world.lose_gpu(0);
    assert_eq!(world.processes(0), []);
    assert_eq!(world.processes(1).len(), 1);
}

#[test]
fn a_stop_in_the_middle_of_a_kernel_keeps_the_cursor() {
    let target = 100_000;
    let whole = alone(target);
    let mut world = world();
    let [id] = programs(&mut world);
    world.submit(id, target, 0, Kernel).expect("it is prepared");
    world
        .submit(id, target + 1, 0, Kernel)
        .expect("it is prepared");
    world.advance(whole / 3);
    stop(&mut world, 1);
    assert!(world.clients()[0].channels_stopped);
    assert_eq!(world.next_event(), None, "nothing runs");
    world.advance(60 * SECOND);
    assert_eq!(ended(&mut world), []);
    // A second stop and a resume that was not asked for are harmless.
    stop(&mut world, 1);
    resume(&mut world, 1);
    resume(&mut world, 1);
    let end = 60 * SECOND + (whole - whole / 3);
    let ends = ends_until(&mut world, end + 100_000);
    let units: Vec<_> = ends.iter().map(|(_, _, units)| *units).collect();
    assert_eq!(units, [u128::from(target) * 132, 132]);
    assert!(ends[0].0.abs_diff(end) <= 10, "{} is not {end}", ends[0].0);
    assert_eq!(world.clients()[0].disabled_channels, 0);
}

#[test]
fn from_disabled_channels_nothing_begins_and_nothing_ends() {
    let mut world = world();
    let [id] = programs(&mut world);
    stop(&mut world, 1);
    // The first has nothing to do, and would end as soon as it begins.
    world.submit(id, 0, 0, Kernel).expect("it is prepared");
    world.submit(id, 1000, 0, Kernel).expect("it is prepared");
    world.advance(SECOND);
    assert_eq!(ended(&mut world), []);
    assert_eq!(world.clients()[0].in_flight, 2);
    resume(&mut world, 1);
    world.advance(2 * SECOND);
    assert_eq!(ended(&mut world).len(), 2);
}

#[test]
fn a_worker_that_is_stopped_from_outside_sees_its_flag_when_it_goes_on() {
    let mut world = world();
    let id = worker(&mut world, None, &plan("fma_fp32"), 0..17);
    world
        .submit(id, ENDLESS, 0, Kernel)
        .expect("it is prepared");
    world.advance(1_000_000);
    stop(&mut world, 1);
    world.raise_stop(id).expect("it lives");
    world.advance(SECOND);
    assert_eq!(ended(&mut world), []);
    resume(&mut world, 1);
    world.advance(SECOND + 61_000);
    assert_eq!(ended(&mut world).len(), 1);
}

#[test]
fn the_others_have_the_time_of_who_is_stopped() {
    let mut world = world();
    let [a, b, c] = programs(&mut world);
    for id in [a, b, c] {
        world
            .submit(id, ENDLESS, 0, Kernel)
            .expect("it is prepared");
    }
    // What the rates are, for nothing ends here.
    let rate_of = |world: &mut World, id| {
        world.next_event();
        world.contexts[&id].rate
    };
    let third = rate_of(&mut world, c);
    stop(&mut world, 1);
    let half = rate_of(&mut world, c);
    stop(&mut world, 2);
    let whole = rate_of(&mut world, c);
    assert_eq!(rate_of(&mut world, a), 0.0);
    let switched = |contexts: f64| contexts * (2048.0 + 70.0) / 2048.0;
    assert_near(whole / half, switched(2.0), 1e-9);
    assert_near(whole / third, switched(3.0), 1e-9);
    resume(&mut world, 1);
    resume(&mut world, 2);
    assert_eq!(rate_of(&mut world, c), third);
    let usage = world.gpus[0].usage;
    stop(&mut world, 3);
    stop(&mut world, 1);
    stop(&mut world, 2);
    world.next_event();
    assert!(usage.busy > 0.9 && world.gpus[0].usage.busy == 0.0);
}

#[test]
fn two_processes_stop_in_one_call_and_a_third_goes_on() {
    let mut world = world();
    let ids: [_; 3] = programs(&mut world);
    let both: Vec<_> = [1, 2]
        .into_iter()
        .flat_map(|pid| list(&world, pid).channels)
        .collect();
    assert_eq!(both.len(), 40);
    world.stop(0, both.clone()).expect("all are there");
    for id in ids {
        world.submit(id, 30_000, 0, Kernel).expect("it is prepared");
    }
    let ends = ends_until(&mut world, SECOND);
    assert_eq!(ends.len(), 1);
    assert_eq!(ends[0].1, ids[2]);
    world.resume(0, both);
    assert_eq!(ends_until(&mut world, 2 * SECOND).len(), 2);
}

#[test]
fn work_goes_on_in_a_group_that_was_added_after_the_stop() {
    let mut world = world();
    let [id] = programs(&mut world);
    let before = list(&world, 1);
    stop(&mut world, 1);
    world.submit(id, 30_000, 0, Kernel).expect("it is prepared");
    world.add_group(id).expect("it is no MPS client");
    let new = list(&world, 1).beyond(&before);
    assert_eq!((new.groups.len(), new.channels.len()), (1, 8));
    let state = &world.clients()[0];
    assert_eq!(
        (state.channels_stopped, state.disabled_channels),
        (false, 20)
    );
    assert_eq!(ends_until(&mut world, SECOND).len(), 1);

    // The rest of it is stopped in a second call, and it stands again.
    world.submit(id, 60_000, 0, Kernel).expect("it is prepared");
    world.stop(0, new.channels.clone()).expect("all are there");
    assert_eq!(ends_until(&mut world, 2 * SECOND), []);
    // Without that group its work is where it was before, which stands as well.
    world.remove_group(id).expect("one was added");
    assert_eq!(world.clients()[0].disabled_channels, 20);
    assert_eq!(ends_until(&mut world, 3 * SECOND), []);
    let gone = new.channels[0];
    assert_eq!(world.stop(0, [gone]), Err(Gone(gone)));
    world.resume(0, before.channels.into_iter().chain(new.channels));
    assert_eq!(ends_until(&mut world, 4 * SECOND).len(), 1);
    assert!(matches!(
        world.remove_group(id),
        Err(EngineError::Unsupported(_))
    ));
    // A handle is not used twice.
    world.add_group(id).expect("it is no MPS client");
    assert!(!list(&world, 1).channels.contains(&gone));
}

#[test]
fn work_stands_only_when_all_channels_of_its_group_are_disabled() {
    let mut world = world();
    let [id] = programs(&mut world);
    world
        .submit(id, ENDLESS, 0, Kernel)
        .expect("it is prepared");
    let channels = list(&world, 1).channels;
    world
        .stop(0, channels[1..].to_vec())
        .expect("they are there");
    assert!(world.next_event().is_some(), "one is left");
    world.stop(0, [channels[0]]).expect("it is there");
    assert_eq!(world.next_event(), None);
    world.resume(0, [channels[0]]);
    assert!(world.next_event().is_some());
    assert_eq!(world.clients()[0].disabled_channels, 19);
}

#[test]
fn a_stop_ends_at_the_first_channel_that_is_gone_and_a_resume_does_not() {
    let mut world = World::new(2, 7, 60.0, 0);
    let id = program(&mut world, 1);
    let mut channels = list(&world, 1).channels;
    let none = Handle {
        client: channels[0].client,
        object: 0x5c00_0001,
    };
    channels.insert(5, none);
    assert_eq!(world.stop(0, channels.clone()), Err(Gone(none)));
    assert_eq!(world.clients()[0].disabled_channels, 5);
    world.resume(0, channels.clone());
    assert_eq!(world.clients()[0].disabled_channels, 0);
    channels.remove(5);
    assert_eq!(world.stop(1, channels.clone()), Err(Gone(channels[0])));
    world.stop(0, channels.clone()).expect("all are there");
    world.resume(1, channels.clone());
    assert_eq!(world.clients()[0].disabled_channels, 20, "of another GPU");
    world.close(id);
    assert_eq!(world.stop(0, channels.clone()), Err(Gone(channels[0])));
    world.resume(0, channels);
}

#[test]
fn a_stopped_context_that_is_closed_leaves_nothing_behind() {
    let mut world = world();
    let other = program(&mut world, 2);
    let memory_used = |world: &World| world.state(0).expect("the GPU is there").memory_used;
    let before = memory_used(&world);
    let id = program(&mut world, 1);
    world.allocate(id, 100 * GIB).expect("there is room");
    for id in [id, other] {
        world
            .submit(id, ENDLESS, 0, Kernel)
            .expect("it is prepared");
    }
    stop(&mut world, 1);
    world.close(id);
    assert_eq!(memory_used(&world), before);
    assert_eq!(world.list(1, 0, 0), Err(Missing::NoContext));
    assert_eq!(world.clients().len(), 1);
    stop(&mut world, 2);
    world.lose_gpu(0);
    let state = &world.clients()[0];
    assert_eq!((state.channels, state.channels_stopped), (0, false));
}

#[test]
fn the_share_of_the_time_follows_the_group_that_is_launched_into() {
    let mut world = world();
    let a = worker(&mut world, None, &plan("fma_fp32"), 0..17);
    let b = world.open(0, 2, None).expect("there is room");
    world.prepare(b, &plan("fma_fp32")).expect("it fits");
    world
        .set_timeslices(&list(&world, 1).groups, 32_768)
        .expect("it lives");
    world.add_group(a).expect("it is no MPS client");
    let state = &world.clients()[0];
    assert_eq!(state.timeslice_usec, 2048, "a new group has the default");
    let both = units_in_a_second(&mut world, &[a, b]);
    assert_near(both[0] / both[1], 1.0, 1e-3);

    let groups = list(&world, 1).groups;
    assert_eq!(world.timeslices(&groups), Ok(vec![32_768, 2048]));
    world.set_timeslices(&groups[1..], 4096).expect("it lives");
    let both = units_in_a_second(&mut world, &[a, b]);
    assert_near(both[0] / both[1], 2.0, 1e-3);
    world.remove_group(a).expect("one was added");
    let both = units_in_a_second(&mut world, &[a, b]);
    assert_near(both[0] / both[1], 16.0, 1e-3);
    assert_eq!(world.timeslices(&groups), Err(Gone(groups[1])));
    assert_eq!(world.set_timeslices(&groups[1..], 1), Err(Gone(groups[1])));
}

#[test]
fn launches_of_all_contexts_are_counted_from_the_beginning_of_a_counter() {
    let mut world = world();
    let ids: [_; 2] = programs(&mut world);
    let of = |total, graphs| Launches { total, graphs };
    world.submit(ids[0], 1, 0, Kernel).expect("it is prepared");
    let first = world.counters.begin(1);
    world.submit(ids[0], 2, 0, Kernel).expect("it is prepared");
    world.submit(ids[1], 2, 0, Kernel).expect("it is prepared");
    let second = world.counters.begin(1);
    let later = program(&mut world, 1);
    world
        .submit(later, 1, 0, Launch::Graph)
        .expect("it is prepared");
    assert_eq!(world.counters.read(first), of(2, 1));
    world.close(later);
    world.close(ids[0]);
    assert_eq!(world.counters.read(first), of(2, 1), "they were launched");
    assert_eq!(world.counters.read(second), of(1, 1));
    world.counters.end(first);
    assert_eq!(world.counters.read(first), of(0, 0));
    assert_eq!(world.clients()[0].launched, 1);
}

#[test]
fn stops_and_groups_at_any_time_lose_and_repeat_no_unit() {
    for seed in 0..20 {
        let mut state = seed;
        let mut world = world();
        let ids: [_; 3] = programs(&mut world);
        let (mut sums, mut targets) = ([0_u128; 3], [0_u64; 3]);
        for _ in 0..300 {
            let which = (splitmix(&mut state) % 3) as usize;
            let pid = which as u32 + 1;
            match splitmix(&mut state) % 6 {
                0 => stop(&mut world, pid),
                1 => resume(&mut world, pid),
                2 => world.add_group(ids[which]).expect("it is no MPS client"),
                // There may be none.
                3 => drop(world.remove_group(ids[which])),
                _ => {
                    targets[which] += splitmix(&mut state) % 50_000;
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
        }
        for pid in 1..=3 {
            resume(&mut world, pid);
        }
        world.advance(world.now_ns + 1000 * SECOND);
        for (id, ended) in ended(&mut world) {
            let which = ids.iter().position(|&other| other == id);
            sums[which.expect("one of the three")] += ended.units;
        }
        for (target, sum) in targets.into_iter().zip(sums) {
            assert_eq!(sum, u128::from(target) * 132, "seed {seed}");
        }
    }
}
