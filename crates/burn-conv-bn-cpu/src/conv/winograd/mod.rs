//! Winograd's F(2x2, 3x3), for kernels of 3x3 and stride 1.
//!
//! Two neighbouring outputs share most of their inputs. A bilinear algorithm (Winograd, Arithmetic
//! Complexity of Computations, 1980; Lavin and Gray, arXiv 1509.09308) adds inputs and taps first, and
//! takes 4 products instead of 6 for both. Nested in rows and columns these are 16 instead of 36 for each
//! 2x2 outputs:
//!
//! `y = A [(G w) * (B x)]`, with `*` element by element.
//!
//! This is a trilinear sum, so the gradients are its transposes:
//! `dw = G' [(A' dy) * (B x)]` and `dx = B' [(G w) * (A' dy)]`, at the same number of products.
//!
//! The matrices' elements are 0, 1, -1 and, in `G`, 1/2. The error of the output and of the input's
//! gradient is smaller than a direct sum's, since fewer terms are rounded, and that of the weight's gradient
//! up to 1.5 times as large, as the test of `conv` measures. Larger tiles of outputs would save more and lose
//! digits.
//!
//! A dilated convolution is undilated ones over every `d`-th row and column. Pairs of outputs are `d` apart then: a
//! strip of `2 d` rows has `d` rows of pairs, each of its first rows with the one `d` below, and likewise for columns.
//!
//! For each of the products, the sum over channels is a matrix product, by the kernels for shifted planes
//! with shift 0.

// Blocks of registers are addressed by their place in the block.
#![allow(clippy::needless_range_loop)]

mod rows;
mod slices;
mod tiles;
mod transforms;

pub(crate) use self::slices::Slices;

use std::mem::MaybeUninit;
use std::ops::Range;

use pulp::Arch;
use rayon::prelude::*;

use self::transforms::{E, STEP, filter_transposed, output, output_transposed, pairs, transformed};
use super::tile::{Algorithm, Piece, Transposed};
use crate::blocks::{BLOCKS, Block, Share};
use crate::scratch::{Aligned, room};
use crate::simd::chunk::{CHUNK, Chunk, copy_short, deinterleave};
use crate::simd::planes::{
    CHANNELS, Filter, LINE, WIDEST, accumulate, correlate, plane_len, slack, taps_in_cache,
};
use crate::simd::sweeps::{Sweep, zero};
use crate::{Element, Geometry, Real};

/// Target size of a thread's tile, in bytes of scratch.
const TILE_BYTES: usize = 6 << 20;

/// Fewest positions of a tile: the filters of 512 channels are 16 MiB, read from main memory for each tile,
/// and have to be used often enough. Half of them where scratch is short.
const LEAST_POSITIONS: usize = 128;

/// Most positions of a tile: a plane of that many values of 64 channels is half of a core's
/// second-level cache.
const MOST_POSITIONS: usize = 1024;

/// Kernels whose gradients a thread transforms at a time.
const KERNELS: usize = 1024;

/// Rows in transformation.
#[derive(Default)]
struct Lines<T> {
    /// Rows of the input with their padding.
    padded: Aligned<T>,
    /// The even and the odd values of a row.
    phases: Aligned<T>,
    /// Rows transformed along the columns.
    rows: Aligned<T>,
}

/// A prepared convolution. Its positions are pairs of rows by pairs of columns of the output.
pub(crate) struct Winograd<'a, T> {
    geometry: &'a Geometry,
    /// Strips of an image: as many pairs of output rows as the dilation, each row with the one that far below.
    strips: usize,
    /// Pairs of output columns.
    columns: usize,
    /// Strips of a tile.
    tile: usize,
    /// Distance of the planes.
    plane: usize,
    /// Distance of the products' planes, of the input and of the output.
    input_product: usize,
    output_product: usize,
    /// Offsets of the input's, and of the output's, channels in a product's planes.
    inputs: Vec<usize>,
    outputs: Vec<usize>,
    /// For each group, and each of the `E * E` products.
    filters: Vec<Filter<T>>,
    /// The same for the input's gradient, if requested.
    transposed: Vec<Filter<T>>,
}

