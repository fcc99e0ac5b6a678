//! The networks that a job can train, as one.

use burn::module::Module;
use burn::tensor::activation::log_softmax;
use burn::tensor::ops::PadMode;
use burn::tensor::{Device, Tensor};
use burn_conv_bn::{FoldError, NormVariant, Recompute, SavedTensor};
use burn_conv_bn_models::{
    DenseNet, DenseNetConfig, Form, MobileNetV2, MobileNetV2Config, Net, NetConfig, ResNet,
    ResNetConfig, Vgg, VggConfig,
};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::data::{CLASSES, MEAN, SIDE, STD};

/// Pixels added on each side for torchvision's networks, which halve their images five times:
/// 28 becomes 32.
const PADDING: usize = 2;

/// Width of VGG's hidden linear layers. Its 4096, for 1000 classes, would be 120 million parameters
/// for ten.
const VGG_HIDDEN: usize = 512;

/// Which network.
///
/// Torchvision's take images of one channel, padded with black to 32x32: their first convolution
/// has one input channel, and all else is as it is there. They keep running statistics, for
/// evaluation; the tutorial's has none, and normalizes with each batch's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ModelChoice {
    /// The tutorial's: two convolutions, without running statistics.
    Tutorial,
    /// ResNet-18.
    Resnet18,
    /// ResNet-34.
    Resnet34,
    /// ResNet-50, version 1.5.
    Resnet50,
    /// VGG-16 with batch norm, and hidden linear layers of 512.
    Vgg16Bn,
    /// MobileNetV2.
    MobilenetV2,
    /// DenseNet-121.
    Densenet121,
}

/// Why there is no such network, or none for such batches.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub(crate) enum ModelError {
    /// A norm that the network does not have.
    #[error(
        "{model} keeps running statistics, with which the tutorial's norm has no unfused form to \
         compare with; use --norm burn"
    )]
    Norm {
        /// The network.
        model: &'static str,
    },
    /// A dropout that the network does not have.
    #[error("{model} has no dropout, but a probability of {probability} was given")]
    Dropout {
        /// The network.
        model: &'static str,
        /// The probability that was given.
        probability: f64,
    },
    /// A training batch of one digit, which the network cannot take statistics of.
    #[error(
        "{digits} digits in batches of {batch_size} leave one digit alone in a batch, which \
         {model} cannot take statistics of: its last images are of one pixel; use another \
         --batch-size or --train-limit"
    )]
    Alone {
        /// The network.
        model: &'static str,
        /// Training digits.
        digits: usize,
        /// Digits a step.
        batch_size: usize,
    },
}

/// Settings of a network.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NetworkOptions {
    /// How the blocks run.
    pub(crate) form: Form,
    /// The norm of all blocks.
    pub(crate) norm: NormVariant,
    /// Probability of dropping a hidden value.
    pub(crate) dropout: f64,
    /// What fused blocks do with the convolution's output.
    pub(crate) recompute: Recompute,
    /// Bound on the fused blocks' workspace, in bytes.
    pub(crate) max_workspace: Option<usize>,
}

impl ModelChoice {
    /// As on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Tutorial => "tutorial",
            Self::Resnet18 => "resnet18",
            Self::Resnet34 => "resnet34",
            Self::Resnet50 => "resnet50",
            Self::Vgg16Bn => "vgg16-bn",
            Self::MobilenetV2 => "mobilenet-v2",
            Self::Densenet121 => "densenet121",
        }
    }

    /// The dropout of its authors; 0 for the residual networks and DenseNet, which have none.
    pub(crate) fn default_dropout(self) -> f64 {
        match self {
            Self::Tutorial | Self::Vgg16Bn => 0.5,
            Self::MobilenetV2 => 0.2,
            Self::Resnet18 | Self::Resnet34 | Self::Resnet50 | Self::Densenet121 => 0.0,
        }
    }

    /// Whether it evaluates on running statistics.
    pub(crate) fn tracks_statistics(self) -> bool {
        self != Self::Tutorial
    }

    fn has_dropout(self) -> bool {
        self.default_dropout() > 0.0
    }

    /// Checks that the network exists with that norm and that dropout.
    ///
    /// # Errors
    ///
    /// [`ModelError::Norm`] or [`ModelError::Dropout`].
    pub(crate) fn check(self, norm: NormVariant, dropout: f64) -> Result<(), ModelError> {
        let model = self.name();
        if self.tracks_statistics() && norm == NormVariant::Tutorial {
            return Err(ModelError::Norm { model });
        }
        if dropout > 0.0 && !self.has_dropout() {
            return Err(ModelError::Dropout {
                model,
                probability: dropout,
            });
        }
        Ok(())
    }

    /// Checks that no batch of a training is too small.
    ///
    /// # Errors
    ///
    /// [`ModelError::Alone`].
    pub(crate) fn check_batches(self, digits: usize, batch_size: usize) -> Result<(), ModelError> {
        // VGG's last convolutions see four pixels, and the tutorial's hundreds.
        let takes_one = matches!(self, Self::Tutorial | Self::Vgg16Bn);
        let alone = batch_size == 1 || digits.checked_rem(batch_size) == Some(1);
        if alone && !takes_one {
            return Err(ModelError::Alone {
                model: self.name(),
                digits,
                batch_size,
            });
        }
        Ok(())
    }

    /// A network in its initial state, drawn from the device's generator at once: the same seed
    /// gives the same weights in both forms.
    pub(crate) fn init(self, options: &NetworkOptions, device: &Device) -> Network {
        let NetworkOptions {
            form,
            norm,
            dropout,
            recompute,
            max_workspace,
        } = *options;
        let resnet = |config: ResNetConfig| {
            let config = config
                .with_classes(CLASSES)
                .with_input_channels(1)
                .with_recompute(recompute)
                .with_max_workspace(max_workspace);
            Network::ResNet(config.init(device))
        };
        match self {
            Self::Tutorial => Network::Tutorial(
                NetConfig::new(form)
                    .with_norm(norm)
                    .with_dropout(dropout)
                    .with_recompute(recompute)
                    .with_max_workspace(max_workspace)
                    .init(device),
            ),
            Self::Resnet18 => resnet(ResNetConfig::resnet18(form)),
            Self::Resnet34 => resnet(ResNetConfig::resnet34(form)),
            Self::Resnet50 => resnet(ResNetConfig::resnet50(form)),
            Self::Vgg16Bn => Network::Vgg(
                VggConfig::vgg16_bn(form)
                    .with_classes(CLASSES)
                    .with_input_channels(1)
                    .with_hidden(VGG_HIDDEN)
                    .with_dropout(dropout)
                    .with_recompute(recompute)
                    .with_max_workspace(max_workspace)
                    .init(device),
            ),
            Self::Densenet121 => Network::DenseNet(
                DenseNetConfig::densenet121(form)
                    .with_classes(CLASSES)
                    .with_input_channels(1)
                    .with_recompute(recompute)
                    .with_max_workspace(max_workspace)
                    .init(device),
            ),
            Self::MobilenetV2 => Network::MobileNetV2(
                MobileNetV2Config::new(form)
                    .with_classes(CLASSES)
                    .with_input_channels(1)
                    .with_dropout(dropout)
                    .with_recompute(recompute)
                    .with_max_workspace(max_workspace)
                    .init(device),
            ),
        }
    }
}

