use std::f64::consts::{FRAC_1_SQRT_2, FRAC_2_SQRT_PI};

use crate::Real;

/// Element-wise function of the norm's output plus residual.
///
/// ```
/// use burn_conv_bn_cpu::{Activation, Affine, Geometry, normalize};
///
/// // One value of each of two channels.
/// let one = [1; 3];
/// let geometry = Geometry::new(1, [1, 2], 1, one, one, one, [(0, 0); 3], one)?;
/// let affine = Affine { mean: &[0.0, 0.0], scale: &[1.0, 1.0], shift: &[0.0, 0.0] };
/// let leaky = Activation::LeakyRelu { negative_slope: 0.25 };
/// let mut values = [-2.0f32, 3.0];
/// normalize(&geometry, &mut values, affine, None, leaky);
/// assert_eq!(values, [-0.5, 3.0]);
/// # Ok::<(), burn_conv_bn_cpu::GeometryError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    /// `y = v`.
    Identity,
    /// `y = max(v, 0)`, derivative 0 at 0; NaN stays NaN.
    Relu,
    /// `y = min(max(v, 0), 6)`, derivative 0 at 0 and 6; NaN stays NaN.
    Relu6,
    /// `y = v` where `v > 0`, `negative_slope * v` elsewhere.
    LeakyRelu {
        /// Slope where the value is not positive.
        negative_slope: f64,
    },
    /// `y = v / (1 + exp(-v))`.
    Silu,
    /// `y = v * (1 + erf(v / sqrt(2))) / 2`.
    Gelu,
    /// `y = v * sigmoid(2 * u)`, `u = sqrt(2 / pi) * (v + 0.044715 * v^3)`: GELU's approximation by tanh.
    GeluApproximate,
    /// `y = v * clamp(v / 6 + 1/2, 0, 1)`, derivative 0 at -3 and 1 at 3.
    HardSwish,
    /// `y = 1 / (1 + exp(-v))`.
    Sigmoid,
    /// `y = clamp(alpha * v + beta, 0, 1)`, derivative 0 where that is 0 or 1; NaN stays NaN.
    HardSigmoid {
        /// Slope between the bounds.
        alpha: f64,
        /// Value at 0.
        beta: f64,
    },
    /// `y = tanh(v)`.
    Tanh,
    /// `y = v` where `v > 0`, `alpha * (exp(v) - 1)` elsewhere, at 0 with derivative `alpha`.
    Elu {
        /// Negative of the limit at minus infinity.
        alpha: f64,
    },
    /// `y = v * tanh(ln(1 + exp(v)))`.
    Mish,
    /// `y = ln(1 + exp(beta * v)) / beta`.
    Softplus {
        /// Sharpness of the bend, not 0.
        beta: f64,
    },
}

/// Evaluates the body with the activation as a constant: a loop in it is compiled for each one, without a
/// branch.
macro_rules! specialize {
    (@ $activation:expr, $constant:ident => $body:expr,
     $($variant:ident $({ $($field:ident),+ })?)+) => {
        match $activation {
            $(Activation::$variant $({ $($field),+ })? => {
                let $constant = Activation::$variant $({ $($field),+ })?;
                $body
            })+
        }
    };
    ($activation:expr, $constant:ident => $body:expr) => {
        specialize!(
            @ $activation, $constant => $body,
            Identity Relu Relu6 LeakyRelu { negative_slope } Silu Gelu GeluApproximate HardSwish Sigmoid
            HardSigmoid { alpha, beta } Tanh Elu { alpha } Mish Softplus { beta }
        )
    };
}
pub(crate) use specialize;

impl Activation {
    #[inline(always)]
    pub(crate) fn forward<T: Real>(self, value: T) -> T {
        match self {
            Self::Identity => value,
            Self::Relu => {
                if is_above(value, T::ZERO) {
                    value
                } else {
                    T::ZERO
                }
            }
            Self::Relu6 => {
                let six = T::from_f64(6.0);
                match (is_above(value, T::ZERO), value >= six) {
                    (false, _) => T::ZERO,
                    (true, true) => six,
                    (true, false) => value,
                }
            }
            Self::LeakyRelu { negative_slope } => {
                if is_above(value, T::ZERO) {
                    value
                } else {
                    value * T::from_f64(negative_slope)
                }
            }
            Self::Silu => value * sigmoid(value),
            Self::Gelu => value * normal_cdf(value),
            Self::HardSwish => match (
                is_above(value, T::from_f64(-3.0)),
                value >= T::from_f64(3.0),
            ) {
                (false, _) => T::ZERO,
                (true, true) => value,
                (true, false) => value * (value * T::from_f64(1.0 / 6.0) + T::from_f64(0.5)),
            },
            Self::GeluApproximate => value * sigmoid(gelu_argument(value).0),
            Self::Sigmoid => sigmoid(value),
            Self::HardSigmoid { alpha, beta } => {
                let line = value * T::from_f64(alpha) + T::from_f64(beta);
                match (is_above(line, T::ZERO), line >= T::ONE) {
                    (false, _) => T::ZERO,
                    (true, true) => T::ONE,
                    (true, false) => line,
                }
            }
            Self::Tanh => value.tanh(),
            Self::Elu { alpha } => {
                if is_above(value, T::ZERO) {
                    value
                } else {
                    value.exp_m1() * T::from_f64(alpha)
                }
            }
            Self::Mish => value * mish_gate(value).0,
            Self::Softplus { beta } => {
                let beta = T::from_f64(beta);
                let scaled = value * beta;
                let linear = if is_above(scaled, T::ZERO) {
                    value
                } else {
                    T::ZERO
                };
                linear + decay(scaled).ln_1p() / beta
            }
        }
    }

