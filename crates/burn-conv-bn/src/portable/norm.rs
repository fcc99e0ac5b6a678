//! Batch normalization: statistics, normalization and their gradient.
//!
//! Per-channel quantities are `[1, channels, 1..]` here. The variants of the norm differ only in
//! [`inv_std`] and [`ChannelNorm::slope_factor`]: the formulas of [`NormSpec`] on `channels` values.

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, TensorMetadata, get_or_init_device_settings};

use super::{broadcast, cast, channel_sum};
use crate::backend::tensors::ChannelMoments;
use crate::spec::{NormSpec, NormVariant, values_per_channel};

/// The input less its mean, the mean, and the biased variance.
pub(crate) struct Centered<B: Backend> {
    pub(crate) deviation: FloatTensor<B>,
    pub(crate) mean: FloatTensor<B>,
    pub(crate) variance: FloatTensor<B>,
}

/// Takes the batch statistics of `input` and centers it, in place where it is the only handle.
pub(crate) fn center<B: Backend>(input: FloatTensor<B>) -> Centered<B> {
    let values = values_per_channel(&input.shape()) as f64;
    let average = |sum: FloatTensor<B>| B::float_div_scalar(sum, values.into());

    // A sum of many values far from zero loses the digits that their spread lives in. The mean of
    // what is left after subtracting it restores them.
    let rough = average(channel_sum::<B>(input.clone()));
    let correction = average(channel_sum::<B>(B::float_sub(input.clone(), rough.clone())));
    let mean = B::float_add(rough, correction);
    let deviation = B::float_sub(input, mean.clone());
    let squares = B::float_mul(deviation.clone(), deviation.clone());
    Centered {
        deviation,
        mean,
        variance: average(channel_sum::<B>(squares)),
    }
}

/// Running statistics after a batch, in their own dtypes: `(1 - momentum) * running + momentum * batch`, the
/// batch's variance times `factor` first.
pub(crate) fn running_moments<B: Backend>(
    running: ChannelMoments<B>,
    batch: ChannelMoments<B>,
    momentum: f64,
    factor: f64,
) -> ChannelMoments<B> {
    let moved = |running: FloatTensor<B>, batch: FloatTensor<B>| {
        let batch = cast::<B>(batch, running.dtype());
        B::float_add(
            B::float_mul_scalar(running, (1.0 - momentum).into()),
            B::float_mul_scalar(batch, momentum.into()),
        )
    };
    let variance = if factor == 1.0 {
        batch.variance
    } else {
        B::float_mul_scalar(batch.variance, factor.into())
    };
    ChannelMoments {
        mean: moved(running.mean, batch.mean),
        variance: moved(running.variance, variance),
    }
}

/// [`NormSpec::inv_std`] of each channel, from the variance with the variant's degrees of freedom.
pub(crate) fn inv_std<B: Backend>(variance: FloatTensor<B>, norm: NormSpec) -> FloatTensor<B> {
    let epsilon = norm.epsilon.into();
    B::float_recip(match norm.variant {
        NormVariant::BatchNorm => B::float_sqrt(B::float_add_scalar(variance, epsilon)),
        NormVariant::Tutorial => B::float_add_scalar(B::float_sqrt(variance), epsilon),
    })
}

/// `gamma * s`, or `s` without gamma.
pub(crate) fn scale<B: Backend>(
    gamma: Option<&FloatTensor<B>>,
    inv_std: FloatTensor<B>,
) -> FloatTensor<B> {
    match gamma {
        Some(gamma) => {
            let gamma = broadcast::<B>(gamma.clone(), inv_std.rank());
            B::float_mul(cast::<B>(gamma, inv_std.dtype()), inv_std)
        }
        None => inv_std,
    }
}

/// `scale * deviation + beta`, in place where `deviation` is the only handle.
pub(crate) fn apply<B: Backend>(
    deviation: FloatTensor<B>,
    scale: FloatTensor<B>,
    beta: Option<FloatTensor<B>>,
) -> FloatTensor<B> {
    let (rank, dtype) = (deviation.rank(), deviation.dtype());
    let scaled = B::float_mul(deviation, scale);
    match beta {
        Some(beta) => B::float_add(scaled, cast::<B>(broadcast::<B>(beta, rank), dtype)),
        None => scaled,
    }
}

/// The two sums over a channel that all gradients of the norm are made of.
pub(crate) struct GradSums<B: Backend> {
    /// `sum(g)`.
    pub(crate) grad: FloatTensor<B>,
    /// `sum(g * (z - mean))`, where the deviations are known.
    pub(crate) grad_deviation: Option<FloatTensor<B>>,
}

impl<B: Backend> GradSums<B> {
    pub(crate) fn new(grad: &FloatTensor<B>, deviation: Option<&FloatTensor<B>>) -> Self {
        Self {
            grad: channel_sum::<B>(grad.clone()),
            grad_deviation: deviation
                .map(|deviation| channel_sum::<B>(B::float_mul(grad.clone(), deviation.clone()))),
        }
    }

