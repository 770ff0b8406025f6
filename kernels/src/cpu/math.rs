//! Vector forms of exp, log, sigmoid and their like.
//!
//! Every function takes the instruction set `s` and a vector, is inlined into its caller's loop and has no
//! branches. Errors are in units in the last place of the exact result, found by dense sampling of the whole
//! range (see the tests); infinities and zeros give the limits, NaN gives NaN. Results that would be
//! subnormal may be 0: nothing in training depends on them, and arithmetic on them is slow.

use super::simd::Simd;
use crate::random::{self, Keep};
use std::f32::consts::{LN_2, LOG2_E};

/// `1.5 * 2^23`: added to a float below 2^22, it leaves the nearest integer in the low bits.
const ROUNDER: f32 = 12_582_912.0;
/// ln 2 in two parts; the first has so few bits that a product with an exponent is exact.
const LN_2_HIGH: f32 = 0.693_359_4;
const LN_2_LOW: f32 = -2.121_944_4e-4;

/// `p[0] x^(n-1) + … + p[n-1]`
#[inline(always)]
fn polynomial<S: Simd, const N: usize>(s: S, x: S::F, p: [f32; N]) -> S::F {
    let mut y = s.splat(p[0]);
    for &c in &p[1..] {
        y = s.fma(y, x, s.splat(c));
    }
    y
}

/// e^r on |r| <= ln 2 / 2, relative error 2e-9.
const EXP: [f32; 7] = [1.384_360_8e-3, 8.374_196e-3, 4.166_800_5e-2, 0.166_664_31, 0.499_999_94, 1.0, 1.0];
/// The same a degree lower, relative error 9.2e-8; 1 at 0.
const EXP_SHORT: [f32; 6] = [8.290_276e-3, 4.189_816e-2, 0.166_676_38, 0.499_991_48, 0.999_999_7, 1.0];

/// Splits `x = n ln 2 + r`, `|r| <= ln 2 / 2`: returns `2^(n + bias - 127)` and `r`. The exponent field must
/// stay within `0 ..= 254`; at 0 the power is 0.
#[inline(always)]
fn split<S: Simd>(s: S, x: S::F, bias: f32) -> (S::F, S::F) {
    // the rounding constant carries the exponent's bias, so the low bits of the sum are the exponent field
    let rounder = s.splat(ROUNDER + bias);
    let t = s.fma(x, s.splat(LOG2_E), rounder);
    let n = s.sub(t, rounder);
    let r = s.fnma(n, s.splat(LN_2_HIGH), x);
    let r = s.fnma(n, s.splat(LN_2_LOW), r);
    (s.from_bits(s.shl::<23>(s.bits(t))), r)
}

/// `e^x`, at most 1.4 ulp; 0 where the result is below 1.7e-38, infinity above 88.72.
#[inline(always)]
pub fn exp<S: Simd>(s: S, x: S::F) -> S::F {
    // constants first: min and max return their second operand at NaN
    let x = s.min(s.splat(89.0), s.max(s.splat(-87.3), x));
    // 2^(n-1) * 2 e^r: so n = 128 is reached, and overflow is the product's
    let (power, r) = split(s, x, 126.0);
    s.mul(power, polynomial(s, r, EXP.map(|c| 2.0 * c)))
}

/// `e^x` for `x <= 0`, at most 2.3 ulp; 0 below -87.68. Right up to 88, arbitrary beyond.
///
/// Twelve instructions, two fewer than [`exp`]: for decays of state-space scans and for softmax.
#[inline(always)]
pub fn exp_nonpositive<S: Simd>(s: S, x: S::F) -> S::F {
    let (power, r) = split(s, s.max(s.splat(-88.0), x), 127.0);
    s.mul(power, polynomial(s, r, EXP_SHORT))
}

/// `e^-|x|`, at most 1.4 ulp.
#[inline(always)]
fn exp_minus_abs<S: Simd>(s: S, x: S::F) -> S::F {
    let minus = s.from_bits(s.or_i(s.bits(x), s.splat_i(i32::MIN)));
    let (power, r) = split(s, s.max(s.splat(-88.0), minus), 127.0);
    s.mul(power, polynomial(s, r, EXP))
}

