//! The kernels against the portable bodies, which serve the other backends, in f64. The
//! kernels themselves are held against finite differences and PyTorch in `tests/it`.

mod halves;

use burn::backend::flex::FlexTensor;
use burn::backend::ops::FloatTensorOps;
use burn::backend::{Flex, TensorMetadata};
use burn::tensor::ops::MaxPoolOptions;
use burn::tensor::{DType, Shape, Slice, TensorData};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::tensor::{geometry, host, output_shape, slice, tensor};
use crate::backend::{
    ConvBnBackend, ConvBnBackwardOptions, ConvBnForward, ConvBnGrads, ConvBnInputs,
    ConvBnMaxPoolBackwardOptions, ConvBnSaved, MaxPoolBackwardOptions, MaxPoolForward,
    OptionalTensor, RunningStatistics, Statistics,
};
use crate::portable::{self, cast};
use crate::spec::{
    Activation, ConvBnOptions, ConvSpec, NormSpec, NormVariant, Parents, Recompute, SavePlan,
    StatisticsKind,
};

fn random(shape: &[usize], seed: u64) -> FlexTensor {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let values: Vec<f64> = (0..shape.iter().product())
        .map(|_| rng.random_range(-1.0..1.0))
        .collect();
    FlexTensor::from_data(TensorData::new(values, shape.to_vec()))
}

#[track_caller]
fn assert_close(what: &str, got: &FlexTensor, wanted: &FlexTensor) {
    assert_eq!(got.shape(), wanted.shape(), "{what}");
    let (got, wanted) = (host::<f64>(got), host::<f64>(wanted));
    let worst = got
        .iter()
        .zip(&wanted)
        .map(|(got, wanted)| (got - wanted).abs())
        .fold(0.0, f64::max);
    assert!(worst < 1e-11, "{what}: {worst:e} apart");
}

fn assert_all_close(what: &str, got: ConvBnGrads<Flex>, wanted: ConvBnGrads<Flex>) {
    for (name, got, wanted) in [
        ("input", got.input, wanted.input),
        ("weight", got.weight, wanted.weight),
        ("bias", got.bias, wanted.bias),
        ("gamma", got.gamma, wanted.gamma),
        ("beta", got.beta, wanted.beta),
        ("residual", got.residual, wanted.residual),
    ] {
        match (got.into_option(), wanted.into_option()) {
            (Some(got), Some(wanted)) => assert_close(&format!("{what}: {name}"), &got, &wanted),
            (None, None) => {}
            (got, _) => panic!("{what}: {name} is there: {}", got.is_some()),
        }
    }
}

/// Geometries over one to three dimensions, as spec, input and weight.
fn geometries() -> Vec<(ConvSpec, Vec<usize>, Vec<usize>)> {
    let spec =
        |stride: &[usize], padding: &[(usize, usize)], dilation: &[usize], groups| ConvSpec {
            stride: stride.to_vec(),
            padding: padding.to_vec(),
            dilation: dilation.to_vec(),
            groups,
        };
    vec![
        (
            spec(&[1, 1], &[(1, 1); 2], &[1, 1], 1),
            vec![5, 3, 6, 5],
            vec![4, 3, 3, 3],
        ),
        (
            spec(&[2, 1], &[(0, 2), (1, 0)], &[1, 2], 1),
            vec![3, 2, 7, 6],
            vec![5, 2, 3, 2],
        ),
        (
            spec(&[2, 2], &[(1, 1); 2], &[1, 1], 3),
            vec![4, 6, 6, 6],
            vec![9, 2, 3, 3],
        ),
        (
            spec(&[1, 1], &[(0, 0); 2], &[1, 1], 4),
            vec![2, 4, 5, 5],
            vec![4, 1, 3, 3],
        ),
        (
            spec(&[1, 1], &[(0, 0); 2], &[1, 1], 1),
            vec![3, 7, 4, 4],
            vec![2, 7, 1, 1],
        ),
        (spec(&[2], &[(1, 2)], &[1], 2), vec![4, 4, 9], vec![6, 2, 3]),
        (
            spec(&[1; 3], &[(0, 1); 3], &[1; 3], 1),
            vec![2, 2, 3, 4, 3],
            vec![3, 2, 2, 2, 2],
        ),
    ]
}

#[test]
fn kernels_and_portable_bodies_agree() {
    for (spec, input_shape, weight_shape) in geometries() {
        for variant in [NormVariant::BatchNorm, NormVariant::Tutorial] {
            for activation in Activation::SAMPLES {
                for fixed in [false, true] {
                    for residual in [false, true] {
                        for recompute in [Recompute::Conv, Recompute::Never] {
                            let options = ConvBnOptions::new(spec.clone())
                                .with_norm(NormSpec::new(variant, 1e-3))
                                .with_activation(activation)
                                .with_recompute(recompute);
                            compare(&options, &input_shape, &weight_shape, fixed, residual);
                        }
                    }
                }
            }
        }
    }
}

