// Causal depthwise convolution over time with an optional SiLU; formulas in kernels/src/cpu/conv1d.rs. A thread has VECTOR
// channels and a run of rows of a sequence; the rows that its taps see stay in registers.
#include "common.cuh"
#include "real.cuh"

// Width of the convolution; the last tap sees the present row.
#ifndef TAPS
#define TAPS 4
#endif
// Whether SiLU is applied.
#ifndef SILU
#define SILU 1
#endif
// Channels of a thread.
#ifndef VECTOR
#define VECTOR 4
#endif

constexpr int BEFORE = TAPS > 1 ? TAPS - 1 : 1;

struct Parameters {
  float weight[TAPS][VECTOR], bias[VECTOR];
};
DEVICE Parameters load_parameters(const float* weight, const float* bias, int c) {
  Parameters p;
#pragma unroll
  for (int e = 0; e < VECTOR; ++e) {
#pragma unroll
    for (int j = 0; j < TAPS; ++j) p.weight[j][e] = weight[(long long)(c + e) * TAPS + j];
    p.bias[e] = bias ? bias[c + e] : 0.0f;
  }
  return p;
}

// The rows before row `from` of a sequence that starts at row `first`, zeros before its start.
DEVICE void load_before(float (&seen)[BEFORE][VECTOR], Rows<const real> x, long long first, int from, int c) {
#pragma unroll
  for (int j = 0; j < TAPS - 1; ++j) {
    const int t = from - (TAPS - 1) + j;
#pragma unroll
    for (int e = 0; e < VECTOR; ++e) seen[j][e] = 0.0f;
    if (t >= 0) load_vector<VECTOR>(x.row(first + t) + c, seen[j]);
  }
}

DEVICE void push(float (&seen)[BEFORE][VECTOR], const float (&now)[VECTOR]) {
#pragma unroll
  for (int e = 0; e < VECTOR; ++e) {
#pragma unroll
    for (int j = 0; j + 2 < TAPS; ++j) seen[j][e] = seen[j + 1][e];
    seen[BEFORE - 1][e] = now[e];
  }
}

DEVICE float convolve(const Parameters& p, const float (&seen)[BEFORE][VECTOR], const float (&now)[VECTOR], int e) {
  float z = p.bias[e] + p.weight[TAPS - 1][e] * now[e];
#pragma unroll
  for (int j = 0; j < TAPS - 1; ++j) z += p.weight[j][e] * seen[j][e];
  return z;
}

// blockIdx: channels, runs of `run` rows, sequences.
KERNEL __launch_bounds__(128) conv1d_forward(Rows<const real> x, const float* weight, const float* bias, Rows<real> y,
                                             int time, int run) {
  const int c = (blockIdx.x * blockDim.x + threadIdx.x) * VECTOR, from = blockIdx.y * run, to = min(from + run, time);
  const long long first = (long long)blockIdx.z * time;
  if (c >= x.cols) return;
  const Parameters p = load_parameters(weight, bias, c);
  float seen[BEFORE][VECTOR];
  load_before(seen, x, first, from, c);
#pragma unroll 4
  for (int t = from; t < to; ++t) {
    float now[VECTOR], out[VECTOR];
    load_vector<VECTOR>(x.row(first + t) + c, now);
#pragma unroll
    for (int e = 0; e < VECTOR; ++e) {
      const float z = convolve(p, seen, now, e);
      out[e] = SILU ? z * sigmoid(z) : z;
    }
    push(seen, now);
    store_vector<VECTOR>(y.row(first + t) + c, out);
  }
}

// Gradients. partials [sequences * runs, cols * (TAPS + 1)]: sums over the rows of a run for weights, then for biases. dx is
// written TAPS - 1 rows late, when all rows that it went into are known.
KERNEL __launch_bounds__(128) conv1d_backward(Rows<const real> x, const float* weight, const float* bias, Rows<const real> dy,
                                              Rows<real> dx, float* partials, int time, int run) {
  const int c = (blockIdx.x * blockDim.x + threadIdx.x) * VECTOR, from = blockIdx.y * run, to = min(from + run, time);
  const long long first = (long long)blockIdx.z * time;
  if (c >= x.cols) return;
  const Parameters p = load_parameters(weight, bias, c);
  float seen[BEFORE][VECTOR], dz[BEFORE][VECTOR], sums[TAPS + 1][VECTOR];
  load_before(seen, x, first, from, c);
#pragma unroll
  for (int e = 0; e < VECTOR; ++e) {
#pragma unroll
    for (int j = 0; j <= TAPS; ++j) sums[j][e] = 0.0f;
#pragma unroll
    for (int j = 0; j < BEFORE; ++j) dz[j][e] = 0.0f;
  }
#pragma unroll 2
  for (int t = from; t < to + TAPS - 1; ++t) {
    float now[VECTOR], gradient[VECTOR], out[VECTOR];
#pragma unroll
    for (int e = 0; e < VECTOR; ++e) now[e] = gradient[e] = 0.0f;
    if (t < time) {
      load_vector<VECTOR>(x.row(first + t) + c, now);
      load_vector<VECTOR>(dy.row(first + t) + c, gradient);
    }
#pragma unroll
    for (int e = 0; e < VECTOR; ++e) {
      if (SILU) {
        const float z = convolve(p, seen, now, e), s = sigmoid(z);
        gradient[e] *= s * (1.0f + z * (1.0f - s));
      }
      if (t < to) {
#pragma unroll
        for (int j = 0; j < TAPS - 1; ++j) sums[j][e] += gradient[e] * seen[j][e];
        sums[TAPS - 1][e] += gradient[e] * now[e];
        sums[TAPS][e] += gradient[e];
      }
      // tap j of row t saw row t - (TAPS - 1) + j
      out[e] = p.weight[0][e] * gradient[e];
#pragma unroll
      for (int j = 1; j < TAPS; ++j) out[e] += p.weight[j][e] * dz[BEFORE - j][e];
    }
    push(seen, now);
    push(dz, gradient);
    if (t - (TAPS - 1) >= from) store_vector<VECTOR>(dx.row(first + t - (TAPS - 1)) + c, out);
  }
  float* part = partials + ((long long)blockIdx.z * gridDim.y + blockIdx.y) * x.cols * (TAPS + 1);
#pragma unroll
  for (int e = 0; e < VECTOR; ++e) {
#pragma unroll
    for (int j = 0; j < TAPS; ++j) part[(c + e) * TAPS + j] = sums[j][e];
    part[x.cols * TAPS + c + e] = sums[TAPS][e];
  }
}
