//! What every command does.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use burn::train::Interrupter;
use burn_conv_bn_memory::CountingAllocator;

use super::args::{Compare, ParityArgs, Predict, Subcommands, Train};
use super::invocation::Invocation;
use crate::choice::Choice;
use crate::measure::history::Epoch;
use crate::persist::run_file::{DataIdentity, Options, RUN_FILE, RunFile};
use crate::persist::{checkpoint, output};
use crate::predict::{PredictForm, PredictOptions, predict};
use crate::print::say;
use crate::run::compare::compare;
use crate::run::fit::{FitOutcome, RunOptions, run};
use crate::run::interrupt;
use crate::run::job::{Job, Variant};
use crate::run::parity::Parity;
use crate::run::worker::work;

pub(super) fn execute(invocation: Invocation, allocator: &'static CountingAllocator) -> Result<()> {
    let Invocation {
        command,
        options,
        stored,
    } = invocation;
    // Before a device is used.
    #[cfg(feature = "cubecl")]
    let _tuning = crate::tuning::print_tuning();
    let trains = matches!(command, Subcommands::Train(_));
    let interrupter = interrupt::listen(trains).context("cannot listen for Ctrl-C")?;
    match command {
        Subcommands::Worker => work(allocator, interrupter),
        Subcommands::Compare(args) => run_compare(args, &options, allocator, &interrupter),
        Subcommands::Train(args) => train(args, &options, stored, allocator, interrupter),
        Subcommands::Parity(args) => parity(&args, &options, &interrupter),
        Subcommands::Predict(args) => run_predict(args, &options, &interrupter),
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
    given: &Options,
    allocator: &'static CountingAllocator,
    interrupter: &Interrupter,
) -> Result<()> {
    set_threads(args.setup.threads)?;
    compare(Job::of(given)?, &args.options, allocator, interrupter)
}

fn train(
    args: Train,
    given: &Options,
    stored: Option<RunFile>,
    allocator: &'static CountingAllocator,
    interrupter: Interrupter,
) -> Result<()> {
    let folder = args.folder;
    if folder.resume && folder.overwrite {
        bail!("--resume goes on with the run that --overwrite removes; use one of them");
    }
    set_threads(args.setup.threads)?;
    let directory = folder.path.clone();
    let json = args.json.as_deref();
    // Before the digits are drawn or downloaded.
    if let Some(stored) = &stored {
        stored.check_options(&directory, given)?;
    }
    folder.check()?;
    output::check_beside(&directory, &[("--json", json)])?;
    let job = Job::of(given)?;
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

fn parity(args: &ParityArgs, given: &Options, interrupter: &Interrupter) -> Result<()> {
    set_threads(args.setup.threads)?;
    let mut job = Job::of(given)?;
    job.learning.test_limit = Some(1);
    job.check()?;
    Parity::check(job.setup.precision)?;
    let data = job.begin()?;
    Parity::measure(&job, Arc::new(data.train), args.steps, interrupter)?.judge()
}

/// Options of a training that `predict` may have others of. The first three are about test digits.
const OTHERS: [&str; 6] = [
    "dataset",
    "data-dir",
    "test-limit",
    "no-download",
    "device",
    "batch-size",
];

fn run_predict(args: Predict, given: &Options, interrupter: &Interrupter) -> Result<()> {
    match (&args.images, args.test_set) {
        (Some(_), true) => bail!("--images and --test-set exclude each other"),
        (None, false) => bail!("there is nothing to classify; use --images DIR or --test-set"),
        _ => {}
    }
    set_threads(args.threads)?;
    let directory = args.artifacts;
    let file = RunFile::read(&directory)?;
    let mut options = file.options;
    for option in OTHERS {
        // A switch that is not given is as in the training.
        if let Some(value) = given.get(option).filter(|value| **value != false) {
            options.insert(option.to_string(), value.clone());
        }
    }
    let damaged = || format!("{} is damaged", directory.join(RUN_FILE).display());
    let job = Job::of(&options).with_context(damaged)?;
    job.setup.device.open_for(job.setup.precision)?;
    let variant = options.remove("variant").unwrap_or_default();
    let trained: Variant = serde_json::from_value(variant).with_context(damaged)?;
    if args.images.is_some() && job.setup.model.tracks_statistics() {
        for option in &OTHERS[..3] {
            ensure!(
                !given.contains_key(*option),
                "--{option} chooses test digits, and {} needs none for pictures",
                job.setup.model.name()
            );
        }
    }
    let as_trained = match trained {
        Variant::Unfused => PredictForm::Unfused,
        _ => PredictForm::Fused,
    };
    let options = PredictOptions {
        epoch: args.epoch,
        form: args.form.unwrap_or(as_trained),
        images: args.images,
        trained_on: file.data.name,
        json: args.json,
        mistakes: args.mistakes,
        directory,
    };
    predict(&job, &options, interrupter)
}
