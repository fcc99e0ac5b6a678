//! Any convolution as products of packed operands, for weights that outweigh the activations.
//!
//! The inputs of a few output positions, their *patches*, are copied side by side for as many channels as fit
//! the second-level cache; taps that meet padding alone are left out. The output is made of sums of the patches'
//! rows, one for each tap of each channel; the weight's gradient of sums of patches; the input's of sums of the
//! weight's rows, added to the inputs' places. Neither weight nor gradient is copied as a whole: each thread copies
//! the rows of a few channels at a time.
//!
//! Threads divide the channels and not the images, so that one image is enough for all of them. Sums run over
//! the positions in order.

mod patches;

use pulp::Arch;
use rayon::prelude::*;

use super::channels::{ByChannels, Rows};
use super::span::Span;
use crate::scratch::{Aligned, ScratchPool};
use crate::simd::planes::{WIDEST, plane_len};
use crate::simd::prefetch_range;
use crate::simd::products::{ROWS, Sums};
use crate::simd::sweeps;
use crate::{Element, Geometry, Real};

/// Bytes of the patches of some channels: half of a second-level cache of 512 KiB.
const PATCH_BYTES: usize = 256 << 10;

/// Longest patches: a thread holds rows of the weight, and of its gradient, of as many values.
const WIDTH: usize = 1024;

/// Most bytes of the rows of a chunk of positions.
const ROW_BYTES: usize = 512 << 10;

/// Most positions of a chunk: the weight is read once for each.
const POSITIONS: usize = 128;

/// Output channels that a thread takes at a time; a multiple of [`ROWS`].
const CHANNELS: usize = 24;

/// Columns of the weight for the input's gradient that a thread takes at a time.
const WEIGHT_COLUMNS: usize = 144;

/// Rows of the weight of the same.
const WEIGHT_ROWS: usize = 128;

/// Rows by which a piece of the weight is asked for before it is copied: hardware does not foresee the next row's.
const AHEAD: usize = 8;

/// Fewest parts of the channels: as many threads are busy with any layer.
const PARTS: usize = 16;

/// A convolution prepared for any chunk of positions.
#[derive(Debug)]
pub(crate) struct Packed<'a> {
    geometry: &'a Geometry,
    /// The taps that meet the input of some output, in the weight's order: the index, and the offset of the input.
    taps: Vec<(usize, [usize; 3])>,
    /// Most positions of a chunk.
    positions: usize,
    /// Input channels whose patches are packed at a time, and the distance of the patches, or of their rows.
    channels: usize,
    pitch: usize,
    row_pitch: usize,
    /// Output channels, and input channels, that a thread takes at a time.
    outputs: usize,
    inputs: usize,
}

/// Buffers that the threads share, and those of each.
pub(crate) struct Scratch<E: Element> {
    patches: Aligned<E::Real>,
    /// For each tap, the inputs of a chunk.
    runs: Vec<Vec<Run>>,
    threads: ScratchPool<Buffers<E>>,
}

/// Neighbouring positions whose inputs are evenly spaced.
#[derive(Debug)]
struct Run {
    /// The first position of the chunk, and its input in the batch's first channel.
    at: usize,
    from: usize,
    len: usize,
}

/// Buffers of one thread.
#[derive(Default)]
struct Buffers<E: Element> {
    line: Vec<E>,
    places: Vec<(usize, usize)>,
    weight: Aligned<E::Real>,
    sums: Aligned<E::Real>,
}

impl<E: Element> Default for Scratch<E> {
    fn default() -> Self {
        Self {
            patches: Aligned::default(),
            runs: Vec::new(),
            threads: ScratchPool::new(),
        }
    }
}

