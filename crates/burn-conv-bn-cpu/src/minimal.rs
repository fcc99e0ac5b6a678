//! Kernels of 3x3 taps and stride 1 with fewer products: F(2x2, 3x3) of the literature.
//!
//! Two neighbouring outputs share most of what they meet. A bilinear algorithm (Winograd, Arithmetic
//! Complexity of Computations, 1980; Lavin and Gray, arXiv 1509.09308) adds inputs and taps up first
//! and needs 4 products instead of 6 for both. Nested in rows and columns that is 16 instead of 36 for
//! each 2x2 of outputs. It is written here as
//!
//! `y = A [(G w) * (B x)]`, with `*` element by element,
//!
//! and since that is a sum of products of three, the gradients are the same sum read otherwise:
//! `dw = G' [(A' dy) * (B x)]` and `dx = B' [(G w) * (A' dy)]`, at the same number of products.
//!
//! The matrices' elements are 0, 1, -1 and, in `G`, 1/2. With matrices like these the output and
//! the input's gradient come out nearer the exact result than a direct sum's, since fewer terms are
//! rounded, and the weight's gradient up to 1.5 times as far from it, as the test beside
//! [`Algorithm`] measures; larger tiles of outputs would save more and lose digits.
//!
//! For each of the products, the sum over channels is a matrix product, which the kernels for
//! shifted planes do, without any shift.

// Blocks of registers are addressed by their place in the block.
#![allow(clippy::needless_range_loop)]

use std::mem::MaybeUninit;
use std::ops::{Add, Neg, Range, Sub};

use pulp::Arch;
use rayon::prelude::*;

use crate::algorithm::{Algorithm, Piece};
use crate::buffer::{Aligned, room};
use crate::geometry::BLOCKS;
use crate::shifted::{
    CHANNELS, Filter, LINE, WIDEST, accumulate, correlate, plane_len, slack, taps_in_cache,
};
use crate::simd::{Sweep, zero};
use crate::{Element, Geometry, Real};

/// Bytes of scratch that a thread's tile aims at.
const TILE_BYTES: usize = 6 << 20;

/// Positions that a tile has room for in any case: the filters of 512 channels are 16 MiB, which come
/// from main memory for each tile, and have to meet enough there to be worth the way.
const LEAST_POSITIONS: usize = 128;

/// Most positions of a tile: a plane of that many values of 64 channels is half of a core's
/// second-level cache.
const MOST_POSITIONS: usize = 1024;

/// Kernels whose gradients a thread makes at a time.
const KERNELS: usize = 1024;

/// Values that are transformed at a time.
pub(crate) const CHUNK: usize = 8;

/// Inputs that a pair of outputs meets.
const N: usize = 4;

/// Products for a pair of outputs.
const E: usize = 4;

/// Inputs from one pair of outputs to the next.
const STEP: usize = 2;

/// `B x`.
#[inline(always)]
fn input<T: Real>([x0, x1, x2, x3]: [Chunk<T>; N]) -> [Chunk<T>; E] {
    [x0 - x2, x1 + x2, x2 - x1, x1 - x3]
}

/// `B' v`.
#[inline(always)]
fn input_transposed<T: Real>([v0, v1, v2, v3]: [Chunk<T>; E]) -> [Chunk<T>; N] {
    [v0, v1 - v2 + v3, v1 + v2 - v0, -v3]
}

/// `A m`.
#[inline(always)]
fn output<T: Real>([m0, m1, m2, m3]: [Chunk<T>; E]) -> [Chunk<T>; STEP] {
    [m0 + m1 + m2, m1 - m2 - m3]
}

/// `A' y`.
#[inline(always)]
fn output_transposed<T: Real>([y0, y1]: [Chunk<T>; STEP]) -> [Chunk<T>; E] {
    [y0, y0 + y1, y0 - y1, -y1]
}

/// One value of each of a block's channels.
type Lanes = [f64; CHANNELS];

#[inline(always)]
fn lanes(value: impl Fn(usize) -> f64) -> Lanes {
    std::array::from_fn(value)
}

