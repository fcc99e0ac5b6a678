//! Results for people.

use std::fmt::Write as _;
use std::iter;

use crate::device::FLEX;
use crate::precision::Precision;
use crate::protocol::{Contender, StepMemory, StepProfile};
use crate::report::{Comparison, ContenderReport, EntryReport, ProblemKind, Report, Timing};
use crate::statistics::Spread;

/// What the numbers of [`entry`] are, on a device in a precision.
pub fn legend(device: &str, precision: Precision) -> String {
    let memory = match device {
        FLEX => HOST_MEMORY,
        _ => POOL_MEMORY,
    };
    let mut text = format!("{TIMES}\n{memory}");
    if precision.is_mixed() {
        let _ = write!(text, "\n{}", mixed(precision));
    } else if device != FLEX {
        let _ = write!(text, "\n{}", single(precision));
    }
    text
}

const TIMES: &str = "\
Times are medians over the rounds, in ms; min..max are the fastest and the slowest step. x eager and
x unfused are medians over the rounds of each round's ratio of whole steps. off is the largest
difference from the results of Burn's unfused layers, relative to the largest value of the same
tensor; for PyTorch's tutorial, whose norm is another, from its own formula.";

const HOST_MEMORY: &str = "\
Memory is in MiB above the level just before forward, in a fresh process: rss is the resident set at
the end of forward and at its peak up to the end of backward, heap the same counted by the
allocator, and x unfused the ratio of the peaks of rss. saved is what the layers list as kept for
the backward pass, each buffer once, without parameters and images; there is no such list of what
Burn's gradient checkpointing keeps, and none of PyTorch's.";

const POOL_MEMORY: &str = "\
Memory is in MiB above the level just before forward, in a fresh process that has run one step: pool
is what is in use of the device's memory pool at the end of forward and at its peak up to the end of
backward, and x unfused the ratio of the peaks; rss, where PyTorch is on the CPU, is the resident
set at the same times. saved is what the layers list as kept for the backward pass, each buffer
once, without parameters and images; there is no such list of what Burn's gradient checkpointing
keeps, and none of PyTorch's.";

/// Why f32 is not f32 everywhere.
fn single(precision: Precision) -> String {
    let peer = match precision {
        Precision::Tf32 => "PyTorch may, too.",
        _ => "PyTorch is told not to.",
    };
    format!(
        "Where a GPU has tensor cores, Burn may multiply f32 as TF32, whichever is faster;\n{peer}"
    )
}

/// What mixed precision is here.
fn mixed(precision: Precision) -> String {
    format!(
        "\
Convolutions, and what blocks pass on and keep, are in {precision}, parameters and optimizers in f32.
Burn's unfused norms run in f32 between casts, and its linear layers in f32; PyTorch's run as its
autocast has them."
    )
}

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

/// All entries side by side, where there are several: a table of Markdown for each quantity.
pub fn overview(report: &Report) -> String {
    if report.entries.len() < 2 {
        return String::new();
    }
    let step = |report: &ContenderReport| report.timing.map(|timing| timing.step_ms.median);
    let step_ratio = |fused: &ContenderReport, base: &ContenderReport| {
        let timing = fused.timing?;
        let ratio = match base.contender {
            Contender::Eager => timing.to_eager,
            _ => timing.to_unfused,
        };
        Some(ratio?.median)
    };
    let mut tables = vec![quantity(
        report,
        "step, ms",
        |report| cell(step(report), milliseconds),
        step_ratio,
    )];
    for (title, of) in [
        ("end of forward, MiB", FORWARD_END),
        ("saved, MiB", SAVED),
        ("peak, MiB", PEAK),
    ] {
        let bytes = |report: &ContenderReport| {
            let memory = report.memory?;
            of.iter().find_map(|of| of(memory))
        };
        tables.push(quantity(
            report,
            title,
            |report| cell(bytes(report), mebibytes),
            |fused, base| memory_ratio(&of, fused.memory?, base.memory?),
        ));
    }
    let tables: Vec<String> = tables.into_iter().flatten().collect();
    tables.join("\n")
}

