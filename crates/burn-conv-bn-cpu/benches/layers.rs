//! The catalogue of layers: convolution, batch norm and ReLU, forward and backward, with the
//! convolution recomputed. In single precision, on as many threads as rayon takes.

use std::hint::black_box;
use std::time::Duration;

use burn_conv_bn_cpu::{
    Activation, Affine, Backward, ConvOutput, Geometry, Gradients, InputGradCoefficients, backward,
    conv_moments, grad_sums, normalize,
};
use criterion::{Criterion, Throughput};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

/// Square maps and kernels.
struct Layer {
    name: &'static str,
    batch: usize,
    channels: [usize; 2],
    size: usize,
    kernel: usize,
    stride: usize,
    padding: usize,
    groups: usize,
    /// The first layer of a network, whose input wants no gradient.
    first: bool,
}

const fn layer(
    name: &'static str,
    batch: usize,
    channels: [usize; 2],
    size: usize,
    [kernel, stride, padding, groups]: [usize; 4],
) -> Layer {
    Layer {
        name,
        batch,
        channels,
        size,
        kernel,
        stride,
        padding,
        groups,
        first: channels[0] <= 3,
    }
}

const CATALOGUE: [Layer; 6] = [
    layer("256x32x26-64-k3", 256, [32, 64], 26, [3, 1, 0, 1]),
    layer("32x64x56-64-k3-p1", 32, [64, 64], 56, [3, 1, 1, 1]),
    layer("32x256x56-64-k1", 32, [256, 64], 56, [1, 1, 0, 1]),
    layer("32x128x28-128-k3-s2-p1", 32, [128, 128], 28, [3, 2, 1, 1]),
    layer("32x3x224-64-k7-s2-p3", 32, [3, 64], 224, [7, 2, 3, 1]),
    layer("32x144x28-dw-k3-p1", 32, [144, 144], 28, [3, 1, 1, 144]),
];

impl Layer {
    fn geometry(&self) -> Geometry {
        Geometry::new(
            self.batch,
            self.channels,
            self.groups,
            [1, self.size, self.size],
            [1, self.kernel, self.kernel],
            [1, self.stride, self.stride],
            [
                (0, 0),
                (self.padding, self.padding),
                (self.padding, self.padding),
            ],
            [1; 3],
        )
        .expect("the catalogue's layers exist")
    }
}

fn random(len: usize, seed: u64) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
}

fn layers(criterion: &mut Criterion) {
    for layer in &CATALOGUE {
        let geometry = layer.geometry();
        let channels = geometry.channels_out();
        let input = random(geometry.batch() * geometry.input_len(), 1);
        let weight = random(geometry.weight_len(), 2);
        let output_grad = random(geometry.batch() * geometry.output_len(), 3);
        let (scale, shift) = (random(channels, 4), random(channels, 5));
        let mut values = vec![0.0; output_grad.len()];
        let mut mean = vec![0.0; channels];

        let mut group = criterion.benchmark_group(layer.name);
        group.sample_size(10).warm_up_time(Duration::from_secs(1));
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
            input: &input,
            weight: &weight,
            output_grad: &output_grad,
            affine: Affine {
                mean: &mean,
                scale: &scale,
                shift: &shift,
            },
            activation: Activation::Relu,
            output: None,
        };
        let mut input_grad = vec![0.0; input.len()];
        let mut weight_grad = vec![0.0; weight.len()];
        for stores in [true, false] {
            let name = if stores {
                "backward"
            } else {
                "backward-recomputing-twice"
            };
            group.bench_function(name, |bencher| {
                bencher.iter(|| {
                    let sums = match stores {
                        true => grad_sums(&pass, ConvOutput::Store(&mut values)),
                        false => grad_sums(&pass, ConvOutput::Recompute),
                    };
                    black_box(&sums);
                    let conv_output = match stores {
                        true => ConvOutput::Kept(&values),
                        false => ConvOutput::Recompute,
                    };
                    let coefficients = InputGradCoefficients {
                        scale: &scale,
                        slope: &scale,
                        offset: &shift,
                    };
                    let gradients = Gradients {
                        input: (!layer.first)
                            .then_some((input_grad.as_mut_slice(), weight.as_slice())),
                        weight: Some(&mut weight_grad),
                        residual: None,
                    };
                    backward(&pass, conv_output, coefficients, gradients);
                    black_box((&input_grad, &weight_grad));
                });
            });
        }
        group.finish();
    }
}

/// What the machine can do at best, on all threads: the rate of large matrix products and that of
/// copies between main memory and itself. The floor of a layer is its operations over the one, or
/// its bytes over the other.
fn floor(criterion: &mut Criterion) {
    const SIZE: usize = 768;
    const VALUES: usize = 16 << 20;
    let mut group = criterion.benchmark_group("floor");
    group.sample_size(10).warm_up_time(Duration::from_secs(1));

    // One product for each thread: the library's own threads wait for each other.
    let threads = rayon::current_num_threads();
    let (a, b) = (random(SIZE * SIZE, 1), random(SIZE * SIZE, 2));
    let mut products = vec![vec![0.0f32; SIZE * SIZE]; threads];
    group.throughput(Throughput::Elements(
        threads as u64 * 2 * (SIZE as u64).pow(3),
    ));
    group.bench_function("matrix products of 768, in operations", |bencher| {
        bencher.iter(|| {
            products.par_iter_mut().for_each(|product| {
                // SAFETY: each matrix is SIZE by SIZE, its columns SIZE apart.
                #[allow(unsafe_code)]
                unsafe {
                    gemm::gemm(
                        SIZE,
                        SIZE,
                        SIZE,
                        product.as_mut_ptr(),
                        SIZE as isize,
                        1,
                        false,
                        a.as_ptr(),
                        SIZE as isize,
                        1,
                        b.as_ptr(),
                        SIZE as isize,
                        1,
                        0.0,
                        1.0,
                        false,
                        false,
                        false,
                        gemm::Parallelism::None,
                    );
                }
            });
            black_box(&products);
        });
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
    criterion.final_summary();
}
