//! Max pool over height and width, alone or behind norm and activation, and its gradient.
//!
//! The argmax is a position in the window, `row * columns + column`, one byte. WebGPU stores no bytes: four lie in
//! a `u32`, in the order of `[batch, height, width, channels]`, whatever the layout of the tensors.

use burn_backend::DType;
use burn_cubecl::cubecl;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::ops::permute;
use burn_cubecl::tensor::CubeTensor;
use cubecl::ir::ElemType;
use cubecl::prelude::*;
use cubecl::std::FastDivmod;
use cubecl::zspace::Shape;

use crate::activation::{self, Activation};
use crate::assert_is_2d;
use crate::element::{accumulator_dtype, accumulator_type, element_type};
use crate::norm::{AffineRows, rows};
use crate::table::ChannelTable;
use crate::walk::tensor_arg;

/// Argmaxes in one word.
pub(crate) const PLACES: usize = 4;
/// A place that no byte holds.
pub(crate) const NO_PLACE: usize = 256;
/// Taps of a window, or windows over a pixel, that are read without a loop.
pub(crate) const MOST_UNROLLED: usize = 9;

/// Window of a max pool, by height and width.
///
/// At most 256 pixels, not larger than the padded input, and padded by at most half its size: every window overlaps
/// the input.
///
/// ```
/// use burn_conv_bn_cubecl::PoolWindow;
///
/// // ResNet's.
/// let window = PoolWindow {
///     kernel_size: [3, 3],
///     stride: [2, 2],
///     padding: [1, 1],
/// };
/// assert_eq!(window.output([112, 56]), [56, 28]);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PoolWindow {
    /// Pixels of a window.
    pub kernel_size: [usize; 2],
    /// Pixels from one window to the next.
    pub stride: [usize; 2],
    /// Padding on either side.
    pub padding: [usize; 2],
}

impl PoolWindow {
    /// Height and width of the output for an input of that height and width.
    ///
    /// # Panics
    ///
    /// Panics if the window has more than 256 pixels, or is larger than the padded input or less than twice the padding.
    pub fn output(&self, input: [usize; 2]) -> [usize; 2] {
        let pixels = self.kernel_size[0] * self.kernel_size[1];
        assert!(
            pixels <= NO_PLACE,
            "window: expected at most {NO_PLACE} pixels, got {pixels}"
        );
        [0, 1].map(|dim| {
            let (padding, size) = (self.padding[dim], self.kernel_size[dim]);
            let padded = input[dim] + 2 * padding;
            assert!(
                2 * padding <= size,
                "padding: expected at most half the window's {size} pixels, got {padding}"
            );
            assert!(
                size <= padded,
                "window: expected at most the padded input's {padded} pixels, got {size}"
            );
            (padded - size) / self.stride[dim] + 1
        })
    }

    /// Windows over a pixel along an axis, at most.
    pub(crate) fn overlap(&self, dim: usize) -> usize {
        self.kernel_size[dim].div_ceil(self.stride[dim])
    }

    /// Windows over a pixel, at most.
    pub(crate) fn over_a_pixel(&self) -> usize {
        self.overlap(0) * self.overlap(1)
    }
}

/// Results of [`max_pool`].
#[derive(Clone, Debug)]
pub struct MaxPooled {
    /// `[batch, channels, height_out, width_out]` in the input's dtype, channels innermost in memory.
    pub output: CubeTensor,
    /// Argmax of each output, four in a U32: `[words]`.
    pub argmax: CubeTensor,
}

/// Extent of a forward launch.
#[derive(CubeType, CubeLaunch)]
struct PoolGrid {
    /// Vectors of the output.
    vectors: usize,
    /// Vectors of a pixel, as a number and as a divisor.
    row_vectors: usize,
    channels: FastDivmod<usize>,
    columns: FastDivmod<usize>,
    rows: FastDivmod<usize>,
    height: usize,
    width: usize,
    /// Distances in the input's buffer, in vectors.
    image_step: usize,
    row_step: usize,
    column_step: usize,
    channel_step: usize,
}

/// The maximum of a window for each component of a vector, and its place.
#[derive(CubeType)]
struct Maximum<T: Float, N: Size> {
    value: Vector<T, N>,
    place: Vector<u32, N>,
}

/// The pixel of the padded input at a tap of the window that starts at `start`, or the nearest one within the input: also
/// one of the window's.
#[cube]
fn tap_pixel(start: usize, tap: usize, size: usize, #[comptime] padding: usize) -> usize {
    clamp(start + tap, padding, size + padding - 1)
}

