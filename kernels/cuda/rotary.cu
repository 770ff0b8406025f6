// Rotary position embedding; formulas in kernels/src/cpu/rotary.rs. A thread has one pair of channels at one position: it
// computes the angle once, in f64, and turns that pair in all heads of several sequences.
#include "common.cuh"
#include "real.cuh"

// Whether channels 2i and 2i + 1 are a pair (RetNet), or i and i + D/2 (LLaMA).
#ifndef INTERLEAVED
#define INTERLEAVED 0
#endif

// y = scale * rotate(x), x and y [batch * time, heads * dim], possibly the same memory; backward turns by the negative
// angle. Positions count from *position if it is given, else from 0. blockIdx.y counts groups of `sequences`.
KERNEL rotate(Rows<const real> x, Rows<real> y, int time, int heads, int dim, double log2_base, float scale, int backward,
              int sequences, const int* position) {
  const int half = dim / 2;
  const long long n = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (n >= (long long)time * half) return;
  const int t = (int)(n / half), i = (int)(n % half);
  const double exponent = INTERLEAVED ? (double)i / (max(half, 2) - 1) : 2.0 * i / dim;
  double sine, cosine;
  sincos((t + (position ? *position : 0)) * exp2(-exponent * log2_base), &sine, &cosine);
  const float c = (float)cosine * scale, s = backward ? -(float)sine * scale : (float)sine * scale;
  const int at = INTERLEAVED ? 2 * i : i, other = INTERLEAVED ? 1 : half;
  const int batch = x.rows / time, first = blockIdx.y * sequences, last = min(first + sequences, batch);
  for (int b = first; b < last; ++b) {
    const long long r = (long long)b * time + t;
    const real* from = x.row(r) + at;
    real* to = y.row(r) + at;
#pragma unroll 4
    for (int h = 0; h < heads; ++h, from += dim, to += dim) {
      const float p = to_float(from[0]), q = to_float(from[other]);
      store(to, p * c - q * s);
      store(to + other, q * c + p * s);
    }
  }
}
