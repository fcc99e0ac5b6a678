//! The phases of a convolution's stride, and runs of values in them, copied to planes and back.

use std::mem::MaybeUninit;
use std::ops::Range;

use pulp::Arch;

use crate::simd::chunk::{CHUNK, Chunk, deinterleave};
use crate::simd::sweeps::{Sweep, copy, zero};
use crate::{Element, Geometry, Real};

/// Values that are neighbours in the wide layout and evenly spaced in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    /// Offset in the wide range.
    pub(crate) wide: usize,
    /// Offset of channel 0 from the first value of the block's images in memory or, where these are split, in the halves
    /// of the tile's images.
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

/// Fills a plane from its runs, with zeros between and behind them.
#[inline(always)]
pub(super) fn load_runs<E: Element>(
    source: &[E],
    runs: &[Run],
    step: usize,
    target: &mut [E::Real],
    scratch: &mut Vec<E::Real>,
) {
    fill(
        runs,
        target,
        #[inline(always)]
        |run, target| {
            let source = &source[run.dense..][..(run.len - 1) * step + 1];
            match step {
                1 => E::load(source, target),
                2 => every_other(E::read(source, scratch), target),
                _ => spread(E::read(source, scratch), step, target),
            }
        },
    );
}

/// As [`load_runs`], of runs in halves that [`split`] made.
#[inline(always)]
pub(super) fn copy_runs<T: Real>(halves: &[T], runs: &[Run], target: &mut [T]) {
    fill(
        runs,
        target,
        #[inline(always)]
        |run, target| copy(&halves[run.dense..][..run.len], target),
    );
}

#[inline(always)]
fn fill<T: Real>(runs: &[Run], target: &mut [T], mut load: impl FnMut(&Run, &mut [T])) {
    let mut end = 0;
    for run in runs {
        zero(&mut target[end..run.wide]);
        end = run.wide + run.len;
        load(run, &mut target[run.wide..end]);
    }
    zero(&mut target[end..]);
}

/// The even values of a source, and from `half` on the odd ones.
#[inline(always)]
pub(super) fn split<T: Real>(source: &[T], halves: &mut [T], half: usize) {
    let whole = source.len() / (2 * CHUNK) * CHUNK;
    for start in (0..whole).step_by(CHUNK) {
        Chunk::store(deinterleave(source, 2 * start), halves, start, half);
    }
    for (index, pair) in source[2 * whole..].chunks(2).enumerate() {
        for (odd, value) in pair.iter().enumerate() {
            halves[odd * half + whole + index] = *value;
        }
    }
}

/// Every other value, from the first to the last.
#[inline(always)]
fn every_other<T: Real>(source: &[T], target: &mut [T]) {
    match target.len() {
        9.. => every_other_by::<T, 8, 16>(source, target),
        5.. => every_other_by::<T, 4, 8>(source, target),
        _ => spread(source, 2, target),
    }
}

/// As [`every_other`], `N` of `M = 2 N` values at a time, which vectors take apart.
#[inline(always)]
fn every_other_by<T: Real, const N: usize, const M: usize>(source: &[T], target: &mut [T]) {
    let (targets, _) = target.as_chunks_mut::<N>();
    let (sources, _) = source.as_chunks::<M>();
    for (target, source) in targets.iter_mut().zip(sources) {
        *target = std::array::from_fn(
            #[inline(always)]
            |index| source[2 * index],
        );
    }
    // Remainder: redo the last full chunk, overlapping what is written; no value follows the last.
    if let (Some(target), Some(source)) = (target.last_chunk_mut::<N>(), source.last_chunk::<M>()) {
        *target = std::array::from_fn(
            #[inline(always)]
            |index| source[2 * index + 1],
        );
    }
}

/// Every `step`-th value.
#[inline(always)]
fn spread<T: Real>(source: &[T], step: usize, target: &mut [T]) {
    for (target, source) in target.iter_mut().zip(source.chunks(step)) {
        *target = source[0];
    }
}

/// Stores a plane's runs to every `step`-th value of a target that starts at `first`.
pub(super) fn store_runs<E: Element>(
    source: &[E::Real],
    runs: &[Run],
    step: usize,
    (target, first): (&mut [MaybeUninit<E>], usize),
) {
    Arch::new().dispatch(Sweep(
        #[inline(always)]
        || {
            for run in runs {
                let source = &source[run.wide..][..run.len];
                let target = &mut target[run.dense - first..][..(run.len - 1) * step + 1];
                match step {
                    1 => E::write(source, target),
                    _ => {
                        for (target, source) in target.chunks_mut(step).zip(source) {
                            E::write_one(*source, &mut target[0]);
                        }
                    }
                }
            }
        },
    ));
}

/// Zeroes the gaps between and behind a tile's runs.
pub(super) fn zero_gaps<T: Real>(runs: &[Run], plane: &mut [T]) {
    let mut end = 0;
    for run in runs {
        zero(&mut plane[end..run.wide]);
        end = run.wide + run.len;
    }
    zero(&mut plane[end..]);
}
