//! Networks whose norms are folded into their convolutions.

use burn::nn::Linear;
use burn::nn::conv::Conv2d;
use burn::tensor::activation::{log_softmax, relu};
use burn::tensor::module::{adaptive_avg_pool2d, max_pool2d};
use burn::tensor::ops::MaxPoolOptions;
use burn::tensor::{FloatDType, Tensor};
use burn_conv_bn::{Activation, ConvBn2d, ConvBnModule, FoldError};
use burn_conv_bn_models::{
    Form, MobileNetV2, MobileNetV2Block, Net, ResNet, ResNetBlock, Vgg, VggConfig,
};

use crate::model::{Network, padded};

/// A network for evaluation, of Burn's convolutions with a bias and without norms.
///
/// It computes what the network that it was folded from does in evaluation, up to rounding.
#[derive(Clone, Debug)]
pub struct FoldedNetwork {
    stages: Vec<Stage>,
    /// Height and width that the last images are averaged to.
    pooled: usize,
    /// Linear layers, with ReLU between them.
    head: Vec<Linear>,
}

/// A part of a network, through which images go in order.
#[derive(Clone, Debug)]
enum Stage {
    /// A block on its own.
    Block(FoldedBlock),
    /// Blocks in a row, whose last adds what goes into the first before its activation.
    Residual {
        blocks: Vec<FoldedBlock>,
        /// Brings what is added to the shape of the sum.
        downsample: Option<FoldedBlock>,
    },
    /// A max pool.
    Pool(MaxPoolOptions<2>),
}

/// One convolution, and what is applied to it.
#[derive(Clone, Debug)]
struct FoldedBlock {
    conv: Conv2d,
    activation: Activation,
}

impl FoldedBlock {
    fn new(block: &ConvBn2d) -> Result<Self, FoldError> {
        Ok(Self {
            conv: block.fold()?,
            activation: block.settings.activation,
        })
    }

    fn with_precision(self, dtype: FloatDType) -> Self {
        Self {
            conv: self.conv.with_precision(dtype),
            activation: self.activation,
        }
    }

    fn forward(&self, images: Tensor<4>) -> Tensor<4> {
        self.activation.forward(self.conv.forward(images))
    }

    fn forward_residual(&self, images: Tensor<4>, residual: Tensor<4>) -> Tensor<4> {
        self.activation
            .forward(self.conv.forward(images) + residual)
    }
}

impl Stage {
    fn with_precision(self, dtype: FloatDType) -> Self {
        let cast = |block: FoldedBlock| block.with_precision(dtype);
        match self {
            Self::Block(block) => Self::Block(cast(block)),
            Self::Residual { blocks, downsample } => Self::Residual {
                blocks: blocks.into_iter().map(cast).collect(),
                downsample: downsample.map(cast),
            },
            pool @ Self::Pool(_) => pool,
        }
    }

    fn forward(&self, images: Tensor<4>) -> Tensor<4> {
        match self {
            Self::Block(block) => block.forward(images),
            Self::Residual { blocks, downsample } => {
                let residual = match downsample {
                    Some(downsample) => downsample.forward(images.clone()),
                    None => images.clone(),
                };
                let (last, first) = blocks.split_last().expect("a row has a block");
                let images = first.iter().fold(images, |x, block| block.forward(x));
                last.forward_residual(images, residual)
            }
            Self::Pool(options) => max_pool2d(images, options.clone()),
        }
    }
}

impl FoldedNetwork {
    /// Folds a network, which must be in evaluation mode.
    ///
    /// # Errors
    ///
    /// [`FoldError::NoRunningStatistics`] for the tutorial's network, which normalizes with each
    /// batch's statistics; [`FoldError::NotFinite`] if a channel's scale or shift is not finite.
    pub fn of(network: &Network) -> Result<Self, FoldError> {
        match network {
            Network::Tutorial(net) => Self::tutorial(net),
            Network::ResNet(net) => Self::resnet(net),
            Network::Vgg(net) => Self::vgg(net),
            Network::MobileNetV2(net) => Self::mobilenet(net),
        }
    }

    /// The same with convolutions that compute in `dtype`, which images must then have. Linear
    /// layers stay as they are.
    #[must_use]
    pub fn with_activations(mut self, dtype: FloatDType) -> Self {
        let stages = self.stages.into_iter();
        self.stages = stages.map(|stage| stage.with_precision(dtype)).collect();
        self
    }

    /// Log-probabilities of the classes.
    ///
    /// # Shapes
    ///
    /// - `images`: `[batch, 1, 28, 28]`, normalized as
    ///   [`MnistBatcher`](crate::data::MnistBatcher) does
    /// - output: `[batch, 10]`
    pub fn forward(&self, images: Tensor<4>) -> Tensor<2> {
        let x = self
            .stages
            .iter()
            .fold(padded(images), |x, stage| stage.forward(x));
        let x = adaptive_avg_pool2d(x, [self.pooled; 2]).flatten::<2>(1, 3);
        let x = x.cast(self.head[0].weight.val().dtype());
        let scores = self
            .head
            .iter()
            .enumerate()
            .fold(x, |x, (index, linear)| match index {
                0 => linear.forward(x),
                _ => linear.forward(relu(x)),
            });
        log_softmax(scores, 1)
    }

    /// Refuses what has no running statistics: its first block says why.
    fn tutorial(net: &Net) -> Result<Self, FoldError> {
        FoldedBlock::new(&net.conv1)?;
        Err(FoldError::NoRunningStatistics)
    }

