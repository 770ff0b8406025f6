//! One new token per sequence against the keys and values of all earlier ones.

use super::block::padded;
use crate::cpu::math;
use crate::cpu::threads::{parallel_for, with_scratch};
use crate::rows::SharedSlice;
use crate::{Rows, RowsMut, simd_fn};

/// Keys that one task takes.
const PART: usize = 256;

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
    let (pairs, parts) = (batch * heads, len.div_ceil(PART));
    // a partial result: sum [dim], maximum, denominator
    let size = padded(dim + 2);
    with_scratch(pairs * parts * size, |memory| {
        let results = SharedSlice::new(memory);
        parallel_for(pairs * parts, |task| {
            let (pair, part) = (task / parts, task % parts);
            let batch = pair / heads;
            let (from, to) = (batch * capacity + part * PART, batch * capacity + ((part + 1) * PART).min(len));
            // SAFETY: each task has its own range.
            let result = unsafe { results.range(task * size..(task + 1) * size) };
            let [q, k, v] = [q, k_cache, v_cache].map(|x| x.slice_cols(pair % heads * dim, (pair % heads + 1) * dim));
            decode_part(q.row(batch), k.slice_rows(from, to), v.slice_rows(from, to), result);
        });
        for pair in 0..pairs {
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
    /// The softmax-weighted sum of `v` without division, then the maximum and the denominator.
    fn decode_part(s: S, q: &[f32], k: Rows<'_>, v: Rows<'_>, result: &mut [f32]) {
        let dim = q.len();
        let mut p = [0.0f32; PART];
        let scale = 1.0 / (dim as f32).sqrt();
        let mut max = f32::NEG_INFINITY;
        for (j, p) in p.iter_mut().enumerate().take(k.rows()) {
            let k = k.row(j);
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
            *p = scale * s.sum(s.add(sum0, sum1));
            max = max.max(*p);
        }
        let mut denominator = s.zero();
        p[k.rows()..].fill(f32::NEG_INFINITY);
        for p in p.chunks_exact_mut(S::LANES) {
            let e = math::exp_nonpositive(s, s.sub(s.load(p), s.splat(max)));
            denominator = s.add(denominator, e);
            s.store(p, e);
        }
        let mut c = 0;
        while c + 4 * S::LANES <= dim {
            let mut sum = [s.zero(); 4];
            for (j, &p) in p.iter().enumerate().take(v.rows()) {
                let v = &v.row(j)[c..];
                let p = s.splat(p);
                for (i, sum) in sum.iter_mut().enumerate() {
                    *sum = s.fma(p, s.load(&v[i * S::LANES..]), *sum);
                }
            }
            for (i, sum) in sum.into_iter().enumerate() {
                s.store(&mut result[c + i * S::LANES..], sum);
            }
            c += 4 * S::LANES;
        }
        while c < dim {
            let n = (dim - c).min(S::LANES);
            let mut sum = s.zero();
            for (j, &p) in p.iter().enumerate().take(v.rows()) {
                sum = s.fma(s.splat(p), s.load_partial(&v.row(j)[c..], n), sum);
            }
            s.store_partial(&mut result[c..], n, sum);
            c += n;
        }
        result[dim] = max;
        result[dim + 1] = s.sum(denominator);
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
