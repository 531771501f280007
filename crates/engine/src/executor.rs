//! The engine's view of whatever computes: a CPU, a GPU, several GPUs, a simulation.

use crate::step::{Geometry, StepOutcome, StepPlan};

/// The device failed: every running sequence is lost and the engine stops.
#[derive(Debug, thiserror::Error)]
#[error("device fault in step {step}: {message}")]
pub struct DeviceFault {
    /// The step that was being submitted or collected.
    pub step: u64,
    /// What the device said.
    pub message: String,
}

/// Runs steps in the order in which they are submitted. Lives on the engine's thread.
pub trait Executor {
    /// What there is room for. Constant.
    fn geometry(&self) -> &Geometry;

    /// Whether [`Executor::submit`] returns before the step has run, so that looking one step ahead hides the
    /// host's work. Where it does not, the plain loop gives each token earlier.
    fn is_asynchronous(&self) -> bool;

    /// Takes one step. At most two submitted steps are not yet collected.
    ///
    /// # Errors
    /// The device failed; nothing may be submitted or collected any more.
    fn submit(&mut self, plan: &StepPlan) -> Result<(), DeviceFault>;

    /// Waits for the oldest step that is not yet collected and writes its outcome over `outcome`, whose
    /// allocations are reused.
    ///
    /// # Errors
    /// The device failed.
    fn collect(&mut self, outcome: &mut StepOutcome) -> Result<(), DeviceFault>;
}
