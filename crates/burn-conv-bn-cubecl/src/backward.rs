//! Backward: sums over the gradient, then the gradient of the convolution's output in place.

use burn_backend::ops::FloatTensorOps;
use burn_cubecl::CubeBackend;
use burn_cubecl::cubecl;
use burn_cubecl::tensor::CubeTensor;
use cubecl::ir::ElemType;
use cubecl::prelude::*;

use crate::activation::Activation;
use crate::fold::{Fold, Partial, fold_lanes, fold_of_all, partial_table, write_partial};
use crate::last_cube;
use crate::norm::{NormArgs, rows, unit_affine, unit_norm};
use crate::pool::PoolWindow;
use crate::pre_activation::{PreActivation, PreActivationSteps, grads_at};
use crate::table::{self, AffineGrads, ChannelTable, SumsResults, write_grads};
use crate::walk::{
    Grid, Lanes, MAP_CUBES, REDUCTION_CUBES, Steps, Unit, Walk, empty_like, index, is_idle,
    is_writable, positions_at_once, row, tensor_arg, unit, written_arg, written_over,
};

#[cube(launch_unchecked, address_type = "dynamic")]
fn partial_sums_kernel<E: Float, T: Float, P: Float, N: Size, V: Size>(
    output_grad: &Tensor<Vector<E, N>>,
    argmax: ComptimeOption<&Tensor<u32>>,
    norm_input: ComptimeOption<&Tensor<Vector<E, N>>>,
    residual: ComptimeOption<&Tensor<Vector<E, N>>>,
    output: ComptimeOption<&Tensor<Vector<E, N>>>,
    mean: ComptimeOption<&Tensor<Vector<T, V>>>,
    variance: ComptimeOption<&Tensor<Vector<T, V>>>,
    gamma: ComptimeOption<&Tensor<Vector<P, V>>>,
    beta: ComptimeOption<&Tensor<Vector<P, V>>>,
    partials: &mut Tensor<Vector<T, V>>,
    norm: &NormArgs,
    steps: &PreActivationSteps,
    grid: &Grid,
    #[comptime] activation: Activation,
    #[comptime] window: PoolWindow,
    #[comptime] lanes: Lanes,
    #[define(E, T, P)] _elements: [ElemType; 3],
) {
    if is_idle(grid) {
        terminate!();
    }
    let unit = unit::<N>(grid, lanes);
    let sums = unit_sums::<E, T, P, N, V>(
        output_grad,
        argmax,
        norm_input,
        residual,
        output,
        mean,
        variance,
        gamma,
        beta,
        norm,
        steps,
        grid,
        &unit,
        activation,
        window,
        lanes,
    );
    write_partial::<T, N, V>(partials, &sums, &unit, lanes, Fold::Sums);
}

/// `sum(g)` and `sum(g * (value - mean))` over a cube's positions, in the unit of lane 0.
#[cube]
fn unit_sums<E: Float, T: Float, P: Float, N: Size, V: Size>(
    output_grad: &Tensor<Vector<E, N>>,
    argmax: ComptimeOption<&Tensor<u32>>,
    norm_input: ComptimeOption<&Tensor<Vector<E, N>>>,
    residual: ComptimeOption<&Tensor<Vector<E, N>>>,
    output: ComptimeOption<&Tensor<Vector<E, N>>>,
    mean: ComptimeOption<&Tensor<Vector<T, V>>>,
    variance: ComptimeOption<&Tensor<Vector<T, V>>>,
    gamma: ComptimeOption<&Tensor<Vector<P, V>>>,
    beta: ComptimeOption<&Tensor<Vector<P, V>>>,
    norm: &NormArgs,
    steps: &PreActivationSteps,
    grid: &Grid,
    unit: &Unit,
    #[comptime] activation: Activation,
    #[comptime] window: PoolWindow,
    #[comptime] lanes: Lanes,
) -> Partial<T, N> {
    // From the statistics: this launch waits for no table.
    let affine = unit_norm::<T, P, N, V>(mean, variance, gamma, beta, norm, unit, lanes);
    let mut sums = Partial::<T, N>::empty();
    for first in range_stepped(unit.start, unit.end, comptime!(lanes.stride())) {
        let positions = positions_at_once(grid, unit, first, lanes);
        let grads = grads_at(
            output_grad,
            argmax,
            norm_input,
            residual,
            output,
            steps,
            &affine,
            &positions,
            unit,
            activation,
            window,
        );
        #[unroll]
        for i in 0..lanes.at_once {
            if positions.index(i).is_there {
                let value = grads.index(i);
                sums.first += value.grad;
                sums.second += value.grad * value.deviation;
            }
        }
    }
    fold_lanes(&mut sums, unit, lanes, Fold::Sums);
    sums
}

