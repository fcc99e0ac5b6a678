//! A folder that belongs to one process at a time.

use std::fs::{File, TryLockError};
use std::path::Path;

/// Keeps other processes that ask out of a folder, until it is dropped or the process ends.
pub(crate) struct Lock(Option<File>);

impl Lock {
    /// Locks a folder. None if another process holds the lock.
    ///
    /// Systems and file systems without such locks grant all of them.
    pub(crate) fn of(folder: &Path) -> Option<Self> {
        let file = File::open(folder).ok();
        match file.as_ref().map(File::try_lock) {
            Some(Ok(())) => Some(Self(file)),
            Some(Err(TryLockError::WouldBlock)) => None,
            _ => Some(Self(None)),
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Closing is not enough: a process that is just being started shares the file until it runs.
        if let Some(folder) = &self.0 {
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
