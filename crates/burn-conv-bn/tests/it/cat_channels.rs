//! Concatenation along channels against Burn's: values and gradients are the same to the bit.

use burn::tensor::module::conv2d;
use burn::tensor::ops::ConvOptions;
use burn::tensor::{DType, Device, Tensor};
use burn_conv_bn::functional::{BatchNormParams, batch_norm, cat_channels, conv};
use burn_conv_bn::gradcheck::{GradCheck, Inputs, Upstream};
use burn_conv_bn::{Activation, BatchNormOptions, ConvBnError, ConvSpec, NormSpec};

use crate::common::{random, values};

/// With Burn's gradient checkpointing and without.
fn devices() -> [Device; 2] {
    let plain = Device::flex().autodiff();
    [plain, Device::flex().autodiff().gradient_checkpointing()]
}

/// Ours, or Burn's.
fn cat<const D: usize>(ours: bool, tensors: Vec<Tensor<D>>) -> Tensor<D> {
    if ours {
        cat_channels(tensors).unwrap()
    } else {
        Tensor::cat(tensors, 1)
    }
}

/// What a concatenated tensor is.
#[derive(Clone, Copy, Debug)]
enum Kind {
    WithoutAutodiff,
    Untracked,
    Leaf,
    Computed,
}

const KINDS: [Kind; 4] = [
    Kind::WithoutAutodiff,
    Kind::Untracked,
    Kind::Leaf,
    Kind::Computed,
];

/// Output of a product with itself, which asks for the concatenation, and gradients of the leaves.
fn product<const D: usize>(
    ours: bool,
    shapes: &[[usize; D]],
    kinds: [Kind; 3],
    (device, dtype): (&Device, DType),
) -> Vec<Option<Vec<f64>>> {
    let mut leaves = Vec::new();
    let mut tensors = Vec::new();
    for (seed, (shape, kind)) in shapes.iter().zip(kinds).enumerate() {
        let data = random(shape, seed as u64);
        let tensor = Tensor::<D>::from_data(data.clone(), (device, dtype));
        tensors.push(match kind {
            Kind::WithoutAutodiff => Tensor::from_data(data, (&Device::flex(), dtype)),
            Kind::Untracked => tensor,
            Kind::Leaf | Kind::Computed => {
                let leaf = tensor.require_grad();
                leaves.push(leaf.clone());
                match kind {
                    Kind::Leaf => leaf,
                    _ => leaf.clone() * leaf,
                }
            }
        });
    }
    let both = cat(ours, tensors);
    let product = both.clone() * both;
    let mut results = vec![Some(values(product.clone()))];
    if !leaves.is_empty() {
        let upstream = Tensor::from_data(random(&product.dims(), 9), (device, dtype));
        let grads = (product * upstream).sum().backward();
        results.extend(leaves.iter().map(|leaf| leaf.grad(&grads).map(values)));
    }
    results
}

fn check_kinds<const D: usize>(shapes: [[usize; D]; 3], dtype: DType) {
    for device in devices() {
        for first in KINDS {
            for second in KINDS {
                for third in KINDS {
                    let kinds = [first, second, third];
                    let [got, wanted] =
                        [true, false].map(|ours| product(ours, &shapes, kinds, (&device, dtype)));
                    assert_eq!(got, wanted, "{kinds:?}, {dtype:?}, rank {D}");
                }
            }
        }
    }
}

#[test]
fn results_are_burns_for_every_kind_of_tensor() {
    for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
        check_kinds([[2, 3, 4, 5], [2, 1, 4, 5], [2, 4, 4, 5]], dtype);
    }
    check_kinds([[2, 3], [2, 1], [2, 4]], DType::F64);
    check_kinds([[2, 3, 4], [2, 1, 4], [2, 4, 4]], DType::F64);
    check_kinds(
        [[2, 3, 1, 2, 2], [2, 1, 1, 2, 2], [2, 4, 1, 2, 2]],
        DType::F64,
    );
}

fn leaf<const D: usize>(shape: [usize; D], seed: u64, device: &Device) -> Tensor<D> {
    Tensor::from_data(random(&shape, seed), (device, DType::F64)).require_grad()
}

/// Three layers of a dense network, each a norm and a convolution over all outputs before it.
fn dense(ours: bool, device: &Device) -> Vec<Option<Vec<f64>>> {
    let x = leaf([2, 3, 4, 5], 1, device);
    let mut features = vec![x.clone()];
    let mut leaves = vec![x];
    let options = BatchNormOptions::new(NormSpec::default()).with_activation(Activation::Silu);
    for layer in 0..3 {
        let both = cat(ours, features.clone());
        let weight = leaf([2, both.dims()[1], 3, 3], 2 + layer, device);
        let y = batch_norm(both, BatchNormParams::default(), options).unwrap();
        let same = ConvOptions::new([1, 1], [1, 1], [1, 1], 1);
        features.push(if layer == 1 {
            conv2d(y.output, weight.clone(), None, same)
        } else {
            conv(y.output, weight.clone(), None, same).unwrap()
        });
        leaves.push(weight);
    }
    let both = cat(ours, features);
    let grads = (both.clone() * both.clone()).sum().backward();
    let own = [Some(values(both))].into_iter();
    own.chain(leaves.iter().map(|leaf| leaf.grad(&grads).map(values)))
        .collect()
}

