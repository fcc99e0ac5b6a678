//! Arguments that do not fit, and the messages that say so.

use std::cell::RefCell;
use std::panic::{self, AssertUnwindSafe, catch_unwind};
use std::sync::Once;

use burn::module::Module;
use burn::nn::{BatchNormConfig, PaddingConfig2d};
use burn::tensor::ops::MaxPoolOptions;
use burn::tensor::{DType, Device, Shape, Tensor};
use burn_conv_bn::functional::{
    BatchNormParams, ConvBnParams, batch_norm, conv, conv_bn, conv_bn_max_pool2d, max_pool2d,
};
use burn_conv_bn::{
    Activation, BatchNormOptions, ConvBn1dConfig, ConvBn2d, ConvBn2dConfig, ConvBn3dConfig,
    ConvBnError, ConvBnOptions, ConvSpec, MaxPool2dConfig, NormSpec, NormVariant, fuse,
};

use crate::common::panic_message;

fn zeros<const D: usize>(shape: [usize; D]) -> Tensor<D> {
    Tensor::zeros(shape, &Device::flex())
}

fn spec(stride: usize, padding: (usize, usize), dilation: usize, groups: usize) -> ConvSpec {
    ConvSpec {
        stride: vec![stride; 2],
        padding: vec![padding; 2],
        dilation: vec![dilation; 2],
        groups,
    }
}

#[test]
fn messages_name_what_was_seen_and_wanted() {
    let unit = || ConvSpec::unit(2);
    let conv =
        |input, weight, spec| conv(zeros::<4>(input), zeros(weight), None, spec).unwrap_err();
    let x = [2, 3, 8, 8];
    let w = [4, 3, 3, 3];
    let fused = |params, options| conv_bn(zeros::<4>(x), params, options).unwrap_err();
    let params = || ConvBnParams::new(zeros(w));
    let options = || ConvBnOptions::new(unit());
    let epsilon = |value| options().with_norm(NormSpec::new(NormVariant::BatchNorm, value));
    let cases: Vec<(ConvBnError, &[&str])> = vec![
        (
            conv(x, [4, 2, 3, 3], unit()),
            &["expected 2 channels", "got 3", "[4, 2, 3, 3]"],
        ),
        (
            conv([2, 4, 8, 8], [3, 2, 3, 3], spec(1, (0, 0), 1, 2)),
            &["3 output channels", "2 groups"],
        ),
        (
            conv(x, [4, 3, 9, 3], unit()),
            &["extent 9", "padded input's 8", "dimension 0"],
        ),
        (conv(x, w, spec(1, (0, 0), 4, 1)), &["extent 9"]),
        (
            conv(x, w, spec(0, (0, 0), 1, 1)),
            &["stride must be positive", "[0, 0]"],
        ),
        (
            conv(x, w, spec(1, (0, 0), 0, 1)),
            &["dilation must be positive"],
        ),
        (
            conv(x, w, spec(1, (0, 0), 1, 0)),
            &["groups must be positive"],
        ),
        (
            conv([2, 3, 0, 8], w, unit()),
            &["input size must be positive", "[2, 3, 0, 8]"],
        ),
        (
            conv(x, [0, 3, 3, 3], unit()),
            &["weight size must be positive"],
        ),
        (
            conv(x, w, ConvSpec::unit(1)),
            &["stride: expected 2 dimensions", "got 1"],
        ),
        (
            fused(params().with_bias(zeros([3])), options()),
            &["bias: expected shape [4]", "got [3]"],
        ),
        (
            fused(params().with_affine(zeros([4]), zeros([5])), options()),
            &["beta: expected shape [4]", "got [5]"],
        ),
        (
            fused(params().with_residual(zeros([2, 4, 6, 5])), options()),
            &["residual: expected shape [2, 4, 6, 6]", "got [2, 4, 6, 5]"],
        ),
        (
            fused(params().with_statistics(zeros([4]), zeros([1])), options()),
            &["variance: expected shape [4]"],
        ),
        (
            fused(params(), epsilon(0.0)),
            &["epsilon must be finite and positive, got 0"],
        ),
        (fused(params(), epsilon(f64::NAN)), &["got NaN"]),
        (
            fused(
                params(),
                options().with_activation(Activation::Softplus { beta: 0.0 }),
            ),
            &["softplus: beta must be finite and not 0, got 0"],
        ),
        (
            batch_norm(
                zeros(x),
                BatchNormParams::default(),
                BatchNormOptions::new(NormSpec::default())
                    .with_activation(Activation::Softplus { beta: f64::NAN }),
            )
            .unwrap_err(),
            &["softplus: beta", "got NaN"],
        ),
        (
            fused(ConvBnParams::new(zeros(w).cast(DType::F64)), options()),
            &[
                "input is F32, weight is F64",
                "input.cast(DType::F64)",
                "the weight to F32",
                "with_precision(FloatDType::F32)",
            ],
        ),
        (
            fused(
                params().with_affine(zeros([4]).cast(DType::F64), zeros([4])),
                options(),
            ),
            &["input is F32, gamma is F64: cast gamma to F32"],
        ),
        (
            fused(
                ConvBnParams::new(zeros(w).cast(DType::F16))
                    .with_affine(zeros([4]).cast(DType::F64), zeros([4])),
                options(),
            ),
            &["input is F32, weight is F16"],
        ),
        (
            conv_bn(zeros::<4>([1, 3, 3, 3]), params(), options()).unwrap_err(),
            &[
                "more than one value per channel",
                "[1, 3, 3, 3]",
                "[1, 4, 1, 1]",
            ],
        ),
        (
            conv_bn(zeros::<4>([0, 3, 8, 8]), params(), options()).unwrap_err(),
            &["an empty batch", "[0, 3, 8, 8]", "given statistics"],
        ),
        (
            batch_norm(
                zeros([0, 3]),
                BatchNormParams::default(),
                NormSpec::default(),
            )
            .unwrap_err(),
            &["an empty batch", "[0, 3]"],
        ),
        (
            batch_norm(
                zeros([1, 3]),
                BatchNormParams::default(),
                NormSpec::default(),
            )
            .unwrap_err(),
            &["more than one value per channel"],
        ),
        (
            batch_norm(zeros([3]), BatchNormParams::default(), NormSpec::default()).unwrap_err(),
            &["batch norm's input", "expected 2"],
        ),
        (
            burn_conv_bn::functional::conv(zeros([2, 3]), zeros([2, 3]), None, ConvSpec::unit(0))
                .unwrap_err(),
            &["rank 3, 4 or 5", "[2, 3]"],
        ),
    ];
    for (error, parts) in cases {
        let message = error.to_string();
        for part in parts {
            assert!(message.contains(part), "{part:?} in {message:?}");
        }
    }
}