// Long: one comparison, of every option.
fn compare(
    options: &ConvBnOptions,
    input_shape: &[usize],
    weight_shape: &[usize],
    fixed: bool,
    with_residual: bool,
) {
    let what = format!("{options:?}, input {input_shape:?}, fixed {fixed}");
    let channels = &weight_shape[..1];
    let geometry = geometry(
        [
            &Shape::from(input_shape.to_vec()),
            &Shape::from(weight_shape.to_vec()),
        ],
        &options.conv,
        None,
    );
    let output_shape = output_shape(&Shape::from(input_shape.to_vec()), &geometry).to_vec();
    // Every other image of a larger batch: a view that is not contiguous.
    let mut larger = input_shape.to_vec();
    larger[0] *= 2;
    let every_other = [Slice::new(0, None, 2)];
    let input = Flex::float_slice(random(&larger, 1), &every_other);
    let inputs = ConvBnInputs::<Flex> {
        input,
        weight: random(weight_shape, 2),
        bias: OptionalTensor::Present(random(channels, 3)),
        gamma: OptionalTensor::Present(random(channels, 4)),
        beta: OptionalTensor::Present(random(channels, 5)),
        residual: with_residual.then(|| random(&output_shape, 6)).into(),
        statistics: if fixed {
            Statistics::Fixed {
                mean: random(channels, 7),
                variance: Flex::float_add_scalar(random(channels, 8), 1.5.into()),
            }
        } else {
            Statistics::Batch
        },
        running: RunningStatistics::Absent,
    };
    let statistics = inputs.statistics.kind();
    let present = inputs.present();
    let plan = SavePlan::new(options, statistics, present, present);
    let kernel = Flex::conv_bn_forward(inputs.clone(), options.clone(), plan.conv_output);
    let portable = portable::conv_bn::forward::<Flex>(inputs.clone(), options, plan.conv_output);
    assert_close(&what, &kernel.output, &portable.output);
    assert_close(&what, &kernel.mean, &portable.mean);
    assert_close(&what, &kernel.variance, &portable.variance);
    assert_eq!(kernel.conv_output.is_present(), plan.conv_output);

    let frozen_weight = Parents {
        weight: false,
        ..present
    };
    let norm_alone = Parents {
        input: false,
        ..frozen_weight
    };
    let shift_alone = Parents {
        gamma: false,
        ..norm_alone
    };
    let some = Parents {
        input: false,
        bias: false,
        gamma: false,
        ..present
    };
    for (wanted, max_workspace) in [
        (present, None),
        (present, Some(1)),
        (some, Some(1 << 10)),
        (frozen_weight, None),
        (norm_alone, None),
        (shift_alone, None),
    ] {
        let plan = SavePlan::new(options, statistics, present, wanted);
        let saved = saved(&plan, &inputs, &kernel, random(&output_shape, 9));
        let what = format!("{what}, wanted {wanted:?}");
        let options = ConvBnBackwardOptions {
            options: options.clone().with_max_workspace(max_workspace),
            statistics,
            input_shape: Shape::from(input_shape.to_vec()),
            weight_shape: Shape::from(weight_shape.to_vec()),
            norm_dtype: DType::F64,
            wanted,
        };
        let grads = Flex::conv_bn_backward(saved.clone(), options.clone());
        let portable = portable::conv_bn::backward::<Flex>(saved, &options);
        assert_all_close(&what, grads, portable);
    }
}

/// What the plan keeps of a forward pass.
fn saved(
    plan: &SavePlan,
    inputs: &ConvBnInputs<Flex>,
    forward: &ConvBnForward<Flex>,
    output_grad: FlexTensor,
) -> ConvBnSaved<Flex> {
    let keep = |kept: bool, tensor: &OptionalTensor<Flex>| -> OptionalTensor<Flex> {
        tensor.as_option().filter(|_| kept).cloned().into()
    };
    let present_if = |kept: bool, tensor: &FlexTensor| -> OptionalTensor<Flex> {
        kept.then(|| tensor.clone()).into()
    };
    ConvBnSaved {
        output_grad,
        input: present_if(plan.input, &inputs.input),
        weight: present_if(plan.weight, &inputs.weight),
        bias: keep(plan.bias, &inputs.bias),
        gamma: keep(plan.gamma, &inputs.gamma),
        beta: keep(plan.beta, &inputs.beta),
        mean: present_if(plan.statistics, &forward.mean),
        variance: present_if(plan.statistics, &forward.variance),
        conv_output: keep(plan.conv_output, &forward.conv_output),
        output: present_if(plan.output, &forward.output),
        residual: keep(plan.residual, &inputs.residual),
    }
}

