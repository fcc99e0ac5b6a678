//! Max pools on CubeCL devices, alone and behind a block: one byte for each output is kept.

use burn::tensor::ops::MaxPoolOptions;
use burn_conv_bn_cubecl::{
    Activation as KernelActivation, Affine as KernelAffine, PoolArgmax, PoolWindow, max_pool,
    max_pool_backward,
};
use burn_cubecl::CubeBackend;
use burn_cubecl::kernel::untile;
use burn_cubecl::tensor::CubeTensor;

use super::sweeps::{Kernels, batch_statistics, kernel_activation};
use crate::backend::{
    ConvBnGrads, ConvBnInputs, ConvBnMaxPoolBackwardOptions, ConvBnMaxPoolForward, ConvBnSaved,
    MaxPoolBackwardOptions, MaxPoolForward,
};
use crate::portable::conv;
use crate::portable::conv_bn::backward_by;
use crate::spec::{ConvBnOptions, ConvBnProblem, MaxPoolProblem};

pub(super) fn forward(
    input: CubeTensor,
    options: MaxPoolOptions<2>,
) -> MaxPoolForward<CubeBackend> {
    let window = window(&options);
    match MaxPoolProblem::of_regular_windows(input.meta.shape().clone(), options) {
        None => MaxPoolForward::Unsupported,
        Some(_) => {
            let pooled = max_pool(&untile(input), None, KernelActivation::Identity, window);
            MaxPoolForward::Pooled {
                output: pooled.output,
                argmax: pooled.argmax,
            }
        }
    }
}

pub(super) fn backward(
    output_grad: CubeTensor,
    argmax: CubeTensor,
    options: &MaxPoolBackwardOptions,
) -> CubeTensor {
    let pool = PoolArgmax {
        window: window(&options.options),
        argmax,
        first_image: 0,
    };
    let size = [options.input_shape[2], options.input_shape[3]];
    max_pool_backward(&untile(output_grad), &pool, size)
}

/// The block and the pool: the tensor between the two is never in memory.
pub(super) fn joined_forward(
    inputs: ConvBnInputs<CubeBackend>,
    options: &ConvBnOptions,
    pool: MaxPoolOptions<2>,
    keep_conv_output: bool,
) -> ConvBnMaxPoolForward<CubeBackend> {
    let shapes = [&inputs.input, &inputs.weight].map(|tensor| tensor.meta.shape().clone());
    let [input, weight] = shapes;
    let problem =
        ConvBnProblem::conv(input, weight, &options.conv).unwrap_or_else(|error| panic!("{error}"));
    let (statistics, residual) = (inputs.statistics.kind(), inputs.residual.is_present());
    let window = window(&pool);
    if MaxPoolProblem::behind_block(problem.output, statistics, residual, pool).is_none() {
        return ConvBnMaxPoolForward::Unsupported;
    }
    let spec = &options.conv;
    let conv_output =
        conv::forward::<CubeBackend, Kernels>(inputs.input, inputs.weight, None, spec);
    let affine = KernelAffine {
        gamma: inputs.gamma.as_option(),
        beta: inputs.beta.as_option(),
    };
    let statistics = batch_statistics(&conv_output, affine, options.norm, inputs.running);
    let activation = kernel_activation(options.activation);
    let pooled = max_pool(&conv_output, Some(&statistics.table), activation, window);
    ConvBnMaxPoolForward::Pooled {
        output: pooled.output,
        argmax: pooled.argmax,
        mean: statistics.moments.mean,
        variance: statistics.moments.variance,
        running: statistics.running,
        conv_output: keep_conv_output.then_some(conv_output).into(),
        // z is recomputed for its gradient, and the sums read it on the way.
        inverts: false,
    }
}

pub(super) fn joined_backward(
    saved: ConvBnSaved<CubeBackend>,
    argmax: CubeTensor,
    options: &ConvBnMaxPoolBackwardOptions,
) -> ConvBnGrads<CubeBackend> {
    let conv_bn = &options.conv_bn;
    let pool = if saved.mean.is_present() {
        Some(PoolArgmax {
            window: window(&options.pool),
            argmax,
            first_image: 0,
        })
    } else {
        conv_bn.assert_plain_sums();
        None
    };
    backward_by::<CubeBackend, Kernels>(saved, pool, conv_bn)
}

fn window(options: &MaxPoolOptions<2>) -> PoolWindow {
    PoolWindow {
        kernel_size: options.kernel_size,
        stride: options.stride,
        padding: options.padding.map(|(before, _)| before),
    }
}
