// Row lookup by token, and its gradient.
#include "common.cuh"
#include "real.cuh"

// Type of the table that is looked up.
#ifndef TABLE
#define TABLE float
#endif

DEVICE int checked(const int* tokens, long long i, int rows, int* fault) {
  const int token = tokens[i];
  if (token >= 0 && token < rows) return token;
  fault[1] = token;
  fault[2] = (int)i;
  fault[3] = rows;
  __threadfence_system();
  fault[0] = 1;
  return 0;
}

// y[i] = table[tokens[i]]. One block a row of y.
KERNEL embedding_forward(const int* tokens, Rows<const TABLE> table, Rows<real> y, int* fault) {
  const long long i = blockIdx.x;
  const TABLE* from = table.row(checked(tokens, i, table.rows, fault));
  for (int c = threadIdx.x; c < y.cols; c += blockDim.x) store(y.row(i) + c, to_float(from[c]));
}

// The gradient of the table is summed token by token: positions are counted and sorted by token, and a block sums the rows of
// one token in the order of their positions.

KERNEL clear_counts(int* counts, long long n) {
  const long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
  if (i < n) counts[i] = 0;
}

// counts[t] = the number of positions of token t, given zeros.
KERNEL count_tokens(const int* tokens, long long n, int rows, int* counts, int* fault) {
  const long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
  if (i >= n) return;
  const int token = checked(tokens, i, rows, fault);
  if (token == tokens[i]) atomicAdd(counts + token, 1);
}

// starts[t] = the sum of the counts before token t; counts become 0. One block of 1024 threads.
KERNEL __launch_bounds__(1024) start_tokens(int* counts, int* starts, int rows) {
  __shared__ int sums[32];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  int base = 0;
  for (int from = 0; from < rows; from += 1024) {
    const int t = from + threadIdx.x, count = t < rows ? counts[t] : 0;
    int sum = count;
    for (int o = 1; o < 32; o *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, sum, o);
      if (lane >= o) sum += other;
    }
    if (lane == 31) sums[warp] = sum;
    __syncthreads();
    int before = 0, all = 0;
    for (int w = 0; w < 32; ++w) {
      before += w < warp ? sums[w] : 0;
      all += sums[w];
    }
    if (t < rows) {
      starts[t] = base + before + sum - count;
      counts[t] = 0;
    }
    base += all;
    __syncthreads();
  }
  if (threadIdx.x == 0) starts[rows] = base;
}

// positions[starts[t] ..] = the positions of token t, in any order.
KERNEL place_tokens(const int* tokens, long long n, int rows, const int* starts, int* counts, int* positions) {
  const long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
  if (i >= n || tokens[i] < 0 || tokens[i] >= rows) return;
  positions[starts[tokens[i]] + atomicAdd(counts + tokens[i], 1)] = (int)i;
}

// Most positions that are sorted at once.
constexpr int SORTED = 1024;

// dtable[t] += the sum of dy[i] over all i with tokens[i] = t, in the order of i. blockIdx: token, columns. Blocks of 256
// threads.
KERNEL __launch_bounds__(256) embedding_backward(const int* tokens, const int* starts, const int* positions,
                                                 Rows<const real> dy, Rows<float> dtable) {
  __shared__ int found[SORTED];
  const int token = blockIdx.x, c = blockIdx.y * 256 + threadIdx.x;
  const int start = starts[token], count = starts[token + 1] - start;
  if (count == 0) return;
  float sum = c < dy.cols ? dtable.row(token)[c] : 0.0f;
  if (count <= SORTED) {
    int size = 1;
    while (size < count) size *= 2;
    for (int k = threadIdx.x; k < size; k += 256) found[k] = k < count ? positions[start + k] : 0x7fffffff;
    __syncthreads();
    // bitonic
    for (int width = 2; width <= size; width *= 2)
      for (int apart = width / 2; apart > 0; apart /= 2) {
        for (int k = threadIdx.x; k < size; k += 256) {
          const int other = k ^ apart;
          const int a = found[k], b = found[other];
          if (other > k && (a > b) == ((k & width) == 0)) found[k] = b, found[other] = a;
        }
        __syncthreads();
      }
    if (c < dy.cols)
#pragma unroll 8
      for (int k = 0; k < count; ++k) sum += to_float(dy.row(found[k])[c]);
  } else {
    // so frequent that looking at every position costs little
    for (long long from = 0; from < dy.rows; from += 256) {
      const long long mine = from + threadIdx.x;
      found[threadIdx.x] = mine < dy.rows && tokens[mine] == token;
      __syncthreads();
      if (c < dy.cols)
        for (int k = 0; k < 256; ++k)
          if (found[k]) sum += to_float(dy.row(from + k)[c]);
      __syncthreads();
    }
  }
  if (c < dy.cols) dtable.row(token)[c] = sum;
}