/// A 1x1 convolution of one channel with given statistics, in line with its residual.
struct Given {
    mean: f64,
    variance: f64,
    epsilon: f64,
    weight: f64,
    input: [f64; 4],
}

impl Given {
    /// The output and the requested gradients, on values rounded to `dtype`; with `computes_in_f64` the same
    /// values in f64.
    fn run(
        &self,
        dtype: DType,
        computes_in_f64: bool,
        (options, with_residual, wants_all): (&ConvBnOptions, bool, bool),
        (forward, backward): (Forward, BackwardPass),
    ) -> Vec<Vec<f64>> {
        let of = |values: &[f64], shape: &[usize], dtype: DType| {
            let data = TensorData::new(values.to_vec(), shape.to_vec());
            let held = cast::<Flex>(FlexTensor::from_data(data), dtype);
            let target = if computes_in_f64 { DType::F64 } else { dtype };
            cast::<Flex>(held, target)
        };
        let shape = [2, 1, 2];
        let channel = |value: f64| of(&[value], &[1], DType::F32);
        let inputs = ConvBnInputs::<Flex> {
            input: of(&self.input, &shape, dtype),
            weight: of(&[self.weight], &[1, 1, 1], dtype),
            bias: OptionalTensor::Present(of(&[0.0], &[1], dtype)),
            gamma: OptionalTensor::Present(channel(1.0)),
            beta: OptionalTensor::Present(channel(0.5)),
            residual: with_residual
                .then(|| of(&[0.25, -0.5, 0.75, 0.0], &shape, dtype))
                .into(),
            statistics: Statistics::Fixed {
                mean: channel(self.mean),
                variance: channel(self.variance),
            },
            running: RunningStatistics::Absent,
        };
        let present = inputs.present();
        let wanted = if wants_all {
            present
        } else {
            Parents {
                input: true,
                ..Parents::default()
            }
        };
        let plan = SavePlan::new(options, StatisticsKind::Fixed, present, wanted);
        let result = forward(inputs.clone(), options, plan.conv_output);
        let output_grad = of(&[0.25, -0.5, 0.5, 0.25], &shape, dtype);
        let saved = saved(&plan, &inputs, &result, output_grad);
        let options = ConvBnBackwardOptions {
            options: options.clone(),
            statistics: StatisticsKind::Fixed,
            input_shape: inputs.input.shape(),
            weight_shape: inputs.weight.shape(),
            norm_dtype: if computes_in_f64 {
                DType::F64
            } else {
                DType::F32
            },
            wanted,
        };
        let grads = backward(saved, &options);
        let grads = [
            grads.input,
            grads.weight,
            grads.bias,
            grads.gamma,
            grads.beta,
            grads.residual,
        ];
        let grads = grads.into_iter().filter_map(OptionalTensor::into_option);
        [result.output]
            .into_iter()
            .chain(grads)
            .map(|tensor| host::<f64>(&tensor))
            .collect()
    }
}

type Forward = fn(ConvBnInputs<Flex>, &ConvBnOptions, bool) -> ConvBnForward<Flex>;
type BackwardPass = fn(ConvBnSaved<Flex>, &ConvBnBackwardOptions) -> ConvBnGrads<Flex>;

