use super::*;

use burn::tensor::{DType, Distribution, Tolerance};
use burn_conv_bn_models::Form;

use crate::data::SIDE;
use crate::run::job::tests::job_of;

/// A reordering of a network is the same function, in training and in evaluation.
#[test]
fn other_orders_compute_the_same() {
    use ModelChoice::{Densenet121, EfficientnetB0, MobilenetV2, Resnet18, Tutorial, Vgg16Bn};

    let [batch, features, both] = Reordering::all();
    for (model, order) in [
        (Tutorial, batch),
        (Tutorial, features),
        (Tutorial, both),
        (Resnet18, both),
        (Vgg16Bn, both),
        (MobilenetV2, both),
        (EfficientnetB0, both),
        (Densenet121, both),
    ] {
        let job = job_of(model, Precision::F64, 4);
        let device = job.device();
        let distribution = Distribution::Normal(0.0, 1.0);
        let images = Tensor::<4>::random([4, 1, SIDE, SIDE], distribution, &device);
        let batch = MnistBatch {
            images: images.cast(DType::F64),
            targets: Tensor::from_data([3, 1, 4, 1], &device),
        };
        let plain = |batch: MnistBatch| MnistBatch {
            images: batch.images.without_autodiff(),
            targets: batch.targets.without_autodiff(),
        };
        let output = |classifier: &Classifier, batch| classifier.classify(batch).scores;
        let classifier =
            |network| Classifier::new(network, MemoryProbe::off(), job.setup.precision);

        let straight = classifier(job.network(Form::Unfused));
        // Moves the running statistics, so that their order matters, too.
        let training = output(&straight, batch.clone());
        let evaluation = output(&straight.valid(), plain(batch.clone()));
        let reordered = classifier(order.of_network(straight.net, model));
        let batch = order.of_batch(batch, model);
        // In training last: it moves the statistics.
        let again = output(&reordered.valid(), plain(batch.clone()));
        let pairs = [(evaluation, again), (training, output(&reordered, batch))];
        for (wanted, got) in pairs {
            let got = if order.batch { got.flip([0]) } else { got };
            let tolerance = Tolerance::rel_abs(1e-7, 1e-7);
            got.into_data()
                .assert_approx_eq::<f64>(&wanted.into_data(), tolerance);
        }
    }
}

fn parity(fused: &[f64], unfused: &[&[f64]], exact: Option<&[f64]>) -> Parity {
    Parity {
        fused: fused.to_vec(),
        unfused: unfused.iter().map(|run| run.to_vec()).collect(),
        exact: exact.map(<[f64]>::to_vec),
    }
}

#[test]
fn double_precision_allows_little() {
    assert!(
        parity(&[1.0, 2.0], &[&[1.0, 2.0 + 1e-7]], None)
            .judge()
            .is_ok()
    );
    assert!(
        parity(&[1.0, 2.0], &[&[1.0, 2.0 + 1e-5]], None)
            .judge()
            .is_err()
    );
    assert!(
        parity(&[1.0, f64::NAN], &[&[1.0, 2.0]], None)
            .judge()
            .is_err()
    );
}

#[test]
fn single_precision_allows_twice_the_unfused_error() {
    let unfused: [&[f64]; 2] = [&[1.0, 2.0], &[1.0, 2.1]];
    let exact: Option<&[f64]> = Some(&[1.0, 2.05]);
    assert!((parity(&[], &unfused, exact).spread() - 0.1).abs() < 1e-12);
    assert!(parity(&[1.0, 2.14], &unfused, exact).judge().is_ok());
    assert!(parity(&[1.0, 2.16], &unfused, exact).judge().is_err());
    assert!(parity(&[1.0, f64::NAN], &unfused, exact).judge().is_err());
    // Twice infinity is no limit.
    let broken: Option<&[f64]> = Some(&[1.0, f64::NAN]);
    assert!(parity(&[1.0, 2.0], &unfused, broken).judge().is_err());
}
/// The runs of a job in f32, made up: by how much each variant is off in either precision.
fn made_up(off: impl Fn(Precision, Variant) -> f64) -> Parity {
    let mut runs = 0;
    Parity::of_runs(Precision::F32, |precision, variant, _| {
        runs += 1;
        let noise = match precision {
            Precision::F64 => 0.0,
            _ => 1e-6 * f64::from(runs % 3),
        };
        let off = off(precision, variant) + noise;
        Ok(vec![2.3 + off, 2.1 - off])
    })
    .unwrap()
}

#[test]
fn a_fault_of_fused_in_every_precision_is_caught() {
    assert!(made_up(|_, _| 0.0).judge().is_ok());
    let common = made_up(|_, variant| match variant {
        Variant::Fused => 1e-3,
        _ => 0.0,
    });
    assert!(common.judge().is_err());
}

/// As one seed in forty gives them after a step of the tutorial's network.
#[test]
fn runs_that_agree_by_chance_allow_an_ulp_or_two() {
    let exact = 2.301_234_567;
    let unfused = [exact + 2.75e-9];
    let fused_off_by = |off: f64| {
        let fused = [exact + off];
        parity(&fused, &[&unfused[..]; 4], Some(&[exact])).judge()
    };
    assert!(fused_off_by(2.4e-7).is_ok());
    assert!(fused_off_by(-2.4e-7).is_ok());
    assert!(fused_off_by(1.3e-6).is_err());
}
