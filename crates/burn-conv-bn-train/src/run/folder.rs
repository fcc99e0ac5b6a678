//! The folder of a run: its lock, the checkpoint to resume, the removal of an earlier run.

use std::fs::{self, File, TryLockError};
use std::path::PathBuf;

use anyhow::{Context, Result, anyhow, bail, ensure};
use burn::module::Module;
use burn::tensor::DType;
use burn_conv_bn_files::{Lock, OutputError, Survives, check_room, sweep, write};
use clap::Args;
use serde::{Deserialize, Serialize};

use crate::choice::ON_RUN;
use crate::measure::history::{Epoch, History};
use crate::persist::checkpoint::{self, Set, Store};
use crate::persist::run_file::{RUN_FILE, RunFile};
use crate::print::say;
use crate::step::Classifier;

const MIB: usize = 1 << 20;

/// Most bytes of a checkpoint that are written to see whether there is room, so that this takes no
/// more than a moment.
const MOST_ROOM: usize = 64 * MIB;

/// Where `train` keeps a run, and `predict` looks for it.
pub(crate) const RUN: &str = "artifacts/train";

/// Where a run has its checkpoints. In a resumed one, files of later epochs stay until the run has come to them again.
#[derive(Args, Clone, Debug, Serialize, Deserialize)]
pub(crate) struct RunFolder {
    /// Folder for checkpoints.
    #[arg(id = "artifacts", long, value_name = "DIR", default_value = RUN, help_heading = ON_RUN)]
    #[serde(rename = "artifacts")]
    pub(crate) path: PathBuf,
    /// Resume the run in the folder from its newest complete checkpoint, with its options.
    #[arg(long, conflicts_with = "overwrite", help_heading = ON_RUN)]
    pub(crate) resume: bool,
    /// Remove an earlier run in the folder.
    #[arg(long, help_heading = ON_RUN)]
    pub(crate) overwrite: bool,
}

impl RunFolder {
    /// Checks that a run may begin or go on in it.
    pub(crate) fn check(&self) -> Result<()> {
        let path = self.path.display();
        let is_empty = checkpoint::files(&self.path)
            .with_context(|| self.not_writable())?
            .is_empty();
        if self.resume {
            ensure!(!is_empty, "{}", self.no_checkpoint(""));
        } else if !self.overwrite && !is_empty {
            bail!(
                "the directory {path} already holds a run; resume it, overwrite it or use another \
                 directory"
            );
        }
        Ok(())
    }

    /// Keeps other trainings out of it, and makes it if this one is new.
    ///
    /// Systems and file systems without such locks grant all of them.
    pub(super) fn lock(&self) -> Result<Option<Lock>> {
        if !self.resume {
            fs::create_dir_all(&self.path).with_context(|| self.not_writable())?;
        }
        let path = self.path.display();
        match File::open(&self.path)
            .map_err(TryLockError::Error)
            .and_then(Lock::of)
        {
            Err(TryLockError::WouldBlock) => {
                bail!("another process is training in the directory {path}")
            }
            lock => Ok(lock.ok()),
        }
    }

    /// The checkpoint to go on from: that of no epoch if none is asked for. Says which newer ones are
    /// damaged.
    pub(super) fn resumed(&self) -> Result<Set> {
        if !self.resume {
            return Ok(Set::default());
        }
        let (set, damaged) = checkpoint::newest(&self.path)?;
        let Some(set) = set else {
            let damaged: String = damaged.iter().map(|(_, why)| format!("; {why}")).collect();
            bail!("{}", self.no_checkpoint(&damaged));
        };
        for (epoch, why) in damaged {
            say!("Passed over the checkpoint of epoch {epoch}: {why}")?;
        }
        match set.epoch {
            0 => say!("Resuming a run that has not finished its first epoch.")?,
            epoch => say!("Resuming after epoch {epoch}.")?,
        }
        Ok(set)
    }

