//! The op's passes over activations besides its convolutions.

use core::convert::Infallible;

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, TensorMetadata};
use burn::tensor::{DType, Shape};

use super::layout::Layouts;
use super::norm::{self, ChannelNorm, GradSums, InputGrad};
use super::{activation, broadcast, cast, channels};
use crate::backend::tensors::{NormOutput, RunningStatistics};
use crate::spec::{Activation, NormSpec, StatisticsKind, accumulator_dtype, values_per_channel};

/// The passes over activations of forward and backward, by backend.
///
/// Activations are `[batch, channels, spatial..]`, everything of a channel is `[channels]`.
pub(crate) trait Sweeps<B: Backend>: Layouts<B> {
    /// A norm whose statistics are known: from the forward pass, or given.
    type Norm;
    /// The gradient at the pre-activation of one chunk of the batch, perhaps implicit.
    type Chunk;
    /// The sums for the norm's gradients.
    type Sums;
    /// A max pool behind the block, as its gradient needs it.
    type Pool;

    /// `activation(norm(input) + residual)` with the statistics of `input`, which are returned too, and the running
    /// ones after them where that takes no other launch.
    fn normalize(
        input: FloatTensor<B>,
        affine: Affine<B>,
        residual: Option<FloatTensor<B>>,
        norm: NormSpec,
        function: Activation,
        running: RunningStatistics<B>,
    ) -> NormOutput<B>;

    /// `activation(norm(input) + residual)` with a known norm.
    fn normalize_by(
        norm: &Self::Norm,
        input: FloatTensor<B>,
        residual: Option<FloatTensor<B>>,
        function: Activation,
    ) -> FloatTensor<B>;

    /// `activation(value + residual)`.
    fn activate(
        value: FloatTensor<B>,
        residual: Option<FloatTensor<B>>,
        function: Activation,
    ) -> FloatTensor<B>;

    /// The norm of known statistics. `shape` is the whole batch's.
    fn norm(
        moments: Moments<B>,
        affine: Affine<B>,
        norm: NormSpec,
        statistics: StatisticsKind,
        shape: &Shape,
    ) -> Self::Norm;

    /// Prepares a chunk. With a pool `output_grad` is the pool's, from the given image of the batch on.
    fn chunk(
        norm: Option<&Self::Norm>,
        output_grad: FloatTensor<B>,
        pool: Option<(&Self::Pool, usize)>,
        norm_input: Option<FloatTensor<B>>,
        argument: Argument<B>,
        function: Activation,
    ) -> Self::Chunk;

    /// The chunk's sums.
    fn sums(norm: Option<&Self::Norm>, chunk: &Self::Chunk) -> Self::Sums;

    /// The sums of two chunks.
    fn add(sums: Self::Sums, other: Self::Sums) -> Self::Sums;

    /// The gradients of gamma and beta, from the sums over all chunks with the norm's input.
    /// Under batch statistics this completes the norm for [`norm_input_grad`](Self::norm_input_grad).
    fn affine_grads(norm: &mut Self::Norm, sums: Self::Sums) -> [FloatTensor<B>; 2];

    /// The sum of the gradient of the pre-activation.
    fn grad_sum(sums: Self::Sums) -> FloatTensor<B>;

    /// The gradient of the norm's input (without a norm, of the pre-activation), and that of the
    /// residual if requested.
    fn norm_input_grad(
        norm: Option<&Self::Norm>,
        chunk: Self::Chunk,
        wants_residual: bool,
    ) -> (FloatTensor<B>, Option<FloatTensor<B>>);

    /// Peak bytes of a backward pass for `values` values of the norm's input and their temporaries.
    fn workspace(values: usize, dtype: DType) -> usize;
}

/// The norm's parameters; 1 and 0 if absent.
#[derive(Clone)]
pub(crate) struct Affine<B: Backend> {
    pub(crate) gamma: Option<FloatTensor<B>>,
    pub(crate) beta: Option<FloatTensor<B>>,
}