#[test]
fn one_value_per_channel_is_fine_with_given_statistics() {
    let params = ConvBnParams::new(zeros([4, 3, 3, 3]))
        .with_statistics(zeros([4]), Tensor::ones([4], &Device::flex()));
    let options = ConvBnOptions::new(ConvSpec::unit(2));
    let output = conv_bn(zeros::<4>([1, 3, 3, 3]), params, options)
        .unwrap()
        .output;
    assert_eq!(output.shape(), Shape::new([1, 4, 1, 1]));
}

#[test]
fn an_empty_batch_is_fine_with_given_statistics() {
    let ones = || Tensor::<1>::ones([4], &Device::flex());
    let params = || {
        ConvBnParams::new(zeros([4, 3, 3, 3]).cast(DType::F16)).with_statistics(zeros([4]), ones())
    };
    let input = || zeros::<4>([0, 3, 8, 8]).cast(DType::F16);
    let options = || ConvBnOptions::new(ConvSpec::unit(2));
    let result = conv_bn(input(), params(), options()).unwrap();
    assert_eq!(result.output.shape(), Shape::new([0, 4, 6, 6]));
    assert_eq!(result.output.dtype(), DType::F16);
    assert_eq!(
        (result.mean.dtype(), result.variance.dtype()),
        (DType::F32, DType::F32)
    );
    let variance = result.variance.into_data();
    assert!(variance.iter::<f32>().eq([1.0; 4]));

    let pool = MaxPoolOptions::new([2, 2]);
    let pooled = conv_bn_max_pool2d(input(), params(), options(), pool.clone()).unwrap();
    assert_eq!(pooled.output.shape(), Shape::new([0, 4, 3, 3]));
    let weight = zeros::<4>([4, 3, 3, 3]).cast(DType::F16);
    let output = conv(input(), weight, None, ConvSpec::unit(2)).unwrap();
    assert_eq!(output.shape(), Shape::new([0, 4, 6, 6]));
    let output = max_pool2d(input(), pool).unwrap();
    assert_eq!(output.shape(), Shape::new([0, 3, 4, 4]));

    // What does not fit is refused all the same.
    let error = conv_bn(zeros::<4>([0, 5, 8, 8]), params(), options()).unwrap_err();
    assert!(matches!(error, ConvBnError::InputChannels { got: 5, .. }));
    let error = conv_bn(input(), ConvBnParams::new(params().weight), options()).unwrap_err();
    assert!(matches!(error, ConvBnError::EmptyBatch { .. }));
}

