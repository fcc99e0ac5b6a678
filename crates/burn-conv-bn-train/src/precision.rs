//! The types that a network computes in.

use burn::tensor::{DType, FloatDType};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::choice::Choice;

/// Types of a network's activations and parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// Single precision.
    F32,
    /// Double precision.
    F64,
    /// Mixed precision: convolutions and activations in f16, everything else in f32.
    F16,
    /// Mixed precision: convolutions and activations in bf16, everything else in f32.
    BF16,
}

impl Precision {
    /// For people.
    pub(crate) fn describe(self) -> String {
        if self.is_mixed() {
            format!("{} activations, f32 parameters", self.name())
        } else {
            self.name()
        }
    }

    /// Whether blocks compute in another type than that of their parameters.
    pub fn is_mixed(self) -> bool {
        self.activations() != self.parameters()
    }

    /// Type of images, of the blocks' convolutions, and of their outputs and saved tensors.
    pub fn activations(self) -> FloatDType {
        match self {
            Self::F32 => FloatDType::F32,
            Self::F64 => FloatDType::F64,
            Self::F16 => FloatDType::F16,
            Self::BF16 => FloatDType::BF16,
        }
    }

    /// Type of everything else, and of records: parameters, gradients, the optimizer's state, norms and
    /// their statistics, linear layers and the loss.
    pub fn parameters(self) -> FloatDType {
        if self == Self::F64 {
            FloatDType::F64
        } else {
            FloatDType::F32
        }
    }

    /// The activations' type as reports name it.
    pub(crate) fn dtype_name(self) -> String {
        format!("{:?}", DType::from(self.activations()))
    }
}
