//! The forward pass, with and without a max pool behind.

use burn::backend::flex::FlexTensor;
use burn::backend::{Flex, TensorMetadata};
use burn::tensor::Shape;
use burn::tensor::ops::MaxPoolOptions;
use burn_conv_bn_cpu::{
    Affine, Geometry, Planes, PoolGeometry, Real, conv, conv_moments, normalize, normalize_into,
    normalize_max_pool,
};

use super::max_pool;
use super::norm::{HostNorm, center, rounded};
use super::tensor::{
    Kernel, contiguous, geometry, host, kernel_activation, numbers, output_shape, slice, tensor,
};
use crate::backend::{
    ConvBnForward, ConvBnInputs, ConvBnMaxPoolForward, RunningStatistics, Statistics,
};
use crate::spec::{ConvBnOptions, NormSpec, SavePlan};

/// Results of the forward pass. With a pool behind the block, output and argmax are the pool's.
struct Forward {
    output: FlexTensor,
    argmax: Option<FlexTensor>,
    mean: FlexTensor,
    variance: FlexTensor,
    conv_output: Option<FlexTensor>,
}

pub(super) fn kernel_forward<E: Kernel>(
    inputs: ConvBnInputs<Flex>,
    options: &ConvBnOptions,
    keep_conv_output: bool,
) -> ConvBnForward<Flex> {
    let forward = forward::<E>(inputs, options, None, keep_conv_output);
    ConvBnForward {
        output: forward.output,
        mean: forward.mean,
        variance: forward.variance,
        running: RunningStatistics::Absent,
        conv_output: forward.conv_output.into(),
    }
}

/// The forward pass joined with a max pool, if the backward pass can be joined too.
pub(super) fn kernel_forward_max_pool<E: Kernel>(
    inputs: ConvBnInputs<Flex>,
    options: &ConvBnOptions,
    pool: &MaxPoolOptions<2>,
    keep_conv_output: bool,
) -> ConvBnMaxPoolForward<Flex> {
    let Some(pool) = joined_geometry(&inputs, options, pool) else {
        return ConvBnMaxPoolForward::Unsupported;
    };
    let forward = forward::<E>(inputs, options, Some(&pool), keep_conv_output);
    ConvBnMaxPoolForward::Pooled {
        output: forward.output,
        argmax: forward.argmax.expect("there is a pool"),
        mean: forward.mean,
        variance: forward.variance,
        running: RunningStatistics::Absent,
        conv_output: forward.conv_output.into(),
        inverts: true,
    }
}

/// Geometry of the pool behind the block, if the two are one op.
fn joined_geometry(
    inputs: &ConvBnInputs<Flex>,
    options: &ConvBnOptions,
    pool: &MaxPoolOptions<2>,
) -> Option<PoolGeometry> {
    if !SavePlan::joins_max_pool(inputs.statistics.kind(), inputs.residual.is_present()) {
        return None;
    }
    let input = inputs.input.shape();
    let shapes = [&input, &inputs.weight.shape()];
    let geometry = geometry(shapes, &options.conv, options.max_workspace);
    let pool = max_pool::geometry(&output_shape(&input, &geometry), pool);
    pool.filter(PoolGeometry::is_regular)
}

fn forward<E: Kernel>(
    inputs: ConvBnInputs<Flex>,
    options: &ConvBnOptions,
    pool: Option<&PoolGeometry>,
    keep_conv_output: bool,
) -> Forward {
    let (input, weight) = (contiguous(&inputs.input), contiguous(&inputs.weight));
    let shapes = [&input.shape(), &weight.shape()];
    let geometry = geometry(shapes, &options.conv, options.max_workspace);
    let output_shape = output_shape(&input.shape(), &geometry);
    let channels = geometry.channels_out();

    let weight = numbers::<E::Real>(&weight);
    let mut values = Vec::<E>::new();
    let (center, mean, variance, norm) = match &inputs.statistics {
        Statistics::Batch => {
            let (mean, variance, norm) = conv_of_batch(
                &geometry,
                slice::<E>(&input),
                &weight,
                options.norm,
                &mut values,
            );
            (mean.clone(), mean, variance, norm)
        }
        Statistics::Fixed { mean, variance } => {
            let bounded = geometry.clone().with_given_statistics();
            conv(&bounded, slice::<E>(&input), &weight, &mut values);
            let (mean, variance) = (host::<E::Real>(mean), host::<E::Real>(variance));
            let center = center(&mean, inputs.bias.as_option().map(host));
            let norm = HostNorm::given(options.norm, &variance);
            (center, mean, variance, norm)
        }
    };

    let scale = norm.scale::<E::Real>(inputs.gamma.as_option().map(host));
    let shift = inputs.beta.as_option().map(host);
    let affine = Affine {
        mean: &center,
        scale: &scale,
        shift: &shift.unwrap_or_else(|| vec![<E::Real as Real>::ZERO; channels]),
    };
    let residual = inputs.residual.as_option().map(contiguous);
    let residual = residual.as_ref().map(slice::<E>);
    let activation = kernel_activation(options.activation);
    let (mut output, mut argmax) = (Vec::new(), Vec::new());
    let mut pooled_shape = output_shape.clone();
    if let Some(pool) = pool {
        normalize_max_pool(
            &geometry,
            &values,
            affine,
            activation,
            pool,
            &mut output,
            &mut argmax,
        );
        [pooled_shape[2], pooled_shape[3]] = pool.output();
    } else if keep_conv_output {
        let planes = Planes::from(&geometry);
        normalize_into(planes, &values, affine, residual, activation, &mut output);
    } else {
        normalize(&geometry, &mut values, affine, residual, activation);
        output = core::mem::take(&mut values);
    }

    let per_channel = Shape::new([channels]);
    Forward {
        output: tensor(output, &pooled_shape),
        argmax: pool.map(|_| tensor(argmax, &pooled_shape)),
        mean: tensor(mean, &per_channel),
        variance: tensor(variance, &per_channel),
        conv_output: keep_conv_output.then(|| tensor(values, &output_shape)),
    }
}

/// The convolution, the mean and variance of its output, and their norm.
fn conv_of_batch<E: Kernel>(
    geometry: &Geometry,
    input: &[E],
    weight: &[E::Real],
    norm: NormSpec,
    values: &mut Vec<E>,
) -> (Vec<E::Real>, Vec<E::Real>, HostNorm) {
    let moments = conv_moments(geometry, input, weight, values);
    let mean = rounded::<E::Real>(moments.mean.iter().copied());
    let variance = rounded::<E::Real>(moments.variance());
    let count = geometry.batch() * geometry.positions();
    let norm = HostNorm::of_batch(norm, count, &variance);
    (mean, variance, norm)
}
