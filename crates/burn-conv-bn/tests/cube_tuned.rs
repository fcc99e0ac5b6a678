//! With autotuning, which the other programs are built without: the memory of a block while its kernels are
//! tuned and after it, and products that tuning must not choose.
//!
//! `cargo xtask test --only gpu --tuned`, which sets CubeCL's tuning to `full`: at lower levels it first measures
//! the device's bandwidth with buffers of 256 MiB, more than these blocks.

mod gpu;

use std::sync::{Mutex, MutexGuard, PoisonError};

use burn::backend::DispatchDevice;
use burn::nn::PaddingConfig2d;
use burn::nn::pool;
use burn::tensor::activation::relu;
use burn::tensor::{DType, Device, Distribution, Tensor, TensorData};
use burn_conv_bn::functional::{ConvBnParams, conv_bn};
use burn_conv_bn::{
    Activation, ConvBn2d, ConvBn2dConfig, ConvBnModule, ConvBnOptions, ConvSpec, MaxPool2dConfig,
};
use burn_conv_bn_memory::PoolMeter;

/// No other test allocates at the same time.
static ALONE: Mutex<()> = Mutex::new(());

/// Bytes of the tensors of a shape in f32.
fn bytes(shape: [usize; 4]) -> usize {
    4 * shape.iter().product::<usize>()
}

/// Most bytes above the level before it of a step that tunes, and of one that does not.
#[derive(Debug)]
struct Peaks {
    tuning: usize,
    after: usize,
}

impl Peaks {
    /// Of a step from an input of the first shape to an output of the second.
    fn of(
        device: &Device,
        name: &str,
        [input, output]: [[usize; 4]; 2],
        forward: impl Fn(Tensor<4>) -> Tensor<4>,
    ) -> Self {
        let meter = match device.as_dispatch() {
            DispatchDevice::Cube(cube) => PoolMeter::new(cube.client()),
            other => panic!("expected a CubeCL device, got {other:?}"),
        };
        let tracked = device.clone().autodiff();
        let random = |shape| Tensor::<4>::random(shape, Distribution::Default, &tracked);
        // Channels innermost in memory, as a block before this one would leave them.
        let innermost = random(input).movedim(1, 3).mul_scalar(1.0).movedim(3, 1);
        let x = innermost.detach().require_grad();
        let upstream = random(output);
        let step = || {
            device.sync().expect("the device works");
            let level = meter.reset_peak();
            let grads = (forward(x.clone()) * upstream.clone()).sum().backward();
            device.sync().expect("the device works");
            assert!(x.grad(&grads).is_some());
            let peak = meter.peak() - level;
            let (mebibytes, kernel) = (peak as f64 / 1048576.0, meter.peak_kernel());
            let kernel = kernel.unwrap_or_default();
            println!("{name}: {mebibytes:.2} MiB at most, at {kernel}");
            peak
        };
        let tuning = step();
        step();
        Self {
            tuning,
            after: step(),
        }
    }

    /// At most 0.6 of Burn's own layers' in the step that tunes, and after it.
    fn assert_below(&self, own: &Self) {
        let ratio = |ours: usize, own: usize| ours as f64 / own as f64;
        println!(
            "of Burn's peak: {:.2} in the step that tunes, {:.2} after it",
            ratio(self.tuning, own.tuning),
            ratio(self.after, own.after)
        );
        assert!(10 * self.tuning <= 6 * own.tuning, "{self:?} {own:?}");
        assert!(10 * self.after <= 6 * own.after, "{self:?} {own:?}");
    }
}

/// A block of 3x3 and ReLU within the larger of its input and output's gradient together, and 1 MiB.
fn block(
    device: &Device,
    [input, output]: [[usize; 4]; 2],
    padding: usize,
    groups: usize,
) -> ConvBn2d {
    let bound = (bytes(input) + bytes(output)).max(1 << 20);
    let block = ConvBn2dConfig::new([input[1], output[1]], [3, 3])
        .with_groups(groups)
        .with_padding(PaddingConfig2d::Explicit(
            padding, padding, padding, padding,
        ))
        .with_activation(Activation::Relu)
        .with_max_workspace(Some(bound))
        .init(&device.clone().autodiff());
    // Parameters are made when they are first asked for.
    drop(block.conv.weight.val());
    block
}

/// Burn's own layers of a block.
fn unfused(block: &ConvBn2d, x: Tensor<4>) -> Tensor<4> {
    relu(block.norm.forward(block.conv.forward(x)))
}

fn alone() -> MutexGuard<'static, ()> {
    let level = std::env::var("CUBECL_AUTOTUNE_LEVEL");
    assert_eq!(
        level.as_deref(),
        Ok("full"),
        "as `cargo xtask test` sets it"
    );
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// For Burn's layers, tuning tries im2col columns of the whole batch, nine activations. A block's gradients go over
/// the batch in chunks whose columns fit the bound, while they are tuned, too.
#[test]
fn a_lower_peak_while_a_block_is_tuned() {
    let _alone = alone();
    let device = gpu::device();
    let shape = [16, 64, 16, 16];
    let fused = block(&device, [shape; 2], 1, 1);
    let ours = Peaks::of(&device, "fused", [shape; 2], |x| fused.forward(x));
    let own = Peaks::of(&device, "Burn's own layers", [shape; 2], |x| {
        unfused(&fused, x)
    });
    let activation = bytes(shape);
    assert!(own.tuning >= 9 * activation, "{own:?}");
    ours.assert_below(&own);
    // The output's gradient, the input's, and the bound.
    let most = 2 * activation + 2 * activation + activation / 4;
    assert!(ours.after <= most, "{ours:?} of {most}");
}

