use burn::config::Config;
use burn::module::Module;
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::nn::{Initializer, Linear, LinearConfig, PaddingConfig2d};
use burn::tensor::module::{adaptive_avg_pool2d, avg_pool2d};
use burn::tensor::ops::AvgPoolOptions;
use burn::tensor::{Device, Tensor};
use burn_conv_bn::{
    Activation, BatchNormActivation, BatchNormActivationConfig, ConvBn2d, Recompute,
};

use crate::Form;
use crate::head::rows;
use crate::init::{block, stem_pool, zeros};
use crate::walk::Walk;

/// Configuration of [`DenseNet`], made by [`init`](Self::init).
///
/// ```
/// use burn_conv_bn_models::{DenseNetConfig, Form};
///
/// let config = DenseNetConfig::densenet121(Form::Fused).with_classes(10);
/// assert_eq!(config.blocks, [6, 12, 24, 16]);
/// ```
#[derive(Config, Debug)]
#[non_exhaustive]
pub struct DenseNetConfig {
    /// How the layers run.
    pub form: Form,
    /// Numbers of layers in the four dense blocks.
    pub blocks: [usize; 4],
    /// Channels that each layer adds; the first convolution makes twice as many. Default: 32.
    #[config(default = 32)]
    pub growth: usize,
    /// Number of classes. Default: 1000.
    #[config(default = 1000)]
    pub classes: usize,
    /// Channels of the images. Default: 3.
    #[config(default = 3)]
    pub input_channels: usize,
}

/// A densely connected network ([Huang et al. 2016](https://arxiv.org/abs/1608.06993)) with torchvision's
/// layers, names and initial distributions.
///
/// Its layers normalize the concatenation of all outputs before them. Fused, concatenations and normalized values
/// are kept by nobody and rebuilt in the backward pass
/// ([`cat_channels`](burn_conv_bn::functional::cat_channels), [`BatchNormActivation`]), the 1x1 convolution and
/// its norm are one block, and a transition pools before its convolution, which commutes.
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::tensor::{Device, Distribution, Tensor};
/// use burn_conv_bn_models::{DenseNetConfig, Form};
///
/// let device = Device::flex().autodiff();
/// let network = DenseNetConfig::new(Form::Fused, [2, 2, 1, 1])
///     .with_growth(8)
///     .with_classes(10)
///     .init(&device);
/// let images = Tensor::<4>::random([2, 3, 64, 64], Distribution::Default, &device);
/// assert_eq!(network.forward(images).dims(), [2, 10]);
///
/// let bytes = |form| -> usize {
///     let saved = network.clone().with_form(form);
///     let saved = saved.saved_for_backward([2, 3, 64, 64]);
///     let own = saved.iter().filter(|(_, tensor)| !tensor.shared);
///     own.map(|(_, tensor)| tensor.bytes()).sum()
/// };
/// assert!(4 * bytes(Form::Fused) < bytes(Form::Unfused));
/// # }
/// ```
#[derive(Module, Debug)]
pub struct DenseNet {
    /// 7x7 convolution with stride 2, before a 3x3 max pool with stride 2.
    pub conv0: ConvBn2d,
    /// First dense block.
    pub denseblock1: Vec<DenseLayer>,
    /// Halves channels, height and width.
    pub transition1: Transition,
    /// Second dense block.
    pub denseblock2: Vec<DenseLayer>,
    /// Halves channels, height and width.
    pub transition2: Transition,
    /// Third dense block.
    pub denseblock3: Vec<DenseLayer>,
    /// Halves channels, height and width.
    pub transition3: Transition,
    /// Last dense block.
    pub denseblock4: Vec<DenseLayer>,
    /// Before the global average pool.
    pub norm5: BatchNormActivation,
    /// Output linear layer.
    pub classifier: Linear,
    #[module(skip)]
    pub(crate) form: Form,
}

/// A layer of a dense block: norm, 1x1 convolution to four times the growth, norm, 3x3 convolution.
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::tensor::Device;
/// use burn_conv_bn_models::{DenseNetConfig, Form};
///
/// let network = DenseNetConfig::new(Form::Fused, [2, 1, 1, 1]).init(&Device::flex());
/// // Over the first convolution's 64 channels and the first layer's 32.
/// let layer = &network.denseblock1[1];
/// assert_eq!(layer.conv1.conv.weight.dims(), [128, 96, 1, 1]);
/// assert_eq!(layer.conv2.weight.dims(), [32, 128, 3, 3]);
/// # }
/// ```
#[derive(Module, Debug)]
pub struct DenseLayer {
    /// Of all outputs before.
    pub norm1: BatchNormActivation,
    /// 1x1 convolution, with the second norm behind it.
    pub conv1: ConvBn2d,
    /// 3x3 convolution.
    pub conv2: Conv2d,
}

