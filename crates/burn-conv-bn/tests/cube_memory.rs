//! One conv-bn-relu layer, forward and backward, on a CubeCL device: what it launches, keeps and
//! holds at most, against Burn's own layers.
//!
//! One test, so that no other allocates or launches at the same time.

mod gpu;

use burn::backend::DispatchDevice;
use burn::module::Module;
use burn::nn::{PaddingConfig2d, Relu};
use burn::tensor::{Device, Distribution, Tensor};
use burn_conv_bn::{Activation, ConvBn2d, ConvBn2dConfig};
use burn_conv_bn_memory::PoolMeter;

const INPUT: [usize; 4] = [16, 16, 32, 32];
const CHANNELS: usize = 32;
/// Of the layer's output, and of every activation between.
const ACTIVATION: usize = 4 * INPUT[0] * CHANNELS * INPUT[2] * INPUT[3];
/// Parameters, statistics, tables of partial results.
const OVERHEAD: usize = 128 << 10;

fn meter(device: &Device) -> PoolMeter {
    match device.as_dispatch() {
        DispatchDevice::Cube(cube) => PoolMeter::new(cube.client()),
        other => panic!("expected a CubeCL device, got {other:?}"),
    }
}

#[derive(Debug)]
struct Measure {
    launches: usize,
    forward_end: usize,
    peak: usize,
}

/// A step of `forward`, after two that set things up.
fn measure(device: &Device, name: &str, forward: impl Fn(Tensor<4>) -> Tensor<4>) -> Measure {
    let tracked = device.clone().autodiff();
    // The gradient of a mean is one value, expanded: a buffer as a network would bring it.
    let shape = [INPUT[0], CHANNELS, INPUT[2], INPUT[3]];
    let upstream = Tensor::<4>::random(shape, Distribution::Default, &tracked);
    let x = Tensor::<4>::random(INPUT, Distribution::Default, &tracked).require_grad();
    let meter = meter(device);
    let mut result = None;
    for _ in 0..3 {
        device.sync().expect("the device works");
        let level = meter.reset_peak();
        let output = forward(x.clone());
        device.sync().expect("the device works");
        let forward_end = meter.current() - level;
        let grads = (output * upstream.clone()).sum().backward();
        device.sync().expect("the device works");
        let peak = meter.peak() - level;
        assert!(x.grad(&grads).is_some());
        let launches = meter.launches();
        result = Some((
            Measure {
                launches: launches.values().sum(),
                forward_end,
                peak,
            },
            launches,
        ));
    }
    let (measure, launches) = result.expect("three steps were made");
    println!(
        "{name}: {} launches, {:.2} activations at the end of forward, {:.2} at most",
        measure.launches,
        measure.forward_end as f64 / ACTIVATION as f64,
        measure.peak as f64 / ACTIVATION as f64,
    );
    for (kernel, count) in launches {
        println!("    {count} x {kernel}");
    }
    measure
}

fn layer(device: &Device) -> ConvBn2d {
    ConvBn2dConfig::new([INPUT[1], CHANNELS], [3, 3])
        .with_padding(PaddingConfig2d::Same)
        .with_activation(Activation::Relu)
        .init(&device.clone().autodiff())
}

#[test]
fn fewer_launches_less_kept_and_a_lower_peak() {
    let device = gpu::device();
    let fused = layer(&device);
    let bounded = ConvBn2dConfig::new([INPUT[1], CHANNELS], [3, 3])
        .with_padding(PaddingConfig2d::Same)
        .with_activation(Activation::Relu)
        .with_max_workspace(Some(ACTIVATION))
        .init(&device.clone().autodiff());
    let (conv, norm) = fused.clone().into_parts();
    let relu = Relu::new();
    println!("{} parameters", fused.num_params());

    let own = measure(&device, "Burn's own layers", |x| {
        relu.forward(norm.forward(conv.forward(x)))
    });
    let ours = measure(&device, "fused", |x| fused.forward(x));
    let chunked = measure(&device, "fused, bounded workspace", |x| bounded.forward(x));

    assert!(ours.launches < own.launches);
    // The output, and nothing else: the input is there in any case.
    assert!(ours.forward_end <= ACTIVATION + OVERHEAD, "{ours:?}");
    assert!(own.forward_end >= 3 * ACTIVATION, "{own:?}");
    assert!(10 * ours.forward_end <= 4 * own.forward_end);
    assert!(ours.peak < own.peak, "{ours:?} {own:?}");
    assert!(chunked.peak <= ours.peak, "{chunked:?} {ours:?}");
}
