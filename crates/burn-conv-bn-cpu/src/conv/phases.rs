//! The phases of a convolution's stride, and runs of values in them.

use std::ops::Range;

use crate::Geometry;

/// Values that are neighbours in the wide layout and evenly spaced in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    /// Offset in the wide range.
    pub(crate) wide: usize,
    /// Offset of channel 0 from the first value of the block's images in memory.
    pub(crate) dense: usize,
    pub(crate) len: usize,
}

/// The remainders of the taps' offsets by the stride in one dimension.
pub(super) fn remainders(geometry: &Geometry, dim: usize) -> Vec<usize> {
    let mut remainders: Vec<usize> = (0..geometry.kernel[dim])
        .map(|tap| tap * geometry.dilation[dim] % geometry.stride[dim])
        .collect();
    remainders.sort_unstable();
    remainders.dedup();
    remainders
}

/// The product of the dimensions' values, the last dimension's fastest.
pub(super) fn combined(each: &[Vec<usize>; 3]) -> Vec<[usize; 3]> {
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

/// The positions of one phase, in one dimension, that hold values of the input rather than padding.
pub(super) fn filled(geometry: &Geometry, dim: usize, phase: usize) -> Range<usize> {
    let (stride, padding) = (geometry.stride[dim], geometry.padding[dim].0);
    let place = |position: usize| position.saturating_sub(phase).div_ceil(stride);
    place(padding)..place(geometry.input[dim] + padding)
}

/// Appends a run, or extends the last one if that ends where it starts.
pub(super) fn push(runs: &mut Vec<Run>, run: Run, step: usize) {
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
