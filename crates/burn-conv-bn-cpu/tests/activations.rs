//! Every activation against its formula in f64 and the formula's slope by finite differences,
//! through the kernels.

use std::f64::consts::PI;

use burn_conv_bn_cpu::{
    Activation, Affine, Backward, ConvOutput, Element, Geometry, Gradients, OutputGrad, Real,
    backward, grad_sums, normalize,
};
use half::{bf16, f16};

const ACTIVATIONS: [Activation; 16] = [
    Activation::Identity,
    Activation::Relu,
    Activation::Relu6,
    Activation::LeakyRelu {
        negative_slope: 0.01,
    },
    Activation::LeakyRelu {
        negative_slope: 0.0,
    },
    Activation::LeakyRelu {
        negative_slope: -0.5,
    },
    Activation::Silu,
    Activation::Gelu,
    Activation::GeluApproximate,
    Activation::HardSwish,
    Activation::Sigmoid,
    Activation::HardSigmoid {
        alpha: 0.2,
        beta: 0.5,
    },
    Activation::Tanh,
    Activation::Elu { alpha: 0.75 },
    Activation::Mish,
    Activation::Softplus { beta: 2.0 },
];

fn formula(activation: Activation, v: f64) -> f64 {
    match activation {
        Activation::Identity => v,
        Activation::Relu => v.max(0.0),
        Activation::Relu6 => v.clamp(0.0, 6.0),
        Activation::LeakyRelu { negative_slope } => {
            if v > 0.0 {
                v
            } else {
                negative_slope * v
            }
        }
        Activation::Silu => v / (1.0 + (-v).exp()),
        Activation::Gelu => v * 0.5 * (1.0 + libm::erf(v / 2f64.sqrt())),
        Activation::GeluApproximate => {
            let cubic = v + 0.044715 * v.powi(3);
            v * 0.5 * (1.0 + ((2.0 / PI).sqrt() * cubic).tanh())
        }
        Activation::HardSwish => v * ((v + 3.0) / 6.0).clamp(0.0, 1.0),
        Activation::Sigmoid => 1.0 / (1.0 + (-v).exp()),
        Activation::HardSigmoid { alpha, beta } => (alpha * v + beta).clamp(0.0, 1.0),
        Activation::Tanh => v.tanh(),
        Activation::Elu { alpha } => {
            if v > 0.0 {
                v
            } else {
                alpha * (v.exp() - 1.0)
            }
        }
        Activation::Mish => v * softplus(v).tanh(),
        Activation::Softplus { beta } => softplus(beta * v) / beta,
    }
}

fn softplus(v: f64) -> f64 {
    v.max(0.0) + libm::log1p((-v.abs()).exp())
}

fn slope(activation: Activation, v: f64) -> f64 {
    let step = 1e-5;
    (formula(activation, v + step) - formula(activation, v - step)) / (2.0 * step)
}

/// Whether the derivative can be told from the output.
fn is_told_by_output(activation: Activation) -> bool {
    match activation {
        Activation::Relu | Activation::Relu6 => true,
        Activation::LeakyRelu { negative_slope } => negative_slope >= 0.0,
        _ => false,
    }
}

/// One image of one channel: the kernels see `values` as the convolution's output.
fn line(len: usize) -> Geometry {
    Geometry::new(
        1,
        [1, 1],
        1,
        [1, 1, len],
        [1; 3],
        [1; 3],
        [(0, 0); 3],
        [1; 3],
    )
    .unwrap()
}

/// The output, `sum(g)` and `g` of `activation(scale * (z - mean) + shift + residual)`.
struct Results {
    output: Vec<f64>,
    grad_sum: f64,
    grad: Vec<f64>,
}

const MEAN: f64 = 0.25;
const SCALE: f64 = 1.5;
const SHIFT: f64 = -0.125;

fn run<E: Element>(
    activation: Activation,
    z: &[f64],
    residual: Option<&[f64]>,
    output_grad: &[f64],
    by_output: bool,
) -> Results {
    let stored = |values: &[f64]| {
        let reals: Vec<E::Real> = values.iter().map(|v| E::Real::from_f64(*v)).collect();
        let mut stored = vec![E::default(); reals.len()];
        E::store(&reals, &mut stored);
        stored
    };
    let loaded = |values: &[E]| {
        let mut reals = vec![E::Real::ZERO; values.len()];
        E::load(values, &mut reals);
        reals.into_iter().map(Real::to_f64).collect::<Vec<f64>>()
    };
    let geometry = line(z.len());
    let [mean, scale, shift] = [MEAN, SCALE, SHIFT].map(|value| [E::Real::from_f64(value)]);
    let affine = Affine {
        mean: &mean,
        scale: &scale,
        shift: &shift,
    };
    let (z, output_grad) = (stored(z), stored(output_grad));
    let residual = residual.map(stored);
    let mut output = z.clone();
    normalize(
        &geometry,
        &mut output,
        affine,
        residual.as_deref(),
        activation,
    );
    let pass = Backward {
        geometry: &geometry,
        input: None,
        weight: None,
        output_grad: OutputGrad::Whole(&output_grad),
        affine,
        activation,
        residual: residual.as_deref().filter(|_| !by_output),
        output: by_output.then_some(&output),
    };
    let sums = grad_sums(&pass, ConvOutput::Kept(&z));
    let mut grad = vec![E::default(); z.len()];
    backward(
        &pass,
        ConvOutput::Kept(&z),
        None,
        Gradients {
            input: None,
            weight: None,
            residual: Some(&mut grad),
        },
    );
    Results {
        output: loaded(&output),
        grad_sum: sums.grad[0],
        grad: loaded(&grad),
    }
}

