//! Results as Markdown tables.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::iter;

use burn_conv_bn_bench::protocol::{Contender, KernelTime};
use clap::ValueEnum as _;

use super::report::{
    BASES, ContenderReport, EntryReport, FORWARD_END, Figure, PEAK, ProblemKind, Report, SAVED,
    Spread, Timing, memory_ratio,
};

/// Meaning of the tables' numbers.
const LEGEND: &str = "\
Times are medians over the rounds, in ms; min..max are the fastest and the slowest step. x eager and
x unfused are medians of each round's ratio of steps. off is the largest difference from the results
of Burn's unfused layers, relative to the largest value of the same tensor; for PyTorch's tutorial,
whose norm is another, from its own formula. Memory is in MiB above the level just before forward, in
a fresh process, at the end of forward and at the peak up to the end of backward: rss is the resident
set, heap what the allocator counts, or the pool of a CubeCL device, whose kernel at the peak is named;
saved is what Burn's layers list as kept, or PyTorch's hooks count, each buffer once, without parameters
and images. docs/benchmarks.md has the method.";

/// Meaning of the numbers of `--largest-batch`.
const LARGEST_LEGEND: &str = "\
images is the largest batch that trains within the bytes, found by running. MiB are the most in use in
its steps, with data, parameters and optimizer state: of the resident set, or of a device's pool. ms an
image is a step's time, its optimizer's included, over its images. Results are not checked here.
docs/benchmarks.md has the method.";

/// Meaning of the numbers of a report's tables.
pub fn legend(report: &Report) -> &'static str {
    if report.largest_batch.is_some() {
        LARGEST_LEGEND
    } else {
        LEGEND
    }
}

