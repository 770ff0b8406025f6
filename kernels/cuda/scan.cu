// Scans with a diagonal state for every channel: Mamba's selective scan and the Longhorn update; formulas in
// kernels/src/cpu/selective_scan.rs and longhorn.rs.
//
// A warp has 8 WIDE channels of a sequence and walks through time. The four lanes of a quad share WIDE channels: each has PER
// states of all of them, so that a key that is loaded serves WIDE channels and a step size PER states. Lanes of a quad also
// own a row each of a run of four: they prepare its step sizes, which go to the others through shared memory, and finish its
// results. Sums over states (within quads) and over channels (across them) are products with constant or small matrices on
// tensor cores, which have nothing else to do here: operands of 11 bits with bf16 activations, two of them for each number
// with f32. The states stay in f32 registers. Only the state before each chunk of 32 rows is kept, and the backward pass
// computes the states again from it: those before each run once, and those of a run when it is there.
#include "common.cuh"
#include "tile.cuh"

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
// Channels of a quad: 1 to 4. With three of 16 states, the registers of an H100's scheduler have room for three warps, and 24
// sequences of 1536 channels are 2.9 for each.
#ifndef WIDE
#define WIDE 3
#endif
// Channels of a quad that are loaded at once, 1 or 2, and keys.
#ifndef VECTOR
#define VECTOR (WIDE > 1 ? 2 : 1)
#endif
#ifndef KEY_VECTOR
#define KEY_VECTOR 4
#endif
#ifndef WARPS
#define WARPS 4
#endif
// Blocks that a multiprocessor shall have room for.
#ifndef MIN_BLOCKS
#define MIN_BLOCKS 1
#endif

// Rows of a chunk and of a run, which has one for each lane of a quad.
constexpr int CHUNK = 32, RUN = 4, RUNS = CHUNK / RUN;
constexpr int THREADS = 32 * WARPS, WARP_CHANNELS = 8 * WIDE, CHANNELS = WARPS * WARP_CHANNELS;
// A quad's channels are at most two neighbours, and as many 16 channels on. In shared memory they have places for two or four.
constexpr int FIRST = WIDE < 2 ? WIDE : 2, SECOND = WIDE - FIRST, PLACES = WIDE == 3 ? 4 : WIDE;
// States of a lane, an even number, and of a quad.
constexpr int PER = (STATE + 7) / 8 * 2, ALL = 4 * PER;
constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;
// Whether sums on tensor cores take two operands for each number.
constexpr bool EXACT = sizeof(real) == 4;

template <int N> DEVICE void load_all(const float* from, float* x) {
  constexpr int AT_ONCE = N % 4 == 0 ? 4 : N % 2 == 0 ? 2 : 1;
#pragma unroll
  for (int i = 0; i < N; i += AT_ONCE) load_vector<AT_ONCE>(from + i, x + i);
}
template <int N> DEVICE void store_all(float* to, const float* x) {
  constexpr int AT_ONCE = N % 4 == 0 ? 4 : N % 2 == 0 ? 2 : 1;
#pragma unroll
  for (int i = 0; i < N; i += AT_ONCE) store_vector<AT_ONCE>(to + i, x + i);
}

struct Place {
  int thread, warp, group, part;  // thread of the block: warp, quad of the warp, lane of the quad
  int first, second;              // columns of the quad's channels
  int firsts, seconds;            // how many there are of each; none if negative
  int sequence, rows;             // sequence, and its first row
  __device__ __forceinline__ int column(int c) const { return c < FIRST ? first + c : second + c - FIRST; }
  __device__ __forceinline__ bool live(int c) const { return c < FIRST ? c < firsts : c - FIRST < seconds; }
};
DEVICE Place place(int channels, int time) {
  // what comes from another lane is not computed again and again to save a register
  const int thread = __shfl_sync(0xffffffffu, (int)threadIdx.x, (int)threadIdx.x % 32);
  const int warp = thread / 32, group = thread / 4 % 8, base = blockIdx.x * CHANNELS + warp * WARP_CHANNELS;
  const int first = base + group * FIRST, second = base + 8 * FIRST + group * SECOND;
  return {thread, warp, group, thread % 4, first, second, channels - first, channels - second, (int)blockIdx.y,
          (int)blockIdx.y * time};
}

// A tensor from the first row of the sequence on. Bytes within a sequence are counted in 32 bits.
template <class T> struct Sequence {
  char* data;
  unsigned stride;
  __device__ __forceinline__ Sequence(const Rows<T>& x, const Place& at)
      : data((char*)(x.data + at.rows * x.stride)), stride((unsigned)x.stride * sizeof(T)) {}
  // Rows of the sequence alone.
  __device__ __forceinline__ Sequence(T* x, long long stride) : data((char*)x), stride((unsigned)stride * sizeof(T)) {}
  __device__ __forceinline__ T* at(int row, int column) const {
    return reinterpret_cast<T*>(data + (row * stride + (unsigned)column * (unsigned)sizeof(T)));
  }
};

