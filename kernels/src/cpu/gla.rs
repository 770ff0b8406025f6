//! Gated linear attention, <https://arxiv.org/abs/2312.06635>.
//!
//! With a log gate `g_t <= 0` per key channel and, per head, a state `S` `[Dk, Dv]` that starts at 0,
//!
//! ```text
//! S_t = diag(exp(g_t)) S_{t-1} + k_t^T v_t,    o_t = scale q_t S_t
//! ```
//!
//! A chunk after state `S` is, with `a_t = exp(g_t)` and `i >= j`,
//!
//! ```text
//! A_ij = scale sum_d q_id k_jd prod_{j < t <= i} a_td
//! o_i  = A v + scale (q_i prod_{t <= i} a_t) S
//! S'   = diag(prod_t a_t) S + sum_j (k_j prod_{t > j} a_t)^T v_j
//! ```
//!
//! Gates of -20 per token occur, so neither `exp(-cumsum g)` (it overflows) nor differences of long cumulative
//! sums (they lose digits) are used: every decay is a running product of at most [`CHUNK`] gates between 0 and 1,
//! which keeps the relative error at a few roundings in every regime, and there is one exponential per gate.
//! For the scores, lanes are the tokens `j`: the 16 keys of one channel are one vector, multiplied by `a_i` as
//! `i` advances. What is left of it at the end of the chunk are the keys of the state update.
//!
//! The gradient of `g_t` is what flows from tokens before `t` to `t` and later ones. The usual identity, the sum
//! over all `s >= t` of `q_s dq_s - k_s dk_s`, takes it as a difference of sums that may be larger by many orders
//! of magnitude; here only the pairs `i > j` within one chunk go that way, and what passes through the states
//! before and after the chunk is added up directly. How chunks and memory are organised is in
//! [`chunked`](super::chunked). Tasks are heads of one batch row; each walks through time.

use super::chunked::*;
use super::math;
use super::output::Output;
use super::simd::Simd;
use super::threads::{parallel_for, parallel_ranges, with_scratch};
use crate::rows::SharedSlice;
use crate::{Rows, RowsMut, simd_fn};

/// Elements of `boundaries`: the states that [`gla_forward`] keeps for [`gla_backward`], for heads of `dk` key and
/// `dv` value channels.
pub fn gla_boundaries_len(batch: usize, time: usize, heads: usize, dk: usize, dv: usize) -> usize {
    boundary_len(batch, time, heads, dk, dv)
}

/// `(time, Dk, Dv)`, from the arguments that every function has.
fn sizes(q: &Rows<'_>, k: &Rows<'_>, v: &Rows<'_>, g: &Rows<'_>, batch: usize, heads: usize) -> (usize, usize, usize) {
    let shape = (q.rows(), q.cols());
    assert!((k.rows(), k.cols()) == shape && (g.rows(), g.cols()) == shape && v.rows() == shape.0, "shapes differ");
    assert!(
        heads > 0 && q.cols().is_multiple_of(heads) && v.cols().is_multiple_of(heads),
        "columns do not divide into heads"
    );
    assert!(batch > 0 && q.rows().is_multiple_of(batch), "rows do not divide into the batch");
    (q.rows() / batch, q.cols() / heads, v.cols() / heads)
}

/// The default `scale`: `Dk^-1/2`.
fn scale_or_default(scale: Option<f32>, dk: usize) -> f32 {
    scale.unwrap_or_else(|| (1.0 / (dk as f64).sqrt()) as f32)
}

