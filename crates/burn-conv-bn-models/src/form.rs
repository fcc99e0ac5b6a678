use burn::config::Config;
use burn::module::Param;
use burn::nn::{BatchNorm, pool};
use burn::tensor::activation::{
    elu, gelu, gelu_approximate, hard_sigmoid, hard_swish, leaky_relu, mish, relu, relu6, sigmoid,
    silu, softplus, tanh,
};
use burn::tensor::module::batch_norm_train;
use burn::tensor::{BoolStore, DType, Shape, Tensor};
use burn_conv_bn::functional::{BatchNormParams, batch_norm};
use burn_conv_bn::{
    Activation, ConvBn2d, ConvBnSettings, MaxPool2d, NormSpec, NormVariant, Recompute, SavedTensor,
};

/// How a network runs its blocks and the max pools behind some of them.
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::module::Module;
/// use burn::tensor::{Device, Distribution, Tensor};
/// use burn_conv_bn::ConvBn2dConfig;
/// use burn_conv_bn_models::{Form, NetConfig};
///
/// let device = Device::flex();
/// let fused = NetConfig::new(Form::Fused).with_hidden(16).init(&device).valid();
/// let unfused = fused.clone().with_form(Form::Unfused);
///
/// let images = Tensor::<4>::random([4, 1, 28, 28], Distribution::Default, &device);
/// let difference = fused.forward(images.clone()) - unfused.forward(images);
/// assert!(difference.abs().max().into_scalar::<f32>() < 1e-3);
///
/// // A block alone, and what it keeps for the backward pass.
/// let block = ConvBn2dConfig::new([1, 8], [3, 3]).init(&device.autodiff());
/// let images = Tensor::<4>::ones([4, 1, 28, 28], &block.conv.weight.device());
/// let [fused, unfused] = [Form::Fused, Form::Unfused].map(|form| {
///     assert_eq!(form.forward(&block, images.clone()).dims(), [4, 8, 26, 26]);
///     let saved = form.saved_for_backward(&block, images.dims());
///     saved.iter().map(|tensor| tensor.bytes()).sum::<usize>()
/// });
/// assert!(5 * fused < unfused);
/// # }
/// ```
#[derive(Config, Debug, Copy, PartialEq, Eq, Hash)]
pub enum Form {
    /// As one fused op each, together with a max pool behind it
    /// ([`conv_bn_max_pool2d`](burn_conv_bn::functional::conv_bn_max_pool2d)).
    Fused,
    /// As a convolution, a batch norm and an activation of Burn's own, with Burn's max pool: what the
    /// fused op is compared with. The tutorial's variant of the norm, which Burn does not have, is
    /// [`batch_norm`](burn_conv_bn::functional::batch_norm) on its own.
    ///
    /// In mixed precision, with weights in f16 or bf16 and the norm's parameters in f32, the norm's
    /// input is cast to f32 and its output back: Burn's norm takes tensors of one type.
    Unfused,
}

impl Form {
    /// Runs a block over `[batch, channels, height, width]` in this form.
    ///
    /// # Panics
    ///
    /// As [`ConvBn2d::forward`].
    pub fn forward(self, block: &ConvBn2d, input: Tensor<4>) -> Tensor<4> {
        match self {
            Self::Fused => block.forward(input),
            Self::Unfused => {
                let normalized =
                    unfused_norm(&block.norm, &block.settings, block.conv.forward(input));
                unfused_activation(block.settings.activation, normalized)
            }
        }
    }

    /// Runs a block that adds a residual, of its output's shape, before the activation.
    ///
    /// # Panics
    ///
    /// As [`ConvBn2d::forward_residual`].
    pub fn forward_residual(
        self,
        block: &ConvBn2d,
        input: Tensor<4>,
        residual: Tensor<4>,
    ) -> Tensor<4> {
        match self {
            Self::Fused => block.forward_residual(input, residual),
            Self::Unfused => {
                let sum = unfused_norm(&block.norm, &block.settings, block.conv.forward(input))
                    + residual;
                unfused_activation(block.settings.activation, sum)
            }
        }
    }

    /// Runs a block with a max pool behind it in this form.
    ///
    /// # Panics
    ///
    /// As [`ConvBn2d::forward_max_pool`].
    pub fn forward_max_pool(
        self,
        block: &ConvBn2d,
        input: Tensor<4>,
        pool: &MaxPool2d,
    ) -> Tensor<4> {
        match self {
            Self::Fused => block.forward_max_pool(input, pool),
            Self::Unfused => burn_pool(pool).forward(self.forward(block, input)),
        }
    }

