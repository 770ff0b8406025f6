// Linear attention with one decay for each head: RWKV's WKV operator and retention without row normaliser; formulas in
// kernels/src/cpu/wkv.rs and retention. A block has a head of a sequence and walks through time in chunks of 64 tokens: pairs
// of tokens within a chunk are products of tiles, the rest passes through a state [KEY_DIM, VALUE_DIM], which stays in
// registers. The state before each chunk is kept for the backward pass, which walks the other way.
//
// With w the decay, i and j tokens of a chunk of c, and LAG 1 for WKV and 0 for retention:
//   y_i = weight_i (sum over j < i + 1 - LAG of w^(i - j - LAG) (q_i . k_j) v_j + w^(i + 1 - LAG) q_i S), with u (q_i . k_i) v_i for WKV
//   S'  = w^c S + sum over j of w^(c - 1 - j) k_j^T v_j
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
// The WKV operator, or retention.
#ifndef WKV
#define WKV 1
#endif

constexpr int TALL = 64;
constexpr int KEYS = padded(KEY_DIM), VALUES = padded(VALUE_DIM);
constexpr int LDK = pitch(KEY_DIM), LDV = pitch(VALUE_DIM);
constexpr int LAG = WKV;
// Blocks of 64 rows of the state: a warp has 16 of each.
constexpr int PARTS = (KEY_DIM + 63) / 64;

struct Head {
  long long pair, first;
  int keys, values;
  // 1 - decay and ln of the decay for retention; the bonus and -d ln(decay) / d parameter for WKV
  float forgotten, log, bonus, rate;
  // w^n for n up to TALL, in shared memory
  const float* powers;
};
DEVICE Head head_of(int pair, int heads, int time, const float* time_decay, const float* time_faaaa, float* powers) {
  const int h = pair % heads;
  Head head = {pair, (long long)(pair / heads) * time, h * KEY_DIM, h * VALUE_DIM, 0.0f, 0.0f, 0.0f, 0.0f, powers};
  float log2;
  if (WKV) {
    head.rate = expf(time_decay[h]);
    log2 = -head.rate * 1.44269504f;
    head.bonus = time_faaaa[h];
  } else {
    head.forgotten = exp2f(-5.0f - h);
    head.log = log1pf(-head.forgotten);
    log2 = head.log * 1.44269504f;
  }
  // w may be 0
  for (int n = threadIdx.x; n <= TALL; n += blockDim.x) powers[n] = n ? exp2f(n * log2) : 1.0f;
  __syncthreads();
  return head;
}

// w^n, 0 <= n <= TALL
DEVICE float power(const Head& head, int n) { return head.powers[n]; }

// Weight of the result of token t.
DEVICE float row_weight(const Head& head, int t) {
  return WKV ? 1.0f : rsqrtf(-expm1f((t + 1) * head.log) / head.forgotten);
}

// Weight of a pair of tokens of a chunk.
DEVICE float pair_weight(const Head& head, int i, int j) {
  return j < i + 1 - LAG ? power(head, i - j - LAG) : WKV && i == j ? head.bonus : 0.0f;
}

// The warp's rows of a state in memory of VALUE_DIM columns: before a chunk.
template <class Body> DEVICE void for_state(Body body) {
#pragma unroll
  for (int p = 0; p < PARTS; ++p)
#pragma unroll
    for (int j = 0; j < VALUES / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = p * 64 + tile_warp() * 16 + tile_row(e), column = tile_column(j, e);
        body(p, j, e, row, column);
      }
}

// Rounds a state to an operand in shared memory [padded rows, LDV].
DEVICE void share_state(real* to, const float (&state)[PARTS][VALUES / 8][4]) {
  for_state([&](int p, int j, int e, int row, int column) {
    if (row < KEYS) store(to + row * LDV + column, state[p][j][e]);
  });
}

// Row r of a tile, times a weight.
template <int COLS, class Weight> DEVICE void scale_rows(real* tile, Weight weight) {
  constexpr int LD = pitch(COLS);
  for (int i = threadIdx.x; i < TALL * padded(COLS); i += blockDim.x) {
    const int r = i / padded(COLS), c = i % padded(COLS);
    store(tile + r * LD + c, to_float(tile[r * LD + c]) * weight(r));
  }
}

