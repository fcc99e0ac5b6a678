//! The layer over borrowed modules.

use burn::nn::BatchNorm;
use burn::nn::conv::Conv2d;
use burn::tensor::{Shape, Tensor};

use super::convolution::Convolution;
use super::{ConvBnSettings, MaxPool2d, RunningVariance};
use crate::functional::{conv_bn_max_pool2d_running, conv_bn_running};
use crate::spec::{Activation, NormVariant, Recompute, StatisticsKind};

/// Fuses a convolution and the norm after it where they are: in a struct of the user's, whose fields,
/// records, optimizer state and names in PyTorch's files stay as they are.
///
/// Without a setting it is `norm(conv(input))`, with Burn's running statistics.
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::module::Module;
/// use burn::nn::BatchNorm;
/// use burn::nn::conv::Conv2d;
/// use burn::tensor::Tensor;
/// use burn_conv_bn::{Activation, fuse};
///
/// #[derive(Module, Debug)]
/// struct Stem {
///     conv1: Conv2d,
///     bn1: BatchNorm,
/// }
///
/// impl Stem {
///     fn forward(&self, x: Tensor<4>) -> Tensor<4> {
///         // was relu(self.bn1.forward(self.conv1.forward(x)))
///         fuse(&self.conv1, &self.bn1).with_activation(Activation::Relu).forward(x)
///     }
/// }
/// #
/// # let device = burn::tensor::Device::flex().autodiff();
/// # let stem = Stem {
/// #     conv1: burn::nn::conv::Conv2dConfig::new([3, 8], [3, 3]).init(&device),
/// #     bn1: burn::nn::BatchNormConfig::new(8).init(&device),
/// # };
/// # assert_eq!(stem.forward(Tensor::ones([2, 3, 8, 8], &device)).dims(), [2, 8, 6, 6]);
/// # }
/// ```
pub fn fuse<'a, C, const D: usize>(conv: &'a C, norm: &'a BatchNorm) -> ConvBnRef<'a, C, D>
where
    C: Convolution<D>,
{
    ConvBnRef {
        conv,
        norm,
        settings: ConvBnSettings::new(Activation::Identity),
    }
}

/// Convolution, batch norm and activation over borrowed modules, made by [`fuse`].
///
/// What [`ConvBn1d`](crate::ConvBn1d), [`ConvBn2d`](crate::ConvBn2d) and [`ConvBn3d`](crate::ConvBn3d)
/// are over their own modules: they run this one, and their pages say how statistics and a frozen norm
/// are treated. `D` is the rank of the tensors, and follows from the convolution.
///
/// [`ConvBnModule`](crate::ConvBnModule) does not reach it: settings are given where it is made.
#[derive(Clone, Debug)]
#[must_use = "it computes nothing until `forward`"]
pub struct ConvBnRef<'a, C, const D: usize> {
    pub(super) conv: &'a C,
    pub(super) norm: &'a BatchNorm,
    /// Everything else.
    pub settings: ConvBnSettings,
}

impl<C, const D: usize> ConvBnRef<'_, C, D> {
    /// Replaces every setting.
    pub fn with_settings(mut self, settings: ConvBnSettings) -> Self {
        self.settings = settings;
        self
    }

    /// Sets what is applied last. Default: identity.
    pub fn with_activation(mut self, activation: Activation) -> Self {
        self.settings.activation = activation;
        self
    }

    /// Sets whether the convolution's output is kept or recomputed. Default: recomputed.
    pub fn with_recompute(mut self, recompute: Recompute) -> Self {
        self.settings.recompute = recompute;
        self
    }

    /// Bounds the backward pass's workspace in bytes; see
    /// [`ConvBnOptions::max_workspace`](crate::ConvBnOptions::max_workspace). Default: none.
    pub fn with_max_workspace(mut self, max_workspace: Option<usize>) -> Self {
        self.settings.max_workspace = max_workspace;
        self
    }

    /// Sets how the norm is formed. Default: as Burn does.
    pub fn with_norm_variant(mut self, norm_variant: NormVariant) -> Self {
        self.settings.norm_variant = norm_variant;
        self
    }

    /// Sets whether gamma and beta take part. Default: true.
    pub fn with_affine(mut self, affine: bool) -> Self {
        self.settings.affine = affine;
        self
    }

    /// Sets whether running statistics are kept and used in evaluation. Default: true.
    pub fn with_track_running_stats(mut self, track_running_stats: bool) -> Self {
        self.settings.track_running_stats = track_running_stats;
        self
    }

    /// Sets which variance goes into the running variance. Default: biased, as in Burn.
    pub fn with_running_variance(mut self, running_variance: RunningVariance) -> Self {
        self.settings.running_variance = running_variance;
        self
    }
}

impl<C: Convolution<D>, const D: usize> ConvBnRef<'_, C, D> {
    /// `activation(norm(conv(input)))`, `[batch, channels_in, sizes..]` to
    /// `[batch, channels_out, sizes_out..]`.
    ///
    /// # Panics
    ///
    /// Panics with a [`ConvBnError`](crate::ConvBnError) if shapes, dtypes or devices do not fit, or if
    /// there is one value per channel or none, as in an empty batch, to take statistics of. With running
    /// statistics an empty batch gives an empty output.
    #[track_caller]
    pub fn forward(&self, input: Tensor<D>) -> Tensor<D> {
        self.run(input, None, conv_bn_running)
    }

    /// `activation(norm(conv(input)) + residual)`, with a residual of the output's shape.
    ///
    /// # Panics
    ///
    /// As [`forward`](Self::forward).
    #[track_caller]
    pub fn forward_residual(&self, input: Tensor<D>, residual: Tensor<D>) -> Tensor<D> {
        self.run(input, Some(residual), conv_bn_running)
    }

    /// Shape of the output for an input of that shape.
    ///
    /// # Panics
    ///
    /// As [`forward`](Self::forward), for the shape.
    #[track_caller]
    pub fn output_shape(&self, input_shape: [usize; D]) -> [usize; D] {
        // What batch statistics ask of the shape does not change the output's.
        let problem = self.problem(Shape::from(input_shape), StatisticsKind::Fixed);
        problem.output.dims()
    }
}

impl ConvBnRef<'_, Conv2d, 4> {
    /// `max_pool(activation(norm(conv(input))))`: [`forward`](Self::forward) and [`MaxPool2d::forward`], as
    /// one op where [`conv_bn_max_pool2d`](crate::functional::conv_bn_max_pool2d) is one. `pool` is a reference to a
    /// [`MaxPool2d`] of this crate or of Burn.
    ///
    /// # Panics
    ///
    /// As [`forward`](Self::forward), and as [`MaxPool2d::forward`].
    #[track_caller]
    pub fn forward_max_pool(&self, input: Tensor<4>, pool: impl Into<MaxPool2d>) -> Tensor<4> {
        // What the statistics ask of the shape, the op checks.
        let output = self.problem(input.shape(), StatisticsKind::Fixed).output;
        let pool = pool.into().options(&output);
        self.run(input, None, |input, params, options, running| {
            conv_bn_max_pool2d_running(input, params, options, pool, running)
        })
    }
}
