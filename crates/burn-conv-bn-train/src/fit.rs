//! Training and evaluation through Burn's `SupervisedTraining` and `Evaluator`.

use std::any::Any;
use std::fs::{self, File};
use std::io::{self, IsTerminal, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use burn::data::dataset::DatasetError;
use burn::lr_scheduler::LrSchedulerRecord;
use burn::lr_scheduler::step::StepLrSchedulerConfig;
use burn::module::Module;
use burn::optim::OptimizerRecord;
use burn::store::{ModuleRecord, RecordError};
use burn::tensor::{DType, Device, FloatDType, TensorReadError};
use burn::train::logger::TrainingProgressLogger;
use burn::train::metric::store::{Aggregate, Direction, Split};
use burn::train::metric::{AccuracyMetric, LossMetric};
use burn::train::{
    EvaluatorBuilder, EvaluatorComponentTypesMarker, ExecutionStrategy, InferenceStep, Interrupter,
    Interruption, Learner, MetricEarlyStoppingStrategy, StoppingCondition, SupervisedTraining,
    TrainingError,
};

use crate::batch::{BatchLoader, EpochLoader, test_loader};
use crate::data::Digits;
use crate::metrics::{
    Evaluation, ForwardMemoryMetric, PeakMemoryMetric, SplitRecord, StepTimeMetric, Tally,
    TallyMetric,
};
use crate::optim::AdadeltaConfig;
use crate::renderer::LineRenderer;
use crate::step::Classifier;

/// What Burn calls the files of a checkpoint.
const CHECKPOINT_PARTS: [&str; 3] = ["model", "optim", "scheduler"];

/// Which run to go on with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Resume {
    /// None: start anew.
    #[default]
    No,
    /// That of the directory's latest checkpoint.
    Latest,
    /// That of the checkpoint of one epoch, counted from 1. What is there of later epochs is
    /// removed: it belongs to a future that will be another one.
    Epoch(usize),
}

/// How to train.
///
/// [`new`](Self::new) gives the tutorial's job.
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
    pub optimizer: AdadeltaConfig,
    /// Seed of the order of the digits and of dropout.
    pub seed: u64,
    /// Whether to write a checkpoint after every epoch. A resumed run does in any case.
    pub checkpoints: bool,
    /// Whether to go on with an earlier run.
    pub resume: Resume,
    /// Stop when the test loss has not improved for so many epochs.
    pub patience: Option<usize>,
    /// Show Burn's dashboard if standard output is a terminal.
    pub dashboard: bool,
    /// Without a dashboard: print every so many batches; never if 0.
    pub log_interval: usize,
    /// Print Burn's summary at the end.
    pub summary: bool,
    /// What to call the run.
    pub label: Option<String>,
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
            optimizer: AdadeltaConfig::new(),
            seed: 123_456,
            checkpoints: false,
            resume: Resume::No,
            patience: None,
            dashboard: false,
            log_interval: 2,
            summary: false,
            label: None,
            interrupter: Interrupter::new(),
        }
    }
}

/// One epoch.
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
#[derive(Debug)]
pub struct FitOutcome {
    /// The trained model, ready for inference.
    pub model: Classifier,
    /// The epochs that were begun, in order; without those of the run that was resumed.
    pub epochs: Vec<EpochRecord>,
    /// Set if the training was asked to stop before its last epoch was over.
    pub interrupted: Option<Interruption>,
}

/// Why a training or an evaluation failed.
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
    /// There is no complete checkpoint to resume from.
    #[error("there is no complete checkpoint to resume from in {}", .path.display())]
    NoCheckpoint {
        /// Where it should be.
        path: PathBuf,
    },
    /// A checkpoint is damaged or belongs to another model.
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
    /// Burn panicked, as it does where it cannot write a log.
    #[error("training panicked: {0}")]
    Panicked(String),
}

