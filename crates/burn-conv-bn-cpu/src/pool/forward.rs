//! The max pool, by bands of input rows.

// Blocks of registers are addressed by their place in the block.
#![allow(clippy::needless_range_loop)]

use std::mem::MaybeUninit;
use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::geometry::PoolGeometry;
use crate::blocks::split;
use crate::element::write_vectorized;
use crate::scratch::{ScratchPool, room};
use crate::simd::chunk::{CHUNK, Chunk, deinterleave};
use crate::simd::planes::WIDEST;
use crate::simd::sweeps::copy;
use crate::{Element, Real};

/// The largest value of each window: overwrites `output` with `[planes, output..]` of `[planes, input..]`,
/// and `argmax`, if given, with the position of each maximum in its window, `row * kernel[1] + column`,
/// which [`max_pool_backward`](crate::max_pool_backward) reads.
///
/// The values are those of Burn's Flex backend: of equal ones the first wins, a NaN wins against any
/// number and the last NaN against the others, and a window wholly in padding gives negative infinity.
/// The argmax of such a window is unspecified.
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
/// let (mut output, mut argmax) = (Vec::new(), Vec::new());
/// max_pool(&geometry, &input, &mut output, Some(&mut argmax));
/// assert_eq!(output, [4.0, 5.0]);
/// assert_eq!(argmax, [2, 0]);
/// # Ok::<(), burn_conv_bn_cpu::PoolGeometryError>(())
/// ```
pub fn max_pool<E: Element>(
    geometry: &PoolGeometry,
    input: &[E],
    output: &mut Vec<E>,
    argmax: Option<&mut Vec<u8>>,
) {
    assert_eq!(input.len(), geometry.input_len(), "input");
    let input = Given {
        values: input,
        plane: geometry.input_plane(),
    };
    pool_all(geometry, &input, output, argmax);
}

/// A max pool's input, plane by plane.
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
    mut argmax: Option<&mut Vec<u8>>,
) {
    let len = geometry.output_len();
    let values = room(output, len);
    let bytes = argmax.as_mut().map(|argmax| room(argmax, len));
    if len == 0 {
        return;
    }
    let planes = geometry.planes_per_task();
    let output_plane = geometry.output_plane();
    let tasks = geometry.planes.div_ceil(planes);
    let bytes = split(bytes, planes * output_plane, tasks);
    let windows = Windows::<E::Real>::new(geometry);
    let pool = ScratchPool::<(Scratch<E::Real>, P::Scratch)>::new();
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
    // SAFETY: there is room for `len` values in each. The tasks divide all of them into planes, the bands
    // hold every row of a plane's outputs, and `pool_plane` writes each band.
    unsafe {
        output.set_len(len);
        if let Some(argmax) = argmax {
            argmax.set_len(len);
        }
    }
}

/// Offsets of the windows' columns in a deinterleaved input row.
struct Windows<'a, T: Real> {
    geometry: &'a PoolGeometry,
    /// The remainders of a window's padded columns by the stride, each with a line.
    phases: Vec<Phase>,
    /// Distance of the lines.
    pitch: usize,
    /// Distance of a window's rows.
    step: usize,
    /// Offset of each column of the first output's window in a row's lines; the other outputs' follow.
    /// Columns behind the input for all outputs are left out, at the end.
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
    /// Their range in the line.
    held: Range<usize>,
}

/// Buffers of one thread.
#[derive(Default)]
struct Scratch<T: Real> {
    /// The deinterleaved input rows of a band. Padding stays negative infinity.
    lines: Vec<T>,
    /// The band's outputs, and some unspecified values behind the last.
    values: Vec<T>,
    /// Their argmax.
    argmax: Vec<T::Index>,
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
                // Not used if none is held.
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
            // Saturates only if at most one row of each window meets the input: a factor of 0.
            step: geometry.dilation[0].saturating_mul(row_len),
            columns: taps
                .iter()
                .map(|(line, shift)| line * pitch + shift)
                .collect(),
            first,
            rows: geometry.band(row_len * size_of::<T>()),
        }
    }

    /// Values of a deinterleaved input row.
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
        scratch.argmax.resize(outputs, to_index::<T>(0));
    }

    /// The outputs of a plane, and their argmax if requested.
    fn pool_plane<E: Element<Real = T>>(
        &self,
        input: &[E],
        output: &mut [MaybeUninit<E>],
        mut argmax: Option<&mut [MaybeUninit<u8>]>,
        scratch: &mut Scratch<T>,
    ) {
        let geometry = self.geometry;
        let ([_, width], [height_out, width_out]) = (geometry.input, geometry.output);
        for start in (0..height_out).step_by(self.rows) {
            let outputs = start..(start + self.rows).min(height_out);
            let rows = geometry.input_rows(&outputs);
            let written = outputs.start * width_out..outputs.end * width_out;
            let argmax = argmax.as_deref_mut();
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
                argmax: &mut scratch.argmax,
                bytes: argmax.map(|argmax| &mut argmax[written.clone()]),
            });
            write_vectorized(&scratch.values[..written.len()], &mut output[written]);
        }
    }

    /// Deinterleaves a row of the input.
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
            // Remainder: redo the last full chunk, overlapping what is written.
            let pair = pair.min(pairs - CHUNK);
            let values = deinterleave(row, even.first + 2 * pair);
            Chunk::store(values, lines, start + pair, self.pitch);
        }
    }
}

