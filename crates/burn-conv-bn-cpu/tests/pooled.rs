//! The norm with a max pool right behind it, against the two one after the other.

use burn_conv_bn_cpu::{
    Activation, Affine, Backward, ConvOutput, Element, Geometry, GradSums, Gradients,
    InputGradCoefficients, OutputGrad, PoolGeometry, PooledGrad, Real, backward, conv, grad_sums,
    max_pool, max_pool_backward, normalize, normalize_max_pool, pooled_grad_sums,
};
use half::{bf16, f16};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// A convolution over images of that size, 3x3 with padding, and a pool over its output.
struct Case {
    batch: usize,
    channels: [usize; 2],
    size: [usize; 2],
    kernel: [usize; 2],
    stride: [usize; 2],
    padding: [usize; 2],
    dilation: [usize; 2],
}

impl Case {
    fn geometries(&self) -> (Geometry, PoolGeometry) {
        let [height, width] = self.size;
        let one = [1; 3];
        let geometry = Geometry::new(
            self.batch,
            self.channels,
            1,
            [1, height, width],
            [1, 3, 3],
            one,
            [(0, 0), (1, 1), (1, 1)],
            one,
        );
        let pool = PoolGeometry::new(
            self.batch * self.channels[1],
            self.size,
            self.kernel,
            self.stride,
            self.padding,
            self.dilation,
            false,
        );
        (geometry.unwrap(), pool.unwrap())
    }

    /// Whether no value is in two windows.
    fn is_apart(&self) -> bool {
        (0..2).all(|dim| (self.kernel[dim] - 1) * self.dilation[dim] < self.stride[dim])
    }
}

fn cases() -> Vec<Case> {
    let case = |batch, channels, size, kernel, stride, padding, dilation| Case {
        batch,
        channels,
        size,
        kernel,
        stride,
        padding,
        dilation,
    };
    let (one, two) = ([1, 1], [2, 2]);
    vec![
        // The tutorial's and VGG's: tiles of whole images.
        case(5, [3, 4], [8, 8], two, two, [0, 0], one),
        // A last row and a last column in no window, in tiles of more than one image.
        case(7, [2, 1], [9, 7], two, two, [0, 0], one),
        // With Winograd, in tiles of some rows.
        case(2, [16, 16], [70, 66], two, two, [0, 0], one),
        case(1, [3, 2], [101, 67], two, two, [0, 0], one),
        // ResNet's: windows that overlap, and padding.
        case(3, [3, 5], [13, 14], [3, 3], two, one, one),
        case(1, [16, 17], [64, 70], [3, 3], two, one, one),
        // Whatever else.
        case(2, [2, 3], [11, 12], [2, 3], [3, 1], [1, 0], [1, 2]),
        case(2, [2, 3], [12, 9], [1, 1], [4, 3], [0, 0], one),
        case(3, [2, 2], [6, 10], [5, 4], [1, 5], [2, 1], one),
    ]
}

fn random<E: Element>(len: usize, seed: u64) -> Vec<E> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let values: Vec<E::Real> = (0..len)
        .map(|_| E::Real::from_f64(rng.random_range(-1.0..1.0)))
        .collect();
    let mut stored = vec![E::default(); len];
    E::store(&values, &mut stored);
    stored
}

fn loaded<E: Element>(values: &[E]) -> Vec<f64> {
    let mut loaded = vec![E::Real::ZERO; values.len()];
    E::load(values, &mut loaded);
    loaded.iter().map(|value| value.to_f64()).collect()
}

/// Largest difference, relative to the largest of `wanted`.
fn distance(got: &[f64], wanted: &[f64]) -> f64 {
    assert_eq!(got.len(), wanted.len());
    let largest = wanted
        .iter()
        .fold(0.0f64, |most, value| most.max(value.abs()));
    let differences = got.iter().zip(wanted).map(|(a, b)| (a - b).abs());
    differences.fold(0.0, f64::max) / largest
}

