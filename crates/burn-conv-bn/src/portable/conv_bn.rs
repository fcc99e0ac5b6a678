//! The fused op, forward and backward.

use core::ops::Range;

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, TensorMetadata};
use burn::tensor::{DType, Shape};

use super::batch::Batch;
use super::fold::{Folded, Scales, center, folds, scale_weight};
use super::layout::Layouts;
use super::sweeps::{Affine, Argument, Composed, Moments, Sweeps};
use super::workspace::Costs;
use super::{cast, channels, conv};
use crate::backend::tensors::{
    ConvBackwardOptions, ConvBnBackwardOptions, ConvBnForward, ConvBnGrads, ConvBnInputs,
    ConvBnSaved, ConvGrads, ConvSaved, OptionalTensor, RunningStatistics, Statistics,
};
use crate::spec::{ConvBnOptions, Derivative, NormSpec, StatisticsKind, accumulator_dtype};

/// Forward with Burn's own ops.
pub(crate) fn forward<B: Backend>(
    inputs: ConvBnInputs<B>,
    options: &ConvBnOptions,
    keep_conv_output: bool,
) -> ConvBnForward<B> {
    forward_by::<B, Composed>(inputs, options, keep_conv_output)
}

/// Backward with Burn's own ops.
pub(crate) fn backward<B: Backend>(
    saved: ConvBnSaved<B>,
    options: &ConvBnBackwardOptions,
) -> ConvBnGrads<B> {
    backward_by::<B, Composed>(saved, None, options)
}

/// Backward of a convolution with no norm behind it, with Burn's own ops.
pub(crate) fn conv_backward<B: Backend>(
    saved: ConvSaved<B>,
    options: &ConvBackwardOptions,
) -> ConvGrads<B> {
    conv_backward_by::<B, Composed>(saved, options)
}

/// Without statistics and activation the fused op's backward is the convolution's, in the same chunks.
pub(crate) fn conv_backward_by<B: Backend, S: Sweeps<B>>(
    saved: ConvSaved<B>,
    options: &ConvBackwardOptions,
) -> ConvGrads<B> {
    let options = ConvBnBackwardOptions {
        options: ConvBnOptions::new(options.spec.clone()).with_max_workspace(options.max_workspace),
        statistics: StatisticsKind::Fixed,
        input_shape: options.input_shape.clone(),
        weight_shape: options.weight_shape.clone(),
        norm_dtype: saved.output_grad.dtype(),
        wanted: options.wanted,
    };
    let saved = ConvBnSaved {
        output_grad: saved.output_grad,
        input: saved.input,
        weight: saved.weight,
        bias: OptionalTensor::Absent,
        gamma: OptionalTensor::Absent,
        beta: OptionalTensor::Absent,
        mean: OptionalTensor::Absent,
        variance: OptionalTensor::Absent,
        conv_output: OptionalTensor::Absent,
        output: OptionalTensor::Absent,
        residual: OptionalTensor::Absent,
    };
    let grads = backward_by::<B, S>(saved, None, &options);
    ConvGrads {
        input: grads.input,
        weight: grads.weight,
        bias: grads.bias,
    }
}

