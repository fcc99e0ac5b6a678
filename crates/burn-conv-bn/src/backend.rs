//! The backend trait: the op's differentiable methods, and the doors that kernels implement.

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, ExtensionType, TensorMetadata, backend_extension};
use burn::tensor::{DType, Shape};

use crate::definition::{
    ConvBnOptions, ConvSpec, NormSpec, Parents, StatisticsKind, accumulator_dtype,
};
use crate::portable;

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

/// Burn's [`Backend`], extended with the fused op and the two ops that it is made of.
///
/// The methods `conv`, `batch_normalize` and `conv_bn` are differentiable: `Autodiff<B>` registers one
/// node for each. The methods `conv_bn_forward` and `conv_bn_backward` are the kernels behind
/// `conv_bn`; they are what a backend overrides, and they do not differentiate. All have default
/// bodies made of Burn's own ops.
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
/// overrides `conv_bn_forward` and `conv_bn_backward` where it has kernels for them. For tensors of
/// Burn's `Tensor` to reach it, it has to be one of the backends that Burn dispatches to.
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
}

#[cfg(feature = "ndarray")]
impl ConvBnBackend for burn::backend::NdArray {}

#[cfg(feature = "tch")]
impl ConvBnBackend for burn::backend::LibTorch {}
