//! Random applications of the op on Flex against the reference: outputs, statistics and every
//! gradient, over ranks, sizes, geometries, options, layouts and types.
//!
//! Each value has a bound of its own, which the reference computes along with it from what rounding
//! may do to it (`reference/ball.rs`). Where rounding may carry a pre-activation over a kink, either
//! derivative is right: the output's gradient is 0 there, so that nothing depends on which it is.
//!
//! A run draws the same cases each time. `PROPTEST_CASES` sets their number for each type, and
//! `PROPTEST_RNG_SEED` draws others. What fails is shrunk, printed, and kept by its seed in
//! `property.proptest-regressions`, to be run first from then on; a case that should outlive changes
//! to the strategies is written out in [`found`].

mod reference;

#[path = "reference/chain.rs"]
mod chain;
#[path = "reference/checks.rs"]
mod checks;
#[path = "reference/strategy.rs"]
mod strategy;

use burn::tensor::{DType, Device};
use burn_conv_bn::backend::Parents;
use burn_conv_bn::{Activation, ConvSpec, NormSpec, NormVariant, Recompute};

use reference::Number;
use reference::case::{Case, Expected, Gamma, Layout, Results, Values, flex_unit};
use strategy::{Plan, activations, cases, hold, sizes};

/// Cases of each type.
const CASES: u32 = 2500;

const FAILURES: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/tests/property.proptest-regressions"
);

/// Checks random cases; `least_sharp` of their comparisons must be sharp.
fn hold_on_flex(dtype: DType, seed: u64, least_sharp: f64) {
    let device = Device::flex();
    let plan = Plan {
        cases: CASES,
        seed,
        failures: FAILURES,
    };
    let tally = hold(
        &format!("{dtype:?}"),
        plan,
        &cases(sizes(), activations()),
        |case| case.check(dtype, &device, flex_unit(dtype)),
    );
    let sharp = tally.sharp as f64 / tally.compared.max(1) as f64;
    assert!(
        sharp >= least_sharp || tally.cases == 0,
        "{dtype:?}: the bounds are too wide to say much: {tally}"
    );
}

#[test]
fn random_cases_in_double_precision() {
    hold_on_flex(DType::F64, 64, 0.95);
}

#[test]
fn random_cases_in_single_precision() {
    hold_on_flex(DType::F32, 32, 0.8);
}

#[test]
fn random_cases_in_f16() {
    hold_on_flex(DType::F16, 16, 0.5);
}

#[test]
fn random_cases_in_bf16() {
    hold_on_flex(DType::BF16, 8, 0.5);
}

#[test]
fn random_chains_of_blocks() {
    chain::hold_chains();
}

const DTYPES: [DType; 4] = [DType::F64, DType::F32, DType::F16, DType::BF16];

fn check_on_flex(case: &Case) {
    for dtype in DTYPES {
        if let Err(error) = case.check(dtype, &Device::flex(), flex_unit(dtype)) {
            panic!("{error}\nin {case:#?}");
        }
    }
}

fn padded(groups: usize) -> ConvSpec {
    ConvSpec {
        padding: vec![(1, 1); 2],
        groups,
        ..ConvSpec::unit(2)
    }
}

/// Several tiles of an image, and of each of several groups, in the algorithm with fewer products:
/// more than random cases have time for.
#[test]
fn images_of_several_tiles_with_fewer_products() {
    let one = Case::new(padded(1), &[1, 16, 70, 67], &[17, 16, 3, 3]);
    check_on_flex(&Case {
        activation: Activation::Relu,
        ..one.clone()
    });
    check_on_flex(&Case {
        activation: Activation::HardSwish,
        residual: true,
        given_statistics: true,
        max_workspace: Some(1),
        ..one
    });
    check_on_flex(&Case {
        activation: Activation::Relu,
        residual: true,
        recompute: Recompute::Never,
        ..Case::new(padded(2), &[1, 32, 70, 67], &[32, 16, 3, 3])
    });
}

/// The smallest and oddest cases: two values in a channel, one in each image or both in one; an output over
/// padding alone; a kernel as large as its input; strides that leave most of it out.
#[test]
fn corner_cases() {
    let line = |stride, padding, dilation| ConvSpec {
        stride: vec![stride],
        padding: vec![padding],
        dilation: vec![dilation],
        groups: 1,
    };
    for norm in [
        NormSpec::default(),
        NormSpec::new(NormVariant::Tutorial, 1e-3),
    ] {
        for activation in activations() {
            for (spec, input, weight) in [
                (line(1, (0, 0), 1), [2, 1, 1], [1, 1, 1]),
                (line(1, (0, 0), 1), [1, 3, 2], [7, 3, 1]),
                (line(1, (3, 3), 1), [1, 2, 1], [2, 2, 3]),
                (line(1, (0, 0), 1), [5, 1, 9], [3, 1, 9]),
                (line(7, (0, 0), 1), [2, 2, 30], [2, 2, 2]),
                (line(1, (5, 0), 5), [2, 1, 1], [65, 1, 2]),
            ] {
                check_on_flex(&Case {
                    norm,
                    activation,
                    bias: true,
                    gamma: Gamma::SomeZero,
                    ..Case::new(spec, &input, &weight)
                });
            }
        }
    }
}

