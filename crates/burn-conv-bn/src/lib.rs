//! Convolution + batch norm + activation for training with [Burn](burn), as one layer that keeps
//! one activation for the backward pass where Burn keeps three.
//!
//! A conv -> batch norm -> ReLU block normally keeps the convolution's input, its output (batch
//! norm's input) and batch norm's output (ReLU's input). [`ConvBn2d`] keeps the first and runs
//! the convolution again in the backward pass. The maths, the parameters and the records stay
//! those of [`Conv2d`](burn::nn::conv::Conv2d) and [`BatchNorm`](burn::nn::BatchNorm).
//!
//! ```
//! # #[cfg(feature = "flex")] {
//! use burn::tensor::{Device, Distribution, Tensor};
//! use burn_conv_bn::{Activation, ConvBn2dConfig};
//!
//! let device = Device::flex().autodiff();
//! let block = ConvBn2dConfig::new([3, 8], [3, 3])
//!     .with_activation(Activation::Relu)
//!     .init(&device);
//! let images = Tensor::<4>::random([2, 3, 16, 16], Distribution::Default, &device);
//! let y = block.forward(images);
//! assert_eq!(y.dims(), [2, 8, 14, 14]);
//! # }
//! ```
//!
//! - [`fuse`]: the layer over a convolution and a norm that stay fields of a struct of yours.
//! - [`ConvBn1d`], [`ConvBn2d`], [`ConvBn3d`] and their configurations: the layer over its own.
//! - [`BatchNormActivation`]: the norm and its activation alone, for networks that normalize before their
//!   convolutions.
//! - [`ConvBnModule`]: settings and precision of every such layer of a model, in one call.
//! - [`MaxPool2d`]: Burn's max pool. On Flex and CubeCL it keeps one byte for each output and no input;
//!   behind a block, nothing keeps the tensor between the two.
//! - [`functional`]: the same on plain tensors, and its two halves on their own, convolution and
//!   batch norm with an explicit backward pass each.
//! - [`backend`]: the trait of a backend; for whoever writes one, or a kernel.
//! - `gradcheck`: analytic against numerical gradients, behind the feature of that name.
//!
//! The op is differentiable once.
//!
//! # Features
//!
//! No backend is on by default. Each of the following forwards to Burn's feature of the same name:
//!
//! - `flex`: Burn's own CPU backend, with the kernels of `burn-conv-bn-cpu`.
//! - `cpu`, `cuda`, `metal`, `rocm`, `vulkan`, `webgpu`, `wgpu`: CubeCL's runtimes, with the kernels
//!   of `burn-conv-bn-cubecl` around Burn's convolutions. Each turns `cubecl` on, which alone
//!   chooses no runtime.
//! - `ndarray`, `tch`: the op composed of Burn's own.
//! - `remote`: the same on a device of another process or machine; the server needs nothing of this crate.
//! - `fusion`, on by default as in Burn: needed with a CubeCL runtime wherever Burn's own `fusion` is on.
//!
//! `gradcheck` is no backend, but turns on the module of that name. `remote-test` is for this crate's tests.
//!
//! # Versions
//!
//! One version of Burn is supported at a time, to the patch: backend extensions reach into what Burn
//! does not keep stable. The oldest supported Rust is this package's `rust-version`, which is also the
//! one that it is tested with.
//!
//! Errors, configurations, settings and results may get more variants and fields; they are
//! `#[non_exhaustive]`, and so are [`Activation`] and [`Recompute`]. The tensors that pass through
//! [`backend::ConvBnBackend`] and the variants of the norm are not: code that computes with them must handle
//! each.

#![deny(missing_docs)]
// Burn deprecates its NdArray backend; it stays selectable here for as long as Burn has it.
#![cfg_attr(feature = "ndarray", allow(deprecated))]

mod autodiff;
#[cfg(feature = "cubecl")]
mod cube;
#[cfg(any(feature = "cubecl", test))]
mod cubek;
#[cfg(feature = "flex")]
mod flex;
mod layer;
mod portable;
mod spec;

pub mod backend;
pub mod functional;
#[cfg(feature = "gradcheck")]
pub mod gradcheck;

pub use layer::{
    BatchNormActivation, BatchNormActivationConfig, ConvBn1d, ConvBn1dConfig, ConvBn2d,
    ConvBn2dConfig, ConvBn3d, ConvBn3dConfig, ConvBnModule, ConvBnRef, ConvBnSettings, Convolution,
    FoldError, MaxPool2d, MaxPool2dConfig, RunningVariance, fuse,
};
pub use spec::{
    Activation, ActivationError, BatchNormOptions, ConvBnError, ConvBnOptions, ConvSpec, NormSpec,
    NormVariant, Recompute, SavedTensor,
};

/// The code of the package's Markdown page.
#[cfg(all(doctest, feature = "flex"))]
#[doc = include_str!("../README.md")]
mod readme {}