impl<'a> Packed<'a> {
    /// Parts for a compute type of `size` bytes.
    pub(crate) fn new(geometry: &'a Geometry, size: usize) -> Self {
        let taps = meeting_taps(geometry);
        let (group_in, group_out) = (geometry.group_in(), geometry.group_out());
        let values = PATCH_BYTES / size;
        let columns = taps.len().max(1);
        let most = (values / columns).min(ROW_BYTES / size / geometry.channels_out());
        let most = (most / WIDEST * WIDEST).max(WIDEST);
        let positions = (geometry.batch() * geometry.positions())
            .min(POSITIONS)
            .min(most);
        let channels = ((values / positions).min(WIDTH) / columns).clamp(1, group_in);
        let channels = match channels / WIDEST * WIDEST {
            whole if channels < group_in && whole > 0 => whole,
            _ => channels,
        };
        let parts = |channels: usize, unit: usize| channels.div_ceil(PARTS).next_multiple_of(unit);
        // Parts change no bit, and rows of the weight are read in longer pieces where threads are few.
        let threads = (2 * rayon::current_num_threads()).min(PARTS);
        Self {
            geometry,
            positions,
            channels,
            pitch: plane_len(channels * columns),
            row_pitch: plane_len(positions),
            outputs: parts(group_out, ROWS).min(CHANNELS),
            inputs: group_in
                .div_ceil(threads)
                .next_multiple_of(WIDEST)
                .min(WEIGHT_COLUMNS / columns)
                .clamp(1, group_in),
            taps,
        }
    }
}

impl<E: Element> ByChannels<E> for Packed<'_> {
    type Scratch = Scratch<E>;

    fn geometry(&self) -> &Geometry {
        self.geometry
    }

    fn chunks(&self, span: Span) -> Vec<Span> {
        span.chunks(self.positions).collect()
    }

    fn blocks(&self) -> Vec<Span> {
        let positions = self.geometry.positions();
        let images = (self.positions / positions).max(1);
        Span::all(self.geometry)
            .chunks(images * positions)
            .collect()
    }

    fn convolve(
        &self,
        scratch: &mut Scratch<E>,
        input: &[E],
        weight: &[E::Real],
        chunk: Span,
        rows: &mut Rows<E::Real>,
        column: usize,
    ) {
        let group_out = self.geometry.group_out();
        let pitch = rows.pitch;
        self.find_runs(chunk, &mut scratch.runs);
        for group in 0..self.geometry.groups() {
            for first in (0..self.geometry.group_in()).step_by(self.channels) {
                let depth = self.pack_rows(scratch, input, chunk, group, first);
                let (patches, threads) = (&scratch.patches, &scratch.threads);
                rows.values[group * group_out * pitch..][..group_out * pitch]
                    .par_chunks_mut(self.outputs * pitch)
                    .enumerate()
                    .for_each(|(index, target)| {
                        threads.with(|buffers| {
                            let start = group * group_out + index * self.outputs;
                            let rows = target.len() / pitch;
                            let (a, row) = if self.has_all_taps() {
                                let from = start * self.geometry.depth() + first * self.kernel();
                                (&weight[from..], self.geometry.depth())
                            } else {
                                let factors = &mut buffers.weight;
                                factors.resize(self.outputs * self.pitch, E::Real::ZERO);
                                let targets = factors.chunks_exact_mut(self.pitch).take(rows);
                                for (row, factors) in targets.enumerate() {
                                    self.copy_weight(weight, start + row, first, depth, factors);
                                }
                                (&factors[..], self.pitch)
                            };
                            Sums {
                                rows,
                                columns: chunk.len,
                                depth,
                                a,
                                row,
                                step: 1,
                                b: patches,
                                pitch: self.row_pitch,
                                // Chunks are whole vectors but for the last, behind which a row has room.
                                target: &mut target[column..],
                                target_pitch: pitch,
                                adds: first > 0,
                            }
                            .run();
                        });
                    });
            }
        }
    }

    fn add_weight_grad(
        &self,
        scratch: &mut Scratch<E>,
        input: &[E],
        chunk: Span,
        rows: &Rows<E::Real>,
        column: usize,
        grad: &mut [E::Real],
    ) {
        let (group_out, depth) = (self.geometry.group_out(), self.geometry.depth());
        for group in 0..self.geometry.groups() {
            for first in (0..self.geometry.group_in()).step_by(self.channels) {
                let columns = self.pack(scratch, input, chunk, group, first);
                let (patches, threads) = (&scratch.patches, &scratch.threads);
                grad[group * group_out * depth..][..group_out * depth]
                    .par_chunks_mut(self.outputs * depth)
                    .enumerate()
                    .for_each(|(index, target)| {
                        threads.with(|buffers| {
                            let start = group * group_out + index * self.outputs;
                            let sums = Sums {
                                rows: target.len() / depth,
                                columns,
                                depth: chunk.len,
                                a: &rows.values[start * rows.pitch + column..],
                                row: rows.pitch,
                                step: 1,
                                b: patches,
                                pitch: self.pitch,
                                target: &mut [],
                                target_pitch: depth,
                                adds: true,
                            };
                            if self.has_all_taps() && columns.is_multiple_of(WIDEST) {
                                let target = &mut target[first * self.kernel()..];
                                return Sums { target, ..sums }.run();
                            }
                            let target_pitch = self.pitch;
                            buffers
                                .sums
                                .resize(self.outputs * target_pitch, E::Real::ZERO);
                            Sums {
                                target: &mut buffers.sums,
                                target_pitch,
                                adds: false,
                                ..sums
                            }
                            .run();
                            let sums = buffers.sums.chunks_exact(target_pitch);
                            for (target, sums) in target.chunks_exact_mut(depth).zip(sums) {
                                self.add_to_weight(&sums[..columns], first, target);
                            }
                        });
                    });
            }
        }
    }

    fn input_grad(
        &self,
        scratch: &mut Scratch<E>,
        weight: &[E::Real],
        scale: Option<&[E::Real]>,
        block: Span,
        rows: &Rows<E::Real>,
        grad: &mut Vec<E::Real>,
    ) {
        let (group_in, channels) = (self.geometry.group_in(), self.geometry.channels[0]);
        let images = block.len / self.geometry.positions();
        let len = images * self.geometry.input_plane();
        grad.clear();
        grad.resize(channels * len, E::Real::ZERO);
        for (group, grad) in grad.chunks_exact_mut(group_in * len).enumerate() {
            grad.par_chunks_mut(self.inputs * len)
                .enumerate()
                .for_each(|(index, grad)| {
                    let part = Part {
                        group,
                        first: index * self.inputs,
                        channels: grad.len() / len,
                        len,
                    };
                    scratch.threads.with(|buffers| {
                        for chunk in block.chunks(self.positions) {
                            self.weighted(buffers, weight, scale, (block, chunk), rows, &part);
                            self.add_to_input(buffers, (block, chunk), &part, grad);
                        }
                    });
                });
        }
    }
}

