//! Kernel launches of a training step for each kind of convolution in ResNet-18's blocks, on a CubeCL device.
//!
//! One test, so that no other launches at the same time.

mod gpu;

use std::collections::BTreeMap;

use burn::backend::DispatchDevice;
use burn::module::Module;
use burn::nn::PaddingConfig2d;
use burn::optim::momentum::MomentumConfig;
use burn::optim::{AdamConfig, GradientsParams, ModuleOptimizer, SgdConfig};
use burn::store::ModuleRecord;
use burn::tensor::{Device, Distribution, Tensor};
use burn_conv_bn::{Activation, ConvBn2d, ConvBn2dConfig};
use burn_conv_bn_cubecl::with_last_cube;
use burn_conv_bn_memory::PoolMeter;
use burn_cubecl::CubeDevice;

const BATCH: usize = 2;

/// Steps; the last one counts, when all is set up.
const STEPS: usize = 3;

/// A convolution of ResNet-18 with its norm, residual and activation, over few pixels.
struct Block {
    name: &'static str,
    channels: [usize; 2],
    kernel: usize,
    stride: usize,
    activation: Activation,
    residual: bool,
}

impl Block {
    fn init(&self, device: &Device) -> ConvBn2d {
        let padding = self.kernel / 2;
        ConvBn2dConfig::new(self.channels, [self.kernel; 2])
            .with_stride([self.stride; 2])
            .with_padding(PaddingConfig2d::Explicit(
                padding, padding, padding, padding,
            ))
            .with_activation(self.activation)
            .init(device)
    }

    /// Changes of layout in a step: both operands of the weight's gradient, and that itself unless it has one tap. The
    /// weight has its channels innermost in memory.
    fn copies(&self) -> usize {
        if self.kernel == 1 { 2 } else { 3 }
    }
}

/// Those of the blocks with a stride, and for each number of channels those of the others.
fn blocks() -> Vec<Block> {
    let block = |name, channels, kernel, stride, activation, residual| Block {
        name,
        channels,
        kernel,
        stride,
        activation,
        residual,
    };
    let (relu, identity) = (Activation::Relu, Activation::Identity);
    let strided = [[64, 128], [128, 256], [256, 512]].into_iter();
    let strided = strided.flat_map(|channels| {
        [
            block("3x3 / 2, ReLU", channels, 3, 2, relu, false),
            block("1x1 / 2", channels, 1, 2, identity, false),
        ]
    });
    let others = [64, 128, 256, 512].into_iter().flat_map(|channels| {
        [
            block("3x3, ReLU", [channels; 2], 3, 1, relu, false),
            block("3x3, residual, ReLU", [channels; 2], 3, 1, relu, true),
        ]
    });
    others.chain(strided).collect()
}

/// Launches by whose they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Launches {
    /// The kernels of `burn-conv-bn-cubecl`.
    ours: usize,
    /// Burn's convolutions.
    convolutions: usize,
    /// Changes of layout for these.
    copies: usize,
    fills: usize,
    /// The rest: Burn's operations element by element, fused or not.
    others: usize,
}

impl Launches {
    fn of(kernels: &BTreeMap<&'static str, usize>) -> Self {
        let mut launches = Self::default();
        for (kernel, count) in kernels {
            let kind = if kernel.contains("burn_conv_bn") {
                &mut launches.ours
            } else if kernel.contains("contiguous") {
                &mut launches.copies
            } else if kernel.contains("conv") {
                &mut launches.convolutions
            } else if kernel.contains("full_kernel") {
                &mut launches.fills
            } else {
                &mut launches.others
            };
            *kind += count;
        }
        launches
    }

    fn total(self) -> usize {
        self.ours + self.convolutions + self.copies + self.fills + self.others
    }
}

/// An activation as a block before this one leaves it: channels innermost in memory.
fn activation(channels: usize, size: usize, device: &Device) -> Tensor<4> {
    let shape = [BATCH, size, size, channels];
    let tensor = Tensor::<4>::random(shape, Distribution::Default, device);
    tensor.permute([0, 3, 1, 2])
}

