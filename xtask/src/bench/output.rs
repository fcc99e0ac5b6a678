//! The files that `--json` and `--plot` name.

use std::path::{Path, PathBuf};

use anyhow::Result;
use burn_conv_bn_files::{self as files, Survives};

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

#[cfg(test)]
mod tests {
    use super::*;
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
            let json: serde_json::Value =
                serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
            assert_eq!(json["quick"], is_finished);
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
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
        let error = refused(&[("--json", &same, json), ("--plot", &same, json)]);
        assert!(
            error.contains("--json") && error.contains("--plot"),
            "{error}"
        );
    }
}
