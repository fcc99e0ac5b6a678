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

/// Planes of a table of partial results: the count, and two results.
const PLANES: usize = 3;

/// Rows of such a table that a unit reads before it folds them.
const ROWS_AT_ONCE: usize = 4;

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

/// Writes the result of the unit of lane 0 into row `unit.chunk` of the contiguous table.
#[cube]
pub(crate) fn write_partial<T: Float, N: Size, V: Size>(
    table: &mut Tensor<Vector<T, V>>,
    partial: &Partial<T, N>,
    unit: &Unit,
    #[comptime] lanes: Lanes,
    #[comptime] fold: Fold,
) {
    if unit.lane == 0 && unit.has_channel {
        let mut result = component::<T, N, V>(partial, 0usize, lanes);
        if comptime!(lanes.axis == Axis::Positions) {
            #[unroll]
            for index in 1..N::value() {
                absorb(&mut result, &component(partial, index, lanes), fold);
            }
        }
        let plane = table.stride(0) / unit.width;
        let start = unit.chunk * (table.stride(1) / unit.width) + unit.vector;
        table[start] = result.count;
        table[plane + start] = result.first;
        table[2 * plane + start] = result.second;
    }
}

/// One position's result of a vector along positions; all of a vector along channels.
#[cube]
fn component<T: Float, N: Size, V: Size>(
    partial: &Partial<T, N>,
    #[comptime] index: usize,
    #[comptime] lanes: Lanes,
) -> Partial<T, V> {
    match comptime!(lanes.axis) {
        Axis::Positions => Partial::<T, V> {
            count: Vector::new(partial.count.extract(index)),
            first: Vector::new(partial.first.extract(index)),
            second: Vector::new(partial.second.extract(index)),
        },
        Axis::Channels => Partial::<T, V> {
            count: Vector::cast_from(partial.count),
            first: Vector::cast_from(partial.first),
            second: Vector::cast_from(partial.second),
        },
    }
}

/// Folds the rows of a table of partial results for a unit's channels, into the unit of lane 0.
#[cube]
pub(crate) fn fold_rows<T: Float, V: Size>(
    table: &Tensor<Vector<T, V>>,
    unit: &Unit,
    #[comptime] lanes: Lanes,
    #[comptime] fold: Fold,
) -> Partial<T, V> {
    let mut result = unit_rows::<T, V>(table, unit, unit.end, lanes, fold);
    fold_lanes(&mut result, unit, lanes, fold);
    result
}

/// Folds the rows of a unit's lane below `end` for its channels. The table need not be contiguous: a concatenated one
/// has the device's pitch.
#[cube]
fn unit_rows<T: Float, V: Size>(
    table: &Tensor<Vector<T, V>>,
    unit: &Unit,
    end: usize,
    #[comptime] lanes: Lanes,
    #[comptime] fold: Fold,
) -> Partial<T, V> {
    let mut result = Partial::<T, V>::empty();
    let stride = comptime!(lanes.positions * ROWS_AT_ONCE);
    for first in range_stepped(unit.lane, end, stride) {
        // One wait for several reads.
        let mut others = Sequence::<Partial<T, V>>::new();
        #[unroll]
        for i in 0..ROWS_AT_ONCE {
            let row = first + comptime!(i * lanes.positions);
            others.push(read_row::<T, V>(table, row, end, unit));
        }
        #[unroll]
        for i in 0..ROWS_AT_ONCE {
            absorb(&mut result, others.index(i), fold);
        }
    }
    result
}

/// One row for a unit's channels; at `end` and behind, the result over no values.
#[cube]
fn read_row<T: Float, V: Size>(
    table: &Tensor<Vector<T, V>>,
    row: usize,
    end: usize,
    unit: &Unit,
) -> Partial<T, V> {
    let plane = table.stride(0) / unit.width;
    let start = min(row, end - 1) * (table.stride(1) / unit.width) + unit.vector;
    let is_there = row < end;
    let zero = Vector::<T, V>::zero();
    Partial::<T, V> {
        count: select(is_there, table[start], zero),
        first: select(is_there, table[plane + start], zero),
        second: select(is_there, table[2 * plane + start], zero),
    }
}

/// The result over all cubes, where it is.
#[derive(CubeType)]
pub(crate) struct Whole<T: Float, V: Size> {
    pub(crate) partial: Partial<T, V>,
    /// Whether this unit has it: that of lane 0 in the last cube.
    pub(crate) is_here: bool,
}

/// Folds the rows that all cubes with the same channels wrote by [`write_partial`], in the last of them. Each counts
/// its arrival in `arrivals[unit.block]`, which is 0 before the launch.
#[cube]
pub(crate) fn fold_of_all<T: Float, V: Size>(
    table: &Tensor<Vector<T, V>>,
    arrivals: &mut [Atomic<u32>],
    unit: &Unit,
    #[comptime] lanes: Lanes,
    #[comptime] fold: Fold,
) -> Whole<T, V> {
    let mut arrived = Shared::<u32>::new();
    // The row is written before the arrival is counted, and the last cube's reads come after.
    sync_storage();
    if UNIT_POS == 0 {
        *arrived = arrivals[unit.block].fetch_add(1u32);
    }
    sync_storage();
    let is_last = *arrived as usize + 1 == unit.chunks;
    // All cubes meet at the fold's barriers, most of them with nothing.
    let rows = select(is_last && unit.has_channel, unit.chunks, 0usize);
    let mut partial = unit_rows::<T, V>(table, unit, rows, lanes, fold);
    fold_lanes(&mut partial, unit, lanes, fold);
    Whole::<T, V> {
        partial,
        is_here: is_last && unit.has_channel && unit.lane == 0,
    }
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