/// The norm's mean and variance: the batch's, biased, or the given ones.
pub(crate) struct Moments<B: Backend> {
    pub(crate) mean: FloatTensor<B>,
    pub(crate) variance: FloatTensor<B>,
}

/// Argument of the activation's derivative.
pub(crate) enum Argument<B: Backend> {
    /// The norm's output, rebuilt from its input, plus the residual. Unused without an activation.
    Norm { residual: Option<FloatTensor<B>> },
    /// The pre-activation, or the activation's output where the derivative follows from it.
    Value(FloatTensor<B>),
}

/// The sweeps composed of Burn's own ops, in the accumulator's dtype.
pub(crate) struct Composed;

/// [`Sweeps::Norm`] of [`Composed`]: per-channel tensors are `[1, channels, 1..]` here.
pub(crate) struct ComposedNorm<B: Backend> {
    mean: FloatTensor<B>,
    beta: Option<FloatTensor<B>>,
    channel: ChannelNorm<B>,
    statistics: StatisticsKind,
    /// Under batch statistics, once the sums are known.
    input_grad: Option<InputGrad<B>>,
}

/// Gradient at the pre-activation of one chunk, with the deviations `z - mean` where the norm takes
/// them from the batch.
pub(crate) struct ComposedChunk<B: Backend> {
    grad: FloatTensor<B>,
    deviation: Option<FloatTensor<B>>,
    dtype: DType,
}

impl<B: Backend> ComposedNorm<B> {
    /// `input - mean`.
    fn deviation(&self, input: FloatTensor<B>, accumulator: DType) -> FloatTensor<B> {
        B::float_sub(cast::<B>(input, accumulator), self.mean.clone())
    }

    /// The norm's output.
    fn apply(&self, deviation: FloatTensor<B>) -> FloatTensor<B> {
        norm::apply::<B>(deviation, self.channel.scale(), self.beta.clone())
    }

    /// The gradient of the norm's input; given statistics are constants to it.
    fn input_grad(
        &self,
        grad: FloatTensor<B>,
        deviation: Option<FloatTensor<B>>,
    ) -> FloatTensor<B> {
        match (&self.input_grad, deviation) {
            (Some(coefficients), Some(deviation)) => coefficients.apply(grad, deviation),
            _ => B::float_mul(grad, self.channel.scale()),
        }
    }
}

impl<B: Backend> Layouts<B> for Composed {}

impl<B: Backend> Sweeps<B> for Composed {
    type Norm = ComposedNorm<B>;
    type Chunk = ComposedChunk<B>;
    type Sums = GradSums<B>;
    // Burn's operations join no pool.
    type Pool = Infallible;

    fn normalize(
        input: FloatTensor<B>,
        affine: Affine<B>,
        residual: Option<FloatTensor<B>>,
        norm: NormSpec,
        function: Activation,
        _running: RunningStatistics<B>,
    ) -> NormOutput<B> {
        let dtype = input.dtype();
        let values = values_per_channel(&input.shape());
        let centered = norm::center::<B>(cast::<B>(input, accumulator_dtype(dtype)));
        let channel = ChannelNorm::<B>::new(norm, values, affine.gamma, centered.variance.clone());
        let normalized = norm::apply::<B>(centered.deviation, channel.scale(), affine.beta);
        NormOutput {
            output: cast::<B>(
                <Self as Sweeps<B>>::activate(normalized, residual, function),
                dtype,
            ),
            mean: channels::<B>(centered.mean),
            variance: channels::<B>(centered.variance),
            running: RunningStatistics::Absent,
        }
    }

    fn normalize_by(
        norm: &Self::Norm,
        input: FloatTensor<B>,
        residual: Option<FloatTensor<B>>,
        function: Activation,
    ) -> FloatTensor<B> {
        let dtype = input.dtype();
        let deviation = norm.deviation(input, accumulator_dtype(dtype));
        let normalized = norm.apply(deviation);
        cast::<B>(
            <Self as Sweeps<B>>::activate(normalized, residual, function),
            dtype,
        )
    }

