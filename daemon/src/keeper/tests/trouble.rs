//! Keepers whose calls fail, whose process has no context, or that let go.

use super::*;

#[test]
fn a_freeze_that_fails_resumes_what_it_stopped() {
    let fake = spawn(1);
    let mut kept = Kept::settled(&fake, 1);
    fake.fail(1, Kind::Stop, 2);
    let (result, state) = kept.ask(Order::Freeze(true));
    let error = result.expect_err("both stops failed").to_string();
    assert_eq!(error, "it was told to fail");
    assert!(!state.frozen);
    assert_eq!((state.trouble, state.nr_freezes), (None, 0));
    assert!(fake.nothing_is_stopped(1));
    assert!(fake.did(1).contains(&Did::Resumed(vec![10, 11, 12])));
    assert!(kept.succeed(Order::Freeze(true)).frozen);
}

#[test]
fn a_thaw_that_fails_is_told_and_tried_until_it_runs() {
    let fake = spawn(1);
    let mut kept = Kept::settled(&fake, 1);
    kept.succeed(Order::Freeze(true));
    // With what is known, and after a look from scratch.
    fake.fail(1, Kind::Resume, 2);
    let (result, state) = kept.ask(Order::Freeze(false));
    assert!(result.is_err() && state.frozen && state.trouble.is_some());
    let state = kept.wait(|state| !state.frozen);
    assert_eq!(state.trouble, None);
    assert!(fake.nothing_is_stopped(1));
}

#[test]
fn a_window_whose_stop_fails_is_told_and_tried_in_the_next_period() {
    let fake = spawn(1);
    let mut kept = Kept::settled(&fake, 1);
    fake.fail(1, Kind::Stop, 2);
    kept.succeed(Order::Quota(quota(20, 100)));
    let state = kept.wait(|state| state.trouble.is_some());
    assert_eq!(state.trouble.as_deref(), Some("it was told to fail"));
    assert!(fake.nothing_is_stopped(1));
    let state = kept.wait(|state| state.trouble.is_none());
    assert_eq!(state.nr_throttled, 1);
}

#[test]
fn a_first_look_that_fails_is_told_and_tried_again() {
    let fake = spawn(1);
    fake.fail(1, Kind::List, 1);
    let mut kept = Kept::start(&fake, 1, Start::Fresh);
    let state = kept.wait(|_| true);
    assert_eq!(state.trouble.as_deref(), Some("it was told to fail"));
    assert_eq!(state.channel_groups, None);
    kept.wait(|state| state.trouble.is_none() && state.channel_groups == Some(1));

    let fake = spawn(1);
    fake.fail(1, Kind::List, 5);
    let mut kept = Kept::start(&fake, 1, Start::Fresh);
    until(|| fake.did(1).len() == 5);
    let times: Vec<u64> = fake.timed(1).into_iter().map(|(at, _)| at).collect();
    let pauses: Vec<u64> = times
        .windows(2)
        .map(|two| (two[1] - two[0]) / 1_000_000)
        .collect();
    for (pause, least) in pauses.iter().zip([100, 200, 400, 800]) {
        assert!(*pause >= least, "{pauses:?}");
    }
    assert!(
        kept.succeed(Order::Freeze(true)).frozen,
        "an order does not wait"
    );
}

#[test]
fn a_process_that_ended_is_named_and_leaves_nothing_to_resume() {
    let fake = spawn(1);
    let mut kept = Kept::settled(&fake, 1);
    kept.succeed(Order::Freeze(true));
    fake.end(1);
    let (result, _) = kept.ask(Order::Freeze(false));
    assert_eq!(result, Err(DeviceError::NoProcess(1)));
    assert_eq!(kept.let_go(), Ok(()));
}

#[test]
fn a_process_whose_context_went_while_it_was_frozen_is_thawed() {
    let fake = spawn(1);
    let mut kept = Kept::settled(&fake, 1);
    kept.succeed(Order::Freeze(true));
    for channel in [10, 11, 12] {
        fake.remove_channel(1, channel);
    }
    assert!(!kept.succeed(Order::Freeze(false)).frozen);
    fake.add_channel(1, 13);
    assert!(kept.succeed(Order::Freeze(true)).frozen);
    assert!(fake.is_stopped(1));
}

