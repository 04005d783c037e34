//! Keepers before a driver that does what the tests say.

mod fake;
mod trouble;

use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use gcgroup_device::Search;

use self::fake::{DEFAULT_USEC, Did, Fake, Hang, Kind};
use super::*;

const MS: Duration = Duration::from_millis(1);

/// Far longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(10);

/// A keeper with everything that it tells.
struct Kept {
    keeper: Keeper,
    said: Receiver<Said>,
    jobs: u64,
}

fn gpu() -> GpuInfo {
    GpuInfo {
        index: 0,
        uuid: "GPU-0".to_owned(),
        name: "fake".to_owned(),
        memory_bytes: 1 << 30,
        refused: None,
    }
}

impl Kept {
    fn start(fake: &Arc<Fake>, pid: u32, start: Start) -> Self {
        let armed = Arc::clone(fake);
        let arm = move |set: &ChannelSet| {
            assert!(!set.channels.is_empty(), "there are hints");
            armed.note_armed(pid);
            Ok(())
        };
        Self::start_with(fake, pid, start, Box::new(arm))
    }

    fn start_with(fake: &Arc<Fake>, pid: u32, start: Start, arm: Arm) -> Self {
        let (tell, said) = channel();
        let tell = Box::new(move |said| drop(tell.send(said)));
        let host: Arc<dyn Channels> = fake.clone();
        let subject = Subject { pid, gpu: gpu() };
        let hooks = Hooks { arm, tell };
        let keeper = Keeper::start(subject, host, start, hooks).expect("threads start");
        Self {
            keeper,
            said,
            jobs: 0,
        }
    }

    /// One that has looked, and without what it did for that.
    fn settled(fake: &Arc<Fake>, pid: u32) -> Self {
        let mut kept = Self::start(fake, pid, Start::Fresh);
        kept.wait(|state| state.timeslice_usec.is_some());
        fake.forget(pid);
        kept
    }

    fn send(&mut self, order: Order) -> u64 {
        self.jobs += 1;
        self.keeper.send(self.jobs, order).expect("it takes orders");
        self.jobs
    }

    fn ask(&mut self, order: Order) -> (Result<(), DeviceError>, State) {
        let wanted = self.send(order);
        loop {
            match self.said.recv_timeout(PATIENCE).expect("it answers") {
                Said::Answer { job, result, state } => {
                    assert_eq!(job, wanted);
                    return (result, state);
                }
                Said::State(_) => {}
                Said::Ended(_) => panic!("it ended"),
            }
        }
    }

    fn succeed(&mut self, order: Order) -> State {
        let (result, state) = self.ask(order);
        assert_eq!(result, Ok(()));
        state
    }

    /// Waits until it tells such a state.
    fn wait(&mut self, is_it: impl Fn(&State) -> bool) -> State {
        let end = Instant::now() + PATIENCE;
        while Instant::now() < end {
            if let Ok(Said::State(state)) = self.said.recv_timeout(PATIENCE)
                && is_it(&state)
            {
                return state;
            }
        }
        panic!("it never told such a state");
    }

    fn let_go(&mut self) -> Result<(), DeviceError> {
        self.send(Order::LetGo);
        loop {
            match self.said.recv_timeout(PATIENCE).expect("it ends") {
                Said::Ended(result) => return result,
                Said::State(_) | Said::Answer { .. } => {}
            }
        }
    }
}

fn spawn(pid: u32) -> Arc<Fake> {
    let fake = Arc::new(Fake::default());
    fake.spawn(pid, &[10, 11, 12]);
    fake
}

fn quota(quota_ms: u64, period_ms: u64) -> Quota {
    Quota {
        quota_usec: Some(quota_ms * 1000),
        period_usec: period_ms * 1000,
    }
}

fn priority(number: u8) -> Priority {
    Priority::new(number).expect("it is one")
}

/// Waits until something is so, and returns how long that took.
fn until(is_it: impl Fn() -> bool) -> Duration {
    let begun = Instant::now();
    while !is_it() {
        assert!(begun.elapsed() < PATIENCE, "it never came true");
        std::thread::sleep(MS);
    }
    begun.elapsed()
}

/// Something that has to be quick on a machine that may be busy at times: most
/// attempts are.
fn mostly_within(limit: Duration, attempt: impl FnMut(u32) -> Duration) {
    let mut took: Vec<Duration> = (0..5).map(attempt).collect();
    took.sort();
    assert!(took[2] <= limit, "{took:?}");
}

