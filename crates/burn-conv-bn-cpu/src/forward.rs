//! The forward kernels.

use std::ops::Range;

use pulp::Arch;
use rayon::prelude::*;

use crate::columns::lay_out;
use crate::matmul::{Matrix, multiply};
use crate::simd::{self, ChannelAffine};
use crate::{Activation, Affine, Geometry, Moments, Real};

/// Blocks of images that moments are taken over.
const MOMENT_BLOCKS: usize = 64;

/// Columns of a tile: scratch of one thread.
pub(crate) struct Columns<T>(Vec<T>);

impl<T: Real> Columns<T> {
    pub(crate) fn new() -> Self {
        Self(Vec::new())
    }

    /// The columns of a tile as `[depth, positions]`: laid out here, or the input itself where it
    /// already is that matrix.
    pub(crate) fn of<'a>(
        &'a mut self,
        geometry: &Geometry,
        image: &'a [T],
        rows: &Range<usize>,
    ) -> Matrix<&'a [T]> {
        let (depth, width) = (geometry.depth(), geometry.width());
        let positions = rows.len() * width;
        if geometry.is_pointwise() {
            let start = rows.start * width;
            return Matrix::by_rows(&image[start..], depth, positions, geometry.input_plane());
        }
        self.0.resize(depth * positions, T::ZERO);
        lay_out(geometry, image, rows.clone(), &mut self.0);
        Matrix::by_rows(&self.0, depth, positions, positions)
    }
}

/// The convolution's output on one tile of one group: `target` is `[group's channels, positions]`
/// with rows `row_stride` apart.
///
/// Forward and recomputation both go through here, with the same tiles: same bits.
pub(crate) fn conv_tile<T: Real>(
    geometry: &Geometry,
    columns: Matrix<&[T]>,
    weight: &[T],
    target: &mut [T],
    row_stride: usize,
) {
    let (depth, group_out) = (geometry.depth(), geometry.group_out());
    if group_out == 1 {
        let target = &mut target[..columns.columns];
        simd::combine(Arch::new(), target, weight, |tap| columns.row(tap));
        return;
    }
    multiply(
        Matrix::by_rows(target, group_out, columns.columns, row_stride),
        Matrix::by_rows(weight, group_out, depth, depth),
        columns,
        false,
    );
}

/// `group`'s part of what has one entry for each channel of an image.
pub(crate) fn group_of<T>(all: &[T], group: usize, groups: usize) -> &[T] {
    let len = all.len() / groups;
    &all[group * len..][..len]
}

/// Convolves one image.
fn conv_image<T: Real>(
    geometry: &Geometry,
    image: &[T],
    weight: &[T],
    output: &mut [T],
    columns: &mut Columns<T>,
) {
    let groups = geometry.groups();
    let (positions, width) = (geometry.positions(), geometry.width());
    for (group, output) in output
        .chunks_exact_mut(geometry.group_out() * positions)
        .enumerate()
    {
        let image = group_of(image, group, groups);
        let weight = group_of(weight, group, groups);
        for rows in geometry.tiles() {
            let columns = columns.of(geometry, image, &rows);
            conv_tile(
                geometry,
                columns,
                weight,
                &mut output[rows.start * width..],
                positions,
            );
        }
    }
}

/// The convolution: `output` is `[batch, channels_out, output..]`.
///
/// # Panics
///
/// Panics if a slice is not of the geometry's size.
pub fn conv<T: Real>(geometry: &Geometry, input: &[T], weight: &[T], output: &mut [T]) {
    check(geometry, input, weight, output.len());
    output
        .par_chunks_exact_mut(geometry.output_len())
        .zip(input.par_chunks_exact(geometry.input_len()))
        .for_each_init(Columns::new, |columns, (output, image)| {
            conv_image(geometry, image, weight, output, columns);
        });
}

/// The convolution, and the moments of its output's channels.
///
/// # Panics
///
/// As [`conv`].
pub fn conv_moments<T: Real>(
    geometry: &Geometry,
    input: &[T],
    weight: &[T],
    output: &mut [T],
) -> Moments {
    check(geometry, input, weight, output.len());
    let arch = Arch::new();
    let channels = geometry.channels_out();
    let images = geometry.images_per_block(MOMENT_BLOCKS);
    let blocks: Vec<Moments> = output
        .par_chunks_mut(images * geometry.output_len())
        .zip(input.par_chunks(images * geometry.input_len()))
        .map_init(Columns::new, |columns, (output, input)| {
            let mut moments = Moments::new(channels);
            for (output, image) in output
                .chunks_exact_mut(geometry.output_len())
                .zip(input.chunks_exact(geometry.input_len()))
            {
                conv_image(geometry, image, weight, output, columns);
                let positions = geometry.positions();
                for (channel, values) in output.chunks_exact(positions).enumerate() {
                    let (mean, squares) = simd::moments(arch, values);
                    moments.add_channel(channel, positions, mean, squares);
                }
                moments.count += positions;
            }
            moments
        })
        .collect();
    blocks.iter().fold(Moments::new(channels), Moments::merge)
}

/// `values = activation(affine(values) + residual)` in place, on `[batch, channels_out, output..]`.
///
/// # Panics
///
/// Panics if a slice is not of the geometry's size.
pub fn normalize<T: Real>(
    geometry: &Geometry,
    values: &mut [T],
    affine: Affine<'_, T>,
    residual: Option<&[T]>,
    activation: Activation,
) {
    assert_eq!(values.len(), geometry.batch() * geometry.output_len());
    assert!(residual.is_none_or(|residual| residual.len() == values.len()));
    let arch = Arch::new();
    let (len, positions) = (geometry.output_len(), geometry.positions());
    values
        .par_chunks_exact_mut(len)
        .enumerate()
        .for_each(|(image, values)| {
            for (channel, values) in values.chunks_exact_mut(positions).enumerate() {
                let start = image * len + channel * positions;
                let residual = residual.map(|residual| &residual[start..][..positions]);
                simd::normalize(arch, values, affine.channel(channel), residual, activation);
            }
        });
}

impl<T: Real> Affine<'_, T> {
    pub(crate) fn channel(&self, channel: usize) -> ChannelAffine<T> {
        ChannelAffine {
            mean: self.mean[channel],
            scale: self.scale[channel],
            shift: self.shift[channel],
        }
    }
}

pub(crate) fn check<T>(geometry: &Geometry, input: &[T], weight: &[T], output_len: usize) {
    assert_eq!(
        input.len(),
        geometry.batch() * geometry.input_len(),
        "input"
    );
    assert_eq!(weight.len(), geometry.weight_len(), "weight");
    assert_eq!(
        output_len,
        geometry.batch() * geometry.output_len(),
        "output"
    );
}
