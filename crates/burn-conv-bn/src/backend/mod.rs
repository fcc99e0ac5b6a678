//! The trait of a backend, its tensors and options, and the plan of what is saved for the backward pass.
//!
//! For whoever writes a backend or a kernel; the layers need none of it.

#[cfg(feature = "fusion")]
mod fusion;
pub(crate) mod tensors;

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, backend_extension};
use burn::tensor::ops::MaxPoolOptions;

use crate::portable;
use crate::portable::sweeps::Composed;
use crate::spec::{BatchNormOptions, ConvBnOptions, ConvSpec};

pub use self::tensors::{
    BatchNormBackwardOptions, ChannelMoments, ConvBackwardOptions, ConvBnBackwardOptions,
    ConvBnForward, ConvBnGrads, ConvBnInputs, ConvBnMaxPoolBackwardOptions, ConvBnMaxPoolForward,
    ConvBnSaved, ConvGrads, ConvSaved, MaxPoolBackwardOptions, MaxPoolForward, NormGrads,
    NormInputs, NormOutput, NormSaved, NormStatistics, OptionalTensor, RunningStatistics,
    Statistics, Tensors,
};
pub use crate::spec::{ConvBnProblem, Parents, SavePlan, StatisticsKind};

/// Burn's [`Backend`], extended with the fused op, its two halves, and a max pool.
///
/// | Differentiable     | Kernels                                                 | Without kernels          |
/// |--------------------|---------------------------------------------------------|--------------------------|
/// | `conv`             | `conv_backward`                                         | Burn's ops               |
/// | `concatenate`      |                                                         | Burn's op                |
/// | `batch_normalize`  | `batch_normalize_forward`, `batch_normalize_backward`   | Burn's ops               |
/// | `conv_bn`          | `conv_bn_forward`, `conv_bn_backward`                   | Burn's ops               |
/// | `max_pool`         | `max_pool_forward`, `max_pool_backward`                 | Burn's pool and its node |
/// | `conv_bn_max_pool` | `conv_bn_max_pool_forward`, `conv_bn_max_pool_backward` | `conv_bn`, `max_pool`    |
///
/// `Autodiff<B>` registers one node for each differentiable method. Kernels and `running_moments` do not
/// differentiate. Every method has a default body: `impl ConvBnBackend for MyBackend {}` is complete. A
/// backend overrides the two kernels of an op together. `max_pool` itself is Burn's for untracked inputs, unless
/// overridden. Under Burn's `Fusion`, max pools join and keep an argmax by the rules of CubeCL's kernels.
///
/// The methods trust their arguments; [`functional`](crate::functional) checks them. Tensors of Burn's
/// `Tensor` reach only the backends that Burn's `Dispatch` lists.
///
/// # Examples
///
/// The calls of the autodiff node for a layer whose weight alone is tracked:
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::backend::flex::FlexTensor;
/// use burn::backend::{Flex, TensorMetadata};
/// use burn::tensor::TensorData;
/// use burn_conv_bn::backend::{
///     ConvBnBackend, ConvBnBackwardOptions, ConvBnInputs, ConvBnSaved, OptionalTensor, Parents,
///     RunningStatistics, SavePlan, Statistics,
/// };
/// use burn_conv_bn::{ConvBnOptions, ConvSpec};
///
/// let tensor = |shape: [usize; 4]| {
///     let values = (0..shape.iter().product::<usize>()).map(|i| (i as f32).sin());
///     FlexTensor::from_data(TensorData::new(values.collect::<Vec<f32>>(), shape))
/// };
/// let (input, weight) = (tensor([2, 3, 8, 8]), tensor([4, 3, 3, 3]));
/// let inputs = ConvBnInputs::<Flex> {
///     input: input.clone(),
///     weight: weight.clone(),
///     bias: OptionalTensor::Absent,
///     gamma: OptionalTensor::Absent,
///     beta: OptionalTensor::Absent,
///     residual: OptionalTensor::Absent,
///     statistics: Statistics::Batch,
///     running: RunningStatistics::Absent,
/// };
/// let options = ConvBnOptions::new(ConvSpec::unit(2));
/// let wanted = Parents {
///     weight: true,
///     ..Parents::default()
/// };
/// let statistics = inputs.statistics.kind();
/// let (present, norm_dtype) = (inputs.present(), inputs.norm_dtype());
/// let plan = SavePlan::new(&options, statistics, present, wanted);
///
/// let forward = Flex::conv_bn_forward(inputs, options.clone(), plan.conv_output);
/// assert_eq!(forward.output.shape().to_vec(), [2, 4, 6, 6]);
/// assert!(!forward.conv_output.is_present());
///
/// // The plan: recompute the convolution.
/// assert!(plan.input && plan.weight && plan.statistics && !plan.output);
/// let saved = ConvBnSaved::<Flex> {
///     output_grad: tensor([2, 4, 6, 6]),
///     input: OptionalTensor::Present(input.clone()),
///     weight: OptionalTensor::Present(weight.clone()),
///     bias: OptionalTensor::Absent,
///     gamma: OptionalTensor::Absent,
///     beta: OptionalTensor::Absent,
///     mean: OptionalTensor::Present(forward.mean),
///     variance: OptionalTensor::Present(forward.variance),
///     conv_output: forward.conv_output,
///     output: OptionalTensor::Absent,
///     residual: OptionalTensor::Absent,
/// };
/// let options = ConvBnBackwardOptions {
///     options,
///     statistics,
///     input_shape: input.shape(),
///     weight_shape: weight.shape(),
///     norm_dtype,
///     wanted,
/// };
/// let grads = Flex::conv_bn_backward(saved, options);
/// assert!(!grads.input.is_present());
/// let grad = grads.weight.into_option().expect("requested above");
///
/// // The norm cancels the weight's length: the gradient is orthogonal to the weight.
/// let (grad, weight) = (grad.into_data(), weight.into_data());
/// let products = grad.iter::<f64>().zip(weight.iter::<f64>()).map(|(g, w)| g * w);
/// let products: Vec<f64> = products.collect();
/// let along: f64 = products.iter().sum();
/// let size: f64 = products.iter().map(|product| product.abs()).sum();
/// assert!(along.abs() < 1e-3 * size, "{along} of {size}");
/// # }
/// ```
#[backend_extension(
    Autodiff,
    Flex: cfg(feature = "flex"),
    NdArray: cfg(feature = "ndarray"),
    LibTorch: cfg(feature = "tch"),
    Remote: cfg(feature = "remote"),
    Cube: cfg(feature = "cubecl"),
    Fusion: cfg(feature = "fusion"),
)]
pub trait ConvBnBackend: Backend {
    /// Convolution over one to three spatial dimensions, with an explicit backward pass.
    ///
    /// # Shapes
    ///
    /// - `input`: `[batch, channels_in, spatial..]`
    /// - `weight`: `[channels_out, channels_in / groups, kernel..]`
    /// - `bias`: `[channels_out]`
    /// - output: `[batch, channels_out, spatial_out..]`
    #[fusion(default)]
    fn conv(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        #[extension_type] bias: OptionalTensor<Self>,
        spec: ConvSpec,
    ) -> FloatTensor<Self> {
        portable::conv::forward::<Self, Composed>(input, weight, bias.into_option(), &spec)
    }

