//! Patches of an image as columns of a matrix, and back.

use std::ops::Range;

use pulp::Arch;

use crate::simd::Sweep;
use crate::{Geometry, Real};

/// Elements copied or added at a time: a vector of the widest unit in single precision.
const LANES: usize = 16;

/// Lays out the patches that the output rows `rows` of one group see: `columns[k][p]` is what tap
/// `k` meets at position `p` of the tile, zero where that is padding.
///
/// `image` is the group's channels of one image.
pub(crate) fn lay_out<T: Real>(
    geometry: &Geometry,
    image: &[T],
    rows: Range<usize>,
    columns: &mut [T],
) {
    let width = geometry.width();
    let plane = geometry.input_plane();
    let stride = geometry.row_stride();
    let tile = rows.len() * width;
    Arch::new().dispatch(Sweep(
        #[inline(always)]
        || {
            for (tap, line) in geometry.taps().zip(columns.chunks_exact_mut(tile)) {
                let image = &image[tap.channel * plane..][..plane];
                let (overlap, first) = geometry.row_overlap(tap);
                let starts = geometry.input_rows(rows.clone(), tap);
                for (start, line) in starts.zip(line.chunks_exact_mut(width)) {
                    let Some(start) = start else {
                        line.fill(T::ZERO);
                        continue;
                    };
                    for value in &mut line[..overlap.start] {
                        *value = T::ZERO;
                    }
                    for value in &mut line[overlap.end..] {
                        *value = T::ZERO;
                    }
                    let line = &mut line[overlap.clone()];
                    let source = &image[start + first..];
                    match stride {
                        1 => copy(line, &source[..line.len()]),
                        2 => {
                            for (value, source) in line.iter_mut().zip(source.chunks(2)) {
                                *value = source[0];
                            }
                        }
                        _ => {
                            for (value, source) in line.iter_mut().zip(source.chunks(stride)) {
                                *value = source[0];
                            }
                        }
                    }
                }
            }
        },
    ));
}

/// Adds each column's values to what it was laid out from: the transpose of [`lay_out`].
pub(crate) fn add_back<T: Real>(
    geometry: &Geometry,
    columns: &[T],
    rows: Range<usize>,
    image: &mut [T],
) {
    let width = geometry.width();
    let plane = geometry.input_plane();
    let stride = geometry.row_stride();
    let tile = rows.len() * width;
    Arch::new().dispatch(Sweep(
        #[inline(always)]
        || {
            for (tap, line) in geometry.taps().zip(columns.chunks_exact(tile)) {
                let image = &mut image[tap.channel * plane..][..plane];
                let (overlap, first) = geometry.row_overlap(tap);
                let starts = geometry.input_rows(rows.clone(), tap);
                for (start, line) in starts.zip(line.chunks_exact(width)) {
                    let Some(start) = start else {
                        continue;
                    };
                    let line = &line[overlap.clone()];
                    let target = &mut image[start + first..];
                    match stride {
                        1 => {
                            for (target, value) in target.iter_mut().zip(line) {
                                *target += *value;
                            }
                        }
                        2 => {
                            for (target, value) in target.chunks_mut(2).zip(line) {
                                target[0] += *value;
                            }
                        }
                        _ => {
                            for (target, value) in target.chunks_mut(stride).zip(line) {
                                target[0] += *value;
                            }
                        }
                    }
                }
            }
        },
    ));
}

/// `copy_from_slice` without its call, which takes longer than a row's few vectors.
#[inline(always)]
fn copy<T: Real>(target: &mut [T], source: &[T]) {
    let len = target.len();
    if len < LANES {
        for (target, source) in target.iter_mut().zip(source) {
            *target = *source;
        }
        return;
    }
    let (targets, _) = target.as_chunks_mut::<LANES>();
    let (sources, _) = source.as_chunks::<LANES>();
    for (target, source) in targets.iter_mut().zip(sources) {
        *target = *source;
    }
    // The rest, with the end of what is there already.
    if let (Some(target), Some(source)) = (
        target.last_chunk_mut::<LANES>(),
        source.last_chunk::<LANES>(),
    ) {
        *target = *source;
    }
}
