// Ops that continue a state: further tokens of sequences that are at different positions, each with its state in a slot of a
// pool. What a kernel computes for a sequence depends on that sequence alone; its tokens are taken one after the other. All
// numbers are f32. Formulas in kernels/src/cpu, the contract of sequences in kernels/src/cpu/sequences.rs.
//
// blockIdx.y is the sequence. A slot that is not there or is shared, or too many tokens, are refused.
#include "common.cuh"
#include "real.cuh"

// Width of a convolution.
#ifndef TAPS
#define TAPS 4
#endif
// Whether SiLU is applied to its result.
#ifndef SILU
#define SILU 1
#endif
// Rotation: whether channels 2i and 2i + 1 are a pair, or i and i + D/2.
#ifndef INTERLEAVED
#define INTERLEAVED 0
#endif
// Mix vectors of a token shift; without any, rows are only shifted.
#ifndef MIXES
#define MIXES 4
#endif
// Channels of a head's keys.
#ifndef KEY_DIM
#define KEY_DIM 64
#endif
// Matrix states: 0 for WKV, 1 for retention, 2 for gated linear attention.
#ifndef FORM
#define FORM 0
#endif
// States of a channel of a scan, and whether it is the Longhorn update.
#ifndef STATE
#define STATE 16
#endif
#ifndef LONGHORN
#define LONGHORN 0
#endif

// What tells about the sequences: `batch` numbers each.
struct Sequences {
  const int *slots, *positions, *lengths;
  long long batch, time, pool, limit;
};

// A sequence of the batch; without tokens if it rests.
struct Sequence {
  int slot, position, length;
  long long first;
};

// Sequence blockIdx.y, read by the whole block; `memory` is shared.
DEVICE Sequence sequence(const Sequences* all, Sequence* memory, int* fault) {
  if (threadIdx.x == 0) {
    const int b = blockIdx.y;
    Sequence s = {all->slots[b], all->positions[b], all->lengths[b], b * all->time};
    if (s.length > 0) {
      int reason = s.slot < 0 || s.slot >= all->pool || s.length > all->time || s.position < 0 ? 1 : 0;
      if (!reason && all->limit > 0 && (long long)s.position + s.length > all->limit) reason = 2;
      for (int other = 0; !reason && other < b; ++other)
        if (all->lengths[other] > 0 && all->slots[other] == s.slot) reason = 3;
      if (reason) {
        fault[1] = s.slot;
        fault[2] = s.position;
        fault[3] = s.length;
        __threadfence_system();
        fault[0] = reason;
        s.length = 0;
      }
    }
    *memory = s;
  }
  __syncthreads();
  return *memory;
}

// A convolution over time; window [pool, TAPS - 1, C]: the rows before, oldest first.
KERNEL continue_conv1d(const Sequences* all, Rows<const float> x, const float* weight, const float* bias, float* window,
                       Rows<float> y, int* fault) {
  __shared__ Sequence memory;
  const Sequence s = sequence(all, &memory, fault);
  const int c = blockIdx.x * blockDim.x + threadIdx.x;
  if (c >= x.cols || s.length <= 0) return;
  constexpr int BEFORE = TAPS > 1 ? TAPS - 1 : 1;
  float seen[BEFORE], taps[TAPS];
#pragma unroll
  for (int j = 0; j < TAPS; ++j) taps[j] = weight[(long long)c * TAPS + j];
#pragma unroll
  for (int j = 0; j < TAPS - 1; ++j)
    seen[j] = s.position > 0 ? window[((long long)s.slot * (TAPS - 1) + j) * x.cols + c] : 0.0f;
  for (int t = 0; t < s.length; ++t) {
    const float now = x.row(s.first + t)[c];
    float z = (bias ? bias[c] : 0.0f) + taps[TAPS - 1] * now;
#pragma unroll
    for (int j = 0; j < TAPS - 1; ++j) z += taps[j] * seen[j];
    y.row(s.first + t)[c] = SILU ? z * sigmoid(z) : z;
#pragma unroll
    for (int j = 0; j + 2 < TAPS; ++j) seen[j] = seen[j + 1];
    seen[BEFORE - 1] = now;
  }
#pragma unroll
  for (int j = 0; j < TAPS - 1; ++j) window[((long long)s.slot * (TAPS - 1) + j) * x.cols + c] = seen[j];
}

// Rotation at the sequence's positions, y = scale * rotate(x). A thread has a pair of channels of a token, in all heads.
KERNEL continue_rotary(const Sequences* all, Rows<const float> x, Rows<float> y, int dim, double log2_base, float scale,
                       int* fault) {
  __shared__ Sequence memory;
  const Sequence s = sequence(all, &memory, fault);
  const int half = dim / 2;
  const long long n = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (n >= (long long)s.length * half) return;
  const int t = (int)(n / half), i = (int)(n % half);
  const double exponent = INTERLEAVED ? (double)i / (max(half, 2) - 1) : 2.0 * i / dim;
  double sine, cosine;
  sincos((s.position + t) * exp2(-exponent * log2_base), &sine, &cosine);
  const float co = (float)cosine * scale, si = (float)sine * scale;
  const int at = INTERLEAVED ? 2 * i : i, other = INTERLEAVED ? 1 : half;
  for (int h = at; h < x.cols; h += dim) {
    const float p = x.row(s.first + t)[h], q = x.row(s.first + t)[h + other];
    y.row(s.first + t)[h] = p * co - q * si;
    y.row(s.first + t)[h + other] = q * co + p * si;
  }
}

