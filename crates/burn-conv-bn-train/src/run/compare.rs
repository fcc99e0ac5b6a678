//! The tutorial's job: both variants on the same data, each in a process of its own, and their memory, time
//! and accuracy; and a third one, measured over a few steps.

use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use burn::train::Interrupter;
use burn_conv_bn_memory::CountingAllocator;
use clap::Args;
use serde::{Deserialize, Serialize};

use crate::choice::{Choice, ON_OUTPUT, ON_RUN, finite};
use crate::data::{DatasetChoice, MnistData};
use crate::measure::estimate::estimate;
use crate::measure::plot::picture;
use crate::measure::report::{EpochReport, Report, VariantReport};
use crate::persist::output;
use crate::print::{PrintError, loss, say};
use crate::run::job::{Job, Variant};
use crate::run::worker::{Task, spawn};

/// Training steps of a variant that is measured and not trained.
const MEASURED_STEPS: usize = 4;

#[derive(Args, Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct CompareOptions {
    /// Limit on the estimated duration, in minutes; above it, training is on fewer digits.
    #[arg(long, value_name = "MINUTES", value_parser = finite, help_heading = ON_RUN)]
    pub(crate) time_limit: Option<f64>,
    /// Write the results to this file.
    #[arg(long, value_name = "FILE", help_heading = ON_OUTPUT)]
    pub(crate) json: Option<PathBuf>,
    /// Draw memory over one training step, and the losses, to this SVG file.
    #[arg(long, value_name = "FILE", help_heading = ON_OUTPUT)]
    pub(crate) plot: Option<PathBuf>,
}

impl CompareOptions {
    fn limit(&self) -> Option<Duration> {
        // More than fits is as good as none.
        let limit = |minutes| Duration::try_from_secs_f64(60.0 * minutes).unwrap_or(Duration::MAX);
        self.time_limit.map(limit)
    }
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
    let (json, plot) = (options.json.as_deref(), options.plot.as_deref());
    output::check_svg("--plot", plot)?;
    output::check(&[("--json", json), ("--plot", plot)])?;
    let scratch = tempfile::tempdir().context("cannot make a temporary folder")?;
    let mut data = job.begin()?;
    announce(&mut job, options, &mut data, allocator)?;
    // The variants' processes look for the data again: what they find must be the same.
    job.setup.data.dataset = if data.name == "synthetic" {
        DatasetChoice::Synthetic
    } else {
        DatasetChoice::Mnist
    };

    let mut report = job.report(&data);
    drop(data);
    let trained = train_all(&job, options, scratch.path(), &mut report, interrupter);
    // Finished variants are kept, also if another one failed.
    if !report.variants.is_empty() {
        let json = json.map(|path| ("Report", path, output::json(&report)));
        let plot = plot.map(|path| {
            let picture = picture(&report).context("cannot draw the picture");
            ("Picture", path, picture.map(String::into_bytes))
        });
        let files = json.into_iter().chain(plot).collect();
        output::finish(Some(format!("\n{}", summary(&report))), files)?;
    }
    trained?;
    if interrupter.should_stop() || report.variants.iter().any(|variant| variant.interrupted) {
        bail!("{}", interruption(&job, options, &report));
    }
    report.check_finite()
}

/// The job of a variant's process: the whole, or a few steps.
fn share(job: &Job, variant: Variant) -> Job {
    if Variant::TRAINED.contains(&variant) {
        return job.clone();
    }
    let mut job = job.clone();
    let limit = job.setup.data.train_limit.unwrap_or(usize::MAX);
    job.setup.data.train_limit = Some(limit.min(MEASURED_STEPS * job.setup.batch_size));
    job.learning.test_limit = Some(1);
    Job { epochs: 1, ..job }
}

/// Trains or measures the variants one after the other.
fn train_all(
    job: &Job,
    options: &CompareOptions,
    scratch: &Path,
    report: &mut Report,
    interrupter: &Interrupter,
) -> Result<()> {
    for variant in Variant::ALL {
        if interrupter.should_stop() || report.variants.iter().any(|before| before.interrupted) {
            break;
        }
        let name = variant.name();
        say!("\n== {name} ==")?;
        let is_trained = Variant::TRAINED.contains(&variant);
        if !is_trained {
            say!("Measured over {MEASURED_STEPS} steps at most, not trained.")?;
        }
        let task = Task {
            job: share(job, variant),
            variant,
            record: options.plot.is_some(),
            result: scratch.join(format!("{name}.json")),
        };
        let mut result = spawn(&task)?;
        if !is_trained {
            result.epochs.clear();
        }
        if let Some(epoch) = result.epochs.last() {
            say!(
                "Test set ({}): Average loss: {}, Accuracy: {:.2} %",
                report.dataset,
                loss(epoch.test_loss),
                100.0 * epoch.test_accuracy
            )?;
        }
        report.variants.push(result);
    }
    Ok(())
}