/// Between dense blocks: norm, 1x1 convolution to half the channels, 2x2 average pool.
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::tensor::Device;
/// use burn_conv_bn_models::{DenseNetConfig, Form};
///
/// let network = DenseNetConfig::new(Form::Fused, [2, 1, 1, 1]).init(&Device::flex());
/// assert_eq!(network.transition1.conv.weight.dims(), [64, 128, 1, 1]);
/// # }
/// ```
#[derive(Module, Debug)]
pub struct Transition {
    /// Of all outputs of the block.
    pub norm: BatchNormActivation,
    /// 1x1 convolution.
    pub conv: Conv2d,
}

impl DenseNetConfig {
    /// DenseNet-121.
    pub fn densenet121(form: Form) -> Self {
        Self::new(form, [6, 12, 24, 16])
    }

    /// Each parameter is drawn on first use.
    pub(crate) fn init_lazy(&self, device: &Device) -> DenseNet {
        assert!(
            self.growth > 0 && !self.blocks.contains(&0),
            "each block needs a layer, and each layer channels, got {:?} of {}",
            self.blocks,
            self.growth
        );
        let first = 2 * self.growth;
        let conv0 = block([self.input_channels, first], 7, 2, 1, Activation::Relu);
        let mut channels = first;
        let mut dense = |index: usize| {
            let layer = |index| layer(channels + index * self.growth, self.growth, device);
            let layers: Vec<_> = (0..self.blocks[index]).map(layer).collect();
            channels += layers.len() * self.growth;
            let all = channels;
            // No transition behind the last block.
            channels /= 2;
            (layers, all)
        };
        let (denseblock1, channels1) = dense(0);
        let (denseblock2, channels2) = dense(1);
        let (denseblock3, channels3) = dense(2);
        let (denseblock4, channels4) = dense(3);
        let mut classifier = LinearConfig::new(channels4, self.classes).init(device);
        classifier.bias = Some(zeros(self.classes, device));
        DenseNet {
            conv0: conv0.with_initializer(kaiming()).init(device),
            denseblock1,
            transition1: transition(channels1, device),
            denseblock2,
            transition2: transition(channels2, device),
            denseblock3,
            transition3: transition(channels3, device),
            denseblock4,
            norm5: norm(channels4, device),
            classifier,
            form: self.form,
        }
    }
}

fn layer(channels: usize, growth: usize, device: &Device) -> DenseLayer {
    let inner = 4 * growth;
    let conv1 = block([channels, inner], 1, 1, 1, Activation::Relu);
    DenseLayer {
        norm1: norm(channels, device),
        conv1: conv1.with_initializer(kaiming()).init(device),
        conv2: conv([inner, growth], 3, device),
    }
}

/// Kaiming normal over the fan in, for ReLU, as torchvision's: unlike its other networks'.
fn kaiming() -> Initializer {
    Initializer::KaimingNormal {
        gain: 2.0f64.sqrt(),
        fan_out_only: false,
    }
}

fn norm(channels: usize, device: &Device) -> BatchNormActivation {
    BatchNormActivationConfig::new(channels).init(device)
}

fn conv(channels: [usize; 2], kernel: usize, device: &Device) -> Conv2d {
    let padding = kernel / 2;
    Conv2dConfig::new(channels, [kernel; 2])
        .with_padding(PaddingConfig2d::Explicit(
            padding, padding, padding, padding,
        ))
        .with_bias(false)
        .with_initializer(kaiming())
        .init(device)
}

fn transition(channels: usize, device: &Device) -> Transition {
    Transition {
        norm: norm(channels, device),
        conv: conv([channels, channels / 2], 1, device),
    }
}

/// Pairs for a layer of a dense block, from its number in torchvision's to the one here, and those for the rest.
macro_rules! pytorch_keys {
    ($($layer:literal => $index:literal;)*) => {
        &[
            // As the files of trained weights have them.
            (r"(\.denselayer\d+)\.(norm|conv)\.([12])\.", "$1.$2$3."),
            (r"^features\.", ""),
            $(
                (
                    concat!(r"\.denselayer", $layer, r"\."),
                    concat!(".", $index, "."),
                ),
            )*
            (r"^conv0\.weight$", "conv0.conv.weight"),
            (r"^norm0\.", "conv0.norm."),
            (r"\.conv1\.weight$", ".conv1.conv.weight"),
            (r"\.norm2\.", ".conv1.norm."),
            (r"\.norm1\.", ".norm1.norm."),
            (r"^(transition\d)\.norm\.", "$1.norm.norm."),
            (r"^norm5\.", "norm5.norm."),
            (r"\.norm\.weight$", ".norm.gamma"),
            (r"\.norm\.bias$", ".norm.beta"),
        ]
    };
}

