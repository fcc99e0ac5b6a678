//! The layout of images in scratch in which a convolution is a sum of planes.
//!
//! An image is copied once, with its padding, into planes with the row pitch of the output. The inputs of
//! one tap of the kernel are then the plane itself, shifted: for output position `p` in this wide layout,
//! the tap at row `i` and column `j` reads `plane[p + i * pitch + j]`. A convolution is a sum of shifted
//! planes, its input gradient is one too, and its weight gradient consists of dot products with shifted
//! planes.
//!
//! With a stride, the planes hold every stride-th row and column: a plane for each *phase*, that is, for
//! each remainder of the taps' offsets by the stride. The shifts of the planes are those of a convolution of
//! stride 1, and no product is wasted.
//!
//! Some wide positions are no output: those at the end of a row whose patch wraps into the next row. Their
//! values are dropped in forward and zero in backward. Where both ends of a row are padded, the end of a row
//! and the start of the next share a run of zeros. Depth slices and the images of a block follow one another
//! in the same way, so that a tile may hold several small images.
//!
//! Small images have many such positions: 49 outputs in 64. With enough channels to outweigh more copies,
//! and not so many that the copies outgrow the caches, small images have a layout without gaps: a plane for
//! each tap, of its inputs at the outputs alone (the patches of one tile), and tiles of whole images. The
//! input gradient is then a sum of copies of the output's gradient, one for each shift.

use std::ops::{Range, RangeInclusive};

use super::phases::{Run, combined, filled, push, remainders};
use super::tile::Piece;
use crate::Geometry;
use crate::blocks::Block;

/// Fewest channels, in and out, for which a layout without gaps outweighs its copies.
const LEAST_CHANNELS: usize = 64;

/// Most outputs for each position in a gap for which the layout without gaps outweighs its copies.
const GAPS: usize = 16;

/// Fewest outputs for each position in a gap for which shifted planes are faster than packed products.
const FEW_GAPS: usize = 4;

/// Most values of a tile's planes without gaps, and of its copies: 8 MiB of each in single precision.
/// Every thread has a tile; many taps of many channels would make it larger than the activations.
const MOST_VALUES: usize = 2 << 20;

/// The wide layout of a geometry's images.
#[derive(Debug)]
pub(crate) struct Layout<'a> {
    geometry: &'a Geometry,
    /// Slices of an image, rows of a slice, values of a row.
    wide: [usize; 3],
    /// For each plane, the offset of its inputs from their outputs: the remainders of the taps' offsets or,
    /// without gaps, all of the taps' offsets.
    phases: Vec<[usize; 3]>,
    /// For each tap of the kernel, in the weight's order, its phase and shift.
    taps: Vec<(usize, usize)>,
    /// The largest shift in each dimension, and of all.
    reaches: [usize; 3],
    reach: usize,
    /// The copies of the input's gradient, in a layout without gaps.
    copies: Option<Copies>,
}

/// The input's gradient in a layout without gaps: for each remainder of the taps' offsets, its positions
/// are dense, and a sum over copies of the output's gradient.
#[derive(Debug)]
pub(crate) struct Copies {
    pub(crate) copies: Vec<Copy>,
    phases: Vec<DensePhase>,
}

/// The output's gradient, shifted and cut to the extents of a phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Copy {
    /// Extents of the copy of one image.
    pub(crate) extents: [usize; 3],
    /// From a position in the copy to that in the gradient, possibly outside of it.
    pub(crate) shifts: [isize; 3],
}

/// The input at every stride-th position from `start` on.
#[derive(Debug)]
struct DensePhase {
    start: [usize; 3],
    extents: [usize; 3],
    /// Its taps, and the copy of the gradient for each.
    taps: Vec<(usize, usize)>,
}

/// The values of a range of wide positions in memory.
#[derive(Debug)]
pub(crate) struct Tile {
    /// Wide positions of the output, from the first of the block's images on.
    pub(crate) range: Range<usize>,
    /// Whether it is the block's first.
    pub(crate) is_first: bool,
    /// Of the input, for each phase: the inputs of the tile's outputs.
    pub(crate) input: Vec<Vec<Run>>,
    /// Images that are split.
    pub(crate) split: Range<usize>,
    /// Of the output.
    pub(crate) output: Vec<Run>,
    pub(crate) pieces: Vec<Piece>,
    /// The output's runs of each piece.
    pub(crate) runs: Vec<Range<usize>>,
    /// Of the input, for each phase of its gradient: the values that this tile completes.
    pub(crate) grad: Vec<Vec<Run>>,
}

