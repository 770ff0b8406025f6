// Gated linear attention: a decay for each key channel and token; formulas in kernels/src/cpu/gla.rs. A block has a head of a
// sequence and walks through time in chunks of 64 tokens, of which each warp has 16, a sub-block. The state [KEY_DIM,
// VALUE_DIM] stays in registers; that before each chunk is kept for the backward pass.
//
// Gates are logarithms and may be as low as -20, so no exponential of a sum that could be positive is taken, and no sum over
// more than a sub-block is a difference. With P_i the sum of gates from the start of i's sub-block through i, R_j that behind
// j to the end of its sub-block, and T those of whole sub-blocks, the decay from token j to a token i of a later sub-block is
// exp(R_j + T's between + P_i), of which one part is multiplied into the key and one into the query. Within a sub-block it is
// exp(P_i - P_j): where no channel forgets more than e^-40 of it, as the product of exp(P_i) and exp(-P_j), else element by
// element.
#include "common.cuh"
#include "tile.cuh"

// Channels of a head in queries and keys, and in values.
#ifndef KEY_DIM
#define KEY_DIM 32
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

constexpr int TALL = 64, SUB = 16, SUBS = TALL / SUB;
constexpr int KEYS = padded(KEY_DIM), VALUES = padded(VALUE_DIM);
constexpr int LDK = pitch(KEY_DIM), LDV = pitch(VALUE_DIM);
// f32 from one row of sums of gates to the next, and of a square of pairs of tokens.
constexpr int LDG = KEYS + 4, LDS = SUB + 1;
// Largest exponent of a decay that is undone.
constexpr float MOST = 40.0f;

struct Place {
  long long pair, first;
  int keys, values;
};
DEVICE Place place(int heads, int time) {
  const int pair = blockIdx.x;
  return {pair, (long long)(pair / heads) * time, pair % heads * KEY_DIM, pair % heads * VALUE_DIM};
}

// Shared memory that both passes have.
struct Shared {
  float *prefix, *suffix, *total;        // P and R [TALL, LDG], T [SUBS, LDG]
  real *queries, *keys, *values, *state;  // tiles as they are, and the state before the chunk (or its gradient)
  real *scaled;                           // q exp(P) scale
  real *near;                             // for sub-block s: keys of earlier ones with their decay to its start
  real *undone;                           // k exp(-P), where that is a number
  real *rest;
};
DEVICE Shared share(float* memory) {
  Shared s;
  s.prefix = memory;
  s.suffix = s.prefix + TALL * LDG;
  s.total = s.suffix + TALL * LDG;
  s.queries = reinterpret_cast<real*>(s.total + SUBS * LDG);
  s.keys = s.queries + TALL * LDK;
  s.scaled = s.keys + TALL * LDK;
  s.near = s.scaled + TALL * LDK;
  s.undone = s.near + 6 * SUB * LDK;
  s.values = s.undone + TALL * LDK;
  s.state = s.values + TALL * LDV;
  s.rest = s.state + KEYS * LDV;
  return s;
}

// Keys of the sub-blocks before s, as its queries see them.
DEVICE real* near_of(const Shared& s, int sub) { return s.near + sub * (sub - 1) / 2 * SUB * LDK; }

// The sum of T over the sub-blocks from..to.
DEVICE float between(const Shared& s, int from, int to, int d) {
  float sum = 0.0f;
  for (int m = from; m < to; ++m) sum += s.total[m * LDG + d];
  return sum;
}

