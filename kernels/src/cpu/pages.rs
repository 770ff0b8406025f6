//! Zeroed memory on big pages, where the system gives them: a matrix of a few megabytes then takes a few entries of the
//! processor's table of pages instead of thousands, and walking down a column does not wait for that table.

use std::alloc::{Layout, alloc_zeroed, dealloc};

use memmap2::MmapMut;

/// Memory is aligned to cache lines and to the widest vectors.
const ALIGNMENT: usize = 64;
/// A big page of x86-64 and of most systems on ARM.
const PAGE: usize = 2 << 20;

/// Bytes that live as long as this value.
pub(super) struct Pages {
    ptr: *mut u8,
    len: usize,
    /// Where they come from; `None` is the heap.
    map: Option<MmapMut>,
}

// SAFETY: a plain owner of memory; what reads and writes it sees to exclusiveness.
unsafe impl Send for Pages {}
// SAFETY: as above.
unsafe impl Sync for Pages {}

impl Pages {
    /// So many bytes, all 0; `None` if there is no memory left.
    pub(super) fn zeroed(len: usize) -> Option<Self> {
        if len >= PAGE {
            // the system starts big pages at their multiples alone
            let mut map = MmapMut::map_anon(len.checked_add(PAGE)?).ok()?;
            #[cfg(target_os = "linux")]
            // a wish: without it, or where the system knows no big pages, memory is as good but slower
            let _ = map.advise(memmap2::Advice::HugePage);
            let start = map.as_mut_ptr();
            let ptr = start.wrapping_add(start.align_offset(PAGE));
            return Some(Self { ptr, len, map: Some(map) });
        }
        // SAFETY: the size is not zero.
        let ptr = unsafe { alloc_zeroed(Self::layout(len)?) };
        (!ptr.is_null()).then_some(Self { ptr, len, map: None })
    }

    fn layout(len: usize) -> Option<Layout> {
        Layout::from_size_align(len.max(ALIGNMENT), ALIGNMENT).ok()
    }

    /// The first byte, at a multiple of 64.
    pub(super) fn as_ptr(&self) -> *mut u8 {
        self.ptr
    }

    /// Number of bytes.
    pub(super) fn len(&self) -> usize {
        self.len
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        if self.map.is_none()
            && let Some(layout) = Self::layout(self.len)
        {
            // SAFETY: allocated with this very layout.
            unsafe { dealloc(self.ptr, layout) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_of_any_size_is_zero_aligned_and_writable() {
        for len in [0, 1, 100, PAGE - 1, PAGE, 3 * PAGE + 5] {
            let pages = Pages::zeroed(len).unwrap();
            assert_eq!((pages.len(), pages.as_ptr() as usize % ALIGNMENT), (len, 0));
            // SAFETY: so many bytes, used here alone.
            let bytes = unsafe { std::slice::from_raw_parts_mut(pages.as_ptr(), len) };
            assert!(bytes.iter().all(|b| *b == 0));
            bytes.fill(7);
        }
        assert!(Pages::zeroed(usize::MAX).is_none() && Pages::zeroed(isize::MAX as usize).is_none());
    }
}
