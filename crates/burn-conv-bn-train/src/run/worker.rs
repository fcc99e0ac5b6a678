//! One variant in a process of its own.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use burn::train::Interrupter;
use burn_conv_bn_files::{Survives, write};
use burn_conv_bn_memory::CountingAllocator;
use serde::{Deserialize, Serialize};

use crate::choice::Choice;
use crate::measure::report::VariantReport;
use crate::print::message;
use crate::run::fit::{RunOptions, run};
use crate::run::job::{Job, Variant};
use crate::run::record::record;

/// Points of the curve of a step's memory.
const CURVE: usize = 500;

/// Name of the subcommand that runs one variant; not for people.
pub(crate) const WORKER: &str = "run-variant";

/// Input of a worker, as JSON on its standard input.
#[derive(Serialize, Deserialize)]
pub(super) struct Task {
    pub(super) job: Job,
    pub(super) variant: Variant,
    /// Whether to record the memory of a step.
    pub(super) record: bool,
    pub(super) result: PathBuf,
}

/// Trains one variant in a fresh process of this program.
pub(super) fn spawn(task: &Task) -> Result<VariantReport> {
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    let mut command = Command::new(program);
    if let Some(threads) = task.job.setup.threads {
        command.env("RAYON_NUM_THREADS", threads.to_string());
    }
    if !Variant::TRAINED.contains(&task.variant) {
        // Losses of a few steps, which say nothing.
        command.stdout(Stdio::null());
    }
    let mut child = command
        .arg(WORKER)
        // glibc gives every large buffer back to the system when it is freed. Faulting the pages
        // in again for the next one can take longer than the arithmetic, in both variants.
        .env("MALLOC_MMAP_MAX_", "0")
        .env("MALLOC_TRIM_THRESHOLD_", "1000000000000")
        .stdin(Stdio::piped())
        .spawn()
        .context("cannot start a process for the variant")?;
    let input = child.stdin.take().context("the process has no input")?;
    serde_json::to_writer(input, task).context("cannot talk to the variant's process")?;
    let status = child
        .wait()
        .context("cannot wait for the variant's process")?;
    let result = fs::read(&task.result).with_context(|| {
        format!(
            "the {} variant ended without a result ({status})",
            task.variant.name()
        )
    })?;
    let result: Result<VariantReport, String> = serde_json::from_slice(&result)
        .with_context(|| format!("the {} variant's result is damaged", task.variant.name()))?;
    result.map_err(|message| anyhow::anyhow!("{} variant: {message}", task.variant.name()))
}

/// The worker's side: reads a task from standard input, and leaves its result, or the reason why
/// there is none, in the task's file.
///
/// # Errors
///
/// Only if the task cannot be read or that file cannot be written.
pub(crate) fn work(allocator: &'static CountingAllocator, interrupter: Interrupter) -> Result<()> {
    let task: Task = serde_json::from_reader(std::io::stdin().lock())
        .context("run-variant is started by compare, which tells it what to do")?;
    let result = train(&task, allocator, interrupter).map_err(|error| message(&error));
    let json = serde_json::to_vec(&result)?;
    Ok(write(&task.result, &json, Survives::Kill)?)
}

fn train(
    task: &Task,
    allocator: &'static CountingAllocator,
    interrupter: Interrupter,
) -> Result<VariantReport> {
    let data = task.job.data()?;
    // Before the training, which takes the data. Afterwards only pages that the allocator keeps remain.
    let timeline = if task.record {
        Some(record(&task.job, task.variant, &data, allocator)?.thinned(CURVE))
    } else {
        None
    };
    let options = RunOptions {
        folder: None,
        patience: None,
        dashboard: false,
        interrupter,
    };
    let (report, _) = run(&task.job, task.variant, data, allocator, &options)?;
    Ok(VariantReport { timeline, ..report })
}
