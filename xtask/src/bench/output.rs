//! The files that `--json`, `--csv` and `--plot` name.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Result;
use burn_conv_bn_bench::protocol::Contender;
use burn_conv_bn_bench::report::{ContenderReport, EntryReport, Report};
use burn_conv_bn_bench::statistics::Spread;
use burn_conv_bn_bench::table;
use burn_conv_bn_files::{self as files, Survives};

/// A report in one of its forms, as bytes.
pub type Form = fn(&Report) -> Result<Vec<u8>>;

/// The files of a run.
#[derive(Debug, Default)]
pub struct Outputs(Vec<(PathBuf, Form)>);

impl Outputs {
    /// Files with their options and forms. Checks that they can be written, before there is anything
    /// to write.
    pub fn new(outputs: &[(&'static str, &Path, Form)]) -> Result<Self> {
        for (_, path, _) in outputs {
            files::check(path)?;
        }
        let named: Vec<_> = outputs
            .iter()
            .map(|(option, path, _)| (*option, *path))
            .collect();
        files::check_distinct(&named)?;
        let outputs = outputs.iter();
        let outputs = outputs.map(|(_, path, form)| (path.to_path_buf(), *form));
        Ok(Self(outputs.collect()))
    }

    /// Where they are.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.0.iter().map(|(path, _)| path.as_path())
    }

    /// Writes an unfinished report to the files that it can be replaced in later: not to a pipe.
    pub fn save(&self, report: &Report) -> Result<()> {
        for (path, form) in &self.0 {
            if files::replaced(path)?.is_some() {
                files::write(path, &form(report)?, Survives::Kill)?;
            }
        }
        Ok(())
    }

    /// Writes the report.
    pub fn finish(&self, report: &Report) -> Result<()> {
        for (path, form) in &self.0 {
            files::write(path, &form(report)?, Survives::Kill)?;
        }
        Ok(())
    }
}

/// Everything.
pub fn json(report: &Report) -> Result<Vec<u8>> {
    let mut json = serde_json::to_vec_pretty(report)?;
    json.push(b'\n');
    Ok(json)
}

/// One line for each contender of each entry, and one for an entry that failed as a whole; what is
/// not there is empty. Each line says what it was measured on, so that files can be joined.
pub fn csv(report: &Report) -> Result<Vec<u8>> {
    let mut lines = csv::Writer::from_writer(Vec::new());
    let failed = |entry: &EntryReport| entry.problem.is_some() && entry.contenders.is_empty();
    let all = report.entries.iter().flat_map(|entry| {
        let contenders = entry.contenders.iter().map(Some);
        let nobody = failed(entry).then_some(None);
        let contenders = contenders.chain(nobody);
        contenders.map(move |contender| Line::new(report, entry, contender))
    });
    for (index, line) in all.enumerate() {
        if index == 0 {
            lines.write_record(&line.names)?;
        }
        lines.write_record(&line.cells)?;
    }
    Ok(lines.into_inner()?)
}

/// A line of [`csv()`], with the names of its columns.
#[derive(Default)]
struct Line {
    names: Vec<String>,
    cells: Vec<String>,
}

impl Line {
    fn new(report: &Report, entry: &EntryReport, contender: Option<&ContenderReport>) -> Self {
        let machine = &report.machine;
        let mut line = Self::default();
        line.put("date", Some(&report.date));
        line.put("commit", report.commit.as_ref());
        line.put("version", Some(&report.version));
        line.put("seed", Some(report.seed));
        line.put("device", Some(&report.device));
        line.put("precision", Some(report.precision));
        line.put("quick", Some(report.quick));
        line.put("cpu", Some(&machine.cpu));
        line.put("gpu", machine.gpu.as_ref());
        line.put("vectors", Some(pairs(&machine.vectors)));
        line.put("threads", Some(machine.threads));
        line.put("cores", Some(machine.cores));
        line.put("versions", Some(pairs(&report.versions)));
        line.put("environment", Some(pairs(&machine.environment)));
        line.put("entry", Some(&entry.entry.id));
        line.put("title", Some(&entry.title));
        line.put("batch", Some(entry.entry.work.batch()));
        line.put("contender", contender.map(|report| report.contender));
        line.put("rounds", Some(entry.rounds));

        let timing = contender.and_then(|report| report.timing);
        line.spread("forward_ms", timing.map(|timing| timing.forward_ms));
        line.spread("backward_ms", timing.map(|timing| timing.backward_ms));
        line.spread(
            "optimizer_ms",
            timing.and_then(|timing| timing.optimizer_ms),
        );
        line.spread("step_ms", timing.map(|timing| timing.step_ms));
        line.spread("step_to_eager", timing.and_then(|timing| timing.to_eager));
        line.spread(
            "step_to_unfused",
            timing.and_then(|timing| timing.to_unfused),
        );
        line.put(
            "largest_error",
            contender.and_then(ContenderReport::largest_error),
        );

        let memory_of = |report: &ContenderReport| report.memory.unwrap_or_default();
        let memory = contender.map(memory_of).unwrap_or_default();
        let unfused = entry.contender(Contender::Unfused).map(memory_of);
        let to_unfused = unfused.and_then(|unfused| table::peak_ratio(memory, unfused));
        line.put("resident_forward_end_bytes", memory.resident_forward_end);
        line.put("resident_peak_bytes", memory.resident_peak);
        line.put("heap_forward_end_bytes", memory.heap_forward_end);
        line.put("heap_peak_bytes", memory.heap_peak);
        line.put("saved_bytes", memory.saved);
        line.put("peak_to_unfused", to_unfused);

        let problem = contender.and_then(|report| report.problem.as_ref());
        let problem = problem.map(ToString::to_string);
        line.put("problem", problem.or_else(|| entry.problem.clone()));
        line
    }

