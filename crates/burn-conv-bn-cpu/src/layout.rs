//! How images lie in scratch so that a convolution needs no patches laid out.
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

use std::ops::Range;

use crate::Geometry;
use crate::algorithm::Piece;

/// The wide layout of a geometry's images.
#[derive(Debug)]
pub(crate) struct Layout<'a> {
    geometry: &'a Geometry,
    /// Slices of an image, rows of a slice, values of a row.
    wide: [usize; 3],
    /// The remainders of the taps' offsets.
    phases: Vec<[usize; 3]>,
    /// For each tap of the kernel, in the weight's order, its phase and shift.
    taps: Vec<(usize, usize)>,
    /// The largest shift in each dimension, and of them all.
    reaches: [usize; 3],
    reach: usize,
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
    /// Wide positions of the input whose gradient is complete after this tile.
    pub(crate) grad_range: Range<usize>,
    /// Of the input, for each phase: what is at those positions.
    pub(crate) grad: Vec<Vec<Run>>,
}

impl<'a> Layout<'a> {
    pub(crate) fn new(geometry: &'a Geometry) -> Self {
        let (stride, kernel, dilation) = (geometry.stride, geometry.kernel, geometry.dilation);
        let phases_of = |dim: usize| {
            let mut phases: Vec<usize> = (0..kernel[dim])
                .map(|tap| tap * dilation[dim] % stride[dim])
                .collect();
            phases.sort_unstable();
            phases.dedup();
            phases
        };
        let each = [phases_of(0), phases_of(1), phases_of(2)];
        let mut phases = Vec::new();
        for depth in &each[0] {
            for row in &each[1] {
                for column in &each[2] {
                    phases.push([*depth, *row, *column]);
                }
            }
        }

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
        self.phases.len() == all_phases
            && (0..3).all(|dim| {
                let extent = geometry.output[dim] + self.reaches[dim];
                extent * geometry.stride[dim] >= geometry.input[dim] + geometry.padding[dim].0
            })
    }

    /// Wide positions from the first output to the last of a block.
    fn positions(&self, images: usize) -> usize {
        let [slices, rows, pitch] = self.wide;
        let output = self.geometry.output;
        let last_row = ((images - 1) * slices + output[0] - 1) * rows + output[1] - 1;
        last_row * pitch + output[2]
    }

    /// The tiles of a block of images, of at most `len` wide positions each.
    pub(crate) fn tiles(&self, images: usize, len: usize) -> Vec<Tile> {
        let positions = self.positions(images);
        let count = positions.div_ceil(len);
        let len = positions.div_ceil(count);
        (0..positions)
            .step_by(len)
            .map(|start| {
                let range = start..(start + len).min(positions);
                let reached = range.start..range.end + self.reach;
                let last = range.end == positions;
                let grad_range = range.start..if last { reached.end } else { range.end };
                let output = self.output_runs(images, &range);
                let (pieces, runs) = pieces(&output);
                Tile {
                    input: self.input_runs(images, &reached),
                    pieces,
                    runs,
                    output,
                    grad: self.input_runs(images, &grad_range),
                    range,
                    grad_range,
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
