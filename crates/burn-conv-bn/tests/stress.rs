//! The op on Flex where numbers are large, tiny, all the same, or no numbers at all.
//!
//! Where the reference's bound for each value says something, that decides. Where every
//! implementation loses digits to cancellation, the two-times rule of flash-attention's tests does:
//! the error against double precision may be twice that of Burn's own layers, and a small part of
//! the tensor's largest value more.

mod reference;

use std::env;

use burn::module::{Param, RunningState};
use burn::nn::conv::Conv2dConfig;
use burn::nn::{BatchNormConfig, PaddingConfig2d};
use burn::tensor::{DType, Device, Tensor, TensorData};
use burn_conv_bn::backend::Parents;
use burn_conv_bn::{Activation, ConvBn2d, ConvSpec, NormSpec, NormVariant, Recompute};
use rayon::ThreadPoolBuilder;

use reference::case::{Case, Data, Gamma, Layout, NAMES, Results, Tally, Values, flex_unit, host};
use reference::{Op, Tensors, rounded};

const DTYPES: [DType; 4] = [DType::F64, DType::F32, DType::F16, DType::BF16];

const BATCH_NORM: NormSpec = NormSpec {
    variant: NormVariant::BatchNorm,
    epsilon: 1e-5,
};
const TUTORIAL: NormSpec = NormSpec {
    variant: NormVariant::Tutorial,
    epsilon: 1e-3,
};

// Places in `Results`.
const OUTPUT: usize = 0;
const MEAN: usize = 1;
const VARIANCE: usize = 2;
const INPUT_GRAD: usize = 3;
const WEIGHT_GRAD: usize = 4;
const GAMMA_GRAD: usize = 6;
const BETA_GRAD: usize = 7;
const RESIDUAL_GRAD: usize = 8;

/// A seed that `BURN_CONV_BN_SEED` changes. What is compared by the two-times rule keeps its own:
/// that is a rule about how errors are distributed, which one draw in many breaks by chance.
fn seed(number: u64) -> u64 {
    let chosen = env::var("BURN_CONV_BN_SEED").unwrap_or_else(|_| "0".to_string());
    let chosen: u64 = chosen.parse().expect("BURN_CONV_BN_SEED is a number");
    chosen.wrapping_mul(1 << 20).wrapping_add(number)
}

fn padded(groups: usize) -> ConvSpec {
    ConvSpec {
        padding: vec![(1, 1); 2],
        groups,
        ..ConvSpec::unit(2)
    }
}

fn strided() -> ConvSpec {
    ConvSpec {
        stride: vec![2, 2],
        ..ConvSpec::unit(2)
    }
}

/// Compares the op on those values with the reference, each value within its own bound.
fn check_on(case: &Case, mut data: Data, dtype: DType) -> Tally {
    let (expected, _) = case.expected(&mut data, dtype, flex_unit(dtype));
    let got = case.run(&data, dtype, &Device::flex());
    match expected.compare(&got) {
        Ok(tally) => tally,
        Err(error) => panic!("{error}\nin {case:#?}"),
    }
}

/// The same on values that the case draws.
fn check(case: &Case, dtype: DType) -> Tally {
    check_on(case, case.draw(dtype), dtype)
}

fn value(results: &Results, place: usize) -> &[f64] {
    let values = results.0[place].as_deref();
    values.unwrap_or_else(|| panic!("{}: there is none", NAMES[place]))
}

/// The case in f64 on the host, by the reference.
fn exact(case: &Case, data: &Data) -> Results {
    let op: Op = case.op(DType::F64);
    let tensors = Tensors {
        input: data.input.clone(),
        weight: data.weight.clone(),
        bias: data.bias.clone(),
        gamma: data.gamma.clone(),
        beta: data.beta.clone(),
        residual: data.residual.clone(),
        statistics: case
            .given_statistics
            .then(|| (data.mean.clone(), data.variance.clone())),
    };
    let forward = op.forward(&tensors);
    let grads = op.backward(&tensors, &forward, &data.output_grad);
    Results([
        Some(forward.output),
        Some(forward.mean),
        Some(forward.variance),
        Some(grads.input),
        Some(grads.weight),
        Some(grads.bias),
        Some(grads.gamma),
        Some(grads.beta),
        Some(grads.residual),
    ])
}

fn fixed<const N: usize>(sizes: &[usize]) -> [usize; N] {
    sizes.try_into().expect("the case is of two dimensions")
}

