use std::mem::MaybeUninit;

/// Bytes from which on a buffer asks for huge pages: it then holds some whole ones.
const LEAST_BYTES: usize = 8 << 20;

/// Room for `len` values in a buffer, in the place of what it holds. Nothing is cleared: to do that
/// takes as long as much of the arithmetic that fills an activation. Once all of the room is written,
/// the buffer's length can be set.
///
/// Fresh memory comes from the system page by page, and with small pages that takes as long again. On
/// Linux a large buffer asks for huge pages (`MADV_HUGEPAGE`), which count where transparent huge
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
    /// `madvise` wants whole pages of the system's; no system's are larger than this.
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
