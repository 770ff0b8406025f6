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

// Channels that are loaded at once: at most CHUNK / SPLIT.
#ifndef VECTOR
#define VECTOR 4
#endif
// Blocks that a multiprocessor shall have room for in the backward pass: two of 256 threads are faster than one, although
// each then spills some 100 bytes of registers.
#ifndef MIN_BLOCKS
#define MIN_BLOCKS 1
#endif

constexpr int CHUNK = 32, CHANNELS = 64;
constexpr int THREADS = CHANNELS * SPLIT;
// States of a lane, and of all lanes of a channel.
constexpr int PER = (STATE + SPLIT - 1) / SPLIT, ALL = PER * SPLIT;
// Elements of a chunk that a thread prepares, and vectors of them.
constexpr int OWN = CHUNK * CHANNELS / THREADS, VECTORS = OWN / VECTOR;
static_assert(OWN % VECTOR == 0, "a thread prepares whole vectors");
// Rows whose recurrences run before their results go to shared memory, which the compiler would not let loads pass.
constexpr int RUN = 4, RUNS = CHUNK / RUN;
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
  aside = fast_exp2(first * rate);
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

// Row and first channel of a thread's vector.
DEVICE int row_of(int i) { return (i * THREADS + (int)threadIdx.x) / (CHANNELS / VECTOR); }
DEVICE int channel_of(int i) { return (i * THREADS + (int)threadIdx.x) % (CHANNELS / VECTOR) * VECTOR; }

// A thread's elements of a chunk, zeros where there are none.
DEVICE void load_own(float (&x)[OWN], Rows<const real> from, long long first, int rows, const Place& at) {
#pragma unroll
  for (int i = 0; i < VECTORS; ++i) {
#pragma unroll
    for (int e = 0; e < VECTOR; ++e) x[i * VECTOR + e] = 0.0f;
    if (row_of(i) < rows && channel_of(i) < at.channels)
      load_vector<VECTOR>(from.row(first + row_of(i)) + at.first_channel + channel_of(i), x + i * VECTOR);
  }
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
    float input[OWN], steps[OWN];
    load_own(input, u, first, rows, at);
    load_own(steps, step, first, rows, at);
    __syncthreads();
    load_states(s, keys, queries, first, rows);
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
      const int r = row_of(i / VECTOR), c = channel_of(i / VECTOR) + i % VECTOR;
      const float d = r < rows ? prepare(steps[i], s.squares[r]).x : 0.0f;
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
    // rows beyond the end have step sizes of 0 and change nothing
    for (int from = 0; from < rows; from += RUN) {
      float sums[RUN];
#pragma unroll
      for (int k = 0; k < RUN; ++k) {
        const float a = s.first[from + k][at.channel], b = s.second[from + k][at.channel];
        sums[k] = 0.0f;
#pragma unroll
        for (int i = 0; i < PER; ++i) {
          float aside;
          h[i] = advance(h[i], a, b, s.keys[from + k][at.part * PER + i], rates[i], aside);
          sums[k] += s.queries[from + k][at.part * PER + i] * h[i];
        }
      }
#pragma unroll
      for (int k = 0; k < RUN; ++k) sums[k] = sum_parts(sums[k]);
      __syncwarp();
      // the lanes of the channel have read what this replaces
#pragma unroll
      for (int k = 0; k < RUN; ++k)
        if (k % SPLIT == at.part) s.second[from + k][at.channel] = sums[k];
    }
    float z[OWN];
#if GATED
    load_own(z, gate, first, rows, at);
#endif
    __syncthreads();
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
      const int r = row_of(i), c = channel_of(i);
      if (r < rows && c < at.channels) {
        float out[VECTOR];
#pragma unroll
        for (int e = 0; e < VECTOR; ++e) {
          out[e] = s.second[r][c + e] + (skip ? skip[at.first_channel + c + e] * input[i * VECTOR + e] : 0.0f);
          if (GATED) out[e] *= z[i * VECTOR + e] * sigmoid(z[i * VECTOR + e]);
        }
        store_vector<VECTOR>(y.row(first + r) + at.first_channel + c, out);
      }
    }
  }
}

constexpr int WARPS = THREADS / 32;
// Warps' parts of a row, where one row is prepared by several.
constexpr int ROW_PARTS = CHANNELS / VECTOR > 32 ? CHANNELS / VECTOR / 32 : 1;

struct Backward {
  Prepared prepared;
  float dy[CHUNK][CHANNELS];   // gradient of what the gate multiplies
  float out[CHUNK][CHANNELS];  // q . h
  float pairs[WARPS][CHUNK][2 * ALL];
  float squares[CHUNK][ROW_PARTS];
};

