//! Parity with Burn's own `Conv2d`, `BatchNorm` and `relu`: by the two-times rule of
//! flash-attention's tests, the error against f64 may be at most twice Burn's own, plus a small
//! absolute term.

use burn::module::{Param, RunningState};
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::nn::{BatchNorm, BatchNormConfig, PaddingConfig2d};
use burn::tensor::activation::relu;
use burn::tensor::{DType, Tensor};
use burn_conv_bn::{Activation, ConvBn2d, Recompute};

use crate::common::{device, distance, random, tensor, values};

/// One value per float of `f32`'s rounding at magnitude 1, times a few operations.
const ATOL: f64 = 2e-6;

#[derive(Debug)]
struct Shape {
    input: [usize; 4],
    channels_out: usize,
    kernel: [usize; 2],
    stride: [usize; 2],
    padding: PaddingConfig2d,
    dilation: [usize; 2],
    groups: usize,
}

/// Ugly on purpose: C = 1, 7, 65; 1x1 maps; odd strides, asymmetric padding, batch 1, groups.
fn shapes() -> Vec<Shape> {
    let shape = |input, channels_out, kernel, stride, padding, dilation, groups| Shape {
        input,
        channels_out,
        kernel,
        stride,
        padding,
        dilation,
        groups,
    };
    let valid = PaddingConfig2d::Valid;
    let same = PaddingConfig2d::Same;
    let asymmetric = PaddingConfig2d::Explicit(0, 1, 2, 1);
    vec![
        shape([4, 7, 9, 8], 65, [3, 3], [1, 1], same.clone(), [1, 1], 1),
        shape([1, 65, 5, 7], 7, [1, 1], [1, 1], valid.clone(), [1, 1], 1),
        shape([3, 1, 11, 13], 1, [5, 2], [3, 1], asymmetric, [1, 1], 1),
        shape([2, 6, 10, 10], 9, [3, 3], [2, 2], same.clone(), [1, 1], 3),
        shape([2, 8, 12, 12], 8, [3, 3], [1, 1], valid.clone(), [2, 3], 8),
        shape([5, 3, 3, 3], 4, [3, 3], [1, 1], valid, [1, 1], 1),
        shape([2, 4, 6, 6], 4, [2, 2], [1, 1], same, [1, 1], 1),
    ]
}

/// The same parameters in any dtype.
fn parts(shape: &Shape, dtype: DType, seed: u64) -> (Conv2d, BatchNorm) {
    let device = device();
    let mut conv = Conv2dConfig::new([shape.input[1], shape.channels_out], shape.kernel)
        .with_stride(shape.stride)
        .with_padding(shape.padding.clone())
        .with_dilation(shape.dilation)
        .with_groups(shape.groups)
        .with_bias(true)
        .init(&device);
    let mut norm = BatchNormConfig::new(shape.channels_out).init(&device);
    let weight = [
        shape.channels_out,
        shape.input[1] / shape.groups,
        shape.kernel[0],
        shape.kernel[1],
    ];
    let channels = [shape.channels_out];
    let vector = |seed| Param::from_tensor(tensor::<1>(random(&channels, seed), dtype));
    conv.weight = Param::from_tensor(tensor(random(&weight, seed), dtype));
    conv.bias = Some(vector(seed + 1));
    norm.gamma = vector(seed + 2);
    norm.beta = vector(seed + 3);
    norm.running_mean = RunningState::new(tensor(random(&channels, seed + 4), dtype));
    norm.running_var = RunningState::new(tensor::<1>(random(&channels, seed + 5), dtype) + 2.0);
    (conv, norm)
}

