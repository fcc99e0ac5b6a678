use std::ops::Range;

use crate::Geometry;

/// Most taps of a window: an argmax is a byte.
pub(super) const MOST_TAPS: usize = 256;

/// Largest size: a sum of two does not overflow, and no slice is longer.
pub(super) const MOST: usize = isize::MAX as usize;

/// Values of the planes that make a task worth its overhead.
const TASK_VALUES: usize = 32 << 10;

/// Bytes of a band of input rows: half of a first-level cache of 32 KiB. The outputs and the streams have
/// the other half.
const BAND_BYTES: usize = 16 << 10;

/// Why a max pool's geometry is refused.
///
/// ```
/// use burn_conv_bn_cpu::{PoolGeometry, PoolGeometryError};
///
/// let one = [1; 2];
/// let error = PoolGeometry::new(1, [32, 32], [16, 17], one, [0; 2], one, false).unwrap_err();
/// assert_eq!(error, PoolGeometryError::Places { kernel: [16, 17] });
/// ```
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PoolGeometryError {
    /// A kernel size, stride or dilation is zero.
    #[error("{what} must be positive, got {got:?}")]
    Zero {
        /// What was zero.
        what: &'static str,
        /// Its height and width.
        got: [usize; 2],
    },
    /// The window has more values than a byte has.
    #[error(
        "a window of {kernel:?} has more than 256 places, which is as many as a byte tells apart"
    )]
    Places {
        /// Height and width of the window.
        kernel: [usize; 2],
    },
    /// A size, or a number of values, is larger than any memory.
    #[error(
        "{planes} planes of {input:?} with padding {padding:?}, under windows of {kernel:?} with stride \
         {stride:?} and dilation {dilation:?}, have sizes above {}",
        isize::MAX
    )]
    TooLarge {
        /// Number of planes.
        planes: usize,
        /// Height and width of a plane.
        input: [usize; 2],
        /// Height and width of the window.
        kernel: [usize; 2],
        /// Stride of rows and columns.
        stride: [usize; 2],
        /// Padding of rows and columns.
        padding: [usize; 2],
        /// Dilation of rows and columns.
        dilation: [usize; 2],
    },
}

/// Shapes of a max pool over planes, which are the channels of all images.
///
/// ```
/// use burn_conv_bn_cpu::PoolGeometry;
///
/// // 32 images of 64 channels and 112x112 pixels, 3x3 with stride 2 and padding 1.
/// let (kernel, stride, one) = ([3, 3], [2, 2], [1, 1]);
/// let geometry = PoolGeometry::new(32 * 64, [112, 112], kernel, stride, one, one, false)?;
/// assert_eq!(geometry.output(), [56, 56]);
/// # Ok::<(), burn_conv_bn_cpu::PoolGeometryError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolGeometry {
    pub(crate) planes: usize,
    pub(crate) input: [usize; 2],
    pub(super) kernel: [usize; 2],
    pub(crate) stride: [usize; 2],
    pub(crate) padding: [usize; 2],
    pub(super) dilation: [usize; 2],
    pub(super) output: [usize; 2],
}

impl PoolGeometry {
    /// A max pool over `[planes, input..]`, with `padding` before the first row and column and as much
    /// behind the last.
    ///
    /// In `ceil_mode`, windows that reach beyond the padding count too, except a last one that would start
    /// behind the input. A padded input smaller than the window has one output in `ceil_mode`, and otherwise
    /// none.
    ///
    /// # Errors
    ///
    /// [`PoolGeometryError`] if a kernel size, stride or dilation is zero, if the window has more than
    /// 256 places, or if sizes are beyond any memory.
    pub fn new(
        planes: usize,
        input: [usize; 2],
        kernel: [usize; 2],
        stride: [usize; 2],
        padding: [usize; 2],
        dilation: [usize; 2],
        ceil_mode: bool,
    ) -> Result<Self, PoolGeometryError> {
        for (what, got) in [
            ("kernel size", kernel),
            ("stride", stride),
            ("dilation", dilation),
        ] {
            if got.contains(&0) {
                return Err(PoolGeometryError::Zero { what, got });
            }
        }
        if kernel[0].saturating_mul(kernel[1]) > MOST_TAPS {
            return Err(PoolGeometryError::Places { kernel });
        }
        let geometry = Self {
            planes,
            input,
            kernel,
            stride,
            padding,
            dilation,
            output: [0; 2],
        };
        let output = [0, 1].map(|dim| geometry.output_size(dim, ceil_mode));
        if let [Some(height), Some(width)] = output {
            let output = [height, width];
            if geometry.fits(input) && geometry.fits(output) {
                return Ok(Self { output, ..geometry });
            }
        }
        Err(PoolGeometryError::TooLarge {
            planes,
            input,
            kernel,
            stride,
            padding,
            dilation,
        })
    }

    /// Height and width of the output.
    pub fn output(&self) -> [usize; 2] {
        self.output
    }

