// Number formats of activations. A file of kernels is compiled with `-DREAL=float` or `-DREAL=bf16`; sums, statistics and
// recurrence states are f32 either way.
#pragma once

// bfloat16: the high half of an f32.
struct bf16 {
  unsigned short bits;
};

#ifndef REAL
#define REAL float
#endif
typedef REAL real;

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(bf16 x) { return __uint_as_float((unsigned)x.bits << 16); }

// The bits of the nearest bf16, ties to even.
DEVICE unsigned short bf16_bits(float x) {
#ifdef CUDA_EMULATION
  const unsigned u = __float_as_uint(x);
  return (u & 0x7fffffffu) > 0x7f800000u ? 0x7fff : (unsigned short)((u + 0x7fff + (u >> 16 & 1)) >> 16);
#else
  unsigned short bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
#endif
}

// Two bf16 in a word, `low` in its low half.
DEVICE unsigned bf16_pair(float low, float high) {
#ifdef CUDA_EMULATION
  return bf16_bits(low) | (unsigned)bf16_bits(high) << 16;
#else
  unsigned word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#endif
}

DEVICE void store(float* to, float x) { *to = x; }
DEVICE void store(bf16* to, float x) { to->bits = bf16_bits(x); }

// What a store of x would leave behind.
template <class T> DEVICE float rounded(float x);
template <> __device__ __forceinline__ float rounded<float>(float x) { return x; }
template <> __device__ __forceinline__ float rounded<bf16>(float x) {
  return __uint_as_float((unsigned)bf16_bits(x) << 16);
}

// N consecutive elements at once; N is 1, 2 or 4, and the address a multiple of N elements.
template <int N> DEVICE void load_vector(const float* from, float* x) {
  if (N == 4) {
    const float4 v = *reinterpret_cast<const float4*>(from);
    x[0] = v.x; x[1] = v.y; x[2] = v.z; x[3] = v.w;
  } else if (N == 2) {
    const float2 v = *reinterpret_cast<const float2*>(from);
    x[0] = v.x; x[1] = v.y;
  } else {
    x[0] = *from;
  }
}
template <int N> DEVICE void load_vector(const bf16* from, float* x) {
  if (N == 4) {
    const uint2 v = *reinterpret_cast<const uint2*>(from);
    x[0] = __uint_as_float(v.x << 16); x[1] = __uint_as_float(v.x & 0xffff0000u);
    x[2] = __uint_as_float(v.y << 16); x[3] = __uint_as_float(v.y & 0xffff0000u);
  } else if (N == 2) {
    const unsigned v = *reinterpret_cast<const unsigned*>(from);
    x[0] = __uint_as_float(v << 16); x[1] = __uint_as_float(v & 0xffff0000u);
  } else {
    x[0] = to_float(*from);
  }
}
template <int N> DEVICE void store_vector(float* to, const float* x) {
  if (N == 4) *reinterpret_cast<float4*>(to) = make_float4(x[0], x[1], x[2], x[3]);
  else if (N == 2) *reinterpret_cast<float2*>(to) = make_float2(x[0], x[1]);
  else *to = x[0];
}
template <int N> DEVICE void store_vector(bf16* to, const float* x) {
  if (N == 4) *reinterpret_cast<uint2*>(to) = make_uint2(bf16_pair(x[0], x[1]), bf16_pair(x[2], x[3]));
  else if (N == 2) *reinterpret_cast<unsigned*>(to) = bf16_pair(x[0], x[1]);
  else store(to, x[0]);
}

// 2^x to two units in the last place; 0 where the result would be subnormal.
DEVICE float fast_exp2(float x) {
#ifdef CUDA_EMULATION
  return x < -126.0f ? 0.0f : exp2f(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// 1 / x to one unit in the last place; 0 where the result would be subnormal.
DEVICE float fast_reciprocal(float x) {
#ifdef CUDA_EMULATION
  return 1.0f / x;
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// e^x for x <= 0, as fast_exp2.
DEVICE float fast_exp(float x) { return fast_exp2(x * 1.44269504f); }

// 1 / (1 + e^-x), to some units in the last place.
DEVICE float sigmoid(float x) { return fast_reciprocal(1.0f + fast_exp2(x * -1.44269504f)); }

// Without a header there is no macro for it.
#define INFINITE __int_as_float(0x7f800000)
