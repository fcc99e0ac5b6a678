use super::*;

use std::collections::BTreeMap;

use burn::data::dataloader::batcher::Batcher;
use burn::tensor::{DType, Device};
use burn_dataset::Dataset;

use crate::data::{DigitItem, MnistBatcher, generate};
use crate::model::ModelChoice;
use crate::run::job::Variant;
use crate::run::job::tests::job_of;

const HALVES: [FloatDType; 2] = [FloatDType::F16, FloatDType::BF16];

fn classifier(model: ModelChoice, variant: Variant) -> Classifier {
    let job = job_of(model, Precision::F32, 16);
    job.classifier(variant, MemoryProbe::off())
}

/// The same in mixed precision.
fn in_half(single: Classifier, activations: FloatDType) -> Classifier {
    Classifier {
        activations,
        ..single
    }
}

/// The first digits, as the classifier takes them.
fn batch(classifier: &Classifier, count: usize) -> MnistBatch {
    let digits = generate(count, 3);
    let items: Vec<DigitItem> = digits.get_many((0..count).collect()).unwrap();
    MnistBatcher::new(classifier.activations()).batch(items, &Device::flex().autodiff())
}

/// Gradients by the names of their parameters, whose type they have.
struct Collect<'a> {
    gradients: &'a GradientsParams,
    path: Vec<String>,
    found: BTreeMap<String, Vec<f64>>,
}

impl ModuleVisitor for Collect<'_> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let Some(gradient) = self.gradients.get::<D>(param.id) else {
            return;
        };
        let name = self.path.join(".");
        assert_eq!(gradient.dtype(), param.val().dtype(), "{name}");
        let values = gradient.into_data().iter::<f64>().collect();
        self.found.insert(name, values);
    }
}

fn named(classifier: &Classifier, gradients: &GradientsParams) -> BTreeMap<String, Vec<f64>> {
    let mut collect = Collect {
        gradients,
        path: Vec::new(),
        found: BTreeMap::new(),
    };
    classifier.visit(&mut collect);
    collect.found
}

/// Distance of values, relative to the 2-norm of the wanted ones.
fn distance(got: &[f64], wanted: &[f64]) -> f64 {
    assert_eq!(got.len(), wanted.len());
    let difference = norm(got.iter().zip(wanted).map(|(got, wanted)| got - wanted));
    let distance = difference / norm(wanted.iter().copied());
    if distance.is_nan() {
        f64::INFINITY
    } else {
        distance
    }
}

fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|value| value * value).sum::<f64>().sqrt()
}

#[track_caller]
fn assert_near(
    what: &str,
    got: &BTreeMap<String, Vec<f64>>,
    wanted: &BTreeMap<String, Vec<f64>>,
    tolerance: f64,
) {
    assert!(got.keys().eq(wanted.keys()), "{what}: {:?}", got.keys());
    for (name, wanted) in wanted {
        let distance = distance(&got[name], wanted);
        assert!(distance < tolerance, "{what}: {name} is {distance} off");
    }
}

/// What rounding moves a gradient by is mostly that of ReLUs and maxima which it switches: about
/// the root of their share, which is some 2^-11 and 2^-8 of all.
#[test]
fn gradients_in_mixed_precision_are_those_of_the_parameters() {
    for variant in [Variant::Fused, Variant::Unfused] {
        let single = classifier(ModelChoice::Tutorial, variant);
        let gradients = TrainStep::step(&single, batch(&single, 32)).grads;
        let wanted = named(&single, &gradients);
        // Two convolutions, and two linear layers with biases.
        assert_eq!(wanted.len(), 6, "{:?}", wanted.keys());
        for (half, tolerance) in HALVES.into_iter().zip([0.15, 0.3]) {
            let mixed = in_half(single.clone(), half);
            assert_eq!(mixed.dtype(), FloatDType::F32);
            let output = TrainStep::step(&mixed, batch(&mixed, 32));
            let loss = &output.item.loss;
            assert_eq!(loss.dtype(), DType::F32);
            let what = format!("{variant:?}, {half:?}");
            assert_near(&what, &named(&mixed, &output.grads), &wanted, tolerance);
        }
    }
}

/// As if there were half a million digits in the batch, whose gradients f16 alone would lose.
#[test]
fn small_gradients_are_not_lost_in_f16() {
    let single = classifier(ModelChoice::Tutorial, Variant::Fused);
    let gradients = |classifier: &Classifier| {
        let loss = classifier.classify(batch(classifier, 32)).loss.mean();
        named(classifier, &classifier.gradients(loss * 2.0f64.powi(-14)))
    };
    let wanted = gradients(&single);
    let mixed = in_half(single.clone(), FloatDType::F16);
    assert_near("f16", &gradients(&mixed), &wanted, 0.15);
}

#[test]
fn running_statistics_in_mixed_precision_are_those_of_the_network() {
    for variant in [Variant::Fused, Variant::Unfused] {
        for half in HALVES {
            let single = classifier(ModelChoice::Resnet18, variant);
            // From the same start, without sharing it as clones do.
            let mixed = in_half(single.valid().train(), half);
            let statistics = [&single, &mixed].map(|classifier| {
                TrainStep::step(classifier, batch(classifier, 4));
                let AnyNetwork::ResNet(net) = &classifier.net else {
                    panic!("{:?}", classifier.net);
                };
                let norm = &net.conv1.norm;
                [&norm.running_mean, &norm.running_var].map(|running| {
                    let running = running.value_sync();
                    assert_eq!(running.dtype(), DType::F32);
                    running.into_data().iter::<f64>().collect::<Vec<_>>()
                })
            });
            let [[mean, variance], got] = statistics;
            assert!(mean.iter().any(|mean| *mean != 0.0));
            assert!(variance.iter().any(|variance| *variance != 1.0));
            for (got, wanted) in got.iter().zip([mean, variance]) {
                let distance = distance(got, &wanted);
                assert!(distance < 2e-2, "{variant:?}, {half:?}: {distance} off");
            }
        }
    }
}
