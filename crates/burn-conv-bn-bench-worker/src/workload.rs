//! What the workloads share.

use std::path::Path;

use anyhow::Result;
use burn::tensor::{Device, Int, Tensor};
use burn_conv_bn::{Recompute, SavedTensor};
use burn_conv_bn_bench::protocol::{Contender, StepMemory, StepTime};
use burn_conv_bn_memory::CountingAllocator;
use burn_conv_bn_models::Form;

use crate::device::is_cube;

/// An entry in the form of one contender.
pub trait Workload {
    /// Runs forward and backward once, without dropout, and writes the results. Returns their
    /// names.
    fn check(&self, folder: &Path) -> Result<Vec<String>>;

    /// Runs one timed step.
    fn step(&mut self) -> StepTime;

    /// Where it computes.
    fn device(&self) -> &Device;

    /// A small step that starts thread pools and brings code into memory.
    fn warm_up(&self);

    /// Measures forward and backward.
    fn measure(&self, allocator: &'static CountingAllocator) -> StepMemory;

    /// Measures a step after one that pays the one-time costs. CubeCL's devices compile and tune
    /// kernels for each shape, so there it is a step of the full size.
    fn memory(&self, allocator: &'static CountingAllocator) -> StepMemory {
        if is_cube(self.device()) {
            self.measure(allocator);
        } else {
            self.warm_up();
        }
        self.measure(allocator)
    }

    /// Bytes that its layers list as kept for the backward pass, as [`StepMemory::saved`].
    fn saved(&self) -> u64;
}

/// The form of a contender's blocks.
pub fn form(contender: Contender) -> Form {
    match contender {
        Contender::Fused | Contender::Never | Contender::NormConv | Contender::NormNever => {
            Form::Fused
        }
        _ => Form::Unfused,
    }
}

/// The recompute setting of a contender's fused blocks, where [`chain_ends`] does not say otherwise.
pub fn recompute(contender: Contender) -> Recompute {
    match contender {
        Contender::Never => Recompute::Never,
        Contender::NormConv | Contender::NormNever => Recompute::Norm,
        _ => Recompute::Conv,
    }
}

/// The recompute setting at the ends of a network's chains, if those inside are rebuilt.
pub fn chain_ends(contender: Contender) -> Option<Recompute> {
    match contender {
        Contender::NormConv => Some(Recompute::Conv),
        Contender::NormNever => Some(Recompute::Never),
        _ => None,
    }
}

/// Mean of the images' negative log-likelihoods, as in `burn-conv-bn-train`.
pub fn loss(log_probabilities: Tensor<2>, targets: Tensor<1, Int>) -> Tensor<1> {
    log_probabilities
        .gather(1, targets.unsqueeze_dim::<2>(1))
        .squeeze_dim::<1>(1)
        .neg()
        .mean()
}

/// Bytes of the saved tensors that are not shared: each buffer once, without parameters and images.
pub fn saved_bytes<'a>(listed: impl IntoIterator<Item = &'a SavedTensor>) -> u64 {
    let own = listed.into_iter().filter(|tensor| !tensor.shared);
    own.map(|tensor| tensor.bytes() as u64).sum()
}
