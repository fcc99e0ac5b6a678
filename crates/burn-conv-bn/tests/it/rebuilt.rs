//! `Recompute::Norm`, and the norm alone: the output is rebuilt for whatever asks for it, and nothing that is
//! computed depends on that. The wanted values are those of `Recompute::Never`.

use burn::module::{Module, Param};
use burn::nn::PaddingConfig2d;
use burn::tensor::activation::relu;
use burn::tensor::module::{conv2d, linear, max_pool2d};
use burn::tensor::ops::{ConvOptions, MaxPoolOptions};
use burn::tensor::{DType, Device, Gradients, Tensor};
use burn_conv_bn::functional::{BatchNormParams, ConvBnParams, batch_norm, conv, conv_bn};
use burn_conv_bn::gradcheck::{GradCheck, Inputs, Upstream};
use burn_conv_bn::{
    Activation, BatchNormOptions, ConvBn2d, ConvBn2dConfig, ConvBnOptions, ConvSpec,
    MaxPool2dConfig, NormSpec, Recompute,
};

use crate::common::{assert_close, random, values};

const CHANNELS: usize = 4;
const INPUT: [usize; 4] = [2, CHANNELS, 6, 5];

fn devices() -> [Device; 2] {
    let plain = Device::flex().autodiff();
    [plain, Device::flex().autodiff().gradient_checkpointing()]
}

fn leaf<const D: usize>(shape: [usize; D], seed: u64, device: &Device) -> Tensor<D> {
    Tensor::from_data(random(&shape, seed), (device, DType::F64)).require_grad()
}

/// A block with a bias and parameters from that seed.
fn block(
    activation: Activation,
    recompute: Recompute,
    seed: u64,
    dtype: DType,
    device: &Device,
) -> ConvBn2d {
    let mut block = ConvBn2dConfig::new([CHANNELS; 2], [3, 3])
        .with_padding(PaddingConfig2d::Same)
        .with_bias(true)
        .with_activation(activation)
        .with_recompute(recompute)
        .init(device);
    let norm_dtype = match dtype {
        DType::F64 => DType::F64,
        _ => DType::F32,
    };
    let weight = random(&[CHANNELS, CHANNELS, 3, 3], seed);
    block.conv.weight = Param::from_tensor(Tensor::from_data(weight, (device, dtype)));
    let channel = |seed, dtype| {
        let data = random(&[CHANNELS], seed);
        Param::from_tensor(Tensor::<1>::from_data(data, (device, dtype)))
    };
    block.conv.bias = Some(channel(seed + 1, dtype));
    block.norm.gamma = channel(seed + 2, norm_dtype);
    block.norm.beta = channel(seed + 3, norm_dtype);
    block
}

fn gradients(block: &ConvBn2d, grads: &Gradients) -> Vec<Option<Vec<f64>>> {
    let bias = block.conv.bias.as_ref().expect("it has one");
    vec![
        block.conv.weight.val().grad(grads).map(values),
        bias.val().grad(grads).map(values),
        block.norm.gamma.val().grad(grads).map(values),
        block.norm.beta.val().grad(grads).map(values),
    ]
}

/// What uses a block's output `y`, with a weight `w` of its own.
type Consumer = fn(Tensor<4>, Tensor<4>) -> Tensor<4>;

fn same(y: Tensor<4>, w: Tensor<4>) -> Tensor<4> {
    conv2d(y, w, None, ConvOptions::new([1, 1], [1, 1], [1, 1], 1))
}

const CONSUMERS: [(&str, Consumer); 12] = [
    ("nothing that asks", |y, _| y * 2.0),
    ("Burn's convolution", same),
    ("a strided convolution, which misses pixels", |y, w| {
        let one = w.slice([0..CHANNELS, 0..CHANNELS, 1..2, 1..2]);
        conv2d(y, one, None, ConvOptions::new([2, 2], [0, 0], [1, 1], 1))
    }),
    ("our convolution", |y, w| {
        conv(y, w, None, ConvSpec::unit(2)).unwrap()
    }),
    ("Burn's linear layer", |y, w| {
        let rows: Tensor<2> = y.permute([0, 2, 3, 1]).flatten::<2>(0, 2);
        let w: Tensor<2> = w
            .slice([0..CHANNELS, 0..CHANNELS, 0..1, 0..1])
            .flatten::<2>(1, 3);
        linear(rows, w, None).reshape([2, CHANNELS, 6, 5])
    }),
    ("Burn's activation and max pool", |y, _| {
        max_pool2d(relu(y - 0.1), MaxPoolOptions::new([2, 2]))
    }),
    ("our max pool", |y, _| {
        MaxPool2dConfig::new([2, 2]).init().forward(y)
    }),
    ("itself", |y, _| y.clone() * y),
    ("two convolutions", |y, w| {
        same(y.clone(), w.clone()) + same(y, w * 0.5)
    }),
    ("a concatenation", |y, w| {
        let both = Tensor::cat(vec![y.clone(), y], 1);
        same(both.narrow(1, 2, CHANNELS), w)
    }),
    ("our norm", |y, w| {
        let options = BatchNormOptions::new(NormSpec::default()).with_activation(Activation::Gelu);
        let y = batch_norm(y, BatchNormParams::default(), options).unwrap();
        same(y.output, w)
    }),
    ("a detached copy as well", |y, w| {
        same(y.clone().detach(), w.clone()) + same(y, w)
    }),
];

