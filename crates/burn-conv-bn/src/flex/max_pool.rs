//! The max pool by the kernels of `burn-conv-bn-cpu`; by Burn's op where there is none.

use burn::backend::flex::FlexTensor;
use burn::backend::{Flex, TensorMetadata};
use burn::tensor::ops::MaxPoolOptions;
use burn::tensor::{DType, Shape, bf16, f16};
use burn_conv_bn_cpu::{PoolGeometry, max_pool, max_pool_backward};

use super::tensor::{Kernel, contiguous, slice, tensor};
use crate::backend::{MaxPoolBackwardOptions, MaxPoolForward};
use crate::portable;

/// The output, without the argmax.
pub(super) fn untracked(input: FlexTensor, options: &MaxPoolOptions<2>) -> FlexTensor {
    match pooled(&input, options, None) {
        Some(output) => output,
        None => portable::max_pool::forward::<Flex>(input, options),
    }
}

pub(super) fn forward(input: &FlexTensor, options: &MaxPoolOptions<2>) -> MaxPoolForward<Flex> {
    let mut argmax = Vec::new();
    match pooled(input, options, Some(&mut argmax)) {
        Some(output) => MaxPoolForward::Pooled {
            argmax: tensor(argmax, &output.shape()),
            output,
        },
        None => MaxPoolForward::Unsupported,
    }
}

pub(super) fn backward(
    output_grad: &FlexTensor,
    argmax: &FlexTensor,
    options: &MaxPoolBackwardOptions,
) -> FlexTensor {
    match output_grad.dtype() {
        DType::F32 => kernel_backward::<f32>(output_grad, argmax, options),
        DType::F64 => kernel_backward::<f64>(output_grad, argmax, options),
        DType::F16 => kernel_backward::<f16>(output_grad, argmax, options),
        DType::BF16 => kernel_backward::<bf16>(output_grad, argmax, options),
        dtype => panic!("no max pool of {dtype:?} has an argmax"),
    }
}

/// The output, unless there is no kernel for the input's dtype or for the window.
fn pooled(
    input: &FlexTensor,
    options: &MaxPoolOptions<2>,
    argmax: Option<&mut Vec<u8>>,
) -> Option<FlexTensor> {
    let geometry = geometry(&input.shape(), options)?;
    match input.dtype() {
        DType::F32 => Some(kernel_forward::<f32>(&geometry, input, argmax)),
        DType::F64 => Some(kernel_forward::<f64>(&geometry, input, argmax)),
        DType::F16 => Some(kernel_forward::<f16>(&geometry, input, argmax)),
        DType::BF16 => Some(kernel_forward::<bf16>(&geometry, input, argmax)),
        _ => None,
    }
}

fn kernel_forward<E: Kernel>(
    geometry: &PoolGeometry,
    input: &FlexTensor,
    argmax: Option<&mut Vec<u8>>,
) -> FlexTensor {
    let input = contiguous(input);
    let mut output = Vec::<E>::new();
    max_pool(geometry, slice(&input), &mut output, argmax);
    let shape = input.shape();
    let [height, width] = geometry.output();
    tensor(output, &Shape::new([shape[0], shape[1], height, width]))
}

fn kernel_backward<E: Kernel>(
    output_grad: &FlexTensor,
    argmax: &FlexTensor,
    options: &MaxPoolBackwardOptions,
) -> FlexTensor {
    let geometry = geometry(&options.input_shape, &options.options)
        .expect("the forward pass had a kernel for the same window");
    let (output_grad, argmax) = (contiguous(output_grad), contiguous(argmax));
    let mut input_grad = Vec::<E>::new();
    max_pool_backward(
        &geometry,
        slice(&output_grad),
        slice(&argmax),
        &mut input_grad,
    );
    tensor(input_grad, &options.input_shape)
}

/// The kernels' geometry, unless they refuse the window, as one whose argmax does not fit a byte: Burn's op
/// pools those.
pub(super) fn geometry(input: &Shape, options: &MaxPoolOptions<2>) -> Option<PoolGeometry> {
    PoolGeometry::new(
        input[0] * input[1],
        [input[2], input[3]],
        options.kernel_size,
        options.stride,
        options.padding.map(|(before, _)| before),
        options.dilation,
        options.ceil_mode,
    )
    .ok()
}
