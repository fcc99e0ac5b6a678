use std::mem::replace;

use burn::config::Config;
use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::tensor::module::adaptive_avg_pool2d;
use burn::tensor::{Device, Tensor};
use burn_conv_bn::{Activation, ConvBn2d, Recompute};

use crate::Form;
use crate::head::rows;
use crate::init::{block, stem_pool, zeros};
use crate::walk::Walk;

/// What the blocks of a [`ResNet`] are made of.
///
/// ```
/// use burn_conv_bn_models::{Form, ResNetBlockKind, ResNetConfig};
///
/// assert_eq!(ResNetConfig::resnet34(Form::Fused).kind, ResNetBlockKind::Basic);
/// assert_eq!(ResNetConfig::resnet50(Form::Fused).kind, ResNetBlockKind::Bottleneck);
/// ```
#[derive(Config, Debug, Copy, PartialEq, Eq, Hash)]
pub enum ResNetBlockKind {
    /// Two 3x3 convolutions, the first with the stride.
    Basic,
    /// A 1x1 convolution, a 3x3 one with the stride, and a 1x1 one to four times as many channels:
    /// version 1.5, as torchvision's.
    Bottleneck,
}

impl ResNetBlockKind {
    /// Output channels per channel of the block's width.
    fn expansion(self) -> usize {
        match self {
            Self::Basic => 1,
            Self::Bottleneck => 4,
        }
    }
}

/// Configuration of [`ResNet`], made by [`init`](Self::init).
///
/// ```
/// use burn_conv_bn_models::{Form, ResNetConfig};
///
/// let config = ResNetConfig::resnet50(Form::Fused)
///     .with_classes(10)
///     .with_zero_init_residual(true);
/// assert_eq!(config.blocks, [3, 4, 6, 3]);
/// ```
#[derive(Config, Debug)]
#[non_exhaustive]
pub struct ResNetConfig {
    /// How the blocks run.
    pub form: Form,
    /// What the blocks are made of.
    pub kind: ResNetBlockKind,
    /// Numbers of blocks in the four layers.
    pub blocks: [usize; 4],
    /// Number of classes. Default: 1000.
    #[config(default = 1000)]
    pub classes: usize,
    /// Channels of the images. Default: 3.
    #[config(default = 3)]
    pub input_channels: usize,
    /// Whether the first convolution is 3x3 with stride 1 and without a max pool behind it, as is usual for
    /// CIFAR's images of 32x32 pixels. Default: false.
    #[config(default = false)]
    pub small_images: bool,
    /// Whether each block starts as its shortcut: gamma of its last norm is zero
    /// ([Goyal et al. 2017](https://arxiv.org/abs/1706.02677), 5.1). Default: false.
    #[config(default = false)]
    pub zero_init_residual: bool,
}

/// A residual network ([He et al. 2015](https://arxiv.org/abs/1512.03385)) with torchvision's
/// layers, names and initial distributions.
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::tensor::{Device, Distribution, Tensor};
/// use burn_conv_bn_models::{Form, ResNetBlockKind, ResNetConfig};
///
/// let device = Device::flex().autodiff();
/// let network = ResNetConfig::new(Form::Fused, ResNetBlockKind::Basic, [1, 1, 1, 1])
///     .with_classes(10)
///     .init(&device);
/// let images = Tensor::<4>::random([2, 3, 64, 64], Distribution::Default, &device);
/// assert_eq!(network.forward(images).dims(), [2, 10]);
///
/// let saved = network.saved_for_backward([2, 3, 64, 64]);
/// assert!(saved.iter().any(|(block, _)| block == "layer2.0.downsample"));
/// # }
/// ```
#[derive(Module, Debug)]
pub struct ResNet {
    /// 7x7 convolution with stride 2, before a 3x3 max pool with stride 2; 3x3 and alone for
    /// [small images](ResNetConfig::small_images).
    pub conv1: ConvBn2d,
    /// Blocks of width 64.
    pub layer1: Vec<ResNetBlock>,
    /// Blocks of width 128, the first with stride 2.
    pub layer2: Vec<ResNetBlock>,
    /// Blocks of width 256, the first with stride 2.
    pub layer3: Vec<ResNetBlock>,
    /// Blocks of width 512, the first with stride 2, before the global average pool.
    pub layer4: Vec<ResNetBlock>,
    /// Output linear layer.
    pub fc: Linear,
    #[module(skip)]
    small_images: bool,
    #[module(skip)]
    pub(crate) form: Form,
}

