//! Networks built of [`ConvBn2d`](burn_conv_bn::ConvBn2d) blocks, each with one definition and a
//! switch between the fused form and Burn's own layers.
//!
//! - [`Net`]: the PyTorch tutorial's.
//! - [`ResNet`], [`Vgg`], [`MobileNetV2`], [`EfficientNet`] and [`DenseNet`]: torchvision's, with its layers, initial
//!   distributions and names.
//! - [`CspDarknet`]: the backbone of YOLOX-nano, with YOLOX's.
//! - [`AnyNetwork`]: one of these, chosen at run time.
//!
//! Both forms have the same modules, so they share records, optimizer states and, from the same
//! seed, initial weights; turning one into the other moves no tensor.
//!
//! Both also run in mixed precision, on images in f16 or bf16: what a network's
//! [`autocast`](burn_conv_bn::ConvBnModule::autocast) returns runs its blocks in that type and its
//! linear layers in f32, and what
//! [`with_precision`](burn_conv_bn::ConvBnModule::with_precision) returns runs these in half, too.
//!
//! [`optim`] has what Burn lacks to train them: Adadelta, and loss scales for f16.
//!
//! # Chains
//!
//! `with_rebuilt_chains(ends)` of every network sets [`Recompute::Norm`](burn_conv_bn::Recompute::Norm) inside its chains of
//! blocks, whose outputs are rebuilt in the backward pass without a convolution. With `ends` of `Recompute::Conv` the
//! network keeps about as much as if all blocks were that, and recomputes fewer convolutions; with `Recompute::Never`
//! it recomputes none, and keeps less than if all were that.
//! [`ConvBnModule`](burn_conv_bn::ConvBnModule) sets one policy for all blocks, and bounds their workspace.
//!
//! # Weights of PyTorch
//!
//! Each of torchvision's networks has a table `PYTORCH_KEYS` of `(pattern, replacement)`: regular
//! expressions that turn the keys of torchvision's `state_dict` into the names of our parameters;
//! [`CspDarknet`] has one for those of YOLOX.
//! The module `weights`, behind the feature `pytorch`, loads and saves files by them; so does burn-store alone, one
//! pattern after the other and in this order. Its PyTorch adapter transposes the weights of linear layers. The keys
//! `num_batches_tracked` have no counterpart in Burn and stay unused.
//!
//! # Features
//!
//! `x86-v4` alone is on by default. `pytorch` adds `weights`. `flex` and `cubecl` are those of [`burn_conv_bn`]; its other backends are
//! chosen by a dependency on it, or on Burn, of your own.

#![deny(missing_docs)]

mod any;
mod budget;
mod cspdarknet;
mod densenet;
mod efficientnet;
mod fold;
mod form;
mod head;
mod init;
mod mobilenet;
mod net;
mod network;
pub mod optim;
mod pre_activation;
mod resnet;
mod vgg;
mod walk;
#[cfg(feature = "pytorch")]
pub mod weights;

#[cfg(all(test, feature = "flex"))]
mod tests;

pub use any::AnyNetwork;
pub use budget::{BlockPlan, BudgetError, MemoryPlan};
pub use cspdarknet::{
    CspBottleneck, CspDarknet, CspDarknetConfig, CspDarknetStage, CspLayer, SeparableConv,
    SppBottleneck,
};
pub use densenet::{DenseLayer, DenseNet, DenseNetConfig, Transition};
pub use efficientnet::{EfficientNet, EfficientNetBlock, EfficientNetConfig, SqueezeExcitation};
pub use form::Form;
pub use mobilenet::{MobileNetV2, MobileNetV2Block, MobileNetV2Config};
pub use net::{Net, NetConfig};
pub use resnet::{ResNet, ResNetBlock, ResNetBlockKind, ResNetConfig};
pub use vgg::{Vgg, VggConfig};

/// The code of the repository's Markdown pages, whose dependencies this package has all of.
#[cfg(all(doctest, feature = "flex"))]
mod documents {
    #[cfg(feature = "pytorch")]
    #[doc = include_str!("../README.md")]
    mod package {}

    #[doc = include_str!("../../../README.md")]
    mod repository {}

    #[doc = include_str!("../../../docs/memory.md")]
    mod memory {}

    #[doc = include_str!("../../../docs/migration.md")]
    mod migration {}
}
