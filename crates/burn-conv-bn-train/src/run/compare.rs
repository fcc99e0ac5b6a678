//! The tutorial's job: both variants on the same data, each in a process of its own, and what
//! they took.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use burn::train::Interrupter;
use burn_conv_bn_memory::CountingAllocator;

use crate::data::{DataOrigin, DatasetChoice, MnistData};
use crate::measure::estimate::estimate;
use crate::measure::plot::picture;
use crate::measure::report::{Report, VariantReport};
use crate::persist::output::{self, PictureFormat};
use crate::print::{PrintError, loss, say};
use crate::run::job::{Job, Variant};
use crate::run::worker::{Task, spawn};

/// How to compare.
#[derive(Clone, Debug)]
pub(crate) struct CompareOptions {
    /// Where the report goes.
    pub(crate) json: Option<PathBuf>,
    /// Where the picture of memory over a step and of the losses goes, as SVG.
    pub(crate) plot: Option<PathBuf>,
    /// Where the metrics' logs go, a folder for each variant.
    pub(crate) artifacts: PathBuf,
    /// If the estimate is longer, train on fewer digits, the same for all variants.
    pub(crate) time_limit: Option<Duration>,
    /// Threads of the CPU in the variants' processes; as many as the machine runs at once if not
    /// given.
    pub(crate) threads: Option<usize>,
}

/// Runs the comparison.
///
/// Each variant is trained in a fresh process: no cache, pool or fragment of the first is there
/// when the second is measured.
///
/// # Errors
///
/// A message for people, also where a variant diverged. What can be checked is checked before anything is
/// trained.
pub(crate) fn compare(
    mut job: Job,
    options: &CompareOptions,
    allocator: &'static CountingAllocator,
    interrupter: &Interrupter,
) -> Result<()> {
    check_outputs(options)?;
    fs::create_dir_all(&options.artifacts)
        .with_context(|| format!("cannot create the folder {}", options.artifacts.display()))?;
    let scratch = tempfile::tempdir_in(&options.artifacts)
        .with_context(|| format!("cannot write to the folder {}", options.artifacts.display()))?;

    let mut data = job.begin()?;
    announce(&mut job, options, &mut data, allocator)?;
    // The variants' processes look for the data again: what they find must be the same.
    job.dataset = match data.origin {
        DataOrigin::Synthetic { .. } => DatasetChoice::Synthetic,
        _ => DatasetChoice::Mnist,
    };

    let mut report = job.report(&data);
    drop(data);
    let failure = train_all(&job, options, scratch.path(), &mut report, interrupter)?;
    // Finished variants are kept, also if another one failed.
    if !report.variants.is_empty() {
        let mut files = Vec::new();
        if let Some(path) = &options.json {
            files.push(("Report", path.as_path(), output::json(&report)));
        }
        if let Some(path) = &options.plot {
            let picture = picture(&report).context("cannot draw the picture");
            files.push(("Picture", path, picture.map(String::into_bytes)));
        }
        output::finish(Some(format!("\n{}", summary(&report))), files)?;
    }
    if let Some(failure) = failure {
        return Err(failure);
    }
    if interrupter.should_stop() || report.variants.iter().any(|variant| variant.interrupted) {
        bail!("{}", interruption(&job, options, &report));
    }
    report.check_finite()
}

/// Checks that the results can be written.
fn check_outputs(options: &CompareOptions) -> Result<()> {
    if let Some(path) = &options.plot
        && PictureFormat::of(path).ok() != Some(PictureFormat::Svg)
    {
        bail!(
            "--plot draws SVG, to a file that ends in .svg, which {} does not",
            path.display()
        );
    }
    output::check(&[
        ("--json", options.json.as_deref()),
        ("--plot", options.plot.as_deref()),
    ])?;
    for variant in Variant::ALL {
        let folder = options.artifacts.join(variant.name()).join("checkpoint");
        if folder.exists() {
            bail!(
                "{} holds the checkpoints of a training; choose another folder for the logs",
                folder.display()
            );
        }
    }
    Ok(())
}

/// Trains the variants one after the other. Returns why one could not be trained, if one could not.
fn train_all(
    job: &Job,
    options: &CompareOptions,
    scratch: &Path,
    report: &mut Report,
    interrupter: &Interrupter,
) -> Result<Option<anyhow::Error>> {
    for variant in Variant::ALL {
        if interrupter.should_stop() {
            break;
        }
        say!("\n== {} ==", variant.name())?;
        let task = Task {
            job: job.clone(),
            variant,
            directory: options.artifacts.join(variant.name()),
            record: options.plot.is_some(),
            result: scratch.join(format!("{}.json", variant.name())),
        };
        let result = match spawn(&task, options.threads) {
            Ok(result) => result,
            Err(error) => return Ok(Some(error)),
        };
        if let Some(epoch) = result.epochs.last() {
            say!(
                "Test set ({}): Average loss: {}, Accuracy: {:.2} %",
                report.dataset,
                loss(epoch.test_loss),
                100.0 * epoch.test_accuracy
            )?;
        }
        let interrupted = result.interrupted;
        report.variants.push(result);
        if interrupted {
            break;
        }
    }
    Ok(None)
}