/// A residual block: the last of its convolutions adds the shortcut before its ReLU.
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::tensor::Device;
/// use burn_conv_bn_models::{Form, ResNetBlockKind, ResNetConfig};
///
/// let network = ResNetConfig::new(Form::Fused, ResNetBlockKind::Basic, [2, 1, 1, 1])
///     .init(&Device::flex());
/// // Two convolutions; where the stride is 2, the shortcut has one as well.
/// assert!(network.layer1[1].conv3.is_none() && network.layer1[1].downsample.is_none());
/// assert!(network.layer2[0].downsample.is_some());
/// # }
/// ```
#[derive(Module, Debug)]
pub struct ResNetBlock {
    /// First convolution.
    pub conv1: ConvBn2d,
    /// Second convolution: the last one of a basic block.
    pub conv2: ConvBn2d,
    /// Last convolution of a bottleneck.
    pub conv3: Option<ConvBn2d>,
    /// Brings the shortcut to the shape of the sum, by a 1x1 convolution without activation, where
    /// stride or channels change.
    pub downsample: Option<ConvBn2d>,
}

impl ResNetConfig {
    /// ResNet-18.
    pub fn resnet18(form: Form) -> Self {
        Self::new(form, ResNetBlockKind::Basic, [2, 2, 2, 2])
    }

    /// ResNet-34.
    pub fn resnet34(form: Form) -> Self {
        Self::new(form, ResNetBlockKind::Basic, [3, 4, 6, 3])
    }

    /// ResNet-50, version 1.5.
    pub fn resnet50(form: Form) -> Self {
        Self::new(form, ResNetBlockKind::Bottleneck, [3, 4, 6, 3])
    }

    /// ResNet-101, version 1.5.
    pub fn resnet101(form: Form) -> Self {
        Self::new(form, ResNetBlockKind::Bottleneck, [3, 4, 23, 3])
    }

    /// Each parameter is drawn on first use.
    pub(crate) fn init_lazy(&self, device: &Device) -> ResNet {
        assert!(
            !self.blocks.contains(&0),
            "each layer needs a block, got {:?}",
            self.blocks
        );
        let [kernel, stride] = if self.small_images { [3, 1] } else { [7, 2] };
        let channels = [self.input_channels, 64];
        let conv1 = block(channels, kernel, stride, 1, Activation::Relu);
        let [layer1, layer2, layer3, layer4] = [0, 1, 2, 3].map(|layer| self.layer(layer, device));
        ResNet {
            conv1: conv1.init(device),
            layer1,
            layer2,
            layer3,
            layer4,
            fc: LinearConfig::new(512 * self.kind.expansion(), self.classes).init(device),
            small_images: self.small_images,
            form: self.form,
        }
    }

    fn layer(&self, layer: usize, device: &Device) -> Vec<ResNetBlock> {
        let width = 64_usize << layer;
        let channels = width * self.kind.expansion();
        (0..self.blocks[layer])
            .map(|index| match (layer, index) {
                (0, 0) => self.block(64, width, 1, device),
                (_, 0) => self.block(channels / 2, width, 2, device),
                _ => self.block(channels, width, 1, device),
            })
            .collect()
    }

    fn block(
        &self,
        channels_in: usize,
        width: usize,
        stride: usize,
        device: &Device,
    ) -> ResNetBlock {
        let channels_out = width * self.kind.expansion();
        let conv = |channels, kernel, stride, activation| {
            block(channels, kernel, stride, 1, activation).init(device)
        };
        let relu = |channels, kernel, stride| conv(channels, kernel, stride, Activation::Relu);
        let (conv1, mut conv2, mut conv3) = match self.kind {
            ResNetBlockKind::Basic => (
                relu([channels_in, width], 3, stride),
                relu([width, width], 3, 1),
                None,
            ),
            ResNetBlockKind::Bottleneck => (
                relu([channels_in, width], 1, 1),
                relu([width, width], 3, stride),
                Some(relu([width, channels_out], 1, 1)),
            ),
        };
        if self.zero_init_residual {
            let last = conv3.as_mut().unwrap_or(&mut conv2);
            last.norm.gamma = zeros(channels_out, device);
        }
        let changes = stride != 1 || channels_in != channels_out;
        ResNetBlock {
            conv1,
            conv2,
            conv3,
            downsample: changes.then(|| {
                let channels = [channels_in, channels_out];
                conv(channels, 1, stride, Activation::Identity)
            }),
        }
    }
}

