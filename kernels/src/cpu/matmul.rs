//! Matrix products.

use crate::{Rows, RowsMut};

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

    fn at(&self, r: usize, c: usize) -> f32 {
        match self {
            Mat::Normal(m) => m.row(r)[c],
            Mat::Transposed(m) => m.row(c)[r],
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
    matmul_on_this_thread(c, a, b, init);
}

/// [`matmul`] on the calling thread alone: for small products inside a parallel task.
pub fn matmul_on_this_thread(mut c: RowsMut<'_>, a: Mat<'_>, b: Mat<'_>, init: Init<'_>) {
    assert!(a.rows() == c.rows() && b.cols() == c.cols() && a.cols() == b.rows());
    for i in 0..a.rows() {
        for j in 0..b.cols() {
            let start = match init {
                Init::Zero => 0.0,
                Init::Accumulate => c.row(i)[j],
                Init::Bias(bias) => bias[j],
            };
            c.row(i)[j] = (0..a.cols()).fold(start, |sum, k| sum + a.at(i, k) * b.at(k, j));
        }
    }
}