// N neighbours of a row as they lie in memory, zeros where there is nothing.
template <int N> struct Piece {
  static constexpr int AT_ONCE = N < VECTOR ? N : VECTOR;
  typedef typename Raw<AT_ONCE * sizeof(real)>::type raw;
  raw data[N / AT_ONCE];
  __device__ __forceinline__ void load(const Sequence<const real>& from, int row, bool live, int column, int count) {
    const real* place = from.at(row, column);
#pragma unroll
    for (int i = 0; i < N / AT_ONCE; ++i) {
      data[i] = raw{};
      if (live && i * AT_ONCE < count) data[i] = *reinterpret_cast<const raw*>(place + i * AT_ONCE);
    }
  }
  __device__ __forceinline__ void get(float* x) const {
#pragma unroll
    for (int i = 0; i < N / AT_ONCE; ++i) load_vector<AT_ONCE>(reinterpret_cast<const real*>(data + i), x + i * AT_ONCE);
  }
  __device__ __forceinline__ static void store(const Sequence<real>& to, int row, const float* x, bool live, int column,
                                               int count) {
    real* place = to.at(row, column);
#pragma unroll
    for (int i = 0; i < N; i += AT_ONCE)
      if (live && i < count) store_vector<AT_ONCE>(place + i, x + i);
  }
};
template <> struct Piece<0> {
  __device__ __forceinline__ void load(const Sequence<const real>&, int, bool, int, int) {}
  __device__ __forceinline__ void get(float*) const {}
  __device__ __forceinline__ static void store(const Sequence<real>&, int, const float*, bool, int, int) {}
};

// The quad's channels in a row.
struct Elements {
  Piece<FIRST> one;
  Piece<SECOND> two;
  __device__ __forceinline__ void load(const Sequence<const real>& from, int row, bool live, const Place& at) {
    one.load(from, row, live, at.first, at.firsts);
    two.load(from, row, live, at.second, at.seconds);
  }
  __device__ __forceinline__ void get(float (&x)[WIDE]) const {
    one.get(x);
    two.get(x + FIRST);
  }
};
DEVICE void store_elements(const Sequence<real>& to, int row, const float (&x)[WIDE], bool live, const Place& at) {
  Piece<FIRST>::store(to, row, x, live, at.first, at.firsts);
  Piece<SECOND>::store(to, row, x + FIRST, live, at.second, at.seconds);
}

// A thread's keys and queries of a chunk on their way to shared memory, zeros where there are none.
struct Keys {
  static constexpr int COUNT = (2 * CHUNK * ALL / KEY_VECTOR + THREADS - 1) / THREADS;
  float data[COUNT][KEY_VECTOR];
  __device__ __forceinline__ void load(Rows<const real> keys, Rows<const real> queries, long long first, int rows) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const int at = (i * THREADS + (int)threadIdx.x) * KEY_VECTOR, r = at / ALL % CHUNK, n = at % ALL;
#pragma unroll
      for (int e = 0; e < KEY_VECTOR; ++e) data[i][e] = 0.0f;
      if (r < rows && n < STATE && at < 2 * CHUNK * ALL)
        load_vector<KEY_VECTOR>((at < CHUNK * ALL ? keys : queries).row(first + r) + n, data[i]);
    }
  }
  // Queries lie behind keys.
  __device__ __forceinline__ void store(float (*keys)[ALL]) const {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const int at = (i * THREADS + (int)threadIdx.x) * KEY_VECTOR;
      if (at < 2 * CHUNK * ALL) store_vector<KEY_VECTOR>(&keys[0][0] + at, data[i]);
    }
  }
};

// |k|^2 of row `lane` of a chunk.
DEVICE float squares_of_row(const float (*keys)[ALL]) {
  const int r = tile_lane();
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < PER; ++i) {
    // rows two apart begin at the same bank, and so with another vector
    float k[4];
    load_vector<4>(&keys[r][(i + r / 2) % PER * 4], k);
#pragma unroll
    for (int e = 0; e < 4; ++e) sum += k[e] * k[e];
  }
  return sum;
}

// Rows beyond the end have this step: their step sizes are next to nothing, their other inputs 0, and they change nothing.
constexpr float NONE = -1e30f;

