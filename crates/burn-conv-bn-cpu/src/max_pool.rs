//! Max pooling over planes, and its gradient.
//!
//! What is kept for the gradient is one byte for each output: the place of the maximum within its
//! window. The values are those of Burn's Flex backend, 0.22.1, to the bit but for what a NaN carries:
//!
//! - Of equal values, the first in its window wins, row by row; -0.0 and 0.0 are equal.
//! - A NaN wins against any number, and the last NaN against those before it.
//! - Padding never wins, not even against negative infinity. A window that lies wholly in padding gives
//!   negative infinity, and passes no gradient on.
//! - Where windows overlap, a value's gradients are added up in the order of the outputs. Of `f16` and
//!   `bf16`, they are added up in `f32` and rounded once; Flex does so for `bf16` alone.
//!
//! Forward takes a band of input rows apart, into a line for each remainder of the columns by the
//! stride. In these, what a tap meets at neighbouring outputs is neighbouring too, whatever stride and
//! dilation are, and padding is negative infinity that is written once for each thread. Backward adds
//! up a band of rows while it is in the first-level cache. Either way each activation is read or
//! written once in main memory.

// Blocks of registers are addressed by their place in the block.
#![allow(clippy::needless_range_loop)]

use std::mem::MaybeUninit;
use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use crate::backward::split as split_blocks;
use crate::buffer::room;
use crate::minimal::{CHUNK, Chunk, split};
use crate::pool::Pool;
use crate::shifted::WIDEST;
use crate::simd::{Sweep, copy};
use crate::{Element, Real};

/// Places of a window that a byte tells apart.
const PLACES: usize = 256;

/// Sizes go up to this: a sum of two of them is a number too, and no slice is longer.
const MOST: usize = isize::MAX as usize;

/// Values of the planes that make a task worth its overhead.
const TASK_VALUES: usize = 32 << 10;

/// Bytes of a band of input rows: half of a first-level cache of 32 KiB. The other half is for the
/// outputs, and for what streams through.
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
    /// A byte does not tell the places of a window apart.
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
    kernel: [usize; 2],
    pub(crate) stride: [usize; 2],
    pub(crate) padding: [usize; 2],
    dilation: [usize; 2],
    output: [usize; 2],
}

impl PoolGeometry {
    /// A max pool over `[planes, input..]`, with `padding` before the first row and column and as much
    /// behind the last.
    ///
    /// In `ceil_mode`, windows that reach beyond the padding count too, but for a last one that would
    /// start behind the input. A padded input smaller than the window then gives one output, and
    /// otherwise none.
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
        if kernel[0].saturating_mul(kernel[1]) > PLACES {
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

    /// Whether planes of this size have no more values than there may be.
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

    /// Rows or columns from a window's first to behind its last.
    pub(crate) fn extent(&self, dim: usize) -> usize {
        (self.kernel[dim] - 1) * self.dilation[dim] + 1
    }

    /// The taps of one dimension at which an output's window meets the input.
    fn meeting(&self, dim: usize, output: usize) -> Range<usize> {
        let start = output.saturating_mul(self.stride[dim]);
        let before = |end: usize| {
            let taps = end.saturating_sub(start).div_ceil(self.dilation[dim]);
            taps.min(self.kernel[dim])
        };
        before(self.padding[dim])..before(self.padding[dim] + self.input[dim])
    }

    /// The input rows that lie between the ends of some output rows' windows.
    fn input_rows(&self, outputs: &Range<usize>) -> Range<usize> {
        let [stride, _] = self.stride;
        let row = |padded: usize| padded.saturating_sub(self.padding[0]).min(self.input[0]);
        let end = match outputs.end.checked_sub(1) {
            Some(last) => row(last * stride + self.extent(0)),
            None => 0,
        };
        row(outputs.start * stride)..end
    }

    /// Output rows of a band, whose input rows are of so many bytes each. Bands share as many input rows
    /// as windows overlap, so that those of tall windows are larger: no more than half is shared.
    fn band(&self, bytes: usize) -> usize {
        let extent = self.extent(0).min(self.input[0]);
        let rows = (BAND_BYTES / bytes.max(1)).max(2 * extent);
        ((rows - extent) / self.stride[0] + 1).min(self.output[0].max(1))
    }

    /// Planes of a task.
    fn planes_per_task(&self) -> usize {
        let plane = self.input_plane().max(self.output_plane());
        (TASK_VALUES / plane.max(1)).max(1)
    }
}

/// The largest value of each window: `[planes, output..]` of `[planes, input..]`, in the place of what
/// `output` holds. If wanted, `places` becomes what [`max_pool_backward`] needs: for each output the
/// place of its maximum within the window, `row * kernel[1] + column`.
///
/// The values are those of Burn's Flex backend: of equal ones the first wins, a NaN wins against any
/// number and the last NaN against the others, and a window wholly in padding gives negative infinity.
/// The place of such a window means nothing.
///
/// # Panics
///
/// Panics if the input is not of the geometry's size.
///
/// # Examples
///
/// ```
/// use burn_conv_bn_cpu::{PoolGeometry, max_pool};
///
/// // A plane of two rows, in windows of 2x2.
/// let two = [2, 2];
/// let geometry = PoolGeometry::new(1, [2, 4], two, two, [0, 0], [1, 1], false)?;
/// let input = [
///     1.0f32, 2.0, 5.0, 5.0, //
///     4.0, 3.0, 0.0, 5.0,
/// ];
/// let (mut output, mut places) = (Vec::new(), Vec::new());
/// max_pool(&geometry, &input, &mut output, Some(&mut places));
/// assert_eq!(output, [4.0, 5.0]);
/// assert_eq!(places, [2, 0]);
/// # Ok::<(), burn_conv_bn_cpu::PoolGeometryError>(())
/// ```
pub fn max_pool<E: Element>(
    geometry: &PoolGeometry,
    input: &[E],
    output: &mut Vec<E>,
    places: Option<&mut Vec<u8>>,
) {
    assert_eq!(input.len(), geometry.input_len(), "input");
    let input = Given {
        values: input,
        plane: geometry.input_plane(),
    };
    pool_all(geometry, &input, output, places);
}

/// What is pooled, plane by plane.
pub(crate) trait Planes<E>: Sync {
    /// Buffers of one thread.
    type Scratch: Default + Send;

