//! Metrics of a training step, and exact totals of a whole set.

use std::fmt;
use std::ops::AddAssign;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn::tensor::{Int, Tensor, TensorReadError};
use burn::train::metric::{
    Metric, MetricAttributes, MetricMetadata, MetricName, Numeric, NumericAttributes, NumericEntry,
    SerializedEntry, format_float,
};
use serde::{Deserialize, Serialize};

use crate::measure::memory::StepMeasure;
use crate::measure::number;
use crate::print::loss;

const MIB: f64 = (1 << 20) as f64;

/// Shows one quantity of every training step, and of an epoch their mean or maximum.
#[derive(Clone)]
pub(crate) struct StepMetric {
    name: MetricName,
    unit: &'static str,
    /// Digits after the point.
    precision: usize,
    of: fn(&StepMeasure) -> f64,
    reduction: Reduction,
    steps: Steps,
}

#[derive(Clone, Copy)]
enum Reduction {
    Mean,
    Maximum,
}

/// The steps of an epoch so far.
#[derive(Clone, Copy)]
struct Steps {
    count: usize,
    sum: f64,
    maximum: f64,
    last: f64,
}

impl Steps {
    const NONE: Self = Self {
        count: 0,
        sum: 0.0,
        maximum: f64::NAN,
        last: f64::NAN,
    };
}

impl StepMetric {
    /// Memory in use at the end of forward; of an epoch the mean.
    pub(crate) fn forward_memory() -> Self {
        Self::new("Memory end of forward", "MiB", 2, Reduction::Mean, |step| {
            step.memory.forward_end_bytes as f64 / MIB
        })
    }

    /// Peak of memory in forward and backward; of an epoch the maximum, as in a
    /// [report](crate::measure::report::VariantReport::peak_bytes).
    pub(crate) fn peak_memory() -> Self {
        Self::new("Memory peak", "MiB", 2, Reduction::Maximum, |step| {
            step.memory.peak_bytes as f64 / MIB
        })
    }

    /// Time for forward and backward; of an epoch the mean.
    pub(crate) fn time() -> Self {
        Self::new("Step time", "s", 3, Reduction::Mean, |step| {
            step.duration.as_secs_f64()
        })
    }

    fn new(
        name: &str,
        unit: &'static str,
        precision: usize,
        reduction: Reduction,
        of: fn(&StepMeasure) -> f64,
    ) -> Self {
        Self {
            name: Arc::new(name.to_string()),
            unit,
            precision,
            of,
            reduction,
            steps: Steps::NONE,
        }
    }

    fn epoch(&self) -> f64 {
        match self.reduction {
            Reduction::Mean => self.steps.sum / self.steps.count as f64,
            Reduction::Maximum => self.steps.maximum,
        }
    }

    fn entry(&self, value: &NumericEntry) -> SerializedEntry {
        let text = |value| format!("{} {}", format_float(value, self.precision), self.unit);
        let (epoch, batch) = (text(self.epoch()), text(self.steps.last));
        SerializedEntry::new(format!("epoch {epoch} - batch {batch}"), value.serialize())
    }
}

impl Metric for StepMetric {
    type Input = StepMeasure;

    fn name(&self) -> MetricName {
        self.name.clone()
    }

    fn attributes(&self) -> MetricAttributes {
        NumericAttributes {
            unit: Some(self.unit.to_string()),
            higher_is_better: false,
        }
        .into()
    }

    fn update(
        &mut self,
        measure: &StepMeasure,
        _metadata: &MetricMetadata,
    ) -> Result<SerializedEntry, TensorReadError> {
        let value = (self.of)(measure);
        self.steps = Steps {
            count: self.steps.count + 1,
            sum: self.steps.sum + value,
            maximum: self.steps.maximum.max(value),
            last: value,
        };
        Ok(self.entry(&aggregated(value, 1)))
    }

    fn compute(&mut self) -> Result<SerializedEntry, TensorReadError> {
        Ok(self.entry(&self.final_value()))
    }

    fn clear(&mut self) {
        self.steps = Steps::NONE;
    }
}

impl Numeric for StepMetric {
    fn value(&self) -> Option<NumericEntry> {
        Some(aggregated(self.steps.last, 1))
    }

    fn running_value(&self) -> Option<NumericEntry> {
        Some(aggregated(self.epoch(), self.steps.count))
    }

    fn final_value(&self) -> NumericEntry {
        NumericEntry::Final(self.epoch())
    }
}

fn aggregated(aggregated_value: f64, count: usize) -> NumericEntry {
    NumericEntry::Aggregated {
        aggregated_value,
        count,
    }
}

/// How well a network does on a set of digits.
///
/// Shown as in the tutorial: `Average loss: 0.4197, Accuracy: 8681/10000 (87%)`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Evaluation {
    /// Sum of the digits' losses.
    #[serde(with = "number")]
    pub(crate) loss_sum: f64,
    /// Digits classified correctly.
    pub(crate) correct: usize,
    /// Digits seen.
    pub(crate) total: usize,
}

