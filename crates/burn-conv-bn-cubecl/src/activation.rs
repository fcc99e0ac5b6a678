//! Activations: forward beside derivative.

use core::f64::consts::{FRAC_1_SQRT_2, FRAC_2_SQRT_PI};

use burn_cubecl::cubecl;
use cubecl::prelude::*;

/// Element-wise function applied to the normalized (and residual-added) value. Kernels are compiled
/// for each.
///
/// [The examples of the crate](crate#examples) pass one, and [`Slope`] has that of a LeakyRelu.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Activation {
    /// `y = v`.
    Identity,
    /// `y = max(v, 0)`, with derivative 0 at 0. NaN stays NaN.
    Relu,
    /// `y = min(max(v, 0), 6)`, with derivative 0 at 0 and 6. NaN stays NaN.
    Relu6,
    /// `y = v` where `v > 0`, the slope times `v` elsewhere.
    LeakyRelu(Slope),
    /// `y = v / (1 + exp(-v))`.
    Silu,
    /// `y = v * (1 + erf(v / sqrt(2))) / 2`. Where the device has no erf of its own CubeCL's is
    /// within 1.5e-7.
    Gelu,
    /// `y = v * clamp(v / 6 + 1/2, 0, 1)`, with derivative 0 at -3 and 1 at 3.
    HardSwish,
}

/// A slope, by the bits of an f64: kernels are told apart by it.
///
/// ```
/// use burn_conv_bn_cubecl::{Activation, Slope};
///
/// let leaky = |slope| Activation::LeakyRelu(Slope::new(slope));
/// assert_ne!(leaky(0.01), leaky(0.2));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Slope(u64);

impl Slope {
    /// A slope of that value.
    pub fn new(slope: f64) -> Self {
        Self(slope.to_bits())
    }
}

impl Activation {
    /// The slope below zero, where that is what the activation has there.
    fn negative_slope(self) -> f64 {
        match self {
            Self::LeakyRelu(Slope(bits)) => f64::from_bits(bits),
            _ => 0.0,
        }
    }
}

/// A constant in more digits than those of the f32 that CubeCL takes.
#[cube]
fn constant<T: Float, N: Size>(#[comptime] value: f64) -> Vector<T, N> {
    let high = comptime!(value as f32);
    let low = comptime!((value - f64::from(value as f32)) as f32);
    Vector::new(T::new(high) + T::new(low))
}

/// The value within `[-bound, bound]`. As comparisons rather than a minimum and a maximum, which
/// may drop a NaN in WGSL; so are all bounds here.
#[cube]
fn bounded<T: Float, N: Size>(value: Vector<T, N>, #[comptime] bound: f64) -> Vector<T, N> {
    let least = constant::<T, N>(comptime!(-bound));
    let most = constant::<T, N>(bound);
    let value = select_many(value.less_equal(&least), least, value);
    select_many(value.greater_equal(&most), most, value)
}

/// `1 / (1 + exp(-value))`; bounded, since an infinite exponential is undefined in WGSL.
#[cube]
fn sigmoid<T: Float, N: Size>(value: Vector<T, N>) -> Vector<T, N> {
    let one = constant::<T, N>(1.0);
    one / (one + (-bounded(value, 80.0)).exp())
}

/// The normal distribution's `P(X <= value)`.
#[cube]
fn normal_cdf<T: Float, N: Size>(value: Vector<T, N>) -> Vector<T, N> {
    let half = constant::<T, N>(0.5);
    half + half * (bounded(value, 40.0) * constant::<T, N>(FRAC_1_SQRT_2)).erf()
}

/// The normal distribution's density, `exp(-value^2 / 2) / sqrt(2 pi)`.
#[cube]
fn normal_density<T: Float, N: Size>(value: Vector<T, N>) -> Vector<T, N> {
    let value = bounded(value, 40.0);
    let scale = constant::<T, N>(comptime!(0.5 * FRAC_2_SQRT_PI * FRAC_1_SQRT_2));
    (value * value * constant::<T, N>(-0.5)).exp() * scale
}

/// `y = activation(value)`.
#[cube]
pub(crate) fn forward<T: Float, N: Size>(
    value: Vector<T, N>,
    #[comptime] activation: Activation,
) -> Vector<T, N> {
    let zero = Vector::<T, N>::zero();
    match comptime!(activation) {
        Activation::Identity => value,
        Activation::Relu => select_many(value.less_equal(&zero), zero, value),
        Activation::Relu6 => {
            let six = constant::<T, N>(6.0);
            let value = select_many(value.less_equal(&zero), zero, value);
            select_many(value.greater_equal(&six), six, value)
        }
        Activation::LeakyRelu(_) => {
            let slope = constant::<T, N>(comptime!(activation.negative_slope()));
            select_many(value.less_equal(&zero), value * slope, value)
        }
        Activation::Silu => value * sigmoid(value),
        Activation::Gelu => value * normal_cdf(value),
        Activation::HardSwish => {
            let bent = value * (value / constant::<T, N>(6.0) + constant::<T, N>(0.5));
            pieces(value, zero, bent, value)
        }
    }
}

/// `output_grad * activation'(value)`, and 0 where the derivative is 0, whatever the gradient. For Relu,
/// Relu6 and a LeakyRelu whose slope is not negative, `value` may be the pre-activation or the output:
/// both lie in the same piece.
#[cube]
pub(crate) fn backward<T: Float, N: Size>(
    value: Vector<T, N>,
    output_grad: Vector<T, N>,
    #[comptime] activation: Activation,
) -> Vector<T, N> {
    let zero = Vector::<T, N>::zero();
    match comptime!(activation) {
        Activation::Identity => output_grad,
        Activation::Relu => select_many(value.less_equal(&zero), zero, output_grad),
        Activation::Relu6 => {
            let six = constant::<T, N>(6.0);
            let grad = select_many(value.less_equal(&zero), zero, output_grad);
            select_many(value.greater_equal(&six), zero, grad)
        }
        Activation::LeakyRelu(_) => {
            let slope = constant::<T, N>(comptime!(activation.negative_slope()));
            select_many(
                value.less_equal(&zero),
                sloped(output_grad, slope),
                output_grad,
            )
        }
        Activation::Silu => {
            let sigmoid = sigmoid(value);
            let one = constant::<T, N>(1.0);
            sloped(output_grad, sigmoid + value * sigmoid * (one - sigmoid))
        }
        Activation::Gelu => sloped(
            output_grad,
            normal_cdf(value) + value * normal_density(value),
        ),
        Activation::HardSwish => {
            let slope = value / constant::<T, N>(3.0) + constant::<T, N>(0.5);
            pieces(value, zero, sloped(output_grad, slope), output_grad)
        }
    }
}

/// `grad * slope`, and 0 where the slope is 0: the product with an infinite gradient is NaN.
#[cube]
fn sloped<T: Float, N: Size>(grad: Vector<T, N>, slope: Vector<T, N>) -> Vector<T, N> {
    let zero = Vector::<T, N>::zero();
    select_many(slope.equal(&zero), zero, grad * slope)
}

/// HardSwish's three pieces: up to -3, between, and from 3 on.
#[cube]
fn pieces<T: Float, N: Size>(
    value: Vector<T, N>,
    below: Vector<T, N>,
    between: Vector<T, N>,
    above: Vector<T, N>,
) -> Vector<T, N> {
    let three = constant::<T, N>(3.0);
    let result = select_many(value.less_equal(&(-three)), below, between);
    select_many(value.greater_equal(&three), above, result)
}
