// Causal softmax attention (FlashAttention, arXiv:2205.14135; FlashAttention-2, arXiv:2307.08691): a block of four warps has
// 64 queries (or keys) of a head in registers and walks over the keys (queries) that they meet. Probabilities are never
// stored; the backward pass computes them again from the log-sum-exp of each row. The gradient of the queries and those of
// keys and values are two kernels, so that nothing is added by two blocks and results do not depend on their order.
#include "common.cuh"
#include "keep.cuh"
#include "tile.cuh"

// Channels of a head.
#ifndef HEAD_DIM
#define HEAD_DIM 64
#endif
// Elements that are loaded at once.
#ifndef VECTOR
#define VECTOR 4
#endif
// Whether probabilities are dropped at random.
#ifndef DROPOUT
#define DROPOUT 0
#endif

constexpr int TALL = 64;
constexpr int DIM = padded(HEAD_DIM);
constexpr int LD = pitch(HEAD_DIM);
// Rows of the tiles that are walked over in the backward pass: few where the sums take most registers.
constexpr int WALK = DIM > 64 ? 32 : 64;
constexpr float LOG2_E = 1.44269504f;

// The head of a block.
struct Head {
  long long pair, first;
  int column;
};
DEVICE Head head_of(int pair, int heads, int time) {
  return {pair, (long long)(pair / heads) * time, pair % heads * HEAD_DIM};
}

// blockIdx: block of queries, (sequence, head). Shared memory: three tiles.
KERNEL __launch_bounds__(128) attention_forward(Rows<const real> q, Rows<const real> k, Rows<const real> v, Rows<real> y,
                                                float* lse, int heads, int time, float scale, unsigned long long seed,
                                                unsigned site, unsigned threshold, float keep_scale, const int* step) {
  DYNAMIC_SHARED(real, shared);
  real *queries = shared, *keys = shared + TALL * LD, *values = shared + 2 * TALL * LD;
  const Head head = head_of(blockIdx.y, heads, time);
  const int block = gridDim.x - 1 - blockIdx.x, from = block * TALL, row = from + tile_warp() * 16;
#if DROPOUT
  const Keep keep = keep_new(seed, *step, site, threshold, keep_scale);
#endif
  load_tile<TALL, HEAD_DIM, VECTOR>(queries, q.row(head.first + from) + head.column, q.stride, time - from);
  float out[DIM / 8][4], top[2] = {-INFINITE, -INFINITE}, sum[2] = {0.0f, 0.0f};
  clear(out);
  for (int other = 0; other <= from; other += TALL) {
    __syncthreads();
    load_tile<TALL, HEAD_DIM, VECTOR>(keys, k.row(head.first + other) + head.column, k.stride, time - other);
    load_tile<TALL, HEAD_DIM, VECTOR>(values, v.row(head.first + other) + head.column, v.stride, time - other);
    __syncthreads();
    float p[TALL / 8][4];
    clear(p);
    multiply<TALL, DIM, false, true>(p, queries + tile_warp() * 16 * LD, LD, keys, LD);
    float here[2] = {top[0], top[1]};
#pragma unroll
    for (int j = 0; j < TALL / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const bool seen = other + tile_column(j, e) <= row + tile_row(e);
        p[j][e] = seen ? p[j][e] * (scale * LOG2_E) : -INFINITE;
        here[e / 2] = fmaxf(here[e / 2], p[j][e]);
      }
    float factor[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      here[i] = row_max(here[i]);
      factor[i] = exp2f(top[i] - here[i]);
      top[i] = here[i];
      sum[i] *= factor[i];
    }
#pragma unroll
    for (int j = 0; j < TALL / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        p[j][e] = exp2f(p[j][e] - top[e / 2]);
        sum[e / 2] += p[j][e];
#if DROPOUT
        const unsigned long long counter = (unsigned long long)(head.pair * time + row + tile_row(e)) << 32;
        p[j][e] *= keep.at(counter | (unsigned)(other + tile_column(j, e)));
#endif
      }
#pragma unroll
    for (int j = 0; j < DIM / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) out[j][e] *= factor[e / 2];
    multiply_registers<DIM, TALL, false>(out, p, values, LD);
  }
  sum[0] = row_sum(sum[0]);
  sum[1] = row_sum(sum[1]);
  store_tile<HEAD_DIM, VECTOR>(y.row(head.first) + head.column, y.stride, row, time, out, 1.0f / sum[0], 1.0f / sum[1]);
  if (tile_lane() % 4 == 0)
    for (int i = 0; i < 2; ++i)
      if (row + tile_row(2 * i) < time)
        lse[head.pair * time + row + tile_row(2 * i)] = top[i] / LOG2_E + logf(sum[i]);
}