/// A step of a 2-D case as a layer, fused or of Burn's own `Conv2d` and `BatchNorm`. Mean and
/// variance are the running ones, which here are those of the last batch.
fn layer(case: &Case, data: &Data, dtype: DType, is_fused: bool) -> Results {
    let device = Device::flex().autodiff();
    let tensor = |values: &[f64], shape: [usize; 4]| -> Tensor<4> {
        Tensor::from_data(TensorData::new(values.to_vec(), shape), (&device, dtype))
    };
    let vector = |values: &[f64]| -> Tensor<1> {
        let data = TensorData::new(values.to_vec(), [values.len()]);
        Tensor::from_data(data, (&device, dtype))
    };
    let input_shape: [usize; 4] = fixed(&case.input);
    let weight_shape: [usize; 4] = fixed(&case.weight);
    let [(top, bottom), (left, right)] = [case.spec.padding[0], case.spec.padding[1]];
    let [channels_out, _, height, width] = weight_shape;

    let mut conv = Conv2dConfig::new([input_shape[1], channels_out], [height, width])
        .with_stride(fixed(&case.spec.stride))
        .with_padding(PaddingConfig2d::Explicit(top, left, bottom, right))
        .with_groups(case.spec.groups)
        .with_bias(case.bias)
        .init(&device);
    conv.weight = Param::from_tensor(tensor(&data.weight, weight_shape));
    if case.bias {
        conv.bias = Some(Param::from_tensor(vector(&data.bias)));
    }
    let mut norm = BatchNormConfig::new(channels_out)
        .with_epsilon(case.norm.epsilon)
        .with_momentum(1.0)
        .init(&device);
    norm.gamma = Param::from_tensor(vector(&data.gamma));
    norm.beta = Param::from_tensor(vector(&data.beta));
    norm.running_mean = RunningState::new(vector(&data.mean));
    norm.running_var = RunningState::new(vector(&data.variance));
    if case.given_statistics {
        norm.training = Param::from_bool(false);
    }

    let input = tensor(&data.input, input_shape).require_grad();
    // Modules share parameters and running statistics when cloned.
    let output = if is_fused {
        let mut block = ConvBn2d::from_parts(conv.clone(), norm.clone(), case.activation);
        block.settings.recompute = case.recompute;
        block.settings.max_workspace = case.max_workspace;
        block.forward(input.clone())
    } else {
        let normalized = norm.forward(conv.forward(input.clone()));
        case.activation.forward(normalized)
    };
    let upstream = tensor(&data.output_grad, output.dims());
    let grads = (output.clone() * upstream).sum().backward();
    let bias = conv.bias.as_ref().map(|bias| bias.val());
    Results([
        Some(host(output)),
        Some(host(norm.running_mean.value_sync())),
        Some(host(norm.running_var.value_sync())),
        input.grad(&grads).map(host),
        conv.weight.val().grad(&grads).map(host),
        bias.and_then(|bias| bias.grad(&grads)).map(host),
        norm.gamma.val().grad(&grads).map(host),
        norm.beta.val().grad(&grads).map(host),
        None,
    ])
}

fn largest(values: &[f64]) -> f64 {
    values.iter().fold(0.0, |most, value| most.max(value.abs()))
}

/// The largest difference.
fn distance(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter()
        .zip(b)
        .map(|(a, b)| match (a - b).abs() {
            difference if difference.is_nan() => f64::INFINITY,
            difference => difference,
        })
        .fold(0.0, f64::max)
}

/// Part of a tensor's largest value that f32 may be off by where Burn's layers happen to be exact: a
/// few roundings.
const ATOL: f64 = 2e-6;

/// Holds the fused layer in f32 to the two-times rule in those places.
fn two_times(case: &Case, data: &Data, argmax: &[usize]) -> Results {
    let exact = exact(case, data);
    let burn = layer(case, data, DType::F32, false);
    let ours = layer(case, data, DType::F32, true);
    for place in argmax {
        let wanted = value(&exact, *place);
        let theirs = distance(value(&burn, *place), wanted);
        let error = distance(value(&ours, *place), wanted);
        println!("{}: error {error:.1e}, Burn's {theirs:.1e}", NAMES[*place]);
        assert!(
            error <= 2.0 * theirs + ATOL * largest(wanted),
            "{}: error {error:e}, Burn's {theirs:e}, in {case:#?}",
            NAMES[*place]
        );
    }
    ours
}

const ALL: [usize; 7] = [
    OUTPUT,
    MEAN,
    VARIANCE,
    INPUT_GRAD,
    WEIGHT_GRAD,
    GAMMA_GRAD,
    BETA_GRAD,
];

/// Outputs of the convolution around 1e3, where f32's numbers are 6e-5 apart, with a standard deviation
/// around 1e-2: 1x1, 3x3 in either algorithm.
fn large_means() -> Vec<Case> {
    let offset = 1e3;
    let case = |spec, input: [usize; 4], weight: [usize; 4], spread, mean: f64| Case {
        input_values: Values { offset, spread },
        weight_values: Values {
            offset: mean,
            spread: mean / 5.0,
        },
        ..Case::new(spec, &input, &weight)
    };
    vec![
        case(
            ConvSpec::unit(2),
            [4, 2, 16, 16],
            [16, 2, 1, 1],
            2.5e-2,
            0.5,
        ),
        case(
            ConvSpec::unit(2),
            [4, 3, 18, 18],
            [16, 3, 3, 3],
            9e-2,
            1.0 / 27.0,
        ),
        case(
            ConvSpec::unit(2),
            [4, 16, 18, 18],
            [16, 16, 3, 3],
            2e-1,
            1.0 / 144.0,
        ),
    ]
}

#[test]
fn large_means_keep_their_spread() {
    for case in large_means() {
        for activation in [Activation::Identity, Activation::Silu] {
            for (recompute, max_workspace) in [
                (Recompute::Conv, None),
                (Recompute::Conv, Some(1)),
                (Recompute::Never, None),
            ] {
                let case = Case {
                    activation,
                    recompute,
                    max_workspace,
                    ..case.clone()
                };
                let data = case.draw(DType::F32);
                let ours = two_times(&case, &data, &ALL);
                let exact = exact(&case, &data);
                for (got, wanted) in value(&ours, VARIANCE).iter().zip(value(&exact, VARIANCE)) {
                    assert!((5e-3..5e-2).contains(&wanted.sqrt()), "{wanted:e}");
                    assert!((got / wanted - 1.0).abs() < 5e-3, "{got:e} for {wanted:e}");
                }
            }
        }
    }
}

