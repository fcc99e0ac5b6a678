//! Networks built of [`ConvBn2d`](burn_conv_bn::ConvBn2d) blocks, each with one definition and a
//! switch between the fused form and Burn's own layers.
//!
//! - [`Net`]: the PyTorch tutorial's.
//! - [`ResNet`], [`Vgg`] and [`MobileNetV2`]: torchvision's, with its layers, initial
//!   distributions and names.
//!
//! Both forms have the same modules, so they share records, optimizer states and, from the same
//! seed, initial weights; turning one into the other moves no tensor.
//!
//! # Weights of PyTorch
//!
//! Each of torchvision's networks has a table `PYTORCH_KEYS` of `(pattern, replacement)`: regular
//! expressions that turn the keys of torchvision's `state_dict` into the names of our parameters.
//! They are meant for `burn-store`, one after the other and in this order:
//!
//! ```text
//! let mut store = PytorchStore::from_file("resnet18.pth");
//! for (pattern, replacement) in ResNet::PYTORCH_KEYS {
//!     store = store.with_key_remapping(pattern, *replacement);
//! }
//! network.load_from(&mut store)?;
//! ```
//!
//! Its PyTorch adapter transposes the weights of linear layers. The keys `num_batches_tracked`
//! have no counterpart in Burn and stay unused.

mod form;
mod init;
mod mobilenet;
mod net;
mod resnet;
mod vgg;

#[cfg(all(test, feature = "flex"))]
mod tests;

pub use form::Form;
pub use mobilenet::{MobileNetV2, MobileNetV2Block, MobileNetV2Config};
pub use net::{Net, NetConfig};
pub use resnet::{ResNet, ResNetBlock, ResNetBlockKind, ResNetConfig};
pub use vgg::{Vgg, VggConfig};
