//! Vector code, compiled for each unit and chosen at run time.

pub(crate) mod chunk;
pub(crate) mod planes;
pub(crate) mod products;
pub(crate) mod sweeps;

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
