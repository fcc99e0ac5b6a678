#![cfg_attr(feature = "flex", doc = include_str!("../README.md"))]
//! # Parts
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
