//! Output shapes and dtypes of the opaque kernels, for Burn's lazy `Fusion` wrapper.

use burn::backend::fusion::custom::TensorSpec;
use burn::tensor::{DType, Shape};

use super::tensors::{
    BatchNormBackwardOptions, ConvBackwardOptions, ConvBnBackwardOptions, ConvBnForwardMetadata,
    ConvBnGradsMetadata, ConvBnInputsMetadata, ConvBnSavedMetadata, ConvGradsMetadata,
    ConvSavedMetadata, NormGradsMetadata, NormInputsMetadata, NormOutputMetadata,
    NormSavedMetadata, OptionalTensorMetadata,
};
use crate::spec::{BatchNormOptions, ConvBnOptions, ConvBnProblem, accumulator_dtype};

pub(crate) fn conv_backward(
    saved: &ConvSavedMetadata,
    options: &ConvBackwardOptions,
) -> ConvGradsMetadata {
    let dtype = saved.output_grad.dtype;
    let wanted = options.wanted;
    let spec = |shape: &Shape| TensorSpec::new(shape.clone(), dtype);
    let channels = Shape::new([options.weight_shape[0]]);
    ConvGradsMetadata {
        input: optional(wanted.input, || spec(&options.input_shape)),
        weight: optional(wanted.weight, || spec(&options.weight_shape)),
        bias: optional(wanted.bias, || spec(&channels)),
    }
}

pub(crate) fn batch_normalize_forward(
    inputs: &NormInputsMetadata,
    _options: &BatchNormOptions,
) -> NormOutputMetadata {
    let output = TensorSpec::new(inputs.input.shape.clone(), inputs.input.dtype);
    let channels = TensorSpec::new(
        Shape::new([output.shape[1]]),
        accumulator_dtype(output.dtype),
    );
    NormOutputMetadata {
        output,
        mean: channels.clone(),
        variance: channels,
    }
}

pub(crate) fn batch_normalize_backward(
    saved: &NormSavedMetadata,
    options: &BatchNormBackwardOptions,
) -> NormGradsMetadata {
    let grad = &saved.output_grad;
    let wanted = options.wanted;
    let channels = || TensorSpec::new(Shape::new([grad.shape[1]]), options.norm_dtype);
    NormGradsMetadata {
        input: optional(wanted.input, || {
            TensorSpec::new(grad.shape.clone(), grad.dtype)
        }),
        gamma: optional(wanted.gamma, channels),
        beta: optional(wanted.beta, channels),
    }
}

pub(crate) fn conv_bn_forward(
    inputs: &ConvBnInputsMetadata,
    options: &ConvBnOptions,
    keep_conv_output: &bool,
) -> ConvBnForwardMetadata {
    let problem = ConvBnProblem::conv(
        inputs.input.shape.clone(),
        inputs.weight.shape.clone(),
        &options.conv,
    )
    .unwrap_or_else(|error| panic!("{error}"));
    let output = TensorSpec::new(problem.output.clone(), inputs.input.dtype);
    let channels = TensorSpec::new(
        Shape::new([problem.output[1]]),
        accumulator_dtype(inputs.input.dtype),
    );
    ConvBnForwardMetadata {
        conv_output: optional(*keep_conv_output, || output.clone()),
        output,
        mean: channels.clone(),
        variance: channels,
    }
}

pub(crate) fn conv_bn_backward(
    saved: &ConvBnSavedMetadata,
    options: &ConvBnBackwardOptions,
) -> ConvBnGradsMetadata {
    let dtype = saved.output_grad.dtype;
    let wanted = options.wanted;
    let spec = |shape: &Shape, dtype: DType| TensorSpec::new(shape.clone(), dtype);
    let channels = Shape::new([options.weight_shape[0]]);
    ConvBnGradsMetadata {
        input: optional(wanted.input, || spec(&options.input_shape, dtype)),
        weight: optional(wanted.weight, || spec(&options.weight_shape, dtype)),
        bias: optional(wanted.bias, || spec(&channels, dtype)),
        gamma: optional(wanted.gamma, || spec(&channels, options.norm_dtype)),
        beta: optional(wanted.beta, || spec(&channels, options.norm_dtype)),
        residual: optional(wanted.residual, || spec(&saved.output_grad.shape, dtype)),
    }
}

fn optional(present: bool, spec: impl FnOnce() -> TensorSpec) -> OptionalTensorMetadata {
    if present {
        OptionalTensorMetadata::Present(spec())
    } else {
        OptionalTensorMetadata::Absent
    }
}
