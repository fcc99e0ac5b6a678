//! Forward: statistics, then normalization in place.

use burn_cubecl::cubecl;
use burn_cubecl::tensor::CubeTensor;
use cubecl::ir::ElemType;
use cubecl::prelude::*;

use crate::activation::{self, Activation};
use crate::element::{accumulator_dtype, accumulator_type, element_type};
use crate::fold::{Fold, Partial, fold_lanes, fold_of_all, partial_table, write_partial};
use crate::last_cube;
use crate::moments::{MomentsResults, Statistics, finish_moments, write_moments};
use crate::norm::{Norm, NormArgs, unit_affine};
use crate::running::{Running, RunningArgs, running_moments};
use crate::table::{Affine, ChannelTable, Moments};
use crate::walk::{
    Grid, Lanes, MAP_CUBES, REDUCTION_CUBES, Steps, Unit, Walk, index, is_idle, is_sparse,
    is_writable, positions_at_once, tensor_arg, unit, written_arg, written_over,
};
use crate::{assert_dtype, assert_shape, values_per_channel};

#[cube(launch_unchecked, address_type = "dynamic")]
fn partial_moments_kernel<E: Float, T: Float, N: Size, V: Size>(
    input: &Tensor<Vector<E, N>>,
    partials: &mut Tensor<Vector<T, V>>,
    input_steps: &Steps,
    grid: &Grid,
    #[comptime] lanes: Lanes,
    #[define(E, T)] _elements: [ElemType; 2],
) {
    if is_idle(grid) {
        terminate!();
    }
    let unit = unit::<N>(grid, lanes);
    let moments = unit_moments::<E, T, N>(input, input_steps, grid, &unit, lanes);
    write_partial::<T, N, V>(partials, &moments, &unit, lanes, Fold::Moments);
}

/// Mean and squared deviations over a cube's positions, in the unit of lane 0.
#[cube]
fn unit_moments<E: Float, T: Float, N: Size>(
    input: &Tensor<Vector<E, N>>,
    input_steps: &Steps,
    grid: &Grid,
    unit: &Unit,
    #[comptime] lanes: Lanes,
) -> Partial<T, N> {
    let mut moments = Partial::<T, N>::empty();
    let mut count = T::from_int(0);
    for first in range_stepped(unit.start, unit.end, comptime!(lanes.stride())) {
        let positions = positions_at_once(grid, unit, first, lanes);
        let mut values = Sequence::<Vector<T, N>>::new();
        #[unroll]
        for i in 0..lanes.at_once {
            let at = &positions.index(i).at;
            values.push(Vector::cast_from(input[index(input_steps, at, unit)]));
        }
        // Welford's update keeps its digits however far the mean is from zero. All components have the same count:
        // one division serves them.
        #[unroll]
        for i in 0..lanes.at_once {
            if positions.index(i).is_there {
                count += T::from_int(1);
                let value = *values.index(i);
                let delta = value - moments.first;
                moments.first += delta * Vector::new(T::from_int(1) / count);
                moments.second += delta * (value - moments.first);
            }
        }
    }
    moments.count = Vector::new(count);
    fold_lanes(&mut moments, unit, lanes, Fold::Moments);
    moments
}

/// As [`partial_moments_kernel`], and what `moments_kernel` makes of the partial results, by the last cube.
#[cube(launch_unchecked, address_type = "dynamic")]
fn moments_of_all_kernel<E: Float, T: Float, P: Float, R: Float, N: Size, V: Size>(
    input: &Tensor<Vector<E, N>>,
    gamma: ComptimeOption<&Tensor<Vector<P, V>>>,
    beta: ComptimeOption<&Tensor<Vector<P, V>>>,
    partials: &mut Tensor<Vector<T, V>>,
    arrivals: &mut [Atomic<u32>],
    mean: &mut Tensor<Vector<T, V>>,
    variance: &mut Tensor<Vector<T, V>>,
    table: &mut Tensor<Vector<T, V>>,
    running: &mut ComptimeOption<RunningArgs<R, V>>,
    input_steps: &Steps,
    norm: &NormArgs,
    grid: &Grid,
    #[comptime] lanes: Lanes,
    #[define(E, T, P, R)] _elements: [ElemType; 4],
) {
    if is_idle(grid) {
        terminate!();
    }
    let unit = unit::<N>(grid, lanes);
    let moments = unit_moments::<E, T, N>(input, input_steps, grid, &unit, lanes);
    write_partial::<T, N, V>(partials, &moments, &unit, lanes, Fold::Moments);
    let whole = fold_of_all::<T, V>(&*partials, arrivals, &unit, lanes, Fold::Moments);
    if whole.is_here {
        write_moments::<T, P, R, V>(
            &whole.partial,
            gamma,
            beta,
            mean,
            variance,
            table,
            running,
            norm,
            grid,
            &unit,
        );
    }
}

