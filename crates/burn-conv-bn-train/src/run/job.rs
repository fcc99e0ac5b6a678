//! One training run, described and carried out.

use std::path::PathBuf;
use std::sync::Arc;

use burn::data::dataloader::batcher::Batcher;
use burn::data::dataset::{Dataset, DatasetError};
use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Device, Tensor};
use burn::train::Interrupter;
use burn_conv_bn::{NormVariant, Recompute};
use burn_conv_bn_memory::CountingAllocator;
use burn_conv_bn_models::Form;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::data::{
    DataError, DataRequest, DatasetChoice, DigitItem, Digits, MnistBatcher, MnistData, resolve,
};
use crate::device::DeviceChoice;
use crate::measure::memory::MemoryProbe;
use crate::measure::metrics::StepRecord;
use crate::measure::report::{
    BURN_VERSION, Divergence, EpochReport, Report, SCHEMA, StepSummary, VariantReport,
};
use crate::measure::timeline::Timeline;
use crate::model::{ModelChoice, ModelError, Network, NetworkOptions};
use crate::optim::OptimizerChoice;
pub use crate::precision::Precision;
use crate::run::fit::{FitError, FitOptions, FitOutcome, Resume, fit};
use crate::step::Classifier;

/// Which form of the network.
///
/// [`Job`] has an example.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Variant {
    /// Each block one op that recomputes its convolution.
    Fused,
    /// Burn's own convolution, batch norm and ReLU.
    Unfused,
}

impl Variant {
    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fused => "fused",
            Self::Unfused => "unfused",
        }
    }

    pub(crate) fn form(self) -> Form {
        match self {
            Self::Fused => Form::Fused,
            Self::Unfused => Form::Unfused,
        }
    }
}

/// Which batch norm.
///
/// [`Job`] has an example.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Norm {
    /// Burn's and PyTorch's: biased variance, epsilon under the root.
    Burn,
    /// The tutorial's: unbiased variance, epsilon outside the root.
    Tutorial,
}

impl Norm {
    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Burn => "burn",
            Self::Tutorial => "tutorial",
        }
    }

    pub(crate) fn variant(self) -> NormVariant {
        match self {
            Self::Burn => NormVariant::BatchNorm,
            Self::Tutorial => NormVariant::Tutorial,
        }
    }
}

/// What fused blocks do with the convolution's output.
///
/// [`Job`] has an example.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RecomputePolicy {
    /// Recompute it in the backward pass.
    Conv,
    /// Keep it.
    Never,
}

/// Everything that decides what a run computes, the same for both variants.
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::train::Interrupter;
/// use burn_conv_bn_memory::CountingAllocator;
/// use burn_conv_bn_train::data::DatasetChoice;
/// use burn_conv_bn_train::device::DeviceChoice;
/// use burn_conv_bn_train::estimate::estimate;
/// use burn_conv_bn_train::fit::Resume;
/// use burn_conv_bn_train::job::{Job, Norm, Precision, RecomputePolicy, RunOptions, Variant, run};
/// use burn_conv_bn_train::model::ModelChoice;
/// use burn_conv_bn_train::optim::OptimizerChoice;
///
/// // A program makes it the global allocator; otherwise it counts nothing.
/// static ALLOCATOR: CountingAllocator = CountingAllocator::new();
///
/// let job = Job {
///     dataset: DatasetChoice::Synthetic,
///     data_dir: None,
///     download: false,
///     train_limit: Some(64),
///     test_limit: Some(32),
///     epochs: 1,
///     batch_size: 16,
///     model: ModelChoice::Tutorial,
///     optimizer: OptimizerChoice::Adadelta,
///     learning_rate: 1.0,
///     decay: 0.7,
///     norm: Norm::Burn,
///     dropout: 0.5,
///     precision: Precision::F32,
///     recompute: RecomputePolicy::Conv,
///     device: DeviceChoice::Flex,
///     max_workspace: None,
///     seed: 1,
///     log_interval: 0,
/// };
/// job.check()?;
/// let data = job.data()?;
/// job.check_digits(data.train.len())?;
/// assert!(job.saved_bytes(Variant::Fused) < job.saved_bytes(Variant::Unfused) / 3);
/// assert!(!estimate(&job, Variant::Fused, &data, &ALLOCATOR).duration.is_zero());
///
/// let folder = tempfile::tempdir()?;
/// let options = RunOptions {
///     directory: folder.path().to_path_buf(),
///     overwrite: false,
///     checkpoints: false,
///     resume: Resume::No,
///     patience: None,
///     dashboard: false,
///     run_file: None,
///     interrupter: Interrupter::new(),
/// };
/// let (report, outcome) = run(&job, Variant::Fused, data, &ALLOCATOR, options)?;
/// assert_eq!(report.step_losses.len(), 64 / 16);
/// assert_eq!(report.epochs[0].test_accuracy, outcome.history[0].test.accuracy());
/// # }
/// # Ok::<(), anyhow::Error>(())
/// ```
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Job {
    /// Which data.
    pub dataset: DatasetChoice,
    /// Folder with the four IDX files.
    pub data_dir: Option<PathBuf>,
    /// Whether MNIST may be downloaded.
    pub download: bool,
    /// Most training digits.
    pub train_limit: Option<usize>,
    /// Most test digits.
    pub test_limit: Option<usize>,
    /// Epochs.
    pub epochs: usize,
    /// Digits a step.
    pub batch_size: usize,
    /// Which network.
    pub model: ModelChoice,
    /// Which optimizer.
    pub optimizer: OptimizerChoice,
    /// Learning rate of the first epoch.
    pub learning_rate: f64,
    /// Factor on it after every epoch.
    pub decay: f64,
    /// Which batch norm.
    pub norm: Norm,
    /// Probability of dropping a hidden value.
    pub dropout: f64,
    /// What is computed in.
    pub precision: Precision,
    /// What fused blocks do with the convolution's output.
    pub recompute: RecomputePolicy,
    /// Where it is computed.
    pub device: DeviceChoice,
    /// Bound on the fused blocks' workspace, in bytes.
    pub max_workspace: Option<usize>,
    /// Seed of weights, order, dropout and drawn digits.
    pub seed: u64,
    /// Print the loss of every so many batches; never if 0.
    pub log_interval: usize,
}

