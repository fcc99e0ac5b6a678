//! Training through Burn's `SupervisedTraining`.

mod directory;
mod error;
mod options;

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use burn::lr_scheduler::step::StepLrSchedulerConfig;
use burn::module::Module;
use burn::tensor::Device;
use burn::train::metric::{AccuracyMetric, LossMetric};
use burn::train::{ExecutionStrategy, Interruption, Learner, SupervisedTraining, TrainingError};
use burn_conv_bn_files::Survives;
use burn_conv_bn_memory::CountingAllocator;

use crate::data::{BatchLoader, Digits, EpochLoader, MnistData, test_loader};
use crate::measure::memory::MemoryProbe;
use crate::measure::metrics::{
    Evaluation, SplitRecord, StepMetric, StepRecord, Tally, TallyMetric,
};
use crate::measure::report::{Divergence, EpochReport, StepSummary, VariantReport};
use crate::persist::checkpoint::{self, KeepLatestAndBest, Records, Store, checkpointers};
use crate::persist::history::{EpochTotals, History};
use crate::persist::lock::FirstFailure;
use crate::persist::metric_log::MetricLog;
use crate::persist::run_file::RUN_FILE;
use crate::print::say;
use crate::run::dashboard::Dashboard;
use crate::run::early_stop::{EpochEnd, is_exhausted};
use crate::run::job::{Job, Variant};
use crate::run::renderer::LineRenderer;
use crate::step::Classifier;
pub(crate) use directory::check_directory;
use directory::{load_model, lock, prepare_directory, resumed_set};
pub(crate) use error::FitError;
pub(crate) use options::RunOptions;

/// One epoch.
#[derive(Clone, Debug)]
pub(crate) struct EpochRecord {
    /// Number of the epoch, from 1.
    pub(crate) epoch: usize,
    /// The training, up to the interruption if there was one.
    pub(crate) train: SplitRecord,
    /// The test after it, unless it was interrupted.
    pub(crate) test: Option<Evaluation>,
}

/// A finished or interrupted training.
#[derive(Debug)]
pub(crate) struct FitOutcome {
    /// The epochs that were begun, in order; without those of the run that was resumed.
    pub(crate) epochs: Vec<EpochRecord>,
    /// The totals of the epochs that were finished, the first one first; with those of the run
    /// that was resumed.
    pub(crate) history: Vec<EpochTotals>,
    /// Whether the training ended before its last epoch because it no longer improved.
    pub(crate) stopped_early: bool,
    /// Set if the training was asked to stop before its last epoch was over.
    pub(crate) interrupted: Option<Interruption>,
}

