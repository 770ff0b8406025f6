// Scans with a diagonal state for every channel: Mamba's selective scan and the Longhorn update; formulas in
// kernels/src/cpu/selective_scan.rs and longhorn.rs. A block has CHANNELS channels of a sequence and walks through time in
// chunks of CHUNK rows. What belongs to a row and channel alone (step sizes, gates) is prepared in shared memory by all
// threads; the recurrence then runs in registers, the states of a channel split over neighbouring lanes. Only the state
// before each chunk is kept, and the backward pass computes the states of a chunk again from it.
#include "common.cuh"
#include "real.cuh"

// States of a channel.
#ifndef STATE
#define STATE 16
#endif
// The Longhorn update, or the selective scan.
#ifndef LONGHORN
#define LONGHORN 0
#endif
// Whether the result is multiplied by silu(z).
#ifndef GATED
#define GATED 1
#endif
// Lanes that share the states of a channel: 1, 2, 4, .. 32.
#ifndef SPLIT
#define SPLIT 4
#endif

constexpr int CHUNK = 32, CHANNELS = 64;
constexpr int THREADS = CHANNELS * SPLIT;
// States of a lane, and of all lanes of a channel.
constexpr int PER = (STATE + SPLIT - 1) / SPLIT, ALL = PER * SPLIT;
// Elements of a chunk that a thread prepares.
constexpr int OWN = CHUNK * CHANNELS / THREADS;
constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;

// What a chunk reads, prepared.
struct Prepared {
  float first[CHUNK][CHANNELS];   // e; or the step size d
  float second[CHUNK][CHANNELS];  // e u; or d u. Later: results
  float keys[CHUNK][ALL], queries[CHUNK][ALL];
  float squares[CHUNK];
};

// (first, slope) of a step size; slope is what the gradient of the step size needs.
DEVICE float2 prepare(float step, float squares) {
#if LONGHORN
  const float exp = expf(-step), e = 1.0f / (1.0f + squares + exp);
  return make_float2(e, e * exp);
#else
  return make_float2(step > 20.0f ? step : log1pf(expf(step)), sigmoid(step));
#endif
}

// The state after a row; `aside` receives what the gradient needs of it: rho = e u - e k h; or exp(d A).
DEVICE float advance(float h, float first, float second, float key, float rate, float& aside) {
#if LONGHORN
  aside = second - first * key * h;
  return h + key * aside;
#else
  aside = exp2f(first * rate);
  return aside * h + second * key;
#endif
}

struct Place {
  int channel, part, sequence, first_channel, channels;
  long long rows;
};
DEVICE Place place(int channels, int time) {
  const int first = blockIdx.x * CHANNELS, lane = threadIdx.x;
  return {lane / SPLIT, lane % SPLIT, (int)blockIdx.y, first, min(CHANNELS, channels - first),
          (long long)blockIdx.y * time};
}

// Keys and queries of a chunk, zeros where there are none, and |k|^2 of each row.
DEVICE void load_states(Prepared& s, Rows<const real> keys, Rows<const real> queries, long long first, int rows) {
  for (int i = threadIdx.x; i < CHUNK * ALL; i += THREADS) {
    const int r = i / ALL, n = i % ALL;
    const bool live = r < rows && n < STATE;
    s.keys[r][n] = live ? to_float(keys.row(first + r)[n]) : 0.0f;
    s.queries[r][n] = live ? to_float(queries.row(first + r)[n]) : 0.0f;
  }
#if LONGHORN
  __syncthreads();
  for (int r = threadIdx.x; r < CHUNK; r += THREADS) {
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < ALL; ++n) sum += s.keys[r][n] * s.keys[r][n];
    s.squares[r] = sum;
  }
  __syncthreads();
#endif
}

// The rates A log2(e) of a thread's states.
DEVICE void load_rates(float (&rates)[PER], const float* a_log, const Place& at) {
#pragma unroll
  for (int i = 0; i < PER; ++i) {
    const int n = at.part * PER + i;
    const bool live = !LONGHORN && at.channel < at.channels && n < STATE;
    rates[i] = live ? -expf(a_log[(long long)(at.first_channel + at.channel) * STATE + n]) * LOG2_E : 0.0f;
  }
}

// Where the state of a channel before a chunk is kept: [sequence, chunk, state, channel].
DEVICE long long kept_at(const Place& at, int chunk, int chunks, int n, int channels) {
  return (((long long)at.sequence * chunks + chunk) * STATE + n) * channels + at.first_channel + at.channel;
}

DEVICE float sum_parts(float x) {
#pragma unroll
  for (int o = SPLIT / 2; o > 0; o >>= 1) x += __shfl_xor_sync(0xffffffffu, x, o);
  return x;
}

