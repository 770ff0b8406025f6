//! The chunkwise form without the row normaliser, in linear time.
//!
//! The state after a chunk that ends before token `e` is `U = sum over j < e of gamma^(e-1-j) k_j^T v_j`. Three passes:
//! what every chunk adds to the state (a product, all chunks in parallel), a scan over the chunks (elementwise), and the
//! results (again all chunks in parallel): pairs of tokens within the chunk as in the exact form, the rest through the
//! state. The backward pass runs the scan the other way. So few sequences and heads keep all threads busy too.

use super::{Decay, Dims, Keys, Queries, forward_block, gradient_block, part, part_mut};
use crate::cpu::attention::block::{BLOCK, Factors, ONES, pack, pack_transposed, padded, product, view, with_pieces};
use crate::cpu::matmul::Mat;
use crate::cpu::threads::{parallel_for, parallel_ranges, with_scratch};
use crate::rows::SharedSlice;
use crate::{Rows, RowsMut, simd_fn};

/// Elements of a state that one task of the scan takes.
const SCAN: usize = 2048;

impl Dims {
    fn chunks(&self) -> usize {
        self.time.div_ceil(BLOCK)
    }

    fn state(&self) -> usize {
        self.key_dim * self.value_dim
    }

    /// The tokens of a chunk.
    fn chunk(&self, chunk: usize) -> std::ops::Range<usize> {
        chunk * BLOCK..((chunk + 1) * BLOCK).min(self.time)
    }

    /// Runs `task(pair, chunk)` for all of them, in parallel.
    fn for_chunks(&self, task: impl Fn(usize, usize) + Sync + Send) {
        let chunks = self.chunks();
        let grain =
            (1 << 19) / (self.time.min(BLOCK) * (self.state() + BLOCK * (self.key_dim + self.value_dim))).max(1);
        parallel_ranges(self.pairs() * chunks, grain, |range| range.for_each(|i| task(i / chunks, i % chunks)));
    }
}

/// Elements of the states that [`chunk_forward`] saves: `[batch, heads, ceil(time / 64), key_dim, value_dim]`.
pub fn chunk_states_len(dims: Dims) -> usize {
    dims.pairs() * dims.chunks() * dims.state()
}

/// Retention without the row normaliser, `y_i = sum over j <= i of (q_i . k_j) D_ij v_j` as in the [module](super).
///
/// `states` ([`chunk_states_len`]) receives the state after every chunk of 64 tokens, which [`chunk_backward`]
/// needs.
pub fn chunk_forward(dims: Dims, q: Rows<'_>, k: Rows<'_>, v: Rows<'_>, y: RowsMut<'_>, states: &mut [f32]) {
    forward_from(dims, 0, None, q, k, v, y, states);
}

/// [`chunk_forward`] for tokens from position `start` on, with the state before them, `[batch, heads, key_dim, value_dim]`.
#[allow(clippy::too_many_arguments)] // one for each tensor
pub(super) fn forward_from(
    dims: Dims,
    start: usize,
    initial: Option<&[f32]>,
    q: Rows<'_>,
    k: Rows<'_>,
    v: Rows<'_>,
    y: RowsMut<'_>,
    states: &mut [f32],
) {
    dims.check(&[q, k], &[v, y.as_rows()]);
    assert_eq!(states.len(), chunk_states_len(dims));
    let Dims { heads, key_dim, value_dim, .. } = dims;
    let (size, chunks) = (dims.state(), dims.chunks());
    let width = padded(value_dim);
    let shared = SharedSlice::new(states);
    dims.for_chunks(|pair, chunk| {
        let tokens = dims.chunk(chunk);
        let k = part(k, dims, pair, key_dim).slice_rows(tokens.start, tokens.end);
        let v = part(v, dims, pair, value_dim).slice_rows(tokens.start, tokens.end);
        let at = (pair * chunks + chunk) * size;
        // SAFETY: this state belongs to this task alone.
        let state = RowsMut::contiguous(unsafe { shared.range(at..at + size) }, value_dim);
        with_pieces(BLOCK * width + BLOCK, |mut pieces| {
            let (packed, weights) = (pieces.take(BLOCK * width), pieces.take(BLOCK));
            Decay::new(pair % heads).powers(tokens.len() as f64 - 1.0, -1.0, &mut weights[..tokens.len()]);
            pack(packed, width, v, weights);
            product(state, Mat::Transposed(k), view(packed, width, 0..tokens.len(), 0..width), false);
        });
        if let (0, Some(initial)) = (chunk, initial) {
            let factor = Decay::new(pair % heads).power(tokens.len() as f64) as f32;
            // SAFETY: as above, and the product is done.
            add_scaled(unsafe { shared.range(at..at + size) }, factor, &initial[pair * size..][..size]);
        }
    });
    scan(dims, shared, false);
    let states = &*states;
    dims.for_chunks(|pair, chunk| {
        let tokens = dims.chunk(chunk);
        let [q, k] = [q, k].map(|x| part(x, dims, pair, key_dim).slice_rows(tokens.start, tokens.end));
        let v = part(v, dims, pair, value_dim).slice_rows(tokens.start, tokens.end);
        // SAFETY: these rows and columns belong to this task alone.
        let y = unsafe { part_mut(&y, dims, pair, value_dim, tokens.clone()) };
        let before = match chunk {
            0 => initial.map(|initial| &initial[pair * size..][..size]),
            _ => Some(&states[(pair * chunks + chunk - 1) * size..][..size]),
        };
        results(Decay::new(pair % heads), start + tokens.start, q, k, v, before, y);
    });
}

