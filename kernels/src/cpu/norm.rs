//! RMS, layer and group normalisation, forward and backward.
//!
//! Rows are `[rows, groups * width]`; each group of `width` columns is normalised on its own, so one kernel is
//! RMSNorm (Zhang & Sennrich 2019) and LayerNorm (Ba et al. 2016) with one group, GroupNorm of every row (Wu & He
//! 2018, as RWKV and RetNet use it) and the norm of every head with several:
//!
//! ```text
//! n = (x - mean) * inv        Layer: inv = (var + eps)^-1/2    Rms: mean = 0, inv = (mean(x^2) + eps)^-1/2
//! y = n * weight + bias
//! g = dy * weight             dx = inv * (g - mean(g) [Layer] - n * mean(g * n))
//! dweight = sum_rows dy * n   dbias = sum_rows dy
//! ```
//!
//! The kernels are bound by memory bandwidth. A row is read from memory once; the second and third look at it
//! (variance, then result) find it in L1. Lanes run along the channels. The residual addition before a norm, and the
//! addition of the residual's gradient after its backward, are done in the same pass, which saves a read and a write
//! of the whole stream. Parameter gradients are summed per fixed block of rows, then over the blocks in order.

use std::ops::Range;

use super::lanes::{Partials, grain, lanes, ld, st, sum_partials};
use super::output::Output;
use super::simd::Simd;
use super::threads::{parallel_for, parallel_ranges, with_scratch};
use crate::rows::SharedSlice;
use crate::{Rows, RowsMut, simd_fn};

/// What is divided out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The root mean square.
    Rms,
    /// The standard deviation (biased), after taking away the mean.
    Layer,
}

/// A normalisation over groups of the last dimension.
#[derive(Clone, Copy, Debug)]
pub struct Norm {
    /// What is divided out.
    pub kind: Kind,
    /// Groups of a row; 1 normalises the whole row.
    pub groups: usize,
    /// Added to the mean square before the root.
    pub eps: f32,
}

impl Norm {
    /// Saved statistics of a row: `[groups]` inverse rms, or `[groups, 2]` mean and inverse standard deviation.
    pub fn stats_per_row(&self) -> usize {
        match self.kind {
            Kind::Rms => self.groups,
            Kind::Layer => 2 * self.groups,
        }
    }
}

/// An addition before the norm: the norm sees `h = x + residual`.
pub struct Residual<'a> {
    /// `[rows, C]`, added to x.
    pub residual: Rows<'a>,
    /// `[rows, C]`, receives the sum.
    pub h: RowsMut<'a>,
}

/// `y = norm(x) * weight + bias`, or the norm of `x + residual`.
///
/// x, y `[rows, C]`; weight, bias `[C]`, 1 and 0 where absent; stats `[rows, norm.stats_per_row()]` is what
/// [`backward`] needs.
pub fn forward<'a>(
    norm: Norm,
    x: Rows<'_>,
    residual: Option<Residual<'_>>,
    weight: Option<&[f32]>,
    bias: Option<&[f32]>,
    y: impl Into<Output<'a>>,
    stats: Option<&mut [f32]>,
) {
    let y = y.into();
    let (rows, cols) = (x.rows(), x.cols());
    check(norm, cols, [weight, bias]);
    assert!(y.rows() == rows && y.cols() == cols);
    if let Some(r) = &residual {
        assert!(r.residual.rows() == rows && r.residual.cols() == cols && r.h.rows() == rows && r.h.cols() == cols);
    }
    if let Some(stats) = &stats {
        assert_eq!(stats.len(), rows * norm.stats_per_row());
    }
    let task = Forward { norm, x, residual, weight, bias, y, stats: stats.map(SharedSlice::new) };
    parallel_ranges(rows, grain(cols), |range| {
        with_scratch(task.y.line(), |line| match norm.kind {
            Kind::Rms => forward_rms(&task, range, line),
            Kind::Layer => forward_layer(&task, range, line),
        })
    });
}

