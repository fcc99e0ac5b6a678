//! Output shapes and dtypes of the opaque kernels, for Burn's lazy `Fusion` wrapper.

use burn::backend::fusion::custom::TensorSpec;
use burn::tensor::ops::MaxPoolOptions;
use burn::tensor::{DType, Shape};

use super::tensors::{
    BatchNormBackwardOptions, ConvBackwardOptions, ConvBnBackwardOptions, ConvBnForwardMetadata,
    ConvBnGradsMetadata, ConvBnInputsMetadata, ConvBnMaxPoolBackwardOptions,
    ConvBnMaxPoolForwardMetadata, ConvBnSavedMetadata, ConvGradsMetadata, ConvSavedMetadata,
    MaxPoolBackwardOptions, MaxPoolForwardMetadata, NormGradsMetadata, NormInputsMetadata,
    NormOutputMetadata, NormSavedMetadata, OptionalTensorMetadata, StatisticsMetadata,
};
use crate::spec::{
    BatchNormOptions, ConvBnOptions, ConvBnProblem, MaxPoolProblem, StatisticsKind,
    accumulator_dtype,
};

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
        // Burn's `Fusion` wraps CubeCL's backend alone, whose kernels update them.
        running: inputs.running.clone(),
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
        running: inputs.running.clone(),
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

pub(crate) fn max_pool_forward(
    input: &TensorSpec,
    options: &MaxPoolOptions<2>,
) -> MaxPoolForwardMetadata {
    match MaxPoolProblem::of_regular_windows(input.shape.clone(), options.clone()) {
        None => MaxPoolForwardMetadata::Unsupported,
        Some(pool) => {
            let [output, argmax] = pooled(&pool, input.dtype);
            MaxPoolForwardMetadata::Pooled { output, argmax }
        }
    }
}

pub(crate) fn max_pool_backward(
    output_grad: &TensorSpec,
    _argmax: &TensorSpec,
    options: &MaxPoolBackwardOptions,
) -> TensorSpec {
    TensorSpec::new(options.input_shape.clone(), output_grad.dtype)
}

pub(crate) fn conv_bn_max_pool_forward(
    inputs: &ConvBnInputsMetadata,
    options: &ConvBnOptions,
    pool: &MaxPoolOptions<2>,
    keep_conv_output: &bool,
) -> ConvBnMaxPoolForwardMetadata {
    let statistics = match inputs.statistics {
        StatisticsMetadata::Batch => StatisticsKind::Batch,
        StatisticsMetadata::Fixed { .. } => StatisticsKind::Fixed,
    };
    let residual = matches!(inputs.residual, OptionalTensorMetadata::Present(_));
    let block = conv_bn_forward(inputs, options, keep_conv_output);
    let conv_output = block.output.shape;
    match MaxPoolProblem::behind_block(conv_output, statistics, residual, pool.clone()) {
        None => ConvBnMaxPoolForwardMetadata::Unsupported,
        Some(pool) => {
            let [output, argmax] = pooled(&pool, inputs.input.dtype);
            ConvBnMaxPoolForwardMetadata::Pooled {
                output,
                argmax,
                mean: block.mean,
                variance: block.variance,
                running: block.running,
                conv_output: block.conv_output,
                inverts: false,
            }
        }
    }
}

pub(crate) fn conv_bn_max_pool_backward(
    saved: &ConvBnSavedMetadata,
    _argmax: &TensorSpec,
    options: &ConvBnMaxPoolBackwardOptions,
) -> ConvBnGradsMetadata {
    conv_bn_backward(saved, &options.conv_bn)
}

/// Output and argmax, four in a word, of the kernels of `burn-conv-bn-cubecl`: Burn's `Fusion` wraps no other
/// backend.
fn pooled(pool: &MaxPoolProblem, dtype: DType) -> [TensorSpec; 2] {
    let output = pool.output();
    let words = output.num_elements().div_ceil(size_of::<u32>());
    [
        TensorSpec::new(output, dtype),
        TensorSpec::new(Shape::new([words]), DType::U32),
    ]
}

fn optional(present: bool, spec: impl FnOnce() -> TensorSpec) -> OptionalTensorMetadata {
    if present {
        OptionalTensorMetadata::Present(spec())
    } else {
        OptionalTensorMetadata::Absent
    }
}
