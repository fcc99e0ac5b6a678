//! Winograd's maps with channels side by side: a *pixel* has the values of [`LANES`] channels at one place.

use super::transforms::{E, N, filter_lanes, filter_lanes_transposed, pairs};
use crate::Geometry;
use crate::Real;
use crate::conv::span::Span;
use crate::simd::chunk::{CHUNK, Chunk};
use crate::simd::prefetch;

/// Channels that are transformed at a time.
pub(super) const LANES: usize = CHUNK;

/// Values of a kernel.
pub(super) const TAPS: usize = 9;

/// Distances in a panel: of the products, and of the tiles.
#[derive(Clone, Copy, Debug)]
pub(super) struct Steps {
    pub(super) product: usize,
    pub(super) tile: usize,
}

/// Places of a chunk's tiles among its pixels, by row and column. Behind the last pixel is one that stands for all
/// that the image does not have.
#[derive(Debug, Default)]
pub(super) struct Places {
    /// Images, from the first on.
    pub(super) first: usize,
    pub(super) images: usize,
    /// The values of each image's plane that the tiles read.
    pub(super) start: usize,
    pub(super) len: usize,
    pub(super) inputs: Vec<[[u32; N]; N]>,
    pub(super) outputs: Vec<[[u32; 2]; 2]>,
}

impl Places {
    /// Finds the places of a chunk: whole images, or strips of one.
    pub(super) fn find(&mut self, geometry: &Geometry, chunk: Span) {
        let [_, height, width] = geometry.input;
        let [_, _, columns] = geometry.output;
        let [_, (above, _), (left, _)] = geometry.padding;
        let [_, down, across] = geometry.dilation;
        let positions = geometry.positions();
        self.first = chunk.start / positions;
        self.images = chunk.len.div_ceil(positions);
        let (top, rows) = (
            chunk.start % positions / columns,
            chunk.len / self.images / columns,
        );
        let row = |row: usize| row.saturating_sub(above).min(height);
        let read = row(top)..row(top + rows.next_multiple_of(2 * down) + (N - 2) * down);
        (self.start, self.len) = (read.start * width, read.len() * width);
        let (behind_inputs, behind_outputs) = (self.images * self.len, chunk.len);
        self.inputs.clear();
        self.outputs.clear();
        for image in 0..self.images {
            for (y, x) in first_of_pairs(rows, down)
                .flat_map(|y| first_of_pairs(columns, across).map(move |x| (y, x)))
            {
                let input = |n: usize, m: usize| {
                    let y = (top + y + n * down).checked_sub(above);
                    let x = (x + m * across).checked_sub(left);
                    let (y, x) = (y.filter(|y| *y < height)?, x.filter(|x| *x < width)?);
                    Some(image * self.len + y * width + x - self.start)
                };
                let output = |n: usize, m: usize| {
                    let (y, x) = (y + n * down, x + m * across);
                    (y < rows && x < columns).then_some((image * rows + y) * columns + x)
                };
                let place = |place: Option<usize>, behind: usize| place.unwrap_or(behind) as u32;
                self.inputs.push(std::array::from_fn(|n| {
                    std::array::from_fn(|m| place(input(n, m), behind_inputs))
                }));
                self.outputs.push(std::array::from_fn(|n| {
                    std::array::from_fn(|m| place(output(n, m), behind_outputs))
                }));
            }
        }
    }
}

/// First values of a line's pairs, each pair a value and the one `distance` behind.
fn first_of_pairs(len: usize, distance: usize) -> impl Iterator<Item = usize> {
    (0..pairs(len, distance)).map(move |pair| pair + pair / distance * distance)
}

/// Sets one channel of the pixels.
pub(super) fn lay<T: Real>(line: &[T], lane: usize, pixels: &mut [T]) {
    for (pixel, value) in pixels.chunks_exact_mut(LANES).zip(line) {
        pixel[lane] = *value;
    }
}

/// Reads one channel of the pixels.
pub(super) fn pick<T: Real>(pixels: &[T], lane: usize, line: &mut [T]) {
    for (pixel, value) in pixels.chunks_exact(LANES).zip(line) {
        *value = pixel[lane];
    }
}

/// A map of rows and columns.
#[inline(always)]
fn nested<T: Real, const A: usize, const B: usize>(
    values: [[Chunk<T>; A]; A],
    map: impl Fn([Chunk<T>; A]) -> [Chunk<T>; B] + Copy,
) -> [[Chunk<T>; B]; B] {
    let mut down = [[Chunk::ZERO; A]; B];
    for column in 0..A {
        let mut values_down = [Chunk::ZERO; A];
        for row in 0..A {
            values_down[row] = values[row][column];
        }
        let mapped = map(values_down);
        for row in 0..B {
            down[row][column] = mapped[row];
        }
    }
    let mut result = [[Chunk::ZERO; B]; B];
    for row in 0..B {
        result[row] = map(down[row]);
    }
    result
}

/// Tiles by which their places in a panel are asked for before they are written.
const AHEAD: usize = 4;

