//! Matrix products of `f32`, near the peak of the machine; with factors rounded to `bf16`, near twice that where the
//! machine has AVX512-BF16.
//!
//! The organisation is that of BLIS (Van Zee and van de Geijn 2015, <https://doi.org/10.1145/2764454>): register
//! tiles (`kernel.rs`) over packed panels, blocks for each cache (`product.rs`). How a product is split depends on
//! its sizes and never on the number of threads, and every element is summed by one task in the order of `k`, so
//! results are the same bit for bit on any number of threads. Memory is fastest where rows start at multiples of
//! 64 bytes, but need not.

mod epilogue;
mod kernel;
mod product;
mod transpose;

pub use epilogue::{Epilogue, matmul_then};

use super::simd::{Level, level};
use crate::{Rows, RowsMut};
use product::{After, Operand, Product};

/// A matrix operand of a product: [`Rows`], or its transpose.
#[derive(Clone, Copy)]
pub enum Mat<'a> {
    /// As it lies in memory.
    Normal(Rows<'a>),
    /// The transpose of what lies in memory.
    Transposed(Rows<'a>),
}

impl Mat<'_> {
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

    fn operand(&self) -> Operand {
        match self {
            Mat::Normal(m) => Operand { ptr: m.as_ptr(), row: m.stride(), col: 1 },
            Mat::Transposed(m) => Operand { ptr: m.as_ptr(), row: 1, col: m.stride() },
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
pub fn matmul(c: RowsMut<'_>, a: Mat<'_>, b: Mat<'_>, init: Init<'_>) {
    run(c, a, b, init, true, false, None);
}

/// [`matmul`] with factors rounded to `bf16` (nearest, halves to even) and sums in `f32`. Small products, and those of a few
/// rows or columns, keep their factors whole: there rounding would cost more than it saves. The sums of a
/// machine with AVX512-BF16 differ from those of another in their last bits.
pub fn matmul_bf16(c: RowsMut<'_>, a: Mat<'_>, b: Mat<'_>, init: Init<'_>) {
    run(c, a, b, init, true, true, None);
}

/// [`matmul`] on the calling thread alone: for small products inside a parallel task.
pub fn matmul_on_this_thread(c: RowsMut<'_>, a: Mat<'_>, b: Mat<'_>, init: Init<'_>) {
    run(c, a, b, init, false, false, None);
}

/// The product; `after` is called for every part of the result once, unless the sizes are [thin](product::is_thin).
fn run(
    mut c: RowsMut<'_>,
    a: Mat<'_>,
    b: Mat<'_>,
    init: Init<'_>,
    parallel: bool,
    pairs: bool,
    after: Option<&dyn After>,
) {
    let (m, k, n) = (a.rows(), a.cols(), b.cols());
    assert!(
        c.rows() == m && c.cols() == n && b.rows() == k,
        "[{m}, {k}] x [{}, {n}] is not [{}, {}]",
        b.rows(),
        c.rows(),
        c.cols()
    );
    if let Init::Bias(bias) = init {
        assert_eq!(bias.len(), n, "one bias per column");
    }
    let product = Product {
        m,
        n,
        k,
        a: a.operand(),
        b: b.operand(),
        c: c.as_mut_ptr(),
        c_step: c.stride(),
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
    };
    // SAFETY: the sizes agree, and `Rows` and `RowsMut` are valid for all their elements.
    unsafe {
        match level() {
            Level::Portable(s) => product.run(s),
            #[cfg(target_arch = "x86_64")]
            Level::Avx2(s) => product.run(s),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512(s) => product.run(s),
        }
    }
}
