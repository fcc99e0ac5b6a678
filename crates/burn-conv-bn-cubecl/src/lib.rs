//! CubeCL kernels for batch normalization + residual + activation around a convolution that is
//! recomputed in the backward pass: CUDA, ROCm, Metal, Vulkan, WebGPU and CubeCL's CPU runtime.
//!
//! The convolutions are Burn's own, autotuned. What is here reads and writes activations besides
//! them, each once per launch and never through a copy:
//!
//! - [`moments`]: mean and variance of each channel;
//! - [`normalize`]: norm, residual and activation, in place on the convolution's output;
//! - [`GradSums`]: the two sums over a channel that all gradients of the norm are made of;
//! - [`norm_input_grad`]: the gradient of the convolution's output, in place on the recomputed
//!   output.
//!
//! Every kernel takes every layout by its strides: channels-first, the channels-last buffers that
//! Burn's convolutions return, padded rows, slices of a batch. Arithmetic is in f32 for f16, bf16
//! and f32, and in f64 for f64. The variants of the norm differ in [`Norm`], which only the
//! launches over `channels` values see.

#![expect(
    unsafe_code,
    reason = "kernels are launched without bounds checks, which they make themselves"
)]

mod activation;
mod backward;
mod element;
mod fold;
mod forward;
mod norm;
mod walk;

pub use activation::{Activation, Slope};
pub use backward::{GradSums, NormInputGrad, PreActivation, norm_input_grad};
pub use element::accumulator_dtype;
pub use forward::{moments, normalize};
pub use norm::{Affine, AffineGrads, ChannelTable, Moments, Norm, channel_table};

use burn_cubecl::tensor::CubeTensor;

/// Batch times spatial size of `[batch, channels, spatial..]`.
pub(crate) fn values_per_channel(tensor: &CubeTensor) -> usize {
    let shape = tensor.meta.shape();
    shape
        .iter()
        .enumerate()
        .filter(|(axis, _)| *axis != 1)
        .map(|(_, size)| size)
        .product()
}
