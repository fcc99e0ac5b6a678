//! A folder that belongs to one process at a time.

use std::fs::{File, TryLockError};
use std::path::Path;

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
}
