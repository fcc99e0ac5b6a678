//! The command line of the `mnist` binary.

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use burn::train::Interrupter;
use burn_conv_bn_memory::CountingAllocator;
use clap::{ArgMatches, Args, Command, CommandFactory, FromArgMatches, Parser, Subcommand};
use serde_json::Value;

use crate::checkpoint;
use crate::compare::{CompareOptions, WORKER, compare, work};
use crate::config::{self, ConfigError, DataIdentity, Options, RunFile, RunFileError};
use crate::data::DatasetChoice;
use crate::device::{DeviceChoice, DeviceError};
use crate::fit::{FitOutcome, Resume};
use crate::interrupt;
use crate::job::{Job, Norm, Precision, RecomputePolicy, RunOptions, Variant, run};
use crate::model::ModelChoice;
use crate::optim::OptimizerChoice;
use crate::output;
use crate::parity::Parity;
use crate::predict::{PredictForm, PredictOptions, Source, predict};
use crate::print::{PrintError, message, say, warn};

/// How long the job without a subcommand may take.
const DEFAULT_TIME_LIMIT: Duration = Duration::from_secs(8 * 60);

/// Where `train` keeps a run, and `predict` looks for it.
const RUN: &str = "artifacts/train";

/// Headings of the options that a subcommand has of its own.
const ON_RUN: &str = "Run";
const ON_OUTPUT: &str = "Output";
const ON_NETWORK: &str = "Network";

const EXAMPLES: &str = "\
Examples:
  mnist
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

A run is resumed with the options that it was started with, which its folder has in job.json.
Options that decide what is computed cannot be changed; others, such as --epochs, --device or
--early-stopping, can.";

const PARITY_EXAMPLES: &str = "\
Examples:
  mnist parity --batch-size 256
  mnist parity --batch-size 256 --precision f64 --model resnet18 --steps 5";

const PREDICT_EXAMPLES: &str = "\
Examples:
  mnist predict --test-set --mistakes mistakes.png
  mnist predict --images scans --json predictions.json
  mnist predict --artifacts runs/mobilenet --form folded --test-set --dataset synthetic

Pictures are made what MNIST's digits are: grey, the ink white on black whichever way it was, scaled
to 20 pixels, and centred by its mass on 28x28. The background is what is along the edges; each
picture should show one digit and nothing else. One that cannot be read is named and left out, and
makes the exit status 1.

The tutorial's network keeps no statistics for evaluation: it normalizes a batch with the batch's
own. The test set is therefore classified in batches as large as those of the training, and a
picture with the statistics of as many test digits (--dataset, --data-dir): what it is taken for
depends on no other picture. Such a network cannot be folded. The other networks keep running
statistics, and need no test digits to classify pictures.";

/// Trains the network of the PyTorch tutorial "Fusing Convolution and Batch Norm using Custom
/// Function" on MNIST, fused and unfused, and compares memory, time and accuracy.
///
/// Without a command it does the tutorial's job: `compare`, cut down to end within minutes.
#[derive(Parser, Debug)]
#[command(name = "mnist", version, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Option<Subcommands>,
}

#[derive(Subcommand, Debug)]
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
    /// The job, of those that have one.
    fn job(&self) -> Option<&JobArgs> {
        match self {
            Self::Compare(args) => Some(&args.job),
            Self::Train(args) => Some(&args.job),
            Self::Parity(args) => Some(&args.job),
            Self::Predict(_) | Self::Worker => None,
        }
    }
}

#[derive(Args, Debug)]
#[command(next_help_heading = "Network")]
struct NetworkArgs {
    /// Which network. Torchvision's take one channel, and digits padded with black to 32x32.
    #[arg(long, value_enum, default_value = "tutorial")]
    model: ModelChoice,
    /// Batch norm: Burn's, or the tutorial's (unbiased variance, epsilon outside the root).
    #[arg(long, value_enum, default_value = "burn")]
    norm: Norm,
    /// Probability of dropping a hidden value [default: 0.5 for tutorial and vgg16-bn, 0.2 for
    /// mobilenet-v2; the residual networks have no dropout].
    #[arg(long, value_name = "P", value_parser = probability)]
    dropout: Option<f64>,
}

