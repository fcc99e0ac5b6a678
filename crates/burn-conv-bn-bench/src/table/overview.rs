//! All entries side by side.

use super::cells::{cell, markdown, mebibytes, milliseconds, three_decimals, without_empty};
use super::figure::{FORWARD_END, PEAK, SAVED, memory_ratio};
use crate::protocol::Contender;
use crate::report::{ContenderReport, EntryReport, Report};

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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalogue::catalogue;
    use crate::report::ProblemKind;
    use crate::table::testing::{contender, report, run};

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
}
