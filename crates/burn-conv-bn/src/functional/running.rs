//! Running statistics on their way through an op.

use burn::backend::Dispatch;
use burn::tensor::{DType, Tensor};

use crate::backend::{ChannelMoments, ConvBnBackend, RunningStatistics};
use crate::spec::accumulator_dtype;

/// Running statistics before a batch.
#[derive(Clone, Debug)]
pub(crate) struct Running {
    pub(crate) mean: Tensor<1>,
    pub(crate) variance: Tensor<1>,
    pub(crate) momentum: f64,
    /// Of the batch's biased variance.
    pub(crate) factor: f64,
}

impl Running {
    /// Mean and variance after a batch with these. Constant to autodiff.
    pub(crate) fn after(self, mean: Tensor<1>, variance: Tensor<1>) -> [Tensor<1>; 2] {
        let moments = |mean: Tensor<1>, variance: Tensor<1>| ChannelMoments::<Dispatch> {
            mean: mean.into_dispatch(),
            variance: variance.into_dispatch(),
        };
        let batch = moments(mean, variance);
        let running = moments(self.mean, self.variance);
        let running = Dispatch::running_moments(running, batch, self.momentum, self.factor);
        [running.mean, running.variance].map(Tensor::from_dispatch)
    }

    /// For an op over data of that dtype: none where its kernels would round.
    pub(super) fn into_statistics(this: Option<Self>, data: DType) -> RunningStatistics<Dispatch> {
        match this {
            Some(running)
                if running.mean.dtype() == running.variance.dtype()
                    && running.mean.dtype().size() <= accumulator_dtype(data).size() =>
            {
                RunningStatistics::Present {
                    mean: running.mean.into_dispatch(),
                    variance: running.variance.into_dispatch(),
                    momentum: running.momentum,
                    factor: running.factor,
                }
            }
            _ => RunningStatistics::Absent,
        }
    }
}