    /// Whether each window meets the input, and none reaches beyond the padding: always without padding
    /// and ceil mode, unless the input is smaller than the window.
    ///
    /// ```
    /// use burn_conv_bn_cpu::PoolGeometry;
    ///
    /// let (size, one) = ([5, 5], [1, 1]);
    /// let pool = |padding, ceil| PoolGeometry::new(4, size, [2, 2], [2, 2], padding, one, ceil);
    /// assert!(pool([0, 0], false)?.is_regular());
    /// assert!(!pool([0, 0], true)?.is_regular());
    /// assert!(!pool([2, 0], false)?.is_regular());
    /// # Ok::<(), burn_conv_bn_cpu::PoolGeometryError>(())
    /// ```
    pub fn is_regular(&self) -> bool {
        (0..2).all(|dim| {
            let outputs = self.output[dim];
            let end = outputs.saturating_sub(1) * self.stride[dim] + self.extent(dim);
            let meets = |output| !self.meeting(dim, output).is_empty();
            end <= self.input[dim] + 2 * self.padding[dim] && (0..outputs).all(meets)
        })
    }

    /// Outputs of one dimension, unless a size is too large.
    fn output_size(&self, dim: usize, ceil_mode: bool) -> Option<usize> {
        let (input, padding, stride) = (self.input[dim], self.padding[dim], self.stride[dim]);
        let extent = (self.kernel[dim] - 1)
            .checked_mul(self.dilation[dim])?
            .checked_add(1)?;
        let padded = padding.checked_mul(2)?.checked_add(input)?;
        let sizes = [extent, padded, stride, self.dilation[dim]];
        if sizes.iter().any(|size| *size > MOST) {
            return None;
        }
        if padded < extent {
            return Some(usize::from(ceil_mode));
        }
        let steps = padded - extent;
        if !ceil_mode {
            return Some(steps / stride + 1);
        }
        let last = steps.div_ceil(stride);
        let starts_behind = last * stride >= input + padding;
        Some(last + usize::from(!starts_behind))
    }

    /// Whether all planes of this size together fit [`MOST`].
    fn fits(&self, [height, width]: [usize; 2]) -> bool {
        height
            .checked_mul(width)
            .and_then(|plane| plane.checked_mul(self.planes))
            .is_some_and(|len| len <= MOST)
    }

    pub(crate) fn input_plane(&self) -> usize {
        self.input[0] * self.input[1]
    }

    pub(crate) fn output_plane(&self) -> usize {
        self.output[0] * self.output[1]
    }

    /// Values of all planes of the input.
    pub(crate) fn input_len(&self) -> usize {
        self.planes * self.input_plane()
    }

    /// Values of all planes of the output.
    pub(crate) fn output_len(&self) -> usize {
        self.planes * self.output_plane()
    }

    /// Rows or columns of a dilated window.
    pub(crate) fn extent(&self, dim: usize) -> usize {
        (self.kernel[dim] - 1) * self.dilation[dim] + 1
    }

    /// The taps of one dimension at which an output's window meets the input.
    pub(super) fn meeting(&self, dim: usize, output: usize) -> Range<usize> {
        let start = output.saturating_mul(self.stride[dim]);
        let before = |end: usize| {
            let taps = end.saturating_sub(start).div_ceil(self.dilation[dim]);
            taps.min(self.kernel[dim])
        };
        before(self.padding[dim])..before(self.padding[dim] + self.input[dim])
    }

    /// The input rows of some output rows' windows, those in between included.
    pub(super) fn input_rows(&self, outputs: &Range<usize>) -> Range<usize> {
        let [stride, _] = self.stride;
        let row = |padded: usize| padded.saturating_sub(self.padding[0]).min(self.input[0]);
        let end = match outputs.end.checked_sub(1) {
            Some(last) => row(last * stride + self.extent(0)),
            None => 0,
        };
        row(outputs.start * stride)..end
    }

    /// Output rows of a band, for input rows of `bytes` each. Bands share the rows in which their windows
    /// overlap; bands of tall windows are larger, so that at most half is shared.
    pub(super) fn band(&self, bytes: usize) -> usize {
        let extent = self.extent(0).min(self.input[0]);
        let rows = (BAND_BYTES / bytes.max(1)).max(2 * extent);
        ((rows - extent) / self.stride[0] + 1).min(self.output[0].max(1))
    }

    /// Planes of a task.
    pub(super) fn planes_per_task(&self) -> usize {
        let plane = self.input_plane().max(self.output_plane());
        (TASK_VALUES / plane.max(1)).max(1)
    }

    /// Panics unless these are planes of the convolution's output, under
    /// [regular](Self::is_regular) windows.
    pub(crate) fn check_joins(&self, geometry: &Geometry) {
        assert!(
            self.is_regular(),
            "a window that misses the input, or reaches beyond its padding"
        );
        assert_eq!(
            (self.planes, self.input_plane()),
            (
                geometry.batch() * geometry.channels_out(),
                geometry.positions()
            ),
            "planes of the convolution's output, and values of each"
        );
    }
}
