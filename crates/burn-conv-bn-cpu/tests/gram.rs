//! Gradients of pointwise convolutions by products of the input, against naive loops in f64.

use burn_conv_bn_cpu::{
    Activation, Affine, Backward, ConvOutput, Element, Geometry, GradSums, Gradients, Gram,
    InputGradCoefficients, OutputGrad, Real, backward, grad_sums,
};
use half::{bf16, f16};

use self::reference::{Case as Conv, random, rounded};

mod reference;

/// A pointwise convolution without padding, and what is behind and before it.
#[derive(Clone, Copy, Debug)]
struct Case {
    conv: Conv,
    activation: Activation,
    /// Of the input's values, before the input is scaled and the weight by the inverse.
    mean: f64,
    scale: f64,
}

const CONV: Conv = Conv {
    batch: 3,
    channels: [6, 13],
    input: [1, 12, 11],
    kernel: [1; 3],
    ..reference::PLAIN
};

const PLAIN: Case = Case {
    conv: CONV,
    activation: Activation::Relu,
    mean: 0.3,
    scale: 1.0,
};

fn cases() -> Vec<Case> {
    let convs = [
        CONV,
        // Strides over three dimensions, and more images than blocks.
        Conv {
            batch: 2,
            input: [5, 6, 7],
            stride: [2, 1, 3],
            ..CONV
        },
        Conv {
            batch: 70,
            channels: [1, 2],
            input: [1, 1, 9],
            ..CONV
        },
        // One image in bands, and tiles of a part of an image with channels for every kernel.
        Conv {
            batch: 1,
            channels: [3, 7],
            input: [1, 130, 97],
            ..CONV
        },
        Conv {
            channels: [64, 129],
            input: [1, 47, 46],
            stride: [1, 2, 2],
            ..CONV
        },
    ];
    let activations = [
        Activation::Identity,
        Activation::Relu,
        Activation::Relu6,
        Activation::LeakyRelu {
            negative_slope: 0.1,
        },
    ];
    convs
        .into_iter()
        .flat_map(|conv| {
            activations.map(|activation| Case {
                conv,
                activation,
                ..PLAIN
            })
        })
        .collect()
}

/// The tensors of a case, as they are stored.
struct Data<E: Element> {
    geometry: Geometry,
    input: Vec<E>,
    weight: Vec<E::Real>,
    output_grad: Vec<E>,
    output: Vec<E>,
    mean: Vec<E::Real>,
    scale: Vec<E::Real>,
    slope: Vec<E::Real>,
    wanted: Wanted,
}

/// What loops in f64 make of the stored values.
struct Wanted {
    sums: GradSums,
    offset: Vec<f64>,
    input_grad: Vec<f64>,
    weight_grad: Vec<f64>,
    residual_grad: Vec<f64>,
}

/// All results of a backward pass.
#[derive(Clone, Debug, PartialEq)]
struct Results<E: Element> {
    sums: GradSums,
    input_grad: Vec<E>,
    weight_grad: Vec<E::Real>,
    residual_grad: Vec<E>,
}

/// The values as they are stored, and what is read back.
fn stored<E: Element>(values: &[f64]) -> (Vec<E>, Vec<f64>) {
    let mut stored = vec![E::default(); values.len()];
    E::store(&rounded(values), &mut stored);
    let read = doubles(&stored);
    (stored, read)
}

/// As [`stored`], of a weight or of channels.
fn real<T: Real>(values: &[f64]) -> (Vec<T>, Vec<f64>) {
    let real = rounded::<T>(values);
    let read = real.iter().map(|value| value.to_f64()).collect();
    (real, read)
}

fn doubles<E: Element>(values: &[E]) -> Vec<f64> {
    let mut real = vec![E::Real::default(); values.len()];
    E::load(values, &mut real);
    real.iter().map(|value| value.to_f64()).collect()
}

