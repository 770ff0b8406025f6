//! New tokens of one sequence against the keys and values of all earlier ones: a chunk of a prompt, or one token.

use super::block::{BLOCK, Factors};
use super::forward::query_block;
use super::{Dims, decode};
use crate::cpu::threads::{parallel_for, with_scratch};
use crate::{Rows, RowsMut};

/// Attention of queries at the positions `position..` over a cache that holds the keys and values of all tokens up to the
/// last of them: `out_i = sum over j <= position + i of softmax_j(D^-1/2 q_i . k_j) v_j` in every head.
///
/// `q` and `out` are `[tokens, heads * head_dim]`; the caches `[capacity, heads * head_dim]`, row `t` for token `t`.
///
/// One token goes by [`decode`]. More are computed in blocks as in [`forward`](super::forward), which begin at multiples of
/// the block's size in the whole sequence, so that a block of keys lies on the diagonal or below it: the first block is
/// filled up with zeros in front.
pub fn extend(heads: usize, position: usize, q: Rows<'_>, k_cache: Rows<'_>, v_cache: Rows<'_>, out: RowsMut<'_>) {
    let (tokens, end) = (q.rows(), position + q.rows());
    if tokens == 1 {
        return decode(heads, end, q, k_cache, v_cache, out);
    }
    let head_dim = q.cols() / heads;
    let scale = Dims { batch: 1, time: tokens, heads, head_dim }.scale();
    assert!(q.cols() == heads * head_dim && out.rows() == tokens && out.cols() == q.cols());
    assert!(k_cache.cols() == q.cols() && v_cache.cols() == q.cols() && end <= k_cache.rows().min(v_cache.rows()));
    let first = position / BLOCK;
    let blocks = end.div_ceil(BLOCK) - first;
    parallel_for(heads * blocks, |task| {
        let (head, block) = (task / blocks, first + task % blocks);
        let (from, to) = (block * BLOCK, ((block + 1) * BLOCK).min(end));
        let cols = head * head_dim..(head + 1) * head_dim;
        let [k, v] = [k_cache, v_cache].map(|x| x.slice_cols(cols.start, cols.end).slice_rows(0, to));
        let q = q.slice_cols(cols.start, cols.end);
        let mut lse = [0.0; BLOCK];
        let missing = position.saturating_sub(from);
        let rows = from + missing - position..to - position;
        // SAFETY: these rows and columns of `out` belong to this task alone.
        let mut out = unsafe { out.shared_block(rows.clone(), cols) };
        if missing == 0 {
            return query_block(
                Factors::Single,
                scale,
                q.slice_rows(rows.start, rows.end),
                k,
                v,
                None,
                out,
                &mut lse[..to - from],
            );
        }
        with_scratch(2 * (to - from) * head_dim, |scratch| {
            let (queries, results) = scratch.split_at_mut((to - from) * head_dim);
            let (empty, given) = queries.split_at_mut(missing * head_dim);
            empty.fill(0.0);
            given.chunks_exact_mut(head_dim).zip(rows).for_each(|(to, r)| to.copy_from_slice(q.row(r)));
            let padded = RowsMut::contiguous(results, head_dim);
            query_block(
                Factors::Single,
                scale,
                Rows::contiguous(queries, head_dim),
                k,
                v,
                None,
                padded,
                &mut lse[..to - from],
            );
            let results = results.chunks_exact(head_dim).skip(missing);
            results.enumerate().for_each(|(r, from)| out.row(r).copy_from_slice(from));
        });
    });
}