/// The products' factors of each tile, from its pixels.
#[inline(always)]
pub(super) fn transform<T: Real, const A: usize>(
    places: &[[[u32; A]; A]],
    pixels: &[T],
    map: impl Fn([Chunk<T>; A]) -> [Chunk<T>; E] + Copy,
    panel: &mut [T],
    steps: Steps,
) {
    for (tile, places) in places.iter().enumerate() {
        let ahead = panel.get((tile + AHEAD) * steps.tile..).unwrap_or_default();
        ahead
            .iter()
            .step_by(steps.product)
            .for_each(|value| prefetch(value));
        let mut values = [[Chunk::ZERO; A]; A];
        for row in 0..A {
            for column in 0..A {
                let place = places[row][column] as usize * LANES;
                [values[row][column]] = Chunk::load(pixels, place, 0);
            }
        }
        for (row, values) in nested(values, map).into_iter().enumerate() {
            let at = row * E * steps.product + tile * steps.tile;
            Chunk::store(values, panel, at, steps.product);
        }
    }
}

/// Adds what the products of each tile make to its pixels.
#[inline(always)]
pub(super) fn restore<T: Real, const B: usize>(
    places: &[[[u32; B]; B]],
    pixels: &mut [T],
    map: impl Fn([Chunk<T>; E]) -> [Chunk<T>; B] + Copy,
    panel: &[T],
    steps: Steps,
) {
    for (tile, places) in places.iter().enumerate() {
        let mut values = [[Chunk::ZERO; E]; E];
        for row in 0..E {
            let at = row * E * steps.product + tile * steps.tile;
            values[row] = Chunk::load(panel, at, steps.product);
        }
        let values = nested(values, map);
        for row in 0..B {
            for column in 0..B {
                let place = places[row][column] as usize * LANES;
                let [before] = Chunk::load(pixels, place, 0);
                Chunk::store([before + values[row][column]], pixels, place, 0);
            }
        }
    }
}

/// Kernels in rows and columns, at a distance each.
#[derive(Clone, Copy, Debug)]
pub(super) struct Grid {
    pub(super) rows: usize,
    pub(super) row: usize,
    pub(super) columns: usize,
    pub(super) column: usize,
}

impl Grid {
    /// Asks for a kernel, if there is one: hardware does not foresee the next of many short pieces.
    #[inline(always)]
    fn prefetch<T>(&self, kernels: &[[T; TAPS]], row: usize, column: usize) {
        if row < self.rows {
            prefetch(&kernels[row * self.row + column * self.column]);
        }
    }
}

/// Rows of kernels that are laid side by side at a time.
const ROWS: usize = 4;

/// `G w G'`: a panel whose tiles are the rows. Columns up to the next multiple of [`LANES`] repeat the last.
#[inline(always)]
pub(super) fn transform_kernels<T: Real>(
    kernels: &[[T; TAPS]],
    grid: Grid,
    panel: &mut [T],
    steps: Steps,
) {
    // By way of memory: the compiler vectorizes no sums of values that it has just gathered. A few rows at a time of
    // few columns: kernels are a power of two apart, and share few sets of a cache.
    let mut laid = [T::ZERO; TAPS * ROWS * LANES];
    for start in (0..grid.columns).step_by(LANES) {
        for first in (0..grid.rows).step_by(ROWS) {
            let rows = first..(first + ROWS).min(grid.rows);
            for lane in 0..LANES {
                let column = (start + lane).min(grid.columns - 1);
                for row in rows.clone() {
                    grid.prefetch(kernels, row + 2 * ROWS, column);
                    let kernel = &kernels[row * grid.row + column * grid.column];
                    let laid = &mut laid[(row - first) * LANES + lane..];
                    for (tap, value) in kernel.iter().enumerate() {
                        laid[tap * ROWS * LANES] = *value;
                    }
                }
            }
            for row in rows {
                let at = |tap: usize| (tap * ROWS + row - first) * LANES;
                let mut values = [[Chunk::ZERO; 3]; 3];
                for index in 0..3 {
                    values[index] = Chunk::load(&laid, at(3 * index), ROWS * LANES);
                }
                for (index, values) in nested(values, filter_lanes).into_iter().enumerate() {
                    let at = index * E * steps.product + row * steps.tile + start;
                    Chunk::store(values, panel, at, steps.product);
                }
            }
        }
    }
}

/// Adds `G' u G` to the kernels: the transpose of [`transform_kernels`].
#[inline(always)]
pub(super) fn add_kernels<T: Real>(
    panel: &[T],
    steps: Steps,
    kernels: &mut [[T; TAPS]],
    grid: Grid,
) {
    for row in 0..grid.rows {
        for start in (0..grid.columns).step_by(LANES) {
            let mut values = [[Chunk::ZERO; E]; E];
            for index in 0..E {
                let at = index * E * steps.product + row * steps.tile + start;
                values[index] = Chunk::load(panel, at, steps.product);
            }
            let values = nested(values, filter_lanes_transposed);
            for lane in 0..LANES.min(grid.columns - start) {
                grid.prefetch(kernels, row + 1, start + lane);
                let kernel = &mut kernels[row * grid.row + (start + lane) * grid.column];
                for tap in 0..TAPS {
                    kernel[tap] += values[tap / 3][tap % 3].get(lane);
                }
            }
        }
    }
}
