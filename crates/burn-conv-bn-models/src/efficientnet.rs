use burn::config::Config;
use burn::module::Module;
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::nn::{Dropout, DropoutConfig, Initializer, Linear, LinearConfig};
use burn::tensor::activation::{sigmoid, silu};
use burn::tensor::module::adaptive_avg_pool2d;
use burn::tensor::{Device, Tensor};
use burn_conv_bn::{Activation, ConvBn2d, Recompute};

use crate::Form;
use crate::head::rows;
use crate::init::{block, rounded, zeros};
use crate::walk::Walk;

/// Table 1 of the paper: expansion, kernel, stride of the first block, output channels, number of blocks.
const STAGES: [(usize, usize, usize, usize, usize); 7] = [
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
];

/// Configuration of [`EfficientNet`], made by [`init`](Self::init). The defaults are B0's.
///
/// ```
/// use burn_conv_bn_models::{EfficientNetConfig, Form};
///
/// let b0 = EfficientNetConfig::new(Form::Fused);
/// assert_eq!(b0.classes, 1000);
/// // B1 has more blocks.
/// let b1 = b0.with_depth(1.1);
/// ```
#[derive(Config, Debug)]
#[non_exhaustive]
pub struct EfficientNetConfig {
    /// How the blocks run.
    pub form: Form,
    /// Factor on the numbers of channels, which are then rounded to multiples of 8. Default: 1.
    #[config(default = 1.0)]
    pub width: f64,
    /// Factor on the numbers of blocks, which are then rounded up. Default: 1.
    #[config(default = 1.0)]
    pub depth: f64,
    /// Number of classes. Default: 1000.
    #[config(default = 1000)]
    pub classes: usize,
    /// Channels of the images. Default: 3.
    #[config(default = 3)]
    pub input_channels: usize,
    /// Probability with which the classifier's inputs are dropped in training. Default: 0.2.
    #[config(default = 0.2)]
    pub dropout: f64,
    /// Probability with which an image skips the last residual block in training, falling linearly to 0 at
    /// the first ([Huang et al. 2016](https://arxiv.org/abs/1603.09382)). Default: 0.2.
    #[config(default = 0.2)]
    pub stochastic_depth: f64,
}

/// A network of inverted residuals with squeeze and excitation
/// ([Tan and Le 2019](https://arxiv.org/abs/1905.11946)), with torchvision's layers and initial
/// distributions.
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::tensor::{Device, Distribution, Tensor};
/// use burn_conv_bn_models::{EfficientNetConfig, Form};
///
/// let device = Device::flex().autodiff();
/// let network = EfficientNetConfig::new(Form::Fused)
///     .with_width(0.25)
///     .with_classes(10)
///     .init(&device);
/// let images = Tensor::<4>::random([2, 3, 64, 64], Distribution::Default, &device);
/// assert_eq!(network.forward(images).dims(), [2, 10]);
/// # }
/// ```
#[derive(Module, Debug)]
pub struct EfficientNet {
    /// A 3x3 convolution with stride 2.
    pub stem: ConvBn2d,
    /// One inverted residual, which does not expand.
    pub stage1: Vec<EfficientNetBlock>,
    /// Inverted residuals, the first with stride 2.
    pub stage2: Vec<EfficientNetBlock>,
    /// Inverted residuals with 5x5 kernels, the first with stride 2.
    pub stage3: Vec<EfficientNetBlock>,
    /// Inverted residuals, the first with stride 2.
    pub stage4: Vec<EfficientNetBlock>,
    /// Inverted residuals with 5x5 kernels.
    pub stage5: Vec<EfficientNetBlock>,
    /// Inverted residuals with 5x5 kernels, the first with stride 2.
    pub stage6: Vec<EfficientNetBlock>,
    /// One inverted residual.
    pub stage7: Vec<EfficientNetBlock>,
    /// A 1x1 convolution before the global average pool.
    pub head: ConvBn2d,
    /// Before the linear layer.
    pub dropout: Dropout,
    /// Output linear layer.
    pub classifier: Linear,
    #[module(skip)]
    pub(crate) form: Form,
}

