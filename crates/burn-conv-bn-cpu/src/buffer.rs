use crate::Element;

/// Bytes from which on a buffer asks for huge pages: it then holds some whole ones.
const LEAST_BYTES: usize = 8 << 20;

/// A buffer of zeros for an activation.
///
/// Fresh memory comes from the system page by page, and with small pages that takes as long as the
/// arithmetic that fills an activation. On Linux a large buffer asks for huge pages
/// (`MADV_HUGEPAGE`), which count where transparent huge pages are set to `madvise`, the default of
/// most distributions.
pub fn zeros<E: Element>(len: usize) -> Vec<E> {
    let mut buffer = vec![E::default(); len];
    if size_of_val(buffer.as_slice()) >= LEAST_BYTES {
        ask_for_huge_pages(&mut buffer);
    }
    buffer
}

#[cfg(target_os = "linux")]
#[allow(unsafe_code)]
fn ask_for_huge_pages<E: Element>(buffer: &mut [E]) {
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
fn ask_for_huge_pages<E: Element>(_: &mut [E]) {}
