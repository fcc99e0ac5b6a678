//! Activations: forward beside derivative.

use core::f64::consts::{FRAC_1_SQRT_2, FRAC_2_SQRT_PI};

use burn::backend::tensor::{BoolTensor, FloatTensor};
use burn::backend::{Backend, TensorMetadata, get_or_init_device_settings};

use crate::spec::Activation;

/// Factor of the cube in GELU's approximation by tanh.
const GELU_CUBIC: f64 = 0.044715;
/// `2 sqrt(2 / pi)`: the tanh's argument, doubled to be a sigmoid's.
const GELU_SCALE: f64 = 2.0 * FRAC_2_SQRT_PI * FRAC_1_SQRT_2;
/// Magnitude beyond which GELU's gate is 0 or 1, and powers of the value may overflow.
const BOUND: f64 = 40.0;

/// `y = activation(value)`, in place where `value` is the only handle.
pub(crate) fn forward<B: Backend>(activation: Activation, value: FloatTensor<B>) -> FloatTensor<B> {
    match activation {
        Activation::Identity => value,
        Activation::Relu => B::relu(value),
        // Bounds by selection keep NaN; a maximum may drop it.
        Activation::Relu6 => {
            let above = at_least::<B>(&value, 6.0);
            B::float_mask_fill(B::relu(value), above, 6f64.into())
        }
        Activation::LeakyRelu { negative_slope } => {
            let below = at_most::<B>(&value, 0.0);
            let scaled = B::float_mul_scalar(value.clone(), negative_slope.into());
            B::float_mask_where(value, below, scaled)
        }
        Activation::Silu => B::float_mul(value.clone(), B::sigmoid(value)),
        Activation::Gelu => B::float_mul(value.clone(), normal_cdf::<B>(value)),
        Activation::HardSwish => {
            let below = at_most::<B>(&value, -3.0);
            let above = at_least::<B>(&value, 3.0);
            let slope = line::<B>(value.clone(), 1.0 / 6.0, 0.5);
            let slope = B::float_mask_fill(slope, below, 0f64.into());
            B::float_mul(value, B::float_mask_fill(slope, above, 1f64.into()))
        }
        Activation::GeluApproximate => {
            let argument = gelu_argument::<B>(bounded::<B>(value.clone(), BOUND));
            B::float_mul(value, B::sigmoid(argument))
        }
        Activation::Sigmoid => B::sigmoid(value),
        Activation::HardSigmoid { alpha, beta } => {
            let value = line::<B>(value, alpha, beta);
            let below = at_most::<B>(&value, 0.0);
            let above = at_least::<B>(&value, 1.0);
            let value = B::float_mask_fill(value, below, 0f64.into());
            B::float_mask_fill(value, above, 1f64.into())
        }
        Activation::Tanh => B::float_tanh(value),
        Activation::Elu { alpha } => {
            let below = at_most::<B>(&value, 0.0);
            let bent = line::<B>(B::float_exp(value.clone()), alpha, -alpha);
            B::float_mask_where(value, below, bent)
        }
        Activation::Mish => B::float_mul(value.clone(), B::float_tanh(softplus::<B>(value, 1.0))),
        Activation::Softplus { beta } => softplus::<B>(value, beta),
    }
}

