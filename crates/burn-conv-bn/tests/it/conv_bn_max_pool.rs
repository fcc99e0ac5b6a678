//! A block and the max pool behind it as one op, against the two one after the other.

use burn::backend::Dispatch;
use burn::module::{Module, Param};
use burn::nn::PaddingConfig2d;
use burn::tensor::ops::MaxPoolOptions;
use burn::tensor::{DType, Device, Tensor, TensorData};
use burn_conv_bn::backend::{
    ConvBnBackend, ConvBnInputs, ConvBnMaxPoolForward, OptionalTensor, RunningStatistics,
    Statistics,
};
use burn_conv_bn::functional::{ConvBnParams, conv_bn_max_pool2d};
use burn_conv_bn::{
    Activation, ConvBn2d, ConvBn2dConfig, ConvBnError, ConvBnOptions, ConvSpec, MaxPool2d,
    MaxPool2dConfig, NormVariant, Recompute, RunningVariance,
};

use crate::common::{assert_close, device, random, tensor, values};

const INPUT: [usize; 4] = [5, 4, 11, 12];

fn config() -> ConvBn2dConfig {
    ConvBn2dConfig::new([4, 6], [3, 3])
        .with_padding(PaddingConfig2d::Explicit(1, 1, 1, 1))
        .with_activation(Activation::Relu)
}

fn tiled() -> MaxPool2d {
    MaxPool2dConfig::new([2, 2]).init()
}

fn overlapping() -> MaxPool2d {
    MaxPool2dConfig::new([3, 3])
        .with_strides([2, 2])
        .with_padding(PaddingConfig2d::Explicit(1, 1, 1, 1))
        .init()
}

fn block(config: &ConvBn2dConfig, gamma: &[f64], dtype: DType) -> ConvBn2d {
    block_on(&device(), config, gamma, dtype)
}

/// A block with parameters of its own: a clone would share the running statistics.
fn block_on(device: &Device, config: &ConvBn2dConfig, gamma: &[f64], dtype: DType) -> ConvBn2d {
    let mut block = config.init(device);
    let data = |shape: &[usize], seed| random(shape, seed);
    let weight = block.conv.weight.dims();
    let leaf = |data| Param::from_tensor(Tensor::<1>::from_data(data, (device, dtype)));
    let weight = Tensor::from_data(data(&weight, 1), (device, dtype));
    block.conv.weight = Param::from_tensor(weight);
    let channels = [GAMMA.len()];
    if block.conv.bias.is_some() {
        block.conv.bias = Some(leaf(data(&channels, 2)));
    }
    if block.settings.affine {
        let norm_dtype = match dtype {
            DType::F64 => DType::F64,
            _ => DType::F32,
        };
        let gamma = Tensor::<1>::from_data(gamma, (device, norm_dtype));
        block.norm.gamma = Param::from_tensor(gamma);
        let beta = Tensor::from_data(data(&channels, 3), (device, norm_dtype));
        block.norm.beta = Param::from_tensor(beta);
    }
    block
}

/// Each channel's, of either sign.
const GAMMA: [f64; 6] = [1.0, -0.5, 0.75, 1.5, -1.0, 0.25];

