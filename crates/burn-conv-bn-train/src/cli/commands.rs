//! What every command does.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use burn::train::Interrupter;
use burn_conv_bn_memory::CountingAllocator;
use clap::Parser;

use super::args::{Cli, Compare, LearningArgs, ParityArgs, Predict, Subcommands, Train};
use super::config::Layers;
use super::invocation::Invocation;
use crate::choice::Choice;
use crate::measure::history::Epoch;
use crate::persist::run_file::{DataIdentity, Options, RUN_FILE, RunFile};
use crate::persist::{checkpoint, output};
use crate::predict::{PredictOptions, Source, predict};
use crate::print::say;
use crate::run::compare::{CompareOptions, compare};
use crate::run::fit::{FitOutcome, RunOptions, run};
use crate::run::folder::RunFolder;
use crate::run::interrupt;
use crate::run::parity::Parity;
use crate::run::worker::work;

/// Runs a command.
pub(super) fn execute(invocation: Invocation, allocator: &'static CountingAllocator) -> Result<()> {
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
    let threads = args.job.threads;
    set_threads(threads)?;
    let time_limit = args.time_limit.map(|minutes| {
        // More than fits is as good as none.
        Duration::try_from_secs_f64(60.0 * minutes).unwrap_or(Duration::MAX)
    });
    let options = CompareOptions {
        json: args.json,
        plot: args.plot,
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
    if args.resume && args.overwrite {
        bail!("--resume goes on with the run that --overwrite removes; use one of them");
    }
    set_threads(args.job.threads)?;
    let folder = RunFolder {
        path: args.artifacts,
        resume: args.resume,
        overwrite: args.overwrite,
    };
    let directory = folder.path.clone();
    let json = args.json.as_deref();
    // Before the digits are drawn or downloaded.
    if let Some(stored) = &stored {
        stored.check_options(&directory, given)?;
    }
    folder.check()?;
    output::check_beside(&directory, &[("--json", json)])?;
    let job = args.job.into_job(args.epochs, args.learning)?;
    let data = job.begin()?;
    let mut report = job.report(&data);
    let identity = DataIdentity::of(&data);
    if let Some(stored) = &stored {
        stored.check_data(&directory, &identity)?;
    }
    let steps = job.steps(data.train.len());
    let options = RunOptions {
        folder: Some((folder, RunFile::new(given, identity))),
        patience: args.early_stopping,
        dashboard: !args.plain,
        interrupter,
    };
    let (trained, outcome) = run(&job, args.variant, data, allocator, &options)?;
    report.variants.push(trained);
    let tested = outcome.finished().last();
    let tested = tested.map(|(_, test)| format!("Test set ({}): {test}", report.dataset));
    let idle = outcome.epochs.len() == outcome.resumed;
    let new = json.filter(|path| !(idle && report.is_in(path)));
    let files = new.map(|path| ("Report", path, output::json(&report)));
    output::finish(tested, Vec::from_iter(files))?;
    let kept = checkpoint::epochs(&directory)?;
    // Ctrl-C may have come when everything was done.
    if outcome.interrupted.is_some() && kept.last() != Some(&job.epochs) {
        bail!("{}", interruption(&outcome, steps, &kept, &directory, json));
    }
    let finished = outcome.epochs.len();
    if idle && outcome.stopped_early {
        say!("Nothing to do: the run that was resumed stopped early after epoch {finished}.")?;
    } else if idle {
        say!("Nothing to do: the run that was resumed has {finished} epochs already.")?;
    } else if outcome.stopped_early {
        say!("Stopped early after epoch {finished}: the test loss no longer improves.")?;
    }
    report.check_finite()
}

/// The message of an interrupted training: lost steps, and kept checkpoints.
pub(super) fn interruption(
    outcome: &FitOutcome,
    steps: usize,
    kept: &[usize],
    directory: &Path,
    report: Option<&Path>,
) -> String {
    let epoch = outcome.epochs.len();
    let lost = match outcome.epochs[outcome.resumed..].last() {
        None => "before the first training step".to_string(),
        Some(Epoch { train, .. }) if train.steps.len() < steps => format!(
            "in epoch {epoch} after {} of its {steps} training steps, which are lost",
            train.steps.len()
        ),
        Some(_) => format!(
            "in the test after epoch {epoch}, which is lost: its checkpoint comes after the test"
        ),
    };
    let directory = directory.display();
    let left = match kept {
        [] => format!(
            "no epoch was finished, so that there is no checkpoint in {directory}; --resume starts \
             the run anew"
        ),
        [.., last] => format!(
            "kept in {directory}: {}; --resume goes on with epoch {}",
            checkpoint::named(kept),
            last + 1
        ),
    };
    let report =
        report.map(|path| format!("; {} has the epochs that were finished", path.display()));
    format!("interrupted {lost}; {left}{}", report.unwrap_or_default())
}

fn parity(args: ParityArgs, interrupter: &Interrupter) -> Result<()> {
    set_threads(args.job.threads)?;
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
    let data = job.begin()?;
    Parity::measure(&job, Arc::new(data.train), args.steps, interrupter)?.judge()
}

fn run_predict(args: Predict, interrupter: &Interrupter) -> Result<()> {
    let source = match (args.images, args.test_set) {
        (Some(folder), false) => Source::Images(folder),
        (None, true) => Source::TestSet,
        (Some(_), true) => bail!("--images and --test-set exclude each other"),
        (None, false) => bail!("there is nothing to classify; use --images DIR or --test-set"),
    };
    set_threads(args.threads)?;
    let directory = args.artifacts;
    let file = RunFile::read(&directory)?;
    let Train {
        variant,
        epochs,
        mut job,
        mut learning,
        ..
    } = stored_options(&file, &directory)?;
    if matches!(source, Source::Images(_)) && job.model.tracks_statistics() {
        for (option, is_given) in [
            ("--dataset", args.dataset.is_some()),
            ("--data-dir", args.data_dir.is_some()),
            ("--test-limit", args.test_limit.is_some()),
        ] {
            if is_given {
                bail!(
                    "{option} is about test digits, of which {} needs none for pictures",
                    job.model.name()
                );
            }
        }
    }
    job.dataset = args.dataset.unwrap_or(job.dataset);
    job.data_dir = args.data_dir.or(job.data_dir);
    job.no_download |= args.no_download;
    learning.test_limit = args.test_limit.or(learning.test_limit);
    job.device = args.device.unwrap_or(job.device);
    job.batch_size = args.batch_size.unwrap_or(job.batch_size);
    let options = PredictOptions {
        directory,
        epoch: args.epoch,
        form: args.form.unwrap_or(variant.into()),
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
