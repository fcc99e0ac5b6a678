//! `ConvBnBackend` on CubeCL devices, by the kernels of `burn-conv-bn-cubecl` around Burn's own
//! autotuned convolutions.

mod layout;
mod max_pool;
mod sweeps;

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::ops::MaxPoolOptions;
use burn_cubecl::CubeBackend;

use self::sweeps::Kernels;
use crate::backend::{
    BatchNormBackwardOptions, ChannelMoments, ConvBackwardOptions, ConvBnBackend,
    ConvBnBackwardOptions, ConvBnForward, ConvBnGrads, ConvBnInputs, ConvBnMaxPoolBackwardOptions,
    ConvBnMaxPoolForward, ConvBnSaved, ConvGrads, ConvSaved, MaxPoolBackwardOptions,
    MaxPoolForward, NormGrads, NormInputs, NormOutput, NormSaved,
};
use crate::portable::batch_norm;
use crate::portable::conv_bn::{backward_by, conv_backward_by, forward_by};
use crate::spec::{BatchNormOptions, ConvBnOptions};

impl ConvBnBackend for CubeBackend {
    fn conv_backward(saved: ConvSaved<Self>, options: ConvBackwardOptions) -> ConvGrads<Self> {
        conv_backward_by::<Self, Kernels>(saved, &options)
    }

    fn batch_normalize_forward(
        inputs: NormInputs<Self>,
        options: BatchNormOptions,
    ) -> NormOutput<Self> {
        batch_norm::forward_by::<Self, Kernels>(inputs, options)
    }

    fn batch_normalize_backward(
        saved: NormSaved<Self>,
        options: BatchNormBackwardOptions,
    ) -> NormGrads<Self> {
        batch_norm::backward_by::<Self, Kernels>(saved, &options)
    }

    fn running_moments(
        running: ChannelMoments<Self>,
        batch: ChannelMoments<Self>,
        momentum: f64,
        factor: f64,
    ) -> ChannelMoments<Self> {
        sweeps::running_moments(running, batch, momentum, factor)
    }

    fn conv_bn_forward(
        inputs: ConvBnInputs<Self>,
        options: ConvBnOptions,
        keep_conv_output: bool,
    ) -> ConvBnForward<Self> {
        forward_by::<Self, Kernels>(inputs, &options, keep_conv_output)
    }

    fn conv_bn_backward(
        saved: ConvBnSaved<Self>,
        options: ConvBnBackwardOptions,
    ) -> ConvBnGrads<Self> {
        backward_by::<Self, Kernels>(saved, None, &options)
    }

    fn conv_bn_max_pool_forward(
        inputs: ConvBnInputs<Self>,
        options: ConvBnOptions,
        pool: MaxPoolOptions<2>,
        keep_conv_output: bool,
    ) -> ConvBnMaxPoolForward<Self> {
        max_pool::joined_forward(inputs, &options, pool, keep_conv_output)
    }

    fn conv_bn_max_pool_backward(
        saved: ConvBnSaved<Self>,
        argmax: IntTensor<Self>,
        options: ConvBnMaxPoolBackwardOptions,
    ) -> ConvBnGrads<Self> {
        max_pool::joined_backward(saved, argmax, &options)
    }

    // Untracked inputs need no argmax: they take Burn's pool.
    fn max_pool_forward(
        input: FloatTensor<Self>,
        options: MaxPoolOptions<2>,
    ) -> MaxPoolForward<Self> {
        max_pool::forward(input, options)
    }

    fn max_pool_backward(
        output_grad: FloatTensor<Self>,
        argmax: IntTensor<Self>,
        options: MaxPoolBackwardOptions,
    ) -> FloatTensor<Self> {
        max_pool::backward(output_grad, argmax, &options)
    }
}
