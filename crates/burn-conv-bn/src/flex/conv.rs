//! The convolution's gradients, with no norm behind it.

use burn::backend::Flex;
use burn_conv_bn_cpu::{
    Activation, Affine, Backward, ConvOutput, Gradients, OutputGrad, Real, backward as kernel,
};

use super::tensor::{Kernel, contiguous, geometry, numbers, slice, tensor};
use crate::backend::{ConvBackwardOptions, ConvGrads, ConvSaved};
use crate::portable::{cast, channel_sum, channels};

pub(super) fn backward<E: Kernel>(
    saved: ConvSaved<Flex>,
    options: &ConvBackwardOptions,
) -> ConvGrads<Flex> {
    let wanted = options.wanted;
    let shapes = [&options.input_shape, &options.weight_shape];
    let geometry = geometry(shapes, &options.spec, options.max_workspace);
    let output_grad = contiguous(&saved.output_grad);
    let input = saved.input.as_option().map(contiguous);
    let weight = saved.weight.as_option().map(contiguous);
    let weight = weight.as_ref().map(numbers::<E::Real>);
    let mut input_grad = wanted.input.then(Vec::<E>::new);
    let mut weight_grad = wanted.weight.then(Vec::<E::Real>::new);
    if input_grad.is_some() || weight_grad.is_some() {
        // Without an activation and coefficients the gradient passes as it is, times the scale.
        let channels = geometry.channels_out();
        let unused = vec![E::Real::ZERO; channels];
        let one = vec![E::Real::from_f64(1.0); channels];
        let pass = Backward {
            geometry: &geometry,
            input: input.as_ref().map(slice::<E>),
            weight: weight.as_deref(),
            output_grad: OutputGrad::Whole(slice(&output_grad)),
            affine: Affine {
                mean: &unused,
                scale: &one,
                shift: &unused,
            },
            activation: Activation::Identity,
            residual: None,
            output: None,
        };
        let gradients = Gradients {
            input: input_grad.as_mut().map(|grad| {
                let weight = weight.as_deref();
                (grad, weight.expect("it is kept for this gradient"))
            }),
            weight: weight_grad.as_mut(),
            residual: None,
        };
        let conv_output = ConvOutput::Kept(slice(&output_grad));
        kernel(&pass, conv_output, None, gradients);
    }
    let bias = wanted
        .bias
        .then(|| channels::<Flex>(channel_sum::<Flex>(output_grad.clone())));
    let weight = weight_grad.map(|grad| {
        let grad = tensor(grad, &options.weight_shape);
        cast::<Flex>(grad, output_grad.dtype())
    });
    ConvGrads {
        input: input_grad
            .map(|grad| tensor(grad, &options.input_shape))
            .into(),
        weight: weight.into(),
        bias: bias.into(),
    }
}
