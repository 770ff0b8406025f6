//! Vectors of `f32` for the widest instruction set that the machine has.
//!
//! A kernel is written once, generic over [`Simd`], and compiled three times; which one runs is decided at
//! run time, so one binary is fast anywhere. [`simd_fn!`](crate::simd_fn) writes the three versions:
//!
//! ```
//! dataflow_kernels::simd_fn! {
//!     /// `y += a * x`
//!     pub fn axpy(s: S, a: f32, x: &[f32], y: &mut [f32]) {
//!         let a = s.splat(a);
//!         let mut i = 0;
//!         while i < y.len() {
//!             let n = (y.len() - i).min(S::LANES); // `n < LANES` only at the end
//!             let v = s.fma(a, s.load_partial(&x[i..], n), s.load_partial(&y[i..], n));
//!             s.store_partial(&mut y[i..], n, v);
//!             i += n;
//!         }
//!     }
//! }
//! # let mut y = [1.0; 5]; axpy(2.0, &[1.0; 5], &mut y); assert_eq!(y, [3.0; 5]);
//! ```
//!
//! Do not call [`parallel_for`](super::threads::parallel_for) inside of such a function: its closure would be
//! compiled without the wide instructions. Loop in parallel outside, and call the `simd_fn!` per task.
//!
//! On aarch64 [`Portable`] compiles to NEON, which is always there.

use std::sync::OnceLock;

use crate::device::Bf16;