// blockIdx: channels, sequence.
KERNEL __launch_bounds__(THREADS) scan_forward(Rows<const real> u, Rows<const real> step, Rows<const real> keys,
                                               Rows<const real> queries, const float* a_log, const float* skip,
                                               Rows<const real> gate, Rows<real> y, float* kept, int time) {
  DYNAMIC_SHARED(Prepared, shared);
  Prepared& s = *shared;
  const Place at = place(u.cols, time);
  const int chunks = (time + CHUNK - 1) / CHUNK;
  float h[PER], rates[PER];
  load_rates(rates, a_log, at);
#pragma unroll
  for (int i = 0; i < PER; ++i) h[i] = 0.0f;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const long long first = at.rows + chunk * CHUNK;
    const int rows = min(CHUNK, time - chunk * CHUNK);
    float input[OWN];
    __syncthreads();
    load_states(s, keys, queries, first, rows);
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
      const int r = (i * THREADS + threadIdx.x) / CHANNELS, c = (i * THREADS + threadIdx.x) % CHANNELS;
      const bool live = r < rows && c < at.channels;
      input[i] = live ? to_float(u.row(first + r)[at.first_channel + c]) : 0.0f;
      const float d = live ? prepare(to_float(step.row(first + r)[at.first_channel + c]), s.squares[r]).x : 0.0f;
      s.first[r][c] = d;
      s.second[r][c] = d * input[i];
    }
    if (kept && at.channel < at.channels)
#pragma unroll
      for (int i = 0; i < PER; ++i) {
        const int n = at.part * PER + i;
        if (n < STATE) kept[kept_at(at, chunk, chunks, n, u.cols)] = h[i];
      }
    __syncthreads();
    for (int r = 0; r < rows; ++r) {
      const float a = s.first[r][at.channel], b = s.second[r][at.channel];
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < PER; ++i) {
        float aside;
        h[i] = advance(h[i], a, b, s.keys[r][at.part * PER + i], rates[i], aside);
        sum += s.queries[r][at.part * PER + i] * h[i];
      }
      sum = sum_parts(sum);
      __syncwarp();
      // the lanes of the channel have read what this replaces
      if (at.part == 0) s.second[r][at.channel] = sum;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
      const int r = (i * THREADS + threadIdx.x) / CHANNELS, c = (i * THREADS + threadIdx.x) % CHANNELS;
      if (r < rows && c < at.channels) {
        float out = s.second[r][c] + (skip ? skip[at.first_channel + c] * input[i] : 0.0f);
#if GATED
        const float z = to_float(gate.row(first + r)[at.first_channel + c]);
        out *= z * sigmoid(z);
#endif
        store(y.row(first + r) + at.first_channel + c, out);
      }
    }
  }
}

// Rows whose states the backward pass has in registers at once.
constexpr int RUN = LONGHORN ? 8 : 4;
constexpr int RUNS = CHUNK / RUN;
constexpr int WARPS = THREADS / 32;

struct Backward {
  Prepared prepared;
  float dy[CHUNK][CHANNELS];   // gradient of what the gate multiplies
  float out[CHUNK][CHANNELS];  // q . h
  float pairs[WARPS][CHUNK][2 * ALL];
  float squares[CHUNK][CHANNELS / 32];
};

// Sums x[i] over the channels of a warp, for the state of each lane's part: every lane has all sums of its part.
template <int N> DEVICE void sum_channels(float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i)
#pragma unroll
    for (int o = SPLIT; o < 32; o <<= 1) x[i] += __shfl_xor_sync(0xffffffffu, x[i], o);
}

// As sum_channels, of four values in fewer steps: the lanes halve the values among themselves, and lane group g (of the
// channel) ends with value g % 4.
DEVICE float sum_four(const float (&x)[4], int channel) {
  const bool high = channel & 1, upper = channel & 2;
  const float a = (high ? x[1] : x[0]) + __shfl_xor_sync(0xffffffffu, high ? x[0] : x[1], SPLIT);
  const float b = (high ? x[3] : x[2]) + __shfl_xor_sync(0xffffffffu, high ? x[2] : x[3], SPLIT);
  float c = (upper ? b : a) + __shfl_xor_sync(0xffffffffu, upper ? a : b, 2 * SPLIT);
#pragma unroll
  for (int o = 4 * SPLIT; o < 32; o <<= 1) c += __shfl_xor_sync(0xffffffffu, c, o);
  return c;
}