/// One quantity of all entries: of each contender, and the ratios of the fused one. `None` if
/// nobody has it.
fn quantity(
    report: &Report,
    title: &str,
    value: impl Fn(&ContenderReport) -> String,
    ratio: impl Fn(&ContenderReport, &ContenderReport) -> Option<f64>,
) -> Option<String> {
    const BASES: [Contender; 2] = [Contender::Unfused, Contender::Eager];
    let contenders = Contender::ALL.iter().map(|contender| contender.to_string());
    let bases = BASES.iter().map(|base| format!("fused / {base}"));
    let header: Vec<String> = [title, "batch"]
        .into_iter()
        .map(str::to_string)
        .chain(contenders)
        .chain(bases)
        .collect();
    let row = |entry: &EntryReport| -> Vec<String> {
        let sound = |contender| {
            let report = entry.contender(contender);
            report.filter(|report| report.problem.is_none())
        };
        let values =
            Contender::ALL.map(|contender| sound(contender).map(&value).unwrap_or_default());
        let ratios = BASES.map(|base| {
            let both = sound(Contender::Fused).zip(sound(base));
            let ratio = both.and_then(|(fused, base)| ratio(fused, base));
            cell(ratio, three_decimals)
        });
        let batch = entry.entry.work.batch().to_string();
        [entry.entry.id.clone(), batch]
            .into_iter()
            .chain(values)
            .chain(ratios)
            .collect()
    };
    let rows = without_empty(header, report.entries.iter().map(row).collect());
    let is_there = rows.first().is_some_and(|header| header.len() > 2);
    is_there.then(|| markdown(&rows))
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

/// A figure of memory, in the ways in which it may be known, the most telling first.
type Figure = [fn(StepMemory) -> Option<u64>; 2];

const FORWARD_END: Figure = [
    |memory| memory.resident_forward_end,
    |memory| memory.heap_forward_end,
];
const SAVED: Figure = [|memory| memory.saved, |_| None];
const PEAK: Figure = [|memory| memory.resident_peak, |memory| memory.heap_peak];

/// The ratio of the peaks of the resident sets, or of the pools: of two of a kind.
pub fn peak_ratio(memory: StepMemory, base: StepMemory) -> Option<f64> {
    memory_ratio(&PEAK, memory, base)
}

/// The ratio of a figure that both have in the same way.
fn memory_ratio(figure: &Figure, memory: StepMemory, base: StepMemory) -> Option<f64> {
    figure.iter().find_map(|of| {
        let (value, base) = of(memory).zip(of(base).filter(|base| *base > 0))?;
        Some(value as f64 / base as f64)
    })
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

fn cell<T>(value: Option<T>, format: impl FnOnce(T) -> String) -> String {
    value.map(format).unwrap_or_default()
}

/// Three digits at least, and no more decimals than mean anything.
fn milliseconds(ms: f64) -> String {
    let decimals = match ms {
        _ if ms < 9.995 => 2,
        _ if ms < 99.95 => 1,
        _ => 0,
    };
    format!("{ms:.decimals$}")
}

fn three_decimals(ratio: f64) -> String {
    format!("{ratio:.3}")
}

fn mebibytes(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / (1u64 << 20) as f64)
}

/// A header over rows, without the columns that are empty below it.
fn table(header: &[&str], rows: Vec<Vec<String>>) -> String {
    let header = header.iter().map(|title| title.to_string()).collect();
    let mut text = String::new();
    for row in padded(&without_empty(header, rows)) {
        let line = format!("  {}", row.join("  "));
        let _ = writeln!(text, "{}", line.trim_end());
    }
    text
}

/// The same in Markdown. The first row is the header.
fn markdown(rows: &[Vec<String>]) -> String {
    let mut text = String::new();
    for (index, row) in padded(rows).iter().enumerate() {
        let _ = writeln!(text, "| {} |", row.join(" | "));
        if index == 0 {
            let widths = row.iter().map(|cell| cell.chars().count());
            let rules = widths.enumerate().map(|(column, width)| match column {
                0 => "-".repeat(width + 2),
                _ => "-".repeat(width + 1) + ":",
            });
            let _ = writeln!(text, "|{}|", rules.collect::<Vec<_>>().join("|"));
        }
    }
    text
}

/// A header and rows, without the columns that are empty in all rows.
fn without_empty(header: Vec<String>, rows: Vec<Vec<String>>) -> Vec<Vec<String>> {
    let kept: Vec<usize> = (0..header.len())
        .filter(|&column| rows.iter().any(|row| !row[column].is_empty()))
        .collect();
    let keep = |row: Vec<String>| -> Vec<String> {
        kept.iter().map(|&column| row[column].clone()).collect()
    };
    iter::once(header).chain(rows).map(keep).collect()
}

/// Rows of columns of one width: the first filled up to the right, all others to the left; an empty
/// cell is a dash.
fn padded(rows: &[Vec<String>]) -> Vec<Vec<String>> {
    let columns = rows.first().map_or(0, Vec::len);
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.max().unwrap_or_default().max(1)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let pad = |(column, cell): (usize, &String)| {
        let cell = if cell.is_empty() { "-" } else { cell.as_str() };
        let width = widths[column];
        match column {
            0 => format!("{cell:<width$}"),
            _ => format!("{cell:>width$}"),
        }
    };
    let rows = rows.iter();
    rows.map(|row| row.iter().enumerate().map(pad).collect())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalogue::catalogue;
    use crate::device::CUDA;
    use crate::protocol::{KernelTime, StepTime, TensorError};
    use crate::report::Machine;
    use clap::ValueEnum as _;
    use std::collections::BTreeMap;

    fn contender(contender: Contender, forward_ms: f64, peak: u64) -> ContenderReport {
        ContenderReport {
            steps: vec![StepTime {
                forward_ms,
                backward_ms: 2.0 * forward_ms,
                optimizer_ms: None,
            }],
            memory: Some(StepMemory {
                resident_forward_end: Some(3 << 19),
                resident_peak: Some(peak << 20),
                ..StepMemory::default()
            }),
            ..ContenderReport::new(contender)
        }
    }

    fn report(contenders: Vec<ContenderReport>) -> EntryReport {
        let mut report = EntryReport {
            contenders,
            ..EntryReport::new(catalogue(false).remove(1), FLEX, Precision::F32)
        };
        report.summarize();
        report
    }

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
    fn several_entries_stand_side_by_side() {
        let first = report(vec![
            contender(Contender::Fused, 10.0, 12),
            contender(Contender::Unfused, 40.0, 48),
        ]);
        let mut second = first.clone();
        second.entry = catalogue(false).remove(9);
        second.contenders[1].fail(ProblemKind::Failed, "it died");
        let mut report = Report {
            entries: vec![first],
            ..run()
        };
        assert_eq!(overview(&report), "");
        report.entries.push(second);
        let expected = "\
| step, ms | batch | fused | unfused | fused / unfused |
|----------|------:|------:|--------:|----------------:|
| k3       |    32 |  30.0 |     120 |           0.250 |
| resnet50 |     8 |  30.0 |       - |               - |

| end of forward, MiB | batch | fused | unfused | fused / unfused |
|---------------------|------:|------:|--------:|----------------:|
| k3                  |    32 |   1.5 |     1.5 |           1.000 |
| resnet50            |     8 |   1.5 |       - |               - |

| peak, MiB | batch | fused | unfused | fused / unfused |
|-----------|------:|------:|--------:|----------------:|
| k3        |    32 |  12.0 |    48.0 |           0.250 |
| resnet50  |     8 |  12.0 |       - |               - |
";
        assert_eq!(overview(&report), expected);
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
    fn the_legend_speaks_of_the_memory_that_is_shown() {
        let [flex, cuda] = [FLEX, CUDA].map(|device| legend(device, Precision::F32));
        assert!(flex.contains("heap") && !flex.contains("pool"));
        assert!(cuda.contains("pool") && !cuda.contains("heap"));
    }

    #[test]
    fn the_legend_says_what_is_not_f32() {
        let of = |device, precision| legend(device, precision);
        assert!(!of(FLEX, Precision::F32).contains("TF32"));
        assert!(of(CUDA, Precision::F32).contains("PyTorch is told not"));
        assert!(of(CUDA, Precision::Tf32).contains("PyTorch may, too"));
        assert!(of(FLEX, Precision::Bf16).contains("are in bf16"));
        for device in [FLEX, CUDA] {
            for precision in Precision::value_variants() {
                for line in of(device, *precision).lines() {
                    assert!(line.chars().count() <= 100, "{line}");
                }
            }
        }
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
    fn milliseconds_keep_three_digits() {
        let texts = [0.1234, 9.99, 9.996, 99.94, 99.96, 1234.6].map(milliseconds);
        assert_eq!(texts, ["0.12", "9.99", "10.0", "99.9", "100", "1235"]);
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

    /// A run of nothing.
    fn run() -> Report {
        Report {
            date: "2026-01-02T03:04:05Z".to_string(),
            device: FLEX.to_string(),
            ..Report::default()
        }
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
