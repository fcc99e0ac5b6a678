//! The optimizers to choose from.

use burn::optim::momentum::MomentumConfig;
use burn::optim::{AdamConfig, AdamWConfig, LearningRate, ModuleOptimizer, SgdConfig};
use burn::tensor::FloatDType;
use burn_conv_bn_models::optim::AdadeltaConfig;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// An optimizer with its settings but for the learning rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerChoice {
    /// Adadelta, the tutorial's, with PyTorch's settings.
    Adadelta,
    /// Adam, with Burn's settings.
    Adam,
    /// Adam with a weight decay apart from the gradient, with Burn's settings.
    Adamw,
    /// Stochastic gradient descent with a momentum of 0.9, as PyTorch does it.
    Sgd,
}

impl OptimizerChoice {
    /// The learning rate to start with where none is given.
    pub(crate) fn default_learning_rate(self) -> LearningRate {
        match self {
            Self::Adadelta => 1.0,
            Self::Adam | Self::Adamw => 1e-3,
            Self::Sgd => 0.05,
        }
    }

    /// Whether a record restores its state exactly, for parameters of this type.
    ///
    /// Burn restores the state of its own optimizers in the default type of the default device,
    /// which is single precision.
    pub(crate) fn restores(self, dtype: FloatDType) -> bool {
        self == Self::Adadelta || dtype != FloatDType::F64
    }

    /// The optimizer, in its initial state.
    pub(crate) fn init(self) -> ModuleOptimizer {
        match self {
            Self::Adadelta => AdadeltaConfig::new().init(),
            Self::Adam => AdamConfig::new().init(),
            Self::Adamw => AdamWConfig::new().init(),
            Self::Sgd => {
                // Burn dampens the gradient by a tenth where PyTorch does not.
                let momentum = MomentumConfig::new().with_momentum(0.9).with_dampening(0.0);
                SgdConfig::new().with_momentum(Some(momentum)).init()
            }
        }
    }
}

#[cfg(test)]
mod tests;
