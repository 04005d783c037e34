//! compute.max: GPU time allowed in each period.
//!
//! The budget is refilled at each period's start, as CFS bandwidth control
//! does; what was used beyond it (a stop takes some time, an uncut kernel as
//! long as it likes) is owed in the next period, so the average is exact.
//! Unused budget is not saved up, except the little that was left because the
//! stop came early: the time of what is in flight is only estimated, by the
//! time it has been resident, until it ends.

use gcgroup_model::value::Quota as Range;

use crate::protocol::QuotaSetting;

/// Share of the quota that may be carried over when the stop came early. The
/// estimate is wrong by microseconds; this bounds a burst if it ever is not.
const CARRY_DIVISOR: i64 = 4;

/// GPU time as known at a moment: what has ended, and since when something has
/// been resident.
#[derive(Clone, Copy, Debug)]
pub(super) struct Usage {
    /// Nanoseconds of everything that came back.
    pub(super) ended_ns: u64,
    /// Since when the GPU has been busy with what is in flight; `None` when
    /// nothing is.
    pub(super) resident_since: Option<u64>,
}

impl Usage {
    /// GPU time used until then, nanoseconds.
    fn at(&self, now: u64) -> u64 {
        let running = self
            .resident_since
            .map_or(0, |since| now.saturating_sub(since));
        self.ended_ns.saturating_add(running)
    }
}

/// The account of one quota.
#[derive(Debug)]
pub(super) struct Quota {
    setting: QuotaSetting,
    period_began: u64,
    /// Budget left in this period when `charged` had been used, nanoseconds;
    /// negative is a debt.
    left: i64,
    charged: u64,
    throttled: bool,
}

/// Quota and period in nanoseconds.
struct Bound {
    quota: i64,
    period: u64,
}

impl Quota {
    /// An account whose first period begins now.
    pub(super) fn new(setting: QuotaSetting, now: u64) -> Self {
        let mut quota = Self {
            setting,
            period_began: now,
            left: 0,
            charged: 0,
            throttled: false,
        };
        quota.restart(now, 0);
        quota
    }

    /// Begins the first period with nothing owed.
    pub(super) fn restart(&mut self, now: u64, used: u64) {
        self.period_began = now;
        self.charged = used;
        self.throttled = false;
        self.left = self.bound().map_or(0, |bound| bound.quota);
    }

    /// Puts another quota in force: its first period begins now, and a debt
    /// remains one. The present value changes nothing.
    pub(super) fn set(&mut self, setting: QuotaSetting, now: u64, usage: &Usage) {
        if setting == self.setting {
            return;
        }
        self.advance(now, usage);
        let debt = match self.bound() {
            Some(_) => self.left.min(0),
            None => 0,
        };
        self.setting = setting;
        self.restart(now, usage.at(now));
        self.left = self.left.saturating_add(debt);
        self.throttled = self.bound().is_some() && self.left <= 0;
    }

    /// Whether the quota forbids launches now, as of the last
    /// [`Quota::advance`].
    pub(super) fn throttled(&self) -> bool {
        self.throttled
    }

    /// Brings the account up to date. Returns whether a period began.
    pub(super) fn advance(&mut self, now: u64, usage: &Usage) -> bool {
        let Some(bound) = self.bound() else {
            return false;
        };
        let mut refilled = false;
        loop {
            let boundary = self.period_began.saturating_add(bound.period);
            if now < boundary {
                break;
            }
            refilled = true;
            self.charge(usage.at(boundary));
            let most = if self.throttled {
                bound.quota / CARRY_DIVISOR
            } else {
                0
            };
            self.left = bound.quota.saturating_add(self.left.min(most));
            self.throttled = self.left <= 0;
            self.period_began = boundary;
            if usage.resident_since.is_none() && !self.throttled {
                // Idle periods after this one only refill.
                let idle = (now - boundary) / bound.period;
                if idle > 0 {
                    self.period_began += idle * bound.period;
                    self.left = bound.quota;
                }
                break;
            }
        }
        self.charge(usage.at(now));
        if self.left <= 0 {
            self.throttled = true;
        }
        refilled
    }

    /// When [`Quota::advance`] is to be called next: at the end of the period,
    /// or when the budget will be used up.
    pub(super) fn deadline(&self, usage: &Usage) -> Option<u64> {
        let bound = self.bound()?;
        let boundary = self.period_began.saturating_add(bound.period);
        if self.throttled {
            return Some(boundary);
        }
        let since = usage.resident_since?;
        let left = self
            .left
            .saturating_sub(signed(usage.ended_ns, self.charged));
        Some(boundary.min(since.saturating_add_signed(left)))
    }

    /// Adds what was used since the last call. An estimate that turned out too
    /// high is given back.
    fn charge(&mut self, used: u64) {
        self.left = self.left.saturating_sub(signed(used, self.charged));
        self.charged = used;
    }