#[derive(Args, Debug)]
#[command(next_help_heading = "Training")]
struct TrainingArgs {
    /// Which optimizer.
    #[arg(long, value_enum, default_value = "adadelta")]
    optimizer: OptimizerChoice,
    /// Learning rate of the first epoch [default: 1 for adadelta, 0.001 for adam and adamw, 0.05
    /// for sgd].
    #[arg(long, value_name = "RATE", value_parser = positive_number)]
    lr: Option<f64>,
    /// Factor on the learning rate after every epoch.
    #[arg(long, value_name = "FACTOR", default_value_t = 0.7, value_parser = positive_number)]
    gamma: f64,
    /// Digits a step.
    #[arg(long, value_name = "N", default_value_t = 2048, value_parser = positive)]
    batch_size: usize,
    /// Seed of weights, order, dropout and built-in digits.
    #[arg(long, default_value_t = 123_456)]
    seed: u64,
}

#[derive(Args, Debug)]
#[command(next_help_heading = "Data")]
struct DataArgs {
    /// MNIST if it can be had and built-in digits otherwise, or one of them for sure.
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
    /// Test on the first N digits only.
    #[arg(long, value_name = "N")]
    test_limit: Option<usize>,
}

#[derive(Args, Debug)]
#[command(next_help_heading = "Computation")]
struct ComputeArgs {
    /// Where to compute. A device needs Burn's feature of the same name in this build.
    #[arg(long, value_enum, default_value = "flex")]
    device: DeviceChoice,
    /// What to compute in. f16 and bf16 are mixed precision: convolutions and what is kept for the
    /// backward pass in that type; parameters, norms, linear layers and checkpoints in f32.
    #[arg(long, value_enum, default_value = "f32")]
    precision: Precision,
    /// Threads of the CPU [default: as many as the machine runs at once].
    #[arg(long, value_name = "N", value_parser = positive)]
    threads: Option<usize>,
    /// What fused blocks do with the convolution's output: recompute it in the backward pass, or
    /// never.
    #[arg(long, value_enum, default_value = "conv")]
    recompute: RecomputePolicy,
    /// Most bytes of workspace in the backward pass of a fused block.
    #[arg(long, value_name = "BYTES", value_parser = positive)]
    max_workspace: Option<usize>,
}

#[derive(Args, Debug)]
#[command(next_help_heading = "Options as a file")]
struct ConfigArgs {
    /// Read options from this TOML file, or JSON if it ends in .json: their long names, each with
    /// its value or, for a switch, true or false. What is on the command line wins.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print all options with the values that they have, as such a file, and do nothing else.
    #[arg(long)]
    print_config: bool,
}

#[derive(Args, Debug)]
struct JobArgs {
    #[command(flatten)]
    network: NetworkArgs,
    #[command(flatten)]
    training: TrainingArgs,
    #[command(flatten)]
    data: DataArgs,
    #[command(flatten)]
    compute: ComputeArgs,
    #[command(flatten)]
    config: ConfigArgs,
    /// Print the loss of every so many batches; 0 for none.
    #[arg(long, value_name = "N", default_value_t = 2, help_heading = ON_OUTPUT)]
    log_interval: usize,
}

impl JobArgs {
    fn learning_rate(&self) -> f64 {
        let optimizer = self.training.optimizer;
        self.training
            .lr
            .unwrap_or_else(|| optimizer.default_learning_rate())
    }

    fn dropout(&self) -> f64 {
        let model = self.network.model;
        self.network
            .dropout
            .unwrap_or_else(|| model.default_dropout())
    }