/// Trains `classifier` on `train` and tests it on `test` after every epoch.
///
/// The classifier must be on an autodiff device, which is the one it is trained on. Batches are
/// made by the training thread itself when it needs them; the last of an epoch may be smaller.
/// Burn's `experiment.log` is not written: it would take over the process's logger and panic
/// hook.
///
/// # Errors
///
/// [`FitError`]. What can be checked is checked before anything is trained or written.
///
/// # Limits
///
/// Burn's metric logs panic when the disk is full, one of them while it is unwinding, which
/// aborts the process. There is a check that the disk has room for what is to be written, but
/// others may fill it meanwhile.
pub fn fit(
    options: &FitOptions,
    classifier: Classifier,
    train: Arc<Digits>,
    test: Arc<Digits>,
) -> Result<FitOutcome, FitError> {
    for (name, value) in [
        ("the number of epochs", options.epochs),
        ("the batch size", options.batch_size),
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

    let resumed = resumed_epoch(options)?;
    let classifier = match resumed {
        Some(epoch) => check_checkpoint(&options.directory, epoch, classifier)?,
        None => classifier,
    };
    let finished = resumed.unwrap_or(0);
    let checkpoints = options.checkpoints || resumed.is_some();
    prepare_directory(
        &options.directory,
        finished,
        options.overwrite || resumed.is_some(),
        checkpoints.then_some(&classifier),
    )?;

    let dtype = classifier.dtype();
    let (train_items, test_items) = (train.len(), test.len());
    let steps = train_items.div_ceil(options.batch_size);
    // Burn's schedulers count steps where PyTorch's count epochs.
    let schedule = StepLrSchedulerConfig::new(options.learning_rate, steps)
        .with_gamma(options.learning_rate_decay)
        .init()
        .map_err(FitError::Schedule)?;
    let learner = Learner::new(classifier, options.optimizer.init(), schedule);

    let train: BatchLoader = Arc::new(EpochLoader::new(
        train,
        options.batch_size,
        dtype,
        device.clone(),
        options.seed,
        finished as u64,
    ));
    let test = test_loader(test, options.batch_size, dtype);

    let (train_tally, test_tally) = (Tally::new(), Tally::new());
    let witness = Witness::new(options.interrupter.clone());
    let stop = witness.stop.clone();
    let launched = guarded(|| {
        let mut training = SupervisedTraining::<Classifier>::new(&options.directory, train, test)
            .with_training_strategy(ExecutionStrategy::single(device).into())
            .with_application_logger(None)
            .with_interrupter(options.interrupter.clone())
            .with_progress_logger(witness)
            .metrics((LossMetric::new(), AccuracyMetric::new()))
            .metric_train_numeric(ForwardMemoryMetric::new())
            .metric_train_numeric(PeakMemoryMetric::new())
            .metric_train_numeric(StepTimeMetric::new())
            .metric_train(TallyMetric::new(train_tally.clone()))
            .metric_valid(TallyMetric::new(test_tally.clone()))
            .num_epochs(options.epochs);
        if checkpoints {
            training = training.with_default_checkpointers();
        }
        if let Some(epoch) = resumed {
            training = training.checkpoint(epoch);
        }
        if let Some(epochs) = options.patience {
            training = training.early_stopping(MetricEarlyStoppingStrategy::new(
                &LossMetric::new(),
                Aggregate::Mean,
                Direction::Lowest,
                Split::Valid,
                StoppingCondition::NoImprovementSince { n_epochs: epochs },
            ));
        }
        if !(options.dashboard && io::stdout().is_terminal()) {
            training = training.renderer(Box::new(LineRenderer::new(options.log_interval)));
        }
        if options.summary {
            training = training.summary();
        }
        if let Some(label) = &options.label {
            training = training.label(label);
        }

        let result = training.launch(learner);
        (result.model, result.interrupted, result.error)
    });
    let (model, interrupted, error) = launched?;
    let stop = std::mem::take(&mut *stop.lock().unwrap_or_else(PoisonError::into_inner));
    if let Some(error) = stop.error.or(error) {
        return Err(FitError::Training(error));
    }

    let mut tests = test_tally.take_finished().into_iter();
    let epochs = train_tally
        .take_finished()
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
        interrupted: stop.interruption.or(interrupted),
    })
}

