//! One new token per sequence against the keys and values of all earlier ones.

use super::block::padded;
use crate::cpu::math;
use crate::cpu::simd::fetch;
use crate::cpu::threads::{parallel_for, with_scratch};
use crate::rows::SharedSlice;
use crate::{Rows, RowsMut, simd_fn};

/// Keys that one task takes.
const PART: usize = 256;
/// Rows of the cache that are fetched ahead of the one in use.
const AHEAD: usize = 4;
/// Columns that a task takes, as heads side by side: memory is read fast in long pieces.
const WIDTH: usize = 256;
/// The most heads of a task.
const MOST_TOGETHER: usize = 8;

/// Attention of one query per sequence over the first `len` rows of a cache:
/// `out = sum over j < len of softmax_j(D^-1/2 q . k_j) v_j` per sequence and head.
///
/// `q` and `out` are `[batch, heads * head_dim]`; the caches are `[batch * capacity, heads * head_dim]`, row
/// `b * capacity + t` for token `t` of sequence `b`, with the newest token already in place.
///
/// Reading the cache once is nearly all of the time. Long caches are cut into parts of a fixed number of keys, each
/// with its own softmax, that run in parallel and are put together in order ("flash decoding").
pub fn decode(heads: usize, len: usize, q: Rows<'_>, k_cache: Rows<'_>, v_cache: Rows<'_>, out: RowsMut<'_>) {
    let batch = q.rows();
    if batch == 0 {
        return;
    }
    let (capacity, dim) = (k_cache.rows() / batch, q.cols() / heads);
    assert!(q.cols() == heads * dim && out.rows() == batch && out.cols() == q.cols());
    for cache in [k_cache, v_cache] {
        assert!(cache.rows() == batch * capacity && cache.cols() == q.cols());
    }
    assert!(0 < len && len <= capacity, "{len} keys in a cache of {capacity}");
    let parts = len.div_ceil(PART);
    // a partial result: sum [dim], maximum, denominator
    let size = padded(dim + 2);
    let together = (WIDTH / dim).clamp(1, MOST_TOGETHER).min(heads);
    let groups = heads.div_ceil(together);
    with_scratch(batch * heads * parts * size, |memory| {
        let results = SharedSlice::new(memory);
        parallel_for(batch * groups * parts, |task| {
            let (row, part) = (task / parts, task % parts);
            let (batch, first) = (row / groups, row % groups * together);
            let last = (first + together).min(heads);
            let (from, to) = (batch * capacity + part * PART, batch * capacity + ((part + 1) * PART).min(len));
            let [q, k, v] = [q, k_cache, v_cache].map(|x| x.slice_cols(first * dim, last * dim));
            // those of a head lie behind each other
            let place = |head: usize| ((batch * heads + first + head) * parts + part) * size;
            let mut out: [&mut [f32]; MOST_TOGETHER] = std::array::from_fn(|head| match head < last - first {
                // SAFETY: each head and part has its own range.
                true => unsafe { results.range(place(head)..place(head) + size) },
                false => &mut [],
            });
            let out = &mut out[..last - first];
            decode_part(dim, q.row(batch), k.slice_rows(from, to), v.slice_rows(from, to), out);
        });
        for pair in 0..batch * heads {
            let (batch, head) = (pair / heads, pair % heads);
            // SAFETY: all tasks are done, and `out` is exclusively borrowed.
            let (results, mut out) = unsafe {
                (
                    results.range(pair * parts * size..(pair + 1) * parts * size),
                    out.shared_block(batch..batch + 1, head * dim..(head + 1) * dim),
                )
            };
            combine(results, size, out.row(0));
        }
    });
}