/// Values of a case in f32, with the statistics of their own batch given.
fn given_its_batch(case: &Case) -> (Case, Data) {
    let mut data = case.draw(DType::F32);
    let batch = exact(case, &data);
    let single =
        |values: &[f64]| -> Vec<f64> { values.iter().map(|v| rounded(*v, DType::F32)).collect() };
    data.mean = single(value(&batch, MEAN));
    data.variance = single(value(&batch, VARIANCE));
    let case = Case {
        given_statistics: true,
        ..case.clone()
    };
    (case, data)
}

/// With such statistics given, all but gamma's gradient.
#[test]
fn large_means_that_are_given() {
    for case in large_means() {
        let (case, data) = given_its_batch(&case);
        let argmax = [OUTPUT, INPUT_GRAD, WEIGHT_GRAD, BETA_GRAD];
        two_times(&case, &data, &argmax);
    }
}

/// With given statistics, gamma's gradient comes without the convolution's output and loses digits
/// where the mean is large: within the tolerance that the layer's documentation states, from means of
/// about 0 to 1e5 standard deviations.
#[test]
fn gammas_gradient_under_given_statistics() {
    for case in large_means() {
        for offset in [0.0, 0.1, 10.0, 1e3] {
            for bias in [false, true] {
                let input_values = Values {
                    offset,
                    ..case.input_values
                };
                let (case, data) = given_its_batch(&Case {
                    bias,
                    input_values,
                    ..case.clone()
                });
                gammas_gradient_is_within_its_tolerance(&case, &data);
            }
        }
    }
}

fn gammas_gradient_is_within_its_tolerance(case: &Case, data: &Data) {
    let ours = layer(case, data, DType::F32, true);
    let wanted = exact(case, data);
    let op = case.op(DType::F64);
    let mut squares = vec![0.0; data.mean.len()];
    for (index, grad) in data.output_grad.iter().enumerate() {
        squares[op.channel(index)] += grad * grad;
    }
    let grads = value(&ours, GAMMA_GRAD)
        .iter()
        .zip(value(&wanted, GAMMA_GRAD));
    for (channel, (got, wanted)) in grads.enumerate() {
        let deviation = (data.variance[channel] + case.norm.epsilon).sqrt();
        let ratio = (data.mean[channel] - data.bias[channel]).abs() / deviation;
        let allowed = 64.0 * 2f64.powi(-24) * (1.0 + ratio) * squares[channel].sqrt();
        let error = (got - wanted).abs();
        assert!(
            error <= allowed,
            "{error:e} of {wanted:e}, {allowed:e} allowed, mean {ratio:.1e} deviations, in {case:#?}"
        );
    }
}

/// More than a million values in each channel: sums of single precision, naively taken, are off by
/// percents.
#[test]
fn a_million_values_in_a_channel() {
    let case = Case {
        activation: Activation::Silu,
        input_values: Values {
            offset: 0.5,
            spread: 1.0,
        },
        grad_values: Values {
            offset: 0.25,
            spread: 1.0,
        },
        ..Case::new(padded(1), &[4, 1, 520, 512], &[2, 1, 3, 3])
    };
    assert!(case.op(DType::F32).values_per_channel() > 1_000_000);
    two_times(&case, &case.draw(DType::F32), &ALL);
}

/// What a tensor of that type may be off by where nothing cancels, of its largest value.
fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 1e-13,
        DType::F32 => 4e-6,
        DType::F16 => 2e-3,
        _ => 1.6e-2,
    }
}

/// Channels of one value, exact in every type: the norm's output is its shift, and no gradient passes
/// through the variance, in the tutorial's variant too.
#[test]
fn constant_channels() {
    for norm in [
        BATCH_NORM,
        NormSpec::new(NormVariant::BatchNorm, 0.25),
        TUTORIAL,
        NormSpec::new(NormVariant::Tutorial, 1e-5),
        NormSpec::new(NormVariant::Tutorial, 0.25),
    ] {
        for (spec, input, weight) in [
            (ConvSpec::unit(2), [2, 3, 4, 4], [5, 3, 1, 1]),
            (ConvSpec::unit(2), [2, 3, 6, 6], [5, 3, 3, 3]),
            (strided(), [2, 3, 9, 9], [5, 3, 3, 3]),
            (ConvSpec::unit(2), [2, 16, 6, 6], [17, 16, 3, 3]),
        ] {
            for activation in [Activation::Identity, Activation::Relu, Activation::Silu] {
                for dtype in DTYPES {
                    let case = Case {
                        norm,
                        activation,
                        seed: seed(1),
                        ..Case::new(spec.clone(), &input, &weight)
                    };
                    constant_channel(&case, dtype);
                }
            }
        }
    }
}

