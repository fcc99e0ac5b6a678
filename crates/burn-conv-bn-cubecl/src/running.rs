//! Running statistics.

use burn_cubecl::cubecl;
use burn_cubecl::tensor::CubeTensor;
use cubecl::ir::ElemType;
use cubecl::prelude::*;

use crate::element::element_type;
use crate::table::{Moments, channel_values};

#[cube]
fn moved<T: Float, P: Float>(running: P, batch: T, keep: T, momentum: T) -> P {
    P::cast_from(T::cast_from(running) * keep + batch * momentum)
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn running_moments_kernel<T: Float, P: Float>(
    running_mean: &Tensor<P>,
    running_variance: &Tensor<P>,
    batch_mean: &Tensor<T>,
    batch_variance: &Tensor<T>,
    mean: &mut Tensor<P>,
    variance: &mut Tensor<P>,
    keep: InputScalar,
    momentum: InputScalar,
    factor: InputScalar,
    channels: usize,
    #[define(T, P)] _elements: [ElemType; 2],
) {
    let channel = ABSOLUTE_POS;
    if channel >= channels {
        terminate!();
    }
    let keep = keep.get::<T>();
    let momentum = momentum.get::<T>();
    mean[channel] = moved::<T, P>(
        running_mean[channel * running_mean.stride(0)],
        batch_mean[channel * batch_mean.stride(0)],
        keep,
        momentum,
    );
    variance[channel] = moved::<T, P>(
        running_variance[channel * running_variance.stride(0)],
        batch_variance[channel * batch_variance.stride(0)] * factor.get::<T>(),
        keep,
        momentum,
    );
}

/// Running statistics after a batch: `(1 - momentum) * running + momentum * batch`, with the batch's variance
/// times `factor`, which is 1 for the biased one. In the dtype of `running`, in one launch.
///
/// Both means are of one dtype with their variances; that of `batch` is the accumulator's.
pub fn running_moments(running: &Moments, batch: &Moments, momentum: f64, factor: f64) -> Moments {
    let channels = batch.mean.meta.num_elements();
    let like = &running.mean;
    let (mean, variance) = (
        channel_values(like, 1, channels),
        channel_values(like, 1, channels),
    );
    let client = like.client.clone();
    let accumulator = element_type(batch.mean.dtype);
    let cube_dim = CubeDim::new(&client, channels.max(1));
    let arg = |tensor: &CubeTensor| tensor.clone().into_tensor_arg();
    if channels > 0 {
        // SAFETY: the kernel stops at the last channel.
        unsafe {
            running_moments_kernel::launch_unchecked(
                &client,
                cubecl::calculate_cube_count_elemwise(&client, channels, cube_dim),
                cube_dim,
                mean.required_address_type(),
                arg(&running.mean),
                arg(&running.variance),
                arg(&batch.mean),
                arg(&batch.variance),
                arg(&mean),
                arg(&variance),
                InputScalar::new(1.0 - momentum, accumulator),
                InputScalar::new(momentum, accumulator),
                InputScalar::new(factor, accumulator),
                channels,
                [accumulator, element_type(like.dtype)],
            );
        }
    }
    Moments { mean, variance }
}
