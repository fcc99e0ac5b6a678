//! Training through Burn's `SupervisedTraining`, and evaluation.

use std::any::Any;
use std::fs;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::data::dataset::DatasetError;
use burn::lr_scheduler::step::StepLrSchedulerConfig;
use burn::module::Module;
use burn::store::RecordError;
use burn::tensor::{DType, Device, FloatDType, TensorReadError};
use burn::train::metric::{AccuracyMetric, LossMetric};
use burn::train::{
    ExecutionStrategy, InferenceStep, Interrupter, Interruption, Learner, SupervisedTraining,
    TrainingError,
};
use burn_conv_bn_files::{OutputError, Survives, check_room, sweep};

use crate::data::{BatchLoader, Digits, EpochLoader, test_loader};
use crate::measure::metrics::{Evaluation, SplitRecord, StepMetric, Tally, TallyMetric};
use crate::optim::OptimizerChoice;
use crate::persist::checkpoint::{
    self, Damaged, KeepLatestAndBest, Set, SetFile, Store, checkpointers,
};
use crate::persist::history::{EpochEnd, EpochTotals, History, is_exhausted};
use crate::persist::lock::{FirstFailure, Lock};
use crate::persist::metric_log::MetricLog;
use crate::persist::run_file::RUN_FILE;
pub use crate::print::PrintError;
use crate::print::say;
use crate::run::dashboard::Dashboard;
use crate::run::renderer::LineRenderer;
use crate::step::Classifier;

/// Which run to go on with.
///
/// [`fit`] has an example.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Resume {
    /// None: start anew.
    #[default]
    No,
    /// That of the directory's newest checkpoint that is complete and can be read. What is there
    /// of later epochs stays until the run has come to them again.
    Latest,
    /// That of the checkpoint of one epoch, counted from 1. What is there of later epochs is
    /// removed: it belongs to a future that will be another one.
    Epoch(usize),
}

/// How to train.
///
/// [`new`](Self::new) gives the tutorial's job.
///
/// [`fit`] has an example.
#[derive(Clone)]
pub struct FitOptions {
    /// Where checkpoints and the logs of the metrics go.
    pub directory: PathBuf,
    /// Whether a run that is already in the directory may be removed.
    pub overwrite: bool,
    /// Epochs to train, those of a resumed run included.
    pub epochs: usize,
    /// Digits per step.
    pub batch_size: usize,
    /// Learning rate of the first epoch.
    pub learning_rate: f64,
    /// Factor on the learning rate after every epoch.
    pub learning_rate_decay: f64,
    /// The optimizer.
    pub optimizer: OptimizerChoice,
    /// Seed of the order of the digits and of dropout.
    pub seed: u64,
    /// Whether to write a checkpoint after every epoch. A resumed run does in any case.
    pub checkpoints: bool,
    /// Whether to go on with an earlier run.
    pub resume: Resume,
    /// Stop when the test loss has not improved for so many epochs.
    pub patience: Option<usize>,
    /// Show Burn's dashboard if standard input and output are a terminal that can show it.
    pub dashboard: bool,
    /// Without a dashboard: print every so many batches; never if 0.
    pub log_interval: usize,
    /// What to call the run.
    pub label: Option<String>,
    /// What to put into [`RUN_FILE`] in the directory before anything is trained. A run that can be
    /// resumed has it.
    pub run_file: Option<Vec<u8>>,
    /// Stops the training after the batch that is running.
    pub interrupter: Interrupter,
}

impl FitOptions {
    /// The tutorial's job: one epoch, 2048 digits a step, Adadelta with a learning rate of 1
    /// that decays by 0.7 every epoch, a line for every second batch.
    pub fn new(directory: impl Into<PathBuf>) -> Self {
        Self {
            directory: directory.into(),
            overwrite: false,
            epochs: 1,
            batch_size: 2048,
            learning_rate: 1.0,
            learning_rate_decay: 0.7,
            optimizer: OptimizerChoice::Adadelta,
            seed: 123_456,
            checkpoints: false,
            resume: Resume::No,
            patience: None,
            dashboard: false,
            log_interval: 2,
            label: None,
            run_file: None,
            interrupter: Interrupter::new(),
        }
    }
}

