//! The order of work on one process, with its deadlines.
//!
//! ```text
//!             submit            begin              finish
//!   caller ---------> waiting ---------> running ----------> replied
//!                        | deadline         | deadline
//!                        v                  v          finish
//!                    withdrawn           pending ----------> published
//!                   (ETIMEDOUT)        (ETIMEDOUT)
//! ```
//!
//! One job runs at a time. While one is pending, new jobs are refused: EBUSY,
//! and EIO once it has been pending for so long that it counts as stuck. A lane
//! knows nothing of other lanes, so one that is stuck delays nobody else.

use std::collections::VecDeque;

/// A point on the caller's monotonic clock, or a length of it: nanoseconds.
pub type Nanos = u64;

/// Names a job; chosen by the caller, unique within the lane.
pub type JobId = u64;

/// What happened to a lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A new job that shall have been done at `deadline`.
    Submit {
        /// The job.
        job: JobId,
        /// When its caller must have an answer.
        deadline: Nanos,
    },
    /// A job that puts the running one back: it comes before all that wait, and
    /// is taken even while the running one is overdue.
    SubmitNext {
        /// The job.
        job: JobId,
        /// When it must have been done.
        deadline: Nanos,
    },
    /// The running job came to its end, well or not.
    Finished {
        /// The job.
        job: JobId,
    },
    /// Time has passed.
    Tick,
}

/// What the lane's owner has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Begin this job now.
    Begin(JobId),
    /// Its deadline passed before it began: tell its caller, forget it.
    Withdraw(JobId),
    /// Its deadline passed while it ran: tell its caller; it goes on.
    Overdue(JobId),
    /// Not taken: an overdue job is still under way.
    RefuseBusy(JobId),
    /// Not taken: an overdue job has been under way for too long.
    RefuseStuck(JobId),
}

#[derive(Clone, Copy, Debug)]
struct Running {
    job: JobId,
    deadline: Nanos,
    overdue_since: Option<Nanos>,
}

/// The lane of one process.
#[derive(Debug)]
pub struct Lane {
    waiting: VecDeque<(JobId, Nanos)>,
    running: Option<Running>,
    stuck_after: Nanos,
}

impl Lane {
    /// A lane on which a job is stuck when it has been overdue for `stuck_after`.
    #[must_use]
    pub fn new(stuck_after: Nanos) -> Self {
        Self {
            waiting: VecDeque::new(),
            running: None,
            stuck_after,
        }
    }

    /// Takes an event and says what to do, and when to call with
    /// [`Event::Tick`] at the latest.
    pub fn step(&mut self, event: Event, now: Nanos) -> (Vec<Action>, Option<Nanos>) {
        let mut actions = Vec::new();
        self.expire(now, &mut actions);
        match event {
            Event::Submit { job, deadline } => self.submit(job, deadline, now, &mut actions),
            Event::SubmitNext { job, deadline } => {
                self.waiting.push_front((job, deadline));
                self.begin_next(&mut actions);
            }
            Event::Finished { job } => {
                if self.running.is_some_and(|running| running.job == job) {
                    self.running = None;
                    self.begin_next(&mut actions);
                }
            }
            Event::Tick => {}
        }
        (actions, self.next_deadline())
    }

    fn submit(&mut self, job: JobId, deadline: Nanos, now: Nanos, actions: &mut Vec<Action>) {
        match self.running.and_then(|running| running.overdue_since) {
            Some(since) if now.saturating_sub(since) >= self.stuck_after => {
                actions.push(Action::RefuseStuck(job));
            }
            Some(_) => actions.push(Action::RefuseBusy(job)),
            None => {
                self.waiting.push_back((job, deadline));
                self.begin_next(actions);
            }
        }
    }

    fn begin_next(&mut self, actions: &mut Vec<Action>) {
        if self.running.is_none()
            && let Some((job, deadline)) = self.waiting.pop_front()
        {
            self.running = Some(Running {
                job,
                deadline,
                overdue_since: None,
            });
            actions.push(Action::Begin(job));
        }
    }

    fn expire(&mut self, now: Nanos, actions: &mut Vec<Action>) {
        self.waiting.retain(|&(job, deadline)| {
            if deadline <= now {
                actions.push(Action::Withdraw(job));
            }
            deadline > now
        });
        if let Some(running) = &mut self.running
            && running.overdue_since.is_none()
            && running.deadline <= now
        {
            running.overdue_since = Some(now);
            actions.push(Action::Overdue(running.job));
        }
    }

    fn next_deadline(&self) -> Option<Nanos> {
        let running = self
            .running
            .filter(|r| r.overdue_since.is_none())
            .map(|r| r.deadline);
        self.waiting
            .iter()
            .map(|&(_, deadline)| deadline)
            .chain(running)
            .min()
    }

