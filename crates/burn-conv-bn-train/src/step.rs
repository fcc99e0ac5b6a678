//! What Burn's learner trains: a network with its loss and its memory probe.

use std::time::{Duration, Instant};

use burn::backend::ExecutionError;
use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{FloatDType, Tensor};
use burn::train::metric::{AccuracyInput, Adaptor, ItemLazy, LossInput};
use burn::train::{ClassificationOutput, InferenceStep, TrainOutput, TrainStep};

use crate::batch::MnistBatch;
use crate::memory::{MemoryProbe, StepMemory};
use crate::metrics::TallyInput;
use crate::model::Network;

/// A network that classifies digits, as Burn trains it.
#[derive(Module, Debug)]
pub struct Classifier {
    /// The network; its outputs are log-probabilities.
    pub net: Network,
    #[module(skip)]
    probe: MemoryProbe,
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
        }
    }

    /// The float type of the parameters, which a batch's images must have.
    pub fn dtype(&self) -> FloatDType {
        let mut first = FirstDtype(None);
        self.visit(&mut first);
        first.0.expect("a network has parameters")
    }

    pub(crate) fn classify(&self, batch: MnistBatch) -> ClassificationOutput {
        let MnistBatch { images, targets } = batch;
        let log_probabilities = self.net.forward(images);
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
#[derive(Clone, Copy, Debug)]
pub struct StepMeasure {
    /// Memory above the level just before forward.
    pub memory: StepMemory,
    /// Time for forward and backward, without the optimizer.
    pub duration: Duration,
}

/// Output of a training step.
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

        let gradients = loss.backward();
        let memory = self.probe.backward_end();

        let measure = StepMeasure {
            memory,
            duration: started.elapsed(),
        };
        TrainOutput::new(self, gradients, ClassificationStep { output, measure })
    }
}

impl InferenceStep for Classifier {
    type Input = MnistBatch;
    type Output = ClassificationOutput;

    fn step(&self, batch: MnistBatch) -> ClassificationOutput {
        self.classify(batch)
    }
}
