//! Trains on with frozen norms, as one does with small batches: each norm keeps normalizing with
//! the statistics of the first training and leaves them alone.
//!
//! A frozen norm is folded into the weight for the step, so the block runs one convolution in the
//! forward pass and recomputes nothing in the backward pass.

use burn::module::Module;
use burn::nn::loss::CrossEntropyLossConfig;
use burn::nn::{Linear, LinearConfig};
use burn::optim::{AdamConfig, GradientsParams};
use burn::tensor::{Device, Tensor};
use burn_conv_bn::{Activation, ConvBn2d, ConvBn2dConfig};
use stripes::{CLASSES, Example, SIZE, say};

const CHANNELS: usize = 24;

#[derive(Module, Debug)]
struct Network {
    block1: ConvBn2d,
    block2: ConvBn2d,
    head: Linear,
}

impl Network {
    fn new(device: &Device) -> Self {
        let block = |channels| {
            ConvBn2dConfig::new(channels, [3, 3])
                .with_activation(Activation::Relu)
                .init(device)
        };
        Self {
            block1: block([1, CHANNELS]),
            block2: block([CHANNELS, CHANNELS]),
            head: LinearConfig::new(CHANNELS, CLASSES).init(device),
        }
    }

    fn forward(&self, images: Tensor<4>) -> Tensor<2> {
        let x = self.block2.forward(self.block1.forward(images));
        self.head
            .forward(x.mean_dims(&[2, 3]).squeeze_dims(&[2, 3]))
    }

    /// Norms that take no part in training: their statistics stay, and gamma and beta too.
    fn freeze_norms(mut self) -> Self {
        self.block1.norm = self.block1.norm.freeze();
        self.block2.norm = self.block2.norm.freeze();
        self
    }

    fn running_means(&self) -> Vec<f32> {
        [&self.block1, &self.block2]
            .into_iter()
            .flat_map(|block| {
                block
                    .norm
                    .running_mean
                    .value_sync()
                    .into_data()
                    .iter::<f32>()
                    .collect::<Vec<_>>()
            })
            .collect()
    }
}

/// The second task: the same stripes at a tenth of the contrast, on a bright ground.
fn faint(examples: Vec<Example>) -> Vec<Example> {
    examples
        .into_iter()
        .map(|(image, class)| (image.into_iter().map(|x| 0.5 + 0.1 * x).collect(), class))
        .collect()
}

fn train(
    mut network: Network,
    batch: usize,
    steps: u64,
    device: &Device,
    change: fn(Vec<Example>) -> Vec<Example>,
) -> Network {
    let mut optimizer = AdamConfig::new().init();
    let loss = CrossEntropyLossConfig::new().init(device);
    for step in 0..steps {
        let examples = change(stripes::examples(batch, step));
        let (images, classes) = stripes::batch(&examples, device);
        let error = loss.forward(network.forward(images), classes);
        if step % 20 == 0 {
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

/// Accuracy on the second task before and after fine-tuning, and whether the statistics stayed.
fn fine_tune() -> ([f64; 2], bool) {
    const SMALL_BATCH: usize = 4;
    let device = Device::flex().autodiff();
    device.seed(1);
    say!("first training, batches of 64:");
    let network = train(Network::new(&device), 64, 60, &device, |examples| examples);

    let (images, classes) =
        stripes::batch(&faint(stripes::examples(512, u64::MAX)), &Device::flex());
    let accuracy = |network: &Network| {
        stripes::accuracy(network.valid().forward(images.clone()), classes.clone())
    };
    let before = accuracy(&network);
    let means = network.running_means();

    say!("fine-tuning on another task with frozen norms, batches of {SMALL_BATCH}:");
    let network = network.freeze_norms();
    for tensor in network
        .block2
        .saved_for_backward([SMALL_BATCH, CHANNELS, SIZE - 2, SIZE - 2])
    {
        let kind = if tensor.shared { "(shared)" } else { "" };
        say!(
            "  keeps {:<9} {:>7} bytes {kind}",
            tensor.name,
            tensor.bytes()
        );
    }
    let network = train(network, SMALL_BATCH, 200, &device, faint);
    let after = accuracy(&network);
    ([before, after], network.running_means() == means)
}

fn main() {
    let ([before, after], stayed) = fine_tune();
    say!(
        "accuracy on the second task: {:.1} % before, {:.1} % after",
        100.0 * before,
        100.0 * after
    );
    say!(
        "running statistics {}",
        if stayed { "unchanged" } else { "CHANGED" }
    );
}

#[cfg(test)]
mod tests {
    #[test]
    fn it_learns_and_leaves_the_statistics_alone() {
        let ([before, after], stayed) = super::fine_tune();
        assert!(stayed);
        assert!(after > 0.8 && after > before + 0.1, "{before} then {after}");
    }
}
