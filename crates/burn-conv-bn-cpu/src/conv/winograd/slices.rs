//! F(2x2, 3x3) by slices of the channels, for weights that outweigh the activations.
//!
//! Nothing of the weight's size is held. The tiles of a chunk of positions are transformed for as many channels as
//! there is room for; then each thread takes some channels of the result at a time, transforms their part of the
//! weight, multiplies and transforms back. The weight's gradient is transformed back into its place in the same way.
//!
//! Channels lie side by side throughout, so that vectors are full whatever the size of the images.

use pulp::Arch;
use rayon::prelude::*;

use super::tiles::{
    Grid, LANES, Places, Steps, TAPS, add_kernels, lay, pick, restore, transform, transform_kernels,
};
use super::transforms::{E, input, input_transposed, output, output_transposed, pairs};
use crate::conv::channels::{ByChannels, Rows};
use crate::conv::span::Span;
use crate::scratch::{Aligned, ScratchPool};
use crate::simd::chunk::Chunk;
use crate::simd::planes::LINE;
use crate::simd::products::{ROWS, Sums};
use crate::simd::sweeps::{self, Sweep};
use crate::{Element, Geometry, Real};

/// Channels of a panel of transformed tiles: as many products are summed up in registers.
const PANEL: usize = 64;

/// Channels of the result that a thread takes at a time.
const SLICE: usize = 32;

/// The same of the weight's gradient: a multiple of [`ROWS`] and of [`LANES`].
const GRAD_SLICE: usize = 24;

/// Tiles that are summed up in registers: longer sums lose digits.
const GRAD_TILES: usize = 48;

/// Distance of the products of a thread's part of the weight: a power of two would map all to one set of a cache.
const FACTOR_PRODUCT: usize = PANEL * SLICE + LINE;

/// Values of a thread's part of the weight, or of its gradient.
const FACTORS: usize = E * E * FACTOR_PRODUCT;

/// A convolution prepared for any chunk of positions.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slices<'a> {
    geometry: &'a Geometry,
    /// Images of a block, and strips of a chunk, all unless the block is of one image.
    images: usize,
    strips: usize,
    /// Most tiles of a chunk, padded to whole blocks of sums.
    tiles: usize,
    /// Channels whose tiles are transformed at a time, whole panels.
    channels: usize,
}

/// Buffers that the threads share, and those of each.
pub(crate) struct Scratch<T> {
    panels: Aligned<T>,
    places: Places,
    threads: ScratchPool<Buffers<T>>,
}

impl<T: Default> Default for Scratch<T> {
    fn default() -> Self {
        Self {
            panels: Aligned::default(),
            places: Places::default(),
            threads: ScratchPool::new(),
        }
    }
}

/// Buffers of one thread.
#[derive(Default)]
struct Buffers<T> {
    /// A channel's values in a chunk.
    line: Vec<T>,
    pixels: Aligned<T>,
    /// A part of the weight, or the sums of its gradient.
    factors: Aligned<T>,
    /// Sums, or the tiles of the output's gradient.
    sums: Aligned<T>,
}

impl<'a> Slices<'a> {
    /// Chunks of about `tiles` tiles, transformed for `channels` at a time.
    pub(crate) fn new(geometry: &'a Geometry, tiles: usize, channels: usize) -> Self {
        let [_, height, width] = geometry.output();
        let [_, down, across] = geometry.dilation;
        let (all, strip) = (height.div_ceil(2 * down), down * pairs(width, across));
        let batch = geometry.batch();
        let images = (tiles / (all * strip)).clamp(1, batch);
        let images = batch.div_ceil(batch.div_ceil(images));
        let strips = (tiles / strip).clamp(1, all);
        let strips = all.div_ceil(all.div_ceil(strips));
        Self {
            geometry,
            images,
            strips,
            tiles: (images * strips * strip).next_multiple_of(ROWS),
            channels: channels.next_multiple_of(PANEL),
        }
    }

