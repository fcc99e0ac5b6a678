use burn::config::Config;
use burn::tensor::Tensor;
use burn::tensor::activation::relu;
use burn::tensor::module::batch_norm_train;
use burn_conv_bn::functional::batch_norm;
use burn_conv_bn::{Activation, ConvBn2d, NormSpec, NormVariant, Recompute, SavedTensor};

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

    /// What a block keeps for the backward pass in this form, for a tracked input of that shape.
    ///
    /// The unfused form's list is Burn 0.22.1's: the convolution keeps its input and weight, batch
    /// norm its input, gamma and its statistics, ReLU its input.
    pub(crate) fn saved_for_backward(
        self,
        block: &ConvBn2d,
        input_shape: [usize; 4],
    ) -> Vec<SavedTensor> {
        match self {
            Self::Fused => block.saved_for_backward(input_shape),
            Self::Unfused => {
                // Fused without recomputation keeps all of it but ReLU's input.
                let mut keeping = block.clone();
                keeping.settings.recompute = Recompute::Never;
                let mut saved = keeping.saved_for_backward(input_shape);
                let conv_output = saved.iter().find(|tensor| tensor.name == "conv_output");
                let norm_output = conv_output.map(|conv_output| SavedTensor {
                    name: "norm_output",
                    ..conv_output.clone()
                });
                if block.settings.activation == Activation::Relu {
                    saved.extend(norm_output);
                }
                saved
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