/// The gradients of [`forward`].
///
/// x is the norm's input (h where a residual was added), `stats` what forward saved, dy the gradient of y. Writes
/// `dx = norm'(dy) + dh`, with dh the gradient that reaches the input on other ways (the residual path), 0 if absent;
/// dx is then the gradient of both x and residual. Writes dweight and dbias `[C]` where asked for.
#[allow(clippy::too_many_arguments)]
pub fn backward(
    norm: Norm,
    x: Rows<'_>,
    stats: &[f32],
    weight: Option<&[f32]>,
    dy: Rows<'_>,
    dh: Option<Rows<'_>>,
    dx: RowsMut<'_>,
    dweight: Option<&mut [f32]>,
    dbias: Option<&mut [f32]>,
) {
    let (rows, cols) = (x.rows(), x.cols());
    check(norm, cols, [weight, dweight.as_deref(), dbias.as_deref()]);
    assert!(dy.rows() == rows && dy.cols() == cols && dx.rows() == rows && dx.cols() == cols);
    assert!(dh.is_none_or(|dh| dh.rows() == rows && dh.cols() == cols));
    assert_eq!(stats.len(), rows * norm.stats_per_row());
    let task = Backward { norm, x, stats, weight, dy, dh, dx };
    let blocks = Partials::new(rows);
    let (weight_sums, bias_sums) = (if dweight.is_some() { cols } else { 0 }, if dbias.is_some() { cols } else { 0 });
    let sums = weight_sums + bias_sums;
    with_scratch(blocks.count * sums, |scratch| {
        let shared = SharedSlice::new(scratch);
        parallel_for(blocks.count, |block| {
            // SAFETY: every block has its own range.
            let partial = unsafe { shared.range(block * sums..(block + 1) * sums) };
            partial.fill(0.0);
            let (dweight, dbias) = partial.split_at_mut(weight_sums);
            match norm.kind {
                Kind::Rms => backward_rms(&task, blocks.range(block), dweight, dbias),
                Kind::Layer => backward_layer(&task, blocks.range(block), dweight, dbias),
            }
        });
        if let Some(dweight) = dweight {
            sum_partials(scratch, blocks.count, sums, 0, dweight);
        }
        if let Some(dbias) = dbias {
            sum_partials(scratch, blocks.count, sums, weight_sums, dbias);
        }
    });
}

fn check<const N: usize>(norm: Norm, cols: usize, parameters: [Option<&[f32]>; N]) {
    assert!(norm.groups > 0 && cols.is_multiple_of(norm.groups), "{cols} columns in {} groups", norm.groups);
    assert!(parameters.iter().flatten().all(|p| p.len() == cols));
}

struct Forward<'a> {
    norm: Norm,
    x: Rows<'a>,
    residual: Option<Residual<'a>>,
    weight: Option<&'a [f32]>,
    bias: Option<&'a [f32]>,
    y: Output<'a>,
    stats: Option<SharedSlice<'a, f32>>,
}

struct Backward<'a> {
    norm: Norm,
    x: Rows<'a>,
    stats: &'a [f32],
    weight: Option<&'a [f32]>,
    dy: Rows<'a>,
    dh: Option<Rows<'a>>,
    dx: RowsMut<'a>,
}

simd_fn! {
    fn forward_rms(s: S, task: &Forward<'_>, range: Range<usize>, line: &mut [f32]) {
        forward_rows::<S, false>(s, task, range, line)
    }
    fn forward_layer(s: S, task: &Forward<'_>, range: Range<usize>, line: &mut [f32]) {
        forward_rows::<S, true>(s, task, range, line)
    }
    fn backward_rms(s: S, task: &Backward<'_>, range: Range<usize>, dweight: &mut [f32], dbias: &mut [f32]) {
        backward_rows::<S, false>(s, task, range, dweight, dbias)
    }
    fn backward_layer(s: S, task: &Backward<'_>, range: Range<usize>, dweight: &mut [f32], dbias: &mut [f32]) {
        backward_rows::<S, true>(s, task, range, dweight, dbias)
    }
}

