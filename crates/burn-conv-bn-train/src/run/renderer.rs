//! Progress as plain lines, for output that is not a terminal.

use std::collections::HashMap;
use std::error::Error;
use std::fmt::Arguments;
use std::io::{Stdout, Write};

use burn::train::LearnerSummary;
use burn::train::logger::{EvaluationProgressLogger, TrainingProgressLogger};
use burn::train::metric::{MetricAttributes, MetricDefinition, MetricId, NumericEntry};
use burn::train::renderer::{
    EvaluationName, MetricState, MetricsRenderer, MetricsRendererEvaluation,
    MetricsRendererTraining,
};

use crate::run::dashboard::Dashboard;

/// The metric shown on the lines of a training epoch: the name of Burn's `LossMetric`.
const LOSS: &str = "Loss";

/// Prints the tutorial's lines while it trains, and one line at the end of every epoch.
///
/// ```text
/// Train Epoch: 1 [4096/60000 (7%)]    Loss: 7.435781
/// ```
///
/// As in the tutorial, the loss is that of one batch, the numbers are those before it, and the
/// percentage is that of the batches. Epochs count from 1, the tutorial's from 0.
///
/// Nothing is printed about an evaluation: its caller has the result. A failure to print
/// is ignored; it is no reason to end a training.
///
/// ```
/// use burn::train::renderer::MetricsRenderer;
/// use burn_conv_bn_train::renderer::LineRenderer;
///
/// // For `SupervisedTraining::renderer`: a line for every 16th batch.
/// let renderer: Box<dyn MetricsRenderer> = Box::new(LineRenderer::new(16));
/// # drop(renderer);
/// ```
pub struct LineRenderer<W = Stdout> {
    out: W,
    log_interval: usize,
    last_line: bool,
    /// Names and units.
    metrics: HashMap<MetricId, (String, String)>,
    epochs: usize,
    /// The epoch that is running, from 1 as Burn counts.
    epoch: usize,
    split: Progress,
    /// Loss of the last training batch.
    loss: Option<f64>,
    train: Vec<String>,
    valid: Vec<String>,
}
/// Progress of the running split.
#[derive(Default)]
struct Progress {
    training: bool,
    total_items: usize,
    /// Before the batch that is shown next.
    items: usize,
    batches: usize,
    /// The first batch's: all but the last have it.
    batch_size: usize,
}

impl LineRenderer {
    /// Prints a line on standard output for every `log_interval`-th training batch, the first
    /// among them; for none if that is 0.
    pub fn new(log_interval: usize) -> Self {
        Self::with_output(std::io::stdout(), log_interval)
    }
}

impl<W: Write> LineRenderer<W> {
    /// As [`new`](LineRenderer::new), but prints to `out`.
    pub fn with_output(out: W, log_interval: usize) -> Self {
        Self {
            out,
            log_interval,
            last_line: false,
            metrics: HashMap::new(),
            epochs: 0,
            epoch: 1,
            split: Progress::default(),
            loss: None,
            train: Vec::new(),
            valid: Vec::new(),
        }
    }

    /// Also prints a line at the end of the items of an epoch, where the tutorial prints none.
    pub fn with_last_line(mut self) -> Self {
        self.last_line = true;
        self
    }

    fn line(&mut self, line: Arguments<'_>) {
        // Flushed, or a pipe would show a long training in jumps.
        let _ = writeln!(self.out, "{line}").and_then(|()| self.out.flush());
    }

    /// The final value of an epoch, as text; none if the state is that of a batch.
    fn summary(&self, state: &MetricState) -> Option<String> {
        let MetricState::Numeric(entry, Some(NumericEntry::Final(value))) = state else {
            return None;
        };
        let (name, unit) = self.metrics.get(&entry.metric_id)?;
        Some(format!("{name} {value:.4}{unit}"))
    }
}

impl<W: Write + Send + Sync> MetricsRendererTraining for LineRenderer<W> {
    fn update_train(&mut self, state: MetricState) {
        if let Some(summary) = self.summary(&state) {
            self.train.push(summary);
        } else if let MetricState::Numeric(entry, Some(value)) = state
            && let Some((name, _)) = self.metrics.get(&entry.metric_id)
            && name == LOSS
        {
            self.loss = Some(value.current());
        }
    }