/// Vector operations of one instruction set. A value of the type proves that the machine has it.
#[allow(clippy::wrong_self_convention)]
pub trait Simd: Copy + Send + Sync + 'static {
    /// Lanes of a vector.
    const LANES: usize;
    /// `LANES` floats.
    type F: Copy;
    /// `LANES` 32-bit integers.
    type I: Copy;
    /// `LANES` booleans.
    type M: Copy;

    /// All lanes equal to `x`.
    fn splat(self, x: f32) -> Self::F;
    /// The first `LANES` elements. Panics if there are fewer.
    fn load(self, from: &[f32]) -> Self::F;
    /// Writes the first `LANES` elements. Panics if there are fewer.
    fn store(self, to: &mut [f32], v: Self::F);
    /// The first `n <= LANES` elements, the other lanes 0. Panics if there are fewer.
    fn load_partial(self, from: &[f32], n: usize) -> Self::F;
    /// Writes the first `n <= LANES` lanes. Panics if `to` is shorter.
    fn store_partial(self, to: &mut [f32], n: usize, v: Self::F);
    /// Writes the upper halves of the first `n <= LANES` lanes, each a `bf16`. Panics if `to` is shorter. See [`Simd::store_bf16`].
    fn store_upper(self, to: &mut [Bf16], n: usize, v: Self::I);
    /// # Safety
    /// `from` must be valid for `LANES` reads.
    unsafe fn load_ptr(self, from: *const f32) -> Self::F;
    /// # Safety
    /// `to` must be valid for `LANES` writes.
    unsafe fn store_ptr(self, to: *mut f32, v: Self::F);

    /// `a + b`
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a - b`
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b`
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a / b`
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, rounded once where the machine can.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `c - a * b`, rounded once where the machine can.
    fn fnma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// The smaller; `b` where either is NaN.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// The larger; `b` where either is NaN.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// Square root.
    fn sqrt(self, a: Self::F) -> Self::F;
    /// Nearest integer, halves to even.
    fn round(self, a: Self::F) -> Self::F;

    /// `a < b`
    fn lt(self, a: Self::F, b: Self::F) -> Self::M;
    /// `a == b`
    fn eq(self, a: Self::F, b: Self::F) -> Self::M;
    /// `m ? a : b`
    fn select(self, m: Self::M, a: Self::F, b: Self::F) -> Self::F;

    /// All lanes equal to `x`.
    fn splat_i(self, x: i32) -> Self::I;
    /// Lane `i` is `i`.
    fn iota(self) -> Self::I;
    /// The bits of floats.
    fn bits(self, a: Self::F) -> Self::I;
    /// Floats of these bits.
    fn from_bits(self, a: Self::I) -> Self::F;
    /// Floats to integers, rounded to nearest even; undefined value (never undefined behaviour) out of range.
    fn to_int(self, a: Self::F) -> Self::I;
    /// Integers to floats.
    fn to_float(self, a: Self::I) -> Self::F;
    /// Wrapping sum.
    fn add_i(self, a: Self::I, b: Self::I) -> Self::I;
    /// Wrapping product.
    fn mul_i(self, a: Self::I, b: Self::I) -> Self::I;
    /// Bitwise and.
    fn and_i(self, a: Self::I, b: Self::I) -> Self::I;
    /// Bitwise or.
    fn or_i(self, a: Self::I, b: Self::I) -> Self::I;
    /// Bitwise exclusive or.
    fn xor_i(self, a: Self::I, b: Self::I) -> Self::I;
    /// Shift left.
    fn shl<const N: u32>(self, a: Self::I) -> Self::I;
    /// Logical shift right.
    fn shr<const N: u32>(self, a: Self::I) -> Self::I;

    /// The sum of all lanes, always in the same order.
    fn sum(self, a: Self::F) -> f32;
    /// The largest lane.
    fn max_lane(self, a: Self::F) -> f32;

    /// Rounds to `bf16`, halves to even, in the upper half of each lane; the lower half is whatever it is. NaN stays NaN.
    #[inline(always)]
    fn rounded(self, x: Self::F) -> Self::I {
        let bits = self.bits(x);
        let odd = self.and_i(self.shr::<16>(bits), self.splat_i(1));
        let up = self.add_i(self.add_i(bits, self.splat_i(0x7fff)), odd);
        let nan = self.or_i(bits, self.splat_i(0x0040_0000));
        self.bits(self.select(self.eq(x, x), self.from_bits(up), self.from_bits(nan)))
    }
    /// Rounds the first `n <= LANES` lanes to `bf16` and writes them. Panics if `to` is shorter.
    #[inline(always)]
    fn store_bf16(self, to: &mut [Bf16], n: usize, v: Self::F) {
        self.store_upper(to, n, self.rounded(v));
    }
    /// All lanes 0.
    #[inline(always)]
    fn zero(self) -> Self::F {
        self.splat(0.0)
    }
    /// `-a`
    #[inline(always)]
    fn neg(self, a: Self::F) -> Self::F {
        self.from_bits(self.xor_i(self.bits(a), self.splat_i(i32::MIN)))
    }
    /// `|a|`
    #[inline(always)]
    fn abs(self, a: Self::F) -> Self::F {
        self.from_bits(self.and_i(self.bits(a), self.splat_i(i32::MAX)))
    }
}

/// Plain Rust, eight lanes at a time; the compiler vectorises it for the base instruction set (SSE2, NEON).
#[derive(Clone, Copy, Debug)]
pub struct Portable;

const P: usize = 8;

#[inline(always)]
fn map<T: Copy, R: Copy + Default>(a: [T; P], f: impl Fn(T) -> R) -> [R; P] {
    let mut r = [R::default(); P];
    for i in 0..P {
        r[i] = f(a[i]);
    }
    r
}

#[inline(always)]
fn zip<T: Copy, R: Copy + Default>(a: [T; P], b: [T; P], f: impl Fn(T, T) -> R) -> [R; P] {
    let mut r = [R::default(); P];
    for i in 0..P {
        r[i] = f(a[i], b[i]);
    }
    r
}

#[inline(always)]
fn scalar_fma(a: f32, b: f32, c: f32) -> f32 {
    if cfg!(any(target_arch = "aarch64", target_feature = "fma")) { a.mul_add(b, c) } else { a * b + c }
}

impl Simd for Portable {
    const LANES: usize = P;
    type F = [f32; P];
    type I = [i32; P];
    type M = [bool; P];

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        [x; P]
    }
    #[inline(always)]
    fn load(self, from: &[f32]) -> Self::F {
        from[..P].try_into().unwrap()
    }
    #[inline(always)]
    fn store(self, to: &mut [f32], v: Self::F) {
        to[..P].copy_from_slice(&v);
    }
    #[inline(always)]
    fn load_partial(self, from: &[f32], n: usize) -> Self::F {
        let mut v = [0.0; P];
        v[..n].copy_from_slice(&from[..n]);
        v
    }
    #[inline(always)]
    fn store_partial(self, to: &mut [f32], n: usize, v: Self::F) {
        to[..n].copy_from_slice(&v[..n]);
    }
    #[inline(always)]
    fn store_upper(self, to: &mut [Bf16], n: usize, v: Self::I) {
        to[..n].iter_mut().zip(&v[..n]).for_each(|(to, v)| *to = Bf16((v >> 16) as u16));
    }
    #[inline(always)]
    unsafe fn load_ptr(self, from: *const f32) -> Self::F {
        // SAFETY: the caller's promise.
        unsafe { from.cast::<[f32; P]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store_ptr(self, to: *mut f32, v: Self::F) {
        // SAFETY: the caller's promise.
        unsafe { to.cast::<[f32; P]>().write_unaligned(v) }
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        let mut r = [0.0; P];
        for i in 0..P {
            r[i] = scalar_fma(a[i], b[i], c[i]);
        }
        r
    }
    #[inline(always)]
    fn fnma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        let mut r = [0.0; P];
        for i in 0..P {
            r[i] = scalar_fma(-a[i], b[i], c[i]);
        }
        r
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn sqrt(self, a: Self::F) -> Self::F {
        map(a, f32::sqrt)
    }
    #[inline(always)]
    fn round(self, a: Self::F) -> Self::F {
        // adding and taking away 1.5 * 2^23 rounds to nearest even without a library call
        map(a, |x| {
            let magic = 12582912.0f32;
            if x.abs() < 4194304.0 { (x + magic) - magic } else { x }
        })
    }
    #[inline(always)]
    fn lt(self, a: Self::F, b: Self::F) -> Self::M {
        zip(a, b, |a, b| a < b)
    }
    #[inline(always)]
    fn eq(self, a: Self::F, b: Self::F) -> Self::M {
        zip(a, b, |a, b| a == b)
    }
    #[inline(always)]
    fn select(self, m: Self::M, a: Self::F, b: Self::F) -> Self::F {
        let mut r = [0.0; P];
        for i in 0..P {
            r[i] = if m[i] { a[i] } else { b[i] };
        }
        r
    }
    #[inline(always)]
    fn splat_i(self, x: i32) -> Self::I {
        [x; P]
    }
    #[inline(always)]
    fn iota(self) -> Self::I {
        [0, 1, 2, 3, 4, 5, 6, 7]
    }
    #[inline(always)]
    fn bits(self, a: Self::F) -> Self::I {
        map(a, |x| x.to_bits() as i32)
    }
    #[inline(always)]
    fn from_bits(self, a: Self::I) -> Self::F {
        map(a, |x| f32::from_bits(x as u32))
    }
    #[inline(always)]
    fn to_int(self, a: Self::F) -> Self::I {
        map(self.round(a), |x| x as i32)
    }
    #[inline(always)]
    fn to_float(self, a: Self::I) -> Self::F {
        map(a, |x| x as f32)
    }
    #[inline(always)]
    fn add_i(self, a: Self::I, b: Self::I) -> Self::I {
        zip(a, b, i32::wrapping_add)
    }
    #[inline(always)]
    fn mul_i(self, a: Self::I, b: Self::I) -> Self::I {
        zip(a, b, i32::wrapping_mul)
    }
    #[inline(always)]
    fn and_i(self, a: Self::I, b: Self::I) -> Self::I {
        zip(a, b, |a, b| a & b)
    }
    #[inline(always)]
    fn or_i(self, a: Self::I, b: Self::I) -> Self::I {
        zip(a, b, |a, b| a | b)
    }
    #[inline(always)]
    fn xor_i(self, a: Self::I, b: Self::I) -> Self::I {
        zip(a, b, |a, b| a ^ b)
    }
    #[inline(always)]
    fn shl<const N: u32>(self, a: Self::I) -> Self::I {
        map(a, |x| x << N)
    }
    #[inline(always)]
    fn shr<const N: u32>(self, a: Self::I) -> Self::I {
        map(a, |x| ((x as u32) >> N) as i32)
    }
    #[inline(always)]
    fn sum(self, a: Self::F) -> f32 {
        ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7]))
    }
    #[inline(always)]
    fn max_lane(self, a: Self::F) -> f32 {
        a.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::Simd;
    use crate::device::Bf16;
    use std::arch::x86_64::*;

    /// AVX2 and FMA, eight lanes.
    #[derive(Clone, Copy, Debug)]
    pub struct Avx2(pub(super) ());
    /// AVX-512 (F, BW, DQ, VL), sixteen lanes.
    #[derive(Clone, Copy, Debug)]
    pub struct Avx512(pub(super) ());

    macro_rules! intrinsics {
        ($($name:ident($($arg:ident: $ty:ty),*) -> $ret:ty = $body:expr;)*) => {$(
            #[inline(always)]
            fn $name(self, $($arg: $ty),*) -> $ret {
                // SAFETY: a value of this type exists only where the instruction set was detected.
                unsafe { $body }
            }
        )*};
    }

    #[inline(always)]
    unsafe fn mask8(n: usize) -> __m256i {
        // SAFETY: the caller has AVX2.
        unsafe { _mm256_cmpgt_epi32(_mm256_set1_epi32(n as i32), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)) }
    }

    impl Simd for Avx2 {
        const LANES: usize = 8;
        type F = __m256;
        type I = __m256i;
        type M = __m256;

        intrinsics! {
            splat(x: f32) -> __m256 = _mm256_set1_ps(x);
            load(from: &[f32]) -> __m256 = _mm256_loadu_ps(from[..8].as_ptr());
            load_partial(from: &[f32], n: usize) -> __m256 = {
                assert!(n <= 8 && n <= from.len());
                _mm256_maskload_ps(from.as_ptr(), mask8(n))
            };
            add(a: __m256, b: __m256) -> __m256 = _mm256_add_ps(a, b);
            sub(a: __m256, b: __m256) -> __m256 = _mm256_sub_ps(a, b);
            mul(a: __m256, b: __m256) -> __m256 = _mm256_mul_ps(a, b);
            div(a: __m256, b: __m256) -> __m256 = _mm256_div_ps(a, b);
            fma(a: __m256, b: __m256, c: __m256) -> __m256 = _mm256_fmadd_ps(a, b, c);
            fnma(a: __m256, b: __m256, c: __m256) -> __m256 = _mm256_fnmadd_ps(a, b, c);
            min(a: __m256, b: __m256) -> __m256 = _mm256_min_ps(a, b);
            max(a: __m256, b: __m256) -> __m256 = _mm256_max_ps(a, b);
            sqrt(a: __m256) -> __m256 = _mm256_sqrt_ps(a);
            round(a: __m256) -> __m256 = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a);
            lt(a: __m256, b: __m256) -> __m256 = _mm256_cmp_ps::<_CMP_LT_OQ>(a, b);
            eq(a: __m256, b: __m256) -> __m256 = _mm256_cmp_ps::<_CMP_EQ_OQ>(a, b);
            select(m: __m256, a: __m256, b: __m256) -> __m256 = _mm256_blendv_ps(b, a, m);
            splat_i(x: i32) -> __m256i = _mm256_set1_epi32(x);
            iota() -> __m256i = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
            bits(a: __m256) -> __m256i = _mm256_castps_si256(a);
            from_bits(a: __m256i) -> __m256 = _mm256_castsi256_ps(a);
            to_int(a: __m256) -> __m256i = _mm256_cvtps_epi32(a);
            to_float(a: __m256i) -> __m256 = _mm256_cvtepi32_ps(a);
            add_i(a: __m256i, b: __m256i) -> __m256i = _mm256_add_epi32(a, b);
            mul_i(a: __m256i, b: __m256i) -> __m256i = _mm256_mullo_epi32(a, b);
            and_i(a: __m256i, b: __m256i) -> __m256i = _mm256_and_si256(a, b);
            or_i(a: __m256i, b: __m256i) -> __m256i = _mm256_or_si256(a, b);
            xor_i(a: __m256i, b: __m256i) -> __m256i = _mm256_xor_si256(a, b);
            sum(a: __m256) -> f32 = {
                let v = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
                let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
                _mm_cvtss_f32(_mm_add_ss(v, _mm_shuffle_ps::<1>(v, v)))
            };
            max_lane(a: __m256) -> f32 = {
                let v = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
                let v = _mm_max_ps(v, _mm_movehl_ps(v, v));
                _mm_cvtss_f32(_mm_max_ss(v, _mm_shuffle_ps::<1>(v, v)))
            };
        }

        #[inline(always)]
        fn store(self, to: &mut [f32], v: __m256) {
            // SAFETY: detected, and the slice was checked.
            unsafe { _mm256_storeu_ps(to[..8].as_mut_ptr(), v) }
        }
        #[inline(always)]
        fn store_partial(self, to: &mut [f32], n: usize, v: __m256) {
            assert!(n <= 8 && n <= to.len());
            // SAFETY: detected, and masked lanes are not accessed.
            unsafe { _mm256_maskstore_ps(to.as_mut_ptr(), mask8(n), v) }
        }
        #[inline(always)]
        fn store_upper(self, to: &mut [Bf16], n: usize, v: __m256i) {
            let to = &mut to[..n];
            let mut all = [Bf16::default(); 8];
            // SAFETY: detected; eight numbers are written.
            unsafe {
                let halves = _mm256_srli_epi32::<16>(v);
                let (low, high) = (_mm256_castsi256_si128(halves), _mm256_extracti128_si256::<1>(halves));
                _mm_storeu_si128(all.as_mut_ptr().cast(), _mm_packus_epi32(low, high));
            }
            to.copy_from_slice(&all[..n]);
        }
        #[inline(always)]
        unsafe fn load_ptr(self, from: *const f32) -> __m256 {
            // SAFETY: the caller's promise.
            unsafe { _mm256_loadu_ps(from) }
        }
        #[inline(always)]
        unsafe fn store_ptr(self, to: *mut f32, v: __m256) {
            // SAFETY: the caller's promise.
            unsafe { _mm256_storeu_ps(to, v) }
        }
        #[inline(always)]
        fn shl<const N: u32>(self, a: __m256i) -> __m256i {
            // SAFETY: detected.
            unsafe { _mm256_sll_epi32(a, _mm_cvtsi32_si128(N as i32)) }
        }
        #[inline(always)]
        fn shr<const N: u32>(self, a: __m256i) -> __m256i {
            // SAFETY: detected.
            unsafe { _mm256_srl_epi32(a, _mm_cvtsi32_si128(N as i32)) }
        }
    }

    #[inline(always)]
    fn mask16(n: usize) -> __mmask16 {
        ((1u32 << n) - 1) as __mmask16
    }

    impl Simd for Avx512 {
        const LANES: usize = 16;
        type F = __m512;
        type I = __m512i;
        type M = __mmask16;

        intrinsics! {
            splat(x: f32) -> __m512 = _mm512_set1_ps(x);
            load(from: &[f32]) -> __m512 = _mm512_loadu_ps(from[..16].as_ptr());
            load_partial(from: &[f32], n: usize) -> __m512 = {
                assert!(n <= 16 && n <= from.len());
                _mm512_maskz_loadu_ps(mask16(n), from.as_ptr())
            };
            add(a: __m512, b: __m512) -> __m512 = _mm512_add_ps(a, b);
            sub(a: __m512, b: __m512) -> __m512 = _mm512_sub_ps(a, b);
            mul(a: __m512, b: __m512) -> __m512 = _mm512_mul_ps(a, b);
            div(a: __m512, b: __m512) -> __m512 = _mm512_div_ps(a, b);
            fma(a: __m512, b: __m512, c: __m512) -> __m512 = _mm512_fmadd_ps(a, b, c);
            fnma(a: __m512, b: __m512, c: __m512) -> __m512 = _mm512_fnmadd_ps(a, b, c);
            min(a: __m512, b: __m512) -> __m512 = _mm512_min_ps(a, b);
            max(a: __m512, b: __m512) -> __m512 = _mm512_max_ps(a, b);
            sqrt(a: __m512) -> __m512 = _mm512_sqrt_ps(a);
            round(a: __m512) -> __m512 =
                _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a);
            lt(a: __m512, b: __m512) -> __mmask16 = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b);
            eq(a: __m512, b: __m512) -> __mmask16 = _mm512_cmp_ps_mask::<_CMP_EQ_OQ>(a, b);
            select(m: __mmask16, a: __m512, b: __m512) -> __m512 = _mm512_mask_blend_ps(m, b, a);
            splat_i(x: i32) -> __m512i = _mm512_set1_epi32(x);
            iota() -> __m512i = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
            bits(a: __m512) -> __m512i = _mm512_castps_si512(a);
            from_bits(a: __m512i) -> __m512 = _mm512_castsi512_ps(a);
            to_int(a: __m512) -> __m512i = _mm512_cvtps_epi32(a);
            to_float(a: __m512i) -> __m512 = _mm512_cvtepi32_ps(a);
            add_i(a: __m512i, b: __m512i) -> __m512i = _mm512_add_epi32(a, b);
            mul_i(a: __m512i, b: __m512i) -> __m512i = _mm512_mullo_epi32(a, b);
            and_i(a: __m512i, b: __m512i) -> __m512i = _mm512_and_si512(a, b);
            or_i(a: __m512i, b: __m512i) -> __m512i = _mm512_or_si512(a, b);
            xor_i(a: __m512i, b: __m512i) -> __m512i = _mm512_xor_si512(a, b);
            sum(a: __m512) -> f32 = _mm512_reduce_add_ps(a);
            max_lane(a: __m512) -> f32 = _mm512_reduce_max_ps(a);
        }

        #[inline(always)]
        fn store(self, to: &mut [f32], v: __m512) {
            // SAFETY: detected, and the slice was checked.
            unsafe { _mm512_storeu_ps(to[..16].as_mut_ptr(), v) }
        }
        #[inline(always)]
        fn store_partial(self, to: &mut [f32], n: usize, v: __m512) {
            assert!(n <= 16 && n <= to.len());
            // SAFETY: detected, and masked lanes are not accessed.
            unsafe { _mm512_mask_storeu_ps(to.as_mut_ptr(), mask16(n), v) }
        }
        #[inline(always)]
        fn store_upper(self, to: &mut [Bf16], n: usize, v: __m512i) {
            assert!(n <= 16 && n <= to.len());
            // SAFETY: detected, and masked lanes are not accessed.
            unsafe {
                let halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(v));
                if n == 16 {
                    _mm256_storeu_si256(to.as_mut_ptr().cast(), halves)
                } else {
                    _mm256_mask_storeu_epi16(to.as_mut_ptr().cast(), mask16(n), halves)
                }
            }
        }
        #[inline(always)]
        unsafe fn load_ptr(self, from: *const f32) -> __m512 {
            // SAFETY: the caller's promise.
            unsafe { _mm512_loadu_ps(from) }
        }
        #[inline(always)]
        unsafe fn store_ptr(self, to: *mut f32, v: __m512) {
            // SAFETY: the caller's promise.
            unsafe { _mm512_storeu_ps(to, v) }
        }
        #[inline(always)]
        fn shl<const N: u32>(self, a: __m512i) -> __m512i {
            // SAFETY: detected.
            unsafe { _mm512_slli_epi32::<N>(a) }
        }
        #[inline(always)]
        fn shr<const N: u32>(self, a: __m512i) -> __m512i {
            // SAFETY: detected.
            unsafe { _mm512_srli_epi32::<N>(a) }
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub use x86::{Avx2, Avx512};

/// Tells the processor that these numbers will be read soon.
#[inline(always)]
pub(super) fn fetch(numbers: &[f32]) {
    #[cfg(target_arch = "x86_64")]
    for line in numbers.chunks(16) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a hint, which never fails; SSE is part of x86-64.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = numbers;
}

/// An instruction set that this machine has.
#[derive(Clone, Copy, Debug)]
pub enum Level {
    /// See [`Portable`].
    Portable(Portable),
    /// See [`Avx2`].
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    /// See [`Avx512`].
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
}

impl Level {
    /// As it is spelled in `DATAFLOW_SIMD`.
    pub fn name(self) -> &'static str {
        match self {
            Level::Portable(_) => "portable",
            #[cfg(target_arch = "x86_64")]
            Level::Avx2(_) => "avx2",
            #[cfg(target_arch = "x86_64")]
            Level::Avx512(_) => "avx512",
        }
    }
}

/// Whether the machine has the dot products of AVX512-BF16. Only asked where the level is [`Avx512`].
#[cfg(target_arch = "x86_64")]
pub(super) fn has_bf16() -> bool {
    is_x86_feature_detected!("avx512bf16")
}

/// The widest instruction set of this machine, or a narrower one if the environment variable
/// `DATAFLOW_SIMD` (`portable`, `avx2`, `avx512`) asks for it; asking for what is not there is ignored.
pub fn level() -> Level {
    static LEVEL: OnceLock<Level> = OnceLock::new();
    *LEVEL.get_or_init(|| {
        let asked = std::env::var("DATAFLOW_SIMD").unwrap_or_default();
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            let avx512 = avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            if avx512 && asked != "avx2" && asked != "portable" {
                return Level::Avx512(Avx512(()));
            }
            if avx2 && asked != "portable" {
                return Level::Avx2(Avx2(()));
            }
        }
        let _ = asked;
        Level::Portable(Portable)
    })
}

/// A computation written once for every instruction set; see [`dispatch`].
pub trait SimdKernel {
    /// What it returns.
    type Output;
    /// The computation; mark it `#[inline(always)]`.
    fn run<S: Simd>(self, s: S) -> Self::Output;
}

