//! CubeCL kernels for batch normalization + residual + activation around a convolution that is
//! recomputed in the backward pass: CUDA, ROCm, Metal, Vulkan, WebGPU and CubeCL's CPU runtime.
//!
//! The convolutions are Burn's own, autotuned. What is here reads and writes activations besides
//! them, each once per launch and never through a copy:
//!
//! - [`moments`]: mean and variance of each channel;
//! - [`running_moments`]: running mean and variance after a batch;
//! - [`normalize`]: norm, residual and activation, in place on the convolution's output;
//! - [`GradSums`]: the two sums over a channel that all gradients of the norm are made of;
//! - [`norm_input_grad`]: the gradient of the convolution's output, in place on the recomputed
//!   output;
//! - [`max_pool`]: norm, activation and a max pool behind them, with one byte for each output as its argmax;
//! - [`max_pool_backward`]: the gradient of a max pool's input.
//!
//! Every kernel takes every layout by its strides: channels-first, the channels-last buffers that
//! Burn's convolutions return, padded rows, slices of a batch. Arithmetic is in f32 for f16, bf16
//! and f32, and in f64 for f64. The variants of the norm differ in [`Norm`], which only the
//! launches over `channels` values see.
//!
//! # Examples
//!
//! Tensors are Burn's on a CubeCL device. Forward, `z` being the convolution's output:
//!
#![cfg_attr(feature = "runtime", doc = "```no_run")]
#![cfg_attr(not(feature = "runtime"), doc = "```ignore")]
//! use burn_conv_bn_cubecl::{Activation, Affine, Moments, Norm, moments, normalize};
//! use burn_cubecl::tensor::CubeTensor;
//!
//! /// Batch norm as Burn's.
//! const NORM: Norm = Norm {
//!     inner_epsilon: 1e-5,
//!     outer_epsilon: 0.0,
//!     degrees_of_freedom: 0,
//! };
//!
//! /// `relu(norm(z))`, over `z` where nothing else holds it, and the statistics for the backward pass.
//! fn norm_relu(z: CubeTensor, affine: Affine) -> (CubeTensor, Moments) {
//!     let (statistics, table) = moments(&z, affine, NORM);
//!     (normalize(z, Some(&table), None, Activation::Relu), statistics)
//! }
//! ```
//!
//! Backward, `z` being recomputed:
//!
#![cfg_attr(feature = "runtime", doc = "```no_run")]
#![cfg_attr(not(feature = "runtime"), doc = "```ignore")]
//! use burn_conv_bn_cubecl::{
//!     Activation, Affine, AffineGrads, GradSums, Moments, Norm, PreActivation, channel_table,
//!     norm_input_grad,
//! };
//! use burn_cubecl::tensor::CubeTensor;
//!
//! /// The gradients of `z`, over `z`, and of the norm's parameters, over `values` values a channel.
//! fn norm_relu_backward(
//!     z: CubeTensor,
//!     output_grad: CubeTensor,
//!     statistics: &Moments,
//!     affine: Affine,
//!     norm: Norm,
//!     values: usize,
//! ) -> (CubeTensor, AffineGrads) {
//!     let table = channel_table(statistics, affine, norm, values);
//!     let value = PreActivation {
//!         output_grad,
//!         pool: None,
//!         norm_input: Some(z),
//!         residual: None,
//!         output: None,
//!         activation: Activation::Relu,
//!     };
//!     let sums = GradSums::new(&value, Some(&table));
//!     let grads = sums.finish(&table);
//!     (norm_input_grad(value, Some(&table), false).grad, grads)
//! }
//! ```
//!
//! # Features
//!
//! `cpu`, `cuda`, `metal`, `rocm`, `vulkan`, `webgpu` and `wgpu` build CubeCL's runtimes of those
//! names, and turn `runtime` on. A program that gets a runtime through Burn turns on `runtime` alone.
//!
//! None is on by default, and then there is nothing in this crate: Burn's CubeCL backend does not
//! compile without a runtime, since CubeCL's device has no default then.

#![deny(missing_docs)]
#![cfg_attr(
    not(feature = "runtime"),
    allow(
        rustdoc::broken_intra_doc_links,
        reason = "what this page names is not there"
    )
)]
#![cfg(feature = "runtime")]
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
mod pool;
mod running;
mod table;
mod walk;

pub use activation::{Activation, Parameter};
pub use backward::{GradSums, NormInputGrad, PreActivation, norm_input_grad};
pub use element::accumulator_dtype;
pub use forward::{moments, normalize};
pub use norm::Norm;
pub use pool::{MaxPooled, PoolArgmax, PoolWindow, max_pool, max_pool_backward};
pub use running::running_moments;
pub use table::{Affine, AffineGrads, ChannelTable, Moments, channel_table};

/// The code of the package's Markdown page.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
mod readme {}

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
