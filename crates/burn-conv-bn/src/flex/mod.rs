//! `ConvBnBackend` on Flex, by the kernels of `burn-conv-bn-cpu`.
//!
//! Gradients that need no statistics, such as that of the norm's shift alone, take the portable
//! bodies.

mod backward;
mod batch_norm;
mod conv;
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
    BatchNormBackwardOptions, ConvBackwardOptions, ConvBnBackend, ConvBnBackwardOptions,
    ConvBnForward, ConvBnGrads, ConvBnInputs, ConvBnMaxPoolBackwardOptions, ConvBnMaxPoolForward,
    ConvBnSaved, ConvGrads, ConvSaved, MaxPoolBackwardOptions, MaxPoolForward, NormGrads,
    NormInputs, NormOutput, NormSaved,
};
use crate::portable;
use crate::spec::{BatchNormOptions, ConvBnOptions};

impl ConvBnBackend for Flex {
    fn conv_backward(saved: ConvSaved<Self>, options: ConvBackwardOptions) -> ConvGrads<Self> {
        match saved.output_grad.dtype() {
            DType::F32 => conv::backward::<f32>(saved, &options),
            DType::F64 => conv::backward::<f64>(saved, &options),
            DType::F16 => conv::backward::<f16>(saved, &options),
            DType::BF16 => conv::backward::<bf16>(saved, &options),
            _ => portable::conv_bn::conv_backward::<Self>(saved, &options),
        }
    }

    fn batch_normalize_forward(
        inputs: NormInputs<Self>,
        options: BatchNormOptions,
    ) -> NormOutput<Self> {
        match inputs.input.dtype() {
            DType::F32 => batch_norm::forward::<f32>(inputs, options),
            DType::F64 => batch_norm::forward::<f64>(inputs, options),
            DType::F16 => batch_norm::forward::<f16>(inputs, options),
            DType::BF16 => batch_norm::forward::<bf16>(inputs, options),
            _ => portable::batch_norm::forward::<Self>(inputs, options),
        }
    }

    fn batch_normalize_backward(
        saved: NormSaved<Self>,
        options: BatchNormBackwardOptions,
    ) -> NormGrads<Self> {
        match saved.output_grad.dtype() {
            DType::F32 => batch_norm::backward::<f32>(saved, &options),
            DType::F64 => batch_norm::backward::<f64>(saved, &options),
            DType::F16 => batch_norm::backward::<f16>(saved, &options),
            DType::BF16 => batch_norm::backward::<bf16>(saved, &options),
            _ => portable::batch_norm::backward::<Self>(saved, &options),
        }
    }

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
        keep: bool,
    ) -> ConvBnMaxPoolForward<Self> {
        match inputs.input.dtype() {
            DType::F32 => kernel_forward_max_pool::<f32>(inputs, &options, &pool, keep),
            DType::F64 => kernel_forward_max_pool::<f64>(inputs, &options, &pool, keep),
            DType::F16 => kernel_forward_max_pool::<f16>(inputs, &options, &pool, keep),
            DType::BF16 => kernel_forward_max_pool::<bf16>(inputs, &options, &pool, keep),
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