/// Pre-activations all over the functions' bends, none within a difference of a kink.
fn pre_activations() -> Vec<f64> {
    (-410..410)
        .map(|step| f64::from(step) * 0.02 + 0.01)
        .collect()
}

fn compare<E: Element>(tolerance: f64) {
    let wanted = pre_activations();
    let output_grad: Vec<f64> = (0..wanted.len())
        .map(|index| ((index * 37 % 64) as f64 - 31.5) / 32.0)
        .collect();
    let residual: Vec<f64> = (0..wanted.len())
        .map(|index| (index % 16) as f64 / 8.0 - 1.0)
        .collect();
    for activation in ACTIVATIONS {
        for with_residual in [false, true] {
            // Rounded as the kernels see them.
            let round = |value: f64| {
                let mut stored = [E::default()];
                E::store(&[E::Real::from_f64(value)], &mut stored);
                let mut loaded = [E::Real::ZERO];
                E::load(&stored, &mut loaded);
                loaded[0].to_f64()
            };
            let z: Vec<f64> = wanted
                .iter()
                .zip(&residual)
                .map(|(v, residual)| {
                    let added = if with_residual { *residual } else { 0.0 };
                    round((v - added - SHIFT) / SCALE + MEAN)
                })
                .collect();
            let values: Vec<f64> = z
                .iter()
                .zip(&residual)
                .map(|(z, residual)| {
                    let added = if with_residual { *residual } else { 0.0 };
                    SCALE * (z - MEAN) + SHIFT + added
                })
                .collect();
            for by_output in [false, true] {
                if by_output && !is_told_by_output(activation) {
                    continue;
                }
                let what = format!("{activation:?}, residual {with_residual}, {by_output}");
                let residual = with_residual.then_some(&residual[..]);
                let results = run::<E>(activation, &z, residual, &output_grad, by_output);
                let mut grad_sum = 0.0;
                for (index, v) in values.iter().enumerate() {
                    // Rounding may carry a half's value over a kink.
                    if [-3.0, -2.5, 0.0, 2.5, 3.0, 6.0]
                        .iter()
                        .any(|kink| (v - kink).abs() < tolerance)
                    {
                        grad_sum += results.grad[index];
                        continue;
                    }
                    let output = formula(activation, *v);
                    let error = (results.output[index] - output).abs() / (1.0 + v.abs());
                    assert!(
                        error <= tolerance,
                        "{what}: {v} gives {}",
                        results.output[index]
                    );
                    let grad = round(output_grad[index]) * slope(activation, *v);
                    let error = (results.grad[index] - grad).abs();
                    assert!(
                        error <= tolerance.max(1e-9),
                        "{what}: {v} has {}, not {grad}",
                        results.grad[index]
                    );
                    grad_sum += grad;
                }
                let error = (results.grad_sum - grad_sum).abs() / values.len() as f64;
                assert!(
                    error <= tolerance.max(1e-9),
                    "{what}: {} sums to {grad_sum}",
                    results.grad_sum
                );
            }
        }
    }
}

#[test]
fn follow_their_formulas() {
    compare::<f64>(1e-12);
    compare::<f32>(1e-6);
    compare::<f16>(2e-3);
    compare::<bf16>(1.6e-2);
}

/// Far out the smooth ones are straight lines, not NaN.
#[test]
fn stay_finite_far_out() {
    for activation in ACTIVATIONS {
        for v in [-3e4, -200.0, -90.0, 90.0, 200.0, 3e4] {
            let z = [(v - SHIFT) / SCALE + MEAN];
            let results = run::<f32>(activation, &z, None, &[1.0], false);
            let (output, grad) = (results.output[0], results.grad[0]);
            let wanted = formula(activation, v);
            let error = (output - wanted).abs();
            assert!(
                error <= 1e-5 * v.abs(),
                "{activation:?}: {v} gives {output}"
            );
            let wanted = slope(activation, v);
            let error = (grad - wanted).abs();
            assert!(
                error <= 1e-5,
                "{activation:?}: {v} has {grad}, not {wanted}"
            );
        }
    }
}

