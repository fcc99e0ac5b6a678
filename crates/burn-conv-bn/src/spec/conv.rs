use burn::config::Config;
use burn::tensor::ops::ConvOptions;

use super::{Activation, NormSpec};

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
/// // Asymmetric padding over three dimensions, which Burn's layers do not take.
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

/// Treatment of the convolution's output between forward and backward.
///
/// In a chain of blocks under one policy, with x a block's input and z its convolution's output:
///
/// |         | each block keeps | second convolution |
/// |---------|------------------|--------------------|
/// | `Conv`  | x                | yes                |
/// | `Norm`  | z                | no                 |
/// | `Never` | x and z          | no                 |
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
    /// Keep it, and let no consumer keep the block's output, Burn's own layers included: the backward pass
    /// rebuilds the output once from the convolution's, by norm and activation. It then lives until its last
    /// consumer's turn.
    ///
    /// This is a property of the output, with Burn's gradient checkpointing and without. A detached output
    /// is an ordinary tensor.
    ///
    /// Where the output is not a function of the convolution's output and the batch alone, this is
    /// [`Never`](Self::Never): with a residual, whose rebuilding could reach back to the first block; with
    /// given statistics, as those of a frozen norm, which are folded into the weight; and where the block is
    /// one op with the max pool behind it. Without autodiff, and where nothing is tracked, nothing is kept
    /// under any policy.
    Norm,
    /// Keep it: one activation-sized tensor more, one convolution less.
    Never,
}

/// Options of the fused op.
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
    /// (recomputed output, im2col columns, temporaries), or `None` for the backend's own bound.
    ///
    /// On Flex, a recomputed output that does not fit is never stored: each tile of it is
    /// recomputed twice, as is one of more than 128 MiB, or of 32 taps or fewer, without a bound.
    /// Elsewhere the gradients of the convolution are taken over the largest number of images that fits beside
    /// the recomputed output, but at least one; only if not even that fits, the output is recomputed in parts,
    /// and each of them twice. Without a bound CubeCL's devices allow these gradients 64 MiB beside the
    /// output, or as much as input and output take. Under
    /// [`Recompute::Norm`] nothing is recomputed, and the gradient of the convolution's output is a tensor; the
    /// bound is that of the convolution's gradients.
    ///
    /// On Flex it bounds the scratch of the kernels too, beside a stored output, forward as well, and at no less
    /// than 2 MiB on two threads.
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

    /// The options where the op is one with a max pool behind it: [`Recompute::Norm`] is
    /// [`Recompute::Never`] there.
    #[must_use]
    pub fn joined(mut self) -> Self {
        if self.recompute == Recompute::Norm {
            self.recompute = Recompute::Never;
        }
        self
    }

    /// Bounds the backward pass's workspace, in bytes.
    #[must_use]
    pub fn with_max_workspace(mut self, max_workspace: Option<usize>) -> Self {
        self.max_workspace = max_workspace;
        self
    }
}