/// A network for digits.
#[allow(clippy::large_enum_variant, reason = "there are few at a time")]
#[derive(Module, Debug)]
pub(crate) enum Network {
    /// The tutorial's.
    Tutorial(Net),
    /// A residual network.
    ResNet(ResNet),
    /// VGG with batch norm.
    Vgg(Vgg),
    /// MobileNetV2.
    MobileNetV2(MobileNetV2),
    /// DenseNet-121.
    DenseNet(DenseNet),
}

impl Network {
    /// Log-probabilities of the classes.
    ///
    /// # Shapes
    ///
    /// - `images`: `[batch, 1, 28, 28]`, normalized as
    ///   [`MnistBatcher`](crate::data::MnistBatcher) does
    /// - output: `[batch, 10]`
    ///
    /// # Panics
    ///
    /// If a training batch is too small; see [`ModelChoice::check_batches`].
    pub(crate) fn forward(&self, images: Tensor<4>) -> Tensor<2> {
        let scores = match self {
            Self::Tutorial(net) => return net.forward(images),
            Self::ResNet(net) => net.forward(padded(images)),
            Self::Vgg(net) => net.forward(padded(images)),
            Self::MobileNetV2(net) => net.forward(padded(images)),
            Self::DenseNet(net) => net.forward(padded(images)),
        };
        log_softmax(scores, 1)
    }

    /// The network for evaluation, with norms folded into their convolutions, up to rounding the same.
    ///
    /// # Errors
    ///
    /// [`FoldError::NoRunningStatistics`] for the tutorial's network, which normalizes with each
    /// batch's statistics; [`FoldError::NotFinite`] if a channel's scale or shift is not finite.
    pub(crate) fn folded(&self) -> Result<Self, FoldError> {
        Ok(match self {
            Self::Tutorial(net) => Self::Tutorial(net.folded()?),
            Self::ResNet(net) => Self::ResNet(net.folded()?),
            Self::Vgg(net) => Self::Vgg(net.folded()?),
            Self::MobileNetV2(net) => Self::MobileNetV2(net.folded()?),
            Self::DenseNet(net) => Self::DenseNet(net.folded()?),
        })
    }

    /// What a training step keeps for the backward pass in this form, for a batch of that many digits, as
    /// [`ResNet::saved_for_backward`] and its like list it.
    ///
    /// The digits themselves are shared: they are data and there in any case. Padded ones are made in the
    /// forward pass and stay because the first block keeps them, so they are its own.
    pub(crate) fn saved_for_backward(&self, batch: usize) -> Vec<(String, SavedTensor)> {
        let side = SIDE + 2 * PADDING;
        let shape = [batch, 1, side, side];
        let mut saved = match self {
            Self::Tutorial(net) => return net.saved_for_backward(batch, SIDE),
            Self::ResNet(net) => net.saved_for_backward(shape),
            Self::Vgg(net) => net.saved_for_backward(shape),
            Self::MobileNetV2(net) => net.saved_for_backward(shape),
            Self::DenseNet(net) => net.saved_for_backward(shape),
        };
        if let Some((_, padded)) = saved.iter_mut().find(|(_, kept)| kept.name == "input") {
            padded.shared = false;
        }
        saved
    }
}

/// Normalized images, with black around them.
fn padded(images: Tensor<4>) -> Tensor<4> {
    let black = (-MEAN / STD) as f32;
    images.pad(
        (PADDING, PADDING, PADDING, PADDING),
        PadMode::Constant(black),
    )
}

#[cfg(test)]
mod tests;