// Loads a chunk of `count` tokens and prepares the sums of gates, `scaled` and `near`.
DEVICE void load_chunk(const Shared& s, Rows<const real> q, Rows<const real> k, Rows<const real> v, Rows<const real> gates,
                       long long first, const Place& at, int count, float scale) {
  load_tile<TALL, KEY_DIM, KEY_VECTOR>(s.queries, q.row(first) + at.keys, q.stride, count);
  load_tile<TALL, KEY_DIM, KEY_VECTOR>(s.keys, k.row(first) + at.keys, k.stride, count);
  load_tile<TALL, VALUE_DIM, VALUE_VECTOR>(s.values, v.row(first) + at.values, v.stride, count);
  for (int i = threadIdx.x; i < TALL * KEYS; i += blockDim.x) {
    const int t = i / KEYS, d = i % KEYS;
    s.prefix[t * LDG + d] = t < count && d < KEY_DIM ? to_float(gates.row(first + t)[at.keys + d]) : 0.0f;
  }
  tiles_ready();
  for (int i = threadIdx.x; i < SUBS * KEYS; i += blockDim.x) {
    const int sub = i / KEYS, d = i % KEYS;
    float *prefix = s.prefix + sub * SUB * LDG + d, *suffix = s.suffix + sub * SUB * LDG + d, sum = 0.0f;
    for (int t = SUB - 1; t >= 0; --t) {
      suffix[t * LDG] = sum;
      sum += prefix[t * LDG];
    }
    s.total[sub * LDG + d] = sum;
    sum = 0.0f;
    for (int t = 0; t < SUB; ++t) {
      sum += prefix[t * LDG];
      prefix[t * LDG] = sum;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < TALL * KEYS; i += blockDim.x) {
    const int t = i / KEYS, d = i % KEYS;
    store(s.scaled + t * LDK + d, to_float(s.queries[t * LDK + d]) * fast_exp(s.prefix[t * LDG + d]) * scale);
    float decay = s.suffix[t * LDG + d];
    const float key = to_float(s.keys[t * LDK + d]);
    store(s.undone + t * LDK + d, key * fast_exp(fminf(-s.prefix[t * LDG + d], MOST)));
    for (int sub = t / SUB + 1; sub < SUBS; ++sub) {
      store(near_of(s, sub) + t * LDK + d, key * fast_exp(decay));
      decay += s.total[sub * LDG + d];
    }
  }
}

// Whether no channel of the warp's sub-block forgets so much that exp(-P) is too large.
DEVICE bool mild(const Shared& s) {
  bool all = true;
  for (int d = tile_lane(); d < KEYS; d += 32) all = all && s.total[tile_warp() * LDG + d] > -MOST;
  return __all_sync(0xffffffffu, all);
}

// The warp's rows of a state: 16 of every 64.
constexpr int PARTS = (KEY_DIM + 63) / 64;
template <class Body> DEVICE void for_state(Body body) {
#pragma unroll
  for (int p = 0; p < PARTS; ++p)
#pragma unroll
    for (int j = 0; j < VALUES / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) body(p, j, e, p * 64 + tile_warp() * 16 + tile_row(e), tile_column(j, e));
}

// Rows of a state, after a chunk: times the decay through all of it.
DEVICE void decay_state(const Shared& s, float (&state)[PARTS][VALUES / 8][4]) {
#pragma unroll
  for (int p = 0; p < PARTS; ++p)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int d = p * 64 + tile_warp() * 16 + tile_row(2 * i);
      const float decay = d < KEYS ? fast_exp(between(s, 0, SUBS, d)) : 0.0f;
#pragma unroll
      for (int j = 0; j < VALUES / 8; ++j) {
        state[p][j][2 * i] *= decay;
        state[p][j][2 * i + 1] *= decay;
      }
    }
}

// Weights of pairs within the warp's sub-block: sum over d of q_i k_j exp(P_i - P_j), times scale, for j <= i.
DEVICE void diagonal(const Shared& s, float scale, bool is_mild, float (&a)[2][4]) {
  const int first = tile_warp() * SUB;
  clear(a);
  if (is_mild) {
    multiply<SUB, KEYS, false, true>(a, s.scaled + first * LDK, LDK, s.undone + first * LDK, LDK);
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (tile_column(j, e) > tile_row(e)) a[j][e] = 0.0f;
    return;
  }
#pragma unroll 2
  for (int d = 0; d < KEY_DIM; ++d) {
    float query[2], gate[2];
    for (int i = 0; i < 2; ++i) {
      query[i] = to_float(s.queries[(first + tile_row(2 * i)) * LDK + d]) * scale;
      gate[i] = s.prefix[(first + tile_row(2 * i)) * LDG + d];
    }
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int key = tile_column(j, c);
        const float x = to_float(s.keys[(first + key) * LDK + d]), g = s.prefix[(first + key) * LDG + d];
        for (int i = 0; i < 2; ++i)
          if (key <= tile_row(2 * i)) a[j][2 * i + c] += query[i] * x * fast_exp(gate[i] - g);
      }
  }
}

