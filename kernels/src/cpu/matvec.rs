//! Products of few rows with a large matrix, as in decoding: `y = x W^T + b`, bound by reading W once.
//!
//! W `[n, k]` is given in `f32` or `bf16`. A task owns some rows of W, which stay in its cache while they meet the rows of
//! x, four at a time. Every element of y is one sum over k in one order, whatever the number of rows of x is: a sequence
//! gets the same logits alone and in a batch.
//!
//! A vector of `bf16` is read as 32-bit words of two numbers each, the even ones in the lower halves. Shifting and
//! masking makes two vectors of `f32` of it, the even and the odd elements, and x is sorted likewise beforehand.

use super::matmul::{Init, Mat, matmul};
use super::simd::Simd;
use super::threads::{parallel_ranges, with_scratch};
use crate::device::Bf16;
use crate::{Rows, RowsMut, simd_fn};

/// Elements of W that are worth a task.
const TASK: usize = 1 << 16;
/// Below so many elements a second thread comes too late.
const WORTH_SHARING: usize = 1 << 15;
/// Tasks have a multiple of so many rows of W, so that none is left to be taken singly but the last.
const TOGETHER: usize = 16;
/// Most rows of x for which this is the way to go; for more, [`matmul`] is.
pub const MOST_ROWS: usize = 16;
/// Rows of W that are widened at a time for [`matmul`].
const WIDENED: usize = 256;

/// The matrix `[n, k]`.
#[derive(Clone, Copy)]
pub enum Weights<'a> {
    /// In single precision.
    F32(Rows<'a>),
    /// In half of the bytes: the upper 16 bits of each number.
    Bf16(Rows<'a, Bf16>),
}

impl Weights<'_> {
    fn size(&self) -> (usize, usize) {
        match self {
            Weights::F32(w) => (w.rows(), w.cols()),
            Weights::Bf16(w) => (w.rows(), w.cols()),
        }
    }
}

/// `y = x W^T + b` for x `[m, k]`, b `[n]`, y `[m, n]`.
///
/// # Panics
/// If sizes do not fit.
pub fn product(x: Rows<'_>, weights: Weights<'_>, bias: Option<&[f32]>, y: RowsMut<'_>) {
    let (n, k) = weights.size();
    assert!(x.cols() == k && y.rows() == x.rows() && y.cols() == n, "the sizes of a product do not fit");
    assert!(bias.is_none_or(|b| b.len() == n), "one bias per column");
    match weights {
        _ if x.rows() <= MOST_ROWS => few(x, weights, bias, y),
        Weights::F32(w) => matmul(y, Mat::Normal(x), Mat::Transposed(w), bias.map_or(Init::Zero, Init::Bias)),
        Weights::Bf16(w) => widened(x, w, bias, y),
    }
}

fn few(x: Rows<'_>, weights: Weights<'_>, bias: Option<&[f32]>, y: RowsMut<'_>) {
    let ((n, k), m) = (weights.size(), x.rows());
    let grain = match n * k {
        few if few < WORTH_SHARING => n,
        elements => (TASK.min(elements / 4) / k).max(1).next_multiple_of(TOGETHER),
    };
    let tasks = |x: Rows<'_>| {
        parallel_ranges(n, grain, |range| {
            let bias = bias.map(|b| &b[range.clone()]);
            // SAFETY: tasks have different columns of `y`.
            let y = unsafe { y.shared_block(0..m, range.clone()) };
            match weights {
                Weights::F32(w) => f32_task(x, w.slice_rows(range.start, range.end), bias, y),
                Weights::Bf16(w) => bf16_task(x, w.slice_rows(range.start, range.end), bias, y),
            }
        });
    };
    match weights {
        Weights::F32(_) => tasks(x),
        Weights::Bf16(_) => with_scratch(m * k, |sorted| {
            (0..m).for_each(|r| sort(x.row(r), &mut sorted[r * k..(r + 1) * k]));
            tasks(Rows::new(sorted, m, k, k));
        }),
    }
}

/// Widens some rows of W at a time.
fn widened(x: Rows<'_>, w: Rows<'_, Bf16>, bias: Option<&[f32]>, mut y: RowsMut<'_>) {
    let k = w.cols();
    with_scratch(WIDENED.min(w.rows()) * k, |scratch| {
        for from in (0..w.rows()).step_by(WIDENED) {
            let to = (from + WIDENED).min(w.rows());
            let wide = &mut scratch[..(to - from) * k];
            for (r, wide) in wide.chunks_exact_mut(k.max(1)).enumerate() {
                wide.iter_mut().zip(w.row(from + r)).for_each(|(to, from)| *to = from.to_f32());
            }
            let init = bias.map_or(Init::Zero, |b| Init::Bias(&b[from..to]));
            let wide = Mat::Transposed(Rows::new(wide, to - from, k, k));
            matmul(y.slice_cols(from, to), Mat::Normal(x), wide, init);
        }
    });
}

