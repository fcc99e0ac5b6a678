//! The kernels of `burn-conv-bn-cpu`, compiled from the same files, on plain threads.
//!
//! Helgrind tells a data race by the order that it knows of: threads that are started and joined, and
//! the locks of pthreads. Rayon and the locks of Rust's standard library are made of atomics and
//! futexes, which it does not know. It would report whatever rayon hands from one thread to another,
//! nearly all of it where the kernels read it, and to suppress that would be to suppress the kernels'
//! own races. So two modules are others here:
//!
//! - [`prelude`], which the kernels take for rayon's: what they use of it, with threads that are
//!   started for each parallel section and joined at its end.
//! - `pool`, whose scratch is made for each task: the kernels' own hands it on under a lock.

// `use rayon::prelude::*` in the kernels' files means the module below.
extern crate self as rayon;

#[path = "../../burn-conv-bn-cpu/src/activation.rs"]
mod activation;
#[path = "../../burn-conv-bn-cpu/src/algorithm.rs"]
mod algorithm;
#[path = "../../burn-conv-bn-cpu/src/backward.rs"]
mod backward;
#[path = "../../burn-conv-bn-cpu/src/buffer.rs"]
mod buffer;
#[path = "../../burn-conv-bn-cpu/src/direct.rs"]
mod direct;
#[path = "../../burn-conv-bn-cpu/src/element.rs"]
mod element;
#[path = "../../burn-conv-bn-cpu/src/forward.rs"]
mod forward;
#[path = "../../burn-conv-bn-cpu/src/geometry.rs"]
mod geometry;
#[path = "../../burn-conv-bn-cpu/src/layout.rs"]
mod layout;
#[path = "../../burn-conv-bn-cpu/src/max_pool.rs"]
mod max_pool;
#[path = "../../burn-conv-bn-cpu/src/minimal.rs"]
mod minimal;
#[path = "../../burn-conv-bn-cpu/src/moments.rs"]
mod moments;
mod pool;
#[path = "../../burn-conv-bn-cpu/src/pooled.rs"]
mod pooled;
pub mod prelude;
#[path = "../../burn-conv-bn-cpu/src/real.rs"]
mod real;
#[path = "../../burn-conv-bn-cpu/src/shifted.rs"]
mod shifted;
#[path = "../../burn-conv-bn-cpu/src/simd.rs"]
mod simd;

pub use activation::Activation;
pub use backward::{
    Backward, ConvOutput, GradSums, Gradients, InputGradCoefficients, OutputGrad, backward,
    grad_sums,
};
pub use element::Element;
pub use forward::{conv, conv_moments, normalize};
pub use geometry::{Geometry, GeometryError};
pub use max_pool::{PoolGeometry, PoolGeometryError, max_pool, max_pool_backward};
pub use moments::Moments;
pub use pooled::{PooledGrad, normalize_max_pool, pooled_grad_sums};
pub use real::Real;

/// As in `burn-conv-bn-cpu`, whose `lib.rs` has it.
#[derive(Clone, Copy, Debug)]
pub struct Affine<'a, T> {
    /// `[channels_out]`.
    pub mean: &'a [T],
    /// `[channels_out]`.
    pub scale: &'a [T],
    /// `[channels_out]`.
    pub shift: &'a [T],
}