/// Evaluates a model on all that `loader` has: the tutorial's test.
///
/// The model is evaluated in inference mode, on its device without autodiff.
///
/// # Errors
///
/// [`FitError::Dataset`] or [`FitError::Read`].
pub fn evaluate(model: &Classifier, loader: &BatchLoader) -> Result<Evaluation, FitError> {
    let model = model.valid();
    let loader = loader.to_device(&device_of(&model));
    let mut evaluation = Evaluation::default();
    for batch in loader.iter() {
        evaluation += Evaluation::of(&InferenceStep::step(&model, batch?))?;
    }
    Ok(evaluation)
}

/// As [`evaluate`], through Burn's `Evaluator`, which logs loss and accuracy of every batch to
/// `test/<name>` in `directory`.
///
/// # Errors
///
/// [`FitError`].
pub fn evaluate_logged(
    model: &Classifier,
    loader: &BatchLoader,
    directory: &Path,
    name: &str,
) -> Result<Evaluation, FitError> {
    check_room(directory, MIB)?;
    let tally = Tally::new();
    let error = guarded(|| {
        EvaluatorBuilder::<EvaluatorComponentTypesMarker<Classifier>>::new(directory)
            .with_application_logger(None)
            .renderer(Box::new(LineRenderer::new(0)))
            .metrics((LossMetric::new(), AccuracyMetric::new()))
            .metric(TallyMetric::new(tally.clone()))
            .build(model.valid())
            .eval(name, loader.clone())
            .error
    })?;
    match error {
        Some(error) => Err(FitError::Training(error)),
        // Burn's evaluator has no final values: its metrics see batches only.
        None => Ok(tally.running()),
    }
}

/// The epoch of the latest checkpoint all of whose files are in `directory`.
///
/// # Errors
///
/// [`FitError::Directory`] if the directory cannot be read.
pub fn latest_checkpoint(directory: &Path) -> Result<Option<usize>, FitError> {
    let mut epochs = Vec::new();
    for (path, epoch) in numbered(&directory.join("checkpoint"))? {
        if path == checkpoint_file(directory, CHECKPOINT_PARTS[0], epoch) {
            epochs.push(epoch);
        }
    }
    Ok(epochs
        .into_iter()
        .filter(|&epoch| has_checkpoint(directory, epoch))
        .max())
}

/// Where a model is; its parameters are all in one place.
fn device_of(model: &Classifier) -> Device {
    let device = model.devices().into_iter().next();
    device.expect("a network has parameters")
}

fn resumed_epoch(options: &FitOptions) -> Result<Option<usize>, FitError> {
    let directory = &options.directory;
    let epoch = match options.resume {
        Resume::No => return Ok(None),
        Resume::Latest => latest_checkpoint(directory)?,
        Resume::Epoch(epoch) => Some(epoch).filter(|&epoch| has_checkpoint(directory, epoch)),
    };
    match epoch {
        Some(epoch) => Ok(Some(epoch)),
        None => Err(FitError::NoCheckpoint {
            path: directory.join("checkpoint"),
        }),
    }
}

fn has_checkpoint(directory: &Path, epoch: usize) -> bool {
    CHECKPOINT_PARTS
        .iter()
        .all(|part| checkpoint_file(directory, part, epoch).is_file())
}

fn checkpoint_file(directory: &Path, part: &str, epoch: usize) -> PathBuf {
    directory
        .join("checkpoint")
        .join(format!("{part}-{epoch}.bpk"))
}

