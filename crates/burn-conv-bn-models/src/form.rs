use burn::config::Config;
use burn::tensor::activation::relu;
use burn::tensor::module::batch_norm_train;
use burn::tensor::Tensor;
use burn_conv_bn::functional::batch_norm;
use burn_conv_bn::{Activation, ConvBn2d, NormSpec, NormVariant};

/// How a network runs its blocks.
#[derive(Config, Debug, Copy, PartialEq, Eq, Hash)]
pub enum Form {
    /// As one fused op each.
    Fused,
    /// As a convolution, a batch norm and an activation of Burn's own: what the fused op is
    /// compared with. The tutorial's variant of the norm, which Burn does not have, is
    /// [`batch_norm`](burn_conv_bn::functional::batch_norm) on its own.
    Unfused,
}

impl Form {
    /// Runs a block over `[batch, channels, height, width]` in this form.
    ///
    /// # Panics
    ///
    /// As [`ConvBn2d::forward`].
    pub(crate) fn forward(self, block: &ConvBn2d, input: Tensor<4>) -> Tensor<4> {
        match self {
            Self::Fused => block.forward(input),
            Self::Unfused => {
                let normalized = unfused_norm(block, block.conv.forward(input));
                match block.settings.activation {
                    Activation::Identity => normalized,
                    Activation::Relu => relu(normalized),
                    other => panic!("{other:?} has no unfused form yet"),
                }
            }
        }
    }
}

fn unfused_norm(block: &ConvBn2d, input: Tensor<4>) -> Tensor<4> {
    let (norm, settings) = (&block.norm, &block.settings);
    let affine = || (norm.gamma.val(), norm.beta.val());
    match (settings.norm_variant, settings.track_running_stats) {
        (NormVariant::BatchNorm, true) => norm.forward(input),
        (NormVariant::BatchNorm, false) => {
            let (gamma, beta) = affine();
            batch_norm_train(input, gamma, beta, norm.epsilon).output
        }
        (variant @ NormVariant::Tutorial, false) => {
            let spec = NormSpec::new(variant, norm.epsilon);
            batch_norm(input, settings.affine.then(affine), spec)
                .unwrap_or_else(|error| panic!("{error}"))
                .output
        }
        (NormVariant::Tutorial, true) => {
            panic!("the tutorial's norm has no unfused form with running statistics")
        }
    }
}
