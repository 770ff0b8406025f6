//! Products of small blocks that lie in cache, for attention and retention.
//!
//! Both kernels hold the scores *transposed*, `[keys, queries]` with the queries along the vector lanes: row
//! statistics then need no reduction across lanes, and of all operands only the queries (and the gradient of the
//! output) have to be transposed, once per block of queries. Every product is `C = A B` with `B` contiguous,
//! aligned and zero-padded to whole vectors, and `A` read one element at a time, so `A` may be transposed at no cost.

use std::ops::Range;

#[cfg(target_arch = "x86_64")]
use crate::cpu::matmul::NativePair;
use crate::cpu::matmul::{Mat, Pair, Single, Step, pair_columns, pair_rows};
use crate::cpu::simd::Simd;
#[cfg(target_arch = "x86_64")]
use crate::cpu::simd::{Avx512, Level, has_bf16, level};
use crate::cpu::threads::{parallel_for, with_scratch};
use crate::{Rows, RowsMut, simd_fn};

/// Queries, or keys, of a block.
pub const BLOCK: usize = 64;
/// Blocks on the diagonal are cut into squares of this size, and those above the diagonal are left out.
pub const STRIP: usize = 16;

/// `n` rounded up to whole vectors of any instruction set.
pub fn padded(n: usize) -> usize {
    n.next_multiple_of(16)
}

/// Scratch memory at a cache line's start, handed out in pieces that also start at one.
pub struct Pieces<'a>(&'a mut [f32]);

impl<'a> Pieces<'a> {
    /// The next `len` elements.
    pub fn take(&mut self, len: usize) -> &'a mut [f32] {
        let (piece, rest) = std::mem::take(&mut self.0).split_at_mut(padded(len));
        self.0 = rest;
        &mut piece[..len]
    }
}

/// Lends scratch memory for pieces that amount to `len` elements, every piece counted [`padded`].
pub fn with_pieces<R>(len: usize, body: impl FnOnce(Pieces<'_>) -> R) -> R {
    with_scratch(len + 16, |memory| {
        let start = memory.as_ptr().align_offset(64);
        body(Pieces(&mut memory[start..start + len]))
    })
}

/// The rows and columns of a matrix of row length `stride` in `data`, for reading.
pub fn view(data: &[f32], stride: usize, rows: Range<usize>, cols: Range<usize>) -> Rows<'_> {
    Rows::new(&data[rows.start * stride + cols.start..], rows.len(), cols.len(), stride)
}

/// The rows and columns of a matrix of row length `stride` in `data`, for writing.
pub fn view_mut(data: &mut [f32], stride: usize, rows: Range<usize>, cols: Range<usize>) -> RowsMut<'_> {
    RowsMut::new(&mut data[rows.start * stride + cols.start..], rows.len(), cols.len(), stride)
}

/// The part of a diagonal block that is cut into strips: `start..end` of each.
pub fn strips(len: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len).step_by(STRIP).map(move |from| from..(from + STRIP).min(len))
}

/// How many tasks share the keys of one (sequence, head) in a backward pass: several where pairs are few. It
/// depends on the sizes alone, as results must not depend on the number of threads.
pub fn key_splits(pairs: usize, blocks: usize) -> usize {
    16usize.div_ceil(pairs.max(1)).min(blocks).max(1)
}

/// Which of `splits` tasks owns a block of keys. Earlier blocks meet more queries, so they are dealt out
/// forwards and backwards in turn. The first block of split `s` is block `s`.
pub fn split_of(block: usize, splits: usize) -> usize {
    let turn = block % (2 * splits);
    if turn < splits { turn } else { 2 * splits - 1 - turn }
}

