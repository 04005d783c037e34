//! Histories of gates, and a process behind one that keeps its own account.

use super::*;
use proptest::prelude::*;

const MS: Nanos = 1_000_000;

fn quota(quota_ms: u64, period_ms: u64) -> Event {
    Event::Quota(Quota {
        quota_usec: Some(quota_ms * 1000),
        period_usec: period_ms * 1000,
    })
}

fn stopped(at: Nanos) -> Event {
    let (begun, ended) = (at, at);
    Event::Stopped { begun, ended }
}

fn resumed(at: Nanos) -> Event {
    let (begun, ended) = (at, at);
    Event::Resumed { begun, ended }
}

#[test]
fn a_freeze_stops_and_a_thaw_resumes() {
    let mut gate = Gate::new();
    assert_eq!(gate.step(Event::Tick, 1), (None, None));
    let (action, _) = gate.step(Event::Freeze(true), 10);
    assert_eq!(action, Some(Action::Stop));
    assert_eq!(gate.stopped_by(), None);
    assert_eq!(gate.step(stopped(10), 10), (None, None));
    assert_eq!(gate.stopped_by(), Some(Reason::Freeze));
    assert_eq!(gate.step(Event::Freeze(true), 20), (None, None));
    assert_eq!(gate.counters(3 * MS + 10).frozen_usec, 3000);
    let (action, _) = gate.step(Event::Freeze(false), 4 * MS + 10);
    assert_eq!(action, Some(Action::Resume));
    assert_eq!(gate.step(resumed(4 * MS + 10), 4 * MS + 10), (None, None));
    let counters = gate.counters(9 * MS);
    assert_eq!((counters.frozen_usec, counters.nr_freezes), (4000, 1));
    assert_eq!(counters.nr_throttled, 0);
}

#[test]
fn a_window_closes_when_it_is_used_up_and_opens_with_the_next_period() {
    let mut gate = Gate::new();
    let at = gate.step(quota(30, 100), 0).1.expect("it closes");
    assert_eq!(at, 30 * MS);
    assert_eq!(gate.step(Event::Tick, at).0, Some(Action::Stop));
    assert_eq!(gate.step(stopped(at), at), (None, Some(100 * MS)));
    assert_eq!(gate.stopped_by(), Some(Reason::Window));
    let (action, _) = gate.step(Event::Tick, 100 * MS);
    assert_eq!(action, Some(Action::Resume));
    let after = gate.step(resumed(100 * MS), 100 * MS);
    assert_eq!(after, (None, Some(130 * MS)));
    let counters = gate.counters(100 * MS);
    assert_eq!(
        (counters.throttled_usec, counters.nr_throttled),
        (70_000, 1)
    );
    assert_eq!((counters.frozen_usec, counters.nr_freezes), (0, 0));
}

#[test]
fn what_ran_too_long_is_taken_from_the_next_period() {
    let mut gate = Gate::new();
    gate.step(quota(30, 100), 0);
    gate.step(Event::Tick, 30 * MS);
    // Stopped at 36 ms, in the middle of the call.
    let (begun, ended) = (32 * MS, 40 * MS);
    gate.step(Event::Stopped { begun, ended }, 41 * MS);
    gate.step(Event::Tick, 100 * MS);
    let (begun, ended) = (100 * MS, 104 * MS);
    let (_, deadline) = gate.step(Event::Resumed { begun, ended }, 104 * MS);
    assert_eq!(deadline, Some(126 * MS), "24 ms from 102 ms on");
}

#[test]
fn a_freeze_within_a_closed_window_needs_no_call_and_gives_no_credit() {
    let mut gate = Gate::new();
    gate.step(quota(30, 100), 0);
    gate.step(Event::Tick, 30 * MS);
    gate.step(stopped(30 * MS), 30 * MS);
    assert_eq!(gate.step(Event::Freeze(true), 40 * MS), (None, None));
    assert_eq!(gate.stopped_by(), Some(Reason::Freeze));
    let thaw = gate.step(Event::Freeze(false), 1040 * MS);
    assert_eq!(
        thaw,
        (None, Some(1100 * MS)),
        "60 ms of the period are left"
    );
    assert_eq!(gate.stopped_by(), Some(Reason::Window));
    let counters = gate.counters(1050 * MS);
    assert_eq!(
        (counters.throttled_usec, counters.nr_throttled),
        (20_000, 1)
    );
    assert_eq!((counters.frozen_usec, counters.nr_freezes), (1_000_000, 1));
}

