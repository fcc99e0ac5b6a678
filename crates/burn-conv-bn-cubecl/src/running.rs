//! Running statistics.

use burn_cubecl::cubecl;
use burn_cubecl::tensor::CubeTensor;
use cubecl::ir::ElemType;
use cubecl::prelude::*;

use crate::assert_values;
use crate::element::element_type;
use crate::table::{Moments, channel_values};

/// Running statistics that a launch updates with those of its batch.
#[derive(Clone, Debug)]
pub struct Running {
    /// Mean and variance, of one dtype with each other.
    pub moments: Moments,
    /// Weight of the batch.
    pub momentum: f64,
    /// Of the batch's variance, which is biased.
    pub factor: f64,
}

impl Running {
    /// Updated moments without values.
    ///
    /// # Panics
    ///
    /// Panics unless there is a value for each channel of the batch, as kernels rely on.
    pub(crate) fn results(&self, channels: usize) -> Moments {
        let like = &self.moments.mean;
        for (what, tensor) in [("mean", like), ("variance", &self.moments.variance)] {
            assert_values(format_args!("running {what}"), tensor, channels);
        }
        let channel_values = || channel_values(like, 1, channels);
        Moments {
            mean: channel_values(),
            variance: channel_values(),
        }
    }

    pub(crate) fn launch<R: Float>(
        &self,
        results: &Moments,
        accumulator: ElemType,
    ) -> RunningArgsLaunch<R> {
        let tensor = |tensor: &CubeTensor| tensor.clone().into_tensor_arg();
        let scalar = |value: f64| InputScalar::new(value, accumulator);
        RunningArgsLaunch::new(
            tensor(&self.moments.mean),
            tensor(&self.moments.variance),
            tensor(&results.mean),
            tensor(&results.variance),
            scalar(1.0 - self.momentum),
            scalar(self.momentum),
            scalar(self.factor),
        )
    }

    pub(crate) fn element(&self) -> ElemType {
        element_type(self.moments.mean.dtype)
    }
}

/// [`Running`] and its results in a kernel.
#[derive(CubeType, CubeLaunch)]
pub(crate) struct RunningArgs<R: Float> {
    old_mean: OwnedTensor<R>,
    old_variance: OwnedTensor<R>,
    mean: OwnedTensor<R>,
    variance: OwnedTensor<R>,
    keep: InputScalar,
    momentum: InputScalar,
    factor: InputScalar,
}

/// Updates one channel.
#[cube]
pub(crate) fn update_channel<T: Float, R: Float>(
    running: &mut RunningArgs<R>,
    batch_mean: T,
    batch_variance: T,
    channel: usize,
) {
    let keep = running.keep.get::<T>();
    let momentum = running.momentum.get::<T>();
    let mean = T::cast_from(running.old_mean[channel * running.old_mean.stride(0)]);
    let variance = T::cast_from(running.old_variance[channel * running.old_variance.stride(0)]);
    let batch_variance = batch_variance * running.factor.get::<T>();
    running.mean[channel] = R::cast_from(mean * keep + batch_mean * momentum);
    running.variance[channel] = R::cast_from(variance * keep + batch_variance * momentum);
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn running_moments_kernel<T: Float, R: Float>(
    batch_mean: &Tensor<T>,
    batch_variance: &Tensor<T>,
    running: &mut RunningArgs<R>,
    channels: usize,
    #[define(T, R)] _elements: [ElemType; 2],
) {
    let channel = ABSOLUTE_POS;
    if channel >= channels {
        terminate!();
    }
    update_channel::<T, R>(
        running,
        batch_mean[channel * batch_mean.stride(0)],
        batch_variance[channel * batch_variance.stride(0)],
        channel,
    );
}

/// Running statistics after a batch: `(1 - momentum) * running + momentum * batch`, with the batch's variance
/// times `factor`, which is 1 for the biased one. In the dtype of `running`, in one launch;
/// [`moments_and_running`](crate::moments_and_running) needs none.
///
/// The dtype of `batch` is the accumulator's.
///
/// # Panics
///
/// Panics if one of the means and variances has another number of channels.
pub fn running_moments(running: &Running, batch: &Moments) -> Moments {
    let channels = batch.mean.meta.num_elements();
    let results = running.results(channels);
    assert_values("batch variance", &batch.variance, channels);
    let client = batch.mean.client.clone();
    let accumulator = element_type(batch.mean.dtype);
    let cube_dim = CubeDim::new(&client, channels.max(1));
    if channels > 0 {
        // SAFETY: the kernel stops at the last channel, and each tensor has a value for it.
        unsafe {
            running_moments_kernel::launch_unchecked(
                &client,
                cubecl::calculate_cube_count_elemwise(&client, channels, cube_dim),
                cube_dim,
                results.mean.required_address_type(),
                batch.mean.clone().into_tensor_arg(),
                batch.variance.clone().into_tensor_arg(),
                running.launch(&results, accumulator),
                channels,
                [accumulator, running.element()],
            );
        }
    }
    results
}
