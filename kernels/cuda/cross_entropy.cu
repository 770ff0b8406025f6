// Softmax cross-entropy against class indices, and accuracy; formulas in kernels/src/cpu/cross_entropy.rs. One block a row.
#include "common.cuh"
#include "real.cuh"

#define IGNORED (-1)

// Elements that are loaded at once.
#ifndef VECTOR
#define VECTOR 4
#endif

// A maximum, and the sum of exponentials relative to it.
struct Softmax {
  float maximum, sum;
  __device__ __forceinline__ void add(float m, float s) {
    const float top = fmaxf(maximum, m);
    // of two equal maxima (both -inf at first) nothing is rescaled; a NaN stays one
    sum = (maximum == top ? sum : sum * expf(maximum - top)) + (m == top ? s : s * expf(m - top));
    maximum = top;
  }
};

DEVICE Softmax combine(Softmax x, Softmax* scratch) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  for (int o = 16; o > 0; o >>= 1) {
    const float m = __shfl_xor_sync(0xffffffffu, x.maximum, o), s = __shfl_xor_sync(0xffffffffu, x.sum, o);
    x.add(m, s);
  }
  if (lane == 0) scratch[warp] = x;
  __syncthreads();
  Softmax all = scratch[0];
  for (int w = 1; w < warps; ++w) all.add(scratch[w].maximum, scratch[w].sum);
  return all;
}

// Of a row, by the whole block.
DEVICE Softmax softmax(const real* row, int cols, Softmax* scratch) {
  Softmax mine = {-INFINITE, 0.0f};
  for (int c = threadIdx.x * VECTOR; c < cols; c += blockDim.x * VECTOR) {
    float x[VECTOR];
    load_vector<VECTOR>(row + c, x);
    float top = x[0], sum = 0.0f;
#pragma unroll
    for (int e = 1; e < VECTOR; ++e) top = fmaxf(top, x[e]);
#pragma unroll
    for (int e = 0; e < VECTOR; ++e) sum += x[e] == top ? 1.0f : expf(x[e] - top);
    mine.add(top, sum);
  }
  return combine(mine, scratch);
}

DEVICE float row_loss(Softmax s, float target_logit) { return (s.maximum - target_logit) + logf(s.sum); }

// The number of targets that count. One block.
KERNEL count_targets(const int* targets, long long n, long long classes, int* counted, int* fault) {
  __shared__ int sums[32];
  int mine = 0;
  for (long long i = threadIdx.x; i < n; i += blockDim.x) {
    const int target = targets[i];
    mine += target != IGNORED;
    if (target != IGNORED && (target < 0 || target >= classes)) {
      fault[1] = (int)i;
      fault[2] = target;
      fault[3] = (int)classes;
      __threadfence();
      fault[0] = 1;
    }
  }
  for (int o = 16; o > 0; o >>= 1) mine += __shfl_xor_sync(0xffffffffu, mine, o);
  if ((threadIdx.x & 31) == 0) sums[threadIdx.x >> 5] = mine;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (unsigned w = 1; w < blockDim.x / 32; ++w) mine += sums[w];
    *counted = mine;
  }
}

// lse[r] and losses[r], both 0 for rows that do not count.
KERNEL cross_entropy_forward(Rows<const real> logits, const int* targets, float* lse, float* losses) {
  __shared__ Softmax scratch[32];
  const long long r = blockIdx.x;
  const int target = targets[r];
  if (target < 0 || target >= logits.cols) {
    if (threadIdx.x == 0) lse[r] = losses[r] = 0.0f;
    return;
  }
  const Softmax s = softmax(logits.row(r), logits.cols, scratch);
  if (threadIdx.x == 0) {
    lse[r] = s.maximum + logf(s.sum);
    losses[r] = row_loss(s, to_float(logits.row(r)[target]));
  }
}

// (softmax - onehot) * scale of a row; to may be the row itself.
DEVICE void write_gradient(const real* row, real* to, int cols, int target, float lse, float scale) {
  for (int c = threadIdx.x * VECTOR; c < cols; c += blockDim.x * VECTOR) {
    float x[VECTOR];
    load_vector<VECTOR>(row + c, x);
#pragma unroll
    for (int e = 0; e < VECTOR; ++e) x[e] = (expf(x[e] - lse) - (c + e == target ? 1.0f : 0.0f)) * scale;
    store_vector<VECTOR>(to + c, x);
  }
}

DEVICE void write_zeros(real* to, int cols) {
  for (int c = threadIdx.x; c < cols; c += blockDim.x) store(to + c, 0.0f);
}

// The gradient of the mean loss times *upstream; may overwrite the logits.
KERNEL cross_entropy_backward(Rows<const real> logits, const int* targets, const float* lse, const float* upstream,
                              const int* counted, Rows<real> dlogits) {
  const long long r = blockIdx.x;
  const int target = targets[r];
  if (target < 0 || target >= logits.cols) return write_zeros(dlogits.row(r), logits.cols);
  const float scale = *upstream / max(*counted, 1);
  write_gradient(logits.row(r), dlogits.row(r), logits.cols, target, lse[r], scale);
}

// Loss of each row, and the gradient times `upstream` over the logits.
KERNEL cross_entropy_in_place(Rows<real> logits, const int* targets, const int* counted, float upstream, float* losses) {
  __shared__ Softmax scratch[32];
  const long long r = blockIdx.x;
  real* row = logits.row(r);
  const int target = targets[r];
  if (target < 0 || target >= logits.cols) {
    if (threadIdx.x == 0) losses[r] = 0.0f;
    return write_zeros(row, logits.cols);
  }
  const Softmax s = softmax(row, logits.cols, scratch);
  if (threadIdx.x == 0) losses[r] = row_loss(s, to_float(row[target]));
  __syncthreads();
  write_gradient(row, row, logits.cols, target, s.maximum + logf(s.sum), upstream / max(*counted, 1));
}

// The mean of the losses of the rows that count; 0 if there are none. One block.
KERNEL mean_loss(const float* losses, long long n, const int* counted, float* out) {
  __shared__ double sums[1024];
  double mine = 0.0;
  for (long long i = threadIdx.x; i < n; i += blockDim.x) mine += losses[i];
  sums[threadIdx.x] = mine;
  __syncthreads();
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) *out = (float)(sums[0] / max(*counted, 1));
}

// correct[r]: whether the row counts and its largest logit (the first of equal ones) is the target's.
KERNEL correct_rows(Rows<const real> logits, const int* targets, float* correct) {
  __shared__ float best[32];
  __shared__ int where[32];
  const long long r = blockIdx.x;
  const int target = targets[r], lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const real* row = logits.row(r);
  float top = -INFINITE;
  int at = 0x7fffffff;
  for (int c = threadIdx.x; c < logits.cols; c += blockDim.x) {
    const float x = to_float(row[c]);
    if (x > top || at == 0x7fffffff) top = x, at = c;
  }
  for (int o = 16; o > 0; o >>= 1) {
    const float x = __shfl_xor_sync(0xffffffffu, top, o);
    const int c = __shfl_xor_sync(0xffffffffu, at, o);
    if (x > top || (x == top && c < at)) top = x, at = c;
  }
  if (lane == 0) best[warp] = top, where[warp] = at;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (unsigned w = 1; w < blockDim.x / 32; ++w)
      if (best[w] > top || (best[w] == top && where[w] < at)) top = best[w], at = where[w];
    correct[r] = target >= 0 && at == target ? 1.0f : 0.0f;
  }
}