// blockIdx.x: (sequence, head). Shared memory: two tiles of keys' width, one of values', a state, and TALL + 1 f32.
KERNEL __launch_bounds__(128) decay_forward(Rows<const real> q, Rows<const real> k, Rows<const real> v,
                                            const float* time_decay, const float* time_faaaa, Rows<real> y, float* kept,
                                            int heads, int time) {
  DYNAMIC_SHARED(real, shared);
  real *queries = shared, *keys = queries + TALL * LDK, *values = keys + TALL * LDK, *before = values + TALL * LDV;
  float* powers = reinterpret_cast<float*>(before + KEYS * LDV);
  const Head head = head_of(blockIdx.x, heads, time, time_decay, time_faaaa, powers);
  const int row = tile_warp() * 16, chunks = (time + TALL - 1) / TALL;
  float state[PARTS][VALUES / 8][4];
#pragma unroll
  for (int p = 0; p < PARTS; ++p) clear(state[p]);
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const int from = chunk * TALL, count = min(TALL, time - from);
    __syncthreads();
    load_tile<TALL, KEY_DIM, KEY_VECTOR>(queries, q.row(head.first + from) + head.keys, q.stride, count);
    load_tile<TALL, KEY_DIM, KEY_VECTOR>(keys, k.row(head.first + from) + head.keys, k.stride, count);
    load_tile<TALL, VALUE_DIM, VALUE_VECTOR>(values, v.row(head.first + from) + head.values, v.stride, count);
    share_state(before, state);
    if (kept) {
      float* to = kept + (head.pair * chunks + chunk) * KEY_DIM * VALUE_DIM;
      for_state([&](int p, int j, int e, int r, int column) {
        if (r < KEY_DIM && column < VALUE_DIM) to[r * VALUE_DIM + column] = state[p][j][e];
      });
    }
    tiles_ready();
    float a[TALL / 8][4], out[VALUES / 8][4];
    clear(out);
    multiply<VALUES, KEYS, false, false>(out, queries + row * LDK, LDK, before, LDV);
    const float factor[2] = {power(head, row + tile_row(0) + 1 - LAG), power(head, row + tile_row(2) + 1 - LAG)};
#pragma unroll
    for (int j = 0; j < VALUES / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) out[j][e] *= factor[e / 2];
    clear(a);
    multiply<TALL, KEYS, false, true>(a, queries + row * LDK, LDK, keys, LDK);
#pragma unroll
    for (int j = 0; j < TALL / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) a[j][e] *= pair_weight(head, row + tile_row(e), tile_column(j, e));
    multiply_registers<VALUES, TALL, false>(out, a, values, LDV);
    const float low = row_weight(head, from + row + tile_row(0)), high = row_weight(head, from + row + tile_row(2));
    real* to = y.row(head.first + from) + head.values;
    store_tile<VALUE_DIM, VALUE_VECTOR>(to, y.stride, row, count, out, low, high);
    if (chunk + 1 == chunks) break;
    __syncthreads();
    scale_rows<KEY_DIM>(keys, [&](int j) { return j < count ? power(head, count - 1 - j) : 0.0f; });
    const float decay = power(head, count);
    for_state([&](int p, int j, int e, int, int) { state[p][j][e] *= decay; });
    __syncthreads();
#pragma unroll
    for (int p = 0; p < PARTS; ++p)
      if (p * 64 + row < KEYS) multiply<VALUES, TALL, true, false>(state[p], keys + p * 64 + row, LDK, values, LDV);
  }
}

