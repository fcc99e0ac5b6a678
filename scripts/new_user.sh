#!/bin/sh
# A package of a user's own on a GPU: Burn's default features and this workspace's, and a few steps of training.
# The build takes ten minutes on two cores. The argument is one of wgpu's runtimes: wgpu, the
# default, vulkan, webgpu or metal.
set -eu
cd "$(dirname "$0")/.."
runtime=${1:-wgpu}
root=$PWD
package=target/new-user

mkdir -p "$package/src"
cp rust-toolchain.toml "$package"
cat >"$package/Cargo.toml" <<END
[package]
name = "new-user"
version = "0.1.0"
edition = "2024"

[dependencies]
burn = { version = "=0.22.1", features = ["autodiff", "$runtime"] }
burn-conv-bn = { path = "$root/crates/burn-conv-bn", features = ["$runtime"] }

[workspace]
END
cat >"$package/src/main.rs" <<END
use burn::module::Module;
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::nn::{BatchNorm, BatchNormConfig};
use burn::optim::{GradientsParams, SgdConfig};
use burn::tensor::{Device, Distribution, Tensor};
use burn_conv_bn::{Activation, fuse};

#[derive(Module, Debug)]
struct Model {
    conv1: Conv2d,
    bn1: BatchNorm,
}

fn main() {
    let device = Device::$runtime(Default::default()).autodiff();
    device.seed(1);
    let mut model = Model {
        conv1: Conv2dConfig::new([3, 8], [3, 3]).with_bias(false).init(&device),
        bn1: BatchNormConfig::new(8).init(&device),
    };
    let mut optimizer = SgdConfig::new().init();
    let x = Tensor::<4>::random([4, 3, 8, 8], Distribution::Default, &device);
    let mut losses = Vec::new();
    for _ in 0..5 {
        let y = fuse(&model.conv1, &model.bn1)
            .with_activation(Activation::Relu)
            .forward(x.clone());
        let loss = y.square().mean();
        losses.push(loss.clone().into_scalar::<f32>());
        let grads = GradientsParams::from_grads(loss.backward(), &model);
        model = optimizer.step(0.5, model, grads);
    }
    println!("loss over {} steps on $runtime: {losses:?}", losses.len());
    assert!(losses.windows(2).all(|pair| pair[1] < pair[0]), "the loss did not fall");
}
END
CARGO_TARGET_DIR="$package/target" cargo run --manifest-path "$package/Cargo.toml"