/// `G w`.
#[inline(always)]
fn filter([w0, w1, w2]: [Lanes; 3]) -> [Lanes; E] {
    let sum = |sign: f64| lanes(|lane| (w0[lane] + w2[lane]) / 2.0 + sign * (w1[lane] / 2.0));
    [w0, sum(1.0), sum(-1.0), w2]
}

/// `G' u`.
fn filter_transposed([u0, u1, u2, u3]: [f64; E]) -> [f64; 3] {
    let (sum, difference) = ((u1 + u2) / 2.0, (u1 - u2) / 2.0);
    [u0 + sum, difference, sum + u3]
}

/// `G w G'` of some kernels.
#[inline(always)]
fn transformed<T: Real>(kernels: &[&[T; 9]; CHANNELS]) -> [[T; CHANNELS]; E * E] {
    let columns: [[Lanes; E]; 3] = std::array::from_fn(
        #[inline(always)]
        |column| {
            filter(std::array::from_fn(
                #[inline(always)]
                |row| lanes(|lane| kernels[lane][3 * row + column].to_f64()),
            ))
        },
    );
    let mut products = [[T::ZERO; CHANNELS]; E * E];
    for row in 0..E {
        let values = filter([columns[0][row], columns[1][row], columns[2][row]]);
        for column in 0..E {
            for lane in 0..CHANNELS {
                products[row * E + column][lane] = T::from_f64(values[column][lane]);
            }
        }
    }
    products
}

/// [`CHUNK`] neighbouring values.
#[derive(Clone, Copy)]
pub(crate) struct Chunk<T>([T; CHUNK]);

impl<T: Real> Chunk<T> {
    const ZERO: Self = Self([T::ZERO; CHUNK]);

    /// The values at `start` of `K` lines, `pitch` apart.
    #[inline(always)]
    #[allow(unsafe_code)]
    fn load<const K: usize>(values: &[T], start: usize, pitch: usize) -> [Self; K] {
        assert!(start + (K - 1) * pitch + CHUNK <= values.len());
        std::array::from_fn(
            #[inline(always)]
            |k| {
                // SAFETY: the last of the chunks ends within the slice, as was just checked; an
                // array is aligned as its values are.
                Self(unsafe {
                    values
                        .as_ptr()
                        .add(start + k * pitch)
                        .cast::<[T; CHUNK]>()
                        .read()
                })
            },
        )
    }

    /// Puts chunks to `start` of `K` lines, `pitch` apart.
    #[inline(always)]
    #[allow(unsafe_code)]
    pub(crate) fn store<const K: usize>(
        chunks: [Self; K],
        values: &mut [T],
        start: usize,
        pitch: usize,
    ) {
        assert!(start + (K - 1) * pitch + CHUNK <= values.len());
        for (k, chunk) in chunks.into_iter().enumerate() {
            // SAFETY: the last of the chunks ends within the slice, as was just checked; an array
            // is aligned as its values are.
            unsafe {
                let at = values.as_mut_ptr().add(start + k * pitch);
                at.cast::<[T; CHUNK]>().write(chunk.0);
            }
        }
    }

    /// As [`store`](Self::store), the first `len` values of each.
    #[inline(always)]
    fn store_part<const K: usize>(
        chunks: [Self; K],
        values: &mut [T],
        start: usize,
        pitch: usize,
        len: usize,
    ) {
        if len >= CHUNK {
            return Self::store(chunks, values, start, pitch);
        }
        for (k, chunk) in chunks.into_iter().enumerate() {
            copy_short(&chunk.0, &mut values[start + k * pitch..][..len]);
        }
    }
}

impl<T: Real> Add for Chunk<T> {
    type Output = Self;

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        Self(std::array::from_fn(
            #[inline(always)]
            |lane| self.0[lane] + other.0[lane],
        ))
    }
}

impl<T: Real> Sub for Chunk<T> {
    type Output = Self;

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        Self(std::array::from_fn(
            #[inline(always)]
            |lane| self.0[lane] - other.0[lane],
        ))
    }
}

impl<T: Real> Neg for Chunk<T> {
    type Output = Self;

    #[inline(always)]
    fn neg(self) -> Self {
        Self(std::array::from_fn(
            #[inline(always)]
            |lane| T::ZERO - self.0[lane],
        ))
    }
}

