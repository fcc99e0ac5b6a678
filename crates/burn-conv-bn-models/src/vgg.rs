use burn::config::Config;
use burn::module::Module;
use burn::nn::{Dropout, DropoutConfig, Initializer, Linear, LinearConfig};
use burn::tensor::activation::relu;
use burn::tensor::module::adaptive_avg_pool2d;
use burn::tensor::{Device, Tensor};
use burn_conv_bn::{Activation, ConvBn2d, MaxPool2d, MaxPool2dConfig, Recompute};

use crate::Form;
use crate::head::rows;
use crate::init::{block, zeros};
use crate::walk::Walk;

/// Channels of the convolutions between two pools.
const WIDTHS: [usize; 5] = [64, 128, 256, 512, 512];

/// Height and width of what the classifier sees.
const POOLED: usize = 7;

/// Configuration of [`Vgg`], made by [`init`](Self::init).
///
/// ```
/// use burn_conv_bn_models::{Form, VggConfig};
///
/// let config = VggConfig::vgg16_bn(Form::Fused).with_classes(10);
/// assert_eq!(config.blocks.iter().sum::<usize>() + 3, 16);
/// ```
#[derive(Config, Debug)]
#[non_exhaustive]
pub struct VggConfig {
    /// How the blocks run.
    pub form: Form,
    /// Numbers of convolutions before each of the five pools.
    pub blocks: [usize; 5],
    /// Number of classes. Default: 1000.
    #[config(default = 1000)]
    pub classes: usize,
    /// Channels of the images. Default: 3.
    #[config(default = 3)]
    pub input_channels: usize,
    /// Width of the two hidden linear layers. Default: 4096.
    #[config(default = 4096)]
    pub hidden: usize,
    /// Probability with which the hidden layers' values are dropped in training. Default: 0.5.
    #[config(default = 0.5)]
    pub dropout: f64,
}

/// A network of 3x3 convolutions ([Simonyan and Zisserman 2014](https://arxiv.org/abs/1409.1556))
/// with batch norm, and torchvision's layers and initial distributions.
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::tensor::{Device, Distribution, Tensor};
/// use burn_conv_bn_models::{Form, VggConfig};
///
/// let device = Device::flex().autodiff();
/// // A small one: one convolution before each pool, and a narrow classifier.
/// let network = VggConfig::new(Form::Fused, [1, 1, 1, 1, 1])
///     .with_hidden(16)
///     .with_classes(10)
///     .init(&device);
/// let images = Tensor::<4>::random([2, 3, 32, 32], Distribution::Default, &device);
/// assert_eq!(network.forward(images).dims(), [2, 10]);
/// # }
/// ```
#[derive(Module, Debug)]
pub struct Vgg {
    /// The convolutions, with a bias as in torchvision: 64 channels, and twice as many after each
    /// 2x2 max pool, up to 512.
    pub features: Vec<ConvBn2d>,
    /// Three linear layers, with ReLU and dropout after the first two.
    pub classifier: Vec<Linear>,
    /// After the hidden linear layers.
    pub dropout: Dropout,
    #[module(skip)]
    blocks: [usize; 5],
    #[module(skip)]
    pub(crate) form: Form,
}

impl VggConfig {
    /// VGG-16 with batch norm.
    pub fn vgg16_bn(form: Form) -> Self {
        Self::new(form, [2, 2, 3, 3, 3])
    }

    /// Each parameter is drawn on first use.
    pub(crate) fn init_lazy(&self, device: &Device) -> Vgg {
        assert!(
            !self.blocks.contains(&0),
            "each pool needs a convolution before it, got {:?}",
            self.blocks
        );
        let mut channels_in = self.input_channels;
        let mut features = Vec::new();
        for (&channels, &count) in WIDTHS.iter().zip(&self.blocks) {
            for _ in 0..count {
                let mut conv = block([channels_in, channels], 3, 1, 1, Activation::Relu)
                    .with_bias(true)
                    .init(device);
                conv.conv.bias = Some(zeros(channels, device));
                features.push(conv);
                channels_in = channels;
            }
        }
        let linear = |inputs, outputs| {
            let mut linear = LinearConfig::new(inputs, outputs)
                .with_initializer(Initializer::Normal {
                    mean: 0.0,
                    std: 0.01,
                })
                .init(device);
            linear.bias = Some(zeros(outputs, device));
            linear
        };
        Vgg {
            features,
            classifier: vec![
                linear(channels_in * POOLED * POOLED, self.hidden),
                linear(self.hidden, self.hidden),
                linear(self.hidden, self.classes),
            ],
            dropout: DropoutConfig::new(self.dropout).init(),
            blocks: self.blocks,
            form: self.form,
        }
    }
}

