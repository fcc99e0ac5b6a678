//! Memory of a training step: measured, never estimated.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use burn_conv_bn_memory::CountingAllocator;

/// Memory of one training step, in bytes above the level just before its forward pass.
///
/// Parameters, optimizer state and data were there before and do not count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepMemory {
    /// At the end of the forward pass: what the graph holds for backward, and the result.
    pub forward_end_bytes: usize,
    /// The most at any moment from the start of forward to the end of backward.
    pub peak_bytes: usize,
}

/// Measures [`StepMemory`] from inside a training step. Clones share the measurement.
#[derive(Clone, Default)]
pub struct MemoryProbe {
    allocator: Option<&'static CountingAllocator>,
    step: Arc<Mutex<Step>>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Step {
    level: usize,
    forward_end: usize,
}

impl MemoryProbe {
    /// Measures the host's memory through the process's global allocator.
    pub fn host(allocator: &'static CountingAllocator) -> Self {
        Self {
            allocator: Some(allocator),
            step: Arc::default(),
        }
    }

    /// Measures nothing; every figure is zero.
    pub fn off() -> Self {
        Self::default()
    }

    /// Call just before the forward pass.
    pub fn begin(&self) {
        if let Some(allocator) = self.allocator {
            self.update(|step| step.level = allocator.reset_peak());
        }
    }

    /// Call just after the forward pass, with everything that it returned still alive.
    pub fn forward_end(&self) {
        if let Some(allocator) = self.allocator {
            self.update(|step| {
                step.forward_end = allocator.current().saturating_sub(step.level);
            });
        }
    }

    /// Call just after the backward pass.
    pub fn backward_end(&self) -> StepMemory {
        let Some(allocator) = self.allocator else {
            return StepMemory::default();
        };
        let step = self.update(|_| ());
        StepMemory {
            forward_end_bytes: step.forward_end,
            peak_bytes: allocator.peak().saturating_sub(step.level),
        }
    }

    fn update(&self, change: impl FnOnce(&mut Step)) -> Step {
        // An update is two stores: a lock poisoned by a panic elsewhere guards a sound value.
        let mut step = self.step.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut step);
        *step
    }
}

impl fmt::Debug for MemoryProbe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.allocator {
            Some(_) => "MemoryProbe(host)",
            None => "MemoryProbe(off)",
        })
    }
}
