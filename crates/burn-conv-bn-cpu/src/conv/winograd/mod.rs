//! Winograd's F(2x2, 3x3), for stride 1 and kernels of 3x3 or of parts of 3x3.
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
//! For each of the products, the sum over channels is a matrix product, by the kernels for shifted planes: with shift 0
//! or, of kernels beyond 3x3, one shift for each part of them (`taps`).

// Blocks of registers are addressed by their place in the block.
#![allow(clippy::needless_range_loop)]

mod rows;
mod slices;
mod taps;
mod tiles;
mod transforms;
mod window;

pub(crate) use self::slices::Slices;
pub(crate) use self::taps::transformed_len;
pub(crate) use self::window::saves_products;

use std::mem::MaybeUninit;
use std::ops::Range;

use pulp::Arch;

use self::taps::Taps;
use self::transforms::{E, STEP, output, output_transposed};
use self::window::{Shape, Tile};
use super::tile::{Algorithm, Piece, Transposed};
use crate::blocks::{BLOCKS, Block, Share};
use crate::scratch::{Aligned, room};
use crate::simd::chunk::{CHUNK, Chunk, copy_short, deinterleave};
use crate::simd::planes::{Filter, LINE, WIDEST, accumulate, correlate, plane_len, slack};
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

/// Most positions of a tile whose kernel extends over slices, and of a slice's part: the planes of three such parts, of
/// all sixteen products, are read again for the next slice, from the second-level cache or not far from it.
const MOST_IN_DEPTH: usize = 256;
const COURSE_POSITIONS: usize = 128;

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

/// A prepared convolution. Its positions are pairs of rows by pairs of columns.
pub(crate) struct Winograd<'a, T> {
    geometry: &'a Geometry,
    shape: Shape,
    /// Values of the strips of the input's gradient before a course, in all slices.
    course_grad: usize,
    /// Most strips of a tile, and those that a window has room for beside what is behind them.
    tile: usize,
    room: usize,
    /// Distance of the planes, and of those of the input's gradient.
    plane: usize,
    grad_plane: usize,
    /// Distance of the products' planes, of the input, the output and the input's gradient.
    input_product: usize,
    output_product: usize,
    grad_product: usize,
    taps: Taps,
    /// For each group, and each of the `E * E` products.
    filters: Vec<Filter<T>>,
    /// The same for the input's gradient, if requested.
    transposed: Vec<Filter<T>>,
}

#[derive(Default)]
pub(crate) struct Scratch<T> {
    /// `B x B'`: a plane for each product and channel, of a window of positions.
    input: Aligned<T>,
    /// The products' sums, then `A' dy A`, preceded by the last `reach` positions of the tile before.
    output: Aligned<T>,
    /// The products of the input's gradient; a strip of the preceding tile before those of this one.
    input_grad: Aligned<T>,
    /// The last strips of a course in it, for each slice, channel and product.
    course_grad: Aligned<T>,
    lines: Lines<T>,
}

impl<'a, T: Real> Winograd<'a, T> {
    /// Planes and tiles of about [`TILE_BYTES`], `tile_bytes` at most, without the weight.
    pub(crate) fn new(geometry: &'a Geometry, tile_bytes: usize) -> Self {
        let (group_in, group_out) = (geometry.group_in(), geometry.group_out());
        let shape = Shape::new(geometry).in_courses(COURSE_POSITIONS);
        let (strip, reach) = (shape.strip, shape.reach());
        let product = E * E * size_of::<T>();
        let bytes = product * (2 * group_in + group_out);
        let window = product * (group_in + group_out) * reach;
        let course_grad = match shape.has_courses() {
            true => shape.slices * group_in * E * E * strip + WIDEST,
            false => 0,
        };
        let slack = slack(group_in).max(slack(group_out));
        // A strip of the preceding tile, and the values written behind the last position.
        let margin = strip + slack;
        let positions = |tile_bytes: usize| (tile_bytes / bytes).saturating_sub(margin);
        let most = match geometry.kernel[0] {
            1 => MOST_POSITIONS,
            _ => MOST_IN_DEPTH,
        };
        let positions = positions(TILE_BYTES)
            .clamp(LEAST_POSITIONS, most)
            .min(positions(
                tile_bytes.saturating_sub(2 * window + course_grad * size_of::<T>()),
            ))
            .max(LEAST_POSITIONS / 2);
        // Small batches have small blocks, which would leave large planes empty.
        let blocks = geometry.blocks(BLOCKS);
        let block = blocks
            .iter()
            .map(|block| shape.of(geometry, block).len())
            .max();
        let tile = (positions / strip).clamp(1, block.unwrap_or(1));
        // Less than a position is moved for each one that is added.
        let room = reach.div_ceil(tile * strip).max(1) * tile;
        let plane = plane_len(room * strip + reach + slack);
        let grad_plane = plane_len((1 + tile) * strip + slack);
        Self {
            geometry,
            shape,
            course_grad,
            tile,
            room,
            plane,
            grad_plane,
            input_product: product_len(group_in * plane),
            output_product: product_len(group_out * plane),
            grad_product: product_len(group_in * grad_plane),
            taps: Taps::new(geometry, shape, plane),
            filters: Vec::new(),
            transposed: Vec::new(),
        }
    }