// Gradient of the queries; also writes delta = dy . y of each row, for the other kernel. Shared memory: four tiles.
KERNEL __launch_bounds__(128, 2) attention_backward_queries(Rows<const real> q, Rows<const real> k, Rows<const real> v,
                                                         Rows<const real> y, const float* lse, Rows<const real> dy,
                                                         Rows<real> dq, float* delta, int heads, int time, float scale,
                                                         unsigned long long seed, unsigned site, unsigned threshold,
                                                         float keep_scale, const int* step) {
  DYNAMIC_SHARED(real, shared);
  real *queries = shared, *dys = shared + TALL * LD, *keys = shared + 2 * TALL * LD, *values = keys + WALK * LD;
  const Head head = head_of(blockIdx.y, heads, time);
  const int block = gridDim.x - 1 - blockIdx.x, from = block * TALL, row = from + tile_warp() * 16;
#if DROPOUT
  const Keep keep = keep_new(seed, *step, site, threshold, keep_scale);
#endif
  load_tile<TALL, HEAD_DIM, VECTOR>(queries, q.row(head.first + from) + head.column, q.stride, time - from);
  load_tile<TALL, HEAD_DIM, VECTOR>(dys, dy.row(head.first + from) + head.column, dy.stride, time - from);
  __syncthreads();
  float own[2] = {0.0f, 0.0f}, shift[2] = {0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int r = row + tile_row(2 * i);
    if (r < time) {
      const real* out = y.row(head.first + r) + head.column;
      const real* gradient = dys + (r - from) * LD;
      for (int c = tile_lane() % 4; c < HEAD_DIM; c += 4) own[i] += to_float(out[c]) * to_float(gradient[c]);
      shift[i] = lse[head.pair * time + r] * LOG2_E;
    }
    own[i] = row_sum(own[i]);
    if (r < time && tile_lane() % 4 == 0) delta[head.pair * time + r] = own[i];
  }
  float out[DIM / 8][4];
  clear(out);
  for (int other = 0; other < from + TALL && other < time; other += WALK) {
    __syncthreads();
    load_tile<WALK, HEAD_DIM, VECTOR>(keys, k.row(head.first + other) + head.column, k.stride, time - other);
    load_tile<WALK, HEAD_DIM, VECTOR>(values, v.row(head.first + other) + head.column, v.stride, time - other);
    __syncthreads();
    float p[WALK / 8][4], dp[WALK / 8][4];
    clear(p);
    clear(dp);
    multiply<WALK, DIM, false, true>(p, queries + tile_warp() * 16 * LD, LD, keys, LD);
    multiply<WALK, DIM, false, true>(dp, dys + tile_warp() * 16 * LD, LD, values, LD);
#pragma unroll
    for (int j = 0; j < WALK / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const bool seen = other + tile_column(j, e) <= row + tile_row(e);
        p[j][e] = seen ? exp2f(p[j][e] * (scale * LOG2_E) - shift[e / 2]) : 0.0f;
#if DROPOUT
        const unsigned long long counter = (unsigned long long)(head.pair * time + row + tile_row(e)) << 32;
        dp[j][e] *= keep.at(counter | (unsigned)(other + tile_column(j, e)));
#endif
        p[j][e] *= dp[j][e] - own[e / 2];
      }
    multiply_registers<DIM, WALK, false>(out, p, keys, LD);
  }
  store_tile<HEAD_DIM, VECTOR>(dq.row(head.first) + head.column, dq.stride, row, time, out, scale, scale);
}