// Writes the sums over a warp's channels to `to`, which has the states of all parts.
template <int N> DEVICE void write_sums(float (&x)[N], float* to, const Place& at) {
  if constexpr (N == 4 && 4 * SPLIT <= 32) {
    const float sum = sum_four(x, at.channel);
    if (threadIdx.x % 32 < 4 * SPLIT) to[at.part * N + at.channel % 4] = sum;
  } else {
    sum_channels(x);
    if (threadIdx.x % 32 < SPLIT)
#pragma unroll
      for (int i = 0; i < N; ++i) to[at.part * N + i] = x[i];
  }
}

// Gradients. dpairs [groups of channels, rows, 2 STATE]: those of queries and keys, summed over the block's channels;
// dskip [sequences, channels] and drates [sequences, channels * STATE]: summed over time. blockIdx: channels, sequence.
KERNEL __launch_bounds__(THREADS) scan_backward(Rows<const real> u, Rows<const real> step, Rows<const real> keys,
                                                Rows<const real> queries, const float* a_log, const float* skip,
                                                Rows<const real> gate, const float* kept, Rows<const real> dy, Rows<real> du,
                                                Rows<real> dstep, Rows<real> dgate, float* dpairs, float* dskip,
                                                float* drates, int time) {
  DYNAMIC_SHARED(Backward, shared);
  Backward& b = *shared;
  Prepared& s = b.prepared;
  const Place at = place(u.cols, time);
  const int chunks = (time + CHUNK - 1) / CHUNK, warp = threadIdx.x / 32;
  float lambda[PER], rates[PER], rate_sums[PER], skip_sum = 0.0f;
  load_rates(rates, a_log, at);
#pragma unroll
  for (int i = 0; i < PER; ++i) lambda[i] = rate_sums[i] = 0.0f;
  for (int chunk = chunks - 1; chunk >= 0; --chunk) {
    const long long first = at.rows + chunk * CHUNK;
    const int rows = min(CHUNK, time - chunk * CHUNK);
    float input[OWN], slope[OWN];
    __syncthreads();
    load_states(s, keys, queries, first, rows);
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
      const int r = (i * THREADS + threadIdx.x) / CHANNELS, c = (i * THREADS + threadIdx.x) % CHANNELS;
      const bool live = r < rows && c < at.channels;
      input[i] = slope[i] = s.first[r][c] = s.second[r][c] = b.dy[r][c] = 0.0f;
      if (live) {
        input[i] = to_float(u.row(first + r)[at.first_channel + c]);
        const float2 d = prepare(to_float(step.row(first + r)[at.first_channel + c]), s.squares[r]);
        slope[i] = d.y;
        s.first[r][c] = d.x;
        s.second[r][c] = d.x * input[i];
        float gradient = to_float(dy.row(first + r)[at.first_channel + c]);
#if GATED
        const float z = to_float(gate.row(first + r)[at.first_channel + c]);
        gradient *= z * sigmoid(z);
#endif
        b.dy[r][c] = gradient;
        skip_sum += gradient * input[i];
      }
    }
    __syncthreads();
    // the states before each run of rows
    float starts[RUNS][PER], h[PER];
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      const int n = at.part * PER + i;
      h[i] = at.channel < at.channels && n < STATE ? kept[kept_at(at, chunk, chunks, n, u.cols)] : 0.0f;
    }
#pragma unroll
    for (int run = 0; run < RUNS; ++run) {
#pragma unroll
      for (int i = 0; i < PER; ++i) starts[run][i] = h[i];
      if (run + 1 < RUNS)
#pragma unroll
        for (int r = run * RUN; r < (run + 1) * RUN; ++r)
#pragma unroll
          for (int i = 0; i < PER; ++i) {
            float aside;
            h[i] = advance(h[i], s.first[r][at.channel], s.second[r][at.channel], s.keys[r][at.part * PER + i], rates[i], aside);
          }
    }
