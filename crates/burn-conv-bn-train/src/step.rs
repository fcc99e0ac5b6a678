//! What Burn's learner trains: a network with its loss and its memory probe.

use std::time::Instant;

use anyhow::{Result, ensure};
use burn::backend::ExecutionError;
use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::store::ModuleRecord;
use burn::tensor::{FloatDType, Tensor};
use burn::train::metric::{AccuracyInput, Adaptor, ItemLazy, LossInput};
use burn::train::{InferenceStep, TrainOutput, TrainStep};
use burn_conv_bn::ConvBnModule;
use burn_conv_bn_models::AnyNetwork;
use burn_conv_bn_models::optim::LossScale;

use crate::data::MnistBatch;
use crate::measure::memory::{MemoryProbe, StepMeasure};
use crate::measure::metrics::StepOutput;
use crate::model::forward;
use crate::precision::Precision;

/// A network that classifies digits, as Burn trains it.
///
/// Its parameters, with their gradients, are of one type, [`dtype`](Self::dtype). In mixed precision
/// its blocks compute in another, [`activations`](Self::activations), with their weights cast to that
/// in each forward pass.
#[derive(Module, Debug)]
pub struct Classifier {
    /// The network; its outputs are log-probabilities.
    pub(crate) net: AnyNetwork,
    #[module(skip)]
    probe: MemoryProbe,
    #[module(skip)]
    activations: FloatDType,
}

impl Classifier {
    /// Makes `net` trainable. In mixed precision the loss is scaled for the backward pass by the
    /// [`LossScale`] of the activations' type.
    ///
    /// All parameters are initialized here, in the order of the module's fields. Left alone,
    /// Burn initializes each when it is first used, and two forms of a network that use theirs
    /// in a different order would start from different weights. Seed the device just before.
    pub(crate) fn new(net: AnyNetwork, probe: MemoryProbe, precision: Precision) -> Self {
        Self {
            net: net.map(&mut Cast(precision.parameters())),
            probe,
            activations: precision.activations(),
        }
    }

    /// The same with the parameters of a record.
    ///
    /// # Errors
    ///
    /// If the record is of another network or of another type.
    pub(crate) fn restored(self, record: ModuleRecord) -> Result<Self> {
        let expected = self.dtype();
        let restored = self.try_load_record(record)?;
        let found = restored.dtype();
        ensure!(
            found == expected,
            "it is of type {found:?}, the run of type {expected:?}"
        );
        Ok(restored)
    }

    /// The float type of the parameters.
    pub(crate) fn dtype(&self) -> FloatDType {
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
    pub(crate) fn computing(&self) -> AnyNetwork {
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

    pub(crate) fn classify(&self, batch: MnistBatch) -> StepOutput {
        let MnistBatch { images, targets } = batch;
        let scores = forward(&self.computing(), images);
        let loss = scores
            .clone()
            .gather(1, targets.clone().unsqueeze_dim::<2>(1))
            .squeeze_dim::<1>(1)
            .neg();
        // One loss per digit: Burn's `LossMetric` weights what it gets by the number of
        // elements, so that a smaller last batch counts for less, as it should.
        StepOutput {
            loss,
            scores,
            targets,
            measure: None,
        }
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

impl ItemLazy for StepOutput {
    fn sync(self) -> Result<Self, ExecutionError> {
        self.loss.device().flush()?;
        Ok(self.without_graph())
    }
}

impl Adaptor<LossInput> for StepOutput {
    fn adapt(&self) -> LossInput {
        LossInput::new(self.loss.clone())
    }
}

impl Adaptor<AccuracyInput> for StepOutput {
    fn adapt(&self) -> AccuracyInput {
        AccuracyInput::new(self.scores.clone(), self.targets.clone())
    }
}

impl Adaptor<StepMeasure> for StepOutput {
    fn adapt(&self) -> StepMeasure {
        self.measure.expect("a training step is measured")
    }
}

impl Adaptor<Self> for StepOutput {
    fn adapt(&self) -> Self {
        self.clone()
    }
}

impl TrainStep for Classifier {
    type Input = MnistBatch;
    type Output = StepOutput;

    fn step(&self, batch: MnistBatch) -> TrainOutput<StepOutput> {
        let started = Instant::now();
        self.probe.begin();

        let output = self.classify(batch);
        let loss = output.loss.clone().mean();
        // The metrics run on another thread, for longer than the step.
        let mut item = output.without_graph();
        self.probe.forward_end();

        let grads = self.gradients(loss);
        let memory = self.probe.backward_end();
        let duration = started.elapsed();
        item.measure = Some(StepMeasure { memory, duration });
        TrainOutput { grads, item }
    }
}

impl InferenceStep for Classifier {
    type Input = MnistBatch;
    type Output = StepOutput;

    fn step(&self, batch: MnistBatch) -> StepOutput {
        self.classify(batch)
    }
}

#[cfg(test)]
mod tests;