impl Case {
    fn data<E: Element>(&self) -> Data<E> {
        let conv = self.conv;
        let geometry = conv.geometry();
        let map = |len: usize, seed: u64, map: &dyn Fn(f64) -> f64| -> Vec<f64> {
            random(len, seed).into_iter().map(map).collect()
        };
        let len = conv.batch * geometry.output_len();
        let (input, x) = stored::<E>(&map(conv.batch * geometry.input_len(), 1, &|value| {
            (value + self.mean) * self.scale
        }));
        let (weight, w) =
            real::<E::Real>(&map(geometry.weight_len(), 2, &|value| value / self.scale));
        let (output_grad, dy) = stored::<E>(&random(len, 3));
        let (output, y) = stored::<E>(&map(len, 4, &|value| 4.0 * value + 2.0));
        let (scale, scales) = real::<E::Real>(&random(conv.channels[1], 5));
        let (slope, slopes) = real::<E::Real>(&random(conv.channels[1], 6));

        let g: Vec<f64> = dy
            .iter()
            .zip(&y)
            .map(|(dy, y)| slope_at(self.activation, *y) * dy)
            .collect();
        let z = conv.conv(&x, &w);
        let means = conv.means(&z);
        let [grad, grad_deviation] = conv.sums(&g, &z, &means);
        // Batch norm's: the gradient of its input has no mean.
        let count = (conv.batch * geometry.positions()) as f64;
        let sums_and_scales = grad.iter().zip(&scales);
        let offset: Vec<f64> = sums_and_scales
            .map(|(sum, scale)| -sum * scale / count)
            .collect();
        let [input_grad, weight_grad] =
            conv.gradients([&x, &w], [&g, &z], [&means, &scales, &slopes, &offset]);
        Data {
            geometry,
            input,
            weight,
            output_grad,
            output,
            mean: rounded(&means),
            scale,
            slope,
            wanted: Wanted {
                sums: GradSums {
                    grad,
                    grad_deviation,
                },
                offset,
                input_grad,
                weight_grad,
                residual_grad: g,
            },
        }
    }
}

/// The activation's derivative where its output is `y`.
fn slope_at(activation: Activation, y: f64) -> f64 {
    match activation {
        Activation::Identity => 1.0,
        Activation::Relu => f64::from(y > 0.0),
        Activation::Relu6 => f64::from(y > 0.0 && y < 6.0),
        Activation::LeakyRelu { negative_slope } => {
            if y > 0.0 {
                1.0
            } else {
                negative_slope
            }
        }
        other => unreachable!("{other:?}"),
    }
}

impl<E: Element> Data<E> {
    fn pass(&self, activation: Activation) -> Backward<'_, E> {
        Backward {
            geometry: &self.geometry,
            input: Some(&self.input),
            weight: Some(&self.weight),
            output_grad: OutputGrad::Whole(&self.output_grad),
            affine: Affine {
                mean: &self.mean,
                scale: &self.scale,
                shift: &self.mean,
            },
            activation,
            residual: None,
            output: Some(&self.output),
        }
    }

    /// The requested gradients of input, weight and residual; the others stay empty.
    fn run(
        &self,
        activation: Activation,
        mut conv_output: ConvOutput<'_, E>,
        wanted: [bool; 3],
    ) -> Results<E> {
        let pass = self.pass(activation);
        let sums = grad_sums(&pass, conv_output.reborrow());
        let offset = rounded::<E::Real>(&self.wanted.offset);
        let coefficients = InputGradCoefficients {
            scale: &self.scale,
            slope: &self.slope,
            offset: &offset,
        };
        let (mut input_grad, mut weight_grad, mut residual_grad) =
            (Vec::new(), Vec::new(), Vec::new());
        let gradients = Gradients {
            input: wanted[0].then_some((&mut input_grad, self.weight.as_slice())),
            weight: wanted[1].then_some(&mut weight_grad),
            residual: wanted[2].then_some(&mut residual_grad),
        };
        backward(&pass, conv_output, Some(coefficients), gradients);
        Results {
            sums,
            input_grad,
            weight_grad,
            residual_grad,
        }
    }

    fn by_products(&self, activation: Activation) -> Results<E> {
        self.run(
            activation,
            ConvOutput::Gram(&mut Gram::default()),
            [true; 3],
        )
    }

    /// The largest differences from the loops, in units of the largest value, of the two sums and the gradients of input,
    /// weight and residual.
    fn errors(&self, results: &Results<E>) -> [f64; 5] {
        let Wanted {
            sums,
            input_grad,
            weight_grad,
            residual_grad,
            ..
        } = &self.wanted;
        let of_weight: Vec<f64> = results
            .weight_grad
            .iter()
            .map(|value| value.to_f64())
            .collect();
        [
            error(&results.sums.grad, &sums.grad),
            error(&results.sums.grad_deviation, &sums.grad_deviation),
            error(&doubles(&results.input_grad), input_grad),
            error(&of_weight, weight_grad),
            error(&doubles(&results.residual_grad), residual_grad),
        ]
    }
}