    /// The bound, where there is one: a workload cannot use more time than
    /// there is.
    fn bound(&self) -> Option<Bound> {
        let quota = self.setting.quota_usec?;
        if quota >= self.setting.period_usec {
            return None;
        }
        Some(Bound {
            quota: i64::try_from(quota).ok()?.saturating_mul(1000),
            period: self.setting.period_usec.saturating_mul(1000),
        })
    }
}

/// `a - b`, which is negative where `a` is the smaller one.
fn signed(a: u64, b: u64) -> i64 {
    a.wrapping_sub(b).cast_signed()
}

/// Whether a quota can be kept.
///
/// # Errors
/// What is wrong with it and what is allowed.
pub(super) fn check(setting: &QuotaSetting) -> Result<(), String> {
    let period = Range::PERIOD_USEC;
    if !period.contains(&setting.period_usec) {
        return Err(format!(
            "a period of {} us; {} to {}",
            setting.period_usec,
            period.start(),
            period.end()
        ));
    }
    match setting.quota_usec {
        Some(quota) if quota < Range::LEAST_USEC => Err(format!(
            "a quota of {quota} us; at least {}",
            Range::LEAST_USEC
        )),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn setting(quota_usec: u64, period_usec: u64) -> QuotaSetting {
        QuotaSetting {
            quota_usec: Some(quota_usec),
            period_usec,
        }
    }

    fn busy(ended_ns: u64, since: u64) -> Usage {
        Usage {
            ended_ns,
            resident_since: Some(since),
        }
    }

    fn idle(ended_ns: u64) -> Usage {
        Usage {
            ended_ns,
            resident_since: None,
        }
    }

    #[test]
    fn the_budget_ends_when_it_has_been_resident_for_the_quota() {
        let mut quota = Quota::new(setting(20_000, 100_000), 0);
        assert_eq!(quota.deadline(&busy(0, 0)), Some(20 * MS));
        quota.advance(20 * MS - 1, &busy(0, 0));
        assert!(!quota.throttled());
        quota.advance(20 * MS, &busy(0, 0));
        assert!(quota.throttled());
        assert_eq!(quota.deadline(&idle(20 * MS)), Some(100 * MS));
    }

    #[test]
    fn what_was_used_beyond_the_budget_is_owed_in_the_next_period() {
        let mut quota = Quota::new(setting(20_000, 100_000), 0);
        quota.advance(20 * MS, &busy(0, 0));
        assert!(quota.advance(100 * MS, &idle(21 * MS)));
        assert!(!quota.throttled());
        assert_eq!(
            quota.deadline(&busy(21 * MS, 100 * MS)),
            Some(119 * MS),
            "1 ms is owed"
        );
    }

    #[test]
    fn a_debt_of_several_periods_is_worked_off_period_by_period() {
        let mut quota = Quota::new(setting(20_000, 100_000), 0);
        quota.advance(90 * MS, &busy(0, 0));
        let mut stopped = 0;
        for period in 1..=5 {
            quota.advance(period * 100 * MS, &idle(90 * MS));
            stopped += u64::from(quota.throttled());
        }
        assert_eq!(stopped, 3, "90 ms are four and a half quotas");
    }

    #[test]
    fn unused_budget_is_not_saved_up() {
        let mut quota = Quota::new(setting(20_000, 100_000), 0);
        quota.advance(1_000_050 * MS, &idle(0));
        assert_eq!(
            quota.deadline(&busy(0, 1_000_050 * MS)),
            Some(1_000_070 * MS)
        );
    }

    #[test]
    fn a_stop_that_came_early_does_not_resume_within_the_period() {
        let mut quota = Quota::new(setting(20_000, 100_000), 0);
        quota.advance(20 * MS, &busy(0, 0));
        quota.advance(21 * MS, &idle(19 * MS));
        assert!(quota.throttled());
        quota.advance(100 * MS, &idle(19 * MS));
        assert_eq!(quota.deadline(&busy(19 * MS, 100 * MS)), Some(121 * MS));
    }

    #[test]
    fn a_change_begins_a_period_and_keeps_the_debt() {
        let mut quota = Quota::new(setting(20_000, 100_000), 0);
        quota.advance(30 * MS, &idle(30 * MS));
        quota.set(setting(20_000, 100_000), 31 * MS, &idle(30 * MS));
        assert!(quota.throttled(), "the present value changes nothing");
        quota.set(setting(50_000, 100_000), 40 * MS, &idle(30 * MS));
        assert!(!quota.throttled());
        assert_eq!(quota.deadline(&busy(30 * MS, 40 * MS)), Some(80 * MS));
        let none = QuotaSetting {
            quota_usec: None,
            period_usec: 100_000,
        };
        quota.set(none, 50 * MS, &busy(30 * MS, 40 * MS));
        assert_eq!(quota.deadline(&busy(30 * MS, 40 * MS)), None);
    }

    #[test]
    fn a_quota_of_the_whole_period_is_no_bound() {
        let mut quota = Quota::new(setting(100_000, 100_000), 0);
        quota.advance(5_000 * MS, &busy(6_000 * MS, 0));
        assert!(!quota.throttled());
    }
}
