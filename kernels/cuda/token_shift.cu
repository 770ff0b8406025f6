// Shift by one position in time, and RWKV's mixing with the shifted rows; formulas in kernels/src/cpu/token_shift.rs. A
// thread has VECTOR channels and a run of rows of a sequence.
#include "common.cuh"
#include "real.cuh"

// Mix vectors; without any, rows are only shifted.
#ifndef MIXES
#define MIXES 4
#endif
// Channels of a thread.
#ifndef VECTOR
#define VECTOR 4
#endif

constexpr int COUNT = MIXES > 0 ? MIXES : 1;

// A result (or its gradient) and its mix vector.
struct Mix {
  Rows<real> y;
  const float* mix;
};

DEVICE void load_mixes(const Mix* mixes, int c, float (&m)[COUNT][VECTOR]) {
#pragma unroll
  for (int j = 0; j < MIXES; ++j) load_vector<VECTOR>(mixes[j].mix + c, m[j]);
}

// blockIdx: channels, runs of `run` rows, sequences.
KERNEL __launch_bounds__(128) shift_forward(Rows<const real> x, const Mix* mixes, int time, int run) {
  const int c = (blockIdx.x * blockDim.x + threadIdx.x) * VECTOR, from = blockIdx.y * run, to = min(from + run, time);
  const long long first = (long long)blockIdx.z * time;
  if (c >= x.cols) return;
  float m[COUNT][VECTOR], before[VECTOR];
  load_mixes(mixes, c, m);
#pragma unroll
  for (int e = 0; e < VECTOR; ++e) before[e] = 0.0f;
  if (from > 0) load_vector<VECTOR>(x.row(first + from - 1) + c, before);
  for (int t = from; t < to; ++t) {
    float now[VECTOR];
    load_vector<VECTOR>(x.row(first + t) + c, now);
    if (MIXES == 0) store_vector<VECTOR>(mixes[0].y.row(first + t) + c, before);
#pragma unroll
    for (int j = 0; j < MIXES; ++j) {
      float out[VECTOR];
#pragma unroll
      for (int e = 0; e < VECTOR; ++e) out[e] = now[e] + (before[e] - now[e]) * m[j][e];
      store_vector<VECTOR>(mixes[j].y.row(first + t) + c, out);
    }
#pragma unroll
    for (int e = 0; e < VECTOR; ++e) before[e] = now[e];
  }
}

// Gradients; `mixes` holds those of the results. partials [sequences * runs, MIXES * cols]: sums over the rows of a run.
KERNEL __launch_bounds__(128) shift_backward(Rows<const real> x, const Mix* mixes, Rows<real> dx, float* partials, int time,
                                             int run) {
  const int c = (blockIdx.x * blockDim.x + threadIdx.x) * VECTOR, from = blockIdx.y * run, to = min(from + run, time);
  const long long first = (long long)blockIdx.z * time;
  if (c >= dx.cols) return;
  float m[COUNT][VECTOR], before[VECTOR], sums[COUNT][VECTOR], held[VECTOR];
  load_mixes(mixes, c, m);
#pragma unroll
  for (int e = 0; e < VECTOR; ++e) {
    before[e] = held[e] = 0.0f;
#pragma unroll
    for (int j = 0; j < COUNT; ++j) sums[j][e] = 0.0f;
  }
  if (MIXES > 0 && from > 0) load_vector<VECTOR>(x.row(first + from - 1) + c, before);
  // what a row passes to the row before is known one row later
  for (int t = from; t <= to; ++t) {
    float now[VECTOR], own[VECTOR], back[VECTOR];
#pragma unroll
    for (int e = 0; e < VECTOR; ++e) now[e] = own[e] = back[e] = 0.0f;
    if (t < time) {
      if (MIXES == 0) load_vector<VECTOR>(mixes[0].y.row(first + t) + c, back);
      if (MIXES > 0 && t < to) load_vector<VECTOR>(x.row(first + t) + c, now);
#pragma unroll
      for (int j = 0; j < MIXES; ++j) {
        float gradient[VECTOR];
        load_vector<VECTOR>(mixes[j].y.row(first + t) + c, gradient);
#pragma unroll
        for (int e = 0; e < VECTOR; ++e) {
          back[e] += gradient[e] * m[j][e];
          own[e] += gradient[e] * (1.0f - m[j][e]);
          if (t < to) sums[j][e] += gradient[e] * (before[e] - now[e]);
        }
      }
    }
    if (t > from) {
#pragma unroll
      for (int e = 0; e < VECTOR; ++e) held[e] += back[e];
      store_vector<VECTOR>(dx.row(first + t - 1) + c, held);
    }
#pragma unroll
    for (int e = 0; e < VECTOR; ++e) held[e] = own[e], before[e] = now[e];
  }
  float* part = partials + ((long long)blockIdx.z * gridDim.y + blockIdx.y) * MIXES * dx.cols;
#pragma unroll
  for (int j = 0; j < MIXES; ++j) store_vector<VECTOR>(part + (long long)j * dx.cols + c, sums[j]);
}
