//! What the kernels share that walk along rows, lanes along the channels.

use std::ops::Range;

use super::simd::Simd;
use super::threads::parallel_ranges;
use crate::rows::SharedSlice;
use crate::{Rows, RowsMut, simd_fn};

/// `lanes!(S, len, |i, n| body)`: body at every `i` a vector starts at, `n` of whose lanes lie before `len`. The
/// body is there twice, so that in the loop `n` is a constant and loads and stores need no mask.
macro_rules! lanes {
    ($s:ident, $len:expr, |$i:ident, $n:ident| $body:block) => {{
        let (len, mut $i): (usize, usize) = ($len, 0);
        while $i + $s::LANES <= len {
            let $n = $s::LANES;
            $body
            $i += $s::LANES;
        }
        if $i < len {
            let $n = len - $i;
            $body
        }
    }};
}
pub(super) use lanes;

/// `n` lanes from element `i` on, the others 0.
///
/// # Safety
/// `i + n <= from.len()`, `n <= LANES`.
#[inline(always)]
pub unsafe fn ld<S: Simd>(s: S, from: &[f32], i: usize, n: usize) -> S::F {
    // SAFETY: the caller's promise.
    unsafe { ld_ptr(s, from.as_ptr().add(i), n) }
}

/// Writes `n` lanes from element `i` on.
///
/// # Safety
/// `i + n <= to.len()`, `n <= LANES`.
#[inline(always)]
pub unsafe fn st<S: Simd>(s: S, to: &mut [f32], i: usize, n: usize, v: S::F) {
    // SAFETY: the caller's promise.
    unsafe { st_ptr(s, to.as_mut_ptr().add(i), n, v) }
}

/// `n` lanes, the others 0.
///
/// # Safety
/// `n <= LANES` elements must be valid for reads.
#[inline(always)]
pub unsafe fn ld_ptr<S: Simd>(s: S, from: *const f32, n: usize) -> S::F {
    // SAFETY: the caller's promise.
    unsafe { if n == S::LANES { s.load_ptr(from) } else { s.load_partial(std::slice::from_raw_parts(from, n), n) } }
}

/// Writes `n` lanes.
///
/// # Safety
/// `n <= LANES` elements must be valid for writes.
#[inline(always)]
pub unsafe fn st_ptr<S: Simd>(s: S, to: *mut f32, n: usize, v: S::F) {
    // SAFETY: the caller's promise.
    unsafe {
        if n == S::LANES { s.store_ptr(to, v) } else { s.store_partial(std::slice::from_raw_parts_mut(to, n), n, v) }
    }
}

/// A matrix that is read and one of the same shape that is written, which may lie in the same memory: so the rows
/// are pointers, never slices.
#[derive(Clone, Copy)]
pub struct InOut {
    x: *const f32,
    x_stride: usize,
    y: *mut f32,
    y_stride: usize,
    pub rows: usize,
    pub cols: usize,
}

// SAFETY: it stands for a shared and an exclusive borrow of `f32`, handed to tasks that own different rows.
unsafe impl Send for InOut {}
// SAFETY: as above.
unsafe impl Sync for InOut {}

impl InOut {
    /// From x to y.
    pub fn apart(x: Rows<'_>, mut y: RowsMut<'_>) -> Self {
        assert!(x.rows() == y.rows() && x.cols() == y.cols());
        let (rows, cols) = (x.rows(), x.cols());
        Self { x: x.as_ptr(), x_stride: x.stride(), y: y.as_mut_ptr(), y_stride: y.stride(), rows, cols }
    }

    /// Within y.
    pub fn in_place(mut y: RowsMut<'_>) -> Self {
        let (rows, cols, stride) = (y.rows(), y.cols(), y.stride());
        Self { x: y.as_mut_ptr(), x_stride: stride, y: y.as_mut_ptr(), y_stride: stride, rows, cols }
    }

    /// Row r that is read.
    #[inline(always)]
    pub fn x(&self, r: usize) -> *const f32 {
        assert!(r < self.rows);
        self.x.wrapping_add(r * self.x_stride)
    }

    /// Row r that is written.
    #[inline(always)]
    pub fn y(&self, r: usize) -> *mut f32 {
        assert!(r < self.rows);
        self.y.wrapping_add(r * self.y_stride)
    }
}

/// Rows of a parallel task: about 64 KiB, enough to hide what starting a task costs.
pub fn grain(cols: usize) -> usize {
    (16384 / cols.max(1)).max(1)
}

/// From one row of scratch to the next: a cache line more than a row. If the width is a power of two, rows without
/// a gap would all compete for the same few places of the L1 cache.
pub fn pitch(cols: usize) -> usize {
    cols.next_multiple_of(16) + 16
}

/// The fixed blocks of rows whose contributions to a parameter gradient are summed apart.
#[derive(Clone, Copy)]
pub struct Partials {
    rows: usize,
    per_block: usize,
    /// Number of blocks, a function of the number of rows alone.
    pub count: usize,
}

impl Partials {
    /// At most 128 blocks, of at least 8 rows.
    pub fn new(rows: usize) -> Self {
        let per_block = rows.div_ceil(128).max(8);
        Self { rows, per_block, count: rows.div_ceil(per_block) }
    }

    /// The rows of a block.
    pub fn range(&self, block: usize) -> Range<usize> {
        block * self.per_block..((block + 1) * self.per_block).min(self.rows)
    }
}

/// `out[i]` = the sum over blocks, in order, of `partials[block * stride + from + i]`.
pub fn sum_partials(partials: &[f32], blocks: usize, stride: usize, from: usize, out: &mut [f32]) {
    let shared = SharedSlice::new(out);
    parallel_ranges(shared.len(), 256, |range| {
        // SAFETY: the ranges do not overlap.
        let out = unsafe { shared.range(range.clone()) };
        out.fill(0.0);
        for block in 0..blocks {
            let at = block * stride + from;
            add(&partials[at + range.start..at + range.end], out);
        }
    });
}

simd_fn! {
    /// `out += x`
    pub fn add(s: S, x: &[f32], out: &mut [f32]) {
        let len = out.len();
        assert_eq!(x.len(), len);
        lanes!(S, len, |i, n| {
            // SAFETY: both have `len` elements.
            unsafe {
                let sum = s.add(ld(s, out, i, n), ld(s, x, i, n));
                st(s, out, i, n, sum);
            }
        });
    }
}