#pragma unroll
    for (int run = RUNS - 1; run >= 0; --run) {
      // rows beyond the end have step sizes and gradients of 0 and change nothing
      float aside[RUN][PER], before[LONGHORN ? 1 : RUN][PER];
#pragma unroll
      for (int i = 0; i < PER; ++i) h[i] = starts[run][i];
#pragma unroll
      for (int k = 0; k < RUN; ++k) {
        const int r = run * RUN + k;
        const float gradient = b.dy[r][at.channel];
        float sum = 0.0f, dq[PER];
#pragma unroll
        for (int i = 0; i < PER; ++i) {
          if (!LONGHORN) before[LONGHORN ? 0 : k][i] = h[i];
          h[i] = advance(h[i], s.first[r][at.channel], s.second[r][at.channel], s.keys[r][at.part * PER + i], rates[i], aside[k][i]);
          sum += s.queries[r][at.part * PER + i] * h[i];
          dq[i] = gradient * h[i];
        }
        write_sums(dq, b.pairs[warp][r], at);
        sum = sum_parts(sum);
        if (at.part == 0) b.out[r][at.channel] = sum;
      }
#pragma unroll
      for (int k = RUN - 1; k >= 0; --k) {
        const int r = run * RUN + k;
        const float gradient = b.dy[r][at.channel], a = s.first[r][at.channel], au = s.second[r][at.channel];
        float one = 0.0f, two = 0.0f, dk[PER];
#pragma unroll
        for (int i = 0; i < PER; ++i) {
          const float key = s.keys[r][at.part * PER + i];
          const float l = lambda[i] + s.queries[r][at.part * PER + i] * gradient;
#if LONGHORN
          const float m = key * l;
          one += m * aside[k][i];
          two += m;
          dk[i] = l * (2.0f * aside[k][i] - au);
          lambda[i] = l - key * (a * m);
#else
          const float x = l * aside[k][i] * before[k][i];
          one += x * rates[i];
          two += l * key;
          dk[i] = l * au;
          rate_sums[i] += x * a;
          lambda[i] = l * aside[k][i];
#endif
        }
        write_sums(dk, b.pairs[warp][r] + ALL, at);
        one = sum_parts(one);
        two = sum_parts(two);
        __syncwarp();
        if (at.part == 0) {
          s.second[r][at.channel] = one;
          b.dy[r][at.channel] = two;
        }
      }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
      const int r = (i * THREADS + threadIdx.x) / CHANNELS, c = (i * THREADS + threadIdx.x) % CHANNELS;
      const bool live = r < rows && c < at.channels;
      const float one = s.second[r][c], two = b.dy[r][c], a = s.first[r][c];
#if LONGHORN
      float squares = live ? -a * one : 0.0f;
#pragma unroll
      for (int o = 16; o > 0; o >>= 1) squares += __shfl_xor_sync(0xffffffffu, squares, o);
      if (c % 32 == 0) b.squares[r][c / 32] = squares;
#endif
      if (live) {
        const int column = at.first_channel + c;
        const float weight = skip ? skip[column] : 0.0f;
        float gradient = to_float(dy.row(first + r)[column]);
#if GATED
        const float z = to_float(gate.row(first + r)[column]), g = sigmoid(z);
        store(dgate.row(first + r) + column, gradient * (b.out[r][c] + weight * input[i]) * g * (1.0f + z * (1.0f - g)));
        gradient *= z * g;
#endif
        store(du.row(first + r) + column, weight * gradient + a * two);
#if LONGHORN
        store(dstep.row(first + r) + column, one * slope[i]);
#else
        store(dstep.row(first + r) + column, (one * LN_2 + input[i] * two) * slope[i]);
#endif
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < rows * 2 * STATE; i += THREADS) {
      const int r = i / (2 * STATE), half = i / STATE % 2, n = i % STATE;
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < WARPS; ++w) sum += b.pairs[w][r][half * ALL + n];
#if LONGHORN
      if (half) {
        float squares = 0.0f;
#pragma unroll
        for (int w = 0; w < CHANNELS / 32; ++w) squares += b.squares[r][w];
        sum += 2.0f * s.keys[r][n] * squares;
      }
#endif
      dpairs[(((long long)blockIdx.x * u.rows + first + r) * 2 + half) * STATE + n] = sum;
    }
  }
  // thread i has summed over the rows of channel i % CHANNELS
  __syncthreads();
  float* sums = &b.out[0][0];
  sums[threadIdx.x] = skip_sum;
  __syncthreads();
  if ((int)threadIdx.x < at.channels && dskip) {
    float sum = 0.0f;
    for (int i = threadIdx.x; i < THREADS; i += CHANNELS) sum += sums[i];
    dskip[(long long)at.sequence * u.cols + at.first_channel + threadIdx.x] = sum;
  }
#if !LONGHORN
  if (at.channel < at.channels)
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      const int n = at.part * PER + i;
      if (n < STATE)
        drates[((long long)at.sequence * u.cols + at.first_channel + at.channel) * STATE + n] = rate_sums[i] * rates[i] * LN_2;
    }
#endif
}

// dq[r] and dk[r]: the sums over the groups of channels of dpairs.
KERNEL __launch_bounds__(256) sum_pairs(const float* dpairs, int groups, Rows<real> dq, Rows<real> dk) {
  const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x, n = (long long)dq.rows * 2 * STATE;
  if (i >= n) return;
  float sum = 0.0f;
  for (int g = 0; g < groups; ++g) sum += dpairs[g * n + i];
  const long long r = i / (2 * STATE);
  const int column = (int)(i % STATE);
  store((i / STATE % 2 ? dk.row(r) : dq.row(r)) + column, sum);
}
