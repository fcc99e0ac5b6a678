//! The command line of the `mnist` binary.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use burn::train::Interrupter;
use burn_conv_bn_memory::CountingAllocator;
use clap::{Args, Parser, Subcommand};

use crate::compare::{CompareOptions, Output, WORKER, compare, work};
use crate::data::DatasetChoice;
use crate::device::{DeviceChoice, DeviceError};
use crate::fit::Resume;
use crate::job::{Job, Norm, Precision, RecomputePolicy, RunOptions, Variant, run};
use crate::parity::Parity;
use crate::print::{message, say};

/// How long the job without a subcommand may take.
const DEFAULT_TIME_LIMIT: Duration = Duration::from_secs(8 * 60);

/// Trains the network of the PyTorch tutorial "Fusing Convolution and Batch Norm using Custom
/// Function" on MNIST, fused and unfused, and compares memory, time and accuracy.
///
/// Without a subcommand it does the tutorial's job: `compare`, cut down to end within minutes.
#[derive(Parser, Debug)]
#[command(name = "mnist", version)]
struct Cli {
    #[command(subcommand)]
    command: Option<Subcommands>,
}

#[derive(Subcommand, Debug)]
enum Subcommands {
    /// Train fused, then unfused, each in a fresh process, and compare.
    Compare(Compare),
    /// Train one variant.
    Train(Train),
    /// Check that both variants give the same losses from the same weights and batches.
    Parity(ParityArgs),
    #[command(name = WORKER, hide = true)]
    Worker,
}

#[derive(Args, Debug)]
struct JobArgs {
    /// Data: MNIST if it can be had and built-in digits otherwise, or one of them for sure.
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
    /// Digits a step.
    #[arg(long, value_name = "N", default_value_t = 2048, value_parser = positive)]
    batch_size: usize,
    /// Learning rate of the first epoch.
    #[arg(long, value_name = "RATE", default_value_t = 1.0, value_parser = positive_number)]
    lr: f64,
    /// Factor on the learning rate after every epoch.
    #[arg(long, value_name = "FACTOR", default_value_t = 0.7, value_parser = positive_number)]
    gamma: f64,
    /// Batch norm: Burn's, or the tutorial's (unbiased variance, epsilon outside the root).
    #[arg(long, value_enum, default_value = "burn")]
    norm: Norm,
    /// Probability of dropping a hidden value.
    #[arg(long, value_name = "P", default_value_t = 0.5, value_parser = probability)]
    dropout: f64,
    /// Where to compute. A device needs Burn's feature of the same name in this build.
    #[arg(long, value_enum, default_value = "flex")]
    device: DeviceChoice,
    /// Element type of data and parameters.
    #[arg(long, value_enum, default_value = "f32")]
    precision: Precision,
    /// What fused blocks do with the convolution's output: recompute it in the backward pass, or
    /// never.
    #[arg(long, value_enum, default_value = "conv")]
    recompute: RecomputePolicy,
    /// Most bytes of workspace in the backward pass of a fused block.
    #[arg(long, value_name = "BYTES", value_parser = positive)]
    max_workspace: Option<usize>,
    /// Seed of weights, order, dropout and built-in digits.
    #[arg(long, default_value_t = 123_456)]
    seed: u64,
    /// Print the loss of every so many batches; 0 for none.
    #[arg(long, value_name = "N", default_value_t = 2)]
    log_interval: usize,
}

impl JobArgs {
    /// The job, on a device that is there.
    fn into_job(self, epochs: usize) -> Result<Job, DeviceError> {
        self.device.open()?;
        Ok(Job {
            dataset: self.dataset,
            data_dir: self.data_dir,
            download: !self.no_download,
            train_limit: self.train_limit,
            test_limit: self.test_limit,
            epochs,
            batch_size: self.batch_size,
            learning_rate: self.lr,
            decay: self.gamma,
            norm: self.norm,
            dropout: self.dropout,
            precision: self.precision,
            device: self.device,
            recompute: self.recompute,
            max_workspace: self.max_workspace,
            seed: self.seed,
            log_interval: self.log_interval,
        })
    }
}

#[derive(Args, Debug)]
struct Compare {
    #[command(flatten)]
    job: JobArgs,
    /// Epochs.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = positive)]
    epochs: usize,
    /// Write the results to this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw memory over one training step, and the losses, to this SVG file.
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
    /// Folder for the logs of the metrics.
    #[arg(long, value_name = "DIR", default_value = "artifacts/compare")]
    artifacts: PathBuf,
    /// If it would take longer than this many minutes by the estimate, train on fewer digits.
    #[arg(long, value_name = "MINUTES", value_parser = positive_number)]
    time_limit: Option<f64>,
}

