//! Transposes of small blocks, for packing operands that lie along `k`.

use crate::cpu::simd::Portable;

/// The transpose of `from[rows, cols]`, `rows <= 8`: see [`Kernel::transpose`](super::kernel::Kernel::transpose).
#[inline(always)]
pub(super) unsafe fn portable(
    _: Portable,
    from: *const f32,
    from_step: usize,
    rows: usize,
    cols: usize,
    to: *mut f32,
    to_step: usize,
) {
    // SAFETY: the caller promises a readable block and a writable vector per column.
    unsafe {
        for j in 0..cols {
            let mut column = [0.0f32; 8];
            for (r, x) in column.iter_mut().enumerate().take(rows) {
                *x = *from.add(r * from_step + j);
            }
            to.add(j * to_step).cast::<[f32; 8]>().write_unaligned(column);
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{avx2, avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use crate::cpu::simd::{Avx2, Avx512, Simd};
    use std::arch::x86_64::*;

    /// As [`portable`](super::portable), eight rows and columns at a time.
    #[target_feature(enable = "avx2,fma")]
    pub(in super::super) unsafe fn avx2(
        s: Avx2,
        from: *const f32,
        from_step: usize,
        rows: usize,
        cols: usize,
        to: *mut f32,
        to_step: usize,
    ) {
        // SAFETY: as in `portable`; the value of `Avx2` proves the instruction set.
        unsafe {
            let mut j = 0;
            while j < cols {
                let n = (cols - j).min(8);
                let r: [__m256; 8] = std::array::from_fn(|r| {
                    if r >= rows {
                        return s.zero();
                    }
                    let p = from.add(r * from_step + j);
                    if n == 8 { _mm256_loadu_ps(p) } else { s.load_partial(std::slice::from_raw_parts(p, n), n) }
                });
                let pair = |a, b| (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
                let (a0, a1) = pair(r[0], r[1]);
                let (a2, a3) = pair(r[2], r[3]);
                let (a4, a5) = pair(r[4], r[5]);
                let (a6, a7) = pair(r[6], r[7]);
                let four = |a, b| (_mm256_shuffle_ps::<0x44>(a, b), _mm256_shuffle_ps::<0xee>(a, b));
                let (b0, b1) = four(a0, a2);
                let (b2, b3) = four(a1, a3);
                let (b4, b5) = four(a4, a6);
                let (b6, b7) = four(a5, a7);
                let low = |a, b| _mm256_permute2f128_ps::<0x20>(a, b);
                let high = |a, b| _mm256_permute2f128_ps::<0x31>(a, b);
                let out = [
                    low(b0, b4),
                    low(b1, b5),
                    low(b2, b6),
                    low(b3, b7),
                    high(b0, b4),
                    high(b1, b5),
                    high(b2, b6),
                    high(b3, b7),
                ];
                for (i, &v) in out.iter().enumerate() {
                    if i < n {
                        _mm256_storeu_ps(to.add((j + i) * to_step), v);
                    }
                }
                j += 8;
            }
        }
    }

    /// As [`portable`](super::portable), sixteen rows and columns at a time.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    pub(in super::super) unsafe fn avx512(
        _: Avx512,
        from: *const f32,
        from_step: usize,
        rows: usize,
        cols: usize,
        to: *mut f32,
        to_step: usize,
    ) {
        // SAFETY: as in `portable`; the value of `Avx512` proves the instruction set.
        unsafe {
            let mut j = 0;
            if rows == 16 {
                j = whole::<16>(from, from_step, cols, to, to_step);
            } else if rows == 12 {
                // a full panel of a
                j = whole::<12>(from, from_step, cols, to, to_step);
            }
            while j < cols {
                let n = (cols - j).min(4);
                let mask = ((1u32 << n) - 1) as __mmask8;
                let mut v = [_mm512_setzero_ps(); 4];
                for (i, v) in v.iter_mut().enumerate() {
                    let mut quarter = [_mm_setzero_ps(); 4];
                    for (q, x) in quarter.iter_mut().enumerate() {
                        if 4 * q + i < rows {
                            *x = _mm_maskz_loadu_ps(mask, from.add((4 * q + i) * from_step + j));
                        }
                    }
                    *v = join(quarter);
                }
                store(to.add(j * to_step), to_step, n, v);
                j += n;
            }
        }
    }

    /// As many columns as there are whole fours of, without masks; returns their number.
    #[inline]
    #[target_feature(enable = "avx512f,avx512dq,avx512vl")]
    unsafe fn whole<const ROWS: usize>(
        from: *const f32,
        from_step: usize,
        cols: usize,
        to: *mut f32,
        to_step: usize,
    ) -> usize {
        let mut j = 0;
        while j + 4 <= cols {
            // SAFETY: the caller's promise.
            unsafe {
                let from = from.add(j);
                let v0 = quarters::<ROWS>(from, from_step);
                let v1 = quarters::<ROWS>(from.add(from_step), from_step);
                let v2 = quarters::<ROWS>(from.add(2 * from_step), from_step);
                let v3 = quarters::<ROWS>(from.add(3 * from_step), from_step);
                store(to.add(j * to_step), to_step, 4, [v0, v1, v2, v3]);
            }
            j += 4;
        }
        j
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512dq")]
    fn join(q: [__m128; 4]) -> __m512 {
        let v = _mm512_castps128_ps512(q[0]);
        let v = _mm512_insertf32x4::<1>(v, q[1]);
        let v = _mm512_insertf32x4::<2>(v, q[2]);
        _mm512_insertf32x4::<3>(v, q[3])
    }

    /// Four columns of the rows 0, 4, 8 and 12: loading quarters does half of the transpose.
    #[inline]
    #[target_feature(enable = "avx512f,avx512dq,avx512vl")]
    unsafe fn quarters<const ROWS: usize>(from: *const f32, from_step: usize) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe {
            let v = _mm512_castps128_ps512(_mm_loadu_ps(from));
            let v = _mm512_mask_broadcast_f32x4(v, 0x00f0, _mm_loadu_ps(from.add(4 * from_step)));
            let v = _mm512_mask_broadcast_f32x4(v, 0x0f00, _mm_loadu_ps(from.add(8 * from_step)));
            if ROWS <= 12 {
                return v;
            }
            _mm512_mask_broadcast_f32x4(v, 0xf000, _mm_loadu_ps(from.add(12 * from_step)))
        }
    }

    /// Quarter `q` of `v[i]` holds four columns of row `4 q + i`: transposes the quarters and stores the columns.
    #[inline]
    #[target_feature(enable = "avx512f,avx512dq,avx512vl")]
    unsafe fn store(to: *mut f32, to_step: usize, n: usize, v: [__m512; 4]) {
        let (a0, a1) = (_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
        let (a2, a3) = (_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
        // SAFETY: the caller's promise.
        unsafe {
            _mm512_storeu_ps(to, _mm512_shuffle_ps::<0x44>(a0, a2));
            if n > 1 {
                _mm512_storeu_ps(to.add(to_step), _mm512_shuffle_ps::<0xee>(a0, a2));
            }
            if n > 2 {
                _mm512_storeu_ps(to.add(2 * to_step), _mm512_shuffle_ps::<0x44>(a1, a3));
            }
            if n > 3 {
                _mm512_storeu_ps(to.add(3 * to_step), _mm512_shuffle_ps::<0xee>(a1, a3));
            }
        }
    }
}