/// Strips, of one image or of several.
#[derive(Debug)]
pub(crate) struct Tile {
    positions: usize,
    parts: Vec<Part>,
    pieces: Vec<Piece>,
}

/// Strips of one image.
#[derive(Debug)]
struct Part {
    image: usize,
    strips: Range<usize>,
    /// Their offset in the tile.
    position: usize,
}

#[derive(Default)]
pub(crate) struct Scratch<T> {
    /// `B x B'`: a plane for each product and channel.
    input: Aligned<T>,
    /// The products' sums, then `A' dy A`.
    output: Aligned<T>,
    /// The products of the input's gradient; a strip of the preceding tile before those of this one.
    input_grad: Aligned<T>,
    lines: Lines<T>,
}

impl<'a, T: Real> Winograd<'a, T> {
    /// Planes and tiles of about [`TILE_BYTES`], `tile_bytes` at most, without the weight.
    pub(crate) fn new(geometry: &'a Geometry, tile_bytes: usize) -> Self {
        let (group_in, group_out) = (geometry.group_in(), geometry.group_out());
        let [_, height, width] = geometry.output();
        let [_, down, across] = geometry.dilation;
        let (strips, columns) = (height.div_ceil(2 * down), pairs(width, across));
        let strip = down * columns;
        let bytes = E * E * (2 * group_in + group_out) * size_of::<T>();
        // A strip of the preceding tile, and the values written behind the last position.
        let margin = strip + slack(group_in).max(slack(group_out));
        let positions = |tile_bytes: usize| (tile_bytes / bytes).saturating_sub(margin);
        let positions = positions(TILE_BYTES)
            .clamp(LEAST_POSITIONS, MOST_POSITIONS)
            .min(positions(tile_bytes))
            .max(LEAST_POSITIONS / 2);
        // Small batches have small blocks, which would leave large planes empty.
        let blocks = geometry.blocks(BLOCKS);
        let block = blocks
            .iter()
            .map(|block| block_strips(geometry, block).len())
            .max();
        let tile = (positions / strip).clamp(1, block.unwrap_or(1));
        let plane = plane_len(margin + tile * strip);
        let starts = |channels: usize| (0..channels).map(|channel| channel * plane).collect();
        Self {
            geometry,
            strips,
            columns,
            tile,
            plane,
            input_product: product_len(group_in * plane),
            output_product: product_len(group_out * plane),
            inputs: starts(group_in),
            outputs: starts(group_out),
            filters: Vec::new(),
            transposed: Vec::new(),
        }
    }

    /// Positions of a strip.
    fn strip_len(&self) -> usize {
        self.geometry.dilation[1] * self.columns
    }

    /// A tile of some strips, from the first of a block's images on.
    fn tile(&self, all: Range<usize>) -> Tile {
        let [_, height, width] = self.geometry.output();
        let lines_of_strip = STEP * self.geometry.dilation[1];
        let (mut parts, mut pieces) = (Vec::new(), Vec::new());
        for image in all.start / self.strips..all.end.div_ceil(self.strips) {
            let first = image * self.strips;
            let strips = all.start.max(first) - first..all.end.min(first + self.strips) - first;
            let lines = lines_of_strip * strips.start..(lines_of_strip * strips.end).min(height);
            pieces.push(Piece {
                start: image * self.geometry.output_len() + lines.start * width,
                len: lines.len() * width,
            });
            parts.push(Part {
                image,
                position: (first + strips.start - all.start) * self.strip_len(),
                strips,
            });
        }
        Tile {
            positions: all.len() * self.strip_len(),
            parts,
            pieces,
        }
    }

