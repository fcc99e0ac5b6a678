//! The files that `--json`, `--csv` and `--plot` name.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::Result;
use burn_conv_bn_files::{self as files, Survives};
use serde_json::Value;

use super::report::Report;

/// A report in one of its forms, as bytes.
pub type Form = fn(&Report) -> Result<Vec<u8>>;

#[derive(Debug, Default)]
pub struct Outputs(Vec<(PathBuf, Form)>);

impl Outputs {
    /// Files with their options and forms. Checks that they can be written.
    pub fn new(outputs: &[(&'static str, &Path, Form)]) -> Result<Self> {
        let named: Vec<_> = outputs
            .iter()
            .map(|(name, path, _)| (*name, *path))
            .collect();
        files::check_all(&named)?;
        let outputs = outputs.iter();
        let outputs = outputs.map(|(_, path, form)| (path.to_path_buf(), *form));
        Ok(Self(outputs.collect()))
    }

    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.0.iter().map(|(path, _)| path.as_path())
    }

    /// Writes a report. An unfinished one is not written to a pipe, where nothing replaces it.
    pub fn write(&self, report: &Report, is_finished: bool) -> Result<()> {
        for (path, form) in &self.0 {
            if is_finished || files::replaced(path)?.is_some() {
                files::write(path, &form(report)?, Survives::Kill)?;
            }
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

/// One line for each contender of each entry, and one for an entry without any, with the figures of
/// [`json()`] by their paths: `timing.step_ms.median`. Each line has the machine, so that files can be joined.
pub fn csv(report: &Report) -> Result<Vec<u8>> {
    let mut run = serde_json::to_value(report)?;
    let entries = run["entries"].take();
    run["summary"].take();
    let mut lines: Vec<BTreeMap<String, String>> = Vec::new();
    for mut entry in entries.as_array().cloned().unwrap_or_default() {
        let contenders = entry["contenders"].take();
        let contenders = contenders.as_array().filter(|all| !all.is_empty());
        for contender in contenders.unwrap_or(&vec![Value::Null]) {
            let mut line = BTreeMap::new();
            for part in [&run, &entry, contender] {
                flatten("", part, &mut line);
            }
            lines.push(line);
        }
    }
    let columns: BTreeSet<&String> = lines.iter().flat_map(BTreeMap::keys).collect();
    let mut csv = csv::Writer::from_writer(Vec::new());
    csv.write_record(&columns)?;
    for line in &lines {
        let cells = columns.iter();
        csv.write_record(cells.map(|column| line.get(*column).map_or("", String::as_str)))?;
    }
    Ok(csv.into_inner()?)
}

/// The single values of a tree by their paths. Lists of objects, such as all steps, are left out.
fn flatten(path: &str, value: &Value, line: &mut BTreeMap<String, String>) {
    let below = |name: &str| match path {
        "" => name.to_string(),
        _ => format!("{path}.{name}"),
    };
    let single = match value {
        Value::Null => return,
        Value::Object(fields) => {
            for (name, value) in fields {
                flatten(&below(name), value, line);
            }
            return;
        }
        Value::Array(values) => {
            for (index, value) in values.iter().enumerate().filter(|(_, v)| !v.is_object()) {
                flatten(&below(&index.to_string()), value, line);
            }
            return;
        }
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    line.insert(path.to_string(), single);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::report::{Problem, ProblemKind};
    use crate::bench::testing;
    use std::fs;

    #[test]
    fn reports_replace_what_was_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("report.json");
        fs::write(&path, "old").unwrap();
        let outputs = Outputs::new(&[("--json", &path, json)]).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "old");
        let mut report = testing::half();
        for is_finished in [false, true] {
            report.quick = is_finished;
            outputs.write(&report, is_finished).unwrap();
            let json: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
            assert_eq!(json["quick"], is_finished);
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn tables_have_a_line_for_each_contender_and_for_what_failed() {
        let mut report = testing::half();
        let failed = Problem::new(ProblemKind::Failed, "it said \"no\", twice");
        report.entries[0].contenders[1].fail(failed);
        report.entries.push(testing::entry(1, Vec::new()));
        report.entries[1].problem = Some("no room".to_string());
        let bytes = csv(&report).unwrap();
        let mut reader = csv::Reader::from_reader(bytes.as_slice());
        let lines: Vec<BTreeMap<String, String>> =
            reader.deserialize().map(|line| line.unwrap()).collect();
        assert_eq!(lines.len(), 3);
        for (name, cell) in [
            ("date", "2026-01-02T03:04:05Z"),
            ("precision", "f32"),
            ("version", "0.1.0"),
            ("seed", "7"),
            ("quick", "true"),
            ("entry.id", "tutorial-k3"),
            ("batch", "32"),
            ("contender", "fused"),
            ("timing.step_ms.median", "6.0"),
            ("timing.step_ms.range.1", "6.0"),
            ("timing.to_unfused.median", "0.5"),
            ("memory.resident_peak", "3145728"),
            ("memory.saved", "1572864"),
            ("peak_to_unfused", "0.75"),
            ("problem.reason", ""),
        ] {
            assert_eq!(lines[0][name], cell, "{name}");
        }
        assert_eq!(lines[1]["problem.reason"], "it said \"no\", twice");
        assert_eq!(lines[2]["problem"], "no room");
        assert_eq!(lines[2]["contender"], "");
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
