//! The Mamba selective scan (arXiv:2312.00752).
//!
//! Per sequence and channel, with the state `h` of `N` elements, `A` per channel, and `B_t`, `C_t` shared by all
//! channels:
//!
//! ```text
//! d = softplus(delta + delta_bias)      A = -exp(A_log)
//! h = exp(d A) h + d u B                y = (C·h + D u) silu(z)
//! ```
//!
//! How the work is arranged is told in [`scan`](super::scan). The exponential of every element of the state is
//! most of the work. Its argument is never positive, and `log2 e` is folded into `A`, which leaves a
//! multiplication, a bound, a rounding and a polynomial: about ten instructions beside the three of the recurrence.
//!
//! In the backward pass, the states are computed again together with the gradient of `C`. What is kept of them,
//! for four states at a time, is `a = exp(d A)` and `g = a h'` (`h'` is the state before the row): to store them
//! takes less time than to compute the exponential twice. With `λ` the gradient of `h_t` and sums over states for
//! a channel, over channels for `B`, over time for `A`:
//!
//! ```text
//! λ = λ' + C dy    x = λ g    X = Σ x A    G = Σ λ B    dB = Σ λ d u    dA = Σ x d    λ' = a λ
//! du = D dy + d G             ddelta = (X + u G) sigmoid(delta + delta_bias)          dA_log = A dA
//! ```
//!
//! That is seven multiply-adds.

use std::f32::consts::{LN_2, LOG2_E};

use super::math;
use super::scan::{self, Recurrence, Sums, exp2, softplus_and_sigmoid};
use super::simd::Simd;
use super::threads::with_scratch;
use crate::{Rows, RowsMut, simd_fn};

pub use super::scan::Dims;

/// What the scan reads. Activations have `B T` rows, row `b T + t`.
#[derive(Clone, Copy)]
pub struct Inputs<'a> {
    /// `[B T, D]`
    pub u: Rows<'a>,
    /// Step size before bias and softplus, `[B T, D]`.
    pub delta: Rows<'a>,
    /// `[D, N]`
    pub a_log: &'a [f32],
    /// `B`, `[B T, N]`
    pub b: Rows<'a>,
    /// `C`, `[B T, N]`
    pub c: Rows<'a>,
    /// Added to `delta`, `[D]`.
    pub delta_bias: Option<&'a [f32]>,
    /// The skip connection `D`, `[D]`.
    pub skip: Option<&'a [f32]>,
    /// The gate `z`, `[B T, D]`.
    pub gate: Option<Rows<'a>>,
}

/// Where [`backward`] writes; everything is overwritten.
pub struct Gradients<'a> {
    /// `[B T, D]`
    pub u: RowsMut<'a>,
    /// `[B T, D]`
    pub delta: RowsMut<'a>,
    /// `[D, N]`
    pub a_log: Option<&'a mut [f32]>,
    /// `[B T, N]`
    pub b: RowsMut<'a>,
    /// `[B T, N]`
    pub c: RowsMut<'a>,
    /// `[D]`
    pub delta_bias: Option<&'a mut [f32]>,
    /// `[D]`
    pub skip: Option<&'a mut [f32]>,
    /// `[B T, D]`, given exactly if there is a gate.
    pub gate: Option<RowsMut<'a>>,
}

impl Inputs<'_> {
    /// Lends the inputs to `body`, with `A log2 e` as `[N, D]` for the vectors along channels.
    fn scan<R>(&self, dims: &Dims, body: impl FnOnce(&scan::Inputs<'_>) -> R) -> R {
        let (n, d) = (dims.state, dims.channels);
        assert_eq!(self.a_log.len(), d * n, "A_log");
        with_scratch(2 * d * n, |scratch| {
            let (rows, columns) = scratch.split_at_mut(d * n);
            rates(self.a_log, rows);
            for (i, rates) in rows.chunks_exact(n.max(1)).enumerate() {
                rates.iter().enumerate().for_each(|(j, &x)| columns[j * d + i] = x);
            }
            body(&scan::Inputs {
                u: self.u,
                step: self.delta,
                q: self.c,
                k: self.b,
                bias: self.delta_bias,
                skip: self.skip,
                gate: self.gate,
                rates: Some(Rows::new(columns, n, d, d)),
            })
        })
    }
}

