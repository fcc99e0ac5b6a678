//! The command line of the `mnist` binary.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use burn::train::Interrupter;
use burn_conv_bn_memory::CountingAllocator;
use clap::error::ErrorKind;
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use serde::{Deserialize, Serialize};

use crate::checkpoint;
use crate::compare::{CompareOptions, WORKER, compare, work};
use crate::config::{self, DataIdentity, Layers, Options, RUN_FILE, RunFile, RunFileError};
use crate::data::DatasetChoice;
use crate::device::DeviceChoice;
use crate::fit::{FitOutcome, Resume, check_directory};
use crate::interrupt;
use crate::job::{Job, Norm, Precision, RecomputePolicy, RunOptions, Variant, run};
use crate::model::ModelChoice;
use crate::optim::OptimizerChoice;
use crate::output;
use crate::parity::Parity;
use crate::predict::{PredictForm, PredictOptions, Source, predict};
use crate::print::{PrintError, message, say, warn};

/// Time limit without a command, in minutes.
const DEFAULT_TIME_LIMIT: f64 = 8.0;

/// Where `train` keeps a run, and `predict` looks for it.
const RUN: &str = "artifacts/train";

/// Headings of the options that a subcommand has of its own.
const ON_RUN: &str = "Run";
const ON_OUTPUT: &str = "Output";
const ON_NETWORK: &str = "Network";
const ON_TRAINING: &str = "Training";
const ON_DATA: &str = "Data";

const USAGE: &str = "\
mnist <COMMAND>
       mnist [OPTIONS of compare]";

const EXAMPLES: &str = "\
Examples:
  mnist
  mnist --epochs 2 --plot memory.svg
  mnist train --variant fused --epochs 5
  mnist predict --test-set --mistakes mistakes.svg

`mnist <COMMAND> --help` lists the options of a command.

Exit status: 0 if all went well; 1 after an error, which is named, after Ctrl-C, where a loss diverged
(files that were asked for are written all the same), where a picture could not be read, and where
nobody reads the output any more; 2 for a command line that makes no sense.";

const COMPARE_EXAMPLES: &str = "\
Examples:
  mnist compare --json report.json --plot memory.svg
  mnist compare --model resnet18 --optimizer sgd --batch-size 256 --time-limit 10
  mnist compare --precision bf16
  mnist compare --norm tutorial --dataset mnist --data-dir mnist";

const TRAIN_EXAMPLES: &str = "\
Examples:
  mnist train --epochs 5 --early-stopping 2
  mnist train --resume --epochs 10
  mnist train --model mobilenet-v2 --optimizer adamw --batch-size 256 --artifacts runs/mobilenet
  mnist train --precision bf16 --batch-size 4096 --artifacts runs/bf16
  mnist train --lr 0.5 --print-config
  mnist train --config job.toml --seed 7

A run is resumed with its own options, from job.json in its folder. Options that decide the result are
refused if they differ; others, such as --epochs, --device or --early-stopping, may change.";

const PARITY_EXAMPLES: &str = "\
Examples:
  mnist parity --batch-size 256
  mnist parity --batch-size 256 --precision f64 --model resnet18 --steps 5";

const PREDICT_EXAMPLES: &str = "\
Examples:
  mnist predict --test-set --mistakes mistakes.png
  mnist predict --images scans --json predictions.json
  mnist predict --artifacts runs/mobilenet --form folded --test-set --dataset synthetic

Pictures are converted to MNIST's form: grey, white ink on black, scaled to 20 pixels, centred by mass
on 28x28. The edges are the background; a picture shows one digit. Pictures that cannot be read, of
other formats too, are named, and the exit status is 1.

The tutorial's network has no running statistics and normalizes by batch. The test set is therefore
classified in batches of the training's size, and a picture with the statistics of as many test digits
(--dataset, --data-dir), so that pictures do not affect each other. It cannot be folded. The other
networks have running statistics, and need no test digits for pictures.";

/// Trains the network of the PyTorch tutorial "Fusing Convolution and Batch Norm using Custom
/// Function" on MNIST, fused and unfused, and compares memory, time and accuracy.
///
/// Without a command it does the tutorial's job: `compare`, with its options, on as few digits as end
/// within 8 minutes.
#[derive(Parser, Debug)]
#[command(name = "mnist", version, after_help = EXAMPLES, override_usage = USAGE)]
struct Cli {
    #[command(subcommand)]
    command: Subcommands,
}

