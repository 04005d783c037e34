//! Which calls of the simulated host go wrong, and how.
//!
//! A fault is set for an operation and holds until it is cleared or has hit often
//! enough. Besides there is a seeded random mode. Nothing here does I/O.

use std::collections::BTreeMap;

use gcgroup_device::DeviceError;
use gcgroup_kernels::engine::EngineError;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::shape::splitmix;

/// A call that the simulated host serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Operation {
    /// A worker makes its context.
    Open,
    /// `Engine::prepare`.
    Prepare,
    /// Memory taken by a program that is no worker.
    Allocate,
    /// `Engine::place`.
    Place,
    /// `Engine::submit`; a failure shows in a later call, as with a real driver.
    Submit,
    /// `Engine::raise_stop`.
    RaiseStop,
    /// `Engine::lower_stop`.
    LowerStop,
    /// `Engine::progress`.
    Progress,
    /// `Engine::verify`.
    Verify,
    /// `Telemetry::gpus`.
    Gpus,
    /// `Telemetry::sample`.
    Sample,
    /// `Mps::start`.
    MpsStart,
    /// `MpsServer::is_alive`.
    MpsAlive,
    /// `MpsServer::stop`.
    MpsStop,
    /// `Telemetry::processes`.
    Processes,
    /// `Channels::mark`.
    Mark,
    /// `Channels::list`.
    List,
    /// `Channels::timeslices`.
    Timeslices,
    /// `Channels::set_timeslice`.
    SetTimeslice,
    /// `Channels::stop`.
    Stop,
    /// `Channels::resume`.
    Resume,
    /// `Channels::resume` of channels of which some are gone. A failure comes
    /// after the others were resumed.
    ResumeGone,
    /// `Counters::count_launches`.
    CountLaunches,
    /// `LaunchCounter::read`.
    ReadLaunches,
}

impl Operation {
    /// Whether a worker calls it; the others are the service's.
    #[must_use]
    pub fn is_workers(self) -> bool {
        matches!(
            self,
            Self::Open
                | Self::Prepare
                | Self::Allocate
                | Self::Place
                | Self::Submit
                | Self::RaiseStop
                | Self::LowerStop
                | Self::Progress
                | Self::Verify
        )
    }
}

/// Whose calls a fault is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// Every call.
    All,
    /// Calls about this GPU, by index.
    Gpu(u32),
    /// Calls of this process, or of the service about it, also where they are
    /// about others besides.
    Process(u32),
}

/// How a call fails.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Failure {
    /// A worker's call. `EngineError::Failed` breaks its context for good.
    Worker(EngineError),
    /// The service's call.
    Service(Refused),
}

/// `DeviceError` as it travels.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Refused {
    /// `DeviceError::NoDriver`.
    NoDriver(String),
    /// `DeviceError::NoGpu`.
    NoGpu(u32),
    /// `DeviceError::NoProcess`.
    NoProcess(u32),
    /// `DeviceError::NoContext`.
    NoContext(String),
    /// `DeviceError::Unsupported`.
    Unsupported(String),
    /// `DeviceError::Denied`.
    Denied(String),
    /// `DeviceError::Failed`.
    Failed(String),
}

impl From<Refused> for DeviceError {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::NoDriver(text) => Self::NoDriver(text),
            Refused::NoGpu(index) => Self::NoGpu(index),
            Refused::NoProcess(pid) => Self::NoProcess(pid),
            Refused::NoContext(text) => Self::NoContext(text),
            Refused::Unsupported(text) => Self::Unsupported(text),
            Refused::Denied(text) => Self::Denied(text),
            Refused::Failed(text) => Self::Failed(text),
        }
    }
}

/// What becomes of a call.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Effect {
    /// It fails, and nothing was done.
    Fail(Failure),
    /// It does not return until the fault is cleared; then it is done.
    Hang,
    /// It is done so many microseconds later.
    Delay {
        /// Microseconds.
        usec: u64,
    },
    /// The caller's connection ends, which takes along all that it had.
    Cut,
}

/// A fault as it is set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FaultSpec {
    /// The call that goes wrong.
    pub operation: Operation,
    /// Whose.
    pub scope: Scope,
    /// How.
    pub effect: Effect,
    /// How often; `None` is until it is cleared.
    pub hits: Option<u64>,
}

/// Faults at random.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct RandomFaults {
    /// Seed; the same sequence of calls then has the same faults.
    pub seed: u64,
    /// Probability that a call fails or is late, each half of the time.
    pub probability: f64,
}

/// Names a fault that was set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct FaultId(pub u64);

/// Why a fault cannot be set.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub(crate) enum FaultRefused {
    #[error("{0:?} fails with an error of the other side: the worker's are for its own calls")]
    OtherSide(Operation),
    #[error("a probability is from 0 to 1, not {0}")]
    Probability(String),
}

/// What befalls one call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hit {
    /// `None` for a random one, which never hangs.
    pub(crate) fault: Option<FaultId>,
    pub(crate) effect: Effect,
}

#[derive(Debug)]
struct Entry {
    spec: FaultSpec,
    seen: u64,
}

/// The faults that are set.
#[derive(Debug, Default)]
pub(crate) struct Faults {
    entries: BTreeMap<FaultId, Entry>,
    next: u64,
    random: Option<(f64, u64)>,
}