    fn plane<'a>(&'a self, index: usize, scratch: &'a mut Self::Scratch) -> &'a [E];
}

/// Planes that are in memory.
struct Given<'a, E> {
    values: &'a [E],
    plane: usize,
}

impl<E: Sync> Planes<E> for Given<'_, E> {
    type Scratch = ();

    fn plane<'a>(&'a self, index: usize, (): &'a mut ()) -> &'a [E] {
        &self.values[index * self.plane..][..self.plane]
    }
}

/// As [`max_pool()`].
#[allow(unsafe_code)]
pub(crate) fn pool_all<E: Element, P: Planes<E>>(
    geometry: &PoolGeometry,
    input: &P,
    output: &mut Vec<E>,
    mut places: Option<&mut Vec<u8>>,
) {
    let len = geometry.output_len();
    let values = room(output, len);
    let bytes = places.as_mut().map(|places| room(places, len));
    if len == 0 {
        return;
    }
    let planes = geometry.planes_per_task();
    let output_plane = geometry.output_plane();
    let tasks = geometry.planes.div_ceil(planes);
    let bytes = split_blocks(bytes, planes * output_plane, tasks);
    let windows = Windows::<E::Real>::new(geometry);
    let pool = Pool::<(Scratch<E::Real>, P::Scratch)>::new();
    values
        .par_chunks_mut(planes * output_plane)
        .enumerate()
        .zip(bytes)
        .for_each(|((task, values), mut bytes)| {
            pool.with(|(scratch, input_scratch)| {
                windows.reserve(scratch);
                for (index, values) in values.chunks_exact_mut(output_plane).enumerate() {
                    let input = input.plane(task * planes + index, input_scratch);
                    let bytes = bytes.as_deref_mut();
                    let bytes = bytes.map(|bytes| &mut bytes[index * output_plane..]);
                    windows.pool_plane(input, values, bytes, scratch);
                }
            });
        });
    // SAFETY: there is room for `len` values in each, all of which belong to the tasks; and of a task's
    // planes, all rows of outputs are in bands, which `pool_plane` writes.
    unsafe {
        output.set_len(len);
        if let Some(places) = places {
            places.set_len(len);
        }
    }
}

