#![doc = include_str!("../README.md")]
#![deny(missing_docs)]

#[cfg(feature = "wgpu")]
mod bindings;
#[cfg(any(feature = "cubecl", test))]
mod lines;
#[cfg(feature = "cubecl")]
mod pool;
#[cfg(feature = "burn")]
mod step;
#[cfg(any(feature = "wgpu", test))]
mod trace;
#[cfg(feature = "cubecl")]
mod tuning;

#[cfg(feature = "wgpu")]
pub use bindings::{BindingError, BindingMeter};
#[cfg(feature = "cubecl")]
pub use pool::PoolMeter;
#[cfg(feature = "burn")]
pub use step::{MemoryProbe, StepMemory, measure_step};
#[cfg(feature = "wgpu")]
pub use trace::{Launch, TraceError};
#[cfg(feature = "cubecl")]
pub use tuning::TuningMeter;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::{AcqRel, Relaxed};

/// The system's allocator, with a count of live bytes and of their peak.
///
/// Counts requested bytes, without the allocator's overhead. An allocation costs two atomic operations.
/// Readings are exact once other threads no longer allocate; no byte is lost meanwhile.
///
/// A program declares it with `#[global_allocator]`, as in [the crate's example](crate). Called directly:
///
/// ```
/// use std::alloc::{GlobalAlloc, Layout};
///
/// use burn_conv_bn_memory::CountingAllocator;
///
/// let allocator = CountingAllocator::new();
/// let layout = Layout::from_size_align(100, 8).unwrap();
/// // SAFETY: the size is not zero, and the memory is given back once, with its layout.
/// unsafe { allocator.dealloc(allocator.alloc(layout), layout) };
/// assert_eq!(allocator.current(), 0);
/// assert_eq!(allocator.take_peak(), 100);
/// // That peak has ended.
/// assert_eq!(allocator.peak(), 0);
/// ```
#[derive(Debug, Default)]
pub struct CountingAllocator {
    current: AtomicUsize,
    peak: AtomicUsize,
}

impl CountingAllocator {
    /// An allocator that has counted nothing yet.
    pub const fn new() -> Self {
        Self {
            current: AtomicUsize::new(0),
            peak: AtomicUsize::new(0),
        }
    }

    /// Bytes alive now.
    pub fn current(&self) -> usize {
        self.current.load(Relaxed)
    }

    /// Most bytes alive at any moment since the last [`reset_peak`](Self::reset_peak).
    pub fn peak(&self) -> usize {
        self.peak.load(Relaxed)
    }

    /// Starts a new peak at the bytes alive now, which it returns.
    pub fn reset_peak(&self) -> usize {
        let (_, level) = self.restart_peak(|| self.current());
        level
    }

    /// As [`reset_peak`](Self::reset_peak), but returns the peak that ends.
    ///
    /// Called repeatedly, it samples the live bytes over time without missing a peak.
    pub fn take_peak(&self) -> usize {
        let (ended, _) = self.restart_peak(|| self.current());
        ended
    }

    /// Ends the peak, starts one at `level()`, and returns both.
    ///
    /// The old peak is cleared first. With the level read first, the peak of an allocation in between would
    /// be overwritten, and the new peak would be below the live bytes.
    fn restart_peak(&self, level: impl FnOnce() -> usize) -> (usize, usize) {
        // Acquire and release: each allocation whose peak is taken here is in the level read below.
        let ended = self.peak.swap(0, AcqRel);
        let level = level();
        self.peak.fetch_max(level, AcqRel);
        (ended, level)
    }

    fn grow(&self, bytes: usize) {
        let current = self.current.fetch_add(bytes, Relaxed) + bytes;
        self.peak.fetch_max(current, AcqRel);
    }

    fn shrink(&self, bytes: usize) {
        self.current.fetch_sub(bytes, Relaxed);
    }
}

// SAFETY: every method passes its arguments to `System` and returns its result, both unchanged; the
// counters are no part of the allocation.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for CountingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller upholds `System`'s contract, which is this method's.
        let pointer = unsafe { System.alloc(layout) };
        if !pointer.is_null() {
            self.grow(layout.size());
        }
        pointer
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller upholds `System`'s contract, which is this method's.
        let pointer = unsafe { System.alloc_zeroed(layout) };
        if !pointer.is_null() {
            self.grow(layout.size());
        }
        pointer
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller upholds `System`'s contract, which is this method's.
        unsafe { System.dealloc(pointer, layout) };
        self.shrink(layout.size());
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // SAFETY: the caller upholds `System`'s contract, which is this method's.
        let new_pointer = unsafe { System.realloc(pointer, layout, new_size) };
        if !new_pointer.is_null() {
            match new_size.checked_sub(layout.size()) {
                Some(more) => self.grow(more),
                None => self.shrink(layout.size() - new_size),
            }
        }
        new_pointer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_allocation_while_a_peak_restarts_is_not_lost() {
        let allocator = CountingAllocator::new();
        allocator.grow(100);
        // As another thread's, right after the level was read.
        let interrupted = || {
            let level = allocator.current();
            allocator.grow(50);
            level
        };
        assert_eq!(allocator.restart_peak(interrupted), (100, 100));
        assert_eq!((allocator.current(), allocator.peak()), (150, 150));
    }

    #[test]
    #[allow(unsafe_code)]
    fn counts_every_way_to_allocate() {
        let allocator = CountingAllocator::new();
        let layout = |size| Layout::from_size_align(size, 8).unwrap();
        // SAFETY: sizes are not zero, and each pointer is given back once, with the layout that
        // it was last allocated with.
        unsafe {
            let a = allocator.alloc(layout(100));
            let b = allocator.alloc_zeroed(layout(50));
            assert_eq!((allocator.current(), allocator.peak()), (150, 150));
            let a = allocator.realloc(a, layout(100), 300);
            assert_eq!((allocator.current(), allocator.peak()), (350, 350));
            let a = allocator.realloc(a, layout(300), 10);
            assert_eq!((allocator.current(), allocator.peak()), (60, 350));
            assert_eq!(allocator.take_peak(), 350);
            assert_eq!((allocator.peak(), allocator.reset_peak()), (60, 60));
            allocator.dealloc(b, layout(50));
            allocator.dealloc(a, layout(10));
            assert_eq!((allocator.current(), allocator.peak()), (0, 60));
        }
    }
}