/// Pairs for the convolution and the norm of each block, from their positions in torchvision's
/// `features` to the block's here, and those for the rest.
macro_rules! pytorch_keys {
    ($($conv:literal, $norm:literal => $block:literal;)*) => {
        &[
            $(
                (
                    concat!(r"^features\.", $conv, r"\.(weight|bias)$"),
                    concat!("features.", $block, ".conv.$1"),
                ),
                (
                    concat!(r"^features\.", $norm, r"\.(weight|bias|running_mean|running_var)$"),
                    concat!("features.", $block, ".norm.$1"),
                ),
            )*
            (r"\.norm\.weight$", ".norm.gamma"),
            (r"\.norm\.bias$", ".norm.beta"),
            (r"^classifier\.3\.", "classifier.1."),
            (r"^classifier\.6\.", "classifier.2."),
        ]
    };
}

impl Vgg {
    /// Patterns and replacements from the keys of torchvision's `vgg16_bn` to the names here; see
    /// [the crate](crate#weights-of-pytorch).
    pub const PYTORCH_KEYS: &'static [(&'static str, &'static str)] = pytorch_keys! {
        0, 1 => 0;
        3, 4 => 1;
        7, 8 => 2;
        10, 11 => 3;
        14, 15 => 4;
        17, 18 => 5;
        20, 21 => 6;
        24, 25 => 7;
        27, 28 => 8;
        30, 31 => 9;
        34, 35 => 10;
        37, 38 => 11;
        40, 41 => 12;
    };

    /// Scores of the classes, before any softmax.
    ///
    /// # Shapes
    ///
    /// - `images`: `[batch, input_channels, height, width]`, at least 32 high and wide
    /// - output: `[batch, classes]`
    ///
    /// # Panics
    ///
    /// As [`ConvBn2d::forward`].
    pub fn forward(&self, images: Tensor<4>) -> Tensor<2> {
        let mut features = self.features.iter();
        let pool = pool();
        let mut x = images;
        for count in self.blocks {
            for (index, block) in features.by_ref().take(count).enumerate() {
                x = if index + 1 == count {
                    self.form.forward_max_pool(block, x, &pool)
                } else {
                    self.form.forward(block, x)
                };
            }
        }
        let pooled = adaptive_avg_pool2d(x, [POOLED, POOLED]);
        let mut x = rows(pooled, &self.classifier[0]);
        for (index, linear) in self.classifier.iter().enumerate() {
            if index > 0 {
                x = self.dropout.forward(relu(x));
            }
            x = linear.forward(x);
        }
        x
    }

    /// Sets [`Recompute::Norm`] for the convolutions with another one behind, and `ends` for those that are one
    /// op with the max pool behind.
    /// See [the crate](crate#chains).
    #[must_use]
    pub fn with_rebuilt_chains(mut self, ends: Recompute) -> Self {
        let mut features = self.features.iter_mut();
        for count in self.blocks {
            for (index, block) in features.by_ref().take(count).enumerate() {
                let is_end = index + 1 == count;
                block.settings.recompute = if is_end { ends } else { Recompute::Norm };
            }
        }
        self
    }

    /// Goes through the network in the order of [`forward`](Self::forward).
    pub(crate) fn walk(&self, input_shape: [usize; 4]) -> Walk {
        let mut walk = Walk::new(self.form, input_shape, &self.features[0]);
        let mut features = self.features.iter().enumerate();
        for count in self.blocks {
            for (place, (index, block)) in features.by_ref().take(count).enumerate() {
                let name = format!("features.{index}");
                if place + 1 == count {
                    walk.block_max_pool(&name, block, &pool());
                } else {
                    walk.block(&name, block);
                }
            }
        }
        walk.average_pool([POOLED; 2]);
        walk.rows(&self.classifier[0]);
        for (index, linear) in self.classifier.iter().enumerate() {
            if index > 0 {
                walk.relu();
                walk.dropout(&self.dropout);
            }
            walk.linear(&format!("classifier.{index}"), linear);
        }
        walk
    }

    /// The blocks by name.
    pub(crate) fn blocks_mut(&mut self) -> Vec<(String, &mut ConvBn2d)> {
        let features = self.features.iter_mut().enumerate();
        features
            .map(|(index, block)| (format!("features.{index}"), block))
            .collect()
    }
}

/// Behind the last convolution of each size.
fn pool() -> MaxPool2d {
    MaxPool2dConfig::new([2, 2]).init()
}