#[allow(clippy::large_enum_variant, reason = "there is one of it")]
#[derive(Subcommand, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Subcommands {
    /// Train fused, then unfused, each in a fresh process, and compare.
    #[command(after_help = COMPARE_EXAMPLES)]
    Compare(Compare),
    /// Train one variant, with checkpoints.
    #[command(after_help = TRAIN_EXAMPLES)]
    Train(Train),
    /// Check that both variants give the same losses from the same weights and batches.
    #[command(after_help = PARITY_EXAMPLES)]
    Parity(ParityArgs),
    /// Classify the test set, or pictures in a folder, with a model that `train` has trained.
    #[command(after_help = PREDICT_EXAMPLES)]
    Predict(Predict),
    #[command(name = WORKER, hide = true)]
    Worker,
}

impl Subcommands {
    /// Sets the options whose defaults depend on other options.
    fn complete(&mut self) {
        let (job, learning) = match self {
            Self::Compare(args) => (&mut args.job, Some(&mut args.learning)),
            Self::Train(args) => (&mut args.job, Some(&mut args.learning)),
            Self::Parity(args) => (&mut args.job, None),
            Self::Predict(_) | Self::Worker => return,
        };
        job.training.lr = Some(job.learning_rate());
        if let Some(learning) = learning {
            learning.dropout = Some(learning.dropout(job.network.model));
        }
    }

    fn take_config(&mut self) -> ConfigArgs {
        match self {
            Self::Compare(args) => std::mem::take(&mut args.job.config),
            Self::Train(args) => std::mem::take(&mut args.job.config),
            Self::Parity(args) => std::mem::take(&mut args.job.config),
            Self::Predict(args) => std::mem::take(&mut args.config),
            Self::Worker => ConfigArgs::default(),
        }
    }
}

#[derive(Args, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[command(next_help_heading = ON_NETWORK)]
struct NetworkArgs {
    /// Which network. Torchvision's take one channel, and digits padded with black to 32x32.
    #[arg(long, value_enum, default_value = "tutorial")]
    model: ModelChoice,
    /// Batch norm: Burn's, or the tutorial's (unbiased variance, epsilon outside the root).
    #[arg(long, value_enum, default_value = "burn")]
    norm: Norm,
}

#[derive(Args, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[command(next_help_heading = ON_TRAINING)]
struct TrainingArgs {
    /// Which optimizer.
    #[arg(long, value_enum, default_value = "adadelta")]
    optimizer: OptimizerChoice,
    /// Learning rate of the first epoch [default: 1 for adadelta, 0.001 for adam and adamw, 0.05
    /// for sgd].
    #[arg(long, value_name = "RATE", value_parser = finite)]
    lr: Option<f64>,
    /// Digits a step.
    #[arg(long, value_name = "N", default_value_t = 2048)]
    batch_size: usize,
    /// Seed of weights, order, dropout and built-in digits.
    #[arg(long, default_value_t = 123_456)]
    seed: u64,
}

#[derive(Args, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[command(next_help_heading = ON_DATA)]
struct DataArgs {
    /// MNIST if it is found or downloaded and built-in digits otherwise, or one of the two.
    #[arg(long, value_enum, default_value = "auto")]
    dataset: DatasetChoice,
    /// Folder with MNIST's four IDX files, plain or .gz.
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Do not try to download MNIST.
    #[arg(long)]
    no_download: bool,
    /// Train on the first N digits only.
    #[arg(long, value_name = "N")]
    train_limit: Option<usize>,
}

#[derive(Args, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[command(next_help_heading = "Computation")]
struct ComputeArgs {
    /// Device. Each needs Burn's feature of the same name in this build.
    #[arg(long, value_enum, default_value = "flex")]
    device: DeviceChoice,
    /// Element type. f16 and bf16 are mixed precision: convolutions and saved tensors in that type;
    /// parameters, norms, linear layers and checkpoints in f32.
    #[arg(long, value_enum, default_value = "f32")]
    precision: Precision,
    /// CPU threads [default: one per hardware thread].
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Whether fused blocks recompute the convolution's output in the backward pass, or keep it.
    #[arg(long, value_enum, default_value = "conv")]
    recompute: RecomputePolicy,
    /// Most bytes of workspace in the backward pass of a fused block.
    #[arg(long, value_name = "BYTES")]
    max_workspace: Option<usize>,
}

#[derive(Args, Debug, Default)]
#[command(next_help_heading = "Options as a file")]
struct ConfigArgs {
    /// Options from this TOML file, or JSON if it ends in .json: long names with values, true or
    /// false for a switch. The command line wins.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print the options in effect as such a file, and exit.
    #[arg(long)]
    print_config: bool,
}

