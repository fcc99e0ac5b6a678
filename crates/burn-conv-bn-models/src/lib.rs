#![cfg_attr(
    all(feature = "flex", feature = "pytorch"),
    doc = include_str!("../README.md")
)]
#![cfg_attr(
    not(all(feature = "flex", feature = "pytorch")),
    doc = "Networks of fused blocks."
)]
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
    #[doc = include_str!("../../../README.md")]
    mod repository {}

    #[doc = include_str!("../../../docs/memory.md")]
    mod memory {}

    #[doc = include_str!("../../../docs/migration.md")]
    mod migration {}
}
