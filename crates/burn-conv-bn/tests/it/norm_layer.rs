//! `BatchNormActivation` against Burn's `BatchNorm` and activation.

use burn::module::{Module, Param};
use burn::nn::{BatchNorm, BatchNormConfig};
use burn::tensor::activation::relu;
use burn::tensor::{DType, Device, Tensor};
use burn_conv_bn::{
    Activation, BatchNormActivation, BatchNormActivationConfig, ConvBnModule, NormVariant,
    RunningVariance,
};

use crate::common::{assert_close, device, random, tensor, values};

const INPUT: [usize; 4] = [3, 4, 5, 6];

fn burns() -> BatchNorm {
    let mut norm = BatchNormConfig::new(4).init(&device());
    let channel = |seed| Param::from_tensor(tensor::<1>(random(&[4], seed), DType::F32));
    norm.gamma = channel(1);
    norm.beta = channel(2);
    norm
}

/// Output, gradients of input, gamma and beta, and the running statistics.
fn step(norm: &BatchNorm, forward: impl Fn(Tensor<4>) -> Tensor<4>) -> Vec<Vec<f64>> {
    let x = tensor::<4>(random(&INPUT, 3), DType::F32).require_grad();
    let y = forward(x.clone());
    let grads = (y.clone() * tensor(random(&INPUT, 4), DType::F32)).sum();
    let grads = grads.backward();
    vec![
        values(y),
        values(x.grad(&grads).unwrap()),
        values(norm.gamma.val().grad(&grads).unwrap()),
        values(norm.beta.val().grad(&grads).unwrap()),
        values(norm.running_mean.value_sync()),
        values(norm.running_var.value_sync()),
    ]
}

fn assert_same(got: &[Vec<f64>], wanted: &[Vec<f64>]) {
    for (index, (got, wanted)) in got.iter().zip(wanted).enumerate() {
        assert_close(&format!("result {index}"), got, wanted, 1e-5, 1e-6);
    }
}

#[test]
fn training_and_evaluation_are_burns() {
    let (ours, theirs) = (burns(), burns());
    let layer = BatchNormActivation::from_parts(ours, Activation::Relu);
    for _ in 0..2 {
        let got = step(&layer.norm, |x| layer.forward(x));
        let wanted = step(&theirs, |x| relu(theirs.forward(x)));
        assert_same(&got, &wanted);
    }
    let x = Tensor::<4>::from_data(random(&INPUT, 5), (&Device::flex(), DType::F32));
    let got = values(layer.valid().forward(x.clone()));
    let wanted = values(relu(theirs.valid().forward(x)));
    assert_close("evaluation", &got, &wanted, 1e-5, 1e-6);

    // A norm whose flag alone is off goes on training gamma and beta, by the running statistics.
    let frozen = |norm: &BatchNorm| {
        let mut frozen = norm.clone().freeze();
        frozen.gamma = norm.gamma.clone();
        frozen.beta = norm.beta.clone();
        frozen
    };
    let (ours, theirs) = (frozen(&layer.norm), frozen(&theirs));
    let layer = BatchNormActivation::from_parts(ours, Activation::Relu);
    let got = step(&layer.norm, |x| layer.forward(x));
    let wanted = step(&theirs, |x| relu(theirs.forward(x)));
    assert_same(&got, &wanted);
}

#[test]
fn every_setting_of_the_configuration_is_kept() {
    let config = BatchNormActivationConfig::new(4)
        .with_epsilon(1e-3)
        .with_momentum(0.25)
        .with_norm_variant(NormVariant::Tutorial)
        .with_affine(false)
        .with_track_running_stats(false)
        .with_running_variance(RunningVariance::Unbiased)
        .with_activation(Activation::Silu);
    let layer = config.init(&device());
    assert_eq!((layer.norm.epsilon, layer.norm.momentum), (1e-3, 0.25));
    let settings = &layer.settings;
    assert_eq!(settings.norm_variant, NormVariant::Tutorial);
    assert_eq!(settings.activation, Activation::Silu);
    assert_eq!(settings.running_variance, RunningVariance::Unbiased);
    assert!(!settings.affine && !settings.track_running_stats);
    assert!(format!("{layer}").contains("norm"));
    let unused = [
        "norm.gamma",
        "norm.beta",
        "norm.running_mean",
        "norm.running_var",
    ];
    assert_eq!(layer.unused_parameters(), unused);

    // By hand: 1, 2, 3, 6 have the mean 3 and the unbiased variance 14 / 3.
    let line = BatchNormActivationConfig::new(1)
        .with_momentum(1.0)
        .with_running_variance(RunningVariance::Unbiased)
        .init(&device());
    let x = Tensor::<2>::from_data([[1.0], [2.0], [3.0], [6.0]], &device());
    line.forward(x);
    let [mean, variance] =
        [&line.norm.running_mean, &line.norm.running_var].map(|kept| values(kept.value_sync())[0]);
    assert!((mean - 3.0).abs() < 1e-6 && (variance - 14.0 / 3.0).abs() < 1e-6);
}

#[test]
fn a_norm_with_an_activation_prints_one_line() {
    let text = BatchNormActivationConfig::new(4)
        .init(&device())
        .to_string();
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.contains("activation: Relu"), "{text}");
}

/// The record of the norm that was there before.
#[test]
fn records_of_burns_norm_load() {
    let trained = burns();
    step(&trained, |x| trained.forward(x));
    let mut layer = BatchNormActivationConfig::new(4).init(&device());
    layer.norm = layer.norm.load_record(trained.clone().into_record());
    let again = BatchNormActivationConfig::new(4).init(&device());
    let again = again.load_record(layer.into_record());
    let x = Tensor::<4>::from_data(random(&INPUT, 5), (&Device::flex(), DType::F32));
    let got = values(again.valid().forward(x.clone()));
    assert_eq!(got, values(relu_of_kernel(&trained, x)));
}

fn relu_of_kernel(norm: &BatchNorm, x: Tensor<4>) -> Tensor<4> {
    let layer = BatchNormActivation::from_parts(norm.clone(), Activation::Relu);
    layer.valid().forward(x)
}
