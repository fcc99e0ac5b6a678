//! The lock of a run: two at once would disturb each other's timings.

use std::fs::{File, OpenOptions, TryLockError};
use std::path::Path;

use anyhow::{Result, bail};
use burn_conv_bn_files::Lock;

use crate::say::note;

const NAME: &str = "burn-conv-bn-bench.lock";

/// Locks the file of runs in a folder for temporary files. `None`, with a note, if locking fails.
pub fn lock(folder: &Path) -> Result<Option<Lock>> {
    let path = folder.join(NAME);
    let mut options = OpenOptions::new();
    options.read(true).append(true).create(true);
    // Another user's file can be locked, but not written.
    let file = options.open(&path).or_else(|_| File::open(&path));
    let path = path.display();
    match file.map_err(TryLockError::Error).and_then(Lock::of) {
        Ok(lock) => Ok(Some(lock)),
        Err(TryLockError::WouldBlock) => {
            bail!("another cargo xtask bench is running, which holds {path}")
        }
        Err(TryLockError::Error(error)) => {
            note!("bench: whether another one runs is unknown: cannot lock {path}: {error}");
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
        let first = lock(folder.path()).unwrap();
        assert!(first.is_some());
        let error = lock(folder.path()).unwrap_err().to_string();
        assert!(error.contains("another cargo xtask bench"), "{error}");
        drop(first);
        assert!(lock(folder.path()).unwrap().is_some());
    }
}
