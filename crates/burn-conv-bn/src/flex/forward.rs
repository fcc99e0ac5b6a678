//! The forward pass, with and without a max pool behind.

use burn::backend::{Flex, TensorMetadata};
use burn::tensor::Shape;
use burn::tensor::ops::MaxPoolOptions;
use burn_conv_bn_cpu::{
    Affine, Geometry, Planes, Real, conv, conv_moments, normalize, normalize_into,
    normalize_max_pool,
};

use super::max_pool;
use super::norm::{HostNorm, center, rounded};
use super::tensor::{
    Kernel, contiguous, geometry, host, kernel_activation, numbers, output_shape, slice, tensor,
};
use crate::backend::{ConvBnForward, ConvBnInputs, ConvBnMaxPoolForward, Statistics};
use crate::spec::{ConvBnOptions, NormSpec, SavePlan};

pub(super) fn kernel_forward<E: Kernel>(
    inputs: ConvBnInputs<Flex>,
    options: &ConvBnOptions,
    keep_conv_output: bool,
) -> ConvBnForward<Flex> {
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
    let (output, kept) = if keep_conv_output {
        let mut output = Vec::new();
        let planes = Planes::from(&geometry);
        normalize_into(planes, &values, affine, residual, activation, &mut output);
        (output, Some(tensor(values, &output_shape)))
    } else {
        normalize(&geometry, &mut values, affine, residual, activation);
        (values, None)
    };

    let per_channel = Shape::new([channels]);
    ConvBnForward {
        output: tensor(output, &output_shape),
        mean: tensor(mean, &per_channel),
        variance: tensor(variance, &per_channel),
        conv_output: kept.into(),
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

/// The forward pass joined with a max pool, if the backward pass can be joined too.
pub(super) fn kernel_forward_max_pool<E: Kernel>(
    inputs: ConvBnInputs<Flex>,
    options: &ConvBnOptions,
    pool: &MaxPoolOptions<2>,
    keep_conv_output: bool,
) -> ConvBnMaxPoolForward<Flex> {
    let residual = inputs.residual.is_present();
    if !SavePlan::joins_max_pool(inputs.statistics.kind(), residual) {
        return ConvBnMaxPoolForward::Unsupported;
    }
    let (input, weight) = (contiguous(&inputs.input), contiguous(&inputs.weight));
    let shapes = [&input.shape(), &weight.shape()];
    let geometry = geometry(shapes, &options.conv, options.max_workspace);
    let output_shape = output_shape(&input.shape(), &geometry);
    let pool = match max_pool::geometry(&output_shape, pool) {
        Some(pool) if pool.is_regular() => pool,
        _ => return ConvBnMaxPoolForward::Unsupported,
    };
    let mut values = Vec::<E>::new();
    let weight = numbers::<E::Real>(&weight);
    let (mean, variance, norm) = conv_of_batch(
        &geometry,
        slice::<E>(&input),
        &weight,
        options.norm,
        &mut values,
    );
    let scale = norm.scale::<E::Real>(inputs.gamma.as_option().map(host));
    let channels = geometry.channels_out();
    let shift = inputs.beta.as_option().map(host);
    let affine = Affine {
        mean: &mean,
        scale: &scale,
        shift: &shift.unwrap_or_else(|| vec![<E::Real as Real>::ZERO; channels]),
    };
    let (mut output, mut argmax) = (Vec::new(), Vec::new());
    let activation = kernel_activation(options.activation);
    normalize_max_pool(
        &geometry,
        &values,
        affine,
        activation,
        &pool,
        &mut output,
        &mut argmax,
    );
    let [height, width] = pool.output();
    let pooled = Shape::new([output_shape[0], channels, height, width]);
    let per_channel = Shape::new([channels]);
    ConvBnMaxPoolForward::Pooled {
        output: tensor(output, &pooled),
        argmax: tensor(argmax, &pooled),
        mean: tensor(mean, &per_channel),
        variance: tensor(variance, &per_channel),
        conv_output: keep_conv_output
            .then(|| tensor(values, &output_shape))
            .into(),
        inverts: true,
    }
}
