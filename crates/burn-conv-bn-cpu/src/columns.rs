//! Patches of an image as columns of a matrix, and back.

use std::ops::Range;

use crate::{Geometry, Real};

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
    for (tap, line) in geometry.taps().zip(columns.chunks_exact_mut(tile)) {
        let image = &image[tap.channel * plane..][..plane];
        let (overlap, first) = geometry.row_overlap(&tap);
        for (row, line) in rows.clone().zip(line.chunks_exact_mut(width)) {
            let Some(start) = geometry.input_row(row, &tap) else {
                line.fill(T::ZERO);
                continue;
            };
            line[..overlap.start].fill(T::ZERO);
            line[overlap.end..].fill(T::ZERO);
            let line = &mut line[overlap.clone()];
            let source = &image[start + first..];
            match stride {
                1 => line.copy_from_slice(&source[..line.len()]),
                _ => {
                    for (value, source) in line.iter_mut().zip(source.iter().step_by(stride)) {
                        *value = *source;
                    }
                }
            }
        }
    }
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
    for (tap, line) in geometry.taps().zip(columns.chunks_exact(tile)) {
        let image = &mut image[tap.channel * plane..][..plane];
        let (overlap, first) = geometry.row_overlap(&tap);
        for (row, line) in rows.clone().zip(line.chunks_exact(width)) {
            let Some(start) = geometry.input_row(row, &tap) else {
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
                _ => {
                    for (target, value) in target.iter_mut().step_by(stride).zip(line) {
                        *target += *value;
                    }
                }
            }
        }
    }
}
