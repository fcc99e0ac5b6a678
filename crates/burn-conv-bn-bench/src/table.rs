//! Results for people.

mod cells;
mod figure;
mod legend;
mod overview;
#[cfg(test)]
mod testing;

use std::fmt::Write as _;

use self::cells::{cell, mebibytes, milliseconds, table, three_decimals};
pub use self::figure::peak_ratio;
pub use self::legend::legend;
pub use self::overview::overview;
use crate::device::FLEX;
use crate::protocol::{Contender, StepMemory, StepProfile};
use crate::report::{Comparison, ContenderReport, EntryReport, ProblemKind, Report, Timing};
use crate::statistics::Spread;

/// The tables of one entry that ran on a device: times, and below them memory.
pub fn entry(report: &EntryReport, device: &str) -> String {
    let mut text = format!("{}: {}\n", report.entry.id, report.title);
    if let Some(problem) = &report.problem {
        let _ = writeln!(text, "  FAILED: {problem}");
        return text;
    }
    let times = report.contenders.iter().map(time_row);
    text.push_str(&table(&TIME, times.collect()));
    let unfused = report.contender(Contender::Unfused);
    let unfused = unfused.and_then(|report| report.memory).unwrap_or_default();
    let measured = report.contenders.iter().filter(|c| c.memory.is_some());
    let memory: Vec<_> = measured.map(|c| memory_row(c, unfused)).collect();
    if !memory.is_empty() {
        text.push_str(&table(&memory_header(device), memory));
    }
    for contender in &report.contenders {
        if let Some(profile) = &contender.profile {
            text.push_str(&kernels(contender, profile));
        }
    }
    for contender in &report.contenders {
        if let Some(problem) = &contender.problem {
            let _ = writeln!(text, "  {}: {problem}", contender.contender);
        }
    }
    text
}

const QUICK: &str = "quick run, of smaller batches and images: ";

/// What is missing in a report and why, a line for each reason.
pub fn missing(report: &Report) -> Vec<String> {
    let mut missing: Vec<(String, Vec<String>)> = Vec::new();
    let mut add =
        |reason: String, what: String| match missing.iter_mut().find(|(known, _)| *known == reason)
        {
            Some((_, all)) => all.push(what),
            None => missing.push((reason, vec![what])),
        };
    for entry in &report.entries {
        let id = &entry.entry.id;
        if let Some(problem) = &entry.problem {
            add(problem.clone(), id.clone());
        }
        for contender in &entry.contenders {
            if let Some(problem) = &contender.problem {
                add(
                    problem.to_string(),
                    format!("{} of {id}", contender.contender),
                );
            }
        }
    }
    let line =
        |(reason, what): (String, Vec<String>)| format!("missing: {} ({reason})", what.join(", "));
    missing.into_iter().map(line).collect()
}

/// The line that says what a run ran on.
pub fn setting(report: &Report) -> String {
    let machine = &report.machine;
    let versions = report.versions.iter();
    let versions: Vec<String> = versions
        .map(|(name, version)| format!("{name} {version}"))
        .collect();
    let device = match &machine.gpu {
        Some(gpu) => format!("{} ({gpu}) in {}", report.device, report.precision),
        None => format!("{} in {}", report.device, report.precision),
    };
    let vectors = machine.vectors.iter();
    let mut hardware: Vec<String> = vectors
        .map(|(name, vectors)| format!("{name} {vectors}"))
        .collect();
    hardware.extend(machine.caches.iter().cloned());
    let quick = if report.quick { QUICK } else { "" };
    format!(
        "{quick}{device} on {} ({}), {} of {} threads; {}; {}",
        machine.cpu,
        hardware.join(", "),
        machine.threads,
        machine.cores,
        versions.join(", "),
        report.date
    )
}