/// Weight of query `i` of a chunk of `len` tokens, `gamma^(i - (len - 1)) / sqrt(sum of the mask's row)`; that of key `j`
/// is `gamma^(len - 1 - j)`, as in the state.
fn query_weights(decay: Decay, first: usize, len: usize, weights: &mut [f32]) {
    for (i, weight) in weights.iter_mut().enumerate().take(len) {
        *weight = (decay.power(i as f64 - (len as f64 - 1.0)) / decay.mass(first + i).sqrt()) as f32;
    }
}

/// The results of a chunk from token `first` on; `before` is the state before it.
fn results(decay: Decay, first: usize, q: Rows<'_>, k: Rows<'_>, v: Rows<'_>, before: Option<&[f32]>, y: RowsMut<'_>) {
    let (len, key_dim, value_dim) = (q.rows(), q.cols(), v.cols());
    let (lanes, width) = (padded(len), padded(value_dim));
    with_pieces(key_dim * BLOCK + BLOCK * BLOCK + BLOCK * width + key_dim * width + 2 * BLOCK, |mut pieces| {
        let qt = pieces.take(key_dim * BLOCK);
        let p = pieces.take(BLOCK * BLOCK);
        let (packed, state) = (pieces.take(BLOCK * width), pieces.take(key_dim * width));
        let [query_weight, key_weight] = std::array::from_fn(|_| pieces.take(BLOCK));
        query_weights(decay, first, len, query_weight);
        decay.powers(len as f64 - 1.0, -1.0, &mut key_weight[..len]);
        pack_transposed(qt, BLOCK, q, query_weight);
        pack(packed, width, v, key_weight);
        if let Some(before) = before {
            pack(state, width, Rows::contiguous(before, value_dim), &[decay.power(len as f64) as f32]);
            // SAFETY: `y` is not used until the product is done.
            let y = unsafe { y.shared_block(0..len, 0..value_dim) };
            let a = Mat::Transposed(view(qt, BLOCK, 0..key_dim, 0..len));
            product(y, a, view(state, width, 0..key_dim, 0..width), false);
        }
        let (qt, v) = (view(qt, BLOCK, 0..key_dim, 0..lanes), view(packed, width, 0..len, 0..width));
        forward_block(Factors::Single, qt, k, v, true, p, |_| (), y, before.is_some());
    });
}

/// Adds to the state of every chunk that of the chunk before, decayed; or, in reverse, to the gradient of every chunk
/// that of the chunk after.
fn scan(dims: Dims, states: SharedSlice<'_, f32>, reverse: bool) {
    let (size, chunks) = (dims.state(), dims.chunks());
    let parts = size.div_ceil(SCAN);
    parallel_for(dims.pairs() * parts, |task| {
        let (pair, part) = (task / parts, task % parts);
        let decay = Decay::new(pair % dims.heads);
        let range = part * SCAN..((part + 1) * SCAN).min(size);
        for n in 1..chunks {
            let (from, to) = if reverse { (chunks - n, chunks - n - 1) } else { (n - 1, n) };
            // a state decays over the chunk behind it
            let factor = decay.power(dims.chunk(from.max(to)).len() as f64) as f32;
            let at =
                |chunk: usize| (pair * chunks + chunk) * size + range.start..(pair * chunks + chunk) * size + range.end;
            // SAFETY: two different states, and of each the part that belongs to this task alone.
            let (from, to) = unsafe { (states.range(at(from)), states.range(at(to))) };
            add_scaled(to, factor, from);
        }
    });
}