    /// Prepares the convolution, and that of its input's gradient, each if it is needed.
    pub(crate) fn with_weights(
        mut self,
        weight: Option<&[T]>,
        transposed: Option<Transposed<'_, T>>,
    ) -> Self {
        if let Some(weight) = weight {
            self.filters = Self::filters(self.geometry, weight, false, None);
        }
        if let Some(Transposed { weight, scale }) = transposed {
            self.transposed = Self::filters(self.geometry, weight, true, scale);
        }
        self
    }

    /// `G w G'` of each group, from input channels to output channels or, `transposed`, back, where the output
    /// channels may be scaled.
    fn filters(
        geometry: &Geometry,
        weight: &[T],
        transposed: bool,
        scale: Option<&[T]>,
    ) -> Vec<Filter<T>> {
        let (group_in, group_out) = (geometry.group_in(), geometry.group_out());
        let (channels, taps, channel_step, tap_step) = if transposed {
            (group_in, group_out, 1, group_in)
        } else {
            (group_out, group_in, group_in, 1)
        };
        let (kernels, _) = weight.as_chunks::<9>();
        kernels
            .chunks_exact(group_out * group_in)
            .enumerate()
            .flat_map(|(group, kernels)| {
                let scale = scale.map(|scale| &scale[group * group_out..]);
                let block = taps_in_cache(taps, 1, 1);
                let arch = Arch::new();
                Filter::several(channels, taps, block, |tap, channels| {
                    let last = channels.end - 1;
                    let kernels: [&[T; 9]; CHANNELS] = std::array::from_fn(|lane| {
                        let channel = (channels.start + lane).min(last);
                        &kernels[channel * channel_step + tap * tap_step]
                    });
                    let scale = scale.map_or(T::ONE, |scale| scale[tap]);
                    arch.dispatch(Sweep(
                        #[inline(always)]
                        || {
                            let factors: [[T; CHANNELS]; E * E] = transformed(&kernels);
                            factors.map(
                                #[inline(always)]
                                |factors| {
                                    factors.map(
                                        #[inline(always)]
                                        |factor| factor * scale,
                                    )
                                },
                            )
                        },
                    ))
                })
            })
            .collect()
    }
}

/// The pairs at a line's start. It may be shorter than a chunk of them.
#[inline(always)]
fn first_pairs<T: Real>(line: &[T]) -> [Chunk<T>; STEP] {
    let pairs = match line.first_chunk::<{ STEP * CHUNK }>() {
        Some(line) => *line,
        None => {
            let mut pairs = [T::ZERO; STEP * CHUNK];
            copy_short(line, &mut pairs);
            pairs
        }
    };
    deinterleave(&pairs, 0)
}

/// Whether there are enough fewer products than in a direct sum to outweigh the transforms. With dilation some pairs of
/// rows or columns lack the second: few in a large image.
pub(crate) fn saves_products(geometry: &Geometry) -> bool {
    let [_, height, width] = geometry.output;
    let [_, down, across] = geometry.dilation;
    let positions = height.div_ceil(STEP * down) * down * pairs(width, across);
    let direct = 9 * geometry.positions();
    [down, across] == [1, 1] || 4 * E * E * positions <= 3 * direct
}

/// Strips of a block, from the first of its images on.
fn block_strips(geometry: &Geometry, block: &Block) -> Range<usize> {
    let lines = STEP * geometry.dilation[1];
    match &block.band {
        Some(band) => band.lines.start / lines..band.lines.end.div_ceil(lines),
        None => 0..block.images.len() * geometry.output[1].div_ceil(lines),
    }
}

/// Distance of the products' planes: the same position of each falls in another set of the first-level
/// cache.
fn product_len(len: usize) -> usize {
    const SETS: usize = 64;
    let lines = len.div_ceil(LINE);
    (lines + (SETS + 3 - lines % SETS) % SETS) * LINE
}

