// Sums over rows and columns. Each sum has a fixed order, so results do not differ from run to run.
#include "common.cuh"
#include "real.cuh"

// Columns of a thread.
#ifndef VECTOR
#define VECTOR 1
#endif

// y[m, c] = the sum of x[r, c] over chunk `blockIdx.y` of the rows r with r / div % modulo = m, where m = blockIdx.z and the
// chunks' results lie below each other: y has modulo * chunks rows. Blocks of 32 VECTOR columns and 8 rows.
KERNEL __launch_bounds__(256) sum_rows(Rows<const real> x, Rows<float> y, int div, int modulo, long long per_chunk) {
  __shared__ float partial[8][32 * VECTOR];
  const int c = (blockIdx.x * 32 + threadIdx.x) * VECTOR, m = blockIdx.z;
  const long long count = x.rows / modulo, from = blockIdx.y * per_chunk;
  const long long to = from + per_chunk < count ? from + per_chunk : count;
  float sum[VECTOR];
#pragma unroll
  for (int e = 0; e < VECTOR; ++e) sum[e] = 0.0f;
  if (c < x.cols) {
#pragma unroll 4
    for (long long i = from + threadIdx.y; i < to; i += 8) {
      float v[VECTOR];
      load_vector<VECTOR>(x.row(((i / div) * modulo + m) * div + i % div) + c, v);
#pragma unroll
      for (int e = 0; e < VECTOR; ++e) sum[e] += v[e];
    }
  }
#pragma unroll
  for (int e = 0; e < VECTOR; ++e) partial[threadIdx.y][threadIdx.x * VECTOR + e] = sum[e];
  __syncthreads();
  if (threadIdx.y == 0 && c < x.cols)
#pragma unroll
    for (int e = 0; e < VECTOR; ++e) {
      for (int i = 1; i < 8; ++i) sum[e] += partial[i][threadIdx.x * VECTOR + e];
      y.row((long long)m * gridDim.y + blockIdx.y)[c + e] = sum[e];
    }
}

// y[r] = the sum of row r. One warp a row.
KERNEL sum_columns(Rows<const real> x, float* y) {
  const long long r = blockIdx.x * (long long)(blockDim.x >> 5) + (threadIdx.x >> 5);
  if (r >= x.rows) return;
  float sum = 0.0f;
  for (int c = threadIdx.x & 31; c < x.cols; c += 32) sum += to_float(x.row(r)[c]);
  sum = warp_sum(sum);
  if ((threadIdx.x & 31) == 0) y[r] = sum;
}
