// Products of tiles in shared memory, for kernels whose block is a few warps: a warp has 16 rows of a result, in the
// registers that tensor cores use. With bf16 operands tensor cores compute it, with f32 operands multiply-adds, and both
// leave the sums in the same places, so that all else is written once.
//
// A result of N columns is `float acc[N / 8][4]`: of a thread, acc[j][e] has row `tile_row(e)` of the warp's 16 and column
// `tile_column(j, e)`.
#pragma once
#include "real.cuh"

// The next multiple of 16: products take steps of 16.
__device__ constexpr int padded(int n) { return (n + 15) / 16 * 16; }
// Elements from one row of a shared tile of `cols` columns to the next, so that rows begin in different banks.
__device__ constexpr int pitch(int cols) { return padded(cols) + (sizeof(real) == 2 ? 8 : 4); }

// Threads of a block: four warps.
constexpr int TILE_THREADS = 128;

DEVICE int tile_lane() { return threadIdx.x & 31; }
DEVICE int tile_warp() { return threadIdx.x >> 5; }
DEVICE int tile_row(int e) { return tile_lane() / 4 + (e / 2) * 8; }
DEVICE int tile_column(int j, int e) { return j * 8 + tile_lane() % 4 * 2 + (e & 1); }

template <int N> DEVICE void clear(float (&acc)[N][4]) {
#pragma unroll
  for (int j = 0; j < N; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) acc[j][e] = 0.0f;
}

// The sum over the four threads that have a row.
DEVICE float row_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
DEVICE float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