/// The gradient of [`max_pool`]'s input: `[planes, input..]` of the output's gradient `[planes,
/// output..]`, in the place of what `input_grad` holds. Each gradient goes to the place of its maximum,
/// where those of overlapping windows are added up, and the others get zero.
///
/// A gradient whose place is not in its window, or not in the input, goes nowhere.
///
/// # Panics
///
/// Panics if a slice is not of the geometry's size.
///
/// # Examples
///
/// ```
/// use burn_conv_bn_cpu::{PoolGeometry, max_pool, max_pool_backward};
///
/// // Two windows of three values, which share the one in the middle.
/// let one = [1, 1];
/// let geometry = PoolGeometry::new(1, [1, 5], [1, 3], [1, 2], [0, 0], one, false)?;
/// let (mut output, mut places) = (Vec::new(), Vec::new());
/// max_pool(&geometry, &[0.0f32, 1.0, 9.0, 2.0, 3.0], &mut output, Some(&mut places));
/// assert_eq!((output.as_slice(), places.as_slice()), (&[9.0, 9.0][..], &[2, 0][..]));
///
/// let mut input_grad = Vec::new();
/// max_pool_backward(&geometry, &[0.5, 0.25], &places, &mut input_grad);
/// assert_eq!(input_grad, [0.0, 0.0, 0.75, 0.0, 0.0]);
/// # Ok::<(), burn_conv_bn_cpu::PoolGeometryError>(())
/// ```
#[allow(unsafe_code)]
pub fn max_pool_backward<E: Element>(
    geometry: &PoolGeometry,
    output_grad: &[E],
    places: &[u8],
    input_grad: &mut Vec<E>,
) {
    assert_eq!(output_grad.len(), geometry.output_len(), "output gradient");
    assert_eq!(places.len(), geometry.output_len(), "places");
    let len = geometry.input_len();
    let grads = room(input_grad, len);
    if len == 0 {
        return;
    }
    let planes = geometry.planes_per_task();
    let (input_plane, output_plane) = (geometry.input_plane(), geometry.output_plane());
    let routes = Routes::new::<E::Real>(geometry);
    let pool = Pool::<GradScratch<E::Real>>::new();
    grads
        .par_chunks_mut(planes * input_plane)
        .enumerate()
        .for_each(|(task, grads)| {
            pool.with(|scratch| {
                for (index, grad) in grads.chunks_exact_mut(input_plane).enumerate() {
                    let start = (task * planes + index) * output_plane;
                    let outputs = start..start + output_plane;
                    let (output_grad, places) = (&output_grad[outputs.clone()], &places[outputs]);
                    routes.input_grad(output_grad, places, grad, scratch);
                }
            });
        });
    // SAFETY: there is room for `len` values, all of which belong to the tasks; and of a task's planes,
    // `input_grad` writes all rows.
    unsafe { input_grad.set_len(len) };
}

/// [`Element::write`], compiled for the vector unit.
fn write<E: Element>(values: &[E::Real], target: &mut [MaybeUninit<E>]) {
    Arch::new().dispatch(Sweep(
        #[inline(always)]
        || E::write(values, target),
    ));
}

/// What the windows' columns find in an input row that has been taken apart.
struct Windows<'a, T: Real> {
    geometry: &'a PoolGeometry,
    /// The remainders of padded columns by the stride that a window meets, each of which has a line.
    phases: Vec<Phase>,
    /// From one line to the next.
    pitch: usize,
    /// From what a row of a window finds to what the next one does.
    step: usize,
    /// Where each column of the first output's window is in a row's lines. The other outputs' follow
    /// it. Those that are behind the input for all outputs are left out, at the end.
    columns: Vec<usize>,
    /// For each output of a row, the first column of its window that is not padding.
    first: Vec<T::Index>,
    /// Output rows of a band.
    rows: usize,
}

/// The input columns of one line.
struct Phase {
    /// The first of them; the others follow a stride apart.
    first: usize,
    /// Their places in the line.
    held: Range<usize>,
}

/// Buffers of one thread.
#[derive(Default)]
struct Scratch<T: Real> {
    /// The input rows of a band, taken apart. All that is padding stays negative infinity.
    lines: Vec<T>,
    /// The band's outputs, and some beyond the last that mean nothing.
    values: Vec<T>,
    /// Their places.
    places: Vec<T::Index>,
    converted: Vec<T>,
}