/// `2^x` for `x <= 0`, at most 2.3 ulp; 0 below -126.5. Right up to 127, arbitrary beyond.
///
/// Eleven instructions: where the exponent can be scaled by `log2 e` beforehand.
#[inline(always)]
pub fn exp2_nonpositive<S: Simd>(s: S, x: S::F) -> S::F {
    let x = s.max(s.splat(-127.0), x);
    let rounder = s.splat(ROUNDER + 127.0);
    let t = s.add(x, rounder);
    let r = s.sub(x, s.sub(t, rounder));
    let p = polynomial(s, r, [1.326_465_2e-3, 9.671_576e-3, 5.550_734_5e-2, 0.240_222_41, LN_2 - 2.04e-7, 1.0]);
    s.mul(s.from_bits(s.shl::<23>(s.bits(t))), p)
}

/// `e^x - 1`, at most 2 ulp.
#[inline(always)]
pub fn expm1<S: Simd>(s: S, x: S::F) -> S::F {
    let clamped = s.min(s.splat(89.0), s.max(s.splat(-20.0), x));
    let (half, r) = split(s, clamped, 126.0);
    let q = polynomial(s, r, [1.388_252_3e-3, 8.366_547e-3, 4.166_72e-2, 0.166_665_43, 0.499_999_98]);
    let p = s.fma(s.mul(r, r), q, r);
    // 2 (2^(n-1) p + (2^(n-1) - 1/2)): exact for n = 0
    let y = s.fma(half, p, s.sub(half, s.splat(0.5)));
    s.add(y, y)
}

/// `log(1 + f) + e ln 2` for `f` in `[sqrt(1/2) - 1, sqrt(2) - 1]`.
#[inline(always)]
fn log_core<S: Simd>(s: S, f: S::F, e: S::F) -> S::F {
    let z = s.mul(f, f);
    let p = polynomial(
        s,
        f,
        [
            7.037_683_6e-2,
            -0.115_146_1,
            0.116_769_99,
            -0.124_201_41,
            0.142_493_23,
            -0.166_680_58,
            0.200_007_15,
            -0.249_999_94,
            0.333_333_3,
        ],
    );
    let y = s.mul(s.mul(f, z), p);
    let y = s.fma(e, s.splat(LN_2_LOW), y);
    let y = s.fnma(z, s.splat(0.5), y);
    s.fma(e, s.splat(LN_2_HIGH), s.add(f, y))
}

/// Natural logarithm, at most 1 ulp; -infinity at 0, NaN below.
#[inline(always)]
pub fn log<S: Simd>(s: S, x: S::F) -> S::F {
    const SQRT_HALF: i32 = 0x3f35_04f3;
    let subnormal = s.lt(x, s.splat(f32::MIN_POSITIVE));
    let scaled = s.select(subnormal, s.mul(x, s.splat(8_388_608.0)), x);
    let offset = s.add_i(s.bits(scaled), s.splat_i(0x3f80_0000 - SQRT_HALF));
    let e = s.sub(s.to_float(s.shr::<23>(offset)), s.select(subnormal, s.splat(150.0), s.splat(127.0)));
    let m = s.from_bits(s.add_i(s.and_i(offset, s.splat_i(0x7f_ffff)), s.splat_i(SQRT_HALF)));
    let y = log_core(s, s.sub(m, s.splat(1.0)), e);
    let y = s.select(s.lt(x, s.splat(f32::INFINITY)), y, x);
    let y = s.select(s.lt(x, s.zero()), s.splat(f32::NAN), y);
    s.select(s.eq(x, s.zero()), s.splat(f32::NEG_INFINITY), y)
}