fn stops(did: &Did) -> bool {
    matches!(did, Did::Stopped(_))
}

#[test]
fn what_an_earlier_service_left_stopped_is_resumed_until_it_runs() {
    let fake = spawn(1);
    for channel in [10, 11, 12] {
        fake.add_stopped(1, channel);
    }
    // The first resume, and the first look; then the resume itself.
    fake.fail(1, Kind::List, 2);
    fake.fail(1, Kind::Resume, 1);
    let mut kept = Kept::start(&fake, 1, Start::MaybeStopped);
    let state = kept.wait(|_| true);
    assert_eq!(state.trouble.as_deref(), Some("it was told to fail"));
    assert!(!state.frozen && fake.is_stopped(1));
    kept.wait(|state| state.trouble.is_none());
    assert!(fake.nothing_is_stopped(1));
    let state = kept.succeed(Order::Freeze(true));
    assert_eq!((state.frozen, state.nr_freezes), (true, 1));
    assert!(!fake.did(1).contains(&Did::Armed), "it is noted already");
    kept.succeed(Order::Freeze(false));
    assert!(fake.nothing_is_stopped(1));
}

#[test]
fn a_keeper_that_lets_go_stops_nothing_any_more() {
    for dropped in [false, true] {
        let fake = spawn(1);
        let mut kept = Kept::settled(&fake, 1);
        // The freeze is in the look behind a stop that failed.
        fake.fail(1, Kind::Stop, 1);
        fake.hang(1, Some(Hang::Listings));
        kept.send(Order::Freeze(true));
        until(|| fake.did(1).contains(&Did::Listed(Search::Anew)));
        assert_eq!(fake.did(1).into_iter().filter(stops).count(), 1);
        kept.send(Order::LetGo);
        let Kept { keeper, said, .. } = kept;
        let keeper = Some(keeper).filter(|_| !dropped);
        fake.hang(1, None);
        let ended = loop {
            match said.recv_timeout(PATIENCE).expect("it ends") {
                Said::Answer { result, .. } => {
                    let error = result.expect_err("it lets go").to_string();
                    assert!(error.contains("is being let go"), "{error}");
                }
                Said::State(_) => {}
                Said::Ended(ended) => break ended,
            }
        };
        assert_eq!(ended, Ok(()));
        assert_eq!(fake.did(1).into_iter().filter(stops).count(), 1);
        assert!(fake.nothing_is_stopped(1));
        drop(keeper);
    }
}

#[test]
fn a_process_is_not_noted_any_more_when_its_keeper_lets_go() {
    let fake = spawn(1);
    fake.hang(1, Some(Hang::Listings));
    let mut kept = Kept::start(&fake, 1, Start::Fresh);
    kept.send(Order::Freeze(true));
    kept.send(Order::LetGo);
    fake.hang(1, None);
    until(|| matches!(kept.said.try_recv(), Ok(Said::Ended(Ok(())))));
    let did = fake.did(1);
    assert!(!did.iter().any(|did| stops(did) || *did == Did::Armed));
}

#[test]
fn what_stands_unseen_behind_a_resume_is_resumed_with_the_next_look() {
    let fake = spawn(1);
    let mut kept = Kept::settled(&fake, 1);
    kept.succeed(Order::Freeze(true));
    fake.add_stopped(1, 13);
    fake.fail(1, Kind::List, 1);
    let state = kept.succeed(Order::Freeze(false));
    assert!(!state.frozen);
    until(|| fake.nothing_is_stopped(1));
    std::thread::sleep(150 * MS);
    fake.forget(1);
    std::thread::sleep(250 * MS);
    assert_eq!(fake.did(1), [], "once");
}

/// A process whose channels are all gone.
fn without_context(fake: &Fake) {
    for channel in [10, 11, 12] {
        fake.remove_channel(1, channel);
    }
}

fn searches(fake: &Fake) -> usize {
    let anew = |did: &Did| *did == Did::Listed(Search::Anew);
    fake.did(1).into_iter().filter(anew).count()
}