/// Norms whose scale, offset or scaled weight f16 does not hold, in front of outputs and gradients
/// that it does: nothing of theirs passes through half precision.
#[test]
fn given_statistics_beyond_half_precision() {
    let norms = [
        // The offset is 79057.
        Given {
            mean: -250.0,
            variance: 0.0,
            epsilon: 1e-5,
            weight: 1.0,
            input: [-253.0, -251.0, -250.0, -248.0],
        },
        // The scale is 1e5.
        Given {
            mean: 0.0,
            variance: 0.0,
            epsilon: 1e-10,
            weight: 1.0,
            input: [-0.125, 0.0625, 0.03125, 0.25],
        },
        // The scaled weight is 1e-7.
        Given {
            mean: 0.0,
            variance: 1e8,
            epsilon: 1e-5,
            weight: 1e-3,
            input: [-6e4, 1e4, 3e4, 6e4],
        },
    ];
    let portable: (Forward, BackwardPass) = (
        portable::conv_bn::forward::<Flex>,
        portable::conv_bn::backward::<Flex>,
    );
    let kernels: (Forward, BackwardPass) = (
        |inputs, options, keep| Flex::conv_bn_forward(inputs, options.clone(), keep),
        |saved, options| Flex::conv_bn_backward(saved, options.clone()),
    );
    // A few roundings, and the distance of subnormal numbers in f16.
    for (dtype, relative, absolute) in [(DType::F16, 1e-2, 6e-8), (DType::BF16, 4e-2, 0.0)] {
        for given in &norms {
            for activation in [
                Activation::Identity,
                Activation::Relu,
                Activation::HardSwish,
            ] {
                for recompute in [Recompute::Conv, Recompute::Never] {
                    let options = ConvBnOptions::new(ConvSpec::unit(1))
                        .with_norm(NormSpec::new(NormVariant::BatchNorm, given.epsilon))
                        .with_activation(activation)
                        .with_recompute(recompute);
                    for (residual, wants_all) in [(false, true), (true, true), (false, false)] {
                        let case = (&options, residual, wants_all);
                        let wanted = given.run(dtype, true, case, kernels);
                        for passes in [kernels, portable] {
                            let got = given.run(dtype, false, case, passes);
                            assert_eq!(got.len(), wanted.len());
                            for (index, (got, wanted)) in got.iter().zip(&wanted).enumerate() {
                                let largest = wanted.iter().fold(0.0, |a: f64, b| a.max(b.abs()));
                                for (got, wanted) in got.iter().zip(wanted) {
                                    let error = (got - wanted).abs();
                                    assert!(
                                        error <= relative * largest + absolute,
                                        "result {index}, {dtype:?}, mean {}, variance {}, \
                                         {options:?}: got {got}, wanted {wanted}",
                                        given.mean,
                                        given.variance
                                    );
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

/// The portable body, which serves here where there are no statistics, knows no pool.
#[test]
#[should_panic(expected = "a block joined with a max pool: expected mean and variance")]
fn a_joined_pool_without_statistics_is_refused() {
    let options = ConvBnOptions::new(ConvSpec::unit(2));
    let saved = ConvBnSaved::<Flex> {
        output_grad: random(&[1, 1, 2, 2], 1),
        input: OptionalTensor::Present(random(&[1, 1, 4, 4], 2)),
        weight: OptionalTensor::Present(random(&[1, 1, 1, 1], 3)),
        bias: OptionalTensor::Absent,
        gamma: OptionalTensor::Absent,
        beta: OptionalTensor::Absent,
        mean: OptionalTensor::Absent,
        variance: OptionalTensor::Absent,
        conv_output: OptionalTensor::Absent,
        output: OptionalTensor::Absent,
        residual: OptionalTensor::Absent,
    };
    let conv_bn = ConvBnBackwardOptions {
        options,
        statistics: StatisticsKind::Batch,
        input_shape: Shape::new([1, 1, 4, 4]),
        weight_shape: Shape::new([1, 1, 1, 1]),
        norm_dtype: DType::F64,
        wanted: Parents {
            weight: true,
            ..Parents::default()
        },
    };
    let pool = MaxPoolOptions::new([2, 2]).with_stride([2, 2]);
    let argmax = tensor(vec![0u8; 4], &Shape::new([1, 1, 2, 2]));
    let options = ConvBnMaxPoolBackwardOptions { conv_bn, pool };
    let _ = Flex::conv_bn_max_pool_backward(saved, argmax, options);
}

#[test]
fn a_max_pool_returns_the_argmax_of_each_window() {
    let data = TensorData::from([[[[0.5f32, 2.0, 1.0, 0.0], [1.0, 0.0, 3.0, 1.0]]]]);
    let options = MaxPoolOptions::new([2, 2]);
    let forward = Flex::max_pool_forward(FlexTensor::from_data(data), options);
    let MaxPoolForward::Pooled { output, argmax } = forward else {
        panic!("expected a kernel for windows of 2x2");
    };
    assert_eq!(host::<f32>(&output), [2.0, 3.0]);
    assert_eq!(slice::<u8>(&argmax), [1u8, 2]);
}

#[test]
fn a_max_pool_passes_the_gradient_to_the_argmax() {
    let row = TensorData::from([[[[0.5f32, 2.0, 1.0, 0.0]]]]);
    let options = MaxPoolOptions::new([1, 2]);
    let forward = Flex::max_pool_forward(FlexTensor::from_data(row), options.clone());
    let MaxPoolForward::Pooled { argmax, .. } = forward else {
        panic!("expected a kernel for windows of 1x2");
    };
    let options = MaxPoolBackwardOptions {
        options,
        input_shape: Shape::new([1, 1, 1, 4]),
    };
    let output_grad = FlexTensor::from_data(TensorData::from([[[[5.0f32, 7.0]]]]));
    let grad = Flex::max_pool_backward(output_grad, argmax, options);
    assert_eq!(host::<f32>(&grad), [0.0, 5.0, 7.0, 0.0]);
}
