//! `ConvBnBackend` on Flex, by the kernels of `burn-conv-bn-cpu`.
//!
//! Gradients that need no statistics, such as that of the norm's shift alone, take the portable
//! bodies.

mod backward;
mod forward;
mod max_pool;
mod norm;
mod tensor;
#[cfg(test)]
mod tests;

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::ops::MaxPoolOptions;
use burn::tensor::{DType, bf16, f16};

use self::backward::{JoinedPool, kernel_backward};
use self::forward::{kernel_forward, kernel_forward_max_pool};
use self::tensor::contiguous;
use crate::backend::{
    ConvBnBackend, ConvBnBackwardOptions, ConvBnForward, ConvBnGrads, ConvBnInputs,
    ConvBnMaxPoolBackwardOptions, ConvBnMaxPoolForward, ConvBnSaved, MaxPoolBackwardOptions,
    MaxPoolForward,
};
use crate::portable;
use crate::spec::ConvBnOptions;

impl ConvBnBackend for Flex {
    fn conv_bn_forward(
        inputs: ConvBnInputs<Self>,
        options: ConvBnOptions,
        keep_conv_output: bool,
    ) -> ConvBnForward<Self> {
        match inputs.input.dtype() {
            DType::F32 => kernel_forward::<f32>(inputs, &options, keep_conv_output),
            DType::F64 => kernel_forward::<f64>(inputs, &options, keep_conv_output),
            DType::F16 => kernel_forward::<f16>(inputs, &options, keep_conv_output),
            DType::BF16 => kernel_forward::<bf16>(inputs, &options, keep_conv_output),
            _ => portable::conv_bn::forward::<Self>(inputs, &options, keep_conv_output),
        }
    }

    fn conv_bn_backward(
        saved: ConvBnSaved<Self>,
        options: ConvBnBackwardOptions,
    ) -> ConvBnGrads<Self> {
        match saved.output_grad.dtype() {
            DType::F32 => kernel_backward::<f32>(saved, None, &options),
            DType::F64 => kernel_backward::<f64>(saved, None, &options),
            DType::F16 => kernel_backward::<f16>(saved, None, &options),
            DType::BF16 => kernel_backward::<bf16>(saved, None, &options),
            _ => portable::conv_bn::backward::<Self>(saved, &options),
        }
    }

    fn conv_bn_max_pool_forward(
        inputs: ConvBnInputs<Self>,
        options: ConvBnOptions,
        pool: MaxPoolOptions<2>,
    ) -> ConvBnMaxPoolForward<Self> {
        match inputs.input.dtype() {
            DType::F32 => kernel_forward_max_pool::<f32>(inputs, &options, &pool),
            DType::F64 => kernel_forward_max_pool::<f64>(inputs, &options, &pool),
            DType::F16 => kernel_forward_max_pool::<f16>(inputs, &options, &pool),
            DType::BF16 => kernel_forward_max_pool::<bf16>(inputs, &options, &pool),
            _ => ConvBnMaxPoolForward::Unsupported,
        }
    }

    fn conv_bn_max_pool_backward(
        saved: ConvBnSaved<Self>,
        argmax: FlexTensor,
        options: ConvBnMaxPoolBackwardOptions,
    ) -> ConvBnGrads<Self> {
        let ConvBnMaxPoolBackwardOptions { conv_bn, pool } = options;
        let joined = JoinedPool {
            argmax: contiguous(&argmax),
            options: pool,
        };
        match saved.output_grad.dtype() {
            DType::F32 => kernel_backward::<f32>(saved, Some(&joined), &conv_bn),
            DType::F64 => kernel_backward::<f64>(saved, Some(&joined), &conv_bn),
            DType::F16 => kernel_backward::<f16>(saved, Some(&joined), &conv_bn),
            DType::BF16 => kernel_backward::<bf16>(saved, Some(&joined), &conv_bn),
            dtype => panic!("no max pool of {dtype:?} has an argmax"),
        }
    }

    fn max_pool(input: FlexTensor, options: MaxPoolOptions<2>) -> FlexTensor {
        max_pool::untracked(input, &options)
    }

    fn max_pool_forward(input: FlexTensor, options: MaxPoolOptions<2>) -> MaxPoolForward<Self> {
        max_pool::forward(&input, &options)
    }

    fn max_pool_backward(
        output_grad: FlexTensor,
        argmax: FlexTensor,
        options: MaxPoolBackwardOptions,
    ) -> FlexTensor {
        max_pool::backward(&output_grad, &argmax, &options)
    }
}
