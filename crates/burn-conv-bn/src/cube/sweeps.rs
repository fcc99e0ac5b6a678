//! The sweeps over activations as one kernel of `burn-conv-bn-cubecl` each.

use burn::backend::tensor::FloatTensor;
use burn::tensor::{DType, Shape};
use burn_conv_bn_cubecl::{
    Activation as KernelActivation, Affine as KernelAffine, ChannelTable, GradSums,
    Moments as KernelMoments, Norm as KernelNorm, Parameter, PoolArgmax, PreActivation, Running,
    channel_table, moments_and_running, norm_input_grad, normalize,
    running_moments as kernel_running_moments,
};
use burn_cubecl::CubeBackend;
use burn_cubecl::tensor::CubeTensor;

use crate::backend::{ChannelMoments, NormOutput, RunningStatistics};
use crate::portable;
use crate::portable::sweeps::{Affine, Argument, Moments, Sweeps};
use crate::spec::{Activation, NormSpec, NormVariant, StatisticsKind, values_per_channel};

/// The sweeps as one kernel each.
pub(super) struct Kernels;

impl Sweeps<CubeBackend> for Kernels {
    type Norm = ChannelTable;
    type Chunk = PreActivation;
    type Sums = GradSums;
    type Pool = PoolArgmax;

    fn normalize(
        input: FloatTensor<CubeBackend>,
        affine: Affine<CubeBackend>,
        residual: Option<FloatTensor<CubeBackend>>,
        norm: NormSpec,
        function: Activation,
        running: RunningStatistics<CubeBackend>,
    ) -> NormOutput<CubeBackend> {
        let statistics = batch_statistics(&input, kernel_affine(&affine), norm, running);
        let function = kernel_activation(function);
        NormOutput {
            output: normalize(input, Some(&statistics.table), residual.as_ref(), function),
            mean: statistics.moments.mean,
            variance: statistics.moments.variance,
            running: statistics.running,
        }
    }

    fn normalize_by(
        norm: &ChannelTable,
        input: FloatTensor<CubeBackend>,
        residual: Option<FloatTensor<CubeBackend>>,
        function: Activation,
    ) -> FloatTensor<CubeBackend> {
        let function = kernel_activation(function);
        normalize(input, Some(norm), residual.as_ref(), function)
    }

    fn activate(
        value: FloatTensor<CubeBackend>,
        residual: Option<FloatTensor<CubeBackend>>,
        function: Activation,
    ) -> FloatTensor<CubeBackend> {
        if residual.is_none() && function == Activation::Identity {
            return value;
        }
        normalize(value, None, residual.as_ref(), kernel_activation(function))
    }

    fn norm(
        moments: Moments<CubeBackend>,
        affine: Affine<CubeBackend>,
        norm: NormSpec,
        statistics: StatisticsKind,
        shape: &Shape,
    ) -> ChannelTable {
        let moments = KernelMoments {
            mean: moments.mean,
            variance: moments.variance,
        };
        let norm = kernel_norm(norm);
        // A given variance is used as it is, whatever the number of values.
        let (norm, values) = match statistics {
            StatisticsKind::Batch => (norm, values_per_channel(shape)),
            StatisticsKind::Fixed => (
                KernelNorm {
                    degrees_of_freedom: 0,
                    ..norm
                },
                1,
            ),
        };
        let table = channel_table(&moments, kernel_affine(&affine), norm, values);
        match statistics {
            StatisticsKind::Batch => table,
            StatisticsKind::Fixed => table.with_constant_statistics(),
        }
    }

    fn chunk(
        norm: Option<&ChannelTable>,
        output_grad: FloatTensor<CubeBackend>,
        pool: Option<(&PoolArgmax, usize)>,
        norm_input: Option<FloatTensor<CubeBackend>>,
        argument: Argument<CubeBackend>,
        function: Activation,
    ) -> PreActivation {
        let (residual, output) = match argument {
            Argument::Norm { residual } => (residual, None),
            Argument::Value(value) => (None, Some(value)),
        };
        PreActivation {
            output_grad,
            pool: pool.map(|(pool, first_image)| PoolArgmax {
                first_image,
                ..pool.clone()
            }),
            norm_input: norm_input.filter(|_| norm.is_some()),
            residual,
            output,
            activation: kernel_activation(function),
        }
    }

    fn sums(norm: Option<&ChannelTable>, chunk: &PreActivation) -> GradSums {
        GradSums::new(chunk, norm)
    }

    fn add(sums: GradSums, other: GradSums) -> GradSums {
        sums.merge(other)
    }

    fn affine_grads(norm: &mut ChannelTable, sums: GradSums) -> [FloatTensor<CubeBackend>; 2] {
        let grads = sums.finish(norm);
        [grads.gamma, grads.beta]
    }

