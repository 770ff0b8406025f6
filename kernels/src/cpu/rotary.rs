//! Rotary position embedding (Su et al. 2021), in the two pairings in use.
//!
//! Every head's channels form D/2 pairs `(a, b)`; at position t pair i is turned by the angle `t * f_i`:
//! `(a, b) -> scale * (a cos - b sin, b cos + a sin)`. The gradient is the rotation by the negative angle.
//!
//! Angles are computed once, in `f64`, into tables `[T, D/2]` that stay in L1/L2 and serve all heads and sequences. The
//! rotation itself reads and writes every element once and is bound by memory bandwidth. [`Pairing::Half`] has lanes
//! along the pairs. [`Pairing::Interleaved`] is written as plain loops over blocks of pairs held in registers; the
//! compiler makes the shuffles, which [`Simd`](super::simd::Simd) does not offer.

use std::ops::Range;

use super::lanes::{InOut, grain, lanes, ld, ld_ptr, st_ptr};
use super::threads::parallel_ranges;
use crate::{Rows, RowsMut, simd_fn};

/// Which channels of a head form a pair, and the pairs' frequencies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pairing {
    /// LLaMA: channel i with i + D/2, frequency `base^(-2i/D)`.
    Half,
    /// RetNet (theta shift): channel 2i with 2i + 1, frequency `base^-(i / (D/2 - 1))`: the exponents run from 0 to 1
    /// inclusive.
    Interleaved,
}

/// Forward, or the gradient.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Rotation by the angle.
    Forward,
    /// Rotation by the negative angle: maps the gradient of y to that of x.
    Backward,
}

/// Fills `cos` and `sin`, both `[T, D/2]`, for the positions `offset .. offset + T`.
///
/// Angles are reduced in `f64`, so the tables are exact to `f32` rounding at any position that occurs.
pub fn angles(pairing: Pairing, base: f64, head_dim: usize, offset: usize, cos: &mut [f32], sin: &mut [f32]) {
    assert!(head_dim.is_multiple_of(2), "a head of {head_dim} channels has no pairs");
    let half = head_dim / 2;
    assert!(cos.len() == sin.len() && cos.len().is_multiple_of(half.max(1)));
    for i in 0..half {
        let exponent = match pairing {
            Pairing::Half => 2.0 * i as f64 / head_dim as f64,
            Pairing::Interleaved => i as f64 / (half.max(2) - 1) as f64,
        };
        let frequency = base.powf(-exponent);
        for t in 0..cos.len() / half {
            let (s, c) = ((offset + t) as f64 * frequency).sin_cos();
            cos[t * half + i] = c as f32;
            sin[t * half + i] = s as f32;
        }
    }
}

/// The tables of a rotation and how it is applied.
#[derive(Clone, Copy)]
pub struct Rotation<'a> {
    /// Which channels form a pair.
    pub pairing: Pairing,
    /// D, the channels of a head.
    pub head_dim: usize,
    /// `[T, D/2]`, see [`angles`]; row r of x (row `b * T + t`) is at position `t = r % T`.
    pub cos: &'a [f32],
    /// `[T, D/2]`
    pub sin: &'a [f32],
    /// A factor on the result; 1 for none.
    pub scale: f32,
}

/// `y = scale * rotate(x)`, x and y `[B*T, H*D]`. With [`Direction::Backward`], x is the gradient of the forward
/// result and y the gradient of its input.
pub fn rotate(rotation: Rotation<'_>, direction: Direction, x: Rows<'_>, y: RowsMut<'_>) {
    run(rotation, direction, InOut::apart(x, y));
}

/// [`rotate`] with x and y in the same memory.
pub fn rotate_in_place(rotation: Rotation<'_>, direction: Direction, y: RowsMut<'_>) {
    run(rotation, direction, InOut::in_place(y));
}