pub(crate) fn forward_by<B: Backend, S: Sweeps<B>>(
    inputs: ConvBnInputs<B>,
    options: &ConvBnOptions,
    keep_conv_output: bool,
) -> ConvBnForward<B> {
    let residual = inputs.residual.into_option();
    let affine = Affine {
        gamma: inputs.gamma.into_option(),
        beta: inputs.beta.into_option(),
    };
    match inputs.statistics {
        Statistics::Batch => {
            // The statistics absorb the bias: neither the output nor any gradient depends on it.
            let conv_output =
                conv::forward::<B, S>(inputs.input, inputs.weight, None, &options.conv);
            let kept = keep_conv_output.then(|| conv_output.clone());
            let normalized = S::normalize(
                conv_output,
                affine,
                residual,
                options.norm,
                options.activation,
                inputs.running,
            );
            ConvBnForward {
                output: normalized.output,
                mean: normalized.mean,
                variance: normalized.variance,
                running: normalized.running,
                conv_output: kept.into(),
            }
        }
        Statistics::Fixed { mean, variance } => {
            let dtype = inputs.input.dtype();
            let (bias, moments) = (inputs.bias.as_option(), (&mean, &variance));
            let (output, kept) = if folds(dtype) && !keep_conv_output {
                let folded = Folded::<B>::new(affine, bias, moments, options.norm, dtype);
                let normalized = folded.conv::<S>(inputs.input, inputs.weight, &options.conv);
                let output = S::activate(normalized, residual, options.activation);
                (output, None)
            } else {
                let conv_output =
                    conv::forward::<B, S>(inputs.input, inputs.weight, None, &options.conv);
                let kept = keep_conv_output.then(|| conv_output.clone());
                let shape = conv_output.shape();
                let norm = given_norm::<B, S>(affine, bias, moments, options.norm, dtype, &shape);
                let output = S::normalize_by(&norm, conv_output, residual, options.activation);
                (output, kept)
            };
            ConvBnForward {
                output,
                mean: cast::<B>(mean, accumulator_dtype(dtype)),
                variance: cast::<B>(variance, accumulator_dtype(dtype)),
                running: RunningStatistics::Absent,
                conv_output: kept.into(),
            }
        }
    }
}

/// The norm of given statistics, over the convolution's output without its bias.
fn given_norm<B: Backend, S: Sweeps<B>>(
    affine: Affine<B>,
    bias: Option<&FloatTensor<B>>,
    (mean, variance): (&FloatTensor<B>, &FloatTensor<B>),
    norm: NormSpec,
    dtype: DType,
    shape: &Shape,
) -> S::Norm {
    let accumulator = accumulator_dtype(dtype);
    let moments = Moments {
        mean: center::<B>(mean.clone(), bias, accumulator),
        variance: cast::<B>(variance.clone(), accumulator),
    };
    S::norm(moments, affine, norm, StatisticsKind::Fixed, shape)
}

/// Backward over the batch in chunks, in two passes: the first sums over all chunks, the second turns each
/// chunk's `g` into the gradient of the convolution's output, and that, in chunks of its own, into those of
/// weight and input. A single chunk is kept between the two passes, several are recomputed.
///
/// With a pool behind the block the output's gradient is the pool's.
pub(crate) fn backward_by<B: Backend, S: Sweeps<B>>(
    saved: ConvBnSaved<B>,
    pool: Option<S::Pool>,
    options: &ConvBnBackwardOptions,
) -> ConvBnGrads<B> {
    let wanted = options.wanted;
    let whole = || saved.output_grad.shape();
    let output_shape = pool.as_ref().map_or_else(whole, |_| options.output_shape());
    let device = saved.output_grad.device();
    let has_norm = saved.mean.is_present();
    let mut pass = Pass::<B, S>::new(saved, pool, &output_shape, options);
    let chunks = pass.chunks();
    let single = chunks.len() == 1;
    let mut kept_chunk = None;

    let mut sums = None;
    let wants_conv = has_norm && (wanted.input || wanted.weight);
    if wanted.bias || wanted.gamma || wanted.beta || wants_conv {
        for chunk in &chunks {
            let part = pass.chunk(chunk, single);
            let part_sums = S::sums(pass.norm.as_ref(), &part);
            sums = Some(match sums {
                None => part_sums,
                Some(sums) => S::add(sums, part_sums),
            });
            kept_chunk = single.then_some(part);
        }
    }
    let (gamma_grad, grad_sum) = match (sums, &mut pass.norm) {
        (Some(sums), Some(norm)) if pass.needs_conv_output => {
            let [gamma_grad, grad_sum] = S::affine_grads(norm, sums);
            (Some(gamma_grad), Some(grad_sum))
        }
        (Some(sums), _) => (None, Some(S::grad_sum(sums))),
        (None, _) => (None, None),
    };

    let mut grads = BatchGrads {
        input: wanted.input.then(|| Batch::new(&options.input_shape)),
        residual: wanted.residual.then(|| Batch::new(&output_shape)),
        weight: None,
    };
    if wanted.input || wanted.residual || pass.wants_weight() {
        for chunk in &chunks {
            let part = kept_chunk
                .take()
                .unwrap_or_else(|| pass.chunk(chunk, single));
            pass.propagate(chunk, part, &mut grads, single);
        }
    }

    let weight_grad = grads.weight.map(|grad| pass.in_order(grad));
    let zeros = || B::float_zeros(Shape::new([output_shape[1]]), &device, pass.dtype.into());
    let parameters = match options.statistics {
        StatisticsKind::Batch => ParameterGrads {
            weight: weight_grad,
            bias: wanted.bias.then(zeros),
            gamma: gamma_grad,
        },
        StatisticsKind::Fixed if pass.norm.is_some() => ParameterGrads {
            weight: weight_grad,
            bias: grad_sum.clone().and_then(|sum| pass.bias_grad(sum)),
            gamma: gamma_grad,
        },
        StatisticsKind::Fixed => pass.unfold(grad_sum.clone(), weight_grad),
    };
    let norm_grad = |wanted: bool, grad: Option<FloatTensor<B>>| {
        grad.filter(|_| wanted)
            .map(|grad| cast::<B>(grad, options.norm_dtype))
    };
    ConvBnGrads {
        input: grads.input.map(Batch::finish).into(),
        weight: parameters.weight.filter(|_| wanted.weight).into(),
        bias: parameters.bias.filter(|_| wanted.bias).into(),
        gamma: norm_grad(wanted.gamma, parameters.gamma).into(),
        beta: norm_grad(wanted.beta, grad_sum).into(),
        residual: grads.residual.map(Batch::finish).into(),
    }
}