/// Runs `kernel` with the widest instruction set of the machine.
#[inline]
pub fn dispatch<K: SimdKernel>(kernel: K) -> K::Output {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2,fma")]
        fn avx2<K: SimdKernel>(s: Avx2, kernel: K) -> K::Output {
            kernel.run(s)
        }
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
        fn avx512<K: SimdKernel>(s: Avx512, kernel: K) -> K::Output {
            kernel.run(s)
        }
        match level() {
            // SAFETY: the value proves that the instruction set was detected.
            Level::Avx512(s) => return unsafe { avx512(s, kernel) },
            // SAFETY: as above.
            Level::Avx2(s) => return unsafe { avx2(s, kernel) },
            Level::Portable(_) => {}
        }
    }
    kernel.run(Portable)
}

/// Declares functions whose bodies are compiled for every instruction set. The first parameter, `s: S`, is
/// the instruction set and is not passed by callers. See the [module](self).
#[macro_export]
macro_rules! simd_fn {
    ($(
        $(#[$meta:meta])*
        $vis:vis fn $name:ident($s:ident: S $(, $arg:ident: $ty:ty)* $(,)?) $(-> $ret:ty)? $body:block
    )*) => {$(
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            #[allow(clippy::too_many_arguments)]
            fn generic<S: $crate::cpu::simd::Simd>($s: S $(, $arg: $ty)*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            {
                use $crate::cpu::simd::{Avx2, Avx512, Level, level};
                #[target_feature(enable = "avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn avx2(s: Avx2 $(, $arg: $ty)*) $(-> $ret)? {
                    generic(s $(, $arg)*)
                }
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn avx512(s: Avx512 $(, $arg: $ty)*) $(-> $ret)? {
                    generic(s $(, $arg)*)
                }
                match level() {
                    // SAFETY: the value proves that the instruction set was detected.
                    Level::Avx512(s) => return unsafe { avx512(s $(, $arg)*) },
                    // SAFETY: as above.
                    Level::Avx2(s) => return unsafe { avx2(s $(, $arg)*) },
                    Level::Portable(_) => {}
                }
            }
            generic($crate::cpu::simd::Portable $(, $arg)*)
        }
    )*};
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every operation on every instruction set of this machine against scalar code.
    #[test]
    fn all_levels_agree_with_scalar_code() {
        fn check<S: Simd>(s: S) {
            let a: Vec<f32> = (0..S::LANES).map(|i| i as f32 * 1.7 - 6.5).collect();
            let b: Vec<f32> = (0..S::LANES).map(|i| 3.25 - i as f32).collect();
            let (va, vb) = (s.load(&a), s.load(&b));
            let lanes = |v: S::F| {
                let mut out = vec![0.0; S::LANES];
                s.store(&mut out, v);
                out
            };
            let each = |f: &dyn Fn(f32, f32) -> f32| -> Vec<f32> { a.iter().zip(&b).map(|(&x, &y)| f(x, y)).collect() };
            assert_eq!(lanes(s.add(va, vb)), each(&|x, y| x + y));
            assert_eq!(lanes(s.div(va, vb)), each(&|x, y| x / y));
            assert_eq!(lanes(s.min(va, vb)), each(&f32::min));
            assert_eq!(lanes(s.neg(va)), each(&|x, _| -x));
            assert_eq!(lanes(s.abs(va)), each(&|x, _| x.abs()));
            assert_eq!(lanes(s.round(va)), each(&|x, _| x.round_ties_even()));
            assert_eq!(lanes(s.select(s.lt(va, vb), va, vb)), each(&|x, y| if x < y { x } else { y }));
            assert_eq!(lanes(s.to_float(s.to_int(va))), each(&|x, _| x.round_ties_even()));
            assert_eq!(lanes(s.from_bits(s.shr::<3>(s.bits(va)))), each(&|x, _| f32::from_bits(x.to_bits() >> 3)));
            for n in 0..=S::LANES {
                let mut out = vec![9.0; S::LANES];
                s.store_partial(&mut out, n, s.load_partial(&a[..n], n));
                assert_eq!(out[..n], a[..n]);
                assert!(out[n..].iter().all(|&x| x == 9.0));
            }
            for n in 0..=S::LANES {
                let mut out = vec![Bf16(7); S::LANES];
                s.store_bf16(&mut out, n, va);
                assert!(out[..n].iter().zip(&a).all(|(out, a)| *out == Bf16::from_f32(*a)));
                assert!(out[n..].iter().all(|x| *x == Bf16(7)));
            }
            for x in [
                0.0,
                -0.0,
                1.0 + 1.0 / 256.0,
                1.0 + 3.0 / 256.0,
                f32::MAX,
                f32::INFINITY,
                -1e-40,
                f32::from_bits(0x7f80_0001),
            ] {
                let mut out = vec![Bf16(7); S::LANES];
                s.store_bf16(&mut out, S::LANES, s.splat(x));
                assert!(out.iter().all(|y| *y == Bf16::from_f32(x)), "{x}: {out:?}");
            }
            let sum: f32 = a.iter().sum();
            assert!((s.sum(va) - sum).abs() < 1e-4);
            assert_eq!(s.max_lane(va), a[S::LANES - 1]);
        }
        check(Portable);
        struct Check;
        impl SimdKernel for Check {
            type Output = ();
            fn run<S: Simd>(self, s: S) {
                check(s)
            }
        }
        dispatch(Check);
    }
}
