/// Most taps of an output value that is recomputed faster than stored and loaded: depthwise convolutions,
/// and first layers of one or three channels.
const FEW_TAPS: usize = 32;

/// Most bytes of an output that is stored faster than recomputed: larger ones are fresh pages in every
/// step, and raise the peak.
const LARGEST_STORED: usize = 128 << 20;

/// Why a geometry is refused.
///
/// ```
/// use burn_conv_bn_cpu::{Geometry, GeometryError};
///
/// let one = [1; 3];
/// let error = Geometry::new(1, [3, 4], 2, one, one, one, [(0, 0); 3], one).unwrap_err();
/// assert!(matches!(
///     error,
///     GeometryError::Groups { channels: [3, 4], groups: 2 }
/// ));
/// ```
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GeometryError {
    /// A size, stride, dilation or number of groups is zero.
    #[error("{what} must be positive, got {got:?}")]
    Zero {
        /// What was zero.
        what: &'static str,
        /// The values it stands among.
        got: Vec<usize>,
    },
    /// The channels do not divide into the groups.
    #[error("{channels:?} channels (in, out) do not divide into {groups} groups")]
    Groups {
        /// Input and output channels.
        channels: [usize; 2],
        /// Number of groups.
        groups: usize,
    },
    /// The kernel does not fit into the padded input.
    #[error("a kernel of extent {kernel} does not fit into the padded {padded} of dimension {dim}")]
    Kernel {
        /// Spatial dimension, from 0.
        dim: usize,
        /// Extent of the dilated kernel.
        kernel: usize,
        /// Extent of the padded input.
        padded: usize,
    },
}

/// Shapes of a convolution over depth, height and width; missing dimensions have size 1.
///
/// ```
/// use burn_conv_bn_cpu::Geometry;
///
/// // 32 images of 64 channels and 28x28 pixels, 3x3 with stride 2 and padding 1.
/// let padding = [(0, 0), (1, 1), (1, 1)];
/// let geometry = Geometry::new(
///     32, [64, 128], 1, [1, 28, 28], [1, 3, 3], [1, 2, 2], padding, [1; 3],
/// )?;
/// assert_eq!(geometry.output(), [1, 14, 14]);
/// assert_eq!(geometry.output_len(), 128 * 14 * 14);
/// # Ok::<(), burn_conv_bn_cpu::GeometryError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Geometry {
    batch: usize,
    pub(crate) channels: [usize; 2],
    groups: usize,
    pub(crate) input: [usize; 3],
    pub(crate) kernel: [usize; 3],
    pub(crate) output: [usize; 3],
    pub(crate) stride: [usize; 3],
    pub(crate) padding: [(usize, usize); 3],
    pub(crate) dilation: [usize; 3],
    pub(crate) max_scratch: usize,
    pub(crate) has_given_statistics: bool,
    pub(crate) method: Option<Method>,
}

impl Geometry {
    /// A convolution of `[batch, channels[0], input..]` with `[channels[1], channels[0] / groups,
    /// kernel..]`.
    ///
    /// # Errors
    ///
    /// [`GeometryError`] if there is no such convolution.
    #[allow(clippy::too_many_arguments)]
    pub fn new(
        batch: usize,
        channels: [usize; 2],
        groups: usize,
        input: [usize; 3],
        kernel: [usize; 3],
        stride: [usize; 3],
        padding: [(usize, usize); 3],
        dilation: [usize; 3],
    ) -> Result<Self, GeometryError> {
        for (what, got) in [
            ("batch", vec![batch]),
            ("channels", channels.to_vec()),
            ("groups", vec![groups]),
            ("input size", input.to_vec()),
            ("kernel size", kernel.to_vec()),
            ("stride", stride.to_vec()),
            ("dilation", dilation.to_vec()),
        ] {
            if got.contains(&0) {
                return Err(GeometryError::Zero { what, got });
            }
        }
        if channels
            .iter()
            .any(|channels| !channels.is_multiple_of(groups))
        {
            return Err(GeometryError::Groups { channels, groups });
        }
        let mut output = [0; 3];
        for dim in 0..3 {
            let padded = input[dim] + padding[dim].0 + padding[dim].1;
            let extent = dilation[dim] * (kernel[dim] - 1) + 1;
            if extent > padded {
                return Err(GeometryError::Kernel {
                    dim,
                    kernel: extent,
                    padded,
                });
            }
            output[dim] = (padded - extent) / stride[dim] + 1;
        }
        Ok(Self {
            batch,
            channels,
            groups,
            input,
            kernel,
            output,
            stride,
            padding,
            dilation,
            max_scratch: usize::MAX,
            has_given_statistics: false,
            method: None,
        })
    }

