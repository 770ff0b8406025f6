//! Matrix products of `f32`, near the peak of the machine; with factors rounded to `bf16`, near twice that where the
//! machine has AVX512-BF16.
//!
//! The organisation is that of BLIS (Van Zee and van de Geijn 2015, <https://doi.org/10.1145/2764454>): register
//! tiles (`kernel.rs`) over packed panels (`packing.rs`), blocks for each cache (`product.rs`). How a product is split depends on
//! its sizes and never on the number of threads, and every element is summed by one task in the order of `k`, so
//! results are the same bit for bit on any number of threads. Memory is fastest where rows start at multiples of
//! 64 bytes, but need not.

mod epilogue;
mod kernel;
mod packing;
mod pairs;
mod product;
mod transpose;

#[cfg(target_arch = "x86_64")]
pub(super) use kernel::NativePair;
pub(super) use kernel::{Pair, Single, Step};

pub use epilogue::{Epilogue, matmul_then};

use super::simd::{Level, level};
use crate::device::Bf16;
use crate::{Rows, RowsMut};
use kernel::Kernel;
use product::{After, Operand, Product};

/// `$body` for the instruction set of the machine.
macro_rules! on_level {
    ($s:ident => $body:expr) => {
        match level() {
            Level::Portable($s) => $body,
            #[cfg(target_arch = "x86_64")]
            Level::Avx2($s) => $body,
            #[cfg(target_arch = "x86_64")]
            Level::Avx512($s) => $body,
        }
    };
}

/// A matrix operand of a product: [`Rows`], or its transpose.
#[derive(Clone, Copy)]
pub enum Mat<'a, T = f32> {
    /// As it lies in memory.
    Normal(Rows<'a, T>),
    /// The transpose of what lies in memory.
    Transposed(Rows<'a, T>),
}

impl<T> Mat<'_, T> {
    /// Rows of the operand.
    pub fn rows(&self) -> usize {
        match self {
            Mat::Normal(m) => m.rows(),
            Mat::Transposed(m) => m.cols(),
        }
    }

    /// Columns of the operand.
    pub fn cols(&self) -> usize {
        match self {
            Mat::Normal(m) => m.cols(),
            Mat::Transposed(m) => m.rows(),
        }
    }
}

/// A factor of a product, in either type.
#[derive(Clone, Copy)]
pub enum Factor<'a> {
    /// In `f32`.
    Single(Mat<'a>),
    /// In `bf16`.
    Bf16(Mat<'a, Bf16>),
}

impl<'a> From<Mat<'a>> for Factor<'a> {
    fn from(mat: Mat<'a>) -> Self {
        Self::Single(mat)
    }
}

impl<'a> From<Mat<'a, Bf16>> for Factor<'a> {
    fn from(mat: Mat<'a, Bf16>) -> Self {
        Self::Bf16(mat)
    }
}

impl Factor<'_> {
    /// Rows of the factor.
    pub fn rows(&self) -> usize {
        match self {
            Self::Single(m) => m.rows(),
            Self::Bf16(m) => m.rows(),
        }
    }

    /// Columns of the factor.
    pub fn cols(&self) -> usize {
        match self {
            Self::Single(m) => m.cols(),
            Self::Bf16(m) => m.cols(),
        }
    }

    fn operand(&self) -> Operand {
        fn lies<T>(mat: &Mat<'_, T>, narrow: bool) -> Operand {
            match mat {
                Mat::Normal(m) => Operand { ptr: m.as_ptr().cast(), row: m.stride(), col: 1, narrow },
                Mat::Transposed(m) => Operand { ptr: m.as_ptr().cast(), row: 1, col: m.stride(), narrow },
            }
        }
        match self {
            Self::Single(m) => lies(m, false),
            Self::Bf16(m) => lies(m, true),
        }
    }
}

/// What the product is added to.
#[derive(Clone, Copy)]
pub enum Init<'a> {
    /// Nothing: the result is overwritten.
    Zero,
    /// What the result holds already.
    Accumulate,
    /// This row, added to every row of the result.
    Bias(&'a [f32]),
}

