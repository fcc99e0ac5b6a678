use std::mem::MaybeUninit;

use rayon::prelude::*;

use crate::Element;

/// Bytes from which on a buffer asks for huge pages: it then holds some whole ones.
const LEAST_BYTES: usize = 8 << 20;

/// Bytes that a thread clears at a time: a huge page.
const PART: usize = 2 << 20;

/// A buffer of zeros for an activation.
///
/// Fresh memory comes from the system page by page, and memory that was used before has to be
/// cleared; either takes as long as much of the arithmetic that fills an activation. So all of
/// rayon's threads share it. On Linux a large buffer asks for huge pages too (`MADV_HUGEPAGE`), which
/// count where transparent huge pages are set to `madvise`, the default of most distributions.
///
/// ```
/// let activation = burn_conv_bn_cpu::zeros::<f32>(1024);
/// assert!(activation.iter().all(|value| *value == 0.0));
/// ```
#[allow(unsafe_code)]
pub fn zeros<E: Element>(len: usize) -> Vec<E> {
    let mut buffer = Vec::with_capacity(len);
    let values = &mut buffer.spare_capacity_mut()[..len];
    if size_of_val(values) >= LEAST_BYTES {
        ask_for_huge_pages(values);
    }
    values
        .par_chunks_mut(PART / size_of::<E>())
        .for_each(|values| {
            values.fill(MaybeUninit::new(E::default()));
        });
    // SAFETY: the parts are all of the first `len` values, and each was filled.
    unsafe { buffer.set_len(len) };
    buffer
}

#[cfg(target_os = "linux")]
#[allow(unsafe_code)]
fn ask_for_huge_pages<T>(buffer: &mut [T]) {
    /// `madvise` wants whole pages of the system's; no system's are larger than this.
    const PAGE: usize = 64 << 10;
    let bytes = buffer.as_mut_ptr_range();
    let start = (bytes.start as usize).next_multiple_of(PAGE);
    let end = bytes.end as usize / PAGE * PAGE;
    // SAFETY: the range lies within a buffer that this function alone refers to, and the advice
    // changes how the memory is backed, not what it holds. A refusal changes nothing.
    unsafe {
        libc::madvise(
            start as *mut libc::c_void,
            end.saturating_sub(start),
            libc::MADV_HUGEPAGE,
        );
    }
}

#[cfg(not(target_os = "linux"))]
fn ask_for_huge_pages<T>(_: &mut [T]) {}
