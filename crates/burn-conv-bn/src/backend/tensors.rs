//! The structs and enums of tensors that pass through the trait.

#![allow(clippy::large_enum_variant, reason = "there is one a call")]

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{
    Backend, BackendTensor, Dispatch, DispatchAutodiffContext, DispatchTensor, DispatchTensorKind,
    ExtensionType, TensorMetadata,
};
use burn::tensor::ops::MaxPoolOptions;
use burn::tensor::{DType, Shape};

use crate::spec::{
    BatchNormOptions, ConvBnOptions, ConvBnProblem, ConvSpec, Derivative, Parents, StatisticsKind,
    accumulator_dtype,
};

/// A tensor that may be missing.
///
/// Burn's extension macro passes enums of tensors across backends, but no `Option`.
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

/// Any number of tensors.
///
/// Burn's extension macro passes structs of tensors across backends, but no `Vec`.
#[derive(Clone, Debug)]
pub struct Tensors<B: Backend>(pub Vec<FloatTensor<B>>);

impl<B: Backend> ExtensionType<B> for Tensors<B> {
    type Target = Tensors<Dispatch>;

    fn map_to_dispatch<F>(self, map_kind: F, autodiff: DispatchAutodiffContext) -> Tensors<Dispatch>
    where
        F: Fn(BackendTensor<B>) -> DispatchTensorKind,
    {
        let wrap = |tensor| DispatchTensor {
            kind: map_kind(BackendTensor::Float(tensor)),
            autodiff,
        };
        Tensors(self.0.into_iter().map(wrap).collect())
    }

    fn map_from_dispatch<F>(target: Tensors<Dispatch>, unwrap_kind: F) -> Self
    where
        F: Fn(DispatchTensor) -> BackendTensor<B>,
    {
        let unwrap = |tensor| unwrap_kind(tensor).float();
        Self(target.0.into_iter().map(unwrap).collect())
    }

    fn routing_tensor(target: &Tensors<Dispatch>) -> Option<&DispatchTensor> {
        target.0.first()
    }

    fn routing_float_tensor(target: &Tensors<Dispatch>) -> Option<&DispatchTensor> {
        Self::routing_tensor(target)
    }

    fn autodiff_context(target: &Tensors<Dispatch>) -> DispatchAutodiffContext {
        let contexts = target.0.iter().map(|tensor| tensor.autodiff);
        contexts.fold(
            DispatchAutodiffContext::Disabled,
            DispatchAutodiffContext::merge,
        )
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
    /// The kind of statistics.
    pub fn kind(&self) -> StatisticsKind {
        match self {
            Self::Batch => StatisticsKind::Batch,
            Self::Fixed { .. } => StatisticsKind::Fixed,
        }
    }
}

/// Where the mean and variance of a norm on its own come from.
#[derive(Clone, Debug, ExtensionType)]
#[extension_type(fusion: cfg(feature = "fusion"))]
pub enum NormStatistics<B: Backend> {
    /// From this batch.
    Batch,
    /// From this batch, and known already; gradients flow through them as through the batch's.
    Known {
        /// Mean of the input, `[channels]`, in f32 or f64.
        mean: FloatTensor<B>,
        /// Biased variance of the input, `[channels]`, in f32 or f64.
        variance: FloatTensor<B>,
    },
    /// Given, as in evaluation and with a frozen norm; no gradient flows to them.
    Fixed {
        /// `[channels]`.
        mean: FloatTensor<B>,
        /// `[channels]`; the variant's formula takes it as it is.
        variance: FloatTensor<B>,
    },
}

impl<B: Backend> NormStatistics<B> {
    /// The kind of statistics.
    pub fn kind(&self) -> StatisticsKind {
        match self {
            Self::Batch | Self::Known { .. } => StatisticsKind::Batch,
            Self::Fixed { .. } => StatisticsKind::Fixed,
        }
    }
}

/// Mean and variance of each channel, `[channels]` each.
#[derive(Clone, Debug, ExtensionType)]
pub struct ChannelMoments<B: Backend> {
    /// Mean.
    pub mean: FloatTensor<B>,
    /// Variance.
    pub variance: FloatTensor<B>,
}

/// Running statistics that an op updates with those of its batch: before it in its inputs, after it in its results.
///
/// As in [`running_moments`](crate::backend::ConvBnBackend::running_moments), and by the launches that take the batch's
/// statistics. A backend without such launches returns none.
#[derive(Clone, Debug, ExtensionType)]
#[extension_type(fusion: cfg(feature = "fusion"))]
pub enum RunningStatistics<B: Backend> {
    /// None.
    Absent,
    /// In one dtype, not larger than the accumulator's. Given with batch statistics alone, and without a bias.
    Present {
        /// `[channels]`.
        mean: FloatTensor<B>,
        /// `[channels]`.
        variance: FloatTensor<B>,
        /// Weight of the batch.
        momentum: f64,
        /// Of the batch's biased variance.
        factor: f64,
    },
}

/// Tensors of a norm on its own.
///
/// Gamma, beta and fixed statistics are of the input's dtype, or f32 where that is f16 or bf16.
#[derive(Clone, Debug, ExtensionType)]
#[extension_type(fusion: cfg(feature = "fusion"))]
pub struct NormInputs<B: Backend> {
    /// `[batch, channels, spatial..]`.
    pub input: FloatTensor<B>,
    /// Scale, `[channels]`; 1 if absent.
    #[extension_type]
    pub gamma: OptionalTensor<B>,
    /// Shift, `[channels]`; 0 if absent.
    #[extension_type]
    pub beta: OptionalTensor<B>,
    /// Where mean and variance come from.
    #[extension_type]
    pub statistics: NormStatistics<B>,
    /// Running statistics to update.
    #[extension_type]
    pub running: RunningStatistics<B>,
}

impl<B: Backend> NormInputs<B> {
    /// Dtype of gamma and beta, or of the accumulators without them.
    pub fn norm_dtype(&self) -> DType {
        norm_dtype(&self.gamma, &self.beta, self.input.dtype())
    }
}

fn norm_dtype<B: Backend>(
    gamma: &OptionalTensor<B>,
    beta: &OptionalTensor<B>,
    input: DType,
) -> DType {
    match gamma.as_option().or(beta.as_option()) {
        Some(tensor) => tensor.dtype(),
        None => accumulator_dtype(input),
    }
}

/// Tensors for the backward kernel of a norm.
#[derive(Clone, Debug, ExtensionType)]
#[extension_type(fusion: cfg(feature = "fusion"))]
pub struct NormSaved<B: Backend> {
    /// Gradient of the output, `[batch, channels, spatial..]`.
    pub output_grad: FloatTensor<B>,
    /// The norm's input; see [`BatchNormBackwardOptions::needs_input`].
    #[extension_type]
    pub input: OptionalTensor<B>,
    /// The norm's scale.
    #[extension_type]
    pub gamma: OptionalTensor<B>,
    /// The norm's shift.
    #[extension_type]
    pub beta: OptionalTensor<B>,
    /// As [`NormOutput::mean`]; the given mean with fixed statistics.
    pub mean: FloatTensor<B>,
    /// As [`NormOutput::variance`]; the given variance with fixed statistics.
    pub variance: FloatTensor<B>,
}

/// Options of `batch_normalize_backward`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BatchNormBackwardOptions {
    /// The forward's options.
    pub options: BatchNormOptions,
    /// Where mean and variance came from.
    pub statistics: StatisticsKind,
    /// Dtype of gamma and beta, and so of their gradients.
    pub norm_dtype: DType,
    /// Requested gradients, of `input`, `gamma` and `beta`.
    pub wanted: Parents,
}

