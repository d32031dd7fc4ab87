//! Large tables in large pages.
//!
//! What is looked up all over the place, as decoded code is, waits for the host's TLB as much as
//! for memory itself, the more so where the host is a virtual machine. Linux uses pages of 2 MiB
//! for what asks for them, as a rule.

use std::mem::MaybeUninit;

/// What the host's larger pages are.
const HUGE_PAGE: usize = 2 << 20;

/// A vector with room for `capacity`, in large pages if the host likes. Advice only: a host
/// without them loses nothing but speed.
pub(crate) fn vec_of<T>(capacity: usize) -> Vec<T> {
    let mut vec = Vec::with_capacity(capacity);
    advise(vec.spare_capacity_mut());
    vec
}

fn advise<T>(memory: &mut [MaybeUninit<T>]) {
    let range = memory.as_mut_ptr_range();
    let start = range.start.addr().next_multiple_of(HUGE_PAGE);
    let end = range.end.addr() & !(HUGE_PAGE - 1);
    if let Some(len) = end.checked_sub(start).filter(|len| *len > 0) {
        let at = range.start.with_addr(start).cast();
        // SAFETY: whole pages of memory that is borrowed exclusively. The advice changes how
        // the host maps them, never what is in them.
        unsafe { libc::madvise(at, len, libc::MADV_HUGEPAGE) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_room_for_what_was_asked_for() {
        for capacity in [0, 5, HUGE_PAGE, 3 * HUGE_PAGE + 1] {
            let mut vec = vec_of::<u8>(capacity);
            assert!(vec.capacity() >= capacity);
            vec.resize(capacity, 7);
            assert!(vec.iter().all(|byte| *byte == 7));
        }
    }
}