// The step size: e of Longhorn, d of Mamba.
DEVICE float step_size(float step, float squares) {
#if LONGHORN
  return fast_reciprocal(1.0f + squares + fast_exp2(-LOG2_E * fmaxf(step, -80.0f)));
#else
  // max(x, 0) + log(1 + y) for y = e^-|x| in 0 .. 1, of which y times a polynomial differs by 3e-7 of its size
  const float y = fast_exp2(-LOG2_E * fabsf(step));
  constexpr float TERMS[] = {-0.00833649747f, 0.0433708504f, -0.106677905f, 0.176754937f,
                             -0.244704694f,   0.332711875f,  -0.499971271f, 0.999999762f};
  float sum = TERMS[0];
#pragma unroll
  for (int i = 1; i < 8; ++i) sum = sum * y + TERMS[i];
  return fmaxf(step, 0.0f) + y * sum;
#endif
}
// What the gradient of `step` is of that of the step size d, or of e's own gradient times e.
DEVICE float slope(float step, float size) {
#if LONGHORN
  return size * fast_exp2(-LOG2_E * fmaxf(step, -80.0f));
#else
  return sigmoid(step);
#endif
}

// What a row does to the states of a channel: its step size, e or d, and that times u.
struct Step {
  float size, product;
};
// The steps of a row: those of the first two channels of each quad, then those of the others, so that no two quads meet in a
// bank.
constexpr int AT_ONCE = PLACES < 2 ? 1 : 2;
struct Steps {
  Step of[PLACES / AT_ONCE][8][AT_ONCE];
  __device__ __forceinline__ void load(Step (&steps)[PLACES], int group) const {
#pragma unroll
    for (int i = 0; i < PLACES; i += AT_ONCE) load_all<2 * AT_ONCE>(&of[i / AT_ONCE][group][0].size, &steps[i].size);
  }
  __device__ __forceinline__ void store(const Step (&steps)[PLACES], int group) {
#pragma unroll
    for (int i = 0; i < PLACES; i += AT_ONCE) store_all<2 * AT_ONCE>(&of[i / AT_ONCE][group][0].size, &steps[i].size);
  }
};

// The states after a row.
DEVICE void advance(float (&h)[WIDE][PER], const Step (&steps)[PLACES], const float (&keys)[PER], const float (&rates)[WIDE][PER]) {
#pragma unroll
  for (int c = 0; c < WIDE; ++c)
#pragma unroll
    for (int i = 0; i < PER; ++i)
      if (LONGHORN) h[c][i] += keys[i] * (steps[c].product - steps[c].size * keys[i] * h[c][i]);
      else h[c][i] = fast_exp2(steps[c].size * rates[c][i]) * h[c][i] + steps[c].product * keys[i];
}

// The rates A log2(e) of a lane's states.
DEVICE void load_rates(float (&rates)[WIDE][PER], const float* a_log, const Place& at) {
#pragma unroll
  for (int c = 0; c < WIDE; ++c)
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      const int n = at.part * PER + i;
      const bool live = !LONGHORN && at.live(c) && n < STATE;
      rates[c][i] = live ? -expf(a_log[(long long)at.column(c) * STATE + n]) * LOG2_E : 0.0f;
    }
}

// The states before each chunk of the sequence, [chunk, state, channel] of [sequence, chunk, state, channel].
template <class T> DEVICE Sequence<T> kept_states(T* kept, const Place& at, int chunks, int channels) {
  return Sequence<T>(kept + (long long)at.sequence * chunks * STATE * channels, channels);
}
DEVICE void load_kept(float (&h)[WIDE][PER], const Sequence<const float>& kept, const Place& at, int chunk) {
#pragma unroll
  for (int i = 0; i < PER; ++i)
#pragma unroll
    for (int c = 0; c < WIDE; c += c + VECTOR <= WIDE ? VECTOR : 1) {
      const int n = at.part * PER + i;
      const float* from = kept.at(chunk * STATE + n, at.column(c));
      const bool live = n < STATE && at.live(c);
      float x[VECTOR] = {};
      if (c + VECTOR <= WIDE) {
        if (live) load_vector<VECTOR>(from, x);
      } else if (live) x[0] = *from;
#pragma unroll
      for (int e = 0; e < VECTOR; ++e)
        if (c + e < WIDE) h[c + e][i] = x[e];
    }
}
DEVICE void store_kept(const Sequence<float>& kept, const float (&h)[WIDE][PER], const Place& at, int chunk) {
#pragma unroll
  for (int i = 0; i < PER; ++i)
#pragma unroll
    for (int c = 0; c < WIDE; c += c + VECTOR <= WIDE ? VECTOR : 1) {
      const int n = at.part * PER + i;
      float* to = kept.at(chunk * STATE + n, at.column(c));
      if (!(n < STATE && at.live(c))) continue;
      if (c + VECTOR <= WIDE) {
        float x[VECTOR];
#pragma unroll
        for (int e = 0; e < VECTOR; ++e) x[e] = h[c + e][i];
        store_vector<VECTOR>(to, x);
      } else *to = h[c][i];
    }
}