#[derive(Args, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct JobArgs {
    #[command(flatten)]
    #[serde(flatten)]
    network: NetworkArgs,
    #[command(flatten)]
    #[serde(flatten)]
    training: TrainingArgs,
    #[command(flatten)]
    #[serde(flatten)]
    data: DataArgs,
    #[command(flatten)]
    #[serde(flatten)]
    compute: ComputeArgs,
    #[command(flatten)]
    #[serde(skip)]
    config: ConfigArgs,
}

/// Options of a training to its end, which `parity` has not.
#[derive(Args, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct LearningArgs {
    /// Probability of dropping a hidden value [default: 0.5 for tutorial and vgg16-bn, 0.2 for
    /// mobilenet-v2; the residual networks have no dropout].
    #[arg(long, value_name = "P", value_parser = finite, help_heading = ON_NETWORK)]
    dropout: Option<f64>,
    /// Factor on the learning rate after every epoch.
    #[arg(long, value_name = "FACTOR", default_value_t = 0.7, value_parser = finite, help_heading = ON_TRAINING)]
    gamma: f64,
    /// Test on the first N digits only.
    #[arg(long, value_name = "N", help_heading = ON_DATA)]
    test_limit: Option<usize>,
    /// Print the loss of every so many batches; 0 for none.
    #[arg(long, value_name = "N", default_value_t = 2, help_heading = ON_OUTPUT)]
    log_interval: usize,
}

impl LearningArgs {
    fn dropout(&self, model: ModelChoice) -> f64 {
        self.dropout.unwrap_or_else(|| model.default_dropout())
    }
}

impl JobArgs {
    fn learning_rate(&self) -> f64 {
        let optimizer = self.training.optimizer;
        self.training
            .lr
            .unwrap_or_else(|| optimizer.default_learning_rate())
    }

    /// The job, on a device that is there and computes in its precision.
    fn into_job(self, epochs: usize, learning: LearningArgs) -> Result<Job> {
        self.compute.device.open_for(self.compute.precision)?;
        Ok(Job {
            learning_rate: self.learning_rate(),
            dropout: learning.dropout(self.network.model),
            dataset: self.data.dataset,
            data_dir: self.data.data_dir,
            download: !self.data.no_download,
            train_limit: self.data.train_limit,
            test_limit: learning.test_limit,
            epochs,
            batch_size: self.training.batch_size,
            model: self.network.model,
            optimizer: self.training.optimizer,
            decay: learning.gamma,
            norm: self.network.norm,
            precision: self.compute.precision,
            device: self.compute.device,
            recompute: self.compute.recompute,
            max_workspace: self.compute.max_workspace,
            seed: self.training.seed,
            log_interval: learning.log_interval,
        })
    }
}

#[derive(Args, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Compare {
    /// Epochs.
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = ON_RUN)]
    epochs: usize,
    /// Limit on the estimated duration, in minutes; above it, training is on fewer digits.
    #[arg(long, value_name = "MINUTES", value_parser = finite, help_heading = ON_RUN)]
    time_limit: Option<f64>,
    /// Folder for the logs of the metrics.
    #[arg(long, value_name = "DIR", default_value = "artifacts/compare", help_heading = ON_RUN)]
    artifacts: PathBuf,
    #[command(flatten)]
    #[serde(flatten)]
    job: JobArgs,
    #[command(flatten)]
    #[serde(flatten)]
    learning: LearningArgs,
    /// Write the results to this file.
    #[arg(long, value_name = "FILE", help_heading = ON_OUTPUT)]
    json: Option<PathBuf>,
    /// Draw memory over one training step, and the losses, to this SVG file.
    #[arg(long, value_name = "FILE", help_heading = ON_OUTPUT)]
    plot: Option<PathBuf>,
}

#[derive(Args, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Train {
    /// Epochs, those of a resumed run included.
    #[arg(long, value_name = "N", default_value_t = 5, help_heading = ON_RUN)]
    epochs: usize,
    /// Stop when the test loss has not improved for N epochs.
    #[arg(long, value_name = "N", help_heading = ON_RUN)]
    early_stopping: Option<usize>,
    /// Folder for checkpoints and logs.
    #[arg(long, value_name = "DIR", default_value = RUN, help_heading = ON_RUN)]
    artifacts: PathBuf,
    /// Resume the run in the folder from its newest complete checkpoint, with its options.
    #[arg(long, conflicts_with = "overwrite", help_heading = ON_RUN)]
    resume: bool,
    /// Remove an earlier run in the folder.
    #[arg(long, help_heading = ON_RUN)]
    overwrite: bool,
    /// Which form of the network.
    #[arg(long, value_enum, default_value = "fused", help_heading = ON_NETWORK)]
    variant: Variant,
    #[command(flatten)]
    #[serde(flatten)]
    job: JobArgs,
    #[command(flatten)]
    #[serde(flatten)]
    learning: LearningArgs,
    /// Print lines even on a terminal, where Burn's dashboard is shown otherwise.
    #[arg(long, help_heading = ON_OUTPUT)]
    plain: bool,
    /// Write the results to this file.
    #[arg(long, value_name = "FILE", help_heading = ON_OUTPUT)]
    json: Option<PathBuf>,
}

