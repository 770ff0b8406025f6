//! Retention (RetNet, [arXiv:2307.08621](https://arxiv.org/abs/2307.08621)).
//!
//! Head `h` forgets at the rate `gamma = 1 - 2^(-5 - h)`. With `D_ij = gamma^(i-j) / sqrt(sum over j <= i of gamma^(i-j))`
//! and `a_ij = (q_i . k_j) D_ij`, for queries and keys that are already rotated and scaled:
//!
//! * [`parallel_forward`]: `y_i = sum over j <= i of a_ij v_j / n_i`, where `n_i = clamp(sum_j |a_ij|, 1, 5e4)` is a
//!   constant for the gradient. Blocked as attention is: quadratic time, linear memory.
//! * [`chunk_forward`]: the same without `n_i`, in linear time, for models that normalise `y` afterwards anyway.
//! * [`extend`]: further tokens of the latter, from a state.
//!
//! The decay between two blocks is a product of one weight per query and one per key, which are multiplied into
//! operands while these are packed; between the products of a pair of blocks nothing is left to do but the sums of
//! `|a|` and, on the diagonal, the mask. Products are those of attention (`attention::block`).

mod chunk;
mod extend;
mod parallel;

pub use chunk::{chunk_backward, chunk_forward, chunk_states_len};
pub use extend::extend;
pub use parallel::{parallel_backward, parallel_forward};

use crate::cpu::attention::block::{BLOCK, Factors, STRIP, view, view_mut};
use crate::cpu::matmul::Mat;
use crate::{Rows, RowsMut, simd_fn};

/// Sizes of retention. `q`, `k` are `[batch * time, heads * key_dim]`, `v` and the result
/// `[batch * time, heads * value_dim]`; head `h` has the `h`-th block of columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dims {
    /// Sequences.
    pub batch: usize,
    /// Tokens of a sequence.
    pub time: usize,
    /// Heads.
    pub heads: usize,
    /// Columns of a head in queries and keys.
    pub key_dim: usize,
    /// Columns of a head in values.
    pub value_dim: usize,
}

impl Dims {
    fn pairs(&self) -> usize {
        self.batch * self.heads
    }

    fn check(&self, keys: &[Rows<'_>], values: &[Rows<'_>]) {
        for (list, dim) in [(keys, self.key_dim), (values, self.value_dim)] {
            for x in list {
                let fits = x.rows() == self.batch * self.time && x.cols() == self.heads * dim;
                assert!(fits, "[{}, {}] does not match {self:?}", x.rows(), x.cols());
            }
        }
    }
}

/// The columns of a head of `dim` columns, and the rows of its sequence.
fn part(x: Rows<'_>, dims: Dims, pair: usize, dim: usize) -> Rows<'_> {
    let (batch, head) = (pair / dims.heads, pair % dims.heads);
    x.slice_cols(head * dim, (head + 1) * dim).slice_rows(batch * dims.time, (batch + 1) * dims.time)
}

/// The columns of a head in a result, and the rows of some tokens of its sequence.
///
/// # Safety
/// As for [`RowsMut::shared_block`].
unsafe fn part_mut<'a>(
    x: &'a RowsMut<'_>,
    dims: Dims,
    pair: usize,
    dim: usize,
    tokens: std::ops::Range<usize>,
) -> RowsMut<'a> {
    let (first, head) = (pair / dims.heads * dims.time, pair % dims.heads);
    // SAFETY: the caller's promise.
    unsafe { x.shared_block(first + tokens.start..first + tokens.end, head * dim..(head + 1) * dim) }
}

/// The decay of a head, `gamma = 1 - 2^(-5 - head)`. Powers are computed in f64: their exponents are large.
#[derive(Clone, Copy)]
struct Decay {
    /// `1 - gamma`
    forgotten: f64,
    /// `ln gamma`
    log: f64,
}

impl Decay {
    fn new(head: usize) -> Self {
        let forgotten = (-5.0 - head as f64).exp2();
        Self { forgotten, log: (-forgotten).ln_1p() }
    }

    /// `gamma^n`
    fn power(&self, n: f64) -> f64 {
        (n * self.log).exp()
    }

    /// `gamma^0 + … + gamma^t`: the sum over the row of token `t` of the decay mask.
    fn mass(&self, t: usize) -> f64 {
        -((t + 1) as f64 * self.log).exp_m1() / self.forgotten
    }

    /// `gamma^(first + step * n)` for `n` = 0, 1, …
    fn powers(&self, first: f64, step: f64, to: &mut [f32]) {
        to.iter_mut().enumerate().for_each(|(n, to)| *to = self.power(first + step * n as f64) as f32);
    }
}

/// `out (+)= (q k^T)^T v` for a pair of blocks whose decays are in the operands: `qt` `[key_dim, lanes]` and `v` are packed;
/// on the diagonal, masked. Leaves the scores in `p`, `[keys, lanes]`, by way of `scores` before they are used.
#[allow(clippy::too_many_arguments)] // operands and where they are
fn forward_block(
    factors: Factors,
    qt: Rows<'_>,
    k: Rows<'_>,
    v: Rows<'_>,
    on_diagonal: bool,
    p: &mut [f32],
    scores: impl FnOnce(&[f32]),
    out: RowsMut<'_>,
    accumulate: bool,
) {
    let (keys, queries) = (k.rows(), out.rows());
    score_block(factors, qt, k, on_diagonal, p);
    scores(p);
    let step = if on_diagonal { STRIP } else { BLOCK };
    for i in (0..queries).step_by(step) {
        let end = (i + step).min(queries);
        let keys = if on_diagonal { end } else { keys };
        let a = Mat::Transposed(view(p, BLOCK, 0..keys, i..end));
        // SAFETY: exclusively borrowed; one part at a time.
        let out = unsafe { out.shared_block(i..end, 0..out.cols()) };
        factors.product(out, a, factors.steps(v, 0..keys), accumulate);
    }
}