simd_fn! {
    /// For each head of `dim` columns the softmax-weighted sum of `v` without division, then the maximum and the denominator.
    /// Keys and values are read row by row over all heads, as they lie in memory.
    fn decode_part(s: S, dim: usize, q: &[f32], k: Rows<'_>, v: Rows<'_>, results: &mut [&mut [f32]]) {
        let mut weights = [[0.0f32; PART]; MOST_TOGETHER];
        let weights = &mut weights[..results.len()];
        let scale = 1.0 / (dim as f32).sqrt();
        let keys = k.rows();
        for j in 0..keys {
            fetch(k.row((j + AHEAD).min(keys - 1)));
            let k = k.row(j);
            for (head, p) in weights.iter_mut().enumerate() {
                let (q, k) = (&q[head * dim..(head + 1) * dim], &k[head * dim..(head + 1) * dim]);
                let (mut sum0, mut sum1) = (s.zero(), s.zero());
                let mut c = 0;
                while c + 2 * S::LANES <= dim {
                    sum0 = s.fma(s.load(&q[c..]), s.load(&k[c..]), sum0);
                    sum1 = s.fma(s.load(&q[c + S::LANES..]), s.load(&k[c + S::LANES..]), sum1);
                    c += 2 * S::LANES;
                }
                while c < dim {
                    let n = (dim - c).min(S::LANES);
                    sum0 = s.fma(s.load_partial(&q[c..], n), s.load_partial(&k[c..], n), sum0);
                    c += n;
                }
                p[j] = scale * s.sum(s.add(sum0, sum1));
            }
        }
        for (p, result) in weights.iter_mut().zip(results.iter_mut()) {
            let max = p[..keys].iter().fold(f32::NEG_INFINITY, |max, p| max.max(*p));
            p[keys..].fill(f32::NEG_INFINITY);
            let mut denominator = s.zero();
            for p in p.chunks_exact_mut(S::LANES) {
                let e = math::exp_nonpositive(s, s.sub(s.load(p), s.splat(max)));
                denominator = s.add(denominator, e);
                s.store(p, e);
            }
            result[..dim].fill(0.0);
            result[dim] = max;
            result[dim + 1] = s.sum(denominator);
        }
        // four rows at a time, so that sums are read and written less often; weights behind the last row are 0
        for j in (0..keys).step_by(4) {
            let rows = [0, 1, 2, 3].map(|i| (j + i).min(keys - 1));
            for row in rows {
                fetch(v.row((row + AHEAD).min(keys - 1)));
            }
            for (head, (p, result)) in weights.iter().zip(results.iter_mut()).enumerate() {
                let mut c = 0;
                while c + S::LANES <= dim {
                    let mut sum = s.load(&result[c..]);
                    for (i, row) in rows.into_iter().enumerate() {
                        sum = s.fma(s.splat(p[j + i]), s.load(&v.row(row)[head * dim + c..]), sum);
                    }
                    s.store(&mut result[c..], sum);
                    c += S::LANES;
                }
                if c < dim {
                    let mut sum = s.load_partial(&result[c..], dim - c);
                    for (i, row) in rows.into_iter().enumerate() {
                        sum = s.fma(s.splat(p[j + i]), s.load_partial(&v.row(row)[head * dim + c..], dim - c), sum);
                    }
                    s.store_partial(&mut result[c..], dim - c, sum);
                }
            }
        }
    }

    /// Puts the parts of one query together.
    fn combine(s: S, parts: &[f32], size: usize, out: &mut [f32]) {
        let dim = out.len();
        let max = parts.chunks_exact(size).fold(f32::NEG_INFINITY, |max, part| max.max(part[dim]));
        let denominator: f32 = parts.chunks_exact(size).map(|part| part[dim + 1] * (part[dim] - max).exp()).sum();
        out.fill(0.0);
        for part in parts.chunks_exact(size) {
            let weight = s.splat((part[dim] - max).exp() / denominator);
            let mut c = 0;
            while c < dim {
                let n = (dim - c).min(S::LANES);
                let sum = s.fma(weight, s.load_partial(&part[c..], n), s.load_partial(&out[c..], n));
                s.store_partial(&mut out[c..], n, sum);
                c += n;
            }
        }
    }
}
