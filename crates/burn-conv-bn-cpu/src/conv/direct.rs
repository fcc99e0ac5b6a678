//! Any convolution, as sums of planes: shifted ones or, in a layout without gaps, one for each tap. See
//! [`layout`](super::layout).

use std::mem::MaybeUninit;
use std::ops::RangeInclusive;

use pulp::Arch;

use super::layout::{Copy, Layout, Source, Tile};
use super::phases::{copy_runs, load_runs, split, store_runs, zero_gaps};
use super::tile::{Algorithm, Piece, Transposed};
use crate::blocks::{Block, Share};
use crate::scratch::Aligned;
use crate::simd::planes::{Filter, WIDEST, accumulate, correlate, plane_len, slack, taps_in_cache};
use crate::simd::prefetch_range;
use crate::simd::sweeps::{self, Sweep};
use crate::{Element, Geometry, Real};

/// Target size of a tile's planes, of input and output together, in bytes: most of a core's second-level
/// cache of 512 KiB or more. The weight's factors stream through the rest.
const TILE_BYTES: usize = 320 << 10;

/// Fewest positions of a tile. In smaller ones the reach of the shifts, copied for each tile, and the ends
/// of the blocks of sums weigh too much.
const LEAST_POSITIONS: usize = 256;

/// Most positions of a tile: those of six channels of gradients, which a block of the weight's gradient
/// reads again and again, are 24 KiB in single precision, three quarters of a first-level cache of 32 KiB.
const MOST_POSITIONS: usize = 1024;

const TILE_POSITIONS: RangeInclusive<usize> = LEAST_POSITIONS..=MOST_POSITIONS;

/// A convolution prepared for any number of blocks of images.
#[derive(Debug)]
pub(crate) struct Direct<'a, T> {
    geometry: &'a Geometry,
    layout: Layout<'a>,
    /// Most wide positions of a tile.
    tile: usize,
    /// Distance of the input's planes.
    plane: usize,
    /// Distance of the planes of the output, or of a gradient.
    pitch: usize,
    /// Offset of each tap's shifted plane, in the weight's order.
    offsets: Vec<usize>,
    /// The weight of each group.
    filters: Vec<Filter<T>>,
    /// For each group and phase, the taps of the input's gradient and their offsets in the output's
    /// gradient; empty if not requested.
    transposed: Vec<Vec<(Filter<T>, Vec<usize>)>>,
    centered: Option<Centered<T>>,
}

/// A pointwise convolution's input less a value of each channel, for `norm/gram`.
/// The weight's gradient is followed by the input's own products, `[channels_in, channels_in]`, and its sums.
#[derive(Debug)]
pub(crate) struct Centered<T> {
    pub(crate) origin: Vec<T>,
    pub(crate) correction: Option<Correction<T>>,
}

/// What is added to the input's gradient: a matrix times the input, and a constant of each channel.
#[derive(Debug)]
pub(crate) struct Correction<T> {
    pub(crate) matrix: Filter<T>,
    pub(crate) constants: Vec<T>,
}

/// Buffers of one thread, each for one tile.
#[derive(Debug, Default)]
pub(crate) struct Scratch<T> {
    /// The input's planes.
    planes: Aligned<T>,
    /// The output, or its gradient: behind [`Layout::reach`] positions of the preceding tile, and before as
    /// many zeros, or [`WIDEST`] if those are more.
    output: Aligned<T>,
    /// Copies of the output's gradient, in a layout without gaps.
    copies: Aligned<T>,
    /// The input's gradient at the positions of one phase.
    input_grad: Aligned<T>,
    /// A channel's even and odd values in each of the tile's images.
    halves: Aligned<T>,
    converted: Vec<T>,
}

impl<'a, T: Real> Direct<'a, T> {
    /// Planes and tiles, without the weight.
    pub(crate) fn new(geometry: &'a Geometry) -> Self {
        Self::of(geometry, Layout::new(geometry, TILE_POSITIONS))
    }

    /// Shifted planes, whatever the gaps.
    pub(crate) fn shifted(geometry: &'a Geometry) -> Self {
        Self::of(geometry, Layout::shifted(geometry))
    }