    /// Backward kernel of `conv`: the gradients in `options.wanted`.
    #[fusion(meta = crate::backend::fusion::conv_backward)]
    fn conv_backward(
        #[extension_type] saved: ConvSaved<Self>,
        options: ConvBackwardOptions,
    ) -> ConvGrads<Self> {
        portable::conv_bn::conv_backward::<Self>(saved, &options)
    }

    /// Concatenation along channels. Whatever keeps its output for a backward pass keeps how to rebuild it from
    /// the tensors instead.
    ///
    /// # Shapes
    ///
    /// - tensors: `[batch, channels, spatial..]`, 1 or more, each with channels of its own
    /// - output: `[batch, sum of the channels, spatial..]`
    #[fusion(default)]
    fn concatenate(#[extension_type] tensors: Tensors<Self>) -> FloatTensor<Self> {
        Self::float_cat(tensors.0, 1)
    }

    /// `activation(norm(input))`, with an explicit backward pass. Whatever keeps its output for a backward
    /// pass keeps how to rebuild it from the input instead.
    ///
    /// # Shapes
    ///
    /// - `input`, output: `[batch, channels, spatial..]`
    /// - `gamma`, `beta`, mean, variance: `[channels]`
    #[fusion(default)]
    fn batch_normalize(
        #[extension_type] inputs: NormInputs<Self>,
        options: BatchNormOptions,
    ) -> NormOutput<Self> {
        Self::batch_normalize_forward(inputs, options)
    }

