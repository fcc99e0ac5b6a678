//! The layer.

use burn::config::Config;
use burn::module::{Content, DisplaySettings, Module, ModuleDisplay};
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::nn::{BatchNorm, BatchNormConfig, Initializer, PaddingConfig2d};
use burn::tensor::{DType, Device, Shape, Tensor};

use crate::definition::{
    Activation, ConvBnOptions, ConvBnProblem, ConvSpec, NormSpec, NormVariant, Parents, Recompute,
    SavePlan, SavedTensor, StatisticsKind, values_per_channel,
};
use crate::functional::{ConvBnParams, Normalized, conv_bn};

/// Which variance of a batch goes into the running variance.
#[derive(Config, Debug, Copy, PartialEq, Eq, Hash)]
pub enum RunningVariance {
    /// Over the number of values, as Burn does.
    Biased,
    /// Over one less, as PyTorch does.
    Unbiased,
}

/// What a fused layer does besides what its convolution and norm say: the part that is not in a
/// record.
#[derive(Clone, Debug, PartialEq)]
pub struct ConvBnSettings {
    /// Applied last.
    pub activation: Activation,
    /// How the norm is formed.
    pub norm_variant: NormVariant,
    /// Whether gamma and beta take part.
    pub affine: bool,
    /// Whether running statistics are kept and used in evaluation. Without, evaluation and a
    /// frozen norm use the batch's.
    pub track_running_stats: bool,
    /// Which variance goes into the running variance.
    pub running_variance: RunningVariance,
    /// Whether the convolution's output is kept or recomputed.
    pub recompute: Recompute,
    /// As [`ConvBnOptions::max_workspace`].
    pub max_workspace: Option<usize>,
}

impl ConvBnSettings {
    /// An affine Burn batch norm with tracked statistics, recomputed without a bound.
    pub fn new(activation: Activation) -> Self {
        Self {
            activation,
            norm_variant: NormVariant::BatchNorm,
            affine: true,
            track_running_stats: true,
            running_variance: RunningVariance::Biased,
            recompute: Recompute::Conv,
            max_workspace: None,
        }
    }
}

/// Configuration of [`ConvBn2d`], made by [`init`](Self::init).
///
/// Fields and defaults are those of [`Conv2dConfig`] and [`BatchNormConfig`], but for the bias,
/// which is off: the norm subtracts it again.
#[derive(Config, Debug)]
pub struct ConvBn2dConfig {
    /// Numbers of input and output channels.
    pub channels: [usize; 2],
    /// Height and width of the kernel.
    pub kernel_size: [usize; 2],
    /// Stride of the convolution. Default: 1.
    #[config(default = "[1, 1]")]
    pub stride: [usize; 2],
    /// Distance between two taps of the kernel. Default: 1.
    #[config(default = "[1, 1]")]
    pub dilation: [usize; 2],
    /// Number of groups that the channels are split into. Default: 1.
    #[config(default = "1")]
    pub groups: usize,
    /// Padding of the input, symmetric or not. Default: none.
    #[config(default = "PaddingConfig2d::Valid")]
    pub padding: PaddingConfig2d,
    /// Whether the convolution has a bias. Default: false.
    #[config(default = false)]
    pub bias: bool,
    /// Distribution of the initial weight and bias. Default: Kaiming uniform with `a = sqrt(5)`,
    /// that is uniform within `1 / sqrt(fan_in)`, as in Burn and PyTorch.
    #[config(default = "Initializer::KaimingUniform{gain:1.0/f64::sqrt(3.0),fan_out_only:false}")]
    pub initializer: Initializer,
    /// Added to the variance (or to the standard deviation, in the tutorial's variant).
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
    /// Whether running statistics are kept and used in evaluation. Without, evaluation and a
    /// frozen norm use the batch's. Default: true.
    #[config(default = true)]
    pub track_running_stats: bool,
    /// Which variance goes into the running variance. Default: biased, as in Burn.
    #[config(default = "RunningVariance::Biased")]
    pub running_variance: RunningVariance,
    /// Applied last. Default: identity.
    #[config(default = "Activation::Identity")]
    pub activation: Activation,
    /// Whether the convolution's output is kept or recomputed. Default: recomputed.
    #[config(default = "Recompute::Conv")]
    pub recompute: Recompute,
    /// Bound on the backward pass's workspace in bytes; see [`ConvBnOptions::max_workspace`].
    /// Default: none.
    #[config(default = "None")]
    pub max_workspace: Option<usize>,
}

