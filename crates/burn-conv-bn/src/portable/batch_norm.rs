//! Norm and activation with no convolution before them, forward and backward.

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, TensorMetadata};

use super::cast;
use super::sweeps::{Affine, Argument, Composed, Moments, Sweeps};
use crate::backend::tensors::{
    BatchNormBackwardOptions, NormGrads, NormInputs, NormOutput, NormSaved, NormStatistics,
    OptionalTensor, RunningStatistics,
};
use crate::spec::{BatchNormOptions, StatisticsKind, accumulator_dtype};

/// Forward with Burn's own ops.
pub(crate) fn forward<B: Backend>(
    inputs: NormInputs<B>,
    options: BatchNormOptions,
) -> NormOutput<B> {
    forward_by::<B, Composed>(inputs, options)
}

/// Backward with Burn's own ops.
pub(crate) fn backward<B: Backend>(
    saved: NormSaved<B>,
    options: &BatchNormBackwardOptions,
) -> NormGrads<B> {
    backward_by::<B, Composed>(saved, options)
}

pub(crate) fn forward_by<B: Backend, S: Sweeps<B>>(
    inputs: NormInputs<B>,
    options: BatchNormOptions,
) -> NormOutput<B> {
    let affine = Affine {
        gamma: inputs.gamma.into_option(),
        beta: inputs.beta.into_option(),
    };
    let BatchNormOptions { norm, activation } = options;
    let kind = inputs.statistics.kind();
    match inputs.statistics {
        NormStatistics::Batch => {
            S::normalize(inputs.input, affine, None, norm, activation, inputs.running)
        }
        NormStatistics::Known { mean, variance } | NormStatistics::Fixed { mean, variance } => {
            let accumulator = accumulator_dtype(inputs.input.dtype());
            let [mean, variance] = [mean, variance].map(|tensor| cast::<B>(tensor, accumulator));
            let moments = Moments {
                mean: mean.clone(),
                variance: variance.clone(),
            };
            let norm = S::norm(moments, affine, norm, kind, &inputs.input.shape());
            NormOutput {
                output: S::normalize_by(&norm, inputs.input, None, activation),
                mean,
                variance,
                running: RunningStatistics::Absent,
            }
        }
    }
}

pub(crate) fn backward_by<B: Backend, S: Sweeps<B>>(
    saved: NormSaved<B>,
    options: &BatchNormBackwardOptions,
) -> NormGrads<B> {
    let wanted = options.wanted;
    let accumulator = accumulator_dtype(saved.output_grad.dtype());
    let shape = saved.output_grad.shape();
    let moments = Moments {
        mean: cast::<B>(saved.mean, accumulator),
        variance: cast::<B>(saved.variance, accumulator),
    };
    let affine = Affine {
        gamma: saved.gamma.into_option(),
        beta: saved.beta.into_option(),
    };
    let BatchNormOptions { norm, activation } = options.options;
    let mut norm = S::norm(moments, affine, norm, options.statistics, &shape);
    let input = saved.input.into_option().filter(|_| options.needs_input());
    let has_input = input.is_some();
    let argument = Argument::Norm { residual: None };
    let chunk = S::chunk(
        Some(&norm),
        saved.output_grad,
        None,
        input,
        argument,
        activation,
    );

    let is_of_batch = options.statistics == StatisticsKind::Batch;
    let (gamma, beta) = if is_of_batch || wanted.gamma || wanted.beta {
        let sums = S::sums(Some(&norm), &chunk);
        if has_input {
            S::affine_grads(&mut norm, sums).map(Some).into()
        } else {
            (None, Some(S::grad_sum(sums)))
        }
    } else {
        (None, None)
    };
    let input = wanted
        .input
        .then(|| S::norm_input_grad(Some(&norm), chunk, false).0);
    let parameter = |wanted: bool, grad: Option<FloatTensor<B>>| -> OptionalTensor<B> {
        grad.filter(|_| wanted)
            .map(|grad| cast::<B>(grad, options.norm_dtype))
            .into()
    };
    NormGrads {
        input: input.into(),
        gamma: parameter(wanted.gamma, gamma),
        beta: parameter(wanted.beta, beta),
    }
}