    /// The job, on a device that is there and computes in its precision.
    fn into_job(self, epochs: usize) -> Result<Job, DeviceError> {
        self.compute.device.open_for(self.compute.precision)?;
        Ok(Job {
            learning_rate: self.learning_rate(),
            dropout: self.dropout(),
            dataset: self.data.dataset,
            data_dir: self.data.data_dir,
            download: !self.data.no_download,
            train_limit: self.data.train_limit,
            test_limit: self.data.test_limit,
            epochs,
            batch_size: self.training.batch_size,
            model: self.network.model,
            optimizer: self.training.optimizer,
            decay: self.training.gamma,
            norm: self.network.norm,
            precision: self.compute.precision,
            device: self.compute.device,
            recompute: self.compute.recompute,
            max_workspace: self.compute.max_workspace,
            seed: self.training.seed,
            log_interval: self.log_interval,
        })
    }
}

#[derive(Args, Debug)]
struct Compare {
    /// Epochs.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = positive, help_heading = ON_RUN)]
    epochs: usize,
    /// If it would take longer than this many minutes by the estimate, train on fewer digits.
    #[arg(long, value_name = "MINUTES", value_parser = positive_number, help_heading = ON_RUN)]
    time_limit: Option<f64>,
    /// Folder for the logs of the metrics.
    #[arg(long, value_name = "DIR", default_value = "artifacts/compare", help_heading = ON_RUN)]
    artifacts: PathBuf,
    #[command(flatten)]
    job: JobArgs,
    /// Write the results to this file.
    #[arg(long, value_name = "FILE", help_heading = ON_OUTPUT)]
    json: Option<PathBuf>,
    /// Draw memory over one training step, and the losses, to this SVG file.
    #[arg(long, value_name = "FILE", help_heading = ON_OUTPUT)]
    plot: Option<PathBuf>,
}

#[derive(Args, Debug)]
struct Train {
    /// Epochs, those of a resumed run included.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = positive, help_heading = ON_RUN)]
    epochs: usize,
    /// Stop when the test loss has not improved for N epochs.
    #[arg(long, value_name = "N", value_parser = positive, help_heading = ON_RUN)]
    early_stopping: Option<usize>,
    /// Folder for checkpoints and logs.
    #[arg(long, value_name = "DIR", default_value = RUN, help_heading = ON_RUN)]
    artifacts: PathBuf,
    /// Go on from the newest complete checkpoint in the folder, with the run's own options.
    #[arg(long, conflicts_with = "overwrite", help_heading = ON_RUN)]
    resume: bool,
    /// Remove an earlier run in the folder.
    #[arg(long, help_heading = ON_RUN)]
    overwrite: bool,
    /// Which form of the network.
    #[arg(long, value_enum, default_value = "fused", help_heading = ON_NETWORK)]
    variant: Variant,
    #[command(flatten)]
    job: JobArgs,
    /// Print lines even on a terminal, where Burn's dashboard is shown otherwise.
    #[arg(long, help_heading = ON_OUTPUT)]
    plain: bool,
    /// Write the results to this file.
    #[arg(long, value_name = "FILE", help_heading = ON_OUTPUT)]
    json: Option<PathBuf>,
}

#[derive(Args, Debug)]
struct ParityArgs {
    /// Training steps.
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = positive, help_heading = ON_RUN)]
    steps: usize,
    #[command(flatten)]
    job: JobArgs,
}

#[derive(Args, Debug)]
struct Predict {
    #[command(flatten)]
    what: WhatArgs,
    #[command(flatten)]
    trained: TrainedArgs,
    #[command(flatten)]
    data: TestDataArgs,
    #[command(flatten)]
    compute: PredictComputeArgs,
    #[command(flatten)]
    config: ConfigArgs,
    /// Draw the digits of the test set that were taken for others, the worst first, to this SVG or
    /// PNG file.
    #[arg(long, value_name = "FILE", help_heading = ON_OUTPUT)]
    mistakes: Option<PathBuf>,
    /// Write the predictions to this file.
    #[arg(long, value_name = "FILE", help_heading = ON_OUTPUT)]
    json: Option<PathBuf>,
}

