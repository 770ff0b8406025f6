//! Normal numbers two at a time, by the method of Box and Muller, and many at once.
//!
//! Logarithm, sine and cosine are written out, without branches and calls, so that a loop over them becomes vectors; sums and
//! products are rounded one by one, so that all machines give the same bits.

use super::{halves, philox};

/// `1 / (2 k + 1)`, of `atanh(s) / s = 1 + s²/3 + s⁴/5 + …`
const ATANH: [f64; 12] = {
    let (mut terms, mut k) = ([0.0; 12], 0);
    while k < terms.len() {
        terms[k] = 1.0 / (2 * k + 1) as f64;
        k += 1;
    }
    terms
};
/// `(-1)^k / (2 k + 1)!` and `(-1)^k / (2 k)!`
const SIN: [f64; 9] = alternating(1);
const COS: [f64; 10] = alternating(0);

const fn alternating<const N: usize>(first: usize) -> [f64; N] {
    let (mut terms, mut term, mut k) = ([0.0; N], 1.0, 0);
    while k < N {
        terms[k] = term;
        let n = 2 * k + first;
        term /= -(((n + 1) * (n + 2)) as f64);
        k += 1;
    }
    terms
}

#[inline(always)]
fn polynomial<const N: usize>(terms: &[f64; N], x: f64) -> f64 {
    let mut sum = terms[N - 1];
    let mut k = N - 1;
    while k > 0 {
        k -= 1;
        sum = sum * x + terms[k];
    }
    sum
}

/// The logarithm of a positive, normal number.
#[inline(always)]
fn ln(x: f64) -> f64 {
    // x = m 2^e with m from the root of 1/2 to that of 2
    let bits = x.to_bits();
    let e = (bits.wrapping_sub(std::f64::consts::FRAC_1_SQRT_2.to_bits()) as i64) >> 52;
    let m = f64::from_bits(bits.wrapping_sub((e << 52) as u64));
    let s = (m - 1.0) / (m + 1.0);
    2.0 * s * polynomial(&ATANH, s * s) + e as f64 * std::f64::consts::LN_2
}

/// Sine and cosine of `turns` whole turns, from 0 to 1.
#[inline(always)]
fn sin_cos(turns: f64) -> (f64, f64) {
    // rounds to a whole number, which the low bits then hold
    const ROUND: f64 = (3u64 << 51) as f64;
    let shifted = 4.0 * turns + ROUND;
    let quarter = shifted.to_bits() & 3;
    let angle = (4.0 * turns - (shifted - ROUND)) * std::f64::consts::FRAC_PI_2;
    let square = angle * angle;
    let (sin, cos) = (angle * polynomial(&SIN, square), polynomial(&COS, square));
    let (a, b) = if quarter & 1 == 1 { (cos, sin) } else { (sin, cos) };
    let sign = |negative: bool| if negative { -1.0 } else { 1.0 };
    (a * sign(quarter & 2 == 2), b * sign(quarter == 1 || quarter == 2))
}

/// Two independent normal numbers from four random words.
#[inline(always)]
pub(super) fn pair(words: [u32; 4]) -> [f32; 2] {
    let unit = |low: u32, high: u32| ((u64::from(high) << 32 | u64::from(low)) >> 11) as f64 / (1u64 << 53) as f64;
    let radius = (-2.0 * ln(1.0 - unit(words[0], words[1]))).sqrt();
    let (sin, cos) = sin_cos(unit(words[2], words[3]));
    [(radius * cos) as f32, (radius * sin) as f32]
}

/// Pairs that are computed together.
const PAIRS: usize = 128;

/// Fills `out` with the numbers of [`Stream::normal`](super::Stream::normal) from number `first` on, which must be even,
/// each times `scale`.
///
/// # Panics
/// If `first` is odd.
pub fn normals(seed: u64, stream: u64, first: usize, scale: f64, out: &mut [f32]) {
    assert!(first.is_multiple_of(2), "numbers come in pairs");
    fill(halves(seed), halves(stream), first as u64 / 2, scale, out);
}

crate::simd_fn! {
    fn fill(_s: S, key: [u32; 2], stream: [u32; 2], block: u64, scale: f64, out: &mut [f32]) {
        let mut words = [[0; 4]; PAIRS];
        let mut pairs = [[0.0; 2]; PAIRS];
        for (i, out) in out.chunks_mut(2 * PAIRS).enumerate() {
            let first = block + (i * PAIRS) as u64;
            for j in 0..PAIRS {
                let [low, high] = halves(first + j as u64);
                words[j] = philox(key, [low, high, stream[0], stream[1]]);
            }
            for j in 0..PAIRS {
                let [a, b] = pair(words[j]);
                pairs[j] = [(f64::from(a) * scale) as f32, (f64::from(b) * scale) as f32];
            }
            out.copy_from_slice(&pairs.as_flattened()[..out.len()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Stream;

    #[test]
    fn functions_agree_with_the_standard_library() {
        let mut random = Stream::new(3, 4);
        let tiny = (0..54).map(|k| 0.5f64.powi(k));
        let near_one = (0..40).map(|k| 1.0 - 0.5f64.powi(53 - k));
        let drawn = (0..100_000).map(|_| 1.0 - (random.next_u64() >> 11) as f64 / (1u64 << 53) as f64);
        for x in tiny.chain(near_one).chain(drawn) {
            let want = x.ln();
            assert!((ln(x) - want).abs() <= 1e-15 * want.abs(), "ln {x} is {want}, not {}", ln(x));
            let turns = 1.0 - x;
            let ((sin, cos), want) = (sin_cos(turns), (std::f64::consts::TAU * turns).sin_cos());
            assert!((sin - want.0).abs() < 1e-15 && (cos - want.1).abs() < 1e-15, "{turns}: {sin} {cos} {want:?}");
        }
    }

    #[test]
    fn many_at_once_are_those_of_the_stream() {
        let mut stream = Stream::new(7, 1 << 40);
        let want: Vec<f32> = (0..1003).map(|_| stream.normal() * 0.5).collect();
        for (first, len) in [(0, 1003), (0, 1), (2, 600), (256, 256), (998, 5)] {
            let mut out = vec![0.0; len];
            normals(7, 1 << 40, first, 0.5, &mut out);
            assert_eq!(out, want[first..first + len]);
        }
    }
}