/// `dq = sum over splits of partial[split]`, where a split only holds the query blocks from its first key block on.
/// `partial` is `[splits, pairs, time, dim]`, `dq` `[batch * time, heads * dim]`.
pub fn sum_splits(
    partial: &[f32],
    splits: usize,
    pairs: usize,
    heads: usize,
    time: usize,
    dim: usize,
    dq: &RowsMut<'_>,
) {
    let blocks = time.div_ceil(BLOCK);
    parallel_for(pairs * blocks, |task| {
        let (pair, block) = (task / blocks, task % blocks);
        let (batch, head) = (pair / heads, pair % heads);
        for t in block * BLOCK..((block + 1) * BLOCK).min(time) {
            let row = batch * time + t;
            // SAFETY: the row and head belong to this task alone.
            let mut to = unsafe { dq.shared_block(row..row + 1, head * dim..(head + 1) * dim) };
            let to = to.row(0);
            for split in 0..splits.min(block + 1) {
                let from = &partial[((split * pairs + pair) * time + t) * dim..][..dim];
                if split == 0 {
                    to.copy_from_slice(from);
                } else {
                    to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
                }
            }
        }
    });
}

/// `c = a b` or `c += a b`, with what a step of `k` is.
#[inline(always)]
fn panels<S: Simd, A: Step<S>>(s: S, mut c: RowsMut<'_>, a: Mat<'_>, b: Rows<'_>, accumulate: bool) {
    let (m, n, k) = (c.rows(), c.cols(), a.cols());
    assert!(a.rows() == m && b.rows() == k && b.cols() >= n.next_multiple_of(S::LANES));
    let (a, a_row, a_col) = match a {
        Mat::Normal(a) => (a.as_ptr(), a.stride(), 1),
        Mat::Transposed(a) => (a.as_ptr(), 1, a.stride()),
    };
    // accumulators of a tile: 24 of 32 registers, or 12 of 16
    let widest = if S::LANES == 16 { 4 } else { 2 };
    let vectors = n.div_ceil(S::LANES);
    let panels = vectors.div_ceil(widest);
    let mut done = 0;
    for panel in 0..panels {
        let width = (vectors - done).div_ceil(panels - panel);
        let column = done * S::LANES;
        done += width;
        let last = (n - column - (width - 1) * S::LANES).min(S::LANES);
        // SAFETY: `column` lies within both matrices, whose sizes were checked above.
        unsafe {
            let p = Panel {
                c: c.as_mut_ptr().add(column),
                c_row: c.stride(),
                m,
                last,
                a,
                a_row,
                a_col,
                k,
                b: b.as_ptr().add(column),
                b_row: b.stride(),
                accumulate,
            };
            if S::LANES == 16 {
                match width {
                    4 => p.run::<S, A, 6, 4>(s),
                    3 => p.run::<S, A, 8, 3>(s),
                    2 => p.run::<S, A, 12, 2>(s),
                    _ => p.run::<S, A, 12, 1>(s),
                }
            } else {
                match width {
                    2 => p.run::<S, A, 6, 2>(s),
                    _ => p.run::<S, A, 12, 1>(s),
                }
            }
        }
    }
}

/// [`product_of_pairs`] by the instruction for it.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
fn native_product_of_pairs(s: Avx512, c: RowsMut<'_>, a: Mat<'_>, b: Rows<'_>, accumulate: bool) {
    panels::<Avx512, NativePair>(s, c, a, b, accumulate)
}

/// Whether factors of the products are kept whole, or rounded to `bf16`. The sums are in `f32` in either case.
///
/// Rounded factors lie in pairs, of two steps of `k`: a packed operand then has half the rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Factors {
    /// `f32`
    Single,
    /// `bf16`
    Bf16,
}

impl Factors {
    /// [`Factors::Bf16`] if so.
    pub fn rounded(bf16: bool) -> Self {
        if bf16 { Self::Bf16 } else { Self::Single }
    }

    /// Packs a right operand: rows of `stride` elements, with weights as in [`pack`].
    pub fn pack(self, to: &mut [f32], stride: usize, from: Rows<'_>, weight: &[f32]) {
        pack(to, stride, from, weight);
        self.pair(to, stride, from.rows());
    }

