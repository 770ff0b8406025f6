//! The Longhorn online update (arXiv:2407.14207).
//!
//! Per sequence and channel, with the state `h` of `N` elements and `k_t`, `q_t` shared by all channels:
//!
//! ```text
//! b = sigmoid(dt + t_bias)      e = b / (1 + b |k|²)
//! h = (1 - e k²) h + e u k      y = (q·h + D u) silu(z)
//! ```
//!
//! How the work is arranged is told in [`scan`](super::scan). Two rewritings make the arithmetic short:
//! `e = 1 / (1 + |k|² + exp(-dt - t_bias))`, one exponential and one division for a row of a channel; and
//! `ρ = e u - (e k) h`, `h = h + k ρ`, so that an element of the state takes four multiply-adds (`e k`, `ρ`, `h`,
//! `y`).
//!
//! In the backward pass, the states are computed again together with the gradient of `q`, and what is kept of
//! them is `ρ`. With `λ` the gradient of `h_t` and sums over states for a channel, over channels for `k`:
//!
//! ```text
//! λ = λ' + q dy    m = k λ    M = Σ m    S = Σ m ρ    dk = Σ λ (2 ρ - e u) - 2 k Σ e S    λ' = λ - k e m
//! du = D dy + e M        ddt = S e exp(-dt - t_bias)
//! ```
//!
//! That is six multiply-adds and three additions; `-2 k Σ e S` is the path through `|k|²`.

use super::scan::{self, Recurrence, Sums, exp_neg};
use super::simd::Simd;
use crate::{Rows, RowsMut};

pub use super::scan::Dims;

/// What the scan reads. Activations have `B T` rows, row `b T + t`.
#[derive(Clone, Copy)]
pub struct Inputs<'a> {
    /// `[B T, D]`
    pub u: Rows<'a>,
    /// Step size before bias and sigmoid, `[B T, D]`.
    pub dt: Rows<'a>,
    /// `[B T, N]`
    pub q: Rows<'a>,
    /// `[B T, N]`
    pub k: Rows<'a>,
    /// Added to `dt`, `[D]`.
    pub t_bias: Option<&'a [f32]>,
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
    pub dt: RowsMut<'a>,
    /// `[B T, N]`
    pub q: RowsMut<'a>,
    /// `[B T, N]`
    pub k: RowsMut<'a>,
    /// `[D]`
    pub t_bias: Option<&'a mut [f32]>,
    /// `[D]`
    pub skip: Option<&'a mut [f32]>,
    /// `[B T, D]`, given exactly if there is a gate.
    pub gate: Option<RowsMut<'a>>,
}

impl Inputs<'_> {
    fn scan(&self) -> scan::Inputs<'_> {
        scan::Inputs {
            u: self.u,
            step: self.dt,
            q: self.q,
            k: self.k,
            bias: self.t_bias,
            skip: self.skip,
            gate: self.gate,
            rates: None,
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
    scan::forward::<Longhorn>(dims, &inputs.scan(), y, state, boundaries);
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
        step: g.dt,
        q: g.q,
        k: g.k,
        bias: g.t_bias,
        skip: g.skip,
        gate: g.gate,
        rates: None,
        rate_scale: 0.0,
    };
    scan::backward::<Longhorn>(dims, &inputs.scan(), dy, boundaries, gradients);
}

/// `first = e`, `second = e u`, `slope = e exp(-dt - t_bias)`; kept: `ρ`; sums: `S`, `M`.
#[derive(Clone, Copy)]
struct Longhorn;

impl Recurrence for Longhorn {
    const RATES: bool = false;
    const SQUARES: bool = true;
    const KEPT: usize = 1;

    #[inline(always)]
    fn prepare<S: Simd>(s: S, step: S::F, u: S::F, squares: S::F) -> [S::F; 3] {
        let exp = exp_neg(s, step);
        let e = s.div(s.splat(1.0), s.add(s.add(s.splat(1.0), squares), exp));
        [e, s.mul(e, u), s.mul(e, exp)]
    }

    #[inline(always)]
    fn update<S: Simd>(s: S, [e, eu]: [S::F; 2], k: S::F, _: S::F, h: S::F) -> (S::F, [S::F; 2]) {
        let rho = s.fnma(s.mul(e, k), h, eu);
        (s.fma(k, rho, h), [rho, rho])
    }

    #[inline(always)]
    fn adjoint<S: Simd>(
        s: S,
        [e, eu]: [S::F; 2],
        k: S::F,
        _: S::F,
        [rho, _]: [S::F; 2],
        lambda: S::F,
        sums: &mut Sums<S>,
    ) -> S::F {
        let m = s.mul(k, lambda);
        sums.channel = [s.fma(m, rho, sums.channel[0]), s.add(sums.channel[1], m)];
        sums.k = s.fma(lambda, s.sub(s.add(rho, rho), eu), sums.k);
        s.fnma(k, s.mul(e, m), lambda)
    }

    #[inline(always)]
    fn gradients<S: Simd>(s: S, [e, _, slope]: [S::F; 3], _: S::F, [s_sum, m_sum]: [S::F; 2]) -> [S::F; 3] {
        [s.mul(e, m_sum), s.mul(s_sum, slope), s.neg(s.mul(e, s_sum))]
    }
}