#[test]
fn gamma_and_beta_of_two_dtypes_are_refused() {
    let pool = MaxPoolOptions::new([2, 2]);
    for half in [DType::F16, DType::BF16] {
        for (gamma, beta) in [(DType::F32, half), (half, DType::F32)] {
            let input = || zeros::<4>([2, 3, 8, 8]).cast(half);
            let vectors =
                |channels: usize| (zeros([channels]).cast(gamma), zeros([channels]).cast(beta));
            let params = || {
                let (gamma, beta) = vectors(4);
                ConvBnParams::new(zeros([4, 3, 3, 3]).cast(half)).with_affine(gamma, beta)
            };
            let options = || ConvBnOptions::new(ConvSpec::unit(2));
            let (norm_gamma, norm_beta) = vectors(3);
            let norm = BatchNormParams::default().with_affine(norm_gamma, norm_beta);
            let errors = [
                conv_bn(input(), params(), options()).unwrap_err(),
                conv_bn_max_pool2d(input(), params(), options(), pool.clone()).unwrap_err(),
                batch_norm(input(), norm, NormSpec::default()).unwrap_err(),
            ];
            let wanted =
                format!("input is {half:?}, beta is {beta:?}: cast beta to {gamma:?}, as gamma is");
            for error in errors {
                assert!(matches!(error, ConvBnError::DType { what: "beta", .. }));
                assert_eq!(error.to_string(), wanted);
            }
        }
    }
}

thread_local! {
    static PANICKED_AT: RefCell<Option<(String, u32)>> = const { RefCell::new(None) };
}

/// File and line that something says it panics at.
fn panic_place<T>(run: impl FnOnce() -> T) -> (String, u32) {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let other = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            let location = info.location().expect("every panic has one");
            PANICKED_AT.set(Some((location.file().to_string(), location.line())));
            other(info);
        }));
    });
    assert!(catch_unwind(AssertUnwindSafe(run)).is_err());
    PANICKED_AT.take().expect("the hook has run")
}

#[test]
fn panics_are_at_the_users_line() {
    let device = Device::flex();
    let plane = ConvBn2dConfig::new([3, 4], [3, 3]);
    let block = plane.init(&device);
    let line = ConvBn1dConfig::new(3, 4, 3).init(&device);
    let volume = ConvBn3dConfig::new([3, 4], [3, 3, 3]).init(&device);
    let pool = MaxPool2dConfig::new([9, 9]).init();
    let x = || zeros::<4>([2, 3, 8, 8]);
    let wrong = || zeros::<4>([2, 5, 8, 8]);

    let at = line!() + 1;
    let place = panic_place(|| block.forward(wrong()));
    assert_eq!(place, (file!().to_string(), at));

    let borrowed = fuse(&block.conv, &block.norm);
    let places = [
        panic_place(|| ConvBn2dConfig::new([0, 4], [3, 3]).init(&device)),
        panic_place(|| plane.clone().with_momentum(2.0).init(&device)),
        panic_place(|| plane.clone().with_epsilon(0.0).init(&device)),
        panic_place(|| block.forward_residual(x(), wrong())),
        panic_place(|| block.forward_max_pool(x(), &pool)),
        panic_place(|| block.forward_max_pool(wrong(), &pool)),
        panic_place(|| block.saved_for_backward([2, 5, 8, 8])),
        panic_place(|| block.saved_for_backward_residual([2, 5, 8, 8])),
        panic_place(|| block.saved_for_backward_max_pool([2, 3, 8, 8], &pool)),
        panic_place(|| block.output_shape([2, 5, 8, 8])),
        panic_place(|| borrowed.forward(wrong())),
        panic_place(|| borrowed.forward_residual(x(), wrong())),
        panic_place(|| borrowed.forward_max_pool(x(), &pool)),
        panic_place(|| borrowed.saved_for_backward([2, 5, 8, 8])),
        panic_place(|| borrowed.saved_for_backward_residual([2, 5, 8, 8])),
        panic_place(|| borrowed.saved_for_backward_max_pool([2, 3, 8, 8], &pool)),
        panic_place(|| borrowed.output_shape([2, 5, 8, 8])),
        panic_place(|| line.forward(zeros([2, 5, 8]))),
        panic_place(|| volume.forward(zeros([2, 5, 8, 8, 8]))),
        panic_place(|| MaxPool2dConfig::new([0, 2]).init()),
        panic_place(|| pool.forward(x())),
        panic_place(|| pool.saved_for_backward([2, 3, 8, 8])),
    ];
    for (index, (file, _)) in places.iter().enumerate() {
        assert_eq!(file, file!(), "{index}");
    }
}

