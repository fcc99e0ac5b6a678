// Every kernel over many geometries, for whichever package is `kernels` where this is included:
// the one on plain threads, and in the test also the one on rayon.

use kernels::{
    Activation, Affine, Backward, ConvOutput, Element, Geometry, Gradients, InputGradCoefficients,
    OutputGrad, PoolGeometry, PooledGrad, Real, backward, conv, conv_moments, grad_sums, max_pool,
    max_pool_backward, normalize, normalize_max_pool, pooled_grad_sums,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// A convolution's numbers.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    batch: usize,
    channels: [usize; 2],
    groups: usize,
    input: [usize; 3],
    kernel: [usize; 3],
    stride: [usize; 3],
    padding: [(usize, usize); 3],
    dilation: [usize; 3],
}

const PLAIN: Case = Case {
    batch: 8,
    channels: [3, 4],
    groups: 1,
    input: [1, 9, 10],
    kernel: [1, 3, 3],
    stride: [1; 3],
    padding: [(0, 0), (1, 1), (1, 1)],
    dilation: [1; 3],
};

/// Several blocks of images each, most of them with a rest: stride, dilation and padding on one
/// side, groups, depthwise, pointwise, three dimensions, several tiles in an image, several images in
/// a tile; then channels enough for the algorithm with fewer products, and, with a stride, for the
/// layout without gaps.
pub fn cases() -> Vec<Case> {
    vec![
        PLAIN,
        Case {
            stride: [1, 2, 3],
            padding: [(0, 0), (0, 2), (1, 0)],
            ..PLAIN
        },
        Case {
            dilation: [1, 2, 3],
            padding: [(0, 0), (2, 1), (0, 3)],
            ..PLAIN
        },
        Case {
            channels: [6, 9],
            groups: 3,
            ..PLAIN
        },
        Case {
            channels: [5, 5],
            groups: 5,
            stride: [1, 2, 2],
            ..PLAIN
        },
        Case {
            channels: [7, 20],
            kernel: [1; 3],
            padding: [(0, 0); 3],
            ..PLAIN
        },
        Case {
            channels: [2, 3],
            input: [4, 5, 6],
            kernel: [2, 3, 2],
            padding: [(1, 0), (1, 1), (0, 1)],
            ..PLAIN
        },
        Case {
            batch: 3,
            channels: [3, 8],
            input: [1, 30, 30],
            kernel: [1, 7, 7],
            stride: [1, 2, 2],
            padding: [(0, 0), (3, 3), (3, 3)],
            ..PLAIN
        },
        Case {
            batch: 2,
            channels: [4, 4],
            groups: 2,
            input: [1, 40, 40],
            ..PLAIN
        },
        Case {
            batch: 33,
            channels: [2, 3],
            input: [1, 4, 4],
            ..PLAIN
        },
        Case {
            batch: 9,
            channels: [17, 16],
            input: [1, 6, 7],
            ..PLAIN
        },
        Case {
            batch: 4,
            channels: [16, 18],
            input: [1, 24, 23],
            ..PLAIN
        },
        Case {
            batch: 4,
            channels: [32, 48],
            groups: 2,
            ..PLAIN
        },
        Case {
            batch: 4,
            channels: [17, 16],
            stride: [1, 2, 2],
            ..PLAIN
        },
    ]
}

fn random(len: usize, seed: u64) -> Vec<f64> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
}

/// What is computed in.
fn numbers<T: Real>(len: usize, seed: u64) -> Vec<T> {
    random(len, seed).into_iter().map(T::from_f64).collect()
}

/// What is stored.
fn data<E: Element>(len: usize, seed: u64) -> Vec<E> {
    let mut stored = vec![E::default(); len];
    E::store(&numbers::<E::Real>(len, seed), &mut stored);
    stored
}

/// All that the kernels have written.
#[derive(Debug, Default, PartialEq)]
pub struct Written(Vec<f64>);

impl Written {
    fn stored<E: Element>(&mut self, values: &[E]) {
        let mut loaded = vec![E::Real::ZERO; values.len()];
        E::load(values, &mut loaded);
        self.computed(&loaded);
    }

    fn computed<T: Real>(&mut self, values: &[T]) {
        self.0.extend(values.iter().map(|value| value.to_f64()));
    }

    fn places(&mut self, places: &[u8]) {
        self.0.extend(places.iter().map(|place| f64::from(*place)));
    }

    /// One after the other.
    pub fn values(&self) -> &[f64] {
        &self.0
    }
}