/// The closing line of one comparison.
pub fn comparison(comparison: &Comparison) -> String {
    let mut text = format!("fused / {}: ", comparison.base);
    if let Some(mean) = comparison.layers_mean {
        let plural = if comparison.layers == 1 { "" } else { "s" };
        let _ = write!(
            text,
            "{mean:.3} geometric mean over {} layer{plural}; ",
            comparison.layers
        );
    }
    if let Some(mean) = comparison.networks_mean {
        let plural = if comparison.networks == 1 { "" } else { "s" };
        let _ = write!(
            text,
            "{mean:.3} over {} network{plural}; ",
            comparison.networks
        );
    }
    let _ = write!(
        text,
        "worst entry {} at {:.3}",
        comparison.worst_id, comparison.worst_ratio
    );
    text
}

const TIME: [&str; 9] = [
    "time",
    "forward",
    "backward",
    "optimizer",
    "step",
    "min..max",
    "x eager",
    "x unfused",
    "off",
];

fn time_row(report: &ContenderReport) -> Vec<String> {
    let timing = report.timing.as_ref();
    let median = |of: fn(&Timing) -> Option<Spread>| timing.and_then(of).map(|of| of.median);
    let time = |of: fn(&Timing) -> Option<Spread>| cell(median(of), milliseconds);
    let ratio = |of: fn(&Timing) -> Option<Spread>| cell(median(of), three_decimals);
    let spread = timing.map(|timing| {
        let [fastest, slowest] = timing.step_ms.range.map(milliseconds);
        format!("{fastest}..{slowest}")
    });
    vec![
        report.contender.to_string(),
        time(|timing| Some(timing.forward_ms)),
        time(|timing| Some(timing.backward_ms)),
        time(|timing| timing.optimizer_ms),
        time(|timing| Some(timing.step_ms)),
        spread.unwrap_or_default(),
        ratio(|timing| timing.to_eager),
        ratio(|timing| timing.to_unfused),
        off(report),
    ]
}

fn memory_header(device: &str) -> [&'static str; 7] {
    let [end, peak] = match device {
        FLEX => ["heap end", "heap peak"],
        _ => ["pool end", "pool peak"],
    };
    [
        "memory",
        "rss end",
        "rss peak",
        "x unfused",
        end,
        peak,
        "saved",
    ]
}

fn memory_row(report: &ContenderReport, unfused: StepMemory) -> Vec<String> {
    let memory = report.memory.unwrap_or_default();
    vec![
        report.contender.to_string(),
        cell(memory.resident_forward_end, mebibytes),
        cell(memory.resident_peak, mebibytes),
        cell(peak_ratio(memory, unfused), three_decimals),
        cell(memory.heap_forward_end, mebibytes),
        cell(memory.heap_peak, mebibytes),
        cell(memory.saved, mebibytes),
    ]
}

/// Most kernels of a contender that a table names.
const MOST_KERNELS: usize = 12;

/// Longest name of a kernel in a table, in characters.
const LONGEST_NAME: usize = 72;

/// The kernels of a contender's step. For the rest of it the device waited for launches.
fn kernels(report: &ContenderReport, profile: &StepProfile) -> String {
    let busy = profile.busy_ms();
    let mut text = format!(
        "  {}: {} launches, {} ms",
        report.contender,
        profile.launches(),
        milliseconds(busy)
    );
    if let Some(timing) = report.timing {
        let step = milliseconds(timing.step_ms.median);
        let _ = write!(text, " of a step's {step}");
    }
    text.push('\n');
    let (named, others) = profile
        .kernels
        .split_at(profile.kernels.len().min(MOST_KERNELS));
    let others = StepProfile {
        kernels: others.to_vec(),
    };
    let row = |name: String, launches: usize, ms: f64| {
        let share = format!("{:.1} %", 1e2 * ms / busy);
        vec![name, launches.to_string(), milliseconds(ms), share]
    };
    let mut rows: Vec<_> = named
        .iter()
        .map(|kernel| {
            let name = kernel.name.chars().take(LONGEST_NAME).collect();
            row(name, kernel.launches, kernel.ms)
        })
        .collect();
    if !others.kernels.is_empty() {
        let name = format!("{} others", others.kernels.len());
        rows.push(row(name, others.launches(), others.busy_ms()));
    }
    text.push_str(&table(&["kernel", "launches", "ms", "share"], rows));
    text
}