    pub(crate) fn add(self, other: Self) -> Self {
        Self {
            grad: B::float_add(self.grad, other.grad),
            grad_deviation: self
                .grad_deviation
                .zip(other.grad_deviation)
                .map(|(this, other)| B::float_add(this, other)),
        }
    }
}

/// One norm with its statistics known: what forward and backward derive from them.
pub(crate) struct ChannelNorm<B: Backend> {
    norm: NormSpec,
    values: usize,
    gamma: Option<FloatTensor<B>>,
    /// With the variant's degrees of freedom.
    variance: FloatTensor<B>,
    pub(crate) inv_std: FloatTensor<B>,
}

impl<B: Backend> ChannelNorm<B> {
    /// `biased_variance` is `[1, channels, 1..]`, over `values` values a channel.
    pub(crate) fn new(
        norm: NormSpec,
        values: usize,
        gamma: Option<FloatTensor<B>>,
        biased_variance: FloatTensor<B>,
    ) -> Self {
        let variance = match norm.variant.degrees_of_freedom() {
            0 => biased_variance,
            ddof => {
                let correction = values as f64 / (values - ddof) as f64;
                B::float_mul_scalar(biased_variance, correction.into())
            }
        };
        Self::of(norm, values, gamma, variance)
    }

    /// From a given variance, without a correction.
    pub(crate) fn given(
        norm: NormSpec,
        gamma: Option<FloatTensor<B>>,
        variance: FloatTensor<B>,
    ) -> Self {
        Self::of(norm, 0, gamma, variance)
    }

    fn of(
        norm: NormSpec,
        values: usize,
        gamma: Option<FloatTensor<B>>,
        variance: FloatTensor<B>,
    ) -> Self {
        Self {
            norm,
            values,
            gamma,
            inv_std: inv_std::<B>(variance.clone(), norm),
            variance,
        }
    }

    /// `gamma * s`.
    pub(crate) fn scale(&self) -> FloatTensor<B> {
        scale::<B>(self.gamma.as_ref(), self.inv_std.clone())
    }

    /// [`NormSpec::slope_factor`] of each channel.
    fn slope_factor(&self) -> FloatTensor<B> {
        let values = (self.values - self.norm.variant.degrees_of_freedom()) as f64;
        let squared = B::float_mul(self.inv_std.clone(), self.inv_std.clone());
        let slope = match self.norm.variant {
            // s = (var + eps)^(-1/2), ds/dvar = -s^3 / 2
            NormVariant::BatchNorm => B::float_mul(squared, self.inv_std.clone()),
            // s = 1 / (sqrt(var) + eps), ds/dvar = -s^2 / (2 sqrt(var)), taken as 0 at var = 0
            NormVariant::Tutorial => {
                let std = B::float_sqrt(self.variance.clone());
                let bool_dtype = get_or_init_device_settings::<B>(&std.device()).bool_dtype;
                let constant = B::float_equal_elem(std.clone(), 0f64.into(), bool_dtype);
                B::float_mask_fill(B::float_div(squared, std), constant, 0f64.into())
            }
        };
        B::float_mul_scalar(slope, (-1.0 / values).into())
    }

    /// Coefficients of the gradient of the norm's input, from `sum(g)` and
    /// `sum(g * (z - mean))`.
    pub(crate) fn input_grad(
        &self,
        grad: FloatTensor<B>,
        grad_deviation: FloatTensor<B>,
    ) -> InputGrad<B> {
        let slope = scale::<B>(self.gamma.as_ref(), self.slope_factor());
        let mean_grad = B::float_div_scalar(grad, (self.values as f64).into());
        InputGrad {
            scale: self.scale(),
            slope: B::float_mul(slope, grad_deviation),
            offset: B::float_neg(B::float_mul(self.scale(), mean_grad)),
        }
    }
}

/// Per-channel coefficients of the gradient of the norm's input,
/// `scale * g + slope * (z - mean) + offset`.
///
/// The mean is not folded into the offset: where it is large, that would cancel.
pub(crate) struct InputGrad<B: Backend> {
    scale: FloatTensor<B>,
    slope: FloatTensor<B>,
    offset: FloatTensor<B>,
}

impl<B: Backend> InputGrad<B> {
    /// The gradient, in place on `deviation` and `grad` where they are the only handles.
    pub(crate) fn apply(&self, grad: FloatTensor<B>, deviation: FloatTensor<B>) -> FloatTensor<B> {
        let deviation = B::float_mul(deviation, self.slope.clone());
        let deviation = B::float_add(deviation, self.offset.clone());
        B::float_add(deviation, B::float_mul(grad, self.scale.clone()))
    }
}