/// Runs every kernel over the case, the backward ones with each way to the activation's derivative
/// and to the convolution's output.
pub fn run<E: Element>(case: &Case) -> Written {
    let geometry = Geometry::new(
        case.batch,
        case.channels,
        case.groups,
        case.input,
        case.kernel,
        case.stride,
        case.padding,
        case.dilation,
    )
    .expect("the case is valid");
    let channels = geometry.channels_out();
    let output_len = case.batch * geometry.output_len();
    let input = data::<E>(case.batch * geometry.input_len(), 1);
    let weight = numbers::<E::Real>(geometry.weight_len(), 2);
    let (output_grad, residual) = (data::<E>(output_len, 3), data::<E>(output_len, 4));
    let [mean, scale, shift, slope, offset] =
        [5, 6, 7, 8, 9].map(|seed| numbers::<E::Real>(channels, seed));
    let affine = Affine {
        mean: &mean,
        scale: &scale,
        shift: &shift,
    };
    let mut written = Written::default();

    let mut kept = vec![E::default(); output_len];
    conv(&geometry, &input, &weight, &mut kept);
    written.stored(&kept);
    let mut output = vec![E::default(); output_len];
    let moments = conv_moments(&geometry, &input, &weight, &mut output);
    written.computed(&moments.mean);
    written.computed(&moments.squares);
    normalize(
        &geometry,
        &mut output,
        affine,
        Some(&residual),
        Activation::Relu,
    );
    written.stored(&output);

    let plain = Backward {
        geometry: &geometry,
        input: Some(&input),
        weight: Some(&weight),
        output_grad: OutputGrad::Whole(&output_grad),
        affine,
        activation: Activation::Relu,
        residual: None,
        output: None,
    };
    let by_output = Backward {
        output: Some(&output),
        ..plain
    };
    let by_residual = Backward {
        activation: Activation::Silu,
        residual: Some(&residual),
        ..plain
    };
    for pass in [plain, by_output, by_residual] {
        let mut stored = vec![E::default(); output_len];
        for conv_output in [
            ConvOutput::Recompute,
            ConvOutput::Store(&mut stored),
            ConvOutput::Kept(&kept),
        ] {
            let sums = grad_sums(&pass, conv_output);
            written.computed(&sums.grad);
            written.computed(&sums.grad_deviation);
        }
        written.stored(&stored);
        for conv_output in [None, Some(&kept[..])] {
            let mut input_grad = vec![E::default(); input.len()];
            let mut weight_grad = vec![E::Real::ZERO; weight.len()];
            let mut residual_grad = vec![E::default(); output_len];
            backward(
                &pass,
                conv_output,
                Some(InputGradCoefficients {
                    scale: &scale,
                    slope: &slope,
                    offset: &offset,
                }),
                Gradients {
                    input: Some((&mut input_grad, &weight)),
                    weight: Some(&mut weight_grad),
                    residual: Some(&mut residual_grad),
                },
            );
            written.stored(&input_grad);
            written.computed(&weight_grad);
            written.stored(&residual_grad);
        }
    }
    written
}

/// Kernels, strides and paddings of [`run_pools`], each of rows and columns: windows side by side, and
/// windows that overlap.
const POOLS: [[usize; 3]; 2] = [[2, 2, 0], [3, 2, 1]];

/// Max pools run by [`run_pools`].
pub fn pools() -> usize {
    POOLS.len()
}

/// Runs max pools over planes enough for several tasks, forward with and without places, and backward, by
/// themselves and right behind a norm.
pub fn run_pools<E: Element>() -> Written {
    const PLANES: usize = IMAGES * CHANNELS;
    const IMAGES: usize = 10;
    const CHANNELS: usize = 5;
    const SIZE: [usize; 2] = [39, 42];
    let input = data::<E>(PLANES * SIZE[0] * SIZE[1], 1);
    let (one, three) = ([1; 3], [1, 3, 3]);
    let conv_size = [1, SIZE[0] + 2, SIZE[1] + 2];
    let no_padding = [(0, 0); 3];
    let geometry = Geometry::new(IMAGES, [2, CHANNELS], 1, conv_size, three, one, no_padding, one)
        .expect("the convolution is valid");
    let conv_input = data::<E>(IMAGES * geometry.input_len(), 3);
    let weight = numbers::<E::Real>(geometry.weight_len(), 4);
    let [mean, scale, shift] = [5, 6, 7].map(|seed| numbers::<E::Real>(CHANNELS, seed));
    let affine = Affine {
        mean: &mean,
        scale: &scale,
        shift: &shift,
    };
    let mut written = Written::default();
    for [kernel, stride, padding] in POOLS {
        let pool = PoolGeometry::new(
            PLANES,
            SIZE,
            [kernel; 2],
            [stride; 2],
            [padding; 2],
            [1; 2],
            false,
        )
        .expect("the max pool is valid");
        let (mut output, mut places) = (Vec::new(), Vec::new());
        max_pool(&pool, &input, &mut output, None);
        written.stored(&output);
        max_pool(&pool, &input, &mut output, Some(&mut places));
        written.stored(&output);
        written.places(&places);
        let mut input_grad = Vec::new();
        let output_grad = data::<E>(output.len(), 2);
        max_pool_backward(&pool, &output_grad, &places, &mut input_grad);
        written.stored(&input_grad);

        let relu = Activation::Relu;
        normalize_max_pool(&geometry, &input, affine, relu, &pool, &mut output, &mut places);
        written.stored(&output);
        written.places(&places);
        let pass = Backward {
            geometry: &geometry,
            input: Some(&conv_input),
            weight: Some(&weight),
            output_grad: OutputGrad::Pooled(PooledGrad {
                geometry: &pool,
                output_grad: &output_grad,
                places: &places,
            }),
            affine,
            activation: relu,
            residual: None,
            output: None,
        };
        for sums in [
            pooled_grad_sums(&pass, &output),
            grad_sums(&pass, ConvOutput::Recompute),
        ] {
            written.computed(&sums.grad);
            written.computed(&sums.grad_deviation);
        }
        let mut weight_grad = Vec::new();
        backward(
            &pass,
            None,
            Some(InputGradCoefficients {
                scale: &scale,
                slope: &scale,
                offset: &shift,
            }),
            Gradients {
                input: Some((&mut input_grad, &weight)),
                weight: Some(&mut weight_grad),
                residual: None,
            },
        );
        written.stored(&input_grad);
        written.computed(&weight_grad);
    }
    written
}