fn constant_channel(case: &Case, dtype: DType) {
    let mut data = case.draw(dtype);
    let positions = case.input[2] * case.input[3];
    let channels = case.input[1];
    for (index, value) in data.input.iter_mut().enumerate() {
        *value = (index / positions % channels % 3) as f64 - 1.0;
    }
    for value in &mut data.weight {
        *value = (2.0 * *value).round();
    }
    let wanted = exact(case, &data);
    assert!(
        value(&wanted, VARIANCE)
            .iter()
            .all(|variance| *variance == 0.0)
    );
    let got = case.run(&data, dtype, &Device::flex());
    let context = format!("{dtype:?}, {case:?}");
    assert_eq!(value(&got, MEAN), value(&wanted, MEAN), "{context}");
    assert_eq!(value(&got, VARIANCE), value(&wanted, VARIANCE), "{context}");
    assert_eq!(
        value(&got, GAMMA_GRAD),
        value(&wanted, GAMMA_GRAD),
        "{context}"
    );
    if case.activation != Activation::Silu {
        let wanted = value(&wanted, OUTPUT).iter();
        let wanted: Vec<f64> = wanted.map(|output| rounded(*output, dtype)).collect();
        assert_eq!(value(&got, OUTPUT), wanted, "{context}");
    }
    // The gradient of the convolution's output, whose sum over a channel is 0: what is left of that
    // in the weight's gradient is rounding.
    let scale = match case.norm.variant {
        NormVariant::BatchNorm => 1.0 / case.norm.epsilon.sqrt(),
        NormVariant::Tutorial => 1.0 / case.norm.epsilon,
    };
    let conv_grad = largest(&data.gamma) * scale * 2.2 * largest(&data.output_grad);
    let values = case.op(dtype).values_per_channel() as f64;
    let limit = match dtype {
        DType::F16 => 65504.0,
        _ => f64::MAX,
    };
    for (place, noise) in [
        (OUTPUT, 0.0),
        (INPUT_GRAD, conv_grad),
        (WEIGHT_GRAD, conv_grad * values.sqrt()),
        (BETA_GRAD, 0.0),
    ] {
        let (got, wanted) = (value(&got, place), value(&wanted, place));
        let allowed = tolerance(dtype) * (largest(wanted) + noise);
        for (got, wanted) in got.iter().zip(wanted) {
            let overflows = wanted.abs() + allowed >= limit && got.is_infinite();
            let error = (got - wanted).abs();
            assert!(
                error <= allowed || overflows,
                "{}: got {got:e}, wanted {wanted:e} within {allowed:e}, {context}",
                NAMES[place]
            );
        }
    }
}

/// Values whose products and sums are rounded, but in each position the same way: no spread comes of
/// that where sums are taken directly.
#[test]
fn constant_channels_whose_sums_are_rounded() {
    for norm in [BATCH_NORM, TUTORIAL] {
        for (spec, input, weight) in [
            (ConvSpec::unit(2), [2, 5, 4, 4], [7, 5, 1, 1]),
            (ConvSpec::unit(2), [2, 5, 40, 40], [7, 5, 3, 3]),
            (strided(), [2, 17, 9, 9], [16, 17, 3, 3]),
        ] {
            for dtype in DTYPES {
                let case = Case {
                    norm,
                    input_values: Values {
                        offset: 0.1,
                        spread: 0.0,
                    },
                    seed: seed(2),
                    ..Case::new(spec.clone(), &input, &weight)
                };
                let data = case.draw(dtype);
                let got = case.run(&data, dtype, &Device::flex());
                let op = case.op(dtype);
                for (index, output) in value(&got, OUTPUT).iter().enumerate() {
                    let beta = rounded(data.beta[op.channel(index)], dtype);
                    assert_eq!(*output, beta, "{dtype:?}, {case:?}");
                }
                assert!(
                    value(&got, VARIANCE)
                        .iter()
                        .all(|variance| *variance == 0.0)
                );
            }
        }
    }
    // With fewer products neighbours are rounded differently. Epsilon keeps that small.
    for dtype in DTYPES {
        check(
            &Case {
                input_values: Values {
                    offset: 0.1,
                    spread: 0.0,
                },
                seed: seed(3),
                ..Case::new(ConvSpec::unit(2), &[2, 17, 7, 7], &[16, 17, 3, 3])
            },
            dtype,
        );
    }
}

/// A variance of 0 that is given.
#[test]
fn given_variances_of_zero() {
    for norm in [BATCH_NORM, TUTORIAL] {
        for dtype in DTYPES {
            let case = Case {
                norm,
                given_statistics: true,
                activation: Activation::Relu,
                seed: seed(4),
                ..Case::new(padded(1), &[2, 3, 5, 5], &[4, 3, 3, 3])
            };
            let mut data = case.draw(dtype);
            data.variance.fill(0.0);
            check_on(&case, data, dtype);
        }
    }
}

/// Two values in a channel: apart, the same, and next to each other; one of each image, or both of
/// one.
#[test]
fn two_values_in_a_channel() {
    for norm in [BATCH_NORM, TUTORIAL] {
        for activation in Activation::SAMPLES {
            for (input, weight) in [
                ([2, 3, 1, 1], [5, 3, 1, 1]),
                ([1, 3, 1, 2], [5, 3, 1, 1]),
                ([2, 3, 3, 3], [5, 3, 3, 3]),
                ([2, 16, 3, 3], [16, 16, 3, 3]),
            ] {
                for (layout, spread) in [
                    (Layout::Contiguous, 1.0),
                    (Layout::Contiguous, 1e-3),
                    (Layout::Expanded, 1.0),
                ] {
                    for dtype in DTYPES {
                        let case = Case {
                            norm,
                            activation,
                            input_layout: layout,
                            input_values: Values {
                                offset: 0.5,
                                spread,
                            },
                            seed: seed(5),
                            ..Case::new(ConvSpec::unit(2), &input, &weight)
                        };
                        check(&case, dtype);
                    }
                }
            }
        }
    }
}

