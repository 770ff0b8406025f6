//! Vectors, tiles and scratch memory of the scans, and the functions of a step size.

use super::{CHUNK, LINE, STATES, VECTORS};
use crate::cpu::simd::Simd;
use crate::{Rows, RowsMut};

/// Splits scratch memory into parts that start at cache lines.
pub(super) struct Carve<'a>(&'a mut [f32]);

impl<'a> Carve<'a> {
    pub fn new(memory: &'a mut [f32]) -> Self {
        let skip = memory.as_ptr().align_offset(LINE * 4).min(memory.len());
        Self(&mut memory[skip..])
    }

    /// What [`take`](Self::take) of these lengths needs in total.
    pub fn len(parts: &[usize]) -> usize {
        parts.iter().map(|n| n.next_multiple_of(LINE)).sum::<usize>() + LINE
    }

    pub fn take(&mut self, len: usize) -> &'a mut [f32] {
        let (part, rest) = std::mem::take(&mut self.0).split_at_mut(len.next_multiple_of(LINE));
        self.0 = rest;
        &mut part[..len]
    }
}

/// The first `lanes` floats at `from`, and zeros. With the constant `S::LANES` it is a plain load.
///
/// # Safety
/// `from` must be valid for `lanes` reads.
#[inline(always)]
pub(super) unsafe fn load_lanes<S: Simd>(s: S, from: *const f32, lanes: usize) -> S::F {
    // SAFETY: the caller's promise.
    unsafe {
        if lanes == S::LANES {
            s.load_ptr(from)
        } else {
            s.load_partial(std::slice::from_raw_parts(from, lanes), lanes)
        }
    }
}

/// Writes the first `lanes` lanes.
///
/// # Safety
/// `to` must be valid for `lanes` writes.
#[inline(always)]
pub(super) unsafe fn store_lanes<S: Simd>(s: S, to: *mut f32, lanes: usize, v: S::F) {
    // SAFETY: the caller's promise.
    unsafe {
        if lanes == S::LANES {
            s.store_ptr(to, v);
        } else {
            s.store_partial(std::slice::from_raw_parts_mut(to, lanes), lanes, v);
        }
    }
}

/// `to += v`
///
/// # Safety
/// `to` must be valid for `S::LANES` reads and writes.
#[inline(always)]
pub(super) unsafe fn accumulate<S: Simd>(s: S, to: *mut f32, v: S::F) {
    // SAFETY: the caller's promise.
    unsafe { s.store_ptr(to, s.add(s.load_ptr(to), v)) }
}

/// The vectors of a tile at `from`.
///
/// # Safety
/// `from` must be valid for `VECTORS * S::LANES` reads.
#[inline(always)]
pub(super) unsafe fn load_tile<S: Simd>(s: S, from: *const f32) -> [S::F; VECTORS] {
    let mut tile = [s.zero(); VECTORS];
    for (v, x) in tile.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        *x = unsafe { s.load_ptr(from.add(v * S::LANES)) };
    }
    tile
}

/// Writes the vectors of a tile to `to`.
///
/// # Safety
/// `to` must be valid for `VECTORS * S::LANES` writes.
#[inline(always)]
pub(super) unsafe fn store_tile<S: Simd>(s: S, to: *mut f32, tile: [S::F; VECTORS]) {
    for (v, &x) in tile.iter().enumerate() {
        // SAFETY: the caller's promise.
        unsafe { s.store_ptr(to.add(v * S::LANES), x) };
    }
}

/// A tile of states at `from` (`[STATES, VECTORS, LANES]`).
///
/// # Safety
/// `from` must be valid for `STATES * VECTORS * S::LANES` reads.
#[inline(always)]
pub(super) unsafe fn load_states<S: Simd>(s: S, from: *const f32) -> [[S::F; VECTORS]; STATES] {
    let mut states = [[s.zero(); VECTORS]; STATES];
    for (n, x) in states.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        *x = unsafe { load_tile(s, from.add(n * VECTORS * S::LANES)) };
    }
    states
}

/// The reverse of [`load_states`].
///
/// # Safety
/// `to` must be valid for `STATES * VECTORS * S::LANES` writes.
#[inline(always)]
pub(super) unsafe fn store_states<S: Simd>(s: S, to: *mut f32, states: [[S::F; VECTORS]; STATES]) {
    for (n, &x) in states.iter().enumerate() {
        // SAFETY: the caller's promise.
        unsafe { store_tile(s, to.add(n * VECTORS * S::LANES), x) };
    }
}

