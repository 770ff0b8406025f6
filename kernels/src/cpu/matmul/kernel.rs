//! The register tiles: the innermost loops of every product.
//!
//! [`tile`] keeps `R × V` vectors of the result in registers. A step of `k` loads `V` vectors of a row of b and
//! multiplies them with `R` broadcast elements of a column of a: with 12 × 2 vectors of AVX-512 that is 24 FMA
//! for 14 loads, and any tile of at least four rows still has more FMA than loads, so edges cost what they are
//! worth. Every number of rows up to the full tile is compiled on its own.
//!
//! [`dot`] is for a few rows against rows that lie along `k` (matrix-vector products, decoding): nothing is
//! packed, so every element of the large operand is read once, in order.

// an index that is plainly a constant keeps an accumulator in its register; iterators do not promise that
#![allow(clippy::needless_range_loop)]

use crate::cpu::simd::{Portable, Simd};
use crate::device::Bf16;

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{__m512 as F512, __m512bh, _mm512_dpbf16_ps};

#[cfg(target_arch = "x86_64")]
use super::pairs::{masked_pair_halves, native_pair_cols, native_pair_rows};
use super::pairs::{pair_cols, pair_halves, pair_rows};
#[cfg(target_arch = "x86_64")]
use crate::cpu::simd::{Avx2, Avx512};

/// What a tile of the result is added to.
#[derive(Clone, Copy)]
pub(super) enum Start {
    Zero,
    Accumulate,
    /// The bias at the tile's first column.
    Bias(*const f32),
}

impl Start {
    /// The start of a tile some columns further.
    pub fn skip(self, columns: usize) -> Self {
        match self {
            Start::Bias(p) => Start::Bias(p.wrapping_add(columns)),
            other => other,
        }
    }
}

/// One tile of the result, `[rows, cols]` with `cols` at most the vectors of the tile.
///
/// Element `(r, k)` of a lies at `a + r + k * a_step`, or at `a + r * a_step + k` where `a` is read along `k`;
/// row `k` of b, a full tile wide, at `b + k * b_step`; row `r` of the result at `c + r * c_step`.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    pub a: *const f32,
    pub a_step: usize,
    pub b: *const f32,
    pub b_step: usize,
    pub k: usize,
    pub c: *mut f32,
    pub c_step: usize,
    pub cols: usize,
    pub start: Start,
}

/// Dot products of rows along `k`: `c(x, y) = start + sum_k x(k) y(k)` for a few rows x and [`DOT_Y`] or
/// fewer rows y.
#[derive(Clone, Copy)]
pub(super) struct Dot {
    pub x: *const f32,
    pub x_step: usize,
    pub y: *const f32,
    pub y_step: usize,
    pub k: usize,
    /// Element `(x, y)` lies at `c + x * c_steps.0 + y * c_steps.1`.
    pub c: *mut f32,
    pub c_steps: (usize, usize),
    pub start: Start,
    /// As `c_steps`, of the bias.
    pub bias_steps: (usize, usize),
}

/// Most rows x of a [`Dot`].
pub(super) const DOT_X: usize = 4;
/// Most rows y of a [`Dot`].
pub(super) const DOT_Y: usize = 4;
/// Vectors of the tile of one row.
pub(super) const WIDE: usize = 8;

/// The micro-kernels of an instruction set. Each is compiled with its instructions, so the loops around them
/// need not be.
pub(super) trait Kernel: Simd {
    /// Rows of a full tile.
    const MR: usize;
    /// Vectors of a full tile.
    const NV: usize;
    /// Columns of a full tile.
    const NR: usize = Self::NV * Self::LANES;

    /// Computes a tile of `rows <= MR`; `along_k` says how a lies.
    ///
    /// # Safety
    /// The operands and the result must be valid for the tile.
    unsafe fn tile(self, rows: usize, along_k: bool, t: &Tile);

    /// Computes a tile of one row and up to [`WIDE`] vectors, all of whose columns exist in b.
    ///
    /// # Safety
    /// As [`Kernel::tile`].
    unsafe fn wide_tile(self, t: &Tile);

    /// Computes `xs <= DOT_X` by `ys <= DOT_Y` dot products.
    ///
    /// # Safety
    /// The rows and the result must be valid.
    unsafe fn dot(self, xs: usize, ys: usize, d: &Dot);

