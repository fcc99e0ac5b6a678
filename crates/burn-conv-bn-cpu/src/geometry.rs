use std::ops::Range;

/// Bytes of columns that a tile aims at: about half of a core's second-level cache, so that the
/// tile's output and the weight stay beside them.
const TILE_BYTES: usize = 256 * 1024;

/// Fewest output positions of a tile, if there are so many: below, the matrix product's kernels
/// run half empty, which costs more than a tile that leaves the cache.
const MIN_TILE_POSITIONS: usize = 96;

/// Why a geometry is refused.
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
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Geometry {
    batch: usize,
    channels: [usize; 2],
    groups: usize,
    input: [usize; 3],
    kernel: [usize; 3],
    output: [usize; 3],
    stride: [usize; 3],
    padding: [(usize, usize); 3],
    dilation: [usize; 3],
}

/// One line of taps: which value of the input a value of the output meets.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tap {
    /// Channel within the group.
    pub(crate) channel: usize,
    /// Position in the kernel.
    pub(crate) offset: [usize; 3],
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
        })
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

    /// Most elements of scratch that one thread uses at a time.
    pub fn scratch_len(&self) -> usize {
        let tile = self.tile_rows() * self.output[2];
        2 * self.column_depth() * tile + self.group_out() * tile
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

    /// Taps of an output value: the depth of the matrix product.
    pub(crate) fn depth(&self) -> usize {
        self.group_in() * self.kernel.iter().product::<usize>()
    }

    /// Rows of columns that have to be laid out: none where the input already is the matrix.
    fn column_depth(&self) -> usize {
        match self.is_pointwise() {
            true => 0,
            false => self.depth(),
        }
    }

    /// Whether the input's channels already are the columns.
    pub(crate) fn is_pointwise(&self) -> bool {
        self.kernel == [1; 3] && self.stride == [1; 3] && self.padding == [(0, 0); 3]
    }

    /// Output rows, of `output[2]` positions each.
    fn rows(&self) -> usize {
        self.output[0] * self.output[1]
    }

    fn tile_rows(&self) -> usize {
        let width = self.output[2];
        let bytes_per_row = self.depth() * width * size_of::<f32>();
        let wanted = (TILE_BYTES / bytes_per_row).max(MIN_TILE_POSITIONS.div_ceil(width));
        let tiles = self.rows().div_ceil(wanted);
        self.rows().div_ceil(tiles)
    }

    /// Output rows of each tile of an image, all of a size but the last.
    pub(crate) fn tiles(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let (rows, step) = (self.rows(), self.tile_rows());
        (0..rows)
            .step_by(step)
            .map(move |start| start..(start + step).min(rows))
    }

    pub(crate) fn width(&self) -> usize {
        self.output[2]
    }

    /// Taps in the order of the weight's values.
    pub(crate) fn taps(&self) -> impl Iterator<Item = Tap> + '_ {
        let [depth, height, width] = self.kernel;
        let kernel = depth * height * width;
        (0..self.group_in() * kernel).map(move |tap| Tap {
            channel: tap / kernel,
            offset: [
                tap % kernel / (height * width),
                tap % (height * width) / width,
                tap % width,
            ],
        })
    }

    /// The input's position along one dimension that output position `index` meets at a tap.
    #[inline(always)]
    fn input_position(&self, dim: usize, index: usize, tap: Tap) -> Option<usize> {
        let padded = index * self.stride[dim] + tap.offset[dim] * self.dilation[dim];
        let position = padded.checked_sub(self.padding[dim].0)?;
        (position < self.input[dim]).then_some(position)
    }

    /// For each of the output rows `rows`, where in its plane the input row starts that it meets
    /// at a tap, or `None` if that row is padding.
    #[inline(always)]
    pub(crate) fn input_rows(
        &self,
        rows: Range<usize>,
        tap: Tap,
    ) -> impl Iterator<Item = Option<usize>> + '_ {
        // One division for the tile rather than one for each row.
        let height = self.output[1];
        let (mut d, mut h) = (rows.start / height, rows.start % height);
        rows.map(
            #[inline(always)]
            move |_| {
                let start = self
                    .input_position(0, d, tap)
                    .zip(self.input_position(1, h, tap))
                    .map(|(d, h)| (d * self.input[1] + h) * self.input[2]);
                h += 1;
                if h == height {
                    (d, h) = (d + 1, 0);
                }
                start
            },
        )
    }

    /// Output positions of a row that meet a value of the input at a tap rather than padding, and
    /// the first such value's place in the input row.
    #[inline(always)]
    pub(crate) fn row_overlap(&self, tap: Tap) -> (Range<usize>, usize) {
        let (stride, before) = (self.stride[2], self.padding[2].0);
        let shift = tap.offset[2] * self.dilation[2];
        let first = before.saturating_sub(shift).div_ceil(stride);
        // One past the last position p with p * stride + shift - before < input width.
        let end = (self.input[2] + before)
            .saturating_sub(shift)
            .div_ceil(stride)
            .min(self.output[2]);
        let first = first.min(end);
        (
            (first..end),
            (first * stride + shift).saturating_sub(before),
        )
    }

    pub(crate) fn row_stride(&self) -> usize {
        self.stride[2]
    }

    /// Images of each of at most `most` blocks, which sums are taken over in order. They depend on
    /// nothing but the geometry, so that results do not depend on the number of threads.
    pub(crate) fn images_per_block(&self, most: usize) -> usize {
        self.batch.div_ceil(most.clamp(1, self.batch))
    }
}