/// Numbers next to 0, which have fewer digits: none is lost to a mode that flushes them, and none
/// is divided by.
#[test]
fn denormals() {
    let tiny = |spread| Values {
        offset: 0.0,
        spread,
    };
    let plain = Case {
        seed: seed(6),
        ..Case::new(padded(1), &[2, 3, 6, 5], &[4, 3, 3, 3])
    };
    let many = Case {
        seed: seed(7),
        ..Case::new(padded(1), &[2, 16, 6, 5], &[16, 16, 3, 3])
    };
    for case in [plain, many] {
        // With epsilons that leave the variance something to say, where it is above 0 in f32.
        for (dtype, spread, epsilon) in [
            (DType::F32, 1e-40, 1e-5),
            (DType::F32, 1e-19, 1e-38),
            (DType::BF16, 1e-39, 1e-5),
            (DType::F16, 2e-6, 1e-12),
            (DType::F16, 2e-6, 1e-5),
        ] {
            for given_statistics in [false, true] {
                let case = Case {
                    norm: NormSpec::new(NormVariant::BatchNorm, epsilon),
                    given_statistics,
                    ..case.clone()
                };
                check(
                    &Case {
                        input_values: tiny(spread),
                        ..case.clone()
                    },
                    dtype,
                );
                check(
                    &Case {
                        weight_values: tiny(spread),
                        ..case.clone()
                    },
                    dtype,
                );
                check(
                    &Case {
                        grad_values: tiny(spread),
                        ..case
                    },
                    dtype,
                );
            }
        }
    }
    // The norm's own parameters.
    let case = Case::new(padded(1), &[2, 3, 6, 5], &[4, 3, 3, 3]);
    let mut data = case.draw(DType::F32);
    for value in data.gamma.iter_mut().chain(&mut data.beta) {
        *value = rounded(1e-40 * *value, DType::F32);
    }
    let tally = check_on(&case, data, DType::F32);
    assert!(4 * tally.sharp > 3 * tally.compared, "{tally}");
}

/// Nothing divides by gamma: at 0 the branch is silent and learns, and a negative one is no
/// different from a positive one.
#[test]
fn gammas_of_zero_and_below() {
    for activation in Activation::SAMPLES {
        for given_statistics in [false, true] {
            for residual in [false, true] {
                for recompute in [Recompute::Conv, Recompute::Norm, Recompute::Never] {
                    for dtype in DTYPES {
                        let case = Case {
                            activation,
                            given_statistics,
                            residual,
                            recompute,
                            bias: true,
                            seed: seed(8),
                            ..Case::new(padded(1), &[2, 3, 6, 5], &[4, 3, 3, 3])
                        };
                        let mut data = case.draw(dtype);
                        for gamma in &mut data.gamma {
                            *gamma = -gamma.abs();
                        }
                        check_on(&case, data, dtype);
                        silent_branch(
                            &Case {
                                gamma: Gamma::Zero,
                                ..case
                            },
                            dtype,
                        );
                    }
                }
            }
        }
    }
}

fn silent_branch(case: &Case, dtype: DType) {
    check(case, dtype);
    let got = case.run(&case.draw(dtype), dtype, &Device::flex());
    for place in [INPUT_GRAD, WEIGHT_GRAD] {
        let silent = value(&got, place).iter().all(|grad| *grad == 0.0);
        assert!(silent, "{} of {dtype:?}, {case:?}", NAMES[place]);
    }
    // A channel that a ReLU silences altogether learns nothing.
    let learns = |place| value(&got, place).iter().any(|grad| *grad != 0.0);
    assert_eq!(learns(GAMMA_GRAD), learns(BETA_GRAD), "{dtype:?}, {case:?}");
}

/// Sums over a channel that f16 cannot hold: of the values, their squares, the gradients, and
/// gradients times values.
#[test]
fn sums_beyond_f16_over_a_channel() {
    for dtype in [DType::F16, DType::BF16] {
        for given_statistics in [false, true] {
            let case = Case {
                given_statistics,
                input_values: Values {
                    offset: 50.0,
                    spread: 10.0,
                },
                weight_values: Values {
                    offset: 1.0,
                    spread: 0.25,
                },
                grad_values: Values {
                    offset: 4.0,
                    spread: 1.0,
                },
                seed: seed(9),
                ..Case::new(ConvSpec::unit(2), &[8, 1, 48, 48], &[2, 1, 1, 1])
            };
            let data = case.draw(dtype);
            let got = case.run(&data, dtype, &Device::flex());
            // The norm's parameters, and so their gradients, are f32.
            assert!(value(&got, BETA_GRAD).iter().all(|grad| *grad > 65504.0));
            check_on(&case, data, dtype);
        }
    }
}

/// Sums of products that f16 cannot hold on the way to a result that it can: over input channels in
/// forward, over output channels for the input's gradient, over positions for the weight's. All
/// numbers are whole, so that the results have no error at all.
#[test]
fn sums_beyond_f16_over_products() {
    for (kernel, size) in [(1, 6), (3, 8)] {
        // 32 channels with 60, and as many with -60 but for one with -59.
        let one_less = |channel: usize| match channel {
            0..32 => 60.0,
            63 => -59.0,
            _ => -60.0,
        };
        let taps = (kernel * kernel) as f64;
        let case = Case {
            given_statistics: true,
            gamma: Gamma::Absent,
            // Far below what f32 adds to 1.
            norm: NormSpec::new(NormVariant::BatchNorm, 1e-20),
            ..Case::new(
                ConvSpec::unit(2),
                &[2, 64, size, size],
                &[64, 64, kernel, kernel],
            )
        };
        let mut data = case.draw(DType::F16);
        data.mean.fill(0.0);
        data.variance.fill(1.0);

        // The sum over channels is 60 * 60 * 32 on the way.
        data.input.fill(60.0);
        let row = 64 * kernel * kernel;
        for (index, value) in data.weight.iter_mut().enumerate() {
            *value = one_less(index % row / (kernel * kernel));
        }
        let got = case.run(&data, DType::F16, &Device::flex());
        let wanted = 60.0 * taps;
        assert!(value(&got, OUTPUT).iter().all(|output| *output == wanted));

        // The same across output channels.
        for (index, value) in data.weight.iter_mut().enumerate() {
            *value = one_less(index / row);
        }
        data.input.fill(1.0);
        data.output_grad.fill(60.0);
        let got = case.run(&data, DType::F16, &Device::flex());
        let grads = value(&got, INPUT_GRAD);
        let middle = size / 2 * size + size / 2;
        assert_eq!(grads[middle], wanted, "kernel {kernel}");

        // The second half of the images cancels what the first half adds, except one value.
        positions_cancel(kernel);
    }
}

