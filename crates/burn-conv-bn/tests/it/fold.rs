//! Folding for inference.

use burn::module::{Module, Param, RunningState};
use burn::nn::conv::Conv1d;
use burn::nn::{Initializer, PaddingConfig1d, PaddingConfig2d, PaddingConfig3d};
use burn::tensor::{DType, Device, FloatDType, Tensor};
use burn_conv_bn::{
    Activation, ConvBn1dConfig, ConvBn2d, ConvBn2dConfig, ConvBn3dConfig, ConvBnModule, FoldError,
    NormVariant,
};

use crate::common::{assert_close, device, random, tensor, values};

fn config() -> ConvBn2dConfig {
    ConvBn2dConfig::new([4, 6], [3, 3])
        .with_stride([2, 1])
        .with_padding(PaddingConfig2d::Explicit(0, 1, 2, 1))
        .with_groups(2)
        .with_activation(Activation::Silu)
}

/// A layer whose norm does something, on an autodiff device.
fn block(config: &ConvBn2dConfig) -> ConvBn2d {
    let mut block = config.init(&device());
    let vector = |seed| tensor::<1>(random(&[6], seed), DType::F32);
    block.norm.gamma = Param::from_tensor(vector(1));
    block.norm.beta = Param::from_tensor(vector(2));
    block.norm.running_mean = RunningState::new(vector(3));
    block.norm.running_var = RunningState::new(vector(4).abs() + 0.1);
    block
}

/// The same in evaluation mode.
fn trained(config: &ConvBn2dConfig) -> ConvBn2d {
    block(config).valid()
}

#[test]
fn a_folded_layer_computes_the_same() {
    let x = tensor::<4>(random(&[2, 4, 9, 8], 5), DType::F32).inner();
    for variant in [NormVariant::BatchNorm, NormVariant::Tutorial] {
        for (bias, affine) in [(false, true), (true, true), (true, false)] {
            let config = config()
                .with_norm_variant(variant)
                .with_bias(bias)
                .with_affine(affine);
            let block = trained(&config);
            let conv = block.fold().unwrap();
            assert_eq!(conv.stride, [2, 1]);
            assert_eq!(conv.groups, 2);
            let folded = block.settings.activation.forward(conv.forward(x.clone()));
            let context = format!("{variant:?}, bias {bias}, affine {affine}");
            let wanted = values(block.forward(x.clone()));
            assert_close(&context, &values(folded), &wanted, 2e-6, 0.0);
        }
    }
}

#[test]
fn every_rank_folds() {
    let device = Device::flex();
    let line = ConvBn1dConfig::new(2, 3, 3).init(&device);
    let x = Tensor::<3>::ones([1, 2, 8], &device);
    let folded = line.fold().unwrap().forward(x.clone());
    assert_close("1-D", &values(folded), &values(line.forward(x)), 1e-6, 0.0);
    let volume = ConvBn3dConfig::new([2, 3], [1, 2, 3]).init(&device);
    let x = Tensor::<5>::ones([1, 2, 4, 4, 4], &device);
    let folded = volume.fold().unwrap().forward(x.clone());
    assert_close(
        "3-D",
        &values(folded),
        &values(volume.forward(x)),
        1e-6,
        0.0,
    );
}

#[test]
fn a_folded_layer_keeps_its_dtype() {
    let block = trained(&config()).with_precision(FloatDType::BF16);
    let conv = block.fold().unwrap();
    assert_eq!(conv.weight.val().dtype(), DType::BF16);
    assert_eq!(conv.bias.unwrap().val().dtype(), DType::BF16);
}

