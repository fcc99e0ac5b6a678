use burn::config::Config;

use super::Activation;

/// How the inverse standard deviation `s` follows from the sum of squared deviations `M2` over
/// the `m` values of a channel.
///
/// ```
/// use burn_conv_bn::NormVariant;
///
/// assert_eq!(NormVariant::BatchNorm.degrees_of_freedom(), 0);
/// assert_eq!(NormVariant::Tutorial.degrees_of_freedom(), 1);
/// ```
#[derive(Config, Debug, Copy, PartialEq, Eq, Hash)]
pub enum NormVariant {
    /// `s = 1 / sqrt(M2 / m + epsilon)`: batch normalization as in Burn, PyTorch and the paper
    /// ([Ioffe and Szegedy 2015](https://arxiv.org/abs/1502.03167), algorithm 1).
    BatchNorm,
    /// `s = 1 / (sqrt(M2 / (m - 1)) + epsilon)`: the PyTorch tutorial "Fusing Convolution and
    /// Batch Norm using Custom Function" takes the unbiased variance and adds epsilon outside
    /// the root. Where the variance is zero, `ds/dvar` is infinite; the backward pass takes the
    /// corresponding term of the gradient as zero.
    Tutorial,
}

impl NormVariant {
    /// Degrees of freedom taken off the number of values in the variance: 0 or 1.
    pub fn degrees_of_freedom(self) -> usize {
        match self {
            Self::BatchNorm => 0,
            Self::Tutorial => 1,
        }
    }
}

/// The norm's variant and its epsilon.
///
/// ```
/// use burn_conv_bn::{NormSpec, NormVariant};
///
/// let burns = NormSpec::new(NormVariant::BatchNorm, 1e-5);
/// assert_eq!(burns, NormSpec::default());
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NormSpec {
    /// How the inverse standard deviation is formed.
    pub variant: NormVariant,
    /// Added for numerical stability, in or outside the root by variant. Finite and positive, or 0 with given
    /// statistics.
    pub epsilon: f64,
}

impl NormSpec {
    /// A norm of that variant and epsilon.
    pub fn new(variant: NormVariant, epsilon: f64) -> Self {
        Self { variant, epsilon }
    }

    /// `s`, the inverse standard deviation, from the variance with the variant's degrees of freedom.
    ///
    /// ```
    /// use burn_conv_bn::{NormSpec, NormVariant};
    ///
    /// assert_eq!(NormSpec::new(NormVariant::BatchNorm, 0.75).inv_std(0.25), 1.0);
    /// assert_eq!(NormSpec::new(NormVariant::Tutorial, 0.5).inv_std(0.25), 1.0);
    /// ```
    pub fn inv_std(self, variance: f64) -> f64 {
        1.0 / self.std(variance)
    }

    /// `1 / s`: the standard deviation with epsilon.
    pub(crate) fn std(self, variance: f64) -> f64 {
        match self.variant {
            NormVariant::BatchNorm => (variance + self.epsilon).sqrt(),
            NormVariant::Tutorial => variance.sqrt() + self.epsilon,
        }
    }

    /// `ds/dvar * 2 / degrees`, with `degrees` the number of values less the degrees of freedom: the
    /// factor of `gamma * sum(g * (z - mean)) * (z - mean)` in the gradient of the norm's input.
    ///
    /// ```
    /// use burn_conv_bn::{NormSpec, NormVariant};
    ///
    /// assert_eq!(NormSpec::new(NormVariant::BatchNorm, 0.75).slope_factor(0.25, 4.0), -0.25);
    /// assert_eq!(NormSpec::new(NormVariant::Tutorial, 0.5).slope_factor(0.25, 4.0), -0.5);
    /// assert_eq!(NormSpec::new(NormVariant::Tutorial, 0.5).slope_factor(0.0, 4.0), 0.0);
    /// ```
    pub fn slope_factor(self, variance: f64, degrees: f64) -> f64 {
        let s = self.inv_std(variance);
        match self.variant {
            // s = (var + eps)^(-1/2), ds/dvar = -s^3 / 2
            NormVariant::BatchNorm => -s * s * s / degrees,
            // s = 1 / (sqrt(var) + eps), ds/dvar = -s^2 / (2 sqrt(var)), taken as 0 at var = 0
            NormVariant::Tutorial if variance == 0.0 => 0.0,
            NormVariant::Tutorial => -s * s / (variance.sqrt() * degrees),
        }
    }
}

impl Default for NormSpec {
    /// Burn's batch norm with its epsilon, 1e-5.
    fn default() -> Self {
        Self::new(NormVariant::BatchNorm, 1e-5)
    }
}

/// Options of batch normalization with an activation behind it.
///
/// ```
/// use burn_conv_bn::{Activation, BatchNormOptions, NormSpec};
///
/// let options = BatchNormOptions::new(NormSpec::default()).with_activation(Activation::Relu);
/// assert_eq!(options.norm.epsilon, 1e-5);
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct BatchNormOptions {
    /// How the norm is formed.
    pub norm: NormSpec,
    /// Applied last.
    pub activation: Activation,
}

impl BatchNormOptions {
    /// That norm and no activation.
    pub fn new(norm: NormSpec) -> Self {
        Self {
            norm,
            activation: Activation::Identity,
        }
    }

    /// Sets the activation.
    #[must_use]
    pub fn with_activation(mut self, activation: Activation) -> Self {
        self.activation = activation;
        self
    }
}

impl From<NormSpec> for BatchNormOptions {
    fn from(norm: NormSpec) -> Self {
        Self::new(norm)
    }
}