impl Evaluation {
    /// Evaluates one batch, given the loss of every digit. Sums in double precision.
    ///
    /// # Errors
    ///
    /// [`TensorReadError`] if the device fails to compute or to hand out the values.
    fn of(
        losses: Tensor<1>,
        scores: Tensor<2>,
        targets: Tensor<1, Int>,
    ) -> Result<Self, TensorReadError> {
        let [total] = targets.dims();
        let hits = scores.argmax(1).squeeze_dim::<1>(1).equal(targets);
        let correct = hits.int().sum().try_into_scalar::<u64>()?;
        let losses = losses.try_into_vec_as::<f64>()?;
        Ok(Self {
            loss_sum: losses.iter().sum(),
            correct: correct as usize,
            total,
        })
    }

    /// Mean loss of a digit; not a number if there are none.
    pub(crate) fn average_loss(&self) -> f64 {
        self.loss_sum / self.total as f64
    }

    /// Fraction of the digits classified correctly; not a number if there are none.
    pub(crate) fn accuracy(&self) -> f64 {
        self.correct as f64 / self.total as f64
    }
}

impl AddAssign for Evaluation {
    fn add_assign(&mut self, other: Self) {
        self.loss_sum += other.loss_sum;
        self.correct += other.correct;
        self.total += other.total;
    }
}

impl fmt::Display for Evaluation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Average loss: {}, Accuracy: {}/{} ({:.0}%)",
            loss(self.average_loss()),
            self.correct,
            self.total,
            100.0 * self.accuracy()
        )
    }
}

/// One training step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct StepRecord {
    /// Loss and accuracy of the batch, before the step.
    pub(crate) evaluation: Evaluation,
    /// Memory and time.
    pub(crate) measure: StepMeasure,
}

/// One pass over a set.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct SplitRecord {
    /// Totals over the digits seen.
    pub(crate) evaluation: Evaluation,
    /// The training steps; none if the pass was an evaluation.
    pub(crate) steps: Vec<StepRecord>,
}

/// Results that a [`TallyMetric`] collects. Clones share them.
///
/// Burn hands metrics over to a thread of its own and drops them there; what they have seen
/// comes back through this.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tally {
    passes: Arc<Mutex<Passes>>,
}

#[derive(Debug, Default)]
struct Passes {
    running: SplitRecord,
    finished: Vec<SplitRecord>,
}

impl Tally {
    /// An empty tally.
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// The passes that have ended, oldest first.
    pub(crate) fn finished(&self) -> Vec<SplitRecord> {
        self.lock().finished.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Passes> {
        // No update panics half-way, so that what a poisoned lock guards is sound.
        self.passes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Input of [`TallyMetric`].
///
pub(crate) struct TallyInput {
    /// Loss of every digit, `[N]`.
    pub(crate) losses: Tensor<1>,
    /// Scores of the classes, `[N, classes]`.
    pub(crate) scores: Tensor<2>,
    /// Classes, `[N]`.
    pub(crate) targets: Tensor<1, Int>,
    /// Memory and time, if it was a training step.
    pub(crate) measure: Option<StepMeasure>,
}

/// Collects exact totals and all steps into a [`Tally`].
///
/// A text metric: it also shows the running totals.
#[derive(Clone)]
pub(crate) struct TallyMetric {
    name: MetricName,
    tally: Tally,
}

impl TallyMetric {
    /// A metric that collects into `tally`.
    pub(crate) fn new(tally: Tally) -> Self {
        Self {
            name: Arc::new("Totals".to_string()),
            tally,
        }
    }
}

impl Metric for TallyMetric {
    type Input = TallyInput;

    fn name(&self) -> MetricName {
        self.name.clone()
    }

    fn update(
        &mut self,
        input: &TallyInput,
        _metadata: &MetricMetadata,
    ) -> Result<SerializedEntry, TensorReadError> {
        let batch = Evaluation::of(
            input.losses.clone(),
            input.scores.clone(),
            input.targets.clone(),
        )?;

        let mut passes = self.tally.lock();
        passes.running.evaluation += batch;
        if let Some(measure) = input.measure {
            passes.running.steps.push(StepRecord {
                evaluation: batch,
                measure,
            });
        }
        Ok(entry(&passes.running.evaluation))
    }

    fn compute(&mut self) -> Result<SerializedEntry, TensorReadError> {
        let mut passes = self.tally.lock();
        let finished = std::mem::take(&mut passes.running);
        let entry = entry(&finished.evaluation);
        passes.finished.push(finished);
        Ok(entry)
    }

    fn clear(&mut self) {
        self.tally.lock().running = SplitRecord::default();
    }
}

fn entry(evaluation: &Evaluation) -> SerializedEntry {
    let text = evaluation.to_string();
    SerializedEntry::new(text.clone(), text)
}

#[cfg(test)]
mod tests;