#[test]
fn a_freeze_arms_then_stops_then_looks_again() {
    let fake = spawn(1);
    let mut kept = Kept::start(&fake, 1, Start::Fresh);
    let state = kept.wait(|_| true);
    assert_eq!(state.channel_groups, Some(1));
    assert_eq!(state.timeslice_usec, Some(DEFAULT_USEC));
    assert_eq!(fake.did(1), [Did::Listed(Search::Anew), Did::Read]);
    fake.forget(1);

    let state = kept.succeed(Order::Freeze(true));
    assert!(state.frozen && fake.is_stopped(1));
    assert_eq!(state.nr_freezes, 1);
    let stop = Did::Stopped(vec![10, 11, 12]);
    let look = Did::Listed(Search::Next);
    assert_eq!(fake.did(1), [Did::Armed, stop.clone(), look.clone()]);

    fake.forget(1);
    assert!(kept.succeed(Order::Freeze(true)).frozen);
    let state = kept.succeed(Order::Freeze(false));
    assert!(!state.frozen && !fake.is_stopped(1));
    assert!(state.frozen_usec > 0);
    let resume = Did::Resumed(vec![10, 11, 12]);
    assert_eq!(
        fake.did(1),
        [resume, look.clone()],
        "no call for what is so"
    );

    fake.forget(1);
    kept.succeed(Order::Freeze(true));
    assert_eq!(fake.did(1), [stop, look], "it is armed once");
}

#[test]
fn what_appears_behind_a_stop_is_stopped_before_the_answer() {
    let fake = spawn(1);
    let mut kept = Kept::settled(&fake, 1);
    fake.grow(1, 3);
    kept.succeed(Order::Freeze(true));
    assert!(fake.is_stopped(1));
    let stops = |did: &Did| matches!(did, Did::Stopped(_));
    assert_eq!(fake.did(1).into_iter().filter(stops).count(), 4);
    kept.succeed(Order::Freeze(false));
    assert!(fake.nothing_is_stopped(1));

    fake.grow(1, 1000);
    let (result, state) = kept.ask(Order::Freeze(true));
    let error = result.expect_err("there is always a new one").to_string();
    assert!(error.contains("faster than they are stopped"), "{error}");
    assert!(!state.frozen && fake.nothing_is_stopped(1));
}

#[test]
fn what_cannot_be_noted_is_not_stopped() {
    let fake = spawn(1);
    let refuse = Arc::new(AtomicBool::new(true));
    let (refused, armed) = (Arc::clone(&refuse), Arc::clone(&fake));
    let arm = move |_: &ChannelSet| {
        if refused.load(Ordering::SeqCst) {
            return Err(io::Error::other("the disk is full"));
        }
        armed.note_armed(1);
        Ok(())
    };
    let mut kept = Kept::start_with(&fake, 1, Start::Fresh, Box::new(arm));
    for order in [Order::Freeze(true), Order::Quota(quota(10, 50))] {
        let (result, state) = kept.ask(order);
        let error = result.expect_err("it was not noted").to_string();
        assert!(error.ends_with("the disk is full"), "{error}");
        assert!(!state.frozen && state.trouble.is_none());
    }
    std::thread::sleep(80 * MS);
    let stops = |did: &Did| matches!(did, Did::Stopped(_));
    assert!(!fake.did(1).iter().any(stops), "{:?}", fake.did(1));

    refuse.store(false, Ordering::SeqCst);
    kept.succeed(Order::Quota(quota(10, 50)));
    until(|| fake.did(1).iter().any(stops));
    kept.succeed(Order::Freeze(true));
    let did = fake.did(1);
    let arms: Vec<usize> = (0..did.len()).filter(|&at| did[at] == Did::Armed).collect();
    assert_eq!(arms.len(), 1);
    let first_stop = did.iter().position(stops).expect("it was stopped");
    assert!(arms[0] < first_stop);
}

#[test]
fn a_stop_that_names_what_is_gone_is_tried_with_what_is_there() {
    let fake = spawn(1);
    let mut kept = Kept::settled(&fake, 1);
    fake.remove_channel(1, 11);
    kept.succeed(Order::Freeze(true));
    let expected = [
        Did::Armed,
        Did::Stopped(vec![10, 11, 12]),
        Did::Listed(Search::Anew),
        Did::Stopped(vec![10, 12]),
        Did::Listed(Search::Next),
    ];
    assert_eq!(fake.did(1), expected);
    fake.forget(1);
    kept.succeed(Order::Freeze(false));
    assert_eq!(fake.did(1)[0], Did::Resumed(vec![10, 12]));
    assert!(fake.nothing_is_stopped(1));
}

#[test]
fn what_appears_while_it_is_frozen_is_stopped_within_200_ms() {
    let fake = spawn(1);
    let mut kept = Kept::settled(&fake, 1);
    kept.succeed(Order::Freeze(true));
    mostly_within(200 * MS, |attempt| {
        fake.add_channel(1, 200 + attempt);
        assert!(!fake.is_stopped(1));
        until(|| fake.is_stopped(1))
    });
    kept.succeed(Order::Freeze(false));
    assert!(fake.nothing_is_stopped(1));
}