impl Faults {
    pub(crate) fn set(&mut self, spec: FaultSpec) -> Result<FaultId, FaultRefused> {
        if let Effect::Fail(failure) = &spec.effect
            && matches!(failure, Failure::Worker(_)) != spec.operation.is_workers()
        {
            return Err(FaultRefused::OtherSide(spec.operation));
        }
        self.next += 1;
        let id = FaultId(self.next);
        self.entries.insert(id, Entry { spec, seen: 0 });
        Ok(id)
    }

    pub(crate) fn clear(&mut self, id: FaultId) {
        self.entries.remove(&id);
    }

    pub(crate) fn clear_all(&mut self) {
        self.entries.clear();
        self.random = None;
    }

    pub(crate) fn is_set(&self, id: FaultId) -> bool {
        self.entries.contains_key(&id)
    }

    /// How often a fault has hit; 0 once it was cleared.
    pub(crate) fn hits(&self, id: FaultId) -> u64 {
        self.entries.get(&id).map_or(0, |entry| entry.seen)
    }

    pub(crate) fn set_random(&mut self, random: Option<RandomFaults>) -> Result<(), FaultRefused> {
        if let Some(random) = &random
            && !(0.0..=1.0).contains(&random.probability)
        {
            return Err(FaultRefused::Probability(random.probability.to_string()));
        }
        self.random = random.map(|random| (random.probability, random.seed));
        Ok(())
    }

    /// What befalls a call about a GPU, where it is known, and processes.
    pub(crate) fn strike(
        &mut self,
        operation: Operation,
        gpu: Option<u32>,
        pids: &[u32],
    ) -> Option<Hit> {
        for (&id, entry) in &mut self.entries {
            let spec = &entry.spec;
            let concerned = match spec.scope {
                Scope::All => true,
                Scope::Gpu(index) => gpu == Some(index),
                Scope::Process(number) => pids.contains(&number),
            };
            let spent = spec.hits.is_some_and(|hits| entry.seen >= hits);
            if spec.operation == operation && concerned && !spent {
                entry.seen += 1;
                return Some(Hit {
                    fault: Some(id),
                    effect: spec.effect.clone(),
                });
            }
        }
        self.strike_at_random(operation)
    }

    fn strike_at_random(&mut self, operation: Operation) -> Option<Hit> {
        let (probability, state) = self.random.as_mut()?;
        // 53 bits are what a double holds exactly.
        let drawn = (splitmix(state) >> 11) as f64 / (1_u64 << 53) as f64;
        if drawn >= *probability {
            return None;
        }
        let how = splitmix(state);
        let text = || "a fault at random".to_owned();
        let effect = if how & 1 == 0 {
            Effect::Delay {
                usec: (how >> 1) % 10_000,
            }
        } else if operation.is_workers() {
            Effect::Fail(Failure::Worker(EngineError::Failed(text())))
        } else {
            Effect::Fail(Failure::Service(Refused::Failed(text())))
        };
        Some(Hit {
            fault: None,
            effect,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hang(operation: Operation, scope: Scope, hits: Option<u64>) -> FaultSpec {
        FaultSpec {
            operation,
            scope,
            effect: Effect::Hang,
            hits,
        }
    }

    #[test]
    fn a_fault_hits_its_operation_and_scope_only() {
        let mut faults = Faults::default();
        faults
            .set(hang(Operation::Place, Scope::Process(7), None))
            .expect("a hang fits every operation");
        assert!(faults.strike(Operation::Place, Some(0), &[7]).is_some());
        assert!(faults.strike(Operation::Place, Some(0), &[6, 7]).is_some());
        assert_eq!(faults.strike(Operation::Place, Some(0), &[6, 8]), None);
        assert_eq!(faults.strike(Operation::Submit, Some(0), &[7]), None);
    }

    #[test]
    fn a_fault_is_over_after_its_hits_or_when_it_is_cleared() {
        let mut faults = Faults::default();
        let twice = faults
            .set(hang(Operation::List, Scope::All, Some(2)))
            .expect("a hang fits every operation");
        for _ in 0..2 {
            assert!(faults.strike(Operation::List, None, &[]).is_some());
        }
        assert_eq!(faults.strike(Operation::List, None, &[]), None);
        assert_eq!(faults.hits(twice), 2);
        let always = faults
            .set(hang(Operation::List, Scope::Gpu(1), None))
            .expect("a hang fits every operation");
        assert!(faults.strike(Operation::List, Some(1), &[]).is_some());
        faults.clear(always);
        assert_eq!(faults.strike(Operation::List, Some(1), &[]), None);
    }

    #[test]
    fn an_error_of_the_other_side_is_refused() {
        let mut faults = Faults::default();
        let mut spec = hang(Operation::List, Scope::All, None);
        spec.effect = Effect::Fail(Failure::Worker(EngineError::Failed(String::new())));
        assert_eq!(
            faults.set(spec),
            Err(FaultRefused::OtherSide(Operation::List))
        );
    }

    #[test]
    fn random_faults_repeat_with_their_seed_and_come_as_often_as_asked() {
        let run = |seed| {
            let mut faults = Faults::default();
            faults
                .set_random(Some(RandomFaults {
                    seed,
                    probability: 0.25,
                }))
                .expect("is a probability");
            (0..4000)
                .map(|_| faults.strike(Operation::Sample, Some(0), &[]).is_some())
                .collect::<Vec<_>>()
        };
        assert_eq!(run(1), run(1));
        assert_ne!(run(1), run(2));
        let hits = run(1).iter().filter(|hit| **hit).count();
        assert!((900..1100).contains(&hits), "{hits} of 4000");
    }
}