/// Gradients of the parameters before and in the norm: weight and bias in the data's dtype,
/// gamma in the accumulator's.
struct ParameterGrads<B: Backend> {
    weight: Option<FloatTensor<B>>,
    bias: Option<FloatTensor<B>>,
    gamma: Option<FloatTensor<B>>,
}

/// [`ConvBnSaved`], each tensor until its last use.
struct Saved<B: Backend> {
    output_grad: OptionalTensor<B>,
    input: OptionalTensor<B>,
    weight: OptionalTensor<B>,
    bias: OptionalTensor<B>,
    gamma: OptionalTensor<B>,
    mean: OptionalTensor<B>,
    variance: OptionalTensor<B>,
    conv_output: OptionalTensor<B>,
    output: OptionalTensor<B>,
    residual: OptionalTensor<B>,
}

/// State of both passes over the batch.
struct Pass<'a, B: Backend, S: Sweeps<B>> {
    options: &'a ConvBnBackwardOptions,
    saved: Saved<B>,
    pool: Option<S::Pool>,
    dtype: DType,
    batch: usize,
    costs: Costs,
    /// The norm, if its statistics are needed and it is not folded into the weight.
    norm: Option<S::Norm>,
    /// Whether `norm` needs its input: for gradients of the batch's statistics or of gamma, or for the
    /// activation's derivative.
    needs_conv_output: bool,
    /// The norm folded into the weight, if the activation's derivative needs its output.
    folded: Option<Folded<B>>,
    /// Whether the weight came with its channels innermost.
    is_channels_last: bool,
    /// The weight that the gradient of the input goes through.
    input_weight: Option<FloatTensor<B>>,
}

