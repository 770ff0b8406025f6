//! The backward pass: a task owns the keys of one (sequence, head), or some blocks of them where pairs are few, and
//! goes over the queries. Partial query gradients of such tasks are added up in a fixed order.

use super::block::{
    BLOCK, Factors, ONES, STRIP, key_splits, padded, row_dots, split_of, sum_splits, view, view_mut, with_pieces,
};
use super::{BlockDropout, Dims};
use crate::cpu::math;
use crate::cpu::matmul::Mat;
use crate::cpu::threads::{parallel_ranges, with_scratch};
use crate::random::Keep;
use crate::rows::SharedSlice;
use crate::{Rows, RowsMut, simd_fn};

/// Gradients of [`forward`](super::forward) from its results `out`, `lse` and the gradient `dout` of `out`:
///
/// ```text
/// P = exp(D^-1/2 q k^T - lse),   dP = dout v^T,   dS = P (dP - rowsum(dout out)) D^-1/2
/// dv = P^T dout,   dk = dS^T q,   dq = dS k
/// ```
#[allow(clippy::too_many_arguments)] // one for each tensor
pub fn backward(
    dims: Dims,
    factors: Factors,
    q: Rows<'_>,
    k: Rows<'_>,
    v: Rows<'_>,
    dropout: Option<Keep>,
    out: Rows<'_>,
    lse: &[f32],
    dout: Rows<'_>,
    dq: RowsMut<'_>,
    dk: RowsMut<'_>,
    dv: RowsMut<'_>,
) {
    for x in [q, k, v, out, dout, dq.as_rows(), dk.as_rows(), dv.as_rows()] {
        assert!(x.rows() == dims.rows() && x.cols() == dims.cols(), "attention sizes do not match {dims:?}");
    }
    assert_eq!(lse.len(), dims.pairs() * dims.time);
    let Dims { time, heads, head_dim, .. } = dims;
    let pairs = dims.pairs();
    let splits = key_splits(pairs, time.div_ceil(BLOCK));
    let partials = if splits > 1 { splits * pairs * time * head_dim } else { 0 };
    with_scratch(partials, |memory| {
        let partial = SharedSlice::new(memory);
        let grain = (1 << 18) / (time * time * head_dim).max(1);
        parallel_ranges(pairs * splits, grain, |range| {
            for task in range {
                let (pair, split) = (task / splits, task % splits);
                let cols = pair % heads * head_dim..(pair % heads + 1) * head_dim;
                let rows = pair / heads * time..(pair / heads + 1) * time;
                let [q, k, v, out, dout] =
                    [q, k, v, out, dout].map(|x| x.slice_cols(cols.start, cols.end).slice_rows(rows.start, rows.end));
                // SAFETY: of these rows and columns this task writes the blocks of keys that it owns, and (in `dq`, if
                // pairs are not split, else in its own partial sum) the queries.
                let (dq, dk, dv) = unsafe {
                    let dq = if splits > 1 {
                        let size = time * head_dim;
                        let from = (split * pairs + pair) * size;
                        RowsMut::contiguous(partial.range(from..from + size), head_dim)
                    } else {
                        dq.shared_block(rows.clone(), cols.clone())
                    };
                    (dq, dk.shared_block(rows.clone(), cols.clone()), dv.shared_block(rows.clone(), cols.clone()))
                };
                let pair = Pair {
                    factors,
                    q,
                    k,
                    v,
                    out,
                    dout,
                    lse: &lse[pair * time..(pair + 1) * time],
                    scale: dims.scale(),
                    dropout,
                    first_row: pair * time,
                };
                pair.backward(split, splits, &dq, &dk, &dv);
            }
        });
        if splits > 1 {
            // SAFETY: all tasks are done.
            let partial = unsafe { partial.range(0..partials) };
            sum_splits(partial, splits, pairs, heads, time, head_dim, &dq);
        }
    });
}

/// One head of one sequence.
struct Pair<'a> {
    factors: Factors,
    q: Rows<'a>,
    k: Rows<'a>,
    v: Rows<'a>,
    out: Rows<'a>,
    dout: Rows<'a>,
    lse: &'a [f32],
    scale: f32,
    dropout: Option<Keep>,
    first_row: usize,
}

