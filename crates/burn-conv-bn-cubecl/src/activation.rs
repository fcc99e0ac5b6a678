//! Activations and their derivatives.

use core::f64::consts::{FRAC_1_SQRT_2, FRAC_2_SQRT_PI};

use burn_cubecl::cubecl;
use cubecl::prelude::*;

/// Element-wise function of the normalized (and residual-added) value, known when a kernel is compiled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Activation {
    /// `y = v`.
    Identity,
    /// `y = max(v, 0)`, with derivative 0 at 0. NaN stays NaN.
    Relu,
    /// `y = min(max(v, 0), 6)`, with derivative 0 at 0 and 6. NaN stays NaN.
    Relu6,
    /// `y = v` where `v > 0`, the slope times `v` elsewhere.
    LeakyRelu(Parameter),
    /// `y = v / (1 + exp(-v))`.
    Silu,
    /// `y = v * (1 + erf(v / sqrt(2))) / 2`. On devices without erf, CubeCL's is within 1.5e-7.
    Gelu,
    /// `y = v * sigmoid(2 * u)`, `u = sqrt(2 / pi) * (v + 0.044715 * v^3)`: GELU's approximation by tanh.
    GeluApproximate,
    /// `y = v * clamp(v / 6 + 1/2, 0, 1)`, with derivative 0 at -3 and 1 at 3.
    HardSwish,
    /// `y = 1 / (1 + exp(-v))`.
    Sigmoid,
    /// `y = clamp(alpha * v + beta, 0, 1)` for alpha and beta, with derivative 0 at the kinks.
    HardSigmoid(Parameter, Parameter),
    /// `y = tanh(v)`.
    Tanh,
    /// `y = v` where `v > 0`, `alpha * (exp(v) - 1)` elsewhere, with derivative alpha at 0.
    Elu(Parameter),
    /// `y = v * tanh(ln(1 + exp(v)))`.
    Mish,
    /// `y = ln(1 + exp(beta * v)) / beta` for a beta other than 0.
    Softplus(Parameter),
}

/// Parameter of an activation: the bits of an f64, as part of a kernel's key.
///
/// ```
/// use burn_conv_bn_cubecl::{Activation, Parameter};
///
/// let leaky = |slope| Activation::LeakyRelu(Parameter::new(slope));
/// assert_ne!(leaky(0.01), leaky(0.2));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Parameter(u64);

impl Parameter {
    /// The parameter with that value.
    pub fn new(value: f64) -> Self {
        Self(value.to_bits())
    }

    fn value(self) -> f64 {
        f64::from_bits(self.0)
    }
}

impl Activation {
    /// The first parameter, or 0.
    fn first(self) -> f64 {
        match self {
            Self::LeakyRelu(parameter)
            | Self::HardSigmoid(parameter, _)
            | Self::Elu(parameter)
            | Self::Softplus(parameter) => parameter.value(),
            _ => 0.0,
        }
    }

    /// The second parameter, or 0.
    fn second(self) -> f64 {
        match self {
            Self::HardSigmoid(_, parameter) => parameter.value(),
            _ => 0.0,
        }
    }
}

/// Factor of the cube in GELU's approximation by tanh.
const GELU_CUBIC: f64 = 0.044715;
/// `2 sqrt(2 / pi)`: the factor in tanh's argument, doubled for a sigmoid.
const GELU_SCALE: f64 = 2.0 * FRAC_2_SQRT_PI * FRAC_1_SQRT_2;

/// A constant with more digits than an f32, as the sum of two.
#[cube]
fn constant<T: Float, N: Size>(#[comptime] value: f64) -> Vector<T, N> {
    let high = comptime!(value as f32);
    let low = comptime!((value - f64::from(value as f32)) as f32);
    Vector::new(T::new(high) + T::new(low))
}

/// Clamp to `[-bound, bound]`. By comparisons, as all clamps here: WGSL's min and max may drop a NaN.
#[cube]
fn bounded<T: Float, N: Size>(value: Vector<T, N>, #[comptime] bound: f64) -> Vector<T, N> {
    let least = constant::<T, N>(comptime!(-bound));
    let most = constant::<T, N>(bound);
    let value = select_many(value.less_equal(&least), least, value);
    select_many(value.greater_equal(&most), most, value)
}

/// `1 / (1 + exp(-value))`. Clamped, since an infinite exponential is undefined in WGSL.
#[cube]
fn sigmoid<T: Float, N: Size>(value: Vector<T, N>) -> Vector<T, N> {
    let one = constant::<T, N>(1.0);
    one / (one + (-bounded(value, 80.0)).exp())
}

/// `exp(-|value|)`.
#[cube]
fn decay<T: Float, N: Size>(value: Vector<T, N>) -> Vector<T, N> {
    let zero = Vector::<T, N>::zero();
    select_many(value.less_equal(&zero), value, -value).exp()
}

/// The sigmoid's derivative. `s * (1 - s)` would cancel where s is near 1.
#[cube]
fn sigmoid_slope<T: Float, N: Size>(value: Vector<T, N>) -> Vector<T, N> {
    let decay = decay(value);
    let sum = constant::<T, N>(1.0) + decay;
    decay / (sum * sum)
}

/// `clamp(alpha * value + beta, 0, 1)` before the clamp.
#[cube]
fn hard_line<T: Float, N: Size>(
    value: Vector<T, N>,
    #[comptime] activation: Activation,
) -> Vector<T, N> {
    let alpha = constant::<T, N>(comptime!(activation.first()));
    value * alpha + constant::<T, N>(comptime!(activation.second()))
}

/// The value, at most 40: there Mish's gate is 1, and powers of larger exponentials overflow.
#[cube]
fn mish_bounded<T: Float, N: Size>(value: Vector<T, N>) -> Vector<T, N> {
    let most = constant::<T, N>(40.0);
    select_many(value.greater_equal(&most), most, value)
}