#[test]
fn without_a_quota_the_gate_is_open() {
    let mut gate = Gate::new();
    gate.step(quota(30, 100), 0);
    gate.step(Event::Tick, 30 * MS);
    gate.step(stopped(30 * MS), 30 * MS);
    let (action, _) = gate.step(Event::Quota(Quota::default()), 40 * MS);
    assert_eq!(action, Some(Action::Resume));
    assert!(!gate.has_window());
    let after = gate.step(resumed(40 * MS), 40 * MS);
    assert_eq!(after, (None, None));
    for enough in [quota(100, 100), quota(500, 100)] {
        assert_eq!(gate.step(enough, 50 * MS), (None, None));
    }
}

#[test]
fn the_same_quota_again_begins_no_period() {
    let mut gate = Gate::new();
    gate.step(quota(30, 100), 0);
    assert_eq!(gate.step(quota(30, 100), 20 * MS), (None, Some(30 * MS)));
    assert_eq!(gate.step(quota(40, 100), 20 * MS), (None, Some(60 * MS)));
}

#[test]
fn a_failed_stop_is_put_back_and_tried_again_in_the_next_period() {
    let mut gate = Gate::new();
    gate.step(quota(60, 100), 0);
    gate.step(Event::Tick, 60 * MS);
    let (action, _) = gate.step(Event::Failed(Action::Stop), 61 * MS);
    assert_eq!(action, Some(Action::Resume));
    assert!(gate.is_unknown());
    let after = gate.step(resumed(61 * MS), 61 * MS);
    assert_eq!(after, (None, Some(100 * MS)));
    // 40 ms too many, so 20 ms are left.
    assert_eq!(gate.step(Event::Tick, 100 * MS), (None, Some(120 * MS)));
    assert_eq!(gate.step(Event::Tick, 120 * MS).0, Some(Action::Stop));
    // An order does not wait.
    gate.step(Event::Failed(Action::Stop), 121 * MS);
    let (action, _) = gate.step(Event::Freeze(true), 122 * MS);
    assert_eq!(action, Some(Action::Stop));
}

#[test]
fn a_failed_resume_is_tried_again_soon_and_the_process_counts_as_stopped() {
    let mut gate = Gate::new();
    gate.step(Event::Freeze(true), 0);
    gate.step(stopped(0), 0);
    gate.step(Event::Freeze(false), 10 * MS);
    let failed = gate.step(Event::Failed(Action::Resume), 10 * MS);
    assert_eq!(failed, (None, Some(110 * MS)));
    assert_eq!(gate.stopped_by(), Some(Reason::Freeze));
    assert_eq!(gate.step(Event::Tick, 109 * MS).0, None);
    assert_eq!(gate.step(Event::Tick, 110 * MS).0, Some(Action::Resume));
    gate.step(resumed(110 * MS), 110 * MS);
    assert_eq!(gate.counters(200 * MS).frozen_usec, 110_000);
}

#[test]
fn what_may_be_stopped_is_resumed_at_once_and_then_ever_less_often() {
    let mut gate = Gate::maybe_stopped();
    let mut now = 77 * MS;
    assert_eq!(gate.step(Event::Tick, now).0, Some(Action::Resume));
    for pause in [100, 200, 400, 800, 1600, 3200, 5000, 5000] {
        let failed = gate.step(Event::Failed(Action::Resume), now);
        assert_eq!(failed, (None, Some(now + pause * MS)));
        assert!(gate.is_unknown());
        now += pause * MS;
        assert_eq!(gate.step(Event::Tick, now).0, Some(Action::Resume));
    }
    gate.step(Event::Failed(Action::Resume), now);
    assert_eq!(gate.step(Event::Retry, now).0, Some(Action::Resume));
    let failed = gate.step(Event::Failed(Action::Resume), now);
    assert_eq!(failed, (None, Some(now + 100 * MS)));
    now += 100 * MS;
    assert_eq!(gate.step(resumed(now), now), (None, None));
    assert!(!gate.is_unknown());
    assert_eq!(gate.counters(now + MS), Counters::default());
}

