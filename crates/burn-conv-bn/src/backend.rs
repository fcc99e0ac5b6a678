//! The backend trait: the op's differentiable methods, and the doors that kernels implement.

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, ExtensionType, TensorMetadata, backend_extension};
use burn::tensor::ops::MaxPoolOptions;
use burn::tensor::{DType, Shape};

use crate::portable;
use crate::spec::{ConvBnOptions, ConvSpec, NormSpec, Parents, StatisticsKind, accumulator_dtype};

/// A tensor that may be missing.
///
/// Burn's extension macro passes enums of tensors across backends but not `Option`s of them. This
/// one converts from an `Option` and [into](Self::into_option) one:
///
/// ```
/// use burn::backend::Backend;
/// use burn::backend::tensor::FloatTensor;
/// use burn_conv_bn::OptionalTensor;
///
/// fn or_zeros<B: Backend>(
///     tensor: OptionalTensor<B>,
///     zeros: impl FnOnce() -> FloatTensor<B>,
/// ) -> FloatTensor<B> {
///     tensor.into_option().unwrap_or_else(zeros)
/// }
/// ```
#[derive(Clone, Debug, ExtensionType)]
#[extension_type(fusion: cfg(feature = "fusion"))]
pub enum OptionalTensor<B: Backend> {
    /// No tensor.
    Absent,
    /// A tensor.
    Present(FloatTensor<B>),
}

impl<B: Backend> OptionalTensor<B> {
    /// Borrows the tensor, if there is one.
    pub fn as_option(&self) -> Option<&FloatTensor<B>> {
        match self {
            Self::Absent => None,
            Self::Present(tensor) => Some(tensor),
        }
    }

    /// The tensor, if there is one.
    pub fn into_option(self) -> Option<FloatTensor<B>> {
        match self {
            Self::Absent => None,
            Self::Present(tensor) => Some(tensor),
        }
    }

    /// Whether there is a tensor.
    pub fn is_present(&self) -> bool {
        matches!(self, Self::Present(_))
    }
}

impl<B: Backend> From<Option<FloatTensor<B>>> for OptionalTensor<B> {
    fn from(tensor: Option<FloatTensor<B>>) -> Self {
        match tensor {
            None => Self::Absent,
            Some(tensor) => Self::Present(tensor),
        }
    }
}

/// Where the norm's mean and variance come from.
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::backend::Flex;
/// use burn_conv_bn::{Statistics, StatisticsKind};
///
/// let statistics = Statistics::<Flex>::Batch;
/// assert_eq!(statistics.kind(), StatisticsKind::Batch);
/// # }
/// ```
#[derive(Clone, Debug, ExtensionType)]
#[extension_type(fusion: cfg(feature = "fusion"))]
pub enum Statistics<B: Backend> {
    /// From this batch.
    Batch,
    /// Given, as in evaluation and with a frozen norm; no gradient flows to them.
    Fixed {
        /// `[channels_out]`.
        mean: FloatTensor<B>,
        /// `[channels_out]`; the variant's formula takes it as it is.
        variance: FloatTensor<B>,
    },
}

impl<B: Backend> Statistics<B> {
    /// Which of the two.
    pub fn kind(&self) -> StatisticsKind {
        match self {
            Self::Batch => StatisticsKind::Batch,
            Self::Fixed { .. } => StatisticsKind::Fixed,
        }
    }
}

/// The tensors that the fused op takes.
///
/// `input`, `weight`, `bias` and `residual` share one dtype. Gamma, beta and fixed statistics are
/// of that dtype too, or f32 where it is f16 or bf16.
///
/// [The example of the kernels](ConvBnBackend#the-kernels) makes one.
#[derive(Clone, Debug, ExtensionType)]
#[extension_type(fusion: cfg(feature = "fusion"))]
pub struct ConvBnInputs<B: Backend> {
    /// `[batch, channels_in, spatial..]`.
    pub input: FloatTensor<B>,
    /// `[channels_out, channels_in / groups, kernel..]`.
    pub weight: FloatTensor<B>,
    /// The convolution's bias, `[channels_out]`.
    #[extension_type]
    pub bias: OptionalTensor<B>,
    /// The norm's scale, `[channels_out]`; 1 if absent.
    #[extension_type]
    pub gamma: OptionalTensor<B>,
    /// The norm's shift, `[channels_out]`; 0 if absent.
    #[extension_type]
    pub beta: OptionalTensor<B>,
    /// Added before the activation, of the output's shape.
    #[extension_type]
    pub residual: OptionalTensor<B>,
    /// Where mean and variance come from.
    #[extension_type]
    pub statistics: Statistics<B>,
}