#[test]
fn what_cannot_be_folded_is_refused() {
    let block = config().with_track_running_stats(false).init(&device());
    assert_eq!(block.fold().unwrap_err(), FoldError::NoRunningStatistics);

    let mut block = trained(&config());
    let mut variances = vec![1.0f32; 6];
    variances[4] = -3.0;
    block.norm.running_var =
        RunningState::new(Tensor::from_floats(variances.as_slice(), &Device::flex()));
    let error = block.fold().unwrap_err();
    assert!(matches!(error, FoldError::NotFinite { channel: 4, .. }));
    assert!(error.to_string().contains("running variance -3"), "{error}");

    let mut block = trained(&config());
    block.norm = burn::nn::BatchNormConfig::new(5).init(&Device::flex());
    let error = block.fold().unwrap_err().to_string();
    assert!(
        error.contains("expected 6 values") && error.contains("got 5"),
        "{error}"
    );
}

#[test]
fn a_layer_folds_in_every_state() {
    let x = || tensor::<4>(random(&[2, 4, 9, 8], 5), DType::F32);
    type Change = fn(ConvBn2d) -> ConvBn2d;
    let states: [(&str, Change); 9] = [
        ("new", |block| block),
        ("after forward", |block| {
            block.forward(tensor(random(&[2, 4, 9, 8], 6), DType::F32));
            block
        }),
        ("after backward", |block| {
            let output = block.forward(tensor(random(&[2, 4, 9, 8], 6), DType::F32));
            let grads = output.sum().backward();
            assert!(block.conv.weight.val().grad(&grads).is_some());
            block
        }),
        ("frozen", Module::freeze),
        ("no_grad", Module::no_grad),
        ("valid", |block| block.valid()),
        ("valid and train", |block| block.valid().train()),
        ("forked", |block| block.fork(&device())),
        ("loaded", |block| {
            config().init(&device()).load_record(block.into_record())
        }),
    ];
    for (state, change) in states {
        for untouched in [true, false] {
            let block = if untouched {
                config().init(&device())
            } else {
                block(&config())
            };
            let block = change(block);
            let conv = block
                .fold()
                .unwrap_or_else(|error| panic!("{state}: {error}"));
            let trains = state != "valid";
            for tensor in [
                conv.weight.val().flatten(0, 3),
                conv.bias.as_ref().unwrap().val(),
            ] {
                assert_eq!(Tensor::<1>::is_autodiff(&tensor), trains, "{state}");
            }
            let evaluated = block.valid().forward(x().inner());
            let input = if trains { x() } else { x().inner() };
            let folded = block.settings.activation.forward(conv.forward(input));
            assert_close(
                state,
                &values(folded.clone()),
                &values(evaluated),
                5e-6,
                0.0,
            );
            // As a new convolution on that device, it can be trained.
            assert_eq!(conv.weight.val().is_require_grad(), trains, "{state}");
            if trains {
                let grads = folded.sum().backward();
                assert!(conv.weight.val().grad(&grads).is_some(), "{state}");
                let bias = conv.bias.unwrap().val();
                assert!(bias.grad(&grads).is_some(), "{state}");
                assert!(block.conv.weight.val().grad(&grads).is_none(), "{state}");
            }
        }
    }
}