/// The output's gradient of a tap of the input's gradient.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Source {
    /// In the output's planes, so many positions back.
    Back(usize),
    /// In a copy.
    Copy(usize),
}

impl<'a> Layout<'a> {
    /// The layout that is likely to be faster, with a range for the positions of a tile.
    pub(crate) fn new(geometry: &'a Geometry, tile: RangeInclusive<usize>) -> Self {
        let shifted = Self::shifted(geometry);
        let outweighs = shifted.gaps() * GAPS >= geometry.positions()
            && geometry.group_in().min(geometry.group_out()) >= LEAST_CHANNELS;
        let dense = outweighs.then(|| Self::dense(geometry, tile)).flatten();
        dense.unwrap_or(shifted)
    }

    /// Positions of an image that are no output.
    fn gaps(&self) -> usize {
        self.wide.iter().product::<usize>() - self.geometry.positions()
    }

    /// A plane for each phase, with the taps' shifts.
    pub(crate) fn shifted(geometry: &'a Geometry) -> Self {
        let (stride, kernel, dilation) = (geometry.stride, geometry.kernel, geometry.dilation);
        let each = [0, 1, 2].map(|dim| remainders(geometry, dim));
        let phases = combined(&each);

        let reaches: [usize; 3] =
            std::array::from_fn(|dim| (kernel[dim] - 1) * dilation[dim] / stride[dim]);
        let mut wide = [0; 3];
        for dim in 0..3 {
            let extent = geometry.output[dim] + reaches[dim];
            // Zeros that the end of one row and the start of the next share.
            let shared = each[dim].iter().map(|phase| {
                let filled = filled(geometry, dim, *phase);
                filled.start.min(extent.saturating_sub(filled.end))
            });
            wide[dim] = extent - shared.min().unwrap_or(0).min(reaches[dim]);
        }

        let mut taps = Vec::new();
        for depth in 0..kernel[0] {
            for row in 0..kernel[1] {
                for column in 0..kernel[2] {
                    let tap = [depth, row, column];
                    let offset: [usize; 3] = std::array::from_fn(|dim| tap[dim] * dilation[dim]);
                    let phase: [usize; 3] = std::array::from_fn(|dim| offset[dim] % stride[dim]);
                    let shift: [usize; 3] = std::array::from_fn(|dim| offset[dim] / stride[dim]);
                    let index = phases.iter().position(|other| *other == phase);
                    let index = index.expect("the phases are the taps' remainders");
                    taps.push((index, (shift[0] * wide[1] + shift[1]) * wide[2] + shift[2]));
                }
            }
        }
        let reach = taps.iter().map(|(_, shift)| *shift).max().unwrap_or(0);
        Self {
            geometry,
            wide,
            phases,
            taps,
            reaches,
            reach,
            copies: None,
        }
    }

    /// A plane for each tap, unless there are no gaps anyway, images are larger than a tile or planes too large.
    pub(crate) fn dense(geometry: &'a Geometry, tile: RangeInclusive<usize>) -> Option<Self> {
        let positions = geometry.positions();
        let taps = geometry.kernel.iter().product::<usize>();
        let planes = taps.saturating_mul(geometry.group_in().max(geometry.group_out()));
        let values = planes.saturating_mul(positions.max(*tile.start()));
        let has_gaps = Self::shifted(geometry).gaps() > 0;
        if !has_gaps || positions > *tile.end() || values > MOST_VALUES {
            return None;
        }
        let offsets = [0, 1, 2].map(|dim| {
            (0..geometry.kernel[dim])
                .map(|tap| tap * geometry.dilation[dim])
                .collect()
        });
        let phases = combined(&offsets);
        Some(Self {
            geometry,
            wide: geometry.output,
            taps: (0..phases.len()).map(|tap| (tap, 0)).collect(),
            copies: Some(Copies::new(geometry, &phases)),
            phases,
            reaches: [0; 3],
            reach: 0,
        })
    }

    /// Copies of the output's gradient, in a layout without gaps.
    pub(crate) fn copies(&self) -> &[Copy] {
        self.copies.as_ref().map_or(&[], |copies| &copies.copies)
    }

    /// Number that divides a tile's positions.
    pub(crate) fn unit(&self) -> usize {
        match &self.copies {
            Some(_) => self.geometry.positions(),
            None => 1,
        }
    }

    /// Most positions of the input's gradient in one phase, for a tile of `tile` positions.
    pub(crate) fn grad_positions(&self, tile: usize) -> usize {
        match &self.copies {
            Some(copies) => tile / self.unit() * copies.largest(),
            None => tile + self.reach,
        }
    }