/// A convolution made ready. Its positions are pairs of rows by pairs of columns of the output.
pub(crate) struct Minimal<'a, T> {
    geometry: &'a Geometry,
    /// Pairs of output rows.
    rows: usize,
    /// Pairs of output columns.
    columns: usize,
    /// Rows of pairs of a tile.
    tile: usize,
    /// From one plane to the next.
    plane: usize,
    /// From one product's planes to the next product's, of the input and of the output.
    input_product: usize,
    output_product: usize,
    /// Where the input's, and the output's, channels start within a product's planes.
    inputs: Vec<usize>,
    outputs: Vec<usize>,
    /// For each group, and each of the `E * E` products.
    filters: Vec<Filter<T>>,
    /// The same for the input's gradient, if that is wanted.
    transposed: Vec<Filter<T>>,
}

/// Rows of pairs, of one image or of several.
#[derive(Debug)]
pub(crate) struct Tile {
    positions: usize,
    parts: Vec<Part>,
    pieces: Vec<Piece>,
}

/// Rows of pairs of one image.
#[derive(Debug)]
struct Part {
    image: usize,
    rows: Range<usize>,
    /// Where they start in the tile.
    position: usize,
}

#[derive(Default)]
pub(crate) struct Scratch<T> {
    /// `B x B'`: a plane for each product and channel.
    input: Aligned<T>,
    /// The products' sums, then `A' dy A`.
    output: Aligned<T>,
    /// The products of the input's gradient; a row of the preceding tile before those of this one.
    input_grad: Aligned<T>,
    lines: Lines<T>,
}

/// Some rows on their way.
#[derive(Default)]
struct Lines<T> {
    /// Rows of the input with their padding.
    padded: Aligned<T>,
    /// The even and the odd values of a row.
    phases: Aligned<T>,
    /// Rows transformed along the columns.
    rows: Aligned<T>,
}

impl<'a, T: Real> Minimal<'a, T> {
    /// `weight` is what is convolved with, and `input_weight` what the input's gradient goes
    /// through, each if that is wanted.
    pub(crate) fn new(
        geometry: &'a Geometry,
        weight: Option<&[T]>,
        input_weight: Option<&[T]>,
    ) -> Self {
        let filters = |weight: Option<&[T]>, transposed| {
            weight.map(|weight| Self::filters(geometry, weight, transposed))
        };
        let (group_in, group_out) = (geometry.group_in(), geometry.group_out());
        let [_, height, width] = geometry.output();
        let (rows, columns) = (height.div_ceil(2), width.div_ceil(2));
        let bytes = E * E * (2 * group_in + group_out) * size_of::<T>();
        // A row of the preceding tile, and what is written beyond the last position.
        let margin = columns + slack(group_in).max(slack(group_out));
        let positions = (TILE_BYTES / bytes)
            .saturating_sub(margin)
            .clamp(LEAST_POSITIONS, MOST_POSITIONS);
        // Small batches come in small blocks, for which large planes would stay empty.
        let block = rows * geometry.images_per_block(BLOCKS);
        let tile = (positions / columns).clamp(1, block);
        let plane = plane_len(margin + tile * columns);
        let starts = |channels: usize| (0..channels).map(|channel| channel * plane).collect();
        Self {
            geometry,
            rows,
            columns,
            tile,
            plane,
            input_product: product_len(group_in * plane),
            output_product: product_len(group_out * plane),
            inputs: starts(group_in),
            outputs: starts(group_out),
            filters: filters(weight, false).unwrap_or_default(),
            transposed: filters(input_weight, true).unwrap_or_default(),
        }
    }

