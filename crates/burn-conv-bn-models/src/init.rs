//! What the networks' initializations have in common.

use burn::module::{Module, ModuleVisitor, Param};
use burn::nn::{Initializer, PaddingConfig2d};
use burn::tensor::{Device, Tensor};
use burn_conv_bn::{Activation, ConvBn2dConfig, MaxPool2d, MaxPool2dConfig};

/// A block with a square kernel of odd size, padded by half of it, as torchvision initializes its
/// networks: Kaiming normal over the fan out, for ReLU.
///
/// PyTorch's fan out counts the output channels of all groups, Burn's those of one: the gain makes
/// up for that.
pub(crate) fn block(
    channels: [usize; 2],
    kernel: usize,
    stride: usize,
    groups: usize,
    activation: Activation,
) -> ConvBn2dConfig {
    let padding = kernel / 2;
    ConvBn2dConfig::new(channels, [kernel; 2])
        .with_stride([stride; 2])
        .with_padding(PaddingConfig2d::Explicit(
            padding, padding, padding, padding,
        ))
        .with_groups(groups)
        .with_initializer(Initializer::KaimingNormal {
            gain: (2.0 / groups as f64).sqrt(),
            fan_out_only: true,
        })
        .with_activation(activation)
}

/// Behind the first block of ResNet and DenseNet.
pub(crate) fn stem_pool() -> MaxPool2d {
    MaxPool2dConfig::new([3, 3])
        .with_strides([2, 2])
        .with_padding(PaddingConfig2d::Explicit(1, 1, 1, 1))
        .init()
}

/// Multiple of 8 nearest to a number of channels, up by one step where that would take more than a
/// tenth away: torchvision's `_make_divisible`.
pub(crate) fn rounded(channels: f64) -> usize {
    let nearest = ((channels + 4.0) as usize / 8 * 8).max(8);
    if (nearest as f64) < 0.9 * channels {
        nearest + 8
    } else {
        nearest
    }
}

/// Zeros, for what torchvision starts there.
pub(crate) fn zeros(size: usize, device: &Device) -> Param<Tensor<1>> {
    Initializer::Zeros.init([size], device)
}

/// Draws a network's parameters at once, in the order of its fields: left alone, Burn draws each when it is
/// first used, and forms that use them in another order would start from other weights.
pub(crate) fn draw<M: Module>(network: M) -> M {
    struct Draw;

    impl ModuleVisitor for Draw {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            param.val();
        }
    }

    network.visit(&mut Draw);
    network
}