#[test]
fn a_process_without_a_context_is_searched_ever_less_often() {
    for order in [Order::Priority(priority(4)), Order::Quota(quota(5, 20))] {
        let fake = spawn(1);
        let mut kept = Kept::settled(&fake, 1);
        kept.succeed(order);
        without_context(&fake);
        kept.wait(|state| state.trouble.as_deref() == Some("it has no channels"));
        fake.forget(1);
        std::thread::sleep(1600 * MS);
        // Four looks, and for the window half as many stops, each put back.
        assert!(searches(&fake) <= 16, "{order:?}: {:?}", fake.did(1));
        fake.add_channel(1, 20);
        fake.forget(1);
        kept.send(Order::Look);
        kept.wait(|state| state.trouble.is_none());
        if matches!(order, Order::Quota(_)) {
            until(|| fake.is_stopped(1));
        } else {
            assert_eq!(fake.slice(1, 1), 32_768);
        }
        assert!(searches(&fake) <= 2);
    }
}

#[test]
fn a_thaw_succeeds_although_nothing_can_be_listed() {
    let fake = spawn(1);
    let mut kept = Kept::settled(&fake, 1);
    kept.succeed(Order::Freeze(true));
    without_context(&fake);
    kept.wait(|state| state.trouble.is_some());
    let state = kept.succeed(Order::Freeze(false));
    assert!(!state.frozen);

    let fake = spawn(1);
    let mut kept = Kept::settled(&fake, 1);
    kept.succeed(Order::Freeze(true));
    fake.fail(1, Kind::List, 5);
    kept.wait(|state| state.trouble.is_some());
    let state = kept.succeed(Order::Freeze(false));
    assert!(!state.frozen && fake.nothing_is_stopped(1));
    kept.wait(|state| state.trouble.is_none());
    assert_eq!(kept.let_go(), Ok(()));
}

#[test]
fn a_freeze_that_could_not_be_put_back_is_told_and_resumed_later() {
    let fake = spawn(1);
    let mut kept = Kept::settled(&fake, 1);
    fake.fail(1, Kind::Stop, 2);
    fake.fail(1, Kind::Resume, 7);
    let (result, state) = kept.ask(Order::Freeze(true));
    assert!(result.is_err() && !state.frozen);
    assert_eq!(state.trouble.as_deref(), Some("it was told to fail"));
    assert!(!fake.nothing_is_stopped(1));
    let state = kept.wait(|state| state.trouble.is_none());
    assert!(!state.frozen && fake.nothing_is_stopped(1));
    assert_eq!(state.nr_freezes, 0);
}

#[test]
fn no_freeze_or_thaw_is_answered_from_memory_while_there_is_trouble() {
    let fake = spawn(1);
    let mut kept = Kept::settled(&fake, 1);
    kept.succeed(Order::Freeze(true));
    fake.fail(1, Kind::List, 2);
    kept.wait(|state| state.trouble.is_some());
    // It runs, and nobody saw.
    fake.restore(1, 0);
    fake.forget(1);
    assert!(kept.succeed(Order::Freeze(true)).frozen);
    assert!(fake.is_stopped(1));
    assert!(fake.did(1).contains(&Did::Stopped(vec![10, 11, 12])));
    kept.wait(|state| state.trouble.is_none());

    kept.succeed(Order::Freeze(false));
    kept.succeed(Order::Priority(priority(4)));
    fake.fail(1, Kind::List, 2);
    kept.wait(|state| state.trouble.is_some());
    fake.add_stopped(1, 13);
    kept.succeed(Order::Freeze(false));
    assert!(fake.nothing_is_stopped(1));
}

#[test]
fn a_freeze_that_fails_again_leaves_the_process_frozen() {
    let fake = spawn(1);
    let mut kept = Kept::settled(&fake, 1);
    kept.succeed(Order::Freeze(true));
    fake.fail(1, Kind::List, 4);
    kept.wait(|state| state.trouble.is_some());
    let (result, state) = kept.ask(Order::Freeze(true));
    assert!(result.is_err() && state.frozen && state.trouble.is_some());
    assert!(fake.is_stopped(1));
    kept.wait(|state| state.frozen && state.trouble.is_none());
}