/// Tensors of `moments_of_all_kernel`.
const TENSORS: u32 = 12;

/// Mean and biased variance of each channel of `[batch, channels, spatial..]`, and the table that
/// [`normalize`] takes.
///
/// One read of the input. Partial results are means and squared deviations in f32 (f64 for f64): a mean far from
/// zero costs no digits. The variance of an empty tensor is NaN.
///
/// # Panics
///
/// Panics if gamma or beta has another number of channels than the input, or beta another dtype than gamma.
pub fn moments(input: &CubeTensor, affine: Affine, norm: Norm) -> (Moments, ChannelTable) {
    let statistics = moments_and_running(input, affine, norm, None);
    (statistics.moments, statistics.table)
}

/// As [`moments`], and running statistics after this batch, without a launch for them: as
/// [`running_moments`], in a dtype that is not larger than the accumulator's. On a device that binds fewer than
/// twelve tensors to a kernel, they take a launch.
///
/// # Panics
///
/// Panics if gamma, beta or `running` has another number of channels than the input, or beta another dtype than gamma.
pub fn moments_and_running(
    input: &CubeTensor,
    affine: Affine,
    norm: Norm,
    running: Option<&Running>,
) -> Statistics {
    affine.assert_channels(input.meta.shape()[1]);
    let [gamma, beta] = &affine.contiguous();
    let (gamma, beta) = (gamma.as_ref(), beta.as_ref());
    let affine = Affine { gamma, beta };
    let client = &input.client;
    let is_short = client.properties().hardware.max_bindings < TENSORS;
    if let Some(running) = running.filter(|_| is_short) {
        let statistics = moments_and_running(input, affine, norm, None);
        let running = running_moments(running, &statistics.moments);
        return Statistics {
            running: Some(running),
            ..statistics
        };
    }
    let accumulator = accumulator_type(input.dtype);
    let walk = Walk::new(&[input], accumulator.size(), REDUCTION_CUBES);
    let partials = partial_table(input, walk.chunks, walk.channels);
    let values = values_per_channel(input);
    if last_cube::finishes(&walk, input, TENSORS) {
        let results = MomentsResults::new(&partials, walk.channels, running);
        // SAFETY: `unit` keeps positions and channels below the input's, and those of the results.
        unsafe {
            moments_of_all_kernel::launch_unchecked(
                client,
                walk.cube_count(client),
                walk.lanes.cube_dim(),
                walk.address_type(),
                walk.vector_size,
                walk.table_vector_size(),
                input.clone().into_tensor_arg(),
                tensor_arg(affine.gamma).into(),
                tensor_arg(affine.beta).into(),
                partials.into_tensor_arg(),
                last_cube::arrivals(input),
                results.mean.clone().into_tensor_arg(),
                results.variance.clone().into_tensor_arg(),
                results.rows.clone().into_tensor_arg(),
                results.running(running).into(),
                walk.steps(Some(input)),
                norm.launch(values, accumulator),
                walk.grid(),
                walk.lanes,
                [
                    element_type(input.dtype),
                    accumulator,
                    element_type(affine.dtype(accumulator_dtype(input.dtype))),
                    running.map_or(accumulator, Running::element),
                ],
            );
        }
        return results.into_statistics(affine, norm, values);
    }
    if walk.channels > 0 {
        // SAFETY: `unit` keeps positions and channels below the input's.
        unsafe {
            partial_moments_kernel::launch_unchecked(
                client,
                walk.cube_count(client),
                walk.lanes.cube_dim(),
                walk.address_type(),
                walk.vector_size,
                walk.table_vector_size(),
                input.clone().into_tensor_arg(),
                partials.clone().into_tensor_arg(),
                walk.steps(Some(input)),
                walk.grid(),
                walk.lanes,
                [element_type(input.dtype), accumulator],
            );
        }
    }
    finish_moments(partials, affine, norm, values, running)
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn normalize_kernel<E: Float, T: Float, N: Size, V: Size>(
    input: &Tensor<Vector<E, N>>,
    residual: ComptimeOption<&Tensor<Vector<E, N>>>,
    table: ComptimeOption<&Tensor<Vector<T, V>>>,
    output: &mut Tensor<Vector<E, N>>,
    input_steps: &Steps,
    residual_steps: &Steps,
    output_steps: &Steps,
    grid: &Grid,
    #[comptime] activation: Activation,
    #[comptime] lanes: Lanes,
    #[define(E, T)] _elements: [ElemType; 2],
) {
    if is_idle(grid) {
        terminate!();
    }
    let unit = unit::<N>(grid, lanes);
    let affine = unit_affine::<T, N, V>(table, grid, &unit, lanes);
    for first in range_stepped(unit.start, unit.end, comptime!(lanes.stride())) {
        let positions = positions_at_once(grid, &unit, first, lanes);
        let mut values = Sequence::<Vector<T, N>>::new();
        #[unroll]
        for i in 0..lanes.at_once {
            let at = &positions.index(i).at;
            let mut value = Vector::<T, N>::cast_from(input[index(input_steps, at, &unit)]);
            if table.is_some() {
                value = affine.scale * (value - affine.mean) + affine.shift;
            }
            #[comptime]
            if let ComptimeOption::Some(residual) = residual {
                value += Vector::cast_from(residual[index(residual_steps, at, &unit)]);
            }
            values.push(activation::forward(value, activation));
        }
        // No write before the last read: the two may share memory.
        #[unroll]
        for i in 0..lanes.at_once {
            let position = positions.index(i);
            if position.is_there {
                let target = index(output_steps, &position.at, &unit);
                output[target] = Vector::cast_from(*values.index(i));
            }
        }
    }
}

/// `activation(scale * (input - mean) + shift + residual)`, or without a table
/// `activation(input + residual)`.
///
/// `residual` has the input's shape and dtype. The output overwrites the input if that is the only handle and at
/// most a tenth of it is padding; otherwise it is a new buffer of the same layout without gaps.
///
/// # Panics
///
/// Panics if `table` has another number of channels than the input, or `residual` another shape or dtype.
pub fn normalize(
    input: CubeTensor,
    table: Option<&ChannelTable>,
    residual: Option<&CubeTensor>,
    activation: Activation,
) -> CubeTensor {
    if let Some(table) = table {
        table.assert_channels(input.meta.shape()[1], accumulator_dtype(input.dtype));
    }
    if let Some(residual) = residual {
        assert_shape("residual", residual, input.meta.shape());
        assert_dtype("residual", residual, input.dtype);
    }
    let accumulator = accumulator_type(input.dtype);
    let in_place = is_writable(&input) && !is_sparse(&input);
    let output = written_over(&input, in_place);
    let tensors: Vec<&CubeTensor> = [&input, &output].into_iter().chain(residual).collect();
    let walk = Walk::new(&tensors, accumulator.size(), MAP_CUBES);
    if walk.is_empty() {
        return output;
    }
    let client = input.client.clone();
    let rows = table.map(ChannelTable::rows);
    // SAFETY: `unit` keeps positions and channels below the tensors' common ones, and each vector
    // of the output is written by one unit, which has read the input there.
    unsafe {
        normalize_kernel::launch_unchecked(
            &client,
            walk.cube_count(&client),
            walk.lanes.cube_dim(),
            walk.address_type(),
            walk.vector_size,
            walk.table_vector_size(),
            input.clone().into_tensor_arg(),
            tensor_arg(residual).into(),
            tensor_arg(rows.as_ref()).into(),
            written_arg(&output, in_place.then_some(0)),
            walk.steps(Some(&input)),
            walk.steps(residual),
            walk.steps(Some(&output)),
            walk.grid(),
            activation,
            walk.lanes,
            [element_type(input.dtype), accumulator],
        );
    }
    output
}