#[derive(Args, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct ParityArgs {
    /// Training steps.
    #[arg(long, value_name = "N", default_value_t = 30, help_heading = ON_RUN)]
    steps: usize,
    #[command(flatten)]
    #[serde(flatten)]
    job: JobArgs,
}

#[derive(Args, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Predict {
    #[command(flatten)]
    #[serde(flatten)]
    what: WhatArgs,
    #[command(flatten)]
    #[serde(flatten)]
    trained: TrainedArgs,
    #[command(flatten)]
    #[serde(flatten)]
    data: TestDataArgs,
    #[command(flatten)]
    #[serde(flatten)]
    compute: PredictComputeArgs,
    #[command(flatten)]
    #[serde(skip)]
    config: ConfigArgs,
    /// Draw the misclassified digits of the test set, highest loss first, to this SVG or PNG file.
    #[arg(long, value_name = "FILE", help_heading = ON_OUTPUT)]
    mistakes: Option<PathBuf>,
    /// Write the predictions to this file.
    #[arg(long, value_name = "FILE", help_heading = ON_OUTPUT)]
    json: Option<PathBuf>,
}

#[derive(Args, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[command(next_help_heading = "What to classify")]
struct WhatArgs {
    /// The pictures in this folder: .png, .pgm, .ppm, .pbm and .pnm files of any size.
    #[arg(long, value_name = "DIR", conflicts_with = "test_set")]
    images: Option<PathBuf>,
    /// The test set, with accuracy and confusion matrix.
    #[arg(long)]
    test_set: bool,
}

#[derive(Args, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[command(next_help_heading = "Trained model")]
struct TrainedArgs {
    /// Folder of the training: its --artifacts.
    #[arg(long, value_name = "DIR", default_value = RUN)]
    artifacts: PathBuf,
    /// Take the checkpoint after this epoch [default: the newest complete one].
    #[arg(long, value_name = "N")]
    epoch: Option<usize>,
    /// In which form to run it [default: the one that was trained].
    #[arg(long, value_enum)]
    form: Option<PredictForm>,
}

#[derive(Args, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[command(next_help_heading = "Test digits")]
struct TestDataArgs {
    /// MNIST if it is found or downloaded and built-in digits otherwise, or one of the two [default:
    /// as in the training].
    #[arg(long, value_enum)]
    dataset: Option<DatasetChoice>,
    /// Folder with MNIST's four IDX files, plain or .gz [default: as in the training].
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Do not try to download MNIST.
    #[arg(long)]
    no_download: bool,
    /// Test on the first N digits only [default: as in the training].
    #[arg(long, value_name = "N")]
    test_limit: Option<usize>,
}

#[derive(Args, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[command(next_help_heading = "Computation")]
struct PredictComputeArgs {
    /// Device [default: as in the training].
    #[arg(long, value_enum)]
    device: Option<DeviceChoice>,
    /// CPU threads [default: one per hardware thread].
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Digits a batch; the tutorial's network normalizes by batch [default: as in the training].
    #[arg(long, value_name = "N")]
    batch_size: Option<usize>,
}

/// A number that JSON has.
fn finite(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if number.is_finite() => Ok(number),
        Ok(_) => Err("must be finite".to_string()),
        Err(error) => Err(error.to_string()),
    }
}

/// Runs the command line of this process. `allocator` must be the global allocator.
///
/// ```no_run
/// use std::process::ExitCode;
///
/// use burn_conv_bn_memory::CountingAllocator;
///
/// #[global_allocator]
/// static ALLOCATOR: CountingAllocator = CountingAllocator::new();
///
/// fn main() -> ExitCode {
///     burn_conv_bn_train::cli::main(&ALLOCATOR)
/// }
/// ```
pub fn main(allocator: &'static CountingAllocator) -> ExitCode {
    let done = Invocation::read(std::env::args_os().collect())
        .and_then(|invocation| execute(invocation, allocator));
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Whoever closed the pipe has seen enough.
            let mut printing = error
                .chain()
                .filter_map(|cause| cause.downcast_ref::<PrintError>());
            if !printing.any(PrintError::is_closed) {
                warn(format_args!("error: {}", message(&error)));
            }
            ExitCode::FAILURE
        }
    }
}