fn error(got: &[f64], wanted: &[f64]) -> f64 {
    assert_eq!(got.len(), wanted.len());
    let largest = wanted
        .iter()
        .fold(0.0f64, |most, value| most.max(value.abs()));
    let differences = got
        .iter()
        .zip(wanted)
        .map(|(got, wanted)| (got - wanted).abs());
    differences.fold(0.0, |most, value| {
        if value > most || value.is_nan() {
            value
        } else {
            most
        }
    }) / largest
}

fn compare<E: Element>(tolerance: f64) {
    for case in cases() {
        let data = case.data::<E>();
        assert!(data.pass(case.activation).allows_gram(), "{case:?}");
        let errors = data.errors(&data.by_products(case.activation));
        assert!(
            errors.iter().all(|error| *error <= tolerance),
            "{errors:?} for {case:?}"
        );
    }
}

#[test]
fn products_of_the_input_replace_the_output() {
    compare::<f64>(1e-12);
    compare::<f32>(1e-5);
    compare::<f16>(2e-3);
    compare::<bf16>(1e-2);
}

/// The mean is subtracted before products are formed: they lose no more digits than the output.
#[test]
fn a_large_mean_costs_no_digits() {
    for mean in [10.0, 1000.0] {
        let case = Case { mean, ..PLAIN };
        let data = case.data::<f32>();
        let recomputed = data.run(case.activation, ConvOutput::Recompute, [true; 3]);
        let bounds = data.errors(&recomputed).map(|error| 2.0 * error + 1e-6);
        let errors = data.errors(&data.by_products(case.activation));
        assert!(
            errors
                .iter()
                .zip(bounds)
                .all(|(error, bound)| *error <= bound),
            "{errors:?} {bounds:?}"
        );
    }
}

/// Squares that single precision cannot hold leave the output to be recomputed; a channel without spread does not.
#[test]
fn squares_out_of_range_are_not_formed() {
    for (scale, is_in_range) in [(1e-25, false), (1e-8, true), (1e8, true), (1e25, false)] {
        let case = Case { scale, ..PLAIN };
        let mut data = case.data::<f32>();
        let recomputed = data.run(case.activation, ConvOutput::Recompute, [true; 3]);
        let results = data.by_products(case.activation);
        assert_eq!(results != recomputed, is_in_range, "{scale:e}");
        assert!(
            data.errors(&results).iter().all(|error| *error < 1e-5),
            "{scale:e}"
        );

        let plane = case.conv.input.iter().product();
        for image in data.input.chunks_exact_mut(data.geometry.input_len()) {
            image[..plane].fill(0.0);
        }
        let recomputed = data.run(case.activation, ConvOutput::Recompute, [true; 3]);
        assert_eq!(
            data.by_products(case.activation) != recomputed,
            is_in_range,
            "{scale:e}"
        );
    }
}