    /// Planes without gaps, unless they are too large.
    pub(crate) fn dense(geometry: &'a Geometry) -> Option<Self> {
        let layout = Layout::dense(geometry, TILE_POSITIONS)?;
        Some(Self::of(geometry, layout))
    }

    /// Whether there is a plane for each tap.
    pub(crate) fn is_dense(&self) -> bool {
        !self.layout.copies().is_empty()
    }

    fn of(geometry: &'a Geometry, layout: Layout<'a>) -> Self {
        let channels = geometry.group_in();
        let bytes = (layout.phases() * channels + geometry.group_out()) * size_of::<T>();
        // Room for an image that is not too large: its channels are contiguous, which reads faster than
        // pieces.
        let image = layout.positions(1);
        let whole = if image <= MOST_POSITIONS { image } else { 0 };
        let tile = (TILE_BYTES / bytes)
            .clamp(LEAST_POSITIONS, MOST_POSITIONS)
            .max(layout.reach())
            .max(whole);
        let slack = slack(geometry.group_in()).max(slack(geometry.group_out()));
        let plane = plane_len(tile + layout.reach() + slack);
        let phases = layout.phases();
        let offsets = (0..channels)
            .flat_map(|channel| {
                layout
                    .taps()
                    .iter()
                    .map(move |(phase, shift)| (channel * phases + phase) * plane + shift)
            })
            .collect();
        Self {
            geometry,
            tile,
            plane,
            pitch: plane_len(
                (tile + layout.reach()).max(layout.grad_positions(tile)) + layout.reach() + slack,
            ),
            layout,
            offsets,
            filters: Vec::new(),
            transposed: Vec::new(),
            centered: None,
        }
    }

    /// Subtracts a value of each channel of the input of a pointwise convolution.
    pub(crate) fn centered(mut self, centered: Centered<T>) -> Self {
        self.centered = Some(centered);
        self
    }

    /// Prepares the convolution, and that of its input's gradient, each if it is needed.
    pub(crate) fn with_weights(
        mut self,
        weight: Option<&[T]>,
        transposed: Option<Transposed<'_, T>>,
    ) -> Self {
        let (geometry, depth) = (self.geometry, self.geometry.depth());
        let (channels, taps) = (geometry.group_in(), self.layout.taps().len());
        let block = taps_in_cache(channels, taps, self.layout.lines(taps));
        self.filters = weight
            .unwrap_or_default()
            .chunks_exact(geometry.group_out() * depth)
            .map(|weight| {
                Filter::new(geometry.group_out(), depth, block, |tap| {
                    move |channel| weight[channel * depth + tap]
                })
            })
            .collect();
        if let Some(Transposed { weight, scale }) = transposed {
            self.transposed = weight
                .chunks_exact(geometry.group_out() * depth)
                .enumerate()
                .map(|(group, weight)| {
                    let first = group * geometry.group_out();
                    self.transposed(weight, scale.map(|scale| &scale[first..]))
                })
                .collect();
        }
        self
    }

    /// The transposed convolution of one group, by phases.
    fn transposed(&self, weight: &[T], scale: Option<&[T]>) -> Vec<(Filter<T>, Vec<usize>)> {
        let (group_in, group_out) = (self.geometry.group_in(), self.geometry.group_out());
        let depth = self.geometry.depth();
        let kernel = self.layout.taps().len();
        let phase = |taps: Vec<(usize, Source)>| {
            let copies = self.layout.copies().len();
            let offset = |channel: usize, source: Source| match source {
                Source::Back(shift) => channel * self.pitch + self.layout.reach() - shift,
                Source::Copy(copy) => (channel * copies + copy) * self.pitch,
            };
            let offsets = (0..group_out)
                .flat_map(|channel| taps.iter().map(move |(_, source)| offset(channel, *source)))
                .collect();
            let block = taps_in_cache(group_out, taps.len(), self.layout.lines(taps.len()));
            let filter = Filter::new(group_in, group_out * taps.len(), block, |index| {
                let (channel, (tap, _)) = (index / taps.len(), taps[index % taps.len()]);
                let weight = &weight[channel * depth + tap..];
                let scale = scale.map_or(T::ONE, |scale| scale[channel]);
                move |into| weight[into * kernel] * scale
            });
            (filter, offsets)
        };
        self.layout.transposed().into_iter().map(phase).collect()
    }