/// `output_grad * activation'(value)`, and 0 where the derivative is 0, even for infinite gradients. With
/// [`Derivative::OfOutput`](crate::spec::Derivative::OfOutput) `value` may be the output.
pub(crate) fn backward<B: Backend>(
    activation: Activation,
    value: FloatTensor<B>,
    output_grad: FloatTensor<B>,
) -> FloatTensor<B> {
    match activation {
        Activation::Identity => output_grad,
        Activation::Relu => B::relu_backward(value, output_grad),
        Activation::Relu6 => {
            let above = at_least::<B>(&value, 6.0);
            let grad = B::relu_backward(value, output_grad);
            B::float_mask_fill(grad, above, 0f64.into())
        }
        Activation::LeakyRelu { negative_slope } => {
            let below = at_most::<B>(&value, 0.0);
            if negative_slope == 0.0 {
                return B::float_mask_fill(output_grad, below, 0f64.into());
            }
            let scaled = B::float_mul_scalar(output_grad.clone(), negative_slope.into());
            B::float_mask_where(output_grad, below, scaled)
        }
        // s + v * s * (1 - s)
        Activation::Silu => {
            let sigmoid = B::sigmoid(value.clone());
            let rest = line::<B>(sigmoid.clone(), -1.0, 1.0);
            let slope = B::float_mul(B::float_mul(value, sigmoid.clone()), rest);
            sloped::<B>(output_grad, B::float_add(slope, sigmoid))
        }
        // Not `gelu_backward`: Burn's is of the approximation by tanh.
        Activation::Gelu => {
            let square = B::float_mul(value.clone(), value.clone());
            let density = B::float_exp(B::float_mul_scalar(square, (-0.5).into()));
            // 1 / sqrt(2 pi)
            let scale = 0.5 * FRAC_2_SQRT_PI * FRAC_1_SQRT_2;
            let density = B::float_mul_scalar(density, scale.into());
            let slope = B::float_mul(value.clone(), density);
            sloped::<B>(output_grad, B::float_add(slope, normal_cdf::<B>(value)))
        }
        Activation::HardSwish => {
            let below = at_most::<B>(&value, -3.0);
            let above = at_least::<B>(&value, 3.0);
            let slope = line::<B>(value, 1.0 / 3.0, 0.5);
            let slope = B::float_mask_fill(slope, below, 0f64.into());
            let slope = B::float_mask_fill(slope, above, 1f64.into());
            sloped::<B>(output_grad, slope)
        }
        Activation::GeluApproximate => sloped::<B>(output_grad, gelu_approximate_slope::<B>(value)),
        Activation::Sigmoid => sloped::<B>(output_grad, sigmoid_slope::<B>(value)),
        Activation::HardSigmoid { alpha, beta } => {
            let value = line::<B>(value, alpha, beta);
            let below = at_most::<B>(&value, 0.0);
            let above = at_least::<B>(&value, 1.0);
            let slope = line::<B>(value, 0.0, alpha);
            let slope = B::float_mask_fill(slope, below, 0f64.into());
            let slope = B::float_mask_fill(slope, above, 0f64.into());
            sloped::<B>(output_grad, slope)
        }
        Activation::Tanh => sloped::<B>(output_grad, tanh_slope::<B>(value)),
        Activation::Elu { alpha } => {
            let below = at_most::<B>(&value, 0.0);
            let slope = B::float_mul_scalar(B::float_exp(value), alpha.into());
            let bent = sloped::<B>(output_grad.clone(), slope);
            B::float_mask_where(output_grad, below, bent)
        }
        Activation::Mish => sloped::<B>(output_grad, mish_slope::<B>(value)),
        Activation::Softplus { beta } => {
            let slope = B::sigmoid(B::float_mul_scalar(value, beta.into()));
            sloped::<B>(output_grad, slope)
        }
    }
}

/// `grad * slope`, and 0 where the slope is 0: the product with an infinite gradient is NaN.
fn sloped<B: Backend>(grad: FloatTensor<B>, slope: FloatTensor<B>) -> FloatTensor<B> {
    let bool_dtype = get_or_init_device_settings::<B>(&slope.device()).bool_dtype;
    let flat = B::float_equal_elem(slope.clone(), 0f64.into(), bool_dtype);
    B::float_mask_fill(B::float_mul(grad, slope), flat, 0f64.into())
}

/// The normal distribution's `P(X <= value)`.
fn normal_cdf<B: Backend>(value: FloatTensor<B>) -> FloatTensor<B> {
    let erf = B::float_erf(B::float_mul_scalar(value, FRAC_1_SQRT_2.into()));
    line::<B>(erf, 0.5, 0.5)
}

/// `exp(-|value|)`.
fn decay<B: Backend>(value: FloatTensor<B>) -> FloatTensor<B> {
    B::float_exp(B::float_neg(B::float_abs(value)))
}

