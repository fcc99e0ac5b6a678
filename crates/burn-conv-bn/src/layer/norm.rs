//! Norm and activation as a layer, for networks that normalize before their convolutions.

use burn::config::Config;
use burn::module::{Content, DisplaySettings, Module, ModuleDisplay};
use burn::nn::{BatchNorm, BatchNormConfig};
use burn::tensor::{DType, Device, Shape, Tensor};

use super::block::{RunningUpdate, current};
use super::error::or_panic;
use super::{ConvBnSettings, RunningVariance};
use crate::functional::{BatchNormParams, batch_norm_running};
use crate::spec::{
    Activation, BatchNormOptions, NormSpec, NormVariant, SavedTensor, accumulator_dtype,
    check_epsilon, check_momentum, values_per_channel,
};

/// Configuration of [`BatchNormActivation`], made by [`init`](Self::init).
///
/// Fields and defaults are those of Burn's `BatchNormConfig`, with a ReLU behind.
///
/// # Examples
///
/// ```
/// use burn_conv_bn::{Activation, BatchNormActivationConfig};
///
/// let config = BatchNormActivationConfig::new(64).with_activation(Activation::Silu);
/// assert_eq!(config.channels, 64);
/// ```
#[derive(Config, Debug)]
#[non_exhaustive]
pub struct BatchNormActivationConfig {
    /// Number of channels.
    pub channels: usize,
    /// Added to the variance (or to the standard deviation, in the tutorial's variant). Finite and positive.
    /// Default: 1e-5.
    #[config(default = 1e-5)]
    pub epsilon: f64,
    /// Weight of the newest batch in the running statistics. Default: 0.1.
    #[config(default = 0.1)]
    pub momentum: f64,
    /// How the norm is formed. Default: as Burn does.
    #[config(default = "NormVariant::BatchNorm")]
    pub norm_variant: NormVariant,
    /// Whether the norm has a learnable scale and shift. Default: true.
    #[config(default = true)]
    pub affine: bool,
    /// Whether running statistics are kept and used in evaluation. Without, evaluation and a frozen norm use
    /// the batch's. Default: true.
    #[config(default = true)]
    pub track_running_stats: bool,
    /// Which variance goes into the running variance. Default: biased, as in Burn.
    #[config(default = "RunningVariance::Biased")]
    pub running_variance: RunningVariance,
    /// Applied last. Default: ReLU.
    #[config(default = "Activation::Relu")]
    pub activation: Activation,
}

impl BatchNormActivationConfig {
    /// Initializes a layer.
    ///
    /// # Panics
    ///
    /// Panics with a [`ConvBnError`](crate::ConvBnError) if epsilon or the momentum is out of range.
    #[track_caller]
    pub fn init(&self, device: &Device) -> BatchNormActivation {
        or_panic(check_epsilon(self.epsilon, true));
        or_panic(check_momentum(self.momentum));
        let norm = BatchNormConfig::new(self.channels)
            .with_epsilon(self.epsilon)
            .with_momentum(self.momentum)
            .init(device);
        let mut settings = ConvBnSettings::new(self.activation);
        settings.norm_variant = self.norm_variant;
        settings.affine = self.affine;
        settings.track_running_stats = self.track_running_stats;
        settings.running_variance = self.running_variance;
        BatchNormActivation { norm, settings }
    }
}

/// Batch norm and activation over `[batch, channels, spatial..]`, which keep the input alone for the
/// backward pass.
///
/// The output is rebuilt for every layer that needs it in the backward pass, Burn's own included; see
/// [`batch_norm`](crate::functional::batch_norm). Norm, activation and convolution, in the order of pre-activation networks, keep one
/// activation where Burn's layers keep three.
///
/// It holds Burn's own [`BatchNorm`], as the field `norm`: a record of a model with a plain `BatchNorm` in
/// its place loads once `bn.gamma` and the others are renamed `bn.norm.gamma`. Statistics are handled as in
/// [`ConvBn2d`](crate::ConvBn2d). [`ConvBnModule`](crate::ConvBnModule) reaches its settings; `recompute`
/// and `max_workspace` do not apply.
///
/// # Examples
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::nn::conv::Conv2dConfig;
/// use burn::tensor::{Device, Distribution, Tensor};
/// use burn_conv_bn::BatchNormActivationConfig;
///
/// let device = Device::flex().autodiff();
/// let norm = BatchNormActivationConfig::new(8).init(&device);
/// let conv = Conv2dConfig::new([8, 16], [3, 3]).init(&device);
/// let x = Tensor::<4>::random([2, 8, 16, 16], Distribution::Default, &device);
/// // conv(relu(norm(x))), which keeps x.
/// let y = conv.forward(norm.forward(x));
/// assert_eq!(y.dims(), [2, 16, 14, 14]);
///
/// let kept = norm.saved_for_backward([2, 8, 16, 16]);
/// let names: Vec<_> = kept.iter().map(|tensor| tensor.name).collect();
/// assert_eq!(names, ["input", "gamma", "beta", "mean", "variance"]);
/// # }
/// ```
#[derive(Module, Debug)]
#[module(custom_display)]
pub struct BatchNormActivation {
    /// The norm's parameters and running statistics.
    pub norm: BatchNorm,
    /// Everything else.
    pub settings: ConvBnSettings,
}

