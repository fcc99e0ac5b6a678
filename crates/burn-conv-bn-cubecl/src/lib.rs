//! CubeCL kernels for batch normalization + residual + activation around a convolution that is
//! recomputed in the backward pass: CUDA, ROCm, Metal, Vulkan, WebGPU and CubeCL's CPU runtime.
//!
//! The convolutions are Burn's own. The kernels between them read and write each activation once per
//! launch, without copies:
//!
//! - [`moments`]: mean and variance of each channel;
//! - [`moments_and_running`]: the same with running mean and variance, by the same launches;
//! - [`running_moments`]: running mean and variance after a batch, in a launch of their own;
//! - [`normalize`]: norm, residual and activation, in place on the convolution's output;
//! - [`GradSums`]: the two sums per channel that determine all gradients of the norm;
//! - [`norm_input_grad`]: the gradient of the convolution's output, in place on the recomputed
//!   output;
//! - [`max_pool`]: norm, activation and a max pool, with an argmax of one byte per output;
//! - [`max_pool_backward`]: the gradient of a max pool's input.
//!
//! Every kernel takes every layout by its strides: channels-first, the channels-last buffers that
//! Burn's convolutions return, padded rows, slices of a batch. Arithmetic is in f32 for f16, bf16
//! and f32, and in f64 for f64. The norm's variants differ in [`Norm`] alone.
//!
//! # Examples
//!
//! Tensors are Burn's on a CubeCL device. Forward, for the convolution's output `z`:
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
//! /// `relu(norm(z))`, in place if `z` is the only handle, and the statistics for the backward pass.
//! fn norm_relu(z: CubeTensor, affine: Affine) -> (CubeTensor, Moments) {
//!     let (statistics, table) = moments(&z, affine, NORM);
//!     (normalize(z, Some(&table), None, Activation::Relu), statistics)
//! }
//! ```
//!
//! Backward, for the recomputed `z`:
//!
#![cfg_attr(feature = "runtime", doc = "```no_run")]
#![cfg_attr(not(feature = "runtime"), doc = "```ignore")]
//! use burn_conv_bn_cubecl::{
//!     Activation, Affine, AffineGrads, GradSums, Moments, Norm, PreActivation, channel_table,
//!     norm_input_grad,
//! };
//! use burn_cubecl::tensor::CubeTensor;
//!
//! /// Gradients of `z`, in its buffer, and of the norm's parameters, for `values` values per channel.
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
//! None is on by default. Without a runtime this crate is empty, since Burn's CubeCL backend does not
//! compile: CubeCL's device has no default then.

#![deny(missing_docs)]
#![cfg_attr(
    not(feature = "runtime"),
    allow(
        rustdoc::broken_intra_doc_links,
        reason = "the items exist only with a runtime"
    )
)]
#![cfg(feature = "runtime")]
#![allow(
    clippy::collapsible_if,
    reason = "a kernel's condition is a `let` or an expression, not both"
)]
#![expect(
    unsafe_code,
    reason = "launches without bounds checks: kernels check bounds themselves"
)]

mod activation;
mod backward;
mod element;
mod fold;
mod forward;
mod last_cube;
mod moments;
mod norm;
mod pool;
mod pool_grad;
mod pre_activation;
mod running;
mod table;
mod walk;

pub use activation::{Activation, Parameter};
pub use backward::{GradSums, NormInputGrad, norm_input_grad};
pub use element::accumulator_dtype;
pub use forward::{moments, moments_and_running, normalize};
#[doc(hidden)]
pub use last_cube::with_last_cube;
pub use moments::Statistics;
pub use norm::Norm;
pub use pool::{MaxPooled, PoolWindow, max_pool};
pub use pool_grad::{PoolArgmax, max_pool_backward};
pub use pre_activation::PreActivation;
pub use running::{Running, running_moments};
pub use table::{Affine, AffineGrads, ChannelTable, Moments, channel_table};

/// Doc tests of the README.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
mod readme {}

use core::fmt::Display;

use burn_backend::DType;
use burn_cubecl::tensor::CubeTensor;

/// Panics unless the tensor has that many values of that dtype, as kernels rely on.
pub(crate) fn assert_values(what: impl Display, tensor: &CubeTensor, wanted: usize, dtype: DType) {
    let got = tensor.meta.num_elements();
    assert_eq!(got, wanted, "{what}: expected {wanted} values, got {got}");
    assert_dtype(what, tensor, dtype);
}

/// Panics unless the tensor has that dtype, as kernels rely on.
pub(crate) fn assert_dtype(what: impl Display, tensor: &CubeTensor, wanted: DType) {
    let got = tensor.dtype;
    assert_eq!(got, wanted, "{what}: expected {wanted:?}, got {got:?}");
}

/// Panics unless the tensor has that shape, as kernels rely on.
pub(crate) fn assert_shape(what: &str, tensor: &CubeTensor, wanted: &[usize]) {
    let got = tensor.meta.shape().to_vec();
    assert_eq!(
        got, wanted,
        "{what}: expected shape {wanted:?}, got {got:?}"
    );
}

/// Panics unless the tensor is `[batch, channels, height, width]`.
pub(crate) fn assert_is_2d(what: &str, tensor: &CubeTensor) {
    let shape = tensor.meta.shape().to_vec();
    assert_eq!(
        shape.len(),
        4,
        "{what}: expected [batch, channels, height, width], got shape {shape:?}"
    );
}

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