/// The tables of one entry: times, memory, kernels and problems.
pub fn entry(report: &EntryReport) -> String {
    let mut text = format!("{}: {}\n", report.entry.id, report.title);
    if let Some(problem) = &report.problem {
        let _ = writeln!(text, "FAILED: {problem}");
        return text;
    }
    if report.contenders.iter().any(|c| c.largest.is_some()) {
        let header = ["largest batch", "images", "MiB", "ms an image", "x unfused"];
        text += &markdown(&header, &report.contenders, largest);
        return text + &problems(report);
    }
    let header = [
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
    text += &markdown(&header, &report.contenders, times);
    if report.contenders.iter().any(|c| c.memory.is_some()) {
        let header = [
            "memory",
            "rss end",
            "rss peak",
            "x unfused",
            "heap end",
            "heap peak",
            "saved",
            "kernel at the peak",
        ];
        text += "\n";
        text += &markdown(&header, &report.contenders, memory);
    }
    for contender in &report.contenders {
        if !contender.kernels.is_empty() {
            text += &kernels(contender);
        }
    }
    text + &problems(report)
}

/// The contenders' problems, a line each.
fn problems(report: &EntryReport) -> String {
    let problems = report.contenders.iter();
    let problems = problems.filter_map(|c| Some((c.contender, c.problem.as_ref()?)));
    problems
        .map(|(contender, problem)| format!("{contender}: {problem}\n"))
        .collect()
}

fn largest(report: &ContenderReport) -> Vec<String> {
    let largest = report.largest.as_ref();
    vec![
        report.contender.to_string(),
        cell(largest, |largest| largest.batch.to_string()),
        cell(largest, |largest| mebibytes(largest.peak_bytes)),
        cell(largest, |largest| milliseconds(largest.image_ms)),
        cell(largest.and_then(|l| l.to_unfused), three_decimals),
    ]
}

fn times(report: &ContenderReport) -> Vec<String> {
    let median = |of: fn(&Timing) -> Option<Spread>| Some(of(report.timing.as_ref()?)?.median);
    let range = report.timing.map(|timing| {
        let [fastest, slowest] = timing.step_ms.range.map(milliseconds);
        format!("{fastest}..{slowest}")
    });
    let problem = report.problem.as_ref().map(|problem| problem.kind);
    let off = match report.largest_error {
        _ if problem == Some(ProblemKind::Mismatch) => "WRONG".to_string(),
        None if report.contender == Contender::Unfused && report.timing.is_some() => {
            "reference".to_string()
        }
        error => cell(error, |error| format!("{error:.0e}")),
    };
    vec![
        report.contender.to_string(),
        cell(median(|timing| Some(timing.forward_ms)), milliseconds),
        cell(median(|timing| Some(timing.backward_ms)), milliseconds),
        cell(median(|timing| timing.optimizer_ms), milliseconds),
        cell(median(|timing| Some(timing.step_ms)), milliseconds),
        range.unwrap_or_default(),
        cell(median(|timing| timing.to_eager), three_decimals),
        cell(median(|timing| timing.to_unfused), three_decimals),
        off,
    ]
}

fn memory(report: &ContenderReport) -> Vec<String> {
    let memory = report.memory.clone().unwrap_or_default();
    vec![
        report.contender.to_string(),
        cell(memory.resident_forward_end, mebibytes),
        cell(memory.resident_peak, mebibytes),
        cell(report.peak_to_unfused, three_decimals),
        cell(memory.heap_forward_end, mebibytes),
        cell(memory.heap_peak, mebibytes),
        cell(memory.saved, mebibytes),
        cell(memory.peak_kernel, |kernel| shortened(&kernel)),
    ]
}

/// Most kernels of a contender that a table names, and the longest name in characters.
const MOST_KERNELS: usize = 12;
const LONGEST_NAME: usize = 72;

fn shortened(name: &str) -> String {
    name.chars().take(LONGEST_NAME).collect()
}

/// The kernels of a contender's step. In the rest of its time the device waited for launches.
fn kernels(report: &ContenderReport) -> String {
    let sum = |name: String, kernels: &[KernelTime]| KernelTime {
        name,
        launches: kernels.iter().map(|kernel| kernel.launches).sum(),
        ms: kernels.iter().map(|kernel| kernel.ms).sum(),
    };
    let all = sum(String::new(), &report.kernels);
    let step = report.timing.map(|timing| timing.step_ms.median);
    let step = cell(step, |step| format!(" of a step's {}", milliseconds(step)));
    let (contender, launches, busy) = (report.contender, all.launches, milliseconds(all.ms));
    let named = report.kernels.len().min(MOST_KERNELS);
    let (named, others) = report.kernels.split_at(named);
    let mut rows = named.to_vec();
    if !others.is_empty() {
        rows.push(sum(format!("{} others", others.len()), others));
    }
    let row = |kernel: &KernelTime| {
        let name = shortened(&kernel.name);
        let share = format!("{:.1} %", 1e2 * kernel.ms / all.ms);
        let launches = kernel.launches.to_string();
        vec![name, launches, milliseconds(kernel.ms), share]
    };
    let table = markdown(&["kernel", "launches", "ms", "share"], &rows, row);
    format!("\n{contender}: {launches} launches, {busy} ms{step}\n{table}")
}

/// Several entries side by side: a table for each quantity.
pub fn overview(report: &Report) -> String {
    if report.entries.len() < 2 {
        return String::new();
    }
    let step = |report: &ContenderReport| Some(report.timing?.step_ms.median);
    let step_ratio = |entry: &EntryReport, base| entry.fused_to(base);
    let mut tables = vec![quantity(report, "step, ms", step, milliseconds, step_ratio)];
    let figures: [(&str, Figure); 3] = [
        ("end of forward, MiB", FORWARD_END),
        ("saved, MiB", SAVED),
        ("peak, MiB", PEAK),
    ];
    for (title, figure) in figures {
        let bytes = |report: &ContenderReport| {
            let known = figure(report.memory.as_ref()?);
            known.into_iter().flatten().next()
        };
        let ratio = |entry: &EntryReport, base| {
            let (fused, base) = (entry.sound(Contender::Fused)?, entry.sound(base)?);
            memory_ratio(figure, fused.memory.as_ref()?, base.memory.as_ref()?)
        };
        tables.push(quantity(report, title, bytes, mebibytes, ratio));
    }
    tables.retain(|table| !table.is_empty());
    tables.join("\n")
}

/// One quantity of all entries: of each contender, and the ratios of the fused one. Empty without values.
fn quantity<T>(
    report: &Report,
    title: &str,
    value: impl Fn(&ContenderReport) -> Option<T>,
    format: fn(T) -> String,
    ratio: impl Fn(&EntryReport, Contender) -> Option<f64>,
) -> String {
    let contenders = Contender::value_variants();
    let names = contenders.iter().map(|contender| contender.to_string());
    let ratios = BASES.iter().map(|base| format!("fused / {base}"));
    let header = [title.to_string(), "batch".to_string()];
    let header: Vec<String> = header.into_iter().chain(names).chain(ratios).collect();
    let header: Vec<&str> = header.iter().map(String::as_str).collect();
    let row = |entry: &EntryReport| -> Vec<String> {
        let values = contenders.iter();
        let values = values.map(|c| cell(entry.sound(*c).and_then(&value), format));
        let ratios = BASES.map(|base| cell(ratio(entry, base), three_decimals));
        let start = [entry.entry.id.clone(), entry.batch.to_string()];
        start.into_iter().chain(values).chain(ratios).collect()
    };
    let is_there = report
        .entries
        .iter()
        .flat_map(|entry| row(entry).split_off(2));
    if is_there.into_iter().any(|cell| !cell.is_empty()) {
        markdown(&header, &report.entries, row)
    } else {
        String::new()
    }
}

/// Missing results of a report, a line for each reason.
pub fn missing(report: &Report) -> Vec<String> {
    let mut missing: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut add = |reason: String, what: String| missing.entry(reason).or_default().push(what);
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
    let lines = missing.iter();
    let lines = lines.map(|(reason, what)| format!("missing: {} ({reason})", what.join(", ")));
    lines.collect()
}

/// Software and machine of a run, as one line.
pub fn setting(report: &Report) -> String {
    let machine = &report.machine;
    let pairs = |pairs: &BTreeMap<String, String>| -> Vec<String> {
        let pairs = pairs.iter();
        pairs
            .map(|(name, value)| format!("{name} {value}"))
            .collect()
    };
    let quick = if report.quick {
        "quick run, of smaller batches and images: "
    } else {
        ""
    };
    let gpu = cell(machine.gpu.as_ref(), |gpu| format!(" ({gpu})"));
    format!(
        "{quick}{}{gpu} in {} on {} ({}), {} of {} threads; {}; {}",
        report.device,
        report.precision,
        machine.cpu,
        [pairs(&machine.vectors), machine.caches.clone()]
            .concat()
            .join(", "),
        machine.threads,
        machine.cores,
        pairs(&report.versions).join(", "),
        report.date
    )
}

fn cell<T>(value: Option<T>, format: impl FnOnce(T) -> String) -> String {
    value.map(format).unwrap_or_default()
}

/// At least three digits, at most two decimals.
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

/// A table of a row for each item, without the columns that are empty in all of them. The first
/// column is aligned left; an empty cell is a dash.
fn markdown<T>(header: &[&str], items: &[T], row: impl Fn(&T) -> Vec<String>) -> String {
    let rows: Vec<Vec<String>> = items.iter().map(row).collect();
    let is_kept = |column: &usize| rows.iter().any(|row| !row[*column].is_empty());
    let kept: Vec<usize> = (0..header.len()).filter(is_kept).collect();
    let header: Vec<String> = header.iter().map(ToString::to_string).collect();
    let rows: Vec<&Vec<String>> = iter::once(&header).chain(&rows).collect();
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.max().unwrap_or_default()
    };
    let mut text = String::new();
    for (index, row) in rows.iter().enumerate() {
        for &column in &kept {
            let (width, cell) = (width(column), row[column].as_str());
            let cell = if cell.is_empty() { "-" } else { cell };
            let _ = match column {
                0 => write!(text, "| {cell:<width$} "),
                _ => write!(text, "| {cell:>width$} "),
            };
        }
        text += "|\n";
        if index == 0 {
            for &column in &kept {
                let rule = "-".repeat(width(column) + 1);
                let _ = write!(text, "|{rule}{}", if column == 0 { '-' } else { ':' });
            }
            text += "|\n";
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::report::{Largest, Machine, Problem, TensorError};
    use crate::bench::testing;

    fn error(name: &str, error: f64) -> Vec<TensorError> {
        let name = name.to_string();
        let error = Some(error);
        vec![TensorError { name, error }]
    }

    fn pair(index: usize) -> EntryReport {
        let mut fused = testing::contender(Contender::Fused, &[10.0], 12);
        fused.check(error("output", 2.4e-6), 1e-3);
        let unfused = testing::contender(Contender::Unfused, &[40.0], 48);
        testing::entry(index, vec![fused, unfused])
    }

    #[test]
    fn an_entry_is_a_table_of_what_was_measured() {
        let mut report = pair(1);
        let mut died = ContenderReport::new(Contender::UnfusedCheckpointed);
        died.fail(Problem::new(ProblemKind::Failed, "it died"));
        report.contenders.push(died);
        let memory = report.contenders[0].memory.as_mut().unwrap();
        memory.peak_kernel = Some("DirectConv2dKernel".to_string());
        let expected = "\
k3: 4x64x56 -> 64 k3 p1
| time                 | forward | backward | step |   min..max | x unfused |       off |
|----------------------|--------:|---------:|-----:|-----------:|----------:|----------:|
| fused                |    10.0 |     20.0 | 30.0 | 30.0..30.0 |     0.250 |      2e-6 |
| unfused              |    40.0 |     80.0 |  120 |   120..120 |     1.000 | reference |
| unfused-checkpointed |       - |        - |    - |          - |         - |         - |

| memory               | rss peak | x unfused | saved | kernel at the peak |
|----------------------|---------:|----------:|------:|-------------------:|
| fused                |     12.0 |     0.250 |   6.0 | DirectConv2dKernel |
| unfused              |     48.0 |     1.000 |  24.0 |                  - |
| unfused-checkpointed |        - |         - |     - |                  - |
unfused-checkpointed: FAILED: it died
";
        assert_eq!(entry(&report), expected);
        report.problem = Some("no room".to_string());
        assert_eq!(entry(&report), "k3: 4x64x56 -> 64 k3 p1\nFAILED: no room\n");
    }

    #[test]
    fn largest_batches_are_a_table_of_their_own() {
        let of = |contender, batch| ContenderReport {
            largest: Some(Largest {
                batch,
                peak_bytes: 3 << 20,
                image_ms: 12.0,
                to_unfused: None,
            }),
            ..ContenderReport::new(contender)
        };
        let mut never = ContenderReport::new(Contender::Never);
        never.fail(Problem::new(ProblemKind::Failed, "batch 2: it died"));
        let contenders = vec![of(Contender::Fused, 5), never, of(Contender::Unfused, 2)];
        let expected = "\
resnet50: ResNet-50, batch 2 at 112
| largest batch | images | MiB | ms an image | x unfused |
|---------------|-------:|----:|------------:|----------:|
| fused         |      5 | 3.0 |        12.0 |     2.500 |
| never         |      - |   - |           - |         - |
| unfused       |      2 | 3.0 |        12.0 |     1.000 |
never: FAILED: batch 2: it died
";
        assert_eq!(entry(&testing::entry(9, contenders)), expected);
    }

    #[test]
    fn kernels_are_named_by_what_they_take() {
        let kernel = |index: usize| KernelTime {
            name: format!("k{index}"),
            launches: index,
            ms: index as f64,
        };
        let mut fused = testing::contender(Contender::Fused, &[40.0], 12);
        fused.kernels = (1..=14).rev().map(kernel).collect();
        let text = entry(&testing::entry(1, vec![fused]));
        let (_, text) = text.split_once("\nfused: 105 launches, ").unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "105 ms of a step's 120");
        assert_eq!(lines.len(), 3 + MOST_KERNELS + 1);
        assert_eq!(lines[1], "| kernel   | launches |   ms |  share |");
        assert_eq!(lines[3], "| k14      |       14 | 14.0 | 13.3 % |");
        assert_eq!(lines[15], "| 2 others |        3 | 3.00 |  2.9 % |");
    }

    #[test]
    fn a_wrong_result_is_marked_in_its_row() {
        let mut never = testing::contender(Contender::Never, &[1.0], 1);
        never.check(error("input_grad", 0.5), 2e-3);
        let text = entry(&testing::entry(1, vec![never]));
        assert!(text.lines().nth(3).unwrap().ends_with("WRONG |"), "{text}");
        let wanted = "never: FAILED ITS CHECK: more than 2e-3 off the reference in input_grad by \
                      5.0e-1 of its largest value\n";
        assert!(text.ends_with(wanted), "{text}");
    }

    #[test]
    fn several_entries_stand_side_by_side() {
        let mut second = pair(9);
        second.contenders[1].fail(Problem::new(ProblemKind::Failed, "it died"));
        let mut report = testing::report(vec![pair(1)]);
        assert_eq!(overview(&report), "");
        report.entries.push(second);
        let expected = "\
| step, ms | batch | fused | unfused | fused / unfused |
|----------|------:|------:|--------:|----------------:|
| k3       |     4 |  30.0 |     120 |           0.250 |
| resnet50 |     2 |  30.0 |       - |               - |

| saved, MiB | batch | fused | unfused | fused / unfused |
|------------|------:|------:|--------:|----------------:|
| k3         |     4 |   6.0 |    24.0 |           0.250 |
| resnet50   |     2 |   6.0 |       - |               - |

| peak, MiB | batch | fused | unfused | fused / unfused |
|-----------|------:|------:|--------:|----------------:|
| k3        |     4 |  12.0 |    48.0 |           0.250 |
| resnet50  |     2 |  12.0 |       - |               - |
";
        assert_eq!(overview(&report), expected);
    }

    #[test]
    fn what_is_missing_is_grouped_by_the_reason() {
        let mut failed = pair(1);
        failed.contenders[0].fail(Problem::new(ProblemKind::Failed, "it died"));
        let mut report = testing::report(vec![failed, pair(2), pair(9)]);
        for entry in &mut report.entries[1..] {
            entry.problem = Some("not run: interrupted".to_string());
        }
        let wanted = [
            "missing: fused of k3 (FAILED: it died)",
            "missing: k1, resnet50 (not run: interrupted)",
        ];
        assert_eq!(missing(&report), wanted);
        report.entries.clear();
        assert!(missing(&report).is_empty());
    }

    #[test]
    fn the_setting_is_one_line() {
        let pair = |name: &str, value: &str| (name.to_string(), value.to_string());
        let mut report = testing::half();
        report.machine = Machine {
            cpu: "AMD EPYC".to_string(),
            gpu: Some("NVIDIA H100".to_string()),
            vectors: BTreeMap::from([pair("ours", "256-bit vectors"), pair("torch", "AVX512")]),
            caches: vec!["L2 512K".to_string()],
            cores: 8,
            threads: 2,
            ..Machine::default()
        };
        report.versions = BTreeMap::from([pair("torch", "2.15"), pair("burn", "0.22.1")]);
        assert_eq!(
            setting(&report),
            "quick run, of smaller batches and images: flex (NVIDIA H100) in f32 on AMD EPYC \
             (ours 256-bit vectors, torch AVX512, L2 512K), 2 of 8 threads; burn 0.22.1, torch \
             2.15; 2026-01-02T03:04:05Z"
        );
    }

    #[test]
    fn milliseconds_keep_three_digits() {
        let texts = [0.1234, 9.99, 9.996, 99.94, 99.96, 1234.6].map(milliseconds);
        assert_eq!(texts, ["0.12", "9.99", "10.0", "99.9", "100", "1235"]);
    }
}
