//! The exact form, with the row normaliser.

use super::{Decay, Dims, Keys, Queries, add_absolutes, forward_block, gradient_block, part, part_mut};
use crate::cpu::attention::block::{
    BLOCK, Factors, ONES, key_splits, pack, padded, split_of, sum_splits, view, view_mut, with_pieces,
};
use crate::cpu::threads::{parallel_ranges, with_scratch};
use crate::rows::SharedSlice;
use crate::{Rows, RowsMut};

/// Decays below `2^-80` are left out: in f32 they change no sum, unless scores differ by a factor of `2^56`.
const NEGLIGIBLE: f64 = -80.0 * std::f64::consts::LN_2;

/// The first key that a block of queries from `first` on looks at, a multiple of [`BLOCK`].
fn first_key(decay: Decay, first: usize) -> usize {
    let reach = (NEGLIGIBLE / decay.log).min(first as f64) as usize;
    (first - reach) / BLOCK * BLOCK
}

/// Parallel retention, `y_i = sum over j <= i of a_ij v_j / n_i` as in the [module](super).
///
/// `normalizer` `[batch, heads, time]` receives `n_i`, which [`parallel_backward`] needs.
pub fn parallel_forward(
    dims: Dims,
    factors: Factors,
    q: Rows<'_>,
    k: Rows<'_>,
    v: Rows<'_>,
    y: RowsMut<'_>,
    normalizer: &mut [f32],
) {
    dims.check(&[q, k], &[v, y.as_rows()]);
    assert_eq!(normalizer.len(), dims.pairs() * dims.time);
    let Dims { time, heads, key_dim, value_dim, .. } = dims;
    let blocks = time.div_ceil(BLOCK);
    let normalizer = SharedSlice::new(normalizer);
    let grain = (1 << 19) / (time.min(BLOCK) * time * (key_dim + value_dim)).max(1);
    parallel_ranges(dims.pairs() * blocks, grain, |range| {
        for task in range {
            let (pair, block) = (task / blocks, task % blocks);
            let (from, to) = (block * BLOCK, ((block + 1) * BLOCK).min(time));
            let [q, k] = [q, k].map(|x| part(x, dims, pair, key_dim).slice_rows(0, to));
            let v = part(v, dims, pair, value_dim).slice_rows(0, to);
            // SAFETY: these rows and columns of `y`, and this range, belong to this task alone.
            let (y, normalizer) = unsafe {
                (part_mut(&y, dims, pair, value_dim, from..to), normalizer.range(pair * time + from..pair * time + to))
            };
            query_block(factors, Decay::new(pair % heads), from, q.slice_rows(from, to), k, v, y, normalizer);
        }
    });
}

/// The queries from token `first` on, which are the last that `k` and `v` have.
fn query_block(
    factors: Factors,
    decay: Decay,
    first: usize,
    q: Rows<'_>,
    k: Rows<'_>,
    v: Rows<'_>,
    mut y: RowsMut<'_>,
    normalizer: &mut [f32],
) {
    let (queries, key_dim, value_dim) = (q.rows(), q.cols(), v.cols());
    let (lanes, width) = (padded(queries), padded(value_dim));
    with_pieces(key_dim * BLOCK + BLOCK * BLOCK + 2 * BLOCK * width + 4 * BLOCK, |mut pieces| {
        let qt = pieces.take(key_dim * BLOCK);
        let p = pieces.take(BLOCK * BLOCK);
        let [packed, sum] = std::array::from_fn(|_| pieces.take(BLOCK * width));
        let [rising, key_weight, query_weight, norm] = std::array::from_fn(|_| pieces.take(BLOCK));
        decay.powers(0.0, -1.0, rising);
        for (i, weight) in query_weight.iter_mut().enumerate() {
            *weight = (decay.power(i as f64) / decay.mass(first + i).sqrt()) as f32;
        }
        factors.pack_transposed(qt, BLOCK, q, query_weight);
        let qt = factors.packed(qt, BLOCK, key_dim, lanes);
        norm.fill(0.0);
        let start = first_key(decay, first);
        for from in (start..=first).step_by(BLOCK) {
            let on_diagonal = from == first;
            let to = (from + BLOCK).min(k.rows());
            set_key_weights(decay, first - from, rising, key_weight);
            factors.pack(packed, width, v.slice_rows(from, to), key_weight);
            let scores = |p: &[f32]| add_absolutes(p, to - from, lanes, on_diagonal, key_weight, norm);
            let sum = view_mut(sum, width, 0..queries, 0..width);
            let v = factors.packed(packed, width, to - from, width);
            forward_block(factors, qt, k.slice_rows(from, to), v, on_diagonal, p, scores, sum, from > start);
        }
        for i in 0..queries {
            normalizer[i] = norm[i].clamp(1.0, 5e4);
            let factor = 1.0 / normalizer[i];
            y.row(i).iter_mut().zip(&sum[i * width..]).for_each(|(y, sum)| *y = sum * factor);
        }
    });
}

