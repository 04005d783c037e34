//! Making the simulated GPU misbehave.

use gcgroup_device_sim::{Effect, Failure, FaultClient, FaultId, FaultSpec, Operation, Scope};
use gcgroup_kernels::engine::EngineError;

use crate::{Instance, Launched};

/// A call of this worker.
#[must_use]
pub fn of(workload: &Launched) -> Scope {
    Scope::Process(workload.pid)
}

/// A worker's call that this GPU cannot do; nothing is broken by it.
#[must_use]
pub fn refusal() -> Effect {
    Effect::Fail(Failure::Worker(EngineError::Unsupported(
        "a fault of the test".to_owned(),
    )))
}

/// A worker's call that breaks its context for good.
#[must_use]
pub fn breakage() -> Effect {
    Effect::Fail(Failure::Worker(EngineError::Failed(
        "a fault of the test".to_owned(),
    )))
}

impl Instance {
    /// A connection to the simulated GPU that sets faults.
    ///
    /// # Panics
    /// When it does not run.
    #[track_caller]
    #[must_use]
    pub fn faults(&self) -> FaultClient {
        FaultClient::open(&self.state().join("sim.sock")).expect("the simulated GPU runs")
    }

    /// Sets a fault that holds until it is cleared.
    ///
    /// # Panics
    /// When the simulated GPU refuses it.
    #[track_caller]
    pub fn fault(&self, operation: Operation, scope: Scope, effect: Effect) -> FaultId {
        self.fault_for(None, operation, scope, effect)
    }

    /// Sets a fault that hits once.
    ///
    /// # Panics
    /// When the simulated GPU refuses it.
    #[track_caller]
    pub fn fault_once(&self, operation: Operation, scope: Scope, effect: Effect) -> FaultId {
        self.fault_for(Some(1), operation, scope, effect)
    }

    #[track_caller]
    fn fault_for(
        &self,
        hits: Option<u64>,
        operation: Operation,
        scope: Scope,
        effect: Effect,
    ) -> FaultId {
        let spec = FaultSpec {
            operation,
            scope,
            effect,
            hits,
        };
        self.faults().set(spec).expect("the fault fits its call")
    }

    /// Clears every fault; calls that hang go on.
    ///
    /// # Panics
    /// When the simulated GPU does not run.
    #[track_caller]
    pub fn clear_faults(&self) {
        self.faults().clear_all().expect("the simulated GPU runs");
    }
}
