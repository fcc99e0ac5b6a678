//! The nodes that `Autodiff<B>` registers, one for each differentiable method of
//! [`ConvBnBackend`].
//!
//! Tensors that other nodes may hold too go through burn-autodiff's checkpoints, so that gradient
//! checkpointing may drop and recompute them; what only this op knows stays in the node's state.

mod concatenate;
mod conv;
mod conv_bn;
mod max_pool;
mod norm;
mod parents;

use burn::backend::Autodiff;
use burn::backend::tensor::FloatTensor;
use burn::tensor::ops::MaxPoolOptions;
use burn_autodiff::checkpoint::strategy::CheckpointStrategy;

use self::parents::untracked;
use crate::backend::{
    BatchNormBackwardOptions, ChannelMoments, ConvBackwardOptions, ConvBnBackend,
    ConvBnBackwardOptions, ConvBnForward, ConvBnGrads, ConvBnInputs, ConvBnSaved, ConvGrads,
    ConvSaved, NormGrads, NormInputs, NormOutput, NormSaved, OptionalTensor, Tensors,
};
use crate::spec::{BatchNormOptions, ConvBnOptions, ConvSpec};

impl<B: ConvBnBackend, C: CheckpointStrategy> ConvBnBackend for Autodiff<B, C> {
    fn conv(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: OptionalTensor<Self>,
        spec: ConvSpec,
    ) -> FloatTensor<Self> {
        let operands = conv::Operands {
            input,
            weight,
            bias,
        };
        conv::register::<B, C>(operands, spec)
    }

    fn conv_backward(_saved: ConvSaved<Self>, _options: ConvBackwardOptions) -> ConvGrads<Self> {
        panic!("Can't differentiate conv_backward: the op is differentiable once.");
    }

    fn concatenate(tensors: Tensors<Self>) -> FloatTensor<Self> {
        concatenate::register::<B, C>(tensors.0)
    }

    fn batch_normalize(inputs: NormInputs<Self>, options: BatchNormOptions) -> NormOutput<Self> {
        norm::register::<B, C>(inputs, options)
    }

    fn batch_normalize_forward(
        _inputs: NormInputs<Self>,
        _options: BatchNormOptions,
    ) -> NormOutput<Self> {
        panic!(
            "batch_normalize_forward is a kernel and does not differentiate: call batch_normalize"
        );
    }

    fn batch_normalize_backward(
        _saved: NormSaved<Self>,
        _options: BatchNormBackwardOptions,
    ) -> NormGrads<Self> {
        panic!("Can't differentiate batch_normalize_backward: the op is differentiable once.");
    }

    fn running_moments(
        running: ChannelMoments<Self>,
        batch: ChannelMoments<Self>,
        momentum: f64,
        factor: f64,
    ) -> ChannelMoments<Self> {
        let inner = |moments: ChannelMoments<Self>| ChannelMoments::<B> {
            mean: moments.mean.into_primitive(),
            variance: moments.variance.into_primitive(),
        };
        let running = B::running_moments(inner(running), inner(batch), momentum, factor);
        ChannelMoments {
            mean: untracked::<B, C>(running.mean),
            variance: untracked::<B, C>(running.variance),
        }
    }

    fn conv_bn(inputs: ConvBnInputs<Self>, options: ConvBnOptions) -> NormOutput<Self> {
        conv_bn::register::<B, C>(inputs, options)
    }

    fn conv_bn_forward(
        _inputs: ConvBnInputs<Self>,
        _options: ConvBnOptions,
        _keep_conv_output: bool,
    ) -> ConvBnForward<Self> {
        panic!("conv_bn_forward is a kernel and does not differentiate: call conv_bn");
    }

    fn conv_bn_backward(
        _saved: ConvBnSaved<Self>,
        _options: ConvBnBackwardOptions,
    ) -> ConvBnGrads<Self> {
        panic!("Can't differentiate conv_bn_backward: the op is differentiable once.");
    }

    // The kernels behind these keep their default bodies: they do not differentiate.
    fn max_pool(input: FloatTensor<Self>, options: MaxPoolOptions<2>) -> FloatTensor<Self> {
        max_pool::register::<B, C>(input, options)
    }

    fn conv_bn_max_pool(
        inputs: ConvBnInputs<Self>,
        options: ConvBnOptions,
        pool: MaxPoolOptions<2>,
    ) -> NormOutput<Self> {
        conv_bn::register_max_pool::<B, C>(inputs, options, pool)
    }
}
