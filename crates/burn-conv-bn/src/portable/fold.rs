//! Norms of given statistics folded into a convolution.

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, TensorMetadata};
use burn::tensor::{DType, Shape};

use super::layout::Layouts;
use super::sweeps::Affine;
use super::{cast, conv, norm};
use crate::spec::{ConvSpec, NormSpec, accumulator_dtype};

/// Whether given statistics are folded into a weight of that dtype. In half precision a folded weight or
/// offset may overflow: the norm is then a sweep in the accumulator's dtype.
pub(super) fn folds(dtype: DType) -> bool {
    accumulator_dtype(dtype) == dtype
}

/// Factors of a norm with given statistics: `[channels]` in the accumulator's dtype.
pub(super) struct Scales<B: Backend> {
    /// `s`.
    pub(super) inv_std: FloatTensor<B>,
    /// `gamma * s`.
    pub(super) scale: FloatTensor<B>,
}

impl<B: Backend> Scales<B> {
    pub(super) fn new(
        gamma: Option<&FloatTensor<B>>,
        variance: &FloatTensor<B>,
        norm: NormSpec,
        dtype: DType,
    ) -> Self {
        let accumulator = accumulator_dtype(dtype);
        let inv_std = norm::inv_std::<B>(cast::<B>(variance.clone(), accumulator), norm);
        let scale = match gamma {
            Some(gamma) => B::float_mul(cast::<B>(gamma.clone(), accumulator), inv_std.clone()),
            None => inv_std.clone(),
        };
        Self { inv_std, scale }
    }
}

/// A norm with given statistics as an affine map, to be folded into the convolution.
pub(super) struct Folded<B: Backend> {
    /// `gamma * s`.
    scale: FloatTensor<B>,
    /// `beta - gamma * s * (mean - bias)`.
    offset: FloatTensor<B>,
    dtype: DType,
}

impl<B: Backend> Folded<B> {
    pub(super) fn new(
        affine: Affine<B>,
        bias: Option<&FloatTensor<B>>,
        (mean, variance): (&FloatTensor<B>, &FloatTensor<B>),
        norm: NormSpec,
        dtype: DType,
    ) -> Self {
        let scale = Scales::<B>::new(affine.gamma.as_ref(), variance, norm, dtype).scale;
        let accumulator = scale.dtype();
        let center = center::<B>(mean.clone(), bias, accumulator);
        let scaled = B::float_mul(center, scale.clone());
        let offset = match affine.beta {
            Some(beta) => B::float_sub(cast::<B>(beta, accumulator), scaled),
            None => B::float_neg(scaled),
        };
        Self {
            scale,
            offset,
            dtype,
        }
    }

    /// The convolution with the norm folded in.
    pub(super) fn conv<L: Layouts<B>>(
        &self,
        input: FloatTensor<B>,
        weight: FloatTensor<B>,
        spec: &ConvSpec,
    ) -> FloatTensor<B> {
        let weight = scale_weight::<B>(weight, self.scale.clone());
        let offset = cast::<B>(self.offset.clone(), self.dtype);
        conv::forward::<B, L>(input, weight, Some(offset), spec)
    }
}

/// `weight` with each output channel times its `scale`, in the weight's dtype.
pub(super) fn scale_weight<B: Backend>(
    weight: FloatTensor<B>,
    scale: FloatTensor<B>,
) -> FloatTensor<B> {
    let dtype = weight.dtype();
    let mut per_output = vec![1; weight.rank()];
    per_output[0] = scale.shape().num_elements();
    let accumulator = scale.dtype();
    let scale = B::float_reshape(scale, Shape::from(per_output));
    cast::<B>(B::float_mul(cast::<B>(weight, accumulator), scale), dtype)
}

/// `mean - bias`, `[channels]`: the mean of the convolution's output without its bias.
pub(super) fn center<B: Backend>(
    mean: FloatTensor<B>,
    bias: Option<&FloatTensor<B>>,
    dtype: DType,
) -> FloatTensor<B> {
    let mean = cast::<B>(mean, dtype);
    match bias {
        Some(bias) => B::float_sub(mean, cast::<B>(bias.clone(), dtype)),
        None => mean,
    }
}
