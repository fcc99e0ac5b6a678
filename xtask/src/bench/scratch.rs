//! The folder for data and results.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use burn_conv_bn_bench::protocol::Contender;
use tempfile::TempDir;

use crate::say::note;

/// The lock of a run, in the system's folder for temporary files.
const LOCK: &str = "burn-conv-bn-bench.lock";

/// The folder for data and results, which is removed at the end. Held by one run at a time: two would
/// disturb each other's timings.
pub struct Scratch {
    folder: TempDir,
    /// Held locked until the end.
    lock: Option<File>,
}

impl Scratch {
    /// In a folder for temporary files.
    pub fn create(parent: &Path) -> Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix("burn-conv-bn-bench-")
            .tempdir_in(parent);
        Ok(Self {
            lock: lock(&parent.join(LOCK))?,
            folder: folder
                .with_context(|| format!("cannot create a folder in {}", parent.display()))?,
        })
    }

    pub fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    pub fn results(&self, contender: Contender) -> PathBuf {
        self.folder.path().join(contender.to_string())
    }

    /// Removes the data and results of an entry.
    pub fn clear(&self) -> Result<()> {
        let clear = || -> io::Result<()> {
            for entry in fs::read_dir(self.folder.path())? {
                fs::remove_dir_all(entry?.path())?;
            }
            Ok(())
        };
        clear().with_context(|| format!("cannot clear {}", self.folder.path().display()))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Closing is not enough: a process that is just being started shares the file until it runs.
        if let Some(lock) = &self.lock {
            let _ = lock.unlock();
        }
    }
}

/// Locks a file. `None`, with a note, where the system has no locks.
fn lock(path: &Path) -> Result<Option<File>> {
    let mut options = OpenOptions::new();
    options.read(true).append(true).create(true);
    // Another user's file can be locked, but not written.
    let file = options.open(path).or_else(|_| File::open(path));
    let locked = match file {
        Ok(file) => file.try_lock().map(|()| file),
        Err(error) => Err(TryLockError::Error(error)),
    };
    match locked {
        Ok(file) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => bail!(
            "another cargo xtask bench is running, which holds {}",
            path.display()
        ),
        Err(TryLockError::Error(error)) => {
            note!(
                "bench: whether another one runs is unknown: cannot lock {}: {error}",
                path.display()
            );
            Ok(None)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_run_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let first = Scratch::create(folder.path()).unwrap();
        fs::create_dir_all(first.results(Contender::Fused)).unwrap();
        assert!(Scratch::create(folder.path()).is_err());
        drop(first);
        drop(Scratch::create(folder.path()).unwrap());
        let left: Vec<_> = fs::read_dir(folder.path()).unwrap().collect();
        assert_eq!(left.len(), 1, "the lock alone stays: {left:?}");
    }
}