/// An inverted residual: a 1x1 convolution to more channels, a depthwise one, squeeze and excitation, and a
/// 1x1 convolution to fewer channels without activation, which adds the block's input where shapes agree.
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::tensor::Device;
/// use burn_conv_bn_models::{EfficientNetConfig, Form};
///
/// let network = EfficientNetConfig::new(Form::Fused)
///     .with_width(0.25)
///     .init(&Device::flex());
/// assert!(network.stage1[0].expand.is_none());
/// assert!(network.stage2[0].expand.is_some());
/// # }
/// ```
#[derive(Module, Debug)]
pub struct EfficientNetBlock {
    /// The 1x1 convolution to more channels, unless the expansion is 1.
    pub expand: Option<ConvBn2d>,
    /// The depthwise convolution, with the stride.
    pub depthwise: ConvBn2d,
    /// Squeeze and excitation.
    pub squeeze: SqueezeExcitation,
    /// The 1x1 convolution to fewer channels.
    pub project: ConvBn2d,
    /// Draws the images that skip the block in training.
    pub stochastic_depth: Dropout,
    /// Whether the block adds its input.
    #[module(skip)]
    residual: bool,
}

/// A gate for each channel, from the means of all channels
/// ([Hu et al. 2018](https://arxiv.org/abs/1709.01507)), by Burn's own ops. It computes in the type of its
/// own weights, which stay f32 in mixed precision.
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::tensor::Device;
/// use burn_conv_bn_models::{EfficientNetConfig, Form};
///
/// let network = EfficientNetConfig::new(Form::Fused).init(&Device::flex());
/// // To a quarter of the block's input channels, and back.
/// let squeeze = &network.stage2[0].squeeze;
/// assert_eq!(squeeze.fc1.weight.dims(), [4, 96, 1, 1]);
/// assert_eq!(squeeze.fc2.weight.dims(), [96, 4, 1, 1]);
/// # }
/// ```
#[derive(Module, Debug)]
pub struct SqueezeExcitation {
    /// To fewer channels, before a SiLU.
    pub fc1: Conv2d,
    /// Back, before a sigmoid.
    pub fc2: Conv2d,
}

impl EfficientNetConfig {
    /// Each parameter is drawn on first use.
    pub(crate) fn init_lazy(&self, device: &Device) -> EfficientNet {
        for (name, factor) in [("width", self.width), ("depth", self.depth)] {
            assert!(
                factor.is_finite() && factor > 0.0,
                "the {name} must be positive and finite, got {factor}"
            );
        }
        let first = rounded(32.0 * self.width);
        let mut channels = first;
        let counts = STAGES.map(|(.., count)| (count as f64 * self.depth).ceil() as usize);
        let total: usize = counts.iter().sum();
        let mut done = 0;
        let mut stage = |index: usize| -> Vec<EfficientNetBlock> {
            let (expansion, kernel, first_stride, width, _) = STAGES[index];
            let channels_out = rounded(width as f64 * self.width);
            let blocks = (0..counts[index]).map(|block| {
                let stride = if block == 0 { first_stride } else { 1 };
                let skipped = self.stochastic_depth * done as f64 / total as f64;
                done += 1;
                let shape = [channels, channels_out];
                channels = channels_out;
                inverted_residual(shape, expansion, [kernel, stride], skipped, device)
            });
            blocks.collect()
        };
        let [stage1, stage2, stage3, stage4, stage5, stage6, stage7] =
            [0, 1, 2, 3, 4, 5, 6].map(&mut stage);
        let last = 4 * channels;
        let bound = 1.0 / (self.classes as f64).sqrt();
        let mut classifier = LinearConfig::new(last, self.classes)
            .with_initializer(Initializer::Uniform {
                min: -bound,
                max: bound,
            })
            .init(device);
        classifier.bias = Some(zeros(self.classes, device));
        let silu = Activation::Silu;
        EfficientNet {
            stem: block([self.input_channels, first], 3, 2, 1, silu).init(device),
            stage1,
            stage2,
            stage3,
            stage4,
            stage5,
            stage6,
            stage7,
            head: block([channels, last], 1, 1, 1, silu).init(device),
            dropout: DropoutConfig::new(self.dropout).init(),
            classifier,
            form: self.form,
        }
    }
}