    /// `G w G'` of each group, from input channels to output channels or, `transposed`, back.
    fn filters(geometry: &Geometry, weight: &[T], transposed: bool) -> Vec<Filter<T>> {
        let (group_in, group_out) = (geometry.group_in(), geometry.group_out());
        let (channels, taps, channel_step, tap_step) = match transposed {
            false => (group_out, group_in, group_in, 1),
            true => (group_in, group_out, 1, group_in),
        };
        let (kernels, _) = weight.as_chunks::<9>();
        kernels
            .chunks_exact(group_out * group_in)
            .flat_map(|kernels| {
                let block = taps_in_cache(taps, 1, 1);
                let arch = Arch::new();
                Filter::several(channels, taps, block, |tap, channels| {
                    let last = channels.end - 1;
                    let kernels: [&[T; 9]; CHANNELS] = std::array::from_fn(|lane| {
                        let channel = (channels.start + lane).min(last);
                        &kernels[channel * channel_step + tap * tap_step]
                    });
                    arch.dispatch(Sweep(
                        #[inline(always)]
                        || transformed(&kernels),
                    ))
                })
            })
            .collect()
    }

    /// Length of rows that are dealt with in whole chunks.
    fn padded_columns(&self) -> usize {
        self.columns.next_multiple_of(CHUNK)
    }

    /// From one line of [`store_rows`](Self::store_rows) to the next: a chunk of zeros stands on
    /// either side of each.
    fn store_pitch(&self) -> usize {
        self.padded_columns() + 2 * CHUNK
    }

    /// Even and odd values of two rows.
    fn phases_len(&self) -> usize {
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
        // By way of memory: what is taken apart and added up at once, the compiler does value by value.
        let pitch = columns + CHUNK;
        for start in (0..pitch).step_by(CHUNK) {
            Chunk::store(split(padded, STEP * start), phases, start, pitch);
        }
        for start in (0..columns).step_by(CHUNK) {
            let [x0, x1] = Chunk::load(phases, start, pitch);
            let [x2, x3] = Chunk::load(phases, start + 1, pitch);
            Chunk::store(input([x0, x1, x2, x3]), rows, start, columns);
        }
    }