/// Named results of one step.
type Results = Vec<(&'static str, Vec<f64>)>;

fn step(
    shape: &Shape,
    dtype: DType,
    frozen: bool,
    run: impl Fn(Conv2d, BatchNorm, Tensor<4>) -> Tensor<4>,
) -> Results {
    let (conv, mut norm) = parts(shape, dtype, 100);
    if frozen {
        norm.training = Param::from_bool(false);
        assert!(!norm.training.is_enabled());
    }
    let input = tensor::<4>(random(&shape.input, 99), dtype).require_grad();
    // Modules share parameters and running statistics when cloned.
    let output = run(conv.clone(), norm.clone(), input.clone());
    let upstream = tensor::<4>(random(&output.dims(), 98), dtype);
    let grads = (output.clone() * upstream).sum().backward();
    vec![
        ("output", values(output)),
        ("input grad", values(input.grad(&grads).unwrap())),
        (
            "weight grad",
            values(conv.weight.val().grad(&grads).unwrap()),
        ),
        ("gamma grad", values(norm.gamma.val().grad(&grads).unwrap())),
        ("beta grad", values(norm.beta.val().grad(&grads).unwrap())),
        (
            "bias grad",
            values(conv.bias.as_ref().unwrap().val().grad(&grads).unwrap()),
        ),
        ("running mean", values(norm.running_mean.value_sync())),
        ("running variance", values(norm.running_var.value_sync())),
    ]
}

fn unfused(conv: Conv2d, norm: BatchNorm, input: Tensor<4>) -> Tensor<4> {
    relu(norm.forward(conv.forward(input)))
}

fn fused(recompute: Recompute) -> impl Fn(Conv2d, BatchNorm, Tensor<4>) -> Tensor<4> {
    move |conv, norm, input| {
        let mut block = ConvBn2d::from_parts(conv, norm, Activation::Relu);
        block.settings.recompute = recompute;
        block.forward(input)
    }
}

fn compare(frozen: bool) {
    for (index, shape) in shapes().iter().enumerate() {
        let exact = step(shape, DType::F64, frozen, unfused);
        let burn = step(shape, DType::F32, frozen, unfused);
        for recompute in [Recompute::Conv, Recompute::Norm, Recompute::Never] {
            let double = step(shape, DType::F64, frozen, fused(recompute));
            let single = step(shape, DType::F32, frozen, fused(recompute));
            for (((what, exact), (_, burn)), ((_, double), (_, single))) in
                exact.iter().zip(&burn).zip(double.iter().zip(&single))
            {
                let scale = exact.iter().fold(1.0f64, |max, value| max.max(value.abs()));
                let context = format!("shape {index}, {what}, {recompute:?}");
                let error = distance(double, exact);
                assert!(error <= 1e-11 * scale, "{context}: {error:e} apart in f64");
                // Zero here, rounding noise there.
                let noise = if *what == "bias grad" { 1e-4 } else { ATOL };
                let (ours, theirs) = (distance(single, exact), distance(burn, exact));
                assert!(
                    ours <= 2.0 * theirs + noise * scale,
                    "{context}: error {ours:e}, Burn's {theirs:e}"
                );
            }
        }
    }
}

#[test]
fn training_as_burn_does() {
    compare(false);
}

#[test]
fn frozen_as_burn_does() {
    compare(true);
}

/// The running statistics are the ones after one update, not two, whatever the backward pass
/// recomputes; and they are PyTorch's if asked for.
#[test]
fn running_statistics_are_updated_once() {
    use burn_conv_bn::RunningVariance;
    let shape = &shapes()[0];
    let (conv, norm) = parts(shape, DType::F64, 100);
    let mut block = ConvBn2d::from_parts(conv, norm, Activation::Relu);
    let before = values(block.norm.running_var.value_sync());
    let input = tensor::<4>(random(&shape.input, 99), DType::F64).require_grad();
    let batch = values(
        block
            .conv
            .forward(input.clone())
            .swap_dims(0, 1)
            .flatten::<2>(1, 3)
            .var_bias(1)
            .squeeze_dim::<1>(1),
    );
    let count = 4.0 * 9.0 * 8.0;
    for (variance, factor) in [
        (RunningVariance::Biased, 1.0),
        (RunningVariance::Unbiased, count / (count - 1.0)),
    ] {
        let start = values(block.norm.running_var.value_sync());
        block.settings.running_variance = variance;
        block.forward(input.clone()).sum().backward();
        let wanted: Vec<f64> = start
            .iter()
            .zip(&batch)
            .map(|(old, new)| 0.9 * old + 0.1 * factor * new)
            .collect();
        let got = values(block.norm.running_var.value_sync());
        assert!(distance(&got, &wanted) < 1e-12, "{variance:?}");
    }
    assert!(distance(&before, &values(block.norm.running_var.value_sync())) > 1e-3);
}

/// Recomputing gives the bits that keeping gives.
#[test]
fn recomputation_is_bit_equal() {
    // Images that do not fit a tile, and of one channel, which follow one another in memory.
    let mut shapes = shapes();
    for channels_out in [1, 5] {
        shapes.push(Shape {
            input: [3, 2, 40, 40],
            channels_out,
            kernel: [3, 3],
            stride: [1, 1],
            padding: PaddingConfig2d::Same,
            dilation: [1, 1],
            groups: 1,
        });
    }
    for shape in &shapes {
        let kept = step(shape, DType::F32, false, fused(Recompute::Never));
        let recomputed = step(shape, DType::F32, false, fused(Recompute::Conv));
        for ((what, kept), (_, recomputed)) in kept.iter().zip(&recomputed) {
            assert!(kept == recomputed, "{what} of {shape:?}");
        }
    }
}

/// Burn's gradient checkpointing may drop the input and recompute it.
#[test]
fn gradients_under_burns_checkpointing() {
    let run = |device: &burn::tensor::Device| {
        let leaf = |data, device| Tensor::<4>::from_data(data, (device, DType::F64)).require_grad();
        let input = leaf(random(&[2, 3, 6, 6], 1), device);
        let weight = leaf(random(&[4, 3, 3, 3], 2), device);
        // Memory-bound operations in front, which balanced checkpointing recomputes.
        let hidden = (input.clone() * input.clone()).tanh() + input.clone();
        let params = burn_conv_bn::functional::ConvBnParams::new(weight.clone() * weight.clone());
        let options = burn_conv_bn::ConvBnOptions::new(burn_conv_bn::ConvSpec::unit(2))
            .with_activation(Activation::Relu);
        let output = burn_conv_bn::functional::conv_bn(hidden, params, options)
            .unwrap()
            .output;
        let grads = (output.clone() * output).sum().backward();
        (
            values(input.grad(&grads).unwrap()),
            values(weight.grad(&grads).unwrap()),
        )
    };
    assert_eq!(run(&device()), run(&device().gradient_checkpointing()));
}
