//! What Burn's learner trains: a network with its loss and its memory probe.

use std::time::{Duration, Instant};

use burn::backend::ExecutionError;
use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::{FloatDType, Tensor};
use burn::train::metric::{AccuracyInput, Adaptor, ItemLazy, LossInput};
use burn::train::{ClassificationOutput, InferenceStep, TrainOutput, TrainStep};
use burn_conv_bn::ConvBnModule;
use serde::{Deserialize, Serialize};

use crate::batch::MnistBatch;
use crate::loss_scale::LossScale;
use crate::memory::{MemoryProbe, StepMemory};
use crate::metrics::TallyInput;
use crate::model::Network;

/// A network that classifies digits, as Burn trains it.
///
/// Its parameters, with their gradients, are of one type, [`dtype`](Self::dtype). In mixed precision
/// its blocks compute in another, [`activations`](Self::activations), with their weights cast to that
/// in each forward pass.
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::data::dataloader::batcher::Batcher;
/// use burn::data::dataset::Dataset;
/// use burn::optim::SgdConfig;
/// use burn::tensor::{Device, FloatDType};
/// use burn::train::TrainStep;
/// use burn_conv_bn_models::{Form, NetConfig};
/// use burn_conv_bn_train::batch::MnistBatcher;
/// use burn_conv_bn_train::data::generate;
/// use burn_conv_bn_train::memory::MemoryProbe;
/// use burn_conv_bn_train::model::Network;
/// use burn_conv_bn_train::step::Classifier;
///
/// let device = Device::flex().autodiff();
/// let net = Network::Tutorial(NetConfig::new(Form::Fused).with_hidden(16).init(&device));
/// let classifier = Classifier::new(net, MemoryProbe::off(), FloatDType::F32);
///
/// // A training step by hand.
/// let items = generate(8, 1).get_many((0..8).collect()).unwrap();
/// let batch = MnistBatcher::new(classifier.activations()).batch(items, &device);
/// let output = TrainStep::step(&classifier, batch);
/// assert_eq!(output.item.output.loss.dims(), [8]);
/// assert!(!output.item.measure.duration.is_zero());
/// let classifier = SgdConfig::new().init().step(0.01, classifier, output.grads);
/// # drop(classifier);
/// # }
/// ```
#[derive(Module, Debug)]
pub struct Classifier {
    /// The network; its outputs are log-probabilities.
    pub net: Network,
    #[module(skip)]
    probe: MemoryProbe,
    #[module(skip)]
    activations: FloatDType,
}

impl Classifier {
    /// Makes `net` trainable with parameters of type `dtype`.
    ///
    /// All parameters are initialized here, in the order of the module's fields. Left alone,
    /// Burn initializes each when it is first used, and two forms of a network that use theirs
    /// in a different order would start from different weights. Seed the device just before.
    pub fn new(net: Network, probe: MemoryProbe, dtype: FloatDType) -> Self {
        Self {
            net: net.map(&mut Cast(dtype)),
            probe,
            activations: dtype,
        }
    }

    /// The same with blocks that compute in `dtype`: in mixed precision, f16 or bf16.
    ///
    /// The loss is scaled for the backward pass by the [`LossScale`] of that type.
    #[must_use]
    pub fn with_activations(mut self, dtype: FloatDType) -> Self {
        self.activations = dtype;
        self
    }

    /// The float type of the parameters.
    pub fn dtype(&self) -> FloatDType {
        let mut first = FirstDtype(None);
        self.visit(&mut first);
        first.0.expect("a network has parameters")
    }

    /// The float type of activations, which a batch's images must have.
    pub fn activations(&self) -> FloatDType {
        self.activations
    }

    /// The network as it computes: in mixed precision with casts of its blocks' weights, which lead
    /// gradients back to the parameters.
    pub(crate) fn computing(&self) -> Network {
        match self.activations {
            half @ (FloatDType::F16 | FloatDType::BF16) => self.net.autocast(half),
            _ => self.net.clone(),
        }
    }

    /// The gradients of a training step's loss.
    pub(crate) fn gradients(&self, loss: Tensor<1>) -> GradientsParams {
        let scale = LossScale::of(self.activations);
        scale.gradients(scale.backward(&loss), self)
    }

    pub(crate) fn classify(&self, batch: MnistBatch) -> ClassificationOutput {
        let MnistBatch { images, targets } = batch;
        let log_probabilities = self.computing().forward(images);
        let loss = log_probabilities
            .clone()
            .gather(1, targets.clone().unsqueeze_dim::<2>(1))
            .squeeze_dim::<1>(1)
            .neg();
        // One loss per digit: Burn's `LossMetric` weights what it gets by the number of
        // elements, so that a smaller last batch counts for less, as it should.
        ClassificationOutput::new(loss, log_probabilities, targets)
    }
}

/// Initializes parameters, and gives them a float type.
struct Cast(FloatDType);