/// `p = k qt`, on the diagonal without what lies above.
fn score_block(factors: Factors, qt: Rows<'_>, k: Rows<'_>, on_diagonal: bool, p: &mut [f32]) {
    let (keys, lanes) = (k.rows(), qt.cols());
    let step = if on_diagonal { STRIP } else { BLOCK };
    for j in (0..keys).step_by(step).map(|j| j..(j + step).min(keys)) {
        let first = if on_diagonal { j.start } else { 0 };
        let a = Mat::Normal(k.slice_rows(j.start, j.end));
        factors.product(view_mut(p, BLOCK, j, first..lanes), a, qt.slice_cols(first, lanes), false);
    }
    if on_diagonal {
        mask_diagonal(p, keys, lanes);
    }
}

/// What a block of queries brings to its backward pass; all packed, as right operands.
#[derive(Clone, Copy)]
struct Queries<'a> {
    /// `[key_dim, lanes]`
    qt: Rows<'a>,
    /// `[queries, key_dim]`
    q: Rows<'a>,
    /// With the weights of the queries; `[value_dim, lanes]`
    dyt: Rows<'a>,
    /// With the weights of the queries; `[queries, value_dim]`
    dy: Rows<'a>,
}

/// What a block of keys brings.
#[derive(Clone, Copy)]
struct Keys<'a> {
    /// With the weights of the keys, a left operand; `[keys, key_dim]`
    weighted: Rows<'a>,
    /// Packed as a right operand, without weights.
    plain: Rows<'a>,
    /// Values with the weights of the keys, a left operand; `[keys, value_dim]`
    v: Rows<'a>,
}

/// The gradients that a pair of blocks contributes; `p` and `ds` are scratch memory of `BLOCK * BLOCK` each.
fn gradient_block(
    factors: Factors,
    from: Queries<'_>,
    keys: Keys<'_>,
    on_diagonal: bool,
    [p, ds]: [&mut [f32]; 2],
    (dq, add_dq): (RowsMut<'_>, bool),
    (dk, dv, add_dkv): (RowsMut<'_>, RowsMut<'_>, bool),
) {
    let (key_count, query_count) = (dk.rows(), dq.rows());
    score_block(factors, from.qt, keys.weighted, on_diagonal, p);
    score_block(factors, from.dyt, keys.v, on_diagonal, ds);
    let step = if on_diagonal { STRIP } else { BLOCK };
    for j in (0..key_count).step_by(step).map(|j| j..(j + step).min(key_count)) {
        let i = if on_diagonal { j.start } else { 0 }..query_count;
        for (x, weights, gradient) in [(from.dy, &*p, &dv), (from.q, &*ds, &dk)] {
            // SAFETY: exclusively borrowed; one part at a time.
            let gradient = unsafe { gradient.shared_block(j.clone(), 0..gradient.cols()) };
            let a = Mat::Normal(view(weights, BLOCK, j.clone(), i.clone()));
            factors.product(gradient, a, factors.steps(x, i.clone()), add_dkv);
        }
    }
    for i in (0..query_count).step_by(step).map(|i| i..(i + step).min(query_count)) {
        let key_count = if on_diagonal { i.end } else { key_count };
        // SAFETY: as above.
        let gradient = unsafe { dq.shared_block(i.clone(), 0..dq.cols()) };
        let a = Mat::Transposed(view(ds, BLOCK, 0..key_count, i));
        factors.product(gradient, a, factors.steps(keys.plain, 0..key_count), add_dq);
    }
}

simd_fn! {
    /// Zero where the key is later than the query, in the squares on the diagonal.
    fn mask_diagonal(s: S, p: &mut [f32], keys: usize, lanes: usize) {
        for lane in (0..lanes).step_by(S::LANES) {
            let query = s.add(s.to_float(s.iota()), s.splat(lane as f32));
            for j in lane..keys.min(lane / STRIP * STRIP + STRIP) {
                let x = &mut p[j * BLOCK + lane..];
                let masked = s.select(s.lt(query, s.splat(j as f32)), s.zero(), s.load(x));
                s.store(x, masked);
            }
        }
    }

    /// `sums[i] += sum over j of weight[j] |p[j, i]|`
    fn add_absolutes(
        s: S, p: &[f32], keys: usize, lanes: usize, on_diagonal: bool, weight: &[f32], sums: &mut [f32],
    ) {
        for lane in (0..lanes).step_by(S::LANES) {
            let keys = if on_diagonal { keys.min(lane / STRIP * STRIP + STRIP) } else { keys };
            let mut even = s.load(&sums[lane..]);
            let mut odd = s.zero();
            let term = |j: usize, sum| s.fma(s.splat(weight[j]), s.abs(s.load(&p[j * BLOCK + lane..])), sum);
            for j in (0..keys / 2 * 2).step_by(2) {
                even = term(j, even);
                odd = term(j + 1, odd);
            }
            if !keys.is_multiple_of(2) {
                even = term(keys - 1, even);
            }
            s.store(&mut sums[lane..], s.add(even, odd));
        }
    }
}