#[derive(Args, Debug)]
#[command(next_help_heading = "What to classify")]
struct WhatArgs {
    /// The pictures in this folder: .png, .pgm, .ppm, .pbm and .pnm files of any size.
    #[arg(long, value_name = "DIR", conflicts_with = "test_set")]
    images: Option<PathBuf>,
    /// The test set, with accuracy and confusion matrix.
    #[arg(long)]
    test_set: bool,
}

#[derive(Args, Debug)]
#[command(next_help_heading = "Trained model")]
struct TrainedArgs {
    /// Folder of the training: its --artifacts.
    #[arg(long, value_name = "DIR", default_value = RUN)]
    artifacts: PathBuf,
    /// Take the checkpoint after this epoch [default: the newest complete one].
    #[arg(long, value_name = "N", value_parser = positive)]
    epoch: Option<usize>,
    /// In which form to run it [default: the one that was trained].
    #[arg(long, value_enum)]
    form: Option<PredictForm>,
}

#[derive(Args, Debug)]
#[command(next_help_heading = "Test digits")]
struct TestDataArgs {
    /// MNIST if it can be had and built-in digits otherwise, or one of them for sure [default: as
    /// in the training].
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

#[derive(Args, Debug)]
#[command(next_help_heading = "Computation")]
struct PredictComputeArgs {
    /// Where to compute [default: as in the training].
    #[arg(long, value_enum)]
    device: Option<DeviceChoice>,
    /// Threads of the CPU [default: as many as the machine runs at once].
    #[arg(long, value_name = "N", value_parser = positive)]
    threads: Option<usize>,
    /// Digits at a time, on which the results of the tutorial's network depend [default: as in the
    /// training].
    #[arg(long, value_name = "N", value_parser = positive)]
    batch_size: Option<usize>,
}

fn positive(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("must be at least 1".to_string()),
        Ok(number) => Ok(number),
        Err(error) => Err(format!("{error}")),
    }
}

fn positive_number(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if number.is_finite() && number > 0.0 => Ok(number),
        Ok(_) => Err("must be a finite number above 0".to_string()),
        Err(error) => Err(format!("{error}")),
    }
}

fn probability(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if (0.0..1.0).contains(&number) => Ok(number),
        Ok(_) => Err("must be at least 0 and less than 1".to_string()),
        Err(error) => Err(format!("{error}")),
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

/// A command line, with what files add to it: its configuration, and the run that it resumes.
struct Invocation {
    command: Option<Subcommands>,
    /// All options of the command with their values.
    options: Options,
    /// What the run was started with that is to be resumed.
    stored: Option<RunFile>,
}

impl Invocation {
    /// Reads a command line and its files. Ends the process if the command line alone makes no
    /// sense, or asks for help.
    fn read(mut arguments: Vec<OsString>) -> Result<Self> {
        let command = Cli::command();
        let mut matches = match command.clone().try_get_matches_from(&arguments) {
            Ok(matches) => matches,
            Err(error) => {
                error.print().map_err(PrintError::from)?;
                std::process::exit(error.exit_code());
            }
        };
        if let Some(path) = given::<PathBuf>(&matches, "config") {
            let options = config::read(path)?;
            let origin = path.display().to_string();
            matches = with(&command, &mut arguments, &matches, &options, &origin)?;
        }
        let mut stored = None;
        if given::<bool>(&matches, "resume") == Some(&true)
            && let Some(directory) = given::<PathBuf>(&matches, "artifacts")
        {
            stored = stored_run(directory)?;
        }
        if let Some(file) = &stored {
            let origin = config::RUN_FILE;
            matches = with(&command, &mut arguments, &matches, &file.options, origin)?;
        }

        let mut options = match subcommand(&command, &matches) {
            Some((subcommand, matches)) => config::effective(subcommand, matches)?,
            None => Options::new(),
        };
        let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
        if let Some(job) = cli.command.as_ref().and_then(Subcommands::job) {
            // What depends on other options.
            for (option, value) in [("lr", job.learning_rate()), ("dropout", job.dropout())] {
                options.insert(option.to_string(), Value::from(value));
            }
        }
        if given::<bool>(&matches, "print_config") == Some(&true) {
            say!("{}", config::to_toml(&options).trim_end())?;
            std::process::exit(0);
        }
        Ok(Self {
            command: cli.command,
            options,
            stored,
        })
    }
}

/// The value of an option of the subcommand; none if it has no such option.
fn given<'a, T: Clone + Send + Sync + 'static>(
    matches: &'a ArgMatches,
    option: &str,
) -> Option<&'a T> {
    let (_, matches) = matches.subcommand()?;
    matches.try_get_one(option).ok().flatten()
}