#[test]
fn stops_of_a_window_that_keep_failing_are_tried_ever_less_often() {
    let mut gate = Gate::new();
    gate.step(quota(30, 100), 0);
    let mut tried = Vec::new();
    let mut now = 30 * MS;
    while now < 20_000 * MS {
        let (action, due) = gate.step(Event::Tick, now);
        let mut next = due;
        if action == Some(Action::Stop) {
            tried.push(now / MS);
            gate.step(Event::Failed(Action::Stop), now);
            next = gate.step(resumed(now), now).1;
        }
        now = next.expect("it is tried again");
    }
    assert!(tried[1] - tried[0] <= 200, "the next period: {tried:?}");
    assert!(tried.len() <= 12, "{tried:?}");
    gate.step(Event::Retry, now);
    assert_eq!(gate.step(Event::Tick, now).0, Some(Action::Stop));
}

/// A process behind a gate, with its own account of when it ran.
struct Naive {
    gate: Gate,
    now: Nanos,
    stopped: bool,
    frozen: bool,
    ran: Nanos,
    frozen_for: Nanos,
    /// Lengths of calls and delays, over and over.
    costs: Vec<Nanos>,
    next_cost: usize,
}

impl Naive {
    fn new(costs: Vec<Nanos>) -> Self {
        Self {
            gate: Gate::new(),
            now: 0,
            stopped: false,
            frozen: false,
            ran: 0,
            frozen_for: 0,
            costs,
            next_cost: 0,
        }
    }

    fn cost(&mut self) -> Nanos {
        self.next_cost += 1;
        self.costs[self.next_cost % self.costs.len()]
    }

    fn pass(&mut self, length: Nanos) {
        self.now += length;
        if !self.stopped {
            self.ran += length;
        } else if self.frozen {
            self.frozen_for += length;
        }
    }

    /// Steps, does as it is told, and says when to tick next.
    fn step(&mut self, event: Event) -> Option<Nanos> {
        let (mut action, mut deadline) = self.gate.step(event, self.now);
        while let Some(now_do) = action {
            let begun = self.now;
            let half = self.cost() / 2;
            self.pass(half);
            assert!(
                !(self.frozen && self.stopped && now_do == Action::Resume),
                "it was resumed while frozen"
            );
            self.stopped = now_do == Action::Stop;
            self.pass(half);
            let ended = self.now;
            let event = match now_do {
                Action::Stop => Event::Stopped { begun, ended },
                Action::Resume => Event::Resumed { begun, ended },
            };
            (action, deadline) = self.gate.step(event, self.now);
        }
        assert!(deadline.is_none_or(|at| at > self.now), "in the past");
        assert!(self.stopped || !self.frozen, "it runs while frozen");
        assert_eq!(self.stopped, self.gate.stopped_by().is_some());
        assert!(
            !self.stopped || self.frozen || self.gate.has_window(),
            "it is stopped without a reason"
        );
        deadline
    }

    fn run_until(&mut self, end: Nanos) {
        let mut due = self.step(Event::Tick);
        while let Some(at) = due.filter(|at| *at < end) {
            let late = self.cost() / 4;
            self.pass((at + late).saturating_sub(self.now));
            due = self.step(Event::Tick);
        }
        self.pass(end.saturating_sub(self.now));
    }
}

fn share_after(quota_us: u64, period_us: u64, costs: Vec<Nanos>) -> f64 {
    let mut process = Naive::new(costs);
    process.step(Event::Quota(Quota {
        quota_usec: Some(quota_us),
        period_usec: period_us,
    }));
    process.run_until(period_us * 1000 * 300);
    process.ran as f64 / process.now as f64
}