// Gradients; sums [sequences, 2 heads]: of time_decay, then of time_faaaa. Shared memory: two tiles of each width, a
// state, and TALL + 1 f32.
KERNEL __launch_bounds__(128) decay_backward(Rows<const real> q, Rows<const real> k, Rows<const real> v,
                                             const float* time_decay, const float* time_faaaa, const float* kept,
                                             Rows<const real> dy, Rows<real> dq, Rows<real> dk, Rows<real> dv, float* sums,
                                             int heads, int time) {
  DYNAMIC_SHARED(real, shared);
  real *queries = shared, *keys = queries + TALL * LDK, *values = keys + TALL * LDK, *dys = values + TALL * LDV;
  real* state = dys + TALL * LDV;
  float* powers = reinterpret_cast<float*>(state + KEYS * LDV);
  const Head head = head_of(blockIdx.x, heads, time, time_decay, time_faaaa, powers);
  const int row = tile_warp() * 16, chunks = (time + TALL - 1) / TALL;
  float gradient[PARTS][VALUES / 8][4], decay_sum = 0.0f, bonus_sum = 0.0f;
#pragma unroll
  for (int p = 0; p < PARTS; ++p) clear(gradient[p]);
  for (int chunk = chunks - 1; chunk >= 0; --chunk) {
    const int from = chunk * TALL, count = min(TALL, time - from);
    const float* before = kept + (head.pair * chunks + chunk) * KEY_DIM * VALUE_DIM;
    __syncthreads();
    load_tile<TALL, KEY_DIM, KEY_VECTOR>(queries, q.row(head.first + from) + head.keys, q.stride, count);
    load_tile<TALL, KEY_DIM, KEY_VECTOR>(keys, k.row(head.first + from) + head.keys, k.stride, count);
    load_tile<TALL, VALUE_DIM, VALUE_VECTOR>(values, v.row(head.first + from) + head.values, v.stride, count);
    load_tile<TALL, VALUE_DIM, VALUE_VECTOR>(dys, dy.row(head.first + from) + head.values, dy.stride, count);
    const float whole = power(head, count);
    float through = 0.0f;
    for_state([&](int p, int j, int e, int r, int column) {
      const float x = r < KEY_DIM && column < VALUE_DIM ? before[r * VALUE_DIM + column] : 0.0f;
      if (r < KEYS) store(state + r * LDV + column, x);
      through += x * gradient[p][j][e];
    });
    if (WKV) decay_sum += through * whole * count;
    tiles_ready();
    {
      // rows are queries
      float out[KEYS / 8][4], da[TALL / 8][4];
      clear(out);
      clear(da);
      multiply<KEYS, VALUES, false, true>(out, dys + row * LDV, LDV, state, LDV);
      const float factor[2] = {power(head, row + tile_row(0) + 1 - LAG), power(head, row + tile_row(2) + 1 - LAG)};
#pragma unroll
      for (int j = 0; j < KEYS / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int i = row + tile_row(e);
          out[j][e] *= factor[e / 2];
          if (WKV) decay_sum += i * out[j][e] * to_float(queries[i * LDK + tile_column(j, e)]);
        }
      multiply<TALL, VALUES, false, true>(da, dys + row * LDV, LDV, values, LDV);
#pragma unroll
      for (int j = 0; j < TALL / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) da[j][e] *= pair_weight(head, row + tile_row(e), tile_column(j, e));
      multiply_registers<KEYS, TALL, false>(out, da, keys, LDK);
      const float low = row_weight(head, from + row + tile_row(0)), high = row_weight(head, from + row + tile_row(2));
      store_tile<KEY_DIM, KEY_VECTOR>(dq.row(head.first + from) + head.keys, dq.stride, row, count, out, low, high);
    }
    __syncthreads();
    share_state(state, gradient);
    // from here on gradients of results include their weights
    if (!WKV) scale_rows<VALUE_DIM>(dys, [&](int i) { return row_weight(head, from + i); });
    __syncthreads();
    {
      // rows are keys
      float a[TALL / 8][4], da[TALL / 8][4], key_sums[KEYS / 8][4], value_sums[VALUES / 8][4];
      clear(key_sums);
      clear(value_sums);
      multiply<KEYS, VALUES, false, true>(key_sums, values + row * LDV, LDV, state, LDV);
      multiply<VALUES, KEYS, false, false>(value_sums, keys + row * LDK, LDK, state, LDV);
      float factor[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int j = row + tile_row(2 * i);
        factor[i] = j < count ? power(head, count - 1 - j) : 0.0f;
      }
#pragma unroll
      for (int j = 0; j < KEYS / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int key = row + tile_row(e);
          key_sums[j][e] *= factor[e / 2];
          if (WKV) decay_sum += (count - 1 - key) * key_sums[j][e] * to_float(keys[key * LDK + tile_column(j, e)]);
        }
#pragma unroll
      for (int j = 0; j < VALUES / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) value_sums[j][e] *= factor[e / 2];
      clear(a);
      clear(da);
      multiply<TALL, KEYS, false, true>(a, keys + row * LDK, LDK, queries, LDK);
      multiply<TALL, VALUES, false, true>(da, values + row * LDV, LDV, dys, LDV);
#pragma unroll
      for (int j = 0; j < TALL / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int i = tile_column(j, e), key = row + tile_row(e);
          const float weight = pair_weight(head, i, key);
          if (WKV) {
            const float product = a[j][e] * da[j][e];
            if (key < i) decay_sum += (i - key - 1) * weight * product;
            if (key == i) bonus_sum += product;
          }
          a[j][e] *= weight;
          da[j][e] *= weight;
        }
      multiply_registers<KEYS, TALL, false>(key_sums, da, queries, LDK);
      multiply_registers<VALUES, TALL, false>(value_sums, a, dys, LDV);
      store_tile<KEY_DIM, KEY_VECTOR>(dk.row(head.first + from) + head.keys, dk.stride, row, count, key_sums, 1.0f, 1.0f);
      store_tile<VALUE_DIM, VALUE_VECTOR>(dv.row(head.first + from) + head.values, dv.stride, row, count, value_sums, 1.0f, 1.0f);
    }
    if (chunk == 0) break;
    __syncthreads();
    scale_rows<KEY_DIM>(queries, [&](int i) { return power(head, i + 1 - LAG); });
    for_state([&](int p, int j, int e, int, int) { gradient[p][j][e] *= whole; });
    __syncthreads();
#pragma unroll
    for (int p = 0; p < PARTS; ++p)
      if (p * 64 + row < KEYS) multiply<VALUES, TALL, true, false>(gradient[p], queries + p * 64 + row, LDK, dys, LDV);
  }
  if (WKV) {
    __syncthreads();
    float* scratch = reinterpret_cast<float*>(shared);
    decay_sum = block_sum(decay_sum, scratch);
    bonus_sum = block_sum(bonus_sum, scratch);
    if (threadIdx.x == 0) {
      float* to = sums + head.pair / heads * 2 * heads + head.pair % heads;
      // where the rate is infinite, nothing is left that could change
      to[0] = decay_sum == 0.0f ? 0.0f : -head.rate * decay_sum;
      to[heads] = bonus_sum;
    }
  }
}