    /// Bytes of scratch with `threads` threads, rows and all: for the output alone, or for the gradients.
    pub(crate) fn bytes(&self, size: usize, threads: usize, gradients: bool) -> usize {
        let geometry = self.geometry;
        let (group_in, group_out) = (geometry.group_in(), geometry.group_out());
        let image = match gradients {
            true => geometry.positions(),
            false => self.chunk_len() / self.images,
        };
        let mut channels = group_in;
        let mut values = Rows::<f32>::room(geometry.channels_out(), self.images * image);
        if gradients {
            channels = channels.max(group_out);
            values += geometry.channels[0] * self.images * geometry.input_plane();
        }
        let channels = channels.next_multiple_of(PANEL).min(self.channels);
        let pixels = self.images * geometry.input_plane().max(geometry.positions()) + 1;
        let thread = FACTORS + E * E * self.tiles * SLICE + (LANES + 1) * pixels;
        values += E * E * self.tiles * channels + threads * thread;
        values * size + self.tiles * size_of::<[u32; 20]>()
    }

    /// Most positions of a chunk.
    fn chunk_len(&self) -> usize {
        let [_, height, width] = self.geometry.output();
        let lines = 2 * self.geometry.dilation[1] * self.strips;
        self.images * lines.min(height) * width
    }

    /// Distances in a panel of `channels`.
    fn steps(&self, channels: usize) -> Steps {
        Steps {
            product: self.tiles * channels,
            tile: channels,
        }
    }

    /// Transforms the tiles of `channels` channels into a panel. `read` reads one of them.
    fn pack<T: Real, const A: usize>(
        &self,
        places: &[[[u32; A]; A]],
        (len, channels): (usize, usize),
        read: impl Fn(usize, &mut [T]),
        map: impl Fn([Chunk<T>; A]) -> [Chunk<T>; E] + Copy,
        (line, pixels): (&mut Vec<T>, &mut Aligned<T>),
        (panel, steps): (&mut [T], Steps),
    ) {
        line.resize(len, T::ZERO);
        for start in (0..channels).step_by(LANES) {
            pixels.resize((len + 1) * LANES, T::ZERO);
            pixels.fill(T::ZERO);
            for lane in 0..LANES.min(channels - start) {
                read(start + lane, line);
                lay(line, lane, pixels);
            }
            Arch::new().dispatch(Sweep(
                #[inline(always)]
                || transform(places, pixels, map, &mut panel[start..], steps),
            ));
        }
    }

    /// The tiles of some channels, in panels. `read` reads one of them.
    fn pack_all<T: Real, const A: usize>(
        &self,
        panels: &mut Aligned<T>,
        threads: &ScratchPool<Buffers<T>>,
        places: &[[[u32; A]; A]],
        (len, channels): (usize, usize),
        read: impl Fn(usize, &mut [T]) + Sync,
        map: impl Fn([Chunk<T>; A]) -> [Chunk<T>; E] + Copy + Sync,
    ) {
        let panel = E * E * self.tiles * PANEL;
        panels.resize(channels.div_ceil(PANEL) * panel, T::ZERO);
        panels
            .par_chunks_mut(panel)
            .enumerate()
            .for_each(|(index, panel)| {
                let first = index * PANEL;
                threads.with(|Buffers { line, pixels, .. }| {
                    self.pack(
                        places,
                        (len, PANEL.min(channels - first)),
                        |channel, line| read(first + channel, line),
                        map,
                        (line, pixels),
                        (panel, self.steps(PANEL)),
                    );
                });
            });
    }

    /// The input's tiles, of some channels from `first` on, in panels.
    fn pack_input<F: Element>(
        &self,
        panels: &mut Aligned<F::Real>,
        threads: &ScratchPool<Buffers<F::Real>>,
        places: &Places,
        input: &[F],
        (first, channels): (usize, usize),
    ) {
        let size = (places.images * places.len, channels);
        let read = |channel: usize, line: &mut [F::Real]| {
            read_input(self.geometry, places, input, first + channel, line);
        };
        self.pack_all(panels, threads, &places.inputs, size, read, self::input);
    }