/// As [`partial_sums_kernel`], and what `grads_kernel` makes of the sums, by the last cube.
#[cube(launch_unchecked, address_type = "dynamic")]
fn sums_kernel<E: Float, T: Float, P: Float, N: Size, V: Size>(
    output_grad: &Tensor<Vector<E, N>>,
    argmax: ComptimeOption<&Tensor<u32>>,
    norm_input: ComptimeOption<&Tensor<Vector<E, N>>>,
    residual: ComptimeOption<&Tensor<Vector<E, N>>>,
    output: ComptimeOption<&Tensor<Vector<E, N>>>,
    mean: &Tensor<Vector<T, V>>,
    variance: &Tensor<Vector<T, V>>,
    gamma: ComptimeOption<&Tensor<Vector<P, V>>>,
    beta: ComptimeOption<&Tensor<Vector<P, V>>>,
    partials: &mut Tensor<Vector<T, V>>,
    arrivals: &mut [Atomic<u32>],
    table: &mut Tensor<Vector<T, V>>,
    gamma_grad: &mut Tensor<Vector<P, V>>,
    beta_grad: &mut Tensor<Vector<P, V>>,
    norm: &NormArgs,
    steps: &PreActivationSteps,
    grid: &Grid,
    #[comptime] activation: Activation,
    #[comptime] window: PoolWindow,
    #[comptime] lanes: Lanes,
    #[define(E, T, P)] _elements: [ElemType; 3],
) {
    if is_idle(grid) {
        terminate!();
    }
    let unit = unit::<N>(grid, lanes);
    let sums = unit_sums::<E, T, P, N, V>(
        output_grad,
        argmax,
        norm_input,
        residual,
        output,
        ComptimeOption::new_Some(mean),
        ComptimeOption::new_Some(variance),
        gamma,
        beta,
        norm,
        steps,
        grid,
        &unit,
        activation,
        window,
        lanes,
    );
    write_partial::<T, N, V>(partials, &sums, &unit, lanes, Fold::Sums);
    let whole = fold_of_all::<T, V>(&*partials, arrivals, &unit, lanes, Fold::Sums);
    if whole.is_here {
        write_grads::<T, P, V>(
            &whole.partial,
            mean,
            variance,
            gamma,
            beta,
            table,
            gamma_grad,
            beta_grad,
            norm,
            grid,
            &unit,
            true,
        );
    }
}

/// Tensors of `sums_kernel`: a residual and an output exclude each other.
const TENSORS: u32 = 13;

/// Partial results of `sum(g)` and `sum(g * (value - mean))` for each channel.
///
/// [The examples of the crate](crate#examples) take the sums over a whole batch. Over one that comes in
/// chunks:
///
/// ```no_run
/// use burn_conv_bn_cubecl::{ChannelTable, GradSums, PreActivation};
///
/// /// The sums over a batch in one or more chunks.
/// fn sums(chunks: &[PreActivation], table: &ChannelTable) -> GradSums {
///     let sums = chunks.iter().map(|chunk| GradSums::new(chunk, Some(table)));
///     sums.reduce(GradSums::merge).expect("a batch has a chunk")
/// }
/// ```
#[derive(Debug)]
pub struct GradSums {
    partials: Vec<CubeTensor>,
    /// What the launch made of them, if its last cube finished it.
    finished: Option<SumsResults>,
}

