//! The lock of a run: two at once would disturb each other's timings.

use std::fs::{File, OpenOptions, TryLockError};
use std::path::Path;

use anyhow::{Result, bail};

use crate::say::note;

const NAME: &str = "burn-conv-bn-bench.lock";

/// A file that is locked until this is dropped.
#[derive(Debug)]
pub struct Lock(File);

impl Lock {
    /// Locks the file of runs in a folder for temporary files. `None`, with a note, if locking fails.
    pub fn take(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(NAME);
        let mut options = OpenOptions::new();
        options.read(true).append(true).create(true);
        // Another user's file can be locked, but not written.
        let file = options.open(&path).or_else(|_| File::open(&path));
        let locked = file.map_err(TryLockError::Error).and_then(|file| {
            file.try_lock()?;
            Ok(Self(file))
        });
        match locked {
            Ok(lock) => Ok(Some(lock)),
            Err(TryLockError::WouldBlock) => bail!(
                "another cargo xtask bench is running, which holds {}",
                path.display()
            ),
            Err(TryLockError::Error(error)) => {
                let path = path.display();
                note!("bench: whether another one runs is unknown: cannot lock {path}: {error}");
                Ok(None)
            }
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Closing is not enough: a process that is just being started shares the file until it runs.
        let _ = self.0.unlock();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_run_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let first = Lock::take(folder.path()).unwrap();
        assert!(first.is_some());
        let error = Lock::take(folder.path()).unwrap_err().to_string();
        assert!(error.contains("another cargo xtask bench"), "{error}");
        drop(first);
        assert!(Lock::take(folder.path()).unwrap().is_some());
    }
}
