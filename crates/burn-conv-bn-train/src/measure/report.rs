//! Results as data: what `--json` writes.

use std::fmt;
use std::fs;
use std::path::Path;

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::data::CLASSES;
use crate::measure::history::{Epoch, Evaluation, StepRecord};
use crate::measure::memory::{StepMeasure, StepMemory};
use crate::measure::number;
use crate::measure::timeline::Timeline;

/// Version of Burn that this is built with: the one that the workspace pins.
pub const BURN_VERSION: &str = "0.22.1";

/// Version of the form of [`Report`]: another one where a field was removed or has another meaning.
pub const SCHEMA: u32 = 1;

/// Trained variants on the same data: what `mnist train --json` and `mnist compare --json` write.
///
/// A loss that is NaN or infinite is one of the texts `"NaN"`, `"Infinity"` and `"-Infinity"` in JSON.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
pub struct Report {
    /// [`SCHEMA`].
    pub schema: u32,
    /// `mnist`, `synthetic` or `custom`.
    pub dataset: String,
    /// Training digits seen an epoch.
    pub train_digits: usize,
    /// Test digits.
    pub test_digits: usize,
    /// The device, by the name of Burn's feature for it.
    pub device: String,
    /// Element type of images and activations. Where it is `F16` or `BF16`, parameters are `F32`;
    /// otherwise they are of this type, too.
    pub dtype: String,
    /// Digits a step.
    pub batch_size: usize,
    /// The network, by its name on the command line.
    pub model: String,
    /// The optimizer, by its name on the command line.
    pub optimizer: String,
    /// Variant of the norm, `burn` or `tutorial`.
    pub norm: String,
    /// Seed of weights, order, dropout and drawn digits.
    pub seed: u64,
    /// Threads of the CPU.
    pub threads: usize,
    /// Version of Burn.
    pub burn_version: String,
    /// Version of this crate.
    pub version: String,
    /// What was trained, in the order of the runs.
    pub variants: Vec<VariantReport>,
}

impl Report {
    /// Whether a regular file holds a report with the same epochs.
    pub(crate) fn is_in(&self, path: &Path) -> bool {
        let json = path.is_file().then(|| fs::read(path).ok()).flatten();
        let there: Option<Value> = json.and_then(|json| serde_json::from_slice(&json).ok());
        let epochs = |report: &Value| report["variants"][0]["epochs"].clone();
        let own = serde_json::to_value(self).ok();
        there.is_some() && there.as_ref().map(epochs) == own.as_ref().map(epochs)
    }

    /// Checks that no variant diverged.
    ///
    /// # Errors
    ///
    /// A message for people that names those that did.
    pub(crate) fn check_finite(&self) -> Result<()> {
        let diverged =
            |variant: &VariantReport| Some(format!("{} {}", variant.name, variant.diverged?));
        let diverged: Vec<String> = self.variants.iter().filter_map(diverged).collect();
        if !diverged.is_empty() {
            bail!(
                "{}: the loss is not a finite number any more; try a lower --lr",
                diverged.join(", ")
            );
        }
        Ok(())
    }
}

/// One trained variant.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
pub struct VariantReport {
    /// `fused`, `unfused` or `norm-conv`.
    pub name: String,
    /// The epochs that were finished, in order; with those of a run that was resumed. None of a variant
    /// that was measured and not trained.
    pub epochs: Vec<EpochReport>,
    /// Loss of every training step; with those of a run that was resumed.
    #[serde(with = "number::list")]
    pub step_losses: Vec<f64>,
    /// Median over full batches of the seconds that forward and backward took.
    pub step_seconds_median: f64,
    /// Bytes above the level before forward at its end, mean over full batches.
    pub forward_end_bytes: usize,
    /// Most bytes above that level at any moment of forward and backward, over all steps.
    pub peak_bytes: usize,
    /// Bytes that the convolution, norm and activation nodes list as saved for backward in a full
    /// batch, parameters left out.
    pub saved_bytes: usize,
    /// Whether the run was stopped before its end.
    pub interrupted: bool,
    /// Where the loss ceased to be a finite number, if it did.
    pub diverged: Option<Divergence>,
    /// Memory over one training step, if that was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeline: Option<Timeline>,
}

/// One finished epoch.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, PartialEq)]
pub struct EpochReport {
    /// Mean loss of a training digit over the epoch, before each step.
    #[serde(with = "number")]
    pub train_loss: f64,
    /// Mean loss of a test digit after the epoch.
    #[serde(with = "number")]
    pub test_loss: f64,
    /// Fraction of the test digits classified correctly after the epoch.
    #[serde(with = "number")]
    pub test_accuracy: f64,
}

