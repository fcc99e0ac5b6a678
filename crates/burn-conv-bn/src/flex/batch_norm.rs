//! Norm and activation with no convolution before them, forward and backward.

use burn::backend::flex::FlexTensor;
use burn::backend::{Flex, TensorMetadata};
use burn::tensor::Shape;
use burn_conv_bn_cpu::{
    Affine, InputGradCoefficients, NormBackward, Planes, Real, moments, norm_grad_sums,
    norm_input_grad, normalize_into,
};

use super::norm::{HostNorm, channel_grad, rounded, times};
use super::tensor::{Kernel, contiguous, host, kernel_activation, slice, tensor, updated};
use crate::backend::{
    BatchNormBackwardOptions, NormGrads, NormInputs, NormOutput, NormSaved, NormStatistics,
    OptionalTensor, RunningStatistics,
};
use crate::portable;
use crate::spec::{BatchNormOptions, StatisticsKind};

/// Sizes of `[batch, channels, spatial..]`.
fn planes(shape: &Shape) -> Planes {
    Planes {
        batch: shape[0],
        channels: shape[1],
        positions: shape.iter().skip(2).product(),
    }
}

/// The norm of those statistics; those of a batch are biased.
fn host_norm<T: Real>(
    options: BatchNormOptions,
    statistics: StatisticsKind,
    planes: Planes,
    variance: &[T],
) -> HostNorm {
    match statistics {
        StatisticsKind::Batch => {
            HostNorm::of_batch(options.norm, planes.batch * planes.positions, variance)
        }
        StatisticsKind::Fixed => HostNorm::given(options.norm, variance),
    }
}

/// Gamma and beta's share of the norm: `gamma * s`, and beta or zeros.
fn scale_and_shift<E: Kernel>(
    norm: &HostNorm,
    gamma: Option<Vec<E::Real>>,
    beta: &OptionalTensor<Flex>,
) -> [Vec<E::Real>; 2] {
    let scale = norm.scale::<E::Real>(gamma);
    let shift = beta.as_option().map(host::<E::Real>);
    let shift = shift.unwrap_or_else(|| vec![E::Real::ZERO; scale.len()]);
    [scale, shift]
}

pub(super) fn forward<E: Kernel>(
    inputs: NormInputs<Flex>,
    options: BatchNormOptions,
) -> NormOutput<Flex> {
    let input = contiguous(&inputs.input);
    let shape = input.shape();
    let planes = planes(&shape);
    let kind = inputs.statistics.kind();
    let (mean, variance) = match &inputs.statistics {
        NormStatistics::Batch => {
            let moments = moments(planes, slice::<E>(&input));
            let mean = rounded::<E::Real>(moments.mean.iter().copied());
            (mean, rounded::<E::Real>(moments.variance()))
        }
        NormStatistics::Known { mean, variance } | NormStatistics::Fixed { mean, variance } => {
            (host::<E::Real>(mean), host::<E::Real>(variance))
        }
    };
    let norm = host_norm(options, kind, planes, &variance);
    let gamma = inputs.gamma.as_option().map(host);
    let [scale, shift] = scale_and_shift::<E>(&norm, gamma, &inputs.beta);
    let affine = Affine {
        mean: &mean,
        scale: &scale,
        shift: &shift,
    };
    let mut output = Vec::<E>::new();
    normalize_into(
        planes,
        slice::<E>(&input),
        affine,
        None,
        kernel_activation(options.activation),
        &mut output,
    );
    let per_channel = Shape::new([planes.channels]);
    NormOutput {
        output: tensor(output, &shape),
        mean: tensor(mean, &per_channel),
        variance: tensor(variance, &per_channel),
        running: RunningStatistics::Absent,
    }
}

pub(super) fn backward<E: Kernel>(
    saved: NormSaved<Flex>,
    options: &BatchNormBackwardOptions,
) -> NormGrads<Flex> {
    if !saved.input.is_present() {
        return portable::batch_norm::backward::<Flex>(saved, options);
    }
    let NormSaved {
        output_grad,
        input,
        gamma,
        beta,
        mean,
        variance,
    } = saved;
    let input: FlexTensor = input.into_option().expect("it is there");
    let planes = planes(&input.shape());
    let output_grad = contiguous(&output_grad);
    let (mean, variance) = (host::<E::Real>(&mean), host::<E::Real>(&variance));
    let norm = host_norm(options.options, options.statistics, planes, &variance);
    let gamma = gamma.as_option().map(host::<E::Real>);
    let [scale, shift] = scale_and_shift::<E>(&norm, gamma.clone(), &beta);
    let pass = NormBackward {
        planes,
        output_grad: slice::<E>(&output_grad),
        affine: Affine {
            mean: &mean,
            scale: &scale,
            shift: &shift,
        },
        activation: kernel_activation(options.options.activation),
    };
    let wanted = options.wanted;
    let is_of_batch = options.statistics == StatisticsKind::Batch;
    let sums = (is_of_batch || wanted.gamma || wanted.beta).then(|| {
        let input = contiguous(&input);
        norm_grad_sums(&pass, slice::<E>(&input))
    });
    let input_grad = wanted.input.then(|| {
        let coefficients = sums.as_ref().filter(|_| is_of_batch).map(|sums| {
            let (slope, offset) =
                norm.input_grad(gamma.as_deref(), &sums.grad, &sums.grad_deviation);
            [slope, offset].map(|values| rounded::<E::Real>(values.into_iter()))
        });
        let coefficients = coefficients
            .as_ref()
            .map(|[slope, offset]| InputGradCoefficients {
                scale: &scale,
                slope,
                offset,
            });
        updated::<E>(input, |values| norm_input_grad(&pass, coefficients, values))
    });
    let sums = sums.map(|sums| (times(&norm.inv_std, &sums.grad_deviation), sums.grad));
    let (gamma_grad, beta_grad) = sums.unzip();
    let parameter = |wanted: bool, grad: Option<Vec<f64>>| match grad {
        Some(grad) => channel_grad::<E>(wanted, grad, options.norm_dtype),
        None => OptionalTensor::Absent,
    };
    NormGrads {
        input: input_grad.into(),
        gamma: parameter(wanted.gamma, gamma_grad),
        beta: parameter(wanted.beta, beta_grad),
    }
}
