//! The RWKV x051a operator (scalar decay and bonus per head), <https://arxiv.org/abs/2404.05892>.
//!
//! With `w = exp(-exp(time_decay))` and `u = time_faaaa` of a head, and a state `S` `[N, N]` that starts at 0,
//!
//! ```text
//! y_t = r_t (S_{t-1} + u k_t^T v_t),    S_t = w S_{t-1} + k_t^T v_t
//! ```
//!
//! A chunk of `c` tokens after state `S` is, with `M_ij = w^(i-j-1)` below the diagonal and `u` on it,
//!
//! ```text
//! y = ((r k^T) * M) v + diag(w^i) r S,    S' = w^c S + (diag(w^(c-1-j)) k)^T v
//! ```
//!
//! Every power of `w` that occurs has an exponent >= 0 and is computed as `exp(-lag exp(time_decay))` in double
//! precision, once per head, so nothing overflows or loses digits for `w` near 0 or 1. How chunks and memory are
//! organised is in [`chunked`](super::chunked). Tasks are heads of one batch row; each walks through time.

use super::chunked::*;
use super::output::Output;
use super::threads::{parallel_for, parallel_ranges, with_scratch};
use crate::rows::SharedSlice;
use crate::{Rows, RowsMut, simd_fn};

/// Elements of `boundaries`: the states that [`wkv_forward`] keeps for [`wkv_backward`], for heads of `size`.
pub fn wkv_boundaries_len(batch: usize, time: usize, heads: usize, size: usize) -> usize {
    boundary_len(batch, time, heads, size, size)
}

/// Powers of a head's decay, and what is made of them.
struct Decay {
    /// `w^n` for `n` up to `CHUNK`.
    power: [f32; CHUNK + 1],
    /// Their derivatives with respect to `time_decay`.
    slope: [f32; CHUNK + 1],
    /// `M`.
    mask: [f32; SQUARE],
    /// Derivative of `M` with respect to `time_decay`.
    mask_slope: [f32; SQUARE],
}

impl Decay {
    fn new(time_decay: f32, bonus: f32) -> Self {
        let rate = f64::from(time_decay).exp();
        let (mut power, mut slope) = ([1.0; CHUNK + 1], [0.0; CHUNK + 1]);
        for n in 1..=CHUNK {
            let x = n as f64 * rate;
            power[n] = (-x).exp() as f32;
            // -x e^-x, which is 0 also where x is infinite
            slope[n] = if x < 1e3 { (-x * (-x).exp()) as f32 } else { 0.0 };
        }
        let (mut mask, mut mask_slope) = ([0.0; SQUARE], [0.0; SQUARE]);
        for i in 0..CHUNK {
            for j in 0..i {
                mask[i * CHUNK + j] = power[i - j - 1];
                mask_slope[i * CHUNK + j] = slope[i - j - 1];
            }
            mask[i * CHUNK + i] = bonus;
        }
        Self { power, slope, mask, mask_slope }
    }

    /// `(w^(c-1-j), slope)` for the tokens of a chunk of `c`, 0 beyond.
    fn to_the_end(&self, c: usize) -> ([f32; CHUNK], [f32; CHUNK]) {
        let (mut power, mut slope) = ([0.0; CHUNK], [0.0; CHUNK]);
        for j in 0..c {
            power[j] = self.power[c - 1 - j];
            slope[j] = self.slope[c - 1 - j];
        }
        (power, slope)
    }
}

/// Sizes, from the arguments that every function has.
fn sizes(r: &Rows<'_>, time_decay: &[f32], time_faaaa: &[f32], batch: usize) -> (usize, usize, usize) {
    let heads = time_decay.len();
    assert!(
        heads > 0 && time_faaaa.len() == heads && r.cols().is_multiple_of(heads),
        "columns do not divide into heads"
    );
    assert!(batch > 0 && r.rows().is_multiple_of(batch), "rows do not divide into the batch");
    (r.rows() / batch, heads, r.cols() / heads)
}