    /// Makes sure that a training can write to it, removes an earlier run, and begins the new one or goes
    /// on after the epochs of `history`.
    pub(super) fn prepare(
        &self,
        run_file: &RunFile,
        model: &Classifier,
        history: &History,
    ) -> Result<Store> {
        self.check()?;
        // Before anything is removed: whoever has no room for a new run keeps the old one. A checkpoint
        // of the parameters and of an optimizer's two tensors of their size is what will be written
        // first. A disk that is full only later costs an epoch.
        let checkpoint = 3 * model.num_params() * DType::from(model.dtype()).size();
        check_room(&self.path, MIB + checkpoint.min(MOST_ROOM))
            .with_context(|| self.not_writable())?;
        for folder in [&self.path, &checkpoint::folder(&self.path)] {
            sweep(folder).with_context(|| self.not_writable())?;
        }

        let store = Store::new(&self.path, history);
        self.begin(&store, run_file, &history.finished())
            .map_err(cannot_write)?;
        Ok(store)
    }

    fn begin(
        &self,
        store: &Store,
        run_file: &RunFile,
        history: &[Epoch],
    ) -> Result<(), OutputError> {
        if !self.resume {
            let earlier = checkpoint::files(&self.path);
            checkpoint::remove(earlier.map_err(|error| OutputError::io(&self.path, error))?)?;
        }
        let path = self.path.join(RUN_FILE);
        write(&path, &run_file.to_json(), Survives::PowerLoss)?;
        if self.resume {
            checkpoint::prune(&self.path, history.len(), history)
        } else {
            store.begin()
        }
    }

    fn not_writable(&self) -> String {
        format!("cannot write to the directory {}", self.path.display())
    }

    fn no_checkpoint(&self, damaged: &str) -> String {
        let folder = checkpoint::folder(&self.path);
        let folder = folder.display();
        format!("there is no complete checkpoint to resume from in {folder}{damaged}")
    }
}

/// A checkpoint or another file could not be written, as on a full disk. The training was stopped;
/// every checkpoint that was complete is as it was.
pub(super) fn cannot_write(error: OutputError) -> anyhow::Error {
    anyhow!("{error} (the training has stopped; complete checkpoints are kept)")
}

#[cfg(test)]
mod tests {
    use super::*;

    use tempfile::{TempDir, tempdir};

    fn folder(at: &TempDir, resume: bool) -> RunFolder {
        RunFolder {
            path: at.path().to_path_buf(),
            resume,
            overwrite: false,
        }
    }

    #[test]
    fn a_run_is_not_overwritten_unasked() {
        let at = tempdir().unwrap();
        let mut folder = folder(&at, false);
        folder.check().unwrap();
        let checkpoints = checkpoint::folder(at.path());
        fs::create_dir(&checkpoints).unwrap();
        fs::write(checkpoints.join("notes.txt"), "x").unwrap();
        folder.check().unwrap();
        fs::write(checkpoints.join("epoch-0.json"), "x").unwrap();
        let refused = folder.check().unwrap_err().to_string();
        assert!(refused.contains("already holds a run"), "{refused}");
        folder.overwrite = true;
        folder.check().unwrap();
    }

    #[test]
    fn a_directory_that_cannot_be_made_is_an_error() {
        let at = tempdir().unwrap();
        fs::write(at.path().join("file"), "x").unwrap();
        let mut folder = folder(&at, false);
        folder.path = at.path().join("file/run");
        let Err(error) = folder.lock() else {
            panic!("a folder below a file");
        };
        assert!(
            error.to_string().contains("cannot write to the directory"),
            "{error}"
        );
    }

    #[test]
    fn a_folder_without_checkpoints_cannot_be_resumed() {
        let at = tempdir().unwrap();
        for refused in [
            folder(&at, true).check(),
            folder(&at, true).resumed().map(drop),
        ] {
            let error = refused.unwrap_err().to_string();
            assert!(error.contains("no complete checkpoint"), "{error}");
        }
    }
}
