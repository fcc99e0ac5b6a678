//! The backward pass, with and without a max pool behind.

use burn::backend::flex::FlexTensor;
use burn::backend::{Flex, TensorMetadata};
use burn::tensor::ops::MaxPoolOptions;
use burn::tensor::{DType, f16};
use burn_conv_bn_cpu::{
    Activation as KernelActivation, Affine, Backward, ConvOutput, Gradients, Gram,
    InputGradCoefficients, OutputGrad, PooledGrad, Real, backward, grad_sums, pooled_grad_sums,
};

use super::max_pool;
use super::norm::{HostNorm, center, channel_grad, rounded, times};
use super::tensor::{
    Kernel, contiguous, geometry, host, kernel_activation, numbers, output_shape, slice, tensor,
};
use crate::backend::{ConvBnBackwardOptions, ConvBnGrads, ConvBnSaved};
use crate::portable::{self, cast};
use crate::spec::{Derivative, StatisticsKind};

/// The max pool that is one op with the block.
pub(super) struct JoinedPool {
    pub(super) argmax: FlexTensor,
    pub(super) options: MaxPoolOptions<2>,
}

/// Largest abs(beta) / std(output) at which z is recovered from the pooled output; its rounding error grows
/// by this factor.
const MOST_SHIFT: f64 = 8.0;

/// Smallest std(output), in units of the smallest normal number, at which outputs have full precision.
const LEAST_SPREAD: f64 = 256.0;

/// Whether the norm's input is recovered from the output in every channel.
fn inverts_norm<E: Kernel>(
    variance: &[E::Real],
    scale: &[E::Real],
    shift: Option<&[E::Real]>,
) -> bool {
    let least = match E::dtype() {
        DType::F64 => f64::MIN_POSITIVE,
        DType::F16 => f16::MIN_POSITIVE.to_f64(),
        _ => f64::from(f32::MIN_POSITIVE),
    };
    scale
        .iter()
        .zip(variance)
        .enumerate()
        .all(|(channel, (scale, variance))| {
            let spread = Real::to_f64(*scale).abs() * Real::to_f64(*variance).sqrt();
            let shift = shift.map_or(0.0, |shift| Real::to_f64(shift[channel]).abs());
            spread.is_finite() && spread >= LEAST_SPREAD * least && shift <= MOST_SHIFT * spread
        })
}

