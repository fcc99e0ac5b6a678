//! How images lie in scratch so that a convolution is a sum of planes.
//!
//! An image is copied once, with its padding, into planes whose rows are as far apart as the
//! output's rows are. Then the values that one tap of the kernel meets are the plane itself,
//! shifted: for output position `p`, counted in that wide layout, the tap at row `i` and column `j`
//! meets `plane[p + i * pitch + j]`. A convolution is a sum of shifted planes, the gradient of its
//! input is one too, and that of its weight is made of dot products with shifted planes.
//!
//! With a stride, the planes hold every stride-th row and column: a plane for each *phase*, that
//! is, for each remainder that a tap's offset leaves. Between the planes the shifts are those of a
//! convolution of stride 1, and no product is wasted.
//!
//! Some wide positions are no output: those at the end of a row whose patch wraps into the next
//! one. What is computed there is dropped on the way forward and zero on the way back. Where both
//! ends of a row are padded, one run of zeros serves as the end of a row and the start of the next.
//! Depth slices and the images of a block follow one another in the same way, so that a tile may
//! hold several small images.
//!
//! Of small images these positions are many: 49 outputs lie among 64. Where channels are enough to
//! outweigh more copies, and not so many that these outgrow the caches, such images have a layout
//! without gaps: a plane for each tap, of what it meets at the outputs alone, which are the patches of
//! one tile, and tiles of whole images. The gradient of the input then takes copies of the output's
//! gradient, one for each distance that it is shifted by.

use std::ops::{Range, RangeInclusive};

use super::tile::Piece;
use crate::Geometry;

/// Fewest channels, in and out, for which a layout without gaps outweighs its copies.
const LEAST_CHANNELS: usize = 16;

/// For so many outputs, one position in a gap makes the layout without gaps worth its copies.
const GAPS: usize = 16;

/// Most values of a tile's planes without gaps, and of its copies: 8 MiB of each in single precision.
/// Every thread has a tile, which many taps of many channels would make larger than the activations.
const MOST_VALUES: usize = 2 << 20;

/// The wide layout of a geometry's images.
#[derive(Debug)]
pub(crate) struct Layout<'a> {
    geometry: &'a Geometry,
    /// Slices of an image, rows of a slice, values of a row.
    wide: [usize; 3],
    /// The offsets from an output's place to what the planes hold there: the remainders of the taps'
    /// offsets or, without gaps, all of the taps' offsets.
    phases: Vec<[usize; 3]>,
    /// For each tap of the kernel, in the weight's order, its phase and shift.
    taps: Vec<(usize, usize)>,
    /// The largest shift in each dimension, and of them all.
    reaches: [usize; 3],
    reach: usize,
    /// How the input's gradient is made where there are no gaps.
    copies: Option<Copies>,
}

/// The input's gradient in a layout without gaps: for each remainder of the taps' offsets, the input
/// that has it lies densely, and is a sum over copies of the output's gradient.
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
    /// From a place in the copy to that in the gradient, which may be out of it.
    pub(crate) shifts: [isize; 3],
}

/// The input at every stride-th position from `start` on.
#[derive(Debug)]
struct DensePhase {
    start: [usize; 3],
    extents: [usize; 3],
    /// The taps that meet it, and the copy in which each finds its gradient.
    taps: Vec<(usize, usize)>,
}

/// Values that are neighbours in the wide layout and evenly spaced in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    /// Where they start in the wide range.
    pub(crate) wide: usize,
    /// Where they start in memory, for channel 0, from the block's first image on.
    pub(crate) dense: usize,
    pub(crate) len: usize,
}

/// Where the values of a range of wide positions are in memory.
#[derive(Debug)]
pub(crate) struct Tile {
    /// Wide positions of the output, from the block's first on.
    pub(crate) range: Range<usize>,
    /// Of the input, for each phase: what the tile's outputs meet.
    pub(crate) input: Vec<Vec<Run>>,
    /// Of the output.
    pub(crate) output: Vec<Run>,
    pub(crate) pieces: Vec<Piece>,
    /// Which of the output's runs each piece consists of.
    pub(crate) runs: Vec<Range<usize>>,
    /// Of the input, for each phase of its gradient: what is complete after this tile.
    pub(crate) grad: Vec<Vec<Run>>,
}

/// Where a tap of the input's gradient finds that of the output.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Source {
    /// In the output's planes, so many positions back.
    Back(usize),
    /// In a copy.
    Copy(usize),
}

impl<'a> Layout<'a> {
    /// The layout that suits a geometry, with tiles that may have so many positions.
    pub(crate) fn new(geometry: &'a Geometry, tile: RangeInclusive<usize>) -> Self {
        let shifted = Self::shifted(geometry);
        let positions = geometry.positions();
        let gaps = shifted.wide.iter().product::<usize>() - positions;
        let (group_in, group_out) = (geometry.group_in(), geometry.group_out());
        let planes = shifted.taps.len().saturating_mul(group_in.max(group_out));
        let values = planes.saturating_mul(positions.max(*tile.start()));
        if gaps * GAPS >= positions
            && positions <= *tile.end()
            && group_in.min(group_out) >= LEAST_CHANNELS
            && values <= MOST_VALUES
        {
            return Self::dense(geometry);
        }
        shifted
    }