/// `log(1 + x)`, at most 2 ulp.
#[inline(always)]
pub fn log1p<S: Simd>(s: S, x: S::F) -> S::F {
    // log(u) + (x - (u - 1)) / u, the second term being what rounding u = 1 + x has lost
    let one = s.splat(1.0);
    let u = s.add(one, x);
    let y = log(s, u);
    let lost = s.div(s.sub(x, s.sub(u, one)), u);
    let y = s.select(s.lt(u, s.splat(f32::INFINITY)), s.add(y, lost), y);
    s.select(s.eq(u, s.zero()), s.splat(f32::NEG_INFINITY), y)
}

/// `log(1 + z)` for `z` in `[0, 1]`: no bits to take apart.
#[inline(always)]
fn log1p_unit<S: Simd>(s: S, z: S::F) -> S::F {
    let small = s.lt(z, s.splat(std::f32::consts::SQRT_2 - 1.0));
    let f = s.select(small, z, s.fma(z, s.splat(0.5), s.splat(-0.5)));
    log_core(s, f, s.select(small, s.zero(), s.splat(1.0)))
}

/// `1 / (1 + e^-x)`, at most 2.5 ulp; 0 below -88.72.
#[inline(always)]
pub fn sigmoid<S: Simd>(s: S, x: S::F) -> S::F {
    let one = s.splat(1.0);
    s.div(one, s.add(one, exp(s, s.neg(x))))
}

/// `x sigmoid(x)`, at most 3 ulp; 0 below -88.72.
#[inline(always)]
pub fn silu<S: Simd>(s: S, x: S::F) -> S::F {
    // the clamp makes the limit at -infinity 0
    let x = s.max(s.splat(-100.0), x);
    s.div(x, s.add(s.splat(1.0), exp(s, s.neg(x))))
}

/// `log(1 + e^x)`, at most 2 ulp; `x` above 20.
#[inline(always)]
pub fn softplus<S: Simd>(s: S, x: S::F) -> S::F {
    let z = exp_minus_abs(s, x);
    let y = s.add(s.max(s.zero(), x), log1p_unit(s, z));
    s.select(s.lt(s.splat(20.0), x), x, y)
}

/// `log(sigmoid(x))`, at most 2 ulp.
#[inline(always)]
pub fn log_sigmoid<S: Simd>(s: S, x: S::F) -> S::F {
    let z = exp_minus_abs(s, x);
    s.sub(s.min(s.zero(), x), log1p_unit(s, z))
}

/// `y` with the sign of `x`; `y` must not be negative.
#[inline(always)]
fn with_sign<S: Simd>(s: S, y: S::F, x: S::F) -> S::F {
    s.from_bits(s.or_i(s.bits(y), s.and_i(s.bits(x), s.splat_i(i32::MIN))))
}

/// Hyperbolic tangent, at most 2 ulp.
#[inline(always)]
pub fn tanh<S: Simd>(s: S, x: S::F) -> S::F {
    // near 0 an odd polynomial, elsewhere (1 - e^-2|x|) / (1 + e^-2|x|)
    let square = s.mul(x, x);
    let near = polynomial(s, square, TANH_NEAR);
    let near = s.fma(s.mul(x, square), near, x);
    let one = s.splat(1.0);
    let z = exp_minus_abs(s, s.add(x, x));
    let far = with_sign(s, s.div(s.sub(one, z), s.add(one, z)), x);
    s.select(s.lt(s.abs(x), s.splat(0.625)), near, far)
}

/// (tanh(x) / x - 1) / x², in powers of x² up to 0.625².
const TANH_NEAR: [f32; 5] = [-5.704_988_7e-3, 2.063_908_8e-2, -5.373_971e-2, 0.133_314_43, -0.333_332_84];

/// Error function, at most 2 ulp.
#[inline(always)]
pub fn erf<S: Simd>(s: S, x: S::F) -> S::F {
    // two pieces, after N. Juffa: an odd polynomial near 0, and 1 - e^p(|x|)
    let z = s.mul(x, x);
    let near =
        polynomial(s, z, [-5.967_617e-4, 4.991_194e-3, -2.676_813_5e-2, 0.112_819_925, -0.376_125_34, 0.128_379_17]);
    let near = s.fma(near, x, x);
    let a = s.min(s.splat(4.0), s.abs(x));
    let far = polynomial(
        s,
        a,
        [-1.728_534_7e-5, 3.831_971_3e-4, -3.883_964_4e-3, 2.425_462_2e-2, -0.106_777_88, -0.634_846_7, -0.128_717_51],
    );
    let far = exp_nonpositive(s, s.fma(far, a, s.neg(a)));
    let far = with_sign(s, s.sub(s.splat(1.0), far), x);
    s.select(s.lt(a, s.splat(0.921_875)), near, far)
}