    /// For each phase of the input's gradient, its taps and their sources.
    pub(crate) fn transposed(&self) -> Vec<Vec<(usize, Source)>> {
        if let Some(copies) = &self.copies {
            let phases = copies.phases.iter();
            return phases
                .map(|phase| {
                    let taps = phase.taps.iter();
                    taps.map(|(tap, copy)| (*tap, Source::Copy(*copy)))
                        .collect()
                })
                .collect();
        }
        (0..self.phases())
            .map(|phase| {
                let taps = self.taps.iter().enumerate();
                taps.filter(|(_, (of, _))| *of == phase)
                    .map(|(tap, (_, shift))| (tap, Source::Back(*shift)))
                    .collect()
            })
            .collect()
    }

    /// Lines of a plane that `taps` taps of one channel read.
    pub(crate) fn lines(&self, taps: usize) -> usize {
        match &self.copies {
            Some(_) => taps,
            None => taps.min(self.geometry.kernel[0] * self.geometry.kernel[1]),
        }
    }

    /// Number of phases.
    pub(crate) fn phases(&self) -> usize {
        self.phases.len()
    }

    /// For each tap of the kernel, in the weight's order, its phase and shift.
    pub(crate) fn taps(&self) -> &[(usize, usize)] {
        &self.taps
    }

    /// The largest shift.
    pub(crate) fn reach(&self) -> usize {
        self.reach
    }

    /// Distance in memory of neighbours in the input's wide rows.
    pub(crate) fn step(&self) -> usize {
        self.geometry.stride[2]
    }

    /// Whether an image's even and odd values are taken apart before they are copied to planes: with stride 2, and a plane
    /// for each tap, a value is copied to several planes.
    pub(crate) fn splits(&self) -> bool {
        self.copies.is_some() && self.step() == 2
    }

    /// Even values of a channel of an image.
    pub(crate) fn half(&self) -> usize {
        self.geometry.input_plane().div_ceil(2)
    }

    /// Whether each value of the input has a wide position; the others have no tap.
    pub(crate) fn covers_input(&self) -> bool {
        let geometry = self.geometry;
        let all_phases: usize = geometry.stride.iter().product();
        if let Some(copies) = &self.copies {
            return copies.phases.len() == all_phases;
        }
        self.phases.len() == all_phases
            && (0..3).all(|dim| {
                let extent = geometry.output[dim] + self.reaches[dim];
                extent * geometry.stride[dim] >= geometry.input[dim] + geometry.padding[dim].0
            })
    }

    /// Wide positions from the first output to the last of a block of images.
    pub(crate) fn positions(&self, images: usize) -> usize {
        let [slices, rows, pitch] = self.wide;
        let output = self.geometry.output;
        let last_row = ((images - 1) * slices + output[0] - 1) * rows + output[1] - 1;
        last_row * pitch + output[2]
    }

    /// Wide positions of a block, from the first of its images on.
    fn range(&self, block: &Block) -> Range<usize> {
        let end = self.positions(block.images.len());
        let Some(band) = &block.band else {
            return 0..end;
        };
        let dim = self.geometry.outermost();
        let line: usize = self.wide[dim + 1..].iter().product();
        let is_last = band.lines.end == self.geometry.output[dim];
        let band_end = band.lines.end * line;
        band.lines.start * line..if is_last { end } else { band_end }
    }

    /// The tiles of a block, of at most `len` wide positions each.
    pub(crate) fn tiles(&self, block: &Block, len: usize) -> Vec<Tile> {
        let (range, unit) = (self.range(block), self.unit());
        let units = range.len().div_ceil(unit);
        let count = units.div_ceil((len / unit).max(1));
        let len = units.div_ceil(count) * unit;
        range
            .clone()
            .step_by(len)
            .map(|start| {
                let tile = start..(start + len).min(range.end);
                self.tile(block.images.len(), tile, start == range.start)
            })
            .collect()
    }

    /// The positions before a band whose gradients its shifts reach.
    pub(crate) fn halo(&self, block: &Block) -> Option<Tile> {
        let end = self.range(block).start;
        let range = end.saturating_sub(self.reach)..end;
        (!range.is_empty()).then(|| self.tile(block.images.len(), range, false))
    }