impl Job {
    /// The device, with autodiff.
    ///
    /// # Panics
    ///
    /// Panics if this build or this machine has no such device, which
    /// [`DeviceChoice::open`] tells.
    pub fn device(&self) -> Device {
        let device = self.device.open();
        device.unwrap_or_else(|error| panic!("{error}")).autodiff()
    }

    /// Checks that there is such a network.
    ///
    /// # Errors
    ///
    /// As [`ModelChoice::check`].
    pub fn check(&self) -> Result<(), ModelError> {
        self.model.check(self.norm.variant(), self.dropout)
    }

    /// Checks that the network can be trained on that many digits.
    ///
    /// # Errors
    ///
    /// As [`ModelChoice::check_batches`].
    pub fn check_digits(&self, digits: usize) -> Result<(), ModelError> {
        self.model.check_batches(digits, self.batch_size)
    }

    /// Training steps an epoch, on that many digits.
    pub fn steps(&self, digits: usize) -> usize {
        digits.div_ceil(self.batch_size)
    }

    /// Finds the data.
    ///
    /// # Errors
    ///
    /// As [`resolve`].
    pub fn data(&self) -> Result<MnistData, DataError> {
        resolve(&self.data_request())
    }

    /// What [`data`](Self::data) looks for.
    pub fn data_request(&self) -> DataRequest {
        DataRequest {
            choice: self.dataset,
            data_dir: self.data_dir.clone(),
            allow_download: self.download,
            seed: self.seed,
            train_limit: self.train_limit,
            test_limit: self.test_limit,
        }
    }

    /// A report on these data, without variants yet.
    pub fn report(&self, data: &MnistData) -> Report {
        Report {
            schema: SCHEMA,
            dataset: data.origin.name().to_string(),
            train_digits: data.train.len(),
            test_digits: data.test.len(),
            device: self.device.name().to_string(),
            dtype: self.precision.dtype_name(),
            batch_size: self.batch_size,
            model: self.model.name().to_string(),
            optimizer: self.optimizer.name().to_string(),
            norm: self.norm.name().to_string(),
            seed: self.seed,
            threads: rayon::current_num_threads(),
            burn_version: BURN_VERSION.to_string(),
            version: env!("CARGO_PKG_VERSION").to_string(),
            variants: Vec::new(),
        }
    }

    /// A network in its initial state: the same for both variants, and, where Flex was compiled
    /// in, on all devices.
    pub fn network(&self, form: Form) -> Network {
        let device = self.device();
        let host = DeviceChoice::host().and_then(|host| host.open().ok());
        let drawn_on = host.map_or(device.clone(), Device::autodiff);
        drawn_on.seed(self.seed);
        // The dropout's draws are the device's own.
        device.seed(self.seed);
        let options = NetworkOptions {
            form,
            norm: self.norm.variant(),
            dropout: self.dropout,
            recompute: match self.recompute {
                RecomputePolicy::Conv => Recompute::Conv,
                RecomputePolicy::Never => Recompute::Never,
            },
            max_workspace: self.max_workspace,
        };
        let network = self.model.init(&options, &drawn_on);
        // Left alone, Burn would draw each parameter when it is first used, on its new device.
        network.visit(&mut Draw);
        network.fork(&device)
    }