/// Tails keep their digits: what is far below 1 is not the rounded rest of a difference with 1.
#[test]
fn tails_are_accurate() {
    fn check<E: Element>(tolerance: f64) {
        let hyperbolic = |v: f64| 1.0 / v.cosh().powi(2);
        let logistic = |v: f64| 1.0 / (2.0 + v.exp() + (-v).exp());
        // Exact also as the difference of residual and shift.
        let tiny = 2f64.powi(-20);
        let outputs: [(Activation, f64, f64); 8] = [
            (Activation::Sigmoid, -20.0, (-20f64).exp()),
            (Activation::Tanh, tiny, tiny),
            (Activation::Elu { alpha: 1.0 }, -tiny, (-tiny).exp_m1()),
            (Activation::Mish, -20.0, -20.0 * (-20f64).exp()),
            (Activation::Softplus { beta: 1.0 }, -20.0, (-20f64).exp()),
            (Activation::Softplus { beta: 1.0 }, 21.0, softplus(21.0)),
            (Activation::Gelu, -6.0, -3.0 * libm::erfc(6.0 / 2f64.sqrt())),
            (Activation::GeluApproximate, -6.0, {
                let doubled = 2.0 * (2.0 / PI).sqrt() * (6.0 + 0.044715 * 216.0);
                -6.0 / (1.0 + doubled.exp())
            }),
        ];
        let slopes: [(Activation, f64, f64); 5] = [
            (Activation::Sigmoid, 20.0, logistic(20.0)),
            (Activation::Sigmoid, -20.0, logistic(20.0)),
            (Activation::Tanh, 10.0, hyperbolic(10.0)),
            (Activation::Elu { alpha: 1.0 }, -20.0, (-20f64).exp()),
            (
                Activation::Softplus { beta: 1.0 },
                -20.0,
                1.0 / (1.0 + 20f64.exp()),
            ),
        ];
        let run = |activation, v| run::<E>(activation, &[MEAN], Some(&[v - SHIFT]), &[1.0], false);
        let close = |what: String, got: f64, wanted: f64| {
            let error = (got - wanted).abs() / wanted.abs();
            assert!(error <= tolerance, "{what}: {got}, not {wanted}");
        };
        for (activation, v, wanted) in outputs {
            let got = run(activation, v).output[0];
            close(format!("{activation:?} of {v}"), got, wanted);
        }
        for (activation, v, wanted) in slopes {
            let got = run(activation, v).grad[0];
            close(format!("slope of {activation:?} at {v}"), got, wanted);
        }
    }
    check::<f64>(1e-8);
    check::<f32>(2e-5);
}

#[test]
fn keep_nan() {
    for activation in ACTIVATIONS {
        for residual in [None, Some(&[1.0][..])] {
            let results = run::<f32>(activation, &[f64::NAN], residual, &[1.0], false);
            assert!(results.output[0].is_nan(), "{activation:?}");
        }
    }
}

/// Where the derivative is 0, infinity and NaN are not passed on: beyond the kinks, where it underflows,
/// and at HardSwish's minimum.
#[test]
fn a_derivative_of_zero_passes_nothing() {
    fn check<E: Element>() {
        let leaky = |negative_slope| Activation::LeakyRelu { negative_slope };
        let hard_sigmoid = |alpha| Activation::HardSigmoid { alpha, beta: 0.5 };
        for (activation, values) in [
            (Activation::Relu, &[-1.0, 0.0][..]),
            (Activation::Relu6, &[-1.0, 0.0, 6.0, 8.0]),
            (leaky(0.0), &[-1.0, 0.0]),
            (Activation::Silu, &[-1e4]),
            (Activation::Gelu, &[-1e4]),
            (Activation::GeluApproximate, &[-1e4]),
            (Activation::HardSwish, &[-8.0, -3.0, -1.5]),
            (Activation::Sigmoid, &[-1e4, 1e4]),
            (hard_sigmoid(0.2), &[-8.0, -2.5, 2.5, 8.0]),
            (hard_sigmoid(0.0), &[0.0]),
            (Activation::Tanh, &[-1e4, 1e4]),
            (Activation::Elu { alpha: 1.0 }, &[-1e4]),
            (Activation::Elu { alpha: 0.0 }, &[-1.0, 0.0]),
            (Activation::Mish, &[-1e4]),
            (Activation::Softplus { beta: 1.0 }, &[-1e4]),
        ] {
            for v in values {
                // The pre-activation is the residual and the shift, exactly.
                let residual = [v - SHIFT];
                for output_grad in [f64::INFINITY, f64::NEG_INFINITY, f64::NAN] {
                    for by_output in [false, true] {
                        if by_output && !is_told_by_output(activation) {
                            continue;
                        }
                        let results = run::<E>(
                            activation,
                            &[MEAN],
                            Some(&residual),
                            &[output_grad],
                            by_output,
                        );
                        let what = format!("{activation:?} at {v} of {output_grad}");
                        assert_eq!((results.grad[0], results.grad_sum), (0.0, 0.0), "{what}");
                    }
                }
            }
        }
    }
    check::<f64>();
    check::<f32>();
}
