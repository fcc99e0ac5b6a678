//! Precisions of the contenders.

use std::fmt;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// Type of convolutions' products, and of the activations that blocks pass on and keep.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// f32. PyTorch is set not to multiply it as TF32; Burn's autotuning may, where a GPU has tensor
    /// cores.
    #[default]
    F32,
    /// f32, which PyTorch may multiply as TF32, too, with a mantissa of ten bits, on an NVIDIA GPU.
    Tf32,
    /// Mixed precision: blocks in f16, parameters and norms in f32. The loss of a network is scaled
    /// for the backward pass.
    F16,
    /// Mixed precision: blocks in bf16, parameters and norms in f32.
    Bf16,
}

impl Precision {
    /// Whether blocks compute in another type than that of their parameters.
    pub fn is_mixed(self) -> bool {
        matches!(self, Self::F16 | Self::Bf16)
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = self.to_possible_value().ok_or(fmt::Error)?;
        f.pad(value.get_name())
    }
}
