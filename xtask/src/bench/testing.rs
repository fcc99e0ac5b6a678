//! Made-up reports, and parsed options.

use burn_conv_bn_bench::catalogue::catalogue;
use burn_conv_bn_bench::device::FLEX;
use burn_conv_bn_bench::precision::Precision;
use burn_conv_bn_bench::protocol::{Contender, StepMemory, StepTime};

use super::args::Bench;
use super::report::{ContenderReport, EntryReport, Report};

/// A contender with forward passes of so many milliseconds, backward passes of twice as many, a peak
/// in MiB, and half of it kept.
pub fn contender(contender: Contender, forward_ms: &[f64], peak: u64) -> ContenderReport {
    let step = |forward_ms: &f64| StepTime {
        forward_ms: *forward_ms,
        backward_ms: 2.0 * forward_ms,
        optimizer_ms: None,
    };
    ContenderReport {
        steps: forward_ms.iter().map(step).collect(),
        memory: Some(StepMemory {
            resident_peak: Some(peak << 20),
            saved: Some(peak << 19),
            ..StepMemory::default()
        }),
        ..ContenderReport::new(contender)
    }
}

/// An entry of the quick catalogue that was run.
pub fn entry(index: usize, contenders: Vec<ContenderReport>) -> EntryReport {
    let entry = catalogue(true).remove(index);
    let mut report = EntryReport {
        problem: None,
        contenders,
        ..EntryReport::new(entry, FLEX, Precision::F32)
    };
    report.summarize();
    report
}

pub fn report(entries: Vec<EntryReport>) -> Report {
    let mut report = Report {
        date: "2026-01-02T03:04:05Z".to_string(),
        quick: true,
        device: FLEX.to_string(),
        version: "0.1.0",
        seed: 7,
        entries,
        ..Report::default()
    };
    report.summarize();
    report
}

/// One entry that the fused form runs in half the time and in 3 MiB of 4.
pub fn half() -> Report {
    let fused = contender(Contender::Fused, &[2.0], 3);
    report(vec![entry(
        0,
        vec![fused, contender(Contender::Unfused, &[4.0], 4)],
    )])
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
