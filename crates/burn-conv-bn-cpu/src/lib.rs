//! CPU kernels for `activation(norm(conv(x)) + residual)` and its gradients, on slices.
//!
//! The convolution is done in tiles small enough for the cache, without laying out patches: the
//! images are copied with their padding into planes, in which the values that one tap of the kernel
//! meets are the plane itself, shifted. The output is a sum of shifted planes, and whatever else is
//! to be done with a tile is done while it is there. The backward pass copies the same planes once,
//! for the recomputed output and the weight's gradient; the input's is a sum of shifted planes too.
//!
//! - [`zeros`]: a buffer for an activation.
//! - [`Geometry`]: shapes of a convolution over one to three spatial dimensions.
//! - [`conv_moments`]: the convolution, with mean and squared deviations of its channels.
//! - [`conv`]: the convolution alone.
//! - [`normalize`]: norm, residual and activation, in place.
//! - [`grad_sums`]: recomputes the convolution and sums what the norm's gradient needs.
//! - [`backward`]: recomputes it again, or takes what [`grad_sums`] kept, and makes the gradients.
//!
//! Activations are stored as `f32`, `f64`, `f16` or `bf16` ([`Element`]); what is computed and all
//! that belongs to channels is `f32` or `f64` ([`Real`]).
//!
//! All tensors are contiguous, `[batch, channels, depth, height, width]`. Beyond tiles for each
//! thread and a few copies of the weight (16/9 of it each where fewer products are used), nothing
//! is allocated here. Results do not depend on the number of threads: sums are taken over fixed
//! blocks of images, in order. What is recomputed has the bits that it had.
//!
//! Nothing here knows which variant of batch norm it serves: mean, scale and shift, and the
//! coefficients of the gradient, come per channel from the caller.

mod activation;
mod algorithm;
mod backward;
mod buffer;
mod direct;
mod element;
mod forward;
mod geometry;
mod layout;
mod minimal;
mod moments;
mod pool;
mod real;
mod shifted;
mod simd;

pub use activation::Activation;
pub use backward::{
    Backward, ConvOutput, GradSums, Gradients, InputGradCoefficients, backward, grad_sums,
};
pub use buffer::zeros;
pub use element::Element;
pub use forward::{conv, conv_moments, normalize};
pub use geometry::{Geometry, GeometryError};
pub use moments::Moments;
pub use real::Real;

/// Per-channel affine map with the mean kept apart: `scale * (z - mean) + shift`.
#[derive(Clone, Copy, Debug)]
pub struct Affine<'a, T> {
    /// `[channels_out]`.
    pub mean: &'a [T],
    /// `[channels_out]`.
    pub scale: &'a [T],
    /// `[channels_out]`.
    pub shift: &'a [T],
}