    fn tile(&self, images: usize, range: Range<usize>, is_first: bool) -> Tile {
        let unit = self.unit();
        let reached = range.start..range.end + self.reach;
        let grad = match &self.copies {
            Some(copies) => copies.runs(self.geometry, range.start / unit..range.end / unit),
            None => {
                let is_last = range.end == self.positions(images);
                let end = if is_last { reached.end } else { range.end };
                self.input_runs(images, &(range.start..end))
            }
        };
        let output = self.output_runs(images, &range);
        let (pieces, runs) = pieces(&output);
        let mut input = self.input_runs(images, &reached);
        let mut split = 0..0;
        if self.splits() {
            split = range.start / unit..range.end / unit;
            for run in input.iter_mut().flatten() {
                run.dense = self.place_in_halves(run.dense, split.start);
            }
        }
        Tile {
            input,
            split,
            is_first,
            pieces,
            runs,
            output,
            grad,
            range,
        }
    }

    /// Place of a value of channel 0 in the halves of the images from `first` on.
    fn place_in_halves(&self, dense: usize, first: usize) -> usize {
        let len = self.geometry.input_len();
        let (image, value) = (dense / len - first, dense % len);
        (2 * image + value % 2) * self.half() + value / 2
    }

    /// Each wide row that has positions in `range`: image, slice, row and columns.
    fn rows(
        &self,
        range: &Range<usize>,
    ) -> impl Iterator<Item = ([usize; 3], usize, Range<usize>)> + use<> {
        let [slices, rows, pitch] = self.wide;
        let range = range.clone();
        (range.start / pitch..range.end.div_ceil(pitch)).map(move |row| {
            let columns =
                range.start.saturating_sub(row * pitch)..(range.end - row * pitch).min(pitch);
            let at = [row / (rows * slices), row / rows % slices, row % rows];
            (at, row * pitch, columns)
        })
    }

    fn output_runs(&self, images: usize, range: &Range<usize>) -> Vec<Run> {
        let [slices, rows, width] = self.geometry.output;
        let mut runs = Vec::new();
        for ([image, slice, row], start, columns) in self.rows(range) {
            if image >= images || slice >= slices || row >= rows {
                continue;
            }
            let dense = image * self.geometry.output_len() + (slice * rows + row) * width;
            let run = Run {
                wide: (start + columns.start) - range.start,
                dense: dense + columns.start,
                len: columns.end.min(width).saturating_sub(columns.start),
            };
            push(&mut runs, run, 1);
        }
        runs
    }

    /// For each phase, the values of the input at the wide positions of `range`.
    fn input_runs(&self, images: usize, range: &Range<usize>) -> Vec<Vec<Run>> {
        let phases = self.phases.iter();
        phases
            .map(|phase| self.phase_runs(*phase, images, range))
            .collect()
    }

    fn phase_runs(&self, phase: [usize; 3], images: usize, range: &Range<usize>) -> Vec<Run> {
        let geometry = self.geometry;
        let [_, height, width] = geometry.input;
        let position = |dim: usize, index: usize| {
            (index * geometry.stride[dim] + phase[dim])
                .checked_sub(geometry.padding[dim].0)
                .filter(|position| *position < geometry.input[dim])
        };
        let (stride, padding) = (geometry.stride[2], geometry.padding[2].0);
        let filled = filled(geometry, 2, phase[2]);
        let mut runs = Vec::new();
        for ([image, slice, row], start, columns) in self.rows(range) {
            let (Some(slice), Some(row), true) =
                (position(0, slice), position(1, row), image < images)
            else {
                continue;
            };
            let columns = columns.start.max(filled.start)..columns.end.min(filled.end);
            if columns.is_empty() {
                continue;
            }
            let dense = image * geometry.input_len()
                + (slice * height + row) * width
                + (columns.start * stride + phase[2] - padding);
            let run = Run {
                wide: (start + columns.start) - range.start,
                dense,
                len: columns.len(),
            };
            push(&mut runs, run, stride);
        }
        runs
    }
}

