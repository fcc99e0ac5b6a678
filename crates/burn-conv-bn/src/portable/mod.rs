//! The ops composed of Burn's own: the default bodies of [`ConvBnBackend`](crate::backend::ConvBnBackend),
//! and the reference that kernels are compared with.

pub(crate) mod activation;
mod batch;
pub(crate) mod batch_norm;
pub(crate) mod conv;
pub(crate) mod conv_bn;
mod fold;
pub(crate) mod layout;
pub(crate) mod max_pool;
pub(crate) mod norm;
pub(crate) mod sweeps;
pub(crate) mod workspace;

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, TensorMetadata};
use burn::tensor::{DType, Shape};

use crate::backend::tensors::{ConvBnInputs, Statistics};
use crate::spec::accumulator_dtype;

/// Casts unless the tensor is of that dtype already.
pub(crate) fn cast<B: Backend>(tensor: FloatTensor<B>, dtype: DType) -> FloatTensor<B> {
    if tensor.dtype() == dtype {
        tensor
    } else {
        B::float_cast(tensor, dtype.into())
    }
}

/// `[channels]` viewed as `[1, channels, 1..]`, so that it broadcasts over `[batch, channels,
/// spatial..]` of that rank.
pub(crate) fn broadcast<B: Backend>(tensor: FloatTensor<B>, rank: usize) -> FloatTensor<B> {
    let mut shape = vec![1; rank];
    shape[1] = tensor.shape().num_elements();
    B::float_reshape(tensor, Shape::from(shape))
}

/// `[1, channels, 1..]` viewed as `[channels]`.
pub(crate) fn channels<B: Backend>(tensor: FloatTensor<B>) -> FloatTensor<B> {
    let channels = tensor.shape().num_elements();
    B::float_reshape(tensor, Shape::new([channels]))
}

/// Sums `[batch, channels, spatial..]` over all but the channels: `[1, channels, 1..]`.
pub(crate) fn channel_sum<B: Backend>(tensor: FloatTensor<B>) -> FloatTensor<B> {
    // The innermost axis first: each partial sum is then over neighbours in memory, and what is
    // left for the next axis is smaller by that axis.
    let dims: Vec<usize> = (2..tensor.rank()).rev().chain([0]).collect();
    B::float_sum_dims(tensor, &dims)
}

/// By how much the bias moves the mean under batch statistics, as `[channels]` in the
/// accumulator's dtype.
pub(crate) fn bias_shift<B: Backend>(inputs: &ConvBnInputs<B>) -> Option<FloatTensor<B>> {
    match inputs.statistics {
        Statistics::Batch => inputs.bias.as_option().map(|bias| {
            let dtype = accumulator_dtype(bias.dtype());
            cast::<B>(bias.clone(), dtype)
        }),
        Statistics::Fixed { .. } => None,
    }
}

/// The mean of the convolution's output with its bias, from the mean without it.
pub(crate) fn shifted_mean<B: Backend>(
    mean: FloatTensor<B>,
    shift: Option<FloatTensor<B>>,
) -> FloatTensor<B> {
    match shift {
        Some(shift) => B::float_add(mean, shift),
        None => mean,
    }
}