/// A command, with what files add to it: its configuration, and the run that it resumes.
struct Invocation {
    command: Subcommands,
    /// All options of the command with their values.
    options: Options,
    /// The run to be resumed.
    stored: Option<RunFile>,
}

impl Invocation {
    /// Reads a command line and its files. Ends the process if the command line alone is wrong, or asks
    /// for help.
    fn read(mut arguments: Vec<OsString>) -> Result<Self> {
        let bare = is_bare(&arguments);
        if bare {
            arguments.insert(arguments.len().min(1), "compare".into());
        }
        let matches = match Cli::command().try_get_matches_from(arguments) {
            Ok(matches) => matches,
            Err(error) => {
                error.print().map_err(PrintError::from)?;
                std::process::exit(error.exit_code());
            }
        };
        let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
        let mut command = cli.command;
        if let (true, Subcommands::Compare(args)) = (bare, &mut command) {
            args.time_limit.get_or_insert(DEFAULT_TIME_LIMIT);
        }
        let mut layers = Layers::new(&command, matches.subcommand().map(|(_, given)| given))?;
        if let Err(error) = layers.check() {
            Cli::command()
                .error(ErrorKind::ValueValidation, error)
                .exit();
        }
        let ConfigArgs {
            config,
            print_config,
        } = command.take_config();
        if let Some(path) = config {
            command = layers.add(&config::read(&path)?, &path.display().to_string())?;
        }
        if layers.options.get("dataset") == Some(&"synthetic".into()) && layers.is_given("data-dir")
        {
            bail!("--dataset synthetic draws its digits, and reads none from --data-dir");
        }
        let mut stored = None;
        if let Subcommands::Train(Train {
            resume: true,
            artifacts,
            ..
        }) = &command
            && let Some(file) = stored_run(artifacts)?
        {
            let origin = artifacts.join(RUN_FILE).display().to_string();
            command = layers.add(&file.options, &origin)?;
            stored = Some(file);
        }
        command.complete();
        let options = config::effective(&command)?;
        if print_config {
            say!("{}", config::to_toml(&options).trim_end())?;
            std::process::exit(0);
        }
        Ok(Self {
            command,
            options,
            stored,
        })
    }
}

/// Whether a command line has no command, but options of `compare` or nothing.
fn is_bare(arguments: &[OsString]) -> bool {
    const OWN: [&str; 4] = ["-h", "--help", "-V", "--version"];

    arguments.get(1).is_none_or(|first| {
        first.as_encoded_bytes().starts_with(b"-") && OWN.iter().all(|own| first != own)
    })
}

/// What the run in a folder was started with. None if there is no run.
fn stored_run(directory: &Path) -> Result<Option<RunFile>, RunFileError> {
    match RunFile::read(directory) {
        Ok(file) => Ok(Some(file)),
        Err(RunFileError::Missing { .. }) if !checkpoint::folder(directory).exists() => Ok(None),
        Err(error) => Err(error),
    }
}

fn execute(invocation: Invocation, allocator: &'static CountingAllocator) -> Result<()> {
    let trains = matches!(invocation.command, Subcommands::Train(_));
    let interrupter = interrupt::listen(trains).context("cannot listen for Ctrl-C")?;
    match invocation.command {
        Subcommands::Worker => work(allocator, interrupter),
        Subcommands::Compare(args) => run_compare(args, allocator, &interrupter),
        Subcommands::Train(args) => train(
            args,
            &invocation.options,
            invocation.stored,
            allocator,
            interrupter,
        ),
        Subcommands::Parity(args) => parity(args, &interrupter),
        Subcommands::Predict(args) => run_predict(args, &interrupter),
    }
}

/// Bounds the threads that Flex and our kernels compute with.
fn set_threads(threads: Option<usize>) -> Result<()> {
    let Some(threads) = threads else {
        return Ok(());
    };
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build_global()
        .with_context(|| format!("cannot compute with {threads} threads"))
}

fn run_compare(
    args: Compare,
    allocator: &'static CountingAllocator,
    interrupter: &Interrupter,
) -> Result<()> {
    let threads = args.job.compute.threads;
    set_threads(threads)?;
    let time_limit = args.time_limit.map(|minutes| {
        // More than fits is as good as none.
        Duration::try_from_secs_f64(60.0 * minutes).unwrap_or(Duration::MAX)
    });
    let options = CompareOptions {
        variants: vec![Variant::Fused, Variant::Unfused],
        json: args.json,
        plot: args.plot,
        artifacts: args.artifacts,
        time_limit,
        threads,
    };
    let job = args.job.into_job(args.epochs, args.learning)?;
    compare(job, &options, allocator, interrupter)
}