/// `gamma^(lag - j)` for the keys `j` of a block `lag` tokens before the queries; `rising` holds `gamma^-j`.
fn set_key_weights(decay: Decay, lag: usize, rising: &[f32], weights: &mut [f32]) {
    let base = decay.power(lag as f64) as f32;
    weights.iter_mut().zip(rising).for_each(|(weight, rising)| *weight = base * rising);
}

/// Gradients of [`parallel_forward`] from its `normalizer`, a constant here, and the gradient `dy`:
///
/// ```text
/// dA = dy v^T / n,   dS = dA D,   dq = dS k,   dk = dS^T q,   dv = (a / n)^T dy
/// ```
#[allow(clippy::too_many_arguments)] // one for each tensor
pub fn parallel_backward(
    dims: Dims,
    factors: Factors,
    q: Rows<'_>,
    k: Rows<'_>,
    v: Rows<'_>,
    normalizer: &[f32],
    dy: Rows<'_>,
    dq: RowsMut<'_>,
    dk: RowsMut<'_>,
    dv: RowsMut<'_>,
) {
    dims.check(&[q, k, dq.as_rows(), dk.as_rows()], &[v, dy, dv.as_rows()]);
    assert_eq!(normalizer.len(), dims.pairs() * dims.time);
    let Dims { time, heads, key_dim, value_dim, .. } = dims;
    let pairs = dims.pairs();
    let splits = key_splits(pairs, time.div_ceil(BLOCK));
    let partials = if splits > 1 { splits * pairs * time * key_dim } else { 0 };
    with_scratch(partials, |memory| {
        let partial = SharedSlice::new(memory);
        let grain = (1 << 19) / (time * time * (key_dim + value_dim)).max(1);
        parallel_ranges(pairs * splits, grain, |range| {
            for task in range {
                let (pair, split) = (task / splits, task % splits);
                // SAFETY: of these rows and columns this task writes the blocks of keys that it owns, and (in `dq`, if
                // pairs are not split, else in its own partial sum) the queries.
                let (dq, dk, dv) = unsafe {
                    let dq = if splits > 1 {
                        let size = time * key_dim;
                        let from = (split * pairs + pair) * size;
                        RowsMut::contiguous(partial.range(from..from + size), key_dim)
                    } else {
                        part_mut(&dq, dims, pair, key_dim, 0..time)
                    };
                    (dq, part_mut(&dk, dims, pair, key_dim, 0..time), part_mut(&dv, dims, pair, value_dim, 0..time))
                };
                let pair = Pair {
                    factors,
                    decay: Decay::new(pair % heads),
                    q: part(q, dims, pair, key_dim),
                    k: part(k, dims, pair, key_dim),
                    v: part(v, dims, pair, value_dim),
                    dy: part(dy, dims, pair, value_dim),
                    normalizer: &normalizer[pair * time..(pair + 1) * time],
                };
                pair.backward(split, splits, dq, &dk, &dv);
            }
        });
        if splits > 1 {
            // SAFETY: all tasks are done.
            let partial = unsafe { partial.range(0..partials) };
            sum_splits(partial, splits, pairs, heads, time, key_dim, &dq);
        }
    });
}

/// One head of one sequence.
struct Pair<'a> {
    factors: Factors,
    decay: Decay,
    q: Rows<'a>,
    k: Rows<'a>,
    v: Rows<'a>,
    dy: Rows<'a>,
    normalizer: &'a [f32],
}