/// One element of each of `M R` results: rows `m..` of x with rows `n..` of W.
trait Dots<S: Simd> {
    fn dots<const M: usize, const R: usize>(&self, s: S, m: usize, n: usize) -> [[f32; R]; M];
}

/// All results of a task, four rows of x at a time.
#[inline(always)]
fn all<S: Simd>(s: S, dots: &impl Dots<S>, bias: Option<&[f32]>, y: &mut RowsMut<'_>) {
    let mut m = 0;
    while m < y.rows() {
        m += match y.rows() - m {
            1 if S::LANES == 16 => some::<S, 1, 16>(s, dots, m, bias, y),
            1 => some::<S, 1, 8>(s, dots, m, bias, y),
            2 => some::<S, 2, 4>(s, dots, m, bias, y),
            3 => some::<S, 3, 2>(s, dots, m, bias, y),
            _ => some::<S, 4, 2>(s, dots, m, bias, y),
        };
    }
}

#[inline(always)]
fn some<S: Simd, const M: usize, const R: usize>(
    s: S,
    dots: &impl Dots<S>,
    m: usize,
    bias: Option<&[f32]>,
    y: &mut RowsMut<'_>,
) -> usize {
    let bias = |n: usize| bias.map_or(0.0, |b| b[n]);
    let mut n = 0;
    while n + R <= y.cols() {
        for (i, sums) in dots.dots::<M, R>(s, m, n).into_iter().enumerate() {
            sums.into_iter().enumerate().for_each(|(j, sum)| y.row(m + i)[n + j] = sum + bias(n + j));
        }
        n += R;
    }
    while n < y.cols() {
        for (i, [sum]) in dots.dots::<M, 1>(s, m, n).into_iter().enumerate() {
            y.row(m + i)[n] = sum + bias(n);
        }
        n += 1;
    }
    M
}

/// The sums of the lanes. Loops: a closure that `map` is given is compiled without the vectors of `S`.
#[inline(always)]
fn total<S: Simd, const M: usize, const R: usize>(s: S, sums: &[[S::F; R]; M]) -> [[f32; R]; M] {
    let mut results = [[0.0; R]; M];
    for i in 0..M {
        for j in 0..R {
            results[i][j] = s.sum(sums[i][j]);
        }
    }
    results
}

struct Single<'a> {
    x: Rows<'a>,
    w: Rows<'a>,
}

impl<S: Simd> Dots<S> for Single<'_> {
    #[inline(always)]
    fn dots<const M: usize, const R: usize>(&self, s: S, m: usize, n: usize) -> [[f32; R]; M] {
        let x: [&[f32]; M] = std::array::from_fn(|i| self.x.row(m + i));
        let w: [&[f32]; R] = std::array::from_fn(|j| self.w.row(n + j));
        let k = self.x.cols();
        let mut sums = [[s.zero(); R]; M];
        let mut c = 0;
        while c + S::LANES <= k {
            let mut x_lanes = [s.zero(); M];
            for i in 0..M {
                x_lanes[i] = s.load(&x[i][c..]);
            }
            for j in 0..R {
                let w = s.load(&w[j][c..]);
                for i in 0..M {
                    sums[i][j] = s.fma(x_lanes[i], w, sums[i][j]);
                }
            }
            c += S::LANES;
        }
        if c < k {
            for i in 0..M {
                let x = s.load_partial(&x[i][c..], k - c);
                for j in 0..R {
                    sums[i][j] = s.fma(x, s.load_partial(&w[j][c..], k - c), sums[i][j]);
                }
            }
        }
        total(s, &sums)
    }
}

struct Half<'a> {
    /// Sorted.
    x: Rows<'a>,
    w: Rows<'a, Bf16>,
}

