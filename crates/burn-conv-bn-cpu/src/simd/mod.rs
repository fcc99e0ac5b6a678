//! Vector code, compiled for each unit and chosen at run time.

pub(crate) mod chunk;
pub(crate) mod planes;
pub(crate) mod products;
pub(crate) mod sweeps;

use std::ops::Range;

/// Bytes of a cache line.
pub(crate) const CACHE_LINE: usize = 64;

/// Asks for the cache line of a value that is needed soon: a hint, for any address.
#[inline(always)]
#[allow(unsafe_code)]
pub(crate) fn prefetch<T>(at: *const T) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: it reads nothing that shows, and faults nowhere.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// Asks for the lines of a range, if the values have it: hardware does not foresee the next of many short pieces.
#[inline(always)]
pub(crate) fn prefetch_range<T>(values: &[T], range: Range<usize>) {
    let lines = values.get(range).unwrap_or_default();
    for line in lines.chunks(CACHE_LINE / size_of::<T>()) {
        prefetch(line.as_ptr());
    }
}
