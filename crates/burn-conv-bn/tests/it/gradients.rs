//! Gradients against central differences, in f64: first the tutorial's own three checks, with its
//! shapes and the whole Jacobian, then random upstream gradients over every option.

use burn::tensor::{Device, TensorData};
use burn_conv_bn::functional::{BatchNormParams, ConvBnParams, batch_norm, conv, conv_bn};
use burn_conv_bn::gradcheck::{GradCheck, GradCheckError, Inputs, Upstream};
use burn_conv_bn::{
    Activation, BatchNormOptions, ConvBnOptions, ConvSpec, NormSpec, NormVariant, Recompute,
};

use crate::common::random;

const TUTORIAL: NormSpec = NormSpec {
    variant: NormVariant::Tutorial,
    epsilon: 1e-3,
};

/// Values in `[0, 1)`, as the tutorial's `torch.rand`.
fn rand(shape: &[usize], seed: u64) -> TensorData {
    let values: Vec<f64> = random(shape, seed)
        .iter::<f64>()
        .map(|x| x / 2.0 + 0.5)
        .collect();
    TensorData::new(values, shape.to_vec())
}

fn gradcheck() -> GradCheck {
    GradCheck::new(&Device::flex())
}

#[test]
fn tutorial_conv2d() {
    let report = gradcheck()
        .input("weight", rand(&[5, 3, 3, 3], 1))
        .input("x", rand(&[10, 3, 7, 7], 2))
        .check(|inputs| {
            conv(
                inputs.get::<4>("x"),
                inputs.get("weight"),
                None,
                ConvSpec::unit(2),
            )
            .unwrap()
        })
        .unwrap();
    assert_eq!(report.compared, (5 * 3 * 9 + 10 * 3 * 49) * (10 * 5 * 25));
}

#[test]
fn tutorial_batch_norm() {
    gradcheck()
        .input("x", rand(&[1, 2, 3, 4], 3))
        .check(|inputs| {
            let none = BatchNormParams::default();
            batch_norm(inputs.get::<4>("x"), none, TUTORIAL)
                .unwrap()
                .output
        })
        .unwrap();
}

#[test]
fn tutorial_fused() {
    gradcheck()
        .input("weight", rand(&[5, 3, 3, 3], 4))
        .input("x", rand(&[2, 3, 4, 4], 5))
        .check(|inputs| {
            let options = ConvBnOptions::new(ConvSpec::unit(2)).with_norm(TUTORIAL);
            let params = ConvBnParams::new(inputs.get("weight"));
            conv_bn(inputs.get::<4>("x"), params, options)
                .unwrap()
                .output
        })
        .unwrap();
}

/// Geometries that leave nothing to chance: odd strides, asymmetric padding, a rest that the last
/// stride does not reach, dilation, groups, depthwise, 1x1.
fn geometries() -> Vec<(&'static str, ConvSpec, [usize; 4], [usize; 4])> {
    let spec =
        |stride: [usize; 2], padding: [(usize, usize); 2], dilation: [usize; 2], groups| ConvSpec {
            stride: stride.to_vec(),
            padding: padding.to_vec(),
            dilation: dilation.to_vec(),
            groups,
        };
    let unit = [1, 1];
    let none = [(0, 0); 2];
    vec![
        (
            "3x3",
            spec(unit, [(1, 1); 2], unit, 1),
            [2, 2, 4, 5],
            [3, 2, 3, 3],
        ),
        (
            "stride",
            spec([2, 3], none, unit, 1),
            [2, 2, 6, 7],
            [3, 2, 2, 3],
        ),
        (
            "asymmetric",
            spec([2, 1], [(0, 2), (1, 0)], unit, 1),
            [1, 2, 5, 4],
            [2, 2, 3, 2],
        ),
        (
            "dilation",
            spec(unit, [(2, 1), (0, 1)], [2, 1], 1),
            [2, 1, 5, 4],
            [2, 1, 3, 3],
        ),
        (
            "groups",
            spec(unit, [(1, 1); 2], unit, 2),
            [2, 4, 4, 3],
            [6, 2, 3, 3],
        ),
        (
            "depthwise",
            spec([2, 2], [(1, 1); 2], unit, 3),
            [2, 3, 5, 5],
            [3, 1, 3, 3],
        ),
        (
            "pointwise",
            spec(unit, none, unit, 1),
            [3, 3, 2, 3],
            [2, 3, 1, 1],
        ),
        (
            "one channel",
            spec(unit, none, unit, 1),
            [2, 1, 3, 3],
            [1, 1, 2, 2],
        ),
        (
            "one pixel",
            spec(unit, none, unit, 1),
            [3, 2, 3, 3],
            [2, 2, 3, 3],
        ),
    ]
}

