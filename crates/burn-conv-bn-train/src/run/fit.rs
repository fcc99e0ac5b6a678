//! Training through Burn's `SupervisedTraining`.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail, ensure};
use burn::lr_scheduler::module_lr_scheduler::ModuleLrScheduler;
use burn::lr_scheduler::step::StepLrSchedulerConfig;
use burn::train::logger::InMemoryMetricLogger;
use burn::train::metric::{AccuracyMetric, LossMetric};
use burn::train::{ExecutionStrategy, Interrupter, Interruption, Learner, SupervisedTraining};
use burn_conv_bn_memory::CountingAllocator;

use crate::choice::Choice;
use crate::data::{BatchLoader, Digits, EpochLoader, MnistData, test_loader};
use crate::measure::history::{Epoch, Evaluation, History, StepRecord};
use crate::measure::memory::MemoryProbe;
use crate::measure::metrics::{StepMetric, TallyMetric};
use crate::measure::report::{Divergence, EpochReport, VariantReport, summary};
use crate::persist::checkpoint::{self, Records, Set, Store, with_checkpoints};
use crate::persist::run_file::RunFile;
use crate::run::dashboard::Dashboard;
use crate::run::early_stop::{EpochEnd, is_exhausted};
use crate::run::folder::{RunFolder, cannot_write};
use crate::run::job::{Job, Variant};
use crate::run::renderer::LineRenderer;
use crate::step::Classifier;

/// How a run is carried out, besides what it computes.
#[derive(Clone)]
pub(crate) struct RunOptions {
    /// Where its checkpoints and its [`RUN_FILE`](crate::persist::run_file::RUN_FILE) go, if it has any.
    pub(crate) folder: Option<(RunFolder, RunFile)>,
    /// Stop when the test loss has not improved for so many epochs.
    pub(crate) patience: Option<usize>,
    /// Show Burn's dashboard if standard input and output are a terminal that can show it.
    pub(crate) dashboard: bool,
    /// Stops the run after the batch that is running.
    pub(crate) interrupter: Interrupter,
}

/// A finished or interrupted training.
#[derive(Debug)]
pub(crate) struct FitOutcome {
    /// The epochs that were begun, the first one first; with those of the run that was resumed.
    pub(crate) epochs: Vec<Epoch>,
    /// Epochs of the run that was resumed.
    pub(crate) resumed: usize,
    /// Whether the training ended before its last epoch because it no longer improved.
    pub(crate) stopped_early: bool,
    /// Set if the training was asked to stop before its last epoch was over.
    pub(crate) interrupted: Option<Interruption>,
}

impl FitOutcome {
    /// The epochs that are over, with their tests.
    pub(crate) fn finished(&self) -> impl Iterator<Item = (&Epoch, Evaluation)> {
        self.epochs
            .iter()
            .filter_map(|epoch| Some((epoch, epoch.test?)))
    }
}

/// Trains one variant of a job and reports on it.
///
/// # Errors
///
/// As [`fit`].
pub(crate) fn run(
    job: &Job,
    variant: Variant,
    data: MnistData,
    allocator: &'static CountingAllocator,
    options: &RunOptions,
) -> Result<(VariantReport, FitOutcome)> {
    let classifier = job.classifier(variant, MemoryProbe::of(&job.device(), allocator));
    let (train, test) = (Arc::new(data.train), Arc::new(data.test));
    let outcome = fit(job, variant, options, classifier, train, test)?;
    let steps = outcome.epochs.iter().flat_map(|epoch| &epoch.train.steps);
    let steps: Vec<StepRecord> = steps.copied().collect();
    let summary = summary(&steps, job.setup.batch_size);
    let epochs = outcome.finished().map(|(epoch, test)| EpochReport {
        train_loss: epoch.train.evaluation.average_loss(),
        test_loss: test.average_loss(),
        test_accuracy: test.accuracy(),
    });
    let step_losses = steps.iter().map(|step| step.evaluation.average_loss());
    let report = VariantReport {
        name: variant.name(),
        epochs: epochs.collect(),
        step_losses: step_losses.collect(),
        step_seconds_median: summary.duration.as_secs_f64(),
        forward_end_bytes: summary.memory.forward_end_bytes,
        peak_bytes: summary.memory.peak_bytes,
        saved_bytes: job.saved_bytes(variant),
        interrupted: outcome.interrupted.is_some(),
        diverged: Divergence::of(&outcome.epochs),
        timeline: None,
    };
    Ok((report, outcome))
}

