//! Backward: sums over the gradient, then the gradient of the convolution's output in place.

use burn_backend::ops::FloatTensorOps;
use burn_cubecl::CubeBackend;
use burn_cubecl::cubecl;
use burn_cubecl::tensor::CubeTensor;
use cubecl::ir::ElemType;
use cubecl::prelude::*;

use crate::activation::{self, Activation};
use crate::element::{accumulator_type, element_type};
use crate::fold::{Fold, Partial, fold_lanes, partial_table, write_partial};
use crate::norm::{NormArgs, UnitAffine, rows, unit_affine, unit_norm};
use crate::pool::{PoolArgmax, PoolExtent, PoolWindow, no_extent, pooled_grad};
use crate::table::{self, AffineGrads, ChannelTable};
use crate::walk::{
    Grid, Lanes, MAP_CUBES, REDUCTION_CUBES, Steps, Unit, Walk, coordinates, empty_like, index,
    is_idle, is_writable, row, tensor_arg, unit, written_arg, written_over,
};

/// Operands of the gradient at the pre-activation `v`: `g = output_grad * activation'(v)`.
///
/// All tensors have the shape `[batch, channels, spatial..]` and one dtype; with a pool, the output's gradient
/// has the shape of the pool's output.
#[derive(Clone, Debug)]
pub struct PreActivation {
    /// Gradient of the op's output; with a pool, of the pool's.
    pub output_grad: CubeTensor,
    /// A max pool behind the op, which then needs a norm's input with two spatial dimensions. The gradient
    /// between the two stays implicit: each position sums over its windows.
    pub pool: Option<PoolArgmax>,
    /// The norm's input, for statistics of the batch.
    pub norm_input: Option<CubeTensor>,
    /// Residual: the norm's output plus the residual is `v`.
    pub residual: Option<CubeTensor>,
    /// `v`, instead of a norm's input and a residual. For Relu, Relu6 and a LeakyRelu with a slope of 0 or more,
    /// the op's output will do.
    pub output: Option<CubeTensor>,
    /// The activation.
    pub activation: Activation,
}

impl PreActivation {
    fn walk(&self, others: &[&CubeTensor], cubes: usize) -> Walk {
        // The first tensor decides the layout: the norm's input, as the device's convolution wrote it.
        let tensors: Vec<&CubeTensor> = self
            .norm_input
            .iter()
            .chain([&self.output_grad])
            .chain(self.added_residual())
            .chain(self.masking_output())
            .chain(others.iter().copied())
            .collect();
        let accumulator = accumulator_type(self.output_grad.dtype);
        if self.pool.is_some() {
            Walk::over_pixels(&tensors, accumulator.size(), cubes)
        } else {
            Walk::new(&tensors, accumulator.size(), cubes)
        }
    }

    fn steps(&self, walk: &Walk) -> PreActivationStepsLaunch {
        PreActivationStepsLaunch::new(
            walk.steps(Some(&self.output_grad)),
            walk.steps(self.norm_input.as_ref()),
            walk.steps(self.added_residual()),
            walk.steps(self.masking_output()),
            match &self.pool {
                Some(pool) => pool.extent(&self.output_grad),
                None => no_extent(),
            },
        )
    }

    fn argmax(&self) -> Option<&CubeTensor> {
        self.pool.as_ref().map(|pool| &pool.argmax)
    }

    /// The pool's window; without a pool, an unused one.
    fn window(&self) -> PoolWindow {
        let unread = PoolWindow {
            kernel_size: [1; 2],
            stride: [1; 2],
            padding: [0; 2],
        };
        self.pool.as_ref().map_or(unread, |pool| pool.window)
    }

    /// The residual, if the activation's derivative depends on it.
    fn added_residual(&self) -> Option<&CubeTensor> {
        self.residual
            .as_ref()
            .filter(|_| self.activation != Activation::Identity && self.output.is_none())
    }

    /// The output, if the activation's derivative depends on it.
    fn masking_output(&self) -> Option<&CubeTensor> {
        self.output
            .as_ref()
            .filter(|_| self.activation != Activation::Identity)
    }

    fn elements(&self) -> [ElemType; 2] {
        let dtype = self.output_grad.dtype;
        [element_type(dtype), accumulator_type(dtype)]
    }
}

