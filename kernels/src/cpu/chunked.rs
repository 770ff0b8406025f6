//! What the chunked linear recurrences [`wkv`](super::wkv) and [`gla`](super::gla) have in common.
//!
//! Both keep a matrix state `S` `[Dk, Dv]` per head and add `k_t^T v_t` to it after a decay. Token by token that
//! is three vector operations per state vector and token, with the state loaded and stored each time. In chunks
//! of [`CHUNK`] tokens the same sums are matrix products: `scores v` inside of the chunk, `q S` from the state
//! before it, and `S += k^T v` once per chunk. The two products with the state cost `4 Dk Dv` operations per
//! token whatever the chunk length, the rest grows with it, so the chunk is as short as the vectors allow: 16,
//! one AVX-512 vector of tokens.
//!
//! Backward needs the state before each chunk. Forward keeps one in [`SPAN`] tokens, in the caller's memory
//! (see [`boundary_len`]), and backward computes those between again, a span at a time, into scratch that stays
//! in the second-level cache.
//!
//! All blocks are packed into aligned scratch and padded with zeros to multiples of 16 columns, so the products
//! ([`product`]) need no masks; a head's block is small enough for packing to cost little beside the products.

// tile and token indices address several arrays at once
#![allow(clippy::needless_range_loop)]

use std::ops::Range;

use super::output::Output;
use super::simd::Simd;
use super::threads::with_scratch;
use crate::{Rows, simd_fn};

/// Tokens handled as one block of matrix products.
pub(super) const CHUNK: usize = 16;
/// Tokens from one kept state to the next.
pub(super) const SPAN: usize = 64;
/// Elements of a `[CHUNK, CHUNK]` block.
pub(super) const SQUARE: usize = CHUNK * CHUNK;

/// State elements of a parallel task that takes one step.
pub(super) const STEP_GRAIN: usize = 1 << 15;

/// Columns with padding.
pub(super) fn padded(n: usize) -> usize {
    n.next_multiple_of(16)
}

/// Elements of one padded state.
pub(super) fn state_len(dk: usize, dv: usize) -> usize {
    dk * padded(dv)
}

/// Elements of the states that forward keeps for backward.
pub(super) fn boundary_len(batch: usize, time: usize, heads: usize, dk: usize, dv: usize) -> usize {
    batch * heads * time.div_ceil(SPAN) * state_len(dk, dv)
}

/// [`with_scratch`] on a 64-byte boundary.
pub(super) fn with_aligned<R>(len: usize, body: impl FnOnce(&mut [f32]) -> R) -> R {
    with_scratch(len + 16, |buffer| {
        let from = buffer.as_ptr().align_offset(64).min(16);
        body(&mut buffer[from..from + len])
    })
}

/// Rows and columns of one head of one batch row.
pub(super) fn block<'a>(m: Rows<'a>, rows: &Range<usize>, cols: &Range<usize>) -> Rows<'a> {
    m.slice_rows(rows.start, rows.end).slice_cols(cols.start, cols.end)
}

/// Memory that the next chunk needs, asked for a few cache lines at a time while the products of this one run.
///
/// A head's columns are short pieces of rows, in which the hardware's prefetchers find no pattern; and asking for
/// a whole block at once would fill the queue of outstanding misses and stall as well.
pub(super) struct Ahead {
    /// The first byte, rows, cache lines of a row, and bytes from one row to the next.
    blocks: [(*const u8, usize, usize, usize); 10],
    len: usize,
    row: usize,
    line: usize,
}

impl Ahead {
    /// Nothing.
    pub fn new() -> Self {
        Self { blocks: [(std::ptr::null(), 0, 0, 0); 10], len: 0, row: 0, line: 0 }
    }