    /// Forward kernel of `batch_normalize`.
    #[fusion(meta = crate::backend::fusion::batch_normalize_forward)]
    fn batch_normalize_forward(
        #[extension_type] inputs: NormInputs<Self>,
        options: BatchNormOptions,
    ) -> NormOutput<Self> {
        portable::batch_norm::forward::<Self>(inputs, options)
    }

    /// Backward kernel of `batch_normalize`: the gradients in `options.wanted`.
    #[fusion(meta = crate::backend::fusion::batch_normalize_backward)]
    fn batch_normalize_backward(
        #[extension_type] saved: NormSaved<Self>,
        options: BatchNormBackwardOptions,
    ) -> NormGrads<Self> {
        portable::batch_norm::backward::<Self>(saved, &options)
    }

    /// Running statistics after a batch, in their own dtypes: `(1 - momentum) * running + momentum * batch`, the
    /// batch's variance times `factor` first. Not differentiable.
    #[fusion(default)]
    fn running_moments(
        #[extension_type] running: ChannelMoments<Self>,
        #[extension_type] batch: ChannelMoments<Self>,
        momentum: f64,
        factor: f64,
    ) -> ChannelMoments<Self> {
        portable::norm::running_moments::<Self>(running, batch, momentum, factor)
    }

    /// `activation(norm(conv(input)) + residual)`, with a backward pass that recomputes the
    /// convolution.
    ///
    /// The mean in the result includes the convolution's bias.
    #[fusion(default)]
    fn conv_bn(
        #[extension_type] inputs: ConvBnInputs<Self>,
        options: ConvBnOptions,
    ) -> NormOutput<Self> {
        let shift = portable::bias_shift::<Self>(&inputs);
        let forward = Self::conv_bn_forward(inputs, options, false);
        NormOutput {
            output: forward.output,
            mean: portable::shifted_mean::<Self>(forward.mean, shift),
            variance: forward.variance,
            running: forward.running,
        }
    }

    /// Forward kernel of `conv_bn`. Also returns the convolution's output if `keep_conv_output`.
    #[fusion(meta = crate::backend::fusion::conv_bn_forward)]
    fn conv_bn_forward(
        #[extension_type] inputs: ConvBnInputs<Self>,
        options: ConvBnOptions,
        keep_conv_output: bool,
    ) -> ConvBnForward<Self> {
        portable::conv_bn::forward::<Self>(inputs, &options, keep_conv_output)
    }

    /// Backward kernel of `conv_bn`: the gradients in `options.wanted`, from the tensors of a
    /// [`SavePlan`].
    #[fusion(meta = crate::backend::fusion::conv_bn_backward)]
    fn conv_bn_backward(
        #[extension_type] saved: ConvBnSaved<Self>,
        options: ConvBnBackwardOptions,
    ) -> ConvBnGrads<Self> {
        portable::conv_bn::backward::<Self>(saved, &options)
    }

    /// Max pool over height and width. With kernels, its backward pass needs the argmax and no input.
    ///
    /// `options` pads both sides of a dimension alike.
    ///
    /// # Shapes
    ///
    /// - `input`: `[batch, channels, height, width]`
    /// - output: `[batch, channels, height_out, width_out]`
    #[fusion(default)]
    fn max_pool(input: FloatTensor<Self>, options: MaxPoolOptions<2>) -> FloatTensor<Self> {
        portable::max_pool::forward::<Self>(input, &options)
    }

