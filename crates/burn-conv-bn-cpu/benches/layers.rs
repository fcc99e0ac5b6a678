//! The layers of the catalogue of `cargo xtask bench`: convolution, batch norm and ReLU, forward and
//! backward, with the convolution recomputed; and max pools. In single precision, on as many threads as
//! rayon takes.

mod products;

use std::hint::black_box;
use std::time::Duration;

use burn_conv_bn_bench::catalogue::{Layer, Work, catalogue};
use burn_conv_bn_cpu::{
    Activation, Affine, Backward, ConvOutput, Geometry, Gradients, InputGradCoefficients,
    OutputGrad, PoolGeometry, backward, conv_moments, grad_sums, max_pool, max_pool_backward,
    normalize,
};
use criterion::{Criterion, Throughput};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use crate::products::Products;

fn geometry(layer: &Layer) -> Geometry {
    let padding = (layer.padding, layer.padding);
    Geometry::new(
        layer.batch,
        layer.channels,
        layer.groups,
        [1, layer.size, layer.size],
        [1, layer.kernel, layer.kernel],
        [1, layer.stride, layer.stride],
        [(0, 0), padding, padding],
        [1, layer.dilation, layer.dilation],
    )
    .expect("the catalogue's layers exist")
}

fn random(len: usize, seed: u64) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
}

/// The layers of the catalogue, those of ResNet-50 at batch 8, deep ones (small images of many channels), and dilated
/// ones.
fn all_layers() -> Vec<(String, Layer)> {
    let mut layers = Vec::new();
    for entry in catalogue(false) {
        if let Work::Layer(layer) = entry.work {
            layers.push((entry.id, layer));
        }
    }
    for (channels, size, kernel, stride) in [
        ([64, 256], 56, 1, 1),
        ([128, 128], 28, 3, 1),
        ([128, 512], 28, 1, 1),
        ([256, 256], 28, 3, 2),
        ([256, 256], 14, 3, 1),
        ([256, 1024], 14, 1, 1),
        ([1024, 256], 14, 1, 1),
        ([512, 512], 14, 3, 2),
        ([512, 512], 7, 3, 1),
        ([512, 2048], 7, 1, 1),
        ([2048, 512], 7, 1, 1),
    ] {
        let id = format!(
            "resnet50-{}x{size}-{}-k{kernel}-s{stride}",
            channels[0], channels[1]
        );
        layers.push((
            id,
            Layer {
                stride,
                ..Layer::new(8, channels, size, kernel)
            },
        ));
    }
    // Weights that outweigh the activations, and one image.
    for (batch, channels, size, kernel) in [
        (32, [512, 512], 7, 3),
        (32, [512, 512], 4, 3),
        (32, [512, 512], 2, 3),
        (32, [512, 512], 1, 3),
        (32, [1024, 2048], 2, 1),
        (1, [512, 512], 7, 3),
        (1, [1024, 1024], 8, 3),
        (1, [256, 256], 28, 1),
    ] {
        let id = format!(
            "deep-{batch}x{}x{size}-{}-k{kernel}",
            channels[0], channels[1]
        );
        layers.push((id, Layer::new(batch, channels, size, kernel)));
    }
    // The catalogue's dilated entry; then those of DeepLab, whose last stages keep the size, and odd sizes.
    for (batch, channels, size, dilation) in [
        (32, [128, 128], 28, 2),
        (8, [256, 256], 28, 2),
        (8, [512, 512], 28, 4),
        (4, [256, 256], 33, 6),
        (4, [256, 256], 33, 12),
        (4, [64, 64], 65, 2),
    ] {
        let id = format!(
            "dilated-{batch}x{}x{size}-{}-d{dilation}",
            channels[0], channels[1]
        );
        let layer = Layer {
            dilation,
            padding: dilation,
            ..Layer::new(batch, channels, size, 3)
        };
        layers.push((id, layer));
    }
    layers
}