impl<F: Element> Algorithm<F> for Winograd<'_, F::Real> {
    type Tile = Tile;
    type Scratch = Scratch<F::Real>;

    fn geometry(&self) -> &Geometry {
        self.geometry
    }

    fn tile_bytes(&self, gradients: bool) -> usize {
        let inputs = if gradients { 2 } else { 1 };
        let planes = E * E * (inputs * self.input_product + self.output_product);
        (planes + self.lines_len().iter().sum::<usize>()) * size_of::<F::Real>()
    }

    fn offset_bytes(&self, _: bool) -> usize {
        (self.inputs.len() + self.outputs.len()) * size_of::<usize>()
    }

    fn tiles(&self, block: &Block) -> Vec<Tile> {
        let all = block_strips(self.geometry, block);
        let count = all.len().div_ceil(self.tile);
        let step = all.len().div_ceil(count);
        all.clone()
            .step_by(step)
            .map(|start| self.tile(start..(start + step).min(all.end)))
            .collect()
    }

    fn halo(&self, block: &Block) -> Option<Tile> {
        let end = block_strips(self.geometry, block).start;
        (end > 0).then(|| self.tile(end - 1..end))
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
        let (width, down) = (self.geometry.output[2], self.geometry.dilation[1]);
        let part = &tile.parts[piece];
        let (planes, phases) = (&scratch.output, &mut scratch.lines.phases);
        let pitch = self.phases_pitch();
        phases.resize(self.phases_len(), F::Real::ZERO);
        Arch::new().dispatch(Sweep(
            #[inline(always)]
            || {
                for index in 0..part.strips.len() * down {
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
                    let lines = line.chunks_exact_mut(width).skip(self.line(index));
                    for (line, phases) in lines.step_by(down).zip(phases.take(2)) {
                        self.join_row(phases, pitch, line);
                    }
                }
            },
        ));
    }

    fn begin(&self, scratch: &mut Self::Scratch) {
        let len = E * E * self.output_product;
        scratch.output.resize(len, F::Real::ZERO);
        self.reserve(&mut scratch.lines);
    }

    fn scatter(
        &self,
        scratch: &mut Self::Scratch,
        tile: &Tile,
        piece: usize,
        channel: usize,
        line: &[F::Real],
    ) {
        let (width, [_, down, across]) = (self.geometry.output[2], self.geometry.dilation);
        let part = &tile.parts[piece];
        let (planes, laid) = (&mut scratch.output, &mut scratch.lines);
        let pitch = self.phases_pitch();
        Arch::new().dispatch(Sweep(
            #[inline(always)]
            || {
                for index in 0..part.strips.len() * down {
                    let first = channel * self.plane + part.position + index * self.columns;
                    let lines = line.chunks_exact(width).skip(self.line(index));
                    let lines = lines.step_by(down).take(2).enumerate();
                    if across > 1 {
                        for (row, line) in lines.clone() {
                            self.split_line(line, row, laid);
                        }
                    }
                    for start in (0..self.columns).step_by(CHUNK) {
                        let mut rows = [[Chunk::ZERO; E]; 2];
                        for (row, line) in lines.clone() {
                            let pairs = if across > 1 {
                                Chunk::load(&laid.phases, row * STEP * pitch + start, pitch)
                            } else {
                                first_pairs(&line[2 * start..])
                            };
                            rows[row] = output_transposed(pairs);
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
        grad: Option<&mut Share<'_, MaybeUninit<F>>>,
    ) {
        let len = E * E * self.input_product;
        scratch.input_grad.resize(len, F::Real::ZERO);
        let filters = &self.transposed[group * E * E..][..E * E];
        for ((filter, source), target) in filters
            .iter()
            .zip(scratch.output.chunks_exact(self.output_product))
            .zip(scratch.input_grad.chunks_exact_mut(self.input_product))
        {
            let (outputs, target) = (&self.outputs, &mut target[self.strip_len()..]);
            correlate(filter, source, outputs, target, self.plane, tile.positions);
        }
        if let Some(grad) = grad {
            self.store_tile(scratch, group, tile, grad);
        }
        for product in scratch.input_grad.chunks_exact_mut(self.input_product) {
            for plane in product.chunks_exact_mut(self.plane) {
                plane.copy_within(tile.positions..tile.positions + self.strip_len(), 0);
            }
        }
    }
}