/// `y` `[B*T, H*Dv]` for `q`, `k`, `log_gate` `[B*T, H*Dk]` and `v` `[B*T, H*Dv]`; see the [module](self).
///
/// `scale` is `Dk^-1/2` by default. `initial` is the state before the first token and `last` receives the one
/// after the last token, both `[B, H, Dk, Dv]`; `boundaries` (of [`gla_boundaries_len`]) is filled for
/// [`gla_backward`].
///
/// # Panics
/// If sizes do not fit.
#[allow(clippy::too_many_arguments)]
pub fn gla_forward(
    y: RowsMut<'_>,
    q: Rows<'_>,
    k: Rows<'_>,
    v: Rows<'_>,
    log_gate: Rows<'_>,
    scale: Option<f32>,
    batch: usize,
    heads: usize,
    initial: Option<&[f32]>,
    last: Option<&mut [f32]>,
    boundaries: Option<&mut [f32]>,
) {
    let (time, dk, dv) = sizes(&q, &k, &v, &log_gate, batch, heads);
    assert!((y.rows(), y.cols()) == (v.rows(), v.cols()), "shapes differ");
    let scale = scale_or_default(scale, dk);
    let dense = dk * dv;
    assert!(initial.is_none_or(|s| s.len() == batch * heads * dense), "size of the initial state");
    assert!(last.as_ref().is_none_or(|s| s.len() == batch * heads * dense), "size of the last state");
    let kept = boundary_len(1, time, 1, dk, dv);
    assert!(boundaries.as_ref().is_none_or(|s| s.len() == batch * heads * kept), "size of the boundaries");
    let (last, boundaries) = (last.map(SharedSlice::new), boundaries.map(SharedSlice::new));

    parallel_for(batch * heads, |task| {
        let (b, h) = (task / heads, task % heads);
        let rows = b * time..(b + 1) * time;
        let (keys, values) = (h * dk..(h + 1) * dk, h * dv..(h + 1) * dv);
        // SAFETY: a task owns its rows and columns of y, and its parts of the two slices.
        let (y, last, boundaries) = unsafe {
            (
                y.shared_block(rows.clone(), values.clone()),
                last.map(|s| s.range(task * dense..(task + 1) * dense)),
                boundaries.map(|s| s.range(task * kept..(task + 1) * kept)),
            )
        };
        let initial = initial.map(|s| &s[task * dense..(task + 1) * dense]);
        let [q, k, g] = [q, k, log_gate].map(|m| block(m, &rows, &keys));
        forward_head(y, [q, k, block(v, &rows, &values), g], scale, initial, last, boundaries);
    });
}

