//! Burn's configuration of an activation, to and from this crate's.

use burn::nn::activation::{
    ActivationConfig, EluConfig, HardSigmoidConfig, LeakyReluConfig, SoftplusConfig,
};

use super::Activation;

/// Smallest threshold of Burn's softplus that the formula without one stands for: its default.
const SOFTPLUS_THRESHOLD: f64 = 20.0;

/// An activation that only one of [`Activation`] and Burn's [`ActivationConfig`] has.
///
/// ```
/// use burn::nn::activation::{ActivationConfig, EluConfig};
/// use burn_conv_bn::{Activation, ActivationError};
///
/// let activation = Activation::try_from(ActivationConfig::Elu(EluConfig::new()))?;
/// assert_eq!(activation, Activation::Elu { alpha: 1.0 });
///
/// // Burn's enum has no SiLU, which is a module and a function of its own there.
/// let error = ActivationConfig::try_from(Activation::Silu).unwrap_err();
/// assert_eq!(error, ActivationError::NoConfig { activation: Activation::Silu });
/// # Ok::<(), ActivationError>(())
/// ```
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ActivationError {
    /// The op has no such activation.
    #[error(
        "no activation of burn-conv-bn is Burn's {got}: leave `Activation::Identity` and call Burn's module \
         behind the block"
    )]
    NoActivation {
        /// Burn's configuration, as its `Debug` prints it.
        got: String,
    },
    /// A softplus that bends visibly at its threshold.
    #[error(
        "softplus: expected a threshold of at least 20, got {got}: `Activation::Softplus` has none; call \
         Burn's module behind the block"
    )]
    SoftplusThreshold {
        /// The threshold seen.
        got: f64,
    },
    /// Burn's configuration has no such activation.
    #[error(
        "Burn's ActivationConfig has no {activation:?}: call `Activation::forward`, or Burn's function or \
         module of that name"
    )]
    NoConfig {
        /// The activation seen.
        activation: Activation,
    },
}

impl TryFrom<ActivationConfig> for Activation {
    type Error = ActivationError;

    fn try_from(config: ActivationConfig) -> Result<Self, ActivationError> {
        Ok(match config {
            ActivationConfig::Identity => Self::Identity,
            ActivationConfig::Relu => Self::Relu,
            ActivationConfig::LeakyRelu(LeakyReluConfig { negative_slope }) => {
                Self::LeakyRelu { negative_slope }
            }
            ActivationConfig::Gelu => Self::Gelu,
            ActivationConfig::GeluApproximate => Self::GeluApproximate,
            ActivationConfig::HardSwish => Self::HardSwish,
            ActivationConfig::Sigmoid => Self::Sigmoid,
            ActivationConfig::HardSigmoid(HardSigmoidConfig { alpha, beta }) => {
                Self::HardSigmoid { alpha, beta }
            }
            ActivationConfig::Tanh => Self::Tanh,
            ActivationConfig::Elu(EluConfig { alpha }) => Self::Elu { alpha },
            ActivationConfig::Softplus(SoftplusConfig { beta, threshold }) => {
                // NaN is no threshold either.
                let stands_for_none = threshold >= SOFTPLUS_THRESHOLD;
                if !stands_for_none {
                    return Err(ActivationError::SoftplusThreshold { got: threshold });
                }
                Self::Softplus { beta }
            }
            other => {
                return Err(ActivationError::NoActivation {
                    got: format!("{other:?}"),
                });
            }
        })
    }
}

impl TryFrom<Activation> for ActivationConfig {
    type Error = ActivationError;

    fn try_from(activation: Activation) -> Result<Self, ActivationError> {
        Ok(match activation {
            Activation::Identity => Self::Identity,
            Activation::Relu => Self::Relu,
            Activation::LeakyRelu { negative_slope } => LeakyReluConfig::new()
                .with_negative_slope(negative_slope)
                .into(),
            Activation::Gelu => Self::Gelu,
            Activation::GeluApproximate => Self::GeluApproximate,
            Activation::HardSwish => Self::HardSwish,
            Activation::Sigmoid => Self::Sigmoid,
            Activation::HardSigmoid { alpha, beta } => HardSigmoidConfig::new()
                .with_alpha(alpha)
                .with_beta(beta)
                .into(),
            Activation::Tanh => Self::Tanh,
            Activation::Elu { alpha } => EluConfig::new().with_alpha(alpha).into(),
            Activation::Softplus { beta } => SoftplusConfig::new().with_beta(beta).into(),
            Activation::Relu6 | Activation::Silu | Activation::Mish => {
                return Err(ActivationError::NoConfig { activation });
            }
        })
    }
}
