//! Reports that nobody measured, and parsed options.

use std::collections::BTreeMap;

use burn_conv_bn_bench::catalogue::{Entry, catalogue};
use burn_conv_bn_bench::device::FLEX;
use burn_conv_bn_bench::precision::Precision;
use burn_conv_bn_bench::protocol::{Contender, StepMemory, StepTime};
use burn_conv_bn_bench::report::{ContenderReport, EntryReport, Report};

use super::args::Bench;
use super::machine;

/// One entry that the fused form runs in half the time and in 3 MiB of 4.
pub fn report() -> Report {
    let entry = catalogue(true).remove(0);
    let contenders = vec![
        contender(Contender::Fused, &[2.0], 3),
        contender(Contender::Unfused, &[4.0], 4),
    ];
    of(vec![measured(entry, contenders)])
}

/// The whole catalogue and everybody.
pub fn whole() -> Report {
    let entries = catalogue(false).into_iter().enumerate();
    let entries = entries.map(|(index, entry)| {
        let contenders = Contender::ALL.into_iter().enumerate();
        let contenders = contenders.map(|(place, kind)| {
            let first = 1.0 + (index * 7 + place * 3) as f64;
            let forward_ms = [first, 1.5 * first, 1.1 * first];
            contender(kind, &forward_ms, 5 + 40 * index as u64 + place as u64)
        });
        measured(entry, contenders.collect())
    });
    of(entries.collect())
}

/// A contender with forward passes of so many milliseconds and backward passes of twice as many.
fn contender(contender: Contender, forward_ms: &[f64], mebibytes: u64) -> ContenderReport {
    let step = |forward_ms: &f64| StepTime {
        forward_ms: *forward_ms,
        backward_ms: 2.0 * forward_ms,
        optimizer_ms: None,
    };
    ContenderReport {
        steps: forward_ms.iter().map(step).collect(),
        memory: Some(StepMemory {
            resident_peak: Some(mebibytes << 20),
            saved: Some(mebibytes << 19),
            ..StepMemory::default()
        }),
        ..ContenderReport::new(contender)
    }
}

fn measured(entry: Entry, contenders: Vec<ContenderReport>) -> EntryReport {
    let mut report = EntryReport {
        rounds: contenders[0].steps.len(),
        contenders,
        ..EntryReport::new(entry, FLEX, Precision::F32)
    };
    report.summarize();
    report
}

fn of(entries: Vec<EntryReport>) -> Report {
    Report {
        date: "2026-01-02T03:04:05Z".to_string(),
        quick: true,
        device: FLEX.to_string(),
        precision: Precision::F32,
        machine: machine::describe(3, FLEX, BTreeMap::new()),
        versions: BTreeMap::from([("burn".to_string(), "0.22.1".to_string())]),
        commit: None,
        version: "0.1.0".to_string(),
        seed: 7,
        entries,
        summary: Vec::new(),
    }
}

#[derive(clap::Parser, Debug)]
struct Cli {
    #[command(flatten)]
    bench: Bench,
}

/// Parses the options of a command line.
pub fn parse(options: &[&str]) -> Result<Bench, clap::Error> {
    let line = ["bench"].iter().chain(options);
    <Cli as clap::Parser>::try_parse_from(line).map(|cli| cli.bench)
}