impl ModuleMapper for Cast {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|tensor| {
            // Untracked first, or the cast would be part of the graph and the parameter no
            // longer a leaf, for which Burn keeps no gradient.
            let require_grad = tensor.is_require_grad();
            let leaf = tensor.detach().set_require_grad(false);
            leaf.cast(self.0).set_require_grad(require_grad)
        })
    }
}

struct FirstDtype(Option<FloatDType>);

impl ModuleVisitor for FirstDtype {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if self.0.is_none() {
            self.0 = Some(param.val().dtype().into());
        }
    }
}

/// What one training step took.
///
/// [`Classifier`] has an example.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepMeasure {
    /// Memory above the level just before forward.
    pub memory: StepMemory,
    /// Time for forward and backward, without the optimizer.
    pub duration: Duration,
}

/// Output of a training step.
///
/// [`Classifier`] has an example.
pub struct ClassificationStep {
    /// Loss of every digit, log-probabilities and classes.
    pub output: ClassificationOutput,
    /// What the step took.
    pub measure: StepMeasure,
}

impl ItemLazy for ClassificationStep {
    fn sync(self) -> Result<Self, ExecutionError> {
        Ok(Self {
            output: self.output.sync()?,
            measure: self.measure,
        })
    }
}

impl Adaptor<LossInput> for ClassificationStep {
    fn adapt(&self) -> LossInput {
        self.output.adapt()
    }
}

impl Adaptor<AccuracyInput> for ClassificationStep {
    fn adapt(&self) -> AccuracyInput {
        self.output.adapt()
    }
}

impl Adaptor<StepMeasure> for ClassificationStep {
    fn adapt(&self) -> StepMeasure {
        self.measure
    }
}

impl Adaptor<TallyInput> for ClassificationStep {
    fn adapt(&self) -> TallyInput {
        TallyInput {
            measure: Some(self.measure),
            ..self.output.adapt()
        }
    }
}

impl Adaptor<TallyInput> for ClassificationOutput {
    fn adapt(&self) -> TallyInput {
        TallyInput {
            losses: self.loss.clone(),
            scores: self.output.clone(),
            targets: self.targets.clone(),
            measure: None,
        }
    }
}

impl TrainStep for Classifier {
    type Input = MnistBatch;
    type Output = ClassificationStep;

    fn step(&self, batch: MnistBatch) -> TrainOutput<ClassificationStep> {
        let started = Instant::now();
        self.probe.begin();

        let ClassificationOutput {
            loss: losses,
            output,
            targets,
        } = self.classify(batch);
        let loss = losses.clone().mean();
        // The metrics run on another thread, for longer than the step: what they get must not
        // hold on to the graph.
        let output = ClassificationOutput::new(
            losses.without_autodiff(),
            output.without_autodiff(),
            targets.without_autodiff(),
        );
        self.probe.forward_end();

        let grads = self.gradients(loss);
        let memory = self.probe.backward_end();

        let measure = StepMeasure {
            memory,
            duration: started.elapsed(),
        };
        let item = ClassificationStep { output, measure };
        TrainOutput { grads, item }
    }
}

impl InferenceStep for Classifier {
    type Input = MnistBatch;
    type Output = ClassificationOutput;

    fn step(&self, batch: MnistBatch) -> ClassificationOutput {
        self.classify(batch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::collections::BTreeMap;

    use burn::data::dataloader::batcher::Batcher;
    use burn::tensor::{DType, Device};
    use burn_dataset::Dataset;

    use crate::batch::{DigitItem, MnistBatcher};
    use crate::data::generate;
    use crate::job::tests::job;
    use crate::job::{Job, Variant};
    use crate::model::ModelChoice;

    const HALVES: [FloatDType; 2] = [FloatDType::F16, FloatDType::BF16];

    fn classifier(model: ModelChoice, variant: Variant) -> Classifier {
        let job = Job {
            model,
            dropout: 0.0,
            ..job(1, 16)
        };
        job.classifier(variant, MemoryProbe::off())
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

    /// How far values are from what is wanted, as a part of the latter's 2-norm.
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
                let mixed = single.clone().with_activations(half);
                assert_eq!(mixed.dtype(), FloatDType::F32);
                let output = TrainStep::step(&mixed, batch(&mixed, 32));
                let loss = &output.item.output.loss;
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
        let mixed = single.clone().with_activations(FloatDType::F16);
        assert_near("f16", &gradients(&mixed), &wanted, 0.15);
    }

    #[test]
    fn running_statistics_in_mixed_precision_are_those_of_the_network() {
        for variant in [Variant::Fused, Variant::Unfused] {
            for half in HALVES {
                let single = classifier(ModelChoice::Resnet18, variant);
                // From the same start, without sharing it as clones do.
                let mixed = single.valid().train().with_activations(half);
                let statistics = [&single, &mixed].map(|classifier| {
                    TrainStep::step(classifier, batch(classifier, 4));
                    let Network::ResNet(net) = &classifier.net else {
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
}