#[test]
fn new_groups_get_the_timeslice_within_200_ms() {
    let fake = spawn(1);
    let mut kept = Kept::settled(&fake, 1);
    let state = kept.succeed(Order::Priority(priority(4)));
    assert_eq!(state.timeslice_usec, Some(32_768));
    assert_eq!(fake.slice(1, 1), 32_768);
    mostly_within(200 * MS, |attempt| {
        let group = 300 + attempt;
        fake.add_group(1, group);
        until(|| fake.slice(1, group) == 32_768)
    });
    kept.wait(|state| state.channel_groups == Some(6));
    let sets = |did: &Did| matches!(did, Did::Set(groups, _) if groups.contains(&1));
    let all = fake.did(1).into_iter().filter(sets).count();
    assert_eq!(all, 1, "the old ones are set once");

    fake.fail(1, Kind::Set, 2);
    let (result, state) = kept.ask(Order::Priority(priority(2)));
    assert!(result.is_err());
    assert_eq!(state.timeslice_usec, Some(32_768));
}

#[test]
fn after_a_restore_everything_is_applied_again() {
    let fake = spawn(1);
    let mut kept = Kept::settled(&fake, 1);
    kept.succeed(Order::Priority(priority(12)));
    kept.succeed(Order::Freeze(true));
    mostly_within(200 * MS, |attempt| {
        // Handles may by chance be what they were.
        let higher = if attempt < 3 { 0 } else { 1000 };
        fake.restore(1, higher);
        let group = 1 + higher * (attempt.max(2) - 2);
        until(|| fake.is_stopped(1) && fake.slice(1, group) == 128)
    });
    kept.succeed(Order::Freeze(false));
    assert!(fake.nothing_is_stopped(1));
}

#[test]
fn a_freeze_within_a_closed_window_stops_only_what_is_new() {
    let fake = spawn(1);
    let mut kept = Kept::settled(&fake, 1);
    kept.succeed(Order::Quota(quota(1, 1000)));
    until(|| fake.is_stopped(1));
    kept.succeed(Order::ReportEvery(10 * MS));
    kept.wait(|state| state.nr_throttled == 1 && !state.frozen);
    fake.add_channel(1, 13);
    fake.forget(1);
    let state = kept.succeed(Order::Freeze(true));
    assert!(state.frozen && fake.is_stopped(1));
    let resumes_or_stops_all = |did: &Did| match did {
        Did::Stopped(channels) => *channels != [13],
        Did::Resumed(_) => true,
        Did::Armed | Did::Listed(_) | Did::Read | Did::Set(..) => false,
    };
    let state = kept.succeed(Order::Freeze(false));
    assert!(!state.frozen && fake.is_stopped(1), "the window is closed");
    let did = fake.did(1);
    assert!(!did.iter().any(resumes_or_stops_all), "{did:?}");
    kept.succeed(Order::Quota(Quota::default()));
    assert!(fake.nothing_is_stopped(1));
}

#[test]
fn a_quota_is_the_share_of_the_time_that_it_runs() {
    let fake = Arc::new(Fake::with_cost(MS));
    for (pid, of) in [(1, quota(30, 100)), (2, quota(5, 50))] {
        fake.spawn(pid, &[10, 11]);
        let mut kept = Kept::settled(&fake, pid);
        let wanted = of.quota_usec.unwrap_or(0) as f64 / of.period_usec as f64;
        kept.succeed(Order::Quota(of));
        // A busy machine may hold the thread up for long, once.
        let shares: Vec<f64> = (0..3)
            .map(|_| {
                let (begun, ran) = (Instant::now(), fake.ran_ns(pid));
                std::thread::sleep(20 * of.period_usec as u32 * Duration::from_micros(1));
                let ran = Duration::from_nanos(fake.ran_ns(pid) - ran);
                ran.as_secs_f64() / begun.elapsed().as_secs_f64()
            })
            .collect();
        let right = |share: &f64| (share - wanted).abs() < 0.02;
        assert!(shares.iter().any(right), "{shares:?} for {wanted}");
        let state = kept.succeed(Order::ReportEvery(Duration::ZERO));
        assert!(state.nr_throttled >= 40, "{state:?}");
        assert!(state.throttled_usec > 1_000_000 && !state.frozen);
        assert_eq!(state.frozen_usec, 0);
    }
}

