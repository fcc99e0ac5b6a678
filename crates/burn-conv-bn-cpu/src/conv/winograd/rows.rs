//! Transforms of the input's rows into planes, and of planes into rows of its gradient.

use std::mem::MaybeUninit;

use pulp::Arch;

use super::transforms::{E, N, STEP, input, input_transposed, sums};
use super::{Lines, Part, Scratch, Tile, Winograd};
use crate::blocks::Share;
use crate::simd::chunk::{CHUNK, Chunk, deinterleave, interleave};
use crate::simd::sweeps::{Sweep, zero};
use crate::{Element, Real};

impl<T: Real> Winograd<'_, T> {
    /// Columns, rounded up to whole chunks.
    pub(super) fn padded_columns(&self) -> usize {
        self.columns.next_multiple_of(CHUNK)
    }

    /// Distance of the lines of [`store_rows`](Self::store_rows), with a chunk of zeros on either side of
    /// each.
    pub(super) fn store_pitch(&self) -> usize {
        self.padded_columns() + 2 * CHUNK
    }

    /// Even and odd values of two rows.
    pub(super) fn phases_len(&self) -> usize {
        2 * STEP * self.store_pitch()
    }

    /// Values of a row of the input with its padding, and zeros up to whole chunks.
    fn padded_pitch(&self) -> usize {
        let [_, _, (before, _)] = self.geometry.padding;
        (STEP * self.store_pitch()).max(before + self.geometry.input[2])
    }

    /// One padded row of the input, transformed along the columns: `E` lines of `rows`.
    #[inline(always)]
    fn load_row(&self, padded: &[T], phases: &mut [T], rows: &mut [T]) {
        let columns = self.padded_columns();
        // By way of memory: the compiler does not vectorize deinterleaving and sums in one expression.
        let pitch = columns + CHUNK;
        for start in (0..pitch).step_by(CHUNK) {
            Chunk::store(deinterleave(padded, STEP * start), phases, start, pitch);
        }
        for start in (0..columns).step_by(CHUNK) {
            let [x0, x1] = Chunk::load(phases, start, pitch);
            let [x2, x3] = Chunk::load(phases, start + 1, pitch);
            Chunk::store(input([x0, x1, x2, x3]), rows, start, columns);
        }
    }

    /// The part of [`Algorithm::load`](crate::conv::tile::Algorithm::load) for one channel and one image.
    #[inline(always)]
    pub(super) fn load_part<F: Element<Real = T>>(
        &self,
        source: &[F],
        part: &Part,
        channel: usize,
        planes: &mut [T],
        lines: &mut Lines<T>,
    ) {
        let [_, height, width] = self.geometry.input;
        let columns = self.padded_columns();
        let pitch = E * columns;
        let padded = self.padded_pitch();
        let [_, (above, _), (left, _)] = self.geometry.padding;
        let count = (part.rows.len() - 1) * STEP + N;
        // All rows first, one after the other: many cache lines are in flight at a time.
        for (line, padded) in lines
            .padded
            .chunks_exact_mut(padded)
            .take(count)
            .enumerate()
        {
            let target = &mut padded[left..][..width];
            match (part.rows.start * STEP + line).checked_sub(above) {
                Some(at) if at < height => F::load(&source[at * width..][..width], target),
                _ => zero(target),
            }
        }
        let rows = lines.rows.chunks_exact_mut(pitch);
        for (padded, rows) in lines.padded.chunks_exact(padded).take(count).zip(rows) {
            self.load_row(padded, &mut lines.phases, rows);
        }
        let first = channel * self.plane + part.position;
        for row in 0..part.rows.len() {
            for column in 0..E {
                let source = row * STEP * pitch + column * columns;
                let target = first + row * self.columns + column * self.input_product;
                for start in (0..columns).step_by(CHUNK) {
                    let values = Chunk::load::<N>(&lines.rows, source + start, pitch);
                    // The next row overwrites values written behind this one.
                    let products = input(values);
                    Chunk::store(products, planes, target + start, E * self.input_product);
                }
            }
        }
    }

    /// Writes what a tile completes of the input's gradient.
    pub(super) fn store_tile<F: Element<Real = T>>(
        &self,
        scratch: &mut Scratch<T>,
        group: usize,
        tile: &Tile,
        grad: &mut Share<'_, MaybeUninit<F>>,
    ) {
        let (channels, plane) = (self.geometry.group_in(), self.geometry.input_plane());
        self.reserve(&mut scratch.lines);
        // Before each line stands a zero, which `store_rows` reads and does not write; `load_part`
        // lays other lines out in this buffer.
        let lines = STEP * E * self.store_pitch();
        scratch.lines.rows[..lines].fill(T::ZERO);
        Arch::new().dispatch(Sweep(
            #[inline(always)]
            || {
                for part in &tile.parts {
                    let image = part.image * self.geometry.input_len();
                    let last = part.rows.end + usize::from(part.rows.end == self.rows);
                    for channel in 0..channels {
                        let start = image + (group * channels + channel) * plane;
                        let (grad, first) = grad.channel(start);
                        for row in part.rows.start..last {
                            let position = part.position + (row - part.rows.start) * self.columns;
                            let position = position + channel * self.plane;
                            let (planes, lines) = (&scratch.input_grad, &mut scratch.lines);
                            self.store_rows(planes, row, position, (grad, first), lines);
                        }
                    }
                }
            },
        ));
    }

    /// Writes the rows of the input's gradient that a row of pairs begins: the inputs of `row` and of the
    /// one before. `planes` has the row at `position`, less than a row after the one before. The gradient is that of
    /// a channel from its value `first` on.
    #[inline(always)]
    fn store_rows<F: Element<Real = T>>(
        &self,
        planes: &[T],
        row: usize,
        position: usize,
        (grad, first): (&mut [MaybeUninit<F>], usize),
        lines: &mut Lines<T>,
    ) {
        let columns = self.padded_columns();
        let pitch = self.store_pitch();
        let product = E * self.input_product;
        for column in 0..E {
            let line = column * pitch + CHUNK;
            let from = position + column * self.input_product;
            for start in (0..columns).step_by(CHUNK) {
                let this = if row < self.rows {
                    Chunk::load::<E>(planes, from + self.columns + start, product)
                } else {
                    [Chunk::ZERO; E]
                };
                let before = if row > 0 {
                    Chunk::load::<E>(planes, from + start, product)
                } else {
                    [Chunk::ZERO; E]
                };
                let this = input_transposed(this);
                let before = input_transposed(before);
                let (lines, at) = (&mut lines.rows, line + start);
                Chunk::store(sums(this, before), lines, at, E * pitch);
            }
            for n in 0..STEP {
                let line = line + n * E * pitch;
                zero(&mut lines.rows[line + self.columns..line + columns + CHUNK]);
            }
        }
        let [_, height, width] = self.geometry.input;
        let [_, (above, _), (left, _)] = self.geometry.padding;
        for n in 0..STEP {
            let Some(at) = (row * STEP + n)
                .checked_sub(above)
                .filter(|at| *at < height)
            else {
                continue;
            };
            let line = n * E * pitch + CHUNK;
            for start in (0..columns + CHUNK).step_by(CHUNK) {
                let this = Chunk::load::<E>(&lines.rows, line + start, pitch);
                let before = Chunk::load::<E>(&lines.rows, line + start - 1, pitch);
                let this = input_transposed(this);
                let before = input_transposed(before);
                Chunk::store(sums(this, before), &mut lines.phases, start, pitch);
            }
            interleave(&lines.phases, pitch, &mut lines.padded[..left + width]);
            F::write(
                &lines.padded[left..][..width],
                &mut grad[at * width - first..][..width],
            );
        }
    }

    pub(super) fn reserve(&self, lines: &mut Lines<T>) {
        let len = self.store_pitch();
        let most_rows = (self.tile.min(self.rows) - 1) * STEP + N;
        lines.rows.resize(most_rows * E * len, T::ZERO);
        lines
            .padded
            .resize(most_rows * self.padded_pitch(), T::ZERO);
        lines.phases.resize(self.phases_len(), T::ZERO);
    }
}
