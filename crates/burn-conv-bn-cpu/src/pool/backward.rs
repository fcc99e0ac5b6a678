//! The max pool's gradient: each output's is added at its argmax.

// Lanes are addressed by their place in the chunk.
#![allow(clippy::needless_range_loop)]

use std::mem::MaybeUninit;
use std::ops::Range;

use pulp::Arch;
use rayon::prelude::*;

use super::geometry::{MOST, MOST_TAPS, PoolGeometry};
use crate::element::write_vectorized;
use crate::scratch::{ScratchPool, room};
use crate::simd::chunk::CHUNK;
use crate::simd::sweeps::Sweep;
use crate::{Element, Real};

/// The gradient of [`max_pool`](crate::max_pool)'s input: `[planes, input..]` of the output's gradient
/// `[planes, output..]`; overwrites `input_grad`. Each gradient is added at the argmax of its window, and
/// the rest is zero.
///
/// A gradient whose argmax is outside its window, or outside the input, is dropped.
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
/// let (mut output, mut argmax) = (Vec::new(), Vec::new());
/// max_pool(&geometry, &[0.0f32, 1.0, 9.0, 2.0, 3.0], &mut output, Some(&mut argmax));
/// assert_eq!((output.as_slice(), argmax.as_slice()), (&[9.0, 9.0][..], &[2, 0][..]));
///
/// let mut input_grad = Vec::new();
/// max_pool_backward(&geometry, &[0.5, 0.25], &argmax, &mut input_grad);
/// assert_eq!(input_grad, [0.0, 0.0, 0.75, 0.0, 0.0]);
/// # Ok::<(), burn_conv_bn_cpu::PoolGeometryError>(())
/// ```
#[allow(unsafe_code)]
pub fn max_pool_backward<E: Element>(
    geometry: &PoolGeometry,
    output_grad: &[E],
    argmax: &[u8],
    input_grad: &mut Vec<E>,
) {
    assert_eq!(output_grad.len(), geometry.output_len(), "output gradient");
    assert_eq!(argmax.len(), geometry.output_len(), "argmax");
    let len = geometry.input_len();
    let grads = room(input_grad, len);
    if len == 0 {
        return;
    }
    let planes = geometry.planes_per_task();
    let (input_plane, output_plane) = (geometry.input_plane(), geometry.output_plane());
    let routes = Routes::new::<E::Real>(geometry);
    let pool = ScratchPool::<GradScratch<E::Real>>::new();
    grads
        .par_chunks_mut(planes * input_plane)
        .enumerate()
        .for_each(|(task, grads)| {
            pool.with(|scratch| {
                for (index, grad) in grads.chunks_exact_mut(input_plane).enumerate() {
                    let start = (task * planes + index) * output_plane;
                    let outputs = start..start + output_plane;
                    let (output_grad, argmax) = (&output_grad[outputs.clone()], &argmax[outputs]);
                    routes.input_grad(output_grad, argmax, grad, scratch);
                }
            });
        });
    // SAFETY: there is room for `len` values. The tasks divide all of them, and `input_grad` writes every row
    // of a task's planes.
    unsafe { input_grad.set_len(len) };
}

/// Offsets of the input gradient's values from their windows.
pub(crate) struct Routes {
    geometry: PoolGeometry,
    /// For each argmax.
    taps: [Tap; MOST_TAPS],
    /// Whether windows of 2x2 values tile the input from its first value on.
    is_tiled: bool,
    /// Output rows of a band.
    rows: usize,
}