impl<B: Backend> ConvBnInputs<B> {
    /// Which of the differentiable inputs are given.
    pub fn present(&self) -> Parents {
        Parents {
            input: true,
            weight: true,
            bias: self.bias.is_present(),
            gamma: self.gamma.is_present(),
            beta: self.beta.is_present(),
            residual: self.residual.is_present(),
        }
    }

    /// Dtype of gamma and beta, or of the accumulators without them.
    pub fn norm_dtype(&self) -> DType {
        match self.gamma.as_option().or(self.beta.as_option()) {
            Some(tensor) => tensor.dtype(),
            None => accumulator_dtype(self.input.dtype()),
        }
    }
}

/// What a normalizing op returns.
///
/// [The example of the op](ConvBnBackend#examples) has one.
#[derive(Clone, Debug, ExtensionType)]
#[extension_type(fusion: cfg(feature = "fusion"))]
pub struct NormOutput<B: Backend> {
    /// The normalized and activated output.
    pub output: FloatTensor<B>,
    /// Mean of the norm's input, `[channels]`, in f32 or f64. Not differentiable.
    pub mean: FloatTensor<B>,
    /// Biased variance of the norm's input (sum of squared deviations over the number of
    /// values), `[channels]`, in f32 or f64. Not differentiable.
    pub variance: FloatTensor<B>,
}

/// What the forward kernel returns.
///
/// [The example of the kernels](ConvBnBackend#the-kernels) has one.
#[derive(Clone, Debug, ExtensionType)]
#[extension_type(fusion: cfg(feature = "fusion"))]
pub struct ConvBnForward<B: Backend> {
    /// `[batch, channels_out, spatial_out..]`.
    pub output: FloatTensor<B>,
    /// `[channels_out]`, f32 or f64: with batch statistics the mean of the convolution's output
    /// *without* its bias, otherwise the given mean.
    pub mean: FloatTensor<B>,
    /// `[channels_out]`, f32 or f64: with batch statistics the biased variance, otherwise the
    /// given variance.
    pub variance: FloatTensor<B>,
    /// The convolution's output without its bias, if it was asked for.
    #[extension_type]
    pub conv_output: OptionalTensor<B>,
}

/// What the backward kernel takes: the tensors that [`SavePlan`](crate::SavePlan) kept.
///
/// [The example of the kernels](ConvBnBackend#the-kernels) makes one.
#[derive(Clone, Debug, ExtensionType)]
#[extension_type(fusion: cfg(feature = "fusion"))]
pub struct ConvBnSaved<B: Backend> {
    /// Gradient of the output, `[batch, channels_out, spatial_out..]`.
    pub output_grad: FloatTensor<B>,
    /// The convolution's input.
    #[extension_type]
    pub input: OptionalTensor<B>,
    /// The convolution's weight.
    #[extension_type]
    pub weight: OptionalTensor<B>,
    /// The convolution's bias.
    #[extension_type]
    pub bias: OptionalTensor<B>,
    /// The norm's scale.
    #[extension_type]
    pub gamma: OptionalTensor<B>,
    /// The norm's shift.
    #[extension_type]
    pub beta: OptionalTensor<B>,
    /// As [`ConvBnForward::mean`].
    #[extension_type]
    pub mean: OptionalTensor<B>,
    /// As [`ConvBnForward::variance`].
    #[extension_type]
    pub variance: OptionalTensor<B>,
    /// As [`ConvBnForward::conv_output`].
    #[extension_type]
    pub conv_output: OptionalTensor<B>,
    /// The op's output.
    #[extension_type]
    pub output: OptionalTensor<B>,
    /// The tensor added before the activation.
    #[extension_type]
    pub residual: OptionalTensor<B>,
}

