//! The trait of the workloads, and contenders in Burn's terms.

use std::any::Any;
use std::path::Path;

use anyhow::Result;
use burn::tensor::{Device, Gradients};
use burn_conv_bn::{Recompute, SavedTensor};
use burn_conv_bn_bench::protocol::{Contender, StepMemory, StepTime, Training};
use burn_conv_bn_memory::CountingAllocator;
use burn_conv_bn_models::Form;

use crate::device::{Stopwatch, is_cube};
use crate::meter::Meter;

/// The gradients of a pass, and a layer's output, which stays alive as the next layer's input would.
pub type Passed = (Gradients, Option<Box<dyn Any>>);

/// An entry in the form of one contender.
pub trait Workload {
    /// Runs forward and backward once, without dropout, and writes the results to a folder. Returns the
    /// results' names.
    fn check(&self, folder: &Path) -> Result<Vec<String>>;

    /// Runs forward, `forward_end` while the output is alive, and backward: over the data, or over a few
    /// small images to start thread pools and load code.
    fn pass(&self, is_small: bool, forward_end: &mut dyn FnMut()) -> Passed;

    /// Runs the optimizer. Returns whether there is one.
    fn optimize(&mut self, grads: Gradients) -> bool;

    /// The device, with autodiff.
    fn device(&self) -> &Device;

    /// Bytes that its layers list as kept for the backward pass, as [`StepMemory::saved`]. `None` without
    /// a list.
    fn saved(&self) -> Option<u64>;

    /// Runs one timed step.
    fn step(&mut self) -> StepTime {
        let mut watch = Stopwatch::start(self.device());
        let mut forward_ms = 0.0;
        let (grads, output) = self.pass(false, &mut || forward_ms = watch.lap());
        let backward_ms = watch.lap();
        let has_optimizer = self.optimize(grads);
        let optimizer_ms = watch.lap();
        drop(output);
        StepTime {
            forward_ms,
            backward_ms,
            optimizer_ms: has_optimizer.then_some(optimizer_ms),
        }
    }

    /// Measures forward and backward, after a small pass for one-time costs, on CubeCL's devices a full one:
    /// they compile and tune kernels for each shape. The optimizer is left out: the activations are gone by
    /// then, and its state stays.
    fn memory(&self, allocator: &'static CountingAllocator) -> StepMemory {
        drop(self.pass(!is_cube(self.device()), &mut || {}));
        let mut meter = Meter::start(self.device(), allocator);
        let passed = self.pass(false, &mut || meter.forward_end());
        let memory = meter.finish();
        drop(passed);
        memory
    }

    /// Runs training steps, and measures the most memory in use. On CubeCL's devices a step before
    /// them compiles and tunes kernels.
    fn train(&mut self, steps: usize, allocator: &'static CountingAllocator) -> Training {
        if is_cube(self.device()) {
            self.step();
        }
        let meter = Meter::start(self.device(), allocator);
        Training {
            steps: (0..steps).map(|_| self.step()).collect(),
            peak_bytes: meter.whole_peak(),
        }
    }
}

/// The form of a contender's blocks.
pub fn form(contender: Contender) -> Form {
    match contender {
        Contender::Unfused | Contender::UnfusedCheckpointed => Form::Unfused,
        _ => Form::Fused,
    }
}

/// What a contender's fused blocks recompute; [`chain_ends`] overrides it.
pub fn recompute(contender: Contender) -> Recompute {
    match contender {
        Contender::Never => Recompute::Never,
        Contender::NormConv | Contender::NormNever => Recompute::Norm,
        _ => Recompute::Conv,
    }
}

/// The recompute setting at the ends of a network's chains, if outputs inside are rebuilt.
pub fn chain_ends(contender: Contender) -> Option<Recompute> {
    match contender {
        Contender::NormConv => Some(Recompute::Conv),
        Contender::NormNever => Some(Recompute::Never),
        _ => None,
    }
}

/// Bytes of the saved tensors that are not shared: each buffer once, without parameters and images.
pub fn saved_bytes<'a>(listed: impl IntoIterator<Item = &'a SavedTensor>) -> u64 {
    let own = listed.into_iter().filter(|tensor| !tensor.shared);
    own.map(|tensor| tensor.bytes() as u64).sum()
}
