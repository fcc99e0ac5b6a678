//! Transforms of the input's rows into planes, and of planes into rows of its gradient.

use std::mem::MaybeUninit;

use pulp::Arch;

use super::transforms::{E, N, STEP, input, input_transposed, sums};
use super::window::Part;
use super::{Lines, Scratch, Tile, Winograd};
use crate::blocks::Share;
use crate::simd::chunk::{CHUNK, Chunk, deinterleave, interleave, join_blocks, split_blocks};
use crate::simd::sweeps::{Sweep, zero};
use crate::{Element, Real};

/// A row of pairs, in each product's plane.
#[derive(Clone, Copy)]
struct Line<'a, T> {
    planes: &'a [T],
    start: usize,
    /// Distance of the products.
    product: usize,
}

impl<T: Real> Line<'_, T> {
    /// Values of a column of products, from `start` on.
    #[inline(always)]
    fn load(&self, column: usize, start: usize) -> [Chunk<T>; E] {
        let at = self.start + column * self.product + start;
        Chunk::load(self.planes, at, E * self.product)
    }
}

impl<T: Real> Winograd<'_, T> {
    /// Columns, rounded up to whole chunks.
    pub(super) fn padded_columns(&self) -> usize {
        self.shape.columns.next_multiple_of(CHUNK)
    }

    /// Zeros on either side of a line: the columns' dilation in whole chunks.
    fn margin(&self) -> usize {
        self.geometry.dilation[2].next_multiple_of(CHUNK)
    }

    /// Distance of the lines of [`store_rows`](Self::store_rows), with zeros on either side of each.
    pub(super) fn store_pitch(&self) -> usize {
        self.padded_columns() + 2 * self.margin()
    }

    /// Distance of the even and the odd values of a row to be transformed.
    pub(super) fn phases_pitch(&self) -> usize {
        self.padded_columns() + self.margin()
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

    /// Splits a padded row into the first and the second values of its pairs.
    #[inline(always)]
    pub(super) fn split_row(&self, padded: &[T], phases: &mut [T]) {
        let pitch = self.phases_pitch();
        match self.geometry.dilation[2] {
            1 => {
                for start in (0..pitch).step_by(CHUNK) {
                    Chunk::store(deinterleave(padded, STEP * start), phases, start, pitch);
                }
            }
            len => split_blocks(padded, len, phases, pitch),
        }
    }

    /// A row from the first and the second values of its pairs, which are `pitch` behind.
    #[inline(always)]
    pub(super) fn join_row(&self, phases: &[T], pitch: usize, row: &mut [T]) {
        match self.geometry.dilation[2] {
            1 => interleave(phases, pitch, row),
            len => join_blocks(phases, pitch, len, row),
        }
    }

    /// Splits a row of the output's gradient, the first or the second of a pair.
    #[inline(always)]
    pub(super) fn split_line(&self, line: &[T], row: usize, lines: &mut Lines<T>) {
        let (padded, _) = lines.padded.split_at_mut(self.padded_pitch());
        padded[..line.len()].copy_from_slice(line);
        zero(&mut padded[line.len()..]);
        let at = row * STEP * self.phases_pitch();
        self.split_row(padded, &mut lines.phases[at..]);
    }

    /// Line of the first row of a pair. In a strip, the pairs' first rows lie before the second ones.
    pub(super) fn line(&self, row: usize) -> usize {
        row + row / self.geometry.dilation[1] * self.geometry.dilation[1]
    }

    /// One padded row of the input, transformed along the columns: `E` lines of `rows`.
    #[inline(always)]
    fn load_row(&self, padded: &[T], phases: &mut [T], rows: &mut [T]) {
        let (columns, pitch) = (self.padded_columns(), self.phases_pitch());
        let across = self.geometry.dilation[2];
        // By way of memory: the compiler does not vectorize deinterleaving and sums in one expression.
        self.split_row(padded, phases);
        for start in (0..columns).step_by(CHUNK) {
            let [x0, x1] = Chunk::load(phases, start, pitch);
            let [x2, x3] = Chunk::load(phases, start + across, pitch);
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
        let down = self.geometry.dilation[1];
        let count = self.lines(part.strips.len());
        // All rows first, one after the other: many cache lines are in flight at a time.
        for (line, padded) in lines
            .padded
            .chunks_exact_mut(padded)
            .take(count)
            .enumerate()
        {
            let target = &mut padded[left..][..width];
            match (part.strips.start * STEP * down + line).checked_sub(above) {
                Some(at) if at < height => F::load(&source[at * width..][..width], target),
                _ => zero(target),
            }
        }
        let rows = lines.rows.chunks_exact_mut(pitch);
        for (padded, rows) in lines.padded.chunks_exact(padded).take(count).zip(rows) {
            self.load_row(padded, &mut lines.phases, rows);
        }
        let first = channel * self.plane + part.position;
        for row in 0..part.strips.len() * down {
            for column in 0..E {
                let source = self.line(row) * pitch + column * columns;
                let target = first + row * self.shape.columns + column * self.input_product;
                for start in (0..columns).step_by(CHUNK) {
                    let values = Chunk::load::<N>(&lines.rows, source + start, down * pitch);
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
        let [depth, height, _] = self.geometry.input;
        self.reserve(&mut scratch.lines);
        // Before each line stands a zero, which `store_rows` reads and does not write; `load_part`
        // lays other lines out in this buffer.
        let lines = STEP * E * self.store_pitch();
        scratch.lines.rows[..lines].fill(T::ZERO);
        Arch::new().dispatch(Sweep(
            #[inline(always)]
            || {
                for part in &tile.inputs {
                    let image = part.image * self.geometry.input_len();
                    let slice = part.slice.checked_sub(self.geometry.padding[0].0);
                    let Some(slice) = slice.filter(|slice| *slice < depth) else {
                        continue;
                    };
                    let last = part.strips.end + usize::from(part.strips.end == self.shape.strips);
                    for channel in 0..channels {
                        let start = image + (group * channels + channel) * plane;
                        let (grad, first) = grad.channel(start);
                        for strip in part.strips.start..last {
                            let position = (strip - part.strips.start) * self.shape.strip;
                            let position = channel * self.grad_plane + part.position + position;
                            for row in 0..self.geometry.dilation[1] {
                                let position = position + row * self.shape.columns;
                                let lines = &mut scratch.lines;
                                let at = (slice * height, strip, row);
                                let own = Line {
                                    planes: &scratch.input_grad,
                                    start: position + self.shape.strip,
                                    product: self.grad_product,
                                };
                                let before = if self.shape.follows_course(strip) {
                                    let kept = self.kept_strip(part.slice, channel);
                                    Line {
                                        planes: &scratch.course_grad,
                                        start: kept + row * self.shape.columns,
                                        product: self.shape.strip,
                                    }
                                } else {
                                    let start = position;
                                    Line { start, ..own }
                                };
                                let grad = (&mut *grad, first);
                                self.store_rows([own, before], at, grad, lines);
                            }
                        }
                    }
                }
            },
        ));
    }

    /// Writes the rows of the input's gradient that a row of pairs begins. These are the inputs of the `row` of a strip
    /// and of the same row of the strip `before`. `slice_row` is the number of the slice's first row, `first` the
    /// channel's first value in the gradient.
    #[inline(always)]
    fn store_rows<F: Element<Real = T>>(
        &self,
        [this, before]: [Line<'_, T>; 2],
        (slice_row, strip, row): (usize, usize, usize),
        (grad, first): (&mut [MaybeUninit<F>], usize),
        lines: &mut Lines<T>,
    ) {
        let columns = self.padded_columns();
        let (pitch, margin) = (self.store_pitch(), self.margin());
        let [_, down, across] = self.geometry.dilation;
        for column in 0..E {
            let line = column * pitch + margin;
            for start in (0..columns).step_by(CHUNK) {
                let this = if strip < self.shape.strips {
                    this.load(column, start)
                } else {
                    [Chunk::ZERO; E]
                };
                let before = if strip > 0 {
                    before.load(column, start)
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
                zero(&mut lines.rows[line + self.shape.columns..line + columns + margin]);
            }
        }
        let [_, height, width] = self.geometry.input;
        let [_, (above, _), (left, _)] = self.geometry.padding;
        for n in 0..STEP {
            let Some(at) = ((strip * STEP + n) * down + row)
                .checked_sub(above)
                .filter(|at| *at < height)
            else {
                continue;
            };
            let line = n * E * pitch + margin;
            for start in (0..columns + margin).step_by(CHUNK) {
                let this = Chunk::load::<E>(&lines.rows, line + start, pitch);
                let before = Chunk::load::<E>(&lines.rows, line + start - across, pitch);
                let this = input_transposed(this);
                let before = input_transposed(before);
                Chunk::store(sums(this, before), &mut lines.phases, start, pitch);
            }
            self.join_row(&lines.phases, pitch, &mut lines.padded[..left + width]);
            F::write(
                &lines.padded[left..][..width],
                &mut grad[(slice_row + at) * width - first..][..width],
            );
        }
    }

    pub(super) fn reserve(&self, lines: &mut Lines<T>) {
        let [rows, padded, phases] = self.lines_len();
        lines.rows.resize(rows, T::ZERO);
        lines.padded.resize(padded, T::ZERO);
        lines.phases.resize(phases, T::ZERO);
    }

    /// Values of each of [`Lines`].
    pub(super) fn lines_len(&self) -> [usize; 3] {
        let count = self.lines(self.tile.min(self.shape.strips));
        let row = E * self.store_pitch();
        [count * row, count * self.padded_pitch(), self.phases_len()]
    }

    /// Rows of the input that some strips read.
    fn lines(&self, strips: usize) -> usize {
        (strips * STEP + N - STEP) * self.geometry.dilation[1]
    }
}