/// What the backward kernel must know besides tensors.
///
/// [The example of the kernels](ConvBnBackend#the-kernels) makes one.
#[derive(Clone, Debug, PartialEq)]
pub struct ConvBnBackwardOptions {
    /// The forward's options.
    pub options: ConvBnOptions,
    /// Where mean and variance came from.
    pub statistics: StatisticsKind,
    /// `[batch, channels_in, spatial..]`.
    pub input_shape: Shape,
    /// `[channels_out, channels_in / groups, kernel..]`.
    pub weight_shape: Shape,
    /// Dtype of gamma and beta, and so of their gradients.
    pub norm_dtype: DType,
    /// Which gradients are wanted.
    pub wanted: Parents,
}

/// The gradients that were wanted, each with its parent's shape and dtype.
///
/// [The example of the kernels](ConvBnBackend#the-kernels) has one.
#[derive(Clone, Debug, ExtensionType)]
#[extension_type(fusion: cfg(feature = "fusion"))]
pub struct ConvBnGrads<B: Backend> {
    /// Of the convolution's input.
    #[extension_type]
    pub input: OptionalTensor<B>,
    /// Of the convolution's weight.
    #[extension_type]
    pub weight: OptionalTensor<B>,
    /// Of the convolution's bias. Exactly zero with batch statistics, which subtract it.
    #[extension_type]
    pub bias: OptionalTensor<B>,
    /// Of the norm's scale.
    #[extension_type]
    pub gamma: OptionalTensor<B>,
    /// Of the norm's shift.
    #[extension_type]
    pub beta: OptionalTensor<B>,
    /// Of the residual.
    #[extension_type]
    pub residual: OptionalTensor<B>,
}

/// What the max pool's forward kernel returns.
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::backend::Dispatch;
/// use burn::tensor::ops::MaxPoolOptions;
/// use burn::tensor::{Device, Int, Tensor};
/// use burn_conv_bn::{ConvBnBackend, MaxPoolForward};
///
/// let image = [[[[0.5, 2.0, 1.0, 0.0], [1.0, 0.0, 3.0, 1.0]]]];
/// let image = Tensor::<4>::from_data(image, &Device::flex());
/// let options = MaxPoolOptions::new([2, 2]);
/// let MaxPoolForward::Pooled { output, places } =
///     Dispatch::max_pool_forward(image.into_dispatch(), options)
/// else {
///     panic!("Flex has a kernel for windows of 2x2");
/// };
/// let output = Tensor::<4>::from_dispatch(output).into_data();
/// assert_eq!(output.iter::<f32>().collect::<Vec<_>>(), [2.0, 3.0]);
/// let places = Tensor::<4, Int>::from_dispatch(places).into_data();
/// assert_eq!(places.iter::<u8>().collect::<Vec<_>>(), [1, 2]);
/// # }
/// ```
#[derive(Clone, Debug, ExtensionType)]
pub enum MaxPoolForward<B: Backend> {
    /// Nothing: the backend has no kernel for this dtype or window.
    Unsupported,
    /// The pooled input, and what the backward kernel wants to know of it.
    Pooled {
        /// `[batch, channels, height_out, width_out]`.
        output: FloatTensor<B>,
        /// `[batch, channels, height_out, width_out]`, U8: where in its window each output was,
        /// `row * kernel_width + column`.
        places: IntTensor<B>,
    },
}

/// What the max pool's backward kernel must know besides tensors.
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::backend::Dispatch;
/// use burn::tensor::ops::MaxPoolOptions;
/// use burn::tensor::{Device, Shape, Tensor};
/// use burn_conv_bn::{ConvBnBackend, MaxPoolBackwardOptions, MaxPoolForward};
///
/// let row = Tensor::<4>::from_data([[[[0.5, 2.0, 1.0, 0.0]]]], &Device::flex());
/// let options = MaxPoolOptions::new([1, 2]);
/// let forward = Dispatch::max_pool_forward(row.into_dispatch(), options.clone());
/// let MaxPoolForward::Pooled { places, .. } = forward else {
///     panic!("Flex has a kernel for windows of 1x2");
/// };
/// let options = MaxPoolBackwardOptions {
///     options,
///     input_shape: Shape::new([1, 1, 1, 4]),
/// };
/// let output_grad = Tensor::<4>::from_data([[[[5.0, 7.0]]]], &Device::flex());
/// let grad = Dispatch::max_pool_backward(output_grad.into_dispatch(), places, options);
/// let grad = Tensor::<4>::from_dispatch(grad).into_data();
/// assert_eq!(grad.iter::<f32>().collect::<Vec<_>>(), [0.0, 5.0, 7.0, 0.0]);
/// # }
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct MaxPoolBackwardOptions {
    /// The forward's options.
    pub options: MaxPoolOptions<2>,
    /// `[batch, channels, height, width]`.
    pub input_shape: Shape,
}

