use std::sync::{Mutex, PoisonError};

/// Scratch for as many threads as ask for it at a time.
///
/// Rayon's `map_init` makes new scratch whenever it splits its work, which is more often than there
/// are threads, and fresh memory costs more than what is done in it.
pub(crate) struct Pool<S>(Mutex<Vec<S>>);

impl<S: Default> Pool<S> {
    pub(crate) fn new() -> Self {
        Self(Mutex::new(Vec::new()))
    }

    /// Calls `task` with scratch that nothing else uses meanwhile.
    pub(crate) fn with<R>(&self, task: impl FnOnce(&mut S) -> R) -> R {
        // Nothing panics while the lock is held, and what is in there has no state to spoil.
        let take = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut scratch = take().pop().unwrap_or_default();
        let result = task(&mut scratch);
        take().push(scratch);
        result
    }
}
