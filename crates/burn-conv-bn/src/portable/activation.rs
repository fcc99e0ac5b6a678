//! Activations: forward beside derivative.

use burn::backend::Backend;
use burn::backend::tensor::FloatTensor;

use crate::definition::Activation;

/// `y = activation(value)`, in place where `value` is the only handle.
pub(crate) fn forward<B: Backend>(activation: Activation, value: FloatTensor<B>) -> FloatTensor<B> {
    match activation {
        Activation::Identity => value,
        Activation::Relu => B::relu(value),
    }
}

/// `output_grad * activation'(value)`. For Relu, `value` may be the pre-activation or the output:
/// they have the same sign.
pub(crate) fn backward<B: Backend>(
    activation: Activation,
    value: FloatTensor<B>,
    output_grad: FloatTensor<B>,
) -> FloatTensor<B> {
    match activation {
        Activation::Identity => output_grad,
        Activation::Relu => B::relu_backward(value, output_grad),
    }
}
