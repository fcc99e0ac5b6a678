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
    /// `y = v * clamp(v / 6 + 1/2, 0, 1)`, derivative 0 at -3 and 1 at 3.
    HardSwish,
}

/// Evaluates the body with the activation as a constant: a loop in it is compiled for each one, without a
/// branch.
macro_rules! specialize {
    ($activation:expr, $constant:ident => $body:expr) => {
        match $activation {
            Activation::Identity => {
                let $constant = Activation::Identity;
                $body
            }
            Activation::Relu => {
                let $constant = Activation::Relu;
                $body
            }
            Activation::Relu6 => {
                let $constant = Activation::Relu6;
                $body
            }
            Activation::LeakyRelu { negative_slope } => {
                let $constant = Activation::LeakyRelu { negative_slope };
                $body
            }
            Activation::Silu => {
                let $constant = Activation::Silu;
                $body
            }
            Activation::Gelu => {
                let $constant = Activation::Gelu;
                $body
            }
            Activation::HardSwish => {
                let $constant = Activation::HardSwish;
                $body
            }
        }
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

/// The normal distribution's `P(X <= value)`, by erfc, which keeps its digits where it is small.
#[inline(always)]
fn normal_cdf<T: Real>(value: T) -> T {
    T::from_f64(0.5) * (value * T::from_f64(-std::f64::consts::FRAC_1_SQRT_2)).erfc()
}

/// The normal distribution's density, `exp(-value^2 / 2) / sqrt(2 pi)`.
#[inline(always)]
fn normal_density<T: Real>(value: T) -> T {
    let scale = 0.5 * std::f64::consts::FRAC_2_SQRT_PI * std::f64::consts::FRAC_1_SQRT_2;
    (value * value * T::from_f64(-0.5)).exp() * T::from_f64(scale)
}