    /// Packs the transpose of `from` as a right operand.
    pub fn pack_transposed(self, to: &mut [f32], stride: usize, from: Rows<'_>, weight: &[f32]) {
        pack_transposed(to, stride, from, weight);
        self.pair(to, stride, from.cols());
    }

    fn pair(self, rows: &mut [f32], stride: usize, count: usize) {
        if self == Self::Bf16 {
            let (to, from) = (rows.as_mut_ptr(), view(rows, stride, 0..count, 0..stride));
            // SAFETY: a row is written after the two that it is made of were read; nobody uses `from` afterwards.
            unsafe { pair_rows(Rows::from_raw(to, count, stride, from.stride()), to, stride) }
        }
    }

    /// Steps `k` of a packed operand, of which the first must be even.
    pub fn steps(self, packed: Rows<'_>, k: Range<usize>) -> Rows<'_> {
        match self {
            Self::Single => packed.slice_rows(k.start, k.end),
            Self::Bf16 => packed.slice_rows(k.start / 2, k.end.div_ceil(2)),
        }
    }

    /// The first `k` steps and `cols` columns of an operand that is packed in rows of `stride`.
    pub fn packed(self, packed: &[f32], stride: usize, k: usize, cols: usize) -> Rows<'_> {
        self.steps(view(packed, stride, 0..k, 0..cols), 0..k)
    }

    /// `c = a b` or `c += a b`; `b` is packed, with whole vectors of columns.
    pub fn product(self, c: RowsMut<'_>, a: Mat<'_>, b: Rows<'_>, accumulate: bool) {
        if self == Self::Single {
            return product(c, a, b, accumulate);
        }
        let (Mat::Normal(from) | Mat::Transposed(from)) = a;
        let (rows, cols) = match a {
            Mat::Normal(a) => (a.rows(), a.cols().div_ceil(2)),
            Mat::Transposed(a) => (a.rows().div_ceil(2), a.cols()),
        };
        let stride = padded(cols);
        with_pieces(rows * stride, |mut pieces| {
            let pairs = pieces.take(rows * stride);
            let to = pairs.as_mut_ptr();
            // SAFETY: there is room for the pairs; what stands behind those of a row is not used.
            let a = unsafe {
                if let Mat::Normal(_) = a {
                    pair_columns(from, to, stride);
                    Mat::Normal(view(pairs, stride, 0..rows, 0..cols))
                } else {
                    pair_rows(from, to, stride);
                    Mat::Transposed(view(pairs, stride, 0..rows, 0..cols))
                }
            };
            #[cfg(target_arch = "x86_64")]
            if let (Level::Avx512(s), true) = (level(), has_bf16()) {
                // SAFETY: the instruction was found.
                return unsafe { native_product_of_pairs(s, c, a, b, accumulate) };
            }
            product_of_pairs(c, a, b, accumulate)
        });
    }
}

/// Weights of 1 for [`pack`] and [`pack_transposed`].
pub const ONES: [f32; BLOCK] = [1.0; BLOCK];