impl BatchNormActivation {
    /// An activation behind a norm.
    pub fn from_parts(norm: BatchNorm, activation: Activation) -> Self {
        Self::with_settings(norm, ConvBnSettings::new(activation))
    }

    /// An activation behind a norm, with every setting.
    pub fn with_settings(norm: BatchNorm, settings: ConvBnSettings) -> Self {
        Self { norm, settings }
    }

    /// `activation(norm(input))`.
    ///
    /// # Shapes
    ///
    /// - `input`, output: `[batch, channels, spatial..]`
    ///
    /// # Panics
    ///
    /// Panics with a [`ConvBnError`](crate::ConvBnError) if shapes, dtypes or devices do not fit, or if there
    /// is one value per channel or none to take statistics of.
    #[track_caller]
    pub fn forward<const D: usize>(&self, input: Tensor<D>) -> Tensor<D> {
        let settings = &self.settings;
        let (gamma, beta) = (self.norm.gamma.val(), self.norm.beta.val());
        let on_autodiff = input.is_autodiff() || (settings.affine && gamma.is_autodiff());
        let training = on_autodiff && self.norm.training.is_enabled();
        let is_given = settings.track_running_stats && !training;
        let params = BatchNormParams {
            affine: settings.affine.then_some((gamma, beta)),
            statistics: is_given.then(|| {
                let device = input.device();
                [&self.norm.running_mean, &self.norm.running_var]
                    .map(|running| current(running).to_device(&device))
                    .into()
            }),
        };
        let values = values_per_channel(&input.shape());
        let norm = NormSpec::new(settings.norm_variant, self.norm.epsilon);
        let options = BatchNormOptions::new(norm).with_activation(settings.activation);
        let (update, running) = (training && settings.track_running_stats)
            .then(|| {
                let kind = settings.running_variance;
                RunningUpdate::start(&self.norm, kind, input.device(), || values)
            })
            .unzip();
        let result = or_panic(batch_norm_running(input, params, options, running));
        if let Some(update) = update {
            update.finish(&result);
        }
        result.output
    }

    /// What a training step keeps for the backward pass of [`forward`](Self::forward), for a tracked input of
    /// that shape, by name and bytes. The input counts in f64 if gamma is f64, and else in f32.
    pub fn saved_for_backward<const D: usize>(&self, input_shape: [usize; D]) -> Vec<SavedTensor> {
        let gamma = self.norm.gamma.val();
        let norm_dtype = gamma.clone().dequantize().dtype();
        let dtype = accumulator_dtype(norm_dtype);
        let input = Shape::from(input_shape);
        let channels = Shape::new([input[1]]);
        let is_leaf = !matches!(gamma.dtype(), DType::QFloat(_));
        let affine = self.settings.affine;
        [
            (true, "input", &input, dtype, true),
            (affine, "gamma", &channels, norm_dtype, is_leaf),
            (affine, "beta", &channels, norm_dtype, is_leaf),
            (true, "mean", &channels, dtype, false),
            (true, "variance", &channels, dtype, false),
        ]
        .into_iter()
        .filter(|(kept, ..)| *kept)
        .map(|(_, name, shape, dtype, shared)| SavedTensor {
            name,
            shape: shape.clone(),
            dtype,
            shared,
        })
        .collect()
    }
}

impl ModuleDisplay for BatchNormActivation {
    fn custom_settings(&self) -> Option<DisplaySettings> {
        DisplaySettings::new()
            .with_new_line_after_attribute(false)
            .optional()
    }

    fn custom_content(&self, content: Content) -> Option<Content> {
        let content = content.add("norm", &self.norm);
        self.settings.describe(content).optional()
    }
}
