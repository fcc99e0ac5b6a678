//! `cargo xtask bench`: starts the contenders, checks them against each other, times them side by
//! side, measures their memory, and prints tables.

mod args;
mod contender;
mod largest;
mod lock;
mod machine;
mod output;
mod plot;
mod report;
mod run;
mod table;
#[cfg(test)]
mod testing;

use std::num::NonZeroU64;

use anyhow::{Result, bail};
use burn_conv_bn_bench::device::FLEX;
use burn_conv_bn_bench::protocol::Engine;

pub use self::args::Bench;
use self::args::Peer;
use self::output::{Form, Outputs};
use self::report::{EntryReport, Report};
use self::run::{Lab, SEED};
use crate::say::{note, say};

/// Runs the benchmark. Fails if a contender failed, or if its results differ from the others'.
pub fn bench(args: &Bench) -> Result<()> {
    args.check()?;
    let largest_batch = args.largest_batch.map(NonZeroU64::get);
    if let (Some(bytes), FLEX) = (largest_batch, args.device.as_str()) {
        largest::check_room(bytes)?;
    }
    let forms: [(_, _, Form); 3] = [
        ("--json", &args.json, output::json),
        ("--csv", &args.csv, output::csv),
        ("--plot", &args.plot, plot::svg),
    ];
    let asked = forms.into_iter();
    let asked = asked.filter_map(|(name, path, form)| Some((name, path.as_deref()?, form)));
    let outputs = Outputs::new(&asked.collect::<Vec<_>>())?;
    let mut lab = Lab::set_up(args)?;
    let pending = |entry| EntryReport::new(entry, &args.device, args.precision);
    let mut report = Report {
        date: machine::date()?,
        quick: args.quick,
        device: args.device.clone(),
        precision: args.precision,
        machine: machine::describe(lab.threads, &args.device, std::mem::take(&mut lab.vectors)),
        versions: std::mem::take(&mut lab.versions),
        commit: machine::commit(),
        version: env!("CARGO_PKG_VERSION"),
        seed: SEED,
        largest_batch,
        entries: args.entries().into_iter().map(pending).collect(),
        summary: Vec::new(),
    };
    announce(&report, &lab, args);
    let measured = lab.run_all(&mut report, &outputs);
    if let Err(error) = &measured {
        report.abandon(&format!("{error:#}"));
    }
    let saved = outputs.write(&report, true);
    measured.and(saved)?;
    conclude(&report, &outputs, args)
}

/// Lists contenders and entries.
fn announce(report: &Report, lab: &Lab<'_>, args: &Bench) {
    let names: Vec<String> = lab.contenders.iter().map(ToString::to_string).collect();
    note!(
        "bench: {} on {} in {}; threads: {}",
        names.join(", "),
        args.device,
        args.precision,
        lab.threads
    );
    if args.peer.is_none() {
        note!("bench: PyTorch is left out; --peer pytorch compares with it");
    }
    for entry in &report.entries {
        note!("bench: {:<12} {}", entry.entry.id, entry.title);
    }
    if args.device != FLEX {
        note!(
            "bench: kernels are compiled and autotuned first, which may take minutes for each entry"
        );
    }
}

fn conclude(report: &Report, outputs: &Outputs, args: &Bench) -> Result<()> {
    let overview = table::overview(report);
    if !overview.is_empty() {
        say!("\n{}", overview.trim_end())?;
    }
    say!("\n{}\n\n{}", table::legend(report), table::setting(report))?;
    for line in table::missing(report) {
        say!("{line}")?;
    }
    for line in &report.summary {
        say!("{line}")?;
    }
    for path in outputs.paths() {
        say!("Written: {}", path.display())?;
    }
    let failed = report.entries.iter().filter(|entry| entry.is_failure());
    let failed: Vec<_> = failed.map(|entry| entry.entry.id.as_str()).collect();
    if !failed.is_empty() {
        bail!("something failed in: {}", failed.join(", "));
    }
    if let Some(reason) = nothing_ran(report, Engine::Burn) {
        bail!("nothing was measured: {reason}");
    }
    if let (Some(Peer::Pytorch), Some(reason)) = (args.peer, nothing_ran(report, Engine::PyTorch)) {
        bail!("--peer pytorch measured nothing: {reason}");
    }
    Ok(())
}

/// The reason if no contender of an engine ran.
fn nothing_ran(report: &Report, engine: Engine) -> Option<&str> {
    let contenders = report.entries.iter().flat_map(|entry| &entry.contenders);
    let mut contenders = contenders.filter(|report| report.contender.engine() == engine);
    if contenders
        .clone()
        .any(|report| !report.steps.is_empty() || report.largest.is_some())
    {
        return None;
    }
    let problem = contenders.find_map(|contender| contender.problem.as_ref());
    Some(problem.map_or("there was no contender", |problem| &problem.reason))
}

#[cfg(test)]
mod tests {
    use super::report::{Problem, ProblemKind};
    use super::testing::parse;
    use super::*;

    #[test]
    fn a_run_of_nothing_is_no_success() {
        let mut report = testing::half();
        let conclude = |report: &Report, options: &[&str]| {
            conclude(report, &Outputs::default(), &parse(options).unwrap())
        };
        assert!(conclude(&report, &[]).is_ok());
        let error = conclude(&report, &["--peer", "pytorch"]).unwrap_err();
        let wanted = "--peer pytorch measured nothing: there was no contender";
        assert_eq!(error.to_string(), wanted);
        for contender in &mut report.entries[0].contenders {
            contender.steps.clear();
            contender.fail(Problem::new(ProblemKind::Unavailable, "no bf16"));
        }
        let error = conclude(&report, &[]).unwrap_err().to_string();
        assert_eq!(error, "nothing was measured: no bf16");
    }
}