    /// Forgets what was not asked for yet, and takes `rows` of every matrix, where they have such.
    pub fn set<const N: usize>(&mut self, matrices: [Rows<'_>; N], rows: Range<usize>) {
        *self = Self::new();
        for m in matrices {
            self.add(m, rows.clone());
        }
    }

    /// Adds `rows` of a matrix, where it has such.
    pub fn add<T>(&mut self, m: Rows<'_, T>, rows: Range<usize>) {
        let (start, end) = (rows.start.min(m.rows()), rows.end.min(m.rows()));
        if start < end && self.len < self.blocks.len() {
            let lines = (m.cols() * size_of::<T>()).div_ceil(64);
            self.blocks[self.len] = (m.row(start).as_ptr().cast(), end - start, lines, m.stride() * size_of::<T>());
            self.len += 1;
        }
    }

    /// [`Ahead::add`] of what will be written.
    pub fn add_output(&mut self, m: &Output<'_>, rows: Range<usize>) {
        match m {
            Output::Single(m) => self.add(m.as_rows(), rows),
            Output::Bf16(m) => self.add(m.as_rows(), rows),
        }
    }

    /// Asks for a few lines.
    #[inline(always)]
    fn some(&mut self) {
        for _ in 0..8 {
            if self.len == 0 {
                return;
            }
            let (from, rows, lines, stride) = self.blocks[self.len - 1];
            prefetch(from.wrapping_add(self.row * stride + self.line * 64));
            self.line += 1;
            if self.line == lines {
                (self.line, self.row) = (0, self.row + 1);
                if self.row == rows {
                    (self.row, self.len) = (0, self.len - 1);
                }
            }
        }
    }
}

/// Asks for a cache line. Any address will do: this is a hint.
#[inline(always)]
fn prefetch(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch does not access memory in the sense of the language; SSE is part of x86_64.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// Splits `n` elements off the front of `buffer`.
pub(super) fn take<'a>(buffer: &mut &'a mut [f32], n: usize) -> &'a mut [f32] {
    let (front, rest) = std::mem::take(buffer).split_at_mut(n);
    *buffer = rest;
    front
}

/// Copies a dense `[rows, cols]` matrix into padded rows.
pub(super) fn load_state(padded_state: &mut [f32], dense: &[f32], cols: usize) {
    for (to, from) in padded_state.chunks_exact_mut(padded(cols)).zip(dense.chunks_exact(cols)) {
        to[..cols].copy_from_slice(from);
        to[cols..].fill(0.0);
    }
}

/// Copies padded rows into a dense matrix.
pub(super) fn store_state(dense: &mut [f32], padded_state: &[f32], cols: usize) {
    for (to, from) in dense.chunks_exact_mut(cols).zip(padded_state.chunks_exact(padded(cols))) {
        to.copy_from_slice(&from[..cols]);
    }
}

/// The left factor of a [`product`]: element `(i, p)` lies at `i * row + p * col`.
#[derive(Clone, Copy)]
pub(super) struct Left<'a> {
    data: &'a [f32],
    row: usize,
    col: usize,
}

impl<'a> Left<'a> {
    /// A matrix with rows `ld` apart.
    pub fn rows(data: &'a [f32], ld: usize) -> Self {
        Self { data, row: ld, col: 1 }
    }
    /// The transpose of a matrix with rows `ld` apart.
    pub fn transposed(data: &'a [f32], ld: usize) -> Self {
        Self { data, row: 1, col: ld }
    }
}

/// What a [`product`] is added to.
#[derive(Clone, Copy)]
pub(super) enum Start<'a> {
    /// Nothing.
    Zero,
    /// The result's old value.
    Accumulate,
    /// The old value with row `i` times element `i`.
    Scale(&'a [f32]),
    /// As `Scale`, but of another matrix with the same layout as the result.
    ScaleOf(&'a [f32], &'a [f32]),
}

/// `MR` rows by `NV` vectors of a product, in registers.
///
/// # Safety
/// `a`, `b`, `c` must be valid for the `MR x k`, `k x NV` and `MR x NV` blocks (and `scale` for `MR` elements).
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn tile<S: Simd, const MR: usize, const NV: usize>(
    s: S,
    k: usize,
    a: *const f32,
    (row, col): (usize, usize),
    b: *const f32,
    ldb: usize,
    c: *mut f32,
    ldc: usize,
    (init, scale): (Option<*const f32>, Option<*const f32>),
) {
    // SAFETY: all addresses lie in the blocks of the caller's promise.
    unsafe {
        let mut acc = [[s.zero(); NV]; MR];
        if let Some(init) = init {
            for i in 0..MR {
                for v in 0..NV {
                    acc[i][v] = s.load_ptr(init.add(i * ldc + v * S::LANES));
                }
            }
            if let Some(scale) = scale {
                for i in 0..MR {
                    let w = s.splat(*scale.add(i));
                    for v in 0..NV {
                        acc[i][v] = s.mul(acc[i][v], w);
                    }
                }
            }
        }
        for p in 0..k {
            let mut right = [s.zero(); NV];
            for v in 0..NV {
                right[v] = s.load_ptr(b.add(p * ldb + v * S::LANES));
            }
            for i in 0..MR {
                let left = s.splat(*a.add(i * row + p * col));
                for v in 0..NV {
                    acc[i][v] = s.fma(left, right[v], acc[i][v]);
                }
            }
        }
        for i in 0..MR {
            for v in 0..NV {
                s.store_ptr(c.add(i * ldc + v * S::LANES), acc[i][v]);
            }
        }
    }
}