/// Every layout of every tensor, one at a time, in each rank.
#[test]
fn every_layout() {
    let layouts = [Layout::ChannelsLast, Layout::Slice, Layout::Expanded];
    for (input, weight) in [
        (vec![3, 4, 7], vec![5, 4, 3]),
        (vec![3, 4, 5, 6], vec![5, 4, 3, 2]),
        (vec![3, 4, 4, 3, 4], vec![5, 4, 2, 2, 3]),
        // Enough channels for fewer products.
        (vec![3, 17, 5, 6], vec![18, 17, 3, 3]),
    ] {
        for given_statistics in [false, true] {
            for layout in layouts {
                let case = Case {
                    activation: Activation::Silu,
                    bias: true,
                    residual: true,
                    given_statistics,
                    ..Case::new(ConvSpec::unit(input.len() - 2), &input, &weight)
                };
                check_on_flex(&Case {
                    input_layout: layout,
                    ..case.clone()
                });
                check_on_flex(&Case {
                    weight_layout: layout,
                    ..case.clone()
                });
                check_on_flex(&Case {
                    residual_layout: layout,
                    vector_slices: true,
                    ..case.clone()
                });
                check_on_flex(&Case {
                    grad_layout: layout,
                    half_norm: true,
                    ..case
                });
            }
        }
    }
}

/// Cases that failed once.
#[test]
fn found_before() {
    for case in found() {
        check_on_flex(&case);
    }
}

/// Written out as a failure prints them. The first did not fail: it shows how.
fn found() -> Vec<Case> {
    let none = Parents::default();
    vec![Case {
        norm: NormSpec::new(NormVariant::Tutorial, 1e-3),
        activation: Activation::LeakyRelu {
            negative_slope: -0.5,
        },
        recompute: Recompute::Never,
        max_workspace: Some(1),
        bias: true,
        gamma: Gamma::SomeZero,
        residual: true,
        given_statistics: false,
        tracked: Parents { bias: true, ..none },
        input_layout: Layout::Slice,
        input_values: Values {
            offset: 2.0,
            spread: 0.05,
        },
        seed: 7,
        ..Case::new(padded(2), &[2, 4, 3, 5], &[6, 2, 3, 3])
    }]
}

/// A case that uses everything, what should come out of it, and what does.
fn everything(dtype: DType) -> (Expected, Results) {
    let case = Case {
        activation: Activation::Silu,
        bias: true,
        residual: true,
        given_statistics: true,
        ..Case::new(padded(1), &[2, 3, 5, 4], &[4, 3, 3, 3])
    };
    let mut data = case.draw(dtype);
    let (expected, _) = case.expected(&mut data, dtype, flex_unit(dtype));
    let results = case.run(&data, dtype, &Device::flex());
    (expected, results)
}

/// The comparison itself: each tensor in turn has one value that is off by a twentieth of the
/// largest, or is not a number; is missing; is too short; is there though it should not be.
#[test]
fn wrong_results_are_refused() {
    for dtype in DTYPES {
        let (expected, right) = everything(dtype);
        expected.compare(&right).expect("these are right");
        for tensor in 0..right.0.len() {
            let wrong = |change: &dyn Fn(&mut Vec<f64>)| {
                let mut wrong = right.clone();
                change(wrong.0[tensor].as_mut().expect("everything is there"));
                wrong
            };
            let wanted = expected.0[tensor].as_ref().expect("everything is wanted");
            let values: Vec<f64> = wanted.0.iter().map(|ball| ball.value()).collect();
            let largest = values
                .iter()
                .fold(0.0f64, |most, value| most.max(value.abs()));
            for index in 0..values.len() {
                let moved = wrong(&|values| values[index] += 0.05 * largest);
                assert!(expected.compare(&moved).is_err(), "{dtype:?}, {tensor}");
                let lost = wrong(&|values| values[index] = f64::NAN);
                assert!(expected.compare(&lost).is_err(), "{dtype:?}, {tensor}");
            }
            let short = wrong(&|values| values.truncate(1));
            assert!(expected.compare(&short).is_err());
            let mut missing = right.clone();
            missing.0[tensor] = None;
            assert!(expected.compare(&missing).is_err());
            let mut unwanted = expected.clone();
            unwanted.0[tensor] = None;
            assert!(unwanted.compare(&right).is_err());
        }
    }
}

/// A value and its bound are computed together, and the value is that of the plain reference.
#[test]
fn bounds_do_not_change_values() {
    for given_statistics in [false, true] {
        let case = Case {
            activation: Activation::Gelu,
            given_statistics,
            ..Case::new(padded(1), &[2, 3, 5, 4], &[4, 3, 3, 3])
        };
        let mut data = case.draw(DType::F64);
        let (expected, _) = case.expected(&mut data, DType::F64, flex_unit(DType::F64));
        let op = case.op(DType::F64);
        let tensors = reference::Tensors {
            input: data.input.clone(),
            weight: data.weight.clone(),
            bias: data.bias.clone(),
            gamma: data.gamma.clone(),
            beta: data.beta.clone(),
            residual: data.residual.clone(),
            statistics: given_statistics.then(|| (data.mean.clone(), data.variance.clone())),
        };
        let forward = op.forward(&tensors);
        let grads = op.backward(&tensors, &forward, &data.output_grad);
        let balls = |tensor: usize| -> Vec<f64> {
            let wanted = expected.0[tensor].as_ref().expect("it is wanted");
            wanted.0.iter().map(|ball| ball.value()).collect()
        };
        assert_eq!(balls(0), forward.output);
        assert_eq!(balls(3), grads.input);
        assert_eq!(balls(4), grads.weight);
        assert_eq!(balls(6), grads.gamma);
    }
}