    /// The same geometry for given statistics, evaluation among them: the output's scratch is then bounded by what
    /// Burn's own layers copy in evaluation, for a pointwise kernel nothing, rather than in a training step.
    ///
    /// All passes of a step must agree, as with [`with_max_scratch`](Self::with_max_scratch).
    ///
    /// ```
    /// use burn_conv_bn_cpu::{Geometry, conv};
    ///
    /// let one = [1; 3];
    /// let geometry = Geometry::new(1, [1, 1], 1, one, one, one, [(0, 0); 3], one)?;
    /// let mut output = Vec::new();
    /// conv(&geometry.with_given_statistics(), &[2.0f32], &[3.0], &mut output);
    /// assert_eq!(output, [6.0]);
    /// # Ok::<(), burn_conv_bn_cpu::GeometryError>(())
    /// ```
    pub fn with_given_statistics(mut self) -> Self {
        self.has_given_statistics = true;
        self
    }

    /// The same geometry with a bound on scratch, in bytes, beyond which slower algorithms are taken. The
    /// smallest takes about 1 MiB, and the output of one image; two threads are counted.
    ///
    /// All passes of a step must be bounded alike, for the recomputed output to have the bits of the first.
    ///
    /// ```
    /// use burn_conv_bn_cpu::{Geometry, conv};
    ///
    /// // 3x3 over one image of 8 channels.
    /// let padding = [(0, 0), (1, 1), (1, 1)];
    /// let one = [1; 3];
    /// let geometry = Geometry::new(1, [8, 8], 1, [1, 4, 4], [1, 3, 3], one, padding, one)?;
    /// let bounded = geometry.clone().with_max_scratch(0);
    /// let (input, weight) = (vec![1.0f32; 8 * 16], vec![1.0; 8 * 8 * 9]);
    /// let (mut output, mut other) = (Vec::new(), Vec::new());
    /// conv(&geometry, &input, &weight, &mut output);
    /// conv(&bounded, &input, &weight, &mut other);
    /// assert_eq!(output, other);
    /// # Ok::<(), burn_conv_bn_cpu::GeometryError>(())
    /// ```
    pub fn with_max_scratch(mut self, bytes: usize) -> Self {
        self.max_scratch = bytes;
        self
    }

    /// Number of images.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Number of output channels.
    pub fn channels_out(&self) -> usize {
        self.channels[1]
    }

    /// Depth, height and width of the output.
    pub fn output(&self) -> [usize; 3] {
        self.output
    }

    /// Values of one input image.
    pub fn input_len(&self) -> usize {
        self.channels[0] * self.input_plane()
    }

    /// Values of one output image.
    pub fn output_len(&self) -> usize {
        self.channels[1] * self.positions()
    }

    /// Values of the weight.
    pub fn weight_len(&self) -> usize {
        self.channels[1] * self.depth()
    }

    /// Positions of one output channel.
    pub fn positions(&self) -> usize {
        self.output.iter().product()
    }

    /// Whether storing the convolution's output, of `bytes`, between the two steps of the backward pass is
    /// faster than recomputing it in each.
    ///
    /// ```
    /// use burn_conv_bn_cpu::Geometry;
    ///
    /// let conv = |channels, groups| {
    ///     let padding = [(0, 0), (1, 1), (1, 1)];
    ///     Geometry::new(32, channels, groups, [1, 56, 56], [1, 3, 3], [1; 3], padding, [1; 3])
    /// };
    /// assert!(conv([64, 64], 1)?.is_worth_storing(24 << 20));
    /// assert!(!conv([64, 64], 64)?.is_worth_storing(24 << 20));
    /// assert!(!conv([64, 64], 1)?.is_worth_storing(1 << 30));
    /// # Ok::<(), burn_conv_bn_cpu::GeometryError>(())
    /// ```
    pub fn is_worth_storing(&self, bytes: usize) -> bool {
        self.depth() > FEW_TAPS && bytes <= LARGEST_STORED
    }

    pub(crate) fn groups(&self) -> usize {
        self.groups
    }

    pub(crate) fn group_in(&self) -> usize {
        self.channels[0] / self.groups
    }

    pub(crate) fn group_out(&self) -> usize {
        self.channels[1] / self.groups
    }

    pub(crate) fn input_plane(&self) -> usize {
        self.input.iter().product()
    }

    /// Taps of an output value.
    pub(crate) fn depth(&self) -> usize {
        self.group_in() * self.kernel.iter().product::<usize>()
    }
}

/// An algorithm of the convolution.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    Planes,
    WithoutGaps,
    Winograd,
    Slices,
    Packed,
}

impl Method {
    pub const ALL: [Self; 5] = [
        Self::Planes,
        Self::WithoutGaps,
        Self::Winograd,
        Self::Slices,
        Self::Packed,
    ];
}