    /// Whether a job is under way beyond its deadline.
    #[must_use]
    pub fn is_pending(&self) -> bool {
        self.running
            .is_some_and(|running| running.overdue_since.is_some())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn submit(job: JobId, deadline: Nanos) -> Event {
        Event::Submit { job, deadline }
    }

    #[test]
    fn jobs_run_one_after_the_other() {
        let mut lane = Lane::new(60);
        assert_eq!(
            lane.step(submit(1, 10), 0),
            (vec![Action::Begin(1)], Some(10))
        );
        assert_eq!(lane.step(submit(2, 12), 1), (vec![], Some(10)));
        assert_eq!(
            lane.step(Event::Finished { job: 1 }, 2),
            (vec![Action::Begin(2)], Some(12))
        );
        assert_eq!(lane.step(Event::Finished { job: 2 }, 3), (vec![], None));
    }

    #[test]
    fn a_job_that_did_not_begin_in_time_is_withdrawn_and_never_begins() {
        let mut lane = Lane::new(60);
        lane.step(submit(1, 100), 0);
        lane.step(submit(2, 5), 0);
        assert_eq!(lane.step(Event::Tick, 5).0, [Action::Withdraw(2)]);
        assert_eq!(lane.step(Event::Finished { job: 1 }, 6).0, []);
    }

    #[test]
    fn a_job_that_outlasts_its_deadline_is_pending_then_stuck_then_done() {
        let mut lane = Lane::new(60);
        lane.step(submit(1, 5), 0);
        assert_eq!(lane.step(Event::Tick, 5).0, [Action::Overdue(1)]);
        assert!(lane.is_pending());
        assert_eq!(lane.step(submit(2, 20), 6).0, [Action::RefuseBusy(2)]);
        assert_eq!(lane.step(submit(3, 90), 65).0, [Action::RefuseStuck(3)]);
        assert_eq!(lane.step(Event::Finished { job: 1 }, 70).0, []);
        assert!(!lane.is_pending());
        assert_eq!(lane.step(submit(4, 90), 71).0, [Action::Begin(4)]);
    }

    #[test]
    fn what_puts_a_job_back_runs_right_after_it() {
        let mut lane = Lane::new(60);
        lane.step(submit(1, 5), 0);
        lane.step(submit(2, 20), 1);
        assert_eq!(lane.step(Event::Tick, 5).0, [Action::Overdue(1)]);
        let put_back = Event::SubmitNext {
            job: 3,
            deadline: 30,
        };
        assert_eq!(lane.step(put_back, 6).0, []);
        assert_eq!(
            lane.step(Event::Finished { job: 1 }, 7).0,
            [Action::Begin(3)]
        );
        assert_eq!(
            lane.step(Event::Finished { job: 3 }, 8).0,
            [Action::Begin(2)]
        );
    }

    #[test]
    fn a_job_finished_at_its_deadline_was_overdue_first() {
        let mut lane = Lane::new(60);
        lane.step(submit(1, 5), 0);
        assert_eq!(
            lane.step(Event::Finished { job: 1 }, 5).0,
            [Action::Overdue(1)]
        );
        assert!(!lane.is_pending());
    }

    proptest! {
        #[test]
        fn every_job_is_answered_once_and_in_time(
            steps in proptest::collection::vec((0_u8..3, 1_u64..20), 1..200)
        ) {
            let mut lane = Lane::new(50);
            let (mut now, mut next_job) = (0, 0);
            let mut running: Option<JobId> = None;
            let mut deadlines: HashMap<JobId, Nanos> = HashMap::new();
            let mut answers: HashMap<JobId, u32> = HashMap::new();
            for (kind, by) in steps {
                let event = match kind {
                    0 => {
                        next_job += 1;
                        deadlines.insert(next_job, now + by);
                        submit(next_job, now + by)
                    }
                    1 => match running {
                        Some(job) => Event::Finished { job },
                        None => Event::Tick,
                    },
                    _ => { now += by; Event::Tick }
                };
                let (actions, deadline) = lane.step(event, now);
                // What finishes in time is answered by its outcome.
                if let Event::Finished { job } = event {
                    if !answers.contains_key(&job) && !actions.contains(&Action::Overdue(job)) {
                        answers.insert(job, 1);
                    }
                    running = None;
                }
                for action in actions {
                    match action {
                        Action::Begin(job) => {
                            prop_assert!(running.is_none(), "two at a time");
                            prop_assert!(!answers.contains_key(&job), "began after its answer");
                            running = Some(job);
                        }
                        Action::Withdraw(job) | Action::Overdue(job)
                        | Action::RefuseBusy(job) | Action::RefuseStuck(job) => {
                            *answers.entry(job).or_default() += 1;
                        }
                    }
                }
                prop_assert!(answers.values().all(|&n| n == 1));
                prop_assert!(deadline.is_none_or(|d| d > now), "a deadline in the past");
                for (job, due) in &deadlines {
                    prop_assert!(*due > now || answers.contains_key(job), "job {} unanswered", job);
                }
            }
        }
    }
}