impl<'a, T: Real> Windows<'a, T> {
    fn new(geometry: &'a PoolGeometry) -> Self {
        let [_, width] = geometry.input;
        let [_, outputs] = geometry.output;
        let [_, stride] = geometry.stride;
        let [_, padding] = geometry.padding;
        let mut remainders: Vec<usize> = Vec::new();
        let mut taps: Vec<(usize, usize)> = Vec::new();
        for tap in 0..geometry.kernel[1] {
            let column = tap * geometry.dilation[1];
            if column >= width + padding {
                break;
            }
            let remainder = column % stride;
            let line = match remainders.iter().position(|known| *known == remainder) {
                Some(line) => line,
                None => {
                    remainders.push(remainder);
                    remainders.len() - 1
                }
            };
            taps.push((line, column / stride));
        }
        let reach = taps.iter().map(|(_, shift)| *shift).max().unwrap_or(0);
        let outputs_held = outputs.next_multiple_of(WIDEST);
        let pitch = outputs_held + reach;
        let phases: Vec<Phase> = remainders
            .iter()
            .map(|remainder| {
                let place = |padded: usize| {
                    let columns = padded.saturating_sub(*remainder);
                    columns.div_ceil(stride).min(pitch)
                };
                let held = place(padding)..place(padding + width);
                // If none is held, this is not used.
                let first = (held.start * stride + remainder).saturating_sub(padding);
                Phase { first, held }
            })
            .collect();
        let row_len = phases.len() * pitch;
        let first = (0..outputs_held)
            .map(|output| {
                let meeting = geometry.meeting(1, output);
                to_index::<T>(if meeting.is_empty() { 0 } else { meeting.start })
            })
            .collect();
        Self {
            geometry,
            phases,
            pitch,
            // Windows of more than one row have them within the input, whose lines fit into memory.
            step: geometry.dilation[0].saturating_mul(row_len),
            columns: taps
                .iter()
                .map(|(line, shift)| line * pitch + shift)
                .collect(),
            first,
            rows: geometry.band(row_len * size_of::<T>()),
        }
    }

    /// Values of an input row that has been taken apart.
    fn row_len(&self) -> usize {
        self.phases.len() * self.pitch
    }

    fn reserve(&self, scratch: &mut Scratch<T>) {
        let geometry = self.geometry;
        let rows = (self.rows - 1) * geometry.stride[0] + geometry.extent(0);
        let lines = rows.min(geometry.input[0]) * self.row_len();
        scratch.lines.resize(lines, T::from_f64(f64::NEG_INFINITY));
        let outputs = self.rows * geometry.output[1] + WIDEST;
        scratch.values.resize(outputs, T::ZERO);
        scratch.places.resize(outputs, to_index::<T>(0));
    }

    /// The outputs of a plane, and their places if they are wanted.
    fn pool_plane<E: Element<Real = T>>(
        &self,
        input: &[E],
        output: &mut [MaybeUninit<E>],
        mut places: Option<&mut [MaybeUninit<u8>]>,
        scratch: &mut Scratch<T>,
    ) {
        let geometry = self.geometry;
        let ([_, width], [height_out, width_out]) = (geometry.input, geometry.output);
        for start in (0..height_out).step_by(self.rows) {
            let outputs = start..(start + self.rows).min(height_out);
            let rows = geometry.input_rows(&outputs);
            let written = outputs.start * width_out..outputs.end * width_out;
            let places = places.as_deref_mut();
            Arch::new().dispatch(Band {
                windows: self,
                input: E::read(
                    &input[rows.start * width..rows.end * width],
                    &mut scratch.converted,
                ),
                first: rows.start,
                outputs,
                lines: &mut scratch.lines,
                values: &mut scratch.values,
                places: &mut scratch.places,
                bytes: places.map(|places| &mut places[written.clone()]),
            });
            write(&scratch.values[..written.len()], &mut output[written]);
        }
    }

    /// Takes a row of the input apart.
    #[inline(always)]
    fn take_apart(&self, row: &[T], lines: &mut [T]) {
        match (self.geometry.stride[1], self.phases.as_slice()) {
            (1, [all]) => copy(&row[..all.held.len()], &mut lines[all.held.clone()]),
            (2, [even, odd]) => self.take_pairs_apart(row, [even, odd], lines),
            (stride, phases) => {
                for (phase, line) in phases.iter().zip(lines.chunks_exact_mut(self.pitch)) {
                    let values = row.iter().skip(phase.first).step_by(stride);
                    for (target, value) in line[phase.held.clone()].iter_mut().zip(values) {
                        *target = *value;
                    }
                }
            }
        }
    }