#[test]
fn layers_refuse_what_they_cannot_be() {
    let device = Device::flex();
    let plane = |channels| ConvBn2dConfig::new(channels, [3, 3]);
    let cases: Vec<(ConvBn2dConfig, &[&str])> = vec![
        (plane([0, 4]), &["channels must be positive", "[0, 4]"]),
        (plane([4, 0]), &["channels must be positive", "[4, 0]"]),
        (
            ConvBn2dConfig::new([3, 4], [3, 0]),
            &["kernel size must be positive", "[3, 0]"],
        ),
        (
            plane([3, 4]).with_stride([0, 1]),
            &["stride must be positive", "[0, 1]"],
        ),
        (
            plane([3, 4]).with_dilation([1, 0]),
            &["dilation must be positive", "[1, 0]"],
        ),
        (
            plane([3, 4]).with_groups(0),
            &["groups must be positive", "[0]"],
        ),
        (
            plane([4, 3]).with_groups(2),
            &["4 input and 3 output channels", "2 groups"],
        ),
        (
            plane([3, 4]).with_groups(2),
            &["3 input and 4 output channels", "2 groups"],
        ),
        (
            plane([3, 4]).with_epsilon(-1e-5),
            &["epsilon must be finite and positive", "-0.00001"],
        ),
        (plane([3, 4]).with_epsilon(f64::NAN), &["epsilon", "NaN"]),
        (
            plane([3, 4]).with_momentum(1.5),
            &["momentum must be between 0 and 1", "1.5"],
        ),
        (plane([3, 4]).with_momentum(f64::NAN), &["momentum", "NaN"]),
    ];
    for (config, parts) in cases {
        let message = panic_message(|| config.init(&device));
        for part in parts {
            assert!(message.contains(part), "{part:?} in {message:?}");
        }
    }
    let line = panic_message(|| ConvBn1dConfig::new(3, 4, 0).init(&device));
    assert!(
        line.contains("kernel size must be positive, got 0 in [0]"),
        "{line}"
    );
    let volume = ConvBn3dConfig::new([3, 4], [1, 1, 1]).with_stride([1, 1, 0]);
    let volume = panic_message(|| volume.init(&device));
    assert!(
        volume.contains("stride must be positive, got 0 in [1, 1, 0]"),
        "{volume}"
    );
}