    /// Writes the transpose of `from[rows, cols]`: column `j` goes to `to + j * to_step`, where a whole vector
    /// is written, zero past `rows`.
    ///
    /// # Safety
    /// `from` must be valid for reads and `to` for vectors at every column.
    unsafe fn transpose(
        self,
        from: *const f32,
        from_step: usize,
        rows: usize,
        cols: usize,
        to: *mut f32,
        to_step: usize,
    );

    /// Adds `rows` rows of `cols <= LANES` elements, which are `LANES` apart, to `start` and stores them.
    ///
    /// # Safety
    /// `from` must be valid for whole vectors and `to` for the elements.
    unsafe fn add_rows(self, from: *const f32, rows: usize, cols: usize, to: *mut f32, to_step: usize, start: Start);

    /// As [`Kernel::tile`], where an element of a and b is a pair of `bf16`, of two steps of `k`, of which the first has the
    /// lower half; a is packed across `k`. Products are summed in `f32`.
    ///
    /// # Safety
    /// As [`Kernel::tile`].
    unsafe fn pair_tile(self, rows: usize, t: &Tile);

    /// As [`Kernel::copy`], where rows `2 r` and `2 r + 1` become row `r` of pairs; zero is the partner of a last row.
    ///
    /// # Safety
    /// As [`Kernel::transpose`].
    #[allow(clippy::too_many_arguments)]
    unsafe fn pair_rows(
        self,
        from: *const f32,
        from_step: usize,
        rows: usize,
        cols: usize,
        to: *mut f32,
        to_step: usize,
        width: usize,
    );

    /// [`Kernel::pair_rows`] of numbers that are `bf16`.
    ///
    /// # Safety
    /// As [`Kernel::transpose`].
    #[allow(clippy::too_many_arguments)]
    unsafe fn pair_halves(
        self,
        from: *const Bf16,
        from_step: usize,
        rows: usize,
        cols: usize,
        to: *mut f32,
        to_step: usize,
        width: usize,
    );

    /// Writes the pairs of neighbours of each row; zero is the partner of a last element.
    ///
    /// # Safety
    /// The elements must be valid.
    unsafe fn pair_cols(
        self,
        from: *const f32,
        from_step: usize,
        rows: usize,
        cols: usize,
        to: *mut f32,
        to_step: usize,
    );

    /// Copies `rows` rows of `cols <= NR` elements as rows of `width` (whole vectors), zero past `cols`.
    ///
    /// # Safety
    /// As [`Kernel::transpose`].
    #[allow(clippy::too_many_arguments)]
    unsafe fn copy(
        self,
        from: *const f32,
        from_step: usize,
        rows: usize,
        cols: usize,
        to: *mut f32,
        to_step: usize,
        width: usize,
    );
}

#[inline(always)]
pub(super) unsafe fn partial<S: Simd>(s: S, p: *const f32, n: usize) -> S::F {
    // SAFETY: the caller's promise: n elements are readable.
    s.load_partial(unsafe { std::slice::from_raw_parts(p, n) }, n)
}

/// `V` vectors, the last one of `last` elements.
#[inline(always)]
unsafe fn load<S: Simd, const V: usize>(s: S, p: *const f32, last: usize) -> [S::F; V] {
    let mut row = [s.zero(); V];
    // SAFETY: the caller's promise: the elements are readable.
    unsafe {
        for v in 0..V - 1 {
            row[v] = s.load_ptr(p.add(v * S::LANES));
        }
        let end = p.add((V - 1) * S::LANES);
        row[V - 1] = if last == S::LANES { s.load_ptr(end) } else { partial(s, end, last) };
    }
    row
}

/// The body for every row below `$n`, each written out: the accumulators stay in registers only if every index
/// into them is a constant.
macro_rules! for_rows {
    ($r:ident < $n:ident $body:block) => {
        for_rows!(@each $r $n $body 0 1 2 3 4 5 6 7 8 9 10 11)
    };
    (@each $r:ident $n:ident $body:block $($i:literal)*) => {
        {$(
            let $r: usize = $i;
            if $r < $n $body
        )*}
    };
}

/// What a step of `k` does to a vector of the result.
pub(in crate::cpu) trait Step<S: Simd> {
    /// `acc + x y`
    fn step(s: S, x: S::F, y: S::F, acc: S::F) -> S::F;
}

/// An `f32` of each factor.
pub(in crate::cpu) struct Single;

impl<S: Simd> Step<S> for Single {
    #[inline(always)]
    fn step(s: S, x: S::F, y: S::F, acc: S::F) -> S::F {
        s.fma(x, y, acc)
    }
}

/// A pair of `bf16` of each factor, on any machine: a `bf16` is the upper half of an `f32`.
pub(in crate::cpu) struct Pair;