/// States `n..` of vectors `v..` of `[N, channels]`, with zeros for missing states and channels.
#[inline(always)]
pub(super) fn gather_states<S: Simd>(s: S, from: Rows<'_>, n: usize, v: usize) -> [[S::F; VECTORS]; STATES] {
    let mut states = [[s.zero(); VECTORS]; STATES];
    for (j, x) in states.iter_mut().enumerate() {
        if n + j < from.rows() {
            let row = from.row(n + j);
            for (w, x) in x.iter_mut().enumerate() {
                *x = load(s, row, (v + w) * S::LANES);
            }
        }
    }
    states
}

/// Lanes of vector `v` that belong to one of the `channels`.
#[inline(always)]
pub(super) fn lanes_of<S: Simd>(channels: usize, v: usize) -> usize {
    channels.saturating_sub(v * S::LANES).min(S::LANES)
}

/// `2^x` for `x <= 127`; at least `2^-126`.
///
/// The scans raise `e` to negative powers `N` times per channel and row, so this one leaves out what such powers
/// do not need (large results, subnormal ones) and takes the factor `log2 e` from its caller, who has a constant to
/// fold it into. The relative error is below 2e-7.
#[inline(always)]
pub(in crate::cpu) fn exp2<S: Simd>(s: S, x: S::F) -> S::F {
    // `max` returns its second argument on NaN, which then stays NaN
    let x = s.max(s.splat(-126.0), x);
    // the sum holds the nearest integer of x in its low bits, which the shift moves to the exponent
    let magic = s.splat(12_582_912.0);
    let shifted = s.add(x, magic);
    let r = s.sub(x, s.sub(shifted, magic));
    // relative minimax of 2^r on [-1/2, 1/2] with 2^0 = 1
    let mut p = s.splat(1.326_472_7e-3);
    #[allow(clippy::approx_constant)] // it is not ln 2, nor meant to be
    let rest = [9.671_513e-3, 5.550_733_6e-2, 0.240_222_42, 0.693_147, 1.0];
    for c in rest {
        p = s.fma(p, r, s.splat(c));
    }
    s.from_bits(s.add_i(s.bits(p), s.shl::<23>(s.bits(shifted))))
}

/// `e^-x`, between `2^-126` and `2^126`.
#[inline(always)]
pub(in crate::cpu) fn exp_neg<S: Simd>(s: S, x: S::F) -> S::F {
    exp2(s, s.min(s.splat(126.0), s.mul(x, s.splat(-std::f32::consts::LOG2_E))))
}

/// `1 / (1 + e^-x)`
#[inline(always)]
pub(super) fn sigmoid<S: Simd>(s: S, x: S::F) -> S::F {
    let one = s.splat(1.0);
    s.div(one, s.add(one, exp_neg(s, x)))
}

/// `log(1 + e^x)` and its derivative `1 / (1 + e^-x)`, which share their exponential.
#[inline(always)]
pub(in crate::cpu) fn softplus_and_sigmoid<S: Simd>(s: S, x: S::F) -> (S::F, S::F) {
    let (zero, one) = (s.zero(), s.splat(1.0));
    let power = exp2(s, s.mul(s.abs(x), s.splat(-std::f32::consts::LOG2_E)));
    // log(1 + p) = 2 atanh(z), z = p / (2 + p) <= 1/3
    let z = s.div(power, s.add(power, s.splat(2.0)));
    let squared = s.mul(z, z);
    let mut p = s.splat(0.280_122_07);
    for c in [0.280_017_64, 0.400_215_3, 0.666_664_2, 2.0] {
        p = s.fma(p, squared, s.splat(c));
    }
    // `max` returns its second argument on NaN
    let softplus = s.fma(z, p, s.max(zero, x));
    (softplus, s.div(s.select(s.lt(x, zero), power, one), s.add(one, power)))
}

/// The vector at `row[i..]`, with zeros past the end.
#[inline(always)]
fn load<S: Simd>(s: S, row: &[f32], i: usize) -> S::F {
    if i + S::LANES <= row.len() {
        s.load(&row[i..])
    } else if i < row.len() {
        s.load_partial(&row[i..], row.len() - i)
    } else {
        s.zero()
    }
}

