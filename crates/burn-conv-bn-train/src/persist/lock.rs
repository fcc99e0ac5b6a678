//! A folder that belongs to one process at a time, and the first failure of several writers.

use std::fs::{File, TryLockError};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn_conv_bn_files::OutputError;

/// Keeps other processes that ask out of a folder, until it is dropped or the process ends.
pub(crate) struct Lock {
    folder: Option<File>,
}

impl Lock {
    /// Locks a folder. None if another process holds the lock.
    ///
    /// Systems and file systems without such locks grant all of them.
    pub(crate) fn of(folder: &Path) -> Option<Self> {
        let Ok(file) = File::open(folder) else {
            return Some(Self { folder: None });
        };
        match file.try_lock() {
            Ok(()) => Some(Self { folder: Some(file) }),
            Err(TryLockError::WouldBlock) => None,
            Err(TryLockError::Error(_)) => Some(Self { folder: None }),
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Closing is not enough: a process that is just being started shares the file until it runs.
        if let Some(folder) = &self.folder {
            let _ = folder.unlock();
        }
    }
}

/// First failure of all that write for a training, each on a thread of its own. Clones share it.
#[derive(Clone, Debug, Default)]
pub(crate) struct FirstFailure(Arc<Mutex<Option<OutputError>>>);

impl FirstFailure {
    pub(crate) fn report(&self, failure: OutputError) {
        self.lock().get_or_insert(failure);
    }

    pub(crate) fn happened(&self) -> bool {
        self.lock().is_some()
    }

    pub(crate) fn take(&self) -> Option<OutputError> {
        self.lock().take()
    }

    fn lock(&self) -> MutexGuard<'_, Option<OutputError>> {
        // Each change is one store: a lock poisoned by a panic elsewhere guards a sound value.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(unix)]
    #[test]
    fn a_folder_has_one_owner_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let lock = Lock::of(folder.path()).unwrap();
        assert!(Lock::of(folder.path()).is_none());
        drop(lock);
        assert!(Lock::of(folder.path()).is_some());
    }

    #[test]
    fn the_first_failure_is_kept() {
        let failure = FirstFailure::default();
        assert!(!failure.happened());
        for name in ["first", "second"] {
            let error = std::io::ErrorKind::StorageFull.into();
            failure.clone().report(OutputError::io(name, error));
        }
        assert!(failure.happened());
        assert!(failure.take().unwrap().to_string().starts_with("first: "));
        assert!(!failure.happened());
    }
}