fn train(
    args: Train,
    given: &Options,
    stored: Option<RunFile>,
    allocator: &'static CountingAllocator,
    interrupter: Interrupter,
) -> Result<()> {
    let Train {
        epochs,
        early_stopping,
        artifacts: directory,
        resume,
        overwrite,
        variant,
        job,
        learning,
        plain,
        json,
    } = args;
    if resume && overwrite {
        bail!("--resume goes on with the run that --overwrite removes; use one of them");
    }
    set_threads(job.compute.threads)?;
    let resume = if resume { Resume::Latest } else { Resume::No };
    // Before the digits are drawn or downloaded.
    if let Some(stored) = &stored {
        stored.check_options(&directory, given)?;
    }
    check_directory(&directory, resume, overwrite)?;
    output::check(&[("--json", json.as_deref())])?;
    let job = job.into_job(epochs, learning)?;
    job.check()?;
    let data = job.data()?;
    say!("Data: {}", data.origin)?;
    job.precision.announce()?;
    job.check_digits(data.train.len())?;
    let mut report = job.report(&data);
    let identity = DataIdentity::of(&data);
    if let Some(stored) = &stored {
        stored.check_data(&directory, &identity)?;
    }
    let steps = job.steps(data.train.len());
    let options = RunOptions {
        directory: directory.clone(),
        overwrite,
        checkpoints: true,
        resume,
        patience: early_stopping,
        dashboard: !plain,
        run_file: Some(RunFile::new(given, identity).to_json()),
        interrupter,
    };
    let (trained, outcome) = run(&job, variant, data, allocator, options)?;
    report.variants.push(trained);
    let tested = outcome.history.last();
    let tested = tested.map(|epoch| format!("Test set ({}): {}", report.dataset, epoch.test));
    let json = json.as_deref();
    let files = json.map(|path| ("Report", path, output::json(&report)));
    output::finish(tested, Vec::from_iter(files))?;
    let kept = checkpoint::epochs(&directory)
        .with_context(|| format!("cannot read {}", checkpoint::folder(&directory).display()))?;
    // Ctrl-C may have come when everything was done.
    if outcome.interrupted.is_some() && kept.last() != Some(&epochs) {
        bail!("{}", interruption(&outcome, steps, &kept, &directory, json));
    }
    match outcome.epochs.last().map(|epoch| epoch.epoch) {
        None if outcome.stopped_early => say!(
            "Nothing to do: the run that was resumed stopped early after epoch {}.",
            outcome.history.len()
        )?,
        None => say!(
            "Nothing to do: the run that was resumed has {} epochs already.",
            outcome.history.len()
        )?,
        Some(epoch) if epoch < epochs => {
            say!("Stopped early after epoch {epoch}: the test loss no longer improves.")?;
        }
        Some(_) => {}
    }
    report.check_finite()
}

/// What was lost of a training that was interrupted, and what is left of it.
fn interruption(
    outcome: &FitOutcome,
    steps: usize,
    kept: &[usize],
    directory: &Path,
    report: Option<&Path>,
) -> String {
    let lost = match outcome.epochs.last() {
        None => "before the first training step".to_string(),
        Some(epoch) if epoch.train.steps.len() < steps => format!(
            "in epoch {} after {} of its {steps} training steps, which are lost",
            epoch.epoch,
            epoch.train.steps.len()
        ),
        Some(epoch) => format!(
            "in the test after epoch {}, which is lost: its checkpoint comes after the test",
            epoch.epoch
        ),
    };
    let directory = directory.display();
    let left = match kept {
        [] => format!(
            "no epoch was finished, so that there is no checkpoint in {directory}; --resume starts \
             the run anew"
        ),
        [.., last] => format!(
            "kept in {directory}: {} and the logs; --resume goes on with epoch {}",
            checkpoint::named(kept),
            last + 1
        ),
    };
    let report = match report {
        Some(path) => format!("; {} has the epochs that were finished", path.display()),
        None => String::new(),
    };
    format!("interrupted {lost}; {left}{report}")
}

fn parity(args: ParityArgs, interrupter: &Interrupter) -> Result<()> {
    set_threads(args.job.compute.threads)?;
    let learning = LearningArgs {
        // Trained without, whatever the network has.
        dropout: None,
        gamma: 1.0,
        test_limit: Some(1),
        log_interval: 0,
    };
    let job = args.job.into_job(1, learning)?;
    job.check()?;
    Parity::check(job.precision)?;
    let data = job.data()?;
    say!("Data: {}", data.origin)?;
    job.check_digits(data.train.len())?;
    Parity::measure(&job, Arc::new(data.train), args.steps, interrupter)?.judge()
}

