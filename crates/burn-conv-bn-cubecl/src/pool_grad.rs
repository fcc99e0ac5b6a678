//! The gradient of a max pool's input, in memory or only on the way.

use burn_cubecl::cubecl;
use burn_cubecl::tensor::CubeTensor;
use cubecl::ir::ElemType;
use cubecl::prelude::*;

use crate::element::{accumulator_type, element_type};
use crate::pool::{MOST_UNROLLED, NO_PLACE, PLACES, PoolWindow, channels_last};
use crate::walk::{
    Grid, Lanes, MAP_CUBES, Steps, Unit, Walk, index, is_idle, positions_at_once, unit,
};
use crate::{assert_is_2d, assert_shape};

/// Saved data of a max pool, for its gradient.
#[derive(Clone, Debug)]
pub struct PoolArgmax {
    /// The forward pass's window.
    pub window: PoolWindow,
    /// [`MaxPooled::argmax`](crate::MaxPooled::argmax), of the whole batch.
    pub argmax: CubeTensor,
    /// First image of the output's gradient, as an index in that batch.
    pub first_image: usize,
}

/// Extent of a max pool's output, in the order of the argmax.
#[derive(CubeType, CubeLaunch)]
pub(crate) struct PoolExtent {
    height: usize,
    width: usize,
    channels: usize,
    first_image: usize,
}

impl PoolArgmax {
    /// Panics unless the output of an input of that shape has the gradient's shape.
    pub(crate) fn assert_pools(&self, what: &str, input: &[usize], output_grad: &CubeTensor) {
        let &[images, channels, height, width] = input else {
            panic!("{what}: expected [batch, channels, height, width], got shape {input:?}");
        };
        let [rows, columns] = self.window.output([height, width]);
        let wanted = [images, channels, rows, columns];
        assert_shape("output gradient", output_grad, &wanted);
    }

    /// Panics unless the argmax has a place for each value of the output's gradient.
    pub(crate) fn assert_covers(&self, output_grad: &CubeTensor) {
        assert_is_2d("output gradient", output_grad);
        let wanted = self.outputs(output_grad).div_ceil(PLACES);
        let got = self.argmax.meta.num_elements();
        assert!(
            got >= wanted,
            "argmax: expected at least {wanted} values, got {got}"
        );
    }

    /// Outputs of the batch up to the last image of the gradient, as the argmax is indexed.
    fn outputs(&self, output_grad: &CubeTensor) -> usize {
        let shape = output_grad.meta.shape();
        (self.first_image + shape[0]) * shape[1] * shape[2] * shape[3]
    }

    /// A walk over the pixels of the pool's input. A batch of more than 2^32 outputs takes indices of 64 bits, however
    /// small its chunks.
    pub(crate) fn walk(
        &self,
        tensors: &[&CubeTensor],
        output_grad: &CubeTensor,
        cubes: usize,
    ) -> Walk {
        let accumulator = accumulator_type(output_grad.dtype).size();
        let windows = self.window.over_a_pixel();
        Walk::over_pixels(tensors, windows, accumulator, cubes).reaching(self.outputs(output_grad))
    }

    pub(crate) fn extent(&self, output_grad: &CubeTensor) -> PoolExtentLaunch {
        let shape = output_grad.meta.shape();
        PoolExtentLaunch::new(shape[2], shape[3], shape[1], self.first_image)
    }
}

/// An unused extent.
pub(crate) fn no_extent() -> PoolExtentLaunch {
    PoolExtentLaunch::new(0, 0, 0, 0)
}

/// First and end of the windows over a pixel of the padded input.
#[cube]
fn windows(
    pixel: usize,
    count: usize,
    #[comptime] kernel_size: usize,
    #[comptime] stride: usize,
) -> (usize, usize) {
    let mut first = 0usize;
    if pixel >= kernel_size {
        first = (pixel - kernel_size) / stride + 1;
    }
    (first, min(pixel / stride + 1, count))
}

/// Gradient of a max pool's input at a position of image, row and column: the sum over the windows whose maximum
/// it is.
#[cube]
pub(crate) fn pooled_grad<E: Float, T: Float, N: Size>(
    output_grad: &Tensor<Vector<E, N>>,
    argmax: &Tensor<u32>,
    steps: &Steps,
    extent: &PoolExtent,
    at: &Sequence<usize>,
    unit: &Unit,
    #[comptime] window: PoolWindow,
) -> Vector<T, N> {
    let column = *at.index(0usize) + comptime!(window.padding[1]);
    let row = *at.index(1usize) + comptime!(window.padding[0]);
    let image = *at.index(2usize);
    let (first_row, end_row) = windows(
        row,
        extent.height,
        comptime!(window.kernel_size[0]),
        comptime!(window.stride[0]),
    );
    let (first_column, end_column) = windows(
        column,
        extent.width,
        comptime!(window.kernel_size[1]),
        comptime!(window.stride[1]),
    );
    let rows = comptime!(window.overlap(0));
    let columns = comptime!(window.overlap(1));
    let is_unrolled = comptime!(rows * columns <= MOST_UNROLLED);
    let zero = Vector::<T, N>::zero();
    let mut sum = Vector::<T, N>::zero();
    #[unroll(is_unrolled)]
    for down in 0..rows {
        #[unroll(is_unrolled)]
        for along in 0..columns {
            let is_there = first_row + down < end_row && first_column + along < end_column;
            let y = min(first_row + down, extent.height - 1);
            let x = min(first_column + along, extent.width - 1);
            let place_row = row - y * comptime!(window.stride[0]);
            let place_column = column - x * comptime!(window.stride[1]);
            let place = place_row * comptime!(window.kernel_size[1]) + place_column;
            let place = Vector::cast_from(select(is_there, place, NO_PLACE));
            let pixel = ((extent.first_image + image) * extent.height + y) * extent.width + x;
            let places = places_at::<N>(argmax, pixel * extent.channels + unit.channel);
            let mut output_at = Sequence::<usize>::new();
            output_at.push(x);
            output_at.push(y);
            output_at.push(image);
            let grad = Vector::<T, N>::cast_from(output_grad[index(steps, &output_at, unit)]);
            sum += select_many(places.equal(&place), grad, zero);
        }
    }
    sum
}