/// What a training step makes.
#[derive(Debug, PartialEq)]
struct Step {
    output: Vec<f64>,
    /// By name.
    grads: Vec<(&'static str, Vec<f64>)>,
    running: [Vec<f64>; 2],
}

fn step(
    block: &ConvBn2d,
    dtype: DType,
    device: &Device,
    forward: impl FnOnce(Tensor<4>) -> Tensor<4>,
) -> Step {
    let leaf = Tensor::<4>::from_data(random(&INPUT, 4), (device, dtype)).require_grad();
    let output = forward(leaf.clone());
    let upstream = Tensor::<4>::from_data(random(&output.dims(), 5), (device, dtype));
    let grads = (output.clone() * upstream).sum().backward();
    let mut results = Vec::new();
    results.push(("input", leaf.grad(&grads).map(values)));
    let (conv, norm) = (&block.conv, &block.norm);
    results.push(("weight", conv.weight.val().grad(&grads).map(values)));
    if let Some(bias) = &conv.bias {
        results.push(("bias", bias.val().grad(&grads).map(values)));
    }
    results.push(("gamma", norm.gamma.val().grad(&grads).map(values)));
    results.push(("beta", norm.beta.val().grad(&grads).map(values)));
    let results = results.into_iter();
    let results = results.filter_map(|(name, grad)| Some((name, grad?)));
    let running = [&norm.running_mean, &norm.running_var];
    Step {
        output: values(output),
        grads: results.collect(),
        running: running.map(|running| values(running.value_sync())),
    }
}

#[track_caller]
fn check(config: &ConvBn2dConfig, gamma: &[f64], pool: &MaxPool2d, dtype: DType, tolerance: f64) {
    let what = format!("{dtype:?}, {:?}, {gamma:?}, {pool:?}", config.activation);
    let [joined, apart] = [(); 2].map(|()| block(config, gamma, dtype));
    let device = device();
    let got = step(&joined, dtype, &device, |x| {
        joined.forward_max_pool(x, pool)
    });
    let wanted = step(&apart, dtype, &device, |x| pool.forward(apart.forward(x)));
    assert_eq!(got.output, wanted.output, "output ({what})");
    assert_eq!(got.running, wanted.running, "running statistics ({what})");
    assert_eq!(got.grads.len(), wanted.grads.len());
    for ((name, got), (_, wanted)) in got.grads.iter().zip(&wanted.grads) {
        assert_close(&format!("{name} ({what})"), got, wanted, tolerance, 1e-12);
    }
}

#[test]
fn gradients_are_those_of_the_two() {
    for pool in [tiled(), overlapping()] {
        for activation in [
            Activation::Relu,
            Activation::Identity,
            Activation::Relu6,
            Activation::LeakyRelu {
                negative_slope: 0.1,
            },
            Activation::Silu,
        ] {
            let config = config().with_activation(activation);
            check(&config, &GAMMA, &pool, DType::F64, 1e-11);
            check(&config, &GAMMA, &pool, DType::F32, 1e-4);
        }
        check(&config(), &GAMMA, &pool, DType::F16, 2e-2);
        check(&config(), &GAMMA, &pool, DType::BF16, 1e-1);
    }
}

#[test]
fn every_setting_of_the_block_is_kept() {
    for config in [
        config().with_bias(true),
        config().with_affine(false),
        config().with_groups(2).with_stride([2, 1]),
        config().with_running_variance(RunningVariance::Unbiased),
        config().with_recompute(Recompute::Never),
        config().with_max_workspace(Some(0)),
        config()
            .with_norm_variant(NormVariant::Tutorial)
            .with_epsilon(1e-3)
            .with_affine(false),
    ] {
        check(&config, &GAMMA, &tiled(), DType::F64, 1e-11);
    }
}

/// The norm's input cannot be recovered from the output of such channels.
#[test]
fn channels_with_a_small_scale_are_exact() {
    let with_first = |gamma: f64| {
        let mut all = GAMMA;
        all[0] = gamma;
        all
    };
    for gamma in [0.0, 1e-30, -1e-6, 1e-2] {
        check(&config(), &with_first(gamma), &tiled(), DType::F64, 1e-11);
        check(&config(), &with_first(gamma), &tiled(), DType::F32, 1e-4);
        check(&config(), &with_first(gamma), &tiled(), DType::F16, 2e-2);
    }
}

/// Steps of a block joined with its pool and of the two apart, whose parameters `change` changed.
fn both_steps(gamma: f64, dtype: DType, change: impl Fn(&mut ConvBn2d)) -> [Step; 2] {
    [true, false].map(|joined| {
        let mut block = block(&config(), &[gamma; GAMMA.len()], dtype);
        change(&mut block);
        let pool = tiled();
        step(&block, dtype, &device(), |x| {
            if joined {
                block.forward_max_pool(x, &pool)
            } else {
                pool.forward(block.forward(x))
            }
        })
    })
}

fn without_beta(block: &mut ConvBn2d) {
    block.norm.beta = Param::from_tensor(Tensor::zeros([GAMMA.len()], &device()));
}

/// Numbers below the smallest normal one have too few digits to divide by, or to be divided.
#[test]
fn channels_with_subnormal_numbers_are_exact() {
    let scale = both_steps(1e-34, DType::F32, |block| {
        without_beta(block);
        let weight = block.conv.weight.val().detach() * 1e7;
        block.conv.weight = Param::from_tensor(weight.detach());
    });
    let outputs = both_steps(1e-7, DType::F16, without_beta);
    for ([got, wanted], tolerance) in [(scale, 1e-5), (outputs, 2e-2)] {
        assert_eq!(got.output, wanted.output);
        for ((name, got), (_, wanted)) in got.grads.iter().zip(&wanted.grads) {
            assert_close(name, got, wanted, tolerance, 1e-12);
        }
    }
}

/// The norm's input cannot be recovered from the output, and gamma's gradient is finite all the same.
#[test]
fn channels_with_an_infinite_scale_are_exact() {
    let [got, wanted] = both_steps(f64::INFINITY, DType::F32, |_| {});
    let gradient = |step: &Step, name| {
        let mut grads = step.grads.iter();
        grads.find(|(other, _)| *other == name).unwrap().1.clone()
    };
    for name in ["gamma", "beta"] {
        let (got, wanted) = (gradient(&got, name), gradient(&wanted, name));
        assert!(
            wanted.iter().all(|grad| grad.is_finite()),
            "{name}: {wanted:?}"
        );
        assert_close(name, &got, &wanted, 1e-4, 1e-12);
    }
}

#[test]
fn what_cannot_be_one_op_is_two() {
    let windows = [
        MaxPool2dConfig::new([2, 2]).with_ceil_mode(true),
        MaxPool2dConfig::new([2, 2]).with_dilation([2, 1]),
        MaxPool2dConfig::new([2, 2]).with_padding(PaddingConfig2d::Explicit(0, 1, 1, 0)),
        MaxPool2dConfig::new([2, 2]).with_padding(PaddingConfig2d::Same),
        MaxPool2dConfig::new([1, 2]).with_padding(PaddingConfig2d::Explicit(1, 0, 1, 0)),
    ];
    for pool in windows {
        check(&config(), &GAMMA, &pool.init(), DType::F64, 0.0);
    }
    // A frozen norm, and evaluation.
    let [joined, apart] = [(); 2].map(|()| {
        let mut block = block(&config(), &GAMMA, DType::F32);
        block.norm = block.norm.freeze();
        block
    });
    let (pool, device) = (tiled(), device());
    let got = step(&joined, DType::F32, &device, |x| {
        joined.forward_max_pool(x, &pool)
    });
    let wanted = step(&apart, DType::F32, &device, |x| {
        pool.forward(apart.forward(x))
    });
    assert_eq!(got, wanted);
}

#[test]
fn evaluation_is_that_of_the_two() {
    let block = block(&config(), &GAMMA, DType::F32).valid();
    let x = Tensor::<4>::from_data(random(&INPUT, 4), (&Device::flex(), DType::F32));
    let pool = tiled();
    let got = block.forward_max_pool(x.clone(), &pool);
    let wanted = pool.forward(block.forward(x));
    assert_eq!(values(got), values(wanted));
}

#[test]
fn gradient_checkpointing_changes_nothing() {
    let plain = device();
    let checkpointed = Device::flex().autodiff().gradient_checkpointing();
    let [first, second] = [&plain, &checkpointed].map(|device| {
        let block = block_on(device, &config(), &GAMMA, DType::F64);
        let pool = tiled();
        // Something that may be dropped and recomputed.
        step(&block, DType::F64, device, |x| {
            block.forward_max_pool(x.clone() * x, &pool)
        })
    });
    assert_eq!(first, second);
}

/// Where epsilon outweighs the variance, beta is large beside what it is added to.
#[test]
fn channels_with_little_variance_are_exact() {
    let config = config().with_epsilon(1e10);
    for activation in [Activation::Relu, Activation::Identity] {
        let config = config.clone().with_activation(activation);
        check(&config, &GAMMA, &tiled(), DType::F64, 1e-11);
        check(&config, &GAMMA, &tiled(), DType::F32, 1e-5);
    }
}

/// One gradient at a time, the others' parents being constants.
#[test]
fn each_gradient_is_there_alone() {
    for activation in [Activation::Relu, Activation::Identity, Activation::Silu] {
        each_gradient_is_there(activation);
    }
}

fn each_gradient_is_there(activation: Activation) {
    let tensors = || {
        let params = [vec![6, 4, 3, 3], vec![6], vec![6], vec![6]];
        let params = params.into_iter().enumerate();
        let input = random(&INPUT, 9);
        let params = params.map(|(seed, shape)| random(&shape, seed as u64));
        std::iter::once(input).chain(params)
    };
    let run = |tracked: [bool; 5]| {
        let all: Vec<_> = tensors().collect();
        let leaf = |index: usize| {
            let data = all[index].clone();
            tensor::<1>(data, DType::F64).set_require_grad(tracked[index])
        };
        let large = |index: usize| {
            let data = all[index].clone();
            tensor::<4>(data, DType::F64).set_require_grad(tracked[index])
        };
        let (input, weight) = (large(0), large(1));
        let (bias, gamma, beta) = (leaf(2), leaf(3), leaf(4));
        let params = ConvBnParams::new(weight.clone())
            .with_bias(bias.clone())
            .with_affine(gamma.clone() + 2.0, beta.clone());
        let options = ConvBnOptions::new(ConvSpec::unit(2)).with_activation(activation);
        let pool = MaxPoolOptions::new([2, 2]);
        let output = conv_bn_max_pool2d(input.clone(), params, options, pool)
            .unwrap()
            .output;
        let upstream = tensor::<4>(random(&output.dims(), 6), DType::F64);
        let grads = (output * upstream).sum().backward();
        [
            input.grad(&grads).map(values),
            weight.grad(&grads).map(values),
            bias.grad(&grads).map(values),
            gamma.grad(&grads).map(values),
            beta.grad(&grads).map(values),
        ]
    };
    let all = run([true; 5]);
    assert!(all.iter().all(Option::is_some));
    for index in 0..5 {
        let mut alone = [false; 5];
        alone[index] = true;
        let got = run(alone);
        for (other, (got, wanted)) in got.iter().zip(&all).enumerate() {
            let what = format!("{other} beside {index}, {activation:?}");
            match (got, wanted) {
                (Some(got), Some(wanted)) if other == index => {
                    assert_close(&what, got, wanted, 1e-14, 0.0);
                }
                (got, _) => assert!(got.is_none() && other != index, "{what}"),
            }
        }
    }
}

#[test]
fn the_kernel_takes_what_the_documentation_says() {
    let flex = Device::flex();
    let takes = |pool: MaxPoolOptions<2>, recompute| {
        let inputs = ConvBnInputs::<Dispatch> {
            input: Tensor::<4>::ones([2, 3, 8, 8], &flex).into_dispatch(),
            weight: Tensor::<4>::ones([4, 3, 3, 3], &flex).into_dispatch(),
            bias: OptionalTensor::Absent,
            gamma: OptionalTensor::Absent,
            beta: OptionalTensor::Absent,
            residual: OptionalTensor::Absent,
            statistics: Statistics::Batch,
            running: RunningStatistics::Absent,
        };
        let options = ConvBnOptions::new(ConvSpec::unit(2)).with_recompute(recompute);
        let forward = Dispatch::conv_bn_max_pool_forward(inputs, options, pool, false);
        matches!(forward, ConvBnMaxPoolForward::Pooled { .. })
    };
    let two = MaxPoolOptions::new([2, 2]);
    assert!(takes(two.clone(), Recompute::Conv));
    assert!(takes(two.clone(), Recompute::Never));
    assert!(!takes(two.with_padding([2, 0]), Recompute::Conv));
}

#[test]
fn a_window_that_does_not_fit_is_named() {
    let x = tensor::<4>(random(&INPUT, 1), DType::F32);
    let weight = tensor::<4>(random(&[6, 4, 3, 3], 2), DType::F32);
    let error = conv_bn_max_pool2d(
        x,
        ConvBnParams::new(weight),
        ConvBnOptions::new(ConvSpec::unit(2)),
        MaxPoolOptions::new([10, 2]),
    )
    .unwrap_err();
    assert!(
        matches!(error, ConvBnError::WindowTooLarge { .. }),
        "{error}"
    );
}

/// Where a closed ReLU is the largest value of its window, infinity and NaN are not passed on.
#[test]
fn closed_relus_pass_nothing() {
    for pool in [tiled(), overlapping()] {
        for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
            let mut block = block(&config(), &GAMMA, dtype);
            // Windows of either kind.
            let norm_dtype = block.norm.beta.val().dtype();
            let beta = TensorData::new(vec![-1.0f64; GAMMA.len()], [GAMMA.len()]);
            block.norm.beta = Param::from_tensor(tensor(beta, norm_dtype));
            let run = |at_closed: f64| {
                let leaf = tensor::<4>(random(&INPUT, 4), dtype).require_grad();
                let output = block.forward_max_pool(leaf.clone(), &pool);
                let values_out = values(output.clone());
                assert!(values_out.contains(&0.0) && values_out.iter().any(|y| *y > 0.0));
                let upstream: Vec<f64> = random(&output.dims(), 5)
                    .iter::<f64>()
                    .zip(values_out)
                    .map(|(dy, y)| if y == 0.0 { at_closed } else { dy })
                    .collect();
                let upstream = tensor(TensorData::new(upstream, output.dims()), dtype);
                let grads = (output * upstream).sum().backward();
                let (conv, norm) = (&block.conv, &block.norm);
                [
                    leaf.grad(&grads).map(values),
                    conv.weight.val().grad(&grads).map(values),
                    norm.gamma.val().grad(&grads).map(values),
                    norm.beta.val().grad(&grads).map(values),
                ]
            };
            let wanted = run(0.0);
            for at_closed in [f64::INFINITY, f64::NEG_INFINITY, f64::NAN] {
                assert!(
                    run(at_closed) == wanted,
                    "{at_closed} to {dtype:?}, {pool:?}"
                );
            }
        }
    }
}