// blockIdx.x: (sequence, head).
KERNEL __launch_bounds__(128) gla_forward(Rows<const real> q, Rows<const real> k, Rows<const real> v,
                                          Rows<const real> gates, Rows<real> y, float* kept, int heads, int time,
                                          float scale) {
  DYNAMIC_SHARED(float, memory);
  const Shared s = share(memory);
  const Place at = place(heads, time);
  const int warp = tile_warp(), row = warp * SUB, chunks = (time + TALL - 1) / TALL;
  float state[PARTS][VALUES / 8][4];
#pragma unroll
  for (int p = 0; p < PARTS; ++p) clear(state[p]);
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const int from = chunk * TALL, count = min(TALL, time - from);
    __syncthreads();
    float* to = kept + (at.pair * chunks + chunk) * KEY_DIM * VALUE_DIM;
    for_state([&](int p, int j, int e, int r, int column) {
      if (r < KEYS) store(s.state + r * LDV + column, state[p][j][e]);
      if (kept && r < KEY_DIM && column < VALUE_DIM) to[r * VALUE_DIM + column] = state[p][j][e];
    });
    load_chunk(s, q, k, v, gates, at.first + from, at, count, scale);
    __syncthreads();
    float a[TALL / 8][4], out[VALUES / 8][4];
    clear(a);
#pragma unroll
    for (int sub = 0; sub < SUBS; ++sub) {
      float(&part)[2][4] = reinterpret_cast<float(&)[2][4]>(a[2 * sub]);
      if (sub < warp)
        multiply<SUB, KEYS, false, true>(part, s.scaled + row * LDK, LDK, near_of(s, warp) + sub * SUB * LDK, LDK);
      else if (sub == warp)
        diagonal(s, scale, mild(s), part);
    }
    __syncwarp();
    // the warp's queries with their decay from the start of the chunk
    for (int i = tile_lane(); i < SUB * KEYS; i += 32) {
      real* x = s.scaled + (row + i / KEYS) * LDK + i % KEYS;
      store(x, to_float(*x) * fast_exp(between(s, 0, warp, i % KEYS)));
    }
    __syncwarp();
    clear(out);
    multiply<VALUES, KEYS, false, false>(out, s.scaled + row * LDK, LDK, s.state, LDV);
    multiply_registers<VALUES, TALL, false>(out, a, s.values, LDV);
    real* result = y.row(at.first + from) + at.values;
    store_tile<VALUE_DIM, VALUE_VECTOR>(result, y.stride, row, count, out, 1.0f, 1.0f);
    if (chunk + 1 == chunks) break;
    __syncthreads();
    for (int i = threadIdx.x; i < TALL * KEYS; i += blockDim.x) {
      const int t = i / KEYS, d = i % KEYS;
      const float decay = fast_exp(s.suffix[t * LDG + d] + between(s, t / SUB + 1, SUBS, d));
      store(s.scaled + t * LDK + d, to_float(s.keys[t * LDK + d]) * decay);
    }
    decay_state(s, state);
    __syncthreads();
#pragma unroll
    for (int p = 0; p < PARTS; ++p)
      if (p * 64 + row < KEYS) multiply<VALUES, TALL, true, false>(state[p], s.scaled + p * 64 + row, LDK, s.values, LDV);
  }
}