fn positions_cancel(kernel: usize) {
    let case = Case {
        given_statistics: true,
        gamma: Gamma::Absent,
        norm: NormSpec::new(NormVariant::BatchNorm, 1e-20),
        ..Case::new(
            ConvSpec::unit(2),
            &[32, 16, 12, 12],
            &[16, 16, kernel, kernel],
        )
    };
    let mut data = case.draw(DType::F16);
    data.mean.fill(0.0);
    data.variance.fill(1.0);
    // Whole, and the same in image n and n + 16.
    let half = data.input.len() / 2;
    for (index, value) in data.input.iter_mut().enumerate() {
        *value = (index % half % 13 + 4) as f64;
    }
    let half = data.output_grad.len() / 2;
    for (index, grad) in data.output_grad.iter_mut().enumerate() {
        *grad = if index < half { 8.0 } else { -8.0 };
    }
    data.output_grad[0] = 9.0;
    // On the way there is 8 times the sum of half the values, which are 10 on the average.
    let positions = half / 16;
    assert!(8 * 9 * positions > 65504);
    let got = case.run(&data, DType::F16, &Device::flex());
    // What the one more meets: the first taps of the first image's first output.
    let plane = 12 * 12;
    let (taps, grads) = (kernel * kernel, value(&got, WEIGHT_GRAD));
    for (index, grad) in grads.iter().enumerate() {
        let (channel_out, channel_in) = (index / taps / 16, index / taps % 16);
        let (row, column) = (index % taps / kernel, index % kernel);
        let wanted = match channel_out {
            0 => data.input[channel_in * plane + row * 12 + column],
            _ => 0.0,
        };
        assert_eq!(*grad, wanted, "kernel {kernel}, {index}");
    }
}

/// Pre-activations from next to 0 to the end of each type, from the convolution and from a
/// residual: no activation overflows on the way, or makes of them what is no number.
#[test]
fn activations_far_out() {
    const MAGNITUDES: [f64; 14] = [
        1e-30, 0.5, 3.5, 12.0, 20.0, 40.0, 87.0, 89.0, 110.0, 750.0, 6e4, 1e10, 3e38, 1e300,
    ];
    for (dtype, last) in [
        (DType::F64, f64::MAX),
        (DType::F32, f64::from(f32::MAX)),
        (DType::F16, 65504.0),
        (DType::BF16, 3.3e38),
    ] {
        for activation in Activation::SAMPLES {
            for magnitude in MAGNITUDES {
                if magnitude > last {
                    continue;
                }
                let both = [magnitude, -magnitude].map(|value| rounded(value, dtype));
                let case = Case {
                    activation,
                    gamma: Gamma::Absent,
                    norm: NormSpec::new(NormVariant::BatchNorm, 1e-20),
                    tracked: Parents {
                        input: true,
                        residual: true,
                        ..Parents::default()
                    },
                    ..Case::new(ConvSpec::unit(1), &[1, 1, 2], &[1, 1, 1])
                };
                let convolved = Case {
                    given_statistics: true,
                    ..case.clone()
                };
                let mut data = convolved.draw(dtype);
                data.input = both.to_vec();
                data.weight.fill(1.0);
                data.mean.fill(0.0);
                data.variance.fill(1.0);
                check_on(&convolved, data.clone(), dtype);

                let added = Case {
                    residual: true,
                    ..case
                };
                data.input = vec![0.5, -0.25];
                data.residual = both.to_vec();
                check_on(&added, data, dtype);
            }
        }
    }
}

/// Where a number that is none is put.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Place {
    Input,
    Weight,
    OutputGrad,
}

impl Place {
    const ALL: [Self; 3] = [Self::Input, Self::Weight, Self::OutputGrad];

    /// Puts `poison` into the middle of a tensor.
    fn poison(self, data: &Data, poison: f64) -> Data {
        let mut data = data.clone();
        let values = match self {
            Self::Input => &mut data.input,
            Self::Weight => &mut data.weight,
            Self::OutputGrad => &mut data.output_grad,
        };
        let middle = values.len() / 2;
        values[middle] = poison;
        data
    }
}

/// Infinities and NaN show wherever they show with Burn's own layers. They may show in more places:
/// sums that a kernel takes together, and infinities that it subtracts from each other.
#[test]
fn infinities_and_nan_show_where_burn_shows_them() {
    for (spec, input, weight) in [
        (padded(1), [2, 3, 5, 6], [4, 3, 3, 3]),
        (ConvSpec::unit(2), [2, 16, 6, 7], [17, 16, 3, 3]),
        (strided(), [3, 16, 7, 7], [16, 16, 3, 3]),
        (ConvSpec::unit(2), [2, 5, 4, 4], [3, 5, 1, 1]),
        (padded(2), [2, 4, 5, 5], [6, 2, 3, 3]),
    ] {
        for activation in [Activation::Identity, Activation::Relu, Activation::Silu] {
            for given_statistics in [false, true] {
                for (recompute, max_workspace) in [
                    (Recompute::Conv, None),
                    (Recompute::Conv, Some(1)),
                    (Recompute::Never, None),
                ] {
                    let case = Case {
                        activation,
                        given_statistics,
                        recompute,
                        max_workspace,
                        seed: seed(10),
                        ..Case::new(spec.clone(), &input, &weight)
                    };
                    let data = case.draw(DType::F32);
                    for place in Place::ALL {
                        for poison in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
                            let data = place.poison(&data, poison);
                            shows_at_least(&case, &data, &format!("{poison} in {place:?}"));
                        }
                    }
                }
            }
        }
    }
}

