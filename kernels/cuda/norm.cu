// RMS, layer and group normalisation of groups of WIDTH columns, forward and backward; formulas in
// kernels/src/cpu/norm.rs. A team of TEAM threads has a group of a row in registers, so that memory is read once; teams are
// parts of a warp, or a whole block for wide rows. blockIdx.y is the group.
#include "common.cuh"
#include "real.cuh"

// Columns of a group.
#ifndef WIDTH
#define WIDTH 768
#endif
// Threads of a team, a power of two: up to 32, or all of the block.
#ifndef TEAM
#define TEAM 32
#endif
// Elements that are loaded at once.
#ifndef VECTOR
#define VECTOR 4
#endif
// Whether the mean is taken away.
#ifndef LAYER
#define LAYER 0
#endif

constexpr int CHUNKS = (WIDTH + TEAM * VECTOR - 1) / (TEAM * VECTOR);
constexpr int HELD = CHUNKS * VECTOR;

// Column of a thread's element.
DEVICE int column(int chunk) { return (chunk * TEAM + (int)(threadIdx.x % TEAM)) * VECTOR; }

template <class T> DEVICE void load_group(const T* row, bool live, float (&x)[HELD]) {
#pragma unroll
  for (int i = 0; i < CHUNKS; ++i) {
#pragma unroll
    for (int e = 0; e < VECTOR; ++e) x[i * VECTOR + e] = 0.0f;
    if (live && column(i) < WIDTH) load_vector<VECTOR>(row + column(i), x + i * VECTOR);
  }
}

template <class T> DEVICE void store_group(T* row, bool live, const float (&x)[HELD]) {
#pragma unroll
  for (int i = 0; i < CHUNKS; ++i)
    if (live && column(i) < WIDTH) store_vector<VECTOR>(row + column(i), x + i * VECTOR);
}

DEVICE float team_sum(float x, float* scratch) {
  if (TEAM > 32) return block_sum(x, scratch);
#pragma unroll
  for (int o = (TEAM > 32 ? 32 : TEAM) / 2; o > 0; o >>= 1) x += __shfl_xor_sync(0xffffffffu, x, o);
  return x;
}

// y = norm(x) w + b, or the norm of h = x + residual. statistics [rows, groups] (or [rows, groups, 2]): the inverse
// deviation, after the mean if there is one.
KERNEL norm_forward(Rows<const real> x, Rows<const real> residual, Rows<real> h, const float* w, const float* b,
                    Rows<real> y, float* statistics, float eps) {
  __shared__ float scratch[32];
  const int teams = blockDim.x / TEAM, team = threadIdx.x / TEAM, groups = gridDim.y, group = blockIdx.y;
  const int first = group * WIDTH;
  for (long long base = (long long)blockIdx.x * teams; base < x.rows; base += (long long)gridDim.x * teams) {
    const long long r = base + team;
    const bool live = r < x.rows;
    float v[HELD];
    load_group(x.row(live ? r : 0) + first, live, v);
    if (residual.data) {
      float other[HELD];
      load_group(residual.row(live ? r : 0) + first, live, other);
#pragma unroll
      for (int i = 0; i < HELD; ++i) v[i] = rounded<real>(v[i] + other[i]);
      store_group(h.row(live ? r : 0) + first, live, v);
    }
    float mean = 0.0f, squares = 0.0f;
    if (LAYER) {
#pragma unroll
      for (int i = 0; i < HELD; ++i) mean += v[i];
      mean = team_sum(mean, scratch) / WIDTH;
    }
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i)
#pragma unroll
      for (int e = 0; e < VECTOR; ++e) {
        const float d = column(i) < WIDTH ? v[i * VECTOR + e] - mean : 0.0f;
        v[i * VECTOR + e] = d;
        squares += d * d;
      }
    const float inverse = 1.0f / sqrtf(team_sum(squares, scratch) / WIDTH + eps);
    float scale[HELD];
    if (w) load_group(w + first, true, scale);
#pragma unroll
    for (int i = 0; i < HELD; ++i) v[i] *= w ? inverse * scale[i] : inverse;
    if (b) {
      load_group(b + first, true, scale);
#pragma unroll
      for (int i = 0; i < HELD; ++i) v[i] += scale[i];
    }
    store_group(y.row(live ? r : 0) + first, live, v);
    if (live && threadIdx.x % TEAM == 0) {
      float* to = statistics + (r * groups + group) * (LAYER ? 2 : 1);
      if (LAYER) *to++ = mean;
      *to = inverse;
    }
  }
}

// dx = norm'(dy) + dh. Sums over the rows of this block go to partials [gridDim.x, 2, cols]: of dy n, and of dy; the first
// half is not written unless `weights`, the second not unless `biases`.
KERNEL norm_backward(Rows<const real> x, const float* statistics, const float* w, Rows<const real> dy, Rows<const real> dh,
                     Rows<real> dx, float* partials, int weights, int biases) {
  __shared__ float scratch[32];
  DYNAMIC_SHARED(float, sums);
  const int teams = blockDim.x / TEAM, team = threadIdx.x / TEAM, groups = gridDim.y, group = blockIdx.y;
  const int first = group * WIDTH;
  float dw[HELD], db[HELD], scale[HELD];
#pragma unroll
  for (int i = 0; i < HELD; ++i) dw[i] = db[i] = 0.0f, scale[i] = 1.0f;
  if (w) load_group(w + first, true, scale);
  for (long long base = (long long)blockIdx.x * teams; base < x.rows; base += (long long)gridDim.x * teams) {
    const bool live = base + team < x.rows;
    const long long r = live ? base + team : 0;
    float n[HELD], g[HELD];
    load_group(x.row(r) + first, live, n);
    load_group(dy.row(r) + first, live, g);
    const float* from = statistics + (r * groups + group) * (LAYER ? 2 : 1);
    const float mean = LAYER ? from[0] : 0.0f, inverse = from[LAYER ? 1 : 0];
    float sum = 0.0f, product = 0.0f;
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
      n[i] = (n[i] - mean) * inverse;
      dw[i] += g[i] * n[i];
      db[i] += g[i];
      g[i] *= scale[i];
      sum += g[i];
      product += g[i] * n[i];
    }
    // where there is no column, g is 0
    sum = LAYER ? team_sum(sum, scratch) / WIDTH : 0.0f;
    product = team_sum(product, scratch) / WIDTH;
#pragma unroll
    for (int i = 0; i < HELD; ++i) g[i] = inverse * (g[i] - sum - n[i] * product);
    if (dh.data) {
      load_group(dh.row(r) + first, live, n);
#pragma unroll
      for (int i = 0; i < HELD; ++i) g[i] += n[i];
    }
    store_group(dx.row(r) + first, live, g);
  }
  if (!weights && !biases) return;
  // the teams one after the other
  for (int t = 0; t < teams; ++t) {
    if (team == t)
#pragma unroll
      for (int i = 0; i < CHUNKS; ++i)
#pragma unroll
        for (int e = 0; e < VECTOR; ++e) {
          const int c = column(i) + e;
          if (c < WIDTH) {
            sums[c] = dw[i * VECTOR + e] + (t ? sums[c] : 0.0f);
            sums[WIDTH + c] = db[i * VECTOR + e] + (t ? sums[WIDTH + c] : 0.0f);
          }
        }
    __syncthreads();
  }
  float* to = partials + (long long)blockIdx.x * 2 * x.cols + first;
  for (int c = threadIdx.x; c < WIDTH; c += blockDim.x) {
    if (weights) to[c] = sums[c];
    if (biases) to[x.cols + c] = sums[WIDTH + c];
  }
}
