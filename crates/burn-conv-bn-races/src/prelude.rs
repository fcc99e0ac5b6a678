//! What the kernels use of rayon's parallel iterators, under the same names.
//!
//! Each section that runs in parallel starts [`THREADS`] threads and joins them, so that Helgrind
//! orders what was before it, and what is after it, against all of its tasks, and no task against
//! another one's thread.

use std::panic::resume_unwind;
use std::thread;

/// Threads of each section.
pub const THREADS: usize = 3;

/// Items for the threads.
#[derive(Debug)]
pub struct Parallel<T>(Vec<T>);

/// Items, and what is to be made of each.
#[derive(Debug)]
pub struct Map<T, F> {
    items: Vec<T>,
    map: F,
}

/// What items are in.
pub trait IntoParallelIterator {
    /// One of them.
    type Item: Send;

    /// The items.
    fn into_par_iter(self) -> Parallel<Self::Item>;
}

impl<T: Send> IntoParallelIterator for Vec<T> {
    type Item = T;

    fn into_par_iter(self) -> Parallel<T> {
        Parallel(self)
    }
}

impl<T: Send> IntoParallelIterator for Parallel<T> {
    type Item = T;

    fn into_par_iter(self) -> Self {
        self
    }
}

/// Chunks to read.
pub trait ParallelSlice<T: Sync> {
    /// Chunks of that length, the last of what is left.
    fn par_chunks(&self, len: usize) -> Parallel<&[T]>;
}

impl<T: Sync> ParallelSlice<T> for [T] {
    fn par_chunks(&self, len: usize) -> Parallel<&[T]> {
        Parallel(self.chunks(len).collect())
    }
}

/// Chunks to write.
pub trait ParallelSliceMut<T: Send> {
    /// Chunks of that length, the last of what is left.
    fn par_chunks_mut(&mut self, len: usize) -> Parallel<&mut [T]>;

    /// Chunks of that length; what is left is in none.
    fn par_chunks_exact_mut(&mut self, len: usize) -> Parallel<&mut [T]>;
}

impl<T: Send> ParallelSliceMut<T> for [T] {
    fn par_chunks_mut(&mut self, len: usize) -> Parallel<&mut [T]> {
        Parallel(self.chunks_mut(len).collect())
    }

    fn par_chunks_exact_mut(&mut self, len: usize) -> Parallel<&mut [T]> {
        Parallel(self.chunks_exact_mut(len).collect())
    }
}

impl<T: Send> Parallel<T> {
    /// Each with its place.
    pub fn enumerate(self) -> Parallel<(usize, T)> {
        Parallel(self.0.into_iter().enumerate().collect())
    }

    /// Each with its counterpart, as far as both have one.
    pub fn zip<Z: IntoParallelIterator>(self, other: Z) -> Parallel<(T, Z::Item)> {
        let others = other.into_par_iter().0;
        Parallel(self.0.into_iter().zip(others).collect())
    }

    /// What is made of each.
    pub fn map<R: Send, F: Fn(T) -> R + Sync>(self, map: F) -> Map<T, F> {
        Map { items: self.0, map }
    }

    /// Calls `task` with each.
    pub fn for_each<F: Fn(T) + Sync>(self, task: F) {
        run(self.0, || (), |_, item| task(item));
    }

    /// Calls `task` with each, and with a state that each thread makes for itself.
    pub fn for_each_init<S, I: Fn() -> S + Sync, F: Fn(&mut S, T) + Sync>(self, init: I, task: F) {
        run(self.0, init, task);
    }
}

impl<T: Send, R: Send, F: Fn(T) -> R + Sync> Map<T, F> {
    /// The results, in the items' order.
    pub fn collect<C: FromIterator<R>>(self) -> C {
        let map = self.map;
        run(self.items, || (), |_, item| map(item))
            .into_iter()
            .collect()
    }
}

/// Runs a task for each item. Returns the results in the items' order.
///
/// # Panics
///
/// As the first task that panics.
fn run<T: Send, S, R: Send>(
    items: Vec<T>,
    init: impl Fn() -> S + Sync,
    task: impl Fn(&mut S, T) -> R + Sync,
) -> Vec<R> {
    // Neighbours go to different threads: one that reaches into the next item's memory is seen.
    let mut shares: Vec<Vec<(usize, T)>> = (0..THREADS).map(|_| Vec::new()).collect();
    for (index, item) in items.into_iter().enumerate() {
        shares[index % THREADS].push((index, item));
    }
    let (init, task) = (&init, &task);
    let mut results: Vec<(usize, R)> = thread::scope(|scope| {
        let threads: Vec<_> = shares
            .into_iter()
            .map(|share| {
                scope.spawn(move || {
                    let mut state = init();
                    let results = share
                        .into_iter()
                        .map(|(index, item)| (index, task(&mut state, item)));
                    results.collect::<Vec<_>>()
                })
            })
            .collect();
        threads
            .into_iter()
            .flat_map(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic)))
            .collect()
    });
    results.sort_by_key(|(index, _)| *index);
    results.into_iter().map(|(_, result)| result).collect()
}