/// A tap of a window in a lane; smaller than [`MOST_TAPS`](super::geometry::MOST_TAPS).
#[inline(always)]
fn to_index<T: Real>(tap: usize) -> T::Index {
    T::Index::from(tap as u8)
}

/// A band of output rows of one plane.
struct Band<'a, T: Real> {
    windows: &'a Windows<'a, T>,
    /// The input rows of the band's windows, from `first` on.
    input: &'a [T],
    first: usize,
    outputs: Range<usize>,
    lines: &'a mut [T],
    values: &'a mut [T],
    argmax: &'a mut [T::Index],
    /// The argmax as bytes, if requested.
    bytes: Option<&'a mut [MaybeUninit<u8>]>,
}

/// The inputs of a row of outputs.
struct Row {
    /// Offset of the windows' first row in the lines.
    source: usize,
    /// Rows of the windows that are not padding.
    rows: usize,
    /// The first of their taps.
    tap: usize,
    /// Offset of the row of outputs in the band's.
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
            for (byte, index) in bytes.iter_mut().zip(self.argmax.iter()) {
                *byte = MaybeUninit::new(T::low_byte(*index));
            }
        }
    }
}

impl<T: Real> Band<'_, T> {
    /// The band's values and, with `ARGMAX`, their argmax.
    #[inline(always)]
    fn pool<S: Simd, const ARGMAX: bool>(&mut self, simd: S) {
        let lanes = size_of::<T::Vector<S>>() / size_of::<T>();
        let vectors = self.windows.geometry.output[1].div_ceil(lanes);
        for output in self.outputs.clone() {
            let row = self.row(output);
            let mut vector = 0;
            while vector + 4 <= vectors {
                self.block::<S, 4, ARGMAX>(simd, &row, vector * lanes);
                vector += 4;
            }
            if vector + 2 <= vectors {
                self.block::<S, 2, ARGMAX>(simd, &row, vector * lanes);
                vector += 2;
            }
            if vector < vectors {
                self.block::<S, 1, ARGMAX>(simd, &row, vector * lanes);
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
                tap: 0,
                target,
            };
        }
        let padded = output * geometry.stride[0] + taps.start * geometry.dilation[0];
        let row = padded - geometry.padding[0];
        Row {
            source: (row - self.first) * self.windows.row_len(),
            rows: taps.len(),
            tap: taps.start * geometry.kernel[1],
            target,
        }
    }

    /// `N` vectors of outputs of one row, from a column on. The next row overwrites values written behind
    /// this one.
    #[inline(always)]
    #[allow(unsafe_code)]
    fn block<S: Simd, const N: usize, const ARGMAX: bool>(
        &mut self,
        simd: S,
        row: &Row,
        column: usize,
    ) {
        let windows = self.windows;
        let lines: &[T] = self.lines;
        let mut best = [T::splat(simd, T::from_f64(f64::NEG_INFINITY)); N];
        let start = T::splat_index(simd, to_index::<T>(row.tap));
        let mut argmax = [start; N];
        if ARGMAX {
            // SAFETY: `Indices` is a vector of `Index`.
            let first: [T::Indices<S>; N] = unsafe { load(&windows.first, column) };
            for n in 0..N {
                argmax[n] = T::add_index(simd, start, first[n]);
            }
        }
        for window_row in 0..row.rows {
            let source = row.source + window_row * windows.step + column;
            let row_tap = row.tap + window_row * windows.geometry.kernel[1];
            for (tap, offset) in windows.columns.iter().enumerate() {
                let index = T::splat_index(simd, to_index::<T>(row_tap + tap));
                // SAFETY: `Vector` is a vector of `T`.
                let values: [T::Vector<S>; N] = unsafe { load(lines, source + offset) };
                for n in 0..N {
                    let wins = T::exceeds(simd, values[n], best[n]);
                    best[n] = T::select(simd, wins, values[n], best[n]);
                    if ARGMAX {
                        argmax[n] = T::select_index(simd, wins, index, argmax[n]);
                    }
                }
            }
        }
        let target = row.target + column;
        // SAFETY: `Vector` is a vector of `T`, and `Indices` is one of `Index`.
        unsafe {
            store(best, self.values, target);
            if ARGMAX {
                store(argmax, self.argmax, target);
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