#[test]
fn letting_go_resumes_whatever_was_stopped() {
    for order in [Order::Freeze(true), Order::Quota(quota(1, 1000))] {
        let fake = spawn(1);
        let mut kept = Kept::settled(&fake, 1);
        kept.succeed(order);
        until(|| fake.is_stopped(1));
        assert_eq!(kept.let_go(), Ok(()));
        assert!(fake.nothing_is_stopped(1));
        assert_eq!(kept.keeper.send(9, Order::Freeze(true)), Err(Ended));
    }
    let fake = spawn(1);
    let mut kept = Kept::settled(&fake, 1);
    kept.succeed(Order::Freeze(true));
    fake.fail(1, Kind::Resume, 9);
    assert!(kept.let_go().is_err());
}

#[test]
fn let_go_counts_although_the_keeper_is_dropped_then() {
    let fake = spawn(1);
    let mut kept = Kept::settled(&fake, 1);
    kept.succeed(Order::Freeze(true));
    kept.send(Order::LetGo);
    drop(kept);
    until(|| fake.nothing_is_stopped(1));
}

#[test]
fn a_dropped_keeper_calls_nothing_any_more() {
    let fake = spawn(1);
    let mut kept = Kept::settled(&fake, 1);
    kept.succeed(Order::Freeze(true));
    // It is in a call, and orders wait behind that.
    fake.hang(1, Some(Hang::All));
    kept.send(Order::Priority(priority(3)));
    kept.send(Order::Freeze(false));
    let Kept { keeper, said, .. } = kept;
    until(|| fake.did(1).len() > 3);
    drop(keeper);
    fake.hang(1, None);
    // The thread ends with its end of this channel.
    while said.recv_timeout(PATIENCE).is_ok() {}
    assert!(fake.is_stopped(1));
    let resumes = |did: &Did| matches!(did, Did::Resumed(_));
    assert!(!fake.did(1).iter().any(resumes));
}

#[test]
fn a_keeper_that_hangs_delays_no_other() {
    let fake = spawn(1);
    fake.spawn(2, &[10]);
    let (mut hangs, mut lives) = (Kept::settled(&fake, 1), Kept::settled(&fake, 2));
    fake.hang(1, Some(Hang::All));
    let job = hangs.send(Order::Freeze(true));
    until(|| !fake.did(1).is_empty());
    for _ in 0..20 {
        lives.succeed(Order::Freeze(true));
        lives.succeed(Order::Freeze(false));
    }
    assert!(hangs.said.try_recv().is_err(), "it still hangs");
    fake.hang(1, None);
    let said = hangs.said.recv_timeout(PATIENCE).expect("it goes on");
    assert!(matches!(said, Said::Answer { job: answered, .. } if answered == job));
}

#[test]
fn it_sleeps_unless_there_is_something_to_keep_or_to_report() {
    let fake = spawn(1);
    let mut kept = Kept::settled(&fake, 1);
    std::thread::sleep(300 * MS);
    assert_eq!(fake.did(1), []);

    // A reader: it looks once a second, and tells what changed.
    kept.succeed(Order::ReportEvery(10 * MS));
    std::thread::sleep(1500 * MS);
    let did = fake.did(1);
    assert!(!did.is_empty() && did.len() <= 2, "{did:?}");
    assert!(did.iter().all(|did| *did == Did::Listed(Search::Recent)));
    assert!(kept.said.try_recv().is_err(), "nothing changed");
    fake.add_group(1, 2);
    kept.wait(|state| state.channel_groups == Some(2));

    kept.succeed(Order::Freeze(true));
    let earlier = kept.wait(|state| state.frozen).frozen_usec;
    let later = kept.wait(|state| state.frozen_usec > earlier).frozen_usec;
    assert!(later - earlier >= 7_000, "{later} after {earlier} us");

    kept.succeed(Order::ReportEvery(Duration::ZERO));
    std::thread::sleep(150 * MS);
    assert!(kept.said.try_recv().is_err(), "nobody reads");
    kept.succeed(Order::Freeze(false));
    std::thread::sleep(150 * MS);
    fake.forget(1);
    std::thread::sleep(1200 * MS);
    assert_eq!(fake.did(1), [], "nobody reads");
}

#[test]
fn a_new_context_gets_all_settings_at_once_and_nobody_is_answered() {
    let fake = spawn(1);
    let mut kept = Kept::settled(&fake, 1);
    kept.succeed(Order::Priority(priority(12)));
    kept.succeed(Order::Freeze(true));
    // It looks for itself only after this, and does not hear of the restore.
    fake.restore(1, 0);
    fake.forget(1);
    kept.send(Order::Look);
    let state = kept.succeed(Order::ReportEvery(Duration::ZERO));
    assert!(state.frozen && state.trouble.is_none());
    let anew = |did: &Did| *did == Did::Listed(Search::Anew);
    assert!(fake.did(1).iter().any(anew), "{:?}", fake.did(1));
    assert!(fake.is_stopped(1) && fake.slice(1, 1) == 128);
}
