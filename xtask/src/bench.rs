//! `cargo xtask bench`: starts the contenders, checks them against each other, times them side by
//! side, measures their memory, and prints tables.

mod args;
mod contender;
mod lab;
mod machine;
mod output;
mod plot;
mod process;
mod progress;
mod scratch;
#[cfg(test)]
mod testing;
mod worker;

use std::path::PathBuf;

use anyhow::{Result, bail};
use burn_conv_bn_bench::catalogue::{Selection, catalogue, select};
use burn_conv_bn_bench::device::{CUDA, FLEX};
use burn_conv_bn_bench::protocol::Engine;
use burn_conv_bn_bench::report::{EntryReport, Report};
use burn_conv_bn_bench::table;

pub use self::args::Bench;
use self::args::Peer;
use self::lab::{Lab, SEED};
use self::output::Outputs;
use crate::say::{note, say};

/// Runs the benchmark. Fails if a contender failed or computed something else than the others.
pub fn bench(args: &Bench) -> Result<()> {
    let mut entries = select(
        catalogue(args.quick),
        &Selection {
            only: args.only.clone(),
            layers: args.layers,
            networks: args.networks,
        },
    )?;
    if entries.is_empty() {
        bail!("no entry is both in --only and of the kind that was asked for");
    }
    if let Some(batch) = args.batch {
        for entry in &mut entries {
            entry.work = entry.work.clone().with_batch(batch.get());
        }
    }
    if !args.precision.exists_on(&args.device) {
        bail!(
            "{} is computed by NVIDIA's tensor cores: with --device {CUDA}, not {}",
            args.precision,
            args.device
        );
    }
    if args.profile && args.device == FLEX {
        bail!("--profile times the kernels of a device, and {FLEX} launches none");
    }
    if let (None, Some(name)) = (args.peer, args.of(Engine::PyTorch)) {
        bail!("{name} is PyTorch's, which --peer pytorch adds");
    }
    if args.peer.is_some() && args.contenders(Engine::PyTorch).is_empty() {
        bail!("--peer pytorch adds nothing: no --contender is PyTorch's");
    }
    let outputs = outputs(args)?;
    let (lab, software) = Lab::set_up(args)?;
    let pending = |entry| EntryReport::pending(entry, &lab.device, lab.precision);
    let mut report = Report {
        date: machine::date()?,
        quick: args.quick,
        device: lab.device.clone(),
        precision: lab.precision,
        machine: machine::describe(lab.plan.threads, &lab.device, software.vectors),
        versions: software.versions,
        commit: machine::commit(),
        version: env!("CARGO_PKG_VERSION").to_string(),
        seed: SEED,
        entries: entries.into_iter().map(pending).collect(),
        summary: Vec::new(),
    };
    announce(&report, &lab, args);
    let measured = lab.run_all(&mut report, &outputs);
    if let Err(error) = &measured {
        report.abandon(&format!("{error:#}"));
    }
    let saved = outputs.finish(&report);
    measured.and(saved)?;
    conclude(&report, &outputs, args)
}

/// The files that were asked for.
fn outputs(args: &Bench) -> Result<Outputs> {
    let forms: [(&str, &Option<PathBuf>, output::Form); 3] = [
        ("--json", &args.json, output::json),
        ("--csv", &args.csv, output::csv),
        ("--plot", &args.plot, plot::svg),
    ];
    let asked = forms.into_iter();
    let asked = asked.filter_map(|(name, path, form)| Some((name, path.as_deref()?, form)));
    Outputs::new(&asked.collect::<Vec<_>>())
}

fn conclude(report: &Report, outputs: &Outputs, args: &Bench) -> Result<()> {
    let overview = table::overview(report);
    if !overview.is_empty() {
        say!("\n{}", overview.trim_end())?;
    }
    let legend = table::legend(&report.device, report.precision);
    say!("\n{legend}\n\n{}", table::setting(report))?;
    for line in table::missing(report) {
        say!("{line}")?;
    }
    for comparison in &report.summary {
        say!("{}", table::comparison(comparison))?;
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

/// Why no contender of an engine ran anything, if that is so.
fn nothing_ran(report: &Report, engine: Engine) -> Option<&str> {
    let contenders = report.entries.iter().flat_map(|entry| &entry.contenders);
    let mut contenders = contenders.filter(|report| report.contender.engine() == engine);
    if contenders
        .clone()
        .any(|contender| !contender.steps.is_empty())
    {
        return None;
    }
    let problem = contenders.find_map(|contender| contender.problem.as_ref());
    Some(problem.map_or("there was no contender", |problem| &problem.reason))
}

/// Says what will run.
fn announce(report: &Report, lab: &Lab, args: &Bench) {
    let names = lab.plan.contenders.iter();
    let names: Vec<_> = names.map(|contender| contender.name()).collect();
    let threads = lab.plan.threads;
    note!(
        "bench: {} on {} in {}, {threads} thread{}",
        names.join(", "),
        lab.device,
        lab.precision,
        if threads == 1 { "" } else { "s" }
    );
    if args.peer.is_none() {
        note!("bench: PyTorch is left out; --peer pytorch compares with it");
    }
    for entry in &report.entries {
        note!("bench: {:<12} {}", entry.entry.id, entry.title);
    }
    if lab.device != FLEX {
        note!(
            "bench: kernels are compiled and autotuned first, which may take minutes for each entry"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::testing::parse;
    use super::*;
    use burn_conv_bn_bench::report::ProblemKind;

    #[test]
    fn what_makes_no_sense_together_is_refused() {
        for (options, wanted) in [
            (&["--precision", "tf32"][..], "cuda, not flex"),
            (&["--contender", "eager"], "--peer pytorch"),
            (
                &["--peer", "pytorch", "--contender", "fused"],
                "--contender",
            ),
            (&["--profile", "--quick"], "--profile"),
        ] {
            let error = bench(&parse(options).unwrap()).unwrap_err().to_string();
            assert!(error.contains(wanted), "{error}");
        }
    }

    #[test]
    fn a_run_of_nothing_is_no_success() {
        let mut report = testing::report();
        let conclude = |report: &Report, options: &[&str]| {
            conclude(report, &Outputs::default(), &parse(options).unwrap())
        };
        assert!(conclude(&report, &[]).is_ok());
        let peer = ["--peer", "pytorch"];
        let error = conclude(&report, &peer).unwrap_err().to_string();
        assert_eq!(
            error,
            "--peer pytorch measured nothing: there was no contender"
        );
        for contender in &mut report.entries[0].contenders {
            contender.steps.clear();
            contender.fail(ProblemKind::Unavailable, "no bf16");
        }
        let error = conclude(&report, &[]).unwrap_err().to_string();
        assert_eq!(error, "nothing was measured: no bf16");
    }
}