    /// Values of all images' halves.
    fn halves(&self) -> usize {
        if !self.layout.splits() {
            return 0;
        }
        self.tile / self.layout.unit() * 2 * self.layout.half()
    }

    /// Takes a channel's values apart, in each of the tile's images.
    #[inline(always)]
    fn split<E: Element<Real = T>>(
        &self,
        source: &[E],
        tile: &Tile,
        halves: &mut [T],
        converted: &mut Vec<T>,
    ) {
        let (plane, half) = (self.geometry.input_plane(), self.layout.half());
        for (image, halves) in tile.split.clone().zip(halves.chunks_exact_mut(2 * half)) {
            let start = image * self.geometry.input_len();
            prefetch_range(source, start + plane..start + 2 * plane);
            split(E::read(&source[start..][..plane], converted), halves, half);
        }
    }

    /// Fills the copies of the output's gradient, if the layout has any.
    fn copy(&self, scratch: &mut Scratch<T>, tile: &Tile) {
        let (copies, channels) = (self.layout.copies(), self.geometry.group_out());
        scratch
            .copies
            .resize(copies.len() * channels * self.pitch, T::ZERO);
        let images = tile.range.len() / self.layout.unit();
        let output = self.geometry.output;
        Arch::new().dispatch(Sweep(
            #[inline(always)]
            || {
                let planes = scratch.output.chunks_exact(self.pitch);
                let targets = scratch.copies.chunks_exact_mut(copies.len() * self.pitch);
                for (plane, targets) in planes.zip(targets) {
                    let targets = targets.chunks_exact_mut(self.pitch);
                    for (copy, target) in copies.iter().zip(targets) {
                        copy_shifted(copy, plane, output, images, target);
                    }
                }
            },
        ));
    }
}