impl Pair<'_> {
    fn backward(&self, split: usize, splits: usize, mut dq: RowsMut<'_>, dk: &RowsMut<'_>, dv: &RowsMut<'_>) {
        let (factors, decay) = (self.factors, self.decay);
        let (time, key_dim, value_dim) = (self.q.rows(), self.q.cols(), self.v.cols());
        let (key_width, value_width) = (padded(key_dim), padded(value_dim));
        let memory = (key_dim + value_dim + 2 * BLOCK + 3 * key_width + 2 * value_width + 3) * BLOCK;
        with_pieces(memory, |mut pieces| {
            let (qt, dyt) = (pieces.take(key_dim * BLOCK), pieces.take(value_dim * BLOCK));
            let [p, ds] = std::array::from_fn(|_| pieces.take(BLOCK * BLOCK));
            let [q, weighted, plain] = std::array::from_fn(|_| pieces.take(BLOCK * key_width));
            let [dy, v] = std::array::from_fn(|_| pieces.take(BLOCK * value_width));
            let [rising, key_weight, query_weight] = std::array::from_fn(|_| pieces.take(BLOCK));
            decay.powers(0.0, -1.0, rising);
            for first in (split * BLOCK..time).step_by(BLOCK) {
                let last = (first + BLOCK).min(time);
                let queries = last - first;
                let lanes = padded(queries);
                for (i, weight) in query_weight.iter_mut().enumerate().take(queries) {
                    let norm = decay.mass(first + i).sqrt() * self.normalizer[first + i] as f64;
                    *weight = (decay.power(i as f64) / norm) as f32;
                }
                let (q_rows, dy_rows) = (self.q.slice_rows(first, last), self.dy.slice_rows(first, last));
                factors.pack_transposed(qt, BLOCK, q_rows, &ONES);
                factors.pack_transposed(dyt, BLOCK, dy_rows, query_weight);
                factors.pack(q, key_width, q_rows, &ONES);
                factors.pack(dy, value_width, dy_rows, query_weight);
                let from_queries = Queries {
                    qt: factors.packed(qt, BLOCK, key_dim, lanes),
                    q: factors.packed(q, key_width, queries, key_width),
                    dyt: factors.packed(dyt, BLOCK, value_dim, lanes),
                    dy: factors.packed(dy, value_width, queries, value_width),
                };

                let mut is_first = true;
                let start = first_key(decay, first);
                for from in (start..=first).step_by(BLOCK).filter(|from| split_of(from / BLOCK, splits) == split) {
                    let on_diagonal = from == first;
                    let to = (from + BLOCK).min(time);
                    let keys = to - from;
                    set_key_weights(decay, first - from, rising, key_weight);
                    let (k_rows, v_rows) = (self.k.slice_rows(from, to), self.v.slice_rows(from, to));
                    pack(weighted, key_width, k_rows, key_weight);
                    factors.pack(plain, key_width, k_rows, &ONES);
                    pack(v, value_width, v_rows, key_weight);
                    let from_keys = Keys {
                        weighted: view(weighted, key_width, 0..keys, 0..key_dim),
                        plain: factors.packed(plain, key_width, keys, key_width),
                        v: view(v, value_width, 0..keys, 0..value_dim),
                    };
                    // SAFETY: this task owns these keys, and nobody else writes this `dq`.
                    let (dq, dk, dv) = unsafe {
                        (
                            dq.shared_block(first..last, 0..key_dim),
                            dk.shared_block(from..to, 0..key_dim),
                            dv.shared_block(from..to, 0..value_dim),
                        )
                    };
                    // the block on the diagonal is the first that adds to these keys
                    let keys_to = (dk, dv, !on_diagonal);
                    gradient_block(
                        factors,
                        from_queries,
                        from_keys,
                        on_diagonal,
                        [&mut *p, &mut *ds],
                        (dq, !is_first),
                        keys_to,
                    );
                    is_first = false;
                }
                if is_first {
                    // every key of this split is out of reach
                    (first..last).for_each(|t| dq.row(t).fill(0.0));
                }
            }
        });
    }
}