impl Copies {
    /// `offsets` are those of all taps.
    fn new(geometry: &Geometry, offsets: &[[usize; 3]]) -> Self {
        let mut copies = Vec::new();
        let phases = combined(&[0, 1, 2].map(|dim| remainders(geometry, dim)))
            .into_iter()
            .map(|phase| {
                let filled = [0, 1, 2].map(|dim| filled(geometry, dim, phase[dim]));
                let extents = filled.clone().map(|filled| filled.len());
                let meets = |offset: &[usize; 3]| {
                    (0..3).all(|dim| offset[dim] % geometry.stride[dim] == phase[dim])
                };
                let taps = offsets
                    .iter()
                    .enumerate()
                    .filter(|(_, offset)| meets(offset));
                let taps = taps.map(|(tap, offset)| {
                    let copy = Copy {
                        extents,
                        shifts: std::array::from_fn(|dim| {
                            let shift = offset[dim] / geometry.stride[dim];
                            filled[dim].start as isize - shift as isize
                        }),
                    };
                    let known = copies.iter().position(|other| *other == copy);
                    let index = known.unwrap_or_else(|| {
                        copies.push(copy);
                        copies.len() - 1
                    });
                    (tap, index)
                });
                DensePhase {
                    taps: taps.collect(),
                    start: std::array::from_fn(|dim| {
                        filled[dim].start * geometry.stride[dim] + phase[dim]
                            - geometry.padding[dim].0
                    }),
                    extents,
                }
            })
            .collect();
        Self { copies, phases }
    }

    /// Most values of a phase of one image.
    fn largest(&self) -> usize {
        let extents = self.phases.iter().map(|phase| phase.extents);
        extents
            .map(|extents| extents.iter().product())
            .max()
            .unwrap_or(0)
    }

    /// For each phase, the runs of its values in some images.
    fn runs(&self, geometry: &Geometry, images: Range<usize>) -> Vec<Vec<Run>> {
        let [_, height, width] = geometry.input;
        let phases = self.phases.iter();
        phases
            .map(|phase| {
                let [slices, rows, columns] = phase.extents;
                let mut runs = Vec::new();
                for (index, image) in images.clone().enumerate() {
                    for slice in 0..slices {
                        for row in 0..rows {
                            let at = phase.start[0] + slice * geometry.stride[0];
                            let line = at * height + phase.start[1] + row * geometry.stride[1];
                            let run = Run {
                                wide: ((index * slices + slice) * rows + row) * columns,
                                dense: image * geometry.input_len() + line * width + phase.start[2],
                                len: columns,
                            };
                            push(&mut runs, run, geometry.stride[2]);
                        }
                    }
                }
                runs
            })
            .collect()
    }
}

/// Whether shifted planes are mostly outputs.
pub(super) fn has_few_gaps(geometry: &Geometry) -> bool {
    Layout::shifted(geometry).gaps() * FEW_GAPS <= geometry.positions()
}

/// Pieces of contiguous runs, and the range of runs of each.
fn pieces(runs: &[Run]) -> (Vec<Piece>, Vec<Range<usize>>) {
    let mut pieces: Vec<Piece> = Vec::new();
    let mut ranges: Vec<Range<usize>> = Vec::new();
    for (index, run) in runs.iter().enumerate() {
        match (pieces.last_mut(), ranges.last_mut()) {
            (Some(piece), Some(range)) if piece.start + piece.len == run.dense => {
                piece.len += run.len;
                range.end += 1;
            }
            _ => {
                pieces.push(Piece {
                    start: run.dense,
                    len: run.len,
                });
                ranges.push(index..index + 1);
            }
        }
    }
    (pieces, ranges)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry(channels: [usize; 2], input: [usize; 3], kernel: [usize; 3]) -> Geometry {
        let padding = kernel.map(|kernel| (kernel / 2, kernel / 2));
        let stride = kernel.map(|kernel| kernel.min(2));
        Geometry::new(2, channels, 1, input, kernel, stride, padding, [1; 3]).unwrap()
    }

    fn has_gaps(geometry: &Geometry) -> bool {
        Layout::new(geometry, 256..=1024).copies().is_empty()
    }

    #[test]
    fn small_images_of_many_channels_lie_without_gaps() {
        assert!(!has_gaps(&geometry([64, 64], [1, 64, 64], [1, 3, 3])));
        assert!(!has_gaps(&geometry([512, 512], [1, 14, 14], [1, 3, 3])));
        // Larger images, few channels, and no gaps.
        assert!(has_gaps(&geometry([64, 64], [1, 66, 64], [1, 3, 3])));
        assert!(has_gaps(&geometry([64, 63], [1, 64, 64], [1, 3, 3])));
        assert!(has_gaps(&geometry([64, 64], [1, 16, 16], [1, 1, 1])));
    }

    #[test]
    fn taps_of_many_channels_do_not_all_get_planes() {
        assert!(!has_gaps(&geometry([64, 64], [16, 16, 16], [3, 3, 3])));
        assert!(has_gaps(&geometry([64, 512], [16, 16, 16], [3, 3, 3])));
        assert!(has_gaps(&geometry([512, 64], [16, 16, 16], [3, 3, 3])));
    }
}
