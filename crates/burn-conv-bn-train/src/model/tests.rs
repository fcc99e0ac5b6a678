use super::*;

use burn::module::Module;
use burn::tensor::{DType, Distribution, FloatDType, TensorData, Tolerance};
use burn_conv_bn::{ConvBnModule, FoldError};

/// Files have the names of the command line.
#[test]
fn names_are_those_of_json() {
    for choice in ModelChoice::value_variants() {
        let json = serde_json::to_string(choice).expect("a name is JSON");
        assert_eq!(json, format!("{:?}", choice.name()));
    }
}

fn network(choice: ModelChoice, form: Form, device: &Device) -> AnyNetwork {
    choice.init(
        form,
        NormVariant::BatchNorm,
        choice.default_dropout(),
        device,
    )
}

/// In evaluation, where only the tutorial's network depends on the rest of the batch.
#[test]
fn every_network_gives_log_probabilities_of_digits() {
    let device = Device::flex();
    let images = Tensor::<4>::random([2, 1, SIDE, SIDE], Distribution::Default, &device);
    for &choice in ModelChoice::value_variants() {
        let fused = network(choice, Form::Fused, &device).valid();
        assert_eq!(fused.form(), Form::Fused);
        let output = forward(&fused, images.clone());
        assert_eq!(output.dims(), [2, CLASSES], "{choice:?}");
        let sums = output.clone().exp().sum_dim(1).into_data();
        let ones = TensorData::new(vec![1.0f32; 2], [2, 1]);
        sums.assert_approx_eq::<f32>(&ones, Tolerance::absolute(1e-4));

        let unfused = fused.with_form(Form::Unfused);
        assert_eq!(unfused.form(), Form::Unfused);
        // Untrained, the deeper ones have scores in the thousands.
        let tolerance = Tolerance::rel_abs(1e-3, 1e-2);
        let unfused = forward(&unfused, images.clone()).into_data();
        output
            .into_data()
            .assert_approx_eq::<f32>(&unfused, tolerance);
    }
}

#[test]
fn padding_is_black() {
    let device = Device::flex();
    let white = Tensor::<4>::ones([1, 1, SIDE, SIDE], &device).cast(FloatDType::F64);
    let padded = padded(white);
    assert_eq!(padded.dims(), [1, 1, 32, 32]);
    let values: Vec<f64> = padded.into_data().iter::<f64>().collect();
    for (at, value) in values.into_iter().enumerate() {
        let inside = [at / 32, at % 32].iter().all(|i| (2..30).contains(i));
        let wanted = if inside { 1.0 } else { -MEAN / STD };
        assert!((value - wanted).abs() < 1e-6, "{value} at {at}");
    }
}

#[test]
fn what_is_not_there_is_refused() {
    let (burn, tutorial) = (NormVariant::BatchNorm, NormVariant::Tutorial);
    let (net, resnet) = (ModelChoice::Tutorial, ModelChoice::Resnet18);
    net.check(tutorial, 0.5).unwrap();
    resnet.check(burn, 0.0).unwrap();
    ModelChoice::MobilenetV2.check(burn, 0.2).unwrap();
    for (norm, dropout, part) in [(tutorial, 0.0, "--norm burn"), (burn, 0.5, "no dropout")] {
        let error = resnet.check(norm, dropout).unwrap_err().to_string();
        assert!(
            error.contains("resnet18") && error.contains(part),
            "{error}"
        );
    }
}

#[test]
fn one_digit_alone_is_refused() {
    for (model, digits, batch_size, fine) in [
        (ModelChoice::Resnet18, 64, 32, true),
        (ModelChoice::Resnet18, 65, 32, false),
        (ModelChoice::Resnet18, 66, 32, true),
        (ModelChoice::MobilenetV2, 64, 1, false),
        (ModelChoice::Densenet121, 65, 32, false),
        (ModelChoice::Resnet50, 1, 32, false),
        (ModelChoice::Tutorial, 65, 32, true),
        (ModelChoice::Vgg16Bn, 65, 32, true),
    ] {
        let checked = model.check_batches(digits, batch_size);
        assert_eq!(checked.is_ok(), fine, "{model:?}, {digits}, {batch_size}");
    }
}

/// Padding makes a tensor of its own of the digits, which are there before.
#[test]
fn networks_list_what_they_keep() {
    let device = Device::flex().autodiff();
    for form in [Form::Fused, Form::Unfused] {
        for (choice, shape, shared) in [
            (ModelChoice::Resnet18, [3, 1, 32, 32], false),
            (ModelChoice::Tutorial, [3, 1, 28, 28], true),
        ] {
            let network = network(choice, form, &device);
            let (block, tensor) = &saved_for_backward(&network, 3)[0];
            assert_eq!((block.as_str(), tensor.name), ("conv1", "input"));
            assert_eq!(tensor.shape.to_vec(), shape);
            assert_eq!(tensor.shared, shared, "{choice:?}, {form:?}");
        }
    }
}

/// A few batches give the running statistics values that have an effect.
#[test]
fn a_folded_network_predicts_the_same() {
    let device = Device::flex().autodiff();
    let images = |count| {
        Tensor::<4>::random(
            [count, 1, SIDE, SIDE],
            Distribution::Normal(0.3, 1.0),
            &device,
        )
    };
    for &choice in ModelChoice::value_variants() {
        if !choice.tracks_statistics() {
            continue;
        }
        let network = network(choice, Form::Fused, &device);
        for _ in 0..4 {
            forward(&network, images(4));
        }
        let network = network.valid();
        let folded = network.folded().expect("it tracks statistics");
        let images = images(3).without_autodiff();
        let wanted = forward(&network, images.clone()).into_data();
        let got = forward(&folded, images).into_data();
        got.assert_approx_eq::<f32>(&wanted, Tolerance::rel_abs(1e-2, 1e-2));
    }
}

/// Rounded to 2^-9 in each of some 20 layers.
#[test]
fn a_folded_network_predicts_in_mixed_precision() {
    let device = Device::flex().autodiff();
    let images = Tensor::<4>::random([4, 1, SIDE, SIDE], Distribution::Normal(0.3, 1.0), &device);
    let choice = ModelChoice::Resnet18;
    let network = network(choice, Form::Fused, &device);
    for _ in 0..4 {
        forward(&network, images.clone());
    }
    let folded = network.valid().folded().expect("it tracks statistics");
    let images = images.without_autodiff();
    let values = |output: Tensor<2>| -> Vec<f64> {
        assert_eq!(output.dtype(), DType::F32);
        output.into_data().iter::<f64>().collect()
    };
    let wanted = values(forward(&folded, images.clone()));
    let folded = folded.autocast(FloatDType::BF16);
    let got = values(forward(&folded, images.cast(FloatDType::BF16)));
    let norm = |values: Vec<f64>| values.iter().map(|value| value * value).sum::<f64>();
    let differences = got.iter().zip(&wanted).map(|(got, wanted)| got - wanted);
    let distance = (norm(differences.collect()) / norm(wanted)).sqrt();
    assert!(0.0 < distance && distance < 0.25, "{distance}");
}

#[test]
fn what_has_no_running_statistics_is_refused() {
    let device = Device::flex();
    let choice = ModelChoice::Tutorial;
    let refused = network(choice, Form::Fused, &device).folded();
    assert_eq!(refused.err(), Some(FoldError::NoRunningStatistics));
}