    /// What a block keeps for the backward pass in this form, for a tracked input of that shape.
    ///
    /// The unfused form's list is Burn 0.22.1's. The convolution keeps its input and weight, batch norm its
    /// input, gamma and statistics. An activation keeps its input or its masks; Burn composes some, as SiLU
    /// and Mish, of several functions, which keep one input each. In mixed precision the norm's input is an
    /// f32 cast of the convolution's output. A frozen norm is several ops: they keep per-channel values, and
    /// the normalized values where gamma is tracked.
    ///
    /// # Panics
    ///
    /// As [`forward`](Self::forward), for the shape.
    pub fn saved_for_backward(self, block: &ConvBn2d, input_shape: [usize; 4]) -> Vec<SavedTensor> {
        match self {
            Self::Fused => block.saved_for_backward(input_shape),
            Self::Unfused => unfused_saved(block, input_shape, "norm_output"),
        }
    }

    /// Whether a block's output is rebuilt in the backward pass, and kept by no consumer; see
    /// [`Recompute::Norm`]. The output of a block with a residual, or with a max pool behind it, is not.
    pub(crate) fn rebuilds_output(self, block: &ConvBn2d) -> bool {
        let settings = &block.settings;
        let is_frozen = settings.track_running_stats && !block.norm.training.is_enabled();
        self == Self::Fused && settings.recompute == Recompute::Norm && !is_frozen
    }

    /// As [`saved_for_backward`](Self::saved_for_backward), for a block that adds a tracked
    /// residual. Unfused, the activation's input is then the sum.
    pub fn saved_for_backward_residual(
        self,
        block: &ConvBn2d,
        input_shape: [usize; 4],
    ) -> Vec<SavedTensor> {
        match self {
            Self::Fused => block.saved_for_backward_residual(input_shape),
            Self::Unfused => unfused_saved(block, input_shape, "sum"),
        }
    }

    /// As [`saved_for_backward`](Self::saved_for_backward), for a block with a max pool behind it; see
    /// [`ConvBn2d::saved_for_backward_max_pool`]. Unfused, the pool keeps the block's output and an index
    /// for each of its own.
    pub fn saved_for_backward_max_pool(
        self,
        block: &ConvBn2d,
        input_shape: [usize; 4],
        pool: &MaxPool2d,
    ) -> Vec<SavedTensor> {
        match self {
            Self::Fused => block.saved_for_backward_max_pool(input_shape, pool),
            Self::Unfused => {
                let mut saved = self.saved_for_backward(block, input_shape);
                for mut tensor in pool.saved_by_burn(block.output_shape(input_shape)) {
                    if tensor.name == "input" {
                        tensor.name = "output";
                        tensor.dtype = block.conv.weight.val().dtype();
                        tensor.shared = false;
                    }
                    saved.push(tensor);
                }
                saved
            }
        }
    }
}

/// Burn's own max pool.
pub(crate) fn burn_pool(pool: &MaxPool2d) -> pool::MaxPool2d {
    pool::MaxPool2dConfig::new(pool.kernel_size)
        .with_strides(pool.stride)
        .with_padding(pool.padding.clone())
        .with_dilation(pool.dilation)
        .with_ceil_mode(pool.ceil_mode)
        .init()
}

/// What Burn's own layers keep, with that name for the activation's input.
fn unfused_saved(
    block: &ConvBn2d,
    input_shape: [usize; 4],
    activation_input: &'static str,
) -> Vec<SavedTensor> {
    // Fused without recomputation and activation keeps all of it but what is added here.
    let mut keeping = block.clone();
    keeping.settings.recompute = Recompute::Never;
    keeping.settings.activation = Activation::Identity;
    let mut saved = keeping.saved_for_backward(input_shape);
    let norm = &block.norm;
    let dtype = block.conv.weight.val().dtype();
    let norm_dtype = norm.gamma.val().dtype();
    let is_frozen = block.settings.track_running_stats && !norm.training.is_enabled();
    // A frozen norm divides by the standard deviation, and needs no mean.
    saved.retain(|tensor| !(is_frozen && tensor.name == "mean"));
    for tensor in &mut saved {
        match tensor.name {
            "conv_output" => tensor.dtype = norm_dtype,
            "variance" if is_frozen => tensor.name = "std",
            _ => {}
        }
    }
    // Burn's convolution keeps its input for the weight's gradient, wanted or not.
    if !saved.iter().any(|tensor| tensor.name == "input") {
        let input = SavedTensor {
            name: "input",
            shape: Shape::from(input_shape),
            dtype,
            shared: true,
        };
        saved.insert(0, input);
    }
    let normalized = is_frozen && block.settings.affine && norm.gamma.val().is_tracked();
    let normalized = normalized.then_some(("normalized", norm_dtype));
    let activation = kept_by_activation(block.settings.activation, activation_input, dtype);
    let shape = Shape::from(block.output_shape(input_shape));
    saved.extend(
        normalized
            .into_iter()
            .chain(activation)
            .map(|(name, dtype)| SavedTensor {
                name,
                shape: shape.clone(),
                dtype,
                shared: false,
            }),
    );
    saved
}