fn off(report: &ContenderReport) -> String {
    let problem = report.problem.as_ref();
    let wrong = problem.is_some_and(|problem| problem.kind == ProblemKind::Mismatch);
    match (report.contender, report.largest_error()) {
        _ if wrong => "WRONG".to_string(),
        (Contender::Unfused, None) if report.timing.is_some() => "reference".to_string(),
        (_, error) => cell(error, |error| format!("{error:.0e}")),
    }
}

#[cfg(test)]
mod tests {
    use super::testing::{contender, report, run};
    use super::*;
    use crate::catalogue::catalogue;
    use crate::device::CUDA;
    use crate::precision::Precision;
    use crate::protocol::{KernelTime, TensorError};
    use crate::report::Machine;
    use std::collections::BTreeMap;

    #[test]
    fn an_entry_is_a_table_of_what_was_measured() {
        let mut fused = contender(Contender::Fused, 10.0, 12);
        fused.errors = vec![TensorError {
            name: "output".to_string(),
            error: Some(2.4e-6),
        }];
        fused.memory.as_mut().unwrap().saved = Some(3 << 19);
        let unfused = contender(Contender::Unfused, 40.0, 48);
        let mut checkpointed = ContenderReport::new(Contender::UnfusedCheckpointed);
        checkpointed.fail(ProblemKind::Failed, "it died");
        let text = entry(&report(vec![fused, unfused, checkpointed]), FLEX);
        let expected = "\
k3: 32x64x56 -> 64 k3 p1
  time                  forward  backward  step    min..max  x unfused        off
  fused                    10.0      20.0  30.0  30.0..30.0      0.250       2e-6
  unfused                  40.0      80.0   120    120..120      1.000  reference
  unfused-checkpointed        -         -     -           -          -          -
  memory   rss end  rss peak  x unfused  saved
  fused        1.5      12.0      0.250    1.5
  unfused      1.5      48.0      1.000      -
  unfused-checkpointed: FAILED: it died
";
        assert_eq!(text, expected);
    }