/// Output, gradients of input and consumer, and those of two blocks in a chain.
fn step(
    recompute: Recompute,
    activation: Activation,
    consumer: Consumer,
    device: &Device,
) -> Vec<Option<Vec<f64>>> {
    let first = block(activation, recompute, 10, DType::F64, device);
    let second = block(activation, recompute, 20, DType::F64, device);
    let x = leaf(INPUT, 1, device);
    let w = leaf([CHANNELS, CHANNELS, 3, 3], 2, device);
    let y = consumer(second.forward(first.forward(x.clone())), w.clone());
    let upstream = Tensor::from_data(random(&y.dims(), 3), (device, DType::F64));
    let grads = (y.clone() * upstream).sum().backward();
    let own = [
        Some(values(y)),
        x.grad(&grads).map(values),
        w.grad(&grads).map(values),
    ];
    let blocks = [&first, &second].map(|block| gradients(block, &grads));
    own.into_iter()
        .chain(blocks.into_iter().flatten())
        .collect()
}

#[track_caller]
fn assert_same(what: &str, got: &[Option<Vec<f64>>], wanted: &[Option<Vec<f64>>]) {
    assert_eq!(got.len(), wanted.len());
    for (index, (got, wanted)) in got.iter().zip(wanted).enumerate() {
        let what = format!("{what}, result {index}");
        match (got, wanted) {
            (Some(got), Some(wanted)) => assert_close(&what, got, wanted, 1e-10, 1e-12),
            _ => assert_eq!(got.is_some(), wanted.is_some(), "{what}"),
        }
    }
}

/// Any consumer, any number of them, with Burn's gradient checkpointing and without.
#[test]
fn whatever_asks_for_the_output_gets_it() {
    for device in devices() {
        for activation in [Activation::Identity, Activation::Relu, Activation::Silu] {
            for (name, consumer) in CONSUMERS {
                let [got, wanted] = [Recompute::Norm, Recompute::Never]
                    .map(|recompute| step(recompute, activation, consumer, &device));
                let what = format!("{name}, {activation:?}");
                assert_eq!(got[0], wanted[0], "{what}: the output");
                assert_same(&what, &got, &wanted);
            }
        }
    }
}

/// Which operands are tracked decides from where the output is rebuilt; with none it is kept.
#[test]
fn the_output_is_rebuilt_from_tracked_and_untracked_operands() {
    let run = |recompute: Recompute, mask: u32, device: &Device| {
        let of = |bit: u32, tensor: Tensor<4>| match mask >> bit & 1 {
            1 => tensor,
            _ => tensor.detach().set_require_grad(false),
        };
        let channel = |bit: u32, seed| match mask >> bit & 1 {
            1 => leaf([CHANNELS], seed, device),
            _ => leaf([CHANNELS], seed, device).set_require_grad(false),
        };
        let x = of(0, leaf(INPUT, 1, device));
        let weight = of(1, leaf([CHANNELS, CHANNELS, 3, 3], 2, device));
        let (bias, gamma, beta) = (channel(2, 3), channel(3, 4), channel(4, 5));
        let head = leaf([CHANNELS, CHANNELS, 3, 3], 6, device);
        let params = ConvBnParams::new(weight.clone())
            .with_bias(bias.clone())
            .with_affine(gamma.clone(), beta.clone());
        let options = ConvBnOptions::new(ConvSpec::unit(2))
            .with_activation(Activation::Silu)
            .with_recompute(recompute);
        let normalized = conv_bn(x.clone(), params, options).unwrap();
        let y = same(normalized.output, head.clone());
        let grads = (y.clone() * y.clone()).sum().backward();
        [
            Some(values(y)),
            Some(values(normalized.mean)),
            x.grad(&grads).map(values),
            weight.grad(&grads).map(values),
            head.grad(&grads).map(values),
            bias.grad(&grads).map(values),
            gamma.grad(&grads).map(values),
            beta.grad(&grads).map(values),
        ]
    };
    for device in devices() {
        for mask in 0..32 {
            let got = run(Recompute::Norm, mask, &device);
            let wanted = run(Recompute::Never, mask, &device);
            assert_same(&format!("operands {mask:05b}"), &got, &wanted);
        }
    }
}