    /// Prepares the convolution, and that of its input's gradient, each if it is needed.
    pub(crate) fn with_weights(
        mut self,
        weight: Option<&[T]>,
        transposed: Option<Transposed<'_, T>>,
    ) -> Self {
        if let Some(weight) = weight {
            self.filters = self.taps.filters(self.geometry, weight, false, None);
        }
        if let Some(Transposed { weight, scale }) = transposed {
            self.transposed = self.taps.filters(self.geometry, weight, true, scale);
        }
        self
    }
}

impl<T: Real> Winograd<'_, T> {
    /// Places in the windows of input and output of the first position that is an output.
    fn active(&self, tile: &Tile) -> (usize, usize) {
        let from = tile.at + tile.active.start;
        (from, from + self.shape.reach())
    }

    /// Place of a position in a channel's plane of the output.
    fn first_output(&self, tile: &Tile, position: usize, channel: usize) -> usize {
        channel * self.plane + self.shape.reach() + tile.at + position
    }

    /// Keeps the last strips of a course of the input's gradient for the next course.
    fn keep_course(&self, scratch: &mut Scratch<T>, tile: &Tile) {
        let (strip, channels) = (self.shape.strip, self.geometry.group_in());
        for part in &tile.inputs {
            if !self.shape.follows_course(part.strips.end) {
                continue;
            }
            for channel in 0..channels {
                let from = channel * self.grad_plane + part.position + part.strips.len() * strip;
                let to = self.kept_strip(part.slice, channel);
                let kept = scratch.course_grad[to..].chunks_exact_mut(strip);
                let products = scratch.input_grad.chunks_exact(self.grad_product);
                for (kept, product) in kept.zip(products) {
                    kept.copy_from_slice(&product[from..][..strip]);
                }
            }
        }
    }

    /// Place of a strip that [`keep_course`](Self::keep_course) keeps.
    fn kept_strip(&self, slice: usize, channel: usize) -> usize {
        (slice * self.geometry.group_in() + channel) * E * E * self.shape.strip
    }

    #[inline(always)]
    fn zero_input(&self, planes: &mut [T], channel: usize, position: usize, len: usize) {
        for product in planes.chunks_exact_mut(self.input_product) {
            zero(&mut product[channel * self.plane + position..][..len]);
        }
    }
}

