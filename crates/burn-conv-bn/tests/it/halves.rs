//! The convolution alone and the norm alone: each gradient is there if its parent is tracked, and is the same
//! whatever else is.

use burn::tensor::{DType, Tensor};
use burn_conv_bn::functional::{BatchNormParams, batch_norm, conv};
use burn_conv_bn::{Activation, BatchNormOptions, ConvSpec, NormSpec};

use crate::common::{assert_close, random, tensor, values};

/// A tensor of its own that bit `bit` of `mask` tracks.
fn operand<const D: usize>(shape: [usize; D], bit: usize, mask: u32) -> Tensor<D> {
    let data = random(&shape, bit as u64);
    tensor(data, DType::F64).set_require_grad(mask >> bit & 1 == 1)
}

/// Gradients of three operands with every set of them tracked, against those with all.
fn check(what: &str, gradients: impl Fn(u32) -> [Option<Vec<f64>>; 3]) {
    let all = gradients(0b111);
    assert!(all.iter().all(Option::is_some), "{what}: {all:?}");
    for mask in 1..7 {
        for (bit, (got, all)) in gradients(mask).iter().zip(&all).enumerate() {
            let what = format!("{what}: operand {bit} of {mask:03b}");
            let is_tracked = mask >> bit & 1 == 1;
            assert_eq!(got.is_some(), is_tracked, "{what}");
            if let (Some(got), Some(all)) = (got, all) {
                assert_close(&what, got, all, 1e-12, 1e-12);
            }
        }
    }
}

#[test]
fn each_gradient_of_a_convolution_is_there_alone() {
    check("conv", |mask| {
        let x = operand([2, 3, 5, 5], 0, mask);
        let weight = operand([4, 3, 3, 3], 1, mask);
        let bias = operand([4], 2, mask);
        let output = conv(
            x.clone(),
            weight.clone(),
            Some(bias.clone()),
            ConvSpec::unit(2),
        );
        let output = output.unwrap();
        let upstream = tensor::<4>(random(&[2, 4, 3, 3], 5), DType::F64);
        let grads = (output * upstream).sum().backward();
        [
            x.grad(&grads).map(values),
            weight.grad(&grads).map(values),
            bias.grad(&grads).map(values),
        ]
    });
}

#[test]
fn each_gradient_of_a_norm_is_there_alone() {
    for activation in [Activation::Identity, Activation::Relu, Activation::Silu] {
        for given in [false, true] {
            check(&format!("{activation:?}, given {given}"), |mask| {
                let x = operand([2, 3, 5, 5], 0, mask);
                let (gamma, beta) = (operand([3], 1, mask), operand([3], 2, mask));
                let mut params =
                    BatchNormParams::default().with_affine(gamma.clone(), beta.clone());
                if given {
                    let variance = operand([3], 4, 0).abs() + 0.5;
                    params = params.with_statistics(operand([3], 3, 0), variance);
                }
                let options =
                    BatchNormOptions::new(NormSpec::default()).with_activation(activation);
                let output = batch_norm(x.clone(), params, options).unwrap().output;
                let upstream = tensor::<4>(random(&[2, 3, 5, 5], 5), DType::F64);
                let grads = (output * upstream).sum().backward();
                [
                    x.grad(&grads).map(values),
                    gamma.grad(&grads).map(values),
                    beta.grad(&grads).map(values),
                ]
            });
        }
    }
}