simd_fn! {
    /// `c = a b` or `c += a b`; `b` is [`pack`]ed, with whole vectors of columns.
    pub fn product(s: S, c: RowsMut<'_>, a: Mat<'_>, b: Rows<'_>, accumulate: bool) {
        panels::<S, Single>(s, c, a, b, accumulate)
    }

    /// [`product`] of pairs.
    fn product_of_pairs(s: S, c: RowsMut<'_>, a: Mat<'_>, b: Rows<'_>, accumulate: bool) {
        panels::<S, Pair>(s, c, a, b, accumulate)
    }

    /// Copies `from` to rows of `stride` elements, zero up to `stride`. Row `r` is multiplied by `weight[r]`, and the
    /// weights start again after the last.
    pub fn pack(s: S, to: &mut [f32], stride: usize, from: Rows<'_>, weight: &[f32]) {
        assert!(stride.is_multiple_of(S::LANES) && stride >= from.cols());
        for r in 0..from.rows() {
            let (x, y) = (from.row(r), &mut to[r * stride..][..stride]);
            let w = s.splat(weight[r % weight.len()]);
            let mut c = 0;
            while c + S::LANES <= x.len() {
                s.store(&mut y[c..], s.mul(w, s.load(&x[c..])));
                c += S::LANES;
            }
            if c < x.len() {
                s.store(&mut y[c..], s.mul(w, s.load_partial(&x[c..], x.len() - c)));
                c += S::LANES;
            }
            y[c.min(stride)..].fill(0.0);
        }
    }

    /// Multiplies row `r` by `weight[r]`.
    pub fn scale_rows(s: S, x: RowsMut<'_>, weight: &[f32]) {
        let mut x = x;
        for (r, &weight) in weight.iter().enumerate().take(x.rows()) {
            let (x, w) = (x.row(r), s.splat(weight));
            if weight == 1.0 {
                continue;
            }
            let mut c = 0;
            while c < x.len() {
                let n = (x.len() - c).min(S::LANES);
                let v = s.mul(w, s.load_partial(&x[c..], n));
                s.store_partial(&mut x[c..], n, v);
                c += n;
            }
        }
    }

    /// `sums[r] = sum over c of x[r, c] y[r, c]`
    pub fn row_dots(s: S, x: Rows<'_>, y: Rows<'_>, sums: &mut [f32]) {
        assert!(x.rows() == y.rows() && x.cols() == y.cols());
        for (r, sum) in sums.iter_mut().enumerate().take(x.rows()) {
            let (x, y) = (x.row(r), y.row(r));
            let mut total = s.zero();
            let mut c = 0;
            while c < x.len() {
                let n = (x.len() - c).min(S::LANES);
                total = s.fma(s.load_partial(&x[c..], n), s.load_partial(&y[c..], n), total);
                c += n;
            }
            *sum = s.sum(total);
        }
    }
}

/// Writes the transpose of `from`, with weights as in [`pack`], to rows of `stride` elements, zero up to `stride`.
pub fn pack_transposed(to: &mut [f32], stride: usize, from: Rows<'_>, weight: &[f32]) {
    let (rows, cols) = (from.rows(), from.cols());
    assert!(rows <= stride && to.len() >= cols * stride);
    for first in (0..rows).step_by(4) {
        if first + 4 <= rows {
            let row: [&[f32]; 4] = std::array::from_fn(|r| from.row(first + r));
            let weight: [f32; 4] = std::array::from_fn(|r| weight[(first + r) % weight.len()]);
            for c in (0..cols / 4 * 4).step_by(4) {
                let square: [[f32; 4]; 4] = std::array::from_fn(|r| row[r][c..c + 4].try_into().unwrap());
                for (i, column) in transposed(square).into_iter().enumerate() {
                    let column: [f32; 4] = std::array::from_fn(|r| column[r] * weight[r]);
                    to[(c + i) * stride + first..][..4].copy_from_slice(&column);
                }
            }
            for c in cols / 4 * 4..cols {
                let column: [f32; 4] = std::array::from_fn(|r| row[r][c] * weight[r]);
                to[c * stride + first..][..4].copy_from_slice(&column);
            }
        } else {
            for r in first..rows {
                let weight = weight[r % weight.len()];
                from.row(r).iter().enumerate().for_each(|(c, x)| to[c * stride + r] = x * weight);
            }
        }
    }
    if rows < stride {
        (0..cols).for_each(|c| to[c * stride + rows..(c + 1) * stride].fill(0.0));
    }
}

