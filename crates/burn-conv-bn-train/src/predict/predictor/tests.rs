use super::*;

use burn::tensor::Tolerance;
use burn_conv_bn_models::Form;

use crate::data::generate;
use crate::run::job::tests::job;
use crate::run::job::{Norm, Precision};

#[test]
fn the_first_of_the_most_probable_classes_is_predicted() {
    let mut row = [0.1f64.ln(); CLASSES];
    assert_eq!(Prediction::of(&row).unwrap().digit, 0);
    row[7] = 0.4f64.ln();
    row[8] = 0.4f64.ln();
    let prediction = Prediction::of(&row).unwrap();
    assert_eq!(prediction.digit, 7);
    assert!((prediction.probability() - 0.4).abs() < 1e-12);
    assert!((prediction.probabilities()[8] - 0.4).abs() < 1e-12);
    row[3] = f64::NAN;
    assert_eq!(Prediction::of(&row), None);
    assert_eq!(Prediction::of(&row[1..]), None);
}

fn images(count: usize, device: &Device) -> Tensor<4> {
    let digits = generate(count, 11);
    let items: Vec<DigitItem> = digits.get_many((0..count).collect()).unwrap();
    let batcher = MnistBatcher::new(FloatDType::F64);
    batcher.batch(items, device).images
}

fn net(norm: Norm, form: Form) -> Net {
    let mut job = job(1, 32);
    job.setup.norm = norm;
    job.setup.precision = Precision::F64;
    let variant = match form {
        Form::Unfused => Variant::Unfused,
        _ => Variant::Fused,
    };
    match job.classifier(variant, MemoryProbe::off()).net {
        AnyNetwork::Tutorial(net) => net,
        other => panic!("{other:?}"),
    }
}

/// On the digits whose statistics were taken nothing changes, and each digit's prediction is
/// then its own.
#[test]
fn statistics_that_were_taken_up_stay() {
    let device = Device::flex();
    for (norm, form) in [
        (Norm::Burn, Form::Fused),
        (Norm::Burn, Form::Unfused),
        (Norm::Tutorial, Form::Fused),
    ] {
        let net = net(norm, form);
        let reference = images(24, &device);
        let wanted = net.valid().forward(reference.clone()).into_data();
        let net = calibrated(net, images(24, &device.clone().autodiff()));
        let together = net.forward(reference.clone());
        let tolerance = Tolerance::absolute(1e-9);
        together
            .clone()
            .into_data()
            .assert_approx_eq::<f64>(&wanted, tolerance);
        for index in [0, 5, 23] {
            let alone = net.forward(reference.clone().narrow(0, index, 1));
            let row = together.clone().narrow(0, index, 1).into_data();
            alone
                .into_data()
                .assert_approx_eq::<f64>(&row, Tolerance::absolute(1e-9));
        }
    }
}
