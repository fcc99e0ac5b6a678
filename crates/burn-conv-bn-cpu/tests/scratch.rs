//! What the kernels take beyond their arguments is counted: tiles for each thread and a few copies of the
//! weight, none of one that outweighs the activations, and nothing that grows with the activations.

use burn_conv_bn_cpu::{
    Activation, Affine, Backward, ConvOutput, Element, Geometry, Gradients, Gram,
    InputGradCoefficients, OutputGrad, Real, backward, conv, conv_moments, grad_sums, normalize,
};
use burn_conv_bn_memory::CountingAllocator;
use half::{bf16, f16};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::ThreadPool;

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator::new();

const THREADS: usize = 2;

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

fn cube(channels: usize, input: [usize; 3]) -> Geometry {
    let one = [1; 3];
    Geometry::new(8, [channels; 2], 1, input, [3; 3], one, [(1, 1); 3], one).unwrap()
}

/// What the two steps of the backward pass make of the convolution's output.
#[derive(Clone, Copy, Debug)]
enum Between {
    /// It is recomputed in both.
    Nothing,
    /// It is stored, in an argument.
    Output,
    /// Products of the input take its place.
    Products,
}

/// Bytes that forward, and backward, take at most, beyond their arguments; none where products do not apply.
fn taken<E: Element>(geometry: &Geometry, between: Between) -> Option<[usize; 2]> {
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

    let mut stored = output.clone();
    let mut gram = Gram::default();
    let base = ALLOCATOR.reset_peak();
    conv_moments(geometry, &input, &weight, &mut output);
    normalize(geometry, &mut output, affine, None, Activation::Relu);
    let forward = ALLOCATOR.take_peak() - base;
    let pass = Backward {
        geometry,
        input: Some(&input),
        weight: Some(&weight),
        output_grad: OutputGrad::Whole(&output_grad),
        affine,
        activation: Activation::Relu,
        residual: None,
        output: matches!(between, Between::Products).then_some(&output),
    };
    let mut conv_output = match between {
        Between::Nothing => ConvOutput::Recompute,
        Between::Output => ConvOutput::Store(&mut stored),
        Between::Products if pass.allows_gram() => ConvOutput::Gram(&mut gram),
        Between::Products => return None,
    };
    grad_sums(&pass, conv_output.reborrow());
    backward(
        &pass,
        conv_output,
        Some(InputGradCoefficients {
            scale: &ones,
            slope: &ones,
            offset: &ones,
        }),
        Gradients {
            input: Some((&mut input_grad, &weight)),
            weight: Some(&mut weight_grad),
            residual: None,
        },
    );
    Some([forward, ALLOCATOR.peak() - base])
}

/// Bytes that the output takes under given statistics.
fn evaluated(geometry: &Geometry) -> usize {
    let geometry = geometry.clone().with_given_statistics();
    let input = vec![1.0f32; geometry.batch() * geometry.input_len()];
    let weight = vec![1.0; geometry.weight_len()];
    let mut output = vec![0.0; geometry.batch() * geometry.output_len()];
    let base = ALLOCATOR.reset_peak();
    conv(&geometry, &input, &weight, &mut output);
    ALLOCATOR.peak() - base
}

/// `bound` is that of elements of so many bytes.
fn assert_taken(
    pool: &ThreadPool,
    name: &str,
    geometry: &Geometry,
    between: Between,
    bound: impl Fn(usize) -> usize,
) {
    for (element, size, taken) in [
        ("f32", 4, pool.install(|| taken::<f32>(geometry, between))),
        ("f16", 2, pool.install(|| taken::<f16>(geometry, between))),
        ("bf16", 2, pool.install(|| taken::<bf16>(geometry, between))),
    ] {
        let bound = bound(size);
        let taken = taken.expect("products apply").into_iter().max();
        let taken = taken.unwrap_or_default();
        println!("{name}, {element}: {taken} bytes, of {bound} at most");
        assert!(taken < bound, "{name}, {element}: {taken} of {bound} bytes");
    }
}

