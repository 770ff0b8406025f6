// Retention in its exact form, blocked like attention; formulas in kernels/src/cpu/retention. Weights are
// a_ij = q_i . k_j g^(i - j) / sqrt(g^0 + .. + g^i), results are divided by the clamped sum of |a_ij|, which is a constant for
// the gradient.
#include "common.cuh"
#include "tile.cuh"

// Channels of a head in queries and keys, and in values.
#ifndef KEY_DIM
#define KEY_DIM 64
#endif
#ifndef VALUE_DIM
#define VALUE_DIM 64
#endif
// Elements that are loaded at once.
#ifndef KEY_VECTOR
#define KEY_VECTOR 4
#endif
#ifndef VALUE_VECTOR
#define VALUE_VECTOR 4
#endif

// Elements of values that are loaded at once, and columns from one head to the next there: more than VALUE_DIM where the
// values were copied by pad_values.
#ifndef VALUE_LOAD
#define VALUE_LOAD VALUE_VECTOR
#endif
#ifndef VALUE_STEP
#define VALUE_STEP VALUE_DIM
#endif

constexpr int TALL = 64;
constexpr int KEYS = padded(KEY_DIM), VALUES = padded(VALUE_DIM);
constexpr int LDK = pitch(KEY_DIM), LDV = pitch(VALUE_DIM);
// Rows of the tiles that are walked over in the backward pass.
constexpr int WALK = KEYS + VALUES > 128 ? 32 : 64;

struct Head {
  long long pair, first;
  int keys, values, loaded;
  // ln and log2 of the decay, and 1 - decay
  float log, log2, forgotten;
};
DEVICE Head head_of(int pair, int heads, int time) {
  const int h = pair % heads;
  const float forgotten = exp2f(-5.0f - h), log = log1pf(-forgotten);
  return {pair, (long long)(pair / heads) * time, h * KEY_DIM, h * VALUE_DIM, h * VALUE_STEP, log, log * 1.44269504f, forgotten};
}

// 1 / sqrt(g^0 + .. + g^t)
DEVICE float row_weight(const Head& head, int t) { return rsqrtf(-expm1f((t + 1) * head.log) / head.forgotten); }

// g^n
DEVICE float power(const Head& head, int n) { return fast_exp2(n * head.log2); }

// The first key, a multiple of TALL, of which queries from `from` on still know more than 2^-80.
DEVICE int first_key(const Head& head, int from) {
  const float reach = fminf(-80.0f / head.log2, (float)from);
  return (from - (int)reach) / TALL * TALL;
}

// blockIdx: block of queries, (sequence, head). Shared memory: two tiles of keys' width, one of values'.
KERNEL __launch_bounds__(128) retention_forward(Rows<const real> q, Rows<const real> k, Rows<const real> v, Rows<real> y,
                                                float* normalizer, int heads, int time) {
  DYNAMIC_SHARED(real, shared);
  real *queries = shared, *keys = shared + TALL * LDK, *values = shared + 2 * TALL * LDK;
  const Head head = head_of(blockIdx.y, heads, time);
  const int block = gridDim.x - 1 - blockIdx.x, from = block * TALL, row = from + tile_warp() * 16;
  load_tile<TALL, KEY_DIM, KEY_VECTOR>(queries, q.row(head.first + from) + head.keys, q.stride, time - from);
  float weight[2], sum[2] = {0.0f, 0.0f}, out[VALUES / 8][4];
  for (int i = 0; i < 2; ++i) {
    const int r = row + tile_row(2 * i);
    weight[i] = row_weight(head, r) * power(head, r - from);
  }
  clear(out);
  for (int other = first_key(head, from); other <= from; other += TALL) {
    __syncthreads();
    load_tile<TALL, KEY_DIM, KEY_VECTOR>(keys, k.row(head.first + other) + head.keys, k.stride, time - other);
    load_tile<TALL, VALUE_DIM, VALUE_LOAD>(values, v.row(head.first + other) + head.loaded, v.stride, time - other);
    tiles_ready();
    float a[TALL / 8][4];
    clear(a);
    multiply<TALL, KEYS, false, true>(a, queries + tile_warp() * 16 * LDK, LDK, keys, LDK);
#pragma unroll
    for (int j = 0; j < TALL / 8; ++j)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int key = other + tile_column(j, c);
        const float decay = power(head, from - key);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& x = a[j][2 * i + c];
          x = key <= row + tile_row(2 * i) ? x * (decay * weight[i]) : 0.0f;
          sum[i] += fabsf(x);
        }
      }
    multiply_registers<VALUES, TALL, false>(out, a, values, LDV);
  }
  for (int i = 0; i < 2; ++i) {
    sum[i] = fminf(fmaxf(row_sum(sum[i]), 1.0f), 5e4f);
    const int r = row + tile_row(2 * i);
    if (r < time && tile_lane() % 4 == 0) normalizer[head.pair * time + r] = sum[i];
  }
  real* to = y.row(head.first) + head.values;
  store_tile<VALUE_DIM, VALUE_VECTOR>(to, y.stride, row, time, out, 1.0f / sum[0], 1.0f / sum[1]);
}

