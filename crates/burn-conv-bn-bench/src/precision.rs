//! What the contenders compute in.

use std::fmt;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::device::CUDA;

/// What the convolutions of all contenders compute in, and what they pass on and keep.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// f32. PyTorch is told not to multiply it as TF32; Burn cannot be told, and its autotuning may
    /// choose such kernels where a GPU has tensor cores.
    #[default]
    F32,
    /// f32, which PyTorch may multiply as TF32, with a mantissa of ten bits, on an NVIDIA GPU.
    Tf32,
    /// Mixed precision: blocks in f16, parameters and norms in f32. The loss of a network is scaled
    /// for the backward pass.
    F16,
    /// Mixed precision: blocks in bf16, parameters and norms in f32.
    Bf16,
}

impl Precision {
    /// As on the command line and in the protocol.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Tf32 => "tf32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
    }

    /// Whether blocks compute in another type than that of their parameters.
    pub fn is_mixed(self) -> bool {
        matches!(self, Self::F16 | Self::Bf16)
    }

    /// Whether it means something on a device. What a device lacks only its contenders know.
    pub fn exists_on(self, device: &str) -> bool {
        self != Self::Tf32 || device == CUDA
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::FLEX;

    #[test]
    fn names_are_those_of_the_protocol_and_of_the_command_line() {
        for precision in Precision::value_variants() {
            let name = precision.name();
            assert_eq!(serde_json::to_value(precision).unwrap(), name);
            assert_eq!(Precision::from_str(name, false).as_ref(), Ok(precision));
        }
    }

    #[test]
    fn tf32_is_nvidias() {
        assert!(Precision::Tf32.exists_on(CUDA) && !Precision::Tf32.exists_on(FLEX));
        assert!(Precision::Bf16.exists_on(FLEX));
    }
}