/// `y` for `r`, `k`, `v` `[B*T, H*N]` and raw parameters `[H]`; see the [module](self).
///
/// `initial` is the state before the first token and `last` receives the one after the last token, both
/// `[B, H, N, N]`; `boundaries` (of [`wkv_boundaries_len`]) is filled for [`wkv_backward`].
///
/// # Panics
/// If sizes do not fit.
#[allow(clippy::too_many_arguments)]
pub fn wkv_forward(
    y: RowsMut<'_>,
    r: Rows<'_>,
    k: Rows<'_>,
    v: Rows<'_>,
    time_decay: &[f32],
    time_faaaa: &[f32],
    batch: usize,
    initial: Option<&[f32]>,
    last: Option<&mut [f32]>,
    boundaries: Option<&mut [f32]>,
) {
    let (time, heads, size) = sizes(&r, time_decay, time_faaaa, batch);
    let shape = (r.rows(), r.cols());
    assert!([(y.rows(), y.cols()), (k.rows(), k.cols()), (v.rows(), v.cols())] == [shape; 3], "shapes differ");
    let dense = size * size;
    assert!(initial.is_none_or(|s| s.len() == batch * heads * dense), "size of the initial state");
    assert!(last.as_ref().is_none_or(|s| s.len() == batch * heads * dense), "size of the last state");
    let kept = boundary_len(1, time, 1, size, size);
    assert!(boundaries.as_ref().is_none_or(|s| s.len() == batch * heads * kept), "size of the boundaries");
    let (last, boundaries) = (last.map(SharedSlice::new), boundaries.map(SharedSlice::new));

    parallel_for(batch * heads, |task| {
        let (b, h) = (task / heads, task % heads);
        let (rows, cols) = (b * time..(b + 1) * time, h * size..(h + 1) * size);
        let part = |m| block(m, &rows, &cols);
        // SAFETY: a task owns its rows and columns of y, and its parts of the two slices.
        let (y, last, boundaries) = unsafe {
            (
                y.shared_block(rows.clone(), cols.clone()),
                last.map(|s| s.range(task * dense..(task + 1) * dense)),
                boundaries.map(|s| s.range(task * kept..(task + 1) * kept)),
            )
        };
        let initial = initial.map(|s| &s[task * dense..(task + 1) * dense]);
        let decay = Decay::new(time_decay[h], time_faaaa[h]);
        forward_head(y, [r, k, v].map(part), &decay, initial, last, boundaries);
    });
}

