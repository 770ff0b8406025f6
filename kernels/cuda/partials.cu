// The last step of sums that blocks make parts of: parts are added in their order, so that results do not depend on when
// blocks run.
#include "common.cuh"

// out[c] = sum over p of partials[p * stride + c], c < n. 32 columns a block, 8 threads each.
KERNEL __launch_bounds__(256) sum_partials(const float* partials, long long parts, long long stride, float* out, long long n) {
  __shared__ float sums[8][33];
  const int lane = threadIdx.x & 31, part = threadIdx.x >> 5;
  const long long c = (long long)blockIdx.x * 32 + lane;
  float sum = 0.0f;
  if (c < n)
    for (long long p = part; p < parts; p += 8) sum += partials[p * stride + c];
  sums[part][lane] = sum;
  __syncthreads();
  if (part == 0 && c < n) {
    float total = 0.0f;
    for (int p = 0; p < 8; ++p) total += sums[p][lane];
    out[c] = total;
  }
}
