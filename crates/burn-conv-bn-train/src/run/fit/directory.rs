//! The directory of a run: its lock, the checkpoint to resume, the removal of an earlier run.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::tensor::DType;
use burn_conv_bn_files::{check_room, sweep};

use super::error::FitError;
use super::options::RunOptions;
use crate::persist::checkpoint::{self, Set};
use crate::persist::lock::Lock;
use crate::print::say;
use crate::step::Classifier;

/// Keeps other trainings out of the directory, which is made if this one is new.
pub(super) fn lock(options: &RunOptions) -> Result<Lock, FitError> {
    let directory = &options.directory;
    if !options.resume {
        fs::create_dir_all(directory).map_err(|source| not_writable(directory, source))?;
    }
    Lock::of(directory).ok_or_else(|| FitError::Busy {
        path: directory.clone(),
    })
}

/// Checks, before any data are loaded, that a run may begin or go on in the directory.
pub(crate) fn check_directory(
    directory: &Path,
    resume: bool,
    overwrite: bool,
) -> Result<(), FitError> {
    let sets = checkpoint::files(directory)
        .map_err(|source| not_writable(&checkpoint::folder(directory), source))?;
    if resume && sets.is_empty() {
        return Err(FitError::NoCheckpoint {
            path: checkpoint::folder(directory),
            damaged: Vec::new(),
        });
    }
    if !(resume || overwrite || sets.is_empty() && logs(directory)?.is_empty()) {
        return Err(FitError::DirectoryInUse {
            path: directory.to_path_buf(),
        });
    }
    Ok(())
}

/// The checkpoint to go on from, if one is asked for. Says which newer ones are damaged.
pub(super) fn resumed_set(options: &RunOptions) -> Result<Option<Set>, FitError> {
    let directory = &options.directory;
    if !options.resume {
        return Ok(None);
    }
    let (set, damaged) = checkpoint::newest(directory)
        .map_err(|source| not_writable(&checkpoint::folder(directory), source))?;
    if set.is_none() {
        return Err(FitError::NoCheckpoint {
            path: checkpoint::folder(directory),
            damaged,
        });
    }
    for damaged in damaged {
        say!(
            "Passed over the checkpoint of epoch {}: {damaged}",
            damaged.epoch
        )?;
    }
    Ok(set)
}

/// Loads the model of a checkpoint, as Burn does again when it launches: there, one that does not
/// fit is a panic.
pub(super) fn load_model(
    directory: &Path,
    set: &Set,
    classifier: Classifier,
) -> Result<Classifier, FitError> {
    let Some(records) = &set.records else {
        return Ok(classifier);
    };
    let expected = classifier.dtype();
    let classifier = classifier
        .try_load_record(records.model.clone())
        .map_err(|source| FitError::Checkpoint {
            path: checkpoint::model_file(directory, set.epoch),
            source,
        })?;
    let found = classifier.dtype();
    if found != expected {
        return Err(FitError::CheckpointType { expected, found });
    }
    Ok(classifier)
}

const MIB: usize = 1 << 20;

/// Most bytes of a checkpoint that are written to see whether there is room, so that this takes no
/// more than a moment.
const MOST_ROOM: usize = 64 * MIB;

/// Makes sure that a training can write to the directory, and removes an earlier run from it.
pub(super) fn prepare_directory(
    options: &RunOptions,
    resumed: Option<usize>,
    saved: Option<&Classifier>,
) -> Result<(), FitError> {
    let directory = &options.directory;
    let sets = checkpoint::files(directory)
        .map_err(|source| not_writable(&checkpoint::folder(directory), source))?;
    let mut logs = logs(directory)?;
    if resumed.is_none() && !(options.overwrite || sets.is_empty() && logs.is_empty()) {
        return Err(FitError::DirectoryInUse {
            path: directory.clone(),
        });
    }

    // Before anything is removed: whoever has no room for a new run keeps the old one. Logs, and a
    // checkpoint of the parameters and of an optimizer's two tensors of their size, are what will
    // be written first. A disk that is full only later costs an epoch.
    let checkpoint = saved.map_or(0, |model| {
        3 * model.num_params() * DType::from(model.dtype()).size()
    });
    check_room(directory, MIB + checkpoint.min(MOST_ROOM))
        .map_err(|source| not_writable(directory, source))?;

    if resumed.is_none() {
        checkpoint::remove(sets)?;
        for path in logs.drain(..) {
            let removed = if path.is_dir() {
                fs::remove_dir_all(&path)
            } else {
                fs::remove_file(&path)
            };
            removed.map_err(|source| not_writable(&path, source))?;
        }
    }
    let folders = logs.into_iter().filter(|path| path.is_dir());
    for folder in folders.chain([directory.clone(), checkpoint::folder(directory)]) {
        sweep(&folder).map_err(|source| not_writable(&folder, source))?;
    }
    Ok(())
}

/// The epochs' folders of logs in `directory`.
fn logs(directory: &Path) -> Result<Vec<PathBuf>, FitError> {
    let mut found = Vec::new();
    for split in ["train", "valid"] {
        let folder = directory.join(split);
        let entries = match fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(not_writable(&folder, error)),
        };
        for entry in entries {
            let path = entry
                .map_err(|source| not_writable(&folder, source))?
                .path();
            let epoch = path
                .file_name()
                .and_then(|name| name.to_str())
                .and_then(|name| name.strip_prefix("epoch-"));
            if epoch.is_some_and(|epoch| epoch.parse::<usize>().is_ok()) {
                found.push(path);
            }
        }
    }
    Ok(found)
}

fn not_writable(path: &Path, source: io::Error) -> FitError {
    FitError::Directory {
        path: path.to_path_buf(),
        source,
    }
}