fn inverted_residual(
    [channels_in, channels_out]: [usize; 2],
    expansion: usize,
    [kernel, stride]: [usize; 2],
    skipped: f64,
    device: &Device,
) -> EfficientNetBlock {
    let (inner, silu) = (rounded((channels_in * expansion) as f64), Activation::Silu);
    let expand = (inner != channels_in).then(|| block([channels_in, inner], 1, 1, 1, silu));
    EfficientNetBlock {
        expand: expand.map(|expand| expand.init(device)),
        depthwise: block([inner, inner], kernel, stride, inner, silu).init(device),
        squeeze: SqueezeExcitation::new([inner, (channels_in / 4).max(1)], device),
        project: block([inner, channels_out], 1, 1, 1, Activation::Identity).init(device),
        stochastic_depth: DropoutConfig::new(skipped).init(),
        residual: stride == 1 && channels_in == channels_out,
    }
}

impl EfficientNet {
    /// Patterns and replacements from the keys of torchvision's `efficientnet_b*` to the names here; see
    /// [the crate](crate#weights-of-pytorch).
    pub const PYTORCH_KEYS: &'static [(&'static str, &'static str)] = &[
        (r"^features\.0\.", "stem."),
        (r"^features\.8\.", "head."),
        // The first stage does not expand: its parts come one earlier.
        (r"^features\.1\.(\d+)\.block\.0\.", "stage1.$1.depthwise."),
        (r"^features\.1\.(\d+)\.block\.1\.", "stage1.$1.squeeze."),
        (r"^features\.1\.(\d+)\.block\.2\.", "stage1.$1.project."),
        (r"^features\.(\d)\.(\d+)\.block\.0\.", "stage$1.$2.expand."),
        (
            r"^features\.(\d)\.(\d+)\.block\.1\.",
            "stage$1.$2.depthwise.",
        ),
        (r"^features\.(\d)\.(\d+)\.block\.2\.", "stage$1.$2.squeeze."),
        (r"^features\.(\d)\.(\d+)\.block\.3\.", "stage$1.$2.project."),
        (r"(stem|head|expand|depthwise|project)\.0\.", "$1.conv."),
        (r"(stem|head|expand|depthwise|project)\.1\.", "$1.norm."),
        (r"\.norm\.weight$", ".norm.gamma"),
        (r"\.norm\.bias$", ".norm.beta"),
        (r"^classifier\.1\.", "classifier."),
    ];

    /// Scores of the classes, before any softmax.
    ///
    /// # Shapes
    ///
    /// - `images`: `[batch, input_channels, height, width]`
    /// - output: `[batch, classes]`
    ///
    /// # Panics
    ///
    /// As [`ConvBn2d::forward`]: among others if a training batch leaves a single value per
    /// channel, as one image of up to 32x32 does.
    pub fn forward(&self, images: Tensor<4>) -> Tensor<2> {
        let x = self.form.forward(&self.stem, images);
        let blocks = self.stages().into_iter().flat_map(|(_, stage)| stage);
        let x = blocks.fold(x, |x, block| block.forward(x, self.form));
        let x = self.form.forward(&self.head, x);
        let x = rows(adaptive_avg_pool2d(x, [1, 1]), &self.classifier);
        self.classifier.forward(self.dropout.forward(x))
    }

    /// Sets [`Recompute::Norm`] for the stem and the convolutions that expand, and `ends` for all others:
    /// what squeeze and excitation scale, and what a block returns.
    /// See [the crate](crate#chains).
    #[must_use]
    pub fn with_rebuilt_chains(mut self, ends: Recompute) -> Self {
        for (name, block) in self.blocks_mut() {
            let is_inside = name == "stem" || name.ends_with("expand");
            block.settings.recompute = if is_inside { Recompute::Norm } else { ends };
        }
        self
    }

    /// Goes through the network in the order of [`forward`](Self::forward).
    pub(crate) fn walk(&self, input_shape: [usize; 4]) -> Walk {
        let mut walk = Walk::new(self.form, input_shape, &self.stem);
        walk.block("stem", &self.stem);
        for (name, stage) in self.stages() {
            for (index, block) in stage.iter().enumerate() {
                block.walk(&format!("{name}.{index}"), &mut walk);
            }
        }
        walk.block("head", &self.head);
        walk.average_pool([1, 1]);
        walk.rows(&self.classifier);
        walk.dropout(&self.dropout);
        walk.linear("classifier", &self.classifier);
        walk
    }

    /// The blocks by name.
    pub(crate) fn blocks_mut(&mut self) -> Vec<(String, &mut ConvBn2d)> {
        let mut blocks = vec![("stem".to_owned(), &mut self.stem)];
        let stages = [
            &mut self.stage1,
            &mut self.stage2,
            &mut self.stage3,
            &mut self.stage4,
            &mut self.stage5,
            &mut self.stage6,
            &mut self.stage7,
        ];
        for (stage, residuals) in (1..).zip(stages) {
            for (index, block) in residuals.iter_mut().enumerate() {
                let name = |conv| format!("stage{stage}.{index}.{conv}");
                if let Some(expand) = &mut block.expand {
                    blocks.push((name("expand"), expand));
                }
                blocks.push((name("depthwise"), &mut block.depthwise));
                blocks.push((name("project"), &mut block.project));
            }
        }
        blocks.push(("head".to_owned(), &mut self.head));
        blocks
    }

    fn stages(&self) -> [(&'static str, &Vec<EfficientNetBlock>); 7] {
        [
            ("stage1", &self.stage1),
            ("stage2", &self.stage2),
            ("stage3", &self.stage3),
            ("stage4", &self.stage4),
            ("stage5", &self.stage5),
            ("stage6", &self.stage6),
            ("stage7", &self.stage7),
        ]
    }
}

