//! `job.json`: the options and the data of a run, in its folder.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::data::{Digits, MnistData};

/// Options of a command with their values, by their long names.
pub(crate) type Options = Map<String, Value>;

/// Most bytes of a file of options.
pub(crate) const MOST_BYTES: u64 = 1 << 20;

/// Name of the file that [`RunFile`] is in.
pub(crate) const RUN_FILE: &str = "job.json";

/// Options and data of a training: [`RUN_FILE`] in its folder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct RunFile {
    /// Version of the program that wrote it.
    pub(crate) version: String,
    /// Options of `mnist train`, without those of a single call.
    pub(crate) options: Options,
    pub(crate) data: DataIdentity,
}

/// Which digits a model was trained and tested on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DataIdentity {
    /// `mnist`, `synthetic` or `custom`.
    pub(crate) name: String,
    pub(crate) train_digits: usize,
    /// MD5 of their images and labels.
    pub(crate) train_md5: String,
    pub(crate) test_digits: usize,
    /// MD5 of their images and labels.
    pub(crate) test_md5: String,
}

impl DataIdentity {
    /// Of data that were found.
    pub(crate) fn of(data: &MnistData) -> Self {
        let digest = |digits: &Digits| {
            let mut context = md5::Context::new();
            context.consume(digits.images());
            context.consume(digits.labels());
            format!("{:x}", context.finalize())
        };
        Self {
            name: data.name.to_string(),
            train_digits: data.train.len(),
            train_md5: digest(&data.train),
            test_digits: data.test.len(),
            test_md5: digest(&data.test),
        }
    }

    /// For people, with the first digits of the checksums.
    fn describe(&self) -> String {
        format!(
            "{} ({} training digits, MD5 {:.8}.., and {} test digits, MD5 {:.8}..)",
            self.name, self.train_digits, self.train_md5, self.test_digits, self.test_md5
        )
    }
}

impl RunFile {
    /// Options that decide the result: a resumed run must have the same values.
    ///
    /// Data are compared by content, not by path.
    const FIXED: [&str; 12] = [
        "model",
        "variant",
        "optimizer",
        "lr",
        "gamma",
        "norm",
        "dropout",
        "precision",
        "batch-size",
        "seed",
        "train-limit",
        "test-limit",
    ];

    /// Options that are about one call and not about the run.
    const PASSING: [&str; 5] = ["artifacts", "json", "overwrite", "plain", "resume"];

    /// Of a run that starts now, with all options of `mnist train`.
    pub(crate) fn new(options: &Options, data: DataIdentity) -> Self {
        let mut options = options.clone();
        options.retain(|option, _| !Self::PASSING.contains(&option.as_str()));
        // A run may be resumed from another folder.
        if let Some(Value::String(folder)) = options.get_mut("data-dir")
            && let Ok(path) = std::path::absolute(&*folder)
            && let Some(path) = path.to_str()
        {
            *folder = path.to_string();
        }
        Self {
            version: env!("CARGO_PKG_VERSION").to_string(),
            options,
            data,
        }
    }

    /// Reads the file in the folder of a run. None if there is no such file.
    pub(crate) fn find(directory: &Path) -> Result<Option<Self>> {
        let path = directory.join(RUN_FILE);
        let json = match read_text(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            json => json.with_context(|| format!("cannot read {}", path.display()))?,
        };
        let file = serde_json::from_str(&json);
        file.with_context(|| format!("{} is damaged", path.display()))
    }

    /// As [`find`](Self::find), a file that must be there.
    pub(crate) fn read(directory: &Path) -> Result<Self> {
        Self::find(directory)?.with_context(|| {
            format!(
                "{} has no {RUN_FILE}, which says what its checkpoints are of: they were not \
                 written by `mnist train`, or by an older one",
                directory.display()
            )
        })
    }

    pub(crate) fn to_json(&self) -> Vec<u8> {
        let mut json = serde_json::to_vec_pretty(self).expect("texts and numbers are JSON");
        json.push(b'\n');
        json
    }

    /// Checks that `options` agree with this run's where they decide the result.
    pub(crate) fn check_options(&self, directory: &Path, options: &Options) -> Result<()> {
        let difference = |option: &&str| {
            let values = [&self.options, options].map(|options| options.get(*option));
            let [stored, asked] = values.map(|value| value.map_or("none".to_string(), shown));
            (values[0] != values[1]).then(|| format!("--{option} {stored}, not {asked}"))
        };
        let differences: Vec<String> = Self::FIXED.iter().filter_map(difference).collect();
        ensure!(
            differences.is_empty(),
            "cannot resume the run in {}: it was started with {}",
            directory.display(),
            differences.join(", and with ")
        );
        Ok(())
    }

    pub(crate) fn check_data(&self, directory: &Path, data: &DataIdentity) -> Result<()> {
        ensure!(
            self.data == *data,
            "cannot resume the run in {}: it was started on {}, and these are {}",
            directory.display(),
            self.data.describe(),
            data.describe()
        );
        Ok(())
    }
}

/// A value as on the command line.
fn shown(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// Reads a file of options: a regular file or a pipe, of at most 1 MiB.
pub(crate) fn read_text(path: &Path) -> io::Result<String> {
    let kind = fs::metadata(path)?.file_type();
    #[cfg(unix)]
    let pipe = std::os::unix::fs::FileTypeExt::is_fifo(&kind);
    #[cfg(not(unix))]
    let pipe = false;
    if !kind.is_file() && !pipe {
        return Err(io::Error::other("it is neither a regular file nor a pipe"));
    }
    let mut bytes = Vec::new();
    File::open(path)?
        .take(MOST_BYTES + 1)
        .read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MOST_BYTES {
        return Err(io::Error::other("it is larger than 1 MiB"));
    }
    String::from_utf8(bytes).map_err(|_| io::Error::other("it is not UTF-8"))
}

#[cfg(test)]
mod tests;
