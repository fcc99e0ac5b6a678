//! CPU kernels for `activation(norm(conv(x)) + residual)` and its gradients, on slices.
//!
//! The convolution is done in tiles of output rows: the input's patches are laid out as the
//! columns of a matrix small enough for the cache, one matrix product makes the tile, and
//! whatever else is to be done with the tile is done while it is there. The backward pass
//! lays out the same columns once, for the recomputed output, the weight's gradient and, through
//! their transpose, the input's.
//!
//! - [`Geometry`]: shapes of a convolution over one to three spatial dimensions.
//! - [`conv_moments`]: the convolution, with mean and squared deviations of its channels.
//! - [`conv`]: the convolution alone.
//! - [`normalize`]: norm, residual and activation, in place.
//! - [`grad_sums`]: recomputes the convolution and sums what the norm's gradient needs.
//! - [`backward`]: recomputes it again, or takes what [`grad_sums`] kept, and makes the gradients.
//!
//! All tensors are contiguous, `[batch, channels, depth, height, width]`. Nothing
//! activation-sized is allocated here. Results do not depend on the number of threads: sums are
//! taken over fixed blocks of images, in order. What is recomputed has the bits that it had.
//!
//! Nothing here knows which variant of batch norm it serves: mean, scale and shift, and the
//! coefficients of the gradient, come per channel from the caller.

mod activation;
mod backward;
mod columns;
mod forward;
mod geometry;
mod matmul;
mod moments;
mod real;
mod simd;

pub use activation::Activation;
pub use backward::{
    Backward, ConvOutput, GradSums, Gradients, InputGradCoefficients, backward, grad_sums,
};
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