    /// As [`take_apart`](Self::take_apart), with stride 2.
    #[inline(always)]
    fn take_pairs_apart(&self, row: &[T], [even, odd]: [&Phase; 2], lines: &mut [T]) {
        let (start, end) = (even.held.start, odd.held.end);
        let pairs = end - start;
        // Behind an odd padding, a value of the odd line comes before the first pair; and one of the
        // even line may be left over.
        if odd.held.start < start {
            lines[self.pitch + odd.held.start] = row[odd.first];
        }
        if end < even.held.end {
            lines[end] = row[even.first + 2 * pairs];
        }
        if pairs < CHUNK {
            for pair in 0..pairs {
                lines[start + pair] = row[even.first + 2 * pair];
                lines[self.pitch + start + pair] = row[even.first + 2 * pair + 1];
            }
            return;
        }
        for pair in (0..pairs).step_by(CHUNK) {
            // The rest, with the end of what is there already.
            let pair = pair.min(pairs - CHUNK);
            let values = split(row, even.first + 2 * pair);
            Chunk::store(values, lines, start + pair, self.pitch);
        }
    }
}

/// A place as it is carried beside the values: those in the windows are less than [`PLACES`].
#[inline(always)]
fn to_index<T: Real>(place: usize) -> T::Index {
    T::Index::from(place as u8)
}

/// A band of output rows of one plane.
struct Band<'a, T: Real> {
    windows: &'a Windows<'a, T>,
    /// The input's rows from `first` on, as many as the band's windows meet.
    input: &'a [T],
    first: usize,
    outputs: Range<usize>,
    lines: &'a mut [T],
    values: &'a mut [T],
    places: &'a mut [T::Index],
    /// Where the places go, if they are wanted.
    bytes: Option<&'a mut [MaybeUninit<u8>]>,
}

/// What the windows of a row of outputs meet.
struct Row {
    /// Where the first of the windows' rows is in the lines.
    source: usize,
    /// Rows of the windows that are not padding.
    rows: usize,
    /// The first of their places.
    place: usize,
    /// Where the row of outputs starts in the band's.
    target: usize,
}

impl<T: Real> WithSimd for Band<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let windows = self.windows;
        let [_, width] = windows.geometry.input;
        if width > 0 {
            let rows = self.input.chunks_exact(width);
            for (row, lines) in rows.zip(self.lines.chunks_exact_mut(windows.row_len())) {
                windows.take_apart(row, lines);
            }
        }
        if self.bytes.is_some() {
            self.pool::<S, true>(simd);
        } else {
            self.pool::<S, false>(simd);
        }
        if let Some(bytes) = self.bytes {
            for (byte, place) in bytes.iter_mut().zip(self.places.iter()) {
                *byte = MaybeUninit::new(T::low_byte(*place));
            }
        }
    }
}

impl<T: Real> Band<'_, T> {
    /// The band's values and, if they are `PLACED`, their places.
    #[inline(always)]
    fn pool<S: Simd, const PLACED: bool>(&mut self, simd: S) {
        let lanes = size_of::<T::Vector<S>>() / size_of::<T>();
        let vectors = self.windows.geometry.output[1].div_ceil(lanes);
        for output in self.outputs.clone() {
            let row = self.row(output);
            let mut vector = 0;
            while vector + 4 <= vectors {
                self.block::<S, 4, PLACED>(simd, &row, vector * lanes);
                vector += 4;
            }
            if vector + 2 <= vectors {
                self.block::<S, 2, PLACED>(simd, &row, vector * lanes);
                vector += 2;
            }
            if vector < vectors {
                self.block::<S, 1, PLACED>(simd, &row, vector * lanes);
            }
        }
    }

    #[inline(always)]
    fn row(&self, output: usize) -> Row {
        let geometry = self.windows.geometry;
        let taps = geometry.meeting(0, output);
        let target = (output - self.outputs.start) * geometry.output[1];
        if taps.is_empty() {
            return Row {
                source: 0,
                rows: 0,
                place: 0,
                target,
            };
        }
        let padded = output * geometry.stride[0] + taps.start * geometry.dilation[0];
        let row = padded - geometry.padding[0];
        Row {
            source: (row - self.first) * self.windows.row_len(),
            rows: taps.len(),
            place: taps.start * geometry.kernel[1],
            target,
        }
    }

    /// `N` vectors of outputs of one row, from a column on. What this writes beyond the row, the next one
    /// overwrites.
    #[inline(always)]
    #[allow(unsafe_code)]
    fn block<S: Simd, const N: usize, const PLACED: bool>(
        &mut self,
        simd: S,
        row: &Row,
        column: usize,
    ) {
        let windows = self.windows;
        let lines: &[T] = self.lines;
        let mut best = [T::splat(simd, T::from_f64(f64::NEG_INFINITY)); N];
        let start = T::splat_index(simd, to_index::<T>(row.place));
        let mut places = [start; N];
        if PLACED {
            // SAFETY: `Indices` is a vector of `Index`.
            let first: [T::Indices<S>; N] = unsafe { load(&windows.first, column) };
            for n in 0..N {
                places[n] = T::add_index(simd, start, first[n]);
            }
        }
        for window_row in 0..row.rows {
            let source = row.source + window_row * windows.step + column;
            let row_place = row.place + window_row * windows.geometry.kernel[1];
            for (tap, offset) in windows.columns.iter().enumerate() {
                let place = T::splat_index(simd, to_index::<T>(row_place + tap));
                // SAFETY: `Vector` is a vector of `T`.
                let values: [T::Vector<S>; N] = unsafe { load(lines, source + offset) };
                for n in 0..N {
                    let wins = T::exceeds(simd, values[n], best[n]);
                    best[n] = T::select(simd, wins, values[n], best[n]);
                    if PLACED {
                        places[n] = T::select_index(simd, wins, place, places[n]);
                    }
                }
            }
        }
        let target = row.target + column;
        // SAFETY: `Vector` is a vector of `T`, and `Indices` is one of `Index`.
        unsafe {
            store(best, self.values, target);
            if PLACED {
                store(places, self.places, target);
            }
        }
    }
}