/// All rows of `NV` vectors of columns.
///
/// # Safety
/// As [`tile`], for `m` rows.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn panel<S: Simd, const NV: usize>(
    s: S,
    m: usize,
    k: usize,
    a: *const f32,
    step: (usize, usize),
    b: *const f32,
    ldb: usize,
    c: *mut f32,
    ldc: usize,
    (init, scale): (Option<*const f32>, Option<*const f32>),
    ahead: &mut Ahead,
) {
    let mut i = 0;
    macro_rules! rows {
        ($mr:literal) => {
            while m - i >= $mr {
                ahead.some();
                // SAFETY: rows i..i + MR are inside.
                unsafe {
                    let start = (init.map(|x| x.add(i * ldc)), scale.map(|w| w.add(i)));
                    tile::<S, $mr, NV>(s, k, a.add(i * step.0), step, b, ldb, c.add(i * ldc), ldc, start);
                }
                i += $mr;
            }
        };
    }
    // 16 registers of sums with AVX-512, 8 with AVX2, which has half as many registers
    if S::LANES == 16 {
        rows!(8);
    }
    rows!(4);
    rows!(1);
}

simd_fn! {
    /// `c = start + a b` for `a` `[m, k]`, `b` `[k, n]`, `c` `[m, n]`; `n` a multiple of 16.
    pub(super) fn product(
        s: S, c: &mut [f32], ldc: usize, size: [usize; 3], a: Left<'_>, b: &[f32], ldb: usize, start: Start<'_>, ahead: &mut Ahead,
    ) {
        let [m, n, k] = size;
        if m == 0 || n == 0 {
            return;
        }
        assert!(n.is_multiple_of(16) && ldc >= n && c.len() >= (m - 1) * ldc + n);
        assert!(k == 0 || (b.len() >= (k - 1) * ldb + n && a.data.len() > (m - 1) * a.row + (k - 1) * a.col));
        let c_ptr = c.as_mut_ptr();
        let (init, scale) = match start {
            Start::Zero => (None, None),
            Start::Accumulate => (Some(c_ptr.cast_const()), None),
            Start::Scale(w) => (Some(c_ptr.cast_const()), Some(w)),
            Start::ScaleOf(x, w) => {
                assert!(x.len() >= (m - 1) * ldc + n);
                (Some(x.as_ptr()), Some(w))
            }
        };
        assert!(scale.is_none_or(|w| w.len() >= m));
        let scale = scale.map(|w| w.as_ptr());
        let (a_ptr, b_ptr) = (a.data.as_ptr(), b.as_ptr());
        let step = (a.row, a.col);
        let mut j = 0;
        // SAFETY: the lengths were checked above, and columns j.. are inside.
        unsafe {
            while j + 2 * S::LANES <= n {
                let start = (init.map(|x| x.add(j)), scale);
                panel::<S, 2>(s, m, k, a_ptr, step, b_ptr.add(j), ldb, c_ptr.add(j), ldc, start, ahead);
                j += 2 * S::LANES;
            }
            while j < n {
                let start = (init.map(|x| x.add(j)), scale);
                panel::<S, 1>(s, m, k, a_ptr, step, b_ptr.add(j), ldb, c_ptr.add(j), ldc, start, ahead);
                j += S::LANES;
            }
        }
    }

    /// Rows of a head's block (`scale` times) into `[CHUNK, padded]` scratch, zeros in the padding.
    pub(super) fn pack(s: S, to: &mut [f32], from: Rows<'_>, scale: f32) {
        let (n, width) = (from.cols(), padded(from.cols()));
        let w = s.splat(scale);
        for r in 0..from.rows() {
            let row = from.row(r);
            let to = &mut to[r * width..(r + 1) * width];
            let mut i = 0;
            while i < n {
                let lanes = (n - i).min(S::LANES);
                let x = if lanes == S::LANES { s.load(&row[i..]) } else { s.load_partial(&row[i..], lanes) };
                s.store(&mut to[i..], s.mul(x, w));
                i += S::LANES;
            }
            while i < width {
                s.store(&mut to[i..], s.zero());
                i += S::LANES;
            }
        }
        to[from.rows() * width..CHUNK * width].fill(0.0);
    }

    /// Packed rows, `scale` times, to where they belong.
    pub(super) fn unpack(s: S, to: Output<'_>, from: &[f32], scale: f32) {
        let (rows, n) = (to.rows(), to.cols());
        let (width, w) = (padded(n), s.splat(scale));
        match to {
            Output::Single(mut to) => {
                for r in 0..rows {
                    let (from, row) = (&from[r * width..(r + 1) * width], to.row(r));
                    let mut i = 0;
                    while i < n {
                        let lanes = (n - i).min(S::LANES);
                        let x = s.mul(s.load(&from[i..]), w);
                        if lanes == S::LANES {
                            s.store(&mut row[i..], x)
                        } else {
                            s.store_partial(&mut row[i..], lanes, x)
                        }
                        i += S::LANES;
                    }
                }
            }
            Output::Bf16(mut to) => {
                for r in 0..rows {
                    let (from, row) = (&from[r * width..(r + 1) * width], to.row(r));
                    for i in (0..n).step_by(S::LANES) {
                        s.store_bf16(&mut row[i..], (n - i).min(S::LANES), s.mul(s.load(&from[i..]), w));
                    }
                }
            }
        }
    }

    /// `to` `[n, m]` = transpose of `from` `[m, n]`; both dense, `m` and `n` multiples of 4.
    pub(super) fn transpose(_s: S, to: &mut [f32], from: &[f32], m: usize, n: usize) {
        assert!(m.is_multiple_of(4) && n.is_multiple_of(4) && to.len() >= m * n && from.len() >= m * n);
        for i in (0..m).step_by(4) {
            for j in (0..n).step_by(4) {
                // SAFETY: the 4 x 4 blocks at (i, j) and (j, i) are inside.
                unsafe { transpose_4x4(from.as_ptr().add(i * n + j), n, to.as_mut_ptr().add(j * m + i), m) }
            }
        }
    }

    /// Row `r` of `x` times `weight[r]`, for rows of `width` (a multiple of 16).
    pub(super) fn scale_rows_in_place(s: S, x: &mut [f32], weight: &[f32], width: usize) {
        for (r, &w) in weight.iter().enumerate() {
            let row = &mut x[r * width..(r + 1) * width];
            let w = s.splat(w);
            let mut i = 0;
            while i < width {
                let scaled = s.mul(s.load(&row[i..]), w);
                s.store(&mut row[i..], scaled);
                i += S::LANES;
            }
        }
    }

    /// One token for one head: `S' = diag(decay) S + k^T v`, and `y = scale q S'`, or with a bonus `u`
    /// `y = scale q (S + u k^T v)`. The state is dense.
    pub(super) fn step(
        s: S, y: &mut [f32], state: &mut [f32], q: &[f32], k: &[f32], v: &[f32], decay: &[f32], scale: f32,
        bonus: Option<f32>,
    ) {
        let (dk, dv) = (k.len(), v.len());
        assert!(state.len() == dk * dv && q.len() == dk && decay.len() == dk && y.len() == dv);
        let own = bonus.map(|u| u * q.iter().zip(k).fold(0.0, |sum, (a, b)| sum + a * b));
        let mut j = 0;
        while j < dv {
            if j + 4 * S::LANES <= dv {
                step_columns::<S, 4>(s, y, state, q, k, v, decay, scale, own, j, S::LANES);
                j += 4 * S::LANES;
            } else {
                step_columns::<S, 1>(s, y, state, q, k, v, decay, scale, own, j, (dv - j).min(S::LANES));
                j += S::LANES;
            }
        }
    }
}