impl<E: Element> Algorithm<E> for Direct<'_, E::Real> {
    type Tile = Tile;
    type Scratch = Scratch<E::Real>;

    fn geometry(&self) -> &Geometry {
        self.geometry
    }

    fn tile_bytes(&self, gradients: bool) -> usize {
        let (group_in, group_out) = (self.geometry.group_in(), self.geometry.group_out());
        let planes = self.layout.phases() * group_in * self.plane + group_out * self.pitch;
        let planes = planes + self.halves();
        let copies = self.layout.copies().len() * group_out + group_in;
        let copies = if gradients { copies * self.pitch } else { 0 };
        (planes + copies) * size_of::<E::Real>()
    }

    fn offset_bytes(&self, gradients: bool) -> usize {
        let taps = self.layout.taps().len();
        let transposed = if gradients {
            self.geometry.channels_out() * taps
        } else {
            0
        };
        (self.offsets.len() + transposed) * size_of::<usize>()
    }

    fn tiles(&self, block: &Block, has_halo: bool) -> Vec<(Tile, bool)> {
        let halo = has_halo.then(|| self.layout.halo(block)).flatten();
        let own = self.layout.tiles(block, self.tile).into_iter();
        halo.map(|tile| (tile, true))
            .into_iter()
            .chain(own.map(|tile| (tile, false)))
            .collect()
    }

    fn pieces<'a>(&self, tile: &'a Tile) -> &'a [Piece] {
        &tile.pieces
    }

    fn load(&self, scratch: &mut Self::Scratch, input: &[E], group: usize, tile: &Tile) {
        let channels = self.geometry.group_in();
        let len = self.layout.phases() * channels * self.plane;
        scratch.planes.resize(len, E::Real::ZERO);
        scratch.halves.resize(self.halves(), E::Real::ZERO);
        let plane = self.geometry.input_plane();
        let first = group * channels * plane;
        // Dot products read that far; what sums read behind it goes into no result.
        let end = tile.range.len() + self.layout.reach() + WIDEST;
        Arch::new().dispatch(Sweep(
            #[inline(always)]
            || {
                let step = self.layout.step();
                for channel in 0..channels {
                    let source = &input[first + channel * plane..];
                    let start = channel * tile.input.len() * self.plane;
                    let targets = scratch.planes[start..].chunks_exact_mut(self.plane);
                    if self.layout.splits() {
                        self.split(source, tile, &mut scratch.halves, &mut scratch.converted);
                        for (runs, target) in tile.input.iter().zip(targets) {
                            copy_runs(&scratch.halves, runs, &mut target[..end]);
                        }
                        continue;
                    }
                    // The next channel's lines, of several phases those of the first.
                    for run in tile.input.iter().take(1).flatten() {
                        let start = plane + run.dense;
                        prefetch_range(source, start..start + (run.len - 1) * step + 1);
                    }
                    for (runs, target) in tile.input.iter().zip(targets) {
                        let target = &mut target[..end];
                        load_runs(source, runs, step, target, &mut scratch.converted);
                        if let Some(centered) = &self.centered {
                            let origin = centered.origin[channel];
                            for value in &mut target[..tile.range.len()] {
                                *value = *value - origin;
                            }
                        }
                    }
                }
            },
        ));
    }

    fn convolve(&self, scratch: &mut Self::Scratch, group: usize, tile: &Tile) {
        let len = self.geometry.group_out() * self.pitch;
        scratch.output.resize(len, E::Real::ZERO);
        correlate(
            &self.filters[group],
            &scratch.planes,
            &self.offsets,
            &mut scratch.output[self.layout.reach()..],
            self.pitch,
            tile.range.len(),
            false,
        );
    }

    fn gather(
        &self,
        scratch: &mut Self::Scratch,
        tile: &Tile,
        piece: usize,
        channel: usize,
        line: &mut [E::Real],
    ) {
        let plane = &scratch.output[channel * self.pitch + self.layout.reach()..];
        Arch::new().dispatch(Sweep(
            #[inline(always)]
            || {
                let mut start = 0;
                for run in &tile.output[tile.runs[piece].clone()] {
                    sweeps::copy(&plane[run.wide..][..run.len], &mut line[start..][..run.len]);
                    start += run.len;
                }
            },
        ));
    }

    fn begin(&self, scratch: &mut Self::Scratch) {
        let len = self.geometry.group_out() * self.pitch;
        scratch.output.resize(len, E::Real::ZERO);
        for plane in scratch.output.chunks_exact_mut(self.pitch) {
            plane[..self.layout.reach()].fill(E::Real::ZERO);
        }
    }

    fn scatter(
        &self,
        scratch: &mut Self::Scratch,
        tile: &Tile,
        piece: usize,
        channel: usize,
        line: &[E::Real],
    ) {
        let plane = &mut scratch.output[channel * self.pitch + self.layout.reach()..];
        Arch::new().dispatch(Sweep(
            #[inline(always)]
            || {
                let mut start = 0;
                for run in &tile.output[tile.runs[piece].clone()] {
                    sweeps::copy(&line[start..][..run.len], &mut plane[run.wide..][..run.len]);
                    start += run.len;
                }
            },
        ));
    }

    fn seal(&self, scratch: &mut Self::Scratch, tile: &Tile, channel: usize) {
        let reach = self.layout.reach();
        let plane = &mut scratch.output[channel * self.pitch + reach..];
        zero_gaps(
            &tile.output,
            &mut plane[..tile.range.len() + reach.max(WIDEST)],
        );
    }

    fn weight_grad_len(&self) -> usize {
        let channels = self.geometry.channels[0];
        let of_input = match &self.centered {
            Some(_) => channels * (channels + 1),
            None => 0,
        };
        self.geometry.weight_len() + of_input
    }

    fn add_weight_grad(&self, scratch: &mut Self::Scratch, tile: &Tile, sums: &mut [E::Real]) {
        let (weight, of_input) = sums.split_at_mut(match &self.centered {
            Some(_) => self.geometry.weight_len(),
            None => sums.len(),
        });
        let (planes, positions) = (&scratch.planes, tile.range.len());
        let output = &scratch.output[self.layout.reach()..];
        accumulate(weight, output, self.pitch, planes, &self.offsets, positions);
        if of_input.is_empty() {
            return;
        }
        let channels = self.geometry.channels[0];
        let (products, sums) = of_input.split_at_mut(channels * channels);
        accumulate(
            products,
            planes,
            self.plane,
            planes,
            &self.offsets,
            positions,
        );
        Arch::new().dispatch(Sweep(
            #[inline(always)]
            || {
                for (sum, plane) in sums.iter_mut().zip(planes.chunks_exact(self.plane)) {
                    *sum += sweeps::sum(&plane[..positions]);
                }
            },
        ));
    }

    fn input_grad_reads_input(&self) -> bool {
        self.centered.is_some()
    }

    fn weight_grad(&self, sums: Vec<E::Real>, grad: &mut Vec<E::Real>) {
        *grad = sums;
    }

    fn input_grad(
        &self,
        scratch: &mut Self::Scratch,
        group: usize,
        tile: &Tile,
        grad: Option<&mut Share<'_, MaybeUninit<E>>>,
    ) {
        if let Some(grad) = grad {
            if group == 0 && tile.is_first && !self.layout.covers_input() {
                grad.fill(MaybeUninit::new(E::default()));
            }
            self.write_input_grad(scratch, group, tile, grad);
        }
        // The next tile's shifts reach back into this one.
        let (reach, end) = (self.layout.reach(), tile.range.len());
        for plane in scratch.output.chunks_exact_mut(self.pitch) {
            plane.copy_within(end..end + reach, 0);
        }
    }
}