/// The norm of a vector of channels; without a table, zeros.
#[cube]
fn vector_affine<T: Float, N: Size>(
    table: ComptimeOption<&Tensor<Vector<T, N>>>,
    row_vectors: usize,
    vector: usize,
) -> AffineRows<T, N> {
    #[comptime]
    match table {
        ComptimeOption::Some(table) => AffineRows::<T, N> {
            mean: table[rows::MEAN * row_vectors + vector],
            scale: table[rows::SCALE * row_vectors + vector],
            shift: table[rows::SHIFT * row_vectors + vector],
        },
        ComptimeOption::None => AffineRows::<T, N>::unread(),
    }
}

/// Maximum and argmax for one vector of the output. Of equal values the first wins, and NaN wins over all. Values
/// are compared as rounded to the stored type.
#[cube]
fn window_maximum<E: Float, T: Float, N: Size>(
    input: &Tensor<Vector<E, N>>,
    table: ComptimeOption<&Tensor<Vector<T, N>>>,
    grid: &PoolGrid,
    vector: usize,
    #[comptime] activation: Activation,
    #[comptime] window: PoolWindow,
) -> Maximum<T, N> {
    let (pixel, channel) = grid.channels.div_mod(vector);
    let (line, column) = grid.columns.div_mod(pixel);
    let (image, row) = grid.rows.div_mod(line);
    let affine = vector_affine::<T, N>(table, grid.row_vectors, channel);
    let top = row * comptime!(window.stride[0]);
    let left = column * comptime!(window.stride[1]);
    let origin = image * grid.image_step + channel * grid.channel_step;
    let [rows, columns] = comptime!(window.kernel_size);
    let [padding_rows, padding_columns] = comptime!(window.padding);
    let is_unrolled = comptime!(rows * columns <= MOST_UNROLLED);
    let mut best = Vector::<T, N>::zero();
    let mut places = Vector::<u32, N>::zero();
    #[unroll(is_unrolled)]
    for tap_row in 0..rows {
        let y = tap_pixel(top, tap_row, grid.height, padding_rows);
        #[unroll(is_unrolled)]
        for tap_column in 0..columns {
            let x = tap_pixel(left, tap_column, grid.width, padding_columns);
            let at = origin
                + (y - padding_rows) * grid.row_step
                + (x - padding_columns) * grid.column_step;
            let mut value = Vector::<T, N>::cast_from(input[at]);
            if table.is_some() {
                value = affine.scale * (value - affine.mean) + affine.shift;
            }
            let value = activation::forward(value, activation);
            let value = Vector::<T, N>::cast_from(Vector::<E, N>::cast_from(value));
            let place = Vector::<u32, N>::cast_from((y - top) * columns + x - left);
            // By way of f32: WGSL cannot test the bits of an f64.
            let is_nan = Vector::<f32, N>::cast_from(value).is_nan();
            let is_first = Vector::<u32, N>::cast_from(tap_row + tap_column).equal(&Vector::zero());
            let wins = value.greater_than(&best).or(is_nan).or(is_first);
            best = select_many(wins, value, best);
            places = select_many(wins, place, places);
        }
    }
    Maximum::<T, N> {
        value: best,
        place: places,
    }
}

/// Each unit writes whole words of the argmax and their outputs.
#[cube(launch_unchecked, address_type = "dynamic")]
fn max_pool_kernel<E: Float, T: Float, N: Size>(
    input: &Tensor<Vector<E, N>>,
    table: ComptimeOption<&Tensor<Vector<T, N>>>,
    output: &mut Tensor<Vector<E, N>>,
    argmax: &mut Tensor<u32>,
    grid: &PoolGrid,
    #[comptime] activation: Activation,
    #[comptime] window: PoolWindow,
    #[define(E, T)] _elements: [ElemType; 2],
) {
    let size = N::value();
    let words = comptime!(size.div_ceil(PLACES));
    let vectors = comptime!(words * PLACES / size);
    let first = ABSOLUTE_POS * vectors;
    if first >= grid.vectors {
        terminate!();
    }
    let mut places = Sequence::<u32>::new();
    #[unroll]
    for i in 0..vectors {
        let vector = first + i;
        let is_there = vector < grid.vectors;
        let vector = min(vector, grid.vectors - 1);
        let maximum = window_maximum::<E, T, N>(input, table, grid, vector, activation, window);
        output[vector] = Vector::cast_from(maximum.value);
        #[unroll]
        for component in 0..size {
            places.push(select(is_there, maximum.place.extract(component), 0u32));
        }
    }
    #[unroll]
    for word in 0..words {
        let mut bytes = 0u32;
        #[unroll]
        for place in 0..PLACES {
            let shift = comptime!(u8::BITS * place as u32);
            bytes |= *places.index(comptime!(word * PLACES + place)) << shift;
        }
        argmax[ABSOLUTE_POS * words + word] = bytes;
    }
}

