//! The forward pass: every task owns one block of queries, and goes over its keys with an online softmax.

use super::block::{BLOCK, Factors, ONES, STRIP, padded, scale_rows, strips, view, view_mut, with_pieces};
use super::{BlockDropout, Dims};
use crate::cpu::math;
use crate::cpu::matmul::Mat;
use crate::cpu::threads::parallel_ranges;
use crate::random::Keep;
use crate::rows::SharedSlice;
use crate::{Rows, RowsMut, simd_fn};

/// Causal attention: `out_i = sum over j <= i of softmax_j(D^-1/2 q_i . k_j) v_j` per sequence and head.
///
/// `q`, `k`, `v`, `out` are `[batch * time, heads * head_dim]`; `lse` `[batch, heads, time]` receives the logarithm of
/// each softmax denominator, which [`backward`](super::backward) needs.
///
/// Dropout acts on the probabilities, after the softmax: probability `(b, h, i, j)` is multiplied by
/// `dropout.at(((b * heads + h) * time + i) << 32 | j)`. The backward pass makes the same mask again.
pub fn forward(
    dims: Dims,
    factors: Factors,
    q: Rows<'_>,
    k: Rows<'_>,
    v: Rows<'_>,
    dropout: Option<Keep>,
    out: RowsMut<'_>,
    lse: &mut [f32],
) {
    for x in [q, k, v, out.as_rows()] {
        assert!(x.rows() == dims.rows() && x.cols() == dims.cols(), "attention sizes do not match {dims:?}");
    }
    assert_eq!(lse.len(), dims.pairs() * dims.time);
    let Dims { time, heads, head_dim, .. } = dims;
    let blocks = time.div_ceil(BLOCK);
    let lse = SharedSlice::new(lse);
    // small sequences: several to a task, so that a task is worth starting
    let grain = (1 << 18) / (time.min(BLOCK) * time * head_dim).max(1);
    parallel_ranges(dims.pairs() * blocks, grain, |range| {
        for task in range {
            let (pair, block) = (task / blocks, task % blocks);
            let cols = pair % heads * head_dim..(pair % heads + 1) * head_dim;
            let first = pair / heads * time;
            let (from, to) = (block * BLOCK, ((block + 1) * BLOCK).min(time));
            let [q, k, v] = [q, k, v].map(|x| x.slice_cols(cols.start, cols.end).slice_rows(first, first + to));
            // SAFETY: these rows and columns of `out`, and this range of `lse`, belong to this task alone.
            let (out, lse) = unsafe {
                (out.shared_block(first + from..first + to, cols), lse.range(pair * time + from..pair * time + to))
            };
            let dropout = dropout.map(|d| BlockDropout::new(d, pair * time + from));
            query_block(factors, dims.scale(), q.slice_rows(from, to), k, v, dropout, out, lse);
        }
    });
}

