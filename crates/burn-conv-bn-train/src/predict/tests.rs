use super::*;

use burn::tensor::Tolerance;

use crate::data::generate;
use crate::run::job::tests::job;

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
    let job = Job {
        norm,
        precision: crate::run::job::Precision::F64,
        ..job(1, 32)
    };
    let variant = match form {
        Form::Unfused => Variant::Unfused,
        _ => Variant::Fused,
    };
    match job.classifier(variant, MemoryProbe::off()).net {
        Network::Tutorial(net) => net,
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

#[test]
fn a_matrix_has_rows_of_what_is_and_columns_of_what_was_read() {
    let mut confusion = [[0; CLASSES]; CLASSES];
    confusion[4][9] = 3;
    confusion[4][4] = 9;
    let table = confusion_matrix(&confusion);
    let lines: Vec<&str> = table.lines().collect();
    assert_eq!(lines.len(), 12);
    let four: Vec<&str> = lines[6].split_whitespace().collect();
    assert_eq!(four[0], "4");
    assert_eq!((four[5], four[10]), ("9", "3"));
    assert!(lines[6].ends_with("75.0 %"), "{table}");
    assert!(lines[5].ends_with(" -"), "{table}");
    let widths: Vec<usize> = lines[1..].iter().map(|line| line.len()).collect();
    assert!(widths.iter().all(|&width| width == widths[0]), "{table}");
}

#[test]
fn a_heading_counts() {
    let report = |count: usize| {
        let mistake = MistakeReport {
            index: 0,
            label: 4,
            prediction: 9,
            probability: 0.5,
            loss: 0.7,
        };
        let test = TestReport {
            digits: 100,
            correct: 100 - count,
            accuracy: 1.0 - count as f64 / 100.0,
            average_loss: 0.1,
            confusion: [[0; CLASSES]; CLASSES],
            mistakes: vec![mistake; count],
        };
        let report = PredictionReport {
            model: "mobilenet-v2".to_string(),
            form: "unfused".to_string(),
            dtype: "F32".to_string(),
            epoch: 12,
            dataset: Some("synthetic".to_string()),
            test: None,
            images: Vec::new(),
            skipped: Vec::new(),
        };
        let [what, of] = heading(&report, &test);
        assert!(of.starts_with("mobilenet-v2, unfused, epoch 12"), "{of}");
        for line in [&what, &of] {
            assert!(line.chars().all(font::knows), "{line}");
            assert!(line.chars().count() <= mistakes::LETTERS, "{line}");
        }
        what
    };
    assert_eq!(report(0), "no mistakes on 100 digits of synthetic");
    assert_eq!(report(1), "1 mistake on 100 digits of synthetic");
    assert!(report(SHOWN).starts_with("40 mistakes on"));
    assert!(report(41).starts_with("the 40 with the highest loss of 41 mistakes on"));
}