/// `NV` vectors of columns of a [`step`], each of `lanes`; `own` is the bonus times `q k`.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn step_columns<S: Simd, const NV: usize>(
    s: S,
    y: &mut [f32],
    state: &mut [f32],
    q: &[f32],
    k: &[f32],
    v: &[f32],
    decay: &[f32],
    scale: f32,
    own: Option<f32>,
    j: usize,
    lanes: usize,
) {
    let dv = v.len();
    let (mut sum, mut value) = ([s.zero(); NV], [s.zero(); NV]);
    for n in 0..NV {
        value[n] = s.load_partial(&v[j + n * S::LANES..], lanes);
    }
    for d in 0..k.len() {
        let (qd, kd, wd) = (s.splat(q[d]), s.splat(k[d]), s.splat(decay[d]));
        for n in 0..NV {
            let cell = &mut state[d * dv + j + n * S::LANES..];
            let old = s.load_partial(cell, lanes);
            let new = s.fma(wd, old, s.mul(kd, value[n]));
            s.store_partial(cell, lanes, new);
            sum[n] = s.fma(qd, if own.is_some() { old } else { new }, sum[n]);
        }
    }
    for n in 0..NV {
        let total = s.fma(s.splat(own.unwrap_or(0.0)), value[n], sum[n]);
        s.store_partial(&mut y[j + n * S::LANES..], lanes, s.mul(total, s.splat(scale)));
    }
}

