//! One and three spatial dimensions: the layers against Burn's own, in f64.

use burn::module::Param;
use burn::nn::{PaddingConfig1d, PaddingConfig3d};
use burn::tensor::activation::relu;
use burn::tensor::{DType, FloatDType, Tensor};
use burn_conv_bn::{
    Activation, ConvBn1d, ConvBn1dConfig, ConvBn2dConfig, ConvBn3d, ConvBn3dConfig, ConvBnModule,
    Recompute,
};

use crate::common::{assert_close, device, random, tensor, values};

type Results = Vec<(&'static str, Vec<f64>)>;

/// Runs a step fused and unfused from the same parameters, and compares all that comes out.
macro_rules! compare {
    ($layer:ty, $rank:literal, $block:expr, $input:expr, $residual:expr, $frozen:expr) => {{
        let (input, context) = ($input, format!("{} {:?}", stringify!($layer), $input));
        let step = |fused: bool| -> Results {
            // Layers share parameters and running statistics when cloned: each side makes its own.
            let mut block: $layer = $block;
            let fill = |shape: &[usize], seed| random(shape, seed);
            let weight = block.conv.weight.dims();
            let channels = [weight[0]];
            let vector = |seed| tensor::<1>(fill(&channels, seed), DType::F64);
            block.conv.weight = Param::from_tensor(tensor(fill(&weight, 1), DType::F64));
            block.conv.bias = Some(Param::from_tensor(vector(2)));
            block.norm.gamma = Param::from_tensor(vector(3));
            block.norm.beta = Param::from_tensor(vector(4));
            block.norm.running_mean = burn::module::RunningState::new(vector(5));
            block.norm.running_var = burn::module::RunningState::new(vector(6) + 2.0);
            if $frozen {
                block.norm.training = Param::from_bool(false);
            }
            let x = tensor::<$rank>(fill(&input, 7), DType::F64).require_grad();
            let plain = |x| block.norm.forward(block.conv.forward(x));
            let shape = block.conv.forward(x.clone()).dims();
            let shortcut = tensor::<$rank>(fill(&shape, 8), DType::F64).require_grad();
            let output = match (fused, $residual) {
                (true, true) => block.forward_residual(x.clone(), shortcut.clone()),
                (true, false) => block.forward(x.clone()),
                (false, true) => relu(plain(x.clone()) + shortcut.clone()),
                (false, false) => relu(plain(x.clone())),
            };
            let upstream = tensor::<$rank>(fill(&shape, 9), DType::F64);
            let grads = (output.clone() * upstream).sum().backward();
            let gradient = |tensor: Tensor<1>| values(tensor.grad(&grads).unwrap());
            let mut results = vec![
                ("output", values(output)),
                ("input", values(x.grad(&grads).unwrap())),
                (
                    "weight",
                    values(block.conv.weight.val().grad(&grads).unwrap()),
                ),
                ("bias", gradient(block.conv.bias.as_ref().unwrap().val())),
                ("gamma", gradient(block.norm.gamma.val())),
                ("beta", gradient(block.norm.beta.val())),
                ("running mean", values(block.norm.running_mean.value_sync())),
                (
                    "running variance",
                    values(block.norm.running_var.value_sync()),
                ),
            ];
            if $residual {
                results.push(("residual", values(shortcut.grad(&grads).unwrap())));
            }
            results
        };
        for ((what, got), (_, wanted)) in step(true).iter().zip(&step(false)) {
            assert_close(&format!("{context}: {what}"), got, wanted, 1e-11, 1e-11);
        }
    }};
}

fn over_every_option(check: impl Fn(Recompute, Option<usize>, bool, bool)) {
    for recompute in [Recompute::Conv, Recompute::Norm, Recompute::Never] {
        for (residual, frozen) in [(false, false), (true, false), (false, true), (true, true)] {
            check(recompute, None, residual, frozen);
        }
    }
    check(Recompute::Conv, Some(1), true, false);
}

#[test]
fn one_dimension_is_burns() {
    over_every_option(|recompute, max_workspace, residual, frozen| {
        let config = |channels: [usize; 2], kernel| {
            ConvBn1dConfig::new(channels[0], channels[1], kernel)
                .with_bias(true)
                .with_activation(Activation::Relu)
                .with_recompute(recompute)
                .with_max_workspace(max_workspace)
        };
        compare!(
            ConvBn1d,
            3,
            config([3, 7], 3).init(&device()),
            [4usize, 3, 17],
            residual,
            frozen
        );
        compare!(
            ConvBn1d,
            3,
            config([5, 1], 4)
                .with_stride(3)
                .with_dilation(2)
                .with_padding(PaddingConfig1d::Explicit(2, 1))
                .init(&device()),
            [3usize, 5, 19],
            residual,
            frozen
        );
        compare!(
            ConvBn1d,
            3,
            config([2, 4], 1)
                .with_padding(PaddingConfig1d::Same)
                .init(&device()),
            [2usize, 2, 1],
            residual,
            frozen
        );
    });
}

#[test]
fn three_dimensions_are_burns() {
    over_every_option(|recompute, max_workspace, residual, frozen| {
        let config = |channels, kernel| {
            ConvBn3dConfig::new(channels, kernel)
                .with_bias(true)
                .with_activation(Activation::Relu)
                .with_recompute(recompute)
                .with_max_workspace(max_workspace)
        };
        compare!(
            ConvBn3d,
            5,
            config([2, 5], [3, 3, 3])
                .with_padding(PaddingConfig3d::Same)
                .init(&device()),
            [2usize, 2, 5, 4, 6],
            residual,
            frozen
        );
        compare!(
            ConvBn3d,
            5,
            config([4, 6], [2, 1, 3])
                .with_stride([2, 1, 3])
                .with_dilation([1, 2, 1])
                .with_groups(2)
                .with_padding(PaddingConfig3d::Explicit(1, 0, 2))
                .init(&device()),
            [3usize, 4, 6, 3, 7],
            residual,
            frozen
        );
    });
}

/// A convolution over one dimension is one over two, the first of size 1. Burn 0.22.1 has no gradient of a
/// grouped one, so that groups are compared with our layer in 2-D.
#[test]
fn grouped_one_dimension_is_two_with_a_unit() {
    let line = ConvBn1dConfig::new(4, 6, 3)
        .with_groups(2)
        .with_stride(2)
        .with_activation(Activation::Silu)
        .init(&device())
        .with_precision(FloatDType::F64);
    let mut plane = ConvBn2dConfig::new([4, 6], [1, 3])
        .with_groups(2)
        .with_stride([1, 2])
        .with_activation(Activation::Silu)
        .init(&device());
    let weight = line.conv.weight.val();
    plane.conv.weight = Param::from_tensor(weight.unsqueeze_dim(2).detach());
    // The norm's parameters stay single: the op in f64 wants them in f64.
    let double = |tensor: Tensor<1>| Param::from_tensor(tensor.cast(DType::F64).detach());
    let mut line = line;
    for norm in [&mut line.norm, &mut plane.norm] {
        norm.gamma = double(norm.gamma.val());
        norm.beta = double(norm.beta.val());
    }
    let x = tensor::<3>(random(&[3, 4, 11], 1), DType::F64).require_grad();
    let y = tensor::<4>(random(&[3, 4, 1, 11], 1), DType::F64).require_grad();
    let (a, b) = (line.forward(x.clone()), plane.forward(y.clone()));
    assert_close("output", &values(a.clone()), &values(b.clone()), 1e-12, 0.0);
    let (a, b) = (
        (a.clone() * a).sum().backward(),
        (b.clone() * b).sum().backward(),
    );
    let pairs = [
        (values(x.grad(&a).unwrap()), values(y.grad(&b).unwrap())),
        (
            values(line.conv.weight.val().grad(&a).unwrap()),
            values(plane.conv.weight.val().grad(&b).unwrap()),
        ),
    ];
    for (a, b) in pairs {
        assert_close("gradient", &a, &b, 1e-12, 1e-12);
    }
}

#[test]
fn what_is_saved_is_listed_in_every_rank() {
    let line = ConvBn1dConfig::new(3, 4, 3).init(&device());
    let saved = line.saved_for_backward([2, 3, 10]);
    assert_eq!(saved[0].bytes(), 4 * 2 * 3 * 10);
    let volume = ConvBn3dConfig::new([3, 4], [3, 3, 3])
        .with_activation(Activation::Relu)
        .init(&device());
    let saved = volume.saved_for_backward_residual([2, 3, 5, 5, 5]);
    let named = |name| saved.iter().find(|tensor| tensor.name == name);
    assert_eq!(named("input").unwrap().bytes(), 4 * 2 * 3 * 125);
    assert_eq!(named("output").unwrap().bytes(), 4 * 2 * 4 * 27);
    assert!(named("residual").is_none() && named("conv_output").is_none());
}