// The part of x that a tensor core takes.
DEVICE float high_bits(float x) { return __uint_as_float(__float_as_uint(x) & 0xffffe000u); }

// Sums over the lanes of a quad; all of them have these.
DEVICE void quad_sums(float (&x)[WIDE]) {
#pragma unroll
  for (int c = 0; c < WIDE; c += 2) {
    const float one = x[c], two = c + 1 < WIDE ? x[c + 1] : 0.0f;
    const float high[2] = {high_bits(one), high_bits(two)};
    const float a[4] = {high[0], high[1], one - high[0], two - high[1]};
    float d[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    mma_tf32(d, a, 1.0f, 1.0f);
    x[c] = d[0];
    if (c + 1 < WIDE) x[c + 1] = d[2];
  }
}

// Sums over the states of x y; all lanes of the quad have these.
DEVICE void dot(float (&sums)[WIDE], const float (&x)[WIDE][PER], const float (&y)[PER]) {
  if (EXACT) {
#pragma unroll
    for (int c = 0; c < WIDE; ++c) {
      sums[c] = 0.0f;
#pragma unroll
      for (int i = 0; i < PER; ++i) sums[c] += x[c][i] * y[i];
    }
    quad_sums(sums);
  } else {
#pragma unroll
    for (int c = 0; c + 1 < WIDE; c += 2) {
      float d[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
      for (int i = 0; i < PER; i += 2) {
        const float a[4] = {x[c][i], x[c + 1][i], x[c][i + 1], x[c + 1][i + 1]};
        mma_tf32(d, a, y[i], y[i + 1]);
      }
      sums[c] = d[0];
      sums[c + 1] = d[2];
    }
    if (WIDE % 2) {
      // the last channel has half of its states in either half of the rows; an operand of four registers that are its own
      constexpr int c = WIDE - 1, HALF = PER % 4 ? 0 : 2;
      float d[4] = {0.0f, 0.0f, 0.0f, 0.0f}, other[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
      for (int i = 0; i < PER; i += 2 + HALF) {
        const float a[4] = {x[c][i], x[c][i + HALF], x[c][i + 1], x[c][i + HALF + 1]};
        mma_tf32(d, a, y[i], y[i + 1]);
        if (HALF) mma_tf32(other, a, y[i + HALF], y[i + HALF + 1]);
      }
      sums[c] = HALF ? d[0] + other[2] : d[0];
    }
  }
}

struct Forward {
  float keys[2][2][CHUNK][ALL];                  // of two chunks: keys, queries
  Steps steps[WARPS][2][RUN];              // of two runs
};

// blockIdx: channels, sequence.
KERNEL __launch_bounds__(THREADS, MIN_BLOCKS) scan_forward(Rows<const real> u, Rows<const real> step, Rows<const real> keys,
                                               Rows<const real> queries, const float* a_log, const float* skip,
                                               Rows<const real> gate, Rows<real> y, float* kept, int time) {
  DYNAMIC_SHARED(Forward, shared);
  Forward& s = *shared;
  const Place at = place(u.cols, time);
  const int chunks = (time + CHUNK - 1) / CHUNK;
  float h[WIDE][PER], rates[WIDE][PER], weights[WIDE];
  load_rates(rates, a_log, at);
#pragma unroll
  for (int c = 0; c < WIDE; ++c) {
    weights[c] = skip && at.live(c) ? skip[at.column(c)] : 0.0f;
#pragma unroll
    for (int i = 0; i < PER; ++i) h[c][i] = 0.0f;
  }
  Keys next;
  next.load(keys, queries, at.rows, min(CHUNK, time));
  next.store(s.keys[0][0]);
  const Sequence<const real> inputs(u, at), sizes(step, at), gates(gate, at);
  const Sequence<real> results(y, at);
  const Sequence<float> states = kept_states(kept, at, chunks, u.cols);
  // of the lane's rows of this run and the next
  Elements own_u[2], own_step[2], own_gate[2];
  auto load = [&](int i, int row) {
    own_u[i].load(inputs, row, row < time, at);
    own_step[i].load(sizes, row, row < time, at);
#if GATED
    own_gate[i].load(gates, row, row < time, at);
#endif
  };
  load(0, at.part);
  load(1, at.part + RUN);
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const int first = chunk * CHUNK;
    // everybody has left the chunk whose place the next one takes
    __syncthreads();
    if (chunk + 1 < chunks) next.load(keys, queries, at.rows + first + CHUNK, min(CHUNK, time - first - CHUNK));
    const float(*k)[ALL] = s.keys[chunk & 1][0];
    const float(*q)[ALL] = s.keys[chunk & 1][1];
    const float squares = LONGHORN ? squares_of_row(k) : 0.0f;
    if (kept) store_kept(states, h, at, chunk);
#pragma unroll 1
    for (int run = 0; run < RUNS && first + run * RUN < time; ++run) {
      const int row = first + run * RUN + at.part;
      const bool live = row < time;
      float input[WIDE], z[WIDE], size[WIDE], sums[WIDE];
      Step steps[PLACES] = {};
      own_u[0].get(input);
      own_step[0].get(size);
      if (GATED) own_gate[0].get(z);
      own_u[0] = own_u[1];
      own_step[0] = own_step[1];
      own_gate[0] = own_gate[1];
      load(1, row + 2 * RUN);
      const float square = LONGHORN ? __shfl_sync(0xffffffffu, squares, run * RUN + at.part) : 0.0f;
#pragma unroll
      for (int c = 0; c < WIDE; ++c) {
        steps[c].size = step_size(live ? size[c] : NONE, square);
        steps[c].product = steps[c].size * input[c];
      }
      s.steps[at.warp][run & 1][at.part].store(steps, at.group);
      __syncwarp();
#pragma unroll
      for (int r = 0; r < RUN; ++r) {
        float key[PER], query[PER], out[WIDE];
        load_all<PER>(&k[run * RUN + r][at.part * PER], key);
        load_all<PER>(&q[run * RUN + r][at.part * PER], query);
        s.steps[at.warp][run & 1][r].load(steps, at.group);
        advance(h, steps, key, rates);
        dot(out, h, query);
#pragma unroll
        for (int c = 0; c < WIDE; ++c) sums[c] = r == 0 || r == at.part ? out[c] : sums[c];
      }
#pragma unroll
      for (int c = 0; c < WIDE; ++c) {
        sums[c] += weights[c] * input[c];
        if (GATED) sums[c] *= z[c] * sigmoid(z[c]);
      }
      store_elements(results, row, sums, live, at);
    }
    next.store(s.keys[(chunk + 1) & 1][0]);
  }
}

// The first rows of runs whose states a chunk has in shared memory, by run: those of the first run are kept by the forward
// pass, the last run comes first, and those of the others are computed again from the run before.
constexpr unsigned STORED = EXACT ? 0x54 : 0x5c;
__device__ constexpr int stored_before(int run) {
  int n = 0;
  for (int i = 0; i < run; ++i) n += STORED >> i & 1;
  return n;
}

struct Backward {
  static constexpr int AT_ONCE = PER * WIDE % 4 == 0 ? 4 : 2;
  float keys[2][CHUNK][ALL];                                       // keys, queries
  Steps steps[WARPS][CHUNK];        
  float starts[stored_before(RUNS)][PER * WIDE / AT_ONCE][THREADS][AT_ONCE];
  float pairs[2][WARPS][RUN][2 * ALL];                             // of two runs: sums over the warp's channels
  float dy[WARPS][RUN][8][PLACES];                                 // of a run: gradient of what the gate multiplies
  Piece<FIRST> own[4][THREADS];                                    // what a thread reads of its row: u, step, gate, dy
  Piece<SECOND> others[4][THREADS];
  // of a thread's row: q . h, the gradients of the step size (of e, times e) and of its product with u
  float sums[3][WIDE][THREADS];
};

// Sums over the lanes that have the same states, which are those whose numbers differ in the bits 4, 8, 16.
struct PairSums {
  static constexpr int VALUES = 2 * PER, GROUPS = VALUES / 4;
  float pick[4];  // an operand: the first eight rows of a result are those of the other operand
  float even, odd;
  // Two zeros that the compiler does not know: others it would put into place again for each product.
  __device__ __forceinline__ void prepare(const Place& at, float zero, float other) {
    pick[0] = at.group == at.part ? 1.0f : 0.0f;
    pick[2] = at.group == at.part + 4 ? 1.0f : 0.0f;
    pick[1] = zero;
    pick[3] = other;
    even = at.group % 2 ? 0.0f : 1.0f;
    odd = 1.0f - even;
  }
  // The sums over pairs of quads, of value `group` / 4 of the two, of the lanes whose part is `group` % 4.
  __device__ __forceinline__ float halve(float one, float two) const {
    float d[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    mma_tf32(d, pick, one, two);
    if (EXACT) mma_tf32(d, pick, one - high_bits(one), two - high_bits(two));
    return d[0] + d[1];
  }
  // Afterwards sums[2 g + e] is the sum of value 4 g + 2 e + `group` / 4 of the lanes whose part is `group` % 4.
  __device__ __forceinline__ void operator()(float (&sums)[2 * GROUPS], const float (&x)[VALUES]) const {
#pragma unroll
    for (int g = 0; g < GROUPS; g += 2) {
      float halves[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (4 * g + 2 * j < VALUES) halves[j] = halve(x[4 * g + 2 * j], x[4 * g + 2 * j + 1]);
      float d[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      mma_tf32(d, halves, even, odd);
      if (EXACT) {
        float rest[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) rest[e] = halves[e] - high_bits(halves[e]);
        mma_tf32(d, rest, even, odd);
      }
      sums[2 * g] = d[0];
      sums[2 * g + 1] = d[2];
      if (g + 1 < GROUPS) {
        sums[2 * g + 2] = d[1];
        sums[2 * g + 3] = d[3];
      }
    }
  }
};

// Gradients. dpairs [groups of channels, rows, 2 STATE]: those of queries and keys, summed over the block's channels;
// dskip [sequences, channels] and drates [sequences, channels * STATE]: summed over time. blockIdx: channels, sequence.
KERNEL __launch_bounds__(THREADS, MIN_BLOCKS) scan_backward(Rows<const real> u, Rows<const real> step, Rows<const real> keys,
                                                Rows<const real> queries, const float* a_log, const float* skip,
                                                Rows<const real> gate, const float* kept, Rows<const real> dy, Rows<real> du,
                                                Rows<real> dstep, Rows<real> dgate, float* dpairs, float* dskip,
                                                float* drates, int time) {
  DYNAMIC_SHARED(Backward, shared);
  Backward& s = *shared;
  const Place at = place(u.cols, time);
  const int chunks = (time + CHUNK - 1) / CHUNK;
  // `after`: the states after the last row of the run
  float lambda[WIDE][PER], after[WIDE][PER], rates[WIDE][PER], rate_sums[WIDE][PER], skip_sums[WIDE], weights[WIDE];
  load_rates(rates, a_log, at);
#pragma unroll
  for (int c = 0; c < WIDE; ++c) {
    skip_sums[c] = 0.0f;
    weights[c] = skip && at.live(c) ? skip[at.column(c)] : 0.0f;
#pragma unroll
    for (int i = 0; i < PER; ++i) lambda[c][i] = rate_sums[c][i] = 0.0f;
  }
  PairSums pair_sums;
  pair_sums.prepare(at, __int_as_float(min(time, 0)), __int_as_float(min(u.cols, 0)));
  const Sequence<const real> inputs(u, at), step_inputs(step, at), gates(gate, at), results(dy, at);
  const Sequence<real> to_u(du, at), to_step(dstep, at), to_gate(dgate, at);
  const Sequence<const float> states = kept_states(kept, at, chunks, u.cols);
  float* to_pairs = dpairs + ((long long)blockIdx.x * u.rows + at.rows) * (2 * STATE);
  Elements own_u, own_step, own_gate, own_dy;
  auto load = [&](int row) {
    const bool live = row >= 0 && row < time;
    own_u.load(inputs, row, live, at);
    own_step.load(step_inputs, row, live, at);
    own_dy.load(results, row, live, at);
#if GATED
    own_gate.load(gates, row, live, at);
#endif
  };
  load(chunks * CHUNK - RUN + at.part);
  auto park = [&](int what, const Elements& x) {
    s.own[what][at.thread] = x.one;
    s.others[what][at.thread] = x.two;
  };
  auto unpark = [&](int what, Elements& x) {
    x.one = s.own[what][at.thread];
    x.two = s.others[what][at.thread];
  };
  auto put = [&](int what, const float (&x)[WIDE]) {
#pragma unroll
    for (int c = 0; c < WIDE; ++c) s.sums[what][c][at.thread] = x[c];
  };
  auto advance_row = [&](float (&h)[WIDE][PER], int r) {
    float key[PER];
    Step steps[PLACES] = {};
    load_all<PER>(&s.keys[0][r][at.part * PER], key);
    s.steps[at.warp][r].load(steps, at.group);
    advance(h, steps, key, rates);
  };
  for (int chunk = chunks - 1; chunk >= 0; --chunk) {
    const int first = chunk * CHUNK, rows = min(CHUNK, time - first);
    float h[WIDE][PER];
    {
      Keys now;
      now.load(keys, queries, at.rows + first, rows);
      Elements input[RUNS], sizes[RUNS];
#pragma unroll
      for (int run = 0; run < RUNS; ++run) {
        const int row = first + run * RUN + at.part;
        input[run].load(inputs, row, row < time, at);
        sizes[run].load(step_inputs, row, row < time, at);
      }
      load_kept(h, states, at, chunk);
      __syncthreads();
      now.store(s.keys[0]);
      __syncthreads();
      const float squares = LONGHORN ? squares_of_row(s.keys[0]) : 0.0f;
#pragma unroll
      for (int run = 0; run < RUNS; ++run) {
        const int r = run * RUN + at.part;
        float x[WIDE], size[WIDE];
        Step steps[PLACES] = {};
        input[run].get(x);
        sizes[run].get(size);
        const float square = LONGHORN ? __shfl_sync(0xffffffffu, squares, r) : 0.0f;
#pragma unroll
        for (int c = 0; c < WIDE; ++c) {
          steps[c].size = step_size(r < rows ? size[c] : NONE, square);
          steps[c].product = steps[c].size * x[c];
        }
        s.steps[at.warp][r].store(steps, at.group);
      }
      __syncwarp();
    }
#pragma unroll 1
    for (int run = 0; run + 1 < RUNS; ++run) {
      if (STORED >> run & 1) {
        const int slot = __popc(STORED & ((1u << run) - 1));
#pragma unroll
        for (int i = 0; i < PER * WIDE; i += Backward::AT_ONCE)
          store_vector<Backward::AT_ONCE>(s.starts[slot][i / Backward::AT_ONCE][at.thread], &h[0][0] + i);
      }
#pragma unroll
      for (int r = 0; r < RUN; ++r) advance_row(h, run * RUN + r);
    }
    if (chunk == chunks - 1) {
#pragma unroll
      for (int c = 0; c < WIDE; ++c)
#pragma unroll
        for (int i = 0; i < PER; ++i) after[c][i] = h[c][i];
#pragma unroll 1
      for (int r = CHUNK - RUN; r < CHUNK; ++r) advance_row(after, r);
    }
#pragma unroll 1
    for (int run = RUNS - 1; run >= 0; --run) {
      {
        float input[WIDE], dout[WIDE], z[WIDE], gradient[PLACES] = {};
        own_u.get(input);
        own_dy.get(dout);
        if (GATED) own_gate.get(z);
#pragma unroll
        for (int c = 0; c < WIDE; ++c) {
          gradient[c] = GATED ? dout[c] * z[c] * sigmoid(z[c]) : dout[c];
          skip_sums[c] += gradient[c] * input[c];
        }
        store_all<PLACES>(s.dy[at.warp][at.part][at.group], gradient);
        park(0, own_u);
        park(1, own_step);
        if (GATED) park(2, own_gate);
        park(3, own_dy);
      }
      // the states before each row
      float before[RUN][WIDE][PER];
      if (run + 1 < RUNS) {
        const bool again = !(STORED >> run & 1) && run > 0;
        const int from = run - again;
        if (from == 0) load_kept(h, states, at, chunk);
        else {
          const int slot = __popc(STORED & ((1u << from) - 1));
#pragma unroll
          for (int i = 0; i < PER * WIDE; i += Backward::AT_ONCE)
            load_vector<Backward::AT_ONCE>(s.starts[slot][i / Backward::AT_ONCE][at.thread], &h[0][0] + i);
        }
        if (again)
#pragma unroll
          for (int r = 0; r < RUN; ++r) advance_row(h, from * RUN + r);
      }
#pragma unroll
      for (int r = 0; r < RUN; ++r) {
#pragma unroll
        for (int c = 0; c < WIDE; ++c)
#pragma unroll
          for (int i = 0; i < PER; ++i) before[r][c][i] = h[c][i];
        if (r + 1 < RUN) advance_row(h, run * RUN + r);
      }
      __syncwarp();
#pragma unroll
      for (int r = RUN - 1; r >= 0; --r) {
        float key[PER], query[PER], gradient[PLACES], sums[WIDE], x[2 * PER], pairs[PER];
        Step steps[PLACES] = {};
        load_all<PER>(&s.keys[0][run * RUN + r][at.part * PER], key);
        load_all<PER>(&s.keys[1][run * RUN + r][at.part * PER], query);
        s.steps[at.warp][run * RUN + r].load(steps, at.group);
        load_all<PLACES>(s.dy[at.warp][r][at.group], gradient);
        const bool mine = r == at.part;
        if (GATED) {
          dot(sums, after, query);
          if (mine) put(0, sums);
        }
#pragma unroll
        for (int i = 0; i < PER; ++i) {
          x[i] = 0.0f;
#pragma unroll
          for (int c = 0; c < WIDE; ++c) {
            x[i] += gradient[c] * after[c][i];
            lambda[c][i] += query[i] * gradient[c];
          }
        }
        dot(sums, lambda, key);
        if (mine) put(2, sums);
        if (LONGHORN) {
          float square[PER], others[WIDE][PER], rest[WIDE], squares = 0.0f;
#pragma unroll
          for (int i = 0; i < PER; ++i) {
            x[PER + i] = 0.0f;
            square[i] = key[i] * key[i];
#pragma unroll
            for (int c = 0; c < WIDE; ++c) {
              const float part = steps[c].size * lambda[c][i];
              x[PER + i] += steps[c].product * lambda[c][i];
              lambda[c][i] -= square[i] * part;
              others[c][i] = part * before[r][c][i];
            }
          }
          dot(rest, others, square);
#pragma unroll
          for (int c = 0; c < WIDE; ++c) {
            sums[c] = steps[c].product * sums[c] - rest[c];
            squares += steps[c].size * sums[c];
          }
#pragma unroll
          for (int i = 0; i < PER; ++i) {
            float sum = squares;
#pragma unroll
            for (int c = 0; c < WIDE; ++c) sum += others[c][i];
            x[PER + i] -= 2.0f * key[i] * sum;
          }
        } else {
#pragma unroll
          for (int c = 0; c < WIDE; ++c) sums[c] = 0.0f;
#pragma unroll
          for (int i = 0; i < PER; ++i) {
            x[PER + i] = 0.0f;
#pragma unroll
            for (int c = 0; c < WIDE; ++c) {
              x[PER + i] += steps[c].product * lambda[c][i];
              lambda[c][i] *= fast_exp2(steps[c].size * rates[c][i]);
              const float part = lambda[c][i] * before[r][c][i];
              sums[c] += part * rates[c][i];
              rate_sums[c][i] += part * steps[c].size;
            }
          }
          quad_sums(sums);
        }
        if (mine) put(1, sums);
        pair_sums(pairs, x);
        if (mine)
#pragma unroll
          for (int i = 0; i < PER; ++i)
            s.pairs[run & 1][at.warp][r][2 * i / PER * ALL + 2 * i % PER + at.group % 4 * PER + at.group / 4] = pairs[i];
#pragma unroll
        for (int c = 0; c < WIDE; ++c)
#pragma unroll
          for (int i = 0; i < PER; ++i) after[c][i] = before[r][c][i];
      }
      {
        const int row = first + run * RUN + at.part;
        const bool live = row < time;
        unpark(0, own_u);
        unpark(1, own_step);
        if (GATED) unpark(2, own_gate);
        unpark(3, own_dy);
        float input[WIDE], size[WIDE], gradient[WIDE], z[WIDE], out[WIDE], dsize[WIDE], dproduct[WIDE], dz[WIDE];
        Step steps[PLACES] = {};
        own_u.get(input);
        own_step.get(size);
        own_dy.get(gradient);
        if (GATED) own_gate.get(z);
        load(row - RUN);
#pragma unroll
        for (int c = 0; c < WIDE; ++c) {
          if (GATED) out[c] = s.sums[0][c][at.thread];
          dsize[c] = s.sums[1][c][at.thread];
          dproduct[c] = s.sums[2][c][at.thread];
        }
        s.steps[at.warp][run * RUN + at.part].load(steps, at.group);
#pragma unroll
        for (int c = 0; c < WIDE; ++c) {
          if (GATED) {
            const float g = sigmoid(z[c]), silu = z[c] * g;
            dz[c] = gradient[c] * (out[c] + weights[c] * input[c]) * (g + silu * (1.0f - g));
            gradient[c] *= silu;
          }
          const float chain = LONGHORN ? dsize[c] : dsize[c] * LN_2 + input[c] * dproduct[c];
          dsize[c] = chain * slope(size[c], steps[c].size);
          dproduct[c] = weights[c] * gradient[c] + steps[c].size * dproduct[c];
        }
        store_elements(to_u, row, dproduct, live, at);
        store_elements(to_step, row, dsize, live, at);
        if (GATED) store_elements(to_gate, row, dz, live, at);
      }
      // the sums of a run are read while those of the next are written to the other place
      __syncthreads();
#pragma unroll
      for (int from = 0; from < RUN * 2 * STATE; from += THREADS) {
        const int i = from + at.thread, row = i / (2 * STATE), half = i / STATE % 2, n = i % STATE;
        if (i < min(RUN, time - first - run * RUN) * 2 * STATE) {
          float sum = 0.0f;
#pragma unroll
          for (int w = 0; w < WARPS; ++w) sum += s.pairs[run & 1][w][row][half * ALL + n];
          to_pairs[(long long)(first + run * RUN) * (2 * STATE) + i] = sum;
        }
      }
    }
  }
#pragma unroll
  for (int c = 0; c < WIDE; ++c) {
    const float sum = row_sum(skip_sums[c]);
    if (dskip && at.part == 0 && at.live(c)) dskip[(long long)at.sequence * u.cols + at.column(c)] = sum;
#if !LONGHORN
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      const int n = at.part * PER + i;
      if (n < STATE && at.live(c))
        drates[((long long)at.sequence * u.cols + at.column(c)) * STATE + n] = rate_sums[c][i] * rates[c][i] * LN_2;
    }
#endif
  }
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