/// One block of queries, the last of the rows of `k` and `v`.
pub(super) fn query_block(
    factors: Factors,
    scale: f32,
    q: Rows<'_>,
    k: Rows<'_>,
    v: Rows<'_>,
    dropout: Option<BlockDropout>,
    mut out: RowsMut<'_>,
    lse: &mut [f32],
) {
    let (queries, dim) = (q.rows(), q.cols());
    let (lanes, width) = (padded(queries), padded(dim));
    let diagonal = k.rows() - queries;
    with_pieces(dim * BLOCK + BLOCK * BLOCK + 2 * BLOCK * width + 3 * BLOCK, |mut pieces| {
        let qt = pieces.take(dim * BLOCK);
        let p = pieces.take(BLOCK * BLOCK);
        let packed = pieces.take(BLOCK * width);
        let sum = pieces.take(BLOCK * width);
        let [max, denominator, factor] = std::array::from_fn(|_| pieces.take(BLOCK));
        factors.pack_transposed(qt, BLOCK, q, &[scale; BLOCK]);
        let qt = factors.packed(qt, BLOCK, dim, lanes);
        max.fill(f32::NEG_INFINITY);
        denominator.fill(0.0);
        for from in (0..=diagonal).step_by(BLOCK) {
            let on_diagonal = from == diagonal;
            let to = (from + BLOCK).min(k.rows());
            let keys = to - from;
            let k = k.slice_rows(from, to);
            if on_diagonal {
                for j in strips(keys) {
                    let i = j.start..lanes;
                    let a = Mat::Normal(k.slice_rows(j.start, j.end));
                    factors.product(view_mut(p, BLOCK, j, i.clone()), a, qt.slice_cols(i.start, i.end), false);
                }
            } else {
                factors.product(view_mut(p, BLOCK, 0..keys, 0..lanes), Mat::Normal(k), qt, false);
            }
            online_softmax(p, keys, lanes, on_diagonal, max, denominator, factor, dropout, from);
            if from > 0 {
                scale_rows(view_mut(sum, width, 0..queries, 0..width), factor);
            }
            factors.pack(packed, width, v.slice_rows(from, to), &ONES);
            let step = if on_diagonal { STRIP } else { BLOCK };
            for i in (0..queries).step_by(step) {
                let end = (i + step).min(queries);
                let keys = if on_diagonal { end } else { keys };
                let a = Mat::Transposed(view(p, BLOCK, 0..keys, i..end));
                factors.product(
                    view_mut(sum, width, i..end, 0..width),
                    a,
                    factors.packed(packed, width, keys, width),
                    from > 0,
                );
            }
        }
        for i in 0..queries {
            let factor = 1.0 / denominator[i];
            out.row(i).iter_mut().zip(&sum[i * width..]).for_each(|(out, sum)| *out = sum * factor);
            lse[i] = max[i] + denominator[i].ln();
        }
    });
}

simd_fn! {
    /// Replaces scores `[keys, lanes]` (rows of [`BLOCK`]) by `exp(score - max)`, brings `max` and `denominator` up to
    /// date, and leaves in `factor` what earlier sums are to be multiplied with.
    fn online_softmax(
        s: S, p: &mut [f32], keys: usize, lanes: usize, on_diagonal: bool,
        max: &mut [f32], denominator: &mut [f32], factor: &mut [f32],
        dropout: Option<BlockDropout>, first_key: usize,
    ) {
        assert!(p.len() >= keys * BLOCK && lanes <= BLOCK);
        for lane in (0..lanes).step_by(S::LANES) {
            let keys = if on_diagonal { keys.min(lane / STRIP * STRIP + STRIP) } else { keys };
            let query = s.add(s.to_float(s.iota()), s.splat(lane as f32));
            let masked = |j: usize, x: S::F| {
                if on_diagonal && j > lane {
                    s.select(s.lt(query, s.splat(j as f32)), s.splat(f32::NEG_INFINITY), x)
                } else {
                    x
                }
            };
            let old = s.load(&max[lane..]);
            let mut new = old;
            for j in 0..keys {
                new = s.max(new, masked(j, s.load(&p[j * BLOCK + lane..])));
            }
            let change = math::exp_nonpositive(s, s.sub(old, new));
            let mut sum = s.mul(change, s.load(&denominator[lane..]));
            if let Some(dropout) = dropout {
                let rows = dropout.rows(s, lane);
                for j in 0..keys {
                    let x = &mut p[j * BLOCK + lane..];
                    let e = math::exp_nonpositive(s, s.sub(masked(j, s.load(x)), new));
                    sum = s.add(sum, e);
                    s.store(x, s.mul(e, dropout.factor(s, rows, first_key + j)));
                }
            } else {
                for j in 0..keys {
                    let x = &mut p[j * BLOCK + lane..];
                    let e = math::exp_nonpositive(s, s.sub(masked(j, s.load(x)), new));
                    sum = s.add(sum, e);
                    s.store(x, e);
                }
            }
            s.store(&mut max[lane..], new);
            s.store(&mut denominator[lane..], sum);
            s.store(&mut factor[lane..], change);
        }
    }
}
