//! A model of Burn's own layers, fused where they are: its struct, its records and its optimizer stay, and
//! one line a block is edited.
//!
//! Trains both forms from the same weights, and prints the memory of a step of either.

use burn::module::Module;
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::nn::loss::CrossEntropyLossConfig;
use burn::nn::{BatchNorm, BatchNormConfig, Linear, LinearConfig, PaddingConfig2d};
use burn::optim::{AdamConfig, GradientsParams};
use burn::tensor::activation::relu;
use burn::tensor::{Device, Tensor};
use burn_conv_bn::{Activation, fuse};
use burn_conv_bn_memory::{CountingAllocator, StepMemory, measure_step};
use stripes::{CLASSES, say};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator::new();

/// Images of a step that trains, and of the one whose memory is measured.
const BATCH: usize = 64;
const MEASURED: usize = 256;

#[derive(Module, Debug)]
struct Network {
    conv1: Conv2d,
    bn1: BatchNorm,
    conv2: Conv2d,
    bn2: BatchNorm,
    conv3: Conv2d,
    bn3: BatchNorm,
    head: Linear,
}

impl Network {
    fn new(device: &Device) -> Self {
        let conv = |channels, stride| {
            Conv2dConfig::new(channels, [3, 3])
                .with_stride([stride, stride])
                .with_padding(PaddingConfig2d::Same)
                .with_bias(false)
                .init(device)
        };
        let norm = |channels| BatchNormConfig::new(channels).init(device);
        Self {
            conv1: conv([1, 16], 1),
            bn1: norm(16),
            conv2: conv([16, 32], 2),
            bn2: norm(32),
            conv3: conv([32, 32], 1),
            bn3: norm(32),
            head: LinearConfig::new(32, CLASSES).init(device),
        }
    }

    /// As it was.
    fn before(&self, images: Tensor<4>) -> Tensor<2> {
        let x = relu(self.bn1.forward(self.conv1.forward(images)));
        let x = relu(self.bn2.forward(self.conv2.forward(x)));
        let x = relu(self.bn3.forward(self.conv3.forward(x.clone())) + x);
        self.scores(x)
    }

    /// As it is: one edited line a block.
    fn after(&self, images: Tensor<4>) -> Tensor<2> {
        let relu = Activation::Relu;
        let x = fuse(&self.conv1, &self.bn1)
            .with_activation(relu)
            .forward(images);
        let x = fuse(&self.conv2, &self.bn2)
            .with_activation(relu)
            .forward(x);
        let x = fuse(&self.conv3, &self.bn3)
            .with_activation(relu)
            .forward_residual(x.clone(), x);
        self.scores(x)
    }

    fn scores(&self, x: Tensor<4>) -> Tensor<2> {
        self.head
            .forward(x.mean_dims(&[2, 3]).squeeze_dims(&[2, 3]))
    }
}

/// Results of a training.
struct Trained {
    memory: StepMemory,
    /// Loss and accuracy on images that the network has not seen.
    loss: f64,
    accuracy: f64,
}

/// Trains for so many steps, and measures one more.
fn train(forward: fn(&Network, Tensor<4>) -> Tensor<2>, steps: u64) -> Trained {
    let device = Device::flex().autodiff();
    device.seed(1);
    let mut network = Network::new(&device);
    let mut optimizer = AdamConfig::new().init();
    let loss = CrossEntropyLossConfig::new().init(&device);
    for step in 0..steps {
        let (images, classes) = stripes::batch(&stripes::examples(BATCH, step), &device);
        let error = loss.forward(forward(&network, images), classes);
        let grads = GradientsParams::from_grads(error.backward(), &network);
        network = optimizer.step(3e-3, network, grads);
    }

    let (images, classes) = stripes::batch(&stripes::examples(512, u64::MAX), &Device::flex());
    let scores = forward(&network.valid(), images);
    let unseen = loss.forward(scores.clone(), classes.clone());
    let accuracy = stripes::accuracy(scores, classes);

    let (images, classes) = stripes::batch(&stripes::examples(MEASURED, steps), &device);
    let memory = measure_step(
        &device,
        &ALLOCATOR,
        || loss.forward(forward(&network, images), classes),
        |error| error.backward(),
    );
    Trained {
        memory,
        loss: unseen.into_scalar::<f64>(),
        accuracy,
    }
}

/// Before and after the edit.
fn compare(steps: u64) -> [Trained; 2] {
    let title = format!("A step of {MEASURED} images");
    say!("{title:<33} kept by forward  peak of the step  accuracy  loss");
    type Forward = fn(&Network, Tensor<4>) -> Tensor<2>;
    let forms: [(&str, Forward); 2] = [
        ("relu(bn.forward(conv.forward(x)))", Network::before),
        ("fuse(&conv, &bn)", Network::after),
    ];
    forms.map(|(name, forward)| {
        let trained = train(forward, steps);
        let StepMemory {
            forward_end_bytes,
            peak_bytes,
        } = trained.memory;
        let [kept, peak] = [forward_end_bytes, peak_bytes].map(|bytes| bytes as f64 / 1024.0);
        say!(
            "{name:<33} {kept:>11.0} KiB {peak:>13.0} KiB {:>7.1} % {:>9.6}",
            100.0 * trained.accuracy,
            trained.loss
        );
        trained
    })
}

fn main() {
    compare(60);
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_edited_lines_learn_the_same_and_keep_less() {
        let [unfused, fused] = super::compare(60);
        let accuracies = [unfused.accuracy, fused.accuracy];
        assert!(accuracies.iter().all(|&part| part > 0.9), "{accuracies:?}");
        let (before, after) = (unfused.memory, fused.memory);
        assert!(
            2 * after.forward_end_bytes < before.forward_end_bytes
                && after.peak_bytes < before.peak_bytes,
            "{after:?} and {before:?}"
        );
    }
}