impl<S: Simd> Step<S> for Pair {
    #[inline(always)]
    fn step(s: S, x: S::F, y: S::F, acc: S::F) -> S::F {
        let low = |v: S::F| s.from_bits(s.shl::<16>(s.bits(v)));
        let high = |v: S::F| s.from_bits(s.and_i(s.bits(v), s.splat_i(HIGH)));
        s.fma(low(x), low(y), s.fma(high(x), high(y), acc))
    }
}

/// The same by the instruction for it (AVX512-BF16), which sums the two products with roundings of its own.
#[cfg(target_arch = "x86_64")]
pub(in crate::cpu) struct NativePair;

#[cfg(target_arch = "x86_64")]
impl Step<Avx512> for NativePair {
    #[inline(always)]
    fn step(_: Avx512, x: F512, y: F512, acc: F512) -> F512 {
        // SAFETY: only functions that are compiled for AVX512-BF16 use this, and they run where it is there; the
        // types are both 64 bytes of plain numbers.
        unsafe {
            let pairs = |v: F512| std::mem::transmute::<F512, __m512bh>(v);
            _mm512_dpbf16_ps(acc, pairs(x), pairs(y))
        }
    }
}

/// The bits of a pair's second number.
pub(super) const HIGH: i32 = 0xffff_0000_u32 as i32;

/// See the [module](self).
#[inline(always)]
unsafe fn tile<S: Simd, A: Step<S>, const R: usize, const V: usize, const ALONG_K: bool>(s: S, t: &Tile) {
    // SAFETY: the caller promises that the operands and the result are valid for this tile.
    unsafe {
        let mut acc = [[s.zero(); V]; R];
        let last = t.cols - (V - 1) * S::LANES;
        match t.start {
            Start::Zero => {}
            Start::Accumulate => for_rows!(r < R {
                acc[r] = load::<S, V>(s, t.c.add(r * t.c_step), last);
            }),
            Start::Bias(p) => {
                let bias = load::<S, V>(s, p, last);
                for_rows!(r < R {
                    acc[r] = bias;
                });
            }
        }
        let (mut a, mut b) = (t.a, t.b);
        let mut k = t.k;
        while k > 0 {
            let row = load::<S, V>(s, b, S::LANES);
            for_rows!(r < R {
                let x = s.splat(*a.add(if ALONG_K { r * t.a_step } else { r }));
                for v in 0..V {
                    acc[r][v] = A::step(s, x, row[v], acc[r][v]);
                }
            });
            a = a.wrapping_add(if ALONG_K { 1 } else { t.a_step });
            b = b.wrapping_add(t.b_step);
            k -= 1;
        }
        if last == S::LANES {
            for_rows!(r < R {
                for v in 0..V {
                    s.store_ptr(t.c.add(r * t.c_step + v * S::LANES), acc[r][v]);
                }
            });
        } else {
            for_rows!(r < R {
                for v in 0..V - 1 {
                    s.store_ptr(t.c.add(r * t.c_step + v * S::LANES), acc[r][v]);
                }
                let end = std::slice::from_raw_parts_mut(t.c.add(r * t.c_step + (V - 1) * S::LANES), last);
                s.store_partial(end, last, acc[r][V - 1]);
            });
        }
    }
}

/// The lanes of a dot product of `k` elements, in four chains of FMA.
#[inline(always)]
unsafe fn long_dot<S: Simd>(s: S, x: *const f32, y: *const f32, k: usize) -> S::F {
    // SAFETY: the caller's promise.
    unsafe {
        let mut acc = [s.zero(); 4];
        let mut at = 0;
        while at + 4 * S::LANES <= k {
            for (i, acc) in acc.iter_mut().enumerate() {
                let at = at + i * S::LANES;
                *acc = s.fma(s.load_ptr(x.add(at)), s.load_ptr(y.add(at)), *acc);
            }
            at += 4 * S::LANES;
        }
        while at < k {
            let n = (k - at).min(S::LANES);
            let ([x], [y]) = (load::<S, 1>(s, x.add(at), n), load::<S, 1>(s, y.add(at), n));
            acc[0] = s.fma(x, y, acc[0]);
            at += n;
        }
        s.add(s.add(acc[0], acc[1]), s.add(acc[2], acc[3]))
    }
}

