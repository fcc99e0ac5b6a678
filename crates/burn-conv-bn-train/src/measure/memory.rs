//! Memory and time of a training step.

use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use burn_conv_bn_memory::{MemoryProbe, StepMemory};

/// Memory and time of one training step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StepMeasure {
    /// Memory above the level just before forward.
    pub memory: StepMemory,
    /// Time for forward and backward, without the optimizer.
    pub duration: Duration,
}
