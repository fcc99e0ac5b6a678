//! Convolution, norm and activation: forward and backward.

pub(crate) mod affine;
pub(crate) mod alone;
pub(crate) mod backward;
pub(crate) mod forward;
pub(crate) mod gradient;
pub(crate) mod moments;

mod channels;
mod gram;
mod lines;
mod tiles;
