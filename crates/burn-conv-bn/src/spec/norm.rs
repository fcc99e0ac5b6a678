use burn::config::Config;

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
    /// Added for numerical stability, where the variant says. Finite and positive, or 0 with given
    /// statistics.
    pub epsilon: f64,
}

impl NormSpec {
    /// A norm of that variant and epsilon.
    pub fn new(variant: NormVariant, epsilon: f64) -> Self {
        Self { variant, epsilon }
    }
}

impl Default for NormSpec {
    /// Burn's batch norm with its epsilon, 1e-5.
    fn default() -> Self {
        Self::new(NormVariant::BatchNorm, 1e-5)
    }
}
