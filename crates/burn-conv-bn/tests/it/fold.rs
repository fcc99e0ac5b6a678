//! Folding for inference.

use burn::module::{Module, Param, RunningState};
use burn::nn::PaddingConfig2d;
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

/// A layer whose norm does something, in evaluation mode.
fn trained(config: &ConvBn2dConfig) -> ConvBn2d {
    let mut block = config.init(&device());
    let vector = |seed| tensor::<1>(random(&[6], seed), DType::F32);
    block.norm.gamma = Param::from_tensor(vector(1));
    block.norm.beta = Param::from_tensor(vector(2));
    block.norm.running_mean = RunningState::new(vector(3));
    block.norm.running_var = RunningState::new(vector(4).abs() + 0.1);
    block.valid()
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