#[test]
fn conv_over_every_geometry() {
    for (name, spec, input, weight) in geometries() {
        gradcheck()
            .input("x", random(&input, 10))
            .input("weight", random(&weight, 11))
            .input("bias", random(&weight[..1], 12))
            .upstream(Upstream::Random(13))
            .tolerance(1e-7, 1e-6)
            .check(|inputs| {
                let bias = Some(inputs.get::<1>("bias"));
                conv(
                    inputs.get::<4>("x"),
                    inputs.get("weight"),
                    bias,
                    spec.clone(),
                )
                .unwrap()
            })
            .unwrap_or_else(|error| panic!("{name}: {error}"));
    }
}

#[test]
fn conv_over_one_and_three_dimensions() {
    let spec = ConvSpec {
        stride: vec![2],
        padding: vec![(1, 2)],
        dilation: vec![1],
        groups: 2,
    };
    gradcheck()
        .input("x", random(&[2, 4, 7], 14))
        .input("weight", random(&[4, 2, 3], 15))
        .upstream(Upstream::Random(16))
        .check(|inputs| {
            conv(
                inputs.get::<3>("x"),
                inputs.get("weight"),
                None,
                spec.clone(),
            )
            .unwrap()
        })
        .unwrap();
    gradcheck()
        .input("x", random(&[1, 2, 3, 4, 3], 17))
        .input("weight", random(&[2, 2, 2, 2, 2], 18))
        .upstream(Upstream::Random(19))
        .check(|inputs| {
            conv(
                inputs.get::<5>("x"),
                inputs.get("weight"),
                None,
                ConvSpec::unit(3),
            )
            .unwrap()
        })
        .unwrap();
}

/// Burn's own gradient of a 3-D convolution's weight does not take such padding.
#[test]
fn conv_over_three_dimensions_with_asymmetric_padding() {
    let spec = ConvSpec {
        stride: vec![1, 2, 1],
        padding: vec![(0, 1), (1, 0), (2, 1)],
        dilation: vec![1, 1, 2],
        groups: 2,
    };
    gradcheck()
        .input("x", random(&[1, 2, 3, 4, 3], 24))
        .input("weight", random(&[4, 1, 2, 2, 2], 25))
        .upstream(Upstream::Random(26))
        .check(|inputs| {
            conv(
                inputs.get::<5>("x"),
                inputs.get("weight"),
                None,
                spec.clone(),
            )
            .unwrap()
        })
        .unwrap();
}

/// Batch and given statistics, with and without parameters, with activations whose derivative follows from
/// the output, from the value, and from neither.
#[test]
fn batch_norm_over_variants_and_ranks() {
    let activations = [Activation::Identity, Activation::Relu, Activation::Silu];
    for norm in [NormSpec::default(), TUTORIAL] {
        for activation in activations {
            let options = BatchNormOptions::new(norm).with_activation(activation);
            for affine in [false, true] {
                for given in [false, true] {
                    let context = format!("{options:?}, affine {affine}, given {given}");
                    norm_alone::<2>(&[5, 3], options, [affine, given], &context);
                    norm_alone::<3>(&[2, 3, 4], options, [affine, given], &context);
                    norm_alone::<4>(&[2, 3, 2, 4], options, [affine, given], &context);
                    norm_alone::<5>(&[2, 2, 2, 3, 2], options, [affine, given], &context);
                }
            }
        }
    }
}