/// `tanh(ln(1 + exp(value)))` of a clamped value.
#[cube]
fn mish_gate<T: Float, N: Size>(value: Vector<T, N>) -> Vector<T, N> {
    let two = constant::<T, N>(2.0);
    let exp = value.exp();
    let numerator = exp * (exp + two);
    numerator / (numerator + two)
}

/// The derivative of [`mish_gate`].
#[cube]
fn mish_gate_slope<T: Float, N: Size>(value: Vector<T, N>) -> Vector<T, N> {
    let two = constant::<T, N>(2.0);
    let exp = value.exp();
    let denominator = exp * (exp + two) + two;
    let ratio = (exp + constant::<T, N>(1.0)) / denominator;
    constant::<T, N>(4.0) * (exp / denominator) * ratio
}

/// The sigmoid's argument in GELU's approximation by tanh, for a clamped value.
#[cube]
fn gelu_argument<T: Float, N: Size>(value: Vector<T, N>) -> Vector<T, N> {
    let cubic = value * value * constant::<T, N>(GELU_CUBIC);
    constant::<T, N>(GELU_SCALE) * value * (constant::<T, N>(1.0) + cubic)
}

/// The derivative of [`gelu_argument`].
#[cube]
fn gelu_argument_slope<T: Float, N: Size>(value: Vector<T, N>) -> Vector<T, N> {
    let cubic = value * value * constant::<T, N>(comptime!(3.0 * GELU_CUBIC));
    constant::<T, N>(GELU_SCALE) * (constant::<T, N>(1.0) + cubic)
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
            let slope = constant::<T, N>(comptime!(activation.first()));
            select_many(value.less_equal(&zero), value * slope, value)
        }
        Activation::Silu => value * sigmoid(value),
        Activation::Gelu => value * normal_cdf(value),
        Activation::HardSwish => {
            let bent = value * (value / constant::<T, N>(6.0) + constant::<T, N>(0.5));
            pieces(value, zero, bent, value)
        }
        Activation::GeluApproximate => value * sigmoid(gelu_argument(bounded(value, 40.0))),
        Activation::Sigmoid => sigmoid(value),
        Activation::HardSigmoid(_, _) => {
            let line = hard_line(value, activation);
            unit_pieces(line, zero, line, constant::<T, N>(1.0))
        }
        Activation::Tanh => bounded(value, 40.0).tanh(),
        Activation::Elu(_) => {
            let alpha = constant::<T, N>(comptime!(activation.first()));
            let bent = alpha * (decay(value) - constant::<T, N>(1.0));
            select_many(value.less_equal(&zero), bent, value)
        }
        Activation::Mish => value * mish_gate(mish_bounded(value)),
        Activation::Softplus(_) => {
            let beta = constant::<T, N>(comptime!(activation.first()));
            let scaled = value * beta;
            let linear = select_many(scaled.less_equal(&zero), zero, value);
            linear + decay(scaled).log1p() / beta
        }
    }
}

/// `output_grad * activation'(value)`, and 0 where the derivative is 0, even for an infinite gradient. For Relu,
/// Relu6 and a LeakyRelu with a slope of 0 or more, `value` may be the pre-activation or the output: both lie in
/// the same piece.
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
            let slope = constant::<T, N>(comptime!(activation.first()));
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
        Activation::GeluApproximate => {
            let value = bounded(value, 40.0);
            let argument = gelu_argument(value);
            let bent = value * sigmoid_slope(argument) * gelu_argument_slope(value);
            sloped(output_grad, sigmoid(argument) + bent)
        }
        Activation::Sigmoid => sloped(output_grad, sigmoid_slope(value)),
        Activation::HardSigmoid(_, _) => {
            let alpha = constant::<T, N>(comptime!(activation.first()));
            let line = hard_line(value, activation);
            unit_pieces(line, zero, sloped(output_grad, alpha), zero)
        }
        // 1 - tanh(v)^2
        Activation::Tanh => {
            let slope = sigmoid_slope(value * constant::<T, N>(2.0));
            sloped(output_grad, slope * constant::<T, N>(4.0))
        }
        Activation::Elu(_) => {
            let alpha = constant::<T, N>(comptime!(activation.first()));
            let bent = sloped(output_grad, alpha * decay(value));
            select_many(value.less_equal(&zero), bent, output_grad)
        }
        Activation::Mish => {
            let value = mish_bounded(value);
            let slope = mish_gate(value) + value * mish_gate_slope(value);
            sloped(output_grad, slope)
        }
        Activation::Softplus(_) => {
            let beta = constant::<T, N>(comptime!(activation.first()));
            sloped(output_grad, sigmoid(value * beta))
        }
    }
}

/// `grad * slope`, and 0 where the slope is 0: times an infinite gradient that would be NaN.
#[cube]
fn sloped<T: Float, N: Size>(grad: Vector<T, N>, slope: Vector<T, N>) -> Vector<T, N> {
    let zero = Vector::<T, N>::zero();
    select_many(slope.equal(&zero), zero, grad * slope)
}

/// HardSwish by pieces: up to -3, between, and from 3 on.
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

/// HardSigmoid by pieces of the line before the clamp: up to 0, between, and from 1 on.
#[cube]
fn unit_pieces<T: Float, N: Size>(
    line: Vector<T, N>,
    below: Vector<T, N>,
    between: Vector<T, N>,
    above: Vector<T, N>,
) -> Vector<T, N> {
    let zero = Vector::<T, N>::zero();
    let one = constant::<T, N>(1.0);
    let result = select_many(line.less_equal(&zero), below, between);
    select_many(line.greater_equal(&one), above, result)
}
