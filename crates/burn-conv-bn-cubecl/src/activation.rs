//! Activations: forward beside derivative.

use burn_cubecl::cubecl;
use cubecl::prelude::*;

/// Element-wise function applied to the normalized (and residual-added) value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Activation {
    /// `y = v`.
    Identity,
    /// `y = max(v, 0)`, with derivative 0 at 0. NaN stays NaN.
    Relu,
}

/// `y = activation(value)`.
#[cube]
pub(crate) fn forward<T: Float, N: Size>(
    value: Vector<T, N>,
    #[comptime] activation: Activation,
) -> Vector<T, N> {
    match comptime!(activation) {
        Activation::Identity => value,
        // As a comparison rather than a maximum: WGSL's `max` may drop a NaN.
        Activation::Relu => {
            let zero = Vector::zero();
            select_many(value.less_equal(&zero), zero, value)
        }
    }
}

/// `output_grad * activation'(value)`. For Relu, `value` may be the pre-activation or the output:
/// they have the same sign.
#[cube]
pub(crate) fn backward<T: Float, N: Size>(
    value: Vector<T, N>,
    output_grad: Vector<T, N>,
    #[comptime] activation: Activation,
) -> Vector<T, N> {
    match comptime!(activation) {
        Activation::Identity => output_grad,
        Activation::Relu => {
            let zero = Vector::zero();
            select_many(value.less_equal(&zero), zero, output_grad)
        }
    }
}
