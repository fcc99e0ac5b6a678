//! Gradients of pointwise convolutions by products of the input, against naive loops in f64.

use burn_conv_bn_cpu::{
    Activation, Affine, Backward, ConvOutput, Element, Geometry, GradSums, Gradients, Gram,
    InputGradCoefficients, OutputGrad, Real, backward, grad_sums,
};
use half::{bf16, f16};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// A pointwise convolution without padding.
#[derive(Clone, Copy, Debug)]
struct Case {
    batch: usize,
    channels: [usize; 2],
    input: [usize; 3],
    stride: [usize; 3],
    activation: Activation,
    /// Of the input's values, before the input is scaled and the weight by the inverse.
    mean: f64,
    scale: f64,
}

const PLAIN: Case = Case {
    batch: 3,
    channels: [6, 13],
    input: [1, 12, 11],
    stride: [1; 3],
    activation: Activation::Relu,
    mean: 0.3,
    scale: 1.0,
};

fn cases() -> Vec<Case> {
    let shapes = [
        PLAIN,
        // Strides over three dimensions, and more images than blocks.
        Case {
            batch: 2,
            input: [5, 6, 7],
            stride: [2, 1, 3],
            ..PLAIN
        },
        Case {
            batch: 70,
            channels: [1, 2],
            input: [1, 1, 9],
            ..PLAIN
        },
        // One image in bands, and tiles of a part of an image with channels for every kernel.
        Case {
            batch: 1,
            channels: [3, 7],
            input: [1, 130, 97],
            ..PLAIN
        },
        Case {
            channels: [64, 129],
            input: [1, 47, 46],
            stride: [1, 2, 2],
            ..PLAIN
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
    shapes
        .iter()
        .flat_map(|case| {
            activations.map(|activation| Case {
                activation,
                ..*case
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

fn random(len: usize, seed: u64) -> Vec<f64> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
}

fn stored<E: Element>(values: impl IntoIterator<Item = f64>) -> (Vec<E>, Vec<f64>) {
    let real: Vec<E::Real> = values.into_iter().map(Real::from_f64).collect();
    let mut stored = vec![E::default(); real.len()];
    E::store(&real, &mut stored);
    let read = doubles(&stored);
    (stored, read)
}

fn real<T: Real>(values: impl IntoIterator<Item = f64>) -> (Vec<T>, Vec<f64>) {
    let real: Vec<T> = values.into_iter().map(T::from_f64).collect();
    let read = real.iter().map(|value| value.to_f64()).collect();
    (real, read)
}

fn doubles<E: Element>(values: &[E]) -> Vec<f64> {
    let mut real = vec![E::Real::default(); values.len()];
    E::load(values, &mut real);
    real.iter().map(|value| value.to_f64()).collect()
}

impl Case {
    fn geometry(&self) -> Geometry {
        let one = [1; 3];
        Geometry::new(
            self.batch,
            self.channels,
            1,
            self.input,
            one,
            self.stride,
            [(0, 0); 3],
            one,
        )
        .unwrap()
    }

    /// For each position of the output of an image, that of the input.
    fn positions(&self) -> Vec<usize> {
        let [slices, rows, columns] = self.geometry().output();
        let [_, height, width] = self.input;
        let mut positions = Vec::new();
        for slice in 0..slices {
            for row in 0..rows {
                for column in 0..columns {
                    let at = (slice * self.stride[0] * height + row * self.stride[1]) * width;
                    positions.push(at + column * self.stride[2]);
                }
            }
        }
        positions
    }

    fn data<E: Element>(&self) -> Data<E> {
        let geometry = self.geometry();
        let [inputs, outputs] = self.channels;
        let values = random(self.batch * geometry.input_len(), 1);
        let values = values.iter().map(|value| (value + self.mean) * self.scale);
        let (input, x) = stored::<E>(values);
        let weights = random(geometry.weight_len(), 2);
        let (weight, w) = real::<E::Real>(weights.iter().map(|value| value / self.scale));
        let len = self.batch * geometry.output_len();
        let (output_grad, dy) = stored::<E>(random(len, 3));
        let (output, y) = stored::<E>(random(len, 4).iter().map(|value| 4.0 * value + 2.0));
        let (scale, scales) = real::<E::Real>(random(outputs, 5));
        let (slope, slopes) = real::<E::Real>(random(outputs, 6));

        let positions = self.positions();
        let plane = self.input.iter().product::<usize>();
        let at = |image: usize, channel: usize, channels: usize, len: usize| {
            (image * channels + channel) * len
        };
        let count = (self.batch * positions.len()) as f64;
        let g: Vec<f64> = dy
            .iter()
            .zip(&y)
            .map(|(dy, y)| slope_at(self.activation, *y) * dy)
            .collect();
        let mut z = vec![0.0; len];
        for image in 0..self.batch {
            for out in 0..outputs {
                for into in 0..inputs {
                    let (from, to) = (
                        at(image, into, inputs, plane),
                        at(image, out, outputs, positions.len()),
                    );
                    for (index, position) in positions.iter().enumerate() {
                        z[to + index] += w[out * inputs + into] * x[from + position];
                    }
                }
            }
        }
        let channel_of = |index: usize| index / positions.len() % outputs;
        let mut means = vec![0.0; outputs];
        for (index, z) in z.iter().enumerate() {
            means[channel_of(index)] += z / count;
        }
        let (mean, _) = real::<E::Real>(means.iter().copied());
        let mut sums = GradSums {
            grad: vec![0.0; outputs],
            grad_deviation: vec![0.0; outputs],
        };
        for (index, g) in g.iter().enumerate() {
            let channel = channel_of(index);
            sums.grad[channel] += g;
            sums.grad_deviation[channel] += g * (z[index] - means[channel]);
        }
        // Batch norm's: the gradient of its input has no mean.
        let offset: Vec<f64> = sums
            .grad
            .iter()
            .zip(&scales)
            .map(|(sum, scale)| -sum * scale / count)
            .collect();
        let mut input_grad = vec![0.0; x.len()];
        let mut weight_grad = vec![0.0; w.len()];
        for image in 0..self.batch {
            for out in 0..outputs {
                for into in 0..inputs {
                    let (from, to) = (
                        at(image, into, inputs, plane),
                        at(image, out, outputs, positions.len()),
                    );
                    for (index, position) in positions.iter().enumerate() {
                        let dz = scales[out] * g[to + index]
                            + slopes[out] * (z[to + index] - means[out])
                            + offset[out];
                        input_grad[from + position] += w[out * inputs + into] * dz;
                        weight_grad[out * inputs + into] += dz * x[from + position];
                    }
                }
            }
        }
        Data {
            geometry,
            input,
            weight,
            output_grad,
            output,
            mean,
            scale,
            slope,
            wanted: Wanted {
                sums,
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
        let offset: Vec<E::Real> = self
            .wanted
            .offset
            .iter()
            .map(|value| Real::from_f64(*value))
            .collect();
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

        let plane = case.input.iter().product();
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
        stride: [1, 1, 2],
        ..PLAIN
    };
    for (beside, is_near) in [(0.0, true), (1e4, false)] {
        let mut data = case.data::<f32>();
        for row in data.input.chunks_exact_mut(case.input[2]) {
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
        Case {
            channels: [12, 13],
            ..PLAIN
        },
        true
    ));
    // Few positions for the products of the weight, and a kernel.
    assert!(!allows(
        Case {
            batch: 1,
            input: [1, 2, 2],
            ..PLAIN
        },
        true
    ));
    let geometry = Geometry::new(
        3,
        [6, 13],
        1,
        [1, 12, 12],
        [1, 1, 2],
        [1; 3],
        [(0, 0); 3],
        [1; 3],
    )
    .unwrap();
    let data = Case {
        input: [1, 12, 11],
        ..PLAIN
    }
    .data::<f32>();
    let pass = Backward {
        geometry: &geometry,
        ..data.pass(Activation::Relu)
    };
    assert!(!pass.allows_gram());
}
