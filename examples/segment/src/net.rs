//! The network, with one definition and two forms.

use burn::module::Module;
use burn::nn::PaddingConfig3d;
use burn::nn::conv::{Conv3d, Conv3dConfig, ConvTranspose3d, ConvTranspose3dConfig};
use burn::tensor::activation::relu;
use burn::tensor::ops::MaxPoolOptions;
use burn::tensor::{Device, Tensor};
use burn_conv_bn::functional::{cat_channels, max_pool2d};
use burn_conv_bn::{
    Activation, BatchNormActivation, BatchNormActivationConfig, ConvBn3d, ConvBn3dConfig,
    ConvBnError,
};

/// How the network runs; it holds the same modules either way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// By the layers and functions of `burn-conv-bn`.
    Fused,
    /// By Burn's own.
    Unfused,
}

impl Form {
    /// Convolution, norm and ReLU.
    fn block(self, block: &ConvBn3d, x: Tensor<5>) -> Tensor<5> {
        match self {
            Self::Fused => block.forward(x),
            Self::Unfused => relu(block.norm.forward(block.conv.forward(x))),
        }
    }

    /// Norm and ReLU behind a layer of Burn's own.
    fn normalize(self, layer: &BatchNormActivation, x: Tensor<5>) -> Tensor<5> {
        match self {
            Self::Fused => layer.forward(x),
            Self::Unfused => relu(layer.norm.forward(x)),
        }
    }

    /// Concatenation along channels.
    fn concatenate(self, tensors: Vec<Tensor<5>>) -> Tensor<5> {
        match self {
            Self::Fused => or_panic(cat_channels(tensors)),
            Self::Unfused => Tensor::cat(tensors, 1),
        }
    }

    /// Max pool over windows of 2x2x2. Neither library has it in three dimensions: planes are pooled, then
    /// pairs of them.
    fn max_pool(self, x: Tensor<5>) -> Tensor<5> {
        let pool = |x: Tensor<4>, window: [usize; 2]| {
            let options = MaxPoolOptions::new(window);
            match self {
                Self::Fused => or_panic(max_pool2d(x, options)),
                Self::Unfused => burn::tensor::module::max_pool2d(x, options),
            }
        };
        let [batch, channels, depth, height, width] = x.dims();
        let planes = pool(x.reshape([batch, channels * depth, height, width]), [2, 2]);
        let [_, _, height, width] = planes.dims();
        let lines = planes.reshape([batch, channels, depth, height * width]);
        pool(lines, [2, 1]).reshape([batch, channels, depth / 2, height, width])
    }
}

fn or_panic<T>(result: Result<T, ConvBnError>) -> T {
    result.unwrap_or_else(|error| panic!("{error}"))
}

/// A U-Net ([Çiçek et al. 2016](https://arxiv.org/abs/1606.06650)) of three levels, with 8, 16 and 32
/// channels.
#[derive(Module, Debug)]
pub struct UNet {
    encoder: Vec<Level>,
    bottom: Level,
    decoder: Vec<Up>,
    head: Conv3d,
}

/// Two 3x3x3 blocks.
#[derive(Module, Debug)]
struct Level {
    block1: ConvBn3d,
    block2: ConvBn3d,
}

/// Doubles depth, height and width, and joins the encoder's level of that size.
#[derive(Module, Debug)]
struct Up {
    conv: ConvTranspose3d,
    norm: BatchNormActivation,
    level: Level,
}

impl UNet {
    /// Draws the parameters on first use.
    pub fn new(device: &Device) -> Self {
        let level = |channels_in, channels_out| Level::new([channels_in, channels_out], device);
        Self {
            encoder: vec![level(1, 8), level(8, 16)],
            bottom: level(16, 32),
            decoder: vec![Up::new([32, 16], device), Up::new([16, 8], device)],
            head: Conv3dConfig::new([8, 1], [1, 1, 1]).init(device),
        }
    }

    /// Scores above 0 for voxels within a body.
    ///
    /// `volumes` and the output are `[batch, 1, depth, height, width]`, of sizes that 4 divides.
    pub fn forward(&self, form: Form, volumes: Tensor<5>) -> Tensor<5> {
        let mut x = volumes;
        let mut skips = Vec::new();
        for level in &self.encoder {
            x = level.forward(form, x);
            skips.push(x.clone());
            x = form.max_pool(x);
        }
        x = self.bottom.forward(form, x);
        for (up, skip) in self.decoder.iter().zip(skips.into_iter().rev()) {
            x = up.forward(form, x, skip);
        }
        self.head.forward(x)
    }
}

impl Level {
    fn new([channels_in, channels_out]: [usize; 2], device: &Device) -> Self {
        let block = |channels| {
            ConvBn3dConfig::new(channels, [3, 3, 3])
                .with_padding(PaddingConfig3d::Same)
                .with_activation(Activation::Relu)
                .init(device)
        };
        Self {
            block1: block([channels_in, channels_out]),
            block2: block([channels_out, channels_out]),
        }
    }

    fn forward(&self, form: Form, x: Tensor<5>) -> Tensor<5> {
        form.block(&self.block2, form.block(&self.block1, x))
    }
}

impl Up {
    fn new([channels_in, channels_out]: [usize; 2], device: &Device) -> Self {
        Self {
            // Without a bias, which the norm would subtract.
            conv: ConvTranspose3dConfig::new([channels_in, channels_out], [2, 2, 2])
                .with_stride([2, 2, 2])
                .with_bias(false)
                .init(device),
            norm: BatchNormActivationConfig::new(channels_out).init(device),
            level: Level::new([2 * channels_out, channels_out], device),
        }
    }

    fn forward(&self, form: Form, x: Tensor<5>, skip: Tensor<5>) -> Tensor<5> {
        let x = form.normalize(&self.norm, self.conv.forward(x));
        self.level.forward(form, form.concatenate(vec![skip, x]))
    }
}