impl GradSums {
    /// The sums over one chunk of the batch. A norm's input needs `table`.
    ///
    /// One read of each tensor.
    ///
    /// # Panics
    ///
    /// Panics if the tensors do not fit each other in shape or dtype, or `table` has another number of channels.
    pub fn new(pre_activation: &PreActivation, table: Option<&ChannelTable>) -> Self {
        pre_activation.assert_fits(table);
        let walk = pre_activation.walk(&[], REDUCTION_CUBES);
        let output_grad = &pre_activation.output_grad;
        let partials = partial_table(output_grad, walk.chunks, walk.channels);
        let whole = table.zip(pre_activation.norm_input.as_ref());
        let whole = whole.filter(|(table, norm_input)| table.is_over(norm_input));
        let finished = match whole {
            Some((table, _)) if last_cube::finishes(&walk, output_grad, TENSORS) => {
                Some(launch_sums(pre_activation, table, &walk, &partials))
            }
            _ => {
                launch_partial_sums(pre_activation, table, &walk, &partials);
                None
            }
        };
        Self {
            partials: vec![partials],
            finished,
        }
    }

    /// The sums over two chunks.
    #[must_use]
    pub fn merge(mut self, other: Self) -> Self {
        debug_assert!(
            self.finished.is_none() && other.finished.is_none(),
            "sums over a chunk: expected partial results, got finished ones"
        );
        self.partials.extend(other.partials);
        self.finished = None;
        self
    }

    /// Gradients of the norm's parameters, in their dtype, or the accumulator's without any. Completes the sums' `table`
    /// for [`norm_input_grad`].
    ///
    /// # Panics
    ///
    /// Panics if `table` has another number of channels than the sums.
    pub fn finish(mut self, table: &ChannelTable) -> AffineGrads {
        // Partial results are `[planes, rows, channels]`.
        let partials = &self.partials[0];
        table.assert_channels(partials.meta.shape()[2], partials.dtype);
        match self.finished.take() {
            Some(results) => results.complete(table),
            None => table::finish_sums(self.join(), table),
        }
    }

    /// `sum(g)`, `[channels]` in the accumulator's dtype.
    pub fn grad(self) -> CubeTensor {
        table::finish_grad_sum(self.join())
    }

    fn join(mut self) -> CubeTensor {
        if self.partials.len() == 1 {
            return self.partials.remove(0);
        }
        CubeBackend::float_cat(self.partials, 1)
    }
}

fn launch_partial_sums(
    pre_activation: &PreActivation,
    table: Option<&ChannelTable>,
    walk: &Walk,
    partials: &CubeTensor,
) {
    if walk.channels == 0 {
        return;
    }
    let output_grad = &pre_activation.output_grad;
    let client = &output_grad.client;
    let [element, accumulator] = pre_activation.elements();
    let parameters = table.map_or(accumulator, ChannelTable::parameter_type);
    // SAFETY: `unit` keeps positions and channels below the tensors' common ones.
    unsafe {
        partial_sums_kernel::launch_unchecked(
            client,
            walk.cube_count(client),
            walk.lanes.cube_dim(),
            walk.address_type(),
            walk.vector_size,
            walk.table_vector_size(),
            output_grad.clone().into_tensor_arg(),
            tensor_arg(pre_activation.argmax()).into(),
            tensor_arg(pre_activation.norm_input.as_ref()).into(),
            tensor_arg(pre_activation.added_residual()).into(),
            tensor_arg(pre_activation.masking_output()).into(),
            tensor_arg(table.map(|table| &table.moments.mean)).into(),
            tensor_arg(table.map(|table| &table.moments.variance)).into(),
            tensor_arg(table.and_then(|table| table.gamma.as_ref())).into(),
            tensor_arg(table.and_then(|table| table.beta.as_ref())).into(),
            partials.clone().into_tensor_arg(),
            table::args(table, accumulator),
            pre_activation.steps(walk),
            walk.grid(),
            pre_activation.activation,
            pre_activation.window(),
            walk.lanes,
            [element, accumulator, parameters],
        );
    }
}