/// Windows that join: undilated, rounded down, padded by at most half of the window on both sides alike.
/// A joined block lists the pooled output.
#[test]
fn which_windows_join_a_block() {
    let padding = |rows, columns| PaddingConfig2d::Explicit(rows, columns, rows, columns);
    let square = |kernel| MaxPool2dConfig::new([kernel; 2]);
    for (pool, joins) in [
        (square(2), true),
        (square(2).with_padding(padding(1, 1)), true),
        (square(3).with_padding(padding(1, 0)), true),
        (square(3).with_padding(padding(2, 0)), false),
        (
            square(3).with_padding(PaddingConfig2d::Explicit(0, 0, 1, 1)),
            false,
        ),
        (square(2).with_dilation([2, 1]), false),
        (square(2).with_ceil_mode(true), false),
        (
            MaxPool2dConfig::new([16, 16]).with_padding(padding(4, 4)),
            true,
        ),
        (
            MaxPool2dConfig::new([17, 16]).with_padding(padding(4, 4)),
            false,
        ),
    ] {
        let saved = config()
            .init(&device())
            .saved_for_backward_max_pool([2, 4, 32, 32], pool.init());
        let has_pooled = saved.iter().any(|tensor| tensor.name == "pooled");
        assert_eq!(has_pooled, joins, "{pool:?}: {saved:?}");
    }
}
