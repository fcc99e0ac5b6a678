use burn::config::Config;
use burn::tensor::ops::ConvOptions;
use burn::tensor::{Tensor, activation};

/// Geometry of a convolution over one, two or three spatial dimensions.
///
/// The rank is a run-time value, unlike in Burn's [`ConvOptions`], because the op's backend
/// methods serve every rank. Spatial dimensions are in the order of the tensor's own axes.
///
/// ```
/// use burn::tensor::ops::ConvOptions;
/// use burn_conv_bn::ConvSpec;
///
/// // Burn's options are taken wherever a geometry is: here with stride 2 and padding 1.
/// let spec = ConvSpec::from(ConvOptions::new([2, 2], [1, 1], [1, 1], 1));
/// assert_eq!(spec.padding, vec![(1, 1), (1, 1)]);
///
/// // What Burn's layers for volumes do not take: more padding before than after.
/// let mut spec = ConvSpec::unit(3);
/// spec.padding[0] = (2, 0);
/// assert_eq!(spec.rank(), 3);
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ConvSpec {
    /// Step between two applications of the kernel, per spatial dimension.
    pub stride: Vec<usize>,
    /// Zeros added `(before, after)` each spatial dimension.
    pub padding: Vec<(usize, usize)>,
    /// Distance between two taps of the kernel, per spatial dimension.
    pub dilation: Vec<usize>,
    /// Number of groups that the input and output channels are split into.
    pub groups: usize,
}

impl ConvSpec {
    /// Stride 1, no padding, dilation 1 and one group over `rank` spatial dimensions.
    pub fn unit(rank: usize) -> Self {
        Self {
            stride: vec![1; rank],
            padding: vec![(0, 0); rank],
            dilation: vec![1; rank],
            groups: 1,
        }
    }

    /// Number of spatial dimensions.
    pub fn rank(&self) -> usize {
        self.stride.len()
    }

    /// Burn's options of the same geometry.
    ///
    /// # Panics
    ///
    /// Panics if this is not a geometry over `N` spatial dimensions, or if a stride, a dilation
    /// or the number of groups is zero.
    pub(crate) fn to_burn<const N: usize>(&self) -> ConvOptions<N> {
        fn fixed<T: Copy, const N: usize>(values: &[T]) -> [T; N] {
            values
                .try_into()
                .unwrap_or_else(|_| panic!("expected {N} spatial dimensions, got {}", values.len()))
        }
        ConvOptions::new_with_padding(
            fixed(&self.stride),
            fixed(&self.padding),
            fixed(&self.dilation),
            self.groups,
        )
    }
}

impl<const N: usize> From<ConvOptions<N>> for ConvSpec {
    fn from(options: ConvOptions<N>) -> Self {
        Self {
            stride: options.stride.to_vec(),
            padding: options.padding.to_vec(),
            dilation: options.dilation.to_vec(),
            groups: options.groups,
        }
    }
}

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
    /// `y = v * clamp(v / 6 + 1/2, 0, 1)`, with derivative 0 at -3 and 1 at 3. MobileNetV3's.
    HardSwish,
}

/// What an activation's derivative at a value can be told from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Derivative {
    /// Nothing: it is 1 everywhere.
    One,
    /// The activation's output as well as the value: both lie in the same piece of the function.
    OfOutput,
    /// The value only.
    OfValue,
}

impl Activation {
    /// `activation(value)` with Burn's own ops, as after a convolution that the norm was folded into.
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
            Self::HardSwish => activation::hard_swish(value),
        }
    }

    /// Whether the output is the value itself wherever a gradient passes.
    pub(crate) fn passes_unchanged(self) -> bool {
        matches!(self, Self::Identity | Self::Relu)
    }

    pub(crate) fn derivative(self) -> Derivative {
        match self {
            Self::Identity => Derivative::One,
            Self::Relu | Self::Relu6 => Derivative::OfOutput,
            // A negative slope makes both pieces positive.
            Self::LeakyRelu { negative_slope } if negative_slope >= 0.0 => Derivative::OfOutput,
            Self::LeakyRelu { .. } | Self::Silu | Self::Gelu | Self::HardSwish => {
                Derivative::OfValue
            }
        }
    }
}

/// What happens to the convolution's output between forward and backward.
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::tensor::Device;
/// use burn_conv_bn::{ConvBn2dConfig, Recompute};
///
/// let device = Device::flex().autodiff();
/// let keeps_conv_output = |recompute| {
///     let block = ConvBn2dConfig::new([3, 8], [3, 3])
///         .with_recompute(recompute)
///         .init(&device);
///     let saved = block.saved_for_backward([2, 3, 16, 16]);
///     saved.iter().any(|tensor| tensor.name == "conv_output")
/// };
/// assert!(!keeps_conv_output(Recompute::Conv));
/// assert!(keeps_conv_output(Recompute::Never));
/// # }
/// ```
#[derive(Config, Debug, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Recompute {
    /// Drop it and run the convolution again in the backward pass: the block keeps its input
    /// only.
    Conv,
    /// Keep it: one activation-sized tensor more, one convolution less.
    Never,
}

/// Everything about the fused op that is not a tensor.
///
/// ```
/// use burn_conv_bn::{Activation, ConvBnOptions, ConvSpec, Recompute};
///
/// let options = ConvBnOptions::new(ConvSpec::unit(2))
///     .with_activation(Activation::Relu)
///     .with_max_workspace(Some(64 << 20));
/// assert_eq!(options.recompute, Recompute::Conv);
/// ```
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct ConvBnOptions {
    /// Geometry of the convolution.
    pub conv: ConvSpec,
    /// How the norm is formed.
    pub norm: NormSpec,
    /// Applied last.
    pub activation: Activation,
    /// Whether the convolution's output is kept or recomputed.
    pub recompute: Recompute,
    /// Most bytes that the backward pass may hold beyond what was saved and what it returns
    /// (recomputed output, im2col columns, temporaries), or `None` for no bound.
    ///
    /// On Flex, a recomputed output that does not fit is never stored: each tile of it is
    /// recomputed twice, as is one of more than 128 MiB, or of 32 taps or fewer, without a bound.
    /// Elsewhere the backward pass works over the largest number of images that fits, but at least
    /// one, and recomputes twice unless all of them fit. A few tiles for each thread and copies of the
    /// weight are not bounded.
    pub max_workspace: Option<usize>,
}

impl ConvBnOptions {
    /// Batch normalization with epsilon 1e-5, no activation, recomputation without a bound.
    pub fn new(conv: impl Into<ConvSpec>) -> Self {
        Self {
            conv: conv.into(),
            norm: NormSpec::default(),
            activation: Activation::Identity,
            recompute: Recompute::Conv,
            max_workspace: None,
        }
    }

    /// Sets the norm's variant and epsilon.
    #[must_use]
    pub fn with_norm(mut self, norm: NormSpec) -> Self {
        self.norm = norm;
        self
    }

    /// Sets the activation.
    #[must_use]
    pub fn with_activation(mut self, activation: Activation) -> Self {
        self.activation = activation;
        self
    }

    /// Sets the recompute policy.
    #[must_use]
    pub fn with_recompute(mut self, recompute: Recompute) -> Self {
        self.recompute = recompute;
        self
    }

    /// Bounds the backward pass's workspace, in bytes.
    #[must_use]
    pub fn with_max_workspace(mut self, max_workspace: Option<usize>) -> Self {
        self.max_workspace = max_workspace;
        self
    }
}