    /// Sums of products over all panels, of the grid's columns: a row of kernels for each of the panels' channels.
    fn multiply<T: Real>(
        &self,
        panels: &[T],
        tiles: usize,
        kernels: &[[T; TAPS]],
        grid: Grid,
        (factors, sums): (&mut Aligned<T>, &mut Aligned<T>),
    ) {
        factors.resize(FACTORS, T::ZERO);
        sums.resize(E * E * self.tiles * SLICE, T::ZERO);
        let factor_steps = Steps {
            product: FACTOR_PRODUCT,
            tile: SLICE,
        };
        for (index, panel) in panels.chunks_exact(E * E * self.tiles * PANEL).enumerate() {
            let first = index * PANEL;
            let rows = PANEL.min(grid.rows - first);
            let (kernels, grid) = (&kernels[first * grid.row..], Grid { rows, ..grid });
            Arch::new().dispatch(Sweep(
                #[inline(always)]
                || transform_kernels(kernels, grid, factors, factor_steps),
            ));
            for ((panel, factors), target) in panel
                .chunks_exact(self.tiles * PANEL)
                .zip(factors.chunks_exact(FACTOR_PRODUCT))
                .zip(sums.chunks_exact_mut(self.tiles * SLICE))
            {
                Sums {
                    rows: tiles,
                    columns: grid.columns,
                    depth: rows,
                    a: panel,
                    row: PANEL,
                    step: 1,
                    b: factors,
                    pitch: SLICE,
                    target,
                    target_pitch: SLICE,
                    adds: index > 0,
                }
                .run();
            }
        }
    }

    /// Transforms sums back, and calls `add` for each of their channels.
    fn unpack<T: Real, const B: usize>(
        &self,
        places: &[[[u32; B]; B]],
        (len, channels): (usize, usize),
        map: impl Fn([Chunk<T>; E]) -> [Chunk<T>; B] + Copy,
        (line, pixels, sums): (&mut Vec<T>, &mut Aligned<T>, &[T]),
        mut add: impl FnMut(usize, &[T]),
    ) {
        line.resize(len, T::ZERO);
        for start in (0..channels).step_by(LANES) {
            pixels.resize((len + 1) * LANES, T::ZERO);
            pixels.fill(T::ZERO);
            Arch::new().dispatch(Sweep(
                #[inline(always)]
                || restore(places, pixels, map, &sums[start..], self.steps(SLICE)),
            ));
            for lane in 0..LANES.min(channels - start) {
                pick(pixels, lane, line);
                add(start + lane, line);
            }
        }
    }

    /// The parts of a group's channels that are transformed at a time: the first, and their number.
    fn parts(&self, channels: usize) -> impl Iterator<Item = (usize, usize)> + use<> {
        let step = self.channels;
        (0..channels)
            .step_by(step)
            .map(move |first| (first, step.min(channels - first)))
    }
}

/// Reads the values of a channel that a chunk's tiles read.
fn read_input<F: Element>(
    geometry: &Geometry,
    places: &Places,
    input: &[F],
    channel: usize,
    line: &mut [F::Real],
) {
    let plane = channel * geometry.input_plane() + places.start;
    let lines = line.chunks_exact_mut(places.len.max(1));
    for (image, line) in (places.first..).zip(lines) {
        let start = image * geometry.input_len() + plane;
        F::load(&input[start..][..places.len], line);
    }
}

