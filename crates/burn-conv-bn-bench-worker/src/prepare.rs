//! The data that all contenders of an entry read.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use burn::tensor::Device;
use burn::tensor::module::batch_norm_train;
use burn_conv_bn_bench::catalogue::{Layer, Network, Work};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::classifier;
use crate::files::write;
use crate::layer::read_block;
use crate::network::PARAMETERS;
use crate::tensors::{into_values, tensor};

/// Pre-activations nearer to zero than this get no upstream gradient. They have a variance of
/// about one, and correct results differ by less than this, on a GPU that multiplies f32 as TF32 by
/// an estimated 3e-3: on which side of ReLU's kink rounding puts such a value then changes nothing.
const KINK: f32 = 1e-2;

/// Draws the data of an entry from a seed, and writes them to a folder.
pub fn prepare(work: &Work, seed: u64, folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    match work {
        Work::Layer(layer) => prepare_layer(layer, seed, folder),
        Work::Network(network) => prepare_network(network, seed, folder),
        Work::Classifier(classifier) => classifier::prepare(classifier, seed, folder),
    }
}

fn prepare_layer(layer: &Layer, seed: u64, folder: &Path) -> Result<()> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut uniform = |count: usize, low: f32, high: f32| -> Vec<f32> {
        (0..count).map(|_| rng.random_range(low..high)).collect()
    };
    let count = |shape: [usize; 4]| -> usize { shape.iter().product() };
    let channels = layer.channels[1];
    // As initialized by default.
    let bound = 1.0 / (layer.fan_in() as f32).sqrt();
    for (name, values) in [
        ("input", uniform(count(layer.input_shape()), -1.0, 1.0)),
        (
            "weight",
            uniform(count(layer.weight_shape()), -bound, bound),
        ),
        ("gamma", uniform(channels, 0.5, 1.5)),
        ("beta", uniform(channels, -0.5, 0.5)),
    ] {
        write(folder, name, &values)?;
    }
    let mut upstream = uniform(count(layer.output_shape()), -1.0, 1.0);
    for (gradient, value) in upstream.iter_mut().zip(pre_activation(layer, folder)?) {
        if value.abs() < KINK {
            *gradient = 0.0;
        }
    }
    write(folder, "upstream", &upstream)
}

/// What goes into the ReLU, by Burn's own layers.
fn pre_activation(layer: &Layer, folder: &Path) -> Result<Vec<f32>> {
    let device = Device::flex();
    let block = read_block(layer, folder, &device)?;
    let input = tensor(folder, "input", layer.input_shape(), &device)?;
    let norm = &block.norm;
    let normalized = batch_norm_train(
        block.conv.forward(input),
        norm.gamma.val(),
        norm.beta.val(),
        norm.epsilon,
    );
    into_values(normalized.output)
}

fn prepare_network(network: &Network, seed: u64, folder: &Path) -> Result<()> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let targets: Vec<f32> = (0..network.batch)
        .map(|_| rng.random_range(0..Network::CLASSES) as f32)
        .collect();
    write(folder, "targets", &targets)?;
    let mut uniform = |count: usize, bound: f32| -> Vec<f32> {
        (0..count)
            .map(|_| rng.random_range(-bound..bound))
            .collect()
    };
    let pixels = network.batch * Network::IMAGE_SIZE * Network::IMAGE_SIZE;
    write(folder, "images", &uniform(pixels, 1.0))?;
    for (name, count, fan_in) in PARAMETERS {
        // As initialized by default.
        let bound = 1.0 / (fan_in as f32).sqrt();
        write(folder, name, &uniform(count, bound))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::read;

    const LAYER: Layer = Layer {
        batch: 8,
        channels: [2, 3],
        size: 40,
        kernel: 3,
        stride: 1,
        padding: 1,
        groups: 1,
        input_grad: true,
    };

    #[test]
    fn rounding_cannot_decide_where_a_gradient_flows() {
        let folder = tempfile::tempdir().unwrap();
        prepare(&Work::Layer(LAYER), 4, folder.path()).unwrap();
        let upstream = read(folder.path(), "upstream").unwrap();
        let values = pre_activation(&LAYER, folder.path()).unwrap();
        assert_eq!(upstream.len(), values.len());
        let near = values.iter().filter(|value| value.abs() < KINK).count();
        let zeros = upstream.iter().filter(|gradient| **gradient == 0.0).count();
        // 38,400 values, of which a fraction of about 1e-2 is that near.
        assert!(near > 0 && near < 1000, "{near}");
        assert!(zeros >= near && zeros < near + 5, "{zeros} for {near}");
        for (gradient, value) in upstream.iter().zip(&values) {
            assert!(*gradient == 0.0 || value.abs() >= KINK);
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_data() {
        for work in [Work::Layer(LAYER), Work::Network(Network { batch: 3 })] {
            let read = |seed: u64| {
                let folder = tempfile::tempdir().unwrap();
                prepare(&work, seed, folder.path()).unwrap();
                let mut files: Vec<_> = fs::read_dir(folder.path())
                    .unwrap()
                    .map(|file| file.unwrap().path())
                    .collect();
                files.sort();
                let contents = files.iter().map(|path| fs::read(path).unwrap());
                contents.collect::<Vec<_>>()
            };
            let first = read(7);
            assert!(first.len() > 4);
            assert_eq!(first, read(7));
            assert_ne!(first, read(8));
        }
    }
}
