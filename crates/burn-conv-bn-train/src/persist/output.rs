//! Files that a user asks for: checked before any work, written at its end.

use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow};
use burn_conv_bn_files::{OutputError, Survives, check_distinct};
use serde::Serialize;

use crate::print::say;

/// How a picture is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PictureFormat {
    /// Scalable Vector Graphics.
    Svg,
    /// Portable Network Graphics.
    Png,
}

/// The name of a picture's file does not say how to store it.
#[derive(Debug, thiserror::Error)]
#[error("a picture is written to a file that ends in .svg or .png, which {} does not", .0.display())]
pub(crate) struct PictureFormatError(PathBuf);

impl PictureFormat {
    /// That of a file with such a name.
    ///
    /// # Errors
    ///
    /// [`PictureFormatError`] if it ends neither in `.svg` nor in `.png`.
    pub(crate) fn of(path: &Path) -> Result<Self, PictureFormatError> {
        let ends_in = |wanted: &str| {
            path.extension()
                .is_some_and(|extension| extension.eq_ignore_ascii_case(wanted))
        };
        match (ends_in("svg"), ends_in("png")) {
            (true, _) => Ok(Self::Svg),
            (_, true) => Ok(Self::Png),
            _ => Err(PictureFormatError(path.to_path_buf())),
        }
    }
}

/// Checks that files can be written, and that no two options name the same one.
pub(crate) fn check(outputs: &[(&'static str, Option<&Path>)]) -> Result<()> {
    let given = outputs
        .iter()
        .filter_map(|&(option, path)| Some((option, path?)));
    let given: Vec<(&'static str, &Path)> = given.collect();
    for (_, path) in &given {
        burn_conv_bn_files::check(path).map_err(cannot_write)?;
    }
    Ok(check_distinct(&given)?)
}

/// A value as JSON.
pub(crate) fn json(value: &impl Serialize) -> Result<Vec<u8>> {
    let mut json = serde_json::to_vec_pretty(value)?;
    json.push(b'\n');
    Ok(json)
}

/// Ends a command: writes its files, then prints its text and where each file is.
///
/// Files are written also where nobody reads any more, and text is printed also where a disk is full.
pub(crate) fn finish(
    text: Option<String>,
    files: Vec<(&'static str, &Path, Result<Vec<u8>>)>,
) -> Result<()> {
    let mut lines = Vec::from_iter(text);
    let mut written = Ok(());
    for (what, path, bytes) in files {
        match bytes.and_then(|bytes| write(path, &bytes)) {
            Ok(()) => lines.push(format!("{what}: {}", path.display())),
            Err(error) => written = written.and(Err(error)),
        }
    }
    for line in lines {
        say!("{line}")?;
    }
    written
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    burn_conv_bn_files::write(path, bytes, Survives::PowerLoss).map_err(cannot_write)
}

fn cannot_write(error: OutputError) -> anyhow::Error {
    anyhow!("cannot write {error}")
}