/// `N` vectors of values from `at` on.
///
/// # Safety
///
/// A `V` must be some `U`s, one after the other, and nothing else.
///
/// # Panics
///
/// Panics if the values do not hold the vectors.
#[inline(always)]
#[allow(unsafe_code)]
unsafe fn load<U, V: Copy, const N: usize>(values: &[U], at: usize) -> [V; N] {
    let lanes = size_of::<V>() / size_of::<U>();
    assert!(at + N * lanes <= values.len());
    std::array::from_fn(
        #[inline(always)]
        |n| {
            // SAFETY: the last of the vectors ends within the slice, as was just checked, and is read
            // unaligned; `lanes` values are a vector, as the caller promises.
            unsafe {
                let from = values.as_ptr().add(at + n * lanes);
                from.cast::<V>().read_unaligned()
            }
        },
    )
}

/// Puts vectors to the values from `at` on.
///
/// # Safety
///
/// A `V` must be some `U`s, one after the other, and nothing else.
///
/// # Panics
///
/// Panics if the values do not hold the vectors.
#[inline(always)]
#[allow(unsafe_code)]
unsafe fn store<U, V: Copy, const N: usize>(vectors: [V; N], values: &mut [U], at: usize) {
    let lanes = size_of::<V>() / size_of::<U>();
    assert!(at + N * lanes <= values.len());
    for n in 0..N {
        // SAFETY: the last of the vectors ends within the slice, as was just checked, and is written
        // unaligned; `lanes` values are a vector, as the caller promises.
        unsafe {
            let to = values.as_mut_ptr().add(at + n * lanes);
            to.cast::<V>().write_unaligned(vectors[n]);
        }
    }
}

/// Where gradients go.
pub(crate) struct Routes {
    geometry: PoolGeometry,
    /// For each place.
    taps: [Tap; PLACES],
    /// Whether windows of 2x2 values lie side by side from the first value on.
    is_tiled: bool,
    /// Output rows of a band.
    rows: usize,
}

/// Where a place is within its window.
#[derive(Clone, Copy)]
struct Tap {
    row: usize,
    column: usize,
}

/// Buffers of one thread.
#[derive(Default)]
struct GradScratch<T> {
    /// The gradient of a band of input rows.
    sums: Vec<T>,
    converted: Vec<T>,
}

impl Routes {
    pub(crate) fn new<T: Real>(geometry: &PoolGeometry) -> Self {
        let [rows, columns] = geometry.kernel;
        let taps = std::array::from_fn(|place| match place < rows * columns {
            true => Tap {
                row: place / columns * geometry.dilation[0],
                column: place % columns * geometry.dilation[1],
            },
            // Behind any input.
            false => Tap {
                row: MOST,
                column: MOST,
            },
        });
        let is_tiled = geometry.kernel == [2, 2]
            && geometry.stride == [2, 2]
            && geometry.padding == [0, 0]
            && geometry.dilation == [1, 1];
        Self {
            geometry: *geometry,
            taps,
            is_tiled,
            rows: geometry.band(geometry.input[1] * size_of::<T>()),
        }
    }

    /// Writes all of one plane's gradient.
    fn input_grad<E: Element>(
        &self,
        output_grad: &[E],
        places: &[u8],
        input_grad: &mut [MaybeUninit<E>],
        scratch: &mut GradScratch<E::Real>,
    ) {
        if self.is_tiled {
            self.lay_tiles(output_grad, places, input_grad, scratch);
        } else {
            self.add_up(output_grad, places, input_grad, scratch);
        }
    }

