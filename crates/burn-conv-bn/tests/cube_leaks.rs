//! Bytes in use of a CubeCL device's pool over hundreds of training steps.
//!
//! One test, so that no other allocates at the same time.

mod gpu;

use burn::nn::PaddingConfig2d;
use burn::optim::momentum::MomentumConfig;
use burn::optim::{GradientsParams, SgdConfig};
use burn::tensor::{Device, Distribution, Tensor};
use burn_conv_bn::{Activation, ConvBn2dConfig};

const STEPS: usize = 200;

/// Steps until kernels are compiled and the optimizer has its state.
const WARM_UP: usize = 20;

/// Small: a software driver takes some 50 ms for a step.
const INPUT: [usize; 4] = [4, 4, 8, 8];
const CHANNELS: usize = 8;

/// Bytes that the device's allocator has in use, when all that was queued has run.
fn in_use(device: &Device) -> u64 {
    device.sync().expect("the device works");
    let usage = device.memory_pool_usage();
    usage.expect("a CubeCL device has a pool").bytes_in_use
}

/// The second half of the steps reaches no higher than the first: a byte lost at each step would
/// show.
#[test]
fn bytes_in_use_stay_flat() {
    let device = gpu::device();
    let tracked = device.clone().autodiff();
    let mut layer = ConvBn2dConfig::new([INPUT[1], CHANNELS], [3, 3])
        .with_padding(PaddingConfig2d::Same)
        .with_activation(Activation::Relu)
        .init(&tracked);
    let momentum = Some(MomentumConfig::new());
    let mut optimizer = SgdConfig::new().with_momentum(momentum).init();
    let images = Tensor::<4>::random(INPUT, Distribution::Default, &tracked);
    let shape = [INPUT[0], CHANNELS, INPUT[2], INPUT[3]];
    let targets = Tensor::<4>::random(shape, Distribution::Default, &tracked);
    let levels: Vec<u64> = (0..STEPS)
        .map(|_| {
            let error = layer.forward(images.clone()) - targets.clone();
            let grads = (error.clone() * error).mean().backward();
            let grads = GradientsParams::from_grads(grads, &layer);
            layer = optimizer.step(0.01, layer.clone(), grads);
            in_use(&device)
        })
        .collect();
    let (first, second) = levels[WARM_UP..].split_at((STEPS - WARM_UP) / 2);
    let [before, after] = [first, second].map(|levels| levels.iter().max().expect("not empty"));
    println!("{before} bytes at most, then {after}");
    assert!(*before > 0, "something is counted");
    assert!(after <= before, "{levels:?}");
}