impl<S: Simd> Dots<S> for Half<'_> {
    #[inline(always)]
    fn dots<const M: usize, const R: usize>(&self, s: S, m: usize, n: usize) -> [[f32; R]; M] {
        let x: [&[f32]; M] = std::array::from_fn(|i| self.x.row(m + i));
        let w: [&[Bf16]; R] = std::array::from_fn(|j| self.w.row(n + j));
        let (k, upper) = (self.x.cols(), s.splat_i(0xffff_0000u32 as i32));
        let whole = k - k % (2 * SORTED);
        let mut sums = [[s.zero(); R]; M];
        let mut c = 0;
        while c < whole {
            for half in (0..SORTED).step_by(S::LANES) {
                let words: [S::I; R] = std::array::from_fn(|j| {
                    let words = &w[j][c + 2 * half..c + 2 * half + 2 * S::LANES];
                    // SAFETY: as many bytes as there are in `LANES` words; every pattern of bits is a float.
                    s.bits(unsafe { s.load_ptr(words.as_ptr().cast()) })
                });
                for i in 0..M {
                    let (even, odd) = (s.load(&x[i][c + half..]), s.load(&x[i][c + SORTED + half..]));
                    for j in 0..R {
                        let sum = s.fma(even, s.from_bits(s.shl::<16>(words[j])), sums[i][j]);
                        sums[i][j] = s.fma(odd, s.from_bits(s.and_i(words[j], upper)), sum);
                    }
                }
            }
            c += 2 * SORTED;
        }
        let mut results = total(s, &sums);
        for i in 0..M {
            for j in 0..R {
                let rest = x[i][whole..].iter().zip(&w[j][whole..]);
                results[i][j] += rest.map(|(x, w)| x * w.to_f32()).sum::<f32>();
            }
        }
        results
    }
}

/// Elements of x that are sorted into as many halves: the most lanes of a vector.
const SORTED: usize = 16;

/// In every piece of `2 SORTED` elements, the even ones first; what remains at the end stays.
fn sort(x: &[f32], to: &mut [f32]) {
    let whole = x.len() - x.len() % (2 * SORTED);
    for (x, to) in x[..whole].chunks_exact(2 * SORTED).zip(to.chunks_exact_mut(2 * SORTED)) {
        for i in 0..SORTED {
            (to[i], to[SORTED + i]) = (x[2 * i], x[2 * i + 1]);
        }
    }
    to[whole..].copy_from_slice(&x[whole..]);
}

simd_fn! {
    fn f32_task(s: S, x: Rows<'_>, w: Rows<'_>, bias: Option<&[f32]>, y: RowsMut<'_>) {
        let mut y = y;
        all(s, &Single { x, w }, bias, &mut y);
    }

    fn bf16_task(s: S, x: Rows<'_>, w: Rows<'_, Bf16>, bias: Option<&[f32]>, y: RowsMut<'_>) {
        let mut y = y;
        all(s, &Half { x, w }, bias, &mut y);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Stream;

    #[test]
    fn products_equal_sums_and_do_not_depend_on_the_batch() {
        let mut random = Stream::new(1, 2);
        let mut draw = |n: usize| -> Vec<f32> { (0..n).map(|_| random.normal()).collect() };
        for (n, k) in [(1, 1), (13, 33), (70, 96), (300, 519)] {
            let (x, w, bias) = (draw(20 * k), draw(n * k), draw(n));
            let narrow: Vec<Bf16> = w.iter().map(|w| Bf16::from_f32(*w)).collect();
            let wide: Vec<f32> = narrow.iter().map(|w| w.to_f32()).collect();
            let both =
                [(&w, Weights::F32(Rows::contiguous(&w, k))), (&wide, Weights::Bf16(Rows::contiguous(&narrow, k)))];
            for (w, weights) in both {
                let mut alone = vec![0.0; 20 * n];
                for (x, y) in x.chunks_exact(k).zip(alone.chunks_exact_mut(n)) {
                    product(Rows::contiguous(x, k), weights, Some(&bias), RowsMut::contiguous(y, n));
                }
                for (i, y) in alone.iter().enumerate() {
                    let (x, w) = (&x[i / n * k..][..k], &w[i % n * k..][..k]);
                    let want = x.iter().zip(w).map(|(x, w)| f64::from(x * w)).sum::<f64>() + f64::from(bias[i % n]);
                    assert!((f64::from(*y) - want).abs() < 1e-5 * (k as f64 + want.abs()), "{y} is not {want}");
                }
                for m in [2, 3, 7, 16, 20] {
                    let mut y = vec![0.0; m * n];
                    let rows = RowsMut::contiguous(&mut y, n);
                    product(Rows::contiguous(&x[..m * k], k), weights, Some(&bias), rows);
                    if m <= MOST_ROWS {
                        assert_eq!(y, alone[..m * n]);
                    } else {
                        assert!(y.iter().zip(&alone).all(|(a, b)| (a - b).abs() < 1e-5 * k as f32));
                    }
                }
            }
        }
    }
}