fn run_predict(args: Predict, interrupter: &Interrupter) -> Result<()> {
    let source = match (args.what.images, args.what.test_set) {
        (Some(folder), false) => Source::Images(folder),
        (None, true) => Source::TestSet,
        (Some(_), true) => bail!("--images and --test-set exclude each other"),
        (None, false) => bail!("there is nothing to classify; use --images DIR or --test-set"),
    };
    set_threads(args.compute.threads)?;
    let directory = args.trained.artifacts;
    let file = RunFile::read(&directory)?;
    let Train {
        variant,
        epochs,
        mut job,
        mut learning,
        ..
    } = stored_options(&file, &directory)?;
    if matches!(source, Source::Images(_)) && job.network.model.tracks_statistics() {
        for (option, is_given) in [
            ("--dataset", args.data.dataset.is_some()),
            ("--data-dir", args.data.data_dir.is_some()),
            ("--test-limit", args.data.test_limit.is_some()),
        ] {
            if is_given {
                bail!(
                    "{option} is about test digits, of which {} needs none for pictures",
                    job.network.model.name()
                );
            }
        }
    }
    let (data, compute) = (&mut job.data, &mut job.compute);
    data.dataset = args.data.dataset.unwrap_or(data.dataset);
    data.data_dir = args.data.data_dir.or(data.data_dir.take());
    data.no_download |= args.data.no_download;
    learning.test_limit = args.data.test_limit.or(learning.test_limit);
    compute.device = args.compute.device.unwrap_or(compute.device);
    let batch_size = args.compute.batch_size;
    job.training.batch_size = batch_size.unwrap_or(job.training.batch_size);
    let options = PredictOptions {
        directory,
        epoch: args.trained.epoch,
        form: args.trained.form.unwrap_or(variant.into()),
        source,
        trained_on: file.data.name,
        json: args.json,
        mistakes: args.mistakes,
    };
    predict(&job.into_job(epochs, learning)?, &options, interrupter)
}