/// What the forward kernel of the fused op with a max pool behind it returns.
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::backend::flex::FlexTensor;
/// use burn::backend::{Flex, TensorMetadata};
/// use burn::tensor::TensorData;
/// use burn::tensor::ops::MaxPoolOptions;
/// use burn_conv_bn::{
///     ConvBnBackend, ConvBnBackwardOptions, ConvBnInputs, ConvBnMaxPoolBackwardOptions,
///     ConvBnMaxPoolForward, ConvBnOptions, ConvBnSaved, ConvSpec, OptionalTensor, Parents,
///     Statistics,
/// };
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
/// };
/// let (statistics, norm_dtype) = (inputs.statistics.kind(), inputs.norm_dtype());
/// let options = ConvBnOptions::new(ConvSpec::unit(2));
/// let pool = MaxPoolOptions::new([2, 2]);
/// let forward = Flex::conv_bn_max_pool_forward(inputs, options.clone(), pool.clone());
/// let ConvBnMaxPoolForward::Pooled { output, places, mean, variance } = forward else {
///     panic!("Flex has a kernel for windows of 2x2");
/// };
/// assert_eq!(output.shape().to_vec(), [2, 4, 3, 3]);
///
/// let saved = ConvBnSaved::<Flex> {
///     output_grad: tensor([2, 4, 3, 3]),
///     input: OptionalTensor::Present(input.clone()),
///     weight: OptionalTensor::Present(weight.clone()),
///     bias: OptionalTensor::Absent,
///     gamma: OptionalTensor::Absent,
///     beta: OptionalTensor::Absent,
///     mean: OptionalTensor::Present(mean),
///     variance: OptionalTensor::Present(variance),
///     conv_output: OptionalTensor::Absent,
///     output: OptionalTensor::Present(output),
///     residual: OptionalTensor::Absent,
/// };
/// let options = ConvBnMaxPoolBackwardOptions {
///     conv_bn: ConvBnBackwardOptions {
///         options,
///         statistics,
///         input_shape: input.shape(),
///         weight_shape: weight.shape(),
///         norm_dtype,
///         wanted: Parents {
///             input: true,
///             ..Parents::default()
///         },
///     },
///     pool,
/// };
/// let grads = Flex::conv_bn_max_pool_backward(saved, places, options);
/// let grad = grads.input.into_option().expect("it was wanted");
/// assert_eq!(grad.shape(), input.shape());
/// # }
/// ```
#[derive(Clone, Debug, ExtensionType)]
pub enum ConvBnMaxPoolForward<B: Backend> {
    /// Nothing: the backend has no kernel for this, and runs one op after the other.
    Unsupported,
    /// The pooled output, and what the backward kernel wants to know.
    Pooled {
        /// `[batch, channels_out, height_out, width_out]`.
        output: FloatTensor<B>,
        /// As [`MaxPoolForward::Pooled`]'s.
        places: IntTensor<B>,
        /// As [`ConvBnForward::mean`].
        mean: FloatTensor<B>,
        /// As [`ConvBnForward::variance`].
        variance: FloatTensor<B>,
    },
}

/// What the backward kernel of the fused op with a max pool behind it must know besides tensors.
///
/// [`ConvBnMaxPoolForward`] has an example.
#[derive(Clone, Debug, PartialEq)]
pub struct ConvBnMaxPoolBackwardOptions {
    /// Of the fused op.
    pub conv_bn: ConvBnBackwardOptions,
    /// The pool's.
    pub pool: MaxPoolOptions<2>,
}

