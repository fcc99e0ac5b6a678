//! Metrics of a training, as Burn's learner takes them.

use std::sync::Arc;

use burn::tensor::{Int, Tensor, TensorReadError};
use burn::train::metric::{
    Metric, MetricAttributes, MetricMetadata, MetricName, Numeric, NumericAttributes, NumericEntry,
    SerializedEntry, format_float,
};

use crate::measure::history::{Evaluation, History, SplitRecord, StepRecord};
use crate::measure::memory::StepMeasure;

const MIB: f64 = (1 << 20) as f64;

/// Shows one quantity of every training step, and of an epoch their mean or maximum.
#[derive(Clone)]
pub(crate) struct StepMetric {
    name: &'static str,
    unit: &'static str,
    /// Digits after the point.
    precision: usize,
    of: fn(&StepMeasure) -> f64,
    /// Of an epoch's steps.
    reduce: fn(&[f64]) -> f64,
    /// The steps of an epoch so far.
    steps: Vec<f64>,
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

fn maximum(values: &[f64]) -> f64 {
    values.iter().copied().fold(f64::NAN, f64::max)
}

impl StepMetric {
    /// Memory in use at the end of forward; of an epoch the mean.
    pub(crate) fn forward_memory() -> Self {
        Self {
            name: "Memory end of forward",
            unit: "MiB",
            precision: 2,
            of: |step| step.memory.forward_end_bytes as f64 / MIB,
            reduce: mean,
            steps: Vec::new(),
        }
    }

    /// Peak of memory in forward and backward; of an epoch the maximum, as in a
    /// [report](crate::measure::report::VariantReport::peak_bytes).
    pub(crate) fn peak_memory() -> Self {
        Self {
            name: "Memory peak",
            of: |step| step.memory.peak_bytes as f64 / MIB,
            reduce: maximum,
            ..Self::forward_memory()
        }
    }

    /// Time for forward and backward; of an epoch the mean.
    pub(crate) fn time() -> Self {
        Self {
            name: "Step time",
            unit: "s",
            precision: 3,
            of: |step| step.duration.as_secs_f64(),
            ..Self::forward_memory()
        }
    }

    fn epoch(&self) -> f64 {
        (self.reduce)(&self.steps)
    }

    fn last(&self) -> f64 {
        self.steps.last().copied().unwrap_or(f64::NAN)
    }

    fn entry(&self, value: &NumericEntry) -> SerializedEntry {
        let text = |value| format!("{} {}", format_float(value, self.precision), self.unit);
        let (epoch, batch) = (text(self.epoch()), text(self.last()));
        SerializedEntry::new(format!("epoch {epoch} - batch {batch}"), value.serialize())
    }
}

impl Metric for StepMetric {
    type Input = StepMeasure;

    fn name(&self) -> MetricName {
        Arc::new(self.name.to_string())
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
        self.steps.push(value);
        Ok(self.entry(&aggregated(value, 1)))
    }

    fn compute(&mut self) -> Result<SerializedEntry, TensorReadError> {
        Ok(self.entry(&self.final_value()))
    }

    fn clear(&mut self) {
        self.steps.clear();
    }
}

impl Numeric for StepMetric {
    fn value(&self) -> Option<NumericEntry> {
        Some(aggregated(self.last(), 1))
    }

    fn running_value(&self) -> Option<NumericEntry> {
        Some(aggregated(self.epoch(), self.steps.len()))
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

/// Output of a step.
#[derive(Clone, Debug)]
pub struct StepOutput {
    /// Loss of every digit, `[N]`.
    pub loss: Tensor<1>,
    /// Log-probabilities of the classes, `[N, classes]`.
    pub scores: Tensor<2>,
    /// Classes, `[N]`.
    pub targets: Tensor<1, Int>,
    /// Memory and time, if it was a training step.
    pub measure: Option<StepMeasure>,
}

impl StepOutput {
    /// The same without the tensors' graphs, which would be kept for as long as it is.
    pub(crate) fn without_graph(self) -> Self {
        Self {
            loss: self.loss.without_autodiff(),
            scores: self.scores.without_autodiff(),
            targets: self.targets.without_autodiff(),
            measure: self.measure,
        }
    }
}

/// Collects exact totals and all steps into a [`History`]: at the end of a training pass a new epoch,
/// at the end of a test the last epoch's.
///
/// A text metric: it also shows the running totals.
#[derive(Clone)]
pub(crate) struct TallyMetric {
    history: History,
    is_test: bool,
    running: SplitRecord,
}

impl TallyMetric {
    pub(crate) fn train(history: &History) -> Self {
        Self {
            history: history.clone(),
            is_test: false,
            running: SplitRecord::default(),
        }
    }

    pub(crate) fn test(history: &History) -> Self {
        Self {
            is_test: true,
            ..Self::train(history)
        }
    }

    fn entry(&self) -> SerializedEntry {
        let text = self.running.evaluation.to_string();
        SerializedEntry::new(text.clone(), text)
    }
}

impl Metric for TallyMetric {
    type Input = StepOutput;

    fn name(&self) -> MetricName {
        Arc::new("Totals".to_string())
    }

    fn update(
        &mut self,
        input: &StepOutput,
        _metadata: &MetricMetadata,
    ) -> Result<SerializedEntry, TensorReadError> {
        let evaluation = Evaluation::of(
            input.loss.clone(),
            input.scores.clone(),
            input.targets.clone(),
        )?;
        self.running.evaluation += evaluation;
        let step = |measure| StepRecord {
            evaluation,
            measure,
        };
        self.running.steps.extend(input.measure.map(step));
        Ok(self.entry())
    }

    fn compute(&mut self) -> Result<SerializedEntry, TensorReadError> {
        let entry = self.entry();
        let pass = std::mem::take(&mut self.running);
        if self.is_test {
            self.history.tested(pass.evaluation);
        } else {
            self.history.trained(pass);
        }
        Ok(entry)
    }

    fn clear(&mut self) {
        self.running = SplitRecord::default();
    }
}

#[cfg(test)]
mod tests;
