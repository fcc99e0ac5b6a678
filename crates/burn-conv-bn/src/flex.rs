//! `ConvBnBackend` on Flex, by the kernels of `burn-conv-bn-cpu`.
//!
//! Gradients that need no statistics, such as that of the norm's shift alone, take the portable
//! bodies.

mod max_pool;

use std::borrow::Cow;

use burn::backend::flex::FlexTensor;
use burn::backend::{Flex, TensorMetadata};
use burn::tensor::ops::MaxPoolOptions;
use burn::tensor::{DType, Element, Shape, TensorData, bf16, f16};
use burn_conv_bn_cpu::{
    Activation as KernelActivation, Affine, Backward, ConvOutput, Element as KernelElement,
    Geometry, Gradients, InputGradCoefficients, OutputGrad, PooledGrad, Real, backward, conv,
    conv_moments, grad_sums, normalize, normalize_max_pool, pooled_grad_sums,
};
use bytemuck::Pod;

use crate::backend::{
    ConvBnBackend, ConvBnBackwardOptions, ConvBnForward, ConvBnGrads, ConvBnInputs,
    ConvBnMaxPoolBackwardOptions, ConvBnMaxPoolForward, ConvBnSaved, MaxPoolBackwardOptions,
    MaxPoolForward, OptionalTensor, Statistics,
};
use crate::portable::{self, cast};
use crate::spec::{
    Activation, ConvBnOptions, ConvSpec, Derivative, NormSpec, NormVariant, Parents, SavePlan,
    StatisticsKind,
};

impl ConvBnBackend for Flex {
    fn conv_bn_forward(
        inputs: ConvBnInputs<Self>,
        options: ConvBnOptions,
        keep_conv_output: bool,
    ) -> ConvBnForward<Self> {
        match inputs.input.dtype() {
            DType::F32 => kernel_forward::<f32>(inputs, &options, keep_conv_output),
            DType::F64 => kernel_forward::<f64>(inputs, &options, keep_conv_output),
            DType::F16 => kernel_forward::<f16>(inputs, &options, keep_conv_output),
            DType::BF16 => kernel_forward::<bf16>(inputs, &options, keep_conv_output),
            _ => portable::conv_bn::forward::<Self>(inputs, &options, keep_conv_output),
        }
    }

    fn conv_bn_backward(
        saved: ConvBnSaved<Self>,
        options: ConvBnBackwardOptions,
    ) -> ConvBnGrads<Self> {
        match saved.output_grad.dtype() {
            DType::F32 => kernel_backward::<f32>(saved, None, &options),
            DType::F64 => kernel_backward::<f64>(saved, None, &options),
            DType::F16 => kernel_backward::<f16>(saved, None, &options),
            DType::BF16 => kernel_backward::<bf16>(saved, None, &options),
            _ => portable::conv_bn::backward::<Self>(saved, &options),
        }
    }

    fn conv_bn_max_pool_forward(
        inputs: ConvBnInputs<Self>,
        options: ConvBnOptions,
        pool: MaxPoolOptions<2>,
    ) -> ConvBnMaxPoolForward<Self> {
        match inputs.input.dtype() {
            DType::F32 => kernel_forward_max_pool::<f32>(inputs, &options, &pool),
            DType::F64 => kernel_forward_max_pool::<f64>(inputs, &options, &pool),
            DType::F16 => kernel_forward_max_pool::<f16>(inputs, &options, &pool),
            DType::BF16 => kernel_forward_max_pool::<bf16>(inputs, &options, &pool),
            _ => ConvBnMaxPoolForward::Unsupported,
        }
    }

    fn conv_bn_max_pool_backward(
        saved: ConvBnSaved<Self>,
        places: FlexTensor,
        options: ConvBnMaxPoolBackwardOptions,
    ) -> ConvBnGrads<Self> {
        let ConvBnMaxPoolBackwardOptions { conv_bn, pool } = options;
        let behind = Behind {
            places: contiguous(&places),
            options: pool,
        };
        match saved.output_grad.dtype() {
            DType::F32 => kernel_backward::<f32>(saved, Some(&behind), &conv_bn),
            DType::F64 => kernel_backward::<f64>(saved, Some(&behind), &conv_bn),
            DType::F16 => kernel_backward::<f16>(saved, Some(&behind), &conv_bn),
            DType::BF16 => kernel_backward::<bf16>(saved, Some(&behind), &conv_bn),
            dtype => panic!("no max pool of {dtype:?} has places"),
        }
    }

    fn max_pool(input: FlexTensor, options: MaxPoolOptions<2>) -> FlexTensor {
        max_pool::untracked(input, &options)
    }

    fn max_pool_forward(input: FlexTensor, options: MaxPoolOptions<2>) -> MaxPoolForward<Self> {
        max_pool::forward(&input, &options)
    }

    fn max_pool_backward(
        output_grad: FlexTensor,
        places: FlexTensor,
        options: MaxPoolBackwardOptions,
    ) -> FlexTensor {
        max_pool::backward(&output_grad, &places, &options)
    }
}

