// The learning rate, the norm of all gradients, and AdamW over all parameters in one launch; formulas in
// kernels/src/cpu/optimizer.rs and ops/src/optimizer.rs. Tensors are cut into pieces, one for each block, listed in tables.
#include "common.cuh"

// Update number *step, from 0, to the rate. kind 0: `peak` always; 1: warm-up and half cosine down to `floor` at `steps`;
// 2: from `table` of `entries` rates, the last of which holds on.
KERNEL learning_rate(const int* step, int kind, double peak, double floor, long long warmup, long long steps,
                     const double* table, long long entries, float* lr) {
  const long long at = *step;
  double rate = peak;
  if (kind == 2) {
    rate = entries ? table[at < entries ? at : entries - 1] : 0.0;
  } else if (kind == 1) {
    if (at < warmup) {
      rate = peak * at / warmup;
    } else if (at > steps) {
      rate = floor;
    } else {
      const long long span = steps > warmup ? steps - warmup : 1;
      rate = floor + 0.5 * (1.0 + cos(3.14159265358979323846 * ((double)(at - warmup) / span))) * (peak - floor);
    }
  }
  *lr = (float)rate;
}

struct Piece {
  const float* data;
  long long len;
};

// sums[block] = the sum of the squares of a piece.
KERNEL __launch_bounds__(256) sum_of_squares(const Piece* pieces, double* sums) {
  __shared__ double shared[256];
  const Piece piece = pieces[blockIdx.x];
  double total = 0.0;
  const long long vectors = (reinterpret_cast<size_t>(piece.data) & 15) ? 0 : piece.len / 4;
  const float4* data = reinterpret_cast<const float4*>(piece.data);
  // a thread adds 8 x 4 squares in f32 before it goes on in f64
  for (long long i = threadIdx.x; i < vectors; i += 8 * 256) {
    float sum = 0.0f;
#pragma unroll
    for (int u = 0; u < 8; ++u)
      if (i + u * 256 < vectors) {
        const float4 v = data[i + u * 256];
        sum += v.x * v.x + v.y * v.y + (v.z * v.z + v.w * v.w);
      }
    total += sum;
  }
  for (long long i = 4 * vectors + threadIdx.x; i < piece.len; i += 256) total += (double)piece.data[i] * piece.data[i];
  shared[threadIdx.x] = total;
  __syncthreads();
  for (unsigned half = 128; half > 0; half /= 2) {
    if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) sums[blockIdx.x] = shared[0];
}

// The root of the sum of all. One block of 256.
KERNEL __launch_bounds__(256) root_of_sum(const double* sums, long long n, float* out) {
  __shared__ double shared[256];
  double total = 0.0;
  for (long long i = threadIdx.x; i < n; i += 256) total += sums[i];
  shared[threadIdx.x] = total;
  __syncthreads();
  for (unsigned half = 128; half > 0; half /= 2) {
    if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) *out = (float)sqrt(shared[0]);
}

struct Update {
  float* parameter;
  const float* gradient;
  float* m;
  float* v;
  long long len;
  double decay;
};

struct Factors {
  float gradient, beta1, rest1, beta2, rest2, shrink, rate, root, eps;
};

DEVICE void adamw_element(float& p, float gradient, float& m, float& v, const Factors& f) {
  const float g = gradient * f.gradient;
  m = f.beta1 * m + f.rest1 * g;
  v = f.beta2 * v + f.rest2 * g * g;
  p = f.shrink * p - f.rate * m / (sqrtf(v) * f.root + f.eps);
}

// One step of a piece of a parameter. `clip` is the largest norm of all gradients, or negative.
KERNEL __launch_bounds__(256) adamw(const Update* updates, const int* step, const float* lr, const float* norm, double beta1,
                                    double beta2, double eps, double clip) {
  // with a norm that is not finite nothing changes: the host reads it too, and decides what becomes of the run
  if (!(*norm <= 3.402823466e38f)) return;
  __shared__ Factors shared;
  const Update u = updates[blockIdx.x];
  if (threadIdx.x == 0) {
    const double rate = *lr, number = *step + 1.0;
    const double coefficient = clip < 0.0 ? 1.0 : clip / ((double)*norm + 1e-6);
    shared.gradient = coefficient > 1.0 ? 1.0f : (float)coefficient;
    shared.beta1 = (float)beta1;
    shared.rest1 = (float)(1.0 - beta1);
    shared.beta2 = (float)beta2;
    shared.rest2 = (float)(1.0 - beta2);
    shared.shrink = (float)(1.0 - rate * u.decay);
    shared.rate = (float)(rate / (1.0 - pow(beta1, number)));
    shared.root = (float)(1.0 / sqrt(1.0 - pow(beta2, number)));
    shared.eps = (float)eps;
  }
  __syncthreads();
  const Factors f = shared;
  const size_t addresses = reinterpret_cast<size_t>(u.parameter) | reinterpret_cast<size_t>(u.gradient) |
                           reinterpret_cast<size_t>(u.m) | reinterpret_cast<size_t>(u.v);
  const long long vectors = addresses & 15 ? 0 : u.len / 4;
  float4* ps = reinterpret_cast<float4*>(u.parameter);
  const float4* gs = reinterpret_cast<const float4*>(u.gradient);
  float4 *ms = reinterpret_cast<float4*>(u.m), *vs = reinterpret_cast<float4*>(u.v);
#pragma unroll 2
  for (long long i = threadIdx.x; i < vectors; i += 256) {
    float4 p = ps[i], m = ms[i], v = vs[i];
    const float4 g = gs[i];
    adamw_element(p.x, g.x, m.x, v.x, f);
    adamw_element(p.y, g.y, m.y, v.y, f);
    adamw_element(p.z, g.z, m.z, v.z, f);
    adamw_element(p.w, g.w, m.w, v.w, f);
    ps[i] = p;
    ms[i] = m;
    vs[i] = v;
  }
  for (long long i = 4 * vectors + threadIdx.x; i < u.len; i += 256)
    adamw_element(u.parameter[i], u.gradient[i], u.m[i], u.v[i], f);
}