/// Burn's [`Backend`], extended with the fused op, the two ops that it is made of, and a max pool that
/// keeps little.
///
/// The methods `conv`, `batch_normalize`, `conv_bn`, `max_pool` and `conv_bn_max_pool` are differentiable:
/// `Autodiff<B>` registers one node for each. The methods `conv_bn_forward` and `conv_bn_backward` are the
/// kernels behind `conv_bn`; they are what a backend overrides, and they do not differentiate. All of
/// these have default bodies made of Burn's own ops. So has `max_pool`, whose kernels `max_pool_forward`
/// and `max_pool_backward` a backend overrides together or not at all: without them Burn's own pool runs,
/// with Burn's own node. Likewise `conv_bn_max_pool`, which without its two kernels is `conv_bn` and
/// `max_pool`.
///
/// The methods trust their arguments; [`functional`](crate::functional) is the checked front.
///
/// # Examples
///
/// The op on whatever backend a tensor is on, by Burn's `Dispatch`:
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::backend::Dispatch;
/// use burn::tensor::{Device, Tensor};
/// use burn_conv_bn::{
///     ConvBnBackend, ConvBnInputs, ConvBnOptions, ConvSpec, OptionalTensor, Statistics,
/// };
///
/// let device = Device::flex();
/// let inputs = ConvBnInputs::<Dispatch> {
///     input: Tensor::<4>::ones([2, 3, 8, 8], &device).into_dispatch(),
///     weight: Tensor::<4>::ones([4, 3, 3, 3], &device).into_dispatch(),
///     bias: OptionalTensor::Absent,
///     gamma: OptionalTensor::Absent,
///     beta: OptionalTensor::Absent,
///     residual: OptionalTensor::Absent,
///     statistics: Statistics::Batch,
/// };
/// let result = Dispatch::conv_bn(inputs, ConvBnOptions::new(ConvSpec::unit(2)));
/// assert_eq!(Tensor::<4>::from_dispatch(result.output).dims(), [2, 4, 6, 6]);
/// # }
/// ```
///
/// A backend of your own takes the default bodies with `impl ConvBnBackend for MyBackend {}`, and
/// overrides `conv_bn_forward` and `conv_bn_backward`, the three methods of the max pool, or the two
/// kernels of both, where it has kernels for them. For tensors of Burn's `Tensor` to reach it, it has to be one of the backends that
/// Burn dispatches to.
///
/// # The kernels
///
/// What the autodiff node does with them, for a layer whose weight alone is tracked:
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::backend::flex::FlexTensor;
/// use burn::backend::{Flex, TensorMetadata};
/// use burn::tensor::TensorData;
/// use burn_conv_bn::{
///     ConvBnBackend, ConvBnBackwardOptions, ConvBnInputs, ConvBnOptions, ConvBnSaved, ConvSpec,
///     OptionalTensor, Parents, SavePlan, Statistics,
/// };
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
/// // What the plan says, which is to recompute the convolution.
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
/// let grad = grads.weight.into_option().expect("it was wanted");
///
/// // The norm undoes a change of the weight's length, so that the gradient has no part along it.
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
        portable::conv::forward::<Self>(input, weight, bias.into_option(), &spec)
    }

    /// Batch normalization with batch statistics, with an explicit backward pass.
    ///
    /// # Shapes
    ///
    /// - `input`, output: `[batch, channels, spatial..]`
    /// - `gamma`, `beta`, mean, variance: `[channels]`
    #[fusion(default)]
    fn batch_normalize(
        input: FloatTensor<Self>,
        #[extension_type] gamma: OptionalTensor<Self>,
        #[extension_type] beta: OptionalTensor<Self>,
        norm: NormSpec,
    ) -> NormOutput<Self> {
        portable::norm::forward::<Self>(input, gamma.into_option(), beta.into_option(), norm)
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
        }
    }

    /// The forward kernel. Returns the convolution's output too if `keep_conv_output`.
    #[fusion(meta = crate::fusion::conv_bn_forward)]
    fn conv_bn_forward(
        #[extension_type] inputs: ConvBnInputs<Self>,
        options: ConvBnOptions,
        keep_conv_output: bool,
    ) -> ConvBnForward<Self> {
        portable::conv_bn::forward::<Self>(inputs, &options, keep_conv_output)
    }

    /// The backward kernel: the gradients that `options.wanted` asks for, from what
    /// [`SavePlan`](crate::SavePlan) kept.
    #[fusion(meta = crate::fusion::conv_bn_backward)]
    fn conv_bn_backward(
        #[extension_type] saved: ConvBnSaved<Self>,
        options: ConvBnBackwardOptions,
    ) -> ConvBnGrads<Self> {
        portable::conv_bn::backward::<Self>(saved, &options)
    }

    /// Max pool over height and width, with a backward pass that needs no input where the backend has
    /// kernels for it.
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

    /// The max pool's forward kernel, with what `max_pool_backward` needs to know, if the backend has
    /// one for this dtype and window.
    #[fusion(default)]
    fn max_pool_forward(
        input: FloatTensor<Self>,
        options: MaxPoolOptions<2>,
    ) -> MaxPoolForward<Self> {
        let _ = (input, options);
        MaxPoolForward::Unsupported
    }

    /// The max pool's backward kernel: the input's gradient, from the output's and the places that
    /// `max_pool_forward` returned.
    ///
    /// # Panics
    ///
    /// Panics on a backend whose `max_pool_forward` returns none.
    #[fusion(default)]
    fn max_pool_backward(
        output_grad: FloatTensor<Self>,
        places: IntTensor<Self>,
        options: MaxPoolBackwardOptions,
    ) -> FloatTensor<Self> {
        let _ = (output_grad, places);
        panic!("max_pool_backward: this backend's forward kernel keeps no places ({options:?})");
    }

    /// [`conv_bn`](Self::conv_bn) over height and width, and [`max_pool`](Self::max_pool) of its output:
    /// one op, without the tensor between the two, where the backend has kernels for it.
    ///
    /// The statistics are those of the convolution's output, as `conv_bn` returns them.
    #[fusion(default)]
    fn conv_bn_max_pool(
        #[extension_type] inputs: ConvBnInputs<Self>,
        options: ConvBnOptions,
        pool: MaxPoolOptions<2>,
    ) -> NormOutput<Self> {
        let shift = portable::bias_shift::<Self>(&inputs);
        match Self::conv_bn_max_pool_forward(inputs.clone(), options.clone(), pool.clone()) {
            ConvBnMaxPoolForward::Pooled {
                output,
                mean,
                variance,
                ..
            } => NormOutput {
                output,
                mean: portable::shifted_mean::<Self>(mean, shift),
                variance,
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

    /// The forward kernel of `conv_bn_max_pool`, if the backend has one for these inputs and options.
    #[fusion(default)]
    fn conv_bn_max_pool_forward(
        #[extension_type] inputs: ConvBnInputs<Self>,
        options: ConvBnOptions,
        pool: MaxPoolOptions<2>,
    ) -> ConvBnMaxPoolForward<Self> {
        let _ = (inputs, options, pool);
        ConvBnMaxPoolForward::Unsupported
    }

    /// The backward kernel of `conv_bn_max_pool`: the gradients that are wanted, from what
    /// [`SavePlan::with_max_pool`](crate::SavePlan::with_max_pool) says and the places. `saved.output` and
    /// `saved.output_grad` are those of the pool.
    ///
    /// # Panics
    ///
    /// Panics on a backend whose `conv_bn_max_pool_forward` supports nothing, and without the statistics that the plan
    /// keeps for the wanted gradients.
    #[fusion(default)]
    fn conv_bn_max_pool_backward(
        #[extension_type] saved: ConvBnSaved<Self>,
        places: IntTensor<Self>,
        options: ConvBnMaxPoolBackwardOptions,
    ) -> ConvBnGrads<Self> {
        let _ = (saved, places);
        panic!("conv_bn_max_pool_backward: this backend has no kernel for it ({options:?})");
    }
}

#[cfg(feature = "ndarray")]
impl ConvBnBackend for burn::backend::NdArray {}

#[cfg(feature = "tch")]
impl ConvBnBackend for burn::backend::LibTorch {}