impl ConvBn2dConfig {
    /// Initializes a layer. As everywhere in Burn, parameters are drawn on first use.
    ///
    /// # Panics
    ///
    /// Panics if the channels do not divide into the groups, there are no output channels, or
    /// epsilon or the momentum is out of range.
    pub fn init(&self, device: &Device) -> ConvBn2d {
        let conv = Conv2dConfig::new(self.channels, self.kernel_size)
            .with_stride(self.stride)
            .with_dilation(self.dilation)
            .with_groups(self.groups)
            .with_padding(self.padding.clone())
            .with_bias(self.bias)
            .with_initializer(self.initializer.clone())
            .init(device);
        let norm = BatchNormConfig::new(self.channels[1])
            .with_epsilon(self.epsilon)
            .with_momentum(self.momentum)
            .init(device);
        let settings = ConvBnSettings {
            activation: self.activation,
            norm_variant: self.norm_variant,
            affine: self.affine,
            track_running_stats: self.track_running_stats,
            running_variance: self.running_variance,
            recompute: self.recompute,
            max_workspace: self.max_workspace,
        };
        ConvBn2d::with_settings(conv, norm, settings)
    }
}

/// Convolution, batch norm and activation over `[batch, channels, height, width]`, fused: one
/// activation is kept for the backward pass.
///
/// It holds Burn's own modules, so that records, optimizers, freezing and renamed PyTorch weights
/// work as for the two layers that it replaces. Made by [`ConvBn2dConfig`], or
/// [`from_parts`](Self::from_parts).
///
/// # Statistics
///
/// On an autodiff device, unless the norm's `training` flag is off, the layer normalizes with the
/// batch's statistics and updates the running ones, once, in the forward pass. Otherwise
/// (evaluation, or a norm that was frozen) it normalizes with the running statistics and leaves
/// them alone.
#[derive(Module, Debug)]
#[module(custom_display)]
pub struct ConvBn2d {
    /// The convolution's parameters and geometry.
    pub conv: Conv2d,
    /// The norm's parameters and running statistics.
    pub norm: BatchNorm,
    /// Everything else.
    #[module(skip)]
    pub settings: ConvBnSettings,
}

impl ConvBn2d {
    /// Fuses a convolution and the norm after it.
    pub fn from_parts(conv: Conv2d, norm: BatchNorm, activation: Activation) -> Self {
        Self::with_settings(conv, norm, ConvBnSettings::new(activation))
    }

    /// Fuses a convolution and the norm after it, with every setting. A norm that is not affine
    /// loses the gradients of its gamma and beta, which it does not use.
    pub fn with_settings(conv: Conv2d, mut norm: BatchNorm, settings: ConvBnSettings) -> Self {
        if !settings.affine {
            norm.gamma = norm.gamma.set_require_grad(false);
            norm.beta = norm.beta.set_require_grad(false);
        }
        Self {
            conv,
            norm,
            settings,
        }
    }

    /// The convolution and the norm. What follows them is in [`settings`](Self::settings).
    pub fn into_parts(self) -> (Conv2d, BatchNorm) {
        (self.conv, self.norm)
    }

    /// `activation(norm(conv(input)))`.
    ///
    /// # Shapes
    ///
    /// - `input`: `[batch, channels_in, height, width]`
    /// - output: `[batch, channels_out, height_out, width_out]`
    ///
    /// # Panics
    ///
    /// Panics with a [`ConvBnError`](crate::ConvBnError) if shapes, dtypes or devices do not fit,
    /// or if there is a single value per channel to take statistics of.
    pub fn forward(&self, input: Tensor<4>) -> Tensor<4> {
        self.run(input, None)
    }

    /// `activation(norm(conv(input)) + residual)`.
    ///
    /// # Shapes
    ///
    /// - `input`: `[batch, channels_in, height, width]`
    /// - `residual`, output: `[batch, channels_out, height_out, width_out]`
    ///
    /// # Panics
    ///
    /// As [`forward`](Self::forward).
    pub fn forward_residual(&self, input: Tensor<4>, residual: Tensor<4>) -> Tensor<4> {
        self.run(input, Some(residual))
    }

    fn run(&self, input: Tensor<4>, residual: Option<Tensor<4>>) -> Tensor<4> {
        let training = input.device().is_autodiff() && self.norm.training.is_enabled();
        let statistics = match training || !self.settings.track_running_stats {
            true => StatisticsKind::Batch,
            false => StatisticsKind::Fixed,
        };
        let params = ConvBnParams {
            weight: self.conv.weight.val(),
            bias: self.conv.bias.as_ref().map(|bias| bias.val()),
            affine: self
                .settings
                .affine
                .then(|| (self.norm.gamma.val(), self.norm.beta.val())),
            residual,
            statistics: (statistics == StatisticsKind::Fixed).then(|| {
                let device = input.device();
                (
                    self.norm.running_mean.value_sync().to_device(&device),
                    self.norm.running_var.value_sync().to_device(&device),
                )
            }),
        };
        let options = self.options(input.dims());
        let result = conv_bn(input, params, options).unwrap_or_else(|error| panic!("{error}"));
        if training && self.settings.track_running_stats {
            self.update_running_statistics(&result);
        }
        result.output
    }