impl<F: Element> ByChannels<F> for Slices<'_> {
    type Scratch = Scratch<F::Real>;

    fn geometry(&self) -> &Geometry {
        self.geometry
    }

    fn chunks(&self, span: Span) -> Vec<Span> {
        let len = self.chunk_len();
        span.chunks(self.images * self.geometry.positions())
            .flat_map(|block| block.chunks(len))
            .collect()
    }

    fn blocks(&self) -> Vec<Span> {
        let positions = self.geometry.positions();
        Span::all(self.geometry)
            .chunks(self.images * positions)
            .collect()
    }

    fn convolve(
        &self,
        scratch: &mut Self::Scratch,
        input: &[F],
        weight: &[F::Real],
        chunk: Span,
        rows: &mut Rows<F::Real>,
        column: usize,
    ) {
        let geometry = self.geometry;
        let (group_in, group_out) = (geometry.group_in(), geometry.group_out());
        let (kernels, _) = weight.as_chunks::<TAPS>();
        let pitch = rows.pitch;
        let Scratch {
            panels,
            places,
            threads,
        } = scratch;
        places.find(geometry, chunk);
        for group in 0..geometry.groups() {
            for (first, channels) in self.parts(group_in) {
                let part = (group * group_in + first, channels);
                self.pack_input(panels, threads, places, input, part);
                rows.values[group * group_out * pitch..][..group_out * pitch]
                    .par_chunks_mut(SLICE * pitch)
                    .enumerate()
                    .for_each(|(index, target)| {
                        threads.with(|buffers| {
                            let start = group * group_out + index * SLICE;
                            let grid = Grid {
                                rows: channels,
                                row: 1,
                                columns: target.len() / pitch,
                                column: group_in,
                            };
                            let Buffers {
                                line,
                                pixels,
                                factors,
                                sums,
                            } = buffers;
                            let kernels = &kernels[start * group_in + first..];
                            let tiles = places.outputs.len();
                            self.multiply(panels, tiles, kernels, grid, (factors, sums));
                            self.unpack(
                                &places.outputs,
                                (chunk.len, grid.columns),
                                output,
                                (line, pixels, sums),
                                |channel, line| {
                                    let target = &mut target[channel * pitch + column..];
                                    let target = &mut target[..chunk.len];
                                    match first {
                                        0 => target.copy_from_slice(line),
                                        _ => sweeps::add(Arch::new(), target, line),
                                    }
                                },
                            );
                        });
                    });
            }
        }
    }

    fn add_weight_grad(
        &self,
        scratch: &mut Self::Scratch,
        input: &[F],
        chunk: Span,
        rows: &Rows<F::Real>,
        column: usize,
        grad: &mut [F::Real],
    ) {
        let geometry = self.geometry;
        let (group_in, group_out) = (geometry.group_in(), geometry.group_out());
        let (kernels, _) = grad.as_chunks_mut::<TAPS>();
        let Scratch {
            panels,
            places,
            threads,
        } = scratch;
        places.find(geometry, chunk);
        for (group, kernels) in kernels.chunks_exact_mut(group_out * group_in).enumerate() {
            for (first, channels) in self.parts(group_in) {
                let part = (group * group_in + first, channels);
                self.pack_input(panels, threads, places, input, part);
                kernels
                    .par_chunks_mut(GRAD_SLICE * group_in)
                    .enumerate()
                    .for_each(|(index, kernels)| {
                        let start = group * group_out + index * GRAD_SLICE;
                        let outputs = kernels.len() / group_in;
                        threads.with(|buffers| {
                            self.slice_grad(
                                (panels, channels),
                                places,
                                (chunk.len, outputs),
                                |channel, line| {
                                    let row = &rows.values[(start + channel) * rows.pitch..];
                                    line.copy_from_slice(&row[column..][..chunk.len]);
                                },
                                buffers,
                                (&mut kernels[first..], group_in),
                            );
                        });
                    });
            }
        }
    }

    fn input_grad(
        &self,
        scratch: &mut Self::Scratch,
        weight: &[F::Real],
        scale: Option<&[F::Real]>,
        block: Span,
        rows: &Rows<F::Real>,
        grad: &mut Vec<F::Real>,
    ) {
        let geometry = self.geometry;
        let (group_in, group_out) = (geometry.group_in(), geometry.group_out());
        let (kernels, _) = weight.as_chunks::<TAPS>();
        let plane = geometry.input_plane();
        let row_len = block.len / geometry.positions() * plane;
        grad.clear();
        grad.resize(geometry.channels[0] * row_len, F::Real::ZERO);
        let Scratch {
            panels,
            places,
            threads,
        } = scratch;
        for chunk in ByChannels::<F>::chunks(self, block) {
            places.find(geometry, chunk);
            let at = (places.first - block.start / geometry.positions()) * plane + places.start;
            let (column, len) = (chunk.start - block.start, places.images * places.len);
            for (group, grad) in grad.chunks_exact_mut(group_in * row_len).enumerate() {
                for (first, channels) in self.parts(group_out) {
                    let start = group * group_out + first;
                    let read = |channel: usize, line: &mut [F::Real]| {
                        let row = &rows.values[(start + channel) * rows.pitch + column..];
                        line.copy_from_slice(&row[..chunk.len]);
                        if let Some(scale) = scale {
                            let scale = scale[start + channel];
                            line.iter_mut().for_each(|value| *value = *value * scale);
                        }
                    };
                    let size = (chunk.len, channels);
                    let map = output_transposed;
                    self.pack_all(panels, threads, &places.outputs, size, read, map);
                    grad.par_chunks_mut(SLICE * row_len)
                        .enumerate()
                        .for_each(|(index, grad)| {
                            threads.with(|buffers| {
                                let grid = Grid {
                                    rows: channels,
                                    row: group_in,
                                    columns: grad.len() / row_len,
                                    column: 1,
                                };
                                let Buffers {
                                    line,
                                    pixels,
                                    factors,
                                    sums,
                                } = buffers;
                                let kernels = &kernels[start * group_in + index * SLICE..];
                                let tiles = places.inputs.len();
                                self.multiply(panels, tiles, kernels, grid, (factors, sums));
                                self.unpack(
                                    &places.inputs,
                                    (len, grid.columns),
                                    input_transposed,
                                    (line, pixels, sums),
                                    |channel, line| {
                                        let grad = &mut grad[channel * row_len + at..][..len];
                                        sweeps::add(Arch::new(), grad, line);
                                    },
                                );
                            });
                        });
                }
            }
        }
    }
}