/// The argmax of a vector of outputs, from the index `first` on.
#[cube]
fn places_at<N: Size>(argmax: &Tensor<u32>, first: usize) -> Vector<u32, N> {
    let size = N::value();
    // A vector shorter than a word does not cross its end.
    let (word, offset) = (first / PLACES, first % PLACES);
    let mut places = Vector::<u32, N>::zero();
    #[unroll]
    for i in 0..comptime!(size.div_ceil(PLACES)) {
        let bytes = argmax[word + i];
        #[unroll]
        for byte in 0..comptime!(size.min(PLACES)) {
            let shift = u32::cast_from(offset + byte) * comptime!(u8::BITS);
            places.insert(comptime!(i * PLACES + byte), (bytes >> shift) & 255u32);
        }
    }
    places
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn max_pool_backward_kernel<E: Float, T: Float, N: Size>(
    output_grad: &Tensor<Vector<E, N>>,
    argmax: &Tensor<u32>,
    input_grad: &mut Tensor<Vector<E, N>>,
    output_grad_steps: &Steps,
    input_grad_steps: &Steps,
    extent: &PoolExtent,
    grid: &Grid,
    #[comptime] window: PoolWindow,
    #[comptime] lanes: Lanes,
    #[define(E, T)] _elements: [ElemType; 2],
) {
    if is_idle(grid) {
        terminate!();
    }
    let unit = unit::<N>(grid, lanes);
    for first in range_stepped(unit.start, unit.end, comptime!(lanes.stride())) {
        let positions = positions_at_once(grid, &unit, first, lanes);
        let mut grads = Sequence::<Vector<T, N>>::new();
        #[unroll]
        for i in 0..lanes.at_once {
            grads.push(pooled_grad::<E, T, N>(
                output_grad,
                argmax,
                output_grad_steps,
                extent,
                &positions.index(i).at,
                &unit,
                window,
            ));
        }
        #[unroll]
        for i in 0..lanes.at_once {
            let position = positions.index(i);
            if position.is_there {
                let target = index(input_grad_steps, &position.at, &unit);
                input_grad[target] = Vector::cast_from(*grads.index(i));
            }
        }
    }
}

/// Gradient of a max pool's input, `[batch, channels, height, width]` with channels innermost in memory.
///
/// Each pixel sums over its windows in the accumulator's dtype, in a fixed order.
///
/// ```no_run
/// use burn_conv_bn_cubecl::{Activation, PoolArgmax, PoolWindow, max_pool, max_pool_backward};
/// use burn_cubecl::tensor::CubeTensor;
///
/// /// The pooled input and the gradient of that pool's input, of `size`, from its output's.
/// fn pool(
///     input: CubeTensor,
///     output_grad: &CubeTensor,
///     window: PoolWindow,
///     size: [usize; 2],
/// ) -> (CubeTensor, CubeTensor) {
///     let pooled = max_pool(&input, None, Activation::Identity, window);
///     let argmax = PoolArgmax {
///         window,
///         argmax: pooled.argmax,
///         first_image: 0,
///     };
///     (pooled.output, max_pool_backward(output_grad, &argmax, size))
/// }
/// ```
///
/// # Panics
///
/// Panics if the output's gradient has another shape than the pool's output, or the argmax is shorter.
pub fn max_pool_backward(
    output_grad: &CubeTensor,
    pool: &PoolArgmax,
    [height, width]: [usize; 2],
) -> CubeTensor {
    assert_is_2d("output gradient", output_grad);
    let shape = output_grad.meta.shape();
    let input_shape = [shape[0], shape[1], height, width];
    pool.assert_pools("input", &input_shape, output_grad);
    pool.assert_covers(output_grad);
    let input_grad = channels_last(output_grad, input_shape);
    let accumulator = accumulator_type(output_grad.dtype);
    let walk = pool.walk(&[&input_grad, output_grad], output_grad, MAP_CUBES);
    if walk.is_empty() {
        return input_grad;
    }
    let client = output_grad.client.clone();
    // SAFETY: `unit` keeps positions and channels below the input's, and windows are those of the output.
    unsafe {
        max_pool_backward_kernel::launch_unchecked(
            &client,
            walk.cube_count(&client),
            walk.lanes.cube_dim(),
            walk.address_type(),
            walk.vector_size,
            output_grad.clone().into_tensor_arg(),
            pool.argmax.clone().into_tensor_arg(),
            input_grad.clone().into_tensor_arg(),
            walk.steps(Some(output_grad)),
            walk.steps(Some(&input_grad)),
            pool.extent(output_grad),
            walk.grid(),
            pool.window,
            walk.lanes,
            [element_type(output_grad.dtype), accumulator],
        );
    }
    input_grad
}