    /// The op's options for an input of that shape, on which `Same` padding depends.
    fn options(&self, [_, _, height, width]: [usize; 4]) -> ConvBnOptions {
        let conv = ConvSpec {
            stride: self.conv.stride.to_vec(),
            padding: padding_pairs(&self.conv, [height, width]),
            dilation: self.conv.dilation.to_vec(),
            groups: self.conv.groups,
        };
        ConvBnOptions {
            conv,
            norm: NormSpec::new(self.settings.norm_variant, self.norm.epsilon),
            activation: self.settings.activation,
            recompute: self.settings.recompute,
            max_workspace: self.settings.max_workspace,
        }
    }

    /// The one place where running statistics are written.
    fn update_running_statistics(&self, result: &Normalized<4>) {
        let values = values_per_channel(&result.output.shape()) as f64;
        let variance = match self.settings.running_variance {
            RunningVariance::Biased => result.variance.clone(),
            RunningVariance::Unbiased => result.variance.clone() * (values / (values - 1.0)),
        };
        for (running, new) in [
            (&self.norm.running_mean, result.mean.clone()),
            (&self.norm.running_var, variance),
        ] {
            let old = running.value_sync().to_device(&new.device());
            let new = new.cast(old.dtype()).detach();
            let momentum = self.norm.momentum;
            running.update((old * (1.0 - momentum) + new * momentum).detach());
        }
    }

    /// What a training step keeps for the backward pass of this layer, for an input of that shape
    /// that is itself tracked, by name and bytes.
    ///
    /// # Panics
    ///
    /// As [`forward`](Self::forward), for the shape.
    pub fn saved_for_backward(&self, input_shape: [usize; 4]) -> Vec<SavedTensor> {
        let options = self.options(input_shape);
        let weight = self.conv.weight.val();
        let statistics = match self.norm.training.is_enabled() || !self.settings.track_running_stats
        {
            true => StatisticsKind::Batch,
            false => StatisticsKind::Fixed,
        };
        let problem = ConvBnProblem::conv_bn(
            Shape::from(input_shape),
            weight.shape(),
            &options,
            statistics == StatisticsKind::Batch,
        )
        .unwrap_or_else(|error| panic!("{error}"));
        let affine = self.settings.affine;
        let bias = self.conv.bias.as_ref();
        let present = Parents {
            input: true,
            weight: true,
            bias: bias.is_some(),
            gamma: affine,
            beta: affine,
            residual: false,
        };
        let tracked = Parents {
            input: true,
            weight: weight.is_require_grad(),
            bias: bias.is_some_and(|bias| bias.val().is_require_grad()),
            gamma: affine && self.norm.gamma.val().is_require_grad(),
            beta: affine && self.norm.beta.val().is_require_grad(),
            residual: false,
        };
        let norm_dtype = match weight.dtype() {
            DType::F64 => DType::F64,
            _ => DType::F32,
        };
        SavePlan::new(&options, statistics, present, tracked).tensors(
            &problem,
            weight.dtype(),
            norm_dtype,
        )
    }
}

/// The convolution's padding as `(before, after)` pairs for an input of that height and width.
///
/// Burn computes `Same` in a private function of its own; this is the same rule: as much as keeps
/// `ceil(size / stride)` outputs, the odd one after.
fn padding_pairs(conv: &Conv2d, size: [usize; 2]) -> Vec<(usize, usize)> {
    match conv.padding {
        PaddingConfig2d::Valid => vec![(0, 0); 2],
        PaddingConfig2d::Explicit(top, left, bottom, right) => {
            vec![(top, bottom), (left, right)]
        }
        PaddingConfig2d::Same => (0..2)
            .map(|dim| {
                let outputs = size[dim].div_ceil(conv.stride[dim]);
                let covered = outputs.saturating_sub(1) * conv.stride[dim] + conv.kernel_size[dim];
                let total = covered.saturating_sub(size[dim]);
                (total / 2, total - total / 2)
            })
            .collect(),
    }
}

impl ModuleDisplay for ConvBn2d {
    fn custom_settings(&self) -> Option<DisplaySettings> {
        DisplaySettings::new()
            .with_new_line_after_attribute(true)
            .optional()
    }

    fn custom_content(&self, content: Content) -> Option<Content> {
        let settings = &self.settings;
        let mut content = content
            .add("conv", &self.conv)
            .add("norm", &self.norm)
            .add_debug_attribute("activation", &settings.activation)
            .add_debug_attribute("recompute", &settings.recompute);
        if settings.norm_variant != NormVariant::BatchNorm {
            content = content.add_debug_attribute("norm_variant", &settings.norm_variant);
        }
        if !settings.affine {
            content = content.add("affine", &settings.affine);
        }
        if !settings.track_running_stats {
            content = content.add("track_running_stats", &settings.track_running_stats);
        }
        if let Some(bytes) = settings.max_workspace {
            content = content.add("max_workspace", &bytes);
        }
        content.optional()
    }
}