// Sums x[0 .. N) over the lanes whose numbers differ in the bits O, 2 O, .. 16. Where N is even, a step halves the values: a
// lane keeps those of its half. In the end x[i] is the sum of value `index` + i.
template <int N, int O> DEVICE void fold(float* x, int& index) {
  if constexpr (O < 32) {
    if constexpr (N % 2 == 0) {
      const bool high = threadIdx.x & O;
#pragma unroll
      for (int i = 0; i < N / 2; ++i) {
        const float mine = high ? x[N / 2 + i] : x[i], other = high ? x[i] : x[N / 2 + i];
        x[i] = mine + __shfl_xor_sync(0xffffffffu, other, O);
      }
      if (high) index += N / 2;
      fold<N / 2, 2 * O>(x, index);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] += __shfl_xor_sync(0xffffffffu, x[i], O);
      fold<N, 2 * O>(x, index);
    }
  }
}
template <int N, int O> __device__ constexpr int folded() {
  if constexpr (O >= 32) return N;
  else return folded<N % 2 == 0 ? N / 2 : N, 2 * O>();
}

// Sums over the warp's channels, of RUN rows and the states of each lane's part, to rows of `to`.
DEVICE void write_sums(float (&x)[RUN * PER], float (*to)[2 * ALL], int column, const Place& at) {
  int index = 0;
  fold<RUN * PER, SPLIT>(x, index);
#pragma unroll
  for (int i = 0; i < folded<RUN * PER, SPLIT>(); ++i)
    to[(index + i) / PER][column + at.part * PER + (index + i) % PER] = x[i];
}

// Gradients. dpairs [groups of channels, rows, 2 STATE]: those of queries and keys, summed over the block's channels;
// dskip [sequences, channels] and drates [sequences, channels * STATE]: summed over time. blockIdx: channels, sequence.
KERNEL __launch_bounds__(THREADS, MIN_BLOCKS) scan_backward(Rows<const real> u, Rows<const real> step, Rows<const real> keys,
                                                Rows<const real> queries, const float* a_log, const float* skip,
                                                Rows<const real> gate, const float* kept, Rows<const real> dy, Rows<real> du,
                                                Rows<real> dstep, Rows<real> dgate, float* dpairs, float* dskip,
                                                float* drates, int time) {
  DYNAMIC_SHARED(Backward, shared);
  Backward& b = *shared;
  Prepared& s = b.prepared;
  const Place at = place(u.cols, time);
  const int chunks = (time + CHUNK - 1) / CHUNK, warp = threadIdx.x / 32;
  float lambda[PER], rates[PER], rate_sums[PER], skip_sums[VECTOR];
  load_rates(rates, a_log, at);
#pragma unroll
  for (int i = 0; i < PER; ++i) lambda[i] = rate_sums[i] = 0.0f;
#pragma unroll
  for (int e = 0; e < VECTOR; ++e) skip_sums[e] = 0.0f;
  for (int chunk = chunks - 1; chunk >= 0; --chunk) {
    const long long first = at.rows + chunk * CHUNK;
    const int rows = min(CHUNK, time - chunk * CHUNK);
    float input[OWN], slope[OWN];
    {
      float steps[OWN], gradient[OWN], z[OWN];
      load_own(input, u, first, rows, at);
      load_own(steps, step, first, rows, at);
      load_own(gradient, dy, first, rows, at);
#if GATED
      load_own(z, gate, first, rows, at);
#endif
      __syncthreads();
      load_states(s, keys, queries, first, rows);
#pragma unroll
      for (int i = 0; i < OWN; ++i) {
        const int r = row_of(i / VECTOR), c = channel_of(i / VECTOR) + i % VECTOR;
        const float2 d = r < rows ? prepare(steps[i], s.squares[r]) : make_float2(0.0f, 0.0f);
        slope[i] = d.y;
        s.first[r][c] = d.x;
        s.second[r][c] = d.x * input[i];
        if (GATED) gradient[i] *= z[i] * sigmoid(z[i]);
        b.dy[r][c] = gradient[i];
        skip_sums[i % VECTOR] += gradient[i] * input[i];
      }
    }
    // the states before each run of rows
    float starts[RUNS][PER], h[PER];
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      const int n = at.part * PER + i;
      h[i] = at.channel < at.channels && n < STATE ? kept[kept_at(at, chunk, chunks, n, u.cols)] : 0.0f;
    }
    __syncthreads();
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
      float aside[RUN][PER], before[RUN][PER], sums[RUN], others[RUN], pairs[RUN * PER];
#pragma unroll
      for (int i = 0; i < PER; ++i) h[i] = starts[run][i];
#pragma unroll
      for (int k = 0; k < RUN; ++k) {
        const int r = run * RUN + k;
        const float gradient = b.dy[r][at.channel];
        sums[k] = 0.0f;
#pragma unroll
        for (int i = 0; i < PER; ++i) {
          before[k][i] = h[i];
          h[i] = advance(h[i], s.first[r][at.channel], s.second[r][at.channel], s.keys[r][at.part * PER + i], rates[i], aside[k][i]);
          sums[k] += s.queries[r][at.part * PER + i] * h[i];
          pairs[k * PER + i] = gradient * h[i];
        }
      }
      write_sums(pairs, b.pairs[warp] + run * RUN, 0, at);
#pragma unroll
      for (int k = 0; k < RUN; ++k) {
        sums[k] = sum_parts(sums[k]);
        if (k % SPLIT == at.part) b.out[run * RUN + k][at.channel] = sums[k];
      }
#pragma unroll
      for (int k = RUN - 1; k >= 0; --k) {
        const int r = run * RUN + k;
        const float gradient = b.dy[r][at.channel], a = s.first[r][at.channel], au = s.second[r][at.channel];
        float one = 0.0f, two = 0.0f;
#pragma unroll
        for (int i = 0; i < PER; ++i) {
          const float key = s.keys[r][at.part * PER + i];
          const float l = lambda[i] + s.queries[r][at.part * PER + i] * gradient;
          if (LONGHORN) {
            const float m = key * l;
            one += m * aside[k][i];
            two += m;
            pairs[k * PER + i] = l * (2.0f * aside[k][i] - au);
            lambda[i] = l - key * (a * m);
          } else {
            const float x = l * aside[k][i] * before[k][i];
            one += x * rates[i];
            two += l * key;
            pairs[k * PER + i] = l * au;
            rate_sums[i] += x * a;
            lambda[i] = l * aside[k][i];
          }
        }
        sums[k] = one;
        others[k] = two;
      }
      write_sums(pairs, b.pairs[warp] + run * RUN, ALL, at);
#pragma unroll
      for (int k = 0; k < RUN; ++k) {
        sums[k] = sum_parts(sums[k]);
        others[k] = sum_parts(others[k]);
      }
      __syncwarp();
#pragma unroll
      for (int k = 0; k < RUN; ++k)
        if (k % SPLIT == at.part) {
          s.second[run * RUN + k][at.channel] = sums[k];
          b.dy[run * RUN + k][at.channel] = others[k];
        }
    }
    float gradient[OWN], z[OWN];
    load_own(gradient, dy, first, rows, at);