    /// [`network`](Self::network), ready to be trained.
    pub fn classifier(&self, variant: Variant, probe: MemoryProbe) -> Classifier {
        let network = self.network(variant.form());
        Classifier::new(network, probe, self.precision.parameters())
            .with_activations(self.precision.activations())
    }

    /// Bytes of the tensors that a step of `batch_size` digits keeps for its backward pass, each once, as
    /// the network lists them: without digits, parameters and casts of these.
    pub fn saved_bytes(&self, variant: Variant) -> usize {
        self.classifier(variant, MemoryProbe::off())
            .computing()
            .saved_for_backward(self.batch_size)
            .into_iter()
            .filter(|(_, tensor)| !tensor.shared)
            .map(|(_, tensor)| tensor.bytes())
            .sum()
    }
}

/// Records the memory of a training step on the first digits of `data`, of the size of a batch.
///
/// # Errors
///
/// If the data cannot be read.
///
/// # Examples
///
/// ```no_run
/// use burn_conv_bn_memory::CountingAllocator;
/// use burn_conv_bn_train::job::{Job, Variant, record};
///
/// #[global_allocator]
/// static ALLOCATOR: CountingAllocator = CountingAllocator::new();
///
/// /// Most bytes of a training step of either variant, fused and unfused.
/// fn peaks(job: &Job) -> anyhow::Result<[usize; 2]> {
///     let data = job.data()?;
///     let peak = |variant| -> anyhow::Result<usize> {
///         Ok(record(job, variant, &data, &ALLOCATOR)?.peak())
///     };
///     Ok([peak(Variant::Fused)?, peak(Variant::Unfused)?])
/// }
/// ```
pub fn record(
    job: &Job,
    variant: Variant,
    data: &MnistData,
    allocator: &'static CountingAllocator,
) -> Result<Timeline, DatasetError> {
    let device = job.device();
    let count = job.batch_size.min(data.train.len());
    let items: Vec<DigitItem> = data.train.get_many((0..count).collect())?;
    let batcher = MnistBatcher::new(job.precision.activations());
    let probe = MemoryProbe::of(&device, allocator);
    Ok(Timeline::record(
        job.classifier(variant, MemoryProbe::off()),
        job.optimizer.init(),
        job.learning_rate,
        &probe,
        || batcher.batch(items.clone(), &device),
    ))
}

/// Initializes parameters.
struct Draw;

impl ModuleVisitor for Draw {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        param.val();
    }
}

/// How one run is carried out, besides what it computes.
///
/// [`Job`] has an example.
#[derive(Clone)]
pub struct RunOptions {
    /// Where logs and checkpoints go.
    pub directory: PathBuf,
    /// Whether an earlier run in the directory may be removed.
    pub overwrite: bool,
    /// Whether to write checkpoints.
    pub checkpoints: bool,
    /// Whether to go on with an earlier run.
    pub resume: Resume,
    /// Stop when the test loss has not improved for so many epochs.
    pub patience: Option<usize>,
    /// Show Burn's dashboard on a terminal.
    pub dashboard: bool,
    /// Contents of `job.json` in the directory, written before the first step.
    pub run_file: Option<Vec<u8>>,
    /// Stops the run after the batch that is running.
    pub interrupter: Interrupter,
}

/// Trains one variant and reports on it.
///
/// # Errors
///
/// As [`fit`].
///
/// # Examples
///
/// [`Job`] has one.
pub fn run(
    job: &Job,
    variant: Variant,
    data: MnistData,
    allocator: &'static CountingAllocator,
    options: RunOptions,
) -> Result<(VariantReport, FitOutcome), FitError> {
    let mut fit_options = FitOptions::new(options.directory);
    fit_options.overwrite = options.overwrite;
    fit_options.epochs = job.epochs;
    fit_options.batch_size = job.batch_size;
    fit_options.learning_rate = job.learning_rate;
    fit_options.learning_rate_decay = job.decay;
    fit_options.optimizer = job.optimizer;
    fit_options.seed = job.seed;
    fit_options.checkpoints = options.checkpoints;
    fit_options.resume = options.resume;
    fit_options.patience = options.patience;
    fit_options.dashboard = options.dashboard;
    fit_options.run_file = options.run_file;
    fit_options.log_interval = job.log_interval;
    fit_options.label = Some(variant.name().to_string());
    fit_options.interrupter = options.interrupter;

    let classifier = job.classifier(variant, MemoryProbe::of(&job.device(), allocator));
    let (train, test): (Digits, Digits) = (data.train, data.test);
    let outcome = fit(&fit_options, classifier, Arc::new(train), Arc::new(test))?;
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

#[cfg(test)]
pub(crate) mod tests;
