//! The networks that a job can train, as one.

use anyhow::{Result, bail};
use burn::tensor::activation::log_softmax;
use burn::tensor::ops::PadMode;
use burn::tensor::{Device, Tensor};
use burn_conv_bn::{NormVariant, SavedTensor};
use burn_conv_bn_models::{
    AnyNetwork, DenseNetConfig, EfficientNetConfig, Form, MobileNetV2Config, NetConfig,
    ResNetConfig, VggConfig,
};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::choice::Choice;
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
    /// ResNet-101, version 1.5.
    Resnet101,
    /// VGG-16 with batch norm, and hidden linear layers of 512.
    Vgg16Bn,
    /// MobileNetV2.
    MobilenetV2,
    /// EfficientNet-B0, without stochastic depth.
    EfficientnetB0,
    /// DenseNet-121.
    Densenet121,
}

impl ModelChoice {
    /// The dropout of its authors; 0 for the residual networks and DenseNet, which have none.
    pub(crate) fn default_dropout(self) -> f64 {
        match self {
            Self::Tutorial | Self::Vgg16Bn => 0.5,
            Self::MobilenetV2 | Self::EfficientnetB0 => 0.2,
            Self::Resnet18
            | Self::Resnet34
            | Self::Resnet50
            | Self::Resnet101
            | Self::Densenet121 => 0.0,
        }
    }

    /// Whether it evaluates on running statistics.
    pub(crate) fn tracks_statistics(self) -> bool {
        self != Self::Tutorial
    }

    /// Checks that the network exists with that norm and that dropout.
    pub(crate) fn check(self, norm: NormVariant, dropout: f64) -> Result<()> {
        let model = self.name();
        if self.tracks_statistics() && norm == NormVariant::Tutorial {
            bail!(
                "{model} keeps running statistics, with which the tutorial's norm has no unfused \
                 form to compare with; use --norm burn"
            );
        }
        if dropout > 0.0 && self.default_dropout() == 0.0 {
            bail!("{model} has no dropout, but a probability of {dropout} was given");
        }
        Ok(())
    }

    /// Checks that no training batch is of one digit, if the network cannot take statistics of it.
    pub(crate) fn check_batches(self, digits: usize, batch_size: usize) -> Result<()> {
        // VGG's last convolutions see four pixels, and the tutorial's hundreds.
        let takes_one = matches!(self, Self::Tutorial | Self::Vgg16Bn);
        if !takes_one && (batch_size == 1 || digits % batch_size == 1) {
            bail!(
                "{digits} digits in batches of {batch_size} leave one digit alone in a batch, \
                 which {} cannot take statistics of: its last images are of one pixel; use another \
                 --batch-size or --train-limit",
                self.name()
            );
        }
        Ok(())
    }

    /// A network in its initial state, drawn from the device's generator at once: the same seed
    /// gives the same weights in both forms.
    pub(crate) fn init(
        self,
        form: Form,
        norm: NormVariant,
        dropout: f64,
        device: &Device,
    ) -> AnyNetwork {
        // Torchvision's are for colours, and a thousand classes.
        macro_rules! of_digits {
            ($config:expr) => {{
                let config = $config.with_classes(CLASSES).with_input_channels(1);
                config.init(device).into()
            }};
        }
        match self {
            Self::Tutorial => {
                let config = NetConfig::new(form).with_norm(norm);
                config.with_dropout(dropout).init(device).into()
            }
            Self::Resnet18 => of_digits!(ResNetConfig::resnet18(form)),
            Self::Resnet34 => of_digits!(ResNetConfig::resnet34(form)),
            Self::Resnet50 => of_digits!(ResNetConfig::resnet50(form)),
            Self::Resnet101 => of_digits!(ResNetConfig::resnet101(form)),
            Self::Vgg16Bn => {
                let config = VggConfig::vgg16_bn(form).with_hidden(VGG_HIDDEN);
                of_digits!(config.with_dropout(dropout))
            }
            Self::Densenet121 => of_digits!(DenseNetConfig::densenet121(form)),
            Self::MobilenetV2 => {
                of_digits!(MobileNetV2Config::new(form).with_dropout(dropout))
            }
            // One probability is an option of the program, the dropout's.
            Self::EfficientnetB0 => {
                let config = EfficientNetConfig::new(form).with_dropout(dropout);
                of_digits!(config.with_stochastic_depth(0.0))
            }
        }
    }
}

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
pub(crate) fn forward(network: &AnyNetwork, images: Tensor<4>) -> Tensor<2> {
    match network {
        AnyNetwork::Tutorial(net) => net.forward(images),
        others => log_softmax(others.forward(padded(images)), 1),
    }
}

/// What a training step keeps for the backward pass in this form, for a batch of that many digits, as
/// [`AnyNetwork::saved_for_backward`] lists it.
///
/// The digits themselves are shared: they are data and there in any case. Padded ones are made in the
/// forward pass and stay because the first block keeps them, so they are its own.
pub(crate) fn saved_for_backward(network: &AnyNetwork, batch: usize) -> Vec<(String, SavedTensor)> {
    if let AnyNetwork::Tutorial(net) = network {
        return net.saved_for_backward([batch, 1, SIDE, SIDE]);
    }
    let side = SIDE + 2 * PADDING;
    let mut saved = network.saved_for_backward([batch, 1, side, side]);
    if let Some((_, padded)) = saved.iter_mut().find(|(_, kept)| kept.name == "input") {
        padded.shared = false;
    }
    saved
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