#ifndef CUDA_EMULATION
// Starts a copy of 16 bytes to shared memory.
DEVICE void copy_async(void* to, const void* from) {
  const unsigned at = (unsigned)__cvta_generic_to_shared(to);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
}
// Ends a group of copies.
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N groups are in flight.
template <int N> DEVICE void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
DEVICE void load_matrices(unsigned (&r)[4], const void* row, bool transposed) {
  const unsigned at = (unsigned)__cvta_generic_to_shared(row);
  if (transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}

// d [16, 8] += a [16, 16] b [16, 8] of a warp: bf16 operands, f32 sums.
DEVICE void mma_bf16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// d [16, 8] += a [16, 8] b [8, 8] of a warp: of the operands the sign, the exponent and ten more bits, f32 sums. Of a lane,
// a[e] has row lane / 4 + e % 2 * 8 and column lane % 4 + e / 2 * 4; b0 and b1 have rows lane % 4 and that + 4, column lane / 4.
DEVICE void mma_tf32(float (&d)[4], const float (&a)[4], float b0, float b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
        "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}
#endif

// One step of 16 of a product, for all columns: b is stored [K, N], or [N, K] if transposed.
template <int N, bool B_TRANSPOSED>
DEVICE void multiply_step(float (&acc)[N / 8][4], const unsigned (&a)[4], const bf16* b, int ldb, int k) {
  const int l = tile_lane();
#pragma unroll
  for (int n = 0; n < N; n += 16) {
    unsigned r[4];
    if (B_TRANSPOSED)
      load_matrices(r, b + (n + l % 8 + l / 16 * 8) * ldb + k + l / 8 % 2 * 8, false);
    else
      load_matrices(r, b + (k + l % 8 + l / 8 % 2 * 8) * ldb + n + l / 16 * 8, true);
    mma_bf16(acc[n / 8], a, r[0], r[1]);
    mma_bf16(acc[n / 8 + 1], a, r[2], r[3]);
  }
}

// acc += a b for 16 rows of a: a is stored [16, K], or [K, 16] if transposed; b [K, N], or [N, K] if transposed.
template <int N, int K, bool A_TRANSPOSED, bool B_TRANSPOSED>
DEVICE void multiply(float (&acc)[N / 8][4], const bf16* a, int lda, const bf16* b, int ldb) {
  const int l = tile_lane();
#pragma unroll
  for (int k = 0; k < K; k += 16) {
    unsigned r[4];
    if (A_TRANSPOSED)
      load_matrices(r, a + (k + l % 8 + l / 16 * 8) * lda + l / 8 % 2 * 8, true);
    else
      load_matrices(r, a + (l % 8 + l / 8 % 2 * 8) * lda + k + l / 16 * 8, false);
    multiply_step<N, B_TRANSPOSED>(acc, r, b, ldb, k);
  }
}
template <int N, bool B_TRANSPOSED>
DEVICE void multiply_add(float (&acc)[N / 8][4], float a0, float a1, const float* b, int ldb, int k) {
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {
    const int n = tile_column(j, 0);
    float b0, b1;
    if (B_TRANSPOSED) {
      b0 = b[n * ldb + k];
      b1 = b[(n + 1) * ldb + k];
    } else {
      const float2 v = *reinterpret_cast<const float2*>(b + k * ldb + n);
      b0 = v.x;
      b1 = v.y;
    }
    acc[j][0] += a0 * b0;
    acc[j][1] += a0 * b1;
    acc[j][2] += a1 * b0;
    acc[j][3] += a1 * b1;
  }
}
template <int N, int K, bool A_TRANSPOSED, bool B_TRANSPOSED>
DEVICE void multiply(float (&acc)[N / 8][4], const float* a, int lda, const float* b, int ldb) {
  const int row = tile_row(0);
#pragma unroll 4
  for (int k = 0; k < K; ++k) {
    const float a0 = A_TRANSPOSED ? a[k * lda + row] : a[row * lda + k];
    const float a1 = A_TRANSPOSED ? a[k * lda + row + 8] : a[(row + 8) * lda + k];
    multiply_add<N, B_TRANSPOSED>(acc, a0, a1, b, ldb, k);
  }
}

// acc += p b, where p [16, K] is the result of another product, rounded to operands.
template <int N, int K, bool B_TRANSPOSED>
DEVICE void multiply_registers(float (&acc)[N / 8][4], const float (&p)[K / 8][4], const bf16* b, int ldb) {
#pragma unroll
  for (int k = 0; k < K; k += 16) {
    const unsigned a[4] = {bf16_pair(p[k / 8][0], p[k / 8][1]), bf16_pair(p[k / 8][2], p[k / 8][3]),
                           bf16_pair(p[k / 8 + 1][0], p[k / 8 + 1][1]), bf16_pair(p[k / 8 + 1][2], p[k / 8 + 1][3])};
    multiply_step<N, B_TRANSPOSED>(acc, a, b, ldb, k);
  }
}
template <int N, int K, bool B_TRANSPOSED>
DEVICE void multiply_registers(float (&acc)[N / 8][4], const float (&p)[K / 8][4], const float* b, int ldb) {
  const int quad = tile_lane() & ~3;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const float a0 = __shfl_sync(0xffffffffu, p[k / 8][k & 1], quad + k % 8 / 2);
    const float a1 = __shfl_sync(0xffffffffu, p[k / 8][2 + (k & 1)], quad + k % 8 / 2);
    multiply_add<N, B_TRANSPOSED>(acc, a0, a1, b, ldb, k);
  }
}

template <int BYTES> struct Raw;
template <> struct Raw<2> { typedef unsigned short type; };
template <> struct Raw<4> { typedef unsigned type; };
template <> struct Raw<8> { typedef uint2 type; };
template <> struct Raw<16> { typedef uint4 type; };

// Starts to load a tile of TALL rows of DIM columns, of which `rows` exist, by the whole block; zeros where there is nothing.
// AT_ONCE elements are copied at once. The tile is there after `tiles_ready`.
template <int TALL, int DIM, int AT_ONCE>
DEVICE void load_tile(real* to, const real* from, long long stride, int rows) {
  typedef typename Raw<AT_ONCE * sizeof(real)>::type raw;
  constexpr int PER_ROW = padded(DIM) / AT_ONCE, COUNT = TALL * PER_ROW / TILE_THREADS;
  static_assert(COUNT * TILE_THREADS == TALL * PER_ROW, "a tile is a whole number of copies for each thread");
  if constexpr (sizeof(raw) == 16) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const int at = i * TILE_THREADS + (int)threadIdx.x, r = at / PER_ROW, c = at % PER_ROW * AT_ONCE;
      real* place = to + r * pitch(DIM) + c;
      if (r < rows && c < DIM) copy_async(place, from + r * stride + c);
      else *reinterpret_cast<raw*>(place) = raw{};
    }
  } else {
    // all loads of a batch before its stores, which the compiler would not let them pass
    constexpr int BATCH = COUNT % 8 == 0 ? 8 : COUNT % 4 == 0 ? 4 : COUNT % 2 == 0 ? 2 : 1;
    for (int i = 0; i < COUNT; i += BATCH) {
      raw v[BATCH];
#pragma unroll
      for (int b = 0; b < BATCH; ++b) {
        const int at = (i + b) * TILE_THREADS + (int)threadIdx.x, r = at / PER_ROW, c = at % PER_ROW * AT_ONCE;
        v[b] = raw{};
        if (r < rows && c < DIM) v[b] = *reinterpret_cast<const raw*>(from + r * stride + c);
      }
#pragma unroll
      for (int b = 0; b < BATCH; ++b) {
        const int at = (i + b) * TILE_THREADS + (int)threadIdx.x, r = at / PER_ROW, c = at % PER_ROW * AT_ONCE;
        *reinterpret_cast<raw*>(to + r * pitch(DIM) + c) = v[b];
      }
    }
  }
}

// Waits for the tiles that the block has started to load. Everything before it is done, too.
DEVICE void tiles_ready() {
  copy_commit();
  copy_wait<0>();
  __syncthreads();
}

// The warp's 16 rows of a result, from row `first` on, times a factor, to memory of DIM columns and `rows` rows.
template <int DIM, int AT_ONCE, int N>
DEVICE void store_tile(real* to, long long stride, int first, int rows, const float (&acc)[N][4], float low, float high) {
#pragma unroll
  for (int j = 0; j < N; ++j)
#pragma unroll
    for (int e = 0; e < 4; e += 2) {
      const int r = first + tile_row(e), c = tile_column(j, 0);
      const float factor = e ? high : low;
      const float pair[2] = {acc[j][e] * factor, acc[j][e + 1] * factor};
      if (r < rows) {
        real* at = to + r * stride + c;
        if (AT_ONCE > 1) {
          if (c < DIM) store_vector<2>(at, pair);
        } else {
          if (c < DIM) store(at, pair[0]);
          if (c + 1 < DIM) store(at + 1, pair[1]);
        }
      }
    }
}