/// Writes the vector to `row[i..]`, up to the end.
#[inline(always)]
fn store<S: Simd>(s: S, row: &mut [f32], i: usize, v: S::F) {
    if i + S::LANES <= row.len() {
        s.store(&mut row[i..], v);
    } else if i < row.len() {
        let n = row.len() - i;
        s.store_partial(&mut row[i..], n, v);
    }
}

/// Where vector `v` of the channels has its record of `fields` vectors for row `t` of a chunk: field `f` is at
/// the result plus `f * VECTORS * LANES`.
#[inline(always)]
pub(super) fn record<S: Simd>(fields: usize, t: usize, v: usize) -> usize {
    (((v / VECTORS) * CHUNK + t) * fields * VECTORS + v % VECTORS) * S::LANES
}

/// Where state `n` of vector `v` of the channels is in a task's array of `states` per channel.
#[inline(always)]
pub(super) fn state_at<S: Simd>(states: usize, n: usize, v: usize) -> usize {
    (((v / VECTORS) * states + n) * VECTORS + v % VECTORS) * S::LANES
}

/// Copies `[N, channels]` into a task's array of states, with zeros for missing states and channels.
#[inline(always)]
pub(super) fn pack_states<S: Simd>(s: S, from: Rows<'_>, to: &mut [f32], states: usize, width: usize) {
    for n in 0..states {
        let row = if n < from.rows() { from.row(n) } else { &[] };
        for v in 0..width / S::LANES {
            s.store(&mut to[state_at::<S>(states, n, v)..], load(s, row, v * S::LANES));
        }
    }
}

/// Copies a parameter of some channels to `to`, with zeros for missing channels, or all zeros.
pub(super) fn pack_channels(from: Option<&[f32]>, to: &mut [f32]) {
    let from = from.unwrap_or_default();
    to[..from.len()].copy_from_slice(from);
    to[from.len()..].fill(0.0);
}

/// The reverse of [`pack_states`].
#[inline(always)]
pub(super) fn unpack_states<S: Simd>(s: S, from: &[f32], mut to: RowsMut<'_>, states: usize, width: usize) {
    for n in 0..to.rows() {
        let row = to.row(n);
        for v in 0..width / S::LANES {
            store(s, row, v * S::LANES, s.load(&from[state_at::<S>(states, n, v)..]));
        }
    }
}

/// Copies rows of `a` and `b` side by side into `to` `[rows, 2, states]`, with zeros for missing states.
pub(super) fn pack_pair(a: Rows<'_>, b: Rows<'_>, to: &mut [f32], states: usize) {
    for (t, pair) in to.chunks_exact_mut(2 * states).take(a.rows()).enumerate() {
        for (to, from) in pair.chunks_exact_mut(states).zip([a.row(t), b.row(t)]) {
            to[..from.len()].copy_from_slice(from);
            to[from.len()..].fill(0.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::simd::{SimdKernel, dispatch};

    struct Check;

    impl SimdKernel for Check {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            let close = |got: S::F, want: f64| {
                let mut lanes = vec![0.0; S::LANES];
                s.store(&mut lanes, got);
                let error = (f64::from(lanes[0]) / want - 1.0).abs();
                assert!(error < 2.5e-7, "{} instead of {want}: error {error:e}", lanes[0]);
            };
            for i in 0..20_000 {
                let x = -125.0 * i as f32 / 20_000.0;
                close(exp2(s, s.splat(x)), f64::from(x).exp2());
                let x = x / 4.0 + 15.0;
                let (softplus, sigmoid) = softplus_and_sigmoid(s, s.splat(x));
                // the exponential inherits the rounding of its argument, which is relative to its size
                let slack = 1.0 + f64::from(x.abs()) / 4.0;
                let wide = f64::from(x);
                for (got, want) in [(softplus, wide.exp().ln_1p()), (sigmoid, 1.0 / (1.0 + (-wide).exp()))] {
                    let got = s.max_lane(got);
                    let error = (f64::from(got) / want - 1.0).abs() / slack;
                    assert!(error < 2.5e-7, "at {x}: {got} instead of {want}: error {error:e}");
                }
            }
            close(exp2(s, s.zero()), 1.0);
            assert!(s.max_lane(exp2(s, s.splat(-1e9))) < 1.2e-38);
            let nan = exp2(s, s.splat(f32::NAN));
            assert!(s.sum(nan).is_nan());
        }
    }

    #[test]
    fn functions_are_accurate() {
        Check.run(crate::cpu::simd::Portable);
        dispatch(Check);
    }
}