// A result of a token shift, and its mix vector.
struct Mix {
  Rows<float> y;
  const float* mix;
};

// Token shift; last [pool, C].
KERNEL continue_shift(const Sequences* all, Rows<const float> x, const Mix* mixes, float* last, int* fault) {
  __shared__ Sequence memory;
  const Sequence s = sequence(all, &memory, fault);
  const int c = blockIdx.x * blockDim.x + threadIdx.x;
  if (c >= x.cols || s.length <= 0) return;
  float before = s.position > 0 ? last[(long long)s.slot * x.cols + c] : 0.0f;
  for (int t = 0; t < s.length; ++t) {
    const float now = x.row(s.first + t)[c];
    if (MIXES == 0) mixes[0].y.row(s.first + t)[c] = before;
    for (int j = 0; j < MIXES; ++j) mixes[j].y.row(s.first + t)[c] = now + (before - now) * mixes[j].mix[c];
    before = now;
  }
  last[(long long)s.slot * x.cols + c] = before;
}

// y = the rows of a table at the sequence's positions.
KERNEL continue_positions(const Sequences* all, Rows<const float> table, Rows<float> y, int* fault) {
  __shared__ Sequence memory;
  const Sequence s = sequence(all, &memory, fault);
  const int c = blockIdx.x * blockDim.x + threadIdx.x;
  if (c >= y.cols) return;
  for (int t = 0; t < s.length; ++t) y.row(s.first + t)[c] = table.row(s.position + t)[c];
}

// Appends keys and values to caches [pool, limit, C].
KERNEL append_cache(const Sequences* all, Rows<const float> k, Rows<const float> v, float* keys, float* values, int* fault) {
  __shared__ Sequence memory;
  const Sequence s = sequence(all, &memory, fault);
  const int c = blockIdx.x * blockDim.x + threadIdx.x;
  if (c >= k.cols) return;
  for (int t = 0; t < s.length; ++t) {
    const long long at = ((long long)s.slot * all->limit + s.position + t) * k.cols + c;
    keys[at] = k.row(s.first + t)[c];
    values[at] = v.row(s.first + t)[c];
  }
}

// Attention of the sequence's tokens over its cache. blockIdx: head, sequence, token. Four warps share the positions; the
// lanes of a warp share the channels.
KERNEL __launch_bounds__(128) continue_attention(const Sequences* all, Rows<const float> q, const float* keys,
                                                 const float* values, Rows<float> y, float scale, int* fault) {
  __shared__ Sequence memory;
  __shared__ float tops[4], sums[4], parts[4][KEY_DIM];
  const Sequence s = sequence(all, &memory, fault);
  const int t = blockIdx.z, head = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  if (t >= s.length) return;
  constexpr int PER = (KEY_DIM + 31) / 32;
  float query[PER], sum[PER], top = -INFINITE, total = 0.0f;
#pragma unroll
  for (int i = 0; i < PER; ++i) {
    const int c = lane + 32 * i;
    query[i] = c < KEY_DIM ? q.row(s.first + t)[head * KEY_DIM + c] * scale : 0.0f;
    sum[i] = 0.0f;
  }
  for (int p = warp; p <= s.position + t; p += 4) {
    const long long at = ((long long)s.slot * all->limit + p) * q.cols + head * KEY_DIM;
    float dot = 0.0f;
#pragma unroll
    for (int i = 0; i < PER; ++i) dot += lane + 32 * i < KEY_DIM ? query[i] * keys[at + lane + 32 * i] : 0.0f;
    dot = warp_sum(dot);
    const float next = fmaxf(top, dot), keep = expf(top - next), weight = expf(dot - next);
    total = total * keep + weight;
#pragma unroll
    for (int i = 0; i < PER; ++i)
      sum[i] = sum[i] * keep + (lane + 32 * i < KEY_DIM ? weight * values[at + lane + 32 * i] : 0.0f);
    top = next;
  }
  if (lane == 0) tops[warp] = top, sums[warp] = total;
#pragma unroll
  for (int i = 0; i < PER; ++i)
    if (lane + 32 * i < KEY_DIM) parts[warp][lane + 32 * i] = sum[i];
  __syncthreads();
  const float best = fmaxf(fmaxf(tops[0], tops[1]), fmaxf(tops[2], tops[3]));
  for (int c = threadIdx.x; c < KEY_DIM; c += 128) {
    float above = 0.0f, below = 0.0f;
    for (int w = 0; w < 4; ++w) {
      // a warp without positions has a top of -inf and counts nothing
      const float share = expf(tops[w] - best);
      above += share * parts[w][c];
      below += share * sums[w];
    }
    y.row(s.first + t)[head * KEY_DIM + c] = above / below;
  }
}

