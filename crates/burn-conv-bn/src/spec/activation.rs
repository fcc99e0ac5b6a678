use burn::config::Config;
use burn::tensor::{Tensor, activation};

/// Element-wise function applied to the normalized (and residual-added) value.
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::tensor::{Device, Tensor};
/// use burn_conv_bn::Activation;
///
/// let value = Tensor::<1>::from_floats([-2.0, 0.5, 8.0], &Device::flex());
/// let output = Activation::Relu6.forward(value).into_data();
/// assert_eq!(output.iter::<f32>().collect::<Vec<_>>(), [0.0, 0.5, 6.0]);
/// # }
/// ```
///
/// Burn's [`ActivationConfig`](burn::nn::activation::ActivationConfig) is converted by `try_from`, either
/// way.
#[derive(Config, Debug, Copy, PartialEq)]
#[non_exhaustive]
pub enum Activation {
    /// `y = v`.
    Identity,
    /// `y = max(v, 0)`, with derivative 0 at 0. NaN stays NaN.
    Relu,
    /// `y = min(max(v, 0), 6)`, with derivative 0 at 0 and 6. NaN stays NaN. MobileNetV2's.
    Relu6,
    /// `y = v` where `v > 0`, `negative_slope * v` elsewhere, at 0 with that derivative.
    LeakyRelu {
        /// Slope where the value is not positive. Burn's and PyTorch's default is 0.01.
        negative_slope: f64,
    },
    /// `y = v / (1 + exp(-v))`, also called swish.
    Silu,
    /// `y = v * Phi(v)` with the normal distribution's `Phi(v) = (1 + erf(v / sqrt(2))) / 2`:
    /// exact, not the approximation by tanh.
    Gelu,
    /// `y = v / 2 * (1 + tanh(sqrt(2 / pi) * (v + 0.044715 * v^3)))`: GELU's approximation by tanh.
    GeluApproximate,
    /// `y = v * clamp(v / 6 + 1/2, 0, 1)`, with derivative 0 at -3 and 1 at 3. MobileNetV3's.
    HardSwish,
    /// `y = 1 / (1 + exp(-v))`.
    Sigmoid,
    /// `y = clamp(alpha * v + beta, 0, 1)`, with derivative 0 where that is 0 or 1.
    HardSigmoid {
        /// Slope between the bounds. Burn's default is 0.2, PyTorch has 1/6.
        alpha: f64,
        /// Value at 0. Burn's default is 0.5, as PyTorch has it.
        beta: f64,
    },
    /// `y = tanh(v)`.
    Tanh,
    /// `y = v` where `v > 0`, `alpha * (exp(v) - 1)` elsewhere, at 0 with that derivative.
    Elu {
        /// Negative of the limit at minus infinity. Burn's and PyTorch's default is 1.
        alpha: f64,
    },
    /// `y = v * tanh(ln(1 + exp(v)))`.
    Mish,
    /// `y = ln(1 + exp(beta * v)) / beta` everywhere. Burn and PyTorch return `v` where `beta * v` is above a
    /// threshold; at their default, 20, that changes y by 2.1e-9 / beta at most.
    Softplus {
        /// Sharpness of the bend, finite and not 0. Burn's and PyTorch's default is 1.
        beta: f64,
    },
}

/// Source of an activation's derivative at a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Derivative {
    /// None: the derivative is 1 everywhere.
    One,
    /// The activation's output as well as the value: both lie in the same piece of the function.
    OfOutput,
    /// The value only.
    OfValue,
}

impl Activation {
    /// One of each, leaky ReLU with either sign of its slope, and no parameter at its default: for tests over all
    /// activations.
    #[doc(hidden)]
    pub const SAMPLES: [Self; 15] = [
        Self::Identity,
        Self::Relu,
        Self::Relu6,
        Self::LeakyRelu {
            negative_slope: 0.25,
        },
        Self::LeakyRelu {
            negative_slope: -0.5,
        },
        Self::Silu,
        Self::Gelu,
        Self::GeluApproximate,
        Self::HardSwish,
        Self::Sigmoid,
        Self::HardSigmoid {
            alpha: 0.25,
            beta: 0.375,
        },
        Self::Tanh,
        Self::Elu { alpha: 0.75 },
        Self::Mish,
        Self::Softplus { beta: 1.5 },
    ];

    /// `activation(value)` with Burn's own ops, for use behind a folded convolution.
    pub fn forward<const D: usize>(self, value: Tensor<D>) -> Tensor<D> {
        match self {
            Self::Identity => value,
            Self::Relu => activation::relu(value),
            // Bounds by selection keep NaN; a maximum may drop it.
            Self::Relu6 => {
                let value = activation::relu(value);
                let above = value.clone().greater_elem(6.0);
                value.mask_fill(above, 6.0)
            }
            Self::LeakyRelu { negative_slope } => activation::leaky_relu(value, negative_slope),
            Self::Silu => activation::silu(value),
            Self::Gelu => activation::gelu(value),
            Self::GeluApproximate => activation::gelu_approximate(value),
            Self::HardSwish => activation::hard_swish(value),
            Self::Sigmoid => activation::sigmoid(value),
            Self::HardSigmoid { alpha, beta } => activation::hard_sigmoid(value, alpha, beta),
            Self::Tanh => activation::tanh(value),
            Self::Elu { alpha } => activation::elu(value, alpha),
            Self::Mish => activation::mish(value),
            Self::Softplus { beta } => activation::softplus(value, beta),
        }
    }

    /// Whether the output equals the value wherever the derivative is not 0.
    pub(crate) fn passes_unchanged(self) -> bool {
        matches!(self, Self::Identity | Self::Relu)
    }

    /// The output of a smooth activation determines its derivative too, as `y * (1 - y)` does a sigmoid's, but
    /// not to all digits: a y in bf16 is 1 from v = 6.3 on. It would not save memory either, since the op
    /// keeps its input for the weight's gradient, and the residual is a handle as the output is.
    pub(crate) fn derivative(self) -> Derivative {
        match self {
            Self::Identity => Derivative::One,
            Self::Relu | Self::Relu6 => Derivative::OfOutput,
            // A negative slope makes both pieces positive.
            Self::LeakyRelu { negative_slope } if negative_slope >= 0.0 => Derivative::OfOutput,
            Self::LeakyRelu { .. }
            | Self::Silu
            | Self::Gelu
            | Self::GeluApproximate
            | Self::HardSwish
            | Self::Sigmoid
            | Self::HardSigmoid { .. }
            | Self::Tanh
            | Self::Elu { .. }
            | Self::Mish
            | Self::Softplus { .. } => Derivative::OfValue,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_of_every_activation() {
        let place = |activation| match activation {
            Activation::Identity => 0,
            Activation::Relu => 1,
            Activation::Relu6 => 2,
            Activation::LeakyRelu { .. } => 3,
            Activation::Silu => 4,
            Activation::Gelu => 5,
            Activation::GeluApproximate => 6,
            Activation::HardSwish => 7,
            Activation::Sigmoid => 8,
            Activation::HardSigmoid { .. } => 9,
            Activation::Tanh => 10,
            Activation::Elu { .. } => 11,
            Activation::Mish => 12,
            Activation::Softplus { .. } => 13,
        };
        let mut places = Activation::SAMPLES.map(place).to_vec();
        places.dedup();
        assert!(places.into_iter().eq(0..14));
    }
}