#[test]
fn a_dense_network_has_the_gradients_of_burns_concatenation() {
    for device in devices() {
        assert_eq!(dense(true, &device), dense(false, &device));
    }
}

#[test]
fn gradients_are_right_before_a_norm_and_a_convolution() {
    let options = BatchNormOptions::new(NormSpec::default()).with_activation(Activation::Gelu);
    GradCheck::new(&Device::flex())
        .input("x", random(&[2, 2, 3, 3], 1))
        .input("y", random(&[2, 1, 3, 3], 2))
        .input("weight", random(&[2, 5, 3, 3], 3))
        .upstream(Upstream::Random(4))
        .tolerance(1e-6, 1e-5)
        .check(|inputs: &Inputs| {
            let (x, y) = (inputs.get::<4>("x"), inputs.get::<4>("y"));
            let both = cat_channels(vec![x.clone(), y, x]).unwrap();
            let both = batch_norm(both, BatchNormParams::default(), options).unwrap();
            conv(both.output, inputs.get("weight"), None, ConvSpec::unit(2)).unwrap()
        })
        .unwrap_or_else(|error| panic!("{error}"));
}

/// One tensor several times, and more tensors than a node has room for.
#[test]
fn any_number_of_tensors() {
    for device in devices() {
        for count in [1, 2, 63, 64, 65, 128, 130, 4097] {
            let run = |ours: bool| {
                let x = leaf([2, 1, 2, 2], 1, &device);
                let others = (0..count).map(|index| x.clone() * (index % 7) as f64);
                let tensors: Vec<_> = [x.clone()].into_iter().chain(others).collect();
                let both = cat(ours, tensors);
                let grads = (both.clone() * both.clone()).sum().backward();
                (values(both), x.grad(&grads).map(values))
            };
            let (got, wanted) = (run(true), run(false));
            assert_eq!(got.0, wanted.0, "{count}");
            // The order of the sum of so many gradients is another.
            let pairs = got.1.iter().flatten().zip(wanted.1.iter().flatten());
            for (got, wanted) in pairs {
                assert!((got - wanted).abs() <= 1e-9 * wanted.abs(), "{count}");
            }
        }
    }
}

#[test]
fn a_detached_concatenation_is_an_ordinary_tensor() {
    for device in devices() {
        let x = leaf([2, 1, 2, 2], 1, &device);
        let w = leaf([2, 2, 2, 2], 2, &device);
        let both = cat_channels(vec![x.clone(), x.clone()]).unwrap().detach();
        let grads = (both.clone() * w.clone()).sum().backward();
        assert_eq!(w.grad(&grads).map(values), Some(values(both)));
        assert!(x.grad(&grads).is_none());
    }
}

#[test]
fn empty_ones_add_nothing() {
    let device = &devices()[0];
    let x = leaf([2, 3, 2, 2], 1, device);
    let none = Tensor::<4>::from_data(random(&[2, 0, 2, 2], 2), (device, DType::F64));
    let same = cat_channels(vec![none.clone(), x.clone(), none.clone()]).unwrap();
    assert_eq!(values(same), values(x));
    let empty = cat_channels(vec![none.clone(), none]).unwrap();
    assert_eq!(empty.dims(), [2, 0, 2, 2]);
}

#[test]
fn what_does_not_fit_is_named() {
    let zeros = |shape: [usize; 4]| Tensor::<4>::zeros(shape, &Device::flex());
    let message = |tensors: Vec<Tensor<4>>| cat_channels(tensors).unwrap_err().to_string();
    let x = zeros([2, 3, 4, 4]);
    assert!(message(Vec::new()).contains("number of tensors to concatenate must be positive"));
    let wide = message(vec![x.clone(), zeros([2, 7, 4, 5])]);
    assert!(
        wide.contains("expected shape [2, 7, 4, 4], got [2, 7, 4, 5]"),
        "{wide}"
    );
    let half = message(vec![x.clone(), x.cast(DType::F16)]);
    assert!(half.contains("cast concatenated tensor to F32"), "{half}");
    let line = cat_channels(vec![Tensor::<1>::zeros([3], &Device::flex())]);
    assert!(matches!(
        line,
        Err(ConvBnError::Rank {
            expected: 2,
            got: 1,
            ..
        })
    ));
}