/// The sum of four accumulators' lanes.
#[inline(always)]
fn total<S: Simd>(s: S, [a, b, c, d]: [S::F; 4]) -> f32 {
    s.sum(s.add(s.add(a, b), s.add(c, d)))
}

#[inline(always)]
fn forward_rows<S: Simd, const LAYER: bool>(s: S, task: &Forward<'_>, range: Range<usize>, line: &mut [f32]) {
    for r in range {
        // SAFETY: this task alone has these rows of y.
        unsafe {
            forward_row::<S, LAYER>(s, task, r, task.y.begin(r, line));
            task.y.finish(s, r, line);
        }
    }
}

#[inline(always)]
fn forward_row<S: Simd, const LAYER: bool>(s: S, task: &Forward<'_>, r: usize, y_row: &mut [f32]) {
    let Norm { groups, eps, .. } = task.norm;
    let width = task.x.cols() / groups;
    for g in 0..groups {
        let at = g * width..(g + 1) * width;
        let mut x = &task.x.row(r)[at.clone()];
        // four sums in turn, so that an addition does not wait for the one before
        let mut sums = [s.zero(); 4];
        if let Some(residual) = &task.residual {
            let add = &residual.residual.row(r)[at.clone()];
            // SAFETY: this task alone has these rows of h.
            let h = unsafe { &mut residual.h.shared_row(r)[at.clone()] };
            lanes!(S, width, |i, n| {
                // SAFETY: the slices have `width` elements.
                unsafe {
                    let v = s.add(ld(s, x, i, n), ld(s, add, i, n));
                    st(s, h, i, n, v);
                    let [a, b, c, d] = sums;
                    sums = [b, c, d, if LAYER { s.add(a, v) } else { s.fma(v, v, a) }];
                }
            });
            x = h;
        } else {
            lanes!(S, width, |i, n| {
                // SAFETY: as above.
                let v = unsafe { ld(s, x, i, n) };
                let [a, b, c, d] = sums;
                sums = [b, c, d, if LAYER { s.add(a, v) } else { s.fma(v, v, a) }];
            });
        }
        let mut mean = 0.0;
        if LAYER {
            mean = total(s, sums) / width as f32;
            sums = [s.zero(); 4];
            let mean = s.splat(mean);
            lanes!(S, width, |i, n| {
                // SAFETY: as above. Lanes past the end must not count, so they get the mean.
                let v = unsafe { s.sub(ld(s, x, i, n), mean) };
                let v = if n == S::LANES { v } else { first(s, v, n) };
                let [a, b, c, d] = sums;
                sums = [b, c, d, s.fma(v, v, a)];
            });
        }
        let inv = 1.0 / (total(s, sums) / width as f32 + eps).sqrt();
        if let Some(stats) = &task.stats {
            let i = r * groups + g;
            // SAFETY: this row's statistics belong to this task.
            unsafe {
                if LAYER {
                    stats.range(2 * i..2 * i + 2).copy_from_slice(&[mean, inv]);
                } else {
                    stats.range(i..i + 1)[0] = inv;
                }
            }
        }
        let (mean, inv) = (s.splat(mean), s.splat(inv));
        let y = &mut y_row[at.clone()];
        let weight = task.weight.map(|w| &w[at.clone()]);
        let bias = task.bias.map(|b| &b[at.clone()]);
        lanes!(S, width, |i, n| {
            // SAFETY: as above.
            unsafe {
                let v = ld(s, x, i, n);
                let mut v = s.mul(if LAYER { s.sub(v, mean) } else { v }, inv);
                if let Some(w) = weight {
                    v = s.mul(v, ld(s, w, i, n));
                }
                if let Some(b) = bias {
                    v = s.add(v, ld(s, b, i, n));
                }
                st(s, y, i, n, v);
            }
        });
    }
}