/// The options of `mnist train` that a run was started with.
fn stored_options(file: &RunFile, directory: &Path) -> Result<Train> {
    let defaults = Cli::try_parse_from(["mnist", "train"])?.command;
    let origin = directory.join(RUN_FILE).display().to_string();
    match Layers::new(&defaults, None)?.add(&file.options, &origin)? {
        Subcommands::Train(train) => Ok(train),
        _ => unreachable!("options do not change the command"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::any::TypeId;

    use clap::ValueEnum;

    use crate::metrics::{Evaluation, SplitRecord, StepRecord};

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    /// Also that no option hides among those without a heading.
    #[test]
    fn help_has_every_option_under_a_heading_and_fits_the_terminal() {
        let mut command = Cli::command();
        command.build();
        let own = |command: &&clap::Command| command.get_name() != "help";
        for subcommand in command.get_subcommands().filter(own) {
            for arg in subcommand.get_arguments() {
                let own = ["help", "version"].contains(&arg.get_id().as_str());
                let headed = arg.get_help_heading().is_some();
                assert!(own || headed, "{} {arg}", subcommand.get_name());
                let helped = arg.get_help().is_some();
                assert!(helped, "{} {arg}", subcommand.get_name());
            }
            let help = subcommand.clone().term_width(100).render_long_help();
            for line in help.to_string().lines() {
                let width = line.chars().count();
                assert!(width <= 102, "{}: {line}", subcommand.get_name());
            }
        }
    }

    #[test]
    fn examples_are_command_lines() {
        let all = [
            EXAMPLES,
            COMPARE_EXAMPLES,
            TRAIN_EXAMPLES,
            PARITY_EXAMPLES,
            PREDICT_EXAMPLES,
        ];
        let mut count = 0;
        for line in all.into_iter().flat_map(str::lines) {
            let Some(example) = line.strip_prefix("  ") else {
                continue;
            };
            let mut arguments: Vec<OsString> = example.split_whitespace().map(Into::into).collect();
            if is_bare(&arguments) {
                arguments.insert(1, "compare".into());
            }
            Cli::try_parse_from(arguments).unwrap_or_else(|error| panic!("{example}: {error}"));
            count += 1;
        }
        assert!(count > 10, "{count}");
    }

    /// Files have the options and values of the command line, and every number has bounds.
    #[test]
    fn files_and_the_command_line_agree() {
        let options = |arguments: &[&str]| {
            let cli = Cli::try_parse_from(["mnist"].iter().chain(arguments)).unwrap();
            Layers::new(&cli.command, None).unwrap().options
        };
        let command = Cli::command();
        for name in ["compare", "train", "parity", "predict"] {
            let args = command.find_subcommand(name).unwrap().get_arguments();
            let mut names = Vec::new();
            for arg in args {
                let long = arg.get_long().unwrap();
                if ["config", "print-config"].contains(&long) {
                    continue;
                }
                names.push(long);
                for value in arg.get_possible_values() {
                    let value = value.get_name();
                    // A switch has true and false.
                    if arg.get_action().takes_values() {
                        let set = options(&[name, &format!("--{long}={value}")]);
                        assert_eq!(set[long], value, "{name} --{long}");
                    }
                }
                let kind = arg.get_value_parser().type_id();
                let number = kind == TypeId::of::<usize>() || kind == TypeId::of::<f64>();
                let bounded = config::check(long, &(-1.0).into()).is_err();
                assert_eq!(bounded, number, "{name} --{long}");
            }
            names.sort_unstable();
            let keys: Vec<String> = options(&[name]).into_iter().map(|(key, _)| key).collect();
            assert_eq!(keys, names, "{name}");
        }
    }

    /// What help says of defaults that depend on other options.
    #[test]
    fn help_names_the_defaults() {
        let command = Cli::command();
        let train = command.find_subcommand("train").unwrap();
        let help = |option: &str| {
            let mut arguments = train.get_arguments();
            let arg = arguments.find(|arg| arg.get_long() == Some(option));
            arg.unwrap().get_help().unwrap().to_string()
        };
        for choice in OptimizerChoice::value_variants() {
            let text = help("lr");
            let rate = choice.default_learning_rate().to_string();
            let part = text
                .split([':', ','])
                .find(|part| part.contains(choice.name()));
            let part = part.unwrap_or_else(|| panic!("no {} in {text}", choice.name()));
            assert!(part.contains(&rate), "{rate} for {choice:?} in {text}");
        }
        for choice in ModelChoice::value_variants() {
            let dropout = choice.default_dropout();
            let text = help("dropout");
            let part = text
                .split([':', ',', ';'])
                .find(|part| part.contains(choice.name()));
            match part {
                Some(part) => assert!(part.contains(&dropout.to_string()), "{text}"),
                None => assert_eq!(dropout, 0.0, "{choice:?} in {text}"),
            }
        }
    }

    fn outcome(epochs: &[usize], steps: usize, tested: bool) -> FitOutcome {
        let job = crate::job::tests::job(5, 32);
        let step = StepRecord {
            evaluation: Evaluation::default(),
            measure: crate::step::StepMeasure {
                memory: crate::memory::StepMemory::default(),
                duration: Duration::ZERO,
            },
        };
        FitOutcome {
            model: job.classifier(Variant::Fused, crate::memory::MemoryProbe::off()),
            epochs: epochs
                .iter()
                .map(|&epoch| crate::fit::EpochRecord {
                    epoch,
                    train: SplitRecord {
                        evaluation: Evaluation::default(),
                        steps: vec![step; steps],
                    },
                    test: tested.then(Evaluation::default),
                })
                .collect(),
            history: Vec::new(),
            stopped_early: false,
            interrupted: None,
        }
    }

    #[test]
    fn an_interruption_says_what_is_kept_and_what_is_not() {
        let directory = Path::new("runs/a");
        let report = Some(Path::new("out.json"));
        for (outcome, kept, report, parts) in [
            (
                outcome(&[1], 3, false),
                &[][..],
                None,
                [
                    "interrupted in epoch 1 after 3 of its 30 training steps, which are lost",
                    "no epoch was finished",
                    "no checkpoint in runs/a",
                    "--resume starts the run anew",
                ],
            ),
            (
                outcome(&[3, 4], 12, false),
                &[1, 2, 3][..],
                report,
                [
                    "interrupted in epoch 4 after 12 of its 30 training steps",
                    "kept in runs/a: the checkpoints of epochs 1, 2 and 3 and the logs",
                    "--resume goes on with epoch 4",
                    "out.json has the epochs that were finished",
                ],
            ),
            (
                outcome(&[2], 30, true),
                &[1][..],
                None,
                [
                    "interrupted in the test after epoch 2, which is lost",
                    "the checkpoint of epoch 1 and",
                    "--resume goes on with epoch 2",
                    "logs",
                ],
            ),
            (
                outcome(&[], 0, false),
                &[4, 5][..],
                None,
                [
                    "interrupted before the first training step",
                    "the checkpoints of epochs 4 and 5",
                    "--resume goes on with epoch 6",
                    "kept",
                ],
            ),
        ] {
            let text = interruption(&outcome, 30, kept, directory, report);
            for part in parts {
                assert!(text.contains(part), "no {part:?} in {text}");
            }
        }
    }
}