#[test]
fn same_padding_folds_where_burn_has_it() {
    let device = Device::flex();
    for size in 5..9 {
        for (kernel, stride) in [(3, 2), (2, 1), (4, 3), (1, 2)] {
            let context = format!("kernel {kernel}, stride {stride}, size {size}");
            let line = ConvBn1dConfig::new(2, 3, kernel)
                .with_stride(stride)
                .with_padding(PaddingConfig1d::Same)
                .init(&device);
            let x = Tensor::<3>::from_data(random(&[1, 2, size], 1), (&device, DType::F32));
            let folded = line.fold().unwrap().forward(x.clone());
            assert_close(
                &context,
                &values(folded),
                &values(line.forward(x)),
                2e-6,
                0.0,
            );
            let plane = ConvBn2dConfig::new([2, 3], [kernel, 3])
                .with_stride([stride, 1])
                .with_padding(PaddingConfig2d::Same)
                .init(&device);
            let x = Tensor::<4>::from_data(random(&[1, 2, size, 6], 1), (&device, DType::F32));
            let folded = plane.fold().unwrap().forward(x.clone());
            assert_close(
                &context,
                &values(folded),
                &values(plane.forward(x)),
                2e-6,
                0.0,
            );
        }
        // Those of Conv3d that are even for every size.
        let volume = ConvBn3dConfig::new([1, 2], [3, 1, 5])
            .with_stride([1, 2, 1])
            .with_padding(PaddingConfig3d::Same)
            .init(&device);
        let x = Tensor::<5>::from_data(random(&[1, 1, size, size, 6], 1), (&device, DType::F32));
        let folded = volume.fold().unwrap().forward(x.clone());
        assert_close(
            "3-D",
            &values(folded),
            &values(volume.forward(x)),
            2e-6,
            0.0,
        );
    }

    let refused = |kernel, stride| {
        let volume = ConvBn3dConfig::new([1, 2], kernel)
            .with_stride(stride)
            .with_padding(PaddingConfig3d::Same)
            .init(&device);
        let x = Tensor::<5>::ones([1, 1, 8, 6, 4], &device);
        assert_eq!(volume.forward(x).dims()[1], 2);
        volume.fold().unwrap_err()
    };
    let error = refused([3, 3, 3], [2, 2, 2]);
    let of = |dim, kernel, stride| FoldError::SamePadding {
        dim,
        kernel,
        stride,
    };
    assert_eq!(error, of(0, 3, 2));
    for part in [
        "dimension 0",
        "kernel 3 with stride 2",
        "PaddingConfig3d::Explicit",
    ] {
        assert!(error.to_string().contains(part), "{part} in {error}");
    }
    assert_eq!(refused([3, 2, 3], [1, 1, 1]), of(1, 2, 1));
    assert_eq!(refused([1, 3, 3], [2, 1, 3]), of(2, 3, 3));
}

/// A layer of two channels with one tap each, whose second channel has that mean and variance, in `dtype`.
fn fold_line(
    dtype: FloatDType,
    weight: f64,
    mean: f32,
    variance: f32,
    epsilon: f64,
) -> Result<Conv1d, FoldError> {
    let device = Device::flex();
    let mut block = ConvBn1dConfig::new(1, 2, 1)
        .with_epsilon(epsilon)
        .with_initializer(Initializer::Constant { value: weight })
        .init(&device)
        .with_precision(dtype);
    block.norm.running_mean = RunningState::new(Tensor::from_floats([0.0, mean], &device));
    block.norm.running_var = RunningState::new(Tensor::from_floats([1.0, variance], &device));
    block.fold()
}

#[test]
fn values_out_of_range_are_refused() {
    let refused = |dtype, weight, mean, variance, epsilon| {
        let error = fold_line(dtype, weight, mean, variance, epsilon).unwrap_err();
        let FoldError::OutOfRange {
            what,
            dtype: of,
            channel: 1,
            value,
        } = error
        else {
            panic!("{error}");
        };
        assert_eq!(of, DType::from(dtype));
        let message = error.to_string();
        assert!(
            message.contains("channel 1") && message.contains("with_precision"),
            "{message}"
        );
        (what, value)
    };
    let assert_is = |(what, got): (&str, f64), wanted: (&str, f64)| {
        assert_eq!(what, wanted.0);
        assert_close(what, &[got], &[wanted.1], 1e-3, 0.0);
    };
    let scale = 1.0 / 1e-5f64.sqrt();
    let half = refused(FloatDType::F16, 1.0, -250.0, 0.0, 1e-5);
    assert_is(half, ("bias", 250.0 * scale));
    let half = refused(FloatDType::F16, 1.0, 0.0, 0.0, 1e-10);
    assert_is(half, ("weight", 1e5));
    let half = refused(FloatDType::F16, 1e-3, 0.0, 1e8, 1e-5);
    assert_is(half, ("weight", 1e-7));
    let single = refused(FloatDType::F32, 1.0, 0.0, 0.0, 1e-80);
    assert_is(single, ("weight", 1e40));

    // A wider dtype holds them.
    for dtype in [FloatDType::F32, FloatDType::BF16] {
        for (weight, mean, variance, epsilon) in [
            (1.0, -250.0, 0.0, 1e-5),
            (1.0, 0.0, 0.0, 1e-10),
            (1e-3, 0.0, 1e8, 1e-5),
        ] {
            let conv = fold_line(dtype, weight, mean, variance, epsilon).unwrap();
            let scale = 1.0 / (f64::from(variance) + epsilon).sqrt();
            let weights = values(conv.weight.val());
            assert_close("weight", &weights[1..], &[weight * scale], 1e-2, 0.0);
            let bias = values(conv.bias.unwrap().val());
            assert_close("bias", &bias[1..], &[-f64::from(mean) * scale], 1e-2, 0.0);
        }
    }
}