/// The first `n` lanes of `v`, the others 0.
#[inline(always)]
fn first<S: Simd>(s: S, v: S::F, n: usize) -> S::F {
    s.select(s.lt(s.to_float(s.iota()), s.splat(n as f32)), v, s.zero())
}

#[inline(always)]
fn backward_rows<S: Simd, const LAYER: bool>(
    s: S,
    task: &Backward<'_>,
    range: Range<usize>,
    dweight: &mut [f32],
    dbias: &mut [f32],
) {
    let groups = task.norm.groups;
    let width = task.x.cols() / groups;
    for r in range {
        // SAFETY: this task alone has these rows of dx.
        let dx_row = unsafe { task.dx.shared_row(r) };
        for g in 0..groups {
            let at = g * width..(g + 1) * width;
            let i = r * groups + g;
            let (mean, inv) = if LAYER { (task.stats[2 * i], task.stats[2 * i + 1]) } else { (0.0, task.stats[i]) };
            // n = x * inv - mean * inv would cancel badly where the mean is large
            let (mean, inv) = (s.splat(mean), s.splat(inv));
            let (x, dy, dx) = (&task.x.row(r)[at.clone()], &task.dy.row(r)[at.clone()], &mut dx_row[at.clone()]);
            let weight = task.weight.map(|w| &w[at.clone()]);
            let dh = task.dh.map(|dh| &dh.row(r)[at.clone()]);
            let mut dweight = if dweight.is_empty() { None } else { Some(&mut dweight[at.clone()]) };
            let mut dbias = if dbias.is_empty() { None } else { Some(&mut dbias[at.clone()]) };
            let (mut g_sums, mut gn_sums) = ([s.zero(); 4], [s.zero(); 4]);
            lanes!(S, width, |i, n| {
                // SAFETY: the slices have `width` elements.
                unsafe {
                    let d = ld(s, dy, i, n);
                    let v = ld(s, x, i, n);
                    // lanes past the end have d = 0, so they add nothing whatever v is
                    let v = s.mul(if LAYER { s.sub(v, mean) } else { v }, inv);
                    if let Some(dw) = &mut dweight {
                        let sum = s.fma(d, v, ld(s, dw, i, n));
                        st(s, dw, i, n, sum);
                    }
                    if let Some(db) = &mut dbias {
                        let sum = s.add(d, ld(s, db, i, n));
                        st(s, db, i, n, sum);
                    }
                    let grad = match weight {
                        Some(w) => s.mul(d, ld(s, w, i, n)),
                        None => d,
                    };
                    let [a, b, c, d] = gn_sums;
                    gn_sums = [b, c, d, s.fma(grad, v, a)];
                    if LAYER {
                        let [a, b, c, d] = g_sums;
                        g_sums = [b, c, d, s.add(grad, a)];
                    }
                }
            });
            let gn = s.splat(total(s, gn_sums) / width as f32);
            let g = s.splat(if LAYER { total(s, g_sums) / width as f32 } else { 0.0 });
            lanes!(S, width, |i, n| {
                // SAFETY: as above.
                unsafe {
                    let v = ld(s, x, i, n);
                    let v = s.mul(if LAYER { s.sub(v, mean) } else { v }, inv);
                    let d = ld(s, dy, i, n);
                    let mut grad = match weight {
                        Some(w) => s.mul(d, ld(s, w, i, n)),
                        None => d,
                    };
                    if LAYER {
                        grad = s.sub(grad, g);
                    }
                    let mut grad = s.mul(inv, s.fnma(v, gn, grad));
                    if let Some(dh) = dh {
                        grad = s.add(grad, ld(s, dh, i, n));
                    }
                    st(s, dx, i, n, grad);
                }
            });
        }
    }
}