    #[test]
    fn kernels_are_named_by_what_they_take() {
        let kernel = |index: usize| KernelTime {
            name: format!("k{index}"),
            launches: index,
            ms: index as f64,
        };
        let mut fused = contender(Contender::Fused, 40.0, 12);
        fused.profile = Some(StepProfile::new((1..=14).map(kernel).collect()));
        let text = entry(&report(vec![fused]), CUDA);
        let (_, text) = text.split_once("  fused: 105 launches, ").unwrap();
        let (times, text) = text.split_once('\n').unwrap();
        assert_eq!(times, "105 ms of a step's 120");
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 1 + MOST_KERNELS + 1);
        assert_eq!(lines[0], "  kernel    launches    ms   share");
        assert_eq!(lines[1], "  k14             14  14.0  13.3 %");
        assert_eq!(lines[13], "  2 others         3  3.00   2.9 %");
    }

    #[test]
    fn pools_are_compared_with_pools() {
        let pooled = |kind, peak: u64| ContenderReport {
            memory: Some(StepMemory {
                heap_forward_end: Some(1 << 20),
                heap_peak: Some(peak << 20),
                ..StepMemory::default()
            }),
            ..ContenderReport::new(kind)
        };
        // PyTorch on the CPU beside CubeCL's CPU: its resident set is no pool.
        let eager = ContenderReport {
            steps: Vec::new(),
            ..contender(Contender::Eager, 1.0, 9)
        };
        let contenders = vec![
            pooled(Contender::Fused, 5),
            pooled(Contender::Unfused, 20),
            eager,
        ];
        let text = entry(&report(contenders), CUDA);
        let expected = "  memory   rss end  rss peak  x unfused  pool end  pool peak
  fused          -         -      0.250       1.0        5.0
  unfused        -         -      1.000       1.0       20.0
  eager        1.5       9.0          -         -          -
";
        assert!(text.ends_with(expected), "{text}");
    }

    #[test]
    fn a_wrong_result_is_marked_in_its_row() {
        let mut never = contender(Contender::Never, 1.0, 1);
        never.check(
            vec![TensorError {
                name: "input_grad".to_string(),
                error: Some(0.5),
            }],
            2e-3,
        );
        let text = entry(&report(vec![never]), FLEX);
        let row = text.lines().nth(2).unwrap();
        assert!(row.ends_with("WRONG"), "{text}");
        let line = text.lines().last().unwrap();
        let wanted = "  never: FAILED ITS CHECK: more than 2e-3 off the reference in input_grad by \
                      5.0e-1 of its largest value";
        assert_eq!(line, wanted);
    }

    #[test]
    fn a_failed_entry_says_why() {
        let mut report = report(Vec::new());
        report.problem = Some("no room".to_string());
        assert_eq!(
            entry(&report, FLEX),
            "k3: 32x64x56 -> 64 k3 p1\n  FAILED: no room\n"
        );
    }

    #[test]
    fn comparisons_are_one_line() {
        let mut line = Comparison {
            base: Contender::Eager,
            layers_mean: Some(0.61249),
            layers: 6,
            networks_mean: None,
            networks: 0,
            worst_id: "k1".to_string(),
            worst_ratio: 1.2,
        };
        assert_eq!(
            comparison(&line),
            "fused / eager: 0.612 geometric mean over 6 layers; worst entry k1 at 1.200"
        );
        line.networks_mean = Some(0.7);
        line.networks = 1;
        assert_eq!(
            comparison(&line),
            "fused / eager: 0.612 geometric mean over 6 layers; 0.700 over 1 network; worst entry \
             k1 at 1.200"
        );
        line.networks_mean = None;
        line.layers_mean = None;
        assert_eq!(comparison(&line), "fused / eager: worst entry k1 at 1.200");
    }

    #[test]
    fn what_is_missing_is_grouped_by_the_reason() {
        let mut failed = report(vec![contender(Contender::Fused, 1.0, 1)]);
        failed.contenders[0].fail(ProblemKind::Failed, "it died");
        let pending = |index| {
            let entry = catalogue(false).remove(index);
            EntryReport::pending(entry, FLEX, Precision::F32)
        };
        let mut report = Report {
            entries: vec![failed, pending(2), pending(9)],
            ..run()
        };
        report.abandon("interrupted");
        assert_eq!(
            missing(&report),
            [
                "missing: fused of k3 (FAILED: it died)",
                "missing: k1, resnet50 (not run: interrupted)"
            ]
        );
        report.entries.clear();
        assert!(missing(&report).is_empty());
    }

    #[test]
    fn the_setting_is_one_line() {
        let pair = |name: &str, value: &str| (name.to_string(), value.to_string());
        let mut report = Report {
            machine: Machine {
                cpu: "AMD EPYC".to_string(),
                vectors: BTreeMap::from([pair("ours", "256-bit vectors"), pair("torch", "AVX512")]),
                caches: vec!["L2 512K".to_string()],
                cores: 8,
                threads: 2,
                ..Machine::default()
            },
            versions: BTreeMap::from([pair("torch", "2.15"), pair("burn", "0.22.1")]),
            ..run()
        };
        assert_eq!(
            setting(&report),
            "flex in f32 on AMD EPYC (ours 256-bit vectors, torch AVX512, L2 512K), \
             2 of 8 threads; burn 0.22.1, torch 2.15; 2026-01-02T03:04:05Z"
        );
        report.quick = true;
        assert!(setting(&report).starts_with("quick run, of smaller batches and images: flex"));
        report.quick = false;
        report.device = CUDA.to_string();
        report.machine.gpu = Some("NVIDIA H100".to_string());
        let line = setting(&report);
        assert!(
            line.starts_with("cuda (NVIDIA H100) in f32 on AMD EPYC ("),
            "{line}"
        );
    }
}