/// The sigmoid's derivative. `s * (1 - s)` would lose its digits where the sigmoid is near 1.
fn sigmoid_slope<B: Backend>(value: FloatTensor<B>) -> FloatTensor<B> {
    let decay = decay::<B>(value);
    let sum = B::float_add_scalar(decay.clone(), 1f64.into());
    B::float_div(decay, B::float_mul(sum.clone(), sum))
}

/// `1 - tanh(value)^2`.
fn tanh_slope<B: Backend>(value: FloatTensor<B>) -> FloatTensor<B> {
    let slope = sigmoid_slope::<B>(B::float_mul_scalar(value, 2f64.into()));
    B::float_mul_scalar(slope, 4f64.into())
}

/// `t + v * (1 - t^2) * sigmoid(v)`, with the gate `t = tanh(ln(1 + exp(v)))`.
fn mish_slope<B: Backend>(value: FloatTensor<B>) -> FloatTensor<B> {
    let softplus = softplus::<B>(value.clone(), 1.0);
    let gate = B::float_tanh(softplus.clone());
    let silu = B::float_mul(value.clone(), B::sigmoid(value));
    B::float_add(gate, B::float_mul(silu, tanh_slope::<B>(softplus)))
}

/// `sigmoid(u) + v * sigmoid'(u) * u'`, with the argument `u` of GELU's approximation.
fn gelu_approximate_slope<B: Backend>(value: FloatTensor<B>) -> FloatTensor<B> {
    let bounded = bounded::<B>(value, BOUND);
    let argument = gelu_argument::<B>(bounded.clone());
    let square = B::float_mul(bounded.clone(), bounded.clone());
    let inner = line::<B>(square, 3.0 * GELU_CUBIC * GELU_SCALE, GELU_SCALE);
    let bent = B::float_mul(bounded, sigmoid_slope::<B>(argument.clone()));
    B::float_add(B::float_mul(bent, inner), B::sigmoid(argument))
}

/// `ln(1 + exp(beta * value)) / beta`.
fn softplus<B: Backend>(value: FloatTensor<B>, beta: f64) -> FloatTensor<B> {
    let scaled = B::float_mul_scalar(value.clone(), beta.into());
    let below = at_most::<B>(&scaled, 0.0);
    let bend = B::float_mul_scalar(B::float_log1p(decay::<B>(scaled)), (1.0 / beta).into());
    B::float_add(B::float_mask_fill(value, below, 0f64.into()), bend)
}

/// The argument of the sigmoid in GELU's approximation by tanh.
fn gelu_argument<B: Backend>(value: FloatTensor<B>) -> FloatTensor<B> {
    let square = B::float_mul(value.clone(), value.clone());
    let slope = line::<B>(square, GELU_CUBIC * GELU_SCALE, GELU_SCALE);
    B::float_mul(value, slope)
}

/// The value within `[-bound, bound]`.
fn bounded<B: Backend>(value: FloatTensor<B>, bound: f64) -> FloatTensor<B> {
    let (below, above) = (at_most::<B>(&value, -bound), at_least::<B>(&value, bound));
    let value = B::float_mask_fill(value, below, (-bound).into());
    B::float_mask_fill(value, above, bound.into())
}

/// `slope * value + offset`.
fn line<B: Backend>(value: FloatTensor<B>, slope: f64, offset: f64) -> FloatTensor<B> {
    B::float_add_scalar(B::float_mul_scalar(value, slope.into()), offset.into())
}

fn at_most<B: Backend>(value: &FloatTensor<B>, bound: f64) -> BoolTensor<B> {
    let bool_dtype = get_or_init_device_settings::<B>(&value.device()).bool_dtype;
    B::float_lower_equal_elem(value.clone(), bound.into(), bool_dtype)
}

fn at_least<B: Backend>(value: &FloatTensor<B>, bound: f64) -> BoolTensor<B> {
    let bool_dtype = get_or_init_device_settings::<B>(&value.device()).bool_dtype;
    B::float_greater_equal_elem(value.clone(), bound.into(), bool_dtype)
}