impl Slices<'_> {
    /// Adds a chunk's share of the gradient of some output channels' kernels, `pitch` apart, with the input's panels.
    /// `read` reads a channel of the output's gradient.
    fn slice_grad<T: Real>(
        &self,
        (panels, channels): (&[T], usize),
        places: &Places,
        (len, outputs): (usize, usize),
        read: impl Fn(usize, &mut [T]),
        buffers: &mut Buffers<T>,
        (kernels, pitch): (&mut [[T; TAPS]], usize),
    ) {
        let Buffers {
            line,
            pixels,
            factors,
            sums: tiles,
        } = buffers;
        factors.resize(FACTORS, T::ZERO);
        tiles.resize(E * E * self.tiles * SLICE, T::ZERO);
        self.pack(
            &places.outputs,
            (len, outputs),
            read,
            output_transposed,
            (line, pixels),
            (tiles, self.steps(GRAD_SLICE)),
        );
        let steps = Steps {
            product: GRAD_SLICE * PANEL + LINE,
            tile: PANEL,
        };
        let count = places.outputs.len();
        let panels = panels.chunks_exact(E * E * self.tiles * PANEL);
        for (index, panel) in panels.enumerate() {
            let first = index * PANEL;
            let grid = Grid {
                rows: outputs,
                row: pitch,
                columns: PANEL.min(channels - first),
                column: 1,
            };
            for ((panel, tiles), target) in panel
                .chunks_exact(self.tiles * PANEL)
                .zip(tiles.chunks_exact(self.tiles * GRAD_SLICE))
                .zip(factors.chunks_exact_mut(steps.product))
            {
                for start in (0..count).step_by(GRAD_TILES) {
                    Sums {
                        rows: outputs,
                        columns: grid.columns,
                        depth: GRAD_TILES.min(count - start),
                        a: &tiles[start * GRAD_SLICE..],
                        row: 1,
                        step: GRAD_SLICE,
                        b: &panel[start * PANEL..],
                        pitch: PANEL,
                        target,
                        target_pitch: PANEL,
                        adds: start > 0,
                    }
                    .run();
                }
            }
            let kernels = &mut kernels[first..];
            Arch::new().dispatch(Sweep(
                #[inline(always)]
                || add_kernels(factors, steps, kernels, grid),
            ));
        }
    }
}
