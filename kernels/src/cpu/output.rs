//! Results in `f32`, or rounded to `bf16` for matrix products that would round them anyway.

use std::ops::Range;

use super::simd::Simd;
use crate::RowsMut;
use crate::device::Bf16;

/// A result `[rows, cols]`.
pub enum Output<'a> {
    /// In `f32`.
    Single(RowsMut<'a>),
    /// Rounded to `bf16`, halves to even.
    Bf16(RowsMut<'a, Bf16>),
}

impl<'a> From<RowsMut<'a>> for Output<'a> {
    fn from(rows: RowsMut<'a>) -> Self {
        Self::Single(rows)
    }
}

impl<'a> From<RowsMut<'a, Bf16>> for Output<'a> {
    fn from(rows: RowsMut<'a, Bf16>) -> Self {
        Self::Bf16(rows)
    }
}

/// Nothing, for a place in an array that is not used.
impl Default for Output<'_> {
    fn default() -> Self {
        Self::Single(RowsMut::contiguous(&mut [], 1))
    }
}

impl Output<'_> {
    /// Number of rows.
    pub fn rows(&self) -> usize {
        match self {
            Self::Single(y) => y.rows(),
            Self::Bf16(y) => y.rows(),
        }
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        match self {
            Self::Single(y) => y.cols(),
            Self::Bf16(y) => y.cols(),
        }
    }

    /// The matrix, if it is in `f32`.
    pub fn single(&mut self) -> Option<RowsMut<'_>> {
        match self {
            Self::Single(y) => Some(y.reborrow()),
            Self::Bf16(_) => None,
        }
    }

    /// Some rows and columns.
    ///
    /// # Safety
    /// As for [`RowsMut::shared_block`].
    pub(super) unsafe fn shared_block(&self, rows: Range<usize>, cols: Range<usize>) -> Output<'_> {
        // SAFETY: the caller's promise.
        unsafe {
            match self {
                Self::Single(y) => Output::Single(y.shared_block(rows, cols)),
                Self::Bf16(y) => Output::Bf16(y.shared_block(rows, cols)),
            }
        }
    }

    /// Where row `r` is to be written: the row, or `line` if it will be rounded by [`finish`](Self::finish).
    ///
    /// # Safety
    /// As for [`RowsMut::shared_row`].
    #[inline(always)]
    pub(super) unsafe fn begin<'l>(&'l self, r: usize, line: &'l mut [f32]) -> &'l mut [f32] {
        match self {
            // SAFETY: the caller's promise.
            Self::Single(y) => unsafe { y.shared_row(r) },
            Self::Bf16(_) => line,
        }
    }

    /// Row `r` is complete.
    ///
    /// # Safety
    /// As for [`begin`](Self::begin).
    #[inline(always)]
    pub(super) unsafe fn finish<S: Simd>(&self, s: S, r: usize, line: &[f32]) {
        if let Self::Bf16(y) = self {
            // SAFETY: the caller's promise.
            round_slice(s, line, unsafe { y.shared_row(r) });
        }
    }

    /// Elements of the line that rows are rounded from.
    pub(super) fn line(&self) -> usize {
        match self {
            Self::Single(_) => 0,
            Self::Bf16(y) => y.cols(),
        }
    }
}

/// `to = from`, rounded.
#[inline(always)]
pub(super) fn round_slice<S: Simd>(s: S, from: &[f32], to: &mut [Bf16]) {
    let len = to.len();
    let from = &from[..len];
    let mut i = 0;
    while i + S::LANES <= len {
        s.store_bf16(&mut to[i..], S::LANES, s.load(&from[i..]));
        i += S::LANES;
    }
    if i < len {
        s.store_bf16(&mut to[i..], len - i, s.load_partial(&from[i..], len - i));
    }
}