fn shows_at_least(case: &Case, data: &Data, what: &str) {
    let burn = layer(case, data, DType::F32, false);
    let ours = layer(case, data, DType::F32, true);
    for place in ALL {
        let pairs = value(&ours, place).iter().zip(value(&burn, place));
        for (index, (ours, burn)) in pairs.enumerate() {
            assert!(
                burn.is_finite() || !ours.is_finite(),
                "{what}: {}[{index}] is {burn} with Burn and {ours} here, in {case:#?}",
                NAMES[place]
            );
        }
    }
}

/// The first half of the channels of each of so many images; of a tensor of a channel's values, and
/// of a weight, with one image.
fn first_half(values: &[f64], images: usize) -> Vec<f64> {
    values
        .chunks(values.len() / images)
        .flat_map(|image| image[..image.len() / 2].to_vec())
        .collect()
}

/// Runs with as many threads as there are by default, and with one, whose scratch goes from one
/// block of images to the next.
fn on_pools(run: impl Fn() -> Results + Sync) -> [Results; 2] {
    let one = ThreadPoolBuilder::new().num_threads(1).build();
    let one = one.expect("a thread can be started");
    [run(), one.install(&run)]
}

/// NaN and infinities in one group leave the bits of the others alone: what another group, image or tile
/// left behind is cleared before it is multiplied.
#[test]
fn a_poisoned_group_leaves_the_others_alone() {
    for (spec, input, weight) in [
        (padded(2), [3, 4, 7, 7], [6, 2, 3, 3]),
        (
            ConvSpec {
                groups: 2,
                ..ConvSpec::unit(2)
            },
            [3, 32, 7, 7],
            [32, 16, 3, 3],
        ),
        (padded(2), [3, 32, 5, 9], [34, 16, 3, 3]),
        (
            ConvSpec {
                groups: 2,
                ..strided()
            },
            [3, 32, 9, 9],
            [32, 16, 3, 3],
        ),
        (padded(4), [3, 4, 40, 40], [4, 1, 3, 3]),
    ] {
        for given_statistics in [false, true] {
            for recompute in [Recompute::Conv, Recompute::Norm, Recompute::Never] {
                for poison in [f64::NAN, f64::INFINITY] {
                    let case = Case {
                        activation: Activation::Silu,
                        given_statistics,
                        recompute,
                        residual: true,
                        seed: seed(11),
                        ..Case::new(spec.clone(), &input, &weight)
                    };
                    let clean = case.draw(DType::F32);
                    let mut poisoned = clean.clone();
                    let images = case.input[0];
                    let image = poisoned.input.len() / images;
                    for values in poisoned.input.chunks_mut(image) {
                        values[image / 2..].fill(poison);
                    }
                    let run =
                        |data: &Data| on_pools(|| case.run(data, DType::F32, &Device::flex()));
                    for (clean, poisoned) in run(&clean).iter().zip(&run(&poisoned)) {
                        for place in [OUTPUT, INPUT_GRAD, RESIDUAL_GRAD] {
                            assert_same_half(place, clean, poisoned, images, &case);
                        }
                        for place in [MEAN, VARIANCE, WEIGHT_GRAD, GAMMA_GRAD, BETA_GRAD] {
                            assert_same_half(place, clean, poisoned, 1, &case);
                        }
                    }
                }
            }
        }
    }
}

fn assert_same_half(place: usize, clean: &Results, poisoned: &Results, images: usize, case: &Case) {
    let clean = first_half(value(clean, place), images);
    let poisoned = first_half(value(poisoned, place), images);
    let differ = clean.iter().zip(&poisoned).filter(|(a, b)| a != b).count();
    assert!(
        differ == 0,
        "{}: {differ} of {} values of the clean group changed, in {case:#?}",
        NAMES[place],
        clean.len()
    );
}

/// NaN in the weight, or in the gradient, of the second half of the output channels leaves the
/// first half's results alone, all but the input's gradient, which is of both.
#[test]
fn poisoned_channels_leave_the_others_alone() {
    for (spec, input, weight) in [
        (padded(1), [3, 3, 7, 7], [14, 3, 3, 3]),
        (padded(1), [3, 16, 7, 7], [32, 16, 3, 3]),
        (strided(), [3, 16, 9, 9], [32, 16, 3, 3]),
    ] {
        for given_statistics in [false, true] {
            let case = Case {
                activation: Activation::Relu,
                given_statistics,
                seed: seed(12),
                ..Case::new(spec.clone(), &input, &weight)
            };
            let clean = case.draw(DType::F32);
            let images = case.input[0];
            let mut in_weight = clean.clone();
            let half = in_weight.weight.len() / 2;
            in_weight.weight[half..].fill(f64::NAN);
            let mut in_grad = clean.clone();
            let image = in_grad.output_grad.len() / images;
            for values in in_grad.output_grad.chunks_mut(image) {
                values[image / 2..].fill(f64::NAN);
            }
            let run = |data: &Data| on_pools(|| case.run(data, DType::F32, &Device::flex()));
            let clean = run(&clean);
            for poisoned in [run(&in_weight), run(&in_grad)] {
                for (clean, poisoned) in clean.iter().zip(&poisoned) {
                    assert_same_half(OUTPUT, clean, poisoned, images, &case);
                    for place in [MEAN, VARIANCE, WEIGHT_GRAD, GAMMA_GRAD, BETA_GRAD] {
                        assert_same_half(place, clean, poisoned, 1, &case);
                    }
                }
            }
        }
    }
}