    /// The part of [`Algorithm::load`] for one channel and one image.
    #[inline(always)]
    fn load_part<F: Element<Real = T>>(
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
        // All rows at first, one after the other, so that memory is asked for many lines at a time.
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
                    // What this writes beyond the row, the next one overwrites.
                    let products = input(values);
                    Chunk::store(products, planes, target + start, E * self.input_product);
                }
            }
        }
    }

    /// Writes the rows of the input's gradient that begin with a row of pairs: those that `row` and
    /// the one before it meet. `planes` has the row at `position`, less than a row after the one
    /// before it.
    #[inline(always)]
    fn store_rows<F: Element<Real = T>>(
        &self,
        planes: &[T],
        row: usize,
        position: usize,
        grad: &mut [MaybeUninit<F>],
        lines: &mut Lines<T>,
    ) {
        let columns = self.padded_columns();
        let pitch = self.store_pitch();
        let product = E * self.input_product;
        for column in 0..E {
            let line = column * pitch + CHUNK;
            let from = position + column * self.input_product;
            for start in (0..columns).step_by(CHUNK) {
                let this = match row < self.rows {
                    true => Chunk::load::<E>(planes, from + self.columns + start, product),
                    false => [Chunk::ZERO; E],
                };
                let before = match row > 0 {
                    true => Chunk::load::<E>(planes, from + start, product),
                    false => [Chunk::ZERO; E],
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
            join(&lines.phases, pitch, &mut lines.padded[..left + width]);
            F::write(
                &lines.padded[left..][..width],
                &mut grad[at * width..][..width],
            );
        }
    }

    fn reserve(&self, lines: &mut Lines<T>) {
        let len = self.store_pitch();
        let most_rows = (self.tile.min(self.rows) - 1) * STEP + N;
        lines.rows.resize(most_rows * E * len, T::ZERO);
        lines
            .padded
            .resize(most_rows * self.padded_pitch(), T::ZERO);
        lines.phases.resize(self.phases_len(), T::ZERO);
    }
}

/// A length from one product's planes to the next: the same position of each is in another place
/// of the first-level cache.
fn product_len(len: usize) -> usize {
    const PLACES: usize = 64;
    let lines = len.div_ceil(LINE);
    (lines + (PLACES + 3 - lines % PLACES) % PLACES) * LINE
}

/// As many values as both hold, fewer than two chunks.
#[inline(always)]
fn copy_short<T: Real>(source: &[T], target: &mut [T]) {
    match (
        source.first_chunk::<CHUNK>(),
        target.first_chunk_mut::<CHUNK>(),
    ) {
        (Some(first), Some(to)) => {
            *to = *first;
            for (target, source) in target.iter_mut().zip(source).skip(CHUNK) {
                *target = *source;
            }
        }
        _ => {
            for (target, source) in target.iter_mut().zip(source) {
                *target = *source;
            }
        }
    }
}

/// What a pair and the one before it contribute to the inputs from the pair's first one to the next
/// pair's first one.
#[inline(always)]
fn sums<T: Real>(this: [Chunk<T>; N], before: [Chunk<T>; N]) -> [Chunk<T>; STEP] {
    [this[0] + before[2], this[1] + before[3]]
}

/// Every `STEP`-th value, from each of the first `STEP` after `start` on.
#[inline(always)]
pub(crate) fn split<T: Real>(source: &[T], start: usize) -> [Chunk<T>; STEP] {
    let (groups, _) = source[start..][..STEP * CHUNK].as_chunks::<STEP>();
    let mut chunks = [Chunk::ZERO; STEP];
    for phase in 0..STEP {
        for lane in 0..CHUNK {
            chunks[phase].0[lane] = groups[lane][phase];
        }
    }
    chunks
}

/// A row from its even values and its odd ones, which lie `pitch` after them: the inverse of
/// [`split`], which compilers do well by whole rows.
#[inline(always)]
fn join<T: Real>(phases: &[T], pitch: usize, row: &mut [T]) {
    let (even, odd) = phases.split_at(pitch);
    let (pairs, rest) = row.as_chunks_mut::<STEP>();
    for ((pair, even), odd) in pairs.iter_mut().zip(even).zip(odd) {
        *pair = [*even, *odd];
    }
    if let ([last], Some(even)) = (rest, even.get(pairs.len())) {
        *last = *even;
    }
}

impl<F: Element> Algorithm<F> for Minimal<'_, F::Real> {
    type Tile = Tile;
    type Scratch = Scratch<F::Real>;

    fn geometry(&self) -> &Geometry {
        self.geometry
    }

    fn tiles(&self, images: usize) -> Vec<Tile> {
        let [_, height, width] = self.geometry.output();
        let all = images * self.rows;
        let count = all.div_ceil(self.tile);
        let step = all.div_ceil(count);
        let mut tiles = Vec::new();
        for start in (0..all).step_by(step) {
            let end = (start + step).min(all);
            let mut tile = Tile {
                positions: (end - start) * self.columns,
                parts: Vec::new(),
                pieces: Vec::new(),
            };
            for image in start / self.rows..end.div_ceil(self.rows) {
                let first = image * self.rows;
                let rows = start.max(first) - first..end.min(first + self.rows) - first;
                let lines = 2 * rows.start..(2 * rows.end).min(height);
                tile.pieces.push(Piece {
                    start: image * self.geometry.output_len() + lines.start * width,
                    len: lines.len() * width,
                });
                tile.parts.push(Part {
                    image,
                    position: (first + rows.start - start) * self.columns,
                    rows,
                });
            }
            tiles.push(tile);
        }
        tiles
    }

    fn pieces<'a>(&self, tile: &'a Tile) -> &'a [Piece] {
        &tile.pieces
    }

    fn load(&self, scratch: &mut Self::Scratch, input: &[F], group: usize, tile: &Tile) {
        let channels = self.geometry.group_in();
        let plane = self.geometry.input_plane();
        scratch
            .input
            .resize(E * E * self.input_product, F::Real::ZERO);
        self.reserve(&mut scratch.lines);
        scratch.lines.padded.fill(F::Real::ZERO);
        Arch::new().dispatch(Sweep(
            #[inline(always)]
            || {
                for part in &tile.parts {
                    let image = &input[part.image * self.geometry.input_len()..];
                    for channel in 0..channels {
                        let source = &image[(group * channels + channel) * plane..][..plane];
                        let (planes, lines) = (&mut scratch.input, &mut scratch.lines);
                        self.load_part(source, part, channel, planes, lines);
                    }
                }
                // The weight's gradient multiplies what follows the last position by zeros, and what
                // another tile left there need not be finite.
                for product in scratch.input.chunks_exact_mut(self.input_product) {
                    for start in &self.inputs {
                        zero(&mut product[start + tile.positions..][..WIDEST]);
                    }
                }
            },
        ));
    }

    fn convolve(&self, scratch: &mut Self::Scratch, group: usize, tile: &Tile) {
        let len = E * E * self.output_product;
        scratch.output.resize(len, F::Real::ZERO);
        let filters = &self.filters[group * E * E..][..E * E];
        for ((filter, source), target) in filters
            .iter()
            .zip(scratch.input.chunks_exact(self.input_product))
            .zip(scratch.output.chunks_exact_mut(self.output_product))
        {
            let inputs = &self.inputs;
            correlate(filter, source, inputs, target, self.plane, tile.positions);
        }
    }

    fn gather(
        &self,
        scratch: &mut Self::Scratch,
        tile: &Tile,
        piece: usize,
        channel: usize,
        line: &mut [F::Real],
    ) {
        let width = self.geometry.output[2];
        let part = &tile.parts[piece];
        let (planes, phases) = (&scratch.output, &mut scratch.lines.phases);
        let pitch = self.padded_columns();
        phases.resize(self.phases_len(), F::Real::ZERO);
        Arch::new().dispatch(Sweep(
            #[inline(always)]
            || {
                for (index, lines) in line.chunks_mut(2 * width).enumerate() {
                    let first = channel * self.plane + part.position + index * self.columns;
                    for start in (0..self.columns).step_by(CHUNK) {
                        let mut rows = [[Chunk::ZERO; E]; 2];
                        for column in 0..E {
                            let from = first + start + column * self.output_product;
                            let sums = Chunk::load::<E>(planes, from, E * self.output_product);
                            [rows[0][column], rows[1][column]] = output(sums);
                        }
                        for (row, sums) in rows.into_iter().enumerate() {
                            Chunk::store(output(sums), phases, row * STEP * pitch + start, pitch);
                        }
                    }
                    let phases = phases.chunks_exact(STEP * pitch);
                    for (line, phases) in lines.chunks_exact_mut(width).zip(phases) {
                        join(phases, pitch, line);
                    }
                }
            },
        ));
    }

    fn begin(&self, scratch: &mut Self::Scratch) {
        let len = E * E * self.output_product;
        scratch.output.resize(len, F::Real::ZERO);
    }

    fn scatter(
        &self,
        scratch: &mut Self::Scratch,
        tile: &Tile,
        piece: usize,
        channel: usize,
        line: &[F::Real],
    ) {
        let width = self.geometry.output[2];
        let part = &tile.parts[piece];
        let planes = &mut scratch.output;
        Arch::new().dispatch(Sweep(
            #[inline(always)]
            || {
                for (index, lines) in line.chunks(2 * width).enumerate() {
                    let first = channel * self.plane + part.position + index * self.columns;
                    for start in (0..self.columns).step_by(CHUNK) {
                        let mut rows = [[Chunk::ZERO; E]; 2];
                        for (line, row) in lines.chunks_exact(width).zip(&mut rows) {
                            let line = &line[2 * start..];
                            let pairs = match line.first_chunk::<{ 2 * CHUNK }>() {
                                Some(line) => *line,
                                None => {
                                    let mut pairs = [F::Real::ZERO; 2 * CHUNK];
                                    copy_short(line, &mut pairs);
                                    pairs
                                }
                            };
                            *row = output_transposed(split(&pairs, 0));
                        }
                        for column in 0..E {
                            let values = output_transposed([rows[0][column], rows[1][column]]);
                            let to = first + start + column * self.output_product;
                            // Beyond the row, the next one's output may still be needed.
                            let len = self.columns - start;
                            Chunk::store_part(values, planes, to, E * self.output_product, len);
                        }
                    }
                }
            },
        ));
    }

    fn seal(&self, scratch: &mut Self::Scratch, tile: &Tile, channel: usize) {
        for product in 0..E * E {
            let plane = product * self.output_product + channel * self.plane;
            zero(&mut scratch.output[plane + tile.positions..][..WIDEST]);
        }
    }

    fn weight_grad_len(&self) -> usize {
        self.geometry.weight_len() / 9 * E * E
    }

    fn add_weight_grad(&self, scratch: &mut Self::Scratch, tile: &Tile, sums: &mut [F::Real]) {
        let (group_in, group_out) = (self.geometry.group_in(), self.geometry.group_out());
        for ((sums, grads), source) in sums
            .chunks_exact_mut(group_in * group_out)
            .zip(scratch.output.chunks_exact(self.output_product))
            .zip(scratch.input.chunks_exact(self.input_product))
        {
            let inputs = &self.inputs;
            accumulate(sums, grads, self.plane, source, inputs, tile.positions);
        }
    }

    #[allow(unsafe_code)]
    fn weight_grad(&self, sums: Vec<F::Real>, grad: &mut Vec<F::Real>) {
        let len = self.geometry.weight_len();
        let kernels = self.geometry.group_in() * self.geometry.group_out();
        for (sums, grad) in sums
            .chunks_exact(E * E * kernels)
            .zip(room(grad, len).chunks_exact_mut(9 * kernels))
        {
            let (grad, _) = grad.as_chunks_mut::<9>();
            grad.par_chunks_mut(KERNELS)
                .enumerate()
                .for_each(|(index, grad)| {
                    let sums = |product: usize| &sums[product * kernels + index * KERNELS..];
                    let sums: [_; E * E] = std::array::from_fn(sums);
                    for (index, grad) in grad.iter_mut().enumerate() {
                        let row = |row: usize| {
                            filter_transposed(std::array::from_fn(|column| {
                                sums[row * E + column][index].to_f64()
                            }))
                        };
                        let rows: [[f64; 3]; E] = std::array::from_fn(row);
                        for column in 0..3 {
                            let down =
                                filter_transposed(std::array::from_fn(|row| rows[row][column]));
                            for (row, value) in down.into_iter().enumerate() {
                                grad[row * 3 + column].write(F::Real::from_f64(value));
                            }
                        }
                    }
                });
        }
        // SAFETY: there is room for `len` values, which are whole groups of whole kernels, and each
        // row and column of each kernel was written.
        unsafe { grad.set_len(len) };
    }

    fn input_grad(
        &self,
        scratch: &mut Self::Scratch,
        group: usize,
        tile: &Tile,
        grad: &mut [MaybeUninit<F>],
    ) {
        let group_in = self.geometry.group_in();
        let len = E * E * self.input_product;
        scratch.input_grad.resize(len, F::Real::ZERO);
        self.reserve(&mut scratch.lines);
        let filters = &self.transposed[group * E * E..][..E * E];
        for ((filter, source), target) in filters
            .iter()
            .zip(scratch.output.chunks_exact(self.output_product))
            .zip(scratch.input_grad.chunks_exact_mut(self.input_product))
        {
            let (outputs, target) = (&self.outputs, &mut target[self.columns..]);
            correlate(filter, source, outputs, target, self.plane, tile.positions);
        }
        let plane = self.geometry.input_plane();
        // Before each line stands a zero, which `store_rows` reads and does not write; `load_part`
        // lays other lines out in this buffer.
        let lines = STEP * E * self.store_pitch();
        scratch.lines.rows[..lines].fill(F::Real::ZERO);
        Arch::new().dispatch(Sweep(
            #[inline(always)]
            || {
                for part in &tile.parts {
                    let image = part.image * self.geometry.input_len();
                    let last = part.rows.end + usize::from(part.rows.end == self.rows);
                    for channel in 0..group_in {
                        let start = image + (group * group_in + channel) * plane;
                        let grad = &mut grad[start..][..plane];
                        for row in part.rows.start..last {
                            let position = part.position + (row - part.rows.start) * self.columns;
                            let position = position + channel * self.plane;
                            let (planes, lines) = (&scratch.input_grad, &mut scratch.lines);
                            self.store_rows(planes, row, position, grad, lines);
                        }
                    }
                }
            },
        ));
        for product in scratch.input_grad.chunks_exact_mut(self.input_product) {
            for plane in product.chunks_exact_mut(self.plane) {
                plane.copy_within(tile.positions..tile.positions + self.columns, 0);
            }
        }
    }
}