/// Small weights beside larger ones, and all weights of a channel that adds nothing, may round to zero.
#[test]
fn what_rounds_to_nothing_beside_the_rest_is_folded() {
    let device = Device::flex();
    let mut block = ConvBn1dConfig::new(1, 2, 2)
        .init(&device)
        .with_precision(FloatDType::F16);
    let weight = Tensor::<3>::from_floats([[[0.5, 6e-8]], [[0.5, 0.25]]], &device);
    block.conv.weight = Param::from_tensor(weight.cast(DType::F16));
    block.norm.gamma = Param::from_tensor(Tensor::from_floats([0.4, 1e-12], &device));
    block.norm.beta = Param::from_tensor(Tensor::from_floats([0.0, 0.125], &device));
    let conv = block.fold().unwrap();
    let weight = values(conv.weight.val());
    assert_close("weight", &weight, &[0.2, 0.0, 0.0, 0.0], 1e-3, 0.0);
    assert_eq!(values(conv.bias.unwrap().val()), [0.0, 0.125]);
    // The same channel, its weights alone.
    block.norm.gamma = Param::from_tensor(Tensor::from_floats([0.4, 1e-3], &device));
    block.norm.beta = Param::from_tensor(Tensor::zeros([2], &device));
    let weight = Tensor::<3>::from_floats([[[0.5, 0.5]], [[1e-4, 1e-4]]], &device);
    block.conv.weight = Param::from_tensor(weight.cast(DType::F16));
    assert!(matches!(
        block.fold().unwrap_err(),
        FoldError::OutOfRange {
            channel: 1,
            what: "weight",
            ..
        }
    ));
}

#[test]
fn an_epsilon_of_zero_goes_with_given_statistics() {
    let x = tensor::<4>(random(&[2, 4, 9, 8], 5), DType::F32).inner();
    let mut block = trained(&config());
    block.norm.epsilon = 0.0;
    let unfused = block.norm.forward(block.conv.forward(x.clone()));
    let wanted = values(block.settings.activation.forward(unfused));
    let forward = values(block.forward(x.clone()));
    assert_close("forward", &forward, &wanted, 1e-5, 0.0);
    let conv = block.fold().unwrap();
    let folded = values(block.settings.activation.forward(conv.forward(x.clone())));
    assert_close("fold", &folded, &wanted, 1e-5, 0.0);

    // A channel without variance: no finite scale, as in Burn.
    block.norm.running_var = RunningState::new(Tensor::zeros([6], &Device::flex()));
    assert!(
        values(block.forward(x))
            .iter()
            .all(|value| !value.is_finite() || *value == 0.0)
    );
    assert!(matches!(
        block.fold().unwrap_err(),
        FoldError::NotFinite { channel: 0, .. }
    ));

    block.norm.epsilon = -1e-5;
    assert_eq!(block.fold().unwrap_err(), FoldError::Epsilon { got: -1e-5 });
}