/// With a residual, with a max pool behind, under frozen norms and in evaluation it is `Never`, to the bit.
#[test]
fn elsewhere_it_is_never() {
    let pool = MaxPool2dConfig::new([2, 2]).init();
    let run = |recompute: Recompute, how: usize, dtype: DType| {
        let device = &devices()[0];
        let mut block = block(Activation::Relu, recompute, 10, dtype, device);
        let x = Tensor::<4>::from_data(random(&INPUT, 1), (device, dtype)).require_grad();
        let y = match how {
            0 => block.forward_residual(x.clone(), x.clone()),
            1 => block.forward_max_pool(x.clone(), &pool),
            2 => {
                block.norm = block.norm.freeze();
                block.forward(x.clone())
            }
            _ => {
                let block = block.valid();
                let x = Tensor::<4>::from_data(random(&INPUT, 1), (&Device::flex(), dtype));
                return vec![Some(values(block.forward(x)))];
            }
        };
        let grads = (y.clone() * y.clone()).sum().backward();
        let own = [Some(values(y)), x.grad(&grads).map(values)];
        own.into_iter().chain(gradients(&block, &grads)).collect()
    };
    for dtype in [DType::F32, DType::BF16] {
        for how in 0..4 {
            let [norm, never] =
                [Recompute::Norm, Recompute::Never].map(|recompute| run(recompute, how, dtype));
            assert_eq!(norm, never, "{how}, {dtype:?}");
        }
    }
}

/// A detached output is an ordinary tensor: what is behind it is trained, and the block is not.
#[test]
fn a_detached_output_is_an_ordinary_tensor() {
    for device in devices() {
        let block = block(Activation::Relu, Recompute::Norm, 10, DType::F64, &device);
        let w = leaf([CHANNELS, CHANNELS, 3, 3], 2, &device);
        let y = block.forward(leaf(INPUT, 1, &device));
        let grads = same(y.clone().detach(), w.clone()).sum().backward();
        let wanted = leaf([CHANNELS, CHANNELS, 3, 3], 2, &device);
        let plain = Tensor::<4>::from_data(y.into_data(), (&device, DType::F64));
        let of_plain = same(plain, wanted.clone()).sum().backward();
        assert_eq!(
            w.grad(&grads).map(values),
            wanted.grad(&of_plain).map(values)
        );
        assert!(block.conv.weight.val().grad(&grads).is_none());
    }
}

/// An untracked backbone in training mode, before a tracked head.
#[test]
fn an_untracked_backbone_keeps_its_output() {
    for device in devices() {
        let run = |recompute| {
            let block = block(Activation::Relu, recompute, 10, DType::F64, &device).no_grad();
            let w = leaf([CHANNELS, CHANNELS, 3, 3], 2, &device);
            let x = Tensor::<4>::from_data(random(&INPUT, 1), (&device, DType::F64));
            let alone = BatchNormOptions::new(NormSpec::default());
            let x = batch_norm(x, BatchNormParams::default(), alone).unwrap();
            let y = block.forward(x.output);
            assert!(!y.is_tracked());
            let grads = same(y, w.clone()).sum().backward();
            w.grad(&grads).map(values)
        };
        assert_eq!(run(Recompute::Norm), run(Recompute::Never));
    }
}

/// The other types: results are those of `Never` up to the rounding of the convolution's output gradient,
/// which `Never` has no tensor of.
#[test]
fn every_type_is_rebuilt() {
    let device = &devices()[0];
    for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::F16, 1e-2), (DType::BF16, 8e-2)] {
        let run = |recompute| {
            let blocks =
                [10, 20].map(|seed| block(Activation::Relu, recompute, seed, dtype, device));
            let x = Tensor::<4>::from_data(random(&INPUT, 1), (device, dtype)).require_grad();
            let y = blocks[1].forward(blocks[0].forward(x.clone()));
            let upstream = Tensor::<4>::from_data(random(&INPUT, 3), (device, dtype));
            let grads = (y.clone() * upstream).sum().backward();
            let own = [Some(values(y)), x.grad(&grads).map(values)];
            let all = own.into_iter();
            all.chain(blocks.iter().flat_map(|block| gradients(block, &grads)))
                .map(Option::unwrap)
                .collect::<Vec<_>>()
        };
        let (got, wanted) = (run(Recompute::Norm), run(Recompute::Never));
        assert_eq!(got[0], wanted[0], "{dtype:?}: the output");
        for (index, (got, wanted)) in got.iter().zip(&wanted).enumerate() {
            let what = format!("{dtype:?}, result {index}");
            assert_close(&what, got, wanted, tolerance, 1e-6);
        }
    }
}