fn subcommand<'a>(
    command: &'a Command,
    matches: &'a ArgMatches,
) -> Option<(&'a Command, &'a ArgMatches)> {
    let (name, matches) = matches.subcommand()?;
    Some((command.find_subcommand(name)?, matches))
}

/// Adds options to a command line that has a subcommand, where it has nothing else.
fn with(
    command: &Command,
    arguments: &mut Vec<OsString>,
    matches: &ArgMatches,
    options: &Options,
    origin: &str,
) -> Result<ArgMatches, ConfigError> {
    let (subcommand, matches) = subcommand(command, matches).expect("it has a subcommand");
    let added = config::arguments(options, origin, subcommand, matches)?;
    // Behind the program and the subcommand.
    drop(arguments.splice(2..2, added));
    command
        .clone()
        .try_get_matches_from(&*arguments)
        .map_err(|error| ConfigError::Refused {
            origin: origin.to_string(),
            reason: reason(&error),
        })
}

/// What clap says first, on one line.
fn reason(error: &clap::Error) -> String {
    let text = error.to_string();
    let text = text.split("\n\n").next().unwrap_or_default();
    let text = text.strip_prefix("error: ").unwrap_or(text);
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// What the run in a folder was started with. None if there is no run: that it cannot be resumed is
/// found out where runs are.
fn stored_run(directory: &Path) -> Result<Option<RunFile>, RunFileError> {
    match RunFile::read(directory) {
        Ok(file) => Ok(Some(file)),
        Err(RunFileError::Missing { .. }) if !checkpoint::folder(directory).exists() => Ok(None),
        Err(error) => Err(error),
    }
}

fn execute(invocation: Invocation, allocator: &'static CountingAllocator) -> Result<()> {
    let Invocation {
        command,
        options,
        stored,
    } = invocation;
    let trains = matches!(command, Some(Subcommands::Train(_)));
    let interrupter = interrupt::listen(trains).context("cannot listen for Ctrl-C")?;
    match command {
        Some(Subcommands::Worker) => work(allocator, interrupter),
        Some(Subcommands::Compare(args)) => run_compare(args, allocator, &interrupter),
        Some(Subcommands::Train(args)) => train(args, &options, stored, allocator, interrupter),
        Some(Subcommands::Parity(args)) => parity(args, &interrupter),
        Some(Subcommands::Predict(args)) => run_predict(args, &interrupter),
        None => {
            let mut args = Compare::parse_defaults();
            args.time_limit = Some(DEFAULT_TIME_LIMIT.as_secs_f64() / 60.0);
            run_compare(args, allocator, &interrupter)
        }
    }
}

impl Compare {
    /// What `mnist compare` without options is.
    fn parse_defaults() -> Self {
        match Cli::parse_from(["mnist", "compare"]).command {
            Some(Subcommands::Compare(args)) => args,
            _ => unreachable!("the command line just written is a comparison"),
        }
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
    compare(
        args.job.into_job(args.epochs)?,
        &options,
        allocator,
        interrupter,
    )
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
        plain,
        json,
    } = args;
    set_threads(job.compute.threads)?;
    if let Some(stored) = &stored {
        stored.check_options(&directory, given)?;
    }
    output::check(&[("--json", json.as_deref())])?;
    let job = job.into_job(epochs)?;
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
        resume: match resume {
            true => Resume::Latest,
            false => Resume::No,
        },
        patience: early_stopping,
        dashboard: !plain,
        run_file: Some(RunFile::new(given, identity)),
        interrupter,
    };
    let (trained, outcome) = run(&job, variant, data, allocator, options)?;
    report.variants.push(trained);
    let tested = outcome.history.last();
    let tested = tested.map(|epoch| format!("Test set ({}): {}", report.dataset, epoch.test));
    let json = json.as_deref();
    let files = json.map(|path| ("Report", path, output::json(&report)));
    output::finish(tested, Vec::from_iter(files))?;
    let kept = kept_epochs(&directory)
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

/// The epochs of a run of which there is a complete checkpoint, in order.
fn kept_epochs(directory: &Path) -> io::Result<Vec<usize>> {
    // The list of a checkpoint's files comes last, and completes it. One without files is of a run
    // that has finished no epoch.
    let mut epochs: Vec<usize> = checkpoint::files(directory)?
        .into_iter()
        .filter(|file| file.epoch > 0 && file.path.extension().is_some_and(|end| end == "json"))
        .map(|file| file.epoch)
        .collect();
    epochs.sort_unstable();
    Ok(epochs)
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
            checkpoints_of(kept),
            last + 1
        ),
    };
    let report = match report {
        Some(path) => format!("; {} has the epochs that were finished", path.display()),
        None => String::new(),
    };
    format!("interrupted {lost}; {left}{report}")
}

