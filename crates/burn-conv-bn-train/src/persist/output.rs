//! Files that a user asks for: checked before any work, written at its end.

use std::fs;
use std::path::Path;

use anyhow::{Result, bail, ensure};
use burn_conv_bn_files::{Survives, check_all, replaced, write};
use serde::Serialize;

use crate::persist::checkpoint;
use crate::persist::run_file::RUN_FILE;
use crate::print::say;

/// Checks that the file of a picture is named as SVG.
pub(crate) fn check_svg(option: &str, picture: Option<&Path>) -> Result<()> {
    if let Some(path) = picture {
        let ending = path.extension().unwrap_or_default();
        ensure!(
            ending.eq_ignore_ascii_case("svg"),
            "{option} draws SVG, to a file that ends in .svg, which {} does not",
            path.display()
        );
    }
    Ok(())
}

/// Checks that files can be written, and that no two options name the same one.
pub(crate) fn check(outputs: &[(&'static str, Option<&Path>)]) -> Result<()> {
    let given = outputs
        .iter()
        .filter_map(|&(option, path)| Some((option, path?)));
    Ok(check_all(&Vec::from_iter(given))?)
}

/// As [`check`], of outputs that would replace no file of the run in a folder.
pub(crate) fn check_beside(run: &Path, outputs: &[(&'static str, Option<&Path>)]) -> Result<()> {
    check(outputs)?;
    // A folder that is yet to be made has no files.
    let Ok(folder) = fs::canonicalize(run) else {
        return Ok(());
    };
    for (option, path) in outputs {
        let Some(path) = path else { continue };
        let file = replaced(path)?.unwrap_or_default();
        if file == folder.join(RUN_FILE) || file.starts_with(checkpoint::folder(&folder)) {
            bail!(
                "{option} {} would overwrite a file of the run in {}; use another path",
                path.display(),
                run.display()
            );
        }
    }
    Ok(())
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
        let done = bytes.and_then(|bytes| Ok(write(path, &bytes, Survives::PowerLoss)?));
        match done {
            Ok(()) => lines.push(format!("{what}: {}", path.display())),
            Err(error) => written = written.and(Err(error)),
        }
    }
    for line in lines {
        say!("{line}")?;
    }
    written
}