impl<'a, B: Backend, S: Sweeps<B>> Pass<'a, B, S> {
    fn new(
        mut saved: ConvBnSaved<B>,
        pool: Option<S::Pool>,
        shape: &Shape,
        options: &'a ConvBnBackwardOptions,
    ) -> Self {
        let is_of_batch = options.statistics == StatisticsKind::Batch;
        let recomputes = is_of_batch && !saved.conv_output.is_present();
        let is_channels_last = saved.weight.as_option().is_some_and(S::is_channels_last);
        if (options.wanted.input || recomputes)
            && let Some(weight) = take(&mut saved.weight, true)
        {
            saved.weight = OptionalTensor::Present(S::convolution_order(weight));
        }
        let spec = options.options.norm;
        let dtype = saved.output_grad.dtype();
        let affine = Affine {
            gamma: saved.gamma.as_option().cloned(),
            beta: saved.beta.as_option().cloned(),
        };
        let (bias, weight) = (saved.bias.as_option(), saved.weight.as_option());
        let needs_value = options.options.activation.derivative() == Derivative::OfValue;
        let mut norm = None;
        let mut folded = None;
        let mut input_weight = weight.cloned();
        if let Some((mean, variance)) = saved.mean.as_option().zip(saved.variance.as_option()) {
            let moments = (mean, variance);
            match options.statistics {
                StatisticsKind::Batch => {
                    let moments = Moments {
                        mean: mean.clone(),
                        variance: variance.clone(),
                    };
                    norm = Some(S::norm(moments, affine, spec, StatisticsKind::Batch, shape));
                }
                StatisticsKind::Fixed if folds(dtype) && !saved.conv_output.is_present() => {
                    if options.wanted.input {
                        let scales = Scales::<B>::new(affine.gamma.as_ref(), variance, spec, dtype);
                        let fold = |weight| scale_weight::<B>(weight, scales.scale);
                        input_weight = input_weight.map(fold);
                    }
                    folded = needs_value.then(|| Folded::new(affine, bias, moments, spec, dtype));
                }
                StatisticsKind::Fixed => {
                    norm = Some(given_norm::<B, S>(
                        affine, bias, moments, spec, dtype, shape,
                    ));
                }
            }
        }
        let needs_conv_output =
            norm.is_some() && (is_of_batch || options.wanted.gamma || needs_value);
        Self {
            options,
            dtype,
            batch: shape[0],
            costs: Costs::new::<B, S>(options, shape, &saved.output_grad),
            pool,
            norm,
            needs_conv_output,
            folded,
            is_channels_last,
            input_weight,
            saved: Saved {
                output_grad: OptionalTensor::Present(saved.output_grad),
                input: saved.input,
                weight: saved.weight,
                bias: saved.bias,
                gamma: saved.gamma,
                mean: saved.mean,
                variance: saved.variance,
                conv_output: saved.conv_output,
                output: saved.output,
                residual: saved.residual,
            },
        }
    }

    /// The chunks of both passes.
    fn chunks(&self) -> Vec<Range<usize>> {
        let output_grad = self.saved.output_grad.as_option();
        let view = view::<B, S>(output_grad.into_iter().chain(self.saved.input.as_option()));
        let max_workspace = self.options.options.max_workspace;
        self.costs.sweep_chunks(self.batch, max_workspace, view)
    }

    /// Whether the weight's gradient is needed: requested, or folded for gamma's.
    fn wants_weight(&self) -> bool {
        self.options.wanted.weight || (self.norm.is_none() && self.options.wanted.gamma)
    }

    /// One chunk's gradient at the pre-activation. With `last`, its tensors are freed.
    fn chunk(&mut self, chunk: &Range<usize>, last: bool) -> S::Chunk {
        let norm_input = self.norm_input(chunk, last);
        let argument = self.argument(chunk, last);
        let output_grad = take(&mut self.saved.output_grad, last);
        let output_grad = output_grad.expect("no chunk follows the last");
        let output_grad = S::images(output_grad, chunk);
        let pool = self.pool.as_ref().map(|pool| (pool, chunk.start));
        let function = self.options.options.activation;
        S::chunk(
            self.norm.as_ref(),
            output_grad,
            pool,
            norm_input,
            argument,
            function,
        )
    }