    fn resnet(net: &ResNet) -> Result<Self, FoldError> {
        let mut stages = vec![
            Stage::Block(FoldedBlock::new(&net.conv1)?),
            Stage::Pool(
                MaxPoolOptions::new([3, 3])
                    .with_stride([2, 2])
                    .with_padding([1, 1]),
            ),
        ];
        for layer in [&net.layer1, &net.layer2, &net.layer3, &net.layer4] {
            for block in layer {
                stages.push(residual_block(block)?);
            }
        }
        Ok(Self {
            stages,
            pooled: 1,
            head: vec![net.fc.clone()],
        })
    }

    fn vgg(net: &Vgg) -> Result<Self, FoldError> {
        let mut features = net.features.iter();
        let mut stages = Vec::new();
        for count in VggConfig::vgg16_bn(Form::Fused).blocks {
            for block in features.by_ref().take(count) {
                stages.push(Stage::Block(FoldedBlock::new(block)?));
            }
            stages.push(Stage::Pool(MaxPoolOptions::new([2, 2])));
        }
        Ok(Self {
            stages,
            pooled: 7,
            head: net.classifier.clone(),
        })
    }

    fn mobilenet(net: &MobileNetV2) -> Result<Self, FoldError> {
        let mut stages = Vec::new();
        for block in &net.features {
            let blocks: Vec<FoldedBlock> = block
                .conv
                .iter()
                .map(FoldedBlock::new)
                .collect::<Result<_, _>>()?;
            if adds_its_input(block) {
                stages.push(Stage::Residual {
                    blocks,
                    downsample: None,
                });
            } else {
                stages.extend(blocks.into_iter().map(Stage::Block));
            }
        }
        Ok(Self {
            stages,
            pooled: 1,
            head: vec![net.classifier.clone()],
        })
    }
}

fn residual_block(block: &ResNetBlock) -> Result<Stage, FoldError> {
    let convs = [Some(&block.conv1), Some(&block.conv2), block.conv3.as_ref()];
    let blocks = convs.into_iter().flatten().map(FoldedBlock::new);
    let downsample = block.downsample.as_ref().map(FoldedBlock::new);
    Ok(Stage::Residual {
        blocks: blocks.collect::<Result<_, _>>()?,
        downsample: downsample.transpose()?,
    })
}

/// Whether an inverted residual is one: it keeps the shape of its images. The first and the last
/// block of the network, of one convolution each, do not.
fn adds_its_input(block: &MobileNetV2Block) -> bool {
    let [first, .., last] = block.conv.as_slice() else {
        return false;
    };
    let [_, channels_in, ..] = first.conv.weight.dims();
    let [channels_out, ..] = last.conv.weight.dims();
    let strides = block.conv.iter().all(|block| block.conv.stride == [1, 1]);
    strides && channels_in * first.conv.groups == channels_out
}

#[cfg(test)]
mod tests {
    use super::*;

    use burn::module::Module;
    use burn::tensor::{DType, Device, Distribution, Tolerance};
    use burn_conv_bn::{NormVariant, Recompute};
    use clap::ValueEnum;

    use crate::data::SIDE;
    use crate::model::{ModelChoice, NetworkOptions};

    fn network(choice: ModelChoice, device: &Device) -> Network {
        let options = NetworkOptions {
            form: Form::Fused,
            norm: NormVariant::BatchNorm,
            dropout: choice.default_dropout(),
            recompute: Recompute::Conv,
            max_workspace: None,
        };
        choice.init(&options, device)
    }

    /// A few batches give the running statistics values that have an effect.
    #[test]
    fn a_folded_network_predicts_the_same() {
        let device = Device::flex().autodiff();
        let images = |count| {
            Tensor::<4>::random(
                [count, 1, SIDE, SIDE],
                Distribution::Normal(0.3, 1.0),
                &device,
            )
        };
        for &choice in ModelChoice::value_variants() {
            if !choice.tracks_statistics() {
                continue;
            }
            let network = network(choice, &device);
            for _ in 0..4 {
                network.forward(images(4));
            }
            let network = network.valid();
            let folded = FoldedNetwork::of(&network).expect("it tracks statistics");
            let images = images(3).without_autodiff();
            let wanted = network.forward(images.clone()).into_data();
            let got = folded.forward(images).into_data();
            got.assert_approx_eq::<f32>(&wanted, Tolerance::rel_abs(1e-2, 1e-2));
        }
    }

    /// Rounded to 2^-9 in each of some 20 layers.
    #[test]
    fn a_folded_network_predicts_in_mixed_precision() {
        let device = Device::flex().autodiff();
        let images =
            Tensor::<4>::random([4, 1, SIDE, SIDE], Distribution::Normal(0.3, 1.0), &device);
        let network = network(ModelChoice::Resnet18, &device);
        for _ in 0..4 {
            network.forward(images.clone());
        }
        let folded = FoldedNetwork::of(&network.valid()).expect("it tracks statistics");
        let images = images.without_autodiff();
        let values = |output: Tensor<2>| -> Vec<f64> {
            assert_eq!(output.dtype(), DType::F32);
            output.into_data().iter::<f64>().collect()
        };
        let wanted = values(folded.forward(images.clone()));
        let folded = folded.with_activations(FloatDType::BF16);
        let got = values(folded.forward(images.cast(FloatDType::BF16)));
        let norm = |values: Vec<f64>| values.iter().map(|value| value * value).sum::<f64>();
        let differences = got.iter().zip(&wanted).map(|(got, wanted)| got - wanted);
        let distance = (norm(differences.collect()) / norm(wanted)).sqrt();
        assert!(0.0 < distance && distance < 0.25, "{distance}");
    }

    #[test]
    fn what_has_no_running_statistics_is_refused() {
        let device = Device::flex();
        let refused = FoldedNetwork::of(&network(ModelChoice::Tutorial, &device));
        assert_eq!(refused.err(), Some(FoldError::NoRunningStatistics));
    }
}