impl FitOutcome {
    /// The passes of all epochs, those of the run that was resumed and the one that was interrupted included.
    pub(crate) fn passes(&self) -> impl Iterator<Item = (&SplitRecord, Option<Evaluation>)> {
        let finished = self
            .history
            .iter()
            .map(|epoch| (&epoch.train, Some(epoch.test)));
        let begun = self
            .epochs
            .iter()
            .filter(|epoch| epoch.epoch > self.history.len());
        finished.chain(begun.map(|epoch| (&epoch.train, epoch.test)))
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
) -> Result<(VariantReport, FitOutcome), FitError> {
    let classifier = job.classifier(variant, MemoryProbe::of(&job.device(), allocator));
    let (train, test) = (Arc::new(data.train), Arc::new(data.test));
    let outcome = fit(job, variant, options, classifier, train, test)?;
    let steps = outcome
        .passes()
        .flat_map(|(train, _)| &train.steps)
        .copied();
    let steps: Vec<StepRecord> = steps.collect();
    let summary = StepSummary::of(&steps, job.batch_size);
    let report = VariantReport {
        name: variant.name().to_string(),
        epochs: outcome
            .history
            .iter()
            .map(|epoch| EpochReport {
                train_loss: epoch.train.evaluation.average_loss(),
                test_loss: epoch.test.average_loss(),
                test_accuracy: epoch.test.accuracy(),
            })
            .collect(),
        step_losses: steps
            .iter()
            .map(|step| step.evaluation.average_loss())
            .collect(),
        step_seconds_median: summary.seconds_median,
        forward_end_bytes: summary.memory.forward_end_bytes,
        peak_bytes: summary.memory.peak_bytes,
        saved_bytes: job.saved_bytes(variant),
        interrupted: outcome.interrupted.is_some(),
        diverged: Divergence::of(outcome.passes()),
        timeline: None,
    };
    Ok((report, outcome))
}

/// Where a training starts: at its beginning, or after the last epoch of a checkpoint.
struct Start {
    classifier: Classifier,
    /// Finished epochs of the resumed run.
    resumed: Option<usize>,
    history: Vec<EpochTotals>,
    records: Option<Records>,
}

/// Where a running training reports to.
struct Watch {
    failure: FirstFailure,
    train: Tally,
    test: Tally,
    history: History,
    dashboard: Option<Dashboard>,
}

impl Watch {
    fn new(failure: FirstFailure, history: Vec<EpochTotals>, dashboard: Option<Dashboard>) -> Self {
        let (train, test) = (Tally::new(), Tally::new());
        Self {
            failure,
            history: History::new(history, train.clone(), test.clone()),
            train,
            test,
            dashboard,
        }
    }
}

/// Trains `classifier` on `train` and tests it on `test` after every epoch.
///
/// The classifier must be on an autodiff device, which is the one it is trained on. Batches are
/// made by the training thread itself when it needs them; the last of an epoch may be smaller.
/// Burn's `experiment.log` is not written: it would take over the process's logger and panic
/// hook.
///
/// A run with checkpoints that is killed at any moment and resumed with the same options, model and
/// data ends as if it had not been, bit for bit where the device computes the same bits each time:
/// weights, state of the optimizer, schedule, early stopping, checkpoints that are kept, and logs.
/// See [`checkpoint`]. Two runs in one process at the same time may share the device's random
/// numbers, and then have other dropout masks.
///
/// # Errors
///
/// [`FitError`]. What can be checked is checked before anything is trained, written or removed.
fn fit(
    job: &Job,
    variant: Variant,
    options: &RunOptions,
    classifier: Classifier,
    train: Arc<Digits>,
    test: Arc<Digits>,
) -> Result<FitOutcome, FitError> {
    check(job, options, &train, &test)?;
    let device = device_of(&classifier);
    if !device.is_autodiff() {
        return Err(FitError::NoAutodiff(device));
    }
    // Burn's schedulers count steps where PyTorch's count epochs.
    let schedule = StepLrSchedulerConfig::new(job.learning_rate, job.steps(train.len()))
        .with_gamma(job.decay)
        .init()
        .map_err(FitError::Schedule)?;

    let _lock = lock(options)?;
    let start = start(job, options, classifier)?;
    let finished = start.resumed.unwrap_or(0);
    let ended = finished >= job.epochs || is_stopped(job, options, &start.history);
    if start.resumed.is_some() && ended {
        // A kill may have come between the last checkpoint and the removal of those before it.
        // There is nothing to write, so that what cannot be removed does no harm.
        let _ = checkpoint::prune(&options.directory, finished, &start.history);
        return Ok(FitOutcome {
            epochs: Vec::new(),
            stopped_early: is_stopped(job, options, &start.history),
            history: start.history,
            interrupted: None,
        });
    }
    let failure = FirstFailure::default();
    let store = begin(options, &start, &failure)?;

    let activations = start.classifier.activations();
    let test_items = test.len();
    let loaders: [BatchLoader; 2] = [
        Arc::new(EpochLoader::new(
            train,
            job.batch_size,
            activations,
            device.clone(),
            job.seed,
            finished as u64,
        )),
        test_loader(test, job.batch_size, activations),
    ];
    let dashboard = options
        .dashboard
        .then(|| Dashboard::open(&options.interrupter, finished));
    let watch = Watch::new(failure, start.history, dashboard.flatten());
    let launched = guarded(|| {
        let mut training = training(job, variant, options, device, finished, loaders, &watch);
        if let Some(store) = &store {
            let (model, optimizer, scheduler) = checkpointers(store, start.records);
            training = training
                .with_custom_checkpointers(model, optimizer, scheduler)
                .with_checkpointing_strategy(KeepLatestAndBest {
                    store: store.clone(),
                    history: watch.history.clone(),
                });
        }
        let learner = Learner::new(start.classifier, job.optimizer.init(), schedule);
        let result = training.launch(learner);
        (result.interrupted, result.error)
    });
    if let Some(dashboard) = &watch.dashboard {
        dashboard.close();
    }
    outcome(job, options, &watch, launched, finished, test_items)
}

/// Checks what needs no file.
fn check(job: &Job, options: &RunOptions, train: &Digits, test: &Digits) -> Result<(), FitError> {
    for (name, value) in [
        ("the number of epochs", job.epochs),
        ("the batch size", job.batch_size),
        ("the patience", options.patience.unwrap_or(1)),
    ] {
        if value == 0 {
            return Err(FitError::Zero(name));
        }
    }
    for (name, digits) in [("training", train), ("test", test)] {
        if digits.is_empty() {
            return Err(FitError::NoData(name));
        }
    }
    Ok(())
}

/// Whether a run that has these epochs ends before its last one.
fn is_stopped(job: &Job, options: &RunOptions, history: &[EpochTotals]) -> bool {
    let exhausted = |patience| is_exhausted(history, patience);
    history.len() < job.epochs && options.patience.is_some_and(exhausted)
}

/// Loads the checkpoint to resume, if one is asked for.
fn start(job: &Job, options: &RunOptions, classifier: Classifier) -> Result<Start, FitError> {
    let Some(set) = resumed_set(options)? else {
        return Ok(Start {
            classifier,
            resumed: None,
            history: Vec::new(),
            records: None,
        });
    };
    if set.records.is_some() && !job.optimizer.restores(classifier.dtype()) {
        return Err(FitError::OptimizerPrecision(job.optimizer.name()));
    }
    match set.epoch {
        0 => say!("Resuming a run that has not finished its first epoch.")?,
        epoch => say!("Resuming after epoch {epoch}.")?,
    }
    Ok(Start {
        classifier: load_model(&options.directory, &set, classifier)?,
        resumed: Some(set.epoch),
        history: set.history,
        records: set.records,
    })
}

/// Prepares the directory. Returns what writes the checkpoints, if there are to be any.
fn begin(
    options: &RunOptions,
    start: &Start,
    failure: &FirstFailure,
) -> Result<Option<Arc<Store>>, FitError> {
    let checkpoints = options.checkpoints || start.resumed.is_some();
    let saved = checkpoints.then_some(&start.classifier);
    prepare_directory(options, start.resumed, saved)?;
    if let Some(json) = &options.run_file {
        let path = options.directory.join(RUN_FILE);
        burn_conv_bn_files::write(&path, json, Survives::PowerLoss)?;
    }
    if !checkpoints {
        return Ok(None);
    }
    let store = Arc::new(Store::new(&options.directory, failure.clone()));
    match start.resumed {
        Some(finished) => checkpoint::prune(&options.directory, finished, &start.history)?,
        None => store.begin()?,
    }
    Ok(Some(store))
}

/// Burn's training, without checkpoints.
fn training(
    job: &Job,
    variant: Variant,
    options: &RunOptions,
    device: Device,
    finished: usize,
    [train, test]: [BatchLoader; 2],
    watch: &Watch,
) -> SupervisedTraining<Classifier> {
    let directory = &options.directory;
    let interrupter = &options.interrupter;
    let failure = &watch.failure;
    let training = SupervisedTraining::<Classifier>::new(directory, train, test)
        .with_training_strategy(ExecutionStrategy::single(device).into())
        .with_application_logger(None)
        .with_interrupter(interrupter.clone())
        .with_metric_logger(MetricLog::new(
            directory,
            failure.clone(),
            interrupter.clone(),
        ))
        .early_stopping(EpochEnd {
            history: watch.history.clone(),
            patience: options.patience,
            failure: failure.clone(),
        })
        .metrics((LossMetric::new(), AccuracyMetric::new()))
        .metric_train_numeric(StepMetric::forward_memory())
        .metric_train_numeric(StepMetric::peak_memory())
        .metric_train_numeric(StepMetric::time())
        .metric_train(TallyMetric::new(watch.train.clone()))
        .metric_valid(TallyMetric::new(watch.test.clone()))
        .num_epochs(job.epochs)
        .renderer(match &watch.dashboard {
            Some(dashboard) => Box::new(dashboard.clone()),
            None => Box::new(LineRenderer::new(job.log_interval)),
        })
        .label(variant.name());
    if finished > 0 {
        training.checkpoint(finished)
    } else {
        training
    }
}

/// How Burn's training ended.
type Ended = (Option<Interruption>, Option<Arc<TrainingError>>);

/// The result of a training, from its tallies.
fn outcome(
    job: &Job,
    options: &RunOptions,
    watch: &Watch,
    launched: Result<Ended, FitError>,
    finished: usize,
    test_items: usize,
) -> Result<FitOutcome, FitError> {
    if let Some(failure) = watch.failure.take() {
        return Err(failure.into());
    }
    let (interrupted, error) = launched?;
    if let Some(error) = error {
        return Err(FitError::Training(error));
    }
    let mut history = watch.history.finished();
    if history.len() > finished {
        // The last test may have been interrupted.
        history.pop_if(|last| last.test.total < test_items);
    }
    let mut tests = watch.test.finished().into_iter();
    let epochs = watch
        .train
        .finished()
        .into_iter()
        .zip(finished + 1..)
        .map(|(train, epoch)| EpochRecord {
            epoch,
            train,
            test: tests
                .next()
                .map(|test| test.evaluation)
                .filter(|test| test.total == test_items),
        })
        .collect();
    Ok(FitOutcome {
        epochs,
        stopped_early: interrupted.is_none() && is_stopped(job, options, &history),
        history,
        interrupted,
    })
}

/// Where a model is; its parameters are all in one place.
fn device_of(model: &Classifier) -> Device {
    let device = model.devices().into_iter().next();
    device.expect("a network has parameters")
}

/// Runs what may panic in Burn, and makes that an error.
fn guarded<T>(run: impl FnOnce() -> T) -> Result<T, FitError> {
    catch_unwind(AssertUnwindSafe(run)).map_err(|payload| FitError::Panicked(message(&*payload)))
}

fn message(payload: &(dyn Any + Send)) -> String {
    if let Some(text) = payload.downcast_ref::<String>() {
        text.clone()
    } else if let Some(text) = payload.downcast_ref::<&str>() {
        (*text).to_string()
    } else {
        "for a reason that is not text".to_string()
    }
}

#[cfg(test)]
mod tests;
