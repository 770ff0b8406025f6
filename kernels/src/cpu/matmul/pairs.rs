//! Numbers of `f32` or `bf16` to pairs of `bf16`: two steps of `k` in 32 bits, of which the first has the lower half.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{
    __m512 as F512, __m512bh, __m512i, _mm256_maskz_loadu_epi16, _mm512_cvtepu16_epi32, _mm512_cvtne2ps_pbh,
    _mm512_loadu_si512, _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps, _mm512_or_si512, _mm512_permutexvar_epi16,
    _mm512_slli_epi32, _mm512_storeu_si512,
};

use super::kernel::{HIGH, partial};
#[cfg(target_arch = "x86_64")]
use crate::cpu::simd::Avx512;
use crate::cpu::simd::Simd;
use crate::device::Bf16;

/// See [`Kernel::pair_rows`].
#[inline(always)]
#[allow(clippy::too_many_arguments)]
pub(super) unsafe fn pair_rows<S: Simd>(
    s: S,
    from: *const f32,
    from_step: usize,
    rows: usize,
    cols: usize,
    to: *mut f32,
    to_step: usize,
    width: usize,
) {
    // SAFETY: the caller promises `rows` readable rows of `cols` and half as many writable ones of `width`.
    unsafe {
        for r in (0..rows).step_by(2) {
            let first = from.add(r * from_step);
            let mut c = 0;
            while c < width {
                let n = cols.saturating_sub(c).min(S::LANES);
                let at = |row: *const f32| match n {
                    0 => s.zero(),
                    n if n == S::LANES => s.load_ptr(row.add(c)),
                    n => partial(s, row.add(c), n),
                };
                let low = s.shr::<16>(s.rounded(at(first)));
                let high = if r + 1 < rows { s.rounded(at(first.add(from_step))) } else { s.splat_i(0) };
                let pair = s.or_i(low, s.and_i(high, s.splat_i(HIGH)));
                s.store_ptr(to.add(r / 2 * to_step + c), s.from_bits(pair));
                c += S::LANES;
            }
        }
    }
}

/// See [`Kernel::pair_halves`].
#[inline(always)]
#[allow(clippy::too_many_arguments)]
pub(super) unsafe fn pair_halves<S: Simd>(
    _: S,
    from: *const Bf16,
    from_step: usize,
    rows: usize,
    cols: usize,
    to: *mut f32,
    to_step: usize,
    width: usize,
) {
    let n = cols.min(width);
    for r in (0..rows).step_by(2) {
        // SAFETY: the caller promises `rows` readable rows of `cols` and half as many writable ones of `width`.
        let (low, high, to) = unsafe {
            let low = std::slice::from_raw_parts(from.add(r * from_step), n);
            let high = (r + 1 < rows).then(|| std::slice::from_raw_parts(from.add((r + 1) * from_step), n));
            (low, high, std::slice::from_raw_parts_mut(to.add(r / 2 * to_step).cast::<u32>(), width))
        };
        match high {
            Some(high) => {
                let pairs = low.iter().zip(high).map(|(low, high)| u32::from(low.0) | u32::from(high.0) << 16);
                to.iter_mut().zip(pairs).for_each(|(to, pair)| *to = pair);
            }
            None => to.iter_mut().zip(low).for_each(|(to, low)| *to = u32::from(low.0)),
        }
        to[n..].fill(0);
    }
}

/// [`Kernel::pair_halves`] with masks.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[allow(clippy::too_many_arguments)]
pub(super) unsafe fn masked_pair_halves(
    _: Avx512,
    from: *const Bf16,
    from_step: usize,
    rows: usize,
    cols: usize,
    to: *mut f32,
    to_step: usize,
    width: usize,
) {
    // SAFETY: the caller promises `rows` readable rows of `cols` and half as many writable ones of `width`.
    unsafe {
        for r in (0..rows).step_by(2) {
            let first = from.add(r * from_step).cast::<i16>();
            for c in (0..width).step_by(16) {
                let mask = mask_of(cols.saturating_sub(c));
                let low = _mm256_maskz_loadu_epi16(mask, first.wrapping_add(c));
                let mask = if r + 1 < rows { mask } else { 0 };
                let high = _mm256_maskz_loadu_epi16(mask, first.wrapping_add(from_step + c));
                let (low, high) = (_mm512_cvtepu16_epi32(low), _mm512_cvtepu16_epi32(high));
                let pairs = _mm512_or_si512(low, _mm512_slli_epi32::<16>(high));
                _mm512_storeu_si512(to.add(r / 2 * to_step + c).cast(), pairs);
            }
        }
    }
}

