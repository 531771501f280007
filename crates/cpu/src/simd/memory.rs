//! Memory of large weights.
//!
//! Owns: asking the system for huge pages under a buffer that is read from end to end at every step (with 4 KiB pages
//! a good part of a small model's step is page walks). Never: the contents.

/// Buffers below this stay on ordinary pages.
#[cfg(target_os = "linux")]
const LARGE: usize = 4 << 20;
/// Size and alignment of a huge page.
#[cfg(target_os = "linux")]
const HUGE_PAGE: usize = 2 << 20;

/// An empty vector with room for `count` elements, on huge pages where it is large and the system has them.
pub(crate) fn large_vec<T>(count: usize) -> Vec<T> {
    let vec = Vec::with_capacity(count);
    #[cfg(target_os = "linux")]
    advise(&vec);
    vec
}

/// Asks for huge pages under the spare room of `vec`. A refusal changes nothing but speed.
#[cfg(target_os = "linux")]
fn advise<T>(vec: &Vec<T>) {
    let bytes = vec.capacity() * size_of::<T>();
    if bytes < LARGE {
        return;
    }
    let start = vec.as_ptr().cast::<u8>();
    let skip = start.align_offset(HUGE_PAGE);
    let whole = bytes.saturating_sub(skip) / HUGE_PAGE * HUGE_PAGE;
    if whole > 0 {
        // SAFETY: the range lies inside the allocation of `vec`; the advice changes the page size, not the contents.
        unsafe {
            libc::madvise(start.wrapping_add(skip).cast_mut().cast(), whole, libc::MADV_HUGEPAGE);
        }
    }
}