/// `1 / sqrt(x)`, at most 1.5 ulp.
#[inline(always)]
pub fn rsqrt<S: Simd>(s: S, x: S::F) -> S::F {
    s.div(s.splat(1.0), s.sqrt(x))
}

/// `1 / x`, correctly rounded.
#[inline(always)]
pub fn recip<S: Simd>(s: S, x: S::F) -> S::F {
    s.div(s.splat(1.0), x)
}

/// Sine; absolute error at most 1e-7.
#[inline(always)]
pub fn sin<S: Simd>(s: S, x: S::F) -> S::F {
    quarter_turns(s, x, 0, f64::sin)
}

/// Cosine; absolute error at most 1e-7.
#[inline(always)]
pub fn cos<S: Simd>(s: S, x: S::F) -> S::F {
    quarter_turns(s, x, 1, f64::cos)
}

/// `sin(x + turns pi / 2)`; beyond 8192, where splitting off turns loses digits, lane by lane in `exact`.
#[inline(always)]
fn quarter_turns<S: Simd>(s: S, x: S::F, turns: i32, exact: fn(f64) -> f64) -> S::F {
    if s.max_lane(s.abs(x)) > 8192.0 {
        let mut lanes = [0.0; 64];
        s.store(&mut lanes, x);
        for v in &mut lanes[..S::LANES] {
            *v = exact(f64::from(*v)) as f32;
        }
        return s.load(&lanes);
    }
    let n = s.round(s.mul(x, s.splat(std::f32::consts::FRAC_2_PI)));
    let r = s.fnma(n, s.splat(1.570_312_5), x);
    let r = s.fnma(n, s.splat(4.837_513e-4), r);
    let r = s.fnma(n, s.splat(7.549_79e-8), r);
    let z = s.mul(r, r);
    let sine = polynomial(s, z, [-1.951_529_6e-4, 8.332_161e-3, -0.166_666_55]);
    let sine = s.fma(s.mul(r, z), sine, r);
    let cosine = polynomial(s, z, [2.443_315_7e-5, -1.388_731_6e-3, 4.166_664_6e-2, -0.5]);
    let cosine = s.fma(z, cosine, s.splat(1.0));
    let quadrant = s.add_i(s.to_int(n), s.splat_i(turns));
    let odd = s.eq(s.to_float(s.and_i(quadrant, s.splat_i(1))), s.splat(1.0));
    let y = s.select(odd, cosine, sine);
    let sign = s.shl::<30>(s.and_i(quadrant, s.splat_i(2)));
    s.from_bits(s.xor_i(s.bits(y), sign))
}

/// [`random::bits`] of `LANES` counters, given their low halves and the key of their high half
/// ([`random::key_at`]): the same bits.
#[inline(always)]
pub fn random_bits<S: Simd>(s: S, key: [u32; 2], counter: S::I) -> S::I {
    let mix = Keep::MIX.map(|m| s.splat_i(m as i32));
    let x = s.add_i(counter, s.splat_i(key[0] as i32));
    let x = s.mul_i(s.xor_i(x, s.shr::<17>(x)), mix[0]);
    let x = s.mul_i(s.add_i(s.xor_i(x, s.shr::<11>(x)), s.splat_i(key[1] as i32)), mix[1]);
    let x = s.mul_i(s.xor_i(x, s.shr::<15>(x)), mix[2]);
    s.xor_i(x, s.shr::<14>(x))
}