/// Max pool of `activation(scale * (input - mean) + shift)`, or without a table of `activation(input)`. The input is
/// `[batch, channels, height, width]`.
///
/// Of equal values the first wins, and NaN wins over all. A pixel is read once per window.
///
/// ```no_run
/// use burn_conv_bn_cubecl::{Activation, Affine, MaxPooled, Moments, Norm, PoolWindow, max_pool, moments};
/// use burn_cubecl::tensor::CubeTensor;
///
/// /// `max_pool(relu(norm(z)))` and the statistics, without the tensor between the two.
/// fn norm_relu_pool(
///     z: &CubeTensor,
///     affine: Affine,
///     norm: Norm,
///     window: PoolWindow,
/// ) -> (MaxPooled, Moments) {
///     let (statistics, table) = moments(z, affine, norm);
///     (max_pool(z, Some(&table), Activation::Relu, window), statistics)
/// }
/// ```
///
/// # Panics
///
/// Panics if the input has no height and width, if [the window](PoolWindow::output) does not fit it, or if `table` has
/// another number of channels.
pub fn max_pool(
    input: &CubeTensor,
    table: Option<&ChannelTable>,
    activation: Activation,
    window: PoolWindow,
) -> MaxPooled {
    assert_is_2d("input", input);
    let (shape, strides) = (input.meta.shape(), input.meta.strides());
    if let Some(table) = table {
        table.assert_channels(shape[1], accumulator_dtype(input.dtype));
    }
    let (channels, [height, width]) = (shape[1], [shape[2], shape[3]]);
    let [rows_out, columns_out] = window.output([height, width]);
    let output = channels_last(input, [shape[0], channels, rows_out, columns_out]);
    let values = output.meta.num_elements();
    let words = values.div_ceil(PLACES);
    let client = input.client.clone();
    let argmax = empty_device_contiguous_dtype(
        client.clone(),
        input.device.clone(),
        Shape::from(vec![words]),
        DType::U32,
    );
    if words == 0 {
        return MaxPooled { output, argmax };
    }
    let vector_size = channel_vector_size(input);
    let step = |axis: usize| strides[axis] / vector_size;
    let grid = PoolGridLaunch::new(
        values / vector_size,
        channels / vector_size,
        channels / vector_size,
        columns_out,
        rows_out,
        height,
        width,
        step(0),
        step(2),
        step(3),
        // A vector is one step along the channels.
        if vector_size > 1 { 1 } else { strides[1] },
    );
    let rows = table.map(ChannelTable::rows);
    let units = words / vector_size.div_ceil(PLACES);
    let cube_dim = CubeDim::new(&client, units);
    let address = [input, &output, &argmax].map(CubeTensor::required_address_type);
    // SAFETY: the kernel stops at the last vector, and reads pixels of the input alone.
    unsafe {
        max_pool_kernel::launch_unchecked(
            &client,
            cubecl::calculate_cube_count_elemwise(&client, units, cube_dim),
            cube_dim,
            address.into_iter().max().unwrap_or_default(),
            vector_size,
            input.clone().into_tensor_arg(),
            tensor_arg(rows.as_ref()).into(),
            output.clone().into_tensor_arg(),
            argmax.clone().into_tensor_arg(),
            grid,
            activation,
            window,
            [element_type(input.dtype), accumulator_type(input.dtype)],
        );
    }
    MaxPooled { output, argmax }
}

/// `[batch, channels, height, width]` without values, channels innermost in memory.
pub(crate) fn channels_last(
    like: &CubeTensor,
    [images, channels, height, width]: [usize; 4],
) -> CubeTensor {
    let empty = empty_device_contiguous_dtype(
        like.client.clone(),
        like.device.clone(),
        Shape::from(vec![images, height, width, channels]),
        like.dtype,
    );
    permute(empty, &[0, 3, 1, 2])
}

/// Components of a vector of channels: a divisor of the channels and of the other strides, and of a word's places or
/// some words'.
fn channel_vector_size(input: &CubeTensor) -> usize {
    let (shape, strides) = (input.meta.shape(), input.meta.strides());
    let divides = |size: usize| {
        let is_step = |axis: usize| shape[axis] == 1 || strides[axis].is_multiple_of(size);
        strides[1] == 1 && shape[1].is_multiple_of(size) && [0, 2, 3].into_iter().all(is_step)
    };
    let fills_words = |size: usize| PLACES.is_multiple_of(size) || size.is_multiple_of(PLACES);
    input
        .client
        .io_optimized_vector_sizes(input.dtype.size())
        .filter(|&size| size == 1 || (fills_words(size) && divides(size)))
        .max()
        .unwrap_or(1)
}