/// Trains `classifier` on `train` and tests it on `test` after every epoch.
///
/// Batches are made by the training thread itself when it needs them; the last of an epoch may be
/// smaller. Burn's `experiment.log` is not written: it would take over the process's logger and panic
/// hook.
///
/// A run with checkpoints that is killed at any moment and resumed with the same options, model and
/// data ends as if it had not been, bit for bit where the device computes the same bits each time:
/// weights, state of the optimizer, schedule, early stopping and checkpoints that are kept.
/// See [`checkpoint`]. Two runs in one process at the same time may share the device's random
/// numbers, and then have other dropout masks.
///
/// # Errors
///
/// What can be checked is checked before anything is trained, written or removed.
fn fit(
    job: &Job,
    variant: Variant,
    options: &RunOptions,
    classifier: Classifier,
    train: Arc<Digits>,
    test: Arc<Digits>,
) -> Result<FitOutcome> {
    // Burn's schedulers count steps where PyTorch's count epochs.
    let schedule = StepLrSchedulerConfig::new(job.setup.learning_rate(), job.steps(train.len()))
        .with_gamma(job.learning.gamma)
        .init()
        .map_err(|reason| anyhow!("invalid learning rate: {reason}"))?;

    let mut start = Start {
        classifier,
        schedule,
        resumed: 0,
        history: History::default(),
        records: None,
        store: None,
    };
    let _lock;
    if let Some((folder, run_file)) = &options.folder {
        _lock = folder.lock()?;
        let set = folder.resumed()?;
        start.classifier = loaded(job, &folder.path, &set, start.classifier)?;
        let stopped_early = is_stopped(job, options, &set.history);
        if folder.resume && (set.epoch >= job.epochs || stopped_early) {
            // A kill may have come between the last checkpoint and the removal of those before it.
            // There is nothing to write, so that what cannot be removed does no harm.
            let _ = checkpoint::prune(&folder.path, set.epoch, &set.history);
            return Ok(FitOutcome {
                stopped_early,
                epochs: set.history,
                resumed: set.epoch,
                interrupted: None,
            });
        }
        start.resumed = set.epoch;
        start.history = History::new(set.history);
        start.records = set.records;
        let store = folder.prepare(run_file, &start.classifier, &start.history)?;
        start.store = Some(Arc::new(store));
    }
    launch(job, variant, options, start, train, test)
}

/// Where a training starts: at its beginning, or after the last epoch of a checkpoint.
struct Start {
    classifier: Classifier,
    schedule: ModuleLrScheduler,
    /// Epochs of the checkpoint.
    resumed: usize,
    history: History,
    records: Option<Records>,
    /// Where checkpoints go, if there are to be any.
    store: Option<Arc<Store>>,
}