    /// A plane for each phase, with the taps' shifts.
    fn shifted(geometry: &'a Geometry) -> Self {
        let (stride, kernel, dilation) = (geometry.stride, geometry.kernel, geometry.dilation);
        let each = [0, 1, 2].map(|dim| remainders(geometry, dim));
        let phases = combined(&each);

        let reaches: [usize; 3] =
            std::array::from_fn(|dim| (kernel[dim] - 1) * dilation[dim] / stride[dim]);
        let mut wide = [0; 3];
        for dim in 0..3 {
            let extent = geometry.output[dim] + reaches[dim];
            // Zeros that the end of one row and the start of the next have in common.
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

    /// A plane for each tap, without gaps.
    fn dense(geometry: &'a Geometry) -> Self {
        let offsets = [0, 1, 2].map(|dim| {
            (0..geometry.kernel[dim])
                .map(|tap| tap * geometry.dilation[dim])
                .collect()
        });
        let phases = combined(&offsets);
        Self {
            geometry,
            wide: geometry.output,
            taps: (0..phases.len()).map(|tap| (tap, 0)).collect(),
            copies: Some(Copies::new(geometry, &phases)),
            phases,
            reaches: [0; 3],
            reach: 0,
        }
    }

    /// Copies of the output's gradient, in a layout without gaps.
    pub(crate) fn copies(&self) -> &[Copy] {
        self.copies.as_ref().map_or(&[], |copies| &copies.copies)
    }

    /// Positions that a tile is a multiple of.
    pub(crate) fn unit(&self) -> usize {
        match &self.copies {
            Some(_) => self.geometry.positions(),
            None => 1,
        }
    }

    /// Most positions of the input's gradient in one phase, for a tile of so many positions.
    pub(crate) fn grad_positions(&self, tile: usize) -> usize {
        match &self.copies {
            Some(copies) => tile / self.unit() * copies.largest(),
            None => tile + self.reach,
        }
    }

    /// For each phase of the input's gradient, the taps that it goes through, and from where.
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

    /// Lines of a plane that the taps of one channel meet, of so many taps.
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

    /// Memory between neighbours of the input's wide rows.
    pub(crate) fn step(&self) -> usize {
        self.geometry.stride[2]
    }

    /// Whether each value of the input is at some wide position; the others meet no tap.
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

    /// The tiles of a block of images, of at most `len` wide positions each.
    pub(crate) fn tiles(&self, images: usize, len: usize) -> Vec<Tile> {
        let (positions, unit) = (self.positions(images), self.unit());
        let units = positions.div_ceil(unit);
        let count = units.div_ceil((len / unit).max(1));
        let len = units.div_ceil(count) * unit;
        (0..positions)
            .step_by(len)
            .map(|start| {
                let range = start..(start + len).min(positions);
                let reached = range.start..range.end + self.reach;
                let last = range.end == positions;
                let grad = match &self.copies {
                    Some(copies) => {
                        copies.runs(self.geometry, range.start / unit..range.end / unit)
                    }
                    None => {
                        let end = if last { reached.end } else { range.end };
                        self.input_runs(images, &(range.start..end))
                    }
                };
                let output = self.output_runs(images, &range);
                let (pieces, runs) = pieces(&output);
                Tile {
                    input: self.input_runs(images, &reached),
                    pieces,
                    runs,
                    output,
                    grad,
                    range,
                }
            })
            .collect()
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

    /// For each phase, where its values of some images are.
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

/// The remainders that the taps' offsets leave in one dimension.
fn remainders(geometry: &Geometry, dim: usize) -> Vec<usize> {
    let mut remainders: Vec<usize> = (0..geometry.kernel[dim])
        .map(|tap| tap * geometry.dilation[dim] % geometry.stride[dim])
        .collect();
    remainders.sort_unstable();
    remainders.dedup();
    remainders
}

/// Each value of each dimension with each of the others, the last dimension's fastest.
fn combined(each: &[Vec<usize>; 3]) -> Vec<[usize; 3]> {
    let mut all = Vec::new();
    for depth in &each[0] {
        for row in &each[1] {
            for column in &each[2] {
                all.push([*depth, *row, *column]);
            }
        }
    }
    all
}

/// The places of one phase, in one dimension, that hold values of the input rather than padding.
fn filled(geometry: &Geometry, dim: usize, phase: usize) -> Range<usize> {
    let (stride, padding) = (geometry.stride[dim], geometry.padding[dim].0);
    let place = |position: usize| position.saturating_sub(phase).div_ceil(stride);
    place(padding)..place(geometry.input[dim] + padding)
}

/// Adds a run, to the last one if it goes on where that ends.
fn push(runs: &mut Vec<Run>, run: Run, step: usize) {
    if run.len == 0 {
        return;
    }
    match runs.last_mut() {
        Some(last)
            if last.wide + last.len == run.wide && last.dense + last.len * step == run.dense =>
        {
            last.len += run.len;
        }
        _ => runs.push(run),
    }
}

/// Runs that follow one another in memory, together, and which runs these are.
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
        assert!(!has_gaps(&geometry([16, 16], [1, 64, 64], [1, 3, 3])));
        assert!(!has_gaps(&geometry([512, 512], [1, 14, 14], [1, 3, 3])));
        // Larger images, few channels, and no position that is not an output.
        assert!(has_gaps(&geometry([16, 16], [1, 66, 64], [1, 3, 3])));
        assert!(has_gaps(&geometry([16, 15], [1, 64, 64], [1, 3, 3])));
        assert!(has_gaps(&geometry([16, 16], [1, 16, 16], [1, 1, 1])));
    }

    #[test]
    fn taps_of_many_channels_do_not_all_get_planes() {
        assert!(!has_gaps(&geometry([64, 64], [16, 16, 16], [3, 3, 3])));
        assert!(has_gaps(&geometry([64, 512], [16, 16, 16], [3, 3, 3])));
        assert!(has_gaps(&geometry([512, 64], [16, 16, 16], [3, 3, 3])));
    }
}
