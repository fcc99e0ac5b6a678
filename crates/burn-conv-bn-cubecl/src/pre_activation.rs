//! The gradient at a pre-activation, never in memory: its operands, and its value at a position.

use burn_cubecl::cubecl;
use burn_cubecl::tensor::CubeTensor;
use cubecl::ir::ElemType;
use cubecl::prelude::*;

use crate::activation::{self, Activation};
use crate::element::{accumulator_dtype, accumulator_type, element_type};
use crate::norm::AffineRows;
use crate::pool::PoolWindow;
use crate::pool_grad::{PoolArgmax, PoolExtent, no_extent, pooled_grad};
use crate::table::ChannelTable;
use crate::walk::{Position, Steps, Unit, Walk, index};
use crate::{assert_dtype, assert_shape};

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
    /// Panics unless the tensors that a kernel reads fit each other, and `table` their channels.
    pub(crate) fn assert_fits(&self, table: Option<&ChannelTable>) {
        let output_grad = &self.output_grad;
        if let Some(table) = table {
            table.assert_channels(
                output_grad.meta.shape()[1],
                accumulator_dtype(output_grad.dtype),
            );
        }
        // A pool's gradient alone does not tell the shape of the other tensors.
        let like = match (&self.norm_input, &self.pool) {
            (Some(norm_input), Some(pool)) => {
                pool.assert_pools("norm input", norm_input.meta.shape(), output_grad);
                Some(norm_input)
            }
            (norm_input, None) => Some(norm_input.as_ref().unwrap_or(output_grad)),
            (None, Some(_)) => None,
        };
        if let Some(pool) = &self.pool {
            pool.assert_covers(output_grad);
        }
        let Some(like) = like else { return };
        let others = [
            (
                "output gradient",
                Some(output_grad).filter(|_| self.pool.is_none()),
            ),
            ("norm input", self.norm_input.as_ref()),
            ("residual", self.added_residual()),
            ("output", self.masking_output()),
        ];
        for (what, tensor) in others {
            if let Some(tensor) = tensor {
                assert_shape(what, tensor, like.meta.shape());
                assert_dtype(what, tensor, output_grad.dtype);
            }
        }
    }

    pub(crate) fn walk(&self, others: &[&CubeTensor], cubes: usize) -> Walk {
        // The first tensor decides the layout: the norm's input, as the device's convolution wrote it.
        let tensors: Vec<&CubeTensor> = self
            .norm_input
            .iter()
            .chain([&self.output_grad])
            .chain(self.added_residual())
            .chain(self.masking_output())
            .chain(others.iter().copied())
            .collect();
        match &self.pool {
            Some(pool) => pool.walk(&tensors, &self.output_grad, cubes),
            None => {
                let accumulator = accumulator_type(self.output_grad.dtype);
                Walk::new(&tensors, accumulator.size(), cubes)
            }
        }
    }

    pub(crate) fn steps(&self, walk: &Walk) -> PreActivationStepsLaunch {
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

    pub(crate) fn argmax(&self) -> Option<&CubeTensor> {
        self.pool.as_ref().map(|pool| &pool.argmax)
    }

    /// The pool's window; without a pool, an unused one.
    pub(crate) fn window(&self) -> PoolWindow {
        let unread = PoolWindow {
            kernel_size: [1; 2],
            stride: [1; 2],
            padding: [0; 2],
        };
        self.pool.as_ref().map_or(unread, |pool| pool.window)
    }

    /// The residual, if the activation's derivative depends on it.
    pub(crate) fn added_residual(&self) -> Option<&CubeTensor> {
        self.residual
            .as_ref()
            .filter(|_| self.activation != Activation::Identity && self.output.is_none())
    }

    /// The output, if the activation's derivative depends on it.
    pub(crate) fn masking_output(&self) -> Option<&CubeTensor> {
        self.output
            .as_ref()
            .filter(|_| self.activation != Activation::Identity)
    }

    pub(crate) fn elements(&self) -> [ElemType; 2] {
        let dtype = self.output_grad.dtype;
        [element_type(dtype), accumulator_type(dtype)]
    }
}

/// Steps of a [`PreActivation`]'s tensors.
#[derive(CubeType, CubeLaunch)]
pub(crate) struct PreActivationSteps {
    output_grad: Steps,
    norm_input: Steps,
    residual: Steps,
    output: Steps,
    pool: PoolExtent,
}

/// `g`, and `value - mean` of the norm's input, or 0 without one.
#[derive(CubeType)]
pub(crate) struct Grad<T: Float, N: Size> {
    pub(crate) grad: Vector<T, N>,
    pub(crate) deviation: Vector<T, N>,
}

/// The gradients at some positions, read before any is used.
#[cube]
pub(crate) fn grads_at<E: Float, T: Float, N: Size>(
    output_grad: &Tensor<Vector<E, N>>,
    argmax: ComptimeOption<&Tensor<u32>>,
    norm_input: ComptimeOption<&Tensor<Vector<E, N>>>,
    residual: ComptimeOption<&Tensor<Vector<E, N>>>,
    output: ComptimeOption<&Tensor<Vector<E, N>>>,
    steps: &PreActivationSteps,
    affine: &AffineRows<T, N>,
    positions: &Sequence<Position>,
    unit: &Unit,
    #[comptime] activation: Activation,
    #[comptime] window: PoolWindow,
) -> Sequence<Grad<T, N>> {
    let mut grads = Sequence::<Grad<T, N>>::new();
    let count = comptime!(positions.len());
    #[unroll]
    for i in 0..count {
        let at = &positions.index(i).at;
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
        grads.push(Grad::<T, N> {
            grad: activation::backward(value, grad, activation),
            deviation,
        });
    }
    grads
}