#[derive(Args, Debug)]
struct Train {
    #[command(flatten)]
    job: JobArgs,
    /// Which form of the network.
    #[arg(long, value_enum, default_value = "fused")]
    variant: Variant,
    /// Epochs, those of a resumed run included.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = positive)]
    epochs: usize,
    /// Folder for checkpoints and logs.
    #[arg(long, value_name = "DIR", default_value = "artifacts/train")]
    artifacts: PathBuf,
    /// Go on from the newest complete checkpoint in the folder.
    #[arg(long, conflicts_with = "overwrite")]
    resume: bool,
    /// Remove an earlier run in the folder.
    #[arg(long)]
    overwrite: bool,
    /// Stop when the test loss has not improved for N epochs.
    #[arg(long, value_name = "N", value_parser = positive)]
    early_stopping: Option<usize>,
    /// Print lines even on a terminal, where Burn's dashboard is shown otherwise.
    #[arg(long)]
    plain: bool,
    /// Write the results to this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Args, Debug)]
struct ParityArgs {
    #[command(flatten)]
    job: JobArgs,
    /// Training steps.
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = positive)]
    steps: usize,
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
pub fn main(allocator: &'static CountingAllocator) -> ExitCode {
    let cli = Cli::parse();
    match execute(cli, allocator) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", message(&error));
            ExitCode::FAILURE
        }
    }
}

fn execute(cli: Cli, allocator: &'static CountingAllocator) -> Result<()> {
    let interrupter = Interrupter::new();
    let on_signal = interrupter.clone();
    ctrlc::set_handler(move || {
        // A second one is from somebody who does not want to wait for the batch.
        if on_signal.should_stop() {
            std::process::exit(130);
        }
        on_signal.stop(Some("Ctrl-C"));
    })
    .context("cannot listen for Ctrl-C")?;

    match cli.command {
        Some(Subcommands::Worker) => work(allocator, interrupter),
        Some(Subcommands::Compare(args)) => run_compare(args, allocator, &interrupter),
        Some(Subcommands::Train(args)) => train(args, allocator, interrupter),
        Some(Subcommands::Parity(args)) => parity(args, &interrupter),
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

fn run_compare(
    args: Compare,
    allocator: &'static CountingAllocator,
    interrupter: &Interrupter,
) -> Result<()> {
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
    allocator: &'static CountingAllocator,
    interrupter: Interrupter,
) -> Result<()> {
    let json = args.json.as_deref().map(Output::create).transpose()?;
    let job = args.job.into_job(args.epochs)?;
    let data = job.data()?;
    say!("Data: {}", data.origin);
    let dataset = data.origin.name();
    let options = RunOptions {
        directory: args.artifacts.clone(),
        overwrite: args.overwrite,
        checkpoints: true,
        resume: match args.resume {
            true => Resume::Latest,
            false => Resume::No,
        },
        patience: args.early_stopping,
        dashboard: !args.plain,
        interrupter,
    };
    let (report, outcome) = run(&job, args.variant, data, allocator, options)?;
    if let Some(epoch) = outcome.epochs.iter().rev().find_map(|epoch| epoch.test) {
        say!("Test set ({dataset}): {epoch}");
    }
    if let Some(json) = json {
        json.write_json("Report", &report)?;
    }
    let last_epoch = outcome.epochs.last().map(|epoch| epoch.epoch);
    match (outcome.interrupted, last_epoch) {
        (Some(_), _) => bail!(
            "interrupted: the epochs that have a checkpoint in {} can be gone on from with \
             --resume; the one that was running is lost",
            args.artifacts.display()
        ),
        (None, None) => {
            say!(
                "Nothing to do: the run that was resumed has {} epochs already.",
                args.epochs
            );
            Ok(())
        }
        (None, Some(epoch)) if epoch < args.epochs => {
            say!("Stopped early after epoch {epoch}: the test loss no longer improves.");
            Ok(())
        }
        (None, Some(_)) => Ok(()),
    }
}

fn parity(args: ParityArgs, interrupter: &Interrupter) -> Result<()> {
    let job = args.job.into_job(1)?;
    let data = job.data()?;
    say!("Data: {}", data.origin);
    Parity::measure(&job, Arc::new(data.train), args.steps, interrupter)?.judge()
}