impl ResNet {
    /// Patterns and replacements from the keys of torchvision's `resnet*` to the names here; see
    /// [the crate](crate#weights-of-pytorch).
    pub const PYTORCH_KEYS: &'static [(&'static str, &'static str)] = &[
        (r"(^|\.)conv(\d)\.weight$", "${1}conv${2}.conv.weight"),
        (r"(^|\.)bn(\d)\.", "${1}conv${2}.norm."),
        (r"\.downsample\.0\.", ".downsample.conv."),
        (r"\.downsample\.1\.", ".downsample.norm."),
        (r"\.norm\.weight$", ".norm.gamma"),
        (r"\.norm\.bias$", ".norm.beta"),
    ];

    /// The way back, from the names here to torchvision's; burn-store's `BurnToPyTorchAdapter` names a norm's gamma and
    /// beta weight and bias.
    pub const TO_PYTORCH_KEYS: &'static [(&'static str, &'static str)] = &[
        (r"(^|\.)conv(\d)\.conv\.", "${1}conv${2}."),
        (r"(^|\.)conv(\d)\.norm\.", "${1}bn${2}."),
        (r"\.downsample\.conv\.", ".downsample.0."),
        (r"\.downsample\.norm\.", ".downsample.1."),
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
        let x = if self.small_images {
            self.form.forward(&self.conv1, images)
        } else {
            self.form
                .forward_max_pool(&self.conv1, images, &stem_pool())
        };
        let x = self
            .layers()
            .into_iter()
            .flat_map(|(_, layer)| layer)
            .fold(x, |x, block| block.forward(x, self.form));
        let x = adaptive_avg_pool2d(x, [1, 1]);
        self.fc.forward(rows(x, &self.fc))
    }

    /// Sets [`Recompute::Norm`] for the convolutions inside the residual blocks, and `ends` for those at their
    /// ends: the one that adds the shortcut, and the shortcut's own. The first convolution of the network,
    /// which is one op with the max pool or the first shortcut, is `Recompute::Conv`.
    /// See [the crate](crate#chains).
    #[must_use]
    pub fn with_rebuilt_chains(mut self, ends: Recompute) -> Self {
        let is_bottleneck = self.layer1[0].conv3.is_some();
        for (name, block) in self.blocks_mut() {
            block.settings.recompute = match name.rsplit_once('.') {
                None => Recompute::Conv,
                Some((_, "conv1")) => Recompute::Norm,
                Some((_, "conv2")) if is_bottleneck => Recompute::Norm,
                _ => ends,
            };
        }
        self
    }

    /// Goes through the network in the order of [`forward`](Self::forward).
    pub(crate) fn walk(&self, input_shape: [usize; 4]) -> Walk {
        let mut walk = Walk::new(self.form, input_shape, &self.conv1);
        if self.small_images {
            walk.block("conv1", &self.conv1);
        } else {
            walk.block_max_pool("conv1", &self.conv1, &stem_pool());
        }
        for (name, layer) in self.layers() {
            for (index, block) in layer.iter().enumerate() {
                block.walk(&format!("{name}.{index}"), &mut walk);
            }
        }
        walk.average_pool([1, 1]);
        walk.rows(&self.fc);
        walk.linear("fc", &self.fc);
        walk
    }

    /// The blocks by name.
    pub(crate) fn blocks_mut(&mut self) -> Vec<(String, &mut ConvBn2d)> {
        let mut blocks = vec![("conv1".to_owned(), &mut self.conv1)];
        let layers = [
            &mut self.layer1,
            &mut self.layer2,
            &mut self.layer3,
            &mut self.layer4,
        ];
        for (number, layer) in (1..).zip(layers) {
            for (index, block) in layer.iter_mut().enumerate() {
                let convs = block.convs().into_iter();
                blocks.extend(
                    convs.map(|(conv, block)| (format!("layer{number}.{index}.{conv}"), block)),
                );
            }
        }
        blocks
    }

    fn layers(&self) -> [(&'static str, &Vec<ResNetBlock>); 4] {
        [
            ("layer1", &self.layer1),
            ("layer2", &self.layer2),
            ("layer3", &self.layer3),
            ("layer4", &self.layer4),
        ]
    }
}

impl ResNetBlock {
    /// Its convolutions by name.
    fn convs(&mut self) -> Vec<(&'static str, &mut ConvBn2d)> {
        [
            ("conv1", Some(&mut self.conv1)),
            ("conv2", Some(&mut self.conv2)),
            ("conv3", self.conv3.as_mut()),
            ("downsample", self.downsample.as_mut()),
        ]
        .into_iter()
        .filter_map(|(name, conv)| Some((name, conv?)))
        .collect()
    }

    fn forward(&self, input: Tensor<4>, form: Form) -> Tensor<4> {
        let shortcut = match &self.downsample {
            Some(downsample) => form.forward(downsample, input.clone()),
            None => input.clone(),
        };
        let x = form.forward(&self.conv1, input);
        match &self.conv3 {
            None => form.forward_residual(&self.conv2, x, shortcut),
            Some(conv3) => {
                let x = form.forward(&self.conv2, x);
                form.forward_residual(conv3, x, shortcut)
            }
        }
    }

    /// Lists what it keeps, in the order of [`forward`](Self::forward).
    fn walk(&self, name: &str, walk: &mut Walk) {
        let input = walk.current.clone();
        let mut shortcut = input.clone();
        if let Some(downsample) = &self.downsample {
            walk.block(&format!("{name}.downsample"), downsample);
            shortcut = replace(&mut walk.current, input);
        }
        walk.block(&format!("{name}.conv1"), &self.conv1);
        match &self.conv3 {
            None => walk.block_residual(&format!("{name}.conv2"), &self.conv2, &shortcut),
            Some(conv3) => {
                walk.block(&format!("{name}.conv2"), &self.conv2);
                walk.block_residual(&format!("{name}.conv3"), conv3, &shortcut);
            }
        }
    }
}