/// Loads a checkpoint, as Burn does again when it launches: there, a file that is damaged or
/// does not fit is a panic.
fn check_checkpoint(
    directory: &Path,
    epoch: usize,
    classifier: Classifier,
) -> Result<Classifier, FitError> {
    let expected = classifier.dtype();
    let [model, optimizer, scheduler] =
        CHECKPOINT_PARTS.map(|part| checkpoint_file(directory, part, epoch));

    let classifier = ModuleRecord::load(&model)
        .and_then(|record| classifier.try_load_record(record))
        .map_err(|source| FitError::Checkpoint {
            path: model,
            source,
        })?;
    OptimizerRecord::load(&optimizer).map_err(|source| FitError::Checkpoint {
        path: optimizer,
        source,
    })?;
    LrSchedulerRecord::load(&scheduler).map_err(|source| FitError::Checkpoint {
        path: scheduler,
        source,
    })?;

    let found = classifier.dtype();
    if found != expected {
        return Err(FitError::CheckpointType { expected, found });
    }
    Ok(classifier)
}

const MIB: usize = 1 << 20;

/// Makes sure that a training that has `finished` epochs behind it can write to `directory`, and
/// that nothing is there of later ones: Burn would take their logs for this training's when it
/// looks for the best epoch.
fn prepare_directory(
    directory: &Path,
    finished: usize,
    remove: bool,
    saved: Option<&Classifier>,
) -> Result<(), FitError> {
    let mut leftovers = Vec::new();
    for part in ["train", "valid", "checkpoint"] {
        for (path, epoch) in numbered(&directory.join(part))? {
            if epoch > finished {
                leftovers.push(path);
            }
        }
    }
    if !leftovers.is_empty() && !remove {
        return Err(FitError::DirectoryInUse {
            path: directory.to_path_buf(),
        });
    }
    for path in leftovers {
        let removed = if path.is_dir() {
            fs::remove_dir_all(&path)
        } else {
            fs::remove_file(&path)
        };
        removed.map_err(|source| FitError::Directory { path, source })?;
    }

    // Burn keeps up to three checkpoints, each of the parameters and of Adadelta's two tensors
    // of their size, and writes a new one before it removes an old one.
    let checkpoints = saved.map_or(0, |model| {
        4 * 3 * model.num_params() * DType::from(model.dtype()).size()
    });
    check_room(directory, MIB + checkpoints)
}

/// What Burn has put into `directory` for an epoch, such as `epoch-3` or `model-3.bpk`, with the
/// number of the epoch.
fn numbered(directory: &Path) -> Result<Vec<(PathBuf, usize)>, FitError> {
    let failed = |source| FitError::Directory {
        path: directory.to_path_buf(),
        source,
    };
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(failed)?.path();
        let epoch = path
            .file_stem()
            .and_then(|stem| stem.to_str())
            .and_then(|stem| stem.split_once('-'))
            .filter(|(name, _)| *name == "epoch" || CHECKPOINT_PARTS.contains(name))
            .and_then(|(_, epoch)| epoch.parse().ok());
        found.extend(epoch.map(|epoch| (path, epoch)));
    }
    Ok(found)
}