/// Where a loss ceased to be a finite number.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, PartialEq, Eq)]
pub struct Divergence {
    /// The epoch, from 1.
    pub epoch: usize,
    /// The training step in it, from 1; none if all were finite, and the test after it was not.
    pub step: Option<usize>,
}

impl Divergence {
    /// The first in some epochs.
    pub(crate) fn of(epochs: &[Epoch]) -> Option<Self> {
        let diverged = |evaluation: &Evaluation| !evaluation.loss_sum.is_finite();
        (1..)
            .zip(epochs)
            .find_map(|(epoch, Epoch { train, test })| {
                let mut steps = train.steps.iter();
                let step = steps.position(|step| diverged(&step.evaluation));
                let step = step.map(|index| index + 1);
                (step.is_some() || test.as_ref().is_some_and(diverged))
                    .then_some(Self { epoch, step })
            })
    }
}

impl fmt::Display for Divergence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { epoch, step } = self;
        match step {
            Some(step) => write!(f, "diverged in epoch {epoch} at step {step}"),
            None => write!(f, "diverged in epoch {epoch}, in the test"),
        }
    }
}

/// Predictions of a trained network: what `mnist predict --json` writes.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
pub struct PredictionReport {
    /// The network, by its name on the command line.
    pub model: String,
    /// `fused`, `folded` or `unfused`.
    pub form: String,
    /// Element type of images and activations. Where it is `F16` or `BF16`, parameters are `F32`;
    /// otherwise they are of this type, too.
    pub dtype: String,
    /// Epochs that it was trained for.
    pub epoch: usize,
    /// The test digits: `mnist`, `synthetic` or `custom`. Those that were classified, or those
    /// whose statistics the pictures were normalized with; none where there were neither.
    pub dataset: Option<String>,
    /// Results on the test set, if that was asked for.
    pub test: Option<TestReport>,
    /// Predictions for the pictures, in the order of their names.
    pub images: Vec<ImageReport>,
    /// Pictures that could not be read.
    pub skipped: Vec<SkippedReport>,
}

/// Predictions for labelled digits.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
pub struct TestReport {
    /// Digits.
    pub digits: usize,
    /// Those classified correctly.
    pub correct: usize,
    /// Their fraction; NaN of no digits.
    #[serde(with = "number")]
    pub accuracy: f64,
    /// Mean loss of a digit.
    #[serde(with = "number")]
    pub average_loss: f64,
    /// Confusion matrix: numbers of digits by class, then by prediction.
    pub confusion: [[usize; CLASSES]; CLASSES],
    /// The misclassified digits, the highest loss first.
    pub mistakes: Vec<MistakeReport>,
}

/// A misclassified digit.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, PartialEq)]
pub struct MistakeReport {
    /// Position in the test set, from 0.
    pub index: usize,
    /// Its class.
    pub label: u8,
    /// The predicted class.
    pub prediction: u8,
    /// Probability of that, from 0 to 1.
    pub probability: f64,
    /// Loss: minus the logarithm of the label's probability.
    pub loss: f64,
}

/// Prediction for a picture.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
pub struct ImageReport {
    /// Name of its file.
    pub file: String,
    /// The predicted class.
    pub prediction: u8,
    /// Probability of that, from 0 to 1.
    pub probability: f64,
    /// Probabilities of all classes.
    pub probabilities: [f64; CLASSES],
}

/// A picture that could not be read.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
pub struct SkippedReport {
    /// Name of its file.
    pub file: String,
    /// Why.
    pub reason: String,
}

/// Median time and mean memory of the steps of `batch_size` digits, or of all where none has that size; the
/// peak of all steps.
pub(crate) fn summary(all: &[StepRecord], batch_size: usize) -> StepMeasure {
    let full = |step: &&StepRecord| step.evaluation.total == batch_size;
    let mut steps: Vec<&StepRecord> = all.iter().filter(full).collect();
    if steps.is_empty() {
        steps = all.iter().collect();
    }
    let Some(last) = steps.len().checked_sub(1) else {
        return StepMeasure::default();
    };
    steps.sort_by_key(|step| step.measure.duration);
    let duration = |index: usize| steps[index].measure.duration;
    let forward_ends = steps
        .iter()
        .map(|step| step.measure.memory.forward_end_bytes);
    let peaks = all.iter().map(|step| step.measure.memory.peak_bytes);
    StepMeasure {
        duration: (duration(last / 2) + duration(last.div_ceil(2))) / 2,
        memory: StepMemory {
            forward_end_bytes: forward_ends.sum::<usize>() / steps.len(),
            peak_bytes: peaks.max().unwrap_or(0),
        },
    }
}

#[cfg(test)]
mod tests;