/// Two images of the gradients beside z's, with all that tuning allocates for them.
#[test]
fn the_bound_holds_while_a_block_is_tuned() {
    let _alone = alone();
    let device = gpu::device();
    let shape = [16, 32, 16, 16];
    let activation = bytes(shape);
    // Columns twice, and copies of z's gradient and the input's own.
    let image = (2 * 9 + 1 + 1) * activation / 16;
    let bound = activation + 2 * image;
    let block = block(&device, [shape; 2], 1, 1).with_max_workspace(Some(bound));
    let ours = Peaks::of(&device, "fused", [shape; 2], |x| block.forward(x));
    // Gradients of output and input are not in the bound.
    let most = 2 * activation + bound + activation / 4;
    assert!(ours.tuning <= most, "{ours:?} of {most}");
}

/// Burn tunes a depthwise convolution's input gradient with columns, too. A block's gradient has none.
#[test]
fn a_lower_peak_while_a_depthwise_block_is_tuned() {
    let _alone = alone();
    let device = gpu::device();
    let shape = [16, 64, 16, 16];
    let fused = block(&device, [shape; 2], 1, 64);
    let ours = Peaks::of(&device, "fused", [shape; 2], |x| fused.forward(x));
    let own = Peaks::of(&device, "Burn's own layers", [shape; 2], |x| {
        unfused(&fused, x)
    });
    assert!(own.tuning >= 9 * bytes(shape), "{own:?}");
    ours.assert_below(&own);
    assert!(10 * ours.tuning <= 11 * ours.after, "{ours:?}");
}

/// The convolutions of the tutorial's network and its max pool.
#[test]
fn a_lower_peak_while_the_tutorials_network_is_tuned() {
    let _alone = alone();
    let device = gpu::device();
    let shapes = [
        [16, 1, 28, 28],
        [16, 32, 26, 26],
        [16, 64, 24, 24],
        [16, 64, 12, 12],
    ];
    let first = block(&device, [shapes[0], shapes[1]], 0, 1);
    let second = block(&device, [shapes[1], shapes[2]], 0, 1);
    let pool = MaxPool2dConfig::new([2, 2]).init();
    let burns = pool::MaxPool2dConfig::new([2, 2])
        .with_strides([2, 2])
        .init();
    let ends = [shapes[0], shapes[3]];
    let ours = Peaks::of(&device, "fused", ends, |x| {
        second.forward_max_pool(first.forward(x), &pool)
    });
    let own = Peaks::of(&device, "Burn's own layers", ends, |x| {
        burns.forward(unfused(&second, unfused(&first, x)))
    });
    ours.assert_below(&own);
}

/// Output and gradients of input and weight.
fn grads(device: &Device, input: [usize; 4], channels_out: usize) -> [Vec<f64>; 3] {
    let device = device.clone().autodiff();
    let tensor = |shape: [usize; 4], seed: usize| {
        let values = (0..shape.iter().product::<usize>()).map(|i| ((i * 7 + seed) as f32).sin());
        let data = TensorData::new(values.collect::<Vec<_>>(), shape);
        Tensor::<4>::from_data(data, (&device, DType::F32))
    };
    let x = tensor(input, 1).require_grad();
    let weight = tensor([channels_out, input[1], 3, 3], 2).require_grad();
    let spec = ConvSpec {
        padding: vec![(1, 1); 2],
        ..ConvSpec::unit(2)
    };
    let options = ConvBnOptions::new(spec).with_activation(Activation::Relu);
    let result = conv_bn(x.clone(), ConvBnParams::new(weight.clone()), options);
    let output = result.expect("the shapes fit").output;
    let upstream = tensor(output.dims(), 3);
    let grads = (output.clone() * upstream).sum().backward();
    let tracked = "both are tracked";
    [Some(output), x.grad(&grads), weight.grad(&grads)]
        .map(|tensor| tensor.expect(tracked).into_data().iter::<f64>().collect())
}

/// The products of cubek 0.3.1 that read padding where the output's channels, padded, are as many as the
/// input's, and neighbours of such layers, against Flex.
#[test]
fn channels_that_are_padded_to_those_of_the_input() {
    let _alone = alone();
    for (channels_in, channels_out) in [(8, 7), (16, 14), (8, 8), (7, 8)] {
        let input = [3, channels_in, 6, 7];
        let got = grads(&gpu::device(), input, channels_out);
        let wanted = grads(&Device::flex(), input, channels_out);
        for (index, (got, wanted)) in got.iter().zip(&wanted).enumerate() {
            let largest = wanted
                .iter()
                .fold(0f64, |most, value| most.max(value.abs()));
            for (got, wanted) in got.iter().zip(wanted) {
                assert!(
                    (got - wanted).abs() <= 1e-4 * largest,
                    "result {index} of {channels_in} -> {channels_out}: got {got}, wanted {wanted}"
                );
            }
        }
    }
}
