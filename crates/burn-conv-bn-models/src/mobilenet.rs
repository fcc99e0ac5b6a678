use burn::config::Config;
use burn::module::Module;
use burn::nn::{Dropout, DropoutConfig, Initializer, Linear, LinearConfig};
use burn::tensor::module::adaptive_avg_pool2d;
use burn::tensor::{Device, Tensor};
use burn_conv_bn::{Activation, ConvBn2d, Recompute};

use crate::Form;
use crate::head::rows;
use crate::init::{block, rounded, zeros};
use crate::walk::Walk;

/// Table 2 of the paper: expansion, output channels, number of blocks, stride of the first.
const STAGES: [(usize, usize, usize, usize); 7] = [
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
];

/// Configuration of [`MobileNetV2`], made by [`init`](Self::init).
///
/// ```
/// use burn_conv_bn_models::{Form, MobileNetV2Config};
///
/// let config = MobileNetV2Config::new(Form::Fused).with_width(0.5);
/// assert_eq!(config.classes, 1000);
/// ```
#[derive(Config, Debug)]
#[non_exhaustive]
pub struct MobileNetV2Config {
    /// How the blocks run.
    pub form: Form,
    /// Factor on the numbers of channels, which are then rounded to multiples of 8. Default: 1.
    #[config(default = 1.0)]
    pub width: f64,
    /// Number of classes. Default: 1000.
    #[config(default = 1000)]
    pub classes: usize,
    /// Channels of the images. Default: 3.
    #[config(default = 3)]
    pub input_channels: usize,
    /// Probability with which the classifier's inputs are dropped in training. Default: 0.2.
    #[config(default = 0.2)]
    pub dropout: f64,
}

/// A network of inverted residuals ([Sandler et al. 2018](https://arxiv.org/abs/1801.04381)) with
/// torchvision's layers and initial distributions.
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::tensor::{Device, Distribution, Tensor};
/// use burn_conv_bn_models::{Form, MobileNetV2Config};
///
/// let device = Device::flex().autodiff();
/// let network = MobileNetV2Config::new(Form::Fused)
///     .with_width(0.25)
///     .with_classes(10)
///     .init(&device);
/// let images = Tensor::<4>::random([2, 3, 64, 64], Distribution::Default, &device);
/// assert_eq!(network.forward(images).dims(), [2, 10]);
/// # }
/// ```
#[derive(Module, Debug)]
pub struct MobileNetV2 {
    /// A 3x3 convolution with stride 2, the inverted residuals, and a 1x1 convolution, before the
    /// global average pool.
    pub features: Vec<MobileNetV2Block>,
    /// Before the linear layer.
    pub dropout: Dropout,
    /// Output linear layer.
    pub classifier: Linear,
    #[module(skip)]
    pub(crate) form: Form,
}

/// A chain of convolutions: one of the two plain ones, or an inverted residual of a 1x1 convolution
/// to more channels (unless the expansion is 1), a depthwise 3x3 one with the stride, and a 1x1 one
/// to fewer, without activation.
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::tensor::Device;
/// use burn_conv_bn_models::{Form, MobileNetV2Config};
///
/// let network = MobileNetV2Config::new(Form::Fused)
///     .with_width(0.25)
///     .init(&Device::flex());
/// // The image's, an inverted residual that does not expand, and one that does.
/// let lengths: Vec<usize> = network.features.iter().map(|block| block.conv.len()).collect();
/// assert_eq!(lengths[..3], [1, 2, 3]);
/// # }
/// ```
#[derive(Module, Debug)]
pub struct MobileNetV2Block {
    /// The convolutions.
    pub conv: Vec<ConvBn2d>,
    /// Whether the last convolution adds the block's input.
    #[module(skip)]
    residual: bool,
}

impl MobileNetV2Config {
    /// Each parameter is drawn on first use.
    pub(crate) fn init_lazy(&self, device: &Device) -> MobileNetV2 {
        assert!(
            self.width.is_finite() && self.width > 0.0,
            "the width must be positive and finite, got {}",
            self.width
        );
        let mut channels = rounded(32.0 * self.width);
        let mut features = vec![plain([self.input_channels, channels], 3, 2, device)];
        for (expansion, channels_out, count, first_stride) in STAGES {
            let channels_out = rounded(channels_out as f64 * self.width);
            for index in 0..count {
                let stride = if index == 0 { first_stride } else { 1 };
                let shape = [channels, channels_out];
                features.push(inverted_residual(shape, expansion, stride, device));
                channels = channels_out;
            }
        }
        let last = rounded(1280.0 * self.width.max(1.0));
        features.push(plain([channels, last], 1, 1, device));
        let mut classifier = LinearConfig::new(last, self.classes)
            .with_initializer(Initializer::Normal {
                mean: 0.0,
                std: 0.01,
            })
            .init(device);
        classifier.bias = Some(zeros(self.classes, device));
        MobileNetV2 {
            features,
            dropout: DropoutConfig::new(self.dropout).init(),
            classifier,
            form: self.form,
        }
    }
}

