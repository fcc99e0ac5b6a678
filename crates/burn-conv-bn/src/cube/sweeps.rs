//! The sweeps over activations as one kernel of `burn-conv-bn-cubecl` each.

use burn::backend::tensor::FloatTensor;
use burn::tensor::{DType, Shape};
use burn_conv_bn_cubecl::{
    Activation as KernelActivation, Affine as KernelAffine, ChannelTable, GradSums,
    Moments as KernelMoments, Norm as KernelNorm, Parameter, PoolArgmax, PreActivation,
    channel_table, moments, norm_input_grad, normalize, running_moments as kernel_running_moments,
};
use burn_cubecl::CubeBackend;

use crate::backend::{ChannelMoments, NormOutput};
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
    ) -> NormOutput<CubeBackend> {
        let (moments, table) = moments(&input, kernel_affine(&affine), kernel_norm(norm));
        NormOutput {
            output: normalize(
                input,
                Some(&table),
                residual.as_ref(),
                kernel_activation(function),
            ),
            mean: moments.mean,
            variance: moments.variance,
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
    let (running, batch) = (kernel_moments(running), kernel_moments(batch));
    let updated = kernel_running_moments(&running, &batch, momentum, factor);
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