    /// The gradient of any windows: a band's outputs are added up, and the rows that no later window
    /// meets are written.
    fn add_up<E: Element>(
        &self,
        output_grad: &[E],
        places: &[u8],
        input_grad: &mut [MaybeUninit<E>],
        scratch: &mut GradScratch<E::Real>,
    ) {
        let geometry = &self.geometry;
        let ([height, width], [height_out, width_out]) = (geometry.input, geometry.output);
        let GradScratch { sums, converted } = scratch;
        sums.clear();
        // The first row of the sums.
        let mut held = 0;
        let mut start = 0;
        loop {
            let outputs = start..(start + self.rows).min(height_out);
            let next = outputs.end;
            let done = match next < height_out {
                true => geometry.input_rows(&(next..height_out)).start,
                false => height,
            };
            let met = geometry.input_rows(&outputs).end.max(done);
            sums.resize((met - held) * width, E::Real::ZERO);
            let read = outputs.start * width_out..outputs.end * width_out;
            let grads = E::read(&output_grad[read.clone()], converted);
            self.add_band(outputs, grads, &places[read], held, sums);
            let finished = (done - held) * width;
            write(
                &sums[..finished],
                &mut input_grad[held * width..done * width],
            );
            sums.drain(..finished);
            if next == height_out {
                return;
            }
            (held, start) = (done, next);
        }
    }

    /// The gradient of some `positions` of one plane. The windows must be [regular](PoolGeometry::is_regular).
    pub(crate) fn lay<E: Element>(
        &self,
        output_grad: &[E],
        places: &[u8],
        positions: Range<usize>,
        line: &mut [E::Real],
        converted: &mut Vec<E::Real>,
    ) {
        let geometry = &self.geometry;
        let ([_, width], [height_out, width_out]) = (geometry.input, geometry.output);
        if width_out == 0 || positions.is_empty() {
            return line.fill(E::Real::ZERO);
        }
        let rows = positions.start / width..positions.end.div_ceil(width);
        let whole_rows = rows.start * width == positions.start && rows.end * width == positions.end;
        // The outputs whose windows meet the rows.
        let [stride, _] = geometry.stride;
        let [padding, _] = geometry.padding;
        let first = (rows.start + padding + 1).saturating_sub(geometry.extent(0));
        let behind = (rows.end - 1 + padding) / stride + 1;
        let outputs = first.div_ceil(stride).min(height_out)..behind.min(height_out);
        let read = outputs.start * width_out..outputs.end * width_out;
        let grads = E::read(&output_grad[read.clone()], converted);
        let places = &places[read];
        if self.is_tiled && whole_rows {
            Arch::new().dispatch(Sweep(
                #[inline(always)]
                || {
                    for (row, target) in rows.clone().zip(line.chunks_exact_mut(width)) {
                        // A last row or column may be in no window.
                        target[2 * width_out..].fill(E::Real::ZERO);
                        let Some(output) = (row / 2).checked_sub(outputs.start) else {
                            continue;
                        };
                        let of_row = output * width_out..(output + 1) * width_out;
                        match (row / 2 < outputs.end, row % 2) {
                            (false, _) => target.fill(E::Real::ZERO),
                            (true, 0) => {
                                lay_row::<_, 0>(&grads[of_row.clone()], &places[of_row], target);
                            }
                            (true, _) => {
                                lay_row::<_, 2>(&grads[of_row.clone()], &places[of_row], target);
                            }
                        }
                    }
                },
            ));
            return;
        }
        line.fill(E::Real::ZERO);
        let [_, column_stride] = geometry.stride;
        let [_, column_padding] = geometry.padding;
        let shift = padding * width + column_padding + positions.start;
        let all = grads
            .chunks_exact(width_out)
            .zip(places.chunks_exact(width_out));
        for (output, (grads, places)) in outputs.zip(all) {
            let row = output * stride * width;
            for (column, (grad, place)) in grads.iter().zip(places).enumerate() {
                let tap = self.taps[usize::from(*place)];
                if tap.row == MOST {
                    continue;
                }
                let position = row + column * column_stride + tap.row * width + tap.column;
                // What is before the line wraps.
                if let Some(sum) = line.get_mut(position.wrapping_sub(shift)) {
                    *sum += *grad;
                }
            }
        }
    }