#if GATED
    load_own(z, gate, first, rows, at);
#endif
    __syncthreads();
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
      const int r = row_of(i), c = channel_of(i), column = at.first_channel + c;
      const bool live = r < rows && c < at.channels;
      float dinput[VECTOR], dsteps[VECTOR], dz[VECTOR], squares = 0.0f;
#pragma unroll
      for (int e = 0; e < VECTOR; ++e) {
        const int own = i * VECTOR + e;
        const float one = s.second[r][c + e], two = b.dy[r][c + e], a = s.first[r][c + e];
        const float weight = skip && live ? skip[column + e] : 0.0f;
        if (GATED) {
          const float g = sigmoid(z[own]);
          dz[e] = gradient[own] * (b.out[r][c + e] + weight * input[own]) * g * (1.0f + z[own] * (1.0f - g));
          gradient[own] *= z[own] * g;
        }
        dinput[e] = weight * gradient[own] + a * two;
        dsteps[e] = (LONGHORN ? one : one * LN_2 + input[own] * two) * slope[own];
        squares -= a * one;
      }
      if (LONGHORN) {
        constexpr int LANES = CHANNELS / VECTOR > 32 ? 32 : CHANNELS / VECTOR;
#pragma unroll
        for (int o = LANES / 2; o > 0; o >>= 1) squares += __shfl_xor_sync(0xffffffffu, squares, o);
        if (c / VECTOR % LANES == 0) b.squares[r][c / VECTOR / LANES] = squares;
      }
      if (live) {
        store_vector<VECTOR>(du.row(first + r) + column, dinput);
        store_vector<VECTOR>(dstep.row(first + r) + column, dsteps);
        if (GATED) store_vector<VECTOR>(dgate.row(first + r) + column, dz);
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
        for (int w = 0; w < ROW_PARTS; ++w) squares += b.squares[r][w];
        sum += 2.0f * s.keys[r][n] * squares;
      }
#endif
      dpairs[(((long long)blockIdx.x * u.rows + first + r) * 2 + half) * STATE + n] = sum;
    }
  }
  // threads a multiple of CHANNELS / VECTOR apart have summed over rows of the same channels
  __syncthreads();
  float* sums = &b.prepared.first[0][0];
#pragma unroll
  for (int e = 0; e < VECTOR; ++e) sums[threadIdx.x * VECTOR + e] = skip_sums[e];
  __syncthreads();
  if ((int)threadIdx.x < at.channels && dskip) {
    float sum = 0.0f;
    for (int i = threadIdx.x; i < THREADS * VECTOR; i += CHANNELS) sum += sums[i];
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