    fn put(&mut self, name: &str, value: Option<impl ToString>) {
        self.names.push(name.to_string());
        let cell = value.map(|value| value.to_string());
        self.cells.push(cell.unwrap_or_default());
    }

    /// The median by the name alone, and how far the rounds lie from it.
    fn spread(&mut self, name: &str, spread: Option<Spread>) {
        self.put(name, spread.map(|spread| spread.median));
        let [quartiles, range] = [
            spread.map(|spread| spread.quartiles),
            spread.map(|spread| spread.range),
        ];
        for (index, end) in ["q1", "q3"].into_iter().enumerate() {
            self.put(&format!("{name}_{end}"), quartiles.map(|ends| ends[index]));
        }
        for (index, end) in ["min", "max"].into_iter().enumerate() {
            self.put(&format!("{name}_{end}"), range.map(|ends| ends[index]));
        }
    }
}

/// Names with their values, in one cell.
fn pairs(values: &BTreeMap<String, String>) -> String {
    let pairs = values.iter();
    let pairs: Vec<String> = pairs
        .map(|(name, value)| format!("{name} {value}"))
        .collect();
    pairs.join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::testing;
    use burn_conv_bn_bench::report::ProblemKind;
    use std::fs;

    #[test]
    fn reports_replace_what_was_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("report.json");
        fs::write(&path, "old").unwrap();
        let outputs = Outputs::new(&[("--json", &path, json)]).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "old");
        let mut report = testing::report();
        for quick in [true, false] {
            report.quick = quick;
            outputs.save(&report).unwrap();
            let json = fs::read(&path).unwrap();
            assert_eq!(serde_json::from_slice::<Report>(&json).unwrap(), report);
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn tables_have_a_line_for_each_contender() {
        let mut report = testing::report();
        report.entries[0].contenders[1].fail(ProblemKind::Failed, "it said \"no\", twice");
        let bytes = csv(&report).unwrap();
        let mut reader = csv::Reader::from_reader(bytes.as_slice());
        let header = reader.headers().unwrap().clone();
        let place = |name: &str| header.iter().position(|title| title == name).unwrap();
        let lines: Vec<_> = reader.records().map(|line| line.unwrap()).collect();
        assert_eq!(lines.len(), report.entries[0].contenders.len());
        for (name, cell) in [
            ("date", "2026-01-02T03:04:05Z"),
            ("versions", "burn 0.22.1"),
            ("precision", "f32"),
            ("version", "0.1.0"),
            ("seed", "7"),
            ("quick", "true"),
            ("entry", "tutorial-k3"),
            ("batch", "32"),
            ("contender", "fused"),
            ("step_ms", "6"),
            ("step_ms_max", "6"),
            ("step_to_unfused", "0.5"),
            ("step_to_unfused_q1", "0.5"),
            ("optimizer_ms", ""),
            ("resident_peak_bytes", "3145728"),
            ("saved_bytes", "1572864"),
            ("peak_to_unfused", "0.75"),
            ("problem", ""),
        ] {
            assert_eq!(&lines[0][place(name)], cell, "{name}");
        }
        assert_eq!(&lines[1][place("problem")], "FAILED: it said \"no\", twice");
    }

    #[test]
    fn an_entry_that_failed_has_a_line() {
        let mut report = testing::report();
        report.entries[0].contenders.clear();
        report.entries[0].problem = Some("no room".to_string());
        let table = String::from_utf8(csv(&report).unwrap()).unwrap();
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(lines.len(), 2);
        assert!(lines[1].ends_with(",no room"), "{table}");
    }

    #[test]
    fn what_cannot_be_written_is_refused_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let refused = |outputs: &[(&'static str, &Path, Form)]| {
            Outputs::new(outputs).unwrap_err().to_string()
        };
        refused(&[("--json", folder, json)]);
        refused(&[("--json", &folder.join("none").join("report.json"), json)]);
        let same = folder.join("same");
        let error = refused(&[("--json", &same, json), ("--csv", &same, csv)]);
        assert!(
            error.contains("--json") && error.contains("--csv"),
            "{error}"
        );
    }
}