#[test]
fn the_share_is_right_with_the_costs_of_an_h200() {
    for (quota_us, period_us) in [(30_000, 100_000), (5_000, 50_000)] {
        let costs = vec![610_000, 920_000, 370_000, 1_000_000, 50_000];
        let share = share_after(quota_us, period_us, costs);
        let wanted = quota_us as f64 / period_us as f64;
        assert!((share - wanted).abs() < 0.005, "{share} for {wanted}");
    }
}

#[test]
fn a_stop_that_lasts_too_long_is_made_up_for() {
    // Each stop lasts more than a period shall: most periods have none.
    let share = share_after(9_280, 10_000, vec![3_480_000]);
    assert!((share - 0.928).abs() < 0.005, "{share}");
}

fn costs() -> impl Strategy<Value = Vec<Nanos>> {
    proptest::collection::vec(0..4 * MS, 1..20)
}

proptest! {
    #[test]
    fn the_share_is_right_whatever_calls_cost(
        period_us in 10_000_u64..200_000,
        part in 1_u64..1000,
        costs in costs(),
    ) {
        let quota_us = (period_us * part / 1000).max(1000);
        let share = share_after(quota_us, period_us, costs);
        let wanted = quota_us as f64 / period_us as f64;
        prop_assert!((share - wanted).abs() < 0.015, "{share} for {wanted}");
    }

    #[test]
    fn freezes_between_change_neither_share_nor_rules(
        period_us in 20_000_u64..100_000,
        part in 10_u64..1000,
        costs in costs(),
        freezes in proptest::collection::vec((1_u64..3000, 1_u64..500), 10..40),
    ) {
        let mut process = Naive::new(costs);
        let quota_us = (period_us * part / 1000).max(1000);
        process.step(Event::Quota(Quota {
            quota_usec: Some(quota_us),
            period_usec: period_us,
        }));
        for (run_ms, frozen_ms) in freezes.iter().chain(&[(20_000, 1)]) {
            process.run_until(process.now + run_ms * MS);
            process.frozen = true;
            let resting = process.step(Event::Freeze(true));
            prop_assert_eq!(resting, None);
            process.pass(frozen_ms * MS);
            process.frozen = false;
            process.step(Event::Freeze(false));
        }
        let counters = process.gate.counters(process.now);
        prop_assert_eq!(counters.nr_freezes, freezes.len() as u64 + 1);
        let difference = counters.frozen_usec.abs_diff(process.frozen_for / 1000);
        prop_assert!(difference < 3000 * counters.nr_freezes, "{difference} us");
        let free = (process.now - process.frozen_for) as f64;
        let share = process.ran as f64 / free;
        let wanted = quota_us as f64 / period_us as f64;
        prop_assert!((share - wanted).abs() < 0.02, "{share} for {wanted}");
    }

    #[test]
    fn after_any_failures_an_order_comes_true(
        events in proptest::collection::vec((0_u8..5, 0_u64..150), 1..200)
    ) {
        let mut gate = Gate::new();
        let (mut now, mut frozen, mut limited) = (0, false, false);
        for (kind, by) in events {
            now += by * MS;
            let event = match kind {
                0 => { frozen = !frozen; Event::Freeze(frozen) }
                1 => { limited = true; quota(30, 100) }
                2 => { limited = false; Event::Quota(Quota::default()) }
                _ => Event::Tick,
            };
            let (mut action, mut deadline) = gate.step(event, now);
            let mut calls = 0;
            while let Some(wanted) = action {
                calls += 1;
                prop_assert!(calls < 4, "it never rests");
                let event = match (kind + calls) % 3 {
                    0 => Event::Failed(wanted),
                    _ if wanted == Action::Stop => stopped(now),
                    _ => resumed(now),
                };
                (action, deadline) = gate.step(event, now);
            }
            prop_assert!(deadline.is_none_or(|at| at > now), "in the past");
            if gate.is_unknown() {
                prop_assert!(deadline.is_some(), "nobody tries again");
            } else if frozen && deadline.is_none() {
                prop_assert_eq!(gate.stopped_by(), Some(Reason::Freeze));
            } else if !frozen && !limited {
                prop_assert_eq!(gate.stopped_by(), None);
            }
        }
    }
}