/// Writes the dropout mask at the counters from `first` on: [`Keep::at`], `LANES` at a time.
#[inline(always)]
pub fn keep_mask<S: Simd>(s: S, keep: &Keep, first: u64, mask: &mut [f32]) {
    let threshold = s.splat((keep.threshold >> 8) as f32);
    let scale = s.splat(keep.scale);
    let mut i = 0;
    while i < mask.len() {
        // up to where the low half of the counter wraps
        let start = first + i as u64;
        let end = mask.len().min(i.saturating_add(((1 << 32) - (start & 0xffff_ffff)) as usize));
        let key = random::key_at(keep.key, (start >> 32) as u32);
        let mut counter = s.add_i(s.splat_i(start as i32), s.iota());
        while i < end {
            let n = (end - i).min(S::LANES);
            let bits = s.to_float(s.shr::<8>(random_bits(s, key, counter)));
            let v = s.select(s.lt(bits, threshold), s.zero(), scale);
            if n == S::LANES {
                s.store(&mut mask[i..], v)
            } else {
                s.store_partial(&mut mask[i..], n, v)
            }
            counter = s.add_i(counter, s.splat_i(S::LANES as i32));
            i += n;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::simd::{Portable, SimdKernel, dispatch};

    macro_rules! apply {
        ($s:ident, $name:ident, $x:ident, $($f:ident)*) => {
            match $name {
                $(stringify!($f) => {
                    for v in $x.chunks_mut(S::LANES) {
                        let n = v.len();
                        let y = $f($s, $s.load_partial(v, n));
                        $s.store_partial(v, n, y);
                    }
                })*
                other => panic!("{other}"),
            }
        };
    }

    struct Apply<'a>(&'a str, &'a mut [f32]);
    impl SimdKernel for Apply<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            let (name, x) = (self.0, self.1);
            apply!(s, name, x, exp exp_nonpositive exp2_nonpositive expm1 log log1p sigmoid silu softplus
                log_sigmoid tanh erf rsqrt recip sin cos);
        }
    }

    /// Every `step`-th float.
    fn floats(step: u32) -> Vec<f32> {
        (0..u32::MAX / step).map(|i| f32::from_bits(i * step)).filter(|x| !x.is_nan()).collect()
    }

    /// The largest error over `x` in units in the last place, subnormal results counting as 0.
    fn worst(name: &str, x: &[f32], exact: &dyn Fn(f64) -> f64) -> (f64, f32) {
        let mut worst = (0.0, 0.0);
        let flushed = if name == "silu" { 3e-37 } else { 1.7e-38 };
        for portable in [false, true] {
            let mut y = x.to_vec();
            let kernel = Apply(name, &mut y);
            if portable {
                kernel.run(Portable)
            } else {
                dispatch(kernel)
            }
            for (&x, &y) in x.iter().zip(&y) {
                let want = exact(f64::from(x));
                let rounded = want as f32;
                let error = if y == rounded || (y == 0.0 && want.abs() < flushed) {
                    0.0
                } else if y.is_nan() || rounded.is_nan() || rounded.is_infinite() || y.is_infinite() {
                    if y.is_nan() && rounded.is_nan() { 0.0 } else { f64::INFINITY }
                } else {
                    let exponent = (want.abs().max(f64::from(f32::MIN_POSITIVE)).to_bits() >> 52) as i32 - 1023;
                    (f64::from(y) - want).abs() / 2f64.powi(exponent - 23)
                };
                if error > worst.0 {
                    worst = (error, x);
                }
            }
        }
        println!("{name:18} {:.3} ulp at {:e}", worst.0, worst.1);
        worst
    }

    #[track_caller]
    fn check(name: &str, x: &[f32], limit: f64, exact: impl Fn(f64) -> f64) {
        let (error, at) = worst(name, x, &exact);
        assert!(error <= limit, "{name}({at:e}): {error} ulp");
    }

    #[test]
    fn accuracy_over_the_whole_range() {
        let mut x = floats(4099);
        x.extend((-2_000_000..2_000_000).map(|i| i as f32 * 5e-5)); // dense within ±100
        x.extend((-1_000_000..1_000_000).map(|i| i as f32 * 1e-6));
        let below = |limit: f32| x.iter().copied().filter(|&v| v <= limit).collect::<Vec<_>>();
        check("exp", &x, 1.4, f64::exp);
        check("exp_nonpositive", &below(88.0), 2.3, f64::exp);
        check("exp2_nonpositive", &below(127.0), 2.3, f64::exp2);
        check("expm1", &x, 2.0, f64::exp_m1);
        check("log", &x, 1.0, f64::ln);
        check("log1p", &x, 2.0, f64::ln_1p);
        let sigmoid = |v: f64| 1.0 / (1.0 + (-v).exp());
        check("sigmoid", &x, 2.5, sigmoid);
        check("silu", &x, 3.0, |v| if v == f64::NEG_INFINITY { 0.0 } else { v * sigmoid(v) });
        check("softplus", &x, 2.0, |v| if v > 20.0 { v } else { v.exp().ln_1p() });
        check("log_sigmoid", &x, 2.0, |v| v.min(0.0) - (-v.abs()).exp().ln_1p());
        check("tanh", &x, 2.0, f64::tanh);
        check("erf", &x, 2.0, crate::expression::erf);
        check("rsqrt", &x, 1.5, |v| 1.0 / v.sqrt());
        check("recip", &x, 0.5, |v| 1.0 / v);
    }

    #[test]
    fn sine_and_cosine() {
        for portable in [false, true] {
            for (name, exact) in [("sin", f64::sin as fn(f64) -> f64), ("cos", f64::cos)] {
                let x: Vec<f32> = (-1_000_000..1_000_000).map(|i| i as f32 * 0.009).chain([1e20, -3e9]).collect();
                let mut y = x.clone();
                if portable {
                    Apply(name, &mut y).run(Portable)
                } else {
                    dispatch(Apply(name, &mut y))
                }
                for (&x, &y) in x.iter().zip(&y) {
                    assert!((f64::from(y) - exact(f64::from(x))).abs() < 1e-7, "{name}({x}) = {y}");
                }
            }
        }
    }

    #[test]
    fn nan_stays_nan() {
        for name in [
            "exp",
            "exp_nonpositive",
            "exp2_nonpositive",
            "expm1",
            "log",
            "log1p",
            "sigmoid",
            "silu",
            "softplus",
            "log_sigmoid",
            "tanh",
            "erf",
            "rsqrt",
            "recip",
            "sin",
            "cos",
        ] {
            for nan in [f32::NAN, -f32::NAN, f32::from_bits(0x7fff_ffff)] {
                let mut y = [nan; 16];
                dispatch(Apply(name, &mut y));
                assert!(y.iter().all(|v| v.is_nan()), "{name}");
                let mut y = [nan; 16];
                Apply(name, &mut y).run(Portable);
                assert!(y.iter().all(|v| v.is_nan()), "{name}, portable");
            }
        }
    }

    #[test]
    fn exact_at_zero_and_one() {
        let mut y = [0.0; 4];
        dispatch(Apply("exp_nonpositive", &mut y));
        assert_eq!(y, [1.0; 4]);
        dispatch(Apply("log", &mut y));
        assert_eq!(y, [0.0; 4]);
        dispatch(Apply("sigmoid", &mut y));
        assert_eq!(y, [0.5; 4]);
    }

    struct Mask<'a>(&'a Keep, u64, &'a mut [f32]);
    impl SimdKernel for Mask<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            keep_mask(s, self.0, self.1, self.2);
        }
    }

    #[test]
    fn vector_masks_are_the_scalar_ones() {
        for (p, first) in [(0.1, 0), (0.5, 12345), (0.9, (1 << 32) - 40), (0.0, 5 << 32)] {
            let keep = Keep::new(3, 4, 5, p);
            let want: Vec<f32> = (0..103).map(|i| keep.at(first + i)).collect();
            let (mut wide, mut portable) = ([9.0; 103], [9.0; 103]);
            dispatch(Mask(&keep, first, &mut wide));
            Mask(&keep, first, &mut portable).run(Portable);
            assert_eq!(wide[..], want[..]);
            assert_eq!(portable[..], want[..]);
        }
    }
}