/// Launches of forward, and of backward from the output's gradient on, before the optimizer's step.
fn measure(
    block: &Block,
    mut layer: ConvBn2d,
    optimizer: &mut ModuleOptimizer,
    device: &Device,
    meter: &PoolMeter,
) -> [Launches; 2] {
    let tracked = device.clone().autodiff();
    let sync = || device.sync().expect("the device works");
    let size = 4;
    let [channels_in, channels_out] = block.channels;
    let x = activation(channels_in, size, &tracked).require_grad();
    let residual = activation(channels_out, size / block.stride, &tracked).require_grad();
    let mut counted = [Launches::default(); 2];
    for _ in 0..STEPS {
        sync();
        meter.reset_peak();
        let output = if block.residual {
            layer.forward_residual(x.clone(), residual.clone())
        } else {
            layer.forward(x.clone())
        };
        sync();
        meter.peak();
        let forward = meter.launches();
        meter.reset_peak();
        let grads = output.backward();
        sync();
        meter.peak();
        assert!(x.grad(&grads).is_some());
        counted = [forward, meter.launches()].map(|kernels| Launches::of(&kernels));
        let grads = GradientsParams::from_grads(grads, &layer);
        layer = optimizer.step(0.1, layer, grads);
    }
    // The output's gradient of ones.
    counted[1].fills -= 1;
    counted
}

fn cube(device: &Device) -> CubeDevice {
    match device.as_dispatch() {
        DispatchDevice::Cube(cube) => cube.clone(),
        other => panic!("expected a CubeCL device, got {other:?}"),
    }
}

#[test]
fn launches_of_resnet_18() {
    let device = gpu::device();
    let tracked = device.clone().autodiff();
    let meter = PoolMeter::new(cube(&device).client());
    println!(
        "|                     |   channels | last cube | forward | backward | ours | convolutions | copies | others |"
    );
    for block in blocks() {
        // Whether the last cube of a launch finishes what all of them reduced: where the device does not promise that it
        // can, it still launches as often.
        for last_cube in [false, true] {
            let layer = block.init(&tracked);
            let [forward, backward] = with_last_cube(last_cube, || {
                let optimizer = &mut SgdConfig::new().init();
                measure(&block, layer, optimizer, &device, &meter)
            });
            let sum = |count: fn(Launches) -> usize| count(forward) + count(backward);
            println!(
                "| {:19} | {:3} -> {:3} | {:9} | {:7} | {:8} | {:4} | {:12} | {:6} | {:6} |",
                block.name,
                block.channels[0],
                block.channels[1],
                last_cube,
                forward.total(),
                backward.total(),
                sum(|launches| launches.ours),
                sum(|launches| launches.convolutions),
                sum(|launches| launches.copies),
                sum(|launches| launches.others),
            );
            // Two sweeps forward and two backward, each pair with a launch between unless the last cube does its work.
            // The running statistics take none.
            assert_eq!(sum(|launches| launches.ours), if last_cube { 4 } else { 6 });
            assert_eq!(sum(|launches| launches.others), 0);
            // Forward, recomputation and two gradients.
            assert_eq!(sum(|launches| launches.convolutions), 4);
            assert_eq!(sum(|launches| launches.fills), 0);
            assert!(sum(|launches| launches.copies) <= block.copies());
            let most = if last_cube { 11 } else { 13 };
            assert!(sum(Launches::total) <= most);
        }
    }
    for block in blocks().iter().filter(|block| block.channels[1] == 128) {
        weight_keeps_its_order(block, &device, &meter);
    }
}

/// Copies of a weight that was drawn and of one that was loaded, in evaluation, and after the steps of optimizers.
fn weight_keeps_its_order(block: &Block, device: &Device, meter: &PoolMeter) {
    let tracked = device.clone().autodiff();
    let drawn = || block.init(&tracked);
    let loaded = || {
        let bytes = drawn().into_record().into_bytes().unwrap();
        drawn().load_record(ModuleRecord::from_bytes(bytes).unwrap())
    };
    for layer in [&drawn as &dyn Fn() -> ConvBn2d, &loaded] {
        let evaluated = layer().valid();
        let x = activation(block.channels[0], 4, device);
        for _ in 0..STEPS {
            device.sync().expect("the device works");
            meter.reset_peak();
            evaluated.forward(x.clone());
            device.sync().expect("the device works");
            meter.peak();
        }
        assert_eq!(Launches::of(&meter.launches()).copies, 0);
        let sgd = SgdConfig::new().with_momentum(Some(MomentumConfig::new()));
        for mut optimizer in [sgd.init(), AdamConfig::new().init()] {
            let [forward, backward] = measure(block, layer(), &mut optimizer, device, meter);
            assert!(forward.copies + backward.copies <= block.copies());
        }
    }
}