    /// Forward kernel of `max_pool`: the output and its argmax, if there is a kernel for this dtype and
    /// window.
    #[fusion(meta = crate::backend::fusion::max_pool_forward)]
    fn max_pool_forward(
        input: FloatTensor<Self>,
        options: MaxPoolOptions<2>,
    ) -> MaxPoolForward<Self> {
        let _ = (input, options);
        MaxPoolForward::Unsupported
    }

    /// Backward kernel of `max_pool`: the input's gradient, from the output's and the argmax that
    /// `max_pool_forward` returned.
    ///
    /// # Panics
    ///
    /// Panics on a backend without the kernel.
    #[fusion(meta = crate::backend::fusion::max_pool_backward)]
    fn max_pool_backward(
        output_grad: FloatTensor<Self>,
        argmax: IntTensor<Self>,
        options: MaxPoolBackwardOptions,
    ) -> FloatTensor<Self> {
        let _ = (output_grad, argmax);
        panic!("max_pool_backward: this backend's forward kernel keeps no argmax ({options:?})");
    }

    /// [`conv_bn`](Self::conv_bn) over height and width, and [`max_pool`](Self::max_pool) of its output.
    /// With kernels it is one op, without the tensor between the two.
    ///
    /// The statistics are those of the convolution's output, as in `conv_bn`.
    #[fusion(default)]
    fn conv_bn_max_pool(
        #[extension_type] inputs: ConvBnInputs<Self>,
        options: ConvBnOptions,
        pool: MaxPoolOptions<2>,
    ) -> NormOutput<Self> {
        let shift = portable::bias_shift::<Self>(&inputs);
        match Self::conv_bn_max_pool_forward(inputs.clone(), options.clone(), pool.clone(), false) {
            ConvBnMaxPoolForward::Pooled {
                output,
                mean,
                variance,
                running,
                ..
            } => NormOutput {
                output,
                mean: portable::shifted_mean::<Self>(mean, shift),
                variance,
                running,
            },
            ConvBnMaxPoolForward::Unsupported => {
                let normalized = Self::conv_bn(inputs, options);
                NormOutput {
                    output: Self::max_pool(normalized.output, pool),
                    ..normalized
                }
            }
        }
    }

    /// Forward kernel of `conv_bn_max_pool`, if there is one for these inputs and options. Also returns the
    /// convolution's output if `keep_conv_output`.
    #[fusion(meta = crate::backend::fusion::conv_bn_max_pool_forward)]
    fn conv_bn_max_pool_forward(
        #[extension_type] inputs: ConvBnInputs<Self>,
        options: ConvBnOptions,
        pool: MaxPoolOptions<2>,
        keep_conv_output: bool,
    ) -> ConvBnMaxPoolForward<Self> {
        let _ = (inputs, options, pool, keep_conv_output);
        ConvBnMaxPoolForward::Unsupported
    }

    /// Backward kernel of `conv_bn_max_pool`: the requested gradients, from the argmax and the tensors of the
    /// block's [`SavePlan`], or if [`inverts`](ConvBnMaxPoolForward::Pooled::inverts) of
    /// [`SavePlan::with_max_pool`]. `saved.output` and `saved.output_grad` are the pool's.
    ///
    /// # Panics
    ///
    /// Panics on a backend without the kernel, and without the statistics that the plan keeps for the
    /// requested gradients.
    #[fusion(meta = crate::backend::fusion::conv_bn_max_pool_backward)]
    fn conv_bn_max_pool_backward(
        #[extension_type] saved: ConvBnSaved<Self>,
        argmax: IntTensor<Self>,
        options: ConvBnMaxPoolBackwardOptions,
    ) -> ConvBnGrads<Self> {
        let _ = (saved, argmax);
        panic!("conv_bn_max_pool_backward: this backend has no kernel for it ({options:?})");
    }
}

#[cfg(feature = "ndarray")]
impl ConvBnBackend for burn::backend::NdArray {}

#[cfg(feature = "tch")]
impl ConvBnBackend for burn::backend::LibTorch {}

// The server runs Burn's operations and knows none of these methods. Under Burn's `fusion` this type is
// `Fusion` around the client, which itself has no impl: the macro's for `Fusion` would send the kernels as
// custom operations, and the default bodies send Burn's.
#[cfg(feature = "remote")]
impl ConvBnBackend for burn::backend::Remote {}