impl<T: Real> Direct<'_, T> {
    /// The part of [`Algorithm::input_grad`] that writes.
    fn write_input_grad<E: Element<Real = T>>(
        &self,
        scratch: &mut Scratch<T>,
        group: usize,
        tile: &Tile,
        grad: &mut Share<'_, MaybeUninit<E>>,
    ) {
        let (channels, plane) = (self.geometry.group_in(), self.geometry.input_plane());
        let len = channels * self.pitch;
        scratch.input_grad.resize(len, T::ZERO);
        let source = match self.layout.copies() {
            [] => &scratch.output,
            _ => {
                self.copy(scratch, tile);
                &scratch.copies
            }
        };
        let centered = self.centered.as_ref();
        let correction = centered.and_then(|centered| centered.correction.as_ref());
        for ((filter, offsets), runs) in self.transposed[group].iter().zip(&tile.grad) {
            let positions = runs.last().map_or(0, |run| run.wide + run.len);
            let target = &mut scratch.input_grad;
            if let Some(Correction { constants, .. }) = correction {
                for (row, constant) in target.chunks_exact_mut(self.pitch).zip(constants) {
                    row[..positions].fill(*constant);
                }
            }
            let adds = correction.is_some();
            correlate(filter, source, offsets, target, self.pitch, positions, adds);
            if let Some(Correction { matrix, .. }) = correction {
                let planes = &scratch.planes;
                correlate(
                    matrix,
                    planes,
                    &self.offsets,
                    target,
                    self.pitch,
                    positions,
                    adds,
                );
            }
            for (index, values) in scratch.input_grad.chunks_exact(self.pitch).enumerate() {
                let target = grad.channel((group * channels + index) * plane);
                store_runs(values, runs, self.layout.step(), target);
            }
        }
    }
}

/// Copies the shifted gradient of some images' outputs. Positions outside of it stay zero: they are the
/// same in every tile.
#[inline(always)]
fn copy_shifted<T: Real>(
    copy: &Copy,
    source: &[T],
    output: [usize; 3],
    images: usize,
    target: &mut [T],
) {
    let place = |dim: usize, at: usize| at.saturating_add_signed(copy.shifts[dim]);
    let [slices, rows, columns] = [0, 1, 2].map(|dim| {
        let (extent, shift) = (copy.extents[dim], copy.shifts[dim]);
        let start = shift.min(0).unsigned_abs();
        start..extent.min(output[dim].saturating_add_signed(-shift))
    });
    // Nothing to copy, and perhaps no place to copy from: a phase may be padding alone.
    if columns.is_empty() {
        return;
    }
    for image in 0..images {
        for slice in slices.clone() {
            for row in rows.clone() {
                let to = (image * copy.extents[0] + slice) * copy.extents[1] + row;
                let from = (image * output[0] + place(0, slice)) * output[1] + place(1, row);
                let source = &source[from * output[2] + place(2, columns.start)..];
                let target = &mut target[to * copy.extents[2] + columns.start..];
                sweeps::copy(&source[..columns.len()], &mut target[..columns.len()]);
            }
        }
    }
}
