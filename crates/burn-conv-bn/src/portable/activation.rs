//! Activations: forward beside derivative.

use core::f64::consts::{FRAC_1_SQRT_2, FRAC_2_SQRT_PI};

use burn::backend::tensor::{BoolTensor, FloatTensor};
use burn::backend::{Backend, TensorMetadata, get_or_init_device_settings};

use crate::spec::Activation;

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
