use std::fs::{File, TryLockError};

/// A file or a folder that other processes cannot lock, until this is dropped or the process ends.
#[derive(Debug)]
pub struct Lock(File);

impl Lock {
    /// Locks an open file, or a folder on Unix.
    ///
    /// # Errors
    ///
    /// [`TryLockError::WouldBlock`] if another process holds the lock; the system's where it has no locks.
    pub fn of(file: File) -> Result<Self, TryLockError> {
        file.try_lock()?;
        Ok(Self(file))
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Closing is not enough: a process that is just being started shares the file until it runs.
        let _ = self.0.unlock();
    }
}