impl EfficientNetBlock {
    pub(crate) fn forward(&self, input: Tensor<4>, form: Form) -> Tensor<4> {
        let x = match &self.expand {
            Some(expand) => form.forward(expand, input.clone()),
            None => input.clone(),
        };
        let x = self.squeeze.forward(form.forward(&self.depthwise, x));
        if !self.residual {
            return form.forward(&self.project, x);
        }
        if !self.skips_images() {
            return form.forward_residual(&self.project, x, input);
        }
        let branch = form.forward(&self.project, x);
        let ones = Tensor::ones(
            [input.dims()[0], 1, 1, 1],
            (&input.device(), branch.dtype()),
        );
        branch * self.stochastic_depth.forward(ones) + input
    }

    /// Lists what it keeps, in the order of [`forward`](Self::forward).
    fn walk(&self, name: &str, walk: &mut Walk) {
        let input = walk.current.clone();
        if let Some(expand) = &self.expand {
            walk.block(&format!("{name}.expand"), expand);
        }
        walk.block(&format!("{name}.depthwise"), &self.depthwise);
        walk.squeeze(
            &format!("{name}.squeeze"),
            [&self.squeeze.fc1, &self.squeeze.fc2],
        );
        let project = format!("{name}.project");
        if self.residual && !self.skips_images() {
            walk.block_residual(&project, &self.project, &input);
        } else {
            walk.block(&project, &self.project);
        }
        if self.residual && self.skips_images() {
            walk.stochastic_depth(name);
        }
    }

    /// Whether images skip the block in training.
    fn skips_images(&self) -> bool {
        self.stochastic_depth.training.is_enabled() && self.stochastic_depth.prob > 0.0
    }
}

impl SqueezeExcitation {
    fn new([channels, squeezed]: [usize; 2], device: &Device) -> Self {
        let conv = |channels: [usize; 2]| {
            let initializer = Initializer::KaimingNormal {
                gain: 2f64.sqrt(),
                fan_out_only: true,
            };
            let mut conv = Conv2dConfig::new(channels, [1, 1])
                .with_initializer(initializer)
                .init(device);
            conv.bias = Some(zeros(channels[1], device));
            conv
        };
        Self {
            fc1: conv([channels, squeezed]),
            fc2: conv([squeezed, channels]),
        }
    }

    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let dtype = x.dtype();
        let means = adaptive_avg_pool2d(x.clone(), [1, 1]).cast(self.fc1.weight.val().dtype());
        let gate = sigmoid(self.fc2.forward(silu(self.fc1.forward(means))));
        x * gate.cast(dtype)
    }
}