fn check<E: Element>(case: &Case, activation: Activation, tolerance: f64) {
    let (geometry, pool) = case.geometries();
    let channels = case.channels[1];
    let reals = |len, seed| -> Vec<E::Real> {
        let values = loaded(&random::<f32>(len, seed));
        values.into_iter().map(E::Real::from_f64).collect()
    };
    let input = random::<E>(geometry.batch() * geometry.input_len(), 1);
    let weight = reals(geometry.weight_len(), 2);
    let mean = reals(channels, 3);
    let (positive, shift) = (reals(channels, 4), reals(channels, 5));
    // Either sign, and not near zero.
    let sign = |value: f64| {
        if value < 0.0 {
            value - 0.5
        } else {
            value + 0.5
        }
    };
    let scale: Vec<E::Real> = positive
        .iter()
        .map(|value| E::Real::from_f64(sign(value.to_f64())))
        .collect();
    let affine = Affine {
        mean: &mean,
        scale: &scale,
        shift: &shift,
    };

    let mut values = Vec::new();
    conv(&geometry, &input, &weight, &mut values);
    let (mut output, mut argmax) = (Vec::new(), Vec::new());
    normalize_max_pool(
        &geometry,
        &values,
        affine,
        activation,
        &pool,
        &mut output,
        &mut argmax,
    );
    let mut normalized = values.clone();
    normalize(&geometry, &mut normalized, affine, None, activation);
    let (mut wanted, mut wanted_argmax) = (Vec::new(), Vec::new());
    max_pool(&pool, &normalized, &mut wanted, Some(&mut wanted_argmax));
    assert_eq!(loaded(&output), loaded(&wanted));
    assert_eq!(argmax, wanted_argmax);

    let output_grad = random::<E>(output.len(), 6);
    let mut whole = Vec::new();
    max_pool_backward(&pool, &output_grad, &argmax, &mut whole);
    let pass = |output_grad| Backward {
        geometry: &geometry,
        input: Some(&input),
        weight: Some(&weight),
        output_grad,
        affine,
        activation,
        residual: None,
        output: None,
    };
    let apart = pass(OutputGrad::Whole(&whole));
    let pooled = pass(OutputGrad::Pooled(PooledGrad {
        geometry: &pool,
        output_grad: &output_grad,
        argmax: &argmax,
    }));

    let mut kept = Vec::new();
    let wanted = grad_sums(&apart, ConvOutput::Recompute);
    let got = grad_sums(&pooled, ConvOutput::Store(&mut kept));
    assert_eq!(loaded(&kept), loaded(&values));
    let compare = |got: &GradSums, wanted: &GradSums, tolerance: f64| {
        for (got, wanted) in [
            (&got.grad, &wanted.grad),
            (&got.grad_deviation, &wanted.grad_deviation),
        ] {
            let distance = distance(got, wanted);
            assert!(distance <= tolerance, "{distance:e} for {tolerance:e}");
        }
    };
    // Sums of overlapping windows are rounded in between, where they are stored in 16 bits.
    let is_exact = case.is_apart() || size_of::<E>() >= 4;
    let same = if is_exact { 0.0 } else { tolerance };
    compare(&got, &wanted, same);
    if matches!(activation, Activation::Identity | Activation::Relu) {
        compare(&pooled_grad_sums(&pooled, &output), &wanted, tolerance);
    }

    let slope = reals(channels, 7);
    let gradients = |pass: &Backward<'_, E>, kept: Option<&[E]>| {
        let (mut input_grad, mut weight_grad) = (Vec::new(), Vec::new());
        backward(
            pass,
            kept.map_or(ConvOutput::Recompute, ConvOutput::Kept),
            Some(InputGradCoefficients {
                scale: &scale,
                slope: &slope,
                offset: &shift,
            }),
            Gradients {
                input: Some((&mut input_grad, &weight)),
                weight: Some(&mut weight_grad),
                residual: None,
            },
        );
        let weight_grad = weight_grad.iter().map(|grad: &E::Real| grad.to_f64());
        [loaded(&input_grad), weight_grad.collect()]
    };
    let wanted = gradients(&apart, None);
    for kept in [None, Some(values.as_slice())] {
        for (got, wanted) in gradients(&pooled, kept).iter().zip(&wanted) {
            let distance = distance(got, wanted);
            assert!(distance <= same, "{distance:e} for {same:e}");
        }
    }
}

fn check_all<E: Element>(tolerance: f64) {
    for (index, case) in cases().iter().enumerate() {
        for activation in [
            Activation::Relu,
            Activation::Identity,
            Activation::HardSwish,
        ] {
            println!("case {index}, {activation:?}");
            check::<E>(case, activation, tolerance);
        }
    }
}

#[test]
fn f64_is_the_two_one_after_the_other() {
    check_all::<f64>(1e-12);
}

#[test]
fn f32_is_the_two_one_after_the_other() {
    check_all::<f32>(1e-5);
}

#[test]
fn halves_are_the_two_one_after_the_other() {
    check_all::<f16>(5e-3);
    check_all::<bf16>(4e-2);
}