// Gradients. More shared memory than the forward pass: a tile of each width, two squares for each warp, KEYS f32.
KERNEL __launch_bounds__(128) gla_backward(Rows<const real> q, Rows<const real> k, Rows<const real> v,
                                           Rows<const real> gates, const float* kept, Rows<const real> dy, Rows<real> dq,
                                           Rows<real> dk, Rows<real> dv, Rows<real> dgates, int heads, int time,
                                           float scale) {
  DYNAMIC_SHARED(float, memory);
  const Shared s = share(memory);
  real *dys = s.rest, *decayed = dys + TALL * LDV;
  float* weights = reinterpret_cast<float*>(decayed + TALL * LDK) + tile_warp() * 2 * SUB * LDS;
  float *cross = weights + SUB * LDS, *through = weights + (SUBS - tile_warp()) * 2 * SUB * LDS;
  const Place at = place(heads, time);
  const int warp = tile_warp(), row = warp * SUB, chunks = (time + TALL - 1) / TALL;
  float gradient[PARTS][VALUES / 8][4];
#pragma unroll
  for (int p = 0; p < PARTS; ++p) clear(gradient[p]);
  for (int chunk = chunks - 1; chunk >= 0; --chunk) {
    const int from = chunk * TALL, count = min(TALL, time - from);
    const float* before = kept + (at.pair * chunks + chunk) * KEY_DIM * VALUE_DIM;
    __syncthreads();
    // the sum over the values of state times gradient, for each key channel
#pragma unroll
    for (int p = 0; p < PARTS; ++p) {
      float sum[2] = {0.0f, 0.0f};
#pragma unroll
      for (int j = 0; j < VALUES / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int r = p * 64 + row + tile_row(e), column = tile_column(j, e);
          const float x = r < KEY_DIM && column < VALUE_DIM ? before[r * VALUE_DIM + column] : 0.0f;
          if (r < KEYS) store(s.state + r * LDV + column, x);
          sum[e / 2] += x * gradient[p][j][e];
        }
      for (int i = 0; i < 2; ++i) {
        sum[i] = row_sum(sum[i]);
        const int r = p * 64 + row + tile_row(2 * i);
        if (tile_lane() % 4 == 0 && r < KEYS) through[r] = sum[i];
      }
    }
    load_chunk(s, q, k, v, gates, at.first + from, at, count, scale);
    load_tile<TALL, VALUE_DIM, VALUE_VECTOR>(dys, dy.row(at.first + from) + at.values, dy.stride, count);
    tiles_ready();
    for (int i = threadIdx.x; i < TALL * KEYS; i += blockDim.x) {
      const int t = i / KEYS, d = i % KEYS;
      const float decay = fast_exp(s.suffix[t * LDG + d] + between(s, t / SUB + 1, SUBS, d));
      store(decayed + t * LDK + d, to_float(s.keys[t * LDK + d]) * decay);
    }
    const bool is_mild = mild(s);
    // what gates at tokens up to a query's (from a key's on, minus) receive
    float later[KEYS / 8][4];
    {
      // rows are queries
      float out[KEYS / 8][4], da[TALL / 8][4], inner[KEYS / 8][4];
      clear(out);
      clear(inner);
      clear(da);
      multiply<KEYS, VALUES, false, true>(out, dys + row * LDV, LDV, s.state, LDV);
      multiply<TALL, VALUES, false, true>(da, dys + row * LDV, LDV, s.values, LDV);
#pragma unroll
      for (int sub = 0; sub < SUBS; ++sub) {
        float(&part)[2][4] = reinterpret_cast<float(&)[2][4]>(da[2 * sub]);
        if (sub < warp) {
          multiply_registers<KEYS, SUB, false>(inner, part, near_of(s, warp) + sub * SUB * LDK, LDK);
        } else if (sub == warp) {
          float a[2][4];
          diagonal(s, scale, is_mild, a);
#pragma unroll
          for (int j = 0; j < 2; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              weights[tile_row(e) * LDS + tile_column(j, e)] = a[j][e];
              cross[tile_row(e) * LDS + tile_column(j, e)] = part[j][e];
              if (tile_column(j, e) >= tile_row(e)) part[j][e] = 0.0f;
            }
          if (is_mild) multiply_registers<KEYS, SUB, false>(inner, part, s.undone + row * LDK, LDK);
        }
      }
      __syncwarp();
#pragma unroll
      for (int j = 0; j < KEYS / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int i = tile_row(e), d = tile_column(j, e);
          const float gate = s.prefix[(row + i) * LDG + d], decay = fast_exp(gate) * scale;
          float x = out[j][e] * decay * fast_exp(between(s, 0, warp, d)) + inner[j][e] * decay;
          for (int key = 0; key < i && !is_mild; ++key) {
            const float other = to_float(s.keys[(row + key) * LDK + d]) * fast_exp(gate - s.prefix[(row + key) * LDG + d]);
            x += cross[i * LDS + key] * other * scale;
          }
          later[j][e] = x * to_float(s.queries[(row + i) * LDK + d]);
          out[j][e] = x + cross[i * LDS + i] * to_float(s.keys[(row + i) * LDK + d]) * scale;
        }
      store_tile<KEY_DIM, KEY_VECTOR>(dq.row(at.first + from) + at.keys, dq.stride, row, count, out, 1.0f, 1.0f);
    }
    __syncthreads();
    for_state([&](int p, int j, int e, int r, int column) {
      if (r < KEYS) store(s.state + r * LDV + column, gradient[p][j][e]);
    });
    __syncthreads();
    float earlier[KEYS / 8][4];
    {
      // rows are keys
      float a[TALL / 8][4], da[TALL / 8][4], out[KEYS / 8][4], values[VALUES / 8][4];
      clear(a);
      clear(da);
      clear(earlier);
      clear(values);
      multiply<KEYS, VALUES, false, true>(earlier, s.values + row * LDV, LDV, s.state, LDV);
      multiply<VALUES, KEYS, false, false>(values, decayed + row * LDK, LDK, s.state, LDV);
      multiply<TALL, VALUES, false, true>(da, s.values + row * LDV, LDV, dys, LDV);
      clear(out);
      float close[KEYS / 8][4];
      clear(close);
#pragma unroll
      for (int sub = 0; sub < SUBS; ++sub) {
        float(&part)[2][4] = reinterpret_cast<float(&)[2][4]>(a[2 * sub]);
        float(&dpart)[2][4] = reinterpret_cast<float(&)[2][4]>(da[2 * sub]);
        if (sub > warp) {
          multiply<SUB, KEYS, false, true>(part, near_of(s, sub) + row * LDK, LDK, s.scaled + sub * SUB * LDK, LDK);
          float here[KEYS / 8][4];
          clear(here);
          multiply_registers<KEYS, SUB, false>(here, dpart, s.scaled + sub * SUB * LDK, LDK);
#pragma unroll
          for (int j = 0; j < KEYS / 8; ++j)
#pragma unroll
            for (int c = 0; c < 2; ++c) {
              const float decay = fast_exp(between(s, warp + 1, sub, tile_column(j, c)));
              out[j][c] += here[j][c] * decay;
              out[j][2 + c] += here[j][2 + c] * decay;
            }
        } else if (sub == warp) {
#pragma unroll
          for (int j = 0; j < 2; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              part[j][e] = weights[tile_column(j, e) * LDS + tile_row(e)];
              if (tile_column(j, e) <= tile_row(e)) dpart[j][e] = 0.0f;
            }
          if (is_mild) multiply_registers<KEYS, SUB, false>(close, dpart, s.scaled + row * LDK, LDK);
        }
      }
      multiply_registers<VALUES, TALL, false>(values, a, dys, LDV);
      store_tile<VALUE_DIM, VALUE_VECTOR>(dv.row(at.first + from) + at.values, dv.stride, row, count, values, 1.0f, 1.0f);
#pragma unroll
      for (int j = 0; j < KEYS / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int key = tile_row(e), d = tile_column(j, e);
          const float gate = s.prefix[(row + key) * LDG + d], to_end = s.suffix[(row + key) * LDG + d];
          float x = out[j][e] * fast_exp(to_end);
          if (is_mild) x += close[j][e] * fast_exp(-gate);
          for (int i = key + 1; i < SUB && !is_mild; ++i) {
            const float other = to_float(s.queries[(row + i) * LDK + d]) * fast_exp(s.prefix[(row + i) * LDG + d] - gate);
            x += cross[i * LDS + key] * other * scale;
          }
          const float own = to_float(s.keys[(row + key) * LDK + d]);
          later[j][e] -= x * own;
          const float passed = earlier[j][e] * fast_exp(to_end + between(s, warp + 1, SUBS, d));
          earlier[j][e] = passed * own;
          out[j][e] = x + passed + cross[key * LDS + key] * to_float(s.queries[(row + key) * LDK + d]) * scale;
        }
      store_tile<KEY_DIM, KEY_VECTOR>(dk.row(at.first + from) + at.keys, dk.stride, row, count, out, 1.0f, 1.0f);
    }
    decay_state(s, gradient);
    __syncthreads();
    // queries with their decay from the start of the chunk; and sums of gates give way to what gates receive
    for (int i = threadIdx.x; i < TALL * KEYS; i += blockDim.x) {
      const int t = i / KEYS, d = i % KEYS;
      real* x = s.scaled + t * LDK + d;
      store(x, to_float(*x) * fast_exp(between(s, 0, t / SUB, d)));
    }
#pragma unroll
    for (int j = 0; j < KEYS / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        s.prefix[(row + tile_row(e)) * LDG + tile_column(j, e)] = later[j][e];
        s.suffix[(row + tile_row(e)) * LDG + tile_column(j, e)] = earlier[j][e];
      }
    __syncthreads();
    for (int d = threadIdx.x; d < KEY_DIM; d += blockDim.x) {
      float sum = through[d] * fast_exp(between(s, 0, SUBS, d));
      for (int t = count - 1; t >= 0; --t) {
        sum += s.prefix[t * LDG + d];
        s.prefix[t * LDG + d] = sum;
      }
      sum = 0.0f;
      for (int t = 0; t < count; ++t) {
        store(dgates.row(at.first + from + t) + at.keys + d, s.prefix[t * LDG + d] + sum);
        sum += s.suffix[t * LDG + d];
      }
    }
    if (chunk == 0) break;
#pragma unroll
    for (int p = 0; p < PARTS; ++p)
      if (p * 64 + row < KEYS) multiply<VALUES, TALL, true, false>(gradient[p], s.scaled + p * 64 + row, LDK, dys, LDV);
  }
}