/// The partial sums and what the last cube makes of them.
fn launch_sums(
    pre_activation: &PreActivation,
    table: &ChannelTable,
    walk: &Walk,
    partials: &CubeTensor,
) -> SumsResults {
    let output_grad = &pre_activation.output_grad;
    let client = &output_grad.client;
    let [element, accumulator] = pre_activation.elements();
    let results = SumsResults::new(partials, table, walk.channels);
    // SAFETY: `unit` keeps positions and channels below the tensors' common ones, and those of the results.
    unsafe {
        sums_kernel::launch_unchecked(
            client,
            walk.cube_count(client),
            walk.lanes.cube_dim(),
            walk.address_type(),
            walk.vector_size,
            walk.table_vector_size(),
            output_grad.clone().into_tensor_arg(),
            tensor_arg(pre_activation.argmax()).into(),
            tensor_arg(pre_activation.norm_input.as_ref()).into(),
            tensor_arg(pre_activation.added_residual()).into(),
            tensor_arg(pre_activation.masking_output()).into(),
            table.moments.mean.clone().into_tensor_arg(),
            table.moments.variance.clone().into_tensor_arg(),
            tensor_arg(table.gamma.as_ref()).into(),
            tensor_arg(table.beta.as_ref()).into(),
            partials.clone().into_tensor_arg(),
            last_cube::arrivals(output_grad),
            results.rows.clone().into_tensor_arg(),
            results.grads.gamma.clone().into_tensor_arg(),
            results.grads.beta.clone().into_tensor_arg(),
            table::args(Some(table), accumulator),
            pre_activation.steps(walk),
            walk.grid(),
            pre_activation.activation,
            pre_activation.window(),
            walk.lanes,
            [element, accumulator, table.parameter_type()],
        );
    }
    results
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn norm_input_grad_kernel<E: Float, T: Float, N: Size, V: Size>(
    output_grad: &Tensor<Vector<E, N>>,
    argmax: ComptimeOption<&Tensor<u32>>,
    norm_input: ComptimeOption<&Tensor<Vector<E, N>>>,
    residual: ComptimeOption<&Tensor<Vector<E, N>>>,
    output: ComptimeOption<&Tensor<Vector<E, N>>>,
    table: ComptimeOption<&Tensor<Vector<T, V>>>,
    target: &mut Tensor<Vector<E, N>>,
    mut residual_grad: ComptimeOption<&mut Tensor<Vector<E, N>>>,
    steps: &PreActivationSteps,
    target_steps: &Steps,
    residual_grad_steps: &Steps,
    grid: &Grid,
    #[comptime] activation: Activation,
    #[comptime] window: PoolWindow,
    #[comptime] is_of_batch: bool,
    #[comptime] lanes: Lanes,
    #[define(E, T)] _elements: [ElemType; 2],
) {
    if is_idle(grid) {
        terminate!();
    }
    let unit = unit::<N>(grid, lanes);
    let affine = unit_affine::<T, N, V>(table, grid, &unit, lanes);
    let mut slope = Vector::<T, N>::zero();
    let mut offset = Vector::<T, N>::zero();
    #[comptime]
    if let ComptimeOption::Some(table) = table {
        if comptime!(is_of_batch) {
            slope = row::<T, N, V>(table, grid, &unit, rows::SLOPE, lanes);
            offset = row::<T, N, V>(table, grid, &unit, rows::OFFSET, lanes);
        }
    }
    for first in range_stepped(unit.start, unit.end, comptime!(lanes.stride())) {
        let positions = positions_at_once(grid, &unit, first, lanes);
        let grads = grads_at(
            output_grad,
            argmax,
            norm_input,
            residual,
            output,
            steps,
            &affine,
            &positions,
            &unit,
            activation,
            window,
        );
        // No write before the last read: the two may share memory.
        #[unroll]
        for i in 0..lanes.at_once {
            let position = positions.index(i);
            if position.is_there {
                let value = grads.index(i);
                #[comptime]
                if let ComptimeOption::Some(residual_grad) = &mut residual_grad {
                    let index = index(residual_grad_steps, &position.at, &unit);
                    residual_grad[index] = Vector::cast_from(value.grad);
                }
                let mut grad = value.grad;
                if table.is_some() {
                    grad = affine.scale * value.grad;
                    if comptime!(is_of_batch) {
                        grad = grad + slope * value.deviation + offset;
                    }
                }
                let index = index(target_steps, &position.at, &unit);
                target[index] = Vector::cast_from(grad);
            }
        }
    }
}

/// Results of [`norm_input_grad`].
#[derive(Debug)]
pub struct NormInputGrad {
    /// Gradient of the norm's input; without a norm, of the pre-activation.
    pub grad: CubeTensor,
    /// `g`, if requested.
    pub residual_grad: Option<CubeTensor>,
}

/// Gradient of the norm's input, by a table that [`GradSums::finish`] completed:
/// `scale * g + slope * (value - mean) + offset`. With
/// [constant statistics](ChannelTable::with_constant_statistics) it is `scale * g`, and needs no norm's input;
/// without a table it is `g`.
///
/// It overwrites the norm's input, or without one the output's gradient, if that is the only handle; otherwise it
/// is a new buffer of the same layout. One read of each tensor.
///
/// # Panics
///
/// Panics if the tensors do not fit each other, if `table` has another number of channels, or if it is of the batch's
/// statistics and no sums completed it.
pub fn norm_input_grad(
    pre_activation: PreActivation,
    table: Option<&ChannelTable>,
    wants_residual_grad: bool,
) -> NormInputGrad {
    pre_activation.assert_fits(table);
    let output_grad = &pre_activation.output_grad;
    let is_unchanged = pre_activation.activation == Activation::Identity;
    if table.is_none() && is_unchanged {
        return NormInputGrad {
            residual_grad: wants_residual_grad.then(|| output_grad.clone()),
            grad: pre_activation.output_grad,
        };
    }
    let (overwritten, position) = match &pre_activation.norm_input {
        Some(norm_input) => (norm_input, 1 + usize::from(pre_activation.pool.is_some())),
        None => (output_grad, 0),
    };
    // Without an activation `g` is the output's gradient, which must survive as the residual's.
    let returns_output_grad = wants_residual_grad && is_unchanged;
    let in_place =
        is_writable(overwritten) && !(returns_output_grad && pre_activation.norm_input.is_none());
    let grad = written_over(overwritten, in_place);
    let residual_grad = wants_residual_grad.then(|| match table {
        Some(_) if is_unchanged => output_grad.clone(),
        Some(_) => empty_like(overwritten),
        None => grad.clone(),
    });
    let written_residual_grad = residual_grad
        .as_ref()
        .filter(|_| !is_unchanged && table.is_some());
    let others: Vec<&CubeTensor> = [&grad].into_iter().chain(written_residual_grad).collect();
    let walk = pre_activation.walk(&others, MAP_CUBES);
    if walk.is_empty() {
        return NormInputGrad {
            grad,
            residual_grad,
        };
    }
    let client = output_grad.client.clone();
    let rows = table.map(ChannelTable::grad_rows);
    // SAFETY: `unit` keeps positions and channels below the tensors' common ones, and each vector
    // of the target is written by one unit, which has read the inputs there.
    unsafe {
        norm_input_grad_kernel::launch_unchecked(
            &client,
            walk.cube_count(&client),
            walk.lanes.cube_dim(),
            walk.address_type(),
            walk.vector_size,
            walk.table_vector_size(),
            output_grad.clone().into_tensor_arg(),
            tensor_arg(pre_activation.argmax()).into(),
            tensor_arg(pre_activation.norm_input.as_ref()).into(),
            tensor_arg(pre_activation.added_residual()).into(),
            tensor_arg(pre_activation.masking_output()).into(),
            tensor_arg(rows.as_ref()).into(),
            written_arg(&grad, in_place.then_some(position)),
            tensor_arg(written_residual_grad).into(),
            pre_activation.steps(&walk),
            walk.steps(Some(&grad)),
            walk.steps(written_residual_grad),
            walk.grid(),
            pre_activation.activation,
            pre_activation.window(),
            table.is_none_or(|table| table.is_of_batch),
            walk.lanes,
            pre_activation.elements(),
        );
    }
    NormInputGrad {
        grad,
        residual_grad,
    }
}