/// See [`Dot`].
#[inline(always)]
unsafe fn dot<S: Simd, const X: usize, const Y: usize>(s: S, d: &Dot) {
    // SAFETY: the caller promises that rows and result are valid.
    unsafe {
        let mut acc = [[s.zero(); Y]; X];
        if X == 1 && d.k >= 16 * S::LANES {
            // one row after the other, in the order of memory: that is how it comes fastest
            for j in 0..Y {
                acc[0][j] = long_dot(s, d.x, d.y.add(j * d.y_step), d.k);
            }
        } else {
            let mut k = 0;
            while k < d.k {
                let n = (d.k - k).min(S::LANES);
                let mut x = [s.zero(); X];
                for i in 0..X {
                    [x[i]] = load::<S, 1>(s, d.x.add(i * d.x_step + k), n);
                }
                for j in 0..Y {
                    let [y] = load::<S, 1>(s, d.y.add(j * d.y_step + k), n);
                    for i in 0..X {
                        acc[i][j] = s.fma(x[i], y, acc[i][j]);
                    }
                }
                k += n;
            }
        }
        for i in 0..X {
            for j in 0..Y {
                let c = d.c.add(i * d.c_steps.0 + j * d.c_steps.1);
                let start = match d.start {
                    Start::Zero => 0.0,
                    Start::Accumulate => *c,
                    Start::Bias(p) => *p.add(i * d.bias_steps.0 + j * d.bias_steps.1),
                };
                *c = start + s.sum(acc[i][j]);
            }
        }
    }
}

