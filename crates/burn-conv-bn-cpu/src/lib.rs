//! CPU kernels for `activation(norm(conv(x)) + residual)` and its gradients, on slices.
//!
//! The convolution runs in tiles that fit the cache, mostly without patches (im2col): images are copied with
//! their padding into planes, and the inputs of one tap of the kernel are a shifted plane. Small images, whose
//! planes would be padding for a good part, have a plane for each tap instead. The output is a sum of planes;
//! statistics, norm and gradient of a tile are computed while it is in the cache. The backward pass copies
//! the same planes once, for the recomputed output and the weight's gradient; the input's gradient is a sum
//! of planes too. Kernels of 3x3 with enough channels use Winograd's F(2x2, 3x3), and weights that outweigh
//! the activations packed products.
//!
//! - [`Geometry`]: shapes of a convolution over one to three spatial dimensions.
//! - [`conv_moments`]: the convolution, with mean and squared deviations of each channel.
//! - [`conv()`]: the convolution alone.
//! - [`normalize`]: norm, residual and activation, in place.
//! - [`grad_sums`]: recomputes the convolution, and computes the sums of the norm's gradient.
//! - [`backward`]: recomputes the convolution again, or reads what [`grad_sums`] stored, and computes the
//!   gradients.
//! - [`ConvOutput::Gram`]: for both, products of the input in place of the convolution.
//! - [`moments`], [`normalize_into`], [`norm_grad_sums`], [`norm_input_grad`]: the norm without a convolution.
//! - [`PoolGeometry`], [`max_pool`], [`max_pool_backward`]: max pooling, with an argmax of one byte for each
//!   output.
//! - [`normalize_max_pool`], [`pooled_grad_sums`], [`OutputGrad::Pooled`]: norm and max pool as one op, with
//!   no tensor between them, nor its gradient.
//!
//! Activations are stored as `f32`, `f64`, `f16` or `bf16` ([`Element`]); arithmetic and per-channel values
//! are `f32` or `f64` ([`Real`]).
//!
//! All tensors are contiguous, `[batch, channels, depth, height, width]`. Allocations are room for results, in
//! the caller's buffers, tiles for each thread, and copies of the weight as far as they are small beside the
//! activations ([`Geometry::with_max_scratch`] bounds them). Results do not depend on the number of threads: sums
//! run over fixed blocks of images, or of bands of one, in order. A recomputed output has the bits of the first.
//!
//! The kernels are the same for all variants of batch norm: the caller passes mean, scale and shift, and the
//! coefficients of the gradient, per channel.
//!
//! A training step of `relu(norm(conv(x)))`, with only `x` saved between its two halves:
//!
//! ```
//! use burn_conv_bn_cpu::{
//!     Activation, Affine, Backward, ConvOutput, Geometry, Gradients, InputGradCoefficients,
//!     OutputGrad, backward, conv_moments, grad_sums, normalize,
//! };
//!
//! // 3x3 over 8 images of 2 channels and 10x10 pixels, to 4 channels.
//! let one = [1; 3];
//! let geometry = Geometry::new(
//!     8, [2, 4], 1, [1, 10, 10], [1, 3, 3], one, [(0, 0); 3], one,
//! )?;
//! let x: Vec<f32> = (0..8 * geometry.input_len()).map(|i| (i as f32).sin()).collect();
//! let weight: Vec<f32> = (0..geometry.weight_len()).map(|i| (i as f32).cos()).collect();
//!
//! let mut y = Vec::new();
//! let moments = conv_moments(&geometry, &x, &weight, &mut y);
//! let mean: Vec<f32> = moments.mean.iter().map(|mean| *mean as f32).collect();
//! let inv_std = |variance: f64| 1.0 / (variance + 1e-5).sqrt();
//! let inv_std: Vec<f64> = moments.variance().map(inv_std).collect();
//! let scale: Vec<f32> = inv_std.iter().map(|inv_std| *inv_std as f32).collect();
//! let affine = Affine { mean: &mean, scale: &scale, shift: &[0.0; 4] };
//! normalize(&geometry, &mut y, affine, None, Activation::Relu);
//!
//! // The gradient of the sum of the outputs: the convolution is recomputed, tile by tile, twice.
//! let pass = Backward {
//!     geometry: &geometry,
//!     input: Some(&x),
//!     weight: Some(&weight),
//!     output_grad: OutputGrad::Whole(&vec![1.0; y.len()]),
//!     affine,
//!     activation: Activation::Relu,
//!     residual: None,
//!     output: None,
//! };
//! let sums = grad_sums(&pass, ConvOutput::Recompute);
//! let values = (8 * geometry.positions()) as f64;
//! let channel = |of: &dyn Fn(usize) -> f64| -> Vec<f32> { (0..4).map(|c| of(c) as f32).collect() };
//! let slope = channel(&|c| -inv_std[c].powi(3) / values * sums.grad_deviation[c]);
//! let offset = channel(&|c| -inv_std[c] * sums.grad[c] / values);
//! let coefficients = InputGradCoefficients { scale: &scale, slope: &slope, offset: &offset };
//! let (mut input_grad, mut weight_grad) = (Vec::new(), Vec::new());
//! let gradients = Gradients {
//!     input: Some((&mut input_grad, weight.as_slice())),
//!     weight: Some(&mut weight_grad),
//!     residual: None,
//! };
//! backward(&pass, ConvOutput::Recompute, Some(coefficients), gradients);
//! assert!(weight_grad.iter().any(|grad| *grad != 0.0));
//! # Ok::<(), burn_conv_bn_cpu::GeometryError>(())
//! ```
//!
//! # Features
//!
//! - `x86-v4`: kernels for AVX-512 too, chosen at run time where the processor has it. On by default.

#![deny(missing_docs)]

mod activation;
mod blocks;
mod conv;
mod element;
mod geometry;
mod norm;
mod pool;
mod real;
mod scratch;
mod simd;

pub use activation::Activation;
#[doc(hidden)]
pub use element::Element;
#[doc(hidden)]
pub use geometry::Method;
pub use geometry::{Geometry, GeometryError};
pub use norm::affine::Affine;
pub use norm::alone::{
    NormBackward, Planes, moments, norm_grad_sums, norm_input_grad, normalize_into,
};
pub use norm::backward::{backward, grad_sums};
pub use norm::forward::{conv, conv_moments, normalize};
pub use norm::gradient::{
    Backward, ConvOutput, GradSums, Gradients, Gram, InputGradCoefficients, OutputGrad, PooledGrad,
};
pub use norm::moments::Moments;
pub use pool::backward::max_pool_backward;
pub use pool::forward::max_pool;
pub use pool::geometry::{PoolGeometry, PoolGeometryError};
pub use pool::joined::{normalize_max_pool, pooled_grad_sums};
pub use real::Real;

/// The code of the package's Markdown page.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
mod readme {}