/// [`Kernel::pair_rows`] by the instruction that rounds (AVX512-BF16); numbers below the smallest normal one become 0.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(super) unsafe fn native_pair_rows(
    from: *const f32,
    from_step: usize,
    rows: usize,
    cols: usize,
    to: *mut f32,
    to_step: usize,
    width: usize,
) {
    // one of the first row, one of the second, and so on
    const MERGED: [u16; 32] = {
        let mut order = [0; 32];
        let mut i = 0;
        while i < 16 {
            order[2 * i] = i as u16;
            order[2 * i + 1] = 16 + i as u16;
            i += 1;
        }
        order
    };
    // SAFETY: the caller promises `rows` readable rows of `cols` and half as many writable ones of `width`.
    unsafe {
        let order = _mm512_loadu_si512(MERGED.as_ptr().cast());
        for r in (0..rows).step_by(2) {
            let first = from.add(r * from_step);
            for c in (0..width).step_by(16) {
                let mask = mask_of(cols.saturating_sub(c));
                let low = _mm512_maskz_loadu_ps(mask, first.wrapping_add(c));
                let mask = if r + 1 < rows { mask } else { 0 };
                let high = _mm512_maskz_loadu_ps(mask, first.wrapping_add(from_step + c));
                let pairs = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low));
                _mm512_storeu_si512(to.add(r / 2 * to_step + c).cast(), _mm512_permutexvar_epi16(order, pairs));
            }
        }
    }
}

/// [`Kernel::pair_cols`] likewise.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(super) unsafe fn native_pair_cols(
    from: *const f32,
    from_step: usize,
    rows: usize,
    cols: usize,
    to: *mut f32,
    to_step: usize,
) {
    // SAFETY: the caller promises `rows` readable rows of `cols` and as many writable ones of half as many.
    unsafe {
        for r in 0..rows {
            let (from, to) = (from.add(r * from_step), to.add(r * to_step));
            for c in (0..cols).step_by(32) {
                let low = _mm512_maskz_loadu_ps(mask_of(cols - c), from.wrapping_add(c));
                let high = _mm512_maskz_loadu_ps(mask_of((cols - c).saturating_sub(16)), from.wrapping_add(c + 16));
                let pairs = std::mem::transmute::<__m512bh, F512>(_mm512_cvtne2ps_pbh(high, low));
                _mm512_mask_storeu_ps(to.wrapping_add(c / 2), mask_of((cols - c).div_ceil(2)), pairs);
            }
        }
    }
}

/// The first `n` lanes.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn mask_of(n: usize) -> u16 {
    if n >= 16 { u16::MAX } else { (1 << n) - 1 }
}

/// See [`Kernel::pair_cols`].
#[inline(always)]
pub(super) unsafe fn pair_cols(
    from: *const f32,
    from_step: usize,
    rows: usize,
    cols: usize,
    to: *mut f32,
    to_step: usize,
) {
    #[inline(always)]
    fn rounded(x: f32) -> u32 {
        let bits = x.to_bits();
        let up = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
        if x.is_nan() { bits | 0x0040_0000 } else { up }
    }
    for r in 0..rows {
        // SAFETY: the caller promises `rows` readable rows of `cols` and as many writable ones of half as many.
        let (from, to) = unsafe {
            let from = std::slice::from_raw_parts(from.add(r * from_step), cols);
            (from, std::slice::from_raw_parts_mut(to.add(r * to_step).cast::<u32>(), cols.div_ceil(2)))
        };
        for (pair, to) in from.chunks_exact(2).zip(to.iter_mut()) {
            *to = rounded(pair[0]) >> 16 | rounded(pair[1]) & 0xffff_0000;
        }
        if cols % 2 == 1 {
            to[cols / 2] = rounded(from[cols - 1]) >> 16;
        }
    }
}