/// The first image's mean is over all of it, also over positions that a stride skips.
#[test]
fn a_mean_far_from_the_first_image_is_not_subtracted() {
    let case = Case {
        conv: Conv {
            stride: [1, 1, 2],
            ..CONV
        },
        ..PLAIN
    };
    for (beside, is_near) in [(0.0, true), (3.0, true), (100.0, false), (1e4, false)] {
        let mut data = case.data::<f32>();
        for row in data.input.chunks_exact_mut(case.conv.input[2]) {
            row.iter_mut()
                .skip(1)
                .step_by(2)
                .for_each(|value| *value += beside);
        }
        let recomputed = data.run(case.activation, ConvOutput::Recompute, [true; 3]);
        let results = data.by_products(case.activation);
        assert_eq!(results != recomputed, is_near, "{beside:e}");
        let errors = data.errors(&results);
        assert!(errors.iter().all(|error| *error < 1e-5), "{errors:?}");
    }
}

/// Products of an earlier pass serve no later one.
#[test]
fn products_are_those_of_the_last_sums() {
    let mut gram = Gram::default();
    grad_sums(
        &PLAIN.data::<f32>().pass(PLAIN.activation),
        ConvOutput::Gram(&mut gram),
    );
    let case = Case {
        scale: 1e25,
        ..PLAIN
    };
    let data = case.data::<f32>();
    let recomputed = data.run(case.activation, ConvOutput::Recompute, [true; 3]);
    let results = data.run(case.activation, ConvOutput::Gram(&mut gram), [true; 3]);
    assert_eq!(results, recomputed);
}

#[test]
#[should_panic(expected = "for passes with `allows_gram`")]
fn a_pass_that_needs_the_output_takes_no_products() {
    let data = PLAIN.data::<f32>();
    let mut pass = data.pass(PLAIN.activation);
    pass.output = None;
    grad_sums(&pass, ConvOutput::Gram(&mut Gram::default()));
}

#[test]
#[should_panic(expected = "ConvOutput::Gram requires coefficients")]
fn products_require_coefficients() {
    let data = PLAIN.data::<f32>();
    let (pass, mut gram) = (data.pass(PLAIN.activation), Gram::default());
    grad_sums(&pass, ConvOutput::Gram(&mut gram));
    let gradients = Gradients {
        input: None,
        weight: Some(&mut Vec::new()),
        residual: None,
    };
    backward(&pass, ConvOutput::Gram(&mut gram), None, gradients);
}

#[test]
fn each_gradient_comes_alone() {
    let data = PLAIN.data::<f32>();
    let all = data.by_products(PLAIN.activation);
    for index in 0..8 {
        let wanted = [1, 2, 4].map(|bit| index & bit > 0);
        let got = data.run(
            PLAIN.activation,
            ConvOutput::Gram(&mut Gram::default()),
            wanted,
        );
        let mut expected = all.clone();
        for (list, is_wanted) in [
            &mut expected.input_grad,
            &mut expected.weight_grad,
            &mut expected.residual_grad,
        ]
        .into_iter()
        .zip(wanted)
        {
            if !is_wanted {
                list.clear();
            }
        }
        assert_eq!(got, expected, "{wanted:?}");
    }
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    for case in cases() {
        let data = case.data::<f32>();
        let on = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            pool.install(|| data.by_products(case.activation))
        };
        let one = on(1);
        assert!(on(2) == one && on(5) == one, "{case:?}");
    }
}

#[test]
fn products_serve_few_inputs_and_known_derivatives() {
    let with = |conv: Conv| Case { conv, ..PLAIN };
    let allows = |case: Case, output: bool| {
        let data = case.data::<f32>();
        let mut pass = data.pass(case.activation);
        pass.output = pass.output.filter(|_| output);
        pass.allows_gram()
    };
    assert!(allows(PLAIN, true));
    assert!(allows(
        Case {
            activation: Activation::Identity,
            ..PLAIN
        },
        false
    ));
    assert!(!allows(PLAIN, false));
    assert!(!allows(
        with(Conv {
            channels: [12, 13],
            ..CONV
        }),
        true
    ));
    // Few positions for the products of the weight, and a kernel.
    assert!(!allows(
        with(Conv {
            batch: 1,
            input: [1, 2, 2],
            ..CONV
        }),
        true
    ));
    assert!(!allows(
        with(Conv {
            kernel: [1, 1, 2],
            ..CONV
        }),
        true
    ));
}