    fn update_valid(&mut self, state: MetricState) {
        self.valid.extend(self.summary(&state));
    }

    fn on_train_end(&mut self, summary: Option<LearnerSummary>) -> Result<(), Box<dyn Error>> {
        if let Some(summary) = summary {
            self.line(format_args!("{summary}"));
        }
        Ok(())
    }
}

impl<W: Write + Send> TrainingProgressLogger for LineRenderer<W> {
    fn start(
        &mut self,
        total_epochs: usize,
        starting_epoch: usize,
        _total_items: Option<usize>,
        _label: Option<&str>,
    ) {
        self.epochs = total_epochs;
        self.epoch = starting_epoch;
    }

    fn update_epoch(&mut self, epoch: usize) {
        let train = std::mem::take(&mut self.train).join(", ");
        let valid = std::mem::take(&mut self.valid).join(", ");
        let epochs = self.epochs;
        self.line(format_args!(
            "Epoch {epoch}/{epochs}: train {train}; test {valid}"
        ));
        self.epoch = epoch + 1;
    }

    fn start_split(&mut self, split: &str, total_items: usize) {
        self.split = Progress {
            training: split == "train",
            total_items,
            ..Progress::default()
        };
        self.loss = None;
    }

    fn update_split(&mut self, items_processed: usize) {
        let split = &mut self.split;
        if items_processed <= split.items {
            // Another device of the same step, which reports the items of all; or a device that
            // outlasts the others, which reports its own.
            return;
        }
        if split.batches == 0 {
            split.batch_size = items_processed;
        }
        let (before, batch) = (split.items, split.batches);
        split.items = items_processed;
        split.batches += 1;

        let shown = split.training && batch.checked_rem(self.log_interval) == Some(0);
        if let (true, Some(loss)) = (shown, self.loss.take()) {
            let batch_size = split.batch_size.max(1);
            let (epoch, total) = (self.epoch, split.total_items);
            // Not of the steps, which are more where devices have unequal shares.
            let done = before.div_ceil(batch_size) as f64 / total.div_ceil(batch_size) as f64;
            let percent = 100.0 * done;
            self.line(format_args!(
                "Train Epoch: {epoch} [{before}/{total} ({percent:.0}%)]\tLoss: {loss:.6}"
            ));
        }
    }

    fn end_split(&mut self) {
        let split = &self.split;
        if self.last_line && split.training {
            let (items, total) = (split.items, split.total_items);
            let percent = 100.0 * items as f64 / total.max(1) as f64;
            let epoch = self.epoch;
            self.line(format_args!(
                "Train Epoch: {epoch} [{items}/{total} ({percent:.0}%)]"
            ));
        }
    }

    fn end(&mut self) {}

    fn log_event_training(&mut self, _event: String) {}
}

/// Implements what Burn's evaluator calls on a renderer as nothing: a training's ends before it.
macro_rules! ignore_evaluations {
    ($renderer:ty $(, $writer:ident)?) => {
        impl$(<$writer: Write + Send + Sync>)? MetricsRendererEvaluation for $renderer {
            fn update_test(&mut self, _name: EvaluationName, _state: MetricState) {}
        }

        impl$(<$writer: Write + Send + Sync>)? EvaluationProgressLogger for $renderer {
            fn start_global_progress(&mut self, _total_tests: usize) {}

            fn start_test(&mut self, _name: &str, _total_items: usize) {}

            fn update_test_progress(&mut self, _items_processed: usize) {}

            fn end_test(&mut self) {}

            fn end_global_progress(&mut self) {}

            fn log_event_evaluation(&mut self, _event: String) {}
        }
    };
}

ignore_evaluations!(LineRenderer<W>, W);
ignore_evaluations!(Dashboard);

impl<W: Write + Send + Sync> MetricsRenderer for LineRenderer<W> {
    fn manual_close(&mut self) {}

    fn register_metric(&mut self, definition: MetricDefinition) {
        let unit = match &definition.attributes {
            MetricAttributes::Numeric(attributes) => attributes.unit.as_deref(),
            MetricAttributes::None => None,
        };
        let unit = unit.map(|unit| format!(" {unit}")).unwrap_or_default();
        let name = definition.name.to_string();
        self.metrics.insert(definition.metric_id, (name, unit));
    }
}

#[cfg(test)]
mod tests;
