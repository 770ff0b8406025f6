//! AdamW and gradient clipping.
//!
//! One pass over parameter, gradient and both moments: seven streams of memory, which is what bounds it. The
//! factor that clipping gives the gradient is applied on the way, so clipped gradients are never written.

use super::simd::Simd;
use super::threads::parallel_ranges;
use crate::rows::SharedSlice;

/// Elements of a parallel task.
const GRAIN: usize = 32 * 1024;

/// Settings of one step of AdamW (Loshchilov and Hutter, "Decoupled weight decay regularization", 2019).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Weight decay, decoupled from the gradient.
    pub decay: f64,
    /// Number of the step, from 1.
    pub step: u64,
    /// Factor on the gradient, see [`clip_coefficient`].
    pub grad_scale: f32,
}

/// What the gradients are multiplied by so that their norm does not exceed `max`:
/// `min(1, max / (norm + 1e-6))`. NaN where the norm is.
pub fn clip_coefficient(norm: f64, max: f64) -> f32 {
    let coefficient = max / (norm + 1e-6);
    if coefficient > 1.0 { 1.0 } else { coefficient as f32 }
}

/// One step for one parameter. With `g = grad_scale * grad`:
///
/// ```text
/// m = beta1 m + (1 - beta1) g
/// v = beta2 v + (1 - beta2) g²
/// param = (1 - lr decay) param - lr (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps)
/// ```
///
/// # Panics
/// If the lengths differ or `step` is 0.
pub fn adamw(param: &mut [f32], grad: &[f32], m: &mut [f32], v: &mut [f32], settings: AdamW) {
    let len = param.len();
    assert!(grad.len() == len && m.len() == len && v.len() == len, "lengths of parameter, gradient and moments");
    assert!(settings.step > 0, "steps count from 1");
    let AdamW { lr, beta1, beta2, eps, decay, step, grad_scale } = settings;
    let correction = |beta: f64| 1.0 - beta.powf(step as f64);
    let factors = Factors {
        grad: grad_scale,
        beta1: beta1 as f32,
        rest1: (1.0 - beta1) as f32,
        beta2: beta2 as f32,
        rest2: (1.0 - beta2) as f32,
        shrink: (1.0 - lr * decay) as f32,
        rate: (lr / correction(beta1)) as f32,
        root: (1.0 / correction(beta2).sqrt()) as f32,
        eps: eps as f32,
    };
    let (param, m, v) = (SharedSlice::new(param), SharedSlice::new(m), SharedSlice::new(v));
    parallel_ranges(len, GRAIN, |range| {
        // SAFETY: each task has its own range.
        let (p, m, v) = unsafe { (param.range(range.clone()), m.range(range.clone()), v.range(range.clone())) };
        adamw_part(p, &grad[range], m, v, factors);
    });
}

/// Constants of one step.
#[derive(Clone, Copy)]
struct Factors {
    grad: f32,
    beta1: f32,
    rest1: f32,
    beta2: f32,
    rest2: f32,
    shrink: f32,
    rate: f32,
    root: f32,
    eps: f32,
}

crate::simd_fn! {
    fn adamw_part(s: S, param: &mut [f32], grad: &[f32], m: &mut [f32], v: &mut [f32], f: Factors) {
        let vectors = param.chunks_mut(S::LANES).zip(grad.chunks(S::LANES));
        let moments = m.chunks_mut(S::LANES).zip(v.chunks_mut(S::LANES));
        for ((p, g), (m, v)) in vectors.zip(moments) {
            // masked accesses are slow where masks are vectors, so only at the end
            let n = p.len();
            if n == S::LANES {
                let new = update(s, [s.load(p), s.load(g), s.load(m), s.load(v)], f);
                s.store(p, new[0]);
                s.store(m, new[1]);
                s.store(v, new[2]);
            } else {
                let old = [s.load_partial(p, n), s.load_partial(g, n), s.load_partial(m, n), s.load_partial(v, n)];
                let new = update(s, old, f);
                s.store_partial(p, n, new[0]);
                s.store_partial(m, n, new[1]);
                s.store_partial(v, n, new[2]);
            }
        }
    }
}

/// Parameter and moments after the step.
#[inline(always)]
fn update<S: Simd>(s: S, [param, grad, m, v]: [S::F; 4], f: Factors) -> [S::F; 3] {
    let g = s.mul(grad, s.splat(f.grad));
    let m = s.fma(m, s.splat(f.beta1), s.mul(g, s.splat(f.rest1)));
    let v = s.fma(v, s.splat(f.beta2), s.mul(s.mul(g, g), s.splat(f.rest2)));
    let denominator = s.fma(s.sqrt(v), s.splat(f.root), s.splat(f.eps));
    let step = s.div(s.mul(m, s.splat(f.rate)), denominator);
    [s.sub(s.mul(param, s.splat(f.shrink)), step), m, v]
}