fn forward_head(
    y: RowsMut<'_>,
    [r, k, v]: [Rows<'_>; 3],
    decay: &Decay,
    initial: Option<&[f32]>,
    last: Option<&mut [f32]>,
    mut boundaries: Option<&mut [f32]>,
) {
    let (time, n) = (r.rows(), r.cols());
    let p = padded(n);
    with_aligned(state_len(n, n) + 5 * CHUNK * p + SQUARE + p, |mut scratch| {
        let state = take(&mut scratch, n * p);
        let [rp, kp, vp, kt, yp] = std::array::from_fn(|_| take(&mut scratch, CHUNK * p));
        let scores = take(&mut scratch, SQUARE);
        let total = take(&mut scratch, p);
        match initial {
            Some(dense) => load_state(state, dense, n),
            None => state.fill(0.0),
        }
        let mut ahead = Ahead::new();
        for from in (0..time).step_by(CHUNK) {
            let c = CHUNK.min(time - from);
            if let Some(kept) = boundaries.as_deref_mut()
                && from % SPAN == 0
            {
                kept[from / SPAN * n * p..(from / SPAN + 1) * n * p].copy_from_slice(state);
            }
            pack(rp, r.slice_rows(from, from + c), 1.0);
            pack(kp, k.slice_rows(from, from + c), 1.0);
            pack(vp, v.slice_rows(from, from + c), 1.0);
            ahead.set([y.as_rows(), v, k, r], from + CHUNK..from + 2 * CHUNK);
            transpose(kt, kp, CHUNK, p);
            product(scores, CHUNK, [CHUNK, CHUNK, n], Left::rows(rp, p), kt, CHUNK, Start::Zero, &mut ahead);
            multiply(scores, &decay.mask);
            lower_product(yp, scores, vp, p, Start::Zero, &mut ahead);
            let empty = from == 0 && initial.is_none();
            if !empty {
                scale_rows_in_place(rp, &decay.power[..CHUNK], p);
                product(yp, p, [CHUNK, p, n], Left::rows(rp, p), state, p, Start::Accumulate, &mut ahead);
            }
            // SAFETY: y is this task's own, and the block is not borrowed elsewhere.
            unpack(unsafe { y.shared_block(from..from + c, 0..n) }.into(), yp, 1.0);
            if from + c < time || last.is_some() {
                scale_rows_in_place(kp, &decay.to_the_end(c).0, p);
                total.fill(decay.power[c]);
                product(state, p, [n, p, c], Left::transposed(kp, p), vp, p, Start::Scale(total), &mut ahead);
            }
        }
        if let Some(dense) = last {
            store_state(dense, state, n);
        }
    });
}

/// Gradients of [`wkv_forward`]: `dr`, `dk`, `dv` `[B*T, H*N]` and those of the raw parameters `[H]`.
///
/// `boundaries` is what forward filled. A state given to forward counts as a constant.
///
/// # Panics
/// If sizes do not fit.
#[allow(clippy::too_many_arguments)]
pub fn wkv_backward<'a>(
    dr: impl Into<Output<'a>>,
    dk: impl Into<Output<'a>>,
    dv: impl Into<Output<'a>>,
    d_time_decay: &mut [f32],
    d_time_faaaa: &mut [f32],
    dy: Rows<'_>,
    r: Rows<'_>,
    k: Rows<'_>,
    v: Rows<'_>,
    time_decay: &[f32],
    time_faaaa: &[f32],
    batch: usize,
    boundaries: &[f32],
) {
    let [dr, dk, dv]: [Output<'_>; 3] = [dr.into(), dk.into(), dv.into()];
    let (time, heads, size) = sizes(&r, time_decay, time_faaaa, batch);
    let shape = (r.rows(), r.cols());
    assert!([&dy, &k, &v].iter().all(|m| (m.rows(), m.cols()) == shape), "shapes differ");
    assert!([&dr, &dk, &dv].iter().all(|m| (m.rows(), m.cols()) == shape), "shapes of gradients differ");
    assert!(d_time_decay.len() == heads && d_time_faaaa.len() == heads, "size of the parameter gradients");
    let kept = boundary_len(1, time, 1, size, size);
    assert!(boundaries.len() == batch * heads * kept, "size of the boundaries");

    with_scratch(2 * batch * heads, |partial| {
        let shared = SharedSlice::new(partial);
        parallel_for(batch * heads, |task| {
            let (b, h) = (task / heads, task % heads);
            let (rows, cols) = (b * time..(b + 1) * time, h * size..(h + 1) * size);
            let part = |m| block(m, &rows, &cols);
            // SAFETY: a task owns its rows and columns of the gradients, and two elements of the sums.
            let (grads, sums) = unsafe {
                (
                    [&dr, &dk, &dv].map(|m| m.shared_block(rows.clone(), cols.clone())),
                    shared.range(2 * task..2 * task + 2),
                )
            };
            let decay = Decay::new(time_decay[h], time_faaaa[h]);
            let kept = &boundaries[task * kept..(task + 1) * kept];
            let [slope, bonus] = backward_head(grads, [dy, r, k, v].map(part), &decay, kept);
            sums.copy_from_slice(&[slope as f32, bonus as f32]);
        });
        for h in 0..heads {
            let sum = |which: usize| (0..batch).fold(0.0, |sum, b| sum + partial[2 * (b * heads + h) + which]);
            d_time_decay[h] = sum(0);
            d_time_faaaa[h] = sum(1);
        }
    });
}

/// Returns the gradients of `time_decay` and `time_faaaa`.
///
/// With `P = r k^T`, `D = dy v^T`, `G` the gradient of the state after the chunk and `q_j = w^(c-1-j)`:
/// `dr = (D * M) k + diag(w^i) dy S^T`, `dk = (D * M)^T r + diag(q) v G^T`, `dv = (P * M)^T dy + diag(q) k G`,
/// and the gradient of the state before it is `w^c G + (diag(w^i) r)^T dy`.
fn backward_head(
    [dr, dk, dv]: [Output<'_>; 3],
    [dy, r, k, v]: [Rows<'_>; 4],
    decay: &Decay,
    boundaries: &[f32],
) -> [f64; 2] {
    let (time, n) = (r.rows(), r.cols());
    let p = padded(n);
    let (mut slope, mut bonus) = (0.0, 0.0);
    with_aligned((SPAN / CHUNK + 1) * n * p + 12 * CHUNK * p + 2 * SQUARE + p, |mut scratch| {
        let states = take(&mut scratch, SPAN / CHUNK * n * p);
        let grad = take(&mut scratch, n * p);
        let [rp, kp, vp, dyp, kt, vt, dyt, from_state, x, drp, dkp, dvp] =
            std::array::from_fn(|_| take(&mut scratch, CHUNK * p));
        let [pairs, cross] = std::array::from_fn(|_| take(&mut scratch, SQUARE));
        let total = take(&mut scratch, p);
        grad.fill(0.0);
        // rows of padding that the products never write but the transposition reads
        from_state[n * CHUNK..].fill(0.0);

        let mut ahead = Ahead::new();
        for span in (0..time).step_by(SPAN).rev() {
            let end = time.min(span + SPAN);
            states[..n * p].copy_from_slice(&boundaries[span / SPAN * n * p..(span / SPAN + 1) * n * p]);
            for (index, from) in (span..end).step_by(CHUNK).enumerate() {
                if from + CHUNK < end {
                    let (before, after) = states[index * n * p..(index + 2) * n * p].split_at_mut(n * p);
                    pack(kp, k.slice_rows(from, from + CHUNK), 1.0);
                    pack(vp, v.slice_rows(from, from + CHUNK), 1.0);
                    scale_rows_in_place(kp, &decay.to_the_end(CHUNK).0, p);
                    total.fill(decay.power[CHUNK]);
                    ahead.set([k, v], from + CHUNK..from + 2 * CHUNK);
                    let start = Start::ScaleOf(before, total);
                    product(after, p, [n, p, CHUNK], Left::transposed(kp, p), vp, p, start, &mut ahead);
                }
            }
            for (index, from) in (span..end).step_by(CHUNK).enumerate().rev() {
                let c = CHUNK.min(time - from);
                let state = &states[index * n * p..(index + 1) * n * p];
                let (to_end, to_end_slope) = decay.to_the_end(c);
                for (to, m) in [(&mut *rp, &r), (kp, &k), (vp, &v), (dyp, &dy)] {
                    pack(to, m.slice_rows(from, from + c), 1.0);
                }
                for (to, m) in [(&mut *kt, &*kp), (vt, vp), (dyt, dyp)] {
                    transpose(to, m, CHUNK, p);
                }
                let next = from.saturating_sub(CHUNK)..from;
                ahead = Ahead::new();
                [&dv, &dk, &dr].into_iter().for_each(|m| ahead.add_output(m, next.clone()));
                [v, dy, k, r].into_iter().for_each(|m| ahead.add(m, next.clone()));
                product(pairs, CHUNK, [CHUNK, CHUNK, n], Left::rows(rp, p), kt, CHUNK, Start::Zero, &mut ahead);
                product(cross, CHUNK, [CHUNK, CHUNK, n], Left::rows(dyp, p), vt, CHUNK, Start::Zero, &mut ahead);
                bonus += f64::from((0..CHUNK).fold(0.0, |sum, i| sum + pairs[i * 17] * cross[i * 17]));
                slope += f64::from(dot3(pairs, cross, &decay.mask_slope));
                multiply(pairs, &decay.mask);
                multiply(cross, &decay.mask);

                product(from_state, CHUNK, [n, CHUNK, n], Left::rows(state, p), dyt, CHUNK, Start::Zero, &mut ahead);
                transpose(x, from_state, p, CHUNK);
                slope += f64::from(scale_and_dot(drp, x, rp, &decay.power, &decay.slope, p));
                lower_product(drp, cross, kp, p, Start::Accumulate, &mut ahead);

                // the state after the last chunk has no gradient
                let start = if from + c < time {
                    product(from_state, CHUNK, [n, CHUNK, n], Left::rows(grad, p), vt, CHUNK, Start::Zero, &mut ahead);
                    transpose(x, from_state, p, CHUNK);
                    slope += f64::from(scale_and_dot(dkp, x, kp, &to_end, &to_end_slope, p));
                    scale_rows_in_place(kp, &to_end, p);
                    product(dvp, p, [CHUNK, p, n], Left::rows(kp, p), grad, p, Start::Zero, &mut ahead);
                    slope += f64::from(decay.slope[c] * dot(state, grad));
                    Start::Accumulate
                } else {
                    Start::Zero
                };
                lower_transposed_product(dkp, cross, rp, p, start, &mut ahead);
                lower_transposed_product(dvp, pairs, dyp, p, start, &mut ahead);
                for (to, m) in [(&dr, &*drp), (&dk, dkp), (&dv, dvp)] {
                    // SAFETY: the gradients are this task's own, and the block is not borrowed elsewhere.
                    unpack(unsafe { to.shared_block(from..from + c, 0..n) }, m, 1.0);
                }
                if from > 0 {
                    scale_rows_in_place(rp, &decay.power[..CHUNK], p);
                    total.fill(decay.power[c]);
                    product(grad, p, [n, p, c], Left::transposed(rp, p), dyp, p, Start::Scale(total), &mut ahead);
                }
            }
        }
    });
    [slope, bonus]
}

/// One token: `r`, `k`, `v`, `y` `[B, H*N]`, `state` `[B, H, N, N]` updated in place.
///
/// # Panics
/// If sizes do not fit.
pub fn wkv_step(
    y: RowsMut<'_>,
    state: &mut [f32],
    r: Rows<'_>,
    k: Rows<'_>,
    v: Rows<'_>,
    time_decay: &[f32],
    time_faaaa: &[f32],
) {
    let batch = r.rows();
    let (_, heads, size) = sizes(&r, time_decay, time_faaaa, batch);
    let shape = (batch, r.cols());
    assert!([(y.rows(), y.cols()), (k.rows(), k.cols()), (v.rows(), v.cols())] == [shape; 3], "shapes differ");
    let dense = size * size;
    assert!(state.len() == batch * heads * dense, "size of the state");
    let shared = SharedSlice::new(state);
    parallel_ranges(batch * heads, STEP_GRAIN / dense, |tasks| {
        with_scratch(size, |decay| {
            for task in tasks {
                let (b, h) = (task / heads, task % heads);
                let cols = h * size..(h + 1) * size;
                decay.fill((-f64::from(time_decay[h]).exp()).exp() as f32);
                // SAFETY: a task owns its columns of its row of y, and its state.
                let (y, state) =
                    unsafe { (&mut y.shared_row(b)[cols.clone()], shared.range(task * dense..(task + 1) * dense)) };
                let [r, k, v] = [&r, &k, &v].map(|m| &m.row(b)[cols.clone()]);
                step(y, state, r, k, v, decay, 1.0, Some(time_faaaa[h]));
            }
        });
    });
}

simd_fn! {
    /// `x *= by`; lengths a multiple of 16.
    fn multiply(s: S, x: &mut [f32], by: &[f32]) {
        let mut i = 0;
        while i < x.len() {
            let y = s.mul(s.load(&x[i..]), s.load(&by[i..]));
            s.store(&mut x[i..], y);
            i += S::LANES;
        }
    }

    /// Sum of `a b`; lengths a multiple of 16.
    fn dot(s: S, a: &[f32], b: &[f32]) -> f32 {
        let mut sum = [s.zero(); 2];
        let mut i = 0;
        while i < a.len() {
            let n = i / S::LANES % 2;
            sum[n] = s.fma(s.load(&a[i..]), s.load(&b[i..]), sum[n]);
            i += S::LANES;
        }
        s.sum(s.add(sum[0], sum[1]))
    }

    /// Sum of `a b c`; lengths a multiple of 16.
    fn dot3(s: S, a: &[f32], b: &[f32], c: &[f32]) -> f32 {
        let mut sum = s.zero();
        let mut i = 0;
        while i < a.len() {
            sum = s.fma(s.mul(s.load(&a[i..]), s.load(&b[i..])), s.load(&c[i..]), sum);
            i += S::LANES;
        }
        s.sum(sum)
    }

    /// `to_i = weight_i x_i`; returns the sum of `slope_i (x_i . with_i)`.
    fn scale_and_dot(
        s: S, to: &mut [f32], x: &[f32], with: &[f32], weight: &[f32], slope: &[f32], width: usize,
    ) -> f32 {
        let mut sum = s.zero();
        for r in 0..CHUNK {
            let at = r * width..(r + 1) * width;
            let (to, x, with) = (&mut to[at.clone()], &x[at.clone()], &with[at]);
            let (w, d) = (s.splat(weight[r]), s.splat(slope[r]));
            let mut row = s.zero();
            let mut i = 0;
            while i < width {
                let v = s.load(&x[i..]);
                s.store(&mut to[i..], s.mul(v, w));
                row = s.fma(v, s.load(&with[i..]), row);
                i += S::LANES;
            }
            sum = s.fma(row, d, sum);
        }
        s.sum(sum)
    }
}