fn forward_head(
    y: RowsMut<'_>,
    [q, k, v, g]: [Rows<'_>; 4],
    scale: f32,
    initial: Option<&[f32]>,
    last: Option<&mut [f32]>,
    mut boundaries: Option<&mut [f32]>,
) {
    let (time, dk, dv) = (q.rows(), q.cols(), v.cols());
    let (pk, pv, len) = (padded(dk), padded(dv), state_len(dk, dv));
    with_aligned(len + CHUNK * (4 * pk + 2 * pv) + SQUARE + pk, |mut scratch| {
        let state = take(&mut scratch, len);
        let [qp, kp, gate, kt] = std::array::from_fn(|_| take(&mut scratch, CHUNK * pk));
        let [vp, yp] = std::array::from_fn(|_| take(&mut scratch, CHUNK * pv));
        let scores = take(&mut scratch, SQUARE);
        let total = take(&mut scratch, pk);
        match initial {
            Some(dense) => load_state(state, dense, dv),
            None => state.fill(0.0),
        }
        let mut ahead = Ahead::new();
        for from in (0..time).step_by(CHUNK) {
            let c = CHUNK.min(time - from);
            if let Some(kept) = boundaries.as_deref_mut()
                && from % SPAN == 0
            {
                kept[from / SPAN * len..(from / SPAN + 1) * len].copy_from_slice(state);
            }
            pack(qp, q.slice_rows(from, from + c), scale);
            pack(kp, k.slice_rows(from, from + c), 1.0);
            pack(vp, v.slice_rows(from, from + c), 1.0);
            pack_gates(gate, g.slice_rows(from, from + c));
            transpose(kt, kp, CHUNK, pk);
            ahead.set([y.as_rows(), g, v, k, q], from + CHUNK..from + 2 * CHUNK);
            // kt becomes the keys decayed to the end of the chunk
            decayed_scores(scores, kt, qp, gate, dk);
            lower_product(yp, scores, vp, pv, Start::Zero, &mut ahead);
            decay_from_start(qp, total, gate, pk);
            if from > 0 || initial.is_some() {
                product(yp, pv, [CHUNK, pv, dk], Left::rows(qp, pk), state, pv, Start::Accumulate, &mut ahead);
            }
            // SAFETY: y is this task's own, and the block is not borrowed elsewhere.
            unpack(unsafe { y.shared_block(from..from + c, 0..dv) }.into(), yp, 1.0);
            if from + c < time || last.is_some() {
                product(state, pv, [dk, pv, c], Left::rows(kt, CHUNK), vp, pv, Start::Scale(total), &mut ahead);
            }
        }
        if let Some(dense) = last {
            store_state(dense, state, dv);
        }
    });
}

/// Gradients of [`gla_forward`]: `dq`, `dk`, `d_log_gate` `[B*T, H*Dk]`, `dv` `[B*T, H*Dv]`.
///
/// `boundaries` is what forward filled. A state given to forward counts as a constant.
///
/// # Panics
/// If sizes do not fit.
#[allow(clippy::too_many_arguments)]
pub fn gla_backward<'a>(
    dq: impl Into<Output<'a>>,
    dk: impl Into<Output<'a>>,
    dv: impl Into<Output<'a>>,
    d_log_gate: impl Into<Output<'a>>,
    dy: Rows<'_>,
    q: Rows<'_>,
    k: Rows<'_>,
    v: Rows<'_>,
    log_gate: Rows<'_>,
    scale: Option<f32>,
    batch: usize,
    heads: usize,
    boundaries: &[f32],
) {
    let [dq, dk, dv, d_log_gate]: [Output<'_>; 4] = [dq.into(), dk.into(), dv.into(), d_log_gate.into()];
    let (time, size_k, size_v) = sizes(&q, &k, &v, &log_gate, batch, heads);
    let shape = (q.rows(), q.cols());
    assert!([&dq, &dk, &d_log_gate].iter().all(|m| (m.rows(), m.cols()) == shape), "shapes of gradients differ");
    assert!([(dy.rows(), dy.cols()), (dv.rows(), dv.cols())] == [(v.rows(), v.cols()); 2], "shapes differ");
    let scale = scale_or_default(scale, size_k);
    let kept = boundary_len(1, time, 1, size_k, size_v);
    assert!(boundaries.len() == batch * heads * kept, "size of the boundaries");

    parallel_for(batch * heads, |task| {
        let (b, h) = (task / heads, task % heads);
        let rows = b * time..(b + 1) * time;
        let (keys, values) = (h * size_k..(h + 1) * size_k, h * size_v..(h + 1) * size_v);
        // SAFETY: a task owns its rows and columns of the gradients.
        let grads = unsafe {
            [
                dq.shared_block(rows.clone(), keys.clone()),
                dk.shared_block(rows.clone(), keys.clone()),
                dv.shared_block(rows.clone(), values.clone()),
                d_log_gate.shared_block(rows.clone(), keys.clone()),
            ]
        };
        let [q, k, g] = [q, k, log_gate].map(|m| block(m, &rows, &keys));
        let [dy, v] = [dy, v].map(|m| block(m, &rows, &values));
        backward_head(grads, [dy, q, k, v, g], scale, &boundaries[task * kept..(task + 1) * kept]);
    });
}

/// With `D = dy v^T`, `G` the gradient of the state after the chunk and decays from the chunk's start (`L`), to
/// its end (`R`) and between tokens (`E_ij`):
/// `dq_i = L_i dy_i S^T + sum_j D_ij E_ij k_j`, `dk_j = R_j v_j G^T + sum_i D_ij E_ij q_i`,
/// `dv = A^T dy + (R k) G`, and the gradient of the state before it is `diag(L_last) G + (L q)^T dy`.
fn backward_head([dq, dk, dv, dg]: [Output<'_>; 4], [dy, q, k, v, g]: [Rows<'_>; 5], scale: f32, boundaries: &[f32]) {
    let (time, nk, nv) = (q.rows(), q.cols(), v.cols());
    let (pk, pv, len) = (padded(nk), padded(nv), state_len(nk, nv));
    with_aligned((SPAN / CHUNK + 1) * len + CHUNK * (12 * pk + 5 * pv) + 2 * SQUARE + 2 * pk, |mut scratch| {
        let states = take(&mut scratch, SPAN / CHUNK * len);
        let grad = take(&mut scratch, len);
        let [qp, kp, gate, kt, from_state, dqp, dkp, dgp, inner_q, inner_k, decayed_q, decayed_k] =
            std::array::from_fn(|_| take(&mut scratch, CHUNK * pk));
        let [vp, dyp, vt, dyt, dvp] = std::array::from_fn(|_| take(&mut scratch, CHUNK * pv));
        let [scores, cross] = std::array::from_fn(|_| take(&mut scratch, SQUARE));
        let [total, through] = std::array::from_fn(|_| take(&mut scratch, pk));
        grad.fill(0.0);
        through.fill(0.0);
        // rows of padding that the products never write but the transposition reads
        from_state[nk * CHUNK..].fill(0.0);

        let mut ahead = Ahead::new();
        for span in (0..time).step_by(SPAN).rev() {
            let end = time.min(span + SPAN);
            states[..len].copy_from_slice(&boundaries[span / SPAN * len..(span / SPAN + 1) * len]);
            for (index, from) in (span..end).step_by(CHUNK).enumerate() {
                if from + CHUNK < end {
                    let (before, after) = states[index * len..(index + 2) * len].split_at_mut(len);
                    pack(kp, k.slice_rows(from, from + CHUNK), 1.0);
                    pack(vp, v.slice_rows(from, from + CHUNK), 1.0);
                    pack_gates(gate, g.slice_rows(from, from + CHUNK));
                    decay_to_end(decayed_k, kp, total, gate, pk);
                    ahead.set([k, v, g], from + CHUNK..from + 2 * CHUNK);
                    let start = Start::ScaleOf(before, total);
                    product(after, pv, [nk, pv, CHUNK], Left::transposed(decayed_k, pk), vp, pv, start, &mut ahead);
                }
            }
            for (index, from) in (span..end).step_by(CHUNK).enumerate().rev() {
                let c = CHUNK.min(time - from);
                let state = &states[index * len..(index + 1) * len];
                pack(qp, q.slice_rows(from, from + c), scale);
                pack(kp, k.slice_rows(from, from + c), 1.0);
                pack(vp, v.slice_rows(from, from + c), 1.0);
                pack(dyp, dy.slice_rows(from, from + c), 1.0);
                pack_gates(gate, g.slice_rows(from, from + c));
                transpose(kt, kp, CHUNK, pk);
                transpose(vt, vp, CHUNK, pv);
                transpose(dyt, dyp, CHUNK, pv);
                let next = from.saturating_sub(CHUNK)..from;
                ahead = Ahead::new();
                [&dg, &dv, &dk, &dq].into_iter().for_each(|m| ahead.add_output(m, next.clone()));
                for m in [v, dy, g, k, q] {
                    ahead.add(m, next.clone());
                }
                decayed_scores(scores, kt, qp, gate, nk);
                product(cross, CHUNK, [CHUNK, CHUNK, nv], Left::rows(dyp, pv), vt, CHUNK, Start::Zero, &mut ahead);
                inner_gradients(inner_q, inner_k, qp, kp, gate, cross, pk);

                // without the decays, which `finish` applies
                product(from_state, CHUNK, [nk, CHUNK, nv], Left::rows(state, pv), dyt, CHUNK, Start::Zero, &mut ahead);
                transpose(dqp, from_state, pk, CHUNK);
                decayed_q.copy_from_slice(qp);
                decay_from_start(decayed_q, total, gate, pk);
                // the state after the last chunk has no gradient
                if from + c < time {
                    product(
                        from_state,
                        CHUNK,
                        [nk, CHUNK, nv],
                        Left::rows(grad, pv),
                        vt,
                        CHUNK,
                        Start::Zero,
                        &mut ahead,
                    );
                    transpose(dkp, from_state, pk, CHUNK);
                    decay_to_end(decayed_k, kp, total, gate, pk);
                    product(dvp, pv, [CHUNK, pv, nk], Left::rows(decayed_k, pk), grad, pv, Start::Zero, &mut ahead);
                    lower_transposed_product(dvp, scores, dyp, pv, Start::Accumulate, &mut ahead);
                    row_dots(through, state, grad, total, nk, pv);
                } else {
                    dkp.fill(0.0);
                    lower_transposed_product(dvp, scores, dyp, pv, Start::Zero, &mut ahead);
                    through.fill(0.0);
                }
                finish(dqp, dkp, dgp, inner_q, inner_k, qp, kp, gate, cross, through, pk);
                // SAFETY: the gradients are this task's own, and the blocks are not borrowed elsewhere.
                unsafe {
                    unpack(dq.shared_block(from..from + c, 0..nk), dqp, scale);
                    unpack(dk.shared_block(from..from + c, 0..nk), dkp, 1.0);
                    unpack(dv.shared_block(from..from + c, 0..nv), dvp, 1.0);
                    unpack(dg.shared_block(from..from + c, 0..nk), dgp, 1.0);
                }
                if from > 0 {
                    product(
                        grad,
                        pv,
                        [nk, pv, c],
                        Left::transposed(decayed_q, pk),
                        dyp,
                        pv,
                        Start::Scale(total),
                        &mut ahead,
                    );
                }
            }
        }
    });
}

/// One token: `q`, `k`, `log_gate` `[B, H*Dk]`, `v`, `y` `[B, H*Dv]`, `state` `[B, H, Dk, Dv]` updated in place.
///
/// # Panics
/// If sizes do not fit.
#[allow(clippy::too_many_arguments)]
pub fn gla_step(
    y: RowsMut<'_>,
    state: &mut [f32],
    q: Rows<'_>,
    k: Rows<'_>,
    v: Rows<'_>,
    log_gate: Rows<'_>,
    scale: Option<f32>,
    heads: usize,
) {
    let batch = q.rows();
    let (_, dk, dv) = sizes(&q, &k, &v, &log_gate, batch, heads);
    assert!((y.rows(), y.cols()) == (v.rows(), v.cols()), "shapes differ");
    let scale = scale_or_default(scale, dk);
    let dense = dk * dv;
    assert!(state.len() == batch * heads * dense, "size of the state");
    let shared = SharedSlice::new(state);
    parallel_ranges(batch * heads, STEP_GRAIN / dense, |tasks| {
        with_scratch(CHUNK * padded(dk), |decay| {
            for task in tasks {
                let (b, h) = (task / heads, task % heads);
                let (keys, values) = (h * dk..(h + 1) * dk, h * dv..(h + 1) * dv);
                pack_gates(decay, block(log_gate, &(b..b + 1), &keys));
                // SAFETY: a task owns its columns of its row of y, and its state.
                let (y, state) =
                    unsafe { (&mut y.shared_row(b)[values.clone()], shared.range(task * dense..(task + 1) * dense)) };
                let [q, k] = [&q, &k].map(|m| &m.row(b)[keys.clone()]);
                step(y, state, q, k, &v.row(b)[values], &decay[..dk], scale, None);
            }
        });
    });
}

simd_fn! {
    /// `exp` of a head's log gates into packed rows, 1 in the padding.
    fn pack_gates(s: S, to: &mut [f32], from: Rows<'_>) {
        let (n, width) = (from.cols(), padded(from.cols()));
        for r in 0..from.rows() {
            let row = from.row(r);
            let to = &mut to[r * width..(r + 1) * width];
            to[n..].fill(1.0);
            let mut i = 0;
            while i < n {
                let lanes = (n - i).min(S::LANES);
                let a = math::exp(s, s.load_partial(&row[i..], lanes));
                s.store_partial(&mut to[i..], lanes, a);
                i += S::LANES;
            }
        }
        to[from.rows() * width..CHUNK * width].fill(1.0);
    }

    /// The scores `A` (zeros above the diagonal) of scaled `q` and of keys with tokens in lanes; the keys `kt` are
    /// decayed to the end of the chunk on the way.
    fn decayed_scores(s: S, scores: &mut [f32], kt: &mut [f32], q: &[f32], gate: &[f32], dk: usize) {
        let width = padded(dk);
        if S::LANES == 16 {
            score_rows::<S, 8, 1>(s, scores, kt, q, gate, dk, width, 0);
            score_rows::<S, 8, 1>(s, scores, kt, q, gate, dk, width, 8);
        } else {
            for i in (0..CHUNK).step_by(4) {
                score_rows::<S, 4, 2>(s, scores, kt, q, gate, dk, width, i);
            }
        }
    }

    /// `q_i *= prod_{t <= i} a_t`; `total` is the product over the chunk.
    fn decay_from_start(s: S, q: &mut [f32], total: &mut [f32], gate: &[f32], width: usize) {
        let mut d = 0;
        while d < width {
            let mut e = s.splat(1.0);
            for i in 0..CHUNK {
                let at = i * width + d;
                e = s.mul(e, s.load(&gate[at..]));
                let x = s.mul(e, s.load(&q[at..]));
                s.store(&mut q[at..], x);
            }
            s.store(&mut total[d..], e);
            d += S::LANES;
        }
    }

    /// `to_j = k_j prod_{t > j} a_t`; `total` is the product over the chunk.
    fn decay_to_end(s: S, to: &mut [f32], k: &[f32], total: &mut [f32], gate: &[f32], width: usize) {
        let mut d = 0;
        while d < width {
            let mut e = s.splat(1.0);
            for j in (0..CHUNK).rev() {
                let at = j * width + d;
                s.store(&mut to[at..], s.mul(e, s.load(&k[at..])));
                e = s.mul(e, s.load(&gate[at..]));
            }
            s.store(&mut total[d..], e);
            d += S::LANES;
        }
    }

    /// What the pairs `j < i` of a chunk add to `dq` and `dk`.
    fn inner_gradients(
        s: S, dq: &mut [f32], dk: &mut [f32], q: &[f32], k: &[f32], gate: &[f32], cross: &[f32], width: usize,
    ) {
        assert!(cross.len() == SQUARE);
        let mut d = 0;
        while d < width {
            let mut sums = [s.zero(); CHUNK];
            for i in 0..CHUNK {
                let query = s.load(&q[i * width + d..]);
                let mut decay = s.load(&gate[i * width + d..]);
                let mut sum = s.zero();
                for j in (0..i).rev() {
                    let at = j * width + d;
                    let x = s.mul(decay, s.splat(cross[i * CHUNK + j]));
                    sum = s.fma(x, s.load(&k[at..]), sum);
                    sums[j] = s.fma(x, query, sums[j]);
                    decay = s.mul(decay, s.load(&gate[at..]));
                }
                s.store(&mut dq[i * width + d..], sum);
            }
            for j in 0..CHUNK {
                s.store(&mut dk[j * width + d..], sums[j]);
            }
            d += S::LANES;
        }
    }

    /// `to_d = weight_d` times the product of rows `d` of `a` and `b`.
    fn row_dots(s: S, to: &mut [f32], a: &[f32], b: &[f32], weight: &[f32], rows: usize, width: usize) {
        for d in 0..rows {
            let (a, b) = (&a[d * width..(d + 1) * width], &b[d * width..(d + 1) * width]);
            let mut sum = s.zero();
            let mut i = 0;
            while i < width {
                sum = s.fma(s.load(&a[i..]), s.load(&b[i..]), sum);
                i += S::LANES;
            }
            to[d] = weight[d] * s.sum(sum);
        }
    }

    /// Completes `dq` and `dk`, which hold `dy S^T` and `v G^T`, with their decays, the pairs `j < i` and the
    /// diagonal; and the gradient of the log gates: what passes from before `t` to `t` or later, which is
    /// `through` the whole chunk, from the state before to `i >= t`, from `j < t` to the state after, or from
    /// `j < t` to `i >= t`.
    fn finish(
        s: S, dq: &mut [f32], dk: &mut [f32], dg: &mut [f32], inner_q: &[f32], inner_k: &[f32], q: &[f32], k: &[f32],
        gate: &[f32], cross: &[f32], through: &[f32], width: usize,
    ) {
        let mut d = 0;
        while d < width {
            let mut decay = s.splat(1.0);
            for t in 0..CHUNK {
                let at = t * width + d;
                decay = s.mul(decay, s.load(&gate[at..]));
                let x = s.mul(decay, s.load(&dq[at..]));
                s.store(&mut dq[at..], x);
            }
            // the state before to i >= t, and the pairs around t: sums over t and later
            decay = s.splat(1.0);
            let mut later = s.load(&through[d..]);
            for t in (0..CHUNK).rev() {
                let at = t * width + d;
                let (query, key, own) = (s.load(&q[at..]), s.load(&k[at..]), s.splat(cross[t * (CHUNK + 1)]));
                let from_q = s.add(s.load(&dq[at..]), s.load(&inner_q[at..]));
                later = s.fma(query, from_q, s.fnma(key, s.load(&inner_k[at..]), later));
                s.store(&mut dg[at..], later);
                s.store(&mut dq[at..], s.fma(own, key, from_q));
                let x = s.mul(decay, s.load(&dk[at..]));
                s.store(&mut dk[at..], x);
                decay = s.mul(decay, s.load(&gate[at..]));
            }
            // j < t to the state after: sums over tokens before t
            let mut earlier = s.zero();
            for t in 0..CHUNK {
                let at = t * width + d;
                let (query, key, own) = (s.load(&q[at..]), s.load(&k[at..]), s.splat(cross[t * (CHUNK + 1)]));
                let sum = s.add(earlier, s.load(&dg[at..]));
                s.store(&mut dg[at..], sum);
                let to_state = s.load(&dk[at..]);
                earlier = s.fma(key, to_state, earlier);
                s.store(&mut dk[at..], s.fma(own, query, s.add(to_state, s.load(&inner_k[at..]))));
            }
            d += S::LANES;
        }
    }
}

/// `R` rows of scores from row `i0` on, `V` vectors of tokens.
#[inline(always)]
#[allow(clippy::too_many_arguments, clippy::needless_range_loop)] // `v` is a place in memory as well
fn score_rows<S: Simd, const R: usize, const V: usize>(
    s: S,
    scores: &mut [f32],
    kt: &mut [f32],
    q: &[f32],
    gate: &[f32],
    dk: usize,
    width: usize,
    i0: usize,
) {
    assert!(scores.len() == SQUARE && kt.len() >= dk * CHUNK && V * S::LANES == CHUNK);
    assert!(width >= dk && q.len() >= CHUNK * width && gate.len() >= CHUNK * width && i0 + R <= CHUNK);
    let lane = s.to_float(s.iota());
    let before = |i: usize, v: usize| s.lt(lane, s.splat(i as f32 - (v * S::LANES) as f32));
    let mut sums = [[s.zero(); V]; R];
    for d in 0..dk {
        let mut keys = [s.zero(); V];
        for v in 0..V {
            keys[v] = s.load(&kt[d * CHUNK + v * S::LANES..]);
        }
        for r in 0..R {
            let at = (i0 + r) * width + d;
            // SAFETY: row i0 + r < CHUNK and d < width, checked above.
            let (a, x) = unsafe { (s.splat(*gate.get_unchecked(at)), s.splat(*q.get_unchecked(at))) };
            for v in 0..V {
                // tokens before i decay; i and later ones are as they were (and above the diagonal: not kept)
                keys[v] = s.select(before(i0 + r, v), s.mul(keys[v], a), keys[v]);
                sums[r][v] = s.fma(x, keys[v], sums[r][v]);
            }
        }
        for v in 0..V {
            s.store(&mut kt[d * CHUNK + v * S::LANES..], keys[v]);
        }
    }
    for r in 0..R {
        for v in 0..V {
            let kept = s.select(before(i0 + r + 1, v), sums[r][v], s.zero());
            s.store(&mut scores[(i0 + r) * CHUNK + v * S::LANES..], kept);
        }
    }
}