fn scratch_is_a_few_tiles_for_each_thread() {
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(THREADS)
        .build()
        .unwrap();
    let bound = |geometry: &Geometry, kib: usize, copies: usize| {
        THREADS * (kib << 10) + copies * size_of::<f32>() * geometry.weight_len()
    };
    // KiB of tiles for each thread; copies of the weight: each of the eight images has a sum of its
    // gradient, beside the weight's factors for both directions. With Winograd, each is 16/9 as large, 49/25 for 5x5.
    for (name, geometry, kib, copies) in [
        ("3x3", square([64, 64], 160, [3, 1, 1, 1]), 8 << 10, 18),
        (
            "3x3, stride 2",
            square([64, 64], 320, [3, 2, 1, 1]),
            1 << 10,
            10,
        ),
        ("1x1", square([64, 64], 160, [1, 1, 0, 1]), 768, 10),
        ("5x5", square([32, 64], 160, [5, 1, 2, 1]), 8 << 10, 20),
        ("3x3x3", cube(32, [16, 80, 80]), 6 << 10, 18),
        (
            "7x7, stride 2",
            square([3, 64], 320, [7, 2, 3, 1]),
            1 << 10,
            10,
        ),
        ("depthwise", square([64, 64], 160, [3, 1, 1, 64]), 256, 10),
    ] {
        let bound = bound(&geometry, kib, copies);
        let smallest = size_of::<f16>() * geometry.batch() * geometry.output_len();
        assert!(bound < smallest, "{name}: as much as an output");
        assert_taken(&pool, name, &geometry, Between::Nothing, |_| bound);
    }
    // A weight that outweighs the activations is not copied at all: rows of a few images, and a few of the weight;
    // transformed tiles, where three activations leave room for them.
    for (name, geometry) in [
        ("3x3, deep", square([256, 256], 14, [3, 1, 1, 1])),
        ("3x3, deeper", square([512, 512], 4, [3, 1, 1, 1])),
        ("1x1, deep", square([1024, 2048], 2, [1, 1, 0, 1])),
        ("7x7, deep", square([256, 256], 7, [7, 1, 0, 1])),
    ] {
        let activations = geometry.batch() * (2 * geometry.input_len() + geometry.output_len());
        let bound = |size: usize| (2 << 20) + size * activations;
        assert_taken(&pool, name, &geometry, Between::Nothing, bound);
    }
    let bounded = square([64, 64], 56, [3, 1, 1, 1]).with_max_scratch(2 << 20);
    assert_taken(&pool, "3x3, bounded", &bounded, Between::Nothing, |_| {
        3 << 20
    });
    // A small image's planes without gaps, one for each tap, may outweigh its output too.
    let dense = square([64, 64], 56, [3, 2, 1, 1]);
    let bytes = bound(&dense, 4 << 10, 10);
    assert_taken(&pool, "3x3, no gaps", &dense, Between::Nothing, |_| bytes);
    // Products take matrices of the weight's size, and no more than tiles of the activations.
    let wide = square([64, 256], 56, [1, 1, 0, 1]);
    let bytes = bound(&wide, 1 << 10, 16);
    assert!(bytes < size_of::<f16>() * wide.batch() * wide.output_len());
    assert_taken(&pool, "1x1, products", &wide, Between::Products, |_| bytes);
}

/// On drawn geometries each pass stays in what Burn's own layers copy for it, and 2 MiB.
fn scratch_is_within_the_limit() {
    const GEOMETRIES: usize = 300;
    const MOST_PRODUCTS: usize = 60_000_000;
    const GRANTED: usize = 2 << 20;
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(THREADS)
        .build()
        .unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(28);
    let mut drawn = 0;
    while drawn < GEOMETRIES {
        let mut octaves = |least: f64, most: f64| {
            let exponent = rng.random_range(least.log2()..(most + 1.0).log2());
            exponent.exp2() as usize
        };
        let channels = [octaves(3.0, 1024.0), octaves(3.0, 1024.0)];
        let (size, batch) = (octaves(1.0, 56.0), octaves(1.0, 32.0));
        let (kernel, stride) = (rng.random_range(1..=7), rng.random_range(1..=2));
        // Most kernels have none.
        let dilation = [1, 1, 1, 2, 6][rng.random_range(0..5)];
        let padding = rng.random_range(0..=dilation * (kernel / 2));
        // Of a quarter three dimensions.
        let is_deep = rng.random_range(0..4) == 0;
        let spread = |value: usize, flat: usize| [if is_deep { value } else { flat }, value, value];
        let paddings = spread(padding, 0).map(|padding| (padding, padding));
        let geometry = Geometry::new(
            batch,
            channels,
            1,
            spread(size, 1),
            spread(kernel, 1),
            spread(stride, 1),
            paddings,
            spread(dilation, 1),
        );
        let Ok(geometry) = geometry else {
            continue;
        };
        let products = batch * geometry.positions() * geometry.weight_len();
        if products > MOST_PRODUCTS {
            continue;
        }
        drawn += 1;
        let [input, output] = [geometry.input_len(), geometry.output_len()];
        let [input, output] = [input, output].map(|len| size_of::<f32>() * batch * len);
        let between = match geometry.is_worth_storing(output) {
            true => Between::Output,
            false => Between::Nothing,
        };
        let [forward, backward] = pool
            .install(|| taken::<f32>(&geometry, between))
            .expect("the output may be recomputed");
        let products = pool.install(|| taken::<f32>(&geometry, Between::Products));
        let weight = size_of::<f32>() * geometry.weight_len();
        let evaluation = pool.install(|| evaluated(&geometry));
        let in_place = (kernel, stride, padding) == (1, 1, 0);
        for (pass, taken, copied) in [
            ("forward", forward, weight + 2 * input + output),
            ("backward", backward, 2 * input + output),
            (
                "products",
                products.map_or(0, |[_, backward]| backward),
                2 * input + output,
            ),
            (
                "evaluation",
                evaluation,
                if in_place { 0 } else { input + weight },
            ),
        ] {
            assert!(
                taken <= GRANTED + copied,
                "{pass}: {taken} bytes, {geometry:?}"
            );
        }
    }
}

/// One test, so that no other allocates at the same time.
#[test]
fn scratch_is_bounded() {
    scratch_is_a_few_tiles_for_each_thread();
    scratch_is_within_the_limit();
}