impl BatchNormBackwardOptions {
    /// Whether the requested gradients depend on the norm's input: through the batch's statistics, gamma's
    /// gradient, or the activation's derivative.
    pub fn needs_input(&self) -> bool {
        let is_of_batch = self.statistics == StatisticsKind::Batch;
        self.wanted.gamma || (self.wanted.input && is_of_batch) || self.needs_value()
    }

    /// Whether they depend on the activation's argument.
    pub fn needs_value(&self) -> bool {
        self.options.activation.derivative() != Derivative::One
    }
}

/// Requested gradients of a norm, each with its parent's shape and dtype.
#[derive(Clone, Debug, ExtensionType)]
#[extension_type(fusion: cfg(feature = "fusion"))]
pub struct NormGrads<B: Backend> {
    /// Of the norm's input.
    #[extension_type]
    pub input: OptionalTensor<B>,
    /// Of the norm's scale.
    #[extension_type]
    pub gamma: OptionalTensor<B>,
    /// Of the norm's shift.
    #[extension_type]
    pub beta: OptionalTensor<B>,
}

/// Tensors for the backward kernel of a convolution.
#[derive(Clone, Debug, ExtensionType)]
#[extension_type(fusion: cfg(feature = "fusion"))]
pub struct ConvSaved<B: Backend> {
    /// Gradient of the output, `[batch, channels_out, spatial_out..]`.
    pub output_grad: FloatTensor<B>,
    /// The input, if the weight's gradient is requested.
    #[extension_type]
    pub input: OptionalTensor<B>,
    /// The weight, if the input's gradient is requested.
    #[extension_type]
    pub weight: OptionalTensor<B>,
}

/// Options of `conv_backward`.
#[derive(Clone, Debug, PartialEq)]
pub struct ConvBackwardOptions {
    /// Geometry of the convolution.
    pub spec: ConvSpec,
    /// `[batch, channels_in, spatial..]`.
    pub input_shape: Shape,
    /// `[channels_out, channels_in / groups, kernel..]`.
    pub weight_shape: Shape,
    /// As [`ConvBnOptions::max_workspace`].
    pub max_workspace: Option<usize>,
    /// Requested gradients, of `input`, `weight` and `bias`.
    pub wanted: Parents,
}