/// Names and types of what Burn's activation keeps, for an input of that name and type.
pub(crate) fn kept_by_activation(
    activation: Activation,
    input: &'static str,
    dtype: DType,
) -> Vec<(&'static str, DType)> {
    // Of Flex, a byte for each value.
    let mask = DType::Bool(BoolStore::Native);
    let clamped = [("above", mask), ("below", mask)];
    let of_softplus = [("scaled", dtype), ("exponential", dtype), clamped[0]];
    match activation {
        Activation::Identity => Vec::new(),
        Activation::Relu | Activation::Gelu | Activation::Sigmoid | Activation::Tanh => {
            vec![(input, dtype)]
        }
        Activation::Relu6 | Activation::HardSigmoid { .. } => clamped.to_vec(),
        Activation::LeakyRelu { .. } => vec![clamped[1]],
        Activation::Silu => vec![(input, dtype), ("gate", dtype)],
        Activation::HardSwish => [&[(input, dtype), ("gate", dtype)], &clamped[..]].concat(),
        Activation::GeluApproximate => vec![(input, dtype), ("inner", dtype), ("gate", dtype)],
        Activation::Elu { .. } => vec![(input, dtype), clamped[1]],
        Activation::Softplus { .. } => of_softplus.to_vec(),
        Activation::Mish => {
            let gated = [(input, dtype), ("softplus", dtype), ("gate", dtype)];
            [&gated, &of_softplus[..]].concat()
        }
        other => panic!("{other:?} has no unfused form yet"),
    }
}

/// The activation as a user of Burn calls it.
pub(crate) fn unfused_activation(activation: Activation, value: Tensor<4>) -> Tensor<4> {
    match activation {
        Activation::Identity => value,
        Activation::Relu => relu(value),
        Activation::Relu6 => relu6(value),
        Activation::LeakyRelu { negative_slope } => leaky_relu(value, negative_slope),
        Activation::Silu => silu(value),
        Activation::Gelu => gelu(value),
        Activation::GeluApproximate => gelu_approximate(value),
        Activation::HardSwish => hard_swish(value),
        Activation::Sigmoid => sigmoid(value),
        Activation::HardSigmoid { alpha, beta } => hard_sigmoid(value, alpha, beta),
        Activation::Tanh => tanh(value),
        Activation::Elu { alpha } => elu(value, alpha),
        Activation::Mish => mish(value),
        Activation::Softplus { beta } => softplus(value, beta),
        other => panic!("{other:?} has no unfused form yet"),
    }
}

/// The norm, in the type of its parameters, between casts where that is not the input's.
pub(crate) fn unfused_norm(
    norm: &BatchNorm,
    settings: &ConvBnSettings,
    input: Tensor<4>,
) -> Tensor<4> {
    let mut norm = norm.clone();
    if !settings.affine {
        // Burn's norm has a scale and a shift in any case: constants, which no optimizer moves.
        norm.gamma = Param::initialized(norm.gamma.id, norm.gamma.val().ones_like());
        norm.beta = Param::initialized(norm.beta.id, norm.beta.val().zeros_like());
    }
    let affine = || (norm.gamma.val(), norm.beta.val());
    let dtype = input.dtype();
    let input = input.cast(norm.gamma.val().dtype());
    let normalized = match (settings.norm_variant, settings.track_running_stats) {
        (NormVariant::BatchNorm, true) => norm.forward(input),
        (NormVariant::BatchNorm, false) => {
            let (gamma, beta) = affine();
            batch_norm_train(input, gamma, beta, norm.epsilon).output
        }
        (variant @ NormVariant::Tutorial, false) => {
            let spec = NormSpec::new(variant, norm.epsilon);
            let params = BatchNormParams {
                affine: settings.affine.then(affine),
                statistics: None,
            };
            batch_norm(input, params, spec)
                .unwrap_or_else(|error| panic!("{error}"))
                .output
        }
        (NormVariant::Tutorial, true) => {
            panic!("the tutorial's norm has no unfused form with running statistics")
        }
    };
    normalized.cast(dtype)
}