impl Pair<'_> {
    fn backward(&self, split: usize, splits: usize, dq: &RowsMut<'_>, dk: &RowsMut<'_>, dv: &RowsMut<'_>) {
        let (factors, time, dim) = (self.factors, self.q.rows(), self.q.cols());
        let width = padded(dim);
        with_pieces(2 * dim * BLOCK + 2 * BLOCK * BLOCK + 3 * BLOCK * width + 2 * BLOCK, |mut pieces| {
            let [qt, dot] = std::array::from_fn(|_| pieces.take(dim * BLOCK));
            let [p, ds] = std::array::from_fn(|_| pieces.take(BLOCK * BLOCK));
            let [q, dout, packed] = std::array::from_fn(|_| pieces.take(BLOCK * width));
            let [lse, delta] = std::array::from_fn(|_| pieces.take(BLOCK));
            for first in (split * BLOCK..time).step_by(BLOCK) {
                let last = (first + BLOCK).min(time);
                let queries = last - first;
                let lanes = padded(queries);
                let [q_rows, dout_rows] = [self.q, self.dout].map(|x| x.slice_rows(first, last));
                factors.pack_transposed(qt, BLOCK, q_rows, &[self.scale; BLOCK]);
                factors.pack_transposed(dot, BLOCK, dout_rows, &ONES);
                factors.pack(q, width, q_rows, &ONES);
                factors.pack(dout, width, dout_rows, &ONES);
                delta.fill(0.0);
                row_dots(dout_rows, self.out.slice_rows(first, last), delta);
                lse.fill(0.0);
                lse[..queries].copy_from_slice(&self.lse[first..last]);
                let dropout = self.dropout.map(|d| BlockDropout::new(d, self.first_row + first));
                let [qt, dot] = [&*qt, &*dot].map(|x| factors.packed(x, BLOCK, dim, lanes));
                let [q, dout] = [&*q, &*dout].map(|x| factors.packed(x, width, queries, width));

                let mut is_first = true;
                for from in (0..=first).step_by(BLOCK).filter(|from| split_of(from / BLOCK, splits) == split) {
                    let on_diagonal = from == first;
                    let to = (from + BLOCK).min(time);
                    let keys = to - from;
                    let (k, v) = (self.k.slice_rows(from, to), self.v.slice_rows(from, to));
                    let step = if on_diagonal { STRIP } else { BLOCK };
                    for j in (0..keys).step_by(step).map(|j| j..(j + step).min(keys)) {
                        let i = if on_diagonal { j.start } else { 0 }..lanes;
                        let (k, v) = (k.slice_rows(j.start, j.end), v.slice_rows(j.start, j.end));
                        let [qt, dot] = [qt, dot].map(|x| x.slice_cols(i.start, i.end));
                        factors.product(view_mut(p, BLOCK, j.clone(), i.clone()), Mat::Normal(k), qt, false);
                        factors.product(view_mut(ds, BLOCK, j, i), Mat::Normal(v), dot, false);
                    }
                    softmax_gradient(p, ds, keys, lanes, on_diagonal, lse, delta, self.scale, dropout, from);
                    // the block on the diagonal is the first that adds to these keys
                    for j in (0..keys).step_by(step).map(|j| j..(j + step).min(keys)) {
                        let i = if on_diagonal { j.start } else { 0 }..queries;
                        let rows = from + j.start..from + j.end;
                        for (x, weights, gradient) in [(dout, &*p, dv), (q, &*ds, dk)] {
                            // SAFETY: this task owns these keys, and one block is in use at a time.
                            let gradient = unsafe { gradient.shared_block(rows.clone(), 0..dim) };
                            let a = Mat::Normal(view(weights, BLOCK, j.clone(), i.clone()));
                            factors.product(gradient, a, factors.steps(x, i.clone()), !on_diagonal);
                        }
                    }
                    factors.pack(packed, width, k, &ONES);
                    for i in (0..queries).step_by(step).map(|i| i..(i + step).min(queries)) {
                        let keys = if on_diagonal { i.end } else { keys };
                        // SAFETY: nobody else writes this `dq`.
                        let gradient = unsafe { dq.shared_block(first + i.start..first + i.end, 0..dim) };
                        let a = Mat::Transposed(view(ds, BLOCK, 0..keys, i));
                        factors.product(gradient, a, factors.packed(packed, width, keys, width), !is_first);
                    }
                    is_first = false;
                }
            }
        });
    }
}

simd_fn! {
    /// Turns scores `p` `[keys, lanes]` (rows of [`BLOCK`]) into probabilities, and `ds`, the gradient of these, into
    /// the gradient of the products of queries and keys.
    fn softmax_gradient(
        s: S, p: &mut [f32], ds: &mut [f32], keys: usize, lanes: usize, on_diagonal: bool,
        lse: &[f32], delta: &[f32], scale: f32, dropout: Option<BlockDropout>, first_key: usize,
    ) {
        assert!(p.len() >= keys * BLOCK && ds.len() >= keys * BLOCK && lanes <= BLOCK);
        let scale = s.splat(scale);
        for lane in (0..lanes).step_by(S::LANES) {
            let keys = if on_diagonal { keys.min(lane / STRIP * STRIP + STRIP) } else { keys };
            let query = s.add(s.to_float(s.iota()), s.splat(lane as f32));
            let (lse, delta) = (s.load(&lse[lane..]), s.load(&delta[lane..]));
            let rows = dropout.map(|d| d.rows(s, lane));
            for j in 0..keys {
                let (p, ds) = (&mut p[j * BLOCK + lane..], &mut ds[j * BLOCK + lane..]);
                let mut e = math::exp_nonpositive(s, s.sub(s.load(p), lse));
                if on_diagonal && j > lane {
                    e = s.select(s.lt(query, s.splat(j as f32)), s.zero(), e);
                }
                let mut gradient = s.load(ds);
                if let (Some(dropout), Some(rows)) = (dropout, rows) {
                    let factor = dropout.factor(s, rows, first_key + j);
                    gradient = s.mul(gradient, factor);
                    s.store(p, s.mul(e, factor));
                } else {
                    s.store(p, e);
                }
                s.store(ds, s.mul(s.mul(e, scale), s.sub(gradient, delta)));
            }
        }
    }
}