/// Gradients of [`chunk_forward`] from its `states` and the gradient `dy`. What happens within a chunk is computed again.
#[allow(clippy::too_many_arguments)] // one for each tensor
pub fn chunk_backward(
    dims: Dims,
    q: Rows<'_>,
    k: Rows<'_>,
    v: Rows<'_>,
    states: &[f32],
    dy: Rows<'_>,
    dq: RowsMut<'_>,
    dk: RowsMut<'_>,
    dv: RowsMut<'_>,
) {
    dims.check(&[q, k, dq.as_rows(), dk.as_rows()], &[v, dy, dv.as_rows()]);
    assert_eq!(states.len(), chunk_states_len(dims));
    let Dims { heads, key_dim, value_dim, .. } = dims;
    let (size, chunks) = (dims.state(), dims.chunks());
    let width = padded(value_dim);
    with_scratch(states.len(), |memory| {
        // of chunk c: the gradient of gamma^len times the state before it, by way of this and all later chunks
        let shared = SharedSlice::new(memory);
        dims.for_chunks(|pair, chunk| {
            let tokens = dims.chunk(chunk);
            let q = part(q, dims, pair, key_dim).slice_rows(tokens.start, tokens.end);
            let dy = part(dy, dims, pair, value_dim).slice_rows(tokens.start, tokens.end);
            let at = (pair * chunks + chunk) * size;
            // SAFETY: this state belongs to this task alone.
            let state = RowsMut::contiguous(unsafe { shared.range(at..at + size) }, value_dim);
            with_pieces(BLOCK * width + BLOCK, |mut pieces| {
                let (packed, weights) = (pieces.take(BLOCK * width), pieces.take(BLOCK));
                query_weights(Decay::new(pair % heads), tokens.start, tokens.len(), weights);
                pack(packed, width, dy, weights);
                product(state, Mat::Transposed(q), view(packed, width, 0..tokens.len(), 0..width), false);
            });
        });
        scan(dims, shared, true);
        // SAFETY: nobody writes it any more.
        let gradients = &*unsafe { shared.range(0..shared.len()) };
        dims.for_chunks(|pair, chunk| {
            let state = |states, chunk: usize| -> Rows<'_> {
                let states: &[f32] = states;
                Rows::contiguous(&states[(pair * chunks + chunk) * size..][..size], value_dim)
            };
            let tokens = dims.chunk(chunk);
            let cut = |x| Rows::slice_rows(&x, tokens.start, tokens.end);
            // SAFETY: these rows and columns belong to this task alone.
            let [dq, dk, dv] = [(&dq, key_dim), (&dk, key_dim), (&dv, value_dim)]
                .map(|(x, dim)| unsafe { part_mut(x, dims, pair, dim, tokens.clone()) });
            Chunk {
                decay: Decay::new(pair % heads),
                first: tokens.start,
                q: cut(part(q, dims, pair, key_dim)),
                k: cut(part(k, dims, pair, key_dim)),
                v: cut(part(v, dims, pair, value_dim)),
                dy: cut(part(dy, dims, pair, value_dim)),
                before: (chunk > 0).then(|| state(states, chunk - 1)),
                after: (chunk + 1 < chunks).then(|| (state(gradients, chunk + 1), dims.chunk(chunk + 1).len())),
            }
            .backward(dq, dk, dv);
        });
    });
}

/// One chunk of a head of a sequence.
struct Chunk<'a> {
    decay: Decay,
    first: usize,
    q: Rows<'a>,
    k: Rows<'a>,
    v: Rows<'a>,
    dy: Rows<'a>,
    /// The state before the chunk.
    before: Option<Rows<'a>>,
    /// The gradient of the state after the chunk decayed over the next one, and the length of that.
    after: Option<(Rows<'a>, usize)>,
}

