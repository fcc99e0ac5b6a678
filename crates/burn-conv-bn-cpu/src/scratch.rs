//! Memory: room for results, aligned values, and scratch for each thread.

use std::mem::MaybeUninit;
use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, PoisonError};

use crate::simd::CACHE_LINE;

/// Smallest buffer, in bytes, that asks for huge pages: it holds some whole ones.
const LEAST_BYTES: usize = 8 << 20;

/// Empties a buffer and returns room for `len` values, not cleared: clearing takes as long as much of the
/// arithmetic of an activation. The caller sets the length once all of the room is written.
///
/// Fresh memory comes from the system page by page, and with small pages that takes as long again. On
/// Linux a large buffer asks for huge pages (`MADV_HUGEPAGE`), which has an effect where transparent huge
/// pages are set to `madvise`, the default of most distributions.
pub(crate) fn room<T>(buffer: &mut Vec<T>, len: usize) -> &mut [MaybeUninit<T>] {
    buffer.clear();
    let is_new = buffer.capacity() < len;
    buffer.reserve_exact(len);
    let room = &mut buffer.spare_capacity_mut()[..len];
    if is_new && size_of_val(room) >= LEAST_BYTES {
        ask_for_huge_pages(room);
    }
    room
}

#[cfg(target_os = "linux")]
#[allow(unsafe_code)]
fn ask_for_huge_pages<T>(room: &mut [MaybeUninit<T>]) {
    /// `madvise` takes whole pages of the system; no system's are larger than this.
    const PAGE: usize = 64 << 10;
    let bytes = room.as_mut_ptr_range();
    let start = (bytes.start as usize).next_multiple_of(PAGE);
    let end = bytes.end as usize / PAGE * PAGE;
    // SAFETY: the range lies within memory that this function alone refers to, and the advice
    // changes how it is backed, not what it holds. A refusal changes nothing.
    unsafe {
        libc::madvise(
            start as *mut libc::c_void,
            end.saturating_sub(start),
            libc::MADV_HUGEPAGE,
        );
    }
}

#[cfg(not(target_os = "linux"))]
fn ask_for_huge_pages<T>(_: &mut [MaybeUninit<T>]) {}

/// Values aligned to a cache line. Allocators align to 16 bytes, where every other vector crosses a line,
/// and takes as long as two loads.
#[derive(Debug)]
pub(crate) struct Aligned<T> {
    values: Vec<T>,
    start: usize,
    len: usize,
}

impl<T> Default for Aligned<T> {
    fn default() -> Self {
        Self {
            values: Vec::new(),
            start: 0,
            len: 0,
        }
    }
}

impl<T: Copy> Aligned<T> {
    /// As [`Vec::resize`]: new values are `value`.
    pub(crate) fn resize(&mut self, len: usize, value: T) {
        if len == self.len {
            return;
        }
        let (start, kept) = (self.start, self.len.min(len));
        let room = len + CACHE_LINE / size_of::<T>();
        if kept == 0 {
            // Zeros that are fresh from the system are not written again.
            self.values = Vec::new();
            self.values = vec![value; room];
        } else {
            self.values.resize(start + kept, value);
            self.values.resize(room, value);
        }
        // Another allocation may be aligned otherwise.
        self.start = self.values.as_ptr().align_offset(CACHE_LINE);
        self.len = len;
        if kept > 0 && self.start != start {
            self.values.copy_within(start..start + kept, self.start);
            self[kept..].fill(value);
        }
    }
}

impl<T> Deref for Aligned<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.values[self.start..self.start + self.len]
    }
}

impl<T> DerefMut for Aligned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.values[self.start..self.start + self.len]
    }
}

/// Scratch for each thread that asks for it at a time.
///
/// Rayon's `map_init` makes scratch at each split of its work, more often than there are threads, and
/// fresh memory costs more than the work in it. Boxes: a channel's line may take less time than its scratch takes to move.
pub(crate) struct ScratchPool<S>(Mutex<Vec<Box<S>>>);

impl<S: Default> ScratchPool<S> {
    pub(crate) fn new() -> Self {
        Self(Mutex::new(Vec::new()))
    }

    /// Calls `task` with scratch of its own.
    pub(crate) fn with<R>(&self, task: impl FnOnce(&mut S) -> R) -> R {
        // Nothing panics while the lock is held, and scratch has no state to spoil.
        let take = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut scratch = take().pop().unwrap_or_default();
        let result = task(&mut scratch);
        take().push(scratch);
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_stay_and_start_at_a_line() {
        let mut aligned = Aligned::<f32>::default();
        let mut wanted = Vec::new();
        // Through several allocations, with neighbours that keep them from growing in place.
        let mut neighbours = Vec::new();
        for (index, len) in [3, 40, 17, 5000, 4999, 70_000, 1, 300_000]
            .into_iter()
            .enumerate()
        {
            aligned.resize(len, index as f32);
            wanted.resize(len, index as f32);
            assert_eq!(&aligned[..], &wanted[..]);
            assert!(aligned.as_ptr().addr().is_multiple_of(CACHE_LINE));
            aligned[len / 2] = -1.0;
            wanted[len / 2] = -1.0;
            neighbours.push(vec![index as f32; len]);
        }
        assert_eq!(neighbours.len(), 8);
    }
}
