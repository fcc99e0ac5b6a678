//! Running statistics.

use burn_cubecl::cubecl;
use burn_cubecl::kernel::into_contiguous;
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
            assert_values(format_args!("running {what}"), tensor, channels, like.dtype);
        }
        let channel_values = || channel_values(like, 1, channels);
        Moments {
            mean: channel_values(),
            variance: channel_values(),
        }
    }

    pub(crate) fn launch<R: Float, V: Size>(
        &self,
        results: &Moments,
        accumulator: ElemType,
    ) -> RunningArgsLaunch<R, V> {
        let tensor = |tensor: &CubeTensor| into_contiguous(tensor.clone()).into_tensor_arg();
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
pub(crate) struct RunningArgs<R: Float, V: Size> {
    old_mean: OwnedTensor<Vector<R, V>>,
    old_variance: OwnedTensor<Vector<R, V>>,
    mean: OwnedTensor<Vector<R, V>>,
    variance: OwnedTensor<Vector<R, V>>,
    keep: InputScalar,
    momentum: InputScalar,
    factor: InputScalar,
}

/// Updates one vector of channels.
#[cube]
pub(crate) fn update_channels<T: Float, R: Float, V: Size>(
    running: &mut RunningArgs<R, V>,
    batch_mean: Vector<T, V>,
    batch_variance: Vector<T, V>,
    vector: usize,
) {
    let keep = Vector::new(running.keep.get::<T>());
    let momentum = Vector::new(running.momentum.get::<T>());
    let mean = Vector::<T, V>::cast_from(running.old_mean[vector]);
    let variance = Vector::<T, V>::cast_from(running.old_variance[vector]);
    let batch_variance = batch_variance * Vector::new(running.factor.get::<T>());
    running.mean[vector] = Vector::cast_from(mean * keep + batch_mean * momentum);
    running.variance[vector] = Vector::cast_from(variance * keep + batch_variance * momentum);
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn running_moments_kernel<T: Float, R: Float, V: Size>(
    batch_mean: &Tensor<Vector<T, V>>,
    batch_variance: &Tensor<Vector<T, V>>,
    running: &mut RunningArgs<R, V>,
    vectors: usize,
    #[define(T, R)] _elements: [ElemType; 2],
) {
    let vector = ABSOLUTE_POS;
    if vector >= vectors {
        terminate!();
    }
    update_channels::<T, R, V>(running, batch_mean[vector], batch_variance[vector], vector);
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
    assert_values(
        "batch variance",
        &batch.variance,
        channels,
        batch.mean.dtype,
    );
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
                1,
                into_contiguous(batch.mean.clone()).into_tensor_arg(),
                into_contiguous(batch.variance.clone()).into_tensor_arg(),
                running.launch(&results, accumulator),
                channels,
                [accumulator, running.element()],
            );
        }
    }
    results
}