/// The element types of activations that the kernels take.
trait Kernel: KernelElement<Real: Number> + Element + Pod {}
impl<E: KernelElement<Real: Number> + Element + Pod> Kernel for E {}

/// What the kernels compute in.
trait Number: Real + Element + Pod {}
impl<T: Real + Element + Pod> Number for T {}

fn kernel_forward<E: Kernel>(
    inputs: ConvBnInputs<Flex>,
    options: &ConvBnOptions,
    keep_conv_output: bool,
) -> ConvBnForward<Flex> {
    let (input, weight) = (contiguous(&inputs.input), contiguous(&inputs.weight));
    let geometry = geometry(&input.shape(), &weight.shape(), &options.conv);
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
            conv(&geometry, slice::<E>(&input), &weight, &mut values);
            let (mean, variance) = (host::<E::Real>(mean), host::<E::Real>(variance));
            let center = center(&mean, inputs.bias.as_option().map(host));
            let norm = HostNorm::given(options.norm, &variance);
            (center, mean, variance, norm)
        }
    };
    let kept = keep_conv_output.then(|| tensor(values.clone(), &output_shape));

    let scale = norm.scale::<E::Real>(inputs.gamma.as_option().map(host));
    let shift = inputs.beta.as_option().map(host);
    let affine = Affine {
        mean: &center,
        scale: &scale,
        shift: &shift.unwrap_or_else(|| vec![E::Real::ZERO; channels]),
    };
    let residual = inputs.residual.as_option().map(contiguous);
    let residual = residual.as_ref().map(slice::<E>);
    let activation = kernel_activation(options.activation);
    normalize(&geometry, &mut values, affine, residual, activation);

    let per_channel = Shape::new([channels]);
    ConvBnForward {
        output: tensor(values, &output_shape),
        mean: tensor(mean, &per_channel),
        variance: tensor(variance, &per_channel),
        conv_output: kept.into(),
    }
}

/// The convolution, with the mean and the variance of its output, and the norm that they make.
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

/// The forward pass with a max pool behind, where its backward pass can be one op with it.
fn kernel_forward_max_pool<E: Kernel>(
    inputs: ConvBnInputs<Flex>,
    options: &ConvBnOptions,
    pool: &MaxPoolOptions<2>,
) -> ConvBnMaxPoolForward<Flex> {
    let residual = inputs.residual.is_present();
    if !SavePlan::joins_max_pool(options, inputs.statistics.kind(), residual) {
        return ConvBnMaxPoolForward::Unsupported;
    }
    let (input, weight) = (contiguous(&inputs.input), contiguous(&inputs.weight));
    let geometry = geometry(&input.shape(), &weight.shape(), &options.conv);
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
        shift: &shift.unwrap_or_else(|| vec![E::Real::ZERO; channels]),
    };
    let (mut output, mut places) = (Vec::new(), Vec::new());
    let activation = kernel_activation(options.activation);
    normalize_max_pool(
        &geometry,
        &values,
        affine,
        activation,
        &pool,
        &mut output,
        &mut places,
    );
    let [height, width] = pool.output();
    let pooled = Shape::new([output_shape[0], channels, height, width]);
    let per_channel = Shape::new([channels]);
    ConvBnMaxPoolForward::Pooled {
        output: tensor(output, &pooled),
        places: tensor(places, &pooled),
        mean: tensor(mean, &per_channel),
        variance: tensor(variance, &per_channel),
    }
}

/// The max pool behind.
struct Behind {
    places: FlexTensor,
    options: MaxPoolOptions<2>,
}

/// Of a channel's shift, how many times the standard deviation of its output may be, for the norm's input
/// to be told from its output: what is lost is the rounding of the output, that many times as large as that
/// of the input's deviation from its mean.
const MOST_SHIFT: f64 = 8.0;

/// Of an output's standard deviation, how many times the least value of full precision it must be, for the
/// outputs to have that, too.
const LEAST_SPREAD: f64 = 256.0;

/// Whether each channel's output tells its input.
fn tells_input<E: Kernel>(
    variance: &[E::Real],
    scale: &[E::Real],
    shift: Option<&[E::Real]>,
) -> bool {
    let (single, double) = (f64::from(f32::MIN_POSITIVE), f64::MIN_POSITIVE);
    let [least, least_scale] = match E::dtype() {
        DType::F64 => [double; 2],
        DType::F16 => [f16::MIN_POSITIVE.to_f64(), single],
        _ => [single; 2],
    };
    scale
        .iter()
        .zip(variance)
        .enumerate()
        .all(|(channel, (scale, variance))| {
            let scale = Real::to_f64(*scale).abs();
            let spread = scale * Real::to_f64(*variance).sqrt();
            let shift = shift.map_or(0.0, |shift| Real::to_f64(shift[channel]).abs());
            spread.is_finite()
                && spread >= LEAST_SPREAD * least
                && scale >= least_scale
                && shift <= MOST_SHIFT * spread
        })
}