/// The transpose of a square, by shuffles where the base instruction set has them: a third of the time that moving
/// single elements takes.
#[inline(always)]
fn transposed(x: [[f32; 4]; 4]) -> [[f32; 4]; 4] {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_TRANSPOSE4_PS, _mm_loadu_ps, _mm_storeu_ps};
        let mut y = [[0.0; 4]; 4];
        // SAFETY: SSE is part of x86_64; every row has four elements.
        unsafe {
            let [mut a, mut b, mut c, mut d] = x.each_ref().map(|row| _mm_loadu_ps(row.as_ptr()));
            _MM_TRANSPOSE4_PS(&mut a, &mut b, &mut c, &mut d);
            y.iter_mut().zip([a, b, c, d]).for_each(|(row, v)| _mm_storeu_ps(row.as_mut_ptr(), v));
        }
        y
    }
    #[cfg(not(target_arch = "x86_64"))]
    std::array::from_fn(|i| std::array::from_fn(|j| x[j][i]))
}

/// Some columns of a product: `m` rows, whole vectors except that only `last` lanes of the last one are stored.
#[derive(Clone, Copy)]
struct Panel {
    c: *mut f32,
    c_row: usize,
    m: usize,
    last: usize,
    a: *const f32,
    a_row: usize,
    a_col: usize,
    k: usize,
    b: *const f32,
    b_row: usize,
    accumulate: bool,
}

impl Panel {
    /// # Safety
    /// The pointers must be valid for the sizes.
    #[inline(always)]
    unsafe fn run<S: Simd, A: Step<S>, const MR: usize, const NR: usize>(self, s: S) {
        let mut row = 0;
        while row < self.m {
            let left = self.m - row;
            // SAFETY: the caller's promise; a tile stores no row past `m`.
            unsafe {
                if left > 4 {
                    self.tile::<S, A, MR, NR>(s, row, left.min(MR));
                    row += MR;
                } else {
                    self.tile::<S, A, 4, NR>(s, row, left);
                    row += 4;
                }
            }
        }
    }

    /// Rows `row..row + rows` of the panel, in registers. With fewer rows than `MR` the last is computed again.
    ///
    /// # Safety
    /// As for `run`; `1 <= rows <= MR` rows must exist.
    #[inline(always)]
    unsafe fn tile<S: Simd, A: Step<S>, const MR: usize, const NR: usize>(self, s: S, row: usize, rows: usize) {
        let mut sum = [[s.zero(); NR]; MR];
        let at: [usize; MR] = std::array::from_fn(|r| (row + r.min(rows - 1)) * self.a_row);
        let (mut a, mut b) = (self.a, self.b);
        // SAFETY: all addresses are elements of `a` and `b`.
        unsafe {
            for _ in 0..self.k {
                let vectors: [S::F; NR] = std::array::from_fn(|v| s.load_ptr(b.add(v * S::LANES)));
                for r in 0..MR {
                    let x = s.splat(*a.add(at[r]));
                    for v in 0..NR {
                        sum[r][v] = A::step(s, x, vectors[v], sum[r][v]);
                    }
                }
                a = a.wrapping_add(self.a_col);
                b = b.wrapping_add(self.b_row);
            }
        }
        for (r, sum) in sum.into_iter().enumerate().take(rows) {
            // SAFETY: row `row + r < m` of `c`, whose last vector has `last` elements.
            unsafe {
                let c = self.c.add((row + r) * self.c_row);
                for (v, x) in sum.into_iter().enumerate() {
                    let to = c.add(v * S::LANES);
                    if v + 1 < NR || self.last == S::LANES {
                        s.store_ptr(to, if self.accumulate { s.add(s.load_ptr(to), x) } else { x });
                    } else {
                        let to = std::slice::from_raw_parts_mut(to, self.last);
                        let old = if self.accumulate { s.load_partial(to, self.last) } else { s.zero() };
                        s.store_partial(to, self.last, s.add(old, x));
                    }
                }
            }
        }
    }
}