/// The checkpoints of some epochs, in words.
fn checkpoints_of(epochs: &[usize]) -> String {
    let texts: Vec<String> = epochs.iter().map(usize::to_string).collect();
    match texts.split_last() {
        Some((last, [])) => format!("the checkpoint of epoch {last}"),
        Some((last, others)) => {
            format!("the checkpoints of epochs {} and {last}", others.join(", "))
        }
        None => "no checkpoint".to_string(),
    }
}

fn parity(args: ParityArgs, interrupter: &Interrupter) -> Result<()> {
    set_threads(args.job.compute.threads)?;
    let job = args.job.into_job(1)?;
    job.check()?;
    Parity::check(job.precision)?;
    let data = job.data()?;
    say!("Data: {}", data.origin)?;
    job.check_digits(data.train.len())?;
    Parity::measure(&job, Arc::new(data.train), args.steps, interrupter)?.judge()
}

fn run_predict(args: Predict, interrupter: &Interrupter) -> Result<()> {
    let source = match (args.what.images, args.what.test_set) {
        (Some(folder), _) => Source::Images(folder),
        (None, true) => Source::TestSet,
        (None, false) => bail!("there is nothing to classify; use --images DIR or --test-set"),
    };
    set_threads(args.compute.threads)?;
    let directory = args.trained.artifacts;
    let file = RunFile::read(&directory)?;
    let Train {
        variant,
        epochs,
        mut job,
        ..
    } = stored_options(&file, &directory)?;
    let (data, compute) = (&mut job.data, &mut job.compute);
    data.dataset = args.data.dataset.unwrap_or(data.dataset);
    data.data_dir = args.data.data_dir.or(data.data_dir.take());
    data.no_download |= args.data.no_download;
    data.test_limit = args.data.test_limit.or(data.test_limit);
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
    predict(&job.into_job(epochs)?, &options, interrupter)
}

/// The options of `mnist train` that a run was started with.
fn stored_options(file: &RunFile, directory: &Path) -> Result<Train> {
    let command = Cli::command();
    let mut arguments: Vec<OsString> = vec!["mnist".into(), "train".into()];
    let matches = command.clone().get_matches_from(&arguments);
    let origin = directory.join(config::RUN_FILE).display().to_string();
    let matches = with(&command, &mut arguments, &matches, &file.options, &origin)?;
    match Cli::from_arg_matches(&matches)?.command {
        Some(Subcommands::Train(train)) => Ok(train),
        _ => unreachable!("the command line just written is a training"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let own = |command: &&Command| command.get_name() != "help";
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
            Cli::try_parse_from(example.split_whitespace())
                .unwrap_or_else(|error| panic!("{example}: {error}"));
            count += 1;
        }
        assert!(count > 10, "{count}");
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
