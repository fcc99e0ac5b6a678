//! Norms folded into convolutions, for evaluation.

use burn::module::{Param, RunningState};
use burn_conv_bn::{ConvBn2d, FoldError, NormVariant};

/// Replaces each block's convolution by [`ConvBn2d::fold`]'s, and its norm by the identity: gamma 1, beta 0,
/// mean 0, variance 1, epsilon 0.
pub(crate) fn fold<'a>(
    blocks: impl IntoIterator<Item = &'a mut ConvBn2d>,
) -> Result<(), FoldError> {
    for block in blocks {
        block.conv = block.fold()?;
        block.settings.norm_variant = NormVariant::BatchNorm;
        let norm = &mut block.norm;
        norm.epsilon = 0.0;
        norm.gamma = Param::from_tensor(norm.gamma.val().ones_like());
        norm.beta = Param::from_tensor(norm.beta.val().zeros_like());
        // New ones: clones of the block share the old.
        norm.running_mean = RunningState::new(norm.running_mean.value().zeros_like());
        norm.running_var = RunningState::new(norm.running_var.value().ones_like());
    }
    Ok(())
}