/// Requested gradients of a convolution, each with its parent's shape and dtype.
#[derive(Clone, Debug, ExtensionType)]
#[extension_type(fusion: cfg(feature = "fusion"))]
pub struct ConvGrads<B: Backend> {
    /// Of the input.
    #[extension_type]
    pub input: OptionalTensor<B>,
    /// Of the weight.
    #[extension_type]
    pub weight: OptionalTensor<B>,
    /// Of the bias.
    #[extension_type]
    pub bias: OptionalTensor<B>,
}

/// Tensors of the fused op.
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
    /// Running statistics to update.
    #[extension_type]
    pub running: RunningStatistics<B>,
}

impl<B: Backend> ConvBnInputs<B> {
    /// Flags of the differentiable inputs that are given.
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
        norm_dtype(&self.gamma, &self.beta, self.input.dtype())
    }
}

/// Output and statistics of a normalizing op.
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
    /// Running statistics after the batch, if the backend updates them with it. Not differentiable.
    #[extension_type]
    pub running: RunningStatistics<B>,
}

/// Results of `conv_bn_forward`.
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
    /// As [`NormOutput::running`].
    #[extension_type]
    pub running: RunningStatistics<B>,
    /// The convolution's output without its bias, if requested.
    #[extension_type]
    pub conv_output: OptionalTensor<B>,
}

/// Tensors for the backward kernel: the output's gradient, and what
/// [`SavePlan`](crate::backend::SavePlan) kept.
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

/// Options of `conv_bn_backward`.
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
    /// Requested gradients.
    pub wanted: Parents,
}

impl ConvBnBackwardOptions {
    /// Shape of the convolution's output.
    pub(crate) fn output_shape(&self) -> Shape {
        let (input, weight) = (self.input_shape.clone(), self.weight_shape.clone());
        ConvBnProblem::conv(input, weight, &self.options.conv)
            .expect("the forward pass had these shapes")
            .output
    }

    /// Checks, for a block joined with a max pool whose plan kept no statistics, that the requested gradients
    /// are plain sums over the output's: the pool makes no difference to those.
    #[cfg(any(feature = "cubecl", feature = "flex"))]
    #[track_caller]
    pub(crate) fn assert_plain_sums(&self) {
        let Parents {
            input,
            weight,
            gamma,
            beta,
            residual,
            ..
        } = self.wanted;
        let is_masked = self.options.activation.derivative() != Derivative::One;
        assert!(
            !(input || weight || gamma || residual || beta && is_masked),
            "a block joined with a max pool: expected mean and variance, which its SavePlan keeps for these \
             gradients, got none ({:?})",
            self.wanted
        );
    }
}

/// Requested gradients, each with its parent's shape and dtype.
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

/// Results of `max_pool_forward`.
#[derive(Clone, Debug, ExtensionType)]
#[extension_type(fusion: cfg(feature = "fusion"))]
pub enum MaxPoolForward<B: Backend> {
    /// No kernel for this dtype or window.
    Unsupported,
    /// The pooled input, and its argmax for the backward kernel.
    Pooled {
        /// `[batch, channels, height_out, width_out]`.
        output: FloatTensor<B>,
        /// Argmax of each window, `row * kernel_width + column`, for the backward kernel alone: on Flex
        /// `[batch, channels, height_out, width_out]` of U8, on CubeCL four in a U32 with the channels
        /// innermost, `[words]`.
        argmax: IntTensor<B>,
    },
}

/// Options of `max_pool_backward`.
#[derive(Clone, Debug, PartialEq)]
pub struct MaxPoolBackwardOptions {
    /// The forward's options.
    pub options: MaxPoolOptions<2>,
    /// `[batch, channels, height, width]`.
    pub input_shape: Shape,
}

/// Results of `conv_bn_max_pool_forward`.
#[derive(Clone, Debug, ExtensionType)]
#[extension_type(fusion: cfg(feature = "fusion"))]
pub enum ConvBnMaxPoolForward<B: Backend> {
    /// No kernel for these inputs and options: the two ops run one after the other.
    Unsupported,
    /// The pooled output, its argmax, and the statistics.
    Pooled {
        /// `[batch, channels_out, height_out, width_out]`.
        output: FloatTensor<B>,
        /// Argmax, as in [`MaxPoolForward::Pooled`].
        argmax: IntTensor<B>,
        /// As [`ConvBnForward::mean`].
        mean: FloatTensor<B>,
        /// As [`ConvBnForward::variance`].
        variance: FloatTensor<B>,
        /// As [`NormOutput::running`].
        #[extension_type]
        running: RunningStatistics<B>,
        /// As [`ConvBnForward::conv_output`].
        #[extension_type]
        conv_output: OptionalTensor<B>,
        /// Whether the backward kernel recovers the norm's input from the pooled output where it can.
        inverts: bool,
    },
}

/// Options of `conv_bn_max_pool_backward`.
#[derive(Clone, Debug, PartialEq)]
pub struct ConvBnMaxPoolBackwardOptions {
    /// Options of `conv_bn_backward`.
    pub conv_bn: ConvBnBackwardOptions,
    /// Options of the max pool.
    pub pool: MaxPoolOptions<2>,
}