/// Offset of a tap in its window.
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
        let taps = std::array::from_fn(|index| {
            if index < rows * columns {
                Tap {
                    row: index / columns * geometry.dilation[0],
                    column: index % columns * geometry.dilation[1],
                }
            } else {
                // Behind any input.
                Tap {
                    row: MOST,
                    column: MOST,
                }
            }
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

    /// Writes one plane's gradient.
    fn input_grad<E: Element>(
        &self,
        output_grad: &[E],
        argmax: &[u8],
        input_grad: &mut [MaybeUninit<E>],
        scratch: &mut GradScratch<E::Real>,
    ) {
        if self.is_tiled {
            self.lay_tiles(output_grad, argmax, input_grad, scratch);
        } else {
            self.add_up(output_grad, argmax, input_grad, scratch);
        }
    }

    /// The gradient of any windows: sums a band of outputs, then writes the rows that no later window
    /// overlaps.
    fn add_up<E: Element>(
        &self,
        output_grad: &[E],
        argmax: &[u8],
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
            let done = if next < height_out {
                geometry.input_rows(&(next..height_out)).start
            } else {
                height
            };
            let met = geometry.input_rows(&outputs).end.max(done);
            sums.resize((met - held) * width, E::Real::ZERO);
            let read = outputs.start * width_out..outputs.end * width_out;
            let grads = E::read(&output_grad[read.clone()], converted);
            self.add_band(outputs, grads, &argmax[read], held, sums);
            let finished = (done - held) * width;
            write_vectorized(
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

    /// The gradient of some `positions` of one plane, under [regular](PoolGeometry::is_regular) windows.
    pub(crate) fn lay<E: Element>(
        &self,
        output_grad: &[E],
        argmax: &[u8],
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
        let argmax = &argmax[read];
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
                                lay_row::<_, 0>(&grads[of_row.clone()], &argmax[of_row], target);
                            }
                            (true, _) => {
                                lay_row::<_, 2>(&grads[of_row.clone()], &argmax[of_row], target);
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
            .zip(argmax.chunks_exact(width_out));
        for (output, (grads, argmax)) in outputs.zip(all) {
            let row = output * stride * width;
            for (column, (grad, to)) in grads.iter().zip(argmax).enumerate() {
                let tap = self.taps[usize::from(*to)];
                if tap.row == MOST {
                    continue;
                }
                let position = row + column * column_stride + tap.row * width + tap.column;
                // A position before the line wraps.
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
        argmax: &[u8],
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
            for (column, (grad, to)) in grads.zip(&argmax[of_row]).enumerate() {
                let tap = self.taps[usize::from(*to)];
                // A position in the padding wraps, to one behind the input.
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

    /// The gradient of windows that tile the input: each value is written once, a gradient or zero.
    fn lay_tiles<E: Element>(
        &self,
        output_grad: &[E],
        argmax: &[u8],
        input_grad: &mut [MaybeUninit<E>],
        scratch: &mut GradScratch<E::Real>,
    ) {
        let ([height, width], [height_out, width_out]) =
            (self.geometry.input, self.geometry.output);
        let GradScratch { sums, converted } = scratch;
        // A last tile may be cut off at the end of a row. What it writes there, the next row
        // overwrites; the last row's has a value of its own.
        sums.resize(2 * self.rows * width + 1, E::Real::ZERO);
        for start in (0..height_out).step_by(self.rows) {
            let outputs = start..(start + self.rows).min(height_out);
            let rows = 2 * outputs.start..(2 * outputs.end).min(height);
            let read = outputs.start * width_out..outputs.end * width_out;
            let grads = E::read(&output_grad[read.clone()], converted);
            let argmax = &argmax[read];
            Arch::new().dispatch(Sweep(
                #[inline(always)]
                || {
                    for row in 0..rows.len() {
                        let of_row = row / 2 * width_out..(row / 2 + 1) * width_out;
                        let (grads, argmax) = (&grads[of_row.clone()], &argmax[of_row]);
                        let target = &mut sums[row * width..];
                        match row % 2 {
                            0 => lay_row::<E::Real, 0>(grads, argmax, target),
                            _ => lay_row::<E::Real, 2>(grads, argmax, target),
                        }
                        // A last column may be in no window.
                        if 2 * width_out < width {
                            target[2 * width_out] = E::Real::ZERO;
                        }
                    }
                },
            ));
            let written = rows.start * width..rows.end * width;
            write_vectorized(&sums[..written.len()], &mut input_grad[written]);
        }
        // A last row may be in no window.
        for row in (2 * height_out).min(height)..height {
            sums[..width].fill(E::Real::ZERO);
            write_vectorized(&sums[..width], &mut input_grad[row * width..][..width]);
        }
    }
}

/// A row of tiles of 2x2 values: those of the taps `FIRST` and `FIRST + 1`.
#[inline(always)]
fn lay_row<T: Real, const FIRST: u8>(grads: &[T], argmax: &[u8], target: &mut [T]) {
    if grads.len() < CHUNK {
        for (index, (grad, to)) in grads.iter().zip(argmax).enumerate() {
            target[2 * index] = routed(*grad, *to, FIRST);
            target[2 * index + 1] = routed(*grad, *to, FIRST + 1);
        }
        return;
    }
    for start in (0..grads.len()).step_by(CHUNK) {
        // Remainder: redo the last full chunk, overlapping what is written.
        let start = start.min(grads.len() - CHUNK);
        let (grads, argmax) = (&grads[start..][..CHUNK], &argmax[start..][..CHUNK]);
        let mut values = [T::ZERO; 2 * CHUNK];
        for lane in 0..2 * CHUNK {
            let column = (lane % 2) as u8;
            values[lane] = routed(grads[lane / 2], argmax[lane / 2], FIRST + column);
        }
        target[2 * start..][..2 * CHUNK].copy_from_slice(&values);
    }
}

/// The part of a gradient that a tap gets. As in a sum, -0.0 becomes 0.0.
#[inline(always)]
fn routed<T: Real>(grad: T, to: u8, tap: u8) -> T {
    if to == tap { T::ZERO + grad } else { T::ZERO }
}