/// Steps of a [`PreActivation`]'s tensors.
#[derive(CubeType, CubeLaunch)]
struct PreActivationSteps {
    output_grad: Steps,
    norm_input: Steps,
    residual: Steps,
    output: Steps,
    pool: PoolExtent,
}

/// `g`, and `value - mean` of the norm's input, or 0 without one.
#[derive(CubeType)]
struct Grad<T: Float, N: Size> {
    grad: Vector<T, N>,
    deviation: Vector<T, N>,
}

#[cube]
fn grad_at<E: Float, T: Float, N: Size>(
    output_grad: &Tensor<Vector<E, N>>,
    argmax: ComptimeOption<&Tensor<u32>>,
    norm_input: ComptimeOption<&Tensor<Vector<E, N>>>,
    residual: ComptimeOption<&Tensor<Vector<E, N>>>,
    output: ComptimeOption<&Tensor<Vector<E, N>>>,
    steps: &PreActivationSteps,
    affine: &UnitAffine<T, N>,
    at: &Sequence<usize>,
    unit: &Unit,
    #[comptime] activation: Activation,
    #[comptime] window: PoolWindow,
) -> Grad<T, N> {
    #[comptime]
    let grad = match argmax {
        ComptimeOption::Some(argmax) => pooled_grad::<E, T, N>(
            output_grad,
            argmax,
            &steps.output_grad,
            &steps.pool,
            at,
            unit,
            window,
        ),
        ComptimeOption::None => {
            Vector::<T, N>::cast_from(output_grad[index(&steps.output_grad, at, unit)])
        }
    };
    #[comptime]
    let deviation = match norm_input {
        ComptimeOption::Some(input) => {
            Vector::<T, N>::cast_from(input[index(&steps.norm_input, at, unit)]) - affine.mean
        }
        ComptimeOption::None => Vector::<T, N>::zero(),
    };
    #[comptime]
    let value = match output {
        ComptimeOption::Some(output) => {
            Vector::<T, N>::cast_from(output[index(&steps.output, at, unit)])
        }
        ComptimeOption::None => affine.scale * deviation + affine.shift,
    };
    #[comptime]
    let value = match residual {
        ComptimeOption::Some(residual) => {
            value + Vector::<T, N>::cast_from(residual[index(&steps.residual, at, unit)])
        }
        ComptimeOption::None => value,
    };
    Grad::<T, N> {
        grad: activation::backward(value, grad, activation),
        deviation,
    }
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn partial_sums_kernel<E: Float, T: Float, P: Float, N: Size>(
    output_grad: &Tensor<Vector<E, N>>,
    argmax: ComptimeOption<&Tensor<u32>>,
    norm_input: ComptimeOption<&Tensor<Vector<E, N>>>,
    residual: ComptimeOption<&Tensor<Vector<E, N>>>,
    output: ComptimeOption<&Tensor<Vector<E, N>>>,
    mean: ComptimeOption<&Tensor<T>>,
    variance: ComptimeOption<&Tensor<T>>,
    gamma: ComptimeOption<&Tensor<P>>,
    beta: ComptimeOption<&Tensor<P>>,
    partials: &mut Tensor<T>,
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
    // From the statistics: this launch waits for no table.
    let affine = unit_norm::<T, P, N>(mean, variance, gamma, beta, norm, &unit, lanes);
    let mut sums = Partial::<T, N>::empty();
    for position in range_stepped(unit.start, unit.end, lanes.positions) {
        let at = coordinates(grid, position);
        let value = grad_at(
            output_grad,
            argmax,
            norm_input,
            residual,
            output,
            steps,
            &affine,
            &at,
            &unit,
            activation,
            window,
        );
        sums.first += value.grad;
        sums.second += value.grad * value.deviation;
    }
    fold_lanes(&mut sums, &unit, lanes, Fold::Sums);
    write_partial(partials, &sums, &unit, grid.channels, lanes, Fold::Sums);
}

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
pub struct GradSums(Vec<CubeTensor>);

impl GradSums {
    /// The sums over one chunk of the batch. A norm's input needs `table`.
    ///
    /// One read of each tensor.
    pub fn new(pre_activation: &PreActivation, table: Option<&ChannelTable>) -> Self {
        let walk = pre_activation.walk(&[], REDUCTION_CUBES);
        let output_grad = &pre_activation.output_grad;
        let client = &output_grad.client;
        let partials = partial_table(output_grad, walk.chunks, walk.channels);
        let [element, accumulator] = pre_activation.elements();
        let parameters = table.map_or(accumulator, ChannelTable::parameter_type);
        if walk.channels > 0 {
            // SAFETY: `unit` keeps positions and channels below the tensors' common ones.
            unsafe {
                partial_sums_kernel::launch_unchecked(
                    client,
                    walk.cube_count(client),
                    walk.lanes.cube_dim(),
                    walk.address_type(),
                    walk.vector_size,
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
                    pre_activation.steps(&walk),
                    walk.grid(),
                    pre_activation.activation,
                    pre_activation.window(),
                    walk.lanes,
                    [element, accumulator, parameters],
                );
            }
        }
        Self(vec![partials])
    }

    /// The sums over two chunks.
    #[must_use]
    pub fn merge(mut self, other: Self) -> Self {
        self.0.extend(other.0);
        self
    }

    /// Gradients of the norm's parameters, in their dtype, or the accumulator's. Completes `table` for
    /// [`norm_input_grad`].
    pub fn finish(self, table: &ChannelTable) -> AffineGrads {
        table::finish_sums(self.join(), table)
    }

    /// `sum(g)`, `[channels]` in the accumulator's dtype.
    pub fn grad(self) -> CubeTensor {
        table::finish_grad_sum(self.join())
    }

    fn join(mut self) -> CubeTensor {
        if self.0.len() == 1 {
            return self.0.remove(0);
        }
        CubeBackend::float_cat(self.0, 1)
    }
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn norm_input_grad_kernel<E: Float, T: Float, N: Size>(
    output_grad: &Tensor<Vector<E, N>>,
    argmax: ComptimeOption<&Tensor<u32>>,
    norm_input: ComptimeOption<&Tensor<Vector<E, N>>>,
    residual: ComptimeOption<&Tensor<Vector<E, N>>>,
    output: ComptimeOption<&Tensor<Vector<E, N>>>,
    table: ComptimeOption<&Tensor<T>>,
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
    let affine = unit_affine::<T, N>(table, grid, &unit, lanes);
    let mut slope = Vector::<T, N>::zero();
    let mut offset = Vector::<T, N>::zero();
    #[comptime]
    if let ComptimeOption::Some(table) = table {
        if comptime!(is_of_batch) {
            slope = row(table, grid, &unit, rows::SLOPE, lanes);
            offset = row(table, grid, &unit, rows::OFFSET, lanes);
        }
    }
    for position in range_stepped(unit.start, unit.end, lanes.positions) {
        let at = coordinates(grid, position);
        let value = grad_at(
            output_grad,
            argmax,
            norm_input,
            residual,
            output,
            steps,
            &affine,
            &at,
            &unit,
            activation,
            window,
        );
        #[comptime]
        if let ComptimeOption::Some(residual_grad) = &mut residual_grad {
            let index = index(residual_grad_steps, &at, &unit);
            residual_grad[index] = Vector::cast_from(value.grad);
        }
        let mut grad = value.grad;
        if table.is_some() {
            grad = affine.scale * value.grad;
            if comptime!(is_of_batch) {
                grad = grad + slope * value.deviation + offset;
            }
        }
        let index = index(target_steps, &at, &unit);
        target[index] = Vector::cast_from(grad);
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
pub fn norm_input_grad(
    pre_activation: PreActivation,
    table: Option<&ChannelTable>,
    wants_residual_grad: bool,
) -> NormInputGrad {
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
    let rows = table.map(ChannelTable::rows);
    // SAFETY: `unit` keeps positions and channels below the tensors' common ones, and each vector
    // of the target is written by one unit, which has read the inputs there.
    unsafe {
        norm_input_grad_kernel::launch_unchecked(
            &client,
            walk.cube_count(&client),
            walk.lanes.cube_dim(),
            walk.address_type(),
            walk.vector_size,
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
