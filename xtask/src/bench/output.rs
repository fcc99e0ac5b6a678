//! The file that `--json` names.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use burn_conv_bn_bench::report::Report;
use tempfile::NamedTempFile;

/// A file that is whole whenever somebody reads it.
pub struct JsonFile {
    path: PathBuf,
}

impl JsonFile {
    /// Makes sure that the file can be written, before there is anything to write.
    pub fn create(path: &Path) -> Result<Self> {
        if path.is_dir() {
            bail!("cannot write {}: it is a folder", path.display());
        }
        let file = Self {
            path: path.to_path_buf(),
        };
        file.temporary()?;
        Ok(file)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Puts a report in the place of what was there.
    pub fn write(&self, report: &Report) -> Result<()> {
        let failed = || format!("cannot write {}", self.path.display());
        let mut json = serde_json::to_vec_pretty(report)?;
        json.push(b'\n');
        let mut file = self.temporary()?;
        file.write_all(&json).with_context(failed)?;
        file.persist(&self.path).with_context(failed)?;
        Ok(())
    }

    fn temporary(&self) -> Result<NamedTempFile> {
        let folder = match self.path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        let mut builder = tempfile::Builder::new();
        // A report is no secret, which temporary files are taken for.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let file = builder.tempfile_in(folder);
        file.with_context(|| format!("cannot write to the folder {}", folder.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::machine;
    use std::collections::BTreeMap;
    use std::fs;

    #[test]
    fn reports_replace_what_was_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("report.json");
        fs::write(&path, "old").unwrap();
        let file = JsonFile::create(&path).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "old");
        let mut report = Report {
            quick: true,
            device: "flex".to_string(),
            machine: machine::describe(3, "flex"),
            versions: BTreeMap::new(),
            commit: None,
            entries: Vec::new(),
            summary: Vec::new(),
        };
        for quick in [true, false] {
            report.quick = quick;
            file.write(&report).unwrap();
            let json = fs::read(&path).unwrap();
            assert_eq!(serde_json::from_slice::<Report>(&json).unwrap(), report);
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_cannot_be_written_is_refused_at_once() {
        let folder = tempfile::tempdir().unwrap();
        assert!(JsonFile::create(folder.path()).is_err());
        assert!(JsonFile::create(&folder.path().join("none").join("report.json")).is_err());
    }
}