impl Chunk<'_> {
    fn backward(&self, dq: RowsMut<'_>, dk: RowsMut<'_>, dv: RowsMut<'_>) {
        let (len, key_dim, value_dim) = (self.q.rows(), self.q.cols(), self.v.cols());
        let (lanes, key_width, value_width) = (padded(len), padded(key_dim), padded(value_dim));
        let transposed = value_dim * key_width;
        let memory = (key_dim + value_dim + 2 * BLOCK + 3 * key_width + 2 * value_width + 2) * BLOCK
            + transposed
            + key_dim * value_width;
        with_pieces(memory, |mut pieces| {
            let (qt, dyt) = (pieces.take(key_dim * BLOCK), pieces.take(value_dim * BLOCK));
            let [p, ds] = std::array::from_fn(|_| pieces.take(BLOCK * BLOCK));
            let [q, weighted, plain] = std::array::from_fn(|_| pieces.take(BLOCK * key_width));
            let [dy, v] = std::array::from_fn(|_| pieces.take(BLOCK * value_width));
            let [query_weight, key_weight] = std::array::from_fn(|_| pieces.take(BLOCK));
            let (transposed, state) = (pieces.take(transposed), pieces.take(key_dim * value_width));
            query_weights(self.decay, self.first, len, query_weight);
            self.decay.powers(len as f64 - 1.0, -1.0, &mut key_weight[..len]);
            pack_transposed(qt, BLOCK, self.q, &ONES);
            pack_transposed(dyt, BLOCK, self.dy, query_weight);
            pack(q, key_width, self.q, &ONES);
            pack(dy, value_width, self.dy, query_weight);
            pack(weighted, key_width, self.k, key_weight);
            pack(plain, key_width, self.k, &ONES);
            pack(v, value_width, self.v, key_weight);

            // SAFETY: of each gradient one view is in use at a time.
            let [dq_view, dk_view, dv_view] = [&dq, &dk, &dv].map(|x| unsafe { x.shared_block(0..len, 0..x.cols()) });
            if let Some(before) = self.before {
                let factor = self.decay.power(len as f64) as f32;
                pack_transposed(transposed, key_width, before, &[factor]);
                let a = Mat::Normal(view(dy, value_width, 0..len, 0..value_dim));
                product(dq_view, a, view(transposed, key_width, 0..value_dim, 0..key_width), false);
            }
            if let Some((after, next)) = self.after {
                let factor = [self.decay.power(next as f64) as f32];
                pack(state, value_width, after, &factor);
                let a = Mat::Normal(view(weighted, key_width, 0..len, 0..key_dim));
                product(dv_view, a, view(state, value_width, 0..key_dim, 0..value_width), false);
                pack_transposed(transposed, key_width, after, &factor);
                let a = Mat::Normal(view(v, value_width, 0..len, 0..value_dim));
                product(dk_view, a, view(transposed, key_width, 0..value_dim, 0..key_width), false);
            }
            let from_queries = Queries {
                qt: view(qt, BLOCK, 0..key_dim, 0..lanes),
                q: view(q, key_width, 0..len, 0..key_width),
                dyt: view(dyt, BLOCK, 0..value_dim, 0..lanes),
                dy: view(dy, value_width, 0..len, 0..value_width),
            };
            let from_keys = Keys {
                weighted: view(weighted, key_width, 0..len, 0..key_dim),
                plain: view(plain, key_width, 0..len, 0..key_width),
                v: view(v, value_width, 0..len, 0..value_dim),
            };
            let (dq, dkv) = ((dq, self.before.is_some()), (dk, dv, self.after.is_some()));
            gradient_block(Factors::Single, from_queries, from_keys, true, [p, ds], dq, dkv);
        });
    }
}

simd_fn! {
    /// `y += a x`
    fn add_scaled(s: S, y: &mut [f32], a: f32, x: &[f32]) {
        let a = s.splat(a);
        let mut i = 0;
        while i < y.len() {
            let n = (y.len() - i).min(S::LANES);
            let sum = s.fma(a, s.load_partial(&x[i..], n), s.load_partial(&y[i..], n));
            s.store_partial(&mut y[i..], n, sum);
            i += n;
        }
    }
}