    /// `grad * activation'(value)`, and 0 where the derivative is 0, whatever the gradient. For Relu,
    /// Relu6 and a LeakyRelu whose slope is not negative, `value` may also be the output.
    #[inline(always)]
    pub(crate) fn backward<T: Real>(self, value: T, grad: T) -> T {
        match self {
            Self::Identity => grad,
            Self::Relu => {
                if is_above(value, T::ZERO) {
                    grad
                } else {
                    T::ZERO
                }
            }
            Self::Relu6 => match (is_above(value, T::ZERO), value >= T::from_f64(6.0)) {
                (true, false) => grad,
                _ => T::ZERO,
            },
            Self::LeakyRelu { negative_slope } => {
                if is_above(value, T::ZERO) {
                    grad
                } else {
                    sloped(grad, T::from_f64(negative_slope))
                }
            }
            Self::Silu => {
                let sigmoid = sigmoid(value);
                sloped(grad, sigmoid + value * sigmoid * (T::ONE - sigmoid))
            }
            Self::Gelu => sloped(grad, normal_cdf(value) + value * normal_density(value)),
            Self::HardSwish => match (
                is_above(value, T::from_f64(-3.0)),
                value >= T::from_f64(3.0),
            ) {
                (false, _) => T::ZERO,
                (true, true) => grad,
                (true, false) => sloped(grad, value * T::from_f64(1.0 / 3.0) + T::from_f64(0.5)),
            },
            Self::GeluApproximate => {
                let (argument, slope) = gelu_argument(value);
                let bent = value * sigmoid_slope(argument) * slope;
                sloped(grad, sigmoid(argument) + bent)
            }
            Self::Sigmoid => sloped(grad, sigmoid_slope(value)),
            Self::HardSigmoid { alpha, beta } => {
                let alpha = T::from_f64(alpha);
                let line = value * alpha + T::from_f64(beta);
                match (is_above(line, T::ZERO), line >= T::ONE) {
                    (true, false) => sloped(grad, alpha),
                    _ => T::ZERO,
                }
            }
            // 1 - tanh(v)^2
            Self::Tanh => sloped(grad, T::from_f64(4.0) * sigmoid_slope(value + value)),
            Self::Elu { alpha } => {
                if is_above(value, T::ZERO) {
                    grad
                } else {
                    sloped(grad, value.exp() * T::from_f64(alpha))
                }
            }
            Self::Mish => {
                let (gate, slope) = mish_gate(value);
                sloped(grad, gate + value * slope)
            }
            Self::Softplus { beta } => sloped(grad, sigmoid(value * T::from_f64(beta))),
        }
    }
}

/// `grad * slope`, and 0 where the slope is 0: the product with an infinite gradient is NaN.
#[inline(always)]
fn sloped<T: Real>(grad: T, slope: T) -> T {
    if slope == T::ZERO {
        T::ZERO
    } else {
        grad * slope
    }
}

/// Above the bound, or NaN.
#[inline(always)]
#[allow(clippy::neg_cmp_op_on_partial_ord)]
fn is_above<T: Real>(value: T, bound: T) -> bool {
    !(value <= bound)
}

#[inline(always)]
fn sigmoid<T: Real>(value: T) -> T {
    T::ONE / (T::ONE + (T::ZERO - value).exp())
}

/// `exp(-|value|)`.
#[inline(always)]
fn decay<T: Real>(value: T) -> T {
    let negative = T::ZERO - value;
    if value < T::ZERO { value } else { negative }.exp()
}

/// The sigmoid's derivative. `s * (1 - s)` would lose its digits where the sigmoid is near 1.
#[inline(always)]
fn sigmoid_slope<T: Real>(value: T) -> T {
    let decay = decay(value);
    let sum = T::ONE + decay;
    decay / (sum * sum)
}

/// `tanh(ln(1 + exp(value)))` and its derivative.
#[inline(always)]
fn mish_gate<T: Real>(value: T) -> (T, T) {
    // Beyond, powers of the exponential would overflow.
    if value > T::from_f64(40.0) {
        return (T::ONE, T::ZERO);
    }
    let exp = value.exp();
    let two = T::from_f64(2.0);
    let numerator = exp * (exp + two);
    let denominator = numerator + two;
    let slope = T::from_f64(4.0) * (exp / denominator) * ((exp + T::ONE) / denominator);
    (numerator / denominator, slope)
}

/// The argument of the sigmoid in GELU's approximation, and its derivative.
#[inline(always)]
fn gelu_argument<T: Real>(value: T) -> (T, T) {
    // From here on the sigmoid is 0 or 1; powers of the value would overflow.
    let bound = T::from_f64(40.0);
    let value = match (value < T::ZERO - bound, value > bound) {
        (true, _) => T::ZERO - bound,
        (false, true) => bound,
        (false, false) => value,
    };
    // 2 sqrt(2 / pi)
    let scale = T::from_f64(2.0 * FRAC_2_SQRT_PI * FRAC_1_SQRT_2);
    let cubic = value * value * T::from_f64(0.044715);
    let slope = T::ONE + T::from_f64(3.0) * cubic;
    (scale * value * (T::ONE + cubic), scale * slope)
}

/// The normal distribution's `P(X <= value)`, by erfc, which keeps its digits where it is small.
#[inline(always)]
fn normal_cdf<T: Real>(value: T) -> T {
    T::from_f64(0.5) * (value * T::from_f64(-FRAC_1_SQRT_2)).erfc()
}

/// The normal distribution's density, `exp(-value^2 / 2) / sqrt(2 pi)`.
#[inline(always)]
fn normal_density<T: Real>(value: T) -> T {
    let scale = 0.5 * FRAC_2_SQRT_PI * FRAC_1_SQRT_2;
    (value * value * T::from_f64(-0.5)).exp() * T::from_f64(scale)
}
