//! The layers, for one, two and three spatial dimensions, and the max pool for two.

mod block;
mod borrowed;
mod convolution;
mod display;
mod error;
mod fold;
#[cfg(feature = "cubecl")]
mod layout;
mod max_pool;
mod module;
mod norm;
mod settings;

use burn::config::Config;
use burn::module::{Content, DisplaySettings, Module, ModuleDisplay};
use burn::nn::conv::{Conv1d, Conv1dConfig, Conv2d, Conv2dConfig, Conv3d, Conv3dConfig};
use burn::nn::{
    BatchNorm, BatchNormConfig, Initializer, PaddingConfig1d, PaddingConfig2d, PaddingConfig3d,
};
use burn::tensor::{Device, Tensor};

use crate::spec::{
    Activation, NormVariant, Recompute, SavedTensor, check_epsilon, check_geometry, check_momentum,
};
use convolution::Sizes;
use error::or_panic;

pub use borrowed::{ConvBnRef, fuse};
pub use convolution::Convolution;
pub use error::FoldError;
pub use max_pool::{MaxPool2d, MaxPool2dConfig};
pub use module::ConvBnModule;
pub use norm::{BatchNormActivation, BatchNormActivationConfig};
pub use settings::{ConvBnSettings, RunningVariance};

/// A layer and its configuration over one of Burn's convolutions.
macro_rules! conv_bn_layer {
    (
        $(#[$layer_doc:meta])*
        $layer:ident,
        $(#[$config_doc:meta])*
        $config:ident: $rank:literal,
        $conv:ident, $conv_config:ident,
        $input:literal, $output:literal,
        {
            $($(#[$doc:meta])* $required:ident: $required_type:ty,)*
        }
        channels: |$this:ident| $channels:expr,
        sizes: $sizes:ty = $one:tt,
        padding: $padding:ty = $valid:tt,
    ) => {
        #[doc = concat!("Configuration of [`", stringify!($layer), "`], made by [`init`](Self::init).")]
        ///
        #[doc = concat!(
            "Fields and defaults are those of [`", stringify!($conv_config),
            "`] and [`BatchNormConfig`],"
        )]
        /// but for the bias, which is off: the norm subtracts it again.
        ///
        $(#[$config_doc])*
        #[derive(Config, Debug)]
        #[non_exhaustive]
        pub struct $config {
            $($(#[$doc])* pub $required: $required_type,)*
            /// Stride of the convolution. Default: 1.
            #[config(default = $one)]
            pub stride: $sizes,
            /// Distance between two taps of the kernel. Default: 1.
            #[config(default = $one)]
            pub dilation: $sizes,
            /// Number of groups that the channels are split into. Default: 1.
            #[config(default = "1")]
            pub groups: usize,
            /// Padding of the input. Default: none.
            #[config(default = $valid)]
            pub padding: $padding,
            /// Whether the convolution has a bias. Default: false.
            #[config(default = false)]
            pub bias: bool,
            /// Distribution of the initial weight and bias. Default: Kaiming uniform with
            /// `a = sqrt(5)`, that is uniform within `1 / sqrt(fan_in)`, as in Burn and PyTorch.
            #[config(
                default = "Initializer::KaimingUniform{gain:1.0/f64::sqrt(3.0),fan_out_only:false}"
            )]
            pub initializer: Initializer,
            /// Added to the variance (or to the standard deviation, in the tutorial's variant).
            /// Finite and positive. Default: 1e-5. Running statistics alone also go with 0, which a loaded
            /// norm or one changed later may have: `forward` in evaluation and `fold` take it, training
            /// refuses it.
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
            /// Whether running statistics are kept and used in evaluation. Without, evaluation
            /// and a frozen norm use the batch's. Default: true.
            #[config(default = true)]
            pub track_running_stats: bool,
            /// Which variance goes into the running variance. Default: biased, as in Burn.
            #[config(default = "RunningVariance::Biased")]
            pub running_variance: RunningVariance,
            /// Applied last. Default: identity.
            #[config(default = "Activation::Identity")]
            pub activation: Activation,
            /// What is kept of the block's inside, and recomputed. Default: recomputed convolution.
            #[config(default = "Recompute::Conv")]
            pub recompute: Recompute,
            /// Bound on the backward pass's workspace in bytes; see
            /// [`ConvBnOptions::max_workspace`](crate::ConvBnOptions::max_workspace). Default: none.
            #[config(default = "None")]
            pub max_workspace: Option<usize>,
        }

        impl $config {
            /// Initializes a layer. As everywhere in Burn, parameters are drawn on first use.
            ///
            /// # Panics
            ///
            /// Panics with a [`ConvBnError`](crate::ConvBnError) if a number of channels or
            /// groups, a size, a stride or a dilation is zero, the channels do not divide into
            /// the groups, or epsilon or the momentum is out of range.
            #[track_caller]
            pub fn init(&self, device: &Device) -> $layer {
                let $this = self;
                let [channels_in, channels_out] = $channels;
                or_panic(check_geometry(
                    [channels_in, channels_out],
                    self.kernel_size.sizes(),
                    self.stride.sizes(),
                    self.dilation.sizes(),
                    self.groups,
                ));
                or_panic(check_epsilon(self.epsilon, true));
                or_panic(check_momentum(self.momentum));
                let mut conv = $conv_config::new($(self.$required),*)
                    .with_stride(self.stride)
                    .with_dilation(self.dilation)
                    .with_groups(self.groups)
                    .with_bias(self.bias)
                    .with_initializer(self.initializer.clone())
                    .init(device);
                // Burn's 3-D configuration panics at even kernels under `Same`, which the op pads.
                conv.padding = self.padding.clone();
                #[cfg(feature = "cubecl")]
                {
                    conv.weight = layout::in_convolution_order(conv.weight);
                }
                let norm = BatchNormConfig::new(channels_out)
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
                $layer::with_settings(conv, norm, settings)
            }
        }

        #[doc = concat!("Convolution, batch norm and activation over `", $input, "`, fused: one")]
        /// activation is kept for the backward pass.
        ///
        /// It holds Burn's own modules, so that records, optimizers, freezing and renamed PyTorch
        /// weights work as for the two layers that it replaces. Made by
        #[doc = concat!("[`", stringify!($config), "`], or [`from_parts`](Self::from_parts).")]
        /// [`fuse`] is the same over modules that stay where they are.
        ///
        /// # Statistics
        ///
        /// On an autodiff device, unless the norm's `training` flag is off, the layer normalizes
        /// with the batch's statistics and updates the running ones, once, in the forward pass.
        /// Otherwise (evaluation, or a norm that was frozen) it normalizes with the running
        /// statistics and leaves them alone.
        ///
        /// # Frozen norm
        ///
        /// A norm that was frozen is folded into the weight for the step. Nothing is recomputed,
        /// unless the activation's slope needs the value itself, as that of `Silu` does. The input
        /// is kept for the gradients of the weight and of gamma; where the weight is frozen too, as
        /// by `freeze` on the layer, it is not kept.
        ///
        /// Gamma can still be trained, if it is the norm's `training` flag alone that is off. Its
        /// gradient then comes from the weight's, as a difference of terms that are about
        /// `ratio = |running_mean - bias| * s` times as large, `s` being the inverse standard
        /// deviation. On Flex the tests hold its error in f32 to
        /// `64 * 2^-24 * (1 + ratio) * sqrt(sum g^2)`, where `g` is the gradient of the norm's
        /// output and the sum runs over the channel.
        ///
        $(#[$layer_doc])*
        #[derive(Module, Debug)]
        #[module(custom_display)]
        pub struct $layer {
            /// The convolution's parameters and geometry.
            pub conv: $conv,
            /// The norm's parameters and running statistics.
            pub norm: BatchNorm,
            /// Everything else.
            pub settings: ConvBnSettings,
        }

        impl $layer {
            /// Fuses a convolution and the norm after it.
            pub fn from_parts(conv: $conv, norm: BatchNorm, activation: Activation) -> Self {
                Self::with_settings(conv, norm, ConvBnSettings::new(activation))
            }

            /// Fuses a convolution and the norm after it, with every setting.
            pub fn with_settings(
                conv: $conv,
                norm: BatchNorm,
                settings: ConvBnSettings,
            ) -> Self {
                Self {
                    conv,
                    norm,
                    settings,
                }
            }

            /// The convolution and the norm. What follows them is in
            /// [`settings`](Self::settings).
            pub fn into_parts(self) -> ($conv, BatchNorm) {
                (self.conv, self.norm)
            }

            /// `activation(norm(conv(input)))`.
            ///
            /// # Shapes
            ///
            #[doc = concat!("- `input`: `", $input, "`")]
            #[doc = concat!("- output: `", $output, "`")]
            ///
            /// # Panics
            ///
            /// Panics with a [`ConvBnError`](crate::ConvBnError) if shapes, dtypes or devices do
            /// not fit, or if there is one value per channel or none, as in an empty batch, to take
            /// statistics of. With running statistics an empty batch gives an empty output.
            #[track_caller]
            pub fn forward(&self, input: Tensor<$rank>) -> Tensor<$rank> {
                self.borrowed().forward(input)
            }

            /// `activation(norm(conv(input)) + residual)`.
            ///
            /// # Shapes
            ///
            #[doc = concat!("- `input`: `", $input, "`")]
            #[doc = concat!("- `residual`, output: `", $output, "`")]
            ///
            /// # Panics
            ///
            /// As [`forward`](Self::forward).
            #[track_caller]
            pub fn forward_residual(
                &self,
                input: Tensor<$rank>,
                residual: Tensor<$rank>,
            ) -> Tensor<$rank> {
                self.borrowed().forward_residual(input, residual)
            }

            /// What a training step keeps for the backward pass of this layer's
            /// [`forward`](Self::forward), for an input of that shape that is itself tracked, by
            /// name and bytes.
            ///
            /// # Panics
            ///
            /// As [`forward`](Self::forward), for the shape.
            #[track_caller]
            pub fn saved_for_backward(&self, input_shape: [usize; $rank]) -> Vec<SavedTensor> {
                self.borrowed().saved_for_backward(input_shape)
            }

            /// As [`saved_for_backward`](Self::saved_for_backward), for
            /// [`forward_residual`](Self::forward_residual) with a residual that is tracked too.
            ///
            /// # Panics
            ///
            /// As [`forward`](Self::forward), for the shape.
            #[track_caller]
            pub fn saved_for_backward_residual(
                &self,
                input_shape: [usize; $rank],
            ) -> Vec<SavedTensor> {
                self.borrowed().saved_for_backward_residual(input_shape)
            }

            /// Shape of the output for an input of that shape.
            ///
            /// # Panics
            ///
            /// As [`forward`](Self::forward), for the shape.
            ///
            /// # Examples
            ///
            /// ```
            /// # #[cfg(feature = "flex")] {
            /// use burn::tensor::Device;
            /// use burn_conv_bn::ConvBn2dConfig;
            ///
            /// let block = ConvBn2dConfig::new([3, 8], [3, 3])
            ///     .with_stride([2, 2])
            ///     .init(&Device::flex());
            /// assert_eq!(block.output_shape([2, 3, 16, 16]), [2, 8, 7, 7]);
            /// # }
            /// ```
            #[track_caller]
            pub fn output_shape(&self, input_shape: [usize; $rank]) -> [usize; $rank] {
                self.borrowed().output_shape(input_shape)
            }

            /// For inference: one convolution, with a bias, that computes `norm(conv(input))` of
            /// the evaluation mode. The activation is not part of it.
            ///
            /// # Errors
            ///
            /// As [`ConvBnRef::fold`].
            pub fn fold(&self) -> Result<$conv, FoldError> {
                self.borrowed().fold()
            }

            fn borrowed(&self) -> ConvBnRef<'_, $conv, $rank> {
                fuse(&self.conv, &self.norm).with_settings(self.settings.clone())
            }
        }

        impl ModuleDisplay for $layer {
            fn custom_settings(&self) -> Option<DisplaySettings> {
                DisplaySettings::new()
                    .with_new_line_after_attribute(false)
                    .optional()
            }

            fn custom_content(&self, content: Content) -> Option<Content> {
                self.borrowed().describe(content).optional()
            }
        }
    };
}

conv_bn_layer! {
    /// # Examples
    ///
    /// ```
    /// # #[cfg(feature = "flex")] {
    /// use burn::tensor::{Device, Distribution, Tensor};
    /// use burn_conv_bn::{Activation, ConvBn1dConfig};
    ///
    /// let device = Device::flex().autodiff();
    /// let block = ConvBn1dConfig::new(2, 8, 5)
    ///     .with_activation(Activation::Gelu)
    ///     .init(&device);
    /// let x = Tensor::<3>::random([4, 2, 64], Distribution::Default, &device);
    /// assert_eq!(block.forward(x).dims(), [4, 8, 60]);
    /// # }
    /// ```
    ConvBn1d,
    /// # Examples
    ///
    /// ```
    /// use burn::nn::PaddingConfig1d;
    /// use burn_conv_bn::ConvBn1dConfig;
    ///
    /// let config = ConvBn1dConfig::new(2, 8, 5)
    ///     .with_stride(2)
    ///     .with_padding(PaddingConfig1d::Explicit(4, 0));
    /// assert_eq!(config.stride, 2);
    /// ```
    ConvBn1dConfig: 3,
    Conv1d, Conv1dConfig,
    "[batch, channels_in, length]", "[batch, channels_out, length_out]",
    {
        /// Number of input channels.
        channels_in: usize,
        /// Number of output channels.
        channels_out: usize,
        /// Length of the kernel.
        kernel_size: usize,
    }
    channels: |config| [config.channels_in, config.channels_out],
    sizes: usize = "1",
    padding: PaddingConfig1d = "PaddingConfig1d::Valid",
}

conv_bn_layer! {
    /// # Examples
    ///
    /// In training, with a shortcut:
    ///
    /// ```
    /// # #[cfg(feature = "flex")] {
    /// use burn::nn::PaddingConfig2d;
    /// use burn::tensor::{Device, Distribution, Tensor};
    /// use burn_conv_bn::{Activation, ConvBn2dConfig};
    ///
    /// let device = Device::flex().autodiff();
    /// let block = ConvBn2dConfig::new([8, 8], [3, 3])
    ///     .with_padding(PaddingConfig2d::Same)
    ///     .with_activation(Activation::Relu)
    ///     .init(&device);
    /// let x = Tensor::<4>::random([2, 8, 16, 16], Distribution::Default, &device);
    /// // relu(norm(conv(x)) + x)
    /// let y = block.forward_residual(x.clone(), x);
    /// let grads = y.sum().backward();
    /// assert!(block.conv.weight.val().grad(&grads).is_some());
    ///
    /// // One activation is kept, the input; and with the shortcut a handle on the output.
    /// let kept = block.saved_for_backward_residual([2, 8, 16, 16]);
    /// let activations = kept.iter().filter(|tensor| tensor.shape.num_dims() == 4);
    /// let names: Vec<_> = activations.map(|tensor| tensor.name).collect();
    /// assert_eq!(names, ["input", "output", "weight"]);
    /// # }
    /// ```
    ///
    /// From layers that there are already, and back:
    ///
    /// ```
    /// # #[cfg(feature = "flex")] {
    /// use burn::nn::BatchNormConfig;
    /// use burn::nn::conv::Conv2dConfig;
    /// use burn::tensor::Device;
    /// use burn_conv_bn::{Activation, ConvBn2d};
    ///
    /// let device = Device::flex();
    /// let conv = Conv2dConfig::new([3, 8], [3, 3]).init(&device);
    /// let norm = BatchNormConfig::new(8).init(&device);
    /// let block = ConvBn2d::from_parts(conv, norm, Activation::Relu);
    /// let (conv, norm) = block.into_parts();
    /// assert_eq!(conv.weight.dims()[0], norm.gamma.dims()[0]);
    /// # }
    /// ```
    ///
    /// For inference, as one convolution:
    ///
    /// ```
    /// # #[cfg(feature = "flex")] {
    /// use burn::module::Module;
    /// use burn::tensor::{Device, Distribution, Tensor};
    /// use burn_conv_bn::{Activation, ConvBn2dConfig};
    ///
    /// let block = ConvBn2dConfig::new([3, 8], [3, 3])
    ///     .with_activation(Activation::Relu)
    ///     .init(&Device::flex().autodiff())
    ///     .valid();
    /// let conv = block.fold()?;
    ///
    /// let x = Tensor::<4>::random([2, 3, 16, 16], Distribution::Default, &Device::flex());
    /// let folded = block.settings.activation.forward(conv.forward(x.clone()));
    /// let difference = (folded - block.forward(x)).abs().max().into_scalar::<f32>();
    /// assert!(difference < 1e-5, "{difference}");
    /// # }
    /// # Ok::<(), burn_conv_bn::FoldError>(())
    /// ```
    ConvBn2d,
    /// # Examples
    ///
    /// ```
    /// use burn::config::Config;
    /// use burn::nn::PaddingConfig2d;
    /// use burn_conv_bn::{Activation, ConvBn2dConfig};
    ///
    /// let config = ConvBn2dConfig::new([64, 128], [3, 3])
    ///     .with_stride([2, 2])
    ///     .with_padding(PaddingConfig2d::Same)
    ///     .with_activation(Activation::LeakyRelu {
    ///         negative_slope: 0.1,
    ///     });
    /// let copy = ConvBn2dConfig::load_binary(config.to_string().as_bytes()).unwrap();
    /// assert_eq!(copy.activation, config.activation);
    /// ```
    ConvBn2dConfig: 4,
    Conv2d, Conv2dConfig,
    "[batch, channels_in, height, width]", "[batch, channels_out, height_out, width_out]",
    {
        /// Numbers of input and output channels.
        channels: [usize; 2],
        /// Height and width of the kernel.
        kernel_size: [usize; 2],
    }
    channels: |config| config.channels,
    sizes: [usize; 2] = "[1, 1]",
    padding: PaddingConfig2d = "PaddingConfig2d::Valid",
}

conv_bn_layer! {
    /// # Examples
    ///
    /// ```
    /// # #[cfg(feature = "flex")] {
    /// use burn::tensor::{Device, Distribution, Tensor};
    /// use burn_conv_bn::{Activation, ConvBn3dConfig};
    ///
    /// let device = Device::flex().autodiff();
    /// let block = ConvBn3dConfig::new([2, 4], [3, 3, 3])
    ///     .with_activation(Activation::Relu)
    ///     .init(&device);
    /// let x = Tensor::<5>::random([2, 2, 6, 8, 8], Distribution::Default, &device);
    /// assert_eq!(block.forward(x).dims(), [2, 4, 4, 6, 6]);
    /// # }
    /// ```
    ConvBn3d,
    /// # Examples
    ///
    /// ```
    /// use burn::nn::PaddingConfig3d;
    /// use burn_conv_bn::ConvBn3dConfig;
    ///
    /// let config = ConvBn3dConfig::new([2, 4], [3, 3, 3])
    ///     .with_groups(2)
    ///     .with_padding(PaddingConfig3d::Same);
    /// assert_eq!(config.groups, 2);
    /// ```
    ConvBn3dConfig: 5,
    Conv3d, Conv3dConfig,
    "[batch, channels_in, depth, height, width]",
    "[batch, channels_out, depth_out, height_out, width_out]",
    {
        /// Numbers of input and output channels.
        channels: [usize; 2],
        /// Depth, height and width of the kernel.
        kernel_size: [usize; 3],
    }
    channels: |config| config.channels,
    sizes: [usize; 3] = "[1, 1, 1]",
    padding: PaddingConfig3d = "PaddingConfig3d::Valid",
}

impl ConvBn2d {
    /// `max_pool(activation(norm(conv(input))))`, to the pool's `[batch, channels_out, height_out, width_out]`:
    /// [`forward`](Self::forward) and [`MaxPool2d::forward`], as one op where
    /// [`conv_bn_max_pool2d`](crate::functional::conv_bn_max_pool2d) is one.
    ///
    /// # Panics
    ///
    /// As [`forward`](Self::forward), and as [`MaxPool2d::forward`].
    ///
    /// # Examples
    ///
    /// ```
    /// # #[cfg(feature = "flex")] {
    /// use burn::tensor::{Device, Distribution, Tensor};
    /// use burn_conv_bn::{Activation, ConvBn2dConfig, MaxPool2dConfig};
    ///
    /// let device = Device::flex().autodiff();
    /// let block = ConvBn2dConfig::new([3, 8], [3, 3])
    ///     .with_activation(Activation::Relu)
    ///     .init(&device);
    /// let pool = MaxPool2dConfig::new([2, 2]).init();
    /// let x = Tensor::<4>::random([2, 3, 16, 16], Distribution::Default, &device);
    /// let y = block.forward_max_pool(x, &pool);
    /// assert_eq!(y.dims(), [2, 8, 7, 7]);
    ///
    /// // Beside the input: a byte for each output, and a handle on the output.
    /// let kept = block.saved_for_backward_max_pool([2, 3, 16, 16], &pool);
    /// let activations = kept.iter().filter(|tensor| tensor.shape[0] == 2);
    /// let names: Vec<_> = activations.map(|tensor| tensor.name).collect();
    /// assert_eq!(names, ["input", "pooled", "argmax"]);
    /// # }
    /// ```
    #[track_caller]
    pub fn forward_max_pool(&self, input: Tensor<4>, pool: impl Into<MaxPool2d>) -> Tensor<4> {
        self.borrowed().forward_max_pool(input, pool)
    }

    /// As [`ConvBnRef::saved_for_backward_max_pool`].
    ///
    /// # Panics
    ///
    /// As [`forward_max_pool`](Self::forward_max_pool), for the shape.
    #[track_caller]
    pub fn saved_for_backward_max_pool(
        &self,
        input_shape: [usize; 4],
        pool: impl Into<MaxPool2d>,
    ) -> Vec<SavedTensor> {
        self.borrowed()
            .saved_for_backward_max_pool(input_shape, pool)
    }
}