fn run(rotation: Rotation<'_>, direction: Direction, rows: InOut) {
    if rows.rows == 0 || rows.cols == 0 {
        return;
    }
    let half = rotation.head_dim / 2;
    assert!(half > 0 && rotation.head_dim.is_multiple_of(2) && rows.cols.is_multiple_of(rotation.head_dim));
    let len = rotation.cos.len() / half;
    assert!(len > 0 && rotation.cos.len() == len * half && rotation.sin.len() == len * half);
    assert!(rows.rows.is_multiple_of(len), "{} rows of sequences of {len}", rows.rows);
    let sin_scale = if direction == Direction::Forward { rotation.scale } else { -rotation.scale };
    parallel_ranges(rows.rows, grain(rows.cols), |range| match rotation.pairing {
        Pairing::Half => half_rows(rotation, sin_scale, &rows, range),
        Pairing::Interleaved => interleaved_rows(rotation, sin_scale, &rows, range),
    });
}

simd_fn! {
    fn half_rows(s: S, rotation: Rotation<'_>, sin_scale: f32, rows: &InOut, range: Range<usize>) {
        let half = rotation.head_dim / 2;
        let len = rotation.cos.len() / half;
        let (cos_scale, sin_scale) = (s.splat(rotation.scale), s.splat(sin_scale));
        for r in range {
            let at = (r % len) * half;
            let (cos, sin) = (&rotation.cos[at..at + half], &rotation.sin[at..at + half]);
            for head in (0..rows.cols).step_by(2 * half) {
                let (x, y) = (rows.x(r).wrapping_add(head), rows.y(r).wrapping_add(head));
                lanes!(S, half, |i, n| {
                    // SAFETY: the row has `cols` columns, of which the head's are 2 * half, and this task alone has it;
                    // a pair is read before it is written.
                    unsafe {
                        let (a, b) = (ld_ptr(s, x.add(i), n), ld_ptr(s, x.add(half + i), n));
                        let (c, d) = (s.mul(ld(s, cos, i, n), cos_scale), s.mul(ld(s, sin, i, n), sin_scale));
                        st_ptr(s, y.add(i), n, s.fnma(b, d, s.mul(a, c)));
                        st_ptr(s, y.add(half + i), n, s.fma(a, d, s.mul(b, c)));
                    }
                });
            }
        }
    }

    fn interleaved_rows(s: S, rotation: Rotation<'_>, sin_scale: f32, rows: &InOut, range: Range<usize>) {
        let _ = s;
        let half = rotation.head_dim / 2;
        let len = rotation.cos.len() / half;
        for r in range {
            let at = (r % len) * half;
            let (cos, sin) = (&rotation.cos[at..at + half], &rotation.sin[at..at + half]);
            for head in (0..rows.cols).step_by(2 * half) {
                let (x, y) = (rows.x(r).wrapping_add(head), rows.y(r).wrapping_add(head));
                // SAFETY: the row has `cols` columns, of which the head's are 2 * half, and this task alone has it;
                // pairs are read before they are written.
                unsafe {
                    let mut i = 0;
                    while i + PAIRS <= half {
                        turn::<PAIRS>(x.add(2 * i), y.add(2 * i), &cos[i..], &sin[i..], rotation.scale, sin_scale);
                        i += PAIRS;
                    }
                    while i < half {
                        turn::<1>(x.add(2 * i), y.add(2 * i), &cos[i..], &sin[i..], rotation.scale, sin_scale);
                        i += 1;
                    }
                }
            }
        }
    }
}

/// Interleaved pairs that are turned at a time.
const PAIRS: usize = 16;

/// # Safety
/// x must be valid for reads, y for writes of N pairs.
#[inline(always)]
unsafe fn turn<const N: usize>(x: *const f32, y: *mut f32, cos: &[f32], sin: &[f32], cos_scale: f32, sin_scale: f32) {
    let (cos, sin) = (&cos[..N], &sin[..N]);
    let mut out = [[0.0; 2]; N];
    // SAFETY: the caller's promise; N pairs are N arrays of two.
    let pairs = unsafe { x.cast::<[[f32; 2]; N]>().read_unaligned() };
    for i in 0..N {
        let ([a, b], c, d) = (pairs[i], cos[i] * cos_scale, sin[i] * sin_scale);
        out[i] = [a * c - b * d, b * c + a * d];
    }
    // SAFETY: as above.
    unsafe { y.cast::<[[f32; 2]; N]>().write_unaligned(out) };
}