// A matrix state [pool, heads, KEY_DIM, values]: WKV, retention or gated linear attention. blockIdx: head, sequence. A thread
// has a column of the state in registers. `gates` are the logarithms of GLA's gates; `decay` and `bonus` belong to WKV.
KERNEL continue_matrix(const Sequences* all, Rows<const float> q, Rows<const float> k, Rows<const float> v,
                       Rows<const float> gates, const float* decay, const float* bonus, float* state, Rows<float> y,
                       int value_dim, float scale, int* fault) {
  __shared__ Sequence memory;
  __shared__ float queries[KEY_DIM], keys[KEY_DIM], keeps[KEY_DIM];
  const Sequence s = sequence(all, &memory, fault);
  if (s.length <= 0) return;
  const int head = blockIdx.x, heads = gridDim.x;
  const double gamma = 1.0 - exp2(-5.0 - head);
  const float w = FORM == 0 ? expf(-expf(decay[head])) : (float)gamma, u = FORM == 0 ? bonus[head] : 0.0f;
  float* own = state + ((long long)s.slot * heads + head) * KEY_DIM * value_dim;
  for (int from = 0; from < value_dim; from += blockDim.x) {
    const int j = from + threadIdx.x;
    float column[KEY_DIM];
#pragma unroll
    for (int i = 0; i < KEY_DIM; ++i) column[i] = s.position > 0 && j < value_dim ? own[(long long)i * value_dim + j] : 0.0f;
    for (int t = 0; t < s.length; ++t) {
      const long long r = s.first + t;
      __syncthreads();
      for (int i = threadIdx.x; i < KEY_DIM; i += blockDim.x) {
        queries[i] = q.row(r)[head * KEY_DIM + i];
        keys[i] = k.row(r)[head * KEY_DIM + i];
        if (FORM == 2) keeps[i] = expf(gates.row(r)[head * KEY_DIM + i]);
      }
      __syncthreads();
      if (j >= value_dim) continue;
      const float value = v.row(r)[head * value_dim + j];
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < KEY_DIM; ++i) {
        const float pair = keys[i] * value;
        if (FORM == 0) {
          sum += queries[i] * (column[i] + u * pair);
          column[i] = w * column[i] + pair;
        } else {
          column[i] = (FORM == 1 ? w : keeps[i]) * column[i] + pair;
          sum += queries[i] * column[i];
        }
      }
      float factor = scale;
      if (FORM == 1) factor = (float)(1.0 / sqrt((1.0 - pow(gamma, s.position + t + 1.0)) / (1.0 - gamma)));
      y.row(r)[head * value_dim + j] = FORM == 0 ? sum : sum * factor;
    }
    if (j < value_dim)
#pragma unroll
      for (int i = 0; i < KEY_DIM; ++i) own[(long long)i * value_dim + j] = column[i];
    __syncthreads();
  }
}

// The selective scan or the Longhorn update; state [pool, STATE, C]. A thread has a channel.
KERNEL continue_scan(const Sequences* all, Rows<const float> u, Rows<const float> step, Rows<const float> keys,
                     Rows<const float> queries, const float* a_log, const float* skip, float* state, Rows<float> y,
                     int* fault) {
  __shared__ Sequence memory;
  const Sequence s = sequence(all, &memory, fault);
  const int c = blockIdx.x * blockDim.x + threadIdx.x;
  if (c >= u.cols || s.length <= 0) return;
  float h[STATE], rates[STATE];
#pragma unroll
  for (int n = 0; n < STATE; ++n) {
    h[n] = s.position > 0 ? state[((long long)s.slot * STATE + n) * u.cols + c] : 0.0f;
    rates[n] = LONGHORN ? 0.0f : -expf(a_log[(long long)c * STATE + n]);
  }
  for (int t = 0; t < s.length; ++t) {
    const float *key = keys.row(s.first + t), *query = queries.row(s.first + t);
    const float input = u.row(s.first + t)[c], raw = step.row(s.first + t)[c];
    float d, sum = skip ? skip[c] * input : 0.0f;
    if (LONGHORN) {
      float squares = 0.0f;
#pragma unroll
      for (int n = 0; n < STATE; ++n) squares += key[n] * key[n];
      d = 1.0f / (1.0f + squares + expf(-raw));
    } else {
      d = raw > 20.0f ? raw : log1pf(expf(raw));
    }
#pragma unroll
    for (int n = 0; n < STATE; ++n) {
      const float keep = LONGHORN ? 1.0f - d * key[n] * key[n] : expf(d * rates[n]);
      h[n] = keep * h[n] + d * input * key[n];
      sum += query[n] * h[n];
    }
    y.row(s.first + t)[c] = sum;
  }
#pragma unroll
  for (int n = 0; n < STATE; ++n) state[((long long)s.slot * STATE + n) * u.cols + c] = h[n];
}
