use std::marker::PhantomData;

/// Scratch, new for each task.
pub(crate) struct Pool<S>(PhantomData<fn() -> S>);

impl<S: Default> Pool<S> {
    pub(crate) fn new() -> Self {
        Self(PhantomData)
    }

    /// Calls `task` with scratch that nothing else uses meanwhile.
    pub(crate) fn with<R>(&self, task: impl FnOnce(&mut S) -> R) -> R {
        task(&mut S::default())
    }
}