/// Creates `directory` and writes `bytes` to it for a moment.
fn check_room(directory: &Path, bytes: usize) -> Result<(), FitError> {
    let failed = |path: &Path, source| FitError::Directory {
        path: path.to_path_buf(),
        source,
    };
    fs::create_dir_all(directory).map_err(|error| failed(directory, error))?;

    let path = directory.join(format!(".room-{}", std::process::id()));
    let written = write_zeros(&path, bytes);
    let removed = match fs::remove_file(&path) {
        // It could not be created, which `written` tells.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    };
    written
        .and(removed)
        .map_err(|error| failed(directory, error))
}

fn write_zeros(path: &Path, bytes: usize) -> io::Result<()> {
    let mut file = File::create(path)?;
    let zeros = vec![0; MIB];
    let mut left = bytes;
    while left > 0 {
        let some = left.min(zeros.len());
        file.write_all(&zeros[..some])?;
        left -= some;
    }
    // Some file systems find out no earlier that they are full.
    file.sync_all()
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

/// Notes why a training ended before the dashboard forgets it.
///
/// Burn's dashboard resets the interrupter at the end of a training, just before Burn reads
/// from it what to return: a training that failed would pass for one that did not.
struct Witness {
    interrupter: Interrupter,
    stop: Arc<Mutex<Stop>>,
}

#[derive(Default)]
struct Stop {
    interruption: Option<Interruption>,
    error: Option<Arc<TrainingError>>,
}

impl Witness {
    fn new(interrupter: Interrupter) -> Self {
        Self {
            interrupter,
            stop: Arc::default(),
        }
    }
}

impl TrainingProgressLogger for Witness {
    fn start(
        &mut self,
        _total_epochs: usize,
        _starting_epoch: usize,
        _total_items: Option<usize>,
        _label: Option<&str>,
    ) {
    }

    fn update_epoch(&mut self, _epoch: usize) {}

    fn start_split(&mut self, _split: &str, _total_items: usize) {}

    fn update_split(&mut self, _items_processed: usize) {}

    fn end_split(&mut self) {}

    fn end(&mut self) {
        *self.stop.lock().unwrap_or_else(PoisonError::into_inner) = Stop {
            interruption: self.interrupter.interruption(),
            error: self.interrupter.error(),
        };
    }

    fn log_event_training(&mut self, _event: String) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let name = format!("burn-conv-bn-fit-{name}-{}", std::process::id());
            let path = std::env::temp_dir().join(name);
            let _ = fs::remove_dir_all(&path);
            fs::create_dir_all(&path).expect("the temporary directory is writable");
            Self(path)
        }

        fn file(&self, path: &str) -> PathBuf {
            let path = self.0.join(path);
            let parent = path.parent().expect("it is in the directory");
            fs::create_dir_all(parent).expect("the temporary directory is writable");
            fs::write(&path, "x").expect("the temporary directory is writable");
            path
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn the_latest_checkpoint_is_complete() {
        let scratch = Scratch::new("latest");
        assert_eq!(latest_checkpoint(&scratch.0).expect("readable"), None);

        for part in CHECKPOINT_PARTS {
            scratch.file(&format!("checkpoint/{part}-2.bpk"));
            scratch.file(&format!("checkpoint/{part}-10.bpk"));
        }
        scratch.file("checkpoint/model-11.bpk");
        scratch.file("checkpoint/notes.txt");
        assert_eq!(latest_checkpoint(&scratch.0).expect("readable"), Some(10));
    }

    #[test]
    fn a_run_is_not_overwritten_unasked() {
        let scratch = Scratch::new("overwrite");
        let log = scratch.file("train/epoch-1/Loss.log");

        let refused = prepare_directory(&scratch.0, 0, false, None);
        assert!(matches!(refused, Err(FitError::DirectoryInUse { .. })));
        assert!(log.exists());

        prepare_directory(&scratch.0, 0, true, None).expect("asked to");
        assert!(!log.exists());
    }

    #[test]
    fn a_resumed_run_keeps_its_past_and_loses_its_future() {
        let scratch = Scratch::new("resume");
        let past = [
            scratch.file("valid/epoch-2/Loss.log"),
            scratch.file("checkpoint/optim-2.bpk"),
            scratch.file("checkpoint/notes.txt"),
        ];
        let future = [
            scratch.file("valid/epoch-3/Loss.log"),
            scratch.file("checkpoint/optim-3.bpk"),
        ];

        prepare_directory(&scratch.0, 2, true, None).expect("writable");

        assert!(past.iter().all(|path| path.exists()));
        assert!(!future.iter().any(|path| path.exists()));
        let left = fs::read_dir(&scratch.0).expect("readable").count();
        assert_eq!(left, 2, "nothing is left of the check for room");
    }

    #[test]
    fn a_directory_that_cannot_be_made_is_an_error() {
        let scratch = Scratch::new("file");
        let file = scratch.file("file");
        let error = check_room(&file.join("run"), 1).expect_err("a file has no entries");
        assert!(matches!(error, FitError::Directory { .. }), "{error}");
    }

    #[test]
    fn a_panic_is_an_error_that_tells_its_message() {
        let state = "full";
        let error = guarded::<()>(|| panic!("the disk is {state}"));
        assert!(matches!(error, Err(FitError::Panicked(text)) if text == "the disk is full"));
    }
}
