//! Nothing activation-sized is allocated: what the kernels take beyond their arguments is counted.

use burn_conv_bn_cpu::{
    Activation, Affine, Backward, ConvOutput, Element, Geometry, Gradients, InputGradCoefficients,
    Real, backward, conv_moments, grad_sums, normalize,
};
use burn_conv_bn_memory::CountingAllocator;
use half::{bf16, f16};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator::new();

const THREADS: usize = 2;

/// What a thread may take: "a few MiB".
const SCRATCH: usize = 8 << 20;

/// What the partial sums of the weight's gradient may take, over all threads.
const SUMS: usize = 16 << 20;

fn square(
    channels: [usize; 2],
    size: usize,
    [kernel, stride, padding, groups]: [usize; 4],
) -> Geometry {
    let padding = (padding, padding);
    Geometry::new(
        8,
        channels,
        groups,
        [1, size, size],
        [1, kernel, kernel],
        [1, stride, stride],
        [(0, 0), padding, padding],
        [1; 3],
    )
    .unwrap()
}

/// Bytes that forward and backward take at most, beyond their arguments, with the convolution's
/// output never stored; and the bytes of one output.
fn taken<E: Element>(geometry: &Geometry) -> (usize, usize) {
    let channels = geometry.channels_out();
    let input = vec![E::default(); geometry.batch() * geometry.input_len()];
    let mut output = vec![E::default(); geometry.batch() * geometry.output_len()];
    let mut input_grad = input.clone();
    let output_grad = output.clone();
    let weight = vec![E::Real::ONE; geometry.weight_len()];
    let mut weight_grad = weight.clone();
    let ones = vec![E::Real::ONE; channels];
    let affine = Affine {
        mean: &ones,
        scale: &ones,
        shift: &ones,
    };

    let base = ALLOCATOR.reset_peak();
    conv_moments(geometry, &input, &weight, &mut output);
    normalize(geometry, &mut output, affine, None, Activation::Relu);
    let pass = Backward {
        geometry,
        input: &input,
        weight: &weight,
        output_grad: &output_grad,
        affine,
        activation: Activation::Relu,
        output: None,
    };
    grad_sums(&pass, ConvOutput::Recompute);
    backward(
        &pass,
        ConvOutput::Recompute,
        InputGradCoefficients {
            scale: &ones,
            slope: &ones,
            offset: &ones,
        },
        Gradients {
            input: Some((&mut input_grad, &weight)),
            weight: Some(&mut weight_grad),
            residual: None,
        },
    );
    (ALLOCATOR.peak() - base, size_of_val(output.as_slice()))
}

#[test]
fn scratch_is_a_few_tiles_for_each_thread() {
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(THREADS)
        .build()
        .unwrap();
    for (name, geometry) in [
        ("3x3", square([64, 64], 160, [3, 1, 1, 1])),
        ("3x3, stride 2", square([64, 64], 320, [3, 2, 1, 1])),
        ("1x1", square([64, 64], 160, [1, 1, 0, 1])),
        ("5x5", square([32, 64], 160, [5, 1, 2, 1])),
        ("7x7, stride 2", square([3, 64], 320, [7, 2, 3, 1])),
        ("depthwise", square([64, 64], 160, [3, 1, 1, 64])),
    ] {
        let weight = 8 * size_of::<f32>() * geometry.weight_len();
        for (element, (taken, output)) in [
            ("f32", pool.install(|| taken::<f32>(&geometry))),
            ("f16", pool.install(|| taken::<f16>(&geometry))),
            ("bf16", pool.install(|| taken::<bf16>(&geometry))),
        ] {
            println!("{name}, {element}: {taken} bytes, for an output of {output}");
            assert!(
                taken < THREADS * SCRATCH + SUMS + weight,
                "{name}, {element}: {taken} bytes"
            );
            assert!(
                taken < output,
                "{name}, {element}: {taken} bytes of {output}"
            );
        }
    }
}