/// Where a closed ReLU is the largest value of its window, nothing is passed on.
#[test]
fn closed_relus_pass_nothing() {
    fn check<E: Element>() {
        for case in cases() {
            let (geometry, pool) = case.geometries();
            let channels = case.channels[1];
            let reals = |len, seed| -> Vec<E::Real> {
                let values = loaded(&random::<f32>(len, seed));
                values.into_iter().map(E::Real::from_f64).collect()
            };
            let input = random::<E>(geometry.batch() * geometry.input_len(), 1);
            let weight = reals(geometry.weight_len(), 2);
            let [mean, scale, slope] = [3, 4, 5].map(|seed| reals(channels, seed));
            // Most are closed.
            let shift = vec![E::Real::from_f64(-1.0); channels];
            let affine = Affine {
                mean: &mean,
                scale: &scale,
                shift: &shift,
            };
            let mut values = Vec::new();
            conv(&geometry, &input, &weight, &mut values);
            let (mut output, mut argmax) = (Vec::new(), Vec::new());
            let relu = Activation::Relu;
            normalize_max_pool(
                &geometry,
                &values,
                affine,
                relu,
                &pool,
                &mut output,
                &mut argmax,
            );
            let is_closed: Vec<bool> = loaded(&output).iter().map(|y| *y == 0.0).collect();
            assert!(is_closed.contains(&true) && is_closed.contains(&false));
            let run = |at_closed: f64| {
                let mut grads = loaded(&random::<E>(output.len(), 6));
                for (grad, is_closed) in grads.iter_mut().zip(&is_closed) {
                    if *is_closed {
                        *grad = at_closed;
                    }
                }
                let grads: Vec<_> = grads.into_iter().map(E::Real::from_f64).collect();
                let mut output_grad = vec![E::default(); grads.len()];
                E::store(&grads, &mut output_grad);
                let pass = Backward {
                    geometry: &geometry,
                    input: Some(&input),
                    weight: Some(&weight),
                    output_grad: OutputGrad::Pooled(PooledGrad {
                        geometry: &pool,
                        output_grad: &output_grad,
                        argmax: &argmax,
                    }),
                    affine,
                    activation: relu,
                    residual: None,
                    output: None,
                };
                let sums = grad_sums(&pass, ConvOutput::Recompute);
                let (mut input_grad, mut weight_grad) = (Vec::new(), Vec::new());
                let coefficients = InputGradCoefficients {
                    scale: &scale,
                    slope: &slope,
                    offset: &mean,
                };
                let gradients = Gradients {
                    input: Some((&mut input_grad, &weight)),
                    weight: Some(&mut weight_grad),
                    residual: None,
                };
                backward(&pass, ConvOutput::Recompute, Some(coefficients), gradients);
                let weight_grad = weight_grad.iter().map(|grad: &E::Real| grad.to_f64());
                let grads = [loaded(&input_grad), weight_grad.collect()];
                (pooled_grad_sums(&pass, &output), sums, grads)
            };
            let wanted = run(0.0);
            for at_closed in [f64::INFINITY, f64::NEG_INFINITY, f64::NAN] {
                assert_eq!(run(at_closed), wanted, "{at_closed}");
            }
        }
    }
    check::<f64>();
    check::<f32>();
    check::<f16>();
    check::<bf16>();
}

#[test]
#[should_panic(expected = "misses the input")]
fn windows_beyond_the_padding_are_refused() {
    let one = [1; 3];
    let geometry = Geometry::new(1, [1, 1], 1, [1, 5, 5], one, one, [(0, 0); 3], one).unwrap();
    let two = [2, 2];
    let pool = PoolGeometry::new(1, [5, 5], two, two, [0, 0], [1, 1], true).unwrap();
    let affine = Affine {
        mean: &[0.0],
        scale: &[1.0],
        shift: &[0.0],
    };
    let (mut output, mut argmax) = (Vec::new(), Vec::new());
    normalize_max_pool(
        &geometry,
        &[0.0f32; 25],
        affine,
        Activation::Relu,
        &pool,
        &mut output,
        &mut argmax,
    );
}

#[test]
#[should_panic(expected = "does not tell")]
fn activations_that_hide_their_argument_are_refused() {
    let one = [1; 3];
    let geometry = Geometry::new(1, [1, 1], 1, [1, 2, 2], one, one, [(0, 0); 3], one).unwrap();
    let two = [2, 2];
    let pool = PoolGeometry::new(1, two, two, two, [0, 0], [1, 1], false).unwrap();
    let pass = Backward {
        geometry: &geometry,
        input: None,
        weight: None,
        output_grad: OutputGrad::Pooled(PooledGrad {
            geometry: &pool,
            output_grad: &[1.0f32],
            argmax: &[0],
        }),
        affine: Affine {
            mean: &[0.0],
            scale: &[1.0],
            shift: &[0.0],
        },
        activation: Activation::Silu,
        residual: None,
        output: None,
    };
    pooled_grad_sums(&pass, &[1.0]);
}