/// The requested gradients. With a joined pool, `output_grad` and `output` are the pool's.
// Long: `pass` borrows from the tensors before it, and every step after it from `pass`.
pub(super) fn kernel_backward<E: Kernel>(
    saved: ConvBnSaved<Flex>,
    joined: Option<&JoinedPool>,
    options: &ConvBnBackwardOptions,
) -> ConvBnGrads<Flex> {
    let (Some(mean), Some(variance)) = (
        saved.mean.as_option().map(host::<E::Real>),
        saved.variance.as_option().map(host::<E::Real>),
    ) else {
        if joined.is_some() {
            options.assert_plain_sums();
        }
        return portable::conv_bn::backward::<Flex>(saved, options);
    };
    let ConvBnSaved {
        output_grad,
        input,
        weight,
        bias,
        gamma,
        beta,
        conv_output,
        output,
        residual,
        ..
    } = saved;
    let wanted = options.wanted;
    let geometry = geometry(
        [&options.input_shape, &options.weight_shape],
        &options.options.conv,
        options.options.max_workspace,
    );
    let geometry = match options.statistics {
        StatisticsKind::Batch => geometry,
        StatisticsKind::Fixed => geometry.with_given_statistics(),
    };
    let channels = geometry.channels_out();
    let output_grad = contiguous(&output_grad);
    let input = input.as_option().map(contiguous);
    let weight = weight.as_option().map(contiguous);
    let output = output.as_option().map(contiguous);
    let residual = residual.as_option().map(contiguous);
    let gamma = gamma.as_option().map(host::<E::Real>);
    let zeros = vec![E::Real::ZERO; channels];
    let weight = weight.as_ref().map(numbers::<E::Real>);
    let values = geometry.batch() * geometry.positions();
    let activation = kernel_activation(options.options.activation);

    let batch_norm = (options.statistics == StatisticsKind::Batch)
        .then(|| HostNorm::of_batch(options.options.norm, values, &variance));
    let scale = match &batch_norm {
        Some(norm) => norm.scale::<E::Real>(gamma.clone()),
        None => HostNorm::given(options.options.norm, &variance).scale(gamma.clone()),
    };
    let shift = beta.as_option().map(host::<E::Real>);
    // Batch statistics exclude the bias already.
    let center = match &batch_norm {
        Some(_) => mean,
        None => center(&mean, bias.as_option().map(host)),
    };
    let affine = Affine {
        mean: &center,
        scale: &scale,
        shift: shift.as_deref().unwrap_or(&zeros),
    };
    let conv_output_shape = output_shape(&options.input_shape, &geometry);
    let pool = joined.map(|joined| {
        max_pool::geometry(&conv_output_shape, &joined.options)
            .expect("the forward pass had a kernel for the same window")
    });
    let pass = Backward {
        geometry: &geometry,
        input: input.as_ref().map(slice::<E>),
        weight: weight.as_deref(),
        output_grad: match joined.zip(pool.as_ref()) {
            Some((joined, geometry)) => OutputGrad::Pooled(PooledGrad {
                geometry,
                output_grad: slice(&output_grad),
                argmax: slice(&joined.argmax),
            }),
            None => OutputGrad::Whole(slice(&output_grad)),
        },
        affine,
        activation,
        residual: residual.as_ref().map(slice),
        // The pooled output serves the two sums only, below.
        output: output.as_ref().filter(|_| joined.is_none()).map(slice),
    };
    let invertible = output
        .as_ref()
        .filter(|_| joined.is_some() && inverts_norm::<E>(&variance, &scale, shift.as_deref()));

    // The convolution's output: saved in forward, replaced by products of the input, stored between the two steps if that
    // saves time and fits the workspace, or recomputed in each step. Under given statistics only the activation may need it.
    let is_needed =
        batch_norm.is_some() || options.options.activation.derivative() == Derivative::OfValue;
    let kept = conv_output.as_option().map(contiguous);
    let bytes = size_of::<E>() * conv_output_shape.num_elements();
    let by_products = batch_norm.is_some() && wanted.weight && pass.allows_gram();
    let stores = is_needed
        && kept.is_none()
        && invertible.is_none()
        && geometry.is_worth_storing(bytes)
        && options
            .options
            .max_workspace
            .is_none_or(|most| bytes <= most);
    let (mut stored, mut gram) = (Vec::<E>::new(), Gram::default());
    let available = match (&kept, is_needed) {
        (Some(kept), _) => Some(slice::<E>(kept)),
        (None, false) => Some(slice(&output_grad)),
        (None, true) => None,
    };
    let mut conv_output = match available {
        Some(conv_output) => ConvOutput::Kept(conv_output),
        None if by_products => ConvOutput::Gram(&mut gram),
        None if stores => ConvOutput::Store(&mut stored),
        None => ConvOutput::Recompute,
    };
    let sums = match invertible {
        Some(pooled) => pooled_grad_sums(&pass, slice(pooled)),
        None => grad_sums(&pass, conv_output.reborrow()),
    };

    let wants_fixed_gamma = wanted.gamma && batch_norm.is_none();
    let mut weight_grad = (wanted.weight || wants_fixed_gamma).then(Vec::<E::Real>::new);
    let mut input_grad = wanted.input.then(Vec::<E>::new);
    // Without an activation the residual's gradient is the output's.
    let mut residual_grad =
        (wanted.residual && activation != KernelActivation::Identity).then(Vec::<E>::new);
    if weight_grad.is_some() || input_grad.is_some() || residual_grad.is_some() {
        let coefficients = batch_norm.as_ref().map(|norm| {
            let (slope, offset) =
                norm.input_grad(gamma.as_deref(), &sums.grad, &sums.grad_deviation);
            [slope, offset].map(|values| rounded::<E::Real>(values.into_iter()))
        });
        backward(
            &pass,
            conv_output,
            coefficients
                .as_ref()
                .map(|[slope, offset]| InputGradCoefficients {
                    scale: &scale,
                    slope,
                    offset,
                }),
            Gradients {
                input: input_grad.as_mut().map(|grad| {
                    let weight = pass.weight.expect("the plan keeps it for this gradient");
                    (grad, weight)
                }),
                weight: weight_grad.as_mut(),
                residual: residual_grad.as_mut(),
            },
        );
    }

    let (bias_grad, gamma_grad) = match &batch_norm {
        Some(norm) => (
            vec![0.0; channels],
            times(&norm.inv_std, &sums.grad_deviation),
        ),
        None => {
            let norm = HostNorm::given(options.options.norm, &variance);
            let dots = match (pass.weight, &weight_grad) {
                (Some(weight), Some(folded_grad)) => row_dots(weight, folded_grad, channels),
                _ => vec![0.0; channels],
            };
            if let Some(grad) = &mut weight_grad {
                scale_rows(grad, &scale);
            }
            let scale: Vec<f64> = scale.iter().map(|scale| Real::to_f64(*scale)).collect();
            (
                times(&scale, &sums.grad),
                fixed_gamma_grad(&norm, &dots, &center, &sums.grad),
            )
        }
    };
    let residual_grad = match residual_grad {
        Some(grad) => Some(tensor(grad, &output_grad.shape())),
        None => wanted.residual.then_some(output_grad),
    };
    let norm_dtype = options.norm_dtype;
    ConvBnGrads {
        input: input_grad
            .map(|grad| tensor(grad, &options.input_shape))
            .into(),
        weight: weight_grad
            .filter(|_| wanted.weight)
            .map(|grad| cast::<Flex>(tensor(grad, &options.weight_shape), E::dtype()))
            .into(),
        bias: channel_grad::<E>(wanted.bias, bias_grad, E::dtype()),
        gamma: channel_grad::<E>(wanted.gamma, gamma_grad, norm_dtype),
        beta: channel_grad::<E>(wanted.beta, sums.grad, norm_dtype),
        residual: residual_grad.into(),
    }
}