fn plain(channels: [usize; 2], kernel: usize, stride: usize, device: &Device) -> MobileNetV2Block {
    let conv = block(channels, kernel, stride, 1, Activation::Relu6);
    MobileNetV2Block {
        conv: vec![conv.init(device)],
        residual: false,
    }
}

fn inverted_residual(
    [channels_in, channels_out]: [usize; 2],
    expansion: usize,
    stride: usize,
    device: &Device,
) -> MobileNetV2Block {
    let (inner, relu6) = (channels_in * expansion, Activation::Relu6);
    let expand = (expansion != 1).then(|| block([channels_in, inner], 1, 1, 1, relu6));
    let depthwise = block([inner, inner], 3, stride, inner, relu6);
    let project = block([inner, channels_out], 1, 1, 1, Activation::Identity);
    let convs = expand.into_iter().chain([depthwise, project]);
    MobileNetV2Block {
        conv: convs.map(|conv| conv.init(device)).collect(),
        residual: stride == 1 && channels_in == channels_out,
    }
}

impl MobileNetV2 {
    /// Patterns and replacements from the keys of torchvision's `mobilenet_v2` to the names here;
    /// see [the crate](crate#weights-of-pytorch).
    pub const PYTORCH_KEYS: &'static [(&'static str, &'static str)] = &[
        // The two plain convolutions.
        (r"^features\.(0|18)\.0\.", "features.$1.conv.0.conv."),
        (r"^features\.(0|18)\.1\.", "features.$1.conv.0.norm."),
        // Convolutions with an activation are a sequence of their own, the last one's parts are not.
        (r"\.conv\.(\d)\.0\.", ".conv.$1.conv."),
        (r"\.conv\.(\d)\.1\.", ".conv.$1.norm."),
        // The first inverted residual does not expand.
        (
            r"^features\.1\.conv\.1\.weight$",
            "features.1.conv.1.conv.weight",
        ),
        (r"^features\.1\.conv\.2\.", "features.1.conv.1.norm."),
        (r"\.conv\.2\.weight$", ".conv.2.conv.weight"),
        (r"\.conv\.3\.", ".conv.2.norm."),
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
        let features = self.features.iter();
        let x = features.fold(images, |x, block| block.forward(x, self.form));
        let x = rows(adaptive_avg_pool2d(x, [1, 1]), &self.classifier);
        self.classifier.forward(self.dropout.forward(x))
    }

    /// Sets [`Recompute::Norm`] for all convolutions but those that add a shortcut, which get `ends`.
    /// See [the crate](crate#chains).
    #[must_use]
    pub fn with_rebuilt_chains(mut self, ends: Recompute) -> Self {
        for block in &mut self.features {
            let last = block.conv.len() - 1;
            for (index, conv) in block.conv.iter_mut().enumerate() {
                let is_end = block.residual && index == last;
                conv.settings.recompute = if is_end { ends } else { Recompute::Norm };
            }
        }
        self
    }

    /// Goes through the network in the order of [`forward`](Self::forward).
    pub(crate) fn walk(&self, input_shape: [usize; 4]) -> Walk {
        let mut walk = Walk::new(self.form, input_shape, &self.features[0].conv[0]);
        for (index, block) in self.features.iter().enumerate() {
            block.walk(&format!("features.{index}"), &mut walk);
        }
        walk.average_pool([1, 1]);
        walk.rows(&self.classifier);
        walk.dropout(&self.dropout);
        walk.linear("classifier", &self.classifier);
        walk
    }

    /// The blocks by name.
    pub(crate) fn blocks_mut(&mut self) -> Vec<(String, &mut ConvBn2d)> {
        let mut blocks = Vec::new();
        for (index, block) in self.features.iter_mut().enumerate() {
            for (place, conv) in block.conv.iter_mut().enumerate() {
                blocks.push((format!("features.{index}.conv.{place}"), conv));
            }
        }
        blocks
    }
}

impl MobileNetV2Block {
    fn forward(&self, input: Tensor<4>, form: Form) -> Tensor<4> {
        let residual = self.residual.then(|| input.clone());
        let (last, first) = self.parts();
        let x = first.iter().fold(input, |x, conv| form.forward(conv, x));
        match residual {
            Some(residual) => form.forward_residual(last, x, residual),
            None => form.forward(last, x),
        }
    }

    /// Lists what it keeps, in the order of [`forward`](Self::forward).
    fn walk(&self, name: &str, walk: &mut Walk) {
        let input = walk.current.clone();
        let (last, first) = self.parts();
        for (index, conv) in first.iter().enumerate() {
            walk.block(&format!("{name}.conv.{index}"), conv);
        }
        let name = format!("{name}.conv.{}", first.len());
        if self.residual {
            walk.block_residual(&name, last, &input);
        } else {
            walk.block(&name, last);
        }
    }

    /// The last convolution and those before it.
    fn parts(&self) -> (&ConvBn2d, &[ConvBn2d]) {
        self.conv.split_last().expect("a block has a convolution")
    }
}