simd_fn! {
    /// `-exp(a_log) log2 e`
    fn rates(s: S, a_log: &[f32], to: &mut [f32]) {
        let mut i = 0;
        while i < to.len() {
            let n = (to.len() - i).min(S::LANES);
            let a = math::exp(s, s.load_partial(&a_log[i..], n));
            s.store_partial(&mut to[i..], n, s.mul(a, s.splat(-LOG2_E)));
            i += n;
        }
    }
}

/// `y` `[B T, D]` of the scan.
///
/// `state` `[B, N, D]` is read before the first row and replaced by the state after the last one; without it,
/// sequences start from zeros. `boundaries` (of [`Dims::boundaries_len`]) is written for [`backward`].
pub fn forward(
    dims: Dims,
    inputs: &Inputs<'_>,
    y: RowsMut<'_>,
    state: Option<&mut [f32]>,
    boundaries: Option<&mut [f32]>,
) {
    inputs.scan(&dims, |inputs| scan::forward::<Mamba>(dims, inputs, y, state, boundaries));
}

/// [`forward`] for one token of each sequence: `dims.time` is 1 and `state` `[B, N, D]` is updated.
pub fn step(dims: Dims, inputs: &Inputs<'_>, y: RowsMut<'_>, state: &mut [f32]) {
    assert_eq!(dims.time, 1, "a step is one row per sequence");
    forward(dims, inputs, y, Some(state), None);
}

/// Gradients of [`forward`] from the gradient `dy` `[B T, D]` of its result, its inputs and the `boundaries`
/// that it wrote. The gradient does not continue into the initial state.
pub fn backward(dims: Dims, inputs: &Inputs<'_>, dy: Rows<'_>, boundaries: &[f32], gradients: Gradients<'_>) {
    let g = gradients;
    let gradients = scan::Gradients {
        u: g.u,
        step: g.delta,
        q: g.c,
        k: g.b,
        bias: g.delta_bias,
        skip: g.skip,
        gate: g.gate,
        rates: g.a_log,
        rate_scale: LN_2, // what the driver knows as rates is A log2 e, and dA_log = A dA
    };
    inputs.scan(&dims, |inputs| scan::backward::<Mamba>(dims, inputs, dy, boundaries, gradients));
}

/// `first = d`, `second = d u`, `slope = sigmoid(delta + delta_bias)`; kept: `a`, `g`; sums: `X log2 e`, `G`.
#[derive(Clone, Copy)]
struct Mamba;

impl Recurrence for Mamba {
    const RATES: bool = true;
    const SQUARES: bool = false;
    const KEPT: usize = 2;

    #[inline(always)]
    fn prepare<S: Simd>(s: S, step: S::F, u: S::F, _: S::F) -> [S::F; 3] {
        let (d, slope) = softplus_and_sigmoid(s, step);
        [d, s.mul(d, u), slope]
    }

    #[inline(always)]
    fn update<S: Simd>(s: S, [d, du]: [S::F; 2], b: S::F, rate: S::F, h: S::F) -> (S::F, [S::F; 2]) {
        let a = exp2(s, s.mul(d, rate));
        let g = s.mul(a, h);
        (s.fma(du, b, g), [a, g])
    }

    #[inline(always)]
    fn adjoint<S: Simd>(
        s: S,
        [d, du]: [S::F; 2],
        b: S::F,
        rate: S::F,
        [a, g]: [S::F; 2],
        lambda: S::F,
        sums: &mut Sums<S>,
    ) -> S::F {
        let x = s.mul(lambda, g);
        sums.channel = [s.fma(x, rate, sums.channel[0]), s.fma(lambda, b, sums.channel[1])];
        sums.k = s.fma(lambda, du, sums.k);
        sums.rate = s.fma(x, d, sums.rate);
        s.mul(a, lambda)
    }

    #[inline(always)]
    fn gradients<S: Simd>(s: S, [d, _, slope]: [S::F; 3], u: S::F, [x, g]: [S::F; 2]) -> [S::F; 3] {
        let dd = s.fma(x, s.splat(LN_2), s.mul(g, u));
        [s.mul(d, g), s.mul(dd, slope), s.zero()]
    }
}
