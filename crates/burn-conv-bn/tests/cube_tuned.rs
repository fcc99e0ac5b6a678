//! With autotuning, which the other programs are built without: the memory of a block while its kernels are
//! tuned and after it, and products that tuning must not choose.
//!
//! `cargo xtask test --only gpu --tuned`, which sets CubeCL's tuning to `full`: at lower levels it first measures
//! the device's bandwidth with buffers of 256 MiB, more than these blocks.

mod gpu;

use std::sync::{Mutex, PoisonError};

use burn::backend::DispatchDevice;
use burn::nn::{PaddingConfig2d, Relu};
use burn::tensor::{DType, Device, Distribution, Tensor, TensorData};
use burn_conv_bn::functional::{ConvBnParams, conv_bn};
use burn_conv_bn::{Activation, ConvBn2dConfig, ConvBnOptions, ConvSpec};
use burn_conv_bn_memory::PoolMeter;

/// No other test allocates at the same time.
static ALONE: Mutex<()> = Mutex::new(());

const SHAPE: [usize; 4] = [16, 64, 16, 16];

/// Bytes of the block's input, output, and every activation between.
const ACTIVATION: usize = 4 * SHAPE[0] * SHAPE[1] * SHAPE[2] * SHAPE[3];

/// Most bytes above the level before it of a step that tunes, and of one that does not.
#[derive(Debug)]
struct Peaks {
    tuning: usize,
    after: usize,
}

fn peaks(device: &Device, name: &str, forward: impl Fn(Tensor<4>) -> Tensor<4>) -> Peaks {
    let meter = match device.as_dispatch() {
        DispatchDevice::Cube(cube) => PoolMeter::new(cube.client()),
        other => panic!("expected a CubeCL device, got {other:?}"),
    };
    let tracked = device.clone().autodiff();
    let random = || Tensor::<4>::random(SHAPE, Distribution::Default, &tracked);
    // Channels innermost in memory, as a block before this one would leave them.
    let innermost = random().movedim(1, 3).mul_scalar(1.0).movedim(3, 1);
    let x = innermost.detach().require_grad();
    let upstream = random();
    let step = || {
        device.sync().expect("the device works");
        let level = meter.reset_peak();
        let grads = (forward(x.clone()) * upstream.clone()).sum().backward();
        device.sync().expect("the device works");
        assert!(x.grad(&grads).is_some());
        let peak = meter.peak() - level;
        let kernel = meter.peak_kernel();
        println!(
            "{name}: {:.2} activations at most, at {kernel:?}",
            peak as f64 / ACTIVATION as f64
        );
        peak
    };
    let tuning = step();
    step();
    Peaks {
        tuning,
        after: step(),
    }
}

/// For Burn's layers, tuning tries im2col columns of the whole batch, nine activations. A block's gradients go over
/// the batch in chunks whose columns fit the bound, while they are tuned, too.
#[test]
fn a_lower_peak_while_kernels_are_tuned() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let level = std::env::var("CUBECL_AUTOTUNE_LEVEL");
    assert_eq!(level.as_deref(), Ok("full"), "as `cargo xtask test` sets it");
    let device = gpu::device();
    let bound = (2 * ACTIVATION).max(1 << 20);
    let fused = ConvBn2dConfig::new([SHAPE[1], SHAPE[1]], [3, 3])
        .with_padding(PaddingConfig2d::Same)
        .with_activation(Activation::Relu)
        .with_max_workspace(Some(bound))
        .init(&device.clone().autodiff());
    let (conv, norm) = fused.clone().into_parts();
    // Parameters are made when they are first asked for.
    drop(conv.weight.val());
    let relu = Relu::new();
    let ours = peaks(&device, "fused", |x| fused.forward(x));
    let own = peaks(&device, "Burn's own layers", |x| {
        relu.forward(norm.forward(conv.forward(x)))
    });
    let ratio = |ours: usize, own: usize| ours as f64 / own as f64;
    println!(
        "of Burn's peak: {:.2} in the step that tunes, {:.2} after it",
        ratio(ours.tuning, own.tuning),
        ratio(ours.after, own.after)
    );
    assert!(own.tuning >= 9 * ACTIVATION, "{own:?}");
    assert!(10 * ours.tuning <= 6 * own.tuning, "{ours:?} {own:?}");
    // Whether Burn's layers take columns then is up to the device.
    assert!(ours.after < own.after, "{ours:?} {own:?}");
    // The output's gradient, the input's, and the bound.
    let most = 2 * ACTIVATION + bound + ACTIVATION / 4;
    assert!(ours.after <= most, "{ours:?} of {most}");
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
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
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