// Gradients of keys and values. blockIdx: block of keys, (sequence, head). Shared memory: four tiles, two rows of f32.
KERNEL __launch_bounds__(128, 2) attention_backward_keys(Rows<const real> q, Rows<const real> k, Rows<const real> v,
                                                      const float* lse, Rows<const real> dy, const float* delta,
                                                      Rows<real> dk, Rows<real> dv, int heads, int time, float scale,
                                                      unsigned long long seed, unsigned site, unsigned threshold,
                                                      float keep_scale, const int* step) {
  DYNAMIC_SHARED(real, shared);
  real *keys = shared, *values = shared + TALL * LD, *queries = shared + 2 * TALL * LD, *dys = queries + WALK * LD;
  float* shift = reinterpret_cast<float*>(dys + WALK * LD);
  float* own = shift + WALK;
  const Head head = head_of(blockIdx.y, heads, time);
  const int from = blockIdx.x * TALL, row = from + tile_warp() * 16;
#if DROPOUT
  const Keep keep = keep_new(seed, *step, site, threshold, keep_scale);
#endif
  load_tile<TALL, HEAD_DIM, VECTOR>(keys, k.row(head.first + from) + head.column, k.stride, time - from);
  load_tile<TALL, HEAD_DIM, VECTOR>(values, v.row(head.first + from) + head.column, v.stride, time - from);
  float key_sums[DIM / 8][4], value_sums[DIM / 8][4];
  clear(key_sums);
  clear(value_sums);
  for (int other = from; other < time; other += WALK) {
    __syncthreads();
    load_tile<WALK, HEAD_DIM, VECTOR>(queries, q.row(head.first + other) + head.column, q.stride, time - other);
    load_tile<WALK, HEAD_DIM, VECTOR>(dys, dy.row(head.first + other) + head.column, dy.stride, time - other);
    for (int i = threadIdx.x; i < WALK; i += blockDim.x) {
      const bool live = other + i < time;
      shift[i] = live ? lse[head.pair * time + other + i] * LOG2_E : 0.0f;
      own[i] = live ? delta[head.pair * time + other + i] : 0.0f;
    }
    __syncthreads();
    // rows are keys, columns are queries
    float p[WALK / 8][4], dp[WALK / 8][4];
    clear(p);
    clear(dp);
    multiply<WALK, DIM, false, true>(p, keys + tile_warp() * 16 * LD, LD, queries, LD);
    multiply<WALK, DIM, false, true>(dp, values + tile_warp() * 16 * LD, LD, dys, LD);
#pragma unroll
    for (int j = 0; j < WALK / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int query = tile_column(j, e);
        const bool seen = row + tile_row(e) <= other + query;
        const float probability = seen ? exp2f(p[j][e] * (scale * LOG2_E) - shift[query]) : 0.0f;
        float kept = 1.0f;
#if DROPOUT
        const unsigned long long counter = (unsigned long long)(head.pair * time + other + query) << 32;
        kept = keep.at(counter | (unsigned)(row + tile_row(e)));
#endif
        dp[j][e] = probability * (dp[j][e] * kept - own[query]);
        p[j][e] = probability * kept;
      }
    multiply_registers<DIM, WALK, false>(value_sums, p, dys, LD);
    multiply_registers<DIM, WALK, false>(key_sums, dp, queries, LD);
  }
  store_tile<HEAD_DIM, VECTOR>(dk.row(head.first) + head.column, dk.stride, row, time, key_sums, scale, scale);
  store_tile<HEAD_DIM, VECTOR>(dv.row(head.first) + head.column, dv.stride, row, time, value_sums, 1.0f, 1.0f);
}