#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn copy<S: Simd>(
    s: S,
    from: *const f32,
    from_step: usize,
    rows: usize,
    cols: usize,
    to: *mut f32,
    to_step: usize,
    width: usize,
) {
    // SAFETY: the caller promises `rows` readable rows of `cols` and as many writable ones of `width`.
    unsafe {
        if cols == width {
            for r in 0..rows {
                let mut c = 0;
                while c < width {
                    s.store_ptr(to.add(r * to_step + c), s.load_ptr(from.add(r * from_step + c)));
                    c += S::LANES;
                }
            }
        } else {
            for r in 0..rows {
                let mut c = 0;
                while c < width {
                    let n = cols.saturating_sub(c).min(S::LANES);
                    s.store_ptr(to.add(r * to_step + c), partial(s, from.add(r * from_step + c.min(cols)), n));
                    c += S::LANES;
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn add_rows<S: Simd>(
    s: S,
    from: *const f32,
    rows: usize,
    cols: usize,
    to: *mut f32,
    to_step: usize,
    start: Start,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let bias = match start {
            Start::Bias(p) => partial(s, p, cols),
            _ => s.zero(),
        };
        for r in 0..rows {
            let c = to.add(r * to_step);
            let start = if matches!(start, Start::Accumulate) { partial(s, c, cols) } else { bias };
            let sum = s.add(start, s.load_ptr(from.add(r * S::LANES)));
            s.store_partial(std::slice::from_raw_parts_mut(c, cols), cols, sum);
        }
    }
}

/// The table of the tiles, and the functions that look into it.
macro_rules! kernel {
    ($level:ident, $features:tt, $mr:tt x $nv:tt, $list:tt, $transpose:path, $halves:path $(, $native:tt if $detected:expr)?) => {
        impl Kernel for $level {
            const MR: usize = $mr;
            const NV: usize = $nv;

            #[inline]
            unsafe fn tile(self, rows: usize, along_k: bool, t: &Tile) {
                kernel!(@fn $features tile_fn<const R: usize, const V: usize, const K: bool>
                    (s: $level, t: &Tile) => tile::<$level, Single, R, V, K>(s, t));
                type Function = unsafe fn($level, &Tile);
                static TABLE: [[[Function; 2]; $nv]; $mr] = kernel!(@rows $nv $list);
                let vectors = t.cols.div_ceil(Self::LANES);
                // SAFETY: the caller's promise; a value of the type proves the instruction set.
                unsafe { TABLE[rows - 1][vectors - 1][along_k as usize](self, t) }
            }

            unsafe fn pair_tile(self, rows: usize, t: &Tile) {
                type Function = unsafe fn($level, &Tile);
                let vectors = t.cols.div_ceil(Self::LANES);
                $(if $detected {
                    kernel!(@fn $native native_fn<const R: usize, const V: usize>
                        (s: $level, t: &Tile) => tile::<$level, NativePair, R, V, false>(s, t));
                    static TABLE: [[Function; $nv]; $mr] = kernel!(@table native_fn $nv $list);
                    // SAFETY: the caller's promise, and the instructions were found.
                    return unsafe { TABLE[rows - 1][vectors - 1](self, t) };
                })?
                kernel!(@fn $features pair_fn<const R: usize, const V: usize>
                    (s: $level, t: &Tile) => tile::<$level, Pair, R, V, false>(s, t));
                static TABLE: [[Function; $nv]; $mr] = kernel!(@table pair_fn $nv $list);
                // SAFETY: the caller's promise; a value of the type proves the instruction set.
                unsafe { TABLE[rows - 1][vectors - 1](self, t) }
            }

            unsafe fn pair_rows(
                self,
                from: *const f32,
                from_step: usize,
                rows: usize,
                cols: usize,
                to: *mut f32,
                to_step: usize,
                width: usize,
            ) {
                $(if $detected {
                    kernel!(@fn $native native_rows_fn<>
                        (from: *const f32, from_step: usize, rows: usize, cols: usize, to: *mut f32, to_step: usize, width: usize)
                        => native_pair_rows(from, from_step, rows, cols, to, to_step, width));
                    // SAFETY: the caller's promise, and the instructions were found.
                    return unsafe { native_rows_fn(from, from_step, rows, cols, to, to_step, width) };
                })?
                kernel!(@fn $features pair_rows_fn<>
                    (s: $level, from: *const f32, from_step: usize, rows: usize, cols: usize, to: *mut f32, to_step: usize, width: usize)
                    => pair_rows(s, from, from_step, rows, cols, to, to_step, width));
                // SAFETY: as above.
                unsafe { pair_rows_fn(self, from, from_step, rows, cols, to, to_step, width) }
            }

            unsafe fn pair_halves(
                self,
                from: *const Bf16,
                from_step: usize,
                rows: usize,
                cols: usize,
                to: *mut f32,
                to_step: usize,
                width: usize,
            ) {
                kernel!(@fn $features halves_fn<>
                    (s: $level, from: *const Bf16, from_step: usize, rows: usize, cols: usize, to: *mut f32, to_step: usize, width: usize)
                    => $halves(s, from, from_step, rows, cols, to, to_step, width));
                // SAFETY: as above.
                unsafe { halves_fn(self, from, from_step, rows, cols, to, to_step, width) }
            }

            unsafe fn pair_cols(
                self,
                from: *const f32,
                from_step: usize,
                rows: usize,
                cols: usize,
                to: *mut f32,
                to_step: usize,
            ) {
                $(if $detected {
                    kernel!(@fn $native native_cols_fn<>
                        (from: *const f32, from_step: usize, rows: usize, cols: usize, to: *mut f32, to_step: usize)
                        => native_pair_cols(from, from_step, rows, cols, to, to_step));
                    // SAFETY: the caller's promise, and the instructions were found.
                    return unsafe { native_cols_fn(from, from_step, rows, cols, to, to_step) };
                })?
                kernel!(@fn $features pair_cols_fn<>
                    (_s: $level, from: *const f32, from_step: usize, rows: usize, cols: usize, to: *mut f32, to_step: usize)
                    => pair_cols(from, from_step, rows, cols, to, to_step));
                // SAFETY: as above.
                unsafe { pair_cols_fn(self, from, from_step, rows, cols, to, to_step) }
            }

            unsafe fn wide_tile(self, t: &Tile) {
                kernel!(@fn $features wide_fn<const V: usize>(s: $level, t: &Tile) => tile::<$level, Single, 1, V, false>(s, t));
                // SAFETY: as above.
                unsafe {
                    match t.cols.div_ceil(Self::LANES) {
                        1 => wide_fn::<1>(self, t),
                        2 => wide_fn::<2>(self, t),
                        3 => wide_fn::<3>(self, t),
                        4 => wide_fn::<4>(self, t),
                        5 => wide_fn::<5>(self, t),
                        6 => wide_fn::<6>(self, t),
                        7 => wide_fn::<7>(self, t),
                        _ => wide_fn::<8>(self, t),
                    }
                }
            }

            unsafe fn dot(self, xs: usize, ys: usize, d: &Dot) {
                kernel!(@fn $features dot_fn<const X: usize, const Y: usize>(s: $level, d: &Dot) => dot::<$level, X, Y>(s, d));
                type Function = unsafe fn($level, &Dot);
                static TABLE: [[Function; DOT_Y]; DOT_X] = [
                    [dot_fn::<1, 1>, dot_fn::<1, 2>, dot_fn::<1, 3>, dot_fn::<1, 4>],
                    [dot_fn::<2, 1>, dot_fn::<2, 2>, dot_fn::<2, 3>, dot_fn::<2, 4>],
                    [dot_fn::<3, 1>, dot_fn::<3, 2>, dot_fn::<3, 3>, dot_fn::<3, 4>],
                    [dot_fn::<4, 1>, dot_fn::<4, 2>, dot_fn::<4, 3>, dot_fn::<4, 4>],
                ];
                // SAFETY: as above.
                unsafe { TABLE[xs - 1][ys - 1](self, d) }
            }

            unsafe fn transpose(
                self,
                from: *const f32,
                from_step: usize,
                rows: usize,
                cols: usize,
                to: *mut f32,
                to_step: usize,
            ) {
                kernel!(@fn $features transpose_fn<>
                    (s: $level, from: *const f32, from_step: usize, rows: usize, cols: usize, to: *mut f32, to_step: usize)
                    => $transpose(s, from, from_step, rows, cols, to, to_step));
                // SAFETY: as above.
                unsafe { transpose_fn(self, from, from_step, rows, cols, to, to_step) }
            }

            unsafe fn add_rows(
                self,
                from: *const f32,
                rows: usize,
                cols: usize,
                to: *mut f32,
                to_step: usize,
                start: Start,
            ) {
                kernel!(@fn $features add_fn<>
                    (s: $level, from: *const f32, rows: usize, cols: usize, to: *mut f32, to_step: usize, start: Start)
                    => add_rows(s, from, rows, cols, to, to_step, start));
                // SAFETY: as above.
                unsafe { add_fn(self, from, rows, cols, to, to_step, start) }
            }

            unsafe fn copy(
                self,
                from: *const f32,
                from_step: usize,
                rows: usize,
                cols: usize,
                to: *mut f32,
                to_step: usize,
                width: usize,
            ) {
                kernel!(@fn $features copy_fn<>
                    (s: $level, from: *const f32, from_step: usize, rows: usize, cols: usize, to: *mut f32, to_step: usize, width: usize)
                    => copy(s, from, from_step, rows, cols, to, to_step, width));
                // SAFETY: as above.
                unsafe { copy_fn(self, from, from_step, rows, cols, to, to_step, width) }
            }
        }
    };
    (@table $name:ident 1 [$($rows:tt)*]) => { [$([$name::<$rows, 1>]),*] };
    (@table $name:ident 2 [$($rows:tt)*]) => { [$([$name::<$rows, 1>, $name::<$rows, 2>]),*] };
    (@rows 1 [$($rows:tt)*]) => { [$([[tile_fn::<$rows, 1, false>, tile_fn::<$rows, 1, true>]]),*] };
    (@rows 2 [$($rows:tt)*]) => { [$([
        [tile_fn::<$rows, 1, false>, tile_fn::<$rows, 1, true>],
        [tile_fn::<$rows, 2, false>, tile_fn::<$rows, 2, true>],
    ]),*] };
    (@fn "" $name:ident<$(const $p:ident: $pt:ty),*>($($arg:ident: $ty:ty),*) => $body:expr) => {
        #[allow(clippy::too_many_arguments)]
        unsafe fn $name<$(const $p: $pt),*>($($arg: $ty),*) {
            // SAFETY: the caller's promise.
            unsafe { $body }
        }
    };
    (@fn $features:tt $name:ident<$(const $p:ident: $pt:ty),*>($($arg:ident: $ty:ty),*) => $body:expr) => {
        #[target_feature(enable = $features)]
        #[allow(clippy::too_many_arguments)]
        unsafe fn $name<$(const $p: $pt),*>($($arg: $ty),*) {
            // SAFETY: the caller's promise.
            unsafe { $body }
        }
    };
}

#[cfg(target_arch = "x86_64")]
kernel!(Avx512, "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma", 12 x 2, [1 2 3 4 5 6 7 8 9 10 11 12],
    super::transpose::avx512, masked_pair_halves,
    "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma" if crate::cpu::simd::has_bf16());
#[cfg(target_arch = "x86_64")]
kernel!(Avx2, "avx2,fma", 6 x 2, [1 2 3 4 5 6], super::transpose::avx2, pair_halves);
// eight lanes are two registers of SSE2 or NEON, which have 16 and 32
#[cfg(not(target_arch = "aarch64"))]
kernel!(Portable, "", 4 x 1, [1 2 3 4], super::transpose::portable, pair_halves);
#[cfg(target_arch = "aarch64")]
kernel!(Portable, "", 6 x 2, [1 2 3 4 5 6], super::transpose::portable, pair_halves);
