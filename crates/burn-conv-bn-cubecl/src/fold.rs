//! Reductions over positions: within a unit, across a cube, and across cubes.

use burn_cubecl::cubecl;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;
use cubecl::zspace::Shape;

use crate::walk::{Axis, Lanes, Unit};

/// Kind of a partial result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Fold {
    /// Two sums.
    Sums,
    /// A mean and the sum of squared deviations from it, after
    /// [Chan, Golub and LeVeque 1979](http://i.stanford.edu/pub/cstr/reports/cs/tr/79/773/CS-TR-79-773.pdf).
    Moments,
}

/// A vector of one component.
pub(crate) type One = Const<1>;

/// Planes of a table of partial results: the count, and two results.
const PLANES: usize = 3;

/// Partial result over `count` values, for each component of a vector.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Partial<T: Float, N: Size> {
    pub(crate) count: Vector<T, N>,
    pub(crate) first: Vector<T, N>,
    pub(crate) second: Vector<T, N>,
}

#[cube]
impl<T: Float, N: Size> Partial<T, N> {
    /// The result over no values.
    pub(crate) fn empty() -> Self {
        Partial::<T, N> {
            count: Vector::zero(),
            first: Vector::zero(),
            second: Vector::zero(),
        }
    }
}

/// Adds the result over other values.
#[cube]
pub(crate) fn absorb<T: Float, N: Size>(
    this: &mut Partial<T, N>,
    other: &Partial<T, N>,
    #[comptime] fold: Fold,
) {
    let count = this.count + other.count;
    match comptime!(fold) {
        Fold::Sums => {
            this.first += other.first;
            this.second += other.second;
        }
        Fold::Moments => {
            // Without any values the share is 0, not 0 / 0.
            let one = Vector::new(T::from_int(1));
            let share = other.count / max(count, one);
            let delta = other.first - this.first;
            // A count of 0 is multiplied in before the square can overflow.
            this.second += other.second + delta * share * this.count * delta;
            this.first += delta * share;
        }
    }
    this.count = count;
}

/// Folds the partial results of a cube's units with the same channels, into the unit of lane 0.
#[cube]
pub(crate) fn fold_lanes<T: Float, N: Size>(
    result: &mut Partial<T, N>,
    unit: &Unit,
    #[comptime] lanes: Lanes,
    #[comptime] fold: Fold,
) {
    if comptime!(lanes.positions > 1) {
        let mut counts = Shared::<[Vector<T, N>]>::new_slice(comptime!(lanes.units()));
        let mut firsts = Shared::<[Vector<T, N>]>::new_slice(comptime!(lanes.units()));
        let mut seconds = Shared::<[Vector<T, N>]>::new_slice(comptime!(lanes.units()));
        let this = UNIT_POS as usize;

        let steps = comptime!(lanes.positions.ilog2());
        #[unroll]
        for step in 0..steps {
            let reach = comptime!(lanes.positions >> (step + 1));
            counts[this] = result.count;
            firsts[this] = result.first;
            seconds[this] = result.second;
            sync_cube();
            if unit.lane < reach {
                let other = this + comptime!(reach * lanes.channels);
                let other = Partial::<T, N> {
                    count: counts[other],
                    first: firsts[other],
                    second: seconds[other],
                };
                absorb(result, &other, fold);
            }
            sync_cube();
        }
    }
}

/// Writes the result of the unit of lane 0 into row `unit.chunk` of the table.
#[cube]
pub(crate) fn write_partial<T: Float, N: Size>(
    table: &mut Tensor<T>,
    partial: &Partial<T, N>,
    unit: &Unit,
    channels: usize,
    #[comptime] lanes: Lanes,
    #[comptime] fold: Fold,
) {
    if unit.lane == 0 && unit.has_channel {
        let plane = table.len() / PLANES;
        let start = unit.chunk * channels + unit.channel;
        match comptime!(lanes.axis) {
            Axis::Channels =>
            {
                #[unroll]
                for component in 0..N::value() {
                    table[start + component] = partial.count.extract(component);
                    table[plane + start + component] = partial.first.extract(component);
                    table[2 * plane + start + component] = partial.second.extract(component);
                }
            }
            Axis::Positions => {
                let mut result = component(partial, 0usize);
                #[unroll]
                for index in 1..N::value() {
                    absorb(&mut result, &component(partial, index), fold);
                }
                table[start] = result.count.extract(0usize);
                table[plane + start] = result.first.extract(0usize);
                table[2 * plane + start] = result.second.extract(0usize);
            }
        }
    }
}

#[cube]
fn component<T: Float, N: Size>(
    partial: &Partial<T, N>,
    #[comptime] index: usize,
) -> Partial<T, One> {
    Partial::<T, One> {
        count: Vector::new(partial.count.extract(index)),
        first: Vector::new(partial.first.extract(index)),
        second: Vector::new(partial.second.extract(index)),
    }
}

/// Folds the rows of a table of partial results for one channel per unit, into the unit of lane 0. The table need
/// not be contiguous: a concatenated one has the device's pitch.
#[cube]
pub(crate) fn fold_rows<T: Float>(
    table: &Tensor<T>,
    unit: &Unit,
    #[comptime] lanes: Lanes,
    #[comptime] fold: Fold,
) -> Partial<T, One> {
    let plane = table.stride(0);
    let mut result = Partial::<T, One>::empty();
    for row in range_stepped(unit.start, unit.end, lanes.positions) {
        let index = row * table.stride(1) + unit.channel * table.stride(2);
        let other = Partial::<T, One> {
            count: Vector::new(table[index]),
            first: Vector::new(table[plane + index]),
            second: Vector::new(table[2 * plane + index]),
        };
        absorb(&mut result, &other, fold);
    }
    fold_lanes(&mut result, unit, lanes, fold);
    result
}

/// Table of `rows` partial results per channel, contiguous, without values.
pub(crate) fn partial_table(like: &CubeTensor, rows: usize, channels: usize) -> CubeTensor {
    empty_device_contiguous_dtype(
        like.client.clone(),
        like.device.clone(),
        Shape::from(vec![PLANES, rows, channels]),
        crate::accumulator_dtype(like.dtype),
    )
}