fn norm_alone<const D: usize>(
    shape: &[usize; D],
    options: BatchNormOptions,
    [affine, given]: [bool; 2],
    context: &str,
) {
    let channels = &shape[1..2];
    let mut check = gradcheck()
        .input("x", random(shape, 20))
        .constant("mean", random(channels, 24))
        .constant("variance", rand(channels, 25))
        .upstream(Upstream::Random(23))
        .tolerance(1e-7, 1e-5);
    if affine {
        check = check
            .input("gamma", random(channels, 21))
            .input("beta", random(channels, 22));
    }
    let checked = check.check(|inputs| {
        let mut params = BatchNormParams::default();
        if affine {
            params = params.with_affine(inputs.get("gamma"), inputs.get("beta"));
        }
        if given {
            params = params.with_statistics(inputs.get("mean"), inputs.get("variance"));
        }
        batch_norm(inputs.get::<D>("x"), params, options)
            .unwrap()
            .output
    });
    checked.unwrap_or_else(|error| panic!("{context}: {error}"));
}

/// The fused op with everything on, over geometries, variants, activations and policies.
#[test]
fn fused_over_every_option() {
    for (name, spec, input, weight) in geometries() {
        for norm in [NormSpec::default(), TUTORIAL] {
            for activation in [Activation::Identity, Activation::Relu] {
                for recompute in [Recompute::Conv, Recompute::Norm, Recompute::Never] {
                    for (residual, max_workspace) in [(false, None), (true, Some(1))] {
                        let options = ConvBnOptions::new(spec.clone())
                            .with_norm(norm)
                            .with_activation(activation)
                            .with_recompute(recompute)
                            .with_max_workspace(max_workspace);
                        fused(&input, &weight, &options, residual, false)
                            .unwrap_or_else(|error| panic!("{name}, {options:?}: {error}"));
                    }
                }
            }
        }
    }
}

#[test]
fn frozen_over_every_option() {
    for (name, spec, input, weight) in geometries() {
        for norm in [NormSpec::default(), TUTORIAL] {
            for activation in [Activation::Identity, Activation::Relu] {
                for (residual, max_workspace) in [(false, None), (true, Some(1))] {
                    let options = ConvBnOptions::new(spec.clone())
                        .with_norm(norm)
                        .with_activation(activation)
                        .with_max_workspace(max_workspace);
                    fused(&input, &weight, &options, residual, true)
                        .unwrap_or_else(|error| panic!("{name}, {options:?}: {error}"));
                }
            }
        }
    }
}

/// Every activation at the norm's output and at its sum with a residual, with the batch's
/// statistics and with given ones, recomputed and kept, whole and image by image.
#[test]
fn fused_over_every_activation() {
    let spec = ConvSpec {
        padding: vec![(1, 0), (0, 1)],
        ..ConvSpec::unit(2)
    };
    for activation in Activation::SAMPLES {
        for recompute in [Recompute::Conv, Recompute::Norm, Recompute::Never] {
            for (residual, frozen) in [(false, false), (false, true), (true, false), (true, true)] {
                for max_workspace in [None, Some(1)] {
                    let options = ConvBnOptions::new(spec.clone())
                        .with_activation(activation)
                        .with_recompute(recompute)
                        .with_max_workspace(max_workspace);
                    fused(&[3, 2, 5, 4], &[4, 2, 3, 3], &options, residual, frozen)
                        .unwrap_or_else(|error| panic!("{options:?}, frozen {frozen}: {error}"));
                }
            }
        }
    }
}

