//! Vector forms of exp, log, sigmoid and their like.

use super::simd::Simd;

/// `e^x`; 0 below -103, infinity above 89.
#[inline(always)]
pub fn exp<S: Simd>(s: S, x: S::F) -> S::F {
    // x = n ln 2 + r, |r| <= ln 2 / 2; e^x = 2^n e^r, with 2^n in two factors so that subnormals are reached
    let clamped = s.min(s.max(x, s.splat(-104.0)), s.splat(89.0));
    let n = s.round(s.mul(clamped, s.splat(std::f32::consts::LOG2_E)));
    let r = s.fnma(n, s.splat(0.693_359_4), clamped);
    let r = s.fnma(n, s.splat(-2.121_944_4e-4), r);
    let mut p = s.splat(1.987_569_1e-4);
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = s.fma(p, r, s.splat(c));
    }
    let y = s.add(s.fma(s.mul(r, r), p, r), s.splat(1.0));
    let n = s.to_int(n);
    let half = s.from_bits(s.shl::<23>(s.add_i(half_of(s, n), s.splat_i(127))));
    let rest = s.from_bits(s.shl::<23>(s.add_i(s.add_i(n, negate(s, half_of(s, n))), s.splat_i(127))));
    s.mul(s.mul(y, half), rest)
}

#[inline(always)]
fn half_of<S: Simd>(s: S, n: S::I) -> S::I {
    // arithmetic shift right by one: logical shift of n + 512, less 256
    s.add_i(s.shr::<1>(s.add_i(n, s.splat_i(512))), s.splat_i(-256))
}

#[inline(always)]
fn negate<S: Simd>(s: S, n: S::I) -> S::I {
    s.add_i(s.xor_i(n, s.splat_i(-1)), s.splat_i(1))
}

/// `1 / (1 + e^-x)`
#[inline(always)]
pub fn sigmoid<S: Simd>(s: S, x: S::F) -> S::F {
    s.div(s.splat(1.0), s.add(s.splat(1.0), exp(s, s.neg(x))))
}
