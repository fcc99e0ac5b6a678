//! A network of fused blocks, trained in Burn's usual way.
//!
//! `ConvBn2d` stands where `Conv2d`, `BatchNorm` and an activation stood before; nothing else of the
//! model or of the training loop changes.

use burn::module::Module;
use burn::nn::loss::CrossEntropyLossConfig;
use burn::nn::{Linear, LinearConfig, PaddingConfig2d};
use burn::optim::{AdamConfig, GradientsParams};
use burn::tensor::{Device, Tensor};
use burn_conv_bn::{Activation, ConvBn2d, ConvBn2dConfig};
use stripes::{CLASSES, SIZE, say};

/// Three blocks, of which the last adds its input before its activation.
#[derive(Module, Debug)]
struct Network {
    stem: ConvBn2d,
    down: ConvBn2d,
    residual: ConvBn2d,
    head: Linear,
}

impl Network {
    fn new(device: &Device) -> Self {
        let block = |channels| {
            ConvBn2dConfig::new(channels, [3, 3])
                .with_padding(PaddingConfig2d::Same)
                .with_activation(Activation::Relu)
        };
        Self {
            stem: block([1, 16]).init(device),
            down: block([16, 32]).with_stride([2, 2]).init(device),
            residual: block([32, 32]).init(device),
            head: LinearConfig::new(32, CLASSES).init(device),
        }
    }

    /// `[batch, 1, height, width]` to `[batch, CLASSES]`.
    fn forward(&self, images: Tensor<4>) -> Tensor<2> {
        let x = self.down.forward(self.stem.forward(images));
        let x = self.residual.forward_residual(x.clone(), x);
        self.head
            .forward(x.mean_dims(&[2, 3]).squeeze_dims(&[2, 3]))
    }
}

/// Trains for so many steps and returns the accuracy on images that it has not seen.
fn train(steps: u64) -> f64 {
    const BATCH: usize = 64;
    let device = Device::flex().autodiff();
    device.seed(1);
    let mut network = Network::new(&device);
    say!("{network}");

    say!("A step keeps for the backward pass of the block `down`:");
    for tensor in network.down.saved_for_backward([BATCH, 16, SIZE, SIZE]) {
        say!("  {:<8} {:>8} bytes", tensor.name, tensor.bytes());
    }

    let mut optimizer = AdamConfig::new().init();
    let loss = CrossEntropyLossConfig::new().init(&device);
    for step in 0..steps {
        let (images, classes) = stripes::batch(&stripes::examples(BATCH, step), &device);
        let error = loss.forward(network.forward(images), classes);
        if step % 10 == 0 {
            say!(
                "step {step:>3}: loss {:.3}",
                error.clone().into_scalar::<f32>()
            );
        }
        let grads = GradientsParams::from_grads(error.backward(), &network);
        network = optimizer.step(3e-3, network, grads);
    }

    let (images, classes) = stripes::batch(&stripes::examples(512, u64::MAX), &Device::flex());
    stripes::accuracy(network.valid().forward(images), classes)
}

fn main() {
    let accuracy = train(60);
    say!(
        "accuracy on images that it has not seen: {:.1} %",
        100.0 * accuracy
    );
}

#[cfg(test)]
mod tests {
    #[test]
    fn it_learns() {
        let accuracy = super::train(60);
        assert!(accuracy > 0.9, "{accuracy}");
    }
}