fn layers(criterion: &mut Criterion) {
    for (id, layer) in all_layers() {
        let geometry = geometry(&layer);
        let operations = 2 * layer.batch * geometry.positions() * geometry.weight_len();
        let convolutions = |count: usize| Throughput::Elements((count * operations) as u64);
        let channels = geometry.channels_out();
        let input = random(geometry.batch() * geometry.input_len(), 1);
        let weight = random(geometry.weight_len(), 2);
        let output_grad = random(geometry.batch() * geometry.output_len(), 3);
        let (scale, shift) = (random(channels, 4), random(channels, 5));
        let mut values = vec![0.0; output_grad.len()];
        let mut mean = vec![0.0; channels];

        let mut group = criterion.benchmark_group(id);
        group.sample_size(10).warm_up_time(Duration::from_secs(1));
        group.throughput(convolutions(1));
        group.bench_function("forward", |bencher| {
            bencher.iter(|| {
                let moments = conv_moments(&geometry, &input, &weight, &mut values);
                mean = moments.mean.iter().map(|mean| *mean as f32).collect();
                let affine = Affine {
                    mean: &mean,
                    scale: &scale,
                    shift: &shift,
                };
                normalize(&geometry, &mut values, affine, None, Activation::Relu);
                black_box(&values);
            });
        });
        let pass = Backward {
            geometry: &geometry,
            input: Some(&input),
            weight: Some(&weight),
            output_grad: OutputGrad::Whole(&output_grad),
            affine: Affine {
                mean: &mean,
                scale: &scale,
                shift: &shift,
            },
            activation: Activation::Relu,
            residual: None,
            output: None,
        };
        let mut input_grad = vec![0.0; input.len()];
        let mut weight_grad = vec![0.0; weight.len()];
        group.throughput(convolutions(2 + usize::from(layer.input_grad)));
        for stores in [true, false] {
            let name = if stores {
                "backward"
            } else {
                "backward-recomputing-twice"
            };
            group.bench_function(name, |bencher| {
                bencher.iter(|| {
                    let mut conv_output = if stores {
                        ConvOutput::Store(&mut values)
                    } else {
                        ConvOutput::Recompute
                    };
                    black_box(grad_sums(&pass, conv_output.reborrow()));
                    let coefficients = InputGradCoefficients {
                        scale: &scale,
                        slope: &scale,
                        offset: &shift,
                    };
                    let gradients = Gradients {
                        input: layer
                            .input_grad
                            .then_some((&mut input_grad, weight.as_slice())),
                        weight: Some(&mut weight_grad),
                        residual: None,
                    };
                    backward(&pass, conv_output, Some(coefficients), gradients);
                    black_box((&input_grad, &weight_grad));
                });
            });
        }
        group.finish();
    }
}

/// The max pools of the tutorial's network and of ResNet's stem. Their floor is the rate of copies: in
/// bytes, each activation and the argmax read or written once.
fn max_pools(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("max_pool");
    group.sample_size(20).warm_up_time(Duration::from_secs(1));
    for (id, planes, size, kernel, stride, padding) in [
        ("256x64x24-k2-s2", 256 * 64, 24, 2, 2, 0),
        ("8x64x112-k3-s2-p1", 8 * 64, 112, 3, 2, 1),
    ] {
        let geometry = PoolGeometry::new(
            planes,
            [size; 2],
            [kernel; 2],
            [stride; 2],
            [padding; 2],
            [1; 2],
            false,
        )
        .expect("the max pools exist");
        let [height, width] = geometry.output();
        let input = random(planes * size * size, 1);
        let output_grad = random(planes * height * width, 2);
        let (mut output, mut argmax, mut input_grad) = (Vec::new(), Vec::new(), Vec::new());
        max_pool(&geometry, &input, &mut output, Some(&mut argmax));

        let values = size_of::<f32>() * (input.len() + output_grad.len());
        group.throughput(Throughput::Bytes((values + argmax.len()) as u64));
        group.bench_function(format!("{id}/forward"), |bencher| {
            bencher.iter(|| {
                max_pool(&geometry, &input, &mut output, Some(&mut argmax));
                black_box((&output, &argmax));
            });
        });
        group.bench_function(format!("{id}/backward"), |bencher| {
            bencher.iter(|| {
                max_pool_backward(&geometry, &output_grad, &argmax, &mut input_grad);
                black_box(&input_grad);
            });
        });
    }
    group.finish();
}

/// What the machine can do at best, on all threads: the rate of large matrix products and that of
/// copies between main memory and itself. The floor of a layer is its operations over the one, or
/// its bytes over the other.
fn floor(criterion: &mut Criterion) {
    const VALUES: usize = 16 << 20;
    let mut group = criterion.benchmark_group("floor");
    group.sample_size(10).warm_up_time(Duration::from_secs(1));

    let mut products = Products::new();
    group.throughput(Throughput::Elements(products.operations()));
    group.bench_function("matrix products of 768, in operations", |bencher| {
        bencher.iter(|| products.run());
    });

    let source = random(VALUES, 3);
    let mut target = vec![0.0f32; VALUES];
    group.throughput(Throughput::Bytes(2 * size_of_val(source.as_slice()) as u64));
    group.bench_function("copy of 64 MiB, in bytes read and written", |bencher| {
        bencher.iter(|| {
            target
                .par_chunks_mut(1 << 16)
                .zip(source.par_chunks(1 << 16))
                .for_each(|(target, source)| target.copy_from_slice(source));
            black_box(&target);
        });
    });
    group.finish();
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    floor(&mut criterion);
    layers(&mut criterion);
    max_pools(&mut criterion);
    criterion.final_summary();
}