/// The gradients; with a max pool behind, from that of its output.
fn kernel_backward<E: Kernel>(
    saved: ConvBnSaved<Flex>,
    behind: Option<&Behind>,
    options: &ConvBnBackwardOptions,
) -> ConvBnGrads<Flex> {
    let (Some(mean), Some(variance)) = (
        saved.mean.as_option().map(host::<E::Real>),
        saved.variance.as_option().map(host::<E::Real>),
    ) else {
        let Parents {
            input,
            weight,
            gamma,
            beta,
            residual,
            ..
        } = options.wanted;
        let is_masked = options.options.activation.derivative() != Derivative::One;
        // The portable body knows no pool; a sum over the pool's gradient is one over its input's.
        assert!(
            behind.is_none() || !(input || weight || gamma || residual || beta && is_masked),
            "a block joined with a max pool: expected mean and variance, which SavePlan::with_max_pool \
             keeps for these gradients, got none ({:?})",
            options.wanted
        );
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
        &options.input_shape,
        &options.weight_shape,
        &options.options.conv,
    );
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
    // A batch's mean is that of the convolution's output without its bias already.
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
    let pool = behind.map(|behind| {
        max_pool::geometry(&conv_output_shape, &behind.options)
            .expect("the forward pass had a kernel for the same window")
    });
    let pass = Backward {
        geometry: &geometry,
        input: input.as_ref().map(slice::<E>),
        weight: weight.as_deref(),
        output_grad: match behind.zip(pool.as_ref()) {
            Some((behind, geometry)) => OutputGrad::Pooled(PooledGrad {
                geometry,
                output_grad: slice(&output_grad),
                places: slice(&behind.places),
            }),
            None => OutputGrad::Whole(slice(&output_grad)),
        },
        affine,
        activation,
        residual: residual.as_ref().map(slice),
        // A pooled one tells the two sums alone.
        output: output.as_ref().filter(|_| behind.is_none()).map(slice),
    };
    let told = output.as_ref().filter(|_| {
        behind.is_some()
            && options.options.activation.passes_unchanged()
            && tells_input::<E>(&variance, &scale, shift.as_deref())
    });

    // The convolution's output: kept since forward, stored between the two steps if that saves time and
    // fits the workspace, or recomputed in each. With given statistics only the activation may depend on it.
    let is_needed =
        batch_norm.is_some() || options.options.activation.derivative() == Derivative::OfValue;
    let kept = conv_output.as_option().map(contiguous);
    let bytes = size_of::<E>() * conv_output_shape.num_elements();
    let stores = is_needed
        && kept.is_none()
        && told.is_none()
        && geometry.is_worth_storing(bytes)
        && options
            .options
            .max_workspace
            .is_none_or(|most| bytes <= most);
    let mut stored = Vec::<E>::new();
    let at_hand = match (&kept, is_needed) {
        (Some(kept), _) => Some(slice::<E>(kept)),
        (None, false) => Some(slice(&output_grad)),
        (None, true) => None,
    };
    let sums = match (told, at_hand) {
        (Some(pooled), _) => pooled_grad_sums(&pass, slice(pooled)),
        (None, Some(conv_output)) => grad_sums(&pass, ConvOutput::Kept(conv_output)),
        (None, None) if stores => grad_sums(&pass, ConvOutput::Store(&mut stored)),
        (None, None) => grad_sums(&pass, ConvOutput::Recompute),
    };

    let wants_fixed_gamma = wanted.gamma && batch_norm.is_none();
    let mut weight_grad = (wanted.weight || wants_fixed_gamma).then(Vec::<E::Real>::new);
    let mut input_grad = wanted.input.then(Vec::<E>::new);
    // Without an activation the residual's gradient is the output's.
    let mut residual_grad =
        (wanted.residual && activation != KernelActivation::Identity).then(Vec::<E>::new);
    if weight_grad.is_some() || input_grad.is_some() || residual_grad.is_some() {
        // With given statistics the norm is folded into the weight.
        let folded = match &batch_norm {
            Some(_) => None,
            None => pass.weight.map(|weight| scaled_rows(weight, &scale)),
        };
        let input_weight = folded.as_deref().or(pass.weight);
        let coefficients = batch_norm.as_ref().map(|norm| {
            let (slope, offset) =
                norm.input_grad(gamma.as_deref(), &sums.grad, &sums.grad_deviation);
            [slope, offset].map(|values| rounded::<E::Real>(values.into_iter()))
        });
        backward(
            &pass,
            at_hand.or(stores.then_some(&stored[..])),
            coefficients
                .as_ref()
                .map(|[slope, offset]| InputGradCoefficients {
                    scale: &scale,
                    slope,
                    offset,
                }),
            Gradients {
                input: input_grad.as_mut().map(|grad| {
                    let weight = input_weight.expect("the plan keeps it for this gradient");
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
            weight_grad = weight_grad.map(|grad| scaled_rows(&grad, &scale));
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
    let optional = |wanted: bool, grad: Vec<f64>, dtype: DType| -> OptionalTensor<Flex> {
        let grad = wanted.then(|| {
            let grad = rounded::<E::Real>(grad.into_iter());
            cast::<Flex>(tensor(grad, &Shape::new([channels])), dtype)
        });
        grad.into()
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
        bias: optional(wanted.bias, bias_grad, E::dtype()),
        gamma: optional(wanted.gamma, gamma_grad, norm_dtype),
        beta: optional(wanted.beta, sums.grad, norm_dtype),
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

/// The maths of the norm's variants on the host, in f64: as `portable::norm::ChannelNorm`.
struct HostNorm {
    norm: NormSpec,
    values: usize,
    variance: Vec<f64>,
    /// `s`.
    inv_std: Vec<f64>,
}

impl HostNorm {
    /// From the biased variance of `values` values a channel.
    fn of_batch<T: Real>(norm: NormSpec, values: usize, biased_variance: &[T]) -> Self {
        let degrees = values - norm.variant.degrees_of_freedom();
        let correction = values as f64 / degrees as f64;
        let variance = biased_variance
            .iter()
            .map(|variance| variance.to_f64() * correction);
        Self::new(norm, values, variance.collect())
    }

    /// From a variance that is used as it is.
    fn given<T: Real>(norm: NormSpec, variance: &[T]) -> Self {
        Self::new(
            norm,
            0,
            variance.iter().map(|variance| variance.to_f64()).collect(),
        )
    }

    fn new(norm: NormSpec, values: usize, variance: Vec<f64>) -> Self {
        let inv_std = variance.iter().map(|variance| match norm.variant {
            NormVariant::BatchNorm => 1.0 / (variance + norm.epsilon).sqrt(),
            NormVariant::Tutorial => 1.0 / (variance.sqrt() + norm.epsilon),
        });
        Self {
            norm,
            values,
            inv_std: inv_std.collect(),
            variance,
        }
    }

    /// `gamma * s`.
    fn scale<T: Real>(&self, gamma: Option<Vec<T>>) -> Vec<T> {
        rounded(self.with_gamma(gamma.as_deref(), &self.inv_std).into_iter())
    }

    fn with_gamma<T: Real>(&self, gamma: Option<&[T]>, values: &[f64]) -> Vec<f64> {
        match gamma {
            Some(gamma) => values
                .iter()
                .zip(gamma)
                .map(|(value, gamma)| value * gamma.to_f64())
                .collect(),
            None => values.to_vec(),
        }
    }

    /// Slope and offset of the input's gradient, from `sum(g)` and `sum(g * (z - mean))`.
    fn input_grad<T: Real>(
        &self,
        gamma: Option<&[T]>,
        grad: &[f64],
        grad_deviation: &[f64],
    ) -> (Vec<f64>, Vec<f64>) {
        let values = self.values as f64;
        let degrees = (self.values - self.norm.variant.degrees_of_freedom()) as f64;
        // ds/dvar * 2 / (m - ddof)
        let slope: Vec<f64> = self
            .inv_std
            .iter()
            .zip(&self.variance)
            .map(|(s, variance)| match self.norm.variant {
                NormVariant::BatchNorm => -s * s * s / degrees,
                NormVariant::Tutorial if *variance == 0.0 => 0.0,
                NormVariant::Tutorial => -s * s / (variance.sqrt() * degrees),
            })
            .collect();
        let slope = times(&self.with_gamma(gamma, &slope), grad_deviation);
        let offset = times(&self.with_gamma(gamma, &self.inv_std), grad);
        (
            slope,
            offset.into_iter().map(|offset| -offset / values).collect(),
        )
    }
}

fn times(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a * b).collect()
}

fn rounded<T: Real>(values: impl Iterator<Item = f64>) -> Vec<T> {
    values.map(T::from_f64).collect()
}

/// `mean - bias`: the mean of the convolution's output without its bias.
fn center<T: Real>(mean: &[T], bias: Option<Vec<T>>) -> Vec<T> {
    match bias {
        Some(bias) => mean
            .iter()
            .zip(bias)
            .map(|(mean, bias)| *mean - bias)
            .collect(),
        None => mean.to_vec(),
    }
}

/// Each row of `[channels, ..]` times its scale.
fn scaled_rows<T: Real>(rows: &[T], scale: &[T]) -> Vec<T> {
    let len = rows.len() / scale.len();
    rows.chunks_exact(len)
        .zip(scale)
        .flat_map(|(row, scale)| row.iter().map(move |value| *value * *scale))
        .collect()
}

/// Dot product of each row of `[channels, ..]` with its counterpart.
fn row_dots<T: Real>(a: &[T], b: &[T], channels: usize) -> Vec<f64> {
    let len = a.len() / channels;
    a.chunks_exact(len)
        .zip(b.chunks_exact(len))
        .map(|(a, b)| a.iter().zip(b).map(|(a, b)| a.to_f64() * b.to_f64()).sum())
        .collect()
}

fn kernel_activation(activation: Activation) -> KernelActivation {
    match activation {
        Activation::Identity => KernelActivation::Identity,
        Activation::Relu => KernelActivation::Relu,
        Activation::Relu6 => KernelActivation::Relu6,
        Activation::LeakyRelu { negative_slope } => KernelActivation::LeakyRelu { negative_slope },
        Activation::Silu => KernelActivation::Silu,
        Activation::Gelu => KernelActivation::Gelu,
        Activation::HardSwish => KernelActivation::HardSwish,
    }
}

/// The kernels' geometry, with missing leading dimensions of size 1. The shapes were checked by
/// [`ConvBnProblem`](crate::backend::ConvBnProblem).
fn geometry(input: &Shape, weight: &Shape, spec: &ConvSpec) -> Geometry {
    fn lifted<T: Copy>(values: &[T], missing: T) -> [T; 3] {
        let mut all = [missing; 3];
        all[3 - values.len()..].copy_from_slice(values);
        all
    }
    Geometry::new(
        input[0],
        [input[1], weight[0]],
        spec.groups,
        lifted(&input[2..], 1),
        lifted(&weight[2..], 1),
        lifted(&spec.stride, 1),
        lifted(&spec.padding, (0, 0)),
        lifted(&spec.dilation, 1),
    )
    .unwrap_or_else(|error| panic!("{error}"))
}

fn output_shape(input: &Shape, geometry: &Geometry) -> Shape {
    let spatial = input.num_dims() - 2;
    let mut shape = vec![geometry.batch(), geometry.channels_out()];
    shape.extend_from_slice(&geometry.output()[3 - spatial..]);
    Shape::from(shape)
}

/// The tensor itself unless it is a view that the kernels cannot read.
fn contiguous(tensor: &FlexTensor) -> FlexTensor {
    match tensor.layout().contiguous_offsets() {
        Some(_) => tensor.clone(),
        None => tensor.to_contiguous(),
    }
}

fn slice<E: Element + Pod>(tensor: &FlexTensor) -> &[E] {
    tensor
        .as_slice::<E>()
        .expect("the op's tensors were checked to be of one dtype")
}

/// The values of a contiguous tensor of parameters in the type that is computed in.
fn numbers<T: Number>(tensor: &FlexTensor) -> Cow<'_, [T]> {
    match tensor.dtype() == T::dtype() {
        true => Cow::Borrowed(slice(tensor)),
        false => Cow::Owned(slice(&cast::<Flex>(tensor.clone(), T::dtype())).to_vec()),
    }
}

/// Values of a `[channels]` tensor.
fn host<T: Number>(tensor: &FlexTensor) -> Vec<T> {
    numbers(&contiguous(tensor)).into_owned()
}

fn tensor<T: Element + Pod>(values: Vec<T>, shape: &Shape) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(values, shape.clone()))
}

#[cfg(test)]
mod tests {
    //! The kernels against the portable bodies, which serve the other backends, in f64. The
    //! kernels themselves are held against finite differences and PyTorch in `tests/it`.

    use burn::backend::ops::FloatTensorOps;
    use burn::tensor::Slice;
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;
    use crate::spec::{Parents, Recompute, SavePlan};

    fn random(shape: &[usize], seed: u64) -> FlexTensor {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let values: Vec<f64> = (0..shape.iter().product())
            .map(|_| rng.random_range(-1.0..1.0))
            .collect();
        FlexTensor::from_data(TensorData::new(values, shape.to_vec()))
    }

    #[track_caller]
    fn assert_close(what: &str, got: &FlexTensor, wanted: &FlexTensor) {
        assert_eq!(got.shape(), wanted.shape(), "{what}");
        let (got, wanted) = (host::<f64>(got), host::<f64>(wanted));
        let worst = got
            .iter()
            .zip(&wanted)
            .map(|(got, wanted)| (got - wanted).abs())
            .fold(0.0, f64::max);
        assert!(worst < 1e-11, "{what}: {worst:e} apart");
    }

    fn assert_all_close(what: &str, got: ConvBnGrads<Flex>, wanted: ConvBnGrads<Flex>) {
        for (name, got, wanted) in [
            ("input", got.input, wanted.input),
            ("weight", got.weight, wanted.weight),
            ("bias", got.bias, wanted.bias),
            ("gamma", got.gamma, wanted.gamma),
            ("beta", got.beta, wanted.beta),
            ("residual", got.residual, wanted.residual),
        ] {
            match (got.into_option(), wanted.into_option()) {
                (Some(got), Some(wanted)) => {
                    assert_close(&format!("{what}: {name}"), &got, &wanted)
                }
                (None, None) => {}
                (got, _) => panic!("{what}: {name} is there: {}", got.is_some()),
            }
        }
    }

    /// Geometries over one to three dimensions, as spec, input and weight.
    fn geometries() -> Vec<(ConvSpec, Vec<usize>, Vec<usize>)> {
        let spec =
            |stride: &[usize], padding: &[(usize, usize)], dilation: &[usize], groups| ConvSpec {
                stride: stride.to_vec(),
                padding: padding.to_vec(),
                dilation: dilation.to_vec(),
                groups,
            };
        vec![
            (
                spec(&[1, 1], &[(1, 1); 2], &[1, 1], 1),
                vec![5, 3, 6, 5],
                vec![4, 3, 3, 3],
            ),
            (
                spec(&[2, 1], &[(0, 2), (1, 0)], &[1, 2], 1),
                vec![3, 2, 7, 6],
                vec![5, 2, 3, 2],
            ),
            (
                spec(&[2, 2], &[(1, 1); 2], &[1, 1], 3),
                vec![4, 6, 6, 6],
                vec![9, 2, 3, 3],
            ),
            (
                spec(&[1, 1], &[(0, 0); 2], &[1, 1], 4),
                vec![2, 4, 5, 5],
                vec![4, 1, 3, 3],
            ),
            (
                spec(&[1, 1], &[(0, 0); 2], &[1, 1], 1),
                vec![3, 7, 4, 4],
                vec![2, 7, 1, 1],
            ),
            (spec(&[2], &[(1, 2)], &[1], 2), vec![4, 4, 9], vec![6, 2, 3]),
            (
                spec(&[1; 3], &[(0, 1); 3], &[1; 3], 1),
                vec![2, 2, 3, 4, 3],
                vec![3, 2, 2, 2, 2],
            ),
        ]
    }

    const ACTIVATIONS: [Activation; 8] = [
        Activation::Identity,
        Activation::Relu,
        Activation::Relu6,
        Activation::LeakyRelu {
            negative_slope: 0.1,
        },
        Activation::LeakyRelu {
            negative_slope: -0.5,
        },
        Activation::Silu,
        Activation::Gelu,
        Activation::HardSwish,
    ];

    #[test]
    fn kernels_and_portable_bodies_agree() {
        for (spec, input_shape, weight_shape) in geometries() {
            for variant in [NormVariant::BatchNorm, NormVariant::Tutorial] {
                for activation in ACTIVATIONS {
                    for fixed in [false, true] {
                        for residual in [false, true] {
                            for recompute in [Recompute::Conv, Recompute::Never] {
                                let options = ConvBnOptions::new(spec.clone())
                                    .with_norm(NormSpec::new(variant, 1e-3))
                                    .with_activation(activation)
                                    .with_recompute(recompute);
                                compare(&options, &input_shape, &weight_shape, fixed, residual);
                            }
                        }
                    }
                }
            }
        }
    }

    fn compare(
        options: &ConvBnOptions,
        input_shape: &[usize],
        weight_shape: &[usize],
        fixed: bool,
        with_residual: bool,
    ) {
        let what = format!("{options:?}, input {input_shape:?}, fixed {fixed}");
        let channels = &weight_shape[..1];
        let geometry = geometry(
            &Shape::from(input_shape.to_vec()),
            &Shape::from(weight_shape.to_vec()),
            &options.conv,
        );
        let output_shape = output_shape(&Shape::from(input_shape.to_vec()), &geometry).to_vec();
        // Every other image of a larger batch: a view that is not contiguous.
        let mut larger = input_shape.to_vec();
        larger[0] *= 2;
        let every_other = [Slice::new(0, None, 2)];
        let input = Flex::float_slice(random(&larger, 1), &every_other);
        let inputs = ConvBnInputs::<Flex> {
            input,
            weight: random(weight_shape, 2),
            bias: OptionalTensor::Present(random(channels, 3)),
            gamma: OptionalTensor::Present(random(channels, 4)),
            beta: OptionalTensor::Present(random(channels, 5)),
            residual: with_residual.then(|| random(&output_shape, 6)).into(),
            statistics: match fixed {
                true => Statistics::Fixed {
                    mean: random(channels, 7),
                    variance: Flex::float_add_scalar(random(channels, 8), 1.5.into()),
                },
                false => Statistics::Batch,
            },
        };
        let statistics = inputs.statistics.kind();
        let present = inputs.present();
        let plan = SavePlan::new(options, statistics, present, present);
        let kernel = Flex::conv_bn_forward(inputs.clone(), options.clone(), plan.conv_output);
        let portable =
            portable::conv_bn::forward::<Flex>(inputs.clone(), options, plan.conv_output);
        assert_close(&what, &kernel.output, &portable.output);
        assert_close(&what, &kernel.mean, &portable.mean);
        assert_close(&what, &kernel.variance, &portable.variance);
        assert_eq!(kernel.conv_output.is_present(), plan.conv_output);

        let frozen_weight = Parents {
            weight: false,
            ..present
        };
        let norm_alone = Parents {
            input: false,
            ..frozen_weight
        };
        let shift_alone = Parents {
            gamma: false,
            ..norm_alone
        };
        let some = Parents {
            input: false,
            bias: false,
            gamma: false,
            ..present
        };
        for (wanted, max_workspace) in [
            (present, None),
            (present, Some(1)),
            (some, Some(1 << 10)),
            (frozen_weight, None),
            (norm_alone, None),
            (shift_alone, None),
        ] {
            let plan = SavePlan::new(options, statistics, present, wanted);
            let saved = saved(&plan, &inputs, &kernel, random(&output_shape, 9));
            let what = format!("{what}, wanted {wanted:?}");
            let options = ConvBnBackwardOptions {
                options: options.clone().with_max_workspace(max_workspace),
                statistics,
                input_shape: Shape::from(input_shape.to_vec()),
                weight_shape: Shape::from(weight_shape.to_vec()),
                norm_dtype: DType::F64,
                wanted,
            };
            let grads = Flex::conv_bn_backward(saved.clone(), options.clone());
            let portable = portable::conv_bn::backward::<Flex>(saved, &options);
            assert_all_close(&what, grads, portable);
        }
    }

    /// What the plan keeps of a forward pass.
    fn saved(
        plan: &SavePlan,
        inputs: &ConvBnInputs<Flex>,
        forward: &ConvBnForward<Flex>,
        output_grad: FlexTensor,
    ) -> ConvBnSaved<Flex> {
        let keep = |kept: bool, tensor: &OptionalTensor<Flex>| -> OptionalTensor<Flex> {
            tensor.as_option().filter(|_| kept).cloned().into()
        };
        let present_if = |kept: bool, tensor: &FlexTensor| -> OptionalTensor<Flex> {
            kept.then(|| tensor.clone()).into()
        };
        ConvBnSaved {
            output_grad,
            input: present_if(plan.input, &inputs.input),
            weight: present_if(plan.weight, &inputs.weight),
            bias: keep(plan.bias, &inputs.bias),
            gamma: keep(plan.gamma, &inputs.gamma),
            beta: keep(plan.beta, &inputs.beta),
            mean: present_if(plan.statistics, &forward.mean),
            variance: present_if(plan.statistics, &forward.variance),
            conv_output: keep(plan.conv_output, &forward.conv_output),
            output: present_if(plan.output, &forward.output),
            residual: keep(plan.residual, &inputs.residual),
        }
    }

    /// A 1x1 convolution of one channel with given statistics, in line with its residual.
    struct Given {
        mean: f64,
        variance: f64,
        epsilon: f64,
        weight: f64,
        input: [f64; 4],
    }

    impl Given {
        /// The output and all gradients that are wanted, on values that `dtype` holds; with
        /// `computes_in_f64` the same values in f64.
        fn run(
            &self,
            dtype: DType,
            computes_in_f64: bool,
            (options, with_residual, wants_all): (&ConvBnOptions, bool, bool),
            (forward, backward): (Forward, BackwardPass),
        ) -> Vec<Vec<f64>> {
            let of = |values: &[f64], shape: &[usize], dtype: DType| {
                let data = TensorData::new(values.to_vec(), shape.to_vec());
                let held = cast::<Flex>(FlexTensor::from_data(data), dtype);
                let target = if computes_in_f64 { DType::F64 } else { dtype };
                cast::<Flex>(held, target)
            };
            let shape = [2, 1, 2];
            let channel = |value: f64| of(&[value], &[1], DType::F32);
            let inputs = ConvBnInputs::<Flex> {
                input: of(&self.input, &shape, dtype),
                weight: of(&[self.weight], &[1, 1, 1], dtype),
                bias: OptionalTensor::Present(of(&[0.0], &[1], dtype)),
                gamma: OptionalTensor::Present(channel(1.0)),
                beta: OptionalTensor::Present(channel(0.5)),
                residual: with_residual
                    .then(|| of(&[0.25, -0.5, 0.75, 0.0], &shape, dtype))
                    .into(),
                statistics: Statistics::Fixed {
                    mean: channel(self.mean),
                    variance: channel(self.variance),
                },
            };
            let present = inputs.present();
            let wanted = if wants_all {
                present
            } else {
                Parents {
                    input: true,
                    ..Parents::default()
                }
            };
            let plan = SavePlan::new(options, StatisticsKind::Fixed, present, wanted);
            let result = forward(inputs.clone(), options, plan.conv_output);
            let output_grad = of(&[0.25, -0.5, 0.5, 0.25], &shape, dtype);
            let saved = saved(&plan, &inputs, &result, output_grad);
            let options = ConvBnBackwardOptions {
                options: options.clone(),
                statistics: StatisticsKind::Fixed,
                input_shape: inputs.input.shape(),
                weight_shape: inputs.weight.shape(),
                norm_dtype: if computes_in_f64 {
                    DType::F64
                } else {
                    DType::F32
                },
                wanted,
            };
            let grads = backward(saved, &options);
            let grads = [
                grads.input,
                grads.weight,
                grads.bias,
                grads.gamma,
                grads.beta,
                grads.residual,
            ];
            let grads = grads.into_iter().filter_map(OptionalTensor::into_option);
            [result.output]
                .into_iter()
                .chain(grads)
                .map(|tensor| host::<f64>(&tensor))
                .collect()
        }
    }

    type Forward = fn(ConvBnInputs<Flex>, &ConvBnOptions, bool) -> ConvBnForward<Flex>;
    type BackwardPass = fn(ConvBnSaved<Flex>, &ConvBnBackwardOptions) -> ConvBnGrads<Flex>;

    /// Norms whose scale, offset or scaled weight f16 does not hold, in front of outputs and gradients
    /// that it does: nothing of theirs passes through half precision.
    #[test]
    fn given_statistics_beyond_half_precision() {
        let norms = [
            // The offset is 79057.
            Given {
                mean: -250.0,
                variance: 0.0,
                epsilon: 1e-5,
                weight: 1.0,
                input: [-253.0, -251.0, -250.0, -248.0],
            },
            // The scale is 1e5.
            Given {
                mean: 0.0,
                variance: 0.0,
                epsilon: 1e-10,
                weight: 1.0,
                input: [-0.125, 0.0625, 0.03125, 0.25],
            },
            // The scaled weight is 1e-7.
            Given {
                mean: 0.0,
                variance: 1e8,
                epsilon: 1e-5,
                weight: 1e-3,
                input: [-6e4, 1e4, 3e4, 6e4],
            },
        ];
        let portable: (Forward, BackwardPass) = (
            portable::conv_bn::forward::<Flex>,
            portable::conv_bn::backward::<Flex>,
        );
        let kernels: (Forward, BackwardPass) = (
            |inputs, options, keep| Flex::conv_bn_forward(inputs, options.clone(), keep),
            |saved, options| Flex::conv_bn_backward(saved, options.clone()),
        );
        // A few roundings, and the distance of subnormal numbers in f16.
        for (dtype, relative, absolute) in [(DType::F16, 1e-2, 6e-8), (DType::BF16, 4e-2, 0.0)] {
            for given in &norms {
                for activation in [
                    Activation::Identity,
                    Activation::Relu,
                    Activation::HardSwish,
                ] {
                    for recompute in [Recompute::Conv, Recompute::Never] {
                        let options = ConvBnOptions::new(ConvSpec::unit(1))
                            .with_norm(NormSpec::new(NormVariant::BatchNorm, given.epsilon))
                            .with_activation(activation)
                            .with_recompute(recompute);
                        for (residual, wants_all) in [(false, true), (true, true), (false, false)] {
                            let case = (&options, residual, wants_all);
                            let wanted = given.run(dtype, true, case, kernels);
                            for passes in [kernels, portable] {
                                let got = given.run(dtype, false, case, passes);
                                assert_eq!(got.len(), wanted.len());
                                for (index, (got, wanted)) in got.iter().zip(&wanted).enumerate() {
                                    let largest =
                                        wanted.iter().fold(0.0, |a: f64, b| a.max(b.abs()));
                                    for (got, wanted) in got.iter().zip(wanted) {
                                        let error = (got - wanted).abs();
                                        assert!(
                                            error <= relative * largest + absolute,
                                            "result {index}, {dtype:?}, mean {}, variance {}, \
                                             {options:?}: got {got}, wanted {wanted}",
                                            given.mean,
                                            given.variance
                                        );
                                    }
                                }
                            }
                        }
                    }
                }
            }
        }
    }

    /// The portable body, which serves here where there are no statistics, knows no pool.
    #[test]
    #[should_panic(expected = "a block joined with a max pool: expected mean and variance")]
    fn a_joined_pool_without_statistics_is_refused() {
        let options = ConvBnOptions::new(ConvSpec::unit(2));
        let saved = ConvBnSaved::<Flex> {
            output_grad: random(&[1, 1, 2, 2], 1),
            input: OptionalTensor::Present(random(&[1, 1, 4, 4], 2)),
            weight: OptionalTensor::Present(random(&[1, 1, 1, 1], 3)),
            bias: OptionalTensor::Absent,
            gamma: OptionalTensor::Absent,
            beta: OptionalTensor::Absent,
            mean: OptionalTensor::Absent,
            variance: OptionalTensor::Absent,
            conv_output: OptionalTensor::Absent,
            output: OptionalTensor::Absent,
            residual: OptionalTensor::Absent,
        };
        let conv_bn = ConvBnBackwardOptions {
            options,
            statistics: StatisticsKind::Batch,
            input_shape: Shape::new([1, 1, 4, 4]),
            weight_shape: Shape::new([1, 1, 1, 1]),
            norm_dtype: DType::F64,
            wanted: Parents {
                weight: true,
                ..Parents::default()
            },
        };
        let pool = MaxPoolOptions::new([2, 2]).with_stride([2, 2]);
        let places = tensor(vec![0u8; 4], &Shape::new([1, 1, 2, 2]));
        let options = ConvBnMaxPoolBackwardOptions { conv_bn, pool };
        let _ = Flex::conv_bn_max_pool_backward(saved, places, options);
    }
}