    fn grad_sum(sums: GradSums) -> FloatTensor<CubeBackend> {
        sums.grad()
    }

    fn norm_input_grad(
        norm: Option<&ChannelTable>,
        mut chunk: PreActivation,
        wants_residual: bool,
    ) -> (FloatTensor<CubeBackend>, Option<FloatTensor<CubeBackend>>) {
        if norm.is_none() {
            chunk.norm_input = None;
        }
        let result = norm_input_grad(chunk, norm, wants_residual);
        (result.grad, result.residual_grad)
    }

    /// The gradient takes the place of the recomputed output.
    fn workspace(values: usize, dtype: DType) -> usize {
        values * dtype.size()
    }
}

/// The batch's statistics, and the running ones after it.
pub(super) struct BatchStatistics {
    pub(super) moments: KernelMoments,
    pub(super) table: ChannelTable,
    pub(super) running: RunningStatistics<CubeBackend>,
}

pub(super) fn batch_statistics(
    input: &CubeTensor,
    affine: KernelAffine,
    norm: NormSpec,
    running: RunningStatistics<CubeBackend>,
) -> BatchStatistics {
    let running = match running {
        RunningStatistics::Absent => None,
        RunningStatistics::Present {
            mean,
            variance,
            momentum,
            factor,
        } => Some(Running {
            moments: KernelMoments { mean, variance },
            momentum,
            factor,
        }),
    };
    let statistics = moments_and_running(input, affine, kernel_norm(norm), running.as_ref());
    let updated = running.zip(statistics.running);
    BatchStatistics {
        moments: statistics.moments,
        table: statistics.table,
        running: updated.map_or(RunningStatistics::Absent, |(before, after)| {
            RunningStatistics::Present {
                mean: after.mean,
                variance: after.variance,
                momentum: before.momentum,
                factor: before.factor,
            }
        }),
    }
}

/// In one launch, unless the dtypes are such that the kernel would round: statistics of an f64 model over data
/// in f32.
pub(super) fn running_moments(
    running: ChannelMoments<CubeBackend>,
    batch: ChannelMoments<CubeBackend>,
    momentum: f64,
    factor: f64,
) -> ChannelMoments<CubeBackend> {
    let dtypes = [running.mean.dtype, running.variance.dtype, batch.mean.dtype];
    if dtypes[0] != dtypes[1] || dtypes[0].size() > dtypes[2].size() {
        return portable::norm::running_moments::<CubeBackend>(running, batch, momentum, factor);
    }
    let kernel_moments = |moments: ChannelMoments<CubeBackend>| KernelMoments {
        mean: moments.mean,
        variance: moments.variance,
    };
    let running = Running {
        moments: kernel_moments(running),
        momentum,
        factor,
    };
    let updated = kernel_running_moments(&running, &kernel_moments(batch));
    ChannelMoments {
        mean: updated.mean,
        variance: updated.variance,
    }
}

pub(super) fn kernel_affine(affine: &Affine<CubeBackend>) -> KernelAffine<'_> {
    KernelAffine {
        gamma: affine.gamma.as_ref(),
        beta: affine.beta.as_ref(),
    }
}

/// [`NormSpec::inv_std`] for the kernels: epsilon inside or outside the root.
pub(super) fn kernel_norm(norm: NormSpec) -> KernelNorm {
    let (inner_epsilon, outer_epsilon) = match norm.variant {
        NormVariant::BatchNorm => (norm.epsilon, 0.0),
        NormVariant::Tutorial => (0.0, norm.epsilon),
    };
    KernelNorm {
        inner_epsilon,
        outer_epsilon,
        degrees_of_freedom: norm.variant.degrees_of_freedom(),
    }
}

pub(super) fn kernel_activation(activation: Activation) -> KernelActivation {
    match activation {
        Activation::Identity => KernelActivation::Identity,
        Activation::Relu => KernelActivation::Relu,
        Activation::Relu6 => KernelActivation::Relu6,
        Activation::LeakyRelu { negative_slope } => {
            KernelActivation::LeakyRelu(Parameter::new(negative_slope))
        }
        Activation::Silu => KernelActivation::Silu,
        Activation::Gelu => KernelActivation::Gelu,
        Activation::GeluApproximate => KernelActivation::GeluApproximate,
        Activation::HardSwish => KernelActivation::HardSwish,
        Activation::Sigmoid => KernelActivation::Sigmoid,
        Activation::HardSigmoid { alpha, beta } => {
            KernelActivation::HardSigmoid(Parameter::new(alpha), Parameter::new(beta))
        }
        Activation::Tanh => KernelActivation::Tanh,
        Activation::Elu { alpha } => KernelActivation::Elu(Parameter::new(alpha)),
        Activation::Mish => KernelActivation::Mish,
        Activation::Softplus { beta } => KernelActivation::Softplus(Parameter::new(beta)),
    }
}