// Gradient of the queries. Shared memory: one tile of values' width, and of WALK rows one of keys' and one of values'.
KERNEL __launch_bounds__(128, 2) retention_backward_queries(Rows<const real> k, Rows<const real> v, const float* normalizer,
                                                         Rows<const real> dy, Rows<real> dq, int heads, int time) {
  DYNAMIC_SHARED(real, shared);
  real *dys = shared, *values = shared + TALL * LDV, *keys = values + WALK * LDV;
  const Head head = head_of(blockIdx.y, heads, time);
  const int block = gridDim.x - 1 - blockIdx.x, from = block * TALL, row = from + tile_warp() * 16;
  load_tile<TALL, VALUE_DIM, VALUE_LOAD>(dys, dy.row(head.first + from) + head.loaded, dy.stride, time - from);
  float weight[2], out[KEYS / 8][4];
  for (int i = 0; i < 2; ++i) {
    const int r = row + tile_row(2 * i);
    weight[i] = r < time ? row_weight(head, r) * power(head, r - from) / normalizer[head.pair * time + r] : 0.0f;
  }
  clear(out);
  for (int other = first_key(head, from); other < from + TALL && other < time; other += WALK) {
    __syncthreads();
    load_tile<WALK, KEY_DIM, KEY_VECTOR>(keys, k.row(head.first + other) + head.keys, k.stride, time - other);
    load_tile<WALK, VALUE_DIM, VALUE_LOAD>(values, v.row(head.first + other) + head.loaded, v.stride, time - other);
    tiles_ready();
    float da[WALK / 8][4];
    clear(da);
    multiply<WALK, VALUES, false, true>(da, dys + tile_warp() * 16 * LDV, LDV, values, LDV);
#pragma unroll
    for (int j = 0; j < WALK / 8; ++j)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int key = other + tile_column(j, c);
        const float decay = power(head, from - key);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& x = da[j][2 * i + c];
          x = key <= row + tile_row(2 * i) ? x * (decay * weight[i]) : 0.0f;
        }
      }
    multiply_registers<KEYS, WALK, false>(out, da, keys, LDK);
  }
  store_tile<KEY_DIM, KEY_VECTOR>(dq.row(head.first) + head.keys, dq.stride, row, time, out, 1.0f, 1.0f);
}

// Gradients of keys and values. blockIdx: block of keys, (sequence, head). Shared memory: a tile of each width of TALL rows
// and one of each of WALK rows, and WALK f32.
KERNEL __launch_bounds__(128, 2) retention_backward_keys(Rows<const real> q, Rows<const real> k, Rows<const real> v,
                                                      const float* normalizer, Rows<const real> dy, Rows<real> dk,
                                                      Rows<real> dv, int heads, int time) {
  DYNAMIC_SHARED(real, shared);
  real *keys = shared, *values = keys + TALL * LDK, *queries = values + TALL * LDV, *dys = queries + WALK * LDK;
  float* weight = reinterpret_cast<float*>(dys + WALK * LDV);
  const Head head = head_of(blockIdx.y, heads, time);
  const int from = blockIdx.x * TALL, row = from + tile_warp() * 16;
  load_tile<TALL, KEY_DIM, KEY_VECTOR>(keys, k.row(head.first + from) + head.keys, k.stride, time - from);
  load_tile<TALL, VALUE_DIM, VALUE_LOAD>(values, v.row(head.first + from) + head.loaded, v.stride, time - from);
  float key_sums[KEYS / 8][4], value_sums[VALUES / 8][4];
  clear(key_sums);
  clear(value_sums);
  for (int other = from; other < time && first_key(head, other / TALL * TALL) < from + TALL; other += WALK) {
    __syncthreads();
    load_tile<WALK, KEY_DIM, KEY_VECTOR>(queries, q.row(head.first + other) + head.keys, q.stride, time - other);
    load_tile<WALK, VALUE_DIM, VALUE_LOAD>(dys, dy.row(head.first + other) + head.loaded, dy.stride, time - other);
    for (int i = threadIdx.x; i < WALK; i += blockDim.x) {
      const int r = other + i;
      weight[i] = r < time ? row_weight(head, r) * power(head, r - from) / normalizer[head.pair * time + r] : 0.0f;
    }
    tiles_ready();
    // rows are keys, columns are queries
    float a[WALK / 8][4], da[WALK / 8][4];
    clear(a);
    clear(da);
    multiply<WALK, KEYS, false, true>(a, keys + tile_warp() * 16 * LDK, LDK, queries, LDK);
    multiply<WALK, VALUES, false, true>(da, values + tile_warp() * 16 * LDV, LDV, dys, LDV);
#pragma unroll
    for (int j = 0; j < WALK / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int query = tile_column(j, e), key = row + tile_row(e);
        const float decay = key <= other + query ? weight[query] * power(head, from - key) : 0.0f;
        a[j][e] *= decay;
        da[j][e] *= decay;
      }
    multiply_registers<VALUES, WALK, false>(value_sums, a, dys, LDV);
    multiply_registers<KEYS, WALK, false>(key_sums, da, queries, LDK);
  }
  store_tile<KEY_DIM, KEY_VECTOR>(dk.row(head.first) + head.keys, dk.stride, row, time, key_sums, 1.0f, 1.0f);
  store_tile<VALUE_DIM, VALUE_VECTOR>(dv.row(head.first) + head.values, dv.stride, row, time, value_sums, 1.0f, 1.0f);
}

// Copies values so that each head has VALUE_STEP columns, zeros at the end: rows of an odd number of columns cannot be
// loaded in vectors.
KERNEL pad_values(Rows<const real> x, Rows<real> to) {
  for (long long r = blockIdx.x; r < x.rows; r += gridDim.x)
    for (int i = 2 * threadIdx.x; i < to.cols; i += 2 * blockDim.x) {
      const int c = i % VALUE_STEP;
      const real* from = x.row(r) + i / VALUE_STEP * VALUE_DIM + c;
      const float pair[2] = {c < VALUE_DIM ? to_float(from[0]) : 0.0f, c + 1 < VALUE_DIM ? to_float(from[1]) : 0.0f};
      store_vector<2>(to.row(r) + i, pair);
    }
}