impl DenseNet {
    /// Patterns and replacements from the keys of torchvision's `densenet121` to the names here; see
    /// [the crate](crate#weights-of-pytorch).
    pub const PYTORCH_KEYS: &'static [(&'static str, &'static str)] = pytorch_keys! {
        1 => 0; 2 => 1; 3 => 2; 4 => 3; 5 => 4; 6 => 5; 7 => 6; 8 => 7;
        9 => 8; 10 => 9; 11 => 10; 12 => 11; 13 => 12; 14 => 13; 15 => 14; 16 => 15;
        17 => 16; 18 => 17; 19 => 18; 20 => 19; 21 => 20; 22 => 21; 23 => 22; 24 => 23;
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
    /// As [`ConvBn2d::forward`]: among others if a training batch leaves a single value per
    /// channel, as one image of 32x32 does.
    pub fn forward(&self, images: Tensor<4>) -> Tensor<2> {
        let form = self.form;
        let mut x = form.forward_max_pool(&self.conv0, images, &stem_pool());
        for (_, layers, transition) in self.blocks() {
            let mut features = vec![x];
            for layer in layers {
                let all = form.concatenate(features.clone());
                features.push(layer.forward(all, form));
            }
            x = form.concatenate(features);
            if let Some(transition) = transition {
                x = transition.forward(x, form);
            }
        }
        let x = adaptive_avg_pool2d(form.normalize(&self.norm5, x), [1, 1]);
        self.classifier.forward(rows(x, &self.classifier))
    }

    /// Sets [`Recompute::Norm`] for the 1x1 convolutions of the dense layers, and `ends` for the first convolution,
    /// which is one op with the max pool behind.
    ///
    /// A 1x1 convolution's block then keeps the convolution's output instead of its own: as many bytes as with
    /// `Recompute::Conv`, and no convolution is recomputed.
    #[must_use]
    pub fn with_rebuilt_chains(mut self, ends: Recompute) -> Self {
        for (name, block) in self.blocks_mut() {
            let is_end = name == "conv0";
            block.settings.recompute = if is_end { ends } else { Recompute::Norm };
        }
        self
    }

    /// Goes through the network in the order of [`forward`](Self::forward).
    pub(crate) fn walk(&self, input_shape: [usize; 4]) -> Walk {
        let mut walk = Walk::new(self.form, input_shape, &self.conv0);
        walk.block_max_pool("conv0", &self.conv0, &stem_pool());
        for (index, (name, layers, transition)) in (1..).zip(self.blocks()) {
            let mut features = vec![walk.current.clone()];
            for (layer, parts) in layers.iter().enumerate() {
                let name = format!("{name}.{layer}");
                walk.concatenate(&name, &features);
                walk.norm(&format!("{name}.norm1"), &parts.norm1);
                walk.block(&format!("{name}.conv1"), &parts.conv1);
                walk.conv(&format!("{name}.conv2"), &parts.conv2);
                features.push(walk.current.clone());
            }
            walk.concatenate(name, &features);
            if let Some(transition) = transition {
                transition.walk(&format!("transition{index}"), &mut walk);
            }
        }
        walk.norm("norm5", &self.norm5);
        walk.average_pool([1, 1]);
        walk.rows(&self.classifier);
        walk.linear("classifier", &self.classifier);
        walk
    }

    fn blocks(&self) -> [(&'static str, &[DenseLayer], Option<&Transition>); 4] {
        [
            ("denseblock1", &self.denseblock1, Some(&self.transition1)),
            ("denseblock2", &self.denseblock2, Some(&self.transition2)),
            ("denseblock3", &self.denseblock3, Some(&self.transition3)),
            ("denseblock4", &self.denseblock4, None),
        ]
    }

    /// The fused blocks by name.
    pub(crate) fn blocks_mut(&mut self) -> Vec<(String, &mut ConvBn2d)> {
        let mut blocks = vec![("conv0".to_owned(), &mut self.conv0)];
        let dense = [
            &mut self.denseblock1,
            &mut self.denseblock2,
            &mut self.denseblock3,
            &mut self.denseblock4,
        ];
        for (number, layers) in (1..).zip(dense) {
            for (index, layer) in layers.iter_mut().enumerate() {
                let name = format!("denseblock{number}.{index}.conv1");
                blocks.push((name, &mut layer.conv1));
            }
        }
        blocks
    }
}

impl DenseLayer {
    fn forward(&self, input: Tensor<4>, form: Form) -> Tensor<4> {
        let x = form.forward(&self.conv1, form.normalize(&self.norm1, input));
        form.convolve(&self.conv2, x)
    }
}

impl Transition {
    fn forward(&self, input: Tensor<4>, form: Form) -> Tensor<4> {
        let halve = |x| avg_pool2d(x, AvgPoolOptions::new([2, 2]));
        let x = form.normalize(&self.norm, input);
        match form {
            Form::Fused => form.convolve(&self.conv, halve(x)),
            Form::Unfused => halve(form.convolve(&self.conv, x)),
        }
    }

    fn walk(&self, name: &str, walk: &mut Walk) {
        let conv = format!("{name}.conv");
        walk.norm(&format!("{name}.norm"), &self.norm);
        match walk.form {
            Form::Fused => {
                walk.halve(name);
                walk.conv(&conv, &self.conv);
            }
            Form::Unfused => {
                walk.conv(&conv, &self.conv);
                walk.halve(name);
            }
        }
    }
}