/// Moves a range of all planes to their start.
fn slide<T: Real>(planes: &mut [T], product: usize, plane: usize, range: Range<usize>) {
    for product in planes.chunks_exact_mut(product) {
        for plane in product.chunks_exact_mut(plane) {
            plane.copy_within(range.clone(), 0);
        }
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
        let mut planes = E * E * (self.input_product + self.output_product);
        if gradients {
            planes += E * E * self.grad_product + self.course_grad;
        }
        (planes + self.lines_len().iter().sum::<usize>()) * size_of::<F::Real>()
    }

    fn offset_bytes(&self, _: bool) -> usize {
        self.taps.offsets() * size_of::<usize>()
    }

    fn tiles(&self, block: &Block, has_halo: bool) -> Vec<(Tile, bool)> {
        let sizes = (self.tile, self.room);
        self.shape.tiles(self.geometry, block, has_halo, sizes)
    }

    fn pieces<'a>(&self, tile: &'a Tile) -> &'a [Piece] {
        &tile.pieces
    }

    fn load(&self, scratch: &mut Self::Scratch, input: &[F], group: usize, tile: &Tile) {
        let channels = self.geometry.group_in();
        let [depth, height, width] = self.geometry.input;
        scratch
            .input
            .resize(E * E * self.input_product, F::Real::ZERO);
        self.reserve(&mut scratch.lines);
        scratch.lines.padded.fill(F::Real::ZERO);
        if let Some(from) = tile.before {
            slide(
                &mut scratch.input,
                self.input_product,
                self.plane,
                from..from + self.shape.kept(),
            );
        }
        Arch::new().dispatch(Sweep(
            #[inline(always)]
            || {
                for part in &tile.loads {
                    let image = &input[part.image * self.geometry.input_len()..];
                    let slice = part.slice.checked_sub(self.geometry.padding[0].0);
                    let slice = slice.filter(|slice| *slice < depth);
                    for channel in 0..channels {
                        let planes = &mut scratch.input;
                        let Some(slice) = slice else {
                            let len = part.strips.len() * self.shape.strip;
                            self.zero_input(planes, channel, part.position, len);
                            continue;
                        };
                        let plane = ((group * channels + channel) * depth + slice) * height * width;
                        let source = &image[plane..][..height * width];
                        self.load_part(source, part, channel, planes, &mut scratch.lines);
                    }
                }
                // The weight's gradient multiplies what follows the last position by zeros, and what
                // another tile left there need not be finite.
                for channel in 0..channels {
                    self.zero_input(&mut scratch.input, channel, tile.loaded, WIDEST);
                }
            },
        ));
    }

    fn convolve(&self, scratch: &mut Self::Scratch, group: usize, tile: &Tile) {
        let len = E * E * self.output_product;
        scratch.output.resize(len, F::Real::ZERO);
        if tile.active.is_empty() {
            return;
        }
        let (from, to) = self.active(tile);
        for (product, ((filter, source), target)) in self.filters[group * E * E..]
            .iter()
            .zip(scratch.input.chunks_exact(self.input_product))
            .zip(scratch.output.chunks_exact_mut(self.output_product))
            .enumerate()
        {
            let (inputs, target) = (&self.taps.of(product).inputs, &mut target[to..]);
            let positions = tile.active.len();
            correlate(
                filter,
                &source[from..],
                inputs,
                target,
                self.plane,
                positions,
                false,
            );
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
        let part = &tile.outputs[piece];
        let first = self.first_output(tile, part.position, channel);
        let (planes, phases) = (&scratch.output, &mut scratch.lines.phases);
        let pitch = self.phases_pitch();
        phases.resize(self.phases_len(), F::Real::ZERO);
        Arch::new().dispatch(Sweep(
            #[inline(always)]
            || {
                for index in 0..part.strips.len() * down {
                    let first = first + index * self.shape.columns;
                    for start in (0..self.shape.output_columns).step_by(CHUNK) {
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
        let part = &tile.outputs[piece];
        let first = self.first_output(tile, part.position, channel);
        let columns = self.shape.columns;
        let (planes, laid) = (&mut scratch.output, &mut scratch.lines);
        let pitch = self.phases_pitch();
        Arch::new().dispatch(Sweep(
            #[inline(always)]
            || {
                for index in 0..part.strips.len() * down {
                    let first = first + index * columns;
                    let lines = line.chunks_exact(width).skip(self.line(index));
                    let lines = lines.step_by(down).take(2).enumerate();
                    if across > 1 {
                        for (row, line) in lines.clone() {
                            self.split_line(line, row, laid);
                        }
                    }
                    for start in (0..columns).step_by(CHUNK) {
                        let mut rows = [[Chunk::ZERO; E]; 2];
                        for (row, line) in lines.clone() {
                            let pairs = if across > 1 {
                                Chunk::load(&laid.phases, row * STEP * pitch + start, pitch)
                            } else {
                                first_pairs(line.get(STEP * start..).unwrap_or_default())
                            };
                            rows[row] = output_transposed(pairs);
                        }
                        for column in 0..E {
                            let values = output_transposed([rows[0][column], rows[1][column]]);
                            let to = first + start + column * self.output_product;
                            // Beyond the row, the next one's output may still be needed.
                            let len = columns - start;
                            Chunk::store_part(values, planes, to, E * self.output_product, len);
                        }
                    }
                }
            },
        ));
    }

    fn seal(&self, scratch: &mut Self::Scratch, tile: &Tile, channel: usize) {
        for product in scratch.output.chunks_exact_mut(self.output_product) {
            let first = self.first_output(tile, 0, channel);
            if tile.is_first {
                zero(&mut product[channel * self.plane..first]);
            }
            for gap in &tile.gaps {
                zero(&mut product[first + gap.start..first + gap.end]);
            }
            zero(&mut product[first + tile.positions..][..WIDEST]);
        }
    }

    fn weight_grad_len(&self) -> usize {
        transformed_len(self.geometry)
    }

    fn add_weight_grad(&self, scratch: &mut Self::Scratch, tile: &Tile, sums: &mut [F::Real]) {
        if tile.active.is_empty() {
            return;
        }
        let (from, to) = self.active(tile);
        let mut rest = sums;
        for (product, (grads, source)) in scratch
            .output
            .chunks_exact(self.output_product)
            .zip(scratch.input.chunks_exact(self.input_product))
            .enumerate()
        {
            let inputs = &self.taps.of(product).inputs;
            let sums = rest
                .split_off_mut(..inputs.len() * self.geometry.group_out())
                .expect("each product has sums");
            let (grads, source) = (&grads[to..], &source[from..]);
            accumulate(sums, grads, self.plane, source, inputs, tile.active.len());
        }
    }

    #[allow(unsafe_code)]
    fn weight_grad(&self, sums: Vec<F::Real>, grad: &mut Vec<F::Real>) {
        let geometry = self.geometry;
        let (len, groups) = (geometry.weight_len(), geometry.groups());
        for (sums, grad) in sums
            .chunks_exact(transformed_len(geometry) / groups)
            .zip(room(grad, len).chunks_exact_mut(len / groups))
        {
            self.taps.kernels(geometry, sums, grad);
        }
        // SAFETY: there is room for `len` values, which are whole groups of whole kernels, and each value of each
        // kernel was written.
        unsafe { grad.set_len(len) };
    }

    fn input_grad(
        &self,
        scratch: &mut Self::Scratch,
        group: usize,
        tile: &Tile,
        grad: Option<&mut Share<'_, MaybeUninit<F>>>,
    ) {
        let (strip, reach) = (self.shape.strip, self.shape.reach());
        let len = E * E * self.grad_product;
        scratch.input_grad.resize(len, F::Real::ZERO);
        // Of a halo, the next tile's part is the last strip.
        let first = match grad {
            Some(_) => 0,
            None => tile.positions - strip,
        };
        for (product, ((filter, source), target)) in self.transposed[group * E * E..]
            .iter()
            .zip(scratch.output.chunks_exact(self.output_product))
            .zip(scratch.input_grad.chunks_exact_mut(self.grad_product))
            .enumerate()
        {
            let (outputs, source) = (&self.taps.of(product).outputs, &source[tile.at + first..]);
            let (target, positions) = (&mut target[strip + first..], tile.positions - first);
            correlate(
                filter,
                source,
                outputs,
                target,
                self.grad_plane,
                positions,
                false,
            );
        }
        if let Some(grad) = grad {
            scratch.course_grad.resize(self.course_grad, F::Real::ZERO);
            self.store_tile(scratch, group, tile, grad);
            self.keep_course(scratch, tile);
        }
        let last = tile.positions..tile.positions + strip;
        slide(
            &mut scratch.input_grad,
            self.grad_product,
            self.grad_plane,
            last,
        );
        if let Some(from) = tile.after {
            slide(
                &mut scratch.output,
                self.output_product,
                self.plane,
                from..from + reach,
            );
        }
    }
}
