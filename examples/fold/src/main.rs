//! Folds the blocks of a trained model into single convolutions for inference, and compares speed.

use std::time::Instant;

use burn::module::Module;
use burn::nn::PaddingConfig2d;
use burn::nn::conv::Conv2d;
use burn::tensor::{Device, Distribution, Tensor};
use burn_conv_bn::{Activation, ConvBn2d, ConvBn2dConfig, FoldError};
use stripes::say;

#[derive(Module, Debug)]
struct Blocks {
    blocks: Vec<ConvBn2d>,
}

/// What is left of it for inference.
#[derive(Module, Debug)]
struct Folded {
    convs: Vec<Conv2d>,
    #[module(skip)]
    activation: Activation,
}

impl Blocks {
    fn new(device: &Device) -> Self {
        let block = |channels| {
            ConvBn2dConfig::new(channels, [3, 3])
                .with_padding(PaddingConfig2d::Same)
                .with_activation(Activation::Relu)
                .init(device)
        };
        Self {
            blocks: [[3, 32], [32, 32], [32, 64], [64, 64]].map(block).to_vec(),
        }
    }

    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        self.blocks.iter().fold(x, |x, block| block.forward(x))
    }

    /// The same with Burn's own modules.
    fn forward_unfused(&self, x: Tensor<4>) -> Tensor<4> {
        self.blocks.iter().fold(x, |x, block| {
            let normalized = block.norm.forward(block.conv.forward(x));
            block.settings.activation.forward(normalized)
        })
    }

    fn fold(&self) -> Result<Folded, FoldError> {
        Ok(Folded {
            convs: self
                .blocks
                .iter()
                .map(ConvBn2d::fold)
                .collect::<Result<_, _>>()?,
            activation: Activation::Relu,
        })
    }
}

impl Folded {
    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        self.convs
            .iter()
            .fold(x, |x, conv| self.activation.forward(conv.forward(x)))
    }
}

/// Median time of a call in milliseconds, and its result.
fn time(rounds: usize, run: impl Fn() -> Tensor<4>) -> (f64, Tensor<4>) {
    let result = run();
    let mut times: Vec<f64> = (0..rounds)
        .map(|_| {
            let start = Instant::now();
            drop(run().into_data());
            1e3 * start.elapsed().as_secs_f64()
        })
        .collect();
    times.sort_by(f64::total_cmp);
    (times[rounds / 2], result)
}

/// Largest difference of each form from Burn's own modules, relative to the largest value.
fn compare(size: usize, rounds: usize) -> Result<Vec<f64>, FoldError> {
    let device = Device::flex();
    device.seed(1);
    let training = Blocks::new(&device.clone().autodiff());
    let images = |device: &Device| {
        Tensor::<4>::random([4, 3, size, size], Distribution::Normal(0.5, 2.0), device)
    };
    // Running statistics of a few batches, so that there is something to fold.
    for _ in 0..5 {
        training.forward(images(&device.clone().autodiff()));
    }
    let blocks = training.valid();
    let folded = blocks.fold()?;

    let x = images(&device);
    let (base, wanted) = time(rounds, || blocks.forward_unfused(x.clone()));
    say!("Conv2d, BatchNorm, relu: {base:>7.1} ms");
    let mut differences = Vec::new();
    let forms: [(&str, &dyn Fn() -> Tensor<4>); 2] = [
        ("ConvBn2d", &|| blocks.forward(x.clone())),
        ("folded Conv2d, relu", &|| folded.forward(x.clone())),
    ];
    for (name, run) in forms {
        let (milliseconds, result) = time(rounds, run);
        let largest = |tensor: Tensor<4>| f64::from(tensor.abs().max().into_scalar::<f32>());
        let difference = largest(result - wanted.clone()) / largest(wanted.clone());
        say!(
            "{name:>23}: {milliseconds:>7.1} ms, x{:.2} of the first, {difference:.0e} off",
            milliseconds / base
        );
        differences.push(difference);
    }
    Ok(differences)
}

fn main() -> Result<(), FoldError> {
    compare(64, 15).map(drop)
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_form_computes_the_same() {
        for difference in super::compare(12, 1).unwrap() {
            assert!(difference < 1e-5, "{difference:e}");
        }
    }
}
