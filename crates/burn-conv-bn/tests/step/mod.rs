//! One conv-bn-relu layer on a CubeCL device, forward and backward: what is measured.

use burn::backend::DispatchDevice;
use burn::nn::PaddingConfig2d;
use burn::tensor::{Device, Distribution, Tensor};
use burn_conv_bn::{Activation, ConvBn2dConfig};
use burn_conv_bn_memory::PoolMeter;

const INPUT: [usize; 4] = [16, 16, 32, 32];
const CHANNELS: usize = 32;

/// Bytes of the layer's output, and of every activation between.
pub const ACTIVATION: usize = 4 * INPUT[0] * CHANNELS * INPUT[2] * INPUT[3];

/// Bytes of parameters, statistics and tables of partial results, at most.
pub const OVERHEAD: usize = 128 << 10;

/// Steps; the last one counts, when all is set up.
pub const STEPS: usize = 3;

/// The layer.
pub fn config() -> ConvBn2dConfig {
    ConvBn2dConfig::new([INPUT[1], CHANNELS], [3, 3])
        .with_padding(PaddingConfig2d::Same)
        .with_activation(Activation::Relu)
}

/// What a step starts from.
pub struct Step {
    device: Device,
    x: Tensor<4>,
    upstream: Tensor<4>,
}

impl Step {
    /// A step with random values, for an output of the layer, or of a max pool behind it with windows of that
    /// stride.
    pub fn new(device: &Device, stride: usize) -> Self {
        let tracked = device.clone().autodiff();
        // The gradient of a mean is one value, expanded: a buffer as a network would bring it.
        let shape = [INPUT[0], CHANNELS, INPUT[2] / stride, INPUT[3] / stride];
        Self {
            device: device.clone(),
            upstream: Tensor::random(shape, Distribution::Default, &tracked),
            x: Tensor::random(INPUT, Distribution::Default, &tracked).require_grad(),
        }
    }

    /// A meter of the device's pool.
    pub fn meter(&self) -> PoolMeter {
        match self.device.as_dispatch() {
            DispatchDevice::Cube(cube) => PoolMeter::new(cube.client()),
            other => panic!("expected a CubeCL device, got {other:?}"),
        }
    }

    /// Waits for all that was asked of the device.
    pub fn sync(&self) {
        self.device.sync().expect("the device works");
    }

    /// The output, when it is there.
    pub fn forward(&self, layer: impl Fn(Tensor<4>) -> Tensor<4>) -> Tensor<4> {
        let output = layer(self.x.clone());
        self.sync();
        output
    }

    /// Returns when all gradients are there.
    pub fn backward(&self, output: Tensor<4>) {
        let grads = (output * self.upstream.clone()).sum().backward();
        self.sync();
        assert!(self.x.grad(&grads).is_some());
    }
}