    /// Adds gradients to the sums, whose first row is `held` of the input.
    fn add_band<T: Real>(
        &self,
        outputs: Range<usize>,
        grads: &[T],
        places: &[u8],
        held: usize,
        sums: &mut [T],
    ) {
        let ([height, width], [_, width_out]) = (self.geometry.input, self.geometry.output);
        let [stride, column_stride] = self.geometry.stride;
        let [padding, column_padding] = self.geometry.padding;
        for (index, output) in outputs.enumerate() {
            let start = output * stride;
            let of_row = index * width_out..(index + 1) * width_out;
            let grads = grads[of_row.clone()].iter();
            for (column, (grad, place)) in grads.zip(&places[of_row]).enumerate() {
                let tap = self.taps[usize::from(*place)];
                // What is in the padding wraps, and is behind the input as well.
                let row = start.wrapping_add(tap.row).wrapping_sub(padding);
                let column = (column * column_stride)
                    .wrapping_add(tap.column)
                    .wrapping_sub(column_padding);
                if row < height && column < width {
                    sums[(row - held) * width + column] += *grad;
                }
            }
        }
    }

    /// The gradient of windows of 2x2 values side by side: each value is written, be it a gradient or
    /// zero, without a look at what was there.
    fn lay_tiles<E: Element>(
        &self,
        output_grad: &[E],
        places: &[u8],
        input_grad: &mut [MaybeUninit<E>],
        scratch: &mut GradScratch<E::Real>,
    ) {
        let ([height, width], [height_out, width_out]) =
            (self.geometry.input, self.geometry.output);
        let GradScratch { sums, converted } = scratch;
        // A last tile may be cut off at the end of a row. What it writes there, the next row
        // overwrites; the last row's has a place of its own.
        sums.resize(2 * self.rows * width + 1, E::Real::ZERO);
        for start in (0..height_out).step_by(self.rows) {
            let outputs = start..(start + self.rows).min(height_out);
            let rows = 2 * outputs.start..(2 * outputs.end).min(height);
            let read = outputs.start * width_out..outputs.end * width_out;
            let grads = E::read(&output_grad[read.clone()], converted);
            let places = &places[read];
            Arch::new().dispatch(Sweep(
                #[inline(always)]
                || {
                    for row in 0..rows.len() {
                        let of_row = row / 2 * width_out..(row / 2 + 1) * width_out;
                        let (grads, places) = (&grads[of_row.clone()], &places[of_row]);
                        let target = &mut sums[row * width..];
                        match row % 2 {
                            0 => lay_row::<E::Real, 0>(grads, places, target),
                            _ => lay_row::<E::Real, 2>(grads, places, target),
                        }
                        // A last column may be in no window.
                        if 2 * width_out < width {
                            target[2 * width_out] = E::Real::ZERO;
                        }
                    }
                },
            ));
            let written = rows.start * width..rows.end * width;
            write(&sums[..written.len()], &mut input_grad[written]);
        }
        // As may a last row.
        for row in (2 * height_out).min(height)..height {
            sums[..width].fill(E::Real::ZERO);
            write(&sums[..width], &mut input_grad[row * width..][..width]);
        }
    }
}

/// A row of tiles of 2x2 values: those of the places `FIRST` and `FIRST + 1`.
#[inline(always)]
fn lay_row<T: Real, const FIRST: u8>(grads: &[T], places: &[u8], target: &mut [T]) {
    if grads.len() < CHUNK {
        for (index, (grad, place)) in grads.iter().zip(places).enumerate() {
            target[2 * index] = routed(*grad, *place, FIRST);
            target[2 * index + 1] = routed(*grad, *place, FIRST + 1);
        }
        return;
    }
    for start in (0..grads.len()).step_by(CHUNK) {
        // The rest, with the end of what is there already.
        let start = start.min(grads.len() - CHUNK);
        let (grads, places) = (&grads[start..][..CHUNK], &places[start..][..CHUNK]);
        let mut values = [T::ZERO; 2 * CHUNK];
        for lane in 0..2 * CHUNK {
            let column = (lane % 2) as u8;
            values[lane] = routed(grads[lane / 2], places[lane / 2], FIRST + column);
        }
        target[2 * start..][..2 * CHUNK].copy_from_slice(&values);
    }
}

/// What of a gradient goes to a place. As where gradients are added up, -0.0 becomes 0.0.
#[inline(always)]
fn routed<T: Real>(grad: T, to: u8, place: u8) -> T {
    if to == place { T::ZERO + grad } else { T::ZERO }
}