fn fused(
    input: &[usize; 4],
    weight: &[usize; 4],
    options: &ConvBnOptions,
    residual: bool,
    frozen: bool,
) -> Result<(), GradCheckError> {
    let channels = &weight[..1];
    let problem = burn_conv_bn::backend::ConvBnProblem::conv(
        burn::tensor::Shape::from(*input),
        burn::tensor::Shape::from(*weight),
        &options.conv,
    )
    .unwrap();
    let mut check = gradcheck()
        .input("x", random(input, 30))
        .input("weight", random(weight, 31))
        .input("bias", random(channels, 32))
        .input("gamma", random(channels, 33))
        .input("beta", random(channels, 34))
        .constant("mean", random(channels, 35))
        .constant("variance", rand(channels, 36))
        .upstream(Upstream::Random(37))
        .tolerance(1e-6, 1e-5);
    if residual {
        check = check.input("residual", random(&problem.output, 38));
    }
    check.check(|inputs| {
        let mut params = ConvBnParams::new(inputs.get::<4>("weight"))
            .with_bias(inputs.get("bias"))
            .with_affine(inputs.get("gamma"), inputs.get("beta"));
        if residual {
            params = params.with_residual(inputs.get("residual"));
        }
        if frozen {
            params = params.with_statistics(inputs.get("mean"), inputs.get("variance"));
        }
        conv_bn(inputs.get("x"), params, options.clone())
            .unwrap()
            .output
    })?;
    Ok(())
}

/// Each subset of tracked parents gives the gradients that all of them together give, so that
/// skipping work for one never touches another.
#[test]
fn every_subset_of_parents() {
    let names = ["x", "weight", "bias", "gamma", "beta", "residual"];
    for frozen in [false, true] {
        for recompute in [Recompute::Conv, Recompute::Norm, Recompute::Never] {
            for subset in 1u32..1 << names.len() {
                let data = [
                    random(&[2, 2, 4, 4], 40),
                    random(&[3, 2, 3, 3], 41),
                    random(&[3], 42),
                    random(&[3], 43),
                    random(&[3], 44),
                    random(&[2, 3, 2, 2], 45),
                ];
                let check = names.iter().zip(data).enumerate().fold(
                    gradcheck()
                        .constant("mean", random(&[3], 47))
                        .constant("variance", rand(&[3], 48))
                        .upstream(Upstream::Random(46))
                        .tolerance(1e-6, 1e-5),
                    |check, (bit, (name, data))| match subset >> bit & 1 {
                        1 => check.input(name, data),
                        _ => check.constant(name, data),
                    },
                );
                for activation in [Activation::Identity, Activation::Relu, Activation::Silu] {
                    check
                        .check(|i: &Inputs| {
                            let mut params = ConvBnParams::new(i.get::<4>("weight"))
                                .with_bias(i.get("bias"))
                                .with_affine(i.get("gamma"), i.get("beta"));
                            // Half of the subsets have no residual at all, which keeps other
                            // tensors than one that is not tracked.
                            if subset & 32 != 0 {
                                params = params.with_residual(i.get("residual"));
                            }
                            if frozen {
                                params = params.with_statistics(i.get("mean"), i.get("variance"));
                            }
                            let options = ConvBnOptions::new(ConvSpec::unit(2))
                                .with_activation(activation)
                                .with_recompute(recompute);
                            conv_bn(i.get("x"), params, options).unwrap().output
                        })
                        .unwrap_or_else(|error| {
                            panic!("{subset:06b}, {activation:?}, {recompute:?}, frozen {frozen}: {error}")
                        });
                }
            }
        }
    }
}

/// The checker itself: a wrong gradient must not pass.
#[test]
fn a_wrong_gradient_is_caught() {
    let error = gradcheck()
        .input("x", random(&[3, 2], 50))
        .upstream(Upstream::Random(51))
        .check(|inputs| {
            let x = inputs.get::<2>("x");
            // The value of x squared with the gradient of x.
            x.clone() + (x.clone() * x.clone() - x).detach()
        })
        .unwrap_err();
    let GradCheckError::Mismatch { mismatched, .. } = error else {
        panic!("expected a mismatch, got {error}");
    };
    assert_eq!(mismatched, 6);

    let error = gradcheck()
        .input("x", random(&[2], 52))
        .check(|inputs| inputs.get::<1>("x").detach() * inputs.get::<1>("x").detach())
        .unwrap_err();
    assert!(
        matches!(error, GradCheckError::NoGradient { input: "x" }),
        "{error}"
    );
}