impl Packed<'_> {
    /// The gradients of the patches of a part's channels, into `buffers.sums`.
    fn weighted<E: Element>(
        &self,
        buffers: &mut Buffers<E>,
        weight: &[E::Real],
        scale: Option<&[E::Real]>,
        (block, chunk): (Span, Span),
        rows: &Rows<E::Real>,
        part: &Part,
    ) {
        let group_out = self.geometry.group_out();
        let columns = part.channels * self.taps.len();
        let pitch = plane_len(self.inputs * self.taps.len());
        buffers.sums.resize(self.positions * pitch, E::Real::ZERO);
        buffers.weight.resize(WEIGHT_ROWS * pitch, E::Real::ZERO);
        for start in (0..group_out).step_by(WEIGHT_ROWS) {
            let depth = WEIGHT_ROWS.min(group_out - start);
            let first = part.group * group_out + start;
            for (row, target) in buffers
                .weight
                .chunks_exact_mut(pitch)
                .enumerate()
                .take(depth)
            {
                let ahead = (first + row + AHEAD) * self.geometry.depth();
                let from = ahead + part.first * self.kernel();
                prefetch_range(weight, from..from + part.channels * self.kernel());
                self.copy_weight(weight, first + row, part.first, columns, target);
                if let Some(scale) = scale {
                    let scale = scale[first + row];
                    target[..columns]
                        .iter_mut()
                        .for_each(|value| *value = *value * scale);
                }
            }
            Sums {
                rows: chunk.len,
                columns,
                depth,
                a: &rows.values[first * rows.pitch + chunk.start - block.start..],
                row: 1,
                step: rows.pitch,
                b: &buffers.weight,
                pitch,
                target: &mut buffers.sums,
                target_pitch: pitch,
                adds: start > 0,
            }
            .run();
        }
    }

    /// Adds the gradients of patches to their inputs.
    fn add_to_input<E: Element>(
        &self,
        buffers: &mut Buffers<E>,
        (block, chunk): (Span, Span),
        part: &Part,
        grad: &mut [E::Real],
    ) {
        let plane = self.geometry.input_plane();
        let taps = self.taps.len();
        let pitch = plane_len(self.inputs * taps);
        let first = block.start / self.geometry.positions();
        let mut sums = buffers.sums.chunks_exact(pitch);
        for (image, positions) in chunk.parts(self.geometry) {
            for position in positions {
                self.find_places(position, &mut buffers.places);
                let sums = sums.next().expect("a row for each position");
                let start = (image - first) * plane;
                for (channel, grad) in grad.chunks_exact_mut(part.len).enumerate() {
                    let (sums, grad) =
                        (&sums[channel * taps..][..taps], &mut grad[start..][..plane]);
                    for (tap, place) in &buffers.places {
                        grad[*place] += sums[*tap];
                    }
                }
            }
        }
    }

    /// Copies `len` taps of one output channel, of the input channels from `first` on.
    fn copy_weight<T: Real>(
        &self,
        weight: &[T],
        channel: usize,
        first: usize,
        len: usize,
        target: &mut [T],
    ) {
        let kernel = self.kernel();
        let row = &weight[channel * self.geometry.depth() + first * kernel..];
        if self.has_all_taps() {
            target[..len].copy_from_slice(&row[..len]);
            return;
        }
        let targets = target[..len].chunks_exact_mut(self.taps.len().max(1));
        for (target, row) in targets.zip(row.chunks_exact(kernel)) {
            for (target, (tap, _)) in target.iter_mut().zip(&self.taps) {
                *target = row[*tap];
            }
        }
    }

    /// Adds sums to a row of the weight's gradient, of the input channels from `first` on.
    fn add_to_weight<T: Real>(&self, sums: &[T], first: usize, row: &mut [T]) {
        let kernel = self.kernel();
        let row = &mut row[first * kernel..];
        if self.has_all_taps() {
            sweeps::add(Arch::new(), &mut row[..sums.len()], sums);
            return;
        }
        let sums = sums.chunks_exact(self.taps.len().max(1));
        for (row, sums) in row.chunks_exact_mut(kernel).zip(sums) {
            for (sum, (tap, _)) in sums.iter().zip(&self.taps) {
                row[*tap] += *sum;
            }
        }
    }

    /// Whether every tap meets the input.
    fn has_all_taps(&self) -> bool {
        self.kernel() == self.taps.len()
    }

    fn kernel(&self) -> usize {
        self.geometry.kernel.iter().product()
    }
}

/// Input channels of a group, and the length of their rows.
struct Part {
    group: usize,
    first: usize,
    channels: usize,
    len: usize,
}

/// The taps that meet the input of some output: index and offset.
fn meeting_taps(geometry: &Geometry) -> Vec<(usize, [usize; 3])> {
    let meets = |dim: usize, offset: usize| {
        let (stride, padding) = (geometry.stride[dim], geometry.padding[dim].0);
        let places = (0..geometry.output[dim]).map(|at| at * stride + offset);
        places
            .filter_map(|place| place.checked_sub(padding))
            .any(|place| place < geometry.input[dim])
    };
    let [_, rows, columns] = geometry.kernel;
    (0..geometry.kernel.iter().product())
        .map(|tap: usize| {
            let at = [tap / columns / rows, tap / columns % rows, tap % columns];
            (
                tap,
                std::array::from_fn(|dim| at[dim] * geometry.dilation[dim]),
            )
        })
        .filter(|(_, offset): &(usize, [usize; 3])| (0..3).all(|dim| meets(dim, offset[dim])))
        .collect()
}
