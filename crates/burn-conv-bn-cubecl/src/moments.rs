//! Per channel, the end of the forward reduction: moments, the norm's coefficients, running statistics.

use burn_cubecl::cubecl;
use burn_cubecl::tensor::CubeTensor;
use cubecl::ir::ElemType;
use cubecl::prelude::*;

use crate::element::element_type;
use crate::fold::{Fold, Partial, fold_rows};
use crate::norm::{Norm, NormArgs, channel_affine, rows, write_affine};
use crate::running::{Running, RunningArgs, RunningArgsLaunch, update_channels};
use crate::table::{Affine, ChannelTable, Moments, channel_table, channel_values};
use crate::walk::{Grid, Lanes, Unit, Walk, is_idle, tensor_arg, unit};

#[cube(launch_unchecked, address_type = "dynamic")]
fn moments_kernel<T: Float, P: Float, R: Float, V: Size>(
    partials: &Tensor<Vector<T, V>>,
    gamma: ComptimeOption<&Tensor<Vector<P, V>>>,
    beta: ComptimeOption<&Tensor<Vector<P, V>>>,
    mean: &mut Tensor<Vector<T, V>>,
    variance: &mut Tensor<Vector<T, V>>,
    table: &mut Tensor<Vector<T, V>>,
    running: &mut ComptimeOption<RunningArgs<R, V>>,
    norm: &NormArgs,
    grid: &Grid,
    #[comptime] lanes: Lanes,
    #[define(T, P, R)] _elements: [ElemType; 3],
) {
    if is_idle(grid) {
        terminate!();
    }
    let unit = unit::<V>(grid, lanes);
    let moments = fold_rows::<T, V>(partials, &unit, lanes, Fold::Moments);
    if unit.lane == 0 && unit.has_channel {
        write_moments::<T, P, R, V>(
            &moments, gamma, beta, mean, variance, table, running, norm, grid, &unit,
        );
    }
}

/// Writes the moments of a unit's channels, the rows of `scale * (value - mean) + shift`, and the running statistics.
#[cube]
pub(crate) fn write_moments<T: Float, P: Float, R: Float, V: Size>(
    moments: &Partial<T, V>,
    gamma: ComptimeOption<&Tensor<Vector<P, V>>>,
    beta: ComptimeOption<&Tensor<Vector<P, V>>>,
    mean: &mut Tensor<Vector<T, V>>,
    variance: &mut Tensor<Vector<T, V>>,
    table: &mut Tensor<Vector<T, V>>,
    running: &mut ComptimeOption<RunningArgs<R, V>>,
    norm: &NormArgs,
    grid: &Grid,
    unit: &Unit,
) {
    let vector = unit.vector;
    let biased = moments.second / Vector::new(norm.values.get::<T>());
    mean[vector] = moments.first;
    variance[vector] = biased;
    let affine = channel_affine::<T, P, V>(moments.first, biased, gamma, beta, norm, vector);
    write_affine(table, &affine, vector, grid.channels / unit.width);
    #[comptime]
    if let ComptimeOption::Some(running) = running {
        update_channels::<T, R, V>(running, moments.first, biased, vector);
    }
}

/// What a launch writes that finishes moments.
pub(crate) struct MomentsResults {
    pub(crate) mean: CubeTensor,
    pub(crate) variance: CubeTensor,
    /// Of `scale * (value - mean) + shift`.
    pub(crate) rows: CubeTensor,
    running: Option<Moments>,
}

impl MomentsResults {
    pub(crate) fn new(partials: &CubeTensor, channels: usize, running: Option<&Running>) -> Self {
        let per_channel = |rows: usize| channel_values(partials, rows, channels);
        Self {
            mean: per_channel(1),
            variance: per_channel(1),
            rows: per_channel(rows::AFFINE),
            running: running.map(|running| running.results(channels)),
        }
    }

    pub(crate) fn running<R: Float, V: Size>(
        &self,
        running: Option<&Running>,
    ) -> Option<RunningArgsLaunch<R, V>> {
        let accumulator = element_type(self.mean.dtype);
        let results = running.zip(self.running.as_ref());
        results.map(|(running, results)| running.launch(results, accumulator))
    }

    pub(crate) fn into_statistics(self, affine: Affine, norm: Norm, values: usize) -> Statistics {
        let moments = Moments {
            mean: self.mean,
            variance: self.variance,
        };
        Statistics {
            table: channel_table(&moments, affine, norm, values).with_rows(self.rows),
            moments,
            running: self.running,
        }
    }
}

/// Results of [`moments_and_running`](crate::moments_and_running).
#[derive(Debug)]
pub struct Statistics {
    /// The batch's.
    pub moments: Moments,
    /// For [`normalize`](crate::normalize).
    pub table: ChannelTable,
    /// Running ones after the batch, if any were given.
    pub running: Option<Moments>,
}

/// Statistics from partial moments over `values` values per channel.
pub(crate) fn finish_moments(
    partials: CubeTensor,
    affine: Affine,
    norm: Norm,
    values: usize,
    running: Option<&Running>,
) -> Statistics {
    let walk = Walk::over_rows(&partials);
    let results = MomentsResults::new(&partials, walk.channels, running);
    let client = partials.client.clone();
    let dtype = element_type(partials.dtype);
    if !walk.is_empty() {
        // SAFETY: `unit` keeps the rows and channels below those of the table.
        unsafe {
            moments_kernel::launch_unchecked(
                &client,
                walk.cube_count(&client),
                walk.lanes.cube_dim(),
                walk.address_type(),
                walk.vector_size,
                partials.into_tensor_arg(),
                tensor_arg(affine.gamma).into(),
                tensor_arg(affine.beta).into(),
                results.mean.clone().into_tensor_arg(),
                results.variance.clone().into_tensor_arg(),
                results.rows.clone().into_tensor_arg(),
                results.running(running).into(),
                norm.launch(values, dtype),
                walk.grid(),
                walk.lanes,
                [
                    dtype,
                    element_type(affine.dtype(results.mean.dtype)),
                    running.map_or(dtype, Running::element),
                ],
            );
        }
    }
    results.into_statistics(affine, norm, values)
}
