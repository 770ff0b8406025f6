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

// blockIdx: block of queries, (sequence, head). Shared memory: five tiles.
KERNEL __launch_bounds__(128) attention_forward(Rows<const real> q, Rows<const real> k, Rows<const real> v, Rows<real> y,
                                                float* lse, int heads, int time, float scale, unsigned long long seed,
                                                unsigned site, unsigned threshold, float keep_scale, const int* step) {
  DYNAMIC_SHARED(real, shared);
  real *queries = shared, *tiles = shared + TALL * LD;
  const Head head = head_of(blockIdx.y, heads, time);
  const int block = gridDim.x - 1 - blockIdx.x, from = block * TALL, row = from + tile_warp() * 16;
#if DROPOUT
  const Keep keep = keep_new(seed, *step, site, threshold, keep_scale);
#endif
  // keys and values of the next block are on their way while those of one are used
  auto load = [&](int other, int buffer) {
    real* to = tiles + buffer * 2 * TALL * LD;
    load_tile<TALL, HEAD_DIM, VECTOR>(to, k.row(head.first + other) + head.column, k.stride, time - other);
    load_tile<TALL, HEAD_DIM, VECTOR>(to + TALL * LD, v.row(head.first + other) + head.column, v.stride, time - other);
  };
  load_tile<TALL, HEAD_DIM, VECTOR>(queries, q.row(head.first + from) + head.column, q.stride, time - from);
  load(0, 0);
  float out[DIM / 8][4], top[2] = {-INFINITE, -INFINITE}, sum[2] = {0.0f, 0.0f};
  clear(out);
  for (int other = 0, buffer = 0; other <= from; other += TALL, buffer ^= 1) {
    const real *keys = tiles + buffer * 2 * TALL * LD, *values = keys + TALL * LD;
    tiles_ready();
    if (other < from) load(other + TALL, buffer ^ 1);
    float p[TALL / 8][4];
    clear(p);
    multiply<TALL, DIM, false, true>(p, queries + tile_warp() * 16 * LD, LD, keys, LD);
    if (other == from)
#pragma unroll
      for (int j = 0; j < TALL / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (other + tile_column(j, e) > row + tile_row(e)) p[j][e] = -INFINITE;
    float here[2] = {top[0], top[1]}, factor[2], shift[2];
#pragma unroll
    for (int j = 0; j < TALL / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) here[e / 2] = fmaxf(here[e / 2], p[j][e]);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      here[i] = row_max(here[i]);
      factor[i] = fast_exp2((top[i] - here[i]) * (scale * LOG2_E));
      top[i] = here[i];
      shift[i] = here[i] * (scale * LOG2_E);
      sum[i] *= factor[i];
    }
#pragma unroll
    for (int j = 0; j < TALL / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        p[j][e] = fast_exp2(p[j][e] * (scale * LOG2_E) - shift[e / 2]);
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
        lse[head.pair * time + row + tile_row(2 * i)] = top[i] * scale + logf(sum[i]);
}

// Gradient of the queries; also writes delta = dy . y of each row, for the other kernel. Shared memory: two tiles, and four of WALK rows.
KERNEL __launch_bounds__(128, 3) attention_backward_queries(Rows<const real> q, Rows<const real> k, Rows<const real> v,
                                                         Rows<const real> y, const float* lse, Rows<const real> dy,
                                                         Rows<real> dq, float* delta, int heads, int time, float scale,
                                                         unsigned long long seed, unsigned site, unsigned threshold,
                                                         float keep_scale, const int* step) {
  DYNAMIC_SHARED(real, shared);
  real *queries = shared, *dys = shared + TALL * LD, *tiles = shared + 2 * TALL * LD;
  const Head head = head_of(blockIdx.y, heads, time);
  const int block = gridDim.x - 1 - blockIdx.x, from = block * TALL, row = from + tile_warp() * 16;
#if DROPOUT
  const Keep keep = keep_new(seed, *step, site, threshold, keep_scale);
#endif
  load_tile<TALL, HEAD_DIM, VECTOR>(queries, q.row(head.first + from) + head.column, q.stride, time - from);
  load_tile<TALL, HEAD_DIM, VECTOR>(dys, dy.row(head.first + from) + head.column, dy.stride, time - from);
  tiles_ready();
  auto load = [&](int other, int buffer) {
    real* to = tiles + buffer * 2 * WALK * LD;
    load_tile<WALK, HEAD_DIM, VECTOR>(to, k.row(head.first + other) + head.column, k.stride, time - other);
    load_tile<WALK, HEAD_DIM, VECTOR>(to + WALK * LD, v.row(head.first + other) + head.column, v.stride, time - other);
  };
  load(0, 0);
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
  const int end = min(from + TALL, time);
  for (int other = 0, buffer = 0; other < end; other += WALK, buffer ^= 1) {
    const real *keys = tiles + buffer * 2 * WALK * LD, *values = keys + WALK * LD;
    tiles_ready();
    if (other + WALK < end) load(other + WALK, buffer ^ 1);
    float p[WALK / 8][4], dp[WALK / 8][4];
    clear(p);
    clear(dp);
    multiply<WALK, DIM, false, true>(p, queries + tile_warp() * 16 * LD, LD, keys, LD);
    multiply<WALK, DIM, false, true>(dp, dys + tile_warp() * 16 * LD, LD, values, LD);
#pragma unroll
    for (int j = 0; j < WALK / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        p[j][e] = fast_exp2(p[j][e] * (scale * LOG2_E) - shift[e / 2]);
        if (other + WALK > from && other + tile_column(j, e) > row + tile_row(e)) p[j][e] = 0.0f;
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

// Gradients of keys and values. blockIdx: block of keys, (sequence, head). Shared memory: as before,
// and four rows of WALK f32.
KERNEL __launch_bounds__(128, 2) attention_backward_keys(Rows<const real> q, Rows<const real> k, Rows<const real> v,
                                                      const float* lse, Rows<const real> dy, const float* delta,
                                                      Rows<real> dk, Rows<real> dv, int heads, int time, float scale,
                                                      unsigned long long seed, unsigned site, unsigned threshold,
                                                      float keep_scale, const int* step) {
  DYNAMIC_SHARED(real, shared);
  real *keys = shared, *values = shared + TALL * LD, *tiles = shared + 2 * TALL * LD;
  float* rows = reinterpret_cast<float*>(tiles + 4 * WALK * LD);
  const Head head = head_of(blockIdx.y, heads, time);
  const int from = blockIdx.x * TALL, row = from + tile_warp() * 16;
#if DROPOUT
  const Keep keep = keep_new(seed, *step, site, threshold, keep_scale);
#endif
  load_tile<TALL, HEAD_DIM, VECTOR>(keys, k.row(head.first + from) + head.column, k.stride, time - from);
  load_tile<TALL, HEAD_DIM, VECTOR>(values, v.row(head.first + from) + head.column, v.stride, time - from);
  auto load = [&](int other, int buffer) {
    real* to = tiles + buffer * 2 * WALK * LD;
    load_tile<WALK, HEAD_DIM, VECTOR>(to, q.row(head.first + other) + head.column, q.stride, time - other);
    load_tile<WALK, HEAD_DIM, VECTOR>(to + WALK * LD, dy.row(head.first + other) + head.column, dy.stride, time - other);
    if (threadIdx.x < WALK) {
      const bool live = other + (int)threadIdx.x < time;
      float* at = rows + buffer * 2 * WALK + threadIdx.x;
      at[0] = live ? lse[head.pair * time + other + threadIdx.x] * LOG2_E : 0.0f;
      at[WALK] = live ? delta[head.pair * time + other + threadIdx.x] : 0.0f;
    }
  };
  load(from, 0);
  float key_sums[DIM / 8][4], value_sums[DIM / 8][4];
  clear(key_sums);
  clear(value_sums);
  for (int other = from, buffer = 0; other < time; other += WALK, buffer ^= 1) {
    const real *queries = tiles + buffer * 2 * WALK * LD, *dys = queries + WALK * LD;
    const float *shift = rows + buffer * 2 * WALK, *own = shift + WALK;
    tiles_ready();
    if (other + WALK < time) load(other + WALK, buffer ^ 1);
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
        float probability = fast_exp2(p[j][e] * (scale * LOG2_E) - shift[query]);
        if (other < from + TALL && row + tile_row(e) > other + query) probability = 0.0f;
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