/// The message of an interrupted comparison: the state of each variant, and the results that are kept.
fn interruption(job: &Job, options: &CompareOptions, report: &Report) -> String {
    let steps = job.steps(report.train_digits);
    let each = Variant::ALL.iter().enumerate().map(|(place, variant)| {
        let state = match report.variants.get(place) {
            None => "was not begun".to_string(),
            Some(run) if !run.interrupted => "is finished".to_string(),
            Some(run) => {
                let is_trained = Variant::TRAINED.contains(variant);
                let most = if is_trained { steps } else { MEASURED_STEPS };
                let steps = steps.min(most);
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
        .map(|path| path.display().to_string())
        .collect();
    let kept = if report.variants.is_empty() {
        "nothing was measured".to_string()
    } else if files.is_empty() {
        "the table above has what was measured".to_string()
    } else {
        format!("{} has what was measured", files.join(", and "))
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
    let mut total = Duration::ZERO;
    let each = Variant::TRAINED.map(|variant| {
        let estimate = estimate(job, variant, data, allocator);
        total += estimate.duration;
        format!(
            "{} {} and {} at the peak of a step",
            variant.name(),
            minutes(estimate.duration),
            mebibytes(estimate.peak_bytes)
        )
    });
    say!(
        "Estimate for {} digits: {}.",
        data.train.len(),
        each.join("; ")
    )?;
    if let Some(limit) = options.limit()
        && total > limit
    {
        let fraction = limit.as_secs_f64() / total.as_secs_f64();
        let batches = data.train.len() as f64 * fraction / job.setup.batch_size as f64;
        let digits = (batches as usize).max(1) * job.setup.batch_size;
        let digits = digits.min(data.train.len());
        say!(
            "That is {} in all; to stay under {}, both variants train on the first {digits} \
             digits only. `compare` without --time-limit trains on all of them.",
            minutes(total),
            minutes(limit)
        )?;
        job.setup.data.train_limit = Some(digits);
        data.train.truncate(digits);
    }
    Ok(())
}

/// The tutorial's closing lines, and a table with what else was measured.
fn summary(report: &Report) -> String {
    let line = |of: fn(&VariantReport) -> usize| {
        let gibibytes = |variant| of(variant) as f64 / (1u64 << 30) as f64;
        let each = report
            .variants
            .iter()
            .map(|variant| format!("{}: {:.2} GiB", variant.name, gibibytes(variant)));
        each.collect::<Vec<_>>().join(", ")
    };
    let mut lines = vec![
        format!("Peak memory allocated:\n{}", line(|v| v.peak_bytes)),
        format!(
            "Memory allocated at end of forward pass:\n{}\n",
            line(|v| v.forward_end_bytes)
        ),
        row(
            "variant",
            [
                "end of forward",
                "peak",
                "saved",
                "step",
                "test loss",
                "accuracy",
            ],
        ),
    ];
    let cells = |variant: &VariantReport| {
        let last = variant.epochs.last();
        let tested = |text: fn(&EpochReport) -> String| last.map_or("-".to_string(), text);
        [
            mebibytes(variant.forward_end_bytes),
            mebibytes(variant.peak_bytes),
            mebibytes(variant.saved_bytes),
            format!("{:.3} s", variant.step_seconds_median),
            tested(|epoch| loss(epoch.test_loss)),
            tested(|epoch| format!("{:.2} %", 100.0 * epoch.test_accuracy)),
        ]
    };
    let trained = report.variants.len().min(Variant::TRAINED.len());
    let (trained, measured) = report.variants.split_at(trained);
    lines.extend(
        trained
            .iter()
            .map(|variant| row(&variant.name, cells(variant))),
    );
    if let [first, second] = trained {
        lines.push(ratio_row(first, second));
    }
    for variant in measured {
        lines.push(row(&variant.name, cells(variant)));
        lines.push(format!(
            "{} is fused, with outputs inside chains of blocks rebuilt; over {}, not trained.",
            variant.name,
            plural(variant.step_losses.len(), "step")
        ));
    }
    lines.push(format!(
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
    ));
    lines.join("\n")
}

/// The row of the first variant's figures over the second's.
fn ratio_row(first: &VariantReport, second: &VariantReport) -> String {
    let ratio = |of: fn(&VariantReport) -> f64| format!("{:.3}", of(first) / of(second));
    let cells = [
        ratio(|v| v.forward_end_bytes as f64),
        ratio(|v| v.peak_bytes as f64),
        ratio(|v| v.saved_bytes as f64),
        ratio(|v| v.step_seconds_median),
        String::new(),
        String::new(),
    ];
    row("ratio", cells).trim_end().to_string()
}

/// A row of the table.
fn row<T: Display>(name: &str, [forward, peak, saved, step, loss, accuracy]: [T; 6]) -> String {
    format!("{name:<9} {forward:>14} {peak:>12} {saved:>12} {step:>12} {loss:>11} {accuracy:>10}")
}

fn plural(count: usize, what: &str) -> String {
    match count {
        1 => format!("1 {what}"),
        _ => format!("{count} {what}s"),
    }
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
