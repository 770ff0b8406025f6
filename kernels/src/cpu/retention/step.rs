//! The recurrent form: one token.

use super::{Decay, Dims};
use crate::cpu::threads::parallel_ranges;
use crate::rows::SharedSlice;
use crate::{Rows, RowsMut, simd_fn};

/// One token per sequence (`dims.time` is 1), from and to `state` `[batch, heads, key_dim, value_dim]` and `scale` `[heads]`,
/// both 0 before the first token:
///
/// ```text
/// m = gamma scale + 1,   S = S gamma sqrt(scale / m) + k^T v / sqrt(m),   y = q S,   scale = m
/// ```
///
/// The state is read and written once, with `y` in registers.
pub fn step(dims: Dims, q: Rows<'_>, k: Rows<'_>, v: Rows<'_>, state: &mut [f32], scale: &mut [f32], y: RowsMut<'_>) {
    let Dims { time, heads, key_dim, value_dim, .. } = dims;
    assert_eq!(time, 1);
    dims.check(&[q, k], &[v, y.as_rows()]);
    let size = key_dim * value_dim;
    assert!(state.len() == dims.pairs() * size && scale.len() == heads);
    let state = SharedSlice::new(state);
    let old = &*scale;
    parallel_ranges(dims.pairs(), (1 << 15) / size.max(1), |range| {
        for pair in range {
            let (batch, head) = (pair / heads, pair % heads);
            let decay = Decay::new(head).power(1.0) as f32;
            let mass = old[head] * decay + 1.0;
            // SAFETY: this state, and these columns of `y`, belong to this task alone.
            let (state, mut y) = unsafe {
                (
                    state.range(pair * size..(pair + 1) * size),
                    y.shared_block(batch..batch + 1, head * value_dim..(head + 1) * value_dim),
                )
            };
            let [q, k] = [q, k].map(|x| &x.row(batch)[head * key_dim..(head + 1) * key_dim]);
            let v = &v.row(batch)[head * value_dim..(head + 1) * value_dim];
            step_pair(q, k, v, (old[head] / mass).sqrt() * decay, 1.0 / mass.sqrt(), state, y.row(0));
        }
    });
    for (head, scale) in scale.iter_mut().enumerate() {
        *scale = *scale * Decay::new(head).power(1.0) as f32 + 1.0;
    }
}

simd_fn! {
    /// `state = keep state + add k^T v`, `y = q state`
    fn step_pair(s: S, q: &[f32], k: &[f32], v: &[f32], keep: f32, add: f32, state: &mut [f32], y: &mut [f32]) {
        let (keep, width) = (s.splat(keep), v.len());
        let mut c = 0;
        while c + 4 * S::LANES <= width {
            let v: [S::F; 4] = std::array::from_fn(|i| s.load(&v[c + i * S::LANES..]));
            let mut sum = [s.zero(); 4];
            for ((row, &q), &k) in state.chunks_exact_mut(width).zip(q).zip(k) {
                let (q, k) = (s.splat(q), s.splat(k * add));
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
                let x = s.fma(keep, s.load_partial(at, n), s.mul(s.splat(k * add), v));
                s.store_partial(at, n, x);
                sum = s.fma(s.splat(q), x, sum);
            }
            s.store_partial(&mut y[c..], n, sum);
            c += n;
        }
    }
}