    fn activate(
        value: FloatTensor<B>,
        residual: Option<FloatTensor<B>>,
        function: Activation,
    ) -> FloatTensor<B> {
        let value = match residual {
            Some(residual) => {
                let residual = cast::<B>(residual, value.dtype());
                B::float_add(value, residual)
            }
            None => value,
        };
        activation::forward::<B>(function, value)
    }

    fn norm(
        moments: Moments<B>,
        affine: Affine<B>,
        norm: NormSpec,
        statistics: StatisticsKind,
        shape: &Shape,
    ) -> Self::Norm {
        let rank = shape.num_dims();
        let variance = broadcast::<B>(moments.variance, rank);
        ComposedNorm {
            channel: match statistics {
                StatisticsKind::Batch => {
                    ChannelNorm::new(norm, values_per_channel(shape), affine.gamma, variance)
                }
                StatisticsKind::Fixed => ChannelNorm::given(norm, affine.gamma, variance),
            },
            statistics,
            mean: broadcast::<B>(moments.mean, rank),
            beta: affine.beta,
            input_grad: None,
        }
    }

    fn chunk(
        norm: Option<&Self::Norm>,
        output_grad: FloatTensor<B>,
        _pool: Option<(&Infallible, usize)>,
        norm_input: Option<FloatTensor<B>>,
        argument: Argument<B>,
        function: Activation,
    ) -> Self::Chunk {
        let dtype = output_grad.dtype();
        let accumulator = accumulator_dtype(dtype);
        let deviation = norm
            .zip(norm_input)
            .map(|(norm, input)| norm.deviation(input, accumulator));
        let value = match (function, argument) {
            (Activation::Identity, _) => None,
            (_, Argument::Value(value)) => Some(cast::<B>(value, accumulator)),
            (_, Argument::Norm { residual }) => {
                deviation.clone().zip(norm).map(|(deviation, norm)| {
                    let value = norm.apply(deviation);
                    match residual {
                        Some(residual) => B::float_add(value, cast::<B>(residual, accumulator)),
                        None => value,
                    }
                })
            }
        };
        let grad = cast::<B>(output_grad, accumulator);
        let grad = match value {
            Some(value) => activation::backward::<B>(function, value, grad),
            None => grad,
        };
        ComposedChunk {
            grad,
            deviation,
            dtype,
        }
    }

    fn sums(_norm: Option<&Self::Norm>, chunk: &Self::Chunk) -> Self::Sums {
        GradSums::<B>::new(&chunk.grad, chunk.deviation.as_ref())
    }

    fn add(sums: Self::Sums, other: Self::Sums) -> Self::Sums {
        sums.add(other)
    }

    fn affine_grads(norm: &mut Self::Norm, sums: Self::Sums) -> [FloatTensor<B>; 2] {
        let grad = sums.grad;
        let grad_deviation = sums
            .grad_deviation
            .expect("where there is a norm there are deviations");
        norm.input_grad = (norm.statistics == StatisticsKind::Batch).then(|| {
            norm.channel
                .input_grad(grad.clone(), grad_deviation.clone())
        });
        let gamma_grad = B::float_mul(norm.channel.inv_std.clone(), grad_deviation);
        [gamma_grad, grad].map(channels::<B>)
    }

    fn grad_sum(sums: Self::Sums) -> FloatTensor<B> {
        channels::<B>(sums.grad)
    }

    fn norm_input_grad(
        norm: Option<&Self::Norm>,
        chunk: Self::Chunk,
        wants_residual: bool,
    ) -> (FloatTensor<B>, Option<FloatTensor<B>>) {
        let residual = wants_residual.then(|| cast::<B>(chunk.grad.clone(), chunk.dtype));
        let grad = match norm {
            Some(norm) => norm.input_grad(chunk.grad, chunk.deviation),
            None => chunk.grad,
        };
        (cast::<B>(grad, chunk.dtype), residual)
    }

    /// `z - mean`, the gradient and their product.
    fn workspace(values: usize, dtype: DType) -> usize {
        3 * values * accumulator_dtype(dtype).size()
    }
}
