//! Convolution over one to three spatial dimensions.
//!
//! One dimension is taken as two, the first of size 1: Burn's own gradient of a grouped 1-D
//! convolution's weight is wrong where the stride leaves a rest of the input (0.22.1).

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, TensorMetadata};
use burn::tensor::ops::PadMode;
use burn::tensor::{Shape, Slice};

use super::layout::{Layouts, lift_shape};
use crate::spec::ConvSpec;

/// `input`: `[batch, channels_in, spatial..]`, `weight`: `[channels_out, channels_in / groups,
/// kernel..]`, `bias`: `[channels_out]`.
pub(crate) fn forward<B: Backend, L: Layouts<B>>(
    input: FloatTensor<B>,
    weight: FloatTensor<B>,
    bias: Option<FloatTensor<B>>,
    spec: &ConvSpec,
) -> FloatTensor<B> {
    let (input, weight) = (L::innermost_channels(input), L::innermost_channels(weight));
    match spec.rank() {
        1 => {
            let (input, weight) = (L::lift(input), L::lift(weight));
            L::lower(forward::<B, L>(input, weight, bias, &lift_spec(spec)))
        }
        2 => B::conv2d(input, weight, bias, spec.to_burn()),
        3 => {
            let (input, spec) = pad_if_asymmetric::<B>(input, spec);
            B::conv3d(input, weight, bias, spec.to_burn())
        }
        rank => unsupported_rank(rank),
    }
}

/// Gradient of the input, which itself is not needed.
pub(crate) fn input_backward<B: Backend, L: Layouts<B>>(
    input_shape: &Shape,
    weight: FloatTensor<B>,
    output_grad: FloatTensor<B>,
    spec: &ConvSpec,
) -> FloatTensor<B> {
    if spec.rank() == 1 {
        let (weight, output_grad) = (L::lift(weight), L::lift(output_grad));
        let shape = lift_shape(input_shape);
        let grad = input_backward::<B, L>(&shape, weight, output_grad, &lift_spec(spec));
        return L::lower(grad);
    }
    let weight = L::innermost_channels(weight);
    let output_grad = L::innermost_channels(output_grad);
    // Burn's backward takes the input for its shape alone, and pads it when the padding is
    // asymmetric: hand it a stand-in without memory, padded already, and crop the result.
    let symmetric = is_symmetric(spec);
    let mut padded_shape = input_shape.to_vec();
    let mut padded_spec = spec.clone();
    if !symmetric {
        for (dim, padding) in padded_spec.padding.iter_mut().enumerate() {
            padded_shape[dim + 2] += padding.0 + padding.1;
            *padding = (0, 0);
        }
    }
    let stand_in = stand_in::<B>(&Shape::from(padded_shape), &output_grad);
    let grad = match spec.rank() {
        2 => L::conv2d_x_backward(stand_in, weight, output_grad, padded_spec.to_burn()),
        3 => L::conv3d_x_backward(stand_in, weight, output_grad, padded_spec.to_burn()),
        rank => unsupported_rank(rank),
    };
    if symmetric {
        return grad;
    }
    let ranges: Vec<Slice> = (0..input_shape.num_dims())
        .map(|dim| {
            let before = dim.checked_sub(2).map_or(0, |dim| spec.padding[dim].0);
            Slice::from(before..before + input_shape[dim])
        })
        .collect();
    L::slice(grad, &ranges)
}

/// Gradient of the weight, which itself is not needed.
pub(crate) fn weight_backward<B: Backend, L: Layouts<B>>(
    input: FloatTensor<B>,
    weight_shape: &Shape,
    output_grad: FloatTensor<B>,
    spec: &ConvSpec,
) -> FloatTensor<B> {
    if spec.rank() == 1 {
        let (input, output_grad) = (L::lift(input), L::lift(output_grad));
        let shape = lift_shape(weight_shape);
        let grad = weight_backward::<B, L>(input, &shape, output_grad, &lift_spec(spec));
        return L::lower(grad);
    }
    let weight = stand_in::<B>(weight_shape, &output_grad);
    match spec.rank() {
        2 => B::conv2d_weight_backward(input, weight, output_grad, spec.to_burn()),
        3 => {
            let (input, spec) = pad_if_asymmetric::<B>(input, spec);
            B::conv3d_weight_backward(input, weight, output_grad, spec.to_burn())
        }
        rank => unsupported_rank(rank),
    }
}

/// A tensor of that shape without values or memory: Burn's gradients take one operand for its
/// shape alone.
fn stand_in<B: Backend>(shape: &Shape, like: &FloatTensor<B>) -> FloatTensor<B> {
    let one = Shape::from(vec![1; shape.num_dims()]);
    let empty = B::float_empty(one, &like.device(), like.dtype().into());
    B::float_expand(empty, shape.clone())
}

fn is_symmetric(spec: &ConvSpec) -> bool {
    spec.padding.iter().all(|(before, after)| before == after)
}

/// Pads the input where the padding is not symmetric, which Burn's 3-D convolutions do not take,
/// and returns what is left of the spec.
fn pad_if_asymmetric<B: Backend>(
    input: FloatTensor<B>,
    spec: &ConvSpec,
) -> (FloatTensor<B>, ConvSpec) {
    if is_symmetric(spec) {
        return (input, spec.clone());
    }
    let padding: Vec<_> = [(0, 0); 2]
        .into_iter()
        .chain(spec.padding.iter().copied())
        .collect();
    let padded = B::float_pad(input, &padding, PadMode::Constant(0.0));
    let mut spec = spec.clone();
    spec.padding.fill((0, 0));
    (padded, spec)
}

fn lift_spec(spec: &ConvSpec) -> ConvSpec {
    ConvSpec {
        stride: vec![1, spec.stride[0]],
        padding: vec![(0, 0), spec.padding[0]],
        dilation: vec![1, spec.dilation[0]],
        groups: spec.groups,
    }
}

fn unsupported_rank(rank: usize) -> ! {
    panic!("expected a convolution over 1, 2 or 3 spatial dimensions, got {rank}")
}