/// `c = init + a b` for `a` `[m, k]`, `b` `[k, n]`, `c` `[m, n]`, on all threads.
pub fn matmul<'a>(c: RowsMut<'_>, a: impl Into<Factor<'a>>, b: impl Into<Factor<'a>>, init: Init<'_>) {
    run(Some(c), a.into(), b.into(), init, true, false, None);
}

/// [`matmul`] with factors rounded to `bf16` (nearest, halves to even) and sums in `f32`. Small products, and those of a few
/// rows or columns, keep their factors whole: there rounding would cost more than it saves. The sums of a
/// machine with AVX512-BF16 differ from those of another in their last bits.
///
/// A factor may be in `bf16` already.
pub fn matmul_bf16<'a>(c: RowsMut<'_>, a: impl Into<Factor<'a>>, b: impl Into<Factor<'a>>, init: Init<'_>) {
    run(Some(c), a.into(), b.into(), init, true, true, None);
}

/// [`matmul`] on the calling thread alone: for small products inside a parallel task.
pub fn matmul_on_this_thread(c: RowsMut<'_>, a: Mat<'_>, b: Mat<'_>, init: Init<'_>) {
    run(Some(c), a.into(), b.into(), init, false, false, None);
}

/// Row `r` of `to` receives the pairs of rows `2 r` and `2 r + 1` of `from`, rounded to `bf16`; the partner of a last one is
/// zero. Both may be the same.
///
/// # Safety
/// `from` must be valid for reads, and `to` for writes of half as many rows, a `to_step` apart, each of the columns
/// rounded up to a multiple of 16.
pub(super) unsafe fn pair_rows(from: Rows<'_>, to: *mut f32, to_step: usize) {
    let (rows, cols) = (from.rows(), from.cols());
    // SAFETY: the caller's promise.
    unsafe {
        on_level!(s => s.pair_rows(from.as_ptr(), from.stride(), rows, cols, to, to_step, cols.next_multiple_of(16)))
    }
}

/// Row `r` of `to` receives the pairs of neighbours of row `r`, as in [`pair_rows`].
///
/// # Safety
/// As for [`pair_rows`].
pub(super) unsafe fn pair_columns(from: Rows<'_>, to: *mut f32, to_step: usize) {
    // SAFETY: the caller's promise.
    unsafe { on_level!(s => s.pair_cols(from.as_ptr(), from.stride(), from.rows(), from.cols(), to, to_step)) }
}

/// The product; `after` is called for every part of the result once, unless the sizes are [thin](product::is_thin). Without
/// `c` nobody else gets the result, and the sizes must not be thin.
fn run(
    c: Option<RowsMut<'_>>,
    a: Factor<'_>,
    b: Factor<'_>,
    init: Init<'_>,
    parallel: bool,
    pairs: bool,
    after: Option<&dyn After>,
) {
    let (m, k, n) = (a.rows(), a.cols(), b.cols());
    let (rows, cols) = c.as_ref().map_or((m, n), |c| (c.rows(), c.cols()));
    assert!(rows == m && cols == n && b.rows() == k, "[{m}, {k}] x [{}, {n}] is not [{rows}, {cols}]", b.rows());
    let result = if c.is_some() { product::Result::Stays } else { product::Result::Passes };
    let (c, c_step) = c.map_or((std::ptr::null_mut(), 0), |mut c| (c.as_mut_ptr(), c.stride()));
    if let Init::Bias(bias) = init {
        assert_eq!(bias.len(), n, "one bias per column");
    }
    let product = Product {
        m,
        n,
        k,
        a: a.operand(),
        b: b.operand(),
        c,
        c_step,
        across: false,
        start: match init {
            Init::Zero => kernel::Start::Zero,
            Init::Accumulate => kernel::Start::Accumulate,
            Init::Bias(bias) => kernel::Start::Bias(bias.as_ptr()),
        },
        parallel,
        pairs,
        origin: (0, 0),
        after,
        result,
    };
    // SAFETY: the sizes agree, and `Rows` and `RowsMut` are valid for all their elements.
    unsafe { on_level!(s => product.run(s)) }
}
