//! Fuses the blocks of a model that is trained already, and trains on with the same optimizer.
//!
//! `ConvBn2d::from_parts` takes Burn's own modules with everything that is in them: parameters,
//! running statistics and the identities by which an optimizer knows them. A saved record of the old
//! model loads into the new one as well, where the fields are called `conv` and `norm` within a field
//! of the block's name.

use burn::module::Module;
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::nn::loss::CrossEntropyLossConfig;
use burn::nn::{BatchNorm, BatchNormConfig, Linear, LinearConfig};
use burn::optim::{AdamConfig, GradientsParams, ModuleOptimizer};
use burn::tensor::activation::relu;
use burn::tensor::{Device, Int, Tensor};
use burn_conv_bn::{Activation, ConvBn2d};
use stripes::{CLASSES, say};

const BATCH: usize = 64;
const CHANNELS: usize = 24;

/// The model as it was.
#[derive(Module, Debug)]
struct Before {
    conv1: Conv2d,
    norm1: BatchNorm,
    conv2: Conv2d,
    norm2: BatchNorm,
    head: Linear,
}

/// The same with fused blocks.
#[derive(Module, Debug)]
struct After {
    block1: ConvBn2d,
    block2: ConvBn2d,
    head: Linear,
}

/// What both are to the training.
trait Network: Module {
    fn forward(&self, images: Tensor<4>) -> Tensor<2>;
}

fn pool(x: Tensor<4>, head: &Linear) -> Tensor<2> {
    head.forward(x.mean_dims(&[2, 3]).squeeze_dims(&[2, 3]))
}

impl Before {
    fn new(device: &Device) -> Self {
        let conv = |channels| {
            Conv2dConfig::new(channels, [3, 3])
                .with_bias(false)
                .init(device)
        };
        Self {
            conv1: conv([1, CHANNELS]),
            norm1: BatchNormConfig::new(CHANNELS).init(device),
            conv2: conv([CHANNELS, CHANNELS]),
            norm2: BatchNormConfig::new(CHANNELS).init(device),
            head: LinearConfig::new(CHANNELS, CLASSES).init(device),
        }
    }
}

impl From<Before> for After {
    fn from(before: Before) -> Self {
        Self {
            block1: ConvBn2d::from_parts(before.conv1, before.norm1, Activation::Relu),
            block2: ConvBn2d::from_parts(before.conv2, before.norm2, Activation::Relu),
            head: before.head,
        }
    }
}

impl Network for Before {
    fn forward(&self, images: Tensor<4>) -> Tensor<2> {
        let x = relu(self.norm1.forward(self.conv1.forward(images)));
        let x = relu(self.norm2.forward(self.conv2.forward(x)));
        pool(x, &self.head)
    }
}

impl Network for After {
    fn forward(&self, images: Tensor<4>) -> Tensor<2> {
        pool(self.block2.forward(self.block1.forward(images)), &self.head)
    }
}

fn train<N: Network>(
    mut network: N,
    optimizer: &mut ModuleOptimizer,
    steps: core::ops::Range<u64>,
    device: &Device,
) -> N {
    let loss = CrossEntropyLossConfig::new().init(device);
    for step in steps {
        let (images, classes) = stripes::batch(&stripes::examples(BATCH, step), device);
        let error = loss.forward(network.forward(images), classes);
        if step % 10 == 0 {
            say!(
                "  step {step:>3}: loss {:.3}",
                error.clone().into_scalar::<f32>()
            );
        }
        let grads = GradientsParams::from_grads(error.backward(), &network);
        network = optimizer.step(3e-3, network, grads);
    }
    network
}

/// Accuracy before and after the conversion and after more training, and the largest difference that
/// the conversion made to a score.
fn convert(steps: u64) -> ([f64; 3], f64) {
    let device = Device::flex().autodiff();
    device.seed(1);
    let (images, classes) = stripes::batch(&stripes::examples(512, u64::MAX), &Device::flex());
    let accuracy = |scores: Tensor<2>| stripes::accuracy(scores, classes.clone() as Tensor<1, Int>);

    say!("Conv2d, BatchNorm and relu:");
    let mut optimizer = AdamConfig::new().init();
    let before = train(Before::new(&device), &mut optimizer, 0..steps, &device);
    let old = before.valid().forward(images.clone());

    let after = After::from(before);
    let new = after.valid().forward(images.clone());
    let difference = (new.clone() - old.clone()).abs().max().into_scalar::<f32>();

    say!("the same parameters and optimizer in ConvBn2d:");
    let after = train(after, &mut optimizer, steps..2 * steps, &device);
    let last = after.valid().forward(images);
    (
        [accuracy(old), accuracy(new), accuracy(last)],
        difference.into(),
    )
}

fn main() {
    let ([before, converted, trained], difference) = convert(40);
    say!("accuracy: {:.1} % unfused", 100.0 * before);
    say!(
        "          {:.1} % converted, no score moved by more than {difference:.0e}",
        100.0 * converted
    );
    say!("          {:.1} % after training on", 100.0 * trained);
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_converted_model_is_the_same_and_learns_on() {
        let ([before, converted, trained], difference) = super::convert(40);
        assert!(difference < 1e-4, "{difference}");
        assert!(
            (before - converted).abs() < 0.01,
            "{before} and {converted}"
        );
        assert!(
            trained > 0.9 && trained > before - 0.02,
            "{before} then {trained}"
        );
    }
}