#[test]
fn layers_refuse_what_does_not_fit_them() {
    let device = Device::flex();
    let block = ConvBn2dConfig::new([3, 4], [3, 3]).init(&device);
    let with = |change: fn(&mut ConvBn2d)| {
        let mut block = block.clone();
        change(&mut block);
        block
    };
    let forward = |block: ConvBn2d, input| panic_message(move || block.forward(input));
    let x = || zeros([2, 3, 8, 8]);
    let training = block.clone().train();
    let cases: Vec<(String, &[&str])> = vec![
        (
            forward(block.clone(), zeros([2, 4, 8, 8])),
            &["expected 3 channels for weight [4, 3, 3, 3]", "got 4"],
        ),
        (
            forward(block.clone(), zeros([2, 3, 8, 2])),
            &["spatial dimension 1", "extent 3", "padded input's 2"],
        ),
        (
            forward(block.clone(), zeros([2, 3, 0, 8])),
            &["input size must be positive", "[2, 3, 0, 8]"],
        ),
        (
            forward(
                training.clone(),
                Tensor::zeros([0, 3, 8, 8], &device.clone().autodiff()),
            ),
            &["an empty batch", "[0, 3, 8, 8]", "valid()"],
        ),
        (
            forward(block.clone(), x().cast(DType::F64)),
            &[
                "input is F64, weight is F32",
                "input.cast(DType::F32)",
                "with_precision(FloatDType::F64)",
            ],
        ),
        (
            forward(
                with(|block| block.norm = BatchNormConfig::new(5).init(&Device::flex())),
                x(),
            ),
            &["gamma: expected shape [4] of the channels to normalize, got [5]"],
        ),
        (
            forward(with(|block| block.norm.epsilon = -1e-5), x()),
            &["epsilon must be finite and positive, got -0.00001"],
        ),
        (
            panic_message(|| {
                let mut block = block.clone().train();
                block.norm.epsilon = 0.0;
                block.forward(Tensor::zeros([2, 3, 8, 8], &device.clone().autodiff()))
            }),
            &["epsilon must be finite and positive, got 0"],
        ),
        (
            forward(
                with(|block| {
                    block.conv.stride = [0, 1];
                    block.conv.padding = PaddingConfig2d::Same;
                }),
                x(),
            ),
            &["stride must be positive", "[0, 1]"],
        ),
        (
            panic_message(|| block.forward_residual(x(), zeros([2, 4, 6, 7]))),
            &["residual: expected shape [2, 4, 6, 6]", "got [2, 4, 6, 7]"],
        ),
        (
            panic_message(|| block.forward_residual(x(), zeros([2, 4, 6, 6]).cast(DType::F16))),
            &["input is F32, residual is F16: cast residual to F32"],
        ),
        (
            forward(
                training.clone(),
                Tensor::zeros([1, 3, 3, 3], &device.clone().autodiff()),
            ),
            &["more than one value per channel", "[1, 4, 1, 1]"],
        ),
        (
            panic_message(|| block.saved_for_backward([1, 2, 8, 8])),
            &["expected 3 channels", "got 2"],
        ),
    ];
    for (message, parts) in cases {
        for part in parts {
            assert!(message.contains(part), "{part:?} in {message:?}");
        }
    }
}

#[test]
fn pools_refuse_what_they_cannot_be() {
    // Burn's constructors panic on zeros, but its fields are public.
    let options = |change: fn(&mut MaxPoolOptions<2>)| {
        let mut options = MaxPoolOptions::new([3, 2]);
        change(&mut options);
        options
    };
    let x = || zeros([2, 3, 8, 5]);
    let refused = |change: fn(&mut MaxPoolOptions<2>)| {
        let error = max_pool2d(x(), options(change)).unwrap_err();
        error.to_string()
    };
    let layer = |change: fn(MaxPool2dConfig) -> MaxPool2dConfig| {
        let config = change(MaxPool2dConfig::new([3, 2]));
        panic_message(|| config.init().forward(x()))
    };
    let cases: Vec<(String, &[&str])> = vec![
        (
            refused(|options| options.kernel_size = [3, 0]),
            &["kernel size must be positive", "[3, 0]"],
        ),
        (
            refused(|options| options.stride = [0, 1]),
            &["stride must be positive", "[0, 1]"],
        ),
        (
            refused(|options| options.dilation = [0, 0]),
            &["dilation must be positive", "[0, 0]"],
        ),
        (
            refused(|options| options.kernel_size = [3, 6]),
            &[
                "spatial dimension 1",
                "a window of extent 6",
                "padded input's 5",
                "input [2, 3, 8, 5]",
            ],
        ),
        (
            refused(|options| {
                options.dilation = [5, 1];
                options.padding = [(1, 1), (0, 0)];
            }),
            &["spatial dimension 0", "extent 11", "padded input's 10"],
        ),
        (
            layer(|config| config.with_strides([2, 0])),
            &["stride must be positive", "[2, 0]"],
        ),
        (
            layer(|config| config.with_dilation([1, 5])),
            &["spatial dimension 1", "extent 6", "padded input's 5"],
        ),
        (
            panic_message(|| MaxPool2dConfig::new([0, 2]).init()),
            &["kernel size must be positive", "[0, 2]"],
        ),
        (
            panic_message(|| {
                let pool = MaxPool2dConfig::new([9, 2]).init();
                pool.saved_for_backward([2, 3, 8, 5])
            }),
            &["extent 9", "padded input's 8"],
        ),
    ];
    for (message, parts) in cases {
        for part in parts {
            assert!(message.contains(part), "{part:?} in {message:?}");
        }
    }
}