    /// Argument of the activation's derivative in one chunk.
    fn argument(&mut self, chunk: &Range<usize>, last: bool) -> Argument<B> {
        if let Some(output) = take(&mut self.saved.output, last) {
            return Argument::Value(S::images(output, chunk));
        }
        let residual = take(&mut self.saved.residual, last).map(|all| S::images(all, chunk));
        let Some(folded) = &self.folded else {
            return Argument::Norm { residual };
        };
        let (Some(input), Some(weight)) =
            (self.saved.input.as_option(), self.saved.weight.as_option())
        else {
            unreachable!("the plan keeps the convolution's output or what it is made of");
        };
        let input = S::images(input.clone(), chunk);
        let normalized = folded.conv::<S>(input, weight.clone(), &self.options.options.conv);
        Argument::Value(match residual {
            Some(residual) => B::float_add(normalized, residual),
            None => normalized,
        })
    }

    /// The convolution's output of one chunk, recomputed or kept, if the norm needs it.
    fn norm_input(&mut self, chunk: &Range<usize>, last: bool) -> Option<FloatTensor<B>> {
        if !self.needs_conv_output {
            return None;
        }
        if let Some(conv_output) = take(&mut self.saved.conv_output, last) {
            return Some(S::images(conv_output, chunk));
        }
        let input = S::images(self.saved.input.as_option()?.clone(), chunk);
        let weight = self.saved.weight.as_option()?.clone();
        let spec = &self.options.options.conv;
        Some(conv::forward::<B, S>(input, weight, None, spec))
    }

    /// Carries one chunk's gradient through the norm, and in parts that fit the workspace through the
    /// convolution. With `last`, the input is freed between the weight's gradient and its own.
    fn propagate(
        &mut self,
        chunk: &Range<usize>,
        part: S::Chunk,
        grads: &mut BatchGrads<B>,
        last: bool,
    ) {
        let spec = &self.options.options.conv;
        let wants_conv = self.options.wanted.input || self.options.wanted.weight;
        let norm = self.norm.as_ref().filter(|_| wants_conv);
        let (conv_grad, residual_grad) = S::norm_input_grad(norm, part, grads.residual.is_some());
        if let (Some(residual), Some(grad)) = (&mut grads.residual, residual_grad) {
            residual.write::<S>(chunk, grad);
        }
        let mut input = OptionalTensor::<B>::from(take(&mut self.saved.input, last));
        let view = view::<B, S>([&conv_grad].into_iter().chain(input.as_option()));
        let max_workspace = self.options.options.max_workspace;
        let parts = self.costs.conv_chunks(chunk, max_workspace, view);
        let within = |part: &Range<usize>| part.start - chunk.start..part.end - chunk.start;
        if self.wants_weight() {
            for part in &parts {
                let Some(input) = take(&mut input, part.end == chunk.end) else {
                    break;
                };
                let input = S::images(input, part);
                let conv_grad = S::images(conv_grad.clone(), &within(part));
                let shape = &self.options.weight_shape;
                grads.add_weight(conv::weight_backward::<B, S>(input, shape, conv_grad, spec));
            }
        }
        drop(input);
        if let (Some(input), Some(weight)) = (&mut grads.input, &self.input_weight) {
            let mut conv_grad = OptionalTensor::<B>::from(Some(conv_grad));
            for part in &parts {
                let Some(conv_grad) = take(&mut conv_grad, part.end == chunk.end) else {
                    break;
                };
                let conv_grad = S::images(conv_grad, &within(part));
                let mut shape = self.options.input_shape.clone();
                shape[0] = part.len();
                let grad = conv::input_backward::<B, S>(&shape, weight.clone(), conv_grad, spec);
                input.write::<S>(part, grad);
            }
        }
    }

    /// The weight's gradient in the weight's dtype and memory order. Of another order, an optimizer might change the
    /// weight's.
    fn in_order(&self, weight_grad: FloatTensor<B>) -> FloatTensor<B> {
        let grad = cast::<B>(weight_grad, self.dtype);
        if self.is_channels_last {
            S::convolution_order(grad)
        } else {
            grad
        }
    }