/// Behind and before convolutions, ours and Burn's, in pre-activation order, with batch and given statistics.
#[test]
fn norms_between_convolutions() {
    let run = |ours: bool, given: bool, activation: Activation| {
        let weight = [CHANNELS, CHANNELS, 3, 3];
        let same = move |x: Tensor<4>, w: Tensor<4>| {
            let options = ConvOptions::new([1, 1], [1, 1], [1, 1], 1);
            if ours {
                conv(x, w, None, options).unwrap()
            } else {
                conv2d(x, w, None, options)
            }
        };
        let check = GradCheck::new(&Device::flex())
            .input("x", random(&[2, CHANNELS, 3, 3], 1))
            .input("first", random(&weight, 2))
            .input("second", random(&weight, 3))
            .input("gamma", random(&[CHANNELS], 4))
            .input("beta", random(&[CHANNELS], 5))
            .upstream(Upstream::Random(6))
            .tolerance(1e-6, 1e-5);
        let options = BatchNormOptions::new(NormSpec::default()).with_activation(activation);
        check
            .check(|inputs: &Inputs| {
                let params = || {
                    let affine = BatchNormParams::default()
                        .with_affine(inputs.get("gamma"), inputs.get("beta"));
                    if given {
                        let one =
                            Tensor::ones([CHANNELS], (&inputs.get::<4>("x").device(), DType::F64));
                        affine.with_statistics(one.clone() * 0.1, one * 0.7)
                    } else {
                        affine
                    }
                };
                let x = batch_norm(inputs.get::<4>("x"), params(), options).unwrap();
                let z = same(x.output, inputs.get("first"));
                let y = batch_norm(z, params(), options).unwrap();
                same(y.output, inputs.get("second"))
            })
            .unwrap_or_else(|error| panic!("ours {ours}, given {given}, {activation:?}: {error}"));
    };
    for activation in [Activation::Relu, Activation::Gelu] {
        for (ours, given) in [(false, false), (false, true), (true, false), (true, true)] {
            run(ours, given, activation);
        }
    }
}

/// A closed activation passes nothing, whatever its gradient.
#[test]
fn closed_relus_pass_nothing() {
    let device = &devices()[0];
    for given in [false, true] {
        let run = |at_closed: f64| {
            let x = leaf(INPUT, 1, device);
            let mut params = BatchNormParams::default();
            if given {
                let one = Tensor::<1>::ones([CHANNELS], (device, DType::F64));
                params = params.with_statistics(one.clone() * 0.1, one);
            }
            let options =
                BatchNormOptions::new(NormSpec::default()).with_activation(Activation::Relu);
            let y = batch_norm(x.clone(), params, options).unwrap().output;
            let outputs = values(y.clone());
            let upstream: Vec<f64> = random(&INPUT, 3)
                .iter::<f64>()
                .zip(outputs)
                .map(|(dy, y)| if y == 0.0 { at_closed } else { dy })
                .collect();
            let upstream = burn::tensor::TensorData::new(upstream, INPUT);
            let grads = (y * Tensor::from_data(upstream, (device, DType::F64))).sum();
            values(x.grad(&grads.backward()).unwrap())
        };
        let wanted = run(0.0);
        assert_eq!(run(f64::INFINITY), wanted, "given {given}");
        assert_eq!(run(f64::NAN), wanted, "given {given}");
    }
}

/// No recursion is as deep as the graph, in forward, backward, or where it is dropped.
#[test]
fn deep_chains_fit_a_small_stack() {
    const BLOCKS: usize = 2000;
    let run = || {
        let device = &devices()[0];
        let x = leaf([2, 1, 2, 2], 1, device);
        let weight = leaf([1, 1, 1, 1], 2, device);
        let options = ConvBnOptions::new(ConvSpec::unit(2)).with_recompute(Recompute::Norm);
        let forward = || {
            (0..BLOCKS).fold(x.clone(), |x, _| {
                let params = ConvBnParams::new(weight.clone());
                conv_bn(x, params, options.clone()).unwrap().output
            })
        };
        drop(forward());
        let y = forward();
        let grads = (y.clone() * y).sum().backward();
        values(weight.grad(&grads).unwrap())[0]
    };
    let thread = std::thread::Builder::new().stack_size(512 << 10);
    let grad = thread.spawn(run).unwrap().join().unwrap();
    assert!(grad.is_finite(), "{grad}");
}