/// One epoch.
///
/// [`fit`] has an example.
#[derive(Clone, Debug)]
pub struct EpochRecord {
    /// Number of the epoch, from 1.
    pub epoch: usize,
    /// The training, up to the interruption if there was one.
    pub train: SplitRecord,
    /// The test after it, unless it was interrupted.
    pub test: Option<Evaluation>,
}

/// A finished or interrupted training.
///
/// [`fit`] has an example.
#[derive(Debug)]
pub struct FitOutcome {
    /// The trained model, ready for inference.
    pub model: Classifier,
    /// The epochs that were begun, in order; without those of the run that was resumed.
    pub epochs: Vec<EpochRecord>,
    /// The totals of the epochs that were finished, the first one first; with those of the run
    /// that was resumed.
    pub history: Vec<EpochTotals>,
    /// Whether the training ended before its last epoch because it no longer improved.
    pub stopped_early: bool,
    /// Set if the training was asked to stop before its last epoch was over.
    pub interrupted: Option<Interruption>,
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

/// Why a training or an evaluation failed.
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use std::sync::Arc;
///
/// use burn::tensor::{Device, FloatDType};
/// use burn_conv_bn_models::{Form, NetConfig};
/// use burn_conv_bn_train::data::generate;
/// use burn_conv_bn_train::fit::{FitError, FitOptions, fit};
/// use burn_conv_bn_train::memory::MemoryProbe;
/// use burn_conv_bn_train::model::Network;
/// use burn_conv_bn_train::step::Classifier;
///
/// // On a device that does not track gradients.
/// let net = NetConfig::new(Form::Fused).with_hidden(16).init(&Device::flex());
/// let classifier = Classifier::new(Network::Tutorial(net), MemoryProbe::off(), FloatDType::F32);
/// let digits = Arc::new(generate(8, 1));
/// let refused = fit(&FitOptions::new("never-made"), classifier, digits.clone(), digits);
/// assert!(matches!(refused, Err(FitError::NoAutodiff(_))));
/// # }
/// ```
#[derive(Debug, thiserror::Error)]
pub enum FitError {
    /// An option has a value that makes no sense.
    #[error("{0} must be at least 1")]
    Zero(&'static str),
    /// There are no digits to train or to test on.
    #[error("the {0} set is empty")]
    NoData(&'static str),
    /// The model is not on an autodiff device.
    #[error("the model is on {0:?}, which does not track gradients; use `device.autodiff()`")]
    NoAutodiff(Device),
    /// The directory cannot be written to, or has no room for what a training writes.
    #[error("cannot write to the directory {}: {source}", .path.display())]
    Directory {
        /// What could not be written.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The directory holds another run, which has not been asked to be removed or resumed.
    #[error("the directory {} already holds a run; resume it, overwrite it or use another directory", .path.display())]
    DirectoryInUse {
        /// The directory.
        path: PathBuf,
    },
    /// Another process trains there.
    #[error("another process is training in the directory {}", .path.display())]
    Busy {
        /// The directory.
        path: PathBuf,
    },
    /// There is no complete checkpoint to resume from.
    #[error(
        "there is no complete checkpoint to resume from in {}{}", .path.display(), listed(.damaged)
    )]
    NoCheckpoint {
        /// Where it should be.
        path: PathBuf,
        /// Those that are there and cannot be read, the newest first. They are left alone.
        damaged: Vec<Damaged>,
    },
    /// A checkpoint belongs to another model.
    #[error("cannot resume from {}: {source}", .path.display())]
    Checkpoint {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: RecordError,
    },
    /// A checkpoint's parameters have another type than the model's.
    #[error("the checkpoint is of type {found:?}, the model of type {expected:?}")]
    CheckpointType {
        /// The model's type.
        expected: FloatDType,
        /// The checkpoint's type.
        found: FloatDType,
    },
    /// Burn restores the state of its own optimizers in single precision.
    #[error(
        "cannot resume a training in double precision with {0}: Burn restores the optimizer's \
         state in single precision"
    )]
    OptimizerPrecision(&'static str),
    /// A checkpoint or a log could not be written, as on a full disk. The training was stopped;
    /// every checkpoint that was complete is as it was.
    #[error("cannot write {0} (the training has stopped; complete checkpoints are kept)")]
    Write(#[from] OutputError),
    /// Standard output took no line.
    #[error("{0}")]
    Print(#[from] PrintError),
    /// The learning rate's schedule is not valid.
    #[error("invalid learning rate: {0}")]
    Schedule(String),
    /// A batch could not be loaded.
    #[error("cannot load the data: {0}")]
    Dataset(#[from] DatasetError),
    /// A result could not be read from the device.
    #[error("cannot read from the device: {0}")]
    Read(#[from] TensorReadError),
    /// Burn stopped with an error.
    #[error("training failed: {0}")]
    Training(Arc<TrainingError>),
    /// Burn panicked.
    #[error("training panicked: {0}")]
    Panicked(String),
}

fn listed(damaged: &[Damaged]) -> String {
    damaged.iter().map(|set| format!("; {set}")).collect()
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
///
/// # Examples
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use std::sync::Arc;
///
/// use burn::tensor::{Device, FloatDType};
/// use burn_conv_bn_models::{Form, NetConfig};
/// use burn_conv_bn_train::batch::test_loader;
/// use burn_conv_bn_train::data::generate;
/// use burn_conv_bn_train::fit::{FitOptions, Resume, evaluate, fit, latest_checkpoint};
/// use burn_conv_bn_train::memory::MemoryProbe;
/// use burn_conv_bn_train::model::Network;
/// use burn_conv_bn_train::step::Classifier;
///
/// let device = Device::flex().autodiff();
/// let classifier = || {
///     let config = NetConfig::new(Form::Fused).with_channels([4, 8]).with_hidden(16);
///     let net = Network::Tutorial(config.init(&device));
///     Classifier::new(net, MemoryProbe::off(), FloatDType::F32)
/// };
/// let (train, test) = (Arc::new(generate(64, 1)), Arc::new(generate(32, 2)));
///
/// let folder = tempfile::tempdir()?;
/// let mut options = FitOptions::new(folder.path());
/// options.batch_size = 16;
/// options.log_interval = 0;
/// options.checkpoints = true;
/// let outcome = fit(&options, classifier(), train.clone(), test.clone())?;
/// assert_eq!(outcome.epochs[0].train.steps.len(), 64 / 16);
/// assert_eq!(latest_checkpoint(folder.path())?, Some(1));
///
/// // Another process can go on from there, to a second epoch.
/// options.epochs = 2;
/// options.resume = Resume::Latest;
/// let outcome = fit(&options, classifier(), train, test.clone())?;
/// assert_eq!(outcome.history.len(), 2);
///
/// let loader = test_loader(test, options.batch_size, FloatDType::F32);
/// let evaluation = evaluate(&outcome.model, &loader)?;
/// // The first one with its steps, from the checkpoint.
/// assert_eq!(outcome.history[0].train.steps.len(), 64 / 16);
/// let last = outcome.history[1].test;
/// assert_eq!((evaluation.total, evaluation.correct), (last.total, last.correct));
/// # }
/// # Ok::<(), anyhow::Error>(())
/// ```
pub fn fit(
    options: &FitOptions,
    classifier: Classifier,
    train: Arc<Digits>,
    test: Arc<Digits>,
) -> Result<FitOutcome, FitError> {
    for (name, value) in [
        ("the number of epochs", options.epochs),
        ("the batch size", options.batch_size),
        ("the patience", options.patience.unwrap_or(1)),
    ] {
        if value == 0 {
            return Err(FitError::Zero(name));
        }
    }
    for (name, digits) in [("training", &train), ("test", &test)] {
        if digits.is_empty() {
            return Err(FitError::NoData(name));
        }
    }
    let device = device_of(&classifier);
    if !device.is_autodiff() {
        return Err(FitError::NoAutodiff(device));
    }

    let (dtype, activations) = (classifier.dtype(), classifier.activations());
    let (train_items, test_items) = (train.len(), test.len());
    let steps = train_items.div_ceil(options.batch_size);
    // Burn's schedulers count steps where PyTorch's count epochs.
    let schedule = StepLrSchedulerConfig::new(options.learning_rate, steps)
        .with_gamma(options.learning_rate_decay)
        .init()
        .map_err(FitError::Schedule)?;

    let _lock = lock(options)?;
    let resumed = resumed_set(options)?;
    let checkpoints = options.checkpoints || resumed.is_some();
    let (resumed, past, classifier, records) = match resumed {
        Some(set) => {
            if set.records.is_some() && !options.optimizer.restores(dtype) {
                return Err(FitError::OptimizerPrecision(options.optimizer.name()));
            }
            match set.epoch {
                0 => say!("Resuming a run that has not finished its first epoch.")?,
                epoch => say!("Resuming after epoch {epoch}.")?,
            }
            let classifier = load_model(&options.directory, &set, classifier)?;
            (Some(set.epoch), set.history, classifier, set.records)
        }
        None => (None, Vec::new(), classifier, None),
    };
    let finished = resumed.unwrap_or(0);
    let stopped_early = |history: &[EpochTotals]| {
        let exhausted = |patience| is_exhausted(history, patience);
        history.len() < options.epochs && options.patience.is_some_and(exhausted)
    };
    if resumed.is_some() && (finished >= options.epochs || stopped_early(&past)) {
        // A kill may have come between the last checkpoint and the removal of those before it.
        // There is nothing to write, so that what cannot be removed does no harm.
        let _ = checkpoint::prune(&options.directory, finished, &past);
        return Ok(FitOutcome {
            model: classifier.valid(),
            epochs: Vec::new(),
            stopped_early: stopped_early(&past),
            history: past,
            interrupted: None,
        });
    }
    prepare_directory(options, resumed, checkpoints.then_some(&classifier))?;
    if let Some(json) = &options.run_file {
        let path = options.directory.join(RUN_FILE);
        burn_conv_bn_files::write(&path, json, Survives::PowerLoss)?;
    }

    let failure = FirstFailure::default();
    let store = Arc::new(Store::new(&options.directory, failure.clone()));
    match resumed {
        Some(_) => checkpoint::prune(&options.directory, finished, &past)?,
        None if checkpoints => store.begin()?,
        None => {}
    }
    let learner = Learner::new(classifier, options.optimizer.init(), schedule);

    let train: BatchLoader = Arc::new(EpochLoader::new(
        train,
        options.batch_size,
        activations,
        device.clone(),
        options.seed,
        finished as u64,
    ));
    let test = test_loader(test, options.batch_size, activations);

    let (train_tally, test_tally) = (Tally::new(), Tally::new());
    let history = History::new(past, train_tally.clone(), test_tally.clone());
    let logs = MetricLog::new(
        &options.directory,
        failure.clone(),
        options.interrupter.clone(),
    );
    let epoch_end = EpochEnd {
        history: history.clone(),
        patience: options.patience,
        failure: failure.clone(),
    };
    let dashboard = if options.dashboard {
        Dashboard::open(&options.interrupter, finished)
    } else {
        None
    };
    let launched = guarded(|| {
        let mut training = SupervisedTraining::<Classifier>::new(&options.directory, train, test)
            .with_training_strategy(ExecutionStrategy::single(device).into())
            .with_application_logger(None)
            .with_interrupter(options.interrupter.clone())
            .with_metric_logger(logs)
            .early_stopping(epoch_end)
            .metrics((LossMetric::new(), AccuracyMetric::new()))
            .metric_train_numeric(StepMetric::forward_memory())
            .metric_train_numeric(StepMetric::peak_memory())
            .metric_train_numeric(StepMetric::time())
            .metric_train(TallyMetric::new(train_tally.clone()))
            .metric_valid(TallyMetric::new(test_tally.clone()))
            .num_epochs(options.epochs);
        if checkpoints {
            let (model, optimizer, scheduler) = checkpointers(&store, records);
            training = training
                .with_custom_checkpointers(model, optimizer, scheduler)
                .with_checkpointing_strategy(KeepLatestAndBest {
                    store: store.clone(),
                    history: history.clone(),
                });
        }
        if finished > 0 {
            training = training.checkpoint(finished);
        }
        training = training.renderer(match &dashboard {
            Some(dashboard) => Box::new(dashboard.clone()),
            None => Box::new(LineRenderer::new(options.log_interval)),
        });
        if let Some(label) = &options.label {
            training = training.label(label);
        }

        let result = training.launch(learner);
        (result.model, result.interrupted, result.error)
    });
    if let Some(dashboard) = dashboard {
        dashboard.close();
    }
    if let Some(failure) = failure.take() {
        return Err(failure.into());
    }
    let (model, interrupted, error) = launched?;
    if let Some(error) = error {
        return Err(FitError::Training(error));
    }

    let mut history = history.finished();
    if history.len() > finished {
        // The last test may have been interrupted.
        history.pop_if(|last| last.test.total < test_items);
    }
    let mut tests = test_tally.finished().into_iter();
    let epochs = train_tally
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
        model,
        epochs,
        stopped_early: interrupted.is_none() && stopped_early(&history),
        history,
        interrupted,
    })
}

/// Evaluates a model on all that `loader` has: the tutorial's test.
///
/// The model is evaluated in inference mode, on its device without autodiff.
///
/// # Errors
///
/// [`FitError::Dataset`] or [`FitError::Read`].
///
/// # Examples
///
/// [`fit`] has one.
pub fn evaluate(model: &Classifier, loader: &BatchLoader) -> Result<Evaluation, FitError> {
    let model = model.valid();
    let loader = loader.to_device(&device_of(&model));
    let mut evaluation = Evaluation::default();
    for batch in loader.iter() {
        evaluation += Evaluation::of(&InferenceStep::step(&model, batch?))?;
    }
    Ok(evaluation)
}

/// The last finished epoch of which `directory` has a checkpoint that is complete and can be read.
///
/// # Errors
///
/// [`FitError::Directory`] if the directory cannot be read.
///
/// # Examples
///
/// [`fit`] has one.
pub fn latest_checkpoint(directory: &Path) -> Result<Option<usize>, FitError> {
    let (set, _) = checkpoint::newest(directory)
        .map_err(|source| not_writable(&checkpoint::folder(directory), source))?;
    Ok(set.map(|set| set.epoch).filter(|&epoch| epoch > 0))
}

/// Where a model is; its parameters are all in one place.
fn device_of(model: &Classifier) -> Device {
    let device = model.devices().into_iter().next();
    device.expect("a network has parameters")
}

/// Keeps other trainings out of the directory, which is made if this one is new.
fn lock(options: &FitOptions) -> Result<Lock, FitError> {
    let directory = &options.directory;
    if options.resume == Resume::No {
        fs::create_dir_all(directory).map_err(|source| not_writable(directory, source))?;
    }
    Lock::of(directory).ok_or_else(|| FitError::Busy {
        path: directory.clone(),
    })
}

/// Checks, before any data are loaded, that a run may begin or go on in the directory.
pub(crate) fn check_directory(
    directory: &Path,
    resume: Resume,
    overwrite: bool,
) -> Result<(), FitError> {
    let sets = checkpoint::files(directory)
        .map_err(|source| not_writable(&checkpoint::folder(directory), source))?;
    match resume {
        Resume::No if !overwrite && !(sets.is_empty() && logs(directory)?.is_empty()) => {
            Err(FitError::DirectoryInUse {
                path: directory.to_path_buf(),
            })
        }
        Resume::Latest | Resume::Epoch(_) if sets.is_empty() => Err(FitError::NoCheckpoint {
            path: checkpoint::folder(directory),
            damaged: Vec::new(),
        }),
        _ => Ok(()),
    }
}

/// The checkpoint to go on from, if one is asked for. Says which newer ones are damaged.
fn resumed_set(options: &FitOptions) -> Result<Option<Set>, FitError> {
    let directory = &options.directory;
    let (set, damaged) = match options.resume {
        Resume::No => return Ok(None),
        Resume::Latest => checkpoint::newest(directory)
            .map_err(|source| not_writable(&checkpoint::folder(directory), source))?,
        Resume::Epoch(epoch) => match checkpoint::read(directory, epoch) {
            Ok(set) => (Some(set), Vec::new()),
            Err(damaged) => (None, vec![damaged]),
        },
    };
    if set.is_none() {
        return Err(FitError::NoCheckpoint {
            path: checkpoint::folder(directory),
            damaged,
        });
    }
    for damaged in damaged {
        say!(
            "Passed over the checkpoint of epoch {}: {damaged}",
            damaged.epoch
        )?;
    }
    Ok(set)
}

/// Loads the model of a checkpoint, as Burn does again when it launches: there, one that does not
/// fit is a panic.
fn load_model(directory: &Path, set: &Set, classifier: Classifier) -> Result<Classifier, FitError> {
    let Some(records) = &set.records else {
        return Ok(classifier);
    };
    let expected = classifier.dtype();
    let classifier = classifier
        .try_load_record(records.model.clone())
        .map_err(|source| FitError::Checkpoint {
            path: checkpoint::model_file(directory, set.epoch),
            source,
        })?;
    let found = classifier.dtype();
    if found != expected {
        return Err(FitError::CheckpointType { expected, found });
    }
    Ok(classifier)
}

const MIB: usize = 1 << 20;

/// Most bytes of a checkpoint that are written to see whether there is room, so that this takes no
/// more than a moment.
const MOST_ROOM: usize = 64 * MIB;

/// Makes sure that a training can write to the directory, and removes from it what must not be
/// there: an earlier run, or what a run that goes on from an earlier checkpoint has of later
/// epochs.
fn prepare_directory(
    options: &FitOptions,
    resumed: Option<usize>,
    saved: Option<&Classifier>,
) -> Result<(), FitError> {
    let directory = &options.directory;
    let unwanted = |epoch: usize| match (resumed, options.resume) {
        (None, _) => true,
        (Some(resumed), Resume::Epoch(_)) => epoch > resumed,
        (Some(_), _) => false,
    };
    let sets = checkpoint::files(directory)
        .map_err(|source| not_writable(&checkpoint::folder(directory), source))?;
    let old_sets: Vec<SetFile> = sets
        .into_iter()
        .filter(|file| unwanted(file.epoch))
        .collect();
    let (old_logs, logs): (Vec<_>, Vec<_>) = logs(directory)?
        .into_iter()
        .partition(|(_, epoch)| unwanted(*epoch));
    let empty = old_sets.is_empty() && old_logs.is_empty();
    if resumed.is_none() && !empty && !options.overwrite {
        return Err(FitError::DirectoryInUse {
            path: directory.clone(),
        });
    }

    // Before anything is removed: whoever has no room for a new run keeps the old one. Logs, and a
    // checkpoint of the parameters and of an optimizer's two tensors of their size, are what will
    // be written first. A disk that is full only later costs an epoch.
    let checkpoint = saved.map_or(0, |model| {
        3 * model.num_params() * DType::from(model.dtype()).size()
    });
    check_room(directory, MIB + checkpoint.min(MOST_ROOM))
        .map_err(|source| not_writable(directory, source))?;

    checkpoint::remove(old_sets)?;
    for (path, _) in old_logs {
        let removed = match path.is_dir() {
            true => fs::remove_dir_all(&path),
            false => fs::remove_file(&path),
        };
        removed.map_err(|source| not_writable(&path, source))?;
    }
    let folders = logs.into_iter().map(|(path, _)| path);
    let folders = folders.filter(|path| path.is_dir());
    for folder in folders.chain([directory.clone(), checkpoint::folder(directory)]) {
        sweep(&folder).map_err(|source| not_writable(&folder, source))?;
    }
    Ok(())
}

/// The folders of the logs in `directory`, with the numbers of their epochs.
fn logs(directory: &Path) -> Result<Vec<(PathBuf, usize)>, FitError> {
    let mut found = Vec::new();
    for split in ["train", "valid"] {
        let folder = directory.join(split);
        let entries = match fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(not_writable(&folder, error)),
        };
        for entry in entries {
            let path = entry
                .map_err(|source| not_writable(&folder, source))?
                .path();
            let epoch = path
                .file_name()
                .and_then(|name| name.to_str())
                .and_then(|name| name.strip_prefix("epoch-"))
                .and_then(|epoch| epoch.parse().ok());
            found.extend(epoch.map(|epoch| (path, epoch)));
        }
    }
    Ok(found)
}

fn not_writable(path: &Path, source: io::Error) -> FitError {
    FitError::Directory {
        path: path.to_path_buf(),
        source,
    }
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