    /// The gradient of the convolution's bias under given statistics, from `sum(g)`.
    fn bias_grad(&self, grad_sum: FloatTensor<B>) -> Option<FloatTensor<B>> {
        let (variance, gamma) = (
            self.saved.variance.as_option()?,
            self.saved.gamma.as_option(),
        );
        let scales = Scales::<B>::new(gamma, variance, self.options.options.norm, self.dtype);
        let grad_sum = cast::<B>(grad_sum, scales.scale.dtype());
        Some(cast::<B>(B::float_mul(scales.scale, grad_sum), self.dtype))
    }

    /// Gradients of the parameters under given statistics, from `sum(g)` and the gradient of the
    /// folded weight.
    fn unfold(
        &self,
        grad_sum: Option<FloatTensor<B>>,
        folded_weight: Option<FloatTensor<B>>,
    ) -> ParameterGrads<B> {
        let Some(variance) = self.saved.variance.as_option() else {
            // No norm.
            return ParameterGrads {
                weight: folded_weight,
                bias: grad_sum.map(|sum| cast::<B>(sum, self.dtype)),
                gamma: None,
            };
        };
        let mut grads = ParameterGrads {
            weight: None,
            bias: None,
            gamma: None,
        };
        let Some(grad_sum) = grad_sum else {
            return grads;
        };
        let gamma = self.saved.gamma.as_option();
        let norm = self.options.options.norm;
        let scales = Scales::<B>::new(gamma, variance, norm, self.dtype);
        let weight = self.saved.weight.as_option();
        let mean = self.saved.mean.as_option();
        if let (true, Some(folded), Some(weight), Some(mean)) =
            (self.options.wanted.gamma, &folded_weight, weight, mean)
        {
            // sum(g * (z - mean)) = <weight, wgrad(input, g)> - (mean - bias) * sum(g), which
            // cancels where the mean is large against the standard deviation.
            let accumulator = scales.scale.dtype();
            let products = B::float_mul(
                cast::<B>(weight.clone(), accumulator),
                cast::<B>(folded.clone(), accumulator),
            );
            let dims: Vec<usize> = (1..products.rank()).rev().collect();
            let dot = channels::<B>(B::float_sum_dims(products, &dims));
            let bias = self.saved.bias.as_option();
            let center = center::<B>(mean.clone(), bias, accumulator);
            let dot = B::float_sub(dot, B::float_mul(center, grad_sum.clone()));
            grads.gamma = Some(B::float_mul(scales.inv_std, dot));
        }
        grads.bias = self.bias_grad(grad_sum);
        grads.weight = folded_weight.map(|weight| scale_weight::<B>(weight, scales.scale));
        grads
    }
}

/// Gradients that the second pass collects.
struct BatchGrads<B: Backend> {
    input: Option<Batch<B>>,
    residual: Option<Batch<B>>,
    /// Of several chunks the sum, in the accumulator's dtype.
    weight: Option<FloatTensor<B>>,
}

impl<B: Backend> BatchGrads<B> {
    fn add_weight(&mut self, part: FloatTensor<B>) {
        let dtype = accumulator_dtype(part.dtype());
        self.weight = Some(match self.weight.take() {
            None => part,
            Some(sum) => B::float_add(cast::<B>(sum, dtype), cast::<B>(part, dtype)),
        });
    }
}

/// The number of images whose multiples are views of all of these tensors, if there is one: of powers of two
/// the largest.
fn view<'t, B: Backend, L: Layouts<B>>(
    mut tensors: impl Iterator<Item = &'t FloatTensor<B>>,
) -> Option<usize>
where
    FloatTensor<B>: 't,
{
    tensors.try_fold(1, |view, tensor| {
        Some(L::images_of_a_view(tensor)?.max(view))
    })
}

/// The tensor, moved out if this is its last use.
fn take<B: Backend>(tensor: &mut OptionalTensor<B>, last: bool) -> Option<FloatTensor<B>> {
    if last {
        core::mem::replace(tensor, OptionalTensor::Absent).into_option()
    } else {
        tensor.as_option().cloned()
    }
}