/// # Safety
/// Four rows of four at `from` and `to`, `m` and `n` apart, must be valid.
#[inline(always)]
unsafe fn transpose_4x4(from: *const f32, n: usize, to: *mut f32, m: usize) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the caller's promise; SSE is part of x86_64.
    unsafe {
        use std::arch::x86_64::*;
        let (a, b) = (_mm_loadu_ps(from), _mm_loadu_ps(from.add(n)));
        let (c, d) = (_mm_loadu_ps(from.add(2 * n)), _mm_loadu_ps(from.add(3 * n)));
        let (ab, cd) = (_mm_unpacklo_ps(a, b), _mm_unpacklo_ps(c, d));
        _mm_storeu_ps(to, _mm_movelh_ps(ab, cd));
        _mm_storeu_ps(to.add(m), _mm_movehl_ps(cd, ab));
        let (ab, cd) = (_mm_unpackhi_ps(a, b), _mm_unpackhi_ps(c, d));
        _mm_storeu_ps(to.add(2 * m), _mm_movelh_ps(ab, cd));
        _mm_storeu_ps(to.add(3 * m), _mm_movehl_ps(cd, ab));
    }
    #[cfg(not(target_arch = "x86_64"))]
    for i in 0..4 {
        for j in 0..4 {
            // SAFETY: the caller's promise.
            unsafe { *to.add(j * m + i) = *from.add(i * n + j) };
        }
    }
}

/// `c = a b` for a lower triangular `a` `[CHUNK, CHUNK]` and `b` `[CHUNK, n]`.
pub(super) fn lower_product(c: &mut [f32], a: &[f32], b: &[f32], n: usize, start: Start<'_>, ahead: &mut Ahead) {
    let half = CHUNK / 2;
    product(c, n, [half, n, half], Left::rows(a, CHUNK), b, n, start, ahead);
    product(&mut c[half * n..], n, [half, n, CHUNK], Left::rows(&a[half * CHUNK..], CHUNK), b, n, start, ahead);
}

/// `c = a^T b` for a lower triangular `a` `[CHUNK, CHUNK]` and `b` `[CHUNK, n]`.
pub(super) fn lower_transposed_product(
    c: &mut [f32],
    a: &[f32],
    b: &[f32],
    n: usize,
    start: Start<'_>,
    ahead: &mut Ahead,
) {
    let half = CHUNK / 2;
    let corner = Left::transposed(&a[half * CHUNK + half..], CHUNK);
    product(c, n, [half, n, CHUNK], Left::transposed(a, CHUNK), b, n, start, ahead);
    product(&mut c[half * n..], n, [half, n, half], corner, &b[half * n..], n, start, ahead);
}
