//! The recurrent form: further tokens of sequences, from a state.

use super::chunk::{chunk_states_len, forward_from};
use super::{Decay, Dims};
use crate::cpu::threads::{parallel_ranges, with_scratch};
use crate::rows::SharedSlice;
use crate::{Rows, RowsMut, simd_fn};

/// Tokens at the positions `position..`, from and to `state` `[batch, heads, key_dim, value_dim]`, which is 0 before the first
/// token: `S_t = gamma S_(t-1) + k_t^T v_t`, `y_t = q_t S_t / sqrt(gamma^0 + … + gamma^t)`.
///
/// One token reads and writes the state once, with `y` in registers; more are computed in chunks.
pub fn extend(
    dims: Dims,
    position: usize,
    q: Rows<'_>,
    k: Rows<'_>,
    v: Rows<'_>,
    state: &mut [f32],
    mut y: RowsMut<'_>,
) {
    let Dims { time, heads, key_dim, value_dim, .. } = dims;
    dims.check(&[q, k], &[v, y.as_rows()]);
    let size = key_dim * value_dim;
    assert_eq!(state.len(), dims.pairs() * size);
    if time != 1 {
        return with_scratch(chunk_states_len(dims), |states| {
            forward_from(dims, position, Some(state), q, k, v, y.reborrow(), states);
            let chunks = states.len() / state.len().max(1);
            for (pair, state) in state.chunks_exact_mut(size).enumerate() {
                state.copy_from_slice(&states[((pair + 1) * chunks - 1) * size..][..size]);
            }
        });
    }
    let state = SharedSlice::new(state);
    parallel_ranges(dims.pairs(), (1 << 15) / size.max(1), |range| {
        for pair in range {
            let (batch, head) = (pair / heads, pair % heads);
            let decay = Decay::new(head);
            // SAFETY: this state, and these columns of `y`, belong to this task alone.
            let (state, mut y) = unsafe {
                (
                    state.range(pair * size..(pair + 1) * size),
                    y.shared_block(batch..batch + 1, head * value_dim..(head + 1) * value_dim),
                )
            };
            let [q, k] = [q, k].map(|x| &x.row(batch)[head * key_dim..(head + 1) * key_dim]);
            let v = &v.row(batch)[head * value_dim..(head + 1) * value_dim];
            step(q, k, v, decay.power(1.0) as f32, (1.0 / decay.mass(position).sqrt()) as f32, state, y.row(0));
        }
    });
}

simd_fn! {
    /// `state = keep state + k^T v`, `y = scale q state`
    fn step(s: S, q: &[f32], k: &[f32], v: &[f32], keep: f32, scale: f32, state: &mut [f32], y: &mut [f32]) {
        let (keep, width) = (s.splat(keep), v.len());
        let mut c = 0;
        while c + 4 * S::LANES <= width {
            let v: [S::F; 4] = std::array::from_fn(|i| s.load(&v[c + i * S::LANES..]));
            let mut sum = [s.zero(); 4];
            for ((row, &q), &k) in state.chunks_exact_mut(width).zip(q).zip(k) {
                let (q, k) = (s.splat(q * scale), s.splat(k));
                for i in 0..4 {
                    let at = &mut row[c + i * S::LANES..];
                    let x = s.fma(keep, s.load(at), s.mul(k, v[i]));
                    s.store(at, x);
                    sum[i] = s.fma(q, x, sum[i]);
                }
            }
            for (i, sum) in sum.into_iter().enumerate() {
                s.store(&mut y[c + i * S::LANES..], sum);
            }
            c += 4 * S::LANES;
        }
        while c < width {
            let n = (width - c).min(S::LANES);
            let v = s.load_partial(&v[c..], n);
            let mut sum = s.zero();
            for ((row, &q), &k) in state.chunks_exact_mut(width).zip(q).zip(k) {
                let at = &mut row[c..];
                let x = s.fma(keep, s.load_partial(at, n), s.mul(s.splat(k), v));
                s.store_partial(at, n, x);
                sum = s.fma(s.splat(q * scale), x, sum);
            }
            s.store_partial(&mut y[c..], n, sum);
            c += n;
        }
    }
}
