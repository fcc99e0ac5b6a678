//! The fused op on a CubeCL device against the same on Flex: outputs, statistics and every
//! gradient, through Burn's `Fusion` where that is on.

mod gpu;

use std::thread;

use burn::module::Param;
use burn::nn::BatchNorm;
use burn::nn::PaddingConfig2d;
use burn::tensor::ops::MaxPoolOptions;
use burn::tensor::{DType, Device, Tensor, TensorData};
use burn_conv_bn::functional::{ConvBnParams, batch_norm, conv_bn, conv_bn_max_pool2d, max_pool2d};
use burn_conv_bn::{
    Activation, BatchNormActivationConfig, ConvBn2d, ConvBn2dConfig, ConvBnOptions, ConvSpec,
    MaxPool2dConfig, NormSpec, NormVariant, Recompute, RunningVariance,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Uniform values in `[-1, 1)`, the same for the same seed.
fn random(shape: &[usize], seed: u64) -> TensorData {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let values: Vec<f32> = (0..shape.iter().product())
        .map(|_| rng.random_range(-1.0..1.0))
        .collect();
    TensorData::new(values, shape.to_vec())
}

/// One application of the op.
#[derive(Clone, Debug)]
struct Case<const D: usize> {
    spec: ConvSpec,
    input: [usize; D],
    weight: [usize; D],
    norm: NormSpec,
    activation: Activation,
    recompute: Recompute,
    max_workspace: Option<usize>,
    bias: bool,
    affine: bool,
    residual: bool,
    fixed_statistics: bool,
    /// Whether the input, the weight, the norm's parameters and the residual are tracked.
    tracked: [bool; 4],
    channels_last: bool,
}

impl<const D: usize> Case<D> {
    fn new(spec: ConvSpec, input: [usize; D], weight: [usize; D]) -> Self {
        Self {
            spec,
            input,
            weight,
            norm: NormSpec::default(),
            activation: Activation::Relu,
            recompute: Recompute::Conv,
            max_workspace: None,
            bias: false,
            affine: true,
            residual: false,
            fixed_statistics: false,
            tracked: [true; 4],
            channels_last: false,
        }
    }

    fn output(&self) -> [usize; D] {
        let mut output = self.input;
        output[1] = self.weight[0];
        for dim in 0..D - 2 {
            let (before, after) = self.spec.padding[dim];
            let kernel = self.spec.dilation[dim] * (self.weight[dim + 2] - 1) + 1;
            let padded = self.input[dim + 2] + before + after;
            output[dim + 2] = (padded - kernel) / self.spec.stride[dim] + 1;
        }
        output
    }

    /// The output, mean and variance, and the gradients that are tracked, by name.
    fn run(&self, device: &Device) -> Vec<(&'static str, Vec<f64>)> {
        let device = device.clone().autodiff();
        let channels = [self.weight[0]];
        let options = (&device, DType::F32);
        let tensor =
            |shape: [usize; D], seed| Tensor::<D>::from_data(random(&shape, seed), options);
        let vector = |seed| Tensor::<1>::from_data(random(&channels, seed), options);
        let [input, weight, affine, residual] = self.tracked;
        let mut x = tensor(self.input, 1);
        if self.channels_last {
            // The same values in a buffer whose channels are neighbours.
            let last = (D - 1) as isize;
            x = x.movedim(1, last).mul_scalar(1.0).movedim(last, 1);
        }
        let x = x.detach().set_require_grad(input);
        let w = tensor(self.weight, 2).set_require_grad(weight);
        let bias = self.bias.then(|| vector(3).set_require_grad(weight));
        let parameters = self.affine.then(|| {
            let gamma = vector(4).set_require_grad(affine);
            (gamma, vector(5).set_require_grad(affine))
        });
        let shortcut = self
            .residual
            .then(|| tensor(self.output(), 6).set_require_grad(residual));
        let statistics = self
            .fixed_statistics
            .then(|| (vector(7), vector(8).abs().add_scalar(0.5)));
        let params = ConvBnParams {
            weight: w.clone(),
            bias: bias.clone(),
            affine: parameters.clone(),
            residual: shortcut.clone(),
            statistics,
        };
        let options = ConvBnOptions::new(self.spec.clone())
            .with_norm(self.norm)
            .with_activation(self.activation)
            .with_recompute(self.recompute)
            .with_max_workspace(self.max_workspace);
        let result = conv_bn(x.clone(), params, options).expect("the case is valid");
        let upstream = tensor(self.output(), 9);
        let mut values = vec![
            ("output", host(result.output.clone())),
            ("mean", host(result.mean)),
            ("variance", host(result.variance)),
        ];
        let grads = (result.output * upstream).sum().backward();
        let mut add = |name, grad: Option<Vec<f64>>| values.extend(grad.map(|grad| (name, grad)));
        add("input's gradient", x.grad(&grads).map(host));
        add("weight's gradient", w.grad(&grads).map(host));
        add(
            "bias's gradient",
            bias.and_then(|b| b.grad(&grads)).map(host),
        );
        if let Some((gamma, beta)) = parameters {
            add("gamma's gradient", gamma.grad(&grads).map(host));
            add("beta's gradient", beta.grad(&grads).map(host));
        }
        add(
            "residual's gradient",
            shortcut.and_then(|r| r.grad(&grads)).map(host),
        );
        values
    }

    fn check(&self) {
        let got = self.run(&gpu::device());
        let wanted = self.run(&Device::flex());
        assert_eq!(got.len(), wanted.len(), "{self:?}");
        for ((name, got), (_, wanted)) in got.iter().zip(&wanted) {
            assert_eq!(got.len(), wanted.len(), "{name} of {self:?}");
            let scale = wanted
                .iter()
                .fold(1e-3f64, |max, value| max.max(value.abs()));
            for (index, (got, wanted)) in got.iter().zip(wanted).enumerate() {
                let error = (got - wanted).abs() / scale;
                assert!(
                    error <= 1e-4,
                    "{name}[{index}]: got {got}, wanted {wanted} ({error:.1e} of {scale:.1e}) \
                     in {self:?}"
                );
            }
        }
    }
}

fn host<const D: usize>(tensor: Tensor<D>) -> Vec<f64> {
    tensor.into_data().iter::<f64>().collect()
}

fn padded(groups: usize) -> ConvSpec {
    ConvSpec {
        padding: vec![(1, 1); 2],
        groups,
        ..ConvSpec::unit(2)
    }
}

fn square() -> Case<4> {
    Case::new(padded(1), [3, 4, 6, 7], [8, 4, 3, 3])
}

/// Any two options in all their combinations.
#[test]
fn every_option() {
    let parameters = [(true, false), (false, true), (true, true)];
    let mut others = 0;
    for activation in [Activation::Identity, Activation::Relu] {
        for residual in [false, true] {
            for fixed_statistics in [false, true] {
                let policies = [Recompute::Conv, Recompute::Norm, Recompute::Never];
                for (index, recompute) in policies.into_iter().enumerate() {
                    let (affine, bias) = parameters[(index + others) % parameters.len()];
                    Case {
                        activation,
                        residual,
                        fixed_statistics,
                        recompute,
                        affine,
                        bias,
                        ..square()
                    }
                    .check();
                }
                others += 1;
            }
        }
    }
}

/// Each without and with a residual and under both kinds of statistics, and with both policies.
#[test]
fn every_activation() {
    let policies = [(Recompute::Conv, Some(1)), (Recompute::Never, None)];
    // The first two are those of the other tests.
    for (place, activation) in Activation::SAMPLES[2..].iter().enumerate() {
        let others = [(false, false), (true, false), (true, true)];
        for (index, (residual, fixed_statistics)) in others.into_iter().enumerate() {
            let (recompute, max_workspace) = policies[(place + index) % policies.len()];
            Case {
                activation: *activation,
                residual,
                fixed_statistics,
                recompute,
                max_workspace,
                ..square()
            }
            .check();
        }
    }
}

#[test]
fn variants_of_the_norm() {
    Case {
        norm: NormSpec::new(NormVariant::Tutorial, 1e-3),
        ..square()
    }
    .check();
}

/// z in chunks of one image and of two, which leave a rest; whole, with the convolutions' gradients in chunks
/// of one image and of two, which leave a rest; and all at once.
#[test]
fn chunks_of_the_batch() {
    let (input, output, columns) = (4 * 6 * 7 * 4, 8 * 6 * 7 * 4, 9 * 4 * 6 * 7 * 4);
    // Columns twice and a copy of the output's gradient, as products are tuned; the chunk's gradient, and copies of its
    // operands.
    let image = 2 * columns + output + 2 * input + output;
    for (batch, max_workspace) in [
        (3, 1),
        (15, 2 * (output + image)),
        (3, 3 * output + image),
        (3, 3 * output + 2 * image),
        (3, 1 << 20),
    ] {
        for (residual, fixed_statistics) in [(false, false), (true, false), (true, true)] {
            Case {
                max_workspace: Some(max_workspace),
                residual,
                fixed_statistics,
                ..Case::new(padded(1), [batch, 4, 6, 7], [8, 4, 3, 3])
            }
            .check();
        }
    }
}

/// Images whose columns exceed the default bound on their own. The weight's gradient is checked for fewer pixels, still
/// more than 128 a side: Mesa's software driver ends a kernel's loops after 65535 iterations in all.
#[test]
fn wide_inputs() {
    Case {
        tracked: [true, false, true, true],
        ..Case::new(padded(1), [2, 16, 256, 512], [16, 16, 3, 3])
    }
    .check();
    Case::new(padded(1), [2, 128, 130, 150], [4, 128, 3, 3]).check();
}

/// Wrong products of cubek are not chosen, for these numbers of channels.
#[test]
fn channels_that_are_padded_to_those_of_the_input() {
    Case::new(padded(1), [3, 8, 6, 7], [7, 8, 3, 3]).check();
    Case {
        channels_last: true,
        ..Case::new(padded(1), [2, 16, 5, 5], [14, 16, 3, 3])
    }
    .check();
}

#[test]
fn what_is_not_tracked_is_not_computed() {
    for (input, weight, affine, residual) in [
        (false, true, true, true),
        (true, false, false, false),
        (false, false, true, false),
        (false, false, false, true),
    ] {
        for recompute in [Recompute::Conv, Recompute::Norm, Recompute::Never] {
            for fixed_statistics in [false, true] {
                Case {
                    tracked: [input, weight, affine, residual],
                    residual: true,
                    recompute,
                    fixed_statistics,
                    ..square()
                }
                .check();
            }
        }
    }
}

#[test]
fn geometries() {
    let strided = ConvSpec {
        stride: vec![2, 3],
        padding: vec![(0, 2), (1, 0)],
        ..ConvSpec::unit(2)
    };
    Case::new(strided, [2, 3, 9, 8], [5, 3, 3, 2]).check();
    let dilated = ConvSpec {
        dilation: vec![2, 1],
        padding: vec![(2, 2), (1, 1)],
        ..ConvSpec::unit(2)
    };
    Case::new(dilated, [2, 3, 7, 5], [4, 3, 3, 3]).check();
    Case::new(padded(2), [2, 4, 5, 5], [6, 2, 3, 3]).check();
    Case::new(padded(7), [2, 7, 5, 4], [7, 1, 3, 3]).check();
    Case::new(ConvSpec::unit(2), [4, 9, 5, 5], [65, 9, 1, 1]).check();
    Case::new(ConvSpec::unit(2), [4, 3, 3, 3], [16, 3, 3, 3]).check();
    Case::new(ConvSpec::unit(1), [3, 4, 9], [6, 4, 3]).check();
    Case::new(ConvSpec::unit(3), [2, 2, 4, 5, 4], [4, 2, 2, 3, 2]).check();
    Case {
        channels_last: true,
        residual: true,
        ..square()
    }
    .check();
}

/// Whether the device has that dtype; a skip fails with `BURN_CONV_BN_STRICT=1`.
fn has(dtype: DType) -> bool {
    let device = gpu::device();
    let has = device.supports_dtype(dtype);
    if !has {
        println!("SKIPPED: {dtype:?} on {device:?}, which does not have it");
        let strict = std::env::var_os("BURN_CONV_BN_STRICT").is_some_and(|value| value != "0");
        assert!(
            !strict,
            "{dtype:?} is skipped, and BURN_CONV_BN_STRICT is set"
        );
    }
    has
}

/// Norms with given statistics whose offset, scale or scaled weight f16 does not hold, in front of
/// results that it does: against the same in f64 on Flex.
#[test]
fn given_statistics_beyond_half_precision() {
    let run = |device: &Device,
               [held, computed, norm]: [DType; 3],
               (mean, variance, epsilon): (f64, f64, f64),
               (weight, input): (f64, [f64; 4]),
               (activation, all): (Activation, bool)| {
        let device = device.clone().autodiff();
        let tensor = |values: &[f64], shape: [usize; 3]| {
            let data = TensorData::new(values.to_vec(), shape).convert_dtype(held);
            Tensor::<3>::from_data(data, (&device, computed))
        };
        let vector = |value: f64| {
            let data = TensorData::new(vec![value], [1]);
            Tensor::<1>::from_data(data, (&device, norm))
        };
        let x = tensor(&input, [2, 1, 2]).require_grad();
        let w = tensor(&[weight], [1, 1, 1]).set_require_grad(all);
        let gamma = vector(1.0).set_require_grad(all);
        let beta = vector(0.5).set_require_grad(all);
        let params = ConvBnParams {
            weight: w.clone(),
            bias: None,
            affine: Some((gamma.clone(), beta.clone())),
            residual: None,
            statistics: Some((vector(mean), vector(variance))),
        };
        let options = ConvBnOptions::new(ConvSpec::unit(1))
            .with_norm(NormSpec::new(NormVariant::BatchNorm, epsilon))
            .with_activation(activation);
        let result = conv_bn(x.clone(), params, options).expect("the case is valid");
        let upstream = tensor(&[0.25, -0.5, 0.5, 0.25], [2, 1, 2]);
        let grads = (result.output.clone() * upstream).sum().backward();
        let mut values = vec![host(result.output)];
        values.extend(x.grad(&grads).map(host));
        values.extend(w.grad(&grads).map(host));
        values.extend(gamma.grad(&grads).map(host));
        values.extend(beta.grad(&grads).map(host));
        values
    };
    // A few roundings, and the distance of subnormal numbers in f16.
    for (dtype, relative, absolute) in [(DType::F16, 1e-2, 6e-8), (DType::BF16, 4e-2, 0.0)] {
        if !has(dtype) {
            continue;
        }
        for (statistics, values) in [
            // The offset is 79057.
            ((-250.0, 0.0, 1e-5), (1.0, [-253.0, -251.0, -250.0, -248.0])),
            // The scale is 1e5.
            ((0.0, 0.0, 1e-10), (1.0, [-0.125, 0.0625, 0.03125, 0.25])),
            // The scaled weight is 1e-7.
            ((0.0, 1e8, 1e-5), (1e-3, [-6e4, 1e4, 3e4, 6e4])),
        ] {
            for activation in [
                Activation::Identity,
                Activation::Relu,
                Activation::HardSwish,
            ] {
                for all in [false, true] {
                    let case = (activation, all);
                    let half = [dtype, dtype, DType::F32];
                    let double = [dtype, DType::F64, DType::F64];
                    let got = run(&gpu::device(), half, statistics, values, case);
                    let wanted = run(&Device::flex(), double, statistics, values, case);
                    assert_eq!(got.len(), wanted.len());
                    for (index, (got, wanted)) in got.iter().zip(&wanted).enumerate() {
                        let largest = wanted.iter().fold(0.0, |a: f64, b| a.max(b.abs()));
                        for (got, wanted) in got.iter().zip(wanted) {
                            assert!(
                                (got - wanted).abs() <= relative * largest + absolute,
                                "result {index}, {dtype:?}, {statistics:?}, {case:?}: got {got}, \
                                 wanted {wanted}"
                            );
                        }
                    }
                }
            }
        }
    }
}

/// The norm alone, as the unfused form of the tutorial's variant takes it.
#[test]
fn norm_alone() {
    let run = |device: &Device| {
        let device = device.clone().autodiff();
        let x = Tensor::<4>::from_data(random(&[3, 5, 4, 6], 1), (&device, DType::F32));
        let x = x.require_grad();
        let norm = NormSpec::new(NormVariant::Tutorial, 1e-3);
        let result = batch_norm(x.clone(), Default::default(), norm).expect("the shapes are valid");
        let upstream = Tensor::<4>::from_data(random(&[3, 5, 4, 6], 2), (&device, DType::F32));
        let grads = (result.output.clone() * upstream).sum().backward();
        let grad = x.grad(&grads).expect("x is tracked");
        (host(result.output), host(grad))
    };
    let (got, wanted) = (run(&gpu::device()), run(&Device::flex()));
    for (got, wanted) in [(got.0, wanted.0), (got.1, wanted.1)] {
        for (got, wanted) in got.iter().zip(&wanted) {
            assert!((got - wanted).abs() < 2e-5, "got {got}, wanted {wanted}");
        }
    }
}

/// Running mean and variance.
fn running(norm: &BatchNorm) -> [Vec<f64>; 2] {
    [&norm.running_mean, &norm.running_var].map(|state| host(state.value()))
}

/// A block of 5 channels to 6, with the same weights on every device.
fn block(device: &Device, bias: bool, recompute: Recompute) -> ConvBn2d {
    let mut block = ConvBn2dConfig::new([5, 6], [3, 3])
        .with_padding(PaddingConfig2d::Explicit(1, 1, 1, 1))
        .with_bias(bias)
        .with_momentum(0.25)
        .with_running_variance(RunningVariance::Unbiased)
        .with_recompute(recompute)
        .init(device);
    let weight = Tensor::from_data(random(&[6, 5, 3, 3], 7), (device, DType::F32));
    block.conv.weight = Param::from_tensor(weight);
    if bias {
        let bias = Tensor::from_data(random(&[6], 8), (device, DType::F32));
        block.conv.bias = Some(Param::from_tensor(bias));
    }
    block
}

/// The running statistics of every layer after two batches: of those whose kernels update them, and of one that has a
/// bias.
#[test]
fn running_statistics() {
    let run = |device: &Device| {
        let device = device.clone().autodiff();
        let batch = |seed| {
            let data = random(&[3, 5, 8, 6], seed);
            Tensor::<4>::from_data(data, (&device, DType::F32)).require_grad()
        };
        let [plain, rebuilt, biased, pooled, residual] = [
            (false, Recompute::Conv),
            (false, Recompute::Norm),
            (true, Recompute::Conv),
            (false, Recompute::Conv),
            (false, Recompute::Never),
        ]
        .map(|(bias, recompute)| block(&device, bias, recompute));
        let alone = BatchNormActivationConfig::new(5)
            .with_momentum(0.25)
            .with_running_variance(RunningVariance::Unbiased)
            .init(&device);
        let pool = MaxPool2dConfig::new([2, 2]).init();
        for x in [batch(1), batch(2)] {
            let y = plain.forward(x.clone());
            rebuilt.forward(x.clone());
            biased.forward(x.clone());
            pooled.forward_max_pool(x.clone(), &pool);
            residual.forward_residual(x.clone(), y);
            alone.forward(x);
        }
        let blocks = [plain, rebuilt, biased, pooled, residual];
        let norms = blocks.iter().map(|block| &block.norm).chain([&alone.norm]);
        norms.flat_map(running).collect::<Vec<_>>()
    };
    let (got, wanted) = (run(&gpu::device()), run(&Device::flex()));
    assert_near("two batches", &got, &wanted, 1e-5);
}

/// Threads that train clones of a layer lose no update of its statistics.
#[test]
fn running_statistics_take_every_threads_update() {
    const UPDATES: usize = 8;
    let device = gpu::device().autodiff();
    let x = Tensor::<4>::from_data(random(&[3, 5, 8, 6], 1), (&device, DType::F32));
    let trained = |threads: usize| {
        let layer = block(&device, false, Recompute::Conv);
        thread::scope(|scope| {
            for _ in 0..threads {
                let (layer, x) = (layer.clone(), x.clone());
                scope.spawn(move || {
                    for _ in 0..UPDATES / threads {
                        layer.forward(x.clone());
                    }
                });
            }
        });
        running(&layer.norm)
    };
    // The threads see the same batch: the order of their updates makes no difference.
    assert_near("four threads", &trained(4), &trained(1), 1e-5);
}

/// The pool alone, over windows that keep an argmax and one that is Burn's.
#[test]
fn max_pool() {
    let run = |device: &Device, window: MaxPoolOptions<2>| {
        let device = device.clone().autodiff();
        let x = Tensor::<4>::from_data(random(&[3, 5, 9, 8], 1), (&device, DType::F32));
        let x = x.require_grad();
        let output = max_pool2d(x.clone(), window).expect("the window fits");
        let upstream = random(&output.dims(), 2);
        let upstream = Tensor::<4>::from_data(upstream, (&device, DType::F32));
        let grads = (output.clone() * upstream).sum().backward();
        (host(output), host(x.grad(&grads).expect("x is tracked")))
    };
    for window in [
        window(2, 2, 0),
        window(3, 2, 1),
        window(2, 2, 0).with_dilation([2, 2]),
    ] {
        let got = run(&gpu::device(), window.clone());
        let wanted = run(&Device::flex(), window);
        assert_eq!(got.0, wanted.0);
        assert_eq!(got.1.len(), wanted.1.len());
        for (got, wanted) in got.1.iter().zip(&wanted.1) {
            assert!((got - wanted).abs() < 2e-6, "got {got}, wanted {wanted}");
        }
    }
}

/// A max pool with square windows.
fn window(kernel_size: usize, stride: usize, padding: usize) -> MaxPoolOptions<2> {
    MaxPoolOptions::new([kernel_size; 2])
        .with_stride([stride; 2])
        .with_padding([padding; 2])
}

/// A block and the max pool behind it, as one op or one after the other: output, mean, variance, and the
/// gradients of input, weight, bias, gamma and beta.
fn pooled_block(
    device: &Device,
    dtype: DType,
    options: &ConvBnOptions,
    pool: &MaxPoolOptions<2>,
    joined: bool,
) -> Vec<Vec<f64>> {
    let device = device.clone().autodiff();
    let tensor = |shape: [usize; 4], seed| {
        let data = random(&shape, seed);
        Tensor::<4>::from_data(data, (&device, dtype)).require_grad()
    };
    let vector =
        |seed, dtype| Tensor::<1>::from_data(random(&[8], seed), (&device, dtype)).require_grad();
    let norm_dtype = if dtype == DType::F64 {
        dtype
    } else {
        DType::F32
    };
    let (x, weight) = (tensor([3, 4, 9, 8], 1), tensor([8, 4, 3, 3], 2));
    let bias = vector(3, dtype);
    let (gamma, beta) = (vector(4, norm_dtype), vector(5, norm_dtype));
    let params = ConvBnParams {
        bias: Some(bias.clone()),
        affine: Some((gamma.clone(), beta.clone())),
        ..ConvBnParams::new(weight.clone())
    };
    let valid = "the case is valid";
    let result = if joined {
        conv_bn_max_pool2d(x.clone(), params, options.clone(), pool.clone()).expect(valid)
    } else {
        let mut result = conv_bn(x.clone(), params, options.clone()).expect(valid);
        result.output = max_pool2d(result.output, pool.clone()).expect(valid);
        result
    };
    let upstream = random(&result.output.dims(), 6);
    let upstream = Tensor::<4>::from_data(upstream, (&device, dtype));
    let grads = (result.output.clone() * upstream).sum().backward();
    let tracked = "every parameter is tracked";
    vec![
        host(result.output),
        host(result.mean),
        host(result.variance),
        host(x.grad(&grads).expect(tracked)),
        host(weight.grad(&grads).expect(tracked)),
        host(bias.grad(&grads).expect(tracked)),
        host(gamma.grad(&grads).expect(tracked)),
        host(beta.grad(&grads).expect(tracked)),
    ]
}

/// Asserts that each result is less than `tolerance` of its length away.
fn assert_near(what: &str, got: &[Vec<f64>], wanted: &[Vec<f64>], tolerance: f64) {
    assert_eq!(got.len(), wanted.len(), "{what}");
    for (index, (got, wanted)) in got.iter().zip(wanted).enumerate() {
        let distance = distance(got, wanted);
        assert!(
            distance < tolerance,
            "result {index} of {what}: {distance:.1e}"
        );
    }
}

/// Difference of two vectors over the length of the second.
fn distance(got: &[f64], wanted: &[f64]) -> f64 {
    assert_eq!(got.len(), wanted.len());
    let squares = got
        .iter()
        .zip(wanted)
        .map(|(got, wanted)| (got - wanted).powi(2));
    let length: f64 = wanted.iter().map(|value| value * value).sum();
    squares.sum::<f64>().sqrt() / length.sqrt().max(1e-3)
}

/// One op where the window allows it, against the two on Flex: z recomputed or kept, whole, in chunks of one
/// image, and two after the other for a window that joins no block.
#[test]
fn max_pool_behind_a_block() {
    for (activation, recompute, max_workspace) in [
        (Activation::Relu, Recompute::Conv, None),
        (Activation::Relu, Recompute::Conv, Some(1)),
        (Activation::Relu, Recompute::Never, None),
        (Activation::Identity, Recompute::Norm, None),
        (Activation::Silu, Recompute::Conv, Some(1)),
    ] {
        let options = ConvBnOptions::new(padded(1))
            .with_activation(activation)
            .with_recompute(recompute)
            .with_max_workspace(max_workspace);
        for pool in [
            window(2, 2, 0),
            window(3, 2, 1),
            window(2, 2, 0).with_dilation([2, 2]),
        ] {
            let got = pooled_block(&gpu::device(), DType::F32, &options, &pool, true);
            let wanted = pooled_block(&Device::flex(), DType::F32, &options, &pool, false);
            assert_near(&format!("{options:?} and {pool:?}"), &got, &wanted, 1e-4);
        }
    }
}

/// In half precision, against the two one after the other on the same device.
#[test]
fn max_pool_behind_a_block_in_half_precision() {
    let options = ConvBnOptions::new(padded(1)).with_activation(Activation::Relu);
    for dtype in [DType::F16, DType::BF16] {
        if !has(dtype) {
            continue;
        }
        for pool in [window(2, 2, 0), window(3, 2, 1)] {
            let run = |joined| pooled_block(&gpu::device(), dtype, &options, &pool, joined);
            let what = format!("{dtype:?} and {pool:?}");
            assert_near(&what, &run(true), &run(false), 2e-2);
        }
    }
}

#[test]
fn tensors_of_another_device_are_refused() {
    let input = Tensor::<4>::zeros([2, 3, 8, 8], &gpu::device());
    let elsewhere = Device::flex();
    let weight = Tensor::<4>::zeros([4, 3, 3, 3], &elsewhere);
    let options = ConvBnOptions::new(ConvSpec::unit(2));
    let error = conv_bn(input, ConvBnParams::new(weight), options).unwrap_err();
    let message = error.to_string();
    assert!(
        message.starts_with("input is on")
            && message.contains(&format!("weight is on {elsewhere:?}")),
        "{message}"
    );
}