/// With given statistics nothing goes from one image to another but through parameters: NaN in one
/// leaves the outputs and gradients of the others alone, also of those in the same tile.
#[test]
fn a_poisoned_image_leaves_the_others_alone() {
    for (spec, input, weight) in [
        (padded(1), [5, 3, 6, 5], [7, 3, 3, 3]),
        (padded(1), [5, 16, 6, 5], [16, 16, 3, 3]),
        (ConvSpec::unit(2), [5, 16, 4, 4], [16, 16, 3, 3]),
        (strided(), [5, 16, 7, 7], [16, 16, 3, 3]),
        (ConvSpec::unit(2), [5, 1, 6, 6], [1, 1, 3, 3]),
    ] {
        for activation in Activation::SAMPLES {
            for image in [0, 2, 4] {
                let case = Case {
                    activation,
                    given_statistics: true,
                    residual: true,
                    seed: seed(13),
                    ..Case::new(spec.clone(), &input, &weight)
                };
                let clean = case.draw(DType::F32);
                let mut poisoned = clean.clone();
                let len = poisoned.input.len() / 5;
                poisoned.input[image * len..][..len].fill(f64::NAN);
                let run = |data: &Data| on_pools(|| case.run(data, DType::F32, &Device::flex()));
                for (clean, poisoned) in run(&clean).iter().zip(&run(&poisoned)) {
                    for place in [OUTPUT, INPUT_GRAD, RESIDUAL_GRAD] {
                        let (clean, poisoned) = (value(clean, place), value(poisoned, place));
                        let len = clean.len() / 5;
                        let images = clean.chunks(len).zip(poisoned.chunks(len)).enumerate();
                        for (other, (clean, poisoned)) in images {
                            assert!(
                                other == image || clean == poisoned,
                                "{} of image {other} changed with image {image}, in {case:#?}",
                                NAMES[place]
                            );
                        }
                    }
                }
            }
        }
    }
}

/// What a closed ReLU gets, infinite or NaN, is not passed on: everything is as where the output's
/// gradient is 0 there, as with Burn's own layers.
#[test]
fn closed_relus_pass_nothing() {
    for (spec, input, weight) in [
        (padded(1), [3, 3, 6, 5], [7, 3, 3, 3]),
        (padded(1), [3, 16, 6, 5], [16, 16, 3, 3]),
        (strided(), [3, 16, 7, 7], [16, 16, 3, 3]),
        (padded(4), [3, 4, 7, 7], [4, 1, 3, 3]),
    ] {
        for activation in [Activation::Relu, Activation::Relu6] {
            for given_statistics in [false, true] {
                for residual in [false, true] {
                    for recompute in [Recompute::Conv, Recompute::Norm, Recompute::Never] {
                        let case = Case {
                            activation,
                            given_statistics,
                            residual,
                            recompute,
                            bias: true,
                            seed: seed(14),
                            ..Case::new(spec.clone(), &input, &weight)
                        };
                        for dtype in DTYPES {
                            passes_nothing_where_closed(&case, dtype);
                        }
                    }
                }
            }
        }
    }
}

fn passes_nothing_where_closed(case: &Case, dtype: DType) {
    type Run<'a> = &'a dyn Fn(&Data) -> Results;
    let op: Run<'_> = &|data| case.run(data, dtype, &Device::flex());
    let ours: Run<'_> = &|data| layer(case, data, dtype, true);
    let burns: Run<'_> = &|data| layer(case, data, dtype, false);
    // Ours have the same bits.
    let mut runs = vec![("the op", op, 0.0)];
    if dtype == DType::F32 && case.activation == Activation::Relu && !case.residual {
        runs.extend([("the layer", ours, 0.0), ("Burn's layers", burns, ATOL)]);
    }
    let data = case.draw(dtype);
    for (what, run, tolerance) in runs {
        let output = run(&data);
        let is_closed: Vec<bool> = value(&output, OUTPUT).iter().map(|y| *y == 0.0).collect();
        assert!(is_closed.contains(&true) && is_closed.contains(&false));
        let with = |at_closed: f64| {
            let mut data = data.clone();
            for (grad, is_closed) in data.output_grad.iter_mut().zip(&is_closed) {
                if *is_closed {
                    *grad = at_closed;
                }
            }
            run(&data)
        };
        let wanted = with(0.0);
        for at_closed in [f64::INFINITY, f64::NEG_INFINITY, f64::NAN] {
            let got = with(at_closed);
            for (name, (got, wanted)) in NAMES.iter().zip(got.0.iter().zip(&wanted.0)) {
                let (Some(got), Some(wanted)) = (got, wanted) else {
                    continue;
                };
                assert!(
                    distance(got, wanted) <= tolerance * (1.0 + largest(wanted)),
                    "{name} of {what}, with {at_closed} at closed positions, {dtype:?}, {case:#?}"
                );
            }
        }
    }
}