fn launch(
    job: &Job,
    variant: Variant,
    options: &RunOptions,
    start: Start,
    train: Arc<Digits>,
    test: Arc<Digits>,
) -> Result<FitOutcome> {
    let test_items = test.len();
    let (activations, resumed) = (start.classifier.activations(), start.resumed);
    let loaders: [BatchLoader; 2] = [
        Arc::new(EpochLoader::new(
            train,
            job.setup.batch_size,
            activations,
            job.device(),
            job.setup.data.seed,
            resumed as u64,
        )),
        test_loader(test, job.setup.batch_size, activations),
    ];
    let dashboard = options
        .dashboard
        .then(|| Dashboard::open(&options.interrupter, resumed))
        .flatten();
    let launched = guarded(|| {
        let mut training = training(job, options, loaders, &start.history)
            .renderer(match &dashboard {
                Some(dashboard) => Box::new(dashboard.clone()),
                None => Box::new(LineRenderer::new(job.learning.log_interval)),
            })
            .label(&variant.name());
        if resumed > 0 {
            training = training.checkpoint(resumed);
        }
        if let Some(store) = &start.store {
            training = with_checkpoints(training, store, start.records);
        }
        let learner = Learner::new(start.classifier, job.setup.optimizer.init(), start.schedule);
        let result = training.launch(learner);
        (result.interrupted, result.error)
    });
    if let Some(dashboard) = &dashboard {
        dashboard.close();
    }
    if let Some(failure) = start.store.and_then(|store| store.take_failure()) {
        return Err(cannot_write(failure));
    }
    let (interrupted, error) = launched?;
    if let Some(error) = error {
        bail!("training failed: {error}");
    }
    let mut epochs = start.history.epochs();
    if let Some(last) = epochs.last_mut() {
        // The last test may have been interrupted.
        last.test = last.test.filter(|test| test.total == test_items);
    }
    Ok(FitOutcome {
        stopped_early: interrupted.is_none() && is_stopped(job, options, &epochs),
        epochs,
        resumed,
        interrupted,
    })
}

/// Whether a run that has these epochs ends before its last one.
fn is_stopped(job: &Job, options: &RunOptions, history: &[Epoch]) -> bool {
    let exhausted = |patience| is_exhausted(history, patience);
    history.len() < job.epochs && options.patience.is_some_and(exhausted)
}

/// Loads the model of the checkpoint to resume, as Burn does again when it launches: there, one that does
/// not fit is a panic.
fn loaded(job: &Job, folder: &Path, set: &Set, classifier: Classifier) -> Result<Classifier> {
    let Some(records) = &set.records else {
        return Ok(classifier);
    };
    ensure!(
        job.setup.optimizer.restores(classifier.dtype()),
        "cannot resume a training in double precision with {}: Burn restores the optimizer's state \
         in single precision",
        job.setup.optimizer.name()
    );
    classifier.restored(records.model.clone()).with_context(|| {
        let path = checkpoint::model_file(folder, set.epoch);
        format!("cannot resume from {}", path.display())
    })
}

/// Burn's training, without checkpoints.
fn training(
    job: &Job,
    options: &RunOptions,
    [train, test]: [BatchLoader; 2],
    history: &History,
) -> SupervisedTraining<Classifier> {
    // Nothing is written there: logs are in memory, and checkpoints go through the store.
    let training = SupervisedTraining::<Classifier>::new(Path::new("."), train, test)
        .with_training_strategy(ExecutionStrategy::single(job.device()).into())
        .with_application_logger(None)
        .with_interrupter(options.interrupter.clone())
        .with_metric_logger(InMemoryMetricLogger::new())
        .metrics((LossMetric::new(), AccuracyMetric::new()))
        .metric_train_numeric(StepMetric::forward_memory())
        .metric_train_numeric(StepMetric::peak_memory())
        .metric_train_numeric(StepMetric::time())
        .metric_train(TallyMetric::train(history))
        .metric_valid(TallyMetric::test(history))
        .num_epochs(job.epochs);
    let history = history.clone();
    match options.patience {
        Some(patience) => training.early_stopping(EpochEnd { history, patience }),
        None => training,
    }
}

/// Runs what may panic in Burn, and makes that an error.
fn guarded<T>(run: impl FnOnce() -> T) -> Result<T> {
    catch_unwind(AssertUnwindSafe(run))
        .map_err(|panic| anyhow!("training panicked: {}", text(&*panic)))
}

fn text(payload: &(dyn Any + Send)) -> &str {
    let text = payload.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| payload.downcast_ref::<&str>().copied());
    text.unwrap_or("for a reason that is not text")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_an_error_that_tells_its_message() {
        let state = "full";
        let error = guarded::<()>(|| panic!("the disk is {state}")).unwrap_err();
        assert_eq!(error.to_string(), "training panicked: the disk is full");
    }
}