/// Gamma's gradient under given statistics, from the dot products of the weight with the folded
/// weight's gradient: `sum(g * (z - mean)) = <weight, wgrad(input, g)> - (mean - bias) * sum(g)`.
fn fixed_gamma_grad<T: Real>(
    norm: &HostNorm,
    dots: &[f64],
    center: &[T],
    grad_sums: &[f64],
) -> Vec<f64> {
    let deviation_sums: Vec<f64> = dots
        .iter()
        .zip(center)
        .zip(grad_sums)
        .map(|((dot, center), grad)| dot - center.to_f64() * grad)
        .collect();
    times(&norm.inv_std, &deviation_sums)
}

/// Multiplies each row of `[channels, ..]` by its scale.
fn scale_rows<T: Real>(rows: &mut [T], scale: &[T]) {
    let len = rows.len() / scale.len();
    for (row, scale) in rows.chunks_exact_mut(len).zip(scale) {
        for value in row {
            *value = *value * *scale;
        }
    }
}

/// Dot product of each row of `[channels, ..]` with its counterpart.
fn row_dots<T: Real>(a: &[T], b: &[T], channels: usize) -> Vec<f64> {
    let len = a.len() / channels;
    a.chunks_exact(len)
        .zip(b.chunks_exact(len))
        .map(|(a, b)| a.iter().zip(b).map(|(a, b)| a.to_f64() * b.to_f64()).sum())
        .collect()
}