/// The message of an interrupted comparison: the state of each variant, and the results that are kept.
fn interruption(job: &Job, options: &CompareOptions, report: &Report) -> String {
    let steps = job.steps(report.train_digits);
    let each = Variant::ALL.iter().enumerate().map(|(place, variant)| {
        let state = match report.variants.get(place) {
            None => "was not begun".to_string(),
            Some(run) if !run.interrupted => "is finished".to_string(),
            Some(run) => {
                let finished = run.epochs.len();
                let begun = run.step_losses.len() - (steps * finished).min(run.step_losses.len());
                let epoch = (finished + 1).min(job.epochs);
                format!("was stopped in epoch {epoch} after {begun} of its {steps} training steps")
            }
        };
        format!("{} {state}", variant.name())
    });
    let each: Vec<String> = each.collect();
    let files: Vec<String> = [&options.json, &options.plot]
        .into_iter()
        .flatten()
        .filter(|_| !report.variants.is_empty())
        .map(|path| path.display().to_string())
        .collect();
    let kept = match (report.variants.is_empty(), files.is_empty()) {
        (true, _) => "nothing was measured".to_string(),
        (false, true) => "the table above has what was measured".to_string(),
        (false, false) => format!("{} has what was measured", files.join(", and ")),
    };
    format!(
        "interrupted: {}; {kept}; no weights are kept, so that a comparison cannot be resumed",
        each.join(", ")
    )
}

/// Prints the estimate, and cuts the job down to the time limit if there is one.
fn announce(
    job: &mut Job,
    options: &CompareOptions,
    data: &mut MnistData,
    allocator: &'static CountingAllocator,
) -> Result<(), PrintError> {
    let estimates = Variant::ALL.map(|variant| (variant, estimate(job, variant, data, allocator)));
    let total: Duration = estimates
        .iter()
        .map(|(_, estimate)| estimate.duration)
        .sum();
    let each: Vec<String> = estimates
        .iter()
        .map(|(variant, estimate)| {
            format!(
                "{} {} and {} at the peak of a step",
                variant.name(),
                minutes(estimate.duration),
                mebibytes(estimate.peak_bytes)
            )
        })
        .collect();
    say!(
        "Estimate for {} digits: {}.",
        data.train.len(),
        each.join("; ")
    )?;
    if let Some(limit) = options.time_limit
        && total > limit
    {
        let fraction = limit.as_secs_f64() / total.as_secs_f64();
        let digits = (data.train.len() as f64 * fraction) as usize;
        let batches = (digits / job.batch_size).max(1);
        let digits = (batches * job.batch_size).min(data.train.len());
        say!(
            "That is {} in all; to stay under {}, both variants train on the first {digits} \
             digits only. `compare` without --time-limit trains on all of them.",
            minutes(total),
            minutes(limit)
        )?;
        job.train_limit = Some(digits);
        data.train.truncate(digits);
    }
    Ok(())
}

/// The tutorial's closing lines, and a table with what else was measured.
fn summary(report: &Report) -> String {
    let mut text = String::new();
    let line = |of: fn(&VariantReport) -> usize| {
        let each: Vec<String> = report
            .variants
            .iter()
            .map(|variant| format!("{}: {:.2} GiB", variant.name, gibibytes(of(variant))))
            .collect();
        each.join(", ")
    };
    let _ = writeln!(text, "Peak memory allocated:\n{}", line(|v| v.peak_bytes));
    let _ = writeln!(
        text,
        "Memory allocated at end of forward pass:\n{}\n",
        line(|v| v.forward_end_bytes)
    );
    let _ = writeln!(
        text,
        "{:<8} {:>14} {:>12} {:>12} {:>12} {:>11} {:>10}",
        "variant", "end of forward", "peak", "saved", "step", "test loss", "accuracy"
    );
    for variant in &report.variants {
        let (test_loss, accuracy) = match variant.epochs.last() {
            Some(epoch) => (
                loss(epoch.test_loss),
                format!("{:.2} %", 100.0 * epoch.test_accuracy),
            ),
            None => ("-".to_string(), "-".to_string()),
        };
        let _ = writeln!(
            text,
            "{:<8} {:>14} {:>12} {:>12} {:>10.3} s {test_loss:>11} {accuracy:>10}",
            variant.name,
            mebibytes(variant.forward_end_bytes),
            mebibytes(variant.peak_bytes),
            mebibytes(variant.saved_bytes),
            variant.step_seconds_median,
        );
    }
    if let [first, second] = report.variants.as_slice() {
        let ratio = |of: fn(&VariantReport) -> f64| of(first) / of(second);
        let _ = writeln!(
            text,
            "{:<8} {:>14.3} {:>12.3} {:>12.3} {:>12.3}",
            "ratio",
            ratio(|v| v.forward_end_bytes as f64),
            ratio(|v| v.peak_bytes as f64),
            ratio(|v| v.saved_bytes as f64),
            ratio(|v| v.step_seconds_median),
        );
    }
    let _ = write!(
        text,
        "{} of {}, model {}, norm {}, optimizer {}, batch {}, {} on {}, {}, Burn {}; bytes above \
         the level before forward, step = forward + backward.",
        plural(report.train_digits, "digit"),
        report.dataset,
        report.model,
        report.norm,
        report.optimizer,
        report.batch_size,
        report.dtype,
        report.device,
        plural(report.threads, "thread"),
        report.burn_version
    );
    text
}

fn plural(count: usize, what: &str) -> String {
    match count {
        1 => format!("1 {what}"),
        _ => format!("{count} {what}s"),
    }
}

fn gibibytes(bytes: usize) -> f64 {
    bytes as f64 / (1u64 << 30) as f64
}

fn mebibytes(bytes: usize) -> String {
    format!("{:.1} MiB", bytes as f64 / (1u64 << 20) as f64)
}

fn minutes(duration: Duration) -> String {
    let seconds = duration.as_secs_f64();
    if seconds < 90.0 {
        format!("about {seconds:.0} s")
    } else {
        format!("about {:.1} min", seconds / 60.0)
    }
}

#[cfg(test)]
mod tests;
