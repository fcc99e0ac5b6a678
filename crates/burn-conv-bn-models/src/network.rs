//! What all networks have in common.

use burn::module::Module;
use burn::tensor::Device;
use burn_conv_bn::{FoldError, SavedTensor};

use crate::budget::{BudgetError, MemoryPlan, Search};
use crate::fold::fold;
use crate::init::draw;
use crate::{
    CspDarknet, CspDarknetConfig, DenseNet, DenseNetConfig, EfficientNet, EfficientNetConfig, Form,
    MobileNetV2, MobileNetV2Config, Net, NetConfig, ResNet, ResNetConfig, Vgg, VggConfig,
};

macro_rules! networks {
    ($($config:ty => $network:ty, $panics:literal;)*) => {
        $(
            impl $config {
                /// Initializes a network, and draws its parameters at once in the order of its fields: the same
                /// seed of the device gives the same weights in every form.
                ///
                /// # Panics
                ///
                #[doc = concat!("Panics if ", $panics)]
                pub fn init(&self, device: &Device) -> $network {
                    draw(self.init_lazy(device))
                }
            }

            impl $network {
                /// How the blocks run.
                pub fn form(&self) -> Form {
                    self.form
                }

                /// The same network, with the same tensors, in another form.
                #[must_use]
                pub fn with_form(mut self, form: Form) -> Self {
                    self.form = form;
                    self
                }

                /// The network for evaluation, with the norm behind each convolution folded into it; the norm's
                /// shift becomes the convolution's bias.
                ///
                /// These norms stay, as identities, and those before a convolution, DenseNet's, as they are. The
                /// result runs in either form, and computes what this network does in evaluation, up to rounding.
                ///
                /// # Errors
                ///
                /// [`FoldError::NotFinite`] if a channel's scale or shift is not finite;
                /// [`FoldError::NoRunningStatistics`] if a block tracks none, as those of [`Net`].
                pub fn folded(&self) -> Result<Self, FoldError> {
                    let mut network = self.valid();
                    fold(network.blocks_mut().into_iter().map(|(_, block)| block))?;
                    Ok(network)
                }

                /// What a training step keeps for the backward pass in this form, for images of that shape,
                /// `[batch, input_channels, height, width]`: by layer, as the network names it, role and bytes.
                /// Each layer's input counts as tracked.
                ///
                /// Each buffer is listed as its own (not [`shared`](SavedTensor::shared)) by the first that keeps
                /// it; parameters and images are shared. On Flex, the sum of what is not shared is what the step
                /// has allocated at the end of the forward pass, beside graph nodes and the result.
                ///
                /// # Panics
                ///
                /// As [`forward`](Self::forward), for the shape.
                pub fn saved_for_backward(&self, input_shape: [usize; 4]) -> Vec<(String, SavedTensor)> {
                    self.walk(input_shape).into_saved()
                }

                /// Sets each block's [`Recompute`](burn_conv_bn::Recompute) so that a training step on images of that shape keeps at most so
                /// many bytes at the end of the forward pass, and recomputes as little as it can.
                ///
                /// It starts from what keeps least, [`Recompute::Conv`](burn_conv_bn::Recompute::Conv) in every block, and turns blocks to
                /// `Norm` and `Never` while that fits, those first that save most multiply-adds for a byte. Bytes
                /// are those of the list `saved_for_backward`, in the network's form and in the type of its weights.
                ///
                /// # Errors
                ///
                /// [`BudgetError`] with the least possible, if that is more.
                ///
                /// # Panics
                ///
                /// As [`forward`](Self::forward), for the shape.
                pub fn with_memory_budget(
                    self,
                    input_shape: [usize; 4],
                    bytes: usize,
                ) -> Result<(Self, MemoryPlan), BudgetError> {
                    Search {
                        network: self,
                        input_shape,
                        walk: Self::walk,
                        blocks: Self::blocks_mut,
                    }
                    .fit(bytes)
                }
            }
        )*
    };
}

networks! {
    CspDarknetConfig => CspDarknet,
    "the width leaves less than one channel, or width or depth is not finite.";
    DenseNetConfig => DenseNet, "a block has no layers, or the growth is zero.";
    EfficientNetConfig => EfficientNet,
    "width or depth is not positive and finite, or a probability is not in `[0, 1)`.";
    MobileNetV2Config => MobileNetV2,
    "the width is not positive and finite, or the dropout is not in `[0, 1)`.";
    NetConfig => Net, "the image is smaller than 6 pixels or the dropout is not in `[0, 1)`.";
    ResNetConfig => ResNet, "a layer has no blocks.";
    VggConfig => Vgg, "there are no convolutions before a pool, or the dropout is not in `[0, 1)`.";
}
